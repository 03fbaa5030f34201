"""Read, update a table, write one output: on our engine, under the guarantee that BENCH_GUARANTEE names."""

import os

import msgspec

from streams_app.application import App


class Entry(msgspec.Struct):
    id: int
    account: str
    amount: int


class Balance(msgspec.Struct):
    id: int
    account: str
    balance: int


guarantee = os.environ.get("BENCH_GUARANTEE", "exactly_once")
app = App("bench-ours", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
entries = app.topic("entries", key_type=str, value_type=Entry)
outputs = app.topic("outputs", key_type=str, value_type=Balance)
balances = app.Table("balances", key_type=str, value_type=int, default=int)


@app.agent(entries)
async def add_up(stream):
    async for account, entry in stream.items():
        balances[account] = balance = balances[account] + entry.amount
        await outputs.send(key=account, value=Balance(entry.id, account, balance))
