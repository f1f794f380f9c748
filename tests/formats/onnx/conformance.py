"""The ONNX project's own node conformance cases through kindling's reader: what each gives, and why it fails."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kindling.errors import KindlingError
from kindling.formats.onnx.open import open_net
from kindling.formats.onnx.proto import from_numpy
from kindling.nets.onnx_ops.registry import NARROW


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    engine: str
    """`"torch"`, `"onnxruntime"`, or `""` where neither took the graph."""
    passed: bool
    reason: str


@cache
def cases() -> tuple[Any, ...]:
    """Every case, in the order of their names."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of the overflows that the cases are about
        return tuple(sorted(load_model_tests(kind="node"), key=lambda case: str(case.name)))


def _given(value: Any) -> Any:
    """An input of a case as the module takes it: texts stay numpy."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_given(part) for part in value]
    if hasattr(value, "DESCRIPTOR"):
        import onnx.numpy_helper

        value = onnx.numpy_helper.to_array(value)
    array = np.asarray(value)
    return array if array.dtype.kind in "OUS" else from_numpy(array)


def _plain(value: Any) -> Any:
    """A result as numpy."""
    if hasattr(value, "DESCRIPTOR"):
        import onnx.numpy_helper

        value = onnx.numpy_helper.to_array(value)
    if isinstance(value, torch.Tensor):
        if value.dtype in NARROW:
            value = value.view(NARROW[value.dtype][0])
        wide = value.float() if value.dtype.itemsize == 1 and value.is_floating_point() else value
        wide = wide.float() if value.dtype == torch.bfloat16 else wide
        return wide.detach().numpy()
    array = np.asarray(value)
    if array.dtype.kind in "fiubcOUS" and "float8" not in array.dtype.name and "int4" not in array.dtype.name:
        return array if "int2" not in array.dtype.name else array.astype(np.int8)
    return array.astype(np.int8) if "int" in array.dtype.name else array.astype(np.float32)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch.")
    if hasattr(value, "DESCRIPTOR"):
        import onnx.numpy_helper

        value = onnx.numpy_helper.to_array(value)
    name = np.asarray(value).dtype.name
    return "texts" if np.asarray(value).dtype.kind in "OUS" else name


def same(got: Any, wanted: Any, case: Any, random: bool) -> str:
    """Why a result is not what the case wants; empty where it is."""
    if wanted is None or got is None:
        return "" if wanted is None and got is None else "one is no value"
    if isinstance(wanted, list):
        if not isinstance(got, list) or len(got) != len(wanted):
            return "another number of entries"
        return next(filter(None, (same(a, b, case, random) for a, b in zip(got, wanted, strict=True))), "")
    a, b = _plain(got), _plain(wanted)
    if a.shape != b.shape:
        return f"shape {a.shape}, not {b.shape}"
    if _kind(got) != _kind(wanted):
        return f"element type {_kind(got)}, not {_kind(wanted)}"
    if random:
        return ""
    if b.dtype.kind in "OUS":
        return "" if (a.astype(str) == b.astype(str)).all() else "other texts"
    if b.dtype.kind in "fc":
        # Two units in bfloat16's last place, as the ONNX project's own runner allows.
        rtol = max(case.rtol, 2**-6) if _kind(wanted) == "bfloat16" else case.rtol
        if np.allclose(a, b, rtol=rtol, atol=case.atol, equal_nan=True):
            return ""
        with np.errstate(all="ignore"):
            gap = np.nanmax(np.abs(a.astype(np.float64) - b)) if b.size else 0.0
        return f"numbers differ by up to {gap:.3g}"
    return "" if np.array_equal(a, b) else "other numbers"


RANDOM = frozenset({"Bernoulli", "RandomUniformLike", "RandomNormalLike", "RandomUniform", "RandomNormal"})
"""Operators whose numbers no case can fix: shapes and types are compared."""


def run_case(case: Any) -> Outcome:
    """Open the case's graph as `kindling` chooses, run it on the case's inputs, compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            net = open_net(case.model.SerializeToString())
        except KindlingError as error:
            return Outcome("", False, str(error))
        random = any(node.op_type in RANDOM for node in case.model.graph.node)
        for inputs, outputs in case.data_sets:
            try:
                with torch.no_grad():
                    found = net.module(*map(_given, inputs))
            except Exception as error:  # whatever it is, it is this case's failure
                line = (str(error).strip().splitlines() or [""])[0][:200]
                return Outcome(net.engine, False, f"{type(error).__name__}: {line}")
            results = list(found) if isinstance(found, tuple) else [found]
            for got, wanted in zip(results, outputs, strict=True):
                reason = same(got, wanted, case, random)
                if reason:
                    return Outcome(net.engine, False, reason)
    return Outcome(net.engine, True, "")


def outcomes() -> Iterator[tuple[str, Outcome]]:
    """All cases, run one after the other."""
    for case in cases():
        yield case.name, run_case(case)


# ------------------------------------------------------------------------------------------------------- the page

PAGE = Path(__file__).resolve().parents[3] / "docs" / "ONNX_CONFORMANCE.md"


def page(found: dict[str, Outcome]) -> str:
    """The page of results, as Markdown."""
    import onnx

    total = len(found)
    passed = [outcome for outcome in found.values() if outcome.passed]
    by = {engine: sum(outcome.engine == engine for outcome in passed) for engine in ("torch", "onnxruntime")}
    lines = [
        "# ONNX conformance",
        "",
        f"The node cases of the ONNX project, as they come with onnx {onnx.__version__}, through",
        "`kindling.formats.onnx.open_net` as it chooses the engine: torch where it has every operator of the graph,",
        "else onnxruntime. Made by `python tests/formats/onnx/conformance.py`; `make test` checks a sample against",
        "this page, `make test-all` all of it.",
        "",
        "| | cases | share |",
        "|---|---:|---:|",
        f"| passed | {len(passed)} | {len(passed) / total:.1%} |",
        f"| of these by torch | {by['torch']} | {by['torch'] / total:.1%} |",
        f"| of these by onnxruntime | {by['onnxruntime']} | {by['onnxruntime'] / total:.1%} |",
        f"| failed | {total - len(passed)} | {1 - len(passed) / total:.1%} |",
        f"| all | {total} | |",
        "",
        "A case passes when every output has the case's shape, element type and, within its own tolerance, numbers.",
        "Of operators that draw random numbers, shapes and element types are compared.",
        "",
        "## What fails, and why",
        "",
        "| case | engine | reason |",
        "|---|---|---|",
    ]
    for name, outcome in found.items():
        if not outcome.passed:
            lines.append(f"| `{name}` | {outcome.engine or 'none'} | {_short(outcome.reason)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    reason = reason.replace("the graph cannot be read: ", "").replace("|", "/")
    reason = re.sub(r"; and onnxruntime does not take the graph: .*", "; nor has onnxruntime", reason, flags=re.S)
    reason = re.sub(r"the graph: operator '[^']*' \((\w+)\) cannot be made of what the file says: ", r"\1: ", reason)
    return reason[:160].strip()


if __name__ == "__main__":
    results = dict(outcomes())
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"{sum(outcome.passed for outcome in results.values())} of {len(results)} passed; {PAGE}")
