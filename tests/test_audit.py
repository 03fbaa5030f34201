"""The audit: a good history passes, and whatever is broken on purpose is seen and named.

A checker that cannot fail proves nothing, so most tests here break something.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console

from agents.ledger_check import LedgerCheck
from agents.ledger_input import transfers
from streams_app.application import App
from streams_app.audit import (
    AuditedApp,
    AuditedTable,
    Change,
    Report,
    Section,
    StoreCopy,
    audit,
    audited_family,
    compare,
    guarantee_of,
)
from streams_app.claims import Claim
from streams_app.kafka import KafkaAddress
from streams_app.registry import Check, Facts, Finding, Findings, Observed
from streams_app.settings import Settings
from streams_app.store import Store, store_path
from tables.ledger import Account
from tests.ledger_world import PARTITIONS, World

Break = Callable[[World], None]


def good_world(count: int = 600) -> World:
    world = World()
    world.write(islice(transfers(Random("audit"), 30, ill_formed=0.03), count))
    world.run(Random(5))
    return world


def anomalies(check: LedgerCheck) -> set[str]:
    return {finding.anomaly for finding in check.findings.list()}


def find(world: World, topic: str, **which: Any) -> tuple[list[Observed], int]:
    """The log and the index in it of a record from the middle whose value has all of ``which``."""
    found = [
        (log, index)
        for log in world.topics[topic]
        for index, record in enumerate(log)
        if topic == "dead-letters" or which.items() <= json.loads(record.value or b"{}").items()
    ]
    return found[len(found) // 2]


def drop(topic: str, **which: Any) -> Break:
    def breaking(world: World) -> None:
        log, index = find(world, topic, **which)
        del log[index]

    return breaking


def repeat(topic: str, **which: Any) -> Break:
    def breaking(world: World) -> None:
        log, index = find(world, topic, **which)
        log.insert(index + 1, log[index])

    return breaking


def change(topic: str, changes: dict[str, Any], **which: Any) -> Break:
    def breaking(world: World) -> None:
        log, index = find(world, topic, **which)
        value = {**json.loads(log[index].value or b""), **changes}
        log[index] = log[index]._replace(value=json.dumps(value).encode())

    return breaking


def move(topic: str, **which: Any) -> Break:
    def breaking(world: World) -> None:
        log, index = find(world, topic, **which)
        record = log.pop(index)
        other = (record.partition + 1) % PARTITIONS
        world.topics[topic][other].append(record._replace(partition=other))

    return breaking


def change_balance(world: World) -> None:
    rows = world.accounts.rows[1]
    name, row = next(iter(rows.items()))
    rows[name] = Account({**row.balances, "EUR": row.balance("EUR") + 1})


def tombstone(table: str) -> Break:
    def breaking(world: World) -> None:
        rows = getattr(world, table).rows[2]
        del rows[next(iter(rows))]

    return breaking


def invent(table: str, key: str) -> Break:
    def breaking(world: World) -> None:
        rows = getattr(world, table).rows[2]
        rows[key] = next(iter(rows.values()))

    return breaking


def swap_decision(world: World) -> None:
    rows = world.decisions.rows[2]
    first, second = list(rows)[:2]
    rows[first] = msgspec.structs.replace(rows[first], amount=rows[second].amount + 1)


def pay_twice(world: World) -> None:
    """As a transaction of which everything took effect twice but the input."""
    result_log, index = find(world, "transfer-results", status="posted")
    result_log.insert(index + 1, result_log[index])
    result = json.loads(result_log[index].value or b"")
    log, index = find(world, "ledger", transfer_id=result["id"], side="debit")
    entry = json.loads(log[index].value or b"")
    entry["balance"] -= entry["amount"]
    log.insert(index + 1, log[index]._replace(value=json.dumps(entry).encode()))


def set_a_good_one_aside(world: World) -> None:
    aside = {record.value for record in world.all("dead-letters")}
    record = next(record for record in world.all("transfers") if record.value not in aside)
    headers = {
        "dlq.topic": b"transfers",
        "dlq.partition": b"%d" % record.partition,
        "dlq.offset": b"%d" % record.offset,
    }
    world.append("dead-letters", record.key, record.value, headers=headers)


def from_nowhere(topic: str) -> Break:
    def breaking(world: World) -> None:
        log, index = find(world, topic)
        value = json.loads(log[index].value or b"")
        for name in ("id", "transfer_id"):
            if name in value:
                value[name] = "from nowhere"
        log.append(log[index]._replace(value=json.dumps(value).encode()))

    return breaking


BROKEN: dict[str, tuple[Break, set[str]]] = {
    "a debit is lost": (drop("ledger", side="debit"), {"lost debit", "wrong balance", "unbalanced", "wrong row"}),
    "a credit is lost": (drop("ledger", side="credit"), {"lost credit", "wrong balance", "wrong row"}),
    "a credit never left": (drop("credits"), {"lost credit"}),
    "a debit is taken twice": (repeat("ledger", side="debit"), {"repeated debit", "wrong balance", "unbalanced"}),
    "a credit is given twice": (repeat("ledger", side="credit"), {"repeated credit", "wrong balance", "unbalanced"}),
    "a credit leaves twice": (repeat("credits"), {"repeated credit"}),
    "a result is lost": (drop("transfer-results", status="posted"), {"lost result", "phantom credit"}),
    "a refusal is lost": (drop("transfer-results", reason="insufficient_funds"), {"lost result"}),
    "a result comes twice": (repeat("transfer-results", status="rejected"), {"repeated result"}),
    "a transfer takes effect twice": (pay_twice, {"repeated result", "repeated debit", "unbalanced", "wrong row"}),
    "a repetition is posted": (change("transfer-results", {"status": "posted"}, status="exists"), {"wrong answer"}),
    "a conflict is accepted": (
        change("transfer-results", {"status": "exists", "reason": None}, reason="exists_with_different_content"),
        {"wrong answer"},
    ),
    "a refusal has another reason": (
        change("transfer-results", {"reason": "insufficient_funds"}, reason="same_account"),
        {"wrong answer"},
    ),
    "a posted transfer is said to be refused": (
        change("transfer-results", {"status": "rejected", "reason": "insufficient_funds"}, status="posted"),
        {"phantom debit", "phantom credit"},
    ),
    "an entry has another amount": (change("ledger", {"amount": 1}, side="credit"), {"wrong entry", "wrong balance"}),
    "a credit has another amount": (change("credits", {"amount": 1}), {"wrong entry"}),
    "an entry shows another balance": (change("ledger", {"balance": 7}), {"wrong balance"}),
    "an entry lies in another partition": (move("ledger", side="credit"), {"misplaced"}),
    "an entry is from nowhere": (from_nowhere("ledger"), {"wrong balance"}),
    "a result is from nowhere": (from_nowhere("transfer-results"), {"phantom result"}),
    "a credit is from nowhere": (from_nowhere("credits"), {"phantom credit"}),
    "a result is not readable": (change("transfer-results", {"status": "perhaps"}), {"phantom output"}),
    "a dead letter is lost": (drop("dead-letters"), {"lost dead letter"}),
    "a dead letter comes twice": (repeat("dead-letters"), {"repeated dead letter"}),
    "a good transfer is set aside": (set_a_good_one_aside, {"set aside"}),
    "a balance changes in the table": (change_balance, {"wrong row"}),
    "a balance is deleted": (tombstone("accounts"), {"lost row"}),
    "a balance is invented": (invent("accounts", "nobody"), {"phantom row"}),
    "a decision is deleted": (tombstone("decisions"), {"forgotten decision"}),
    "a decision is invented": (invent("decisions", "6:nobody/1"), {"phantom decision"}),
    "a decision changes": (swap_decision, {"wrong decision"}),
}


class TestLedgerCheck:
    """What the check of the ledger sees."""

    def test_a_good_history_passes_with_its_figures(self) -> None:
        """The audit would cry wolf."""
        world = good_world()
        check = world.judge()
        assert check.findings.list() == []
        figures = check.figures
        assert figures["transfers"] + figures["ill-formed"] == 600
        assert figures["posted"] + figures["rejected"] + figures["exists"] == figures["transfers"]
        assert figures["exists"] > 0 < figures["ill-formed"]
        assert set(figures["sum"].values()) == {0}
        assert figures["on their way"] == {}

    @pytest.mark.parametrize("what", BROKEN)
    def test_what_is_broken_on_purpose_is_seen(self, what: str) -> None:
        """A lost or doubled payment would go unseen, and the verdict would be worth nothing."""
        world = good_world()
        breaking, expected = BROKEN[what]
        breaking(world)
        assert expected <= anomalies(world.judge())

    def test_a_refusal_in_spite_of_funds_is_seen(self) -> None:
        """An engine that reads old balances would refuse payments, and nobody would notice."""
        world = World()
        base = {"amount": 100, "currency": "EUR"}
        world.transfer(id="d", debit_account="external:bank", credit_account="alice", **base)
        world.run()
        world.transfer(id="1", debit_account="alice", credit_account="bob", **base)
        rows, world.accounts.rows = world.accounts.rows, World().accounts.rows
        world.run()
        world.accounts.rows = rows
        # All that is wrong is the answer: no entry was written for it.
        assert world.decoded("transfer-results", id="1")[0]["reason"] == "insufficient_funds"
        # Its funds came in after no debit, so the time of the refusal is not settled; one more debit settles it.
        assert anomalies(world.judge()) == set()
        world.transfer(id="2", debit_account="alice", credit_account="bob", amount=1, currency="EUR")
        world.run()
        world.transfer(id="3", debit_account="alice", credit_account="bob", amount=99, currency="EUR")
        world.accounts.rows, rows = World().accounts.rows, world.accounts.rows
        world.run()
        world.accounts.rows = rows
        assert anomalies(world.judge()) == {"wrong refusal"}

    def test_an_overdrawn_account_is_seen(self) -> None:
        """The rule that banks care about most."""
        world = World()
        base = {"amount": 100, "currency": "EUR"}
        world.transfer(id="d", debit_account="external:bank", credit_account="alice", **base)
        world.run()
        # The money of the deposit is there twice for the agent, and once for the ledger.
        partition = world.all("ledger")[-1].partition
        world.accounts.rows[partition]["alice"] = Account({"EUR": 200})
        for number in ("1", "2"):
            world.transfer(id=number, debit_account="alice", credit_account="bob", **base)
        world.run()
        assert "overdrawn" in anomalies(world.judge())

    def test_past_the_time_of_memory_both_answers_are_right(self) -> None:
        """The audit would cry wolf over ids that may be forgotten."""
        hour_ms = 3_600_000
        for forget in (False, True):
            world = World()
            fields = {"id": "1", "debit_account": "external:b", "credit_account": "bob", "amount": 1, "currency": "EUR"}
            for age_ms in (0, 23 * hour_ms, 24 * hour_ms):
                if forget and age_ms == 24 * hour_ms:
                    world.decisions.rows.clear()
                world.append("transfers", b"external:b", msgspec.json.encode(fields), timestamp_ms=age_ms)
                world.run()
            statuses = [result["status"] for result in world.decoded("transfer-results")]
            assert statuses == ["posted", "exists", "posted" if forget else "exists"]
            assert anomalies(world.judge()) == set()

    def test_an_id_that_is_forgotten_too_early_is_seen(self) -> None:
        """A retry within the promised time would pay twice."""
        world = World()
        fields = {"id": "1", "debit_account": "external:b", "credit_account": "bob", "amount": 1, "currency": "EUR"}
        for age_ms in (0, 3_600_000):
            world.decisions.rows.clear()
            world.append("transfers", b"external:b", msgspec.json.encode(fields), timestamp_ms=age_ms)
            world.run()
        assert {"wrong answer", "repeated debit", "repeated credit"} <= anomalies(world.judge())

    def test_credits_on_their_way_are_counted_and_lost_only_at_rest(self) -> None:
        """A look at a ledger at work would find it out of balance."""
        world = good_world()
        log = next(log for log in world.topics["ledger"] if json.loads(log[-1].value or b"")["side"] == "credit")
        entry = json.loads(log.pop().value or b"")
        rows = world.accounts.rows[log[-1].partition]
        rows[entry["account"]] = rows[entry["account"]].after(entry["currency"], -entry["amount"])
        at_work = world.judge(at_rest=False)
        assert anomalies(at_work) == set()
        assert at_work.figures["on their way"] == {entry["currency"]: entry["amount"]}
        assert anomalies(world.judge(at_rest=True)) == {"lost credit", "unbalanced"}


A, B = b"a", b"b"


def copy(checkpoint: int | None, **values: bytes) -> StoreCopy:
    return StoreCopy(Path("store"), checkpoint, {key.encode(): value for key, value in values.items()})


class TestCompare:
    """A store equals the fold of its changelog up to its checkpoint."""

    changes = (Change(0, A, b"1"), Change(1, B, b"1"), Change(4, A, b"2"), Change(6, B, None))

    def found(self, *copies: StoreCopy, changes: tuple[Change, ...] = changes) -> dict[str, int]:
        findings = Findings()
        compare(copies, changes, 8, findings)
        return {finding.anomaly: finding.count for finding in findings.list()}

    def test_the_fold_is_the_last_value_of_each_key_without_deleted_ones(self) -> None:
        """All conclusions about tables rest on it."""
        assert compare([], self.changes, 8, Findings()) == {A: b"2"}

    @pytest.mark.parametrize(
        "good", [copy(None), copy(0, a=b"1"), copy(1, a=b"1", b=b"1"), copy(3, a=b"1", b=b"1"), copy(6, a=b"2")]
    )
    def test_a_store_as_of_any_checkpoint_passes(self, good: StoreCopy) -> None:
        """A worker that is behind, or was stopped, would be called broken."""
        assert self.found(good) == {}

    @pytest.mark.parametrize(
        "bad",
        [
            copy(1, a=b"2", b=b"1"),  # a value that came later than the checkpoint
            copy(4, a=b"1", b=b"1"),  # a lost update
            copy(4, a=b"2"),  # a lost key
            copy(6, a=b"2", b=b"1"),  # a lost deletion
            copy(6, a=b"2", c=b"1"),  # a key that nobody committed
            copy(None, c=b"1"),
        ],
    )
    def test_a_store_that_differs_is_seen(self, bad: StoreCopy) -> None:
        """Uncommitted or lost writes on disk are the engine's worst failure: the next restart builds on them."""
        assert self.found(bad) == {"table differs": 1}

    def test_stores_of_several_slots_are_each_judged(self) -> None:
        """Only the first one would be looked at."""
        assert self.found(copy(6, a=b"2"), copy(1, a=b"1", b=b"1"), copy(0, a=b"3")) == {"table differs": 1}

    def test_a_checkpoint_behind_the_end_is_seen(self) -> None:
        """A store that took over a transaction which never committed, or a changelog that was created anew."""
        assert self.found(copy(8, a=b"2")) == {"store ahead": 1}

    def test_a_value_whose_record_was_compacted_away_is_excused(self) -> None:
        """Compaction removes what a later record made obsolete; the stopped worker's store is right all the same."""
        compacted = (Change(1, B, b"1"), Change(4, A, b"2"))
        assert self.found(copy(1, a=b"1", b=b"1"), changes=compacted) == {}


