"""TensorFlow Lite's files in: float and quantised `.tflite`, as ordinary torch graphs.

Weights of whole numbers become floats; every activation that the file keeps as whole numbers is rounded to its steps
and cut to its range, as TensorFlow Lite's own runtime does, so that a quantised net answers as it does there. The
operations are TensorFlow's (`tensorflow/ops.py`), under TensorFlow Lite's names and with its orders of axes.
Source: TensorFlow Lite's schema (`schema.fbs`) and its operators' documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kindling.errors import FormatError
from kindling.formats.assemble import Assembly
from kindling.formats.channels import Flow, Mover
from kindling.formats.ends import imported, open_input
from kindling.formats.files import mapped
from kindling.formats.flatbuffer import Buffer, Table
from kindling.formats.models import Imported, Peek
from kindling.formats.tensorflow.graphdef import Graph, Node
from kindling.formats.tensorflow.ops import OPS, Op, axes_of, copied, padded
from kindling.formats.tensorflow.run import Known, Runner, Scope, Value
from kindling.nets.layers_keras import Quantized
from kindling.nets.layers_lite import LiteConv2d, LiteLinear

NAME = "TensorFlow Lite"
_MAX_BYTES = 8 << 30
_MAX_TENSORS = 20_000

_TYPES = {0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8",
          10: "float64"}  # fmt: skip
_RANGES = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
_FUSED = {0: None, 1: "Relu", 2: "ReluN1To1", 3: "Relu6", 4: "Tanh"}
_NAMES = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE",
    9: "FULLY_CONNECTED", 14: "LOGISTIC", 16: "LSTM", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1",
    21: "RELU6", 22: "RESHAPE", 23: "RESIZE_BILINEAR", 25: "SOFTMAX", 28: "TANH", 32: "CUSTOM", 34: "PAD",
    36: "GATHER", 39: "TRANSPOSE", 40: "MEAN", 41: "SUB", 42: "DIV", 43: "SQUEEZE", 45: "STRIDED_SLICE", 47: "EXP",
    49: "SPLIT", 50: "LOG_SOFTMAX", 53: "CAST", 54: "PRELU", 55: "MAXIMUM", 56: "ARG_MAX", 57: "MINIMUM", 58: "LESS",
    59: "NEG", 60: "PADV2", 61: "GREATER", 62: "GREATER_EQUAL", 63: "LESS_EQUAL", 64: "SELECT", 65: "SLICE",
    67: "TRANSPOSE_CONV", 69: "TILE", 70: "EXPAND_DIMS", 71: "EQUAL", 72: "NOT_EQUAL", 73: "LOG", 74: "SUM",
    75: "SQRT", 76: "RSQRT", 77: "SHAPE", 78: "POW", 82: "REDUCE_MAX", 83: "PACK", 88: "UNPACK", 89: "REDUCE_MIN",
    92: "SQUARE", 97: "RESIZE_NEAREST_NEIGHBOR", 98: "LEAKY_RELU", 99: "SQUARED_DIFFERENCE", 101: "ABS", 111: "ELU",
    114: "QUANTIZE", 117: "HARD_SWISH", 123: "SELECT_V2", 126: "BATCH_MATMUL", 150: "GELU",
}  # fmt: skip


def matches(peek: Peek) -> bool:
    """Whether the file carries TensorFlow Lite's mark."""
    return peek.head[4:8] == b"TFL3"


