"""Graphs of TensorFlow against TensorFlow's own answers, kept beside the tests (README.md says how they were made)."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import kindling as kd
from kindling.errors import FormatError
from kindling.formats.tensorflow import read
from kindling.formats.tensorflow.variables import Variables, crc32c

HERE = Path(__file__).parent
ANSWERS = np.load(HERE / "operations.npz")
NAMES = sorted(set(ANSWERS.files) - {"x"})


def run(module: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    """Rows of pictures in TensorFlow's order."""
    with torch.inference_mode():
        found = module(torch.from_numpy(rows).permute(0, 3, 1, 2))
    return np.asarray(found)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * max(float(np.abs(expected).max()), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_equals_tensorflow(name: str) -> None:
    made = read(HERE / "operations.pb", outputs=f"out_{name}", keep_activation=True)
    close(run(made.module, ANSWERS["x"]), ANSWERS[name])


def test_one_graph_of_many_outputs_can_be_stored(tmp_path: Path) -> None:
    model = kd.load(HERE / "operations.pb", outputs=[f"out_{name}" for name in NAMES], keep_activation=True)
    model.save(tmp_path / "bundle")
    with torch.inference_mode():
        found = kd.load(tmp_path / "bundle").module(torch.from_numpy(ANSWERS["x"]).permute(0, 3, 1, 2))
    for name, part in zip(NAMES, found, strict=True):
        close(part.numpy(), ANSWERS[name])


def test_a_saved_model_of_tensorflow_2() -> None:
    answers = np.load(HERE / "keras.npz")
    made = read(HERE / "saved_model_2", keep_activation=True)
    close(run(made.module, answers["px"]), answers["want"])
    assert sum(p.numel() for p in made.module.parameters() if p.requires_grad) > 500
    scores = read(HERE / "saved_model_2")
    assert scores.labels == ("0", "1", "2", "3")
    close(torch.softmax(torch.from_numpy(run(scores.module, answers["px"])), 1).numpy(), answers["want"])


def test_altered_variables_are_noticed(tmp_path: Path) -> None:
    prefix = HERE / "saved_model_2" / "variables" / "variables"
    for name in ("variables.index", "variables.data-00000-of-00001"):
        (tmp_path / name).write_bytes((prefix.parent / name).read_bytes())
    first = next(name for name in Variables(tmp_path / "variables").names if "kernel" in name)
    data = bytearray((tmp_path / "variables.data-00000-of-00001").read_bytes())
    before = Variables(tmp_path / "variables").read(first)
    at = bytes(data).index(before.tobytes()[:16])
    data[at + 5] ^= 4
    (tmp_path / "variables.data-00000-of-00001").write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"the checksum of .* does not fit"):
        Variables(tmp_path / "variables").read(first)
    index = bytearray((tmp_path / "variables.index").read_bytes())
    index[20] ^= 1
    (tmp_path / "variables.index").write_bytes(bytes(index))
    with pytest.raises(FormatError, match="a block's checksum does not fit"):
        Variables(tmp_path / "variables")


@pytest.mark.parametrize("name", ["operations.pb", "saved_model_2", "float.tflite"])
def test_a_nets_numbers_are_its_own(tmp_path: Path, name: str) -> None:
    """What is done to the file afterwards does not reach the net."""
    source, file = HERE / name, tmp_path / name
    shutil.copytree(source, file) if source.is_dir() else shutil.copy(source, file)
    made = kd.load(file, keep_activation=True, **({"outputs": f"out_{NAMES[0]}"} if name == "operations.pb" else {}))
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    for part in [path for path in (file, *file.rglob("*")) if path.is_file()]:
        with part.open("r+b") as stream:
            stream.write(b"\xff" * part.stat().st_size)
    torch.testing.assert_close(made.module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 5_000, 80_063, 80_064, 300_001, 1_000_003])
