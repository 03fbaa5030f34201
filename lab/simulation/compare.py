"""The model held against a real Kafka: the same requests, one after the other, and what comes of them.

Producers of one transactional id begin, produce, send offsets, commit and abort; a second one takes over, and the first goes
on. Compared are the class of each error, and at the end committed records and offsets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from random import Random
from typing import Any, Literal, NamedTuple, TypeAlias

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from faust.types import TP

from lab.simulation import clients
from lab.simulation.broker import Broker
from lab.simulation.group import Group
from lab.simulation.process import Process
from lab.simulation.seams import Clock, seams
from lab.simulation.world import World
from streams_app.kafka import KafkaAddress
from streams_app.session import Pin, unfenced_group_metadata

Call: TypeAlias = Literal["init", "begin", "produce", "flush", "offsets", "stray offsets", "commit", "abort"]
_TIMEOUT_S = 20.0
_PARTITIONS = 2
_FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
_GROUP = frozenset({KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION})


class Step(NamedTuple):
    """A call of one of the two producers; ``number`` is the partition, value and offset that it uses."""

    producer: int
    call: Call
    number: int


class Result(NamedTuple):
    """What came of a script."""

    answers: list[str]
    #: Committed values of each partition.
    records: list[list[bytes]]
    offset: int | None


def script(seed: int) -> list[Step]:
    """Transactions of one producer; then, as a rule in the middle of one, a second takes over, and the first goes on."""
    random, steps = Random(seed), [Step(0, "init", 0), Step(0, "begin", 0)]
    for number in range(1, random.randrange(3, 9)):
        steps += [Step(0, call, number) for call in _transaction(random)]
    if random.random() < 0.8:
        steps = steps[: random.randrange(1, len(steps) + 1)]
        steps.append(Step(1, "init", 0))
        steps += [Step(0, call, 100 + at) for at, call in enumerate(_transaction(random))]
        steps += [Step(1, call, 200) for call in ("begin", *_transaction(random))]
    return steps


def _transaction(random: Random) -> list[Call]:
    calls: list[Call] = ["produce", "flush"] * random.randrange(0, 3)
    if random.random() < 0.7:
        calls.append("stray offsets" if random.random() < 0.2 else "offsets")
    return [*calls, "abort" if random.random() < 0.3 else "commit", "begin"]


def run_on_kafka(url: str, steps: list[Step], name: str) -> Result:
    """Run on a real Kafka; ``name`` is for topic, group and transactional id, and new."""
    config = KafkaAddress.parse(url).librdkafka()
    admin = AdminClient(config)
    [created] = admin.create_topics([NewTopic(name, _PARTITIONS, 1)]).values()
    created.result(30)
    producing = {**config, "transactional.id": name, "transaction.timeout.ms": 60_000, "linger.ms": 0, "log_level": 0}
    producers = [Producer(producing), Producer(producing)]
    answers = [_answer(producers[step.producer], step, name) for step in steps]
    _end_open(producers[1], lambda: Producer(producing))
    reader = Consumer({**config, "group.id": name, "isolation.level": "read_committed", "enable.partition.eof": True})
    try:
        committed = _committed(reader, TopicPartition(name, 0))
        records = [_read(reader, name, partition) for partition in range(_PARTITIONS)]
    finally:
        reader.close()
    return Result(answers, records, committed.offset if committed.offset >= 0 else None)


def _committed(reader: Consumer, at: TopicPartition) -> TopicPartition:
    """A broker that has only just begun to coordinate the group says for a moment that it does not."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return reader.committed([at], timeout=_TIMEOUT_S)[0]
        except KafkaException as error:
            if error.args[0].code() != KafkaError.NOT_COORDINATOR or time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _end_open(_last: Any, new_producer: Callable[[], Any]) -> None:
    """What is open at the end is aborted by one more producer."""
    new_producer().init_transactions(_TIMEOUT_S)


def _read(reader: Consumer, topic: str, partition: int) -> list[bytes]:
    reader.assign([TopicPartition(topic, partition, 0)])
    found, deadline_s = [], time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        message = reader.poll(0.2)
        if message is not None and message.error() is None:
            found.append(message.value() or b"")
        elif message is not None:
            break  # the end
    return found


def run_on_model(steps: list[Step], name: str) -> Result:
    """Run on the model."""
    with seams() as clock:
        return _run_on_model(clock, steps, name)


def _run_on_model(clock: Clock, steps: list[Step], name: str) -> Result:
    clock.world = world = World({})
    partitions = [TP(name, number) for number in range(_PARTITIONS)]
    group = Group(name, partitions)
    broker = Broker(partitions, group, lambda _what, action: action(), lambda _delay_s, _action: None)
    process = _Bare(world, broker)
    config = {"transactional.id": name, "transaction.timeout.ms": 60_000, "logger": logging.getLogger("model")}
    producers: list[Any] = [clients.TransactionalProducer(process, config) for _ in range(2)]
    answers = [_answer(producers[step.producer], step, name) for step in steps]
    _end_open(producers[1], lambda: clients.TransactionalProducer(process, config))
    records = [[record.value or b"" for record in broker.logs[tp].records if record.outcome] for tp in partitions]
    stored = group.offsets.get(TP(name, 0))
    return Result(answers, records, None if stored is None else stored.offset)


class _Bare(Process):
    """A process with nothing but a clock and a broker."""

    def __init__(self, world: Any, broker: Any) -> None:
        self.world, self.broker, self.name = world, broker, "producer"

    def sleep(self, seconds: float) -> None:
        self.world.wait(seconds)


def _answer(producer: Any, step: Step, name: str) -> str:
    """The class of what a call answers."""
    try:
        _call(producer, step, name)
    except KafkaException as error:
        code = error.args[0].code()
        if code in _FENCED:
            return "fenced"
        if code in _GROUP:
            return "not a member"
        return "fatal" if error.args[0].fatal() else "not now" if code == KafkaError._STATE else error.args[0].name()
    return "ok"


def _call(producer: Any, step: Step, name: str) -> None:
    match step.call:
        case "init":
            producer.init_transactions(_TIMEOUT_S)
        case "begin":
            producer.begin_transaction()
        case "produce":
            producer.produce(name, b"%d" % step.number, b"key", step.number % _PARTITIONS)
        case "flush":
            producer.flush(_TIMEOUT_S)
        case "offsets" | "stray offsets":
            pin = Pin(name, -1, "") if step.call == "offsets" else Pin(name, 5, "nobody")
            offsets = [TopicPartition(name, 0, step.number)]
            producer.send_offsets_to_transaction(offsets, unfenced_group_metadata(pin), _TIMEOUT_S)
        case "commit":
            producer.commit_transaction(_TIMEOUT_S)
        case "abort":
            producer.abort_transaction(_TIMEOUT_S)
