"""A broker of the benchmarks' own, and runs that do not meet on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streams_app.embedded import EmbeddedKafka, free_port, shown_progress
from streams_app.kafka import KafkaAddress
from streams_app.supervisor import WorkerProcess

PARTITIONS = 4
_CHECKOUT = Path(__file__).parent.parent


@contextmanager
def own_broker() -> Iterator[tuple[EmbeddedKafka, Path]]:
    """A new broker, and a folder for the workers; both are gone at the end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        shown_progress() as progress,
        EmbeddedKafka.ensure(Path(folder), port=free_port(), progress=progress) as kafka,
    ):
        yield kafka, Path(folder)


def faust(app: str) -> tuple[str, list[str]]:
    """Module and arguments of a Faust worker of the module ``app``."""
    return "faust", ["-A", app, "worker", "-l", "info", "--without-web"]


class Run:
    """One run of an app: its own prefix on the broker, and its own folder."""

    def __init__(self, kafka: EmbeddedKafka, folder: Path, partitions: int = PARTITIONS) -> None:
        self.kafka = kafka
        self.address = KafkaAddress.parse(kafka.url)
        self.prefix = f"b{uuid4().hex[:8]}-"
        self.partitions = partitions
        self.admin = AdminClient(self.address.librdkafka())
        self._folder = folder / f"{self.prefix}workers"
        self._folder.mkdir()

    def worker(self, name: str, app: str, **env: str) -> WorkerProcess:
        """A Faust worker of the module ``app``; not started."""
        return self.process(name, *faust(app), env)

    def process(self, name: str, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> WorkerProcess:
        """A process of a Python module that finds everything in our variables, whatever engine it is; not started."""
        env = {
            "KAFKA_URL": self.kafka.url,
            "KAFKA_PREFIX": self.prefix,
            "STREAMS_APP_DATADIR": str(self._folder),
            "STREAMS_APP_SLOT": name,
            "STREAMS_APP_TOPIC_PARTITIONS": str(self.partitions),
            "PYTHONPATH": str(_CHECKOUT),
            **env,
        }
        return WorkerProcess(name, module, arguments, self._folder / f"{name}.log", env)

    def forget_tables(self) -> None:
        """What its workers, which have ended, kept on disk; their logs stay."""
        for kept in self._folder.iterdir():
            if kept.is_dir():
                shutil.rmtree(kept)

    def create_topics(self, *names: str) -> None:
        new = [NewTopic(self.prefix + name, self.partitions, 1) for name in names]
        for future in self.admin.create_topics(new).values():
            future.result(30)

    def delete(self) -> None:
        """Everything that it left on the disk, and in the broker's memory; its workers have ended."""
        topics = [name for name in self.admin.list_topics(timeout=30).topics if self.prefix in name]
        for future in self.admin.delete_topics(topics).values():
            future.result(30)
        shutil.rmtree(self._folder)

    def partitions_of(self, *topics: str) -> list[TopicPartition]:
        return [TopicPartition(self.prefix + topic, number) for topic in topics for number in range(self.partitions)]

    def producer(self, **options: Any) -> Producer:
        return Producer({**self.address.librdkafka(), "partitioner": "murmur2_random", **options})

    def reader(self, group: str, **options: Any) -> Consumer:
        """A consumer of what was committed."""
        config = {"group.id": self.prefix + group, "isolation.level": "read_committed", "enable.auto.commit": False}
        return Consumer({**self.address.librdkafka(), **config, **options})

    def fill(self, topic: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Write keys and values, as fast as it goes."""
        producer = self.producer(**{"linger.ms": 20})
        name = self.prefix + topic
        for key, value in records:
            while True:
                try:
                    producer.produce(name, value, key)
                    break
                except BufferError:
                    producer.poll(0.1)
        assert producer.flush(60) == 0

    def committed(
        self, *topics: str, since: Mapping[tuple[str, int], int] | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Partition and value of all records that were committed; or of those from offset ``since`` on."""
        consumer = self.reader("compare", **{"enable.partition.eof": True})
        try:
            unfinished = self.partitions_of(*topics)
            for tp in unfinished:
                tp.offset = OFFSET_BEGINNING if since is None else since[tp.topic, tp.partition]
            consumer.assign(unfinished)
            ended = 0
            while ended < len(unfinished):
                for message in consumer.consume(10_000, 0.5):
                    error = message.error()
                    if error is None:
                        yield message.partition() or 0, message.value() or b""
                    elif error.code() == KafkaError._PARTITION_EOF:
                        ended += 1
                    else:
                        raise KafkaException(error)
        finally:
            consumer.close()

    def log_bytes(self, but: str) -> int:
        """Size of the run's topics on the broker's disk but for one, and of all transactions and committed offsets."""
        ours = (self.prefix, "__consumer_offsets-", "__transaction_state-")
        logs = (log for broker in self.kafka.brokers for log in broker.data.glob("*/*.log"))
        return sum(
            log.stat().st_size
            for log in logs
            if log.parent.name.startswith(ours) and not log.parent.name.startswith(f"{self.prefix}{but}-")
        )
