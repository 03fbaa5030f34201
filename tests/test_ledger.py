"""The rules of the ledger: forms, decisions, and what an agent makes of them."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest

from agents.ledger import decide, misplacement
from agents.ledger_input import ILL_FORMED
from streams_app.partitioning import partition_of
from tables.ledger import Account, Decision, Transfer, decision_key, split_decision_key
from tests.ledger_world import UNREADABLE, World


def transfer(**changes: Any) -> Transfer:
    fields = {"id": "t1", "debit_account": "alice", "credit_account": "bob", "amount": 100, "currency": "EUR"}
    return msgspec.convert({**fields, **changes}, Transfer)


def fields(**changes: Any) -> dict[str, Any]:
    return msgspec.to_builtins(transfer(**changes))


def outcome(decision: Decision) -> tuple[str, str | None]:
    return decision.status, decision.reason


POSTED = decide(transfer(), 100, None)


class TestDecide:
    """The order of the checks and their answers are what senders build on."""

    def test_a_transfer_with_funds_is_posted(self) -> None:
        """A payer with exactly enough could not pay."""
        assert outcome(decide(transfer(), 100, None)) == ("posted", None)

    def test_a_transfer_without_funds_is_rejected(self) -> None:
        """An account would go below zero."""
        assert outcome(decide(transfer(), 99, None)) == ("rejected", "insufficient_funds")

    def test_an_external_account_may_go_below_zero(self) -> None:
        """No money could enter."""
        assert outcome(decide(transfer(debit_account="external:bank"), -5, None)) == ("posted", None)

    def test_an_account_that_merely_contains_external_may_not(self) -> None:
        """Anybody could name an account so as to print money."""
        rejected = ("rejected", "insufficient_funds")
        assert outcome(decide(transfer(debit_account="my-external:bank"), 0, None)) == rejected
        assert outcome(decide(transfer(debit_account="External:bank"), 0, None)) == rejected

    def test_a_transfer_to_the_same_account_is_rejected_before_funds_are_looked_at(self) -> None:
        """The reason would depend on the balance."""
        for balance in (0, 1_000):
            assert outcome(decide(transfer(credit_account="alice"), balance, None)) == ("rejected", "same_account")

    def test_a_repeated_id_answers_exists_whatever_the_balance_is_now(self) -> None:
        """A retry would pay twice, or be told that its payment failed."""
        assert outcome(decide(transfer(), 0, POSTED)) == ("exists", None)

    @pytest.mark.parametrize("first", [decide(transfer(), 0, None), decide(transfer(credit_account="alice"), 0, None)])
    def test_a_repeated_id_that_was_rejected_answers_with_the_first_reason(self, first: Decision) -> None:
        """A retry after new funds came would be posted, though its sender was told that it was refused."""
        again = transfer(credit_account=first.credit_account)
        assert outcome(decide(again, 10_000, first)) == ("exists", first.reason)

    @pytest.mark.parametrize("change", [{"amount": 101}, {"currency": "USD"}, {"credit_account": "carol"}])
    def test_a_known_id_with_other_content_is_rejected(self, change: dict[str, Any]) -> None:
        """A sender that reuses an id would believe that its second payment was made."""
        rejected = ("rejected", "exists_with_different_content")
        assert outcome(decide(transfer(**change), 10_000, POSTED)) == rejected

    def test_a_known_id_is_looked_at_before_the_same_account(self) -> None:
        """The contract's order of the checks."""
        known = decide(transfer(), 10_000, POSTED)
        assert outcome(known) == ("exists", None)
        changed = decide(transfer(credit_account="alice"), 10_000, POSTED)
        assert outcome(changed) == ("rejected", "exists_with_different_content")

    def test_created_at_is_not_content(self) -> None:
        """A sender that stamps each try anew would be told that it contradicts itself."""
        assert outcome(decide(transfer(created_at="2024-05-01T12:00:00Z"), 0, POSTED)) == ("exists", None)


