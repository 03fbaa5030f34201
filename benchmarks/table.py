"""What was measured, for people: medians, ratios, and whether it is as fast as it must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.bench import FLAWS, Sample
from benchmarks.figures import Spread, ratios

#: Figures to their heads, in the order of the columns. The first one that a scenario has is the one that is compared.
HEADS = {
    "events_per_s": "events/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "p999_ms": "p99.9, ms",
    "records_per_s": "records/s",
    "first_event_s": "first event, s",
    "takeover_s": "take-over, s",
    "worker_us": "worker, µs/event",
    "broker_us": "broker, µs/event",
    "rss_mb": "memory, MB",
}


class Samples:
    """All of them, by scenario, case and engine."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.all = list(samples)

    def scenarios(self) -> list[str]:
        return list(dict.fromkeys(sample.scenario for sample in self.all))

    def contenders(self, scenario: str) -> list[tuple[str, str]]:
        """Cases with their engines, in the order in which they were measured first, cases together."""
        cases = list(dict.fromkeys(sample.case for sample in self.all if sample.scenario == scenario))
        pairs = dict.fromkeys((sample.case, sample.engine) for sample in self.all if sample.scenario == scenario)
        return sorted(pairs, key=lambda pair: cases.index(pair[0]))

    def figures(self, scenario: str, case: str, engine: str, figure: str) -> list[float]:
        """Round by round; empty if there is none."""
        return [
            sample.figures[figure]
            for sample in self.all
            if (sample.scenario, sample.case, sample.engine) == (scenario, case, engine) and figure in sample.figures
        ]

    def names(self, scenario: str) -> list[str]:
        """Of the figures of a scenario, as the columns have them."""
        known = {name for sample in self.all if sample.scenario == scenario for name in sample.figures}
        return [name for name in HEADS if name in known]

    def ratio(self, scenario: str, figure: str, ours: tuple[str, str], base: tuple[str, str]) -> Spread | None:
        """Of two pairs of case and engine, round by round; None if one was not measured."""
        above, below = (self.figures(scenario, *pair, figure) for pair in (ours, base))
        return ratios(above, below) if above and len(above) == len(below) and all(below) else None

    def flawed(self) -> list[Sample]:
        """Those whose outputs are not what they must be."""
        return [sample for sample in self.all if any(sample.figures.get(flaw) for flaw in FLAWS)]


def show(console: Console, samples: Samples) -> None:
    """One table for each scenario: medians, and the first figure of the case's first engine by each one's, round by round."""
    for scenario in samples.scenarios():
        names = samples.names(scenario)
        contenders = samples.contenders(scenario)
        table = Table(title=f"{scenario}: medians of {_rounds(samples, scenario)}", title_justify="left")
        table.add_column("case", no_wrap=True)
        table.add_column("engine", no_wrap=True)
        for name in names:
            table.add_column(HEADS[name], justify="right")
        table.add_column(f"{HEADS[names[0]]}: first ÷ this", justify="right", no_wrap=True)
        table.add_column("outputs")
        for case, engine in contenders:
            cells = [_median(samples.figures(scenario, case, engine, name)) for name in names]
            ratio = samples.ratio(scenario, names[0], _first_of(case, contenders), (case, engine))
            table.add_row(case, engine, *cells, _spread(ratio), _flaws(samples, scenario, case, engine))
        console.print(table)


def _first_of(case: str, contenders: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Who is compared with: of the case; where there is one engine only, of the first case."""
    engines = {engine for _, engine in contenders}
    return contenders[0] if len(engines) == 1 else next(pair for pair in contenders if pair[0] == case)


def _flaws(samples: Samples, scenario: str, case: str, engine: str) -> str:
    """Of all rounds."""
    counts = {flaw: sum(samples.figures(scenario, case, engine, flaw)) for flaw in FLAWS}
    return ", ".join(f"{count:,.0f} {flaw}" for flaw, count in counts.items() if count) or "complete"


def _rounds(samples: Samples, scenario: str) -> str:
    count = 1 + max(sample.round for sample in samples.all if sample.scenario == scenario)
    return f"{count} round{'s' * (count > 1)}"


def _median(figures: list[float]) -> str:
    if not figures:
        return "–"
    median = Spread.of(figures).median
    return f"{median:,.0f}" if median >= 100 or median == int(median) else f"{median:.3g}"


def _spread(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"
