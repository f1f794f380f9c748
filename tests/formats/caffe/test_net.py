"""Whole nets: old spellings, phases, weights and their sharing, data layers, losses, preparation."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.caffe import read, read_mean, replace_data_layers
from kindling.formats.caffe.prototxt import parse
from kindling.formats.caffe.select import State, select
from kindling.formats.caffe.upgrade import upgrade
from kindling.formats.models import Imported, Peek, open_model
from kindling.prepare import ArrayStep, ImageStep, RandomCrop, RandomFlip

Make = Callable[..., Imported]
DEPLOY = """
name: "tiny"
input: "data" input_dim: 1 input_dim: 1 input_dim: 4 input_dim: 4
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        convolution_param { num_output: 2 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip"
        inner_product_param { num_output: 3 weight_filler { type: "gaussian" std: 0.1 } } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
W = {
    "conv": [np.linspace(-1, 1, 18).reshape(2, 1, 3, 3), np.array([0.5, -0.5])],
    "ip": [np.linspace(-1, 1, 24).reshape(3, 8), np.array([1.0, 2.0, 3.0])],
}
TRAIN_VAL = """
name: "tiny"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
        transform_param { mirror: true crop_size: 4 mean_value: 100 scale: 0.5 }
        data_param { source: "/somewhere" batch_size: 16 } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
        transform_param { crop_size: 4 mean_value: 100 scale: 0.5 } data_param { source: "/x" batch_size: 8 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
        param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
        convolution_param { num_output: 2 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" include { phase: TRAIN } }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" param { lr_mult: 0 }
        inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "top2" type: "Accuracy" bottom: "ip" bottom: "label" top: "top2" include { phase: TEST }
        accuracy_param { top_k: 2 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""


def out(made: Imported, *arrays: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(made.module(*(torch.from_numpy(a.astype(np.float32)) for a in arrays)))


# ---------------------------------------------------------------------------------------------- spellings

V1 = """
name: "tiny"
input: "data" input_shape { dim: 1 dim: 1 dim: 4 dim: 4 }
layers { name: "conv" type: CONVOLUTION bottom: "data" top: "conv"
         blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0
         convolution_param { num_output: 2 kernel_size: 3 weight_filler { type: "xavier" } } }
layers { name: "relu" type: RELU bottom: "conv" top: "conv" }
layers { name: "ip" type: INNER_PRODUCT bottom: "conv" top: "ip" inner_product_param { num_output: 3 } }
layers { name: "prob" type: SOFTMAX bottom: "ip" top: "prob" }
"""
V0 = """
name: "tiny"
input: "data" input_dim: 1 input_dim: 1 input_dim: 4 input_dim: 4
layers { layer { name: "pad" type: "padding" pad: 0 } bottom: "data" top: "pad" }
layers { layer { name: "conv" type: "conv" num_output: 2 kernelsize: 3 blobs_lr: 1. blobs_lr: 2. weight_decay: 1. weight_decay: 0.
         weight_filler { type: "xavier" } } bottom: "pad" top: "conv" }
layers { layer { name: "relu" type: "relu" } bottom: "conv" top: "conv" }
layers { layer { name: "ip" type: "innerproduct" num_output: 3 biasterm: true } bottom: "conv" top: "ip" }
layers { layer { name: "prob" type: "softmax" } bottom: "ip" top: "prob" }
"""  # noqa: E501


def test_old_spellings_give_the_same_net(net: Make) -> None:
    x = np.random.default_rng(1).standard_normal((2, 1, 4, 4))
    new = net(DEPLOY, W)
    for text in (V1, V0):
        old = net(text, W)
        np.testing.assert_array_equal(out(old, x), out(new, x))
        assert old.training is not None
        assert old.training.multipliers["conv.bias"] == (2, 0)
        assert old.training.multipliers["ip.bias"] == (1, 1)


def test_padding_layers_of_old_nets_move_into_the_layers_behind() -> None:
    spec = upgrade(parse(V0.replace("pad: 0", "pad: 2")))
    assert [layer.get("name") for layer in spec.layers] == ["conv", "relu", "ip", "prob"]
    assert spec.layers[0].get("convolution_param").all("pad") == [2]
    assert spec.layers[0].all("bottom") == ["data"]
    with pytest.raises(FormatError, match="feeds more than one convolution"):
        upgrade(parse(V0.replace('"relu" } bottom: "conv"', '"relu" } bottom: "pad"')))


def test_old_data_parameters_become_todays() -> None:
    old = """layers { name: "d" type: DATA top: "data"
             data_param { scale: 0.5 mean_file: "m" crop_size: 9 mirror: true } }
             layers { layer { name: "e" type: "data" scale: 0.25 meanfile: "n" cropsize: 8 batchsize: 7 } top: "x" }"""
    first, second = upgrade(parse(old)).layers
    assert [first.get("transform_param").get(n) for n in ("scale", "mean_file", "crop_size")] == [0.5, "m", 9]
    assert [second.get("transform_param").get(n) for n in ("scale", "mean_file", "crop_size")] == [0.25, "n", 8]
    assert second.get("data_param").get("batch_size") == 7


def test_a_file_of_both_spellings_is_refused() -> None:
    with pytest.raises(FormatError, match=r"both old `layers` \(line 1\) and new `layer`"):
        upgrade(parse("layers { type: RELU } layer { }"))
    with pytest.raises(FormatError, match=r"unknown old type 'convv'. Did you mean 'conv'"):
        upgrade(parse('layers { layer { name: "a" type: "convv" } }'))
    with pytest.raises(FormatError, match="old type 'relu' has no 'num_output'"):
        upgrade(parse('layers { layer { name: "a" type: "relu" num_output: 3 } }'))


def test_inputs_need_as_many_shapes_as_names() -> None:
    for text, why in (
        ('input: "a" input_dim: 1 input_dim: 2', "not four for each"),
        ('input: "a" input: "b" input: "c" input_shape { dim: 1 } input_shape { dim: 1 }', "3 inputs and 2 shapes"),
        ('input: "a" input_dim: [1, 1, 1, 1] input_shape { dim: 1 }', "both input_shape and input_dim"),
    ):
        with pytest.raises(FormatError, match=why):
            upgrade(parse(text))
    shared = upgrade(parse('input: "a" input: "b" input_shape { dim: 1 dim: 5 }'))
    assert shared.inputs == [("a", (1, 5)), ("b", (1, 5))]


def test_rules_choose_layers_by_phase_level_and_stage() -> None:
    layers = parse("""
        layer { name: "always" }
        layer { name: "train" include { phase: TRAIN } }
        layer { name: "not train" exclude { phase: TRAIN } }
        layer { name: "either" include { phase: TRAIN } include { stage: "deploy" } }
        layer { name: "both" include { phase: TEST stage: "deploy" } }
        layer { name: "not deploy" include { not_stage: "deploy" } }
        layer { name: "high" include { min_level: 2 } }
        layer { name: "middle" include { min_level: 1 max_level: 2 } }
    """).all("layer")

    def names(**state: Any) -> list[str]:
        return [layer.get("name") for layer in select(layers, State(**state))]

    assert names() == ["always", "not train", "not deploy"]
    assert names(phase="TRAIN") == ["always", "train", "either", "not deploy"]
    assert names(stages=("deploy",)) == ["always", "not train", "either", "both"]
    assert names(level=2) == ["always", "not train", "not deploy", "high", "middle"]
    with pytest.raises(FormatError, match="both include and exclude"):
        select(parse("layer { include { } exclude { } }").all("layer"), State())


# ---------------------------------------------------------------------------------------------- weights


def test_a_net_gives_what_its_weights_say(net: Make) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1, 4, 4))
    made = net(DEPLOY, W)
    windows = np.lib.stride_tricks.sliding_window_view(x[:, 0], (3, 3), (1, 2))
    conv = np.maximum(np.einsum("nhwij,oij->nohw", windows, W["conv"][0][:, 0]) + W["conv"][1][:, None, None], 0)
    scores = conv.reshape(3, 8) @ W["ip"][0].T + W["ip"][1]
    want = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(out(made, x), want, rtol=1e-5)
    assert [(name, spec.shape) for name, spec in made.signature.inputs.items()] == [("data", ("N", 1, 4, 4))]
    assert [(name, spec.shape) for name, spec in made.signature.outputs.items()] == [("prob", ("N", 3))]
    assert (made.name, made.source["weights_file"]) == ("tiny", "net.caffemodel")
    assert isinstance(made.preparation.inputs[0], ArrayStep)
    assert "states no preparation" in made.source["preparation"]["data"]


@pytest.mark.parametrize("style", ["unpacked", "double", "half", "raw", "legacy"])
def test_every_style_of_blob_gives_the_same_weights(net: Make, write: Any, tmp_path: Path, style: str) -> None:
    halves = {name: [np.round(blob * 8) / 8 for blob in blobs] for name, blobs in W.items()}
    want = net(DEPLOY, halves)
    file = tmp_path / "other.caffemodel"
    file.write_bytes(write.caffemodel(halves, style=style))
    made = read(tmp_path / "net.prototxt", weights=file)
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, want.module.state_dict()[name])


def test_weights_in_hdf5_are_read_too(net: Make, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    want = net(DEPLOY.replace('"conv"', '"a/conv"'), {"a/conv": W["conv"], "ip": W["ip"]})
    with h5py.File(tmp_path / "w.caffemodel.h5", "w") as root:
        for name, key in (("a/conv", "conv"), ("ip", "ip")):
            for place, blob in enumerate(W[key]):
                root[f"data/{name}/{place}"] = blob.astype(np.float32)
    made = read(tmp_path / "net.prototxt", weights=tmp_path / "w.caffemodel.h5")
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, want.module.state_dict()[name])
    with h5py.File(tmp_path / "bomb.h5", "w") as root:
        root.create_dataset("data/ip/0", (2**33,), "f4", chunks=(2**20,), compression="gzip")
    with pytest.raises(FormatError, match="announces more than it holds"):
        read(tmp_path / "net.prototxt", weights=tmp_path / "bomb.h5")


def test_weights_that_do_not_fit_are_refused(net: Make) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({**W, "conv": [W["conv"][0]]}, "'conv' of type 'Convolution' .line 4. has 2 blobs, the weights hold 1"),
        ({**W, "ip": [W["ip"][0][:, :7], W["ip"][1]]}, r"a blob of shape \(3, 8\), the weights hold 21 numbers"),
        ({**W, "ip": [W["ip"][0].T, W["ip"][1]]}, r"a blob of shape \(3, 8\), the weights hold 24 .*\(8, 3\)"),
        ({"conv": W["conv"]}, "no weights for 1 of the net's 2 layers with weights: 'ip'. Give partial=True"),
        ({"convv": W["conv"]}, "has weights for none of the net's layers. Did you mean 'convv'"),
        ({}, "holds no weights. Is it the .caffemodel"),
    ]
    for blobs, why in cases:
        with pytest.raises(FormatError, match=why):
            net(DEPLOY, blobs)


def test_layers_without_weights_may_begin_as_their_fillers_say(net: Make) -> None:
    made = net(DEPLOY, {"conv": W["conv"], "old_head": W["ip"]}, partial=True, seed=5)
    assert torch.equal(made.module.conv.weight, torch.from_numpy(W["conv"][0].astype(np.float32)))
    assert made.source["without_weights"] == ["ip"]
    assert 0.03 < made.module.ip.weight.std() < 0.2
    assert made.module.ip.bias.abs().sum() == 0


def test_the_seed_decides_how_weights_begin(net: Make) -> None:
    def weights(seed: int) -> torch.Tensor:
        return net(DEPLOY, seed=seed).module.ip.weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


SHARED = """
layer { name: "in" type: "Input" top: "a" top: "b" input_param { shape { dim: 1 dim: 4 } } }
layer { name: "one" type: "InnerProduct" bottom: "a" top: "one" param { name: "w" lr_mult: 3 } param { name: "v" }
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "two" type: "InnerProduct" bottom: "b" top: "two" param { name: "w" } param { name: "v" }
        inner_product_param { num_output: 4 TRANSPOSE } }
"""


def test_blobs_of_one_name_are_one_parameter(net: Make, tmp_path: Path) -> None:
    made = net(SHARED.replace("TRANSPOSE", ""), seed=1)
    assert made.module.one.weight is made.module.two.weight
    assert made.module.one.bias is made.module.two.bias
    assert sum(p.numel() for p in made.module.parameters()) == 20
    assert made.training is not None
    assert made.training.multipliers == {"one.weight": (3, 1), "one.bias": (1, 1)}
    from kindling import bundle
    from kindling.model import Model

    model = Model(module=made.module, signature=made.signature, preparation=made.preparation)
    bundle.save(model, tmp_path / "b")
    again = bundle.load(str(tmp_path / "b")).module
    assert again.one.weight is again.two.weight


def test_tied_weights_may_be_read_the_other_way_round(net: Make) -> None:
    w, v = np.arange(16.0).reshape(4, 4), np.arange(4.0)
    made = net(SHARED.replace("TRANSPOSE", "transpose: true"), {"one": [w, v], "two": [w * 9, v]})
    assert made.module.one.weight is made.module.two.weight
    x = torch.ones(1, 4)
    forth, back = made.module(x, x)
    np.testing.assert_allclose(forth.detach()[0], w.sum(1) + v)
    np.testing.assert_allclose(back.detach()[0], w.sum(0) + v)


def test_shared_blobs_must_have_one_shape(net: Make) -> None:
    text = SHARED.replace("TRANSPOSE", "").replace("num_output: 4  }", "num_output: 5 }")
    with pytest.raises(FormatError, match=r"'two' .* shares blob 'w' with layer 'one' \(line 3\)"):
        net(text)


def test_a_caffemodel_with_its_net_inside_needs_no_prototxt(write: Any, tmp_path: Path, net: Make) -> None:
    conv = write.number(1, 2) + write.number(4, 3)
    shape = write.data(1, b"".join(write.varint(size) for size in (1, 1, 4, 4)))
    rule = write.data(8, write.number(1, 0))  # only the layers of one phase are in the file, with their rules

    def layer(name: str, kind: str, bottoms: list[str], rest: bytes = b"") -> bytes:
        links = b"".join(write.data(3, bottom) for bottom in bottoms) + write.data(4, name)
        return bytes(write.data(100, write.data(1, name) + write.data(2, kind) + links + rule + rest))

    blobs = {key: b"".join(write.data(7, write.blob(np.asarray(b))) for b in value) for key, value in W.items()}
    data = write.data(1, "tiny") + layer("data", "Input", [], write.data(143, write.data(1, shape)))
    data += layer("conv", "Convolution", ["data"], blobs["conv"] + write.data(106, conv))
    data += layer("relu", "ReLU", ["conv"]) + layer(
        "ip", "InnerProduct", ["relu"], blobs["ip"] + write.data(117, write.number(1, 3))
    )
    file = tmp_path / "tiny.caffemodel"
    file.write_bytes(data)
    x = np.random.default_rng(1).standard_normal((2, 1, 4, 4))
    want = net(DEPLOY.replace("Softmax", "Power"), W)
    np.testing.assert_allclose(out(read(file), x), out(want, x), rtol=1e-6)
    file.write_bytes(write.caffemodel(W))
    with pytest.raises(FormatError, match=r"not how its layers hang together. Give net="):
        read(file)
    made = read(file, net=tmp_path / "net.prototxt")
    np.testing.assert_allclose(out(made, x), out(want, x), rtol=1e-6)


def test_weights_beyond_the_limit_are_not_made(net: Make) -> None:
    with pytest.raises(FormatError, match=r"has 47 weights to begin with, more than 46. Give max_parameters=47"):
        net(DEPLOY, max_parameters=46)
    huge = DEPLOY.replace("num_output: 3", "num_output: 4000000000")
    with pytest.raises(FormatError, match="more than"):
        net(huge)


# ---------------------------------------------------------------------------------------------- training


def test_a_training_net_keeps_its_losses_metrics_and_factors_beside_the_graph(net: Make) -> None:
    made = net(TRAIN_VAL, input_shape=(1, 4, 4), seed=1)
    assert [(name, spec.shape) for name, spec in made.signature.outputs.items()] == [("ip", ("N", 3))]
    training = made.training
    assert training is not None
    assert training.loss is not None
    assert training.multipliers == {
        "conv.weight": (1, 1), "conv.bias": (2, 0), "ip.weight": (0, 1), "ip.bias": (1, 1),
    }  # fmt: skip
    assert (training.batch_size, dict(training.augment)) == (8, {"data": (RandomCrop(0, spare=1),)})
    scores, labels = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([1, 2])
    assert training.loss(scores, labels).item() == pytest.approx(
        float(nn.functional.cross_entropy(scores, labels)), rel=1e-6
    )
    assert {name: metric(scores, labels).item() for name, metric in training.metrics.items()} == {
        "accuracy": 0.5, "top2": 1.0,
    }  # fmt: skip


def test_the_phase_decides_which_layers_there_are(net: Make) -> None:
    made = net(TRAIN_VAL, input_shape=(1, 4, 4), phase="TRAIN")
    assert isinstance(made.module.drop, nn.Dropout)
    assert made.training is not None
    changes = {"data": (RandomCrop(padding=0, spare=1), RandomFlip())}
    assert (made.training.batch_size, dict(made.training.augment)) == (16, changes)
    assert not made.training.metrics
    with pytest.raises(FormatError, match="no phase 'test'"):
        net(TRAIN_VAL, phase="test")


def test_losses_are_weighed_and_added_up(net: Make) -> None:
    text = (
        TRAIN_VAL
        + """
        layer { name: "euclid" type: "EuclideanLoss" bottom: "conv" bottom: "want" top: "e" loss_weight: 0.25 }
        layer { name: "unused" type: "HingeLoss" bottom: "ip" bottom: "label" top: "h" loss_weight: 0 }
    """
    )
    text += 'input: "want" input_shape { dim: 1 dim: 2 dim: 2 dim: 2 }'
    made = net(text, input_shape={"data": (1, 4, 4)}, seed=1)
    assert list(made.signature.inputs) == ["data"]
    assert list(made.signature.outputs) == ["conv", "ip"]
    assert made.training is not None
    assert made.training.loss is not None
    conv, scores, want = torch.rand(2, 2, 2, 2), torch.rand(2, 3), torch.rand(2, 2, 2, 2)
    labels = torch.tensor([0, 2])
    got = made.training.loss({"conv": conv, "ip": scores}, {"label": labels, "want": want})
    euclid = (conv - want).square().sum() / 4
    torch.testing.assert_close(got, nn.functional.cross_entropy(scores, labels) + euclid / 4)


def test_a_layer_that_reads_the_labels_makes_them_an_input(net: Make) -> None:
    text = (
        TRAIN_VAL
        + """
        layer { name: "embed" type: "Embed" bottom: "label" top: "embed"
                embed_param { input_dim: 3 num_output: 2 } }
    """
    )
    made = net(text, input_shape=(1, 4, 4))
    assert {name: spec.shape for name, spec in made.signature.inputs.items()} == {
        "data": ("N", 1, 4, 4), "label": ("N",),
    }  # fmt: skip
    silent = TRAIN_VAL + 'layer { name: "quiet" type: "Silence" bottom: "label" }'
    assert list(net(silent, input_shape=(1, 4, 4)).signature.inputs) == ["data"]


def test_a_blob_of_another_stage_is_explained(net: Make) -> None:
    text = TRAIN_VAL.replace("include { phase: TEST }\n", 'include { phase: TEST stage: "val" }\n', 1)
    with pytest.raises(FormatError, match=r"'conv' .* reads the blob 'data', which layer 'data' \(line 3\) writes in"):
        net(text, input_shape=(1, 4, 4))
    assert net(text, input_shape=(1, 4, 4), stages=("val",)).signature.inputs["data"].shape == ("N", 1, 4, 4)


# ---------------------------------------------------------------------------------------------- data


def test_a_database_of_unknown_pictures_is_asked_for_and_told_by_weights(net: Make) -> None:
    text = TRAIN_VAL.replace("crop_size: 4", "")
    with pytest.raises(
        FormatError, match=r"'data' of type 'Data' \(line 6\) does not say how large.*Give input_shape="
    ):
        net(text)
    made = net(TRAIN_VAL, W)  # four by four by the crop, one channel by the convolution's weights
    assert made.signature.inputs["data"].shape == ("N", 1, 4, 4)
    with pytest.raises(FormatError, match="input 'data' has the shape"):
        net(TRAIN_VAL, input_shape=(1, 0, 4))


def test_what_a_data_layer_does_becomes_the_preparation(net: Make) -> None:
    made = net(TRAIN_VAL, W)
    (step,) = made.preparation.inputs
    assert isinstance(step, ImageStep)
    assert (step.channels, step.size, step.resize, step.resize_to) == ("L", (4, 4), "shorter", 5)
    assert "does not say" in made.source["preparation"]["data"]
    file = io.BytesIO()
    Image.new("L", (256, 300), 130).save(file, "PNG")
    packed = step.pack(pa.RecordBatch.from_pydict({"content": [file.getvalue()]}))
    np.testing.assert_allclose(step.batch(packed.arrays), np.full((1, 1, 4, 4), (130 - 100) * 0.5))


def test_colours_stay_blue_first(net: Make) -> None:
    text = TRAIN_VAL.replace("mean_value: 100 scale: 0.5", "mean_value: 1 mean_value: 2 mean_value: 3")
    made = net(text)
    (step,) = made.preparation.inputs
    assert isinstance(step, ImageStep)
    file = io.BytesIO()
    Image.new("RGB", (256, 256), (30, 20, 10)).save(file, "PNG")
    packed = step.pack(pa.RecordBatch.from_pydict({"content": [file.getvalue()]}))
    assert step.batch(packed.arrays)[0, :, 0, 0].tolist() == [9, 18, 27]


def test_a_mean_file_beside_the_net_is_taken_off_inside_it(net: Make, write: Any, tmp_path: Path) -> None:
    mean = np.arange(3 * 6 * 6, dtype=np.float32).reshape(3, 6, 6)
    text = TRAIN_VAL.replace("mean_value: 100", 'mean_file: "far/away/mean.binaryproto"')
    (tmp_path / "mean.binaryproto").write_bytes(write.blob(mean[None], "legacy"))
    text += 'layer { name: "see" type: "Power" bottom: "data" top: "see" }'
    made = net(text, seed=1)
    assert made.signature.inputs["data"].shape == ("N", 3, 4, 4)
    x = np.full((2, 3, 4, 4), 200.0, np.float32)
    ip, see = made.module(torch.from_numpy(x))
    np.testing.assert_allclose(see, (x - mean[:, 1:5, 1:5]) * 0.5)
    (step,) = made.preparation.inputs
    assert isinstance(step, ImageStep)
    assert (step.mean, step.std, step.resize_to) == ((0.0,), (1.0,), 6)
    (tmp_path / "mean.binaryproto").unlink()
    (tmp_path / "far").mkdir()
    made = net(text, seed=1)
    assert isinstance(made.preparation.inputs[0], ArrayStep)
    assert "mean file 'far/away/mean.binaryproto' is not at hand" in made.source["preparation"]["data"]
    np.save(tmp_path / "mean.npy", mean)
    made = net(text, mean=tmp_path / "mean.npy", seed=1)
    np.testing.assert_allclose(made.module(torch.from_numpy(x))[1], (x - mean[:, 1:5, 1:5]) * 0.5)
    del ip


def test_mean_files_outside_the_nets_folder_are_left_alone(net: Make, write: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "m.binaryproto").write_bytes(write.blob(np.ones((1, 3, 6, 6)), "legacy"))
    for named in (tmp_path / "secret" / "m.binaryproto", "secret/../secret/m.binaryproto", "secret\\\\m.binaryproto"):
        made = net(TRAIN_VAL.replace("mean_value: 100", f'mean_file: "{named}"'), seed=1)
        assert "not at hand" in made.source["preparation"]["data"]


def test_a_deploy_net_is_prepared_as_the_caller_says(net: Make) -> None:
    made = net(DEPLOY, W, mean=(128.0,), scale=1 / 128, image={"resize": "squash"})
    (step,) = made.preparation.inputs
    assert isinstance(step, ImageStep)
    assert (step.mean, step.std, step.resize, step.size) == ((128.0,), (128.0,), "squash", (4, 4))
    with pytest.raises(ConfigError, match="names no field"):
        net(DEPLOY, W, image={"colour": 3})
    with pytest.raises(FormatError, match="2 mean values do not fit the 1 channels"):
        net(DEPLOY, W, mean=(1.0, 2.0))
    with pytest.raises(FormatError, match="does not cover"):
        net(DEPLOY, W, mean=np.zeros((1, 3, 3)))


def test_a_net_for_one_size_of_batch_is_refused(net: Make) -> None:
    text = """input: "x" input_shape { dim: 2 dim: 6 }
        layer { name: "turn" type: "Reshape" bottom: "x" top: "t" reshape_param { shape { dim: 4 dim: 3 } } }"""
    with pytest.raises(FormatError, match="layer 'turn' takes only the batches of 2 that the file declares"):
        net(text)
    assert net(text.replace("dim: 4 dim: 3", "dim: 2 dim: 3 dim: 2")).signature.outputs["turn"].shape == ("N", 3, 2)


def test_labels_of_the_caller_are_kept(net: Make) -> None:
    assert net(DEPLOY, W, labels=["a", "b", "c"]).labels == ("a", "b", "c")


def test_mean_files_that_are_none_are_refused(tmp_path: Path, write: Any) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "is empty"),
        "text": (b"hello there", "cannot|at byte|no numbers"),
        "vector": (write.blob(np.ones((2, 3))), "no mean picture"),
        "nan": (write.blob(np.full((1, 3, 2, 2), np.nan)), "no mean picture"),
        "cut": (write.blob(np.ones((1, 3, 2, 2)))[:-3], "Is the file whole"),
        "cut.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2, 2), }\n", "Is it"),
        "pickle.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
                       + b" " * 60 + b"\n" + b"cos\nsystem\n(S'false'\ntR.", "cannot be read as .npy"),
    }  # fmt: skip
    for name, (data, why) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=why):
            read_mean(tmp_path / name)
    with pytest.raises(FormatError, match="no mean file"):
        read_mean(tmp_path / "nowhere")


def test_data_layers_are_replaced_as_sparknet_had_it() -> None:
    old = parse(TRAIN_VAL)
    new = replace_data_layers(old, 32, 50, 1, 4, 4)
    assert [layer.get("type") for layer in old.all("layer")][:2] == ["Data", "Data"]
    for phase, batch in (("TRAIN", 32), ("TEST", 50)):
        made = read(new, phase=phase, seed=1)
        assert made.signature.inputs["data"].shape == ("N", 1, 4, 4)
        assert made.training is not None
        assert made.training.batch_size == batch
        (step,) = made.preparation.inputs
        assert isinstance(step, ImageStep)
        assert (step.mean, step.std) == ((100.0,), (2.0,))
    assert read(replace_data_layers(parse(DEPLOY), 2, 3, 1, 4, 4)).signature.inputs["data"].shape == ("N", 1, 4, 4)
    with pytest.raises(FormatError, match="no data layer"):
        replace_data_layers(parse('layer { name: "r" type: "ReLU" }'), 1, 1, 1, 1, 1)
    with pytest.raises(FormatError, match="not all positive"):
        replace_data_layers(old, 0, 1, 1, 1, 1)


def test_other_data_layers_say_their_shapes(net: Make) -> None:
    relu = 'layer { name: "r" type: "ReLU" bottom: "x" top: "r" }'
    for text, shape in (
        ('type: "DummyData" dummy_data_param { shape { dim: 5 dim: 3 dim: 2 } }', ("N", 3, 2)),
        ('type: "DummyData" dummy_data_param { num: 5 channels: 1 height: 2 width: 3 }', ("N", 1, 2, 3)),
        ('type: "MemoryData" memory_data_param { batch_size: 5 channels: 3 height: 2 width: 9 }', ("N", 3, 2, 9)),
        ('type: "ImageData" image_data_param { new_height: 8 new_width: 7 is_color: false }', ("N", 1, 8, 7)),
        ('type: "ImageData" transform_param { crop_size: 5 }', ("N", 3, 5, 5)),
    ):
        made = net(f'layer {{ name: "d" top: "x" {text} }} {relu}')
        assert made.signature.inputs["x"].shape == shape
    table = 'layer { name: "d" type: "HDF5Data" top: "x" top: "y" }'
    ip = 'layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" inner_product_param { num_output: 2 } }'
    made = net(table + ip, {"ip": [np.ones((2, 7)), np.ones(2)]})
    assert made.signature.inputs["x"].shape == ("N", 7)


# ---------------------------------------------------------------------------------------------- the door


def test_nets_are_known_by_what_is_in_them(net: Make, write: Any, tmp_path: Path) -> None:
    net(DEPLOY, W)
    renamed = tmp_path / "net.txt"
    renamed.write_text(DEPLOY)
    found = open_model(renamed, weights=tmp_path / "net.caffemodel")
    assert found is not None
    assert found.source["format"] == "caffe"
    from kindling.formats import caffe

    def peek(head: bytes, name: str = "file") -> bool:
        return caffe.matches(Peek(path=Path(name), head=head))

    assert peek(write.caffemodel(W)[:4096])
    assert peek(V1.encode())
    assert not peek(b"\x08\x07\x12\x0cbackend-test:")  # ONNX
    assert not peek(write.data(1, write.data(1, "x") + write.data(2, "Placeholder")))  # TensorFlow
    assert not peek(b"import torch\nlayer = 3\n")
    assert not peek(b"{}")
    assert not peek(b"")


def test_files_in_the_wrong_place_are_explained(tmp_path: Path, net: Make) -> None:
    net(DEPLOY, W)
    text, numbers = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    (tmp_path / "solver.prototxt").write_text("base_lr: 0.1")
    (tmp_path / "empty").write_bytes(b"")
    for call, why in (
        (lambda: read(text, net=text), "Give weights="),
        (lambda: read(numbers, weights=numbers), "Give net="),
        (lambda: read(text, weights=text), "holds no weights"),
        (lambda: read(tmp_path / "solver.prototxt"), "is a solver and no net"),
        (lambda: read(tmp_path / "empty"), "is empty"),
        (lambda: read(tmp_path / "nowhere"), "cannot be read"),
    ):
        with pytest.raises(FormatError, match=why):
            call()
