"""The auditor that follows: it finds what is broken on purpose, within a cut or two, once, and nothing else.

Most histories here are made by the ledger's own agents and told to the follower as Kafka would show them: in chunks, topics
and partitions apart, cut by cut. What needs a broker (transactions, restarts, retention) runs against one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from agents.ledger_follow import LedgerFollower
from agents.ledger_input import transfers
from streams_app.audit import AuditedApp
from streams_app.errors import ConfigurationError
from streams_app.follow import Anomaly, Auditor, DiskMemory, FollowerStatus, Status
from streams_app.follow_view import Figures, Lines, _Picture
from streams_app.kafka import KafkaAddress
from streams_app.partitioning import partition_of
from streams_app.registry import Cut, Followed, Follower, Observed
from streams_app.settings import Settings
from tests.ledger_world import PARTITIONS, World
from tests.rig import wait_until
from tests.test_audit import Break, change, drop, from_nowhere, move, pay_twice, repeat

CHECKOUT = Path(__file__).parent.parent
TOPICS = LedgerFollower.topics
Place = tuple[str, int]


class Told:
    """A ledger's follower that is told a world, cut by cut, as the reader would."""

    def __init__(self, folder: Path, *, starts: Mapping[Place, int] = {}, settings: Settings | None = None) -> None:
        self.folder = folder
        self.starts = starts
        self.settings = settings or Settings()
        self.consumed: dict[Place, int] = {}
        self.positions: dict[Place, int] = defaultdict(int)
        self.horizon_ms = 0
        self.open()

    def open(self) -> None:
        self.memory = DiskMemory(self.folder / "ledger")
        counts = dict.fromkeys(TOPICS, PARTITIONS)
        self.follower = LedgerFollower(Followed(self.settings, counts, self.starts, self.memory))

    def restart(self) -> None:
        """As after a kill: what was not committed is gone."""
        self.memory.close()
        self.open()

    def tell(self, world: World, random: Random | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """What is new in the world, up to a cut; ``meanwhile`` happens after the cut was begun.

        With ``random`` in chunks of partitions as they come, some of them beyond the cut, now and then with a restart.
        """
        self.memory.meta.cut += 1
        ends = {(topic, p): len(log) for topic in TOPICS for p, log in enumerate(world.topics[topic])}
        consumed = dict(self.consumed)
        meanwhile()
        while waiting := [tp for tp, end in ends.items() if self.positions[tp] < end]:
            chunk: list[Observed] = []
            for tp in waiting if random is None else ends:
                log = world.topics[tp[0]][tp[1]]
                end = ends[tp] if random is None else min(len(log), self.positions[tp] + random.randint(0, 60))
                chunk += log[self.positions[tp] : end]
                self.positions[tp] = end
            self.follower.observe(chunk)
            self.memory.commit()
            if random is not None and random.random() < 0.05:
                self.restart()
        self.follower.cut(Cut(self.memory.meta.cut, consumed, self.horizon_ms))
        self.memory.commit()

    def found(self) -> dict[str, int]:
        """How often each anomaly was found."""
        return self.memory.meta.anomalies

    def all_consumed(self, world: World) -> None:
        """As if the group had committed all of its input."""
        self.consumed = {("credits", p): 2 * len(log) for p, log in enumerate(world.topics["credits"])}


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    made = Told(tmp_path)
    yield made
    made.memory.close()


def good_world(count: int = 600) -> World:
    world = World()
    world.write(islice(transfers(Random("follow"), 30, ill_formed=0.03), count))
    world.run(Random(5))
    return world


BROKEN: dict[str, tuple[Break, set[str]]] = {
    "a debit without credit message": (drop("credits"), {"vanished", "appeared"}),
    "a credit message without debit": (drop("ledger", side="debit"), {"appeared", "unbalanced", "wrong balance"}),
    "a credit message from nowhere": (from_nowhere("credits"), {"appeared", "vanished", "unbalanced"}),
    "a credit entry is lost": (drop("ledger", side="credit"), {"vanished", "wrong balance"}),
    "a credit entry comes twice": (repeat("ledger", side="credit"), {"appeared", "unbalanced", "wrong balance"}),
    "a debit entry comes twice": (repeat("ledger", side="debit"), {"vanished", "unbalanced", "wrong balance"}),
    "a result is lost": (drop("transfer-results", status="posted"), {"torn"}),
    "a result comes twice": (repeat("transfer-results", status="posted"), {"torn", "repeated"}),
    "an entry shows another balance": (change("ledger", {"balance": 7}), {"wrong balance"}),
    "an entry has another amount": (change("ledger", {"amount": 1}, side="debit"), {"wrong balance", "appeared"}),
    "an entry lies in another partition": (move("ledger", side="credit"), {"misplaced"}),
    "an entry is not readable": (change("ledger", {"side": "left"}, side="credit"), {"unreadable", "vanished"}),
    "a debit is taken twice with its result": (pay_twice, {"repeated", "vanished", "unbalanced"}),
}


class TestLedgerFollower:
    """What is judged of the ledger."""

    @pytest.mark.parametrize("seed", range(6))
    def test_a_good_history_in_any_order_of_topics_and_with_restarts_has_nothing(self, told: Told, seed: int) -> None:
        """An auditor that cries wolf is switched off, and then nobody watches."""
        random, world = Random(seed), World()
        source = transfers(Random(f"good {seed}"), 30, ill_formed=0.02)

        def more() -> None:
            world.write(islice(source, random.randint(1, 100)))
            world.run(random)

        for _ in range(8):
            more()
            told.all_consumed(world)
            told.tell(world, random, more)
        told.all_consumed(world)
        told.tell(world, random)
        told.tell(world)
        assert told.found() == {}
        figures = told.follower.figures()
        assert figures["entries_total"] == len(world.all("ledger")) > 0
        assert set(figures["sum"].values()) == {0}  # type: ignore[union-attr]
        assert figures["credits_on_their_way"] == 0
        left = [key for key, _ in told.memory.scan(b"j", b"n")] + [key for key, _ in told.memory.scan(b"w", b"x")]
        assert left == [], "what is complete is forgotten, or the disk fills"

    @pytest.mark.parametrize("what", BROKEN)
    def test_what_is_broken_on_purpose_is_found_after_the_next_cut(self, told: Told, what: str) -> None:
        """Money would vanish, or appear, and nobody would know for days."""
        world = good_world()
        breaking, expected = BROKEN[what]
        breaking(world)
        told.all_consumed(world)
        told.tell(world)
        told.tell(world)
        assert expected <= set(told.found()), told.memory.recent
        found = dict(told.found())
        for _ in range(3):
            told.tell(world)
            told.restart()
        assert told.found() == found, "each is said once"

    def test_a_leg_that_is_not_read_yet_is_not_missing(self, told: Told) -> None:
        """Each transaction that a cut goes through would be an alarm."""
        world = World()
        world.transfer(id="d", debit_account="external:bank", credit_account="alice", amount=100, currency="EUR")
        world.run()
        late = {(topic, p): log[:] for topic in TOPICS for p, log in enumerate(world.topics[topic])}
        for shown in (("ledger",), ("ledger", "credits"), TOPICS):
            for (topic, p), log in late.items():
                world.topics[topic][p][:] = log if topic in shown else []
            told.tell(world)
            # What was added to after the cut was begun is judged at the next one.
            assert told.found() == {}

    def test_a_credit_on_its_way_is_a_figure_until_its_group_has_passed_it(self, told: Told) -> None:
        """A stopped worker would be called a thief; or a lost credit would be on its way for ever."""
        world = World()
        world.transfer(id="d", debit_account="external:bank", credit_account="alice", amount=100, currency="EUR")
        world.run()
        log = world.topics["ledger"][partition_of(b"alice", PARTITIONS)]
        entry = log.pop()
        assert json.loads(entry.value or b"")["side"] == "credit"
        for _ in range(5):
            told.tell(world)
        assert told.found() == {}
        assert told.follower.figures()["on_their_way"] == {"EUR": 100}
        assert told.follower.figures()["oldest_on_its_way_s"] > 0  # type: ignore[operator]
        told.all_consumed(world)
        told.tell(world)
        assert told.found() == {"vanished": 1, "unbalanced": 1}
        assert told.follower.figures()["sum"] == {"EUR": -100}

    def test_a_replayed_credit_needs_no_second_debit(self, told: Told) -> None:
        """The operator who mends what was set aside would be told that money appeared."""
        world = World()
        world.transfer(id="d", debit_account="external:bank", credit_account="alice", amount=100, currency="EUR")
        world.run()
        entry = world.topics["ledger"][partition_of(b"alice", PARTITIONS)].pop()
        told.all_consumed(world)
        told.tell(world)
        found = dict(told.found())
        letter = world.all("credits")[0]
        world.append("credits", letter.key, letter.value, headers={"dlq.replayed": b"0@0"})
        world.topics["ledger"][entry.partition].append(entry)
        told.all_consumed(world)
        told.tell(world)
        told.tell(world)
        assert told.found() == found == {"vanished": 1, "unbalanced": 1}
        assert told.follower.figures()["sum"] == {"EUR": 0}

    def test_ids_are_remembered_for_their_time_and_then_forgotten(self, tmp_path: Path) -> None:
        """A repetition would pass, or one that is right be called wrong; or the disk would fill with ids."""
        told = Told(tmp_path, settings=Settings(remember_ids_s=100))
        world, now_ms = World(), 1_000_000
        for age_s, repeated in ((0, 0), (99, 1), (250, 1), (349, 2), (600, 2)):
            fields = {"id": "1", "debit_account": "external:b", "credit_account": "bob", "amount": 1, "currency": "EUR"}
            world.decisions.rows.clear()
            world.transfer(**fields)
            before = {(topic, p): len(log) for topic in TOPICS for p, log in enumerate(world.topics[topic])}
            world.run()
            for (topic, p), start in before.items():
                log = world.topics[topic][p]
                log[start:] = [each._replace(timestamp_ms=now_ms + 1000 * age_s) for each in log[start:]]
            told.tell(world)
            assert told.found().get("repeated", 0) == repeated, age_s
            assert len([*told.memory.scan(b"i", b"j")]) <= 2
        told.memory.close()

    @pytest.mark.parametrize("seed", range(4))
    def test_what_was_deleted_before_we_came_is_believed(self, tmp_path: Path, seed: int) -> None:
        """Started on topics that retention has shortened, it would find everything wrong at once."""
        random, world = Random(seed), good_world()
        starts = {}
        for topic in TOPICS:
            for partition, log in enumerate(world.topics[topic]):
                gone = random.randint(0, len(log))
                starts[topic, partition] = 2 * gone
                del log[:gone]
        told = Told(tmp_path, starts=starts)
        told.horizon_ms = 1_000
        told.all_consumed(world)
        told.consumed = dict.fromkeys(told.consumed, 20_000)
        told.tell(world, random)
        told.tell(world)
        assert told.found() == {}
        # What comes later is judged as ever.
        for topic, fields in (
            ("transfer-results", {"id": "late", "debit_account": "external:x", "status": "posted", "reason": None}),
            ("ledger", leg("late", "external:x", "debit", 100, -100)),
        ):
            world.append(topic, b"external:x", json.dumps(fields).encode(), timestamp_ms=10_000_000)
        told.tell(world)
        told.tell(world)
        assert told.found() == {"vanished": 1, "unbalanced": 1}
        told.memory.close()


def leg(transfer_id: str, account: str, side: str, amount: int, balance: int) -> dict[str, Any]:
    """A ledger entry."""
    fields = {"transfer_id": transfer_id, "account": account, "side": side, "amount": amount}
    return {**fields, "currency": "EUR", "balance": balance}


class Site:
    """A ledger's topics on a real Kafka, under a prefix of their own, written as a worker would, or not quite so."""

    def __init__(self, kafka_url: str, datadir: Path) -> None:
        self.url = kafka_url
        self.address = KafkaAddress.parse(kafka_url)
        self.prefix = f"f{uuid4().hex[:8]}-"
        self.settings = Settings(kafka_prefix=self.prefix, datadir=datadir, transaction_timeout_ms=1_000)
        self.app = AuditedApp(f"{self.prefix}app", (f"{self.prefix}transfers", f"{self.prefix}credits"), ())
        self.admin = AdminClient(self.address.librdkafka())
        names = [self.prefix + topic for topic in ("transfers", *TOPICS)]
        for created in self.admin.create_topics([NewTopic(name, 2, 1) for name in names]).values():
            created.result(30)
        self.balances: dict[str, int] = defaultdict(int)
        self.producer = self.new_producer("one")
        consumer = Consumer({**self.address.librdkafka(), "group.id": self.app.app_id})
        self.group = consumer.consumer_group_metadata()
        consumer.close()

    def new_producer(self, name: str) -> Producer:
        producer = Producer(
            {
                **self.address.librdkafka(),
                "transactional.id": self.prefix + name,
                "partitioner": "murmur2_random",
                "transaction.timeout.ms": 60_000,
            }
        )
        producer.init_transactions(30)
        return producer

    def produce(self, topic: str, key: str, fields: Mapping[str, Any], producer: Producer | None = None) -> None:
        (producer or self.producer).produce(self.prefix + topic, json.dumps(fields).encode(), key.encode())

    def debit(
        self, transfer_id: str, amount: int = 100, *, without: str = "", producer: Producer | None = None
    ) -> None:
        """The legs of a posted transfer from external:a to bob."""
        payer, payee = "external:a", "bob"
        if without != "ledger":
            self.balances[payer] -= amount
            self.produce("ledger", payer, leg(transfer_id, payer, "debit", amount, self.balances[payer]), producer)
        common = {"id": transfer_id, "debit_account": payer}
        if without != "credits":
            credit = {**common, "credit_account": payee, "amount": amount, "currency": "EUR"}
            self.produce("credits", payee, credit, producer)
        if without != "transfer-results":
            self.produce("transfer-results", payer, {**common, "status": "posted", "reason": None}, producer)

    def give(self, transfer_id: str, amount: int = 100, off: int = 0) -> None:
        """The entry of a credit; ``off``: so much wrong is its balance."""
        self.balances["bob"] += amount
        self.produce("ledger", "bob", leg(transfer_id, "bob", "credit", amount, self.balances["bob"] + off))

    @contextlib.contextmanager
    def transaction(self, producer: Producer | None = None) -> Iterator[None]:
        producer = producer or self.producer
        producer.begin_transaction()
        yield
        producer.commit_transaction(30)

    def transfer(self, transfer_id: str, amount: int = 100) -> None:
        """A whole one, in its two transactions."""
        with self.transaction():
            self.debit(transfer_id, amount)
        with self.transaction():
            self.give(transfer_id, amount)

    def consume_credits(self) -> None:
        """Commit the offsets of all credits."""
        partition = partition_of(b"bob", 2)
        topic = f"{self.prefix}credits"
        consumer = Consumer({**self.address.librdkafka(), "group.id": "watermarks"})
        end = consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)[1]
        consumer.close()
        with self.transaction():
            self.produce("transfers", "x", {})
            self.producer.send_offsets_to_transaction([TopicPartition(topic, partition, end)], self.group, 30)


