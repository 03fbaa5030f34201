"""What we ask the brokers: stable offsets, high watermarks, and the restore behind open transactions."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as AioTopicPartition
from aiokafka.errors import KafkaError as AioKafkaError
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from faust.types import TP

from benchmarks.restore import RESTORED
from lab.wire import Wire
from streams_app.embedded import free_port
from streams_app.errors import KafkaUnreachable, PartitionsLost, StartRefused
from streams_app.faust_adapter import ConsumerThread, prepare_fetcher, revive_fetcher
from streams_app.guarantees import ExactlyOnce
from streams_app.offsets import Offsets
from streams_app.outbox import Outbox
from streams_app.restore import Restoring, restore
from streams_app.session import Consumed, Outgoing, Output, Owner, Pin, Session, unfenced_group_metadata
from streams_app.start import Start
from streams_app.store import Store
from tests.rig import wait_until


class Corner:
    """A topic, a changelog, and a group with a live member."""

    def __init__(self, kafka_url: str, folder: Path) -> None:
        self.name = f"c{uuid4().hex[:8]}"
        self.config = {"bootstrap.servers": kafka_url.removeprefix("kafka://")}
        self.reading = {**self.config, "group.id": self.name}
        self.aiokafka = {"bootstrap_servers": self.config["bootstrap.servers"]}
        self.input, self.changelog = (f"{self.name}-in", 0), (f"{self.name}-changelog", 0)
        self.folder = folder
        self.admin = AdminClient(self.config)
        for future in self.admin.create_topics(
            [NewTopic(self.input[0], 1, 1), NewTopic(self.changelog[0], 1, 1, config={"cleanup.policy": "compact"})]
        ).values():
            future.result(30)
        self.offsets = Offsets(self.config, self.name)
        self.consumer = Consumer({**self.config, "group.id": self.name, "auto.offset.reset": "earliest"})
        self.sessions: list[Session] = []
        self.stores: list[Store] = []

    def join(self) -> Pin:
        """Become a member of the group."""
        self.consumer.subscribe([self.input[0]])
        wait_until(lambda: self.consumer.poll(0.1) is not None or self.consumer.assignment(), "joined the group")
        metadata: bytes = self.consumer.consumer_group_metadata()
        generation = int.from_bytes(metadata[7:11], "little", signed=True)
        return Pin(self.name, generation, metadata[11:].split(b"\0")[1].decode())

    def session(self, transactional_id: str) -> Session:
        made = Session(self.config, transactional_id)
        made.open()
        self.sessions.append(made)
        return made

    def exactly_once(self, name: str) -> ExactlyOnce:
        made = ExactlyOnce(self.config, f"{self.name}-{name}", timeout_s=10.0)
        self.sessions.append(made.session)
        return made

    def store(self) -> Store:
        made = Store(self.folder / str(len(self.stores)), topic_id="id")
        self.stores.append(made)
        return made

    def produce(self, topic: str, count: int) -> None:
        producer = Producer(self.config)
        for number in range(count):
            producer.produce(topic, b"v%d" % number, b"k%d" % number, 0)
        assert producer.flush(30) == 0

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        for store in self.stores:
            store.close()
        with contextlib.suppress(RuntimeError):  # closed already
            self.consumer.close()


@pytest.fixture
def corner(kafka_url: str, tmp_path: Path) -> Iterator[Corner]:
    made = Corner(kafka_url, tmp_path)
    yield made
    made.close()


def test_records_handed_over_together_stand_where_and_in_the_order_they_were_meant(corner: Corner) -> None:
    """A call for many takes no headers or times and no partition of its own for each; what has some goes between them."""
    topic = f"{corner.name}-out"
    corner.admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(30)
    plain = [Output(topic, b"key", b"%d" % number) for number in range(1_500)]
    timed = Output(topic, b"key", b"timed", timestamp_ms=1_700_000_000_000)
    headed = Output(topic, b"key", b"headed", headers=[("name", b"value")])
    outputs = [
        *plain[:1_200],
        timed,
        headed,
        *plain[1_200:],
        Output(topic, None, b"here", 1),
        Output(topic, b"key", None),
    ]
    pin, session = corner.join(), corner.session(corner.name)
    session.begin()
    session.produce(Outgoing(outputs))
    written = session.produce_changelog(*corner.changelog, [(b"a", b"1", None), (b"b", None, None), (b"a", b"2", 7)])
    session.flush()
    session.send_offsets([Consumed(*corner.input, 1)], pin)
    session.end()
    assert written.offset == 2
    reader = Consumer({**corner.config, "group.id": f"{corner.name}-reader", "enable.auto.commit": False})
    found = {}
    for partition in range(2):
        reader.assign([TopicPartition(topic, partition, 0)])
        found[partition] = reader.consume(len(outputs), timeout=5)
    reader.close()
    [at] = [partition for partition in found if len(found[partition]) > 1]
    values = [message.value() for message in found[at]]
    expected = [output.value for output in outputs if output.partition is None]
    if at == 1:  # the one for partition 1 came before the last
        expected.insert(-1, b"here")
    else:
        assert [message.value() for message in found[1]] == [b"here"]
    assert values == expected
    assert found[at][1_200].timestamp()[1] == timed.timestamp_ms
    assert found[at][1_201].headers() == headed.headers


@pytest.mark.parametrize("by", ["session", "outbox"])
def test_the_beginning_of_1970_is_not_now(corner: Corner, by: str) -> None:
    """Restored, a row of that time would close the windows of all that came after it, but for today's."""
    sending: Session | Outbox
    if by == "session":
        sending = corner.session(corner.name)
        sending.begin()
        sending.produce(Outgoing([Output(corner.input[0], b"a", b"1", 0, 0)]))
    else:
        sending = Outbox({**corner.config, "acks": "all"}, retries=True, timeout_s=10.0)
        sending.produce(Output(corner.input[0], b"a", b"1", 0, 0))
    sending.produce_changelog(*corner.changelog, [(b"a", b"1", 0), (b"b", b"1", 0)])
    sending.flush()
    if isinstance(sending, Session):
        sending.end()
    reader = Consumer({**corner.config, "group.id": f"{corner.name}-reader", "enable.auto.commit": False})
    reader.assign([TopicPartition(*corner.input, 0), TopicPartition(*corner.changelog, 0)])
    found = reader.consume(3, timeout=30)
    reader.close()
    sending.close()
    assert [message.timestamp()[1] for message in found] == [1, 1, 1]


