"""At least once: outputs at once and again until they are acknowledged, offsets after them; nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import Rig, rig, wait_until

STEPS = ["1 prepare: begin", "2 offsets", "3 end", "4 publish", "5 published"]


@pytest.fixture
def balances(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    """A rig for the balances app, at least once."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once") as made:
        yield made


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_loses_nothing_and_counts_once(balances: Rig, step: str) -> None:
    """Outputs may repeat; tables commit with the offsets, so they do not."""
    balances.send(300)
    worker = balances.worker(STREAMS_APP_FAULT=f"kill {step}@3").wait_started()
    balances.send(300, rate=300)
    assert worker.wait() == -signal.SIGKILL
    balances.worker()
    balances.send(100)
    balances.wait_consumed()
    balances.stop()
    repeated = balances.check_at_least_once()
    assert (repeated > 0) == (step in {"1 prepare: begin", "2 offsets", "3 end"})
    balances.check_stores()


@pytest.mark.parametrize("fenced", ["yes", "no"])
def test_a_woken_zombie_does_not_lose_counts(balances: Rig, fenced: str) -> None:
    """Its stale values behind its successor's would be what the next restore finds; unfenced, that is the limit."""
    balances.settings |= {"STREAMS_APP_TRANSACTION_TIMEOUT_MS": "60000", "STREAMS_APP_AT_LEAST_ONCE_FENCED": fenced}
    zombie = balances.worker("zombie", STREAMS_APP_FAULT="stop 1 prepare: begin@4").wait_started()
    balances.send(600, keys=5, rate=300)
    wait_until(lambda: zombie.frozen, "the worker froze")
    balances.worker("successor").wait_started()
    balances.send(200, keys=5)
    balances.wait_consumed()
    zombie.signal(signal.SIGCONT)
    wait_until(lambda: zombie.count("partitions started") >= 2, "the zombie rejoined")
    if fenced == "no":
        balances.stop()
        with pytest.raises(AssertionError):
            balances.check_at_least_once()
        return
    balances.stop()
    shutil.rmtree(balances.folder / "data")
    balances.worker("third").wait_started()
    balances.send(100, keys=5)
    balances.wait_consumed()
    balances.stop()
    balances.check_at_least_once()


def test_unfenced_it_needs_no_transactions(balances: Rig) -> None:
    """Some clusters permit none: then a kill loses nothing either."""
    balances.settings["STREAMS_APP_AT_LEAST_ONCE_FENCED"] = "no"
    balances.send(300)
    worker = balances.worker(STREAMS_APP_FAULT="kill 2 offsets@3").wait_started()
    balances.send(300, rate=300)
    assert worker.wait() == -signal.SIGKILL
    balances.worker()
    balances.wait_consumed()
    balances.stop()
    outputs = {json.loads(message.value())["id"] for message in balances.read("balances")}
    assert outputs == set(range(balances.sent))
    assert balances.last_stable() == balances.ends()


def test_outputs_leave_before_their_batch_is_done(balances: Rig) -> None:
    """Whoever reads them does not wait for the slowest event of a batch."""
    worker = balances.worker(SLEEP_S="600").wait_started()
    balances.send(50, keys=1, orders={49: "sleep"})
    wait_until(lambda: worker.says("49 sleeps"), "the last event is in hand")
    wait_until(lambda: len(balances.read("balances")) == 50, "all outputs are there")
    worker.kill()


def test_an_event_that_no_agent_can_do_anything_with_harms_no_other(balances: Rig) -> None:
    """A record that no broker takes would hold up its partition for ever, or an innocent event would be set aside."""
    orders = {10: "bad header", 90: "cancelled", 150: "no such partition", 210: "too far ahead"}
    balances.worker()
    balances.send(300, orders=orders)
    balances.wait_consumed(120)
    balances.stop()
    assert {json.loads(message.value())["id"] for message in balances.read("dead-letters")} == set(orders)
    balances.check_at_least_once(refused=True)


def test_workers_that_come_and_go_lose_nothing(balances: Rig) -> None:
    """Each rebalance revokes partitions that have a batch in hand."""
    balances.come_and_go(2)
    balances.wait_consumed()
    balances.stop()
    balances.check_at_least_once()
