"""Whose fault it is, and what is taken back when: the engine's decisions, without Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import TP, Message

from streams_app.batch import Batch
from streams_app.channels import Channel
from streams_app.engine import Engine
from streams_app.errors import ConfigurationError, DeadBatchError, KafkaUnreachable
from streams_app.events import Event, in_hand
from streams_app.faust_adapter import Assignment, Fetched, askers_of
from streams_app.figures import Figures
from streams_app.pipeline import Pipeline
from streams_app.session import Pin
from streams_app.settings import Settings
from streams_app.start import Started
from streams_app.table import TableData

PIN = Pin("group", 1, "member")
INPUT, ASKED = TP("in", 0), TP("asked", 0)


def message(tp: TP, offset: int) -> Message:
    return Message(*tp, offset, 0.0, 0, [], b"k", b"v", None, 1, 1, tp)


class Bare(Engine):
    """An engine with the parts that decide, and none of those that ask Kafka."""

    should_stop = False

    def __init__(self) -> None:
        self.queue: list[Event] = []
        self.app = cast(
            Any,
            SimpleNamespace(
                settings=Settings(commit_interval_ms=20, revoke_timeout_ms=20),
                flow_control=SimpleNamespace(_queues=[SimpleNamespace(_queue=self.queue, _putters=[])]),
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
        messages = [message(INPUT, offset) for offset in range(count)]
        batch.messages[INPUT], batch.consumed[INPUT] = messages, count
        for each in messages:
            event = Event(cast(Any, None), None, None, [], each, batch)
            batch.add([event])
            self.queue.append(event)
        return batch, Fetched(PIN, {INPUT: messages}, {INPUT: count}, drained=True)


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


async def test_a_question_after_the_rest_was_taken_back_is_waited_for() -> None:
    """The answer takes a fetch, and the other agent may wait for the one that asks: all would wait for each other."""
    engine = Bare()
    batch, _ = engine.deliver(3)
    first, second, _ = batch.events
    first.taken = second.taken = True
    settling = asyncio.ensure_future(engine._settle(batch, Assignment(PIN, frozenset({INPUT})), time.monotonic()))
    async with asyncio.timeout(10):
        while engine._withheld is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
    asks = asyncio.ensure_future(batch.answered(second, {"asked"}, partial(asyncio.sleep, 60)))
    await asyncio.wait_for(settling, 10)
    assert batch.waits_for_more
    asks.cancel()


async def test_who_holds_more_events_than_fit_into_a_batch_is_told() -> None:
    """Nothing commits before they are acknowledged: delivery would go on until the memory is full."""
    engine = Bare()
    engine.app.settings = Settings(batch_max_events=5)
    engine.app.conf = SimpleNamespace(id="app")
    batch, _ = engine.deliver(4)
    for event in batch.events:
        event.taken = True
        event.hold()
    engine._check_held(batch)
    batch.add(batch.events[:1])
    with pytest.raises(ImproperlyConfigured, match="hold 4 of 5 events without acknowledging them"):
        engine._check_held(batch)


async def test_a_question_that_nobody_answers_does_not_grow_its_batch_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon its answer comes by the topics of those asked, later by any; until the batch is full."""
    engine = Flooded()
    engine.app.settings = Settings(batch_max_events=5)
    batch, _ = engine.deliver(4)
    for event in batch.events:
        event.taken = True
    asks = asyncio.ensure_future(batch.answered(batch.events[0], {"asked"}, partial(asyncio.sleep, 60)))
    await asyncio.sleep(0)
    assert engine._waited_for(batch) == [ASKED]
    now_s = time.monotonic() + 10
    monkeypatch.setattr("streams_app.batch.time.monotonic", lambda: now_s)
    assert engine._waited_for(batch) == [INPUT, ASKED]
    batch.add(batch.events[:1])
    assert engine._waited_for(batch) == [ASKED]
    engine._check_held(batch)
    asks.cancel()


