"""What is taken back from a batch comes again, and nothing else does."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import permutations
from typing import Any, cast

import pytest
from faust.types import TP, Message
from hypothesis import given
from hypothesis import strategies as st

from streams_app.batch import Batch
from streams_app.errors import DeadBatchError, NoAnswer
from streams_app.events import Event
from streams_app.faust_adapter import Fetched
from streams_app.session import Output, Pin

PIN = Pin("group", 1, "member")


def message(tp: TP, offset: int) -> Message:
    return Message(tp.topic, tp.partition, offset, 0.0, 0, [], b"k", b"v", None, 1, 1, tp)


def filled(records: dict[TP, int], agents: int, aside: set[tuple[TP, int]]) -> Batch:
    """A batch of so many records of each partition, each for so many agents, but for those set aside."""
    batch = Batch(PIN)
    for tp, count in records.items():
        batch.messages[tp] = [message(tp, offset) for offset in range(count)]
        batch.consumed[tp] = count
        for each in batch.messages[tp]:
            if (tp, each.offset) in aside:
                batch.set_aside[tp, each.offset] = Output("dead-letters", None, None)
                continue
            for _ in range(agents):
                batch.add([Event(cast(Any, None), None, None, [], each, batch)])
    return batch


@given(st.data())
def test_what_no_agent_has_begun_is_taken_back_whole(data: st.DataObject) -> None:
    """Taken back though begun, an event would be done twice; kept though not begun, it would hold up its batch."""
    partitions = [TP("a", 0), TP("a", 1), TP("b", 0)]
    records = {tp: data.draw(st.integers(1, 6)) for tp in data.draw(st.sets(st.sampled_from(partitions), min_size=1))}
    aside = {(tp, offset) for tp in records for offset in data.draw(st.sets(st.integers(0, 5)))}
    batch = filled(records, data.draw(st.integers(1, 2)), {at for at in aside if at[1] < records[at[0]]})
    everything = {tp: list(messages) for tp, messages in batch.messages.items()}
    for event in batch.events:
        event.taken = data.draw(st.booleans())
        if event.taken and data.draw(st.booleans()):
            event.ack()
    events = list(batch.events)
    withdrawn = batch.withdraw()
    for tp, messages in everything.items():
        assert batch.messages[tp] + withdrawn.get(tp, []) == messages
        end = len(batch.messages[tp])
        assert batch.consumed.get(tp, 0) == end
        assert all(offset < end for other, offset in batch.set_aside if other == tp)
        untaken = [event.message.offset for event in events if event.message.tp == tp and not event.taken]
        taken = [event.message.offset for event in events if event.message.tp == tp and event.taken]
        assert not taken or max(taken) < end, "an event that was begun stays"
        assert not withdrawn.get(tp) or withdrawn[tp][0].offset in untaken, "no more is taken back than need be"
    assert batch.pending == sum(not event.acked for event in batch.events)
    assert [event.withdrawn for event in events] == [event not in batch.events for event in events]


def test_nothing_enters_a_batch_that_is_over() -> None:
    """It would be in no transaction, or in half of one."""
    batch = Batch(PIN)
    batch.drop()
    with pytest.raises(DeadBatchError):
        batch.send(Output("t", None, None))
    batch = Batch(PIN)
    batch.seal()
    with pytest.raises(DeadBatchError):
        batch.send(Output("t", None, None))


def test_an_event_that_is_not_delivered_again_is_given_up_and_counted() -> None:
    """At most once: its neighbours go on, and the loss is told."""
    batch = Batch(PIN, redelivers=False)
    for offset in range(2):
        batch.add([Event(cast(Any, None), None, None, [], message(TP("a", 0), offset), batch)])
    batch.fail(batch.events[0])
    assert batch.failure is None
    assert (batch.given_up, batch.pending) == (1, 1)


@given(st.dictionaries(st.sampled_from([TP("a", 0), TP("a", 1), TP("b", 0)]), st.integers(1, 5)), st.integers(1, 16))
def test_what_was_taken_back_comes_again_in_its_order(counts: dict[TP, int], most: int) -> None:
    """Handed out in parts, and some of it taken back again, it must neither be lost nor turned round."""
    messages = {tp: [message(tp, 2 * number) for number in range(count)] for tp, count in counts.items()}
    ends = {tp: 2 * count + 5 for tp, count in counts.items()}
    first, rest = Fetched(PIN, messages, ends, drained=False).split(most)
    assert sum(map(len, first.messages.values())) == min(most, sum(counts.values()))
    for tp in first.messages:
        more = rest.messages.get(tp) if rest is not None else None
        assert first.positions[tp] == (more[0].offset if more else ends[tp])
    if rest is not None:
        again = first.followed_by(rest)
        assert again.messages == messages
        assert all(again.positions[tp] == ends[tp] for tp in rest.messages)


def test_the_events_of_a_committed_batch_go_at_once() -> None:
    """They lead to their batch and it to them: left to the garbage collector, 300 MB of them piled up under load."""
    batch = filled({TP("a", 0): 2}, 1, set())
    event = weakref.ref(batch.events[0])
    batch.release()
    assert event() is None


async def test_who_waits_for_an_answer_hears_that_the_batch_was_dropped() -> None:
    """It would begin with no event of the next batch, and its answer may come with one of them: both would wait for ever."""
    batch = filled({TP("in", 0): 1}, 1, set())
    [event] = batch.events
    answer = asyncio.get_running_loop().create_future()
    asks = asyncio.ensure_future(batch.answered(event, {"asked"}, lambda: answer))
    await asyncio.sleep(0)
    assert (batch.is_settled, batch.waits_for_more, batch.asked) == (True, True, {"asked"})
    batch.drop()
    with pytest.raises(DeadBatchError, match="delivered again"):
        await asyncio.wait_for(asks, 10)
    assert answer.cancelled()


async def test_who_gets_no_answer_is_told_so() -> None:
    """It would wait for ever, and its whole batch with it, where who was asked is elsewhere and sets the question aside."""
    batch = filled({TP("in", 0): 2}, 1, set())
    event, other = batch.events
    with pytest.raises(NoAnswer, match=r"nobody answered by asked for 0\.01 s"):
        await batch.answered(event, {"asked"}, partial(asyncio.sleep, 60), 0.01)
    assert (batch.held, batch.questions) == (0, {})
    asked_in_time = asyncio.ensure_future(asyncio.sleep(0))

    async def refuses() -> None:
        await asked_in_time
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await batch.answered(other, {"asked"}, refuses, 60)


async def test_who_waits_for_an_answer_and_is_cancelled_is_cancelled() -> None:
    batch = filled({TP("in", 0): 2}, 1, set())
    event, other = batch.events
    asks = asyncio.ensure_future(batch.answered(event, {"asked"}, partial(asyncio.sleep, 60)))
    await asyncio.sleep(0)
    asks.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asks
    assert (batch.held, batch.questions) == (0, {})
    assert await batch.answered(other, {"asked"}, partial(asyncio.sleep, 0, "yes")) == "yes"
    assert (batch.held, batch.questions) == (0, {})


async def test_two_questions_of_one_event_hold_it_once() -> None:
    """Answers may be gathered; and a drop is told to both."""
    batch = filled({TP("in", 0): 1}, 1, set())
    [event] = batch.events
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    asks = [
        asyncio.ensure_future(batch.answered(event, {topic}, lambda each=each: each))
        for topic, each in (("a", first), ("b", second))
    ]
    await asyncio.sleep(0)
    assert (batch.held, batch.asked) == (1, {"a", "b"})
    second.set_result("yes")
    assert await asyncio.wait_for(asks[1], 10) == "yes"
    assert (batch.held, batch.asked) == (1, {"a"})
    batch.drop()
    with pytest.raises(DeadBatchError):
        await asyncio.wait_for(asks[0], 10)
    assert batch.held == 0
    with pytest.raises(DeadBatchError):
        await batch.answered(event, {"a"}, lambda: pytest.fail("asked in a batch that was dropped"))


@pytest.mark.parametrize("order", list(permutations(["hold", "ask", "answer", "ack"])))
async def test_an_event_is_held_once_whatever_for(order: Sequence[str]) -> None:
    """Counted twice, its batch would never end; counted when it is done, neither."""
    if order.index("answer") < order.index("ask"):
        return
    batch = filled({TP("in", 0): 2}, 1, set())
    event, answer = batch.events[0], asyncio.get_running_loop().create_future()
    for step in order:
        if step == "hold":
            event.hold()
        elif step == "ask":
            asks = asyncio.ensure_future(batch.answered(event, {"asked"}, lambda: answer))
            await asyncio.sleep(0)
        elif step == "answer":
            answer.set_result(1)
            assert await asks == 1
        else:
            event.ack()
        assert batch.held == int(not event.acked and (event.held or bool(batch.questions)))
        if batch.questions and not event.acked:
            assert batch.asked == {"asked"}
    assert (batch.held, batch.pending) == (0, 1)


def test_what_else_is_held_may_wait_for_anything() -> None:
    batch = filled({TP("in", 0): 2}, 1, set())
    assert batch.asked_for_s == 0
    batch.events[0].hold()
    assert batch.asked is None
