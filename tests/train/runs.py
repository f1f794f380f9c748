"""Small trainings on a session: rows, nets, and what tells two trained models apart."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

import kindling as kd

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


def blobs(rows: int, seed: int = 0, classes: int = 3) -> list[tuple[str, str, list[float]]]:
    """Rows (path, label, features) of as many clouds of points as there are classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 4)) * 3
    labels = rng.integers(0, classes, rows)
    points = centres[labels] + rng.normal(size=(rows, 4))
    return [
        (f"row-{i:05d}", f"c{label}", point.tolist())
        for i, (label, point) in enumerate(zip(labels, points, strict=True))
    ]


def frame(spark: Any, rows: list[tuple[str, str, list[float]]], partitions: int = 3) -> Any:
    return spark.createDataFrame(rows, "path string, label string, features array<float>").repartition(partitions)


def net(classes: int = 3, dropout: float = 0.0) -> kd.Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, classes))
    return kd.Model.of(module, shape=(4,), labels=[f"c{i}" for i in range(classes)])


def digest(model: kd.Model) -> str:
    state = model.module.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def fit(model: kd.Model, df: Any, **options: Any) -> kd.Model:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": SGD, "workers": 2, "progress": False}
    return model.fit(df, **{**settings, **options})
