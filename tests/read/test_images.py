"""`read.images` on folders of every shape: what is read, under which label, in what pieces, and what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kindling import read
from kindling.errors import ConfigError, DataError, StorageError
from kindling.prepare.image import ImageStep
from kindling.read.images import _batches_are_bounded

listing = sys.modules["kindling.read.images"]  # of the package, that name is the function

pytestmark = [pytest.mark.spark]

ODD_NAMES = [
    "plain",
    "two words",
    "ünï→code",
    "v1.2.final",
    "50%41",
    "a+b",
    "#1",
    "k=v",
    "[x]{y}*",
    "what?",
    "a&b;c",
    "~x",
    "it's",
]


def a_png(value: int = 0, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two photos, at different depths."""
    for number, name in enumerate(["cats/1.png", "cats/2.png", "dogs/1.png", "deep/er/dogs/9.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(a_png(number))
    return tmp_path


def found(frame: Any) -> dict[str, tuple[str, bytes]]:
    """File name below the folder of its label -> (label, content)."""
    return {"/".join(row.path.split("/")[-2:]): (row.label, bytes(row.content)) for row in frame.collect()}


@pytest.mark.sessions
def test_a_folder_becomes_rows_of_path_label_and_content(spark: Any, folder: Path) -> None:
    frame = read.images(str(folder), spark=spark)
    assert [(f.name, f.dataType.simpleString()) for f in frame.schema] == [
        ("path", "string"),
        ("label", "string"),
        ("content", "binary"),
    ]
    assert found(frame) == {
        "cats/1.png": ("cats", a_png(0)),
        "cats/2.png": ("cats", a_png(1)),
        "dogs/1.png": ("dogs", a_png(2)),
        "dogs/9.png": ("dogs", a_png(3)),
    }


@pytest.mark.sessions
def test_odd_names_are_taken_literally(spark: Any, tmp_path: Path) -> None:
    for number, name in enumerate(ODD_NAMES):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name} 1.png").write_bytes(a_png(number))
    rows = {row.label: (row.path, bytes(row.content)) for row in read.images(tmp_path, spark=spark).collect()}
    assert sorted(rows) == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        assert rows[name] == (f"file:{tmp_path}/{name}/{name} 1.png", a_png(number))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_of_any_name_can_be_asked_for(spark: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.png").write_bytes(a_png())
    for path in (tmp_path / name, str(tmp_path / name), f"file:{tmp_path}/{name}", f"file://{tmp_path}/{name}/1.png"):
        assert [row.label for row in read.images(path, spark=spark).select("label").collect()] == [name]


@pytest.mark.sessions
def test_globs_lists_and_single_files(spark: Any, folder: Path) -> None:
    def names(path: Any) -> list[str]:
        return sorted(found(read.images(path, spark=spark)))

    assert names(f"{folder}/*/1.png") == ["cats/1.png", "dogs/1.png"]
    assert names(f"{folder}/{{cats,deep}}") == ["cats/1.png", "cats/2.png", "dogs/9.png"]
    assert names([folder / "dogs", str(folder / "cats" / "2.png")]) == ["cats/2.png", "dogs/1.png"]
    assert names([folder, folder / "cats"]) == ["cats/1.png", "cats/2.png", "dogs/1.png", "dogs/9.png"]  # once each


def test_relative_paths_mean_the_folder_python_is_in(spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert sorted(found(read.images("cats", spark=spark))) == ["cats/1.png", "cats/2.png"]
    assert sorted(found(read.images("./d*/1.png", spark=spark))) == ["dogs/1.png"]
    monkeypatch.setenv("HOME", str(folder))
    assert sorted(found(read.images("~/cats", spark=spark))) == ["cats/1.png", "cats/2.png"]


def test_the_active_session_is_used(spark: Any, folder: Path) -> None:
    assert read.images(folder).count() == 4


def test_files_that_are_plainly_something_else_are_left_out(spark: Any, folder: Path) -> None:
    for name in ("notes.txt", "LABELS.CSV", "pack.tar.gz", "empty.jpg", "no_extension", "photo.xyz", "a.txt.png"):
        (folder / "cats" / name).write_bytes(b"?" if name != "empty.jpg" else b"")
    files = found(read.images(folder / "cats", spark=spark))
    assert {"cats/empty.jpg", "cats/no_extension", "cats/photo.xyz", "cats/a.txt.png"} < files.keys()
    assert not {"cats/notes.txt", "cats/LABELS.CSV", "cats/pack.tar.gz"} & files.keys()
    assert "cats/notes.txt" in found(read.images(folder, spark=spark, skip=()))
    assert "cats/photo.xyz" not in found(read.images(folder, spark=spark, skip=[".XYZ"]))


def test_hidden_files_are_skipped_and_lost_photos_are_told(spark: Any, folder: Path) -> None:
    for name in (".hidden.png", "._cats.png", "_DSC001.JPG", "_notes.txt"):
        (folder / "cats" / name).write_bytes(a_png())
    (folder / "_later").mkdir()
    (folder / "_later" / "1.png").write_bytes(a_png())
    with pytest.warns(UserWarning, match=r"^2 photos in .* are not read: .*Rename them"):
        frame = read.images(folder, spark=spark)
    assert frame.count() == 4


def test_photos_whose_names_java_cannot_spell_are_told(
    spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Java started in the locale C lists no other names than ASCII ones."""
    for name in ("chats é/1.png", "chats é/2.png", "dogs/ß.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(a_png())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert read.images(folder, spark=spark).count() == 7
    everything = listing._listed
    monkeypatch.setattr(listing, "_listed", lambda frame: [url for url in everything(frame) if unquote(url).isascii()])
    with pytest.warns(UserWarning, match=r"^3 photos in .* are not read: Java cannot spell .*LC_ALL=C.UTF-8"):
        read.images(folder, spark=spark)
    with pytest.warns(UserWarning, match="^2 photos in"), pytest.raises(DataError, match="holds no files"):
        read.images(folder / "chats é", spark=spark)


@pytest.mark.slow
def test_unicode_names_in_any_locale(folder: Path) -> None:
    (folder / "cats").rename(folder / "chats é")
    code = "import sys, kindling as kd; kd.spark('local[1]'); print(kd.read.images(sys.argv[1]).count(), kd.labels("
    code += "kd.read.images(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "1"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == "4 ('chats é', 'dogs')", done.stderr[-2000:]


def test_nothing_is_decoded_or_opened_before_it_is_used(spark: Any, folder: Path) -> None:
    frame = read.images(folder, spark=spark)
    (folder / "cats" / "1.png").write_bytes(b"changed")
    assert found(frame)["cats/1.png"] == ("cats", b"changed")


@pytest.mark.sessions
def test_missing_and_empty_places_are_clear_errors(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^there is nothing at file:/.*/nowhere\.$"):
        read.images(f"{tmp_path}/nowhere", spark=spark)
    with pytest.raises(StorageError, match=r"there is nothing at"):
        read.images(f"{tmp_path}/no*where", spark=spark)
    with pytest.raises(StorageError, match=r"there is nothing at .*nowhere"):
        read.images(tmp_path / "nowhere", spark=spark)
    with pytest.raises(StorageError, match=r"there is nothing at .*relative"):
        read.images("relative/nowhere", spark=spark)
    with pytest.raises(DataError, match=r"holds no files \(names that begin"):
        read.images(tmp_path, spark=spark)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match="holds 1 files, none of them an image by its name"):
        read.images(tmp_path, spark=spark)
    with pytest.raises(StorageError, match=r"^nofilesystem://nowhere/x cannot be listed: .*UnsupportedFileSystem"):
        read.images("nofilesystem://nowhere/x", spark=spark)


def test_errors_carry_no_java_stack_trace(spark: Any, tmp_path: Path) -> None:
    for path in (f"{tmp_path}/nowhere", "nofilesystem://nowhere/x"):
        with pytest.raises(StorageError) as caught:
            read.images(path, spark=spark)
        assert "\n" not in str(caught.value)
        assert "\tat " not in str(caught.value)


def test_arguments_that_cannot_work_are_refused(spark: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"path=.* names nothing to read"):
        read.images([], spark=spark)
    with pytest.raises(ConfigError, match="partitions=0"):
        read.images(folder, spark=spark, partitions=0)


# Pieces


def _sizes(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import resource

    for batch in batches:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield pa.RecordBatch.from_pydict({"rows": [len(batch)], "bytes": [batch.nbytes], "peak": [peak_bytes]})


SIZES = "rows long, bytes long, peak long"


@pytest.mark.sessions
def test_many_small_photos_are_read_in_few_partitions(spark: Any, tmp_path: Path) -> None:
    for number in range(300):
        path = tmp_path / f"c{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(a_png(number % 256))
    sizes = read.images(tmp_path, spark=spark).mapInArrow(_sizes, SIZES).collect()
    assert sum(row.rows for row in sizes) == 300
    if _batches_are_bounded(spark):
        assert 2 <= len(sizes) <= 5  # Spark alone makes ten of 30
    sizes = read.images(tmp_path, spark=spark, partitions=1).mapInArrow(_sizes, SIZES).collect()
    assert [row.rows for row in sizes] == [300]


@pytest.mark.slow
def test_a_gigabyte_of_photos_never_fills_a_worker(spark: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(4 * 2**20)
    for number in range(256):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(number.to_bytes(4, "big") + noise)
    baseline = spark.range(1, numPartitions=1).mapInArrow(_sizes, SIZES).collect()[0].peak
    sizes = read.images(tmp_path, spark=spark).mapInArrow(_sizes, SIZES).collect()
    assert sum(row.rows for row in sizes) == 256
    assert max(row.bytes for row in sizes) <= 130 * 2**20
    assert max(row.peak for row in sizes) - baseline <= 400 * 2**20
    if _batches_are_bounded(spark):
        assert max(row.bytes for row in sizes) <= 70 * 2**20


def test_filters_on_path_and_label_open_no_other_file(spark: Any, folder: Path) -> None:
    frame = read.images(folder, spark=spark)
    for name in ("cats/1.png", "cats/2.png"):
        (folder / name).unlink()  # whoever opens these now fails
    assert sorted(found(frame.where("label = 'dogs'"))) == ["dogs/1.png", "dogs/9.png"]
    assert sorted(found(frame.where("path like '%dogs%'"))) == ["dogs/1.png", "dogs/9.png"]


# Together with the image step


@pytest.mark.sessions
def test_rows_reach_the_image_step_on_workers(spark: Any, folder: Path) -> None:
    (folder / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (folder / "cats" / "empty.jpg").write_bytes(b"")
    step = ImageStep("x", size=(4, 4), resize="none", channels="L")

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            packed = step.pack(batch)
            values = iter(packed.arrays["x"][:, 0, 0, 0].tolist())
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column(0),
                    pa.array([None if row in packed.errors else next(values) for row in range(len(batch))], pa.int64()),
                    pa.array([packed.errors.get(row) for row in range(len(batch))], pa.string()),
                ],
                ["path", "value", "error"],
            )

    rows = read.images(folder, spark=spark).mapInArrow(decode, "path string, value long, error string").collect()
    got = {os.path.basename(os.path.dirname(row.path)) + "/" + os.path.basename(row.path): row for row in rows}
    assert {name: row.value for name, row in got.items() if row.error is None} == {
        "cats/1.png": 0,
        "cats/2.png": 1,
        "dogs/1.png": 2,
        "dogs/9.png": 3,
    }
    assert got["cats/empty.jpg"].error == "the file is empty"
    assert "cannot be decoded" in got["cats/broken.jpg"].error


@pytest.mark.sessions
def test_sparks_own_image_source_gives_the_same_pixels(spark: Any, tmp_path: Path) -> None:
    """BGR, grey, with alpha, and a file it cannot read, from Spark's `image` source through the step."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3].copy()).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[..., 0].copy()).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    step = ImageStep("x", column="image", size=(6, 5), resize="none")

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            packed = step.pack(batch)
            good = [row for row in range(len(batch)) if row not in packed.errors]
            origins = batch.column(0).field("origin").to_pylist()
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array([origins[row] for row in good] + [origins[row] for row in packed.errors], pa.string()),
                    pa.array([x.tobytes() for x in packed.arrays["x"]] + [None] * len(packed.errors), pa.binary()),
                ],
                ["origin", "pixels"],
            )

    frame = spark.read.format("image").load(str(tmp_path)).select("image")
    rows = {
        os.path.basename(r.origin): r.pixels for r in frame.mapInArrow(decode, "origin string, pixels binary").collect()
    }
    assert bytes(rows["rgb.png"]) == bytes(rows["rgba.png"]) == pixels[..., :3].tobytes()
    assert bytes(rows["grey.png"]) == np.repeat(pixels[..., :1], 3, axis=2).tobytes()
    assert rows["broken.png"] is None


@pytest.mark.sessions
def test_rows_of_sparks_image_source_get_the_columns_of_files(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "two cats+1").mkdir()
    Image.new("RGB", (3, 2), (250, 20, 10)).save(tmp_path / "two cats+1" / "a 1.png")
    frame = spark.read.format("image").load(f"{tmp_path}/*")
    step = ImageStep("x", size=(1, 1), channels="RGB")

    def first(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            pixels = step.pack(batch).arrays["x"][:, 0, 0].tolist()
            yield pa.RecordBatch.from_arrays(
                [batch.column(0), batch.column(1), pa.array(pixels, pa.list_(pa.int32()))], ["path", "label", "pixel"]
            )

    rows = read.images(frame, partitions=1)
    assert rows.columns == ["path", "label", "content"]
    (row,) = rows.mapInArrow(first, "path string, label string, pixel array<int>").collect()
    assert row.path == read.images(tmp_path, spark=spark).head().path
    assert (row.label, row.pixel) == ("two cats+1", [250, 20, 10])
    told = frame.selectExpr("image", "'dogs' as label")
    assert [row.label for row in read.images(told).select("label").collect()] == ["dogs"]
    with pytest.raises(DataError, match=r"has 0 columns of images .*: path, label\."):
        read.images(rows.drop("content"))


@pytest.mark.needs_data
def test_real_photos_come_with_their_classes(spark: Any, data_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        frame = read.images(data_dir / "caltech101_mini", spark=spark)
    counts = {row.label: row["count"] for row in frame.groupBy("label").count().collect()}
    assert counts.keys() == {path.name for path in (data_dir / "caltech101_mini").iterdir() if path.is_dir()}
    assert set(counts.values()) == {30}
