"""Kafka with locks: `provision`, the worker and the demo get in, and say what they may not do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError as AioKafkaError
from confluent_kafka.admin import NewTopic

from streams_app.errors import KafkaUnreachable
from streams_app.kafka import KafkaAddress
from streams_app.settings import SASL_MECHANISMS, Settings
from tests.rig import free_port, wait_until
from tests.secured import (
    CREATE,
    LIMITED,
    PASSWORD,
    READ_AND_WRITE,
    TRANSACT,
    Secured,
    faust,
    new_prefix,
    secured_kafka,
)
from tests.test_dashboard import states

#: Whoever gets in by both gets in by one of them; each by itself is tried where there is time.
PROVE = pytest.mark.prove
NOT_TRANSACTIONAL = {"STREAMS_APP_AT_LEAST_ONCE_FENCED": "no", "STREAMS_APP_GUARANTEES": "at_least_once,at_most_once"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_kafka(tmp_path_factory.mktemp("secured")) as kafka:
        yield kafka


async def topics_by_aiokafka(address: KafkaAddress) -> set[str]:
    consumer = AIOKafkaConsumer(**address.aiokafka(), request_timeout_ms=5_000)
    try:
        await consumer.start()
        return set(await consumer.topics())
    finally:
        await consumer.stop()


@pytest.mark.parametrize(
    ("scheme", "mechanism"),
    [
        ("kafka+ssl", SASL_MECHANISMS[0]),
        *((scheme, mechanism) for scheme in ("kafka+sasl", "kafka+sasl+ssl") for mechanism in SASL_MECHANISMS),
    ],
)
async def test_both_libraries_get_in(secured: Secured, scheme: str, mechanism: str) -> None:
    """Whatever the password has in it, and though Heroku's certificates name no host."""
    env = {**secured.env(scheme), "STREAMS_APP_KAFKA_SASL_MECHANISM": mechanism}
    address = KafkaAddress.of(Settings.from_env(env))
    await asyncio.to_thread(address.check)
    await topics_by_aiokafka(address)


@pytest.mark.parametrize("wrong", ["another CA", "another host", "no certificate", "another password"])
async def test_who_is_not_who_he_should_be_is_refused(secured: Secured, wrong: str) -> None:
    """A broker that anybody could pass for would get the money; and what is wrong is said, a password never."""
    scheme = "kafka+sasl+ssl" if wrong == "another password" else "kafka+ssl"
    env = secured.env(scheme)
    env |= {
        "another CA": {"KAFKA_TRUSTED_CERT": trustme.CA().cert_pem.bytes().decode()},
        "another host": {"STREAMS_APP_KAFKA_CHECK_HOST_NAMES": "yes"},
        "no certificate": {"KAFKA_CLIENT_CERT": "", "KAFKA_CLIENT_CERT_KEY": ""},
        "another password": {"KAFKA_URL": secured.url(scheme, password="topsecretword")},  # noqa: S106 - wrong
    }[wrong]
    address = KafkaAddress.of(Settings.from_env(env))
    with pytest.raises(KafkaUnreachable) as raised:
        await asyncio.to_thread(address.check, 3)
    said = str(raised.value)
    assert ("SASL authentication error" if "sasl" in scheme else "SSL") in said
    assert "topsecretword" not in said
    with pytest.raises(AioKafkaError):
        await topics_by_aiokafka(address)


