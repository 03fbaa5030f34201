"""Analytics: the form of page views and their counts, and the table of counts.

========== ============================= ===================================================
table      key                           value
========== ============================= ===================================================
views      page, in each minute          how often it was viewed; forgotten an hour after the minute is over
========== ============================= ===================================================

A view belongs to the minute in which it happened, whenever it arrives.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from streams_app import at_least_once

#: How long a minute stays open behind the newest view of its partition, and how far a clock may be ahead of Kafka's.
OPEN = timedelta(hours=1)

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Page: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
Moment: TypeAlias = Annotated[datetime, Meta(tz=True)]


class PageView(Struct, frozen=True):
    """Somebody looked at a page; the input."""

    id: Name
    user: Name
    page: Page
    at: Moment

    def __post_init__(self) -> None:
        # In another time zone, the first and the last hours of the calendar would lie outside of it.
        if not datetime.min.year < self.at.year < datetime.max.year:
            raise ValueError(f"the year {self.at.year} is at the end of the calendar")


class PageViewCount(Struct, frozen=True):
    """How often a page was viewed in the minute from ``window_start`` on, so far."""

    page: Page
    window_start: Moment
    views: int


def minute_of(at: datetime) -> datetime:
    """The beginning of the minute that ``at`` lies in."""
    return at.astimezone(UTC).replace(second=0, microsecond=0)


views = (
    at_least_once.Table("views", key_type=str, value_type=int, default=int)
    .tumbling(60.0, expires=OPEN)
    .relative_to_field(PageView.at)
)
