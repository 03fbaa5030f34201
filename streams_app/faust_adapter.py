"""Where we touch what Faust and aiokafka keep private. The only such module; tests/test_adapter.py pins each name.

Faust keeps agents, streams, channels, the assignor, the group membership and the web server. What lies between a fetched
record and its commit is taken from it here, through its own seams: a `Transport` with `Consumer`, `Producer` and conductor,
a `TableManager`, and a `Stream` that acknowledges an event after the agent is through with it, not in a ``finally``.

The consumer runs in a thread with an event loop of its own (heartbeats go on while agents work). Its rebalance listener
decides nothing: it tells the engine that an assignment has ended or begun, and waits a bounded time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from functools import partial
from http import HTTPStatus
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

import aiohttp
import aiokafka
import faust
import msgspec
from aiohttp.web import AppRunner
from aiokafka import errors as kafka_errors
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.group import LeaveGroupRequest
from confluent_kafka import KafkaError as KafkaErrorCode
from confluent_kafka import KafkaException
from confluent_kafka import Producer as ConfluentProducer
from faust.agents import Agent as FaustAgent
from faust.agents.replies import BarrierState
from faust.agents.replies import ReplyConsumer as FaustReplyConsumer
from faust.app.router import Router as FaustRouter
from faust.assignor.partition_assignor import PartitionAssignor
from faust.exceptions import ConsumerNotStarted, ImproperlyConfigured, SameNode, Skip
from faust.models import maybe_model
from faust.streams import _current_event, maybe_forward
from faust.tables.manager import TableManager as FaustTableManager
from faust.transport.conductor import Conductor as FaustConductor
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, FieldDescriptorT, Message
from faust.types.windows import WindowRange
from faust.web import drivers as web_drivers
from faust.web.drivers.aiohttp import Web as FaustWeb
from faust.web.exceptions import WebError
from faust.web.views import View
from mode.services import Service
from mode.supervisors import OneForOneSupervisor
from mode.threads import QueueServiceThread
from mode.utils.futures import maybe_async
from mode.utils.objects import cached_property

from streams_app.codecs import UndecodableError
from streams_app.errors import NotHere, PartitionsLost, StoreFailed, TransactionAborted
from streams_app.events import Event, in_hand
from streams_app.logs import about
from streams_app.partitioning import partition_of
from streams_app.session import Pin
from streams_app.web import problem_of

if TYPE_CHECKING:
    from streams_app.application import App

log = logging.getLogger(__name__)
T = TypeVar("T")
#: Pairs of ``(key, window range)`` and value.
Rows: TypeAlias = Iterable[tuple[tuple[Any, WindowRange], Any]]

_METADATA_MAX_AGE_MS = 15_000
#: A member learns of a rebalance by its next heartbeat: that long, partitions of one that left lie still.
_HEARTBEAT_MS = 300
#: aiokafka has one fetch at a time under way to a broker: one that waits for partitions without new records holds up those
#: that have some. Measured with 500 ms: now and then an event took half a second.
_FETCH_MAX_WAIT_MS = 50
#: So many seconds in a row the group's coordination may fail, in ways that may pass, before the worker gives up.
_COORDINATION_PATIENCE_S = 30
#: Events that an agent may take in a row before the loop's other tasks get a turn.
_EVENTS_A_TURN = 64
#: Held events between two looks for those that were acknowledged.
_PRUNED_EVERY = 128
#: At most 50 restarts of an agent a second.
_RESTART_PAUSE_S = 0.02

_COMMIT_TIMEOUT_S = 5.0
#: A broker that has not heard by then is down, or frozen. Nobody waits longer for a worker that ends.
_LEAVE_WITHIN_S = 5.0
#: So often a producer that sends nothing is asked for its log.
_HEARD_EVERY_S = 5.0
#: That long a worker that ends waits for requests in hand, and once more when it has cancelled them. With aiohttp's 60 s, one
#: client that sends or reads slowly would have the watchdog end the process.
_REQUESTS_END_WITHIN_S = 2.0
#: The broker says: your membership is not the current one; nothing was committed.
_GROUP_MOVED_ON = frozenset(
    error.errno
    for error in (
        kafka_errors.IllegalGenerationError,
        kafka_errors.UnknownMemberIdError,
        kafka_errors.RebalanceInProgressError,
    )
)
#: The broker says: not here, or not now. As a rule nothing was committed; whoever goes on asks for the offsets, and claims.
_NOT_COORDINATED = frozenset(
    error.errno
    for error in (
        kafka_errors.GroupLoadInProgressError,
        kafka_errors.GroupCoordinatorNotAvailableError,
        kafka_errors.NotCoordinatorForGroupError,
    )
)


class Fetched(NamedTuple):
    """Records and the membership they were fetched under, taken in one step of the consumer's thread."""

    pin: Pin
    messages: dict[TP, list[Message]]
    #: Next offset to read, behind transaction markers too.
    positions: dict[TP, int]
    #: Nothing more to read at the moment.
    drained: bool

    def split(self, most: int) -> tuple[Fetched, Fetched | None]:
        """The first ``most`` records, and the others."""
        first, rest, positions = {}, {}, dict(self.positions)
        for tp, messages in self.messages.items():
            if most:
                first[tp] = messages[:most]
            if len(messages) > most:
                rest[tp] = messages[most:]
                positions[tp] = rest[tp][0].offset
            most = max(0, most - len(messages))
        return self._replace(messages=first, positions=positions), self._replace(messages=rest) if rest else None

    def followed_by(self, others: Fetched) -> Fetched:
        """These records and, partition by partition behind them, the others."""
        messages = {
            tp: [*self.messages.get(tp, ()), *others.messages.get(tp, ())] for tp in self.messages | others.messages
        }
        return self._replace(messages=messages, positions=self.positions | others.positions)


class Read(NamedTuple):
    """How far a partition was read, and could be, as of the last fetch."""

    position: int
    #: None: nothing was fetched so far.
    high_watermark: int | None
    #: Up to the first open transaction.
    last_stable: int | None


class Assignment:
    """Partitions and the membership under which they are ours."""

    def __init__(self, pin: Pin, partitions: frozenset[TP], standbys: frozenset[TP] = frozenset()) -> None:
        self.pin = pin
        self.partitions = partitions
        #: Changelogs of tables that others write, and that we may have to take over.
        self.standbys = standbys
        #: Ours to give back: what is in hand may still be committed.
        self.revoked = False
        #: Gone already: what is in hand is somebody else's to do again.
        self.lost = False
        self.over = asyncio.Event()

    def end(self, *, lost: bool) -> None:
        """The assignment is over."""
        self.revoked = True
        self.lost = self.lost or lost
        self.over.set()


