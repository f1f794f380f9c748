"""Reader of BigDL's and Analytics Zoo's protobuf models, as far as their layers have a counterpart in torch.

A model is a tree of modules: containers, graphs, Keras-style layers around a module that computes, and layers with
attributes and tensors; the numbers of all tensors are in one attribute of the root. Sources: bigdl.proto,
ModuleSerializable.scala, TensorConverter.scala, Graph.scala and the layers' own files in BigDL 2. Axes count from 1
there, the batch included.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.assemble import ROWS, Assembly, Wire, valid_name
from kindling.formats.files import file_digest, mapped
from kindling.formats.models import Imported, Peek
from kindling.formats.wire import Budget, Message
from kindling.prepare import ArrayStep, LabelStep, Preparation

NAME = "BigDL"
MAX_SIZE = 2**31
_STORAGE = "global_storage"
_HOMES = ("com.intel.analytics.bigdl.", "com.intel.analytics.zoo.")

Flow: TypeAlias = Wire | list["Flow"]
"""A tensor, or a table of them."""


def matches(peek: Peek) -> bool:
    """Whether the file begins like a module and names a class of BigDL."""
    return peek.head[:1] in (b"\x0a", b"\x12") and b"com.intel.analytics." in peek.head


def read(path: Path, *, input_shape: Sequence[int] | None = None, labels: Sequence[str] | None = None) -> Imported:
    """The model in a BigDL file.

    Args:
        input_shape: one row's shape without the batch axis, where the first layer does not tell it.
        labels: class names in the order of the scores. BigDL numbers classes from 1.
    Raises: FormatError, for a damaged file, a layer that is not known here, and an input shape that is needed.
    """
    root = Message(mapped(path), Budget(str(path)))
    if not root.text(7).startswith(_HOMES):
        raise FormatError(f"{path} is no BigDL model: its outermost module is of type {root.text(7)[:80]!r}.")
    reader = _Reader(Assembly(str(path)), _Storages(root))
    given: list[Flow] = [reader.net.input(*each) for each in _inputs(reader, root, input_shape)]
    flow = reader.module(root, given[0] if len(given) == 1 else given)
    outputs = {name: wire for name, wire in _named(flow, "output", reader.last)}
    module, signature = reader.net.finish(outputs)
    module.delete_all_unused_submodules()
    steps = tuple(
        ArrayStep(name, name, tuple(int(size) for size in spec.shape[1:]), spec.dtype)
        for name, spec in signature.inputs.items()
    )
    names = None if labels is None else tuple(map(str, labels))
    if names is not None:
        shape = next(iter(signature.outputs.values())).shape
        if len(signature.outputs) != 1 or shape[1:] != (len(names),):
            raise ConfigError("labels", list(names), f"do not fit scores of shape {shape[1:]}", "Name each score once")
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation(steps, () if names is None else (LabelStep("target", "label", names),)),
        labels=names,
        name=path.stem,
        source={
            "file": path.name,
            "sha256": file_digest(path),
            "format": NAME,
            "version": root.text(9)[:40],
            "preparation": "no scaling is stated: inputs are taken as they are",
        },
    )


def _named(flow: Flow, default: str, last: str) -> list[tuple[str, Wire]]:
    if isinstance(flow, Wire):
        return [(last or default, flow)]
    found = [wire for part in flow for _, wire in _named(part, default, "")]
    return [(f"{default}_{place}", wire) for place, wire in enumerate(found)]


# ---------------------------------------------------------------------------------------------------- the tensors


class _Storages:
    """Numbers by storage, tensors by id, as `ModuleLoader.initTensorStorage` finds them."""

    def __init__(self, root: Message) -> None:
        self.what = root.what
        self._numbers: dict[int, np.ndarray] = {}
        self._tensors: dict[int, Message] = {}
        for key, value in _entries(root, 8):
            if key == _STORAGE:
                for _, attribute in _entries(value.message(14), 2):
                    tensor = attribute.message(10)
                    self._tensors[tensor.whole(9)] = tensor
                    self._keep(tensor)

    def _keep(self, tensor: Message) -> None:
        storage = tensor.message(8)
        if storage.has(2):
            self._numbers[storage.whole(9)] = storage.floats(2, "<f4")
        elif storage.has(3):
            self._numbers[storage.whole(9)] = storage.floats(3, "<f8")

    def tensor(self, message: Message, layer: str) -> Tensor | None:
        """The tensor, float32; None for one that is empty."""
        where = f"{self.what}: layer {layer!r}"
        if not message.has(8):
            return None
        if message.whole(10) == 1:
            raise FormatError(f"{where} is quantised, which is not read. Load the model it was made from.")
        self._keep(message)
        full = self._tensors.get(message.whole(9), message)
        sizes, strides, offset = full.wholes(2), full.wholes(3), full.whole(4)
        numbers = self._numbers.get(full.message(8).whole(9))
        if not sizes:
            return None
        if numbers is None:
            raise FormatError(f"{where}: its numbers are not in the file. Save the model with its weights inside.")
        count = math.prod(sizes)
        bad = len(sizes) > 8 or len(strides) != len(sizes) or min(sizes) < 1 or min(strides) < 0 or offset < 1
        reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
        if bad or count > len(numbers) or reach > len(numbers):
            raise FormatError(f"{where}: a tensor of {sizes[:8]} does not fit its {len(numbers):,} numbers.")
        size = numbers.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            numbers[offset - 1 :], sizes, [stride * size for stride in strides], writeable=False
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return torch.from_numpy(view.astype(np.float32, order="C", copy=True))


def _entries(message: Message, number: int) -> list[tuple[str, Message]]:
    """A map's keys and values."""
    return [(entry.text(1), entry.message(2)) for entry in message.messages(number)]


