"""The ledger against a model of a few lines, and against its own audit, over histories that nobody thought of."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ledger_world import World

ACCOUNTS = ["external:bank", "external:", "alice", "bob", "carol"]

TRANSFERS = st.fixed_dictionaries(
    {
        # Few ids and accounts: repetitions and conflicts are common.
        "id": st.sampled_from(["1", "2", "3", "4"]),
        "debit_account": st.sampled_from(ACCOUNTS),
        "credit_account": st.sampled_from(ACCOUNTS),
        "amount": st.one_of(st.integers(1, 5), st.sampled_from([2**53 - 1])),
        "currency": st.sampled_from(["EUR", "USD"]),
    },
    optional={"created_at": st.just("2024-01-01T00:00:00Z")},
)
HISTORIES = st.lists(TRANSFERS, max_size=40)


class Model:
    """The contract's rules on plain dictionaries, for transfers that are handled one after the other."""

    def __init__(self) -> None:
        self.balances: Counter[tuple[str, str]] = Counter()
        self.known: dict[tuple[str, str], tuple[Any, str | None]] = {}

    def answer(self, t: dict[str, Any]) -> tuple[str, str | None]:
        payer, content = t["debit_account"], (t["credit_account"], t["amount"], t["currency"])
        if (payer, t["id"]) in self.known:
            first, reason = self.known[payer, t["id"]]
            return ("exists", reason) if first == content else ("rejected", "exists_with_different_content")
        reason = None
        if payer == t["credit_account"]:
            reason = "same_account"
        elif not payer.startswith("external:") and self.balances.get((payer, t["currency"]), 0) < t["amount"]:
            reason = "insufficient_funds"
        else:
            self.balances[payer, t["currency"]] -= t["amount"]
            self.balances[t["credit_account"], t["currency"]] += t["amount"]
        self.known[payer, t["id"]] = content, reason
        return ("rejected", reason) if reason else ("posted", None)


def answers(world: World) -> Counter[tuple[str, str, str, str | None]]:
    return Counter((r["debit_account"], r["id"], r["status"], r["reason"]) for r in world.decoded("transfer-results"))


def balances(world: World) -> dict[tuple[str, str], int]:
    return {
        (account, currency): balance
        for rows in world.accounts.rows.values()
        for account, row in rows.items()
        for currency, balance in row.balances.items()
    }


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_one_after_the_other_the_ledger_answers_as_the_model_does(history: list[dict[str, Any]]) -> None:
    """A rule of the contract would be broken for some sequence of transfers."""
    world, model = World(), Model()
    for transfer in history:
        before = answers(world)
        world.transfer(**transfer)
        world.run()
        status, reason = model.answer(transfer)
        assert answers(world) - before == Counter([(transfer["debit_account"], transfer["id"], status, reason)])
    assert balances(world) == dict(model.balances)
    assert world.judge().findings.list() == []


@settings(max_examples=150, deadline=None)
@given(HISTORIES, st.integers(0, 1_000))
def test_in_any_order_of_partitions_money_is_neither_made_nor_lost(history: list[dict[str, Any]], seed: int) -> None:
    """An unlucky interleaving of workers would lose money, or the audit would cry wolf over a good history."""
    world = World()
    for transfer in history:
        world.transfer(**transfer)
    world.run(Random(seed))
    totals: Counter[str] = Counter()
    for (account, currency), balance in balances(world).items():
        totals[currency] += balance
        assert balance >= 0 or account.startswith("external:")
    assert not any(totals.values())
    assert len(world.all("transfer-results")) == len(history)
    assert world.judge().findings.list() == []
