"""Pack, shuffle, spool: rows leave a DataFrame as blobs and arrive at their worker as memory-mapped columns.

`pack_rows` runs in a Spark task before the shuffle: preparation, frozen prefix, split by worker. `Spool` runs in the
training task after it: blobs to column files on local disk. Order is not decided here (see `order.py`).
torch is imported inside functions: thread settings must stand first.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kindling.errors import DataError, KindlingError, StorageError, to_wire
from kindling.train.order import mix, owner_of, shard_of, static_order

if TYPE_CHECKING:
    from kindling.ship import ModuleSpec

HASH = "__kindling_hash"
KEY = "__kindling_key"
BLOB_SCHEMA = "key long, stream int, rows long, notes string, blob binary"
_ARROW_SCHEMA = pa.schema(
    [("key", pa.int64()), ("stream", pa.int32()), ("rows", pa.int64()), ("notes", pa.string()), ("blob", pa.binary())]
)
TRAIN, VALIDATION = 0, 1
_STREAMS = {TRAIN: "training data", VALIDATION: "validation data"}
_FLUSH_BYTES = 32 << 20
_EXAMPLES = 5
_PART_BYTES = 64 << 10
_BUCKET_BYTES = 128 << 20
_MOST_BUCKETS = 256
"""Files that are open at the same time."""

PackedSpec = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class PrefixSpec:
    """The frozen front part of a net, run once per row while packing."""

    module: ModuleSpec
    signature: Mapping[str, Any]
    precision: str
    batch_size: int


@dataclass(frozen=True, slots=True)
class PackSpec:
    """All that `pack_rows` needs; picklable, holds no torch and no Spark object."""

    preparation: Mapping[str, Any]
    """As JSON. Its targets are packed beside its inputs."""
    prefix: PrefixSpec | None
    routes: tuple[int, ...]
    """Shuffle key of each worker."""
    stream: int
    drop_broken: bool
    threads: int = 1


def pack_rows(spec: PackSpec, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Body of a packing task: rows in, blobs out. Columns read: the preparation's, HASH, and KEY for messages.

    What cannot go on ends as a note to the workers, who all give it up: the task itself does not fail, so Spark does
    not try again what would fail again.
    """
    out = _Outbox(spec)
    try:
        yield from _pack(spec, batches, out)
    except KindlingError as error:
        out.note({"fatal": to_wire(error)})
    yield from out.rest()


def _pack(spec: PackSpec, batches: Iterator[pa.RecordBatch], out: _Outbox) -> Iterator[pa.RecordBatch]:
    from kindling.threads import settle

    settle(spec.threads)
    from kindling.prepare import Preparation

    preparation = Preparation.from_json(spec.preparation)
    engine = _open_engine(spec.prefix, preparation) if spec.prefix else None
    target_columns = [name for step in preparation.targets for name in step.packed_spec()]
    waiting: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    waiting_rows = 0
    broken = count = content = 0
    examples: list[tuple[str, str]] = []

    def flush_waiting(everything: bool) -> None:
        """Run the prefix over whole batches of its size; keep the remainder for the next rows."""
        nonlocal waiting, waiting_rows
        if not waiting or engine is None:
            return
        arrays = {name: np.concatenate([part[0][name] for part in waiting]) for name in waiting[0][0]}
        hashes = np.concatenate([part[1] for part in waiting])
        whole = len(hashes) if everything else len(hashes) // engine.batch_size * engine.batch_size
        if whole:
            features = engine.run({n: a[:whole] for n, a in arrays.items() if n not in target_columns})
            out.add({**features, **{n: arrays[n][:whole] for n in target_columns}}, hashes[:whole])
        rest = {n: a[whole:] for n, a in arrays.items()}
        waiting, waiting_rows = ([(rest, hashes[whole:])], len(hashes) - whole) if whole < len(hashes) else ([], 0)

    for rows in batches:
        if rows.num_rows == 0:
            continue
        packed = preparation.pack(rows, targets=True)
        hashes = np.asarray(rows.column(rows.schema.get_field_index(HASH))).view(np.uint64)
        if packed.errors:
            keys = rows.column(rows.schema.get_field_index(KEY))
            found = [(str(keys[row].as_py()), why) for row, why in packed.errors.items()]
            if not spec.drop_broken:
                key, why = found[0]
                raise DataError(
                    f"row {key!r} cannot be trained on: {why}. "
                    "Mend or remove it, or leave such rows out with on_error='drop'."
                )
            broken += len(found)
            examples += found[: _EXAMPLES - len(examples)]
            hashes = np.delete(hashes, list(packed.errors))
        count += len(hashes)
        content += content_sum(packed.arrays, hashes)
        if engine is None:
            out.add(dict(packed.arrays), hashes)
        elif len(hashes):
            waiting.append((dict(packed.arrays), hashes))
            waiting_rows += len(hashes)
            if waiting_rows >= engine.batch_size:
                flush_waiting(everything=False)
        yield from out.full()
    flush_waiting(everything=True)
    if count:
        out.note({"rows": count, "content": content})
    if broken:
        out.note({"broken": broken, "examples": examples})


