"""One topology of what Faust's streams can do: filter, group by another key, take several at a time, count in windows."""

import os

import msgspec

from streams_app.application import App
from tests.apps.balances import Entry


class Total(msgspec.Struct):
    id: int
    group: str
    total: int
    in_window: int


GROUPS = 7
guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("balances", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
entries = app.topic("entries", key_type=str, value_type=Entry)
grouped = app.topic("grouped", key_type=str, value_type=Entry)
totals = app.topic("balances", key_type=str, value_type=Total)
echoes = app.topic("echoes", key_type=str, value_type=Entry)
total_of = app.Table("balance", key_type=str, value_type=int, default=int)
in_window = app.Table("in-window", key_type=str, value_type=int, default=int).tumbling(3600, expires=86400)


def group_of(entry: Entry) -> str:
    return f"g{entry.id % GROUPS}"


@app.agent(entries)
async def add_up(stream):
    wanted = stream.filter(lambda entry: entry.id % 10 != 9).echo(echoes)
    async for events in wanted.group_by(group_of, name="group", topic=grouped).take_events(5, within=1):
        for event in events:
            group, entry = event.key, event.value
            total_of[group] += entry.amount
            in_window[group] += 1
            total = Total(entry.id, group, total_of[group], in_window[group].value())
            await totals.send(key=group, value=total)
