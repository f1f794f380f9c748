"""TensorFlow's operations, each as layers and functions of torch, or as numpy where everything is constant.

Formulas follow TensorFlow's documentation of its raw operations. Convolutions and pooling work on channels-first
tensors (`channels.py`); a bias or an addition that follows a convolution alone becomes the layer's own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling.errors import FormatError
from kindling.formats.assemble import ROWS, Wire
from kindling.formats.channels import Flow
from kindling.formats.tensorflow.graphdef import Node, dtype_name, read_tensor
from kindling.formats.tensorflow.run import DEAD, Known, Runner, Scope, Value, open_sizes, split_name
from kindling.nets.layers_keras import Numbers, SameAvgPool, SamePad

MAX_KNOWN = 2**28
"""Numbers that a constant may be made of by computing."""


@dataclass(slots=True)
class Op:
    """One node, and what it is given."""

    runner: Runner
    scope: Scope
    node: Node
    given: list[Value]
    bias: np.ndarray | None = None
    """A bias of the node's own, which TensorFlow Lite knows."""

    @property
    def name(self) -> str:
        return f"{self.scope.prefix}{self.node.name}"

    def fail(self, why: str) -> FormatError:
        return self.node.fail(why)

    def flow(self, place: int) -> Flow:
        """An input that depends on the net's input."""
        value = self._at(place)
        if isinstance(value, Known):
            return Flow(self.numbers(value))
        assert isinstance(value, Flow)
        return value

    def known(self, place: int) -> np.ndarray:
        """An input that is constant."""
        value = self._at(place)
        if not isinstance(value, Known):
            raise self.fail(f"computes its input {place} from the data, where a constant is read")
        return value.value

    def _at(self, place: int) -> Value:
        if place >= len(self.given):
            raise self.fail(f"has {len(self.given)} inputs; number {place} is not there")
        return self.given[place]

    def ints(self, place: int, most: int = 16) -> list[int]:
        """A constant input of few whole numbers."""
        value = self.known(place)
        if value.size > most or value.dtype.kind not in "iu":
            raise self.fail(f"has {value.size} numbers of {value.dtype} as input {place}, where sizes belong")
        return [int(number) for number in value.reshape(-1)]

    @property
    def all_known(self) -> bool:
        return all(isinstance(value, Known) for value in self.given)

    def last(self, flow: Flow) -> Wire:
        return self.runner.mover.last(flow)

    def call(self, function: Callable[..., Any], *args: Any, part: str = "") -> Wire:
        name = f"{self.name}_{part}" if part else self.name
        return self.runner.mover.net.call(name, function, *args)

    def module(
        self, build: Callable[[], nn.Module], *wires: Wire, tensors: dict[str, Tensor] | None = None, part: str = ""
    ) -> Wire:
        name = f"{self.name}_{part}" if part else self.name
        return self.runner.mover.net.layer(name, build, *wires, tensors=tensors or {})

    def numbers(self, known: Known, shape: Sequence[int] | None = None) -> Wire:
        """Constant numbers as a tensor of the graph: a parameter where they were trained."""
        value = np.asarray(known.value)
        if value.dtype.kind != "f":
            raise self.fail(f"puts constants of {value.dtype} among the data, which is not read")
        value = value.reshape(value.shape if shape is None else shape).astype(np.float32)
        name = known.name or f"{self.name}/numbers"
        key = f"{name}:{value.shape}"
        if key not in self.runner.made:
            sizes = tuple(int(size) for size in value.shape)
            self.runner.made[key] = self.runner.mover.net.layer(
                name, lambda: Numbers(sizes, known.trained), tensors={"value": torch.from_numpy(value.copy())}
            )
        wire: Wire = self.runner.made[key]
        return wire

    def follower(self, channels: int) -> tuple[np.ndarray, str] | None:
        """The bias that is added to this node's output and to nothing else; the adding node passes it on."""
        if self.bias is not None:
            if self.bias.shape != (channels,):
                raise self.fail(f"has a bias of shape {self.bias.shape} for {channels} channels")
            return self.bias, ""
        users = self.scope.users.get(self.node.name, [])
        if len(users) != 1 or self.node.name in self.scope.needed:
            return None
        user = users[0]
        if user.op not in ("BiasAdd", "BiasAddV1", "Add", "AddV2") or len(user.inputs) != 2:
            return None
        own = [split_name(source)[0] for source in user.inputs].index(self.node.name)
        if user.op.startswith("Bias") and own == 1:
            return None
        bias = self._constant(split_name(user.inputs[1 - own])[0], 0)
        if bias is None or bias.shape != (channels,) or bias.dtype.kind != "f":
            return None
        return bias, user.name

    def _constant(self, name: str, depth: int) -> np.ndarray | None:
        """A constant that may not have been looked at yet."""
        if name in self.scope.arguments:
            value = self.scope.arguments[name]
            return value.value if isinstance(value, Known) else None
        done = self.scope.values.get(name)
        if done is not None:
            return done[0].value if isinstance(done[0], Known) else None
        node = self.scope.nodes.get(name)
        if node is None or depth > 8:
            return None
        if node.op == "Const":
            return read_tensor(node)
        if node.op in ("Identity", "ReadVariableOp") and node.inputs:
            return self._constant(split_name(node.inputs[0])[0], depth + 1)
        if node.op in ("VarHandleOp", "Variable", "VariableV2"):
            return self.runner.variable(node).value
        return None

    def passes_on(self, bias_of: str) -> None:
        """Say that the node of that name has been done by this one."""
        self.runner.made[f"absorbed:{self.scope.prefix}{bias_of}"] = True


Make = Callable[[Op], "Value | list[Value]"]
OPS: dict[str, Make] = {}


