"""Old spellings of a net brought to today's: V0 and V1 layers, `input` with its dimensions, old data parameters.

After `upgrade` there are only LayerParameter messages and inputs with shapes, as Caffe's own `upgrade_proto.cpp` makes
them. Which layers belong to a phase is decided in `select.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kindling.errors import FormatError, did_you_mean
from kindling.formats.caffe.schema import Message, messages, where

_TYPES_V1 = {
    "ABSVAL": "AbsVal", "ACCURACY": "Accuracy", "ARGMAX": "ArgMax", "BNLL": "BNLL", "CONCAT": "Concat",
    "CONTRASTIVE_LOSS": "ContrastiveLoss", "CONVOLUTION": "Convolution", "DATA": "Data",
    "DECONVOLUTION": "Deconvolution", "DROPOUT": "Dropout", "DUMMY_DATA": "DummyData",
    "EUCLIDEAN_LOSS": "EuclideanLoss", "ELTWISE": "Eltwise", "EXP": "Exp", "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "HINGE_LOSS": "HingeLoss", "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData", "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct", "LRN": "LRN",
    "MEMORY_DATA": "MemoryData", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss", "MVN": "MVN",
    "POOLING": "Pooling", "POWER": "Power", "RELU": "ReLU", "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss", "SILENCE": "Silence", "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "SPLIT": "Split", "SLICE": "Slice", "TANH": "TanH",
    "WINDOW_DATA": "WindowData", "THRESHOLD": "Threshold",
}  # fmt: skip
_TYPES_V0 = {
    "accuracy": "Accuracy", "bnll": "BNLL", "concat": "Concat", "conv": "Convolution", "data": "Data",
    "dropout": "Dropout", "euclidean_loss": "EuclideanLoss", "flatten": "Flatten", "hdf5_data": "HDF5Data",
    "hdf5_output": "HDF5Output", "im2col": "Im2col", "images": "ImageData", "infogain_loss": "InfogainLoss",
    "innerproduct": "InnerProduct", "lrn": "LRN", "multinomial_logistic_loss": "MultinomialLogisticLoss",
    "pool": "Pooling", "relu": "ReLU", "sigmoid": "Sigmoid", "softmax": "Softmax", "softmax_loss": "SoftmaxWithLoss",
    "split": "Split", "tanh": "TanH", "window_data": "WindowData",
}  # fmt: skip
_HOMES_V0 = {
    "Convolution": "convolution_param", "InnerProduct": "inner_product_param", "Pooling": "pooling_param",
    "Dropout": "dropout_param", "LRN": "lrn_param", "Data": "data_param", "HDF5Data": "hdf5_data_param",
    "ImageData": "image_data_param", "WindowData": "window_data_param", "InfogainLoss": "infogain_loss_param",
    "Concat": "concat_param",
}  # fmt: skip
_NAMES_V0 = {
    "biasterm": "bias_term", "kernelsize": "kernel_size", "batchsize": "batch_size", "shuffle_images": "shuffle",
    "det_fg_threshold": "fg_threshold", "det_bg_threshold": "bg_threshold", "det_fg_fraction": "fg_fraction",
    "det_context_pad": "context_pad", "det_crop_mode": "crop_mode",
}  # fmt: skip
_TRANSFORM_V0 = {"scale": "scale", "meanfile": "mean_file", "cropsize": "crop_size", "mirror": "mirror"}
_KEPT_V0 = frozenset({"name", "type", "blobs", "blobs_lr", "weight_decay", "hdf5_output_param"})
_OLD_TRANSFORMS = {"Data": "data_param", "ImageData": "image_data_param", "WindowData": "window_data_param"}


@dataclass(frozen=True, slots=True)
class Spec:
    """A net in today's spelling."""

    name: str
    layers: list[Message]
    inputs: list[tuple[str, tuple[int, ...] | None]] = field(default_factory=list)
    """Names and shapes of the inputs that the net itself names, without an Input layer."""
    state: Message | None = None
    what: str = "the net"
    """What to call the file in messages."""


def upgrade(net: Message, what: str = "the net") -> Spec:
    """The net in today's spelling; `net` itself is used up.

    Raises: FormatError, for layers of unknown old types, and for old and new layers in one file.

    >>> from kindling.formats.caffe.prototxt import parse
    >>> old = parse('input: "x" input_dim: 1 input_dim: 3 input_dim: 8 input_dim: 8 layers { name: "r" type: RELU }')
    >>> spec = upgrade(old)
    >>> spec.inputs, spec.layers[0].get("type")
    ([('x', (1, 3, 8, 8))], 'ReLU')
    """
    old, new = net.all("layers"), net.all("layer")
    if old and new:
        raise FormatError(
            f"{what} has both old `layers`{where(old[0].line)} and new `layer`{where(new[0].line)}, not one kind."
        )
    layers = _upgrade_v1(_upgrade_padding(old, what), what) if old else new
    for layer in layers:
        _upgrade_transform(layer)
    return Spec(net.get("name") or "", layers, _inputs(net, what), net.get("state") if net.has("state") else None, what)


