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

from torch import nn

from benchmarks.programs import answer, spec, wait_for_go

TANHS = 150
"""Layers of the net without weights: enough to be seen computing, none larger than the photo."""


def without_weights() -> nn.Sequential:
    """A net that takes VGG16's input, computes for a while and has no weights."""
    return nn.Sequential(*(nn.Tanh() for _ in range(TANHS)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def python_workers() -> list[int]:
    """Spark's Python workers of this process: children of the process that forks them."""
    daemons, parents = set(), {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if any(b"-m\0" + name in command for name in (b"kindling.daemon", b"pyspark.daemon")):
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
    """Spec: weights (yes or no), layer, workers, precision, photos, out. Answers MiB and samples."""
    asked = spec()
    import kindling as kd
    from kindling.predict.engine import net_batch

    shutil.rmtree(asked["out"], ignore_errors=True)
    spark = kd.spark(f"local[{asked['workers']}]")
    vgg16 = kd.load("vgg16").until(asked["layer"])
    # The same batches in both jobs: decoded photos must take as much.
    batch_size = net_batch(vgg16.signature, vgg16.module)
    model = vgg16 if asked["weights"] else kd.Model.of(without_weights(), inputs=vgg16.preparation.inputs)
    # So few photos would be one task's work: each worker gets its share, and all of them compute at the same time.
    photos = kd.read.images(asked["photos"], spark=spark).repartition(asked["workers"])
    wait_for_go()
    scale = Scale(asked["workers"], every_s=0.1)
    scale.start()
    began = time.perf_counter()
    model.featurize(photos, out=asked["out"], precision=asked["precision"], batch_size=batch_size, progress=False)
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
