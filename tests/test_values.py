"""What keys, values and headers may be: each comes out of topics and tables as it went in, or its event is set aside."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import faust
import msgspec
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.models.fields import DecimalField
from faust.serializers import codecs
from faust.types import AgentT, Message

from streams_app.application import App
from streams_app.codecs import UndecodableError
from streams_app.settings import Settings
from streams_app.testing import AgentRun, Sent

Runner = Callable[[AgentT[Any]], AgentRun]


class Point(msgspec.Struct, frozen=True):
    x: int
    y: int = 0


class Shape(faust.Record, abstract=True, polymorphic_fields=True):
    """What all shapes have."""

    name: str


class Circle(Shape, namespace="tests.Circle"):
    radius: int


class Square(Shape, namespace="tests.Square"):
    side: int


class Drawing(faust.Record, namespace="tests.Drawing"):
    title: str
    shapes: list[Shape]


class Priced(faust.Record, coerce=True, validation=True):
    amount: Decimal = DecimalField(max_digits=6, max_decimal_places=2)
    at: str = ""


class Pickled(faust.Record, serializer="zipped"):
    text: str


class Zipped(codecs.Codec):
    """JSON that is compressed: any codec that somebody registers."""

    def _dumps(self, obj: Any) -> bytes:
        return zlib.compress(json.dumps(obj).encode())

    def _loads(self, data: bytes) -> Any:
        return json.loads(zlib.decompress(data))


@pytest.fixture(autouse=True)
def zipped() -> Iterator[None]:
    codecs.register("zipped", Zipped())
    yield
    del codecs.codecs["zipped"]


def an_app() -> App:
    return App("values", settings=Settings.from_env({}), autodiscover=False)


def keeper(app: App, topic: dict[str, Any], table: dict[str, Any]) -> AgentT[Any]:
    """An agent that keeps each value in a table, and sends what the table then has."""
    kept = app.Table("kept", **table)
    out = app.topic("out", **topic)

    @app.agent(app.topic("in", **topic))
    async def keep(stream):
        async for key, value in stream.items():
            kept[key] = value
            assert key in kept
            assert list(kept) == list(kept.keys()) == [key]
            await out.send(key=key, value=kept[key])
            yield kept[key]
            del kept[key]

    agent: AgentT[Any] = keep
    return agent


@pytest.mark.parametrize(
    ("types", "key", "value"),
    [
        ({"key_type": str, "value_type": Point}, "k", Point(1, 2)),
        ({"key_type": str, "value_type": Drawing}, "k", Drawing("d", [Circle("c", 1), Square("s", 2)])),
        ({"key_type": str, "value_type": Priced}, "k", Priced(Decimal("1.20"), "now")),
        ({"key_type": str, "value_type": Pickled}, "k", Pickled("text")),
        ({"key_type": str}, "k", {"a": [1, None, "ü"]}),
        ({"key_type": str, "value_type": int}, "k", -(2**63)),
        ({"key_type": str, "value_type": float}, "k", 0.1),
        ({"key_type": str, "value_type": str}, "k", "text, ü"),
        ({"key_type": bytes, "value_type": bytes}, b"\x00\xff", b"\xff\x00raw"),
        ({"key_type": str, "value_type": dict[str, list[int]]}, "k", {"a": [1, 2]}),
    ],
)
async def test_a_value_comes_out_as_it_went_in(run_agent: Runner, types: dict[str, Any], key: Any, value: Any) -> None:
    """Through the topic, the table and its changelog's form, and the next topic."""
    async with run_agent(keeper(an_app(), types, types)) as agent:
        [sent] = await agent.send(key, value)
        assert agent.results == [value]
        assert (sent.key, sent.value) == (key, value)


async def test_a_codec_that_was_registered_is_used_by_its_name(run_agent: Runner) -> None:
    """For a topic, and for the table of a schema."""
    schema = faust.Schema(key_type=str, value_type=str, value_serializer="zipped")
    async with run_agent(keeper(an_app(), {"schema": schema}, {"schema": schema})) as agent:
        [sent] = await agent.send("k", zlib.compress(b'"text"'))
        assert sent == Sent("out", "k", "text")
        table: Any = agent.app.tables["kept"]
        assert table.data._values.encode("text") == zlib.compress(b'"text"')