def _inputs(net: Message, what: str) -> list[tuple[str, tuple[int, ...] | None]]:
    names, dims = net.all("input"), net.all("input_dim")
    shapes: list[tuple[int, ...]] = [tuple(shape.all("dim")) for shape in net.all("input_shape")]
    if dims and shapes:
        raise FormatError(f"{what} gives its inputs both input_shape and input_dim{where(net.line_of('input_dim'))}.")
    if dims:
        if len(dims) % 4:
            raise FormatError(
                f"{what} has {len(dims)} input_dim{where(net.line_of('input_dim'))}, not four for each input."
            )
        shapes = [tuple(dims[at : at + 4]) for at in range(0, len(dims), 4)]
    if len(shapes) == 1 < len(names):
        shapes *= len(names)
    if shapes and len(shapes) != len(names):
        raise FormatError(f"{what} has {len(names)} inputs and {len(shapes)} shapes{where(net.line_of('input'))}.")
    return [(name, shapes[place] if shapes else None) for place, name in enumerate(names)]


def _upgrade_v1(layers: list[Message], what: str) -> list[Message]:
    made = []
    for old in layers:
        inner = old.get("layer") if old.has("layer") else None
        if inner is not None:
            old = _from_v0(old, inner, what)
        new = Message("LayerParameter", old.line)
        for name, values in old.values.items():
            if name in messages()["LayerParameter"] and name not in ("type", "param"):
                new.put(name, *values)
                new.lines[name] = old.lines.get(name, 0)
            elif name.endswith("_param"):  # somebody's own, kept for registered layers
                new.put(name, *values)
        if old.has("type"):
            kind = old.get("type")
            new.put("type", _TYPES_V1.get(kind, kind))
            new.lines["type"] = old.line_of("type")
        names, modes = old.all("param"), old.all("blob_share_mode")
        rates, decays = old.all("blobs_lr"), old.all("weight_decay")
        for place in range(max(map(len, (names, modes, rates, decays)))):
            spec = Message("ParamSpec", old.line)
            for key, values in (("name", names), ("share_mode", modes), ("lr_mult", rates), ("decay_mult", decays)):
                if place < len(values):
                    spec.put(key, values[place])
            new.add("param", spec)
        made.append(new)
    return made


def _from_v0(connection: Message, inner: Message, what: str) -> Message:
    """A V0 layer as a V1 layer; its type is already today's."""
    made = Message("V1LayerParameter", connection.line)
    made.put("bottom", *connection.all("bottom"))
    made.put("top", *connection.all("top"))
    kind = inner.get("type")
    if kind not in _TYPES_V0:
        raise FormatError(
            f"{what}: layer {inner.get('name')!r}{where(inner.line)} is of the unknown old type {kind!r}."
            f"{did_you_mean(str(kind), _TYPES_V0)}"
        )
    made.put("type", _TYPES_V0[kind])
    home = _HOMES_V0.get(_TYPES_V0[kind])
    for name, values in inner.values.items():
        if name == "type":
            continue
        if name in _KEPT_V0:
            made.put(name, *values)
        elif name in _TRANSFORM_V0:
            _child(made, "transform_param").put(_TRANSFORM_V0[name], *values)
        else:
            name = _NAMES_V0.get(name, name)
            target = messages()["V1LayerParameter"][home].type if home is not None else ""
            if home is None or name not in messages()[target]:
                raise FormatError(
                    f"{what}: layer {inner.get('name')!r}{where(inner.line)} of old type {kind!r} has no {name!r}."
                )
            _child(made, home).put(name, *values)
    return made


def _child(parent: Message, name: str) -> Message:
    if not parent.has(name):
        parent.put(name, parent.get(name))
    child = parent.get(name)
    assert isinstance(child, Message)
    return child


def _upgrade_padding(layers: list[Message], what: str) -> list[Message]:
    """V0's padding layers become the padding of the layers that read them."""
    made: list[Message] = []
    source: dict[str, Message] = {}
    for connection in layers:
        inner = connection.get("layer") if connection.has("layer") else None
        padding = inner is not None and inner.get("type") == "padding"
        if not padding:
            made.append(connection)
        for bottom in connection.all("bottom"):
            above = source.get(bottom)
            if above is None or above.get("layer").get("type") != "padding":
                continue
            if (
                inner is None
                or inner.get("type") not in ("conv", "pool")
                or len(connection.all("bottom")) != 1
                or len(above.all("bottom")) != 1
            ):
                raise FormatError(f"{what}: the padding layer{where(above.line)} feeds more than one convolution.")
            inner.put("pad", above.get("layer").get("pad"))
            connection.put("bottom", above.all("bottom")[0])
        for top in connection.all("top"):
            source[top] = connection
    return made


def _upgrade_transform(layer: Message) -> None:
    home = _OLD_TRANSFORMS.get(layer.get("type") or "")
    if home is None or not layer.has(home):
        return
    parameters = layer.get(home)
    for name in ("scale", "mean_file", "crop_size", "mirror"):
        if parameters.has(name):
            _child(layer, "transform_param").put(name, parameters.get(name))
            parameters.values.pop(name)
