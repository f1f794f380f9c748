"""`moments`: mean and standard deviation of each number of a list column, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kindling.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = "rows long, ragged long, mean array<double>, squares array<double>"
_ARROW_SCHEMA = pa.schema(
    [
        ("rows", pa.int64()),
        ("ragged", pa.int64()),
        ("mean", pa.list_(pa.float64())),
        ("squares", pa.list_(pa.float64())),
    ]
)


def moments(df: DataFrame, column: str = "features") -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over all rows, not a sample's) of each place of a column of equally long lists.

    Rows without a list (null) do not count. The order of the rows shows in the last bits only.

    Source of the merging: Chan et al., 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    Returns: two arrays of shape (length of the lists,), float64.
    Raises: DataError, where the column is missing or holds no list, or the lists differ in length.

    >>> mean, deviation = moments(features)  # doctest: +SKIP
    """
    from pyspark.sql import functions as F

    if column not in df.columns:
        raise DataError(f"column {column!r} is missing.{did_you_mean(column, df.columns)}")
    quoted = F.col("`" + column.replace("`", "``") + "`")
    parts = df.select(quoted.cast("array<double>").alias("x")).where("x is not null").mapInArrow(_tally, _SCHEMA)
    whole: _Moments | None = None
    for row in parts.collect():
        part = _Moments(row["rows"], np.asarray(row["mean"]), np.asarray(row["squares"]))
        if row["ragged"] or (whole is not None and len(whole.mean) != len(part.mean)):
            raise DataError(f"the lists of column {column!r} differ in length.")
        whole = part if whole is None else whole.merged(part)
    if whole is None:
        raise DataError(f"column {column!r} holds no list: there are no rows, or all are null.")
    return whole.mean, np.sqrt(whole.squares / whole.rows)


class _Moments:
    """Count, mean, and sum of squared distances from it, of rows seen so far."""

    def __init__(self, rows: int, mean: np.ndarray, squares: np.ndarray) -> None:
        self.rows, self.mean, self.squares = rows, mean, squares

    @classmethod
    def of(cls, x: np.ndarray) -> _Moments:
        mean = x.mean(axis=0)
        return cls(len(x), mean, np.square(x - mean).sum(axis=0))

    def merged(self, other: _Moments) -> _Moments:
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.rows / rows)
        squares = self.squares + other.squares + np.square(apart) * (self.rows * other.rows / rows)
        return _Moments(rows, mean, squares)


def _tally(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    whole: _Moments | None = None
    ragged = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        column = batch.column(0)
        lengths = np.diff(np.asarray(column.offsets))
        size = int(lengths[0]) if whole is None else len(whole.mean)
        ragged += int((lengths != size).sum())
        if ragged:
            continue
        part = _Moments.of(np.asarray(column.flatten()).reshape(batch.num_rows, size))
        whole = part if whole is None else whole.merged(part)
    if whole is None and not ragged:
        return
    seen = whole or _Moments(0, np.empty(0), np.empty(0))
    values = [[seen.rows], [ragged], [seen.mean.tolist()], [seen.squares.tolist()]]
    yield pa.RecordBatch.from_arrays(
        [pa.array(value, field.type) for value, field in zip(values, _ARROW_SCHEMA, strict=True)],
        schema=_ARROW_SCHEMA,
    )
