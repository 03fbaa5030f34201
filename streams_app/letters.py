"""Dead letters once they lie in Kafka: which there are, why, and which of them were sent back.

**Who was sent back is noted** in a topic of its own, `dead-letters-replayed`: one small record for each letter.

Why a topic of notes, and not the evidence itself, which is a record with the header ``dlq.replayed`` in the topic that the
letter came from? That would need no further topic. But to find it, every listing would have to read all input since the
oldest letter, and where the input is kept for a shorter time than the letters, or compacted, the evidence goes before they
do and they are sent twice. The notes are as few as the letters that were replayed, and compaction keeps the last one of
each. The id of the dead letters' topic is part of a note: a topic that was deleted and created again numbers other letters
with the same offsets.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, cast

from confluent_kafka import KafkaException, Message

from streams_app.audit import TP, Log
from streams_app.dead_letters import REPLAYED_TOPIC, TOPIC
from streams_app.errors import ConfigurationError, KafkaUnreachable
from streams_app.kafka import KafkaAddress
from streams_app.offsets import Offsets
from streams_app.provision import TopicSpec, create_topics
from streams_app.session import Output
from streams_app.settings import Settings

#: How the headers begin that say why a letter was set aside; a record that goes home goes without them.
OURS = "dlq."
#: Headers that say that the letter is not all of the record: its headers were dropped; its key or value was cut.
_CUT = ("dlq.headers", "dlq.cut")
#: Different pairs of topic and error that are counted apart: codes come from agents, and might be made up for each event.
_MOST_KINDS = 1_000
_UNIT_S = {"s": 1, "m": 60, "h": 60 * 60, "d": 24 * 60 * 60}


class Place(NamedTuple):
    """Where a letter lies in the topic of dead letters; as text ``PARTITION@OFFSET``."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}@{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``PARTITION@OFFSET``; raises ValueError if it does not read so."""
        if not re.fullmatch(r"[0-9]{1,9}@[0-9]{1,18}", text):
            raise ValueError(f"{text!r} is no place of a letter; it must read PARTITION@OFFSET, as `list` shows it")
        partition, _, offset = text.partition("@")
        return cls(int(partition), int(offset))


class Origin(NamedTuple):
    """Where a letter came from; ``topic`` with its prefix."""

    topic: str
    partition: int
    offset: int


class Letter(NamedTuple):
    """A dead letter."""

    place: Place
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    #: All of them, ours too.
    headers: Sequence[tuple[str, bytes | None]]
    #: None: somebody else wrote it, and did not say.
    origin: Origin | None
    #: The origin's topic without prefix; empty without origin.
    topic: str
    error: str
    message: str
    attempts: int | None
    #: What it lacks of the record that it stands for; None: nothing.
    cut: str | None
    #: Whether it was sent back before.
    replayed: bool

    @property
    def source(self) -> str:
        """``topic[partition]@offset`` that it came from."""
        return f"{self.topic}[{self.origin.partition}]@{self.origin.offset}" if self.origin else "unknown"


