"""Writing generated input: at a steady rate, or as fast as it goes, until every record is acknowledged.

The records come from the generators that agents registered; this module knows none of them by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from threading import Event
from typing import Any, TypeAlias

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from rich.console import Console

from streams_app.errors import ConfigurationError, KafkaUnreachable, StreamsAppError
from streams_app.kafka import KafkaAddress
from streams_app.partitioning import partition_of
from streams_app.progress import shown_count
from streams_app.registry import Generator, Record, find_generator

#: How long the producer tries to get a record to the brokers: a broker that restarts is back by then.
_DELIVERY_TIMEOUT_S = 60.0
_METADATA_TIMEOUT_S = 10.0
#: At a steady rate records leave in bursts this long: short enough to look steady, long enough not to busy the CPU.
_TICK_S = 0.01
#: Without a rate, records between two looks at the acknowledgements.
_BURST_RECORDS = 1_000

#: Called now and then with a feed that runs, and once when it is through.
OnProgress: TypeAlias = Callable[["Feed"], None]


class NotDeliveredError(StreamsAppError):
    """Records were refused by the brokers; the text says how many and why."""


@dataclass(frozen=True)
class Plan:
    """What to write."""

    name: str
    #: Records in all; None: until stopped.
    count: int | None = None
    #: Records per second; None: as fast as it goes.
    rate: float | None = None
    keys: int = 1_000
    seed: int = 1

    def __post_init__(self) -> None:
        for option, number in (("--count", self.count), ("--rate", self.rate), ("--keys", self.keys)):
            if number is not None and number <= 0:
                raise ConfigurationError(f"{option} is {number}; it must be above 0")

    def records(self) -> Iterator[Record]:
        """The records; endless without a count. The same plan gives the same records."""
        # Seeded with the name as well: two inputs of one run are not each other's echo.
        return islice(self.generator.records(Random(f"{self.name} {self.seed}"), self.keys), self.count)  # noqa: S311

    @property
    def generator(self) -> Generator:
        """The registered generator.

        Raises:
            ConfigurationError: there is none of that name.
        """
        return find_generator(self.name)


class Feed:
    """One run of a plan. `run` blocks; the counters may be read from other threads meanwhile."""

    def __init__(self, plan: Plan, address: KafkaAddress, prefix: str = "") -> None:
        """Raises `ConfigurationError` if no generator has the plan's name."""
        self.plan = plan
        self.topic = prefix + plan.generator.topic
        #: Records handed to the producer.
        self.produced = 0
        #: Records that the brokers have, on all replicas in sync.
        self.acknowledged = 0
        self._failed = 0
        self._failure: KafkaError | None = None
        self._address = address

    def run(self, stop: Event, on_progress: OnProgress = lambda feed: None) -> None:
        """Write the records until the count is reached or ``stop`` is set, then wait until all are acknowledged.

        Raises:
            KafkaUnreachable: no broker answers, or none did until the records' time ran out.
            ConfigurationError: the topic does not exist.
            NotDeliveredError: the brokers refused records.
        """
        self._address.check(_METADATA_TIMEOUT_S)
        producer = Producer(self._config())
        partitions = self._partitions(producer)
        try:
            self._produce(producer, partitions, stop, on_progress)
            self._flush(producer, on_progress)
        finally:
            producer.purge()
        on_progress(self)

    def _config(self) -> dict[str, Any]:
        return {
            **self._address.librdkafka(),
            "partitioner": "murmur2_random",
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 10,
            "compression.type": "lz4",
            "delivery.timeout.ms": int(_DELIVERY_TIMEOUT_S * 1000),
            "log_level": 0,
        }

    def _partitions(self, producer: Producer) -> int:
        # All topics, not just this one: asking for one by name may create it.
        topics = producer.list_topics(timeout=_METADATA_TIMEOUT_S).topics
        if self.topic not in topics:
            raise ConfigurationError(
                f"the topic {self.topic!r} does not exist at {self._address.servers}; create the topics with "
                "`faust -A streams_app provision`, or start a worker, and check KAFKA_PREFIX"
            )
        return len(topics[self.topic].partitions)

    def _produce(self, producer: Producer, partitions: int, stop: Event, on_progress: OnProgress) -> None:
        records = self.plan.records()
        started_s = time.monotonic()
        while not stop.is_set():
            burst = list(islice(records, self._due(time.monotonic() - started_s)))
            for record in burst:
                self._send(producer, record, partitions)
            producer.poll(0)
            self._check()
            on_progress(self)
            if self.plan.rate is not None:
                stop.wait(_TICK_S)
            if self.produced == self.plan.count:
                return

    def _due(self, elapsed_s: float) -> int:
        if self.plan.rate is None:
            return _BURST_RECORDS
        # A bound, so that after a pause (of the brokers, of this machine) the backlog goes out in bursts as well.
        return min(int(elapsed_s * self.plan.rate) + 1 - self.produced, 10 * _BURST_RECORDS)

    def _send(self, producer: Producer, record: Record, partitions: int) -> None:
        partition = -1
        if record.misplaced:
            partition = (partition_of(record.key or b"", partitions) + 1) % partitions
        while True:
            try:
                producer.produce(self.topic, record.value, record.key, partition, on_delivery=self._on_delivery)
            except BufferError:
                # The queue is full: its records are acknowledged, or fail, within their delivery time-out.
                producer.poll(0.1)
                self._check()
            else:
                self.produced += 1
                return

    def _flush(self, producer: Producer, on_progress: OnProgress) -> None:
        deadline_s = time.monotonic() + _DELIVERY_TIMEOUT_S + _METADATA_TIMEOUT_S
        while producer.flush(0.2):
            on_progress(self)
            self._check()
            if time.monotonic() > deadline_s:
                raise KafkaUnreachable(
                    f"{self.produced - self.acknowledged} records for {self.topic} are not acknowledged after "
                    f"{_DELIVERY_TIMEOUT_S + _METADATA_TIMEOUT_S:g} s; is Kafka at {self._address.servers} still up?"
                )
        self._check()

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is None:
            self.acknowledged += 1
        else:
            self._failed += 1
            self._failure = error

    def _check(self) -> None:
        if self._failure is None:
            return
        text = f"{self._failed} records for {self.topic} were not taken: {self._failure.str()}"
        # Timed out locally: nobody answered for the whole of the delivery time-out.
        if self._failure.code() in {KafkaError._MSG_TIMED_OUT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT}:
            raise KafkaUnreachable(f"{text}; is Kafka at {self._address.servers} still up?")
        raise NotDeliveredError(text) from KafkaException(self._failure)


def generate(
    plan: Plan, address: KafkaAddress, prefix: str = "", *, stop: Event | None = None, console: Console
) -> Feed:
    """Run ``plan`` and show how far it is: a bar on a terminal, plain lines elsewhere.

    Returns:
        the feed, through: ``feed.acknowledged`` records are in ``feed.topic``.

    Raises:
        KafkaUnreachable, ConfigurationError, NotDeliveredError: as `Feed.run`.
    """
    feed = Feed(plan, address, prefix)
    with shown_count(console, feed.topic, "records written", plan.count) as show:
        feed.run(stop or Event(), lambda feed: show(feed.acknowledged))
    return feed
