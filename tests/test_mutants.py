"""A check that cannot fail is none: the engine is broken on purpose, and somebody notices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.mutants import MUTANTS, Mutant, mutant
from lab.schedule import kinds_of
from streams_app.errors import ConfigurationError

TESTS = Path(__file__).parent
TESTED = [each for each in MUTANTS if each.test]


@pytest.mark.parametrize("each", MUTANTS, ids=lambda each: each.name)
def test_each_mutant_finds_its_place_and_somebody_who_must_notice(each: Mutant) -> None:
    """A mutant that changes nothing would be caught by nothing."""
    assert each.occurs() == 1
    assert each.before != each.after
    assert each.test or each.simulated or each.lab
    if each.test:
        file, _, test = each.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (TESTS / file).read_text()
    if each.lab:
        assert kinds_of(each.lab.faults, each.lab.workers, each.lab.brokers) or each.lab.faults == "none"


def test_mutants_have_names_of_their_own() -> None:
    """One is asked for by its name, and who asks for one that there is not hears of the others."""
    assert len({each.name for each in MUTANTS}) == len(MUTANTS)
    assert mutant(MUTANTS[0].name) is MUTANTS[0]
    with pytest.raises(ConfigurationError, match="no mutant is named 'unheard of'"):
        mutant("unheard of")


def test_a_mutant_is_applied_to_a_copy(tmp_path: Path) -> None:
    """Whoever runs it goes on with unbroken code."""
    broken = next(each for each in MUTANTS if each.file == "streams_app/session.py")
    broken.copy(tmp_path / "copy")
    assert broken.after in (tmp_path / "copy" / broken.file).read_text()
    assert broken.occurs() == 1
    assert (tmp_path / "copy" / "pyproject.toml").exists()
    assert not (tmp_path / "copy" / ".git").exists()


@pytest.mark.prove
@pytest.mark.parametrize("each", TESTED, ids=lambda each: each.name)
def test_the_named_test_notices(each: Mutant, kafka_url: str, tmp_path: Path) -> None:
    """Otherwise the guarantee that the test stands for may be broken without anybody seeing it."""
    copy = tmp_path / "copy"
    each.copy(copy)
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{each.test}"],
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
