"""Tables of sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import AgentT

from streams_app.application import App
from streams_app.settings import Settings
from streams_app.testing import AgentRun


class Change(msgspec.Struct):
    do: str
    tags: list[str]


app = App("sets-app", settings=Settings.from_env({}), autodiscover=False)
changes = app.topic("changes", key_type=str, value_type=Change)
tags = app.SetTable("tags", key_type=str, value_type=str)


@app.agent(changes)
async def change(stream):
    async for article, order in stream.items():
        kept = tags[article]
        match order.do:
            case "add":
                for tag in order.tags:
                    kept.add(tag)
            case "or":
                kept |= set(order.tags)
            case "discard":
                for tag in order.tags:
                    kept.discard(tag)
            case "keep":
                kept.intersection_update(order.tags)
            case "set":
                tags[article] = set(order.tags)
            case "clear":
                kept.clear()
            case "remove":
                kept.remove(order.tags[0])
        yield set(tags[article])


Runner = Callable[[AgentT[Any]], AgentRun]


async def test_what_is_done_to_a_set_is_kept(run_agent: Runner) -> None:
    """A set that is changed in memory only would be forgotten with the event."""
    async with run_agent(change) as agent:
        for order, expected in [
            (Change("add", ["a", "b", "a"]), {"a", "b"}),
            (Change("or", ["c"]), {"a", "b", "c"}),
            (Change("discard", ["b", "z"]), {"a", "c"}),
            (Change("set", ["x", "y"]), {"x", "y"}),
            (Change("keep", ["x"]), {"x"}),
        ]:
            await agent.send("one", order)
            assert agent.results[-1] == expected
            assert tags["one"] == expected
        assert "x" in tags["one"]
        assert tags["one"] | {"w"} == {"w", "x"}
        assert tags["two"] == set()
        assert dict(tags.items()) == {"one": {"x"}}


async def test_an_empty_set_is_no_row(run_agent: Runner) -> None:
    """The table would grow for ever with keys that have nothing."""
    async with run_agent(change) as agent:
        await agent.send("one", Change("add", ["a"]))
        await agent.send("one", Change("clear", []))
        assert "one" not in tags
        assert len(tags) == 0


async def test_a_set_behaves_as_python_s_where_something_is_missing(run_agent: Runner) -> None:
    """And the event that found it missing takes no effect."""
    async with run_agent(change) as agent:
        await agent.send("one", Change("add", ["a"]))
        with pytest.raises(KeyError):
            await agent.send("one", Change("remove", ["b"]))
        assert tags["one"] == {"a"}


def test_sets_are_changed_by_agents_only() -> None:
    """Faust's manager changes them from anywhere, in no transaction."""
    with pytest.raises(ImproperlyConfigured, match="send an event"):
        app.SetTable("managed", start_manager=True)
    with pytest.raises(ImproperlyConfigured, match="no windows"):
        app.SetTable("windowed").tumbling(60)
