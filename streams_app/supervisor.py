"""Worker processes for the demo and for whoever else wants to see workers die.

::

    start ──> alive ──> kill (SIGKILL, at once) ─────────> ended ──> start, as often as wanted
                └─────> terminate (SIGTERM, tidily) ─────────^

Each worker is the leader of a session and a process group of its own: a Ctrl-C on our terminal does not reach it, we
decide when it ends. The other way round none survives us: the end of the `with` ends them all, and where the system can
(Linux) the kernel kills them when we are killed ourselves. For that, start workers from a thread that lives as long as
the process: the kernel watches the thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from streams_app.errors import StreamsAppError

#: A worker that is asked to end commits or drops its batch, leaves the group, closes its stores: 1 to 3 s, rarely more.
TERMINATE_TIMEOUT_S = 15.0
#: After SIGKILL nothing but the kernel has work to do.
KILL_TIMEOUT_S = 10.0
_LAST_LINES = 15
#: The part of a log that is looked at for its last lines.
_LAST_BYTES = 8_000

#: Runs in the worker before its module does: asks the kernel (prctl, PR_SET_PDEATHSIG) to kill it when we are gone, and
#: looks whether we went before that was heard. Not in a preexec_fn, which may deadlock in a process with threads.
_BOUND_TO_US = (
    "import ctypes, os, runpy, signal, sys; us, module = sys.argv[1:3]; del sys.argv[1:3]; "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(us) or sys.exit('whoever started this process is gone'); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


class WorkerError(StreamsAppError):
    """A worker does not start, or does not end; the text names it, its log, and the log's last lines."""


class WorkerProcess:
    """A process that can be started again and again; what it says is appended to one log file.

    Attributes:
        name: its lasting name.
        log: path of the log file.
        restarts: how often it was started after the first time.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        """Of the process ``python -m module arguments`` in ``folder``, or where we are; ``env`` is added to our own."""
        self.name = name
        self.log = log
        self.restarts = -1
        self._command = [sys.executable, "-c", _BOUND_TO_US, str(os.getpid()), module, *arguments]
        self._env = {**os.environ, **env}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._found: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Process id of the latest start; None before the first."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def frozen(self) -> bool:
        """Whether it was stopped, by SIGSTOP; where there is no /proc to look at, never."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    @contextlib.contextmanager
    def environment(self, env: Mapping[str, str]) -> Iterator[None]:
        """Starts within have these variables, too."""
        before, self._env = self._env, {**self._env, **env}
        try:
            yield
        finally:
            self._env = before

    @property
    def exit_code(self) -> int | None:
        """Of the latest start; negative: the signal that ended it. None: it runs, or never did."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it, or start it again.

        Raises:
            WorkerError: it runs already.
        """
        if self.alive:
            raise WorkerError(f"{self.name} runs already, as process {self.pid}")
        with open(self.log, "ab") as log:
            self._log_start = log.tell()
            self._found.clear()
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.restarts += 1

    def said(self, text: str) -> bool:
        """Whether ``text`` stands in the log since the latest start."""
        if text not in self._found and self.count(text):
            self._found.add(text)
        return text in self._found

    def count(self, text: str) -> int:
        """How often ``text`` stands in the log since the latest start."""
        if not self.log.exists():
            return 0
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            return log.read().count(text.encode())

    def send(self, number: int) -> None:
        """Send a signal to its process group; nothing when it has ended."""
        # Asked first, and reaped by nobody else: as long as it was not, the number cannot belong to another process.
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, without a word to it, as by ``kill -9``; it is gone when this returns.

        Raises:
            WorkerError: the system does not let it end.
        """
        self.send(signal.SIGKILL)
        self.wait(KILL_TIMEOUT_S)

    def terminate(self) -> None:
        """Ask it to end; `wait` for that."""
        self.send(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        """Wait until it has ended; gives the exit code, None if it never ran.

        Raises:
            WorkerError: it runs still after ``timeout_s``.
        """
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise WorkerError(f"{self.name} (process {self.pid}) has not ended within {timeout_s:g} s") from error

    def last_lines(self) -> str:
        """The end of what the latest start said, for people."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _LAST_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-_LAST_LINES:])


class Supervisor:
    """Several workers, ended together: use it as a context manager."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self.workers = tuple(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> None:
        """Start those that do not run."""
        for worker in self.workers:
            if not worker.alive:
                worker.start()

    def ended(self) -> list[WorkerProcess]:
        """Those that were started and do not run any more."""
        return [worker for worker in self.workers if worker.pid is not None and not worker.alive]

    def end(self, timeout_s: float = TERMINATE_TIMEOUT_S) -> list[WorkerProcess]:
        """End all: tidily, and by SIGKILL who has not ended within ``timeout_s``, of whom the list is."""
        for worker in self.workers:
            worker.terminate()
        deadline_s = time.monotonic() + timeout_s
        late = []
        try:
            for worker in self.workers:
                try:
                    worker.wait(max(0.0, deadline_s - time.monotonic()))
                except WorkerError:
                    late.append(worker)
        finally:  # not even an impatient second Ctrl-C leaves one behind
            for worker in self.workers:
                worker.kill()
        return late


class Interrupts:
    """Whether somebody wants us to end."""

    def __init__(self) -> None:
        self._heard = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Hear SIGINT, SIGTERM and SIGHUP."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What is ignored already stays ignored: so `nohup` asked for it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.ignore_further()
        self._heard = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if one was heard, and lost: Python drops what is raised while it destroys an object."""
        if self._heard:
            raise KeyboardInterrupt

    def ignore_further(self) -> None:
        """From now on they are ignored."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def uninstall(self) -> None:
        """As it was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[Interrupts]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; later ones do not break the clean-up.

    Must run in the main thread, which is to `check` now and then.
    """
    interrupts = Interrupts()
    interrupts.install()
    try:
        yield interrupts
    finally:
        interrupts.uninstall()