async def test_who_goes_on_in_the_moment_when_all_was_settled_is_waited_for() -> None:
    """Its answer was the last that its batch waited for. Taken for the end, the batch would be dropped, after 8 s."""
    engine = Flooded()
    batch, _ = engine.deliver(2)
    asker, answer = batch.events
    asker.taken = answer.taken = True
    answers = asyncio.get_running_loop().create_future()

    async def question() -> None:
        await answers  # in a task of its own, as questions are: a turn of the loop later than the engine hears

    async def asks() -> None:
        await batch.answered(asker, {"asked"}, question)
        await asyncio.sleep(0.02)
        asker.ack()

    async def replies() -> None:
        await asyncio.sleep(0.005)  # longer than the engine looks by itself
        answers.set_result(1)
        answer.ack()

    agents = [asyncio.ensure_future(asks()), asyncio.ensure_future(replies())]
    await asyncio.sleep(0)
    await engine._settle(batch, Assignment(PIN, frozenset({INPUT})), time.monotonic() + 1)
    assert (batch.pending, batch.held) == (0, 0)
    await asyncio.gather(*agents)


async def test_at_most_once_what_lies_behind_a_slow_agent_is_given_back() -> None:
    """A rebalance, or a stop, that does not wait for it: what no agent has begun was claimed, and would be lost with it."""
    engine = Bare()
    engine._guarantee.redelivers = False
    engine.app.settings = Settings(commit_interval_ms=5, revoke_timeout_ms=5)
    assignment = Assignment(PIN, frozenset({INPUT}))
    batch, _ = engine.deliver(5)
    batch.redelivers = False
    done, slow = batch.events[:2]
    done.taken = slow.taken = True
    done.ack()
    # Another agent of the same topic lags.
    lags = Event(cast(Any, None), None, None, [], slow.message, batch)
    batch.add([lags])
    engine.queue.append(lags)
    asks = asyncio.ensure_future(batch.answered(slow, {"asked"}, partial(asyncio.sleep, 60)))
    await asyncio.sleep(0)
    committed: list[Batch] = []
    engine._pipeline = Pipeline(cast(Any, None))
    engine._pipeline.commit = committed.append  # type: ignore[method-assign]
    engine._guarantee.pipelined, engine._one_chunk = True, False
    assignment.end(lost=False)
    await engine._settle(batch, assignment, time.monotonic())
    await engine._finish(batch, assignment)
    assert (committed, batch.given_up, batch.consumed) == ([batch], 2, {INPUT: 2})
    assert lags not in engine.queue, "it would be begun with in the next batch"
    with pytest.raises(DeadBatchError):
        await asyncio.wait_for(asks, 10)


async def test_what_an_agent_sets_aside_is_the_record_that_came() -> None:
    """By way of a channel in memory it has another value, which nobody could send back; a struct has no bytes at all."""
    engine = Bare()
    engine._guarantee.redelivers = False
    batch, _ = engine.deliver(1)
    batch.redelivers = False
    [cause] = batch.events
    in_hand.set(cause)
    event = Channel._event_of(cast(Any, SimpleNamespace(app=None)), {"made": "of it"})
    cause.ack()
    in_hand.set(event)
    engine.on_agent_error("agent", ValueError("no"))
    in_hand.set(None)
    [letter] = batch.set_aside.values()
    assert (letter.key, letter.value, batch.pending) == (b"k", b"v", 0)


def test_a_refused_record_is_found_among_events_that_go_together() -> None:
    """An agent that asks has question and answer in its batch, one that acknowledges by itself what it holds."""
    engine = Flooded()
    engine._one_chunk, engine._chunk_events = True, 1
    most = engine.app.settings.max_attempts
    for _ in range(most):
        batch, _ = engine.deliver(3)
        engine._blame(batch)
    assert engine._attempts == {(INPUT, offset): most for offset in range(3)}
    batch, _ = engine.deliver(3)
    with pytest.raises(ConfigurationError, match="refuse dead letters"):
        engine._blame(batch)


def test_a_refused_record_is_looked_for_until_it_is_found() -> None:
    """Each half that commits would end the search, and the next batch begin with thousands."""
    engine = Flooded()
    engine._chunk_events, engine._retry_s = 64, 0.1
    engine._alone = {}
    batch, _ = engine.deliver(64)
    engine._blame(batch)
    assert (engine._one_chunk, engine._chunk_events) == (True, 32)
    batch, _ = engine.deliver(64)
    batch.consumed[INPUT] = 66  # behind the markers of transactions
    engine._blame(batch)
    for committed, looks in ((32, True), (64, False)):
        done = Batch(PIN)
        done.consumed[INPUT] = committed
        engine._committed(done)
        assert engine._one_chunk == looks


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


