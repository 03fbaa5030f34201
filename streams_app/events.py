"""Events that know their batch."""

from __future__ import annotations

from contextvars import ContextVar

import faust

from streams_app.batch import Batch


class Event(faust.Event):
    """An event of a batch; without a batch (``batch`` is None) it came from outside any input topic."""

    batch: Batch | None = None
    #: Whether an agent has begun with it.
    taken = False
    #: Taken back before any agent had begun: it comes again with a later batch.
    withdrawn = False

    def ack(self) -> bool:
        """Tell the batch that an agent is through with this event; counts once."""
        if self.acked:
            return False
        self.acked = True
        if self.batch is not None:
            self.batch.done()
        return True


#: Faust keeps a weak reference: a task that an agent left behind would find None there, and its sends would pass for some
#: from outside of agents. With a strong one they are recognised, and refused.
in_hand: ContextVar[Event | None] = ContextVar("in_hand", default=None)


def current_event() -> Event | None:
    """The event that the running agent has in hand; None outside of agents."""
    return in_hand.get()


def current_batch() -> Batch | None:
    """The batch of the event in hand."""
    event = current_event()
    return event.batch if event is not None else None
