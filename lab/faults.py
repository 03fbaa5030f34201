"""The faults: each strikes once, lasts, and is healed. What it hurts is drawn from the schedule's seed.

::

    strike(world, draw) ──> lasts ──> heal(world)      both block; a heal leaves nothing of the fault behind

Workers: killed, terminated, frozen past their session, added and removed, killed at a numbered step of the commit, frozen
inside a transaction until the broker ends it. Brokers: any, or the coordinator of a group or of a transaction on purpose.
The wire between one worker and the brokers: cut, half-open, slow, the answer to EndTxn lost or late. Disk: tables deleted,
rolled back to an older copy, disk full.
"""

from __future__ import annotations

import resource
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import ClassVar

from lab.wire import Api, Wire
from lab.world import TERMINATE_TIMEOUT_S, World
from streams_app.embedded import Broker
from streams_app.supervisor import WorkerError, WorkerProcess

#: Where a worker may be told to die (faults.py of the engine), and how often it may come by before: a second of load.
STEPS = (
    "0 claim",
    "0 claimed",
    "1 prepare: begin",
    "1 prepare: outputs produced",
    "1 prepare: outputs sent",
    "2 offsets",
    "3 end",
    "4 publish",
    "4 publish: a store",
    "5 published",
)
_MOST_PASSES = 20
#: A worker that waits for a step comes by it within this time, or there is no load on it.
_STEP_TIMEOUT_S = 40.0
_POLL_S = 0.05


class Fault(ABC):
    """One failure."""

    kind: ClassVar[str]
    #: How long it lasts, in seconds, from … to.
    lasts_s: ClassVar[tuple[float, float]] = (0.0, 3.0)
    #: Needs more than one worker, or more than one broker, to be survived.
    needs_workers: ClassVar[int] = 1
    needs_brokers: ClassVar[int] = 1

    #: What was hurt, for the report.
    victim = ""

    @abstractmethod
    def strike(self, world: World, draw: Random) -> bool:
        """Begin; False: there is nothing to hurt at the moment."""

    @abstractmethod
    def heal(self, world: World) -> None:
        """End, and leave nothing of it behind."""


# --- Workers ---------------------------------------------------------------------------------------------------------


class _OfWorker(Fault):
    """Base: hurts one running worker."""

    worker: WorkerProcess

    def strike(self, world: World, draw: Random) -> bool:
        worker = world.take_worker(draw)
        if worker is None:
            return False
        self.worker, self.victim = worker, worker.name
        self.hurt(world, draw)
        return True

    @abstractmethod
    def hurt(self, world: World, draw: Random) -> None:
        """Begin, on `worker`."""

    def heal(self, world: World) -> None:
        self.relieve(world)
        world.give_back(self.worker.name)

    @abstractmethod
    def relieve(self, world: World) -> None:
        """End it; whoever is down is started again."""


class Kill(_OfWorker):
    """SIGKILL."""

    kind = "kill"

    def hurt(self, world: World, draw: Random) -> None:
        world.down.add(self.worker.name)
        self.worker.kill()

    def relieve(self, world: World) -> None:
        self.worker.start()
        world.down.discard(self.worker.name)


class Terminate(Kill):
    """SIGTERM: it must commit or drop what it has in hand, leave the group and end with 0, in time."""

    kind = "terminate"

    def hurt(self, world: World, draw: Random) -> None:
        world.down.add(self.worker.name)
        self.worker.terminate()
        # One that is still starting has no handler for it yet, and nothing in hand.
        if self.worker.wait(TERMINATE_TIMEOUT_S) not in {0, -signal.SIGTERM}:
            raise WorkerError(f"{self.worker.name} was asked to end, and ended with {self.worker.exit_code}")


class Zombie(_OfWorker):
    """SIGSTOP until long after its session has ended, and its transaction timed out; then it wakes and still writes."""

    kind = "zombie"
    lasts_s = (1.0, 6.0)
    needs_workers = 2

    def hurt(self, world: World, draw: Random) -> None:
        self.worker.send(signal.SIGSTOP)
        time.sleep(world.session_s)

    def relieve(self, world: World) -> None:
        self.worker.send(signal.SIGCONT)


