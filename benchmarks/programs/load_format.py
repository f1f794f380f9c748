"""Loads one file after another: memory, seconds beside reading and converting its bytes once, the net's own speed.

`write` makes the files; `measure` loads one: the first time it is weighed, afterwards timed, round by round, in turns
with what it counts against. Before that a small file of the same format has been loaded and computed with, so that
imports are not counted.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.programs import answer, spec, wait_for_go
from benchmarks.vgg_files import FORMATS, Format, Shape

SMALL = Shape(blocks=((1, 4), (1, 8)), pixels=8, hidden=16, classes=10)
EVERY_S = 0.002
TURNS = (("kindling", "hand", "hand", "kindling"), ("hand", "kindling", "kindling", "hand"))


def main() -> None:
    """Spec: task, formats, shape (as of Shape), folder, seed, threads, rows, rounds. Answers by format."""
    asked = spec()
    fields = dict(asked["shape"])
    shape = Shape(**{**fields, "blocks": tuple(tuple(block) for block in fields["blocks"])})
    folder = Path(asked["folder"])
    wait_for_go()
    found = {}
    for name in asked["formats"]:
        home = folder / name.replace(" ", "-")
        task = write if asked["task"] == "write" else measure
        found[name] = task(FORMATS[name], shape, home, asked)
        gc.collect()
    answer(found)


def write(form: Format, shape: Shape, home: Path, asked: dict[str, Any]) -> dict[str, Any]:
    for size, one in (("small", SMALL), ("large", shape)):
        (home / size).mkdir(parents=True)
        form.write(home / size / form.file, one, one.weights(asked["seed"]))
    return {"bytes": sum(file.stat().st_size for file in (home / "large").rglob("*") if file.is_file())}


def warm(form: Format, home: Path) -> None:
    """Imports, and what is made once in a process."""
    import torch

    if form.full_only:
        import kindling as kd

        kd.load("lenet")
        return
    model = form.load(home / "small" / form.file, SMALL)
    with torch.inference_mode():
        model.module(torch.zeros(1, 3, SMALL.pixels, SMALL.pixels))
    form.plain(home / "small" / form.file, SMALL)


def measure(form: Format, shape: Shape, home: Path, asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(asked["threads"])
    warm(form, home)
    path = home / "large" / form.file
    if form.prepare is not None:
        form.prepare(shape)
    found, model = weigh(form, path, shape)
    hand = shape.by_hand(shape.weights(asked["seed"]))
    x = torch.randn(asked["rows"], 3, shape.pixels, shape.pixels, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    with torch.inference_mode():  # once before the clock: what torch prepares for these sizes
        wanted = hand(x)
    rounds = []
    for number in range(asked["rounds"]):
        model = None
        gc.collect()
        torch.set_num_threads(asked["threads"])
        one = {"plain_s": timed(lambda: form.plain(path, shape))[0]}
        gc.collect()
        one["load_s"], model = timed(lambda: form.load(path, shape))
        torch.set_num_threads(1)  # the time of one thread is the net's own, whoever else uses the machine
        spent: dict[str, list[float]] = {"hand": [], "kindling": []}
        with torch.inference_mode():
            for name in TURNS[number % 2]:
                seconds, seen = timed(partial(model.module if name == "kindling" else hand, x), time.thread_time)
                spent[name].append(seconds)
                apart = float((seen - wanted).abs().nan_to_num(nan=math.inf).max())
                found["difference"] = max(found.get("difference", 0.0), apart)
        rounds.append({**one, **{f"{name}_s": statistics.mean(each) for name, each in spent.items()}})
    found["difference"] /= float(wanted.abs().max())
    return {**found, "rounds": rounds}


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    began = clock()
    result = work()
    return clock() - began, result


def weigh(form: Format, path: Path, shape: Shape) -> tuple[dict[str, Any], Any]:
    """The model, and how far loading it raised this process's memory, in weights."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = status()
    scale = Scale()
    scale.start()
    model = form.load(path, shape)
    scale.over.set()
    scale.join()
    after = status()
    own = max(scale.highest, after["RssAnon"]) - before["RssAnon"]
    resident = after["VmHWM"] - before["VmRSS"]
    return {"own": max(own, 0) / shape.bytes(), "resident": max(resident, 0) / shape.bytes()}, model


def status() -> dict[str, int]:
    """Memory of this process in bytes: VmRSS and its highest, VmHWM; RssAnon, which no file could give back."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in ("VmRSS", "VmHWM", "RssAnon"):
            found[key] = 1024 * int(rest.split()[0])
    return found


class Scale(threading.Thread):
    """Keeps the highest memory of the process's own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(EVERY_S):
            self.highest = max(self.highest, status()["RssAnon"])


if __name__ == "__main__":
    main()
