"""What agents bring along: generators of input for `generate`, checks and followers for `audit`, panels for the dashboard.

The commands know no agent by name. A module of the package ``agents`` registers its own::

    @generator("transfers", topic="transfers")
    def transfers(random: Random, keys: int) -> Iterator[Record]: ...

    @check("ledger")
    class LedgerCheck(Check): ...

    @follower("ledger")
    class LedgerFollower(Follower): ...

    panel(Panel(topic="transfers", title="Money", unit="transfers", promise="…"))

Whoever deletes our agents and adds others gets a `generate` and an `audit` for those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

from streams_app.errors import ConfigurationError
from streams_app.settings import Settings

#: Examples kept of one anomaly: enough to look into it, few enough for a screen.
MAX_EXAMPLES = 5


class Record(NamedTuple):
    """One record of generated input."""

    key: bytes | None
    value: bytes
    #: Write it to the partition next to the one that its key belongs to (of no effect in a topic of one partition).
    misplaced: bool = False


#: Called with a seeded source of randomness and the number of distinct keys; endless. Same seed, same records.
Generate: TypeAlias = Callable[[Random, int], Iterator[Record]]
G = TypeVar("G", bound=Callable[..., Iterator[Record]])


class Generator(NamedTuple):
    """A registered generator; ``topic`` without KAFKA_PREFIX."""

    name: str
    topic: str
    records: Generate


class Observed(NamedTuple):
    """A committed record as the audit read it; ``topic`` without KAFKA_PREFIX."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    headers: Mapping[str, bytes]

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


class Facts(NamedTuple):
    """What a check knows before its first record."""

    settings: Settings
    #: Topic, without KAFKA_PREFIX, to its number of partitions; a topic that does not exist is missing.
    partitions: Mapping[str, int]
    #: Whether all input was consumed and no transaction was open when the audit began to read.
    at_rest: bool
    #: Events that at-most-once workers reported as given up, at most so many; read before the first record.
    given_up: int = 0


@dataclass
class Finding:
    """An anomaly, how often it was seen, and the first examples of it."""

    anomaly: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """Anomalies by name, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._by_name: dict[str, Finding] = {}

    def add(self, anomaly: str, example: str, count: int = 1) -> None:
        """Count ``anomaly`` and keep ``example`` if it is one of the first."""
        finding = self._by_name.setdefault(anomaly, Finding(anomaly))
        finding.count += count
        if len(finding.examples) < MAX_EXAMPLES:
            finding.examples.append(example)

    def list(self) -> Sequence[Finding]:
        """All of them."""
        return list(self._by_name.values())

    def count(self, anomaly: str) -> int:
        """How often ``anomaly`` was found."""
        finding = self._by_name.get(anomaly)
        return finding.count if finding else 0


class Check:
    """Base of the checks. Made anew for each audit, and told, in this order:

    ``observe`` for every committed record of ``topics``: one topic after the other as they are listed, in each
    partition by offset; ``row`` for every row of ``tables`` as their changelogs give it; ``finish`` once.
    """

    #: Topics to observe, without KAFKA_PREFIX.
    topics: ClassVar[Sequence[str]] = ()
    #: Tables whose rows it wants.
    tables: ClassVar[Sequence[str]] = ()

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.findings = Findings()
        #: What was counted; values go into JSON as they are.
        self.figures: dict[str, Any] = {}

    def observe(self, record: Observed) -> None:
        """Take note of a committed record."""

    def row(self, table: str, partition: int, key: bytes, value: bytes) -> None:
        """Take note of a row of a table: key and value as in the changelog."""

    def finish(self) -> None:
        """Draw the conclusions: into ``findings`` and ``figures``."""


class Memory(Protocol):
    """What a follower knows of the past: on disk, written in one piece with how far it has read. Keys are its own."""

    @property
    def cut(self) -> int:
        """Number of the latest cut that was begun; see `Follower`."""

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that have one, those put since the last commit included. Ask for many at once."""

    def put(self, key: bytes, value: bytes | None) -> None:
        """Set a value; None deletes it."""

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All keys from ``start`` up to ``end``, exclusive, in their order, with their values as of the last commit."""

    def drop(self, start: bytes, end: bytes) -> None:
        """Delete all keys from ``start`` up to ``end``, exclusive, as far as they were committed."""

    def report(self, anomaly: str, text: str) -> None:
        """Say that something is not as it must be: at once, counted for ever, ``text`` for people."""


class Followed(NamedTuple):
    """What a follower knows before its first record."""

    settings: Settings
    #: Topic, without KAFKA_PREFIX, to its number of partitions.
    partitions: Mapping[str, int]
    #: Topic and partition to the first offset that was judged: what was before 0 < it had been deleted when we came.
    starts: Mapping[tuple[str, int], int]
    #: What a follower remembers.
    memory: Memory


class Cut(NamedTuple):
    """A moment up to which every record of the follower's topics was read."""

    number: int
    #: Topic and partition of inputs to the offset that its app had committed before the moment; those without are missing.
    #: What came of all input before it was seen: outputs become visible with the offset, or not at all.
    committed: Mapping[tuple[str, int], int]
    #: Records up to this time may miss others that were deleted before we came; 0: there are none.
    horizon_ms: int


