"""What every benchmark case stands on: presets, rounds, recorded figures, child processes, verdicts.

A case is a module of this package with one `CASE`. It gets a `Bench`, runs its contestants round by round, records
each figure, and names the ratios that matter. Ratios are taken inside a round, where the contestants ran within
minutes of each other, and only then is their median taken: the speed of a shared machine drifts between rounds.
What the cases read is made in `inputs.py`; programs that must run in a process of their own are in `programs/`; the
command line is `run.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = Path(__file__).resolve().parent / "programs"
PACKAGES = (
    "kindling-spark",
    "pyspark",
    "torch",
    "pyarrow",
    "numpy",
    "pillow",
    "simplejpeg",
    "scikit-learn",
    "ray",
    "daft",
)


class BenchmarkError(Exception):
    """A benchmark that cannot run here; the message names the way on."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound that a summary value must keep."""

    value: str
    """Name of a summary value, for example `kindling / ceiling`."""
    at_least: float | None = None
    at_most: float | None = None

    def met(self, seen: float) -> bool:
        """Whether `seen` keeps the bound.

        >>> Target(value="x", at_most=1.3).met(1.2)
        True
        """
        return (self.at_least is None or seen >= self.at_least) and (self.at_most is None or seen <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One registered benchmark."""

    name: str
    what: str
    """One sentence: what is measured, against what."""
    run: Callable[[Bench], None]
    presets: Mapping[str, Mapping[str, Any]]
    """`tiny` (seconds, proves that the case works) and `full` (the figures that count)."""
    targets: tuple[Target, ...] = ()
    """Judged in the full preset only."""
    rounds: int = 3
    """Default number of rounds of the full preset."""
    draw: Callable[[Path, Path], Path | None] | None = None
    """Draws the newest full figures: (results file, folder of the documents) to the picture, None without figures."""


@dataclass
class Bench:
    """One run of one case: its settings, its clock, its record."""

    case: Case
    preset: str = "full"
    rounds: int = 3
    seed: int = 0
    cores: int = 2
    """Cores that every contestant may use; the runner pins the whole process tree to as many."""
    results: Path = REPOSITORY / "benchmarks" / "results"
    peers: bool = True
    """Whether to run the systems that live in .venv-peers."""
    command: str = ""
    quiet: bool = False
    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    spark: Any = None
    """A session to use; None: `session` starts one, and `stop` ends it."""
    _own: Any = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.case.presets[self.preset]

    def __getitem__(self, name: str) -> Any:
        """A setting of the preset."""
        return self.settings[name]

    # Recording ------------------------------------------------------------------------------------------------------

    def record(self, contestant: str, figure: float, unit: str, *, round: int = 0, **details: Any) -> None:
        """Keep one figure of one contestant in one round, with whatever else explains it."""
        self.figures.setdefault(contestant, []).append((round, figure))
        self.units[contestant] = unit
        self.lines.append(
            {"kind": "figure", "contestant": contestant, "round": round, "figure": figure, "unit": unit, **details}
        )
        self.say(f"round {round}  {contestant:<42} {figure:>10.3f} {unit}")

    def note(self, name: str, value: Any) -> None:
        """Keep something that is no figure: the chosen precision, a list of phases, a path."""
        self.notes[name] = value
        self.say(f"         {name}: {value}")

    def value(self, name: str, value: float) -> None:
        """Keep one summary value: a ratio, an accuracy, a difference. Targets are judged on these."""
        self.summary[name] = value

    def median(self, contestant: str) -> float:
        """Median of a contestant's figures over all rounds."""
        return statistics.median(figure for _, figure in self.figures[contestant])

    def best(self, contestants: Sequence[str], *, highest: bool = True) -> dict[int, float]:
        """By round, the best figure of several contestants: how a ceiling with several configurations counts."""
        pick = max if highest else min
        rounds = sorted({number for name in contestants for number, _ in self.figures.get(name, [])})
        return {
            number: pick(
                figure for name in contestants for seen, figure in self.figures.get(name, []) if seen == number
            )
            for number in rounds
        }

    def ratio(self, name: str, over: Mapping[int, float], under: Mapping[int, float]) -> None:
        """Summary value: the median over the rounds of `over / under`, each taken inside one round.

        >>> bench = Bench(case=Case(name="x", what="", run=print, presets={"full": {}}), quiet=True)
        >>> bench.ratio("a / b", {0: 2.0, 1: 9.0, 2: 4.0}, {0: 1.0, 1: 3.0, 2: 1.0})
        >>> bench.summary["a / b"]
        3.0
        """
        both = sorted(set(over) & set(under))
        if not both:
            raise BenchmarkError(f"{name} cannot be computed: its two sides share no round.")
        each = [over[number] / under[number] for number in both]
        self.lines.append({"kind": "ratio", "ratio": name, "by_round": each})
        self.value(name, statistics.median(each))

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    # The world ------------------------------------------------------------------------------------------------------

    def session(self) -> Any:
        """The warm SparkSession of this run: local, one slot per core."""
        if self.spark is None:
            import kindling

            self.spark = self._own = kindling.spark(f"local[{self.cores}]")
        return self.spark

    def stop(self) -> None:
        """End the session that this run started."""
        if self._own is not None:
            self._own.stop()
            self.spark = self._own = None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for this run's outputs, gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix=f"kindling-bench-{self.case.name}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def verdicts(self) -> list[dict[str, Any]]:
        """Each target with what was seen; `met` is None outside the full preset or where the value is absent."""
        return [
            {
                "value": target.value,
                "bound": str(target),
                "seen": self.summary.get(target.value),
                "met": target.met(self.summary[target.value])
                if self.preset == "full" and target.value in self.summary
                else None,
            }
            for target in self.case.targets
        ]

    def report(self) -> dict[str, Any]:
        """The closing line of a run: everything needed to read or repeat it."""
        return {
            "kind": "summary",
            "case": self.case.name,
            "preset": self.preset,
            "settings": dict(self.settings),
            "rounds": self.rounds,
            "seed": self.seed,
            "cores": self.cores,
            "command": self.command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "machine": machine(),
            "versions": versions(),
            "medians": {name: self.median(name) for name in self.figures},
            "runs": {name: [figure for _, figure in seen] for name, seen in self.figures.items()},
            "units": self.units,
            "values": self.summary,
            "notes": self.notes,
            "targets": self.verdicts(),
        }

    def write(self) -> Path:
        """Append this run to `results/CASE.jsonl`: one line per figure, then the summary."""
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"{self.case.name}.jsonl"
        run = f"{self.case.name}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self.started))}"
        with path.open("a", encoding="utf-8") as out:
            for line in [*self.lines, self.report()]:
                out.write(json.dumps({"run": run, **line}, default=str) + "\n")
        return path


def machine() -> dict[str, Any]:
    """The machine in a few words: processor, cores, memory, what it has for bfloat16, load at this moment."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key.strip() == "model name":
                name = rest.strip()
            elif key.strip() == "flags":
                flags = set(rest.split())
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part, and the commit of this checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return found


# Child processes ----------------------------------------------------------------------------------------------------


def run_together(
    program: str,
    specs: Sequence[Mapping[str, Any]],
    *,
    python: str | Path = sys.executable,
    timeout_s: float = 3600,
    env: Mapping[str, str] | None = None,
    prefixes: Sequence[Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Run `programs/PROGRAM.py` once per spec, all at the same time, and return the JSON object each printed last.

    `prefixes` holds, by spec, words before the command: what runs a child in a network of its own.

    Each child gets its spec as one line of JSON on its standard input (a command line is too short for many paths).
    A child that prepares first and times afterwards prints the line `ready` and waits for another line; all are let go
    together when the last is ready.
    """
    bare = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OMP_", "KMP_", "MKL_", "SPARK_", "PYSPARK_"))
    }
    bare |= {"PYTHONPATH": str(REPOSITORY), **(env or {})}
    children = [
        subprocess.Popen(
            [*prefix, str(python), "-m", f"benchmarks.programs.{program}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=bare,
            cwd=tempfile.gettempdir(),  # Spark and Ray leave folders where they were started
        )
        for prefix in prefixes or [()] * len(specs)
    ]
    # Nobody reads the children's standard error while they wait for each other: a full pipe would stop them.
    errors: list[list[str]] = [[] for _ in children]
    drains = [
        threading.Thread(target=lambda child=child, into=into: into.extend(child.stderr), daemon=True)
        for child, into in zip(children, errors, strict=True)
    ]
    guard = threading.Timer(timeout_s, lambda: [child.kill() for child in children])
    guard.start()
    try:
        for drain in drains:
            drain.start()
        for child, spec in zip(children, specs, strict=True):
            _tell(child, json.dumps(spec))
        answers: list[dict[str, Any]] = []
        for child in children:
            _until_ready(child)
        for child in children:
            _tell(child, "go")
        for child, drain, said in zip(children, drains, errors, strict=True):
            lines = child.stdout.read().strip().splitlines()
            code = child.wait()
            drain.join()
            if code or not lines:
                tail = "".join(said[-25:])
                raise BenchmarkError(f"{program} ended with code {code} under {python}:\n{tail}")
            answers.append(json.loads(lines[-1]))
        return answers
    finally:
        guard.cancel()
        guard.join()  # it wakes to end; nothing of it is to be left
        for child in children:
            if child.poll() is None:
                child.kill()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            child.wait()


def _tell(child: subprocess.Popen[str], line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # a child that has failed says why at its end
        child.stdin.write(line + "\n")
        child.stdin.flush()


def _until_ready(child: subprocess.Popen[str]) -> None:
    for line in child.stdout:
        if line.strip() == "ready":
            return


def run_program(program: str, spec: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """One child of `run_together`."""
    return run_together(program, [spec], **options)[0]


def peers_python() -> Path:
    """The interpreter of the peers' own environment.

    Raises: BenchmarkError, when it has not been made.
    """
    python = REPOSITORY / ".venv-peers" / "bin" / "python"
    if not python.exists():
        raise BenchmarkError(
            "the peers' environment .venv-peers is missing. "
            "Run: python benchmarks/run.py --make-peers (or leave them out: --no-peers)"
        )
    return python


def make_peers() -> None:
    """Build .venv-peers from `requirements-peers.txt`; torch first, so that nothing pulls another build of it."""
    folder = REPOSITORY / ".venv-peers"
    requirements = Path(__file__).resolve().parent / "requirements-peers.txt"
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch"))
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install"]
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-r", str(requirements)], check=True)
