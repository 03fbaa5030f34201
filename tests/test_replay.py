"""Replay: dead letters brought home once, whole, and to where they came from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from streams_app.errors import ConfigurationError, TransactionAborted
from streams_app.kafka import KafkaAddress
from streams_app.letters import Choice, Place
from streams_app.partitioning import partition_of
from streams_app.replay import REPLAYED, Replay, Transactions
from streams_app.session import Output
from tests.letters_world import EVERYTHING, NOW_MS, PARTITIONS, ROOT, Came, World
from tests.rig import wait_until

#: Letters of a transaction, where it matters.
CHUNK = 10


@pytest.fixture
def world(kafka_url: str) -> World:
    return World(kafka_url)


def content(message: Message) -> tuple[int | None, bytes | None, bytes | None, list[Any]]:
    return message.partition(), message.key(), message.value(), list(message.headers() or [])


def home_of(world: World, topic: str = "transfers") -> Counter[str]:
    """How often each letter came home, by its place."""
    return Counter(dict(message.headers() or [])[REPLAYED].decode() for message in world.read(topic))


def anomalies(work: Replay) -> list[str]:
    return [finding.anomaly for finding in work.findings.list()]


class TestReplay:
    """Back to where they came from, as they came."""

    @pytest.mark.parametrize("fenced", [True, False])
    def test_key_value_headers_and_partition_are_as_they_came(self, world: World, fenced: bool) -> None:
        """The mended agent would see another event than the one that failed."""
        came = [
            Came(partition=3, key=b"\x00\xff", value=bytes(range(256)), headers=[("a", b"1"), ("a", b""), ("b", None)]),
            Came(partition=2, key=None, value=b"no key"),
            Came(partition=0, key=b"", value=b""),
            Came(partition=1, key=b"tombstone", value=None),
        ]
        places = world.put(*map(world.letter, came))
        work = world.replay(fenced=fenced)
        assert (work.sent, work.already, anomalies(work)) == (len(came), 0, [])
        expected = [
            (each.partition, each.key, each.value, [*each.headers, (REPLAYED, str(place).encode())])
            for each, place in zip(came, places, strict=True)
        ]
        assert sorted(map(content, world.read()), key=str) == sorted(expected, key=str)

    def test_a_letter_that_only_lay_in_the_wrong_partition_goes_where_its_key_belongs(self, world: World) -> None:
        """Back in the same partition it would fail again, for ever."""
        belongs = partition_of(b"alice", PARTITIONS)
        world.put(world.letter(Came(partition=(belongs + 1) % PARTITIONS), "wrong_partition"))
        world.replay()
        assert [message.partition() for message in world.read()] == [belongs]

    def test_a_partition_that_is_gone_leaves_the_choice_to_the_key(self, world: World) -> None:
        """A topic made anew with fewer partitions would keep its letters for ever."""
        world.put(world.letter(Came(partition=PARTITIONS)))
        world.replay()
        assert [message.partition() for message in world.read()] == [partition_of(b"alice", PARTITIONS)]

    def test_order_within_a_key_is_kept(self, world: World) -> None:
        """A withdrawal would come before the deposit that it needs."""
        world.put(*(world.letter(Came(offset=number, value=b"%d" % number)) for number in range(30)))
        world.replay()
        assert [message.value() for message in world.read()] == [b"%d" % number for number in range(30)]

    @pytest.mark.parametrize("fenced", [True, False])
    def test_twice_is_once_unless_said_again(self, world: World, fenced: bool) -> None:
        """A nervous operator would post every deposit twice."""
        places = world.put(*(world.letter(Came(offset=number)) for number in range(5)))
        world.replay(fenced=fenced)
        second = world.replay(fenced=fenced)
        assert (second.due, second.sent, second.already, anomalies(second)) == (0, 0, 5, [])
        assert home_of(world) == Counter({str(place): 1 for place in places})
        assert {letter.replayed for letter in world.list().kept} == {True}
        again = world.replay(Choice(places=frozenset(places[:2])), again=True, fenced=fenced)
        assert again.sent == 2
        assert home_of(world) == Counter({str(place): 2 if place in places[:2] else 1 for place in places})

    def test_a_limit_takes_the_oldest_that_are_still_to_go(self, world: World) -> None:
        """Replay in steps would send the same ones, or those of today before those of yesterday."""
        times = [5, 1, 3]
        places = world.put(*(world.letter(Came(offset=ms))._replace(timestamp_ms=NOW_MS + ms) for ms in times))
        for expected in (places[1], places[2], places[0]):
            work = world.replay(limit=1)
            assert (work.sent, str(expected) in home_of(world)) == (1, True)
        assert home_of(world) == Counter({str(place): 1 for place in places})

    def test_a_letter_of_a_replayed_record_can_be_replayed_in_turn(self, world: World) -> None:
        """An agent that was mended wrongly could be mended only once."""
        [first] = world.put(world.letter(Came(headers=[("a", b"1")])))
        world.replay()
        [record] = world.read()
        [second] = world.put(world.letter(Came(offset=8, headers=record.headers())))
        assert world.replay().sent == 1
        assert [content(message)[3] for message in world.read()] == [
            [("a", b"1"), (REPLAYED, str(first).encode())],
            [("a", b"1"), (REPLAYED, str(second).encode())],
        ]

    @pytest.mark.parametrize("large", [Came(headers=[("big", b"x" * 100_000)]), Came(value=b"x" * 1_000_000)])
    def test_what_is_not_whole_stays_unless_said(self, world: World, large: Came) -> None:
        """Half a record, or one without its headers, would be handled as if it were the one that was sent."""
        [cut, whole] = world.put(world.letter(large), world.letter(Came()))
        refused = world.replay()
        assert (refused.sent, len(anomalies(refused))) == (1, 1)
        assert "--cut-too" in anomalies(refused)[0]
        assert home_of(world) == Counter({str(whole): 1})
        assert world.replay(cut_too=True).sent == 1
        assert home_of(world) == Counter({str(whole): 1, str(cut): 1})

    def test_trouble_with_one_does_not_keep_the_others(self, world: World) -> None:
        """One letter of a topic that was deleted would block all that wait behind it."""
        foreign = Output(world.prefix + "dead-letters", b"x", b"not ours")
        good = world.letter(Came())
        world.put(world.letter(Came("deleted")), foreign, good)
        work = world.replay()
        assert (work.sent, sorted(anomalies(work))) == (
            1,
            ["it does not say where it came from", "the topic it came from does not exist"],
        )
        assert f"{world.prefix}deleted" not in AdminClient(world.address.librdkafka()).list_topics(timeout=10).topics

    def test_a_place_without_letter_is_said(self, world: World) -> None:
        """Somebody would believe that the letter went home."""
        world.put(world.letter(Came()))
        work = world.replay(Choice(places=frozenset({Place(0, 5_000), Place(99, 0)})))
        assert work.sent == 0
        [finding] = work.findings.list()
        assert finding.examples == ["0@5000", "99@0"]

    @pytest.mark.parametrize("fenced", [True, False])
    def test_what_the_brokers_refuse_is_named_and_the_others_go_home(self, world: World, fenced: bool) -> None:
        """One record that has become too large would take a whole transaction of good ones with it, for ever."""
        world.create("small", **{"max.message.bytes": "2000"})
        came = [Came("small", key=b"k%d" % number) for number in range(20)]
        came[11] = Came("small", key=b"large", value=os.urandom(5_000))
        places = world.put(*map(world.letter, came))
        work = world.replay(fenced=fenced)
        [finding] = work.findings.list()
        assert finding.examples == [f"{places[11]} from small[1]@7"]
        assert "large" in finding.anomaly.lower()
        assert work.sent == 19
        assert home_of(world, "small") == Counter({str(place): 1 for place in places if place != places[11]})


#: Replays everything in transactions of CHUNK letters, and dies in the third: before its end, or right after it.
DYING = f"""
import os, signal, sys
from confluent_kafka import Producer
from streams_app import letters, replay
from streams_app.kafka import KafkaAddress
from streams_app.settings import Settings

