"""Yours instead of ours: our agents are deleted, the README's example is put in their place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

CHECKOUT = Path(__file__).parent.parent


def test_the_readmes_agent_works_alone(kafka_url: str, tmp_path: Path) -> None:
    """A template that only works with its own example is none."""
    shutil.copytree(CHECKOUT / "streams_app", tmp_path / "streams_app", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("agents", "tables"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    [example] = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    [check] = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "proof.md").read_text(), re.DOTALL)
    (tmp_path / "agents" / "visits.py").write_text(f"{example}\n\n{check}")
    env = {
        **os.environ,
        "KAFKA_URL": kafka_url,
        "KAFKA_PREFIX": f"y{uuid4().hex[:8]}-",
        "STREAMS_APP_DATADIR": str(tmp_path / "data"),
        "PYTHONPATH": str(tmp_path),
    }

    def faust(*arguments: str) -> str:
        command = [sys.executable, "-m", "faust", "-A", "streams_app", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    verdict = json.loads(faust("demo", "--seconds", "8", "--kills", "1", "--rate", "200", "--json"))
    assert verdict["good"] is True
    faust("generate", "visits", "--count", "100")
    worker = subprocess.Popen(
        [sys.executable, "-m", "faust", "-A", "streams_app", "worker", "--without-web"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        audit = json.loads(faust("audit", "--wait", "60", "--json"))
    finally:
        worker.terminate()
        assert worker.wait(30) == 0
    assert audit["held"]
    assert audit["at_rest"]
    [figures] = [section["figures"] for section in audit["sections"] if section["name"] == "check visits"]
    assert figures["visits"] == figures["counts"] == 100, "the check of docs/proof.md has looked"

    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "testing.md").read_text(), re.DOTALL)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text('pytest_plugins = ["streams_app.testing"]\n')
    (tmp_path / "tests" / "test_visits.py").write_text("\n\n".join(blocks))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "tests"]
    done = subprocess.run(tests, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
