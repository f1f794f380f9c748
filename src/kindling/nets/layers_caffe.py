"""Layers of Caffe that torch has not, each with Caffe's own arithmetic; `formats/caffe` builds nets from them.

Every constructor argument is a plain value kept under its name, so that bundles can store the layer. The source of
each rule is the layer's file in BVLC Caffe's `src/caffe/layers`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling import graph

Pair = tuple[int, int]


def pooled_size(size: int, kernel: int, stride: int, pad: int, ceil: bool) -> int:
    """Length of a pooled axis by Caffe's rule: rounded up, but no window starts beyond picture and padding.

    >>> pooled_size(113, 3, 2, 0, True), pooled_size(113, 3, 2, 0, False), pooled_size(5, 2, 2, 1, True)
    (56, 56, 3)
    """
    over = size + 2 * pad - kernel
    pooled = (-(-over // stride) if ceil else over // stride) + 1
    if pad and (pooled - 1) * stride >= size + pad:
        pooled -= 1
    return pooled


@graph.allow
class CaffePool2d(nn.Module):
    """Pooling whose windows torch's layers refuse: padding above half the kernel, strides that leave the picture.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> CaffePool2d((2, 2), (1, 1), (1, 1), "ave")(x)[0, 0, 0].tolist()
    [0.0, 0.25, 0.25]
    """

    def __init__(self, kernel: Pair, stride: Pair, pad: Pair, method: str = "max", ceil: bool = True) -> None:
        super().__init__()
        self.kernel, self.stride, self.pad, self.method, self.ceil = kernel, stride, pad, method, ceil

    def forward(self, x: Tensor) -> Tensor:
        tall, wide = (
            pooled_size(x.shape[2 + k], self.kernel[k], self.stride[k], self.pad[k], self.ceil) for k in (0, 1)
        )
        (top, left), (down, right) = self.pad, self.pad
        # Windows that end outside are cut off for the maximum; the average counts them up to picture and padding.
        need = [(n - 1) * s + k for n, s, k in zip((tall, wide), self.stride, self.kernel, strict=True)]
        extra_h = max(0, need[0] - (x.shape[2] + top + down))
        extra_w = max(0, need[1] - (x.shape[3] + left + right))
        frame = (left, right + extra_w, top, down + extra_h)
        if self.method == "max":
            pooled = F.max_pool2d(F.pad(x, frame, value=-math.inf), self.kernel, self.stride)
            return pooled[:, :, :tall, :wide]
        ones = F.pad(x.new_ones(1, 1, x.shape[2] + top + down, x.shape[3] + left + right), (0, extra_w, 0, extra_h))
        sums = F.avg_pool2d(F.pad(x, frame), self.kernel, self.stride, divisor_override=1)
        counts = F.avg_pool2d(ones, self.kernel, self.stride, divisor_override=1)
        return (sums / counts)[:, :, :tall, :wide]


@graph.allow
class CaffeStochasticPool2d(nn.Module):
    """In training one value of each window, drawn in proportion to the values; else their average weighted so.

    >>> CaffeStochasticPool2d((1, 2), (1, 2)).eval()(torch.tensor([[[[1.0, 3.0]]]])).item()
    2.5
    """

    def __init__(self, kernel: Pair, stride: Pair, ceil: bool = True) -> None:
        super().__init__()
        self.kernel, self.stride, self.ceil = kernel, stride, ceil

    def forward(self, x: Tensor) -> Tensor:
        tall, wide = (pooled_size(x.shape[2 + k], self.kernel[k], self.stride[k], 0, self.ceil) for k in (0, 1))
        need = [(n - 1) * s + k for n, s, k in zip((tall, wide), self.stride, self.kernel, strict=True)]
        x = F.pad(x, (0, max(0, need[1] - x.shape[3]), 0, max(0, need[0] - x.shape[2])))
        windows = x.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])
        values = windows[:, :, :tall, :wide].flatten(4)
        total = values.sum(-1)
        if not self.training:
            mean = (values * values).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))
            return torch.where(total > 0, mean, torch.zeros_like(mean))
        mark = torch.rand_like(total).unsqueeze(-1) * total.unsqueeze(-1)
        drawn = (values.cumsum(-1) < mark).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
        return values.gather(-1, drawn).squeeze(-1)


@graph.allow
class CaffeLRNWithin(nn.Module):
    """Local response normalisation within each channel: `x * (1 + alpha * mean of squares) ** -beta`."""

    def __init__(self, size: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        squares = F.avg_pool2d(x * x, self.size, 1, self.size // 2)
        return x * (1 + self.alpha * squares).pow(-self.beta)


@graph.allow
class CaffeAffine(nn.Module):
    """Caffe's Scale and Bias with numbers of their own, laid over the axes from `axis` on.

    >>> layer = CaffeAffine((2,), 1, True, True)
    >>> _ = nn.init.constant_(layer.weight, 3.0), nn.init.ones_(layer.bias)
    >>> layer(torch.ones(1, 2, 1)).flatten().tolist()
    [4.0, 4.0]
    """

    def __init__(self, shape: tuple[int, ...], axis: int = 1, scale: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.shape, self.axis, self.scale = shape, axis, scale
        self.weight = nn.Parameter(torch.ones(shape)) if scale else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            x = x * _spread(self.weight, x.ndim, self.axis)
        if self.bias is not None:
            x = x + _spread(self.bias, x.ndim, self.axis)
        return x


def _spread(numbers: Tensor, axes: int, axis: int) -> Tensor:
    axis = axis + axes if axis < 0 else axis
    return numbers.reshape((1,) * axis + tuple(numbers.shape) + (1,) * (axes - axis - numbers.ndim))


@graph.allow
class CaffeBroadcast(nn.Module):
    """Caffe's Scale and Bias with a second input: `"mul"` or `"add"`, laid over the axes from `axis` on."""

    def __init__(self, axis: int, operation: str) -> None:
        super().__init__()
        self.axis, self.operation = axis, operation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        axis = self.axis + x.ndim if self.axis < 0 else self.axis
        other = other.reshape(tuple(other.shape) + (1,) * (x.ndim - axis - other.ndim)) if axis == 0 else other
        other = other if axis == 0 else _spread(other, x.ndim, axis)
        return x * other if self.operation == "mul" else x + other


