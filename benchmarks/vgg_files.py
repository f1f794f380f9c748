"""VGG16, or a smaller net of its shape, as a file of every format that kindling reads whole nets or weights from.

Writers are written out from the formats' own descriptions, apart from kindling's readers; Keras, ONNX, PyTorch and
HDF5 files come from those libraries themselves. `FORMATS` names them all: how a file is written, how it is loaded, and
how a tensor lies in it, from which follows what reading its bytes and converting them once takes. Numbers are drawn:
no instruction depends on them.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 2
"""Kernel and step of the pooling."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a net of VGG16's kind is made of."""

    blocks: tuple[tuple[int, int], ...] = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    """Convolutions and channels of each block; a pooling follows each."""
    pixels: int = 224
    hidden: int = 4096
    classes: int = 1000

    @property
    def map(self) -> tuple[int, int, int]:
        """What is flattened: channels, height, width."""
        side = self.pixels // WINDOW ** len(self.blocks)
        return self.blocks[-1][1], side, side

    def layers(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Kind, name, and shape of the weight as torch has it (empty without one), in order."""
        channels = 3
        for block, (count, width) in enumerate(self.blocks, 1):
            for place in range(1, count + 1):
                yield "conv", f"block{block}_conv{place}", (width, channels, 3, 3)
                channels = width
            yield "pool", f"block{block}_pool", ()
        yield "flatten", "flatten", ()
        yield "dense", "fc1", (self.hidden, math.prod(self.map))
        yield "dense", "fc2", (self.hidden, self.hidden)
        yield "last", "predictions", (self.classes, self.hidden)

    def weights(self, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Weight and bias by layer, float32, of a spread that keeps activations of one size."""
        rng = np.random.default_rng(seed)
        found = {}
        for _, name, shape in self.layers():
            if shape:
                weight = rng.standard_normal(shape, np.float32)
                weight *= np.float32(math.sqrt(2 / math.prod(shape[1:])))
                found[name] = weight, rng.standard_normal(shape[0], np.float32) * np.float32(0.05)
        return found

    def bytes(self) -> int:
        """Of all weights and biases, as float32."""
        return sum(4 * (math.prod(shape) + shape[0]) for _, _, shape in self.layers() if shape)

    def by_hand(self, weights: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
        """The net as one writes it in torch."""
        import torch
        from torch import nn

        def filled(layer: Any, name: str) -> Any:
            layer.weight, layer.bias = (nn.Parameter(torch.from_numpy(value)) for value in weights[name])
            return layer

        layers: list[Any] = []
        with torch.device("meta"):
            for kind, name, shape in self.layers():
                if kind == "conv":
                    layers += [filled(nn.Conv2d(shape[1], shape[0], 3, padding=1), name), nn.ReLU(inplace=True)]
                elif kind == "pool":
                    layers.append(nn.MaxPool2d(WINDOW, WINDOW))
                elif kind == "flatten":
                    layers.append(nn.Flatten())
                else:
                    layers.append(filled(nn.Linear(shape[1], shape[0]), name))
                    layers += [nn.ReLU(inplace=True)] if kind == "dense" else []
        return nn.Sequential(*layers).eval()


Weights = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to keep the net."""

    name: str
    file: str
    """What is handed to `kindling.load`; a folder where the format is one."""
    write: Callable[[Path, Shape, Weights], None]
    """Takes the path of that file."""
    load: Callable[[Path, Shape], Any]
    """The Model."""
    convolution: tuple[int, ...] = (0, 1, 2, 3)
    """Order in which torch's axes (out, in, height, width) lie in the file."""
    dense: tuple[int, ...] = (0, 1)
    """Order in which torch's axes (out, in) lie in the file."""
    dtype: str = "<f4"
    member: str | None = None
    """The packed member of a zip archive that holds the numbers."""
    data: str | None = None
    """The file with the numbers, beside `file`, where it is another."""
    prepare: Callable[[Shape], Any] | None = None
    """What is there before the clock starts."""
    full_only: bool = False
    """Only for VGG16 itself: it goes by name."""

    def plain(self, path: Path, shape: Shape) -> list[Any]:
        """Read all bytes and convert every tensor once: what loading cannot be quicker than, without tricks."""
        import torch

        file = path if self.data is None else path / self.data if path.is_dir() else path.with_name(self.data)
        data: Any
        if self.member is not None:
            with zipfile.ZipFile(file) as archive:
                data = archive.read(self.member)
        else:
            data = bytearray(file.stat().st_size)
            with file.open("rb") as stream:
                stream.readinto(data)
        at, made = 0, []
        for kind, _, sizes in shape.layers():
            for tensor in (sizes, sizes[:1]) if sizes else ():
                count = math.prod(tensor)
                array = np.frombuffer(data, self.dtype, count, at)  # as long as, if not exactly, where it is
                at += 4 * count
                if self.dtype != "<f4":
                    array = array.astype("<f4")
                value = torch.from_numpy(array if array.flags.writeable else array.view())
                order: tuple[int, ...] = ()
                if len(tensor) == 4:
                    order = self.convolution
                elif kind in ("dense", "last") and len(tensor) == 2:
                    order = self.dense
                if order and order != tuple(range(len(order))):
                    back = sorted(range(len(order)), key=order.__getitem__)
                    value = value.reshape([tensor[axis] for axis in order]).permute(back).contiguous()
                elif self.dtype == "<f4":
                    value = value.clone()
                made.append(value)
        return made


def _load(path: Path, shape: Shape) -> Any:
    import kindling as kd

    return kd.load(path)


# ------------------------------------------------------------------------------------------------------- protobuf


class Message:
    """Protobuf's binary format in pieces: arrays go to the file from where they are."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.size = 0

    def _add(self, piece: Any) -> None:
        self.pieces.append(piece)
        self.size += len(piece)

    def whole(self, field: int, value: int) -> Message:
        self._add(_varint(field << 3) + _varint(value))
        return self

    def data(self, field: int, value: Message | bytes | str | np.ndarray) -> Message:
        """A field of bytes: text, numbers, or a message."""
        if isinstance(value, Message):
            self._add(_varint(field << 3 | 2) + _varint(value.size))
            self.pieces += value.pieces
            self.size += value.size
            return self
        raw: Any = value.encode() if isinstance(value, str) else value
        raw = memoryview(np.ascontiguousarray(raw)).cast("B") if isinstance(raw, np.ndarray) else raw
        self._add(_varint(field << 3 | 2) + _varint(len(raw)))
        self._add(raw)
        return self

    def packed(self, field: int, values: Sequence[int]) -> Message:
        return self.data(field, b"".join(map(_varint, values)))

    def save(self, path: Path) -> None:
        with path.open("wb") as out:
            out.writelines(self.pieces)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# ----------------------------------------------------------------------------------------------------------- Caffe


def _prototxt(path: Path, shape: Shape) -> None:
    lines = ['name: "net"', 'input: "data"']
    lines += [f"input_dim: {size}" for size in (1, 3, shape.pixels, shape.pixels)]
    before = "data"
    for kind, name, sizes in shape.layers():
        if kind == "flatten":
            continue
        outputs = f"num_output: {sizes[0]}" if sizes else ""
        words = {
            "conv": f'"Convolution" convolution_param {{ {outputs} kernel_size: 3 pad: 1 }}',
            "pool": f'"Pooling" pooling_param {{ pool: MAX kernel_size: {WINDOW} stride: {WINDOW} }}',
        }.get(kind, f'"InnerProduct" inner_product_param {{ {outputs} }}')
        lines.append(f'layer {{ name: "{name}" bottom: "{before}" top: "{name}" type: {words} }}')
        before = name
        if kind in ("conv", "dense"):
            lines.append(f'layer {{ name: "{name}_relu" bottom: "{name}" top: "{name}" type: "ReLU" }}')
    path.write_text("\n".join(lines))


def _caffemodel(path: Path, shape: Shape, weights: Weights) -> None:
    _prototxt(path, shape)
    net = Message().data(1, "net")
    for kind, name, sizes in shape.layers():
        if sizes:
            layer = Message().data(1, name).data(2, "Convolution" if kind == "conv" else "InnerProduct")
            for values in weights[name]:
                layer.data(7, Message().data(7, Message().packed(1, values.shape)).data(5, values))
            net.data(100, layer)
    net.save(path.with_name("net.caffemodel"))


def _caffe_hdf5(path: Path, shape: Shape, weights: Weights) -> None:
    import h5py

    _prototxt(path, shape)
    with h5py.File(path.with_name("net.caffemodel.h5"), "w") as file:
        for name, values in weights.items():
            for place, value in enumerate(values):
                file.create_dataset(f"data/{name}/{place}", data=value)


def _with(weights: str) -> Callable[[Path, Shape], Any]:
    def load(path: Path, shape: Shape) -> Any:
        import kindling as kd

        return kd.load(path, weights=path.with_name(weights))

    return load


# ------------------------------------------------------------------------------------------------- ONNX, PyTorch


def _onnx(path: Path, shape: Shape, weights: Weights) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, initializers, before = [], [], "data"
    for kind, name, sizes in shape.layers():
        if sizes:
            initializers += [
                numpy_helper.from_array(value, f"{name}.{part}")
                for part, value in zip(("weight", "bias"), weights[name], strict=True)
            ]
        given = [before, f"{name}.weight", f"{name}.bias"] if sizes else [before]
        made = {
            "conv": ("Conv", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
            "pool": ("MaxPool", {"kernel_shape": [WINDOW, WINDOW], "strides": [WINDOW, WINDOW]}),
            "flatten": ("Flatten", {}),
        }.get(kind, ("Gemm", {"transB": 1}))
        nodes.append(helper.make_node(made[0], given, [name], name=name, **made[1]))
        before = name
        if kind in ("conv", "dense"):
            before = f"{name}_relu"
            nodes.append(helper.make_node("Relu", [name], [before], name=before))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, shape.pixels, shape.pixels])],
        [helper.make_tensor_value_info(before, TensorProto.FLOAT, ["N", shape.classes])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


def _pt2(path: Path, shape: Shape, weights: Weights) -> None:
    import torch

    rows = torch.export.Dim("N", min=1, max=1 << 20)
    example = torch.zeros(2, 3, shape.pixels, shape.pixels)
    program = torch.export.export(shape.by_hand(weights), (example,), dynamic_shapes=({0: rows},))
    torch.export.save(program, str(path))


def named(shape: Shape, weights: Weights) -> Any:
    """The net under its layers' names, as kindling and torchvision keep it."""
    from torch import nn

    layers = iter(shape.by_hand(weights))
    found: OrderedDict[str, Any] = OrderedDict()
    for kind, name, _ in shape.layers():
        found[name] = next(layers)
        if kind in ("conv", "dense"):
            found[f"{name}_relu"] = next(layers)
    return nn.Sequential(found).eval()


def _safetensors(path: Path, shape: Shape, weights: Weights) -> None:
    from safetensors.torch import save_file

    save_file(named(shape, weights).state_dict(), str(path))


def _pth(path: Path, shape: Shape, weights: Weights) -> None:
    import torch

    torch.save(named(shape, weights).state_dict(), path)


def _npz(path: Path, shape: Shape, weights: Weights) -> None:
    np.savez(path, **{name: value.numpy() for name, value in named(shape, weights).state_dict().items()})


def _into_model(path: Path, shape: Shape) -> Any:
    """Into a copy of a Model that is there, with other numbers."""
    import kindling as kd

    return kd.load(_model(shape), weights=path)


@cache
def _model(shape: Shape) -> Any:
    import kindling as kd

    ones = {
        name: (np.ones(sizes, np.float32), np.ones(sizes[0], np.float32)) for _, name, sizes in shape.layers() if sizes
    }
    return kd.Model.of(named(shape, ones), shape=(3, shape.pixels, shape.pixels))


def _by_name(path: Path, shape: Shape) -> Any:
    import kindling as kd

    return kd.load("vgg16", weights=path)


# ----------------------------------------------------------------------------------------------------------- Keras


def _keras_model(shape: Shape, weights: Weights) -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    layers: list[Any] = [keras.Input((shape.pixels, shape.pixels, 3))]
    for kind, name, sizes in shape.layers():
        if kind == "conv":
            layers.append(keras.layers.Conv2D(sizes[0], 3, padding="same", activation="relu", name=name))
        elif kind == "pool":
            layers.append(keras.layers.MaxPooling2D(WINDOW, name=name))
        elif kind == "flatten":
            layers.append(keras.layers.Flatten(name=name))
        else:
            activation = "relu" if kind == "dense" else None
            layers.append(keras.layers.Dense(sizes[0], activation=activation, name=name))
    net = keras.Sequential(layers)
    for name, (weight, bias) in channels_last(shape, weights).items():
        net.get_layer(name).set_weights([weight, bias])
    return net


def channels_last(shape: Shape, weights: Weights) -> Weights:
    """The weights as Keras and TensorFlow have them: (height, width, in, out), (in, out), channels flattened last."""
    found = {}
    for _, name, sizes in shape.layers():
        if not sizes:
            continue
        weight, bias = weights[name]
        if len(sizes) == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif name == "fc1":
            weight = weight.reshape(sizes[0], *shape.map).transpose(2, 3, 1, 0).reshape(sizes[1], sizes[0])
        else:
            weight = weight.T
        found[name] = np.ascontiguousarray(weight), bias
    return found


def _keras(path: Path, shape: Shape, weights: Weights) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that .h5 is the older of its formats
        _keras_model(shape, weights).save(path)


def _keras_json(path: Path, shape: Shape, weights: Weights) -> None:
    net = _keras_model(shape, weights)
    path.write_text(net.to_json())
    net.save_weights(path.with_name("net.weights.h5"))


# ------------------------------------------------------------------------------------------------------ TensorFlow

_FLOAT, _INT32, _RESOURCE = 1, 3, 20


def _dims(sizes: Sequence[int]) -> Message:
    made = Message()
    for size in sizes:
        made.data(2, Message().whole(1, size))
    return made


def _value(kind: str, value: Any) -> Message:
    """An AttrValue."""
    if kind == "ints":
        return Message().data(1, Message().packed(3, value))
    if kind == "text":
        return Message().data(2, value)
    if kind == "shape":
        return Message().data(7, _dims(value))
    if kind == "tensor":
        dtype = _INT32 if value.dtype == np.int32 else _FLOAT
        return Message().data(8, Message().whole(1, dtype).data(2, _dims(value.shape)).data(4, value))
    return Message().whole(6 if kind == "type" else 5, value)


class _Graph:
    """A GraphDef."""

    def __init__(self) -> None:
        self.message = Message()

    def node(self, name: str, op: str, *inputs: str, **attributes: tuple[str, Any]) -> str:
        made = Message().data(1, name).data(2, op)
        for source in inputs:
            made.data(3, source)
        for key, (kind, value) in attributes.items():
            made.data(5, Message().data(1, key).data(2, _value(kind, value)))
        self.message.data(1, made)
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        dtype = _INT32 if value.dtype == np.int32 else _FLOAT
        return self.node(name, "Const", dtype=("type", dtype), value=("tensor", value))

    def net(self, shape: Shape, tensor: Callable[[str, np.ndarray], str], weights: Weights) -> str:
        """The net's nodes; `tensor` gives the node of a weight."""
        f = {"T": ("type", _FLOAT)}
        row = (-1, shape.pixels, shape.pixels, 3)
        at = self.node("data", "Placeholder", dtype=("type", _FLOAT), shape=("shape", row))
        for kind, name, _ in shape.layers():
            if kind == "pool":
                window = ("ints", (1, WINDOW, WINDOW, 1))
                at = self.node(name, "MaxPool", at, ksize=window, strides=window, padding=("text", "VALID"), **f)
            elif kind == "flatten":
                rows = self.constant("flatten/shape", np.array([-1, math.prod(shape.map)], np.int32))
                at = self.node(name, "Reshape", at, rows, **f)
            else:
                kernel, bias = (
                    tensor(f"{name}/{part}", value)
                    for part, value in zip(("kernel", "bias"), weights[name], strict=True)
                )
                if kind == "conv":
                    ones = ("ints", (1, 1, 1, 1))
                    made = self.node(
                        f"{name}/product", "Conv2D", at, kernel, strides=ones, padding=("text", "SAME"), **f
                    )
                else:
                    made = self.node(f"{name}/product", "MatMul", at, kernel, **f)
                at = self.node(f"{name}/BiasAdd", "BiasAdd", made, bias, **f)
                if kind != "last":
                    at = self.node(f"{name}/Relu", "Relu", at, **f)
        return at


def _frozen(path: Path, shape: Shape, weights: Weights) -> None:
    graph = _Graph()
    graph.net(shape, graph.constant, channels_last(shape, weights))
    graph.message.save(path)


def _saved_model(path: Path, shape: Shape, weights: Weights) -> None:
    graph, kept = _Graph(), {}

    def variable(name: str, value: np.ndarray) -> str:
        kept[name] = value
        handle = graph.node(
            name, "VarHandleOp", dtype=("type", _FLOAT), shape=("shape", value.shape), shared_name=("text", name)
        )
        return graph.node(f"{name}/Read", "ReadVariableOp", handle, dtype=("type", _FLOAT))

    last = graph.net(shape, variable, channels_last(shape, weights))
    ends = {}
    for key, node in (("data", "data"), ("scores", last)):
        ends[key] = Message().data(1, key).data(2, Message().data(1, f"{node}:0").whole(2, _FLOAT))
    signature = Message().data(1, ends["data"]).data(2, ends["scores"]).data(3, "tensorflow/serving/predict")
    meta = Message().data(1, Message().data(4, "serve").data(5, "2.0")).data(2, graph.message)
    meta.data(5, Message().data(1, "serving_default").data(2, signature))
    path.mkdir()
    Message().whole(1, 1).data(2, meta).save(path / "saved_model.pb")
    (path / "variables").mkdir()
    _bundle(path / "variables" / "variables", kept)


def _bundle(prefix: Path, tensors: dict[str, np.ndarray]) -> None:
    """TensorFlow's tensor bundle: a file of numbers, and an index in LevelDB's format with one block."""
    from kindling.formats.tensorflow.variables import crc32c

    def masked(crc: int) -> bytes:
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    entries = {"": Message().whole(1, 1).data(3, Message().whole(1, 1))}
    at = 0
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as out:
        for name in sorted(tensors):
            raw = memoryview(np.ascontiguousarray(tensors[name])).cast("B")
            out.write(raw)
            entry = Message().whole(1, _FLOAT).data(2, _dims(tensors[name].shape)).whole(4, at).whole(5, len(raw))
            entry._add(_varint(6 << 3 | 5) + masked(crc32c(raw)))
            entries[name] = entry
            at += len(raw)

    file = b""

    def block(rows: dict[str, bytes]) -> bytes:
        """Adds a block to the file and gives its handle."""
        nonlocal file
        body = b""
        for key, value in rows.items():
            body += _varint(0) + _varint(len(key.encode())) + _varint(len(value)) + key.encode() + value
        body += struct.pack("<II", 0, 1) + b"\0"
        handle = _varint(len(file)) + _varint(len(body) - 1)
        file += body + masked(crc32c(body))
        return handle

    held = block({name: b"".join(map(bytes, entry.pieces)) for name, entry in entries.items()})
    nothing = block({})
    handles = nothing + block({max(entries) + "~": held})
    file += handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(file)


def _lite(path: Path, shape: Shape, weights: Weights) -> None:
    """TensorFlow Lite: a flat buffer, filled from its end."""
    import flatbuffers

    build = flatbuffers.Builder(shape.bytes() + (1 << 20))

    def table(fields: dict[int, tuple[str, Any]], size: int = 8) -> int:
        build.StartObject(size)
        for number, (kind, value) in fields.items():
            if kind == "offset":
                build.PrependUOffsetTRelativeSlot(number, value, 0)
            else:
                getattr(build, f"Prepend{kind}Slot")(number, value, 0)
        return int(build.EndObject())

    def vector(offsets: Sequence[int]) -> int:
        build.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            build.PrependUOffsetTRelative(offset)
        return int(build.EndVector())

    def numbers(values: Any, dtype: type = np.int32) -> int:
        return int(build.CreateNumpyVector(np.asarray(values, dtype)))

    buffers, tensors, operators = [table({}, 1)], [], []

    def tensor(name: str, sizes: Sequence[int], value: np.ndarray | None = None, kind: int = 0) -> int:
        place = 0
        if value is not None:
            place = len(buffers)
            build.StartVector(1, value.nbytes, 16)  # aligned, and filled as a whole
            build.head = build.head - value.nbytes
            raw = memoryview(np.ascontiguousarray(value)).cast("B")
            memoryview(build.Bytes)[build.head : build.head + value.nbytes] = raw
            buffers.append(table({0: ("offset", build.EndVector())}, 1))
        words = {0: ("offset", numbers(sizes)), 1: ("Int8", kind), 2: ("Uint32", place)}
        tensors.append(table({**words, 3: ("offset", build.CreateString(name))}, 4))
        return len(tensors) - 1

    side, channels = shape.pixels, 3
    at = first = tensor("data", (1, side, side, 3))
    for kind, name, sizes in shape.layers():
        relu = ("Int8", 1 if kind in ("conv", "dense") else 0)
        given, out = [at], (1, side, side, channels)
        if kind == "conv":
            channels = sizes[0]
            out = (1, side, side, channels)
            weight = weights[name][0].transpose(0, 2, 3, 1)
            given += [
                tensor(f"{name}/kernel", weight.shape, weight),
                tensor(f"{name}/bias", sizes[:1], weights[name][1]),
            ]
            steps = {1: ("Int32", 1), 2: ("Int32", 1), 3: relu, 4: ("Int32", 1), 5: ("Int32", 1)}
            code, options = 0, (1, table(steps, 6))
        elif kind == "pool":
            side //= WINDOW
            out = (1, side, side, channels)
            window = {field: ("Int32", WINDOW) for field in (1, 2, 3, 4)}
            code, options = 1, (5, table({0: ("Int8", 1), **window}, 6))
        elif kind == "flatten":
            out = (1, math.prod(shape.map))
            given.append(tensor("flatten/shape", (2,), np.array([-1, out[1]], np.int32), 2))
            code, options = 2, (17, table({}, 1))
        else:
            weight, bias = weights[name]
            if name == "fc1":
                weight = weight.reshape(sizes[0], *shape.map).transpose(0, 2, 3, 1).reshape(sizes)
            out = (1, sizes[0])
            given += [tensor(f"{name}/weights", sizes, weight), tensor(f"{name}/bias", sizes[:1], bias)]
            code, options = 3, (8, table({0: relu}, 4))
        at = tensor(name, out)
        words = {0: ("Uint32", code), 1: ("offset", numbers(given)), 2: ("offset", numbers([at]))}
        operators.append(table({**words, 3: ("Uint8", options[0]), 4: ("offset", options[1])}, 5))
    codes = [table({0: ("Int8", code), 3: ("Int32", code)}, 4) for code in (3, 17, 22, 9)]
    ends = {1: ("offset", numbers([first])), 2: ("offset", numbers([at]))}
    graph = table({0: ("offset", vector(tensors)), **ends, 3: ("offset", vector(operators))}, 5)
    parts = {1: ("offset", vector(codes)), 2: ("offset", vector([graph])), 4: ("offset", vector(buffers))}
    build.Finish(table({0: ("Uint32", 3), **parts}, 5), b"TFL3")
    path.write_bytes(memoryview(build.Bytes)[build.Head() :])


# ---------------------------------------------------------------------------------------- Deeplearning4j and BigDL


def _dl4j(path: Path, shape: Shape, weights: Weights) -> None:
    def typed(kind: str, package: str, **fields: Any) -> dict[str, Any]:
        return {"@class": f"org.deeplearning4j.nn.conf.{package}.{kind}", **fields}

    def activation(kind: str) -> dict[str, str]:
        return {"@class": f"org.nd4j.linalg.activations.impl.Activation{kind}"}

    layers, parts, before = [], [], {}
    window = {"kernelSize": [WINDOW, WINDOW], "stride": [WINDOW, WINDOW], "padding": [0, 0]}
    for kind, name, sizes in shape.layers():
        if kind == "pool":
            layers.append(typed("SubsamplingLayer", "layers", layerName=name, poolingType="MAX", **window))
            continue
        if kind == "flatten":
            channels, height, width = shape.map
            fields = {"inputHeight": height, "inputWidth": width, "numChannels": channels}
            before[str(len(layers))] = typed("CnnToFeedForwardPreProcessor", "preprocessor", **fields)
            continue
        weight, bias = weights[name]
        ends = {"layerName": name, "nin": sizes[1], "nout": sizes[0]}
        ends["activationFn"] = activation("Identity" if kind == "last" else "ReLU")
        if kind == "conv":
            same = {"kernelSize": [3, 3], "stride": [1, 1], "padding": [1, 1], "convolutionMode": "Truncate"}
            layers.append(typed("ConvolutionLayer", "layers", **ends, **same))
            parts += [bias, weight]
        else:  # 'f'-ordered (in, out) is torch's own order
            loss = {"@class": "org.nd4j.linalg.lossfunctions.impl.LossMSE"}
            more = {"lossFn": loss} if kind == "last" else {}
            layers.append(typed("OutputLayer" if kind == "last" else "DenseLayer", "layers", **ends, **more))
            parts += [weight, bias]
    net = {"backprop": True, "confs": [{"layer": one, "seed": 1} for one in layers], "inputPreProcessors": before}
    total = sum(part.size for part in parts)

    def words(text: str) -> bytes:
        return struct.pack(">H", len(text)) + text.encode()

    head = words("LONG_SHAPE") + struct.pack(">q", 8) + words("LONG")
    head += struct.pack(">8q", 2, 1, total, total, 1, 0, 1, ord("c"))
    head += words("MIXED_DATA_TYPES") + struct.pack(">q", total) + words("FLOAT")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("configuration.json", json.dumps(net))
        with archive.open("coefficients.bin", "w") as out:
            out.write(head)
            for part in parts:
                out.write(part.astype(">f4").tobytes())


def _bigdl(path: Path, shape: Shape, weights: Weights) -> None:
    home = "com.intel.analytics.bigdl.dllib.nn."
    storages: list[Message] = []

    def tensor(values: np.ndarray) -> Message:
        number = 100 + 2 * len(storages)
        strides = [math.prod(values.shape[k + 1 :]) for k in range(values.ndim)]

        def described(storage: Message) -> Message:
            made = Message().whole(1, 2).packed(2, values.shape).packed(3, strides).whole(4, 1)
            return made.whole(5, values.ndim).whole(6, values.size).data(8, storage).whole(9, number)

        storages.append(described(Message().whole(1, 2).data(2, values).whole(9, number + 1)))
        return described(Message().whole(1, 2).whole(9, number + 1))

    def module(kind: str, name: str, parameters: Sequence[np.ndarray] = (), **attributes: Any) -> Message:
        made = Message().data(1, name).data(7, home + kind).data(9, "2.4.0")
        for key, value in attributes.items():
            if isinstance(value, list):
                inside = Message().whole(1, 15).data(15, Message().whole(1, len(value)).packed(3, value))
            else:
                inside = Message().whole(1, 0).whole(3, value)
            made.data(8, Message().data(1, key).data(2, inside))
        if parameters:
            made.whole(15, 1)
            for values in parameters:
                made.data(16, tensor(values))
        return made

    subs = []
    for kind, name, sizes in shape.layers():
        if kind == "conv":
            weight, bias = weights[name]
            window = {"kernelW": 3, "kernelH": 3, "strideW": 1, "strideH": 1, "padW": 1, "padH": 1, "nGroup": 1}
            ends = {"nInputPlane": sizes[1], "nOutputPlane": sizes[0]}
            subs.append(module("SpatialConvolution", name, (weight[None], bias), **ends, **window))
        elif kind == "pool":
            subs.append(module("SpatialMaxPooling", name, kW=WINDOW, kH=WINDOW, dW=WINDOW, dH=WINDOW, padW=0, padH=0))
        elif kind == "flatten":
            subs.append(module("Reshape", name, size=[math.prod(shape.map)], batchMode=0))
        else:
            subs.append(module("Linear", name, weights[name], inputSize=sizes[1], outputSize=sizes[0]))
        if kind in ("conv", "dense"):
            subs.append(module("ReLU", f"{name}_relu"))
    root = module("Sequential", "net")
    for sub in subs:
        root.data(2, sub)
    named = Message().data(1, "global_storage")
    for storage in storages:
        key = storages.index(storage)
        value = Message().whole(1, 10).data(10, storage)
        named.data(2, Message().data(1, str(100 + 2 * key)).data(2, value))
    root.data(8, Message().data(1, "global_storage").data(2, Message().whole(1, 14).data(14, named)))
    root.save(path)


def _load_rows(path: Path, shape: Shape) -> Any:
    import kindling as kd

    return kd.load(path, input_shape=(3, shape.pixels, shape.pixels))


LAST = {"convolution": (2, 3, 1, 0), "dense": (1, 0)}
"""How Keras and TensorFlow keep weights."""
FORMATS = {
    made.name: made
    for made in (
        Format(name="Keras .keras", file="net.keras", write=_keras, load=_load, **LAST),
        Format(name="Keras .h5", file="net.h5", write=_keras, load=_load, **LAST),
        Format(name="Keras JSON and .weights.h5", file="net.json", write=_keras_json, load=_with("net.weights.h5"),
               data="net.weights.h5", **LAST),
        Format(name="TensorFlow frozen .pb", file="net.pb", write=_frozen, load=_load, **LAST),
        Format(name="TensorFlow SavedModel", file="net", write=_saved_model, load=_load,
               data="variables/variables.data-00000-of-00001", **LAST),
        Format(name="TensorFlow Lite", file="net.tflite", write=_lite, load=_load, convolution=(0, 2, 3, 1)),
        Format(name="Deeplearning4j zip", file="net.zip", write=_dl4j, load=_load_rows, dtype=">f4",
               member="coefficients.bin"),
        Format(name="BigDL", file="net.bigdl", write=_bigdl, load=_load_rows),
        Format(name="Caffe .caffemodel", file="net.prototxt", write=_caffemodel, load=_with("net.caffemodel"),
               data="net.caffemodel"),
        Format(name="Caffe HDF5", file="net.prototxt", write=_caffe_hdf5, load=_with("net.caffemodel.h5"),
               data="net.caffemodel.h5"),
        Format(name="ONNX", file="net.onnx", write=_onnx, load=_load),
        Format(name="PyTorch .pt2", file="net.pt2", write=_pt2, load=_load),
        Format(name="safetensors, into a Model", file="net.safetensors", write=_safetensors, load=_into_model,
               prepare=_model),
        Format(name=".pth, into a Model", file="net.pth", write=_pth, load=_into_model, prepare=_model),
        Format(name=".npz, into a Model", file="net.npz", write=_npz, load=_into_model, prepare=_model),
        Format(name="safetensors, by name", file="net.safetensors", write=_safetensors, load=_by_name, full_only=True),
    )
}  # fmt: skip
"""By name, in the order of the tables."""
