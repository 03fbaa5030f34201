"""The command ``lab``; what it does is in the package `lab`, beside this one, which nothing else imports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from faust.cli.base import cli

from streams_app.commands import console, exit_codes

if TYPE_CHECKING:
    from streams_app.application import App


def register_lab(app: App) -> None:
    """Add the command to ``app``."""

    @cli.command("lab")
    @click.option("--seconds", type=click.FloatRange(10, 86_400), show_default="60", help="Of faults.")
    @click.option("--seed", type=int, default=1, show_default=True, help="The same seed, the same schedule.")
    @click.option("--faults", show_default="mixed", help="A comma list; `mixed` is all, `none` no fault.")
    @click.option(
        "--pauses",
        type=click.Choice(["none", "short", "long"]),
        default="short",
        show_default=True,
        help="Between faults: none, so short that they overlap, or so long that each is alone.",
    )
    @click.option("--workers", type=click.IntRange(1, 8), show_default="3", help="One more may be added.")
    @click.option("--brokers", type=click.Choice(["1", "3"]), show_default="3")
    @click.option("--rate", type=click.FloatRange(1), show_default="300", help="Records/s of each input.")
    @click.option("--engine", type=click.Choice(["ours", "stock"]), default="ours", show_default=True)
    @click.option(
        "--workload",
        type=click.Choice(["agents", "bare", "topology"]),
        default="agents",
        show_default=True,
        help="Your agents, the smallest app with state, which stock Faust can run, too, or one that groups, takes and counts "
        "in windows.",
    )
    @click.option(
        "--mutant",
        metavar="NAME",
        help="Break the engine of the workers on purpose, and see who notices: one of lab/mutants.py, or `all`; with its own "
        "faults, workers and brokers where no others are given.",
    )
    @click.option("--report", type=click.Path(path_type=Path, file_okay=False), help="Folder for the report.")
    @click.option("--json", "as_json", is_flag=True, help="The verdict alone on stdout.")
    def lab(mutant: str | None, report: Path | None, as_json: bool, **options: Any) -> None:
        """Hurt workers, brokers, wires and disks on schedule, and look for what that broke."""
        from lab.command import finish, finish_hunts, hunt_all, run_lab  # noqa: PLC0415 - nothing imports it, unless it is run
        from lab.outcome import Options  # noqa: PLC0415

        given = {name: value for name, value in options.items() if value is not None}
        if "brokers" in given:
            given["brokers"] = int(given["brokers"])
        if mutant is not None and given["engine"] == "stock":
            raise click.UsageError("--mutant breaks our engine; --engine stock runs without it")
        with exit_codes():
            if mutant is None:
                outcome = run_lab(app, Options(**given), console(plain=as_json))
                code = finish(outcome, report, console(), as_json=as_json)
            else:
                hunts = hunt_all(app, mutant, given, report, console(plain=as_json))
                code = finish_hunts(hunts, console(), as_json=as_json)
        sys.exit(code)
