"""Events that know their batch."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import faust
from faust.types import Message

from streams_app.batch import Batch


class Event(faust.Event):
    """An event of a batch; without a batch (``batch`` is None) it came from outside any input topic."""

    acked = False
    #: Whether an agent has begun with it.
    taken = False
    #: Taken back before any agent had begun: it comes again with a later batch.
    withdrawn = False

    def __init__(
        self, app: Any, key: Any, value: Any, headers: Any, message: Message, batch: Batch | None = None
    ) -> None:
        # As Faust's, which it takes the place of: made for each event, it shall be quick.
        self.app = app
        self.key = key
        self.value = value
        self.message = message
        self.headers = dict(headers) if headers else {}
        self.batch = batch

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
    event = in_hand.get()
    return None if event is None else event.batch
