"""A worker that is asked to end under full load: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streams_app.embedded import EmbeddedKafka
from streams_app.errors import ExitCode
from tests.rig import Rig, free_port, rig, wait_until

INPUTS = ("transfers", "sensor-readings", "page-views")
RATE, SECONDS = 5_000, 20


@contextmanager
def load(made: Rig, seconds: int = SECONDS) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many transfers, readings and views a second, for so long."""
    count = str(RATE * seconds)
    options = {"env": made.env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    writers = [
        subprocess.Popen(made.command("generate", name, "--rate", str(RATE), "--count", count), **options)  # type: ignore[call-overload]
        for name in INPUTS
    ]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def audited(made: Rig) -> dict[str, Any]:
    """What the audit finds, by guarantee."""
    done = subprocess.run(
        made.command("audit", "--json", "--wait", "90"), env=made.env, capture_output=True, check=False, timeout=180
    )
    report = json.loads(done.stdout)
    assert done.returncode == ExitCode.GOOD, report
    return dict(report["guarantees"])


@pytest.fixture
def made(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    with rig(kafka_url, tmp_path) as made:
        made.app = "streams_app"
        yield made


def test_a_clean_stop_under_full_load_loses_and_repeats_nothing(made: Rig) -> None:
    """Each deployment is one. All three guarantees at once, and the audit judges; platforms kill after 30 s."""
    with load(made) as writers:
        for _ in range(3):
            worker = made.worker().wait_started(3)
            busy = worker.count("partitions started")
            flowing_s = time.monotonic() + 2
            wait_until(lambda flowing_s=flowing_s: time.monotonic() > flowing_s, "it is busy")
            worker.signal(signal.SIGTERM)
            assert worker.wait(30) == ExitCode.GOOD, worker.log.read_text()[-3000:]
            assert worker.count("partitions started") == busy
        made.worker()
        wait_until(lambda: all(writer.poll() is not None for writer in writers), "all is written", 120)
        assert [writer.returncode for writer in writers] == [0, 0, 0]
        guarantees = audited(made)
    assert len(guarantees) == 3
    for guarantee, found in guarantees.items():
        assert (found["lost"], found["repeated"]) == (0, 0), guarantee
    assert guarantees["at_most_once"]["reported"] == 0
    made.stop()


def test_a_broker_that_is_frozen_keeps_no_worker(tmp_path: Path) -> None:
    """The group was told that the worker leaves, and nobody answered: it ended 28 s later, by the watchdog."""
    with (
        EmbeddedKafka.ensure(tmp_path / "kafka", port=free_port()) as kafka,
        rig(kafka.url, tmp_path) as made,
    ):
        worker = made.worker().wait_started()
        made.send(200)
        made.wait_drained()
        [broker] = kafka.brokers
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            worker.signal(signal.SIGTERM)
            assert worker.wait(30) == ExitCode.GOOD, worker.log.read_text()[-3000:]
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        # Its successor leaves the group for it, as after a kill: nobody waits for the session to end.
        made.worker().wait_started()
        made.send(200)
        made.wait_drained()
        made.stop()
        made.check()


def test_a_second_signal_does_not_wait_for_what_an_agent_has_in_hand(kafka_url: str, tmp_path: Path) -> None:
    """It is processed again by others, once."""
    with rig(kafka_url, tmp_path) as made:
        worker = made.worker(SLEEP_S="600").wait_started()
        made.send(50, keys=1, orders={10: "sleep"})
        wait_until(lambda: worker.says("10 sleeps"), "an agent waits for something")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: worker.says("Signal received"), "it has heard")
        worker.signal(signal.SIGTERM)
        assert worker.wait(30) == ExitCode.GOOD, worker.log.read_text()[-3000:]
        assert not worker.says("it is broken off")
        made.worker("two", SLEEP_S="0")
        made.wait_drained()
        made.stop()
        made.check()
