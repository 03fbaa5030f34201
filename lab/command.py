"""``faust -A streams_app lab``: workers under faults, then the verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from lab.report import document, table, write
from lab.run import Lab, Options, Outcome

if TYPE_CHECKING:
    from streams_app.application import App


def run_lab(app: App, options: Options, console: Console) -> Outcome:
    """One run, shown as it goes."""
    with console.status("getting ready") as status:
        return Lab(app, options, lambda lab: _show(lab, status)).run()


def _show(lab: Lab, status: Status) -> None:
    now = ", ".join(f"{strike.planned.kind} {strike.victim}" for strike in list(lab.active)) or "no fault"
    waits = ", ".join(f"{name.replace('_', ' ')} {each.waiting_s:.1f} s" for name, each in lab.progress.items())
    found = f"; [red]found: {sum(each.count for each in lab.findings.list())}[/]" if lab.findings.list() else ""
    status.update(f"{lab.elapsed_s:.0f} s, {lab.stage}: {now}; {len(lab.strikes)} so far; waits: {waits}{found}")


def finish(outcome: Outcome, report: Path | None, console: Console, *, as_json: bool) -> int:
    """Show and write what it came to; gives the exit code."""
    if report is not None:
        path = write(outcome, report)
        if not as_json:
            console.print(f"written: {path}")
    if as_json:
        import json  # noqa: PLC0415

        sys.stdout.write(json.dumps(document(outcome), indent=1) + "\n")
    else:
        console.print(table(outcome))
        if outcome.kept:
            console.print(f"kept to look into: {outcome.kept}")
    return 0 if outcome.good else 1
