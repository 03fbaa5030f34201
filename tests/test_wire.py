"""The wire between one worker and the brokers, against a real broker."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from lab.wire import Api, Wire
from streams_app.embedded import EmbeddedKafka, free_port
from streams_app.kafka import KafkaAddress
from streams_app.session import Outgoing, Output, Session
from tests.rig import wait_until

WAIT_S = 60
FOREVER_S = 3600.0


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """One broker, with one wire."""
    with EmbeddedKafka.ensure(tmp_path_factory.mktemp("wired"), port=free_port(), wires=1) as kafka:
        yield kafka


@pytest.fixture
def wire(kafka: EmbeddedKafka) -> Iterator[Wire]:
    """The test's own, without faults."""
    with Wire(kafka.wires[0]) as wire:
        yield wire


@pytest.fixture
def topic(kafka: EmbeddedKafka) -> str:
    """A new topic of one partition."""
    name = f"t-{uuid4().hex[:8]}"
    admin = AdminClient(config(kafka.url))
    for future in admin.create_topics([NewTopic(name, 1)], operation_timeout=WAIT_S).values():
        future.result(WAIT_S)
    return name


def config(url: str) -> dict[str, Any]:
    return KafkaAddress.parse(url).librdkafka()


def producer(url: str, **more: Any) -> Producer:
    """One that knows the brokers already, and comes back to them quickly."""
    quick = {"reconnect.backoff.max.ms": 200, "log_level": 0}
    made = Producer({**config(url), "enable.idempotence": True, **quick, **more})
    made.list_topics(timeout=WAIT_S)
    return made


def transactional(url: str, topic: str) -> Producer:
    """One that may begin; an earlier one of the same topic is fenced off."""
    made = producer(url, **{"transactional.id": topic, "transaction.timeout.ms": 10_000})
    made.init_transactions(WAIT_S)
    return made


def write(url: str, topic: str, value: str) -> None:
    """By a client of its own."""
    its = producer(url)
    its.produce(topic, value)
    assert its.flush(WAIT_S) == 0


def committed(kafka: EmbeddedKafka, topic: str) -> list[str]:
    """What a client that is not on the wire reads, up to the last stable offset."""
    reader = Consumer(
        {**config(kafka.url), "group.id": "reader", "enable.partition.eof": True, "enable.auto.commit": False}
    )
    reader.assign([TopicPartition(topic, 0, 0)])
    values: list[str] = []
    try:
        while True:
            message = reader.poll(WAIT_S)
            assert message is not None
            if message.error():
                assert message.error().code() == KafkaError._PARTITION_EOF
                return values
            values.append(message.value().decode())
    finally:
        reader.close()


def in_thread(call: Callable[..., object], *args: object) -> list[object]:
    """Call it; its value or error stands in the list when it has returned."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call(*args))
        except KafkaException as error:
            outcome.append(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def test_whoever_starts_on_the_wire_stays_on_it_and_nobody_else_is_there(
    kafka: EmbeddedKafka, wire: Wire, topic: str
) -> None:
    """A fault of one worker's wire would miss the connections that it learns of later, or hit other workers."""
    brokers = producer(wire.url).list_topics(timeout=WAIT_S).brokers.values()
    assert [f"kafka://{broker.host}:{broker.port}" for broker in brokers] == [wire.url]
    write(wire.url, topic, "by wire")
    assert wire.requests[Api.PRODUCE] == 1
    write(kafka.url, topic, "past it")
    assert wire.requests[Api.PRODUCE] == 1
    assert committed(kafka, topic) == ["by wire", "past it"]


def test_a_producer_goes_on_after_a_cut(kafka: EmbeddedKafka, wire: Wire, topic: str) -> None:
    """A cut that never heals, or that hits everybody, tells nothing about recovery."""
    mine = producer(wire.url)
    mine.produce(topic, "before")  # or it would have no connection that lasts
    assert mine.flush(WAIT_S) == 0
    wire.cut()
    assert wire.struck["cut"] > 0
    closed = wire.struck["cut"]
    mine.produce(topic, "mine")
    wait_until(lambda: mine.poll(0) is not None and wire.struck["cut"] > closed, "a new connection refused")
    write(kafka.url, topic, "of another")
    assert committed(kafka, topic) == ["before", "of another"]
    wire.heal()
    wire.heal()
    assert mine.flush(WAIT_S) == 0
    assert committed(kafka, topic) == ["before", "of another", "mine"]


def test_nothing_passes_a_half_open_wire_and_the_end_of_it_is_a_reset(
    kafka: EmbeddedKafka, wire: Wire, topic: str
) -> None:
    """The most frequent trouble of real networks is the connection that stands and is dead."""
    mine = producer(wire.url)
    wire.half_open()
    mine.produce(topic, "mine")
    wait_until(lambda: mine.poll(0) is not None and wire.struck["half_open"] > 0, "a request held back")
    write(kafka.url, topic, "of another")
    assert committed(kafka, topic) == ["of another"]
    wire.heal()
    assert mine.flush(WAIT_S) == 0
    assert committed(kafka, topic) == ["of another", "mine"]


