"""The demo: workers and Kafka fail while input flows, and then every committed record is checked.

::

    stages   Kafka ──> workers start ──> input flows, failures are inflicted ──> the rest is worked off, audit ──> verdict
    owned    a folder of this run alone (Kafka's data, the workers' tables and logs), or on a Kafka that was there
             before, topics and groups under a prefix of this run alone

Everything that is started here is ended here, whichever way the run ends. The demo knows no agent: input and checks come
from the registry, figures from the audit. Beside this module: inflicted.py has the failures, flow.py what flows under each
guarantee, demo_place.py the folder and the topics, verdict.py the end, and demo_view.py shows all of it.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from threading import Event
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException

from streams_app.audit import TP, AuditedApp, AuditedTable, Log, Report, audit, audited, guarantee_of
from streams_app.demo_place import Place, place_of
from streams_app.embedded import Broker, EmbeddedKafka, free_port
from streams_app.errors import ConfigurationError, KafkaUnreachable, NotPermitted, StreamsAppError
from streams_app.flow import Flow
from streams_app.generate import Feed, Plan
from streams_app.inflicted import (
    Committed,
    Failure,
    Kind,
    Planned,
    Schedule,
    broker_restart,
    crash,
    needed_s,
    schedule,
    zombie,
)
from streams_app.kafka import KafkaAddress
from streams_app.permissions import missing_of_transactions, transactional_apps
from streams_app.provision import TopicsNotPermitted, create_topics, required_topics
from streams_app.registry import Check, checks, generators
from streams_app.settings import Settings
from streams_app.supervisor import Interrupts, Supervisor, WorkerProcess, signals_interrupt
from streams_app.verdict import Verdict

if TYPE_CHECKING:
    from streams_app.application import App

_TICK_S = 0.2
_REACH_TIMEOUT_S = 5.0
#: Two workers on two busy cores need 5 s; the first start compiles and creates the topics.
_START_TIMEOUT_S = 90.0
#: For the last failure's recovery and what piled up meanwhile.
_DRAIN_TIMEOUT_S = 60.0
#: Offsets may be unavailable for a moment (a coordinator that loads), not for longer.
_MEASURE_TIMEOUT_S = 20.0
_FEED_GRACE_S = 5.0
#: That long a failure that is due waits until work has gone on after the one before, so that they can be told apart.
_PATIENCE_S = 30.0
#: A worker that ends by itself is started again, as a process manager does; not for ever.
_MOST_ENDS = 5
_THROUGH = object()


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
    zombies: int = 1
    broker_restarts: int = 1


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
        #: One for each guarantee that runs.
        self.flows: list[Flow] = []
        self.schedule = Schedule((), {})
        #: In the order in which they were inflicted.
        self.failures: list[Failure] = []
        #: What was wanted and is not done, and why.
        self.left_out: list[str] = []
        #: Workers that ended by themselves, with their exit codes.
        self.ended: list[str] = []
        #: What is left to look into when the run was not good.
        self.kept: str | None = None
        self._on_change = on_change
        self._log: Log | None = None
        self._broker: Broker | None = None
        #: Those of the failure that is being inflicted.
        self._steps: Iterator[None] | None = None
        self._given_up_before: int | None = None
        self._stop, self._give_up = Event(), Event()
        self._feeds: list[Future[None]] = []
        self._measured_s = 0.0
        self._interrupts = Interrupts()

    def run(self) -> Verdict:
        """Carry it through, and clean up. Must run in the main thread; SIGINT, SIGTERM and SIGHUP interrupt it.

        Raises:
            ConfigurationError: nothing registers an input, or no agent that runs here reads one.
            KafkaUnreachable: Kafka does not answer, at the beginning or later on.
            DemoFailed: the workers do not start, or keep ending by themselves.
            EmbeddedKafkaError, NotDeliveredError, WorkerError: as their texts say.
        """
        if not generators():
            raise ConfigurationError("no module of the package agents registers a generator: there is no input to show")
        with signals_interrupt() as self._interrupts, place_of(self.settings, self._keep) as place:
            self.settings = place.settings
            with contextlib.ExitStack() as held:
                address = held.enter_context(self._kafka(place))
                verdict = self._with_kafka(address, held)
                # Runs first of all that cleans up: an impatient Ctrl-C must not leave anything behind.
                held.callback(self._interrupts.ignore_further)
            place.keep = not verdict.good
        verdict.kept = self.kept
        return verdict

    def _keep(self, what: str) -> None:
        self.kept = what

    @contextlib.contextmanager
    def _kafka(self, place: Place) -> Iterator[KafkaAddress]:
        """Kafka, answering; its topics of this run are deleted at the end of a good run."""
        self._say("starting Kafka")
        with contextlib.ExitStack() as held:
            if self.settings.kafka_url is None:
                # Not the usual port: that may be wanted by the user's own Kafka while the demo runs.
                embedded = EmbeddedKafka.ensure(place.folder, port=free_port(), progress=self._say)
                held.enter_context(embedded)
                self._broker = embedded.brokers[0]
                self.settings = replace(self.settings, kafka_url=embedded.url)
                yield KafkaAddress.parse(embedded.url)
                return
            address = KafkaAddress.of(self.settings)
            address.check(_REACH_TIMEOUT_S)
            place.guest_of = address
            self._check_permitted(address)
            yield address

    def _check_permitted(self, address: KafkaAddress) -> None:
        """Before workers are started that would end by themselves: the transactions and the topics of this run."""
        prefix, own = self.settings.kafka_prefix, self.app.settings.kafka_prefix
        otherwise = "unset KAFKA_URL, and the demo brings a Kafka of its own"
        for each in transactional_apps(self.app):
            refused = missing_of_transactions(address, renamed(each.conf.id, own, prefix))
            if refused is not None:
                raise NotPermitted(
                    f"the demo of {each.guarantee} needs transactions, and this Kafka permits none: {refused.text} is "
                    f"missing. Leave the guarantee out with STREAMS_APP_GUARANTEES, or {otherwise}"
                )
        try:
            create_topics(
                address, [spec._replace(name=renamed(spec.name, own, prefix)) for spec in required_topics(self.app)]
            )
        except TopicsNotPermitted as error:
            raise NotPermitted(
                f"the demo works with topics of its own, {prefix}*, which this Kafka does not let us create; {otherwise}"
            ) from error

    def _with_kafka(self, address: KafkaAddress, held: contextlib.ExitStack) -> Verdict:
        self._log = Log(address)
        held.callback(lambda: self._reader().close())
        self.supervisor = held.enter_context(Supervisor([self._worker(number) for number in self._numbers()]))
        held.callback(self._say, "ending the workers")
        # A frozen worker would not hear that it shall end.
        held.callback(self._wake_all)
        threads = held.enter_context(ThreadPoolExecutor(len(generators()) + 2, "demo"))
        held.callback(self._stop_threads)
        self._plan()
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
            "STREAMS_APP_LOG_FORMAT": "text",  # people read it
        }
        arguments = ["-A", "streams_app", "worker", "-l", "info", "--without-web"]
        return WorkerProcess(name, "faust", arguments, folder / f"{name}.log", env)

    def _plan(self) -> None:
        options = self.options
        wanted = {Kind.CRASH: options.kills, Kind.ZOMBIE: options.zombies}
        if self._broker is not None:
            wanted[Kind.BROKER_RESTART] = options.broker_restarts
        elif options.broker_restarts:
            self.left_out.append(f"{Kind.BROKER_RESTART}: this Kafka is not ours to kill")
        self.schedule = schedule(
            Random(options.seed),  # noqa: S311 - repeatable, not secret
            options.seconds,
            options.workers,
            wanted,
            self._session_s,
        )
        for kind, count in self.schedule.left_out.items():
            need_s = needed_s(kind, self._session_s)
            self.left_out.append(f"{count} × {kind}: no {need_s:.0f} s left of {options.seconds:g}")

    def _start_workers(self) -> None:
        self._say("starting workers")
        self.supervisor.start()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while late := [worker for worker in self.supervisor.workers if not self.is_at_work(worker)]:
            self._revive()
            if time.monotonic() > deadline_s:
                raise DemoFailed(f"{_names(late)} did not start within {_START_TIMEOUT_S:g} s. {_why(late[0])}")
            self._changed()
            self._interrupts.check()
            time.sleep(_TICK_S)

    def is_at_work(self, worker: WorkerProcess) -> bool:
        """Whether the worker has had an assignment of each guarantee since its latest start."""
        return all(worker.said(f"({app.guarantee}, generation") for app in self._apps())

    def _apps(self) -> list[AuditedApp]:
        """Those that run, under the prefix of this run."""
        return [audited_as(each, self.settings.kafka_prefix) for each in self.app.family if each.runs_here]

    def _flow(self, address: KafkaAddress, threads: ThreadPoolExecutor) -> None:
        """Let the input flow, and inflict failures on schedule."""
        self.stage, self.detail = "input flows, failures are inflicted", ""
        self.flows = self._make_flows(address)
        feeds = [feed for flow in self.flows for feed in flow.feeds]
        self._feeds = [threads.submit(feed.run, self._stop, self._on_feed) for feed in feeds]
        due = deque(self.schedule.failures)
        started_s = self._measured_s = time.monotonic()
        while (elapsed_s := time.monotonic() - started_s) < self.options.seconds or due or self._steps is not None:
            self.elapsed_s = elapsed_s
            if due and self._may_begin(due[0], elapsed_s):
                self._steps = self._inflict(due.popleft(), elapsed_s, threads)
            self._tick()

    def _make_flows(self, address: KafkaAddress) -> list[Flow]:
        prefix = self.settings.kafka_prefix
        partitions = self._reader().partitions()
        feeds = [
            Feed(Plan(name, rate=self.options.rate, seed=self.options.seed), address, prefix) for name in generators()
        ]
        flows = [Flow(app, [feed for feed in feeds if feed.topic in app.inputs], partitions) for app in self._apps()]
        if not any(flow.feeds for flow in flows):
            raise ConfigurationError("no agent that runs here reads the topic of a generator: there is nothing to show")
        return [flow for flow in flows if flow.feeds]

    def _judge(self, address: KafkaAddress, threads: ThreadPoolExecutor) -> Verdict:
        """Wait for the rest while the workers go on, then audit."""
        self._say("waiting until all input is processed")
        self._stop.set()
        auditing = threads.submit(self._audit, address)
        while not (auditing.done() and all(feed.done() for feed in self._feeds)):
            self._tick()
        report = auditing.result()
        self._tick()
        written = {feed.plan.name: feed.acknowledged for flow in self.flows for feed in flow.feeds}
        inputs = {flow.guarantee: [feed.plan.name for feed in flow.feeds] for flow in self.flows}
        return Verdict(self.options, report, self.failures, written, inputs, self.ended, self.left_out)

    def _audit(self, address: KafkaAddress) -> Report:
        """In a thread: the audit, when all is written."""
        for feed in self._feeds:
            feed.result()

        def on_progress(what: str, records: int) -> None:
            self._abandon()
            self.detail = f"{what}, {records:,} records read" if records else what

        apps, settings = self._apps(), self.settings
        return audit(address, settings, apps, self._checks(), wait_s=_DRAIN_TIMEOUT_S, on_progress=on_progress)

    def _checks(self) -> Mapping[str, type[Check]]:
        """All but those of guarantees that do not run here."""
        prefix = self.settings.kafka_prefix
        elsewhere = [audited_as(each, prefix) for each in self.app.family if each.agents and not each.runs_here]
        return {name: check for name, check in checks().items() if not guarantee_of(check, elsewhere, prefix)}

    # -- Failures.

    @property
    def _session_s(self) -> float:
        return self.settings.session_timeout_ms / 1000

    def _may_begin(self, planned: Planned, elapsed_s: float) -> bool:
        if elapsed_s < planned.at_s or self._steps is not None:
            return False
        last = self.failures[-1] if self.failures else None
        return last is None or last.has_gone_on or last.age_s() > (last.lasted_s or 0.0) + _PATIENCE_S

    def _inflict(self, planned: Planned, elapsed_s: float, threads: ThreadPoolExecutor) -> Iterator[None]:
        """Its steps; from the first on it is among the failures."""
        worker = self.supervisor.workers[planned.worker]
        began_s = time.monotonic()
        if planned.kind == Kind.BROKER_RESTART:
            pid = self._broker.pid if self._broker is not None else None
            failure = Failure(planned.kind, elapsed_s, "Kafka", pid or 0, began_s)
            steps = broker_restart(failure, self._restart_kafka, self._look, threads)
        else:
            failure = Failure(planned.kind, elapsed_s, worker.name, worker.pid or 0, began_s)
            if planned.kind == Kind.CRASH:
                steps = crash(failure, worker, self._look)
            else:
                alone = self.options.workers == 1
                steps = zombie(failure, worker, self._look, self._session_s, alone=alone)
        self._given_up_before = self._given_up()
        self.failures.append(failure)
        return steps

    def _restart_kafka(self) -> None:
        """In a thread, while nobody else asks Kafka anything."""
        assert self._broker is not None, "planned for a Kafka of our own only"
        self._broker.kill()
        self._broker.start()
        # Measured: an admin client that lived through it may get no answer for a minute, a new one gets it at once.
        before, self._log = self._reader(), Log(KafkaAddress.of(self.settings))
        before.close()

    def _look(self) -> Committed | None:
        """Committed offsets by guarantee; None: Kafka does not answer at the moment."""
        now_s = time.monotonic()
        try:
            return {flow.guarantee: flow.measure(self._reader(), now_s) for flow in self.flows}
        except (KafkaException, TimeoutError):
            return None

    def _given_up(self) -> int | None:
        return next((flow.given_up for flow in self.flows if flow.given_up is not None), None)

    def _wake_all(self) -> None:
        for worker in self.supervisor.workers:
            worker.send(signal.SIGCONT)

    # -- Again and again.

    def _tick(self) -> None:
        begun_s = time.monotonic()
        for feed in self._feeds:
            if feed.done():
                feed.result()  # raises what the feed raised
        if self._steps is not None and next(self._steps, _THROUGH) is _THROUGH:
            self._steps = None
        self._revive()
        self._measure()
        self._changed()
        self._interrupts.check()
        time.sleep(max(0.0, begun_s + _TICK_S - time.monotonic()))

    def _revive(self) -> None:
        """Start again who ended by itself."""
        for worker in self.supervisor.ended():
            self.ended.append(f"{worker.name} (exit code {worker.exit_code})")
            if len(self.ended) >= _MOST_ENDS:
                raise DemoFailed(f"workers keep ending by themselves: {', '.join(self.ended)}. {_why(worker)}")
            worker.start()

    def _measure(self) -> None:
        now_s = time.monotonic()
        if self.failures and self.failures[-1].kind == Kind.BROKER_RESTART and self.failures[-1].lasted_s is None:
            self._measured_s = now_s
            return
        committed = self._look()
        ends = self._ends(committed) if committed is not None else None
        if committed is None or ends is None:
            if now_s - self._measured_s > _MEASURE_TIMEOUT_S:
                raise KafkaUnreachable(f"Kafka has not answered for {_MEASURE_TIMEOUT_S:g} s")
            return
        self._measured_s = now_s
        for failure in self.failures:
            failure.measure(committed, ends, now_s)
        given_up = self._given_up()
        if self.failures and given_up is not None and self._given_up_before is not None:
            self.failures[-1].given_up = given_up - self._given_up_before

    def _ends(self, committed: Committed) -> dict[TP, int] | None:
        """Ends of the inputs; None: Kafka does not answer at the moment."""
        try:
            return self._reader().ends([tp for offsets in committed.values() for tp in offsets])
        except (KafkaException, TimeoutError):
            return None

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


def audited_as(app: App, prefix: str) -> AuditedApp:
    """What is audited of ``app`` when it runs with another KAFKA_PREFIX than it does here."""
    own, here = app.settings.kafka_prefix, audited(app)
    tables = tuple(
        AuditedTable(table.name, renamed(table.changelog, own, prefix), table.expires) for table in here.tables
    )
    inputs = tuple(renamed(name, own, prefix) for name in here.inputs)
    return AuditedApp(renamed(here.app_id, own, prefix), inputs, tables, here.guarantee)


def renamed(name: str, own: str, prefix: str) -> str:
    """A name of ours, with another prefix than our ``own``."""
    return prefix + name.removeprefix(own)


def _names(workers: Sequence[WorkerProcess]) -> str:
    return " and ".join(worker.name for worker in workers)


def _why(worker: WorkerProcess) -> str:
    return f"The log {worker.log} ends:\n{worker.last_lines()}"
