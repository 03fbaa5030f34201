"""The private names of Faust, mode and aiokafka that faust_adapter.py touches: fails when one of them moves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import aiokafka
import pytest
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import Assignment, SubscriptionState, TopicPartitionState
from faust import App, Stream
from faust.agents import Agent
from faust.assignor.partition_assignor import PartitionAssignor
from faust.streams import _current_event
from faust.tables.manager import TableManager
from faust.transport import conductor
from faust.transport.drivers import aiokafka as driver
from mode.supervisors import SupervisorStrategy
from mode.utils.queues import ThrowableQueue

from streams_app.faust_adapter import Assignor


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (App, "_new_transport"),
        (App, "_on_agent_error"),
        (App, "_stop_consumer"),
        (App, "_update_assignment"),
        (PartitionAssignor, "_group_co_subscribed"),
        (Stream, "_channel_stop_iteration"),
        (TableManager, "_update_channels"),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer"),
        (driver.AIOKafkaConsumerThread, "_ensure_consumer"),
        (driver.Consumer, "_new_consumer_thread"),
        (GroupCoordinator, "_send_req"),
        (GroupCoordinator, "ensure_coordinator_known"),
        (Assignment, "state_value"),
        (SubscriptionState, "subscription"),
        (TopicPartitionState, "has_valid_position"),
        (TopicPartitionState, "position"),
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
        (ThrowableQueue.__init__, "self._errors"),
        (conductor.Conductor.__init__, "self._tp_index"),
        (conductor.Conductor._update_tp_index, "tp_index[tp].add(topic)"),
        (driver.AIOKafkaConsumerThread.__post_init__, "self._rebalance_listener"),
        (driver.Consumer.on_stop, "transport._topic_waiters.clear()"),
        (aiokafka.AIOKafkaConsumer.__init__, "self._subscription"),
        (aiokafka.AIOKafkaConsumer.start, "self._coordinator"),
        (GroupCoordinator.__init__, "self.generation"),
        (GroupCoordinator.__init__, "self.member_id"),
        (TopicPartitionState.__init__, "self.lso"),
        (SupervisorStrategy._supervisor.fun, "self._please_wakeup = None"),
        (Agent._execute_actor, "await self._on_error(self, exc)"),
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


def test_the_current_event_is_kept_by_weak_reference() -> None:
    """`Stream` sets it the same way."""
    assert "_current_event.set(weakref.ref(event))" in inspect.getsource(Stream._set_current_event)
    assert _current_event.get(None) is None


def test_the_pin_and_the_records_are_taken_in_one_step() -> None:
    """aiokafka gives records out without an await after it has looked at the assignment."""
    from aiokafka.consumer.fetcher import Fetcher  # noqa: PLC0415

    source = inspect.getsource(Fetcher.fetched_records)
    assert source.index("reassignment_in_progress") < source.index("drained = {}")
    between = source[source.index("drained = {}") : source.index("return drained")]
    assert "await" not in between
