"""Reader of arrays as ND4J writes them: a shape buffer and a data buffer, big-endian, each with a text header.

Source: `Nd4j.write`, `BaseDataBuffer.write` and `CompressedDataBuffer.write` of nd4j 0.8 to 1.0. Buffers of the old
allocation modes (HEAP, DIRECT, JAVACPP) give their length as int32, later ones (LONG_SHAPE, MIXED_DATA_TYPES) as int64.
"""

from __future__ import annotations

import math
import struct
from typing import Protocol

import numpy as np

from kindling.errors import FormatError

_OLD_MODES = frozenset({"DIRECT", "HEAP", "JAVACPP"})
_NEW_MODES = frozenset({"LONG_SHAPE", "MIXED_DATA_TYPES"})
_DTYPES = {"FLOAT": ">f4", "DOUBLE": ">f8", "HALF": ">f2", "INT": ">i4", "LONG": ">i8"}
MAX_RANK = 32
_CHUNK_BYTES = 8 << 20


class Readable(Protocol):
    """What arrays are read from."""

    def read(self, count: int, /) -> bytes: ...


class Vector:
    """A row of numbers that is read part by part, each into memory of its own."""

    def __init__(self, stream: Readable, where: str, dtype: np.dtype, total: int) -> None:
        self._stream, self._where, self._dtype = stream, where, dtype
        self.total, self.left = total, total

    def take(self, count: int) -> np.ndarray:
        """The next numbers, float32.

        Raises: FormatError, when the stream ends before.
        """
        assert 0 <= count <= self.left
        self.left -= count
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond 32 bits become infinite
            return _numbers(self._stream, self._where, self._dtype, count).astype(np.float32, copy=False)


def open_vector(stream: Readable, where: str, limit_bytes: int) -> Vector:
    """An array of one row, none of whose numbers is read yet.

    Args: as for `read_array`.
    Raises: FormatError.
    """
    shape, _ = _shape(stream, where, limit_bytes)
    dtype, total = _head(stream, where, limit_bytes)
    if dtype.kind != "f":
        raise FormatError(f"{where} holds {dtype}, not floating-point numbers.")
    if total != math.prod(shape) or total != max(shape, default=1):
        raise FormatError(f"{where} holds {total:,} numbers of shape {shape}, not one row of parameters.")
    return Vector(stream, where, dtype, total)


def read_array(stream: Readable, where: str, limit_bytes: int) -> np.ndarray:
    """One array, as numbers of this machine's byte order.

    Args:
        where: names the file and the member in messages.
        limit_bytes: bytes that can be left in the stream; an array that claims more is refused unread.
    Returns: float32, float64 or float16 of the shape that was written; 'f'-ordered arrays as such.
    Raises: FormatError.
    """
    shape, order = _shape(stream, where, limit_bytes)
    dtype, length = _head(stream, where, limit_bytes)
    if dtype.kind != "f":
        raise FormatError(f"{where} holds {dtype}, not floating-point numbers.")
    if length != math.prod(shape):
        raise FormatError(f"{where} holds {length:,} numbers, but its shape {shape} needs {math.prod(shape):,}.")
    return _numbers(stream, where, dtype, length).reshape(shape, order="C" if order == "c" else "F")


def _shape(stream: Readable, where: str, limit_bytes: int) -> tuple[tuple[int, ...], str]:
    """Shape and order, from the first of the two buffers."""
    dtype, length = _head(stream, where, limit_bytes, most=2 * MAX_RANK + 4)
    if dtype.kind != "i" or not length:
        raise FormatError(f"{where} begins with {dtype}, not with the shape of an array.")
    info = [int(number) for number in _numbers(stream, where, dtype, length)]
    rank = info[0]
    if not 0 <= rank <= MAX_RANK or length != 2 * rank + 4:
        raise FormatError(f"{where} gives an array {rank} axes in a shape buffer of {length} numbers.")
    shape = tuple(info[1 : rank + 1])
    if info[-1] not in (ord("c"), ord("f")) or any(size < 0 for size in shape):
        raise FormatError(f"{where} gives an array shape {shape} in order {info[-1]}.")
    return shape, chr(info[-1])


def read_text(stream: Readable, where: str, limit: int = 128) -> str:
    """A short text as Java's `writeUTF` writes it.

    Raises: FormatError, when it is longer than `limit`, cut off, or no plain text.
    """
    (length,) = struct.unpack(">H", exactly(stream, 2, where))
    if length > limit:
        raise FormatError(f"{where} begins with a text of {length} bytes, where an array has a short word.")
    try:
        return exactly(stream, length, where).decode("ascii")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} has no plain word where an array has one.") from error


def exactly(stream: Readable, count: int, where: str) -> bytes:
    """The next `count` bytes.

    Raises: FormatError, when the stream ends before.
    """
    data = stream.read(count)
    if len(data) != count:
        raise FormatError(f"{where} is cut off: {count} bytes were expected, {len(data)} are there. Fetch it again.")
    return data


def _head(stream: Readable, where: str, limit_bytes: int, most: int | None = None) -> tuple[np.dtype, int]:
    """Type and length of the buffer whose numbers come next."""
    mode = read_text(stream, where)
    if mode in _OLD_MODES:
        (length,) = struct.unpack(">i", exactly(stream, 4, where))
    elif mode in _NEW_MODES:
        (length,) = struct.unpack(">q", exactly(stream, 8, where))
    else:
        raise FormatError(f"{where} has a buffer of allocation mode {mode!r}, which ND4J does not write.")
    kind = read_text(stream, where)
    if kind == "COMPRESSED":
        raise FormatError(f"{where} is a compressed ND4J array. Load it in Deeplearning4j and save it uncompressed.")
    if kind not in _DTYPES:
        raise FormatError(f"{where} has a buffer of type {kind!r}; {', '.join(_DTYPES)} are read.")
    dtype = np.dtype(_DTYPES[kind])
    if length < 0 or length * dtype.itemsize > limit_bytes or (most is not None and length > most):
        raise FormatError(f"{where} claims a buffer of {length:,} numbers; its file holds {limit_bytes:,} bytes.")
    return dtype, length


def _numbers(stream: Readable, where: str, dtype: np.dtype, count: int) -> np.ndarray:
    """The next numbers, in this machine's byte order."""
    values = np.empty(count, dtype)
    raw = values.view(np.uint8)
    for start in range(0, len(raw), _CHUNK_BYTES):
        part = raw[start : start + _CHUNK_BYTES]
        part[:] = np.frombuffer(exactly(stream, len(part), where), np.uint8)
    native = dtype.newbyteorder("=")
    if native.str != dtype.str:
        values.byteswap(inplace=True)
    return values.view(native)
