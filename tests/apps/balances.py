"""The smallest app with state: read an entry, update the balance of its key, write one output."""

import asyncio
import os
import time

import msgspec

from streams_app import metrics
from streams_app.application import App


class Entry(msgspec.Struct):
    id: int
    amount: int
    #: What the agent does with it, apart from its work.
    order: str = ""


class Balance(msgspec.Struct):
    id: int
    balance: int


guarantee = os.environ.get("GUARANTEE", "exactly_once")
with_web = "PORT" in os.environ
app = App("balances", processing_guarantee=guarantee, autodiscover=False, web_enabled=with_web)
if with_web:
    metrics.register(app)
entries = app.topic("entries", key_type=str, value_type=Entry)
balances = app.topic("balances", key_type=str, value_type=Balance)
table = app.Table("balance", key_type=str, value_type=int, default=int)
failed: set[int] = set()


@app.agent(entries, concurrency=int(os.environ.get("CONCURRENCY", "1")))
async def add_up(stream):
    if "PROCESSOR" in os.environ:
        stream.add_processor(check)
    async for key, entry in stream.items():
        # A member that does not lead the group has to know it, too.
        assert app.partitions_of("entries") == 4
        balance = table[key] + entry.amount
        table[key] = balance
        await balances.send(key=key, value=Balance(entry.id, balance))
        await obey(entry)


def check(entry):
    """A processor of the stream, which fails before the agent has the event."""
    if entry.order == "unprocessable":
        raise ValueError(f"{entry.id} cannot be processed")
    return entry


async def obey(entry):
    """Misbehave, after the writes, so that what was written has to be taken back."""
    match entry.order:
        case "fail once" if entry.id not in failed:
            failed.add(entry.id)
            raise ValueError(f"{entry.id} fails once")
        case "fail" if "MENDED" not in os.environ:
            raise ValueError(f"{entry.id} always fails")
        case "cancelled":
            task = asyncio.ensure_future(asyncio.sleep(60))
            task.cancel()
            await task
        case "bad header":
            await balances.send(key="k", value=Balance(entry.id, 0), headers={"n": 5})
        case "too far ahead":
            await balances.send(key="k", value=Balance(entry.id, 0), timestamp=time.time() + 7_200)
        case "no such partition":
            await balances.send(key="k", value=Balance(entry.id, 0), partition=99)
        case "block":
            print(f"{entry.id} blocks")
            time.sleep(float(os.environ.get("SLEEP_S", "1.5")))  # noqa: ASYNC251 - that is the misbehaviour
        case "sleep":
            print(f"{entry.id} sleeps")
            await asyncio.sleep(float(os.environ.get("SLEEP_S", "1.5")))
