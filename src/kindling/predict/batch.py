"""A net over a DataFrame: featurise, predict, evaluate, all through one `mapInArrow`.

A task packs the rows it is sent, collects them until one net-sized batch is full, runs it, and hands on record batches
of bounded size, the kept columns beside the results, in the order of the rows. Rows that cannot be used carry the
reason. Featurised Parquet that grows and resumes is kept in `output.py`; the forward pass itself is `engine.py`.

Importing this module must not import torch: Spark workers open it before their thread counts are set.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from kindling import ship
from kindling.errors import ConfigError, DataError, did_you_mean
from kindling.prepare import LabelStep, ManyLabelsStep, Preparation, Step
from kindling.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

    from kindling.evaluate import Report, Tally
    from kindling.many_labels import LabelTally
    from kindling.model import Model
    from kindling.predict.engine import Engine, Precision

_LOG = logging.getLogger("kindling.predict")

ON_ERROR = ("keep", "drop", "fail")
SAMPLE_ROWS = 32
"""Rows on which bfloat16 is tried."""
_SAMPLE_BYTES = 16 << 20
_SAMPLE_TASKS = 2
_OUT_BYTES = 4 << 20
"""Results that are gathered before they leave a task, in bytes."""
_OUT_ROWS = 4096
_LISTED = 100
"""Broken rows that a report lists."""


# ------------------------------------------------------------------------------------------------------ on workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a task is told; holds no Spark object and opens without torch."""

    module: ship.ModuleSpec
    signature: Signature
    preparation: Preparation
    precision: str
    batch_size: int
    keep: tuple[str, ...]
    """Columns that pass through."""
    named_by: str | None
    """The column that names a row in messages."""
    on_error: str
    targets: bool
    """Whether the rows' targets are packed too."""
    finish: Finish
    """What becomes of the results."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive rows of a task and what the net made of them."""

    kept: list[pa.RecordBatch]
    good: np.ndarray
    """Which of the rows could be used, bool, shape (rows,)."""
    errors: dict[int, str]
    """Row of the block -> why it could not."""
    results: dict[str, np.ndarray]
    """Output -> float32, shape (good rows, ...)."""
    targets: dict[str, np.ndarray]
    """Packed targets of the good rows."""


Finish: TypeAlias = Callable[[Job, Iterator[Block]], Iterator[pa.RecordBatch]]


