"""Tables as agents and web views see them: the batch's writes inside, committed values outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import TP, RecordMetadata
from faust.types.tuples import Message

from streams_app.application import App
from streams_app.batch import MAX_RECORD_BYTES, Batch
from streams_app.errors import DeadBatchError, StoreFailed, TransactionAborted
from streams_app.events import Event, in_hand
from streams_app.replicas import hide
from streams_app.session import Pin
from streams_app.settings import Settings
from streams_app.store import Store
from streams_app.table import Table


class Hand:
    """Puts an event of a batch into the agent's hand."""

    def __init__(self, folder: Path) -> None:
        self.app = App("tables", settings=Settings(datadir=folder, kafka_url="kafka://127.0.0.1:1"), autodiscover=False)
        self.table: Table = self.app.Table("balance", key_type=str, value_type=int, default=int)
        self.store = Store(folder / "0", topic_id="topic")
        self.table.data.partitions = {0: self.store}
        self.batch = Batch(Pin("group", 1, "member"))

    def take(self, partition: int = 0) -> Event:
        """An event from ``partition``, in hand."""
        message = Message("in", partition, 0, 1.0, 0, None, b"k", b"v", None, tp=TP("in", partition))
        self.event = Event(self.app, "k", "v", None, message)
        self.event.batch = self.batch
        in_hand.set(self.event)
        return self.event

    def drop(self) -> None:
        """Empty the hand."""
        in_hand.set(None)


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[Hand]:
    made = Hand(tmp_path)
    made.store.publish({b"a": b"1", b"b": b"2"}, [], 5)
    yield made
    made.drop()
    made.store.close()


def test_an_agent_sees_its_batchs_writes_over_committed_values(hand: Hand) -> None:
    """The second event of a batch must see the first one's balance."""
    hand.take()
    hand.table["a"] += 10
    hand.table["c"] = 3
    del hand.table["b"]
    assert hand.table["a"] == 11
    assert "b" not in hand.table
    assert dict(hand.table.items()) == {"a": 11, "c": 3}
    assert len(hand.table) == 2
    assert hand.table.get("b", 0) == 0
    assert hand.table.pop("c") == 3


def test_from_outside_only_committed_values_are_seen(hand: Hand) -> None:
    """A web view would show balances that an aborted batch takes back."""
    hand.take()
    hand.table["a"] = 99
    hand.table["c"] = 3
    hand.drop()
    assert hand.table["a"] == 1
    assert "c" not in hand.table
    assert dict(hand.table.items()) == {"a": 1, "b": 2}


def test_nothing_reaches_the_store_before_the_commit(hand: Hand) -> None:
    """Uncommitted values on disk would outlive the crash that aborted them."""
    hand.take()
    hand.table["a"] = 99
    assert hand.store.get(b"a") == b"1"


