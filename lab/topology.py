"""An app for the lab: filter, group by another key, take several at a time, count in windows, in one topology.

Every step hands its events to the next one through a topic, in a transaction of its own; what comes out shows whether one of
them was lost or done twice on the way.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import msgspec

from streams_app.application import App
from streams_app.audit import AuditedApp, AuditedTable
from streams_app.provision import TopicSpec
from streams_app.registry import Check, Facts, Observed, Record, generator

NAME = "lab-topology"
_GROUPS, _PARTITIONS = 50, 4
_APART_S, _WINDOW_S, _EXPIRES_S = 20, 600, 10 * 24 * 3600


class Entry(msgspec.Struct):
    id: int
    group: str
    amount: int


class Total(msgspec.Struct):
    id: int
    group: str
    total: int


class Counted(msgspec.Struct):
    id: int
    group: str
    in_window: int


app = App(NAME, autodiscover=False, web_enabled=False)
entries = app.topic("entries", key_type=str, value_type=Entry)
grouped = app.topic("grouped", key_type=str, value_type=Entry)
totals = app.topic("totals", key_type=str, value_type=Total)
counted = app.topic("counted", key_type=str, value_type=Counted)
total_of = app.Table("total", key_type=str, value_type=int, default=int)
in_window = (
    app.Table("in-window", key_type=str, value_type=int, default=int)
    .tumbling(_WINDOW_S, expires=_EXPIRES_S)
    .relative_to_field(lambda event: event.value.id * _APART_S)
)


def is_wanted(entry: int) -> bool:
    """What the filter lets through."""
    return entry % 10 != 9


@app.agent(entries)
async def add_up(stream: Any) -> None:
    wanted = stream.filter(lambda entry: is_wanted(entry.id))
    by_group = wanted.group_by(lambda entry: entry.group, name="group", topic=grouped)
    taken: AsyncIterator[Any] = by_group.take(20, within=1)
    async for several in taken:
        for entry in several:
            total_of[entry.group] += entry.amount
            await totals.send(key=entry.group, value=Total(entry.id, entry.group, total_of[entry.group]))


@app.agent(totals)
async def count(stream: Any) -> None:
    async for total in stream:
        in_window[total.group] += 1
        so_far = in_window[total.group].value()
        await counted.send(key=total.group, value=Counted(total.id, total.group, so_far))


@generator(NAME, topic="entries")
def _entries(random: Random, keys: int) -> Iterator[Record]:
    number = 0
    while True:
        entry = Entry(number, f"group-{random.randrange(_GROUPS)}", random.randrange(1, 100))
        yield Record(f"key-{random.randrange(keys)}".encode(), msgspec.json.encode(entry))
        number += 1


class TopologyCheck(Check):
    """Each entry that is wanted comes out once, in the total of its group, and in the count of its window."""

    topics = ("entries", "totals", "counted")

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._amounts: dict[int, int] = {}
        self._outputs: dict[str, list[tuple[str, dict[str, Any]]]] = {"totals": [], "counted": []}

    def observe(self, record: Observed) -> None:
        """An entry, or an output."""
        value: dict[str, Any] = json.loads(record.value or b"{}")
        if record.topic == "entries":
            self._amounts[value["id"]] = value["amount"]
        else:
            self._outputs[record.topic].append((str(record), value))

    def finish(self) -> None:
        """Outputs in the order of their group; then what is missing."""
        self._follow("totals", "total", lambda output: (output["group"],), self._amounts.get)
        self._follow("counted", "in_window", _window_of, lambda _id, _none: 1)
        self.figures = {"entries": len(self._amounts), **{name: len(all_) for name, all_ in self._outputs.items()}}

    def _follow(
        self,
        topic: str,
        field: str,
        row_of: Callable[[dict[str, Any]], tuple[Any, ...]],
        adds: Callable[[int, int], int],
    ) -> None:
        """Each output says the sum of its row so far."""
        seen: set[int] = set()
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for where, output in self._outputs[topic]:
            if output["id"] in seen:
                self.findings.add("repeated output", f"{where}: {output['id']}")
                continue
            seen.add(output["id"])
            row = row_of(output)
            sums[row] += adds(output["id"], 0)
            if output[field] != sums[row]:
                self.findings.add("wrong balance", f"{where}: {output[field]}, expected {sums[row]}")
        for number in sorted({number for number in self._amounts if is_wanted(number)} - seen):
            self.findings.add("lost output", f"{topic}: entry {number}")


def _window_of(output: dict[str, Any]) -> tuple[Any, ...]:
    return output["group"], output["id"] * _APART_S // _WINDOW_S


def audited(prefix: str) -> AuditedApp:
    """What its group reads and keeps."""
    app_id = f"{prefix}{NAME}"
    tables = (
        AuditedTable("total", f"{app_id}-total-changelog", expires=False),
        AuditedTable("in-window", f"{app_id}-in-window-changelog", expires=True),
    )
    return AuditedApp(app_id, (f"{prefix}entries", f"{prefix}grouped", f"{prefix}totals"), tables, "exactly_once")


def topics(prefix: str, replication: int) -> list[TopicSpec]:
    """What the app reads and writes."""
    names = ("entries", "grouped", "totals", "counted")
    return [TopicSpec(f"{prefix}{name}", _PARTITIONS, replication, {}) for name in names]
