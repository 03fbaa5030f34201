"""Analytics: page views are counted at least once.

No view is lost. When a worker dies, a count may be sent again; whoever draws charts from the counts keeps the last one of
each minute, and sees no difference::

    page-views, by page ──> `count` ──> page-view-counts

Views come late, as phones are offline and clocks are wrong. A minute stays open for an hour; what comes later than that,
or from too far ahead, is set aside.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from streams_app import at_least_once, set_aside
from tables.analytics import OPEN, PageView, PageViewCount, minute_of, views

if TYPE_CHECKING:
    from faust.types import StreamT

page_views = at_least_once.topic("page-views", key_type=bytes, value_type=PageView)
counts = at_least_once.topic("page-view-counts", key_type=str, value_type=PageViewCount)


def refusal(view: PageView, key: bytes | None, sent: datetime, newest: datetime | None) -> tuple[str, str] | None:
    """Why a view must not be counted: ``(code, message)``; None: it counts.

    ``key`` and ``sent`` are the key and the time of its record, ``newest`` is the time of the newest view that was
    counted in its partition.
    """
    if key != view.page.encode():
        # It may lie in another partition than the page's others, each of which would count for itself.
        return "wrong_key", f"the record's key is {key!r}; it must be the page {view.page!r}"
    if view.at - sent > OPEN:
        return "future", f"the view is of {view.at}, but its record of {sent}: more than {OPEN} earlier"
    if newest is not None and newest - view.at > OPEN:
        return "late", f"the view is of {view.at}, but there was one of {newest} already: more than {OPEN} later"
    return None


@at_least_once.agent(page_views)
async def count(stream: StreamT[PageView]) -> None:
    """Count each view in its minute."""
    async for event in stream.events():
        view, message = event.value, event.message
        sent = datetime.fromtimestamp(message.timestamp, UTC)
        refused = refusal(view, message.key, sent, views.newest())
        if refused is not None:
            await set_aside(*refused)
            continue
        await add(view)


async def add(view: PageView) -> None:
    """Count one view."""
    views[view.page] += 1
    so_far = PageViewCount(view.page, minute_of(view.at), views[view.page].value())
    await counts.send(key=view.page, value=so_far)
