"""The JSON that describes a Keras model, of Keras 1 to 3, in one shape: layers, and what each is called on.

Nothing in it is run. Names of Keras 1 become those of later versions. Sources: `Functional.from_config`,
`Sequential.from_config`, `serialization_lib` of Keras 3; `legacy_interfaces` of Keras 2 for the names of Keras 1.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kindling.errors import FormatError

MAX_JSON_BYTES = 32 << 20
MAX_LAYERS = 10_000
MAX_DEPTH = 16
_MODELS = ("Sequential", "Functional", "Model")

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor: output `tensor` of call number `call` of a layer."""

    layer: str
    call: int
    tensor: int


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a layer; tensors among the arguments are `Ref`s."""

    args: tuple[Any, ...]
    kwargs: Fields = field(default_factory=dict)

    @property
    def refs(self) -> list[Ref]:
        """Every tensor that the call is given."""
        return list(_refs([*self.args, *self.kwargs.values()]))


@dataclass(slots=True)
class Layer:
    """A layer, an operation of `keras.ops`, or a whole model inside the model."""

    name: str
    kind: str
    fields: Fields
    module: str = ""
    calls: list[Call] = field(default_factory=list)
    model: Net | None = None
    """Its own layers, where it is a model."""
    row: tuple[int | None, ...] | None = None
    """What it is given, where it says so."""
    inner: Layer | None = None
    """The layer inside a wrapper, once it was looked at."""

    @property
    def is_operation(self) -> bool:
        """Whether it is a function of `keras.ops`, which no layer list of Keras counts."""
        return self.module.startswith("keras.src.ops")


@dataclass(slots=True)
class Net:
    """Layers in Keras's order, and which tensors go in and out."""

    name: str
    kind: str
    layers: list[Layer]
    inputs: list[Ref]
    outputs: list[Ref]


def parse(text: str | bytes, what: str) -> Fields:
    """The JSON object in a text.

    Raises: FormatError.
    """
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(f"{what} describes its net in {len(text):,} bytes, which are too many.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is no JSON: {str(error)[:100]}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{what} holds a {type(found).__name__}, not the description of a model.")
    return found


def read_net(data: Fields, what: str, depth: int = 0) -> Net:
    """A model's description.

    Args:
        data: `{"class_name": ..., "config": ...}`.
    Raises: FormatError, for what is no description, and for models that are code (subclasses of `Model`).

    >>> dense = {"class_name": "Dense", "config": {"name": "d", "units": 2, "batch_input_shape": [None, 3]}}
    >>> net = read_net({"class_name": "Sequential", "config": {"name": "s", "layers": [dense]}}, "x.json")
    >>> [(layer.name, layer.kind) for layer in net.layers], net.outputs
    ([('s_input', 'InputLayer'), ('d', 'Dense')], [Ref(layer='d', call=0, tensor=0)])
    """
    kind, config = data.get("class_name"), data.get("config")
    if depth > MAX_DEPTH:
        raise FormatError(f"{what} nests models deeper than {MAX_DEPTH}, which is refused.")
    if isinstance(config, list):  # Keras 1 and early 2: the layers themselves
        config = {"layers": config}
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"{what} does not describe a model: it has no class_name or no config.")
    if not isinstance(config.get("layers"), list):
        raise FormatError(
            f"{what} is a {kind[:60]}, whose layers are written in Python and not in the file. "
            "Sequential and functional models are read; export this one to ONNX."
        )
    if len(config["layers"]) > MAX_LAYERS:
        raise FormatError(f"{what} has more than {MAX_LAYERS:,} layers, which are refused.")
    name = str(config.get("name") or "model")
    layers = [_layer(entry, place, what, depth) for place, entry in enumerate(config["layers"])]
    if "input_layers" not in config and "output_layers" not in config:
        return _sequential(name, kind, layers, config, what)
    known: dict[str, Layer] = {}
    for layer, entry in zip(layers, config["layers"], strict=True):
        if layer.name in known:
            raise FormatError(f"{what} has two layers called {layer.name[:80]!r}.")
        known[layer.name] = layer
        layer.calls = [
            _call(node, f"{what}: layer {layer.name[:80]!r}") for node in _list(entry.get("inbound_nodes"), what)
        ]
        if layer.kind == "InputLayer":
            layer.calls = [Call(())]
    inputs, outputs = (_tensors(config.get(side), what) for side in ("input_layers", "output_layers"))
    _count_from_zero(layers, config["layers"], outputs)
    for ref in (*inputs, *outputs, *(ref for layer in layers for call in layer.calls for ref in call.refs)):
        if ref.layer not in known:
            raise FormatError(f"{what} uses the output of a layer {ref.layer[:80]!r}, which it does not have.")
    if not inputs or not outputs:
        raise FormatError(f"{what} has no input or no output.")
    return Net(name, kind, layers, inputs, outputs)


