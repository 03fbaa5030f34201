"""``audit --follow``: judges committed records as they come, for ever, in bounded memory.

This part knows no agent. It reads for the followers that agents registered (`streams_app.registry.Follower`), keeps what they
remember, and watches the apps::

    ask offsets ──> read in chunks ──> every position at the ends asked for? ──> cut: judge ──> ask offsets …
                     └> observe, then write memory, positions and anomalies in one piece ─> say the anomalies

**What a cut relies on.** All records of a transaction are in the logs before the first of them becomes visible: its producer
ends it after all were acknowledged. So whoever has seen one part, and only then asks for the high watermarks, finds every
other part below them; and who reads committed records up to them has waited for every transaction open there. A part that is
missing then does not exist. (While a transaction hangs, what needs a cut waits; the age of the cut says so.) In the same way,
offsets that were asked before the high watermarks are those of transactions whose records are below them. Neither needs a
clock, nor a guess how long a transaction may take.

**Restarts.** A chunk's writes, its anomalies and the positions behind it are one atomic, logged write: killed at any moment,
it goes on exactly where it was. An anomaly is said after it was written, then marked as said: one that was being said in the
moment of a ``kill -9`` may be said again, under the same number; its count is right.

What it finds of the apps themselves:

====== =============================================================================================================
open   a transaction that has been open for longer than its time-out and the broker's scan permit: nobody who reads
       committed records gets past it
gap    records were deleted, or their topic was replaced, before they were judged; it begins anew behind them
====== =============================================================================================================

Memory (of this module): one chunk of at most `_CHUNK_RECORDS` records, about as many that wait for slower partitions,
`_QUEUE_KILOBYTES` of fetched ones for each follower, the block cache of the stores, and two write buffers for each follower.
All else is on disk, below ``STREAMS_APP_DATADIR/audit/<app>/<follower>``; delete that folder to begin anew.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from rocksdict import BlockBasedIndexType, BlockBasedOptions, Options, Rdict, WriteBatch

from streams_app.audit import AT_MOST_ONCE, TP, AuditedApp, Log
from streams_app.claims import Claim
from streams_app.errors import ConfigurationError, KafkaUnreachable
from streams_app.kafka import KafkaAddress
from streams_app.offsets import Offsets
from streams_app.registry import Cut, Followed, Follower, Observed
from streams_app.settings import Settings
from streams_app.store import BLOCK_CACHE, scan

#: At most so many records are in hand, and an anomaly is said at most so long after it was read.
_CHUNK_RECORDS, _CHUNK_S = 10_000, 0.5
_QUEUE_KILOBYTES = 16 * 1024
#: A cut costs two requests to each broker.
_CUT_EVERY_S = 1.0
_WATCH_EVERY_S = 2.0
_NO_PROGRESS_S = 20.0
#: Far behind, partitions are read at one pace by the time of their records, or parts of transactions pile up.
_AHEAD_MS = 1_000
_LIVE_MS, _APART_S = 10_000, 5.0
#: For the same reason: of each partition in turn a little.
_FETCH_BYTES = 128 * 1024
#: The broker looks for transactions that are past their time-out every 10 s, and ends them one by one.
_OPEN_SLACK_S = 30.0
#: Parts of one transaction differ at most so much in their times, as does a clock from another.
_HORIZON_SLACK_MS = 60_000
#: A flood is cut short: so many are said of one kind in one chunk, and so many are kept on disk. All are counted.
_SAID_AT_ONCE = 20
_KEPT_ANOMALIES = 1_000
_RECENT = 5
_RATE_WINDOW_S = 5.0
_WRITE_BUFFER_BYTES = 16 * 1024 * 1024

_META, _SAID, _ANOMALY, _OWN = b"\0m", b"\0s", b"\0a", b"k"
_AFTER_OWN = b"l"
_NO_HEADERS: Mapping[str, bytes] = {}

#: Anomalies that are found of any app: a transaction that stays open, by `Watch`, and records that are gone.
OPEN, GAP = "open", "gap"
#: Whose the findings of `Watch` are, where others are a follower's.
APPS = "apps"

#: What is left of trouble with the brokers: they may come back.
UNREACHABLE = (KafkaException, KafkaUnreachable, TimeoutError)


class Anomaly(msgspec.Struct):
    """Something that is not as it must be."""

    #: Counts up from 1 in what one follower says, so that one said twice can be told from two.
    number: int
    anomaly: str
    text: str
    #: When it was found.
    at_ms: int


class Meta(msgspec.Struct):
    """Where a follower stands; written with each chunk."""

    #: Topic (whole name), partition, next offset to read.
    positions: list[tuple[str, int, int]] = []
    #: The same at the beginning.
    starts: list[tuple[str, int, int]] = []
    topic_ids: dict[str, str] = {}
    cut: int = 0
    horizon_ms: int = 0
    #: Partitions whose beginning was deleted and of which nothing has been read yet.
    unread: list[tuple[str, int]] = []
    records: int = 0
    number: int = 0
    anomalies: dict[str, int] = {}


class DiskMemory:
    """A `registry.Memory` on disk; what was put is kept aside until `commit`.

    Raises:
        ConfigurationError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = Rdict(str(path), options=_options())
        except Exception as error:  # rocksdict raises nothing narrower
            if "lock" not in str(error).lower():
                raise
            raise ConfigurationError(f"{path} is in use: another `audit --follow` runs on this machine") from error
        stored = self._db.get(_META)
        self.meta = msgspec.json.decode(stored, type=Meta) if stored else Meta()
        said = self._db.get(_SAID)
        self._said = int(said) if said else 0
        self._writes: dict[bytes, bytes | None] = {}
        self._drops: list[tuple[bytes, bytes]] = []
        self._found: list[Anomaly] = []
        self._found_now: Counter[str] = Counter()
        #: The latest ones.
        self.recent = deque(self._kept(self.meta.number - _RECENT), maxlen=_RECENT)

    @property
    def cut(self) -> int:
        """Number of the latest cut that was begun."""
        return self.meta.cut

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """See `registry.Memory`."""
        writes, found, asked = self._writes, {}, []
        for key in keys:
            if key not in writes:
                asked.append(_OWN + key)
            elif (value := writes[key]) is not None:
                found[key] = value
        if asked:
            values: Any = self._db.get(cast(Any, asked))
            for key, value in zip(asked, values, strict=True):
                if value is not None:
                    found[key[1:]] = value
        return found

    def put(self, key: bytes, value: bytes | None) -> None:
        """See `registry.Memory`."""
        self._writes[key] = value

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See `registry.Memory`."""
        for key, value in scan(self._db, _OWN + start, _OWN + end):
            yield key[1:], value

    def drop(self, start: bytes, end: bytes) -> None:
        """See `registry.Memory`."""
        self._drops.append((_OWN + start, _OWN + end))

    def report(self, anomaly: str, text: str) -> None:
        """See `registry.Memory`."""
        counts = self.meta.anomalies
        counts[anomaly] = counts.get(anomaly, 0) + 1
        self._found_now[anomaly] += 1
        if self._found_now[anomaly] <= _SAID_AT_ONCE:
            self._say(anomaly, text)

    def _say(self, anomaly: str, text: str) -> None:
        self.meta.number += 1
        self._found.append(Anomaly(self.meta.number, anomaly, text, int(time.time() * 1000)))

    def forget(self) -> None:
        """Delete all that the follower put, with the next commit; what was reported stays."""
        self._writes.clear()
        self._drops.append((_OWN, _AFTER_OWN))

    def commit(self) -> None:
        """Everything since the last commit, in one atomic, logged write."""
        for anomaly, count in self._found_now.items():
            if count > _SAID_AT_ONCE:
                self._say(anomaly, f"… and {count - _SAID_AT_ONCE} more at once, not said one by one")
        batch = WriteBatch(raw_mode=True)
        for start, end in self._drops:
            batch.delete_range(start, end)
        put, delete = batch.put, batch.delete
        for key, value in self._writes.items():
            if value is None:
                delete(_OWN + key)
            else:
                put(_OWN + key, value)
        for each in self._found:
            put(_numbered(each.number), msgspec.json.encode(each))
            delete(_numbered(each.number - _KEPT_ANOMALIES))
        put(_META, msgspec.json.encode(self.meta))
        self._db.write(batch)
        self.recent.extend(self._found)
        self._writes, self._drops, self._found = {}, [], []
        self._found_now.clear()

    def unsaid(self) -> list[Anomaly]:
        """What was committed and not marked as said."""
        return self._kept(self._said) if self._said < self.meta.number else []

    def said(self) -> None:
        """Mark all as said."""
        if self._said < self.meta.number:
            self._said = self.meta.number
            self._db.put(_SAID, b"%d" % self._said)

    def close(self) -> None:
        """Give the files back."""
        self._db.close()

    def _kept(self, number: int) -> list[Anomaly]:
        """Those above ``number``."""
        found = scan(self._db, _numbered(number + 1), _numbered(self.meta.number + 1))
        return [msgspec.json.decode(value, type=Anomaly) for _, value in found]


def _numbered(number: int) -> bytes:
    return _ANOMALY + max(0, number).to_bytes(8)


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1024 * 1024)
    table = BlockBasedOptions()
    table.set_block_cache(BLOCK_CACHE)
    # Most keys that are asked for are not there. Filters grow with the data, so they live in the cache, in small pieces.
    table.set_bloom_filter(10, False)
    table.set_index_type(BlockBasedIndexType.two_level_index_search())
    table.set_partition_filters(True)
    table.set_cache_index_and_filter_blocks(True)
    options.set_block_based_table_factory(table)
    return options


class Gap(Exception):
    """Records that were to be read next do not exist any more."""


class Reader:
    """Committed records of some topics in chunks, from given positions, all partitions at about the same time."""

    def __init__(self, address: KafkaAddress, topics: Mapping[str, str], positions: Mapping[TP, int]) -> None:
        """``topics`` gives whole names to those without prefix."""
        self._topics = topics
        #: Next offset to hand out: behind the last record, or behind all there is, transaction markers included.
        self.positions = dict(positions)
        #: Read and not handed out, by partition; newest time of each partition; ends of those that have no more for now.
        self._held: dict[TP, list[Observed]] = {tp: [] for tp in positions}
        self._newest_ms: dict[TP, int] = dict.fromkeys(positions, 0)
        self._ends: dict[TP, int] = {}
        self._paused: set[TP] = set()
        #: When nobody waited for the slowest partition the last time.
        self._together_s = time.monotonic()
        self._consumer = Consumer(
            {
                **address.librdkafka(),
                "log_level": 0,
                "group.id": "streams-app-audit",  # the client wants one; nothing is ever committed for it
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "queued.max.messages.kbytes": _QUEUE_KILOBYTES,
                "fetch.message.max.bytes": _FETCH_BYTES,
                "fetch.wait.max.ms": 250,
                "fetch.min.bytes": 32_768,
                "fetch.queue.backoff.ms": 50,
            }
        )
        self._consumer.assign([TopicPartition(*tp, offset) for tp, offset in positions.items()])

    def chunk(self, wait_s: float) -> list[Observed]:
        """What came within ``wait_s``; each partition by offset.

        Raises:
            Gap: a position lies before the first record that there is, or behind the last.
            KafkaException: a partition cannot be read.
        """
        topics, held, newest_ms, ends = self._topics, self._held, self._newest_ms, self._ends
        messages: Any = self._consumer.consume(_CHUNK_RECORDS, wait_s)
        for message in messages:
            if message.error() is not None:
                if message.error().code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    continue  # an ACL forbids the name that stands for a group, of which nothing is asked
                tp, end = _end(message)
                ends[tp] = end
                continue
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            timestamp_ms = message.timestamp()[1]
            tp = topic, partition
            if tp in ends:
                del ends[tp]
            newest_ms[tp] = max(newest_ms[tp], timestamp_ms)
            headers = message.headers()
            key, value = message.key(), message.value()
            named = dict(headers) if headers else _NO_HEADERS
            held[tp].append(Observed(topics[topic], partition, offset, key, value, timestamp_ms, named))
        slowest_ms = self._slowest_ms()
        self._pace(slowest_ms)
        return self._ripe(slowest_ms)

    def _slowest_ms(self) -> int | None:
        """The time up to which the slowest partition is read, of those not at their ends; None: nobody waits for it.

        Nobody does near the present, where clocks that differ would say more than progress, nor for ever.
        """
        slowest_ms = min((each for tp, each in self._newest_ms.items() if tp not in self._ends), default=None)
        now_s = time.monotonic()
        live = slowest_ms is not None and slowest_ms > time.time() * 1000 - _LIVE_MS
        if slowest_ms is None or live or now_s - self._together_s > _APART_S:
            self._together_s = now_s
            return None
        return slowest_ms

    def _ripe(self, slowest_ms: int | None) -> list[Observed]:
        """What is not newer than the slowest partition: parts of a transaction then come in one chunk, as a rule."""
        records: list[Observed] = []
        for tp, held in self._held.items():
            ripe = held
            if slowest_ms is not None and self._newest_ms[tp] > slowest_ms:
                ripe = list(takewhile(lambda record: record.timestamp_ms <= slowest_ms, held))
            if ripe:
                records += ripe
                self.positions[tp] = ripe[-1].offset + 1
                self._held[tp] = held[len(ripe) :]
            if not self._held[tp] and tp in self._ends:
                self.positions[tp] = self._ends[tp]
        return records

    def _pace(self, slowest_ms: int | None) -> None:
        """Hold back partitions far ahead of the slowest one; those that are read to their ends do not count."""
        ahead: set[TP] = set()
        if slowest_ms is not None:
            ahead = {tp for tp, newest_ms in self._newest_ms.items() if newest_ms > slowest_ms + _AHEAD_MS}
        if pause := ahead - self._paused:
            self._consumer.pause([TopicPartition(*tp) for tp in pause])
        if resume := self._paused - ahead:
            self._consumer.resume([TopicPartition(*tp) for tp in resume])
        self._paused = ahead

    def close(self) -> None:
        """Give the connections back."""
        self._consumer.close()


def _end(message: Message) -> tuple[TP, int]:
    """The partition that has no more for now, and the offset at which it ends.

    Raises:
        Gap, KafkaException: it is another report than that.
    """
    error, topic, partition, offset = message.error(), message.topic(), message.partition(), message.offset()
    if error is None or topic is None or partition is None or offset is None:
        raise KafkaException(error)
    if error.code() == KafkaError._PARTITION_EOF:
        return (topic, partition), offset
    if error.code() in {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}:
        raise Gap(f"{topic}[{partition}]: what was to be judged next does not exist any more: {error.str()}")
    raise KafkaException(error)


class Following:
    """One follower at work: reading, cuts, memory."""

    def __init__(
        self,
        name: str,
        cls: type[Follower],
        address: KafkaAddress,
        settings: Settings,
        apps: Sequence[AuditedApp],
        folder: Path,
    ) -> None:
        self.name = name
        self._cls = cls
        self._address = address
        self._settings = settings
        self._topics = {settings.kafka_prefix + topic: topic for topic in cls.topics}
        #: Whole name of an input that it reads to the group that consumes it.
        self._groups = {topic: app.app_id for app in apps for topic in app.inputs if topic in self._topics}
        self.memory = DiskMemory(folder / name)
        self.follower: Follower | None = None
        self._reader: Reader | None = None
        #: The cut in progress: the ends to reach, and the offsets asked before them.
        self._ends: dict[TP, int] | None = None
        self._committed: dict[TP, int] = {}
        self._asked_s = 0.0
        #: When there was progress; beginning to read is some.
        self._moved_s = 0.0
        #: When the latest cut that was reached was asked for; None: none was reached yet.
        self.reached_s: float | None = None
        #: For people: why nothing is judged, or from where on.
        self.remark = ""

    def step(self, log: Log, wait_s: float) -> None:
        """Read and judge what comes within ``wait_s``.

        Raises:
            one of `UNREACHABLE`.
        """
        if self._reader is None and not self._open(log):
            time.sleep(wait_s)
            return
        assert self._reader is not None
        assert self.follower is not None
        if self._ends is None and time.monotonic() - self._asked_s >= _CUT_EVERY_S:
            self._ask(log)
        try:
            records = self._reader.chunk(wait_s)
        except Gap as gap:
            self._begin_anew(log, str(gap))
            return
        except KafkaException:
            # What was read of the chunk is gone with it: go on from what was committed.
            self.close_reader()
            raise
        if records:
            self._moved_s = time.monotonic()
            self._note_horizon(records)
            self.follower.observe(records)
            self.memory.meta.records += len(records)
            self._commit()
        if self._ends is not None and all(self._reader.positions[tp] >= end for tp, end in self._ends.items()):
            self._reached(self.follower)
            self._moved_s = time.monotonic()
        elif time.monotonic() - self._moved_s > _NO_PROGRESS_S:
            # A transaction hangs, or the client does: a new one costs little.
            self.close_reader()

    def _open(self, log: Log) -> bool:
        """Start reading; False: topics are missing."""
        partitions = log.partitions()
        missing = [topic for topic in self._topics if topic not in partitions]
        if missing:
            self.remark = f"waits until there are topics {', '.join(missing)}"
            return False
        meta = self.memory.meta
        ids = self._topic_ids()
        replaced = [topic for topic, id in meta.topic_ids.items() if ids.get(topic, id) != id]
        if replaced:
            self._begin_anew(log, f"topics were deleted and created again: {', '.join(replaced)}")
            return True
        meta.topic_ids = ids
        tps = [(topic, partition) for topic in self._topics for partition in range(partitions[topic])]
        positions = {(topic, partition): offset for topic, partition, offset in meta.positions}
        starts = log.beginnings(tp for tp in tps if tp not in positions)
        meta.starts += [(*tp, start) for tp, start in starts.items()]
        meta.unread += [tp for tp, start in starts.items() if start > 0]
        self._follow({**positions, **starts})
        return True

    def _topic_ids(self) -> dict[str, str]:
        offsets = Offsets(self._address.librdkafka(), "streams-app-audit")
        try:
            return offsets.topic_ids(self._topics)
        finally:
            offsets.close()

    def _follow(self, positions: Mapping[TP, int]) -> None:
        counts = Counter(self._topics[topic] for topic, _ in positions)
        starts = {(self._topics[topic], partition): start for topic, partition, start in self.memory.meta.starts}
        self.remark = ", ".join(
            f"{topic}[{partition}] from {start}" for (topic, partition), start in starts.items() if start
        )
        self.remark = self.remark and f"judged are {self.remark}; what was before had been deleted"
        self.follower = self._cls(Followed(self._settings, counts, starts, self.memory))
        self._reader = Reader(self._address, self._topics, positions)
        self._ends, self._moved_s = None, time.monotonic()

    def _begin_anew(self, log: Log, why: str) -> None:
        """Forget all, and begin with what there is now."""
        self.close_reader()
        memory = self.memory
        memory.report(GAP, why)
        memory.forget()
        fresh = Meta(cut=memory.meta.cut, records=memory.meta.records)
        fresh.number, fresh.anomalies = memory.meta.number, memory.meta.anomalies
        memory.meta = fresh
        memory.commit()
        self._open(log)

    def _commit(self) -> None:
        if self._reader is not None:
            self.memory.meta.positions = [(*tp, offset) for tp, offset in self._reader.positions.items()]
        self.memory.commit()

    def _ask(self, log: Log) -> None:
        """Begin a cut. The committed offsets first: see the module."""
        assert self._reader is not None
        asked_s = time.monotonic()
        by_group: dict[str, list[TP]] = {}
        for tp in self._reader.positions:
            if tp[0] in self._groups:
                by_group.setdefault(self._groups[tp[0]], []).append(tp)
        committed: dict[TP, int] = {}
        for group, tps in by_group.items():
            committed |= log.committed(group, tps)
        ends = log.ends(self._reader.positions)
        self._committed = {(self._topics[topic], partition): each for (topic, partition), each in committed.items()}
        self._ends, self._asked_s = ends, asked_s
        self.memory.meta.cut += 1

    def _reached(self, follower: Follower) -> None:
        meta = self.memory.meta
        if meta.unread:
            # Nothing is left of them, so whatever was in them is older than now.
            meta.horizon_ms, meta.unread = int(time.time() * 1000), []
        follower.cut(Cut(meta.cut, self._committed, meta.horizon_ms))
        self._commit()
        self._ends, self.reached_s = None, self._asked_s

    def _note_horizon(self, records: Iterable[Observed]) -> None:
        """Where the beginning of a partition was deleted, its first record says up to when others miss theirs."""
        meta = self.memory.meta
        if not meta.unread:
            return
        prefix = self._settings.kafka_prefix
        unread = set(meta.unread)
        for record in records:
            tp = (prefix + record.topic, record.partition)
            if tp in unread:
                unread.discard(tp)
                meta.horizon_ms = max(meta.horizon_ms, record.timestamp_ms + _HORIZON_SLACK_MS)
        meta.unread = sorted(unread)

    def close_reader(self) -> None:
        """Give the connections back."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def close(self) -> None:
        """Give everything back."""
        self.close_reader()
        self.memory.close()


