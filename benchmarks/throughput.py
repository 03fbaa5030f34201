"""Throughput of all engines on the same work, and of the ledger; see progress.py for how time is measured."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench import Bench, Sample
from benchmarks.engines import FEW_ACCOUNTS_ONLY, OURS, Engine
from benchmarks.figures import rotated
from benchmarks.progress import Progress
from benchmarks.run import Run, faust
from benchmarks.work import BareWork, LedgerWork, Work
from streams_app.supervisor import Supervisor

LEDGER = Engine("ours, the ledger", "streams-app", lambda: faust("streams_app"))


def throughput(bench: Bench) -> Iterator[Sample]:
    """Rounds of all engines in turn, for each number of accounts; slow ones with the lowest only."""
    scale = bench.scale
    drain(bench, OURS, BareWork(20_000, scale.accounts[0]))  # does not count: a new broker is slow
    for number in range(scale.rounds):
        for accounts in scale.accounts:
            engines = [each for each in bench.engines if each not in FEW_ACCOUNTS_ONLY or accounts == scale.accounts[0]]
            for engine in rotated(engines, number):
                work = BareWork(int(scale.events * engine.share), accounts)
                yield Sample("throughput", f"{accounts:,} accounts", engine.name, number, drain(bench, engine, work))
        ledger = LedgerWork(scale.ledger_transfers, scale.accounts[0])
        yield Sample("throughput", f"{scale.accounts[0]:,} accounts", LEDGER.name, number, drain(bench, LEDGER, ledger))


def drain(bench: Bench, engine: Engine, work: Work) -> dict[str, float]:
    """Figures of one worker that works through the whole input, in a run of its own."""
    run = Run(bench.kafka, bench.folder)
    work.prepare(run)
    worker = engine.worker(run)
    progress = Progress(run, [worker], engine.group, work.inputs, work.outputs)
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        drained = progress.drain(work.events)
    figures = {**drained.figures, **work.check(run)._asdict()}
    run.delete()
    return figures
