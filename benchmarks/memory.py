"""What a second VGG16 worker costs in memory: proportional set sizes (PSS) in mid forward, weights alone.

Two workers hold the weights once if both map the same pages in the very dtype and layout that is computed with;
every copy (a cast, a reordering) makes the second worker pay again. Each job runs in a session of its own
(`programs/weigh.py`). Workers without weights run the same job on a net of the same shape whose layers have none,
so that the activations, the decoded photos and torch itself are on both sides and fall out; against workers that
run next to nothing they do not, which is the second ratio. Linux only.
"""

from __future__ import annotations

from benchmarks import inputs
from benchmarks.harness import Bench, BenchmarkError, Case, Target, machine, run_program

NETS = ("vgg16", "weightless", "idle")


def run(bench: Bench) -> None:
    bf16 = bool(machine()["bf16"])
    precisions = [name for name in bench["precisions"] if name == "fp32" or bf16]
    if not bf16:
        bench.note("bf16", "left out: this processor has no bfloat16 in hardware")
    with bench.scratch() as folder:
        most = max(bench["photos"].values()) * 2
        paths, _ = inputs.distinct_photos(most, generated=bench.preset == "tiny")
        for number in range(bench.rounds):
            for precision in precisions:
                for net in NETS:
                    for workers in (1, 2):
                        photos = folder / f"{net}-{workers}"
                        if not photos.exists():
                            inputs.linked(paths[: bench["photos"][net] * workers], photos)
                        seen = run_program(
                            "weigh",
                            {
                                "net": net,
                                "layer": bench["layer"],
                                "workers": workers,
                                "precision": precision,
                                "photos": str(photos),
                                "out": str(folder / "out"),
                            },
                        )
                        if not seen["samples"]:
                            raise BenchmarkError(
                                f"the {net} job of {workers} workers was over before it could be weighed."
                            )
                        name = f"{precision}, {net}, {workers} workers"
                        bench.record(name, seen["median_mib"], "MiB PSS", round=number, **seen)
    for precision in precisions:
        for baseline, told in (
            ("weightless", "same job without weights"),
            ("idle", "workers that run next to nothing"),
        ):
            weights = {workers: difference(bench, precision, baseline, workers) for workers in (1, 2)}
            bench.ratio(f"{precision}: two workers' weights / one's, less {told}", weights[2], weights[1])


def difference(bench: Bench, precision: str, baseline: str, workers: int) -> dict[int, float]:
    """By round: MiB of VGG16's workers less those of the baseline's."""
    heavy = bench.best([f"{precision}, vgg16, {workers} workers"])
    light = bench.best([f"{precision}, {baseline}, {workers} workers"])
    # Below one MiB there is nothing to divide by: the tiny preset's net is nearly all activations.
    return {number: max(heavy[number] - light[number], 1.0) for number in heavy}


CASE = Case(
    name="memory",
    what="Memory of two VGG16 workers' weights over one's: PSS in mid forward, less workers without weights.",
    run=run,
    presets={
        "tiny": {"layer": "block5_pool", "precisions": ("fp32",), "photos": {"vgg16": 6, "weightless": 12, "idle": 12}},
        "full": {
            "layer": "fc2",
            "precisions": ("bf16", "fp32"),
            "photos": {"vgg16": 96, "weightless": 400, "idle": 1600},
        },
    },
    targets=(
        Target(value="bf16: two workers' weights / one's, less same job without weights", at_most=1.3),
        Target(value="fp32: two workers' weights / one's, less same job without weights", at_most=1.3),
    ),
)
