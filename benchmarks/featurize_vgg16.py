"""VGG16 up to fc2, JPEGs to closed Parquet: against the bare forward pass and against a plain script.

Random weights: they change no shape and no instruction. The session is warm (one pass went before); the first pass,
with the start of the session, is recorded beside it as the cold figure.
"""

from __future__ import annotations

import time

from benchmarks import inputs
from benchmarks.featurizing import Ceiling, agreement, chosen_precision, described, kindling_pass, plain_pass
from benchmarks.harness import Bench, Case, Target


def run(bench: Bench) -> None:
    import torch

    import kindling as kd

    paths, what = inputs.distinct_photos(bench["photos"], generated=bench.preset == "tiny")
    bench.note("photos", f"{len(paths)} distinct, {what}")
    with bench.scratch() as folder:
        photos = inputs.linked(paths, folder / "photos")
        began = time.perf_counter()
        bench.session()
        torch.manual_seed(bench.seed)
        model = kd.load("vgg16").until(bench["layer"])
        seconds = kindling_pass(bench, model, photos, folder / "cold")
        bench.record(
            "kindling cold: session, model, first pass", time.perf_counter() - began, "s", first_pass_s=seconds
        )
        precision = chosen_precision(folder / "cold")
        bench.note("precision", precision)
        spec = described("vgg16", model, folder, until=bench["layer"])
        ceiling = Ceiling(bench, spec, {"fp32": "float32", "bf16": "bfloat16"}[precision])
        ceiling.scan()
        some = [str(path) for path in sorted(photos.rglob("*.jpg"))][: bench["plain_photos"]]
        for number in range(bench.rounds):
            seconds = kindling_pass(bench, model, photos, folder / "out")
            bench.record("kindling", len(paths) / seconds, "images/s", round=number, seconds=seconds)
            ceiling.measure(number)
            plain = plain_pass(spec, some, folder / "plain.parquet")
            bench.record("plain script", plain["images"] / plain["seconds"], "images/s", round=number, **plain)
        agreement(bench, folder / "out", folder / "plain.parquet")
        ours = bench.best(["kindling"])
        bench.ratio("kindling / bare forward", ours, ceiling.by_round())
        bench.ratio("kindling / plain script", ours, bench.best(["plain script"]))


CASE = Case(
    name="featurize_vgg16",
    what="VGG16 to fc2, JPEGs to Parquet: share of the bare forward pass, multiple of a plain script.",
    run=run,
    presets={
        "tiny": {
            "photos": 8,
            "layer": "block3_pool",
            "plain_photos": 4,
            "ceiling_layouts": ("channels_last",),
            "ceiling_batches": (2,),
            "ceiling_finalists": 1,
            "scan_seconds": 0.0,
            "ceiling_seconds": 0.0,
        },
        "full": {
            "photos": 512,
            "layer": "fc2",
            "plain_photos": 128,
            "ceiling_layouts": ("NCHW", "channels_last"),
            "ceiling_batches": (8, 16, 32, 64),
            "ceiling_finalists": 3,
            "scan_seconds": 5.0,
            "ceiling_seconds": 15.0,
        },
    },
    targets=(
        Target(value="kindling / bare forward", at_least=0.90),
        Target(value="kindling / plain script", at_least=2.2),
        Target(value="mean cosine of features, kindling and plain script", at_least=0.999),
    ),
)
