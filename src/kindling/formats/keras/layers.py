"""Keras's layers, each as one or a few modules and functions of torch.

`ONE` takes one tensor, `MERGES` a list of tensors, `FREE` looks at its call itself. Numbers in Keras's files are put in
torch's order here. Recurrent layers and attention are in `recurrent.py`. Source: the layers of Keras 2 and 3.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling.formats.assemble import Wire
from kindling.formats.channels import Flow
from kindling.formats.keras.site import Site, reordered
from kindling.nets.layers_h2o import FixedScale
from kindling.nets.layers_keras import (
    GaussianDropout,
    GaussianNoise,
    KerasPReLU,
    MaskedMean,
    SameAvgPool,
    SamePad,
    StepMask,
)

MAX_WINDOW = 2**16
"""Cells along a side of a pooling window: beyond it, a file is refused."""

One = Callable[[Site, Flow], Flow]
Many = Callable[[Site, list[Flow]], Flow]

_CONV: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Mapping[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX: Mapping[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE: Mapping[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_PAD: Mapping[int, type[nn.Module]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_DROPOUT: Mapping[int, type[nn.Module]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


# ------------------------------------------------------------------------------------------------- convolutions


def padded(
    site: Site, wire: Wire, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], value: float = 0.0
) -> tuple[Wire, tuple[int, ...]]:
    """SAME padding: left to the layer where it is the same on both sides whatever the size, else in front of it."""
    none = (0,) * len(kernel)
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if not any(reach):
        return wire, none
    if all(stride == 1 for stride in strides) and not any(part % 2 for part in reach):
        return wire, tuple(part // 2 for part in reach)
    step = tuple(dilation) if any(part > 1 for part in dilation) else None
    return site.module("pad", lambda: SamePad(tuple(kernel), tuple(strides), step, value), wire), none


def _convolution(
    site: Site,
    part: str,
    wire: Wire,
    axes: int,
    weight: Callable[[], Tensor],
    out: int,
    groups: int,
    bias: bool,
    pointwise: bool = False,
) -> Wire:
    """One convolution; `pointwise` is the second half of a separable one."""
    ones = (1,) * axes
    kernel = ones if pointwise else site.sizes("kernel_size", axes)
    strides = ones if pointwise else site.sizes("strides", axes, 1)
    dilation = ones if pointwise else site.sizes("dilation_rate", axes, 1)
    padding = site.text("padding", "valid", "valid", "same", *(("causal",) if axes == 1 else ()))
    pad: tuple[int, ...] = (0,) * axes
    if padding == "same":
        wire, pad = padded(site, wire, kernel, strides, dilation)
    elif padding == "causal" and kernel != (1,):
        before = (kernel[0] - 1) * dilation[0]
        wire = site.module("pad", lambda: nn.ZeroPad1d((before, 0)), wire)
    channels = wire.row[0]
    if channels % groups or out % groups:
        raise site.fail(f"divides {channels} channels into {groups} groups")

    def tensors() -> dict[str, Tensor]:
        found = {"weight": weight()}
        return found | ({"bias": site.take("bias", out)} if bias else {})

    make: Any = _CONV[axes]
    return site.module(
        part, lambda: make(channels, out, kernel, strides, pad, dilation, groups, bias), wire, tensors=tensors
    )


def convolution(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        filters, groups, channels = site.whole("filters"), site.whole("groups", default=1), wire.row[0]
        kernel = site.sizes("kernel_size", axes)
        if channels % groups:
            raise site.fail(f"divides {channels} channels into {groups} groups")
        wire = _convolution(
            site,
            "",
            wire,
            axes,
            lambda: reordered(site.take("kernel", *kernel, channels // groups, filters)),
            filters,
            groups,
            site.flag("use_bias", True),
        )
        return site.activate(Flow(wire, moved), site.fields.get("activation"))

    return make


def _depthwise(site: Site, kernel: Sequence[int], channels: int, multiplier: int, role: str) -> Tensor:
    """(space..., channels, multiplier) as torch has it: (channels * multiplier, 1, space...)."""
    weight = site.take(role, *kernel, channels, multiplier)
    axes = len(kernel)
    return weight.permute(axes, axes + 1, *range(axes)).reshape(channels * multiplier, 1, *kernel)


def depthwise(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        kernel, channels, multiplier = (
            site.sizes("kernel_size", axes),
            wire.row[0],
            site.whole("depth_multiplier", default=1),
        )
        role = "depthwise_kernel"
        wire = _convolution(
            site,
            "",
            wire,
            axes,
            lambda: _depthwise(site, kernel, channels, multiplier, role),
            channels * multiplier,
            channels,
            site.flag("use_bias", True),
        )
        return site.activate(Flow(wire, moved), site.fields.get("activation"))

    return make


def separable(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        kernel, channels = site.sizes("kernel_size", axes), wire.row[0]
        multiplier, filters = site.whole("depth_multiplier", default=1), site.whole("filters")
        wide = channels * multiplier
        wire = _convolution(
            site,
            "depthwise",
            wire,
            axes,
            lambda: _depthwise(site, kernel, channels, multiplier, "depthwise_kernel"),
            wide,
            channels,
            False,
        )
        wire = _convolution(
            site,
            "",
            wire,
            axes,
            lambda: reordered(site.take("pointwise_kernel", *(1,) * axes, wide, filters)),
            filters,
            1,
            site.flag("use_bias", True),
            pointwise=True,
        )
        return site.activate(Flow(wire, moved), site.fields.get("activation"))

    return make


def transposed(axes: int) -> One:
    """The gradient of a convolution: `n * stride` cells with SAME padding, else all that it reaches."""

    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        kernel, strides = site.sizes("kernel_size", axes), site.sizes("strides", axes, 1)
        if site.fields.get("output_padding") is not None or any(
            size != 1 for size in site.sizes("dilation_rate", axes, 1)
        ):
            raise site.fail("has output_padding or dilation_rate, which are not read")
        filters, channels, bias = site.whole("filters"), wire.row[0], site.flag("use_bias", True)
        same = site.text("padding", "valid", "valid", "same") == "same"
        over = [max(k - s, 0) if same else 0 for k, s in zip(kernel, strides, strict=True)]
        pad = tuple(size // 2 for size in over)
        extra = tuple(max(s - k, 0) for k, s in zip(kernel, strides, strict=True))

        def tensors() -> dict[str, Tensor]:
            weight = site.take("kernel", *kernel, filters, channels)
            found = {"weight": reordered(weight)}
            return found | ({"bias": site.take("bias", filters)} if bias else {})

        build: Any = _TRANSPOSED[axes]
        wire = site.module(
            "", lambda: build(channels, filters, kernel, strides, pad, extra, 1, bias), wire, tensors=tensors
        )
        cut = [size % 2 for size in over]
        if any(cut):  # one cell more comes off at the end than at the beginning
            frame = tuple(part for size in reversed(cut) for part in (0, -size))
            wire = site.call("cut", F.pad, wire, frame)
        return site.activate(Flow(wire, moved), site.fields.get("activation"))

    return make


# ----------------------------------------------------------------------------------------------------- pooling


def pooling(axes: int, kind: str) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        size = site.sizes("pool_size", axes, 2)
        strides = site.sizes("strides", axes, size)
        if any(part > MAX_WINDOW for part in (*size, *strides)):
            raise site.fail(f"has windows of {size} in steps of {strides}, which no picture needs")
        same = site.text("padding", "valid", "valid", "same") == "same"
        pad: tuple[int, ...] = (0,) * axes
        if same and kind == "average" and size != (1,) * axes:
            return Flow(site.module("", lambda: SameAvgPool(size, strides), wire), moved)
        if same and kind == "max":
            wire, pad = padded(site, wire, size, strides, (1,) * axes, -math.inf)
        build: Any = (_MAX if kind == "max" else _AVERAGE)[axes]
        return Flow(site.module("", lambda: build(size, strides, pad), wire), moved)

    return make


def global_pooling(axes: int, kind: str) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        if flow.mask is not None and (kind, axes) == ("average", 1):
            return Flow(site.module("", MaskedMean, site.last(flow), flow.mask))
        wire, moved = site.channels(flow, axes)
        keep = site.flag("keepdims", False)
        function = torch.mean if kind == "average" else torch.amax
        return Flow(site.call("", function, wire, tuple(range(2, axes + 2)), keep), moved and keep)

    return make


# ---------------------------------------------------------------------------------- dense, embedding, norms


def dense(site: Site, flow: Flow) -> Flow:
    wire = site.last(flow)
    if wire.rank < 2:
        raise site.fail("is given one number a row")
    features, units, bias = wire.row[-1], site.whole("units"), site.flag("use_bias", True)

    def tensors() -> dict[str, Tensor]:
        found = {"weight": site.take("kernel", features, units).T}
        return found | ({"bias": site.take("bias", units)} if bias else {})

    wire = site.module("", lambda: nn.Linear(features, units, bias), wire, tensors=tensors)
    return site.activate(Flow(wire, mask=flow.mask), site.fields.get("activation"))


def embedding(site: Site, flow: Flow) -> Flow:
    count, size = site.whole("input_dim"), site.whole("output_dim")
    site.unset("lora_rank")
    wire = site.last(flow)
    mask = None
    if site.flag("mask_zero", False):
        mask = site.call("mask", torch.not_equal, wire, 0)
    if wire.value.dtype != torch.int64:
        wire = site.method("index", "long", wire)
    out = site.module(
        "",
        lambda: nn.Embedding(count, size),
        wire,
        tensors=lambda: {"weight": site.take("embeddings", count, size)},
    )
    return Flow(out, mask=mask)


def batch_norm(site: Site, flow: Flow) -> Flow:
    """Inference and fine-tuning; Keras's momentum counts what is kept, torch's what is new."""
    site.unset("renorm", "virtual_batch_size")
    axis = site.fields.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if isinstance(axis, bool) or not isinstance(axis, int) or not -flow.rank <= axis < flow.rank:
        raise site.fail(f"has axis={str(axis)[:60]}, which rows of shape {flow.row} do not have")
    axis %= flow.rank
    if flow.rank == 2 or axis == flow.rank - 1:
        wire, moved = site.building.mover.first(flow), flow.rank > 2
    elif axis == 1:
        wire, moved = site.last(flow), False
    else:
        raise site.fail(f"normalises axis {axis}; the last and the first of a row are read")
    if wire.rank > 5:
        raise site.fail(f"is given rows of shape {flow.row}")
    count, eps, momentum = wire.row[0], site.number("epsilon", 1e-3), 1 - site.number("momentum", 0.99)
    held = [name for name, key in (("weight", "scale"), ("bias", "center")) if not site.flag(key, True)]
    affine = len(held) < 2
    if not affine:
        held = []

    def tensors() -> dict[str, Tensor]:
        found = {}
        if affine:
            found["weight"] = torch.ones(count) if "weight" in held else site.take("gamma", count)
            found["bias"] = torch.zeros(count) if "bias" in held else site.take("beta", count)
        found["running_mean"] = site.take("moving_mean", count)
        found["running_var"] = site.take("moving_variance", count)
        return found

    build: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[wire.rank]
    wire = site.module("", lambda: build(count, eps, momentum, affine), wire, tensors=tensors, held=held)
    return Flow(wire, moved, flow.mask)


def layer_norm(site: Site, flow: Flow) -> Flow:
    wire = site.last(flow)
    axes = site.fields.get("axis", -1)
    axes = axes if isinstance(axes, list) else [axes]
    if not all(isinstance(axis, int) and -wire.rank < axis < wire.rank for axis in axes):
        raise site.fail(f"has axis={str(axes)[:60]}, which rows of shape {flow.row} do not have")
    found = sorted(axis % wire.rank for axis in axes)
    if found != list(range(wire.rank - len(found), wire.rank)) or 0 in found:
        raise site.fail(f"normalises axes {found}; the last ones of a row are read")
    site.unset("rms_scaling")
    shape = wire.row[-len(found) :]
    eps, scale, center = site.number("epsilon", 1e-3), site.flag("scale", True), site.flag("center", True)
    held = [name for name, there in (("weight", scale), ("bias", center)) if not there]

    def tensors() -> dict[str, Tensor]:
        gamma = site.take("gamma", *shape) if scale else torch.ones(shape)
        return {"weight": gamma, "bias": site.take("beta", *shape) if center else torch.zeros(shape)}

    return Flow(
        site.module("", lambda: nn.LayerNorm(shape, eps), wire, tensors=tensors, held=held),
        mask=flow.mask,
    )


def group_norm(site: Site, flow: Flow) -> Flow:
    if site.fields.get("axis", -1) not in (-1, flow.rank - 1) or flow.rank < 3:
        raise site.fail("normalises an axis that is not the last of several, which is not read")
    wire, moved = site.building.mover.first(flow), True
    count, groups = wire.row[0], site.whole("groups", low=-1, default=32)
    groups = count if groups == -1 else groups
    if groups < 1 or count % groups:
        raise site.fail(f"divides {count} channels into {groups} groups")
    eps, scale, center = site.number("epsilon", 1e-3), site.flag("scale", True), site.flag("center", True)
    held = [name for name, there in (("weight", scale), ("bias", center)) if not there]

    def tensors() -> dict[str, Tensor]:
        gamma = site.take("gamma", count) if scale else torch.ones(count)
        return {"weight": gamma, "bias": site.take("beta", count) if center else torch.zeros(count)}

    return Flow(site.module("", lambda: nn.GroupNorm(groups, count, eps), wire, tensors=tensors, held=held), moved)


def unit_norm(site: Site, flow: Flow) -> Flow:
    axis = site.fields.get("axis", -1)
    if axis not in (-1, flow.rank - 1):
        raise site.fail(f"normalises axis {str(axis)[:60]}; the last is read")
    return replace(flow, wire=site.call("", F.normalize, flow.wire, 2.0, flow.axis(-1), 1e-6), scores=None)


# ---------------------------------------------------------------------------------------------- activations


def activation(site: Site, flow: Flow) -> Flow:
    return site.activate(flow, site.fields.get("activation"), "")


def named_activation(name: str) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        return site.activate(flow, {"class_name": name, "config": dict(site.fields)}, "")

    return make


def prelu(site: Site, flow: Flow) -> Flow:
    shared = site.fields.get("shared_axes") or []
    if not isinstance(shared, list) or not all(isinstance(a, int) and 0 < a < flow.rank for a in shared):
        raise site.fail(f"has shared_axes={str(shared)[:60]}")
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(flow.shape) if axis)
    own = (shape[-1], *shape[:-1]) if flow.moved else shape

    def tensors() -> dict[str, Tensor]:
        alpha = site.take("alpha", *shape)
        return {"weight": alpha.movedim(-1, 0) if flow.moved else alpha}

    return replace(flow, wire=site.module("", lambda: KerasPReLU(own), flow.wire, tensors=tensors), scores=None)


def thresholded(site: Site, flow: Flow) -> Flow:
    theta = site.number("theta", 1.0)
    return replace(flow, wire=site.module("", lambda: nn.Threshold(theta, 0.0), flow.wire), scores=None)


# ---------------------------------------------------------------------------------- what acts in training only


def dropout(site: Site, flow: Flow) -> Flow:
    rate = site.number("rate", 0.5)
    if not 0 <= rate <= 1:
        raise site.fail(f"drops a share of {rate}")
    if site.fields.get("noise_shape") is not None:
        site.note("its noise_shape is left out: in training every number is dropped by itself")
    build = {"AlphaDropout": nn.AlphaDropout, "GaussianDropout": GaussianDropout}.get(site.kind, nn.Dropout)
    return replace(flow, wire=site.module("", lambda: build(rate), flow.wire))


def spatial_dropout(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        build, rate = _DROPOUT[axes], site.number("rate", 0.5)
        if not 0 <= rate <= 1:
            raise site.fail(f"drops a share of {rate}")
        return Flow(site.module("", lambda: build(rate), wire), moved, flow.mask)

    return make


def noise(site: Site, flow: Flow) -> Flow:
    std = site.number("stddev", 0.0)
    return replace(flow, wire=site.module("", lambda: GaussianNoise(std), flow.wire))


def nothing(site: Site, flow: Flow) -> Flow:
    """Layers that change no number: they stay, under their name."""
    return replace(flow, wire=site.module("", nn.Identity, flow.wire))


# ------------------------------------------------------------------------------------------------- shapes


def flatten(site: Site, flow: Flow) -> Flow:
    wire = site.last(flow)
    if not site.channels_last and wire.rank > 2:  # Keras turns the channels to the end first
        wire = site.call("order", torch.movedim, wire, 1, -1)
    if wire.rank == 1:
        return Flow(site.call("", torch.unsqueeze, wire, 1))
    return Flow(site.module("", nn.Flatten, wire))


def reshape(site: Site, flow: Flow) -> Flow:
    target = site.fields.get("target_shape")
    if not isinstance(target, list) or not all(isinstance(n, int) and (n > 0 or n == -1) for n in target):
        raise site.fail(f"has target_shape={str(target)[:60]}")
    wire, full = site.last(flow), math.prod(flow.row)
    known = math.prod(size for size in target if size != -1)
    if target.count(-1) > 1 or full % known or (-1 not in target and full != known):
        raise site.fail(f"makes rows of shape {tuple(target)[:8]} of {flow.row}")
    sizes = [full // known if size == -1 else size for size in target]
    return Flow(site.method("", "reshape", wire, -1, *sizes))


def permute(site: Site, flow: Flow) -> Flow:
    dims = site.fields.get("dims")
    wire = site.last(flow)
    if (
        not isinstance(dims, list)
        or not all(isinstance(d, int) for d in dims)
        or sorted(dims) != [*range(1, wire.rank)]
    ):
        raise site.fail(f"has dims={str(dims)[:60]}, no order of {wire.rank - 1} axes")
    return Flow(site.call("", torch.permute, wire, (0, *dims)))


def repeat_vector(site: Site, flow: Flow) -> Flow:
    count = site.whole("n")
    if flow.rank != 2:
        raise site.fail(f"repeats vectors, and is given rows of shape {flow.row}")
    return Flow(site.method("", "expand", site.call("axis", torch.unsqueeze, flow.wire, 1), -1, count, -1))


def _frame(site: Site, key: str, axes: int) -> list[tuple[int, int]]:
    """Cells before and after each axis."""
    value = site.fields.get(key, 1)
    if axes == 1 and isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value):
        value = [value]
    values = value if isinstance(value, list) else [value] * axes
    found = []
    for part in values:
        pair = part if isinstance(part, list) else [part, part]
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**20 for n in pair):
            raise site.fail(f"has {key}={str(value)[:60]}")
        found.append((pair[0], pair[1]))
    if len(found) != axes:
        raise site.fail(f"has {key}={str(value)[:60]}, not one for each of {axes} axes")
    return found


def zero_padding(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        site.text("mode", "constant", "constant")
        wire, moved = site.channels(flow, axes)
        frame = tuple(size for pair in reversed(_frame(site, "padding", axes)) for size in pair)
        build: Any = _PAD[axes]
        return Flow(site.module("", lambda: build(frame), wire), moved)

    return make


def cropping(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        frame = _frame(site, "cropping", axes)
        if any(before + after >= size for (before, after), size in zip(frame, wire.row[1:], strict=True)):
            raise site.fail(f"cuts {frame} off rows of shape {flow.row}")
        build: Any = _PAD[axes]
        cut = tuple(-size for pair in reversed(frame) for size in pair)
        return Flow(site.module("", lambda: build(cut), wire), moved)

    return make


def upsampling(axes: int) -> One:
    def make(site: Site, flow: Flow) -> Flow:
        wire, moved = site.channels(flow, axes)
        size = site.sizes("size", axes, 2)
        mode = site.text("interpolation", "nearest", "nearest", *(("bilinear", "bicubic") if axes == 2 else ()))
        factors = tuple(float(part) for part in size)
        align = None if mode == "nearest" else False
        if mode == "bicubic":
            raise site.fail("interpolates bicubically, with another kernel than torch's, which is not read")
        return Flow(site.module("", lambda: nn.Upsample(None, factors, mode, align), wire), moved)

    return make


def rescaling(site: Site, flow: Flow) -> Flow:
    """x * scale + offset."""
    values = []
    for key, default in (("scale", 1.0), ("offset", 0.0)):
        value = site.fields.get(key, default)
        if isinstance(value, dict) and isinstance(value.get("config"), dict):
            value = value["config"].get("value")
        many = value if isinstance(value, list) else [value]
        if not many or not all(isinstance(n, int | float) and math.isfinite(n) for n in many):
            raise site.fail(f"has {key}={str(value)[:60]}")
        values.append([float(n) for n in many])
    scale, offset = values
    if len(scale) == len(offset) == 1:
        scaled = site.call("" if not offset[0] else "scale", operator.mul, flow.wire, scale[0])
        return replace(flow, wire=site.call("", operator.add, scaled, offset[0]) if offset[0] else scaled, scores=None)
    count = flow.row[-1]
    if any(len(part) not in (1, count) for part in values):
        raise site.fail(f"scales {count} channels by {max(map(len, values))} numbers")
    spread = [torch.tensor(part).expand(count) for part in values]
    return Flow(
        site.module(
            "",
            lambda: FixedScale(count),
            site.last(flow),
            tensors=lambda: {"scale": spread[0], "shift": spread[1]},
        )
    )


def normalization(site: Site, flow: Flow) -> Flow:
    """(x - mean) / max(sqrt(variance), 1e-7), of numbers that were found in data or given."""
    wire = site.last(flow)
    axis = site.fields.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    invert = site.flag("invert", False)
    if axis in (None, []):
        count = 1
    elif axis in (-1, wire.rank - 1):
        count = wire.row[-1]
    else:
        raise site.fail(f"normalises axis {str(axis)[:60]}; the last and none are read")

    def tensors() -> dict[str, Tensor]:
        given = [
            site.fields.get("mean", site.fields.get("input_mean")),
            site.fields.get("variance", site.fields.get("input_variance")),
        ]
        if all(part is None for part in given):
            shape = (count,) if axis not in (None, []) else ()
            mean, variance = site.take("mean", *shape), site.take("variance", *shape)
            site.take("count")
        else:
            try:
                mean, variance = (torch.tensor(part, dtype=torch.float32).reshape(-1) for part in given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise site.fail("has a mean or variance that is no list of numbers") from error
            if not {mean.numel(), variance.numel()} <= {1, count}:
                raise site.fail(f"has {mean.numel()} means for {count} features")
        std = variance.sqrt().clamp_min(1e-7)
        scale = std if invert else 1 / std
        shift = mean if invert else -mean / std
        features = wire.row[-1]
        return {"scale": scale.expand(features), "shift": shift.expand(features)}

    return Flow(site.module("", lambda: FixedScale(wire.row[-1]), wire, tensors=tensors), mask=flow.mask)


def masking(site: Site, flow: Flow) -> Flow:
    """Steps that hold one value only are zeroed, and skipped by the recurrent layers behind."""
    value = site.number("mask_value", 0.0)
    if flow.rank != 3:
        raise site.fail(f"masks steps of sequences, and is given rows of shape {flow.row}")
    wire = site.last(flow)
    mask = site.module("mask", lambda: StepMask(value), wire)
    return Flow(site.call("", operator.mul, wire, site.call("steps", torch.unsqueeze, mask, -1)), mask=mask)


# -------------------------------------------------------------------------------------------------- merges


def aligned(site: Site, flows: list[Flow]) -> tuple[list[Wire], bool]:
    """Tensors in one order: moved if all of the same rank are, else all as Keras has them."""
    if len({flow.rank for flow in flows}) == 1 and any(flow.moved for flow in flows):
        return [site.building.mover.first(flow) for flow in flows], True
    wires = [site.last(flow) for flow in flows]
    rank = max(wire.rank for wire in wires)
    found = []
    for place, wire in enumerate(wires):
        if wire.rank < rank:  # Keras puts axes behind the batch
            sizes = (-1, *(1,) * (rank - wire.rank), *wire.row)
            wire = site.method(f"spread{place}", "reshape", wire, *sizes)
        found.append(wire)
    return found, False


def merged(function: Callable[..., Any], share: bool = False) -> Many:
    def make(site: Site, flows: list[Flow]) -> Flow:
        wires, moved = aligned(site, flows)
        total = wires[0]
        for place, wire in enumerate(wires[1:], 1):
            last = place == len(wires) - 1 and not share
            total = site.call("" if last else f"{place}", function, total, wire)
        if share:
            total = site.call("", operator.truediv, total, len(wires))
        return Flow(total, moved)

    return make


def concatenate(site: Site, flows: list[Flow]) -> Flow:
    rank = flows[0].rank
    axis = site.fields.get("axis", -1)
    if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank or axis % rank == 0:
        raise site.fail(f"has axis={str(axis)[:60]}, which rows of shape {flows[0].row} do not have")
    if any(flow.rank != rank for flow in flows):
        raise site.fail(f"is given rows of shapes {[flow.row for flow in flows][:8]}")
    wires, moved = aligned(site, flows)
    return Flow(site.call("", torch.cat, wires, Flow(wires[0], moved).axis(axis)), moved)


def dot(site: Site, flows: list[Flow]) -> Flow:
    """Products summed along one axis of each of two tensors."""
    if len(flows) != 2:
        raise site.fail(f"is given {len(flows)} tensors")
    pair = [site.last(flow) for flow in flows]
    given = site.fields.get("axes", -1)
    axes = given if isinstance(given, list) else [given, given]
    if len(axes) != 2 or not all(
        isinstance(a, int) and -wire.rank < a < wire.rank and a % wire.rank for a, wire in zip(axes, pair, strict=True)
    ):
        raise site.fail(f"has axes={str(given)[:60]}")
    found = [axis % wire.rank for axis, wire in zip(axes, pair, strict=True)]
    if site.flag("normalize", False):
        pair = [
            site.call(f"unit{place}", F.normalize, wire, 2.0, axis, 1e-6)
            for place, (wire, axis) in enumerate(zip(pair, found, strict=True))
        ]
    ranks = (pair[0].rank, pair[1].rank)
    if ranks == (2, 2):
        product = site.call("product", operator.mul, *pair)
        return Flow(site.call("", torch.sum, product, (1,), True))
    if not set(ranks) <= {2, 3}:
        raise site.fail(f"multiplies rows of shapes {[flow.row for flow in flows]}; vectors and matrices are read")
    left, right = pair
    left = site.call("left", torch.unsqueeze, left, 1) if ranks[0] == 2 else left
    right = site.call("right", torch.unsqueeze, right, 2) if ranks[1] == 2 else right
    if ranks[0] == 3 and found[0] == 1:
        left = site.call("left", torch.transpose, left, 1, 2)
    if ranks[1] == 3 and found[1] == 2:
        right = site.call("right", torch.transpose, right, 1, 2)
    if ranks == (3, 3):
        return Flow(site.call("", torch.matmul, left, right))
    return Flow(
        site.call("", torch.squeeze, site.call("product", torch.matmul, left, right), 1 if ranks[0] == 2 else 2)
    )


ONE: dict[str, One] = {
    "Activation": activation,
    "ActivityRegularization": nothing,
    "AlphaDropout": dropout,
    "BatchNormalization": batch_norm,
    "Dense": dense,
    "Dropout": dropout,
    "ELU": named_activation("ELU"),
    "Embedding": embedding,
    "Flatten": flatten,
    "GaussianDropout": dropout,
    "GaussianNoise": noise,
    "GroupNormalization": group_norm,
    "Identity": nothing,
    "LayerNormalization": layer_norm,
    "LeakyReLU": named_activation("LeakyReLU"),
    "Masking": masking,
    "Normalization": normalization,
    "PReLU": prelu,
    "Permute": permute,
    "ReLU": named_activation("ReLU"),
    "RepeatVector": repeat_vector,
    "Rescaling": rescaling,
    "Reshape": reshape,
    "Softmax": named_activation("softmax"),
    "ThresholdedReLU": thresholded,
    "UnitNormalization": unit_norm,
}
for _axes in (1, 2, 3):
    ONE |= {
        f"Conv{_axes}D": convolution(_axes),
        f"Conv{_axes}DTranspose": transposed(_axes),
        f"MaxPooling{_axes}D": pooling(_axes, "max"),
        f"AveragePooling{_axes}D": pooling(_axes, "average"),
        f"GlobalMaxPooling{_axes}D": global_pooling(_axes, "max"),
        f"GlobalAveragePooling{_axes}D": global_pooling(_axes, "average"),
        f"ZeroPadding{_axes}D": zero_padding(_axes),
        f"Cropping{_axes}D": cropping(_axes),
        f"UpSampling{_axes}D": upsampling(_axes),
        f"SpatialDropout{_axes}D": spatial_dropout(_axes),
    }
for _axes in (1, 2):
    ONE |= {f"DepthwiseConv{_axes}D": depthwise(_axes), f"SeparableConv{_axes}D": separable(_axes)}

MERGES: dict[str, Many] = {
    "Add": merged(operator.add),
    "Average": merged(operator.add, share=True),
    "Concatenate": concatenate,
    "Dot": dot,
    "Maximum": merged(torch.maximum),
    "Minimum": merged(torch.minimum),
    "Multiply": merged(operator.mul),
    "Subtract": merged(operator.sub),
}

MASKED = frozenset({
    "Activation", "ActivityRegularization", "AlphaDropout", "BatchNormalization", "Dense", "Dropout", "ELU",
    "GaussianDropout", "GaussianNoise", "GlobalAveragePooling1D", "Identity", "LayerNormalization", "LeakyReLU",
    "Masking", "Normalization", "PReLU", "ReLU", "SpatialDropout1D", "ThresholdedReLU",
})  # fmt: skip
"""Layers that take a masked sequence as Keras does; others are refused one."""
