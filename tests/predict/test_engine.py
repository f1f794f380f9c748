"""The forward pass against plain torch; precision by its rules; lists without Spark."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kindling.errors import ConfigError, DataError, ModelError
from kindling.model import Model
from kindling.predict import engine
from kindling.predict.engine import Comparison, Engine, decide, net_batch, pick_precision, predict_list
from kindling.prepare import ArrayStep, ImageStep, Preparation
from kindling.signature import Signature, TensorSpec


def photo_net() -> tuple[nn.Module, Signature, Preparation]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 81, 5))
    spec = Signature({"image": TensorSpec(("N", 3, 20, 20))}, {"scores": TensorSpec(("N", 5))})
    return net, spec, Preparation((ImageStep("image", size=(20, 20), scale=1 / 255, mean=(0.4,), std=(0.2,)),))


def pixels(rows: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (rows, 20, 20, 3), np.uint8)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 20])
def test_results_are_those_of_plain_torch(rows: int) -> None:
    net, spec, preparation = photo_net()
    images = pixels(rows)
    got = Engine(net, spec, preparation, batch_size=8).run({"image": images})["scores"]
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.2
    with torch.no_grad():
        expected = net(x)
    assert got.dtype == np.float32
    assert got.shape == (rows, 5)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(precision: str) -> None:
    net, spec, preparation = photo_net()
    images = pixels(21)
    ours = Engine(net, spec, preparation, precision=precision, batch_size=8)
    together = ours.run({"image": images})["scores"]
    order = np.random.default_rng(1).permutation(21)
    np.testing.assert_array_equal(ours.run({"image": images[order]})["scores"], together[order])
    for row in (0, 20):
        np.testing.assert_array_equal(ours.run({"image": images[row : row + 1]})["scores"][0], together[row])


def test_the_module_is_left_as_it_is() -> None:
    net, spec, preparation = photo_net()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Engine(net, spec, preparation, precision="bf16", batch_size=2).run({"image": pixels(3)})
    assert net.training
    for name, value in net.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, before[name])


def test_weights_that_fit_are_shared_not_copied() -> None:
    net, spec, preparation = photo_net()
    net.to(memory_format=torch.channels_last)
    ours = Engine(net, spec, preparation)
    assert [p.data_ptr() for p in ours.module.parameters()] == [p.data_ptr() for p in net.parameters()]


def test_dropout_and_batch_statistics_are_off() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    spec = Signature({"x": TensorSpec(("N", 4))}, {"y": TensorSpec(("N", 4))})
    x = np.random.default_rng(0).normal(3, 2, (6, 4)).astype(np.float32)
    got = Engine(net, spec, Preparation((ArrayStep("x", "x", (4,)),))).run({"x": x})["y"]
    np.testing.assert_allclose(got, x, rtol=1e-4)  # fresh statistics: mean 0, variance 1
    assert torch.equal(net[0].running_mean, torch.zeros(4))  # type: ignore[arg-type]


def test_several_outputs_come_by_name() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sum(1), x.unsqueeze(2).expand(-1, -1, 2)

    spec = Signature({"x": TensorSpec(("N", 3))}, {"a": TensorSpec(("N",)), "b": TensorSpec(("N", 3, 2))})
    got = Engine(Two(), spec, Preparation((ArrayStep("x", "x", (3,)),)), batch_size=2).run({"x": np.ones((5, 3), "f4")})
    assert got["a"].tolist() == [3.0] * 5
    assert got["b"].shape == (5, 3, 2)


def test_an_output_that_is_not_per_row_is_refused() -> None:
    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    spec = Signature({"x": TensorSpec(("N", 3))}, {"y": TensorSpec(("N",))})
    with pytest.raises(ModelError, match=r"'y' has shape \(\) for 2 rows"):
        Engine(Total(), spec, Preparation((ArrayStep("x", "x", (3,)),)), batch_size=2).run({"x": np.ones((1, 3), "f4")})


@pytest.mark.parametrize(("setting", "value"), [("precision", "fp16"), ("batch_size", 0)])
def test_settings_are_checked(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}="):
        Engine(*photo_net(), **{setting: value})  # type: ignore[arg-type]


def test_the_batch_shrinks_with_the_widest_layer() -> None:
    spec = Signature({"x": TensorSpec(("N", 3, 64, 64))}, {"y": TensorSpec(("N", 4, 64, 64))})
    sizes = [
        net_batch(spec, nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, 4, 1))) for width in (4, 64, 4096, 65536)
    ]
    assert sizes == [1024, 64, 1, 1]


def test_the_batch_of_a_net_that_cannot_run_without_numbers_is_bounded_by_what_was_seen() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 64, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.wide(x)
            return y if y.sum() > 0 else -y

    spec = Signature({"x": TensorSpec(("N", 3, 64, 64))}, {"y": TensorSpec(("N", 64, 64, 64))})
    assert net_batch(spec, Branching()) == 64


# Precision


def comparison(*cosines: float, seconds: tuple[float, float] = (2.0, 1.0), failure: str | None = None) -> Comparison:
    return Comparison(cosines={"y": cosines} if cosines else {}, seconds=seconds, failure=failure)


@pytest.mark.parametrize(
    ("hardware", "parts", "name", "why"),
    [
        ("amx_bf16", [comparison(*[0.99999] * 9)], "bf16", "amx_bf16; 9 rows agree"),
        ("amx_bf16", [comparison(0.99999), comparison(0.99999, 0.99999)], "bf16", "3 rows"),
        (None, [comparison(1.0)], "fp32", "no bfloat16 arithmetic"),
        ("amx_bf16", [comparison(*[0.9999] * 9)], "fp32", "strays"),  # the mean must exceed it
        ("amx_bf16", [comparison(*[1.0] * 9, 0.9991)], "fp32", "strays"),  # one bad row in ten
        ("amx_bf16", [comparison(1.0), comparison(float("nan"))], "fp32", "strays"),
        ("amx_bf16", [comparison(1.0), comparison(failure="no kernel")], "fp32", "does not run in bf16: no kernel"),
        ("amx_bf16", [comparison(1.0, seconds=(1.0, 1.5))], "bf16", "0.7 x as fast"),  # a clock decides nothing
        ("amx_bf16", [], "fp32", "no usable row"),
        ("amx_bf16", [comparison()], "fp32", "no usable row"),
    ],
)
def test_precision_is_decided_by_the_rules(hardware: str | None, parts: list[Comparison], name: str, why: str) -> None:
    chosen = decide(hardware, parts)
    assert chosen.name == name
    assert why in chosen.reason


def test_a_real_comparison_has_a_cosine_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    net, spec, preparation = photo_net()
    found = engine.compare(net, spec, preparation, {"image": pixels(11)}, batch_size=4)
    assert len(found.cosines["scores"]) == 11
    assert all(0.99 < cosine < 1.0 for cosine in found.cosines["scores"])  # close, and not the same thing twice
    monkeypatch.setattr(engine, "hardware_bf16", lambda: None)
    assert pick_precision(net, spec, preparation, {"image": pixels(2)}).name == "fp32"


def test_a_net_that_fails_in_bf16_runs_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(3, 2)  # float32, whatever x is

    monkeypatch.setattr(engine, "hardware_bf16", lambda: "amx_bf16")
    spec = Signature({"x": TensorSpec(("N", 3))}, {"y": TensorSpec(("N", 2))})
    chosen = pick_precision(Stubborn(), spec, Preparation((ArrayStep("x", "x", (3,)),)), {"x": np.ones((2, 3), "f4")})
    assert chosen.name == "fp32"
    assert "does not run in bf16" in chosen.reason


# Lists


def colours() -> Model:
    """Tells red from green from blue by the mean of the channels."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Model.of(net, inputs=ImageStep("image", size=(4, 4), scale=1 / 25), labels=["red", "green", "blue"])


