"""How ``audit --follow`` looks: a live view on a terminal, lines of JSON elsewhere, figures for Prometheus.

Lines of JSON, one object each: every anomaly at once (``anomaly``, ``of``, ``number``, ``at``, ``text``), and every few
seconds how things stand (``status``, ``at``, ``anomalies``, ``followers``, ``apps``, ``trouble``).
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from streams_app.audit import in_words
from streams_app.errors import ConfigurationError
from streams_app.follow import APPS, GAP, OPEN, Anomaly, Auditor, OnAnomaly, Status

_ANOMALIES_SHOWN = 8


def run(auditor: Auditor, console: Console, *, as_json: bool, interval_s: float) -> bool:
    """Follow until Ctrl-C or SIGTERM, and show it.

    Returns:
        whether anything was found since the state began.
    """
    _calm_garbage_collector()
    # Wherever it strikes: what is not committed then is read again, as after a kill.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt), _shown(auditor, console, as_json, interval_s) as (told, on_status):
            while True:
                on_status(auditor.step(told))
    finally:
        signal.signal(signal.SIGTERM, before)
        auditor.close()
    return auditor.found


def _calm_garbage_collector() -> None:
    """A chunk makes some hundred thousand objects without cycles: looking at them, and at all modules, again and again
    took a fifth of the time (measured)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@contextlib.contextmanager
def _shown(
    auditor: Auditor, console: Console, as_json: bool, interval_s: float
) -> Iterator[tuple[OnAnomaly, Callable[[Status], None]]]:
    if as_json or not console.is_terminal:
        lines = Lines(interval_s)
        yield lines.anomaly, lines.status
        lines.end(auditor.status)
    else:
        with Live(_Picture(auditor), console=console, refresh_per_second=2):
            yield lambda name, anomaly: None, lambda status: None


# --- Lines of JSON --------------------------------------------------------------------------------------------------------


class Lines:
    """On stdout."""

    def __init__(self, interval_s: float, write: Callable[[str], Any] = sys.stdout.write) -> None:
        self._interval_s = interval_s
        self._write = write
        self._due_s = 0.0

    def anomaly(self, name: str, anomaly: Anomaly) -> None:
        """One that was found."""
        at = _moment(anomaly.at_ms / 1000)
        self._line({"anomaly": anomaly.anomaly, "of": name, "number": anomaly.number, "at": at, "text": anomaly.text})

    def status(self, status: Status) -> None:
        """How things stand, if it is time."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + self._interval_s
            self._status("following", status)

    def end(self, status: Status) -> None:
        """How things stood in the end."""
        self._status("ended", status)

    def _status(self, what: str, status: Status) -> None:
        plain = msgspec.to_builtins(status)
        del plain["recent"], plain["at_s"]
        self._line({"status": what, "at": _moment(status.at_s), **_rounded(plain)})

    def _line(self, document: dict[str, Any]) -> None:
        self._write(json.dumps(document) + "\n")
        sys.stdout.flush()


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


# --- Live -----------------------------------------------------------------------------------------------------------------


class _Picture:
    """Drawn anew at each refresh, from how things stand at that moment."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor

    def __rich__(self) -> RenderableType:
        status = self._auditor.status
        parts: list[RenderableType] = [_followers(status), Text(), _apps(status)]
        if status.trouble:
            parts += [Text(), Text(f"trouble, tried again: {status.trouble}", style="yellow")]
        if status.found:
            parts += [Text(), _anomalies(status)]
        found = sum(sum(each.values()) for each in status.anomalies.values())
        title = f"[bold red]{found} anomalies[/]" if found else "[bold green]nothing found[/]"
        return Panel(Group(*parts), title=f"audit: {title}", subtitle="[dim]Ctrl-C ends it[/]", border_style="cyan")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _followers(status: Status) -> Table:
    table = _table("follower", "records", "records/s", "behind", "")
    for name, each in status.followers.items():
        lag = "…" if each.cut_lag_s is None else f"{each.cut_lag_s:.1f} s"
        table.add_row(
            Text(name, style="bold"), f"{each.records:,}", f"{each.records_per_s:,.0f}", lag, Text(each.remark)
        )
        for figure, value in each.figures.items():
            shown = (
                ", ".join(f"{label} {n:,}" for label, n in value.items()) if isinstance(value, dict) else f"{value:,}"
            )
            table.add_row(f"  {in_words(figure.removesuffix('_total'))}", Text(shown or "none"))
    return table


