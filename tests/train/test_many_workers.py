"""More workers than cores: eight on one machine, in a session of their own, are as right as two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EIGHT = """
import functools, json, sys
import numpy as np, torch
import kindling as kd

spark = kd.spark("local[8]", conf={"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "8"})
rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 203)
points = rng.normal(size=(203, 4)) + 2 * np.eye(3, 4)[labels]
rows = [(f"row-{i}", f"c{y}", x.tolist()) for i, (y, x) in enumerate(zip(labels, points))]
df = spark.createDataFrame(rows, "path string, label string, features array<float>").repartition(5)

def net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    return kd.Model.of(torch.nn.Sequential(*layers), shape=(4,), labels=["c0", "c1", "c2"])

def fit(strategy, workers, batch_size):
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    trained = net().fit(
        df, epochs=2, batch_size=batch_size, workers=workers, strategy=strategy, optimizer=sgd, progress=False
    )
    record = trained.history[-1]
    weights = torch.cat([p.detach().reshape(-1) for p in trained.module.parameters()]).tolist()
    return {"weights": weights, "rows": [epoch["rows"] for epoch in record["epochs"]], "attempts": record["attempts"],
            "losses": [epoch["loss"] for epoch in record["epochs"]]}

print(json.dumps({
    "eight": fit(kd.AllReduce(), 8, 2), "one": fit(kd.AllReduce(), 1, 16), "again": fit(kd.AllReduce(), 8, 2),
    "averaging": fit(kd.ParameterAveraging(every=3), 8, 2), "diloco": fit(kd.DiLoCo(every=5), 8, 2),
    "downpour": fit(kd.Downpour(push_every=2, fetch_every=2), 8, 2),
}))
spark.stop()
"""


@pytest.mark.slow
def test_eight_workers_on_any_number_of_cores(tmp_path: Path) -> None:
    if os.environ.get("KINDLING_TEST_MASTER") or os.environ.get("KINDLING_TEST_REMOTE"):
        pytest.skip("once is enough: it starts its own session")
    import json

    done = subprocess.run(
        [sys.executable, "-c", EIGHT], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    for name, run in told.items():
        assert run["rows"] == [203, 203], name
        assert run["attempts"] == 1, name
        assert run["losses"][1] < run["losses"][0], name
    assert told["eight"]["weights"] == pytest.approx(told["one"]["weights"], rel=1e-4, abs=1e-5)
    assert told["eight"]["weights"] == told["again"]["weights"]  # to the bit
    assert told["averaging"]["weights"] != told["eight"]["weights"]