@dataclass(slots=True)
class Made(Node):
    """A node of TensorFlow's that no GraphDef wrote: its attributes are plain values."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def fail(self, why: str) -> FormatError:
        return FormatError(f"{self.what}: operator {self.name[:120]!r} ({self.op[:60]}) {why}.")

    def text(self, key: str, default: str) -> str:
        return str(self.values.get(key, default))

    def whole(self, key: str, default: int = 0) -> int:
        return int(self.values.get(key, default))

    def number(self, key: str, default: float = 0.0) -> float:
        found = float(self.values.get(key, default))
        if not math.isfinite(found):
            raise self.fail(f"has {key}={found}")
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.values.get(key, default))

    def dtype(self, key: str) -> int:
        return int(self.values.get(key, 0))

    def wholes(self, key: str) -> list[int]:
        return list(self.values.get(key, []))


@dataclass(slots=True)
class _Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    table: Table
    scale: np.ndarray
    zero: np.ndarray
    axis: int

    @property
    def quantised(self) -> bool:
        """Whether whole numbers stand for real ones."""
        return len(self.scale) > 0 and self.dtype in ("uint8", "int8", "int16", "int32")

    @property
    def steps(self) -> tuple[float, int, int, int] | None:
        """Scale, zero and range of an activation."""
        if not self.quantised or self.dtype not in _RANGES or len(self.scale) != 1:
            return None
        zero = int(self.zero[0]) if len(self.zero) else 0
        return (float(self.scale[0]), zero, *_RANGES[self.dtype])


def read(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    scale: float | None = None,
    image: Mapping[str, Any] | None = None,
    keep_activation: bool = False,
    rounding: bool = True,
) -> Imported:
    """A model of TensorFlow Lite as an ordinary torch graph.

    Pictures go in channels first, as in all nets here, other rows in TensorFlow's order. A quantised input states its
    preparation: pixels 0..255 are its whole numbers. A last softmax is left to prediction, as kindling's models give
    scores: the labels are then the numbers of the classes, unless `labels` names them.

    Args:
        labels: names of the classes in the order of the scores.
        scale: the factor on pixels 0..255, where the input holds floats; with it or `image` the net takes photos.
        image: fields of the `ImageStep` to prepare photos with.
        keep_activation: keep a last softmax.
        rounding: round activations as the file's runtime does; False makes a plain float net of a quantised one.
    Raises: FormatError, for a damaged or hostile file, and an operator that is not known, naming it and its output.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise FormatError(f"{path} is too large for a model of TensorFlow Lite.")
    model = Buffer(mapped(path), str(path)).root()
    graphs = model.tables(2)
    if not graphs:
        raise FormatError(f"{path} holds no graph.")
    reader = _Reader(path, model, graphs[0], rounding)
    values: dict[int, Value] = {}
    steps = []
    for index in reader.places(graphs[0].numbers(1, "int32")):
        tensor = reader.tensor(index)
        if not tensor.shape:
            raise FormatError(f"{path}: input {tensor.name[:80]!r} is a single number, which is not read.")
        first = tensor.steps
        stated = None
        row = tensor.shape[1:]
        if first is not None and len(row) == 3 and row[-1] in (1, 3) and scale is None and image is None:
            shift = first[1] + (128 if tensor.dtype == "int8" else 0)  # int8 holds pixels less 128
            stated = {"scale": first[0], "mean": (first[0] * shift,), "resize": "shorter"}
        flow, step = open_input(
            reader.mover,
            tensor.name,
            row,
            whole=tensor.dtype in ("int32", "int64") and not tensor.quantised,
            channels_last=True,
            scale=scale,
            image=image,
            stated=stated,
        )
        values[index] = flow
        steps.append(step)
    for operator in graphs[0].tables(3):
        reader.run(operator, values)
    outputs: dict[str, Flow] = {}
    for index in reader.places(graphs[0].numbers(2, "int32")):
        value = values.get(index)
        if not isinstance(value, Flow):
            raise FormatError(f"{path}: output {reader.tensor(index).name[:80]!r} does not depend on an input.")
        outputs[reader.tensor(index).name or f"output{index}"] = value
    if not outputs or not steps:
        raise FormatError(f"{path} has no input or no output.")
    return imported(
        path,
        reader.mover,
        outputs,
        steps,
        labels=labels,
        keep_activation=keep_activation,
        binary=False,
        system=NAME,
        about={"version": int(model.number(0, "I")), "description": model.text(3)[:80], "rounding": reader.rounded},
    )


