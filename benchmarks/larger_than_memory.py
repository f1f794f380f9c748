"""Training on more rows than memory holds: seconds against rows, and the anonymous memory of the Python workers.

Made-up pictures of 128 x 128 grey pixels (16 KiB) come out of a Spark plan that stores nothing, are packed, shuffled,
spooled and trained on for an epoch by two workers with a net of one small layer: what is left is the road of the rows.
Anonymous memory is `RssAnon` of each Python worker, looked at all the time; mapped pages of the spool files, which the
kernel takes back when it needs them, are told beside it. The full preset writes twice its size to disk. Linux only.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import Bench, BenchmarkError, Case, Target
from benchmarks.programs.weigh import python_workers

SIDE = 128
ROW_BYTES = SIDE * SIDE
CLASSES = 4
GB = 10**9


def made_up(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Pictures for a column of ids: noise that depends on the id, brighter in the stripe that is the class."""
    for batch in batches:
        for start in range(0, batch.num_rows, 256):
            ids = np.asarray(batch.column(0))[start : start + 256]
            rng = np.random.default_rng(int(ids[0]))
            pixels = np.frombuffer(rng.bytes(len(ids) * ROW_BYTES), np.uint8).reshape(len(ids), CLASSES, -1) >> 1
            classes = ids % CLASSES
            pixels[np.arange(len(ids)), classes] += 64
            offsets = pa.py_buffer(np.arange(len(ids) + 1, dtype=np.int32) * ROW_BYTES)
            column = pa.Array.from_buffers(pa.binary(), len(ids), [None, offsets, pa.py_buffer(pixels)])
            yield pa.RecordBatch.from_arrays([pa.array(ids), column, pa.array(classes)], names=["id", "photo", "label"])


class Watch(threading.Thread):
    """Looks at the memory of the Python workers until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.highest: dict[str, int] = {"RssAnon": 0, "RssFile": 0}
        """MiB of the largest worker."""

    def run(self) -> None:
        while not self.over.wait(0.1):
            for pid in python_workers():
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                        name, _, rest = line.partition(":")
                        if name in self.highest:
                            self.highest[name] = max(self.highest[name], int(rest.split()[0]) // 1024)


def run(bench: Bench) -> None:
    largest = max(bench["gigabytes"])
    free = shutil.disk_usage(tempfile.gettempdir()).free / GB
    if free < 2.5 * largest:
        raise BenchmarkError(f"{largest} GB of rows need {2.5 * largest:.0f} GB of disk; {free:.0f} GB are free.")
    train(bench, min(bench["gigabytes"]), warm_up=True)
    for gigabytes in bench["gigabytes"]:
        train(bench, gigabytes)
    sizes = sorted(bench["gigabytes"])
    per_gb = {size: bench.median(_name(size)) / size for size in sizes}
    bench.value("seconds per GB, largest / half as large", per_gb[sizes[-1]] / per_gb[sizes[-2]])
    bench.value("anonymous memory of a worker, MiB", bench.median(f"{_name(largest)}: anonymous memory of a worker"))


def _name(gigabytes: float) -> str:
    return f"{gigabytes:g} GB of rows"


def train(bench: Bench, gigabytes: float, *, warm_up: bool = False) -> None:
    """One fit over so many rows; its seconds and memory are recorded."""
    import torch

    import kindling as kd

    rows = int(gigabytes * GB / ROW_BYTES)
    spark = bench.session()
    # Ids come in steps, so that a task's neighbours are not one class, and in tasks of some 128 MB.
    ids = spark.range(0, rows, 1, max(2, rows * ROW_BYTES // (128 << 20)))
    df = ids.mapInArrow(made_up, "id long, photo binary, label long")
    photo = kd.prepare.ImageStep(
        "photo", "photo", size=(SIDE, SIDE), channels="L", scale=1 / 255, raw_shape=(SIDE, SIDE)
    )
    torch.manual_seed(bench.seed)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(ROW_BYTES // 64, CLASSES))
    model = kd.Model.of(net, inputs=photo, labels=[str(label) for label in range(CLASSES)])
    watch = Watch()
    watch.start()
    began = time.perf_counter()
    try:
        trained = model.fit(
            df,
            epochs=1,
            batch_size=bench["batch_size"],
            optimizer=partial(torch.optim.SGD, lr=0.01),
            workers=bench.cores,
            key="id",
            progress=False,
        )
        seconds = time.perf_counter() - began
    finally:
        watch.over.set()
        watch.join()
    record: dict[str, Any] = trained.history[-1]
    assert record["rows"] == rows
    if warm_up:
        return
    name = _name(gigabytes)
    bench.record(name, seconds, "s", rows=rows, phases=record["phases_s"], loss=record["epochs"][-1]["loss"])
    bench.record(f"{name}: anonymous memory of a worker", watch.highest["RssAnon"], "MiB")
    bench.record(f"{name}: mapped pages of a worker", watch.highest["RssFile"], "MiB")


CASE = Case(
    name="larger_than_memory",
    what="Up to 20 GB of rows spooled and trained on: seconds against rows, anonymous memory of a worker.",
    run=run,
    presets={
        "tiny": {"gigabytes": (0.01, 0.02), "batch_size": 64},
        "full": {"gigabytes": (2.5, 5, 10, 20), "batch_size": 256},
    },
    targets=(
        Target(value="anonymous memory of a worker, MiB", at_most=2048),
        Target(value="seconds per GB, largest / half as large", at_most=1.25),
    ),
    rounds=1,
)
