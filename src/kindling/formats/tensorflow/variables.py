"""The variables of a SavedModel: TensorFlow's tensor bundle, an index (a sorted table) and files of raw numbers.

Every block of the index and every tensor carries a CRC32C, which is checked. Sources: `tensor_bundle.cc`,
`tensor_bundle.proto`, and LevelDB's table format.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from kindling.errors import FormatError
from kindling.formats.files import mapped
from kindling.formats.tensorflow.graphdef import BFLOAT16, dtype_name, shape_of
from kindling.formats.wire import Budget, Message

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_MAX_INDEX = 256 << 20


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _table()


def _shift(crc: np.ndarray, zeros: int) -> np.ndarray:
    """A CRC's register after `zeros` bytes of zero, for each register of an array: linear, so by squaring."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    step = _TABLE[columns & np.uint32(255)] ^ (columns >> np.uint32(8))  # one byte, applied to each bit
    out = crc
    while zeros:
        if zeros & 1:
            out = _apply(step, out)
        step = _apply(step, step)
        zeros >>= 1
    return out


def _apply(columns: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    out = np.zeros_like(vectors)
    for bit in range(32):
        out ^= np.where(vectors >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
    return out


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Castagnoli's CRC of some bytes.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    raw, register = _folded(np.frombuffer(data, np.uint8))
    lanes = 1
    while lanes < 32768 and len(raw) >= lanes * 128:
        lanes *= 2
    size = len(raw) // lanes
    crc = np.zeros(lanes, np.uint32)  # many lanes at once, then joined
    crc[0] = register
    for column in np.ascontiguousarray(raw[: size * lanes].reshape(lanes, size).T):
        crc = _TABLE[(crc ^ column) & np.uint32(255)] ^ (crc >> np.uint32(8))
    step = _shift(np.uint32(1) << np.arange(32, dtype=np.uint32), size)
    while len(crc) > 1:  # a lane goes on behind the one before it: shift, add
        crc = _apply(step, crc[::2]) ^ crc[1::2]
        step = _apply(step, step)
    for byte in raw[size * lanes :]:
        crc = _TABLE[(crc ^ byte) & np.uint32(255)] ^ (crc >> np.uint32(8))
    return int(crc[0]) ^ 0xFFFFFFFF


_FOLD = (5685, 1362, 426)
"""x^64a + x^64b + x^64c + 1 is a multiple of the CRC's polynomial, so that a word far from the end may be added to
three words behind it and forgotten: three additions for eight bytes, in place of eight look-ups."""
_CHUNKS = 24
"""Of a - b words each, folded before the rest is carried on: small enough for a cache."""


def _folded(raw: np.ndarray) -> tuple[np.ndarray, int]:
    """Fewer bytes with the same remainder, and the register to begin with."""
    a, b, c = _FOLD
    step = a - b
    gone = max((len(raw) // 8 - a) // step, 0) * step
    if not gone:
        return raw, 0xFFFFFFFF
    words = raw[: 8 * gone].view("<u8")
    work = np.empty(_CHUNKS * step + a, np.uint64)
    carried = np.zeros(a, np.uint64)
    carried[0] = 0xFFFFFFFF  # the register stands before the first bytes
    for start in range(0, gone, _CHUNKS * step):
        size = min(_CHUNKS * step, gone - start)
        work[:size] = words[start : start + size]
        work[size : size + a] = 0
        work[:a] ^= carried
        for at in range(0, size, step):
            chunk = work[at : at + step]
            for far in (step, a - c, a):
                work[at + far : at + far + step] ^= chunk
        carried = work[size : size + a].copy()
    rest = raw[8 * gone :].copy()
    rest[: 8 * a] ^= carried.astype("<u8").view(np.uint8)
    return rest, 0


def _masked(crc: int) -> int:
    """As TensorFlow stores it, so that a CRC over CRCs stays meaningful."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class Variables:
    """The tensors of a bundle by name."""

    def __init__(self, prefix: Path) -> None:
        """
        Args:
            prefix: `variables/variables`: the path without `.index`.
        Raises: FormatError, when the index is missing or damaged.
        """
        self.prefix = prefix
        index = prefix.with_name(prefix.name + ".index")
        if not index.is_file():
            raise FormatError(f"there is no {index}: the model's variables are not at hand.")
        if index.stat().st_size > _MAX_INDEX:
            raise FormatError(f"{index} is too large for an index.")
        self._what = str(index)
        self._data = index.read_bytes()
        budget = Budget(self._what)
        self._entries: dict[str, Message] = {}
        self.keys: dict[str, str] = {}
        """Variable in the graph -> name here, where they differ."""
        self.shards = 1
        self._files: dict[int, memoryview] = {}
        for key, value in self._table():
            message = Message(memoryview(value), budget)
            if key == b"":
                self.shards = message.whole(1)
                if message.whole(2):
                    raise FormatError(f"{self._what} is big-endian, which is not read.")
                continue
            self._entries[self._text(key)] = message

    def _text(self, key: bytes) -> str:
        try:
            return key.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what} is damaged: a name is no text.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._entries)

    # ------------------------------------------------------------------------------------------ the table

    def _damaged(self) -> FormatError:
        return FormatError(f"{self._what} is cut off or damaged. Fetch it again.")

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while at < len(data) and shift < 64:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
        raise self._damaged()

    def _block(self, offset: int, size: int) -> bytes:
        end = offset + size
        if end + 5 > len(self._data):
            raise self._damaged()
        body, kind = self._data[offset:end], self._data[end]
        if kind != 0:
            raise FormatError(f"{self._what} is compressed, which is not read. Save the model again.")
        stored = int.from_bytes(self._data[end + 1 : end + 5], "little")
        if _masked(crc32c(self._data[offset : end + 1])) != stored:
            raise FormatError(f"{self._what} is damaged: a block's checksum does not fit. Fetch it again.")
        return body

    def _rows(self, block: bytes) -> list[tuple[bytes, bytes]]:
        if len(block) < 4:
            raise self._damaged()
        restarts = int.from_bytes(block[-4:], "little")
        end = len(block) - 4 - 4 * restarts
        if end < 0:
            raise self._damaged()
        rows, at, key = [], 0, b""
        while at < end:
            shared, at = self._varint(block, at)
            fresh, at = self._varint(block, at)
            size, at = self._varint(block, at)
            if shared > len(key) or at + fresh + size > end:
                raise self._damaged()
            key = key[:shared] + block[at : at + fresh]
            rows.append((key, block[at + fresh : at + fresh + size]))
            at += fresh + size
        return rows

    def _table(self) -> list[tuple[bytes, bytes]]:
        footer = self._data[-_FOOTER:]
        if len(footer) < _FOOTER or int.from_bytes(footer[-8:], "little") != _MAGIC:
            raise FormatError(f"{self._what} is no index of a tensor bundle. Is it whole?")
        _, at = self._varint(footer, 0)
        _, at = self._varint(footer, at)
        offset, at = self._varint(footer, at)
        size, _ = self._varint(footer, at)
        rows = []
        for _, handle in self._rows(self._block(offset, size)):
            start, at = self._varint(handle, 0)
            length, _ = self._varint(handle, at)
            rows += self._rows(self._block(start, length))
            if len(rows) > 1_000_000:
                raise self._damaged()
        return rows

    # ---------------------------------------------------------------------------------------- the tensors

    def spec(self, name: str) -> tuple[str | None, tuple[int, ...]]:
        """dtype and shape of a tensor."""
        entry = self._entries[name]
        shape = shape_of(entry.message(2)) if entry.has(2) else []
        if shape is None or -1 in shape:
            raise self._damaged()
        return dtype_name(entry.whole(1)), tuple(shape)

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, checked; they are the file's own pages."""
        if name not in self._entries:
            raise FormatError(f"{self._what} has no variable {name[:120]!r}.")
        entry = self._entries[name]
        if entry.has(7):
            raise FormatError(f"{self._what}: {name[:120]!r} is kept in slices, which are not read.")
        shard, offset, size = entry.whole(3), entry.whole(4), entry.whole(5)
        file = self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.shards:05d}")
        if not 0 <= shard < self.shards <= 100_000 or not file.is_file():
            raise FormatError(f"there is no {file}, in which {name[:120]!r} should be.")
        if offset < 0 or size < 0 or offset + size > file.stat().st_size:
            raise FormatError(f"{file} is cut off: {name[:120]!r} is beyond its end.")
        if shard not in self._files:
            self._files[shard] = mapped(file)
        data = np.frombuffer(self._files[shard], np.uint8, size, offset) if size else np.empty(0, np.uint8)
        checksum = entry.floats(6, "<u4")
        if len(checksum) and _masked(crc32c(data)) != int(checksum[-1]):
            raise FormatError(f"{file} is damaged: the checksum of {name[:120]!r} does not fit. Fetch it again.")
        return data

    def read(self, name: str) -> np.ndarray:
        """A tensor of numbers; halves become float32.

        Raises: FormatError, when it is missing, damaged or holds texts.
        """
        if name not in self._entries:
            raise FormatError(f"{self._what} has no variable {name[:120]!r}.")
        dtype, shape = self.spec(name)
        if dtype is None:
            raise FormatError(f"{self._what}: {name[:120]!r} holds no numbers.")
        small = self._entries[name].whole(1) % 100 == BFLOAT16
        data = self.raw(name)
        wide = 2 if small else np.dtype(dtype).itemsize
        if len(data) != wide * math.prod(shape):
            raise FormatError(f"{self._what}: {name[:120]!r} of shape {shape} has {len(data):,} bytes.")
        if small:
            return (data.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        array = data.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
        return array.astype("float32" if dtype == "float16" else dtype, copy=False)