class Run:
    """An auditor in this process."""

    def __init__(self, site: Site, followers: Mapping[str, type[Follower]] | None = None) -> None:
        followers = followers or {"ledger": LedgerFollower}
        self.auditor = Auditor(site.address, site.settings, [site.app], followers, "app")
        self.said: list[tuple[str, Anomaly]] = []

    def step(self) -> None:
        self.auditor.step(lambda name, anomaly: self.said.append((name, anomaly)))
        assert not self.auditor.status.trouble

    def until(self, condition: Callable[[], object], what: str) -> None:
        def met() -> bool:
            self.step()
            return bool(condition())

        wait_until(met, what, 60)

    def judge(self) -> dict[str, int]:
        """Go on until all that is there now was judged; gives the numbers of anomalies, and that each was said."""
        cut = self.cut()
        self.until(lambda: self.cut() >= cut + 3, "three cuts")
        counts: dict[str, int] = defaultdict(int)
        for each in self.auditor.status.anomalies.values():
            for anomaly, count in each.items():
                counts[anomaly] += count
        return dict(counts)

    def cut(self) -> int:
        return self.auditor._followings[0].memory.cut

    def kinds(self) -> list[str]:
        return [anomaly.anomaly for _, anomaly in self.said]


@pytest.fixture
def site(kafka_url: str, tmp_path: Path) -> Site:
    return Site(kafka_url, tmp_path)


