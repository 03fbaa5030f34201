"""The checker is checked: workers run a broken engine under faults, and somebody notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.mutants import CHECKOUT, MUTANTS, Mutant

HUNTED = [each for each in MUTANTS if each.lab]


@pytest.mark.prove
@pytest.mark.parametrize("each", HUNTED, ids=lambda each: each.name)
def test_the_lab_notices(each: Mutant, tmp_path: Path) -> None:
    """A lab that finds nothing proves nothing, unless it would have found what is broken."""
    env = {name: value for name, value in os.environ.items() if name != "KAFKA_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "faust", "-A", "streams_app", "lab", "--mutant", each.name, "--json"],
        cwd=CHECKOUT,
        env={**env, "STREAMS_APP_DATADIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1_800,
        check=False,
    )
    print(done.stdout, done.stderr[-2_000:])
    assert done.returncode == 0
    [hunt] = json.loads(done.stdout)
    assert hunt["caught_by"]
