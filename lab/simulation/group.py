"""A model of the group coordinator: members, generations, assignments, and committed offsets, pending ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from confluent_kafka import KafkaError
from faust.types import TP

from streams_app.session import Pin

OK = 0


class Stored(NamedTuple):
    """A committed offset."""

    offset: int
    metadata: str
    #: Grows with each commit: the marker of a late transaction puts no newer offset back.
    number: int


class Group:
    """One consumer group; every method is one request, or the end of a session."""

    def __init__(self, name: str, partitions: Iterable[TP]) -> None:
        self.name = name
        self.generation = 0
        #: Of each member what it was assigned.
        self.members: dict[str, list[TP]] = {}
        #: Those that asked to join the next generation.
        self.joined: set[str] = set()
        self.rebalancing = False
        self.offsets: dict[TP, Stored] = {}
        self.pending: dict[int, dict[TP, Stored]] = {}
        #: Called when a rebalance begins, and when it has ended.
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self._partitions = list(partitions)
        self._commits = 0

    # -- Membership.

    def form(self, members: Iterable[str]) -> None:
        """Be a group of these, as if they had joined together."""
        self.members = {member: [] for member in members}
        self.joined = set(self.members)
        self._end_if_all_joined()

    def join(self, member: str) -> None:
        """JoinGroup: of a new member, or again."""
        self.members.setdefault(member, [])
        self._begin()
        self.joined.add(member)
        self._end_if_all_joined()

    def leave(self, member: str) -> None:
        """LeaveGroup, or the end of a session."""
        if self.members.pop(member, None) is None:
            return
        self.joined.discard(member)
        self._begin()
        self._end_if_all_joined()

    def _begin(self) -> None:
        if not self.rebalancing:
            self.rebalancing = True
            self.joined = set()
            self.on_begin()

    def _end_if_all_joined(self) -> None:
        if len(self.joined) < len(self.members):
            return
        self.rebalancing = False
        self.generation += 1
        members = sorted(self.members)
        for member in members:
            self.members[member] = []
        for number, tp in enumerate(self._partitions if members else ()):
            self.members[members[number % len(members)]].append(tp)
        self.on_end()

    def validate(self, pin: Pin, *, in_transaction: bool) -> int:
        """Whether a commit under ``pin`` is taken; without generation and member nothing is checked, as Kafka does it."""
        if pin.generation < 0 and not self.members:
            return OK
        if pin.generation >= 0 or pin.member_id:
            if pin.member_id not in self.members:
                return int(KafkaError.UNKNOWN_MEMBER_ID)
            return OK if pin.generation == self.generation else int(KafkaError.ILLEGAL_GENERATION)
        return OK if in_transaction else int(KafkaError.UNKNOWN_MEMBER_ID)

    # -- Offsets.

    def commit(self, pin: Pin, offsets: Mapping[TP, tuple[int, str]]) -> int:
        """OffsetCommit."""
        code = self.validate(pin, in_transaction=False)
        if not code:
            self.offsets.update(self._numbered(offsets))
        return code

    def hold_pending(self, pid: int, offsets: Mapping[TP, tuple[int, str]]) -> None:
        """Keep what a transaction commits until it has ended."""
        self.pending.setdefault(pid, {}).update(self._numbered(offsets))

    def end_pending(self, pid: int, committed: bool) -> None:
        """The marker of that transaction has come."""
        for tp, stored in self.pending.pop(pid, {}).items():
            newest = self.offsets.get(tp)
            if committed and (newest is None or stored.number > newest.number):
                self.offsets[tp] = stored

    def committed(self, partitions: Iterable[TP], *, stable: bool) -> dict[TP, Stored | None] | None:
        """OffsetFetch; None: asked for stable offsets, and one is pending."""
        asked = list(partitions)
        if stable and any(tp in held for held in self.pending.values() for tp in asked):
            return None
        return {tp: self.offsets.get(tp) for tp in asked}

    def _numbered(self, offsets: Mapping[TP, tuple[int, str]]) -> dict[TP, Stored]:
        self._commits += 1
        return {tp: Stored(offset, metadata, self._commits) for tp, (offset, metadata) in offsets.items()}
