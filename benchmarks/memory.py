"""What a second VGG16 worker costs in memory: PSS (proportional set size) in mid forward, less workers without weights.

Two workers hold the weights once if both map the same pages in the very dtype and layout that is computed with; every
copy (a cast, a reordering) makes the second worker pay again. Each job runs in a session of its own
(`programs/weigh.py`). Workers without weights decode the same photos, in the same batches, for a net that computes and
has none: VGG16's activations, which no two workers can share, count against kindling. Linux only.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import inputs
from benchmarks.harness import Bench, BenchmarkError, Case, Target, machine, run_program

WORKERS = (1, 2)


def run(bench: Bench) -> None:
    bf16 = bool(machine()["bf16"])
    if not bf16:
        bench.note("bf16", "left out: this processor has no bfloat16 in hardware")
    precisions = [name for name in bench["precisions"] if name == "fp32" or bf16]
    with bench.scratch() as folder:
        paths, _ = inputs.distinct_photos(bench["photos"] * max(WORKERS), generated=bench.preset == "tiny")
        photos = {n: inputs.linked(paths[: bench["photos"] * n], folder / f"photos-{n}") for n in WORKERS}
        for number in range(bench.rounds):
            for precision in precisions:
                for workers in WORKERS:
                    for weights in (True, False):
                        weigh(
                            bench, precision, workers, photos[workers], folder / "out", weights=weights, number=number
                        )
    for precision in precisions:
        one, two = (difference(bench, precision, workers) for workers in WORKERS)
        bench.ratio(f"{precision}: two workers' weights / one's", two, one)


def weigh(bench: Bench, precision: str, workers: int, photos: Path, out: Path, *, weights: bool, number: int) -> None:
    """Record the memory of one job's workers."""
    spec = {"weights": weights, "layer": bench["layer"], "workers": workers, "precision": precision}
    seen = run_program("weigh", {**spec, "photos": str(photos), "out": str(out)})
    name = contestant(precision, workers, weights)
    if not seen["samples"]:
        raise BenchmarkError(f"{name}: the job was over before its workers could be weighed at work.")
    bench.record(name, seen["median_mib"], "MiB PSS", round=number, **seen)


def contestant(precision: str, workers: int, weights: bool) -> str:
    return f"{precision}, {workers} x {'VGG16' if weights else 'no weights'}"


def difference(bench: Bench, precision: str, workers: int) -> dict[int, float]:
    """By round: MiB of VGG16's workers less those of workers without weights."""
    heavy, light = (bench.best([contestant(precision, workers, weights)]) for weights in (True, False))
    # A net cut to nearly nothing, as in the tiny preset, may weigh no more than none.
    return {number: max(heavy[number] - light[number], 1.0) for number in heavy}


CASE = Case(
    name="memory",
    what="Memory of two VGG16 workers' weights over one's: PSS in mid forward, less workers without weights.",
    run=run,
    presets={
        "tiny": {"layer": "block5_pool", "precisions": ("fp32",), "photos": 16},
        "full": {"layer": "fc2", "precisions": ("bf16", "fp32"), "photos": 96},
    },
    targets=tuple(
        Target(value=f"{precision}: two workers' weights / one's", at_most=1.3) for precision in ("bf16", "fp32")
    ),
)
