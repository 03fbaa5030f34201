"""A check that cannot fail is none: the engine is broken on purpose, and the tests notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

CHECKOUT = Path(__file__).parent.parent


def test_each_mutant_still_finds_its_place() -> None:
    """A mutant that changes nothing would be caught by nothing."""
    for mutant in MUTANTS:
        text = (CHECKOUT / "streams_app" / mutant.file).read_text()
        assert text.count(mutant.before) == 1, mutant.name
        file, _, test = mutant.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (CHECKOUT / "tests" / file).read_text(), mutant.name


@pytest.mark.prove
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_named_test_notices(mutant: Mutant, kafka_url: str, tmp_path: Path) -> None:
    """Otherwise the guarantee that the test stands for may be broken without anybody seeing it."""
    copy = tmp_path / "copy"
    for folder in ("streams_app", "tests"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", copy)
    module = copy / "streams_app" / mutant.file
    module.write_text(module.read_text().replace(mutant.before, mutant.after))
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutant.test}"],
        cwd=copy,
        env={**os.environ, "KAFKA_URL": kafka_url, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(outcome.stdout[-2_000:])
    assert outcome.returncode == 1, "the tests did not notice"
    assert " failed" in outcome.stdout
