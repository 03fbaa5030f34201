"""Windowed tables: what Faust's ``tumbling`` and ``hopping`` give, with rows that commit with their events.

A windowed table keeps one row for each key and window. A row's key is

    the key's bytes as the table encodes it, then start and end of the window (each 8 bytes, signed, big endian)

with times in milliseconds since 1970, the end exclusive. The last 16 bytes are the window whatever the key holds, so no two
windows share a row. The end is there so that after a change of the window's size old rows are not taken for new ones.
`split_window_key` takes a row's key apart.

**Which windows.** An event counts in every window that has its time within it. That time is the table's *time relation*: a
field of the event (``relative_to_field``), the timestamp of its Kafka record (``relative_to_stream``, and the default), or
this machine's clock (``relative_to_now``).

**Expiry.** A window with ``expires`` stays open until the newest time that was written to its partition (`newest`) is
``expires`` behind its end. From then on it is closed: a write to it raises ValueError, as its row may be gone, and a count
that begins again at nothing would be wrong without anybody noticing. Closed rows are deleted as those of any table that
expires: inside the transaction of a later batch. Every row is stamped with its partition's record time (`Overlay.time`), and
a row lives for `TimeWindow.kept_s` from its last write on. That is never too short for a window that is open. Of a row that
was written, ``stamp >= start - AHEAD_S``, as a write further ahead of its stamp is refused; and while its window is open

    newest < end + expires = start + size + expires <= stamp + AHEAD_S + size + expires = stamp + kept_s

**Record time.** It is the newest time by the time relation, but never ahead of this machine's clock (see `Overlay.time`).
It survives restarts and the loss of the disk, as it is the timestamp of changelog records. Where a row is deleted by hand,
its time may go with it: `CLOCK_ROW`, a row that belongs to no window, then keeps it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from faust.exceptions import ImproperlyConfigured
from faust.tables import wrappers
from faust.types import EventT, FieldDescriptorT
from faust.types.tables import WindowSetT
from faust.types.windows import WindowRange, WindowT
from faust.windows import HoppingWindow
from mode import want_seconds

from streams_app.codecs import Codec
from streams_app.events import current_event

if TYPE_CHECKING:
    from streams_app.table import Table

#: How far ahead of the record time a window may begin that is written: an event may be dated an hour ahead of its record,
#: and brokers take records that are dated an hour ahead of their clocks.
AHEAD_S = 2 * 60 * 60.0
#: Key of the row that keeps the record time; shorter than that of any window.
CLOCK_ROW = b"clock"

_AHEAD_MS = int(AHEAD_S * 1000)
_BOUNDS = struct.Struct(">qq")
#: The window at the end of a row's key.
WINDOW_BYTES = _BOUNDS.size
#: Faust's window ranges end this much before the next one begins.
_RANGE_GAP_S = 0.1
#: The years 1 to 9999.
_EARLIEST_S, _LATEST_S = -62_135_596_800, 253_402_300_800


def split_window_key(row_key: bytes) -> tuple[bytes, float]:
    """The key's bytes, and the start of the window in seconds since 1970, of a row of a windowed table.

    Raises:
        ValueError: the row is `CLOCK_ROW`, or not one of a windowed table.
    """
    if len(row_key) < WINDOW_BYTES:
        raise ValueError(f"{row_key!r} is not the key of a window's row")
    start_ms, _ = _BOUNDS.unpack(row_key[-WINDOW_BYTES:])
    return row_key[:-WINDOW_BYTES], start_ms / 1000


def to_seconds(moment: Any) -> float:
    """A time as seconds since 1970: of a datetime or ISO 8601 text (without a zone: UTC), or of such seconds.

    Raises:
        ValueError: it is none, or not within the years 1 to 9999.
    """
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(moment, (int, float)) and _EARLIEST_S <= moment < _LATEST_S:
        return float(moment)
    raise ValueError(f"{moment!r} is no time: a datetime, ISO 8601 text, or seconds since 1970 are")


def to_ms(seconds: float) -> int:
    """Whole milliseconds, rounded down: the last that is not after it, as 1.001 * 1000 is less than 1001."""
    nearest_ms = round(seconds * 1000)
    return nearest_ms if nearest_ms / 1000 <= seconds else nearest_ms - 1


def _text(time_ms: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)).isoformat(timespec="milliseconds")


class TimeWindow(WindowT):
    """Windows of one size that begin every ``step``; Faust's tumbling and hopping windows, in whole milliseconds.

    Faust's own lose fractions of a second and count an event in windows it is not in, or fail.
    """

    def __init__(self, size: float, step: float, expires: float | None) -> None:
        self.size, self.step, self.expires = size, step, expires
        self.size_ms, self.step_ms = to_ms(size), to_ms(step)
        self.expires_ms = None if expires is None else to_ms(expires)

    @classmethod
    def of(cls, table: str, window: WindowT) -> TimeWindow:
        """Faust's ``window``, for ``table``.

        Raises:
            ImproperlyConfigured: such a window is not supported.
        """
        if not isinstance(window, HoppingWindow):
            raise ImproperlyConfigured(
                f"table {table}: {type(window).__name__} is not supported yet; use tumbling() or hopping()"
            )
        size, step, expires = (float(want_seconds(each or 0.0)) for each in (window.size, window.step, window.expires))
        for name, value in ("size", size), ("step", step), ("expires", expires):
            if value < 0 or (value == 0 and name != "expires") or to_ms(value) / 1000 != value:
                raise ImproperlyConfigured(
                    f"table {table}: {name}={value:g} s of its window is not a positive number of whole milliseconds"
                )
        if step > size:
            raise ImproperlyConfigured(
                f"table {table}: its windows of {size:g} s begin every {step:g} s; what happens between two of them would "
                "count in none"
            )
        return cls(size, step, expires or None)

    @property
    def kept_s(self) -> float | None:
        """How long a row lives after its last write, of its partition's record time; see the module."""
        return None if self.expires is None else self.expires + self.size + AHEAD_S

    def starts_ms(self, time_ms: int) -> range:
        """Where the windows begin that have ``time_ms`` within them; at least one."""
        latest_ms = time_ms // self.step_ms * self.step_ms
        return range(latest_ms - self.size_ms + self.step_ms, time_ms + 1, self.step_ms)

    def ranges(self, timestamp: float) -> list[WindowRange]:
        """All windows that have ``timestamp`` (seconds since 1970) within them, oldest first, as Faust writes them."""
        return [self.range_of(start_ms) for start_ms in self.starts_ms(to_ms(timestamp))]

    def current(self, timestamp: float) -> WindowRange:
        """Of these the last."""
        return self.range_of(self.starts_ms(to_ms(timestamp))[-1])

    def earliest(self, timestamp: float) -> WindowRange:
        """Of these the first."""
        return self.range_of(self.starts_ms(to_ms(timestamp))[0])

    def delta(self, timestamp: float, d: Any) -> WindowRange:
        """The `current` window of ``d`` ago."""
        return self.current(timestamp - want_seconds(d))

    def stale(self, timestamp: float, latest_timestamp: float) -> bool:
        """Whether a window that ends at ``timestamp`` is closed."""
        return self.is_closed(to_ms(timestamp), to_ms(latest_timestamp))

    def is_closed(self, end_ms: int, newest_ms: int) -> bool:
        """Whether a window that ends at ``end_ms`` is closed when the partition's record time is ``newest_ms``."""
        return self.expires_ms is not None and end_ms <= newest_ms - self.expires_ms

    def range_of(self, start_ms: int) -> WindowRange:
        """The window that begins at ``start_ms``, as Faust writes it: its end lies a tenth of a second within it."""
        start_s = start_ms / 1000
        return start_s, start_s + self.size - _RANGE_GAP_S

    def start_ms(self, window: WindowRange) -> int:
        """Where a window range begins.

        Raises:
            ValueError: it is none of these windows.
        """
        start_ms = to_ms(window[0])
        before_end_s = round(window[0] + self.size - window[1], 3)
        if self.starts_ms(start_ms)[-1] != start_ms or not 0 <= before_end_s <= _RANGE_GAP_S:
            raise ValueError(f"{window} is none of the windows of {self.size:g} s that begin every {self.step:g} s")
        return start_ms

    def check_writable(self, table: str, start_ms: int, time_ms: int, newest_ms: int) -> None:
        """Raise ValueError unless an event of ``time_ms`` may write the window that begins at ``start_ms``.

        Not if the window is closed, nor if the row's stamp would be so far behind that it might expire too early; see the
        module.
        """
        end_ms = start_ms + self.size_ms
        if self.is_closed(end_ms, newest_ms):
            raise ValueError(
                f"table {table}: the window up to {_text(end_ms)} is closed, as the newest time of its partition is "
                f"{_text(newest_ms)}; compare an event's time with newest(), and set aside what is late"
            )
        if self.expires_ms is not None and start_ms - _AHEAD_MS > max(newest_ms, min(time_ms, int(time.time() * 1000))):
            raise ValueError(
                f"table {table}: the window from {_text(start_ms)} on begins more than {AHEAD_S / 3600:g} hours ahead of the "
                "clock; set aside what comes from the future"
            )


