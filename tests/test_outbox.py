"""Outputs that leave at once: what fails is learnt of before the offsets are committed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from confluent_kafka import KafkaError, Producer
from faust.types import TP

from streams_app.errors import OutputRefused, TransactionAborted
from streams_app.guarantees import AtMostOnce
from streams_app.outbox import Outbox
from streams_app.session import Output, Pin


class FakeProducer:
    """Takes records; tells of failures when flushed."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.records: list[tuple[Any, ...]] = []
        self.failures: list[int] = []
        self.silent = 0
        self.full = False

    def produce(self, *record: Any, **more: Any) -> None:
        if self.full:
            raise BufferError
        self.records.append(record)

    def flush(self, timeout_s: float) -> int:
        self.full = False
        for code in self.failures:
            self.config["on_delivery"](KafkaError(code), None)
        self.failures = []
        return self.silent


def outbox(*, retries: bool) -> tuple[Outbox, FakeProducer]:
    made: list[FakeProducer] = []

    def new_producer(config: dict[str, Any]) -> FakeProducer:
        made.append(FakeProducer(config))
        return made[-1]

    box = Outbox({}, retries=retries, new_producer=new_producer)
    return box, made[0]


def test_at_most_once_never_sends_again() -> None:
    """A record whose acknowledgement was lost would be there twice."""
    _, producer = outbox(retries=False)
    assert producer.config["message.send.max.retries"] == 0
    assert producer.config["enable.idempotence"] is False
    Producer({name: value for name, value in producer.config.items() if name != "on_delivery"})


def test_at_most_once_what_is_not_acknowledged_is_given_up_and_told() -> None:
    """Its event is lost, and nobody would know: lost silently."""
    figures: Counter[str] = Counter()
    guarantee = AtMostOnce({}, lambda _pin, _claims: None, 1.0, figures)
    guarantee._outbox, producer = outbox(retries=False)
    tp = TP("in", 0)
    guarantee._given_up = {tp: 0}
    batch = guarantee.new_batch(Pin("group", 1, "member"))
    batch.consumed[tp] = 2
    for _ in range(2):
        batch.send(Output("t", b"k", b"v"))
    producer.failures = [KafkaError._MSG_TIMED_OUT]
    guarantee.commit(batch)
    assert (guarantee._given_up, figures["given_up"]) == ({tp: 1}, 1)


def test_at_least_once_sends_until_all_replicas_have_it() -> None:
    """Acknowledged by a leader that then dies, an output would be lost."""
    _, producer = outbox(retries=True)
    assert producer.config["acks"] == "all"
    assert producer.config["enable.idempotence"] is True
    Producer({name: value for name, value in producer.config.items() if name != "on_delivery"})


@pytest.mark.parametrize(
    ("code", "raised"),
    [(KafkaError.MSG_SIZE_TOO_LARGE, OutputRefused), (KafkaError._MSG_TIMED_OUT, TransactionAborted)],
)
def test_a_failure_fails_the_batch_that_is_about_to_commit(code: int, raised: type[Exception]) -> None:
    """Committed without it, the output would be lost."""
    box, producer = outbox(retries=True)
    box.produce(Output("t", b"k", b"v"))
    producer.failures = [code]
    with pytest.raises(raised):
        box.flush_or_raise()
    box.flush_or_raise()  # told once


def test_silence_is_a_failure() -> None:
    """Nobody knows whether it arrived."""
    box, producer = outbox(retries=True)
    producer.silent = 2
    with pytest.raises(TransactionAborted):
        box.flush_or_raise()
    assert len(box.flush()) == 2


def test_a_full_queue_is_waited_for() -> None:
    """An agent that sends more than the brokers take at the moment is slowed down, not failed."""
    box, producer = outbox(retries=True)
    producer.full = True
    box.produce(Output("t", b"k", b"v"))
    assert len(producer.records) == 1
