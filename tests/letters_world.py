"""Topics of one test with the dead letters in them, and the commands run on them as a person would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from confluent_kafka import KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from streams_app.audit import Log
from streams_app.dead_letters import dead_letter
from streams_app.kafka import KafkaAddress
from streams_app.letters import Choice, Letters, Listing, Place
from streams_app.replay import Replay, Transactions, Unfenced
from streams_app.session import Output
from streams_app.settings import Settings

ROOT = Path(__file__).parent.parent
PARTITIONS = 4
#: Of letters; a broker takes no records from the future, and keeps none from long ago.
NOW_MS = time.time_ns() // 1_000_000 - 3_600_000
EVERYTHING = Choice()


class Came(NamedTuple):
    """A record as a worker met it; ``topic`` without prefix."""

    topic: str = "transfers"
    partition: int = 1
    offset: int = 7
    key: bytes | None = b"alice"
    value: bytes | None = b'{"amount": 1}'
    headers: Any = ()


class World:
    """Topics of one test, with a prefix of their own."""

    def __init__(self, kafka_url: str) -> None:
        self.url = kafka_url
        self.address = KafkaAddress.parse(kafka_url)
        self.settings = Settings(kafka_url=kafka_url, kafka_prefix=f"t{uuid4().hex[:8]}-")
        self.prefix = self.settings.kafka_prefix
        self.create("dead-letters")
        self.create("transfers")

    def create(self, name: str, partitions: int = PARTITIONS, **config: str) -> None:
        admin = AdminClient(self.address.librdkafka())
        [created] = admin.create_topics([NewTopic(self.prefix + name, partitions, 1, config=config)]).values()
        created.result(timeout=30)

    def letter(self, came: Came, code: str = "invalid", text: str = "amount is 0", attempts: int = 1) -> Output:
        return dead_letter(self.prefix, came._replace(topic=self.prefix + came.topic), code, text, attempts)

    def put(self, *letters: Output) -> list[Place]:
        """Write the letters, one after the other; gives where they lie."""
        producer = Producer({**self.address.librdkafka(), "partitioner": "murmur2_random", "linger.ms": 0})
        places: list[Place] = []

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            assert error is None
            places.append(Place(int(message.partition() or 0), int(message.offset() or 0)))

        for topic, key, value, partition, timestamp_ms, headers in letters:
            at = -1 if partition is None else partition
            producer.produce(
                topic, value, key, at, on_delivery, timestamp=timestamp_ms or 0, headers=list(headers or ())
            )
            assert producer.flush(30) == 0
        return places

    def read(self, topic: str = "transfers") -> list[Message]:
        log = Log(self.address)
        tps = [(self.prefix + topic, partition) for partition in range(log.partitions()[self.prefix + topic])]
        read = list(log.read(log.beginnings(tps)))
        log.close()
        return read

    def opened(self) -> Letters:
        return Letters(self.address, self.settings)

    def list(self, choice: Choice = EVERYTHING, limit: int = 100) -> Listing:
        letters = self.opened()
        listing = Listing(letters.read(choice), limit, newest=True)
        letters.close()
        return listing

    def replay(self, choice: Choice = EVERYTHING, *, fenced: bool = True, **options: Any) -> Replay:
        letters = self.opened()
        work = Replay(letters, choice, **options)
        work.send(self.transactions(letters) if fenced else Unfenced(letters))
        letters.close()
        return work

    def transactions(self, letters: Letters, new_producer: type[Producer] = Producer) -> Transactions:
        return Transactions(letters, f"{self.prefix}streams-app-replay", new_producer=new_producer)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "faust", "-A", "streams_app", "dead-letters", *arguments]

    def env(self) -> dict[str, str]:
        ours = {"KAFKA_URL": self.url, "KAFKA_PREFIX": self.prefix, "COLUMNS": "100"}
        return {**{name: value for name, value in os.environ.items() if not name.startswith("STREAMS_APP_")}, **ours}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