class WindowKeys:
    """Keys of a windowed table's rows: ``(key, window range)`` to bytes and back."""

    def __init__(self, window: TimeWindow, keys: Codec) -> None:
        self._window = window
        self._keys = keys

    def encode(self, key: Any) -> bytes:
        """The row's key of ``(key, window range)``."""
        own, window = key
        return self.row_key(own, self._window.start_ms(window))

    def row_key(self, key: Any, start_ms: int) -> bytes:
        """The row's key of ``key`` in the window that begins at ``start_ms``."""
        return self.own_bytes(key) + _BOUNDS.pack(start_ms, start_ms + self._window.size_ms)

    def decode(self, row_key: bytes) -> tuple[Any, WindowRange]:
        """The inverse of `encode`."""
        start_ms, _ = _BOUNDS.unpack(row_key[-WINDOW_BYTES:])
        return self.own_key(row_key[:-WINDOW_BYTES]), self._window.range_of(start_ms)

    def end_ms(self, row_key: bytes) -> int:
        """Where the window of a row ends, exclusive."""
        end_ms: int = _BOUNDS.unpack(row_key[-WINDOW_BYTES:])[1]
        return end_ms

    def own_bytes(self, key: Any) -> bytes:
        """The bytes of a key without window."""
        return self._keys.encode(key)

    def own_key(self, key: bytes) -> Any:
        """The key without window."""
        return self._keys.decode(key)

    def are_in(self, row_key: bytes) -> bool:
        """Whether the row is one of these windows: not `CLOCK_ROW`, nor a window of another size."""
        if len(row_key) < WINDOW_BYTES:
            return False
        start_ms, end_ms = _BOUNDS.unpack(row_key[-WINDOW_BYTES:])
        return bool(end_ms - start_ms == self._window.size_ms and self._window.starts_ms(start_ms)[-1] == start_ms)