def test_a_pending_offset_is_waited_for(corner: Corner) -> None:
    """Starting at the old offset would do again what a transaction about to commit has done."""
    pin = corner.join()
    session = corner.session(f"{corner.name}-live")
    session.begin()
    session.send_offsets([Consumed(*corner.input, 5)], pin)
    ending = threading.Thread(target=session.end)
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            ending.start()
        return False

    fenced: list[str] = []
    stable = corner.offsets.stable([corner.input], fenced.append, ask)
    ending.join()
    assert fenced == [], "a live worker on a slow machine, which then had to start its partitions anew"
    assert stable[corner.input].offset == 5
    assert stable[corner.input].owner == Owner(f"{corner.name}-live", pin.member_id)


def test_the_transaction_of_a_dead_worker_is_fenced_by_the_name_on_its_last_offset(corner: Corner) -> None:
    """Without that the partition stands still until the broker times the transaction out."""
    pin = corner.join()
    dead = corner.session(f"{corner.name}-dead")
    dead.begin()
    dead.send_offsets([Consumed(*corner.input, 3)], pin)
    dead.end()
    dead.begin()
    dead.send_offsets([Consumed(*corner.input, 5)], pin)
    corner.consumer.close()
    own = corner.exactly_once("own")
    fenced: list[str] = []

    def on_fence(transactional_id: str) -> None:
        fenced.append(transactional_id)
        own.fence(transactional_id)

    stable = corner.offsets.stable([corner.input], on_fence)
    assert stable[corner.input].offset == 3
    assert fenced == [f"{corner.name}-dead"]


def test_high_watermarks_count_open_transactions(corner: Corner) -> None:
    """Restored up to the last stable offset only, a table would miss what is committed a moment later."""
    session = corner.session(f"{corner.name}-open")
    session.begin()
    session.produce(Outgoing([Output(*corner.changelog[:1], b"k", b"v", 0)]))
    session.flush()
    assert corner.offsets.high_watermarks([corner.changelog]) == {corner.changelog: 1}
    consumer = Consumer({**corner.config, "group.id": "x", "isolation.level": "read_committed"})
    try:
        consumer.assign([TopicPartition(*corner.changelog)])
        assert consumer.get_watermark_offsets(TopicPartition(*corner.changelog), timeout=10)[1] == 0
    finally:
        consumer.close()


