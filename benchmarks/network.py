"""Every strategy on slow networks: seconds to a target accuracy and bytes sent, over links of known rate and delay.

Workers are processes in network namespaces (`links.py`) that run kindling's own loop over gloo
(`programs/network_worker.py`): MNIST's digits, a perceptron of 1.07 million weights, one and the same optimizer for
all. Beside that, sums of several sizes are timed on every link: what `scaling.py` fits its model to. Without `netem`
delay comes from a relay in user space; the case measures what the relay itself costs.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bench, BenchmarkError, Case, Target, run_together
from benchmarks.links import Link, Network, missing, network

VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "allreduce": ({}, {"compression": "bf16"}, {"compression": "powersgd"}),
    "averaging": ({"every": 16},),
    "diloco": ({"every": 25},),
    "downpour": ({"push_every": 16, "fetch_every": 16},),
}
"""Settings to try of a registered strategy; one that is not named here runs with its own defaults."""
SGD: Mapping[str, float] = {"lr": 0.1, "momentum": 0.9}
OWN_SGD: Mapping[str, Mapping[str, float]] = {"threshold": {"lr": 0.1, "momentum": 0.0}}
"""Where a strategy needs another optimizer: what a threshold holds back comes late, and momentum sends it twice."""

_PORT = 29400  # in a namespace of its own nobody else can have it


def trials() -> dict[str, tuple[str, dict[str, Any], dict[str, float]]]:
    """Every strategy in the registry, by the name it has in the figures: (registered name, settings, SGD's settings).

    >>> trials()["averaging every=16"]
    ('averaging', {'every': 16}, {'lr': 0.1, 'momentum': 0.9})
    """
    from kindling.train.strategies import STRATEGIES

    return {
        " ".join([kind, *(f"{name}={value}" for name, value in settings.items())]): (
            kind,
            dict(settings),
            dict(OWN_SGD.get(kind, SGD)),
        )
        for kind in STRATEGIES
        for settings in VARIANTS.get(kind, ({},))
    }


def run(bench: Bench) -> None:
    why = missing()
    if why is not None:
        raise BenchmarkError(why)
    arrays = inputs.mnist_arrays(bench["train_rows"], bench["test_rows"], tiny=bench.preset == "tiny")
    for number in range(bench.rounds):
        for workers, links in bench["links"].items():
            for link in (Link(**settings) for settings in links):
                measure(bench, arrays, int(workers), link, number)
        for workers, links in bench["sums_only"].items():
            for link in (Link(**settings) for settings in links):
                measure(bench, arrays, int(workers), link, number, only_sums=True)
        for workers in bench["one_machine"]:
            measure(bench, arrays, workers, None, number, only_sums=True)
    compare(bench)


def measure(
    bench: Bench, arrays: Path, workers: int, link: Link | None, round: int, *, only_sums: bool = False
) -> None:
    """All sums and trainings of some workers over one link, or within this machine where there is none."""
    asked = {} if only_sums else trials()
    common = {
        **{name: bench[name] for name in ("batch_size", "target", "limit_s", "sizes", "repeats")},
        "world": workers,
        "port": _PORT if link else _free_port(),
        "threads": 1,
        "interface": "eth0" if link else "lo",
        "shared": link is None,
        "arrays": str(arrays),
        "seed": bench.seed + round,
        "trials": asked,
    }
    with network(workers, link) if link else contextlib.nullcontext(within(workers)) as net:
        specs = [{**common, "rank": rank, "host": net.addresses[0]} for rank in range(workers)]
        limit_s = 60 + 2 * bench["limit_s"] * (1 + len(asked))
        answers = run_together("network_worker", specs, prefixes=net.prefixes, timeout_s=limit_s)
        relay_cpu_s = net.relay_cpu_s()
    where = f"{workers} workers, {link.name if link else 'one machine'}"
    # The quickest of several: whatever else the machine does can only make a sum slower.
    sums = {size["bytes"]: min(size["seconds"]) for size in answers[0]["sums"]}
    largest = max(sums)
    told: dict[str, Any] = {
        "workers": workers,
        "cores": bench.cores,
        **(asdict(link) if link else {"one_machine": True}),
    }
    name = f"{where}: a sum of {largest / 2**20:g} MiB"
    bench.record(name, sums[largest], "s", round=round, sums=list(sums.items()), relay_cpu_s=relay_cpu_s, **told)
    for trial in asked:
        mine = [answer["trials"][trial] for answer in answers]
        seconds = max(one["seconds"] for one in mine)
        ended_alike = len({tuple(one["weights"]) for one in mine}) == 1
        if not ended_alike:
            bench.note(f"{where}, {trial}", "the workers ended with different weights")
        if not mine[0]["reached"]:
            bench.note(f"{where}, {trial}", f"the target was not reached in {seconds:.0f} s; counted as if it had been")
        details = {key: mine[0][key] for key in ("reached", "step", "accuracy", "steps_per_epoch", "curve")}
        spent = {key: [one[key] for one in mine] for key in ("compute_s", "communicate_s", "data_s", "bytes_sent")}
        bench.record(f"{where}: {trial}", seconds, "s to target", round=round, trial=trial, **details, **spent, **told)
        megabytes = statistics.mean(one["bytes_sent"] for one in mine) / 1e6
        bench.record(f"{workers} workers, {trial}: sent by each", megabytes, "MB to target", round=round)


def within(workers: int) -> Network:
    """This machine's loopback, where nothing needs to be made."""
    return Network(("127.0.0.1",) * workers, ((),) * workers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def compare(bench: Bench) -> None:
    """The ratios: how much later all-reduce comes than each other strategy, and what the relay costs."""
    for workers, links in bench["links"].items():
        for link in (Link(**settings) for settings in links):
            where = f"{workers} workers, {link.name}"
            slow = bench.best([f"{where}: allreduce"])
            for trial in trials():
                if trial != "allreduce":
                    bench.ratio(f"{where}: allreduce / {trial}", slow, bench.best([f"{where}: {trial}"]))
    for line in bench.lines:
        if line.get("relay") and not line["delay_s"]:
            size = line["contestant"].rpartition(": ")[2]
            direct = Link(rate_bit_s=line["rate_bit_s"])
            name = f"{line['workers']} workers, {direct.name}: {size}, relayed / direct"
            plain = bench.best([f"{line['workers']} workers, {direct.name}: {size}"])
            bench.ratio(name, bench.best([line["contestant"]]), plain)


def draw(results: Path, into: Path) -> Path | None:
    """The plot of the newest full run: accuracy over time on the slowest link, and seconds to target by link."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    full = [line for line in lines if line["kind"] == "summary" and line["preset"] == "full"]
    if not full:
        return None
    figures = [line for line in lines if line["run"] == full[-1]["run"] and line.get("trial")]
    target, workers = full[-1]["settings"]["target"], min(line["workers"] for line in figures)
    figures = [line for line in figures if line["workers"] == workers]
    return _picture(figures, workers, target, into / "network.svg")


def _picture(figures: Sequence[Mapping[str, Any]], workers: int, target: float, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    links = list(dict.fromkeys((line["rate_bit_s"], line["delay_s"]) for line in figures))
    slow = min(rate for rate, delay in links if not delay)
    names = [Link(rate_bit_s=rate, delay_s=delay).name.replace(", ", "\n") for rate, delay in links]
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kindling", "font.size": 9}):
        picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        for trial in dict.fromkeys(line["trial"] for line in figures):
            mine = [line for line in figures if line["trial"] == trial]
            first = next(line for line in mine if (line["rate_bit_s"], line["delay_s"]) == (slow, 0.0))
            seconds = [point["seconds"] for point in first["curve"]]
            left.plot(seconds, [100 * point["accuracy"] for point in first["curve"]], marker=".", label=trial)
            by_link = [
                statistics.median(line["figure"] for line in mine if (line["rate_bit_s"], line["delay_s"]) == link)
                for link in links
            ]
            right.plot(names, by_link, marker="o", label=trial)
        left.axhline(100 * target, color="grey", linewidth=0.8, linestyle=":")
        left.set(xscale="log", xlabel="seconds of training", ylabel="test accuracy, %")
        left.set_title(f"{workers} workers, {Link(rate_bit_s=slow).name}", fontsize=9)
        right.set(yscale="log", ylabel=f"seconds to {100 * target:g} %")
        right.set_title(f"{workers} workers, by link", fontsize=9)
        for axis in (left.xaxis, right.yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(plain)
        picture.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        picture.savefig(path, metadata={"Date": None})
        plt.close(picture)
    return path


def _links(*rates_and_delays: tuple[float, float]) -> list[dict[str, float]]:
    return [{"rate_bit_s": rate, "delay_s": delay} for rate, delay in rates_and_delays]


CASE = Case(
    name="network",
    what="Every strategy over links of 10 Gbit/s to 100 Mbit/s, and 20 ms of delay: seconds and bytes to an accuracy.",
    run=run,
    presets={
        "tiny": {
            "train_rows": 256,
            "test_rows": 64,
            "batch_size": 32,
            "target": 0.2,
            "limit_s": 1.0,
            "sizes": [1 << 16],
            "repeats": 1,
            "links": {"2": _links((1e9, 0.005))},
            "sums_only": {},
            "one_machine": [2],
        },
        "full": {
            "train_rows": 6400,
            "test_rows": 5000,
            "batch_size": 64,
            "target": 0.88,
            "limit_s": 100.0,
            "sizes": [1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24],
            "repeats": 7,
            "links": {
                "2": _links((1e10, 0.0), (1e9, 0.0), (1e8, 0.0), (1e8, 0.02)),
                "4": _links((1e8, 0.0)),
            },
            "sums_only": {
                "2": [{"rate_bit_s": 1e9, "relay": True}],
                "3": _links((1e9, 0.0), (1e8, 0.02)),
                "4": _links((1e10, 0.0), (1e9, 0.0)),
            },
            "one_machine": [2, 4],
        },
    },
    targets=(
        Target(value="2 workers, 100 Mbit/s: allreduce / averaging every=16", at_least=5),
        Target(value="2 workers, 100 Mbit/s: allreduce / diloco every=25", at_least=5),
    ),
    rounds=1,
    draw=draw,
)
