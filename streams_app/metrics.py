"""The figures of the engines, for Prometheus, at ``/metrics``: of this process, since it started, by guarantee."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from streams_app.application import App

#: Figure of an engine to the name and the meaning of its metric.
_METRICS = {
    "events": ("streams_app_events", "Events handled."),
    "batches": ("streams_app_batches", "Batches committed."),
    "dropped_batches": (
        "streams_app_dropped_batches",
        "Batches dropped; their events are delivered again, or given up.",
    ),
    "dead_letters": ("streams_app_dead_letters", "Events set aside."),
    "given_up": (
        "streams_app_given_up_events",
        "The most that was lost of at most once, by whoever had the events.",
    ),
}


class EngineFigures(Collector):
    """Asks the engines when it is asked."""

    def __init__(self, app: App) -> None:
        self._app = app

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One counter for each figure."""
        running = [app for app in self._app.family if app.runs_here]
        for figure, (name, meaning) in _METRICS.items():
            family = CounterMetricFamily(name, meaning, labels=["guarantee"])
            for app in running:
                family.add_metric([app.guarantee], app.engine.figures[figure])
            yield family


def register(app: App) -> None:
    """Serve the figures of ``app`` and its siblings."""
    registry = CollectorRegistry()
    registry.register(EngineFigures(app))

    @app.page("/metrics")
    async def metrics(view: Any, request: Any) -> Any:
        return view.text(generate_latest(registry).decode(), content_type="text/plain; version=0.0.4")
