"""The engine: one coroutine that takes assignments one after the other, and batches one after the other.

::

    assignment ──> start ──> ┌─ fetch ──> deliver ──> agents done ──> commit ─┐ ──> over: next assignment
                     ^       └──────────────────────<──────────── meanwhile ──┘
                     └── after trouble with the brokers: drop what is in hand, start anew
                             after an agent raised: drop the batch, rewind, deliver again

The same for all guarantees; what differs is done by guarantees.py. One decider: rebalance callbacks only mark the assignment
as revoked or lost; whether a batch commits is decided in `_finish` and nowhere else, after the one before it has ended
(pipeline.py). Everything that blocks (librdkafka, RocksDB) runs in one thread, one call after the other.

A batch never waits for more than the events that agents have in hand: when its interval is over, or its partitions are
revoked, what no agent has begun is taken back, and comes again with a later batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aiokafka.errors import KafkaError as AioKafkaError
from confluent_kafka import KafkaException
from faust.exceptions import ImproperlyConfigured
from faust.types import TP, Message
from mode import Service

from streams_app.batch import Batch
from streams_app.codecs import UndecodableError
from streams_app.commit import expire_all
from streams_app.dead_letters import dead_letter
from streams_app.errors import (
    BatchError,
    ConfigurationError,
    DeadBatchError,
    KafkaUnreachable,
    OutputRefused,
    PartitionsLost,
)
from streams_app.events import Event, current_event
from streams_app.faust_adapter import Assignment, Fetched, askers_of, purge, routes_of
from streams_app.figures import Figures, named
from streams_app.guarantees import AtLeastOnce, AtLeastOnceUnfenced, AtMostOnce, ExactlyOnce, Guarantee
from streams_app.logs import about, id_of
from streams_app.offsets import Offsets
from streams_app.pipeline import Pipeline
from streams_app.replicas import hide
from streams_app.restore import Restoring
from streams_app.session import Pin
from streams_app.start import Start, Started
from streams_app.store import Store

if TYPE_CHECKING:
    from streams_app.application import App

T = TypeVar("T")

_FETCH_WAIT_MS = 500
_FIRST_CHUNK_EVENTS, _LARGEST_CHUNK_EVENTS = 128, 4_096
#: Turns of the loop after which agents that await nothing are through with a small chunk.
_QUICK_TURNS = 3
#: Outputs and table writes wait in memory until the barrier: at this many the batch is full.
_BATCH_MAX_OUTPUTS = 200_000
_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_LONGEST_INTERVAL_S = 1.0
#: From the end of a commit to the next one, where little comes in. The brokers finish a transaction after they have answered,
#: and turn the next one away until then; and few events shall not give them more to do than many.
_LEAST_REST_S = 0.005
#: Meanwhile, between two looks at the input: to be handed each record by itself costs more than to process it.
_GLANCE_S = 0.01
#: aiokafka has fetched ahead what had come by the last look. What has come since is there that soon.
_LAST_LOOK_MS = 2
_FINISH_S = 6.0
#: No chunk is quicker.
_CLOCK_TICK_S = 1e-6
#: Who waits for an answer gets events of those who were asked; after so long of others, by which they may answer.
_ANSWERS_SOON_S = 5.0
#: Of one batch, in the log.
_LETTERS_TOLD = 5


class Engine(Service):
    """See the module."""

    def __init__(self, app: App, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.app = app
        #: Set when the first assignment has started.
        self.ready = asyncio.Event()
        self.figures = Figures()
        #: Partitions have started, and the input flows.
        self.is_working = False
        #: How far the restore of a start is.
        self.restoring = Restoring()
        #: What the next try waits for, in words.
        self.trouble: str | None = None
        self._assignment: Assignment | None = None
        self._assigned = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._finishing = asyncio.Event()
        self._finish_once: asyncio.Future[None] | None = None
        self._positions: dict[TP, int] = {}
        self._attempts: Counter[tuple[TP, int]] = Counter()
        self._last_words: dict[tuple[TP, int], str] = {}
        #: See `Batch.alone`.
        self._alone: dict[TP, int] = {}
        self._chunk_events = _FIRST_CHUNK_EVENTS
        #: While a record is looked for that no broker takes, somewhere below these offsets, a batch has one chunk.
        self._one_chunk = False
        self._refused_below: Mapping[TP, int] = {}
        #: What was taken back from a batch, for the next one.
        self._withheld: Fetched | None = None
        self._retry_s = _RETRY_S
        self._commit_took_s = 0.0
        self._stores: dict[TP, Store] = {}
        #: Of these, those that were restored to the end of their changelog; and changelogs that have been ours ever since.
        self._whole: set[TP] = set()
        self._kept: set[TP] = set()
        self._pipeline = Pipeline(self._commit)
        self._commits = 0
        #: The number of the commit that is under way.
        self.committing: int | None = None
        tell = partial(about, guarantee=app.guarantee)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit", initializer=tell)

    async def on_start(self) -> None:
        app = self.app
        config = app.kafka.librdkafka()
        self._guarantee = self._new_guarantee(config, app.settings.transaction_timeout_ms / 1000)

    def _new_guarantee(self, config: dict[str, Any], timeout_s: float) -> Guarantee:
        app = self.app
        name = f"{app.conf.id}-{app.slot.name}"
        if app.guarantee == "exactly_once":
            return ExactlyOnce(config, name, timeout_s)
        if app.guarantee == "at_most_once":
            most_s = min(timeout_s, app.settings.session_timeout_ms / 1000)
            return AtMostOnce(config, app.input.commit_once, most_s, self.figures, app.input.is_member)
        if app.settings.at_least_once_fenced:
            return AtLeastOnce(config, name, timeout_s)
        return AtLeastOnceUnfenced(config, app.input.commit_once, timeout_s)

    async def finish(self) -> None:
        """Commit what is in hand and take nothing new; bounded. Asked again, the same."""
        if self._finish_once is None:
            self._finish_once = asyncio.ensure_future(self._finish_soon())
        await asyncio.shield(self._finish_once)

    async def _finish_soon(self) -> None:
        self._finishing.set()
        try:
            await asyncio.wait_for(self._idle.wait(), _FINISH_S)
        except TimeoutError:
            self.log.warning(
                "agents were not through with what they have in hand within %g s; it is broken off", _FINISH_S
            )
            await self._end_assignment()

    def hurry(self) -> None:
        """Do not wait for what agents have in hand any longer: it is processed again, elsewhere."""
        if self._assignment is not None:
            self._assignment.end(lost=True)

    async def on_stop(self) -> None:
        # Not on the event loop: the others of this worker are stopping, too.
        await asyncio.to_thread(self._thread.shutdown)
        self._guarantee.close()
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    # -- Asked by metrics and health.

    @property
    def assignment(self) -> Assignment | None:
        """The last one, maybe over."""
        return self._assignment

    @property
    def positions(self) -> Mapping[TP, int]:
        """Up to where the input is done, of the partitions that were started last."""
        return self._positions

    @property
    def stores(self) -> Mapping[TP, Store]:
        """By changelog partition."""
        return dict(self._stores)  # in one step: another thread opens and closes them

    # -- Called by the rebalance listener. They mark; they decide nothing.

    async def on_revoked(self, *, lost: bool) -> None:
        """An assignment ends. Waits, for a bounded time, until its batch is committed or dropped."""
        self.app.on_rebalance_start()
        if self._assignment is None:
            return
        self.log.info("generation %d is %s", self._assignment.pin.generation, "lost" if lost else "revoked")
        if lost:
            self._kept = set()
        await self._end_assignment(lost=lost)

    async def _end_assignment(self, *, lost: bool = False) -> None:
        """Its batch has so long to commit what is done; then it is dropped."""
        if self._assignment is None:
            return
        self._assignment.end(lost=lost)
        try:
            await asyncio.wait_for(self._idle.wait(), 2 * self.app.settings.revoke_timeout_ms / 1000)
        except TimeoutError:
            self._assignment.end(lost=True)

    def on_assigned(self, assignment: Assignment) -> None:
        """An assignment begins."""
        self._kept = self._kept & assignment.partitions
        self.figures["rebalances"] += 1
        self._assignment = assignment
        if not self._finishing.is_set():
            self._idle.clear()
        self._assigned.set()

    # -- Called when an agent raised.

    def on_agent_error(self, agent: str, error: BaseException) -> None:
        """Fail the batch of the event in hand, unless the error is not the event's fault."""
        if isinstance(error, ImproperlyConfigured):
            self.add_future(self.app.crash(error))
            return
        event = current_event()
        batch = event.batch if event is not None else None
        if event is None or batch is None or isinstance(error, DeadBatchError):
            return
        undone = event.undone
        if not undone:
            return  # not while it had an event in hand
        if batch.failure is not None and batch.failure not in undone:
            return  # the batch is dropped, for the fault of another event
        if batch.sealed or batch.trouble or (batch.dead and batch.failure is None):
            return  # or of nobody
        (tp, offset) = at = event.message.tp, event.message.offset
        words = f"{agent}: {type(error).__name__}: {error}"
        if not self._guarantee.redelivers and undone == [event]:
            self._set_aside(batch, batch.record_of(event.message), "agent_error", words, attempts=1)
            event.ack()
        elif not self._guarantee.redelivers:
            # Some of them may have been done. Set aside, and replayed one day, these would be done twice.
            for each in undone:
                batch.fail(each)
        elif len(event.together) > 1:
            # Which of them it was is known when they have been handed out one by one.
            self._alone[tp] = max(offset, self._alone.get(tp, offset))
            batch.fail(event)
        else:
            self._count(at, words)
            self._count_askers(event, words)
            batch.fail(event)

    def _count_askers(self, event: Event, words: str) -> None:
        """Those that wait for an answer ask anew each time that they are delivered: uncounted, they would do so for ever."""
        message = event.message
        for app_id, tp, offset in askers_of(event):
            ours = app_id == self.app.conf.id and (tp, offset) != (message.tp, message.offset)
            if ours and offset >= self._positions.get(tp, offset + 1):
                self._count((tp, offset), f"it asked, and {words}")

    def _count(self, at: tuple[TP, int], words: str) -> None:
        self._attempts[at] += 1
        self._last_words[at] = words

    # -- The coroutine.

    @Service.task
    async def _take_assignments(self) -> None:
        about(guarantee=self.app.guarantee)
        try:
            while not self.should_stop and not self._finishing.is_set():
                self._assigned.clear()
                assignment = self._assignment
                if assignment is not None and not assignment.over.is_set():
                    self._idle.clear()
                    await self._serve(assignment)
                self._idle.set()
                await self._first_of(self._assigned.wait(), self._finishing.wait())
        finally:
            self._idle.set()

    async def _serve(self, assignment: Assignment) -> None:
        """Start the partitions and work on them until they are gone."""
        about(generation=assignment.pin.generation)
        while not self._is_over(assignment):
            try:
                await self._start_partitions(assignment)
                await self._work(assignment)
                if not assignment.lost:
                    await self._in_thread(self._guarantee.rest, self._positions, assignment.pin)
            except PartitionsLost as error:
                self.log.info("partitions lost: %s", error)
                assignment.lost = True
                # Membership is aiokafka's: it rejoins when a heartbeat tells it so. If it is told otherwise, start anew.
                await self._pause(assignment, self.app.settings.session_timeout_ms / 1000)
                assignment.lost = assignment.over.is_set()
            except OutputRefused as error:
                self.log.warning("looking for the event that sent it, %d at a time: %s", self._chunk_events, error)
                await self._pause(assignment, _RETRY_S)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if self.should_stop or (task is not None and task.cancelling()):
                    raise
                # Something that was awaited was cancelled, not we. Mode takes it for our end, and would say nothing.
                await self._start_anew(assignment, error)
            except (BatchError, KafkaUnreachable, KafkaException, AioKafkaError) as error:
                await self._start_anew(assignment, error)

    async def _start_anew(self, assignment: Assignment, error: BaseException) -> None:
        """After trouble: wait, longer each time."""
        name = type(error).__name__
        self.log.warning("starting the partitions anew in %g s, after %s: %s", self._retry_s, name, error)
        self.figures.troubles[named(error)] += 1
        self.trouble = f"{name}: {error}"
        self._guarantee.after_trouble()
        await self._pause(assignment, self._retry_s)
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)

    async def _pause(self, assignment: Assignment, seconds: float) -> None:
        await self._first_of(assignment.over.wait(), self._finishing.wait(), asyncio.sleep(seconds))

    def _is_over(self, assignment: Assignment) -> bool:
        return assignment.over.is_set() or self._finishing.is_set() or self.should_stop

    async def _start_partitions(self, assignment: Assignment) -> None:
        """See start.py; then set positions and let the input flow."""
        started_s = time.monotonic()
        changelogs = {tp for tp in assignment.partitions if tp.topic in self.app.tables.changelog_topics}
        inputs = sorted(assignment.partitions - changelogs)
        self._show_stores(changelogs & self._kept)
        started = await self._in_thread(self._start, assignment, inputs, changelogs)
        self._whole, self._kept = changelogs, set() if assignment.lost else changelogs
        self._show_stores(changelogs)
        self._positions = {TP(*tp): offset for tp, offset in started.positions.items()}
        for table in self.app.transactional_tables():
            await table.call_recover_callbacks()
        await self._rewind()
        self.log.info(
            "%d partitions started in %.2f s, %d records restored (%s, generation %d)",
            len(inputs),
            time.monotonic() - started_s,
            started.restored_records,
            self.app.guarantee,
            assignment.pin.generation,
        )
        if not self.app.flow_control.is_active():  # else it would empty all queues, of what came from outside, too
            self.app.flow_control.resume()
        if self.app.rebalancing:
            self.app.on_rebalance_end()
        self.trouble = None
        self.ready.set()

    def _start(self, assignment: Assignment, inputs: list[TP], changelogs: set[TP]) -> Started:
        """In the thread; see start.py for what it raises."""
        about(generation=assignment.pin.generation)
        app = self.app
        with contextlib.closing(Offsets(app.kafka.librdkafka(), app.conf.id)) as offsets:
            self._open_stores(changelogs, assignment.standbys, offsets.topic_ids({tp.topic for tp in changelogs}))
            from_latest = str(app.conf.consumer_auto_offset_reset) == "latest"
            config = {**app.kafka.librdkafka(), "group.id": app.conf.id}
            start = Start(
                *(offsets, self._guarantee, config),
                from_latest=from_latest,
                restoring=self.restoring,
                hide=self._hide_store,
            )
            stores = cast("dict[tuple[str, int], Store]", self._stores)
            started = start.run(assignment.pin, [*inputs], stores, lambda: self._is_over(assignment))
        app.replicas.follow()
        app.replicas.wait_for_copies(lambda: self._is_over(assignment))
        return started

    def _open_stores(self, changelogs: set[TP], standbys: Collection[TP], topic_ids: Mapping[str, str]) -> None:
        """In the thread: give back the stores of partitions that are gone, take or open those that came."""
        gone = {(tp.topic, tp.partition): self._stores.pop(tp) for tp in self._stores.keys() - changelogs}
        self._whole = self._whole & self._stores.keys()
        followed = self.app.replicas.exchange(gone, changelogs, standbys)
        self._stores.update((TP(*tp), store) for tp, store in followed.items())
        for tp in changelogs:
            store = self._stores.get(tp)
            if store is None:
                self._stores[tp] = self.app.open_store(tp, topic_ids[tp.topic])
            else:
                store.topic_id = topic_ids[tp.topic]

    def _hide_store(self, tp: tuple[str, int]) -> None:
        """In the thread: it is about to be wiped."""
        self._whole = self._whole - {tp}
        hide(self.app, tp)

    def _show_stores(self, changelogs: set[TP]) -> None:
        """Let the tables see the stores of ``changelogs``, and no others: those are closed next, unless they are followed.

        Nor one that a start was broken off in, which is not whole.
        """
        for table in self.app.transactional_tables():
            table.data.show(
                partitions={
                    tp.partition: store
                    for tp, store in self._stores.items()
                    if tp.topic == table.changelog_topic_name
                    and tp in self._whole
                    and (tp in changelogs or table.is_followed)
                }
            )

    async def _work(self, assignment: Assignment) -> None:
        self.is_working = True
        try:
            while not self._is_over(assignment):
                fetched = await self._fetch(assignment, _FETCH_WAIT_MS)
                if fetched is not None:
                    await self._process(fetched, assignment)
        finally:
            self.is_working = False
            await self._pipeline.ended()

    async def _process(self, fetched: Fetched, assignment: Assignment) -> None:
        """Make a batch of what was fetched, and of what else comes in time."""
        if not fetched.messages or self._pipeline.failed:
            await self._pipeline.ended()
        batch = self._guarantee.new_batch(fetched.pin)
        batch.alone = self._alone
        self._pipeline.fill(batch)
        try:
            if fetched.messages:
                await self._fill(batch, fetched, assignment)
            else:
                self._skip_markers(batch, fetched)
            if batch.consumed:
                await self._finish(batch, assignment)
            if not fetched.messages:
                await self._pipeline.ended()
                await self._in_thread(self._rest, assignment.pin)
        except BaseException as error:
            self._abandon(batch, named(error))
            raise

    def _rest(self, pin: Pin) -> None:
        """In the thread: nothing comes in, so there is time for what can wait."""
        self._guarantee.rest(self._positions, pin)
        for store in self._stores.values():
            store.write_out()

    async def _rewind(self) -> None:
        """Read again from the positions; nothing that was fetched ahead, or taken back, counts."""
        self._withheld = None
        await self.app.input.seek_all(self._positions)

    def _skip_markers(self, batch: Batch, fetched: Fetched) -> None:
        """The input is idle: commit the positions behind the markers of the last transactions in it.

        Else the committed offset stays one marker behind, and when retention has deleted the records before it, it looks as
        if events had been lost.
        """
        batch.consumed.update({tp: at for tp, at in fetched.positions.items() if at > self._positions.get(tp, at)})

    def _blame(self, batch: Batch) -> None:
        """A record of this batch is one that no broker takes: find the event that sent it, by halves, and count it."""
        self._drop(batch, "output_refused")
        records = [(message.tp, message.offset) for messages in batch.messages.values() for message in messages]
        if len(records) == 1 or (self._one_chunk and self._chunk_events == 1):
            # Several: what agents hold together, or ask each other. They are counted together, too.
            self._count_refused(records)
        self._chunk_events = max(1, min(self._chunk_events, len(records)) // 2)
        # Up to the last record itself: behind markers that follow it, the position may not come for long.
        ends = {tp: messages[-1].offset + 1 for tp, messages in batch.messages.items() if messages}
        self._one_chunk, self._refused_below = True, ends

    def _count_refused(self, records: list[tuple[TP, int]]) -> None:
        most = self.app.settings.max_attempts
        if all(self._attempts[at] >= most for at in records):
            raise ConfigurationError(f"the brokers refuse dead letters, of {records}; they must take them")
        for at in records:
            self._count(at, "the brokers refuse a record that was sent for this event")
            if len(records) == 1:
                # Told by the producer or the broker, of the record itself: trying again would change nothing.
                self._attempts[at] = most

    async def _fetch(self, assignment: Assignment, wait_ms: int, share: float = 1.0) -> Fetched | None:
        """Records, at most a ``share`` of a chunk; or None if the assignment ended first."""
        most = max(1, int(self._most_events() * share))
        if self._withheld is not None:
            fetched, self._withheld = self._withheld.split(most)
            return fetched
        if not self._positions:
            await self._first_of(assignment.over.wait(), self._finishing.wait())
            return None
        return await self._fetch_of([*self._positions], assignment, wait_ms, most)

    async def _fetch_of(self, partitions: list[TP], assignment: Assignment, wait_ms: int, most: int) -> Fetched | None:
        fetch = asyncio.ensure_future(self.app.input.fetch(partitions, wait_ms, most))
        await self._first_of(fetch, assignment.over.wait(), self._finishing.wait())
        # Records of a fetch that was cut short are not lost: whoever owns the partition next starts at a stable offset.
        return fetch.result() if fetch.done() and not fetch.cancelled() else None

    async def _fetch_for_held(self, batch: Batch, assignment: Assignment) -> Fetched | None:
        """What agents may be waiting for that hold events, maybe nothing."""
        settings = self.app.settings
        if self._withheld is not None:
            return await self._fetch(assignment, 0)
        partitions = self._waited_for(batch)
        if partitions:
            return await self._fetch_of(partitions, assignment, settings.commit_interval_ms, self._most_events())
        over = assignment.over.wait(), self._finishing.wait()
        await self._first_of(batch.changed(), *over, asyncio.sleep(settings.commit_interval_ms / 1000))
        return None if self._is_over(assignment) else Fetched(batch.pin, {}, {}, drained=True)

    def _waited_for(self, batch: Batch) -> list[TP]:
        """Partitions of which agents have begun with all that is before them; while all that is held is held for the sake of
        answers, and these may come soon, only those by which they come: there may be no end to the others.
        """
        unbegun, topics = batch.unbegun, batch.asked
        if batch.asked_for_s > _ANSWERS_SOON_S and not self._is_at_bound(batch):
            topics = None
        return [tp for tp in self._positions if tp not in unbegun and (topics is None or tp.topic in topics)]

    async def _fill(self, batch: Batch, fetched: Fetched | None, assignment: Assignment) -> None:
        """Deliver chunk after chunk until the input is drained, the interval over, or the batch full."""
        # Where commits are slow, by a busy machine or far brokers, agents still get half of the time.
        interval_s = max(self.app.settings.commit_interval_ms / 1000, min(self._commit_took_s, _LONGEST_INTERVAL_S))
        until_s = time.monotonic() + interval_s
        if self._guarantee.claims_first and fetched is not None and fetched.drained:
            await asyncio.sleep(_LEAST_REST_S - self._pipeline.rested_s)
        last_look, holds = False, False
        while fetched is not None:
            if fetched.pin != batch.pin:
                raise PartitionsLost(f"fetched under {fetched.pin}, into a batch of {batch.pin}")
            batch.consumed.update((tp, fetched.positions[tp]) for tp in fetched.messages)
            if self._guarantee.claims_first and fetched.messages:
                self._check_committable(batch, assignment)
                await self._in_thread(self._guarantee.take, batch, self._positions)
            chunk_started_s = time.monotonic()
            self._deliver(batch, fetched)
            await self._settle(batch, assignment, until_s)
            if self._gets_more(batch, assignment):
                self._check_held(batch)
                if not holds and batch.unbegun:
                    self._chunk_events = max(1, self._chunk_events // 2)
                holds = True
                fetched = await self._fetch_for_held(batch, assignment)
                continue
            now_s = time.monotonic()
            took_s = now_s - chunk_started_s
            if not holds:
                self._adapt_chunk(took_s, interval_s)
            if batch.pending or batch.failure or now_s >= until_s or self._is_full(batch):
                return
            if not fetched.drained:
                wait_ms = int((until_s - now_s) * 1000)
            elif self._pipeline.rested_s < _LEAST_REST_S:
                await asyncio.sleep(_GLANCE_S)
                wait_ms = 0
            elif not last_look:
                last_look, wait_ms = True, _LAST_LOOK_MS
            else:
                return
            # No more than fits into the rest of the interval, or it would be taken back.
            fetched = await self._fetch(assignment, wait_ms, min(1.0, (until_s - now_s) / max(took_s, _CLOCK_TICK_S)))
        # The assignment ended, maybe while more was fetched for those that hold events.
        await self._settle(batch, assignment, until_s)

    def _adapt_chunk(self, took_s: float, interval_s: float) -> None:
        """Slow agents get few events at a time, so that little is taken back; quick ones many."""
        if took_s > interval_s:
            self._chunk_events = max(1, self._chunk_events // 2)
        elif took_s < interval_s / 4 and not self._one_chunk:
            self._chunk_events = min(2 * self._chunk_events, _LARGEST_CHUNK_EVENTS)

    def _most_events(self) -> int:
        return min(self._chunk_events, self._batch_max_events)

    @property
    def _batch_max_events(self) -> int:
        settings = self.app.settings
        return settings.at_most_once_batch_max_events if self._guarantee.claims_first else settings.batch_max_events

    def _is_full(self, batch: Batch) -> bool:
        return self._one_chunk or self._guarantee.claims_first or self._is_at_bound(batch)

    def _is_at_bound(self, batch: Batch) -> bool:
        return len(batch.events) >= self._batch_max_events or len(batch.outputs) >= _BATCH_MAX_OUTPUTS

    def _check_held(self, batch: Batch) -> None:
        """Delivery goes on while agents hold events, up to a bound: nothing of the batch commits before they are done."""
        if self._is_at_bound(batch) and not (batch.questions or batch.unbegun):
            raise ImproperlyConfigured(
                f"agents of {self.app.conf.id} hold {batch.held} of {len(batch.events)} events without acknowledging them; "
                "noack() is for agents that acknowledge within so many events (STREAMS_APP_BATCH_MAX_EVENTS)"
            )

    def _deliver(self, batch: Batch, fetched: Fetched) -> None:
        """Put the records, as events of the batch, into the queues of the agents."""
        app = self.app
        for tp, messages in fetched.messages.items():
            batch.messages.setdefault(tp, []).extend(messages)
            wanted = self._without_failed(batch, messages) if self._attempts else messages
            # All of them first: what one agent cannot read, none of them gets.
            routes = [(decode(wanted), put) for decode, put in routes_of(app, tp)]
            undecodable: dict[int, UndecodableError] = {}
            for (_, failures), _ in routes:
                undecodable = failures | undecodable
            for at, error in undecodable.items():
                self._set_aside(batch, wanted[at], error.code, str(error), 1)
            for (decoded, _), put in routes:
                events = [
                    Event(app, key, value, message.headers, message, batch)
                    for message, (key, value) in zip(wanted, decoded, strict=True)
                ]
                if undecodable:
                    events = [event for at, event in enumerate(events) if at not in undecodable]
                batch.add(events)
                put(events)

    def _without_failed(self, batch: Batch, messages: list[Message]) -> list[Message]:
        """Those that may be delivered; what has failed too often is set aside."""
        wanted = []
        for message in messages:
            reason = self._reason_to_set_aside(message.tp, message.offset)
            if reason is None:
                wanted.append(message)
            else:
                self._set_aside(batch, message, *reason)
        return wanted

    def _reason_to_set_aside(self, tp: TP, offset: int) -> tuple[str, str, int] | None:
        attempts = self._attempts[tp, offset]
        if attempts < self.app.settings.max_attempts:
            return None
        return "agent_error", self._last_words[tp, offset], attempts

    def _set_aside(self, batch: Batch, message: Message, code: str, text: str, attempts: int) -> None:
        batch.put_aside(message, dead_letter(self.app.settings.kafka_prefix, message, code, text, attempts))

    async def _settle(self, batch: Batch, assignment: Assignment, until_s: float) -> None:
        """The barrier: wait until all delivered events are done.

        When the interval is over, what no agent has begun is taken back; so it is when the assignment ends, and then what
        they have in hand is not waited for any longer than the revoke's time-out.
        """
        for _ in range(_QUICK_TURNS):
            if batch.is_settled:
                return
            await asyncio.sleep(0)
        # Whether it is settled is asked of the batch each time: an agent may go on between the moment when it was and now.
        over = assignment.over.wait, self._finishing.wait
        while True:
            pause = asyncio.sleep(max(0.0, until_s - time.monotonic()))
            await self._first_of(batch.settled(), *(wait() for wait in over), pause)
            if batch.is_settled or self._is_over(assignment) or batch.begun:
                break
            # The agents are busy with events of an earlier batch: taken back, these would only be delivered again.
            until_s = time.monotonic() + self.app.settings.commit_interval_ms / 1000
        if batch.is_settled or self._gets_more(batch, assignment):
            return
        self._withdraw(batch)
        while not (batch.is_settled or assignment.over.is_set() or self._gets_more(batch, assignment)):
            pause = asyncio.sleep(self.app.settings.commit_interval_ms / 1000)  # it may have changed meanwhile
            await self._first_of(batch.settled(), batch.changed(), assignment.over.wait(), pause)
        if assignment.over.is_set() and not (batch.is_settled or assignment.lost):
            await self._first_of(batch.settled(), asyncio.sleep(self.app.settings.revoke_timeout_ms / 1000))

    def _gets_more(self, batch: Batch, assignment: Assignment) -> bool:
        """Whether agents hold events, and may wait for others, which may be among those to come."""
        return batch.waits_for_more and not self._is_over(assignment)

    def _withdraw(self, batch: Batch) -> None:
        """Take back what no agent has begun."""
        ends = dict(batch.consumed)
        withdrawn = batch.withdraw()
        if withdrawn:
            purge(self.app)
            back = Fetched(batch.pin, withdrawn, {tp: ends[tp] for tp in withdrawn}, drained=False)
            self._withheld = back if self._withheld is None else back.followed_by(self._withheld)

    def _check_committable(self, batch: Batch, assignment: Assignment) -> None:
        if not (batch.pin.is_valid and batch.pin == assignment.pin and not assignment.lost):
            raise PartitionsLost(f"the batch was fetched under {batch.pin}, the assignment is {assignment.pin}")

    async def _finish(self, batch: Batch, assignment: Assignment) -> None:
        """The one place that decides what becomes of a batch."""
        await self._pipeline.ended()
        self._check_committable(batch, assignment)
        if batch.trouble is not None:
            raise batch.trouble
        if batch.failure is not None:
            self._abandon(batch, "agent_error")
            # Halved each time, down to one event: then what is set aside commits, whatever comes behind it.
            self._chunk_events = max(1, min(self._chunk_events, _FIRST_CHUNK_EVENTS) // 2)
            await self._in_thread(self._guarantee.forget)
            await self._rewind()
        elif batch.pending and batch.redelivers:
            raise PartitionsLost(
                f"{batch.pending} of {len(batch.events)} events were not done when the assignment ended"
            )
        else:
            if batch.pending:
                # At most once nobody reads them again; what is behind them was taken back, and somebody will.
                batch.give_up()
                purge(self.app)
            self._send_letters(batch)
            batch.seal()
            if any(overlay.store.expires_ms is not None for overlay in batch.overlays.values()):
                # Before anybody reads through it, or a value might go between two looks of one event.
                await self._in_thread(expire_all, batch)
            self._pipeline.commit(batch)
            # Where an event is looked for that cannot be processed, one thing at a time.
            if not self._guarantee.pipelined or self._attempts or self._one_chunk:
                await self._pipeline.ended()

    async def _commit(self, batch: Batch) -> None:
        started_s = time.monotonic()
        self._commits += 1
        self.committing = self._commits
        try:
            await self._in_thread(self._guarantee.commit, batch)
        except OutputRefused:
            self._blame(batch)
            raise
        except BaseException as error:
            self._drop(batch, named(error))
            raise
        finally:
            self.committing = None
        self._commit_took_s = time.monotonic() - started_s
        self._committed(batch)

    def _send_letters(self, batch: Batch) -> None:
        try:
            for letter in batch.set_aside.values():
                batch.send(letter)
        except DeadBatchError as error:
            raise batch.trouble or error from error

    def _committed(self, batch: Batch) -> None:
        for (topic, partition), offset in batch.consumed.items():
            self._positions[TP(topic, partition)] = offset
        if self._attempts:
            # Those of partitions that are gone go too: their next owner counts anew.
            for at in [at for at in self._attempts if at[1] < self._positions.get(at[0], at[1] + 1)]:
                del self._attempts[at]
                self._last_words.pop(at, None)
        for tp in [tp for tp, offset in self._alone.items() if offset < self._positions.get(tp, offset + 1)]:
            del self._alone[tp]
        self._retry_s = _RETRY_S
        self._one_chunk = any(self._positions.get(tp, end) < end for tp, end in self._refused_below.items())
        self.figures.committed(batch, self._commit_took_s)
        if batch.set_aside:
            self._tell_letters(batch)
        for callback in batch.callbacks:
            # By the loop: what a callback raises is logged, and is no reason to doubt the commit.
            asyncio.get_running_loop().call_soon(callback)
        batch.release()

    def _tell_letters(self, batch: Batch) -> None:
        """The first few; all of them are on the topic of dead letters."""
        for (tp, offset), letter in islice(batch.set_aside.items(), _LETTERS_TOLD):
            why = dict(letter.headers or ())
            place = {"topic": tp.topic, "partition": tp.partition, "offset": offset, "id": id_of(letter.value)}
            self.log.warning(
                "set aside: %s-%d@%d: %s: %s",
                *(tp.topic, tp.partition, offset),
                *(why["dlq.error"].decode(), why["dlq.message"].decode()),
                extra={"data": place},
            )
        if len(batch.set_aside) > _LETTERS_TOLD:
            self.log.warning("set aside: %d in all, with these", len(batch.set_aside))

    def _drop(self, batch: Batch, reason: str) -> None:
        """Nothing of the batch may go on: not its writes, not what it was about to send."""
        if not batch.dead:
            self.figures.drop(reason)
            batch.drop()

    def _abandon(self, batch: Batch, reason: str) -> None:
        """Drop a batch that was being filled, with its events on their way to agents."""
        self._drop(batch, reason)
        self._withheld = None
        purge(self.app)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run in the engine's thread; once begun it is waited for, even if we are cancelled: it may be a commit."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args))
        return await asyncio.shield(future)

    async def _first_of(self, *awaitables: Any) -> None:
        futures = [asyncio.ensure_future(each) for each in awaitables]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in futures:
                if not future.done():
                    future.cancel()
