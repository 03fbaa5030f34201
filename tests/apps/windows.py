"""The smallest app with windows: count the entries of each key in windows of ten minutes of their own time."""

import os

import msgspec

from streams_app.application import App
from tests.apps.balances import Entry


class Count(msgspec.Struct):
    id: int
    window_start: float
    count: int


#: An entry happened this long after the one with the id below its own.
APART_S, SIZE_S = 60, 600

app = App(
    "windows",
    processing_guarantee=os.environ.get("GUARANTEE", "exactly_once"),
    autodiscover=False,
    web_enabled=False,
)
entries = app.topic("entries", key_type=str, value_type=Entry)
counts = app.topic("counts", key_type=str, value_type=Count)
table = (
    app.Table("count", key_type=str, value_type=int, default=int)
    .tumbling(SIZE_S, expires=3600)
    .relative_to_field(lambda event: event.value.id * APART_S)
)


@app.agent(entries)
async def count_up(stream):
    async for key, entry in stream.items():
        table[key] += 1
        happened_s = entry.id * APART_S
        await counts.send(key=key, value=Count(entry.id, happened_s - happened_s % SIZE_S, table[key].value()))
