"""Faust's page views: grouped by their page, counted for ever and in windows of their own time."""

import os

import faust

from streams_app.application import App


class PageView(faust.Record):
    id: str
    user: str
    page: str
    at: float


class Views(faust.Record):
    id: str
    page: str
    views: int
    in_window: int


guarantee = os.environ.get("GUARANTEE", "exactly_once")
app = App("views", processing_guarantee=guarantee, autodiscover=False, web_enabled=False)
page_views = app.topic("page-views", key_type=str, value_type=PageView)
counted = app.topic("views", key_type=str, value_type=Views)
views_of = app.Table("page-views", key_type=str, value_type=int, default=int)
windowed = (
    app.Table("windowed-views", key_type=str, value_type=int, default=int)
    .hopping(120, 60, expires=7 * 86_400)
    .relative_to_field(PageView.at)
)


@app.agent(page_views)
async def count_page_views(stream):
    async for view in stream.group_by(PageView.page):
        views_of[view.page] += 1
        windowed[view.page] += 1
        value = Views(view.id, view.page, views_of[view.page], windowed[view.page].value())
        await counted.send(key=view.page, value=value)
