"""One run of the lab: a cluster and workers of its own, input, faults on schedule, and the checker during and after it.

::

    Kafka, wires ──> workers start ──> input flows, faults strike and are healed ──> all healed, drained ──> checked, reported

With a mutant (mutants.py) the workers run broken code, and the first anomaly ends the run.

The supervisor part is here: who ended without having been ended is started again, as a process manager does, and told.
Everything that is started here is ended here.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Event
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException

from lab.checker import DRAIN_TIMEOUT_S, Anomaly, Checker
from lab.faults import FAULTS, Fault
from lab.logs import last_error, lines_around, moment
from lab.mutants import mutant
from lab.outcome import Options, Outcome, Strike
from lab.progress import Progress, Recovery
from lab.schedule import Planned, kinds_of, schedule
from lab.wire import Wire
from lab.workload import STOCK, workload_of
from lab.world import World
from streams_app.audit import TP, Log
from streams_app.deadlines import discard
from streams_app.demo_place import Place, place_of
from streams_app.embedded import EmbeddedKafka, free_port
from streams_app.generate import Feed, Plan
from streams_app.kafka import KafkaAddress
from streams_app.provision import create_topics
from streams_app.supervisor import Interrupts, Supervisor, WorkerError, WorkerProcess, signals_interrupt

if TYPE_CHECKING:
    from streams_app.application import App

_TICK_S = 0.25
#: A broker that is down is asked anew after that long.
_LOOK_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 120.0
#: An event that waits for longer, without any fault under way, has been forgotten. While one fault follows the other, each
#: costing a rebalance, a partition may have bad luck for minutes.
NO_PROGRESS_S = 45.0
#: Two faults may overlap, or three: more at a time only hide each other.
_MOST_FAULTS = 3
#: The exit code of a worker that finds no broker when it is started, and how long it looks for one.
_OUT_OF_REACH, _REACH_TIMEOUT_S = 3, 15.0
_KEYS = 200


class Lab:
    """One run. `run` blocks; the attributes may be read by a view meanwhile."""

    def __init__(self, app: App, options: Options, on_change: Callable[[Lab], None] = lambda lab: None) -> None:
        self.app = app
        self.options = options
        self.settings = app.settings
        self.stage = "getting ready"
        self.elapsed_s = 0.0
        self.strikes: list[Strike] = []
        self.active: list[Strike] = []
        self.missed: list[str] = []
        #: How much was found so far.
        self.found = 0
        self.progress: dict[str, Progress] = {}
        self.workers: list[WorkerProcess] = []
        self._on_change = on_change
        self._stop, self._ended = Event(), Event()
        self._kept: str | None = None
        self._started_s = 0.0
        self._recoveries: list[Recovery] = []
        #: Seconds without any fault, as of the last look.
        self._peace_s, self._looked_s = 0.0, time.monotonic()
        self._interrupts = Interrupts()

    def run(self) -> Outcome:
        """Carry it through, and clean up. Must run in the main thread.

        Raises:
            ConfigurationError, KafkaUnreachable, EmbeddedKafkaError, WorkerError: as their texts say.
        """
        options = self.options
        kinds = kinds_of(options.faults, options.workers, options.brokers)
        self._plan = schedule(options.seed, options.seconds, kinds, options.pauses)
        # The lab kills its brokers: never somebody else's.
        own = replace(self.settings, kafka_url=None, topic_replication=min(3, options.brokers))
        with signals_interrupt() as self._interrupts, place_of(own, self._keep, "lab") as place:
            self.settings = place.settings
            with contextlib.ExitStack() as held:
                outcome = self._in(place, held)
                held.callback(self._interrupts.ignore_further)
            place.keep = not outcome.good and not options.mutant
        outcome.kept = self._kept
        return outcome

    def _keep(self, what: str) -> None:
        self._kept = what

    # -- Stages.

    def _in(self, place: Place, held: contextlib.ExitStack) -> Outcome:
        options = self.options
        self._say("starting Kafka")
        most = options.workers + 1
        kafka = held.enter_context(
            EmbeddedKafka.ensure(
                place.folder, port=free_port(), brokers=options.brokers, wires=most, progress=self._say
            )
        )
        self._address = KafkaAddress.parse(kafka.url)
        self.settings = replace(self.settings, kafka_url=kafka.url)
        self._code = self._broken_code(place.folder / "checkout") if options.mutant else None
        self._workload = workload_of(self.app, options.engine, options.workload, self.settings)
        create_topics(self._address, self._workload.topics)
        names = [f"lab-{number}" for number in range(1, most + 1)]
        wires = {name: held.enter_context(Wire(list(ports))) for name, ports in zip(names, kafka.wires, strict=True)}
        self.workers = [self._worker(name, wires[name].url) for name in names]
        groups = [app.app_id for app in self._workload.apps]
        settings = self.settings
        self._world = World(
            kafka,
            self.workers,
            wires,
            settings.datadir,
            groups,
            settings.session_timeout_ms / 1000,
            settings.transaction_timeout_ms / 1000,
            down=set(names[options.workers :]),
        )
        held.enter_context(Supervisor(self.workers))
        held.callback(self._wake_all)
        self._log = Log(self._address)
        held.callback(self._log.close)
        self.checker = Checker(self._address, settings, self._workload, self._log, self._since)
        threads = held.enter_context(ThreadPoolExecutor(_MOST_FAULTS + len(self._workload.inputs) + 3, "lab"))
        held.callback(self._stop.set)
        held.callback(self._ended.set)
        self._start_workers()
        return self._flow(threads, held)

    def _worker(self, name: str, url: str) -> WorkerProcess:
        settings = self.settings
        # Stock Faust knows no slots: workers on one machine must each have a folder of their own.
        datadir = settings.datadir / name if self.options.engine == STOCK else settings.datadir
        env = {
            "KAFKA_URL": url,
            "KAFKA_PREFIX": settings.kafka_prefix,
            "STREAMS_APP_DATADIR": str(datadir),
            "STREAMS_APP_SLOT": name,
            "STREAMS_APP_LOG_FORMAT": "text",  # people read it
            "STREAMS_APP_TOPIC_REPLICATION": str(settings.topic_replication),
        }
        arguments = ["-A", self._workload.module, "worker", "-l", "info", "--without-web"]
        return WorkerProcess(name, "faust", arguments, settings.datadir / f"{name}.log", env, self._code)

    def _broken_code(self, folder: Path) -> Path:
        """A copy of the checkout for the workers; the lab itself, its checks too, goes on with unbroken code."""
        mutant(self.options.mutant).copy(folder)
        return folder

    def _start_workers(self) -> None:
        self._say("starting workers")
        running = self._world.running()
        for worker in running:
            worker.start()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while late := [worker for worker in running if not worker.said(self._workload.at_work)]:
            if time.monotonic() > deadline_s:
                raise WorkerError(f"{late[0].name} did not start; its log ends:\n{late[0].last_lines()}")
            self._revive()
            self._interrupts.check()
            time.sleep(_TICK_S)

    def _flow(self, threads: ThreadPoolExecutor, held: contextlib.ExitStack) -> Outcome:
        """Let the input flow, and faults strike."""
        self._say("input flows, faults strike")
        options, workload = self.options, self._workload
        feeds = [
            Feed(
                Plan(name, rate=options.rate, keys=_KEYS, seed=options.seed), self._address, self.settings.kafka_prefix
            )
            for name in workload.inputs
        ]
        self._feeding = [threads.submit(feed.run, self._stop) for feed in feeds]
        self.checker.start(threads)
        held.callback(self.checker.close)
        self.progress = {app.guarantee: Progress() for app in workload.apps}
        self._partitions = self._log.partitions()
        self._measuring = threads.submit(self._measure_on)
        striking = self._strike_on_schedule(threads)
        if not self._drain() and not self._is_caught():
            self.checker.run.add("no progress", f"not drained within {DRAIN_TIMEOUT_S:g} s")
        report, anomalies = None, self.checker.seen()
        if not self._is_caught():
            self._say("checking")
            report, anomalies = self.checker.judge()
        for fault in striking:
            fault.result()
        written = {feed.plan.name: feed.acknowledged for feed in feeds}
        return Outcome(
            options,
            self.strikes,
            self.missed,
            anomalies,
            self.progress,
            report,
            self.elapsed_s,
            written,
            self._log_lines(anomalies),
        )

    def _strike_on_schedule(self, threads: ThreadPoolExecutor) -> list[Future[None]]:
        self._started_s = self._looked_s = time.monotonic()
        due, striking = deque(self._plan), []
        while self._since() < self.options.seconds and not self._is_caught():
            if due and self._since() >= due[0].at_s and len(self.active) < _MOST_FAULTS:
                striking.append(threads.submit(self._carry_out, due.popleft()))
            self._tick()
        if self._is_caught():
            self._stop.set()
        self._say("healing")
        while not all(fault.done() for fault in striking):
            self._tick()
        return striking

    def _is_caught(self) -> bool:
        """Whether a mutant was noticed: one anomaly is enough."""
        return bool(self.options.mutant and self.checker.seen())

    def _drain(self) -> bool:
        """Heal all, and let the workers work off what is left; whether they did."""
        self._say("waiting until all input is processed")
        self._stop.set()
        for wire in self._world.wires.values():
            wire.heal()
        deadline_s, written = time.monotonic() + DRAIN_TIMEOUT_S, 0
        while time.monotonic() < deadline_s and not self._is_caught():
            self._tick()
            # Two looks after all was written: the first may have begun before.
            looks = min((len(each.samples) for each in self.progress.values()), default=0)
            if not all(feed.done() for feed in self._feeding):
                written = looks
            elif looks > written + 1 and not any(each.waiting_s for each in self.progress.values()):
                return True
        return False

    # -- Faults.

    def _carry_out(self, planned: Planned) -> None:
        """In a thread: one fault, from its strike to its heal."""
        fault: Fault = FAULTS[planned.kind]()
        began_s = self._since()
        strike = Strike(planned, "", began_s)
        self.active.append(strike)
        recovery = self._expect_recovery()
        try:
            if not fault.strike(self._world, Random(planned.seed)):
                self.missed.append(planned.kind)
                self._recoveries.remove(recovery)
                return
            strike.victim, strike.recovery = fault.victim, recovery
            self.strikes.append(strike)
            try:
                self._stop.wait(min(planned.lasts_s, max(0.0, self.options.seconds - self._since())))
            finally:
                fault.heal(self._world)
                strike.healed_s = self._since()
        except WorkerError as error:
            self.checker.run.add("worker ended", f"{planned.kind}: {error}")
        finally:
            self.active.remove(strike)

    def _expect_recovery(self) -> Recovery:
        recovery = Recovery(time.monotonic())
        open_ones = [each for each in self._recoveries if each.seconds is None]
        for each in open_ones:
            each.alone = False
        recovery.alone = not open_ones and len(self.active) == 1
        self._recoveries.append(recovery)
        return recovery

    # -- Again and again.

    def _since(self) -> float:
        return time.monotonic() - self._started_s if self._started_s else 0.0

    def _tick(self) -> None:
        begun_s = time.monotonic()
        self._revive()
        for feed in self._feeding:
            if feed.done():
                feed.result()
        if self._measuring.done():
            self._measuring.result()
        self.checker.look()
        self.found = sum(each.count for each in self.checker.seen())
        self.elapsed_s = self._since()
        self._on_change(self)
        self._interrupts.check()
        time.sleep(max(0.0, begun_s + _TICK_S - time.monotonic()))

    def _revive(self) -> None:
        """Start again who ended by itself: with brokers and wires failing, nobody may."""
        for worker in self.workers:
            if worker.pid is not None and not worker.alive and worker.name not in self._world.down:
                if worker.name not in self._world.frail and not self._is_cut_off(worker):
                    said = f"{worker.name}, exit code {worker.exit_code}: {last_error(worker.log)}"
                    self.checker.run.add("worker ended", said)
                self._world.frail.discard(worker.name)
                worker.start()

    def _is_cut_off(self, worker: WorkerProcess) -> bool:
        """Whether it ended as it was started behind a wire that was hurt: then it says that Kafka is out of reach."""
        if worker.exit_code != _OUT_OF_REACH:
            return False
        return any(
            strike.victim == f"wire of {worker.name}"
            and (strike.healed_s is None or self._since() - strike.healed_s < _REACH_TIMEOUT_S)
            for strike in self.strikes
        )

    def _measure_on(self) -> None:
        """In a thread, as a broker that is down makes it wait."""
        log = Log(self._address, request_timeout_s=_LOOK_TIMEOUT_S)
        try:
            while not self._ended.wait(_TICK_S):
                try:
                    self._measure(log)
                except (KafkaException, TimeoutError):
                    # Measured: a client that has lived through the restart of a broker may get no answer for a minute.
                    discard(log, "close")
                    log = Log(self._address, request_timeout_s=_LOOK_TIMEOUT_S)
        finally:
            discard(log, "close")

    def _measure(self, log: Log) -> None:
        asked_s = time.monotonic()
        committed = {app.guarantee: self._committed(log, app.app_id, app.inputs) for app in self._workload.apps}
        ends = log.ends([tp for offsets in committed.values() for tp in offsets])
        now_s = time.monotonic()
        if not self.active:
            self._peace_s += now_s - self._looked_s
        self._looked_s = now_s
        for guarantee, progress in self.progress.items():
            progress.take(now_s - self._started_s, committed[guarantee], ends, self._peace_s)
            if progress.in_peace_s > NO_PROGRESS_S:
                waits = f"for {progress.waiting_s:.0f} s, {progress.in_peace_s:.0f} s of them without any fault"
                self.checker.run.add("no progress", f"{guarantee}: an event waits {waits}")
        for recovery in self._recoveries:
            recovery.take(asked_s, now_s, committed, ends)

    def _committed(self, log: Log, group: str, topics: Iterable[str]) -> dict[TP, int]:
        tps = [(topic, number) for topic in topics for number in range(self._partitions.get(topic, 0))]
        return dict.fromkeys(tps, 0) | log.committed(group, tps)

    def _wake_all(self) -> None:
        for worker in self.workers:
            worker.send(signal.SIGCONT)

    def _say(self, text: str) -> None:
        self.stage = text
        self._on_change(self)

    def _log_lines(self, anomalies: Iterable[Anomaly]) -> dict[str, list[str]]:
        """What the workers said around the events that show the anomalies."""
        logs = [worker.log for worker in self.workers]
        found = {each.name: moment(self._log, each.examples) for each in anomalies}
        return {name: lines_around(logs, at_ms) for name, at_ms in found.items() if at_ms is not None}
