"""Nets of torchvision, timm and transformers by name: their numbers, their preparation, from random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kindling as kd
from kindling.errors import ConfigError, FormatError
from kindling.formats.hub import torchvision_first, torchvision_package, transformers_step
from kindling.prepare import ImageStep


def installed(name: str) -> None:
    """Skips where a library is absent, without importing it: torchvision may need its schemas first."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((300, 260), Image.Resampling.BICUBIC)


def tensor_of(model: kd.Model, picture: Image.Image) -> torch.Tensor:
    step = model.preparation.inputs[0]
    assert isinstance(step, ImageStep)
    return step.batch({"image": step.decode_one(picture)[None]})


def test_a_net_of_torchvision_with_a_file_of_weights(tmp_path: Path) -> None:
    installed("torchvision")
    package = torchvision_package()
    net = package.models.resnet18(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    model = kd.load("torchvision:resnet18", weights=tmp_path / "resnet18.pth")
    said = package.models.ResNet18_Weights.DEFAULT
    assert model.labels is not None
    assert model.labels[:2] == tuple(said.meta["categories"][:2])
    x = tensor_of(model, photo())
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), net(x))
    # torchvision's own transforms on the same picture: uint8 rounding alone is between them.
    assert float((x - said.transforms()(photo())).abs().max()) < 0.03
    assert next(iter(model.until("layer1").signature.outputs.values())).shape == ("N", 64, 56, 56)
    model.save(tmp_path / "bundle")
    with pytest.raises(ConfigError, match=r"no net of torchvision.*resnet18"):
        kd.load("torchvision:resnet81")
    with pytest.raises(FormatError, match="does not fit the model"):
        kd.load("torchvision:resnet34", weights=tmp_path / "resnet18.pth")


@pytest.mark.slow
def test_a_net_of_timm(tmp_path: Path) -> None:
    installed("timm")
    model = kd.load("timm:test_vit")
    step: Any = model.preparation.inputs[0]
    assert step.scale == pytest.approx(1 / 255)
    assert len(model.signature.outputs) == 1
    x = tensor_of(model, photo())
    with torch.no_grad():
        before = model.module(x)
    model.save(tmp_path / "bundle")
    with torch.no_grad():
        torch.testing.assert_close(kd.load(tmp_path / "bundle").module(x), before)
    with pytest.raises(ConfigError, match="no net of timm"):
        kd.load("timm:resnett18")


@pytest.mark.slow
def test_a_net_of_transformers_from_a_folder(tmp_path: Path) -> None:
    installed("transformers")
    torchvision_first()  # transformers imports it too
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2},
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,'
        ' "do_resize": true, "do_rescale": true, "rescale_factor": 0.00392156862745098, "do_normalize": true,'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    model = kd.load(f"hf:{tmp_path / 'vit'}")
    assert model.labels == ("cat", "dog", "cow")
    x = tensor_of(model, photo())
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), net(pixel_values=x).logits, atol=1e-5, rtol=1e-4)
    squashed = np.asarray(photo().resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    assert float((x[0].permute(1, 2, 0).numpy() - (squashed / 255 - 0.5) / 0.5).__abs__().max()) < 0.02
    model.save(tmp_path / "bundle")
    with torch.no_grad():
        torch.testing.assert_close(kd.load(tmp_path / "bundle").module(x), model.module(x))
    with pytest.raises(FormatError, match="transformers cannot load"):
        kd.load(f"hf:{tmp_path / 'nothing'}")


def test_sizes_that_are_none_of_one_batch_are_refused() -> None:
    with pytest.raises(FormatError, match="Give image="):
        transformers_step({"size": {"shortest_edge": 800, "longest_edge": 1333}})
