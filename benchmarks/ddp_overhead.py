"""A step of all-reduce on two workers, against bare DistributedDataParallel that torchrun starts on the same cores.

A perceptron of 1.07 million weights over MNIST's pixels, 32 rows a step on each worker, one thread each, the same
optimizer. The script (`programs/ddp.py`) has its rows in memory as float tensors. Seconds per step are those of the
epochs after the first; kindling's with everything that happens between two epochs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.harness import PROGRAMS, Bench, BenchmarkError, Case, Target
from benchmarks.head import wall_per_epoch

SGD = {"lr": 0.05, "momentum": 0.9}
SCRIPTS = {"DistributedDataParallel": None, "DistributedDataParallel, fused steps": True}
"""The script by torch's `fused`, which kindling asks for by itself."""


def run(bench: Bench) -> None:
    table = inputs.mnist_table(bench["rows"], tiny=bench.preset == "tiny")
    for number in range(bench.rounds):
        for name, fused in SCRIPTS.items():
            with bench.scratch() as folder:
                told = torchrun({**asked(bench, table, folder), "fused": fused}, folder, bench.cores)
            seconds = statistics.mean(told["seconds"][1:]) / told["steps"]
            bench.record(name, 1000 * seconds, "ms/step", round=number, **told)
        with bench.scratch() as folder:
            record = fit(bench, table, folder)
            epochs = record["epochs"]
            steps = -(-record["rows"] // (bench["batch"] * bench.cores))
            wall = wall_per_epoch(folder / "run", [epoch["seconds"] for epoch in epochs])
            bench.record("kindling, all-reduce", 1000 * wall / steps, "ms/step", round=number, epochs=epochs)
    ours = bench.best(["kindling, all-reduce"])
    bench.ratio("kindling / DistributedDataParallel", ours, bench.best(["DistributedDataParallel"]))
    bench.ratio("kindling / the faster of the scripts", ours, bench.best(list(SCRIPTS), highest=False))


def asked(bench: Bench, table: Path, into: Path) -> dict[str, Any]:
    """The script's argument."""
    same = {"batch": bench["batch"], "epochs": bench["epochs"], "seed": bench.seed}
    return {"table": str(table), "into": str(into), **same, **SGD}


def fit(bench: Bench, table: Path, folder: Path) -> dict[str, Any]:
    """kindling's training of the same net on the same table; its record."""
    import torch

    import kindling as kd

    trained = perceptron(bench.seed).fit(
        bench.session().read.parquet(str(table)),
        epochs=bench["epochs"],
        batch_size=bench["batch"],
        optimizer=partial(torch.optim.SGD, **SGD),
        strategy=kd.AllReduce(),
        workers=bench.cores,
        seed=bench.seed,
        run=folder / "run",
        progress=False,
    )
    record: dict[str, Any] = trained.history[-1]
    return record


def perceptron(seed: int) -> Any:
    """The script's net as a kindling Model."""
    import torch
    from torch import nn

    import kindling as kd

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))
    return kd.Model.of(net, column="features", shape=(784,), labels=[str(digit) for digit in range(10)])


def torchrun(asked: Mapping[str, Any], folder: Path, processes: int, timeout_s: float = 600) -> dict[str, Any]:
    """Run the script by torchrun, one thread in each process; what rank 0 measured.

    Raises: BenchmarkError, with the script's last words.
    """
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *words, str(PROGRAMS / "ddp.py"), json.dumps(asked)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"torchrun ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


CASE = Case(
    name="ddp_overhead",
    what="A step of all-reduce, 2 workers, 1.07 million weights, against bare DistributedDataParallel under torchrun.",
    run=run,
    presets={
        "tiny": {"rows": 256, "batch": 16, "epochs": 2},
        "full": {"rows": 20000, "batch": 32, "epochs": 5},
    },
    targets=(Target(value="kindling / DistributedDataParallel", at_most=1.15),),
)