def test_a_store_that_fails_is_not_the_events_fault(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an event would be set aside, three attempts later, for the disk's fault."""
    hand.take()

    def fail(_key: bytes) -> bytes:
        raise StoreFailed("the disk is full")

    monkeypatch.setattr(hand.store, "get", fail)
    with pytest.raises(DeadBatchError):
        hand.table.get("a")
    assert isinstance(hand.batch.trouble, StoreFailed)


def test_a_table_is_not_written_from_outside(hand: Hand) -> None:
    """There is no transaction that the write could be a part of."""
    with pytest.raises(TypeError, match="outside of an agent"):
        hand.table["a"] = 5


def test_a_dead_batch_takes_no_more_writes(hand: Hand) -> None:
    """An agent that awaited too long would put its work into nowhere, or into another batch."""
    hand.take()
    hand.batch.drop()
    with pytest.raises(DeadBatchError):
        hand.table["a"] = 5
    with pytest.raises(DeadBatchError):
        hand.table["a"]


async def test_a_task_that_an_agent_left_behind_takes_no_part(hand: Hand) -> None:
    """Its work would be in no transaction, or in half of one, and nobody would notice."""
    topic = hand.app.topic("out", key_type=str, value_type=int)
    hand.take()
    left_behind = asyncio.Event()

    async def later() -> None:
        await left_behind.wait()
        with pytest.raises(DeadBatchError, match="leaves behind"):
            hand.table["a"] = 5
        await topic.send(key="k", value=1)

    task = asyncio.ensure_future(later())
    await asyncio.sleep(0)
    hand.batch.seal()
    hand.drop()
    left_behind.set()
    with pytest.raises(DeadBatchError):
        await task


async def test_a_dead_batch_takes_no_more_sends(hand: Hand) -> None:
    """The same for what an agent sends."""
    topic = hand.app.topic("out", key_type=str, value_type=int)
    hand.take()
    assert (await (await topic.send(key="k", value=1))).offset == -1
    assert len(hand.batch.outputs) == 1
    hand.batch.drop()
    with pytest.raises(DeadBatchError):
        await topic.send(key="k", value=1)


def test_a_topic_with_other_partitions_than_the_table_is_refused(hand: Hand) -> None:
    """The balance of a key would lie in two partitions."""
    hand.take(partition=7)
    with pytest.raises(ImproperlyConfigured, match="same number of partitions"):
        hand.table["a"]


def test_what_no_broker_takes_is_the_events_fault(hand: Hand) -> None:
    """Found at produce only, it would abort every batch that it is in, for ever."""
    hand.take()
    with pytest.raises(ValueError, match="bytes"):
        hand.table["x" * MAX_RECORD_BYTES] = 1


def test_a_global_table_is_read_whole(hand: Hand, tmp_path: Path) -> None:
    """What the event's own partition has is as its batch sees it; what others have, as they committed it."""
    table = hand.app.GlobalTable("rates", key_type=str, value_type=int, default=int)
    own, copy = Store(tmp_path / "own", topic_id="topic"), Store(tmp_path / "copy", topic_id="topic")
    own.publish({b"a": b"1", b"b": b"2"}, [], 5)
    copy.publish({b"x": b"7"}, [], 5)
    table.data.partitions, table.data.copies = {0: own}, {1: copy}
    hand.take()
    table["a"] += 10
    del table["b"]
    assert (table["a"], table["x"], table["nobody's"]) == (11, 7, 0)
    assert "b" not in table
    assert dict(table.items()) == {"a": 11, "x": 7}
    assert len(table) == 2
    hand.drop()
    assert dict(table.items()) == {"a": 1, "b": 2, "x": 7}
    own.close()
    copy.close()


def test_agents_see_a_followed_table_as_any_other(hand: Hand, tmp_path: Path) -> None:
    """That a view wants a copy must not change what an agent does."""
    copy = Store(tmp_path / "copy", topic_id="topic")
    copy.publish({b"x": b"7"}, [], 5)
    hand.app.follow(hand.table)
    hand.table.data.copies = {1: copy}
    assert hand.table["x"] == 7
    hand.take()
    assert "x" not in hand.table
    assert dict(hand.table.items()) == {"a": 1, "b": 2}
    copy.close()


async def test_a_callback_runs_with_the_metadata_of_its_send(hand: Hand) -> None:
    """After the commit; an aborted batch's callbacks never run."""
    topic = hand.app.topic("out", key_type=str, value_type=int)
    hand.take()
    called: list[RecordMetadata] = []
    await topic.send(
        key="k", value=1, partition=0, headers={"h": b"v"}, callback=lambda sent: called.append(sent.result())
    )
    [output] = hand.batch.outputs
    assert (output.key, output.value, output.partition, output.headers) == (b"k", b"1", 0, [("h", b"v")])
    assert not called
    for callback in hand.batch.callbacks:
        callback()
    assert [(each.topic, each.partition, each.offset) for each in called] == [("out", 0, -1)]


@pytest.mark.parametrize(("headers", "error"), [({"n": 5}, TypeError), ([(1, b"x")], TypeError)])
async def test_a_header_that_the_producer_would_refuse_is_the_events_fault(
    hand: Hand, headers: object, error: type[Exception]
) -> None:
    """Found in the commit's thread only, it would end the worker, and its successor, and so on."""
    topic = hand.app.topic("out", key_type=str, value_type=int)
    hand.take()
    with pytest.raises(error):
        await topic.send(key="k", value=1, headers=headers)
    assert not hand.batch.outputs


async def test_send_soon_joins_the_transaction_as_send_does(hand: Hand) -> None:
    """Through Faust's buffer it would leave it: delivered again, the event's output would be there twice."""
    topic = hand.app.topic("out", key_type=str, value_type=int)
    hand.take()
    sent = topic.send_soon(key="k", value=1)
    assert sent.done()
    assert [(output.key, output.value) for output in hand.batch.outputs] == [(b"k", b"1")]
    with pytest.raises(ImproperlyConfigured, match="use send"):
        await topic.publish_message(sent)


def test_an_agent_of_another_guarantee_reads_committed_values_and_writes_nothing(hand: Hand) -> None:
    """In its batch the write would be in the transaction of another group, or in none."""
    hand.take()
    hand.table["a"] = 100
    sibling = hand.app.sibling("at_least_once")
    foreign = Event(sibling, "k", "v", None, hand.event.message)
    foreign.batch = Batch(Pin("group", 1, "member"))
    in_hand.set(foreign)
    assert hand.table["a"] == 1
    assert dict(hand.table.items()) == {"a": 1, "b": 2}
    with pytest.raises(ImproperlyConfigured, match="tables-at-least-once wrote it"):
        hand.table["a"] = 5


def test_a_global_table_with_a_hole_is_not_read_by_agents(hand: Hand, tmp_path: Path) -> None:
    """A copy that is made anew has keys that would be missed, with their defaults, and that would be committed."""
    table = hand.app.GlobalTable("rates", key_type=str, value_type=int, default=int)
    own, other = Store(tmp_path / "own", topic_id="topic"), Store(tmp_path / "other", topic_id="topic")
    own.publish({b"EUR": b"1"}, [], 1)
    other.publish({b"USD": b"2"}, [], 1)
    table.data.partitions, table.data.copies = {0: own}, {1: other}
    hand.app.replicas.partition_counts = {table.changelog_topic_name: 2}
    hand.take()
    assert (table["EUR"], table["USD"], sorted(table)) == (1, 2, ["EUR", "USD"])
    table.data.copies = {}
    assert table["EUR"] == 1
    for read in (lambda: table["USD"], lambda: list(table)):
        with pytest.raises(DeadBatchError, match="made anew"):
            read()
    assert isinstance(hand.batch.trouble, TransactionAborted), "the fault of no event"
    hand.drop()
    assert table.get("USD") is None, "a page may ask"
    own.close()
    other.close()


def test_a_copy_that_goes_while_it_is_read_is_told(hand: Hand, tmp_path: Path) -> None:
    """Looked for before the read, it was there; the read finds a wiped store, and no error."""
    table = hand.app.GlobalTable("rates", key_type=str, value_type=int, default=int)
    own, other = Store(tmp_path / "own", topic_id="topic"), Store(tmp_path / "other", topic_id="topic")
    other.publish({b"USD": b"2"}, [], 1)
    hand.app.replicas.partition_counts = {table.changelog_topic_name: 2}

    class Going:
        """It is hidden, made anew, and shown again while it is read."""

        def get(self, key: bytes) -> None:
            hide(hand.app, (table.changelog_topic_name, 1))
            table.data.show(copies={1: other})

        def items(self) -> Iterator[tuple[bytes, bytes]]:
            self.get(b"")
            yield from ()

    for read in (lambda: table["USD"], lambda: list(table)):
        table.data.show(partitions={0: own}, copies={1: cast(Any, Going())})
        hand.take()
        with pytest.raises(DeadBatchError, match="made anew"):
            read()
        hand.drop()
    own.close()
    other.close()


def test_what_is_hidden_is_seen_by_nobody(hand: Hand) -> None:
    """A partition that changes hands may count as a copy and as one's own."""
    data = hand.table.data
    data.copies = {0: hand.store, 1: hand.store}
    hide(hand.app, (hand.table.changelog_topic_name, 0))
    assert (data.partitions, data.copies) == ({}, {1: hand.store})
    hide(hand.app, ("another", 1))
    assert data.copies == {1: hand.store}
