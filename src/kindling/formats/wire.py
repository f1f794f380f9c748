"""Protocol buffers without a schema: one message at a time, bounded, nothing copied that is not read.

A reader of a format knows the numbers of the fields it wants; everything else is stepped over.
Source: the encoding page of the Protocol Buffers documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kindling.errors import FormatError

MAX_FIELDS = 2_000_000
MAX_DEPTH = 64


@dataclass(slots=True)
class Budget:
    """How many fields may still be read, of all messages of a file together."""

    what: str
    fields: int = MAX_FIELDS

    def spend(self) -> None:
        self.fields -= 1
        if self.fields < 0:
            raise FormatError(f"{self.what} has more than {MAX_FIELDS:,} fields, which are refused.")


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
        at = 0
        while at < len(data):
            budget.spend()
            key, at = _varint(data, at, budget.what)
            number, kind = key >> 3, key & 7
            value: int | memoryview
            if kind == 0:
                value, at = _varint(data, at, budget.what)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
                value, at = data[at : at + size], at + size
            elif kind == 2:
                size, at = _varint(data, at, budget.what)
                value, at = data[at : at + size], at + size
            else:
                raise FormatError(f"{budget.what} is damaged: a field of wire type {kind} is in it.")
            if at > len(data) or number == 0:
                raise FormatError(f"{budget.what} is cut off or damaged. Fetch it again.")
            self._fields.setdefault(number, []).append(value)

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
                one, at = _varint(value, at, self.what)
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


def fields(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the fields of one message are: number, begin of the tag, begin and end of the content.

    Raises: FormatError, when the bytes are no message.

    >>> list(fields(memoryview(bytes([8, 150, 1, 18, 2, 104, 105])), 0, 7))
    [(1, 0, 1, 3), (2, 3, 5, 7)]
    """
    at = start
    while at < stop:
        begin = at
        key, at = _varint(data[:stop], at, "the message")
        body = at
        if key & 7 == 0:
            _, at = _varint(data[:stop], at, "the message")
        elif key & 7 == 2:
            size, body = _varint(data[:stop], at, "the message")
            at = body + size
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise FormatError(f"the message is damaged: a field of wire type {key & 7} is in it.")
        if at > stop or not key >> 3:
            raise FormatError("the message is cut off or damaged.")
        yield key >> 3, begin, body, at


def _varint(data: memoryview, at: int, what: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise FormatError(f"{what} is cut off or damaged. Fetch it again.")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
        shift += 7
