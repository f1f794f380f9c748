"""Whole models: the real file, the dialects of Keras 1 and 2, layers of one's own, and what is refused by name."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd
from kindling.errors import ConfigError, FormatError
from kindling.formats.keras import forget_layer, read, register_layer

HERE = Path(__file__).parent  # ../tensorflow/README.md says where its files come from


def idx(path: Path, offset: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)


def described(folder: Path, *layers: tuple[str, dict[str, Any]], kind: str = "Sequential") -> Path:
    """A JSON of `to_json`."""
    entries = [{"class_name": name, "config": {"name": f"l{k}", **f}} for k, (name, f) in enumerate(layers)]
    file = folder / "net.json"
    file.write_text(json.dumps({"class_name": kind, "config": {"name": "net", "layers": entries}}))
    return file


def old_weights(file: Path, arrays: dict[str, list[np.ndarray]]) -> Path:
    """A weight file as Keras 1 and 2 write it."""
    with h5py.File(file, "w") as root:
        root.attrs["layer_names"] = [name.encode() for name in arrays]
        for name, parts in arrays.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/w{k}:0".encode() for k in range(len(parts))]
            for k, part in enumerate(parts):
                group[f"{name}/w{k}:0"] = part
    return file


@pytest.mark.needs_data
def test_the_real_net_knows_its_digits(data_dir: Path) -> None:
    model = kd.load(data_dir / "mnist_cnn_keras_tf" / "mnist_cnn.h5", scale=1)
    pixels = idx(data_dir / "mnist" / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:2000]
    labels = idx(data_dir / "mnist" / "t10k-labels-idx1-ubyte.gz", 8)[:2000]
    with torch.inference_mode():
        scores = model.module(torch.from_numpy(pixels[:, None].astype(np.float32)))
    assert (scores.argmax(1).numpy() == labels).sum() == 1979  # 98.95 %, the data's README
    assert model.preparation.inputs[0].to_json()["scale"] == 1.0
    assert model.source["training"]["loss"] == "categorical_crossentropy"
    first = model.predict([pixels[0].tobytes()])[0]
    assert first["prediction"] == str(labels[0])


@pytest.mark.needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_net_equals_keras_and_survives_a_bundle(data_dir: Path, keras: Any, tmp_path: Path) -> None:
    file = data_dir / "mnist_cnn_keras_tf" / "mnist_cnn.h5"
    x = np.random.default_rng(0).integers(0, 256, (16, 28, 28, 1)).astype(np.float32)
    L = keras.layers
    convolutions = [L.Conv2D(n, 3, padding="same", activation="relu") for n in (32, 64, 128, 128)]
    reference = keras.Sequential([  # Keras 3 cannot read the description: its initialisers have changed
        keras.Input((28, 28, 1)), *convolutions[:2], L.MaxPooling2D(2), *convolutions[2:], L.MaxPooling2D(4),
        L.Flatten(), L.Dense(128, activation="relu"), L.Dense(10, activation="softmax"),
    ])  # fmt: skip
    reference.load_weights(file)
    expected = reference.predict(x, verbose=0)
    model = kd.load(file, keep_activation=True)
    model.save(tmp_path / "bundle")
    for one in (model, kd.load(tmp_path / "bundle")):
        with torch.inference_mode():
            found = one.module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_keras_1_says_the_same_in_other_words(tmp_path: Path) -> None:
    old = described(
        tmp_path,
        ("Convolution2D", {"nb_filter": 4, "nb_row": 3, "nb_col": 2, "subsample": [2, 1], "border_mode": "same",
                           "bias": True, "dim_ordering": "tf", "activation": "relu",
                           "batch_input_shape": [None, 7, 8, 3]}),
        ("Dropout", {"p": 0.25}),
        ("AveragePooling2D", {"pool_size": [2, 2], "border_mode": "valid", "strides": [2, 2], "dim_ordering": "tf"}),
        ("Flatten", {}),
        ("Dense", {"output_dim": 5, "activation": "hard_sigmoid"}),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    kernel, bias, dense, end = (rng.normal(size=s).astype(np.float32) for s in ((3, 2, 3, 4), (4,), (32, 5), (5,)))
    weights = old_weights(tmp_path / "w.h5", {"l0": [kernel, bias], "l1": [], "l2": [], "l3": [], "l4": [dense, end]})
    made = read(old, weights=weights)
    assert made.module.get_submodule("l1").p == 0.25
    x = rng.normal(size=(2, 7, 8, 3)).astype(np.float32)
    framed = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))  # TensorFlow's SAME: one more at the end
    seen = np.zeros((2, 4, 8, 4))
    for i in range(4):
        for j in range(8):
            seen[:, i, j] = np.einsum("nhwc,hwcf->nf", framed[:, 2 * i : 2 * i + 3, j : j + 2], kernel) + bias
    seen = np.maximum(seen, 0).reshape(2, 2, 2, 4, 2, 4).mean((2, 4)).reshape(2, -1)
    expected = np.clip(0.2 * (seen @ dense + end) + 0.5, 0, 1)  # hard sigmoid before Keras 3
    with torch.inference_mode():
        found = made.module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.array_equal(
        found, read(weights, net=old).module(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    )


def test_fresh_weights_follow_the_initialisers(tmp_path: Path) -> None:
    file = described(
        tmp_path,
        ("Dense", {"units": 300, "batch_input_shape": [None, 100], "bias_initializer": "ones",
                   "kernel_initializer": {"class_name": "HeNormal", "config": {"seed": None}}}),
        ("Dense", {"units": 100, "kernel_initializer": {"class_name": "GlorotUniform", "config": {}}}),
        ("BatchNormalization", {}),
    )  # fmt: skip
    module = read(file, seed=0).module
    weights = dict(module.named_parameters())
    assert abs(weights["l0.weight"].std().item() / (2 / 100) ** 0.5 - 1) < 0.02
    assert weights["l0.bias"].eq(1).all()
    bound = (6 / 400) ** 0.5
    assert 0.99 * bound < weights["l1.weight"].abs().max().item() <= bound
    assert module.get_submodule("l2").running_var.eq(1).all()
    again = dict(read(file, seed=0).module.named_parameters())
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(FormatError, match=r"more weights than are made without a file; see max_parameters="):
        read(file, max_parameters=1000)


def test_pictures_need_a_scale_to_be_photos(tmp_path: Path) -> None:
    file = described(tmp_path, ("Conv2D", {"filters": 2, "kernel_size": 3, "batch_input_shape": [None, 8, 6, 3]}))
    made = read(file)
    assert made.preparation.inputs[0].to_json()["kind"] == "array"
    assert "give scale=" in made.source["preparation"]
    step = read(file, scale=1 / 127.5, image={"mean": (1.0,)}).preparation.inputs[0].to_json()
    assert (step["kind"], step["size"], step["channels"], step["mean"]) == ("image", [8, 6], "RGB", [1.0])
    words = described(tmp_path, ("Embedding", {"input_dim": 9, "output_dim": 2, "batch_input_shape": [None, 5]}))
    assert read(words).signature.inputs["net_input"].dtype == "int64"
    with pytest.raises(ConfigError, match="takes no pictures but rows of"):
        read(words, scale=1)


def test_open_shapes_are_asked_for(tmp_path: Path) -> None:
    file = described(tmp_path, ("Conv2D", {"filters": 2, "kernel_size": 3, "batch_input_shape": [None, None, None, 3]}))
    with pytest.raises(FormatError, match=r"'net_input' is of shape \(None, None, 3\). Give input_shape="):
        read(file)
    assert read(file, input_shape=(10, 12, 3)).signature.inputs["net_input"].shape == ("N", 3, 10, 12)
    with pytest.raises(ConfigError, match="does not fit"):
        read(file, input_shape=(10, 12, 4))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (("Lambda", {"function": ["4wEAAA==", None, None]}), r"'l1' \(Lambda\) holds Python code, which is not run"),
        (("MyLayer", {}), r"'l1' \(MyLayer\) is of a type that is not read; kindling.formats.keras.register_layer"),
        (("ConvLSTM1D", {}), r"\(ConvLSTM1D\) is of a type that is not read"),
        (("Dense", {"units": -3}), r"'l1' \(Dense\) has units=-3, not a whole number of 1 or more"),
        (("Dense", {"units": 3, "activation": "wow"}), r"'l1' \(Dense\) has activation 'wow', which is not known"),
        (("BatchNormalization", {"renorm": True}), r"has renorm=True, which is not read"),
        (("Conv2D", {"filters": 2, "kernel_size": 3}), r"'l1' \(Conv2D\) works on 2 axes and channels, and is given"),
        (("Reshape", {"target_shape": [5]}), r"makes rows of shape \(5,\) of \(4,\)"),
        (("Dense", {"units": 3, "dtype": {"class_name": "QuantizedDTypePolicy"}}), r"is quantised"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, layer: tuple[str, dict[str, Any]], message: str) -> None:
    file = described(tmp_path, ("Dense", {"units": 4, "batch_input_shape": [None, 3]}), layer)
    with pytest.raises(FormatError, match=message):
        read(file)


def test_theano_order_and_python_models_are_refused(tmp_path: Path) -> None:
    theano = {"nb_filter": 2, "nb_row": 3, "nb_col": 3, "dim_ordering": "th", "batch_input_shape": [None, 3, 8, 8]}
    with pytest.raises(FormatError, match="Theano's order of axes"):
        read(described(tmp_path, ("Convolution2D", theano)))
    (tmp_path / "net.json").write_text('{"class_name": "MyModel", "config": {"units": 3}}')
    with pytest.raises(FormatError, match="is a MyModel, whose layers are written in Python"):
        read(tmp_path / "net.json")


class Doubled(nn.Module):
    """A layer of a user's own, with one weight."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x * self.gain


