"""Tables whose writes commit with the events that caused them.

Inside an agent a table is seen as the event's batch sees it: committed values, and on top of them what the batch wrote. From
outside (a web view, a timer) only committed values are seen, and nothing can be written.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, ValuesView
from functools import partial
from typing import Any, cast

import faust
from faust.exceptions import ImproperlyConfigured

from streams_app.batch import Overlay, check_size
from streams_app.codecs import Codec, key_codec, value_codec
from streams_app.events import Event, current_event
from streams_app.store import TIME_BYTES, Store


class TableData:
    """A table's data: the stores of the partitions that this worker holds, seen through the batch in hand."""

    def __init__(self, table: Table) -> None:
        #: Partition to store; the engine opens and closes them.
        self.partitions: dict[int, Store] = {}
        self._table = table.name
        self._changelog: str = table.changelog_topic_name
        self._skip = 0 if table.expires_s is None else TIME_BYTES
        key_serializer = None if table.key_type in {bytes, str} else table.key_serializer
        self._keys: Codec = key_codec(table.app, table.key_type, key_serializer)
        self._values: Codec = value_codec(table.app, table.value_type, table.value_serializer)

    def __getitem__(self, key: Any) -> Any:
        stored = self._stored(self._keys.encode(key))
        if stored is None:
            raise KeyError(key)
        return self._values.decode(stored[self._skip :])

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        stored = self._stored(self._keys.encode(key))
        return default if stored is None else self._values.decode(stored[self._skip :])

    def __setitem__(self, key: Any, value: Any) -> None:
        event = self._event_in_hand()
        overlay = self._overlay(event)
        key_bytes, stored = self._keys.encode(key), self._values.encode(value)
        check_size(self._changelog, key_bytes, stored)
        if self._skip:
            stored = overlay.time(int(event.message.timestamp * 1000)) + stored
        overlay.writes[key_bytes] = stored

    def __delitem__(self, key: Any) -> None:
        overlay = self._overlay(self._event_in_hand())
        key_bytes = self._keys.encode(key)
        if overlay.get(key_bytes) is None:
            raise KeyError(key)
        overlay.writes[key_bytes] = None

    def __contains__(self, key: object) -> bool:
        return self._stored(self._keys.encode(key)) is not None

    def __iter__(self) -> Iterator[Any]:
        return (self._keys.decode(key) for key, _ in self._scan())

    def __len__(self) -> int:
        return sum(1 for _ in self._scan())

    def items(self) -> Any:
        """Pairs of key and value of all partitions here, or in an agent of the event's partition."""
        return [(self._keys.decode(key), self._values.decode(stored[self._skip :])) for key, stored in self._scan()]

    def keys(self) -> KeysView[Any]:
        """As `items`, the keys."""
        return cast(KeysView[Any], dict(self.items()).keys())

    def values(self) -> ValuesView[Any]:
        """As `items`, the values."""
        return cast(ValuesView[Any], dict(self.items()).values())

    def clear(self) -> None:
        """Delete all keys of the event's partition."""
        for key in list(self):
            del self[key]

    def _stored(self, key: bytes) -> bytes | None:
        event = current_event()
        if event is not None and event.batch is not None:
            return self._overlay(event).get(key)
        for store in list(self.partitions.values()):
            stored = store.get(key)
            if stored is not None:
                return stored
        return None

    def _scan(self) -> Iterator[tuple[bytes, bytes]]:
        event = current_event()
        if event is not None and event.batch is not None:
            yield from self._overlay(event).items()
        else:
            for store in list(self.partitions.values()):
                yield from store.items()

    def _event_in_hand(self) -> Event:
        event = current_event()
        if event is None or event.batch is None:
            raise TypeError(
                f"table {self._table} was written outside of an agent; send an event to an agent that writes it"
            )
        event.batch.check_alive()
        return event

    def _overlay(self, event: Event) -> Overlay:
        partition = event.message.partition
        assert event.batch is not None
        return event.batch.overlay(self._table, partition, partial(self._new_overlay, event.message.topic, partition))

    def _new_overlay(self, topic: str, partition: int) -> Overlay:
        store = self.partitions.get(partition)
        if store is None:
            raise ImproperlyConfigured(
                f"table {self._table} has no partition {partition} here, for an event of {topic}: "
                f"{topic} and {self._changelog} must have the same number of partitions"
            )
        return Overlay(store, self._changelog)


class Table(faust.Table[Any, Any]):
    """`faust.Table`, transactional; see the module.

    ``expires_s``: a key that was not written for that long, of its partition's record time, is deleted, inside the
    transaction of a later batch. Record time is the largest timestamp among the events that wrote to the partition, and
    never ahead of the clock of this machine; so where several topics write one table, the one that is ahead decides.
    """

    def __init__(self, app: faust.App, *, expires_s: float | None = None, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self.expires_s = expires_s
        self._view: TableData | None = None

    @property
    def expires_ms(self) -> int | None:
        """`expires_s` in milliseconds."""
        return None if self.expires_s is None else int(self.expires_s * 1000)

    @property
    def data(self) -> TableData:  # type: ignore[override]
        """The stores behind the table."""
        if self._view is None:
            self._view = TableData(self)
        return self._view

    async def on_start(self) -> None:
        """Make sure that the changelog topic exists; the engine opens the stores."""
        await self.changelog_topic.maybe_declare()

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.data[key]
        except KeyError:
            return self.__missing__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.data[key] = value

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        return self.data.get(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set all keys of mappings or pairs, as `dict.update` does."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def on_key_set(self, key: Any, value: Any) -> None:
        """Nothing to send: the batch's writes are the changelog."""

    def on_key_del(self, key: Any) -> None:
        """Nothing to send: the batch's writes are the changelog."""

    def on_clear(self) -> None:
        """Nothing to send: the batch's writes are the changelog."""

    def using_window(self, *args: Any, **kwargs: Any) -> Any:
        """Windows are refused so far: their clean-up would write outside of transactions."""
        raise ImproperlyConfigured(f"table {self.name}: windows are not supported under exactly_once yet")
