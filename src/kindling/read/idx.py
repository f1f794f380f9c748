"""`read.idx`: MNIST's idx files as a DataFrame of raw pixels.

Format: two zero bytes, a type code, the number of axes, each axis' length as a big-endian 32-bit number, then the
numbers, the last axis fastest. Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", 1998. The
files are read and checked on the driver; turning pixels into tensors is `prepare/image.py` (`raw_shape`).
"""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kindling.errors import DataError, FormatError, StorageError
from kindling.session import active_session, first_line
from kindling.session import spark as start_session

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_CHUNK_BYTES = 16 * 2**20
_SCHEMA = "path string, label string, content binary"


def idx(
    images: str | PathLike[str], labels: str | PathLike[str] | None = None, *, spark: SparkSession | None = None
) -> DataFrame:
    """Images, and labels if given, from idx files, gzipped or not.

    Args:
        images: an idx file of uint8, (N, H, W) or (N, H, W, C): a local path, or a URL that Spark reads.
        labels: an idx file of N uint8 class numbers.
        spark: the session to use; None: the active one, else `kindling.spark()`.
    Returns: columns `path` (string, a stable key like `train-images#00042`), `label` (string, null without `labels`)
        and `content` (binary, H x W x C raw pixels: read them with `ImageStep(raw_shape=(H, W))`).
    Raises: FormatError, for a file that is no such idx file, is cut short, holds other than uint8, or for images and
        labels of different number; DataError, for no images; StorageError, where a file cannot be read.

    >>> idx("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")  # doctest: +SKIP
    DataFrame[path: string, label: string, content: binary]
    """
    session = spark or active_session() or start_session()
    pixels_NHWC = read_array(images, session, axes=(3, 4))
    n = len(pixels_NHWC)
    if n == 0:
        raise DataError(f"{images} holds no images.")
    numbers_N = None
    if labels is not None:
        numbers_N = read_array(labels, session, axes=(1,))
        if len(numbers_N) != n:
            raise FormatError(
                f"{images} holds {n:,} images, {labels} holds {len(numbers_N):,} labels: they do not belong together."
            )
    stem, digits = _stem(str(images)), max(5, len(str(n - 1)))
    rows_bytes = math.prod(pixels_NHWC.shape[1:])
    step = max(1, _CHUNK_BYTES // rows_bytes)
    frame: DataFrame | None = None
    for start in range(0, n, step):
        part = pixels_NHWC[start : start + step]
        keys = [f"{stem}#{row:0{digits}d}" for row in range(start, start + len(part))]
        names = [None] * len(part) if numbers_N is None else [str(number) for number in numbers_N[start : start + step]]
        contents = pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows_bytes), len(part), [None, pa.py_buffer(part)])
        chunk = _frame(session, keys, names, contents)
        frame = chunk if frame is None else frame.unionAll(chunk)
    assert frame is not None
    return frame


def _frame(
    session: SparkSession, keys: list[str], names: list[str | None] | list[None] | list[str], contents: pa.Array
) -> DataFrame:
    if hasattr(session, "_sc") and not hasattr(session.createDataFrame([], _SCHEMA), "toArrow"):
        # Spark 3.5 takes no Arrow table.
        return session.createDataFrame(
            list(zip(keys, names, contents.to_pylist(), strict=True)), _SCHEMA, verifySchema=False
        )
    table = pa.table({"path": keys, "label": pa.array(names, pa.string()), "content": contents.cast(pa.binary())})
    return session.createDataFrame(table, _SCHEMA)


def _stem(path: str) -> str:
    """The file's name without what every idx file is called.

    >>> _stem("data/train-images-idx3-ubyte.gz"), _stem("digits.idx")
    ('train-images', 'digits')
    """
    name = re.split(r"[/\\]", path)[-1]
    name = re.sub(r"\.gz$", "", name)
    return re.sub(r"([.-]idx\d?(-ubyte)?|\.ubyte|-ubyte)$", "", name) or name


def read_array(path: str | PathLike[str], session: SparkSession | None = None, *, axes: tuple[int, ...]) -> np.ndarray:
    """The uint8 array in one idx file.

    Args:
        path: a local path, or a URL that `session` reads.
        axes: numbers of axes that will do: `(3, 4)` for images, `(1,)` for labels.
    Raises: FormatError, StorageError.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "labels.idx"
    >>> _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    >>> read_array(file, axes=(1,))
    array([7, 8, 9], dtype=uint8)
    """
    with _open(path, session) as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            with gzip.open(raw) if zipped else raw as stream:
                return _read(stream, str(path), axes)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FormatError(f"{path} is a damaged gzip file: {error}.") from error


def _read(stream: IO[bytes] | gzip.GzipFile, path: str, axes: tuple[int, ...]) -> np.ndarray:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
        raise FormatError(f"{path} is no idx file: it begins with {head!r}, not with two zeros and a type code.")
    if head[2] != 0x08:
        raise FormatError(f"{path} holds {_TYPES[head[2]]} numbers; only uint8 idx files are images or labels.")
    if head[3] not in axes:
        wanted = "images (3 or 4 axes)" if 3 in axes else "labels (1 axis)"
        raise FormatError(f"{path} has {head[3]} axes, which is not {wanted}. Are images and labels swapped?")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise FormatError(f"{path} is cut short inside its header.")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    if len(shape) == 4 and shape[3] not in (1, 3, 4):
        raise FormatError(f"{path} has the shape {shape}, whose last axis is no number of channels (1, 3 or 4).")
    if 0 in shape[1:]:
        raise FormatError(f"{path} has the shape {shape}: its images have no pixels.")
    expected = math.prod(shape)
    # In pieces: a header that lies about the size must not make us allocate what it says.
    data = bytearray()
    while len(data) <= expected:
        piece = stream.read(min(_CHUNK_BYTES, expected + 1 - len(data)))
        if not piece:
            break
        data += piece
    if len(data) != expected:
        what = f"only {len(data):,}" if len(data) < expected else "more"
        raise FormatError(f"{path} announces the shape {shape}, {expected:,} bytes, and holds {what}.")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open(path: str | PathLike[str], session: SparkSession | None) -> IO[bytes]:
    text = str(path)
    local = text.removeprefix("file://").removeprefix("file:") if text.startswith("file:") else text
    is_url = re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:/", text) and not text.startswith("file:")
    if not is_url and Path(local).expanduser().is_file():
        return Path(local).expanduser().open("rb")
    if session is None or not is_url:
        raise StorageError(f"there is no file {local}.")
    try:
        rows = session.read.format("binaryFile").load(text).select("content").head(1)
    except Exception as error:
        raise StorageError(f"{text} cannot be read: {first_line(error)}.") from error
    if not rows:
        raise StorageError(f"there is no file {text}.")
    return io.BytesIO(rows[0]["content"])