def _letter(message: Message, place: Place, prefix: str, *, replayed: bool) -> Letter:
    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    # Ours are the last of their names: the record may have come with such headers itself.
    said = {name: (value or b"").decode(errors="replace") for name, value in headers if name.startswith(OURS)}
    topic, partition, offset = (said.get(f"dlq.{name}", "") for name in ("topic", "partition", "offset"))
    knows = bool(topic) and _is_number(partition) and _is_number(offset)
    cut = [f"{name} says {said[name]!r}" for name in _CUT if name in said]
    return Letter(
        place,
        message.timestamp()[1],
        message.key(),
        message.value(),
        headers,
        Origin(topic, int(partition), int(offset)) if knows else None,
        topic.removeprefix(prefix) if knows else "",
        said.get("dlq.error", ""),
        said.get("dlq.message", ""),
        int(said["dlq.attempts"]) if _is_number(said.get("dlq.attempts", "")) else None,
        ", ".join(cut) or None,
        replayed,
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


@dataclass(frozen=True)
class Choice:
    """Which letters; what is empty or None leaves none out."""

    #: Without prefix.
    topics: frozenset[str] = frozenset()
    errors: frozenset[str] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    places: frozenset[Place] = frozenset()

    def __contains__(self, letter: Letter) -> bool:
        return (
            (not self.topics or letter.topic in self.topics)
            and (not self.errors or letter.error in self.errors)
            and (self.since_ms is None or letter.timestamp_ms >= self.since_ms)
            and (self.until_ms is None or letter.timestamp_ms < self.until_ms)
            and (not self.places or letter.place in self.places)
        )


def parse_moment(text: str, now_ms: int) -> int:
    """Read an RFC 3339 time, or a duration before ``now_ms`` such as ``10m`` or ``2h``.

    Returns:
        milliseconds since 1970.

    Raises:
        ValueError: it is neither; the text says what to write.
    """
    duration = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if duration:
        return now_ms - int(duration[1]) * _UNIT_S[duration[2]] * 1000
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return int(moment.timestamp() * 1000)
    raise ValueError(f"{text!r} is no time; write 2030-01-31T12:00:00Z, or how long ago, as 90s, 10m, 2h or 7d")


class Letters:
    """The topic of dead letters, as it was committed when this was made: readings of one object see the same letters."""

    def __init__(self, address: KafkaAddress, settings: Settings) -> None:
        """Raises `ConfigurationError` if the topic does not exist, `KafkaUnreachable` if nobody answers."""
        self.address = address
        self._prefix = settings.kafka_prefix
        topic = self._prefix + TOPIC
        with _asking(address):
            self._log = Log(address)
            #: All topics that there are.
            self.partitions: Mapping[str, int] = self._log.partitions()
            if topic not in self.partitions:
                raise ConfigurationError(
                    f"the topic {topic!r} does not exist at {address.servers}; create the topics with "
                    "`faust -A streams_app provision`, or start a worker, and check KAFKA_PREFIX"
                )
            tps = [(topic, partition) for partition in range(self.partitions[topic])]
            self._beginnings = self._log.beginnings(tps)
            self._ends = self._log.stable_ends(tps)
            self.notes = Notes(address, settings, topic, self._beginnings)
        self.replayed = self.notes.read()

    def close(self) -> None:
        """Give the connections back."""
        self._log.close()
        self.notes.close()

    def read(self, choice: Choice) -> Iterator[Letter]:
        """The chosen letters, in each partition by offset."""
        missing = set(choice.places)
        with _asking(self.address):
            for message in self._log.read(self._starts(choice.places)):
                place = Place(int(message.partition() or 0), int(message.offset() or 0))
                if place.offset >= self._ends[str(message.topic()), place.partition]:
                    continue
                letter = _letter(message, place, self._prefix, replayed=place in self.replayed)
                if letter in choice:
                    yield letter
                missing.discard(place)
                if choice.places and not missing:
                    return

    def _starts(self, places: Iterable[Place]) -> Mapping[TP, int]:
        """Where reading begins: at the first of ``places`` in each partition that has any; without places everywhere."""
        if not places:
            return self._beginnings
        first = {place.partition: place.offset for place in sorted(places, reverse=True)}
        return {tp: max(begins, first[tp[1]]) for tp, begins in self._beginnings.items() if tp[1] in first}


class Notes:
    """Which letters were sent back, as the topic of the notes tells it."""

    def __init__(self, address: KafkaAddress, settings: Settings, letters: str, beginnings: Mapping[TP, int]) -> None:
        """``letters`` is the whole name of the topic of dead letters, ``beginnings`` the first offsets that it has."""
        self._topic = settings.kafka_prefix + REPLAYED_TOPIC
        self._address = address
        self._replication = settings.topic_replication
        self._beginnings = {partition: offset for (_, partition), offset in beginnings.items()}
        # Not that of the letters: the notes are read anew while letters are being read.
        self._log = Log(address)
        self._id = Offsets(address.librdkafka(), "streams-app-replay").topic_ids([letters])[letters]

    def close(self) -> None:
        """Give the connections back."""
        self._log.close()

    def create(self) -> None:
        """Create the topic where `provision` did not yet; raises `ConfigurationError` if that is not permitted."""
        if self._topic in self._log.partitions():
            return
        try:
            create_topics(self._address, [TopicSpec(self._topic, 1, self._replication, {"cleanup.policy": "compact"})])
        except KafkaException as error:
            raise ConfigurationError(
                f"the topic {self._topic!r}, which notes what was replayed, could not be created: "
                f"{error.args[0].str()}; create it with cleanup.policy=compact and one partition"
            ) from error

    def read(self) -> dict[Place, int]:
        """Letters that were sent back, with the offset of the last note of each; only of letters that are still there."""
        noted = {}
        with _asking(self._address):
            partitions = self._log.partitions().get(self._topic, 0)
            tps = [(self._topic, partition) for partition in range(partitions)]
            for message in self._log.read(self._log.beginnings(tps)):
                topic_id, _, place_text = (message.key() or b"").decode(errors="replace").partition(" ")
                if topic_id != self._id:
                    continue
                place = Place.parse(place_text)
                if place.offset >= self._beginnings.get(place.partition, 0):
                    noted[place] = int(message.offset() or 0)
        return noted

    def note(self, letter: Letter) -> Output:
        """The record that says that ``letter`` was sent back."""
        return Output(self._topic, f"{self._id} {letter.place}".encode(), letter.source.encode())


@contextlib.contextmanager
def _asking(address: KafkaAddress) -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise KafkaUnreachable(f"the letters at {address.servers} cannot be read: {error.args[0].str()}") from error


@dataclass
class Count:
    """Letters of one topic and error."""

    letters: int = 0
    replayed: int = 0


class Listing:
    """Letters, all of them counted, a bounded number kept: the newest, or the oldest."""

    def __init__(self, letters: Iterable[Letter], limit: int, *, newest: bool) -> None:
        #: By topic and error.
        self.counts: dict[tuple[str, str], Count] = {}
        choose = heapq.nlargest if newest else heapq.nsmallest
        #: By time.
        self.kept = sorted(choose(limit, self._counted(letters), key=_age), key=_age)

    def _counted(self, letters: Iterable[Letter]) -> Iterator[Letter]:
        for letter in letters:
            kind = (letter.topic, letter.error)
            if kind not in self.counts and len(self.counts) >= _MOST_KINDS:
                kind = ("", "others")
            count = self.counts.setdefault(kind, Count())
            count.letters += 1
            count.replayed += letter.replayed
            yield letter

    @property
    def letters(self) -> int:
        """How many there are."""
        return sum(count.letters for count in self.counts.values())


def _age(letter: Letter) -> tuple[int, Place]:
    return letter.timestamp_ms, letter.place
