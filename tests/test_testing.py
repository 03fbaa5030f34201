"""The fixtures for users' tests, used as users would use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from faust.types import AgentT

from streams_app.application import App
from streams_app.codecs import UndecodableError
from streams_app.settings import Settings
from streams_app.testing import AgentRun, RunningApp, Sent
from tests.apps.balances import Balance, Entry


class Visit(msgspec.Struct):
    user: str


class Count(msgspec.Struct):
    page: str
    visits: int


app = App("visits-app", settings=Settings.from_env({"KAFKA_PREFIX": "p-"}), autodiscover=False)
visits = app.topic("visits", key_type=str, value_type=Visit)
counts = app.topic("visit-counts", key_type=str, value_type=Count)
visits_of = app.Table("visits", key_type=str, value_type=int, default=int)


@app.agent(visits)
async def count(stream):
    async for page, visit in stream.items():
        visits_of[page] += 1
        if visit.user == "mallory":
            raise ValueError("no visitor")
        await counts.send(key=page, value=Count(page, visits_of[page]))
        yield visits_of[page]


Runner = Callable[[AgentT[Any]], AgentRun]


async def test_an_agent_runs_with_its_tables(run_agent: Runner) -> None:
    """What a newcomer's first test looks like."""
    async with run_agent(count) as agent:
        await agent.send("/home", Visit("ann"))
        assert await agent.send("/home", Visit("bob")) == [Sent("visit-counts", "/home", Count("/home", 2))]
        assert visits_of["/home"] == 2
        assert agent.results == [1, 2]


async def test_what_an_agent_raises_comes_out_and_leaves_nothing(run_agent: Runner) -> None:
    """The test sees the error, the table does not see the event, and the agent goes on."""
    async with run_agent(count) as agent:
        await agent.send("/home", Visit("ann"))
        with pytest.raises(ValueError, match="no visitor"):
            await agent.send("/home", Visit("mallory"))
        assert visits_of["/home"] == 1
        assert await agent.send("/home", Visit("bob")) == [Sent("visit-counts", "/home", Count("/home", 2))]


async def test_each_run_begins_with_empty_tables(run_agent: Runner) -> None:
    """Tests must not see each other."""
    for _ in range(2):
        async with run_agent(count) as agent:
            assert "/home" not in visits_of
            await agent.send("/home", Visit("ann"))


async def test_partitions_are_apart(run_agent: Runner) -> None:
    """As in a worker: a table's key lies in the partition of its event."""
    async with run_agent(count) as agent:
        await agent.send("/home", Visit("ann"), partition=0)
        [sent] = await agent.send("/home", Visit("bob"), partition=1)
        assert sent.value == Count("/home", 1)


async def test_a_record_that_cannot_be_read_is_told(run_agent: Runner) -> None:
    """The agent would not see it."""
    async with run_agent(count) as agent:
        with pytest.raises(UndecodableError):
            await agent.send("/home", b'{"user": 1}')


def test_an_app_runs_on_kafka_and_outlives_a_kill(on_kafka: Callable[..., RunningApp]) -> None:
    """The same app, with what a test without Kafka cannot show."""
    running = on_kafka("tests.apps.balances").start()
    running.send("entries", [("k", Entry(number, 1)) for number in range(100)])
    running.kill()
    running.start()
    balances = [msgspec.convert(sent.value, Balance) for sent in running.read("balances", 100)]
    assert balances == [Balance(number, number + 1) for number in range(100)]
