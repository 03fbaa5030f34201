"""Poison: events that no agent gets through with, at the beginning, in the middle and at the end, and many in a row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.rig import Rig, rig, wait_until

COUNT = 400
RAISING = {0, 40, *range(150, 250), COUNT - 1}
UNDECODABLE = {1, 20, *range(300, 310), COUNT - 2}
ORDERS = dict.fromkeys(RAISING, "fail") | dict.fromkeys(UNDECODABLE, "undecodable")


def poisoned(made: Rig) -> Counter[tuple[int, int]]:
    """Let a worker meet the poison; gives how often each place of the input was set aside."""
    made.send(COUNT, orders=ORDERS)
    made.worker().wait_started()
    made.wait_consumed(200)
    made.stop()
    letters: Counter[tuple[int, int]] = Counter()
    for message in made.read("dead-letters"):
        headers = dict(message.headers())
        letters[int(headers["dlq.partition"]), int(headers["dlq.offset"])] += 1
        if headers["dlq.error"] == b"agent_error":
            attempts = 1 if made.settings["GUARANTEE"] == "at_most_once" else 3
            assert headers["dlq.attempts"] == b"%d" % attempts
        else:
            assert (headers["dlq.error"], headers["dlq.attempts"]) == (b"malformed", b"1")
    return letters


def places(made: Rig) -> set[tuple[int, int]]:
    """Where in the input the poison lies."""
    found = set()
    for message in made.read("entries"):
        if message.value() == b"{" or json.loads(message.value()).get("order") == "fail":
            found.add((message.partition(), message.offset()))
    return found


def outputs(made: Rig) -> dict[bytes, list[int]]:
    """The ids of the outputs of each key, in their order."""
    by_key: dict[bytes, list[int]] = {}
    for message in made.read("balances"):
        by_key.setdefault(message.key(), []).append(json.loads(message.value())["id"])
    return by_key


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
def test_poison_is_set_aside_and_harms_no_neighbour(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """It would stop its partition, be lost, or take others with it; and what follows it must not overtake it."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee) as made:
        letters = poisoned(made)
        assert set(letters) == places(made)
        if guarantee != "at_least_once":
            assert set(letters.values()) == {1}
        by_key = outputs(made)
    neighbours = set(range(COUNT)) - RAISING - UNDECODABLE
    # The agent raises after it has sent its output: that is taken back exactly once, and has left under the others.
    wanted = neighbours if guarantee == "exactly_once" else neighbours | RAISING
    assert {id for ids in by_key.values() for id in ids} == wanted
    for ids in by_key.values():
        first_ones = list(dict.fromkeys(ids))
        assert first_ones == sorted(first_ones)
        assert guarantee == "at_least_once" or first_ones == ids


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_most_once"])
def test_an_event_that_a_processor_of_the_stream_refuses_is_set_aside(
    kafka_url: str, tmp_path: Path, guarantee: str
) -> None:
    """It failed before the agent had it in hand: uncounted, it would stop its partition for ever."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee, PROCESSOR="1") as made:
        made.send(50, orders={0: "unprocessable", 20: "unprocessable", 49: "unprocessable"})
        made.worker().wait_started()
        made.wait_consumed()
        made.stop()
        assert sorted(json.loads(message.value())["id"] for message in made.read("dead-letters")) == [0, 20, 49]
        assert sum(map(len, outputs(made).values())) == 47
        if guarantee == "at_most_once":
            assert made.reported() == 0, "what was set aside was not lost"


def test_a_mended_agent_gets_its_poison_back_once(kafka_url: str, tmp_path: Path) -> None:
    """Set aside is not lost: replayed, each takes effect, and takes effect once."""
    with rig(kafka_url, tmp_path, GUARANTEE="exactly_once") as made:
        poisoned(made)
        for _ in range(2):
            replayed = subprocess.run(
                [
                    *(sys.executable, "-m", "faust", "-A", "streams_app", "dead-letters", "replay"),
                    *("--error", "agent_error", "--yes"),
                ],
                env=made.env,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert replayed.returncode == 0, replayed.stderr
        made.worker(MENDED="1")
        made.wait_consumed()
        made.stop()
        counted = Counter(id for ids in outputs(made).values() for id in ids)
        assert counted == dict.fromkeys(set(range(COUNT)) - UNDECODABLE, 1)
        amounts = {}
        for message in made.read("entries"):
            if message.value() != b"{":
                entry = json.loads(message.value())
                amounts[entry["id"]] = (message.key(), entry["amount"])
        balances: Counter[bytes] = Counter()
        for key, amount in amounts.values():
            balances[key] += amount
        assert {key: int(value) for key, value in made.changelog().items()} == balances
        # Those that no agent can be mended for stay where they are.
        wait_until(lambda: len(made.read("dead-letters")) == len(RAISING | UNDECODABLE), "the letters are still there")


def test_trouble_that_is_not_the_events_sets_nothing_aside(kafka_url: str, tmp_path: Path) -> None:
    """A rebalance amid a batch, again and again, is no reason to give an event up."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once") as made:
        made.worker("one", SLEEP_S="0.3").wait_started()
        made.send(60, orders=dict.fromkeys(range(0, 60, 3), "sleep"))
        for number in range(4):
            guest = made.worker(f"guest-{number}", SLEEP_S="0.3").wait_started()
            guest.kill()
        made.wait_consumed(120)
        made.stop()
        assert made.read("dead-letters") == []
        made.check_at_least_once()
