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
from typing import Any

import psutil
import pytest

from streams_app.demo import Options, has_moved, kill_schedule
from streams_app.embedded import free_port
from streams_app.supervisor import Supervisor, WorkerError, WorkerProcess

ROOT = Path(__file__).parent.parent
#: A demo of some seconds needs half a minute on two busy cores.
TIMEOUT_S = 150.0


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
        assert verdict["written"]["transfers"] > 3_000
        [kill] = verdict["kills"]
        assert kill["recovered_s"] == verdict["slowest_recovery_s"] > 0
        assert "kill 1 of 1" in done.stderr
        assert processes_of(tmp_path) == []
        assert list(tmp_path.glob("demo-*")) == []

    def test_an_interrupted_demo_ends_everything_that_it_started(self, tmp_path: Path) -> None:
        """Else Ctrl-C leaves workers and a Kafka running that nobody knows of."""
        with subprocess.Popen(
            demo_command("--json"), cwd=ROOT, env=demo_env(tmp_path), stderr=subprocess.PIPE, text=True
        ) as demo:
            assert demo.stderr is not None
            for line in demo.stderr:
                if "starting workers" in line:
                    break
            demo.send_signal(signal.SIGINT)
            _, rest = demo.communicate(timeout=60)
        assert demo.returncode == 130, rest
        assert "interrupted" in rest
        assert processes_of(tmp_path) == []
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


class TestTheScheduleOfKills:
    def test_the_same_seed_gives_the_same_kills_and_another_seed_others(self) -> None:
        """Else a run that went wrong cannot be seen again."""
        assert kill_schedule(Options(seed=1)) == kill_schedule(Options(seed=1))
        assert kill_schedule(Options(seed=1)) != kill_schedule(Options(seed=2))

    def test_kills_lie_inside_of_the_run_with_time_to_recover_in_between(self) -> None:
        """Else a kill hits a worker that is not back yet, or nobody, and the demo shows nothing."""
        for seed in range(50):
            options = Options(seconds=45, workers=2, kills=3, seed=seed)
            times_s, workers = zip(*kill_schedule(options), strict=True)
            assert set(workers) <= {0, 1}
            assert times_s[0] > 4.5
            assert times_s[-1] < 45 * 0.9
            assert all(later - earlier >= 6 for earlier, later in itertools.pairwise(times_s))


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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A process that runs until somebody ends it."""
    worker = WorkerProcess(
        "server", "http.server", ["--bind", "127.0.0.1", str(free_port())], tmp_path / "log", {"PYTHONUNBUFFERED": "1"}
    )
    with Supervisor([worker]):
        yield worker


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