def _apps(status: Status) -> Table:
    table = _table("app", "guarantee", "waiting", "oldest open transaction", "lost at most")
    for each in status.apps:
        reported = "" if each.reported is None else f"{each.reported:,}"
        table.add_row(each.app_id, in_words(each.guarantee), f"{each.lag:,}", f"{each.open_s:.0f} s", reported)
    return table


def _anomalies(status: Status) -> Table:
    table = _table("anomaly", "how often", "the latest")
    for name, counts in status.anomalies.items():
        latest = {each.anomaly: each.text for each in status.recent.get(name, ())}
        for anomaly, count in [*counts.items()][:_ANOMALIES_SHOWN]:
            table.add_row(Text(f"{name}: {anomaly}", style="red"), f"{count:,}", Text(latest.get(anomaly, "")))
    return table


# --- Prometheus -----------------------------------------------------------------------------------------------------------


class Figures(Collector):
    """The status as metrics; those of a follower's own figures are named ``streams_app_audit_FOLLOWER_FIGURE``."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor

    def collect(self) -> Iterator[Metric]:
        """As of the latest step."""
        status = self._auditor.status
        anomalies = CounterMetricFamily(
            "streams_app_audit_anomalies", "Anomalies found since the state began.", labels=["of", "anomaly"]
        )
        # Those that anybody may find are told as 0, too: else nobody could tell "none" from "nobody looks".
        known = {APPS: {OPEN: 0}, **{name: {GAP: 0} for name in status.followers}}
        for name in known | status.anomalies:
            for anomaly, count in {**known.get(name, {}), **status.anomalies.get(name, {})}.items():
                anomalies.add_metric([name, anomaly], count)
        yield anomalies
        records = CounterMetricFamily("streams_app_audit_records", "Committed records judged.", labels=["follower"])
        lag = GaugeMetricFamily(
            "streams_app_audit_cut_lag_seconds",
            "Age of the latest moment up to which all was judged.",
            labels=["follower"],
        )
        for name, each in status.followers.items():
            records.add_metric([name], each.records)
            if each.cut_lag_s is not None:
                lag.add_metric([name], each.cut_lag_s)
        yield from (records, lag)
        for name, each in status.followers.items():
            for figure, value in each.figures.items():
                yield _figure(f"streams_app_audit_{name}_{figure}", value)
        yield from _app_figures(status)
        yield GaugeMetricFamily(
            "streams_app_audit_trouble", "Whether Kafka is out of reach.", value=bool(status.trouble)
        )


def _figure(name: str, value: int | dict[str, int]) -> Metric:
    name = re.sub(r"\W", "_", name)
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    if not isinstance(value, dict):
        return kind(name, "See the follower.", value=value)
    family = kind(name, "See the follower.", labels=["of"])
    for label, number in value.items():
        family.add_metric([label], number)
    return family


def _app_figures(status: Status) -> Iterator[Metric]:
    lag = GaugeMetricFamily("streams_app_audit_lag_records", "Committed input that is not consumed.", labels=["app"])
    opened = GaugeMetricFamily(
        "streams_app_audit_open_transaction_seconds", "Age of the oldest open transaction.", labels=["app"]
    )
    reported = GaugeMetricFamily(
        "streams_app_audit_given_up_events", "The most that was lost at most once.", labels=["app"]
    )
    for each in status.apps:
        lag.add_metric([each.app_id], each.lag)
        opened.add_metric([each.app_id], each.open_s)
        if each.reported is not None:
            reported.add_metric([each.app_id], each.reported)
    yield from (lag, opened, reported)


def serve_metrics(auditor: Auditor, host: str, port: int) -> None:
    """Serve ``/metrics`` until the process ends.

    Raises:
        ConfigurationError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(Figures(auditor))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(f"--metrics-port {port} at {host}: {error.strerror}") from error
