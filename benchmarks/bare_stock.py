"""Read, update a table, write one output: on stock Faust, as its documentation says, under the guarantee BENCH_GUARANTEE."""

import os

import faust

prefix = os.environ["KAFKA_PREFIX"]
app = faust.App(
    f"{prefix}bench-stock",
    broker=os.environ["KAFKA_URL"],
    processing_guarantee=os.environ.get("BENCH_GUARANTEE", "exactly_once"),
    store="rocksdb://",
    datadir=os.environ["STREAMS_APP_DATADIR"],
    topic_partitions=4,
    web_enabled=False,
    # The same length of a transaction as ours; its default of 2.8 s is no faster.
    broker_commit_interval=0.1,
)


class Entry(faust.Record):
    id: int
    account: str
    amount: int


class Balance(faust.Record):
    id: int
    account: str
    balance: int


entries = app.topic(f"{prefix}entries", key_type=str, value_type=Entry)
outputs = app.topic(f"{prefix}outputs", key_type=str, value_type=Balance)
balances = app.Table("balances", default=int, options={"driver": "rocksdict"})


@app.agent(entries)
async def add_up(stream):
    async for account, entry in stream.items():
        balances[account] = balance = balances[account] + entry.amount
        await outputs.send(key=account, value=Balance(id=entry.id, account=account, balance=balance))
