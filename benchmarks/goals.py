"""How fast it must be, and whether it is: ratios of medians' pairs, taken in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.engines import KAFKA_STREAMS, OURS, OURS_AT_LEAST_ONCE, QUIX, STOCK, Engine
from benchmarks.figures import Spread
from benchmarks.table import Samples
from benchmarks.throughput import LEDGER

FEW, MANY = "10,000 accounts", "1,000,000 accounts"
_RATE = "1,000 events/s"
_RESTORED, _KEPT = "1,000,000 keys restored", "1,000,000 keys kept"
_STANDBY = "1,000,000 keys, a standby"
_SMALL, _LARGE = "1,000 keys", "10,000,000 keys"


class Verdict(NamedTuple):
    """What came of a goal."""

    goal: Goal
    figure: Spread
    reached: bool


@dataclass(frozen=True)
class Goal:
    """A limit of a figure; the median counts."""

    text: str
    figure: Callable[[Samples], Spread | None]
    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, samples: Samples) -> Verdict | None:
        """None if it was not measured."""
        figure = self.figure(samples)
        if figure is None:
            return None
        low = self.at_least is None or figure.median >= self.at_least
        return Verdict(self, figure, low and (self.at_most is None or figure.median <= self.at_most))

    @property
    def limit(self) -> str:
        return f"≤ {self.at_most:,}" if self.at_least is None else f"≥ {self.at_least:,}"


def _faster_than(engine: Engine, case: str, at_least: float) -> Goal:
    return Goal(
        f"exactly once ÷ {engine.name}, {case}",
        lambda samples: samples.ratio("throughput", "events_per_s", (case, OURS.name), (case, engine.name)),
        at_least=at_least,
    )


def _of_ours(scenario: str, case: str, figure: str, engine: Engine = OURS) -> Callable[[Samples], Spread | None]:
    def look_up(samples: Samples) -> Spread | None:
        found = samples.figures(scenario, case, engine.name, figure)
        return Spread.of(found) if found else None

    return look_up


def _by_kafka_streams(scenario: str, case: str, figure: str) -> Callable[[Samples], Spread | None]:
    return lambda samples: samples.ratio(scenario, figure, (case, OURS.name), (case, KAFKA_STREAMS.name))


GOALS = (
    _faster_than(STOCK, FEW, 50),
    _faster_than(QUIX, FEW, 3.3),
    _faster_than(QUIX, MANY, 2.2),
    _faster_than(KAFKA_STREAMS, FEW, 1.1),
    _faster_than(KAFKA_STREAMS, MANY, 1.3),
    _faster_than(OURS_AT_LEAST_ONCE, FEW, 0.95),
    Goal("ledger, transfers/s", _of_ours("throughput", FEW, "events_per_s", LEDGER), at_least=40_000),
    Goal(f"latency at {_RATE}, p50, ms", _of_ours("latency", _RATE, "p50_ms"), at_most=25),
    Goal(f"latency at {_RATE}, p99, ms", _of_ours("latency", _RATE, "p99_ms"), at_most=60),
    Goal(f"p50 ÷ Kafka Streams, {_RATE}", _by_kafka_streams("latency", _RATE, "p50_ms"), at_most=0.4),
    Goal(f"p99 ÷ Kafka Streams, {_RATE}", _by_kafka_streams("latency", _RATE, "p99_ms"), at_most=0.4),
    Goal("restore, records/s", _of_ours("restore", _RESTORED, "records_per_s"), at_least=350_000),
    Goal("restore ÷ Kafka Streams", _by_kafka_streams("restore", _RESTORED, "records_per_s"), at_least=0.7),
    Goal("first event of a worker with its tables, s", _of_ours("restore", _KEPT, "first_event_s"), at_most=3),
    Goal("take-over by a standby, s", _of_ours("takeover", _STANDBY, "takeover_s"), at_most=12),
    Goal(
        f"cost of an event, {_LARGE} ÷ {_SMALL}",
        # The rates the other way round: a cost is a time.
        lambda samples: samples.ratio("growth", "events_per_s", (_SMALL, OURS.name), (_LARGE, OURS.name)),
        at_most=1.5,
    ),
    Goal(f"memory with {_LARGE}, MB", _of_ours("growth", _LARGE, "rss_mb"), at_most=500),
)


def verdicts(samples: Samples) -> Iterator[Verdict]:
    """Of those goals that were measured."""
    yield from filter(None, (goal.verdict(samples) for goal in GOALS))


def show_goals(console: Console, samples: Samples) -> None:
    """A table of all goals; nothing if none was measured."""
    if not any(verdicts(samples)):
        return
    table = Table("what", "must be", "is, median (range)", "reached", title="goals", title_justify="left")
    for goal in GOALS:
        verdict = goal.verdict(samples)
        if verdict is None:
            table.add_row(goal.text, goal.limit, "not measured", "–")
        else:
            median, low, high = verdict.figure
            figure = f"{median:,.4g} ({low:,.4g}–{high:,.4g})"
            table.add_row(goal.text, goal.limit, figure, "yes" if verdict.reached else "NO")
    console.print(table)
