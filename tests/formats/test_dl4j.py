"""Deeplearning4j zips: a real one on real digits, and generated ones of every layer against formulas in numpy.

The generator writes what `ModelSerializer.writeModel`, `Nd4j.write` and `BaseDataBuffer.write` write: up to
1.0.0-alpha wrapper objects and int32 lengths, later `@class` and int64 lengths. What stands behind each formula is
named where it is written out.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import kindling as kd
from kindling import Model, graph, surgery
from kindling.errors import ConfigError, FormatError
from kindling.formats import dl4j, dl4j_updater, models
from kindling.formats.models import Imported

OLD, NEW = "wrapper", "@class"
RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ the writer


def utf(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def buffer(values: np.ndarray, kind: str, dialect: str, mode: str) -> bytes:
    length = struct.pack(">i" if dialect == OLD else ">q", values.size)
    dtype = {"FLOAT": ">f4", "DOUBLE": ">f8", "HALF": ">f2", "INT": ">i4", "LONG": ">i8"}[kind]
    return utf(mode) + length + utf(kind) + values.astype(dtype).tobytes()


def nd4j(values: np.ndarray, dialect: str = OLD, kind: str = "FLOAT") -> bytes:
    """Nd4j.write of a 'c'-ordered array: rank, shape, strides, offset, element stride, order; then the numbers."""
    strides = [int(np.prod(values.shape[k + 1 :])) for k in range(values.ndim)]
    info = np.array([values.ndim, *values.shape, *strides, 0, 1, ord("c")])
    if dialect == OLD:
        return buffer(info, "INT", OLD, "JAVACPP") + buffer(values.ravel(), kind, OLD, "JAVACPP")
    return buffer(info, "LONG", NEW, "LONG_SHAPE") + buffer(values.ravel(), kind, NEW, "MIXED_DATA_TYPES")


WRAPPED = {theirs: ours for ours, theirs in dl4j._WRAPPED_LAYERS.items()}
WRAPPED_PRE = {theirs: ours for ours, theirs in dl4j._WRAPPED_PREPROCESSORS.items()}


def typed(kind: str, fields: dict[str, Any], dialect: str, package: str, wrapped: dict[str, str]) -> dict[str, Any]:
    if dialect == OLD:
        return {wrapped.get(kind, kind): fields}
    return {"@class": f"org.deeplearning4j.nn.conf.{package}.{kind}", **fields}


def act(kind: str, dialect: str = OLD, **fields: Any) -> dict[str, Any]:
    if dialect == OLD:
        return {kind: fields}
    return {"@class": f"org.nd4j.linalg.activations.impl.Activation{kind}", **fields}


def layer(
    kind: str, dialect: str = OLD, activation: str | None = None, loss: str | None = None, **f: Any
) -> dict[str, Any]:
    fields = dict(f)
    if activation is not None:
        fields["activationFn"] = act(activation, dialect)
    if loss is not None:
        fields["lossFn"] = (
            {loss: {}} if dialect == OLD else {"@class": f"org.nd4j.linalg.lossfunctions.impl.Loss{loss}"}
        )
    return typed(kind, fields, dialect, "layers", WRAPPED)


def pre(kind: str, dialect: str = OLD, **f: Any) -> dict[str, Any]:
    return typed(kind, f, dialect, "preprocessor", WRAPPED_PRE)


def network(layers: list[dict[str, Any]], before: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "backprop": True,
        "confs": [{"layer": one, "seed": 1} for one in layers],
        "inputPreProcessors": before or {},
    }


def save(
    path: Path,
    conf: dict[str, Any],
    parameters: list[np.ndarray],
    dialect: str = OLD,
    kind: str = "FLOAT",
    **more: bytes,
) -> Path:
    """A zip of the configuration and the flat parameters; `more` are further members by stem."""
    flat = np.concatenate([np.zeros(0), *(part.ravel() for part in parameters)]).astype(np.float32)[None]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("configuration.json", json.dumps(conf, indent=2))
        archive.writestr("coefficients.bin", nd4j(flat, dialect, kind) if flat.size else b"")
        if not flat.size:
            archive.writestr("noParams.marker", b"")
        for stem, data in more.items():
            archive.writestr(f"{stem}.bin", data)
    return path


def f_order(array: np.ndarray) -> np.ndarray:
    """As it lies in the flat vector: column after column."""
    return array.ravel(order="F")


def rand(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


def run(model: Imported, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.module(*(torch.from_numpy(np.asarray(x)) for x in inputs)).numpy()


def check(model: Imported, expected: np.ndarray, *inputs: np.ndarray) -> None:
    """The net gives what is expected, and so does what a bundle makes of it."""
    np.testing.assert_allclose(run(model, *inputs), expected, rtol=2e-5, atol=2e-6)
    net = surgery.trace(model.module)
    assert net is not None
    again = graph.from_json(json.loads(json.dumps(graph.to_json(net))))
    graph.assign_tensors(again, graph.named_tensors(net))
    with torch.no_grad():
        out = again.eval()(*(torch.from_numpy(np.asarray(x)) for x in inputs)).numpy()
    np.testing.assert_array_equal(out, run(model, *inputs))


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# -------------------------------------------------------------------------------------------------- a real model


@pytest.mark.needs_data
def test_the_real_zip_reads_real_digits(data_dir: Path) -> None:
    """96.58 % on the 10,000 test digits with pixels of 0 to 1 (96.42 % with 0 to 255); the file states no scaling."""
    file = data_dir / "dl4j_zip" / "trained_mnist_model.zip"
    model = dl4j.read(file, scale=1 / 255)
    pixels = gzip.decompress((data_dir / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    truth = np.frombuffer(
        gzip.decompress((data_dir / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
    )
    column = np.frombuffer(pixels, np.uint8).reshape(-1, 784)
    rows = pa.RecordBatch.from_pydict({"features": pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), 784)})
    batch = model.preparation.batch(model.preparation.pack(rows, targets=False).arrays, targets=False)
    with torch.no_grad():
        scores = model.signature.call(model.module, batch)["layer1"]
    assert (scores.argmax(1).numpy() == truth).mean() == pytest.approx(0.9658, abs=0.0003)
    assert model.labels == tuple("0123456789")
    assert model.source["training"]["updater"] == "Nesterovs"
    whole = dl4j.read(file, keep_activation=True)
    assert whole.labels is None
    np.testing.assert_allclose(
        run(whole, column[:50].reshape(-1, 1, 28, 28).astype(np.float32) / 255), softmax(scores[:50].numpy()), atol=1e-6
    )


@pytest.mark.needs_data
def test_the_real_zip_is_a_model_that_can_be_cut(data_dir: Path) -> None:
    found = dl4j.read(data_dir / "dl4j_zip" / "trained_mnist_model.zip")
    model = Model(
        module=found.module,
        signature=found.signature,
        preparation=found.preparation,
        labels=found.labels,
        source=found.source,
    )
    assert "layer0" in str(model.summary())
    assert model.until("layer0").signature.outputs["layer0"].shape == ("N", 100)
    assert model.predict([np.zeros((1, 28, 28), np.float32)])[0]["error"] is None


# ------------------------------------------------------------------------------------------------ layers, written out


@pytest.mark.parametrize("dialect", [OLD, NEW])
@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE"])
def test_weights_lie_column_after_column(tmp_path: Path, dialect: str, kind: str) -> None:
    w, b, v, c = rand(3, 4), rand(4), rand(4, 2), rand(2)
    conf = network(
        [
            layer("DenseLayer", dialect, "TanH", nin=3, nout=4, layerName="first layer"),
            layer("OutputLayer", dialect, "Softmax", "MCXENT", nin=4, nout=2),
        ]
    )
    path = save(tmp_path / "net.zip", conf, [f_order(w), b, f_order(v), c], dialect, kind)
    x = rand(5, 3)
    scores = np.tanh(x @ w + b) @ v + c
    model = dl4j.read(path)
    check(model, scores, x)
    assert (model.labels, list(model.signature.outputs)) == (("0", "1"), ["layer1"])
    assert "first_layer" in dict(model.module.named_modules())
    check(dl4j.read(path, keep_activation=True), softmax(scores), x)
    assert dl4j.read(path, labels=["cat", "dog"]).labels == ("cat", "dog")
    with pytest.raises(ConfigError, match="does not name 2 classes"):
        dl4j.read(path, labels=["cat"])


def conv2d(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int, pads: tuple[int, int]) -> np.ndarray:
    """ConvolutionLayer.java: cross-correlation over NCHW, weights (out, in, height, width)."""
    x = np.pad(x, ((0, 0), (0, 0), pads, pads))
    k = w.shape[2]
    size = (x.shape[2] - k) // stride + 1
    out = np.zeros((len(x), len(w), size, size))
    for i in range(size):
        for j in range(size):
            patch = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, :, i, j] = np.einsum("nchw,ochw->no", patch, w) + b
    return out


def pool(x: np.ndarray, k: int, stride: int, pads: tuple[int, int], how: Any, fill: float) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), pads, pads), constant_values=fill)
    size = (x.shape[2] - k) // stride + 1
    out = np.zeros((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            out[:, :, i, j] = how(x[:, :, i * stride : i * stride + k, j * stride : j * stride + k], axis=(2, 3))
    return out


def lrn(x: np.ndarray, k: float, n: int, alpha: float, beta: float) -> np.ndarray:
    """LocalResponseNormalization.java: x / (k + alpha * sum of squares over n/2 channels on either side) ** beta."""
    total = np.zeros_like(x)
    for c in range(x.shape[1]):
        total[:, c] = (x[:, max(0, c - n // 2) : c + n // 2 + 1] ** 2).sum(1)
    return x / (k + alpha * total) ** beta


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_a_convolutional_net_computes_its_formulas(tmp_path: Path, dialect: str) -> None:
    """Convolution, LRN, max pooling, batch norm, flattened as channels, rows, columns into a dense layer."""
    w, b = rand(6, 2, 3, 3), rand(6)
    gamma, beta, mean, var = rand(6), rand(6), rand(6), rand(6) ** 2 + 0.1
    v, c = rand(6 * 3 * 3, 4), rand(4)
    conf = network(
        [
            layer("ConvolutionLayer", dialect, "ReLU", nin=2, nout=6, kernelSize=[3, 3], stride=[1, 1], padding=[0, 0],
                  convolutionMode="Truncate"),
            layer("LocalResponseNormalization", dialect, n=5.0, k=2.0, alpha=0.1, beta=0.75),
            layer("SubsamplingLayer", dialect, kernelSize=[2, 2], stride=[2, 2], padding=[0, 0], poolingType="MAX"),
            layer("BatchNormalization", dialect, "ReLU", nin=6, nout=6, eps=1e-3, decay=0.9, lockGammaBeta=False),
            layer("OutputLayer", dialect, "Identity", "MSE", nin=54, nout=4),
        ],
        {
            "0": pre("FeedForwardToCnnPreProcessor", dialect, inputHeight=8, inputWidth=8, numChannels=2),
            "4": pre("CnnToFeedForwardPreProcessor", dialect, inputHeight=3, inputWidth=3, numChannels=6),
        },
    )  # fmt: skip
    path = save(tmp_path / "cnn.zip", conf, [b, w, gamma, beta, mean, var, f_order(v), c], dialect)
    x = rand(3, 128)
    y = np.maximum(conv2d(x.reshape(3, 2, 8, 8), w, b, 1, (0, 0)), 0)
    y = pool(lrn(y, 2, 5, 0.1, 0.75), 2, 2, (0, 0), np.max, 0)
    each = (slice(None), None, None)
    y = (y - mean[each]) / np.sqrt(var[each] + 1e-3) * gamma[each] + beta[each]
    model = dl4j.read(path)
    check(model, y.reshape(3, 54) @ v + c, x)
    assert model.signature.inputs["features"].shape == ("N", 128)


@pytest.mark.parametrize("stride", [1, 2])
def test_mode_same_puts_the_odd_pixel_behind(tmp_path: Path, stride: int) -> None:
    """ConvolutionUtils.getSameModeTopLeftPadding: half of what is needed, rounded down, before."""
    w, b = rand(3, 1, 4, 4), rand(3)
    window = {"stride": [stride, stride], "convolutionMode": "Same"}
    conf = network(
        [
            layer("ConvolutionLayer", OLD, "Identity", nin=1, nout=3, kernelSize=[4, 4], **window),
            layer("SubsamplingLayer", OLD, kernelSize=[2, 2], poolingType="MAX", **window),
        ]
    )
    model = dl4j.read(save(tmp_path / "same.zip", conf, [b, w]), input_shape=(1, 8, 8))
    x = rand(2, 1, 8, 8)
    total = 3 if stride == 1 else 2
    y = conv2d(x, w, b, stride, (total // 2, total - total // 2))
    y = pool(y, 2, stride, (0, 1 if stride == 1 else 0), np.max, -np.inf)
    check(model, y, x)


def test_average_pooling_counts_padding_in_old_files_only(tmp_path: Path) -> None:
    """SubsamplingLayer.avgPoolIncludePadInDivisor: absent means true; versions after beta4 write false."""
    x = rand(2, 3, 5, 5)
    window = {"kernelSize": [3, 3], "stride": [2, 2], "padding": [1, 1], "poolingType": "AVG"}
    old = dl4j.read(save(tmp_path / "a.zip", network([layer("SubsamplingLayer", **window)]), []), input_shape=(3, 5, 5))
    check(old, pool(x, 3, 2, (1, 1), np.mean, 0), x)
    window["avgPoolIncludePadInDivisor"] = False
    path = save(tmp_path / "b.zip", network([layer("SubsamplingLayer", NEW, **window)]), [], NEW)
    new = dl4j.read(path, input_shape=(3, 5, 5))
    check(new, pool(x, 3, 2, (1, 1), np.nanmean, np.nan), x)
    window |= {"convolutionMode": "Same", "kernelSize": [2, 2], "padding": [0, 0]}
    path = save(tmp_path / "c.zip", network([layer("SubsamplingLayer", NEW, **window)]), [], NEW)
    odd = dl4j.read(path, input_shape=(3, 5, 5))
    check(odd, pool(x, 2, 2, (0, 1), np.nanmean, np.nan), x)


def test_other_poolings(tmp_path: Path) -> None:
    x = rand(2, 3, 4, 4)
    for how, reference in {
        "SUM": np.sum,
        "PNORM": lambda p, axis: (np.abs(p) ** 3).sum(axis) ** (1 / 3),
    }.items():
        conf = network([layer("SubsamplingLayer", kernelSize=[2, 2], stride=[2, 2], poolingType=how, pnorm=3)])
        check(
            dl4j.read(save(tmp_path / "p.zip", conf, []), input_shape=(3, 4, 4)), pool(x, 2, 2, (0, 0), reference, 0), x
        )
    for how, expected in {"AVG": x.mean((2, 3)), "MAX": x.max((2, 3)), "PNORM": np.sqrt((x**2).sum((2, 3)))}.items():
        conf = network([layer("GlobalPoolingLayer", poolingType=how, pnorm=2)])
        check(dl4j.read(save(tmp_path / "g.zip", conf, []), input_shape=(3, 4, 4)), expected, x)


def test_batch_norm_with_locked_and_logged_parameters(tmp_path: Path) -> None:
    mean, log_deviation = rand(3), rand(3)
    fields = {"nin": 3, "nout": 3, "eps": 1e-5, "decay": 0.9, "lockGammaBeta": True, "gamma": 2.0, "beta": 0.5}
    conf = network([layer("BatchNormalization", NEW, useLogStd=True, **fields)])
    model = dl4j.read(save(tmp_path / "bn.zip", conf, [mean, log_deviation], NEW))
    x = rand(4, 3)
    check(model, (x - mean) / np.sqrt((10.0**log_deviation) ** 2 + 1e-5) * 2 + 0.5, x)


def lstm(x: np.ndarray, w: np.ndarray, r: np.ndarray, b: np.ndarray, gate: Any = sigmoid) -> np.ndarray:
    """LSTMHelpers.activateHelper: blocks input (tanh), forget, output, input gate; columns wFF, wOO, wGG behind."""
    n = len(r)
    peep = r[:, 4 * n :] if r.shape[1] > 4 * n else np.zeros((n, 3))
    h, c, out = np.zeros((len(x), n)), np.zeros((len(x), n)), []
    for t in range(x.shape[2]):
        z = x[:, :, t] @ w + h @ r[:, : 4 * n] + b
        candidate = np.tanh(z[:, :n])
        forget = gate(z[:, n : 2 * n] + c * peep[:, 0])
        input_gate = gate(z[:, 3 * n :] + c * peep[:, 2])
        c = forget * c + input_gate * candidate
        output = gate(z[:, 2 * n : 3 * n] + c * peep[:, 1])
        h = output * np.tanh(c)
        out.append(h)
    return np.stack(out, 2)


@pytest.mark.parametrize("dialect", [OLD, NEW])
@pytest.mark.parametrize(("kind", "peepholes"), [("GravesLSTM", 3), ("LSTM", 0)])
def test_recurrent_nets_compute_their_formulas(tmp_path: Path, dialect: str, kind: str, peepholes: int) -> None:
    w, r, b, v, c = rand(3, 16), rand(4, 16 + peepholes), rand(16), rand(4, 2), rand(2)
    conf = network(
        [
            layer(kind, dialect, "TanH", nin=3, nout=4, gateActivationFn=act("Sigmoid", dialect)),
            layer("RnnOutputLayer", dialect, "Softmax", "MCXENT", nin=4, nout=2),
        ]
    )
    path = save(tmp_path / "rnn.zip", conf, [f_order(w), f_order(r), b, f_order(v), c], dialect)
    x = rand(2, 3, 6)
    y = np.einsum("nht,ho->not", lstm(x, w, r, b), v) + c[:, None]
    model = dl4j.read(path, input_shape=(3, 6))
    check(model, softmax(y, 1), x)
    assert model.labels is None, "a series of classes is not one class a row"
    with pytest.raises(FormatError, match=r"does not say what shape.*features and time steps.*input_shape=\(3, 50\)"):
        dl4j.read(path)


def test_hard_gates_and_dense_layers_over_time(tmp_path: Path) -> None:
    w, r, b, v, c = rand(3, 8), rand(2, 8), rand(8), rand(2, 5), rand(5)
    conf = network(
        [
            layer("LSTM", OLD, "TanH", nin=3, nout=2, gateActivationFn=act("HardSigmoid")),
            layer("DenseLayer", OLD, "ReLU", nin=2, nout=5),
            layer("GlobalPoolingLayer", poolingType="AVG"),
        ],
        {"1": pre("RnnToFeedForwardPreProcessor"), "2": pre("FeedForwardToRnnPreProcessor")},
    )
    model = dl4j.read(save(tmp_path / "r.zip", conf, [f_order(w), f_order(r), b, f_order(v), c]), input_shape=(3, 4))
    x = rand(2, 3, 4)
    hidden = lstm(x, w, r, b, lambda z: np.clip(0.2 * z + 0.5, 0, 1))
    check(model, np.maximum(np.einsum("nht,ho->not", hidden, v) + c[:, None], 0).mean(2), x)


def test_both_directions(tmp_path: Path) -> None:
    """GravesBidirectionalLSTM adds the two directions; Bidirectional joins them as its mode says."""
    parts = [(rand(3, 16), rand(4, 19), rand(16)) for _ in range(2)]
    flat = [array for w, r, b in parts for array in (f_order(w), f_order(r), b)]
    x = rand(2, 3, 5)
    ahead, back = (lstm(x, *parts[0]), lstm(x[:, :, ::-1], *parts[1])[:, :, ::-1])
    conf = network([layer("GravesBidirectionalLSTM", OLD, "TanH", nin=3, nout=4)])
    check(dl4j.read(save(tmp_path / "g.zip", conf, flat), input_shape=(3, 5)), ahead + back, x)
    inner = layer("GravesLSTM", NEW, "TanH", nin=3, nout=4)
    for mode, expected in {
        "CONCAT": np.concatenate([ahead, back], 1), "ADD": ahead + back, "MUL": ahead * back,
        "AVERAGE": (ahead + back) / 2,
    }.items():  # fmt: skip
        conf = network([layer("Bidirectional", NEW, fwd=inner, bwd=inner, mode=mode)])
        check(dl4j.read(save(tmp_path / "b.zip", conf, flat, NEW), input_shape=(3, 5)), expected, x)
    conf = network([layer("LastTimeStep", NEW, underlying=inner)])
    check(dl4j.read(save(tmp_path / "l.zip", conf, flat[:3], NEW), input_shape=(3, 5)), ahead[:, :, -1], x)


def test_embeddings_are_rows_of_a_table(tmp_path: Path) -> None:
    w, b = rand(7, 3), rand(3)
    conf = network([layer("EmbeddingLayer", OLD, "TanH", nin=7, nout=3)])
    index = np.array([[4], [0], [6]])
    check(dl4j.read(save(tmp_path / "e.zip", conf, [f_order(w), b])), np.tanh(w[index[:, 0]] + b), index)
    conf = network([layer("EmbeddingSequenceLayer", NEW, "Identity", nin=7, nout=3, hasBias=False, inputLength=4)])
    index = np.array([[1, 2, 3, 6], [0, 0, 5, 4]])
    check(dl4j.read(save(tmp_path / "s.zip", conf, [f_order(w)], NEW)), w[index].transpose(0, 2, 1), index)


def test_convolutions_over_time(tmp_path: Path) -> None:
    w, b = rand(4, 2, 3, 1), rand(4)
    fields = {"nin": 2, "nout": 4, "kernelSize": [3, 1], "stride": [1, 1], "convolutionMode": "Causal"}
    conf = network([layer("Convolution1DLayer", OLD, "Identity", **fields)])
    model = dl4j.read(save(tmp_path / "c.zip", conf, [b, w]), input_shape=(2, 6))
    x = rand(2, 2, 6)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 0)))
    y = np.stack([np.einsum("nct,oct->no", padded[:, :, t : t + 3], w[..., 0]) + b for t in range(6)], 2)
    check(model, y, x)


def rational(y: np.ndarray) -> np.ndarray:
    """ActivationRationalTanh.java: an approximation of tanh."""
    return np.sign(y) * (1 - 1 / (1 + abs(y) + y**2 + 1.41645 * y**4))


ACTIVATIONS: dict[str, Any] = {
    "Cube": lambda x: x**3,
    "ELU": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "GELU": lambda x: x * sigmoid(1.702 * x),
    "HardSigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "HardTanh": lambda x: np.clip(x, -1, 1),
    "Identity": lambda x: x,
    "LReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "RReLU": lambda x: np.where(x > 0, x, x * (1 / 8 + 1 / 3) / 2),
    "RationalTanh": lambda x: 1.7159 * rational(2 * x / 3),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "RectifiedTanh": lambda x: np.maximum(np.tanh(x), 0),
    "SELU": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
    "Sigmoid": sigmoid,
    "SoftPlus": lambda x: np.log1p(np.exp(x)),
    "SoftSign": lambda x: x / (1 + abs(x)),
    "Softmax": softmax,
    "Swish": lambda x: x * sigmoid(x),
    "TanH": np.tanh,
    "ThresholdedReLU": lambda x: np.where(x > 1, x, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_activations(tmp_path: Path, kind: str, dialect: str) -> None:
    path = save(tmp_path / "a.zip", network([layer("ActivationLayer", dialect, kind)]), [], dialect)
    x = rand(20, 4) * 4
    check(dl4j.read(path, input_shape=(4,)), ACTIVATIONS[kind](x), x)


def test_dropout_is_told_as_the_share_that_is_kept(tmp_path: Path) -> None:
    w, b = rand(4, 4), rand(4)
    old = network([layer("DenseLayer", OLD, "Identity", nin=4, nout=4, dropOut=0.8)])
    new = network([layer("DenseLayer", NEW, "Identity", nin=4, nout=4,
                         idropout={"@class": "org.deeplearning4j.nn.conf.dropout.Dropout", "p": 0.8})])  # fmt: skip
    none = network([layer("DenseLayer", OLD, "Identity", nin=4, nout=4, dropOut=0.0)])
    for conf, dialect in ((old, OLD), (new, NEW)):
        model = dl4j.read(save(tmp_path / "d.zip", conf, [f_order(w), b], dialect))
        assert dict(model.module.named_modules())["layer0_dropout"].p == pytest.approx(0.2)
        assert not model.module.training
    model = dl4j.read(save(tmp_path / "d.zip", none, [f_order(w), b]))
    assert [name for name, _ in model.module.named_children()] == ["layer0"]


def test_frozen_layers_are_unwrapped_and_named(tmp_path: Path) -> None:
    w, b = rand(2, 3), rand(3)
    inner = layer("DenseLayer", NEW, "Identity", nin=2, nout=3)
    model = dl4j.read(save(tmp_path / "f.zip", network([layer("FrozenLayer", NEW, layer=inner)]), [f_order(w), b], NEW))
    x = rand(2, 2)
    check(model, x @ w + b, x)
    assert model.source["frozen"] == ["layer0"]


# ----------------------------------------------------------------------------------------------------- graphs


def vertex(kind: str, dialect: str = OLD, **f: Any) -> dict[str, Any]:
    return typed(kind, f, dialect, "graph", {})


def of(layer_conf: dict[str, Any], before: dict[str, Any] | None = None, dialect: str = OLD) -> dict[str, Any]:
    return vertex("LayerVertex", dialect, layerConf={"layer": layer_conf}, preProcessor=before, outputVertex=False)


def graph_conf(inputs: list[str], vertices: dict[str, tuple[Any, list[str]]], outputs: list[str]) -> dict[str, Any]:
    return {
        "networkInputs": inputs,
        "networkOutputs": outputs,
        "vertices": {name: conf for name, (conf, _) in vertices.items()},
        "vertexInputs": {name: feeds for name, (_, feeds) in vertices.items()},
    }


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_a_graph_of_two_inputs_merges_and_adds(tmp_path: Path, dialect: str) -> None:
    """Parameters lie in topological order, not in that of the file: `b` is fed before `a` is."""
    wa, ba, wb, bb, wo, bo = rand(3, 4), rand(4), rand(2, 4), rand(4), rand(12, 2), rand(2)
    conf = graph_conf(
        ["left", "right"],
        {
            "out": (of(layer("OutputLayer", dialect, "Softmax", "MCXENT", nin=12, nout=2), None, dialect), ["all"]),
            "all": (vertex("MergeVertex", dialect), ["a", "b", "sum"]),
            "sum": (vertex("ElementWiseVertex", dialect, op="Add"), ["a", "b"]),
            "b": (of(layer("DenseLayer", dialect, "TanH", nin=2, nout=4), None, dialect), ["right"]),
            "a": (of(layer("DenseLayer", dialect, "ReLU", nin=3, nout=4), None, dialect), ["left"]),
        },
        ["out"],
    )
    parameters = [f_order(wa), ba, f_order(wb), bb, f_order(wo), bo]
    model = dl4j.read(save(tmp_path / "g.zip", conf, parameters, dialect))
    left, right = rand(3, 3), rand(3, 2)
    a, b = np.maximum(left @ wa + ba, 0), np.tanh(right @ wb + bb)
    check(model, np.concatenate([a, b, a + b], 1) @ wo + bo, left, right)
    assert list(model.signature.inputs) == ["left", "right"]
    assert model.labels == ("0", "1")
    conf["topologicalOrderStr"] = ["left", "right", "b", "a", "sum", "all", "out"]
    turned = dl4j.read(save(tmp_path / "t.zip", conf, [f_order(wb), bb, f_order(wa), ba, f_order(wo), bo], dialect))
    check(turned, np.concatenate([a, b, a + b], 1) @ wo + bo, left, right)


def test_vertices_compute_their_formulas(tmp_path: Path) -> None:
    x, y = rand(3, 6), rand(3, 6)
    for (kind, fields), expected in (
        (("ElementWiseVertex", {"op": "Subtract"}), x - y),
        (("ElementWiseVertex", {"op": "Product"}), x * y),
        (("ElementWiseVertex", {"op": "Average"}), (x + y) / 2),
        (("ElementWiseVertex", {"op": "Max"}), np.maximum(x, y)),
        (("L2Vertex", {"eps": 1e-8}), np.sqrt(((x - y) ** 2).sum(1, keepdims=True) + 1e-8)),
        (("SubsetVertex", {"from": 1, "to": 3}), x[:, 1:4]),
        (("ScaleVertex", {"scaleFactor": 2.5}), 2.5 * x),
        (("ShiftVertex", {"shiftFactor": -1.5}), x - 1.5),
        (("L2NormalizeVertex", {"dimension": [], "eps": 1e-8}), x / np.linalg.norm(x, axis=1, keepdims=True)),
    ):
        both = kind in ("ElementWiseVertex", "L2Vertex")
        conf = graph_conf(
            ["x", "y"] if both else ["x"], {"v": (vertex(kind, **fields), ["x", "y"] if both else ["x"])}, ["v"]
        )
        model = dl4j.read(save(tmp_path / "v.zip", conf, []), input_shape={"x": (6,), "y": (6,)})
        check(model, expected, *([x, y] if both else [x]))


def test_vertices_of_series_and_pictures(tmp_path: Path) -> None:
    series, row = rand(2, 3, 5), rand(2, 4)
    conf = graph_conf(
        ["s", "r"],
        {
            "back": (vertex("ReverseTimeSeriesVertex", maskArrayInputName="s"), ["s"]),
            "again": (vertex("DuplicateToTimeSeriesVertex", inputName="s"), ["r"]),
            "both": (vertex("MergeVertex"), ["back", "again"]),
            "last": (vertex("LastTimeStepVertex", maskArrayInputName="s"), ["both"]),
        },
        ["last"],
    )
    model = dl4j.read(save(tmp_path / "s.zip", conf, []), input_shape={"s": (3, 5), "r": (4,)})
    check(model, np.concatenate([series[:, :, 0], row], 1), series, row)
    picture = rand(2, 3, 4, 4)
    conf = graph_conf(["p"], {"h": (vertex("PoolHelperVertex"), ["p"])}, ["h"])
    check(dl4j.read(save(tmp_path / "p.zip", conf, []), input_shape=(3, 4, 4)), picture[:, :, 1:, 1:], picture)


def test_the_order_of_parameters_follows_a_java_set() -> None:
    """21 vertices read the input: java.util.HashSet of 22 numbers has 32 buckets, of 12 and fewer 16."""
    names = [f"v{k}" for k in range(21)]
    feeds = {name: ["in"] for name in names}
    assert dl4j.topological_order(["in"], names, feeds, "x") == ["in", *names]
    few = {name: (["in"] if k in (2, 15, 16, 17) else ["v2"]) for k, name in enumerate(names)}
    order = dl4j.topological_order(["in"], names, few, "x")
    assert order[:5] == ["in", "v15", "v16", "v17", "v2"], "vertex 16 = v15 falls into bucket 0"
    with pytest.raises(FormatError, match="cycle through 'a'"):
        dl4j.topological_order(["in"], ["a", "b"], {"a": ["b"], "b": ["a"]}, "x")


# --------------------------------------------------------------------------------------------- preparation


def test_a_normalizer_becomes_the_preparation(tmp_path: Path) -> None:
    w, b = rand(3, 2), rand(2)
    conf = network([layer("OutputLayer", OLD, "Identity", "MSE", nin=3, nout=2)])
    mean, deviation = np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 0.5, 0.0]])
    head = utf("NORMALIZER") + struct.pack(">i", 1)
    standard = head + utf("STANDARDIZE") + b"\0" + nd4j(mean) + nd4j(deviation)
    between = head + utf("MIN_MAX") + b"\0" + struct.pack(">2d", -1, 1) + nd4j(mean) + nd4j(mean + 4)
    pixels = head + utf("IMAGE_MIN_MAX") + struct.pack(">3d", -1, 1, 255)
    rows = pa.RecordBatch.from_pydict({"features": [[3.0, 4.0, 5.0]]})
    for data, expected in (
        (standard, [1.0, 4.0, 2.0]),
        (between, [0.0, 0.0, 0.0]),
        (pixels, [3 / 127.5 - 1, 4 / 127.5 - 1, 5 / 127.5 - 1]),
    ):
        model = dl4j.read(save(tmp_path / "n.zip", conf, [f_order(w), b], normalizer=data))
        packed = model.preparation.pack(rows, targets=False)
        made = model.preparation.batch(packed.arrays, targets=False)["features"]
        np.testing.assert_allclose(made.numpy(), [expected], atol=1e-6)
        again = type(model.preparation).from_json(json.loads(json.dumps(model.preparation.to_json())))
        assert again == model.preparation
    odd = head + utf("CUSTOM") + utf("com.example.Mine")
    with pytest.raises(FormatError, match="normalizer of kind 'CUSTOM'"):
        dl4j.read(save(tmp_path / "n.zip", conf, [f_order(w), b], normalizer=odd))


# ------------------------------------------------------------------------------------------------- the optimizer


def flat(model: Imported | Model, of: str) -> np.ndarray:
    """Parameters or gradients of `small` as Deeplearning4j lays them out: rows of torch's matrices are its columns."""
    order = ("layer0.bias", "layer0.weight", "layer1.weight", "layer1.bias")
    known = dict(model.module.named_parameters())
    return np.concatenate([getattr(known[name], of).detach().numpy().ravel() for name in order])