def test_a_list_of_images_of_any_kind(tmp_path: Path) -> None:
    red = Image.new("RGB", (9, 6), (250, 5, 0))
    file = io.BytesIO()
    red.save(file, "PNG")
    red.save(tmp_path / "red.png")
    blue = np.zeros((5, 5, 3), np.uint8)
    blue[:, :, 2] = 255
    items = [red, file.getvalue(), str(tmp_path / "red.png"), tmp_path / "red.png", {"content": file.getvalue()}, blue]
    answers = predict_list(colours(), items, top_k=2)
    assert [a["prediction"] for a in answers] == ["red"] * 5 + ["blue"]
    assert [a["error"] for a in answers] == [None] * 6
    assert answers[0]["top_k"][1]["label"] == "green"
    scores = np.exp([10.0, 0.2, 0.0])
    assert answers[0]["probability"] == pytest.approx(scores[0] / scores.sum(), rel=1e-3)
    assert answers[0] == answers[1] == answers[4]


def test_broken_items_keep_their_place() -> None:
    red = Image.new("RGB", (9, 6), (250, 5, 0))
    answers = predict_list(colours(), [b"", red, "nowhere.png", None])
    assert [a["prediction"] for a in answers] == [None, "red", None, None]
    assert answers[0]["error"] == "the file is empty"
    assert "nowhere.png" in answers[2]["error"]
    assert "NoneType" in answers[3]["error"]
    assert len(predict_list(colours(), [b"", red], on_error="drop")) == 1
    with pytest.raises(DataError, match="item 0 cannot be used: the file is empty"):
        predict_list(colours(), [b"", red], on_error="fail")
    assert predict_list(colours(), []) == []


def test_rows_of_numbers_and_dicts_of_columns() -> None:
    model = Model.of(nn.Linear(2, 2), column="x", shape=(2,))
    with torch.no_grad():
        expected = model.module(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).numpy()
    for items in ([[1.0, 2.0], np.array([3, 4])], [{"x": [1, 2]}, {"x": torch.tensor([3.0, 4.0])}]):
        got = np.stack([answer["prediction"] for answer in predict_list(model, items)])
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_one_score_tells_two_labels_apart() -> None:
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, 1.0)
    nn.init.constant_(net.bias, 0.0)
    answers = predict_list(Model.of(net, column="x", shape=(1,), labels=["no", "yes"]), [[2.0], [-2.0]])
    assert [a["prediction"] for a in answers] == ["yes", "no"]
    assert answers[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2.0)))


def test_scores_that_do_not_fit_the_labels_are_refused() -> None:
    model = Model.of(nn.Linear(2, 3), column="x", shape=(2,), labels=["a", "b"])
    with pytest.raises(ModelError, match="gives 3 for a row, not one score for each of 2 labels"):
        predict_list(model, [[1.0, 2.0]])


def test_prediction_without_spark_does_not_import_it() -> None:
    code = """
import sys
from torch import nn
from kindling.model import Model
model = Model.of(nn.Linear(2, 2), column="x", shape=(2,), labels=["a", "b"])
model.predict([[1.0, 2.0]])
sys.exit("pyspark" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