async def test_a_struct_may_have_a_codec_of_its_own(run_agent: Runner) -> None:
    """JSON in its place could be read by nobody who expects the codec."""
    types = {"key_type": str, "value_type": Point, "value_serializer": "zipped"}
    async with run_agent(keeper(an_app(), types, {"key_type": str, "value_type": Point})) as agent:
        assert await agent.send("k", Point(1, 2)) == [Sent("out", "k", Point(1, 2))]
        await agent.send("k", zlib.compress(b'{"x": 5}'))
        assert agent.results == [Point(1, 2), Point(5)]
        with pytest.raises(UndecodableError, match="str"):
            await agent.send("k", zlib.compress(b'{"x": "5"}'))


async def test_keys_may_be_numbers_if_their_serializer_says_so(run_agent: Runner) -> None:
    types = {"key_type": int, "key_serializer": "json", "value_type": str}
    async with run_agent(keeper(an_app(), types, {"key_type": int, "value_type": str})) as agent:
        assert await agent.send(7, "seven") == [Sent("out", 7, "seven")]


async def test_codecs_may_be_chained(run_agent: Runner) -> None:
    types = {"key_type": str, "value_serializer": "json|binary"}
    async with run_agent(keeper(an_app(), types, {"key_type": str})) as agent:
        await agent.send("k", {"a": 1})
        assert agent.results == [{"a": 1}]


async def test_a_record_says_itself_what_it_is(run_agent: Runner) -> None:
    """A topic without a type may hold records of several."""
    async with run_agent(keeper(an_app(), {"key_type": str}, {"key_type": str})) as agent:
        await agent.send("k", Circle("c", 1))
        await agent.send("k", Square("s", 2))
        assert agent.results == [Circle("c", 1), Square("s", 2)]


@pytest.mark.parametrize(
    ("kind", "value", "code"),
    [
        (Point, b'{"x": "one"}', "invalid"),
        (Point, b'{"x": 1', "malformed"),
        (Point, b"\xff", "malformed"),
        (Priced, b'{"amount": "1.234"}', "malformed"),
        (Priced, b'{"amount": "much"}', "malformed"),
        (Drawing, b'{"shapes": []}', "malformed"),
        (Drawing, b"[]", "malformed"),
        (int, b"seven", "malformed"),
        (float, b"{}", "malformed"),
        (str, b"\xff", "malformed"),
        (None, b"{", "malformed"),
        (list[int], b'["a"]', "invalid"),
    ],
)
async def test_what_is_not_of_its_type_is_set_aside(run_agent: Runner, kind: Any, value: bytes, code: str) -> None:
    """The agent never sees it, and the worker goes on."""
    types = {"key_type": str, "value_type": kind}
    async with run_agent(keeper(an_app(), types, types)) as agent:
        with pytest.raises(UndecodableError) as raised:
            await agent.send("k", value)
        assert raised.value.code == code
        assert agent.results == []


async def test_a_key_that_is_no_text_is_set_aside(run_agent: Runner) -> None:
    types = {"key_type": str, "value_type": Point}
    async with run_agent(keeper(an_app(), types, types)) as agent:
        with pytest.raises(UndecodableError, match="key"):
            await agent.send(b"\xff", Point(1))


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"value_type": Point}, False),
        ({"value_type": Priced}, False),
        ({"value_type": Point, "allow_empty": True}, True),
        ({"value_type": Priced, "allow_empty": True}, True),
        ({"value_type": str}, True),
        ({}, True),
    ],
)
async def test_a_tombstone_reaches_the_agents_that_can_do_something_with_it(
    run_agent: Runner, options: dict[str, Any], taken: bool
) -> None:
    """As in stock Faust: where the value is a model, only if the topic says ``allow_empty``."""
    app = an_app()
    out = app.topic("out", key_type=str, **options)

    @app.agent(app.topic("in", key_type=str, **options))
    async def forget(stream):
        async for key, value in stream.items():
            assert value is None
            await out.send(key=key, value=None, value_serializer="raw")

    async with run_agent(forget) as agent:
        if taken:
            assert await agent.send("k", None) == [Sent("out", "k", None)]
        else:
            with pytest.raises(UndecodableError):
                await agent.send("k", None)


