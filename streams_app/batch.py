"""A batch: the events between two barriers, with their table writes and their outputs.

The batch is the unit that commits or does not. Whatever an event does (send, write a table, set itself aside) goes into
its batch, in memory; nothing of it is visible to anybody before the transaction that carries it has ended.

::

    open ──> sealed: every event is done; the commit has it now
      └────> dead: dropped, its events are delivered again

Whatever still writes to a batch that is not open (an agent that awaited something for too long, a task that it left behind)
gets `DeadBatchError`: its work would be in no transaction, or in half of one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

from faust.types import TP

from streams_app.errors import DeadBatchError
from streams_app.session import Consumed, Output, Pin, header_bytes
from streams_app.store import TIME_BYTES, Store

#: Kafka's own default for the size of a message, less its overhead: what is larger would abort the whole batch at produce.
MAX_RECORD_BYTES = 1_000_000 - 512


class Overlay:
    """Uncommitted writes over one store."""

    __slots__ = ("clock_ms", "store", "topic", "writes")

    def __init__(self, store: Store, topic: str) -> None:
        self.store = store
        self.topic = topic
        #: Key to stored bytes; None deletes. The last write of a key wins, so a hot key costs one changelog record.
        self.writes: dict[bytes, bytes | None] = {}
        self.clock_ms = store.clock_ms

    def get(self, key: bytes) -> bytes | None:
        """The stored bytes of ``key`` as the batch sees them."""
        try:
            return self.writes[key]
        except KeyError:
            return self.store.get(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys as the batch sees them: those of the store first."""
        for key, value in self.store.items():
            if key not in self.writes:
                yield key, value
        for key, written in list(self.writes.items()):
            if written is not None:
                yield key, written

    def time(self, timestamp_ms: int) -> bytes:
        """The partition's record time after a record of ``timestamp_ms``, as the bytes in front of a value.

        It never runs backwards: an entry is not older than what was seen before it, so it never expires too early. And it
        never runs ahead of this machine's clock: one record dated to next year would expire everything.
        """
        self.clock_ms = max(self.clock_ms, min(timestamp_ms, int(time.time() * 1000)))
        return self.clock_ms.to_bytes(TIME_BYTES)


class Batch:
    """The events between two barriers; see the module."""

    def __init__(self, pin: Pin) -> None:
        self.pin = pin
        #: Next offset to read of each input partition, once this batch is committed.
        self.consumed: dict[tuple[str, int], int] = {}
        self.outputs: list[Output] = []
        self.overlays: dict[tuple[str, int], Overlay] = {}
        #: Run on the main thread after the commit.
        self.callbacks: list[Callable[[], None]] = []
        #: Records fetched, and where the first of them is from.
        self.records = 0
        self.first: tuple[TP, int] | None = None
        #: What was made of them: one event for each agent that reads the topic.
        self.events = 0
        self.pending = 0
        self.dead = False
        self.sealed = False
        #: Events set aside, by what is said of them.
        self.set_aside: list[str] = []
        #: The event whose agent raised.
        self.failure: Any = None
        self._changed = asyncio.Event()

    def add(self) -> None:
        """Count an event that is on its way to an agent."""
        self.events += 1
        self.pending += 1

    def done(self) -> None:
        """An agent is through with an event."""
        self.pending -= 1
        if not self.pending:
            self._changed.set()

    def fail(self, event: Any) -> None:
        """An agent raised on ``event``: the whole batch will be delivered again."""
        if self.failure is None and not self.dead:
            self.failure = event
            self._changed.set()

    async def settled(self) -> None:
        """Wait until every delivered event is done, or one has failed."""
        while self.pending and self.failure is None:
            self._changed.clear()
            await self._changed.wait()

    def drop(self) -> None:
        """Declare the batch dead and forget its writes and outputs."""
        self.dead = True
        # New ones, not cleared ones: a commit that is under way must see all of them, or its transaction is torn.
        self.outputs, self.overlays, self.callbacks = [], {}, []
        self._changed.set()

    def seal(self) -> None:
        """Nothing is added from here on: the commit, in its thread, goes through outputs and writes."""
        self.sealed = True

    def check_alive(self) -> None:
        """Raise `DeadBatchError` if the batch is not open any more."""
        if self.dead:
            raise DeadBatchError("the event's batch was dropped; the event is delivered again")
        if self.sealed:
            raise DeadBatchError(
                "the event is done and its batch is committing: a task that an agent leaves behind can take no part in it; "
                "await it before the next event"
            )

    def send(self, output: Output) -> None:
        """Add a record to what the transaction will produce."""
        self.check_alive()
        check_output(output)
        self.outputs.append(output)

    def overlay(self, table: str, partition: int, new: Callable[[], Overlay]) -> Overlay:
        """The batch's view of one partition of a table."""
        self.check_alive()
        overlay = self.overlays.get((table, partition))
        if overlay is None:
            overlay = self.overlays[table, partition] = new()
        return overlay

    def offsets(self) -> list[Consumed]:
        """What the transaction says about the input."""
        return [Consumed(topic, partition, offset) for (topic, partition), offset in self.consumed.items()]


def check_output(output: Output) -> None:
    """Raise TypeError or ValueError for a record that the producer would refuse, with its whole batch, later."""
    headers = output.headers or ()
    for header in headers:
        name, value = header
        if not isinstance(name, str) or not isinstance(value, (bytes, str, type(None))):
            raise TypeError(f"{output.topic}: header {header!r}: a name is text, a value bytes, text or None")
    if output.partition is not None and output.partition < 0:
        raise ValueError(f"{output.topic} has no partition {output.partition}")
    check_size(output.topic, output.key, output.value, header_bytes(headers))


def check_size(topic: str, key: bytes | None, value: bytes | None, more_bytes: int = 0) -> None:
    """Raise ValueError for a record that no broker with default settings takes."""
    size_bytes = len(key or b"") + len(value or b"") + more_bytes
    if size_bytes > MAX_RECORD_BYTES:
        raise ValueError(f"a record for {topic} has {size_bytes} bytes; at most {MAX_RECORD_BYTES} fit into a message")
