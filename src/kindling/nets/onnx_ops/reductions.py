"""Operators that reduce axes, and products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import axis_of, ints, op

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return torch.div(_sum(x, axes, keep), math.prod(x.shape[axis] for axis in axes), rounding_mode="trunc").to(x.dtype)


def _extreme(function: Any, largest: bool) -> Reduce:
    def reduce(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if any(x.shape[axis] == 0 for axis in axes):
            shape = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
            if x.is_floating_point():
                none: float = -math.inf if largest else math.inf
            elif x.dtype == torch.bool:
                none = not largest
            else:
                none = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
            return torch.full(shape, none, dtype=x.dtype, device=x.device)
        return function(x, axes, keepdim=keep)  # type: ignore[no-any-return]

    return reduce


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.double()
    if any(x.shape[axis] == 0 for axis in axes):
        return wide.exp().sum(axes, keepdim=keep).log().to(x.dtype)
    return torch.logsumexp(wide, axes, keepdim=keep).to(x.dtype)


def _root(x: Tensor) -> Tensor:
    return x.sqrt() if x.is_floating_point() else x.double().sqrt().to(x.dtype)


def _log(x: Tensor) -> Tensor:
    return x.log() if x.is_floating_point() else x.double().log().to(x.dtype)


_ALL: dict[str, tuple[Callable[[Tensor], Tensor] | None, Reduce, Callable[[Tensor], Tensor] | None]] = {
    "ReduceSum": (None, _sum, None),
    "ReduceMean": (None, _mean, None),
    "ReduceProd": (None, _prod, None),
    "ReduceMax": (None, _extreme(torch.amax, True), None),
    "ReduceMin": (None, _extreme(torch.amin, False), None),
    "ReduceL1": (torch.abs, _sum, None),
    "ReduceL2": (torch.square, _sum, _root),
    "ReduceSumSquare": (torch.square, _sum, None),
    "ReduceLogSum": (None, _sum, _log),
    "ReduceLogSumExp": (None, _log_sum_exp, None),
}


def _reduction(before: Any, reduce: Reduce, after: Any) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        axes: Tensor | tuple[int, ...] | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        named = ints(axes)
        if not named and noop_with_empty_axes:
            x = before(x) if before is not None else x
            return after(x) if after is not None else x
        where = tuple(axis_of(axis, x.dim()) for axis in named) if named else tuple(range(x.dim()))
        x = before(x) if before is not None else x
        if not where:  # a number alone
            return after(x) if after is not None else x
        x = reduce(x, where, bool(keepdims))
        return after(x) if after is not None else x

    return run


for _name, (_before, _reduce, _after) in _ALL.items():
    op(_name)(_reduction(_before, _reduce, _after))


# Products


@op("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    product = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    product = product if alpha == 1 else (alpha * product).to(a.dtype)
    if c is None:
        return product
    return product + (c if beta == 1 else (beta * c).to(a.dtype))


@op("Einsum")
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *inputs)