@graph.allow
class CaffeFixedBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in training too: `use_global_stats: true`."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@graph.allow
class CaffeMVN(nn.Module):
    """Mean taken off, and divided by the deviation, for each channel of a row or for the whole row.

    >>> CaffeMVN(normalize_variance=False)(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, normalize_variance: bool = True, across_channels: bool = False, eps: float = 1e-9) -> None:
        super().__init__()
        self.normalize_variance, self.across_channels, self.eps = normalize_variance, across_channels, eps

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(1 if self.across_channels else 2, x.ndim))
        x = x - x.mean(axes, keepdim=True) if axes else x - x
        if self.normalize_variance:
            x = x / (((x * x).mean(axes, keepdim=True) if axes else x * x).sqrt() + self.eps)
        return x


@graph.allow
class CaffePower(nn.Module):
    """`(shift + scale * x) ** power`."""

    def __init__(self, power: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.power, self.scale, self.shift = power, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        if self.scale * self.power == 0:
            return torch.full_like(x, 1.0 if self.power == 0 else self.shift**self.power)
        x = x if self.scale == 1 else x * self.scale
        x = x if self.shift == 0 else x + self.shift
        return x if self.power == 1 else x.pow(self.power)


@graph.allow
class CaffeExp(nn.Module):
    """`base ** (shift + scale * x)`; base -1 stands for e.

    >>> CaffeExp(2.0, 1.0, 1.0)(torch.tensor([2.0])).item()
    8.0
    """

    def __init__(self, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.base, self.scale, self.shift = base, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        rate = 1.0 if self.base == -1 else math.log(self.base)
        return torch.exp((x * self.scale + self.shift) * rate)


@graph.allow
class CaffeLog(nn.Module):
    """`log_base(shift + scale * x)`; base -1 stands for e."""

    def __init__(self, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.base, self.scale, self.shift = base, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        rate = 1.0 if self.base == -1 else math.log(self.base)
        return torch.log(x * self.scale + self.shift) / rate


@graph.allow
class CaffeThreshold(nn.Module):
    """1 where `x > threshold`, else 0."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.threshold).to(x.dtype)


