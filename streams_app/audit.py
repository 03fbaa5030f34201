"""Whether every guarantee held: reads what was committed, and compares.

This part knows no agent. For each app it looks at what the engine promises to all of them:

=============== ====================================================================================================
unseen          committed input that the group has not consumed
open            a transaction that was begun and not ended, at rest
table differs   a store on this machine that is not the fold of its changelog up to the store's checkpoint
store ahead     a store whose checkpoint lies behind the end of its changelog: something uncommitted reached the disk
no claim        an at-most-once offset that does not say how many events its workers may have lost
missing         a topic that does not exist
truncated       a topic whose beginning was deleted: what it held cannot be judged any more
=============== ====================================================================================================

At most once promises nothing of its tables: rows of a store that differ from the changelog are a figure, not a finding.
Another figure is what the workers *report*: the most that may have been lost, as their offsets say (`claims.Claim`).

What the agents promise beyond that, their checks judge (`streams_app.registry.Check`), from the same committed records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka import admin as kafka_admin
from rich.table import Table as RichTable

from streams_app.claims import Claim
from streams_app.errors import KafkaUnreachable
from streams_app.kafka import KafkaAddress
from streams_app.offsets import metadata_of, offsets_at
from streams_app.registry import Check, Facts, Finding, Findings, Follower, Observed
from streams_app.settings import Settings
from streams_app.store import TIME_BYTES, local_stores, read_only_copy

TP: TypeAlias = tuple[str, int]

#: Clients want one; nothing is ever committed for it.
_GROUP = "streams-app-audit"

AT_MOST_ONCE = "at_most_once"

T = TypeVar("T")
_NOT_YET = frozenset(
    {
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
        # Said of a partition that is known to have no leader.
        KafkaError._UNKNOWN_PARTITION,
        # Just after a leader has moved.
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.KAFKA_STORAGE_ERROR,
    }
)

_REQUEST_TIMEOUT_S = 10.0
_NO_PROGRESS_S = 60.0
_CHUNK_RECORDS = 10_000
_POLL_S = 0.05
#: How often somebody who waits hears of the progress.
_PROGRESS_RECORDS = 50_000


class AuditedTable(NamedTuple):
    """A table; ``changelog`` is the whole name of the topic."""

    name: str
    changelog: str
    expires: bool


class AuditedApp(NamedTuple):
    """A consumer group, what it consumes (whole names of topics), its tables, and what it promises."""

    app_id: str
    inputs: Sequence[str]
    tables: Sequence[AuditedTable]
    guarantee: str = "exactly_once"


class Section(msgspec.Struct):
    """The verdict on one app, or of one check."""

    name: str
    figures: dict[str, Any]
    findings: list[Finding]
    #: Of the app, or of the app whose input the check looks at; empty: of none.
    guarantee: str = ""

    @property
    def held(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


class Report(msgspec.Struct):
    """The verdict."""

    sections: list[Section]
    #: Whether all input was consumed and no transaction open.
    at_rest: bool
    records: int
    seconds: float

    @property
    def held(self) -> bool:
        """Whether every guarantee held."""
        return all(section.held for section in self.sections)

    def guarantees(self) -> dict[str, dict[str, int | None]]:
        """What became of the events under each guarantee: ``lost``, ``repeated``, and ``reported`` at most once.

        ``lost`` and ``repeated`` are what the checks counted; None: no check counts it, so nobody knows.
        """
        by_guarantee: dict[str, list[dict[str, Any]]] = {}
        for section in self.sections:
            if section.guarantee:
                by_guarantee.setdefault(section.guarantee, []).append(section.figures)
        outcomes: dict[str, dict[str, int | None]] = {}
        for guarantee, figures in by_guarantee.items():
            outcomes[guarantee] = {name: _total(figures, name) for name in ("lost", "repeated")}
            if guarantee == AT_MOST_ONCE:
                # The app's own, which comes first: a check may show it again.
                outcomes[guarantee]["reported"] = _total(figures[:1], "reported")
        return outcomes

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        document: dict[str, Any] = {
            "held": self.held,
            "guarantees": self.guarantees(),
            **msgspec.to_builtins(self),
        }
        for plain, section in zip(document["sections"], self.sections, strict=True):
            plain["held"] = section.held
        return document

    def to_json(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self.document())

    def table(self) -> RichTable:
        """For people."""
        verdict = "every guarantee held" if self.held else "a guarantee did NOT hold, or cannot be judged"
        table = RichTable(title=f"{verdict} ({self.records} committed records read in {self.seconds:.1f} s)")
        for column in ("", "what", "how much", "for example"):
            table.add_column(column, overflow="fold")
        for section in self.sections:
            table.add_section()
            name = f"{section.name}\n{in_words(section.guarantee)}" if section.guarantee else section.name
            table.add_row(name, "held" if section.held else "[bold red]NOT held[/]", "", "")
            for name, figure in section.figures.items():
                table.add_row("", name, _figure(figure), "")
            for finding in section.findings:
                # Examples carry text of others; their brackets are no markup.
                examples = "\n".join(finding.examples).replace("[", r"\[")
                table.add_row("", f"[red]{finding.anomaly}[/]", str(finding.count), examples)
        return table


def _total(figures: Iterable[Mapping[str, Any]], name: str) -> int | None:
    """Sum of the figures of that name; None: there is none."""
    found = [int(each[name]) for each in figures if name in each]
    return sum(found) if found else None


def in_words(guarantee: str) -> str:
    """For people."""
    return guarantee.replace("_", " ")


#: Called now and then with what is going on: a topic's name, or a word, and the records read so far.
OnProgress: TypeAlias = Callable[[str, int], None]


def audited_family(app: Any) -> list[AuditedApp]:
    """What of a Faust app and its siblings is audited: those that have agents, wherever they run."""
    return [audited(each) for each in app.family if each.agents]


def audited(app: Any) -> AuditedApp:
    """What of one Faust app is audited."""
    topics = {name for agent in app.agents.values() for name in getattr(agent.channel, "topics", None) or ()}
    tables = (
        AuditedTable(table.name, table.changelog_topic_name, table.expires_s is not None)
        for table in app.tables.values()
    )
    return AuditedApp(app.conf.id, tuple(sorted(topics)), tuple(tables), app.guarantee)


def guarantee_of(check: type[Check] | type[Follower], apps: Iterable[AuditedApp], prefix: str) -> str:
    """That of the app which reads the first of its topics that any app reads; empty: none does."""
    readers = {topic: app.guarantee for app in apps for topic in app.inputs}
    return next((readers[prefix + topic] for topic in check.topics if prefix + topic in readers), "")


def audit(
    address: KafkaAddress,
    settings: Settings,
    apps: Sequence[AuditedApp],
    checks: Mapping[str, type[Check]],
    *,
    wait_s: float = 0.0,
    on_progress: OnProgress = lambda what, records: None,
) -> Report:
    """Read what was committed and judge it.

    Waits up to ``wait_s`` until all input is consumed and no transaction is open; then judges what there is.

    Raises:
        KafkaUnreachable: the brokers do not answer, or reading makes no progress.
    """
    started_s = time.monotonic()
    log = Log(address, on_progress)
    try:
        return _Audit(log, settings, apps, checks).run(started_s, wait_s)
    except KafkaException as error:
        raise KafkaUnreachable(f"the audit could not ask {address.servers}: {error.args[0].str()}") from error
    finally:
        log.close()


class _Audit:
    """One run."""

    def __init__(
        self, log: Log, settings: Settings, apps: Sequence[AuditedApp], checks: Mapping[str, type[Check]]
    ) -> None:
        self._log = log
        self._settings = settings
        self._apps = apps
        self._checks = checks
        self._partitions: Mapping[str, int] = {}

    def run(self, started_s: float, wait_s: float) -> Report:
        """Wait, read, judge."""
        self._partitions = self._log.partitions()
        at_rest = self._wait(started_s + wait_s)
        findings = {app.app_id: self._brokers(app) for app in self._apps}
        # Before the outputs are read: what is in hand now, and lost, is not lost without having been reported.
        claims = {app.app_id: self._claims(app, findings[app.app_id]) for app in self._apps}
        facts = Facts(self._settings, {}, at_rest, sum(figures.get("reported", 0) for figures in claims.values()))
        checks = {name: self._observed(cls, facts) for name, cls in self._checks.items()}
        sections = []
        for app in self._apps:
            figures = {"inputs": len(app.inputs), **self._tables(app, findings[app.app_id], checks.values())}
            figures |= claims[app.app_id]
            sections.append(Section(f"app {app.app_id}", figures, list(findings[app.app_id].list()), app.guarantee))
        for name, check in checks.items():
            check.finish()
            guarantee = guarantee_of(type(check), self._apps, self._settings.kafka_prefix)
            sections.append(Section(f"check {name}", check.figures, list(check.findings.list()), guarantee))
        return Report(sections, at_rest, self._log.records, time.monotonic() - started_s)

    def _wait(self, deadline_s: float) -> bool:
        """Wait for rest, and until nothing is in hand at most once either: what a dead worker has in hand stays."""
        while True:
            at_rest = self._is_at_rest()
            if (at_rest and not self._in_hand()) or time.monotonic() > deadline_s:
                return at_rest
            self._log.on_progress("waiting until all input is consumed", self._log.records)
            time.sleep(4 * _POLL_S)

    def _is_at_rest(self) -> bool:
        return not any(
            self._log.open_transactions(self._all(app)) or next(self._unseen(app), None) for app in self._apps
        )

    def _in_hand(self) -> bool:
        return any(self._claims(app, Findings()).get("in hand") for app in self._apps)

    def _all(self, app: AuditedApp) -> list[TP]:
        """Partitions of the app's inputs and changelogs, which every transaction of it touches."""
        return self._tps(*app.inputs, *(table.changelog for table in app.tables))

    def _tps(self, *topics: str) -> list[TP]:
        return [(topic, partition) for topic in topics for partition in range(self._partitions.get(topic, 0))]

    def _unseen(self, app: AuditedApp) -> Iterator[Message]:
        """Committed input behind the group's offsets."""
        inputs = self._tps(*app.inputs)
        if inputs:
            starts = {**self._log.beginnings(inputs), **self._log.committed(app.app_id, inputs)}
            yield from self._log.read(starts)

    def _brokers(self, app: AuditedApp) -> Findings:
        findings = Findings()
        for topic in (*app.inputs, *(table.changelog for table in app.tables)):
            if topic not in self._partitions:
                findings.add("missing", f"topic {topic} does not exist; `faust -A streams_app provision` creates it")
        for topic, partition in self._log.open_transactions(self._all(app)):
            findings.add("open", f"{topic}[{partition}] has a transaction that has not ended")
        for message in self._unseen(app):
            where = f"{message.topic()}[{message.partition()}]@{message.offset()}"
            findings.add("unseen", f"{where} is not consumed; does a worker run?")
        return findings

    def _claims(self, app: AuditedApp, findings: Findings) -> dict[str, int]:
        """What an at-most-once app says of its losses, as figures; of the others nothing."""
        if app.guarantee != AT_MOST_ONCE:
            return {}
        reported = in_hand = 0
        for (topic, partition), (offset, metadata) in self._log.metadata(app.app_id, self._tps(*app.inputs)).items():
            claim = Claim.parse(metadata)
            if claim is None:
                where = f"{topic}[{partition}]@{offset}"
                findings.add("no claim", f"{where} does not say what may have been lost: {metadata!r}")
            else:
                reported += claim.reported(offset)
                in_hand += max(0, offset - claim.began)
        return {"reported": reported, "in hand": in_hand}

    def _observed(self, cls: type[Check], facts: Facts) -> Check:
        """A check that has seen all of its topics."""
        prefix = self._settings.kafka_prefix
        partitions = {
            topic: self._partitions[prefix + topic] for topic in cls.topics if prefix + topic in self._partitions
        }
        check = cls(facts._replace(partitions=partitions))
        for topic in cls.topics:
            if topic not in partitions:
                check.findings.add("missing", f"topic {prefix + topic} does not exist; nothing of it can be judged")
                continue
            tps = self._tps(prefix + topic)
            for message in self._log.read(self._log.beginnings(tps)):
                check.observe(observed(topic, message))
            # Asked afterwards: retention may have deleted what was about to be read.
            for (_, partition), start in self._log.beginnings(tps).items():
                if start > 0:
                    text = f"{prefix + topic}[{partition}] begins at {start}: what was before cannot be judged any more"
                    check.findings.add("truncated", text)
        return check

    def _tables(self, app: AuditedApp, findings: Findings, checks: Iterable[Check]) -> dict[str, int]:
        """Judge the app's tables; gives their figures."""
        best_effort = app.guarantee == AT_MOST_ONCE
        differing = Findings() if best_effort else findings
        rows = sum(self._table(app, table, differing, checks) for table in app.tables)
        figures = {"tables": len(app.tables), "rows": rows}
        if best_effort:
            figures["rows that differ"] = sum(each.count for each in differing.list())
        return figures

    def _table(self, app: AuditedApp, table: AuditedTable, findings: Findings, checks: Iterable[Check]) -> int:
        """Compare a table's stores with its changelog, and show its rows to the checks; gives the number of rows."""
        paths: dict[int, list[Path]] = {}
        for name, partition, path in local_stores(self._settings.datadir, app.app_id):
            if name == table.name:
                paths.setdefault(partition, []).append(path)
        wanting = [check for check in checks if table.name in check.tables]
        rows = 0
        for tp in self._tps(table.changelog):
            # The copies first: the changelog that is read afterwards is not older than any of them.
            copies = [StoreCopy(path, *read_only_copy(path)) for path in paths.get(tp[1], ())]
            fold = compare(copies, self._changes(tp, table), self._log.ends([tp])[tp], findings)
            rows += len(fold)
            skip = TIME_BYTES if table.expires else 0
            for check in wanting:
                for key, value in fold.items():
                    check.row(table.name, tp[1], key, value[skip:])
        return rows

    def _changes(self, tp: TP, table: AuditedTable) -> Iterator[Change]:
        for message in self._log.read(self._log.beginnings([tp])):
            value = message.value()
            if value is not None and table.expires:
                # The store keeps the time of a value that expires in front of it; the changelog in the timestamp.
                value = message.timestamp()[1].to_bytes(TIME_BYTES) + value
            yield Change(_offset(message), message.key() or b"", value)