class AddWorker(Fault):
    """Another worker joins."""

    kind = "add worker"

    def strike(self, world: World, draw: Random) -> bool:
        worker = world.take_idle(draw)
        if worker is None:
            return False
        self.victim = worker.name
        worker.start()
        world.down.discard(worker.name)
        return True

    def heal(self, world: World) -> None:
        world.give_back(self.victim)


class RemoveWorker(Fault):
    """A worker leaves, tidily, and does not come back by itself."""

    kind = "remove worker"
    needs_workers = 3

    def strike(self, world: World, draw: Random) -> bool:
        worker = world.take_worker(draw)
        if worker is None:
            return False
        self.victim = worker.name
        if len(world.running()) < 3:
            world.give_back(worker.name)
            return False
        world.down.add(worker.name)
        worker.terminate()
        worker.wait(TERMINATE_TIMEOUT_S)
        return True

    def heal(self, world: World) -> None:
        world.give_back(self.victim)


class DieAtStep(_OfWorker):
    """Started again so that it dies at one numbered step of a commit."""

    kind = "die at a step"
    action = "kill"
    steps: ClassVar[tuple[str, ...]] = STEPS

    def hurt(self, world: World, draw: Random) -> None:
        step = draw.choice(self.steps)
        self.victim = f"{self.worker.name} at “{step}”"
        world.down.add(self.worker.name)
        self.worker.kill()
        with self.worker.environment({"STREAMS_APP_FAULT": f"{self.action} {step}@{draw.randint(1, _MOST_PASSES)}"}):
            self.worker.start()
        self._wait(self.reached)

    def reached(self) -> bool:
        """Whether it has come to that step."""
        return not self.worker.alive

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _STEP_TIMEOUT_S
        while not condition() and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def relieve(self, world: World) -> None:
        self.worker.kill()
        self.worker.start()
        world.down.discard(self.worker.name)


class TransactionTimeout(DieAtStep):
    """Frozen inside a transaction until the broker has ended it; then it goes on where it was."""

    kind = "transaction timed out"
    action = "stop"
    #: Often at the last one: there the transaction is whole, and only its end is missing.
    steps = ("1 prepare: outputs produced", "2 offsets", "3 end", "3 end", "3 end")
    needs_workers = 2

    def hurt(self, world: World, draw: Random) -> None:
        super().hurt(world, draw)
        time.sleep(world.transaction_s + 1.0)

    def reached(self) -> bool:
        return self.worker.frozen or not self.worker.alive

    def relieve(self, world: World) -> None:
        self.worker.send(signal.SIGCONT)
        world.down.discard(self.worker.name)


# --- Brokers ---------------------------------------------------------------------------------------------------------


class KillBroker(Fault):
    """SIGKILL of a broker; the others take over."""

    kind = "broker"
    lasts_s = (0.0, 8.0)
    needs_brokers = 3

    broker: Broker

    def choose(self, world: World, draw: Random) -> Broker | None:
        """Which one."""
        return draw.choice(list(world.kafka.brokers))

    def strike(self, world: World, draw: Random) -> bool:
        broker = self.choose(world, draw)
        if broker is None or not world.take_broker(broker):
            return False
        self.broker, self.victim = broker, f"broker {broker.node_id}"
        broker.kill()
        return True

    def heal(self, world: World) -> None:
        self.broker.start()
        world.give_back(f"broker {self.broker.node_id}")


class KillGroupCoordinator(KillBroker):
    """That of a group under test."""

    kind = "group coordinator"

    def choose(self, world: World, draw: Random) -> Broker | None:
        return world.coordinator("__consumer_offsets", draw.choice(world.groups))


class KillTransactionCoordinator(KillBroker):
    """That of a worker's transactional id."""

    kind = "transaction coordinator"

    def choose(self, world: World, draw: Random) -> Broker | None:
        worker = draw.choice(world.running() or world.workers)
        return world.coordinator("__transaction_state", f"{draw.choice(world.groups)}-{worker.name}")


# --- The wire --------------------------------------------------------------------------------------------------------


class _OfWire(_OfWorker):
    """Base: hurts the wire of one worker."""

    @property
    def wire(self) -> Wire:
        return self.world_wires[self.worker.name]

    def hurt(self, world: World, draw: Random) -> None:
        self.world_wires = world.wires
        self.victim = f"wire of {self.worker.name}"
        self.break_wire(draw)

    @abstractmethod
    def break_wire(self, draw: Random) -> None:
        """Begin."""

    def relieve(self, world: World) -> None:
        self.wire.heal()