@graph.allow
class CaffeSwish(nn.Module):
    """`x * sigmoid(beta * x)`."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


@graph.allow
class CaffeEltwise(nn.Module):
    """`"SUM"` (with a coefficient each), `"PROD"` or `"MAX"` of any number of inputs of one shape.

    >>> CaffeEltwise("SUM", (1.0, -1.0))(torch.tensor([5.0]), torch.tensor([2.0])).item()
    3.0
    """

    def __init__(self, operation: str = "SUM", coefficients: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.operation, self.coefficients = operation, coefficients

    def forward(self, *inputs: Tensor) -> Tensor:
        out = inputs[0] * self.coefficients[0] if self.coefficients else inputs[0]
        for place, x in enumerate(inputs[1:], 1):
            if self.operation == "PROD":
                out = out * x
            elif self.operation == "MAX":
                out = torch.maximum(out, x)
            else:
                out = out + (x * self.coefficients[place] if self.coefficients else x)
        return out


@graph.allow
class CaffeReduction(nn.Module):
    """`"SUM"`, `"ASUM"`, `"SUMSQ"` or `"MEAN"` over the axes from `axis` on, times `coeff`."""

    def __init__(self, operation: str = "SUM", axis: int = 0, coeff: float = 1.0) -> None:
        super().__init__()
        self.operation, self.axis, self.coeff = operation, axis, coeff

    def forward(self, x: Tensor) -> Tensor:
        axis = self.axis + x.ndim if self.axis < 0 else self.axis
        x = x.abs() if self.operation == "ASUM" else x * x if self.operation == "SUMSQ" else x
        axes = tuple(range(axis, x.ndim))
        return (x.mean(axes) if self.operation == "MEAN" else x.sum(axes)) * self.coeff


@graph.allow
class CaffeReshape(nn.Module):
    """The axes from `axis` on (`num_axes` of them, -1 for all) in another shape; 0 copies a size, -1 infers one.

    >>> CaffeReshape((0, 2, -1))(torch.zeros(3, 8)).shape
    torch.Size([3, 2, 4])
    """

    def __init__(self, shape: tuple[int, ...], axis: int = 0, num_axes: int = -1) -> None:
        super().__init__()
        self.shape, self.axis, self.num_axes = shape, axis, num_axes

    def forward(self, x: Tensor) -> Tensor:
        start = self.axis if self.axis >= 0 else x.ndim + self.axis + 1
        end = x.ndim if self.num_axes == -1 else start + self.num_axes
        middle = [x.shape[start + k] if size == 0 else size for k, size in enumerate(self.shape)]
        return x.reshape(*x.shape[:start], *middle, *x.shape[end:])


@graph.allow
class CaffeTile(nn.Module):
    """Copies side by side along an axis."""

    def __init__(self, axis: int, tiles: int) -> None:
        super().__init__()
        self.axis, self.tiles = axis, tiles

    def forward(self, x: Tensor) -> Tensor:
        times = [1] * x.ndim
        times[self.axis] = self.tiles
        return x.repeat(times)


@graph.allow
class CaffeCrop(nn.Module):
    """The first input cut to the second one's sizes, from `axis` on, at the offsets (one for all, or one each).

    >>> CaffeCrop(1, (1,))(torch.arange(5.0).reshape(1, 5), torch.zeros(1, 3)).tolist()
    [[1.0, 2.0, 3.0]]
    """

    def __init__(self, axis: int = 2, offset: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.axis, self.offset = axis, offset

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        start = self.axis + x.ndim if self.axis < 0 else self.axis
        for axis in range(start, x.ndim):
            offset = 0 if not self.offset else self.offset[axis - start if len(self.offset) > 1 else 0]
            x = x.narrow(axis, offset, reference.shape[axis])
        return x


@graph.allow
class CaffeInnerProduct(nn.Module):
    """A linear layer that keeps its weight as (in, out): Caffe's `transpose: true`, for shared weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        return x if self.bias is None else x + self.bias


