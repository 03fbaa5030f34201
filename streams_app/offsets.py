"""What the brokers say about offsets: stable offsets of the group, beginnings and high watermarks of partitions.

aiokafka's answers are no use here. Its ``committed()`` knows nothing of stable offsets: while a transaction with offsets is
open, and for a moment after a successful commit, it gives the old one. Its ``end_offsets()`` of a read-committed consumer is
the last *stable* offset, not the high watermark. Both are asked by librdkafka instead.

Committed offsets are asked by a consumer that joins no group, never by the admin client: that one ends the process with a
segmentation fault when the broker that it asks is not the group's coordinator any more, as after a restart (librdkafka 2.16).
Read committed, it gives stable offsets only, and waits for those that are pending.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource

from streams_app.deadlines import COORDINATOR_TIMEOUT_S, discard
from streams_app.errors import KafkaUnreachable, PartitionsLost
from streams_app.session import Owner

TP: TypeAlias = tuple[str, int]
T = TypeVar("T")

_REQUEST_TIMEOUT_S = 10.0
#: Pending offsets of a live worker are stable again within a commit's time; only then it is asked who is dead.
_FENCE_AFTER_S = 0.5
_STABLE_POLL_S, _STABLE_POLL_EACH_S = 0.5, 0.2


class Committed(NamedTuple):
    """A committed offset and who committed it."""

    #: Next offset to read; None: the group has none.
    offset: int | None
    metadata: str = ""

    @property
    def owner(self) -> Owner | None:
        """The worker that committed it in a transaction, which is where a pending one would be from."""
        return Owner.parse(self.metadata)


class Offsets:
    """Blocking questions to the brokers; each has a deadline.

    Made for one start of partitions, and closed after it: an admin client that has seen its broker restart may get no answer
    for more than a minute.
    """

    def __init__(self, config: Mapping[str, Any], group_id: str) -> None:
        # Never polled: what goes wrong is told by the answers.
        self._config = {**config, "socket.timeout.ms": int(_REQUEST_TIMEOUT_S * 1000), "log_level": 0}
        self._group_id = group_id

    def close(self) -> None:
        """Give the connections back."""
        for name, last_call in (("_stable_reader", "close"), ("_reader", "close"), ("_admin", None)):
            if name in self.__dict__:
                discard(self.__dict__.pop(name), last_call)

    @cached_property
    def _admin(self) -> AdminClient:
        return AdminClient(self._config)

    @cached_property
    def _stable_reader(self) -> Consumer:
        return Consumer({**self._config, "group.id": self._group_id, "isolation.level": "read_committed"})

    @cached_property
    def _reader(self) -> Consumer:
        return Consumer({**self._config, "group.id": self._group_id, "isolation.level": "read_uncommitted"})

    def stable(
        self,
        partitions: Iterable[TP],
        fence: Callable[[str], None],
        cancelled: Callable[[], bool] = lambda: False,
        timeout_s: float = 90.0,
    ) -> dict[TP, Committed]:
        """The group's offsets of ``partitions``, after all transactions pending on them have ended.

        A live worker's transaction ends by itself; of a dead one ``fence`` is called once with the transactional id, which
        ends it in a fraction of a second; otherwise the broker ends it when it times out. Never an unstable offset.

        Raises:
            PartitionsLost: ``cancelled()`` says that nobody waits for it any more.
            KafkaUnreachable: no answer, or still pending, after ``timeout_s``.
        """
        missing = set(partitions)
        found: dict[TP, Committed] = {}
        started_s = time.monotonic()
        fenced: set[str] = set()
        while True:
            found |= self._stable_ones(missing)
            missing -= found.keys()
            if not missing:
                return found
            if cancelled():
                raise PartitionsLost("the assignment ended while its offsets were pending")
            waited_s = time.monotonic() - started_s
            if waited_s > timeout_s:
                raise KafkaUnreachable(f"transactions on {sorted(missing)} are still pending after {timeout_s:g} s")
            if waited_s > _FENCE_AFTER_S:
                for transactional_id in self.dead_owners(missing) - fenced:
                    fenced.add(transactional_id)
                    fence(transactional_id)

    def _stable_ones(self, partitions: Iterable[TP]) -> dict[TP, Committed]:
        """Those of ``partitions`` whose offsets are stable; librdkafka's time-out does not tell which ones are not."""
        asked = list(partitions)
        if not asked:
            return {}
        try:
            return self._committed(
                self._stable_reader, asked, _STABLE_POLL_S if len(asked) > 1 else _STABLE_POLL_EACH_S
            )
        except KafkaException as error:
            if error.args[0].code() != KafkaError._TIMED_OUT:
                raise
        if len(asked) == 1:
            return {}
        stable: dict[TP, Committed] = {}
        for tp in asked:
            stable |= self._stable_ones([tp])
        return stable

    def dead_owners(self, partitions: Iterable[TP]) -> set[str]:
        """The transactional ids under which ``partitions`` were committed last, pending or not, and no member works now."""
        owners = self._owners()
        if not owners.keys() & set(partitions):
            return set()
        members = self.members()
        # A restarted worker has its predecessor's transactional id, and may have claimed partitions with it already.
        living = {owner.transactional_id for owner in owners.values() if owner.member_id in members}
        ours = [owners[tp] for tp in partitions if tp in owners]
        return {owner.transactional_id for owner in ours if owner.member_id not in members} - living

    def _owners(self) -> dict[TP, Owner]:
        committed = self._committed(self._reader, self._all_partitions(), _REQUEST_TIMEOUT_S)
        return {tp: each.owner for tp, each in committed.items() if each.owner is not None}

    def members(self) -> set[str]:
        """The ids of the group's live members.

        Raises:
            KafkaUnreachable: no answer.
        """
        asked = self._admin.describe_consumer_groups([self._group_id], request_timeout=COORDINATOR_TIMEOUT_S)
        try:
            return {member.member_id for member in asked[self._group_id].result(_REQUEST_TIMEOUT_S).members}
        except TimeoutError as error:
            discard(self.__dict__.pop("_admin"))
            raise KafkaUnreachable(
                f"nobody says who is in the group {self._group_id}: its coordinator is away"
            ) from error

    def group_has_offsets(self) -> set[TP]:
        """All partitions for which the group has an offset."""
        committed = self._committed(self._reader, self._all_partitions(), _REQUEST_TIMEOUT_S)
        return {tp for tp, each in committed.items() if each.offset is not None}

    def partitions(self, topics: Iterable[str]) -> set[TP]:
        """All partitions of ``topics``."""
        wanted = set(topics)
        return {tp for tp in self._all_partitions() if tp[0] in wanted} if wanted else set()

    def _all_partitions(self) -> list[TP]:
        topics = self._admin.list_topics(timeout=_REQUEST_TIMEOUT_S).topics
        return [(name, partition) for name, topic in topics.items() for partition in topic.partitions]

    def _committed(self, reader: Consumer, partitions: Sequence[TP], timeout_s: float) -> dict[TP, Committed]:
        answer: dict[TP, Committed] = {}
        if not partitions:
            return answer
        for each in reader.committed([TopicPartition(*tp) for tp in partitions], timeout=timeout_s):
            if each.error is not None:
                raise KafkaException(each.error)
            answer[each.topic, each.partition] = Committed(each.offset if each.offset >= 0 else None, metadata_of(each))
        return answer

    def beginnings(self, partitions: Iterable[TP]) -> dict[TP, int]:
        """First offset that each partition still has."""
        return self._found(partitions, OFFSET_BEGINNING)

    def high_watermarks(self, partitions: Iterable[TP]) -> dict[TP, int]:
        """Offset behind the last record of each partition, of open transactions too."""
        return self._found(partitions, OFFSET_END)

    def _found(self, partitions: Iterable[TP], where: int) -> dict[TP, int]:
        found, unknown = offsets_at(self._reader, partitions, where, _REQUEST_TIMEOUT_S)
        if unknown:
            raise KafkaUnreachable(
                f"the brokers do not say at the moment how far {sorted(unknown)} reach; some have no leader"
            )
        return found

    def topic_ids(self, topics: Iterable[str]) -> dict[str, str]:
        """The ids of topics: a topic that was deleted and created again has another one."""
        futures = self._admin.describe_topics(TopicCollection(list(topics)), request_timeout=_REQUEST_TIMEOUT_S)
        return {topic: str(_result(future).topic_id) for topic, future in futures.items()}

    def tombstones_kept_ms(self, topics: Iterable[str]) -> dict[str, int]:
        """How long a changelog keeps the tombstone of a key that was deleted.

        Zero where an ACL hides the topic's settings: then no checkpoint is trusted, and tables are restored as a whole.
        """
        kept_ms = {}
        for topic in set(topics):
            resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
            [future] = self._admin.describe_configs([resource], request_timeout=_REQUEST_TIMEOUT_S).values()
            try:
                kept_ms[topic] = int(_result(future)["delete.retention.ms"].value)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise
                kept_ms[topic] = 0
        return kept_ms


