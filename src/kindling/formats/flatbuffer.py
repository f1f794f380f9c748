"""FlatBuffers without a schema: tables and vectors at bounded places of a buffer, nothing copied that is not read.

A reader of a format knows the numbers of the fields it wants. Source: the FlatBuffers documentation, "Internals".
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from kindling.errors import FormatError

MAX_READS = 5_000_000


class Buffer:
    """The bytes of a file, and how many tables and vectors may still be opened."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.data, self.what, self._left = memoryview(data), what, MAX_READS

    def number(self, kind: str, at: int) -> Any:
        """One number at a place; `kind` is of `struct`."""
        size = struct.calcsize(kind)
        self._left -= 1
        if at < 0 or at + size > len(self.data) or self._left < 0:
            raise self.damaged()
        return struct.unpack_from(f"<{kind}", self.data, at)[0]

    def damaged(self) -> FormatError:
        return FormatError(f"{self.what} is cut off or damaged. Fetch it again.")

    def root(self) -> Table:
        """The outermost table."""
        return Table(self, self.number("I", 0))


class Table:
    """Fields by number; those that are not there have their default."""

    def __init__(self, buffer: Buffer, at: int) -> None:
        """
        Raises: FormatError, when there is no table at the place.
        """
        self._buffer, self._at = buffer, at
        self._fields = at - buffer.number("i", at)
        self._size = buffer.number("H", self._fields)

    def _place(self, field: int) -> int:
        """Where a field is; 0 where it is not there."""
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return 0
        offset = self._buffer.number("H", self._fields + entry)
        return self._at + offset if offset else 0

    def number(self, field: int, kind: str = "i", default: Any = 0) -> Any:
        place = self._place(field)
        return self._buffer.number(kind, place) if place else default

    def _target(self, field: int) -> int:
        place = self._place(field)
        return place + self._buffer.number("I", place) if place else 0

    def table(self, field: int) -> Table | None:
        place = self._target(field)
        return Table(self._buffer, place) if place else None

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        """Where the items begin, and how many there are."""
        place = self._target(field)
        if not place:
            return 0, 0
        count = self._buffer.number("I", place)
        if place + 4 + count * size > len(self._buffer.data):
            raise self._buffer.damaged()
        return place + 4, count

    def numbers(self, field: int, dtype: str) -> np.ndarray:
        """A vector of numbers, without a copy."""
        kind = np.dtype(dtype).newbyteorder("<")
        start, count = self._vector(field, kind.itemsize)
        return np.frombuffer(self._buffer.data[start : start + count * kind.itemsize], kind)

    def tables(self, field: int) -> list[Table]:
        """A vector of tables."""
        start, count = self._vector(field, 4)
        places = [start + 4 * place for place in range(count)]
        return [Table(self._buffer, place + self._buffer.number("I", place)) for place in places]

    def text(self, field: int) -> str:
        start, count = self._vector(field, 1)
        return bytes(self._buffer.data[start : start + count]).decode("utf-8", "replace")
