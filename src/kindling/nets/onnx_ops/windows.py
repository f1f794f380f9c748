"""Operators that slide a window: convolutions, poolings, their inverses, and poolings over everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kindling.nets.onnx_ops.registry import ints, op

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
Sizes = Sequence[int]


def frame(
    spatial: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes, pads: Sizes | None, auto_pad: str
) -> tuple[list[int], list[int]]:
    """Padding in front of and behind each spatial axis.

    >>> frame((5,), (3,), (2,), (1,), None, "SAME_UPPER"), frame((6,), (3,), (2,), (1,), None, "SAME_LOWER")
    (([1], [1]), ([1], [0]))
    """
    axes = len(spatial)
    if auto_pad in ("NOTSET", "") or auto_pad is None:
        pads = pads or [0] * (2 * axes)
        if len(pads) != 2 * axes:
            raise ValueError(f"{len(pads)} amounts of padding for {axes} axes")
        return list(pads[:axes]), list(pads[axes:])
    if auto_pad == "VALID":
        return [0] * axes, [0] * axes
    before, after = [], []
    for size, k, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        out = -(-size // stride)
        total = max((out - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        small = total // 2
        before.append(small if auto_pad == "SAME_UPPER" else total - small)
        after.append(total - small if auto_pad == "SAME_UPPER" else small)
    return before, after


def framed(x: Tensor, before: Sizes, after: Sizes, value: float = 0.0) -> Tensor:
    """`x` with the padding around its spatial axes."""
    if not any(before) and not any(after):
        return x
    flat = [amount for pair in zip(reversed(list(before)), reversed(list(after)), strict=True) for amount in pair]
    return F.pad(x, flat, value=value)


def _axes(x: Tensor, table: Any, what: str) -> int:
    axes = x.dim() - 2
    if axes not in table:
        raise ValueError(f"a {what} over {axes} axes; torch has those over 1, 2 and 3")
    return axes


@op("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sizes | None = None,
    group: int = 1,
    kernel_shape: Sizes | None = None,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Tensor:
    axes = _axes(x, _CONV, "convolution")
    strides, dilations = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = frame(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    if before == after:
        return _CONV[axes](x, w, b, strides, before, dilations, group)
    return _CONV[axes](framed(x, before, after), w, b, strides, 0, dilations, group)


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sizes | None = None,
    group: int = 1,
    kernel_shape: Sizes | None = None,
    output_padding: Sizes | None = None,
    output_shape: Sizes | None = None,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Tensor:
    """Everything the kernels reach, then cut or filled up to the size that is wanted."""
    axes = _axes(x, _TRANSPOSED, "transposed convolution")
    strides, dilations = list(strides or [1] * axes), list(dilations or [1] * axes)
    extra = list(output_padding or [0] * axes)
    pads = list(pads or [0] * (2 * axes))
    full = [(x.shape[2 + k] - 1) * strides[k] + dilations[k] * (w.shape[2 + k] - 1) + 1 + extra[k] for k in range(axes)]
    if output_shape is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = (
            list(output_shape)[-axes:]
            if output_shape is not None
            else [x.shape[2 + k] * strides[k] for k in range(axes)]
        )
        total = [full[k] - wanted[k] for k in range(axes)]
        less = [t // 2 for t in total]
        more = [t - s for t, s in zip(total, less, strict=True)]
        before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    elif auto_pad == "VALID":
        before, after = [0] * axes, [0] * axes
    else:
        before, after = pads[:axes], pads[axes:]
    out = _TRANSPOSED[axes](x, w, b, strides, 0, 0, group, dilations)
    # torch cannot add an output padding as large as the stride: it is zeros (and bias) behind the last kernel.
    grown = framed(out, [0] * axes, extra)
    if b is not None and any(extra):
        reached = framed(torch.ones_like(out[:1, :1]), [0] * axes, extra)
        grown = grown + (1 - reached) * b.reshape(1, -1, *[1] * axes)
    return framed(grown, [-p for p in before], [-p for p in after])


@op("ConvInteger")
def conv_integer(
    x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, **settings: Any
) -> Tensor:
    """Exact: whole numbers of eight bits are multiplied and added in float64."""
    wide = x.double() - (0 if x_zero is None else x_zero.double())
    kernel = w.double()
    if w_zero is not None:
        kernel = kernel - w_zero.double().reshape(-1, *[1] * (w.dim() - 1))
    return conv(wide, kernel, **settings).to(torch.int32)


def pooled(
    spatial: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes, before: Sizes, after: Sizes, ceil: int
) -> list[int]:
    """How many windows there are along each axis; none starts beyond the tensor and its padding in front."""
    sizes = []
    for k, size in enumerate(spatial):
        room = size + before[k] + after[k] - dilations[k] * (kernel[k] - 1) - 1
        count = (-(-room // strides[k]) if ceil else room // strides[k]) + 1
        if ceil and (count - 1) * strides[k] >= size + before[k]:
            count -= 1
        sizes.append(count)
    return sizes


def _tail(spatial: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes, before: Sizes, counts: Sizes) -> list[int]:
    """Padding behind each axis that gives just so many windows; negative where the end is not reached."""
    return [
        (counts[k] - 1) * strides[k] + dilations[k] * (kernel[k] - 1) + 1 - size - before[k]
        for k, size in enumerate(spatial)
    ]


def _pool_frame(
    x: Tensor,
    kernel: Sizes,
    strides: Sizes | None,
    dilations: Sizes | None,
    pads: Sizes | None,
    auto_pad: str,
    ceil: int,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    axes = len(kernel)
    if x.dim() != axes + 2:
        raise ValueError(f"a window of {axes} axes over a tensor of {x.dim()}")
    strides, dilations = list(strides or [1] * axes), list(dilations or [1] * axes)
    spatial = list(x.shape[2:])
    before, after = frame(spatial, kernel, strides, dilations, pads, auto_pad)
    counts = pooled(spatial, kernel, strides, dilations, before, after, ceil)
    return strides, dilations, before, after, _tail(spatial, kernel, strides, dilations, before, counts)


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sizes,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sizes | None = None,
    pads: Sizes | None = None,
    storage_order: int = 0,
    strides: Sizes | None = None,
    outputs: int = 1,
) -> Any:
    """The largest of each window, and where in the whole tensor it stands."""
    kernel = list(kernel_shape)
    axes = _axes(x, _MAX, "pooling")
    strides, dilations, before, _, tail = _pool_frame(x, kernel, strides, dilations, pads, auto_pad, ceil_mode)
    whole_numbers = not x.is_floating_point()
    values = x.float() if whole_numbers else x
    grown = framed(values, before, tail, -math.inf)
    if outputs < 2:
        out = _MAX[axes](grown, kernel, strides, 0, dilations)
        return out.to(x.dtype)
    out, at = _MAX[axes](grown, kernel, strides, 0, dilations, return_indices=True)
    sizes, spatial = list(grown.shape[2:]), list(x.shape[2:])
    place: list[Tensor] = []
    rest = at
    for k in reversed(range(axes)):
        place.insert(0, rest.remainder(sizes[k]) - before[k])
        rest = rest.div(sizes[k], rounding_mode="floor")
    flat = torch.zeros_like(at)
    order = range(axes) if not storage_order else reversed(range(axes))
    for k in order:
        flat = flat * spatial[k] + place[k]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * axes)
    return out.to(x.dtype), flat + planes * math.prod(spatial)


def _window_sums(x: Tensor, kernel: Sizes, strides: Sizes, dilations: Sizes) -> Tensor:
    """The sum of each window, by a convolution with ones."""
    axes = len(kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    out = _CONV[axes](planes, ones, None, list(strides), 0, list(dilations))
    return out.reshape(*x.shape[:2], *out.shape[2:])


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sizes,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sizes | None = None,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Tensor:
    """The mean of each window, of the tensor's own numbers or of its padding too."""
    kernel = list(kernel_shape)
    _axes(x, _CONV, "pooling")
    strides, dilations, before, after, tail = _pool_frame(x, kernel, strides, dilations, pads, auto_pad, ceil_mode)
    sums = _window_sums(framed(x, before, tail), kernel, strides, dilations)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    if count_include_pad:
        ones = framed(ones, before, after, 1.0)
        counted = framed(ones, [0] * len(kernel), [t - a for t, a in zip(tail, after, strict=True)])
    else:
        counted = framed(ones, before, tail)
    return sums / _window_sums(counted, kernel, strides, dilations)