class StoreCopy(NamedTuple):
    """What a store on this machine holds."""

    path: Path
    #: Last changelog offset that it stands for; None: none.
    checkpoint: int | None
    values: Mapping[bytes, bytes]


class Change(NamedTuple):
    """A committed changelog record, its value in the form of the store."""

    offset: int
    key: bytes
    value: bytes | None


def compare(copies: Iterable[StoreCopy], changes: Iterable[Change], end: int, findings: Findings) -> dict[bytes, bytes]:
    """Fold the changes of one partition, and compare each store with the fold up to the store's checkpoint.

    ``end`` is the offset behind the last record of the changelog. Compaction takes earlier records of a key for a later
    one's sake: a value whose record is gone is excused if a later record of the key lies beyond the checkpoint.

    Returns:
        the fold of all changes.
    """
    waiting = sorted(copies, key=_checkpoint)
    fold: dict[bytes, bytes] = {}
    #: Keys without a record, to be excused by a later one.
    suspects: dict[bytes, Path] = {}
    for change in changes:
        while waiting and _checkpoint(waiting[0]) < change.offset:
            suspects |= _differences(waiting.pop(0), fold, findings)
        suspects.pop(change.key, None)
        if change.value is None:
            fold.pop(change.key, None)
        else:
            fold[change.key] = change.value
    for copy in waiting:
        if _checkpoint(copy) >= end:
            findings.add("store ahead", f"{copy.path} stands for {copy.checkpoint}, its changelog ends at {end}")
        suspects |= _differences(copy, fold, findings)
    for key, path in suspects.items():
        findings.add("table differs", f"{path}: {key!r} is not in the changelog")
    return fold


