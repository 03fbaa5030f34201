"""The lab itself, on clusters and workers of its own: workers, brokers, wires and disks are hurt, and nothing breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab_process import run_lab


def lab(folder: Path, *options: str) -> dict[str, Any]:
    """What a run came to."""
    done = run_lab(folder, *options)
    assert done.returncode in {0, 1}, done.stderr[-2_000:]
    outcome: dict[str, Any] = json.loads(done.stdout)
    recovered = json.dumps(outcome["recovery_s"], indent=1)
    print(
        f"{len(outcome['strikes'])} faults, {outcome['written']} written; recovery of those alone, in seconds: {recovered}"
    )
    return outcome


def test_a_minute_of_faults_breaks_nothing(tmp_path: Path) -> None:
    """The proof in small; the long ones are below. One broker, as others test on the same machine."""
    outcome = lab(tmp_path, "--seconds", "60", "--seed", "7", "--workers", "2", "--brokers", "1", "--rate", "50")
    assert outcome["anomalies"] == []
    assert len(outcome["strikes"]) >= 5
    assert all(count > 1_000 for count in outcome["written"].values())


@pytest.mark.prove
@pytest.mark.parametrize(("seed", "workers"), [(1, 2), (2, 3), (3, 4)])
def test_minutes_of_mixed_faults_break_nothing(seed: int, workers: int, tmp_path: Path) -> None:
    """Three brokers, and all faults there are."""
    options = ("--seconds", "300", "--seed", str(seed), "--workers", str(workers), "--rate", "100")
    outcome = lab(tmp_path, *options)
    assert outcome["anomalies"] == []
    assert len(outcome["strikes"]) >= 20


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_topology_of_what_streams_can_do_breaks_under_no_fault(seed: int, tmp_path: Path) -> None:
    """Filter, group by another key, take several at a time, count in windows: each step hands every event on once."""
    options = ("--workload", "topology", "--seconds", "120", "--seed", str(seed), "--workers", "3", "--rate", "100")
    outcome = lab(tmp_path, *options)
    assert outcome["anomalies"] == []
    assert len(outcome["strikes"]) >= 8


@pytest.mark.prove
def test_a_killed_worker_is_back_soon_and_a_frozen_one_replaced(tmp_path: Path) -> None:
    """Each fault alone, so that the time is its own. No absolute time is asserted: the machine may be slow."""
    options = ("--seconds", "300", "--seed", "1", "--faults", "kill,zombie", "--pauses", "long")
    outcome = lab(tmp_path, *options, "--workers", "2", "--brokers", "1", "--rate", "100")
    assert outcome["anomalies"] == []
    assert outcome["recovery_s"].keys() == {"kill", "zombie"}


@pytest.mark.prove
def test_stock_faust_does_not_hold(tmp_path: Path) -> None:
    """Else the lab would show no difference, and prove nothing."""
    outcome = lab(tmp_path, "--engine", "stock", "--seconds", "60", "--seed", "1", "--workers", "2", "--rate", "50")
    assert {each["name"] for each in outcome["anomalies"]} & {"duplicate", "lost write", "money moved", "wrong value"}
