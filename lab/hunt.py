"""The checker is checked: the workers run a mutant of the engine, round after round, until somebody notices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lab.checker import Anomaly
from lab.mutants import Mutant
from lab.outcome import Options, Outcome
from streams_app.errors import ConfigurationError

#: Each round has a schedule of its own; what so many do not show needs another fault, or another check.
MOST_ROUNDS = 5


@dataclass(frozen=True)
class Hunt:
    """What became of a mutant, in one round after the other; only the last one may have found something."""

    mutant: Mutant
    rounds: list[Outcome]

    @property
    def anomaly(self) -> Anomaly | None:
        """What showed it first; None: nothing did."""
        return self.rounds[-1].first

    @property
    def _last_s(self) -> float:
        """How far the last round came until it was caught, or given up."""
        last = self.rounds[-1]
        return last.seconds if self.anomaly is None else last.found_s(self.anomaly)

    @property
    def seconds(self) -> float:
        """Until it was caught, or given up, without the time between the rounds."""
        return sum(each.seconds for each in self.rounds[:-1]) + self._last_s

    @property
    def faults(self) -> int:
        """How many had struck by then."""
        struck = [each for each in self.rounds[-1].strikes if each.at_s <= self._last_s]
        return sum(len(each.strikes) for each in self.rounds[:-1]) + len(struck)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        mutant, anomaly = self.mutant, self.anomaly
        return {
            "name": mutant.name,
            "trap": mutant.trap,
            "faults": self.rounds[-1].options.faults,
            "caught_by": anomaly.name if anomaly else None,
            "found_by": anomaly.found_by if anomaly else None,
            "after_s": round(self.seconds, 1),
            "after_faults": self.faults,
            "rounds": len(self.rounds),
        }


def options_for(mutant: Mutant, given: Mapping[str, Any]) -> Options:
    """The mutant's own options, but for those that were given.

    Raises:
        ConfigurationError: it is none for the lab, and no faults are given that may show it.
    """
    if mutant.lab is None and "faults" not in given:
        raise ConfigurationError(
            f"no fault is known to show the mutant {mutant.name!r} in the lab; --faults may name some"
        )
    own = asdict(mutant.lab) if mutant.lab else {}
    return Options(**{**own, **given, "mutant": mutant.name})


def hunt(mutant: Mutant, options: Options, run: Callable[[Options], Outcome]) -> Hunt:
    """Run rounds, each with the next seed, until one of them finds something."""
    rounds: list[Outcome] = []
    while len(rounds) < MOST_ROUNDS and not (rounds and rounds[-1].anomalies):
        rounds.append(run(replace(options, seed=options.seed + len(rounds))))
    return Hunt(mutant, rounds)
