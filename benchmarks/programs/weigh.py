"""One featurising job in a session of its own, and the memory of its Python workers while they compute.

Reads `/proc/PID/smaps_rollup` of Spark's Python workers ten times a second. A sample counts where every worker has
used the processor since the last one; the first quarter of those, when pages are still being touched for the first
time, is left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.programs import answer, spec, wait_for_go

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class Widen(nn.Module):
    """A convolution's or dense layer's output without its weights: the first channel, as often as asked for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[:, :1].expand(-1, self.channels).contiguous()
        return x[:, :1].expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)


def weightless(until: str) -> nn.Sequential:
    """VGG16's activations, layer by layer, with no weights at all."""
    layers: list[nn.Module] = []
    for width, depth in VGG16:
        for _ in range(depth):
            layers += [Widen(width), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    if until == "fc2":
        layers += [Widen(4096), nn.ReLU(inplace=True), Widen(4096), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def python_workers() -> list[int]:
    """Spark's Python workers of this process: children of its `pyspark.daemon`."""
    daemons, parents = set(), {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"pyspark.daemon" in command or b"pyspark/daemon" in command:
                # The name may hold blanks and brackets: fields are counted behind its closing bracket.
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    daemons = {pid for pid, parent in parents.items() if parent not in parents and _ours(parent)}
    return [pid for pid, parent in parents.items() if parent in daemons]


def _ours(pid: int) -> bool:
    own = os.getpid()
    while pid > 1:
        if pid == own:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def pss_kib(pid: int) -> int:
    """Proportional set size: a page that n processes share counts 1/n for each."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def ticks(pid: int) -> int:
    """Processor time used so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class Scale(threading.Thread):
    """Weighs the workers until told to stop."""

    def __init__(self, workers: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self.workers, self.every_s = workers, every_s
        self.samples_kib: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        before: dict[int, int] = {}
        while not self.over.wait(self.every_s):
            with contextlib.suppress(OSError):
                now = {pid: ticks(pid) for pid in python_workers()}
                busy = [pid for pid in now if now[pid] > before.get(pid, now[pid])]
                before = now
                if len(busy) == self.workers:
                    self.samples_kib.append(sum(pss_kib(pid) for pid in busy))


def main() -> None:
    """Spec: net (vgg16, weightless, idle), layer, workers, precision, photos, out. Answers MiB and samples."""
    asked = spec()
    import kindling as kd

    shutil.rmtree(asked["out"], ignore_errors=True)
    spark = kd.spark(f"local[{asked['workers']}]")
    if asked["net"] == "vgg16":
        model = kd.load("vgg16").until(asked["layer"])
    else:
        module = (
            weightless(asked["layer"])
            if asked["net"] == "weightless"
            else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        )
        model = kd.Model.of(module, inputs=kd.prepare.ImageStep("image"))
    photos = kd.read.images(asked["photos"], spark=spark)
    wait_for_go()
    scale = Scale(asked["workers"], every_s=0.1)
    scale.start()
    began = time.perf_counter()
    model.featurize(photos, out=asked["out"], precision=asked["precision"], progress=False)
    seconds = time.perf_counter() - began
    scale.over.set()
    scale.join()
    spark.stop()
    steady = scale.samples_kib[len(scale.samples_kib) // 4 :]
    mib = [kib / 1024 for kib in steady]
    answer(
        {
            "samples": len(mib),
            "median_mib": statistics.median(mib) if mib else 0.0,
            "highest_mib": max(mib, default=0.0),
            "seconds": seconds,
        }
    )


if __name__ == "__main__":
    main()
