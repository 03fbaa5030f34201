"""Tables of sets: ``tags[article].add("news")``.

A set is one row, written whole when it changes; one that is empty is no row at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSet
from types import GenericAlias
from typing import Any

from faust.exceptions import ImproperlyConfigured

from streams_app.codecs import Codec, struct_codec
from streams_app.table import Table, TableData


class KeptSet(MutableSet[Any]):
    """The set of one key: reads and writes go to the table at once."""

    __slots__ = ("_key", "_table")

    def __init__(self, table: SetTable, key: Any) -> None:
        self._table = table
        self._key = key

    def __contains__(self, element: object) -> bool:
        return element in self._elements()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._elements())

    def __len__(self) -> int:
        return len(self._elements())

    def __repr__(self) -> str:
        return repr(self._elements())

    def add(self, element: Any) -> None:
        """Add one element; nothing is written if it is there."""
        self.update((element,))

    def discard(self, element: Any) -> None:
        """Remove one element, if it is there."""
        self.difference_update((element,))

    def clear(self) -> None:
        """Remove all elements."""
        self._become(set())

    def update(self, *others: Iterable[Any]) -> None:
        """Add all elements of ``others``."""
        self._become(self._elements().union(*others))

    def difference_update(self, *others: Iterable[Any]) -> None:
        """Remove all elements of ``others``."""
        self._become(self._elements().difference(*others))

    def intersection_update(self, *others: Iterable[Any]) -> None:
        """Keep what all ``others`` have, too."""
        self._become(self._elements().intersection(*others))

    def symmetric_difference_update(self, other: Iterable[Any]) -> None:
        """Keep what is either here or in ``other``."""
        self._become(self._elements().symmetric_difference(other))

    def union(self, *others: Iterable[Any]) -> set[Any]:
        """A new set."""
        return self._elements().union(*others)

    def intersection(self, *others: Iterable[Any]) -> set[Any]:
        """A new set."""
        return self._elements().intersection(*others)

    def difference(self, *others: Iterable[Any]) -> set[Any]:
        """A new set."""
        return self._elements().difference(*others)

    def copy(self) -> set[Any]:
        """A new set, which the table knows nothing of."""
        return self._elements()

    @classmethod
    def _from_iterable(cls, elements: Iterable[Any]) -> Any:
        # What operators such as ``|`` make is no set of the table's.
        return set(elements)

    def _elements(self) -> set[Any]:
        found: set[Any] = self._table.get(self._key) or set()
        return found

    def _become(self, elements: set[Any]) -> None:
        before = self._elements()
        if elements == before:
            return
        if elements:
            self._table[self._key] = elements
        else:
            del self._table[self._key]


class SetData(TableData):
    """Rows of elements, as JSON."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        rows = struct_codec(GenericAlias(list, (table.value_type or Any,)))
        self._values = Codec(lambda elements: rows.encode([*elements]), lambda data: set(rows.decode(data)))


class SetTable(Table):
    """`faust.SetTable`, transactional; ``value_type`` is that of the elements: text, a number, or a frozen struct."""

    def __init__(self, *args: Any, start_manager: bool = False, **kwargs: Any) -> None:
        if start_manager:
            raise ImproperlyConfigured(
                f"table {kwargs.get('name')}: start_manager lets others change sets from outside of their events, which no "
                "guarantee covers; send an event to an agent that changes them"
            )
        super().__init__(*args, **kwargs)

    def _new_data(self) -> TableData:
        return SetData(self)

    def __getitem__(self, key: Any) -> KeptSet:
        return KeptSet(self, key)

    def using_window(self, window: Any, *, key_index: bool = False) -> Any:
        """Refused."""
        raise ImproperlyConfigured(f"table {self.name}: sets have no windows; use a Table of lists with windows")