replay._CHUNK_RECORDS = {CHUNK}
url, prefix, when = sys.argv[1:]

class Dying(Producer):
    ends = 0

    def commit_transaction(self, *args):
        self.ends += 1
        if self.ends == 3 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        super().commit_transaction(*args)
        if self.ends == 3:
            os.kill(os.getpid(), signal.SIGKILL)

address = KafkaAddress.parse(url)
read = letters.Letters(address, Settings(kafka_prefix=prefix))
sender = replay.Transactions(read, prefix + "streams-app-replay", new_producer=Dying)
replay.Replay(read, letters.Choice()).send(sender)
"""


class Unsure(Producer):
    """Its first commit ends in a time-out, after or before it took effect."""

    takes_effect = True
    failures = 0

    def commit_transaction(self, *args: Any) -> None:
        if type(self).failures:
            type(self).failures -= 1
            if self.takes_effect:
                super().commit_transaction(*args)
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        super().commit_transaction(*args)


class UnsureAborted(Unsure):
    takes_effect = False


def test_what_an_earlier_producer_tells_is_not_about_this_transaction() -> None:
    """Its reports may come late: letters that no broker has refused would be told as refused, and stay where they are."""
    made: list[Any] = []
    address = KafkaAddress.parse("kafka://127.0.0.1:1")
    read: Any = SimpleNamespace(address=address, notes=None)
    sender = Transactions(read, "id", new_producer=made.append)  # type: ignore[arg-type]
    for _ in range(2):
        sender._producer({})
    refused = KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)
    made[0]["on_delivery"](refused, None)
    assert sender._reasons == []
    made[1]["on_delivery"](refused, None)
    assert len(sender._reasons) == 1


class TestOnce:
    """Each letter comes home once, whatever happens meanwhile."""

    @pytest.fixture
    def places(self, world: World) -> list[Place]:
        """Fifty letters."""
        return world.put(*(world.letter(Came(offset=number, key=b"k%d" % number)) for number in range(50)))

    @pytest.mark.parametrize(("when", "home"), [("before", 2 * CHUNK), ("after", 3 * CHUNK)])
    def test_a_replay_that_was_killed_goes_on_where_it_ended(
        self, world: World, places: list[Place], when: str, home: int
    ) -> None:
        """Whoever restarts it after a crash would pay some people twice, or not at all."""
        dying = subprocess.run(
            [sys.executable, "-c", DYING, world.url, world.prefix, when], cwd=ROOT, timeout=120, check=False
        )
        assert dying.returncode == -signal.SIGKILL
        assert home_of(world).total() == home
        work = world.replay()
        # Those of the killed one are known as soon as the new one has fenced it off.
        assert (work.sent, work.already, anomalies(work)) == (50 - home, home, [])
        assert home_of(world) == Counter({str(place): 1 for place in places})

    def test_a_second_replay_ends_the_first(self, world: World, places: list[Place]) -> None:
        """Two operators with the same idea would send everything twice."""
        first, second = world.opened(), world.opened()
        slow, quick = Replay(first, EVERYTHING), Replay(second, EVERYTHING)
        sender = world.transactions(first)
        sender.open()
        quick.send(world.transactions(second))
        with pytest.raises(TransactionAborted, match="another replay took over"):
            sender.deliver(list(slow._outgoing()))
        for letters in (first, second):
            letters.close()
        assert home_of(world) == Counter({str(place): 1 for place in places})

    def test_what_was_noted_since_the_look_is_not_sent(self, world: World, places: list[Place]) -> None:
        """While one operator reads the question, another has answered it."""
        letters = world.opened()
        work = Replay(letters, EVERYTHING)
        world.replay(Choice(places=frozenset(places[:10])))
        work.send(world.transactions(letters))
        letters.close()
        assert (work.sent, work.already) == (40, 10)
        assert home_of(world) == Counter({str(place): 1 for place in places})

    @pytest.mark.parametrize("producer", [Unsure, UnsureAborted])
    @pytest.mark.parametrize("again", [False, True])
    def test_after_an_unknown_outcome_the_notes_tell(
        self, world: World, places: list[Place], producer: type[Unsure], again: bool
    ) -> None:
        """A commit that timed out would be repeated although it took effect, or given up although it did not."""
        if again:
            world.replay()
        letters = world.opened()
        work = Replay(letters, EVERYTHING, again=again)
        producer.failures = 1
        work.send(world.transactions(letters, producer))
        letters.close()
        assert (work.sent, work.already, anomalies(work)) == (50, 0, [])
        assert home_of(world) == Counter({str(place): 1 + again for place in places})

    def test_without_permission_the_way_out_is_named(self, world: World, places: list[Place]) -> None:
        """On a cluster that permits no transactions, nobody would know how to go on; silence would repeat letters."""

        class Forbidden(Producer):
            def init_transactions(self, *_: Any) -> None:
                raise KafkaException(KafkaError(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED))

        letters = world.opened()
        work = Replay(letters, EVERYTHING)
        with pytest.raises(ConfigurationError, match="--without-transactions"):
            work.send(world.transactions(letters, Forbidden))
        letters.close()
        assert (work.sent, home_of(world).total()) == (0, 0)

    def test_letters_of_a_topic_made_anew_are_others(self, world: World, places: list[Place]) -> None:
        """They have the offsets of those that were replayed, and would be taken for them."""
        world.replay()
        admin = AdminClient(world.address.librdkafka())
        topic = f"{world.prefix}dead-letters"
        [deleted] = admin.delete_topics([topic]).values()
        deleted.result(timeout=30)
        wait_until(lambda: topic not in admin.list_topics(timeout=10).topics, "the topic is gone")
        wait_until(lambda: _created(world), "it is there again")
        [place] = world.put(world.letter(Came(key=b"k0")))
        assert place in places
        assert world.replay().sent == 1


def _created(world: World) -> bool:
    try:
        world.create("dead-letters")
    except KafkaException:
        return False
    return True
