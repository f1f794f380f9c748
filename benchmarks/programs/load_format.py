"""Loads one file after another: memory, seconds beside reading and converting its bytes once, the net's own speed.

`write` makes the files; `measure` loads one: the first time it is weighed, afterwards timed, round by round, in turns
with what it counts against. Before that a small file of the same format has been loaded and computed with, so that
imports are not counted. The net's speed is taken from a file in between.
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
MIDDLE = Shape(blocks=((2, 16), (2, 32), (3, 64), (3, 128), (3, 128)), pixels=128, hidden=512, classes=100)
"""VGG16 at a quarter of its widths and fewer pixels: many passes in little time."""


def main() -> None:
    """Spec: task, formats, shape (as of Shape), folder, seed, threads, rounds, forwards. Answers by format."""
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
    for size, one in (("small", SMALL), ("middle", MIDDLE), ("large", shape)):
        if form.full_only and size != "large":
            continue
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
    rounds = []
    for _ in range(asked["rounds"]):
        model = None
        gc.collect()
        plain_s = timed(lambda: form.plain(path, shape))[0]
        gc.collect()
        load_s, model = timed(lambda: form.load(path, shape))
        rounds.append({"plain_s": plain_s, "load_s": load_s})
    assert model is not None
    found["difference"] = apart(model.module, shape.by_hand(shape.weights(asked["seed"])), shape)
    if not form.full_only:
        speed(form, home, rounds, asked)
    return {**found, "rounds": rounds}


def apart(net: Any, hand: Any, shape: Shape) -> float:
    """How far two nets' outputs differ, in the largest of them."""
    import torch

    x = torch.randn(1, 3, shape.pixels, shape.pixels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = hand(x)
        return float((net(x) - wanted).abs().nan_to_num(nan=math.inf).max() / wanted.abs().max())


def speed(form: Format, home: Path, rounds: list[dict[str, float]], asked: dict[str, Any]) -> None:
    """Adds to every round the seconds of a forward pass, imported and by hand: medians of many, in turns.

    The processor time of one thread is the net's own, whoever else uses the machine.
    """
    import torch

    net = form.load(home / "middle" / form.file, MIDDLE).module
    hand = MIDDLE.by_hand(MIDDLE.weights(asked["seed"]))
    assert apart(net, hand, MIDDLE) < 1e-3
    torch.set_num_threads(1)
    x = torch.randn(1, 3, MIDDLE.pixels, MIDDLE.pixels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for one in rounds:
            spent: dict[str, list[float]] = {"hand_s": [], "kindling_s": []}
            for place in range(asked["forwards"]):
                both = [("hand_s", hand), ("kindling_s", net)]
                for name, module in both if place % 2 else both[::-1]:
                    spent[name].append(timed(partial(module, x), time.thread_time)[0])
            one |= {name: statistics.median(each) for name, each in spent.items()}


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
