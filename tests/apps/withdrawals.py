"""Faust's withdrawals: totals by user, where they come in, and by country, behind a topic grouped by it."""

import os

import faust

from streams_app.application import App


class Withdrawal(faust.Record, isodates=True):
    id: str
    user: str
    country: str
    amount: float


class Total(faust.Record):
    id: str
    of: str
    total: float


guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("withdrawals", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
withdrawals = app.topic("withdrawals", key_type=str, value_type=Withdrawal)
totals = app.topic("totals", key_type=str, value_type=Total)
user_to_total = app.Table("user-to-total", key_type=str, default=float)
country_to_total = app.Table("country-to-total", key_type=str, default=float)


async def tell(of: str, id: str, total: float) -> None:
    await totals.send(key=of, value=Total(id, of, total))


@app.agent(withdrawals)
async def track_user_withdrawal(stream):
    async for each in stream:
        user_to_total[each.user] += each.amount
        await tell(each.user, f"user {each.id}", user_to_total[each.user])


@app.agent(withdrawals)
async def track_country_withdrawal(stream):
    async for several in stream.group_by(Withdrawal.country).take(10, within=1):
        for each in several:
            country_to_total[each.country] += each.amount
            await tell(each.country, f"country {each.id}", country_to_total[each.country])