class _Reader:
    def __init__(self, path: Path, model: Table, graph: Table, rounding: bool) -> None:
        self.what, self.rounding, self.rounded = str(path), rounding, 0
        self._buffers = model.tables(4)
        self._tables = graph.tables(0)
        if len(self._tables) > _MAX_TENSORS:
            raise FormatError(f"{path} has more than {_MAX_TENSORS:,} tensors, which are refused.")
        self._tensors: dict[int, _Tensor] = {}
        self._codes = []
        for code in model.tables(1):
            number = max(int(code.number(0, "b")), int(code.number(3)))
            self._codes.append(code.text(1)[:60] if number == 32 else _NAMES.get(number, f"number {number}"))
        self.mover = Mover(Assembly(self.what))
        self._runner = Runner(self.mover, Graph({}), _no_feed, _no_variable, self.what)

    def places(self, indices: np.ndarray) -> list[int]:
        """Tensors by number; an optional one that is left out is -1."""
        if any(not -1 <= index < len(self._tables) for index in indices) or len(indices) > 1000:
            raise FormatError(f"{self.what} is damaged: it uses a tensor that is not there.")
        return [int(index) for index in indices]

    def tensor(self, index: int) -> _Tensor:
        if index not in self._tensors:
            if index < 0:
                raise FormatError(f"{self.what} is damaged: it uses a tensor that is not there.")
            table = self._tables[index]
            dtype = _TYPES.get(int(table.number(1, "b")))
            shape = tuple(int(size) for size in table.numbers(0, "int32"))
            name = table.text(3).partition(";")[0]  # fused operators join the names of all they replace
            if dtype is None or len(shape) > 8 or any(not 0 <= size < 2**31 for size in shape):
                raise FormatError(f"{self.what}: tensor {name[:80]!r} is of a type or shape that is not read.")
            quantisation = table.table(4)
            none = np.empty(0)
            scale = none if quantisation is None else quantisation.numbers(2, "float32")
            zero = none if quantisation is None else quantisation.numbers(3, "int64")
            axis = 0 if quantisation is None else int(quantisation.number(6))
            if len(scale) and not (np.isfinite(scale).all() and (scale > 0).all() and len(zero) in (0, len(scale))):
                raise FormatError(f"{self.what}: tensor {name[:80]!r} has steps that are none.")
            self._tensors[index] = _Tensor(name, shape, dtype, table, scale, zero, axis)
        return self._tensors[index]

    def value(self, index: int, values: Mapping[int, Value]) -> Value | None:
        """What a tensor holds: numbers of the file, or what was computed."""
        if index == -1:
            return None
        if index in values:
            return values[index]
        tensor = self.tensor(index)
        place = int(tensor.table.number(2, "I"))
        if not 0 < place < len(self._buffers):
            raise FormatError(f"{self.what}: tensor {tensor.name[:80]!r} is used before it is made.")
        raw = self._buffers[place].numbers(0, "uint8")
        kind = np.dtype(tensor.dtype).newbyteorder("<")
        if len(raw) != math.prod(tensor.shape) * kind.itemsize:
            raise FormatError(f"{self.what}: tensor {tensor.name[:80]!r} of shape {tensor.shape} has {len(raw)} bytes.")
        array = raw.view(kind).reshape(tensor.shape)
        if tensor.quantised:
            array = self._real(tensor, array)
        elif tensor.dtype == "float16":
            array = array.astype(np.float32)
        return Known(array, tensor.name)

    def _real(self, tensor: _Tensor, array: np.ndarray) -> np.ndarray:
        """(q - zero) * scale, with one pair or one for each entry of an axis."""
        scale = tensor.scale.astype(np.float64)
        zero = tensor.zero.astype(np.float64) if len(tensor.zero) else np.zeros(len(scale))
        if len(scale) > 1:
            if not 0 <= tensor.axis < array.ndim or array.shape[tensor.axis] != len(scale):
                raise FormatError(f"{self.what}: tensor {tensor.name[:80]!r} has {len(scale)} steps.")
            spread = [1] * array.ndim
            spread[tensor.axis] = -1
            scale, zero = scale.reshape(spread), zero.reshape(spread)
        real: np.ndarray = ((array - zero) * scale).astype(np.float32)
        return real

    # -------------------------------------------------------------------------------------------- operators

    def run(self, table: Table, values: dict[int, Value]) -> None:
        """One operator: its outputs are added to `values`."""
        code = int(table.number(0, "I"))
        kind = self._codes[code] if code < len(self._codes) else f"number {code}"
        inputs, outputs = self.places(table.numbers(1, "int32")), self.places(table.numbers(2, "int32"))
        if not outputs or -1 in outputs:
            raise FormatError(f"{self.what} is damaged: an operator gives nothing.")
        out = self.tensor(outputs[0])
        options = table.table(4)
        node = Made(out.name or f"tensor{outputs[0]}", kind, [], {}, self.what)
        given = [self.value(index, values) for index in inputs]
        plan = _PLANS.get(kind)
        if plan is None:
            raise node.fail("is an operator that is not read")
        tensors = [self.tensor(index) for index in inputs if index >= 0]
        call = _Call(self, node, options, given, tensors, out)
        made = plan(call)
        found = made if isinstance(made, list) else [made]
        for index, value in zip(outputs, found, strict=False):
            values[index] = self._stepped(value, self.tensor(index), call, kind)

    def _stepped(self, value: Value, tensor: _Tensor, call: _Call, kind: str) -> Value:
        """Rounded as the file keeps it; operators that only move numbers leave them rounded."""
        steps = tensor.steps
        if not isinstance(value, Flow) or steps is None or not self.rounding:
            return value
        if call.whole or (kind in _MOVING and call.tensors and call.tensors[0].steps == steps):
            return value
        self.rounded += 1
        away = kind == "AVERAGE_POOL_2D"  # an integer mean, of the whole numbers themselves
        wire = self.mover.net.layer(f"{tensor.name or 'tensor'}_steps", lambda: Quantized(*steps, away), value.wire)
        return replace(value, wire=wire)


