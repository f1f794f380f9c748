"""Caffe's layer types as torch: one small function for each, in a table that users can add to.

A function is given the graph in the making, the layer's message and the nodes of its bottoms, and gives the nodes of
its tops. Losses, metrics and data layers are not here: they are no part of the net (`losses.py`, `data.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from kindling.errors import FormatError
from kindling.formats.caffe.emit import Emitter, Slot
from kindling.formats.caffe.schema import Message
from kindling.nets import layers_caffe as own
from kindling.nets.layers_caffe import pooled_size

Build = Callable[["Site"], list[fx.Node]]
_CONSTANT_ONE = Message("FillerParameter", 0, {"value": [1.0]})
_CONSTANT_QUARTER = Message("FillerParameter", 0, {"value": [0.25]})
MAX_PYRAMID = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where a layer is built: everything its builder may ask."""

    to: Emitter
    layer: Message
    """The LayerParameter message."""
    bottoms: tuple[fx.Node, ...]
    phase: str = "TEST"
    other: Message | None = None
    """The layer of the same name in the other phase, where the file has one of its own for it."""
    follower: Message | None = None
    """The layer that alone reads this one's top, if there is one."""
    shares: bool = False
    """Whether some blob of the follower is shared by name."""
    batch: int = 1
    """Rows in a batch, as the file declares."""

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.layer.get("name") or self.layer.get("type"))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the bottoms, with the batch that the file declares."""
        return [self.to.shape(node) for node in self.bottoms]

    def settings(self, name: str) -> Message:
        """The message of its settings: `"pooling_param"`."""
        found = self.layer.get(name)
        return found if isinstance(found, Message) else Message(name, self.layer.line)

    def error(self, why: str) -> FormatError:
        """An error that names the layer, its type and its line."""
        return self.to.error(self.layer, why)

    def need(self, fits: bool, why: str) -> None:
        """Raise unless it fits."""
        if not fits:
            raise self.error(why)

    def axis(self, axis: int, count: int | None = None) -> int:
        """An axis counted from the front; one past the end is allowed with `count`."""
        axes = len(self.shapes[0])
        found = axis + axes if axis < 0 else axis
        self.need(0 <= found < (axes if count is None else count), f"names axis {axis} of a blob with {axes} axes")
        return found

    def module(self, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """The layer's own node."""
        return self.to.module(self.name, module, *(inputs or self.bottoms))

    def single(self) -> fx.Node:
        """The only bottom."""
        self.need(len(self.bottoms) == 1, f"has {len(self.bottoms)} bottoms, not one")
        return self.bottoms[0]


# Convolutions and inner products


def _per_axis(site: Site, settings: Message, name: str, axes: int, default: int | None) -> tuple[int, ...]:
    """A setting for each spatial axis: given once, once each, or as `_h` and `_w`."""
    base = {"kernel_size": "kernel"}.get(name, name)
    given = [int(value) for value in settings.all(name)]
    tall, wide = f"{base}_h", f"{base}_w"
    if settings.has(tall) or settings.has(wide):
        site.need(not given and axes == 2, f"gives both {name} and {tall}, or {tall} to {axes} axes")
        given = [int(settings.get(tall) or 0), int(settings.get(wide) or 0)]
    if not given:
        site.need(default is not None, f"has no {name}")
        given = [default or 0]
    site.need(len(given) in (1, axes), f"has {len(given)} values of {name} for {axes} spatial axes")
    return tuple(given * axes if len(given) == 1 else given)