def nesterovs(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    """NesterovsUpdater: v' = mu v - lr g; the step is mu v - (1 + mu) v'."""
    after = 0.9 * s[0] - lr * g
    return 0.9 * s[0] - 1.9 * after


def adam(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    """AdamUpdater, the bias correction in the rate."""
    m, v = 0.9 * s[0] + 0.1 * g, 0.999 * s[1] + 0.001 * g * g
    return lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)


def adamax(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    return lr / (1 - 0.9**t) * (0.9 * s[0] + 0.1 * g) / (np.maximum(0.999 * s[1], abs(g)) + 1e-8)


def adagrad(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    return lr * g / (np.sqrt(s[0] + g * g) + 1e-8)


def adadelta(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    msg = 0.9 * s[0] + 0.1 * g * g
    return g * np.sqrt(s[1] + 1e-8) / np.sqrt(msg + 1e-8)


def rmsprop(s: np.ndarray, g: np.ndarray, lr: float, t: int) -> np.ndarray:
    return lr * g / np.sqrt(0.9 * s[0] + 0.1 * g * g + 1e-8)


UPDATERS: dict[str, tuple[int, Any, dict[str, float]]] = {
    "Nesterovs": (1, nesterovs, {"momentum": 0.9}),
    "Adam": (2, adam, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}),
    "AdaMax": (2, adamax, {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}),
    "AdaGrad": (1, adagrad, {"epsilon": 1e-8}),
    "AdaDelta": (2, adadelta, {"rho": 0.9, "epsilon": 1e-8}),
    "RmsProp": (1, rmsprop, {"rmsDecay": 0.9, "epsilon": 1e-8}),
}


@pytest.mark.parametrize("kind", UPDATERS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_an_optimizer_goes_on_where_deeplearning4j_stopped(tmp_path: Path, kind: str, blocks: int) -> None:
    """One step of torch with the stored state is the step that ND4J's updater would make."""
    parts, formula, fields = UPDATERS[kind]
    small(tmp_path / "plain.zip")
    with zipfile.ZipFile(tmp_path / "plain.zip") as archive:
        conf = json.loads(archive.read("configuration.json"))
        coefficients = archive.read("coefficients.bin")
    conf["iterationCount"] = 7
    lr = 0.02
    for place, one in enumerate(conf["confs"]):
        (f,) = one["layer"].values()
        # What differs without a meaning splits the parameters into blocks.
        f["iupdater"] = {"@class": f"org.nd4j.linalg.learning.config.{kind}", "learningRate": lr, **fields}
        f["iupdater"] |= {"note": place} if blocks == 2 else {}
    sizes = [10 + 57] if blocks == 1 else [10, 57]
    state = [np.abs(rand(parts, size)) for size in sizes]
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("configuration.json", json.dumps(conf))
        archive.writestr("coefficients.bin", coefficients)
        archive.writestr("updaterState.bin", nd4j(np.concatenate([part.ravel() for part in state])[None]))
    model = dl4j.read(tmp_path / "model.zip")
    optimizer = dl4j_updater.read_optimizer(tmp_path / "model.zip", model.module)
    for parameter in model.module.parameters():
        parameter.grad = torch.from_numpy(rand(*parameter.shape))
    before, gradient = flat(model, "data"), flat(model, "grad")
    optimizer.step()
    together = np.concatenate(state, 1)
    np.testing.assert_allclose(before - flat(model, "data"), formula(together, gradient, lr, 8), rtol=2e-3, atol=1e-6)


def trained_zip(path: Path, change: Callable[[int, dict[str, Any]], None], parts: int) -> tuple[Path, np.ndarray]:
    """`small` after seven iterations, its layers' updaters set by `change`; and the state, (parts, parameters)."""
    small(path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as archive:
        conf = json.loads(archive.read("configuration.json"))
        coefficients = archive.read("coefficients.bin")
    conf["iterationCount"] = 7
    for place, one in enumerate(conf["confs"]):
        (f,) = one["layer"].values()
        change(place, f)
    state = [np.abs(rand(parts, size)) for size in (10, 57)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("configuration.json", json.dumps(conf))
        archive.writestr("coefficients.bin", coefficients)
        archive.writestr("updaterState.bin", nd4j(np.concatenate([part.ravel() for part in state])[None]))
    return path, np.concatenate(state, 1)


def test_each_layer_goes_on_with_its_own_rate_and_decay(tmp_path: Path) -> None:
    rates, decays = (0.02, 0.005), (0.1, 0.0)

    def change(place: int, f: dict[str, Any]) -> None:
        kind = "org.nd4j.linalg.learning"
        f["iupdater"] = {"@class": f"{kind}.config.Adam", "learningRate": rates[place], **UPDATERS["Adam"][2]}
        if decays[place]:
            f["regularization"] = [{"@class": f"{kind}.regularization.L2Regularization", "l2": decays[place]}]

    path, state = trained_zip(tmp_path / "model.zip", change, 2)
    made = dl4j_updater.dl4j_optimizer(path)
    assert made.notes == ()
    assert "array" not in repr(made)
    model, head = dl4j.read(path), torch.nn.Linear(2, 2)
    pairs = [*model.module.named_parameters(), *((f"head.{name}", one) for name, one in head.named_parameters())]
    optimizer = pickle.loads(pickle.dumps(made))(pairs)
    for parameter in model.module.parameters():
        parameter.grad = torch.from_numpy(rand(*parameter.shape))
    before, gradient = flat(model, "data"), flat(model, "grad")
    optimizer.step()
    rate, decay = np.full(67, rates[1]), np.zeros(67)
    rate[:10], decay[:10] = rates[0], decays[0]
    decay[:2] = 0.0  # biases have a list of their own
    expected = adam(state, gradient + decay * before, rate, 8)
    np.testing.assert_allclose(before - flat(model, "data"), expected, rtol=2e-3, atol=1e-6)
    of_head = next(group for group in optimizer.param_groups if any(one is head.weight for one in group["params"]))
    assert of_head["lr"] == rates[1]
    assert not optimizer.state[head.weight]
    assert {g["lr"] for g in dl4j_updater.dl4j_optimizer(path, lr=0.5)(pairs).param_groups} == {0.5}
    with pytest.raises(ConfigError, match="are none of torch's Adam"):
        dl4j_updater.dl4j_optimizer(path, momentum=0.5)
    with pytest.raises(ConfigError, match="knows none of the parameters that learn"):
        made(list(head.named_parameters()))
    with pytest.raises(ConfigError, match=r"keeps exp_avg of shape \(3, 18\) for 'layer1.weight', which is \(2, 2\)"):
        made([("layer1.weight", head.weight)])


def test_what_an_optimizer_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = "org.nd4j.linalg.learning"

    def change(place: int, f: dict[str, Any]) -> None:
        f["iupdater"] = {"@class": f"{kind}.config.AdaGrad", "learningRate": 0.1, "epsilon": 1e-6, "place": place}
        f |= {"l2": 1e-4, "l1": 0.0, "gradientNormalization": "ClipL2PerLayer", "learningRateSchedule": None}
        f["regularization"] = [{"@class": f"{kind}.regularization.WeightDecay", "coeff": 0.5, "applyLR": True}]

    made = dl4j_updater.dl4j_optimizer(trained_zip(tmp_path / "model.zip", change, 1)[0])
    assert [note.partition(";")[0] for note in made.notes] == [
        "gradient normalisation ClipL2PerLayer is left out",
        "WeightDecay of 0.5 is left out",
        "l2 of 0.0001 is left out",
    ]
    assert "l2 of 0.0001 is left out" in caplog.text


@pytest.mark.spark
@pytest.mark.slow
def test_training_goes_on_where_deeplearning4j_stopped(spark: Any, tmp_path: Path) -> None:
    """One step on Spark is the step that Deeplearning4j's Nesterovs would have made next."""

    def change(place: int, f: dict[str, Any]) -> None:
        f["iupdater"] = {"@class": "org.nd4j.linalg.learning.config.Nesterovs", "learningRate": 0.02, "momentum": 0.9}
        f["iupdater"]["place"] = place

    path, state = trained_zip(tmp_path / "model.zip", change, 1)
    model, x, truth = kd.load(path), rand(12, 16), np.arange(12) % 3
    (step,) = model.preparation.inputs
    rows = [(number, x[number].tolist(), str(truth[number])) for number in range(12)]
    df = spark.createDataFrame(rows, f"id int, {step.column} array<float>, label string")
    trained = model.fit(
        df, optimizer=kd.dl4j_optimizer(path), workers=2, batch_size=6, epochs=1, key="id", progress=False
    )
    plain = dl4j.read(path)
    scores = plain.module(torch.from_numpy(x))
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(truth)).backward()
    expected = flat(plain, "data") - nesterovs(state, flat(plain, "grad"), 0.02, 8)
    np.testing.assert_allclose(flat(trained, "data"), expected, rtol=2e-4, atol=1e-6)
    assert np.abs(flat(trained, "data") - flat(plain, "data")).min() > 1e-4  # every weight has moved
    assert "Nesterovs" in trained.history[-1]["optimizer"]


def test_an_optimizer_that_is_not_there_or_not_known_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "plain.zip")
    model = dl4j.read(path)
    with pytest.raises(FormatError, match=r"has no updaterState\.bin"):
        dl4j_updater.read_optimizer(path, model.module)
    conf = network([layer("OutputLayer", NEW, "Softmax", "MCXENT", nin=2, nout=2, iupdater={"@class": "a.b.Odd"})])
    path = save(tmp_path / "odd.zip", conf, [rand(4), rand(2)], NEW, updaterState=nd4j(rand(1, 6), NEW))
    with pytest.raises(FormatError, match="updater Odd has no counterpart"):
        dl4j_updater.read_optimizer(path, dl4j.read(path).module)
    conf["confs"][0]["layer"]["iupdater"] = {"@class": "a.b.Adam", "learningRate": 0.1}
    path = save(tmp_path / "few.zip", conf, [rand(4), rand(2)], NEW, updaterState=nd4j(rand(1, 6), NEW))
    with pytest.raises(FormatError, match="holds 6 numbers, fewer than its updaters keep"):
        dl4j_updater.read_optimizer(path, dl4j.read(path).module)


# ------------------------------------------------------------------------------------------------- what is refused


def small(path: Path, kind: str = "FLOAT", dialect: str = OLD) -> Path:
    conf = network(
        [
            layer("ConvolutionLayer", dialect, "ReLU", nin=1, nout=2, kernelSize=[2, 2], stride=[1, 1], padding=[0, 0]),
            layer("OutputLayer", dialect, "Softmax", "MCXENT", nin=18, nout=3),
        ],
        {
            "0": pre("FeedForwardToCnnPreProcessor", dialect, inputHeight=4, inputWidth=4, numChannels=1),
            "1": pre("CnnToFeedForwardPreProcessor", dialect, inputHeight=3, inputWidth=3, numChannels=2),
        },
    )
    return save(path, conf, [rand(2), rand(2, 1, 2, 2), rand(18, 3), rand(3)], dialect, kind)


def test_an_unknown_layer_is_named_with_its_type(tmp_path: Path) -> None:
    conf = network([layer("Yolo2OutputLayer", NEW, layerName="boxes")])
    with pytest.raises(FormatError, match=r"layer 'boxes' \(Yolo2OutputLayer\) is of a type that is not read"):
        dl4j.read(save(tmp_path / "y.zip", conf, [], NEW), input_shape=(3, 4, 4))
    conf = graph_conf(["in"], {"odd": (vertex("StackVertex"), ["in", "in"])}, ["odd"])
    with pytest.raises(FormatError, match=r"vertex 'odd' \(StackVertex\)"):
        dl4j.read(save(tmp_path / "s.zip", conf, []), input_shape=(3,))
    conf = network([layer("DenseLayer", OLD, "Wobble", nin=1, nout=1)])
    with pytest.raises(FormatError, match=r"layer 'layer0'.*activation 'wobble' is not read"):
        dl4j.read(save(tmp_path / "a.zip", conf, [rand(2)]))


def test_parameters_must_fit_the_layers(tmp_path: Path) -> None:
    conf = network([layer("DenseLayer", OLD, "ReLU", nin=3, nout=2)])
    with pytest.raises(FormatError, match="layer 'layer0' needs 6 parameters, but 5 of 5 are left"):
        dl4j.read(save(tmp_path / "few.zip", conf, [rand(5)]))
    with pytest.raises(FormatError, match="holds 9 parameters, but its layers take 8"):
        dl4j.read(save(tmp_path / "many.zip", conf, [rand(9)]))


def test_sizes_that_are_lies_cost_nothing(tmp_path: Path) -> None:
    huge = network([layer("DenseLayer", OLD, "ReLU", nin=2**30, nout=2**30)])
    with pytest.raises(FormatError, match="needs 1,152,921,504,606,846,976 parameters"):
        dl4j.read(save(tmp_path / "a.zip", huge, [rand(5)]))
    path = tmp_path / "b.zip"
    info = buffer(np.array([2, 1, 2**30, 1, 1, 0, 1, 99]), "INT", OLD, "JAVACPP")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("configuration.json", json.dumps(huge))
        archive.writestr("coefficients.bin", info + utf("JAVACPP") + struct.pack(">i", 2**30) + utf("FLOAT") + b"1234")
    with pytest.raises(FormatError, match="claims a buffer of 1,073,741,824 numbers"):
        dl4j.read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("configuration.json", json.dumps(huge))
        archive.writestr("coefficients.bin", bytes(200 << 20))
    with pytest.raises(FormatError, match="That is no file of weights"):
        dl4j.read(path)


def test_odd_configurations_are_refused(tmp_path: Path) -> None:
    for text, match in (
        ("[" * 100_000, "is no JSON"),
        ("[1]", "holds a list"),
        ('{"a": 1}', "neither a MultiLayerNetwork"),
        ('{"confs": []}', "not a list of layers"),
        ('{"confs": [{"layer": {"dense": {"nin": 1.5, "nout": 2}}}]}', "nin is 1.5"),
        ('{"confs": [{"layer": {"dense": {"nin": true, "nout": 2}}}]}', "nin is True"),
        ('{"confs": [{"layer": {}}]}', "does not say its type"),
        ('{"vertices": {"a": {"ScaleVertex": {}}}, "vertexInputs": {"a": ["b"]}, "networkInputs": [], '
         '"networkOutputs": ["a"]}', "reads 'b', which is not there"),
    ):  # fmt: skip
        path = tmp_path / "odd.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("configuration.json", text)
            archive.writestr("coefficients.bin", nd4j(np.zeros((1, 4))))
        with pytest.raises(FormatError, match=match):
            dl4j.read(path)


def test_the_reader_is_found_by_what_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "READERS", ("dl4j",))
    model = models.open_model(small(tmp_path / "no_ending"))
    assert model is not None
    assert model.source["format"] == "Deeplearning4j"
    (tmp_path / "other").write_bytes(b"PK")
    assert models.open_model(tmp_path / "other") is None


def mutated(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(changed))
        if kind == 1:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[place] = rng.choice((0, 255, 127, 128))
        else:
            changed[place : place + rng.randrange(6)] = rng.randbytes(rng.randrange(6))
    return bytes(changed)


def fuzz(path: Path, work: Path, rounds: int) -> None:
    """Whole archives and single members, mutated: an error of ours, or a net that runs."""
    rng = random.Random(0)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(rounds):
        if rng.random() < 0.3:
            data = mutated(whole, rng)
        else:
            stream, victim = io.BytesIO(), rng.choice(list(members))
            with zipfile.ZipFile(stream, "w") as archive:
                for name, content in members.items():
                    head = content[:200] if rng.random() < 0.7 and name.endswith(".bin") else content
                    archive.writestr(name, mutated(head, rng) + content[len(head) :] if name == victim else content)
            data = stream.getvalue()
        work.write_bytes(data)
        try:
            model = dl4j.read(work)
        except FormatError as error:
            told = len(str(error))
        else:
            shape = model.signature.inputs["features"].shape[1:]
            told = len(run(model, np.zeros((20, *shape), np.float32)))
        assert 10 < told < 1500


def test_mutated_files_give_an_error_or_a_net(tmp_path: Path) -> None:
    for dialect, kind in ((OLD, "FLOAT"), (NEW, "DOUBLE")):
        fuzz(small(tmp_path / "good.zip", kind, dialect), tmp_path / "bad.zip", 150)


@pytest.mark.slow
def test_many_mutated_files_give_an_error_or_a_net(tmp_path: Path) -> None:
    for dialect, kind in ((OLD, "DOUBLE"), (NEW, "HALF"), (NEW, "FLOAT")):
        fuzz(small(tmp_path / "good.zip", kind, dialect), tmp_path / "bad.zip", 5_000)
