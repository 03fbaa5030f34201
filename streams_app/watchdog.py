"""The watchdog: a thread that ends the process when something of it hangs, after it wrote all stacks to stderr.

What hangs, holds partitions that nobody else can have: heartbeats go on in a thread of their own. Ended, it is started again
by whoever looks after processes, and others take over meanwhile.

A healthy process must not be taken for one that hangs, so time is counted by the thread's own looks: one that was late, as
the process was frozen (SIGSTOP), or the machine asleep or busy, counts for little. What is watched:

- event loops: a pulse is sent into the loop, and must come back. An agent that *awaits* for minutes lets it through; one that
  *blocks* for longer than the limit (``STREAMS_APP_HANG_TIMEOUT_MS``) is taken for hanging;
- commits, which have time-outs of their own: one that takes longer than all of them together waits for a disk that is gone;
- the end of the process, once it was asked for.

What it cannot see: native code that keeps Python's lock. Whoever asks ``/livez`` gets no answer then.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from streams_app import logs
from streams_app.errors import ExitCode

_LOOK_EVERY_S = 1.0
#: What a look counts for at most, however late it comes.
_LOOK_COUNTS_S = 2.0
#: Of its limit, after which `Watchdog.late` tells.
_LATE = 0.5
#: A log that nobody reads must not keep the process.
_LAST_WORDS_WITHIN_S = 3.0
_STDERR = 2


class Watched:
    """Something that has to move."""

    def __init__(self, name: str, probe: Callable[[], object], limit_s: float) -> None:
        """``probe`` gives another value each time it has moved, and None while there is nothing to wait for."""
        self.name = name
        self.limit_s = limit_s
        self._probe = probe
        self._seen: object = None
        self.still_s = 0.0

    def look(self, counts_s: float) -> None:
        """Has it moved?"""
        seen = self._probe()
        self.still_s = 0.0 if seen is None or seen != self._seen else self.still_s + counts_s
        self._seen = seen


class Watchdog:
    """See the module."""

    def __init__(
        self,
        *,
        end: Callable[[str], None] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._end = end or end_process
        self._now_s = now_s
        self._watched: list[Watched] = []
        self._looked_s: float | None = None
        #: That much of the process's own time is left for its end; None: nobody has asked for it.
        self._left_s: float | None = None

    def watch(self, name: str, probe: Callable[[], object], limit_s: float) -> None:
        """From now on."""
        self._watched.append(Watched(name, probe, limit_s))

    def watch_loop(self, name: str, loop: Callable[[], asyncio.AbstractEventLoop | None], limit_s: float) -> None:
        """Watch an event loop, as soon as there is one."""
        self.watch(name, Pulse(loop), limit_s)

    def end_within(self, seconds: float) -> None:
        """The process is to end; asked again, the shorter time counts. May be called by a signal's handler."""
        self._left_s = seconds if self._left_s is None else min(self._left_s, seconds)

    def late(self) -> list[str]:
        """What has not moved for half of its limit, in words."""
        return [
            f"{each.name} has not moved for {each.still_s:.0f} s"
            for each in self._watched
            if each.still_s > each.limit_s * _LATE
        ]

    def start(self) -> None:
        """Begin; it goes on to the very end, as it may be the end that hangs."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Once a second."""
        now_s = self._now_s()
        counts_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _LOOK_COUNTS_S)
        self._looked_s = now_s
        for each in self._watched:
            each.look(counts_s)
            if each.still_s > each.limit_s:
                self._end(f"{each.name} has not moved for {each.still_s:.0f} s: the process hangs, and is ended")
        if self._left_s is not None:
            self._left_s -= counts_s
            if self._left_s <= 0:
                self._end("the process was asked to end, and did not in time")


class Pulse:
    """A probe of an event loop: another number each time that a call has come through it."""

    def __init__(self, loop: Callable[[], asyncio.AbstractEventLoop | None]) -> None:
        self._loop = loop
        self._sent = self._back = 0

    def __call__(self) -> object:
        loop = self._loop()
        if loop is None or not loop.is_running():
            self._back = self._sent
            return None
        if self._back == self._sent:
            self._sent += 1
            try:
                loop.call_soon_threadsafe(self._come_back, self._sent)
            except RuntimeError:
                return None  # closed meanwhile
        return self._sent

    def _come_back(self, number: int) -> None:
        self._back = number


def end_process(why: str) -> NoReturn:
    """End at once, with all stacks on stderr. Nothing is used that whatever hangs may hold: no logger, no ``sys.stderr``."""
    words = f"{logs.critical_line(why)}\n{stacks()}".encode(errors="backslashreplace")
    writing = threading.Thread(target=os.write, args=(_STDERR, words), name="last words", daemon=True)
    writing.start()
    writing.join(_LAST_WORDS_WITHIN_S)
    os._exit(ExitCode.HUNG)


def stacks() -> str:
    """What all threads are doing."""
    # Not on a disk, where there is another way: it may be what hangs.
    in_memory = hasattr(os, "memfd_create")
    with os.fdopen(os.memfd_create("stacks"), "w+b") if in_memory else tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