def _no_feed(node: Node) -> Flow:
    raise node.fail("has no input")


def _no_variable(node: Node) -> Known:
    raise node.fail("has no variables")


_MOVING = frozenset({
    "EXPAND_DIMS", "MAX_POOL_2D", "PACK", "PAD", "RESHAPE", "SLICE", "SPLIT", "SQUEEZE", "STRIDED_SLICE", "TILE",
    "TRANSPOSE", "UNPACK",
})  # fmt: skip


@dataclass(slots=True)
class _Call:
    """One operator, and what it is given."""

    reader: _Reader
    node: Made
    options: Table | None
    given: list[Value | None]
    tensors: list[_Tensor]
    out: _Tensor
    whole: bool = False
    """Whether a layer of whole numbers has rounded its output itself."""

    def option(self, field_number: int, kind: str = "i", default: Any = 0) -> Any:
        return default if self.options is None else self.options.number(field_number, kind, default)

    def known(self, place: int) -> np.ndarray:
        value = self.given[place] if place < len(self.given) else None
        if not isinstance(value, Known):
            raise self.node.fail(f"has no constant as input {place}")
        return value.value

    def there(self, place: int) -> bool:
        return place < len(self.given) and self.given[place] is not None

    def apply(self, op: str, given: Sequence[Value | None], part: str = "", **attributes: Any) -> Value:
        """TensorFlow's operation of that name."""
        name = f"{self.node.name}_{part}" if part else self.node.name
        node = Made(name, self.node.op, [], {}, self.node.what, attributes)
        scope = Scope({})
        if any(value is None for value in given):
            raise self.node.fail("lacks an input")
        bias = attributes.get("bias")
        made = OPS[op](Op(self.reader._runner, scope, _renamed(node, op), list(given), bias))  # type: ignore[arg-type]
        return made[0] if isinstance(made, list) else made

    def fused(self, value: Value, number: int) -> Value:
        """The activation that the operator ends with."""
        if number not in _FUSED:
            raise self.node.fail(f"ends with activation number {number}, which is not read")
        name = _FUSED[number]
        if name is None or not isinstance(value, Flow):
            return value
        if name == "ReluN1To1":
            wire = self.reader.mover.net.layer(f"{self.node.name}_relu1", lambda: nn.Hardtanh(), value.wire)
            return replace(value, wire=wire)
        return self.apply(name, [value], name.lower())


def _renamed(node: Made, op: str) -> Made:
    return replace(node, op=op)


def _whole_settings(call: _Call, activation: int) -> dict[str, Any] | None:
    """Steps and range of a layer that computes with whole numbers; None where the operator does not."""
    reader = call.reader
    if not reader.rounding or len(call.tensors) < 2 or activation not in (0, 1, 2, 3):
        return None
    before, weight, after = call.tensors[0].steps, call.tensors[1], call.out.steps
    if before is None or after is None or weight.dtype not in ("uint8", "int8") or not weight.quantised:
        return None
    scale, zero, low, high = after
    if activation in (1, 3):
        low = max(low, zero)
    if activation == 3:
        high = min(high, zero + round(6 / scale))
    if activation == 2:
        low, high = max(low, zero - round(1 / scale)), min(high, zero + round(1 / scale))
    return {"scale_in": before[0], "scale_out": scale, "zero_out": zero, "low": low, "high": max(low, high)}


