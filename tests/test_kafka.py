"""How Kafka is reached: what stands in the environment arrives at every client, and is shown to nobody."""

from __future__ import annotations

import logging
import pickle
import ssl
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from streams_app.application import App
from streams_app.errors import ConfigurationError
from streams_app.kafka import KafkaAddress
from streams_app.session import Session
from streams_app.settings import Settings
from tests.rig import free_port, wait_until

PASSWORD = "p@ss:w/r?d#,% é"  # noqa: S105 - of nobody
CA = trustme.CA()
CLIENT = CA.issue_cert("app@example.org")
CERTIFICATES = {
    "KAFKA_TRUSTED_CERT": CA.cert_pem.bytes().decode(),
    "KAFKA_CLIENT_CERT": CLIENT.cert_chain_pems[0].bytes().decode(),
    "KAFKA_CLIENT_CERT_KEY": CLIENT.private_key_pem.bytes().decode(),
}


def address(url: str, **env: str) -> KafkaAddress:
    return KafkaAddress.of(Settings.from_env({"KAFKA_URL": url, **env}))


SCHEMES = [("kafka", None), ("kafka+ssl", "SSL"), ("kafka+sasl", "SASL_PLAINTEXT"), ("kafka+sasl+ssl", "SASL_SSL")]


@pytest.mark.parametrize(("scheme", "protocol"), SCHEMES)
def test_both_libraries_are_told_the_same(scheme: str, protocol: str | None) -> None:
    """One that is not would stand in the worker's way at the first request, or talk in the clear."""
    login = f"app:{quote(PASSWORD, safe='')}@" if "sasl" in scheme else ""
    made = address(f"{scheme}://{login}one:9096, {scheme}://{login}two", **CERTIFICATES)
    ours, theirs = made.librdkafka(), made.aiokafka()
    assert ours["bootstrap.servers"] == theirs["bootstrap_servers"] == "one:9096,two:9092"
    assert ours.get("security.protocol") == protocol
    assert theirs["security_protocol"] == (protocol or "PLAINTEXT")
    if login:
        assert (ours["sasl.mechanisms"], ours["sasl.username"], ours["sasl.password"]) == (
            ("SCRAM-SHA-512", "app", PASSWORD)
        )
        assert theirs["sasl_mechanism"] == "SCRAM-SHA-512"
        assert (theirs["sasl_plain_username"], theirs["sasl_plain_password"]) == ("app", PASSWORD)
    if scheme.endswith("ssl"):
        assert ours["ssl.ca.pem"] == CERTIFICATES["KAFKA_TRUSTED_CERT"]
        assert ours["ssl.key.pem"] == CERTIFICATES["KAFKA_CLIENT_CERT_KEY"]
        assert [cert["subject"] for cert in theirs["ssl_context"].get_ca_certs()], "pinned"
    else:
        assert not {name for name in ours if name.startswith("ssl")}
    assert made.urls == ["kafka://one:9096", "kafka://two:9092"], "Faust shows them"


@pytest.mark.parametrize("scheme", [scheme for scheme, _ in SCHEMES])
def test_an_address_can_be_told_to_another_process(scheme: str) -> None:
    """The one behind the dashboard is told it as a pickle: over TLS the page would show nothing, ever."""
    login = "app:secret@" if "sasl" in scheme else ""
    made = address(f"{scheme}://{login}one", **CERTIFICATES)
    told = pickle.loads(pickle.dumps(made))  # noqa: S301 - our own
    assert told == made
    assert told.librdkafka() == made.librdkafka()
    ours, theirs = (each.aiokafka().pop("ssl_context", None) for each in (made, told))
    if scheme.endswith("ssl"):
        assert theirs.get_ca_certs() == ours.get_ca_certs() != []
        assert (theirs.verify_mode, theirs.check_hostname) == (ours.verify_mode, ours.check_hostname)
    else:
        assert theirs is None


def test_only_the_pinned_ca_is_trusted() -> None:
    """With the machine's CAs beside it, any of them could vouch for a broker that is none of ours."""
    context = address("kafka+ssl://one", **CERTIFICATES).aiokafka()["ssl_context"]
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode == ssl.CERT_REQUIRED
    both = CERTIFICATES["KAFKA_TRUSTED_CERT"] + trustme.CA().cert_pem.bytes().decode()
    rotating = address("kafka+ssl://one", KAFKA_TRUSTED_CERT=both).aiokafka()["ssl_context"]
    assert len(rotating.get_ca_certs()) == 2, "while Heroku changes it, the old and the new"


