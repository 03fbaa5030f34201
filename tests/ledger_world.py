"""The ledger without Kafka: the agents' own code on topics and tables in memory, one event at a time.

Events of different partitions and topics may be taken in any order, as in Kafka; within a partition they keep theirs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec

import agents.ledger as module
from agents.ledger_check import LedgerCheck
from streams_app.partitioning import partition_of
from streams_app.registry import Facts, Observed, Record
from streams_app.settings import Settings
from tables.ledger import Credit, Transfer

PARTITIONS = 4
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FakeTable:
    """A table that sees the partition of the event in hand."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[int, dict[str, Any]] = defaultdict(dict)

    def get(self, key: str) -> Any:
        return self.rows[self.world.event.message.partition].get(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.rows[self.world.event.message.partition][key] = value


class FakeTopic:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name

    async def send(self, *, key: str, value: msgspec.Struct) -> None:
        self.world.append(self.name, key.encode(), msgspec.json.encode(value))


class FakeStream:
    """A stream of one event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    async def events(self) -> AsyncIterator[Any]:
        yield self.event

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield self.event.value


class World:
    """Topics as lists of records, tables as dictionaries, and the agents between them."""

    def __init__(self) -> None:
        self.topics: dict[str, list[list[Observed]]] = defaultdict(lambda: [[] for _ in range(PARTITIONS)])
        self.consumed: dict[tuple[str, int], int] = defaultdict(int)
        self.accounts, self.decisions = FakeTable(self), FakeTable(self)
        self.event: Any = None

    def append(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        *,
        headers: Mapping[str, bytes] = {},
        timestamp_ms: int = 1_000,
    ) -> Observed:
        if partition is None:
            partition = partition_of(key or b"", PARTITIONS)
        log = self.topics[topic][partition]
        # Every second offset, as if the others were transaction markers.
        log.append(Observed(topic, partition, 2 * len(log), key, value, timestamp_ms, headers))
        return log[-1]

    def write(self, records: Iterable[Record]) -> None:
        for record in records:
            partition = partition_of(record.key or b"", PARTITIONS)
            self.append("transfers", record.key, record.value, (partition + record.misplaced) % PARTITIONS)

    def transfer(self, **fields: Any) -> None:
        self.append("transfers", fields["debit_account"].encode(), msgspec.json.encode(fields))

    def run(self, random: Random | None = None) -> None:
        """Handle all that is there; with ``random``, partitions and topics in an order of its choice."""
        with ExitStack() as stack:
            for name, topic in (("on_their_way", "credits"), ("ledger", "ledger"), ("results", "transfer-results")):
                stack.enter_context(patch.object(module, name, FakeTopic(self, topic)))
            stack.enter_context(patch.object(module, "accounts", self.accounts))
            stack.enter_context(patch.object(module, "decisions", self.decisions))
            stack.enter_context(patch.object(module, "set_aside", self._set_aside))
            stack.enter_context(
                patch.object(module, "app", SimpleNamespace(partitions_of={"transfers": PARTITIONS}.get))
            )
            asyncio.run(self._run(random))

    async def _run(self, random: Random | None) -> None:
        while ready := [
            (topic, partition)
            for topic in ("transfers", "credits")
            for partition in range(PARTITIONS)
            if self.consumed[topic, partition] < len(self.topics[topic][partition])
        ]:
            topic, partition = random.choice(ready) if random else ready[-1]
            record = self.topics[topic][partition][self.consumed[topic, partition]]
            self.consumed[topic, partition] += 1
            await self._handle(record)

    async def _handle(self, record: Observed) -> None:
        message = SimpleNamespace(**record._asdict())
        kind, agent = (Transfer, module.debits) if record.topic == "transfers" else (Credit, module.credits)
        self.event = SimpleNamespace(value=None, message=message)
        try:
            self.event.value = msgspec.json.decode(record.value or b"", type=kind)
        except UNREADABLE as error:
            await self._set_aside("invalid", str(error))
            return
        await agent.fun(FakeStream(self.event))

    async def _set_aside(self, code: str, _text: str) -> None:
        message = self.event.message
        headers = {
            "dlq.topic": message.topic.encode(),
            "dlq.partition": str(message.partition).encode(),
            "dlq.offset": str(message.offset).encode(),
            "dlq.error": code.encode(),
        }
        self.append("dead-letters", message.key, message.value, message.partition, headers=headers)

    def all(self, topic: str) -> list[Observed]:
        """The records of a topic, partition after partition."""
        return [record for log in self.topics[topic] for record in log]

    def decoded(self, topic: str, **which: Any) -> list[dict[str, Any]]:
        """The values of a topic that have all of ``which``."""
        values = [msgspec.json.decode(record.value or b"") for record in self.all(topic)]
        return [value for value in values if which.items() <= value.items()]

    def judge(self, *, at_rest: bool = True, settings: Settings | None = None) -> LedgerCheck:
        """The check's verdict on what is here now."""
        partitions = dict.fromkeys(LedgerCheck.topics, PARTITIONS)
        check = LedgerCheck(Facts(settings or Settings(), partitions, at_rest))
        for topic in check.topics:
            for record in self.all(topic):
                check.observe(record)
        for name, table in (("accounts", self.accounts), ("decisions", self.decisions)):
            for partition, rows in table.rows.items():
                for key, row in rows.items():
                    check.row(name, partition, key.encode(), msgspec.json.encode(row))
        check.finish()
        return check
