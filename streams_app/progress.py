"""How far long work is, on a console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_LINE_EVERY_S = 2.0


@contextlib.contextmanager
def shown_count(console: Console, what: str, unit: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a number of ``unit`` that grows, up to ``total`` if there is one; gives the function that is told the number."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda number: progress.update(task, completed=number)
        return
    lines = _Lines(console, what, unit, total)
    yield lines.tell
    lines.print()


class _Lines:
    def __init__(self, console: Console, what: str, unit: str, total: int | None) -> None:
        self._console = console
        self._what = what
        self._unit = unit if total is None else f"of {total} {unit}"
        self._number = 0
        self._started_s = time.monotonic()
        self._next_s = self._started_s + _PLAIN_LINE_EVERY_S

    def tell(self, number: int) -> None:
        self._number = number
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PLAIN_LINE_EVERY_S
            self.print()

    def print(self) -> None:
        self._console.print(f"{self._what}: {self._number} {self._unit}, {time.monotonic() - self._started_s:.0f} s")
