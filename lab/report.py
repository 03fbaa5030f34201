"""What a run came to: for people as one HTML file without anything from elsewhere, for programs as JSON, for a terminal."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from lab.hunt import Hunt
from lab.outcome import Outcome, Strike
from lab.progress import Progress

_WIDTH, _LEFT, _RIGHT = 1000, 150, 20
_LANE, _CHART = 18, 120
_COLOURS = {"exactly_once": "#2b6cb0", "at_least_once": "#b7791f", "at_most_once": "#2f855a"}


def document(outcome: Outcome, hunt: Hunt | None = None) -> dict[str, Any]:
    """As plain values."""
    options = outcome.options
    return {
        **({"mutant": hunt.document()} if hunt else {}),
        "good": outcome.good,
        "options": vars(options),
        "anomalies": [vars(each) for each in outcome.anomalies],
        "strikes": [_strike(each) for each in outcome.strikes],
        "missed": outcome.missed,
        "recovery_s": recoveries(outcome.strikes),
        "written": outcome.written,
        "guarantees": outcome.report.guarantees() if outcome.report else {},
        "progress": {name: [list(sample) for sample in each.samples] for name, each in outcome.progress.items()},
        "log_lines": outcome.log_lines,
        "seconds": outcome.seconds,
        "kept": outcome.kept,
    }


def _strike(strike: Strike) -> dict[str, Any]:
    recovery = strike.recovery
    return {
        "kind": strike.planned.kind,
        "victim": strike.victim,
        "at_s": round(strike.at_s, 2),
        "healed_s": None if strike.healed_s is None else round(strike.healed_s, 2),
        "went_on_s": {} if recovery is None else {name: round(took, 2) for name, took in recovery.took_s.items()},
    }


def recoveries(strikes: Iterable[Strike]) -> dict[str, dict[str, float]]:
    """By kind of fault, in seconds: median and longest time until all partitions had moved again, after its strike and after
    its heal (negative: before that). Only of faults during which nothing else was broken.
    """
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for strike in strikes:
        recovery = strike.recovery
        if recovery and recovery.alone and recovery.seconds is not None and strike.healed_s is not None:
            struck, healed = recovery.seconds, recovery.seconds - (strike.healed_s - strike.at_s)
            by_kind.setdefault(strike.planned.kind, []).append((struck, healed))
    return {kind: _times(took) for kind, took in sorted(by_kind.items())}


def _times(took: list[tuple[float, float]]) -> dict[str, float]:
    after_strike, after_heal = zip(*took, strict=True)
    return {
        "count": len(took),
        "after_strike_median": round(median(after_strike), 2),
        "after_strike_longest": round(max(after_strike), 2),
        "after_heal_median": round(median(after_heal), 2),
        "after_heal_longest": round(max(after_heal), 2),
    }


def write(outcome: Outcome, folder: Path, hunt: Hunt | None = None) -> Path:
    """``report.html`` and ``report.json``; gives the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(document(outcome, hunt), indent=1))
    path = folder / "report.html"
    path.write_text(page(outcome, hunt))
    return path


# --- Terminal --------------------------------------------------------------------------------------------------------


def table(outcome: Outcome) -> Table:
    """For a terminal."""
    title = "nothing was found" if outcome.good else f"{len(outcome.anomalies)} kinds of anomalies"
    shown = Table(title=f"seed {outcome.options.seed}: {title}")
    for column in ("", "what", "how much", ""):
        shown.add_column(column, overflow="fold")
    for anomaly in outcome.anomalies:
        examples = "\n".join(anomaly.examples).replace("[", r"\[")
        shown.add_row(f"[bold red]{anomaly.name}[/]", anomaly.found_by, str(anomaly.count), examples)
    shown.add_section()
    for name, count in outcome.written.items():
        shown.add_row("written", name, f"{count:,}", "")
    for guarantee, figures in (outcome.report.guarantees() if outcome.report else {}).items():
        for name, figure in figures.items():
            shown.add_row(guarantee.replace("_", " "), name, str(figure), "")
    shown.add_section()
    for kind, times in recoveries(outcome.strikes).items():
        said = (
            f"{times['after_strike_median']:.1f} s after the strike, {times['after_heal_median']:.1f} s after the heal"
        )
        shown.add_row("fault", kind, f"{times['count']:.0f}× alone", f"work went on {said} (medians)")
    return shown