def _convolution(site: Site) -> list[fx.Node]:
    settings = site.settings("convolution_param")
    transposed = site.layer.get("type") == "Deconvolution"
    shape = site.shapes[0]
    site.need(3 <= len(shape) <= 5, f"takes blobs with 1 to 3 spatial axes, not of shape {shape}")
    site.need(site.axis(settings.get("axis")) == 1, f"has its channels at axis {settings.get('axis')}; only 1 is known")
    axes = len(shape) - 2
    kernel = _per_axis(site, settings, "kernel_size", axes, None)
    stride = _per_axis(site, settings, "stride", axes, 1)
    pad = _per_axis(site, settings, "pad", axes, 0)
    dilation = _per_axis(site, settings, "dilation", axes, 1)
    outputs, group, bias = settings.get("num_output"), settings.get("group"), settings.get("bias_term")
    site.need(outputs > 0 and min(kernel) > 0 and min(stride) > 0 and min(dilation) > 0, "has a size of 0")
    site.need(
        group > 0 and shape[1] % group == 0 and outputs % group == 0,
        f"has {group} groups for {shape[1]} channels in and {outputs} out",
    )
    kinds: tuple[type[nn.Module], ...] = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    made: Any = kinds[axes - 1]
    layer = made(shape[1], outputs, kernel, stride=stride, padding=pad, dilation=dilation, groups=group, bias=bias)
    nodes = [site.module(layer, site.bottoms[0])]
    path = str(nodes[0].target)
    slots = [Slot(tensor=f"{path}.weight", filler=settings.get("weight_filler"))]
    if bias:
        slots.append(Slot(tensor=f"{path}.bias", filler=settings.get("bias_filler")))
    site.to.parameters(site.layer, *slots)
    # The same weights over every further bottom.
    return nodes + [site.to.again(path, bottom) for bottom in site.bottoms[1:]]


def _inner_product(site: Site) -> list[fx.Node]:
    settings = site.settings("inner_product_param")
    axis = site.axis(settings.get("axis"))
    node, shape = site.single(), site.shapes[0]
    outputs, bias = settings.get("num_output"), settings.get("bias_term")
    site.need(outputs > 0, "has num_output 0")
    site.need(axis > 0, "flattens the rows of the batch into one another")
    inputs = math.prod(shape[axis:])
    if axis < len(shape) - 1:
        node = site.to.module(f"{site.name}_flatten", nn.Flatten(axis), node, alias=False)
    # Caffe's `transpose` keeps the weight as (in, out), which matters to layers that share it.
    shared = any(spec.get("name") for spec in site.layer.all("param"))
    keep = settings.get("transpose") and shared
    layer = own.CaffeInnerProduct(inputs, outputs, bias) if keep else nn.Linear(inputs, outputs, bias)
    made = site.module(layer, node)
    turned = bool(settings.get("transpose")) and not keep
    slots = [Slot(tensor=f"{made.target}.weight", filler=settings.get("weight_filler"), transpose=turned)]
    if bias:
        slots.append(Slot(tensor=f"{made.target}.bias", filler=settings.get("bias_filler")))
    site.to.parameters(site.layer, *slots)
    return [made]


def _embed(site: Site) -> list[fx.Node]:
    settings = site.settings("embed_param")
    site.need(settings.get("num_output") > 0 and settings.get("input_dim") > 0, "has a size of 0")
    layer = own.CaffeEmbed(settings.get("input_dim"), settings.get("num_output"), settings.get("bias_term"))
    node = site.module(layer, site.single())
    slots = [Slot(tensor=f"{node.target}.weight", filler=settings.get("weight_filler"))]
    if settings.get("bias_term"):
        slots.append(Slot(tensor=f"{node.target}.bias", filler=settings.get("bias_filler")))
    site.to.parameters(site.layer, *slots)
    return [node]


# Pooling