def _whole_tensors(call: _Call, weight: torch.Tensor, bias: np.ndarray | None) -> dict[str, torch.Tensor]:
    """A layer's weights, and the steps that they stand at."""
    out = weight.shape[0]
    scale = call.tensors[1].scale.astype(np.float32)
    if len(scale) not in (1, out) or (bias is not None and bias.shape != (out,)):
        raise call.node.fail(f"has {len(scale)} steps for {out} outputs")
    found = {"weight": weight, "weight_scale": torch.from_numpy(np.broadcast_to(scale, (out,)).copy())}
    return found | ({} if bias is None else {"offset": torch.from_numpy(np.array(bias, np.float32))})


def _convolved(
    call: _Call, op: str, kernel: np.ndarray, weight: np.ndarray, activation: int, attributes: dict[str, Any]
) -> Value:
    """A convolution: of whole numbers, or TensorFlow's with the kernel in its order.

    Args:
        weight: the same kernel as torch has it.
    """
    settings, flow = _whole_settings(call, activation), call.given[0]
    if settings is None or not isinstance(flow, Flow) or flow.rank != 4:
        return call.fused(call.apply(op, [flow, Known(kernel)], **attributes), activation)
    mover = call.reader.mover
    node = replace(call.node, values=attributes)
    helper = Op(call.reader._runner, Scope({}), node, [])
    strides, dilations = (axes_of(helper, attributes[key], False) for key in ("strides", "dilations"))
    wire, pad = padded(helper, mover.first(flow), weight.shape[2:], strides, dilations, False, 0.0)
    channels, out = wire.row[0], weight.shape[0]
    if not weight.size or channels % weight.shape[1]:
        raise call.node.fail(f"has a kernel of shape {kernel.shape} for {channels} channels")
    groups = channels // weight.shape[1]
    size, bias = (int(weight.shape[2]), int(weight.shape[3])), attributes["bias"]
    made = mover.net.layer(
        call.node.name,
        lambda: LiteConv2d(channels, out, size, strides, pad, dilations, groups, bias is not None, **settings),  # type: ignore[arg-type]
        wire,
        tensors=_whole_tensors(call, copied(weight), bias),
    )
    call.whole = True
    call.reader.rounded += 1
    return Flow(made, True)


def _padding(call: _Call, field_number: int = 0) -> str:
    number = call.option(field_number, "b")
    if number not in (0, 1):
        raise call.node.fail(f"has padding number {number}")
    return "SAME" if number == 0 else "VALID"


def _strides(call: _Call, wide: int, tall: int) -> list[int]:
    return [1, call.option(tall, "i", 1), call.option(wide, "i", 1), 1]


def _bias(call: _Call, place: int) -> np.ndarray | None:
    return call.known(place).reshape(-1) if call.there(place) else None


def _conv(call: _Call) -> Value:
    kernel = call.known(1)
    if kernel.ndim != 4:
        raise call.node.fail(f"has a kernel of shape {kernel.shape}")
    attributes = {
        "strides": _strides(call, 1, 2),
        "dilations": [1, call.option(5, "i", 1), call.option(4, "i", 1), 1],
        "padding": _padding(call),
        "bias": _bias(call, 2),
    }
    turned = kernel.transpose(1, 2, 3, 0)
    return _convolved(call, "Conv2D", turned, kernel.transpose(0, 3, 1, 2), call.option(3, "b"), attributes)


def _depthwise(call: _Call) -> Value:
    kernel, flow = call.known(1), call.given[0]
    if kernel.ndim != 4 or kernel.shape[0] != 1 or not isinstance(flow, Flow) or not flow.row:
        raise call.node.fail(f"has a kernel of shape {kernel.shape}")
    channels = flow.row[-1]
    if not channels or kernel.shape[3] % channels:
        raise call.node.fail(f"makes {kernel.shape[3]} channels of {channels}")
    attributes = {
        "strides": _strides(call, 1, 2),
        "dilations": [1, call.option(6, "i", 1), call.option(5, "i", 1), 1],
        "padding": _padding(call),
        "bias": _bias(call, 2),
    }
    plain = kernel[0].reshape(*kernel.shape[1:3], channels, -1)
    weight = kernel.transpose(3, 0, 1, 2)
    return _convolved(call, "DepthwiseConv2dNative", plain, weight, call.option(4, "b"), attributes)


