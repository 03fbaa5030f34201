"""Agents that are asked, and answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faust.agents.models import ReqRepResponse
from faust.agents.replies import BarrierState, ReplyPromise

from streams_app.faust_adapter import ReplyConsumer
from tests.rig import rig, wait_until
from tests.test_streams import an_app


def ask_from_outside(kafka_url: str, folder: Path, **env: str) -> None:
    """Start a worker that asks when it starts, and wait for its answers."""
    with rig(kafka_url, folder, ASK="yes", **env) as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        worker = asking.worker()
        wait_until(lambda: worker.says("answers: [10, 20]") or not worker.alive, "an answer")
        assert worker.says("answers: [10, 20]"), worker.log.read_text()[-3000:]
        asking.stop()


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
def test_whoever_asks_from_outside_of_agents_gets_an_answer(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """A web view or a timer; under exactly once the answer rides in the transaction of the event that was asked."""
    ask_from_outside(kafka_url, tmp_path, GUARANTEE=guarantee)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_the_first_question_subscribes_to_its_answers(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """Asked while partitions are given out and started; Faust's would forget it, or wait for 45 s."""
    ask_from_outside(kafka_url, tmp_path, GUARANTEE=guarantee, LATER="yes")


def test_an_agent_whose_first_question_has_a_backlog_behind_it_goes_on(kafka_url: str, tmp_path: Path) -> None:
    """It subscribes to its answers amid an event, and gets no more events than it can do meanwhile."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once", LATER="yes", STREAMS_APP_BATCH_MAX_EVENTS="20") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        asking.send(100)
        worker = asking.worker().wait_started()
        asking.wait_consumed()
        assert not worker.says("without acknowledging them")
        asking.check_at_least_once()
        asking.stop()


def test_an_event_whose_question_cannot_be_answered_is_set_aside(kafka_url: str, tmp_path: Path) -> None:
    """Delivered again, it asks again, another question each time: blamed on the questions alone, it would never end."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once", POISON="7") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        asking.send(30)
        worker = asking.worker().wait_started()
        asking.wait_consumed()
        done = {json.loads(message.value())["id"] for message in asking.read("balances")}
        assert done == set(range(30)) - {7}
        letters = asking.read("dead-letters")
        assert all(json.loads(letter.value())["id"] == 7 for letter in letters)
        assert {dict(letter.headers())["dlq.topic"].decode() for letter in letters} >= {asking.prefix + "entries"}
        assert worker.alive
        asking.stop()


@pytest.mark.parametrize("guarantee", ["at_least_once", "at_most_once"])
def test_an_event_whose_question_nobody_answers_is_set_aside(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """Its agent would wait for ever, and all partitions of its worker with it."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee, UNANSWERED="7", STREAMS_APP_ANSWER_TIMEOUT_MS="1500") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        asking.worker().wait_started()
        asking.send(30)
        asking.wait_consumed()
        letters = [dict(letter.headers()) for letter in asking.read("dead-letters")]
        told = {(letter["dlq.topic"].decode().removeprefix(asking.prefix), letter["dlq.error"]) for letter in letters}
        assert told == {("amounts", b"no_amount"), ("entries", b"agent_error")}
        assert {json.loads(message.value())["id"] for message in asking.read("balances")} == set(range(30)) - {7}
        asking.stop()


async def test_a_join_of_more_than_a_thousand_is_answered() -> None:
    """Faust's has room for so many answers; one more, and it ends the worker."""
    consumer = ReplyConsumer(an_app())
    consumer._fetchers["answers"] = cast(Any, object())
    barrier, names = BarrierState("answers"), [str(number) for number in range(1_500)]
    for name in names:
        barrier.add(ReplyPromise("answers", name))
        await consumer.add(name, barrier)
    barrier.finalize()
    for name in names:
        barrier.fulfill(name, name)
    assert [each.value async for each in barrier.iterate()] == names


async def test_a_first_question_that_is_given_up_leaves_the_answers_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its batch is dropped while the topic is being created: nobody would ever read answers in this process."""
    consumer, declared = ReplyConsumer(an_app()), asyncio.Event()
    drained: list[object] = []

    async def drain(topic: object) -> None:
        drained.append(topic)

    topic = SimpleNamespace(maybe_declare=declared.wait)
    monkeypatch.setattr(consumer, "_reply_topic", lambda _name: topic)
    monkeypatch.setattr(consumer, "_drain_replies", drain)
    asks = [asyncio.ensure_future(consumer.add(name, ReplyPromise("answers", name))) for name in "ab"]
    await asyncio.sleep(0)
    asks[0].cancel()
    await asyncio.sleep(0)
    declared.set()
    await asyncio.wait_for(asks[1], 10)
    await asyncio.wait_for(consumer.add("c", ReplyPromise("answers", "c")), 10)
    await asyncio.sleep(0)
    assert (asks[0].cancelled(), drained) == (True, [topic])


async def test_an_answer_that_comes_twice_is_that_of_one_question() -> None:
    """At least once it may; counted for that of another question, `join` would be short of one."""
    app = an_app()
    consumer = ReplyConsumer(app)
    barrier, asked = BarrierState("answers"), [ReplyPromise("answers", name) for name in "ab"]
    for promise in asked:
        barrier.add(promise)
        consumer._waiting[promise.correlation_id].add(barrier)
    barrier.finalize()
    given_up = ReplyPromise("answers", "c")
    given_up.cancel()
    consumer._waiting["c"].add(given_up)
    replies = [ReqRepResponse(key=None, value=value, correlation_id=of) for of, value in [("a", 1), ("a", 1), ("c", 3)]]
    channel = cast(Any, SimpleNamespace(stream=lambda: app.stream(replies)))
    await consumer._drain_replies(channel)
    assert (barrier.done(), barrier.fulfilled) == (False, 1)
    replies[:] = [ReqRepResponse(key=None, value=2, correlation_id="b")]
    await consumer._drain_replies(channel)
    assert {each.correlation_id: each.value async for each in barrier.iterate()} == {"a": 1, "b": 2}


def test_an_agent_that_asks_another_goes_on_with_the_answer(kafka_url: str, tmp_path: Path) -> None:
    """Its batch waits for the event in hand, and the question is in a later one."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        asking.worker().wait_started()
        asking.send(50)
        asking.wait_consumed()
        assert asking.check_at_least_once() == 0
        asking.stop()


def test_an_agent_that_asks_another_exactly_once_is_refused(kafka_url: str, tmp_path: Path) -> None:
    """It would wait for ever: the question leaves with a commit that waits for the answer."""
    with rig(kafka_url, tmp_path, GUARANTEE="exactly_once") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        worker = asking.worker().wait_started()
        asking.send(1)
        assert worker.wait() != 0
        assert worker.says("the commit waits for the event")
