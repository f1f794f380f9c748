"""Operators that pick, scatter, sort and count: gathers, scatters, running sums, top values, one-hot rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import axis_of, checked, op, whole


def _positive(indices: Tensor, length: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


@op("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices along an axis; negative indices count from the end."""
    axis = axis_of(axis, x.dim())
    at = _positive(indices, x.shape[axis])
    if indices.dim() == 1:
        return x.index_select(axis, at)
    taken = x.index_select(axis, at.reshape(-1))
    return taken.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@op("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


@op("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    b, depth = batch_dims, indices.shape[-1]
    batch = x.shape[:b]
    flat = x.reshape(-1, *x.shape[b:])
    at = indices.reshape(flat.shape[0], -1, depth)
    rows = torch.arange(flat.shape[0], device=x.device).unsqueeze(1).expand(at.shape[:2])
    taken = flat[(rows, *(_positive(at[..., k], flat.shape[1 + k]) for k in range(depth)))]
    return taken.reshape((*batch, *indices.shape[b:-1], *x.shape[b + depth :]))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("Scatter", "ScatterElements")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    at = _positive(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCTIONS[reduction], include_self=True)


@op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    inner = x.shape[depth:]
    flat = x.reshape(-1, *inner)
    at = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for k in range(depth):
        at = at * x.shape[k] + _positive(indices[..., k], x.shape[k])
    at, new = at.reshape(-1), updates.reshape(-1, *inner)
    if reduction == "none":
        return flat.index_copy(0, at, new).reshape(x.shape)
    if reduction == "add":
        return flat.index_add(0, at, new).reshape(x.shape)
    return flat.index_reduce(0, at, new, _REDUCTIONS[reduction], include_self=True).reshape(x.shape)


@op("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Rows of a cache overwritten from an index on; `"circular"` goes on at the front."""
    axis = axis_of(axis, cache.dim())
    length, count = cache.shape[axis], update.shape[axis]
    first = (
        torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device) if write_indices is None else write_indices
    )
    at = first.long().unsqueeze(1) + torch.arange(count, device=cache.device)
    at = at.remainder(length) if mode == "circular" else at
    shape = [1] * cache.dim()
    shape[0], shape[axis] = at.shape
    return cache.scatter(axis, at.reshape(shape).expand(update.shape), update)


@op("NonZero")
def non_zero(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return (x != 0).reshape(1).nonzero().t()[:0].reshape(0, int(x != 0))
    return x.nonzero().t().contiguous()


@op("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    at = condition.reshape(-1)[: x.shape[axis]].nonzero().reshape(-1)
    return x.index_select(axis, at)


@op("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    """Values, where each is seen first, which value each entry is, and how often; in order of size or of appearance."""
    flat = x.reshape(-1) if axis is None else x
    along = 0 if axis is None else axis_of(axis, x.dim())
    values, inverse, counts = torch.unique(flat, sorted=True, return_inverse=True, return_counts=True, dim=along)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full((values.shape[along],), inverse.numel(), dtype=torch.int64, device=x.device)
    first = first.scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        values, first, counts = values.index_select(along, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return values, first, inverse, counts


@op("TopK")
def top_k(x: Tensor, k: Tensor | int, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal values the earlier ones are taken, as ONNX wants it."""
    count = whole(k)
    values, at = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), at.narrow(axis, 0, count)


@op("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, torch.argmax)


@op("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, torch.argmin)


def _arg(x: Tensor, axis: int, keepdims: int, last: int, function: Any) -> Tensor:
    if last:
        x = x.flip(axis)
    found = function(x, dim=axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - found if last else found  # type: ignore[no-any-return]


@op("OneHot")
def one_hot(indices: Tensor, depth: Tensor | int, values: Tensor | tuple[float, ...], *, axis: int = -1) -> Tensor:
    """Rows of the first value with one of the second; an index out of range gives a row without one."""
    wide = whole(depth)
    checked([*indices.shape, wide])
    pair = values if isinstance(values, Tensor) else torch.tensor(values, device=indices.device)
    axis = axis_of(axis, indices.dim() + 1)
    at = indices.long()
    at = torch.where(at < 0, at + wide, at).unsqueeze(axis)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = wide
    hit = at == torch.arange(wide, device=indices.device).reshape(shape)
    return torch.where(hit, pair[1], pair[0])


@op("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first entries of each row turned round, as many as its length says."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    at = turned(lengths, moved.shape[1])
    at = at.reshape(*at.shape, *[1] * (moved.dim() - 2)).expand(moved.shape)
    return moved.gather(1, at).movedim((0, 1), (batch_axis, time_axis))


def turned(lengths: Tensor, steps: int) -> Tensor:
    """For each row, where step t comes from when its first `length` steps are turned round; shape (rows, steps)."""
    at = torch.arange(steps, device=lengths.device).unsqueeze(0)
    ends = lengths.long().unsqueeze(1)
    return torch.where(at < ends, ends - 1 - at, at)


def _running(x: Tensor, axis: Tensor | int, exclusive: int, reverse: int, function: Any, start: float) -> Tensor:
    along = axis_of(whole(axis), x.dim())
    x = x.flip(along) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(along, 0, min(1, x.shape[along])), start)
        x = torch.cat((first, x.narrow(along, 0, max(x.shape[along] - 1, 0))), along)
    out = function(x, along).to(x.dtype)
    return out.flip(along) if reverse else out  # type: ignore[no-any-return]


@op("CumSum")
def cum_sum(x: Tensor, axis: Tensor | int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, axis, exclusive, reverse, torch.cumsum, 0)


@op("CumProd")
def cum_prod(x: Tensor, axis: Tensor | int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, axis, exclusive, reverse, torch.cumprod, 1)


@op("ai.onnx.ml.ArrayFeatureExtractor")
def array_feature_extractor(x: Tensor, at: Tensor) -> Tensor:
    taken = x.index_select(-1, at.reshape(-1).long())
    return taken.reshape(1, -1) if x.dim() == 1 else taken


@op("ai.onnx.ml.Binarizer")
def binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    return (x > threshold).to(x.dtype)


@op("ai.onnx.ml.Scaler")
def scaler(x: Tensor, *, offset: tuple[float, ...] = (0.0,), scale: tuple[float, ...] = (1.0,)) -> Tensor:
    x = x.float()
    return (x - x.new_tensor(offset)) * x.new_tensor(scale)


@op("ai.onnx.ml.Normalizer")
def normalizer(x: Tensor, *, norm: str = "MAX") -> Tensor:
    x = x.float()
    if norm == "MAX":
        length = x.abs().amax(-1, keepdim=True)
    else:
        length = x.abs().sum(-1, keepdim=True) if norm == "L1" else x.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length == 0, x, x / length)