class AppStatus(msgspec.Struct):
    """How an app stands."""

    app_id: str
    guarantee: str
    #: Committed input behind the group's offsets, transaction markers included.
    lag: int
    #: Age of the oldest open transaction that has been seen, on its inputs and changelogs.
    open_s: float
    #: The most that was lost at most once; None: under this guarantee nothing may be.
    reported: int | None = None


class Watch:
    """Open transactions and lag of the apps: what is asked of the brokers alone."""

    def __init__(self, settings: Settings, apps: Sequence[AuditedApp], topics: Iterable[str], folder: Path) -> None:
        """``topics`` are watched beside those of the apps; whole names."""
        self._apps = apps
        self._topics = [*topics]
        self._limit_s = settings.transaction_timeout_ms / 1000 + _OPEN_SLACK_S
        self.memory = DiskMemory(folder / "_apps")
        #: Partition to the last stable offset that is behind the end, and since when it has been.
        self._since: dict[TP, tuple[int, float]] = {}
        self._due_s = 0.0
        self.apps: list[AppStatus] = []

    def step(self, log: Log) -> None:
        """Ask, if it is time.

        Raises:
            one of `UNREACHABLE`.
        """
        if time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + _WATCH_EVERY_S
        partitions = log.partitions()

        def tps(*topics: str) -> list[TP]:
            return [(topic, number) for topic in topics for number in range(partitions.get(topic, 0))]

        by_app = {app.app_id: tps(*app.inputs, *(table.changelog for table in app.tables)) for app in self._apps}
        watched = {*tps(*self._topics)}.union(*by_app.values())
        ends = log.ends(watched)
        stable = log.stable_ends(watched)
        self._note_open(ends, stable)
        now_s = time.monotonic()
        self.apps = []
        for app in self._apps:
            inputs = tps(*app.inputs)
            committed = log.metadata(app.app_id, inputs)
            lag = sum(max(0, stable[tp] - committed[tp][0]) for tp in inputs if tp in committed)
            open_s = max((now_s - self._since[tp][1] for tp in by_app[app.app_id] if tp in self._since), default=0.0)
            self.apps.append(AppStatus(app.app_id, app.guarantee, lag, open_s, _reported(app, committed)))

    def _note_open(self, ends: Mapping[TP, int], stable: Mapping[TP, int]) -> None:
        now_s = time.monotonic()
        since = {tp: (stable[tp], now_s) for tp in ends if stable[tp] < ends[tp]}
        for tp, (offset, _) in since.items():
            if self._since.get(tp, (-1, 0.0))[0] == offset:
                since[tp] = self._since[tp]
        self._since = since
        for tp, (offset, since_s) in since.items():
            open_s, key = now_s - since_s, f"{tp[1]} {tp[0]}".encode()
            if open_s > self._limit_s and self.memory.get([key]).get(key) != b"%d" % offset:
                text = f"{tp[0]}[{tp[1]}]@{offset}: a transaction has been open for more than {self._limit_s:g} s"
                self.memory.report(OPEN, f"{text}; nobody who reads committed records gets past it")
                self.memory.put(key, b"%d" % offset)
                self.memory.commit()


