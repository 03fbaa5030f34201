"""``python -m lab.simulation``: random histories of the commit path, until one of them breaks a guarantee.

Exit codes: 0 none did, 1 one did and was printed, 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from typing import cast

import click
from rich.console import Console

from lab.simulation.plan import GUARANTEES, Guarantee
from lab.simulation.simulate import Run, simulate
from streams_app.progress import shown_count


@click.command()
@click.option("--seconds", type=float, default=60.0, show_default=True, help="How long to go on.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same histories.")
@click.option("--guarantee", type=click.Choice(GUARANTEES), multiple=True, help="Only this one; may be given again.")
@click.option("--histories", type=int, help="How many to run, instead of how long.")
@click.option("--shrink/--no-shrink", default=True, show_default=True, help="Look for the shortest that fails alike.")
def main(seconds: float, seed: int, guarantee: tuple[str, ...], histories: int | None, shrink: bool) -> None:
    """Run random histories of the commit path against a model of the brokers."""
    console = Console(highlight=False, soft_wrap=True)
    guarantees = cast("tuple[Guarantee, ...]", guarantee or GUARANTEES)
    with shown_count(console, "simulation", "histories", histories) as told:
        run = simulate(
            guarantees,
            seed,
            histories=histories,
            seconds=None if histories is not None else seconds,
            shrinks=shrink,
            on_progress=told,
        )
        told(run.histories)
    _report(console, run)
    sys.exit(0 if run.violation is None else 1)


def _report(console: Console, run: Run) -> None:
    console.print(f"{run.histories} histories in {run.took_s:.1f} s, {run.per_s:.0f} a second; in them:")
    console.print(", ".join(f"{number} × {kind}" for kind, number in sorted(run.counts.items())))
    if run.violation is None:
        console.print("0 violations")
        return
    console.print(f"history {run.violation.number} fails: {run.violation.anomalies[0].kind}", style="bold red")
    for line in run.violation.story:
        console.print(line, markup=False)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The engine goes through sets of partitions, whose order is another one in each process: then so were the histories.
        again = [sys.executable, "-m", "lab.simulation", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "PYTHONHASHSEED": "0"})  # noqa: S606 - ourselves
    main()
