"""The balances app, which says what its table has when it is restored; with variables for what may be wrong with it."""

import os

import faust

from streams_app.application import App
from tests.apps.balances import Balance, Entry

guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App(
    "balances",
    processing_guarantee=guarantee,
    autodiscover=False,
    web_enabled=False,
    topic_disable_leader="WITHOUT_TABLE" in os.environ,
)
entries = app.topic("entries", key_type=str, value_type=Entry)
balances = app.topic("balances", key_type=str, value_type=Balance)

if "WITHOUT_TABLE" in os.environ:
    table = None
else:
    table = app.Table("balance", key_type=str, default=int, partitions=int(os.environ.get("TABLE_PARTITIONS", "4")))

    @table.on_recover
    async def say_what_is_there():
        assert faust.current_event() is None
        print(f"recovered: {sum(table.values())} in all", flush=True)


@app.agent(entries)
async def add_up(stream):
    async for key, entry in stream.items():
        balance = entry.amount
        if table is not None:
            balance = table[key] = table[key] + entry.amount
        await balances.send(key=key, value=Balance(entry.id, balance))
