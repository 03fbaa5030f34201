"""What was asked of a run, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass

from lab.checker import Anomaly
from lab.progress import Progress, Recovery
from lab.schedule import Planned
from lab.workload import OURS
from streams_app.audit import Report


@dataclass(frozen=True)
class Options:
    """What the user asked for; ``rate`` in records per second and input."""

    seconds: float = 60.0
    seed: int = 1
    faults: str = "mixed"
    pauses: str = "short"
    workers: int = 3
    brokers: int = 3
    rate: float = 300.0
    engine: str = OURS
    workload: str = "agents"
    #: Name of the mutant that the workers run (mutants.py); empty: the code as it is.
    mutant: str = ""


@dataclass
class Strike:
    """One fault that struck; times in seconds since the input began."""

    planned: Planned
    victim: str
    at_s: float
    healed_s: float | None = None
    recovery: Recovery | None = None


@dataclass
class Outcome:
    """What a run came to."""

    options: Options
    strikes: list[Strike]
    #: Faults that found nothing to hurt.
    missed: list[str]
    anomalies: list[Anomaly]
    progress: dict[str, Progress]
    report: Report | None
    seconds: float
    written: dict[str, int]
    #: What the workers said around the events that show an anomaly, by its name.
    log_lines: dict[str, list[str]]
    #: What is left to look into; None: nothing is.
    kept: str | None = None

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not self.anomalies

    @property
    def first(self) -> Anomaly | None:
        """The anomaly that was seen first; None: nothing was found."""
        return min(self.anomalies, key=self.found_s, default=None)

    def found_s(self, anomaly: Anomaly) -> float:
        """When it was seen; what nobody saw during the run was found at its end."""
        return self.seconds if anomaly.found_s is None else anomaly.found_s