def offsets_at(
    reader: Consumer, partitions: Iterable[TP], where: int, timeout_s: float
) -> tuple[dict[TP, int], dict[TP, KafkaError]]:
    """The offsets ``where``, `OFFSET_BEGINNING` or `OFFSET_END`, as the reader sees them; and of the others, why not.

    To the brokers these are times like others. librdkafka's admin client has a question of its own for it: as long as a
    partition has no leader it keeps a core busy, to say −1001 without an error in the end (2.16.1; measured: 500,000 context
    switches in 5 s).

    Raises:
        KafkaException: no answer in ``timeout_s``.
    """
    asked = [TopicPartition(*tp, where) for tp in partitions]
    found: dict[TP, int] = {}
    unknown: dict[TP, KafkaError] = {}
    for each in reader.offsets_for_times(asked, timeout_s) if asked else ():
        tp = each.topic, each.partition
        if each.error is None and each.offset >= 0:
            found[tp] = each.offset
        else:
            # One that no broker answers for keeps the time that was asked for, which is negative, and has no error: taken for
            # an end, it would leave a table empty that has been written.
            unknown[tp] = each.error or KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
    return found, unknown


def metadata_of(committed: TopicPartition) -> str:
    """The metadata of a committed offset, as far as it can be read.

    librdkafka takes it for a C string: where whoever wrote it did not end it with a zero byte, as we do, what follows it in
    memory is read, too.
    """
    try:
        return committed.metadata or ""
    except UnicodeDecodeError:
        return ""


def _result(future: Future[Any]) -> Any:
    return future.result(timeout=2 * _REQUEST_TIMEOUT_S)
