"""How the demo looks: a calm live view on a terminal, plain lines elsewhere, a verdict at the end.

Fits in 80 columns and, with the usual number of workers and kills, in 24 lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from streams_app.audit import Section
from streams_app.demo import AT_WORK, Demo, Input, Kill, Options, Verdict
from streams_app.supervisor import WorkerProcess

_WIDTH = 80
_PLAIN_LINE_EVERY_S = 5.0
#: Earlier kills scroll out of the view; the verdict names all of them.
_KILLS_SHOWN = 5
#: How a worker's state looks.
_STATES = {"working": "green", "starting": "yellow", "starting again": "yellow", "ended": "dim"}


def run_demo(app: Any, options: Options, console: Console) -> Verdict:
    """Run the demo and show it; see `Demo.run` for what it raises."""
    if console.is_terminal:
        demo = Demo(app, options)
        with Live(_Picture(demo), console=console, refresh_per_second=5, transient=True):
            return _run(demo, console)
    return _run(Demo(app, options, _Lines(console)), console)


def _run(demo: Demo, console: Console) -> Verdict:
    verdict = None
    try:
        verdict = demo.run()
    finally:
        if verdict is None and demo.kept:
            console.print(Text(f"kept to look into: {demo.kept}"), soft_wrap=True)
    return verdict


# --- Live ---------------------------------------------------------------------------------------------------------------


class _Picture:
    """Drawn anew at each refresh, from what the demo is at that moment."""

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        self._spinner = Spinner("dots", style="cyan")

    def __rich__(self) -> RenderableType:
        demo = self._demo
        parts: list[RenderableType] = [self._head()]
        if demo.supervisor.workers:
            parts += [Text(), _workers(demo.supervisor.workers, demo.kills)]
        if demo.inputs:
            parts += [Text(), _inputs(demo.inputs)]
        if demo.kills:
            parts += [Text(), _kills(demo.kills[-_KILLS_SHOWN:], len(demo.kills), demo.options.kills)]
        options = demo.options
        subtitle = f"{options.workers} workers, {options.kills} kills, seed {options.seed} · Ctrl-C ends it"
        return Panel(
            Group(*parts), title="[bold]demo[/]", subtitle=f"[dim]{subtitle}[/]", width=_WIDTH, border_style="cyan"
        )

    def _head(self) -> RenderableType:
        demo = self._demo
        elapsed_s = demo.elapsed_s or 0.0
        self._spinner.update(text=Text(demo.stage, style="bold"))
        line = Table.grid(expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right")
        line.add_row(self._spinner, Text(f"{_clock(elapsed_s)} of {_clock(demo.options.seconds)}", style="dim"))
        bar = ProgressBar(total=demo.options.seconds, completed=elapsed_s)
        return Group(line, bar, Text(demo.detail, style="dim", overflow="ellipsis", no_wrap=True))


def _state(worker: WorkerProcess) -> str:
    if not worker.alive:
        return "ended"
    if worker.said(AT_WORK):
        return "working"
    return "starting again" if worker.restarts else "starting"


def _workers(workers: Iterable[WorkerProcess], kills: Sequence[Kill]) -> Table:
    table = _table("worker", "pid>", "state", "killed>")
    for worker in workers:
        state = _state(worker)
        killed = sum(kill.worker == worker.name for kill in kills)
        times = f"{killed} time{'s' * (killed != 1)}" if killed else "–"
        table.add_row(worker.name, str(worker.pid or ""), Text(f"● {state}", style=_STATES[state]), times)
    return table


def _inputs(inputs: Iterable[Input]) -> Table:
    table = _table("input", "written>", "per s>", "processed>", "per s>", "waiting>")
    for each in inputs:
        written_per_s, processed_per_s = each.rates()
        figures = (each.written, written_per_s, each.processed, processed_per_s, max(0, each.written - each.processed))
        table.add_row(each.name, *(f"{figure:,.0f}" for figure in figures))
    return table


def _kills(kills: Iterable[Kill], done: int, planned: int | None = None) -> Table:
    of = "" if planned is None else f" {done} of {planned}"
    table = _table(f"kill -9{of}", "at>", "pid>", "its work went on")
    for kill in kills:
        if kill.recovered_s is None:
            outcome = Text(f"not yet, {time.monotonic() - kill.killed_s:.1f} s", style="yellow")
        else:
            outcome = Text(f"after {kill.recovered_s:.1f} s", style="green")
        table.add_row(kill.worker, _clock(kill.at_s), str(kill.pid), outcome)
    return table


def _table(*columns: str) -> Table:
    """Equal columns in the full width; a name that ends in ``>`` is set to the right."""
    table = Table(box=None, expand=True, padding=(0, 1), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(
            column.removesuffix(">"), justify="right" if column.endswith(">") else "left", ratio=1, no_wrap=True
        )
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# --- Plain --------------------------------------------------------------------------------------------------------------


class _Lines:
    """A line for each change that matters, and one now and then in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()
        self._stage = ""
        self._next_s = 0.0

    def __call__(self, demo: Demo) -> None:
        """Say what is new."""
        if demo.stage != self._stage:
            self._stage = demo.stage
            self._line(f"{demo.stage} …")
        for number, kill in enumerate(demo.kills, 1):
            who = f"kill {number} of {demo.options.kills}: {kill.worker} (process {kill.pid})"
            self._once(f"{who} at {_clock(kill.at_s)}")
            if kill.recovered_s is not None:
                self._once(f"{who}: its work went on after {kill.recovered_s:.1f} s")
        for number, ended in enumerate(demo.ended, 1):
            self._once(f"ended by itself, {number}: {ended}")
        if demo.elapsed_s is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PLAIN_LINE_EVERY_S
            for each in demo.inputs:
                rate = each.rates()[1]
                self._line(
                    f"{_clock(demo.elapsed_s)} {each.name}: {each.written} written, {each.processed} processed, "
                    f"{rate:.0f} per second"
                )

    def _once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._line(line)

    def _line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


