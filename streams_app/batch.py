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
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from faust.types import TP, Message

from streams_app.errors import DeadBatchError, NoAnswer, PartitionsLost, TransactionAborted
from streams_app.outbox import Outbox
from streams_app.session import Consumed, Outgoing, Output, Pin, header_bytes
from streams_app.store import TIME_BYTES, Store

if TYPE_CHECKING:
    from streams_app.events import Event

T = TypeVar("T")

#: Kafka's own default for the size of a message, less its overhead: what is larger would abort the whole batch at produce.
MAX_RECORD_BYTES = 1_000_000 - 512

_NEVER_MS = -(1 << 62)
#: Distinct from None, which deletes; and from any stored bytes.
_NOT_WRITTEN = b"not written"


class Overlay:
    """Uncommitted writes over one store."""

    __slots__ = ("below", "clock_ms", "closed_ms", "store", "topic", "writes")

    def __init__(self, store: Store, topic: str, below: Overlay | None = None) -> None:
        self.store = store
        self.topic = topic
        #: Of the batch that commits meanwhile. The store gets its writes at some time; until it has them all, they are here.
        self.below = below
        #: Key to stored bytes; None deletes. The last write of a key wins, so a hot key costs one changelog record.
        self.writes: dict[bytes, bytes | None] = {}
        self.clock_ms: int = store.clock_ms if below is None else below.clock_ms
        #: Up to which end windows were looked for that have closed; see `streams_app.closing`.
        self.closed_ms: int = _NEVER_MS if below is None else below.closed_ms

    def get(self, key: bytes) -> bytes | None:
        """The stored bytes of ``key`` as the batch sees them."""
        written = self.writes.get(key, _NOT_WRITTEN)
        if written is _NOT_WRITTEN and self.below is not None:
            written = self.below.writes.get(key, _NOT_WRITTEN)
        return self.store.get(key) if written is _NOT_WRITTEN else written

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys as the batch sees them: those of the store first, its own last."""
        # Both before the store is looked at: what that gets meanwhile is what the batch below wrote, and what is written by
        # whoever goes through the keys is not come by a second time.
        below = {} if self.below is None else self.below.writes
        own = dict(self.writes)
        for key, value in self.store.items():
            if key not in own and key not in below:
                yield key, value
        for key, written in below.items():
            if written is not None and key not in own:
                yield key, written
        for key, written in own.items():
            if written is not None:
                yield key, written

    def time(self, timestamp_ms: int) -> bytes:
        """The partition's record time after a record of ``timestamp_ms``, as the bytes in front of a value.

        It never runs backwards: an entry is not older than what was seen before it, so it never expires too early. And it
        never runs ahead of this machine's clock: one record dated to next year would expire everything. Nor is it 0, which no
        record's timestamp can say (see `stamp`).
        """
        if timestamp_ms > self.clock_ms:
            self.clock_ms = max(self.clock_ms, min(timestamp_ms, int(time.time() * 1000)))
        return (self.clock_ms or 1).to_bytes(TIME_BYTES)


class Question(NamedTuple):
    """What an agent has asked, and awaits the answer."""

    event: Event
    topics: Set[str]
    #: By the monotonic clock.
    asked_s: float


class Batch:
    """The events between two barriers; see the module."""

    def __init__(
        self,
        pin: Pin,
        outbox: Outbox | None = None,
        *,
        redelivers: bool = True,
        is_member: Callable[[], bool] | None = None,
    ) -> None:
        """With an ``outbox`` outputs leave at once, instead of with the commit, while the worker ``is_member``."""
        self.pin = pin
        self._outbox = outbox
        self._is_member = is_member
        #: Whether an event that failed is delivered again, with its whole batch.
        self.redelivers = redelivers
        #: Next offset to read of each input partition, once this batch is committed.
        self.consumed: dict[TP, int] = {}
        self.outputs = Outgoing()
        self.overlays: dict[tuple[str, int], Overlay] = {}
        #: Run on the main thread after the commit.
        self.callbacks: list[Callable[[], None]] = []
        #: Records fetched, by partition in their order.
        self.messages: dict[TP, list[Message]] = {}
        #: What was made of them, in the order of delivery: one event for each agent that reads the topic.
        self.events: list[Event] = []
        self.pending = 0
        #: Of these, those whose agents went on without them: they may wait for an event that is not delivered yet.
        self.held = 0
        #: By the answers that agents await, which take other events to come; the oldest first.
        self.questions: dict[asyncio.Future[Any], Question] = {}
        #: Up to these offsets, `take` hands out events one by one: one of them made its agent raise.
        self.alone: Mapping[TP, int] = {}
        #: Events that were neither done nor delivered again; at most once only.
        self.given_up = 0
        self.dead = False
        self.sealed = False
        #: Neither of both.
        self.is_open = True
        #: Records set aside, by where they are from, with their dead letters.
        self.set_aside: dict[tuple[TP, int], Output] = {}
        #: Outputs that left before the commit.
        self.sent_at_once = 0
        #: The event whose agent raised.
        self.failure: Event | None = None
        #: What makes it hopeless to go on, and is no event's fault.
        self.trouble: BaseException | None = None
        #: What was found to expire with it, and the index entries that go; see `streams_app.commit.expire_all`.
        self.stale: dict[Overlay, list[bytes]] | None = None
        self._changed = asyncio.Event()
        self._below: dict[tuple[str, int], Overlay] = {}

    def over(self, below: Batch | None) -> None:
        """See the writes of a batch that is committing; None: what was below is committed."""
        # Those that it has now: dropped, it forgets them; events still in hand would see what never was, and be blamed.
        self._below = {} if below is None else below.overlays
        if below is None:
            for overlay in self.overlays.values():
                overlay.below = None

    def add(self, events: Sequence[Event]) -> None:
        """Count events, of this batch, that are on their way to an agent."""
        self.events += events
        self.pending += len(events)

    def hold(self, event: Event) -> None:
        """An agent goes on, or waits for other events, without being through with this one."""
        event.holds += 1
        if event.holds == 1 and not event.acked:
            self.held += 1
        self.wake()

    def let_go(self, event: Event) -> None:
        """There is one reason less to hold it."""
        event.holds -= 1
        if not (event.holds or event.acked):
            self.held -= 1
        self.wake()

    def wake(self) -> None:
        """Whoever waits for it to be `settled` shall look again."""
        self._changed.set()

    def put_aside(self, message: Message, letter: Output) -> None:
        """Set a record aside, once, however many agents refuse it; the letter is sent when the batch is finished."""
        self.set_aside.setdefault((message.tp, message.offset), letter)

    def record_of(self, message: Message) -> Message:
        """The record as it was fetched that an event's ``message`` comes from, also by way of a channel in memory."""
        messages = self.messages.get(message.tp, [])
        at = bisect_left(messages, message.offset, key=attrgetter("offset"))
        return messages[at] if at < len(messages) and messages[at].offset == message.offset else message

    async def answered(
        self, event: Event, topics: Set[str], ask: Callable[[], Awaitable[T]], timeout_s: float | None = None
    ) -> T:
        """The answer to a question of the agent that has ``event`` in hand; question and answer go by way of ``topics``.

        Raises:
            NoAnswer: it did not come in time. It may be that the question was set aside, or lost.
            DeadBatchError: the batch was dropped meanwhile. Who waited on would begin with no other event, and the answer may
                come with one.
        """
        self.check_alive()
        answer = asyncio.ensure_future(ask())
        self.hold(event)
        self.questions[answer] = Question(event, topics, time.monotonic())
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                return await answer
        except TimeoutError as error:
            if deadline.expired():
                self.check_alive()
                raise NoAnswer(f"nobody answered by {', '.join(sorted(topics))} for {timeout_s:g} s") from error
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                self.check_alive()
            raise
        finally:
            answer.cancel()
            del self.questions[answer]
            self.let_go(event)

    @property
    def asked(self) -> set[str] | None:
        """Topics that answers may come by, if nothing is held but for the sake of these."""
        questions = self.questions.values()
        if self.held > len({id(question.event) for question in questions if not question.event.acked}):
            return None
        return {topic for question in questions for topic in question.topics}

    @property
    def asked_for_s(self) -> float:
        """How long the oldest question has waited for its answer; 0: there is none."""
        return max((time.monotonic() - question.asked_s for question in self.questions.values()), default=0.0)

    @property
    def unbegun(self) -> set[TP]:
        """Partitions of which agents have events before them that they have not begun with."""
        return {event.message.tp for event in self.events if not (event.taken or event.acked)}

    @property
    def sends_at_once(self) -> bool:
        """Whether outputs leave before the commit."""
        return self._outbox is not None

    @property
    def waits_for_more(self) -> bool:
        """Whether an agent may need more events than there are before it is done with those that it holds."""
        return self.held > 0 and self.failure is None and self.trouble is None

    def fail(self, event: Event) -> None:
        """An agent did not get through with ``event``: the whole batch is delivered again, or that event given up."""
        if self.dead:
            return
        if not self.redelivers:
            self.given_up += 1
            event.ack()
        elif self.failure is None:
            self.failure = event
            self._changed.set()

    def give_up(self) -> None:
        """Nobody waits any longer for what agents have in hand: it counts as lost, and nothing more of it takes effect."""
        for event in self.events:
            if not event.acked:
                event.withdrawn = not event.taken  # an agent that lags would begin with it in the next batch
                self.fail(event)
        for answer in self.questions:
            answer.cancel()

    def withdraw(self) -> dict[TP, list[Message]]:
        """Take back, of each partition, what lies behind the last event that an agent has begun; it counts as not fetched.

        Called where no agent runs: on the event loop, without waiting.
        """
        begun: dict[TP, int] = {}
        for event in self.events:
            if event.taken:
                message = event.message
                begun[message.tp] = max(message.offset, begun.get(message.tp, -1))
        withdrawn = {}
        for event in self.events:
            message = event.message
            if message.offset <= begun.get(message.tp, -1):
                continue
            event.withdrawn = True
            self.pending -= 1
            if message.tp not in withdrawn:
                withdrawn[message.tp] = self._cut(message.tp, message.offset)
        self.events = [event for event in self.events if not event.withdrawn]
        if self.pending == self.held:
            self._changed.set()
        return withdrawn

    def _cut(self, tp: TP, end: int) -> list[Message]:
        messages = self.messages[tp]
        at = bisect_left(messages, end, key=attrgetter("offset"))
        self.messages[tp], cut = messages[:at], messages[at:]
        if at:
            self.consumed[tp] = end
        else:
            del self.consumed[tp]
        for message in cut:
            self.set_aside.pop((tp, message.offset), None)
        return cut

    @property
    def is_settled(self) -> bool:
        """Whether every delivered event is done, or held until others come, or one has failed."""
        return self.pending == self.held or self.failure is not None or self.trouble is not None

    async def settled(self) -> None:
        """Wait until it `is_settled`."""
        while not self.is_settled:
            await self.changed()

    async def changed(self) -> None:
        """Wait until it may be `settled`, or an agent is through with what it held."""
        self._changed.clear()
        await self._changed.wait()

    def drop(self) -> None:
        """Declare the batch dead and forget its writes and outputs."""
        self.dead, self.is_open = True, False
        for answer in self.questions:
            answer.cancel()
        # New ones, not cleared ones: a commit that is under way must see all of them, or its transaction is torn.
        self.outputs, self.overlays, self.callbacks, self.events = Outgoing(), {}, [], []
        self._changed.set()

    def release(self) -> None:
        """Let go of what was committed. Its events lead back here: such a circle lives until the garbage is collected."""
        self.outputs, self.overlays, self.callbacks = Outgoing(), {}, []
        self.events, self.messages = [], {}

    def seal(self) -> None:
        """Nothing is added from here on: the commit, in its thread, goes through outputs and writes."""
        self.sealed, self.is_open = True, False

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
        if not self.is_open:
            self.check_alive()
        check_output(output)
        if self._outbox is None:
            self.outputs.add(output)
        else:
            self._send_at_once(self._outbox, output)

    def send_plain(self, topic: str, key: bytes, value: bytes) -> None:
        """`send` of a record that says nothing but key and value, as most do."""
        if not self.is_open:
            self.check_alive()
        if len(key) + len(value) > MAX_RECORD_BYTES:
            check_size(topic, key, value)
        if self._outbox is None:
            self.outputs.messages[topic].append({"key": key, "value": value})
        else:
            self._send_at_once(self._outbox, Output(topic, key, value))

    def _send_at_once(self, outbox: Outbox, output: Output) -> None:
        if self._is_member is not None and not self._is_member():
            raise self.hopeless(PartitionsLost("the group has not heard of this worker for a whole session"))
        try:
            outbox.produce(output)
            self.sent_at_once += 1
        except TransactionAborted as error:
            raise self.hopeless(error) from error

    def hopeless(self, trouble: BaseException) -> DeadBatchError:
        """Take note that it is; gives what is to be raised in the agent, whose fault it is not."""
        self.trouble = trouble
        self._changed.set()
        return DeadBatchError(f"the event is delivered again, if its guarantee permits: {trouble}")

    @property
    def begun(self) -> bool:
        """Whether an agent has begun with any of the events."""
        return any(event.taken for event in self.events)

    def overlay(self, table: str, partition: int, new: Callable[[Overlay | None], Overlay]) -> Overlay:
        """The batch's view of one partition of a table; ``new`` makes it, over that of the batch below."""
        self.check_alive()
        overlay = self.overlays.get((table, partition))
        if overlay is None:
            overlay = self.overlays[table, partition] = new(self._below.get((table, partition)))
        return overlay

    def offsets(self) -> list[Consumed]:
        """What the transaction says about the input."""
        return [Consumed(topic, partition, offset) for (topic, partition), offset in self.consumed.items()]


def check_output(output: Output) -> None:
    """Raise TypeError or ValueError for a record that the producer would refuse, with its whole batch, later."""
    topic, key, value, partition, _, headers = output
    for header in headers or ():
        name, value = header
        if not isinstance(name, str) or not isinstance(value, (bytes, str, type(None))):
            raise TypeError(f"{topic}: header {header!r}: a name is text, a value bytes, text or None")
    if partition is not None and partition < 0:
        raise ValueError(f"{topic} has no partition {partition}")
    check_size(topic, key, value, header_bytes(headers or ()))


def check_size(topic: str, key: bytes | None, value: bytes | None, more_bytes: int = 0) -> None:
    """Raise ValueError for a record that no broker with default settings takes."""
    size_bytes = len(key or b"") + len(value or b"") + more_bytes
    if size_bytes > MAX_RECORD_BYTES:
        raise ValueError(f"a record for {topic} has {size_bytes} bytes; at most {MAX_RECORD_BYTES} fit into a message")
