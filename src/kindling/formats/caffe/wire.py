"""`.caffemodel` and `.binaryproto` by Caffe's schema: structure now, numbers when asked for.

The walk over the bytes is `formats/wire.py`'s. Nesting is as deep as `schema.py` says and no deeper, and the numbers of
a blob stay where they are in the file until `Blob.array` copies them. A maintained protobuf library would copy every
weight into Python objects or a second buffer first.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kindling.errors import FormatError
from kindling.formats.caffe.schema import Field, Message, by_number, enums, merge, messages
from kindling.formats.wire import BYTES, FIXED32, FIXED64, VARINT, Budget, fields, varint

MAX_AXES = 32
"""Caffe's own limit for the axes of a blob."""

_RAW_TYPES = {0: "<f8", 1: "<f4", 2: "<f2"}
_WEIGHT_FIELDS = {
    "LayerParameter": frozenset({"name", "type", "blobs"}),
    "V1LayerParameter": frozenset({"name", "type", "blobs", "layer"}),
    "V0LayerParameter": frozenset({"name", "type", "blobs"}),
}


@dataclass(slots=True)
class Blob:
    """Numbers with a shape."""

    shape: tuple[int, ...]
    parts: list[np.ndarray] = field(default_factory=list)
    """One-dimensional pieces, in order, possibly within the file; little-endian floats of 2, 4 or 8 bytes."""
    legacy: bool = False
    """Whether the shape is the old one of exactly four axes."""
    own: bool = False
    """Whether the one part is memory that nothing else uses."""

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(part.size for part in self.parts)

    def array(self) -> np.ndarray:
        """The numbers as float32 in memory of their own, in the blob's shape."""
        if self.own and len(self.parts) == 1 and self.parts[0].dtype == np.float32:
            return self.parts[0].reshape(self.shape)
        out = np.empty(self.count, np.float32)
        at = 0
        for part in self.parts:
            with np.errstate(all="ignore"):  # doubles beyond float32 become infinite
                out[at : at + part.size] = part
            at += part.size
        return out.reshape(self.shape)


