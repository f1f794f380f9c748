"""VGG16's weights from a file of every format: how long, how much memory, and how fast the net is that comes out.

Each format's file is loaded in a process of its own. The memory of the first load, which no file could give back,
counts against the bytes of the weights. Then, in every round, the load counts against reading the bytes of that very
file and converting every tensor once, into the order that torch has it in. The net that comes out counts against the
same net written by hand, in turns, by the processor time of one thread, at a quarter of VGG16's widths: so that many
passes fit into little time, and what an imported net costs beside its sums weighs more.
Formats are told apart by what is read, not by who wrote it: the files are made by `vgg_files.py`. Linux only.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench, BenchmarkError, Case, Target, run_program
from benchmarks.page import newest
from benchmarks.page import number as shown
from benchmarks.vgg_files import FORMATS, Shape

LOAD = "load / read and convert once"
MEMORY = "memory / weights"
RESIDENT = "memory with mapped pages of the file / weights"
SPEED = "speed / net by hand"
MOST_DIFFERENCE = 1e-4
"""Of the largest output: what the same numbers in another order of sums may differ by."""


def run(bench: Bench) -> None:
    shape = Shape(**bench["shape"])
    names = [name for name, form in FORMATS.items() if bench["by_name"] or not form.full_only]
    groups = [names] if bench["together"] else [[name] for name in names]
    bench.note("bytes of the weights", shape.bytes())
    for group in groups:
        with bench.scratch() as folder:
            asked = {"formats": group, "shape": dataclasses.asdict(shape), "folder": str(folder), "seed": bench.seed}
            sizes = run_program("load_format", {**asked, "task": "write"})
            asked |= {"threads": bench.cores, "forwards": bench["forwards"]}
            seen = run_program("load_format", {**asked, "task": "measure", "rounds": bench.rounds})
            for name in group:
                keep(bench, name, seen[name], sizes[name]["bytes"])
    for what, pick in ((LOAD, max), (MEMORY, max), (SPEED, min)):
        medians = {name: bench.median(f"{name}: {what}") for name in names if f"{name}: {what}" in bench.figures}
        worst = pick(medians, key=lambda name: medians[name])
        bench.note(f"{what}: worst", worst)
        bench.value(f"{what}, the worst of all formats", medians[worst])


def keep(bench: Bench, name: str, seen: dict[str, Any], file_bytes: int) -> None:
    """Record one file's figures.

    Raises: BenchmarkError, where the net does not give what the one by hand gives.
    """
    if not seen["difference"] <= MOST_DIFFERENCE:
        raise BenchmarkError(f"{name}: outputs differ by {seen['difference']:.2g} of the largest from the net by hand.")
    for number, one in enumerate(seen["rounds"]):
        about = {**one, "difference": seen["difference"], "file_bytes": file_bytes}
        bench.record(f"{name}: {LOAD}", one["load_s"] / one["plain_s"], "x", round=number, **about)
        if "hand_s" in one:
            bench.record(f"{name}: {SPEED}", one["hand_s"] / one["kindling_s"], "x", round=number)
    bench.record(f"{name}: {MEMORY}", seen["own"], "x")
    bench.record(f"{name}: {RESIDENT}", seen["resident"], "x")


def tables(results: Path, documents: Path) -> Path | None:
    """The short table of FORMATS.md, from the newest full run."""
    summary = newest(results.parent, results.stem)
    page = documents / "FORMATS.md"
    if summary is None:
        return None
    columns = (LOAD, MEMORY, RESIDENT, SPEED)
    lines = [f"| File | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in FORMATS:
        if f"{name}: {LOAD}" in summary["runs"]:
            runs = [summary["runs"].get(f"{name}: {column}") for column in columns]
            cells = [shown(statistics.median(figures)) if figures else "" for figures in runs]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(["<!-- loads -->", *lines, "<!-- end -->"])
    old = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- loads -->.*?<!-- end -->", lambda _: text, old, flags=re.S), encoding="utf-8")
    return page


CASE = Case(
    name="load_formats",
    what="VGG16's weights from a file of every format: load time, peak memory, speed of the net that comes out.",
    run=run,
    presets={
        "tiny": {
            "shape": {"blocks": ((1, 8), (2, 16), (1, 16)), "pixels": 32, "hidden": 64, "classes": 10},
            "by_name": False,
            "together": True,
            "forwards": 2,
        },
        "full": {"shape": {}, "by_name": True, "together": False, "forwards": 15},
    },
    targets=(
        Target(value=f"{LOAD}, the worst of all formats", at_most=2.0),
        Target(value=f"{MEMORY}, the worst of all formats", at_most=2.0),
        Target(value=f"{SPEED}, the worst of all formats", at_least=0.95),
    ),
    draw=tables,
)
