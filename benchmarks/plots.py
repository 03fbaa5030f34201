"""Draws the figures of the suite: ``python plots.py FIGURES.json FOLDER``.

Runs in the environment of extras.py, which has the library that draws, and imports nothing of the project.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OURS = "ours, exactly once"
COLOURS = {
    OURS: "#0b6e4f",
    "ours, at least once": "#6bbf9c",
    "ours, the ledger": "#a7d8c3",
    "Kafka Streams, exactly once": "#d1495b",
    "Quix Streams, exactly once": "#edae49",
    "stock Faust, exactly once": "#5c6b73",
    "stock Faust, at least once": "#9db4c0",
}
PERCENTILES = {"p50_ms": "p50", "p99_ms": "p99", "p999_ms": "p99.9"}
# Text stays text, and the same figures give the same file.
STYLE: dict[str, Any] = {
    "backend": "svg",
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",
    "font.size": 9,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
}


class Figures:
    """The samples of one scenario."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples
        self.cases: list[str] = list(dict.fromkeys(sample["case"] for sample in samples))
        engines = {sample["engine"] for sample in samples}
        self.engines = [engine for engine in COLOURS if engine in engines]

    def rounds(self, case: str, engine: str, figure: str) -> list[float]:
        return [
            sample["figures"][figure]
            for sample in self._samples
            if (sample["case"], sample["engine"]) == (case, engine) and figure in sample["figures"]
        ]

    def measured(self, case: str, figure: str) -> dict[str, list[float]]:
        """Engines to their rounds."""
        found = {engine: self.rounds(case, engine, figure) for engine in self.engines}
        return {engine: rounds for engine, rounds in found.items() if rounds}


def throughput(figures: Figures) -> None:
    """Bars for each number of accounts."""
    counts = [len(figures.measured(case, "events_per_s")) for case in figures.cases]
    _, all_axes = plt.subplots(
        len(counts),
        1,
        figsize=(7, 0.8 * len(counts) + 0.3 * sum(counts)),
        squeeze=False,
        height_ratios=counts,
        sharex=True,
    )
    for axes, case in zip(all_axes[:, 0], figures.cases, strict=True):
        bars(axes, figures, case, "events_per_s")
        axes.set_title(case, loc="left")
    all_axes[-1, 0].set_xlabel("events/s, median of the rounds and their range")


def latency(figures: Figures) -> None:
    """Bars of the percentiles for each rate."""
    figure, all_axes = plt.subplots(1, len(figures.cases), figsize=(7, 3), squeeze=False, sharey=True)
    for axes, case in zip(all_axes[0], figures.cases, strict=True):
        width = 0.8 / len(figures.engines)
        for number, engine in enumerate(figures.engines):
            heights = [statistics.median(figures.rounds(case, engine, name)) for name in PERCENTILES]
            places = [place + (number - (len(figures.engines) - 1) / 2) * width for place in range(len(heights))]
            axes.bar(places, heights, width, color=COLOURS[engine], label=engine)
            for place, height in zip(places, heights, strict=True):
                axes.text(place, height, f"{height:.0f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(PERCENTILES)), list(PERCENTILES.values()))
        axes.set_title(case, loc="left")
        axes.grid(visible=False, axis="x")
    all_axes[0][0].set_ylabel("ms from sent to read, committed")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)


def restore(figures: Figures) -> None:
    """How fast tables come back, and when the first event is through."""
    _, (speed, start) = plt.subplots(2, 1, figsize=(7, 3.4), height_ratios=(1, 1.7))
    restored = figures.cases[0]
    bars(speed, figures, restored, "records_per_s")
    speed.set_title(f"{restored}: records/s", loc="left")
    places = [(case, engine) for engine in figures.engines for case in figures.cases]
    for place, (case, engine) in enumerate(places):
        bar(start, place, figures.rounds(case, engine, "first_event_s"), engine)
    name_places(start, [f"{engine}, {case.rpartition(' ')[2]}" for case, engine in places])
    start.set_title("seconds from the start of the process to the first output", loc="left")


def takeover(figures: Figures) -> None:
    """How long a killed worker's partitions lie still."""
    _, axes = plt.subplots(figsize=(7, 1.6))
    for place, case in enumerate(figures.cases):
        bar(axes, place, figures.rounds(case, OURS, "takeover_s"), OURS)
    name_places(axes, figures.cases)
    axes.set_title("seconds from the kill to the last partition's output, session 8 s", loc="left")


def growth(figures: Figures) -> None:
    """Cost of an event and memory by the number of keys."""
    _, (cost, memory) = plt.subplots(1, 2, figsize=(7, 2.8))
    keys = [int(re.sub(r"\D", "", case)) for case in figures.cases]
    us = [1e6 / statistics.median(figures.rounds(case, OURS, "events_per_s")) for case in figures.cases]
    rss_mb = [statistics.median(figures.rounds(case, OURS, "rss_mb")) for case in figures.cases]
    for axes, heights, title in ((cost, us, "µs for an event"), (memory, rss_mb, "resident memory, MB")):
        axes.plot(keys, heights, "o-", color=COLOURS[OURS])
        axes.set_xscale("log")
        axes.set_ylim(0, 1.15 * max(heights))
        axes.set_xlabel("keys in the table")
        axes.set_title(title, loc="left")


def scaling(figures: Figures) -> None:
    """A bar for each case."""
    _, axes = plt.subplots(figsize=(7, 0.7 + 0.4 * len(figures.cases)))
    for place, case in enumerate(figures.cases):
        bar(axes, place, figures.rounds(case, OURS, "events_per_s"), OURS)
    name_places(axes, figures.cases)
    axes.set_xlabel("events/s, median of the rounds and their range")


def bars(axes: Axes, figures: Figures, case: str, figure: str) -> None:
    """One for each engine that was measured."""
    found = figures.measured(case, figure)
    for place, (engine, rounds) in enumerate(found.items()):
        bar(axes, place, rounds, engine)
    name_places(axes, list(found))


def bar(axes: Axes, place: float, rounds: list[float], engine: str) -> None:
    """Median, range, and the figure in words."""
    median = statistics.median(rounds)
    spread = [[median - min(rounds)], [max(rounds) - median]]
    axes.barh(place, median, color=COLOURS[engine], xerr=spread, ecolor="#333333", capsize=2)
    text = f"  {median:,.0f}" if median >= 100 else f"  {median:.2f}"
    axes.text(max(rounds), place, text, va="center", fontsize=8)


def name_places(axes: Axes, names: list[str]) -> None:
    """From the top down; with room for the figures at the right."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.locator_params(axis="x", nbins=6)


SCENES: dict[str, Callable[[Figures], None]] = {
    "throughput": throughput,
    "latency": latency,
    "restore": restore,
    "takeover": takeover,
    "workers": scaling,
    "partitions": scaling,
    "growth": growth,
}


def main(file: Path, folder: Path) -> None:
    """One picture for each scenario that was measured."""
    samples = json.loads(file.read_text())["samples"]
    plt.rcParams.update(STYLE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in SCENES.items():
        found = [sample for sample in samples if sample["scenario"] == name]
        if found:
            draw(Figures(found))
            plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