class Site:
    """One deployment: its environment, its prefix, its disk."""

    def __init__(self, secured: Secured, scheme: str, folder: Path, user: str, **env: str) -> None:
        self.prefix = new_prefix()
        self.folder = folder
        self.env = {
            **secured.env(scheme, user),
            "KAFKA_PREFIX": self.prefix,
            "STREAMS_APP_DATADIR": str(folder / "data"),
            "STREAMS_APP_SESSION_TIMEOUT_MS": "6000",
            **env,
        }

    def run(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        """A command of ours: exit code, stdout, and all that it said."""
        done = faust([*arguments], {**self.env, **env}, timeout_s=180)
        said = done.stdout + done.stderr
        assert PASSWORD not in said, "a password was shown"
        assert "BEGIN" not in said, "a key was shown"
        assert "Traceback" not in said, said
        return done.returncode, done.stdout, said

    @contextlib.contextmanager
    def worker(self, guarantees: int = 3, **env: str) -> Iterator[None]:
        """A worker, at work in so many guarantees; ended cleanly. It has a web server if it has a ``PORT``."""
        log = self.folder / "worker.log"
        web = [] if "PORT" in env else ["--without-web"]
        command = [sys.executable, "-m", "faust", "-A", "streams_app", "worker", "-l", "info", *web]
        with log.open("wb") as file:
            worker = subprocess.Popen(
                command, env={**os.environ, **self.env, **env}, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            started = log.read_bytes
            with contextlib.suppress(AssertionError):
                wait_until(
                    lambda: started().count(b"partitions started") >= guarantees or worker.poll() is not None,
                    "the worker has started",
                )
            assert started().count(b"partitions started") >= guarantees, log.read_text()[-5_000:]
            yield
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0, log.read_text()[-3_000:]
            assert PASSWORD not in log.read_text()
            assert "BEGIN" not in log.read_text()
        finally:
            worker.kill()
            worker.wait()

    def flow(self, inputs: tuple[str, ...]) -> None:
        """Write input, and let a worker, and then the audit, see to it."""
        for name in inputs:
            code, _, said = self.run("generate", name, "--count", "500")
            assert code == 0, said
        code, verdict, said = self.run("audit", "--json")
        assert code == 0, said
        assert json.loads(verdict)["held"] is True, said


@pytest.mark.parametrize(
    "scheme", [*(pytest.param(each, marks=PROVE) for each in ("kafka+ssl", "kafka+sasl")), "kafka+sasl+ssl"]
)
def test_a_release_is_provisioned_and_works(secured: Secured, scheme: str, tmp_path: Path) -> None:
    """One client of a worker that was forgotten would fail at its first use, in production."""
    site = Site(secured, scheme, tmp_path, "full")
    code, _, said = site.run("provision")
    assert code == 0, said
    assert "NOT GOOD" not in said
    port = free_port()
    with site.worker(PORT=str(port)):
        # The process behind the dashboard is told the address, with its certificates, by another process.
        with contextlib.closing(states(port)) as told:
            assert any(state["seen_ms"] > 0 for state in told), (tmp_path / "worker.log").read_text()[-5_000:]
        site.flow(("transfers", "sensor-readings", "page-views"))


@pytest.mark.parametrize("scheme", [pytest.param("kafka+ssl", marks=PROVE), "kafka+sasl+ssl"])
def test_the_demo_is_a_guest_of_a_kafka_with_locks(secured: Secured, scheme: str, tmp_path: Path) -> None:
    """It starts workers, generators and an audit of its own; and leaves nothing behind."""
    site = Site(secured, scheme, tmp_path, "full")
    code, verdict, said = site.run("demo", "--seconds", "8", "--kills", "1", "--zombies", "0", "--json")
    assert code == 0, said
    assert json.loads(verdict)["good"] is True
    assert not [name for name in secured.admin.list_topics(timeout=10).topics if name.startswith(site.prefix)]


class TestWithAcls:
    """Heroku's multi-tenant plans, for one: a prefix, topics are created by others, no transactional id."""

    @pytest.fixture
    def site(self, secured: Secured, tmp_path: Path) -> Site:
        return Site(secured, "kafka+sasl+ssl", tmp_path, LIMITED)

    def test_topics_that_we_may_not_create_come_with_the_commands_that_create_them(
        self, secured: Secured, site: Site
    ) -> None:
        """Else somebody writes twenty of them by hand, one with the wrong number of partitions."""
        secured.permit(site.prefix, *READ_AND_WRITE, TRANSACT)
        code, commands, said = site.run("provision")
        assert (code, "NOT GOOD" in said) == (1, True), said
        code, _, said = site.run("worker", "--without-web")
        assert (code, f"topics are missing that this cluster does not let us create: {site.prefix}" in said) == (
            1,
            True,
        )
        create_as_told(secured, commands)
        heroku = [line for line in commands.splitlines() if line.startswith("heroku kafka:topics:create ")]
        assert "heroku kafka:topics:create 'transfers' --partitions 4 --replication-factor 3" in heroku
        assert any("changelog" in line and line.endswith("--compaction") for line in heroku)
        assert "heroku kafka:consumer-groups:create 'streams-app-at-most-once'" in commands
        code, _, said = site.run("provision")
        assert code == 0, said
        code, _, said = site.run("provision", STREAMS_APP_TOPIC_REPLICATION="2")
        assert (code, "is kept 1 times, not 2" in said) == (1, True), said
        with site.worker():
            site.flow(("transfers", "sensor-readings", "page-views"))

    def test_without_transactions_the_release_fails_and_nothing_runs_under_a_lesser_guarantee(
        self, secured: Secured, site: Site
    ) -> None:
        """Money that moves at least once is not what was promised."""
        secured.permit(site.prefix, *READ_AND_WRITE, CREATE)
        code, commands, said = site.run("provision")
        assert code == 1, said
        acl = f"TransactionalId: Write and Describe on {site.prefix}streams-app* (pattern type prefixed)"
        assert acl in said
        assert f"--operation Write --operation Describe --transactional-id '{site.prefix}streams-app'" in commands
        code, _, said = site.run("worker", "--without-web")
        assert code == 1, said
        assert f"need transactions, and the cluster permits none: {acl} is missing" in " ".join(said.split())
        code, _, said = site.run("worker", "--without-web", STREAMS_APP_GUARANTEES="at_least_once")
        assert code == 1, said
        assert "STREAMS_APP_AT_LEAST_ONCE_FENCED=no" in said
        code, _, said = site.run("demo", "--seconds", "5")
        assert (code, "needs transactions, and this Kafka permits none" in " ".join(said.split())) == (1, True), said
        code, _, said = site.run("provision", **NOT_TRANSACTIONAL)
        assert code == 0, said
        with site.worker(2, **NOT_TRANSACTIONAL):
            for name in ("sensor-readings", "page-views"):
                assert site.run("generate", name, "--count", "500")[0] == 0
            code, verdict, said = site.run("audit", "--json", **NOT_TRANSACTIONAL)
            assert code == 0, said
            assert json.loads(verdict)["held"] is True

    @pytest.mark.parametrize(
        ("left_out", "named"),
        [(READ_AND_WRITE[1], "Topic: Write on"), (READ_AND_WRITE[3], "Group: Read on")],
    )
    def test_any_other_permission_that_is_missing_is_named(
        self, secured: Secured, site: Site, left_out: object, named: str
    ) -> None:
        """The brokers say 'authorization failed' to a client, and the client, for ever, to its log."""
        secured.permit(site.prefix, *(grant for grant in (*READ_AND_WRITE, CREATE, TRANSACT) if grant != left_out))
        code, _, said = site.run("provision")
        assert (code, f"{named} {site.prefix}" in said) == (1, True), said
        code, _, said = site.run("worker", "--without-web")
        assert (code, f"{named} {site.prefix}" in said) == (1, True), said

    def test_settings_that_are_hidden_cost_a_restore_and_no_guarantee(self, secured: Secured, site: Site) -> None:
        """Whether tombstones are still there cannot be known: the table is read as a whole."""
        secured.permit(
            site.prefix, *(grant for grant in READ_AND_WRITE if grant != READ_AND_WRITE[2]), CREATE, TRANSACT
        )
        assert site.run("provision")[0] == 0
        code, _, said = site.run("provision")
        assert (code, "DescribeConfigs" in said) == (0, True), said
        with site.worker():
            site.flow(("transfers",))
        with site.worker():
            site.flow(("transfers",))

    @PROVE
    def test_the_demo_stays_behind_the_prefix(self, secured: Secured, site: Site) -> None:
        """Anything else it may not touch; and where it may not create topics, it says what else to do."""
        secured.permit(site.prefix, *READ_AND_WRITE, TRANSACT)
        code, _, said = site.run("demo", "--seconds", "5")
        assert (code, "unset KAFKA_URL, and the demo brings a Kafka of its own" in " ".join(said.split())) == (1, True)
        secured.permit(site.prefix, CREATE)
        code, verdict, said = site.run("demo", "--seconds", "8", "--kills", "1", "--zombies", "0", "--json")
        assert code == 0, said
        assert "does not let us delete them" in json.loads(verdict)["kept"]


def create_as_told(secured: Secured, said: str) -> None:
    """Do as whoever runs the cluster does, with the lines that were printed."""
    topics = []
    for line in said.splitlines():
        words = shlex.split(line)
        if words[:1] != ["kafka-topics.sh"]:
            continue
        assert words[1:5] == ["--bootstrap-server", words[2], "--command-config", "admin.properties"]
        assert words[5] == "--create"
        options = list(zip(words[6::2], words[7::2], strict=True))
        single = dict(options)
        config = dict(value.split("=", 1) for name, value in options if name == "--config")
        topics.append(
            NewTopic(single["--topic"], int(single["--partitions"]), int(single["--replication-factor"]), config=config)
        )
    secured.create_topics(topics)