def _pooling(site: Site) -> list[fx.Node]:
    settings = site.settings("pooling_param")
    shape, method = site.shapes[0], settings.get("pool") or "MAX"
    site.need(len(shape) == 4, f"takes pictures (N, C, H, W), not a blob of shape {shape}")
    if settings.get("global_pooling"):
        site.need(
            not any(settings.has(name) for name in ("kernel_size", "kernel_h", "kernel_w")),
            "is global and has a kernel size",
        )
        kernel = shape[2:]
        pads = [settings.get(name) for name in ("pad", "pad_h", "pad_w")]
        strides = [settings.get(name) for name in ("stride", "stride_h", "stride_w") if settings.has(name)]
        site.need(not any(pads) and all(value == 1 for value in strides), "is global and has a pad or stride")
        if method != "STOCHASTIC":
            # Any size of picture, as Caffe's: the kernel is the picture.
            return [site.module(nn.AdaptiveAvgPool2d(1) if method == "AVE" else nn.AdaptiveMaxPool2d(1), site.single())]
        stride, pad = (1, 1), (0, 0)
    else:
        kernel = _pair(site, settings, "kernel", "kernel_size", None)
        stride = _pair(site, settings, "stride", "stride", 1)
        pad = _pair(site, settings, "pad", "pad", 0)
    site.need(min(kernel) > 0 and min(stride) > 0, "has a kernel or stride of 0")
    site.need(all(p < k for p, k in zip(pad, kernel, strict=True)), f"pads {pad} for a kernel of {kernel}")
    site.need(len(site.layer.all("top")) == 1, "asks for the places of the maxima as a second top, which is not known")
    ceil = settings.get("round_mode") != "FLOOR"
    pair: tuple[Any, Any, Any] = (tuple(kernel), tuple(stride), tuple(pad))
    if method == "STOCHASTIC":
        site.need(not any(pad), "is stochastic and has a pad")
        return [site.module(own.CaffeStochasticPool2d(pair[0], pair[1], ceil), site.single())]
    sizes = [pooled_size(shape[2 + k], kernel[k], stride[k], pad[k], ceil) for k in (0, 1)]
    site.need(min(sizes) > 0, f"has a kernel of {kernel} for pictures of {shape[2:]}")
    outside = [(n - 1) * s >= size + p for n, s, size, p in zip(sizes, stride, shape[2:], pad, strict=True)]
    site.need(not any(outside), f"has windows outside of pictures of {shape[2:]}: its stride {stride} is too long")
    layer: nn.Module
    if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
        layer = own.CaffePool2d(*pair, "max" if method == "MAX" else "ave", ceil)
    elif method == "MAX":
        layer = nn.MaxPool2d(*pair, ceil_mode=ceil)
    else:
        layer = nn.AvgPool2d(*pair, ceil_mode=ceil)
    node = site.module(layer, site.single())
    if site.to.shape(node)[2:] != tuple(sizes):
        raise site.error(f"gives {site.to.shape(node)[2:]} where Caffe gives {tuple(sizes)}")
    return [node]


def _pair(site: Site, settings: Message, base: str, name: str, default: int | None) -> tuple[int, int]:
    tall, wide = f"{base}_h", f"{base}_w"
    if settings.has(tall) or settings.has(wide):
        site.need(
            settings.has(tall) and settings.has(wide) and not settings.has(name),
            f"gives {name}, {tall} and {wide} other than one or the other two",
        )
        return int(settings.get(tall)), int(settings.get(wide))
    site.need(settings.has(name) or default is not None, f"has no {name}")
    value = int(settings.get(name)) if settings.has(name) else int(default or 0)
    return value, value


def _spp(site: Site) -> list[fx.Node]:
    settings = site.settings("spp_param")
    height = settings.get("pyramid_height")
    site.need(len(site.shapes[0]) == 4, f"takes pictures (N, C, H, W), not a blob of shape {site.shapes[0]}")
    site.need(0 < height <= MAX_PYRAMID, f"has a pyramid of {height} levels; 1 to {MAX_PYRAMID} are known")
    site.need(settings.get("pool") != "STOCHASTIC", "pools at random, which Caffe itself does not do in a pyramid")
    return [site.module(own.CaffeSPP(height, "ave" if settings.get("pool") == "AVE" else "max"), site.single())]


# Normalisation


def _lrn(site: Site) -> list[fx.Node]:
    settings = site.settings("lrn_param")
    size, alpha, beta = settings.get("local_size"), settings.get("alpha"), settings.get("beta")
    site.need(size % 2 == 1, f"has an even local_size {size}")
    site.need(len(site.shapes[0]) == 4, f"takes pictures (N, C, H, W), not a blob of shape {site.shapes[0]}")
    if settings.get("norm_region") == "WITHIN_CHANNEL":
        site.need(size < 2**12, f"has a local_size of {size}")
        return [site.module(own.CaffeLRNWithin(size, alpha, beta), site.single())]
    # Beyond all channels a larger window adds nothing but its size, by which alpha is divided.
    widest = 2 * site.shapes[0][1] + 1
    if size > widest:
        size, alpha = widest, alpha * widest / size
    return [site.module(nn.LocalResponseNorm(size, alpha, beta, settings.get("k")), site.single())]


