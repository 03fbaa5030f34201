"""Whose fault it is, and what is taken back when: the engine's decisions, without Kafka."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import TP, Message

from streams_app.batch import Batch
from streams_app.engine import Engine
from streams_app.events import Event, in_hand
from streams_app.faust_adapter import Assignment, Fetched
from streams_app.figures import Figures
from streams_app.session import Pin
from streams_app.settings import Settings

PIN = Pin("group", 1, "member")
INPUT = TP("in", 0)


class Bare(Engine):
    """An engine with the parts that decide, and none of those that ask Kafka."""

    should_stop = False

    def __init__(self) -> None:
        self.queue: list[Event] = []
        channel = SimpleNamespace(queue=SimpleNamespace(_queue=self.queue))
        self.app = cast(
            Any,
            SimpleNamespace(
                settings=Settings(commit_interval_ms=20, revoke_timeout_ms=20),
                topics=SimpleNamespace(_tp_index=defaultdict(set, {INPUT: {Hashed(channel)}})),
            ),
        )
        self._guarantee = cast(Any, SimpleNamespace(redelivers=True, claims_first=False, after_trouble=lambda: None))
        self.figures = Figures()
        self._retry_s = 0.01
        self.log = cast(Any, logging.getLogger("bare"))
        self._attempts = Counter()
        self._last_words = {}
        self._finishing = asyncio.Event()
        self._withheld = None

    def deliver(self, count: int) -> tuple[Batch, Fetched]:
        """A batch of so many events, in the agents' queue."""
        batch = Batch(PIN)
        messages = [Message("in", 0, n, 0.0, 0, [], b"k", b"v", None, 1, 1, INPUT) for n in range(count)]
        batch.messages[INPUT], batch.consumed[INPUT] = messages, count
        for message in messages:
            event = Event(cast(Any, None), None, None, [], message, batch)
            batch.add([event])
            self.queue.append(event)
        return batch, Fetched(PIN, {INPUT: messages}, {INPUT: count}, drained=True)


class Hashed:
    """A channel, as a set wants it."""

    def __init__(self, channel: SimpleNamespace) -> None:
        self.queue = channel.queue


@pytest.mark.parametrize(("acked", "blamed"), [(False, True), (True, False)])
async def test_only_an_event_that_is_not_done_is_blamed(acked: bool, blamed: bool) -> None:
    """An agent that raises while it waits for the next event would have the last one's output taken back."""
    engine = Bare()
    batch, _ = engine.deliver(2)
    event = batch.events[0]
    in_hand.set(event)
    if acked:
        event.ack()
    engine.on_agent_error("agent", ValueError("no"))
    assert (batch.failure is event) == blamed
    assert engine._attempts[INPUT, 0] == int(blamed)
    in_hand.set(None)


async def test_the_failure_of_an_event_counts_whoever_notices_it_first() -> None:
    """The stream's own end may come before the agent's error: uncounted, the event would come back for ever."""
    engine = Bare()
    batch, _ = engine.deliver(2)
    event = batch.events[0]
    in_hand.set(event)
    batch.fail(event)
    engine.on_agent_error("agent", ValueError("no"))
    assert engine._attempts[INPUT, 0] == 1
    in_hand.set(None)


async def test_nothing_is_taken_back_before_an_agent_has_begun() -> None:
    """It would be delivered again at once, and again: an agent that is busy for long would fill the memory."""
    engine = Bare()
    batch, _ = engine.deliver(5)
    settling = asyncio.ensure_future(engine._settle(batch, Assignment(PIN, frozenset({INPUT})), time.monotonic()))
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not settling.done()
    assert (len(engine.queue), engine._withheld) == (5, None)
    first = engine.queue.pop(0)
    first.taken = True
    async with asyncio.timeout(10):
        while engine._withheld is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert engine.queue == [], "what was taken back waits in no queue"
    assert [message.offset for message in engine._withheld.messages[INPUT]] == [1, 2, 3, 4]
    first.ack()
    await asyncio.wait_for(settling, 10)
    assert batch.consumed == {INPUT: 1}


async def test_who_holds_more_events_than_fit_into_a_batch_is_told() -> None:
    """Nothing commits before they are acknowledged: delivery would go on until the memory is full."""
    engine = Bare()
    engine.app.settings = Settings(batch_max_events=5)
    engine.app.conf = SimpleNamespace(id="app")
    batch, _ = engine.deliver(4)
    for event in batch.events:
        event.hold()
    engine._check_held(batch)
    batch.add(batch.events[:1])
    with pytest.raises(ImproperlyConfigured, match="hold 4 of 5 events without acknowledging them"):
        engine._check_held(batch)


async def test_trouble_that_looks_like_a_cancellation_does_not_end_the_engine() -> None:
    """Mode takes a CancelledError for the end of a task and says nothing: the worker would go on without its engine."""
    engine, starts = Bare(), []
    assignment = Assignment(PIN, frozenset({INPUT}))

    async def start(_assignment: Assignment) -> None:
        starts.append(1)
        if len(starts) == 1:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled
        assignment.end(lost=True)

    async def work(_assignment: Assignment) -> None:
        pass

    engine._start_partitions, engine._work = start, work  # type: ignore[method-assign]
    await asyncio.wait_for(engine._serve(assignment), 5)
    assert len(starts) == 2
    assert engine.figures.troubles["cancelled_error"] == 1


async def test_an_engine_that_is_cancelled_ends() -> None:
    engine = Bare()
    begun = asyncio.Event()

    async def start(_assignment: Assignment) -> None:
        begun.set()
        await asyncio.sleep(60)

    engine._start_partitions = start  # type: ignore[method-assign]
    serving = asyncio.ensure_future(engine._serve(Assignment(PIN, frozenset({INPUT}))))
    await begun.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
