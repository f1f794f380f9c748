"""The session fixture is a session that `kindling.spark` made."""

import sys
import pytest


@pytest.mark.spark
def test_workers_run_this_python(spark):
    def probe(batches):
        import pyarrow as pa, sys, os

        for _ in batches:
            pass
        yield pa.RecordBatch.from_pydict({"exe": [sys.executable], "omp": [os.environ.get("OMP_NUM_THREADS")]})

    row = spark.range(1).mapInArrow(probe, "exe string, omp string").collect()[0]
    assert row.exe == sys.executable
    assert row.omp == "1"