def test_a_layer_of_ones_own(tmp_path: Path) -> None:
    file = described(tmp_path, ("Dense", {"units": 4, "batch_input_shape": [None, 3]}), ("Doubled", {}))
    arrays = {"l0": [np.eye(3, 4, dtype=np.float32), np.zeros(4, np.float32)], "l1": [np.full(4, 3, np.float32)]}
    weights = old_weights(tmp_path / "w.h5", arrays)
    register_layer("Doubled", lambda site: Doubled(site.rows[0][-1]))
    try:
        found = read(file, weights=weights).module(torch.tensor([[1.0, 2.0, 3.0]]))
    finally:
        forget_layer("Doubled")
    assert found.tolist() == [[6.0, 12.0, 18.0, 0.0]]
    given = read(file, weights=weights, layers={"Doubled": lambda site: Doubled(4)})
    assert given.module.get_submodule("l1").gain.tolist() == [3.0] * 4
    with pytest.raises(FormatError, match=r"\(Doubled\) cannot be made by the function registered for it: KeyError"):
        read(file, weights=weights, layers={"Doubled": lambda site: Doubled(site.fields["no"])})


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    file = described(tmp_path, ("Dense", {"units": 4, "batch_input_shape": [None, 3]}))
    kernel, bias = np.zeros((3, 4), np.float32), np.zeros(4, np.float32)
    for arrays, message in (
        ({"l0": [kernel.T, bias]}, r"is 4 x 3 in the file, the layer needs 3 x 4"),
        ({"l0": [kernel]}, "has 1 arrays in the file; bias is not there"),
        ({"l0": [kernel, bias, bias]}, "has 3 arrays in the file, it takes 2"),
        ({"other": [kernel, bias]}, "'l0' has 0 arrays in the file; kernel is not there"),
    ):
        with pytest.raises(FormatError, match=message):
            read(file, weights=old_weights(tmp_path / "w.h5", arrays))
    with pytest.raises(FormatError, match=r"holds weights and no description of a model\. Give net="):
        read(tmp_path / "w.h5")


