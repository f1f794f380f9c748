"""The table's numbers are the published ones; shapes are those of a real run."""

from __future__ import annotations

import json

import pytest
import surgery_zoo as zoo
import torch
from torch import Tensor, nn

from kindling import surgery
from kindling.errors import ModelError
from kindling.signature import Signature, TensorSpec

VGG16_COUNTS = {
    "block1_conv1": 1_792,
    "block1_conv2": 36_928,
    "block1_pool": 0,
    "block2_conv1": 73_856,
    "block2_conv2": 147_584,
    "block2_pool": 0,
    "block3_conv1": 295_168,
    "block3_conv2": 590_080,
    "block3_conv3": 590_080,
    "block3_pool": 0,
    "block4_conv1": 1_180_160,
    "block4_conv2": 2_359_808,
    "block4_conv3": 2_359_808,
    "block4_pool": 0,
    "block5_conv1": 2_359_808,
    "block5_conv2": 2_359_808,
    "block5_conv3": 2_359_808,
    "block5_pool": 0,
    "flatten": 0,
    "fc1": 102_764_544,
    "dropout1": 0,
    "fc2": 16_781_312,
    "dropout2": 0,
    "predictions": 4_097_000,
}


def test_vgg16_row_by_row() -> None:
    table = surgery.summary(zoo.vgg16(), zoo.VGG16)
    assert {row.name: row.parameters for row in table.rows if row.kind != "Input"} == VGG16_COUNTS
    assert (table.total, table.trainable, table.frozen, table.unused) == (138_357_544, 138_357_544, 0, 0)
    rows = {row.name: row for row in table.rows}
    assert rows["block1_conv1"].inputs == ("image",)
    assert rows["fc1"].shapes == {"weight": (4096, 25088), "bias": (4096,)}
    assert (rows["fc1"].n_in, rows["fc1"].n_out) == (25088, 4096)
    assert rows["block5_pool"].output_shape == (512, 7, 7)
    assert rows["fc2"].activation == "ReLU"


def test_the_table_reads_like_deeplearning4js() -> None:
    vgg = zoo.vgg16()
    frozen = surgery.frozen_layers(vgg, "block4_pool")
    text = str(surgery.summary(vgg, zoo.VGG16, frozen, labels=[f"class {k}" for k in range(1000)]))
    lines = text.splitlines()
    assert lines[1].split("  ")[0] == "VertexName (VertexType)"
    for heading in ("nIn,nOut", "TotalParams", "ParamsShape", "Vertex Inputs"):
        assert heading in lines[1]
    row = next(line for line in lines if line.startswith("fc1 "))
    assert row.split() == [
        "fc1", "(Linear)", "25088,4096", "102,764,544", "weight:{4096,25088},", "bias:{4096}", "[flatten]",
    ]  # fmt: skip
    assert any(line.startswith("block4_conv3 (Frozen Conv2d) ") for line in lines)
    assert any(line.startswith("block5_conv1 (Conv2d) ") for line in lines)
    assert [line.split() for line in lines[-5:-2]] == [
        ["Total", "Parameters:", "138,357,544"],
        ["Trainable", "Parameters:", f"{138_357_544 - 7_635_264:,}"],
        ["Frozen", "Parameters:", "7,635,264"],
    ]
    assert "1,000 (class 0, class 1" in lines[-2]


def test_json() -> None:
    module = zoo.warmed(zoo.Fire)
    data = json.loads(json.dumps(surgery.summary(module, zoo.FIRE, frozenset({"squeeze"})).to_json()))
    assert data["total"] == data["trainable"] + data["frozen"] == sum(p.numel() for p in module.parameters())
    rows = {row["name"]: row for row in data["layers"]}
    assert rows["cat"]["inputs"] == ["left", "right"]
    assert rows["squeeze"]["frozen"]
    assert rows["cat"]["output_shape"] == [12, 8, 8]


@pytest.mark.parametrize("name", list(zoo.ALL))
def test_every_parameter_is_counted_once(name: str) -> None:
    make, signature = zoo.ALL[name]
    module = zoo.warmed(make)
    table = surgery.summary(module, signature)
    assert table.total + table.unused == sum(p.numel() for p in module.parameters())
    assert table.unused == (17_000 if name == "residual" else 0)
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    for row in table.rows:
        assert set(row.inputs) <= set(names), row


@pytest.mark.parametrize("name", list(zoo.ALL))
def test_shapes_are_those_of_a_real_run(name: str) -> None:
    make, signature = zoo.ALL[name]
    module = zoo.warmed(make)
    found = surgery.infer_output_shapes(module, Signature(signature.inputs, {}))
    assert [spec for spec in found.outputs.values()] == [signature.outputs[key] for key in signature.outputs]
    named = surgery.infer_output_shapes(module, signature)
    assert named == signature
    out = signature.call(module, zoo.batch(signature, 5))
    for key, tensor in out.items():
        assert tuple(tensor.shape) == (5, *signature.outputs[key].shape[1:])


def test_names_of_outputs_that_nobody_named() -> None:
    fire = surgery.infer_output_shapes(zoo.Fire(), Signature(zoo.FIRE.inputs, {}))
    assert list(fire.outputs) == ["scores", "side"]
    siamese = surgery.infer_output_shapes(zoo.Siamese(), Signature(zoo.SIAMESE.inputs, {}))
    assert list(siamese.outputs) == ["out", "sub"]
    routed = surgery.infer_output_shapes(zoo.Routed(), Signature(zoo.ROUTED.inputs, {}))
    assert list(routed.outputs) == ["output"]


def test_sizes_that_follow_an_input_carry_its_symbol() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 4)
            self.conv = nn.Conv1d(4, 6, 3, stride=2)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.words(ids)
            return x, self.conv(x.transpose(1, 2)), x.reshape(-1, 4)

    signature = Signature({"ids": TensorSpec(("N", "T"), "int64")}, {})
    found = surgery.infer_output_shapes(Encoder(), signature)
    shapes = [spec.shape for spec in found.outputs.values()]
    assert shapes[0] == ("N", "T", 4)
    assert shapes[1][:2] == ("N", 6)
    assert isinstance(shapes[1][2], str)
    assert shapes[1][2] != "T"
    assert isinstance(shapes[2][0], str)
    assert shapes[2][0] != "N"


def test_shapes_that_do_not_fit_name_the_layer() -> None:
    small = Signature({"image": zoo.spec(3, 64, 64)}, {"scores": zoo.spec(1000)})
    with pytest.raises(ModelError, match=r"layer 'fc1' \(Linear\) takes 25,088 numbers, but 'flatten' gives \(2048,\)"):
        surgery.infer_output_shapes(zoo.vgg16(), small)
    grey = Signature({"image": zoo.spec(1, 8, 8)}, {})
    with pytest.raises(ModelError, match=r"layer 'stem' \(Conv2d\) takes 3 channels, but .* gives \(1, 8, 8\)"):
        surgery.infer_output_shapes(zoo.Residual(), grey)
    with pytest.raises(ModelError, match="takes 2 inputs"):
        surgery.infer_output_shapes(surgery.trace(zoo.Siamese()), Signature({"a": zoo.spec(6)}, {}))


def test_control_flow_cannot_be_followed_without_weights() -> None:
    with torch.device("meta"):
        module = zoo.Routed()
    with pytest.raises(ModelError, match="meta"):
        surgery.infer_output_shapes(module, zoo.ROUTED)