def _batch_norm(site: Site) -> list[fx.Node]:
    settings = site.settings("batch_norm_param")
    shape = site.shapes[0]
    site.need(2 <= len(shape) <= 5, f"takes blobs with 2 to 5 axes, not of shape {shape}")
    channels, eps, kept = shape[1], settings.get("eps"), settings.get("moving_average_fraction")
    stated = settings.get("use_global_stats") if settings.has("use_global_stats") else None
    fixed, live = stated is True, stated is False and site.phase == "TEST"
    if site.other is not None and (fixed or live):
        # One net for both phases: it learns its statistics in one and uses them in the other.
        twin = site.other.get("batch_norm_param")
        if twin.get("use_global_stats") is not stated or not twin.has("use_global_stats"):
            fixed = live = False
    affine = _takes_over(site)
    made: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    if fixed:
        layer: nn.Module = own.CaffeFixedBatchNorm(channels, eps, affine)
    else:
        layer = made(channels, eps=eps, momentum=1 - kept, affine=affine, track_running_stats=not live)
    node = site.module(layer, site.single())
    kinds = (("running_mean", "mean"), ("running_var", "variance"), ("", "factor"))
    slots = [
        Slot(tensor=f"{node.target}.{name}" if name and not live else "", filler=_CONSTANT_ONE, kind=kind)
        for name, kind in kinds
    ]
    site.to.parameters(site.layer, *slots)
    return [node]


def _takes_over(site: Site) -> bool:
    """Whether the Scale behind a BatchNorm is the plain one, which torch's layer does in one go."""
    scale = site.follower
    if scale is None or scale.get("type") != "Scale" or len(scale.all("bottom")) != 1 or site.shares:
        return False
    settings = scale.get("scale_param")
    return bool(
        settings.get("axis") in (1, 1 - len(site.shapes[0]))
        and settings.get("num_axes") == 1
        and settings.get("bias_term")
    )


def _scale(site: Site) -> list[fx.Node]:
    is_scale = site.layer.get("type") == "Scale"
    settings = site.settings("scale_param" if is_scale else "bias_param")
    axes = len(site.shapes[0])
    if len(site.bottoms) == 2:
        axis = 0 if not site.shapes[1] else site.axis(settings.get("axis"))
        node = site.module(own.CaffeBroadcast(axis, "mul" if is_scale else "add"))
        if is_scale and settings.get("bias_term"):
            node = site.to.module(f"{site.name}_bias", own.CaffeAffine(site.shapes[1], axis, False, True), node)
            site.to.parameters(site.layer, Slot(tensor=f"{node.target}.bias", filler=settings.get("bias_filler")))
        return [node]
    before = site.bottoms[0]
    norm = site.to.root.get_submodule(str(before.target)) if before.op == "call_module" else None
    start = settings.get("filler") if settings.has("filler") else _CONSTANT_ONE
    if is_scale and getattr(norm, "affine", False) is True and isinstance(norm, _NORMS):
        # The BatchNorm before has these weights (`_takes_over`); the name stays, for cuts.
        site.to.parameters(
            site.layer,
            Slot(tensor=f"{before.target}.weight", filler=start),
            Slot(tensor=f"{before.target}.bias", filler=settings.get("bias_filler")),
        )
        return [site.module(nn.Identity(), before)]
    axis = site.axis(settings.get("axis"), axes + 1)
    count = settings.get("num_axes")
    site.need(-1 <= count <= axes - axis, f"covers {count} axes from axis {axis} of a blob with {axes}")
    shape = site.shapes[0][axis : None if count == -1 else axis + count]
    site.need(axis > 0 or not shape, "has a number for each row of the batch")
    bias = not is_scale or bool(settings.get("bias_term"))
    node = site.module(own.CaffeAffine(shape, axis if shape else 0, is_scale, bias), site.single())
    slots = []
    if is_scale:
        slots.append(Slot(tensor=f"{node.target}.weight", filler=start))
    if bias:
        filler = settings.get("bias_filler" if is_scale else "filler")
        slots.append(Slot(tensor=f"{node.target}.bias", filler=filler))
    site.to.parameters(site.layer, *slots)
    return [node]


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, own.CaffeFixedBatchNorm)


def _mvn(site: Site) -> list[fx.Node]:
    settings = site.settings("mvn_param")
    layer = own.CaffeMVN(settings.get("normalize_variance"), settings.get("across_channels"), settings.get("eps"))
    return [site.module(layer, site.single())]


# Elementwise