class TestReport:
    """The verdict as people and programs see it."""

    report = Report(
        [
            Section("app x", {"rows": 2**70}, []),
            Section("check ledger", {"sum": {"EUR": 0}}, [Finding("lost debit", 2, ["ledger[0]@1: [b'x']"])]),
        ],
        at_rest=True,
        records=3,
        seconds=0.5,
    )

    def test_one_finding_spoils_it(self) -> None:
        """A failed guarantee would pass as held."""
        assert not self.report.held
        assert Report(self.report.sections[:1], True, 3, 0.5).held

    def test_its_json_says_what_was_found_and_where(self) -> None:
        """A script could not tell what failed."""
        document = json.loads(self.report.to_json())
        assert document["held"] is False
        assert [section["held"] for section in document["sections"]] == [True, False]
        assert document["sections"][1]["findings"][0]["anomaly"] == "lost debit"

    def test_its_table_shows_examples_as_they_are(self) -> None:
        """Brackets in keys and values would be taken for markup and vanish."""
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            console.print(self.report.table())
            text = console.export_text()
        assert "ledger[0]@1: [b'x']" in text
        assert "NOT" in text

    def test_what_the_checks_counted_is_summed_by_guarantee(self) -> None:
        """What one guarantee may lose would be held against another."""
        sections = [
            Section("app m", {"reported": 7, "in hand": 0}, [], "at_most_once"),
            Section("app e", {"rows": 1}, [], "exactly_once"),
            Section("check a", {"lost": 1, "repeated": 0}, [], "exactly_once"),
            Section("check b", {"lost": 2, "repeated": 5}, [], "exactly_once"),
            Section("check m", {"lost": 3, "repeated": 0, "reported": 7}, [], "at_most_once"),
            Section("check of nobody's input", {"lost": 9}, []),
        ]
        assert Report(sections, True, 3, 0.5).guarantees() == {
            "at_most_once": {"lost": 3, "repeated": 0, "reported": 7},
            "exactly_once": {"lost": 3, "repeated": 5},
        }

    def test_what_no_check_counts_is_not_called_nothing(self) -> None:
        """Agents without a check would be told that nothing was lost."""
        assert self.report.guarantees() == {}
        alone = Report([Section("app e", {"rows": 1}, [], "exactly_once")], True, 3, 0.5)
        assert alone.guarantees() == {"exactly_once": {"lost": None, "repeated": None}}


