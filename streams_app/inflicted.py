"""The failures that the demo inflicts, on a schedule that the same seed repeats.

::

    crash            SIGKILL of a worker amid its work; it is started again at once
    zombie           SIGSTOP of a worker, past its session: declared dead, its work taken over by another. Then SIGCONT:
                     it wakes up, knows nothing of it, and still writes
    broker restart   SIGKILL of Kafka itself; it is started again at once

Inflicting one takes time. Each is a generator of steps, so that whoever inflicts it can go on with other work in between.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import NamedTuple, TypeAlias

from streams_app.audit import TP
from streams_app.supervisor import WorkerProcess

#: Committed offsets by guarantee and partition.
Committed: TypeAlias = Mapping[str, Mapping[TP, int]]
#: Asks for them; None: Kafka does not answer at the moment.
Look: TypeAlias = Callable[[], Committed | None]

#: What a worker's log says of each guarantee when it has an assignment at work (engine.py).
AT_WORK = "partitions started"
#: What a worker has sent before it was frozen arrives within this time.
_IN_FLIGHT_S = 0.5
#: After the session has ended, others take over within 2 to 4 s; nobody waits longer than this for it.
_TAKE_OVER_S = 15.0
#: A woken worker notices, and joins the group again, within some 3 s.
_REJOIN_S = 15.0


class Kind(StrEnum):
    """The name of a failure."""

    CRASH = "crash"
    ZOMBIE = "zombie"
    BROKER_RESTART = "broker restart"


class Planned(NamedTuple):
    """One failure to come: when (seconds since the input began), and which worker, counted from 0, if it hits one."""

    at_s: float
    kind: Kind
    worker: int


class Schedule(NamedTuple):
    """All failures to come, in their order."""

    failures: tuple[Planned, ...]
    #: Those that were wanted and do not fit, by kind.
    left_out: Mapping[Kind, int]


def needed_s(kind: Kind, session_s: float) -> float:
    """How long a failure takes until its work has gone on, on two busy cores."""
    return {Kind.CRASH: 4.0, Kind.ZOMBIE: session_s + 6.0, Kind.BROKER_RESTART: 12.0}[kind]


def schedule(
    random: Random, seconds: float, workers: int, wanted: Mapping[Kind, int], session_s: float = 8.0
) -> Schedule:
    """Spread the ``wanted`` failures over a run, in random order, each with the time it takes before the next.

    Crashes are taken as they are wanted, even if they come thick and fast; others only as long as they fit.
    """
    begin_s, room_s = 0.05 * seconds, 0.9 * seconds
    kinds = [Kind.CRASH] * wanted.get(Kind.CRASH, 0)
    free_s = room_s - sum(needed_s(kind, session_s) for kind in kinds)
    left_out: Counter[Kind] = Counter()
    for kind in (Kind.ZOMBIE, Kind.BROKER_RESTART):
        for _ in range(wanted.get(kind, 0)):
            if needed_s(kind, session_s) <= free_s:
                kinds.append(kind)
                free_s -= needed_s(kind, session_s)
            else:
                left_out[kind] += 1
    random.shuffle(kinds)
    planned = []
    stretch = room_s / max(1.0, sum(needed_s(kind, session_s) for kind in kinds))
    for kind in kinds:
        slot_s = stretch * needed_s(kind, session_s)
        spare_s = max(0.0, slot_s - needed_s(kind, session_s))
        planned.append(Planned(begin_s + random.uniform(0.2, 1.0) * spare_s, kind, random.randrange(workers)))
        begin_s += slot_s
    return Schedule(tuple(planned), left_out)


@dataclass
class Failure:
    """One failure, and what was measured of it; all times in seconds."""

    kind: Kind
    #: Since the input began.
    at_s: float
    #: A worker's name, or ``Kafka``.
    victim: str
    pid: int
    #: Monotonic time.
    began_s: float
    #: Offsets from which on progress is work taken up again; None: not known yet.
    committed: Committed | None = None
    #: Until every partition that had work had moved again, by guarantee.
    went_on_s: dict[str, float] = field(default_factory=dict)
    #: Until the victim was woken, or answered again; None: it was not yet.
    lasted_s: float | None = None
    #: Events that at-most-once workers reported as given up from then on until the next failure; None: no such workers.
    given_up: int | None = None

    @property
    def has_gone_on(self) -> bool:
        """Whether work has gone on under every guarantee."""
        return self.committed is not None and self.went_on_s.keys() >= self.committed.keys()

    @property
    def recovered_s(self) -> float | None:
        """Until work had gone on under every guarantee; None: it has not."""
        return max(self.went_on_s.values(), default=None) if self.has_gone_on else None

    def measure(self, committed: Committed, ends: Mapping[TP, int], now_s: float) -> None:
        """Take note under which guarantees work has gone on."""
        for guarantee, before in (self.committed or {}).items():
            if guarantee not in self.went_on_s and has_moved(before, committed[guarantee], ends):
                self.went_on_s[guarantee] = now_s - self.began_s

    def age_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began_s


def has_moved(before: Mapping[TP, int], now: Mapping[TP, int], ends: Mapping[TP, int]) -> bool:
    """Whether every partition that has, or had, work since ``before`` was committed further."""
    return all(now.get(tp, 0) > offset for tp, offset in before.items() if ends.get(tp, 0) > offset)


# --- The steps of each ------------------------------------------------------------------------------------------------


def crash(failure: Failure, worker: WorkerProcess, look: Look) -> Iterator[None]:
    """Kill a worker and start it again."""
    worker.kill()
    # Between its death and its next life: whatever moves from here on is work taken up again.
    failure.committed = look()
    worker.start()
    failure.lasted_s = failure.age_s()
    yield from _take_note(failure, look)


def zombie(failure: Failure, worker: WorkerProcess, look: Look, session_s: float, *, alone: bool) -> Iterator[None]:
    """Freeze a worker until its work is taken over (nobody does that if it is ``alone``), and wake it."""
    worker.send(signal.SIGSTOP)
    yield from _until(lambda: failure.age_s() > _IN_FLIGHT_S)
    yield from _take_note(failure, look)
    # Not before: until the session ends, progress can only be that of the others.
    yield from _until(lambda: failure.age_s() > session_s + 1.0)
    if not alone:
        yield from _until(lambda: failure.has_gone_on or failure.age_s() > session_s + _TAKE_OVER_S)
    joined = worker.count(AT_WORK)
    worker.send(signal.SIGCONT)
    failure.lasted_s = woken_s = failure.age_s()
    guarantees = len(failure.committed or ())
    yield from _until(lambda: worker.count(AT_WORK) >= joined + guarantees or failure.age_s() > woken_s + _REJOIN_S)


def broker_restart(failure: Failure, restart: Callable[[], None], look: Look, threads: Executor) -> Iterator[None]:
    """Kill Kafka and start it again, which is what ``restart`` does; nothing is asked of it meanwhile."""
    restarting = threads.submit(restart)
    yield from _until(restarting.done)
    restarting.result()
    failure.lasted_s = failure.age_s()
    # Not before: what was committed between a look and the kill would pass for work taken up again.
    yield from _take_note(failure, look)


def _until(condition: Callable[[], bool]) -> Iterator[None]:
    while not condition():
        yield


def _take_note(failure: Failure, look: Look) -> Iterator[None]:
    while failure.committed is None:
        failure.committed = look()
        if failure.committed is None:
            yield