def run_job(job: Job, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Body of one task."""
    yield from job.finish(job, _blocks(job, open_engine(job), batches))


_engines: OrderedDict[str, Engine] = OrderedDict()


def open_engine(job: Job) -> Engine:
    """The engine of this job; kept while the Python worker lives, so that its later tasks do not open it again."""
    from kindling.threads import settle

    settle(_task_cpus())
    from kindling.predict.engine import Engine, keep_freed_memory

    keep_freed_memory()
    about = [job.signature.to_json(), job.preparation.to_json(), job.precision, job.batch_size]
    key = f"{job.module.weights} {zlib.crc32(job.module.architecture)} {json.dumps(about)}"
    if key not in _engines:
        while len(_engines) > 1:
            _engines.popitem(last=False)
        _engines[key] = Engine(
            ship.open_module(job.module),
            job.signature,
            job.preparation,
            precision=job.precision,
            batch_size=job.batch_size,
        )
    _engines.move_to_end(key)
    return _engines[key]


def _task_cpus() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    return max(1, context.cpus()) if context is not None else 1


def _blocks(job: Job, engine: Engine, batches: Iterable[pa.RecordBatch]) -> Iterator[Block]:
    """Blocks of as many usable rows as the net takes at once; the last may be shorter."""
    kept: list[pa.RecordBatch] = []
    errors: dict[int, str] = {}
    arrays: list[Mapping[str, np.ndarray]] = []
    rows = usable = 0
    target_columns = [name for step in job.preparation.targets for name in step.packed_spec()] if job.targets else []

    def block() -> Block:
        good = np.ones(rows, bool)
        good[list(errors)] = False
        packed = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
        # Photos are not kept beside their results: several blocks wait for each other further on.
        return Block(kept, good, errors, engine.run(packed), {name: packed[name] for name in target_columns})

    for batch in batches:
        start = 0
        while start < batch.num_rows:
            # Never more than fills the net's batch: an Arrow batch may hold thousands of photos.
            part = batch.slice(start, engine.batch_size - usable)
            start += part.num_rows
            packed = job.preparation.pack(part, targets=job.targets)
            if packed.errors and job.on_error == "fail":
                row, why = next(iter(sorted(packed.errors.items())))
                raise DataError(
                    f"{_row_name(job, part, row)} cannot be used: {why}. "
                    "Mend or remove it, or pass on_error='keep' or on_error='drop'."
                )
            errors.update((rows + row, why) for row, why in packed.errors.items())
            kept.append(part.select(list(job.keep)))
            arrays.append(packed.arrays)
            rows += part.num_rows
            usable += part.num_rows - len(packed.errors)
            if usable == engine.batch_size or rows >= _OUT_ROWS:
                yield block()
                kept, errors, arrays, rows, usable = [], {}, [], 0, 0
    if rows:
        yield block()


def _row_name(job: Job, rows: pa.RecordBatch, row: int) -> str:
    if job.named_by is None:
        return "a row"
    return f"{job.named_by} {rows.column(rows.schema.get_field_index(job.named_by))[row].as_py()!r}"


def finish_lists(job: Job, blocks: Iterator[Block]) -> Iterator[pa.RecordBatch]:
    """Kept columns, one list of floats per output, and with `on_error="keep"` the errors."""

    def lists(group: list[Block]) -> pa.RecordBatch:
        good, errors = _whole(group)
        columns = [_floats(np.concatenate([b.results[name] for b in group]), good) for name in job.signature.outputs]
        return _record_batch(job, group, good, columns, errors)

    return map(lists, _gathered(blocks))  # a loop's variables would keep one group while the next is computed


def finish_top_k(labels: tuple[str, ...], k: int, job: Job, blocks: Iterator[Block]) -> Iterator[pa.RecordBatch]:
    """Kept columns, the best label, its probability, the `k` best of both, and with `on_error="keep"` the errors."""
    from kindling.predict.engine import top_k

    names = pa.array(labels, pa.string())
    output = next(iter(job.signature.outputs))

    def best(group: list[Block]) -> pa.RecordBatch:
        good, errors = _whole(group)
        classes, probabilities = top_k(np.concatenate([b.results[output] for b in group]), k)
        found = names.take(pa.array(classes.ravel()))
        pairs = pa.StructArray.from_arrays([found, pa.array(probabilities.ravel())], ["label", "probability"])
        first = pa.array(_spread(classes[:, 0], good, -1), mask=~good)
        highest = pa.array(_spread(probabilities[:, 0], good, 0), mask=~good)
        columns = [names.take(first), highest, _lists(pairs, classes.shape[1], good)]
        return _record_batch(job, group, good, columns, errors)

    return map(best, _gathered(blocks))


@dataclass(frozen=True, slots=True)
class Compared:
    """An output and the target that it is held against."""

    output: str
    target: Step

    def tally(self) -> Tally | LabelTally:
        """A new one of the target's kind: classes, any number of labels, or numbers."""
        from kindling.evaluate import Tally
        from kindling.many_labels import LabelTally

        if isinstance(self.target, ManyLabelsStep):
            return LabelTally(len(self.target.labels))
        return Tally(len(self.target.labels) if isinstance(self.target, LabelStep) else None)


def finish_tally(compared: Compared, loss: bytes, job: Job, blocks: Iterator[Block]) -> Iterator[pa.RecordBatch]:
    """One row for the whole task: its tally, how many rows were skipped, and the first of them by name."""
    import cloudpickle
    import torch

    from kindling.evaluate import loss_rows

    measure = cloudpickle.loads(loss)
    tally, skipped = compared.tally(), _Skipped()
    output = compared.output
    for block in blocks:
        if len(block.results[output]):
            outputs, targets = torch.from_numpy(block.results[output]), compared.target.batch(block.targets)
            tally.update(outputs, targets, loss_rows(measure, outputs, targets).double())
        if block.errors:
            kept = pa.Table.from_batches(block.kept)
            names = kept.column(0).to_pylist() if kept.num_columns else [""] * kept.num_rows
            for row, why in block.errors.items():
                skipped.add(str(names[row]), why)
    yield _tally_row(tally, skipped)


def merge_tallies(compared: Compared, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Many tallies as one."""
    total, skipped = compared.tally(), _Skipped()
    for batch in batches:
        for row in batch.to_pylist():
            total.absorb(np.frombuffer(zlib.decompress(row["tally"]), np.int64))
            skipped.merge(row["skipped_rows"], json.loads(row["skipped"]))
    yield _tally_row(total, skipped)


TALLY_SCHEMA = "tally binary, skipped_rows long, skipped string"


def _tally_row(tally: Any, skipped: _Skipped) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            # Confusion counts are mostly zeros and small: they shrink a hundredfold.
            pa.array([zlib.compress(tally.to_vector().tobytes(), 1)], pa.binary()),
            pa.array([skipped.rows], pa.int64()),
            pa.array([json.dumps(skipped.first)], pa.string()),
        ],
        ["tally", "skipped_rows", "skipped"],
    )


class _Skipped:
    """How many rows were left out, and the first of them by name, whatever the order they come in."""

    def __init__(self) -> None:
        self.rows = 0
        self.first: list[tuple[str, str]] = []

    def add(self, name: str, why: str) -> None:
        self.merge(1, [(name, why)])

    def merge(self, rows: int, first: Iterable[Sequence[str]]) -> None:
        self.rows += rows
        self.first = sorted([*self.first, *((name, why) for name, why in first)])[:_LISTED]


def _gathered(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Blocks in groups of bounded size, one group for each record batch that leaves the task."""
    group: list[Block] = []
    n_bytes = rows = 0
    for block in blocks:
        group.append(block)
        n_bytes += sum(array.nbytes for array in block.results.values())
        rows += len(block.good)
        if n_bytes >= _OUT_BYTES or rows >= _OUT_ROWS:
            yield group
            group, n_bytes, rows = [], 0, 0
    if group:
        yield group


def _whole(group: list[Block]) -> tuple[np.ndarray, dict[int, str]]:
    """Good rows and errors of a group, numbered through."""
    errors: dict[int, str] = {}
    start = 0
    for block in group:
        errors.update((start + row, why) for row, why in block.errors.items())
        start += len(block.good)
    return np.concatenate([block.good for block in group]), errors


def _record_batch(
    job: Job, group: list[Block], good: np.ndarray, columns: list[pa.Array], errors: dict[int, str]
) -> pa.RecordBatch:
    kept = pa.Table.from_batches([batch for block in group for batch in block.kept]).combine_chunks()
    arrays = [chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type) for chunked in kept.columns]
    arrays += columns
    names = [*kept.column_names, *(f"c{i}" for i in range(len(columns)))]
    if job.on_error == "keep":
        texts = np.full(len(good), None, object)
        for row, why in errors.items():
            texts[row] = why
        arrays.append(pa.array(texts, pa.string()))
        names.append("error")
    whole = pa.RecordBatch.from_arrays(arrays, names)
    return whole if good.all() or job.on_error == "keep" else whole.filter(pa.array(good))


def _floats(values: np.ndarray, good: np.ndarray) -> pa.Array:
    """Numbers of shape (good rows, ...) as one list of floats per row, null where the row is not good."""
    flat = np.ascontiguousarray(values, np.float32).ravel()
    return _lists(pa.array(flat), math.prod(values.shape[1:]), good)


def _lists(values: pa.Array, width: int, good: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(good) + 1, np.int32)
    np.cumsum(good * width, out=offsets[1:])
    mask = None if good.all() else pa.array(~good)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def _spread(values: np.ndarray, good: np.ndarray, missing: float) -> np.ndarray:
    """Values of the good rows, at their places among all rows."""
    out = np.full(len(good), missing, values.dtype)
    out[good] = values
    return out


# ----------------------------------------------------------------------------------------------------- precision


def choose_precision(model: Model, df: DataFrame, precision: str = "auto", *, afresh: bool = False) -> Precision:
    """The precision to run a model in on this data: what was asked for, or bfloat16 where it is close enough.

    `"auto"` takes bfloat16 where the processor has it in hardware and agrees with float32 on the first rows of `df`,
    which two of Spark's workers compute in both; the answer holds for this model for the rest of the session.

    Args:
        afresh: neither use nor keep an answer of this session: it must depend on `df` alone.

    Raises: ConfigError, for a name that is none of "auto", "fp32", "bf16".
    """
    from kindling.predict.engine import PRECISIONS, Precision, decide

    if precision in PRECISIONS:
        return Precision(name=precision, reason="asked for")
    if precision != "auto":
        raise ConfigError("precision", precision, "is unknown", "Use 'auto', 'fp32' or 'bf16'")
    if df.isStreaming:
        return Precision(name="fp32", reason="a stream has no first rows to try bf16 on")
    spark = df.sparkSession
    job = _job(model, spark, precision="fp32", finish=finish_lists)
    key = (ship.session_key(spark), job.module.weights, zlib.crc32(job.module.architecture), job.preparation)
    if afresh or key not in _chosen:
        parts = _sample(df, model.preparation.columns(targets=False))
        if not parts:
            return Precision(name="fp32", reason="no rows to try bf16 on")
        frame = spark.range(0, len(parts), 1, len(parts))
        task = ship.guard(partial(compare_sample, job, parts))
        with ship.translated():
            rows = frame.mapInArrow(task, "comparison binary").collect()
        found = [json.loads(bytes(row["comparison"])) for row in rows]
        chosen = decide(found[0]["hardware"], [_comparison(part) for part in found if part["comparison"]])
        _LOG.info("precision %s", chosen)
        if afresh or (not chosen.cosines and found[0]["hardware"] is not None):
            return chosen  # nothing could be compared: other data may do better
        _chosen[key] = chosen
    return _chosen[key]


_chosen: dict[Any, Precision] = {}


def _comparison(part: dict[str, Any]) -> Any:
    from kindling.predict.engine import Comparison

    return Comparison(**part["comparison"])


def compare_sample(job: Job, parts: list[bytes], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """On a worker: bfloat16 against float32 on the parts of the sample that this task was given the numbers of."""
    from kindling.threads import settle

    settle(_task_cpus())
    from dataclasses import asdict

    from kindling.predict.engine import compare, hardware_bf16, keep_freed_memory

    keep_freed_memory()
    for batch in batches:
        for number in batch.column(0).to_pylist():
            table = pa.ipc.open_stream(parts[number]).read_all().combine_chunks()
            packed = job.preparation.pack(table.to_batches()[0], targets=False)
            hardware, found = hardware_bf16(), None
            if hardware is not None and len(next(iter(packed.arrays.values()))):
                module = ship.open_module(job.module)
                found = asdict(
                    compare(module, job.signature, job.preparation, packed.arrays, batch_size=job.batch_size)
                )
            answer = json.dumps({"hardware": hardware, "comparison": found}).encode()
            yield pa.RecordBatch.from_arrays([pa.array([answer], pa.binary())], ["comparison"])


def first_rows(df: DataFrame, columns: list[str], count: int) -> pa.Table:
    """The first rows of `df`, on the driver."""
    first = df.select(*map(_quoted, columns)).limit(count)
    with ship.translated():
        if hasattr(first, "toArrow"):
            return first.toArrow()
        # Spark 3.5
        return pa.Table.from_pylist([row.asDict(recursive=True) for row in first.collect()])


def _sample(df: DataFrame, columns: list[str]) -> list[bytes]:
    """The first rows of `df` as Arrow streams, one for each task that will compare precisions on them."""
    table = first_rows(df, columns, SAMPLE_ROWS)
    while table.num_rows > 1 and table.nbytes > _SAMPLE_BYTES:
        table = table.slice(0, table.num_rows // 2)
    size = -(-table.num_rows // _SAMPLE_TASKS)
    parts = []
    for start in range(0, table.num_rows, max(size, 1)):
        sink = pa.BufferOutputStream()
        # Through Python objects: a slice would carry the buffers of the whole table along.
        part = pa.Table.from_pylist(table.slice(start, size).to_pylist(), schema=table.schema)
        with pa.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part)
        parts.append(sink.getvalue().to_pybytes())
    return parts


# ----------------------------------------------------------------------------------------------------- on the driver


def forward(
    model: Model,
    df: DataFrame,
    *,
    keep: Sequence[str],
    columns: Mapping[str, str] | None = None,
    on_error: str = "keep",
    precision: str = "auto",
    batch_size: int | None = None,
) -> DataFrame:
    """The model's outputs over a DataFrame, lazily: the kept columns, one array<float> per output, and the errors.

    Args:
        keep: columns that pass through, in this order.
        columns: output -> its column, where that is not the output's own name. Outputs of more than one axis per row
            are flattened in C order.
        on_error: `"keep"` gives a broken row nulls and its reason in column `error`; `"drop"` leaves it out; `"fail"`
            raises, when the DataFrame is computed, an error that holds the row's path.
        precision: `"auto"` (see `choose_precision`; a small job runs at once), `"fp32"` or `"bf16"`.
        batch_size: rows per forward pass; None: what suits the net.

    Raises: DataError, for missing columns; ConfigError, for settings that cannot work.
    """
    from pyspark.sql.types import ArrayType, FloatType, StructField

    named = {name: (columns or {}).get(name, name) for name in model.signature.outputs}
    fields = [StructField(column, ArrayType(FloatType(), False)) for column in named.values()]
    return _mapped(
        model,
        df,
        keep,
        fields,
        on_error=on_error,
        precision=precision,
        batch_size=batch_size,
        finish=finish_lists,
    )


def featurize(
    model: Model,
    df: DataFrame,
    *,
    out: str | None = None,
    on_error: str = "keep",
    precision: str = "auto",
    batch_size: int | None = None,
    column: str = "features",
    progress: bool = True,
) -> DataFrame:
    """What the model says of each row: path, label, features array<float>.

    Args:
        df: the columns that the model reads, and `path` and `label` where there are any; those two pass through.
        out: a folder on any file system Spark writes to. The features are computed now and kept there as Parquet,
            with `_kindling.json` beside it saying what they were made by. Called again, only rows that are new or
            changed are computed, and rows that are gone from `df` leave the folder: the result equals one computed at
            once. A run that was killed goes on where it stopped. Needs column `path`, one row for each.
            None: nothing is computed before the returned DataFrame is used.
        on_error: `"keep"` gives a broken row null features and its reason in column `error`; `"drop"` leaves it out;
            `"fail"` raises DataError with the row's path. With `out`, broken rows are counted and listed.
        precision: `"auto"`, `"fp32"` or `"bf16"`; see `choose_precision`. With `out`, the choice is stored there.
        batch_size: rows per forward pass; None: what suits the net. A row's features are the same to the bit whatever
            rows come along, but may differ in the last bits between batch sizes.
        column: name of the column of features. A model with several outputs gives one column for each, by its name.
        progress: show a bar on stderr while `out` is written, where that is a terminal.

    Raises: ConfigError, for settings that cannot work, among them an `out` that holds the features of another model;
        DataError, for missing columns, and for broken rows with `on_error="fail"`.
    """
    if out is not None:
        from kindling.predict import output

        return output.featurize_to(
            model,
            df,
            str(out),
            on_error=on_error,
            precision=precision,
            batch_size=batch_size,
            columns=feature_columns(model, column),
            progress=progress,
        )
    return forward(
        model,
        df,
        keep=[name for name in ("path", "label") if name in df.columns],
        columns=feature_columns(model, column),
        on_error=on_error,
        precision=precision,
        batch_size=batch_size,
    )


def feature_columns(model: Model, column: str) -> dict[str, str]:
    """Output -> the column of its features: `column` for a single output, the outputs' own names for several."""
    names = list(model.signature.outputs)
    return {names[0]: column} if len(names) == 1 else {name: name for name in names}


def predict(
    model: Model,
    df: DataFrame,
    *,
    top_k: int = 5,
    on_error: str = "keep",
    precision: str = "fp32",
    batch_size: int | None = None,
) -> DataFrame:
    """The model's answer for each row, lazily.

    Args:
        precision: `"fp32"`, so that answers are the same everywhere; `"auto"` takes bfloat16 where it is close enough.

    Returns: the columns of `df` but for the images, and
        for a model with labels: `prediction` string, `probability` float, `top_k` array<struct<label, probability>>,
        best first (a net of one output tells two labels apart by its sign);
        for others: one array<float> for each output (`prediction`, where there is one);
        with `on_error="keep"` also `error` string, null for good rows.
    Raises: as `forward`.
    """
    from pyspark.sql.types import ArrayType, FloatType, StringType, StructField, StructType

    if top_k < 1:
        raise ConfigError("top_k", top_k, "leaves no answer", "Use 1 or more")
    images = {step.column for step in model.preparation.inputs if step.kind == "image"}
    keep = [name for name in df.columns if name not in images]
    settings: dict[str, Any] = {"on_error": on_error, "precision": precision, "batch_size": batch_size}
    if model.labels is None:
        return forward(model, df, keep=keep, columns=feature_columns(model, "prediction"), **settings)
    from kindling.predict.engine import check_classifier

    check_classifier(model)
    pair = StructType([StructField("label", StringType()), StructField("probability", FloatType())])
    fields = [
        StructField("prediction", StringType()),
        StructField("probability", FloatType()),
        StructField("top_k", ArrayType(pair)),
    ]
    finish = partial(finish_top_k, model.labels, min(top_k, len(model.labels)))
    return _mapped(model, df, keep, fields, finish=finish, **settings)


def evaluate(
    model: Model,
    df: DataFrame,
    *,
    output: str | None = None,
    loss: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    on_error: str = "drop",
) -> Report:
    """How good the model is on these rows: exact, and the same under any partitioning.

    Args:
        df: the columns that the model reads, and the target's.
        output: of a net with several outputs, the one to look at; the first that has a target if None.
        loss: any torch loss; None: cross entropy for classes, binary cross entropy for any number of labels, mean
            squared error for numbers.
        precision: `"fp32"`; `"auto"` takes bfloat16 where it is close enough.
        on_error: `"drop"` leaves broken rows out of the figures, counts and lists them (`report.skipped`); `"fail"`
            raises.
    Returns: a `Report`; a `kindling.many_labels.LabelReport` where a row has any number of labels.
    Raises: DataError, for missing columns, no usable rows, and broken rows with `on_error="fail"`; ConfigError, for a
        model without a target and an output without one.
    """
    if on_error == "keep":
        on_error = "drop"  # a row that cannot be compared with its target has no other place than the list
    if not model.preparation.targets:
        raise ConfigError("model", model.name, "has no target to be compared with", "Give it labels, or fit it first")
    from kindling.predict.engine import check_classifier

    compared = _compared(model, output)
    step = compared.target
    if isinstance(step, LabelStep) and compared.output == next(iter(model.signature.outputs)):
        check_classifier(replace(model, labels=step.labels))
    if isinstance(step, ManyLabelsStep) and loss is None:
        from torch.nn import BCEWithLogitsLoss

        loss = BCEWithLogitsLoss()
    _check_columns(df, model.preparation.columns(targets=True))
    spark = df.sparkSession
    chosen = choose_precision(model, df, precision)
    named_by = _named_by(df)
    job = _job(
        model,
        spark,
        precision=chosen.name,
        batch_size=batch_size,
        keep=() if named_by is None else (named_by,),
        named_by=named_by,
        on_error=on_error,
        targets=True,
        finish=partial(finish_tally, compared, ship.pickled(loss, "loss")),
    )
    tallies = _selected(job, df).mapInArrow(ship.guard(partial(run_job, job)), TALLY_SCHEMA)
    whole = tallies.repartition(1).mapInArrow(ship.guard(partial(merge_tallies, compared)), TALLY_SCHEMA)
    with ship.translated(), ship.bounded_arrow_batches(spark):
        rows = whole.collect()
    total, skipped = compared.tally(), _Skipped()
    for row in rows:
        total.absorb(np.frombuffer(zlib.decompress(bytes(row["tally"])), np.int64))
        skipped.merge(row["skipped_rows"], json.loads(row["skipped"]))
    if not total.rows:
        why = f": all {skipped.rows} are broken, the first: {': '.join(skipped.first[0])}" if skipped.rows else ""
        raise DataError(f"there is no row to evaluate on{why}.")
    labels = step.labels if isinstance(step, LabelStep | ManyLabelsStep) else None
    return total.report(labels, skipped=skipped.first, skipped_rows=skipped.rows)


def _compared(model: Model, output: str | None) -> Compared:
    """What is held against what."""
    by_output = model.preparation.by_output(list(model.signature.outputs))
    chosen = next(iter(by_output)) if output is None else output
    if chosen not in by_output:
        known = did_you_mean(chosen, by_output)
        raise ConfigError("output", chosen, f"is no output with a target.{known}", "Name one of them")
    return Compared(chosen, by_output[chosen])


def _mapped(
    model: Model,
    df: DataFrame,
    keep: Sequence[str],
    fields: list[Any],
    *,
    on_error: str,
    precision: str,
    batch_size: int | None,
    finish: Finish,
) -> DataFrame:
    from pyspark.sql.types import StringType, StructField, StructType

    if on_error not in ON_ERROR:
        raise ConfigError("on_error", on_error, "is unknown", "Use 'keep', 'drop' or 'fail'")
    if batch_size is not None and batch_size < 1:
        raise ConfigError("batch_size", batch_size, "leaves no row in a batch", "Use 1 or more")
    _check_columns(df, [*model.preparation.columns(targets=False), *keep])
    if on_error == "keep":
        fields = [*fields, StructField("error", StringType())]
    taken = [field.name for field in fields if field.name in keep]
    if taken:
        raise ConfigError("keep", list(keep), f"holds {taken[0]!r}, which is also a result", "Rename that column first")
    schema: StructType = StructType([df.schema[name] for name in keep] + fields)
    chosen = choose_precision(model, df, precision)
    job = _job(
        model,
        df.sparkSession,
        precision=chosen.name,
        batch_size=batch_size,
        keep=tuple(keep),
        named_by=_named_by(df),
        on_error=on_error,
        finish=finish,
    )
    return _selected(job, df).mapInArrow(ship.guard(partial(run_job, job)), schema)


def _job(
    model: Model,
    spark: SparkSession,
    *,
    precision: str,
    finish: Finish,
    batch_size: int | None = None,
    keep: tuple[str, ...] = (),
    named_by: str | None = None,
    on_error: str = "keep",
    targets: bool = False,
) -> Job:
    from kindling.predict.engine import PRECISIONS, net_batch

    outputs = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in model.signature.outputs.items()}
    return Job(
        module=ship.ship_module(spark, model.module, dtype=PRECISIONS[precision]),
        signature=Signature(dict(model.signature.inputs), outputs),
        preparation=model.preparation if targets else Preparation(model.preparation.inputs),
        precision=precision,
        batch_size=batch_size or net_batch(model.signature, model.module),
        keep=keep,
        named_by=named_by,
        on_error=on_error,
        targets=targets,
        finish=finish,
    )


def _selected(job: Job, df: DataFrame) -> DataFrame:
    """Only the columns that the job reads are sent to Python."""
    names = [*job.preparation.columns(targets=job.targets), *job.keep]
    if job.named_by is not None:
        names.append(job.named_by)
    return df.select(*map(_quoted, dict.fromkeys(names)))


def _named_by(df: DataFrame) -> str | None:
    return "path" if "path" in df.columns else None


def _check_columns(df: DataFrame, names: Iterable[str]) -> None:
    for name in names:
        if name not in df.columns:
            raise DataError(
                f"the DataFrame has no column {name!r}, which is needed here.{did_you_mean(name, df.columns)}"
            )


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
