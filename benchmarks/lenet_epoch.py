"""LeNet on MNIST: an epoch of two workers with one thread each, against one plain torch process with every core.

The same global batch on both sides: 32 rows on each worker, 64 in the plain process. The plain loop has its pictures in
memory as bytes, as a worker has. kindling's seconds per epoch are wall time between epochs, with events and
checkpoints; the first epoch is left out on both sides. The session is warm: a short fit has run before.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.harness import Bench, Case, Target, run_program
from benchmarks.head import PHASES, wall_per_epoch

SGD = {"lr": 0.02, "momentum": 0.9, "nesterov": True}
PLAIN = {"plain torch": None, "plain torch, fused steps": True}
"""The plain loops by torch's `fused`, which kindling asks for by itself."""


def run(bench: Bench) -> None:
    import torch

    import kindling as kd

    files = inputs.mnist(tiny=bench.preset == "tiny")
    spark = bench.session()
    train = kd.read.idx(str(files["train_images"]), str(files["train_labels"]), spark=spark)
    strategies = {"all-reduce": kd.AllReduce(), "averaging every 5": kd.ParameterAveraging(every=5)}

    def fit(strategy: Any, rows: Any, epochs: int, folder: Path) -> dict[str, Any]:
        torch.manual_seed(bench.seed)
        model = kd.load("lenet").with_labels([str(digit) for digit in range(10)])
        trained = model.fit(
            rows,
            epochs=epochs,
            batch_size=bench["batch_size"],
            optimizer=partial(torch.optim.SGD, **SGD),
            strategy=strategy,
            workers=bench.cores,
            seed=bench.seed,
            run=folder / "run",
            progress=False,
        )
        record: dict[str, Any] = trained.history[-1]
        return record

    with bench.scratch() as folder:
        arrays = folder / "arrays.npz"
        pixels, digits = inputs.read_idx(files["train_images"]), inputs.read_idx(files["train_labels"])
        np.savez(arrays, x=pixels, y=digits.astype(np.int64))
        for number in range(bench.rounds):
            for name, fused in PLAIN.items():
                answer = run_program(
                    "plain_lenet",
                    {
                        "arrays": str(arrays),
                        "batch": bench.cores * bench["batch_size"],
                        "epochs": bench["epochs"],
                        "threads": bench.cores,
                        "seed": bench.seed,
                        "sgd": {**SGD, "fused": fused},
                    },
                )
                steady = statistics.mean(answer["seconds"][1:])
                bench.record(f"{name}, {bench.cores} threads", steady, "s/epoch", round=number, **answer)
            for name, strategy in strategies.items():
                # Spark ends Python workers that were idle for a minute, as they are while plain torch runs: warm again.
                fit(kd.AllReduce(), train.limit(bench["warm_up_rows"]), 1, folder / f"warm-{number}-{name}")
                with bench.scratch() as run_folder:
                    record = fit(strategy, train, bench["epochs"], run_folder)
                    steady = wall_per_epoch(run_folder / "run", [epoch["seconds"] for epoch in record["epochs"]])
                bench.record(f"kindling, {name}", steady, "s/epoch", round=number, epochs=record["epochs"])
                phases = {phase: record["phases_s"][phase] for phase in PHASES}
                told = f"kindling, {name}: fit to first step"
                bench.record(told, phases["to_first_step"], "s", round=number, phases=phases)
    as_written, *_ = (f"{name}, {bench.cores} threads" for name in PLAIN)
    for name in strategies:
        ours = bench.best([f"kindling, {name}"])
        bench.ratio(f"kindling, {name} / plain torch", ours, bench.best([as_written]))
        plain = bench.best([f"{name}, {bench.cores} threads" for name in PLAIN], highest=False)
        bench.ratio(f"kindling, {name} / plain torch, the faster of its steps", ours, plain)
    told = [line["phases"] for line in bench.lines if "phases" in line]
    for phase in PHASES:
        bench.value(f"fit to first step, seconds: {phase}", statistics.median(phases[phase] for phases in told))


CASE = Case(
    name="lenet_epoch",
    what="LeNet on MNIST: an epoch of one worker per core against one plain torch process; fit to first step by phase.",
    run=run,
    presets={
        "tiny": {"epochs": 2, "batch_size": 16, "warm_up_rows": 100},
        "full": {"epochs": 4, "batch_size": 32, "warm_up_rows": 2000},
    },
    targets=(
        Target(value="kindling, all-reduce / plain torch", at_most=1.10),
        Target(value="kindling, averaging every 5 / plain torch", at_most=1.10),
        Target(value="fit to first step, seconds: to_first_step", at_most=3.0),
    ),
)
