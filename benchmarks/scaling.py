"""Our engine when there is more of something: partitions, workers, keys in the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.bench import Bench, Sample
from benchmarks.engines import OURS
from benchmarks.entries import Entries, missing_and_repeated
from benchmarks.figures import rotated
from benchmarks.progress import Progress, wait_until
from benchmarks.run import Run
from benchmarks.work import BareWork
from streams_app.supervisor import Supervisor, WorkerProcess

_ACCOUNTS = 10_000
#: What our worker says when it has its partitions.
_AT_WORK = "partitions started"


def partitions(bench: Bench) -> Iterator[Sample]:
    """The bare app on topics of few and of many partitions."""
    for number in range(bench.scale.rounds):
        for count in rotated(bench.scale.partitions, number):
            figures = _drain_together(Run(bench.kafka, bench.folder, count), 1, bench.scale.scaling_events)
            yield Sample("partitions", f"{count} partitions", OURS.name, number, figures)


def workers(bench: Bench) -> Iterator[Sample]:
    """The bare app on one worker and on two, which share the machine's cores with the broker."""
    for number in range(bench.scale.rounds):
        for count in rotated((1, 2), number):
            figures = _drain_together(Run(bench.kafka, bench.folder), count, bench.scale.scaling_events)
            yield Sample("workers", f"{count} worker{'s' * (count > 1)}", OURS.name, number, figures)


def _drain_together(run: Run, count: int, events: int) -> dict[str, float]:
    """Figures of workers among whom the partitions are already divided when the input is written."""
    work = BareWork(events, _ACCOUNTS)
    run.create_topics(*work.inputs, *work.outputs)
    together = [OURS.worker(run, f"bench-{number}") for number in range(count)]
    progress = Progress(run, together, OURS.group, work.inputs, work.outputs)
    with Supervisor(together):
        _start(together)
        work.write(run)
        drained = progress.drain(work.events)
    figures = {**drained.figures, **work.check(run)._asdict()}
    run.delete()
    return figures


def _start(together: Sequence[WorkerProcess]) -> None:
    """One after the other: the first one then has its partitions once more when the last one has some."""
    for worker in together:
        before = [each.count(_AT_WORK) if each.alive else 0 for each in together]
        worker.start()
        started = [pair for pair in zip(together, before, strict=True) if pair[0].alive]
        for each, count in started:
            wait_until(lambda each=each, count=count: each.count(_AT_WORK) > count, each)  # type: ignore[misc]


def growth(bench: Bench) -> Iterator[Sample]:
    """One worker whose table gets more and more keys; at each size so many events of any of them are measured."""
    run = Run(bench.kafka, bench.folder)
    run.create_topics("entries", "outputs")
    worker = OURS.worker(run)
    progress = Progress(run, [worker], OURS.group, ["entries"], ["outputs"])
    keys = 0
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        for size in bench.scale.table_keys:
            _feed(run, progress, Entries(size - keys, size, keys, in_turn=True))
            measured = Entries(bench.scale.table_events, size)
            since = progress.ends()
            drained = _feed(run, progress, measured)
            keys = size
            values = (value for _, value in run.committed("outputs", since=since))
            missing, repeated = missing_and_repeated(values, measured)
            figures = {**drained, "missing": missing, "repeated": repeated}
            yield Sample("growth", f"{size:,} keys", OURS.name, 0, figures)
    run.delete()


def _feed(run: Run, progress: Progress, entries: Entries) -> dict[str, float]:
    before = sum(progress.ends().values())
    run.fill("entries", entries.records())
    return progress.drain(entries.count, before).figures
