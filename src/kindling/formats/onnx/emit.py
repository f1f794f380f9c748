"""Which torch layer or function an operator becomes: torch's own where one computes the same, else an OnnxOp."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kindling.formats.onnx.convert import INLINE, Converter, Step, Value
from kindling.nets.layers_onnx import OnnxOp
from kindling.nets.onnx_ops import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

Emitter = Callable[[Converter, Step], fx.Node | None]
_CONV: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Mapping[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: Mapping[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE: Mapping[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_MAX: Mapping[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE: Mapping[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_GLOBAL_AVERAGE: Mapping[int, Any] = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
_GLOBAL_MAX: Mapping[int, Any] = {3: nn.AdaptiveMaxPool1d, 4: nn.AdaptiveMaxPool2d, 5: nn.AdaptiveMaxPool3d}
_FLOATS = (torch.float32, torch.float64)
_INLINED = (*_FLOATS, torch.int64, torch.int32, torch.bool, torch.uint8, torch.int8)


def emit(net: Converter, step: Step, node: Any, results: Sequence[Value], where: str) -> list[fx.Node]:
    """Nodes that give the operator's results, one for each output.

    Raises: Unsupported.
    """
    if step.op == "MatMul":
        made = _matmul(net, step, node)
        if made is not None:
            return [made]
    special = _SPECIAL.get(step.op)
    if special is not None and len(step.outputs) == 1:
        made = special(net, step)
        if made is not None:
            return [made]
    return _generic(net, step, results)


def _generic(net: Converter, step: Step, results: Sequence[Value]) -> list[fx.Node]:
    slots: list[int] = []
    constants: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
    arguments: list[fx.Node] = []
    for value in step.inputs:
        if value is None:
            slots.append(-1)
            continue
        plain = plain_constant(value)
        if plain is not None:
            slots.append(-2 - len(constants))
            constants.append(plain)
            continue
        slots.append(len(arguments))
        arguments.append(net.read(value))
    attributes = tuple((name, value) for name, value in sorted(step.attributes.items()))
    layer = OnnxOp(step.op, step.opset, attributes, tuple(slots), tuple(constants), len(step.outputs))
    made = net.layer(step.name, layer, *arguments)
    if len(step.outputs) == 1:
        return [made]
    return [net.call(name or f"{step.name}_{k}", operator.getitem, made, k) for k, name in enumerate(step.outputs)]


def plain_constant(value: Value) -> tuple[str, tuple[int, ...], tuple[Any, ...]] | None:
    """A small constant as plain numbers: settings of an operator. Weights stay tensors."""
    tensor = value.const
    if not isinstance(tensor, Tensor) or tensor.numel() > INLINE:
        return None
    if tensor.is_floating_point() and value.weight and tensor.numel() > 8:
        return None
    if tensor.dtype not in (
        torch.float32,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.uint8,
        torch.int8,
    ):
        return None
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tuple(tensor.reshape(-1).tolist())


# ------------------------------------------------------------------------------------------------- what to look at


def _weight(value: Value | None) -> Tensor | None:
    """A constant of floats."""
    if value is None or not isinstance(value.const, Tensor) or not value.const.is_floating_point():
        return None
    return value.const


def _ints(value: Value | None) -> list[int] | None:
    if value is None or not isinstance(value.const, Tensor) or value.const.is_floating_point():
        return None
    return [int(number) for number in value.const.reshape(-1).tolist()]


def _rank(step: Step) -> int:
    """Axes of the first input; -1 where they are not known."""
    x = step.inputs[0]
    return -1 if x is None or x.rank is None else x.rank


def _node(net: Converter, value: Value | None) -> fx.Node:
    assert value is not None
    return net.read(value)


def _filled(build: Callable[[], nn.Module], **tensors: Tensor | None) -> nn.Module:
    """A layer with these numbers in it, in their dtype."""
    with torch.device("meta"):
        module = build()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        tensor = tensor.detach().contiguous()
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor)
        else:
            module._buffers[name] = tensor
    if module._buffers.get("num_batches_tracked") is not None:
        module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return module


def _symmetric(step: Step, axes: int) -> list[int] | None:
    """Padding that is the same in front and behind; None where it is not."""
    auto = step.attributes.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * axes
    if auto not in ("NOTSET", ""):
        return None
    pads = list(step.attributes.get("pads") or [0] * (2 * axes))
    return pads[:axes] if len(pads) == 2 * axes and pads[:axes] == pads[axes:] and min(pads, default=0) >= 0 else None


def _windows(step: Step, axes: int) -> tuple[list[int], list[int]] | None:
    strides = list(step.attributes.get("strides") or [1] * axes)
    dilations = list(step.attributes.get("dilations") or [1] * axes)
    fits = len(strides) == axes and len(dilations) == axes and min(*strides, *dilations) > 0
    return (strides, dilations) if fits else None


# --------------------------------------------------------------------------------------------- layers with weights


def _conv(net: Converter, step: Step) -> fx.Node | None:
    weight = _weight(step.inputs[1])
    bias = _weight(step.inputs[2]) if len(step.inputs) > 2 else None
    if weight is None or (len(step.inputs) > 2 and bias is None) or weight.dim() - 2 not in _CONV:
        return None
    axes, group = weight.dim() - 2, step.attributes.get("group", 1)
    windows, padding = _windows(step, axes), _symmetric(step, axes)
    if windows is None or group < 1 or weight.shape[0] % group:
        return None
    x = _node(net, step.inputs[0])
    if padding is None:
        if step.attributes.get("auto_pad", "NOTSET") != "NOTSET":
            return None
        pads = list(step.attributes["pads"])
        if len(pads) != 2 * axes or min(pads) < 0:
            return None
        flat = [amount for k in reversed(range(axes)) for amount in (pads[k], pads[k + axes])]
        x, padding = net.call(f"{step.name}_pad", F.pad, x, flat), [0] * axes
    strides, dilations = windows

    def build() -> nn.Module:
        layer: nn.Module = _CONV[axes](
            weight.shape[1] * group,
            weight.shape[0],
            tuple(weight.shape[2:]),
            tuple(strides),
            tuple(padding),
            tuple(dilations),
            group,
            bias is not None,
        )
        return layer

    return net.layer(step.name, _filled(build, weight=weight, bias=bias), x)


def _conv_transpose(net: Converter, step: Step) -> fx.Node | None:
    weight = _weight(step.inputs[1])
    bias = _weight(step.inputs[2]) if len(step.inputs) > 2 else None
    if weight is None or (len(step.inputs) > 2 and bias is None) or weight.dim() - 2 not in _TRANSPOSED:
        return None
    axes, group = weight.dim() - 2, step.attributes.get("group", 1)
    windows, padding = _windows(step, axes), _symmetric(step, axes)
    extra = list(step.attributes.get("output_padding") or [0] * axes)
    if windows is None or padding is None or step.attributes.get("output_shape") or len(extra) != axes:
        return None
    strides, dilations = windows
    if any(e and e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)) or group < 1:
        return None

    def build() -> nn.Module:
        layer: nn.Module = _TRANSPOSED[axes](
            weight.shape[0],
            weight.shape[1] * group,
            tuple(weight.shape[2:]),
            tuple(strides),
            tuple(padding),
            tuple(extra),
            group,
            bias is not None,
            tuple(dilations),
        )
        return layer

    return net.layer(step.name, _filled(build, weight=weight, bias=bias), _node(net, step.inputs[0]))


def _linear(net: Converter, name: str, x: fx.Node, weight: Tensor, bias: Tensor | None) -> fx.Node:
    """`weight` as torch has it: (out, in)."""
    wide, narrow = weight.shape
    layer = _filled(lambda: nn.Linear(narrow, wide, bias is not None), weight=weight, bias=bias)
    return net.layer(name, layer, x)


def _gemm(net: Converter, step: Step) -> fx.Node | None:
    weight = _weight(step.inputs[1])
    given = step.inputs[2] if len(step.inputs) > 2 else None
    bias = _weight(given)
    if weight is None or weight.dim() != 2 or (given is not None and bias is None) or step.attributes.get("transA", 0):
        return None
    if weight.dtype not in _FLOATS:
        return None
    weight = weight if step.attributes.get("transB", 0) else weight.t()
    alpha, beta = step.attributes.get("alpha", 1.0), step.attributes.get("beta", 1.0)
    weight = weight if alpha == 1 else weight * alpha
    if bias is not None:
        if bias.numel() not in (1, weight.shape[0]) or (bias.dim() > 1 and bias.shape[0] != 1) or bias.dim() > 2:
            return None
        bias = (bias if beta == 1 else bias * beta).reshape(-1).expand(weight.shape[0])
    return _linear(net, step.name, _node(net, step.inputs[0]), weight, bias)


def _matmul(net: Converter, step: Step, node: Any) -> fx.Node | None:
    """A product with a weight is a Linear layer, together with the sum behind it that adds a bias."""
    weight, x = _weight(step.inputs[1]), step.inputs[0]
    if weight is None or weight.dim() != 2 or x is None or (x.rank or 0) < 2 or weight.dtype not in _FLOATS:
        return None
    bias = None
    users = net.consumers.get(step.outputs[0], [])
    alone = len(users) == 1 and step.outputs[0] not in net.results and any(node is one for one in net.main)
    if alone and users[0].op_type == "Add" and not users[0].domain:
        other = [name for name in users[0].input if name != step.outputs[0]]
        found = net.weights.get(other[0]) if other else None
        if found is not None and list(found.dims) == [weight.shape[1]] and found.data_type == 1:
            from kindling.formats.onnx.proto import tensor

            bias = tensor(found, net.folder, net.what)
    made = _linear(net, step.name, net.read(x), weight.t(), bias)
    if bias is not None:
        probes = tuple(torch.matmul(one, weight.to("meta")) if isinstance(one, Tensor) else one for one in _meta(x))
        net.fused[id(users[0])] = Value(users[0].output[0], made, probes=probes)
    return made


def _meta(value: Value) -> tuple[Any, ...]:
    return tuple(one.to("meta") if isinstance(one, Tensor) else one for one in value.probes)


def _batch_norm(net: Converter, step: Step) -> fx.Node | None:
    tensors = [_weight(value) for value in step.inputs[1:5]]
    rank = _rank(step)
    if any(tensor is None for tensor in tensors) or rank not in _NORM or step.attributes.get("training_mode", 0):
        return None
    scale, bias, mean, var = tensors
    assert scale is not None
    if scale.dtype not in _FLOATS or not step.attributes.get("spatial", 1):
        return None
    eps, momentum = step.attributes.get("epsilon", 1e-5), step.attributes.get("momentum", 0.9)
    layer = _filled(
        lambda: _NORM[rank](scale.shape[0], eps, round(1 - momentum, 6)),
        weight=scale,
        bias=bias,
        running_mean=mean,
        running_var=var,
    )
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _instance_norm(net: Converter, step: Step) -> fx.Node | None:
    scale, bias = (_weight(value) for value in step.inputs[1:3])
    rank = _rank(step)
    if scale is None or bias is None or rank not in _INSTANCE:
        return None
    eps = step.attributes.get("epsilon", 1e-5)
    layer = _filled(lambda: _INSTANCE[rank](scale.shape[0], eps, affine=True), weight=scale, bias=bias)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _layer_norm(net: Converter, step: Step) -> fx.Node | None:
    scale = _weight(step.inputs[1])
    given = step.inputs[2] if len(step.inputs) > 2 else None
    bias, rank = _weight(given), _rank(step)
    if scale is None or rank < 0 or (given is not None and bias is None) or scale.dtype not in _FLOATS:
        return None
    axis = step.attributes.get("axis", -1)
    axis = axis + rank if axis < 0 else axis
    if scale.dim() != rank - axis or 1 in scale.shape or (bias is not None and bias.shape != scale.shape):
        return None
    eps = step.attributes.get("epsilon", 1e-5)
    layer = _filled(lambda: nn.LayerNorm(tuple(scale.shape), eps, bias=bias is not None), weight=scale, bias=bias)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _group_norm(net: Converter, step: Step) -> fx.Node | None:
    scale, bias = (_weight(value) for value in step.inputs[1:3])
    if step.opset < 21 or scale is None or bias is None:
        return None
    eps = step.attributes.get("epsilon", 1e-5)
    layer = _filled(lambda: nn.GroupNorm(step.attributes["num_groups"], scale.shape[0], eps), weight=scale, bias=bias)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _prelu(net: Converter, step: Step) -> fx.Node | None:
    slope, rank = _weight(step.inputs[1]), _rank(step)
    if slope is None or slope.dim() > rank:
        return None
    if slope.numel() > 1 and [k for k, size in enumerate(slope.shape) if size > 1] != [slope.dim() - rank + 1]:
        return None
    layer = _filled(lambda: nn.PReLU(slope.numel()), weight=slope.reshape(-1))
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _gather(net: Converter, step: Step) -> fx.Node | None:
    table = _weight(step.inputs[0])
    if table is None or table.dim() != 2 or step.attributes.get("axis", 0) or table.numel() <= INLINE:
        return None
    layer = _filled(lambda: nn.Embedding(*table.shape), weight=table)
    return net.layer(step.name, layer, _node(net, step.inputs[1]))


# ------------------------------------------------------------------------------------------ layers without weights


def _max_pool(net: Converter, step: Step) -> fx.Node | None:
    kernel = list(step.attributes["kernel_shape"])
    axes = len(kernel)
    windows, padding = _windows(step, axes), _symmetric(step, axes)
    dtype = step.inputs[0].dtype if step.inputs[0] is not None else None
    if axes not in _MAX or windows is None or padding is None or dtype not in _FLOATS:
        return None
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    strides, dilations = windows
    ceil = bool(step.attributes.get("ceil_mode"))
    layer = _MAX[axes](tuple(kernel), tuple(strides), tuple(padding), tuple(dilations), ceil_mode=ceil)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _average_pool(net: Converter, step: Step) -> fx.Node | None:
    kernel = list(step.attributes["kernel_shape"])
    axes = len(kernel)
    windows, padding = _windows(step, axes), _symmetric(step, axes)
    if axes not in _AVERAGE or windows is None or padding is None or any(d != 1 for d in windows[1]):
        return None
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    ceil, include = bool(step.attributes.get("ceil_mode")), bool(step.attributes.get("count_include_pad"))
    if ceil and include:
        return None
    layer = _AVERAGE[axes](tuple(kernel), tuple(windows[0]), tuple(padding), ceil, include)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _global(table: Mapping[int, Any]) -> Emitter:
    def make(net: Converter, step: Step) -> fx.Node | None:
        rank = _rank(step)
        return net.layer(step.name, table[rank](1), _node(net, step.inputs[0])) if rank in table else None

    return make


def _module(build: Callable[[dict[str, Any]], nn.Module | None]) -> Emitter:
    """A layer of one input that its attributes make."""

    def make(net: Converter, step: Step) -> fx.Node | None:
        module = build(step.attributes) if len(step.inputs) == 1 else None
        return None if module is None else net.layer(step.name, module, _node(net, step.inputs[0]))

    return make


def _selu(attributes: dict[str, Any]) -> nn.Module | None:
    alpha, gamma = attributes.get("alpha", 1.6732632), attributes.get("gamma", 1.050701)
    return nn.SELU() if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.050701) < 1e-5 else None


def _hard_sigmoid(attributes: dict[str, Any]) -> nn.Module | None:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return nn.Hardsigmoid() if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5 else None


def _softmax(kind: Callable[[int], nn.Module]) -> Emitter:
    def make(net: Converter, step: Step) -> fx.Node | None:
        rank = _rank(step)
        axis = step.attributes.get("axis", -1 if step.opset >= 13 else 1)
        if rank < 0 or (step.opset < 13 and axis % max(rank, 1) != rank - 1):
            return None
        return net.layer(step.name, kind(axis), _node(net, step.inputs[0]))

    return make


def _clip(net: Converter, step: Step) -> fx.Node | None:
    low, high = step.attributes.get("min"), step.attributes.get("max")
    given = [*step.inputs[1:], None, None][:2]
    if step.inputs[0] is None or step.inputs[0].dtype not in _FLOATS:
        return None
    bounds: list[float | None] = []
    for attribute, value in zip((low, high), given, strict=True):
        if value is not None and (not isinstance(value.const, Tensor) or value.const.numel() != 1):
            return None
        bounds.append(attribute if value is None else float(value.const))
    least, most = bounds
    if least is None or most is None or not least < most:
        return None
    layer = nn.ReLU6() if (least, most) == (0, 6) else nn.Hardtanh(least, most)
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


def _dropout(net: Converter, step: Step) -> fx.Node | None:
    if len(step.inputs) > 2:
        return None
    rate = step.attributes.get("ratio", 0.5)
    if len(step.inputs) == 2:
        given = step.inputs[1]
        if given is None or not isinstance(given.const, Tensor) or given.const.numel() != 1:
            return None
        rate = float(given.const)
    if not 0 <= rate <= 1:
        return None
    return net.layer(step.name, nn.Dropout(rate), _node(net, step.inputs[0]))


def _lrn(net: Converter, step: Step) -> fx.Node | None:
    a = step.attributes
    if a["size"] % 2 == 0 or a["size"] < 1:
        return None
    layer = nn.LocalResponseNorm(a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))
    return net.layer(step.name, layer, _node(net, step.inputs[0]))


# --------------------------------------------------------------------------------------------------- functions


def _identity(net: Converter, step: Step) -> fx.Node | None:
    return _node(net, step.inputs[0])


def _unary(function: Any) -> Emitter:
    def make(net: Converter, step: Step) -> fx.Node | None:
        return net.call(step.name, function, _node(net, step.inputs[0])) if len(step.inputs) == 1 else None

    return make


def _binary(function: Any, floats_only: bool = False) -> Emitter:
    """A function of two; a single number is written into the graph."""

    def make(net: Converter, step: Step) -> fx.Node | None:
        a, b = step.inputs
        if a is None or b is None or step.attributes:
            return None
        if a.dtype is None or a.dtype != b.dtype or (floats_only and a.dtype not in _FLOATS):
            return None
        if a.dtype not in (*_FLOATS, torch.int64, torch.int32):
            return None
        return net.call(step.name, function, _argument(net, a, b), _argument(net, b, a))

    return make


def _argument(net: Converter, value: Value, other: Value) -> Any:
    tensor = value.const
    if isinstance(tensor, Tensor) and tensor.numel() == 1 and not other.is_const and (other.rank or 0) >= tensor.dim():
        return tensor.item()
    return net.read(value)


def _concat(net: Converter, step: Step) -> fx.Node | None:
    axis = step.attributes.get("axis", 1)
    return net.call(step.name, torch.cat, [_node(net, value) for value in step.inputs], axis)


def _transpose(net: Converter, step: Step) -> fx.Node | None:
    rank = _rank(step)
    perm = step.attributes.get("perm") or (tuple(reversed(range(rank))) if rank >= 0 else None)
    return None if perm is None else net.call(step.name, torch.permute, _node(net, step.inputs[0]), tuple(perm))


def _flatten(net: Converter, step: Step) -> fx.Node | None:
    rank = _rank(step)
    if rank < 2 or step.attributes.get("axis", 1) % rank != 1:
        return None
    return net.call(step.name, torch.flatten, _node(net, step.inputs[0]), 1)


def _reshape(net: Converter, step: Step) -> fx.Node | None:
    """Sizes that follow the batch are written as 0 (as it was) or -1 (what is left)."""
    x, given = step.inputs[0], step.inputs[1] if len(step.inputs) > 1 else None
    sizes = _ints(given) if given is not None else list(step.attributes.get("shape", ())) or None
    if sizes is None and given is not None and x is not None and not step.attributes.get("allowzero"):
        sizes = _follows(x, given)
    if sizes is None or x is None:
        return None
    shapes = [one.shape for one in x.probes if isinstance(one, Tensor)]
    if len(sizes) == 2 and sizes[1] == -1 and sizes[0] == 0 and shapes and len(shapes[0]) > 1:
        return net.call(step.name, torch.flatten, net.read(x), 1)
    fixed = {tuple(shape[1:]) for shape in shapes}
    if len(sizes) == 2 and sizes[0] == -1 and len(fixed) == 1 and len(shapes) > 1 and len(shapes[0]) > 1:
        if torch.Size(fixed.pop()).numel() == sizes[1]:
            return net.call(step.name, torch.flatten, net.read(x), 1)
    attributes = tuple((k, v) for k, v in step.attributes.items() if k == "allowzero")
    layer = OnnxOp("Reshape", step.opset, attributes, (0, -2), (("int64", (len(sizes),), tuple(sizes)),))
    return net.layer(step.name, layer, net.read(x))


def _follows(x: Value, given: Value) -> list[int] | None:
    """The target of a Reshape by sets of sizes, as numbers with 0 and -1; None where it is no such thing."""
    if len(given.probes) < 2 or not all(isinstance(one, Tensor) and one.device.type == "cpu" for one in given.probes):
        return None
    rows = [[int(number) for number in one.reshape(-1).tolist()] for one in given.probes]
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else () for one in x.probes]
    sizes, free = [], 0
    for place, seen in enumerate(zip(*rows, strict=False)):
        if len(set(seen)) == 1:
            sizes.append(seen[0])
        elif all(len(shape) > place and shape[place] == size for shape, size in zip(shapes, seen, strict=True)):
            sizes.append(0)
        else:
            sizes.append(-1)
            free += 1
    return sizes if free + sum(row[0] == -1 for row in zip(*rows, strict=False)) <= 1 and sizes.count(-1) <= 1 else None


def _mean(net: Converter, step: Step) -> fx.Node | None:
    x, given = step.inputs[0], step.inputs[1] if len(step.inputs) > 1 else None
    axes = _ints(given) if given is not None else step.attributes.get("axes")
    if x is None or x.dtype not in _FLOATS or not axes:
        return None
    return net.call(step.name, torch.mean, net.read(x), tuple(axes), bool(step.attributes.get("keepdims", 1)))


def _pad(net: Converter, step: Step) -> fx.Node | None:
    """Padding by nothing, as exporters write it, is nothing."""
    given = step.inputs[1] if len(step.inputs) > 1 else None
    amounts = _ints(given) if given is not None else step.attributes.get("pads")
    return None if amounts is None or any(amounts) else _node(net, step.inputs[0])


def _cast(net: Converter, step: Step) -> fx.Node | None:
    x = step.inputs[0]
    if x is not None and x.dtype is not None and x.dtype == DTYPES.get(step.attributes["to"]):
        return net.read(x)
    return None


_UNARY = ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Sin", "Sqrt")
_SPECIAL: dict[str, Emitter] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "PRelu": _prelu,
    "Gather": _gather,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(_GLOBAL_AVERAGE),
    "GlobalMaxPool": _global(_GLOBAL_MAX),
    "Relu": _module(lambda _a: nn.ReLU()),
    "Sigmoid": _module(lambda _a: nn.Sigmoid()),
    "Tanh": _module(lambda _a: nn.Tanh()),
    "Softsign": _module(lambda _a: nn.Softsign()),
    "Mish": _module(lambda _a: nn.Mish()),
    "HardSwish": _module(lambda _a: nn.Hardswish()),
    "HardSigmoid": _module(_hard_sigmoid),
    "Selu": _module(_selu),
    "Elu": _module(lambda a: nn.ELU(a.get("alpha", 1.0))),
    "LeakyRelu": _module(lambda a: nn.LeakyReLU(a.get("alpha", 0.01))),
    "Gelu": _module(lambda a: nn.GELU(a.get("approximate", "none"))),
    "Softmax": _softmax(nn.Softmax),
    "LogSoftmax": _softmax(nn.LogSoftmax),
    "Clip": _clip,
    "Dropout": _dropout,
    "LRN": _lrn,
    "Identity": _identity,
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _binary(operator.truediv, floats_only=True),
    "Concat": _concat,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "ReduceMean": _mean,
    "Cast": _cast,
    "Pad": _pad,
    **{
        name: _unary(getattr(torch, name.lower())) for name in ("Abs", "Exp", "Log", "Neg", "Sqrt", "Erf", "Sin", "Cos")
    },
}
