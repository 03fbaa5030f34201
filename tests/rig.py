"""What the tests with real workers share: a prefix of their own on the broker, worker processes, input, and the check."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from streams_app.claims import Claim
from streams_app.kafka import KafkaAddress
from streams_app.offsets import Committed, Offsets
from streams_app.store import local_stores, read_only_copy

TESTS = Path(__file__).parent
PARTITIONS = 4


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_frozen(pid: int) -> bool:
    """Whether SIGSTOP has stopped all threads of a process: they stop one by one, on a busy machine some of them late."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    try:
        return all(each.read_text().rpartition(")")[2].split()[0] == "T" for each in threads)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread has ended meanwhile


class Worker:
    """A worker process of a test app."""

    def __init__(self, rig: Rig, slot: str, **env: str) -> None:
        self.slot = slot
        self.log = rig.folder / f"{slot}-{uuid4().hex[:6]}.log"
        self._file: IO[bytes] = self.log.open("wb")
        web = [] if "PORT" in env else ["--without-web"]
        self._process = subprocess.Popen(
            rig.command("worker", "-l", "info", *web),
            env={**rig.env, "STREAMS_APP_SLOT": slot, **env},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def says(self, text: str) -> bool:
        """Whether the log has ``text``."""
        return text.encode() in self.log.read_bytes()

    def count(self, text: str) -> int:
        """How often the log has ``text``."""
        return self.log.read_bytes().count(text.encode())

    def wait_started(self, times: int = 1) -> Worker:
        """Wait until partitions were started, ``times`` times."""
        wait_until(lambda: self.count("partitions started") >= times or not self.alive, f"{self.slot} started")
        assert self.alive, self.log.read_text()[-3000:]
        return self

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs (or is frozen)."""
        return self._process.poll() is None

    @property
    def frozen(self) -> bool:
        """Whether the process was stopped by SIGSTOP."""
        return is_frozen(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """As by ``kill -9``."""
        self._process.kill()
        self.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end; gives the exit code."""
        code = self._process.wait(timeout_s)
        self._file.close()
        return code


@dataclass
class Rig:
    """One test's corner of the broker and of the disk."""

    kafka_url: str
    folder: Path
    app: str = "tests.apps.balances"
    prefix: str = field(default_factory=lambda: f"t{uuid4().hex[:8]}-")
    settings: dict[str, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    #: Number of records sent to the input by key.
    sent: int = 0

    def __post_init__(self) -> None:
        self.config = KafkaAddress.parse(self.kafka_url).librdkafka()
        self.admin = AdminClient(self.config)
        self.create_topics("entries", "balances", "dead-letters")
        # Idempotent: where a leader is not yet there, what is sent again keeps its order.
        own = {"partitioner": "murmur2_random", "linger.ms": 5, "enable.idempotence": True}
        self._producer = Producer({**self.config, **own})
        self._random = random.Random(1)

    @property
    def env(self) -> dict[str, str]:
        """Environment of the workers."""
        return {
            **os.environ,
            "KAFKA_URL": self.kafka_url,
            "KAFKA_PREFIX": self.prefix,
            "STREAMS_APP_DATADIR": str(self.folder / "data"),
            # The shortest that brokers permit by default, so that a zombie's successor is there soon.
            "STREAMS_APP_SESSION_TIMEOUT_MS": "6000",
            "PYTHONPATH": str(TESTS.parent),
            **self.settings,
        }

    def create_topics(self, *names: str) -> None:
        """Create topics with the prefix. They keep old timestamps, too: brokers look for those every five minutes."""
        new = [NewTopic(self.prefix + name, PARTITIONS, 1, config={"retention.ms": "-1"}) for name in names]
        for future in self.admin.create_topics(new).values():
            future.result(30)

    def worker(self, slot: str = "one", **env: str) -> Worker:
        """Start a worker."""
        worker = Worker(self, slot, **env)
        self.workers.append(worker)
        return worker

    def send(
        self, count: int, *, keys: int = 50, orders: dict[int, str] | None = None, rate: float | None = None
    ) -> None:
        """Write ``count`` entries; ``orders``: what the agent does with the n-th of them."""
        started_s = time.monotonic()
        for number in range(count):
            entry = {"id": self.sent, "amount": self._random.randrange(1, 100)}
            if orders and number in orders:
                entry["order"] = orders[number]
            key = f"k{self._random.randrange(keys)}"
            value = b"{" if entry.get("order") == "undecodable" else json.dumps(entry).encode()
            self._producer.produce(f"{self.prefix}entries", value, key.encode())
            self.sent += 1
            self._producer.poll(0)
            if rate is not None:
                time.sleep(max(0.0, started_s + (number + 1) / rate - time.monotonic()))
        assert self._producer.flush(30) == 0

    def produce(self, topic: str, key: bytes, value: bytes) -> None:
        """Write one record of any kind."""
        self._producer.produce(f"{self.prefix}{topic}", value, key)
        assert self._producer.flush(30) == 0

    def generate(self, name: str, count: int) -> None:
        """Write generated input."""
        done = subprocess.run(self.command("generate", name, "--count", str(count)), env=self.env, check=False)
        assert done.returncode == 0

    def command(self, *arguments: str) -> list[str]:
        """A command of the app, to be run with the environment `env`."""
        return [sys.executable, "-m", "faust", "-A", self.app, *arguments]

    def wait_for(self, topic: str, count: int) -> None:
        """Wait until so many records of a topic are committed."""
        wait_until(lambda: len(self.read(topic)) >= count, f"{count} records of {topic}")

    def put(
        self, topic: str, records: Iterable[tuple[str, dict[str, Any]]], headers: dict[str, str] | None = None
    ) -> None:
        """Write records, pairs of key and value as JSON, to any topic."""
        for key, value in records:
            self._producer.produce(self.prefix + topic, json.dumps(value).encode(), key.encode(), headers=headers)
            self._producer.poll(0)
        assert self._producer.flush(30) == 0

    def read(self, topic: str, *, committed: bool = True) -> list[Message]:
        """All records of a topic."""
        level = "read_committed" if committed else "read_uncommitted"
        consumer = Consumer(
            {
                **self.config,
                "group.id": "reader",
                "isolation.level": level,
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
            }
        )
        found, unfinished = [], set(range(PARTITIONS))
        try:
            consumer.assign([TopicPartition(self.prefix + topic, p, 0) for p in range(PARTITIONS)])
            deadline_s = time.monotonic() + 30
            while unfinished:
                assert time.monotonic() < deadline_s, f"{topic} could not be read to its end"
                for message in consumer.consume(10_000, 0.5):
                    if message.error():
                        unfinished.discard(message.partition())
                    else:
                        found.append(message)
        finally:
            consumer.close()
        return found

    def ends(self) -> list[int]:
        """High watermarks of the output."""
        return self._offsets(IsolationLevel.READ_UNCOMMITTED)

    def last_stable(self) -> list[int]:
        """Last stable offsets of the output: they stop at the first open transaction."""
        return self._offsets(IsolationLevel.READ_COMMITTED)

    def _offsets(self, isolation: IsolationLevel) -> list[int]:
        wanted = {TopicPartition(f"{self.prefix}balances", p): OffsetSpec.latest() for p in range(PARTITIONS)}
        futures = self.admin.list_offsets(wanted, isolation_level=isolation)
        return [future.result(30).offset for _, future in sorted(futures.items(), key=lambda each: each[0].partition)]

    def wait_drained(self, timeout_s: float = 60.0) -> None:
        """Wait until every entry has its committed output, or is set aside."""
        wait_until(
            lambda: len(self.read("balances")) + len(self.read("dead-letters")) >= self.sent,
            f"{self.sent} entries done",
            timeout_s,
        )

    def check(self, *, set_aside: int = 0) -> None:
        """Every entry took effect exactly once, on output and changelog, but ``set_aside`` of them, which had none."""
        dead = self.read("dead-letters")
        assert len(dead) == set_aside, [message.headers() for message in dead[:5]]
        aside = {json.loads(message.value())["id"] for message in dead}
        expected: dict[str, list[tuple[int, int]]] = defaultdict(list)
        balance: dict[str, int] = defaultdict(int)
        for message in self.read("entries"):
            entry, key = json.loads(message.value()), message.key().decode()
            if entry["id"] not in aside:
                balance[key] += entry["amount"]
                expected[key].append((entry["id"], balance[key]))
        outputs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for message in self.read("balances"):
            output = json.loads(message.value())
            outputs[message.key().decode()].append((output["id"], output["balance"]))
        assert outputs == expected
        changelog = self.changelog()
        assert {key.decode(): int(value) for key, value in changelog.items()} == dict(balance)

    def check_at_least_once(self, *, refused: bool = False) -> int:
        """Every entry had its output and counts once in the changelog; gives the number of outputs too many.

        Outputs come a first time in the order of their entries; a last time, where the brokers ``refused`` a record and its
        neighbours.
        """
        expected: dict[str, list[int]] = defaultdict(list)
        balance: dict[str, int] = defaultdict(int)
        aside = {json.loads(message.value())["id"] for message in self.read("dead-letters")}
        for message in self.read("entries"):
            entry, key = json.loads(message.value()), message.key().decode()
            if entry["id"] not in aside:
                expected[key].append(entry["id"])
                balance[key] += entry["amount"]
        outputs: dict[str, list[int]] = defaultdict(list)
        for message in self.read("balances"):
            outputs[message.key().decode()].append(json.loads(message.value())["id"])
        # What was set aside may have had outputs before it failed.
        done = {key: [id for id in ids if id not in aside] for key, ids in outputs.items()}
        firsts = {key: list(dict.fromkeys(ids)) for key, ids in done.items()}
        lasts = {key: list(dict.fromkeys(reversed(ids)))[::-1] for key, ids in done.items()}
        assert (lasts if refused else firsts) == expected
        assert {key.decode(): int(value) for key, value in self.changelog().items()} == dict(balance)
        return sum(map(len, outputs.values())) - sum(map(len, expected.values()))

    def check_at_most_once(self) -> tuple[int, int]:
        """No entry had two outputs; gives the number of those that had none, and how many were reported."""
        outputs = [json.loads(message.value())["id"] for message in self.read("balances")]
        aside = [json.loads(message.value())["id"] for message in self.read("dead-letters")]
        repeated = [id for id, count in Counter(outputs + aside).items() if count > 1]
        assert not repeated, repeated
        by_key: dict[bytes, list[int]] = defaultdict(list)
        for message in self.read("balances"):
            by_key[message.key()].append(json.loads(message.value())["id"])
        assert all(ids == sorted(ids) for ids in by_key.values()), "out of order within a key"
        lost = self.sent - len(outputs) - len(aside)
        assert 0 <= lost <= self.reported()
        return lost, self.reported()

    def _input(self, topics: Iterable[str]) -> list[tuple[str, int]]:
        return [(f"{self.prefix}{topic}", partition) for topic in topics for partition in range(PARTITIONS)]

    def committed(
        self, topics: Iterable[str] = ("entries",), group: str = "balances"
    ) -> dict[tuple[str, int], Committed]:
        """The group's offsets of its input."""
        return Offsets(self.config, f"{self.prefix}{group}").stable(self._input(topics), lambda _: None)

    def reported(self) -> int:
        """The most that was lost, as the offsets of at most once say."""
        claims = [(Claim.parse(each.metadata), each.offset) for each in self.committed().values()]
        return sum(claim.reported(offset) for claim, offset in claims if claim is not None and offset is not None)

    def wait_consumed(
        self, timeout_s: float = 60.0, topics: Collection[str] = ("entries",), group: str = "balances"
    ) -> None:
        """Wait until the group has committed all input, and says that nothing is in hand."""

        def consumed() -> bool:
            # The offsets first: what one step had sent on by then is below the ends of the next one's input.
            try:
                committed = self.committed(topics, group)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.NOT_COORDINATOR:
                    return False  # a broker that is new, or was away, does not know of its groups yet
                raise
            ends = Offsets(self.config, f"{self.prefix}{group}").high_watermarks(self._input(topics))
            for tp, each in committed.items():
                claim = Claim.parse(each.metadata)
                if each.offset != ends[tp] or (claim is not None and claim.began != each.offset):
                    return False
            return True

        wait_until(consumed, "all input consumed", timeout_s)

    def changelog(self, topic: str = "balances-balance-changelog") -> dict[bytes, bytes]:
        """The fold of the table's changelog."""
        fold: dict[bytes, bytes] = {}
        for message in self.read(topic):
            if message.value() is None:
                fold.pop(message.key(), None)
            else:
                fold[message.key()] = message.value()
        return fold

    def check_stores(self) -> None:
        """The stores on disk hold what the changelog says; for when one worker had all partitions to the end."""
        stored: dict[bytes, bytes] = {}
        for _, _, path in local_stores(self.folder / "data", f"{self.prefix}balances"):
            stored |= read_only_copy(path)[1]
        assert stored == self.changelog()

    def come_and_go(self, guests: int) -> None:
        """Send, while one worker stays and others join it and leave, one after the other."""
        self.worker("one").wait_started()
        for number in range(guests):
            self.send(150, rate=300)
            guest = self.worker(f"guest-{number}")
            self.send(300, rate=300)
            guest.wait_started()
            self.send(150, rate=300)
            guest.signal(signal.SIGTERM)
            assert guest.wait() == 0

    def stop(self) -> None:
        """SIGTERM to all workers; each ends in time and with 0."""
        for worker in self.workers:
            if worker.alive:
                worker.signal(signal.SIGTERM)
        for worker in self.workers:
            if worker.alive:
                assert worker.wait(30) == 0, worker.log.read_text()[-3000:]

    def tell_stacks(self) -> None:
        """What the workers are doing, for whoever looks for why a test failed."""
        for worker in self.workers:
            if worker.alive and not worker.frozen:
                worker.signal(signal.SIGUSR1)
        time.sleep(1)
        for worker in self.workers:
            print(worker.log, worker.log.read_text()[-20_000:], sep="\n")

    def end(self) -> None:
        """Leave no process behind."""
        for worker in self.workers:
            if worker.alive:
                worker.kill()
            worker.wait()


@contextmanager
def rig(kafka_url: str, folder: Path, **options: str) -> Iterator[Rig]:
    """A rig that ends its workers."""
    made = Rig(kafka_url, folder, settings=options)
    try:
        yield made
    except Exception:
        made.tell_stacks()
        raise
    finally:
        made.end()
