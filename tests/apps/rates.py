"""Rates in a global table, which agents of every partition read."""

import os

import msgspec

from streams_app.application import App
from tests.apps.balances import Entry


class Known(msgspec.Struct):
    id: int
    rates: list[int]


app = App(
    "balances",
    processing_guarantee=os.environ.get("GUARANTEE", "exactly_once"),
    autodiscover=False,
    web_enabled=False,
)
rates = app.topic("rates", key_type=str, value_type=int)
entries = app.topic("entries", key_type=str, value_type=Entry)
balances = app.topic("balances", key_type=str, value_type=Known)
rate_of = app.GlobalTable("rate", key_type=str, value_type=int, default=int)


@app.agent(rates)
async def set_rates(stream):
    async for currency, rate in stream.items():
        rate_of[currency] = rate


@app.agent(entries)
async def tell(stream):
    async for key, entry in stream.items():
        assert len(rate_of) == len(list(rate_of)) <= 20
        await balances.send(key=key, value=Known(entry.id, [rate_of[f"C{number}"] for number in range(20)]))
