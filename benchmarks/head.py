"""A softmax head from Parquet, against the same loop in plain torch on arrays in memory; and the way to step one.

The plain loop is the better of one process with every core, and one process per core with its share of the rows and no
agreement at all (batch 32 each). kindling's seconds per epoch are wall time between epochs, with everything in them:
averaging, checkpoints, events; the first epoch is left out on both sides. The target is against the loop as one
writes it; beside it stands the ratio to the same loop with torch's fused optimizer steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bench, Case, Target, run_together

PHASES = ("plan", "pack", "spool", "meet", "build", "first_step", "to_first_step")
"""Seconds of the way from the call of `fit` to the end of the first step, and their sum, as the history names them."""

LOOPS = {
    "one process": (1, 32, None),
    "one process per core": (None, 32, None),
    "one process, fused": (1, 32, True),
    "one process per core, fused": (None, 32, True),
    "one process, batch 64": (1, 64, None),
}
"""The plain loops: processes (None: one per core), batch, and torch's `fused`, which kindling asks for by itself."""


def run(bench: Bench) -> None:
    import torch
    from torch import nn

    import kindling as kd

    table, arrays = inputs.head_table(bench["rows"], bench["features"], bench["classes"])
    labels = tuple(f"class_{label:03d}" for label in range(bench["classes"]))
    sgd = {"lr": 0.01, "momentum": 0.8, "nesterov": True}
    spark = bench.session()
    strategies = {"averaging every 5": kd.ParameterAveraging(every=5), "all-reduce": kd.AllReduce()}
    for number in range(bench.rounds):
        for name, (parts, batch, fused) in LOOPS.items():
            answer = plain(bench, arrays, parts or bench.cores, batch, {**sgd, "fused": fused})
            bench.record(f"plain torch, {name}", answer["steady"], "s/epoch", round=number, **answer)
        for name, strategy in strategies.items():
            torch.manual_seed(bench.seed)
            model = kd.Model.of(nn.Linear(bench["features"], len(labels)), shape=(bench["features"],), labels=labels)
            with bench.scratch() as folder:
                trained = model.fit(
                    spark.read.parquet(str(table)),
                    epochs=bench["epochs"],
                    batch_size=32,
                    optimizer=partial(torch.optim.SGD, **sgd),
                    strategy=strategy,
                    workers=bench.cores,
                    seed=bench.seed,
                    run=folder / "run",
                    progress=False,
                )
                record = trained.history[-1]
                steady = wall_per_epoch(folder / "run", [epoch["seconds"] for epoch in record["epochs"]])
            details = {"epochs": record["epochs"], "phases_s": record["phases_s"]}
            bench.record(f"kindling, {name}", steady, "s/epoch", round=number, **details)
            phases = {phase: record["phases_s"][phase] for phase in PHASES}
            told = f"kindling, {name}: fit to first step"
            bench.record(told, phases["to_first_step"], "s", round=number, phases=phases)
    best = bench.best(["plain torch, one process", "plain torch, one process per core"], highest=False)
    tuned = bench.best([f"plain torch, {name}" for name, (_, batch, _) in LOOPS.items() if batch == 32], highest=False)
    for name in strategies:
        ours = bench.best([f"kindling, {name}"])
        bench.ratio(f"kindling, {name} / plain torch", ours, best)
        bench.ratio(f"kindling, {name} / plain torch, fused steps too", ours, tuned)
    told = [line["phases"] for line in bench.lines if "phases" in line]
    for phase in PHASES:
        bench.value(f"fit to first step, seconds: {phase}", statistics.median(phases[phase] for phases in told))


def plain(bench: Bench, arrays: Path, parts: int, batch: int, sgd: Mapping[str, Any]) -> dict[str, Any]:
    """The plain loop in `parts` processes; `steady` is the slowest one's mean seconds per epoch after the first."""
    common = {
        "arrays": str(arrays),
        "parts": parts,
        "batch": batch,
        "epochs": bench["epochs"],
        "seed": bench.seed,
        **sgd,
    }
    specs = [{**common, "part": part, "threads": bench.cores // parts} for part in range(parts)]
    answers = run_together("plain_head", specs)
    steady = max(statistics.mean(answer["seconds"][1:]) for answer in answers)
    return {"steady": steady, "losses": answers[0]["losses"], "seconds": [answer["seconds"] for answer in answers]}


def events_of(run: Path) -> list[dict[str, Any]]:
    """Every event of the run directory's last attempt."""
    attempts = sorted((run / "events").iterdir(), key=lambda folder: int(folder.name))
    lines = [line for path in attempts[-1].rglob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def wall_per_epoch(run: Path, reported: list[float]) -> float:
    """Seconds from the end of the first epoch to the end of the last, per epoch; never less than the loop reported."""
    ends = sorted(event["unix_s"] for event in events_of(run) if event["kind"] == "epoch" and event["rank"] == 0)
    return max((ends[-1] - ends[0]) / (len(ends) - 1), statistics.mean(reported[1:]))


CASE = Case(
    name="head",
    what="Softmax head from Parquet: seconds per epoch against plain torch in memory; fit to first step by phase.",
    run=run,
    presets={
        "tiny": {"rows": 600, "features": 64, "classes": 7, "epochs": 2},
        "full": {"rows": 30607, "features": 4096, "classes": 257, "epochs": 6},
    },
    targets=(Target(value="kindling, averaging every 5 / plain torch", at_most=1.15),),
)
