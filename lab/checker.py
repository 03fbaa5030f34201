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

What the agents promise, their own checks and followers judge (`streams_app.registry`); their findings come under these
names, too. During the run look the supervisor, a reader, and the followers; at its end the audit looks at everything. What
was seen by both is told once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

from lab.follow import LiveFollowers
from lab.live import LiveReader
from lab.workload import Workload
from streams_app.audit import TP, Log, Report, audit
from streams_app.follow import Anomaly as Followed
from streams_app.follow import Auditor
from streams_app.kafka import KafkaAddress
from streams_app.registry import Finding, Findings, followers
from streams_app.settings import Settings

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
    ("vanished", "money moved"),
    ("appeared", "money moved"),
    ("torn", "torn leg"),
    ("unseen", "unseen"),
    ("open", "open transaction"),
    ("no progress", "no progress"),
    ("worker ended", "worker ended"),
)
_EXAMPLES = 5
#: All has to be consumed, and judged, within this time after the last input.
DRAIN_TIMEOUT_S = 120.0
#: A dead worker's transaction is ended by its successor, or else by the broker, which looks for such every 10 s.
_END_TIMEOUT_S = 40.0
_POLL_S = 0.5


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
    #: Seconds since the input began when it was first seen; None: it was found by the audit at the end.
    found_s: float | None = None


class Sightings(Findings):
    """Findings, each with the time of its first, in seconds since the input began."""

    def __init__(self, since: Callable[[], float]) -> None:
        super().__init__()
        self._since = since
        self.first_s: dict[str, float] = {}

    def add(self, anomaly: str, example: str, count: int = 1) -> None:
        """See `Findings.add`."""
        self.first_s.setdefault(anomaly, self._since())
        super().add(anomaly, example, count)


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


def of_sightings(found_by: str, sightings: Sightings, guarantee: str = "") -> list[Anomaly]:
    """What was seen during the run, as anomalies."""
    findings = sightings.list()
    anomalies = of_findings(found_by, findings, guarantee)
    return [
        replace(anomaly, found_s=sightings.first_s[finding.anomaly])
        for finding, anomaly in zip(findings, anomalies, strict=True)
    ]


def told_once(seen: Iterable[Anomaly], audited: Iterable[Anomaly]) -> list[Anomaly]:
    """What was seen during the run and what the audit found: of one name, the audit has the whole, and gets the time."""
    merged, left = [], list(seen)
    for anomaly in audited:
        same = [each for each in seen if (each.name, each.guarantee) == (anomaly.name, anomaly.guarantee)]
        left = [each for each in left if each not in same]
        times_s = [each.found_s for each in same if each.found_s is not None]
        merged.append(replace(anomaly, found_s=min(times_s, default=anomaly.found_s)))
    return merged + left


class Checker:
    """All that looks at one run."""

    def __init__(
        self, address: KafkaAddress, settings: Settings, workload: Workload, log: Log, since: Callable[[], float]
    ) -> None:
        """``since`` gives the seconds since the input began."""
        self._address, self._settings, self._workload = address, settings, workload
        self._log = log
        self._since = since
        #: What the supervisor sees.
        self.run = Sightings(since)
        self._read = Sightings(since)
        self._followed: dict[str, Sightings] = {}
        self._working: list[Future[None]] = []

    def start(self, threads: Executor) -> None:
        """Begin to look; all topics are there."""
        self._reader = LiveReader(self._address, self._outputs(), self._read)
        self._reader.start()
        partitions, prefix = self._log.partitions(), self._settings.kafka_prefix
        following = {
            name: each
            for name, each in followers().items()
            if all(prefix + topic in partitions for topic in each.topics)
        }
        self._followed = {name: Sightings(self._since) for name in following}
        auditor = Auditor(self._address, self._settings, self._workload.apps, following, "lab")
        self._followers = LiveFollowers(auditor, following, self._on_finding)
        self._working.append(threads.submit(self._followers.run))

    def close(self) -> None:
        """Look no more."""
        self._followers.stop()
        self._reader.close()

    def look(self) -> None:
        """Raise what ended one of those that look."""
        for each in self._working:
            if each.done():
                each.result()

    def _on_finding(self, name: str, found: Followed) -> None:
        self._followed[name].add(found.anomaly, found.text)

    def seen(self) -> list[Anomaly]:
        """What was found so far."""
        return [
            *of_sightings("the run", self.run),
            *of_sightings("the reader", self._read),
            *(
                anomaly
                for name, sightings in self._followed.items()
                for anomaly in of_sightings(f"follower {name}", sightings, self._guarantee_of(name))
            ),
        ]

    def _guarantee_of(self, follower: str) -> str:
        """That of the app which reads one of the follower's topics; empty: none does."""
        topics = {self._settings.kafka_prefix + topic for topic in followers()[follower].topics}
        return next((app.guarantee for app in self._workload.apps if topics & {*app.inputs}), "")

    def judge(self) -> tuple[Report, list[Anomaly]]:
        """Look at everything, now that the workers are at rest."""
        settings, workload = self._settings, self._workload
        report = audit(self._address, settings, workload.apps, workload.checks, wait_s=DRAIN_TIMEOUT_S)
        for name in self._followers.judge_all(DRAIN_TIMEOUT_S):
            self.run.add("unseen", f"the follower {name} did not come to the end of its topics")
        tps = self._outputs()
        # Inputs and changelogs are the audit's.
        changelogs = {table.changelog for app in workload.apps for table in app.tables}
        for topic, partition in self._open([tp for tp in tps if tp[0] not in changelogs]):
            self.run.add("open", f"{topic}[{partition}] has a transaction that has not ended")
        self._reader.read_to(self._log.stable_ends(tps), DRAIN_TIMEOUT_S)
        for tp in tps:
            self._reader.seen.compare(tp, self._log.read({tp: 0}))
        return report, told_once(self.seen(), of_report(report))

    def _open(self, tps: Sequence[TP]) -> list[TP]:
        """Partitions whose last stable offset stays below their high watermark, though nothing is left to do."""
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while (tps := self._log.open_transactions(tps)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        return list(tps)

    def _outputs(self) -> list[TP]:
        """All topics of the run, changelogs too, with their partitions."""
        prefix = self._settings.kafka_prefix
        inputs = {topic for app in self._workload.apps for topic in app.inputs}
        return [
            (topic, partition)
            for topic, count in self._log.partitions().items()
            for partition in range(count)
            if topic.startswith(prefix) and not topic.startswith("__") and topic not in inputs
        ]
