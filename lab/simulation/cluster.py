"""Brokers, workers and their disks, put together for one history."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lab.simulation.broker import Broker
from lab.simulation.group import Group
from lab.simulation.plan import CHANGELOGS, GROUP, INPUTS, OUTPUTS, Plan
from lab.simulation.process import Process, Slot, running
from lab.simulation.worker import Worker, run
from lab.simulation.world import World

if TYPE_CHECKING:
    from faust.types import TP

_MARKER_DELAYS_S = (0.03, 0.4, 2.0, 8.0)
_MOST_WORKERS = 3


class Cluster:
    """See the module."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world = world
        self.plan = plan
        self.group = Group(GROUP, INPUTS)
        self.group.on_begin, self.group.on_end = self._on_rebalance, self._on_generation
        self.broker = Broker([*INPUTS, *OUTPUTS, *CHANGELOGS], self.group, self._post, world.at)
        for tp, entries in plan.input.items():
            self.broker.logs[tp].append([(entry.key, entry.value) for entry in entries])
        self.slots: list[Slot] = []
        self.processes: dict[str, Process] = {}
        self.workers: dict[str, Worker] = {}
        #: Values that were seen on a disk though nobody had committed them.
        self.aborted_reads: list[str] = []
        #: Errors that ended workers, though nobody expects them.
        self.errors: list[str] = []

    def begin(self) -> None:
        """Start the workers, members of the first generation."""
        for _ in range(self.plan.workers):
            self._add_worker()
        # All at once: how a group comes together is told by later rebalances.
        self.group.form([process.become_member() for process in self.processes.values()])

    def end(self) -> None:
        """End what still rests, so that nothing of it is left in memory."""
        for process in self.processes.values():
            process.is_dead = True
            process.greenlet.switch()

    def _add_worker(self) -> Process:
        slot = Slot(f"worker-{len(self.slots)}")
        self.slots.append(slot)
        for tp, folder in slot.disks.items():
            folder.on_write = partial(self._check_committed, slot.name, tp)
            folder.after_unlogged_write = self._maybe_flush
        return self._start(slot)

    def _start(self, slot: Slot) -> Process:
        process = self.processes[slot.name] = Process(self, slot, run)
        self.world.at(0.0, process.greenlet.switch)
        return process

    def start_again(self, slot: Slot, delay_s: float, more: int) -> None:
        """After the end of a process, in its slot. It first leaves the group for its predecessor, as a rule."""
        member = slot.member_id

        def start() -> None:
            if more % 6 == 5:
                self.world.counts["lost disk"] += 1
                self.world.tell(slot.name, "! its tables are deleted")
                for folder in slot.disks.values():
                    folder.durable = {}
            self.world.tell(slot.name, "is started again")
            process = self._start(slot)
            if member is not None and more % 4 != 3:
                self.group.leave(member)
            process.join_first()

        self.world.at(delay_s, start)

    def change_group(self, more: int) -> None:
        """A rebalance: a session is lost, a worker joins, or stops in good order, or is killed."""
        kind, more = more % 4, more // 4
        processes = [*self.processes.values()]
        process = processes[more % len(processes)]
        if kind == 0 and len(self.slots) < _MOST_WORKERS:
            self.world.counts["new worker"] += 1
            self.world.tell("group", "! another worker joins")
            self._add_worker().join_first()
        elif process.is_dead:
            return
        elif kind == 1:
            process.finish()
        elif kind == 2:
            process.die("from outside", more // len(processes))
        else:
            self.world.tell(process.name, "! loses its session")
            process.lose_session()

    def _on_rebalance(self) -> None:
        self.world.counts["rebalance"] += 1
        for process in self.processes.values():
            process.notice_rebalance()

    def _on_generation(self) -> None:
        for process in self.processes.values():
            process.joined()

    def _post(self, what: str, action: Callable[[], None]) -> None:
        """A message between brokers."""
        fault = self.world.fault()
        if not fault:
            action()
            return
        delay_s = _MARKER_DELAYS_S[fault % len(_MARKER_DELAYS_S)]
        self.world.counts["late marker"] += 1
        self.world.tell("broker", f"! the {what} takes {delay_s:g} s")
        self.world.at(delay_s, partial(self._arrive, what, action))

    def _arrive(self, what: str, action: Callable[[], None]) -> None:
        self.world.tell("broker", f"  the {what} is written")
        action()

    def _maybe_flush(self, flush: Callable[[], None]) -> None:
        """RocksDB may write what was restored to disk at any time; a crash, or a rebalance, may come just then."""
        fault = self.world.fault()
        if not fault:
            return
        if fault % 4:
            flush()
        more = fault // 4
        if more % 2:
            running().crash("in its restore", more // 2)
        self.change_group(more // 2)

    def _check_committed(self, slot: str, tp: TP, writes: list[tuple[bytes, bytes | None]]) -> None:
        records = self.broker.logs[tp].records
        for key, value in writes:
            if not key.startswith(b"v"):
                continue
            known = (each for each in records if each.key == key[1:] and each.value == value)
            if not any(each.outcome or (each.transaction and each.transaction.outcome) for each in known):
                self.aborted_reads.append(f"{slot} has {key[1:].decode()} = {(value or b'').decode()}, not committed")
