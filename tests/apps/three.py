"""The balances app three times, once under each guarantee, in one worker."""

import os

from streams_app.application import App
from tests.apps.balances import Balance, Entry, obey

app = App("three", autodiscover=False, web_enabled=False)


def declare(under: App, name: str) -> None:
    """Read ``<name>-entries``, keep balances, write ``<name>-balances``."""
    entries = under.topic(f"{name}-entries", key_type=str, value_type=Entry)
    balances = under.topic(f"{name}-balances", key_type=str, value_type=Balance)
    table = under.Table(f"{name}-balance", key_type=str, value_type=int, default=int)

    @under.agent(entries, name=f"{name}-add-up", concurrency=int(os.environ.get("CONCURRENCY", "1")))
    async def add_up(stream):
        async for key, entry in stream.items():
            balance = table[key] + entry.amount
            table[key] = balance
            await balances.send(key=key, value=Balance(entry.id, balance))
            await obey(entry)


declare(app, "exact")
declare(app.sibling("at_least_once"), "least")
declare(app.sibling("at_most_once"), "most")
