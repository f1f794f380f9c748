"""Operators that normalise, softmax among them, and the losses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kindling.nets.onnx_ops.registry import axis_of, dtype_of, op


@op("BatchNormalization")
def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    is_test: int = 0,
    outputs: int = 1,
) -> Any:
    """By the statistics given; in training mode by the batch's own, and the running ones come out as well."""
    if not spatial:
        return (x - mean) / torch.sqrt(var + epsilon) * scale + bias
    shape = (1, -1, *[1] * (x.dim() - 2))
    if not training_mode:
        factor = scale / torch.sqrt(var + epsilon)
        return x * factor.reshape(shape).to(x.dtype) + (bias - mean * factor).reshape(shape).to(x.dtype)
    axes = (0, *range(2, x.dim()))
    now_mean, now_var = x.mean(axes), x.var(axes, unbiased=False)
    y = (x - now_mean.reshape(shape)) / torch.sqrt(now_var + epsilon).reshape(shape)
    y = (y * scale.reshape(shape) + bias.reshape(shape)).to(x.dtype)
    return y, mean * momentum + now_mean * (1 - momentum), var * momentum + now_var * (1 - momentum)


@op("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    axes = tuple(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return y * scale.reshape(shape) + bias.reshape(shape)


def _stash(x: Tensor, stash_type: int) -> Tensor:
    return x.to(dtype_of(stash_type))


@op("LayerNormalization")
def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Any:
    """Over the axes from `axis` on; mean and inverse deviation come out as well."""
    first = axis_of(axis, x.dim())
    if outputs == 1 and x.dtype == torch.float32 and tuple(scale.shape) == tuple(x.shape[first:]):
        if bias is None or bias.shape == scale.shape:
            return F.layer_norm(x, x.shape[first:], scale, bias, epsilon)
    axes = tuple(range(first, x.dim()))
    wide = _stash(x, stash_type)
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt((wide - mean).square().mean(axes, keepdim=True) + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


@op("RMSNormalization")
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    wide = _stash(x, stash_type)
    axes = tuple(range(axis_of(axis, x.dim()), x.dim()))
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@op("GroupNormalization")
def group_norm_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Version 18: one scale and bias for each group."""
    times = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(times), bias.repeat_interleave(times), epsilon)


@op("GroupNormalization", since=21)
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@op("LpNormalization")
def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    length = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(length == 0, torch.zeros_like(x), x / length)


@op("MeanVarianceNormalization")
def mvn(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt(centred.square().mean(axes, keepdim=True)) + 1e-9)


# Softmax and its kin; before version 13 over all axes from `axis` on, as one


def _flattened(function: Any) -> Any:
    def run(x: Tensor, *, axis: int = 1) -> Tensor:
        first = axis + x.dim() if axis < 0 else axis
        rows = x.reshape(math.prod(x.shape[:first]), -1) if x.numel() else x.reshape(0, 0)
        return function(rows, axis=-1).reshape(x.shape)  # type: ignore[no-any-return]

    return run


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first of the largest, else zero."""
    first = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


for _name, _function in (("Softmax", softmax), ("LogSoftmax", log_softmax), ("Hardmax", hardmax)):
    op(_name)(_flattened(_function))
    op(_name, since=13)(_function)


# Losses


@op("NegativeLogLikelihoodLoss")
def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    at = target.long()
    ignored = torch.zeros_like(at, dtype=torch.bool) if ignore_index is None else at == ignore_index
    safe = torch.where(ignored, torch.zeros_like(at), at)
    each = -x.gather(1, safe.unsqueeze(1)).squeeze(1)
    weights = torch.ones_like(each) if weight is None else weight[safe]
    weights = torch.where(ignored, torch.zeros_like(weights), weights)
    each = each * weights
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / weights.sum()


@op("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax(x, 1)
    return nll_loss(logs, target, weight, ignore_index=ignore_index, reduction=reduction), logs