class TestForm:
    """What is not of the contract's form must not reach the decision."""

    @pytest.mark.parametrize("kind", sorted(ILL_FORMED))
    def test_each_kind_of_ill_formed_input_becomes_one_dead_letter_and_nothing_else(self, kind: str) -> None:
        """Nonsense would move money, or be lost without a trace."""
        world = World()
        world.write([ILL_FORMED[kind](fields(debit_account="external:bank"))])
        world.run()
        assert len(world.all("dead-letters")) == 1
        assert not any(world.all(topic) for topic in ("credits", "ledger", "transfer-results"))
        assert not world.judge().findings.list()

    @pytest.mark.parametrize(
        "change",
        [
            {"amount": 1},
            {"amount": 2**53 - 1},
            {"id": "x" * 64},
            {"id": "\u00e4" * 64},
            {"created_at": None},
            {"created_at": "2024-05-01T12:00:00.5+02:00"},
            {"unknown": {"field": [1]}},
        ],
    )
    def test_the_limits_of_the_contract_are_accepted(self, change: dict[str, Any]) -> None:
        """Senders that keep to the contract would be turned away."""
        msgspec.json.decode(msgspec.json.encode({**fields(), **change}), type=Transfer)

    def test_a_currency_with_a_line_break_behind_it_is_refused(self) -> None:
        """A regular expression's dollar sign would let it through: a fourth character, and a currency of its own."""
        with pytest.raises(UNREADABLE):
            msgspec.json.decode(msgspec.json.encode({**fields(), "currency": "EUR\n"}), type=Transfer)

    def test_balances_beyond_64_bits_stay_whole(self) -> None:
        """Large sums would fail to be read back, or lose their last digits."""
        account = Account({"EUR": 2**63 - 1}).after("EUR", 2**53 - 1).after("USD", -(2**70))
        assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account


class TestMisplacement:
    """Two partitions that both take an account for theirs would each keep a balance of it."""

    def test_a_transfer_where_it_belongs_passes(self) -> None:
        """Good input would be set aside."""
        assert misplacement(transfer(), b"alice", partition_of(b"alice", 4), 4) is None

    @pytest.mark.parametrize("key", [None, b"", b"bob", b"alice ", b"\xff"])
    def test_a_key_that_is_not_the_debit_account_is_named(self, key: bytes | None) -> None:
        """The sender would not learn what to correct."""
        code, _ = misplacement(transfer(), key, 0, 4) or ("", "")
        assert code == "wrong_key"

    def test_a_partition_that_is_not_the_keys_is_named(self) -> None:
        """A producer with another partitioner (librdkafka's default) would split balances."""
        code, text = misplacement(transfer(), b"alice", (partition_of(b"alice", 4) + 1) % 4, 4) or ("", "")
        assert code == "wrong_partition"
        assert "murmur2" in text


class TestKeysOfDecisions:
    """A decision must be found for its own account and id, whatever characters they have."""

    @pytest.mark.parametrize(
        ("account", "transfer_id"), [("a", "b"), ("a/b", "c"), ("3:a", "/"), ("", "1:x"), ("ä", "")]
    )
    def test_both_parts_come_back(self, account: str, transfer_id: str) -> None:
        """The audit would look at another transfer."""
        assert split_decision_key(decision_key(account, transfer_id)) == (account, transfer_id)

    def test_a_separator_inside_of_the_parts_is_no_ambiguity(self) -> None:
        """Somebody's payment would be answered with somebody else's decision."""
        assert decision_key("a/b", "c") != decision_key("a", "b/c")
        assert decision_key("1:a", "b") != decision_key("1", "a/b")


class TestLegs:
    """What a posted transfer leaves behind."""

    def test_a_posted_transfer_has_two_entries_with_running_balances_and_one_result(self) -> None:
        """Statements and answers are what readers see of the ledger."""
        world = World()
        world.transfer(**fields(id="d", debit_account="external:bank", credit_account="alice", amount=150))
        world.run()
        world.transfer(**fields())
        world.run()
        entries = world.decoded("ledger", transfer_id="t1")
        common = {"transfer_id": "t1", "amount": 100, "currency": "EUR"}
        assert {entry["side"]: entry for entry in entries} == {
            "debit": {**common, "account": "alice", "side": "debit", "balance": 50},
            "credit": {**common, "account": "bob", "side": "credit", "balance": 100},
        }
        answer = {"id": "t1", "debit_account": "alice", "status": "posted", "reason": None}
        assert world.decoded("transfer-results", id="t1") == [answer]

    def test_the_same_id_of_two_debit_accounts_is_two_transfers(self) -> None:
        """Two customers who both number their payments from 1 would block each other."""
        world = World()
        for payer in ("external:a", "external:b"):
            world.transfer(**fields(debit_account=payer))
        world.run()
        assert [result["status"] for result in world.decoded("transfer-results")] == ["posted", "posted"]
        assert len(world.decoded("ledger", account="bob", side="credit")) == 2
        assert not world.judge().findings.list()

    def test_an_unknown_account_has_no_funds_and_does_not_come_to_exist(self) -> None:
        """Refused requests would fill the table with empty accounts."""
        world = World()
        world.transfer(**fields())
        world.run(Random(1))
        assert world.decoded("transfer-results")[0]["reason"] == "insufficient_funds"
        assert not any(world.accounts.rows.values())
