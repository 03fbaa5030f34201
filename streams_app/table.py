"""Tables whose writes commit with the events that caused them.

Inside an agent a table is seen as the event's batch sees it: committed values, and on top of them what the batch wrote. From
outside (a web view, a timer) only committed values are seen, and nothing can be written.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, ValuesView
from copy import copy
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import faust
from faust.exceptions import ImproperlyConfigured
from faust.types import TP

from streams_app.batch import MAX_RECORD_BYTES, Batch, Overlay, check_size
from streams_app.closing import OpenWindows, run_at_once
from streams_app.codecs import Codec, key_codec, value_codec
from streams_app.errors import DeadBatchError, NotHere, StoreCorrupted, StoreFailed, TransactionAborted
from streams_app.events import Event, current_batch, in_hand
from streams_app.faust_adapter import HostTable, Rows
from streams_app.faust_settings import check_table_options
from streams_app.partitioning import partition_of
from streams_app.store import TIME_BYTES, Store
from streams_app.windows import CLOCK_ROW, WINDOW_BYTES, TimeWindow, WindowedTable, WindowKeys, to_ms

if TYPE_CHECKING:
    from streams_app.application import App

_MISSING = object()


class TableData:
    """A table's data: the stores of the partitions that this worker holds, seen through the batch in hand."""

    #: The engine's thread hides what the loop and the replicas' thread show.
    _showing: ClassVar[Lock] = Lock()

    def __init__(self, table: Table) -> None:
        #: Partition to store; the engine opens and closes them.
        self.partitions: dict[int, Store] = {}
        #: The same of partitions that others write; see `streams_app.replicas`.
        self.copies: dict[int, Store] = {}
        self._is_everywhere = table.is_everywhere
        self._table = table.name
        self._app = table.app
        self._changelog: str = table.changelog_topic_name
        self._skip = 0 if table.expires_s is None else TIME_BYTES
        key_serializer = None if table.key_type in {bytes, str} else table.key_serializer
        self._keys: Codec = key_codec(table.app, table.key_type, key_serializer)
        self._values: Codec = value_codec(table.app, table.value_type, table.value_serializer)
        #: The overlay that was used last, with its batch and partition: as a rule the next event is of the same.
        self._last: tuple[Batch, TP, Overlay] | tuple[None, None, None] = None, None, None

    def __getitem__(self, key: Any) -> Any:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        stored = self._stored(self._keys.encode(key))
        return default if stored is None else self._value(stored)

    def _value(self, stored: bytes) -> Any:
        return self._values.decode(stored[self._skip :] if self._skip else stored)

    def key_bytes(self, key: Any) -> bytes:
        """The key as it is stored."""
        return self._keys.encode(key)

    def committed(self, key: Any, partition: int) -> Any:
        """The committed value of ``key``, or None.

        Raises:
            KeyError: there is no store of the partition here.
        """
        stored = (self.copies | self.partitions)[partition].get(self._keys.encode(key))
        return None if stored is None else self._values.decode(stored[self._skip :])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def set(self, key: Any, value: Any) -> None:
        """Write the value of ``key``, in the partition of the event in hand."""
        overlay = self._overlay() or self._no_overlay()
        key_bytes, stored = self._keys.encode(key), self._values.encode(value)
        if len(key_bytes) + len(stored) > MAX_RECORD_BYTES:
            check_size(self._changelog, key_bytes, stored)
        if self._skip:
            stored = overlay.time(int(_in_hand().message.timestamp * 1000)) + stored
        overlay.writes[key_bytes] = stored

    def __delitem__(self, key: Any) -> None:
        overlay = self._own_overlay()
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

    def _overlay(self) -> Overlay | None:
        """How the batch in hand sees the event's partition; None outside of agents of the table's own guarantee."""
        event = in_hand.get()
        if event is None or event.batch is None:
            return None
        batch, tp = event.batch, event.message.tp
        last_batch, last_tp, overlay = self._last
        if batch is last_batch and tp is last_tp and batch.is_open:
            return overlay
        if event.app is not self._app:
            return None
        overlay = batch.overlay(self._table, tp.partition, partial(self._new_overlay, tp))
        self._last = batch, tp, overlay
        return overlay

    def _own_overlay(self) -> Overlay:
        return self._overlay() or self._no_overlay()

    def _no_overlay(self) -> NoReturn:
        event = in_hand.get()
        if event is None or event.batch is None:
            raise TypeError(
                f"table {self._table} was written outside of an agent; send an event to an agent that writes it. In a test, "
                "run the agent by run_agent, of streams_app.testing"
            )
        raise ImproperlyConfigured(
            f"table {self._table} is kept by {self._app.conf.id}, and an agent of {event.app.conf.id} wrote it; send an "
            "event to an agent of the table's own app, and let that write"
        )

    def _stored(self, key: bytes) -> bytes | None:
        overlay = self._overlay()
        if overlay is None:
            return self._committed(key)
        try:
            stored = overlay.get(key)
            return self._elsewhere(key, overlay.store) if stored is None and self._is_everywhere else stored
        except (StoreCorrupted, StoreFailed) as error:
            raise _hopeless(error) from error

    def _committed(self, key: bytes, but: Store | None = None) -> bytes | None:
        for store in self._stores(but):
            stored = store.get(key)
            if stored is not None:
                return stored
        return None

    def show(self, *, partitions: dict[int, Store] | None = None, copies: dict[int, Store] | None = None) -> None:
        """Show these stores. Any thread may call it, and `hide`: mappings are replaced, not changed."""
        with self._showing:
            self.partitions = self.partitions if partitions is None else partitions
            self.copies = self.copies if copies is None else copies

    def hide(self, partition: int) -> None:
        """Show no store of ``partition`` any more."""
        with self._showing:
            self.partitions = {at: store for at, store in self.partitions.items() if at != partition}
            self.copies = {at: store for at, store in self.copies.items() if at != partition}

    def _stores(self, but: Store | None = None) -> list[Store]:
        """Those that are here, each once."""
        return [store for store in (self.copies | self.partitions).values() if store is not but]

    def _scan(self) -> Iterator[tuple[bytes, bytes]]:
        overlay = self._overlay()
        if overlay is None:
            yield from self._scan_committed()
            return
        try:
            copies = self.copies
            yield from overlay.items()
            if self._is_everywhere:
                self._check_all_here(copies)
                for store in self._stores(overlay.store):
                    yield from store.items()
                    self._check_all_here(copies)
        except (StoreCorrupted, StoreFailed) as error:
            raise _hopeless(error) from error

    def _elsewhere(self, key: bytes, but: Store) -> bytes | None:
        copies = self.copies
        stored = self._committed(key, but)
        self._check_all_here(copies)
        return stored

    def _check_all_here(self, copies: Mapping[int, Store]) -> None:
        """Of a table that is everywhere: a copy that is made anew has keys that would be missed, with their defaults.

        Asked behind each read, as a copy is hidden before it is wiped: then ``copies``, as they were before it, are others.
        """
        count = cast("App", self._app).replicas.partition_counts.get(self._changelog, 0)
        if self.copies is not copies or len(copies.keys() | self.partitions.keys()) < count:
            raise _hopeless(TransactionAborted(f"a copy of {self._table} is being made anew"))

    def _scan_committed(self) -> Iterator[tuple[bytes, bytes]]:
        for store in self._stores():
            yield from store.items()

    def _new_overlay(self, tp: TP, below: Overlay | None) -> Overlay:
        store = self.partitions.get(tp.partition)
        if store is None:
            raise ImproperlyConfigured(
                f"table {self._table} has no partition {tp.partition} here, for an event of {tp.topic}: "
                f"{tp.topic} and {self._changelog} must have the same number of partitions"
            )
        if self._app.started:
            self._check_partitions(tp.topic)
        return Overlay(store, self._changelog, below)

    def _check_partitions(self, topic: str) -> None:
        app = cast("App", self._app)
        counts = app.partitions_of(topic), app.partitions_of(self._changelog)
        if counts[0] and counts[0] != counts[1]:
            raise ImproperlyConfigured(
                f"{topic} has {counts[0]} partitions, and {self._changelog}, the changelog of table {self._table}, has "
                f"{counts[1]}: with the same number of partitions a key lies in one place"
            )


