"""One batch commits while the next is filled: what that sees, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams_app.batch import Batch, Overlay
from streams_app.commit import expire_all
from streams_app.errors import CommitUnconfirmed
from streams_app.pipeline import Pipeline
from streams_app.session import Pin
from streams_app.store import Store

PIN = Pin("group", 1, "member")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store", topic_id="id")
    made.publish({b"old": b"0", b"gone": b"0"}, [], 1)
    yield made
    made.close()


def view(batch: Batch, store: Store) -> Overlay:
    """The batch's view of the table."""
    return batch.overlay("table", 0, lambda below: Overlay(store, "changelog", below))


class Commits:
    """Stands where the commit path stands: each ends when the test says so, and how."""

    def __init__(self) -> None:
        self.begun: list[Batch] = []
        self._ends: list[asyncio.Future[Callable[[], None]]] = []

    async def commit(self, batch: Batch) -> None:
        self.begun.append(batch)
        self._ends.append(asyncio.get_running_loop().create_future())
        (await self._ends[-1])()

    async def end(self, how: Callable[[], None] = lambda: None) -> None:
        while not self._ends:  # noqa: ASYNC110
            await asyncio.sleep(0)
        self._ends.pop().set_result(how)


def fail() -> None:
    raise CommitUnconfirmed("nobody knows")


async def test_the_next_batch_sees_what_the_one_that_commits_wrote(store: Store) -> None:
    """Else two transfers of one account, a moment apart, would both start from the same balance."""
    commits = Commits()
    pipeline = Pipeline(commits.commit)
    first, second = Batch(PIN), Batch(PIN)
    pipeline.fill(first)
    view(first, store).writes |= {b"new": b"1", b"gone": None}
    pipeline.commit(first)
    pipeline.fill(second)
    seen = view(second, store)
    seen.writes[b"own"] = b"2"
    assert (seen.get(b"old"), seen.get(b"new"), seen.get(b"gone"), seen.get(b"own")) == (b"0", b"1", None, b"2")
    assert dict(seen.items()) == {b"old": b"0", b"new": b"1", b"own": b"2"}

    def publish() -> None:
        store.publish(first.overlays["table", 0].writes, [], 2)

    walking = seen.items()
    assert next(walking) == (b"old", b"0")
    await commits.end(publish)
    await pipeline.ended()
    assert dict(walking) == {b"new": b"1", b"own": b"2"}, "begun before the end, finished behind it"
    assert seen.below is None, "else every batch would keep all before it in memory"
    assert dict(seen.items()) == {b"old": b"0", b"new": b"1", b"own": b"2"}


async def test_a_commit_that_failed_is_told_before_the_next_begins(store: Store) -> None:
    """The next one was filled with values that may never have come to be."""
    commits = Commits()
    pipeline = Pipeline(commits.commit)
    first, second = Batch(PIN), Batch(PIN)
    pipeline.fill(first)
    view(first, store).writes[b"new"] = b"1"
    pipeline.commit(first)
    pipeline.fill(second)
    first.drop()
    assert view(second, store).get(b"new") == b"1", "events in hand go on, and must not be blamed for what they see"
    await commits.end(fail)
    with pytest.raises(CommitUnconfirmed):
        await pipeline.ended()
    await pipeline.ended()
    third = Batch(PIN)
    pipeline.fill(third)
    assert view(third, store).get(b"new") is None
    assert commits.begun == [first]


async def test_who_waits_and_is_cancelled_leaves_the_commit_alone(store: Store) -> None:
    """It may have taken effect already; half of it would be a torn store."""
    commits = Commits()
    pipeline = Pipeline(commits.commit)
    pipeline.fill(first := Batch(PIN))
    pipeline.commit(first)
    waiting = asyncio.ensure_future(pipeline.ended())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await commits.end()
    await pipeline.ended()
    assert waiting.cancelled()


async def test_who_goes_through_a_table_and_writes_it_comes_by_each_key_once(store: Store) -> None:
    """Else ``for key in table: table[key] += 1`` would add two."""
    pipeline = Pipeline(Commits().commit)
    first, second = Batch(PIN), Batch(PIN)
    pipeline.fill(first)
    view(first, store).writes |= {b"below": b"1"}
    pipeline.commit(first)
    pipeline.fill(second)
    seen = view(second, store)
    seen.writes[b"own"] = b"2"
    keys = []
    for key, _ in seen.items():
        keys.append(key)
        seen.writes[key] = b"3"
    assert sorted(keys) == [b"below", b"gone", b"old", b"own"]


async def test_nothing_is_filled_over_a_commit_that_failed(store: Store) -> None:
    """Its writes are forgotten: an event that misses them would be blamed for it. One in hand is not waited for."""
    commits = Commits()
    pipeline = Pipeline(commits.commit)
    first, second = Batch(PIN), Batch(PIN)
    pipeline.fill(first)
    pipeline.commit(first)
    pipeline.fill(second)
    second.pending = 1
    assert not pipeline.failed
    await commits.end(fail)
    await asyncio.wait_for(second.settled(), 5)
    assert isinstance(second.trouble, CommitUnconfirmed)
    assert pipeline.failed
    with pytest.raises(CommitUnconfirmed):
        await pipeline.ended()
    assert not pipeline.failed


async def test_what_expires_is_gone_before_the_next_batch_reads(tmp_path: Path) -> None:
    """A value that goes between two looks of one event, though it awaits nothing, would be a riddle."""
    expiring = Store(tmp_path / "expiring", topic_id="id", expires_ms=1_000)
    try:
        expiring.publish({b"old": (1_000).to_bytes(8) + b"0"}, [], 1)
        first = Batch(PIN)
        seen = view(first, expiring)
        seen.writes[b"new"] = seen.time(5_000) + b"1"
        stale = expire_all(first)
        assert (seen.writes[b"old"], len(stale[seen])) == (None, 2), "its entry in the index, and that of the clock"
        assert expire_all(first) is stale, "once, or the second time would find less"
    finally:
        expiring.close()
