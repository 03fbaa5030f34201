"""Yours beside ours, or instead of ours: what the README says of adding an agent, word by word."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

CHECKOUT = Path(__file__).parent.parent
GIT = shutil.which("git") or "git"
SECTION = re.split(r"^## ", (CHECKOUT / "README.md").read_text(), flags=re.MULTILINE)
[YOURS] = [section for section in SECTION if section.startswith("Your agent\n")]


class Step(NamedTuple):
    """A file to write, or commands to type."""

    file: str
    text: str


def steps() -> list[Step]:
    """Of the README's section, in its order; a file has its name in the words before it."""
    found = []
    for words, language, text in re.findall(r"(.*?)```(python|sh)\n(.*?)```", YOURS, re.DOTALL):
        [*_, file] = re.findall(r"`((?:agents|tests)/\w+\.py)`", words) if language == "python" else [""]
        found.append(Step(file, text))
    return found


@pytest.fixture(params=["beside the others", pytest.param("from nothing", marks=pytest.mark.prove)])
def clone(request: pytest.FixtureRequest, kafka_url: str, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A clean clone, and the environment of its user: with our packages and our Kafka, or with nothing at all."""
    folder = tmp_path / "clone"
    subprocess.run([GIT, "clone", "--quiet", str(CHECKOUT), str(folder)], check=True)
    env = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    if request.param == "beside the others":
        (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
        env |= {"KAFKA_URL": kafka_url, "KAFKA_PREFIX": f"y{uuid4().hex[:8]}-", "PYTHONPATH": str(folder)}
    else:
        env |= {"PYTHON": sys.executable}
        subprocess.run([str(folder / "scripts" / "setup")], env=env, check=True)
    return folder, env


@pytest.mark.timeout(900)
def test_an_agent_is_added_as_the_readme_says(clone: tuple[Path, dict[str, str]]) -> None:
    """A newcomer types what stands there, in the order in which it stands there, and nothing else."""
    folder, env = clone
    files = [step.file for step in steps() if step.file]
    assert files == ["agents/visits.py", "tests/test_visits.py"]
    worker = None
    try:
        for step in steps():
            if step.file:
                (folder / step.file).write_text(step.text)
                continue
            if "generate" in step.text:
                # "With a worker running in another terminal"
                worker = subprocess.Popen(
                    [".venv/bin/faust", "-A", "streams_app", "worker"],
                    cwd=folder,
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            said = typed(step.text, folder, env)
            if "audit" in step.text:
                assert re.search(r"visits", said), said
                assert worker is not None
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(60) == 0
    finally:
        if worker is not None and worker.poll() is None:
            worker.kill()
            worker.wait()
    status = subprocess.run(
        [GIT, "status", "--short", "--untracked-files=all"], cwd=folder, capture_output=True, text=True, check=True
    )
    left = {line[3:] for line in status.stdout.splitlines()} - {".venv"}
    assert left == set(files), "nothing else is left in the checkout"


def typed(commands: str, folder: Path, env: dict[str, str]) -> str:
    """What a shell says to these commands, one after the other; none of them may fail."""
    done = subprocess.run(
        ["/bin/sh", "-euc", commands], cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-5_000:]}\n{done.stderr[-5_000:]}"
    return done.stdout


def test_the_readmes_agent_works_alone(kafka_url: str, tmp_path: Path) -> None:
    """Our agents are deleted: a template that only works with its own example is none."""
    shutil.copytree(CHECKOUT / "streams_app", tmp_path / "streams_app", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("agents", "tables"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    [example] = [step.text for step in steps() if step.file == "agents/visits.py"]
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


def test_the_examples_of_tests_pass(kafka_url: str, tmp_path: Path) -> None:
    """Those of docs/testing.md, which go further than the README's."""
    for package in ("streams_app", "agents", "tables"):
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    [example] = [step.text for step in steps() if step.file == "agents/visits.py"]
    (tmp_path / "agents" / "visits.py").write_text(example)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text('pytest_plugins = ["streams_app.testing"]\n')
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "testing.md").read_text(), re.DOTALL)
    (tmp_path / "tests" / "test_visits.py").write_text("\n\n".join(blocks))
    env = {**os.environ, "KAFKA_URL": kafka_url, "PYTHONPATH": str(tmp_path)}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "tests"]
    done = subprocess.run(tests, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
