"""Replicas: stores that follow what others write, and change hands as a whole."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from streams_app.application import App
from streams_app.errors import KafkaUnreachable, StoreFailed
from streams_app.provision import TopicSpec, create_topics
from streams_app.settings import Settings
from streams_app.slot import acquire
from streams_app.store import Store
from tests.rig import rig, wait_until

PARTITIONS = 2


class Changelog:
    """The changelog of one table, and who follows it."""

    def __init__(self, kafka_url: str, folder: Path) -> None:
        self.app = App(
            f"replicas-{uuid4().hex[:8]}",
            settings=Settings(kafka_url=kafka_url, datadir=folder),
            autodiscover=False,
            web_enabled=False,
        )
        self.table = self.app.Table("balance", key_type=str, value_type=int)
        self.topic = self.table.changelog_topic_name
        self.app.slot = acquire(folder, self.app.conf.id, "one")
        self.replicas = self.app.replicas
        self.create()
        self.producer = Producer({**self.app.kafka.librdkafka(), "transactional.id": self.app.conf.id})
        self.producer.init_transactions(10)

    def create(self) -> None:
        create_topics(self.app.kafka, [TopicSpec(self.topic, PARTITIONS, 1, {"cleanup.policy": "compact"})])

    def write(self, *, commits: bool = True, partition: int = 0, **values: int | None) -> None:
        """In one transaction."""
        self.producer.begin_transaction()
        for key, value in values.items():
            self.producer.produce(self.topic, key=key, value=None if value is None else str(value), partition=partition)
        self.producer.flush(10)
        if commits:
            self.producer.commit_transaction(10)
        else:
            self.producer.abort_transaction(10)

    def take_over(self, *partitions: int, returned: dict[int, Store] | None = None) -> dict[int, Store]:
        """As the engine does when an assignment begins: own these, be a standby of the others."""
        owned = {(self.topic, partition) for partition in partitions}
        others = {(self.topic, partition) for partition in range(PARTITIONS)} - owned
        given = {(self.topic, partition): store for partition, store in (returned or {}).items()}
        taken = self.replicas.exchange(given, owned, others)
        return {partition: store for (_, partition), store in taken.items()}

    def copy(self) -> None:
        """Write a value into each partition, and have all of them followed and shown."""
        self.write(a=1)
        self.write(partition=1, b=2)
        self.app.follow(self.table)
        self.replicas.follow()
        self.wait_shown()

    def wait_shown(self) -> None:
        """Wait until all partitions are."""
        wait_until(lambda: len(self.table.data.copies) == PARTITIONS, "all partitions are shown")

    def followed(self, partition: int = 0) -> dict[str, int]:
        """What the replica holds; asked in its thread, which owns it."""

        def look() -> dict[str, int]:
            store = self.replicas._stores.get((self.topic, partition))
            return {} if store is None else values_of(store)

        return self.replicas._thread.submit(look).result()

    def wait_for(self, expected: dict[str, int], partition: int = 0) -> None:
        wait_until(lambda: self.followed(partition) == expected, f"the replica has {expected}")


@pytest.fixture
def changelog(kafka_url: str, tmp_path: Path) -> Iterator[Changelog]:
    made = Changelog(kafka_url, tmp_path)
    yield made
    made.replicas.close()
    made.app.slot.release()


def values_of(store: Store) -> dict[str, int]:
    return {key.decode(): int(value) for key, value in store.items()}


def test_a_replica_has_what_was_committed_and_nothing_else(changelog: Changelog) -> None:
    """A standby that had taken in an aborted write would begin its work with a wrong balance."""
    changelog.write(a=1, b=2)
    changelog.take_over()
    changelog.replicas.follow()
    changelog.wait_for({"a": 1, "b": 2})
    changelog.write(commits=False, a=666)
    changelog.write(b=None, c=3)
    changelog.wait_for({"a": 1, "c": 3})
    taken = changelog.take_over(0, 1)
    assert values_of(taken[0]) == {"a": 1, "c": 3}
    assert values_of(taken[1]) == {}
    for store in taken.values():
        store.close()


def test_a_store_that_comes_back_goes_on_where_its_owner_left_it(changelog: Changelog) -> None:
    """What was fetched before it was given away lies behind what its owner wrote: applied then, it would undo that."""
    changelog.write(a=1)
    changelog.take_over()
    changelog.replicas.follow()
    changelog.wait_for({"a": 1})
    store = changelog.take_over(0)[0]
    changelog.replicas.follow()
    changelog.write(a=2)
    assert store.checkpoint is not None
    # A transaction's marker lies between two records.
    store.publish({b"a": b"2"}, [], store.checkpoint.offset + 2)
    changelog.write(a=3, b=1)
    assert changelog.take_over(returned={0: store}) == {}
    changelog.replicas.follow()
    changelog.wait_for({"a": 3, "b": 1})


def test_a_replica_that_restarts_reads_on_from_its_checkpoint(changelog: Changelog, tmp_path: Path) -> None:
    """Else each restart of a standby would read whole tables."""
    changelog.write(**{f"k{number}": number for number in range(500)})
    changelog.take_over()
    changelog.replicas.follow()
    wait_until(lambda: changelog.replicas.records == 500, "all are read")
    changelog.replicas.close()
    del changelog.app.__dict__["replicas"]
    changelog.replicas = changelog.app.replicas
    changelog.write(k0=7)
    changelog.take_over()
    changelog.replicas.follow()
    wait_until(lambda: changelog.followed().get("k0") == 7, "it goes on")
    assert changelog.replicas.records == 1
    assert len(changelog.followed()) == 500


def test_a_changelog_that_was_created_anew_is_read_anew(changelog: Changelog) -> None:
    """Values of the old one are of another table, whatever their offsets say."""
    changelog.write(a=1)
    changelog.write(a=2, b=1)
    changelog.take_over()
    changelog.replicas.follow()
    changelog.wait_for({"a": 2, "b": 1})
    admin = AdminClient(changelog.app.kafka.librdkafka())
    [deleted] = admin.delete_topics([changelog.topic]).values()
    deleted.result()
    wait_until(lambda: changelog.topic not in admin.list_topics(timeout=10).topics, "the topic is gone")
    changelog.create()
    changelog.write(c=3)
    changelog.take_over()
    changelog.replicas.follow()
    changelog.wait_for({"c": 3})


def test_a_copy_is_read_when_it_is_whole(changelog: Changelog) -> None:
    """Half of a table looks like a whole one from which something was deleted."""
    changelog.copy()
    assert dict(changelog.table.items()) == {"a": 1, "b": 2}
    changelog.write(partition=1, b=3)
    wait_until(lambda: changelog.table.get("b") == 3, "it is followed")
    taken = changelog.take_over(1)
    changelog.table.data.partitions = taken
    changelog.replicas.follow()
    wait_until(lambda: 1 not in changelog.table.data.copies, "what is owned is no copy")
    assert dict(changelog.table.items()) == {"a": 1, "b": 3}
    taken[1].close()


def test_trouble_is_said_and_passes(changelog: Changelog, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A standby that silently stands still is none."""
    monkeypatch.setattr("streams_app.replicas._RETRY_S", 0.2)
    changelog.write(a=1)
    opened: Callable[[], object] = changelog.replicas._opened
    failures = iter([StoreFailed("the disk is full")])

    def fails_once() -> object:
        for error in failures:
            raise error
        return opened()

    monkeypatch.setattr(changelog.replicas, "_opened", fails_once)
    changelog.take_over()
    changelog.replicas.follow()
    changelog.wait_for({"a": 1})
    assert "the disk is full" in caplog.text


