"""What every scenario is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.engines import Engine
from streams_app.embedded import EmbeddedKafka


class Sample(NamedTuple):
    """One run of one engine."""

    scenario: str
    #: What was varied: accounts, rate, size, …
    case: str
    engine: str
    round: int
    #: By name, with the unit at its end. Those of `FLAWS`, where there are any, must be 0.
    figures: dict[str, float]


#: Figures that are none, but mistakes.
FLAWS = ("missing", "repeated", "wrong")


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    #: Of a fast engine in one run; slow ones get a share.
    events: int
    accounts: tuple[int, ...]
    ledger_transfers: int
    #: Events/s, and how long each rate is measured.
    rates: tuple[int, ...]
    latency_s: float
    #: Sizes of the table that grows; measured is each with so many events.
    table_keys: tuple[int, ...]
    table_events: int
    #: Numbers of partitions; each with so many events.
    partitions: tuple[int, ...]
    scaling_events: int
    restored_keys: int


#: Less than 40 minutes on two cores.
WHOLE = Scale(
    rounds=3,
    events=1_000_000,
    accounts=(10_000, 1_000_000),
    ledger_transfers=200_000,
    rates=(100, 1_000, 10_000),
    latency_s=10.0,
    table_keys=(1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    table_events=200_000,
    partitions=(4, 16, 64),
    scaling_events=300_000,
    restored_keys=1_000_000,
)
#: Less than 5 minutes: whether everything works, and roughly how fast.
QUICK = Scale(
    rounds=1,
    events=200_000,
    accounts=(10_000,),
    ledger_transfers=50_000,
    rates=(1_000,),
    latency_s=5.0,
    table_keys=(1_000, 100_000),
    table_events=100_000,
    partitions=(4, 64),
    scaling_events=100_000,
    restored_keys=100_000,
)


@dataclass(frozen=True)
class Bench:
    """A broker, a folder for the workers, and how much is to be measured of whom."""

    kafka: EmbeddedKafka
    folder: Path
    scale: Scale
    engines: tuple[Engine, ...]


#: Measures, and gives each run as soon as it is over.
Scenario = Callable[[Bench], Iterator[Sample]]
