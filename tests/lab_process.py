"""The lab as its users start it, for the tests that run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lab.mutants import CHECKOUT


def run_lab(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``lab --json``, on a cluster of its own, with what it leaves in ``folder``."""
    env = {name: value for name, value in os.environ.items() if name not in {"KAFKA_URL", "KAFKA_PREFIX"}}
    return subprocess.run(
        [sys.executable, "-m", "faust", "-A", "streams_app", "lab", "--json", *options],
        cwd=CHECKOUT,
        env={**env, "STREAMS_APP_DATADIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=1_800,
        check=False,
    )
