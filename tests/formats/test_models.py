"""Files of other systems through `kindling.load`: told apart by what is in them, ordinary models afterwards."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import kindling as kd
from kindling.errors import ConfigError, FormatError
from kindling.formats.models import READERS, Reader, _peek, open_model

FILES = {
    "caffe": ("lenet_mnist_caffe/lenet.prototxt", "lenet_mnist_caffe/lenet_iter_10000.caffemodel", (1, 28, 28)),
    "dl4j": ("dl4j_zip/trained_mnist_model.zip", None, (1, 28, 28)),
    "h2o": ("h2o_mojo/deep_learning_prostate.mojo", None, (1,)),
    "bigdl": ("bigdl_models/bigdl_lenet.model", None, (1, 28, 28)),
}

PROTOTXT = """
name: "small"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 3 } }
"""


@pytest.mark.needs_data
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_is_loaded_cut_and_kept(data_dir: Path, tmp_path: Path, name: str) -> None:
    file, weights, row = FILES[name]
    model = kd.load(data_dir / file, weights=data_dir / weights if weights else None)
    reader: Reader = importlib.import_module(f"kindling.formats.{name}")
    assert model.source["format"].lower() == reader.NAME.lower()
    inputs = [torch.rand(2, *spec.shape[1:]) for spec in model.signature.inputs.values()]
    assert inputs[0].shape[1:] == row
    with torch.no_grad():
        expected = model.module(*inputs)
        model.save(tmp_path / "bundle")
        again = kd.load(tmp_path / "bundle")
        torch.testing.assert_close(again.module(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert "Total Parameters" in str(again.summary())
    first = next(name for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear))
    assert sum(p.numel() for p in model.until(first).module.parameters()) > 0


@pytest.mark.needs_data
def test_no_file_is_taken_for_two_formats(data_dir: Path) -> None:
    readers: dict[str, Reader] = {name: importlib.import_module(f"kindling.formats.{name}") for name in READERS}
    seen = set()
    for folder in ("*caffe*", "dl4j_zip", "h2o_mojo", "bigdl_models", "tf_small", "mobilenet_tflite", "mnist_*"):
        for file in data_dir.glob(f"{folder}/*.*"):
            taken = [name for name, reader in readers.items() if reader.matches(_peek(file))]
            assert len(taken) <= 1, file
            seen.update(taken)
    assert seen == set(READERS) - {"onnx", "pt2"}  # of which the data folder has none; their own tests write them


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("milk, eggs")
    assert open_model(tmp_path / "notes.txt") is None
    with pytest.raises(FormatError, match=r"is neither a bundle nor a model that kindling reads"):
        kd.load(tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="there is nothing at"):
        open_model(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no net that takes weights"):
        kd.load(tmp_path / "notes.txt", weights="x.pth")


def test_options_reach_the_reader(tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(PROTOTXT)
    model = kd.load(tmp_path / "net.prototxt", labels=["a", "b", "c"], seed=1)
    assert model.labels == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"options=\['phasse'\]"):
        kd.load(tmp_path / "net.prototxt", phasse="TEST")
    with pytest.raises(ConfigError, match=r"options=\['phase'\]"):
        kd.load("lenet", phase="TEST")