def content_sum(arrays: Mapping[str, np.ndarray], hashes: np.ndarray) -> int:
    """A number that tells whether rows are the same as before, whatever their order: a sum over one hash of each.

    Args:
        arrays: packed columns of the rows, each of shape (n, ...).
        hashes: of their keys, shape (n,), uint64.
    Returns: the sum, not yet taken modulo 2**64.

    >>> columns, keys = {"x": np.array([[1.0, 2.0], [3.0, 4.0]])}, np.array([7, 8], np.uint64)
    >>> whole = content_sum(columns, keys)
    >>> whole == sum(content_sum({"x": columns["x"][i : i + 1]}, keys[i : i + 1]) for i in (1, 0))
    True
    >>> whole == content_sum(columns, keys[::-1])
    False
    """
    if not len(hashes):
        return 0
    total = mix(hashes)
    for number, (_, array) in enumerate(sorted(arrays.items())):
        raw = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
        whole = raw.shape[1] // 8 * 8
        words = raw[:, :whole].view(np.uint64) if whole else np.zeros((len(raw), 0), np.uint64)
        told = words @ (mix(np.arange(words.shape[1], dtype=np.uint64)) | np.uint64(1))
        rest = np.zeros((len(raw), 8), np.uint8)
        rest[:, : raw.shape[1] - whole] = raw[:, whole:]
        total = mix(total ^ mix(told, 1) ^ mix(rest.view(np.uint64)[:, 0], 2), number)
    return int((total >> np.uint64(32)).sum()) * 2**32 + int((total & np.uint64(0xFFFFFFFF)).sum())


