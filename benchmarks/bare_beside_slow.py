"""The bare app of bare_ours, and beside it, in the same worker, one that takes a second for each event."""

import asyncio

from benchmarks.bare_ours import app

slow = app.sibling("at_least_once")
views = slow.topic("views")


@slow.agent(views)
async def dawdle(stream):
    async for _view in stream:
        await asyncio.sleep(1)


__all__ = ["app"]