class _Attributes:
    """A layer's attributes by name, as plain values."""

    def __init__(self, module: Message, what: str) -> None:
        self.what = what
        self._found = {key: value for key, value in _entries(module, 8) if key != _STORAGE}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def tensor(self, name: str) -> Message | None:
        value = self._found.get(name)
        return None if value is None or not value.has(10) else value.message(10)

    def number(self, name: str, default: float | None = None) -> float:
        """A number of any width; whole ones stay whole."""
        value = self._found.get(name)
        found: float | None = default
        if value is not None:
            if value.has(3) or value.has(4):
                found = value.whole(3 if value.has(3) else 4)
                found = found - (1 << 32) if value.has(3) and found >= 1 << 31 else found
            for field, dtype in ((5, "<f4"), (6, "<f8")):
                if value.has(field):
                    numbers = value.floats(field, dtype)
                    found = float(numbers[-1]) if len(numbers) else default
        if found is None or not math.isfinite(found):
            raise FormatError(f"{self.what}: attribute {name!r} is {found}, not a number.")
        return found

    def size(self, name: str, low: int = 1, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value) or not low <= value < MAX_SIZE:
            raise FormatError(f"{self.what}: {name} is {value}, not a whole number of {low} or more.")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._found.get(name)
        return default if value is None or not value.has(8) else value.whole(8) != 0

    def sizes(self, name: str) -> list[int]:
        value = self._found.get(name)
        found = [] if value is None else value.message(15).wholes(3)
        if len(found) > 16 or not all(-MAX_SIZE < size < MAX_SIZE for size in found):
            raise FormatError(f"{self.what}: {name} is {found[:16]}, not a shape.")
        return found

    def texts(self, name: str) -> list[str]:
        value = self._found.get(name)
        return [] if value is None else value.message(15).texts(7)

    def nchw(self, *names: str) -> None:
        """Raises: FormatError, where channels come last."""
        for name in names:
            value = self._found.get(name)
            if value is not None and value.has(16) and value.whole(16) != 0:
                raise FormatError(f"{self.what} works on NHWC; only NCHW is read.")


# ------------------------------------------------------------------------------------------------------ the modules


def _kind(module: Message) -> str:
    return module.text(7).rpartition(".")[2]


def _keras(module: Message) -> bool:
    """Whether a module is a Keras-style layer around the module that computes."""
    home = module.text(7)
    return ".keras." in home or ".nn.internal." in home


