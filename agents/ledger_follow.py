"""Whether the ledger keeps its promises, judged while money moves (``audit --follow``).

Independent of the agent on purpose, as its check is: no rule is imported from it. Read are the three outputs alone::

    one transaction, of the debit:   result (posted) + debit entry + credit message     legs of a transfer
    a later one, of the credit:      credit entry                                       gives what was on its way

============= ======================================================================================================
vanished      taken from an account and neither given nor on its way: a debit without its credit message, or a credit
              message that was consumed without its entry
appeared      given, or on its way, and taken from nobody: a credit message without its debit, a credit entry without
              (another) credit message
torn          legs that came alone, though the money is right: a debit and its credit without result, a result alone
repeated      a transfer posted again within the time for which ids are remembered
wrong balance an entry whose balance does not follow from the last one of its account and currency
overdrawn     a debit that left an account of ours below zero
misplaced     an entry whose key is not its account, or in another partition than the account's last one
unbalanced    the balances of a currency, and what is on its way, do not sum to zero (said at each change)
unreadable    a record that does not have its form
============= ======================================================================================================

What is missing is judged at cuts, without any clock (`streams_app.follow`). That a credit is on its way for long is a figure;
it is lost when its group has committed past it and its entry is not there.

Where the beginning of a topic was deleted, balances of accounts first seen are taken from their first entry, what may have
lost its counterpart to the deletion is believed, and sums are relative to that. Repetitions are told by the time of the
results, not by that of the input: past a backlog as long as ids are remembered, a transfer that was forgotten by right is
called repeated.

Memory, by the first byte of its keys:

===== ====================================== ========================================================================
``b`` currency, account                      partition and balance of its last entry
``l`` debit account and id                   `_Legs` that are not complete
``w`` credit account and id                  `_Way`: credit messages without entry, entries without message
``m`` partition and offset of a message      its time, and the key of its ``w``: the messages of a partition in order
``j`` cut, ``l`` or ``w``, and their key     what to judge once a cut above this one is reached
``i`` period, digest of debit account and id time of a posted transfer; a period, and with it two, are the time of memory
``t`` nothing                                `_Totals`
===== ====================================== ========================================================================
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import msgspec

from streams_app.evidence import read
from streams_app.registry import JUDGED_AT_ONCE, Cut, Followed, Follower, Observed, due, follower, taken_due
from tables.ledger import EXTERNAL_PREFIX, Credit, Entry, Result

T = TypeVar("T")

#: Header of a credit that `dead-letters replay` sent back: its debit was taken when it first came.
_REPLAYED = "dlq.replayed"
_DIGEST_BYTES = 16
_NEVER_MS = 1 << 62


class _Legs(msgspec.Struct, array_like=True):
    """Legs of one transfer of which others are missing."""

    results: int = 0
    debits: int = 0
    credits: int = 0
    #: Currency to what was sent on its way less what was taken.
    surplus: dict[str, int] = {}
    #: The newest of them, and one of them for people (text, once it is kept).
    at_ms: int = 0
    example: Any = ""
    #: The cut in progress when they were last added to.
    cut: int = 0

    def add(self, other: _Legs) -> None:
        """Take over the legs of another."""
        self.results += other.results
        self.debits += other.debits
        self.credits += other.credits
        for currency, amount in other.surplus.items():
            self.surplus[currency] = self.surplus.get(currency, 0) + amount
        self.at_ms = max(self.at_ms, other.at_ms)
        self.cut = max(self.cut, other.cut)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.results == self.debits == self.credits and not any(self.surplus.values())


class _Message(msgspec.Struct, array_like=True):
    """A credit message."""

    amount: int
    currency: str
    partition: int
    offset: int
    at_ms: int


class _Given(msgspec.Struct, array_like=True):
    """A credit entry; place in the ledger."""

    amount: int
    currency: str
    partition: int
    offset: int
    at_ms: int
    cut: int


class _Way(msgspec.Struct, array_like=True):
    """Credits of one account and transfer id: messages without entry, and entries without message."""

    messages: list[_Message] = []
    given: list[_Given] = []


class _Totals(msgspec.Struct):
    """Sums since the beginning; by currency where they are of money."""

    entries: int = 0
    posted: int = 0
    #: Sum of the balances as shown, less those of accounts that were not seen from their beginning.
    balances: dict[str, int] = {}
    #: Messages without entry; entries without message.
    waiting: int = 0
    on_their_way: dict[str, int] = {}
    given_early: dict[str, int] = {}
    #: Of the incomplete legs: what was sent on its way less what was taken.
    surplus: dict[str, int] = {}
    #: The sums as they were last found.
    residue: dict[str, int] = {}
    #: Partition of the ledger to the first entry in it whose credit message was seen.
    matched: dict[str, int] = {}
    #: Newest period of the remembered ids; oldest one that is still there.
    period: int = 0
    oldest_period: int = 0


class _Chunk(NamedTuple):
    """A chunk by topic, decoded."""

    results: list[tuple[Result, Observed]]
    credits: list[tuple[Credit, Observed]]
    entries: list[tuple[Entry, Observed]]


@follower("ledger")
class LedgerFollower(Follower):
    """See the module."""

    topics = ("transfer-results", "credits", "ledger")

    def __init__(self, followed: Followed) -> None:
        super().__init__(followed)
        stored = self.memory.get([b"t"]).get(b"t")
        self._totals = _totals.decode(stored) if stored else _Totals()
        self._remember_ms = followed.settings.remember_ids_s * 1000
        self._truncated = any(followed.starts.values())
        #: As of the last cut.
        self._oldest_ms = 0
        self._legs: dict[bytes, _Legs] = {}
        self._ways: dict[bytes, _Way] = {}

    # -- chunks

    def observe(self, records: Sequence[Observed]) -> None:
        """Take note of a chunk."""
        chunk = self._decoded(records)
        self._legs, self._ways = {}, {}
        for result, record in chunk.results:
            self._leg(result.debit_account, result.id, record).results += 1
        for credit, record in chunk.credits:
            self._credit(credit, record)
        for entry, record in chunk.entries:
            self._entry(entry, record)
        self._balances(chunk.entries)
        self._repetitions(chunk.results)
        self._keep_legs()
        self._keep_ways()
        self._totals.posted += len(chunk.results)
        self._totals.entries += len(chunk.entries)
        self._keep_totals()

    def _decoded(self, records: Sequence[Observed]) -> _Chunk:
        chunk = _Chunk([], [], [])
        for record in records:
            if record.topic == "ledger":
                entry = self._read(_entries, record)
                if entry is not None:
                    chunk.entries.append((entry, record))
            elif record.topic == "credits":
                credit = self._read(_credits, record)
                if credit is not None:
                    chunk.credits.append((credit, record))
            else:
                result = self._read(_results, record)
                if result is not None and result.status == "posted":
                    chunk.results.append((result, record))
        return chunk

    def _read(self, decoder: msgspec.json.Decoder[T], record: Observed) -> T | None:
        value = read(decoder, record.value)
        if value is None:
            self.memory.report("unreadable", f"{record} is not of the form that we write")
        return value

    def _leg(self, account: str, transfer_id: str, record: Observed) -> _Legs:
        key = f"l{len(account)}:{account}/{transfer_id}".encode()
        legs = self._legs.get(key)
        if legs is None:
            legs = self._legs[key] = _Legs(0, 0, 0, {}, record.timestamp_ms, "", self.memory.cut)
            legs.example = record
        return legs

    def _credit(self, credit: Credit, record: Observed) -> None:
        amount, currency = credit.amount, credit.currency
        if _REPLAYED not in record.headers:
            legs = self._leg(credit.debit_account, credit.id, record)
            legs.credits += 1
            legs.surplus[currency] = legs.surplus.get(currency, 0) + amount
        message = _Message(amount, currency, record.partition, record.offset, record.timestamp_ms)
        self._way(credit.credit_account, credit.id).messages.append(message)

    def _entry(self, entry: Entry, record: Observed) -> None:
        amount, currency = entry.amount, entry.currency
        if entry.side == "debit":
            legs = self._leg(entry.account, entry.transfer_id, record)
            legs.debits += 1
            legs.surplus[currency] = legs.surplus.get(currency, 0) - amount
        else:
            given = _Given(amount, currency, record.partition, record.offset, record.timestamp_ms, self.memory.cut)
            self._way(entry.account, entry.transfer_id).given.append(given)

    def _way(self, account: str, transfer_id: str) -> _Way:
        key = f"w{len(account)}:{account}/{transfer_id}".encode()
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = _Way([], [])
        return way

    # -- balances

    def _balances(self, entries: Sequence[tuple[Entry, Observed]]) -> None:
        """Each entry's balance follows from the one before; in the order of the account's partition."""
        keys = [f"b{entry.currency}{entry.account}".encode() for entry, _ in entries]
        stored = self.memory.get(set(keys))
        known = {key: tuple(map(int, value.split())) for key, value in stored.items()}
        sums: Counter[str] = Counter()
        for key, (entry, record) in zip(keys, entries, strict=True):
            change = -entry.amount if entry.side == "debit" else entry.amount
            partition, before = known.get(key) or self._opening(entry, record, change)
            if entry.balance != before + change or partition != record.partition:
                self._wrong_entry(entry, record, partition, before + change)
            if change < 0 and entry.balance < 0 and not entry.account.startswith(EXTERNAL_PREFIX):
                self.memory.report("overdrawn", f"{record}: {entry.account} {entry.currency} is {entry.balance}")
            if record.key != entry.account.encode():
                self.memory.report("misplaced", f"{record}: of {entry.account}, has key {record.key!r}")
            sums[entry.currency] += entry.balance - before
            known[key] = (record.partition, entry.balance)
        for key in set(keys):
            partition, balance = known[key]
            self.memory.put(key, b"%d %d" % (partition, balance))
        _add(self._totals.balances, sums, keep=True)

    def _opening(self, entry: Entry, record: Observed, change: int) -> tuple[int, int]:
        """Partition and balance of an account before the first entry that we see of it."""
        truncated = self.followed.starts.get((record.topic, record.partition), 0) > 0
        return record.partition, entry.balance - change if truncated else 0

    def _wrong_entry(self, entry: Entry, record: Observed, partition: int, expected: int) -> None:
        where = f"{record}: {entry.account} {entry.currency}"
        if partition != record.partition:
            self.memory.report("misplaced", f"{where} had its last entry in partition {partition}")
        if entry.balance != expected:
            self.memory.report(
                "wrong balance", f"{where} shows {entry.balance} after a {entry.side} of {entry.amount}, not {expected}"
            )

    # -- repeated ids

    def _repetitions(self, results: Sequence[tuple[Result, Observed]]) -> None:
        """No transfer is posted twice within the time of memory."""
        if not results:
            return
        now_ms = int(time.time() * 1000)
        asked = []
        for result, record in results:
            # A clock that runs ahead does not make us forget the ids of today.
            period = min(record.timestamp_ms, now_ms) // self._remember_ms
            name = f"{len(result.debit_account)}:{result.debit_account}/{result.id}".encode()
            digest = blake2b(name, digest_size=_DIGEST_BYTES).digest()
            asked.append((_in_period(period, digest), _in_period(period - 1, digest), period))
        known = self.memory.get({key for now, before, _ in asked for key in (now, before)})
        for (now, before, period), (result, record) in zip(asked, results, strict=True):
            times = (int.from_bytes(known[key]) for key in (now, before) if key in known)
            last_ms = max(times, default=-_NEVER_MS)
            if abs(record.timestamp_ms - last_ms) < self._remember_ms:
                text = f"{record}: {result.id} of {result.debit_account} was posted {record.timestamp_ms - last_ms} ms before"
                self.memory.report("repeated", text)
            known[now] = max(0, record.timestamp_ms).to_bytes(8)
            self.memory.put(now, known[now])
            self._totals.period = max(self._totals.period, period)
        self._forget_ids()

    def _forget_ids(self) -> None:
        totals = self._totals
        if totals.oldest_period < totals.period - 1:
            self.memory.drop(_in_period(totals.oldest_period, b""), _in_period(totals.period - 1, b""))
            totals.oldest_period = totals.period - 1

    # -- what is not complete

    def _keep_legs(self) -> None:
        """Put what this chunk leaves incomplete together with what earlier ones did."""
        fresh = {key: legs for key, legs in self._legs.items() if not legs.complete}
        for legs in fresh.values():
            legs.example = str(legs.example)
        stored = self.memory.get(fresh)
        for key, legs in fresh.items():
            _add(self._totals.surplus, legs.surplus)
            value = stored.get(key)
            if value is not None:
                before = _legs.decode(value)
                self.memory.put(due(before.cut, key), None)
                before.add(legs)
                legs = before  # noqa: PLW2901 - from here on they are one
            if legs.complete:
                self.memory.put(key, None)
            else:
                self.memory.put(key, _encode(legs))
                self.memory.put(due(legs.cut, key), b"")

    def _keep_ways(self) -> None:
        fresh = {key: way for key, way in self._ways.items() if not self._match(way)}
        stored = self.memory.get(fresh)
        for key, way in fresh.items():
            value = stored.get(key)
            before = _ways.decode(value) if value is not None else _Way([], [])
            now = _Way(before.messages + way.messages, before.given + way.given)
            self._match(now)
            self._keep_way(key, before, now)

    def _match(self, way: _Way) -> bool:
        """Take out entries with their messages; whether nothing is left."""
        left = []
        for given in way.given:
            for index, message in enumerate(way.messages):
                if message.amount == given.amount and message.currency == given.currency:
                    del way.messages[index]
                    if self._truncated:
                        matched, partition = self._totals.matched, str(given.partition)
                        matched[partition] = min(given.offset, matched.get(partition, given.offset))
                    break
            else:
                left.append(given)
        way.given = left
        return not left and not way.messages

    def _keep_way(self, key: bytes, before: _Way, now: _Way) -> None:
        """Replace what is kept under ``key``, and the totals with it."""
        totals, put = self._totals, self.memory.put
        # Each place is put twice where a message stays: the later one counts.
        for sign, way in ((-1, before), (1, now)):
            totals.waiting += sign * len(way.messages)
            for message in way.messages:
                currency = message.currency
                totals.on_their_way[currency] = totals.on_their_way.get(currency, 0) + sign * message.amount
                at_ms = message.at_ms.to_bytes(8, signed=True)
                put(_place(message.partition, message.offset), at_ms + key if sign > 0 else None)
            for given in way.given:
                currency = given.currency
                totals.given_early[currency] = totals.given_early.get(currency, 0) + sign * given.amount
                put(due(given.cut, key), b"" if sign > 0 else None)
        self.memory.put(key, _encode(now) if now.messages or now.given else None)

    def _keep_totals(self) -> None:
        self.memory.put(b"t", _encode(self._totals))

    # -- cuts

    def cut(self, cut: Cut) -> None:
        """Judge what is still incomplete, and the sums."""
        for key, value in taken_due(self.memory, cut).items():
            if key[:1] == b"l":
                self._judge_legs(key, _legs.decode(value), cut)
            else:
                self._judge_given(key, _ways.decode(value), cut)
        self._judge_messages(cut)
        self._judge_sums()
        self._keep_totals()

    def _judge_legs(self, key: bytes, legs: _Legs, cut: Cut) -> None:
        if legs.cut >= cut.number:
            return  # they were added to since: judged at the next one
        self.memory.put(key, None)
        _add(self._totals.surplus, legs.surplus, -1)
        if legs.at_ms <= cut.horizon_ms:
            # Believed: what is missing may have been deleted before we came.
            _add(self._totals.balances, legs.surplus, -1)
            return
        came = f"{legs.results} results, {legs.debits} debits, {legs.credits} credits on their way"
        lacking = [f"{-amount} {currency} less" for currency, amount in legs.surplus.items() if amount < 0]
        excess = [f"{amount} {currency} more" for currency, amount in legs.surplus.items() if amount > 0]
        if not lacking and not excess:
            self.memory.report("torn", f"{_named(key)}, {legs.example} came as {came}")
        if lacking:
            self.memory.report(
                "vanished", f"{_named(key)}, {legs.example}: {', '.join(lacking)} sent than taken ({came})"
            )
        if excess:
            self.memory.report(
                "appeared", f"{_named(key)}, {legs.example}: {', '.join(excess)} sent than taken ({came})"
            )

    def _judge_given(self, key: bytes, way: _Way, cut: Cut) -> None:
        """Entries without message, and not for want of reading."""
        stay = [given for given in way.given if given.cut >= cut.number]
        gone = [given for given in way.given if given.cut < cut.number]
        if not gone:
            return
        self._keep_way(key, _Way([], way.given), _Way([], stay))
        # Messages are as they were.
        self.memory.put(key, _encode(_Way(way.messages, stay)) if way.messages or stay else None)
        for given in gone:
            if self._is_of_before(given):
                _add(self._totals.balances, {given.currency: -given.amount})
                continue
            text = (
                f"ledger[{given.partition}]@{given.offset}: a credit of {given.amount} {given.currency}, {_named(key)}"
            )
            self.memory.report("appeared", f"{text}, and none is on its way: given twice, or from nowhere")

    def _is_of_before(self, given: _Given) -> bool:
        """Whether its message may have been deleted before we came.

        Credits of a partition are given in order, and their entries lie in the partition of the same number.
        """
        if not self.followed.starts.get(("credits", given.partition), 0):
            return False
        return given.offset < self._totals.matched.get(str(given.partition), _NEVER_MS)

    def _judge_messages(self, cut: Cut) -> None:
        """Messages that were consumed before the cut have their entries before it, too."""
        self._oldest_ms = 0
        for partition in range(self.followed.partitions.get("credits", 0)):
            consumed = cut.committed.get(("credits", partition), 0)
            lost: list[bytes] = []
            found = self.memory.scan(_place(partition, 0), _place(partition + 1, 0))
            for place, value in islice(found, JUDGED_AT_ONCE):
                if int.from_bytes(place[5:]) >= consumed:
                    at_ms = int.from_bytes(value[:8], signed=True)
                    self._oldest_ms = min(self._oldest_ms or at_ms, at_ms)
                    break
                lost.append(value[8:])
            self._lose(partition, consumed, lost, cut)

    def _lose(self, partition: int, consumed: int, keys: Iterable[bytes], cut: Cut) -> None:
        for key, value in self.memory.get(set(keys)).items():
            before = _ways.decode(value)
            lost = [each for each in before.messages if each.partition == partition and each.offset < consumed]
            left = [each for each in before.messages if each not in lost]
            self._keep_way(key, before, _Way(left, before.given))
            for message in lost:
                if message.at_ms <= cut.horizon_ms:
                    _add(self._totals.balances, {message.currency: message.amount})
                    continue
                where = f"credits[{partition}]@{message.offset}"
                what = f"{where}: a credit of {message.amount} {message.currency}, {_named(key)}"
                self.memory.report(
                    "vanished", f"{what}, was consumed and not given (lost, or set aside as a dead letter)"
                )

    def _judge_sums(self) -> None:
        """Balances and credits on their way sum to zero, but for the transactions that the cut goes through."""
        totals = self._totals
        residue = self._residue()
        for currency, amount in residue.items():
            if amount and amount != totals.residue.get(currency, 0):
                text = f"{currency}: balances and credits on their way sum to {amount}"
                self.memory.report("unbalanced", f"{text}, up to now to {totals.residue.get(currency, 0)}")
        totals.residue = residue

    def _residue(self) -> dict[str, int]:
        totals = self._totals
        parts = (totals.balances, 1), (totals.on_their_way, 1), (totals.given_early, -1), (totals.surplus, -1)
        residue: dict[str, int] = {}
        for amounts, sign in parts:
            _add(residue, amounts, sign, keep=True)
        return residue

    def figures(self) -> Mapping[str, int | Mapping[str, int]]:
        """See `Follower.figures`; amounts in minor units by currency, sums as of the last cut."""
        totals = self._totals
        oldest_ms = max(0, int(time.time() * 1000) - self._oldest_ms) if self._oldest_ms else 0
        return {
            "entries_total": totals.entries,
            "posted_total": totals.posted,
            "sum": totals.residue,
            "on_their_way": totals.on_their_way,
            "credits_on_their_way": totals.waiting,
            "oldest_on_its_way_s": oldest_ms // 1000,
        }


def _add(sums: dict[str, int], amounts: Mapping[str, int], sign: int = 1, *, keep: bool = False) -> None:
    """Add to the sums; those of 0 go, unless they are to be kept."""
    for currency, amount in amounts.items():
        total = sums.get(currency, 0) + sign * amount
        if total or keep:
            sums[currency] = total
        else:
            sums.pop(currency, None)


def _in_period(period: int, digest: bytes) -> bytes:
    return b"i" + max(0, period).to_bytes(8) + digest


def _place(partition: int, offset: int) -> bytes:
    return b"m" + partition.to_bytes(4) + offset.to_bytes(8)


def _named(key: bytes) -> str:
    """For people: the id and the account of a key."""
    length, _, rest = key[1:].decode().partition(":")
    return f"{rest[int(length) + 1 :]} {'of' if key[:1] == b'l' else 'to'} {rest[: int(length)]}"


_results = msgspec.json.Decoder(Result)
_credits = msgspec.json.Decoder(Credit)
_entries = msgspec.json.Decoder(Entry)
# JSON: balances and sums pass 64 bits.
_encode = msgspec.json.Encoder().encode
_totals = msgspec.json.Decoder(_Totals)
_legs = msgspec.json.Decoder(_Legs)
_ways = msgspec.json.Decoder(_Way)