def op(*names: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        for name in names:
            OPS[name] = make
        return make

    return keep


# ------------------------------------------------------------------------------------------ inputs and constants


@op("Const")
def _const(o: Op) -> Value:
    number = o.node.dtype("dtype")
    if dtype_name(number) is None:
        return Known(np.array([], np.float32))  # a text: used by what saves and restores
    value = read_tensor(o.node)
    return Known(value, o.name)


@op("Placeholder")
def _placeholder(o: Op) -> Value:
    return o.runner.feed(o.node)


@op("PlaceholderWithDefault")
def _default(o: Op) -> Value:
    shape = o.node.shape("shape")
    if isinstance(o.given[0], Known) and (shape == [] or o.known(0).ndim == 0):
        return o.given[0]  # a switch such as Keras's learning phase
    return o.runner.feed(o.node)


@op("VarHandleOp", "Variable", "VariableV2")
def _variable(o: Op) -> Value:
    return o.runner.variable(o.node)


@op("ReadVariableOp")
def _read(o: Op) -> Value:
    value = o.given[0]
    if isinstance(value, Known):
        return replace(value, trained=True)
    return value


@op("Identity")
def _identity(o: Op) -> Value:
    value = o.given[0]
    if isinstance(value, Known) and o.node.name.endswith("/read"):  # how a frozen graph names its variables
        return replace(value, trained=value.value.dtype.kind == "f")
    return value


@op("StopGradient", "Snapshot", "PreventGradient", "CheckNumerics", "IdentityN", "EnsureShape")
def _same(o: Op) -> Value:
    return list(o.given) if o.node.op == "IdentityN" else o.given[0]  # type: ignore[return-value]


@op("NoOp", "Assert")
def _nothing(o: Op) -> Value:
    return DEAD


@op("Switch", "RefSwitch")
def _switch(o: Op) -> list[Value]:
    on = bool(o.known(1).reshape(-1)[0]) if o.known(1).size else False
    return [DEAD, o.given[0]] if on else [o.given[0], DEAD]


@op("If", "StatelessIf")
def _if(o: Op) -> list[Value]:
    branch = "then_branch" if bool(o.known(0).reshape(-1)[0]) else "else_branch"
    return o.runner.call(o.node, o.node.function(branch), o.given[1:], f"{o.name}/")


# --------------------------------------------------------------------------------------------------- convolutions


def axes_of(o: Op, values: Sequence[int], first: bool) -> tuple[int, ...]:
    """Numbers of the two axes of a picture, of four."""
    if len(values) != 4 or any(not 0 < value <= 2**16 for value in values):
        raise o.fail(f"has {list(values)[:8]} where four positive numbers belong")
    batch, channel = values[0], values[1 if first else 3]
    if batch != 1 or channel != 1:
        raise o.fail(f"has {list(values)}, which reach over the batch or the channels")
    return tuple(values[2:]) if first else tuple(values[1:3])


def _layout(o: Op) -> bool:
    """Whether channels come first."""
    layout = o.node.text("data_format", "NHWC")
    if layout not in ("NHWC", "NCHW"):
        raise o.fail(f"is in the layout {layout[:20]!r}; NHWC and NCHW are read")
    return layout == "NCHW"


def _picture(o: Op, flow: Flow, first: bool) -> Wire:
    if flow.rank != 4:
        raise o.fail(f"works on pictures, and is given rows of shape {flow.row}")
    return o.last(flow) if first else o.runner.mover.first(flow)


def padded(
    o: Op, wire: Wire, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], first: bool, value: float
) -> tuple[Wire, tuple[int, ...]]:
    padding = o.node.text("padding", "VALID")
    none = (0,) * len(kernel)
    if padding == "VALID":
        return wire, none
    if padding == "EXPLICIT":
        given = o.node.wholes("explicit_paddings")
        if len(given) != 8 or not all(0 <= size < 2**20 for size in given):
            raise o.fail(f"has explicit_paddings {given[:8]}")
        top, down, left, right = given[4:] if first else given[2:6]
        if (top, left) == (down, right) and value == 0:
            return wire, (top, left)
        return o.call(F.pad, wire, (left, right, top, down), "constant", value, part="pad"), none
    if padding != "SAME":
        raise o.fail(f"has padding {padding[:20]!r}; SAME, VALID and EXPLICIT are read")
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if not any(reach):
        return wire, none
    if all(step == 1 for step in stride) and not any(part % 2 for part in reach):
        return wire, tuple(part // 2 for part in reach)
    steps = tuple(dilation) if any(part > 1 for part in dilation) else None
    return o.module(lambda: SamePad(tuple(kernel), tuple(stride), steps, value), wire, part="pad"), none


def copied(value: np.ndarray, *order: int) -> Tensor:
    """Numbers as float32 in memory of their own, copied once, with their axes in an order if one is given."""
    turned = value.transpose(order) if order else value
    if not turned.flags.writeable or min(turned.strides, default=0) < 0 or turned.dtype.kind not in "fi":
        return torch.from_numpy(np.array(turned, np.float32, order="C"))
    # torch turns large matrices block by block, which numpy does not. They may be anywhere in the file: processors
    # that torch runs on read numbers at any place.
    return torch.empty(turned.shape).copy_(torch.from_numpy(turned))


def _biased(o: Op, channels: int, tensors: dict[str, Tensor]) -> bool:
    found = o.follower(channels)
    if found is None:
        return False
    tensors["bias"] = copied(found[0])
    o.passes_on(found[1])
    return True


@op("Conv2D", "DepthwiseConv2dNative")
def _conv(o: Op) -> Value:
    first = _layout(o)
    flow, kernel = o.flow(0), o.known(1)
    wire = _picture(o, flow, first)
    if kernel.ndim != 4 or kernel.dtype.kind != "f" or not kernel.size:
        raise o.fail(f"has a kernel of shape {kernel.shape}")
    stride = axes_of(o, o.node.wholes("strides"), first)
    dilation = axes_of(o, o.node.wholes("dilations") or [1, 1, 1, 1], first)
    size, channels = kernel.shape[:2], wire.row[0]
    groups = 1
    if o.node.op == "DepthwiseConv2dNative":
        groups, out = kernel.shape[2], kernel.shape[2] * kernel.shape[3]
        weight = copied(kernel, 2, 3, 0, 1).reshape(out, 1, *size)
    else:
        weight = copied(kernel, 3, 2, 0, 1)
        out = kernel.shape[3]
        if channels % kernel.shape[2] == 0 and kernel.shape[2]:
            groups = channels // kernel.shape[2]
    wire, pad = padded(o, wire, size, stride, dilation, first, 0.0)
    tensors = {"weight": weight}
    bias = _biased(o, out, tensors)
    made = o.module(
        lambda: nn.Conv2d(channels, out, size, stride, pad, dilation, groups, bias),  # type: ignore[arg-type]
        wire,
        tensors=tensors,
    )
    return Flow(made, not first)


@op("Conv2DBackpropInput")
def _transposed(o: Op) -> Value:
    """A transposed convolution: the size that it gives is an input."""
    first = _layout(o)
    sizes, kernel, flow = o.ints(0), o.known(1), o.flow(2)
    wire = _picture(o, flow, first)
    if kernel.ndim != 4 or len(sizes) != 4:
        raise o.fail(f"has a kernel of shape {kernel.shape} and gives {sizes}")
    stride = axes_of(o, o.node.wholes("strides"), first)
    if axes_of(o, o.node.wholes("dilations") or [1, 1, 1, 1], first) != (1, 1):
        raise o.fail("is dilated, which is not read")
    wanted = sizes[2:] if first else sizes[1:3]
    size, out, channels = kernel.shape[:2], kernel.shape[2], wire.row[0]
    full = [(n - 1) * s + k for n, s, k in zip(wire.row[1:], stride, size, strict=True)]
    same = o.node.text("padding", "VALID") == "SAME"
    over = [
        max((n - 1) * s + k - want, 0) if same else 0
        for n, s, k, want in zip(wire.row[1:], stride, size, wanted, strict=True)
    ]
    tensors = {"weight": copied(kernel, 3, 2, 0, 1)}
    bias = _biased(o, out, tensors)
    frame: list[int] = []
    for total, reach, want in zip(over, full, wanted, strict=True):
        before = total // 2
        frame = [-before, want - (reach - before), *frame]
    plain = not any(frame)
    made = o.module(
        lambda: nn.ConvTranspose2d(channels, out, size, stride, bias=bias and plain),  # type: ignore[arg-type]
        wire,
        tensors=tensors if plain else {"weight": tensors["weight"]},
        part="" if plain else "full",
    )
    if not plain:
        made = o.call(F.pad, made, tuple(frame), part="cut" if bias else "")
        if bias:
            made = o.call(
                operator.add, made, o.numbers(Known(tensors["bias"].numpy(), f"{o.name}/bias", True), (out, 1, 1))
            )
    return Flow(made, not first)


@op("BiasAdd", "BiasAddV1")
def _bias(o: Op) -> Value:
    if f"absorbed:{o.name}" in o.runner.made:
        return o.given[0] if isinstance(o.given[0], Flow) else o.given[1]
    if o.all_known:
        return Known(o.known(0) + o.known(1))
    flow, bias = o.flow(0), o.given[1]
    if not isinstance(bias, Known) or bias.value.ndim != 1:
        raise o.fail("adds a bias that is no constant")
    if _layout(o) and flow.rank > 2:
        return Flow(o.call(operator.add, o.last(flow), o.numbers(bias, (-1, *(1,) * (flow.rank - 2)))))
    return _elementwise(o, operator.add, flow, bias, False)


@op("MatMul")
def _matmul(o: Op) -> Value:
    if o.all_known:
        left, right = (o.known(k).T if o.node.flag(f"transpose_{'ab'[k]}") else o.known(k) for k in (0, 1))
        return Known(left @ right)
    if isinstance(o.given[1], Known) and not o.node.flag("transpose_a"):
        flow, weight = o.flow(0), o.known(1)
        weight = weight if o.node.flag("transpose_b") else weight.T
        if flow.rank != 2 or weight.ndim != 2:
            raise o.fail(f"multiplies rows of shape {flow.row} by {weight.shape}")
        out, features = weight.shape
        tensors = {"weight": copied(weight)}
        bias = _biased(o, out, tensors)
        return Flow(o.module(lambda: nn.Linear(features, out, bias), flow.wire, tensors=tensors))
    wires = [o.last(o.flow(k)) for k in (0, 1)]
    for k in (0, 1):
        if o.node.flag(f"transpose_{'ab'[k]}"):
            wires[k] = o.call(torch.transpose, wires[k], 0, 1, part="ab"[k])
    return Flow(o.call(torch.matmul, *wires))


@op("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(o: Op) -> Value:
    wires = [o.last(o.flow(k)) for k in (0, 1)]
    for k, key in enumerate(("adj_x", "adj_y")):
        if o.node.flag(key):
            wires[k] = o.call(torch.transpose, wires[k], -2, -1, part="xy"[k])
    return Flow(o.call(torch.matmul, *wires))


@op("MaxPool", "MaxPoolV2", "AvgPool")
def _pool(o: Op) -> Value:
    first = _layout(o)
    kernel = axes_of(o, o.node.wholes("ksize"), first)
    stride = axes_of(o, o.node.wholes("strides"), first)
    wire = _picture(o, o.flow(0), first)
    if o.node.op == "AvgPool":
        if o.node.text("padding", "VALID") == "SAME" and kernel != (1, 1):
            return Flow(o.module(lambda: SameAvgPool(kernel, stride), wire), not first)
        return Flow(o.module(lambda: nn.AvgPool2d(kernel, stride), wire), not first)  # type: ignore[arg-type]
    wire, pad = padded(o, wire, kernel, stride, (1, 1), first, -math.inf)
    return Flow(o.module(lambda: nn.MaxPool2d(kernel, stride, pad), wire), not first)


@op("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
def _batch_norm(o: Op) -> list[Value]:
    if o.node.flag("is_training", True):
        raise o.fail("takes the batch's own statistics: this is a graph for training. Freeze it for inference")
    first = _layout(o)
    wire = _picture(o, o.flow(0), first)
    count, eps = wire.row[0], o.node.number("epsilon", 1e-4)
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: copied(o.known(place)) for place, name in enumerate(names, 1)}
    made = o.module(lambda: nn.BatchNorm2d(count, eps), wire, tensors=tensors)
    return [Flow(made, not first), *(o.given[3:5])]


@op("LRN")
def _lrn(o: Op) -> Value:
    """x / (bias + alpha * sum of squares) ** beta; torch's layer divides alpha by the size."""
    radius = o.node.whole("depth_radius", 5)
    if not 0 <= radius < 2**16:
        raise o.fail(f"has depth_radius {radius}")
    size = 2 * radius + 1
    alpha, beta, bias = (o.node.number(key, default) for key, default in (("alpha", 1.0), ("beta", 0.5), ("bias", 1.0)))
    wire = _picture(o, o.flow(0), False)
    return Flow(o.module(lambda: nn.LocalResponseNorm(size, alpha * size, beta, bias), wire), True)


# ----------------------------------------------------------------------------------------------------- elementwise

_UNARY: dict[str, tuple[Callable[..., Any] | type[nn.Module], Callable[..., Any] | None]] = {
    "Abs": (torch.abs, np.abs),
    "Ceil": (torch.ceil, np.ceil),
    "Cos": (torch.cos, np.cos),
    "Elu": (nn.ELU, None),
    "Erf": (torch.erf, None),
    "Exp": (torch.exp, np.exp),
    "Expm1": (torch.expm1, np.expm1),
    "Floor": (torch.floor, np.floor),
    "Inv": (torch.reciprocal, np.reciprocal),
    "Log": (torch.log, np.log),
    "Log1p": (torch.log1p, np.log1p),
    "LogSoftmax": (nn.LogSoftmax, None),
    "LogicalNot": (torch.logical_not, np.logical_not),
    "Neg": (operator.neg, np.negative),
    "Reciprocal": (torch.reciprocal, np.reciprocal),
    "Relu": (nn.ReLU, lambda x: np.maximum(x, 0)),
    "Relu6": (nn.ReLU6, lambda x: np.clip(x, 0, 6)),
    "Round": (torch.round, np.round),
    "Rsqrt": (torch.rsqrt, lambda x: 1 / np.sqrt(x)),
    "Selu": (nn.SELU, None),
    "Sigmoid": (nn.Sigmoid, None),
    "Sign": (torch.sign, np.sign),
    "Sin": (torch.sin, np.sin),
    "Softplus": (nn.Softplus, None),
    "Softsign": (nn.Softsign, None),
    "Sqrt": (torch.sqrt, np.sqrt),
    "Square": (torch.square, np.square),
    "Tanh": (nn.Tanh, np.tanh),
}


def _unary(o: Op) -> Value:
    function, constant = _UNARY[o.node.op]
    if isinstance(o.given[0], Known) and constant is not None:
        with np.errstate(all="ignore"):
            return replace(o.given[0], value=np.asarray(constant(o.given[0].value)), name="")
    flow = replace(o.flow(0), scores=None)
    if not isinstance(function, type):
        return replace(flow, wire=o.call(function, flow.wire))
    build: Any = function
    if function is nn.LogSoftmax:
        axis = flow.axis(-1)
        return replace(flow, wire=o.module(lambda: build(axis), flow.wire))
    out = replace(flow, wire=o.module(build, flow.wire))
    if function is nn.Sigmoid and flow.row == (1,):
        out = replace(out, scores=flow.wire)
    return out


for _name in _UNARY:
    OPS[_name] = _unary


@op("Softmax")
def _softmax(o: Op) -> Value:
    flow = o.flow(0)
    axis = flow.axis(-1)
    made = o.module(lambda: nn.Softmax(axis), flow.wire)
    return replace(flow, wire=made, scores=flow.wire if flow.rank == 2 else None)


@op("LeakyRelu")
def _leaky(o: Op) -> Value:
    slope = o.node.number("alpha", 0.2)
    flow = replace(o.flow(0), scores=None)
    return replace(flow, wire=o.module(lambda: nn.LeakyReLU(slope), flow.wire))


_BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Add": (operator.add, np.add),
    "AddV2": (operator.add, np.add),
    "Sub": (operator.sub, np.subtract),
    "Mul": (operator.mul, np.multiply),
    "RealDiv": (operator.truediv, np.true_divide),
    "Div": (operator.truediv, lambda a, b: a // b if a.dtype.kind in "iu" else a / b),
    "FloorDiv": (operator.floordiv, np.floor_divide),
    "FloorMod": (operator.mod, np.mod),
    "Maximum": (torch.maximum, np.maximum),
    "Minimum": (torch.minimum, np.minimum),
    "Pow": (operator.pow, np.power),
    "Greater": (operator.gt, np.greater),
    "GreaterEqual": (operator.ge, np.greater_equal),
    "Less": (operator.lt, np.less),
    "LessEqual": (operator.le, np.less_equal),
    "Equal": (operator.eq, np.equal),
    "NotEqual": (operator.ne, np.not_equal),
    "LogicalAnd": (torch.logical_and, np.logical_and),
    "LogicalOr": (torch.logical_or, np.logical_or),
}


def _binary(o: Op) -> Value:
    if f"absorbed:{o.name}" in o.runner.made:
        return o.given[0] if isinstance(o.given[0], Flow) else o.given[1]
    function, constant = _BINARY[o.node.op]
    left, right = o._at(0), o._at(1)
    if isinstance(left, Known) and isinstance(right, Known):
        shape = np.broadcast_shapes(left.value.shape, right.value.shape)
        if math.prod(shape) > MAX_KNOWN:
            raise o.fail(f"makes a constant of shape {shape}, which is refused")
        with np.errstate(all="ignore"):
            value = np.asarray(constant(left.value, right.value))
            return Known(value, "", (left.trained or right.trained) and value.dtype.kind == "f")
    if isinstance(left, Flow) and isinstance(right, Flow):
        return _between(o, function, left, right)
    if isinstance(left, Flow):
        assert isinstance(right, Known)
        return _elementwise(o, function, left, right, False)
    assert isinstance(right, Flow)
    assert isinstance(left, Known)
    return _elementwise(o, function, right, left, True)


for _name in _BINARY:
    OPS[_name] = _binary


def _between(o: Op, function: Callable[..., Any], left: Flow, right: Flow) -> Flow:
    if left.rank == right.rank and left.moved != right.moved and left.rank > 2:
        first = o.runner.mover.first
        return Flow(o.call(function, first(left), first(right)), True)
    if left.moved and right.moved and left.rank == right.rank:
        return Flow(o.call(function, left.wire, right.wire), True)
    return Flow(o.call(function, o.last(left), o.last(right)))


def _elementwise(o: Op, function: Callable[..., Any], flow: Flow, known: Known, turned: bool) -> Flow:
    """A tensor and constants: one number, or a number a channel, or any shape that broadcasts."""
    value = known.value
    if value.size == 1 and value.ndim <= flow.rank and not known.trained:
        number = value.reshape(-1)[0].item()
        if not isinstance(number, int | float) or (isinstance(number, float) and not math.isfinite(number)):
            raise o.fail(f"computes with {number}, which is not read")
        if function in (torch.maximum, torch.minimum):
            function = torch.clamp_min if function is torch.maximum else torch.clamp_max
            turned = False
        pair: list[Any] = [number, flow.wire] if turned else [flow.wire, number]
        return Flow(o.call(function, *pair), flow.moved)
    shape = value.shape
    if flow.moved and len(shape) <= 1:
        wire, other = flow.wire, o.numbers(known, (*shape, *(1,) * (flow.rank - 2)))
    else:
        flow = o.runner.mover.plain(flow)
        wire, other = flow.wire, o.numbers(known)
    pair = [other, wire] if turned else [wire, other]
    return Flow(o.call(function, *pair), flow.moved)


@op("AddN")
def _add_n(o: Op) -> Value:
    total = o.flow(0)
    for place in range(1, len(o.given)):
        total = _between(o, operator.add, total, o.flow(place))
    return total


@op("SquaredDifference")
def _squared_difference(o: Op) -> Value:
    left, right = o.given
    if isinstance(left, Known) and isinstance(right, Known):
        return Known(np.square(left.value - right.value))
    gap = (
        _between(o, operator.sub, left, right)
        if isinstance(left, Flow) and isinstance(right, Flow)
        else _elementwise(o, operator.sub, o.flow(0), right, False)  # type: ignore[arg-type]
    )
    return replace(gap, wire=o.call(torch.square, gap.wire))


@op("Select", "SelectV2")
def _select(o: Op) -> Value:
    """Numbers of one tensor where a condition holds, else of another."""
    if o.all_known:
        return Known(np.where(*(o.known(place) for place in range(3))))
    flows = [value for value in o.given if isinstance(value, Flow)]
    rank = max(flow.rank for flow in flows)
    moved = all(flow.moved for flow in flows) and len({flow.rank for flow in flows}) == 1
    parts: list[Any] = []
    for place, value in enumerate(o.given):
        if isinstance(value, Flow):
            parts.append(value.wire if moved else o.last(value))
        elif isinstance(value, Known) and value.value.size == 1 and place:
            parts.append(value.value.reshape(-1)[0].item())
        elif isinstance(value, Known) and place and value.value.ndim <= 1:
            shape = (-1, *(1,) * (rank - 2)) if moved else None
            parts.append(o.numbers(value, shape))
        else:
            raise o.fail("chooses by a constant, or among constants of several axes, which is not read")
    return Flow(o.call(torch.where, *parts), moved)


@op("Cast")
def _cast(o: Op) -> Value:
    name = dtype_name(o.node.dtype("DstT"))
    if name is None:
        raise o.fail("casts to a type that is not read")
    if isinstance(o.given[0], Known):
        with np.errstate(all="ignore"):
            return Known(o.known(0).astype("float32" if name == "float16" else name))
    flow = o.flow(0)
    if name in ("float32", "float64", "float16"):
        return flow if flow.wire.value.dtype == torch.float32 else _as(o, flow, "float")
    if name in ("int32", "int64"):
        return _as(o, flow, "long")
    if name == "bool":
        return _as(o, flow, "bool")
    raise o.fail(f"casts data to {name}, which is not read")


def _as(o: Op, flow: Flow, method: str) -> Flow:
    return replace(flow, wire=o.runner.mover.net.method(o.name, method, flow.wire), scores=None)


# ---------------------------------------------------------------------------------------------------------- shapes


@op("Shape", "ShapeN")
def _shape(o: Op) -> Value | list[Value]:
    dtype = "int64" if o.node.dtype("out_type") == 9 else "int32"
    found: list[Value] = []
    for value in o.given:
        shape = value.value.shape if isinstance(value, Known) else value.shape  # type: ignore[union-attr]
        found.append(Known(np.array(shape, dtype)))
    return found


@op("Rank")
def _rank(o: Op) -> Value:
    value = o.given[0]
    return Known(np.array(value.value.ndim if isinstance(value, Known) else value.rank, np.int32))  # type: ignore[union-attr]


@op("Size")
def _size(o: Op) -> Value:
    value = o.given[0]
    return Known(np.array(value.value.size if isinstance(value, Known) else math.prod(value.shape), np.int32))  # type: ignore[union-attr]


@op("Reshape")
def _reshape(o: Op) -> Value:
    sizes = o.ints(1)
    if any(not -1 <= size < 2**40 for size in sizes) or sizes.count(-1) > 1:
        raise o.fail(f"makes the shape {sizes}")
    if isinstance(o.given[0], Known):
        try:
            return replace(o.given[0], value=o.known(0).reshape(sizes))
        except ValueError as error:
            raise o.fail(f"makes the shape {sizes} of {o.known(0).shape}") from error
    flow = o.flow(0)
    wire = o.last(flow)
    full = math.prod(int(size) for size in wire.value.shape)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if known == 0 or full % known:
            raise o.fail(f"makes the shape {sizes} of rows of shape {flow.row}")
        sizes = [full // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != full and sizes and sizes[0] in o.runner.batches:  # a graph made for one batch
        sizes = [ROWS, *sizes[1:]]
    if math.prod(sizes) != full:
        raise o.fail(f"makes the shape {sizes} of rows of shape {flow.row}")
    if tuple(sizes) == tuple(wire.value.shape):
        return replace(flow, wire=wire, moved=False)
    return Flow(o.runner.mover.net.method(o.name, "reshape", wire, *open_sizes(sizes)))


@op("Squeeze")
def _squeeze(o: Op) -> Value:
    axes = o.node.wholes("squeeze_dims") or o.node.wholes("axis")
    value = o.given[0]
    shape = value.value.shape if isinstance(value, Known) else value.shape  # type: ignore[union-attr]
    rank = len(shape)
    if not all(-rank <= axis < rank for axis in axes):
        raise o.fail(f"takes out axes {axes[:8]} of {rank}")
    chosen = sorted({axis % rank for axis in axes}) or [axis for axis in range(rank) if shape[axis] == 1]
    if any(shape[axis] != 1 for axis in chosen):
        raise o.fail(f"takes out axes {chosen} of rows of shape {tuple(shape[1:])}")
    if isinstance(value, Known):
        return replace(value, value=value.value.squeeze(tuple(chosen)))
    left = [size for axis, size in enumerate(shape) if axis not in chosen]
    return Flow(o.runner.mover.net.method(o.name, "reshape", o.last(o.flow(0)), *open_sizes(left)))


@op("ExpandDims")
def _expand(o: Op) -> Value:
    (axis,) = o.ints(1, 1) or [0]
    value = o.given[0]
    rank = value.value.ndim if isinstance(value, Known) else value.rank  # type: ignore[union-attr]
    if not -rank - 1 <= axis <= rank or (isinstance(value, Flow) and axis % (rank + 1) == 0):
        raise o.fail(f"adds an axis at {axis} of {rank}")
    if isinstance(value, Known):
        return replace(value, value=np.expand_dims(value.value, axis))
    return Flow(o.call(torch.unsqueeze, o.last(o.flow(0)), axis))


@op("Transpose")
def _transpose(o: Op) -> Value:
    order = o.ints(1)
    value = o.given[0]
    rank = value.value.ndim if isinstance(value, Known) else value.rank  # type: ignore[union-attr]
    if sorted(order) != list(range(rank)):
        raise o.fail(f"has the order {order} for {rank} axes")
    if isinstance(value, Known):
        return replace(value, value=value.value.transpose(order))
    return Flow(o.call(torch.permute, o.last(o.flow(0)), tuple(order)))


@op("Pad", "PadV2", "MirrorPad")
def _pad(o: Op) -> Value:
    flow, frame = o.flow(0), o.known(1)
    if frame.shape != (flow.rank, 2) or frame[0].any() or frame.min() < 0 or frame.max() >= 2**20:
        raise o.fail(f"pads rows of shape {flow.row} by {frame.tolist()[:8]}")
    value = float(o.known(2).reshape(-1)[0]) if o.node.op == "PadV2" else 0.0
    order = [flow.axis(axis) for axis in range(flow.rank)]
    by_axis = {own: frame[axis] for axis, own in enumerate(order)}
    flat = tuple(int(size) for axis in reversed(range(1, flow.rank)) for size in by_axis[axis])
    if o.node.op == "MirrorPad":
        mode = o.node.text("mode", "REFLECT")
        if mode != "REFLECT" or flow.rank != 4 or not flow.moved or any(by_axis[1]):
            raise o.fail(f"mirrors by {mode[:20]!r}; pictures by REFLECT are read")
        return Flow(o.call(F.pad, flow.wire, flat[:4], "reflect"), True)
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    return Flow(o.call(F.pad, flow.wire, flat, "constant", value), flow.moved)


@op("Pack")
def _pack(o: Op) -> Value:
    axis = o.node.whole("axis")
    if o.all_known:
        try:
            return Known(np.stack([o.known(place) for place in range(len(o.given))], axis))
        except ValueError as error:
            raise o.fail("stacks constants of different shapes") from error
    return Flow(o.call(torch.stack, [o.last(o.flow(place)) for place in range(len(o.given))], axis))


@op("Unpack")
def _unpack(o: Op) -> list[Value]:
    axis, count = o.node.whole("axis"), o.node.whole("num")
    value = o.given[0]
    if isinstance(value, Known):
        parts = np.moveaxis(value.value, axis, 0) if value.value.ndim else value.value
        return [Known(part) for part in parts[:10_000]]
    wire = o.last(o.flow(0))
    if not -wire.rank <= axis < wire.rank or axis % wire.rank == 0 or not 0 < count <= 1000:
        raise o.fail(f"takes axis {axis} apart")
    return [Flow(o.call(torch.select, wire, axis, place, part=str(place))) for place in range(count)]


@op("ConcatV2", "Concat")
def _concat(o: Op) -> Value:
    last = o.node.op == "ConcatV2"
    (axis,) = o.ints(len(o.given) - 1 if last else 0, 1) or [0]
    places = range(len(o.given) - 1) if last else range(1, len(o.given))
    if all(isinstance(o.given[place], Known) for place in places):
        try:
            return Known(np.concatenate([np.atleast_1d(o.known(place)) for place in places], axis))
        except ValueError as error:
            raise o.fail("joins constants of different shapes") from error
    flows = [o.flow(place) for place in places]
    rank = flows[0].rank
    if not -rank <= axis < rank or axis % rank == 0 or any(flow.rank != rank for flow in flows):
        raise o.fail(f"joins rows of shapes {[flow.row for flow in flows][:8]} along axis {axis}")
    if any(flow.moved for flow in flows):
        wires = [o.runner.mover.first(flow) for flow in flows]
        return Flow(o.call(torch.cat, wires, Flow(wires[0], True).axis(axis)), True)
    return Flow(o.call(torch.cat, [flow.wire for flow in flows], axis))


@op("Split", "SplitV")
def _split(o: Op) -> list[Value]:
    (axis,) = o.ints(0 if o.node.op == "Split" else 2, 1) or [0]
    flow = o.flow(1 if o.node.op == "Split" else 0)
    if not -flow.rank <= axis < flow.rank or axis % flow.rank == 0:
        raise o.fail(f"takes axis {axis} apart")
    length = flow.shape[axis % flow.rank]
    count = o.node.whole("num_split")
    if o.node.op == "Split":
        if not 0 < count <= 1000 or length % count:
            raise o.fail(f"takes {length} apart into {count}")
        sizes = [length // count] * count
    else:
        sizes = o.ints(1, 1000)
    found: list[Value] = []
    start = 0
    for place, size in enumerate(sizes):
        found.append(Flow(o.call(torch.narrow, flow.wire, flow.axis(axis), start, size, part=str(place)), flow.moved))
        start += size
    return found


@op("Slice")
def _slice(o: Op) -> Value:
    begin, size = o.ints(1), o.ints(2)
    value = o.given[0]
    if isinstance(value, Known):
        if len(begin) != value.value.ndim or len(size) != len(begin):
            raise o.fail(f"cuts {begin}, {size} out of {value.value.shape}")
        return replace(value, value=value.value[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(begin, size, strict=True))])  # fmt: skip  # noqa: E501
    wire = o.last(o.flow(0))
    shape = tuple(wire.value.shape)
    if len(begin) != len(shape) or len(size) != len(shape) or begin[0] != 0 or size[0] not in (-1, ROWS):
        raise o.fail(f"cuts {begin}, {size} out of rows of shape {shape[1:]}")
    for axis, (start, length) in enumerate(zip(begin[1:], size[1:], strict=True), 1):
        length = shape[axis] - start if length == -1 else length
        if (start, length) != (0, shape[axis]):
            wire = o.call(torch.narrow, wire, axis, start, length, part=str(axis))
    return Flow(wire)


@op("StridedSlice")
def _strided_slice(o: Op) -> Value:
    begin, end, stride = (o.ints(place) for place in (1, 2, 3))
    masks = {key: o.node.whole(f"{key}_mask") for key in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    if masks["ellipsis"] or masks["new_axis"] or not len(begin) == len(end) == len(stride):
        raise o.fail("slices with an ellipsis or a new axis, which is not read")
    keys: list[Any] = []
    for axis, (start, stop, step) in enumerate(zip(begin, end, stride, strict=True)):
        if masks["shrink_axis"] >> axis & 1:
            keys.append(start)
            continue
        if step == 0:
            raise o.fail("slices by steps of 0")
        keys.append(
            slice(None if masks["begin"] >> axis & 1 else start, None if masks["end"] >> axis & 1 else stop, step)
        )
    value = o.given[0]
    if isinstance(value, Known):
        try:
            return replace(value, value=np.asarray(value.value[tuple(keys)]))
        except IndexError as error:
            raise o.fail(f"slices {value.value.shape} beyond its end") from error
    wire = o.last(o.flow(0))
    whole = slice(None, None, None)
    if len(keys) > wire.rank or not keys or isinstance(keys[0], int) or keys[0].step != 1:
        raise o.fail("slices the batch, which is not read")
    keys[0] = whole
    for axis, key in enumerate(keys[1:], 1):
        if isinstance(key, slice) and key.step < 0:
            raise o.fail("slices data backwards, which is not read")
        keys[axis] = key
    return Flow(o.call(operator.getitem, wire, tuple(keys)))


@op("Fill")
def _fill(o: Op) -> Value:
    sizes, value = o.ints(0), o.known(1)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_KNOWN:
        raise o.fail(f"fills the shape {sizes}, which is refused")
    return Known(np.full(sizes, value.reshape(-1)[0]))


@op("ZerosLike", "OnesLike")
def _like(o: Op) -> Value:
    make = np.zeros_like if o.node.op == "ZerosLike" else np.ones_like
    return Known(make(o.known(0)))


@op("Range")
def _range(o: Op) -> Value:
    start, stop, step = (o.known(place).reshape(-1)[0].item() for place in (0, 1, 2))
    if step == 0 or not 0 <= (stop - start) / step <= 10_000:
        raise o.fail(f"counts from {start} to {stop} by {step}, which is refused")
    return Known(np.arange(start, stop, step, dtype=o.known(0).dtype))


@op("Tile")
def _tile(o: Op) -> Value:
    times = o.ints(1)
    value = o.given[0]
    if isinstance(value, Known):
        if math.prod(times) * value.value.size > MAX_KNOWN or any(n < 0 for n in times):
            raise o.fail(f"repeats a constant {times}, which is refused")
        return replace(value, value=np.tile(value.value, times))
    wire = o.last(o.flow(0))
    if len(times) != wire.rank or times[0] != 1 or any(not 0 < n < 2**20 for n in times):
        raise o.fail(f"repeats rows of shape {wire.row} {times}")
    return Flow(o.call(torch.tile, wire, tuple(times)))


# ---------------------------------------------------------------------------------------------------- reductions

_REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Max": (torch.amax, np.max),
    "Mean": (torch.mean, np.mean),
    "Min": (torch.amin, np.min),
    "Prod": (torch.prod, np.prod),
    "Sum": (torch.sum, np.sum),
}


def _reduce(o: Op) -> Value:
    function, constant = _REDUCTIONS[o.node.op]
    axes, keep = o.ints(1), o.node.flag("keep_dims") or o.node.flag("keepdims")
    value = o.given[0]
    rank = value.value.ndim if isinstance(value, Known) else value.rank  # type: ignore[union-attr]
    if not all(-rank <= axis < rank for axis in axes):
        raise o.fail(f"sums over axes {axes[:8]} of {rank}")
    if isinstance(value, Known):
        return Known(np.asarray(constant(value.value, axis=tuple(axes), keepdims=keep)).astype(value.value.dtype))
    flow = o.flow(0)
    if any(axis % rank == 0 for axis in axes):
        raise o.fail("sums over the batch, which is not read. Is it part of the loss? Name the outputs with outputs=")
    if function is torch.prod:
        raise o.fail("multiplies data along an axis, which is not read")
    spatial = sorted(axis % rank for axis in axes) == list(range(1, rank - 1))
    if flow.moved and not keep and not spatial:
        flow = o.runner.mover.plain(flow)
    own = tuple(sorted(flow.axis(axis) for axis in axes))
    return Flow(o.call(function, flow.wire, own, keep), flow.moved and keep)


for _name in _REDUCTIONS:
    OPS[_name] = _reduce


@op("ArgMax")
def _argmax(o: Op) -> Value:
    flow = o.flow(0)
    (axis,) = o.ints(1, 1) or [0]
    if axis % flow.rank == 0:
        raise o.fail("looks for the largest of the batch")
    wire = o.last(flow)
    return Flow(o.call(torch.argmax, wire, axis % flow.rank))


@op("Gather", "GatherV2", "ResourceGather")
def _gather(o: Op) -> Value:
    """Rows of a constant table: an embedding; or entries of a constant."""
    table = o.given[0]
    if o.node.op == "GatherV2" and o.ints(2, 1) not in ([0],):
        raise o.fail("takes from an axis that is not the first, which is not read")
    if not isinstance(table, Known):
        raise o.fail("takes entries of data, which is not read")
    if isinstance(o.given[1], Known):
        try:
            return Known(table.value[o.known(1)])
        except IndexError as error:
            raise o.fail("takes entries that are not there") from error
    if table.value.ndim != 2:
        raise o.fail(f"takes rows of a table of shape {table.value.shape}")
    count, size = table.value.shape
    wire = o.last(o.flow(1))
    if wire.value.dtype != torch.int64:
        wire = o.runner.mover.net.method(f"{o.name}_index", "long", wire)
    return Flow(o.module(lambda: nn.Embedding(count, size), wire, tensors={"weight": copied(table.value)}))


@op("ResizeBilinear", "ResizeNearestNeighbor")
def _resize(o: Op) -> Value:
    wire = _picture(o, o.flow(0), False)
    size = o.ints(1)
    if len(size) != 2 or not all(0 < n < 2**16 for n in size):
        raise o.fail(f"makes pictures of {size}")
    half, corners = o.node.flag("half_pixel_centers"), o.node.flag("align_corners")
    if o.node.op == "ResizeBilinear":
        if not (half or corners):
            raise o.fail("interpolates without half_pixel_centers, which is not read")
        return Flow(o.module(lambda: nn.Upsample((size[0], size[1]), None, "bilinear", corners), wire), True)
    if corners or half or any(want % have for want, have in zip(size, wire.row[1:], strict=True)):
        raise o.fail("takes nearest cells at a factor that is not whole, or by their centres, which is not read")
    return Flow(o.module(lambda: nn.Upsample((size[0], size[1]), None, "nearest"), wire), True)


# ----------------------------------------------------------------------------------------------- initial values


@op("TruncatedNormal", "RandomStandardNormal", "RandomUniform")
def _random(o: Op) -> Value:
    """How a variable without numbers begins; nothing in a net for inference is random."""
    sizes = o.ints(0)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_KNOWN:
        raise o.fail(f"draws the shape {sizes}, which is refused")
    o.runner.draw(o.node, math.prod(sizes))
    out = torch.empty(sizes)
    generator = o.runner.made.setdefault("generator", torch.Generator().manual_seed(0))
    if o.node.op == "RandomUniform":
        out.uniform_(generator=generator)
    elif o.node.op == "TruncatedNormal":
        nn.init.trunc_normal_(out, generator=generator)
    else:
        out.normal_(generator=generator)
    return Known(out.numpy(), f"{o.name}/drawn")
