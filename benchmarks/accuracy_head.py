"""Is the head that kindling trains as good as it can be? Against scikit-learn's converged logistic regression.

Real features (Caltech-101 without Faces_easy, both backbones), five stratified splits, one standardisation for both
sides; each side chooses its L2 strength on validation from the same grid. kindling trains by parameter averaging on
two workers. A round is a split.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.backbones import BACKBONES
from benchmarks.harness import Bench, Case, Target
from benchmarks.optimum import STRENGTHS, Optimum, Split, optimum, stratified

TRIED = ("SqueezeNet 1.1", "MobileNetV2")


def run(bench: Bench) -> None:
    import kindling as kd

    real = inputs.real(inputs.CALTECH_TAR) is not None and bench.preset == "full"
    if bench.preset == "full":
        inputs.need(inputs.CALTECH_TAR)
    photos = inputs.caltech101() if real else inputs.generated_photos(3, bench["per_class"])
    strengths = STRENGTHS[:: bench["every_strength"]]
    with bench.scratch() as folder:
        for name in bench["backbones"]:
            out = folder / name.replace(" ", "-")
            BACKBONES[name].load().featurize(
                kd.read.images(str(photos), spark=bench.session()), out=str(out), progress=False
            )
            x, labels = arrays_of(out)
            names, y = np.unique(labels, return_inverse=True)
            bench.note(f"{name}: photos, features, classes", (*x.shape, len(names)))
            for number in range(bench.rounds):
                split = Split.of(x, y, *stratified(y, bench.seed + number))
                theirs = optimum(split, strengths)
                bench.record(f"{name}: scikit-learn", 100 * theirs.test, "% test", round=number, **vars(theirs))
                ours = kindling_head(bench, split, [str(label) for label in names], strengths, folder / "split")
                bench.record(f"{name}: kindling", 100 * ours.test, "% test", round=number, **vars(ours))
            means = {side: mean(bench, f"{name}: {side}") for side in ("kindling", "scikit-learn")}
            bench.value(f"{name}: mean of kindling, %", means["kindling"])
            bench.value(f"{name}: mean of scikit-learn, %", means["scikit-learn"])
            bench.value(f"{name}: points behind scikit-learn", means["scikit-learn"] - means["kindling"])


def mean(bench: Bench, contestant: str) -> float:
    return statistics.mean(figure for _, figure in bench.figures[contestant])


def arrays_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, features) float32 and labels (rows,) in the order of the paths."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder).sort_by("path")
    rows = table["features"].combine_chunks()
    return np.asarray(rows.flatten(), np.float32).reshape(len(rows), -1), np.asarray(table["label"].to_pylist())


def kindling_head(bench: Bench, split: Split, names: list[str], strengths: tuple[float, ...], folder: Path) -> Optimum:
    """The head trained on Spark from Parquet for every strength; the best on validation is evaluated on the rest."""
    import torch
    from torch import nn

    import kindling as kd

    spark = bench.session()
    frames = {side: written(getattr(split, side), names, folder / side, spark) for side in ("train", "valid", "test")}
    best: tuple[float, float, Any] | None = None
    for strength in strengths:
        torch.manual_seed(bench.seed)
        head = kd.Model.of(nn.Linear(split.train[0].shape[1], len(names)), shape=split.train[0].shape[1:], labels=names)
        sgd = partial(torch.optim.SGD, lr=bench["lr"], momentum=0.9, nesterov=True, weight_decay=strength)
        head = head.fit(
            frames["train"],
            validation=frames["valid"],
            epochs=bench["epochs"],
            batch_size=32,
            optimizer=sgd,
            strategy=kd.ParameterAveraging(every=5),
            workers=bench.cores,
            seed=bench.seed,
            key="row",
            checkpoints=kd.Checkpoints(epochs=None),
            progress=False,
        )
        accuracy = head.history[-1]["epochs"][-1]["validation"]["accuracy"]
        if best is None or accuracy > best[0]:
            best = (accuracy, strength, head)
    assert best is not None
    valid, strength, head = best
    train, test = (head.evaluate(frames[side], precision="fp32").accuracy for side in ("train", "test"))
    return Optimum(strength, train, valid, test)


def written(side: tuple[np.ndarray, np.ndarray], names: list[str], path: Path, spark: Any) -> Any:
    """One side as a Parquet table (row, features, label), read by Spark."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    x, y = side
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]).cast(pa.list_(pa.float32()))
    path.mkdir(parents=True, exist_ok=True)
    table = pa.table({"row": np.arange(len(x)), "features": lists, "label": [names[label] for label in y]})
    pq.write_table(table, path / "part.parquet", row_group_size=512)
    return spark.read.parquet(str(path))


CASE = Case(
    name="accuracy_head",
    what="Test accuracy of kindling's trained head beside scikit-learn's converged one, five splits, both backbones.",
    run=run,
    presets={
        "tiny": {"per_class": 10, "backbones": ("SqueezeNet 1.1",), "every_strength": 7, "epochs": 2, "lr": 0.01},
        "full": {"backbones": TRIED, "every_strength": 1, "epochs": 40, "lr": 0.003},
    },
    targets=tuple(Target(value=f"{name}: points behind scikit-learn", at_most=0.5) for name in TRIED),
    rounds=5,
)
