"""At most once: offsets first, no retry; whatever dies, nothing repeats, and what may be lost is bounded and reported."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import Rig, rig, wait_until

STEPS = ["0 claim", "0 claimed", "1 prepare: outputs produced", "4 publish", "5 published"]
BATCH_EVENTS = 40


@pytest.fixture
def balances(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    """A rig for the balances app, at most once."""
    options = {"GUARANTEE": "at_most_once", "STREAMS_APP_AT_MOST_ONCE_BATCH_MAX_EVENTS": str(BATCH_EVENTS)}
    with rig(kafka_url, tmp_path, **options) as made:
        yield made


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_repeats_nothing_and_loses_no_more_than_reported(balances: Rig, step: str) -> None:
    """The first promise is that nothing repeats; the second that the loss is bounded, and told."""
    balances.send(300)
    worker = balances.worker(STREAMS_APP_FAULT=f"kill {step}@3")
    balances.send(300, rate=300)
    assert worker.wait() == -signal.SIGKILL
    successor = balances.worker().wait_started()
    balances.send(100)
    balances.wait_consumed()
    balances.stop()
    lost, reported = balances.check_at_most_once()
    assert reported <= BATCH_EVENTS
    if step == "0 claim":
        assert lost == 0
    if step == "0 claimed":
        assert lost > 0, "this kill hits a batch that nobody has seen"
    if reported:
        assert successor.says(f"at most {reported} events were given up")


def test_what_a_slow_agent_has_sent_is_not_sent_again(balances: Rig) -> None:
    """Were the offsets committed behind the processing, the output that has left before the kill would come twice."""
    worker = balances.worker(STREAMS_APP_FAULT="kill 0 claim@2", SLEEP_S="0.5").wait_started()
    balances.send(4, keys=1, orders=dict.fromkeys(range(4), "sleep"))
    assert worker.wait() == -signal.SIGKILL
    balances.worker(SLEEP_S="0").wait_started()
    balances.wait_consumed()
    balances.stop()
    balances.check_at_most_once()


def wake_a_zombie(balances: Rig, step: str, sent_meanwhile: int = 0) -> None:
    """Freeze a worker at a step until another has done its work; wake it, and let both go on."""
    zombie = balances.worker("zombie", STREAMS_APP_FAULT=f"stop {step}@4").wait_started()
    balances.send(600, rate=300)
    wait_until(lambda: zombie.frozen, "the worker froze")
    balances.worker("successor").wait_started()
    balances.send(200)
    balances.wait_consumed()
    zombie.signal(signal.SIGCONT)
    balances.send(sent_meanwhile, rate=200)
    wait_until(lambda: zombie.count("partitions started") >= 2, "the zombie rejoined")
    balances.send(100)
    balances.wait_consumed()
    balances.stop()


def test_a_zombie_that_wakes_up_with_its_claim_in_hand_changes_nothing(balances: Rig) -> None:
    """Its commit would put the offset back, or deliver what its successor has done."""
    wake_a_zombie(balances, "0 claim", sent_meanwhile=200)
    balances.check_at_most_once()


def test_a_zombie_that_wakes_up_amid_a_batch_repeats_nothing(balances: Rig) -> None:
    """Its events were its alone: finished late, they are not done twice."""
    wake_a_zombie(balances, "0 claimed")
    balances.check_at_most_once()


def test_a_clean_stop_loses_nothing(balances: Rig) -> None:
    """What was claimed and not begun is given back."""
    first = balances.worker("first", SLEEP_S="3").wait_started()
    balances.send(100, orders=dict.fromkeys(range(0, 100, 5), "sleep"))
    wait_until(lambda: first.says("sleeps"), "an agent is amid a batch")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    balances.worker("second", SLEEP_S="0")
    balances.wait_consumed()
    balances.stop()
    assert balances.check_at_most_once() == (0, 0)


def test_a_stop_that_does_not_wait_for_an_agent_loses_what_that_has_in_hand_alone(balances: Rig) -> None:
    """What lies behind was claimed with it, and nobody has begun with it."""
    first = balances.worker("first", SLEEP_S="600").wait_started()
    balances.send(BATCH_EVENTS, keys=1, orders={3: "sleep"})
    wait_until(lambda: first.says("3 sleeps"), "an agent is amid a batch")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    assert first.says("at most 1 events were given up")
    balances.worker("second", SLEEP_S="0")
    balances.wait_consumed()
    balances.stop()
    lost, reported = balances.check_at_most_once()
    assert (lost, reported) == (0, 1), "its output had left; nobody but itself knows"


def test_a_rebalance_loses_nothing(balances: Rig) -> None:
    """Partitions are given back with what was not begun."""
    # A batch takes longer than it may when its partitions are revoked.
    balances.worker("first", SLEEP_S="0.5").wait_started()
    balances.send(120, orders=dict.fromkeys(range(0, 120, 4), "sleep"))
    second = balances.worker("second", SLEEP_S="0.5").wait_started()
    balances.send(200, rate=400)
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    balances.wait_consumed()
    balances.stop()
    assert balances.check_at_most_once() == (0, 0)
