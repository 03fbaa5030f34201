"""What agents do with their streams, without Kafka: what is refused, and what stock Faust does twice, or loses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import faust
import msgspec
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import TP, AgentT, Message

from streams_app import faust_adapter
from streams_app.application import App
from streams_app.batch import Batch
from streams_app.dead_letters import set_aside
from streams_app.errors import DeadBatchError
from streams_app.events import Event, in_hand
from streams_app.faust_adapter import Agent
from streams_app.session import Pin
from streams_app.settings import GUARANTEES, Settings
from streams_app.testing import AgentRun, Sent

Runner = Callable[[AgentT[Any]], AgentRun]


class Entry(msgspec.Struct):
    id: int


class Visit(msgspec.Struct):
    page: str


def an_app(guarantee: str = "exactly_once") -> App:
    return App("streams", settings=Settings.from_env({}), processing_guarantee=guarantee, autodiscover=False)


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize(
    "join",
    [
        lambda stream, table: stream & stream,
        lambda stream, table: stream.combine(table),
        lambda stream, table: table & stream,
        lambda stream, table: stream.join(),
        lambda stream, table: stream.left_join(),
        lambda stream, table: stream.outer_join(),
        lambda stream, table: table.inner_join(),
    ],
)
async def test_joins_are_refused(run_agent: Runner, guarantee: str, join: Callable[[Any, Any], Any]) -> None:
    """Faust has never finished them: each event would fail, and be set aside."""
    app = an_app(guarantee)
    table = app.Table("joined")

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for _ in join(stream, table):
            pass

    with pytest.raises(ImproperlyConfigured, match="keep what came from one topic in a table"):
        async with run_agent(agent) as running:
            await running.send("k", Entry(1))


async def test_asking_exactly_once_is_refused(run_agent: Runner) -> None:
    """The question leaves with the commit, which waits for the answer: for ever. `cast` works."""
    app = an_app()
    asked = app.topic("asked", key_type=str, value_type=Entry)

    @app.agent(asked)
    async def tell(stream):
        async for entry in stream:
            yield entry.id

    @app.agent(app.topic("in", key_type=str, value_type=Entry))
    async def agent(stream):
        async for entry in stream:
            if entry.id == 1:
                await tell.ask(entry)
            if entry.id == 2:
                await tell.join([entry])
            if entry.id == 3:
                async for _ in tell.map([entry]):
                    pass
            await tell.cast(entry)

    async with run_agent(agent) as running:
        for number in 1, 2, 3:
            with pytest.raises(ImproperlyConfigured, match="under exactly_once"):
                await running.send("k", Entry(number))
        assert await running.send("k", Entry(4)) == [Sent("asked", None, Entry(4))]


class Answer(faust.Record):
    id: int


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("answer", [7, Entry(7), Answer(7)])
async def test_what_an_agent_yields_goes_to_sinks_and_to_who_asked(
    run_agent: Runner, guarantee: str, answer: Any
) -> None:
    """With the event that it answers, and in the form in which Faust's agents expect it."""
    app = an_app(guarantee)
    copies, told = app.topic("copies", value_type=type(answer)), []

    @app.agent(app.topic("in", key_type=str, value_type=Entry), sink=[told.append, copies])
    async def tell(stream):
        async for _ in stream:
            yield answer

    async with run_agent(tell) as running:
        asked = {"Faust-Ag-ReplyTo": b"answers", "Faust-Ag-CorrelationId": b"one"}
        reply, copy = await running.send("k", Entry(1), headers=asked)
    assert told == [answer]
    assert (copy.topic, copy.value) == ("copies", answer)
    content = reply.value
    assert (reply.topic, content.correlation_id, content.key) == ("answers", "one", "k")
    assert content.value == 7 or content.value["id"] == 7


async def test_an_agent_that_is_started_again_echoes_once(run_agent: Runner) -> None:
    """Started over the stream that it had, it adds its processors a second time."""
    app = an_app()
    echoes = app.topic("echoes", value_type=Entry)

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for entry in stream.filter(lambda entry: entry.id != 3).echo(echoes):
            if entry.id == 1:
                raise ValueError("fails")

    async with run_agent(agent) as running:
        for _ in range(2):
            with pytest.raises(ValueError, match="fails"):
                await running.send("k", Entry(1))
        assert await running.send("k", Entry(2)) == [Sent("echoes", None, Entry(2))]
        assert await running.send("k", Entry(3)) == []


