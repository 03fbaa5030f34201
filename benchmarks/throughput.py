"""Throughput of the bare app on our engine and on stock Faust, and of the ledger; one broker, one run, in turn.

scripts/bench            three rounds; --quick for one with fewer events
"""

from __future__ import annotations

import argparse
from pathlib import Path
from threading import Event
from typing import NamedTuple

from benchmarks.common import (
    ACCOUNTS,
    Run,
    Spread,
    committed_values,
    drain,
    entries,
    missing_and_repeated,
    own_broker,
    ratios,
    write_json,
)
from streams_app.embedded import EmbeddedKafka
from streams_app.generate import Feed, Plan
from streams_app.supervisor import Supervisor


class Contender(NamedTuple):
    """An app, the input it reads, and its consumer group, without prefix."""

    name: str
    app: str
    group: str
    inputs: tuple[str, ...]
    output: str
    events: int


class Outcome(NamedTuple):
    """One run of a contender."""

    events_per_s: float
    missing: int
    repeated: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, fewer events")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rounds, share = (1, 4) if options.quick else (options.rounds, 1)
    contenders = [
        Contender("bare, ours", "benchmarks.bare_ours", "bench-ours", ("entries",), "outputs", 600_000 // share),
        Contender(
            "bare, stock Faust", "benchmarks.bare_stock", "bench-stock", ("entries",), "outputs", 30_000 // share
        ),
        Contender(
            "ledger", "streams_app", "streams-app", ("transfers", "credits"), "transfer-results", 200_000 // share
        ),
    ]
    found: dict[str, list[Outcome]] = {contender.name: [] for contender in contenders}
    with own_broker() as (kafka, folder):
        for number in range(rounds):
            for contender in contenders:
                outcome = measure(contender, kafka, folder)
                found[contender.name].append(outcome)
                print(
                    f"round {number + 1}: {contender.name}: {outcome.events_per_s:,.0f} events/s, "
                    f"{outcome.missing} missing, {outcome.repeated} repeated",
                    flush=True,
                )
    report(found, options.json)


def report(found: dict[str, list[Outcome]], file: Path | None) -> None:
    """Medians, and the ratio of each round's pair."""
    rates = {name: [outcome.events_per_s for outcome in outcomes] for name, outcomes in found.items()}
    for name, each in rates.items():
        median, low, high = Spread.of(each)
        print(f"{name:20} median {median:>10,.0f} events/s  ({low:,.0f} to {high:,.0f})")
    ours, stock = rates["bare, ours"], rates["bare, stock Faust"]
    median, low, high = ratios(ours, stock)
    print(f"{'ours ÷ stock':20} median {median:>10.1f}  ({low:.1f} to {high:.1f})")
    figures = {name: [outcome._asdict() for outcome in outcomes] for name, outcomes in found.items()}
    write_json(file, {"runs": figures, "ours_by_stock": [a / b for a, b in zip(ours, stock, strict=True)]})


def measure(contender: Contender, kafka: EmbeddedKafka, folder: Path) -> Outcome:
    """Write the input, then let one worker work through it; the time runs from its first progress to its last."""
    run = Run(kafka, folder)
    write_input(contender, run)
    worker = run.worker("bench", contender.app)
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        drained = drain(run, worker, contender.group, contender.inputs, contender.events)
        missing, repeated = compare(contender, run)
    return Outcome(drained.events / drained.seconds, missing, repeated)


def write_input(contender: Contender, run: Run) -> None:
    ledger = "credits" in contender.inputs
    run.create_topics(*contender.inputs, contender.output, *(("ledger", "dead-letters") if ledger else ()))
    if ledger:
        import agents.ledger_input  # noqa: F401, PLC0415 - registers its generator

        Feed(Plan("transfers", contender.events, keys=ACCOUNTS), run.address, run.prefix).run(Event())
    else:
        run.fill("entries", entries(contender.events))


def compare(contender: Contender, run: Run) -> tuple[int, int]:
    """How many inputs have no committed output, and how many outputs there are too many."""
    if contender.output == "outputs":
        return missing_and_repeated(committed_values(run, "outputs"), contender.events)
    # Of the ledger's input some repeats an id on purpose: only the number of answers is known.
    count = sum(1 for _ in committed_values(run, contender.output, "dead-letters"))
    return max(0, contender.events - count), max(0, count - contender.events)


if __name__ == "__main__":
    main()
