"""Events that know their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    #: Its agent went on, and acknowledges it some other time.
    held = False
    #: For how many reasons it counts as held: this one, and questions whose answers are awaited.
    holds = 0
    #: The last of several that were handed out together knows all of them.
    together: Sequence[Event] = ()
    #: What its agent holds besides.
    held_besides: Sequence[Event] = ()

    def __init__(
        self, app: Any, key: Any, value: Any, headers: Any, message: Message, batch: Batch | None = None
    ) -> None:
        # As Faust's, which it takes the place of: made for each event, it shall be quick.
        self.app = app
        self.key = key
        self.value = value
        self.message = message
        self._headers = dict(headers) if type(headers) is dict else headers
        self.batch = batch

    @property
    def headers(self) -> Mapping[Any, Any]:
        """The record's headers, as a mapping of its own; made when it is asked for."""
        if type(self._headers) is not dict:
            self._headers = dict(self._headers or ())
        return self._headers

    @headers.setter
    def headers(self, headers: Mapping[Any, Any]) -> None:
        self._headers = headers

    def ack(self) -> bool:
        """Tell the batch that an agent is through with this event; counts once."""
        if self.acked:
            return False
        self.acked = True
        batch = self.batch
        if batch is not None:
            if self.holds:
                batch.held -= 1
            batch.pending -= 1
            if batch.pending == batch.held:
                batch.wake()
        return True

    async def __aexit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        """``async with event`` acknowledges it at its end; Faust's does so even for one whose agent raised."""
        if kind is None:
            self.ack()

    @property
    def is_over(self) -> bool:
        """Nobody is to begin with it any more: it comes again, or was given up."""
        return self.withdrawn or (self.batch is not None and self.batch.dead)

    @property
    def undone(self) -> list[Event]:
        """This event, and what its agent has in hand with it, as far as they are not acknowledged."""
        in_hand = dict.fromkeys((*self.held_besides, *self.together, self))
        return [event for event in in_hand if not event.acked]

    @property
    def is_alone(self) -> bool:
        """Whether it is to be handed out by itself, as it, or one near to it, made an agent raise."""
        message = self.message
        return self.batch is not None and message.offset <= self.batch.alone.get(message.tp, -1)

    def hold(self) -> None:
        """Tell the batch that the agent wants the next event before it acknowledges this one."""
        if not self.acked and not self.held and self.batch is not None:
            self.held = True
            self.batch.hold(self)


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