async def test_an_echo_that_cannot_be_sent_fails_its_event(run_agent: Runner) -> None:
    """Faust's does not look: the echo would be lost, and nobody would know."""
    app = an_app()
    echoes = app.topic("echoes", value_type=str)

    @app.agent(app.topic("in", value_type=str))
    async def agent(stream):
        stream.add_processor(lambda value: value * 2_000_000)
        async for _ in stream.echo(echoes):
            pass

    async with run_agent(agent) as running:
        with pytest.raises(ValueError, match="bytes"):
            await running.send("k", "x")


async def test_an_event_whose_group_cannot_be_found_fails(run_agent: Runner) -> None:
    """Faust's logs the error and skips the event: lost, and its offset is committed."""
    app = an_app()

    def group(entry: Entry) -> str:
        if entry.id == 1:
            raise LookupError("no group")
        return f"g{entry.id}"

    @app.agent(app.topic("in", key_type=str, value_type=Entry))
    async def agent(stream):
        async for _ in stream.group_by(group, name="group"):
            pass

    async with run_agent(agent) as running:
        with pytest.raises(LookupError):
            await running.send("k", Entry(1))
        [sent] = await running.send("k", Entry(2))
        assert sent.topic.endswith("agent-in-group-repartition")
        assert sent.key == b"g2"


async def test_events_are_grouped_by_a_field_of_a_struct(run_agent: Runner) -> None:
    """As by one of Faust's records, whose fields know their names."""
    app = an_app()

    @app.agent(app.topic("in", value_type=Visit))
    async def agent(stream):
        async for _ in stream.group_by(Visit.page):
            pass

    async with run_agent(agent) as running:
        [sent] = await running.send("k", Visit("/home"))
    assert sent.topic.endswith("agent-in-Visit.page-repartition")
    assert sent.key == b"/home"


@pytest.mark.parametrize("fails", [True, False])
async def test_an_event_is_acknowledged_at_the_end_of_its_block_if_that_did_not_raise(
    run_agent: Runner, fails: bool
) -> None:
    """``async with event`` is how an agent that acknowledges itself does it; Faust's does so for one that failed, too."""
    app = an_app()
    taken: list[Any] = []

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for event in stream.noack().events():
            taken.append(event)
            async with event:
                if fails:
                    raise ValueError("fails")

    async with run_agent(agent) as running:
        if fails:
            with pytest.raises(ValueError, match="fails"):
                await running.send("k", Entry(1))
        else:
            await asyncio.wait_for(running.send("k", Entry(1)), 10)
    assert taken[0].acked is not fails


@pytest.mark.parametrize("guarantee", GUARANTEES)
async def test_the_event_in_hand_is_the_current_one(run_agent: Runner, guarantee: str) -> None:
    """Also in a function that knows nothing of streams; and in a task that was left behind it is nobody's to use any more."""
    app = an_app(guarantee)
    out = app.topic("out", value_type=Entry)
    late: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def send_late() -> None:
        await over.wait()
        await out.send(value=Entry(0))

    async def helper() -> None:
        event = faust.current_event()
        assert event is not None
        await event.send(out)
        late.append(asyncio.create_task(send_late()))

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for _ in stream:
            await helper()

    async with run_agent(agent) as running:
        [sent] = await running.send("k", Entry(1), headers={"h": b"1"})
        assert (sent.topic, sent.headers) == ("out", {"h": b"1"})
        over.set()
        with pytest.raises(DeadBatchError, match="leaves behind"):
            await late[0]


