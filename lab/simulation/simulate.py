"""Many histories in a row, and the first that fails, shrunk."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

from lab.simulation.checks import Anomaly
from lab.simulation.history import History
from lab.simulation.plan import Guarantee
from lab.simulation.seams import Clock, seams
from lab.simulation.shrink import Shrinker

_COLLECT_EVERY = 500


class Violation:
    """A history that should not have been."""

    def __init__(self, number: int, history: History, anomalies: list[Anomaly], clock: Clock) -> None:
        self.number = number
        self.history = history
        self.anomalies = anomalies
        #: The history, step by step, and what is wrong with it.
        self.story: list[str] = []
        self._clock = clock

    def shrink(self) -> None:
        """Make it the shortest one that shows the same."""
        self.history = Shrinker(self._clock, self.history, self.anomalies[0].kind).shrink()

    def tell(self) -> None:
        """Find words for it."""
        steps: list[str] = []
        self.anomalies = self.history.run(self._clock, steps).anomalies
        self.story = [
            self.history.words(),
            *(f"{number:4}. {step}" for number, step in enumerate(steps, 1)),
            *(f"{anomaly.kind}: {anomaly.text}" for anomaly in self.anomalies),
            f"To run it again: {self.history!r}",
        ]


class Run:
    """What was run, and what came of it."""

    def __init__(self) -> None:
        self.histories = 0
        self.took_s = 0.0
        self.counts: Counter[str] = Counter()
        self.violation: Violation | None = None

    @property
    def per_s(self) -> float:
        """Histories a second."""
        return self.histories / self.took_s if self.took_s else 0.0


def simulate(
    guarantees: Sequence[Guarantee],
    seed: int,
    *,
    histories: int | None = None,
    seconds: float | None = None,
    shrinks: bool = True,
    on_progress: Callable[[int], None] = lambda _histories: None,
) -> Run:
    """Run histories of the guarantees in turn, until so many are done, the time is over, or one fails."""
    run, started_s = Run(), time.monotonic()
    with seams() as clock:
        gc.disable()  # a history makes many circles that end with it, and a collection every now and then takes them all
        try:
            for number in count() if histories is None else range(histories):
                if seconds is not None and time.monotonic() - started_s > seconds:
                    break
                guarantee = guarantees[number % len(guarantees)]
                history = History.drawn(guarantee, f"{seed}-{guarantee}-{number}")
                anomalies, counts = history.run(clock)
                run.histories += 1
                run.counts.update(counts)
                if anomalies:
                    run.violation = Violation(number, history, anomalies, clock)
                    break
                if number % _COLLECT_EVERY == 0:
                    gc.collect(1)
                    on_progress(run.histories)
            run.took_s = time.monotonic() - started_s
            if run.violation is not None:
                if shrinks:
                    run.violation.shrink()
                run.violation.tell()
        finally:
            gc.enable()
    return run