@graph.allow
class CaffeEmbed(nn.Module):
    """One row of the weight for each whole number of the input, plus a bias.

    >>> CaffeEmbed(10, 4)(torch.tensor([[1.0, 2.0]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(self, input_dim: int, num_output: int, bias: bool = True) -> None:
        super().__init__()
        self.input_dim, self.num_output = input_dim, num_output
        self.weight = nn.Parameter(torch.zeros(input_dim, num_output))
        self.bias = nn.Parameter(torch.zeros(num_output)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.embedding(x.long(), self.weight)
        return out if self.bias is None else out + self.bias


@graph.allow
class CaffeBatchReindex(nn.Module):
    """The rows of the first input that the second one numbers."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows.reshape(-1).long())


@graph.allow
class CaffeFilter(nn.Module):
    """The rows of the first input at which the second one is not zero."""

    def forward(self, x: Tensor, selector: Tensor) -> Tensor:
        if x.is_meta:  # how many stay depends on the data; Caffe begins with all of them too
            return x.clone()
        return x[selector.reshape(x.shape[0], -1)[:, 0] != 0]


@graph.allow
class CaffeArgMax(nn.Module):
    """Places (or values) of the `top_k` largest numbers of a row, or along an axis; as floats, like all of Caffe's.

    >>> CaffeArgMax(top_k=2)(torch.tensor([[1.0, 5.0, 3.0]])).tolist()
    [[[1.0, 2.0]]]
    """

    def __init__(self, out_max_val: bool = False, top_k: int = 1, axis: int | None = None) -> None:
        super().__init__()
        self.out_max_val, self.top_k, self.axis = out_max_val, top_k, axis

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is not None:
            values, places = x.topk(self.top_k, self.axis)
            return values if self.out_max_val else places.to(x.dtype)
        values, places = x.flatten(1).topk(self.top_k, 1)
        found = places.to(x.dtype).unsqueeze(1)
        if self.out_max_val:
            found = torch.cat([found, values.unsqueeze(1)], 1)
        return found.reshape(*found.shape, *(1,) * (x.ndim - 3))


@graph.allow
class CaffeSPP(nn.Module):
    """Spatial pyramid pooling: 1, 4, 16, ... windows over the picture, side by side.

    >>> CaffeSPP(2)(torch.zeros(1, 3, 7, 5)).shape
    torch.Size([1, 15])
    """

    def __init__(self, pyramid_height: int, method: str = "max") -> None:
        super().__init__()
        self.pyramid_height, self.method = pyramid_height, method

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for level in range(self.pyramid_height):
            bins = 2**level
            kernel = cast(Pair, tuple(-(-size // bins) for size in x.shape[2:]))
            pad = cast(Pair, tuple((k * bins - size + 1) // 2 for k, size in zip(kernel, x.shape[2:], strict=True)))
            found.append(CaffePool2d(kernel, kernel, pad, self.method)(x))
        return found[0] if len(found) == 1 else torch.cat([part.flatten(1) for part in found], 1)


@graph.allow
class CaffeMeanImage(nn.Module):
    """A mean picture taken off, then a factor: what a data layer does with its mean file."""

    mean: Tensor

    def __init__(self, shape: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        self.shape, self.scale = shape, scale
        self.register_buffer("mean", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        return x if self.scale == 1 else x * self.scale


@graph.allow
class CaffeParameter(nn.Module):
    """Numbers that are learned by themselves, without an input."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        return self.value
