"""Every kind of place against one list of promises."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kindling import storage
from kindling.errors import StorageError
from kindling.storage import FsspecPlace, LocalPlace, Place, open_place

ODD = "a folder/ünï コード/50% off [1] {2}"


@pytest.fixture
def clean_memory() -> Iterator[None]:
    import fsspec

    yield
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def keep_promises(place: Place, local: Path) -> None:
    """What every place does alike."""
    assert place.list() == []
    assert not place.exists("a.bin")
    place.makedirs()
    place.write("a.bin", b"one")
    place.write("a.bin", b"")
    assert place.read("a.bin") == b""
    place.write("a.bin", b"two")
    assert place.read("a.bin") == b"two"
    assert place.size("a.bin") == 3
    assert place.exists("a.bin")
    assert place.exists("")
    place.write("checkpoints/7/part 1.json", b"{}")
    place.write("checkpoints/10/ünï.json", b"[]")
    assert place.list() == ["a.bin", "checkpoints/10/ünï.json", "checkpoints/7/part 1.json"]
    assert place.list("checkpoints/7") == ["checkpoints/7/part 1.json"]
    assert place.list("nothing") == []
    assert place.exists("checkpoints/7")
    big = os.urandom(9_000_001)
    (local / "big").write_bytes(big)
    place.upload(local / "big", "deep/big.bin")
    assert place.size("deep/big.bin") == len(big)
    place.download("deep/big.bin", str(local / "back"))
    assert (local / "back").read_bytes() == big
    with place.new_file("deep/new.bin") as path:
        path.write_bytes(b"three")
    assert place.read("deep/new.bin") == b"three"
    with pytest.raises(StorageError, match=r"half\.bin"), place.new_file("deep/half.bin") as path:
        (path / "below a file").write_bytes(b"fo")
    assert not place.exists("deep/half.bin")
    place.delete("deep/new.bin")
    with pytest.raises(StorageError, match="nothing"):
        place.read("nothing")
    with pytest.raises(StorageError, match="nothing"):
        place.size("nothing")
    with pytest.raises(StorageError, match="nothing"):
        place.upload(local / "nothing", "x")
    assert not place.exists("x")
    place.delete("a.bin")
    place.delete("a.bin")
    assert not place.exists("a.bin")
    place.delete("checkpoints")
    assert place.list() == ["deep/big.bin"]
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(StorageError, match="no name inside a place"):
            place.read(name)


def test_a_local_folder_keeps_them(tmp_path: Path) -> None:
    keep_promises(open_place(tmp_path / ODD), tmp_path)
    assert (tmp_path / ODD / "deep/big.bin").exists()


def test_a_file_url_keeps_them(tmp_path: Path) -> None:
    place = open_place((tmp_path / ODD).as_uri() + "/")
    assert place.local == tmp_path / ODD
    keep_promises(place, tmp_path)


@pytest.mark.usefixtures("clean_memory")
def test_fsspec_keeps_them(tmp_path: Path) -> None:
    place = open_place("memory://bucket/a folder/")
    assert isinstance(place, FsspecPlace)
    keep_promises(place, tmp_path)


def test_fsspec_without_object_store_keeps_them(tmp_path: Path) -> None:
    place = FsspecPlace(f"local://{tmp_path}/{ODD}")
    keep_promises(place, tmp_path)
    assert not list(tmp_path.rglob(f"*{storage._PART}"))


def is_classic(spark: Any) -> bool:
    return "connect" not in type(spark).__module__.split(".")


@pytest.mark.spark
def test_sparks_own_file_systems_keep_them(spark: Any, tmp_path: Path) -> None:
    if not is_classic(spark):
        pytest.skip("Spark Connect has a test of its own")
    place = storage.hadoop_place(f"file:{tmp_path}/{ODD}", spark)
    keep_promises(place, tmp_path)
    assert not list(tmp_path.rglob(f"*{storage._PART}*"))
    assert (tmp_path / ODD / "deep/big.bin").exists()


@pytest.mark.spark
def test_a_scheme_that_spark_does_not_know_is_one_sentence(spark: Any) -> None:
    with pytest.raises(StorageError) as caught:
        open_place("nosuchfs://host/x", spark)
    assert "\n" not in str(caught.value)
    assert "neither by Spark nor by fsspec" in str(caught.value) or not is_classic(spark)


CONNECT = """
import os, sys
from pathlib import Path
import pytest
import kindling
from kindling import storage
from kindling.errors import StorageError