class Seen(Check):
    """What a check is told."""

    topics = ("observations", "readings")
    facts_seen: ClassVar[list[Facts]] = []

    def finish(self) -> None:
        self.facts_seen.append(self.facts)


class TestAtMostOnce:
    """At most once is judged by what its workers report."""

    @pytest.fixture
    def app(self, kafka_url: str) -> AuditedApp:
        """With 10 readings in each of two partitions, all consumed: 4 of them in hand, 3 given up before."""
        prefix = f"m{uuid4().hex[:8]}-"
        app = AuditedApp(
            f"{prefix}app",
            (f"{prefix}readings",),
            (AuditedTable("averages", f"{prefix}averages-changelog", False),),
            "at_most_once",
        )
        config = KafkaAddress.parse(kafka_url).librdkafka()
        topics = [NewTopic(name, 2, 1) for name in (*app.inputs, app.tables[0].changelog, f"{prefix}observations")]
        admin = AdminClient(config)
        for created in admin.create_topics(topics).values():
            created.result(timeout=30)
        producer = Producer(config)
        for number in range(20):
            producer.produce(app.inputs[0], b"{}", b"d", number % 2)
        producer.produce(app.tables[0].changelog, b"1", b"d", 0)
        assert producer.flush(30) == 0
        self.commit(kafka_url, app, {0: Claim("one-1", 6, 2).text, 1: Claim("two-2", 10, 1).text})
        return app

    def commit(self, kafka_url: str, app: AuditedApp, metadata: dict[int, str]) -> None:
        consumer = Consumer({**KafkaAddress.parse(kafka_url).librdkafka(), "group.id": app.app_id})
        # This client ends the text with a zero byte by itself.
        texts = {partition: text.rstrip("\0") for partition, text in metadata.items()}
        offsets = [TopicPartition(app.inputs[0], partition, 10, text) for partition, text in texts.items()]
        consumer.commit(offsets=offsets, asynchronous=False)
        consumer.close()

    def audit(self, kafka_url: str, app: AuditedApp, datadir: Path) -> Report:
        prefix = app.app_id.removesuffix("app")
        settings = Settings(kafka_prefix=prefix, datadir=datadir)
        Seen.facts_seen.clear()
        return audit(KafkaAddress.parse(kafka_url), settings, [app], {"sensors": Seen}, wait_s=0.5)

    def test_what_was_given_up_and_what_is_in_hand_is_reported(
        self, kafka_url: str, app: AuditedApp, tmp_path: Path
    ) -> None:
        """The losses that workers admit would be known to nobody, and each would count as a broken promise."""
        report = self.audit(kafka_url, app, tmp_path)
        assert report.held
        assert report.at_rest
        assert report.sections[0].figures["reported"] == 7
        assert report.sections[0].figures["in hand"] == 4
        assert [section.guarantee for section in report.sections] == 2 * ["at_most_once"]
        [facts] = Seen.facts_seen
        assert (facts.given_up, facts.at_rest) == (7, True)
        assert facts.partitions == {"readings": 2, "observations": 2}

    def test_an_offset_that_says_nothing_is_found(self, kafka_url: str, app: AuditedApp, tmp_path: Path) -> None:
        """Losses behind an offset of another program's would not be counted, and the bound would be a lie."""
        self.commit(kafka_url, app, {1: "streams-app-one"})
        report = self.audit(kafka_url, app, tmp_path)
        assert found(report) == {"no claim"}
        assert report.sections[0].figures["reported"] == 6

    def test_a_table_that_differs_is_a_figure_and_no_finding(
        self, kafka_url: str, app: AuditedApp, tmp_path: Path
    ) -> None:
        """A table that is best effort would be called broken whenever a worker died."""
        store = Store(store_path(tmp_path / app.app_id / "slot-0", "averages", 0), topic_id="t", expires_ms=None)
        store.publish({b"d": b"2", b"e": b"1"}, (), 0)
        store.close()
        report = self.audit(kafka_url, app, tmp_path)
        assert report.held
        assert report.sections[0].figures["rows that differ"] == 2