def _relu(site: Site) -> list[fx.Node]:
    slope = site.settings("relu_param").get("negative_slope")
    return [site.module(nn.LeakyReLU(slope) if slope else nn.ReLU(), site.single())]


def _prelu(site: Site) -> list[fx.Node]:
    settings = site.settings("prelu_param")
    count = 1 if settings.get("channel_shared") else site.shapes[0][site.axis(1)]
    node = site.module(nn.PReLU(count), site.single())
    start = settings.get("filler") if settings.has("filler") else _CONSTANT_QUARTER
    site.to.parameters(site.layer, Slot(tensor=f"{node.target}.weight", filler=start))
    return [node]


def _power(site: Site) -> list[fx.Node]:
    settings = site.settings("power_param")
    power, scale, shift = settings.get("power"), settings.get("scale"), settings.get("shift")
    if scale == 0 and power != 0:
        site.need(shift > 0 or (power > 0 and power == int(power)), f"takes {shift} to the power of {power}")
    return [site.module(own.CaffePower(power, scale, shift), site.single())]


def _exp(site: Site) -> list[fx.Node]:
    settings = site.settings("exp_param" if site.layer.get("type") == "Exp" else "log_param")
    base = settings.get("base")
    site.need(base == -1 or (base > 0 and base != 1), f"has base {base}")
    made = own.CaffeExp if site.layer.get("type") == "Exp" else own.CaffeLog
    return [site.module(made(base, settings.get("scale"), settings.get("shift")), site.single())]


def _clip(site: Site) -> list[fx.Node]:
    settings = site.settings("clip_param")
    low, high = settings.get("min"), settings.get("max")
    site.need(low < high, f"clips to {low}..{high}")
    return [site.module(nn.Hardtanh(low, high), site.single())]


def _swish(site: Site) -> list[fx.Node]:
    beta = site.settings("swish_param").get("beta")
    return [site.module(nn.SiLU() if beta == 1 else own.CaffeSwish(beta), site.single())]


def _dropout(site: Site) -> list[fx.Node]:
    ratio = site.settings("dropout_param").get("dropout_ratio")
    site.need(0 <= ratio < 1, f"drops {ratio} of its input")
    return [site.module(nn.Dropout(ratio), site.single())]


def _softmax(site: Site) -> list[fx.Node]:
    return [site.module(nn.Softmax(site.axis(site.settings("softmax_param").get("axis"))), site.single())]


def _eltwise(site: Site) -> list[fx.Node]:
    settings = site.settings("eltwise_param")
    operation, coefficients = settings.get("operation") or "SUM", tuple(settings.all("coeff"))
    shapes = site.shapes
    site.need(len(shapes) > 1, "has one bottom")
    site.need(all(shape == shapes[0] for shape in shapes), f"joins blobs of different shapes {shapes[:4]}")
    site.need(
        not coefficients or (operation == "SUM" and len(coefficients) == len(shapes)),
        f"has {len(coefficients)} coefficients for the {operation} of {len(shapes)} blobs",
    )
    if len(shapes) == 2 and all(value == 1 for value in coefficients):
        function = {"SUM": operator.add, "PROD": operator.mul, "MAX": torch.maximum}[operation]
        return [site.to.function(site.name, function, *site.bottoms)]
    return [site.module(own.CaffeEltwise(operation, coefficients))]


# Shapes


def _concat(site: Site) -> list[fx.Node]:
    settings = site.settings("concat_param")
    axis = site.axis(settings.get("concat_dim" if settings.has("concat_dim") else "axis"))
    if len(site.bottoms) == 1:
        return [site.module(nn.Identity(), site.bottoms[0])]
    return [site.to.function(site.name, torch.cat, list(site.bottoms), axis)]


