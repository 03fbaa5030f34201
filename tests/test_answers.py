"""The followers that count what was lost and repeated while events flow: they say what the audit says of the same records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import pytest

from agents.analytics_follow import ViewsFollower
from agents.analytics_input import page_views
from agents.ledger_answers import TransfersFollower
from agents.ledger_input import transfers
from agents.sensors_follow import ReadingsFollower
from agents.sensors_input import readings
from streams_app.follow import DiskMemory
from streams_app.registry import Cut, Followed, Follower, Observed
from streams_app.settings import Settings
from tests.ledger_world import PARTITIONS, World
from tests.test_analytics import NOON, Analytics
from tests.test_sensors import Sensors


class Kind(NamedTuple):
    """One of the three worlds, and who judges it."""

    world: Callable[[], Any]
    follower: type[Follower]
    source: Callable[..., Iterator[Any]]

    @property
    def input(self) -> str:
        return self.follower.topics[0]

    @property
    def output(self) -> str:
        return self.follower.topics[1]


class Prompt(ReadingsFollower):
    """Does not wait for what may be late."""

    settle_s = 0.0


KINDS = {
    "exactly once": Kind(World, TransfersFollower, transfers),
    "at most once": Kind(Sensors, Prompt, readings),
    "at least once": Kind(Analytics, ViewsFollower, partial(page_views, clock=NOON.timestamp)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


class Told:
    """A follower that is told a world, cut by cut, as the reader would."""

    def __init__(self, folder: Path, cls: type[Follower], starts: dict[tuple[str, int], int] | None = None) -> None:
        self.folder, self.cls, self.starts = folder, cls, starts or {}
        self.positions: dict[tuple[str, int], int] = defaultdict(int)
        self.horizon_ms = 0
        self.open()

    def open(self) -> None:
        self.memory = DiskMemory(self.folder / "follower")
        counts = dict.fromkeys(self.cls.topics, PARTITIONS)
        self.follower = self.cls(Followed(Settings(), counts, self.starts, self.memory))

    def tell(self, world: World, random: Random | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """What is new in the world, up to a cut; ``meanwhile`` happens after the cut was begun.

        With ``random`` in chunks of partitions as they come, some of them beyond the cut, now and then with a restart.
        """
        self.memory.meta.cut += 1
        topic = self.cls.topics[0]
        committed = {(topic, p): 2 * world.consumed[topic, p] for p in range(PARTITIONS)}
        ends = {(each, p): len(world.topics[each][p]) for each in self.cls.topics for p in range(PARTITIONS)}
        meanwhile()
        while waiting := [tp for tp, end in ends.items() if self.positions[tp] < end]:
            chunk: list[Observed] = []
            for tp in waiting if random is None else random.sample([*ends], len(ends)):
                log = world.topics[tp[0]][tp[1]]
                end = ends[tp] if random is None else min(len(log), self.positions[tp] + random.randint(0, 60))
                chunk += log[self.positions[tp] : end]
                self.positions[tp] = max(end, self.positions[tp])
            self.follower.observe(chunk)
            self.memory.commit()
            if random is not None and random.random() < 0.1:
                self.memory.close()
                self.open()
        self.follower.cut(Cut(self.memory.meta.cut, committed, self.horizon_ms))
        self.memory.commit()

    def figures(self) -> dict[str, Any]:
        return dict(self.follower.figures())


@pytest.fixture
def told(tmp_path: Path, kind: Kind) -> Iterator[Told]:
    made = Told(tmp_path, kind.follower)
    yield made
    made.memory.close()


def written(world: Any, records: Sequence[Any]) -> None:
    if isinstance(world, Analytics):
        world.write(records, NOON + timedelta(seconds=10))
    else:
        world.write(records)


@pytest.mark.parametrize("seed", range(4))
def test_a_good_history_in_any_order_of_topics_and_with_restarts_has_nothing(told: Told, kind: Kind, seed: int) -> None:
    """A dashboard that shows losses where there are none is not looked at any more."""
    random, world = Random(seed), kind.world()
    source = kind.source(Random(f"good {seed}"), 30)

    def more() -> None:
        written(world, [*islice(source, random.randint(1, 150))])
        world.run(random)

    for _ in range(8):
        more()
        told.tell(world, random, more)
    told.tell(world, random)
    told.tell(world)
    assert told.memory.meta.anomalies == {}, told.memory.recent
    figures = told.figures()
    assert (figures["lost"], figures["repeated"]) == (0, 0)
    assert figures["set_aside"] == len(
        [each for each in world.all("dead-letters") if each.headers["dlq.topic"] == kind.input.encode()]
    )
    assert figures["set_aside"] > 0
    left = [key for kind in (b"k", b"p", b"e", b"i") for key, _ in told.memory.scan(kind, bytes([kind[0] + 1]))]
    assert left == [], "what is complete is forgotten, or the disk fills"


@pytest.mark.parametrize("seed", range(4))
def test_what_was_lost_and_repeated_is_counted_as_the_audit_counts_it(told: Told, kind: Kind, seed: int) -> None:
    """The page would say one thing while events flow, and the audit another one afterwards."""
    random, world = Random(f"bad {seed}"), kind.world()
    written(world, [*islice(kind.source(Random(f"bad {seed}"), 30), 6_000)])
    world.run(random)
    damage(world, kind, random)
    told.tell(world, random)
    told.tell(world)
    told.tell(world)
    verdict = world.judge().figures
    figures = told.figures()
    assert verdict["lost"] > 0
    assert verdict["repeated"] > 0
    assert {name: figures[name] for name in ("lost", "repeated")} == {
        name: verdict[name] for name in ("lost", "repeated")
    }


def damage(world: Any, kind: Kind, random: Random) -> None:
    """Lose some outputs and dead letters, and have others twice."""
    letters = [each for each in world.all("dead-letters") if each.headers["dlq.topic"] == kind.input.encode()]
    outputs = world.all(kind.output)
    if kind.follower is ViewsFollower:
        # The last count of a minute: one that is missing in between is a gap, not a lost view.
        outputs = [*{(each.key, msgspec.json.decode(each.value)["window_start"]): each for each in outputs}.values()]
    elif kind.follower is TransfersFollower:
        # Whose id came once: the audit counts what a lost answer leaves open in other topics, too.
        outputs = [each for each in outputs if msgspec.json.decode(each.value)["reason"] == "same_account"]
        outputs = [each for each in outputs if [one.value for one in outputs].count(each.value) == 1]
    lost = random.sample(outputs, 3) + random.sample(letters, 3)
    for each in lost:
        world.topics[each.topic][each.partition].remove(each)
    whole = [each for each in [*outputs, *letters] if each not in lost]
    for each in random.sample(whole, 5):
        log = world.topics[each.topic][each.partition]
        log.insert(log.index(each) + 1, each._replace(offset=each.offset + 1))


def test_what_is_not_consumed_is_not_lost(told: Told, kind: Kind) -> None:
    """A backlog would be shown as a catastrophe."""
    world = kind.world()
    written(world, [*islice(kind.source(Random("backlog"), 30), 300)])
    for _ in range(3):
        told.tell(world)
    assert (told.figures()["lost"], told.memory.meta.anomalies) == (0, {})
    world.run(Random(1))
    told.tell(world)
    told.tell(world)
    assert (told.figures()["lost"], told.figures()["repeated"]) == (0, 0)


def test_what_was_deleted_before_we_came_is_believed(tmp_path: Path, kind: Kind) -> None:
    """Opened on topics that retention has shortened, the page would show everything as lost."""
    random, world = Random("deleted"), kind.world()
    written(world, [*islice(kind.source(Random("deleted"), 30), 600)])
    world.run(random)
    starts = {}
    for topic in kind.follower.topics:
        for partition, log in enumerate(world.topics[topic]):
            gone = random.randint(0, len(log))
            starts[topic, partition] = 2 * gone
            del log[:gone]
    told = Told(tmp_path, kind.follower, starts)
    told.horizon_ms = int((NOON + timedelta(hours=1)).timestamp() * 1000)
    told.tell(world, random)
    told.tell(world)
    assert (told.memory.meta.anomalies, told.figures()["lost"]) == ({}, 0)
    told.memory.close()


def told_late(folder: Path, world: Sensors, late: Observed) -> Told:
    """A follower that has missed this record for a cut, and has it then."""
    world.remove(late)
    told = Told(folder, Prompt)
    told.tell(world)
    assert told.figures()["lost"] == 1
    world.topics[late.topic][late.partition].append(late)
    told.tell(world)
    told.tell(world)
    assert (told.figures()["lost"], told.memory.meta.anomalies) == (0, {})
    return told


def test_an_answer_that_comes_late_is_no_loss(tmp_path: Path) -> None:
    """At most once commits first: what a frozen worker still does after it wakes was never lost."""
    world = Sensors()
    world.reading(seq=1)
    world.run()
    [late] = world.all("sensor-observations")
    told = told_late(tmp_path, world, late)
    told.memory.close()


def test_a_dead_letter_that_comes_late_is_no_repetition(tmp_path: Path) -> None:
    """The same of one that tells no device: all that it has in common with its reading is the place."""
    world = Sensors()
    world.append("sensor-readings", b"device", b"no JSON")
    world.run()
    [late] = world.all("dead-letters")
    told = told_late(tmp_path, world, late)
    world.topics[late.topic][late.partition].append(late._replace(offset=late.offset + 1))
    told.tell(world)
    told.tell(world)
    assert set(told.memory.meta.anomalies) == {"repeated"}
    told.memory.close()


def test_what_may_be_late_is_waited_for(tmp_path: Path) -> None:
    """Each batch in hand would flicker as lost."""
    world = Sensors()
    world.reading(seq=1)
    world.run()
    world.remove(world.all("sensor-observations")[0])
    told = Told(tmp_path, ReadingsFollower)
    told.tell(world)
    told.tell(world)
    assert told.figures()["lost"] == 0
    told.memory.close()


def test_a_transfer_that_was_misplaced_and_sent_again_is_one_answer_and_one_letter(tmp_path: Path) -> None:
    """Told apart by their id alone, the answer would be taken for the wrong one's."""
    world = World()
    fields = {"id": "1", "debit_account": "external:b", "credit_account": "bob", "amount": 1, "currency": "EUR"}
    world.append("transfers", b"another", msgspec.json.encode(fields))
    world.transfer(**fields)
    world.run(Random(1))
    told = Told(tmp_path, TransfersFollower)
    told.tell(world)
    told.tell(world)
    figures = told.figures()
    assert (figures["lost"], figures["repeated"], figures["set_aside"], figures["answers_total"]) == (0, 0, 1, 1)
    told.memory.close()