class _Reader:
    def __init__(self, net: Assembly, storages: _Storages) -> None:
        self.net, self.storages = net, storages
        self.last = ""
        self._counts: dict[str, int] = {}
        self._around = ""  # the Keras-style layer whose one module comes next

    def name(self, module: Message) -> str:
        """A module's own name, or its type with a number."""
        own = module.text(1)
        if own:
            return own
        kind, self._around = self._around or _kind(module).lower(), ""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}{self._counts[kind]}"

    def module(self, module: Message, flow: Flow) -> Flow:
        """Add a module and what is inside it."""
        kind, subs = _kind(module), module.messages(2)
        what = f"{self.net.what}: layer {module.text(1) or kind!r} ({module.text(7)[:120]})"
        if kind in ("StaticGraph", "DynamicGraph", "Graph", "Model") and subs and _inner(module) is None:
            return self._graph(module, what, flow)
        if _keras(module):
            inner = _inner(module)
            if inner is None and len(subs) == 1:
                inner = subs[0]
            if inner is None and kind in ("Input", "InputLayer"):
                return flow
            if inner is None:
                raise FormatError(f"{what} has {len(subs)} modules inside, where one that computes should be.")
            if kind not in ("Sequential", "Model"):
                inner = _without_reshapes(inner)
                self._around = "" if inner.messages(2) else module.text(1) or kind.lower()
            return self.module(inner, flow)
        if kind == "Sequential":
            for sub in subs:
                flow = self.module(sub, flow)
            return flow
        if kind == "ConcatTable":
            return [self.module(sub, flow) for sub in subs]
        if kind == "ParallelTable":
            parts = _table(flow, what)
            if len(parts) != len(subs):
                raise FormatError(f"{what} is given {len(parts)} tensors for {len(subs)} modules.")
            return [self.module(sub, part) for sub, part in zip(subs, parts, strict=True)]
        if kind == "Concat":
            axis = _Attributes(module, what).size("dimension") - 1
            wires = [_wire(self.module(sub, flow), what) for sub in subs]
            return self._done(self.name(module), lambda name: self.net.call(name, torch.cat, wires, axis))
        make = _KINDS.get(kind)
        if make is None or not module.text(7).startswith(_HOMES):
            raise FormatError(f"{what} is of a type that is not read. Known are {', '.join(sorted(_KINDS))}.")
        return make(self, _Layer(module, what, self.name(module), self.storages), flow)

    def _done(self, name: str, make: Callable[[str], Wire]) -> Wire:
        wire = make(name)
        self.last = valid_name(name)
        return wire

    def _graph(self, module: Message, what: str, flow: Flow) -> Flow:
        """Modules in the order in which they were run, each naming those before it."""
        attributes = _Attributes(module, what)
        subs = {sub.text(1): sub for sub in module.messages(2)}
        if len(subs) != len(module.messages(2)):
            raise FormatError(f"{what}: two modules of the graph have the same name.")
        inputs, outputs = attributes.texts("inputNames"), attributes.texts("outputNames")
        given = dict(zip(inputs, [flow] if len(inputs) == 1 else _table(flow, what), strict=False))
        if not inputs or len(given) != len(inputs) or not outputs:
            raise FormatError(f"{what}: {len(inputs)} inputs and {len(outputs)} outputs do not fit what it is given.")
        edges = _edges(module)
        done: dict[str, Flow] = {}
        waiting = list(subs)
        while waiting:
            ready = [name for name in waiting if all(before in done for before in subs[name].texts(5))]
            if not ready:
                raise FormatError(f"{what}: {waiting[0]!r} waits for modules that are not there, or for itself.")
            for name in ready:
                before: list[Flow] = [
                    _edge(done[one], edges.get(name, {}).get(one, -1), what) for one in subs[name].texts(5)
                ]
                if name in given:
                    before = [given[name], *before]
                if not before:
                    raise FormatError(f"{what}: {name!r} is given nothing.")
                done[name] = self.module(subs[name], before[0] if len(before) == 1 else before)
                waiting.remove(name)
        if any(name not in done for name in outputs):
            raise FormatError(f"{what}: an output is not among its modules.")
        found = [done[name] for name in outputs]
        self.last = valid_name(outputs[0]) if len(outputs) == 1 else ""
        return found[0] if len(found) == 1 else found

    # ---------------------------------------------------------------------------------------- layers

    def one(self, layer: _Layer, flow: Flow, make: Callable[[], nn.Module], **tensors: Tensor) -> Wire:
        wire = _wire(flow, layer.what)
        return self._done(layer.name, lambda name: self.net.layer(name, make, wire, tensors=tensors))

    def linear(self, layer: _Layer, flow: Flow) -> Flow:
        n_in, n_out = layer.size("inputSize"), layer.size("outputSize")
        bias = layer.flag("withBias", True)
        return self.one(layer, flow, lambda: nn.Linear(n_in, n_out, bias=bias), **layer.weights(bias))

    def convolution(self, layer: _Layer, flow: Flow) -> Flow:
        layer.nchw("format")
        n_in, n_out, groups = layer.size("nInputPlane"), layer.size("nOutputPlane"), layer.size("nGroup", default=1)
        spatial = "kernelW" in layer
        kernel = (layer.size("kernelH"), layer.size("kernelW")) if spatial else (layer.size("kH"), layer.size("kW"))
        steps = ("strideH", "strideW") if spatial else ("dH", "dW")
        stride = (layer.size(steps[0], default=1), layer.size(steps[1], default=1))
        dilation = (layer.size("dilationH", default=1), layer.size("dilationW", default=1))
        bias = layer.flag("withBias", True)
        tensors = layer.weights(bias)
        weight = tensors["weight"]
        if weight.dim() == 5:  # group, out, in, height, width
            tensors["weight"] = weight.reshape(-1, *weight.shape[2:])
        wire, padding = self._pad(layer, _wire(flow, layer.what), kernel, stride, 0.0)
        return self.one(
            layer,
            wire,
            lambda: nn.Conv2d(n_in, n_out, kernel, stride, padding, dilation, groups, bias),
            **tensors,
        )

    def _pad(
        self, layer: _Layer, wire: Wire, kernel: tuple[int, int], stride: tuple[int, int], value: float
    ) -> tuple[Wire, tuple[int, int]]:
        """-1 means TensorFlow's SAME: what is odd goes behind."""
        padding = (layer.size("padH", -1, 0), layer.size("padW", -1, 0))
        if padding != (-1, -1):
            if -1 in padding:
                raise FormatError(f"{layer.what}: padding {padding} is SAME along one axis only, which is not read.")
            return wire, padding
        if wire.rank != 4:
            raise FormatError(f"{layer.what} is given {wire.rank - 1} axes a row, not 3.")
        sides: list[int] = []
        for size, k, step in zip(wire.row[:0:-1], kernel[::-1], stride[::-1], strict=True):
            whole = max((-(-size // step) - 1) * step + k - size, 0)
            sides += [whole // 2, whole - whole // 2]
        if sides[0] == sides[1] and sides[2] == sides[3]:
            return wire, (sides[2], sides[0])
        pad = (sides[0], sides[1], sides[2], sides[3])
        return self.net.layer(f"{layer.name}_pad", lambda: nn.ConstantPad2d(pad, value), wire), (0, 0)

    def max_pooling(self, layer: _Layer, flow: Flow) -> Flow:
        layer.nchw("format")
        kernel = (layer.size("kH"), layer.size("kW"))
        stride = (layer.size("dH", default=1), layer.size("dW", default=1))
        wire, padding = self._pad(layer, _wire(flow, layer.what), kernel, stride, -math.inf)
        ceil = layer.flag("ceil_mode", False)
        return self.one(layer, wire, lambda: nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil))

    def average_pooling(self, layer: _Layer, flow: Flow) -> Flow:
        layer.nchw("format")
        wire = _wire(flow, layer.what)
        if layer.flag("globalPooling", False):
            return self.one(layer, wire, lambda: nn.AdaptiveAvgPool2d(1))
        kernel = (layer.size("kH"), layer.size("kW"))
        stride = (layer.size("dH", default=1), layer.size("dW", default=1))
        counted = layer.flag("countIncludePad", True)
        wire, padding = self._pad(layer, wire, kernel, stride, 0.0)
        if wire is not flow and not counted:
            raise FormatError(f"{layer.what} leaves uneven padding out of its averages, which is not read.")
        ceil, divisor = layer.flag("ceilMode", False), None if layer.flag("divide", True) else 1
        return self.one(layer, wire, lambda: nn.AvgPool2d(kernel, stride, padding, ceil, counted, divisor))

    def lrn(self, layer: _Layer, flow: Flow) -> Flow:
        layer.nchw("format")
        size, alpha = layer.size("size", default=5), layer.number("alpha", 1.0)
        beta, k = layer.number("beta", 0.75), layer.number("k", 1.0)
        if size % 2 == 0 or size > 10_001:
            raise FormatError(f"{layer.what}: size is {size}, not an odd number of channels.")
        return self.one(layer, flow, lambda: nn.LocalResponseNorm(size, alpha, beta, k))

    def batch_norm(self, layer: _Layer, flow: Flow) -> Flow:
        layer.nchw("dataFormat")
        wire, size = _wire(flow, layer.what), layer.size("nOutput")
        eps, momentum = layer.number("eps", 1e-5), layer.number("momentum", 0.1)
        affine = layer.flag("affine", True)
        tensors = layer.weights(affine) if affine else {}
        for theirs, ours in (("runningMean", "running_mean"), ("runningVar", "running_var")):
            found = layer.attributes.tensor(theirs)
            value = None if found is None else self.storages.tensor(found, layer.name)
            if value is None:
                raise FormatError(f"{layer.what} has no {theirs}.")
            tensors[ours] = value
        norm: Any = nn.BatchNorm2d if wire.rank == 4 else nn.BatchNorm1d
        return self.one(layer, wire, lambda: norm(size, eps, momentum, affine), **tensors)

    def dropout(self, layer: _Layer, flow: Flow) -> Flow:
        share = layer.number("initP", 0.5)
        if not 0 <= share < 1:
            raise FormatError(f"{layer.what}: initP is {share}, not a share from 0 to 1.")
        if not layer.flag("scale", True) and share > 0:
            raise FormatError(f"{layer.what} does not scale what it keeps, which is not read.")
        return self.one(layer, flow, lambda: nn.Dropout(share))

    def reshape(self, layer: _Layer, flow: Flow) -> Flow:
        sizes = layer.sizes("size") or layer.sizes("sizes")
        mode = layer.size("batchMode", 0, 0) if layer.kind == "Reshape" else 0
        wire = _wire(flow, layer.what)
        if layer.kind == "InferReshape":
            batch = layer.flag("batchMode", False)
            full = [wire.value.shape[k] if size == 0 and k < wire.rank else size for k, size in enumerate(sizes)]
            full = [wire.value.shape[0], *full] if batch else full
        elif mode == 1:
            full = sizes
        else:
            full = [wire.value.shape[0], *sizes]
        return self._done(layer.name, lambda name: self._shaped(layer, name, wire, full))

    def _shaped(self, layer: _Layer, name: str, wire: Wire, sizes: list[int]) -> Wire:
        """Reshaped so that the first axis is as many as there are rows, or a whole multiple."""
        shape = self.net.shape_of(name, wire, sizes)
        if shape[0] % ROWS or any(size % ROWS == 0 for size in shape[1:]):
            raise FormatError(f"{layer.what} to {sizes[:8]} mixes rows, which is not read.")
        return self.net.method(name, "reshape", wire, (-1, *shape[1:]))

    def lookup(self, layer: _Layer, flow: Flow) -> Flow:
        """Rows count from 1."""
        rows, width = layer.size("nIndex"), layer.size("nOutput")
        if (
            layer.flag("maskZero", False)
            or layer.number("maxNorm", math.inf if "maxNorm" not in layer else None) < 1e30
        ):
            raise FormatError(f"{layer.what} masks zeros or bounds its rows, which is not read.")
        wire = _wire(flow, layer.what)
        if wire.value.dtype != torch.int64:
            wire = self.net.method(f"{layer.name}_index", "long", wire)
        wire = self.net.call(f"{layer.name}_from_zero", operator.sub, wire, 1)
        return self.one(layer, wire, lambda: nn.Embedding(rows, width), **layer.weights(False))

    def zero_padding(self, layer: _Layer, flow: Flow) -> Flow:
        left, right, top, bottom = (int(layer.number(f"pad{side}")) for side in ("Left", "Right", "Top", "Bottom"))
        return self.one(layer, flow, lambda: nn.ZeroPad2d((left, right, top, bottom)))

    def prelu(self, layer: _Layer, flow: Flow) -> Flow:
        count = max(layer.size("nOutputPlane", 0, 0), 1)
        return self.one(layer, flow, lambda: nn.PReLU(count), **layer.weights(False))

    def soft(self, layer: _Layer, flow: Flow) -> Flow:
        wire = _wire(flow, layer.what)
        if wire.rank != 2:
            raise FormatError(f"{layer.what} is given {wire.rank - 1} axes a row; over one axis it is read.")
        return self.one(layer, wire, lambda: nn.Softmax(1) if layer.kind == "SoftMax" else nn.LogSoftmax(1))

    def element(self, layer: _Layer, flow: Flow) -> Flow:
        number = layer.number
        makers: dict[str, Callable[[], nn.Module]] = {
            "ReLU": nn.ReLU,
            "ReLU6": nn.ReLU6,
            "Tanh": nn.Tanh,
            "Sigmoid": nn.Sigmoid,
            "SoftSign": nn.Softsign,
            "LogSigmoid": nn.LogSigmoid,
            "Identity": nn.Identity,
            "Input": nn.Identity,
            "SoftPlus": lambda: nn.Softplus(number("beta", 1.0)),
            "ELU": lambda: nn.ELU(number("alpha", 1.0)),
            "LeakyReLU": lambda: nn.LeakyReLU(number("negval", 0.01)),
            "Threshold": lambda: nn.Threshold(number("th", 1e-6), number("v", 0.0)),
            "HardTanh": lambda: nn.Hardtanh(number("minValue", -1.0), number("maxValue", 1.0)),
        }
        if layer.kind in ("Identity", "Input") and isinstance(flow, list):
            return flow
        return self.one(layer, flow, makers[layer.kind])

    def function(self, layer: _Layer, flow: Flow) -> Flow:
        wire = _wire(flow, layer.what)
        call = self.net.call
        if layer.kind == "AddConstant":
            constant = layer.number("constant_scalar")
            return self._done(layer.name, lambda name: call(name, operator.add, wire, constant))
        if layer.kind == "MulConstant":
            constant = layer.number("constant" if "constant" in layer else "scalar")
            return self._done(layer.name, lambda name: call(name, operator.mul, wire, constant))
        if layer.kind == "Power":
            power, scale, shift = layer.number("power"), layer.number("scale", 1.0), layer.number("shift", 0.0)
            scaled = call(f"{layer.name}_scale", operator.mul, wire, scale)
            moved = call(f"{layer.name}_shift", operator.add, scaled, shift)
            return self._done(layer.name, lambda name: call(name, torch.pow, moved, power))
        plain = {"Abs": torch.abs, "Square": torch.square, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log}
        return self._done(layer.name, lambda name: call(name, plain[layer.kind], wire))

    def axes(self, layer: _Layer, flow: Flow) -> Flow:
        """Select, Narrow, Transpose: axes count from 1, the batch is the first and stays."""
        wire, call = _wire(flow, layer.what), self.net.call
        if layer.kind == "Transpose":
            for place in range(layer.size("size", 0)):
                pair = layer.sizes(f"permutation_{place}")
                if len(pair) != 2 or not all(2 <= axis <= wire.rank for axis in pair):
                    raise FormatError(f"{layer.what} swaps axes {pair}.")
                last = place == layer.size("size", 0) - 1
                name = layer.name if last else f"{layer.name}_{place}"
                wire = self._done(name, lambda name, w=wire, p=pair: call(name, torch.transpose, w, p[0] - 1, p[1] - 1))  # type: ignore[misc]  # fmt: skip
            return wire
        axis = int(layer.number("dimension"))
        axis = axis - 1 if axis > 0 else wire.rank + axis
        index = int(layer.number("index" if layer.kind == "Select" else "offset"))
        if not 1 <= axis < wire.rank or index == 0:
            raise FormatError(f"{layer.what} takes part {index} of axis {axis + 1} of {wire.rank}.")
        start = index - 1 if index > 0 else wire.value.shape[axis] + index
        if layer.kind == "Select":
            return self._done(layer.name, lambda name: call(name, torch.select, wire, axis, start))
        length = int(layer.number("length", 1))
        length = length if length > 0 else wire.value.shape[axis] - start + length + 1
        return self._done(layer.name, lambda name: call(name, torch.narrow, wire, axis, start, length))

    def tables(self, layer: _Layer, flow: Flow) -> Flow:
        parts = _table(flow, layer.what)
        if layer.kind == "SelectTable":
            index = int(layer.number("index"))
            if not 1 <= abs(index) <= len(parts):
                raise FormatError(f"{layer.what} takes part {index} of {len(parts)}.")
            return parts[index - 1 if index > 0 else index]
        if layer.kind == "FlattenTable":
            return [wire for _, wire in _named(parts, "", "")]
        wires = [_wire(part, layer.what) for part in parts]
        if layer.kind == "JoinTable":
            axis, inner = int(layer.number("dimension")), int(layer.number("nInputDims", -1))
            if axis < 0:
                axis = wires[0].rank + axis
            elif not (0 < inner and wires[0].rank == inner + 1):
                axis -= 1
            if axis < 1:
                raise FormatError(f"{layer.what} joins rows, which is not read.")
            return self._done(layer.name, lambda name: self.net.call(name, torch.cat, wires, axis))
        pairwise = {
            "CAddTable": operator.add,
            "CSubTable": operator.sub,
            "CMulTable": operator.mul,
            "CDivTable": operator.truediv,
            "CMaxTable": torch.maximum,
            "CMinTable": torch.minimum,
        }
        total = wires[0]
        for place, wire in enumerate(wires[1:], 1):
            name = layer.name if place == len(wires) - 1 else f"{layer.name}_{place}"
            total = self._done(name, lambda name, t=total, w=wire: self.net.call(name, pairwise[layer.kind], t, w))  # type: ignore[misc]  # fmt: skip
        return total


class _Layer:
    """A module without others inside: its name, attributes and tensors."""

    def __init__(self, module: Message, what: str, name: str, storages: _Storages) -> None:
        self.kind, self.what, self.name = _kind(module), what, name
        self.attributes = _Attributes(module, what)
        self._module, self._storages = module, storages
        self.number, self.size = self.attributes.number, self.attributes.size
        self.flag, self.sizes, self.nchw = self.attributes.flag, self.attributes.sizes, self.attributes.nchw

    def __contains__(self, name: str) -> bool:
        return name in self.attributes

    def weights(self, bias: bool) -> dict[str, Tensor]:
        """Weight and bias, from the list of parameters (since 0.6) or from fields of their own."""
        found = self._module.messages(16) if self._module.has(16) else []
        if not found:
            found = [self._module.message(number) for number in (3, 4) if self._module.has(number)]
        tensors = [self._storages.tensor(message, self.name) for message in found]
        kept = [tensor for tensor in tensors if tensor is not None]
        if len(kept) < 1 + bias:
            raise FormatError(f"{self.what} has {len(kept)} tensors in the file, it needs {1 + bias}.")
        return {"weight": kept[0], "bias": kept[1]} if bias else {"weight": kept[0]}


def _inner(module: Message) -> Message | None:
    """The one module inside a Keras-style layer, unless it is a graph of several."""
    subs = module.messages(2)
    return subs[0] if _keras(module) and len(subs) == 1 else None


def _without_reshapes(module: Message) -> Message:
    """Of a Keras-style Dense over several axes, which reshapes to rows and back, the one that computes."""
    subs = module.messages(2)
    if [_kind(sub) for sub in subs] == ["InferReshape", "Linear", "InferReshape"]:
        return subs[1]
    return module


def _edges(module: Message) -> dict[str, dict[str, int]]:
    """Which part of the table of each module before it a module of a graph reads, by its name; -1 is the whole."""
    return {
        key.removesuffix("_edges"): {before: one.whole(3) for before, one in _entries(value.message(14), 2)}
        for key, value in _entries(module, 8)
        if key.endswith("_edges")
    }


def _edge(flow: Flow, index: int, what: str) -> Flow:
    if index < 0 or isinstance(flow, Wire):
        return flow
    if not 1 <= index <= len(flow):
        raise FormatError(f"{what} reads part {index} of a table of {len(flow)}.")
    return flow[index - 1]


def _wire(flow: Flow, what: str) -> Wire:
    if isinstance(flow, list):
        raise FormatError(f"{what} is given a table of {len(flow)}, where it takes one tensor.")
    return flow


def _table(flow: Flow, what: str) -> list[Flow]:
    if isinstance(flow, Wire) or not flow:
        raise FormatError(f"{what} is given one tensor, where it takes a table of them.")
    return flow


_KINDS: dict[str, Callable[[_Reader, _Layer, Flow], Flow]] = {
    "Linear": _Reader.linear,
    **dict.fromkeys(
        ("SpatialConvolution", "SpatialShareConvolution", "SpatialDilatedConvolution"), _Reader.convolution
    ),
    "SpatialMaxPooling": _Reader.max_pooling,
    "SpatialAveragePooling": _Reader.average_pooling,
    "SpatialCrossMapLRN": _Reader.lrn,
    **dict.fromkeys(("BatchNormalization", "SpatialBatchNormalization"), _Reader.batch_norm),
    "Dropout": _Reader.dropout,
    **dict.fromkeys(("Reshape", "InferReshape", "View"), _Reader.reshape),
    "LookupTable": _Reader.lookup,
    "SpatialZeroPadding": _Reader.zero_padding,
    "PReLU": _Reader.prelu,
    **dict.fromkeys(("SoftMax", "LogSoftMax"), _Reader.soft),
    **dict.fromkeys(
        ("ReLU", "ReLU6", "Tanh", "Sigmoid", "SoftSign", "LogSigmoid", "Identity", "Input", "SoftPlus", "ELU",
         "LeakyReLU", "Threshold", "HardTanh"),
        _Reader.element,
    ),
    **dict.fromkeys(("AddConstant", "MulConstant", "Power", "Abs", "Square", "Sqrt", "Exp", "Log"), _Reader.function),
    **dict.fromkeys(("Select", "Narrow", "Transpose"), _Reader.axes),
    **dict.fromkeys(
        ("JoinTable", "SelectTable", "FlattenTable", "CAddTable", "CSubTable", "CMulTable", "CDivTable", "CMaxTable",
         "CMinTable"),
        _Reader.tables,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the input


def _inputs(reader: _Reader, root: Message, given: Sequence[int] | None) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, row's shape and dtype of each input: as given, as a Keras-style model says, or as the first layer takes."""
    first = _first(root, reader.net.what)
    if given is not None:
        if not given or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in given):
            raise ConfigError(
                "input_shape", given, "is no shape of a row", "Give sizes of 1 or more, without the batch"
            )
        return [("features", tuple(given), "int64" if first and _kind(first[0]) == "LookupTable" else "float32")]
    stated = root.message(13).wholes(3)[1:] if root.has(13) else []
    if stated and len(stated) <= 8 and all(0 < size < MAX_SIZE for size in stated):
        return [("features", tuple(stated), "float32")]
    shapes: list[tuple[int, ...]] = []
    for module in first:
        attributes = _Attributes(module, f"{reader.net.what}: layer {module.text(1) or _kind(module)!r}")
        kind, sizes = _kind(module), attributes.sizes("size")
        if kind == "Linear":
            shapes.append((attributes.size("inputSize"),))
        elif kind == "BatchNormalization":
            shapes.append((attributes.size("nOutput"),))
        elif kind == "Reshape" and sizes and min(sizes) > 0 and attributes.size("batchMode", 0, 0) != 1:
            shapes.append(tuple(sizes))
    if not first or len(shapes) != len(first):
        kind = _kind(first[0]) if first else "no layer"
        raise FormatError(
            f"{reader.net.what} does not say what shape a row has; its first layer is {kind}. "
            f"Give input_shape={'(3, 224, 224)' if kind.startswith('Spatial') else '(10,)'}."
        )
    if len(shapes) == 1:
        return [("features", shapes[0], "float32")]
    return [(f"features_{place}", shape, "float32") for place, shape in enumerate(shapes)]


def _first(module: Message, what: str, depth: int = 0) -> list[Message]:
    """The layers that see the input first, one for each input."""
    subs = module.messages(2)
    if not subs or depth > 32:
        return [module]
    if _kind(module) in ("StaticGraph", "DynamicGraph", "Graph", "Model") and _inner(module) is None:
        names = _Attributes(module, what).texts("inputNames")
        by_name = {sub.text(1): sub for sub in subs}
        return [layer for name in names if name in by_name for layer in _first(by_name[name], what, depth + 1)[:1]]
    return _first(subs[0], what, depth + 1)
