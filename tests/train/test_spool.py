"""Blobs keep rows as they are, from any number of parts, and a spool leaves nothing on disk."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kindling import threads
from kindling.errors import StorageError
from kindling.prepare import ArrayStep, Preparation, ValueStep
from kindling.train.order import owner_of, shard_of, static_order
from kindling.train.spool import (
    HASH,
    TRAIN,
    VALIDATION,
    PackSpec,
    Spool,
    content_sum,
    data_fingerprint,
    pack_rows,
    to_batch,
    to_blob,
)

SPEC = {"image": ("uint8", (2, 3)), "label": ("int64", ())}


@pytest.fixture(autouse=True)
def _local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))


def _part(rows: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {"image": rng.integers(0, 255, (rows, 2, 3), dtype=np.uint8), "label": rng.integers(0, 9, rows)}
    return arrays, rng.integers(0, 2**64, rows, dtype=np.uint64)


def test_rows_come_back_as_they_went() -> None:
    spool = Spool(SPEC)
    parts = [_part(rows, seed) for seed, rows in enumerate((5, 0, 1, 30))]
    for arrays, hashes in parts:
        spool.add(TRAIN, to_blob([to_batch(arrays, hashes)]), None)
    spool.add(VALIDATION, to_blob([to_batch(*_part(4, 9))]), None)
    spool.add(TRAIN, b"", '{"broken": 2, "examples": []}')
    rows = spool.rows(TRAIN)
    assert len(rows) == 36
    assert spool.notes == [{"broken": 2, "examples": [], "stream": TRAIN}]
    np.testing.assert_array_equal(rows.hashes, np.concatenate([hashes for _, hashes in parts]))
    for name in SPEC:
        np.testing.assert_array_equal(rows.columns[name], np.concatenate([arrays[name] for arrays, _ in parts]))
    picked = rows.gather(np.array([35, 0, 0]))
    np.testing.assert_array_equal(picked["image"], rows.columns["image"][[35, 0, 0]])
    assert picked["image"].ctypes.data % 64 == 0
    assert len(spool.rows(VALIDATION)) == 4
    spool.close()
    np.testing.assert_array_equal(rows.hashes, np.concatenate([hashes for _, hashes in parts]))


@pytest.mark.parametrize(("bucket", "most"), [(1 << 20, 256), (64, 256), (64, 3), (1, 2)])
def test_rows_are_put_in_order_on_disk(bucket: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kindling.train.spool._BUCKET_BYTES", bucket)
    monkeypatch.setattr("kindling.train.spool._MOST_BUCKETS", most)
    spool = Spool(SPEC)
    for seed in range(3):
        arrays, hashes = _part(70, seed)
        hashes[5:9] = 7  # told apart by their content
        spool.add(TRAIN, to_blob([to_batch(arrays, hashes)]), None)
    came, beats = spool.rows(TRAIN), []
    order = static_order(came.hashes, came.content_of)
    rows = spool.in_order(came, lambda: beats.append(1))
    assert beats
    np.testing.assert_array_equal(rows.hashes, came.hashes[order])
    for name in SPEC:
        np.testing.assert_array_equal(rows.columns[name], came.columns[name][order])
        assert rows.columns[name].dtype == came.columns[name].dtype
    rows.will_need(3, 200)
    rows.will_need(209, 210)
    assert len(spool.in_order(spool.rows(VALIDATION), lambda: None)) == 0


def test_a_full_disk_is_told_while_rows_are_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(SPEC)
    spool.add(TRAIN, to_blob([to_batch(*_part(70, 0))]), None)
    rows = spool.rows(TRAIN)

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "_open", lambda self: Full())
    with pytest.raises(StorageError, match=r"could not be spooled to .*No space left on device.*Free the disk"):
        spool.in_order(rows, lambda: None)


def _told(parts: list[tuple[dict[str, np.ndarray], np.ndarray]]) -> object:
    return data_fingerprint(
        {"stream": TRAIN, "rows": len(hashes), "content": content_sum(arrays, hashes)} for arrays, hashes in parts
    )


def test_the_fingerprint_of_rows_depends_on_rows_alone() -> None:
    arrays, hashes = _part(40, 0)
    whole = _told([(arrays, hashes)])
    order = np.random.default_rng(1).permutation(40)
    parts = [({name: a[mine] for name, a in arrays.items()}, hashes[mine]) for mine in np.split(order, [3, 3, 20])]
    assert _told(parts) == whole
    for name in SPEC:  # one number of one row
        changed = {**arrays, name: arrays[name].copy()}
        changed[name].reshape(40, -1)[7, -1] += 1
        assert _told([(changed, hashes)]) != whole
    other = int((arrays["label"] != arrays["label"][0]).argmax())
    exchanged = arrays["label"].copy()
    exchanged[[0, other]] = exchanged[[other, 0]]
    swapped = {**arrays, "label": exchanged}
    assert _told([(swapped, hashes)]) != whole
    mirrored = {**arrays, "image": arrays["image"][:, :, ::-1]}
    assert _told([(mirrored, hashes)]) != whole
    fewer = {name: a[1:] for name, a in arrays.items()}
    assert _told([(fewer, hashes[1:])]) != whole


def test_no_rows_at_all() -> None:
    spool = Spool(SPEC)
    rows = spool.rows(TRAIN)
    assert len(rows) == 0
    assert rows.gather(np.empty(0, np.int64))["image"].shape == (0, 2, 3)
    spool.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
def test_nothing_is_left_on_disk_even_by_a_killed_process(tmp_path: Path) -> None:
    spool = Spool(SPEC)
    spool.add(TRAIN, to_blob([to_batch(*_part(5, 0))]), None)
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    opened = [os.readlink(link) for link in links if link.is_symlink()]
    assert [name for name in opened if name.startswith(str(tmp_path))], "the rows lie in the folder of Spark"
    assert not list(tmp_path.iterdir()), "and have no name there, so that nothing has to be removed"
    spool.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(SPEC)
    monkeypatch.setattr(spool, "_open", lambda: open("/dev/full", "wb", buffering=0))
    with pytest.raises(StorageError, match="could not be spooled"):
        spool.add(TRAIN, to_blob([to_batch(*_part(5, 0))]), None)
    spool.close()


@pytest.mark.parametrize("batch_rows", [1, 7, 40], ids=lambda rows: f"{rows} rows a batch")
@pytest.mark.parametrize("width", [3, 30_000], ids=["narrow", "wide"])
def test_packed_rows_reach_their_worker_whole_however_they_were_batched(
    batch_rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "settle", lambda n: None)  # a worker of its own sets its threads; this is not one
    rng = np.random.default_rng(width)
    values, hashes = rng.random((40, width), np.float32), rng.integers(0, 2**64, 40, np.uint64)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    table = pa.table({"x": lists, "y": pa.array(np.arange(40.0)), HASH: pa.array(hashes.view(np.int64))})
    preparation = Preparation((ArrayStep("x", "x", (width,)),), (ValueStep("target", "y", ()),))
    spec = PackSpec(
        preparation=preparation.to_json(), prefix=None, routes=(10, 11, 12), stream=TRAIN, drop_broken=False
    )
    spools = {key: Spool(preparation.packed_spec(targets=True)) for key in spec.routes}
    for packed in pack_rows(spec, iter(table.to_batches(max_chunksize=batch_rows))):
        packed.validate(full=True)
        for key, blob, notes in zip(*(packed.column(name) for name in ("key", "blob", "notes")), strict=True):
            spools[key.as_py()].add(TRAIN, blob.as_buffer(), notes.as_py())
    seen: list[int] = []
    for worker, key in enumerate(spec.routes):
        rows = spools[key].rows(TRAIN)
        assert set(owner_of(shard_of(rows.hashes), 3)) <= {worker}
        numbers = rows.columns["target"].astype(int).tolist()
        np.testing.assert_array_equal(rows.hashes, hashes[numbers])
        np.testing.assert_array_equal(rows.columns["x"], values[numbers])
        seen += numbers
        spools[key].close()
    assert sorted(seen) == list(range(40))
