"""The whole suite: what is measured, in one run on one broker.

scripts/bench all                    everything; figures and plots go to docs/benchmarks/
scripts/bench all --quick            in less than five minutes, to .streams-app/bench/
scripts/bench all restore latency    these scenarios only

Exit code 1 if an output is missing, repeated or wrong, or an engine does not come to its end, whatever the figures are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import extras
from benchmarks.bench import FLAWS, QUICK, WHOLE, Bench, Sample, Scale, Scenario
from benchmarks.engines import ENGINES, absent
from benchmarks.goals import show_goals
from benchmarks.machine import write_json
from benchmarks.restore import restore
from benchmarks.run import own_broker
from benchmarks.scaling import growth, partitions, workers
from benchmarks.steady import steady
from benchmarks.table import HEADS, Samples, show
from benchmarks.takeover import takeover
from benchmarks.throughput import throughput
from streams_app.supervisor import signals_interrupt

SCENARIOS: Mapping[str, Scenario] = {
    "throughput": throughput,
    "latency": steady,
    "restore": restore,
    "takeover": takeover,
    "workers": workers,
    "partitions": partitions,
    "growth": growth,
}
#: Of a table that goes to a file or another program.
_FILE_COLUMNS = 160
_DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures our engine beside others.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"all, or some of {', '.join(SCENARIOS)}")
    parser.add_argument("--quick", action="store_true", help="one round, fewer events")
    parser.add_argument("--rounds", type=int, help="instead of 3")
    parser.add_argument("--events", type=int, help="of a fast engine in one run of throughput, instead of 1,000,000")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, help="draw the plots into this folder")
    options = parser.parse_intermixed_args()
    unknown = set(options.scenarios) - {"all", *SCENARIOS}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such scenario; there are {', '.join(SCENARIOS)}")
    scale = QUICK if options.quick else WHOLE
    scale = scale._replace(rounds=options.rounds or scale.rounds, events=options.events or scale.events)
    everything = not set(options.scenarios) - {"all"}
    names = [name for name in SCENARIOS if everything or name in options.scenarios]
    default = _DOCS if everything and scale == WHOLE else extras.FOLDER
    with signals_interrupt():  # no broker is left behind
        return run(names, scale, options.json or default / "figures.json", options.plots or default)


def run(names: Sequence[str], scale: Scale, file: Path, plots: Path) -> int:
    """Measure the scenarios ``names``; the exit code."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_COLUMNS)
    reasons = absent()
    for engine, reason in reasons.items():
        console.print(f"skipped: {engine}. {reason}", highlight=False, markup=False)
    samples: list[Sample] = []
    unfinished = []
    begun_s = time.monotonic()
    with own_broker() as (kafka, folder):
        bench = Bench(kafka, folder, scale, tuple(engine for engine in ENGINES if engine.name not in reasons))
        for name in names:
            try:
                for sample in SCENARIOS[name](bench):
                    samples.append(sample)
                    console.print(f"{_minutes(begun_s)} {_line(sample)}", highlight=False, markup=False, soft_wrap=True)
                    found = [each._asdict() for each in samples]
                    # Each time anew: who is tired of waiting has what was measured so far.
                    write_json(file, {"scale": scale._asdict(), "skipped": reasons, "samples": found})
            except SystemExit as reason:  # an engine that ended, or hangs: the other scenarios are worth their time
                unfinished.append(f"{name}: {reason}")
    report(console, Samples(samples), file, plots)
    flawed = [_line(sample) for sample in Samples(samples).flawed()]
    for line in (*unfinished, *flawed):
        console.print(f"NOT RIGHT: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{_minutes(begun_s)} in all; figures in {file}, plots in {plots}", highlight=False, soft_wrap=True)
    return 1 if unfinished or flawed else 0


def report(console: Console, samples: Samples, file: Path, plots: Path) -> None:
    """Tables, goals, plots; nothing if nothing was measured."""
    if samples.all:
        show(console, samples)
        show_goals(console, samples)
        draw(console, file, plots)


def draw(console: Console, file: Path, folder: Path) -> None:
    """Plots of the figures in ``file``; without the library that draws them, a word about it."""
    try:
        interpreter = extras.python()
    except extras.Unavailable as reason:
        console.print(f"no plots: {reason}", highlight=False, markup=False)
        return
    subprocess.run([str(interpreter), str(Path(__file__).with_name("plots.py")), str(file), str(folder)], check=True)


def _minutes(begun_s: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - begun_s), 60)
    return f"{minutes}:{seconds:02}"


def _line(sample: Sample) -> str:
    figures = [f"{HEADS[name]} {sample.figures[name]:,.4g}" for name in HEADS if name in sample.figures]
    flaws = [f"{sample.figures[flaw]} {flaw}" for flaw in FLAWS if sample.figures.get(flaw)] or ["complete"]
    return f"{sample.scenario}, round {sample.round + 1}: {sample.case}, {sample.engine}: {'; '.join(figures + flaws)}"


if __name__ == "__main__":
    sys.exit(main())
