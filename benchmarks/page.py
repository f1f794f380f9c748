"""The figures of `docs/BENCHMARKS.md`, written from the newest full run of each case.

The page holds a pair of marks for every case; what stands between them is replaced, the prose around them stays.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def newest(results: Path, case: str) -> Mapping[str, Any] | None:
    """The summary of the last full run of a case, or None."""
    path = results / f"{case}.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    full = [line for line in lines if line["kind"] == "summary" and line["preset"] == "full"]
    return full[-1] if full else None


def number(value: float) -> str:
    """A figure in as many digits as it has meaning.

    >>> number(1234.5), number(56.78), number(0.9123), number(0.0)
    ('1,234', '56.8', '0.912', '0')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.3g}"


def figures(summary: Mapping[str, Any]) -> str:
    """One run as Markdown: values and targets, the median and range of every contestant, how to repeat it."""
    judged = {target["value"]: target for target in summary["targets"]}
    lines = ["| value | seen | target |", "|---|---:|---|"]
    for name, value in summary["values"].items():
        told = ""
        if name in judged:
            told = (
                f"{judged[name]['bound']}: "
                + {True: "met", False: "**missed**", None: "not judged"}[judged[name]["met"]]
            )
        lines.append(f"| {name} | {number(value)} | {told} |")
    lines += ["", "| contestant | median | lowest | highest | rounds | unit |", "|---|---:|---:|---:|---:|---|"]
    for name, runs in summary["runs"].items():
        cells = [number(figure) for figure in (statistics.median(runs), min(runs), max(runs))]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} | {summary['units'][name]} |")
    machine, versions = summary["machine"], summary["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "commit")
    lines += [
        "",
        f"`{summary['command']}`, {summary['started'][:10]}, {summary['seconds'] / 60:.0f} minutes, "
        f"seed {summary['seed']}, "
        f"commit `{versions.get('commit', 'unknown')}`. {machine['processor']}, {summary['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, bfloat16 in hardware: {', '.join(machine['bf16']) or 'none'}. {told}.",
    ]
    return "\n".join(lines)


def fill(text: str, results: Path) -> str:
    """The page with the newest full figures of every case that has any; the others keep what they have.

    >>> fill("a <!-- figures: head --> old <!-- end --> b", Path("/nowhere"))
    'a <!-- figures: head --> old <!-- end --> b'
    """

    def replaced(match: re.Match[str]) -> str:
        summary = newest(results, match.group(1))
        if summary is None:
            return match.group(0)
        return f"<!-- figures: {match.group(1)} -->\n{figures(summary)}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->.*?<!-- end -->", replaced, text, flags=re.S)