def _in_hand() -> Event:
    event = in_hand.get()
    assert event is not None
    return event


def _hopeless(error: StoreCorrupted | StoreFailed | TransactionAborted) -> DeadBatchError:
    """What is the fault of the disk, or of nobody, is not the event's: else it would be set aside."""
    batch = current_batch()
    assert batch is not None
    return batch.hopeless(error)


class WindowedData(TableData):
    """The data of a windowed table: rows by ``(key, window range)``, stamped by the table's time relation."""

    def __init__(self, table: Table, window: TimeWindow) -> None:
        super().__init__(table)
        self._window = window
        self._rows = WindowKeys(window, self._keys)
        self._keys = Codec(self._rows.encode, self._rows.decode)
        self._tell = table.tell_closed if table.tells_closed else None
        #: By the id of its store; for the stores of one start of partitions.
        self._open: dict[int, OpenWindows] = {}
        self._open_of: object = None

    def key_bytes(self, key: Any) -> bytes:
        """The key, without a window, as it is stored."""
        return self._rows.own_bytes(key)

    def set(self, key: Any, value: Any) -> None:
        """Refused; see `write`."""
        raise TypeError(
            f"table {self._table} has windows, and {key!r} says nothing of the event's time; write what its tumbling() or "
            "hopping() gave"
        )

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        if self._skip:
            # The row's time may have been the newest, and a restore knows the time by the rows that are left.
            overlay = self._own_overlay()
            overlay.writes[CLOCK_ROW] = overlay.time(0) + CLOCK_ROW

    def write(self, rows: Rows, timestamp: float) -> None:
        """Set all ``rows``, for an event of ``timestamp`` (seconds since 1970), or none of them.

        Raises:
            ValueError: one of the windows is closed, or too far ahead, or a row is too large.
        """
        overlay, time_ms = self._own_overlay(), to_ms(timestamp)
        writes = {}
        for (key, window), value in rows:
            start_ms = self._window.start_ms(window)
            self._window.check_writable(self._table, start_ms, time_ms, overlay.clock_ms)
            row_key, stored = self._rows.row_key(key, start_ms), self._values.encode(value)
            check_size(self._changelog, row_key, stored)
            writes[row_key] = stored
        opened = None if self._tell is None else self._open_windows(overlay)
        stamp = overlay.time(time_ms) if self._skip else b""
        for row_key, stored in writes.items():
            overlay.writes[row_key] = stamp + stored
            if opened is not None:
                opened.add(row_key)
        if opened is not None:
            self._close(overlay, opened)

    def _open_windows(self, overlay: Overlay) -> OpenWindows:
        """Those of the overlay's store, which may have changed hands between two starts of partitions."""
        if self._open_of is not self.partitions:
            self._open, self._open_of = {}, self.partitions
        opened = self._open.get(id(overlay.store))
        if opened is None:
            try:
                opened = OpenWindows.of(overlay, self._rows.are_in, self._rows.end_ms)
            except (StoreCorrupted, StoreFailed) as error:
                raise _hopeless(error) from error
            self._open[id(overlay.store)] = opened
        return opened

    def _close(self, overlay: Overlay, opened: OpenWindows) -> None:
        """Tell of the windows that the last write has closed."""
        assert self._window.expires_ms is not None

        def tell(row_key: bytes, stored: bytes) -> None:
            assert self._tell is not None
            # The newest time is that of the row that was written just now, not of this one.
            overlay.writes[row_key] = None
            try:
                self._tell(self._rows.decode(row_key), self._values.decode(stored[self._skip :]))
            except BaseException:
                overlay.writes[row_key] = stored
                raise

        try:
            opened.close(overlay, self._window.expires_ms, tell)
        except (StoreCorrupted, StoreFailed) as error:
            raise _hopeless(error) from error

    def newest_ms(self) -> int:
        """The record time of the event's partition, as its batch sees it; 0 before the first."""
        overlay = self._overlay()
        if overlay is None:
            raise RuntimeError(
                "outside of the table's own agents there is no event, whose partition's newest time this is"
            )
        return overlay.clock_ms

    def keys_of_windows(self) -> Iterator[Any]:
        """Each key that has a row, once."""
        return map(self._rows.own_key, dict.fromkeys(key[:-WINDOW_BYTES] for key, _ in self._scan()))

    def _scan(self) -> Iterator[tuple[bytes, bytes]]:
        return (row for row in super()._scan() if self._rows.are_in(row[0]))


