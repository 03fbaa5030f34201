"""The private names of Faust, mode and aiokafka that faust_adapter.py touches: fails when one of them moves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import aiokafka
import pytest
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import Assignment, Subscription, SubscriptionState, TopicPartitionState
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.group import LeaveGroupRequest
from confluent_kafka import KafkaError, KafkaException
from faust import App, Stream, Table
from faust.agents import Agent
from faust.agents.replies import ReplyConsumer
from faust.app.router import Router
from faust.assignor.leader_assignor import LeaderAssignor
from faust.assignor.partition_assignor import PartitionAssignor
from faust.channels import Channel
from faust.streams import _current_event, current_event
from faust.tables.base import Collection
from faust.tables.manager import TableManager
from faust.tables.wrappers import WindowWrapper
from faust.transport import conductor
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.web.drivers.aiohttp import Web
from faust.web.views import View
from mode import Worker
from mode.supervisors import SupervisorStrategy
from mode.utils.queues import FlowControlEvent, ThrowableQueue

from streams_app.application import App as Ours
from streams_app.errors import PartitionsLost, StoreFailed, StreamsAppError, TransactionAborted
from streams_app.faust_adapter import (
    Assignor,
    Conductor,
    ConsumerThread,
    _Listener,
    _put,
    consumer_loop,
    end_consumer,
)
from streams_app.session import Pin
from streams_app.settings import Settings

PIN = Pin("group", 3, "member")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (App, "_new_transport"),
        (App, "_new_web"),
        (App, "_on_agent_error"),
        (App, "_stop_consumer"),
        (App, "_consumer"),
        (App, "_update_assignment"),
        (App, "_reply_consumer"),
        (ReplyConsumer, "_start_fetcher"),
        (ReplyConsumer, "_drain_replies"),
        (ReplyConsumer, "_reply_topic"),
        (PartitionAssignor, "_group_co_subscribed"),
        (Stream, "_passive_drainer"),
        (Stream, "_format_key"),
        (Stream, "_chain"),
        (Stream, "_join"),
        (Stream, "_iter_ll_forwards"),
        (Agent, "_replace_actor"),
        (Agent, "_start_one"),
        (Agent, "on_isolated_partitions_revoked"),
        (Agent, "_slurp"),
        (Agent, "_reply"),
        (Table, "_join"),
        (Router, "_get_serialized_key"),
        (Router, "_get_table_topic"),
        (Table, "_should_expire_keys"),
        (Table, "_apply_window_op"),
        (Table, "_set_windowed"),
        (Table, "_del_windowed"),
        (Table, "_window_ranges"),
        (Table, "_relative_now"),
        (Table, "_relative_event"),
        (WindowWrapper, "_keys"),
        (TableManager, "_update_channels"),
        (LeaderAssignor, "_leader_topic_name"),
        (conductor.Conductor, "_flag_changes"),
        (conductor.Conductor, "_resubscribe_sleep_lock_seconds"),
        (conductor.Conductor, "_topic_contain_unsubscribed_topics"),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer"),
        (driver.AIOKafkaConsumerThread, "_create_client_consumer"),
        (driver.AIOKafkaConsumerThread, "_ensure_consumer"),
        (driver.Consumer, "_new_consumer_thread"),
        (Worker, "_schedule_shutdown"),
        (Worker, "_sentinel_task"),
        (GroupCoordinator, "_send_req"),
        (GroupCoordinator, "ensure_coordinator_known"),
        (GroupCoordinator, "reset_generation"),
        (GroupCoordinator, "_do_heartbeat"),
        (GroupCoordinator, "coordinator_dead"),
        (Assignment, "state_value"),
        (Assignment, "tps"),
        (Subscription, "assignment"),
        (SubscriptionState, "subscription"),
        (TopicPartitionState, "has_valid_position"),
        (TopicPartitionState, "position"),
        (PartitionRecords, "_consumer_record"),
        (ThrowableQueue, "force_put_nowait"),
    ],
)
def test_a_name_that_we_override_or_call_is_there(owner: type, name: str) -> None:
    """Without it our override would silently not be called."""
    assert hasattr(owner, name)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (Stream.__init__, "self._active_agens"),
        (Stream.__init__, "self._processors"),
        (Stream.__init__, "self._skipped_value"),
        (Stream._enable_passive, "self._passive_drainer(channel, declare)"),
        (Stream.on_start, "await self._passive_started.wait()"),
        (Stream.group_by, "format_key = self._format_key"),
        (Stream.group_by, "self._chain(channel=channel_it)"),
        (Stream.through, "self._chain(channel=channel_it)"),
        (Collection.__init__, "self._on_window_close"),
        (Channel.__init__, "self._root"),
        (Channel.__init__, "self._subscribers"),
        (Channel.queue.fget, "clear_on_resume=True"),
        (FlowControlEvent.__init__, "self._queues"),
        (ThrowableQueue.clear, "self._putters"),
        (ReplyConsumer.add, "self._waiting[correlation_id].add(promise)"),
        (conductor.Conductor._subscriber.fun, "if self.app.rebalancing:"),
        (conductor.Conductor.__init__, "self._topics"),
        (ThrowableQueue.__init__, "self._errors"),
        (conductor.Conductor.__init__, "self._tp_index"),
        (conductor.Conductor._update_tp_index, "tp_index[tp].add(topic)"),
        (driver.AIOKafkaConsumerThread.__post_init__, "self._rebalance_listener"),
        (driver.Consumer.on_stop, "transport._topic_waiters.clear()"),
        (aiokafka.AIOKafkaConsumer.__init__, "self._subscription"),
        (aiokafka.AIOKafkaConsumer.start, "self._coordinator"),
        (GroupCoordinator.__init__, "self.generation"),
        (GroupCoordinator.__init__, "self.member_id"),
        (GroupCoordinator.__init__, "self.coordinator_id"),
        (GroupCoordinator.reset_generation, "self.request_rejoin()"),
        (TopicPartitionState.__init__, "self.lso"),
        (TopicPartitionState.__init__, "self.highwater"),
        (aiokafka.AIOKafkaConsumer.start, "self._fetcher = Fetcher("),
        (Fetcher.__init__, "self._records = collections.OrderedDict()"),
        (Fetcher._proc_fetch_request, "self._records[tp] = FetchResult("),
        (Fetcher._update_fetch_positions, "self._set_error(tp, err)"),
        (Fetcher.__init__, "self._fetch_task = create_task(self._fetch_requests_routine())"),
        (Fetcher._fetch_requests_routine, "self._pending_tasks.intersection(done_set)"),
        (Fetcher.close, "self._closed = True"),
        (FetchResult.__init__, "self._partition_records = partition_records"),
        (PartitionRecords._unpack_records, "consumer_record = self._consumer_record(tp, record)"),
        (SupervisorStrategy._supervisor.fun, "self._please_wakeup = None"),
        (Agent.__init__, "self._actor_by_partition = "),
        (Agent._execute_actor, "await self._on_error(self, exc)"),
        (Worker._on_sigterm, "self._schedule_shutdown(signal.SIGTERM)"),
        (Worker._on_sigint, "self._schedule_shutdown(signal.SIGINT)"),
        (Worker._schedule_shutdown, "self._signal_stop_time = self.loop.time()"),
        (App._new_web, "return web_drivers.by_url(self.conf.web)(self)"),
        (Web.__init__, "self._runner: AppRunner = AppRunner(self.web_app, access_log=None)"),
        (Web.stop_server, "await self._runner.cleanup()"),
        (View.dispatch, "response = await self.on_request_error(request, exc)"),
        (App._on_partitions_assigned, "await T(self.topics.on_partitions_assigned)(assigned)"),
    ],
)
def test_a_line_that_we_rely_on_is_there(function: object, text: str) -> None:
    """Attributes that exist on instances only, and calls whose order matters to us."""
    assert text in inspect.getsource(function)  # type: ignore[arg-type]


def test_partitions_of_topics_of_one_size_stay_together() -> None:
    """An input partition and the table that it writes would go to different workers."""

    class Reversed(set[str]):
        """A set that iterates the other way round, as an equal set may."""

        def __iter__(self) -> Iterator[str]:
            return iter(sorted(super().__iter__(), reverse=True))

    groups = Assignor._group_co_subscribed(
        {"input", "changelog", "other"},
        {"one": Reversed({"input", "changelog"}), "two": {"changelog", "input", "other"}},
    )
    assert sorted(sorted(group) for group in groups) == [["changelog", "input"], ["other"]]


def test_faust_calls_what_it_keeps_for_the_current_event() -> None:
    """There it keeps a weak reference; what we put there gives the event in hand."""
    assert "eventref()" in inspect.getsource(current_event)
    assert _current_event.get(None) is None


def test_the_pin_and_the_records_are_taken_in_one_step() -> None:
    """aiokafka gives records out without an await after it has looked at the assignment."""

    source = inspect.getsource(Fetcher.fetched_records)
    assert source.index("reassignment_in_progress") < source.index("drained = {}")
    between = source[source.index("drained = {}") : source.index("return drained")]
    assert "await" not in between


class Coordinator:
    """aiokafka's, as far as a commit needs it."""

    def __init__(self, answer: object) -> None:
        self.generation, self.member_id, self.coordinator_id = 3, "member", 0
        self.asked: list[object] = []
        self.left: list[str] = []
        self._answer = answer

    async def _send_req(self, request: object) -> object:
        if isinstance(request, LeaveGroupRequest):
            self.left.append("member")
            return None
        self.asked.append(request)
        if isinstance(self._answer, Exception):
            raise self._answer
        return SimpleNamespace(topics=[("t", [(0, 0), (1, self._answer)])])

    async def ensure_coordinator_known(self) -> None:
        """It is."""

    def reset_generation(self) -> None:
        self.generation, self.member_id = -1, ""

    def coordinator_dead(self) -> None:
        self.coordinator_id = None  # type: ignore[assignment]


