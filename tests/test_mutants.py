"""A check that cannot fail is none: the engine is broken on purpose, and somebody notices."""

from __future__ import annotations

import os
import re
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


def assert_noticed(broken: Mutant, test: str, kafka_url: str, folder: Path) -> None:
    """The test fails in a broken copy."""
    copy = folder / "copy"
    broken.copy(copy)
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"],
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


@pytest.mark.prove
@pytest.mark.parametrize("each", TESTED, ids=lambda each: each.name)
def test_the_named_test_notices(each: Mutant, kafka_url: str, tmp_path: Path) -> None:
    """Otherwise the guarantee that the test stands for may be broken without anybody seeing it."""
    assert_noticed(each, each.test, kafka_url, tmp_path)


#: What the README promises, by the test that it names, and the mutant that breaks it.
PROMISES = {
    "test_a_kill_at_each_step_of_the_commit_leaves_all_or_nothing": "does not fence its tables at least once",
    "test_a_zombie_that_wakes_up_in_its_commit_changes_nothing": "fences no dead owner",
    "test_workers_that_come_and_go_amid_transactions_change_nothing": "takes a missing store for an empty table",
    "test_a_lost_table_folder_is_restored_from_the_changelog": "takes a missing store for an empty table",
    "test_one_after_the_other_the_ledger_answers_as_the_model_does": "makes a repeated transfer again",
    "test_a_kill_at_each_step_loses_nothing_and_counts_once": "commits at least once before the processing",
    "test_outputs_leave_before_their_batch_is_done": "keeps outputs at least once until the commit",
    "test_a_woken_zombie_does_not_lose_counts": "does not fence its tables at least once",
    "test_a_kill_at_each_step_repeats_nothing_and_loses_no_more_than_reported": "commits at most once behind the processing",
    "test_a_zombie_that_wakes_up_amid_a_batch_repeats_nothing": "lets a woken zombie send what it has in hand",
    "test_a_clean_stop_loses_nothing": "takes nothing back from a batch",
    "test_a_rebalance_loses_nothing": "takes nothing back from a batch",
    "test_poison_is_set_aside_and_harms_no_neighbour": "counts an event as done whose agent raised",
    "test_a_clean_stop_under_full_load_loses_and_repeats_nothing": "breaks off at once when it is asked to end",
    "test_a_broker_that_is_killed_and_started_again_ends_no_worker": "ends with the first trouble with the brokers",
    "test_a_topic_read_under_two_guarantees_is_refused": "lets two guarantees read one topic",
    "test_an_agent_that_writes_a_table_of_another_guarantee_is_refused": "lets agents write tables of another guarantee",
}


#: Where the README says that these tests are.
FILES = {
    test: file for file, test in re.findall(r'\]\(tests/(\w+\.py) "(\w+)"\)', (TESTS.parent / "README.md").read_text())
}


def test_each_promise_of_the_readme_has_somebody_who_breaks_it() -> None:
    """A promise whose test nobody has seen fail is one that may never have been kept."""
    assert FILES.keys() == PROMISES.keys()
    for name in PROMISES.values():
        assert mutant(name)


@pytest.mark.prove
@pytest.mark.parametrize("test", PROMISES)
def test_a_promise_that_is_broken_is_missed(test: str, kafka_url: str, tmp_path: Path) -> None:
    """Each sentence of the README names the test that fails when it is broken."""
    assert_noticed(mutant(PROMISES[test]), f"{FILES[test]}::{test}", kafka_url, tmp_path)