def test_a_check_belongs_to_the_guarantee_of_the_input_that_it_looks_at() -> None:
    """What at most once may lose would be counted as money lost."""
    money = AuditedApp("x-app", ("x-transfers",), (), "exactly_once")
    sensors = AuditedApp("x-app-at-most-once", ("x-readings",), (), "at_most_once")
    assert guarantee_of(LedgerCheck, [sensors, money], "x-") == "exactly_once"
    assert guarantee_of(Seen, [money, sensors], "x-") == "at_most_once"
    assert guarantee_of(Seen, [money], "x-") == ""


def test_all_members_of_the_family_that_have_agents_are_audited() -> None:
    """A guarantee that runs in another process would be judged by nobody."""
    main = App("audited-family")
    main.agent(main.topic("in"))(_pass_by)
    forgetful = main.sibling("at_most_once")
    forgetful.agent(forgetful.topic("readings"))(_pass_by)
    main.sibling("at_least_once")
    assert [(each.app_id, each.inputs, each.guarantee) for each in audited_family(main)] == [
        ("audited-family", ("in",), "exactly_once"),
        ("audited-family-at-most-once", ("readings",), "at_most_once"),
    ]


async def _pass_by(stream: Any) -> None:
    async for _ in stream:
        pass


class History:
    """A world written to a real Kafka, under a prefix of its own, as a worker would have done it."""

    def __init__(self, kafka_url: str, datadir: Path, world: World) -> None:
        self.prefix = f"a{uuid4().hex[:8]}-"
        self.address = KafkaAddress.parse(kafka_url)
        self.settings = Settings(kafka_prefix=self.prefix, datadir=datadir)
        self.world = world
        group = f"{self.prefix}app"
        self.app = AuditedApp(
            group,
            (f"{self.prefix}transfers", f"{self.prefix}credits"),
            (
                AuditedTable("accounts", f"{group}-accounts-changelog", False),
                AuditedTable("decisions", f"{group}-decisions-changelog", True),
            ),
        )
        admin = AdminClient(self.address.librdkafka())
        topics = [NewTopic(self.prefix + topic, PARTITIONS, 1) for topic in LedgerCheck.topics]
        # Compacted, as changelogs are: retention would delete their records, which bear old timestamps.
        compacted = {"cleanup.policy": "compact"}
        topics += [NewTopic(table.changelog, PARTITIONS, 1, config=compacted) for table in self.app.tables]
        for created in admin.create_topics(topics).values():
            created.result(timeout=30)

    def producer(self, name: str) -> Producer:
        return Producer({**self.address.librdkafka(), **({"transactional.id": self.prefix + name} if name else {})})

    def write(self) -> None:
        """The input without a transaction, at the offsets that the world gave it; the rest in one with the offsets."""
        plain = self.producer("")
        for record in self.world.all("transfers"):
            plain.produce(self.prefix + "transfers", record.value, record.key, record.partition)
        assert plain.flush(30) == 0
        producer = self.producer("worker")
        producer.init_transactions(30)
        # One that is aborted first: its records must not be read.
        producer.begin_transaction()
        producer.produce(self.prefix + "ledger", b"uncommitted", b"x", 0)
        producer.flush(30)
        producer.abort_transaction(30)
        producer.begin_transaction()
        for topic in ("credits", "ledger", "transfer-results", "dead-letters"):
            for record in self.world.all(topic):
                self.produce(producer, record)
        for name, row in self.rows():
            producer.produce(name[0], row[1], row[0], name[1], timestamp=1_000)
        self.commit_offsets(producer)
        producer.commit_transaction(30)

    def rows(self) -> Iterator[tuple[tuple[str, int], tuple[bytes, bytes]]]:
        for table, rows in zip(self.app.tables, (self.world.accounts.rows, self.world.decisions.rows), strict=True):
            for partition, each in rows.items():
                for key, row in each.items():
                    yield (table.changelog, partition), (key.encode(), msgspec.json.encode(row))

    def produce(self, producer: Producer, record: Observed) -> None:
        headers = dict(record.headers)
        if headers:
            headers["dlq.topic"] = self.prefix.encode() + headers["dlq.topic"]
        producer.produce(self.prefix + record.topic, record.value, record.key, record.partition, headers=headers)

    def commit_offsets(self, producer: Producer) -> None:
        consumer = Consumer({**self.address.librdkafka(), "group.id": self.app.app_id})
        metadata = consumer.consumer_group_metadata()
        consumer.close()
        offsets = [
            TopicPartition(self.prefix + topic, partition, len(log))
            for topic in ("transfers", "credits")
            for partition, log in enumerate(self.world.topics[topic])
        ]
        producer.send_offsets_to_transaction(offsets, metadata, 30)

    def store(self, slot: str, table: AuditedTable, partition: int, values: Mapping[bytes, bytes], offset: int) -> None:
        """A worker's store on disk."""
        path = store_path(self.settings.datadir / self.app.app_id / slot, table.name, partition)
        store = Store(path, topic_id="t", expires_ms=1_000 if table.expires else None)
        prefix = (1_000).to_bytes(8) if table.expires else b""
        store.publish({key: prefix + value for key, value in values.items()}, (), offset)
        store.close()

    def audit(self, wait_s: float = 20.0) -> Report:
        return audit(self.address, self.settings, [self.app], {"ledger": LedgerCheck}, wait_s=wait_s)


