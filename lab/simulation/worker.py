"""What `streams_app.engine.Engine` decides, without Faust and asyncio, around the real guarantees, start, batches and stores.

`_serve`, `_work`, `_fill`, `_withdraw`, `_finish` and `_commit` repeat the engine's methods of these names, line by line
where it matters.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

from confluent_kafka import KafkaException
from faust.types import TP

from lab.simulation.plan import CHANGELOGS, GROUP, Entry
from lab.simulation.process import Process
from lab.simulation.world import Crash
from streams_app.batch import Batch, Overlay
from streams_app.errors import BatchError, DeadBatchError, KafkaUnreachable, PartitionsLost, StartRefused
from streams_app.guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, Guarantee
from streams_app.offsets import Offsets
from streams_app.session import Output, Pin
from streams_app.start import Start
from streams_app.store import Store

_TRANSACTION_TIMEOUT_S = 10.0
_SESSION_TIMEOUT_S = 8.0
_RETRY_S, _LONGEST_RETRY_S = 0.1, 5.0
_FETCH_S = 0.005
_WORK_S = 0.002


class Fetched(NamedTuple):
    """Entries with their offsets, and the pin of the same moment."""

    pin: Pin
    entries: list[tuple[TP, int, Entry]]


class Event:
    """As `streams_app.events.Event`, without Faust."""

    __slots__ = ("acked", "batch", "entry", "message", "taken", "withdrawn")

    def __init__(self, batch: Batch, tp: TP, offset: int, entry: Entry) -> None:
        self.entry = entry
        self.message = Message(tp, offset)
        self.taken = self.acked = self.withdrawn = False
        self.batch = batch
        batch.add([cast(Any, self)])

    def ack(self) -> None:
        """An agent is through with it."""
        if not self.acked:
            self.acked = True
            self.batch.pending -= 1
            self.batch.wake()


class Message(NamedTuple):
    """As much of a message as a batch needs."""

    tp: TP
    offset: int


class Commit:
    """One that goes on while the next batch is filled; as `streams_app.pipeline`."""

    def __init__(self, process: Process, commit: Callable[[], None]) -> None:
        self._process = process
        self._commit = commit
        self._is_done = self._is_awaited = False
        self._error: Exception | None = None
        process.aside(self._run)

    def _run(self) -> None:
        with contextlib.suppress(Crash):
            try:
                self._commit()
            except Exception as error:  # noqa: BLE001 - handed over
                self._error = error
            finally:
                self._is_done = True
                if self._is_awaited:
                    self._process.world.at(0, self._process.greenlet.switch)

    def ended(self) -> None:
        """Wait for it; raises what it raised."""
        if not self._is_done:
            self._is_awaited = True
            self._process.world.counts["pipelined batch"] += 1
            self._process.world.park()
        self._process.sleep(0)
        if self._error is not None:
            raise self._error


def run(process: Process) -> None:
    """The whole life of a worker."""
    with contextlib.suppress(Crash):
        try:
            Worker(process).run()
        except StartRefused as error:
            # Ends the process; whoever starts it again finds out whether it was right.
            process.world.counts["refused start"] += 1
            process.crash(f"by itself: {error}")
        except Exception as error:  # noqa: BLE001 - whatever the engine does not expect ends its worker, and is an anomaly
            process.cluster.errors.append(f"{process.name} ended with {error!r}")
            process.crash(f"by itself: {error!r}")


class Worker:
    """See the module."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.plan = process.plan
        self.stores: dict[TP, Store] = {}
        self._positions: dict[TP, int] = {}
        self._fetched: dict[TP, int] = {}
        self._withheld: list[tuple[TP, int, Entry]] = []
        self._failed: set[int] = set()
        self._retry_s = _RETRY_S
        self._committing: Commit | None = None
        self._below: Batch | None = None
        self._filling: Batch | None = None
        self._guarantee = self._new_guarantee()
        process.cluster.workers[process.name] = self

    def _new_guarantee(self) -> Guarantee:
        name = f"{GROUP}-{self.process.name}"
        match self.plan.guarantee:
            case "exactly_once":
                return ExactlyOnce({}, name, _TRANSACTION_TIMEOUT_S)
            case "at_least_once":
                return AtLeastOnce({}, name, _TRANSACTION_TIMEOUT_S)
            case "at_most_once":
                return AtMostOnce({}, self.process.commit_once, _TRANSACTION_TIMEOUT_S, Counter())

    def run(self) -> None:
        """Take assignments, one after the other."""
        process = self.process
        while not process.is_finishing:
            assignment = process.assignment
            if assignment is not None and not assignment.over.is_set():
                process.is_idle = False
                self._serve(assignment)
            process.idle()
            if assignment is process.assignment and not process.is_finishing:
                process.park()
        self._guarantee.close()
        for store in self.stores.values():
            store.close()
        process.stopped()

    def _serve(self, assignment: Any) -> None:
        while not self._is_over(assignment):
            try:
                self._start(assignment)
                self._work(assignment)
                if not assignment.lost:
                    self._guarantee.rest(self._positions, assignment.pin)
            except PartitionsLost as error:
                self._tell(f"partitions lost: {error}")
                assignment.lost = True
                self.process.pause(assignment, _SESSION_TIMEOUT_S)
                assignment.lost = assignment.over.is_set()
            except (BatchError, KafkaUnreachable, KafkaException) as error:
                self._tell(f"starts anew in {self._retry_s:g} s, after {type(error).__name__}: {error}")
                self._guarantee.after_trouble()
                self.process.pause(assignment, self._retry_s)
                self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)

    def _is_over(self, assignment: Any) -> bool:
        return bool(assignment.over.is_set()) or self.process.is_finishing

    def _start(self, assignment: Any) -> None:
        inputs = sorted(assignment.partitions)
        with contextlib.closing(Offsets({}, GROUP)) as offsets:
            self._open_stores({CHANGELOGS[tp.partition] for tp in inputs})
            start = Start(offsets, self._guarantee, {})
            stores = cast("dict[tuple[str, int], Store]", self.stores)
            started = start.run(assignment.pin, [*inputs], stores, lambda: self._is_over(assignment))
        self._positions = {TP(*tp): offset for tp, offset in started.positions.items()}
        self._rewind()
        self._tell(f"has started at {[*self._positions.values()]}, {started.restored_records} records restored")

    def _open_stores(self, changelogs: set[TP]) -> None:
        for tp in self.stores.keys() - changelogs:
            self.stores.pop(tp).close()
        for tp in sorted(changelogs - self.stores.keys()):
            self.stores[tp] = Store.trusted(cast(Any, self.process.slot.disks[tp]), topic_id="id")

    def _rewind(self) -> None:
        """Read again from the positions; nothing that was fetched ahead, or taken back, counts."""
        self._withheld = []
        self._fetched = dict(self._positions)

    def _work(self, assignment: Any) -> None:
        try:
            while not self._is_over(assignment):
                fetched = self._fetch(assignment)
                if fetched is not None:
                    self._process_batch(fetched, assignment)
        except Crash:
            raise
        except BaseException:
            self._ended()
            raise
        self._ended()

    def _process_batch(self, fetched: Fetched, assignment: Any) -> None:
        if not fetched.entries:
            self._ended()
        batch = self._guarantee.new_batch(fetched.pin)
        batch.over(self._below)
        self._filling = batch
        try:
            if fetched.entries:
                self._fill(batch, fetched, assignment)
                self._finish(batch, assignment)
            else:
                self._guarantee.rest(self._positions, assignment.pin)
                self._write_out()
                self._idle(assignment)
        except BaseException:
            batch.drop()
            self._withheld = []
            raise

    def _ended(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            try:
                committing.ended()
            finally:
                self._below = None

    def _fetch(self, assignment: Any) -> Fetched | None:
        """Pin and entries in one step."""
        self.process.step("fetch")
        self.process.sleep(_FETCH_S)
        if self._is_over(assignment):
            return None
        pin = self.process.live_pin or Pin(GROUP, -1, "")
        if self._withheld:
            entries, self._withheld = self._withheld, []
            return Fetched(pin, entries)
        entries = []
        for tp in sorted(self._positions):
            start = self._fetched[tp]
            found = self.plan.input[tp][start : start + self.plan.chunk]
            self._fetched[tp] = start + len(found)
            entries += [(tp, offset, entry) for offset, entry in enumerate(found, start)]
        return Fetched(pin, entries)

    def _idle(self, assignment: Any) -> None:
        while not self._is_over(assignment) and assignment is self.process.assignment:
            self.process.park()

    def _fill(self, batch: Batch, fetched: Fetched, assignment: Any) -> None:
        batch.consumed.update((tp, offset + 1) for tp, offset, _ in fetched.entries)
        if self._guarantee.claims_first:
            self._check_committable(batch, assignment)
            self._guarantee.take(batch, self._positions)
        self._deliver(batch, fetched, assignment)

    def _deliver(self, batch: Batch, fetched: Fetched, assignment: Any) -> None:
        events = []
        for tp, offset, entry in fetched.entries:
            batch.messages.setdefault(tp, []).append(cast(Any, Message(tp, offset)))
            events.append(Event(batch, tp, offset, entry))
        for event in events:
            if self._is_over(assignment):
                self._withdraw(batch, events)
                return
            self._agent(batch, event)
            if batch.failure is not None or batch.trouble is not None:
                return

    def _withdraw(self, batch: Batch, events: list[Event]) -> None:
        """Take back what the agent has not begun."""
        batch.withdraw()
        self._withheld = [(*event.message, event.entry) for event in events if event.withdrawn]

    def _agent(self, batch: Batch, event: Event) -> None:
        """Add to the balance, and say what it is now."""
        self.process.step(f"entry {event.entry.id}")
        self.process.sleep(_WORK_S)
        event.taken = True
        entry, partition = event.entry, event.message.tp.partition
        try:
            changelog = CHANGELOGS[partition]
            overlay = batch.overlay("balance", partition, partial(Overlay, self.stores[changelog], changelog.topic))
            stored = overlay.get(entry.key)
            balance = int(stored or 0) + entry.amount
            overlay.writes[entry.key] = b"%d" % balance
            batch.send(Output(entry.to.topic, entry.key, b"%d %d" % (entry.id, balance), entry.to.partition))
        except DeadBatchError:
            return
        if entry.id == self.plan.poison and entry.id not in self._failed:
            self._failed.add(entry.id)
            self._tell(f"its agent fails at entry {entry.id}")
            self.process.world.counts["failed agent"] += 1
            batch.fail(cast(Any, event))
        else:
            event.ack()

    def _check_committable(self, batch: Batch, assignment: Any) -> None:
        if not (batch.pin.is_valid and batch.pin == assignment.pin and not assignment.lost):
            raise PartitionsLost(f"the batch was fetched under {batch.pin}, the assignment is {assignment.pin}")

    def _finish(self, batch: Batch, assignment: Any) -> None:
        """The one place that decides what becomes of a batch."""
        if not batch.consumed:
            return
        self._ended()
        self._check_committable(batch, assignment)
        if batch.trouble is not None:
            raise batch.trouble
        if batch.failure is not None:
            batch.drop()
            self._guarantee.forget()
            self._rewind()
        else:
            batch.seal()
            self._below = batch
            self._committing = Commit(self.process, partial(self._commit, batch))
            if not self._guarantee.pipelined:
                self._ended()

    def _commit(self, batch: Batch) -> None:
        try:
            self._guarantee.commit(batch)
        except BaseException:
            batch.drop()
            raise
        self._positions.update(batch.consumed)
        self._retry_s = _RETRY_S
        self.process.world.counts["batch"] += 1
        if self.process.world.counts["batch"] % 3 == 0:  # so little never fills a store's memory
            self._write_out()
        self._tell(f"has committed up to {[*batch.consumed.values()]}")
        self._below = None
        if self._filling is not None:
            self._filling.over(None)

    def _write_out(self) -> None:
        for store in self.stores.values():
            store.write_out()

    def _tell(self, what: str) -> None:
        if self.process.world.story is not None:
            self.process.world.tell(self.process.name, what)
