"""Three guarantees side by side: money moves exactly once, sensors at most once, analytics at least once.

``faust -A streams_app COMMAND`` finds `app` here. Agents and tables declare themselves on it, or on one of its siblings::

    from streams_app import app

    visits = app.topic("visits", key_type=str, value_type=Visit)
    counts = app.Table("counts", key_type=str, value_type=int, default=int)

    @app.agent(visits)
    async def count(stream):
        async for page, visit in stream.items():
            counts[page] += 1
"""

from streams_app import commands, dashboard, health, metrics
from streams_app.application import App
from streams_app.dead_letters import set_aside
from streams_app.partitioning import partition_of

app = App("streams-app", processing_guarantee="exactly_once", autodiscover=["agents"])
at_least_once = app.sibling("at_least_once")
at_most_once = app.sibling("at_most_once")
commands.register(app)
dashboard.register(app)
metrics.register(app)
health.register(app)

__all__ = ["App", "app", "at_least_once", "at_most_once", "partition_of", "set_aside"]
