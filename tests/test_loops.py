"""Every way to look at a stream keeps the guarantee of its app: with kills, with agents that fail, with events held."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.rig import rig, wait_until

LOOPS = ["take", "noack take", "noack", "channel", "isolated"]


@pytest.mark.parametrize("loop", LOOPS)
def test_exactly_once_holds_however_an_agent_looks_at_its_stream(kafka_url: str, tmp_path: Path, loop: str) -> None:
    """Nothing may commit past an event that is still in hand, nor take effect twice."""
    with rig(kafka_url, tmp_path, LOOP=loop) as loops:
        loops.app = "tests.apps.loops"
        worker = loops.worker().wait_started()
        loops.send(600, orders={100: "fail once", 300: "fail", 301: "fail once"})
        wait_until(lambda: len(loops.read("balances")) > 200, "some are done")
        worker.kill()
        loops.worker().wait_started()
        loops.send(300, rate=300)
        loops.wait_drained()
        loops.check(set_aside=1)
        loops.stop()
        loops.check_stores()


@pytest.mark.parametrize("loop", LOOPS)
def test_at_least_once_holds_however_an_agent_looks_at_its_stream(kafka_url: str, tmp_path: Path, loop: str) -> None:
    """The same, where outputs leave at once."""
    with rig(kafka_url, tmp_path, LOOP=loop, GUARANTEE="at_least_once") as loops:
        loops.app = "tests.apps.loops"
        worker = loops.worker().wait_started()
        loops.send(600, orders={100: "fail once"}, rate=1_000)
        worker.kill()
        loops.worker().wait_started()
        loops.send(300, rate=300)
        loops.wait_consumed()
        loops.check_at_least_once()
        loops.stop()


@pytest.mark.parametrize("loop", LOOPS)
def test_at_most_once_holds_however_an_agent_looks_at_its_stream(kafka_url: str, tmp_path: Path, loop: str) -> None:
    """The same, where nothing is done again."""
    with rig(kafka_url, tmp_path, LOOP=loop, GUARANTEE="at_most_once") as loops:
        loops.app = "tests.apps.loops"
        worker = loops.worker().wait_started()
        loops.send(600, orders={100: "fail once"}, rate=1_000)
        worker.kill()
        loops.worker().wait_started()
        loops.send(300, rate=300)
        loops.wait_consumed()
        loops.check_at_most_once()
        loops.stop()


def test_isolated_partitions_outlive_failures_and_rebalances(kafka_url: str, tmp_path: Path) -> None:
    """Stock Faust forgets the topic of an agent that was started again, at the next rebalance."""
    with rig(kafka_url, tmp_path, LOOP="isolated") as loops:
        loops.app = "tests.apps.loops"
        loops.worker("one").wait_started()
        loops.send(200, orders=dict.fromkeys(range(0, 200, 20), "fail once"))
        loops.wait_drained()
        guest = loops.worker("two").wait_started()
        loops.send(200, orders=dict.fromkeys(range(0, 200, 20), "fail once"), rate=400)
        loops.wait_drained()
        guest.signal(signal.SIGTERM)
        assert guest.wait() == 0
        loops.send(200)
        loops.wait_drained()
        loops.check()
        loops.stop()
