"""``faust -A streams_app lab``: workers under faults, then the verdict."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status

from lab.hunt import Hunt, hunt, options_for
from lab.mutants import MUTANTS, mutant
from lab.outcome import Options, Outcome
from lab.report import document, hunts_table, table, write
from lab.run import Lab

if TYPE_CHECKING:
    from streams_app.application import App


def run_lab(app: App, options: Options, console: Console) -> Outcome:
    """One run, shown as it goes."""
    with console.status("getting ready") as status:
        return Lab(app, options, lambda lab: _show(lab, status)).run()


def _show(lab: Lab, status: Status) -> None:
    now = ", ".join(f"{strike.planned.kind} {strike.victim}" for strike in list(lab.active)) or "no fault"
    waits = ", ".join(f"{name.replace('_', ' ')} {each.waiting_s:.1f} s" for name, each in lab.progress.items())
    found = f"; [red]found: {lab.found}[/]" if lab.found else ""
    status.update(f"{lab.elapsed_s:.0f} s, {lab.stage}: {now}; {len(lab.strikes)} so far; waits: {waits}{found}")


def finish(outcome: Outcome, report: Path | None, console: Console, *, as_json: bool) -> int:
    """Show and write what it came to; gives the exit code."""
    if report is not None:
        path = write(outcome, report)
        if not as_json:
            console.print(f"written: {path}")
    if as_json:
        sys.stdout.write(json.dumps(document(outcome), indent=1) + "\n")
    else:
        console.print(table(outcome))
        if outcome.kept:
            console.print(f"kept to look into: {outcome.kept}")
    return 0 if outcome.good else 1


ALL = "all"


def hunt_all(app: App, name: str, given: Mapping[str, Any], report: Path | None, console: Console) -> list[Hunt]:
    """Run the mutant of that name, or ``all`` that are for the lab, one by one; each report in a folder of its own."""
    wanted = [each for each in MUTANTS if each.lab] if name == ALL else [mutant(name)]
    hunts = []
    for each in wanted:
        hunted = hunt(each, options_for(each, given), lambda options: run_lab(app, options, console))
        hunts.append(hunted)
        if report is not None:
            folder = report / re.sub(r"\W+", "-", each.name) if name == ALL else report
            console.print(f"written: {write(hunted.rounds[-1], folder, hunted)}")
        if name == ALL:
            console.print(f"{each.name}: {hunted.anomaly.name if hunted.anomaly else 'not caught'}")
    return hunts


def finish_hunts(hunts: list[Hunt], console: Console, *, as_json: bool) -> int:
    """Show what became of the mutants; gives the exit code."""
    if as_json:
        sys.stdout.write(json.dumps([each.document() for each in hunts], indent=1) + "\n")
    else:
        if len(hunts) == 1:
            console.print(table(hunts[0].rounds[-1]))
        console.print(hunts_table(hunts))
    return 0 if all(each.anomaly for each in hunts) else 1