# --- Verdict ------------------------------------------------------------------------------------------------------------


def verdict_panel(verdict: Verdict, exit_code: int) -> Panel:
    """The verdict for people."""
    style = "green" if verdict.good else "red"
    parts: list[RenderableType] = [_figures(verdict.report.sections)]
    findings = [(section.name, finding) for section in verdict.report.sections for finding in section.findings]
    for name, finding in findings:
        example = f", for example {finding.examples[0]}" if finding.examples else ""
        parts.append(Text(f"✗ {name}: {finding.count} × {finding.anomaly}{example}", style="red"))
    parts += [Text(f"✗ ended by itself: {ended}", style="red") for ended in verdict.ended]
    if verdict.kills:
        parts += [Text(), _kills(verdict.kills, len(verdict.kills))]
    if verdict.kept:
        parts += [Text(), Text(f"kept to look into: {verdict.kept}")]
    title = "every guarantee held" if verdict.good else "NOT good: see below"
    slowest_s = verdict.slowest_recovery_s
    slowest = "" if slowest_s is None else f"slowest recovery {slowest_s:.1f} s · "
    subtitle = f"{slowest}{verdict.report.records:,} records audited · exit code {exit_code}"
    return Panel(
        Group(*parts), title=f"[bold]{title}[/]", subtitle=f"[dim]{subtitle}[/]", width=_WIDTH, border_style=style
    )


def _figures(sections: Iterable[Section]) -> RenderableType:
    parts: list[RenderableType] = []
    for section in sections:
        mark = Text("✓ ", style="green") if section.held else Text("✗ ", style="bold red")
        parts.append(mark + Text(section.name, style="bold"))
        plain = {name: figure for name, figure in section.figures.items() if not isinstance(figure, Mapping)}
        parts.append(
            Columns([_pair(name, f"{figure:,}") for name, figure in plain.items()], padding=(0, 2), expand=True)
        )
        for name, figure in section.figures.items():
            if isinstance(figure, Mapping):
                amounts = "  ".join(f"{unit} {amount:,}" for unit, amount in figure.items()) or "none"
                parts.append(_pair(name, amounts))
    return Group(*parts)


def _pair(name: str, value: str) -> Text:
    return Text.assemble((f"  {name} ", "dim"), value)