@pytest.mark.parametrize(
    ("env", "checked"),
    [
        ({}, True),
        (CERTIFICATES, False),
        ({**CERTIFICATES, "STREAMS_APP_KAFKA_CHECK_HOST_NAMES": "yes"}, True),
    ],
)
def test_host_names_are_compared_unless_a_ca_is_pinned(env: dict[str, str], checked: bool) -> None:
    """Heroku's certificates name no host; without a pinned CA the name is all that tells a broker from anybody."""
    made = address("kafka+ssl://one", **env)
    assert made.librdkafka()["ssl.endpoint.identification.algorithm"] == ("https" if checked else "none")
    assert made.aiokafka()["ssl_context"].check_hostname is checked


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"KAFKA_URL": "kafka+ssl://one", "STREAMS_APP_KAFKA_CHECK_HOST_NAMES": "no"}, "needs KAFKA_TRUSTED_CERT"),
        ({"KAFKA_URL": "kafka+sasl://u:sec@one,kafka+sasl://u:ret@two"}, "address 2 of KAFKA_URL has another"),
        ({"KAFKA_URL": "kafka+ssl://one,kafka://two"}, "address 2 of KAFKA_URL has another scheme"),
        ({"KAFKA_URL": "kafka+sasl://one"}, "address 1 of KAFKA_URL needs user and password"),
        ({"KAFKA_URL": "kafka+sasl://sec:@one"}, "address 1 of KAFKA_URL needs user and password"),
        ({"KAFKA_URL": "kafka://user:secret@one"}, "kafka+sasl+ssl:// does"),
        ({"KAFKA_URL": "kafka+sasl://user:sec/ret@one"}, "percent-encoded"),
        ({"KAFKA_URL": "kafka+sasl://user:sec#ret@one"}, "percent-encoded"),
        ({"KAFKA_URL": "kafka+sasl://user:secret@one:secret"}, "percent-encoded"),
        ({"KAFKA_URL": "secret://one"}, "the scheme one of kafka, kafka"),
        ({"KAFKA_URL": "kafka://"}, "must read scheme://host:port"),
        ({"KAFKA_URL": " , "}, "KAFKA_URL is empty"),
        ({"STREAMS_APP_KAFKA_SASL_MECHANISM": "GSSAPI"}, "SCRAM-SHA-512, SCRAM-SHA-256, PLAIN"),
        ({"STREAMS_APP_KAFKA_CHECK_HOST_NAMES": "maybe"}, "must be yes or no"),
        ({"KAFKA_CLIENT_CERT": CERTIFICATES["KAFKA_CLIENT_CERT"]}, "belong together"),
        ({"KAFKA_TRUSTED_CERT": "secret"}, "KAFKA_TRUSTED_CERT cannot be used"),
        ({"KAFKA_TRUSTED_CERT": "sécret"}, "KAFKA_TRUSTED_CERT cannot be used"),
        ({**CERTIFICATES, "KAFKA_CLIENT_CERT": "secret"}, "KAFKA_CLIENT_CERT or KAFKA_CLIENT_CERT_KEY cannot be used"),
        (
            {**CERTIFICATES, "KAFKA_CLIENT_CERT_KEY": CA.issue_cert("x@y.org").private_key_pem.bytes().decode()},
            "KEY_VALUES_MISMATCH",
        ),
    ],
)
def test_what_cannot_be_right_is_said_without_repeating_it(env: dict[str, str], said: str) -> None:
    """The sentence lands in a log that many read; and a mistake that is not said takes a night to find."""
    with pytest.raises(ConfigurationError) as raised:
        KafkaAddress.of(Settings.from_env({"KAFKA_URL": "kafka+ssl://one", **env}))
    assert said in str(raised.value)
    for secret in ("sec", "ret"):
        assert secret not in str(raised.value)


def test_secrets_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repr in a traceback, or Faust's banner, is read by everybody who reads logs."""
    env = {
        "KAFKA_URL": "kafka+sasl+ssl://topsecretuser:topsecretword@one",
        "STREAMS_APP_WEB_TOKEN": "topsecrettoken",
        **CERTIFICATES,
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    app = App("one", autodiscover=False)
    shown = f"{app.settings!r} {app.kafka!r} {app.kafka.certificates!r} {app.conf.broker!r}"
    assert "one:9092" in shown
    assert "topsecret" not in shown
    assert "BEGIN" not in shown


def test_no_certificate_stands_on_disk_under_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever could open it would be us; and a killed worker removes nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load, seen = ssl.SSLContext.load_cert_chain, []

    def looked_at(context: ssl.SSLContext, *args: str, **kwargs: str) -> None:
        seen.append(list(tmp_path.iterdir()))
        load(context, *args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", looked_at)
    address("kafka+ssl://one", **CERTIFICATES)
    assert seen == [[]]
    assert list(tmp_path.iterdir()) == []


def test_line_breaks_may_be_written_as_files_of_variables_write_them() -> None:
    """Docker's and honcho's files have a variable on each line."""
    written = {name: pem.replace("\n", "\\n") for name, pem in CERTIFICATES.items()}
    assert address("kafka+ssl://one", **written) == address("kafka+ssl://one", **CERTIFICATES)


def test_a_process_may_run_no_agents() -> None:
    """One that only answers by HTTP; nobody means it who leaves the variable empty."""
    assert Settings.from_env({"STREAMS_APP_GUARANTEES": "none"}).guarantees == ()
    assert len(Settings.from_env({"STREAMS_APP_GUARANTEES": ""}).guarantees) == 3


@pytest.mark.parametrize("made", [Producer, Consumer, AdminClient])
def test_what_librdkafka_says_is_a_line_of_our_log(
    made: type, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """By itself it writes lines of its own form to stderr, amid those of JSON, which no collector of logs can read."""
    config = address(f"kafka://127.0.0.1:{free_port()}").librdkafka()
    client = made({**config, **({"group.id": "nobody"} if made is Consumer else {})})
    with caplog.at_level(logging.WARNING, logger="librdkafka"):
        wait_until(lambda: (client.poll(0.1), caplog.records)[1], "it says so", 10)
    assert {(each.name, each.levelname) for each in caplog.records} == {("librdkafka", "WARNING")}
    assert "Connect to" in caplog.records[0].getMessage()
    assert "FAIL" not in capfd.readouterr().err


def test_a_session_goes_on_hearing_for_itself() -> None:
    """It knows by the log alone that a connection broke, and a commit may have been sent twice."""
    config = address("kafka://one").librdkafka()
    assert Session(config, "one")._config["logger"] is not config["logger"]
