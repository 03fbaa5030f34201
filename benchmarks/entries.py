"""Input of the bare app, and whether what became of it is complete.

An entry is made from its number alone: whoever reads an output knows what it must say.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from streams_app.partitioning import partition_of

_WORD = (1 << 64) - 1
#: Of so many accounts the partition is compared with the one that the key gives; of all, that it is always the same.
_KEYS_COMPARED = 1_000
_NOWHERE = 255


class Balance(msgspec.Struct):
    """An output, as all contenders write it."""

    id: int
    account: str
    balance: int


class Completeness(NamedTuple):
    """What is wrong with the committed outputs of an input; all zero when nothing is."""

    #: Entries without output.
    missing: int
    #: Outputs too many.
    repeated: int
    #: Outputs of another account, balance or partition than the entry gives, or of no entry.
    wrong: int


@dataclass(frozen=True)
class Entries:
    """The numbers from ``first`` on, ``count`` of them."""

    count: int
    accounts: int
    first: int = 0
    #: Each is for the account of its own number, below ``accounts``; else for any account.
    in_turn: bool = False

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values, for Kafka."""
        for number in range(self.first, self.first + self.count):
            account = b"account-%d" % self.account_of(number)
            yield account, b'{"id": %d, "account": "%s", "amount": %d}' % (number, account, amount_of(number))

    def account_of(self, number: int) -> int:
        """Scattered evenly, and as unpredictable as an engine can tell."""
        if self.in_turn:
            return number
        mixed = (number + 1) * 0x9E3779B97F4A7C15 & _WORD
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        return (mixed ^ mixed >> 31) % self.accounts


def amount_of(number: int) -> int:
    """From 1 to 99."""
    return number * 7 % 99 + 1


def decode(value: bytes) -> Balance:
    """What any contender wrote.

    Raises:
        msgspec.MsgspecError: it is no balance.
    """
    return _DECODER.decode(value)


_DECODER = msgspec.json.Decoder(Balance)


def missing_and_repeated(values: Iterable[bytes], entries: Entries) -> tuple[int, int]:
    """How many of the entries have no output, and how many outputs there are too many; balances are not looked at."""
    seen = Counter(decode(value).id for value in values)
    known = sum(number in seen for number in range(entries.first, entries.first + entries.count))
    return entries.count - known, seen.total() - known


def check(outputs: Iterable[tuple[int, bytes]], entries: Entries, partitions: int) -> Completeness:
    """Compare partitions and values of all committed outputs, in the order of their partitions, with their entries.

    The entries must be the first ones of their accounts: balances begin at 0.
    """
    seen = bytearray(entries.count)
    balances = array("q", bytes(8 * entries.accounts))
    homes = bytearray([_NOWHERE]) * entries.accounts
    repeated = wrong = 0
    for partition, value in outputs:
        output = decode(value)
        place = output.id - entries.first
        if not 0 <= place < entries.count:
            wrong += 1
            continue
        if seen[place]:
            repeated += 1
            continue
        seen[place] = 1
        account = entries.account_of(output.id)
        if homes[account] == _NOWHERE:
            home = partition_of(output.account.encode(), partitions) if account < _KEYS_COMPARED else partition
            homes[account] = home
        balances[account] += amount_of(output.id)
        right = output.balance == balances[account] and homes[account] == partition
        wrong += not right or output.account != f"account-{account}"
        balances[account] = output.balance  # one mistake counts once, not in all that follow
    return Completeness(entries.count - sum(seen), repeated, wrong)
