"""The long ones: run by scripts/prove."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_money_moves_exactly_once_while_a_worker_dies_every_8_seconds(
    kafka_url: str, seed: int, tmp_path: Path
) -> None:
    """Two minutes at 500 transfers a second, with repeated, conflicting and ill-formed ones among them."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "faust", "-A", "streams_app", "demo", "--json"),
            *("--seconds", "120", "--rate", "500", "--kills", "15", "--seed", str(seed)),
        ],
        cwd=CHECKOUT,
        env={**os.environ, "KAFKA_URL": kafka_url, "STREAMS_APP_DATADIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    print(done.stderr)
    verdict = json.loads(done.stdout)
    assert done.returncode == 0
    assert (verdict["lost"], verdict["repeated"]) == (0, 0)
    assert len(verdict["kills"]) == 15