def hunts_table(hunts: Iterable[Hunt]) -> Table:
    """Which mutants were caught, by what, and after how long."""
    shown = Table(title="mutants of the engine")
    for column in ("mutant", "trap", "faults", "caught by", "after"):
        shown.add_column(column, overflow="fold")
    for each in hunts:
        found = each.anomaly
        caught = f"[green]{found.name}[/] ({found.found_by})" if found else "[bold red]nobody[/]"
        shown.add_row(each.mutant.name, each.mutant.trap, each.rounds[-1].options.faults, caught, _after(each))
    return shown


def _after(hunt: Hunt) -> str:
    return f"{hunt.seconds:.0f} s, {hunt.faults} fault{'' if hunt.faults == 1 else 's'}"


# --- HTML ------------------------------------------------------------------------------------------------------------


def page(outcome: Outcome, hunt: Hunt | None = None) -> str:
    """The whole page."""
    options = outcome.options
    verdict = "nothing was found" if outcome.good else f"{len(outcome.anomalies)} kinds of anomalies were found"
    what = f"{options.seconds:g} s, {options.workers} workers, {options.brokers} brokers, {options.rate:g}/s per input"
    parts = [
        f"<h1 class={'good' if outcome.good else 'bad'}>{html.escape(verdict)}</h1>",
        _hunt(hunt) if hunt else "",
        f"<p>Seed {options.seed}, faults <i>{html.escape(options.faults)}</i>, engine {options.engine}: {what}.</p>",
        _anomalies(outcome),
        "<h2>What struck, and what it did to the work</h2>",
        _timeline(outcome),
        "<p class=small>Bars: a fault, from its strike to its heal. Curves: events committed per second (filled), and "
        "the age of the oldest event that waits (line).</p>",
        _strikes(outcome),
    ]
    return _PAGE.replace("{body}", "\n".join(parts))


def _hunt(hunt: Hunt) -> str:
    trap = f" (trap {hunt.mutant.trap})" if hunt.mutant.trap else ""
    caught = f"“{hunt.anomaly.name}” showed it, after" if hunt.anomaly else "nobody noticed in"
    said = f"The engine was broken on purpose: it {hunt.mutant.name}{trap}; {caught} {_after(hunt)}."
    return f"<p><b>{html.escape(said)}</b></p>"


def _anomalies(outcome: Outcome) -> str:
    if outcome.good:
        figures = outcome.report.guarantees() if outcome.report else {}
        rows = [
            (guarantee.replace("_", " "), *(f"{name}: {figure}" for name, figure in each.items()))
            for guarantee, each in figures.items()
        ]
        return _table((), rows)
    blocks = []
    for each in outcome.anomalies:
        examples = "".join(f"<li><code>{html.escape(example)}</code></li>" for example in each.examples)
        said = f"{html.escape(each.found_by)}, {each.count}×"
        lines = "\n".join(outcome.log_lines.get(each.name, []))
        log = (
            f"<details><summary>log lines around it</summary><pre>{html.escape(lines)}</pre></details>" if lines else ""
        )
        blocks.append(f"<div class=anomaly><b>{html.escape(each.name)}</b> ({said})<ul>{examples}</ul>{log}</div>")
    return "".join(blocks)


