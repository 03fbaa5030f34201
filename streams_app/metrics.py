"""What Prometheus is told at ``/metrics``: of this process, since it started, by guarantee and partition.

Nothing is counted for it while events are handled: the engines are asked when it asks. Lag and offsets have the names that
exporters of Kafka gave them, so dashboards for those show ours. Each process tells of the partitions that it has; together
they tell of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from faust.types import TP
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streams_app.errors import (
    CommitUnconfirmed,
    KafkaUnreachable,
    OutputRefused,
    PartitionsLost,
    StoreCorrupted,
    TransactionAborted,
)
from streams_app.faust_adapter import leader_topic
from streams_app.figures import named

if TYPE_CHECKING:
    from streams_app.application import App

#: Reasons that are known before anything happens. They are told as 0 from the beginning: a counter that is born with its
#: first event has never increased, and whoever waits for an increase would not hear of that one.
_SET_ASIDE = ("agent_error", "invalid", "malformed")
_TROUBLES = tuple(named(kind) for kind in (CommitUnconfirmed, KafkaUnreachable, StoreCorrupted, TransactionAborted))
_DROPPED = ("agent_error", named(PartitionsLost), named(OutputRefused), *_TROUBLES)
#: Figure of an engine to the name and the meaning of its metric.
_COUNTS = {
    "batches": ("batches", "Batches committed."),
    "outputs": ("outputs", "Records that were sent for events of committed batches."),
    "table_writes": ("table_writes", "Changelog records of committed batches."),
    "given_up": ("given_up_events", "The most that was lost of at most once, by whoever had the events."),
    "rebalances": ("rebalances", "Assignments of partitions to this process."),
}


class EngineFigures(Collector):
    """Asks the engines when it is asked."""

    def __init__(self, app: App) -> None:
        self._app = app

    def collect(self) -> Iterator[Metric]:
        """All families."""
        apps = [app for app in self._app.family if app.runs_here]
        for figure, (name, meaning) in _COUNTS.items():
            yield _counter(name, meaning, {(app.guarantee,): app.engine.figures[figure] for app in apps})
        yield from _by_reason(apps)
        yield _counter(
            "events",
            "Records of the input whose batch was committed.",
            {
                (app.guarantee, *_place(tp)): count
                for app in apps
                for tp, count in app.engine.figures.events_of.items()
                if tp.topic not in _not_input(app)
            },
            "topic",
            "partition",
        )
        yield _histogram(
            "commit_duration_seconds",
            "From the barrier to the end of the commit.",
            {app.guarantee: app.engine.figures.commit_s for app in apps},
        )
        yield _histogram(
            "end_to_end_latency_seconds",
            "From the timestamp of a batch's oldest record to its commit, by partition.",
            {app.guarantee: app.engine.figures.latency_s for app in apps},
        )
        yield from _states(apps)
        yield from _offsets(apps)
        yield from _stores(apps)


def _by_reason(apps: Iterable[App]) -> Iterator[Metric]:
    reasons = {
        "dropped_batches": ("Batches dropped; their events are delivered again, or given up.", "dropped", _DROPPED),
        "dead_letters": ("Events set aside, by the code of their dead letters.", "set_aside", _SET_ASIDE),
        "restarts_of_partitions": ("Starts of partitions that had to be tried anew.", "troubles", _TROUBLES),
    }
    for name, (meaning, figure, known) in reasons.items():
        counts = {
            (app.guarantee, reason): count
            for app in apps
            for reason, count in {**dict.fromkeys(known, 0), **getattr(app.engine.figures, figure)}.items()
        }
        yield _counter(name, meaning, counts, "reason")


def _states(apps: Iterable[App]) -> Iterator[Metric]:
    ready = _gauge("ready", "1 if /readyz has no reason against this guarantee, nor against the whole process.")
    assigned = _gauge("assigned_partitions", "Input partitions that this process has.")
    done = _gauge("restore_progress_ratio", "How far the tables of the last assignment are restored.")
    remaining = _gauge(
        "restore_remaining_seconds", "How long the restore takes still, if it goes on as it went so far."
    )
    committed = _gauge("last_commit_age_seconds", "Since the last batch was committed, or the process started.")
    for app in apps:
        engine, labels = app.engine, [app.guarantee]
        health = app.family[0].health
        ready.add_metric(labels, not (health.reasons_of_process() or health.reasons_of(app)))
        assigned.add_metric(labels, len(_inputs(app)) if engine.is_working else 0)
        committed.add_metric(labels, engine.figures.committed_age_s)
        restoring = engine.restoring
        done.add_metric(labels, restoring.done / restoring.total if restoring.total else 1)
        if restoring.remaining_s is not None:
            remaining.add_metric(labels, restoring.remaining_s)
    yield from (ready, assigned, committed, done, remaining)


def _offsets(apps: Iterable[App]) -> Iterator[Metric]:
    of_group, group = ["consumergroup", "topic", "partition"], "of the app's consumer group"
    lag = GaugeMetricFamily("kafka_consumergroup_lag", f"Records that are not done {group}.", labels=of_group)
    committed = GaugeMetricFamily("kafka_consumergroup_current_offset", f"Committed offset {group}.", labels=of_group)
    consumed = _gauge("consumed_offset", "Next offset to read.", "topic", "partition")
    ends: dict[TP, int] = {}
    for app in apps:
        reads = app.input.reads() if app.engine.is_working else {}
        for tp, position in _inputs(app).items():
            read = reads.get(tp)
            if read is None:
                continue
            labels = [app.conf.id, *_place(tp)]
            committed.add_metric(labels, position)
            consumed.add_metric([app.guarantee, *_place(tp)], read.position)
            if read.high_watermark is not None:
                lag.add_metric(labels, max(0, read.high_watermark - position))
                ends[tp] = max(read.high_watermark, ends.get(tp, 0))
    end = GaugeMetricFamily(
        "kafka_topic_partition_current_offset", "High watermark, as of the last fetch.", labels=["topic", "partition"]
    )
    for tp, offset in ends.items():
        end.add_metric(_place(tp), offset)
    yield from (lag, committed, consumed, end)


def _stores(apps: Iterable[App]) -> Iterator[Metric]:
    labels = ("table", "partition", "role")
    size = _gauge("store_size_bytes", "Of a table's partition on disk and in RocksDB's memory.", *labels)
    keys = _gauge(
        "store_keys", "RocksDB's estimate of the rows of a table's partition, index entries counted.", *labels
    )
    for app in apps:
        for role, stores in (("owner", app.engine.stores), ("replica", app.replicas.stores)):
            for (topic, partition), store in stores.items():
                found = store.size()
                if found is not None:
                    place = [app.guarantee, app.table_of_changelog(topic).name, str(partition), role]
                    size.add_metric(place, found.size_bytes)
                    keys.add_metric(place, found.keys)
    yield from (size, keys)


def _inputs(app: App) -> dict[TP, int]:
    """Positions of what agents read."""
    others = _not_input(app)
    return {tp: position for tp, position in app.engine.positions.items() if tp.topic not in others}


def _not_input(app: App) -> set[str | None]:
    """What Faust reads for itself: who leads, and answers to this process, by another name each time that it starts."""
    return {app.conf.reply_to, leader_topic(app)}


def _place(tp: TP) -> list[str]:
    return [tp.topic, str(tp.partition)]


def _counter(name: str, meaning: str, values: Mapping[Any, float], *labels: str) -> CounterMetricFamily:
    family = CounterMetricFamily(f"streams_app_{name}", meaning, labels=["guarantee", *labels])
    for of, value in values.items():
        family.add_metric(of, value)
    return family


def _gauge(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"streams_app_{name}", meaning, labels=["guarantee", *labels])


def _histogram(name: str, meaning: str, observed: Mapping[str, Histogram]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"streams_app_{name}", meaning, labels=["guarantee"])
    for guarantee, histogram in observed.items():
        buckets: list[tuple[str, float]] = []
        total = 0.0
        for sample in [sample for metric in histogram.collect() for sample in metric.samples]:
            if sample.name.endswith("_bucket"):
                buckets.append((sample.labels["le"], sample.value))
            elif sample.name.endswith("_sum"):
                total = sample.value
        family.add_metric([guarantee], buckets, total)
    return family


def register(app: App) -> None:
    """Serve the figures of ``app`` and its siblings, and what Prometheus knows of any process."""
    registry = CollectorRegistry()
    registry.register(EngineFigures(app))
    ProcessCollector(registry=registry)

    @app.page("/metrics")
    async def metrics(view: Any, request: Any) -> Any:
        return view.text(generate_latest(registry).decode(), content_type="text/plain; version=0.0.4")
