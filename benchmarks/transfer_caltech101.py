"""The headline job in one command: photos to report with `kindling transfer`, for three real ImageNet backbones.

Caltech-101 without Faces_easy. Beside it: scikit-learn's optimum on the very same features and split, the same net
from random weights, and the figures of the article that this job is modelled on (88.8 / 76.3 / 75.3 % train / valid
/ test). That article used VGG16 on Caltech-256: another net and another, harder set; its figures are for
orientation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.backbones import BACKBONES, Backbone
from benchmarks.harness import REPOSITORY, Bench, BenchmarkError, Case
from benchmarks.optimum import STRENGTHS, Split, optimum

SHARES = (0.7, 0.15, 0.15)
ARTICLE = {"train": 88.8, "valid": 76.3, "test": 75.3}
SIDES = ("train", "valid", "test")


def run(bench: Bench) -> None:
    full = bench.preset == "full"
    if full:
        inputs.need(inputs.CALTECH_TAR)
    photos = inputs.caltech101() if full else inputs.generated_photos(3, bench["per_class"])
    bench.note("the article (VGG16 on Caltech-256: another net, another set), %", ARTICLE)
    with bench.scratch() as folder:
        for name in bench["backbones"]:
            backbone = BACKBONES[name]
            trained = inputs.real(backbone.weights) is not None
            if full:
                inputs.need(backbone.weights)
            elif ":" in backbone.net and not trained:
                continue  # of a net that is a file there is nothing without it
            for number in range(bench.rounds):
                here = folder / f"{backbone.key}-{number}"
                answer = transfer(bench, backbone, photos, here, trained=trained, seed=bench.seed + number)
                keep(bench, name, answer, number)
            add_optimum(bench, name, here / "features", seed=bench.seed + bench.rounds - 1)
            there = folder / f"{backbone.key}-random"
            answer = transfer(bench, backbone, photos, there, trained=False, seed=bench.seed)
            keep(bench, f"{name}, random weights", answer, 0)


def transfer(
    bench: Bench, backbone: Backbone, photos: Path, folder: Path, *, trained: bool, seed: int
) -> dict[str, Any]:
    """One `kindling transfer`, in a process of its own; its JSON, with the wall time of the whole command."""
    shares = ",".join(str(share) for share in SHARES)
    settings = bench["training"][backbone.key]
    command = [sys.executable, "-m", "kindling", "transfer", str(photos), *backbone.words(trained=trained)]
    command += ["--split", shares, "--epochs", str(settings["epochs"]), "--lr", str(settings["lr"])]
    command += ["--weight-decay", str(settings["weight_decay"]), "--strategy", "averaging:5", "--workers", "2"]
    command += ["--seed", str(seed), "--master", f"local[{bench.cores}]", "--features", str(folder / "features")]
    command += ["--out", str(folder / "model"), "--json"]
    began = time.perf_counter()
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]  # where `module:function` is looked for
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=env, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise BenchmarkError(f"kindling transfer ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"accuracy": answer["accuracy"], "seconds": answer["seconds"], "wall_s": seconds, "command": command[3:]}


def keep(bench: Bench, name: str, answer: dict[str, Any], number: int) -> None:
    for side in SIDES:
        bench.record(f"{name}: {side}", 100 * answer["accuracy"][side], "%", round=number)
    details = {"phases_s": answer["seconds"], "command": answer["command"]}
    bench.record(f"{name}: command, start to end", answer["wall_s"], "s", round=number, **details)
    bench.note(f"{name}: seconds by phase", answer["seconds"])


def add_optimum(bench: Bench, name: str, features: Path, *, seed: int) -> None:
    """scikit-learn on the features that the command kept, on the split that the command made."""
    import kindling as kd

    frame = (
        bench.session().read.parquet(str(features)).where("features is not null").select("path", "label", "features")
    )
    parts = [part.collect() for part in kd.split(frame, *SHARES, seed=seed)]
    x = np.array([row["features"] for part in parts for row in part], np.float32)
    names = sorted({row["label"] for row in parts[0]})
    y = np.array([names.index(row["label"]) if row["label"] in names else -1 for part in parts for row in part])
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    sides = [np.arange(start, end) for start, end in pairwise(bounds)]
    best = optimum(Split.of(x, y, *sides), STRENGTHS[:: bench["every_strength"]])
    for side in SIDES:
        bench.record(f"{name}, scikit-learn's optimum: {side}", 100 * getattr(best, side), "%", strength=best.strength)
    bench.value(
        f"{name}: test points behind scikit-learn's optimum",
        100 * best.test - dict(bench.figures[f"{name}: test"])[bench.rounds - 1],
    )


CASE = Case(
    name="transfer_caltech101",
    what="`kindling transfer` on Caltech-101: accuracy and time by phase, beside the optimum and random weights.",
    run=run,
    presets={
        "tiny": {
            "per_class": 10,
            "backbones": ("SqueezeNet 1.1", "SqueezeNet v1.0, caffemodel"),
            "every_strength": 7,
            "training": {
                "squeezenet1_1": {"epochs": 2, "lr": 0.01, "weight_decay": 0.0},
                "squeezenet_v1_0": {"epochs": 2, "lr": 0.01, "weight_decay": 0.0},
            },
        },
        "full": {
            "backbones": tuple(BACKBONES),
            "every_strength": 1,
            "training": {
                "squeezenet1_1": {"epochs": 30, "lr": 0.003, "weight_decay": 0.03},
                "mobilenet_v2": {"epochs": 30, "lr": 0.003, "weight_decay": 0.01},
                "squeezenet_v1_0": {"epochs": 30, "lr": 0.003, "weight_decay": 0.03},
            },
        },
    },
    rounds=1,
)