def _timeline(outcome: Outcome) -> str:
    seconds = max(outcome.seconds, outcome.options.seconds, 1.0)
    kinds = sorted({strike.planned.kind for strike in outcome.strikes})
    scale = (_WIDTH - _LEFT - _RIGHT) / seconds
    height = 30 + len(kinds) * _LANE + len(outcome.progress) * (_CHART + 25)
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline">']
    step_s = next(step for step in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if seconds / step <= 20)
    for at_s in range(0, int(seconds) + 1, step_s):
        x = _LEFT + at_s * scale
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{height}" class=grid />')
        drawn.append(f'<text x="{x:.1f}" y="10" text-anchor="middle">{at_s} s</text>')
    top = 20
    for kind in kinds:
        drawn.append(f'<text x="{_LEFT - 8}" y="{top + 12}" text-anchor="end">{html.escape(kind)}</text>')
        for strike in outcome.strikes:
            if strike.planned.kind == kind:
                drawn.append(_bar(strike, top, scale, seconds))
        top += _LANE
    for guarantee, progress in outcome.progress.items():
        drawn.append(_curves(guarantee, progress, top + 20, scale))
        top += _CHART + 25
    return "".join((*drawn, "</svg>"))


def _bar(strike: Strike, top: float, scale: float, seconds: float) -> str:
    x = _LEFT + strike.at_s * scale
    width = max(3.0, ((strike.healed_s or seconds) - strike.at_s) * scale)
    said = html.escape(f"{strike.planned.kind}: {strike.victim}, {strike.at_s:.1f} s")
    place = f'x="{x:.1f}" y="{top + 3}" width="{width:.1f}" height="{_LANE - 6}"'
    return f"<rect {place} class=fault><title>{said}</title></rect>"


def _curves(guarantee: str, progress: Progress, top: float, scale: float) -> str:
    samples = progress.samples
    colour = _COLOURS.get(guarantee, "#555")
    rates = [
        (later.at_s, (later.processed - earlier.processed) / max(0.01, later.at_s - earlier.at_s))
        for earlier, later in zip(samples, samples[4:], strict=False)
    ]
    most = max((rate for _, rate in rates), default=1.0) or 1.0
    oldest = max((sample.waiting_s for sample in samples), default=1.0) or 1.0
    base = top + _CHART

    def points(values: Sequence[tuple[float, float]], most: float) -> str:
        return " ".join(
            f"{_LEFT + max(0.0, at_s) * scale:.1f},{base - value / most * _CHART:.1f}" for at_s, value in values
        )

    area = f"{_LEFT},{base} {points(rates, most)} {points([(rates[-1][0], 0.0)] if rates else [], most)}"
    waiting = points([(sample.at_s, sample.waiting_s) for sample in samples], oldest)
    name = guarantee.replace("_", " ")
    return (
        f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end" fill="{colour}">{name}</text>'
        f'<text x="{_LEFT - 8}" y="{top + 30}" text-anchor="end">to {most:,.0f}/s</text>'
        f'<text x="{_LEFT - 8}" y="{top + 46}" text-anchor="end">waits to {oldest:.1f} s</text>'
        f'<polygon points="{area}" fill="{colour}" opacity="0.35" />'
        f'<polyline points="{waiting}" fill="none" stroke="#c53030" stroke-width="1.5" />'
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}" class=axis />'
    )


def _strikes(outcome: Outcome) -> str:
    rows = []
    for strike in outcome.strikes:
        each = _strike(strike)
        lasted = "" if each["healed_s"] is None else f"{each['healed_s'] - each['at_s']:.1f} s"
        went_on = ", ".join(f"{name.replace('_', ' ')} {took:.1f} s" for name, took in each["went_on_s"].items())
        rows.append((f"{each['at_s']:.1f} s", each["kind"], each["victim"], lasted, went_on))
    return _table(("at", "fault", "of", "lasted", "work went on after"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Fault lab</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
  h1.good { color: #2f855a; } h1.bad { color: #c53030; } h2 { font-size: 1.1rem; margin-top: 2rem; }
  svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
  .grid { stroke: currentColor; opacity: 0.12; } .axis { stroke: currentColor; opacity: 0.5; } .fault { fill: #c05621; }
  table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; }
  td { border-top: 1px solid #8884; font-variant-numeric: tabular-nums; }
  .anomaly { border-left: 4px solid #c53030; padding: 0.3rem 1rem; margin: 1rem 0; }
  code, pre { font-size: 13px; overflow-wrap: anywhere; white-space: pre-wrap; } .small { opacity: 0.7; font-size: 13px; }
</style>
{body}
</html>
"""