class Cut(_OfWire):
    """Connections are reset, new ones refused."""

    kind = "wire cut"
    lasts_s = (0.5, 15.0)

    def break_wire(self, draw: Random) -> None:
        self.wire.cut()


class HalfOpen(_OfWire):
    """Connections stand, nothing passes."""

    kind = "wire half-open"
    lasts_s = (0.5, 15.0)

    def break_wire(self, draw: Random) -> None:
        self.wire.half_open()


class Slow(_OfWire):
    """Everything takes longer."""

    kind = "wire slow"
    lasts_s = (2.0, 10.0)

    def break_wire(self, draw: Random) -> None:
        self.wire.delay(draw.choice((0.05, 0.5, 3.0)))


class LostEnd(_OfWire):
    """The answer to EndTxn is lost: the transaction ended, and its owner does not know."""

    kind = "EndTxn lost"
    lasts_s = (3.0, 12.0)
    api: ClassVar[Api] = Api.END_TXN

    def break_wire(self, draw: Random) -> None:
        self.wire.lose_answers(self.api, draw.randint(1, 3), silence_s=draw.uniform(0.5, 12.0))


class LateEnd(_OfWire):
    """The answer to EndTxn comes late, some of them after its owner has given up waiting."""

    kind = "EndTxn late"
    lasts_s = (3.0, 15.0)

    def break_wire(self, draw: Random) -> None:
        self.wire.delay_answers(Api.END_TXN, draw.choice((0.8, 2.0, 11.0)))


class LostCommit(LostEnd):
    """The answer to a plain commit of offsets, which at most once sends, is lost."""

    kind = "OffsetCommit lost"
    api = Api.OFFSET_COMMIT


# --- The disk --------------------------------------------------------------------------------------------------------


class _OfTables(Kill):
    """Base: the worker is killed, its tables are changed while it is down."""

    def hurt(self, world: World, draw: Random) -> None:
        super().hurt(world, draw)
        for folder in world.slot_folders(self.worker):
            self.change(folder / "tables", draw)

    @abstractmethod
    def change(self, tables: Path, draw: Random) -> None:
        """Hurt one folder of tables."""


class DeleteTables(_OfTables):
    """As on a platform whose disks do not survive."""

    kind = "tables deleted"

    def change(self, tables: Path, draw: Random) -> None:
        shutil.rmtree(tables)


class RollBackTables(_OfTables):
    """The folder is put back to how it was some time ago, as from a backup."""

    kind = "tables rolled back"

    def change(self, tables: Path, draw: Random) -> None:
        copy = tables.with_name("tables-before")
        if copy.exists():
            shutil.rmtree(tables)
            copy.rename(tables)
        else:
            shutil.copytree(tables, copy)


class DiskFull(_OfWorker):
    """Files cannot grow beyond a small size: every write behind that fails, for the tables and for all else.

    The worker may end by itself, and should: others have room.
    """

    kind = "disk full"
    lasts_s = (4.0, 10.0)

    #: Below what RocksDB writes in some seconds of load; its files begin empty.
    _LIMIT_BYTES: ClassVar[int] = 64 * 1024

    def hurt(self, world: World, draw: Random) -> None:
        pid = self.worker.pid
        assert pid is not None
        _, self._hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        world.frail.add(self.worker.name)
        self._pid = pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._LIMIT_BYTES, self._hard))

    def relieve(self, world: World) -> None:
        if self.worker.alive and self.worker.pid == self._pid:
            resource.prlimit(self._pid, resource.RLIMIT_FSIZE, (self._hard, self._hard))


_ALL: tuple[type[Fault], ...] = (
    Kill,
    Terminate,
    Zombie,
    AddWorker,
    RemoveWorker,
    DieAtStep,
    TransactionTimeout,
    KillBroker,
    KillGroupCoordinator,
    KillTransactionCoordinator,
    Cut,
    HalfOpen,
    Slow,
    LostEnd,
    LateEnd,
    LostCommit,
    DeleteTables,
    RollBackTables,
    DiskFull,
)
FAULTS: dict[str, type[Fault]] = {fault.kind: fault for fault in _ALL}