@pytest.fixture
def run(site: Site) -> Iterator[Run]:
    made = Run(site)
    yield made
    made.auditor.close()


INJECTED: dict[str, tuple[Callable[[Site], None], dict[str, int]]] = {
    "a debit without credit message": (
        lambda site: site.debit("x", without="credits"),
        {"vanished": 1, "unbalanced": 1},
    ),
    "a credit message without debit": (
        lambda site: (site.debit("x", without="ledger"), site.give("x")),  # type: ignore[func-returns-value]
        {"appeared": 1, "unbalanced": 1},
    ),
    "a credit entry twice": (lambda site: site.give("1"), {"appeared": 1, "unbalanced": 1}),
    "a posted transfer without its result": (
        lambda site: (site.debit("x", without="transfer-results"), site.give("x")),  # type: ignore[func-returns-value]
        {"torn": 1},
    ),
    "a transfer made twice": (
        lambda site: (site.debit("1"), site.give("1")),  # type: ignore[func-returns-value]
        {"repeated": 1},
    ),
    # And the next one, which is right again, does not follow from it.
    "a wrong balance": (
        lambda site: (site.debit("x"), site.give("x", off=1), site.debit("y"), site.give("y")),  # type: ignore[func-returns-value]
        {"wrong balance": 2},
    ),
}


