"""One batch commits while the next is filled.

::

    batch N      fill ──> commit ──────> ended
    batch N+1             fill, over N's writes ──> waits for N's end ──> commit ──> …

The next one is *over* the one that commits: it reads what that wrote. It is decided on only when the one before it has ended,
and if that failed, it goes with it. So there are never more than two, and what is uncommitted in memory is bounded by them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from streams_app.batch import Batch


class Pipeline:
    """See the module."""

    def __init__(self, commit: Callable[[Batch], Awaitable[None]]) -> None:
        """``commit`` returns when the batch has taken effect, and raises if it has not, or nobody knows."""
        self._commit = commit
        self._committing: Batch | None = None
        self._filling: Batch | None = None
        self._task: asyncio.Future[None] | None = None
        self._ended_s = float("-inf")

    def fill(self, batch: Batch) -> None:
        """This is the next one."""
        batch.over(self._committing)
        self._filling = batch

    def commit(self, batch: Batch) -> None:
        """Begin to commit it; the one before it must have ended."""
        assert self._task is None, "two commits at a time"
        self._committing = batch
        self._task = asyncio.ensure_future(self._run(batch))

    async def _run(self, batch: Batch) -> None:
        try:
            await self._commit(batch)
        except BaseException as error:
            if self._filling is not None:
                self._filling.hopeless(error)  # nobody waits for its agents, or blames its events
            raise
        finally:
            self._ended_s = time.monotonic()
        self._committing = None
        if self._filling is not None:
            self._filling.over(None)

    @property
    def rested_s(self) -> float:
        """Seconds since the last commit has ended; 0 while one is under way."""
        return 0.0 if self._task is not None and not self._task.done() else time.monotonic() - self._ended_s

    @property
    def failed(self) -> bool:
        """Whether the last commit failed and nobody has heard of it: nothing may be filled over that."""
        return self._task is not None and self._task.done() and (self._task.cancelled() or bool(self._task.exception()))

    async def ended(self) -> None:
        """Wait until no commit is under way; raises what the last one raised, once."""
        if self._task is None:
            return
        try:
            await asyncio.shield(self._task)
        finally:
            if self._task.done():
                self._task = self._committing = None
