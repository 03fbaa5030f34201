"""The balances app, whose agent asks another one for the amount that counts."""

import os

from streams_app.application import App
from streams_app.dead_letters import set_aside
from tests.apps.balances import Balance, Entry

guarantee = os.environ.get("GUARANTEE", "at_least_once")
app = App(
    "balances",
    processing_guarantee=guarantee,
    autodiscover=False,
    web_enabled=False,
    reply_create_topic="LATER" not in os.environ,
)
entries = app.topic("entries", key_type=str, value_type=Entry)
amounts = app.topic("amounts", key_type=str, value_type=Entry)
balances = app.topic("balances", key_type=str, value_type=Balance)
table = app.Table("balance", key_type=str, value_type=int, default=int)


@app.agent(amounts)
async def tell(stream):
    async for entry in stream:
        if str(entry.id) == os.environ.get("POISON"):
            raise ValueError("no amount")
        if str(entry.id) == os.environ.get("UNANSWERED"):
            await set_aside("no_amount", "this one has no amount")
            continue
        yield entry.amount


@app.agent(entries)
async def add_up(stream):
    async for key, entry in stream.items():
        amount = await tell.ask(entry, key=key)
        table[key] += amount
        await balances.send(key=key, value=Balance(entry.id, table[key]))


@app.task
async def ask_from_outside():
    if "ASK" in os.environ:
        print(f"answers: {await tell.join([Entry(1, 10), Entry(2, 20)])}", flush=True)