async def test_an_event_is_blamed_for_the_question_that_it_asks() -> None:
    """Unless it is done: then the question is one that is delivered again, and nobody waits for its answer."""
    engine = Bare()
    engine._positions = {INPUT: 1, ASKED: 0}
    engine.app.conf = SimpleNamespace(id="app")
    for offset, counts in [(0, 0), (1, 1)]:
        batch, _ = engine.deliver(1)
        [question] = batch.events
        # It may be one that the first one who was asked has asked; itself it is counted once; and others' are not ours.
        lines = f"app in 0 {offset}\napp asked 0 0\nanother in 0 {offset}"
        question.message.tp, question.headers = ASKED, {"streams-app-asked-by": lines.encode()}
        in_hand.set(question)
        engine.on_agent_error("agent", ValueError("no"))
        assert engine._attempts[INPUT, offset] == counts
    assert engine._attempts[ASKED, 0] == 2
    in_hand.set(None)


@pytest.mark.parametrize("place", [None, "in 0 1", b"app in 0", b"app in x 1", b"\xff"])
def test_a_header_of_somebody_elses_blames_nobody(place: object) -> None:
    engine = Bare()
    batch, _ = engine.deliver(1)
    batch.events[0].headers = {} if place is None else {"streams-app-asked-by": place}
    assert list(askers_of(batch.events[0])) == []


@pytest.mark.parametrize("together", [False, True])
async def test_an_agent_that_takes_its_time_to_end_is_blamed_all_the_same(together: bool) -> None:
    """It closes a session, say, and its batch is dropped meanwhile: uncounted, the event would come back for ever."""
    engine = Bare()
    engine._alone = {}
    batch, _ = engine.deliver(2)
    first, last = batch.events
    if together:
        last.together = (first, last)
    in_hand.set(last)
    batch.fail(first if together else last)
    engine._abandon(batch, "agent_error")
    engine.on_agent_error("agent", ValueError("no"))
    assert (engine._alone, engine._attempts) == (({INPUT: 1}, {}) if together else ({}, {(INPUT, 1): 1}))
    in_hand.set(None)


async def test_a_batch_that_is_dropped_for_no_events_fault_blames_none() -> None:
    engine = Bare()
    batch, _ = engine.deliver(1)
    in_hand.set(batch.events[0])
    engine._abandon(batch, "partitions_lost")
    engine.on_agent_error("agent", DeadBatchError("dropped"))
    engine.on_agent_error("agent", ValueError("of the above"))
    assert not engine._attempts
    in_hand.set(None)


class Flooded(Bare):
    """Behind each chunk of input there is another one."""

    def __init__(self) -> None:
        super().__init__()
        self._pipeline = Pipeline(cast(Any, None))
        self._commit_took_s, self._chunk_events, self._one_chunk = 0.0, 64, False
        self._alone = {}
        self._positions = {INPUT: 0, ASKED: 0}
        self.next = dict(self._positions)
        self.app.conf = SimpleNamespace(id="app")

    async def _fetch_of(self, partitions: list[TP], _assignment: Assignment, _wait_ms: int, most: int) -> Fetched:
        await asyncio.sleep(0)
        messages = {}
        for tp in partitions:
            if tp == INPUT:
                begin = self.next[tp]
                self.next[tp] += most
                messages[tp] = [message(tp, offset) for offset in range(begin, begin + most)]
        return Fetched(PIN, messages, {tp: self.next[tp] for tp in messages}, drained=not messages)

    def _deliver(self, batch: Batch, fetched: Fetched) -> None:
        for tp, messages in fetched.messages.items():
            batch.messages.setdefault(tp, []).extend(messages)
            events = [Event(cast(Any, None), None, None, [], each, batch) for each in messages]
            batch.add(events)
            self.queue += events


