"""What is looked at during the run and after it, in one list of anomalies, with the names that Jepsen gave them.

=================== ====================================================================================================
lost write          an event without its effect
duplicate           an event that took effect twice
aborted read        a record that a committed reader saw and that was taken back
torn leg            of one leg's ledger entry, result, credit, changelog and offset some, but not all
unseen              committed records that a reader, or the group, did not get although all was drained
wrong value         an output or a row that does not follow from the input
out of order        within a key
table ≠ changelog   balances, ledger, changelog and tables do not say the same
money moved         the sum of all balances, with the credits on their way, is not zero
no progress         events that lay still beyond a deadline
open transaction    last stable offset ≠ high watermark, at rest
lost silently       at most once lost more than it reported
worker ended        a worker that nobody ended did; or one that was asked to end did not, in time and with 0
=================== ====================================================================================================

What the agents promise, their own checks judge (`streams_app.registry.Check`); their findings come under these names, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streams_app.audit import Report
from streams_app.registry import Finding

#: Beginning of a finding's name to the anomaly; the first that fits.
_NAMES = (
    ("lost beyond", "lost silently"),
    ("no claim", "lost silently"),
    ("lost row", "table ≠ changelog"),
    ("lost debit", "torn leg"),
    ("lost credit", "torn leg"),
    ("lost entry", "torn leg"),
    ("lost", "lost write"),
    ("forgotten", "lost write"),
    ("gap", "lost write"),
    ("set aside", "lost write"),
    ("missing", "lost write"),
    ("repeated", "duplicate"),
    ("phantom count", "duplicate"),
    ("phantom row", "table ≠ changelog"),
    ("phantom", "torn leg"),
    ("wrong row", "table ≠ changelog"),
    ("wrong decision", "table ≠ changelog"),
    ("table differs", "table ≠ changelog"),
    ("store ahead", "aborted read"),
    ("aborted read", "aborted read"),
    ("unbalanced", "money moved"),
    ("overdrawn", "money moved"),
    ("wrong balance", "money moved"),
    ("wrong", "wrong value"),
    ("reordered", "out of order"),
    ("misplaced", "out of order"),
    ("unseen", "unseen"),
    ("open", "open transaction"),
    ("no progress", "no progress"),
    ("worker ended", "worker ended"),
)
_EXAMPLES = 5


@dataclass(frozen=True)
class Anomaly:
    """One kind, as one check found it."""

    name: str
    #: Which check, and its own word for it.
    found_by: str
    count: int
    examples: list[str]
    #: Under which guarantee; empty: of none in particular.
    guarantee: str = ""


def named(finding: str) -> str:
    """The anomaly that a finding is; its own name if it is none of ours."""
    return next((name for begins, name in _NAMES if finding.startswith(begins)), finding)


def of_findings(found_by: str, findings: Iterable[Finding], guarantee: str = "") -> list[Anomaly]:
    """Findings as anomalies."""
    return [
        Anomaly(named(each.anomaly), f"{found_by}: {each.anomaly}", each.count, each.examples[:_EXAMPLES], guarantee)
        for each in findings
    ]


def of_report(report: Report) -> list[Anomaly]:
    """What the audit found."""
    anomalies = [
        anomaly
        for section in report.sections
        for anomaly in of_findings(section.name, section.findings, section.guarantee)
    ]
    if not report.at_rest and not anomalies:
        anomalies.append(Anomaly("no progress", "audit: not at rest", 1, ["input is left, or a transaction is open"]))
    return anomalies