class Table(HostTable):
    """`faust.Table`, transactional; see the module.

    ``expires_s``: a key that was not written for that long, of its partition's record time, is deleted, inside the
    transaction of a later batch. Record time is the largest timestamp among the events that wrote to the partition, and
    never ahead of the clock of this machine; so where several topics write one table, the one that is ahead decides.

    ``everywhere`` makes it a global table: agents of every worker read all of its partitions, those of others a moment after
    they were committed. A write goes to the partition of the event, as it does in any table; so a key belongs to the
    partition whose events write it.

    ``tumbling`` and ``hopping`` make it a windowed table: see `streams_app.windows`. Its record time is that of its time
    relation, and ``expires_s`` follows from the ``expires`` of the windows.
    """

    WindowWrapper: ClassVar[Any] = WindowedTable
    window: TimeWindow | None

    def __init__(
        self, app: faust.App, *, expires_s: float | None = None, everywhere: bool = False, **kwargs: Any
    ) -> None:
        check_table_options(kwargs)
        # A copy: Faust writes the serializers of a changelog into its schema, which topics may have, too.
        schema = kwargs["schema"] = copy(kwargs.get("schema"))
        for name in ("key_type", "value_type"):
            kwargs[name] = kwargs.get(name) or getattr(schema, name, None)
        super().__init__(app, **kwargs)
        for name in ("key_serializer", "value_serializer"):
            setattr(self, name, getattr(schema, name, None) or getattr(self, name))
        self.expires_s = expires_s
        self.is_everywhere = everywhere
        #: Whether this process follows the partitions that it does not hold.
        self.is_followed = everywhere
        self._view: TableData | None = None

    @property
    def expires_ms(self) -> int | None:
        """`expires_s` in milliseconds."""
        return None if self.expires_s is None else int(self.expires_s * 1000)

    @property
    def data(self) -> TableData:  # type: ignore[override]
        """The stores behind the table."""
        if self._view is None:
            self._view = self._new_data()
        return self._view

    def _new_data(self) -> TableData:
        return TableData(self) if self.window is None else WindowedData(self, self.window)

    async def on_start(self) -> None:
        """Make sure that the changelog topic exists; the engine opens the stores."""
        if self.tells_closed and self.window is None:
            raise ImproperlyConfigured(f"table {self.name} has on_window_close, and no windows; give it tumbling()")
        await self.changelog_topic.maybe_declare()

    def tell_closed(self, key: Any, value: Any) -> None:
        """Call ``on_window_close``; see `streams_app.closing`."""
        run_at_once(self.name, self.on_window_close(key, value))

    def __getitem__(self, key: Any) -> Any:
        view = self.data if self._view is None else self._view
        value = view.get(key, _MISSING)
        return self.__missing__(key) if value is _MISSING else value

    def __setitem__(self, key: Any, value: Any) -> None:
        view = self.data if self._view is None else self._view
        view.set(key, value)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        return self.data.get(key, default)

    def committed(self, key: Any, *, of: bytes | None = None) -> Any:
        """The committed value of ``key``, or None, for views of any process: where another one has it, from a copy.

        ``of`` is the key of the events that write it, which tells its partition, where that is not ``key`` itself.

        Raises:
            NotHere: a copy is being made, or the partition is on its way between two workers.
        """
        app, data = cast("App", self.app), self.data
        count = app.partitions_of(self.changelog_topic_name)
        try:
            if count is not None:
                return data.committed(key, partition_of(data.key_bytes(key) if of is None else of, count))
        except KeyError:
            app.follow(self)
        raise NotHere(f"this process has no copy of that part of the table {self.name} yet; ask again soon")

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

    def using_window(self, window: Any, *, key_index: bool = False) -> WindowedTable:
        """Give the table windows; ``key_index`` changes nothing, see `WindowedTable`.

        Raises:
            ImproperlyConfigured: the table has windows or an expiry already, or cannot have these.
        """
        if self.window is not None:
            raise ImproperlyConfigured(f"table {self.name} has windows already; declare another table for others")
        if self.expires_s is not None:
            raise ImproperlyConfigured(f"table {self.name}: expires_s is for tables without windows; give them expires")
        self.window = TimeWindow.of(self.name, window)
        self.expires_s = self.window.kept_s
        if self.tells_closed and cast("App", self.app).guarantee == "at_most_once":
            raise ImproperlyConfigured(
                f"table {self.name}: at most once there is no on_window_close: what it has sent, and the deletion of the "
                "window, are in no transaction, so that after a crash it might send it again"
            )
        if self.tells_closed and self.expires_s is None:
            raise ImproperlyConfigured(
                f"table {self.name}: on_window_close needs expires; without, no window ever closes"
            )
        self._view = None
        # The changelog stays compacted only. Faust would let the broker delete what is older than `expires` by the clock:
        # with a backlog of old events, rows that are needed.
        return cast(WindowedTable, self.WindowWrapper(self))

    def write_windows(self, rows: Rows, timestamp: float) -> None:
        """Set rows; see `WindowedData.write`."""
        cast(WindowedData, self.data).write(rows, timestamp)

    def newest_ms(self) -> int:
        """See `WindowedTable.newest`."""
        if self.expires_s is None:
            raise ImproperlyConfigured(f"table {self.name}: without expires, its windows have no record time to give")
        return cast(WindowedData, self.data).newest_ms()

    def window_keys(self) -> Iterator[Any]:
        """Each key that has a row in some window, once."""
        return cast(WindowedData, self.data).keys_of_windows()
