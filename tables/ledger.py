"""The ledger: the form of its events, and its two tables.

========== ============================= ===================================================
table      key                           value
========== ============================= ===================================================
accounts   account id                    its balance in each currency; there from its first entry on
decisions  debit account and transfer id what was decided about that transfer, forgotten after a while
========== ============================= ===================================================

Amounts are whole minor units (cents). A balance has no bound of its own: it is a sum of amounts of up to 2^53 - 1, and
Python and its JSON carry whole numbers of any size, so it passes 2^53 and 2^63 unharmed. Readers in other languages
need a JSON parser that does not squeeze whole numbers into floats.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from streams_app import app

#: The largest whole number that every JSON parser reads exactly.
MAX_AMOUNT = 2**53 - 1
#: Accounts of the world outside: money enters by debiting them, so only they may go below zero.
EXTERNAL_PREFIX = "external:"

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Amount: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_AMOUNT)]
# Not `$`, which also matches in front of a last line break.
Currency: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Z]{3}\Z")]
Moment: TypeAlias = Annotated[datetime, Meta(tz=True)]

Side: TypeAlias = Literal["debit", "credit"]
Status: TypeAlias = Literal["posted", "rejected", "exists"]
Reason: TypeAlias = Literal["insufficient_funds", "same_account", "exists_with_different_content"]


class Transfer(Struct, frozen=True):
    """A request to move money; the input. All fields but ``created_at`` are its content."""

    id: Name
    debit_account: Name
    credit_account: Name
    amount: Amount
    currency: Currency
    created_at: Moment | None = None


class Credit(Struct, frozen=True):
    """The credit leg of a transfer whose debit was taken, on its way to the partition of the credit account.

    Of a `Transfer` that was looked at: its currency needs no pattern, which would be half of the time to decode it.
    """

    id: Name
    debit_account: Name
    credit_account: Name
    amount: Amount
    currency: str


class Entry(Struct, frozen=True):
    """One leg of a posted transfer, as applied to an account; ``balance`` is the one after it."""

    transfer_id: Name
    account: Name
    side: Side
    amount: Amount
    currency: Currency
    balance: int


class Result(Struct, frozen=True):
    """The answer to a transfer: one for each well-formed input."""

    id: Name
    debit_account: Name
    status: Status
    reason: Reason | None


class Decision(Struct, frozen=True):
    """What was decided, with the content that it was decided for."""

    status: Status
    reason: Reason | None
    credit_account: str
    amount: int
    currency: str


class Account(Struct, frozen=True):
    """Currency to balance, in minor units."""

    balances: dict[str, int]

    def balance(self, currency: str) -> int:
        """The balance in ``currency``; 0 where there was no entry yet."""
        return self.balances.get(currency, 0)

    def after(self, currency: str, amount: int) -> Account:
        """The account after ``amount``, negative for a debit, was added to its balance."""
        return Account({**self.balances, currency: self.balance(currency) + amount})


EMPTY = Account({})


def decision_key(debit_account: str, transfer_id: str) -> str:
    """The key of a remembered decision, such as ``5:alice/t-1``.

    Both parts may hold any characters, so a mere separator could be a part of either; the length in front settles it.
    """
    return f"{len(debit_account)}:{debit_account}/{transfer_id}"


def split_decision_key(key: str) -> tuple[str, str]:
    """The debit account and the transfer id of a `decision_key`."""
    length, _, rest = key.partition(":")
    return rest[: int(length)], rest[int(length) + 1 :]


accounts = app.Table("accounts", key_type=str, value_type=Account)
# Written for a transfer's debit account by the partition that the account belongs to: a repeated id meets its decision.
decisions = app.Table("decisions", key_type=str, value_type=Decision, expires_s=app.settings.remember_ids_s)