def commit_once(answer: object, pin: Pin = PIN) -> Coordinator:
    """Commit through a thread that has only a coordinator."""
    coordinator = Coordinator(answer)
    thread = object.__new__(ConsumerThread)
    thread.app = SimpleNamespace(conf=SimpleNamespace(id="group"))  # type: ignore[assignment]
    thread._consumer = SimpleNamespace(_coordinator=coordinator)
    thread._ensure_consumer = lambda: thread._consumer  # type: ignore[method-assign]
    try:
        asyncio.run(thread.commit_once(pin, {TP("t", 0): (5, "m"), TP("t", 1): (6, "m")}))
    except StreamsAppError as error:
        error.coordinator = coordinator  # type: ignore[attr-defined]
        raise
    return coordinator


def test_a_commit_goes_out_once_under_its_pin() -> None:
    """Tried again under the next membership, it puts back what somebody else has moved on."""
    [request] = commit_once(0).asked
    assert request._consumer_group_generation_id == PIN.generation  # type: ignore[attr-defined]
    assert request._consumer_id == PIN.member_id  # type: ignore[attr-defined]


@pytest.mark.parametrize("pin", [PIN._replace(generation=-1), PIN._replace(generation=2), PIN._replace(member_id="")])
def test_a_commit_under_another_membership_is_not_even_sent(pin: Pin) -> None:
    """Generation -1 without a member passes unchecked."""
    with pytest.raises(PartitionsLost) as lost:
        commit_once(0, pin)
    assert lost.value.coordinator.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [22, 25, 27])
