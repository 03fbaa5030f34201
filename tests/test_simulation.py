"""The simulation of the commit path: its histories, the model that they stand on, and whether it notices what is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from lab.mutants import MUTANTS, Mutant, mutant
from lab.simulation.compare import Result, Step, run_on_kafka, run_on_model, script
from lab.simulation.history import History
from lab.simulation.plan import GUARANTEES, Guarantee
from lab.simulation.seams import seams
from lab.simulation.simulate import simulate
from lab.simulation.world import World

SIMULATED = [each for each in MUTANTS if each.simulated]
#: What must have happened in some hundred histories; otherwise they prove nothing.
FAULTS = {
    "crash",
    "zombie",
    "pause",
    "late request",
    "lost request",
    "rebalance",
    "lost session",
    "failed agent",
    "clean stop",
}


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_random_histories_keep_the_guarantee(guarantee: Guarantee) -> None:
    """Crashes, zombies, lost answers and rebalances between any two steps: the short form of the proof."""
    run = simulate([guarantee], seed=7, seconds=20)
    assert run.violation is None, "\n".join(run.violation.story)
    assert run.counts.keys() >= FAULTS


def test_a_history_without_faults_has_none() -> None:
    """What the shrinking aims at: the dull choice everywhere must be a run where nothing happens."""
    with seams() as clock:
        for guarantee in GUARANTEES:
            outcome = History(guarantee, entries=4, workers=2, chunk=2, poison=0, faults={}).run(clock)
            assert not outcome.anomalies
            assert outcome.counts["crash"] == outcome.counts["rebalance"] == 0
            assert outcome.counts["batch"] == 4


def test_the_same_history_takes_the_same_steps() -> None:
    """A failure that cannot be repeated cannot be understood."""
    with seams() as clock:
        for number in range(20):
            history = History.drawn("exactly_once", f"again {number}")
            stories: list[list[str]] = [[], []]
            for story in stories:
                history.run(clock, story)
            assert stories[0] == stories[1]


def test_time_passes_only_where_nothing_happens() -> None:
    """Histories of minutes take milliseconds."""
    world, seen = World({}), []
    for delay_s in (30.0, 10.0, 20.0):
        world.at(delay_s, lambda: seen.append(world.now_s))
    world.run()
    assert seen == [10.0, 20.0, 30.0]


def told(steps: list[Step], result: Result) -> list[str]:
    """The answers, but for what is chance: when a client hears of its fence; and a produce only fills a queue."""
    refused = {"fenced", "fatal", "_FATAL", "not now"}
    return [
        "" if step.call == "produce" else "refused" if answer in refused else answer
        for step, answer in zip(steps, result.answers, strict=True)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_the_model_answers_as_kafka_does(seed: int, kafka_url: str) -> None:
    """Else the simulation would prove the engine against brokers that nobody has."""
    steps, name = script(seed), f"compared-{uuid4().hex[:12]}"
    model, kafka = run_on_model(steps, name), run_on_kafka(kafka_url, steps, name)
    assert (model.records, model.offset) == (kafka.records, kafka.offset)
    assert told(steps, model) == told(steps, kafka)


def test_a_mutant_is_caught_and_its_history_is_short(tmp_path: Path) -> None:
    """Who finds a bug with it must be able to read what happened."""
    output = simulate_mutant(mutant("ends before the offsets"), tmp_path, "--shrink")
    assert "torn: " in output
    assert len([line for line in output.splitlines() if line.partition(".")[0].strip().isdecimal()]) < 100


@pytest.mark.prove
@pytest.mark.parametrize("each", SIMULATED, ids=lambda each: each.name)
def test_the_simulation_notices(each: Mutant, tmp_path: Path) -> None:
    """A check that cannot fail is none."""
    print(simulate_mutant(each, tmp_path, "--no-shrink")[-2_000:])


def simulate_mutant(broken: Mutant, folder: Path, *options: str) -> str:
    """Run the simulation on a copy of the engine that is broken; gives what it says."""
    copy, simulated = folder / "copy", broken.simulated
    assert simulated is not None
    broken.copy(copy)
    histories = ("--guarantee", simulated.guarantee, "--histories", str(simulated.histories))
    outcome = subprocess.run(
        [sys.executable, "-m", "lab.simulation", *histories, *options],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert outcome.returncode == 1, f"not noticed: {outcome.stdout[-500:]}{outcome.stderr[-500:]}"
    return outcome.stdout


@pytest.mark.prove
def test_two_hundred_thousand_histories_keep_the_guarantees() -> None:
    """The proof."""
    run = simulate(GUARANTEES, seed=2026, histories=200_000)
    print(f"{run.histories} histories, {run.per_s:.0f} a second: {dict(run.counts)}")
    assert run.violation is None, "\n".join(run.violation.story)