def _transposed(call: _Call) -> Value:
    kernel = call.known(1)
    if kernel.ndim != 4:
        raise call.node.fail(f"has a kernel of shape {kernel.shape}")
    made = call.apply(
        "Conv2DBackpropInput",
        [call.given[0], Known(kernel.transpose(1, 2, 0, 3)), call.given[2] if call.there(2) else None],
        strides=_strides(call, 1, 2),
        padding=_padding(call),
        bias=_bias(call, 3),
    )
    return call.fused(made, call.option(3, "b"))


def _dense(call: _Call) -> Value:
    if call.option(1, "b"):
        raise call.node.fail("keeps its weights shuffled, which is not read")
    weight, flow = call.known(1), call.given[0]
    if weight.ndim != 2 or not isinstance(flow, Flow) or not weight.size:
        raise call.node.fail(f"has weights of shape {weight.shape}")
    shape = None
    if flow.rank != 2:
        shape = flow.row
        sizes = np.array([-1, weight.shape[1]], np.int32)
        flow_value = call.apply("Reshape", [flow, Known(sizes)], "rows")
        assert isinstance(flow_value, Flow)
        flow = flow_value
    made = _multiplied(call, flow, weight, _bias(call, 2))
    if shape is not None and call.option(2, "b"):
        sizes = np.array([-1, *shape[:-1], weight.shape[0]], np.int32)
        made = call.apply("Reshape", [made, Known(sizes)], "steps")
    return made if call.whole else call.fused(made, call.option(0, "b"))


def _multiplied(call: _Call, flow: Flow, weight: np.ndarray, bias: np.ndarray | None) -> Value:
    settings = _whole_settings(call, call.option(0, "b"))
    if settings is None:
        return call.apply("MatMul", [flow, Known(weight)], transpose_b=True, bias=bias)
    out, features = weight.shape
    made = call.reader.mover.net.layer(
        call.node.name,
        lambda: LiteLinear(features, out, bias is not None, **settings),
        flow.wire,
        tensors=_whole_tensors(call, copied(weight), bias),
    )
    call.whole = True
    call.reader.rounded += 1
    return Flow(made)


def _pool(op: str) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        made = call.apply(
            op,
            [call.given[0]],
            strides=_strides(call, 1, 2),
            ksize=[1, call.option(4, "i", 1), call.option(3, "i", 1), 1],
            padding=_padding(call),
        )
        return call.fused(made, call.option(5, "b"))

    return plan


def _binary(op: str) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        made = call.apply(op, call.given[:2])
        return call.fused(made, call.option(0, "b") if op in ("Add", "Sub", "Mul", "RealDiv") else 0)

    return plan


def _plain(op: str, *kept: int, **attributes: Any) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        given = [call.given[place] for place in kept if place < len(call.given)] if kept else call.given
        return call.apply(op, given, **attributes)

    return plan


def _softmax(call: _Call) -> Value:
    beta = float(call.option(0, "f", 0.0))
    if beta != 1.0:
        raise call.node.fail(f"has beta={beta}; 1 is read")
    return call.apply("Softmax", call.given)


def _concat(call: _Call) -> Value:
    axis = Known(np.array(call.option(0), np.int32))
    return call.fused(call.apply("ConcatV2", [*call.given, axis]), call.option(1, "b"))


def _reshape(call: _Call) -> Value:
    if call.there(1):
        return call.apply("Reshape", call.given[:2])
    if call.options is None:
        raise call.node.fail("does not say what it makes")
    return call.apply("Reshape", [call.given[0], Known(call.options.numbers(0, "int32").astype(np.int32))])


def _squeeze(call: _Call) -> Value:
    axes = [] if call.options is None else call.options.numbers(0, "int32").tolist()
    return call.apply("Squeeze", call.given, squeeze_dims=axes)


def _reduce(op: str) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        return call.apply(op, call.given, keep_dims=call.option(0, "b"))

    return plan


def _strided(call: _Call) -> Value:
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    return call.apply("StridedSlice", call.given, **{name: call.option(k) for k, name in enumerate(names)})


def _resize(op: str) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        corners, half = (2, 3) if op == "ResizeBilinear" else (0, 1)
        return call.apply(
            op, call.given, align_corners=call.option(corners, "b"), half_pixel_centers=call.option(half, "b")
        )

    return plan


def _same(call: _Call) -> Value:
    value = call.given[0]
    if value is None:
        raise call.node.fail("lacks an input")
    return value


