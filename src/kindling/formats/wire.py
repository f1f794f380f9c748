"""Protocol buffers in binary: the walk over fields that every reader of them shares, and messages without a schema.

Nothing is believed: every length is checked against what is left, the fields of a file are counted, and nothing is
copied that is not read. A reader of a format knows the numbers of the fields it wants; everything else is stepped over.
Source: the encoding page of the Protocol Buffers documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kindling.errors import FormatError

MAX_FIELDS = 2_000_000
MAX_DEPTH = 64
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""
_WIDTHS = {FIXED64: 8, FIXED32: 4}


@dataclass(slots=True)
class Budget:
    """How many fields may still be read, of all messages of a file together; and what to call the file."""

    what: str
    fields: int = MAX_FIELDS

    def spend(self, count: int = 1) -> None:
        self.fields -= count
        if self.fields < 0:
            raise FormatError(f"{self.what} has more than {MAX_FIELDS:,} fields, which are refused.")

    def damaged(self, at: int, why: str) -> FormatError:
        """The error of a message that is none."""
        return FormatError(f"{self.what} is damaged: {why} at byte {at:,}. Is the file whole?")


def varint(data: memoryview, at: int, end: int, budget: Budget) -> tuple[int, int]:
    """A whole number and where it ends; negative ones as two's complement of 64 bits.

    Raises: FormatError.
    """
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            why = "a number is cut short" if at >= end else "a number has more than 10 bytes"
            raise budget.damaged(at, why)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7


def fields(data: memoryview, at: int, end: int, budget: Budget) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, wire type, value of a varint, begin, end) of every field; begin and end are those of its value.

    Raises: FormatError, when the bytes from `at` to `end` are no message.

    >>> list(fields(memoryview(bytes([8, 150, 1, 18, 2, 104, 105])), 0, 7, Budget("x.model")))
    [(1, 0, 150, 1, 3), (2, 2, 0, 5, 7)]
    """
    while at < end:
        budget.spend()
        start = at
        tag, at = varint(data, at, end, budget)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise budget.damaged(start, f"field number {number} is none")
        value, begin = 0, at
        if kind == VARINT:
            value, at = varint(data, at, end, budget)
        elif kind == BYTES:
            length, begin = varint(data, at, end, budget)
            at = begin + length
        elif kind in _WIDTHS:
            at += _WIDTHS[kind]
        else:
            raise budget.damaged(start, f"a field of wire type {kind} is in it")
        if at > end:
            raise budget.damaged(start, f"a field of {at - begin:,} bytes does not fit into the {end - begin:,} left")
        yield number, kind, value, begin, at


class Message:
    """The fields of one message by number, in order; of nested ones only the bytes.

    >>> message = Message(memoryview(bytes([8, 150, 1, 18, 2, 104, 105])), Budget("x.model"))
    >>> message.whole(1), message.text(2), message.whole(3), message.text(3)
    (150, 'hi', 0, '')
    """

    def __init__(self, data: memoryview, budget: Budget, depth: int = 0) -> None:
        """
        Raises: FormatError, when the bytes are no message.
        """
        if depth > MAX_DEPTH:
            raise FormatError(f"{budget.what} nests messages deeper than {MAX_DEPTH}, which is refused.")
        self._budget, self._depth = budget, depth
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, kind, value, begin, stop in fields(data, 0, len(data), budget):
            self._fields.setdefault(number, []).append(value if kind == VARINT else data[begin:stop])

    @property
    def what(self) -> str:
        return self._budget.what

    def has(self, number: int) -> bool:
        return number in self._fields

    def _of(self, number: int, kind: type) -> list[int | memoryview]:
        found = self._fields.get(number, [])
        if not all(isinstance(value, kind) for value in found):
            raise FormatError(f"{self.what} is damaged: field {number} is not of the type it should be.")
        return found

    def whole(self, number: int) -> int:
        """A whole number, the last one given; 0 where there is none; negative ones as two's complement of 64 bits."""
        found = self._of(number, int)
        value = found[-1] if found else 0
        assert isinstance(value, int)
        return value - (1 << 64) if value >> 63 else value

    def bytes(self, number: int) -> memoryview:
        """A field of bytes, the last one given; none where there is none."""
        found = self._of(number, memoryview)
        value = found[-1] if found else memoryview(b"")
        assert isinstance(value, memoryview)
        return value

    def text(self, number: int) -> str:
        try:
            return str(self.bytes(number), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.what} is damaged: field {number} is no text.") from error

    def texts(self, number: int) -> list[str]:
        try:
            return [str(value, "utf-8") for value in self._of(number, memoryview)]  # type: ignore[arg-type]
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.what} is damaged: field {number} is no text.") from error

    def message(self, number: int) -> Message:
        return Message(self.bytes(number), self._budget, self._depth + 1)

    def messages(self, number: int) -> list[Message]:
        return [Message(value, self._budget, self._depth + 1) for value in self._of(number, memoryview)]  # type: ignore[arg-type]

    def wholes(self, number: int) -> list[int]:
        """Repeated whole numbers, packed or one by one."""
        found: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                self._budget.spend()
                one, at = varint(value, at, len(value), self._budget)
                found.append(one)
        return [value - (1 << 64) if value >> 63 else value for value in found]

    def floats(self, number: int, dtype: str) -> np.ndarray:
        """Repeated `"<f4"` or `"<f8"`, packed or one by one; without a copy where they are in one piece."""
        parts = self._of(number, memoryview)
        size = np.dtype(dtype).itemsize
        if any(len(part) % size for part in parts):  # type: ignore[arg-type]
            raise FormatError(f"{self.what} is damaged: field {number} does not hold whole {dtype} numbers.")
        if len(parts) == 1:
            return np.frombuffer(parts[0], dtype)  # type: ignore[arg-type]
        return np.frombuffer(b"".join(parts), dtype)  # type: ignore[arg-type]