@pytest.mark.parametrize("given", [{"a": b"1", "b": None}, [("a", b"1"), ("b", None)]])
async def test_headers_come_and_go(run_agent: Runner, given: Any) -> None:
    """As a mapping or as pairs, as they were, and with what is forwarded."""
    app = an_app()
    out, copies = app.topic("out", value_type=str), app.topic("copies", value_type=str)

    @app.agent(app.topic("in", value_type=str))
    async def answer(stream):
        async for event in stream.events():
            assert event.headers == {"asked": b"yes"}
            await out.send(value="v", headers=given)
            await event.forward(copies)
            await event.send(copies, value="sent")

    async with run_agent(answer) as agent:
        answers = await agent.send("k", "v", headers={"asked": b"yes"})
    assert [(each.topic, each.value, each.headers) for each in answers] == [
        ("out", b'"v"', {"a": b"1", "b": None}),
        ("copies", b'"v"', {"asked": b"yes"}),
        ("copies", b'"sent"', {"asked": b"yes"}),
    ]


async def test_a_default_is_made_for_each_key_and_kept_when_it_is_written(run_agent: Runner) -> None:
    """Else keys would share one list; and a list that is changed and not written back is not kept, as the docs say."""
    app = an_app()
    lists = app.Table("lists", key_type=str, default=list)

    @app.agent(app.topic("in", key_type=str, value_type=int))
    async def collect(stream):
        async for key, number in stream.items():
            lists[key].append(number)
            forgotten = lists[key]
            values = lists[key]
            values.append(number)
            lists[key] = values
            yield forgotten, lists[key], lists.get("nobody"), "nobody" in lists

    async with run_agent(collect) as agent:
        await agent.send("a", 1)
        await agent.send("a", 2)
        await agent.send("b", 3)
        assert agent.results == [([], [1], None, False), ([1], [1, 2], None, False), ([], [3], None, False)]
        assert dict(lists.items()) == {"a": [1, 2], "b": [3]}


async def test_a_table_is_used_as_a_dict(run_agent: Runner) -> None:
    """All of what Python's mappings can do, with what the batch has written."""
    app = an_app()
    table = app.Table("dict", key_type=str, value_type=int)

    @app.agent(app.topic("in", key_type=str, value_type=int))
    async def use(stream):
        async for key, number in stream.items():
            table.update({key: number, "other": 1})
            assert table.setdefault("third", 3) == 3
            assert table.pop("other") == 1
            assert table.pop("other", None) is None
            assert (len(table), sorted(table), sorted(table.values())) == (
                2,
                sorted([key, "third"]),
                sorted([number, 3]),
            )
            with pytest.raises(KeyError):
                table["other"]
            with pytest.raises(KeyError):
                del table["other"]
            if number == 2:
                table.clear()
                assert len(table) == 0
                assert not list(table.items())

    async with run_agent(use) as agent:
        await agent.send("a", 1)
        assert dict(table.items()) == {"a": 1, "third": 3}
        assert "third" in table.as_ansitable()
        await agent.send("a", 2)
        assert dict(table.items()) == {}


def test_a_type_that_nobody_can_read_is_refused_where_it_is_declared() -> None:
    """Each of its events would be set aside."""

    class Unknown:
        """Neither a model nor anything that JSON knows."""

        def __init__(self, *, it: object) -> None:
            self.it = it

    app = an_app()
    topic = app.topic("in", value_type=Unknown)
    with pytest.raises(ImproperlyConfigured, match="value_type"):
        topic.decode_message(Message("in", 0, 0, 0.0, 0, None, b"k", b"v", None))


@pytest.mark.parametrize(
    ("kind", "key", "same"),
    [(None, "k", True), (int, 7, True), (Circle, Circle("c", 1), True), (bytes, b"k", True), (str, "k", False)],
)
def test_keys_of_stock_changelogs_are_read_but_for_text(kind: Any, key: Any, same: bool) -> None:
    """What docs/migration.md says of state that is brought along: a table that looks empty would begin at nothing."""
    stock: Any = faust.App("stock", autodiscover=False).Table("kept", key_type=kind)
    table: Any = an_app().Table("kept", key_type=kind)
    assert (stock.changelog_topic.prepare_key(key, None)[0] == table.data.key_bytes(key)) == same


@pytest.mark.parametrize(
    ("kind", "value"),
    [(None, {"a": [1]}), (int, 7), (float, 0.5), (str, "text"), (bytes, b"raw"), (Circle, Circle("c", 1))],
)
def test_values_of_stock_changelogs_are_read(kind: Any, value: Any) -> None:
    stock: Any = faust.App("stock", autodiscover=False).Table("kept", value_type=kind)
    table: Any = an_app().Table("kept", value_type=kind)
    assert table.data._values.decode(stock.changelog_topic.prepare_value(value, None)[0]) == value
