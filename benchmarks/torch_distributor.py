"""From the call to the trained weights: kindling's `fit`, against PySpark's TorchDistributor in the same warm session.

TorchDistributor runs the DistributedDataParallel script of `ddp_overhead`, which reads the same Parquet table by itself
with pyarrow: the shortest way there is for it. kindling's time has everything in it: Spark's scan, packing, shuffle,
checkpoints. Both end with the weights on the driver, and both have run once on a few rows before.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.ddp_overhead import asked, fit
from benchmarks.harness import PROGRAMS, Bench, Case, Target


def run(bench: Bench) -> None:
    import torch
    from pyspark.ml.torch.distributor import TorchDistributor

    tiny = bench.preset == "tiny"
    table = inputs.mnist_table(bench["rows"], tiny=tiny)

    def distribute(table: Path, folder: Path) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyspark's own deprecations
            distributor = TorchDistributor(num_processes=bench.cores, local_mode=False, use_gpu=False)
            distributor.run(str(PROGRAMS / "ddp.py"), json.dumps(asked(bench, table, folder)))
        assert len(torch.load(folder / "weights.pt", weights_only=True)) == 6
        told: dict[str, Any] = json.loads((folder / "told.json").read_text())
        return told

    bench.session()
    if bench["warm_up_rows"]:
        short = inputs.mnist_table(bench["warm_up_rows"], tiny=tiny)
        for warm_up in (distribute, lambda table, folder: fit(bench, table, folder)):
            with bench.scratch() as folder:
                warm_up(short, folder)
    for number in range(bench.rounds):
        with bench.scratch() as folder:
            began = time.time()
            told = distribute(table, folder)
            seconds = time.time() - began
            first = told["first_step"] - began
            bench.record("TorchDistributor", seconds, "s", round=number, to_first_step=first, **told)
            bench.record("TorchDistributor: call to first step", first, "s", round=number)
            bench.record("TorchDistributor: epochs", sum(told["seconds"]), "s", round=number)
        with bench.scratch() as folder:
            began = time.time()
            record = fit(bench, table, folder)
            seconds = time.time() - began
            phases = record["phases_s"]
            bench.record("kindling", seconds, "s", round=number, phases=phases, epochs=record["epochs"])
            bench.record("kindling: call to first step", phases["to_first_step"], "s", round=number)
            bench.record("kindling: epochs", phases["epochs"], "s", round=number)
    bench.ratio("kindling / TorchDistributor", bench.best(["kindling"]), bench.best(["TorchDistributor"]))


CASE = Case(
    name="torch_distributor",
    what="From the call to the trained weights, against TorchDistributor with a DDP script on the same table.",
    run=run,
    presets={
        "tiny": {"rows": 256, "batch": 16, "epochs": 1, "warm_up_rows": 0},
        "full": {"rows": 60000, "batch": 32, "epochs": 2, "warm_up_rows": 2000},
    },
    targets=(Target(value="kindling / TorchDistributor", at_most=0.8),),
)
