"""What a history is made of, and what is right at its end: a few entries, whose amounts are summed up by key."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

from faust.types import TP

Guarantee: TypeAlias = Literal["exactly_once", "at_least_once", "at_most_once"]
GUARANTEES: tuple[Guarantee, ...] = ("exactly_once", "at_least_once", "at_most_once")

GROUP = "balances"
INPUTS = (TP("entries", 0), TP("entries", 1))
OUTPUTS = (TP("balances", 0), TP("balances", 1))
CHANGELOGS = (TP("balance-changelog", 0), TP("balance-changelog", 1))
#: Two keys for each input partition; the outputs of either go to both output partitions.
_KEYS = ((b"a", b"b"), (b"c", b"d"))


class Entry(NamedTuple):
    """An event of the input: adds ``amount`` to the balance of ``key``."""

    id: int
    key: bytes
    amount: int

    @property
    def value(self) -> bytes:
        """As it stands in the log."""
        return b"%d %d" % (self.id, self.amount)

    @property
    def to(self) -> TP:
        """Where its output goes."""
        return OUTPUTS[self.key in {b"b", b"d"}]


class Plan:
    """The setting of a history. Its numbers are what is made smaller when a history is shrunk."""

    def __init__(self, guarantee: Guarantee, *, entries: int, workers: int, chunk: int, poison: int) -> None:
        """``entries`` of each partition, at most ``chunk`` of them fetched at once; entry ``poison`` (0: none) fails once."""
        self.guarantee = guarantee
        self.entries = entries
        self.workers = workers
        self.chunk = chunk
        self.poison = poison
        self.inputs = INPUTS

    @cached_property
    def input(self) -> dict[TP, list[Entry]]:
        """The input, in the order of its offsets."""
        return {
            tp: [Entry(2 * at + tp.partition + 1, _KEYS[tp.partition][at % 2], 10 + at) for at in range(self.entries)]
            for tp in INPUTS
        }

    @cached_property
    def ids(self) -> dict[bytes, list[int]]:
        """The ids of each key, in their order."""
        return {
            key: [entry.id for entry in self.input[tp] if entry.key == key]
            for tp, keys in zip(INPUTS, _KEYS, strict=True)
            for key in keys
        }

    @cached_property
    def balances(self) -> dict[int, int]:
        """The balance after each entry."""
        found: dict[int, int] = {}
        for entries in self.input.values():
            for key in {entry.key for entry in entries}:
                mine = [entry for entry in entries if entry.key == key]
                sums = accumulate(entry.amount for entry in mine)
                found |= {entry.id: total for entry, total in zip(mine, sums, strict=True)}
        return found

    def final(self, partition: int) -> dict[bytes, bytes]:
        """What the table's partition holds when every entry has counted once."""
        return {key: b"%d" % self.balances[self.ids[key][-1]] for key in _KEYS[partition] if self.ids[key]}