def open_view(path: Path) -> memoryview:
    """The file's bytes, mapped.

    Raises: FormatError, when it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            if path.stat().st_size == 0:
                raise FormatError(f"{path} is empty.")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} cannot be read: {error}.") from error


def decode(data: memoryview | bytes, message: str, what: str = "the file", *, weights_only: bool = False) -> Message:
    """The message in `data`; blobs come as `Blob`.

    Args:
        data: the whole file.
        message: its name in `schema.py`.
        what: what to call the file in messages.
        weights_only: of layers, only names, types and blobs. Files of Caffe's many relatives use the numbers of
            further fields for things of their own.
    Raises: FormatError, when the bytes are no such message.

    >>> net = decode(b"\\x0a\\x02fc\\xa2\\x06\\x04\\x0a\\x02ip", "NetParameter")
    >>> net.get("name"), net.all("layer")[0].get("name")
    ('fc', 'ip')
    """
    view = memoryview(data)
    return _Decoder(what, weights_only).message(view, 0, len(view), message)


class _Decoder:
    def __init__(self, what: str, weights_only: bool) -> None:
        self.budget = Budget(what)
        self.weights_only = weights_only

    def message(self, view: memoryview, at: int, end: int, name: str) -> Message:
        made = Message(name)
        known = by_number(name)
        wanted = _WEIGHT_FIELDS.get(name) if self.weights_only else None
        for number, kind, value, begin, stop in fields(view, at, end, self.budget):
            entry = known.get(number)
            if entry is None or (wanted is not None and entry.name not in wanted):
                continue
            if entry.type == "BlobProto":
                self.need(kind == BYTES, begin, entry)
                made.add(entry.name, self.blob(view, begin, stop))
            elif entry.type in messages():
                self.need(kind == BYTES, begin, entry)
                self.into(made, entry, self.message(view, begin, stop, entry.type))
            else:
                for scalar in self.scalars(view, entry, kind, value, begin, stop):
                    if entry.repeated:
                        made.add(entry.name, scalar)
                    else:
                        made.put(entry.name, scalar)
        return made

    def into(self, made: Message, entry: Field, value: Message) -> None:
        if not entry.repeated and made.has(entry.name):
            merge(made.get(entry.name), value)
        else:
            made.add(entry.name, value)

    def need(self, right: bool, at: int, entry: Field) -> None:
        if not right:
            raise self.budget.damaged(at, f"field {entry.name!r} is not written as {entry.type}")

    def scalars(self, view: memoryview, entry: Field, kind: int, value: int, begin: int, stop: int) -> Iterator[Any]:
        if entry.type in ("str", "bytes"):
            self.need(kind == BYTES, begin, entry)
            raw = bytes(view[begin:stop])
            yield raw if entry.type == "bytes" else raw.decode("utf-8", "replace")
        elif entry.type in ("float", "double"):
            width, wire = (4, FIXED32) if entry.type == "float" else (8, FIXED64)
            self.need(kind == wire or (kind == BYTES and entry.repeated and (stop - begin) % width == 0), begin, entry)
            self.budget.spend((stop - begin) // width)
            yield from np.frombuffer(view[begin:stop], f"<f{width}").tolist()
        elif kind == BYTES and entry.repeated:
            at = begin
            while at < stop:
                self.budget.spend()
                value, at = varint(view, at, stop, self.budget)
                yield self.integer(value, entry)
        else:
            self.need(kind == VARINT, begin, entry)
            scalar = self.integer(value, entry)
            if scalar is not None:
                yield scalar

    def integer(self, value: int, entry: Field) -> Any:
        if entry.type == "bool":
            return value != 0
        if entry.type == "uint":
            return value & 0xFFFF_FFFF
        value -= (value >> 63) << 64
        if entry.type in enums() or entry.type == "Engine":
            return next((name for name, number in enums().get(entry.type, {}).items() if number == value), None)
        return value

    # Blobs

    def blob(self, view: memoryview, at: int, end: int) -> Blob:
        known = by_number("BlobProto")
        found = Blob(())
        shape: tuple[int, ...] | None = None
        old: dict[str, int] = {}
        raw: memoryview | None = None
        raw_type = 1
        begin_of_blob = at
        while at < end:
            number, kind, value, begin, stop = next(fields(view, at, end, self.budget))
            entry = known.get(number)
            name = entry.name if entry is not None else ""
            at = stop
            if name == "shape":
                self.need(kind == BYTES, begin, known[number])
                dims = self.message(view, begin, stop, "BlobShape").all("dim")
                shape = (shape or ()) + tuple(dims)
            elif name in ("num", "channels", "height", "width"):
                self.need(kind == VARINT, begin, known[number])
                old[name] = self.integer(value, known[number])
            elif name in ("data", "double_data"):
                width, wire = (4, FIXED32) if name == "data" else (8, FIXED64)
                if kind == wire:
                    part, at = self.unpacked(view, begin, end, number, width)
                else:
                    self.need(kind == BYTES and (stop - begin) % width == 0, begin, known[number])
                    part = np.frombuffer(view[begin:stop], f"<f{width}")
                found.parts.append(part)
            elif name == "raw_data_type":
                self.need(kind == VARINT, begin, known[number])
                raw_type = value
            elif name == "raw_data":
                self.need(kind == BYTES, begin, known[number])
                raw = view[begin:stop]
        if raw is not None and not found.parts:
            dtype = _RAW_TYPES.get(raw_type)
            if dtype is None or len(raw) % int(dtype[-1]):
                raise self.budget.damaged(
                    begin_of_blob, f"raw numbers of type {raw_type} in {len(raw):,} bytes are unknown"
                )
            found.parts.append(np.frombuffer(raw, dtype))
        if shape is None and old:
            shape = tuple(old.get(name, 0) for name in ("num", "channels", "height", "width"))
            found.legacy = True
        found.shape = (found.count,) if shape is None else shape
        self.check(found, begin_of_blob)
        return found

    def unpacked(self, view: memoryview, begin: int, end: int, number: int, width: int) -> tuple[np.ndarray, int]:
        """Numbers that have a tag each: all that follow one another at once."""
        tag = number << 3 | (FIXED32 if width == 4 else FIXED64)
        record = np.dtype([("tag", "u1"), ("value", f"<f{width}")])
        records = np.frombuffer(view[begin - 1 : end], record, (end - begin + 1) // record.itemsize)
        others = np.flatnonzero(records["tag"] != tag)
        length = int(others[0]) if others.size else len(records)
        return records["value"][:length], begin - 1 + length * record.itemsize

    def check(self, blob: Blob, at: int) -> None:
        if len(blob.shape) > MAX_AXES or any(not 0 <= size < 2**31 for size in blob.shape):
            raise self.budget.damaged(at, f"{str(blob.shape[:8])[:80]} is no shape")
        if blob.parts and math.prod(blob.shape) != blob.count:
            raise self.budget.damaged(at, f"a blob of shape {blob.shape} holds {blob.count:,} numbers")


def blob_of_text(message: Message, what: str) -> Blob:
    """A BlobProto that stood in a text file.

    Raises: FormatError, when shape and numbers do not fit.
    """
    numbers = message.all("data") or message.all("double_data")
    parts = [np.asarray(numbers, np.float64)]
    legacy = False
    if message.has("shape"):
        shape = tuple(message.get("shape").all("dim"))
    elif any(message.has(name) for name in ("num", "channels", "height", "width")):
        shape = tuple(message.get(name) for name in ("num", "channels", "height", "width"))
        legacy = True
    else:
        shape = (len(numbers),)
    blob = Blob(shape, parts, legacy)
    if len(shape) > MAX_AXES or any(size < 0 for size in shape) or math.prod(shape) != len(numbers):
        raise FormatError(
            f"{what}, line {message.line}: a blob of shape {shape} holds {len(numbers):,} numbers. Is the file whole?"
        )
    return blob
