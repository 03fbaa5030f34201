"""What a process says of its health, and what it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest
from aiokafka.errors import KafkaConnectionError
from faust.types import TP

from streams_app.embedded import EmbeddedKafka
from streams_app.errors import ConfigurationError, ExitCode, KafkaUnreachable, SlotLost, StartRefused, exit_code
from streams_app.faust_adapter import Read
from streams_app.health import Reason, Stall, _of_engine
from streams_app.restore import Restoring
from tests.rig import Rig, Worker, free_port, rig, wait_until

INPUT = TP("in", 0)


def asked(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def reasons(port: int) -> set[str]:
    """Why it is not ready."""
    try:
        return {each["reason"] for each in asked(port, "/readyz")[1]["reasons"]}
    except OSError:
        return {"no answer"}


class Engine(SimpleNamespace):
    """What health asks of an engine."""

    def __init__(self, **facts: Any) -> None:
        over = SimpleNamespace(is_set=lambda: facts.get("over", False))
        assigned = SimpleNamespace(over=over) if facts.get("assigned", True) else None
        super().__init__(
            assignment=assigned, is_working=False, trouble=None, restoring=facts.get("restoring", Restoring())
        )


def app_of(engine: Any, **more: Any) -> Any:
    return SimpleNamespace(engine=engine, guarantee="exactly_once", **more)


def restoring(*, over: bool = False) -> Restoring:
    """Half through."""
    made = Restoring()
    made.begin({("a", 0): 50}, {("a", 0): 100})
    made.applied(10, 25)
    if over:
        made.end()
    return made


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Engine(assigned=False), "joining"),
        (Engine(over=True), "rebalancing"),
        (Engine(restoring=restoring()), "restoring"),
        (Engine(restoring=restoring(over=True)), "starting"),
        (Engine(), "starting"),
    ],
)
def test_an_engine_that_does_not_work_says_what_it_waits_for(engine: Any, reason: str) -> None:
    """ "Not ready" alone tells nobody whether to wait or to look."""
    [found] = _of_engine(app_of(engine))
    assert (found.reason, found.guarantee) == (reason, "exactly_once")
    if reason == "restoring":
        assert found.progress == 0.5


def test_input_that_nobody_gets_done_is_told_after_a_while() -> None:
    """The worker is alive, and its partitions are where nobody else gets them."""
    engine = SimpleNamespace(is_working=True, positions={INPUT: 5})
    read = {INPUT: Read(9, 20, 9)}
    app = app_of(engine, input=SimpleNamespace(reads=lambda: read))
    stall = Stall()

    def looked(times: int) -> list[Reason]:
        for _ in range(times):
            stall.look(app)
        return list(stall.reasons(app))

    assert not looked(40)
    [found] = looked(10)
    assert (found.reason, "in-0" in found.detail) == ("no_progress", True)
    engine.positions = {INPUT: 6}
    assert not looked(40)
    # What is left is an open transaction of somebody who writes to the input: that is not ours to get done.
    engine.positions = {INPUT: 9}
    assert not looked(100)


def test_an_engine_that_tries_anew_for_ever_makes_no_progress() -> None:
    """Each try is a short while of work: looked at by itself it is as good as any, and nobody is told for hours."""
    engine = SimpleNamespace(is_working=True, positions={INPUT: 5}, assignment=SimpleNamespace(partitions={INPUT}))
    read = {INPUT: Read(9, 20, 9)}
    app = app_of(engine, input=SimpleNamespace(reads=lambda: read))
    stall = Stall()

    def tried(times: int) -> list[Reason]:
        """Ten seconds of work, of which nothing comes, and twenty until it is tried anew."""
        for second in range(30 * times):
            engine.is_working = second % 30 < 10
            # Started anew, nothing was fetched for a second.
            read[INPUT] = Read(5, None, None) if second % 30 == 0 else Read(9, 20, 9)
            stall.look(app)
        return list(stall.reasons(app))

    assert not tried(3)
    [found] = tried(4)
    assert (found.reason, "in-0" in found.detail) == ("no_progress", True)
    engine.positions = {INPUT: 6}
    assert not tried(1), "it has moved"
    assert tried(6)
    engine.assignment = SimpleNamespace(partitions={TP("in", 1)})
    stall.look(app)
    assert not list(stall.reasons(app)), "it is somebody else's"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), 2),
        (KafkaUnreachable("x"), 3),
        (KafkaConnectionError("x"), 3),
        (StartRefused("x"), 65),
        (SlotLost("x"), 75),
        (ValueError("x"), 1),
        (None, 1),
    ],
)
def test_the_exit_code_says_why(error: BaseException | None, code: int) -> None:
    """Who looks after processes decides by it whether to start one again."""
    assert exit_code(error) == code


@pytest.fixture
def made(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    with rig(kafka_url, tmp_path) as made:
        made.app = "streams_app"
        yield made


def with_web(made: Rig, slot: str = "one", **env: str) -> tuple[Worker, int]:
    port = free_port()
    return made.worker(slot, PORT=str(port), **env), port


def test_a_worker_becomes_ready_and_its_end_is_no_secret(made: Rig) -> None:
    """A load balancer sends it requests from then on."""
    worker, port = with_web(made)
    seen: list[set[str]] = []

    def ready() -> bool:
        assert worker.alive, worker.log.read_text()[-3000:]
        seen.append(reasons(port))
        return not seen[-1]

    wait_until(ready, "it is ready")
    assert set().union(*seen) <= {"no answer", "joining", "rebalancing", "starting", "restoring"}
    assert asked(port, "/livez") == (HTTPStatus.OK, {"alive": True, "reasons": []})
    slots = dict.fromkeys(["exactly_once", "at_least_once", "at_most_once"], "one")
    assert asked(port, "/readyz") == (HTTPStatus.OK, {"ready": True, "reasons": [], "slots": slots})


def test_a_process_that_only_answers_is_ready_when_its_copies_are(made: Rig) -> None:
    """Before, it would say that nobody has an account."""
    with_web(made, "ledger", STREAMS_APP_GUARANTEES="exactly_once")[0].wait_started()
    _, port = with_web(made, "web", STREAMS_APP_GUARANTEES="at_most_once")
    wait_until(lambda: not reasons(port), "it is ready")
    assert asked(port, "/accounts/nobody")[0] == HTTPStatus.NOT_FOUND


def test_a_worker_whose_slot_was_taken_away_ends(made: Rig) -> None:
    """Somebody cleaned up its folder: the next worker would get the same slot, and both would fence each other."""
    worker, _ = with_web(made, STREAMS_APP_GUARANTEES="exactly_once")
    worker.wait_started()
    [lock] = Path(made.env["STREAMS_APP_DATADIR"]).glob("*/one/lock")
    lock.unlink()
    assert worker.wait() == ExitCode.SLOT_LOST
    assert worker.says("was removed while this worker held it")


def test_kafka_out_of_reach_is_told_and_so_is_its_return(tmp_path: Path) -> None:
    """Nothing is wrong with the worker: it waits, and works on."""
    with (
        EmbeddedKafka.ensure(tmp_path / "kafka", port=free_port()) as kafka,
        rig(kafka.url, tmp_path) as made,
    ):
        made.app = "streams_app"
        worker, port = with_web(made)
        wait_until(lambda: not reasons(port), "it is ready")
        [broker] = kafka.brokers
        broker.kill()
        wait_until(lambda: "kafka" in reasons(port), "it says so")
        assert asked(port, "/livez")[0] == HTTPStatus.OK
        broker.start()
        wait_until(lambda: not reasons(port), "it is ready again", 120)
        assert worker.alive


def test_a_worker_that_is_started_without_kafka_says_so_by_its_exit_code(tmp_path: Path) -> None:
    """Exit code 3, as all commands."""
    env = {**os.environ, "KAFKA_URL": f"kafka://127.0.0.1:{free_port()}", "STREAMS_APP_DATADIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "faust", "-A", "streams_app", "worker"], env=env, check=False, capture_output=True
    )
    assert done.returncode == ExitCode.UNREACHABLE
    assert "no Kafka broker answers" in json.loads(done.stderr.splitlines()[-1])["message"]
