"""Work that throughput is measured of: its topics, its input, and what must have become of it."""

from __future__ import annotations

from threading import Event
from typing import Protocol

from benchmarks.entries import Completeness, Entries, check
from benchmarks.run import Run
from streams_app.generate import Feed, Plan


class Work(Protocol):
    """Names of topics are without prefix; of the inputs, those that the engine itself writes count, too."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    events: int

    def prepare(self, run: Run) -> None:
        """Create the topics and write the input."""

    def check(self, run: Run) -> Completeness:
        """Of the committed outputs; all inputs have been worked through."""


class BareWork:
    """Read an entry, update a balance in a table, write one output."""

    inputs: tuple[str, ...] = ("entries",)
    outputs: tuple[str, ...] = ("outputs",)

    def __init__(self, events: int, accounts: int) -> None:
        self.events = events
        self._entries = Entries(events, accounts)

    def prepare(self, run: Run) -> None:
        run.create_topics(*self.inputs, *self.outputs)
        self.write(run)

    def write(self, run: Run) -> None:
        run.fill("entries", self._entries.records())

    def check(self, run: Run) -> Completeness:
        return check(run.committed("outputs"), self._entries, run.partitions)


class LedgerWork:
    """The whole ledger: remembered ids, both legs of a transfer, entries, results."""

    inputs: tuple[str, ...] = ("transfers", "credits")
    outputs: tuple[str, ...] = ("transfer-results", "dead-letters")

    def __init__(self, events: int, accounts: int) -> None:
        self.events = events
        self._plan = Plan("transfers", events, keys=accounts)

    def prepare(self, run: Run) -> None:
        import agents.ledger_input  # noqa: F401, PLC0415 - registers its generator

        run.create_topics(*self.inputs, *self.outputs, "ledger")
        Feed(self._plan, run.address, run.prefix).run(Event())

    def check(self, run: Run) -> Completeness:
        """Of its input some repeats an id on purpose: only the number of answers is known."""
        count = sum(1 for _ in run.committed(*self.outputs))
        return Completeness(max(0, self.events - count), max(0, count - self.events), 0)
