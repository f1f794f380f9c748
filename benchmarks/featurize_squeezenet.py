"""SqueezeNet 1.1 over thousands of photos, to Parquet: kindling, a plain script, Ray Data and Daft, interleaved.

A small net, so that decoding and moving rows count as much as arithmetic. The peers have two one-thread actors
each, run in an environment of their own (`run.py --make-peers`), prepare photos as the plain script does and run
the same tensors. Each contestant is warm: its processes have passed photos before. A peer starts its actors anew
with every call; what a call costs beyond its photos is estimated from a small call and taken off in the second pair
of ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.backbones import BACKBONES
from benchmarks.featurizing import agreement, chosen_precision, described, kindling_pass, plain_pass
from benchmarks.harness import Bench, Case, Target, peers_python, run_program

PEERS = {"Ray Data": "ray_featurize", "Daft": "daft_featurize"}


def run(bench: Bench) -> None:
    paths, what = inputs.distinct_photos(bench["photos"], generated=bench.preset == "tiny")
    bench.note("photos", f"{len(paths)} distinct, {what}")
    model = BACKBONES["SqueezeNet 1.1"].load()
    with bench.scratch() as folder:
        photos = inputs.linked(paths, folder / "photos")
        paths = sorted(str(path) for path in photos.rglob("*.jpg"))
        # Keras rounds the sizes of poolings down, torchvision up.
        spec = described("squeezenet1_1", model, folder, ceil_mode=inputs.real(inputs.SQUEEZENET) is None)
        seconds = kindling_pass(bench, model, photos, folder / "out")
        bench.record("kindling cold: session and first pass", seconds, "s")
        bench.note("precision of kindling; the others run fp32, their default", chosen_precision(folder / "out"))
        contestants: dict[str, Callable[[], Mapping[str, Any]]] = {
            "kindling": lambda: {"seconds": kindling_pass(bench, model, photos, folder / "out")},
            "plain script": lambda: plain_pass(spec, paths, folder / "plain.parquet"),
            "plain script, 2 loaders": lambda: plain_pass(spec, paths, folder / "plain2.parquet", loaders=2),
        }
        if bench.peers:
            for name, program in PEERS.items():
                contestants[name] = lambda program=program: peer_pass(bench, program, spec, paths, folder / program)
        for number in range(bench.rounds):
            for name, contestant in contestants.items():
                seen = contestant()
                bench.record(name, len(paths) / seen["seconds"], "images/s", round=number, **seen)
                if "small_seconds" in seen:
                    steady = (len(paths) - seen["small_images"]) / (seen["seconds"] - seen["small_seconds"])
                    bench.record(f"{name}, start-up taken off", steady, "images/s", round=number)
        agreement(bench, folder / "out", folder / "plain.parquet")
        ours = bench.best(["kindling"])
        for name in bench.figures:
            if not name.startswith("kindling"):
                bench.ratio(f"kindling / {name}", ours, bench.best([name]))


def peer_pass(bench: Bench, program: str, spec: Mapping[str, Any], paths: list[str], out: Path) -> dict[str, Any]:
    """One peer, in its own environment, with one one-thread actor per core."""
    asked = {**spec, "paths": paths, "batch": 32, "actors": bench.cores, "out": str(out)}
    return run_program(program, asked, python=peers_python())


CASE = Case(
    name="featurize_squeezenet",
    what="SqueezeNet 1.1, photos to Parquet: multiples of a plain script, Ray Data and Daft.",
    run=run,
    presets={"tiny": {"photos": 40}, "full": {"photos": 4096}},
    targets=(
        Target(value="kindling / plain script", at_least=2.5),
        Target(value="kindling / Ray Data", at_least=1.5),
        Target(value="kindling / Daft", at_least=1.5),
        Target(value="mean cosine of features, kindling and plain script", at_least=0.999),
    ),
)
