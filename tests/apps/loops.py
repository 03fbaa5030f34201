"""The balances app, whose agent looks at its stream in the way that LOOP names; the outputs are the same."""

import asyncio
import os

from streams_app.application import App
from tests.apps.balances import Balance, Entry, obey

guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("balances", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
entries = app.topic("entries", key_type=str, value_type=Entry)
balances = app.topic("balances", key_type=str, value_type=Balance)
table = app.Table("balance", key_type=str, value_type=int, default=int)
loop = os.environ["LOOP"]
handed_on = app.channel(key_type=str, value_type=Entry)


async def add_up(key: str, entry: Entry) -> None:
    if guarantee == "at_most_once":  # an output that left stays, though its event fails
        await obey(entry)
    table[key] += entry.amount
    await balances.send(key=key, value=Balance(entry.id, table[key]))
    if guarantee != "at_most_once":
        await obey(entry)


async def by_take(stream):
    async for events in stream.take_events(7, within=1):
        assert len(events) <= 7
        assert len({event.message.partition for event in events}) == 1
        for event in events:
            await add_up(event.key, event.value)


async def by_noack_take(stream):
    async for events in stream.noack_take(7, within=1):
        for event in events:
            await add_up(event.key, event.value)
        for event in events:
            await stream.ack(event)


async def by_noack(stream):
    """Acknowledges each event when it has three more, or some time later."""
    held = []
    async for event in stream.noack().events():
        await add_up(event.key, event.value)
        held.append(event)
        if len(held) > 3:
            held.pop(0).ack()
        asyncio.get_running_loop().call_later(0.2, event.ack)


async def by_channel(stream):
    async for key, entry in stream.items():
        await handed_on.send(key=key, value=entry)


async def by_items(stream):
    async for key, entry in stream.items():
        await add_up(key, entry)


loops = {
    "take": by_take,
    "noack take": by_noack_take,
    "noack": by_noack,
    "channel": by_channel,
    "isolated": by_items,
}
app.agent(entries, isolated_partitions=loop == "isolated")(loops[loop])
if loop == "channel":
    app.agent(handed_on, name="behind")(by_items)