class TestAgainstKafka:
    """What needs transactions, offsets and a log."""

    @pytest.mark.parametrize("what", INJECTED)
    def test_what_is_injected_among_good_transfers_is_found_and_nothing_else(
        self, site: Site, run: Run, what: str
    ) -> None:
        """An alarm that names ten things beside the one that is wrong is of no use at night."""
        for number in range(5):
            site.transfer(str(number))
        assert run.judge() == {}
        inject, expected = INJECTED[what]
        with site.transaction():
            inject(site)
        for number in range(5, 10):
            site.transfer(str(number))
        found = run.judge()
        # The sum of a wrong balance may be seen before the next entry makes up for it.
        assert {
            name: count for name, count in found.items() if name in expected or what != "a wrong balance"
        } == expected
        assert len(run.said) == sum(found.values())

    def test_a_credit_that_was_consumed_and_not_given_is_found(self, site: Site, run: Run) -> None:
        """Money that is debited and never credited would be on its way for ever."""
        with site.transaction():
            site.debit("1")
        assert run.judge() == {}
        assert run.auditor.status.followers["ledger"].figures["on_their_way"] == {"EUR": 100}
        site.consume_credits()
        assert run.judge() == {"vanished": 1, "unbalanced": 1}

    def test_an_aborted_transaction_is_nothing_and_an_open_one_only_past_its_time(
        self, site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A crash of a worker would be called a loss of money; or a log that nobody gets past would go unnoticed."""
        site.transfer("1")
        site.producer.begin_transaction()
        before = dict(site.balances)
        site.debit("aborted")
        site.producer.flush(30)
        other = site.new_producer("two")
        site.producer.abort_transaction(30)
        site.balances.update(before)
        assert run.judge() == {}
        other.begin_transaction()
        site.debit("2", producer=other)
        other.flush(30)
        run.until(lambda: run.auditor.status.apps[0].open_s > 2, "an open transaction is seen")
        assert run.kinds() == []
        monkeypatch.setattr(run.auditor._watch, "_limit_s", 0.5)
        run.until(lambda: "open" in run.kinds(), "it is said")
        other.commit_transaction(30)
        with site.transaction():
            site.give("2")
        found = run.judge()
        assert set(found) == {"open"}
        # Of each partition that it is in, once.
        assert found["open"] == len({each.text for _, each in run.said}) == len(run.said)

    def test_what_was_deleted_before_it_was_judged_is_said_once_and_judging_goes_on(self, site: Site) -> None:
        """Nobody would know that part of the history was never looked at; or everything behind it would be called wrong."""
        first = Run(site)
        site.transfer("1")
        assert first.judge() == {}
        first.auditor.close()
        for number in range(2, 6):
            site.transfer(str(number))
        self.delete_all(site)
        site.transfer("6")
        second = Run(site)
        second.until(lambda: second.said, "the gap is said")
        assert second.judge() == {"gap": 1}
        assert "deleted" in second.auditor.status.followers["ledger"].remark
        second.auditor.close()
        third = Run(site)
        try:
            assert third.judge() == {"gap": 1}
            assert third.said == []
            assert third.auditor.status.followers["ledger"].figures["entries_total"] == 2
        finally:
            third.auditor.close()

    def test_a_topic_that_was_replaced_is_said_once_and_judging_goes_on(self, site: Site) -> None:
        """Its offsets begin anew, and the records of another history would be judged as if they followed from ours."""
        first = Run(site)
        site.transfer("1")
        assert first.judge() == {}
        first.auditor.close()
        names = [site.prefix + topic for topic in TOPICS]
        for deleted in site.admin.delete_topics(names).values():
            deleted.result(30)
        wait_until(lambda: not {*names} & {*site.admin.list_topics(timeout=10).topics}, "the topics are gone")
        for created in site.admin.create_topics([NewTopic(name, 2, 1) for name in names]).values():
            created.result(30)
        site.balances.clear()
        site.producer = site.new_producer("two")
        site.transfer("1")
        second = Run(site)
        try:
            second.until(lambda: second.said, "it is said")
            assert second.judge() == {"gap": 1}
            assert second.auditor.status.followers["ledger"].figures["entries_total"] == 2
        finally:
            second.auditor.close()

    def delete_all(self, site: Site) -> None:
        consumer = Consumer({**site.address.librdkafka(), "group.id": "watermarks"})
        places = [TopicPartition(site.prefix + topic, p) for topic in TOPICS for p in range(2)]
        for each in places:
            each.offset = consumer.get_watermark_offsets(each, 10)[1]
        consumer.close()
        for deleted in site.admin.delete_records(places).values():
            deleted.result(30)

    def test_it_waits_for_topics_that_do_not_exist_yet(self, site: Site) -> None:
        """Started before the first worker, it would end, and nobody starts it again."""
        missing = type("Missing", (Follower,), {"topics": ("not-there",)})
        run = Run(site, {"missing": missing})
        try:
            run.step()
            assert "not-there" in run.auditor.status.followers["missing"].remark
        finally:
            run.auditor.close()

    def test_two_at_once_are_refused(self, site: Site, run: Run) -> None:
        """They would share one memory and judge half of the records each."""
        with pytest.raises(ConfigurationError, match="another"):
            Auditor(site.address, site.settings, [site.app], {"ledger": LedgerFollower}, "app")

    def test_a_follower_of_somebody_elses_agent_is_a_few_lines(self, site: Site) -> None:
        """Whoever deletes our agents gets an auditor for theirs."""
        run = Run(site, {"mine": Mine})
        try:
            for number in range(3):
                site.transfer(str(number))
            with site.transaction():
                site.produce("transfer-results", "k", {"id": "odd", "status": "perhaps"})
            assert run.judge() == {"odd": 1}
            assert run.auditor.status.followers["mine"].figures == {"results_total": 4}
        finally:
            run.auditor.close()

    def test_it_is_shown_to_people_programs_and_prometheus(self, site: Site, run: Run) -> None:
        """What was found would be known to nobody."""
        with site.transaction():
            site.debit("x", without="credits")
        run.judge()
        lines: list[str] = []
        shown = Lines(1.0, lines.append)
        for name, anomaly in run.said:
            shown.anomaly(name, anomaly)
        shown.status(run.auditor.status)
        shown.status(run.auditor.status)
        documents = [json.loads(line) for line in lines]
        assert [each.get("anomaly") for each in documents] == ["vanished", "unbalanced", None]
        assert documents[-1]["anomalies"] == {"ledger": {"unbalanced": 1, "vanished": 1}}
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(_Picture(run.auditor))
        assert "vanished" in console.export_text()
        registry = CollectorRegistry()
        registry.register(Figures(run.auditor))
        metrics = generate_latest(registry).decode()
        assert 'streams_app_audit_anomalies_total{anomaly="vanished",of="ledger"} 1.0' in metrics
        assert "streams_app_audit_ledger_entries_total 1.0" in metrics
        assert 'streams_app_audit_ledger_sum{of="EUR"} -100.0' in metrics
        assert "streams_app_audit_cut_lag_seconds" in metrics


def test_anomalies_have_a_series_before_there_is_one() -> None:
    """ "None" would look like an audit that does not run."""
    status = Status(0.0, {"ledger": {"torn": 2}}, {"ledger": FollowerStatus(0, 0.0, None, {}, "")}, [], {})
    registry = CollectorRegistry()
    registry.register(Figures(SimpleNamespace(status=status)))  # type: ignore[arg-type]
    found = {
        (sample.labels["of"], sample.labels["anomaly"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "streams_app_audit_anomalies_total"
    }
    assert found == {("apps", "open"): 0, ("ledger", "gap"): 0, ("ledger", "torn"): 2}


class Mine(Follower):
    """Counts results, and finds those of an odd status."""

    topics: ClassVar = ("transfer-results",)

    def observe(self, records: Any) -> None:
        count = int(self.memory.get([b"count"]).get(b"count", b"0")) + len(records)
        self.memory.put(b"count", b"%d" % count)
        for record in records:
            if json.loads(record.value)["status"] != "posted":
                self.memory.report("odd", f"{record}")

    def figures(self) -> dict[str, int]:
        return {"results_total": int(self.memory.get([b"count"]).get(b"count", b"0"))}


class Command:
    """``audit --follow`` as people run it; its lines are kept."""

    def __init__(self, url: str, prefix: str, datadir: Path, log: Path) -> None:
        self.log = log
        self.env = {
            **os.environ,
            "KAFKA_URL": url,
            "KAFKA_PREFIX": prefix,
            "STREAMS_APP_DATADIR": str(datadir),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "faust",
            "-A",
            "streams_app",
            "audit",
            "--follow",
            "--json",
            "--interval",
            "0.5",
        ]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=self.env, cwd=CHECKOUT, stdout=log)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def documents(self) -> list[dict[str, Any]]:
        # The last line may be cut off by a kill.
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def status(self) -> dict[str, Any]:
        return next((each for each in reversed(self.documents()) if "status" in each), {})

    def records(self) -> int:
        return int(self.status().get("followers", {}).get("ledger", {}).get("records", 0))


class TestTheCommand:
    """As a process of its own."""

    def test_killed_again_and_again_it_reports_each_anomaly_once_and_misses_none(
        self, site: Site, tmp_path: Path
    ) -> None:
        """After a crash of the auditor somebody would be woken for old news, or not be woken at all."""
        command = Command(site.url, site.prefix, tmp_path / "data", tmp_path / "lines")
        written = 0
        for round_ in range(4):
            command.start()
            read = command.records()
            for number in range(100):
                with site.transaction():
                    site.debit(f"{round_}-{number}")
                with site.transaction():
                    site.give(f"{round_}-{number}")
            with site.transaction():
                site.debit(f"lost {round_}", without="credits")
            written += 402
            wait_until(lambda before=read: command.records() > before, "it goes on")  # type: ignore[misc]
            assert command.end(signal.SIGKILL) != 0
        command.start()
        wait_until(
            lambda: (
                command.records() == written and command.status()["anomalies"].get("ledger", {}).get("vanished") == 4
            ),
            "all is judged",
        )
        assert command.end(signal.SIGTERM) == 1, "something was found"
        assert set(command.status()["anomalies"]) == {"ledger"}
        said = {each["number"]: each for each in command.documents() if "anomaly" in each}
        assert [*said] == [*range(1, len(said) + 1)]
        kinds = [each["anomaly"] for each in said.values()]
        assert kinds.count("vanished") == 4
        assert set(kinds) == {"vanished", "unbalanced"}
        assert sum(command.status()["anomalies"]["ledger"].values()) == len(said)

    def test_a_real_worker_under_load_and_killed_gives_it_nothing_to_say(self, kafka_url: str, tmp_path: Path) -> None:
        """It would cry wolf at each crash, or a crash would lose money."""
        prefix = f"g{uuid4().hex[:8]}-"
        command = Command(kafka_url, prefix, tmp_path / "data", tmp_path / "lines")
        faust = [sys.executable, "-m", "faust", "-A", "streams_app"]
        env = {**command.env, "STREAMS_APP_GUARANTEES": "exactly_once", "STREAMS_APP_SLOT": "one"}
        count = 6_000
        log = open(tmp_path / "worker", "wb")  # noqa: SIM115
        worker = None
        generate = [*faust, "generate", "transfers", "--count", str(count), "--rate", "600"]
        feed = subprocess.Popen(generate, env=env, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
        command.start()
        try:
            for _ in range(2):
                before = command.records()
                worker = subprocess.Popen([*faust, "worker"], env=env, cwd=CHECKOUT, stdout=log, stderr=log)
                wait_until(lambda read=before: command.records() > read + 1_000, "money moves", 120)  # type: ignore[misc]
                if before == 0:
                    worker.kill()
                    worker.wait(30)
            assert feed.wait(120) == 0

            def at_rest() -> bool:
                figures = command.status()["followers"]["ledger"]["figures"]
                lag = next(each["lag"] for each in command.status()["apps"] if each["app_id"] == f"{prefix}streams-app")
                return figures["credits_on_their_way"] == 0 and lag < 20

            wait_until(at_rest, "all is through", 120)
            assert command.end(signal.SIGTERM) == 0
            assert command.status()["anomalies"] == {}
            assert set(command.status()["followers"]["ledger"]["figures"]["sum"].values()) == {0}
        finally:
            for process in (feed, worker, command.process):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
            log.close()
