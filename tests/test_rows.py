"""What an agent may do under a barrier, each of it under each guarantee, with a failure of each and a kill."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.apps.rows import OUTPUTS, TOPICS
from tests.rig import Rig, rig, wait_until

#: Each row fails once, at an entry of its own.
ORDERS = {40 + 10 * number: f"fail once: {row}" for number, row in enumerate(OUTPUTS)}
ECHOED = "echoes"


def ids(made: Rig, topic: str) -> Counter[int]:
    return Counter(json.loads(message.value())["id"] for message in made.read(topic))


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
def test_all_that_an_agent_may_do_keeps_the_guarantee(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """An app that was written for stock Faust does some of it; half of it working is worse than none."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee) as made:
        made.app = "tests.apps.rows"
        made.create_topics(*TOPICS)
        worker = made.worker().wait_started()
        made.send(600, orders=ORDERS)
        wait_until(lambda: len(made.read("grouped")) > 200, "some are done")
        worker.kill()
        worker = made.worker().wait_started()
        made.send(300, rate=300)
        settle(made, guarantee)
        wait_until(lambda: worker.says("called back"), "callbacks run")
        made.stop()
        found = {topic: ids(made, topic) for topic in {*OUTPUTS.values(), "sink-topic", "sink-agent"}}
        for topic, counts in found.items():
            check(guarantee, topic, counts, made)
        check_marks(made)
        check_ticks(made)
        if guarantee == "exactly_once":
            check_sums(made, "balances", "balances-balance-changelog")
            check_sums(made, "grouped", "balances-group-sums-changelog")


def wanted(topic: str, made: Rig) -> set[int]:
    return {number for number in range(made.sent) if topic != ECHOED or number % 10 != 9}


def settle(made: Rig, guarantee: str) -> None:
    """Wait until all is done, here and behind the other topics that streams go through."""
    made.wait_consumed(120)
    if guarantee != "at_most_once":
        for topic in {*OUTPUTS.values(), "sink-topic", "sink-agent"}:
            wait_until(lambda topic=topic: wanted(topic, made) <= ids(made, topic).keys(), f"{topic} is complete")


def check(guarantee: str, topic: str, counts: Counter[int], made: Rig) -> None:
    if guarantee == "exactly_once":
        assert counts == Counter(wanted(topic, made)), topic
    elif guarantee == "at_least_once":
        assert counts.keys() == wanted(topic, made), topic
    else:
        assert counts.keys() <= wanted(topic, made), topic
        assert max(counts.values()) == 1, topic
        assert len(counts) > made.sent / 3, f"{topic} lost too much"


def check_sums(made: Rig, topic: str, changelog: str) -> None:
    """Each output says the sum of its key so far, and the changelog the last one."""
    amounts = {(entry := json.loads(message.value()))["id"]: entry["amount"] for message in made.read("entries")}
    sums: dict[bytes, int] = defaultdict(int)
    for message in made.read(topic):
        output = json.loads(message.value())
        sums[message.key()] += amounts[output["id"]]
        assert output["balance"] == sums[message.key()]
    assert {key: int(value) for key, value in made.changelog(changelog).items()} == sums


def check_marks(made: Rig) -> None:
    """What a send says of its record is what the record has."""
    for message in made.read("marked"):
        number = json.loads(message.value())["id"]
        assert message.key() == f"m{number}".encode()
        assert message.partition() == number % 4
        assert message.timestamp()[1] == 1_000_000_000_000 + 1_000 * number
        assert message.headers() == [("id", str(number).encode())]
    assert {tuple(message.headers()) for message in made.read("forwarded")} == {(("by", b"hand"),)}


def check_ticks(made: Rig) -> None:
    """Tasks and timers send by themselves, under every guarantee."""
    assert {message.key() for message in made.read("ticks")} >= {b"task", b"leader's task", b"timer", b"leader's timer"}
