"""The audit says so when a promise is broken: each guarantee's commit is moved to the wrong side of the processing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.rig import wait_until

CHECKOUT = Path(__file__).parent.parent


class Case(NamedTuple):
    """A guarantee, its input, where its worker dies, and how its promise is broken."""

    guarantee: str
    input: str
    fault: str
    before: str
    after: str
    #: What the audit then may find.
    anomalies: set[str]


CASES = [
    Case(
        "at_most_once",
        "sensor-readings",
        "kill 5 published@4",
        "            self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})\n",
        # Each batch when the next one comes: behind its processing.
        "            now = {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()}\n"
        "            late, self._late = getattr(self, '_late', {}), now\n"
        "            self._commit_once(pin, late)\n",
        {"repeated observation", "repeated dead letter"},
    ),
    Case(
        "at_least_once",
        "page-views",
        "kill 1 prepare: outputs sent@2",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n"
        "        self.claims_first = True\n"
        "        self.take = lambda batch, began: self.claim(batch.consumed, {}, batch.pin)\n",
        # It commits again and again: one of its transactions may be open when the audit looks.
        {"lost view", "lost dead letter", "open"},
    ),
]


class Copy:
    """A copy of the application, with workers of its own."""

    def __init__(self, folder: Path, kafka_url: str, guarantee: str) -> None:
        for package in ("streams_app", "agents", "tables"):
            shutil.copytree(CHECKOUT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        self._folder = folder
        self._env = {
            **os.environ,
            "KAFKA_URL": kafka_url,
            "KAFKA_PREFIX": f"b{uuid4().hex[:8]}-",
            "STREAMS_APP_DATADIR": str(folder / "data"),
            "STREAMS_APP_GUARANTEES": guarantee,
            "PYTHONPATH": str(folder),
        }

    def change(self, before: str, after: str) -> None:
        """Break the guarantee."""
        module = self._folder / "streams_app" / "guarantees.py"
        text = module.read_text()
        assert text.count(before) == 1
        module.write_text(text.replace(before, after))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "faust", "-A", "streams_app", *arguments]
        return subprocess.Popen(
            command,
            cwd=self._folder,
            env={**self._env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


@pytest.mark.parametrize("broken", [False, True], ids=["kept", "broken"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.guarantee)
def test_the_audit_tells_a_broken_promise_from_a_kept_one(
    kafka_url: str, tmp_path: Path, case: Case, broken: bool
) -> None:
    """A check that cannot fail proves nothing."""
    copy = Copy(tmp_path / "copy", kafka_url, case.guarantee)
    if broken:
        copy.change(case.before, case.after)
    assert copy.run("generate", case.input, "--count", "20000")[0] == 0
    worker = copy.start("worker", "--without-web", STREAMS_APP_FAULT=case.fault)
    try:
        wait_until(lambda: worker.poll() is not None, "the worker died")
        assert worker.returncode == -signal.SIGKILL
        worker.stdout.close()  # type: ignore[union-attr]
        worker = copy.start("worker", "--without-web")
        code, output = copy.run("audit", "--json", "--wait", "60")
    finally:
        worker.terminate()
        worker.communicate(timeout=30)
    verdict: dict[str, Any] = json.loads(output)
    findings = {
        finding["anomaly"]
        for section in verdict["sections"]
        for finding in section["findings"]
        if section["guarantee"] == case.guarantee
    }
    assert verdict["at_rest"]
    assert bool(findings) == broken
    assert findings <= case.anomalies
    assert code == (1 if broken else 0)