def _slice(site: Site) -> list[fx.Node]:
    settings = site.settings("slice_param")
    axis = site.axis(settings.get("slice_dim" if settings.has("slice_dim") else "axis"))
    size, tops = site.shapes[0][axis], site.layer.all("top")
    points = [int(point) for point in settings.all("slice_point")]
    if not points:
        site.need(len(tops) > 0 and size % len(tops) == 0, f"cuts {size} into {len(tops)} parts")
        points = [size // len(tops) * place for place in range(1, len(tops))]
    ends = [0, *points, size]
    site.need(len(points) == len(tops) - 1, f"has {len(points)} slice points for {len(tops)} tops")
    site.need(all(a < b for a, b in pairwise(ends)), f"has slice points {points[:6]} for a size of {size}")
    return [
        site.to.function(f"{site.name}_{place}", torch.narrow, site.single(), axis, start, stop - start)
        for place, (start, stop) in enumerate(pairwise(ends))
    ]


def _split(site: Site) -> list[fx.Node]:
    return [site.single()] * len(site.layer.all("top"))


def _silence(site: Site) -> list[fx.Node]:
    return []


def _flatten(site: Site) -> list[fx.Node]:
    settings = site.settings("flatten_param")
    start, end = site.axis(settings.get("axis")), site.axis(settings.get("end_axis"))
    site.need(start <= end, f"flattens axes {start} to {end}")
    return [site.module(nn.Flatten(start, end), site.single())]


def _reshape(site: Site) -> list[fx.Node]:
    settings = site.settings("reshape_param")
    dims = [int(size) for size in settings.get("shape").all("dim")]
    shape, axis, count = site.shapes[0], settings.get("axis"), settings.get("num_axes")
    start = axis if axis >= 0 else len(shape) + axis + 1
    site.need(0 <= start <= len(shape) and count >= -1, f"begins at axis {axis} of a blob with {len(shape)} axes")
    end = len(shape) if count == -1 else start + count
    site.need(end <= len(shape), f"ends behind the {len(shape)} axes of its blob")
    site.need(all(size >= -1 for size in dims) and dims.count(-1) <= 1, f"has the shape {dims[:8]}")
    site.need(all(size or start + k < len(shape) for k, size in enumerate(dims)), "copies an axis that is not there")
    if start == 0 and dims and dims[0] == shape[0] == site.batch and end > 0:
        dims[0] = 0  # the batch that the file declares; any other is as good
    return [site.module(own.CaffeReshape(tuple(dims), axis, count), site.single())]


def _reduction(site: Site) -> list[fx.Node]:
    settings = site.settings("reduction_param")
    axis = site.axis(settings.get("axis"))
    layer = own.CaffeReduction(settings.get("operation") or "SUM", axis, settings.get("coeff"))
    return [site.module(layer, site.single())]


def _tile(site: Site) -> list[fx.Node]:
    settings = site.settings("tile_param")
    site.need(0 < settings.get("tiles") < 2**31, f"makes {settings.get('tiles')} tiles")
    return [site.module(own.CaffeTile(site.axis(settings.get("axis")), settings.get("tiles")), site.single())]


def _crop(site: Site) -> list[fx.Node]:
    settings = site.settings("crop_param")
    site.need(len(site.bottoms) == 2, f"has {len(site.bottoms)} bottoms, not two")
    axis, offsets = site.axis(settings.get("axis")), tuple(int(value) for value in settings.all("offset"))
    whole, wanted = site.shapes
    cut = len(whole) - axis
    site.need(len(whole) == len(wanted) and len(offsets) in (0, 1, cut), f"has {len(offsets)} offsets for {cut} axes")
    for place in range(axis, len(whole)):
        offset = 0 if not offsets else offsets[place - axis if len(offsets) > 1 else 0]
        site.need(
            whole[place] - offset >= wanted[place],
            f"cuts {wanted[place]} from {whole[place]} at {offset} on axis {place}",
        )
    return [site.module(own.CaffeCrop(axis, offsets))]


def _batch_reindex(site: Site) -> list[fx.Node]:
    site.need(len(site.bottoms) == 2, f"has {len(site.bottoms)} bottoms, not two")
    return [site.module(own.CaffeBatchReindex())]


def _filter(site: Site) -> list[fx.Node]:
    site.need(len(site.bottoms) > 1, "has no selector")
    *blobs, selector = site.bottoms
    first = site.module(own.CaffeFilter(), blobs[0], selector)
    return [first, *(site.to.again(str(first.target), blob, selector) for blob in blobs[1:])]


def _arg_max(site: Site) -> list[fx.Node]:
    settings = site.settings("argmax_param")
    axis = site.axis(settings.get("axis")) if settings.has("axis") else None
    top_k = settings.get("top_k")
    size = site.shapes[0][axis] if axis is not None else math.prod(site.shapes[0][1:])
    site.need(1 <= top_k <= size, f"looks for the {top_k} largest of {size}")
    return [site.module(own.CaffeArgMax(settings.get("out_max_val"), top_k, axis), site.single())]


def _parameter(site: Site) -> list[fx.Node]:
    shape = tuple(site.settings("parameter_param").get("shape").all("dim"))
    node = site.to.module(site.name, own.CaffeParameter(shape))
    site.to.parameters(site.layer, Slot(tensor=f"{node.target}.value", filler=Message("FillerParameter")))
    return [node]


def _plain(make: Callable[[], nn.Module]) -> Build:
    return lambda site: [site.module(make(), site.single())]


LAYERS: Mapping[str, Build] = {
    "AbsVal": lambda site: [site.to.function(site.name, torch.abs, site.single())],
    "ArgMax": _arg_max,
    "BNLL": _plain(nn.Softplus),
    "BatchNorm": _batch_norm,
    "BatchReindex": _batch_reindex,
    "Bias": _scale,
    "Clip": _clip,
    "Concat": _concat,
    "Convolution": _convolution,
    "Crop": _crop,
    "Deconvolution": _convolution,
    "Dropout": _dropout,
    "ELU": lambda site: [site.module(nn.ELU(site.settings("elu_param").get("alpha")), site.single())],
    "Eltwise": _eltwise,
    "Embed": _embed,
    "Exp": _exp,
    "Filter": _filter,
    "Flatten": _flatten,
    "HDF5Output": _silence,
    "InnerProduct": _inner_product,
    "LRN": _lrn,
    "Log": _exp,
    "MVN": _mvn,
    "PReLU": _prelu,
    "Parameter": _parameter,
    "Pooling": _pooling,
    "Power": _power,
    "ReLU": _relu,
    "Reduction": _reduction,
    "Reshape": _reshape,
    "SPP": _spp,
    "Scale": _scale,
    "Sigmoid": _plain(nn.Sigmoid),
    "Silence": _silence,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Swish": _swish,
    "TanH": _plain(nn.Tanh),
    "Threshold": lambda site: [
        site.module(own.CaffeThreshold(site.settings("threshold_param").get("threshold")), site.single())
    ],
    "Tile": _tile,
}
"""Layer type -> its builder."""

CustomLayer = Callable[[Site], nn.Module]
"""Makes the module of a registered layer: it is called with the bottoms and gives the top, or a tuple of tops."""

_REGISTERED: dict[str, CustomLayer] = {}


def register_layer(kind: str, make: CustomLayer) -> None:
    """Teach the reader a layer type of one's own, for this process; it comes before Caffe's layer of that name.

    Args:
        kind: the `type` in the prototxt.
        make: given the `Site` (the layer's message, the shapes of its bottoms), makes the torch module. A class of
            one's own is stored in bundles by name, and comes back by `load(..., classes=[...])`.

    >>> register_layer("Mish", lambda site: nn.Mish())
    >>> "Mish" in registered(), forget_layer("Mish"), "Mish" in registered()
    (True, None, False)
    """
    _REGISTERED[kind] = make


def forget_layer(kind: str) -> None:
    """Undo `register_layer`."""
    _REGISTERED.pop(kind, None)


def registered() -> Mapping[str, CustomLayer]:
    """The layer types that were registered."""
    return dict(_REGISTERED)


def custom(site: Site, make: CustomLayer) -> list[fx.Node]:
    """Build a registered layer: its parameters are its blobs, in order."""
    module = make(site)
    site.need(isinstance(module, nn.Module), f"was registered with a function that makes a {type(module).__name__}")
    node = site.module(module)
    slots = [
        Slot(tensor=f"{node.target}.{name}", filler=Message("FillerParameter"), kind="own")
        for name, _ in module.named_parameters()
    ]
    if slots:
        site.to.parameters(site.layer, *slots)
    tops = site.layer.all("top")
    value = site.to.values[node]
    if not isinstance(value, tuple | list):
        return [node]
    site.need(len(value) == len(tops), f"gives {len(value)} tensors for {len(tops)} tops")
    return [
        site.to.function(f"{site.name}_{place}", operator.getitem, node, place, alias=False)
        for place in range(len(tops))
    ]