def test_a_group_that_moved_on_is_told(code: int) -> None:
    """The partitions belong to somebody else, who goes on from what was committed before."""
    with pytest.raises(PartitionsLost) as lost:
        commit_once(code)
    assert lost.value.coordinator.left == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [14, 15, 16])
def test_a_coordinator_that_is_not_there_committed_nothing(code: int) -> None:
    """A broker that restarts is no reason to leave the group."""
    with pytest.raises(TransactionAborted):
        commit_once(code)


@pytest.mark.parametrize("answer", [7, KafkaConnectionError(), TimeoutError()])
def test_a_commit_of_unknown_outcome_costs_the_membership(answer: object) -> None:
    """It may arrive later, and would put the offset back: under the old membership the broker refuses it."""
    with pytest.raises(PartitionsLost) as lost:
        commit_once(answer)
    coordinator = lost.value.coordinator  # type: ignore[attr-defined]
    assert (coordinator.generation, coordinator.left, len(coordinator.asked)) == (-1, ["member"], 1)


async def test_a_disk_that_does_not_take_the_member_ends_the_worker() -> None:
    """aiokafka swallows what a listener raises: nobody would be told of the assignment, which stays paused for ever."""
    crashed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    class Full:
        def __setattr__(self, name: str, value: object) -> None:
            raise StoreFailed("the disk is full")

    async def crash(error: BaseException) -> None:
        crashed.set_result(error)

    thread = object.__new__(ConsumerThread)
    thread.app = SimpleNamespace(  # type: ignore[assignment]
        crash=crash, slot=Full(), assignor=SimpleNamespace(assigned_standbys=tuple)
    )
    thread._consumer = SimpleNamespace(_coordinator=Coordinator(None), pause=lambda *_: None)
    thread._ensure_consumer = lambda: thread._consumer  # type: ignore[method-assign]
    thread.live_pin = lambda: PIN  # type: ignore[method-assign]
    thread.parent_loop = asyncio.get_running_loop()
    with pytest.raises(StoreFailed):
        await _Listener(thread).on_partitions_assigned([TP("t", 0)])
    assert isinstance(await asyncio.wait_for(crashed, 5), StoreFailed)


