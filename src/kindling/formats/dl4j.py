"""Reader of Deeplearning4j's zips: MultiLayerNetwork and ComputationGraph, as `ModelSerializer` 0.8 to 1.0 writes them.

`configuration.json` names the layers, `coefficients.bin` holds every parameter in one vector (weights 'f'-ordered,
those of convolutions 'c'-ordered), `normalizer.bin` the preparation, `updaterState.bin` the optimizer's. Up to
1.0.0-alpha the JSON names types by a wrapper object, later by `@class`. Sources: ModelSerializer.java,
LegacyJsonFormat.java, the ParamInitializers and layer classes of deeplearning4j-nn. ND4J's arrays are in `nd4j.py`,
layers that torch lacks in `kindling.nets.layers_dl4j`, the optimizer's state in `dl4j_updater.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import operator
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.assemble import Assembly, Wire, valid_name
from kindling.formats.files import file_digest
from kindling.formats.models import Imported, Peek
from kindling.formats.nd4j import Vector, exactly, open_vector, read_array, read_text
from kindling.formats.zipped import Zipped, brief, open_zip
from kindling.nets.layers_dl4j import ElementActivation, L2Normalize, SequenceLSTM
from kindling.prepare import ArrayStep, LabelStep, Preparation, ScaledArrayStep, Step

NAME = "Deeplearning4j"
CONFIGURATION, COEFFICIENTS = "configuration.json", "coefficients.bin"
NORMALIZER, UPDATER = "normalizer.bin", "updaterState.bin"
MAX_JSON_BYTES = 32 << 20
MAX_NORMALIZER_BYTES = 64 << 20
_MAX_SIZE = 2**31

Fields = Mapping[str, Any]

# Names that LegacyJsonFormat.java gives to classes; what is not here has its class's own name.
_WRAPPED_LAYERS = {
    "autoEncoder": "AutoEncoder",
    "RBM": "RBM",
    "convolution": "ConvolutionLayer",
    "convolution1d": "Convolution1DLayer",
    "gravesLSTM": "GravesLSTM",
    "gravesBidirectionalLSTM": "GravesBidirectionalLSTM",
    "output": "OutputLayer",
    "rnnoutput": "RnnOutputLayer",
    "loss": "LossLayer",
    "dense": "DenseLayer",
    "subsampling": "SubsamplingLayer",
    "subsampling1d": "Subsampling1DLayer",
    "batchNormalization": "BatchNormalization",
    "localResponseNormalization": "LocalResponseNormalization",
    "embedding": "EmbeddingLayer",
    "activation": "ActivationLayer",
    "dropout": "DropoutLayer",
    "GlobalPooling": "GlobalPoolingLayer",
    "zeroPadding": "ZeroPaddingLayer",
}
_WRAPPED_PREPROCESSORS = {
    "cnnToFeedForward": "CnnToFeedForwardPreProcessor",
    "cnnToRnn": "CnnToRnnPreProcessor",
    "composableInput": "ComposableInputPreProcessor",
    "feedForwardToCnn": "FeedForwardToCnnPreProcessor",
    "feedForwardToRnn": "FeedForwardToRnnPreProcessor",
    "rnnToFeedForward": "RnnToFeedForwardPreProcessor",
    "rnnToCnn": "RnnToCnnPreProcessor",
}
_DENSE = ("DenseLayer", "OutputLayer", "AutoEncoder", "RBM")
_RECURRENT = ("LSTM", "GravesLSTM", "GravesBidirectionalLSTM", "Bidirectional", "RnnOutputLayer")


def matches(peek: Peek) -> bool:
    """Whether this is a zip with the members that ModelSerializer writes."""
    return CONFIGURATION in peek.members and COEFFICIENTS in peek.members


def read(
    path: Path,
    *,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
    scale: float | None = None,
    keep_activation: bool = False,
) -> Imported:
    """The model in a Deeplearning4j zip.

    A last softmax (or the sigmoid of a single output) with a classification loss is left to prediction, as kindling's
    models give scores: the labels are then the numbers of the classes, unless `labels` names them.

    Args:
        input_shape: one row's shape without the batch axis, where the file does not state it: channels, height, width
            for a convolutional net, features and time steps for a recurrent one. A mapping by input name for a
            ComputationGraph with several inputs.
        labels: class names in the order of the outputs.
        scale: the inputs are multiplied by it, where the file states no normalizer: 1/255 for a net that was trained
            on pixels of 0 to 1.
        keep_activation: keep the last activation in the net, which then gives what Deeplearning4j gives, and no labels.
    Raises: FormatError, for a damaged file, a layer that is not known here, and an input shape that is needed.
    """
    with open_zip(path) as zipped:
        conf = read_configuration(zipped)
        normalizer = _normalizer(zipped)
        has_state = UPDATER in zipped
        if scale is not None:
            if normalizer is not None:
                raise ConfigError("scale", scale, f"is said twice: {path} has a {NORMALIZER}", "Leave it out")
            normalizer = _Scaling(f"multiplied by {scale}", np.zeros(1), np.full(1, float(scale)), 0.0)
        with open_parameters(zipped) as parameters:
            builder, outputs, kind = build(path, conf, parameters, input_shape)
    return _imported(
        path, builder, outputs, normalizer, labels, keep_activation, _about(conf, kind, builder, has_state)
    )


def build(
    path: Path, conf: Fields, parameters: Parameters, input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> tuple[Builder, dict[str, Flow], str]:
    """The net that a configuration describes, its outputs by name, and whether it is a network or a graph.

    Raises: FormatError, when the parameters are not as many as its layers take.
    """
    builder = Builder(Assembly(str(path)), parameters)
    if "vertices" in conf and "networkInputs" in conf:
        outputs, kind = _graph(builder, conf, input_shape), "ComputationGraph"
    elif "confs" in conf:
        outputs, kind = _network(builder, conf, input_shape), "MultiLayerNetwork"
    else:
        raise FormatError(
            f"{path}: {CONFIGURATION} describes neither a MultiLayerNetwork ('confs') nor a ComputationGraph "
            f"('vertices'); it has {', '.join(sorted(map(str, conf))[:6]) or 'nothing'}."
        )
    parameters.done()
    return builder, outputs, kind


# ------------------------------------------------------------------------------------------------------ the archive


def read_configuration(zipped: Zipped) -> Fields:
    """The JSON that describes the net."""
    raw = zipped.read(CONFIGURATION, MAX_JSON_BYTES)
    try:
        conf = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{zipped.path}: {CONFIGURATION} is no JSON: {brief(error)}.") from error
    if not isinstance(conf, dict):
        raise FormatError(f"{zipped.path}: {CONFIGURATION} holds a {type(conf).__name__}, not an object.")
    return conf


@contextlib.contextmanager
def open_parameters(zipped: Zipped) -> Iterator[Parameters]:
    """The parameters, read from the archive as they are taken."""
    size = zipped.size(COEFFICIENTS)
    where = f"{zipped.path}: {COEFFICIENTS}"
    if size == 0:  # a net without parameters, marked by a member `noParams.marker`
        yield Parameters(np.empty(0, np.float32), str(zipped.path))
        return
    with zipped.open(COEFFICIENTS) as stream:
        yield Parameters(open_vector(stream, where, size), str(zipped.path))
        if stream.read(1):
            raise FormatError(f"{where} goes on behind its one array.")


@dataclass(frozen=True, slots=True)
class Taken:
    """Where one parameter lies in the vector of all, and whose it is."""

    layer: str
    fields: Fields
    role: str
    start: int
    count: int


class Parameters:
    """The one vector of all parameters, taken layer by layer."""

    def __init__(self, values: Vector | np.ndarray, what: str) -> None:
        self._values, self.what, self.at = values, what, 0
        self.total = values.total if isinstance(values, Vector) else len(values)
        self.taken: list[Taken] = []
        self.fields: Fields = {}
        """Of the layer that takes parameters now."""

    def take(self, layer: str, *shape: int, order: str = "F", role: str = "weight") -> Tensor:
        """The next parameter, float32, of the shape that Deeplearning4j gives it.

        Args:
            role: `"weight"`, `"bias"`, `"fixed"` for what no optimizer moves, `"folded"` for what is no parameter here.
        """
        count = math.prod(shape)
        if count > self.total - self.at:
            raise FormatError(
                f"{self.what}: layer {layer!r} needs {count:,} parameters, "
                f"but {self.total - self.at:,} of {self.total:,} are left. Is the file whole?"
            )
        self.taken.append(Taken(layer, self.fields, role, self.at, count))
        values = self._values
        part = values.take(count) if isinstance(values, Vector) else values[self.at : self.at + count].copy()
        self.at += count
        flat = torch.from_numpy(part)
        # Column after column is row after row of the transposed: nothing is moved.
        return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])

    def done(self) -> None:
        if self.at != self.total:
            raise FormatError(
                f"{self.what} holds {self.total:,} parameters, but its layers take {self.at:,}: "
                f"{COEFFICIENTS} and {CONFIGURATION} do not belong together."
            )


@dataclass(frozen=True, slots=True)
class _Scaling:
    """(x - subtract) * multiply + add, each one number or one for each feature."""

    kind: str
    subtract: np.ndarray
    multiply: np.ndarray
    add: float


def _normalizer(zipped: Zipped) -> _Scaling | None:
    """What `normalizer.bin` does to the inputs. Source: NormalizerSerializer.java and its strategies."""
    if NORMALIZER not in zipped:
        return None
    where = f"{zipped.path}: {NORMALIZER}"
    stream = io.BytesIO(zipped.read(NORMALIZER, MAX_NORMALIZER_BYTES))
    limit = len(stream.getvalue())
    if read_text(stream, where) != "NORMALIZER":
        raise FormatError(f"{where} is of a version before 0.8, or damaged. Delete it from the archive to go without.")
    (version,) = struct.unpack(">i", exactly(stream, 4, where))
    kind = read_text(stream, where)
    if version != 1 or kind not in ("STANDARDIZE", "MIN_MAX", "IMAGE_MIN_MAX"):
        raise FormatError(
            f"{where} is a normalizer of kind {kind!r}, version {version}; STANDARDIZE, MIN_MAX and IMAGE_MIN_MAX of "
            f"version 1 are read. Delete it from the archive and prepare the inputs yourself."
        )
    if kind == "IMAGE_MIN_MAX":
        low, high, most = (float(value) for value in struct.unpack(">3d", exactly(stream, 24, where)))
        if not all(map(math.isfinite, (low, high, most))) or most == 0:
            raise FormatError(f"{where} scales pixels up to {most} into {low} .. {high}.")
        return _Scaling(kind, np.zeros(1), np.full(1, (high - low) / most), low)
    exactly(stream, 1, where)  # whether labels were fitted too
    low, high = struct.unpack(">2d", exactly(stream, 16, where)) if kind == "MIN_MAX" else (0.0, 1.0)
    first = read_array(stream, where, limit).astype(np.float64).reshape(-1)
    second = read_array(stream, where, limit).astype(np.float64).reshape(-1)
    if len(first) != len(second) or not len(first):
        raise FormatError(f"{where} holds {len(first)} and {len(second)} numbers, where equal numbers belong.")
    spread = second if kind == "STANDARDIZE" else second - first
    spread = np.where(spread == 0, 1.0, spread)  # as both strategies do, so that constant features stay finite
    return _Scaling(kind, first, (high - low) / spread, low)


# ----------------------------------------------------------------------------------------------------- the JSON


def typed(value: Any, wrapped: Mapping[str, str], what: str) -> tuple[str, Fields]:
    """Class name and fields of an object, in either dialect."""
    if isinstance(value, dict) and isinstance(value.get("@class"), str):
        return value["@class"].rpartition(".")[2].rpartition("$")[2], value
    if isinstance(value, dict) and len(value) == 1:
        (name, fields), *_ = value.items()
        if isinstance(fields, dict) or fields is None:
            return wrapped.get(name, name), fields or {}
    raise FormatError(f"{what} does not say its type: neither '@class' nor one named object is there.")


def get(fields: Fields, *names: str, default: Any = None) -> Any:
    """The first of several spellings that is there and not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), default)


