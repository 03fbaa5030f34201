"""How the demo looks: a calm live view on a terminal, plain lines elsewhere, a verdict at the end.

Fits in 80 columns and, with the usual number of workers and failures, in 24 lines. The words are those of the letter: you
send one and do not know whether it arrives. Send it once and forget it, send it again until you hear back, or make sure
that it takes effect once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from streams_app.audit import in_words
from streams_app.demo import Demo, Options
from streams_app.flow import Flow
from streams_app.inflicted import Failure, Kind
from streams_app.supervisor import WorkerProcess
from streams_app.verdict import Verdict, outcome

_WIDTH = 80
_PLAIN_LINE_EVERY_S = 5.0
#: Earlier ones scroll out of the view; the verdict names all of them.
_FAILURES_SHOWN = 5

#: What is done with the letter.
LETTER = {
    "exactly_once": "made sure that it takes effect once",
    "at_least_once": "sent again until heard back",
    "at_most_once": "sent once and forgotten",
}
#: What happens, for somebody who has never heard the word.
MEANING = {
    Kind.CRASH: "a worker dies amid its work (kill -9)",
    Kind.ZOMBIE: "a worker freezes, is declared dead, wakes up and still writes",
    Kind.BROKER_RESTART: "Kafka itself dies (kill -9) and comes back",
}
#: How a worker's state looks.
_STATES = {"working": "green", "starting": "yellow", "starting again": "yellow", "frozen": "cyan", "ended": "dim"}


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
        if demo.flows:
            parts += [Text(), _flows(demo.flows)]
        if demo.supervisor.workers:
            parts += [Text(), _workers(demo)]
        if demo.failures:
            guarantees = [flow.guarantee for flow in demo.flows]
            parts += [Text(), _failures(demo.failures[-_FAILURES_SHOWN:], guarantees)]
        options = demo.options
        planned = len(demo.schedule.failures)
        subtitle = f"failure {len(demo.failures)} of {planned} · seed {options.seed} · Ctrl-C ends it"
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
        # It takes longer where a failure has to wait until the one before is over.
        seconds = max(demo.options.seconds, elapsed_s)
        line.add_row(self._spinner, Text(f"{_clock(elapsed_s)} of {_clock(seconds)}", style="dim"))
        bar = Table.grid(expand=True)  # in a table, or what comes below is drawn beside it
        bar.add_row(ProgressBar(total=seconds, completed=elapsed_s))
        return Group(line, bar, Text(demo.detail or _at_hand(demo), style="dim", overflow="ellipsis", no_wrap=True))


def _at_hand(demo: Demo) -> str:
    """What the latest failure is, until work has gone on."""
    if not demo.failures or (demo.failures[-1].has_gone_on and demo.failures[-1].lasted_s is not None):
        return ""
    kind = demo.failures[-1].kind
    return f"{kind}: {MEANING[kind]}"


def _flows(flows: Iterable[Flow]) -> Table:
    table = _table("guarantee", "a letter that is", "written/s>", "done/s>", "waiting>")
    for flow in flows:
        written_per_s, processed_per_s = flow.rates()
        figures = (written_per_s, processed_per_s, flow.waiting)
        name = Text(in_words(flow.guarantee), style="bold")
        table.add_row(name, LETTER[flow.guarantee], *(f"{figure:,.0f}" for figure in figures))
    return table


def _workers(demo: Demo) -> Table:
    table = _table("worker", "state", "pid>", "crashes>", "freezes>")
    for worker in demo.supervisor.workers:
        state = _state(demo, worker)
        suffered = [each.kind for each in demo.failures if each.victim == worker.name]
        counts = (suffered.count(kind) for kind in (Kind.CRASH, Kind.ZOMBIE))
        mark = Text(f"● {state}", style=_STATES[state])
        table.add_row(worker.name, mark, str(worker.pid or ""), *(str(count or "–") for count in counts))
    return table


def _state(demo: Demo, worker: WorkerProcess) -> str:
    if not worker.alive:
        return "ended"
    last = demo.failures[-1] if demo.failures else None
    if last is not None and last.kind == Kind.ZOMBIE and last.lasted_s is None and last.victim == worker.name:
        return "frozen"
    if demo.is_at_work(worker):
        return "working"
    return "starting again" if worker.restarts else "starting"


def _failures(failures: Iterable[Failure], guarantees: Sequence[str]) -> Table:
    """A row for each: what was done, and when its work went on under each guarantee."""
    table = _table("inflicted, and work went on after", *(f"{in_words(each)}>" for each in guarantees))
    for failure in failures:
        what = Text(f"{_clock(failure.at_s)} {failure.kind} ", style="bold") + Text(_victim(failure), style="dim")
        table.add_row(what, *(_went_on(failure, guarantee) for guarantee in guarantees))
    return table


def _victim(failure: Failure) -> str:
    if failure.kind == Kind.CRASH:
        return failure.victim
    if failure.lasted_s is None:
        return f"{failure.victim}, frozen" if failure.kind == Kind.ZOMBIE else "down"
    if failure.kind == Kind.ZOMBIE:
        return f"{failure.victim}, frozen {failure.lasted_s:.0f} s"
    return f"down {failure.lasted_s:.0f} s"


def _went_on(failure: Failure, guarantee: str) -> Text:
    seconds = failure.went_on_s.get(guarantee)
    if seconds is None:
        return Text("not yet", style="yellow")
    return Text(f"{seconds:.1f} s", style="green")


def _table(*columns: str) -> Table:
    """Columns in the full width; a name that ends in ``>`` is set to the right."""
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# --- Plain --------------------------------------------------------------------------------------------------------------


class _Lines:
    """A line for each change that matters, and one now and then in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()
        self._figures: dict[str, str] = {}
        self._stage = ""
        self._next_s = 0.0

    def __call__(self, demo: Demo) -> None:
        """Say what is new."""
        if demo.stage != self._stage:
            self._stage = demo.stage
            self._line(f"{demo.stage} …")
        for left_out in demo.left_out:
            self._once(f"left out: {left_out}")
        for number, failure in enumerate(demo.failures, 1):
            self._failure(f"failure {number} of {len(demo.schedule.failures)}", failure)
        for number, ended in enumerate(demo.ended, 1):
            self._once(f"ended by itself, {number}: {ended}")
        if demo.elapsed_s is not None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PLAIN_LINE_EVERY_S
            for flow in demo.flows:
                figures = f"{flow.written} written, {flow.processed} processed"
                if figures != self._figures.get(flow.guarantee):
                    self._figures[flow.guarantee] = figures
                    rate = f"{flow.rates()[1]:.0f} per second"
                    self._line(f"{_clock(demo.elapsed_s)} {in_words(flow.guarantee)}: {figures}, {rate}")

    def _failure(self, number: str, failure: Failure) -> None:
        who = f"{failure.victim} (process {failure.pid})"
        self._once(f"{number} at {_clock(failure.at_s)}: {failure.kind} of {who}: {MEANING[failure.kind]}")
        if failure.lasted_s is not None and failure.kind != Kind.CRASH:
            back = "woken" if failure.kind == Kind.ZOMBIE else "back"
            self._once(f"{number}: {back} after {failure.lasted_s:.1f} s")
        for guarantee, seconds in failure.went_on_s.items():
            self._once(f"{number}: {in_words(guarantee)}, its work went on after {seconds:.1f} s")

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
    parts: list[RenderableType] = [_guarantees(verdict)]
    for section in verdict.report.sections:
        for finding in section.findings:
            example = f", for example {finding.examples[0]}" if finding.examples else ""
            parts.append(Text(f"✗ {section.name}: {finding.count} × {finding.anomaly}{example}", style="red"))
    parts += [Text(f"✗ ended by itself: {ended}", style="red") for ended in verdict.ended]
    if not verdict.report.at_rest:
        parts.append(Text("✗ not all input was processed in time", style="red"))
    if verdict.failures:
        parts += [Text(), _failures(verdict.failures, list(verdict.inputs)), *_explained(verdict)]
    parts += [Text(f"left out: {left_out}", style="dim") for left_out in verdict.left_out]
    if verdict.kept:
        parts += [Text(), Text(f"kept to look into: {verdict.kept}")]
    title = "every guarantee held" if verdict.good else "NOT good: see below"
    subtitle = f"{verdict.report.records:,} records audited · seed {verdict.options.seed} · exit code {exit_code}"
    return Panel(
        Group(*parts), title=f"[bold]{title}[/]", subtitle=f"[dim]{subtitle}[/]", width=_WIDTH, border_style=style
    )


