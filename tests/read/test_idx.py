"""`read.idx` on generated files, whole and damaged, and on the real MNIST."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kindling import read
from kindling.errors import DataError, FormatError, StorageError
from kindling.prepare.image import ImageStep
from kindling.read import idx as read_idx
from kindling.read.idx import read_array


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 3, 5), dtype=np.uint8)


@pytest.fixture
def files(tmp_path: Path, pixels: np.ndarray) -> tuple[Path, Path]:
    """Images and labels; the labels gzipped."""
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte.gz"
    images.write_bytes(idx_bytes(pixels))
    labels.write_bytes(gzip.compress(idx_bytes(np.arange(7, dtype=np.uint8) + 5)))
    return images, labels


@pytest.mark.spark
@pytest.mark.sessions
def test_images_and_labels_become_rows(spark: Any, files: tuple[Path, Path], pixels: np.ndarray) -> None:
    frame = read_idx(*files, spark=spark)
    assert [(f.name, f.dataType.simpleString()) for f in frame.schema] == [
        ("path", "string"),
        ("label", "string"),
        ("content", "binary"),
    ]
    rows = sorted(frame.collect())
    assert [row.path for row in rows] == [f"train-images#{n:05d}" for n in range(7)]
    assert [row.label for row in rows] == ["5", "6", "7", "8", "9", "10", "11"]
    assert [bytes(row.content) for row in rows] == [image.tobytes() for image in pixels]
    assert read.labels(frame) == ("5", "6", "7", "8", "9", "10", "11")


@pytest.mark.spark
@pytest.mark.sessions
def test_large_files_arrive_in_pieces(
    spark: Any, files: tuple[Path, Path], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kindling.read.idx"], "_CHUNK_BYTES", 40)  # the function hides the module
    rows = sorted(read_idx(files[0], spark=spark).collect())
    assert [bytes(row.content) for row in rows] == [image.tobytes() for image in pixels]
    assert {row.label for row in rows} == {None}


@pytest.mark.spark
@pytest.mark.sessions
def test_rows_fit_the_image_step(spark: Any, files: tuple[Path, Path], pixels: np.ndarray) -> None:
    step = ImageStep("x", size=(3, 5), resize="none", channels="L", raw_shape=(3, 5))

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            arrays = step.pack(batch).arrays["x"]
            yield pa.RecordBatch.from_arrays([batch.column(0), pa.array([x.tobytes() for x in arrays])], ["path", "x"])

    rows = sorted(read_idx(*files, spark=spark).mapInArrow(decode, "path string, x binary").collect())
    assert [bytes(row.x) for row in rows] == [image.tobytes() for image in pixels]


@pytest.mark.spark
def test_urls_are_read_through_spark(spark: Any, files: tuple[Path, Path], pixels: np.ndarray) -> None:
    assert (read_array(f"file://{files[0]}", spark, axes=(3,)) == pixels).all()
    with pytest.raises(StorageError, match=r"nofs://x/y cannot be read: .*nofs"):
        read_array("nofs://x/y", spark, axes=(3,))


def test_colour_images_have_four_axes(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    (tmp_path / "a.idx").write_bytes(idx_bytes(colours))
    assert (read_array(tmp_path / "a.idx", axes=(3, 4)) == colours).all()


IMAGES = idx_bytes(np.zeros((2, 3, 4), np.uint8))
DAMAGED = {
    "no idx file": (b"PK\x03\x04 zip", "is no idx file: it begins with"),
    "empty": (b"", "is no idx file"),
    "unknown type": (b"\0\0\x07\x03" + IMAGES[4:], "is no idx file"),
    "floats": (idx_bytes(np.zeros((2, 3, 4), ">f4"), 0x0D), "holds float32 numbers; only uint8"),
    "labels": (idx_bytes(np.zeros(9, np.uint8)), "has 1 axes, which is not images .* swapped"),
    "header cut": (IMAGES[:9], "is cut short inside its header"),
    "body cut": (IMAGES[:-1], r"announces the shape \(2, 3, 4\), 24 bytes, and holds only 23"),
    "too long": (IMAGES + b"\0", "24 bytes, and holds more"),
    "no pixels": (idx_bytes(np.zeros((2, 0, 4), np.uint8)), "its images have no pixels"),
    "channels": (idx_bytes(np.zeros((2, 3, 4, 2), np.uint8)), "no number of channels"),
    "gzip cut": (gzip.compress(IMAGES)[:-12], "damaged gzip file"),
    "gzip altered": (gzip.compress(IMAGES)[:-6] + b"\1\2\3\4\5\6", "damaged gzip file"),
    "lies about its size": (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**20, 2**20), "and holds only 0"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    data, message = DAMAGED[kind]
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_array(tmp_path / "bad", axes=(3, 4))
    assert str(tmp_path / "bad") in str(caught.value)


@pytest.mark.spark
def test_files_that_do_not_belong_together_are_refused(spark: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "six").write_bytes(idx_bytes(np.zeros(6, np.uint8)))
    with pytest.raises(FormatError, match=r"holds 7 images, .*six holds 6 labels"):
        read_idx(files[0], tmp_path / "six", spark=spark)
    with pytest.raises(FormatError, match=r"3 axes, which is not labels .* swapped"):
        read_idx(files[0], files[0], spark=spark)
    (tmp_path / "none").write_bytes(idx_bytes(np.zeros((0, 3, 4), np.uint8)))
    with pytest.raises(DataError, match="holds no images"):
        read_idx(tmp_path / "none", spark=spark)
    with pytest.raises(StorageError, match=r"there is no file .*nowhere"):
        read_idx(tmp_path / "nowhere", spark=spark)


@pytest.mark.needs_data
@pytest.mark.spark
def test_the_real_mnist(spark: Any, data_dir: Path) -> None:
    folder = data_dir / "mnist"
    frame = read_idx(folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz", spark=spark)
    assert frame.count() == 10_000
    assert read.labels(frame) == tuple("0123456789")
    counts = {row.label: row["count"] for row in frame.groupBy("label").count().collect()}
    assert counts["0"] == 980  # as published
    assert counts["9"] == 1009
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as stream:
        stream.read(16)
        first = stream.read(784)
    row = frame.where("path = 't10k-images#00000'").head()
    assert (row.label, bytes(row.content)) == ("7", first)
