"""`moments` against numpy, under any partitioning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kindling import read
from kindling.errors import DataError

pytestmark = pytest.mark.spark

SCHEMA = "path string, features array<float>"


def test_moments_are_numpy_s_whatever_the_partitions(spark: Any) -> None:
    x = (np.random.default_rng(0).normal(size=(501, 7)) * 10 + 1000).astype(np.float32)
    rows = [(str(n), str(n % 3), row.tolist()) for n, row in enumerate(x)]
    rows.insert(100, ("broken", "0", None))
    df = spark.createDataFrame(rows, "path string, label string, features array<float>")
    for frame in (df.coalesce(1), df.repartition(7), df.where("path != 'broken'").repartition(5, "label")):
        mean, deviation = read.moments(frame)
        np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(deviation, x.std(axis=0, dtype=np.float64), rtol=1e-9)


def test_what_has_no_moments_is_refused(spark: Any) -> None:
    df = spark.createDataFrame([("a", [1.0, 2.0]), ("b", [1.0])], SCHEMA)
    for frame in (df.repartition(1), df.repartition(2, "path")):
        with pytest.raises(DataError, match="differ in length"):
            read.moments(frame)
    with pytest.raises(DataError, match="holds no list"):
        read.moments(spark.createDataFrame([("a", None)], SCHEMA))
    with pytest.raises(DataError, match=r"'feature' is missing\. Did you mean 'features'"):
        read.moments(df, "feature")