@pytest.mark.parametrize("asks", [True, False])
async def test_who_holds_an_event_is_not_flooded_with_others(asks: bool) -> None:
    """A slow answer, or slow agents that acknowledge themselves, beside a backlog: it would be held up to the bound.

    Nor does the batch of one that asks go on for ever, where there is always more to ask for.
    """
    engine = Flooded()
    batch = Batch(PIN)

    async def slow() -> None:
        held: list[Event] = []
        while True:
            while not engine.queue:  # noqa: ASYNC110 - and not between two events, as agents do not
                await asyncio.sleep(0)
            event = engine.queue.pop(0)
            event.taken = True
            if asks:
                await batch.answered(event, {"asked"}, partial(asyncio.sleep, 0.002))
                event.ack()
            elif len(held) < 70:
                event.hold()
                held.append(event)
                await asyncio.sleep(0.002)
            else:
                for each in [*held, event]:
                    each.ack()

    task = asyncio.ensure_future(slow())
    assignment = Assignment(PIN, frozenset({INPUT, ASKED}))
    first = await engine._fetch_of([INPUT], assignment, 0, 64)
    try:
        await asyncio.wait_for(engine._fill(batch, first, assignment), 20)
    finally:
        task.cancel()
    assert batch.pending == batch.held == 0
    assert engine.next[INPUT] <= (64 if asks else 64 + 2 * 32), "fetched in all; some may have been taken back"
    assert engine._chunk_events <= 32, "slow agents get few at a time"


class Starting(Bare):
    """It starts the partitions of one table's changelog, and notes which ones pages are shown meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[set[int]] = []
        self.breaks_off = False
        self.data = object.__new__(TableData)
        self.data.partitions, self.data.copies = {}, {}
        table = SimpleNamespace(
            changelog_topic_name="log",
            is_followed=False,
            data=self.data,
            call_recover_callbacks=partial(asyncio.sleep, 0),
        )
        self.app = cast(
            Any,
            SimpleNamespace(
                guarantee="exactly_once",
                settings=Settings(revoke_timeout_ms=20),
                tables=SimpleNamespace(changelog_topics={"log"}),
                transactional_tables=lambda: [table],
                replicas=SimpleNamespace(exchange=lambda *_: {}),
                open_store=lambda *_: SimpleNamespace(),
                flow_control=SimpleNamespace(is_active=lambda: True),
                rebalancing=False,
                on_rebalance_start=lambda: None,
            ),
        )
        self._stores, self._whole, self._kept, self._assignment = {}, set(), set(), None
        self._assigned, self._idle, self.ready = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def begin(self, *partitions: int, breaks_off: bool = False) -> set[int]:
        """What pages are shown while the partitions start."""
        assignment = Assignment(PIN, frozenset(TP("log", each) for each in partitions))
        self.on_assigned(assignment)
        self._idle.set()
        self.breaks_off = breaks_off
        with contextlib.suppress(KafkaUnreachable):
            await self._start_partitions(assignment)
        return self.shown[-1]

    def _start(self, _assignment: Assignment, _inputs: list[TP], changelogs: set[TP]) -> Started:
        self._open_stores(changelogs, frozenset(), {"log": "id"})
        self.shown.append(set(self.data.partitions))
        if self.breaks_off:
            raise KafkaUnreachable("amid the restore")
        return Started({}, 0)

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return function(*args)

    async def _rewind(self) -> None:
        """Nothing was fetched."""


async def test_pages_are_shown_what_is_whole_and_ours() -> None:
    """Half of a table looks like a whole one from which something was deleted; and who has lost it knows only what it was."""
    engine = Starting()
    assert await engine.begin(0, 1, breaks_off=True) == set()
    assert await engine.begin(0, 1) == set(), "the first start was broken off in their restore"
    assert await engine.begin(0, 1) == {0, 1}
    assert await engine.begin(0) == {0}
    assert await engine.begin(0, 1) == {0}, "the other one was somebody else's meanwhile"
    engine.on_assigned(Assignment(PIN, frozenset({TP("log", 0)})))
    assert await engine.begin(0, 1) == {0}, "so it was, though nothing was started there"
    await engine.on_revoked(lost=True)
    assert await engine.begin(0, 1) == set()
    engine._hide_store(("log", 1))
    assert set(engine.data.partitions) == {0}, "what is about to be wiped"
    assert await engine.begin(0, 1, breaks_off=True) == {0}