folder = Path(sys.argv[1])
spark = kindling.spark(remote="local[1]", conf={
    "spark.ui.enabled": "false", "spark.sql.artifact.copyFromLocalToFs.allowDestLocal": "true"})
place = storage.hadoop_place(f"file:{folder}/a place [1] {{2}}/", spark)
assert isinstance(place, storage.ConnectPlace)
assert place.list() == [] and not place.exists("a.bin")
place.makedirs()
place.write("a.bin", b"one")
place.write("a.bin", b"two")
assert place.read("a.bin") == b"two" and place.size("a.bin") == 3 and place.exists("a.bin")
big = os.urandom(9_000_001)
(folder / "big").write_bytes(big)
place.upload(folder / "big", "deep/ünï.bin")
place.download("deep/ünï.bin", folder / "back")
assert (folder / "back").read_bytes() == big
assert place.list() == ["a.bin", "deep/ünï.bin"], place.list()
assert place.list("deep") == ["deep/ünï.bin"]
for call in (lambda: place.read("nothing"), lambda: place.delete("a.bin"), lambda: place.upload("/nothing", "x")):
    with pytest.raises(StorageError) as caught:
        call()
    assert "\\n" not in str(caught.value), caught.value
elsewhere = storage.hadoop_place("hdfs://nowhere:1/x", spark)
with pytest.raises(StorageError) as caught:
    elsewhere.write("a", b"1")
assert len(str(caught.value)) < 900, caught.value
spark.stop()
print("ALL GOOD")
"""


@pytest.mark.spark
@pytest.mark.slow
def test_spark_connect_reads_and_writes(tmp_path: Path) -> None:
    """In a process of its own: Classic and Connect cannot share one."""
    import pyspark

    if int(pyspark.__version__.split(".")[0]) < 4:
        pytest.skip("pyspark before 4.0 carries no Connect server")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONNECT), str(tmp_path)],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "ALL GOOD" in done.stdout, done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda p: "models/", lambda p: p / "models"),
        (lambda p: "./models/../other", lambda p: p / "other"),
        (lambda p: Path("models"), lambda p: p / "models"),
        (lambda p: f"{p}/x//y/", lambda p: p / "x" / "y"),
        (lambda p: f"file:{p}/x", lambda p: p / "x"),
        (lambda p: f"file://{p}/x%20y#1", lambda p: p / "x y#1"),
        (lambda p: f"FILE://{p}/x y", lambda p: p / "x y"),
        (lambda p: "run:1", lambda p: p / "run:1"),
        (lambda p: "C:relative", lambda p: p / "C:relative"),
        (lambda p: p / "memory:" / "x", lambda p: p / "memory:" / "x"),
    ],
)
def test_paths_mean_what_they_say(
    given: Callable[[Path], str | Path],
    expected: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    place = open_place(given(tmp_path))
    assert isinstance(place, LocalPlace)
    assert place.local == expected(tmp_path)
    assert place.path == str(expected(tmp_path))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_place("~/models").local == tmp_path / "models"


def test_what_nobody_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_active_session", lambda: None)
    with pytest.raises(StorageError, match=r"nosuchfs.*give the Spark session"):
        open_place("nosuchfs://host/x")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_active_session", lambda: None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match="gcsfs"):
        open_place("gs://bucket/x")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(tmp_path)
    place.write("a", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="disk full"):
        place.write("a", b"new")
    assert place.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot make the folder"):
        open_place(tmp_path / "file").makedirs()


def test_importing_storage_brings_no_spark() -> None:
    code = "import sys, kindling.storage as s; s.open_place('/tmp/x'); assert 'pyspark' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