@pytest.mark.parametrize("outcome", ["commit", "abort"])
def test_a_restore_waits_for_open_transactions_below_its_end(corner: Corner, outcome: str) -> None:
    """It would miss a value that was written before it began and committed while it ran."""
    corner.produce(corner.changelog[0], 10)
    pin = corner.join()
    session = corner.session(f"{corner.name}-open")
    session.begin()
    session.produce(Outgoing([Output(corner.changelog[0], b"k0", b"open", 0)]))
    session.flush()
    session.send_offsets([Consumed(*corner.input, 1)], pin)
    store = corner.store()
    ends = corner.offsets.high_watermarks([corner.changelog])
    assert ends[corner.changelog] == 11
    thread = threading.Thread(
        target=restore,
        args=(corner.reading, {corner.changelog: store}, {corner.changelog: 0}, ends, Restoring(), lambda: False),
    )
    thread.start()
    wait_until(lambda: store.checkpoint is not None and store.checkpoint.offset == 9, "restored up to the open one")
    assert thread.is_alive()
    if outcome == "commit":
        session.end()
    else:
        session.open()  # a new producer under the same id aborts what is open
    thread.join(30)
    assert not thread.is_alive()
    assert store.get(b"k0") == (b"open" if outcome == "commit" else b"v0")


def test_a_restore_goes_on_behind_what_was_deleted(corner: Corner) -> None:
    """Where a changelog loses its beginning before it was read, stock Faust reads from its end, and waits for ever."""
    topic = f"{corner.name}-cut"
    for future in corner.admin.create_topics([NewTopic(topic, 1, 1, config={"cleanup.policy": "delete"})]).values():
        future.result(30)
    corner.produce(topic, 10)
    for future in corner.admin.delete_records([TopicPartition(topic, 0, 6)]).values():
        future.result(30)
    store = corner.store()
    restore(corner.reading, {(topic, 0): store}, {(topic, 0): 0}, {(topic, 0): 10}, Restoring(), lambda: False)
    assert [key for key, _ in store.items()] == [b"k6", b"k7", b"k8", b"k9"]
    assert store.checkpoint is not None
    assert store.checkpoint.offset == 9


def test_a_restore_can_be_cancelled(corner: Corner) -> None:
    """A rebalance in the middle of a long restore would hold up the whole group."""
    session = corner.session(f"{corner.name}-open")
    session.begin()
    session.produce(Outgoing([Output(corner.changelog[0], b"k0", b"open", 0)]))
    session.flush()
    started_s = time.monotonic()
    restore(
        corner.reading,
        {corner.changelog: corner.store()},
        {corner.changelog: 0},
        {corner.changelog: 1},
        Restoring(),
        lambda: time.monotonic() > started_s + 0.5,
    )


def test_a_restore_that_is_over_at_once_says_nothing_of_it(corner: Corner) -> None:
    """When two rebalances come close to each other. A reader of aiokafka's raised CancelledError in 3 of 10 of them."""
    corner.produce(corner.changelog[0], 1)
    store = corner.store()
    for _ in range(30):
        restore(
            corner.reading,
            {corner.changelog: store},
            {corner.changelog: 0},
            {corner.changelog: 1},
            Restoring(),
            lambda: True,
        )


def test_a_restore_says_how_far_it_is(corner: Corner) -> None:
    """After the disk of a container is gone, somebody waits, and wants to know for how long."""
    corner.produce(corner.changelog[0], 5)
    progress, seen = Restoring(), []

    def look() -> bool:
        seen.append((progress.done, progress.total))
        return False

    ends = corner.offsets.high_watermarks([corner.changelog])
    restore(corner.reading, {corner.changelog: corner.store()}, {corner.changelog: 1}, ends, progress, look)
    total = ends[corner.changelog] - 1
    assert seen[0] == (0, total)
    assert (progress.done, progress.total, progress.records) == (total, total, 4)
    assert progress.remaining_s is None, "over"