class Stopping:
    """Where aiokafka's consumer stands when a broker is down: one of its tasks, cancelled, ends ``stop()`` half-way."""

    def __init__(self) -> None:
        self.consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1")
        self.closed: list[str] = []
        self.consumer._fetcher = SimpleNamespace(close=self._close_fetcher)
        self.consumer._client.close = self._close_client

    async def _close_fetcher(self) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task

    async def _close_client(self) -> None:
        self.closed.append("client")


def test_who_asks_for_a_consumers_loop_makes_no_consumer() -> None:
    """Made by the watchdog's thread, it belonged to no loop: now and then a start failed, and left an idle process."""
    app = Ours("watched", autodiscover=False, web_enabled=False)
    assert consumer_loop(app) is None
    assert cast(Any, app)._consumer is None


def test_a_consumer_ends_though_a_broker_is_down() -> None:
    """A worker that was asked to end while a broker restarted did so a minute later: its consumer's thread had died."""

    async def end() -> list[str]:
        stopping = Stopping()
        await end_consumer(stopping.consumer)
        return stopping.closed

    assert asyncio.run(end()) == ["client"]


def test_who_is_cancelled_while_a_consumer_ends_hears_of_it() -> None:
    """Else the task that waits for us would wait for ever."""

    async def end() -> bool:
        task = asyncio.ensure_future(end_consumer(Stopping().consumer))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(end())


async def test_events_that_come_together_wake_as_many_actors() -> None:
    """One for all of them would leave the other actors of an agent with ``concurrency`` asleep."""
    queue: ThrowableQueue[int] = ThrowableQueue(flow_control=FlowControlEvent(initially_suspended=False))
    actors = [asyncio.ensure_future(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    _put(queue, cast(Any, [1, 2]))
    await asyncio.wait(actors, timeout=1, return_when=asyncio.ALL_COMPLETED)
    assert sorted(actor.result() for actor in actors if actor.done()) == [1, 2]
    actors[-1].cancel()


async def test_a_subscription_that_is_about_to_change_is_no_crash() -> None:
    """Topics were added: between aiokafka's new subscription and its word of it there are no partitions to fetch from."""

    class Kafka:
        _subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=None))
        _fetcher = SimpleNamespace(_records={})

        async def getmany(self, *_tps: object, **_options: object) -> dict[object, object]:
            return {}

    thread = object.__new__(ConsumerThread)
    thread._ensure_consumer = Kafka  # type: ignore[method-assign,assignment]
    with pytest.raises(PartitionsLost, match="given out anew"):
        await thread.fetch([TP("t", 0)], 1, 1)
    with pytest.raises(PartitionsLost, match="given out anew"):
        await thread.seek_all({TP("t", 0): 0})


