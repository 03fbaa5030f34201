"""Dead letters on the dashboard: how many there are of which topic and reason, and the newest of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from streams_app.audit import Log
from streams_app.dead_letters import TOPIC
from streams_app.errors import ConfigurationError
from streams_app.kafka import KafkaAddress
from streams_app.letters import Choice, Letters, Place
from streams_app.registry import Followed, Follower, Observed
from streams_app.settings import Settings

_SHOWN = 12
#: Codes come from agents, and might be made up for each event.
_MOST_REASONS = 200
#: Whoever writes letters may write anything; what is shown is bounded.
_MOST_CHARS, _MOST_MESSAGE_CHARS = 80, 300


class LettersFollower(Follower):
    """Counts all of them, as they lie in Kafka."""

    topics = (TOPIC,)

    def __init__(self, followed: Followed) -> None:
        super().__init__(followed)
        stored = self.memory.get([b"t"]).get(b"t")
        self._reasons: dict[str, int] = msgspec.json.decode(stored, type=dict[str, int]) if stored else {}

    def observe(self, records: Sequence[Observed]) -> None:
        """Count them."""
        prefix = self.followed.settings.kafka_prefix
        for record in records:
            topic, error = (
                record.headers.get(name, b"")[:_MOST_CHARS].decode(errors="replace")
                for name in ("dlq.topic", "dlq.error")
            )
            reason = f"{topic.removeprefix(prefix)} {error}"
            if reason not in self._reasons and len(self._reasons) >= _MOST_REASONS:
                reason = " other"
            self._reasons[reason] = self._reasons.get(reason, 0) + 1
        self.memory.put(b"t", msgspec.json.encode(self._reasons))

    def figures(self) -> Mapping[str, int | Mapping[str, int]]:
        """By topic and reason, with a space between."""
        return {"by_reason": dict(sorted(self._reasons.items()))}


class Shown(msgspec.Struct):
    """A letter, for people."""

    at_ms: int
    #: Topic that it came from, without prefix; ``topic[partition]@offset``; where it lies now.
    topic: str
    source: str
    place: str
    key: str
    error: str
    message: str
    attempts: int | None
    replayed: bool


class Newest:
    """The newest letters; read again when there are more."""

    def __init__(self, address: KafkaAddress, settings: Settings) -> None:
        self._address = address
        self._settings = settings
        self._ends: dict[tuple[str, int], int] = {}
        self.shown: list[Shown] = []

    def look(self, log: Log) -> bool:
        """Whether there are other ones than before.

        Raises:
            KafkaException, KafkaUnreachable, TimeoutError: no answer.
        """
        topic = self._settings.kafka_prefix + TOPIC
        tps = [(topic, partition) for partition in range(log.partitions().get(topic, 0))]
        ends = log.stable_ends(tps)
        if ends == self._ends:
            return False
        starts = log.beginnings(tps)
        # Markers of transactions take places, too: twice as many as are shown.
        places = frozenset(
            Place(partition, offset)
            for (_, partition), end in ends.items()
            for offset in range(max(starts[topic, partition], end - 2 * _SHOWN), end)
        )
        self.shown = self._read(Choice(places=places)) if places else []
        self._ends = ends
        return True

    def _read(self, choice: Choice) -> list[Shown]:
        try:
            letters = Letters(self._address, self._settings)
        except ConfigurationError:
            return []  # the topic was deleted meanwhile
        try:
            found = sorted(letters.read(choice), key=lambda letter: -letter.timestamp_ms)[:_SHOWN]
        finally:
            letters.close()
        return [
            Shown(
                each.timestamp_ms,
                each.topic[:_MOST_CHARS],
                each.source[:_MOST_CHARS],
                str(each.place),
                (each.key or b"").decode(errors="replace")[:_MOST_CHARS],
                each.error[:_MOST_CHARS],
                each.message[:_MOST_MESSAGE_CHARS],
                each.attempts,
                each.replayed,
            )
            for each in found
        ]