class WindowSet(wrappers.WindowSet[Any, Any]):
    """The windows of one key, as ``table[key]`` gives them."""

    def __setitem__(self, window: Any, value: Any) -> None:
        if isinstance(window, EventT):
            super().__setitem__(window, value)
        table, wrapper = cast("Table", self.table), cast(WindowedTable, self.wrapper)
        table.write_windows([((self.key, window), value)], wrapper.get_timestamp(self.event))


class WindowedTable(wrappers.WindowWrapper):
    """What ``tumbling`` and ``hopping`` give: Faust's wrapper, over a table of ours.

    ``table[key] += 1`` writes all windows of the event's time, ``table[key].value()`` reads the one that began last.
    Iteration, ``len``, ``keys``, ``items`` and ``values`` need no ``key_index``: the rows tell which keys there are.
    """

    ValueType = WindowSet

    def newest(self) -> datetime | None:
        """The newest time that was written to the partition of the event in hand, as its batch sees it.

        None before the first. An event that is older by more than ``expires`` comes late. Of a time ahead of this machine's
        clock only the clock counts: one view dated to next year would close all windows.

        Raises:
            RuntimeError: there is no event in hand.
            ImproperlyConfigured: the windows have no ``expires``, and no record time either.
        """
        newest_ms = cast("Table", self.table).newest_ms()
        return datetime.fromtimestamp(newest_ms / 1000, UTC) if newest_ms else None

    def relative_to_field(self, field: Any) -> WindowedTable:
        """Take the time from the event: a field of its value (``PageView.at``), or what a callable makes of the event.

        The time may be a datetime or ISO 8601 text (without a zone: UTC), or seconds since 1970.
        """
        return cast(WindowedTable, self.clone(relative_to=_reader(field)))

    def get_timestamp(self, event: EventT[Any] | None = None) -> float:
        """The time of an event, by default of the one in hand, by the table's time relation; seconds since 1970."""
        event = event or current_event()
        relation = self.get_relative_timestamp
        if relation is not None:
            return to_seconds(relation(event))
        return cast("Table", self.table).stream_time(event)

    def __getitem__(self, key: Any) -> WindowSetT[Any, Any]:
        return self.ValueType(key, self.table, self, current_event())

    def __len__(self) -> int:
        return sum(1 for _ in self._keys())

    def _keys(self) -> Iterator[Any]:
        return cast("Table", self.table).window_keys()


def _reader(field: Any) -> Callable[[EventT[Any] | None], Any]:
    """What reads a time from an event, whose ``field`` is Faust's or Python's descriptor, or a callable."""
    read: Callable[[EventT[Any]], Any]
    if isinstance(field, FieldDescriptorT):
        read = lambda event: field.getattr(cast(Any, event.value))  # noqa: E731 - three forms of one function
    elif callable(field):
        read = field
    elif hasattr(field, "__get__"):
        read = lambda event: field.__get__(event.value)  # noqa: E731
    else:
        raise ImproperlyConfigured(
            f"relative_to_field({field!r}): a field such as PageView.at, or a callable, is needed"
        )

    def relation(event: EventT[Any] | None) -> Any:
        if event is None:
            raise RuntimeError(
                "outside of an agent there is no event to take the time from; use relative_to_now() there"
            )
        return read(event)

    return relation