def test_what_is_delayed_arrives_in_its_order_and_at_once_when_healed(
    kafka: EmbeddedKafka, wire: Wire, topic: str
) -> None:
    """A wire that changes the order would find anomalies that no network can bring about."""
    mine = producer(wire.url, **{"linger.ms": 0})
    wire.delay(0.02)
    numbers = [str(number) for number in range(50)]
    for number in numbers:
        mine.produce(topic, number)
        mine.poll(0.002)
    assert mine.flush(WAIT_S) == 0
    assert wire.struck["delay"] > 0
    wire.delay(FOREVER_S)
    struck = wire.struck["delay"]
    mine.produce(topic, "last")
    wait_until(lambda: mine.poll(0) is not None and wire.struck["delay"] > struck, "a request held back")
    assert committed(kafka, topic) == numbers
    wire.heal()
    assert mine.flush(WAIT_S) == 0
    assert committed(kafka, topic) == [*numbers, "last"]


def test_a_lost_answer_of_end_txn_is_asked_for_again(kafka: EmbeddedKafka, wire: Wire, topic: str) -> None:
    """What librdkafka does by itself: its second EndTxn, on a new connection, must not do it twice."""
    mine = transactional(wire.url, topic)
    wire.lose_answers(Api.END_TXN, silence_s=0.2)
    mine.begin_transaction()
    mine.produce(topic, "once")
    mine.commit_transaction(WAIT_S)
    assert wire.struck["lose_answers"] == 1
    assert wire.requests[Api.END_TXN] >= 2  # more while the broker still writes the markers
    assert committed(kafka, topic) == ["once"]


def test_a_session_notices_that_its_end_was_sent_twice(wire: Wire, kafka: EmbeddedKafka, topic: str) -> None:
    """The first one, if it was only late, would end the next transaction of the same epoch: half of it."""
    session = Session(KafkaAddress.parse(wire.url).librdkafka(), f"{topic}-session")
    session.open()
    session.begin()
    session.produce(Outgoing([Output(topic, None, b"once", 0)]))
    session.flush()
    wire.lose_answers(Api.END_TXN, silence_s=0.2)
    session.end()
    assert session.broken
    assert committed(kafka, topic) == ["once"]
    session.close()


def test_a_commit_whose_answer_is_lost_for_long_fails_and_took_effect(
    kafka: EmbeddedKafka, wire: Wire, topic: str
) -> None:
    """Whoever takes the error for an abort and does it again has done it twice."""
    mine = transactional(wire.url, topic)
    wire.lose_answers(Api.END_TXN, silence_s=FOREVER_S)
    mine.begin_transaction()
    mine.produce(topic, "once")
    outcome = in_thread(mine.commit_transaction, 1.0)
    wait_until(lambda: wire.struck["lose_answers"] == 1, "the answer lost")
    assert committed(kafka, topic) == ["once"]
    wait_until(lambda: outcome, "the commit given up")
    assert isinstance(outcome[0], KafkaException), outcome
    wire.heal()
    transactional(wire.url, topic)
    assert committed(kafka, topic) == ["once"]


def test_a_commit_whose_answer_is_held_back_took_effect_meanwhile(kafka: EmbeddedKafka, wire: Wire, topic: str) -> None:
    """Readers see what its writer does not know of yet."""
    mine = transactional(wire.url, topic)
    wire.delay_answers(Api.END_TXN, FOREVER_S)
    mine.begin_transaction()
    mine.produce(topic, "once")
    outcome = in_thread(mine.commit_transaction, WAIT_S)
    wait_until(lambda: wire.struck["delay_answers"] == 1, "the answer held back")
    assert committed(kafka, topic) == ["once"]
    assert not outcome
    wire.heal()
    wait_until(lambda: outcome, "the commit confirmed")
    assert outcome == [None]


def test_a_wire_outlives_its_broker() -> None:
    """Brokers are killed and come back on their ports: the worker must notice both, through the wire."""
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        Wire([(free_port(), first.getsockname()[1])]) as wire,
        socket.create_connection(("127.0.0.1", wire.ports[0][0])) as client,
    ):
        first.accept()[0].close()
        assert client.recv(1) == b""
        first.close()
        with socket.create_connection(("127.0.0.1", wire.ports[0][0])) as later, pytest.raises(ConnectionResetError):
            later.recv(1)
        with (
            socket.create_server(("127.0.0.1", wire.ports[0][1])) as again,
            socket.create_connection(("127.0.0.1", wire.ports[0][0])) as later,
            again.accept()[0] as connection,
        ):
            connection.sendall(b"\0\0\0\4" + b"\0\0\0\1")
            assert later.recv(8, socket.MSG_WAITALL) == b"\0\0\0\4" + b"\0\0\0\1"


def test_what_was_sent_before_hanging_up_arrives_all_the_same() -> None:
    """A delayed EndTxn, whose sender gave up long ago, must be able to meet a later transaction."""
    first, second = (b"\0\0\0\x08" + b"\0\x1a\0\1" + b"\0\0\0" + number for number in (b"\1", b"\2"))
    with (
        socket.create_server(("127.0.0.1", 0)) as broker,
        Wire([(free_port(), broker.getsockname()[1])]) as wire,
        socket.create_connection(("127.0.0.1", wire.ports[0][0])) as client,
    ):
        client.sendall(first)
        connection, _ = broker.accept()
        with connection, connection.makefile("rb") as received:
            assert received.read(len(first)) == first
            wire.delay(FOREVER_S)
            connection.sendall(b"\0\0\0\4" + b"\0\0\0\1")
            client.sendall(second)
            wait_until(lambda: wire.struck["delay"] == 2, "answer and request held back")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            wire.heal()
            assert received.read() == second
        assert wire.requests == {Api.END_TXN: 2}


def test_a_wire_whose_port_is_taken_says_so() -> None:
    """The worker would talk to whoever listens there."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        Wire([(other.getsockname()[1], 1)]).start()