def _count_from_zero(layers: list[Layer], entries: list[Any], outputs: list[Ref]) -> None:
    """tf.keras counts the call that made a model before the calls in the net; here the first call in the net is 0."""
    old = all(not isinstance(node, dict) for entry in entries for node in entry.get("inbound_nodes") or ())
    every = [ref for layer in layers for call in layer.calls for ref in call.refs] + outputs
    for layer in layers:
        seen = {ref.call for ref in every if ref.layer == layer.name}
        if not old or layer.model is None or not seen or 0 in seen or layer.model.layers[0].kind != "InputLayer":
            continue

        def shift(value: Any, name: str = layer.name) -> Any:
            if isinstance(value, Ref):
                return Ref(value.layer, value.call - 1, value.tensor) if value.layer == name else value
            if isinstance(value, list):
                return [shift(part) for part in value]
            return value

        for other in layers:
            other.calls = [
                Call(tuple(shift(arg) for arg in call.args), {key: shift(v) for key, v in call.kwargs.items()})
                for call in other.calls
            ]
        outputs[:] = [shift(ref) for ref in outputs]


def _sequential(name: str, kind: str, layers: list[Layer], config: Fields, what: str) -> Net:
    """A chain, with an input in front of it."""
    if not layers:
        raise FormatError(f"{what} has no layers.")
    if layers[0].kind != "InputLayer":
        first, sequential = layers[0], config.get("build_input_shape") or config.get("batch_input_shape")
        row = first.row or (_row(sequential) if isinstance(sequential, list) else None)
        dtype = first.fields.get("input_dtype") or first.fields.get("dtype")
        inner = first.model
        while row is None and inner is not None:  # a model in front says what goes in
            head = inner.layers[0]
            row, dtype, inner = head.row, head.fields.get("dtype"), head.model
        layers = [Layer(f"{name}_input", "InputLayer", {"dtype": dtype}, row=row), *layers]
    layers[0].calls = [Call(())]
    for before, layer in itertools.pairwise(layers):
        layer.calls = [Call((Ref(before.name, 0, 0),))]
    if len({layer.name for layer in layers}) != len(layers):
        raise FormatError(f"{what} has two layers of one name.")
    return Net(name, kind, layers, [Ref(layers[0].name, 0, 0)], [Ref(layers[-1].name, 0, 0)])


def _layer(entry: Any, place: int, what: str, depth: int) -> Layer:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise FormatError(f"{what}: entry {place} of its layers is no layer.")
    kind, raw = entry["class_name"], entry.get("config")
    module = str(entry.get("module") or "")
    inner = None
    if kind in _MODELS or (isinstance(raw, dict) and isinstance(raw.get("layers"), list)):
        name = str(entry.get("name") or (raw.get("name") if isinstance(raw, dict) else None) or f"layer{place}")
        inner = read_net(entry, f"{what}: model {name[:80]!r}", depth + 1)
        return Layer(name, inner.kind, raw if isinstance(raw, dict) else {}, module, model=inner)
    if not isinstance(raw, dict):
        raise FormatError(f"{what}: entry {place} of its layers has no config.")
    kind, fields = upgraded(kind, raw)
    shape = fields.get("batch_shape", fields.get("batch_input_shape"))
    built = entry.get("build_config")
    if shape is None and isinstance(built, dict):
        shape = built.get("input_shape")
    row = _row(shape) if isinstance(shape, list) and not any(isinstance(part, list) for part in shape) else None
    return Layer(str(fields.get("name") or entry.get("name") or f"layer{place}"), kind, fields, module, row=row)


def inner_layer(outer: Layer, key: str, what: str) -> Layer:
    """The layer inside a wrapper such as TimeDistributed: the same one each time."""
    if outer.inner is None:
        outer.inner = _layer(outer.fields.get(key), 0, what, 0)
    return outer.inner


def _row(shape: Sequence[Any]) -> tuple[int | None, ...]:
    row = tuple(shape[1:])
    if len(row) > 8 or any(size is not None and (isinstance(size, bool) or not isinstance(size, int)) for size in row):
        raise FormatError(f"an input of shape {str(shape)[:80]} is none.")
    return row