def _reported(app: AuditedApp, committed: Mapping[TP, tuple[int, str]]) -> int | None:
    if app.guarantee != AT_MOST_ONCE:
        return None
    claims = ((offset, Claim.parse(metadata)) for offset, metadata in committed.values())
    return sum(claim.reported(offset) for offset, claim in claims if claim is not None)


class FollowerStatus(msgspec.Struct):
    """How a follower stands."""

    records: int
    records_per_s: float
    #: Age of what was judged last: every record before that was; None: nothing was judged yet.
    cut_lag_s: float | None
    figures: dict[str, int | dict[str, int]]
    remark: str


class Status(msgspec.Struct):
    """How everything stands; made anew by each step, so that other threads may read it."""

    at_s: float
    #: Follower, or ``apps``, to anomaly to how often it was found since the state began.
    anomalies: dict[str, dict[str, int]]
    followers: dict[str, FollowerStatus]
    apps: list[AppStatus]
    #: The latest anomalies of each.
    recent: dict[str, list[Anomaly]]
    #: What keeps it from reading; empty: nothing.
    trouble: str = ""

    @property
    def found(self) -> bool:
        """Whether any anomaly was found since the state began."""
        return any(self.anomalies.values())


#: Called once for each anomaly with the name of whose it is.
OnAnomaly: TypeAlias = Callable[[str, Anomaly], None]