def data_fingerprint(notes: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows and content of each stream, from the packing tasks' notes; equal for equal rows in any order and split.

    >>> data_fingerprint([{"stream": TRAIN, "rows": 2, "content": 5}, {"stream": TRAIN, "rows": 1, "content": 2**64}])
    {'training data': {'rows': 3, 'content': '0000000000000005'}}
    """
    found: dict[str, dict[str, Any]] = {}
    for note in notes:
        if "content" in note:
            of = found.setdefault(_STREAMS[note["stream"]], {"rows": 0, "content": 0})
            of["rows"] += note["rows"]
            of["content"] += note["content"]
    return {name: {"rows": of["rows"], "content": f"{of['content'] % 2**64:016x}"} for name, of in found.items()}


def _open_engine(prefix: PrefixSpec, preparation: Any) -> Any:
    from kindling import ship
    from kindling.predict.engine import Engine, keep_freed_memory
    from kindling.signature import Signature

    keep_freed_memory()

    return Engine(
        ship.open_module(prefix.module),
        Signature.from_json(prefix.signature),
        preparation,
        precision=prefix.precision,
        batch_size=prefix.batch_size,
    )


class _Outbox:
    """Packed rows by worker, until there are enough bytes to send."""

    def __init__(self, spec: PackSpec) -> None:
        self._spec = spec
        self._parts: dict[int, list[tuple[dict[str, np.ndarray], np.ndarray]]] = {}
        self._bytes = 0
        self._notes: list[dict[str, Any]] = []

    def add(self, arrays: Mapping[str, np.ndarray], hashes: np.ndarray) -> None:
        owners = owner_of(shard_of(hashes), len(self._spec.routes))
        for worker in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == worker)
            part = {name: array[mine] for name, array in arrays.items()}
            self._parts.setdefault(worker, []).append((part, hashes[mine]))
            self._bytes += sum(array.nbytes for array in part.values())

    def note(self, note: dict[str, Any]) -> None:
        self._notes.append(note)

    def full(self) -> Iterator[pa.RecordBatch]:
        if self._bytes >= _FLUSH_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[pa.RecordBatch]:
        rows: list[tuple[int, int, str | None]] = []
        blobs: list[list[pa.RecordBatch]] = []
        for worker, parts in sorted(self._parts.items()):
            rows.append((self._spec.routes[worker], sum(len(hashes) for _, hashes in parts), None))
            blobs.append([to_batch(arrays, hashes) for arrays, hashes in _no_crumbs(parts)])
        for note in self._notes:
            rows.append((self._spec.routes[0], 0, json.dumps(note)))
            blobs.append([])
        self._parts, self._bytes, self._notes = {}, 0, []
        if rows:
            keys, counts, notes = zip(*rows, strict=True)
            streams = [self._spec.stream] * len(rows)
            columns = [
                pa.array(column, kind.type)
                for column, kind in zip((keys, streams, counts, notes), _ARROW_SCHEMA, strict=False)
            ]
            yield pa.RecordBatch.from_arrays([*columns, _written(blobs)], schema=_ARROW_SCHEMA)


def _no_crumbs(parts: list[tuple[dict[str, np.ndarray], np.ndarray]]) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The parts, or one of all where they are small: each is a record batch, which has a price of its own."""
    if sum(array.nbytes for arrays, _ in parts for array in arrays.values()) >= len(parts) * _PART_BYTES:
        return parts
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return [(arrays, np.concatenate([part[1] for part in parts]))]


def to_batch(arrays: Mapping[str, np.ndarray], hashes: np.ndarray) -> pa.RecordBatch:
    """Rows as Arrow: a fixed-size binary column per packed column, and the hashes; over the arrays' own memory."""
    columns: dict[str, pa.Array] = {HASH: pa.array(hashes.view(np.int64))}
    for name, array in arrays.items():
        width = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        data = pa.py_buffer(np.ascontiguousarray(array))
        columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, data])
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def to_blob(batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
    """Record batches of one worker as an Arrow IPC stream.

    >>> rows = to_batch({"x": np.arange(3)}, np.arange(3, dtype=np.uint64))
    >>> [len(batch) for batch in pa.ipc.open_stream(to_blob([rows, rows]))]
    [3, 3]
    """
    return _written([batches])[0].as_buffer()


def _written(blobs: Sequence[Sequence[pa.RecordBatch]]) -> pa.Array:
    """A binary column of IPC streams, each row's bytes copied once, into memory of the right size. None: no bytes."""
    size = pa.MockOutputStream()
    ends = [0]
    for batches in blobs:
        _write(size, batches)
        ends.append(size.tell())
    data = pa.allocate_buffer(ends[-1])
    sink = pa.FixedSizeBufferWriter(data)
    for batches in blobs:
        _write(sink, batches)
    return pa.Array.from_buffers(pa.binary(), len(blobs), [None, pa.py_buffer(np.array(ends, np.int32)), data])


def _write(sink: pa.NativeFile, batches: Sequence[pa.RecordBatch]) -> None:
    if batches:
        with pa.ipc.new_stream(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


@dataclass(frozen=True, slots=True)
class Rows:
    """The spooled rows of one stream, in order of arrival."""

    hashes: np.ndarray
    """Shape (n,), uint64."""
    columns: Mapping[str, np.ndarray]
    """Memory-mapped, shape (n, ...)."""

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all columns."""
        return sum(column.itemsize * int(np.prod(column.shape[1:], dtype=np.int64)) for column in self.columns.values())

    def content_of(self, row: int) -> bytes:
        """The packed bytes of one row."""
        return b"".join(column[row].tobytes() for _, column in sorted(self.columns.items()))

    def will_need(self, first: int, last: int) -> None:
        """Let the kernel read rows from the first up to before the last, in one go."""
        for column in self.columns.values():
            memory = getattr(column, "_mmap", None)
            if memory is not None:
                row = column.nbytes // len(column)
                start = first * row // mmap.PAGESIZE * mmap.PAGESIZE
                memory.madvise(mmap.MADV_WILLNEED, start, last * row - start)

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of some rows, in memory that torch allocated: bits may depend on alignment, and torch's is fixed."""
        import torch

        gathered = {}
        for name, column in self.columns.items():
            out = torch.empty((len(rows), *column.shape[1:]), dtype=getattr(torch, column.dtype.name)).numpy()
            np.take(column, rows, axis=0, out=out, mode="clip")  # "raise" would buffer the whole output once more
            gathered[name] = out
        return gathered


def told(rows: Rows, tell: Callable[[], None]) -> Rows:
    """The same rows; `tell` is called with each batch that is taken of them."""

    class Told(Rows):
        def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
            tell()
            return super().gather(rows)

    return Told(rows.hashes, rows.columns)


def _write_all(file: Any, data: Any) -> None:
    left = memoryview(data)
    if left.nbytes:
        left = left.cast("B")
    while len(left):  # the kernel may take a part: of what is very large, or where the disk is nearly full
        left = left[file.write(left) :]


class Spool:
    """Column files of one worker, one set per stream, on the local disk of Spark.

    The files have no name from the start, so the kernel removes them with the process, however that ends.
    """

    def __init__(self, spec: PackedSpec) -> None:
        self._folder = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or tempfile.gettempdir()
        self._spec = dict(spec)
        self._files: dict[tuple[int, str], Any] = {}
        self._hashes: dict[int, list[np.ndarray]] = {TRAIN: [], VALIDATION: []}
        self.notes: list[dict[str, Any]] = []
        self.bytes = 0

    def add(self, stream: int, blob: bytes | memoryview | pa.Buffer, notes: str | None) -> None:
        """Append the rows of one blob.

        Raises: StorageError, when the local disk is full.
        """
        if notes:
            self.notes.append({**json.loads(notes), "stream": stream})
        if not len(blob):
            return
        for batch in pa.ipc.open_stream(pa.py_buffer(blob)):
            self._append(stream, batch)

    def _append(self, stream: int, batch: pa.RecordBatch) -> None:
        self._hashes[stream].append(np.asarray(batch.column(HASH)).view(np.uint64).copy())
        for name in self._spec:
            column = batch.column(name)
            width = column.type.byte_width
            data = memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
            with self._telling():
                file = self._files.get((stream, name))
                if file is None:
                    file = self._files[stream, name] = self._open()
                _write_all(file, data)
            self.bytes += len(data)

    def _open(self) -> Any:
        os.makedirs(self._folder, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._folder, buffering=0)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"rows could not be spooled to {self._folder}: {error}. Free the disk or set SPARK_LOCAL_DIRS."
            ) from error

    def rows(self, stream: int) -> Rows:
        """All rows of a stream, memory-mapped, as they came. Call after the last `add`."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes[stream]])
        columns: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in self._spec.items():
            full = (len(hashes), *shape)
            file = self._files.pop((stream, name), None)
            columns[name] = np.memmap(file, dtype, "r", shape=full) if len(hashes) else np.empty(full, dtype)
            if file is not None:
                file.close()  # the mapping keeps it
        return Rows(hashes, columns)

    def in_order(self, rows: Rows, beat: Callable[[], None]) -> Rows:
        """The same rows in static order (`order.static_order`) on disk, for blocks to be read in one go.

        They are read and written twice, in long stretches: a disk that must seek does so rarely. So first they go into
        buckets of rows that belong together, then each bucket is put in order.

        Args: beat: called now and then.
        Raises: StorageError, when the local disk is full.
        """
        order = static_order(rows.hashes, rows.content_of)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        columns = {}
        for name, column in rows.columns.items():
            with self._telling():
                columns[name] = self._ordered(column, place, beat) if len(order) else column
        return Rows(rows.hashes[order], columns)

    def _ordered(self, column: np.ndarray, place: np.ndarray, beat: Callable[[], None]) -> np.ndarray:
        """A memory-mapped copy of a column whose row r stands at `place[r]`."""
        row_bytes = max(1, column.nbytes // len(column))
        count = min(_MOST_BUCKETS, -(-column.nbytes // _BUCKET_BYTES), len(column)) or 1
        per_bucket = -(-len(column) // count)
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(self._open()) for _ in range(count)]
            arrived: list[list[np.ndarray]] = [[] for _ in buckets]
            stretch = max(1, _BUCKET_BYTES // 2 // row_bytes)
            for start in range(0, len(column), stretch):
                beat()
                places = place[start : start + stretch]
                by_bucket = np.argsort(places // per_bucket, kind="stable")
                rows = np.take(column[start : start + stretch], by_bucket, axis=0)
                stops = np.cumsum(np.bincount(places // per_bucket, minlength=count))[:-1]
                for number, (part, mine) in enumerate(
                    zip(np.split(rows, stops), np.split(places[by_bucket], stops), strict=True)
                ):
                    _write_all(buckets[number], part)
                    arrived[number].append(mine)
            with self._open() as file:
                for bucket, places_of in zip(buckets, arrived, strict=True):
                    beat()
                    places = np.concatenate(places_of)
                    if len(places):
                        there = np.memmap(bucket, column.dtype, "r", shape=(len(places), *column.shape[1:]))
                        _write_all(file, np.take(there, np.argsort(places), axis=0))
                return np.memmap(file, column.dtype, "r", shape=column.shape)

    def close(self) -> None:
        """Let go of files no rows were asked of."""
        for file in self._files.values():
            file.close()
        self._files.clear()
