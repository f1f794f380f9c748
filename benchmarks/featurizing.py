"""What the two featurising cases share: kindling's pass, the same net for the others, the ceiling, the agreement."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Bench, run_program, run_together


def kindling_pass(bench: Bench, model: Any, photos: Path, out: Path) -> float:
    """Photos to closed Parquet by kindling, from the call on: listing the folder counts. Returns seconds."""
    import kindling as kd

    spark = bench.session()
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    model.featurize(kd.read.images(str(photos), spark=spark), out=str(out), progress=False)
    return time.perf_counter() - began


def chosen_precision(out: Path) -> str:
    """`fp32` or `bf16`: what a pass chose, as it stored beside the features."""
    precision: Any = json.loads((out / "_kindling.json").read_text())["precision"]
    return precision["name"] if isinstance(precision, dict) else str(precision)


def described(net: str, model: Any, folder: Path, *, until: str = "", ceil_mode: bool = True) -> dict[str, Any]:
    """The same net and preparation for a process without kindling: its tensors in order, its image step as JSON."""
    import torch

    weights = folder / f"{net}.pt"
    torch.save([parameter.detach().clone() for parameter in model.module.parameters()], weights)
    step = model.preparation.to_json()["inputs"][0]
    return {"net": net, "until": until, "ceil_mode": ceil_mode, "weights": str(weights), "step": step}


def plain_pass(spec: Mapping[str, Any], paths: Sequence[str], out: Path, *, loaders: int = 0) -> dict[str, Any]:
    """The plain script: PyTorch's defaults, batches of 32."""
    return run_program(
        "plain_featurize", {**spec, "paths": list(paths), "batch": 32, "loaders": loaders, "out": str(out)}
    )


class Ceiling:
    """The fastest bare forward pass: one process with all cores or one per core, both layouts, several batches.

    `scan` times every configuration once, briefly; `measure` times the best of them again in every round, so that
    ceiling and contestant are minutes apart at most.
    """

    def __init__(self, bench: Bench, spec: Mapping[str, Any], dtype: str) -> None:
        self.bench, self.dtype = bench, dtype
        self.net = {key: spec[key] for key in ("net", "until", "ceil_mode")} | {"size": spec["step"]["size"]}
        self.best: list[str] = []
        self.grid: dict[str, tuple[int, str, int]] = {
            f"{processes} x {bench.cores // processes} {layout} batch {batch}": (processes, layout, batch)
            for processes in sorted({1, bench.cores})
            for layout in bench["ceiling_layouts"]
            for batch in bench["ceiling_batches"]
        }

    def rate(self, name: str, seconds: float) -> float:
        """Images a second of one configuration, over all its processes."""
        processes, layout, batch = self.grid[name]
        one = {
            **self.net,
            "dtype": self.dtype,
            "channels_last": layout == "channels_last",
            "batch": batch,
            "threads": self.bench.cores // processes,
            "seconds": seconds,
        }
        # Each process at its own pace: the last batch of one may run while the other is already done.
        answers = run_together("forward", [one] * processes)
        return sum(answer["images"] / (answer["ended"] - answer["began"]) for answer in answers)

    def scan(self) -> None:
        rates = {name: self.rate(name, self.bench["scan_seconds"]) for name in self.grid}
        self.best = sorted(rates, key=rates.__getitem__, reverse=True)[: self.bench["ceiling_finalists"]]
        self.bench.note("ceiling scan, images/s", {name: round(rate, 2) for name, rate in rates.items()})

    def measure(self, round: int) -> None:
        for name in self.best:
            rate = self.rate(name, self.bench["ceiling_seconds"])
            self.bench.record(f"bare forward, {self.dtype}, {name}", rate, "images/s", round=round)

    def by_round(self) -> dict[int, float]:
        return self.bench.best([f"bare forward, {self.dtype}, {name}" for name in self.best])


def features_of(folder: Path) -> dict[str, np.ndarray]:
    """Features by file name, from a Parquet file or folder with the columns path and features."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder, columns=["path", "features"])
    return {
        Path(path).name: np.asarray(row, np.float32)
        for path, row in zip(table["path"].to_pylist(), table["features"].to_pylist(), strict=True)
        if row is not None
    }


def agreement(bench: Bench, ours: Path, theirs: Path) -> None:
    """Note how alike the two sides' features are: both must have done the same work for a ratio to mean something."""
    left, right = features_of(ours), features_of(theirs)
    names = sorted(set(left) & set(right))
    cosines = [
        float(np.dot(left[n], right[n]) / (np.linalg.norm(left[n]) * np.linalg.norm(right[n]) + 1e-30)) for n in names
    ]
    bench.note("photos compared with the plain script", len(names))
    bench.value("mean cosine of features, kindling and plain script", float(np.mean(cosines)) if cosines else 0.0)