def _layer(build: Callable[[_Call], Callable[[], nn.Module]]) -> Callable[[_Call], Value]:
    def plan(call: _Call) -> Value:
        flow = call.given[0]
        if not isinstance(flow, Flow):
            raise call.node.fail("works on a constant, which is not read")
        made = call.reader.mover.net.layer(call.node.name, build(call), flow.wire)
        return replace(flow, wire=made, scores=None)

    return plan


def _prelu(call: _Call) -> Value:
    from kindling.nets.layers_keras import KerasPReLU

    flow, alpha = call.given[0], call.known(1)
    if not isinstance(flow, Flow) or alpha.ndim != flow.rank - 1:
        raise call.node.fail(f"has slopes of shape {alpha.shape}")
    alpha = np.moveaxis(alpha, -1, 0) if flow.moved else alpha
    sizes = tuple(int(size) for size in alpha.shape)
    tensors = {"weight": torch.from_numpy(np.array(alpha, np.float32))}
    wire = call.reader.mover.net.layer(call.node.name, lambda: KerasPReLU(sizes), flow.wire, tensors=tensors)
    return replace(flow, wire=wire, scores=None)


def _argmax(call: _Call) -> Value:
    return call.apply("ArgMax", call.given[:2])


def _pack(call: _Call) -> Value:
    return call.apply("Pack", call.given, axis=call.option(1))


_PLANS: dict[str, Callable[[_Call], Value | list[Value]]] = {
    "ABS": _plain("Abs"),
    "ADD": _binary("Add"),
    "ARG_MAX": _argmax,
    "AVERAGE_POOL_2D": _pool("AvgPool"),
    "CONCATENATION": _concat,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _same,
    "DIV": _binary("RealDiv"),
    "ELU": _plain("Elu"),
    "EQUAL": _binary("Equal"),
    "EXP": _plain("Exp"),
    "EXPAND_DIMS": _plain("ExpandDims"),
    "FULLY_CONNECTED": _dense,
    "GELU": _layer(lambda call: lambda: nn.GELU("tanh" if call.option(0, "b") else "none")),
    "GREATER": _binary("Greater"),
    "GREATER_EQUAL": _binary("GreaterEqual"),
    "HARD_SWISH": _layer(lambda call: nn.Hardswish),
    "LEAKY_RELU": _layer(lambda call: lambda: nn.LeakyReLU(float(call.option(0, "f", 0.0)))),
    "LESS": _binary("Less"),
    "LESS_EQUAL": _binary("LessEqual"),
    "LOG": _plain("Log"),
    "LOGISTIC": _plain("Sigmoid"),
    "LOG_SOFTMAX": _plain("LogSoftmax"),
    "MAXIMUM": _binary("Maximum"),
    "MAX_POOL_2D": _pool("MaxPool"),
    "MEAN": _reduce("Mean"),
    "MINIMUM": _binary("Minimum"),
    "MUL": _binary("Mul"),
    "NEG": _plain("Neg"),
    "NOT_EQUAL": _binary("NotEqual"),
    "PACK": _pack,
    "PAD": _plain("Pad"),
    "PADV2": _plain("PadV2"),
    "POW": _binary("Pow"),
    "PRELU": _prelu,
    "QUANTIZE": _same,
    "REDUCE_MAX": _reduce("Max"),
    "REDUCE_MIN": _reduce("Min"),
    "RELU": _plain("Relu"),
    "RELU6": _plain("Relu6"),
    "RELU_N1_TO_1": _layer(lambda call: nn.Hardtanh),
    "RESHAPE": _reshape,
    "RESIZE_BILINEAR": _resize("ResizeBilinear"),
    "RESIZE_NEAREST_NEIGHBOR": _resize("ResizeNearestNeighbor"),
    "RSQRT": _plain("Rsqrt"),
    "SELECT": _plain("SelectV2"),
    "SELECT_V2": _plain("SelectV2"),
    "SHAPE": _plain("Shape"),
    "SLICE": _plain("Slice"),
    "SOFTMAX": _softmax,
    "SQRT": _plain("Sqrt"),
    "SQUARE": _plain("Square"),
    "SQUARED_DIFFERENCE": _plain("SquaredDifference"),
    "SQUEEZE": _squeeze,
    "STRIDED_SLICE": _strided,
    "SUB": _binary("Sub"),
    "SUM": _reduce("Sum"),
    "TANH": _plain("Tanh"),
    "TILE": _plain("Tile"),
    "TRANSPOSE": _plain("Transpose"),
    "TRANSPOSE_CONV": _transposed,
}
