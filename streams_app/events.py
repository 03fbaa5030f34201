"""Events that know their batch."""

from __future__ import annotations

from typing import Any

import faust
from faust import current_event as faust_current_event

from streams_app.batch import Batch


class Event(faust.Event):
    """An event of a batch; without a batch (``batch`` is None) it came from outside any input topic."""

    batch: Batch | None = None

    def ack(self) -> bool:
        """Tell the batch that an agent is through with this event; counts once."""
        if self.acked:
            return False
        self.acked = True
        if self.batch is not None:
            self.batch.done()
        return True


def current_event() -> Event | None:
    """The event that the running agent has in hand; None outside of agents."""
    event: Any = faust_current_event()
    return event if isinstance(event, Event) else None


def current_batch() -> Batch | None:
    """The batch of the event in hand."""
    event = current_event()
    return event.batch if event is not None else None
