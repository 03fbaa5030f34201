"""Whether the ledger kept its promises, judged from the committed records alone.

Independent of the agent on purpose: no rule is imported from it. From the transfers as they lie in Kafka, and from the
answers to them, this works out what every other topic and table must hold, and names what does not fit:

================================== ====================================================================================
lost / repeated / phantom ...      a result, debit, credit or dead letter that is missing, there twice, or from nowhere
wrong answer                       a result that the rules do not permit for its transfer
wrong refusal                      insufficient_funds, although there were funds whenever it may have been decided
wrong entry, wrong balance         a leg with other content; a balance that does not follow from the one before
misplaced                          an entry or row in a partition that is not its account's
overdrawn                          an account of ours below zero
reordered                          debits of an account in another order than their answers
wrong, lost, phantom row           the table of balances is not the fold of the ledger
wrong, forgotten, phantom decision a remembered decision is not the one that was answered
set aside                          a well-formed transfer, or a credit, among the dead letters
unbalanced                         the balances of a currency, with the credits on their way, do not sum to zero
================================== ====================================================================================

What the records cannot settle is left open, never guessed: how debits and credits of an account interleave is read from
the ledger's own order, and past the time for which ids are remembered both answers are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from sys import intern
from typing import TypeVar

import msgspec

from streams_app.evidence import read
from streams_app.partitioning import partition_of
from streams_app.registry import Check, Facts, Observed, check
from tables.ledger import EXTERNAL_PREFIX, Account, Credit, Decision, Entry, Result, Transfer, split_decision_key

T = TypeVar("T")

#: How far, in credits of one account, an entry may be from where it is expected: bounds the work after an anomaly.
_LOOK = 1_000


class _Input(msgspec.Struct, gc=False):
    """A well-formed transfer as it lies in Kafka, and what became of it; slim, as there may be millions."""

    id: str
    credit_account: str
    amount: int
    currency: str
    timestamp_ms: int
    offset: int
    #: Further inputs with this id; kept on the first one only, as are the counters below.
    more: list[_Input] | None = None
    answers: int = 0
    debits: int = 0
    credits: int = 0
    #: Which of the inputs made the decision that is remembered; -1: none did yet.
    deciding: int = -1
    kept: bool = False
    #: Of each input: what was decided when it was (None: no new decision), its place among the account's decisions.
    reason: str | None = None
    posted: bool = False
    position: int = -1
    given: bool = False

    def nth(self, number: int) -> _Input:
        """The first input, or one of the further ones."""
        return self if number == 0 or self.more is None else self.more[number - 1]

    def all(self) -> Iterator[_Input]:
        """This one and the further ones."""
        yield self
        yield from self.more or ()

    def posting(self, number: int) -> _Input | None:
        """The input that was posted as the ``number``-th of them; more than one only where an id was forgotten."""
        if number == 0 and self.posted:
            return self
        posted = [each for each in self.all() if each.posted]
        return posted[number] if number < len(posted) else None

    @property
    def content(self) -> tuple[str, int, str]:
        """What a repetition must equal."""
        return self.credit_account, self.amount, self.currency


class _Account:
    """What is known about one account."""

    __slots__ = ("decided", "incoming", "inputs", "low", "name", "own", "partition", "passed", "shown", "taken")

    def __init__(self, name: str, partition: int) -> None:
        self.name = name
        self.partition = partition
        #: Its transfers, as the debit account, by id.
        self.inputs: dict[str, _Input] = {}
        #: Those that were posted, or refused for lack of funds, in the order of their answers.
        self.decided: list[_Input] = []
        self.passed = 0
        #: Credits on their way to it, in order.
        self.incoming: list[_Input] = []
        self.taken = 0
        #: Currency to balance: the sum of the legs; and as the last entry showed it.
        self.own: dict[str, int] = {}
        self.shown: dict[str, int] = {}
        #: Lowest balance since the last debit, where a credit came since.
        self.low: dict[str, int] = {}

    @property
    def is_external(self) -> bool:
        return self.name.startswith(EXTERNAL_PREFIX)

    def lowest(self, currency: str) -> int:
        """The lowest balance since the last debit."""
        return self.low.get(currency, self.own.get(currency, 0))

    def take(self, transfer_id: str) -> _Input | None:
        """The credit on its way that an entry for ``transfer_id`` gives; None: there is none."""
        for index in range(self.taken, min(self.taken + _LOOK, len(self.incoming))):
            if self.incoming[index].id == transfer_id and not self.incoming[index].given:
                self.taken = index + 1
                return self.incoming[index]
        return next((each for each in self._before() if each.id == transfer_id and not each.given), None)

    def gave(self, transfer_id: str) -> bool:
        """Whether a credit for ``transfer_id`` was given before."""
        return any(each.id == transfer_id for each in self._before())

    def _before(self) -> list[_Input]:
        return self.incoming[max(0, self.taken - _LOOK) : self.taken]


class _Ill:
    """An ill-formed input: the code that its dead letter must have (None: any), and how many it has."""

    __slots__ = ("code", "letters")

    def __init__(self, code: str | None) -> None:
        self.code = code
        self.letters = 0


@check("ledger")
class LedgerCheck(Check):
    """See the module."""

    # Each topic is judged by what the ones before it said.
    topics = ("transfers", "transfer-results", "credits", "ledger", "dead-letters")
    tables = ("accounts", "decisions")

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._accounts: dict[str, _Account] = {}
        self._ill: dict[tuple[int, int], _Ill] = {}
        #: Transfers' partition to the largest timestamp in it.
        self._newest_ms: dict[int, int] = {}
        self._partitions = facts.partitions.get("transfers", 1)
        self._remember_ms = facts.settings.remember_ids_s * 1000
        self._statuses: Counter[str] = Counter()
        self._inputs = 0
        self._balance_rows: set[str] = set()
        self._moved = {"debit": Counter[str](), "credit": Counter[str]()}

    def observe(self, record: Observed) -> None:
        """Take note of a record; see `topics` for the order."""
        match record.topic:
            case "transfers":
                self._observe_transfer(record)
            case "transfer-results":
                self._observe_result(record)
            case "credits":
                self._observe_credit(record)
            case "ledger":
                self._observe_entry(record)
            case "dead-letters":
                self._observe_dead_letter(record)

    # -- transfers

    def _observe_transfer(self, record: Observed) -> None:
        transfer = read(_transfers, record.value)
        newest_ms = max(self._newest_ms.get(record.partition, 0), record.timestamp_ms)
        self._newest_ms[record.partition] = newest_ms
        if transfer is None:
            self._ill[record.partition, record.offset] = _Ill(None)
        elif record.key != transfer.debit_account.encode():
            self._ill[record.partition, record.offset] = _Ill("wrong_key")
        elif partition_of(record.key, self._partitions) != record.partition:
            self._ill[record.partition, record.offset] = _Ill("wrong_partition")
        else:
            self._inputs += 1
            credit_account, currency = intern(transfer.credit_account), intern(transfer.currency)
            # The partition's record time: it never runs backwards.
            each = _Input(transfer.id, credit_account, transfer.amount, currency, newest_ms, record.offset)
            inputs = self._account(transfer.debit_account).inputs
            first = inputs.setdefault(transfer.id, each)
            if first is not each:
                first.more = [*(first.more or ()), each]

    def _account(self, name: str) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = _Account(name, partition_of(name.encode(), self._partitions))
        return account

    def _first_input(self, account: str, transfer_id: str) -> _Input | None:
        known = self._accounts.get(account)
        return known.inputs.get(transfer_id) if known else None

    # -- results

    def _observe_result(self, record: Observed) -> None:
        result = self._read_output(_results, record)
        if result is None:
            return
        self._statuses[result.status] += 1
        first = self._first_input(result.debit_account, result.id)
        if first is None:
            self.findings.add("phantom result", f"{record}: {result.id} of {result.debit_account}")
            return
        number = first.answers
        first.answers += 1
        if number > len(first.more or ()):
            self.findings.add("repeated result", f"{record}: {result.id} of {result.debit_account}")
            return
        self._judge(self._accounts[result.debit_account], first, number, result, record)

    def _judge(self, account: _Account, first: _Input, number: int, result: Result, record: Observed) -> None:
        each = first.nth(number)
        remembered = first.nth(first.deciding) if first.deciding >= 0 else None
        allowed: set[tuple[str, str | None]] = set()
        if remembered is None or self._may_be_forgotten(remembered, each.timestamp_ms):
            allowed |= _new_decisions(account, each)
        if remembered is not None:
            same = remembered.content == each.content
            allowed.add(("exists", remembered.reason) if same else ("rejected", "exists_with_different_content"))
        if (result.status, result.reason) not in allowed:
            got, wanted = _answer(result.status, result.reason), " or ".join(sorted(_answer(*one) for one in allowed))
            where = f"transfers[{account.partition}]@{each.offset}"
            self.findings.add("wrong answer", f"{record}: {result.id} of {where} got {got}, not {wanted}")
            if remembered is not None:
                return
        if result.status == "exists" or result.reason == "exists_with_different_content":
            return
        first.deciding, first.kept = number, False
        each.posted, each.reason = result.status == "posted", result.reason
        if result.reason != "same_account":
            each.position = len(account.decided)
            account.decided.append(each)

    def _may_be_forgotten(self, remembered: _Input, now_ms: int) -> bool:
        return now_ms - remembered.timestamp_ms >= self._remember_ms

    # -- legs

    def _observe_credit(self, record: Observed) -> None:
        credit = self._read_output(_credits, record)
        if credit is None:
            return
        first = self._first_input(credit.debit_account, credit.id)
        posting = first.posting(first.credits) if first else None
        if first is None or posting is None:
            anomaly = "repeated credit" if first and first.credits else "phantom credit"
            self.findings.add(anomaly, f"{record}: {credit.id} of {credit.debit_account}")
            return
        first.credits += 1
        if (credit.credit_account, credit.amount, credit.currency) != posting.content:
            self.findings.add("wrong entry", f"{record}: the credit of {credit.id} is not the transfer's")
        self._check_place(record, credit.credit_account)
        self._account(posting.credit_account).incoming.append(posting)

    def _observe_entry(self, record: Observed) -> None:
        entry = self._read_output(_entries, record)
        if entry is None:
            return
        self._check_place(record, entry.account)
        account = self._account(entry.account)
        leg = self._debit(account, entry, record) if entry.side == "debit" else self._credit(account, entry, record)
        if leg and (leg.amount, leg.currency) != (entry.amount, entry.currency):
            self.findings.add("wrong entry", f"{record}: the {entry.side} of {entry.transfer_id} is not the transfer's")
        self._apply(account, entry, record)

    def _debit(self, account: _Account, entry: Entry, record: Observed) -> _Input | None:
        first = account.inputs.get(entry.transfer_id)
        posting = first.posting(first.debits) if first else None
        if first is None or posting is None:
            anomaly = "repeated debit" if first and first.debits else "phantom debit"
            self.findings.add(anomaly, f"{record}: {entry.transfer_id} of {account.name}")
            return None
        first.debits += 1
        if posting.position < account.passed:
            self.findings.add("reordered", f"{record}: {entry.transfer_id} of {account.name}")
        self._pass_refusals(account, posting.position)
        account.passed = max(account.passed, posting.position + 1)
        return posting

    def _credit(self, account: _Account, entry: Entry, record: Observed) -> _Input | None:
        posting = account.take(entry.transfer_id)
        if posting is None:
            anomaly = "repeated credit" if account.gave(entry.transfer_id) else "phantom credit"
            self.findings.add(anomaly, f"{record}: {entry.transfer_id} to {account.name}")
            return None
        posting.given = True
        return posting

    def _apply(self, account: _Account, entry: Entry, record: Observed) -> None:
        currency, sign = intern(entry.currency), -1 if entry.side == "debit" else 1
        before = account.own.get(currency, 0)
        account.own[currency] = before + sign * entry.amount
        self._moved[entry.side][currency] += entry.amount
        if entry.side == "debit":
            account.low.clear()
        else:
            account.low.setdefault(currency, before)
        expected = account.shown.get(currency, 0) + sign * entry.amount
        if entry.balance != expected:
            self.findings.add(
                "wrong balance", f"{record}: {account.name} {currency} shows {entry.balance}, not {expected}"
            )
        account.shown[currency] = entry.balance
        if not account.is_external and sign < 0 and min(account.own[currency], entry.balance) < 0:
            self.findings.add("overdrawn", f"{record}: {account.name} {currency} is {account.own[currency]}")

    def _pass_refusals(self, account: _Account, position: int) -> None:
        """Judge the refusals answered before the debit at ``position``: funds only grew since the debit before it."""
        for each in account.decided[account.passed : position]:
            if not each.posted and account.lowest(each.currency) >= each.amount:
                self.findings.add(
                    "wrong refusal",
                    f"transfers[{account.partition}]@{each.offset}: {each.id} of {each.amount} {each.currency} "
                    f"refused at a balance of at least {account.lowest(each.currency)}",
                )

    def _check_place(self, record: Observed, account: str) -> None:
        belongs = partition_of(account.encode(), self.facts.partitions.get(record.topic, 1))
        if record.key != account.encode() or record.partition != belongs:
            self.findings.add("misplaced", f"{record}: of {account}, has key {record.key!r}, belongs to {belongs}")

    # -- dead letters

    def _observe_dead_letter(self, record: Observed) -> None:
        topic = record.headers.get("dlq.topic", b"").decode(errors="replace")
        topic = topic.removeprefix(self.facts.settings.kafka_prefix)
        if topic not in {"transfers", "credits"}:
            return
        partition, offset = record.headers.get("dlq.partition", b""), record.headers.get("dlq.offset", b"")
        code = record.headers.get("dlq.error", b"").decode(errors="replace")
        where = f"{record}: {topic}[{partition.decode()}]@{offset.decode()} as {code}"
        ill = self._ill.get((int(partition), int(offset))) if partition.isdigit() and offset.isdigit() else None
        if topic == "credits" or ill is None:
            self.findings.add("set aside", where)
            return
        ill.letters += 1
        if ill.letters > 1:
            self.findings.add("repeated dead letter", where)
        elif ill.code not in {None, code}:
            self.findings.add("wrong answer", f"{where}, not as {ill.code}")

    # -- tables

    def row(self, table: str, partition: int, key: bytes, value: bytes) -> None:
        """Compare a row of the tables with what the ledger and the results say."""
        if table == "accounts":
            self._account_row(partition, key.decode(), _account_rows.decode(value))
        else:
            self._decision_row(partition, key.decode(), _decision_rows.decode(value))

    def _account_row(self, partition: int, name: str, row: Account) -> None:
        account = self._accounts.get(name)
        self._balance_rows.add(name)
        if account is None or not account.own:
            self.findings.add("phantom row", f"accounts[{partition}]: {name} has no entry in the ledger")
        elif row.balances != account.own:
            self.findings.add(
                "wrong row", f"accounts[{partition}]: {name} has {row.balances}, the ledger {account.own}"
            )
        elif account.partition != partition:
            self.findings.add("misplaced", f"accounts[{partition}]: {name} belongs to {account.partition}")

    def _decision_row(self, partition: int, key: str, row: Decision) -> None:
        name, transfer_id = split_decision_key(key)
        first = self._first_input(name, transfer_id)
        if first is None or first.deciding < 0:
            self.findings.add("phantom decision", f"decisions[{partition}]: {key} was never answered")
            return
        first.kept = True
        decided = first.nth(first.deciding)
        kept = (row.credit_account, row.amount, row.currency)
        status = "posted" if decided.posted else "rejected"
        if kept != decided.content or (row.status, row.reason) != (status, decided.reason):
            self.findings.add("wrong decision", f"decisions[{partition}]: {key} is kept as {row}")

    # -- conclusions

    def finish(self) -> None:
        """Look for what is missing, and sum up."""
        for account in self._accounts.values():
            self._pass_refusals(account, len(account.decided))
            for each in account.inputs.values():
                self._finish_input(account, each)
            if account.own and account.name not in self._balance_rows:
                self.findings.add("lost row", f"accounts: {account.name} has {account.own} in the ledger")
        for (partition, offset), ill in self._ill.items():
            if not ill.letters:
                self._missing("dead letter", f"transfers[{partition}]@{offset} is ill-formed")
        self._finish_money()

    def _finish_input(self, account: _Account, first: _Input) -> None:
        where = f"transfers[{account.partition}]@{first.offset}: {first.id} of {account.name}"
        if first.answers < 1 + len(first.more or ()):
            self._missing("result", where)
        # Debit, credit and answer are of one transaction, so these are lost even while others are on their way.
        if first.posting(first.debits) is not None:
            self.findings.add("lost debit", where)
        if first.posting(first.credits) is not None:
            self.findings.add("lost credit", where)
        if first.deciding >= 0 and not first.kept:
            newest_ms = self._newest_ms[account.partition]
            if not self._may_be_forgotten(first.nth(first.deciding), newest_ms):
                self.findings.add("forgotten decision", where)

    def _missing(self, what: str, where: str) -> None:
        # Not lost as long as the input may yet be consumed; that it is not is the audit's own finding.
        if self.facts.at_rest:
            self.findings.add(f"lost {what}", where)

    def _finish_money(self) -> None:
        sums: Counter[str] = Counter()
        on_the_way: Counter[str] = Counter()
        for account in self._accounts.values():
            sums.update(account.own)
            for each in account.incoming:
                if not each.given:
                    on_the_way[each.currency] += each.amount
                    self._missing("credit", f"{each.id} to {account.name}: debited, never credited")
        for currency in sorted(sums.keys() | on_the_way.keys()):
            total = sums[currency] + on_the_way[currency]
            if total != 0:
                self.findings.add("unbalanced", f"{currency}: balances and credits on their way sum to {total}")
            debits, credits_ = (self._moved[side][currency] for side in ("debit", "credit"))
            if self.facts.at_rest and debits != credits_:
                self.findings.add("unbalanced", f"{currency}: debits of {debits}, credits of {credits_}")
        self._sum_up(sums, on_the_way)

    def _sum_up(self, sums: Counter[str], on_the_way: Counter[str]) -> None:
        found = self.findings.list()
        self.figures = {
            "transfers": self._inputs,
            "posted": self._statuses["posted"],
            "rejected": self._statuses["rejected"],
            "exists": self._statuses["exists"],
            "ill-formed": len(self._ill),
            "accounts": len(self._balance_rows),
            "lost": sum(each.count for each in found if each.anomaly.startswith(("lost", "forgotten"))),
            "repeated": sum(each.count for each in found if each.anomaly.startswith("repeated")),
            "sum": dict(sorted(sums.items())),
            "on their way": {currency: amount for currency, amount in sorted(on_the_way.items()) if amount},
            "volume": dict(sorted(self._moved["debit"].items())),
        }

    def _read_output(self, decoder: msgspec.json.Decoder[T], record: Observed) -> T | None:
        value = read(decoder, record.value)
        if value is None:
            self.findings.add("phantom output", f"{record} is not of the form that we write")
        return value


def _new_decisions(account: _Account, each: _Input) -> set[tuple[str, str | None]]:
    """The answers that are right for an id that is not remembered; whether funds sufficed, the ledger tells."""
    if account.name == each.credit_account:
        return {("rejected", "same_account")}
    if account.is_external:
        return {("posted", None)}
    return {("posted", None), ("rejected", "insufficient_funds")}


def _answer(status: str, reason: str | None) -> str:
    return f"{status} ({reason})" if reason else status


_transfers = msgspec.json.Decoder(Transfer)
_credits = msgspec.json.Decoder(Credit)
_entries = msgspec.json.Decoder(Entry)
_results = msgspec.json.Decoder(Result)
_account_rows = msgspec.json.Decoder(Account)
_decision_rows = msgspec.json.Decoder(Decision)
