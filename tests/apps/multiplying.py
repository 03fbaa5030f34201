"""Faust's agents with replies: who asks by a record with a reply topic gets the product there."""

import os

import faust

from streams_app.application import App


class Factors(faust.Record):
    id: str
    x: int
    y: int


guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("multiplying", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
questions = app.topic("questions", key_type=str, value_type=Factors)
asked = app.Table("asked", key_type=str, value_type=int, default=int)


@app.agent(questions)
async def multiply(stream):
    async for key, factors in stream.items():
        asked[key] += 1
        yield factors.x * factors.y
