"""Input for the ledger, as the world sends it: mostly well-formed, sometimes twice, now and then nonsense.

Deposits come first, so that there is money to move. Account 1 is popular, the last one hardly known. The same seed
gives the same records, and another seed other ids: runs can follow each other on one topic.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, TypeAlias

from streams_app.registry import Record, generator

Fields: TypeAlias = dict[str, Any]

CURRENCIES = ("EUR", "USD", "GBP", "JPY")
BANKS = ("external:bank", "external:card", "external:cash")
#: Any moment does; a fixed one keeps the records the same.
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
#: How far back a repetition or a conflict reaches; a sender that retries does so soon.
_RECENT = 1_000


@generator("transfers", topic="transfers")
def transfers(
    random: Random,
    keys: int,
    *,
    deposits: float = 0.15,
    withdrawals: float = 0.05,
    repeated: float = 0.02,
    conflicting: float = 0.01,
    ill_formed: float = 0.005,
) -> Iterator[Record]:
    """Transfers between ``keys`` accounts; the shares are of all records, the rest moves money between accounts."""
    source = _Source(random, keys)
    yield from source.first_deposits()
    while True:
        dice = random.random()
        if dice < ill_formed:
            yield source.ill_formed()
        elif dice < ill_formed + conflicting:
            yield _record(source.conflicting())
        elif dice < ill_formed + conflicting + repeated:
            yield _record(random.choice(source.recent))
        else:
            yield _record(source.remember(source.fresh(deposits, withdrawals)))


class _Source:
    """The state behind the records."""

    def __init__(self, random: Random, keys: int) -> None:
        self._random = random
        self._keys = keys
        self._prefix = f"{random.getrandbits(48):012x}"
        self._count = 0
        self.recent: deque[Fields] = deque(maxlen=_RECENT)

    def first_deposits(self) -> Iterator[Record]:
        """One deposit for each of the accounts that will be used most, so that there is money to move."""
        for number in range(1, min(self._keys, _RECENT) + 1):
            deposit = self._transfer(
                self._random.choice(BANKS), _account(number), self._random.randint(50_000, 500_000)
            )
            yield _record(self.remember(deposit))

    def remember(self, fields: Fields) -> Fields:
        """Keep a transfer to repeat it, or to contradict it."""
        self.recent.append(fields)
        return fields

    def fresh(self, deposits: float, withdrawals: float) -> Fields:
        """A transfer with a new id."""
        dice = self._random.random()
        if dice < deposits:
            return self._transfer(self._random.choice(BANKS), self._popular(), self._random.randint(1_000, 200_000))
        if dice < deposits + withdrawals:
            return self._transfer(self._popular(), self._random.choice(BANKS), self._amount())
        # Now and then both are the same account: that is an answer, not a mistake of this generator.
        return self._transfer(self._popular(), self._popular(), self._amount())

    def conflicting(self) -> Fields:
        """The id and the debit account of an earlier transfer, with other content."""
        earlier = self._random.choice(self.recent)
        change = self._random.choice(("amount", "currency", "credit_account"))
        others: dict[str, Callable[[], Any]] = {
            "amount": lambda: earlier["amount"] + 1,
            "currency": lambda: self._random.choice([each for each in CURRENCIES if each != earlier["currency"]]),
            "credit_account": lambda: earlier["credit_account"][:60] + "-bis",
        }
        return {**earlier, change: others[change]()}

    def ill_formed(self) -> Record:
        """A record that must become a dead letter, of one of the kinds in `ILL_FORMED`."""
        kind = self._random.choice(sorted(ILL_FORMED))
        return ILL_FORMED[kind](self.fresh(0.5, 0.0))

    def _transfer(self, debit_account: str, credit_account: str, amount: int) -> Fields:
        self._count += 1
        fields: Fields = {
            "id": f"{self._prefix}-{self._count}",
            "debit_account": debit_account,
            "credit_account": credit_account,
            "amount": amount,
            # One currency is used most, as everywhere.
            "currency": CURRENCIES[min(int(self._random.expovariate(1.5)), len(CURRENCIES) - 1)],
        }
        if self._random.random() < 0.5:
            fields["created_at"] = (_EPOCH + timedelta(milliseconds=self._count)).isoformat()
        return fields

    def _popular(self) -> str:
        # The square pulls towards the low numbers: of 100 accounts the first 25 get half of all transfers.
        return _account(1 + int(self._keys * self._random.random() ** 2))

    def _amount(self) -> int:
        # Mostly small, sometimes more than anybody has.
        return min(1 + int(self._random.paretovariate(1.1) * 100), 1_000_000_000)


def _account(number: int) -> str:
    return f"account-{number:06d}"


def _record(fields: Fields) -> Record:
    return Record(fields["debit_account"].encode(), _json(fields))


def _json(fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _with(**changes: Any) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["debit_account"].encode(), _json({**fields, **changes}))


def _without(name: str) -> Callable[[Fields], Record]:
    return lambda fields: Record(
        fields["debit_account"].encode(), _json({key: value for key, value in fields.items() if key != name})
    )


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["debit_account"].encode(), change(_json(fields)))


#: Every way in which a transfer can be ill-formed, by name.
ILL_FORMED: dict[str, Callable[[Fields], Record]] = {
    "json_cut_off": _raw(lambda value: value[:-1]),
    "json_empty": _raw(lambda value: b""),
    "json_not_an_object": _raw(lambda value: b"[" + value + b"]"),
    "json_not_utf8": _raw(lambda value: value.replace(b'"id":"', b'"id":"\xff', 1)),
    "json_nested_deeply": _raw(lambda value: value[:-1] + b',"note":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "amount_text": lambda fields: _with(amount=str(fields["amount"]))(fields),
    "amount_fraction": _with(amount=10.5),
    "amount_true": _with(amount=True),
    "amount_zero": _with(amount=0),
    "amount_negative": lambda fields: _with(amount=-fields["amount"])(fields),
    "amount_above_2_53": _with(amount=2**53),
    "amount_above_2_64": _with(amount=2**64),
    "amount_missing": _without("amount"),
    "currency_small": _with(currency="eur"),
    "currency_long": _with(currency="EURO"),
    "currency_line_break": _with(currency="EUR\n"),
    "currency_number": _with(currency=978),
    "currency_missing": _without("currency"),
    "id_empty": _with(id=""),
    "id_oversized": lambda fields: _with(id=fields["id"].ljust(65, "x"))(fields),
    "id_number": _with(id=1),
    "id_missing": _without("id"),
    "debit_account_oversized": lambda fields: _record({**fields, "debit_account": "a" * 65}),
    "debit_account_missing": _without("debit_account"),
    "credit_account_empty": _with(credit_account=""),
    "credit_account_oversized": _with(credit_account="a" * 65),
    "credit_account_null": _with(credit_account=None),
    "created_at_not_a_time": _with(created_at="yesterday"),
    "created_at_without_zone": _with(created_at="2024-01-01T00:00:00"),
    "key_missing": lambda fields: Record(None, _json(fields)),
    "key_of_another": lambda fields: Record(fields["credit_account"].encode() + b"?", _json(fields)),
    "key_not_utf8": lambda fields: Record(b"\xff" + fields["debit_account"].encode(), _json(fields)),
    "wrong_partition": lambda fields: _record(fields)._replace(misplaced=True),
}
