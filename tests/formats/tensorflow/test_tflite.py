"""Files of TensorFlow Lite against the answers of its own interpreter, kept beside the tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kindling as kd
from kindling.errors import FormatError
from kindling.formats.assemble import valid_name
from kindling.formats.tflite import read
from kindling.nets.layers_lite import LiteConv2d

HERE = Path(__file__).parent
ANSWERS = np.load(HERE / "keras.npz")
PHOTOS = {"v1": ("mobilenet_v1_0.25_128_quant", 128), "v2": ("mobilenet_v2_1.0_224_quant", 224)}


def run(module: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(rows).permute(0, 3, 1, 2)))


def test_a_float_net_equals_the_interpreter_and_the_net_it_was_made_from() -> None:
    found = run(read(HERE / "float.tflite", keep_activation=True).module, ANSWERS["px"])
    for expected in (ANSWERS["float"], ANSWERS["want"]):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_many_operations_equal_the_interpreter() -> None:
    made = read(HERE / "operations.tflite", keep_activation=True)
    x = np.load(HERE / "operations.npz")["x"][:3]
    with torch.inference_mode():
        found = made.module(torch.from_numpy(x).permute(0, 3, 1, 2))
    by_name = dict(zip(made.signature.outputs, found, strict=True))
    answers = np.load(HERE / "operations_lite.npz")
    assert len(answers.files) >= 30
    for name in answers.files:
        ours, theirs = by_name[valid_name(name.replace("|", "/").partition(";")[0])].numpy(), answers[name]
        assert ours.shape == theirs.shape, name
        assert np.abs(ours - theirs).max() <= 1e-4 * max(float(np.abs(theirs).max()), 1e-6), name


def test_a_quantised_net_gives_the_interpreters_whole_numbers() -> None:
    model = kd.load(HERE / "int8.tflite", keep_activation=True)
    step = model.preparation.inputs[0]
    assert step.to_json()["kind"] == "image"  # pixels are the file's whole numbers: it states how they are prepared
    with torch.inference_mode():
        scores = model.module(step.batch({step.name: ANSWERS["pq"]})).numpy()
    steps = np.round(scores * 256).astype(int)
    expected = ANSWERS["int8"].astype(int)
    assert np.abs(steps - expected).max() <= 1
    assert (steps != expected).mean() < 0.02


def test_rounding_can_be_left_out_and_gradients_pass_it(tmp_path: Path) -> None:
    rounded, plain = read(HERE / "int8.tflite"), read(HERE / "int8.tflite", rounding=False)
    layers = [type(layer).__name__ for layer in plain.module.children()]
    assert not any(name in ("LiteConv2d", "LiteLinear", "Quantized") for name in layers)
    x = torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 255
    found = {}
    for name, made in (("rounded", rounded), ("plain", plain)):
        made.module(x).logsumexp(1).sum().backward()
        found[name] = next(p for n, p in made.module.named_parameters() if n.endswith("weight")).grad
    similar = torch.nn.functional.cosine_similarity(found["rounded"].flatten(), found["plain"].flatten(), 0)
    assert similar > 0.95
    model = kd.load(HERE / "int8.tflite")
    model.save(tmp_path / "bundle")
    with torch.inference_mode():
        assert torch.equal(kd.load(tmp_path / "bundle").module(x), model.module(x))


def test_a_layer_of_whole_numbers_is_exact() -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.integers(0, 256, (2, 8, 5, 5)), rng.integers(-128, 128, (6, 8, 3, 3)), rng.integers(-9999, 9999, 6)
    layer = LiteConv2d(8, 6, (3, 3), scale_in=0.02, scale_out=0.7, zero_out=3)
    scale = torch.tensor(rng.uniform(0.001, 0.01, 6), dtype=torch.float32)
    with torch.no_grad():
        layer.weight_scale.copy_(scale)
        layer.weight.copy_(torch.from_numpy(w).float() * scale.view(-1, 1, 1, 1))
        layer.offset.copy_(torch.from_numpy(b).float() * scale * 0.02)
        found = layer(torch.from_numpy(x).float() * 0.02)
    total = np.zeros((2, 6, 3, 3), np.int64)
    for i in range(3):
        for j in range(3):
            total += np.einsum("ncij,fc->nfij", x[:, :, i : i + 3, j : j + 3], w[:, :, i, j])
    total += b[None, :, None, None]
    factor = (scale * np.float32(0.02) / np.float32(0.7)).numpy()[None, :, None, None]
    steps = np.clip(np.round(total.astype(np.float32) * factor) + 3, 0, 255)
    assert np.array_equal(np.round(found.numpy() / np.float32(0.7)) + 3, steps)


@pytest.mark.needs_data
@pytest.mark.parametrize(("net", "count"), [("v1", 50)])
def test_the_published_nets_name_photos_as_the_interpreter_does(data_dir: Path, net: str, count: int) -> None:
    agreement(data_dir, net, count)


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.parametrize(("net", "count"), [("v1", 498), ("v2", 150)])
def test_the_published_nets_name_many_photos_as_the_interpreter_does(data_dir: Path, net: str, count: int) -> None:
    agreement(data_dir, net, count)


def agreement(data_dir: Path, net: str, count: int) -> None:
    name, size = PHOTOS[net]
    made = read(data_dir / "mobilenet_tflite" / f"{name}.tflite")
    step = made.preparation.inputs[0]
    fields = step.to_json()
    assert (fields["size"], fields["scale"], fields["mean"]) == ([size, size], 1 / 128, [1.0])
    expected = np.load(HERE / "photos.npz")[net][:count]
    with tarfile.open(data_dir / "caltech101" / "caltech101_max80.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jpg")][::12][:count]
        photos = [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in members]  # type: ignore[union-attr]
    pixels = np.stack([np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR)) for photo in photos])
    with torch.inference_mode():
        parts = [made.module(step.batch({step.name: pixels[k : k + 25]})) for k in range(0, count, 25)]
    same = (torch.cat(parts).argmax(1).numpy() == expected).mean()
    assert same >= 0.98


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    data = (HERE / "float.tflite").read_bytes()
    file = tmp_path / "net.tflite"
    file.write_bytes(data[:100])
    with pytest.raises(FormatError, match="is cut off or damaged"):
        read(file)
