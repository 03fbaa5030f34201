"""What Kafka knows of the apps' consumer groups, whichever process they run in: offsets, members, who holds what.

Asked about once a second, for all apps together: the ends of the inputs, and of each group its committed offsets and its
members. Where input is written in transactions, their markers take offsets too, and count as records here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
from confluent_kafka.admin import AdminClient

from streams_app.audit import AT_MOST_ONCE, TP, AuditedApp, Log
from streams_app.claims import Claim
from streams_app.deadlines import COORDINATOR_TIMEOUT_S, discard
from streams_app.kafka import KafkaAddress

_REQUEST_TIMEOUT_S = 5.0
_RATE_WINDOW_S = 4.0
#: Nothing is about to change; the last two without any member.
_SETTLED = frozenset({"STABLE", "EMPTY", "DEAD"})


class Partition(msgspec.Struct):
    """One partition of an input."""

    #: Without KAFKA_PREFIX.
    topic: str
    number: int
    #: Name of the worker that holds it; empty: nobody does.
    worker: str
    #: Next offset to consume; None: none was committed yet.
    committed: int | None
    #: Behind the last committed record.
    end: int

    @property
    def lag(self) -> int:
        """Records that wait; of a partition without committed offset all there are."""
        return max(0, self.end - (self.committed or 0))


class Member(msgspec.Struct):
    """A worker in the group."""

    worker: str
    member_id: str
    host: str
    partitions: int


class Mark(msgspec.Struct):
    """Something that happened in a group."""

    at_ms: int
    guarantee: str
    #: ``joined``, ``left``, ``restarted`` (of a worker), or ``rebalance``.
    kind: str
    worker: str = ""


class Group(msgspec.Struct):
    """How a consumer group stands."""

    guarantee: str
    app_id: str
    #: As Kafka calls it: STABLE, PREPARING_REBALANCING, …
    state: str
    members: list[Member]
    partitions: list[Partition]
    #: Records per second over the last seconds, by topic; None: that takes a second look.
    rates: dict[str, float] | None
    #: The most that was lost at most once, what a worker had in hand that is gone included; None: nothing may be lost.
    reported: int | None
    #: Of at most once, what members have in hand: of one that died, until the group knows, it is lost and not yet reported.
    in_hand: int = 0


class Cluster:
    """See the module. All calls block, each with a deadline."""

    def __init__(self, address: KafkaAddress, apps: Sequence[AuditedApp], prefix: str, client_id: str) -> None:
        """``client_id`` is that of the apps; a worker adds its name."""
        self._apps = apps
        self._prefix = prefix
        self._client_id = f"{client_id}-"
        self._log = Log(address, request_timeout_s=_REQUEST_TIMEOUT_S)
        self._config = {**address.librdkafka(), "log_level": 0}
        self._samples: deque[tuple[float, dict[TP, int]]] = deque()

    def close(self) -> None:
        """Give the connections back."""
        self._log.close()
        self._give_up_admin()

    @cached_property
    def _admin(self) -> AdminClient:
        return AdminClient(self._config)

    def _give_up_admin(self) -> None:
        if "_admin" in self.__dict__:
            discard(self.__dict__.pop("_admin"))

    def look(self) -> list[Group]:
        """Ask.

        Raises:
            KafkaException, KafkaUnreachable, TimeoutError: no answer.
        """
        counts = self._log.partitions()
        inputs = {
            app.app_id: [(topic, number) for topic in app.inputs for number in range(counts.get(topic, 0))]
            for app in self._apps
        }
        committed = {app_id: self._log.metadata(app_id, tps) for app_id, tps in inputs.items()}
        # Asked afterwards: nothing is consumed beyond what is there.
        ends = self._log.stable_ends([tp for tps in inputs.values() for tp in tps])
        described = self._described()
        rates = self._rates({tp: offset for each in committed.values() for tp, (offset, _) in each.items()})
        return [
            self._group(app, described[app.app_id], inputs[app.app_id], committed[app.app_id], ends, rates)
            for app in self._apps
        ]

    def _described(self) -> dict[str, Any]:
        groups = [app.app_id for app in self._apps]
        asked = self._admin.describe_consumer_groups(groups, request_timeout=COORDINATOR_TIMEOUT_S)
        try:
            return {app_id: future.result(_REQUEST_TIMEOUT_S) for app_id, future in asked.items()}
        except TimeoutError:
            self._give_up_admin()
            raise

    def _rates(self, committed: dict[TP, int]) -> dict[str, float] | None:
        samples, now_s = self._samples, time.monotonic()
        samples.append((now_s, committed))
        # Two of them at least, however long Kafka takes to answer.
        while len(samples) > 2 and samples[1][0] < now_s - _RATE_WINDOW_S:
            samples.popleft()
        first_s, before = samples[0]
        if now_s <= first_s:
            return None
        rates: dict[str, float] = {}
        for tp, offset in committed.items():
            # A partition without offset before has just begun: where, is not known. A topic made anew begins at 0 again.
            moved = max(0, offset - before.get(tp, offset)) / (now_s - first_s)
            topic = tp[0].removeprefix(self._prefix)
            rates[topic] = rates.get(topic, 0.0) + moved
        return rates

    def _group(
        self,
        app: AuditedApp,
        described: Any,
        inputs: Sequence[TP],
        committed: Mapping[TP, tuple[int, str]],
        ends: Mapping[TP, int],
        rates: Mapping[str, float] | None,
    ) -> Group:
        members, holders = [], {}
        for each in described.members:
            worker = each.client_id.removeprefix(self._client_id)
            held = [(tp.topic, tp.partition) for tp in each.assignment.topic_partitions]
            held = [tp for tp in held if tp in ends]
            holders.update(dict.fromkeys(held, worker))
            members.append(Member(worker, each.member_id, each.host.removeprefix("/"), len(held)))
        partitions = [
            Partition(
                tp[0].removeprefix(self._prefix),
                tp[1],
                holders.get(tp, ""),
                committed[tp][0] if tp in committed else None,
                ends[tp],
            )
            for tp in inputs
        ]
        own = {topic.removeprefix(self._prefix) for topic in app.inputs}
        return Group(
            app.guarantee,
            app.app_id,
            described.state.name,
            sorted(members, key=lambda member: (member.worker, member.member_id)),
            partitions,
            None if rates is None else {topic: rate for topic, rate in rates.items() if topic in own},
            *_reported(app, committed, {member.member_id for member in members}),
        )


def _reported(
    app: AuditedApp, committed: Mapping[TP, tuple[int, str]], living: Collection[str]
) -> tuple[int | None, int]:
    """What was reported, and what members have in hand beside that."""
    if app.guarantee != AT_MOST_ONCE:
        return None, 0
    reported = in_hand = 0
    for offset, metadata in committed.values():
        claim = Claim.parse(metadata)
        if claim is not None and claim.member_id in living:
            reported += claim.given_up
            in_hand += claim.reported(offset) - claim.given_up
        elif claim is not None:
            reported += claim.reported(offset)
    return reported, in_hand


class Marks:
    """What changed in the groups from one look to the next; the latest are kept."""

    def __init__(self, most: int = 200) -> None:
        self.latest: deque[Mark] = deque(maxlen=most)
        #: Of each group, as it was when it was last settled: its workers' members, and who holds what.
        self._before: dict[str, tuple[dict[str, str], dict[tuple[str, int], str]]] = {}
        self._unstable: set[str] = set()

    def note(self, groups: Sequence[Group], at_ms: int) -> None:
        """Compare with the last look."""
        for group in groups:
            if group.state not in _SETTLED:
                if group.app_id not in self._unstable:
                    self._unstable.add(group.app_id)
                    self.latest.append(Mark(at_ms, group.guarantee, "rebalance"))
                continue
            now = (
                {member.worker: member.member_id for member in group.members},
                {(each.topic, each.number): each.worker for each in group.partitions},
            )
            before = self._before.get(group.app_id)
            if before is not None:
                self._compare(group, before, now, at_ms)
            self._unstable.discard(group.app_id)
            self._before[group.app_id] = now

    def _compare(
        self,
        group: Group,
        before: tuple[dict[str, str], dict[tuple[str, int], str]],
        now: tuple[dict[str, str], dict[tuple[str, int], str]],
        at_ms: int,
    ) -> None:
        (members_before, held_before), (members, held) = before, now
        for worker in sorted(members_before.keys() | members.keys()):
            was, is_ = members_before.get(worker), members.get(worker)
            if was != is_:
                kind = "joined" if was is None else "left" if is_ is None else "restarted"
                self.latest.append(Mark(at_ms, group.guarantee, kind, worker))
        if (held_before != held or members_before != members) and group.app_id not in self._unstable:
            self.latest.append(Mark(at_ms, group.guarantee, "rebalance"))
