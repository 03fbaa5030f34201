"""What the benchmarks share: a broker, runs that do not meet on it, input, and what became of it."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import psutil
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streams_app.embedded import EmbeddedKafka, free_port, shown_progress
from streams_app.kafka import KafkaAddress
from streams_app.supervisor import WorkerProcess

T = TypeVar("T")

PARTITIONS = 4
ACCOUNTS = 10_000
_CHECKOUT = Path(__file__).parent.parent
_DEADLINE_S = 300.0


@contextmanager
def own_broker() -> Iterator[tuple[EmbeddedKafka, Path]]:
    """A new broker, and a folder for the workers; both are gone at the end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        shown_progress() as progress,
        EmbeddedKafka.ensure(Path(folder), port=free_port(), progress=progress) as kafka,
    ):
        yield kafka, Path(folder)


def rotated(contenders: Sequence[T], number: int) -> Sequence[T]:
    """The order of round ``number``: nobody is always the first, nor always behind the same one."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


class Run:
    """One run of an app: its own prefix on the broker, and its own folder."""

    def __init__(self, kafka: EmbeddedKafka, folder: Path) -> None:
        self.kafka = kafka
        self.address = KafkaAddress.parse(kafka.url)
        self.prefix = f"b{uuid4().hex[:8]}-"
        self._folder = folder / f"{self.prefix}workers"
        self._folder.mkdir()

    def worker(self, name: str, app: str, **env: str) -> WorkerProcess:
        """A worker of the module ``app``; not started."""
        env = {
            "KAFKA_URL": self.kafka.url,
            "KAFKA_PREFIX": self.prefix,
            "STREAMS_APP_DATADIR": str(self._folder),
            "STREAMS_APP_SLOT": name,
            "PYTHONPATH": str(_CHECKOUT),
            **env,
        }
        arguments = ["-A", app, "worker", "-l", "info", "--without-web"]
        return WorkerProcess(name, "faust", arguments, self._folder / f"{name}.log", env)

    def create_topics(self, *names: str) -> None:
        new = [NewTopic(self.prefix + name, PARTITIONS, 1) for name in names]
        admin = AdminClient(self.address.librdkafka())
        for future in admin.create_topics(new).values():
            future.result(30)

    def producer(self, **options: Any) -> Producer:
        return Producer({**self.address.librdkafka(), "partitioner": "murmur2_random", **options})

    def reader(self, group: str, **options: Any) -> Consumer:
        """A consumer of what was committed."""
        config = {"group.id": self.prefix + group, "isolation.level": "read_committed", "enable.auto.commit": False}
        return Consumer({**self.address.librdkafka(), **config, **options})

    def fill(self, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Write keys and values, as fast as it goes."""
        producer = self.producer(**{"linger.ms": 20})
        for key, value in records:
            while True:
                try:
                    producer.produce(self.prefix + topic, value, key)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
        assert producer.flush(60) == 0

    def log_bytes(self, but: str) -> int:
        """Size of the run's topics on the broker's disk but for one, and of all transactions and committed offsets."""
        ours = (self.prefix, "__consumer_offsets-", "__transaction_state-")
        logs = (log for broker in self.kafka.brokers for log in broker.data.glob("*/*.log"))
        return sum(
            log.stat().st_size
            for log in logs
            if log.parent.name.startswith(ours) and not log.parent.name.startswith(f"{self.prefix}{but}-")
        )


def entries(count: int, first: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values for the bare app; ids begin at ``first``."""
    chance = random.Random(1)
    for number in range(first, first + count):
        account = f"account-{chance.randrange(ACCOUNTS)}"
        entry = {"id": number, "account": account, "amount": chance.randrange(1, 100)}
        yield account.encode(), json.dumps(entry).encode()


class Drained(NamedTuple):
    """What it took to work through an input, from the first committed offset that was seen to the last."""

    events: int
    seconds: float
    worker_cpu_s: float
    broker_cpu_s: float


def drain(run: Run, worker: WorkerProcess, group: str, inputs: Sequence[str], events: int) -> Drained:
    """Wait until the group has committed ``events`` of the first of ``inputs``, and all of the others."""
    consumer = run.reader(group)
    processes = [psutil.Process(worker.pid), psutil.Process(run.kafka.brokers[0].pid)]
    try:
        first = [TopicPartition(run.prefix + inputs[0], p) for p in range(PARTITIONS)]
        others = [TopicPartition(run.prefix + name, p) for name in inputs[1:] for p in range(PARTITIONS)]
        begun: tuple[float, ...] | None = None
        deadline_s = time.monotonic() + _DEADLINE_S
        while time.monotonic() < deadline_s and worker.alive:
            done = _committed(consumer, first)
            now = done, time.monotonic(), *(sum(process.cpu_times()[:2]) for process in processes)
            if done and begun is None:
                begun = now
            rest = sum(consumer.get_watermark_offsets(tp, timeout=10)[1] for tp in others)
            rest -= _committed(consumer, others) if others else 0
            if begun and done >= events and rest <= 0:
                return Drained(*(end - begin for begin, end in zip(begun, now, strict=True)))
            time.sleep(0.05)
    finally:
        consumer.close()
    raise SystemExit(f"{worker.name} did not finish (exit code {worker.exit_code}):\n{worker.last_lines()}")


def _committed(group: Consumer, partitions: list[TopicPartition]) -> int:
    """Sum of the committed offsets; 0 as long as the group's coordinator is being made."""
    try:
        return sum(max(0, tp.offset) for tp in group.committed(partitions, timeout=10))
    except KafkaException as error:
        if error.args[0].retriable() or error.args[0].code() == KafkaError.NOT_COORDINATOR:
            return 0
        raise


def committed_values(run: Run, *topics: str) -> Iterator[bytes]:
    """The values of all records that were committed."""
    consumer = run.reader("compare", **{"enable.partition.eof": True})
    try:
        consumer.assign([TopicPartition(run.prefix + topic, p, 0) for topic in topics for p in range(PARTITIONS)])
        unfinished = PARTITIONS * len(topics)
        while unfinished:
            for message in consumer.consume(10_000, 0.5):
                error = message.error()
                if error is None:
                    yield message.value() or b""
                elif error.code() == KafkaError._PARTITION_EOF:
                    unfinished -= 1
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()


def missing_and_repeated(values: Iterable[bytes], events: int) -> tuple[int, int]:
    """How many of the ids from 0 to ``events`` have no output, and how many outputs there are too many."""
    seen = Counter(json.loads(value)["id"] for value in values)
    return events - len(seen), seen.total() - len(seen)


class Spread(NamedTuple):
    """Median, lowest and highest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))


def ratios(ours: Sequence[float], base: Sequence[float]) -> Spread:
    """Of the pairs that were measured in the same round."""
    return Spread.of([a / b for a, b in zip(ours, base, strict=True)])


def wait_until(holds: Callable[[], bool], worker: WorkerProcess) -> None:
    """Wait for something that ``worker`` does."""
    deadline_s = time.monotonic() + _DEADLINE_S
    while not holds():
        if time.monotonic() > deadline_s or not worker.alive:
            raise SystemExit(f"{worker.name} is not ready (exit code {worker.exit_code}):\n{worker.last_lines()}")
        time.sleep(0.05)


def write_json(file: Path | None, figures: dict[str, Any]) -> None:
    """With a word about the machine; nothing without a file."""
    if file is not None:
        machine = {"python": platform.python_version(), "cores": os.cpu_count()}
        file.write_text(json.dumps({"machine": machine, **figures}, indent=2))
