"""The long ones: run by scripts/prove."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streams_app.settings import GUARANTEES, Settings

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_guarantee_holds_while_workers_die_twenty_times(kafka_url: str, seed: int, tmp_path: Path) -> None:
    """All three inputs flow at 500 a second each, with repeated, conflicting, late and ill-formed events among them."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "faust", "-A", "streams_app", "demo", "--json", "--seed", str(seed)),
            *("--seconds", "180", "--rate", "500", "--kills", "20", "--zombies", "0", "--broker-restarts", "0"),
        ],
        cwd=CHECKOUT,
        env={**os.environ, "KAFKA_URL": kafka_url, "STREAMS_APP_DATADIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stderr)
    verdict = json.loads(done.stdout)
    money, analytics, sensors = (verdict["guarantees"][name] for name in GUARANTEES)
    print(money, analytics, sensors)
    assert done.returncode == 0
    assert len(verdict["kills"]) == 20
    assert (money["lost"], money["repeated"]) == (0, 0)
    assert analytics["lost"] == 0
    assert sensors["repeated"] == 0
    settings = Settings()
    most = settings.at_most_once_batch_max_events * settings.topic_partitions * 20
    assert sensors["lost"] <= sensors["reported"] <= most
    [views] = [section for section in verdict["audit"]["sections"] if section["name"] == "check page-views"]
    assert views["figures"]["counted_twice"] == 0, "tables commit with their offsets: the counts in them are right"
