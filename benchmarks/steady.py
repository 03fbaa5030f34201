"""Latency at steady rates, of ours and of Kafka Streams."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench, Sample
from benchmarks.engines import KAFKA_STREAMS, OURS, Engine
from benchmarks.entries import Entries
from benchmarks.figures import rotated
from benchmarks.latency import latency
from benchmarks.progress import Progress
from benchmarks.run import Run
from streams_app.supervisor import Supervisor

#: Worked through before: code is compiled, partitions are warm.
_WARM_UP_EVENTS = 20_000


def steady(bench: Bench) -> Iterator[Sample]:
    """Rounds of both engines; one worker meets all rates, the low ones first."""
    engines = [engine for engine in (OURS, KAFKA_STREAMS) if engine in bench.engines]
    for number in range(bench.scale.rounds):
        for engine in rotated(engines, number):
            yield from _all_rates(bench, engine, number)


def _all_rates(bench: Bench, engine: Engine, number: int) -> Iterator[Sample]:
    run = Run(bench.kafka, bench.folder)
    run.create_topics("entries", "outputs")
    first = _WARM_UP_EVENTS
    run.fill("entries", Entries(first, 10_000).records())
    worker = engine.worker(run)
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        Progress(run, [worker], engine.group, ["entries"], ["outputs"]).drain(first)
        for rate in bench.scale.rates:
            found = latency(run, worker, rate=rate, seconds=bench.scale.latency_s, first=first)
            first += found.sent
            figures = {name: figure for name, figure in found._asdict().items() if name != "sent"}
            yield Sample("latency", f"{rate:,} events/s", engine.name, number, figures)
    run.delete()