def test_nothing_outside_the_file_is_read(tmp_path: Path) -> None:
    file = described(tmp_path, ("Dense", {"units": 4, "batch_input_shape": [None, 3]}))
    old_weights(tmp_path / "other.h5", {"l0": [np.zeros((3, 4), np.float32), np.zeros(4, np.float32)]})
    with h5py.File(tmp_path / "w.h5", "w") as root:
        root.attrs["layer_names"] = [b"l0"]
        root["l0"] = h5py.ExternalLink("other.h5", "/l0")
    with pytest.raises(FormatError, match="links are not followed"):
        read(file, weights=tmp_path / "w.h5")
    huge = old_weights(tmp_path / "huge.h5", {"l0": []})
    big = described(tmp_path, ("Dense", {"units": 2**20, "batch_input_shape": [None, 2**20]}))
    with h5py.File(huge, "r+") as root:
        root["l0"].attrs["weight_names"] = [b"k:0", b"b:0"]
        root["l0"].create_dataset("k:0", (2**20, 2**20), np.float32, chunks=(2**10, 2**10))
    with pytest.raises(FormatError, match="announces more numbers than the file holds"):
        read(big, weights=huge)
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", "[" * 100_000)
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(FormatError, match=r"config\.json is no JSON"):
        read(tmp_path / "net.keras")


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_files_of_keras_2_equal_its_own_answers(suffix: str) -> None:
    answers = np.load(HERE / "keras2.npz")
    made = read(HERE / f"keras2.{suffix}", keep_activation=True)
    with torch.inference_mode():
        found = made.module(torch.from_numpy(answers["px"]).permute(0, 3, 1, 2)).numpy()
    assert np.abs(found - answers["want"]).max() <= 1e-4 * np.abs(answers["want"]).max()
    nested = read(HERE / f"nested2.{suffix}")
    with torch.inference_mode():
        found = nested.module(torch.from_numpy(answers["xa"])).numpy()
    assert np.abs(found - answers["nested"]).max() <= 1e-4 * np.abs(answers["nested"]).max()