class _Listener(ConsumerRebalanceListener):
    """Runs in the consumer's thread. aiokafka logs and swallows what a listener raises, so nothing here may pass unseen."""

    def __init__(self, thread: ConsumerThread) -> None:
        self._thread = thread

    async def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        await self._thread.guarded(self._revoked())

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        await self._thread.guarded(self._assigned(assigned))

    async def _revoked(self) -> None:
        thread = self._thread
        lost = not thread.live_pin().is_valid
        await thread.call_main(thread.app.engine.on_revoked(lost=lost))

    async def _assigned(self, assigned: Iterable[Any]) -> None:
        thread = self._thread
        # Nothing may be fetched before the engine has restored tables and set positions.
        thread.kafka.pause(*assigned)
        app = thread.app
        standbys = frozenset(tp for tp in app.assignor.assigned_standbys() if tp.topic in app.tables.changelog_topics)
        partitions = frozenset(TP(tp.topic, tp.partition) for tp in assigned) - standbys
        pin = thread.live_pin()
        app.slot.member_id = pin.member_id
        await thread.call_main(thread.on_assigned(Assignment(pin, partitions, standbys)))


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """aiokafka's consumer in its thread."""

    app: App
    #: When the last request was sent that the group's coordinator has answered as a member's, by the monotonic clock.
    heard_s = float("-inf")

    @property
    def kafka(self) -> aiokafka.AIOKafkaConsumer:
        """The consumer itself, to be used in this thread only."""
        return self._ensure_consumer()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.app = cast("App", self.consumer.app)
        self._rebalance_listener = _Listener(self)

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        conf, settings = self.app.conf, self.app.settings
        worker = "" if self.app.client_only else f"-{self.app.slot.name}"
        if conf.consumer_group_instance_id:
            raise ImproperlyConfigured(
                "consumer_group_instance_id (static membership) is not supported: a member that comes back under the same "
                "name and generation could not be told from its zombie"
            )
        return aiokafka.AIOKafkaConsumer(
            **self.app.kafka.aiokafka(),
            # It begins the member's id, which stands in the metadata of offsets, between spaces; and it tells whoever looks
            # at the group which worker has what.
            client_id=f"{conf.broker_client_id}{worker}".replace(" ", "-"),
            group_id=conf.id,
            partition_assignment_strategy=[self.app.assignor],
            enable_auto_commit=False,
            # We set every position ourselves. An offset out of range is an error, not a reason to start over.
            auto_offset_reset="none",
            isolation_level="read_committed",
            # aiokafka would leave the group of a worker that has not fetched for that long, and come back only when it
            # fetches again: one without partitions, or with a long restore, never does. A worker that hangs is not aiokafka's
            # to find out.
            max_poll_interval_ms=2**31 - 1,
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            fetch_max_wait_ms=_FETCH_MAX_WAIT_MS,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=settings.session_timeout_ms,
            rebalance_timeout_ms=settings.session_timeout_ms * 3,
            heartbeat_interval_ms=min(_HEARTBEAT_MS, settings.session_timeout_ms // 3),
            metadata_max_age_ms=_METADATA_MAX_AGE_MS,
        )

    def _create_client_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        """Of an app that only asks and sends: it reads the answers."""
        conf = self.app.conf
        return aiokafka.AIOKafkaConsumer(
            **self.app.kafka.aiokafka(),
            client_id=conf.broker_client_id,
            enable_auto_commit=True,
            auto_offset_reset=conf.consumer_auto_offset_reset,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
        )

    async def on_start(self) -> None:
        await super().on_start()
        if self.app.client_only:
            return
        self._note_heartbeats()
        prepare_fetcher(self.kafka)
        if self.app.slot.member_id:
            await self._leave_for(self.app.slot.member_id)

    def _note_heartbeats(self) -> None:
        coordinator = self.kafka._coordinator
        beat = coordinator._do_heartbeat

        async def noted() -> bool:
            sent_s = time.monotonic()
            is_member = await beat()
            if is_member:
                self.heard_s = sent_s
            return bool(is_member)

        coordinator._do_heartbeat = noted

    async def on_thread_stop(self) -> None:
        await QueueServiceThread.on_thread_stop(self)
        has_left = self._consumer is None or await end_consumer(self._consumer)
        if has_left and not self.app.client_only:
            try:
                self.app.slot.member_id = None
            except StoreFailed as error:
                # Whoever comes next leaves the group for a member that is gone, which changes nothing.
                log.warning("that this worker has left its group could not be noted: %s", error)

    async def _leave_for(self, member_id: str) -> None:
        """Leave the group for this slot's dead predecessor: without that, everybody waits for its session to end."""
        coordinator = self.kafka._coordinator
        try:
            await asyncio.wait_for(coordinator.ensure_coordinator_known(), _COMMIT_TIMEOUT_S)
            await asyncio.wait_for(
                coordinator._send_req(LeaveGroupRequest(self.app.conf.id, member_id)), _COMMIT_TIMEOUT_S
            )
        except (KafkaError, TimeoutError) as error:
            log.warning("could not leave the group for %s, its session will time out: %s", member_id, error)

    @Service.task
    async def _watch_coordination(self) -> None:
        """aiokafka stops coordinating after an error until somebody asks for it, which only a fetch does.

        Between two assignments nobody fetches: the worker would never rejoin, and say nothing. Nor does it say anything when
        its fetcher ends.
        """
        about(guarantee=self.app.guarantee)
        failures = 0
        while not self.should_stop:
            await asyncio.sleep(1)
            try:
                if self._consumer is not None:
                    self.kafka._coordinator.check_errors()
                    revive_fetcher(self.kafka)
                failures = 0
            except KafkaError as error:
                failures += 1
                log.warning("aiokafka's consumer failed: %r", error)
                if failures > _COORDINATION_PATIENCE_S:
                    asyncio.run_coroutine_threadsafe(self.app.crash(error), self.parent_loop)
                    return

    def live_pin(self) -> Pin:
        """The membership as it is now."""
        coordinator = self.kafka._coordinator
        return Pin(self.app.conf.id, coordinator.generation, coordinator.member_id)

    def reads(self) -> dict[TP, Read]:
        """Of each partition that has a position; only looks, so any thread may ask."""
        subscription = self._consumer._subscription.subscription if self._consumer is not None else None
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None:
            return {}
        states = {TP(*tp): assignment.state_value(tp) for tp in assignment.tps}
        return {
            tp: Read(at.position, at.highwater, at.lso)
            for tp, at in states.items()
            if at is not None and at.has_valid_position
        }

    async def fetch(self, partitions: list[TP], wait_ms: int, max_records: int) -> Fetched:
        """Wait at most ``wait_ms`` for records.

        Raises:
            PartitionsLost: the partitions are about to be given out anew.
        """
        kafka_tps = [aiokafka.TopicPartition(*tp) for tp in partitions]
        records = await self.kafka.getmany(*kafka_tps, timeout_ms=wait_ms, max_records=max_records)
        # No await from here on: records, pin and positions belong together.
        # aiokafka empties the partition that it fetched first, then the next. With a backlog, and a rebalance every now and
        # then, the others would never have their turn (measured: one lay still for five minutes).
        waiting = self.kafka._fetcher._records
        for kafka_tp in records:
            if kafka_tp in waiting:
                waiting.move_to_end(kafka_tp)
        state = self._state_of_partitions()
        positions, drained = {}, True
        for tp, kafka_tp in zip(partitions, kafka_tps, strict=True):
            at = state(kafka_tp)
            if at is None or not at.has_valid_position:
                continue
            positions[tp] = at.position
            drained = drained and at.position >= (at.lso or 0)
        pin = self.live_pin()
        return Fetched(pin, {TP(*kafka_tp): each for kafka_tp, each in records.items()}, positions, drained)

    def _state_of_partitions(self) -> Callable[[aiokafka.TopicPartition], Any]:
        subscription = self.kafka._subscription.subscription
        if subscription is None or subscription.assignment is None:
            # Topics were added: aiokafka has put another subscription in place, and tells of it later.
            raise PartitionsLost("the subscription has changed, partitions are about to be given out anew")
        return cast("Callable[[aiokafka.TopicPartition], Any]", subscription.assignment.state_value)

    async def seek_all(self, positions: Mapping[TP, int]) -> None:
        """Set positions and let them flow; what was fetched ahead is forgotten.

        Raises:
            PartitionsLost: as `fetch`.
        """
        self._state_of_partitions()
        for tp, offset in positions.items():
            kafka_tp = aiokafka.TopicPartition(*tp)
            self.kafka.seek(kafka_tp, offset)
            self.kafka.resume(kafka_tp)

    async def commit_once(self, pin: Pin, commits: Mapping[TP, tuple[int, str]]) -> None:
        """Commit offsets with their metadata, under ``pin``, by one request that nobody sends again.

        aiokafka's own commit tries again, with whatever membership it has by then: an offset that somebody else has moved
        on meanwhile would be put back.

        Raises:
            PartitionsLost: the group has moved on; or nobody knows whether the request arrived, and then the membership was
                given up, so that it cannot take effect any later.
            TransactionAborted: the coordinator is not there; the committed offsets tell what took effect.
        """
        if not pin.is_valid or pin != self.live_pin():
            raise PartitionsLost(f"the membership is {self.live_pin()}, not {pin} any more")
        by_topic: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for (topic, partition), (offset, metadata) in commits.items():
            by_topic[topic].append((partition, offset, metadata))
        coordinator = self.kafka._coordinator
        if coordinator.coordinator_id is None:
            raise TransactionAborted("the coordinator of the group is not known at the moment")
        request = OffsetCommitRequest(
            pin.group_id, pin.generation, pin.member_id, OffsetCommitRequest.DEFAULT_RETENTION_TIME, [*by_topic.items()]
        )
        sent_s = time.monotonic()
        try:
            response = await asyncio.wait_for(coordinator._send_req(request), _COMMIT_TIMEOUT_S)
        except (KafkaError, TimeoutError) as error:
            await self._give_up_membership(pin, repr(error))
        codes = {code for _, partitions in response.topics for _, code in partitions} - {0}
        if codes & _GROUP_MOVED_ON:
            raise PartitionsLost(f"the brokers say {_names(codes)}: the group has moved on since {pin}")
        if codes and codes <= _NOT_COORDINATED:
            coordinator.coordinator_dead()
            raise TransactionAborted(f"offsets could not be committed: {_names(codes)}")
        if codes:
            await self._give_up_membership(pin, _names(codes))
        self.heard_s = sent_s

    async def _give_up_membership(self, pin: Pin, why: str) -> NoReturn:
        """Leave the group and join it as somebody else: a commit of ``pin`` that is still on its way is refused then."""
        if self.live_pin() == pin:
            self.kafka._coordinator.reset_generation()
            await self._leave_for(pin.member_id)
        raise PartitionsLost(f"nobody knows whether offsets were committed ({why}); joining the group anew")

    async def on_assigned(self, assignment: Assignment) -> None:
        """In the main thread: tell Faust's parts, then the engine."""
        app = self.app
        app.consumer_generation_id = assignment.pin.generation
        app.partition_counts.clear()
        partitions = set(assignment.partitions)
        revoked, newly_assigned = app._update_assignment(partitions)
        await app.agents.on_rebalance(revoked, newly_assigned)
        await app.topics.on_partitions_assigned(partitions)
        app.on_rebalance_return()
        app.engine.on_assigned(assignment)

    async def call_main(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the main thread."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.parent_loop))

    async def call_here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in this thread, called from the main thread."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.thread_loop))

    async def guarded(self, awaitable: Awaitable[None]) -> None:
        """What a listener raises ends the worker, where aiokafka would go on without it."""
        try:
            await awaitable
        except Exception as error:
            asyncio.run_coroutine_threadsafe(self.app.crash(error), self.parent_loop)
            raise

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's watch over its own path of events, which is not ours."""


async def end_consumer(consumer: aiokafka.AIOKafkaConsumer) -> bool:
    """Stop a consumer of aiokafka's; gives whether the brokers have heard that it left its group.

    It cancels its tasks and waits for them: one that had no turn yet, or that waits for a broker that is down, ends its
    ``stop()`` half-way with a ``CancelledError``, though nobody cancels *us*. mode takes that for the end of a thread and
    does not tell who waits for it: a worker that was asked to end did so a minute later.
    """
    try:
        await asyncio.wait_for(consumer.stop(), _LEAVE_WITHIN_S)
    except TimeoutError:
        log.warning("no broker answers: the group learns only by the end of the session that this worker has left")
    except KafkaError as error:
        log.warning("aiokafka's consumer has ended before it was stopped: %r", error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
    else:
        return True
    await consumer._client.close()
    return False


def prepare_fetcher(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Let a consumer that was just started keep records of our kind, and outlive an error that comes twice.

    aiokafka asserts that a partition without a position is told once. While the group's coordinator is slow to say that it
    has none, and the partition's leader moves, it asks for it twice; the assertion would end the fetcher.
    """
    fetcher = consumer._fetcher
    records, set_error = _Records(), fetcher._set_error

    def set_first_error(kafka_tp: Any, error: Exception) -> None:
        if kafka_tp not in records:
            set_error(kafka_tp, error)

    fetcher._records, fetcher._set_error = records, set_first_error


def revive_fetcher(consumer: aiokafka.AIOKafkaConsumer) -> None:
    """Begin a fetcher anew that an error has ended: heartbeats go on without it, and nobody would read a record any more.

    Raises:
        KafkaError: it had ended; from what had ended it.
    """
    fetcher = consumer._fetcher
    if fetcher._closed or not fetcher._fetch_task.done():
        return
    error = None if fetcher._fetch_task.cancelled() else fetcher._fetch_task.exception()
    ended_by = (error and error.__cause__) or error or asyncio.CancelledError()
    fetcher._pending_tasks = {task for task in fetcher._pending_tasks if not task.done()}
    fetcher._fetch_task = asyncio.ensure_future(fetcher._fetch_requests_routine())
    raise KafkaError(f"the fetcher had ended, and is begun anew: {ended_by!r}") from ended_by


class Record(msgspec.Struct, gc=False, eq=False):
    """What `faust.types.Message` says of a record that was fetched. Made of each, and so of as little as may be."""

    tp: TP
    offset: int
    timestamp_ms: int
    timestamp_type: int
    headers: Sequence[tuple[str, bytes]]
    key: bytes | None
    value: bytes | None
    #: What Faust's sensors note.
    time_in: float | None = None
    time_out: float | None = None
    time_total: float | None = None
    span: Any = None

    #: Of Faust's own way to acknowledge, which is not ours.
    acked: ClassVar[bool] = False
    tracked: ClassVar[bool] = False
    refcount: ClassVar[int] = 0
    checksum: ClassVar[None] = None
    generation_id: ClassVar[None] = None

    def __repr__(self) -> str:
        # As Faust's: what is in it is nobody's business who reads a log.
        return f"<{type(self).__name__}: {self.tp} offset={self.offset}>"

    @property
    def topic(self) -> str:
        """Where it comes from."""
        return self.tp.topic

    @property
    def partition(self) -> int:
        """Where it comes from."""
        return self.tp.partition

    @property
    def timestamp(self) -> float:
        """In seconds since 1970."""
        return self.timestamp_ms / 1000

    @property
    def serialized_key_size(self) -> int:
        """Bytes of the key."""
        return len(self.key or b"")

    @property
    def serialized_value_size(self) -> int:
        """Bytes of the value."""
        return len(self.value or b"")


class _Records(OrderedDict[Any, Any]):
    """What aiokafka's fetcher has of each partition. Its own kind of record would be made first, and thrown away."""

    def __setitem__(self, kafka_tp: Any, result: Any) -> None:
        if isinstance(result, FetchResult):
            tp = TP(*kafka_tp)
            result._partition_records._consumer_record = lambda _, raw: Record(
                tp, raw.offset, raw.timestamp, raw.timestamp_type, raw.headers, raw.key, raw.value
            )
        super().__setitem__(kafka_tp, result)


def _names(codes: Iterable[int]) -> str:
    return ", ".join(for_code(code).__name__ for code in sorted(codes))


class Consumer(driver.Consumer):
    """Faust's consumer, of which the engine uses thread and membership."""

    app: App
    _thread: ConsumerThread

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def on_init_dependencies(self) -> list[Any]:
        return []

    def topic_partitions(self, topic: str) -> int | None:
        """Number of partitions of a topic, once it is known; Faust's answer is that of the group's leader only."""
        try:
            partitions = self._thread.kafka.partitions_for_topic(topic)
        except ConsumerNotStarted:
            # The web server, which asks for its views, is there before the consumer.
            return None
        return len(partitions) if partitions else None

    def reads(self) -> dict[TP, Read]:
        """See `ConsumerThread.reads`."""
        return self._thread.reads()

    async def fetch(self, partitions: list[TP], wait_ms: int, max_records: int) -> Fetched:
        """See `ConsumerThread.fetch`."""
        return await self._thread.call_here(self._thread.fetch(partitions, wait_ms, max_records))

    def commit_once(self, pin: Pin, commits: Mapping[TP, tuple[int, str]]) -> None:
        """See `ConsumerThread.commit_once`; blocks, so it is for the engine's thread."""
        committing = self._thread.commit_once(pin, commits)
        try:
            committed = asyncio.run_coroutine_threadsafe(committing, self._thread.thread_loop)
        except RuntimeError as error:
            committing.close()
            raise PartitionsLost(f"the consumer's thread has ended: {error!r}") from error
        try:
            committed.result(4 * _COMMIT_TIMEOUT_S)
        except (CancelledError, TimeoutError) as error:
            committed.cancel()
            raise PartitionsLost(f"the consumer's thread is ending: {error!r}") from error

    def is_member(self) -> bool:
        """Whether nobody else can have our partitions: the session that the coordinator has last heard of goes on.

        A process that was frozen, and wakes, gets here before it hears that it was declared dead.
        """
        return time.monotonic() - self._thread.heard_s < self.app.settings.session_timeout_ms / 1000

    async def seek_all(self, positions: Mapping[TP, int]) -> None:
        """See `ConsumerThread.seek_all`."""
        await self._thread.call_here(self._thread.seek_all(positions))

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """The engine commits, nobody else."""
        return False

    async def on_stop(self) -> None:
        cast(driver.Transport, self.transport)._topic_waiters.clear()

    async def verify_all_partitions_active(self) -> None:
        """Faust's watch over its own path of events, which is not ours."""


class Producer(faust.transport.base.Producer):
    """For what is sent from outside of agents (a timer, a web request): idempotent, acknowledged by all replicas.

    Never a part of somebody else's transaction.
    """

    app: App
    _kafka: ConfluentProducer | None = None
    _sent: asyncio.Event

    async def on_start(self) -> None:
        await super().on_start()
        self._ensure()

    def _ensure(self) -> ConfluentProducer:
        if self._kafka is None:
            self._sent = asyncio.Event()
            self._kafka = ConfluentProducer(
                {
                    **self.app.kafka.librdkafka(),
                    "enable.idempotence": True,
                    "acks": "all",
                    "partitioner": "murmur2_random",
                    "linger.ms": 1,
                }
            )
            self.add_future(self._poll(self._kafka, self._sent))
        return self._kafka

    async def _poll(self, kafka: ConfluentProducer, sent: asyncio.Event) -> None:
        """Hear what became of what was sent; where nothing is sent, which is most of the time, next to nothing is done."""
        while not self.should_stop and kafka is self._kafka:
            with suppress(TimeoutError):
                await asyncio.wait_for(sent.wait(), _HEARD_EVERY_S)
            sent.clear()
            kafka.poll(0)
            while len(kafka) and not self.should_stop:
                kafka.poll(0)
                await asyncio.sleep(0.005)

    async def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        partition: int | None,
        timestamp: float | None,
        headers: Any,
        *,
        transactional_id: str | None = None,
    ) -> Awaitable[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def tell(error: Any, partition: int, offset: int) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(KafkaException(error))
                return
            future.set_result(record_metadata(topic, partition, offset, timestamp))

        def on_delivery(error: Any, message: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(tell, error, message.partition(), message.offset())

        record = partial(
            ConfluentProducer.produce,
            topic=topic,
            value=value,
            key=key,
            partition=-1 if partition is None else partition,
            on_delivery=on_delivery,
            timestamp=int(timestamp * 1000) if timestamp else 0,
            headers=list(headers.items()) if isinstance(headers, dict) else headers,
        )
        self._produce(record)
        if self.should_stop:
            # Nobody polls any more: this is a web request in hand, while the worker ends.
            self.add_future(self.flush())
        return future

    def _produce(self, record: Callable[[ConfluentProducer], None]) -> None:
        try:
            record(self._ensure())
        except KafkaException as error:
            if error.args[0].code() != KafkaErrorCode._FATAL:
                raise
            # As when a leader has lost what it had acknowledged. This producer sends nothing any more; the next one does.
            log.warning("sends from outside of agents go on by a new producer, after: %s", error)
            self._kafka = None
            self._sent.set()
            record(self._ensure())
        self._sent.set()

    async def send_and_wait(self, *args: Any, **kwargs: Any) -> Any:
        return await (await self.send(*args, **kwargs))

    async def flush(self) -> None:
        if self._kafka is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._kafka.flush, 10.0)

    async def on_stop(self) -> None:
        await self.flush()

    async def create_topic(self, topic: str, partitions: int, replication: int, **options: Any) -> None:
        config = {name: str(value) for name, value in (options.get("config") or {}).items()}
        if options.get("compacting"):
            config["cleanup.policy"] = "compact,delete" if options.get("deleting") else "compact"
        await asyncio.to_thread(self.app.create_topic, topic, partitions, replication, config)

    def key_partition(self, topic: str, key: bytes) -> TP:
        count = self.app.partitions_of(topic)
        return TP(topic, partition_of(key, count or self.app.conf.topic_partitions))

    def supports_headers(self) -> bool:
        return True


class Conductor(FaustConductor):
    """Subscribes to topics that come to be read while the worker runs, as that of answers does at the first question.

    Faust's waits 45 s before it does, in which whoever asks waits, too; and forgets what came up during a rebalance.
    """

    _resubscribe_sleep_lock_seconds = 1.0

    def look_again(self) -> None:
        """A rebalance is over: subscribe to what has come up meanwhile."""
        if any(map(self._topic_contain_unsubscribed_topics, self._topics)):
            self._flag_changes()


class Transport(driver.Transport):
    """Faust's seam for all of the above."""

    Consumer = Consumer
    Producer = Producer
    Conductor = Conductor


class Assignor(PartitionAssignor):
    """Faust's assignor, sure to keep partition n of all topics of one size together.

    Faust groups topics by ``tuple`` of a set of members. Two equal sets may iterate in different orders; then an input
    partition and the table it writes could go to different workers.
    """

    @classmethod
    def _group_co_subscribed(cls, topics: set[str], subscriptions: Mapping[str, Iterable[str]]) -> Iterable[set[str]]:
        groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for topic in sorted(topics):
            groups[tuple(sorted(member for member, names in subscriptions.items() if topic in names))].add(topic)
        return groups.values()


class TableManager(FaustTableManager):
    """Registers the changelogs with the group; restoring them is the engine's."""

    app: App

    async def on_start(self) -> None:
        await self._update_channels()
        await self.add_runtime_dependency(self.app.engine)

    async def on_stop(self) -> None:
        for table in self.values():
            await table.stop()

    async def wait_until_recovery_completed(self) -> bool:
        """Wait until the first assignment has started; True: stopped before."""
        return bool(await self.wait_for_stopped(self.app.engine.ready.wait()))


class Supervisor(OneForOneSupervisor):
    """Starts agents again that raised, at once.

    Mode's own misses a crash that comes while it is still busy with the one before, or that comes before the agent's
    replacement counts as started, and looks again 5 s later.
    """

    async def restart_service(self, service: Any) -> None:
        # Mode's limit of restarts holds one, not the hundred it is given: two actors that fail together would end the
        # worker. With a pause before each the limit is never met.
        await asyncio.sleep(_RESTART_PAUSE_S)
        await super().restart_service(service)

    async def start_service(self, service: Any) -> None:
        await super().start_service(service)
        if service.crashed:
            self.loop.call_later(_RESTART_PAUSE_S, self.wakeup)

    def wakeup(self) -> None:
        if self._please_wakeup is None and not self.should_stop:
            self.loop.call_later(_RESTART_PAUSE_S, self.wakeup)
        else:
            super().wakeup()


_NO_MORE: Any = object()
#: Header of a question, by which its event is known when it is delivered again, and again asks. A line for each that waits
#: for the answer, as who was asked may ask somebody else.
_ASKED_BY = "streams-app-asked-by"
_MOST_ASKERS = 8


def askers_of(event: Event) -> Iterator[tuple[str, TP, int]]:
    """Of the events whose agents wait for the answer to this one, app, partition and offset."""
    header: Any = event.headers.get(_ASKED_BY)
    for line in (header if isinstance(header, bytes) else b"").decode(errors="replace").splitlines():
        try:
            app_id, topic, partition, offset = line.split(" ")
            yield app_id, TP(topic, int(partition)), int(offset)
        except ValueError:  # whoever sent it is none of ours
            return


class Agent(FaustAgent):
    """An agent that takes its end, and a cancellation of its own making, for what they are: failures.

    Whoever asks it and awaits the answer with an event in hand is refused where outputs wait for the commit, which waits for
    the event. Elsewhere delivery goes on meanwhile, as the question has to get here.
    """

    async def ask(self, *args: Any, **kwargs: Any) -> Any:
        """As Faust's."""
        return await self._answered(super().ask, *args, **kwargs)

    async def ask_nowait(self, *args: Any, headers: Any = None, **kwargs: Any) -> Any:
        """As Faust's; the question says by which event it was asked."""
        event = in_hand.get()
        # Who asks and goes on without the answer is done without it.
        if event is not None and event.batch is not None and event.holds:
            message = event.message
            askers = [*askers_of(event), (event.app.conf.id, message.tp, message.offset)][-_MOST_ASKERS:]
            lines = "\n".join(f"{app_id} {tp.topic} {tp.partition} {offset}" for app_id, tp, offset in askers)
            given = headers.items() if isinstance(headers, Mapping) else headers or ()
            headers = [*given, (_ASKED_BY, lines.encode())]
        return await super().ask_nowait(*args, headers=headers, **kwargs)

    async def kvjoin(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As Faust's; `join` comes here, too."""
        return cast("list[Any]", await self._answered(super().kvjoin, *args, **kwargs))

    async def kvmap(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        """As Faust's; `map` comes here, too."""
        answers = super().kvmap(*args, **kwargs)
        while (answer := await self._answered(anext, answers, _NO_MORE)) is not _NO_MORE:
            yield answer

    async def _answered(self, ask: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        event = in_hand.get()
        if event is None or event.batch is None:
            return await ask(*args, **kwargs)
        if not event.batch.sends_at_once:
            raise ImproperlyConfigured(
                f"{self.name} was asked from inside of an event under exactly_once: the question leaves with the commit, "
                "and the commit waits for the event. Use cast() or send(), or ask from a timer, or under at_least_once"
            )
        answers = self._get_strtopic(kwargs.get("reply_to") or self.app.conf.reply_to)
        prefix = cast("App", self.app).settings.kafka_prefix
        topics = {*getattr(self.channel, "topics", ()), prefix + answers}
        timeout_s = cast("App", self.app).settings.answer_timeout_ms / 1000
        return await event.batch.answered(event, topics, partial(ask, *args, **kwargs), timeout_s)

    async def slurp(self, stream: Any, results: AsyncIterator[Any]) -> None:
        """Answer with what an actor over ``stream`` yields, and give it to the sinks."""
        await self._slurp(cast(Any, SimpleNamespace(stream=stream)), results)

    async def _reply(self, key: Any, value: Any, reply_to: str, correlation_id: str) -> None:
        # Faust's codecs know no structs: whoever asked gets what JSON has of them.
        answer = msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
        await super()._reply(key, answer, reply_to, correlation_id)

    async def _execute_actor(self, coro: Awaitable[None], aref: Any) -> None:
        await super()._execute_actor(self._endless(coro, aref), aref)

    async def _replace_actor(self, service: Any, index: int) -> Any:
        """Start again what raised, over a new stream that reads on from the old one's channel.

        Faust's gives it the old stream, with the processors that it has added: it adds them once more, and each event is
        echoed twice. And what it had made of the stream, by ``group_by`` or ``through``, it would not find again.
        """
        channel = await service.stream.hand_over()
        actor = await self._start_one(index=index, active_partitions=service.active_partitions, channel=channel)
        cast(Stream, actor.stream).inherit(service.stream)
        for tp in [tp for tp, each in self._actor_by_partition.items() if each is service]:
            self._actor_by_partition[tp] = actor
        return actor

    async def on_isolated_partitions_revoked(self, revoked: set[TP]) -> None:
        """Stop their actors, whose channels get no events from here on.

        Faust's forgets a channel when its iteration ends, and so that of an agent that raised: at the next rebalance nobody
        would read its partition, while one that was cancelled would still be given what it must not have.
        """
        actors = [self._actor_by_partition.get(tp) for tp in revoked]
        await super().on_isolated_partitions_revoked(revoked)
        for actor in filter(None, actors):
            cast(Any, self.app.topics)._topics.discard(actor.stream.channel)

    async def _endless(self, coro: Awaitable[None], aref: Any) -> None:
        try:
            await coro
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self.should_stop or (task is not None and task.cancelling()):
                raise
            raise RuntimeError("the agent awaited something that was cancelled") from error
        if not (self.should_stop or self.app.should_stop or aref.should_stop):
            raise RuntimeError("the agent ended, while its stream goes on; agents loop over their stream for ever")


class ReplyConsumer(FaustReplyConsumer):
    """Reads answers.

    Faust's subscribes to their topic by a channel that nobody reads, and waits 3 s before it looks at one that is read: what
    comes meanwhile would be in nobody's hand for ever, and its batch would wait for it.
    """

    async def add(self, correlation_id: str, promise: Any) -> None:
        """As Faust's, but there is room for all answers of a `join`, of which it has 1,000: one more would end the worker."""
        if isinstance(promise, BarrierState):
            cast(Any, promise._results)._maxsize = 0
        await super().add(correlation_id, promise)

    async def _start_fetcher(self, topic_name: str) -> None:
        topic = self._reply_topic(topic_name)
        # Whoever asks first may be cancelled amid this; then the next one goes on.
        await asyncio.shield(asyncio.ensure_future(topic.maybe_declare()))
        if topic_name not in self._fetchers:
            self._fetchers[topic_name] = self.add_future(self._drain_replies(topic))

    async def _drain_replies(self, channel: Any) -> None:
        """As Faust's, which counts an answer that comes twice for that of another question; `join` would be short of one."""
        async for reply in channel.stream():
            for promise in self._waiting.pop(reply.correlation_id, ()):
                if not promise.done():
                    promise.fulfill(reply.correlation_id, maybe_model(reply.value))


class Stream(faust.Stream[Any]):
    """A stream that acknowledges an event when the agent asks for the next one.

    Faust does so in a ``finally``: there, an event whose agent raised would count as done.
    """

    _iteration: object = None
    #: What the streams read that the agent had made of its stream before it was started again, by topic or channel.
    _inherited: Mapping[Any, Any] = MappingProxyType({})
    #: What the agent went on without acknowledging, and some that it has acknowledged since.
    _held: list[Event]

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._shown(lambda _event, value: value)

    def events(self) -> AsyncIterator[Any]:
        """As Faust's."""
        return self._shown(lambda event, _value: self._skipped_value if event is None else event)

    def items(self) -> AsyncIterator[tuple[Any, Any]]:
        """As Faust's."""
        skipped = self._skipped_value
        return self._shown(lambda event, _value: skipped if event is None else (event.key, event.value))

    def _shown(self, view: Callable[[Event | None, Any], Any]) -> AsyncIterator[Any]:
        """What ``view`` makes of each event and its processed value. One generator, however it is looked at."""
        iterator = self._iterate(view)
        self._active_agens.add(iterator)
        return iterator

    def take(self, max_: int, within: Any = None) -> AsyncGenerator[list[Any], None]:
        """Lists of at most ``max_`` values, all of one partition, acknowledged together when the agent asks for more.

        A list is handed out as soon as nothing more waits: who waited for more, as Faust's own does up to ``within``, would
        hold up the commit of what is there.
        """
        return self._lists(max_, lambda _event, value: value)

    def take_events(self, max_: int, within: Any = None) -> AsyncGenerator[list[Any], None]:
        """`take`, of events."""
        return self._lists(max_, lambda event, _value: event)

    def take_with_timestamp(self, max_: int, within: Any, timestamp_field_name: str) -> AsyncGenerator[list[Any], None]:
        """`take`, of values, of which mappings are given their record's time, in seconds since 1970."""

        def stamped(event: Event, value: Any) -> Any:
            if isinstance(value, dict) and timestamp_field_name:
                value[timestamp_field_name] = event.message.timestamp
            return value

        return self._lists(max_, stamped)

    def noack_take(self, max_: int, within: Any = None) -> AsyncGenerator[list[Any], None]:
        """`take`, of events that the agent acknowledges itself; see `noack`."""
        return self._lists(max_, lambda event, _value: event, acks=False)

    def _lists(
        self, most: int, show: Callable[[Event, Any], Any], *, acks: bool = True
    ) -> AsyncGenerator[list[Any], None]:
        if most < 1:
            raise ValueError(f"take({most}): at least one at a time")
        iterator = self._take(most, show, acks=acks)
        self._active_agens.add(iterator)
        return iterator

    async def _take(
        self, most: int, show: Callable[[Event, Any], Any], *, acks: bool
    ) -> AsyncGenerator[list[Any], None]:
        skipped, turn = self._skipped_value, 0
        together: list[Event] = []
        shown: list[Any] = []
        try:
            async with aclosing(self._iterate(lambda event, value: (event, value), takes=True)) as events:
                async for event, value in events:
                    if event is None:
                        what = f"take() is for topics and channels, not for {self.channel}"
                        raise ImproperlyConfigured(what)  # noqa: TRY301 - it is for the agent
                    turn += 1
                    if together and event.batch is not together[-1].batch:
                        # Never with those of another batch, which has ended: what the agent did for them would count here.
                        _fail(together)
                        together, shown = [], []
                    if value is skipped:
                        event.ack()
                    else:
                        together.append(event)
                        shown.append(show(event, value))
                    if shown and (len(shown) == most or event.is_alone or not self._more_waits(event)):
                        # An agent that raises does so with all of them in hand; the last that came may be a skipped one.
                        last = self.current_event = together[-1]
                        in_hand.set(last)
                        last.together = tuple(together)
                        yield shown
                        for each in together:
                            if acks:
                                each.ack()
                            else:
                                self._hold(each)
                        together, shown = [], []
                    # Others have their turn between two lists only: they may take back what waits for this one.
                    if not together and turn >= _EVENTS_A_TURN:
                        turn = 0
                        await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            _fail(together)
            raise
        except Exception:
            # Of a processor, on another event, which the engine judges. These come again with it, or never.
            _give_up(together)
            raise

    def _more_waits(self, event: Event) -> bool:
        """Whether the next event is there already, and of the same partition: tables are kept by partition."""
        waiting, errors = self._queues()
        following = waiting[0] if waiting and not errors else None
        return (
            isinstance(following, Event) and following.batch is event.batch and following.message.tp == event.message.tp
        )

    async def _iterate(  # noqa: PLR0912, PLR0915 - a call of its own for each step costs more than the step
        self, view: Callable[[Event | None, Any], Any], *, takes: bool = False
    ) -> AsyncGenerator[Any, None]:
        """One event after the other; whoever ``takes`` several is told of skipped ones too, and himself acknowledges and lets
        others have their turn.

        What stands in the loop is done for each event: most of what an event costs besides the agent itself.
        """
        self._finalized = True
        started_here = await self.maybe_start()
        this = self._iteration = object()
        skipped, processors, joins = self._skipped_value, self._processors, self.join_strategy is not None
        # Faust keeps a weak reference here, which it calls; whoever asks Faust for the event gets the one in hand.
        _current_event.set(cast(Any, in_hand.get))
        turn = 0
        event: Event | None = None
        held = self._held = []
        waiting, errors = self._queues()
        set_in_hand = in_hand.set
        try:
            while True:
                turn += not takes
                if turn < _EVENTS_A_TURN and waiting and not errors:
                    channel_value = waiting.popleft()
                else:
                    if turn >= _EVENTS_A_TURN:
                        turn = 0
                        await asyncio.sleep(0)
                    if self.should_stop:
                        break
                    self._let_put()
                    channel_value = await self.channel.__anext__()
                if isinstance(channel_value, Event):
                    event, value = channel_value, channel_value.value
                    if event.withdrawn or (event.batch is not None and event.batch.dead):
                        event = None
                        continue
                    event.taken = True
                    if held:
                        event.held_besides = held
                else:
                    event, value = None, channel_value
                do_ack = self.enable_acks
                self.current_event = event
                set_in_hand(event)
                if processors or joins:
                    value = await self._process(value)
                shown = skipped if value is skipped and not takes else view(event, value)
                if shown is not skipped:
                    self.events_total += 1
                    yield shown
                self.current_event = None
                if event is not None and not takes:
                    if do_ack or value is skipped:
                        event.ack()
                    else:
                        self._hold(event)
        except StopAsyncIteration:
            return  # the channel was a finite iterable
        except (GeneratorExit, asyncio.CancelledError):
            # The agent ended with these in hand. If it raised, the engine knows; cancelled, nobody else would tell.
            _fail(held if event is None else [*held, event])
            raise
        finally:
            # When an agent raises, its generator is finalised at some later time: by then the agent may have been started
            # again and iterate anew, over this same stream.
            if started_here and self._iteration is this:
                await self.stop()
                self.service_reset()

    async def hand_over(self) -> Any:
        """End this stream and all that was made of it; gives the channel, for who goes on."""
        root = cast(Stream, self.get_root_stream())
        await root.stop()
        return root.channel

    def inherit(self, other: Stream) -> None:
        """Go on with what the streams read that were made of the ``other`` one."""
        derived = list(cast(Stream, other.get_root_stream())._iter_ll_forwards())[1:]
        self._inherited = {_source(each.channel): each.channel for each in derived}

    def _chain(self, **kwargs: Any) -> Any:
        """As Faust's; but a topic that was read before goes on to be read from the same queue, or nobody would empty that."""
        if self.active_partitions is not None:
            raise ImproperlyConfigured(
                "an agent with isolated_partitions cannot use group_by() or through(): each of its actors would read all "
                "that any of them forwards. Let another agent read the topic that this one sends to"
            )
        channel = kwargs.pop("channel")
        known = self._inherited.get(_source(channel))
        if known is not None:
            cast(Any, self.app.topics)._topics.discard(channel)
            if channel._root is not None:
                channel._root._subscribers.discard(channel)
            channel = known
        chained = super()._chain(channel=channel, **kwargs)
        cast(Stream, chained)._inherited = self._inherited
        return chained

    async def _passive_drainer(self, channel: Any, declare: bool = False) -> None:
        """Work as part of another stream, which ``through`` or ``group_by`` made of this one.

        Faust's ends when a processor raises, and tells that other stream, whose event is another one: the one at fault would
        be in nobody's hand for ever, and with it its partition.
        """
        try:
            if declare:
                await channel.maybe_declare()
            self._passive_started.set()
            await self.maybe_start()  # or it would be stopped, and this task with it, by an iteration that fails
            while not self.should_stop:
                try:
                    async with aclosing(self._iterate(lambda _event, value: value)) as events:
                        async for _ in events:
                            pass
                except Exception as error:  # noqa: BLE001 - the engine judges it, as that of an agent
                    cast("App", self.app).engine.on_agent_error(str(self), error)
                    await asyncio.sleep(_RESTART_PAUSE_S)
        finally:
            self._passive = False

    def group_by(self, key: Any, *, name: str | None = None, **options: Any) -> Any:
        """As Faust's; ``key`` may be a field of a struct, too."""
        field = key
        if not isinstance(field, FieldDescriptorT) and hasattr(field, "__objclass__"):
            name = name or f"{field.__objclass__.__name__}.{field.__name__}"
            key = field.__get__
        return super().group_by(key, name=name, **options)

    async def _format_key(self, key: Any, value: Any) -> Any:
        """The new key of a value; what finding it raises is an error of the event, which Faust's logs and skips."""
        return key.getattr(value) if isinstance(key, FieldDescriptorT) else await maybe_async(key(value))

    def echo(self, *channels: Any) -> Any:
        """As Faust's, which does not look at what became of its sends."""
        targets = [self.derive_topic(each) if isinstance(each, str) else each for each in channels]

        async def echoing(value: Any) -> Any:
            for target in targets:
                await maybe_forward(value, target)
            return value

        self.add_processor(echoing)
        return self

    def combine(self, *nodes: Any, **kwargs: Any) -> NoReturn:
        """Refused, and so is ``&``."""
        raise refused_join("combine() and & of streams")

    def _join(self, join_strategy: Any) -> NoReturn:
        """Refused: `join`, `left_join`, `inner_join` and `outer_join` come here."""
        raise refused_join("joins of streams")

    def _hold(self, event: Event) -> None:
        """The agent wants the next event before it is through with this one, which it acknowledges some other time."""
        event.hold()
        self._held.append(event)
        if len(self._held) % _PRUNED_EVERY == 0:
            self._held[:] = [each for each in self._held if not each.acked]

    def _queues(self) -> tuple[deque[Any], deque[Any]]:
        """What waits in the channel's queue, which may be taken without awaiting, and the errors that come first."""
        queue = getattr(self.channel, "queue", None)
        return (deque(), deque()) if queue is None else (queue._queue, queue._errors)

    def _let_put(self) -> None:
        """What was taken without awaiting made room in a channel in memory: nobody told those who wait for it."""
        queue = getattr(self.channel, "queue", None)
        if queue is not None and queue._putters and not queue.full():
            queue._wakeup_next(queue._putters)

    async def _process(self, value: Any) -> Any:
        """Run the stream's processors."""
        try:
            for processor in self._processors:
                value = await maybe_async(processor(value))
            return await self.on_merge(value)
        except Skip:
            return self._skipped_value


def _source(channel: Any) -> Any:
    """What an iterator over a channel iterates over: names of topics, or the channel in memory."""
    topics = getattr(channel, "topics", None)
    return tuple(topics) if topics else getattr(channel, "_root", channel)


def refused_join(what: str) -> ImproperlyConfigured:
    """What to raise for joins, none of which Faust has ever finished."""
    return ImproperlyConfigured(
        f"{what} would hold events back that nothing remembers: keep what came from one topic in a table, and let the agent "
        "of the other topic, keyed alike, look it up"
    )


def _give_up(events: Iterable[Event]) -> None:
    """Of those that no batch brings again, say so: nobody has them in hand any more."""
    _fail([event for event in events if event.batch is not None and not event.batch.redelivers])


def _fail(events: Iterable[Event]) -> None:
    for event in events:
        if event.batch is not None and not event.acked:
            event.batch.fail(event)


#: Of records, keys and values, and what is wrong with those that have none; see `Topic.decode_messages`.
Decode: TypeAlias = Callable[[Sequence[Message]], tuple[list[tuple[Any, Any]], dict[int, UndecodableError]]]


def routes_of(app: App, tp: TP) -> list[tuple[Decode, Callable[[Sequence[Event]], None]]]:
    """Where records of a partition go: a pair of ``decode`` and ``put`` for each channel that reads it."""
    channels = cast(Any, app.topics)._tp_index[tp]
    if not channels:
        raise AssertionError(
            f"no agent reads {tp.topic}-{tp.partition}, though it is assigned: its events would be skipped"
        )
    return [(channel.decode_messages, partial(_put, channel.queue)) for channel in channels]


def _put(queue: Any, events: Sequence[Event]) -> None:
    """As ``force_put_nowait`` of each: as many of the agent's actors are woken as there are events for."""
    queue._queue.extend(events)
    for _ in events[: len(queue._getters)]:
        queue._wakeup_next(queue._getters)


def purge(app: App) -> None:
    """Take out of the agents' queues what was withdrawn, or dropped: one that is busy for long would never get to it.

    What came from outside of agents stays, and who waits for room in a channel in memory has it now.
    """
    for queue in list(cast(Any, app.flow_control)._queues):
        waiting = queue._queue
        kept = [event for event in waiting if not (isinstance(event, Event) and event.is_over)]
        if len(kept) < len(waiting):
            waiting.clear()
            waiting.extend(kept)
        for _ in range(len(queue._putters)):
            queue._wakeup_next(queue._putters)


def consumer_loop(app: App) -> asyncio.AbstractEventLoop | None:
    """The event loop of the consumer's thread; None: there is none yet. Any thread may ask.

    Faust makes the consumer when it is first asked for, with what belongs to the loop of whoever asks.
    """
    consumer = cast(Any, app)._consumer
    return None if consumer is None else cast("asyncio.AbstractEventLoop", consumer._thread.thread_loop)


def leader_topic(app: App) -> str | None:
    """The topic of which a worker has the one partition that leads, for timers ``on_leader``; None: it was switched off."""
    return None if app.conf.topic_disable_leader else str(cast(Any, app)._leader_assignor._leader_topic_name)


def record_metadata(topic: str, partition: int, offset: int, timestamp: float | None) -> faust.types.RecordMetadata:
    """What Faust's ``send`` resolves to."""
    return faust.types.RecordMetadata(
        topic=topic,
        partition=partition,
        topic_partition=TP(topic, partition),
        offset=offset,
        timestamp=timestamp,
        timestamp_type=0,
    )


class Router(FaustRouter):
    """Sends a request for a table's key to the worker that holds it; nobody answers for what he does not hold.

    Faust's takes the key as the changelog's serializer writes it, not as the events that write it are keyed; and while a
    partition is on its way between two workers, its new owner would answer as if the key were not there.
    """

    @classmethod
    def _get_serialized_key(cls, table: Any, key: Any) -> bytes:
        return cast(bytes, table.data.key_bytes(key))

    async def route_req(self, table_name: str, key: Any, web: Any, request: Any) -> Any:
        try:
            return await super().route_req(table_name, key, web, request)
        except SameNode:
            table = cast("App", self.app).tables[table_name]
            if self._partition(table, key) not in cast(Any, table).data.partitions:
                raise NotHere(
                    f"that part of the table {table_name} is on its way to this worker; ask again soon"
                ) from None
            raise
        except aiohttp.ClientError as error:
            raise NotHere(
                f"the worker that holds that part of the table {table_name} does not answer: {error}"
            ) from error

    def _partition(self, table: Any, key: Any) -> int:
        topic = self._get_table_topic(table)
        partition: int = self.app.producer.key_partition(topic, self._get_serialized_key(table, key)).partition
        return partition


class Web(FaustWeb):
    """Faust's web server, whose end no slow client holds up, and whose errors are problem documents."""

    def __init__(self, app: Any, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self._runner = AppRunner(self.web_app, access_log=None, shutdown_timeout=_REQUESTS_END_WITHIN_S)

    def add_view(self, view_cls: Any, **kwargs: Any) -> Any:
        """As Faust's; a view that words its errors itself goes on to do so."""
        view: Any = super().add_view(view_cls, **kwargs)
        if view_cls.on_request_error is View.on_request_error:
            view.on_request_error = partial(_tell_problem, view)
        return view


async def _tell_problem(view: Any, request: Any, error: WebError) -> Any:
    if error.code not in set(HTTPStatus):
        return await View.on_request_error(view, request, error)
    known = view.get_methods()
    if type(view).get is View.get:
        # Faust answers HEAD by GET, also where there is none.
        known.discard("HEAD")
    return problem_of(error, known).response()


class HostTable(faust.Table[Any, Any]):
    """The part of our `Table` that overrides what Faust's tables keep private: windows, and their clean-up."""

    def write_windows(self, rows: Rows, timestamp: float) -> None:
        """Set rows, for an event of ``timestamp``."""
        raise NotImplementedError

    def stream_time(self, event: Any) -> float:
        """The timestamp of an event's record, as Faust's ``relative_to_stream`` has it."""
        return float(self._relative_event(event))

    @property
    def tells_closed(self) -> bool:
        """Whether somebody wants to hear of windows that close."""
        return self._on_window_close is not None or type(self).on_window_close is not faust.Table.on_window_close

    def combine(self, *nodes: Any, **kwargs: Any) -> NoReturn:
        """Refused, and so is ``&``."""
        raise refused_join("combine() and & of tables")

    def _join(self, join_strategy: Any) -> NoReturn:
        """Refused: `join`, `left_join`, `inner_join` and `outer_join` come here."""
        raise refused_join("joins of tables")

    def _should_expire_keys(self) -> bool:
        # Faust's clean-up of windows would write outside of transactions: rows expire with a batch.
        return False

    def _apply_window_op(self, op: Callable[[Any, Any], Any], key: Any, value: Any, timestamp: float) -> None:
        rows = [(key, window) for window in self._window_ranges(timestamp)]
        self.write_windows([(row, op(self[row], value)) for row in rows], timestamp)

    def _set_windowed(self, key: Any, value: Any, timestamp: float) -> None:
        self.write_windows([((key, window), value) for window in self._window_ranges(timestamp)], timestamp)

    def _del_windowed(self, key: Any, timestamp: float) -> None:
        rows = [(key, window) for window in self._window_ranges(timestamp)]
        there = [row for row in rows if row in self]
        if not there:
            raise KeyError(key)
        for row in there:
            del self[row]

    def _relative_now(self, event: Any = None) -> float:
        # Faust's is that of the newest window it has seen since it was started: 1970 to begin with.
        return time.time()


class HostWorker(faust.Worker):
    """The part of our `Worker` that overrides what mode's keeps private."""

    def on_asked_to_stop(self, *, again: bool) -> None:
        """By a signal; called once the stop has begun."""

    def _schedule_shutdown(self, signal: Any) -> None:
        again = self._signal_stop_time is not None
        super()._schedule_shutdown(signal)
        self.on_asked_to_stop(again=again)

    async def _sentinel_task(self) -> None:
        """Mode's sleeps a second before it closes the loop: measured, that was two thirds of the time of a stop."""


class HostApp(faust.App):
    """The part of our `App` that overrides what Faust's app keeps private."""

    engine: Any

    @cached_property
    def _reply_consumer(self) -> ReplyConsumer:
        return ReplyConsumer(self, loop=self.loop, beacon=self.beacon)

    def _new_web(self) -> Any:
        driver = web_drivers.by_url(self.conf.web)
        return (Web if driver is FaustWeb else driver)(self)

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def on_rebalance_end(self) -> None:
        """As Faust's."""
        super().on_rebalance_end()
        cast(Conductor, self.topics).look_again()

    async def _on_agent_error(self, agent: Any, exc: BaseException) -> None:
        self.engine.on_agent_error(agent.name, exc)

    async def _stop_consumer(self) -> None:
        # The main app stops first, and takes all with it, each at its own pace: one whose agent awaits something must not
        # keep the partitions of another, which does nothing any more, from those that could take them over.
        await asyncio.gather(
            *(app.leave() for app in cast("App", self).family if app.runs_here and not app.client_only)
        )

    async def leave(self) -> None:
        """Finish what is in hand, and leave the group."""
        await self.engine.finish()
        await self.consumer.stop()