@op("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sizes,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sizes | None = None,
    p: float = 2,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Tensor:
    kernel = list(kernel_shape)
    _axes(x, _CONV, "pooling")
    strides, dilations, before, _, tail = _pool_frame(x, kernel, strides, dilations, pads, auto_pad, ceil_mode)
    return _window_sums(framed(x.abs().pow(p), before, tail), kernel, strides, dilations).pow(1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    if x.dim() < 3:
        raise ValueError(f"a tensor of {x.dim()} axes has no plane to pool over")
    return tuple(range(2, x.dim()))


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(_spatial(x), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(_spatial(x), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    return x.abs().pow(p).sum(_spatial(x), keepdim=True).pow(1 / p)


@op("MaxUnpool")
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sizes,
    pads: Sizes | None = None,
    strides: Sizes | None = None,
) -> Tensor:
    """Values back at their places, zeros between; a larger `output_shape` has room behind."""
    axes = len(kernel_shape)
    strides, pads = list(strides or [1] * axes), list(pads or [0] * (2 * axes))
    sizes = [(x.shape[2 + k] - 1) * strides[k] - pads[k] - pads[k + axes] + kernel_shape[k] for k in range(axes)]
    shape = [*x.shape[:2], *sizes]
    flat = torch.zeros(math.prod(shape), dtype=x.dtype, device=x.device)
    out = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(shape)
    wanted = ints(output_shape)
    if wanted is None:
        return out
    return framed(out, [0] * axes, [wanted[2 + k] - sizes[k] for k in range(axes)])


@op("LRN")
def lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Across channels; an even window reaches one further behind."""
    square = x.square()
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    grown = F.pad(square.movedim(1, -1), (before, after)).movedim(-1, 1)
    sums = torch.zeros_like(x)
    for k in range(size):
        sums = sums + grown.narrow(1, k, x.shape[1])
    return x / (bias + alpha / size * sums).pow(beta)


@op("CausalConvWithState")
def causal_conv_with_state(
    x: Tensor, w: Tensor, b: Tensor | None = None, past: Tensor | None = None, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over time that sees only what was; the last steps are the next call's past."""
    reach = w.shape[-1] - 1
    before = past if past is not None else x.new_zeros(*x.shape[:2], reach)
    grown = torch.cat((before, x), -1)
    out = F.conv1d(grown, w, b, groups=w.shape[0])
    if activation in ("silu", "swish"):
        out = F.silu(out)
    elif activation != "none":
        raise ValueError(f"an activation {activation!r}")
    return out, grown[..., grown.shape[-1] - reach :]
