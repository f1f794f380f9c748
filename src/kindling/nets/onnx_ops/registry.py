"""Which function computes an operator at a version of the operator set; what the functions share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_OPSET = 28
"""The newest operator set whose changes were looked at."""

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
"""ONNX's number of an element type -> torch's dtype."""
NARROW: dict[torch.dtype, tuple[torch.dtype, int]] = {}
"""Whole numbers of less than a byte, one to a byte: torch keeps them, and computes in the type named here."""
for _code, _name, _carrier, _bits in (
    (21, "uint4", torch.uint8, 4),
    (22, "int4", torch.int8, 4),
    (25, "uint2", torch.uint8, 2),
    (26, "int2", torch.int8, 2),
):
    if hasattr(torch, _name):  # older versions of torch have not all of them
        DTYPES[_code] = getattr(torch, _name)
        NARROW[DTYPES[_code]] = _carrier, _bits
POWERS: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)
"""Powers of two alone."""
if POWERS is not None:
    DTYPES[24] = POWERS
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)
_TABLE: dict[str, list[tuple[int, Function]]] = {}


class NeedsValues(RuntimeError):
    """The shape of an operator's result depends on numbers that are not there (a tensor without memory)."""


def op(*names: str, since: int = 1) -> Callable[[F], F]:
    """Decorator: the function computes these operators from version `since` of their operator set on.

    Operators outside ONNX's own set carry their domain: `"ai.onnx.ml.Binarizer"`.
    """

    def register(function: F) -> F:
        for name in names:
            _TABLE.setdefault(name, []).append((since, function))
            _TABLE[name].sort(key=lambda entry: entry[0])
        return function

    return register


def find(name: str, opset: int) -> Function | None:
    """The function of an operator at a version, or None where there is none.

    >>> find("Softmax", 11) is find("Softmax", 13), find("Softmax", 13) is find("Softmax", 22), find("Nonsense", 20)
    (False, True, None)
    """
    found = None
    for since, function in _TABLE.get(name, ()):
        if since <= opset:
            found = function
    return found


def known_names() -> list[str]:
    """Every operator there is a function for."""
    return sorted(_TABLE)


@cache
def _parameters(function: Function) -> tuple[inspect.Signature, bool]:
    signature = inspect.signature(function)
    return signature, "outputs" in signature.parameters


def apply(function: Function, inputs: Sequence[Any], attributes: dict[str, Any], outputs: int) -> tuple[Any, ...]:
    """Call an operator's function; always as many results as there are outputs.

    Raises: NeedsValues; and whatever torch raises for inputs that do not fit.
    """
    if _parameters(function)[1]:
        attributes = {**attributes, "outputs": outputs}
    result = function(*inputs, **attributes)
    results = result if isinstance(result, tuple) else (result,)
    if len(results) < outputs:
        raise ValueError(f"{outputs} outputs are asked for, {len(results)} are computed")
    return results[:outputs]


def takes(function: Function, inputs: int, attributes: Sequence[str]) -> str | None:
    """Why a function cannot be called so, or None."""
    signature, counts = _parameters(function)
    given = dict.fromkeys(attributes) | ({"outputs": 1} if counts else {})
    try:
        signature.bind(*[None] * inputs, **given)
    except TypeError as error:
        return str(error)
    return None


def ints(value: Any) -> list[int] | None:
    """Whole numbers from a tensor or a sequence; None stays None.

    Raises: NeedsValues, for a tensor without memory.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise NeedsValues("a size is computed from numbers that are not there")
        return [int(number) for number in value.reshape(-1).tolist()]
    return [int(number) for number in value]


def whole(value: Any) -> int:
    """One whole number from a tensor of one, or from itself."""
    if isinstance(value, Tensor):
        found = ints(value)
        assert found is not None
        return found[0]
    return int(value)


def number(value: Any) -> float:
    """One number from a tensor of one, or from itself."""
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise NeedsValues("a setting is computed from numbers that are not there")
        return float(value.reshape(-1)[0].item())
    return float(value)


LIMIT: ContextVar[int] = ContextVar("LIMIT", default=2**36)
"""Numbers in a tensor that an operator may make out of a few sizes; readers of strangers' files set it lower."""


class TooLarge(ValueError):
    """A tensor of more numbers than `LIMIT` allows is asked for by a few sizes."""


def checked(sizes: Sequence[int]) -> list[int]:
    """Sizes of a tensor that may be made.

    Raises: TooLarge, for more numbers than `LIMIT` allows; ValueError, for negative sizes.
    """
    said = " x ".join(str(size) for size in list(sizes)[:8])
    if any(size < 0 for size in sizes):
        raise ValueError(f"a tensor of {said} numbers is asked for")
    if math.prod(sizes) > LIMIT.get():
        raise TooLarge(f"a tensor of {said} numbers is asked for")
    return list(sizes)


def dtype_of(code: int) -> torch.dtype:
    """torch's dtype of an element type."""
    if code not in DTYPES:
        raise ValueError(f"torch has no numbers of ONNX's element type {code}")
    return DTYPES[code]


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of a tensor with {rank} axes")
    return axis + rank if axis < 0 else axis