#: Bounds what a cut holds in memory; what is beyond waits for the next one.
JUDGED_AT_ONCE = 50_000


def due(cut: int, key: bytes) -> bytes:
    """Where a follower notes, under ``j``, that ``key`` is to be judged once a cut above this one is reached."""
    return b"j" + cut.to_bytes(8) + key


def taken_due(memory: Memory, cut: Cut) -> dict[bytes, bytes]:
    """What is to be judged at a cut, by key, as far as it is still there; the notes of it are deleted."""
    notes = [note for note, _ in islice(memory.scan(b"j", due(cut.number, b"")), JUDGED_AT_ONCE)]
    found = memory.get({note[9:] for note in notes})
    for note in notes:
        memory.put(note, None)
    return found


class Follower:
    """Base of the followers, which judge while events flow (``audit --follow``), for ever, in bounded memory.

    A whole one: no visit may be counted twice::

        @follower("visits")
        class VisitsFollower(Follower):
            topics = ("visit-counts",)

            def observe(self, records):
                known = self.memory.get({record.key for record in records})
                for record in records:
                    before, now = int(known.get(record.key, b"0")), json.loads(record.value)["visits"]
                    if now != before + 1:
                        self.memory.report("wrong count", f"{record}: {now} after {before}")
                    known[record.key] = b"%d" % now
                    self.memory.put(record.key, known[record.key])

    ``observe`` is told the committed records of ``topics`` in chunks: each partition in its order, partitions and topics
    as they come. All that it puts and reports takes effect together with the chunk, once, whoever is killed meanwhile; so
    what must last has to stand in the memory, not in attributes.

    ``cut`` settles what several topics say together. Parts of one transaction become visible at different moments, so a
    missing part may just not be read yet. Keep with the part ``memory.cut`` as of when it was observed; what is still
    missing at a later cut (``cut.number`` above it) does not exist.
    """

    #: Topics to observe, without KAFKA_PREFIX.
    topics: ClassVar[Sequence[str]] = ()

    def __init__(self, followed: Followed) -> None:
        self.followed = followed
        self.memory = followed.memory

    def observe(self, records: Sequence[Observed]) -> None:
        """Take note of a chunk of committed records."""

    def cut(self, cut: Cut) -> None:
        """Judge what was observed before the cut."""

    def figures(self) -> Mapping[str, int | Mapping[str, int]]:
        """What was counted, each a number, or numbers by a label; metrics are named by it (``_total``: only grows)."""
        return {}


class Panel(NamedTuple):
    """What the dashboard says of one input, in words of its agent, on the card of its guarantee.

    The dashboard counts what was consumed and what waits by itself. What was lost, repeated and set aside, and how long
    answers took, it takes from the figures ``lost``, ``repeated``, ``set_aside`` and ``latency_ms`` of followers.
    """

    #: The input, without KAFKA_PREFIX; its records are what is counted as events.
    topic: str
    #: A word or two.
    title: str
    #: What the events are called, more than one of them.
    unit: str
    #: One sentence: what is promised of them.
    promise: str
    #: Further figures to show, as ``FOLLOWER.FIGURE``, and what they are called.
    figures: Mapping[str, str] = {}
    #: Those of them that must be zero.
    zero: frozenset[str] = frozenset()


C = TypeVar("C", bound=type[Check])
F = TypeVar("F", bound=type[Follower])

_generators: dict[str, Generator] = {}
_checks: dict[str, type[Check]] = {}
_followers: dict[str, type[Follower]] = {}
_panels: dict[str, Panel] = {}


def generator(name: str, *, topic: str) -> Callable[[G], G]:
    """Register a function ``(random, keys) -> Iterator[Record]`` as the input ``name`` of ``topic``."""

    def register(function: G) -> G:
        _generators[name] = Generator(name, topic, function)
        return function

    return register


def check(name: str) -> Callable[[C], C]:
    """Register a `Check` class under ``name``."""

    def register(cls: C) -> C:
        _checks[name] = cls
        return cls

    return register


def follower(name: str) -> Callable[[F], F]:
    """Register a `Follower` class under ``name``, which is that of a folder as well."""

    def register(cls: F) -> F:
        _followers[name] = cls
        return cls

    return register


def panel(panel: Panel) -> None:
    """Register what the dashboard says of an input."""
    _panels[panel.topic] = panel


def generators() -> Mapping[str, Generator]:
    """All registered generators by name."""
    return dict(sorted(_generators.items()))


def checks() -> Mapping[str, type[Check]]:
    """All registered checks by name."""
    return dict(sorted(_checks.items()))


def followers() -> Mapping[str, type[Follower]]:
    """All registered followers by name."""
    return dict(sorted(_followers.items()))


def panels() -> Mapping[str, Panel]:
    """All registered panels by their input."""
    return dict(sorted(_panels.items()))


def find_generator(name: str) -> Generator:
    """The generator ``name``.

    Raises:
        ConfigurationError: there is none; the text lists those that there are.
    """
    try:
        return _generators[name]
    except KeyError:
        known = ", ".join(generators()) or "none: no module of the package agents registers one"
        raise ConfigurationError(f"no generator is named {name!r}; there are: {known}") from None
