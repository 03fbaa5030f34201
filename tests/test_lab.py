"""The fault lab: what of it can be judged without a cluster; and one run, on one."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lab.checker import Anomaly, Sightings, named, of_findings, of_sightings, told_once
from lab.faults import FAULTS
from lab.hunt import MOST_ROUNDS, hunt, options_for
from lab.live import Seen
from lab.logs import lines_around
from lab.mutants import Mutant, UnderFaults
from lab.outcome import Options, Outcome, Strike
from lab.progress import Progress, Recovery
from lab.report import document, hunts_table, page, recoveries
from lab.schedule import Planned, kinds_of, schedule
from lab.world import java_hash
from streams_app.errors import ConfigurationError
from streams_app.registry import Findings

TP = ("in", 0)


def test_the_same_seed_gives_the_same_schedule() -> None:
    """Else a run that found something could not be run again."""
    kinds = kinds_of("mixed", 3, 3)
    assert schedule(7, 300, kinds) == schedule(7, 300, kinds)
    assert schedule(7, 300, kinds) != schedule(8, 300, kinds)


def test_every_kind_of_fault_comes_in_a_long_run() -> None:
    kinds = kinds_of("mixed", 3, 3)
    assert set(kinds) == set(FAULTS)
    assert {planned.kind for planned in schedule(1, 300, kinds)} == set(FAULTS)


@pytest.mark.parametrize(("pauses", "least_s", "most_s"), [("none", 0, 0.2), ("short", 1, 7), ("long", 24, 30)])
def test_pauses_between_faults_are_as_asked_for(pauses: str, least_s: float, most_s: float) -> None:
    """Time to recover is only measured where a fault is alone; what hides in peace shows where none is."""
    planned = schedule(3, 300, ["kill", "zombie"], pauses)
    gaps_s = [later.at_s - earlier.at_s for earlier, later in pairwise(planned)]
    assert sum(least_s <= gap_s <= most_s for gap_s in gaps_s) > len(gaps_s) / 2


def test_what_cannot_be_survived_is_left_out_of_the_mix_and_refused_by_name() -> None:
    assert "broker" not in kinds_of("mixed", 3, 1)
    with pytest.raises(ConfigurationError, match="needs 3 brokers"):
        kinds_of("broker", 3, 1)
    with pytest.raises(ConfigurationError, match="no fault is named 'earthquake'"):
        kinds_of("earthquake", 3, 3)
    assert kinds_of("none", 3, 3) == []


def test_coordinators_are_found_as_kafka_does() -> None:
    """``"hello".hashCode()`` and, negative in Java, ``"polygenelubricants".hashCode()``."""
    assert java_hash("hello") == 99162322
    assert java_hash("polygenelubricants") == 0


def test_the_age_of_the_oldest_event_that_waits() -> None:
    """The figure that shows a partition which lies still, while others go on."""
    progress = Progress()
    progress.take(1.0, {TP: 0}, {TP: 10})
    progress.take(2.0, {TP: 0}, {TP: 20})
    progress.take(5.0, {TP: 10}, {TP: 20})
    assert progress.waiting_s == 3.0
    progress.take(6.0, {TP: 20}, {TP: 20})
    assert progress.waiting_s == 0.0


def test_time_without_a_fault_is_counted_apart() -> None:
    """While one rebalance follows the other a partition may have bad luck; in peace it may not."""
    progress = Progress()
    progress.take(1.0, {TP: 0}, {TP: 10}, peace_s=0.0)
    progress.take(50.0, {TP: 0}, {TP: 20}, peace_s=2.0)
    assert (progress.waiting_s, progress.in_peace_s) == (49.0, 2.0)
    progress.take(60.0, {TP: 10}, {TP: 20}, peace_s=12.0)
    assert (progress.waiting_s, progress.in_peace_s) == (10.0, 10.0)


def test_work_has_gone_on_when_every_partition_that_had_some_has_moved() -> None:
    other = ("in", 1)
    recovery = Recovery(10.0)
    # Asked before what was under way had landed: this says nothing.
    recovery.take(10.1, 10.2, {"exactly_once": {TP: 4, other: 4}}, {TP: 9, other: 9})
    recovery.take(11.1, 11.2, {"exactly_once": {TP: 5, other: 5}}, {TP: 9, other: 9})
    recovery.take(12.0, 12.1, {"exactly_once": {TP: 9, other: 5}}, {TP: 9, other: 9})
    assert recovery.seconds is None
    recovery.take(13.9, 14.0, {"exactly_once": {TP: 9, other: 6}}, {TP: 9, other: 9})
    assert recovery.seconds == 4.0


def test_findings_get_the_names_that_jepsen_gave_them() -> None:
    assert named("repeated result") == "duplicate"
    assert named("lost view") == "lost write"
    assert named("lost beyond the reported") == "lost silently"
    assert named("lost debit") == "torn leg"
    assert named("table differs") == "table ≠ changelog"
    assert named("unbalanced") == "money moved"
    assert named("vanished") == "money moved"
    assert named("torn") == "torn leg"
    findings = Findings()
    findings.add("phantom output", "here")
    [anomaly] = of_findings("a check", findings.list())
    assert (anomaly.name, anomaly.examples) == ("torn leg", ["here"])


class Message(SimpleNamespace):
    """Of partition 0 of the topic ``in``."""

    def topic(self) -> str:
        """Its topic."""
        return "in"

    def partition(self) -> int:
        """Its partition."""
        return 0

    def offset(self) -> int:
        """Its offset."""
        return int(self.at)

    def key(self) -> bytes:
        """Its key."""
        return b"k"

    def value(self) -> bytes:
        """Its value."""
        return bytes(self.content)


@pytest.mark.parametrize(
    ("final", "found"),
    [
        ([(0, b"a"), (2, b"b"), (5, b"new")], []),
        ([(0, b"a")], ["aborted read"]),
        ([(0, b"a"), (2, b"other")], ["aborted read"]),
        ([(0, b"a"), (1, b"late"), (2, b"b")], ["unseen"]),
    ],
)
def test_what_a_reader_saw_during_the_run_must_be_there_at_the_end(
    final: list[tuple[int, bytes]], found: list[str]
) -> None:
    """A committed read that is taken back is the worst that a stream can do to those who act on it."""
    seen = Seen(Findings())
    for at, content in ((0, b"a"), (2, b"b")):
        seen.take(cast(Any, Message(at=at, content=content)))
    seen.compare(TP, [cast(Any, Message(at=at, content=content)) for at, content in final])
    assert [each.anomaly for each in seen.findings.list()] == found


def test_the_report_shows_anomalies_and_escapes_what_others_wrote() -> None:
    strike = Strike(Planned(1.0, "kill", 2.0, 3), "lab-1", 1.0, 3.0, Recovery(0.0))
    findings = Findings()
    findings.add("lost view", "views[0]@7 <script>")
    outcome = Outcome(
        Options(),
        [strike],
        [],
        of_findings("check", findings.list()),
        {"exactly_once": Progress()},
        None,
        10.0,
        {},
        {"lost write": ["lab-1: said"]},
    )
    shown = page(outcome)
    assert "lost write" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "lab-1: said" in shown
    assert recoveries([strike]) == {}


def test_log_lines_around_a_moment_are_in_the_order_of_their_times(tmp_path: Path) -> None:
    first, second = tmp_path / "one.log", tmp_path / "two.log"
    first.write_text("[2026-01-01 10:00:01,000] [1] [INFO] b\n[2026-01-01 10:00:30,000] [1] [INFO] late\n")
    second.write_text("[2026-01-01 10:00:00,500] [1] [INFO] a\nnot a line of the log\n")
    at_ms = int(datetime(2026, 1, 1, 10, 0, 0).timestamp() * 1000)
    assert [line[-1] for line in lines_around([first, second], at_ms)] == ["a", "b"]


def test_documents_are_plain_values() -> None:
    outcome = Outcome(Options(), [], [], [], {}, None, 1.0, {}, {})
    assert json.loads(json.dumps(document(outcome)))["good"]


def test_what_was_seen_during_the_run_and_found_by_the_audit_is_told_once() -> None:
    """With the whole of it from the audit, and the time at which it was seen."""
    sightings = Sightings(lambda: 7.5)
    sightings.add("torn", "one leg")
    sightings.add("repeated", "an id")
    audited = of_findings("check ledger", [*legs().list()], "exactly_once")
    told = told_once(of_sightings("follower ledger", sightings, "exactly_once"), audited)
    assert [(each.name, each.found_by, each.found_s) for each in told] == [
        ("torn leg", "check ledger: lost debit", 7.5),
        ("duplicate", "follower ledger: repeated", 7.5),
    ]


def legs() -> Findings:
    """What the audit finds of a torn leg."""
    findings = Findings()
    findings.add("lost debit", "of a transfer", 3)
    return findings


MUTANT = Mutant("sleeps", "5", "some.py", "work()", "sleep()", lab=UnderFaults("kill", seconds=20.0, workers=3))


def round_of(options: Options, *anomalies: Anomaly) -> Outcome:
    """A round of 30 s, in which faults struck at 5 s and at 15 s."""
    strikes = [Strike(Planned(at_s, "kill", 1.0, 0), "lab-1", at_s) for at_s in (5.0, 15.0)]
    return Outcome(options, strikes, [], list(anomalies), {}, None, 30.0, {}, {})


def test_a_mutant_is_hunted_with_its_own_faults_from_seed_to_seed_until_it_is_caught() -> None:
    """The report says what showed it, after how long and how many faults: of all rounds."""
    options = options_for(MUTANT, {"seed": 4, "workers": 2})
    assert (options.faults, options.seconds, options.workers, options.mutant) == ("kill", 20.0, 2, "sleeps")
    late = Anomaly("lost write", "check", 1, [])
    first = Anomaly("no progress", "the run", 1, [], found_s=9.0)

    def run(options: Options) -> Outcome:
        return round_of(options, late, first) if options.seed == 5 else round_of(options)

    hunted = hunt(MUTANT, options, run)
    assert [each.options.seed for each in hunted.rounds] == [4, 5]
    assert (hunted.anomaly, hunted.seconds, hunted.faults) == (first, 39.0, 3)
    shown = page(hunted.rounds[-1], hunted)
    assert "it sleeps (trap 5); “no progress” showed it, after 39 s, 3 faults." in shown
    assert document(hunted.rounds[-1], hunted)["mutant"]["caught_by"] == "no progress"
    assert hunts_table([hunted]).row_count == 1


def test_a_mutant_that_nobody_notices_is_given_up_after_some_rounds() -> None:
    hunted = hunt(MUTANT, options_for(MUTANT, {}), round_of)
    assert len(hunted.rounds) == MOST_ROUNDS
    assert hunted.anomaly is None
    assert "nobody noticed" in page(hunted.rounds[-1], hunted)
    with pytest.raises(ConfigurationError, match="--faults may name some"):
        options_for(Mutant("dreams", "", "some.py", "work()", "dream()"), {})
