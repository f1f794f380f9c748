"""What the tests of Caffe share: a writer of its binary messages, written apart from the reader under test."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kindling.formats.caffe import read
from kindling.formats.models import Imported


class Writer:
    """Protobuf's binary format, as far as Caffe's messages need it."""

    @staticmethod
    def varint(value: int) -> bytes:
        value &= (1 << 64) - 1
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    @classmethod
    def number(cls, field: int, value: int) -> bytes:
        return cls.varint(field << 3) + cls.varint(value)

    @classmethod
    def data(cls, field: int, value: bytes | str) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return cls.varint(field << 3 | 2) + cls.varint(len(raw)) + raw

    @classmethod
    def blob(cls, array: np.ndarray, style: str = "packed") -> bytes:
        """A BlobProto: `packed`, `unpacked`, `double`, `half`, `raw` or `legacy`."""
        array = np.asarray(array, np.float32)
        flat = array.reshape(-1)
        shape = cls.data(7, cls.data(1, b"".join(map(cls.varint, array.shape))))
        if style == "legacy":
            four = (1,) * (4 - array.ndim) + array.shape
            shape = b"".join(cls.number(place, size) for place, size in enumerate(four, 1))
        if style in ("packed", "legacy"):
            return shape + cls.data(5, flat.astype("<f4").tobytes())
        if style == "unpacked":
            tag = cls.varint(5 << 3 | 5)
            return b"".join(tag + struct.pack("<f", value) for value in flat) + shape
        if style == "double":
            return shape + cls.data(8, flat.astype("<f8").tobytes())
        if style == "half":
            return shape + cls.number(10, 2) + cls.data(12, flat.astype("<f2").tobytes())
        assert style == "raw"
        return shape + cls.number(10, 1) + cls.data(12, flat.astype("<f4").tobytes())

    @classmethod
    def caffemodel(
        cls,
        layers: Mapping[str, Sequence[np.ndarray]],
        types: Mapping[str, str] | None = None,
        style: str = "packed",
    ) -> bytes:
        """A V2 NetParameter with names, types and blobs."""
        out = cls.data(1, "net")
        for name, blobs in layers.items():
            body = cls.data(1, name) + cls.data(2, (types or {}).get(name, "Convolution"))
            out += cls.data(100, body + b"".join(cls.data(7, cls.blob(blob, style)) for blob in blobs))
        return out


@pytest.fixture
def write() -> type[Writer]:
    """The writer."""
    return Writer


@pytest.fixture
def net(tmp_path: Path, write: type[Writer]) -> Callable[..., Imported]:
    """A net from text, with weights by layer name: `net(text, {"conv": [w, b]}, input_shape=...)`."""

    def make(text: str, blobs: Mapping[str, Iterable[Any]] | None = None, **options: Any) -> Imported:
        file = tmp_path / "net.prototxt"
        file.write_text(text)
        if blobs is not None:
            weights = tmp_path / "net.caffemodel"
            weights.write_bytes(write.caffemodel({name: [np.asarray(b) for b in bs] for name, bs in blobs.items()}))
            options["weights"] = weights
        return read(file, **options)

    return make