def test_the_checksum_is_castagnolis(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:  # one bit at a time
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    def field(number: int, body: bytes) -> bytes:
        return bytes([number << 3 | 2, len(body)]) + body

    def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
        body = field(1, name.encode()) + field(2, op.encode()) + b"".join(field(3, i.encode()) for i in inputs)
        body += b"".join(field(5, field(1, k.encode()) + field(2, v)) for k, v in attributes.items())
        return field(1, body)

    floats = {"dtype": bytes([6 << 3, 1])}
    shape = field(7, field(2, bytes([8]) + b"\xff" * 9 + b"\x01") + field(2, bytes([8, 4])))
    x = node("x", "Placeholder", **floats, shape=shape)
    file = tmp_path / "net.pb"
    for graph, message, options in (
        (x + node("y", "FFT", "x"), r"node 'y' \(FFT\) is an operation that is not read", {}),
        (x + node("y", "Relu", "y"), r"node 'y' waits for itself: loops are not read", {"outputs": "y"}),
        (x + node("y", "Relu", "z"), "there is no node 'z'", {"outputs": "y"}),
        (x + node("a", "Relu", "x") + node("b", "Tanh", "x"), r"2 nodes that nothing uses \('a', 'b'\)", {}),
        (
            node("x", "Placeholder", **floats) + node("y", "Relu", "x"),
            "an input of unknown shape: give input_shape",
            {},
        ),
        (x + node("y", "Relu", "x"), "there is no node 'yy'. Did you mean 'y'", {"outputs": "yy"}),
    ):
        file.write_bytes(graph)
        with pytest.raises(FormatError, match=message):
            read(file, **options)  # type: ignore[arg-type]
    file.write_bytes(x + node("bad", "FFT", "x") + node("y", "Relu", "x"))
    assert read(file, outputs="y").signature.inputs["x"].shape == ("N", 4)


@pytest.mark.needs_data
def test_the_frozen_net_equals_the_file_it_was_made_from(data_dir: Path) -> None:
    folder = data_dir / "mnist_cnn_keras_tf"
    frozen, original = kd.load(folder / "output_model.pb", scale=1), kd.load(folder / "mnist_cnn.h5", scale=1)
    raw = gzip.decompress((data_dir / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:200].astype(np.float32)
    with torch.inference_mode():
        ours, theirs = (model.module(torch.from_numpy(pixels)) for model in (frozen, original))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert frozen.labels == original.labels


@pytest.mark.needs_data
def test_small_graphs_and_an_old_saved_model(data_dir: Path) -> None:
    folder = data_dir / "tf_small"
    assert read(folder / "test.pb", input_shape=(1,)).signature.outputs["output"].shape == ("N", 1)
    with pytest.raises(FormatError, match=r"input of .*: give input_shape="):
        read(folder / "test.pb")
    part = read(folder / "tfnet_frozen_inference_graph.pb", outputs="dense_1/Sigmoid")
    assert sum(p.numel() for p in part.module.parameters()) == 72
    with pytest.raises(FormatError, match=r"nodes that nothing uses .*Name the net's with outputs="):
        read(folder / "tfnet_frozen_inference_graph.pb")
    made = read(data_dir / "tf_savedmodel", keep_activation=True)
    numbers = Variables(data_dir / "tf_savedmodel" / "variables" / "variables")
    x = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)
    h = x.reshape(4, -1).astype(np.float64)
    for place, norm in (("dense", "batch_normalization_v1"), ("dense_1", "batch_normalization_v1_1"), ("dense_2", "")):
        h = h @ numbers.read(f"{place}/kernel") + numbers.read(f"{place}/bias")
        if norm:
            mean, var, gamma, beta = (
                numbers.read(f"{norm}/{part}") for part in ("moving_mean", "moving_variance", "gamma", "beta")
            )
            h = (np.maximum(h, 0) - mean) / np.sqrt(var + 1e-3) * gamma + beta
    expected = np.exp(h - h.max(1, keepdims=True))
    close(run(made.module, x), (expected / expected.sum(1, keepdims=True)).astype(np.float32))


@pytest.mark.needs_data
def test_sparknets_graphs_begin_with_drawn_weights(data_dir: Path) -> None:
    folder = data_dir / "caffe_configs" / "amplab_sparknet" / "models" / "tensorflow"
    with pytest.raises(FormatError, match="Name the net's with outputs="):
        read(folder / "mnist" / "mnist_graph.pb")
    made = read(folder / "mnist" / "mnist_graph.pb", outputs="add_1")
    weights = dict(made.module.named_parameters())
    assert sum(p.numel() for p in weights.values()) == 1_663_370
    assert made.signature.inputs["data"].shape == ("N", 1, 28, 28)
    kernel = weights["MatMul.weight"]  # truncated_normal(stddev=0.1): cut at two deviations
    assert 0.19 < kernel.abs().max().item() <= 0.2
    assert abs(kernel.std().item() - 0.088) < 0.002
    assert weights["Conv2D.bias"].eq(0).all()
    assert all(p.requires_grad for p in weights.values())
    assert made.module(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    with pytest.raises(FormatError, match="see max_parameters="):
        read(folder / "alexnet" / "alexnet_graph.pb", outputs="fc8", max_parameters=1000)


@pytest.mark.slow
@pytest.mark.needs_data
def test_sparknets_alexnet_has_its_published_size(data_dir: Path) -> None:
    folder = data_dir / "caffe_configs" / "amplab_sparknet" / "models" / "tensorflow"
    made = read(folder / "alexnet" / "alexnet_graph.pb", outputs="fc8")
    assert sum(p.numel() for p in made.module.parameters()) == 61_100_840
    assert made.signature.outputs["fc8"].shape == ("N", 1000)
