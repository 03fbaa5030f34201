"""What an agent may do under a barrier: an agent for each of it, all of which read the same entries."""

import os

import faust
import msgspec

from streams_app.application import App
from tests.apps.balances import Entry


class Out(msgspec.Struct):
    id: int
    balance: int = 0


guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("balances", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
entries = app.topic("entries", key_type=str, value_type=Entry)
failed: set[tuple[str, int]] = set()


def out(name: str):
    return app.topic(name, key_type=str, value_type=Out)


def fail(row: str, entry: Entry) -> None:
    """Raise, the first time only, for an entry whose order names the row."""
    if entry.order == f"fail once: {row}" and (row, entry.id) not in failed:
        failed.add((row, entry.id))
        raise ValueError(f"{entry.id} fails once in {row}")


# Ways to look at a stream.

balances, table = out("balances"), app.Table("balance", key_type=str, value_type=int, default=int)


@app.agent(entries)
async def by_events(stream):
    async for event in stream.events():
        assert faust.current_event() is event
        assert app.partitions_of("entries") == 4
        table[event.key] += event.value.amount
        await balances.send(key=event.key, value=Out(event.value.id, table[event.key]))
        fail("events", event.value)


enumerated = out("enumerated")


@app.agent(entries)
async def by_enumerate(stream):
    async for number, entry in stream.enumerate(start=1):
        assert number > 0
        await enumerated.send(key=str(entry.id), value=Out(entry.id))
        fail("enumerate", entry)


concurrent = out("concurrent")


@app.agent(entries, concurrency=3)
async def by_three(stream):
    async for entry in stream:
        await concurrent.send(key=str(entry.id), value=Out(entry.id))
        fail("concurrency", entry)


# Streams made of a stream.

passed, through = app.topic("passed", key_type=str, value_type=Entry), out("through")


@app.agent(entries)
async def by_through(stream):
    stream.add_processor(lambda entry: fail("processor", entry) or entry)
    async for entry in stream.through(passed):
        await through.send(key=str(entry.id), value=Out(entry.id))
        fail("through", entry)


regrouped, grouped = app.topic("regrouped", key_type=str, value_type=Entry), out("grouped")
group_sums = app.Table("group-sums", key_type=str, value_type=int, default=int)


def group_of(entry: Entry) -> str:
    fail("key of group_by", entry)
    return f"g{entry.id % 7}"


@app.agent(entries)
async def by_group(stream):
    async for group, entry in stream.group_by(group_of, name="group", topic=regrouped).items():
        group_sums[group] += entry.amount
        await grouped.send(key=group, value=Out(entry.id, group_sums[group]))
        fail("group_by", entry)


echoes = app.topic("echoes", key_type=str, value_type=Entry)


@app.agent(entries)
async def by_echo(stream):
    async for entry in stream.filter(lambda entry: entry.id % 10 != 9).echo(echoes):
        fail("echo", entry)


# What else an agent may do with what it makes.

by_function, by_topic, by_agent = out("sink-function"), out("sink-topic"), out("sink-agent")
handed_on = app.topic("handed-on", key_type=str, value_type=Out)


async def sink(made: Out) -> None:
    await by_function.send(key=str(made.id), value=made)


@app.agent(handed_on)
async def next_agent(stream):
    async for made in stream:
        await by_agent.send(key=str(made.id), value=made)


@app.agent(entries, sink=[sink, by_topic, next_agent])
async def into_sinks(stream):
    async for entry in stream:
        fail("sinks", entry)
        yield Out(entry.id)


asked, told = app.topic("asked", key_type=str, value_type=Entry), out("cast")


@app.agent(asked)
async def tell(stream):
    async for entry in stream:
        await told.send(key=str(entry.id), value=Out(entry.id))
        yield entry.amount


@app.agent(entries)
async def by_cast(stream):
    async for entry in stream:
        await tell.cast(entry, key=str(entry.id))
        fail("cast", entry)


marked = out("marked")


@app.agent(entries)
async def by_hand(stream):
    async for event in stream.events():
        entry = event.value
        await marked.send(
            key=f"m{entry.id}",
            value=Out(entry.id),
            partition=entry.id % 4,
            timestamp=1_000_000_000.0 + entry.id,
            headers={"id": str(entry.id).encode()},
            callback=lambda sent: print(f"called back in {sent.message.channel.get_topic_name()}", flush=True),
        )
        fail("sends", entry)


forwarded = app.topic("forwarded", key_type=str, value_type=Entry)


@app.agent(entries)
async def by_forward(stream):
    async for event in stream.events():
        async with event:
            await event.forward(forwarded, headers={"by": b"hand"})
            fail("forward", event.value)


# From outside of agents.

ticks = out("ticks")


@app.task
async def at_start():
    await ticks.send(key="task", value=Out(0))


@app.task(on_leader=True)
async def at_start_of_the_leader():
    await ticks.send(key="leader's task", value=Out(0))


@app.timer(0.5)
async def on_timer():
    await ticks.send(key="timer", value=Out(table["k0"]))


@app.timer(0.5, on_leader=True)
async def on_leaders_timer():
    ticks.send_soon(key="leader's timer", value=Out(0))


@app.crontab("* * * * *")
async def on_cron():
    await ticks.send(key="cron", value=Out(0))


#: Outputs of one event each, by row.
OUTPUTS = {
    "events": "balances",
    "enumerate": "enumerated",
    "concurrency": "concurrent",
    "through": "through",
    "processor": "through",
    "group_by": "grouped",
    "key of group_by": "grouped",
    "echo": "echoes",
    "sinks": "sink-function",
    "cast": "cast",
    "sends": "marked",
    "forward": "forwarded",
}
TOPICS = [
    "passed",
    "regrouped",
    "handed-on",
    "asked",
    "sink-topic",
    "sink-agent",
    "ticks",
    *{*OUTPUTS.values()} - {"balances"},
]