def test_what_came_up_during_a_rebalance_is_subscribed_to() -> None:
    """Faust's conductor forgets it: whoever asks for the first time then waits for ever."""
    topics = Conductor(cast(Any, SimpleNamespace(client_only=False)))
    known, new = SimpleNamespace(topics=["known"]), SimpleNamespace(topics=["known", "new"])
    assert not topics._topic_name_index["known"], "it is subscribed to, whoever reads it"
    changed = topics._subscription_changed = asyncio.Event()
    topics._subscription_done = cast(Any, object())
    topics._topics = cast(Any, [known])
    topics.look_again()
    assert not changed.is_set()
    topics._topics = cast(Any, [known, new])
    topics.look_again()
    assert changed.is_set()


async def test_a_fatal_error_costs_the_producer_not_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader has lost what it had acknowledged; from then on no page could send anything until the worker was restarted."""
    made: list[Fake] = []

    class Fake:
        def __init__(self, _config: object) -> None:
            self.values: list[bytes] = []
            made.append(self)

        def produce(self, *, value: bytes, **_record: object) -> None:
            if len(made) == 1 and self.values:
                raise KafkaException(KafkaError(KafkaError._FATAL))
            self.values.append(value)

        def poll(self, _timeout_s: float) -> None:
            """Nothing came."""

        def __len__(self) -> int:
            return 0

    monkeypatch.setattr("streams_app.faust_adapter.ConfluentProducer", Fake)
    producer = Ours("fatal", settings=Settings.from_env({}), autodiscover=False).producer
    for value in b"a", b"b", b"c":
        await producer.send("t", b"k", value, None, None, None)
        await asyncio.sleep(0)
    assert [each.values for each in made] == [[b"a"], [b"b", b"c"]]
    async with asyncio.timeout(10):
        while len(producer._futures) > 1:  # noqa: ASYNC110 - nobody polls the old one for ever
            await asyncio.sleep(0)


async def test_what_is_sent_while_the_worker_ends_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web request in hand: nobody polls any more, so it would wait for an answer until it is broken off."""

    class Fake:
        """It tells what became of a record when it is flushed, in the flush's thread."""

        def __init__(self, _config: dict[str, Any]) -> None:
            self.told: list[Any] = []

        def produce(self, *, on_delivery: Any, **_record: object) -> None:
            self.told.append(on_delivery)

        def poll(self, _timeout_s: float) -> None:
            """Nothing came."""

        def flush(self, _timeout_s: float) -> None:
            for each in self.told:
                each(None, SimpleNamespace(partition=lambda: 1, offset=lambda: 7))

        def __len__(self) -> int:
            return 0

    monkeypatch.setattr("streams_app.faust_adapter.ConfluentProducer", Fake)
    producer = Ours("ends", settings=Settings.from_env({}), autodiscover=False).producer
    producer._stopped.set()
    sent = await producer.send("t", b"k", b"v", None, None, None)
    told = await asyncio.wait_for(sent, 10)
    assert (told.partition, told.offset) == (1, 7)


async def test_the_end_of_a_rebalance_is_one_more_look_at_the_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """At those that came up meanwhile, which Faust's conductor has forgotten."""
    app, looks = Ours("looks", settings=Settings.from_env({}), autodiscover=False), []
    monkeypatch.setattr(app.topics, "look_again", lambda: looks.append(app.rebalancing))
    app.on_rebalance_start()
    assert not looks
    app.on_rebalance_end()
    assert looks == [False]
