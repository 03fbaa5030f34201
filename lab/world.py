"""What the faults of a run act on: workers, brokers, wires, and who is being hurt at the moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from confluent_kafka.admin import AdminClient

from lab.wire import Wire
from streams_app.embedded import Broker, EmbeddedKafka
from streams_app.kafka import KafkaAddress
from streams_app.supervisor import WorkerProcess

_METADATA_TIMEOUT_S = 10.0
#: A worker is asked to end, and must, within the time that platforms give.
TERMINATE_TIMEOUT_S = 30.0


@dataclass
class World:
    """One cluster and its workers. Faults run in threads; each holds its victim, so that no two hurt the same one."""

    kafka: EmbeddedKafka
    #: All that may run; those that do are started.
    workers: list[WorkerProcess]
    wires: Mapping[str, Wire]
    #: Folder of the slots: ``<datadir>/<app id>/<slot>``.
    datadir: Path
    #: Consumer groups of the apps under test, and the transactional ids of a worker, by its name.
    groups: list[str]
    session_s: float
    transaction_s: float
    #: What the lab ended on purpose: by name; the supervisor starts everybody else again.
    down: set[str] = field(default_factory=set)
    #: Workers that may end by themselves, once: what was done to them leaves them no choice.
    frail: set[str] = field(default_factory=set)
    _held: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def _locked(self) -> Iterator[set[str]]:
        with self._lock:
            yield self._held

    def take_worker(self, draw: Random) -> WorkerProcess | None:
        """A running worker that nobody else hurts, held until `give_back`; None: there is none."""
        with self._locked() as held:
            free = [worker for worker in self.workers if worker.alive and worker.name not in held | self.down]
            if not free:
                return None
            worker = draw.choice(free)
            held.add(worker.name)
            return worker

    def take_idle(self, draw: Random) -> WorkerProcess | None:
        """A worker that does not run and could, held until `give_back`; None: all run."""
        with self._locked() as held:
            free = [worker for worker in self.workers if worker.name in self.down - held]
            if not free:
                return None
            worker = draw.choice(free)
            held.add(worker.name)
            return worker

    def take_broker(self, broker: Broker) -> bool:
        """Hold a broker; False: one is held, and with two of three down nobody could go on."""
        with self._locked() as held:
            if any(name.startswith("broker") for name in held):
                return False
            held.add(f"broker {broker.node_id}")
            return True

    def give_back(self, name: str) -> None:
        """Let others hurt it."""
        with self._locked() as held:
            held.discard(name)

    def running(self) -> list[WorkerProcess]:
        """The workers that are meant to run."""
        return [worker for worker in self.workers if worker.name not in self.down]

    def coordinator(self, topic: str, key: str) -> Broker | None:
        """The broker that coordinates ``key``: a group (``__consumer_offsets``) or a transactional id
        (``__transaction_state``); None: nobody does at the moment.

        Kafka's rule: the leader of the partition that Java's hash of the key gives.
        """
        admin = AdminClient({**KafkaAddress.parse(self.kafka.url).librdkafka(), "log_level": 0})
        found = admin.list_topics(timeout=_METADATA_TIMEOUT_S).topics.get(topic)
        if found is None or not found.partitions:
            return None
        leader = found.partitions[java_hash(key) % len(found.partitions)].leader
        return next((broker for broker in self.kafka.brokers if broker.node_id == leader), None)

    def slot_folders(self, worker: WorkerProcess) -> list[Path]:
        """The worker's folders, one of each app."""
        return sorted(path for path in self.datadir.glob(f"*/{worker.name}") if (path / "tables").is_dir())


def java_hash(text: str) -> int:
    """``Utils.abs(text.hashCode())`` of Kafka."""
    number = 0
    for character in text:
        number = (31 * number + ord(character)) & 0xFFFFFFFF
    return number & 0x7FFFFFFF