def _checkpoint(copy: StoreCopy) -> int:
    return -1 if copy.checkpoint is None else copy.checkpoint


def _differences(copy: StoreCopy, fold: Mapping[bytes, bytes], findings: Findings) -> dict[bytes, Path]:
    suspects = {}
    for key, value in copy.values.items():
        expected = fold.get(key)
        if expected is None:
            suspects[key] = copy.path
        elif value != expected:
            findings.add("table differs", f"{copy.path}: {key!r} is {value!r}, in the changelog {expected!r}")
    for key in fold.keys() - copy.values.keys():
        findings.add("table differs", f"{copy.path}: {key!r} is missing, in the changelog {fold[key]!r}")
    return suspects


class Log:
    """Committed records, and what the brokers say about offsets. All calls block, each with a deadline."""

    def __init__(
        self,
        address: KafkaAddress,
        on_progress: OnProgress = lambda what, records: None,
        request_timeout_s: float = _REQUEST_TIMEOUT_S,
    ) -> None:
        self._request_timeout_s = request_timeout_s
        config = self._config = {**address.librdkafka(), "log_level": 0}
        self.on_progress = on_progress
        #: Records read so far.
        self.records = 0
        self._admin = kafka_admin.AdminClient(config)
        #: For the offsets of groups; they never join them. Not the admin client: in librdkafka 2.16 a broker that answers
        #: it "not the coordinator", as one does that has just been started, crashes the process (measured).
        self._groups: dict[str, Consumer] = {}
        self._consumer = Consumer(
            {
                **config,
                "group.id": _GROUP,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                # Retention may delete the beginning while we read: `_Audit` compares the beginnings afterwards.
                "auto.offset.reset": "earliest",
                # The end of a partition is reported after an empty answer: the default has the broker wait 500 ms with it.
                "fetch.wait.max.ms": 20,
                "fetch.queue.backoff.ms": 20,
            }
        )

    def close(self) -> None:
        """Give the connections back."""
        for consumer in (self._consumer, *self._groups.values()):
            consumer.close()

    def partitions(self) -> dict[str, int]:
        """All topics with their numbers of partitions."""
        topics = self._admin.list_topics(timeout=self._request_timeout_s).topics
        return {name: len(topic.partitions) for name, topic in topics.items()}

    def beginnings(self, tps: Iterable[TP]) -> dict[TP, int]:
        """First offset that each partition still has."""
        return self._offsets(self._unstable(_GROUP), tps, OFFSET_BEGINNING)

    def ends(self, tps: Iterable[TP]) -> dict[TP, int]:
        """Offset behind the last record of each partition, open transactions included."""
        return self._offsets(self._unstable(_GROUP), tps, OFFSET_END)

    def stable_ends(self, tps: Iterable[TP]) -> dict[TP, int]:
        """Offset of the first record of an open transaction; without one, the end."""
        return self._offsets(self._consumer, tps, OFFSET_END)

    def open_transactions(self, tps: Sequence[TP]) -> list[TP]:
        """Partitions in which a transaction is open."""
        if not tps:
            return []
        # The stable ends last: a transaction that ends in between is not taken for an open one.
        ends = self.ends(tps)
        stable = self.stable_ends(tps)
        return [tp for tp in tps if stable[tp] < ends[tp]]

    def _offsets(self, reader: Consumer, tps: Iterable[TP], where: int) -> dict[TP, int]:
        asked = list(tps)
        return self._patiently(lambda: self._found(reader, asked, where))

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again for a while: what was just created, or moved, takes a moment to have its leader or coordinator."""
        deadline_s = time.monotonic() + self._request_timeout_s
        while True:
            try:
                return ask()
            except KafkaException as error:
                if error.args[0].code() not in _NOT_YET or time.monotonic() > deadline_s:
                    raise
            time.sleep(_POLL_S)

    def _found(self, reader: Consumer, tps: Iterable[TP], where: int) -> dict[TP, int]:
        try:
            found, unknown = offsets_at(reader, tps, where, self._request_timeout_s)
        except KafkaException:
            # Or it would believe for minutes that there is no leader.
            reader.list_topics(timeout=self._request_timeout_s)
            raise
        for error in unknown.values():
            raise KafkaException(error)
        return found

    def _unstable(self, group: str) -> Consumer:
        if group not in self._groups:
            unstable = {"isolation.level": "read_uncommitted", "enable.auto.commit": False}
            self._groups[group] = Consumer({**self._config, **unstable, "group.id": group})
        return self._groups[group]

    def committed(self, group: str, tps: Iterable[TP]) -> dict[TP, int]:
        """The group's committed offsets; partitions without one are missing."""
        return {tp: offset for tp, (offset, _) in self.metadata(group, tps).items()}

    def metadata(self, group: str, tps: Iterable[TP]) -> dict[TP, tuple[int, str]]:
        """The group's committed offsets, each with the text that was committed along; those without one are missing."""
        asked = [TopicPartition(*tp) for tp in tps]
        if not asked:
            return {}
        ask = partial(self._unstable(group).committed, asked, timeout=self._request_timeout_s)
        answer = self._patiently(ask)
        return {(each.topic, each.partition): (each.offset, metadata_of(each)) for each in answer if each.offset >= 0}

    def read(self, starts: Mapping[TP, int]) -> Iterator[Message]:
        """The committed records from ``starts`` up to the stable ends as they are now; each partition by offset.

        Transaction markers take offsets too, so "the last record is the one before the end" may never come true: a
        partition is through when the client reports its end, or when a record at or behind the stable end comes.

        Raises:
            KafkaUnreachable: no progress within the deadline.
            KafkaException: a partition cannot be read.
        """
        ends = self.stable_ends(starts)
        reading = {tp for tp, start in starts.items() if start < ends[tp]}
        if not reading:
            return
        positions = {tp: starts[tp] for tp in reading}
        self._consumer.assign([TopicPartition(*tp, starts[tp]) for tp in reading])
        deadline_s = time.monotonic() + _NO_PROGRESS_S
        while reading:
            messages = self._consumer.consume(_CHUNK_RECORDS, _POLL_S)
            if messages:
                deadline_s = time.monotonic() + _NO_PROGRESS_S
            elif time.monotonic() > deadline_s:
                raise KafkaUnreachable(f"reading {sorted(reading)} made no progress for {_NO_PROGRESS_S:g} s")
            for message in messages:
                tp = (str(message.topic()), int(message.partition() or 0))
                if tp not in reading:
                    continue
                at_end = _is_end(message)
                if not at_end and positions[tp] <= _offset(message) < ends[tp]:
                    positions[tp] = _offset(message) + 1
                    self._count(tp[0])
                    yield message
                if at_end or _offset(message) + 1 >= ends[tp]:
                    reading.discard(tp)
                    self._consumer.incremental_unassign([TopicPartition(*tp)])

    def _count(self, topic: str) -> None:
        self.records += 1
        if self.records % _PROGRESS_RECORDS == 0:
            self.on_progress(topic, self.records)


def _is_end(message: Message) -> bool:
    """Whether it is the report of a partition's end instead of a record."""
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._PARTITION_EOF:
        return True
    raise KafkaException(error)


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:
        raise AssertionError("a record that was read has an offset")
    return offset


def observed(topic: str, message: Message) -> Observed:
    """A record as the checks see it; ``topic`` without prefix."""
    headers: dict[str, bytes] = dict(cast("list[tuple[str, bytes]]", message.headers() or []))
    timestamp_ms = message.timestamp()[1]
    return Observed(
        topic, int(message.partition() or 0), _offset(message), message.key(), message.value(), timestamp_ms, headers
    )


def _figure(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return ", ".join(f"{name} {amount}" for name, amount in figure.items()) or "none"
    return str(figure)
