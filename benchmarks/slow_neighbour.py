"""Latency of 2,000 exactly-once events/s, with and without an at-least-once agent in the worker that takes 1 s an event.

scripts/bench slow-neighbour     four paired rounds; --quick for one with less time

Three scenes, each with and without the slow agent: nothing else happens; a second worker joins and leaves; a second worker
joins and leaves that runs the slow agent only, so that nothing is rebalanced but the slow agent's group. A rebalance of
exactly once stops it for a moment in any case: compared is with and without, within a scene and a round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import Spread, ratios, rotated
from benchmarks.latency import Latency, latency
from benchmarks.machine import write_json
from benchmarks.progress import wait_until
from benchmarks.run import Run, own_broker
from streams_app.embedded import EmbeddedKafka
from streams_app.supervisor import Supervisor, WorkerProcess

RATE = 2_000
LIMIT = 1.5
ALONE, BESIDE = "benchmarks.bare_ours", "benchmarks.bare_beside_slow"
#: More than is taken in a run, one a second and partition.
VIEWS = 4_000
SCENES = ("steady", "a rebalance", "a rebalance of the slow agent's group")
STEADY, REBALANCE, ITS_REBALANCE = SCENES
#: When the second worker, started at the beginning, is asked to leave: share of the time that is measured.
LEAVES = 0.65
#: What a worker says, for each group, when it has its partitions.
AT_WORK = "partitions started"
#: On a busy machine the second worker may come too late: that run does not count.
TRIES = 3


class Outcome(NamedTuple):
    """One run."""

    steady: Latency
    #: Of exactly once, on the first worker.
    rebalances: int
    #: Whether the second worker got partitions.
    visited: bool

    def is_meant(self, scene: str) -> bool:
        """Whether that was rebalanced which should have been, and nothing else."""
        rebalanced = self.rebalances >= 2 if scene == REBALANCE else self.rebalances == 0
        return rebalanced and self.visited == (scene != STEADY)


class Visit:
    """A second worker that comes and goes."""

    def __init__(self, worker: WorkerProcess, seconds: float) -> None:
        self._worker = worker
        self._leaves_s = LEAVES * seconds
        self._left = False

    def __call__(self, elapsed_s: float) -> None:
        if elapsed_s >= 0 and self._worker.pid is None:
            self._worker.start()
        elif elapsed_s >= self._leaves_s and not self._left:
            self._worker.terminate()
            self._left = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one round, less time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rounds, seconds = (1, 15.0) if options.quick else (options.rounds, 20.0)
    found: dict[tuple[str, str], list[Outcome]] = {(scene, app): [] for scene in SCENES for app in (ALONE, BESIDE)}
    with own_broker() as (kafka, folder):
        measure(STEADY, ALONE, kafka, folder, 1.0)  # does not count: a new broker is slow
        for number in range(rounds):
            for scene in SCENES:
                for app in rotated((ALONE, BESIDE), number):
                    print(f"round {number + 1}: {scene}: ", end="", flush=True)
                    found[scene, app].append(measure_as_meant(scene, app, kafka, folder, seconds))
    runs = {
        f"{scene}, {app}": [{**each.steady._asdict(), "rebalances": each.rebalances} for each in outcomes]
        for (scene, app), outcomes in found.items()
    }
    write_json(options.json, {"runs": runs})
    return report(found)


def measure_as_meant(scene: str, app: str, kafka: EmbeddedKafka, folder: Path, seconds: float) -> Outcome:
    """As `measure`, again if it was not the scene that it should have been."""
    for _ in range(TRIES):
        outcome = measure(scene, app, kafka, folder, seconds)
        print(line(app, outcome), flush=True)
        if outcome.is_meant(scene):
            return outcome
        print("  which does not count; again: ", end="", flush=True)
    raise SystemExit("the machine is too busy for this")


def measure(scene: str, app: str, kafka: EmbeddedKafka, folder: Path, seconds: float) -> Outcome:
    """One worker of ``app``, and in some scenes a second one for a while."""
    run = Run(kafka, folder)
    run.create_topics("entries", "outputs", "views")
    run.fill("views", ((b"%d" % number, b"{}") for number in range(VIEWS)))
    first = run.worker("first", app)
    second = run.worker("second", app)
    if scene == ITS_REBALANCE:
        second = run.worker("second", BESIDE, STREAMS_APP_GUARANTEES="at_least_once")
    visit = Visit(second, seconds)
    with Supervisor([first, second]):
        first.start()
        groups = {ALONE: 1, BESIDE: 2}[app]
        wait_until(lambda: first.count(AT_WORK) >= groups, first)
        steady = latency(
            run,
            first,
            rate=RATE,
            seconds=seconds,
            meanwhile=visit if scene != STEADY else lambda elapsed_s: None,
        )
        rebalances = first.count("(exactly_once, generation") - 1
    return Outcome(steady, rebalances, second.said(AT_WORK))


def line(app: str, outcome: Outcome) -> str:
    steady = outcome.steady
    return (
        f"{'beside the slow agent' if app == BESIDE else 'alone'}: p50 {steady.p50_ms:.0f} ms, p99 {steady.p99_ms:.0f} ms, "
        f"{steady.missing} missing, {steady.repeated} repeated, exactly once rebalanced {outcome.rebalances} times"
    )


def report(found: dict[tuple[str, str], list[Outcome]]) -> int:
    """A table in Markdown; gives the exit code: 1 if a p99 is above the limit, or an output is missing or repeated."""
    print("\n| median | alone: p50, ms | p99 | beside: p50 | p99 | p50 by alone | p99 by alone |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    good = all(not (each.steady.missing or each.steady.repeated) for outcomes in found.values() for each in outcomes)
    for scene in SCENES:
        alone, beside = ([each.steady for each in found[scene, app]] for app in (ALONE, BESIDE))
        cells = [
            f"{Spread.of([getattr(each, field) for each in steadies]).median:.0f}"
            for steadies in (alone, beside)
            for field in ("p50_ms", "p99_ms")
        ]
        for field in ("p50_ms", "p99_ms"):
            by = ratios([getattr(each, field) for each in beside], [getattr(each, field) for each in alone])
            cells.append(f"{by.median:.2f} ({by.low:.2f}–{by.high:.2f})")
        good = good and by.median <= LIMIT
        print(f"| {scene} | {' | '.join(cells)} |")
    print(
        f"\np99 within {LIMIT} times that without the slow agent, nothing missing or repeated: {'yes' if good else 'NO'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
