"""The demo: workers are killed while input flows, and then every committed record is checked.

::

    stages   Kafka ──> workers start ──> input flows, workers are killed ──> the rest is worked off, audit ──> verdict
    owned    a folder of this run alone (Kafka's data, the workers' tables and logs), or on a Kafka that was there
             before, topics and groups under a prefix of this run alone

Everything that is started here is ended here, whichever way the run ends. The demo knows no agent: input and checks come
from the registry, figures from the audit. demo_view.py shows it.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from threading import Event
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from streams_app.audit import TP, AuditedApp, AuditedTable, Log, Report, audit, audited
from streams_app.embedded import Broker, EmbeddedKafka, free_port
from streams_app.errors import ConfigurationError, KafkaUnreachable, StreamsAppError
from streams_app.generate import Feed, Plan
from streams_app.kafka import KafkaAddress
from streams_app.registry import checks, generators
from streams_app.settings import Settings
from streams_app.supervisor import Supervisor, WorkerProcess, signals_interrupt

if TYPE_CHECKING:
    from streams_app.application import App

#: What a worker's log says when it has an assignment at work (engine.py).
AT_WORK = "partitions started"
_TICK_S = 0.2
_REACH_TIMEOUT_S = 5.0
#: Two workers on two busy cores need 5 s; the first start compiles and creates the topics.
_START_TIMEOUT_S = 90.0
#: For the last kill's recovery and what piled up meanwhile.
_DRAIN_TIMEOUT_S = 60.0
#: Offsets may be unavailable for a moment (a coordinator that loads), not for longer.
_MEASURE_TIMEOUT_S = 20.0
_FEED_GRACE_S = 5.0
_RATE_WINDOW_S = 3.0
#: A worker that ends by itself is started again, as a process manager does; not for ever.
_MOST_ENDS = 5
_ADMIN_TIMEOUT_S = 15.0


class DemoFailed(StreamsAppError):
    """The demo could not be carried through; the text says what happened, and where to look."""


class _GivenUpError(StreamsAppError):
    """Inside a background thread: nobody waits for its result any more."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; ``rate`` is in records per second, for each input."""

    seconds: float = 45.0
    workers: int = 2
    kills: int = 3
    rate: float = 1_000.0
    seed: int = 1


@dataclass
class Kill:
    """One kill: who, when (seconds since the input began), and how long its work lay still."""

    at_s: float
    worker: str
    pid: int
    killed_s: float
    #: Offsets that the group had committed when the worker was gone.
    committed: Mapping[TP, int]
    #: Seconds until every partition that had work had moved again; None: not yet.
    recovered_s: float | None = None


