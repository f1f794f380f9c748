"""Loads one file after another: memory, seconds beside reading and converting its bytes once, the net's own speed.

`write` makes the files; `measure` loads one, the first time weighed, afterwards timed, round by round, in turns with what
it counts against. Before that a small file of the same format has been loaded and computed with: imports are not counted.
"""

from __future__ import annotations

import gc
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


def main() -> None:
    """Spec: task, formats, shape (fields of Shape), folder, seed, threads, rows, forwards, rounds. Answers by format."""
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
    del model
    gc.collect()
    hand = shape.by_hand(shape.weights(asked["seed"]))
    x = torch.randn(asked["rows"], 3, shape.pixels, shape.pixels, generator=torch.Generator().manual_seed(0))
    rounds = []
    for _ in range(asked["rounds"]):
        model = None
        gc.collect()
        plain_s, _ = timed(lambda: form.plain(path, shape))
        gc.collect()
        load_s, model = timed(lambda: form.load(path, shape))
        seconds: dict[str, list[float]] = {"hand": [], "kindling": []}
        with torch.inference_mode():
            wanted, seen = hand(x), model.module(x)  # once before the clock: pages and caches
            for place in range(asked["forwards"]):
                both = [("hand", hand), ("kindling", model.module)]
                for name, net in both if place % 2 else both[::-1]:
                    seconds[name].append(timed(partial(net, x))[0])
        medians = {f"{name}_s": statistics.median(each) for name, each in seconds.items()}
        rounds.append({"plain_s": plain_s, "load_s": load_s, **medians})
    return {**found, "difference": float((seen - wanted).abs().max() / wanted.abs().max()), "rounds": rounds}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def weigh(form: Format, path: Path, shape: Shape) -> tuple[dict[str, float], Any]:
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
