"""The demo is what a newcomer runs first: it must be right, say so, and leave nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import psutil
import pytest
from rich.console import Console

from streams_app.audit import Report, Section
from streams_app.demo import Options
from streams_app.demo_view import verdict_panel
from streams_app.embedded import free_port
from streams_app.inflicted import Committed, Failure, Kind, Schedule, crash, has_moved, needed_s, schedule, zombie
from streams_app.registry import Finding
from streams_app.supervisor import Supervisor, WorkerError, WorkerProcess
from streams_app.verdict import Verdict, outcome

ROOT = Path(__file__).parent.parent
#: A demo of some seconds needs half a minute on two busy cores, one with all failures some two minutes.
TIMEOUT_S = 240.0


def demo_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "faust", "-A", "streams_app", "demo", *arguments]


def demo_env(datadir: Path, **more: str) -> dict[str, str]:
    """An environment without settings of ours but these."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("STREAMS_APP_") and name not in {"KAFKA_URL", "KAFKA_PREFIX", "PORT"}
    }
    return {**env, "STREAMS_APP_DATADIR": str(datadir), **more}


def run_demo(datadir: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo_command(*arguments),
        cwd=ROOT,
        env=demo_env(datadir, **env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def processes_of(datadir: Path) -> list[str]:
    """Living processes, a broker's among them, that name the folder in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(datadir) in word for word in words):
            found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
    return found


def wait_until(condition: Any, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.05)


class TestTheWholeDemo:
    def test_a_short_demo_with_a_kill_ends_with_a_good_verdict_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        """Else the first thing that a newcomer sees is a failure, or a Kafka that still runs the day after."""
        done = run_demo(tmp_path, "--seconds", "12", "--kills", "1", "--rate", "300", "--seed", "5", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        verdict: Mapping[str, Any] = json.loads(done.stdout)
        assert verdict["good"]
        assert (verdict["lost"], verdict["repeated"]) == (0, 0)
        assert verdict["audit"]["held"]
        assert verdict["audit"]["at_rest"]
        assert verdict["written"].keys() == {"transfers", "page-views", "sensor-readings"}
        assert verdict["written"]["transfers"] > 3_000
        [kill] = verdict["kills"]
        assert kill["recovered_s"] == verdict["slowest_recovery_s"] > 0
        [failure] = verdict["failures"]
        assert failure["kind"] == "crash"
        assert failure["went_on_s"].keys() == verdict["guarantees"].keys()
        once, again, forgotten = (verdict["guarantees"][f"{each}_once"] for each in ("exactly", "at_least", "at_most"))
        assert once == {"lost": 0, "repeated": 0}
        assert again["lost"] == 0
        assert forgotten["repeated"] == 0
        assert forgotten["lost"] <= forgotten["reported"]
        assert "failure 1 of 1" in done.stderr
        # They need more time than there is, and that is said.
        assert [each.split(":")[0] for each in verdict["left_out"]] == ["1 × zombie", "1 × broker restart"]
        assert "left out: 1 × zombie" in done.stderr
        assert processes_of(tmp_path) == []
        assert list(tmp_path.glob("demo-*")) == []

    @pytest.mark.prove
    def test_crash_zombie_and_broker_restart_are_inflicted_and_every_guarantee_holds(self, tmp_path: Path) -> None:
        """Else the demo boasts of failures that it does not show, or a guarantee does not survive one of them."""
        done = run_demo(tmp_path, "--seconds", "40", "--kills", "1", "--rate", "300", "--seed", "5", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        verdict = json.loads(done.stdout)
        assert sorted(each["kind"] for each in verdict["failures"]) == ["broker restart", "crash", "zombie"]
        for failure in verdict["failures"]:
            assert failure["went_on_s"].keys() == verdict["guarantees"].keys()
        [zombie_] = [each for each in verdict["failures"] if each["kind"] == "zombie"]
        assert zombie_["lasted_s"] > 8  # the session
        assert verdict["left_out"] == []
        assert verdict["guarantees"]["at_most_once"]["lost"] <= verdict["guarantees"]["at_most_once"]["reported"]
        assert processes_of(tmp_path) == []

    def test_an_interrupted_demo_ends_everything_that_it_started(self, tmp_path: Path) -> None:
        """Else Ctrl-C leaves workers and a Kafka running that nobody knows of."""
        # Tests that a shell has put into the background ignore it, and so would what they start.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            demo = subprocess.Popen(
                demo_command("--json"), cwd=ROOT, env=demo_env(tmp_path), stderr=subprocess.PIPE, text=True
            )
        finally:
            signal.signal(signal.SIGINT, before)
        with demo:
            assert demo.stderr is not None
            for line in demo.stderr:
                if "starting workers" in line:
                    break
            demo.send_signal(signal.SIGINT)
            _, rest = demo.communicate(timeout=180)
        assert demo.returncode == 130, rest
        assert "interrupted" in rest
        # A worker that was being started in that moment ends as soon as it finds us gone.
        wait_until(lambda: processes_of(tmp_path) == [], 20)
        assert list(tmp_path.glob("demo-*")) == []

    def test_a_kafka_out_of_reach_is_exit_code_3(self, tmp_path: Path) -> None:
        """Else a script cannot tell a broken guarantee from a broken network."""
        url = f"kafka://127.0.0.1:{free_port()}"
        done = run_demo(tmp_path, "--json", KAFKA_URL=url)
        assert (done.returncode, done.stdout) == (3, "")
        assert "no Kafka broker answers" in done.stderr
        assert list(tmp_path.glob("demo-*")) == []

    @pytest.mark.parametrize("arguments", [("--kills", "-1"), ("--seconds", "soon")])
    def test_wrong_usage_is_exit_code_2_and_starts_nothing(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """Else a typing mistake costs a minute, and looks like a broken guarantee."""
        done = run_demo(tmp_path, *arguments)
        assert done.returncode == 2
        assert arguments[0] in done.stderr
        assert list(tmp_path.iterdir()) == []


def scheduled(seed: int = 1, seconds: float = 45, **wanted: int) -> Schedule:
    kinds = {Kind.CRASH: 3, Kind.ZOMBIE: 1, Kind.BROKER_RESTART: 1}
    kinds |= {Kind[name.upper()]: count for name, count in wanted.items()}
    return schedule(Random(seed), seconds, 2, kinds)


class TestTheSchedule:
    def test_the_same_seed_gives_the_same_failures_and_another_seed_others(self) -> None:
        """Else a run that went wrong cannot be seen again."""
        assert scheduled(1) == scheduled(1)
        assert scheduled(1) != scheduled(2)

    def test_all_kinds_fit_into_the_usual_run_each_with_the_time_that_it_takes(self) -> None:
        """Else one failure hits before the one before it is over, and nobody can tell which of them did what."""
        usual = Options()
        wanted = {Kind.CRASH: usual.kills, Kind.ZOMBIE: usual.zombies, Kind.BROKER_RESTART: usual.broker_restarts}
        for seed in range(50):
            planned, left_out = schedule(Random(seed), usual.seconds, usual.workers, wanted)
            assert not left_out
            assert sorted(each.kind for each in planned) == sorted(["broker restart", *3 * ["crash"], "zombie"])
            assert {each.worker for each in planned} <= {0, 1}
            ends_s = [each.at_s + needed_s(each.kind, 8.0) for each in planned]
            assert ends_s[-1] <= usual.seconds
            assert all(end_s <= later.at_s + 1e-6 for end_s, later in zip(ends_s, planned[1:], strict=False))

    def test_what_does_not_fit_is_left_out_and_kills_are_not(self) -> None:
        """Else a short demo runs on for a minute, or does less than it was asked to and does not say so."""
        planned, left_out = scheduled(seconds=12, crash=1)
        assert [each.kind for each in planned] == [Kind.CRASH]
        assert left_out == {Kind.ZOMBIE: 1, Kind.BROKER_RESTART: 1}
        planned, _ = scheduled(seconds=5, crash=20)
        assert len(planned) == 20
        assert all(earlier.at_s <= later.at_s for earlier, later in itertools.pairwise(planned))
        assert planned[-1].at_s < 5

    def test_a_run_without_failures_is_possible(self) -> None:
        """Else nobody sees what the failures cost."""
        assert scheduled(crash=0, zombie=0, broker_restart=0).failures == ()


class TestRecovery:
    def test_a_kill_is_recovered_when_each_partition_with_work_has_moved(self) -> None:
        """Else the time of recovery that we boast of is that of the workers that were not killed."""
        before = {("t", 0): 10, ("t", 1): 10}
        ends = {("t", 0): 20, ("t", 1): 20}
        assert not has_moved(before, {("t", 0): 20, ("t", 1): 10}, ends)
        assert has_moved(before, {("t", 0): 20, ("t", 1): 11}, ends)

    def test_a_partition_without_work_holds_nothing_up(self) -> None:
        """Else a quiet partition makes every recovery look endless."""
        before = {("t", 0): 10, ("t", 1): 10}
        assert has_moved(before, {("t", 0): 11, ("t", 1): 10}, {("t", 0): 11, ("t", 1): 10})


def a_failure(kind: Kind, **measured: Any) -> Failure:
    return Failure(kind, 6.0, "demo-1", 77, time.monotonic(), **measured)


class TestWhatIsMeasured:
    def test_work_goes_on_under_each_guarantee_by_itself(self) -> None:
        """Else the quick guarantee's recovery is shown for the slow one."""
        failure = a_failure(Kind.CRASH, committed={"exactly_once": {("t", 0): 5}, "at_most_once": {("s", 0): 5}})
        ends = {("t", 0): 9, ("s", 0): 9}
        failure.measure({"exactly_once": {("t", 0): 6}, "at_most_once": {("s", 0): 5}}, ends, failure.began_s + 2)
        assert failure.went_on_s == {"exactly_once": pytest.approx(2)}
        assert (failure.has_gone_on, failure.recovered_s) == (False, None)
        failure.measure({"exactly_once": {("t", 0): 7}, "at_most_once": {("s", 0): 6}}, ends, failure.began_s + 3)
        assert failure.recovered_s == pytest.approx(3)

    def test_a_failure_before_anything_was_asked_has_not_gone_on(self) -> None:
        """Else a broker that is down counts as recovered at once."""
        assert not a_failure(Kind.BROKER_RESTART).has_gone_on


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A process that runs until somebody ends it."""
    worker = WorkerProcess(
        "server", "http.server", ["--bind", "127.0.0.1", str(free_port())], tmp_path / "log", {"PYTHONUNBUFFERED": "1"}
    )
    with Supervisor([worker]):
        yield worker


class TestInflicting:
    nothing: ClassVar[Committed] = {"exactly_once": {("t", 0): 1}}

    def test_a_crash_is_noted_between_death_and_next_life(self, server: WorkerProcess) -> None:
        """Else what the new life does is not told from what the old one did."""
        server.start()
        first = server.pid
        alive = []

        def look() -> Committed:
            alive.append(server.alive)
            return self.nothing

        failure = a_failure(Kind.CRASH)
        assert list(crash(failure, server, look)) == []
        assert alive == [False]
        assert server.alive
        assert server.pid != first
        assert failure.committed == self.nothing

    def test_a_kafka_that_does_not_answer_holds_up_no_restart(self, server: WorkerProcess) -> None:
        """Else a worker stays dead because we want to know something."""
        server.start()
        answers = iter([None, None, self.nothing])
        failure = a_failure(Kind.CRASH)
        steps = crash(failure, server, lambda: next(answers))
        next(steps)
        assert server.alive
        assert failure.committed is None
        assert list(steps) == []
        assert failure.committed == self.nothing

    @pytest.mark.parametrize("alone", [True, False])
    def test_a_zombie_sleeps_past_its_session_until_it_is_replaced_and_wakes(
        self, server: WorkerProcess, alone: bool
    ) -> None:
        """Else it is no zombie, or it never writes again."""
        server.start()
        wait_until(lambda: server.said("Serving"), 20)
        status = psutil.Process(server.pid).status
        failure = a_failure(Kind.ZOMBIE)
        steps = zombie(failure, server, lambda: self.nothing, 0.2, alone=alone)
        next(steps)
        wait_until(lambda: status() == psutil.STATUS_STOPPED, 10)
        wait_until(lambda: next(steps, None) is None and failure.age_s() > 1.5, 10)
        if not alone:  # nobody has taken over yet
            assert status() == psutil.STATUS_STOPPED
            assert failure.lasted_s is None
            failure.went_on_s["exactly_once"] = 1.0
        next(steps)
        wait_until(lambda: status() != psutil.STATUS_STOPPED, 10)
        assert failure.lasted_s is not None
        assert failure.lasted_s > 1.0


def a_verdict(*, at_least_once: list[Finding] | None = None, **more: Any) -> Verdict:
    sections = [
        Section("app streams-app", {"rows": 9}, [], "exactly_once"),
        Section("app streams-app-at-least-once", {"rows": 9}, at_least_once or [], "at_least_once"),
        Section("app streams-app-at-most-once", {"reported": 411, "in hand": 0}, [], "at_most_once"),
        Section("check analytics", {"lost": 0, "repeated": 312}, [], "at_least_once"),
        Section("check ledger", {"lost": 0, "repeated": 0}, [], "exactly_once"),
        Section("check sensors", {"lost": 57, "reported": 411, "repeated": 0}, [], "at_most_once"),
    ]
    committed: Committed = {each: {("t", 0): 1} for each in ("exactly_once", "at_least_once", "at_most_once")}
    went_on_s = dict.fromkeys(committed, 2.25)
    failures = [
        a_failure(Kind.CRASH, committed=committed, went_on_s=went_on_s, lasted_s=0.1, given_up=64),
        a_failure(Kind.ZOMBIE, committed=committed, went_on_s=went_on_s, lasted_s=11.2, given_up=0),
        a_failure(Kind.BROKER_RESTART, committed=committed, went_on_s=went_on_s, lasted_s=7.5, given_up=347),
    ]
    inputs = {"exactly_once": ["transfers"], "at_least_once": ["page-views"], "at_most_once": ["sensor-readings"]}
    written = {"transfers": 45_000, "page-views": 45_001, "sensor-readings": 45_002}
    return Verdict(Options(), Report(sections, True, 3, 0.5), failures, written, inputs, **{"ended": (), **more})


def shown(verdict: Verdict) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(verdict_panel(verdict, 0))
        return console.export_text()


class TestTheVerdict:
    def test_each_guarantee_has_its_own_figures(self) -> None:
        """Else what at least once repeats is held against exactly once."""
        document = a_verdict().document()
        assert document["guarantees"] == {
            "exactly_once": {"lost": 0, "repeated": 0},
            "at_least_once": {"lost": 0, "repeated": 312},
            "at_most_once": {"lost": 57, "repeated": 0, "reported": 411},
        }
        assert (document["good"], document["lost"], document["repeated"]) == (True, 0, 0)
        assert [each["kind"] for each in document["failures"]] == ["crash", "zombie", "broker restart"]
        assert len(document["kills"]) == 1
        json.dumps(document)

    def test_it_says_in_the_words_of_the_letter_what_became_of_the_events(self) -> None:
        """Else nobody sees within ten seconds what the three guarantees are, and what they did."""
        text = shown(a_verdict())
        assert "every guarantee held" in text
        for line in (
            "exactly once, a letter made sure that it takes effect once",
            "45,000 transfers: nothing lost, nothing twice",
            "at least once, a letter sent again until heard back",
            "45,001 page-views: nothing lost, 312 outputs repeated",
            "at most once, a letter sent once and forgotten",
            "45,002 sensor-readings: 57 lost (reported: at most 411), nothing twice",
            "crash: a worker dies amid its work",
            "zombie: a worker freezes",
            "broker restart: Kafka itself dies",
        ):
            assert line in text
        lines = text.splitlines()
        assert len(lines) <= 24
        assert all(len(line) <= 80 for line in lines)

    def test_a_broken_promise_is_marked_and_spoils_the_verdict(self) -> None:
        """Else a promise that was broken passes as kept."""
        verdict = a_verdict(at_least_once=[Finding("unseen", 3, ["page-views[0]@7"])])
        assert not verdict.good
        text = shown(verdict)
        assert "✗ at least once" in text
        assert "✓ exactly once" in text
        assert "3 × unseen, for example page-views[0]@7" in text

    def test_a_worker_that_ended_by_itself_spoils_it(self) -> None:
        """Else a worker that crashes of its own passes for one that we killed."""
        verdict = a_verdict(ended=["demo-1 (exit code 1)"])
        assert not verdict.good
        assert "ended by itself: demo-1" in shown(verdict)

    @pytest.mark.parametrize(
        ("guarantee", "figures", "words"),
        [
            ("exactly_once", {"lost": 0, "repeated": 0}, "nothing lost, nothing twice"),
            ("exactly_once", {"lost": 2, "repeated": 1}, "2 lost, 1 output repeated"),
            ("exactly_once", {"lost": None, "repeated": None}, "no check counts what was lost or repeated"),
            ("at_most_once", {"lost": 0, "repeated": 0, "reported": 5}, "nothing lost (reported: at most 5)"),
            ("at_most_once", {"lost": None, "repeated": None, "reported": 5}, "at most 5 lost, as reported"),
        ],
    )
    def test_what_nobody_counted_is_not_said_to_be_nothing(
        self, guarantee: str, figures: dict[str, int | None], words: str
    ) -> None:
        """Else agents without a check are told that nothing was lost."""
        assert words in outcome(guarantee, figures)


class TestWorkerProcesses:
    def test_a_killed_worker_can_be_started_again_and_its_log_goes_on(self, server: WorkerProcess) -> None:
        """Else the demo takes what an earlier life said for what this one says."""
        server.start()
        wait_until(lambda: server.said("Serving"), 20)
        first = server.pid
        server.kill()
        assert (server.alive, server.exit_code) == (False, -signal.SIGKILL)
        server.start()
        assert not server.said("Serving")  # as it said in its first life
        wait_until(lambda: server.said("Serving"), 20)
        assert (server.restarts, server.alive) == (1, True)
        assert server.pid != first
        assert server.log.read_text().count("Serving") == 2

    def test_a_worker_that_runs_is_not_started_twice(self, server: WorkerProcess) -> None:
        """Else one of the two is nobody's, and runs on for ever."""
        server.start()
        with pytest.raises(WorkerError, match="runs already"):
            server.start()

    def test_a_supervisor_ends_even_those_that_do_not_listen(self, server: WorkerProcess) -> None:
        """Else a worker that hangs survives the demo."""
        server.start()
        server.send(signal.SIGSTOP)
        # Both pending at once, SIGTERM would be heard before SIGSTOP.
        wait_until(lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED, 10)
        supervisor = Supervisor([server])
        assert supervisor.end(timeout_s=0.3) == [server]
        assert not server.alive

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
    def test_a_worker_dies_with_whoever_started_it(self, tmp_path: Path) -> None:
        """Else a killed demo leaves workers behind that work on, and hold its data folder."""
        script = (
            "import sys, time; from pathlib import Path; from streams_app.supervisor import WorkerProcess; "
            f"worker = WorkerProcess('w', 'http.server', ['--bind', '127.0.0.1', '{free_port()}'], "
            f"Path({str(tmp_path / 'log')!r}), {{'PYTHONUNBUFFERED': '1'}}); worker.start(); "
            "print(worker.pid, flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            worker = psutil.Process(int(parent.stdout.readline()))
            wait_until(lambda: "Serving" in (tmp_path / "log").read_text(), 20)
            parent.kill()
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 10)