class Input:
    """One generated input on its way: what was written, and how far the group has committed it."""

    def __init__(self, feed: Feed, app_id: str, partitions: int) -> None:
        """``app_id`` is the group that reads it; empty: none does, and nothing of it will be processed."""
        self.name = feed.plan.name
        self.app_id = app_id
        self.feed = feed
        self.partitions: list[TP] = [(feed.topic, partition) for partition in range(partitions)]
        self.processed = 0
        self._samples: deque[tuple[float, int, int]] = deque()

    @property
    def written(self) -> int:
        """Records that Kafka has acknowledged."""
        return self.feed.acknowledged

    def sample(self, now_s: float, processed: int) -> None:
        """Take note of the committed count."""
        self.processed = processed
        self._samples.append((now_s, self.written, processed))
        while self._samples[0][0] < now_s - _RATE_WINDOW_S:
            self._samples.popleft()

    def rates(self) -> tuple[float, float]:
        """Written and processed records per second, over the last few seconds."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        first, last = self._samples[0], self._samples[-1]
        elapsed_s = last[0] - first[0]
        return (last[1] - first[1]) / elapsed_s, (last[2] - first[2]) / elapsed_s


@dataclass
class Verdict:
    """How it went."""

    options: Options
    report: Report
    kills: Sequence[Kill]
    written: Mapping[str, int]
    #: Workers that ended by themselves, with their exit codes.
    ended: Sequence[str]
    #: What is left to look into; None: nothing is.
    kept: str | None = None

    @property
    def good(self) -> bool:
        """Whether every guarantee held, and nothing but our kills ended a worker."""
        return self.report.held and self.report.at_rest and not self.ended and len(self.kills) == self.options.kills

    @property
    def slowest_recovery_s(self) -> float | None:
        """Of all kills; None: there was none."""
        return max((kill.recovered_s for kill in self.kills if kill.recovered_s is not None), default=None)

    def total(self, figure: str) -> int:
        """Sum of a figure of that name over all sections of the audit."""
        return sum(int(section.figures.get(figure, 0)) for section in self.report.sections)

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "good": self.good,
            "lost": self.total("lost"),
            "repeated": self.total("repeated"),
            "written": dict(self.written),
            "kills": [
                {
                    "at_s": round(kill.at_s, 3),
                    "worker": kill.worker,
                    "pid": kill.pid,
                    "recovered_s": None if kill.recovered_s is None else round(kill.recovered_s, 3),
                }
                for kill in self.kills
            ],
            "slowest_recovery_s": None if self.slowest_recovery_s is None else round(self.slowest_recovery_s, 3),
            "ended_by_themselves": list(self.ended),
            "seed": self.options.seed,
            "seconds": self.options.seconds,
            "workers": self.options.workers,
            "rate": self.options.rate,
            "kept": self.kept,
            "audit": self.report.document(),
        }


def kill_schedule(options: Options) -> list[tuple[float, int]]:
    """When (seconds since the input began) and which worker, counted from 0: the same seed gives the same kills.

    One kill in the middle half of each of equal slices, so that a worker has time to come back before the next.
    """
    random = Random(options.seed)  # noqa: S311 - repeatable, not secret
    begin_s, end_s = 0.1 * options.seconds, 0.9 * options.seconds
    slice_s = (end_s - begin_s) / max(1, options.kills)
    return [
        (begin_s + slice_s * (number + random.uniform(0.25, 0.75)), random.randrange(options.workers))
        for number in range(options.kills)
    ]


class Demo:
    """One run. `run` blocks; its attributes may be read by a view meanwhile."""

    def __init__(self, app: App, options: Options, on_change: Callable[[Demo], None] = lambda demo: None) -> None:
        self.app = app
        self.options = options
        self.settings: Settings = app.settings
        self.stage = "getting ready"
        self.detail = ""
        #: Since the input began; None: it did not yet.
        self.elapsed_s: float | None = None
        self.supervisor = Supervisor(())
        self.inputs: list[Input] = []
        self.kills: list[Kill] = []
        #: Workers that ended by themselves, with their exit codes.
        self.ended: list[str] = []
        #: What is left to look into when the run was not good.
        self.kept: str | None = None
        self._on_change = on_change
        self._log: Log | None = None
        self._stop, self._give_up = Event(), Event()
        self._feeds: list[Future[None]] = []
        self._measured_s = 0.0

    def run(self) -> Verdict:
        """Carry it through, and clean up. Must run in the main thread; SIGINT, SIGTERM and SIGHUP interrupt it.

        Raises:
            ConfigurationError: nothing registers an input.
            KafkaUnreachable: Kafka does not answer, at the beginning or later on.
            DemoFailed: the workers do not start, or keep ending by themselves.
            EmbeddedKafkaError, NotDeliveredError, WorkerError: as their texts say.
        """
        if not generators():
            raise ConfigurationError("no module of the package agents registers a generator: there is no input to show")
        with signals_interrupt() as ignore_signals, _place(self.settings, self._keep) as place:
            self.settings = place.settings
            with contextlib.ExitStack() as held:
                address = held.enter_context(self._kafka(place))
                verdict = self._with_kafka(address, held)
                # Runs first of all that cleans up: an impatient Ctrl-C must not leave anything behind.
                held.callback(ignore_signals)
            place.keep = not verdict.good
        verdict.kept = self.kept
        return verdict

    def _keep(self, what: str) -> None:
        self.kept = what

    @contextlib.contextmanager
    def _kafka(self, place: _Place) -> Iterator[KafkaAddress]:
        """Kafka, answering; its topics of this run are deleted at the end of a good run."""
        self._say("starting Kafka")
        with contextlib.ExitStack() as held:
            if self.settings.kafka_url is None:
                # Not the usual port: that may be wanted by the user's own Kafka while the demo runs.
                embedded = EmbeddedKafka.ensure(place.folder, port=free_port(), progress=self._say)
                held.enter_context(embedded)
                self.settings = replace(self.settings, kafka_url=embedded.url)
                yield KafkaAddress.parse(embedded.url)
                return
            address = KafkaAddress.parse(self.settings.kafka_url)
            address.check(_REACH_TIMEOUT_S)
            place.guest_of = address
            yield address

    def _with_kafka(self, address: KafkaAddress, held: contextlib.ExitStack) -> Verdict:
        self._log = Log(address)
        held.callback(self._log.close)
        self.supervisor = held.enter_context(Supervisor([self._worker(number) for number in self._numbers()]))
        held.callback(self._say, "ending the workers")
        threads = held.enter_context(ThreadPoolExecutor(len(generators()) + 1, "demo"))
        held.callback(self._stop_threads)
        self._start_workers()
        self._flow(address, threads)
        return self._judge(address, threads)

    # -- Stages.

    def _numbers(self) -> range:
        return range(1, self.options.workers + 1)

    def _worker(self, number: int) -> WorkerProcess:
        name = f"demo-{number}"
        folder = self.settings.datadir
        env = {
            "KAFKA_URL": self.settings.kafka_url or "",
            "KAFKA_PREFIX": self.settings.kafka_prefix,
            "STREAMS_APP_DATADIR": str(folder),
            "STREAMS_APP_SLOT": name,
        }
        arguments = ["-A", "streams_app", "worker", "-l", "info", "--without-web"]
        return WorkerProcess(name, "faust", arguments, folder / f"{name}.log", env)

    def _start_workers(self) -> None:
        self._say("starting workers")
        self.supervisor.start()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while late := [worker for worker in self.supervisor.workers if not worker.said(AT_WORK)]:
            self._revive()
            if time.monotonic() > deadline_s:
                raise DemoFailed(f"{_names(late)} did not start within {_START_TIMEOUT_S:g} s. {_why(late[0])}")
            self._changed()
            time.sleep(_TICK_S)

    def _flow(self, address: KafkaAddress, threads: ThreadPoolExecutor) -> None:
        """Let the input flow, and kill on schedule."""
        self.stage, self.detail = "input flows, workers are killed", ""
        self.inputs = self._make_inputs(address)
        self._feeds = [threads.submit(each.feed.run, self._stop, self._on_feed) for each in self.inputs]
        due = deque(kill_schedule(self.options))
        started_s = self._measured_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < self.options.seconds:
            self.elapsed_s = elapsed_s
            if due and elapsed_s >= due[0][0]:
                self._kill(self.supervisor.workers[due.popleft()[1]], elapsed_s)
            self._tick()
        self.elapsed_s = self.options.seconds

    def _make_inputs(self, address: KafkaAddress) -> list[Input]:
        prefix = self.settings.kafka_prefix
        apps = audited_as(self.app, prefix)
        partitions = self._reader().partitions()
        inputs = []
        for name in generators():
            feed = Feed(Plan(name, rate=self.options.rate, seed=self.options.seed), address, prefix)
            app_id = next((app.app_id for app in apps if feed.topic in app.inputs), "")
            inputs.append(Input(feed, app_id, partitions.get(feed.topic, 0)))
        return inputs

    def _judge(self, address: KafkaAddress, threads: ThreadPoolExecutor) -> Verdict:
        """Wait for the rest while the workers go on, then audit."""
        self._say("waiting until all input is processed")
        self._stop.set()
        auditing = threads.submit(self._audit, address)
        while not (auditing.done() and all(feed.done() for feed in self._feeds)):
            self._tick()
        report = auditing.result()
        self._tick()
        written = {each.name: each.written for each in self.inputs}
        return Verdict(self.options, report, self.kills, written, self.ended)

    def _audit(self, address: KafkaAddress) -> Report:
        """In a thread: the audit, when all is written."""
        for feed in self._feeds:
            feed.result()
        apps = audited_as(self.app, self.settings.kafka_prefix)

        def on_progress(what: str, records: int) -> None:
            self._abandon()
            self.detail = f"{what}, {records:,} records read" if records else what

        return audit(address, self.settings, apps, checks(), wait_s=_DRAIN_TIMEOUT_S, on_progress=on_progress)

    # -- Again and again.

    def _tick(self) -> None:
        begun_s = time.monotonic()
        for feed in self._feeds:
            if feed.done():
                feed.result()  # raises what the feed raised
        self._revive()
        self._measure()
        self._changed()
        time.sleep(max(0.0, begun_s + _TICK_S - time.monotonic()))

    def _kill(self, worker: WorkerProcess, elapsed_s: float) -> None:
        """Kill, take note of how far the group was, start again at once."""
        pid = worker.pid or 0
        killed_s = time.monotonic()
        worker.kill()
        # Asked between its death and its next life: whatever moves from here on is work taken up again.
        self.kills.append(Kill(elapsed_s, worker.name, pid, killed_s, self._committed()))
        worker.start()

    def _revive(self) -> None:
        """Start again who ended by itself."""
        for worker in self.supervisor.ended():
            self.ended.append(f"{worker.name} (exit code {worker.exit_code})")
            if len(self.ended) >= _MOST_ENDS:
                raise DemoFailed(f"workers keep ending by themselves: {', '.join(self.ended)}. {_why(worker)}")
            worker.start()

    def _measure(self) -> None:
        now_s = time.monotonic()
        try:
            committed = self._committed()
            ends = self._reader().ends(committed)
        except KafkaException as error:
            if now_s - self._measured_s > _MEASURE_TIMEOUT_S:
                raise KafkaUnreachable(f"Kafka has not answered for {_MEASURE_TIMEOUT_S:g} s: {error}") from error
            return
        self._measured_s = now_s
        for each in self.inputs:
            # The topics are of this run, begin at 0 and hold no transactions: offsets are counts.
            each.sample(now_s, sum(offset for tp, offset in committed.items() if tp[0] == each.feed.topic))
        for kill in self.kills:
            if kill.recovered_s is None and has_moved(kill.committed, committed, ends):
                kill.recovered_s = now_s - kill.killed_s

    def _committed(self) -> dict[TP, int]:
        """Committed offsets of all inputs that we write; 0 where there is none yet."""
        committed: dict[TP, int] = {}
        for each in self.inputs:
            if each.app_id:
                committed |= dict.fromkeys(each.partitions, 0)
                committed |= self._reader().committed(each.app_id, each.partitions)
        return committed

    def _reader(self) -> Log:
        if self._log is None:
            raise AssertionError("asked before Kafka was there")
        return self._log

    def _say(self, text: str) -> None:
        self.stage, self.detail = text, ""
        self._changed()

    def _changed(self) -> None:
        self._on_change(self)

    # -- Threads.

    def _on_feed(self, _feed: Feed) -> None:
        self._abandon()

    def _abandon(self) -> None:
        if self._give_up.is_set():
            raise _GivenUpError("the demo ended first")

    def _stop_threads(self) -> None:
        """Let the feeds write what they have in hand, for a moment; nobody needs their results any more."""
        self._stop.set()
        deadline_s = time.monotonic() + _FEED_GRACE_S
        while not all(feed.done() for feed in self._feeds) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self._give_up.set()


def has_moved(before: Mapping[TP, int], now: Mapping[TP, int], ends: Mapping[TP, int]) -> bool:
    """Whether every partition that has, or had, work since ``before`` was committed further."""
    return all(now.get(tp, 0) > offset for tp, offset in before.items() if ends.get(tp, 0) > offset)


def audited_as(app: App, prefix: str) -> list[AuditedApp]:
    """What is audited of ``app`` when it runs with another KAFKA_PREFIX than it does here."""
    own = app.settings.kafka_prefix

    def renamed(name: str) -> str:
        return prefix + name.removeprefix(own)

    here = audited(app)
    tables = [AuditedTable(table.name, renamed(table.changelog), table.expires) for table in here.tables]
    return [AuditedApp(renamed(here.app_id), tuple(renamed(name) for name in here.inputs), tuple(tables))]


def _names(workers: Sequence[WorkerProcess]) -> str:
    return " and ".join(worker.name for worker in workers)


def _why(worker: WorkerProcess) -> str:
    return f"The log {worker.log} ends:\n{worker.last_lines()}"


# --- Where a run leaves its things ------------------------------------------------------------------------------------


@dataclass
class _Place:
    """The folder of a run, and its prefix if it is a guest of a Kafka that was there before."""

    folder: Path
    settings: Settings
    guest_of: KafkaAddress | None = None
    keep: bool = True

    @property
    def text(self) -> str:
        """For people."""
        if self.guest_of is None:
            return f"{self.folder} (logs, tables, Kafka's data)"
        return f"{self.folder} (logs, tables) and the topics {self.settings.kafka_prefix}*"


@contextlib.contextmanager
def _place(settings: Settings, on_keep: Callable[[str], None]) -> Iterator[_Place]:
    """A folder of this run alone; kept when the run was not good and there is something to look into."""
    settings.datadir.mkdir(parents=True, exist_ok=True)
    _end_orphans(settings.datadir)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=settings.datadir)).absolute()
    own = replace(settings, datadir=folder)
    if settings.kafka_url is not None:
        own = replace(own, kafka_prefix=f"demo-{secrets.token_hex(4)}-")
    place = _Place(folder, own)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield place
        except KeyboardInterrupt:
            place.keep = False
            raise
        finally:
            if place.keep and list(folder.glob("*.log")):
                on_keep(place.text)
            else:
                _remove(place)


def _remove(place: _Place) -> None:
    if place.guest_of is not None:
        _delete_topics(place.guest_of, place.settings.kafka_prefix)
    shutil.rmtree(place.folder)


def _end_orphans(datadir: Path) -> None:
    """End the Kafka of earlier runs that were killed themselves, and so could not; their folders stay."""
    for folder in datadir.glob("demo-*"):
        try:
            lock = open(folder / "lock")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # that demo runs
            for home in folder.glob("kafka/broker-*"):
                Broker(home, int(home.name.removeprefix("broker-"))).stop()


def _delete_topics(address: KafkaAddress, prefix: str) -> None:
    """Leave a Kafka that is not ours as we found it.

    Raises:
        KafkaUnreachable: it does not answer any more, or does not permit it.
    """
    admin = AdminClient({**address.librdkafka(), "log_level": 0})
    try:
        topics = [name for name in admin.list_topics(timeout=_ADMIN_TIMEOUT_S).topics if name.startswith(prefix)]
        groups = admin.list_consumer_groups(request_timeout=_ADMIN_TIMEOUT_S).result(_ADMIN_TIMEOUT_S).valid
        members = [group.group_id for group in groups if group.group_id.startswith(prefix)]
        deleting = dict(admin.delete_topics(topics, request_timeout=_ADMIN_TIMEOUT_S)) if topics else {}
        if members:
            deleting |= admin.delete_consumer_groups(members, request_timeout=_ADMIN_TIMEOUT_S)
        for future in deleting.values():
            future.result(_ADMIN_TIMEOUT_S)
    except KafkaException as error:
        raise KafkaUnreachable(
            f"the demo is through, but its topics {prefix}* could not be deleted: {error.args[0].str()}"
        ) from error
