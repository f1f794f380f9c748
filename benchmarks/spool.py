"""The way of wide rows from Parquet to the workers: kindling's packing and spooling, against what Spark offers.

kindling's rows per second are those of its own phases in a `fit` (`pack`: preparation, routing and shuffle; `spool`:
memory-mapped columns on disk), so all that a training needs is in them. Beside it stand `repartition` with
`mapInPandas`, whose workers stack each batch of rows into one float32 array, and `repartition` with `toLocalIterator`,
which makes an array of each row on the driver (few rows: it is slow).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bench, BenchmarkError, Case, Target


def run(bench: Bench) -> None:
    width = bench["features"]
    table, _ = inputs.head_table(bench["rows"], width, 7)
    short, _ = inputs.head_table(bench["iterated_rows"], width, 7)
    spark = bench.session()
    fit(bench, short)  # both ways once: a warm session
    read_in_pandas(spark, short, bench.cores)
    for number in range(bench.rounds):
        record = fit(bench, table)
        phases = record["phases_s"]
        seconds = phases["pack"] + phases["spool"]
        bench.record("kindling, pack and spool", record["rows"] / seconds, "rows/s", round=number, phases=phases)
        began = time.perf_counter()
        rows = read_in_pandas(spark, table, bench.cores)
        seconds = time.perf_counter() - began
        if rows != bench["rows"]:
            raise BenchmarkError(f"mapInPandas saw {rows} rows of {bench['rows']}")
        bench.record("repartition, mapInPandas", rows / seconds, "rows/s", round=number)
        began = time.perf_counter()
        rows = iterate(spark, short, bench.cores)
        bench.record("repartition, toLocalIterator", rows / (time.perf_counter() - began), "rows/s", round=number)
    ours = bench.best(["kindling, pack and spool"])
    for name in ("mapInPandas", "toLocalIterator"):
        bench.ratio(f"kindling / {name}", ours, bench.best([f"repartition, {name}"]))


def fit(bench: Bench, table: Path) -> dict[str, Any]:
    """One epoch of a small net over the wide rows; its record."""
    import torch
    from torch import nn

    import kindling as kd

    labels = [f"class_{label:03d}" for label in range(7)]
    model = kd.Model.of(nn.Linear(bench["features"], 7), shape=(bench["features"],), labels=labels)
    trained = model.fit(
        bench.session().read.parquet(str(table)),
        epochs=1,
        batch_size=256,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        workers=bench.cores,
        seed=bench.seed,
        progress=False,
    )
    record: dict[str, Any] = trained.history[-1]
    return record


def read_in_pandas(spark: Any, table: Path, workers: int) -> int:
    """Rows that `mapInPandas` brought to the workers, each batch stacked into one array."""

    def stack(batches: Iterator[Any]) -> Iterator[Any]:
        import numpy
        import pandas

        rows = 0
        for batch in batches:
            array = numpy.stack(batch["features"].to_numpy()).astype(numpy.float32, copy=False)
            rows += len(array)
        yield pandas.DataFrame({"rows": [rows]})

    counted = spark.read.parquet(str(table)).repartition(workers).mapInPandas(stack, "rows long").collect()
    return sum(row["rows"] for row in counted)


def iterate(spark: Any, table: Path, workers: int) -> int:
    """Rows that `toLocalIterator` brought to the driver, each made an array."""
    import numpy

    rows = 0
    for row in spark.read.parquet(str(table)).repartition(workers).toLocalIterator():
        rows += len(numpy.asarray(row["features"], numpy.float32)) > 0
    return rows


CASE = Case(
    name="spool",
    what="Rows of 4,096 floats from Parquet to the workers: pack and spool against repartition and Spark's readers.",
    run=run,
    presets={
        "tiny": {"rows": 600, "features": 64, "iterated_rows": 200},
        "full": {"rows": 30607, "features": 4096, "iterated_rows": 2000},
    },
    targets=(
        Target(value="kindling / mapInPandas", at_least=3.0),
        Target(value="kindling / toLocalIterator", at_least=3.0),
    ),
)
