"""Faust's windowed aggregation: values are collected in windows, and their mean goes out when a window closes."""

import os

import faust

from streams_app.application import App


class Raw(faust.Record):
    id: int
    sensor: str
    value: int
    at: float


class Aggregate(faust.Record):
    id: str
    count: int
    mean: float


SIZE_S, EXPIRES_S = 10, 5
app = App(
    "aggregation",
    processing_guarantee=os.environ.get("GUARANTEE", "exactly_once"),
    autodiscover=False,
    web_enabled=False,
)
raw = app.topic("raw", key_type=str, value_type=Raw)
aggregates = app.topic("aggregates", key_type=str, value_type=Aggregate)


def window_closed(key, values):
    sensor, window = key
    mean = sum(values) / len(values)
    aggregates.send_soon(key=sensor, value=Aggregate(f"{sensor} {window[0]:.0f}", len(values), mean))


values_of = (
    app.Table("values", key_type=str, default=list, on_window_close=window_closed)
    .tumbling(SIZE_S, expires=EXPIRES_S)
    .relative_to_field(Raw.at)
)


@app.agent(raw)
async def collect(stream):
    async for each in stream:
        values_of[each.sensor] = [*values_of[each.sensor].value(), each.value]
