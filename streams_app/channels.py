"""Channels in memory, whose events belong to the batch of the event that was in hand when they were put.

So what an agent hands to another one by ``app.channel()`` is in the same transaction, and the batch waits for it. What is put
from outside of agents (a timer, a web view) is in no batch: it is gone if the worker ends.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from faust.channels import Channel as FaustChannel
from faust.exceptions import ImproperlyConfigured
from faust.types import Message

from streams_app.events import Event, in_hand


class Channel(FaustChannel[Any]):
    """`faust.Channel`; see the module."""

    async def put(self, value: Any) -> None:
        """Put an event, or a value by itself, to all that read the channel.

        Raises:
            ImproperlyConfigured: the event in hand is of another guarantee's app.
            DeadBatchError: the batch of the event in hand is over.
        """
        root = self._root if self._root is not None else self
        for subscriber in list(root._subscribers):
            # Of its own for each: each of them has to be done.
            event = self._event_of(value)
            try:
                await subscriber.queue.put(event)
            except asyncio.CancelledError:
                event.ack()  # a time-out while there was no room: nobody will see it
                raise

    def _event_of(self, value: Any) -> Event:
        key, headers = (value.key, value.headers) if isinstance(value, Event) else (None, None)
        content = value.value if isinstance(value, Event) else value
        cause = in_hand.get()
        if cause is None or cause.batch is None:
            message = value.message if isinstance(value, Event) else _message(None, content)
            return Event(self.app, key, content, headers, message)
        if cause.app is not self.app:
            raise ImproperlyConfigured(
                f"an agent of {cause.app.conf.id} put something into a channel of {self.app.conf.id}, whose guarantee is "
                "another; send it to a topic"
            )
        cause.batch.check_alive()
        event = Event(self.app, key, content, headers, _message(cause.message, content, key), cause.batch)
        cause.batch.add([event])
        return event


def _message(cause: Message | None, value: Any, key: Any = None) -> Message:
    """The message of an event in memory: where its cause stands, as tables are kept by that partition."""
    if cause is None:
        return Message("", 0, -1, time.time(), 1, None, key, value, None)
    return Message(
        *(cause.topic, cause.partition, cause.offset, cause.timestamp, cause.timestamp_type, None, key, value, None),
        tp=cause.tp,
    )