def found(report: Report) -> set[str]:
    return {finding.anomaly for section in report.sections for finding in section.findings}


def world_as_written(count: int) -> World:
    """A good world whose input has the offsets that Kafka will give it."""
    world = good_world(count)
    for log in world.topics["transfers"]:
        log[:] = [record._replace(offset=offset) for offset, record in enumerate(log)]
    for topic in ("dead-letters",):
        for log in world.topics[topic]:
            log[:] = [_halved(record) for record in log]
    return world


def _halved(record: Observed) -> Observed:
    offset = int(record.headers["dlq.offset"]) // 2
    return record._replace(headers={**record.headers, "dlq.offset": str(offset).encode()})


@pytest.fixture
def history(kafka_url: str, tmp_path: Path) -> History:
    return History(kafka_url, tmp_path, world_as_written(400))


class TestAgainstKafka:
    """The whole audit, reading a real Kafka."""

    def test_a_good_history_holds(self, history: History) -> None:
        """Aborted records, transaction markers at the ends, or prefixes would spoil a good verdict."""
        history.write()
        rows: dict[tuple[str, int], dict[bytes, bytes]] = {}
        for where, (key, value) in history.rows():
            rows.setdefault(where, {})[key] = value
        for table in history.app.tables:
            for partition in range(PARTITIONS):
                values = rows.get((table.changelog, partition), {})
                if values:
                    history.store("slot-0", table, partition, values, len(values) - 1)
        report = history.audit()
        assert found(report) == set()
        assert report.held
        assert report.at_rest
        assert report.sections[0].figures["rows"] == len(list(history.rows()))
        assert report.sections[1].figures["transfers"] > 380

    def test_a_store_with_a_foreign_value_a_lost_leg_and_a_truncated_topic_are_found(self, history: History) -> None:
        """The parts of the audit would not be connected to what they judge."""
        drop("ledger", side="credit")(history.world)
        history.write()
        history.store("slot-0", history.app.tables[0], 0, {b"nobody": b"{}"}, 0)
        history.store("slot-1", history.app.tables[0], 1, {b"somebody": b"{}"}, 10_000)
        admin = AdminClient(history.address.librdkafka())
        [deleted] = admin.delete_records([TopicPartition(f"{history.prefix}transfer-results", 0, 1)]).values()
        deleted.result(timeout=30)
        assert {"table differs", "store ahead", "lost credit", "truncated"} <= found(history.audit())

    def test_input_that_nobody_consumed_is_unseen_and_not_called_lost(self, history: History) -> None:
        """Somebody who forgot to start a worker would be told that money was lost."""
        history.write()
        producer = history.producer("")
        value = b'{"id":"late","debit_account":"external:b","credit_account":"c","amount":1,"currency":"EUR"}'
        history.produce(producer, Observed("transfers", 1, 0, b"external:b", value, 0, {}))
        assert producer.flush(30) == 0
        report = history.audit(wait_s=1.0)
        assert not report.at_rest
        assert "unseen" in found(report)
        assert not any(anomaly.startswith("lost") for anomaly in found(report))

    def test_an_open_transaction_is_found(self, history: History) -> None:
        """A worker that hangs in a commit holds up every reader of committed records."""
        history.write()
        producer = history.producer("hanging")
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce(history.app.tables[0].changelog, b"{}", b"x", 0)
        assert producer.flush(30) == 0
        assert found(history.audit(wait_s=0.5)) == {"open"}
        producer.abort_transaction(30)
        assert history.audit().held

    def test_topics_that_do_not_exist_are_named(self, kafka_url: str, tmp_path: Path) -> None:
        """An audit of nothing would say that all is well."""
        settings = Settings(kafka_prefix="absent-", datadir=tmp_path)
        app = AuditedApp("absent-app", ("absent-transfers",), ())
        report = audit(KafkaAddress.parse(kafka_url), settings, [app], {"ledger": LedgerCheck})
        assert found(report) == {"missing"}
