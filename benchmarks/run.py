"""The one benchmark runner and its registry.

    python benchmarks/run.py --list
    python benchmarks/run.py featurize_vgg16 --rounds 3
    python benchmarks/run.py --preset tiny            # every case, in seconds: proves that they work, measures nothing

Each run appends its figures as JSON lines to `benchmarks/results/CASE.jsonl`, with command, machine, versions and
seed. Several cases run one after the other, each in a process of its own, so that none finds another's warm
session.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks.harness import REPOSITORY, Bench, BenchmarkError, Case, make_peers  # noqa: E402
from benchmarks.page import fill  # noqa: E402

CASES = (
    "featurize_vgg16",
    "featurize_squeezenet",
    "head",
    "accuracy_head",
    "memory",
    "mnist_lenet",
    "transfer_caltech101",
    "load_formats",
    "lenet_epoch",
    "ddp_overhead",
    "torch_distributor",
    "spool",
    "network",
    "larger_than_memory",
)
"""The registry: each name is a module of this package with one `CASE`."""


def find(name: str) -> Case:
    """The case of a registered name."""
    case: Case = importlib.import_module(f"benchmarks.{name}").CASE
    return case


def pin(cores: int) -> None:
    """Hold this process and all its children to the first `cores` cores it may use: every contestant gets the same."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:cores])


def run_case(bench: Bench) -> Bench:
    """Run a case to its end, whatever happens to the session it opened."""
    try:
        bench.case.run(bench)
    finally:
        bench.stop()
    return bench


def show(bench: Bench) -> str:
    """What a run found, for people."""
    lines = [f"\n{bench.case.name} ({bench.preset}, {bench.rounds} rounds)"]
    lines += [f"  {name:<58} {bench.median(name):>12.3f} {bench.units[name]}" for name in bench.figures]
    judged = {verdict["value"]: verdict for verdict in bench.verdicts()}
    for name, seen in bench.summary.items():
        verdict = judged.get(name)
        told = {True: "met", False: "MISSED", None: "not judged"}[verdict["met"]] if verdict else ""
        lines.append(f"  {name:<58} {seen:>12.3f} " + (f"target {verdict['bound']}: {told}" if verdict else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where a case failed, or with --check missed a target; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="one or more of --list; all when none is named")
    parser.add_argument("--list", action="store_true", help="list the cases and their targets")
    parser.add_argument("--preset", choices=("tiny", "full"), default="full")
    parser.add_argument("--rounds", type=int, help="interleaved rounds; default: the case's own (tiny: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2, help="cores that every contestant may use (default 2)")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", metavar="FOLDER")
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument(
        "--peers", dest="peers", action="store_true", default=None, help="run the peers (default in full)"
    )
    peers.add_argument("--no-peers", dest="peers", action="store_false", help="leave the peers out (default in tiny)")
    parser.add_argument("--write-docs", action="store_true", help="put the newest full figures into docs/BENCHMARKS.md")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a target is missed")
    parser.add_argument(
        "--make-peers", action="store_true", help="build .venv-peers from requirements-peers.txt, and end"
    )
    asked = parser.parse_args(arguments)
    if asked.make_peers:
        make_peers()
        return 0
    if asked.write_docs:
        page = REPOSITORY / "docs" / "BENCHMARKS.md"
        page.write_text(fill(page.read_text(encoding="utf-8"), asked.results), encoding="utf-8")
        for case in map(find, CASES):
            results = asked.results / f"{case.name}.jsonl"
            if case.draw is not None and results.exists():
                case.draw(results, page.parent)
        return 0
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}. There are: {', '.join(CASES)}")
    if asked.list:
        for name in CASES:
            case = find(name)
            print(f"{name:<22} {case.what}")
            for target in case.targets:
                print(f"{'':<22}   target: {target.value} {target}")
        return 0
    names = asked.cases or list(CASES)
    if len(names) > 1:
        rest = [word for word in (sys.argv[1:] if arguments is None else arguments) if word not in names]
        codes = [
            subprocess.run([sys.executable, str(Path(__file__)), name, *rest], check=False).returncode for name in names
        ]
        return max(codes)
    pin(asked.cores)
    case = find(names[0])
    bench = Bench(
        case=case,
        preset=asked.preset,
        rounds=asked.rounds or (1 if asked.preset == "tiny" else case.rounds),
        seed=asked.seed,
        cores=asked.cores,
        results=asked.results.resolve(),
        peers=asked.preset == "full" if asked.peers is None else asked.peers,
        command=shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)]),
    )
    os.chdir(tempfile.gettempdir())  # Spark leaves folders where it is started
    try:
        run_case(bench)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    path = bench.write()
    print(show(bench))
    print(f"  figures in {path}")
    missed = [verdict for verdict in bench.verdicts() if verdict["met"] is False]
    return 1 if asked.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