async def test_a_stream_over_what_is_there_lets_others_have_their_turn() -> None:
    """Heartbeats, the web and the engine share the loop with it."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    await asyncio.sleep(0)
    async for _ in an_app().stream(range(1_000)):
        pass
    task.cancel()
    assert turns > 10


async def test_headers_are_an_events_own(run_agent: Runner) -> None:
    """An agent that notes something there would change what others see, or what is sent."""
    app, given = an_app(), {"a": b"1"}
    seen: list[dict[str, bytes]] = []

    @app.agent(app.topic("input", value_type=Entry))
    async def noting(stream: Any) -> None:
        async for event in stream.events():
            event.headers["b"] = b"2"
            seen.append(dict(event.headers))
            event.headers = {"c": b"3"}
            seen.append(event.headers)

    async with run_agent(noting) as agent:
        await agent.send(value=Entry(1), headers=given)
    assert seen == [{"a": b"1", "b": b"2"}, {"c": b"3"}]
    assert given == {"a": b"1"}


async def test_fausts_own_test_context_works() -> None:
    """Tests that an app brings along go on to run; its events are of no batch, so tables need `run_agent`."""
    app = an_app()
    table = app.Table("sums", default=int)

    @app.agent(app.topic("in", key_type=str, value_type=Entry))
    async def double(stream):
        async for entry in stream:
            if entry.id == 7:
                table["k"] += 1
            yield 2 * entry.id

    async with double.test_context() as agent:
        await agent.put(Entry(4))
        assert agent.results[0] == 8
        with pytest.raises(TypeError, match="run_agent"):
            await agent.put(Entry(7))


def test_an_agent_that_is_defined_in_a_function_is_named_by_it() -> None:
    """Its name is in metrics, in letters, and in the topic of its replies."""
    app = an_app()

    @app.agent(app.topic("in", value_type=Entry))
    async def looks(stream):
        async for _ in stream:
            pass

    assert looks.name == f"{__name__}.looks"


def an_actor(guarantee: str = "exactly_once", **settings: Any) -> tuple[App, Any]:
    """An app, and the stream of an actor of its one agent, which nobody reads yet."""
    app = an_app(guarantee)

    @app.agent(app.topic("in", value_type=Entry), **settings)
    async def takes(stream):
        async for _ in stream:
            pass

    app.flow_control.resume()
    return app, cast(Agent, takes).stream(takes.channel)


def deliver(stream: Any, batch: Batch, *ids: int) -> list[Event]:
    """Events of one partition, into the stream's queue."""
    events = []
    for offset, each in enumerate(ids):
        message = Message("in", 0, offset, 0.0, 0, [], b"k", b"v", None, tp=TP("in", 0))
        events.append(Event(stream.app, "k", Entry(each), [], message, batch))
    batch.add(events)
    for event in events:
        stream.channel.queue.put_nowait(event)
    return events


async def test_what_is_taken_together_is_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' turn amid a list, and in it a rebalance: what was in hand would count in the batch of who came after it."""
    monkeypatch.setattr(faust_adapter, "_EVENTS_A_TURN", 2)
    app, stream = an_actor()
    first, second = Batch(Pin("group", 1, "one")), Batch(Pin("group", 2, "one"))

    def rebalance() -> None:
        first.drop()
        faust_adapter.purge(app)
        deliver(stream, second, 0, 1, 2)

    rebalances = iter([rebalance])

    def look(value: Entry) -> Entry:
        for each in rebalances:
            asyncio.get_running_loop().call_soon(each)
        return value

    stream.add_processor(look)
    deliver(stream, first, 0, 1, 2)
    lists = stream.take_events(20)
    async with asyncio.timeout(10):
        taken = [await anext(lists), await anext(lists)]
    await lists.aclose()
    await stream.stop()
    assert [[event.batch for event in each] for each in taken] == [[first] * 3, [second] * 3]


async def test_an_agent_that_takes_has_in_hand_what_it_was_given() -> None:
    """Not the one behind it that was filtered out: the time of its windows, and what is to blame when it raises."""
    _, stream = an_actor()
    stream.filter(lambda entry: entry.id != 9)
    deliver(stream, Batch(Pin("group", 1, "one")), 1, 2, 9)
    lists = stream.take(20)
    assert await anext(lists) == [Entry(1), Entry(2)]
    event = in_hand.get()
    assert event is stream.current_event
    assert [each.value for each in event.undone] == [Entry(1), Entry(2)]
    await lists.aclose()


async def test_what_was_collected_when_a_processor_raised_is_given_up_at_most_once() -> None:
    """Nobody has it in hand any more: its batch would wait for it for ever, and its partition with it."""
    _, stream = an_actor("at_most_once")

    def refuse(entry: Entry) -> Entry:
        if entry.id == 9:
            raise ValueError("no")
        return entry

    stream.add_processor(refuse)
    batch = Batch(Pin("group", 1, "one"), redelivers=False)
    events = deliver(stream, batch, 1, 2, 9)
    with pytest.raises(ValueError, match="no"):
        await anext(stream.take(20))
    assert (batch.given_up, [event.acked for event in events]) == (2, [True, True, False])


@pytest.mark.parametrize(("takes", "room"), [(True, 10), (True, 1), (False, 10), (False, 1)])
async def test_who_puts_into_a_full_channel_goes_on_when_it_is_read(takes: bool, room: int) -> None:
    """Its reader takes without awaiting, of which asyncio's queue tells nobody: both would wait for each other, for ever."""
    app, stream = an_actor()
    channel, read = app.channel(maxsize=room), []
    inner = channel.stream()

    async def reads() -> None:
        async for each in inner.take(100) if takes else inner:
            first = not read
            read.extend(each if takes else [each])
            while first and not inner.channel.queue.full():  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def writes() -> None:
        async for _ in stream:
            for number in range(50):
                await channel.send(value=number)

    batch = Batch(Pin("group", 1, "one"))
    tasks = [asyncio.ensure_future(reads()), asyncio.ensure_future(writes())]
    deliver(stream, batch, 1)
    try:
        await asyncio.wait_for(batch.settled(), 10)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert (read, batch.pending) == ([*range(50)], 0)


