"""Fit the model of `kindling.train.scaling` to the newest full figures, and write it where it is read.

    python benchmarks/scaling.py

reads `results/network.jsonl`, `results/lenet_epoch.jsonl` and `results/spool.jsonl`, and writes the constants into
`src/kindling/train/scaling.json` and the tables of `docs/SCALING.md`. No constant is set by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402

from benchmarks.harness import REPOSITORY, BenchmarkError  # noqa: E402
from benchmarks.links import Link  # noqa: E402
from benchmarks.page import newest, number  # noqa: E402
from kindling.train.scaling import CONSTANTS as CONSTANTS_OF_A_SUM  # noqa: E402
from kindling.train.scaling import Job, Network, estimate, exchange_s, period, terms  # noqa: E402

CONSTANTS = REPOSITORY / "src" / "kindling" / "train" / "scaling.json"
PAGE = REPOSITORY / "docs" / "SCALING.md"
EXAMPLES = {
    "a perceptron, 1 M weights, 10 ms a step": Job(weights=1_070_000, rows=1_000_000, batch_size=32, step_s=0.010),
    "a residual net, 26 M weights, 1.5 s a step": Job(weights=25_600_000, rows=1_000_000, batch_size=32, step_s=1.5),
    "the same at 0.1 s a step": Job(weights=25_600_000, rows=1_000_000, batch_size=32, step_s=0.1),
    "VGG16, 138 M weights, 6 s a step": Job(weights=138_000_000, rows=1_000_000, batch_size=32, step_s=6.0),
}
"""Jobs of the predictions: sizes of well-known nets with round step times, which are assumptions and no figures."""
WORKERS = (8, 64, 512)
NETWORKS = (
    Network(rate_bit_s=1e10, delay_s=5e-5),
    Network(rate_bit_s=1e9, delay_s=5e-5),
    Network(rate_bit_s=1e8, delay_s=0.02),
)


@dataclass(frozen=True)
class Sum:
    """One measured exchange."""

    size: int
    workers: int
    network: Network
    seconds: float

    @property
    def kind(self) -> tuple[int, float, float, bool]:
        """What was set up: points of one kind share everything but the size."""
        return self.workers, self.network.rate_bit_s, self.network.delay_s, self.network.one_machine


def figures_of(results: Path, case: str) -> list[dict[str, Any]]:
    """The figures of the newest full run of a case.

    Raises: BenchmarkError, when there is none.
    """
    summary = newest(results, case)
    if summary is None:
        raise BenchmarkError(f"{results} has no full run of {case}. Run: python benchmarks/run.py {case}")
    lines = map(json.loads, (results / f"{case}.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["run"] == summary["run"] and line["kind"] == "figure"]


def sums_of(figures: Sequence[Mapping[str, Any]]) -> list[Sum]:
    """Every timed sum, but for those that went through the relay to learn what it costs."""
    found = []
    for line in figures:
        if "sums" not in line or (line.get("relay") and not line.get("delay_s")):
            continue
        one = line.get("one_machine", False)
        network = Network(
            rate_bit_s=line.get("rate_bit_s", 1e12),
            delay_s=line.get("delay_s", 0.0),
            one_machine=one,
            workers_per_core=line["workers"] / line["cores"],
        )
        found += [Sum(int(size), line["workers"], network, seconds) for size, seconds in line["sums"]]
    return found


def fit(sums: Sequence[Sum]) -> dict[str, float]:
    """The constants of one kind of exchange: least squares of the logarithm's error, none of them negative.

    Small and large sums count alike, and a sum that something else has disturbed counts little.

    >>> lan = [Sum(s, w, Network(rate_bit_s=r, delay_s=d), 0.001 + d * 2 + 2 * (w - 1) / w * s * 8 / r / 0.5)
    ...        for s in (1 << 16, 1 << 22) for w in (2, 4) for r in (1e8, 1e9) for d in (0.0, 0.02)]
    >>> {name: round(value, 4) for name, value in fit(lan).items()}
    {'start_s': 0.001, 'peer_s': 0.0, 'delays': 2.0, 'wire': 2.0, 'crowd': 0.0, 'copy_s_per_byte': 0.0}
    """
    from scipy.optimize import least_squares, nnls

    seconds = np.array([one.seconds for one in sums])
    table = np.array([terms(one.size, one.workers, one.network) for one in sums])
    # Columns of like size; a constant that nothing here depends on stays 0.
    scale = np.abs(table / seconds[:, None]).max(0)
    shares = np.divide(table / seconds[:, None], scale, out=np.zeros_like(table), where=scale > 0)
    start, _ = nnls(shares, np.ones(len(sums)))

    def off(factors: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(shares @ factors, 1e-9))

    bounds = (np.zeros(len(start)), np.full(len(start), np.inf))
    found = least_squares(off, np.maximum(start, 1e-6), bounds=bounds, loss="soft_l1", f_scale=0.1, xtol=1e-14).x
    found[found < 1e-5] = 0.0
    values = np.divide(found, scale, out=np.zeros_like(found), where=scale > 0)
    return {name: float(value) for name, value in zip(CONSTANTS_OF_A_SUM, values, strict=True)}


def errors(sums: Sequence[Sum], fitted: Mapping[str, Any]) -> list[float]:
    """Relative error of each sum, as a share of what was measured."""
    return [exchange_s(one.size, one.workers, one.network, fitted) / one.seconds - 1 for one in sums]


def left_out(sums: Sequence[Sum], name: str) -> list[float]:
    """Relative errors where each set-up is predicted from the others: what to expect of a network not measured."""
    found = []
    for kind in sorted({one.kind for one in sums}):
        rest = [one for one in sums if one.kind != kind]
        found += errors([one for one in sums if one.kind == kind], {name: fit(rest)})
    return found


def constants(results: Path) -> dict[str, Any]:
    """All that `scaling.json` holds."""
    sums = sums_of(figures_of(results, "network"))
    kinds = {
        "network": [one for one in sums if not one.network.one_machine],
        "one_machine": [one for one in sums if one.network.one_machine],
    }
    fitted: dict[str, Any] = {name: fit(points) for name, points in kinds.items()}
    starts = [
        line["figure"] for line in figures_of(results, "lenet_epoch") if "fit to first step" in line["contestant"]
    ]
    packed = [line["phases"] for line in figures_of(results, "spool") if line["contestant"].startswith("kindling")]
    wide, runs = newest(results, "spool"), [newest(results, case) for case in ("network", "lenet_epoch", "spool")]
    assert wide is not None
    row_bytes = 4 * wide["settings"]["features"]
    total = wide["settings"]["rows"] * row_bytes
    return {
        **fitted,
        "start_s": statistics.median(starts),
        "pack_bytes_s_per_worker": statistics.median(
            total / (phases["pack"] + phases["spool"]) / wide["cores"] for phases in packed
        ),
        "fit": {
            name: {
                "points": len(points),
                "median_error": statistics.median(map(abs, errors(points, fitted))),
                "largest_error": max(map(abs, errors(points, fitted))),
                **(
                    {"median_error_left_out": statistics.median(map(abs, left_out(points, name)))}
                    if name == "network"
                    else {}
                ),
            }
            for name, points in kinds.items()
        },
        "provenance": [
            {
                **{key: run[key] for key in ("case", "command", "started", "seed", "cores", "versions")},
                "machine": {key: run["machine"][key] for key in ("processor", "cores", "memory_gib", "load")},
                "remark": run["notes"].get("remark", ""),
            }
            for run in runs
            if run is not None
        ],
    }


# ---------------------------------------------------------------------------------------------------------- the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def constants_table(known: Mapping[str, Any], results: Path) -> str:
    units = {
        "start_s": ("start", 1e6, "µs"),
        "peer_s": ("peer", 1e6, "µs"),
        "delays": ("delays", 1, ""),
        "wire": ("wire", 1, ""),
        "crowd": ("crowd", 1, ""),
        "copy_s_per_byte": ("copy", 1e9, "ns/byte"),
    }
    rows = [
        [f"{told} {unit}".strip(), *(number(known[kind][name] * scale) for kind in ("network", "one_machine"))]
        for name, (told, scale, unit) in units.items()
    ]
    for told, name in (
        ("measured sums", "points"),
        ("median error", "median_error"),
        ("largest error", "largest_error"),
        ("median error for a set-up left out of the fit", "median_error_left_out"),
    ):
        values = [known["fit"][kind].get(name) for kind in ("network", "one_machine")]
        rows.append([told, *("" if v is None else str(v) if name == "points" else f"{100 * v:.0f} %" for v in values)])
    rows.append(["`fit` to first step, warm session", f"{known['start_s']:.1f} s", ""])
    rows.append(["pack and spool, by each worker", f"{known['pack_bytes_s_per_worker'] / 1e6:.0f} MB/s", ""])
    lines = [table(["constant", "over a network", "on one machine"], rows), "", "Fitted to:", ""]
    for run in known["provenance"]:
        commit = run["versions"].get("commit", "unknown")
        told = f"load {run['machine']['load']:.1f} at its end{', ' if run['remark'] else ''}{run['remark']}"
        lines.append(f"- `{run['command']}`, {run['started'][:10]}, commit `{commit}`, {run['cores']} cores, {told}")
    return "\n".join(lines)


def measured_table(known: Mapping[str, Any], results: Path) -> str:
    """Seconds to the target of every strategy, by link, for each number of workers."""
    figures = [line for line in figures_of(results, "network") if line.get("trial")]
    parts = []
    for workers in sorted({line["workers"] for line in figures}):
        mine = [line for line in figures if line["workers"] == workers]
        links = list(dict.fromkeys((line["rate_bit_s"], line["delay_s"]) for line in mine))
        rows = []
        for trial in dict.fromkeys(line["trial"] for line in mine):
            cells = []
            for link in links:
                runs = [one for one in mine if one["trial"] == trial and (one["rate_bit_s"], one["delay_s"]) == link]
                reached = all(one["reached"] for one in runs)
                seconds = number(statistics.median(one["figure"] for one in runs))
                cells.append(seconds if reached else f"> {seconds}")
            sent = [statistics.mean(one["bytes_sent"]) / 1e6 for one in mine if one["trial"] == trial]
            steps = statistics.median(one["step"] for one in mine if one["trial"] == trial)
            rows.append([trial, *cells, number(statistics.median(sent)), f"{steps:g}"])
        names = [Link(rate_bit_s=rate, delay_s=delay).name for rate, delay in links]
        parts.append(table([f"{workers} workers", *names, "MB sent by each", "steps"], rows))
    return "\n\n".join(parts)


def checked_table(known: Mapping[str, Any], results: Path) -> str:
    """Seconds per step of the trainings that the model describes, as measured and as predicted."""
    rows = []
    weights = 784 * 1024 + 1024 + 1024 * 256 + 256 + 256 * 10 + 10
    for line in figures_of(results, "network"):
        found = re.fullmatch(r"(allreduce|averaging every=(\d+))", line.get("trial") or "")
        if not found:
            continue
        steps = line["step"]
        step_s = statistics.mean(map(sum, zip(line["compute_s"], line["data_s"], strict=True))) / steps
        every = int(found[2] or 1)
        epoch = line["steps_per_epoch"]
        network = Network(
            rate_bit_s=line["rate_bit_s"],
            delay_s=line["delay_s"],
            workers_per_core=line["workers"] / line["cores"],
        )
        one = Job(weights=weights, rows=epoch * line["workers"] * 64, batch_size=64, step_s=step_s)
        said = estimate(one, line["workers"], network, every=every, fitted=known).epoch_s / epoch
        seen = line["figure"] / steps
        rows.append(
            [
                line["contestant"],
                number(1000 * step_s),
                number(1000 * seen),
                number(1000 * said),
                f"{100 * (said / seen - 1):+.0f} %",
            ]
        )
    return table(["training", "ms computing", "ms per step, measured", "by the model", "error"], rows)


def predicted_table(known: Mapping[str, Any], results: Path) -> str:
    """By job and network, for 8, 64 and 512 workers: all-reduce's epoch and share of computing, averaging's period."""
    rows = []
    for name, job in EXAMPLES.items():
        for network in NETWORKS:
            cells = []
            for workers in WORKERS:
                epoch = estimate(job, workers, network, fitted=known)
                every = period(job, workers, network, fitted=known)
                cells.append(f"{_seconds(epoch.epoch_s)}, {100 * (1 - epoch.exchanging):.0f} %, {every}")
            one = estimate(job, 1, network, fitted=known).epoch_s
            link = Link(rate_bit_s=network.rate_bit_s, delay_s=network.delay_s).name
            rows.append([f"{name}; {link}", _seconds(one), *cells])
    return table(["job", "1 worker", *(f"{workers} workers" for workers in WORKERS)], rows)


def _seconds(value: float) -> str:
    return f"{value / 3600:.1f} h" if value >= 7200 else f"{value / 60:.1f} min" if value >= 120 else f"{value:.1f} s"


TABLES: Mapping[str, Callable[[Mapping[str, Any], Path], str]] = {
    "constants": constants_table,
    "measured": measured_table,
    "checked": checked_table,
    "predicted": predicted_table,
}


def fill(text: str, known: Mapping[str, Any], results: Path) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- scaling: {match[1]} -->\n{TABLES[match[1]](known, results)}\n<!-- end -->"

    return re.sub(r"<!-- scaling: (\w+) -->.*?<!-- end -->", made, text, flags=re.S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--constants", type=Path, default=CONSTANTS, help="where to write them")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    try:
        known = constants(asked.results)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    asked.constants.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    asked.page.write_text(fill(asked.page.read_text(encoding="utf-8"), known, asked.results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