def _guarantees(verdict: Verdict) -> RenderableType:
    """Two lines for each: the promise, and what became of it."""
    figures = verdict.report.guarantees()
    parts = []
    for guarantee, inputs in verdict.inputs.items():
        held = verdict.held(guarantee)
        mark = Text("✓ ", style="green") if held else Text("✗ ", style="bold red")
        parts.append(
            mark + Text(in_words(guarantee), style="bold") + Text(f", a letter {LETTER[guarantee]}", style="dim")
        )
        written = ", ".join(f"{verdict.written[name]:,} {name}" for name in inputs)
        parts.append(Text(f"  {written}: ") + Text(outcome(guarantee, figures.get(guarantee, {}))))
    return Group(*parts)


def _explained(verdict: Verdict) -> list[RenderableType]:
    """What the names of the failures mean, and what at most once gave up for each."""
    kinds = dict.fromkeys(each.kind for each in verdict.failures)
    lines: list[RenderableType] = [Text(f"{kind}: {MEANING[kind]}", style="dim") for kind in kinds]
    given_up = [f"{each.kind} at {_clock(each.at_s)} {each.given_up:,}" for each in verdict.failures if each.given_up]
    if given_up:
        lines.append(Text(f"at most once gave up at most: {', '.join(given_up)}"))
    return lines