class Auditor:
    """All followers, and the watch over the apps."""

    def __init__(
        self,
        address: KafkaAddress,
        settings: Settings,
        apps: Sequence[AuditedApp],
        followers: Mapping[str, type[Follower]],
        app_id: str,
    ) -> None:
        """Opens what is remembered of ``app_id``.

        Raises:
            ConfigurationError: another process does this already.
        """
        self._address = address
        folder = settings.datadir / "audit" / app_id
        topics = {settings.kafka_prefix + topic for cls in followers.values() for topic in cls.topics}
        self._watch = Watch(settings, apps, sorted(topics), folder)
        self._followings = [Following(name, cls, address, settings, apps, folder) for name, cls in followers.items()]
        self._memories = {APPS: self._watch.memory, **{each.name: each.memory for each in self._followings}}
        self._log: Log | None = None
        self._trouble = ""
        self._samples: deque[tuple[float, dict[str, int]]] = deque()
        self.status = self._status()

    def step(self, on_anomaly: OnAnomaly) -> Status:
        """Go on for about half a second; trouble with the brokers is said in the status, and tried again."""
        try:
            if self._log is None:
                self._log = Log(self._address)
            for each in self._followings:
                each.step(self._log, _CHUNK_S / len(self._followings))
            self._watch.step(self._log)
            self._trouble = ""
        except UNREACHABLE as error:
            self._trouble = _in_words(error)
            # An admin client that has seen its broker restart may get no answer for more than a minute.
            self._close_log()
            time.sleep(_CHUNK_S)
        if not self._followings:
            time.sleep(_CHUNK_S)
        for name, memory in self._memories.items():
            for anomaly in memory.unsaid():
                on_anomaly(name, anomaly)
            memory.said()
        self.status = self._status()
        return self.status

    def _status(self) -> Status:
        now_s = time.monotonic()
        self._samples.append((now_s, {each.name: each.memory.meta.records for each in self._followings}))
        while self._samples[0][0] < now_s - _RATE_WINDOW_S:
            self._samples.popleft()
        return Status(
            time.time(),
            {name: dict(memory.meta.anomalies) for name, memory in self._memories.items() if memory.meta.anomalies},
            {each.name: self._follower_status(each, now_s) for each in self._followings},
            list(self._watch.apps),
            {name: list(memory.recent) for name, memory in self._memories.items() if memory.recent},
            self._trouble,
        )

    def _follower_status(self, each: Following, now_s: float) -> FollowerStatus:
        first_s, before = self._samples[0]
        records = each.memory.meta.records
        rate = (records - before[each.name]) / (now_s - first_s) if now_s > first_s else 0.0
        lag_s = None if each.reached_s is None else now_s - each.reached_s
        figures = each.follower.figures() if each.follower is not None else {}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in figures.items()}
        return FollowerStatus(records, rate, lag_s, plain, each.remark)

    @property
    def found(self) -> bool:
        """Whether any anomaly was found since the state began."""
        return any(memory.meta.anomalies for memory in self._memories.values())

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def close(self) -> None:
        """Give everything back; what was not committed is read again the next time."""
        self._close_log()
        for each in self._followings:
            each.close()
        self._watch.memory.close()


def _in_words(error: Exception) -> str:
    what = error.args[0].str() if isinstance(error, KafkaException) else str(error)
    return f"Kafka does not answer, or not as it should: {what or type(error).__name__}"
