"""The operators of ONNX in torch: one function each, by name and version; `layers_onnx.py` makes layers of them.

A function takes an operator's inputs by position (None for one that is left out) and its attributes by name, and gives
a tensor, a list (a sequence) or a tuple (several outputs). Source of every rule: the operator's entry in ONNX's
`docs/Operators.md`, and its node conformance cases, which the tests run.
"""

from kindling.nets.onnx_ops import (
    attention,
    detect,
    elementwise,
    indexing,
    norms,
    quantized,
    recurrent,
    reductions,
    resize,
    sequences,
    shaping,
    signals,
    windows,
)
from kindling.nets.onnx_ops.registry import DTYPES, MAX_OPSET, NeedsValues, find, known_names

__all__ = [
    "DTYPES",
    "MAX_OPSET",
    "NeedsValues",
    "attention",
    "detect",
    "elementwise",
    "find",
    "indexing",
    "known_names",
    "norms",
    "quantized",
    "recurrent",
    "reductions",
    "resize",
    "sequences",
    "shaping",
    "signals",
    "windows",
]
