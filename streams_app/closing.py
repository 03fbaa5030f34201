"""Windows that close: what ``on_window_close`` of a table is told.

A window closes when the newest time of its partition is ``expires`` behind its end. The event that moves the time on so far
closes it, in its own batch: for each row the callback is called, once, and the row is deleted. What the callback sends, and
the deletion, are in the event's transaction; so as long as a row is there, nobody was told, and no crash changes that. If the
callback raises, it is the event that failed.

Where no event comes, no time passes: the last windows of a partition close when something is written to it again.

To find the rows of a window by its end, the keys of open windows are kept in memory, by partition. That is an index of what
*may* be there: rows of dropped batches are in it, and rows that were closed, until the store has let go of them.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from faust.exceptions import ImproperlyConfigured

from streams_app.batch import Overlay
from streams_app.store import Store


class OpenWindows:
    """Keys of rows, by the ends of their windows; see the module."""

    def __init__(self, rows: Iterable[bytes], end_ms: Callable[[bytes], int]) -> None:
        self._end_ms = end_ms
        self._rows: dict[int, set[bytes]] = {}
        #: The keys of these, in their order.
        self._ends: list[int] = []
        for row_key in rows:
            self.add(row_key)

    @classmethod
    def of(cls, overlay: Overlay, are_in: Callable[[bytes], bool], end_ms: Callable[[bytes], int]) -> OpenWindows:
        """All that may be there, whatever becomes of the batches."""
        below = {} if overlay.below is None else overlay.below.writes
        keys = {key for key, _ in overlay.store.items()} | below.keys() | overlay.writes.keys()
        return cls(filter(are_in, keys), end_ms)

    def add(self, row_key: bytes) -> None:
        """The row is being written."""
        end_ms = self._end_ms(row_key)
        if end_ms not in self._rows:
            self._rows[end_ms] = set()
            insort(self._ends, end_ms)
        self._rows[end_ms].add(row_key)

    def close(self, overlay: Overlay, expires_ms: int, tell: Callable[[bytes, bytes], None]) -> None:
        """``tell`` key and stored bytes of each row whose window has closed in ``overlay``, the oldest first.

        If it raises, all that it did not return from are told another time.
        """
        until_ms, before_ms = overlay.clock_ms - expires_ms, overlay.closed_ms
        if until_ms <= before_ms:
            return
        overlay.closed_ms = until_ms
        closed = self._ends[bisect_right(self._ends, before_ms) : bisect_right(self._ends, until_ms)]
        try:
            for row_key in [row_key for end_ms in closed for row_key in sorted(self._rows[end_ms])]:
                stored = overlay.get(row_key)
                if stored is not None:
                    tell(row_key, stored)
        except BaseException:
            overlay.closed_ms = before_ms
            raise
        if closed:
            self._forget(overlay.store, overlay.store.clock_ms - expires_ms)

    def _forget(self, store: Store, until_ms: int) -> None:
        """Let go of rows that are gone for good: their windows have closed in what is committed, and were told."""
        for end_ms in self._ends[: bisect_right(self._ends, until_ms)]:
            self._rows[end_ms] = {row_key for row_key in self._rows[end_ms] if store.get(row_key) is not None}
            if not self._rows[end_ms]:
                del self._rows[end_ms]
                self._ends.remove(end_ms)


def run_at_once(table: str, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what awaits nothing but sends, which are done at once inside of a batch.

    Raises:
        ImproperlyConfigured: it awaits something else, and the event cannot wait for that here.
    """
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise ImproperlyConfigured(
        f"table {table}: its on_window_close awaits something that takes time; send an event, and let the agent that gets it "
        "await that"
    )
