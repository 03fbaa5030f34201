"""The fault lab: what of it can be judged without a cluster; and one run, on one."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lab.checker import named, of_findings
from lab.faults import FAULTS
from lab.live import Seen
from lab.logs import lines_around
from lab.progress import Progress, Recovery
from lab.report import document, page, recoveries
from lab.run import Options, Outcome, Strike
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
    seen = Seen()
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
