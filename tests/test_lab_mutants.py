"""The checker is checked: workers run a broken engine under faults, and somebody notices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.mutants import MUTANTS, Mutant
from tests.lab_process import run_lab

HUNTED = [each for each in MUTANTS if each.lab]


@pytest.mark.prove
@pytest.mark.parametrize("each", HUNTED, ids=lambda each: each.name)
def test_the_lab_notices(each: Mutant, tmp_path: Path) -> None:
    """A lab that finds nothing proves nothing, unless it would have found what is broken."""
    done = run_lab(tmp_path, "--mutant", each.name)
    print(done.stdout, done.stderr[-2_000:])
    assert done.returncode == 0
    [hunt] = json.loads(done.stdout)
    assert hunt["caught_by"]
