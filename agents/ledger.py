"""The ledger: money moves between two accounts, exactly once.

A transfer touches two accounts, which as a rule live in two partitions, so it takes two steps, each of them one event
of one partition::

    transfers, by debit account ──> `debits`: decide, take the money
    credits, by credit account  ──> `credits`: give it

Nothing here speaks of transactions, retries or duplicates: an event's table writes and outputs take effect together
with its offset, or not at all. What remains for this module is the business: `decide`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streams_app import app, set_aside
from streams_app.partitioning import partition_of
from tables.ledger import (
    EMPTY,
    EXTERNAL_PREFIX,
    Credit,
    Decision,
    Entry,
    Reason,
    Result,
    Status,
    Transfer,
    accounts,
    decision_key,
    decisions,
)

if TYPE_CHECKING:
    from faust.types import StreamT

transfers = app.topic("transfers", key_type=bytes, value_type=Transfer)
on_their_way = app.topic("credits", key_type=str, value_type=Credit)
ledger = app.topic("ledger", key_type=str, value_type=Entry)
results = app.topic("transfer-results", key_type=str, value_type=Result)


def decide(transfer: Transfer, balance: int, remembered: Decision | None) -> Decision:
    """What becomes of ``transfer``; the order of the checks is part of the contract.

    ``balance`` is that of its debit account in its currency, ``remembered`` what was decided about its id before.
    """
    if remembered is not None:
        if _same_content(transfer, remembered):
            return _decision(transfer, "exists", remembered.reason)
        return _decision(transfer, "rejected", "exists_with_different_content")
    if transfer.debit_account == transfer.credit_account:
        return _decision(transfer, "rejected", "same_account")
    if balance < transfer.amount and not transfer.debit_account.startswith(EXTERNAL_PREFIX):
        return _decision(transfer, "rejected", "insufficient_funds")
    return _decision(transfer, "posted", None)


def _decision(transfer: Transfer, status: Status, reason: Reason | None) -> Decision:
    return Decision(status, reason, transfer.credit_account, transfer.amount, transfer.currency)


def _same_content(transfer: Transfer, remembered: Decision) -> bool:
    """Id and debit account are the same already: the decision was found by them."""
    return (transfer.credit_account, transfer.amount, transfer.currency) == (
        remembered.credit_account,
        remembered.amount,
        remembered.currency,
    )


def misplacement(transfer: Transfer, key: bytes | None, partition: int, partitions: int) -> tuple[str, str] | None:
    """Why a transfer must not be decided where it lies: ``(code, message)``; None: it lies where it belongs.

    Two partitions that both take an account for theirs would each keep a balance of it.
    """
    if key is None:
        return "wrong_key", f"the record has no key; it must be the debit account {transfer.debit_account!r}"
    if key != transfer.debit_account.encode():
        return "wrong_key", f"the record's key is {key!r}, not the debit account {transfer.debit_account!r}"
    expected = partition_of(key, partitions)
    if partition != expected:
        return "wrong_partition", f"the key belongs to partition {expected} of {partitions} (murmur2), not {partition}"
    return None


@app.agent(transfers)
async def debits(stream: StreamT[Transfer]) -> None:
    """Decide each transfer, and take the money of those that are posted."""
    async for event in stream.events():
        transfer, message = event.value, event.message
        partitions = app.partitions_of("transfers")
        if partitions is None:
            raise AssertionError("a record came from a topic whose partitions the consumer does not know")
        misplaced = misplacement(transfer, message.key, message.partition, partitions)
        if misplaced is not None:
            await set_aside(*misplaced)
            continue
        await debit(transfer)


async def debit(transfer: Transfer) -> None:
    """Decide one transfer that lies where it belongs."""
    payer = transfer.debit_account
    account = accounts.get(payer) or EMPTY
    key = decision_key(payer, transfer.id)
    remembered = decisions.get(key)
    decision = decide(transfer, account.balance(transfer.currency), remembered)
    if remembered is None:
        decisions[key] = decision
    if decision.status == "posted":
        accounts[payer] = account = account.after(transfer.currency, -transfer.amount)
        credit = Credit(transfer.id, payer, transfer.credit_account, transfer.amount, transfer.currency)
        balance = account.balance(transfer.currency)
        entry = Entry(transfer.id, payer, "debit", transfer.amount, transfer.currency, balance)
        await on_their_way.send(key=transfer.credit_account, value=credit)
        await ledger.send(key=payer, value=entry)
    await results.send(key=payer, value=Result(transfer.id, payer, decision.status, decision.reason))


@app.agent(on_their_way)
async def credits(stream: StreamT[Credit]) -> None:
    """Give the money of each posted transfer to its credit account."""
    async for credit in stream:
        await give(credit)


async def give(credit: Credit) -> None:
    """Apply one credit leg."""
    payee = credit.credit_account
    account = (accounts.get(payee) or EMPTY).after(credit.currency, credit.amount)
    accounts[payee] = account
    balance = account.balance(credit.currency)
    await ledger.send(key=payee, value=Entry(credit.id, payee, "credit", credit.amount, credit.currency, balance))
