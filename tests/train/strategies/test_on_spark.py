"""The strategies through `Model.fit`, on workers that Spark starts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd

pytestmark = pytest.mark.spark


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(kd.AllReduce(compression="powersgd"), marks=pytest.mark.slow),
        pytest.param(kd.ParameterAveraging(every=3, allreduce_steps=4), marks=pytest.mark.slow),
        kd.DiLoCo(every=4, fragments=2, delay=1),
        kd.Downpour(push_every=2, fetch_every=2),
        pytest.param(kd.ThresholdSharing(threshold=0.5, adaptive=False), marks=pytest.mark.slow),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_net_learns(spark: Any, strategy: Any) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 4)) * 3
    labels = rng.integers(0, 3, 300)
    points = centres[labels] + rng.normal(size=(300, 4))
    rows = [
        (f"row-{i}", f"c{label}", point.tolist()) for i, (label, point) in enumerate(zip(labels, points, strict=True))
    ]
    frame = spark.createDataFrame(rows, "path string, label string, features array<float>").repartition(3)
    torch.manual_seed(0)
    model = kd.Model.of(
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), shape=(4,), labels=["c0", "c1", "c2"]
    )
    trained = model.fit(
        frame,
        epochs=4,
        batch_size=8,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        strategy=strategy,
        workers=2,
        progress=False,
    )
    (record,) = trained.history
    assert [epoch["rows"] for epoch in record["epochs"]] == [300] * 4
    assert record["epochs"][-1]["loss"] < 0.5 * record["epochs"][0]["loss"] < math.inf
    assert all(epoch["bytes_sent"] > 0 for epoch in record["epochs"])
    assert trained.evaluate(frame).accuracy > 0.85