def _number(fields: Fields, what: str, *names: str, default: float | None = None) -> float:
    value = get(fields, *names, default=default)
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") and default is not None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{what}: {names[0]} is {_seen(value)}, not a number.")
    return float(value)


def _size(fields: Fields, what: str, *names: str, default: int | None = None, low: int = 1) -> int:
    value = get(fields, *names, default=default)
    return _whole(value, f"{what}: {names[0]}", low)


def _whole(value: Any, what: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < _MAX_SIZE:
        raise FormatError(f"{what} is {_seen(value)}, not a whole number of {low} or more.")
    return value


def _sizes(fields: Fields, what: str, name: str, count: int, default: int, low: int = 1) -> tuple[int, ...]:
    """One number for each axis; 1-d layers write one number, or two of which the first counts."""
    value = get(fields, name, default=[default] * count)
    if not isinstance(value, list):
        value = [value] * count
    if count == 1:
        value = value[:1]
    if len(value) != count:
        raise FormatError(f"{what}: {name} is {_seen(value)}, not {count} numbers.")
    return tuple(_whole(part, f"{what}: {name}", low) for part in value)


def _flag(fields: Fields, name: str, default: bool) -> bool:
    value = get(fields, name, default=default)
    return value if isinstance(value, bool) else default


def _seen(value: Any) -> str:
    return repr(value)[:80]


def _dict(value: Any, what: str) -> Fields:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {_seen(value)}, not an object.")
    return value


# ----------------------------------------------------------------------------------------------------- the layers


@dataclass(slots=True)
class Flow:
    """What runs from layer to layer."""

    wire: Wire
    over_time: bool = False
    """(N, time, features) instead of (N, features, time): between rnnToFeedForward and feedForwardToRnn."""
    scores: Wire | None = None
    """The same before a last softmax or sigmoid that a classification loss belongs to."""
    classes: int = 0


@dataclass(slots=True)
class Builder:
    net: Assembly
    parameters: Parameters
    notes: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    updaters: list[Fields] = field(default_factory=list)
    loss: str | None = None

    def fail(self, message: str) -> FormatError:
        return FormatError(f"{self.net.what}: {message}")

    # ------------------------------------------------------------------------------------------------ one layer

    def layer(self, name: str, conf: Any, flow: Flow) -> Flow:
        """Add one layer: its dropout, itself, its activation."""
        kind, f = typed(conf, _WRAPPED_LAYERS, f"{self.net.what}: layer {name!r}")
        what = f"{self.net.what}: layer {name!r} ({kind})"
        if kind in ("FrozenLayer", "FrozenLayerWithBackprop"):
            self.frozen.append(name)
            return self.layer(name, get(f, "layer", "underlying"), flow)
        make = _KINDS.get(kind)
        if make is None:
            raise FormatError(f"{what} is of a type that is not read. Known are {', '.join(sorted(_KINDS))}.")
        updater = get(f, "iupdater", "iUpdater", "updater")
        if updater is not None:
            self.updaters.append(f)
        self.parameters.fields = f
        flow = self._dropout(name, what, f, flow)
        return make(self, name, what, f, flow)

    def _dropout(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        """Deeplearning4j drops a layer's input; its number is the share that is kept, and 0 means none."""
        value = get(f, "idropout", "iDropout", "dropOut")
        if value is None:
            return flow
        kind = "Dropout"
        if isinstance(value, dict):
            kind, inner = typed(value, {}, f"{what}: dropout")
            keep = _number(inner, f"{what}: dropout", "p", default=1.0)
        else:
            keep = _number(f, what, "dropOut", default=0.0)
        if kind not in ("Dropout", "AlphaDropout", "SpatialDropout"):
            self.notes.append(f"layer {name}: {kind} acts in training only and is left out")
            return flow
        if not 0 <= keep <= 1:
            raise FormatError(f"{what}: dropout keeps {keep}, not a share from 0 to 1.")
        if keep in (0.0, 1.0):
            return flow
        if kind == "SpatialDropout":
            made: Callable[[], nn.Module] = {3: lambda: nn.Dropout1d(1 - keep), 4: lambda: nn.Dropout2d(1 - keep)}.get(
                flow.wire.rank, lambda: nn.Dropout(1 - keep)
            )
        elif kind == "AlphaDropout":
            made = lambda: nn.AlphaDropout(1 - keep)  # noqa: E731
        else:
            made = lambda: nn.Dropout(1 - keep)  # noqa: E731
        return Flow(self.net.layer(f"{name}_dropout", made, flow.wire), flow.over_time)

    def activate(self, name: str, what: str, f: Fields, wire: Wire, axis: int, default: str = "sigmoid") -> Wire:
        made = activation(get(f, "activationFn", "activationFunction", default=default), what, axis)
        if made is None:
            return wire
        return self.net.layer(f"{name}_{made[0]}", made[1], wire)

    def _dense(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        n_in, n_out = _size(f, what, "nin", "nIn"), _size(f, what, "nout", "nOut")
        weight = self.parameters.take(name, n_in, n_out).t()
        has_bias = _flag(f, "hasBias", True)
        tensors = {"weight": weight}
        if has_bias:
            tensors["bias"] = self.parameters.take(name, n_out, role="bias")
        norm = self.parameters.take(name, n_out) if _flag(f, "hasLayerNorm", False) else None
        if norm is not None:
            raise FormatError(f"{what} has a layer norm inside, which is not read.")
        return Flow(
            self.net.layer(name, lambda: nn.Linear(n_in, n_out, bias=has_bias), flow.wire, tensors=tensors),
            flow.over_time,
        )

    def dense(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        if flow.wire.rank == 4:
            flow = Flow(self.net.layer(f"{name}_flatten", nn.Flatten, flow.wire))
        out = self._dense(name, what, f, flow)
        return Flow(self.activate(name, what, f, out.wire, -1), flow.over_time)

    def autoencoder(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        out = self.dense(name, what, f, flow)
        self.parameters.take(
            name, _size(f, what, "nin", "nIn"), role="folded"
        )  # the visible bias, used in pretraining only
        return out

    def output(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        linear = self._dense(name, what, f, flow)
        return self._scored(name, what, f, linear, -1)

    def loss_layer(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return self._scored(name, what, f, flow, -1 if flow.over_time else 1)

    def _scored(self, name: str, what: str, f: Fields, flow: Flow, axis: int) -> Flow:
        """Activation and loss of an output; scores are kept where a classification loss belongs to them."""
        raw = get(f, "lossFn", "lossFunction")
        loss = raw if isinstance(raw, str) else "" if raw is None else typed(raw, {}, f"{what}: loss")[0]
        self.loss = loss = loss.removeprefix("Loss").lower()
        made = activation(get(f, "activationFn", "activationFunction", default="sigmoid"), what, axis)
        if made is None:
            return flow
        after = Flow(self.net.layer(f"{name}_{made[0]}", made[1], flow.wire), flow.over_time)
        single = flow.wire.row == (1,)
        if flow.wire.rank == 2 and (
            (made[0] == "softmax" and loss in ("mcxent", "negativeloglikelihood", "sparsemcxent", "kld"))
            or (made[0] == "sigmoid" and single and loss in ("xent", "binaryxent"))
        ):
            after.scores, after.classes = flow.wire, 2 if single else flow.wire.row[0]
        return after

    def rnn_output(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        if flow.wire.rank != 3:
            raise FormatError(f"{what} is given {flow.wire.rank - 1} axes a row, not features and time.")
        wire = flow.wire
        if not flow.over_time:
            wire = self.net.call(f"{name}_steps", torch.transpose, wire, 1, 2)
        out = self._scored(name, what, f, self._dense(name, what, f, Flow(wire, True)), -1)
        return Flow(self.net.call(f"{name}_series", torch.transpose, out.wire, 1, 2))

    def activation_layer(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        made = activation(get(f, "activationFn", "activationFunction", default="identity"), what, self._axis(flow))
        if made is None:
            return Flow(self.net.layer(name, nn.Identity, flow.wire), flow.over_time)
        return Flow(self.net.layer(name, made[1], flow.wire), flow.over_time)

    def _axis(self, flow: Flow) -> int:
        """The axis of features."""
        return -1 if flow.over_time or flow.wire.rank == 2 else 1

    def dropout_layer(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return flow

    def embedding(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        """A table; its bias, which every row of it gets, is added to the rows."""
        n_in, n_out = _size(f, what, "nin", "nIn"), _size(f, what, "nout", "nOut")
        table = self.parameters.take(name, n_in, n_out)
        if _flag(f, "hasBias", True):  # files from before the field have one
            table = table + self.parameters.take(name, n_out, role="folded")
        wire = flow.wire
        if wire.value.dtype != torch.int64:
            wire = self.net.method(f"{name}_index", "long", wire)
        wire = self.net.layer(name, lambda: nn.Embedding(n_in, n_out), wire, tensors={"weight": table})
        if wire.rank != 3 or wire.row[0] != 1:
            raise FormatError(f"{what} is given {flow.wire.row}, not one number a row.")
        wire = self.net.layer(f"{name}_flatten", nn.Flatten, wire)
        return Flow(self.activate(name, what, f, wire, -1, "identity"))

    def embedding_sequence(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        n_in, n_out = _size(f, what, "nin", "nIn"), _size(f, what, "nout", "nOut")
        table = self.parameters.take(name, n_in, n_out)
        if _flag(f, "hasBias", False):
            table = table + self.parameters.take(name, n_out, role="folded")
        wire = self.net.layer(name, lambda: nn.Embedding(n_in, n_out), flow.wire, tensors={"weight": table})
        wire = self.net.call(f"{name}_series", torch.transpose, wire, 1, 2)
        return Flow(self.activate(name, what, f, wire, 1, "identity"))

    # ------------------------------------------------------------------------------------------------ pictures

    def _window(self, what: str, f: Fields, axes: int, default_stride: int) -> tuple[tuple[int, ...], ...]:
        kernel = _sizes(f, what, "kernelSize", axes, 1)
        stride = _sizes(f, what, "stride", axes, default_stride)
        dilation = _sizes(f, what, "dilation", axes, 1)
        padding = _sizes(f, what, "padding", axes, 0, low=0)
        return kernel, stride, dilation, padding

    def _pad(
        self, name: str, what: str, f: Fields, wire: Wire, window: tuple[tuple[int, ...], ...], value: float
    ) -> tuple[Wire, tuple[int, ...]]:
        """Padding of mode Same as a layer of its own where it is uneven; what is left for the layer itself."""
        kernel, padding = window[0], window[3]
        layout = get(f, "cnn2dDataFormat", "dataFormat", "rnnDataFormat", default="NCHW")
        if layout not in ("NCHW", "NCW"):
            raise FormatError(f"{what} works on {layout}; only NCHW and NCW are read.")
        mode = get(f, "convolutionMode", default="Truncate")
        if mode in ("Strict", "Truncate"):
            return wire, padding
        if mode not in ("Same", "Causal"):
            raise FormatError(f"{what}: convolutionMode is {_seen(mode)}; Strict, Truncate, Same, Causal are read.")
        before, after = self._same(wire, window, causal=mode == "Causal")
        if before == after:
            return wire, tuple(before)
        pairs = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        kinds = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}
        pad = kinds[len(kernel)]
        return self.net.layer(f"{name}_pad", lambda: pad(tuple(pairs), value), wire), (0,) * len(kernel)  # type: ignore[arg-type]

    def _same(
        self, wire: Wire, window: tuple[tuple[int, ...], ...], *, causal: bool = False
    ) -> tuple[list[int], list[int]]:
        """Padding of mode Same before and behind each axis; what is odd goes behind."""
        kernel, stride, dilation, _ = window
        before, after = [], []
        for size, k, s, d in zip(wire.row[1:], kernel, stride, dilation, strict=True):
            reach = (k - 1) * d + 1
            whole = reach - 1 if causal else max((-(-size // s) - 1) * s + reach - size, 0)
            before.append(whole if causal else whole // 2)
            after.append(whole - before[-1])
        return before, after

    def convolution(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return self._convolution(name, what, f, flow, 2)

    def convolution_1d(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return self._convolution(name, what, f, flow, 1)

    def _convolution(self, name: str, what: str, f: Fields, flow: Flow, axes: int) -> Flow:
        if flow.wire.rank != axes + 2 or flow.over_time:
            raise FormatError(f"{what} is given {flow.wire.rank - 1} axes a row, not {axes + 1}.")
        n_in, n_out = _size(f, what, "nin", "nIn"), _size(f, what, "nout", "nOut")
        window = self._window(what, f, axes, 1)
        kernel, stride, dilation, _ = window
        has_bias = _flag(f, "hasBias", True)
        tensors = {"bias": self.parameters.take(name, n_out, role="bias")} if has_bias else {}
        tensors["weight"] = self.parameters.take(name, n_out, n_in, *kernel, order="C")
        wire, padding = self._pad(name, what, f, flow.wire, window, 0.0)
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d}[axes]
        wire = self.net.layer(
            name,
            lambda: conv(n_in, n_out, kernel, stride=stride, padding=padding, dilation=dilation, bias=has_bias),
            wire,
            tensors=tensors,
        )
        return Flow(self.activate(name, what, f, wire, 1, "sigmoid" if axes == 2 else "identity"))

    def subsampling(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return self._subsampling(name, what, f, flow, 2)

    def subsampling_1d(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return self._subsampling(name, what, f, flow, 1)

    def _subsampling(self, name: str, what: str, f: Fields, flow: Flow, axes: int) -> Flow:
        if flow.wire.rank != axes + 2 or flow.over_time:
            raise FormatError(f"{what} is given {flow.wire.rank - 1} axes a row, not {axes + 1}.")
        window = self._window(what, f, axes, 2)
        kernel, stride, dilation, _ = window
        pooling = get(f, "poolingType", default="MAX")
        pool: Any
        average = pooling in ("AVG", "SUM")
        # Average over what is there, unless the file (or its age) says that padding counts.
        counts_pad = _flag(f, "avgPoolIncludePadInDivisor", True)
        if pooling == "MAX":
            wire, padding = self._pad(name, what, f, flow.wire, window, -math.inf)
            pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d}[axes]
            if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
                raise FormatError(f"{what}: padding {padding} is more than half of kernel {kernel}.")
            return Flow(self.net.layer(name, lambda: pool(kernel, stride, padding, dilation), wire))
        if any(d != 1 for d in dilation):
            raise FormatError(f"{what}: {pooling} pooling with dilation {dilation} is not read.")
        if average:
            ceil = False
            if pooling == "AVG" and not counts_pad and get(f, "convolutionMode") == "Same":
                # Rounding the size up lets the last window hang over by what is odd, and torch leaves that out too.
                wire, padding = flow.wire, tuple(self._same(flow.wire, window)[0])
                ceil = True
                for size, k, s, p in zip(wire.row[1:], kernel, stride, padding, strict=True):
                    if -(-(size + 2 * p - k) // s) + 1 != -(-size // s):
                        raise FormatError(f"{what} averages over windows of {k} at stride {s} that hang over, "
                                          "and leaves the rest out of the count, which is not read.")  # fmt: skip
            else:
                wire, padding = self._pad(name, what, f, flow.wire, window, 0.0)
            if axes == 1:
                if pooling == "SUM":
                    raise FormatError(f"{what}: SUM pooling over a series is not read.")
                pool = nn.AvgPool1d
                return Flow(self.net.layer(name, lambda: pool(kernel, stride, padding, ceil, counts_pad), wire))
            pool, divisor = nn.AvgPool2d, 1 if pooling == "SUM" else None
            return Flow(self.net.layer(name, lambda: pool(kernel, stride, padding, ceil, counts_pad, divisor), wire))
        if pooling != "PNORM":
            raise FormatError(f"{what}: poolingType is {_seen(pooling)}; MAX, AVG, SUM, PNORM are read.")
        power = _size(f, what, "pnorm", default=2)
        wire, padding = self._pad(name, what, f, flow.wire, window, 0.0)
        if any(padding):
            sides = tuple(side for size in reversed(padding) for side in (size, size))
            zero: Any = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}[axes]
            wire = self.net.layer(f"{name}_pad", lambda: zero(sides, 0.0), wire)
        wire = self.net.call(f"{name}_abs", torch.abs, wire)
        norm: Any = {1: nn.LPPool1d, 2: nn.LPPool2d}[axes]
        return Flow(self.net.layer(name, lambda: norm(power, kernel if axes == 2 else kernel[0], stride), wire))

    def lrn(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        """k + alpha * sum, where torch has k + alpha / size * sum; the window is always odd."""
        half = int(_number(f, what, "n", default=5.0) / 2)
        k, alpha = _number(f, what, "k", default=2.0), _number(f, what, "alpha", default=1e-4)
        beta, size = _number(f, what, "beta", default=0.75), 2 * half + 1
        if not 0 <= half < 10_000:
            raise FormatError(f"{what}: n is {2 * half}, not a number of channels.")
        return Flow(self.net.layer(name, lambda: nn.LocalResponseNorm(size, alpha * size, beta, k), flow.wire))

    def batch_norm(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        size = _size(f, what, "nout", "nOut", "nin", "nIn")
        eps, decay = _number(f, what, "eps", default=1e-5), _number(f, what, "decay", default=0.9)
        if _flag(f, "lockGammaBeta", False):
            gamma, beta = _number(f, what, "gamma", default=1.0), _number(f, what, "beta", default=0.0)
            tensors = {"weight": torch.full((size,), gamma), "bias": torch.full((size,), beta)}
        else:
            tensors = {"weight": self.parameters.take(name, size), "bias": self.parameters.take(name, size)}
        tensors["running_mean"] = self.parameters.take(name, size, role="fixed")
        spread = self.parameters.take(name, size, role="fixed")
        # Later versions keep log10 of the deviation instead of the variance.
        tensors["running_var"] = 10 ** (2 * spread) if _flag(f, "useLogStd", False) else spread
        if flow.over_time:
            raise FormatError(f"{what} stands between layers over time, which is not read.")
        norm: Any = nn.BatchNorm2d if flow.wire.rank == 4 else nn.BatchNorm1d
        return Flow(self.net.layer(name, lambda: norm(size, eps, 1 - decay), flow.wire, tensors=tensors))

    def global_pooling(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        if flow.over_time or flow.wire.rank not in (3, 4):
            raise FormatError(f"{what} is given {flow.wire.rank - 1} axes a row, not a series or a picture.")
        axes, keep = tuple(range(2, flow.wire.rank)), not _flag(f, "collapseDimensions", True)
        pooling = get(f, "poolingType", default="MAX")
        if pooling == "MAX":
            return Flow(self.net.call(name, torch.amax, flow.wire, axes, keep))
        if pooling in ("AVG", "SUM"):
            return Flow(self.net.call(name, torch.mean if pooling == "AVG" else torch.sum, flow.wire, axes, keep))
        if pooling != "PNORM":
            raise FormatError(f"{what}: poolingType is {_seen(pooling)}; MAX, AVG, SUM, PNORM are read.")
        power = _size(f, what, "pnorm", default=2)
        raised = self.net.call(f"{name}_power", torch.pow, self.net.call(f"{name}_abs", torch.abs, flow.wire), power)
        total = self.net.call(f"{name}_sum", torch.sum, raised, axes, keep)
        return Flow(self.net.call(name, torch.pow, total, 1 / power))

    def zero_padding(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        pads = get(f, "padding", default=[0, 0, 0, 0])
        if isinstance(pads, list) and len(pads) == 2:
            pads = [pads[0], pads[0], pads[1], pads[1]]
        if not isinstance(pads, list) or len(pads) != 4:
            raise FormatError(f"{what}: padding is {_seen(pads)}, not 4 numbers.")
        top, bottom, left, right = (_whole(pad, f"{what}: padding", 0) for pad in pads)
        return Flow(self.net.layer(name, lambda: nn.ZeroPad2d((left, right, top, bottom)), flow.wire))

    def upsampling(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        size = _sizes(f, what, "size", 2, 2)
        scale = (float(size[0]), float(size[1]))
        return Flow(self.net.layer(name, lambda: nn.Upsample(scale_factor=scale), flow.wire))

    # ------------------------------------------------------------------------------------------------ series

    def lstm(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return Flow(self._lstm(name, what, f, self._series(name, what, f, flow), peepholes=False))

    def graves_lstm(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        return Flow(self._lstm(name, what, f, self._series(name, what, f, flow), peepholes=True))

    def _series(self, name: str, what: str, f: Fields, flow: Flow) -> Wire:
        layout = get(f, "rnnDataFormat", default="NCW")
        if layout != "NCW":
            raise FormatError(f"{what} works on {layout}; only NCW is read.")
        if flow.wire.rank != 3:
            raise FormatError(f"{what} is given {flow.wire.rank - 1} axes a row, not features and time.")
        if flow.over_time:
            return self.net.call(f"{name}_series", torch.transpose, flow.wire, 1, 2)
        return flow.wire

    def _lstm(self, name: str, what: str, f: Fields, wire: Wire, *, peepholes: bool) -> Wire:
        """Blocks here: candidate, forget, output, input gate; in torch: input gate, forget, candidate, output."""
        n_in, n_out = _size(f, what, "nin", "nIn"), _size(f, what, "nout", "nOut")
        act, act_alpha = activation_kind(get(f, "activationFn", "activationFunction", default="tanh"), what)
        gate, _ = activation_kind(get(f, "gateActivationFn", default="sigmoid"), what)
        allowed = ("tanh", "sigmoid", "hardsigmoid", "relu", "softsign", "identity", "rationaltanh", "hardtanh")
        for which in (act, gate):
            if which not in allowed or act_alpha:
                raise FormatError(f"{what}: activation {which!r} inside an LSTM is not read; {', '.join(allowed)} are.")
        blocks = torch.tensor([3, 1, 0, 2])

        def turned(columns: Tensor) -> Tensor:  # (rows, 4 n_out) -> (4 n_out, rows)
            return columns.t().reshape(4, n_out, -1)[blocks].reshape(4 * n_out, -1)

        weight_ih = turned(self.parameters.take(name, n_in, 4 * n_out))
        recurrent = self.parameters.take(name, n_out, 4 * n_out + (3 if peepholes else 0))
        weight_hh = turned(recurrent[:, : 4 * n_out])
        bias = turned(self.parameters.take(name, 1, 4 * n_out, role="bias")).reshape(-1)
        if peepholes or (act, gate) != ("tanh", "sigmoid"):
            tensors = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias}
            if peepholes:  # columns: forget, output, input gate
                tensors["peephole"] = recurrent[:, 4 * n_out :].t()[torch.tensor([2, 0, 1])]
        else:
            tensors = {
                "lstm.weight_ih_l0": weight_ih,
                "lstm.weight_hh_l0": weight_hh,
                "lstm.bias_ih_l0": bias,
                "lstm.bias_hh_l0": torch.zeros_like(bias),
            }
        return self.net.layer(name, lambda: SequenceLSTM(n_in, n_out, peepholes, act, gate), wire, tensors=tensors)

    def graves_bidirectional(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        wire = self._series(name, what, f, flow)
        ahead = self._lstm(f"{name}_forward", what, f, wire, peepholes=True)
        turned = self.net.call(f"{name}_flip", torch.flip, wire, [2])
        back = self._lstm(f"{name}_backward", what, f, turned, peepholes=True)
        back = self.net.call(f"{name}_flip_back", torch.flip, back, [2])
        return Flow(self.net.call(name, operator.add, ahead, back))

    def bidirectional(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        wire = self._series(name, what, f, flow)
        ahead = self.layer(f"{name}_forward", get(f, "fwd", "layer"), Flow(wire)).wire
        turned = self.net.call(f"{name}_flip", torch.flip, wire, [2])
        back = self.layer(f"{name}_backward", get(f, "bwd", "fwd", "layer"), Flow(turned)).wire
        back = self.net.call(f"{name}_flip_back", torch.flip, back, [2])
        mode = get(f, "mode", default="CONCAT")
        if mode == "CONCAT":
            return Flow(self.net.call(name, torch.cat, [ahead, back], 1))
        if mode == "MUL":
            return Flow(self.net.call(name, operator.mul, ahead, back))
        if mode not in ("ADD", "AVERAGE"):
            raise FormatError(f"{what}: mode is {_seen(mode)}; ADD, MUL, AVERAGE, CONCAT are read.")
        total = self.net.call(name if mode == "ADD" else f"{name}_sum", operator.add, ahead, back)
        return Flow(total if mode == "ADD" else self.net.call(name, operator.truediv, total, 2))

    def last_step(self, name: str, what: str, f: Fields, flow: Flow) -> Flow:
        inner = self.layer(f"{name}_inner", get(f, "underlying", "layer"), flow)
        return Flow(self.net.call(name, torch.select, inner.wire, 2, -1))

    # ------------------------------------------------------------------------------------------------ preprocessors

    def preprocess(self, name: str, conf: Any, flow: Flow, depth: int = 0) -> Flow:
        """What stands in front of a layer and changes the shape."""
        where = f"{self.net.what}: the input preprocessor of {name!r}"
        kind, f = typed(conf, _WRAPPED_PREPROCESSORS, where)
        wire = flow.wire
        layout = get(f, "format", "rnnDataFormat", default="NCHW")
        if layout not in ("NCHW", "NCW"):
            raise FormatError(f"{where} works on {layout}; only NCHW and NCW are read.")
        if kind == "CnnToFeedForwardPreProcessor":
            return flow if wire.rank == 2 else Flow(self.net.layer(f"{name}_flatten", nn.Flatten, wire))
        if kind == "TensorFlowCnnToFeedForwardPreProcessor":
            turned = self.net.call(f"{name}_nhwc", torch.permute, wire, (0, 2, 3, 1))
            return Flow(self.net.layer(f"{name}_flatten", nn.Flatten, turned))
        if kind == "FeedForwardToCnnPreProcessor":
            if wire.rank == 4:
                return flow
            sizes = (
                _size(f, where, "numChannels"),
                _size(f, where, "inputHeight"),
                _size(f, where, "inputWidth"),
            )
            return Flow(self.net.layer(f"{name}_unflatten", lambda: nn.Unflatten(1, sizes), wire))
        if kind in ("RnnToFeedForwardPreProcessor", "FeedForwardToRnnPreProcessor"):
            to_steps = kind == "RnnToFeedForwardPreProcessor"
            if to_steps == flow.over_time:
                return flow
            if wire.rank != 3:
                raise FormatError(f"{where} is given {wire.rank - 1} axes a row, not features and time.")
            turned = self.net.call(f"{name}_{'steps' if to_steps else 'series'}", torch.transpose, wire, 1, 2)
            return Flow(turned, over_time=to_steps)
        if kind == "ComposableInputPreProcessor" and depth < 8:
            parts = get(f, "inputPreProcessors", default=[])
            for part in parts if isinstance(parts, list) else []:
                flow = self.preprocess(name, part, flow, depth + 1)
            return flow
        raise FormatError(f"{where} is a {kind}, which is not read.")


_KINDS: dict[str, Callable[[Builder, str, str, Fields, Flow], Flow]] = {
    **dict.fromkeys(("DenseLayer",), Builder.dense),
    **dict.fromkeys(("AutoEncoder", "RBM"), Builder.autoencoder),
    "OutputLayer": Builder.output,
    **dict.fromkeys(("LossLayer", "RnnLossLayer", "CnnLossLayer"), Builder.loss_layer),
    "RnnOutputLayer": Builder.rnn_output,
    "ActivationLayer": Builder.activation_layer,
    "DropoutLayer": Builder.dropout_layer,
    "EmbeddingLayer": Builder.embedding,
    "EmbeddingSequenceLayer": Builder.embedding_sequence,
    "ConvolutionLayer": Builder.convolution,
    **dict.fromkeys(("Convolution1DLayer", "Convolution1D"), Builder.convolution_1d),
    "SubsamplingLayer": Builder.subsampling,
    **dict.fromkeys(("Subsampling1DLayer", "Subsampling1D"), Builder.subsampling_1d),
    "LocalResponseNormalization": Builder.lrn,
    "BatchNormalization": Builder.batch_norm,
    "GlobalPoolingLayer": Builder.global_pooling,
    "ZeroPaddingLayer": Builder.zero_padding,
    "Upsampling2D": Builder.upsampling,
    "LSTM": Builder.lstm,
    "GravesLSTM": Builder.graves_lstm,
    "GravesBidirectionalLSTM": Builder.graves_bidirectional,
    "Bidirectional": Builder.bidirectional,
    "LastTimeStep": Builder.last_step,
}


def activation_kind(value: Any, what: str) -> tuple[str, float | None]:
    """An activation's name in lower case without decoration, and its one number where it has one."""
    fields: Fields = {}
    if isinstance(value, str):
        kind = value
    else:
        kind, fields = typed(value, {}, f"{what}: activation")
    kind = kind.removeprefix("Activation").lower()
    kind = {"leakyrelu": "lrelu", "linear": "identity"}.get(kind, kind)
    if kind == "lrelu":
        return kind, _number(fields, what, "alpha", default=0.01)
    if kind == "elu":
        return kind, _number(fields, what, "alpha", default=1.0)
    if kind == "thresholdedrelu":
        return kind, _number(fields, what, "theta", default=1.0)
    if kind == "gelu" and _flag(fields, "precise", False):
        return "precisegelu", None
    if kind == "rrelu":
        low = _number(fields, what, "l", default=1 / 8)
        return kind, (low + _number(fields, what, "u", default=1 / 3)) / 2
    return kind, None


def activation(value: Any, what: str, axis: int) -> tuple[str, Callable[[], nn.Module]] | None:
    """Name and maker of an activation; None for the identity.

    Raises: FormatError, naming the layer (`what`) and the activation.
    """
    kind, number = activation_kind(value, what)
    if kind == "identity":
        return None
    plain: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "relu6": nn.ReLU6,
        "selu": nn.SELU,
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "hardtanh": nn.Hardtanh,
        "softplus": nn.Softplus,
        "softsign": nn.Softsign,
        "swish": nn.SiLU,
        "mish": nn.Mish,
        "softmax": lambda: nn.Softmax(axis),
        "logsoftmax": lambda: nn.LogSoftmax(axis),
        "precisegelu": lambda: nn.GELU("tanh"),
        "lrelu": lambda: nn.LeakyReLU(number or 0.0),
        # The random slopes of training are not kept: their mean is what prediction uses.
        "rrelu": lambda: nn.LeakyReLU(number or 0.0),
        "elu": lambda: nn.ELU(number or 0.0),
        "thresholdedrelu": lambda: nn.Threshold(number or 0.0, 0.0),
        **{own: lambda own=own: ElementActivation(own) for own in _OWN_ACTIVATIONS},  # type: ignore[misc]
    }
    if kind not in plain:
        raise FormatError(f"{what}: activation {kind!r} is not read. Known are {', '.join(sorted(plain))}.")
    return kind, plain[kind]


_OWN_ACTIVATIONS = ("cube", "gelu", "hardsigmoid", "rationaltanh", "rectifiedtanh")


# --------------------------------------------------------------------------------------------------- whole nets


def _layer_of(conf: Any, what: str) -> Any:
    layer = _dict(conf, what).get("layer")
    if layer is None:
        raise FormatError(f"{what} has no layer.")
    return layer


def _layer_name(layer: Any, position: int) -> str:
    """A layer's own name, `layer0` where it has none."""
    try:
        name = get(typed(layer, {}, "")[1], "layerName", default=f"layer{position}")
    except FormatError:
        name = f"layer{position}"
    return name if isinstance(name, str) and name else f"layer{position}"


def _network(
    builder: Builder, conf: Fields, given: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, Flow]:
    confs = conf["confs"]
    if not isinstance(confs, list) or not confs:
        raise builder.fail(f"confs is {_seen(confs)}, not a list of layers.")
    before = conf.get("inputPreProcessors")
    before = before if isinstance(before, dict) else {}
    layers = [_layer_of(part, f"{builder.net.what}: layer {k}") for k, part in enumerate(confs)]
    first = _layer_name(layers[0], 0)
    shape = given.get("features") if isinstance(given, Mapping) else given
    flow = _input(builder, "features", first, layers[0], before.get("0"), shape)
    name = first
    for position, layer in enumerate(layers):
        name = _layer_name(layer, position)
        if str(position) in before:
            flow = builder.preprocess(name, before[str(position)], flow)
        flow = builder.layer(name, layer, flow)
    return {name: flow}


def _input(
    builder: Builder, name: str, layer_name: str, layer: Any, preprocessor: Any, given: Sequence[int] | None
) -> Flow:
    """The input, by what is given or by what the first layer says of it."""
    what = f"{builder.net.what}: layer {layer_name!r}"
    kind, f = typed(layer, _WRAPPED_LAYERS, what)
    while kind.startswith("FrozenLayer") or kind == "LastTimeStep":
        kind, f = typed(get(f, "layer", "underlying"), _WRAPPED_LAYERS, what)
    whole = kind in ("EmbeddingLayer", "EmbeddingSequenceLayer")
    if given is not None:
        if not given or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in given):
            raise ConfigError(
                "input_shape", given, "is no shape of a row", "Give sizes of 1 or more, without the batch"
            )
        return Flow(builder.net.input(name, tuple(given), "int64" if whole else "float32"))
    if preprocessor is not None:
        pre, g = typed(preprocessor, _WRAPPED_PREPROCESSORS, what)
        sizes = tuple(get(g, key, default=0) for key in ("numChannels", "inputHeight", "inputWidth"))
        if all(isinstance(size, int) and 0 < size < _MAX_SIZE for size in sizes):
            if pre == "CnnToFeedForwardPreProcessor":
                return Flow(builder.net.input(name, sizes))
            if pre == "FeedForwardToCnnPreProcessor":
                return Flow(builder.net.input(name, (math.prod(sizes),)))
    elif kind in _DENSE or kind == "BatchNormalization":
        return Flow(builder.net.input(name, (_size(f, what, "nin", "nIn"),)))
    elif kind == "EmbeddingLayer":
        return Flow(builder.net.input(name, (1,), "int64"))
    elif kind == "EmbeddingSequenceLayer" and isinstance(f.get("inputLength"), int) and f["inputLength"] > 1:
        return Flow(builder.net.input(name, (_size(f, what, "inputLength"),), "int64"))
    axes, example = "channels, height and width", "(3, 224, 224)"
    if kind in _RECURRENT or kind.endswith("1DLayer") or "Rnn" in str(preprocessor):
        size = get(f, "nin", "nIn", default=get(get(f, "fwd", default={}) or {}, "nin", "nIn", default=10))
        axes, example = "features and time steps", f"({size}, 50)"
    elif kind == "EmbeddingSequenceLayer":
        axes, example = "time steps", "(50,)"
    raise FormatError(
        f"{builder.net.what} does not say what shape a row of {name!r} has; its first layer {layer_name!r} ({kind}) "
        f"takes {axes}. Give input_shape={example}."
    )


def _graph(
    builder: Builder, conf: Fields, given: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, Flow]:
    what = builder.net.what
    vertices = _dict(conf["vertices"], f"{what}: vertices")
    feeds = {name: _texts(value, f"{what}: vertexInputs of {name!r}")
             for name, value in _dict(conf.get("vertexInputs"), f"{what}: vertexInputs").items()}  # fmt: skip
    inputs = _texts(conf["networkInputs"], f"{what}: networkInputs")
    outputs = _texts(conf.get("networkOutputs"), f"{what}: networkOutputs")
    order = topological_order(inputs, list(vertices), feeds, what)
    stored = conf.get("topologicalOrderStr")
    if isinstance(stored, list) and sorted(map(str, stored)) == sorted(order):
        order = [str(name) for name in stored]
    flows: dict[str, Flow] = {}
    for name in order:
        if name in inputs:
            shape = given.get(name) if isinstance(given, Mapping) else given if len(inputs) == 1 else None
            flows[name] = _graph_input(builder, name, vertices, feeds, shape)
            continue
        missing = [feed for feed in feeds.get(name, []) if feed not in flows]
        if missing:
            raise builder.fail(f"vertex {name!r} reads {missing[0]!r}, which comes after it.")
        flows[name] = _vertex(builder, name, vertices[name], [flows[feed] for feed in feeds.get(name, [])], flows)
    if not outputs:
        raise builder.fail("networkOutputs names no output.")
    for name in outputs:
        if name not in flows or name in inputs:
            raise builder.fail(f"output {name!r} is no vertex of the graph.")
    return {name: flows[name] for name in outputs}


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise FormatError(f"{what} is {_seen(value)}, not a list of names.")
    return list(value)


def _graph_input(
    builder: Builder, name: str, vertices: Fields, feeds: Mapping[str, list[str]], given: Sequence[int] | None
) -> Flow:
    for reader, sources in feeds.items():
        if name in sources and reader in vertices:
            kind, f = typed(vertices[reader], {}, f"{builder.net.what}: vertex {reader!r}")
            if kind == "LayerVertex":
                conf = get(f, "layerConf", "layerConfiguration")
                layer = _layer_of(conf, f"{builder.net.what}: vertex {reader!r}")
                return _input(builder, name, reader, layer, get(f, "preProcessor", "preprocessor"), given)
    if given is None:
        raise builder.fail(
            f"nothing says what shape a row of input {name!r} has. Give input_shape={{{name!r}: (3, 224, 224)}}."
        )
    return Flow(builder.net.input(name, tuple(given)))


def topological_order(inputs: list[str], vertices: list[str], feeds: Mapping[str, list[str]], what: str) -> list[str]:
    """Inputs and vertices in the order in which a ComputationGraph lays out its parameters.

    The algorithm of ComputationGraph.topologicalSortOrder, in which the order among equals is that of a Java HashSet
    of numbers.

    Raises: FormatError, for names that are not there and for cycles.

    >>> topological_order(["in"], ["b", "a", "out"], {"a": ["in"], "b": ["in"], "out": ["a", "b"]}, "x.zip")
    ['in', 'b', 'a', 'out']
    """
    names = [*inputs, *vertices]
    index = {name: place for place, name in enumerate(names)}
    if len(index) != len(names):
        raise FormatError(f"{what}: an input and a vertex have the same name.")
    into: list[set[int]] = [set() for _ in names]
    out_of: list[list[int]] = [[] for _ in names]
    for place, name in enumerate(names):
        for source in feeds.get(name, []) if place >= len(inputs) else []:
            if source not in index:
                raise FormatError(f"{what}: vertex {name!r} reads {source!r}, which is not there.")
            into[place].add(index[source])
            if place not in out_of[index[source]]:
                out_of[index[source]].append(place)
    ready = [place for place in range(len(names)) if not into[place]]
    order: list[int] = []
    while ready:
        place = ready.pop(0)
        order.append(place)
        for reader in _java_set_order(out_of[place]):
            into[reader].discard(place)
            if not into[reader]:
                ready.append(reader)
    if len(order) != len(names):
        raise FormatError(f"{what}: the graph has a cycle through {names[next(k for k, s in enumerate(into) if s)]!r}.")
    return [names[place] for place in order]


def _java_set_order(values: list[int]) -> list[int]:
    """How a java.util.HashSet iterates over small whole numbers: by their remainder to its power-of-two size.

    >>> _java_set_order([17, 3, 2])
    [17, 2, 3]
    """
    size = 16
    while len(values) > 0.75 * size:
        size *= 2
    return sorted(values, key=lambda value: (value ^ value >> 16) & (size - 1))


def _vertex(builder: Builder, name: str, value: Any, sources: list[Flow], flows: Mapping[str, Flow]) -> Flow:
    what = f"{builder.net.what}: vertex {name!r}"
    kind, f = typed(value, {}, what)
    what = f"{what} ({kind})"
    net, wires = builder.net, [flow.wire for flow in sources]
    if not sources:
        raise FormatError(f"{what} reads nothing.")
    if kind == "FrozenVertex":
        builder.frozen.append(name)
        return _vertex(builder, name, get(f, "underlying"), sources, flows)
    if kind == "LayerVertex":
        conf = get(f, "layerConf", "layerConfiguration")
        if len(sources) != 1:
            raise FormatError(f"{what} reads {len(sources)} vertices, not one.")
        flow = sources[0]
        before = get(f, "preProcessor", "preprocessor")
        if before is not None:
            flow = builder.preprocess(name, before, flow)
        return builder.layer(name, _layer_of(conf, what), flow)
    if kind == "PreprocessorVertex":
        return builder.preprocess(name, get(f, "preProcessor", "preprocessor"), sources[0])
    over_time = any(flow.over_time for flow in sources)
    axis = -1 if over_time or wires[0].rank == 2 else 1
    if kind == "MergeVertex":
        return Flow(
            net.call(name, torch.cat, list(wires), _size(f, what, "mergeAxis", default=axis, low=-1)), over_time
        )
    if kind == "ElementWiseVertex":
        return Flow(_element_wise(net, name, what, get(f, "op", default="Add"), wires), over_time)
    if kind == "SubsetVertex":
        start, end = _size(f, what, "from", low=0), _size(f, what, "to", low=0)
        if end < start:
            raise FormatError(f"{what} takes features {start} to {end}.")
        return Flow(net.call(name, torch.narrow, wires[0], axis, start, end - start + 1), over_time)
    if kind == "ScaleVertex":
        return Flow(net.call(name, operator.mul, wires[0], _number(f, what, "scaleFactor")), over_time)
    if kind == "ShiftVertex":
        return Flow(net.call(name, operator.add, wires[0], _number(f, what, "shiftFactor")), over_time)
    if kind == "L2NormalizeVertex" and not get(f, "dimension", default=[]):
        eps = _number(f, what, "eps", default=1e-8)
        return Flow(net.layer(name, lambda: L2Normalize(eps), wires[0]), over_time)
    if kind == "L2Vertex" and len(wires) == 2:
        gap = net.call(f"{name}_difference", operator.sub, *wires)
        square = net.call(f"{name}_square", operator.mul, gap, gap)
        total = net.call(f"{name}_sum", torch.sum, square, tuple(range(1, wires[0].rank)))
        root = net.call(f"{name}_root", torch.sqrt, net.call(f"{name}_eps", operator.add, total, _number(f, what, "eps", default=1e-8)))  # fmt: skip  # noqa: E501
        return Flow(net.call(name, torch.unsqueeze, root, 1))
    if kind == "PoolHelperVertex" and wires[0].rank == 4:
        rows = net.call(f"{name}_rows", torch.narrow, wires[0], 2, 1, wires[0].row[1] - 1)
        return Flow(net.call(name, torch.narrow, rows, 3, 1, wires[0].row[2] - 1))
    if kind == "LastTimeStepVertex" and wires[0].rank == 3 and not over_time:
        return Flow(net.call(name, torch.select, wires[0], 2, -1))
    if kind == "ReverseTimeSeriesVertex" and wires[0].rank == 3 and not over_time:
        return Flow(net.call(name, torch.flip, wires[0], [2]))
    if kind == "DuplicateToTimeSeriesVertex" and wires[0].rank == 2:
        like = flows.get(str(get(f, "inputName", "inputVertex")))
        if like is None or like.wire.rank != 3:
            raise FormatError(f"{what} repeats over the time steps of {_seen(get(f, 'inputName'))}, no series.")
        long = net.call(f"{name}_axis", torch.unsqueeze, wires[0], 2)
        return Flow(net.method(name, "expand", long, -1, -1, like.wire.row[1]))
    raise FormatError(f"{what} is of a type that is not read, or is given what it is not read with.")


def _element_wise(net: Assembly, name: str, what: str, op: Any, wires: list[Wire]) -> Wire:
    pairwise = {"Add": operator.add, "Subtract": operator.sub, "Product": operator.mul, "Average": operator.add,
                "Max": torch.maximum}  # fmt: skip
    if op not in pairwise or len(wires) < 2 or (op == "Subtract" and len(wires) != 2):
        raise FormatError(f"{what}: op {_seen(op)} of {len(wires)} vertices is not read; {', '.join(pairwise)} are.")
    total = wires[0]
    for place, wire in enumerate(wires[1:], 1):
        last = place == len(wires) - 1 and op != "Average"
        total = net.call(name if last else f"{name}_{place}", pairwise[op], total, wire)
    return net.call(name, operator.truediv, total, len(wires)) if op == "Average" else total


# --------------------------------------------------------------------------------------------- around the net


def _about(conf: Fields, kind: str, builder: Builder, has_state: bool) -> dict[str, Any]:
    """What else the file says: the training it comes from."""
    text = json.dumps(conf)[:200_000]
    training: dict[str, Any] = {"iterations": get(conf, "iterationCount", default=0), "loss": builder.loss}
    if builder.updaters:
        f = builder.updaters[0]
        updater = get(f, "iupdater", "iUpdater", "updater")
        if isinstance(updater, dict):
            training["updater"], fields = typed(updater, {}, "updater")
            training |= {k: v for k, v in fields.items() if k != "@class" and isinstance(v, int | float | str)}
        else:
            training["updater"] = str(updater)
        training |= {key: f[key] for key in ("l1", "l2") if isinstance(f.get(key), int | float) and f[key]}
    return {
        "network": kind,
        "dialect": "@class" if '"@class": "org.deeplearning4j' in text else "wrapper objects (1.0.0-alpha and before)",
        "training": training,
        "updater_state": has_state,
        "frozen": builder.frozen,
        "notes": builder.notes,
    }


def _imported(
    path: Path,
    builder: Builder,
    outputs: dict[str, Flow],
    normalizer: _Scaling | None,
    labels: Sequence[str] | None,
    keep_activation: bool,
    about: dict[str, Any],
) -> Imported:
    flows = list(outputs.values())
    names: tuple[str, ...] | None = None
    if len(flows) == 1 and flows[0].scores is not None and not keep_activation:
        outputs = {name: Flow(flow.scores or flow.wire) for name, flow in outputs.items()}
        names = tuple(str(label) for label in labels or range(flows[0].classes))
        if len(names) != flows[0].classes or len(set(names)) != len(names):
            raise ConfigError("labels", list(names), f"does not name {flows[0].classes} classes", "Give each one name")
        about["scores"] = "before the last activation, which prediction applies; keep_activation=True keeps it"
    elif labels is not None:
        raise ConfigError(
            "labels", list(labels), "have no place: the net has no single softmax output", "Leave them out"
        )
    module, signature = builder.net.finish({valid_name(name): flow.wire for name, flow in outputs.items()})
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    steps = tuple(_step(path, name, spec.shape[1:], spec.dtype, normalizer) for name, spec in signature.inputs.items())
    stated = "no scaling is stated: inputs are taken as they are"
    if normalizer is not None:
        stated = normalizer.kind
    targets = () if names is None else (LabelStep("target", "label", names),)
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation(steps, targets),
        labels=names,
        name=path.stem,
        source={"file": path.name, "sha256": file_digest(path), "format": NAME, "preparation": stated, **about},
    )


def _step(path: Path, name: str, row: Sequence[int | str], dtype: str, normalizer: _Scaling | None) -> Step:
    shape = tuple(int(size) for size in row)
    if normalizer is None or dtype != "float32":
        return ArrayStep(name, name, shape, dtype)
    count = len(normalizer.subtract)
    if count not in (1, shape[0], math.prod(shape)):
        raise FormatError(f"{path}: {NORMALIZER} has {count} numbers, but a row of {name!r} is {shape}.")
    return ScaledArrayStep(
        name,
        name,
        shape,
        subtract=tuple(map(float, normalizer.subtract)),
        multiply=tuple(map(float, np.broadcast_to(normalizer.multiply, normalizer.subtract.shape))),
        add=normalizer.add,
    )