def test_what_a_restore_takes_still_is_told_by_what_it_took(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A number that jumps about, or is wrong by an order, is none."""
    caplog.set_level("INFO")
    now_s = 100.0
    monkeypatch.setattr("streams_app.restore.time.monotonic", lambda: now_s)
    progress = Restoring()
    progress.begin(
        {("one", 0): 0, ("two", 0): 50, ("three", 0): 7}, {("one", 0): 100, ("two", 0): 150, ("three", 0): 7}
    )
    assert progress.total == 200
    assert progress.remaining_s is None, "nothing is known yet"
    progress.applied(10, 50)
    now_s += 5
    assert progress.remaining_s == 15
    assert progress.text == "50 of 200 changelog offsets restored (25 %), about 15 s to go"
    progress.applied(1_990, 150)
    progress.end()
    assert progress.remaining_s is None, "over"
    assert RESTORED.findall(caplog.text) == [("2,000", "5.00")]


@pytest.mark.parametrize("error", ["no leader", None])
def test_an_end_that_nobody_knows_is_no_end(corner: Corner, monkeypatch: pytest.MonkeyPatch, error: str | None) -> None:
    """Taken for one, what is said of a partition without a leader would leave a written table empty."""
    answer = SimpleNamespace(topic=corner.changelog[0], partition=0, offset=-1, error=error)
    reader = SimpleNamespace(offsets_for_times=lambda *_, **__: [answer])
    monkeypatch.setitem(corner.offsets.__dict__, "_reader", reader)
    with pytest.raises(KafkaUnreachable, match="do not say"):
        corner.offsets.high_watermarks([corner.changelog])
    monkeypatch.undo()


def start(corner: Corner, pin: Pin, *, from_latest: bool = False) -> dict[tuple[str, int], int]:
    starter = Start(corner.offsets, corner.exactly_once("start"), corner.reading, from_latest=from_latest)
    return starter.run(pin, [corner.input], {corner.changelog: corner.store()}, lambda: False).positions


@pytest.mark.parametrize(("from_latest", "expected"), [(False, 0), (True, 10)])
def test_the_first_start_is_committed_before_anything_is_delivered(
    corner: Corner, from_latest: bool, expected: int
) -> None:
    """Resolved again after an abort, 'latest' would skip what came meanwhile."""
    corner.produce(corner.input[0], 10)
    pin = corner.join()
    assert start(corner, pin, from_latest=from_latest) == {corner.input: expected}
    corner.produce(corner.input[0], 10)
    assert start(corner, pin, from_latest=from_latest) == {corner.input: expected}
    stable = corner.offsets.stable([corner.input], lambda _: None)
    assert stable[corner.input] == (expected, Owner(f"{corner.name}-start", pin.member_id).text)


def test_a_start_under_an_old_membership_is_refused_by_the_broker(corner: Corner) -> None:
    """A member of yesterday would put the offsets back."""
    pin = corner.join()
    with pytest.raises(PartitionsLost):
        start(corner, pin._replace(generation=pin.generation - 1))
    with pytest.raises(PartitionsLost):
        start(corner, pin._replace(member_id="somebody"))


def commit(corner: Corner, offset: int) -> None:
    """Set the group's offset by force."""
    producer = Producer({**corner.config, "transactional.id": f"{corner.name}-force"})
    producer.init_transactions(10)
    producer.begin_transaction()
    metadata = unfenced_group_metadata(Pin(corner.name, -1, ""))
    producer.send_offsets_to_transaction([TopicPartition(*corner.input, offset)], metadata, 10)
    producer.commit_transaction(10)


def test_input_that_was_deleted_before_it_was_processed_refuses_to_start(corner: Corner) -> None:
    """aiokafka would reset its position silently: events are lost and nobody is told."""
    corner.produce(corner.input[0], 10)
    commit(corner, 3)
    [future] = corner.admin.delete_records([TopicPartition(*corner.input, 8)]).values()
    future.result(30)
    with pytest.raises(StartRefused, match="deleted before they were processed"):
        start(corner, corner.join())


def test_an_input_topic_created_anew_refuses_to_start(corner: Corner) -> None:
    """The old offset lies beyond its end: the first events would be skipped."""
    commit(corner, 30)
    corner.produce(corner.input[0], 10)
    with pytest.raises(StartRefused, match="created anew"):
        start(corner, corner.join())


def test_expired_offsets_with_a_full_table_refuse_to_start(corner: Corner) -> None:
    """Reading the input from its beginning would apply everything a second time."""
    corner.produce(corner.changelog[0], 1)
    with pytest.raises(StartRefused, match="expired"):
        start(corner, corner.join())


async def test_every_partition_has_its_turn(corner: Corner) -> None:
    """With a backlog and a rebalance every now and then, the one that aiokafka empties last would never be read."""
    [both] = corner.admin.create_topics([NewTopic(f"{corner.name}-two", 2, 1)]).values()
    both.result(30)
    tps = [TP(f"{corner.name}-two", partition) for partition in range(2)]
    producer = Producer(corner.config)
    for number in range(200):
        producer.produce(tps[0].topic, b"v", b"k", number % 2)
    assert producer.flush(30) == 0
    consumer = AIOKafkaConsumer(**corner.aiokafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([AioTopicPartition(*tp) for tp in tps])
        thread = object.__new__(ConsumerThread)
        thread._ensure_consumer = lambda: consumer  # type: ignore[method-assign]
        thread.live_pin = lambda: Pin("group", 1, "member")  # type: ignore[method-assign]
        # Both are there before the first is taken, or it would be taken alone.
        for tp in tps:
            await consumer.getone(AioTopicPartition(*tp))
        turns = [[*(await thread.fetch(tps, 5_000, 10)).messages] for _ in range(6)]
    finally:
        await consumer.stop()
    assert turns in ([[tps[0]], [tps[1]]] * 3, [[tps[1]], [tps[0]]] * 3)


async def test_a_fetcher_that_an_error_has_ended_is_begun_anew(corner: Corner) -> None:
    """Nobody would read a record any more, and heartbeats go on: a partition lay still for as long as the lab waited."""

    async def fail() -> None:
        raise AssertionError("of aiokafka's own")

    consumer = AIOKafkaConsumer(**corner.aiokafka, auto_offset_reset="none")
    await consumer.start()
    try:
        prepare_fetcher(consumer)
        consumer.assign([AioTopicPartition(*corner.input)])
        consumer.seek(AioTopicPartition(*corner.input), 0)
        fetcher = consumer._fetcher
        deadline_s = time.monotonic() + 30
        while not fetcher._in_flight and time.monotonic() < deadline_s:  # noqa: ASYNC110 - aiokafka tells nobody
            await asyncio.sleep(0.01)
        fetcher._pending_tasks.add(asyncio.ensure_future(fail()))
        while not fetcher._fetch_task.done() and time.monotonic() < deadline_s:
            fetcher._notify(fetcher._wait_consume_future)
            await asyncio.sleep(0.01)
        assert fetcher._fetch_task.done()
        # Not before: aiokafka does not look at what failed beside a fetch that brought records.
        corner.produce(corner.input[0], 3)
        with pytest.raises(AioKafkaError, match="of aiokafka's own"):
            revive_fetcher(consumer)
        consumer.seek(AioTopicPartition(*corner.input), 1)
        found = await consumer.getmany(AioTopicPartition(*corner.input), timeout_ms=30_000)
        running = fetcher._fetch_task
        revive_fetcher(consumer)
        assert fetcher._fetch_task is running, "one that goes on is left alone"
    finally:
        await consumer.stop()
    assert [record.offset for record in found[AioTopicPartition(*corner.input)]] == [1, 2]


async def test_a_position_that_is_missed_twice_does_not_end_the_fetcher(corner: Corner) -> None:
    """Asked for by the old leader of the partition, and by the new one, while the coordinator was slow."""
    consumer = AIOKafkaConsumer(**corner.aiokafka, auto_offset_reset="none")
    await consumer.start()
    try:
        prepare_fetcher(consumer)
        kafka_tp = AioTopicPartition(*corner.input)
        consumer.assign([kafka_tp])
        fetcher, assignment = consumer._fetcher, consumer._subscription.subscription.assignment
        await fetcher._update_fetch_positions(assignment, 1, [kafka_tp])
        await fetcher._update_fetch_positions(assignment, 1, [kafka_tp])
        assert not fetcher._fetch_task.done()
    finally:
        await consumer.stop()


def test_a_coordinator_that_is_found_late_does_not_end_the_process(corner: Corner) -> None:
    """An assertion of librdkafka's does, if the question's time-out was over: brokers that were away for so long suffice."""
    pin = corner.join()
    port, broker = free_port(), int(corner.config["bootstrap.servers"].rpartition(":")[2])
    asks = (
        "import sys\n"
        "from streams_app import offsets\n"
        "from streams_app.errors import KafkaUnreachable\n"
        "asked = offsets.Offsets({'bootstrap.servers': sys.argv[1], 'log_level': 0}, sys.argv[2])\n"
        "offsets._REQUEST_TIMEOUT_S = 1.0\n"
        "try:\n"
        "    asked.members()\n"
        "except KafkaUnreachable:\n"
        "    print('nobody answers', flush=True)\n"
        "offsets._REQUEST_TIMEOUT_S = 60.0\n"
        "print(*asked.members())\n"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", asks, f"127.0.0.1:{port}", corner.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asking.stdout is not None
    assert asking.stdout.readline() == "nobody answers\n"
    wire = Wire([(port, broker)]).start()
    try:
        said, errors = asking.communicate(timeout=90)
    finally:
        wire.close()
        asking.kill()
    assert (asking.returncode, said, errors) == (0, f"{pin.member_id}\n", "")
