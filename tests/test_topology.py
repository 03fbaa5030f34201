"""Streams that are filtered, echoed, grouped by another key, taken by several and counted in windows, with kills."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from tests.apps.topology import GROUPS
from tests.rig import Rig, rig, wait_until


def outputs_of(made: Rig) -> list[dict[str, int]]:
    return [json.loads(message.value()) for message in made.read("balances")]


def test_a_topology_of_everything_takes_effect_exactly_once(kafka_url: str, tmp_path: Path) -> None:
    """Each step is a transaction of its own, and each hands every event to the next one once."""
    with rig(kafka_url, tmp_path) as made:
        made.app = "tests.apps.topology"
        made.create_topics("grouped", "echoes")
        worker = made.worker().wait_started()
        made.send(1_000)
        wait_until(lambda: len(made.read("balances")) > 200, "some are done")
        worker.kill()
        made.worker().wait_started()
        made.send(500, rate=500)
        wanted = {number for number in range(made.sent) if number % 10 != 9}
        wait_until(lambda: len(made.read("balances")) >= len(wanted), "all are done")
        made.stop()
        amounts = {(entry := json.loads(message.value()))["id"]: entry["amount"] for message in made.read("entries")}
        found = outputs_of(made)
        assert Counter(each["id"] for each in found) == Counter(wanted)
        assert Counter(json.loads(message.value())["id"] for message in made.read("echoes")) == Counter(wanted)
        total: dict[str, int] = defaultdict(int)
        for message in made.read("balances"):
            each = json.loads(message.value())
            assert each["group"] == message.key().decode() == f"g{each['id'] % GROUPS}"
            total[each["group"]] += amounts[each["id"]]
            assert each["total"] == total[each["group"]]
        assert {key.decode(): int(value) for key, value in made.changelog().items()} == total
