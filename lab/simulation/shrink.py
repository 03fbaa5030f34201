"""The shortest history that shows the same anomaly: fewer faults, fewer entries, milder faults."""

from __future__ import annotations

from collections.abc import Iterator

from lab.simulation.history import History
from lab.simulation.seams import Clock

#: What comes before a fault moves it: without that, it may have to be asked for a little earlier or later.
_SHIFTS = (0, *(shift for distance in range(1, 41) for shift in (-distance, distance)))
_MOST_RUNS = 8_000


class Shrinker:
    """Finds it by trying; bounded."""

    def __init__(self, clock: Clock, history: History, kind: str) -> None:
        """``kind`` is the anomaly that must stay."""
        self._clock = clock
        self._kind = kind
        self._left = _MOST_RUNS
        self.history = history

    def shrink(self) -> History:
        """The shortest one found."""
        while self._left > 0 and any(self._try(each) for each in _smaller(self.history)):
            pass
        return self.history

    def _try(self, history: History) -> bool:
        """Keep ``history`` if it fails in the same way."""
        self._left -= 1
        if self._left < 0:
            return False
        found = history.run(self._clock).anomalies
        fails = any(anomaly.kind == self._kind for anomaly in found)
        if fails:
            self.history = history
        return fails


def _smaller(history: History) -> Iterator[History]:
    faults = sorted(history.faults.items())
    for at in range(len(faults)):
        before, after = faults[:at], faults[at + 1 :]
        for shift in _SHIFTS if after else (0,):
            moved = {number + shift: answer for number, answer in after if number + shift >= 0}
            yield history._replace(faults={**dict(before), **moved})
    for name, least in (("poison", 0), ("entries", 1), ("workers", 1)):
        if getattr(history, name) > least:
            lower = history._replace(**{name: getattr(history, name) - 1})
            if name == "poison":
                lower = history._replace(poison=0)
            for number, _ in faults or [(0, 0)]:
                for shift in _SHIFTS:
                    moved = {each + shift * (each >= number): answer for each, answer in faults}
                    yield lower._replace(faults={each: answer for each, answer in moved.items() if each >= 0})
    for number, answer in faults:
        for lower_answer in _lower(answer):
            yield history._replace(faults={**history.faults, number: lower_answer})


def _lower(answer: int) -> Iterator[int]:
    """Milder answers: as the parts of an answer stand for kind, time and manner of a fault, several ways are tried."""
    yield from sorted(
        {
            each
            for each in (answer % 10, answer % 110, answer % 330, answer % 1_320, answer % 3_300)
            if 0 < each < answer
        }
    )