async def test_who_gives_up_putting_leaves_nothing_to_wait_for() -> None:
    """A time-out around a put into a full channel: the event is in nobody's queue, and its batch would wait for it."""
    app, stream = an_actor()
    channel = app.channel(maxsize=1)
    inner = channel.stream()
    batch = Batch(Pin("group", 1, "one"))
    [event] = deliver(stream, batch, 1)
    in_hand.set(event)
    await channel.put("fits")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.put("does not"), 0.01)
    in_hand.set(None)
    assert batch.pending == 2
    assert inner.channel.queue.qsize() == 1


async def test_a_batch_that_is_dropped_takes_nothing_with_it_that_came_from_outside() -> None:
    """A timer's values in a channel in memory are in no batch; and who puts them there waits for room, not for an error."""
    app, stream = an_actor()
    channel = app.channel(maxsize=2)
    inner = channel.stream()
    await channel.put("a")
    batch = Batch(Pin("group", 1, "one"))
    deliver(stream, batch, 1, 2)
    in_hand.set(batch.events[0])
    await channel.put("of the batch")
    in_hand.set(None)
    waiting = asyncio.ensure_future(channel.put("b"))
    await asyncio.sleep(0)
    batch.drop()
    faust_adapter.purge(app)
    await asyncio.wait_for(waiting, 10)
    assert stream.channel.queue.empty()
    values = aiter(inner)
    async with asyncio.timeout(10):
        assert [await anext(values), await anext(values)] == ["a", "b"]
    await values.aclose()


async def test_grouping_by_isolated_partitions_is_refused() -> None:
    """The actor of each partition would read what all of them forward: an effect for each of them."""
    _, stream = an_actor(isolated_partitions=True)
    stream.active_partitions = {TP("in", 0)}
    with pytest.raises(ImproperlyConfigured, match="another agent"):
        stream.group_by(lambda entry: str(entry.id), name="id")
    with pytest.raises(ImproperlyConfigured, match="another agent"):
        stream.through("elsewhere")


async def test_a_stream_that_is_made_again_reads_on_from_its_channel() -> None:
    """And from no other queue beside it: what is put there nobody would read."""
    app, stream = an_actor()
    channel = app.channel()
    first = stream.through(channel)
    again = app.stream(await stream.hand_over())
    again.inherit(stream)
    second = again.through(channel)
    assert second.channel is first.channel
    assert set(channel._subscribers) == {first.channel}
    await again.stop()


async def test_the_callback_of_a_send_may_be_a_coroutine(run_agent: Runner, caplog: pytest.LogCaptureFixture) -> None:
    """As Faust's may; what it raises is said, and nothing else: the record is committed."""
    app = an_app()
    out, told = app.topic("out", value_type=Entry), asyncio.Event()

    async def tell(sent: Any) -> None:
        await asyncio.sleep(0)
        told.set()
        raise ValueError("not so good")

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for entry in stream:
            await out.send(value=entry, callback=tell)

    async with run_agent(agent) as running:
        await running.send("k", Entry(1))
        await asyncio.wait_for(told.wait(), 10)
        await asyncio.sleep(0)
    assert "the callback of a send to out failed; the record is committed" in caplog.text


async def test_one_event_at_a_time_is_set_aside(run_agent: Runner) -> None:
    """Of several in hand nobody could say which one is meant: the last would go, and the bad one would count as done."""
    app = an_app()

    @app.agent(app.topic("in", value_type=Entry))
    async def agent(stream):
        async for entries in stream.noack_take(3):
            events.extend(entries)
            await set_aside("bad", f"{entries[0].value}")
            await set_aside("worse", "the same record")
            entries[0].ack()

    events: list[Event] = []
    async with run_agent(agent) as running:
        [letter] = await running.send("k", Entry(1))
    assert (letter.topic, letter.headers["dlq.error"]) == ("dead-letters", b"bad")
    [event] = events
    event.acked, event.batch = False, Batch(Pin("group", 1, "one"))
    event.together = (event, Event(app, "k", Entry(2), [], event.message, event.batch))
    in_hand.set(event)
    with pytest.raises(RuntimeError, match="several events in hand"):
        await set_aside("bad", "which one?")
    event.together, event.batch.dead = (), True
    with pytest.raises(DeadBatchError):
        await set_aside("bad", "too late")
    in_hand.set(None)
