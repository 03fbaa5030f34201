"""The log as programs read it."""

from __future__ import annotations

import io
import json
import logging
import pickle
import subprocess
import sys
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams_app import logs
from streams_app.dashboard.observer import Task
from streams_app.errors import ConfigurationError
from streams_app.kafka import KafkaAddress
from streams_app.settings import Settings
from tests.rig import Rig, free_port, rig


def line_of(message: str, *args: Any, **options: Any) -> dict[str, Any]:
    """What a message comes out as."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter())
    logger = logging.Logger("one")
    logger.addHandler(handler)
    logger.warning(message, *args, **options)
    line, nothing = out.getvalue().split("\n")
    assert not nothing
    return dict(json.loads(line))


@given(
    st.text() | st.characters(categories=["Cs"]), st.dictionaries(st.text(), st.text() | st.binary() | st.integers())
)
def test_whatever_is_logged_is_one_line_of_json(message: str, data: dict[str, Any]) -> None:
    """Half a line, or two, and whoever collects the log loses what was said."""
    line = line_of("%s", message, extra={"data": data})
    assert {"time", "level", "logger", "message", "pid"} <= line.keys()
    assert line_of("%s", ["any", object()])["message"].startswith("['any'")


def test_an_error_has_its_stack_and_a_service_its_name() -> None:
    """Both are fields, so they can be searched for."""
    line = line_of("[^---Engine]: it failed", exc_info=ValueError("no"))
    assert (line["service"], line["message"], line["level"]) == ("Engine", "it failed", "WARNING")
    assert line["error"].endswith("ValueError: no")


def test_what_is_said_once_stands_in_each_line_of_its_task_alone() -> None:
    """Three guarantees log by the same loggers: without it nobody knows which one speaks."""

    def logged() -> dict[str, Any]:
        logs.about(guarantee="exactly_once")
        logs.about(generation=7)
        return line_of("x", extra={"data": {"offset": 5}})

    line = Context().run(logged)
    assert (line["guarantee"], line["generation"], line["offset"]) == ("exactly_once", 7, 5)
    assert "guarantee" not in line_of("x")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b'{"id": "t-1", "amount": 5}', "t-1"),
        (b'{"id": 5}', None),
        (b'{"amount": 5}', None),
        (b"{", None),
        (b"[" * 100_000, None),
        (b'{"id": "' + b"x" * 5_000 + b'"}', "x" * 200),
        (None, None),
    ],
)
def test_the_id_of_an_event_is_found_if_it_has_one(value: Any, found: str | None) -> None:
    """Also in what was set aside because nobody could read it."""
    assert logs.id_of(value) == found


def test_people_get_text_on_a_terminal_and_programs_json_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they say what they want."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert logs.wants_json("auto")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not logs.wants_json("auto")
    assert logs.wants_json("json")
    assert Settings.from_env({}).log_format == "auto"
    with pytest.raises(ConfigurationError, match="auto, json, text"):
        Settings.from_env({"STREAMS_APP_LOG_FORMAT": "xml"})


def observed(settings: Settings) -> list[str]:
    """What the process behind the dashboard says on stderr, by lines, until it ends by itself."""
    address = KafkaAddress.parse(f"kafka://127.0.0.1:{free_port()}")
    command = [sys.executable, "-c", "from streams_app.dashboard.observer import main; main()"]
    with subprocess.Popen(command, stdin=-1, stdout=subprocess.DEVNULL, stderr=-1) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(pickle.dumps(Task(address, settings, [], {}, "app", "client")))
        process.stdin.flush()
        said = process.stderr.read().decode()
        assert process.wait(60) == 1
    return said.splitlines()


def test_the_process_behind_the_dashboard_logs_as_its_worker_does(tmp_path: Path) -> None:
    """Its stderr is the worker's: a stack amid lines of JSON is some twenty lines that no program can read."""
    (tmp_path / "file").touch()
    [line] = map(json.loads, observed(Settings(datadir=tmp_path / "file", log_format="json")))
    assert (line["logger"], line["level"]) == ("streams_app.dashboard.observer", "ERROR")
    assert "StoreFailed" in line["error"]
    assert "Traceback (most recent call last):" in observed(Settings(datadir=tmp_path / "file", log_format="text"))


@pytest.fixture
def made(kafka_url: str, tmp_path: Any) -> Any:
    with rig(kafka_url, tmp_path) as made:
        yield made


def test_a_workers_whole_log_is_json_and_names_the_event_that_was_set_aside(made: Rig) -> None:
    """From its first word to its last; and whoever looks for a transfer finds what became of it."""
    made.app = "streams_app"
    made.create_topics("transfers", "credits", "ledger", "transfer-results")
    worker = made.worker(STREAMS_APP_GUARANTEES="exactly_once").wait_started()
    made.produce(
        "transfers",
        b"alice",
        b'{"id": "t-1", "debit_account": "bob", "credit_account": "c", "amount": 1, "currency": "EUR"}',
    )
    made.produce("transfers", b"alice", b'{"id": "t-2", "debit_account": "alice"}')
    made.wait_for("dead-letters", 2)
    made.stop()
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    by_id = {line["id"]: line for line in lines if "id" in line}
    assert "wrong_key" in by_id["t-1"]["message"]
    assert "invalid" in by_id["t-2"]["message"]
    for line in by_id.values():
        assert (line["guarantee"], line["topic"]) == ("exactly_once", f"{made.prefix}transfers")
        assert line["generation"] >= 1
        assert {"partition", "offset"} <= line.keys()


def test_a_log_for_people_is_text(made: Rig) -> None:
    """With the banner."""
    worker = made.worker(STREAMS_APP_LOG_FORMAT="text").wait_started()
    made.stop()
    assert worker.says("ƒaµS†")
    assert not worker.says('{"time"')
