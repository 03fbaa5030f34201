"""What each guarantee costs: the bare app under each of them, in paired rounds on one broker.

scripts/bench guarantees     five rounds; --quick for one with fewer events

Each run is one worker: first it works through input that lies ready (events/s, processor time, bytes that the broker wrote),
then through 1,000 events/s (latency). Every output is counted afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.entries import Entries, missing_and_repeated
from benchmarks.figures import Spread, ratios, rotated
from benchmarks.latency import latency
from benchmarks.machine import write_json
from benchmarks.progress import Progress
from benchmarks.run import Run, own_broker
from streams_app.embedded import EmbeddedKafka
from streams_app.supervisor import Supervisor

RATE = 1_000
_ACCOUNTS = 10_000
BASE = "exactly once"
#: Name to environment.
CONTENDERS = {
    BASE: {"BENCH_GUARANTEE": "exactly_once"},
    "at least once": {"BENCH_GUARANTEE": "at_least_once"},
    "at least once, unfenced": {"BENCH_GUARANTEE": "at_least_once", "STREAMS_APP_AT_LEAST_ONCE_FENCED": "no"},
    "at most once": {"BENCH_GUARANTEE": "at_most_once"},
}
#: Fields of an outcome to what they are called, in the order of the table.
FIGURES = {
    "events_per_s": "events/s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "worker_us": "worker, µs/event",
    "broker_us": "broker, µs/event",
    "log_bytes": "log, bytes/event",
}


class Outcome(NamedTuple):
    """One run of a contender."""

    events_per_s: float
    p50_ms: float
    p99_ms: float
    #: Processor time for an event, of all threads.
    worker_us: float
    broker_us: float
    #: Written by the broker for an event: output, changelog, offsets, transactions.
    log_bytes: float
    missing: int
    repeated: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, fewer events")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rounds, events, seconds = (1, 100_000, 5.0) if options.quick else (options.rounds, 200_000, 10.0)
    found: dict[str, list[Outcome]] = {name: [] for name in CONTENDERS}
    with own_broker() as (kafka, folder):
        measure(BASE, kafka, folder, 20_000, 1.0)  # does not count: a new broker is slow
        for number in range(rounds):
            for name in rotated(list(CONTENDERS), number):
                outcome = measure(name, kafka, folder, events, seconds)
                found[name].append(outcome)
                print(
                    f"round {number + 1}: {name}: {outcome.events_per_s:,.0f} events/s, p50 {outcome.p50_ms:.0f} ms, "
                    f"p99 {outcome.p99_ms:.0f} ms, {outcome.missing} missing, {outcome.repeated} repeated",
                    flush=True,
                )
    report(found)
    runs = {name: [outcome._asdict() for outcome in outcomes] for name, outcomes in found.items()}
    by_base = {name: {field: by_exactly_once(found, name, field)._asdict() for field in FIGURES} for name in found}
    write_json(options.json, {"runs": runs, "by_exactly_once": by_base})


def measure(name: str, kafka: EmbeddedKafka, folder: Path, events: int, seconds: float) -> Outcome:
    """Throughput first, then ``seconds`` of latency, on the same worker."""
    run = Run(kafka, folder)
    run.create_topics("entries", "outputs")
    run.fill("entries", Entries(events, _ACCOUNTS).records())
    before_bytes = run.log_bytes(but="entries")
    worker = run.worker("bench", "benchmarks.bare_ours", **CONTENDERS[name])
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        drained = Progress(run, [worker], "bench-ours", ["entries"], ["outputs"]).drain(events).figures
        log_bytes = run.log_bytes(but="entries") - before_bytes
        steady = latency(run, worker, rate=RATE, seconds=seconds, first=events)
    # At most once commits first: only now is it certain that nothing is in hand.
    values = (value for _, value in run.committed("outputs"))
    missing, repeated = missing_and_repeated(values, Entries(events + steady.sent, _ACCOUNTS))
    run.delete()
    return Outcome(
        drained["events_per_s"],
        steady.p50_ms,
        steady.p99_ms,
        drained["worker_us"],
        drained["broker_us"],
        log_bytes / events,
        missing,
        repeated,
    )


def report(found: dict[str, list[Outcome]]) -> None:
    """Two tables in Markdown: medians, and the ratios of each round's pairs."""
    heads = " | ".join(FIGURES.values())
    rule = " | ".join(["---"] * len(FIGURES))
    print(f"\n| median of {len(found[BASE])} | {heads} | missing | repeated |\n| --- | {rule} | --- | --- |")
    for name, outcomes in found.items():
        medians = [Spread.of([getattr(outcome, field) for outcome in outcomes]).median for field in FIGURES]
        cells = " | ".join(f"{median:,.0f}" for median in medians)
        missing, repeated = (sum(getattr(each, field) for each in outcomes) for field in ("missing", "repeated"))
        print(f"| {name} | {cells} | {missing} | {repeated} |")
    print(f"\n| by exactly once, round by round | {heads} |\n| --- | {rule} |")
    for name in found:
        if name != BASE:
            spreads = [by_exactly_once(found, name, field) for field in FIGURES]
            print(f"| {name} | {' | '.join(f'{s.median:.2f} ({s.low:.2f}–{s.high:.2f})' for s in spreads)} |")


def by_exactly_once(found: dict[str, list[Outcome]], name: str, field: str) -> Spread:
    """The ratios of a figure to that of exactly once."""
    ours, base = ([getattr(outcome, field) for outcome in found[each]] for each in (name, BASE))
    return ratios(ours, base)


if __name__ == "__main__":
    main()