def test_a_copy_answers_while_its_reader_is_opened_anew(changelog: Changelog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an hour, and after each trouble with the brokers, a process that only answers would be sent nothing."""
    changelog.copy()
    replicas, opened = changelog.replicas, changelog.replicas._opened
    wait_until(lambda: replicas.is_current, "it is current")
    tries: list[bool] = []

    def fails_twice() -> object:
        tries.append(replicas.is_current)
        if len(tries) < 3:
            raise KafkaUnreachable("no broker answers")
        return opened()

    monkeypatch.setattr("streams_app.replicas._RETRY_S", 0.2)
    monkeypatch.setattr(replicas, "_opened", fails_twice)
    replicas._reopened_every_s = 0.0
    wait_until(lambda: len(tries) == 3, "it is opened anew")
    assert tries == [True] * 3
    wait_until(lambda: replicas.is_current, "it is current again")
    taken = changelog.take_over(0)
    assert not replicas.is_current, "what is to be followed now is not known"
    for store in taken.values():
        store.close()


def test_a_copy_that_turns_out_corrupt_is_read_anew(changelog: Changelog) -> None:
    """Only those of the worker's own partitions were: who read it would fail for ever, and so would all other copies."""
    changelog.copy()
    records, store = changelog.replicas.records, changelog.table.data.copies[0]
    store.corrupt = True
    changelog.replicas.follow()
    wait_until(lambda: changelog.replicas.records == records + 1, "it is read again, and the other one is not")
    changelog.wait_shown()
    assert not store.corrupt
    assert dict(changelog.table.items()) == {"a": 1, "b": 2}


def restored(log: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+) records restored", log)]


def test_a_standby_takes_over_without_a_restore(kafka_url: str, tmp_path: Path) -> None:
    """A table of ten million keys would be read for half a minute, in which nobody's money moves."""
    with rig(kafka_url, tmp_path) as made:
        first = made.worker("one").wait_started()
        made.send(4_000, keys=2_000)
        made.wait_drained()
        standby = made.worker("two").wait_started()
        made.send(1_000, keys=2_000)
        made.wait_drained()
        assert sum(restored(standby.log.read_text())) > 500
        before = standby.log.read_text()
        first.kill()
        standby.wait_started(before.count("partitions started") + 1)
        made.send(500, keys=2_000)
        made.wait_drained()
        after = standby.log.read_text()[len(before) :]
        assert sum(restored(after)) < 100, after
        made.stop()
        made.check()
        made.check_stores()


def test_every_worker_reads_a_global_table_whole(kafka_url: str, tmp_path: Path) -> None:
    """Rates are written by whoever has their partition, and needed wherever money is."""
    with rig(kafka_url, tmp_path) as made:
        made.app = "tests.apps.rates"
        made.create_topics("rates")
        one, two = made.worker("one").wait_started(), made.worker("two").wait_started(1)
        producer = Producer(made.config)
        currencies = [f"C{number}" for number in range(20)]

        def set_rates(rate: int) -> None:
            for currency in currencies:
                producer.produce(made.prefix + "rates", key=currency, value=str(rate))
            producer.flush(10)

        def ask() -> list[list[int]]:
            """Each partition's agent tells what it knows of all currencies."""
            number = made.sent
            made.send(40, keys=20)
            wait_until(lambda: len(made.read("balances")) >= number + 40, "all answered")
            return [json.loads(message.value())["rates"] for message in made.read("balances")[-40:]]

        set_rates(3)
        wait_until(lambda: all(rates == [3] * 20 for rates in ask()), "both know the rates of all partitions")
        set_rates(5)
        wait_until(lambda: all(rates == [5] * 20 for rates in ask()), "both know the new ones")
        one.kill()
        two.wait_started(2)
        assert Counter(map(tuple, ask())) == {(5,) * 20: 40}
        made.worker("one").wait_started()
        assert Counter(map(tuple, ask())) == {(5,) * 20: 40}, "a worker that starts knows them before it begins"