def _list(value: Any, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise FormatError(f"{what} has {str(value)[:60]!r} where a list belongs.")
    return value


def _call(node: Any, what: str) -> Call:
    if isinstance(node, dict):  # Keras 3
        args, kwargs = _list(node.get("args"), what), node.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise FormatError(f"{what} is called with {str(kwargs)[:60]!r}.")
        return Call(tuple(_value(arg, what) for arg in args), {str(k): _value(v, what) for k, v in kwargs.items()})
    # Keras 1 and 2: a list of [layer, call, tensor] or [layer, call, tensor, keyword arguments]
    refs: list[Ref] = []
    keywords: dict[str, Any] = {}
    for entry in _list(node, what):
        if not isinstance(entry, list) or len(entry) not in (3, 4):
            raise FormatError(f"{what} is called with {str(entry)[:60]!r}, which names no tensor.")
        refs.append(_ref(entry[:3], what))
        if len(entry) == 4 and isinstance(entry[3], dict):
            keywords |= {str(key): _old_value(value, what) for key, value in entry[3].items()}
    return Call((refs[0] if len(refs) == 1 else refs,), keywords)


def _value(value: Any, what: str, depth: int = 0) -> Any:
    if depth > 8:
        raise FormatError(f"{what} is called with lists deeper than 8.")
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__" and isinstance(value.get("config"), dict):
            return _ref(value["config"].get("keras_history"), what)
        return {key: _value(part, what, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_value(part, what, depth + 1) for part in value]
    return value


def _old_value(value: Any, what: str) -> Any:
    if isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str) and _whole(value[1], value[2]):
        return _ref(value[:3], what)
    if isinstance(value, list):
        return [_old_value(part, what) if isinstance(part, list) else part for part in value]
    return value


def _whole(*values: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def _ref(value: Any, what: str) -> Ref:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str) or not _whole(*value[1:]):
        raise FormatError(f"{what} is given {str(value)[:60]!r}, which names no tensor.")
    return Ref(*value)


def _tensors(value: Any, what: str) -> list[Ref]:
    """Inputs or outputs: one tensor, a list of them, or a dict."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        value = [value]
    return [_ref(entry[:3] if isinstance(entry, list) else entry, what) for entry in _list(value, what)]


def _refs(values: Any) -> Any:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, list | tuple):
            yield from _refs(value)
        elif isinstance(value, dict):
            yield from _refs(value.values())


# ------------------------------------------------------------------------------------------------ names of Keras 1

_KINDS = {
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "Deconvolution2D": "Conv2DTranspose",
    "Convolution1DTranspose": "Conv1DTranspose",
    "Convolution2DTranspose": "Conv2DTranspose",
    "Convolution3DTranspose": "Conv3DTranspose",
    "SeparableConvolution1D": "SeparableConv1D",
    "SeparableConvolution2D": "SeparableConv2D",
    "MaxPool1D": "MaxPooling1D",
    "MaxPool2D": "MaxPooling2D",
    "MaxPool3D": "MaxPooling3D",
    "AvgPool1D": "AveragePooling1D",
    "AvgPool2D": "AveragePooling2D",
    "AvgPool3D": "AveragePooling3D",
    "GlobalMaxPool1D": "GlobalMaxPooling1D",
    "GlobalMaxPool2D": "GlobalMaxPooling2D",
    "GlobalMaxPool3D": "GlobalMaxPooling3D",
    "GlobalAvgPool1D": "GlobalAveragePooling1D",
    "GlobalAvgPool2D": "GlobalAveragePooling2D",
    "GlobalAvgPool3D": "GlobalAveragePooling3D",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "LSTMV1": "LSTM",
    "LSTMV2": "LSTM",
    "GRUV1": "GRU",
    "GRUV2": "GRU",
}
_FIELDS = {
    "border_mode": "padding",
    "subsample": "strides",
    "subsample_length": "strides",
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "atrous_rate": "dilation_rate",
    "bias": "use_bias",
    "init": "kernel_initializer",
    "pool_length": "pool_size",
    "stride": "strides",
    "inner_activation": "recurrent_activation",
    "inner_init": "recurrent_initializer",
}
_MERGES = {
    "ave": "Average", "concat": "Concatenate", "cos": "Dot", "dot": "Dot", "max": "Maximum", "mul": "Multiply",
    "sum": "Add",
}  # fmt: skip


def upgraded(kind: str, fields: Fields) -> tuple[str, Fields]:
    """A layer of Keras 1 under the names of later versions; others as they are.

    Raises: FormatError, for Theano's order of axes, whose kernels are turned.

    >>> upgraded("Convolution2D", {"nb_filter": 8, "nb_row": 3, "nb_col": 3, "border_mode": "same"})
    ('Conv2D', {'filters': 8, 'padding': 'same', 'kernel_size': [3, 3]})
    """
    kind = _KINDS.get(kind, kind)
    new = {_FIELDS.get(key, key): value for key, value in fields.items() if not key.startswith(("nb_row", "nb_col"))}
    sides = [fields[key] for key in ("kernel_dim1", "kernel_dim2", "kernel_dim3", "nb_row", "nb_col") if key in fields]
    if sides:
        new["kernel_size"] = sides
    order = new.pop("dim_ordering", None)
    if order == "th":
        raise FormatError(
            f"layer {str(fields.get('name'))[:80]!r} is in Theano's order of axes (Keras 1, dim_ordering='th'), "
            "which is not read. Convert the model with Keras 2 first."
        )
    if order == "tf":
        new["data_format"] = "channels_last"
    if "output_dim" in new:
        new["output_dim" if kind == "Embedding" else "units"] = new["output_dim"]
    if kind.startswith(("Dropout", "SpatialDropout", "GaussianDropout")) and "p" in new:
        new["rate"] = new.pop("p")
    if kind == "GaussianNoise" and "sigma" in new:
        new["stddev"] = new.pop("sigma")
    if kind == "Merge":
        mode = str(new.get("mode"))
        if mode not in _MERGES:
            raise FormatError(f"layer {str(fields.get('name'))[:80]!r} merges by {mode[:60]!r}, which is not read.")
        kind, new["axis"], new["axes"] = _MERGES[mode], new.get("concat_axis", -1), new.get("dot_axes", -1)
        new["normalize"] = mode == "cos"
    return kind, new
