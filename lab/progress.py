"""How far each guarantee is, sampled: throughput, the age of the oldest event that waits, and when work went on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from streams_app.audit import TP
from streams_app.inflicted import has_moved

#: Ends of the inputs are remembered that long: nothing may wait longer anyway.
_REMEMBERED_S = 600.0
#: What was on its way when a fault struck has arrived after that time.
_IN_FLIGHT_S = 1.0


class Sample(NamedTuple):
    """One look at one guarantee."""

    at_s: float
    #: Events committed in all.
    processed: int
    #: Age of the oldest event that is not committed; 0: none waits.
    waiting_s: float
    #: How much of that no fault was under way.
    in_peace_s: float = 0.0


class Progress:
    """Of one guarantee."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.committed: dict[TP, int] = {}
        #: Ends of each input partition: when they were seen, in seconds and in seconds of peace.
        self._ends: dict[TP, deque[tuple[float, float, int]]] = {}

    def take(
        self, at_s: float, committed: Mapping[TP, int], ends: Mapping[TP, int], peace_s: float | None = None
    ) -> None:
        """Take note of committed offsets, and of the ends of the inputs, which were asked afterwards.

        ``peace_s`` is a clock that stands still while a fault is under way.
        """
        peace_s = at_s if peace_s is None else peace_s
        oldest_s, oldest_peace_s = at_s, peace_s
        for tp, offset in committed.items():
            history = self._ends.setdefault(tp, deque([(at_s, peace_s, 0)]))
            if ends.get(tp, 0) > history[-1][-1]:
                history.append((at_s, peace_s, ends[tp]))
            # The first one's end is committed: what came next is the oldest that waits.
            while len(history) > 1 and (history[1][-1] <= offset or history[0][0] < at_s - _REMEMBERED_S):
                history.popleft()
            if len(history) > 1 and offset < history[-1][-1]:
                oldest_s, oldest_peace_s = min(oldest_s, history[1][0]), min(oldest_peace_s, history[1][1])
        self.committed = dict(committed)
        self.samples.append(Sample(at_s, sum(committed.values()), at_s - oldest_s, peace_s - oldest_peace_s))

    @property
    def waiting_s(self) -> float:
        """Age of the oldest event that is not committed, as of the last look."""
        return self.samples[-1].waiting_s if self.samples else 0.0

    @property
    def in_peace_s(self) -> float:
        """How much of that no fault was under way."""
        return self.samples[-1].in_peace_s if self.samples else 0.0


class Recovery:
    """Waits, after a fault struck, until every partition that had work has moved, under each guarantee.

    ::

        strikes ──> what was under way has landed: offsets of now ──> … ──> all moved on from there
    """

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        #: Whether no other fault struck or lasted meanwhile: only then the time is that of this fault.
        self.alone = True
        self._before: Mapping[str, Mapping[TP, int]] = {}
        #: Seconds by guarantee.
        self.took_s: dict[str, float] = {}

    def take(
        self, asked_s: float, now_s: float, committed: Mapping[str, Mapping[TP, int]], ends: Mapping[TP, int]
    ) -> None:
        """Look whether work has gone on, with offsets that were asked for at one time and known at another."""
        if not self._before:
            if asked_s > self.began_s + _IN_FLIGHT_S:
                self._before = {guarantee: dict(offsets) for guarantee, offsets in committed.items()}
            return
        for guarantee, before in self._before.items():
            if guarantee not in self.took_s and has_moved(before, committed[guarantee], ends):
                self.took_s[guarantee] = now_s - self.began_s

    @property
    def seconds(self) -> float | None:
        """Until work had gone on under all guarantees; None: it has not."""
        over = self._before and self.took_s.keys() == self._before.keys()
        return max(self.took_s.values()) if over else None
