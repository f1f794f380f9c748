"""Frozen layers stay as they are; a split and its join change nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import cloudpickle
import pytest
import surgery_zoo as zoo
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling import surgery
from kindling.errors import ModelError
from kindling.signature import Signature


def test_freezing_covers_what_a_layer_is_computed_from() -> None:
    vgg = zoo.vgg16()
    frozen = surgery.frozen_layers(vgg, "block4_pool")
    assert frozen == {f"block{b}_{k}" for b in (1, 2, 3, 4) for k in ("conv1", "conv2", "pool")} | {
        "block3_conv3",
        "block4_conv3",
    }
    assert len(surgery.frozen_layers(vgg)) == 24
    siamese = zoo.warmed(zoo.Siamese)
    assert surgery.frozen_layers(siamese, "own", zoo.SIAMESE) == {"own"}
    assert surgery.frozen_layers(siamese, "trunk.0#2") == {"trunk.0#2"}
    assert surgery.frozen_layers(siamese, "cat") == {"trunk.0", "trunk.0#2", "own", "cat"}
    assert surgery.frozen_layers(zoo.Residual(), "blocks.0") == {
        "stem", "blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2", "blocks.0.bn2", "add",
    }  # fmt: skip
    with pytest.raises(ModelError, match="no layer 'fc3'"):
        surgery.frozen_layers(vgg, "fc3")


def test_freezing_inside_untraceable_modules() -> None:
    module = zoo.warmed(zoo.Routed)
    names = {"first", "norm", "plus", "minus", "body.fc"}
    assert surgery.frozen_layers(module, "body.fc") == names
    assert surgery.frozen_layers(module, "body.fc", zoo.ROUTED) == names
    assert surgery.frozen_layers(module) == names | {"body.act", "body.drop", "head", "big"}
    outer = surgery.frozen_layers(zoo.warmed(zoo.Outer), "trunk.norm")
    assert outer == {"before", "trunk.first", "trunk.norm"}


def test_frozen_branches_beside_an_untraceable_layer_are_told_by_a_run() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                x = -x
            return self.c(x) + self.b(self.a(x))

    module, signature = Branches(), zoo.signature({"x": zoo.spec(2)}, out=zoo.spec(2))
    assert surgery.frozen_layers(module, "c", signature) == {"c"}
    assert surgery.frozen_layers(module, "b", signature) == {"a", "b"}
    assert surgery.frozen_layers(module, "c") == {"a", "b", "c"}  # all that comes before, where nothing better is known
    rows = {row.name: row.inputs for row in surgery.layers(module, signature)}
    assert rows == {"x": (), "a": ("x",), "b": ("a",), "c": ("x",)}


def trained(module: nn.Module, signature: Signature, frozen: frozenset[str], steps: int = 3) -> dict[str, Tensor]:
    surgery.set_training(module, frozen)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        out = signature.call(module, zoo.batch(signature, seed=step))
        optimizer.zero_grad()
        sum(value.square().mean() for value in out.values()).backward()
        optimizer.step()
    return dict(module.state_dict())


@pytest.mark.parametrize("form", ["module", "trace"])
def test_frozen_means_weights_and_statistics_stay(form: str) -> None:
    module = zoo.warmed(zoo.Residual)
    if form == "trace":
        module = copy.deepcopy(surgery.trace(module))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    after = trained(module, zoo.RESIDUAL, surgery.frozen_layers(module, "blocks.0"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    still = {key for key in before if key.startswith(("stem.", "blocks.0."))}
    assert not moved & still
    assert {"blocks.1.conv1.weight", "blocks.1.bn1.running_mean", "hidden.weight", "head.bias"} <= moved
    assert not module.get_submodule("blocks.0.bn1").training
    assert module.get_submodule("blocks.1.bn1").training
    surgery.set_training(module, frozenset())
    assert module.get_submodule("blocks.0.bn1").training


def test_frozen_dropout_is_off() -> None:
    module = zoo.warmed(zoo.Residual)
    frozen = surgery.frozen_layers(module, "dropout")
    with pytest.raises(ModelError, match=r"'dropout' is dropout in the code of Residual"):
        surgery.set_training(copy.deepcopy(module), frozen)
    net = copy.deepcopy(surgery.trace(module))
    inputs = zoo.batch(zoo.RESIDUAL)
    expected = module(*inputs.values())
    surgery.set_training(net, frozen)
    assert net.head.training
    torch.testing.assert_close(zoo.RESIDUAL.call(net, inputs)["scores"], expected)
    surgery.set_training(net, frozen - {"dropout"})
    assert not torch.equal(zoo.RESIDUAL.call(net, inputs)["scores"], expected)


def test_freezing_parameters_that_functions_use() -> None:
    module = copy.deepcopy(surgery.trace(zoo.warmed(zoo.Tagger)))
    surgery.set_training(module, frozenset({"add"}))
    assert not module.position.requires_grad
    assert module.lstm.weight_hh_l0.requires_grad
    own = zoo.warmed(zoo.Own)
    surgery.set_training(own, surgery.frozen_layers(own, "features.0"))
    assert not own.features[0].weight.requires_grad
    assert own.features[2].weight.requires_grad
    assert own.features[2].training


def test_freezing_inside_modules_that_run_whole() -> None:
    module = zoo.warmed(zoo.Routed)
    frozen = surgery.frozen_layers(module, "body")
    surgery.set_training(module, frozen)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == [
        "head.weight", "head.bias", "big.weight", "big.bias",
    ]  # fmt: skip
    assert not module.norm.training
    assert not module.body.training
    assert not module.body.drop.training
    assert module.training  # not all of it is frozen
    assert module.head.training
    cut, signature = surgery.until(module.eval(), ["body"], zoo.ROUTED)
    longer, _ = surgery.then(cut, signature, nn.Linear(7, 2))
    frozen = surgery.frozen_layers(cut)
    made = copy.deepcopy(longer)
    surgery.set_training(made, frozen)
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["linear_1.weight", "linear_1.bias"]
    inputs = zoo.batch(zoo.ROUTED)  # all of the trunk is frozen: its functional dropout is off too
    torch.testing.assert_close(made(*inputs.values()), longer.eval()(*inputs.values()))


# ---------------------------------------------------------------------------------------------------- split, join


def check_split(
    module: nn.Module, signature: Signature, frozen: frozenset[str], boundary: tuple[str, ...] | None = None
) -> surgery.Split:
    split = surgery.split_frozen(module, signature, frozen)
    assert split is not None
    if boundary is not None:
        assert split.boundary == boundary
    assert tuple(split.tail_signature.inputs) == tuple(split.prefix_signature.outputs) == split.boundary
    for rows in (1, 4):
        inputs = zoo.batch(signature, rows)
        expected = signature.call(module.eval(), inputs)
        middle = split.prefix_signature.call(split.prefix.eval(), inputs)
        for name, tensor in middle.items():
            spec = split.prefix_signature.outputs[name]
            assert spec.dtype == str(tensor.dtype).removeprefix("torch.")
            assert all(size in ("N", real) for size, real in zip(spec.shape, tensor.shape, strict=True))
        kept = {name: tensor.clone() for name, tensor in middle.items()}
        got = split.tail_signature.call(split.tail.eval(), middle)
        whole = signature.call(surgery.join(split.prefix, split.tail, split).eval(), inputs)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])
            assert torch.equal(whole[name], expected[name])
        for name in kept:  # the rest never writes into what it is given
            assert torch.equal(kept[name], middle[name]), name
    return split


def test_vgg16_splits_where_it_is_frozen() -> None:
    cut, signature = surgery.until(zoo.vgg16(), ["fc2"], zoo.VGG16)
    with torch.device("meta"):
        model, signature = surgery.then(cut, signature, nn.Linear(4096, 257))
    split = surgery.split_frozen(model, signature, surgery.frozen_layers(cut))
    assert split is not None
    assert split.boundary == ("fc2",)
    assert split.tail_signature.inputs["fc2"].shape == ("N", 4096)
    assert {n: tuple(t.shape) for n, t in split.tail.state_dict().items()} == {
        "linear_1.weight": (257, 4096),
        "linear_1.bias": (257,),
    }
    assert not [key for key in split.prefix.state_dict() if key.startswith("linear_1")]
    vgg = zoo.vgg16()
    split = surgery.split_frozen(vgg, zoo.VGG16, surgery.frozen_layers(vgg, "block4_conv3"))
    assert split is not None
    assert split.boundary == ("block4_pool",)  # pooling has no weights: it goes with the front


@pytest.mark.parametrize(
    ("name", "until", "boundary"),
    [
        ("residual", "stem", ("stem",)),
        ("residual", "blocks.0.bn1", ("stem", "blocks.0.bn1")),
        ("residual", "blocks.0", ("add",)),
        ("residual", "blocks", ("view",)),
        ("residual", "hidden", ("hidden",)),
        ("fire", "squeeze", ("squeeze",)),
        ("fire", "left", ("squeeze", "left")),
        ("fire", "cat", ("mean",)),
        ("siamese", "own", ("first", "second", "own")),
        ("siamese", "trunk.0", None),
        ("siamese", "cat", ("cat", "sub")),
        ("tagger", "words", ("words",)),
        ("tagger", "lstm", ("lstm",)),
        ("own", "features.0", ("features.0",)),
        ("own", "features", ("mean",)),
        ("outer", "trunk", ("trunk",)),
        ("outer", "before", ("before",)),
    ],
)
def test_a_split_and_its_join_change_nothing(name: str, until: str, boundary: tuple[str, ...] | None) -> None:
    make, signature = zoo.ALL[name]
    module = zoo.warmed(make)
    split = check_split(module, signature, surgery.frozen_layers(module, until, signature), boundary)
    for part, its in ((split.prefix, split.prefix_signature), (split.tail, split.tail_signature)):
        again = cloudpickle.loads(cloudpickle.dumps(part))
        assert [r.name for r in surgery.layers(again, its)] == [r.name for r in surgery.layers(part, its)]


def test_the_batch_size_is_read_from_the_boundary() -> None:
    module = zoo.warmed(zoo.Residual)
    split = check_split(module, zoo.RESIDUAL, surgery.frozen_layers(module, "blocks.0"), ("add",))
    assert split.tail(*zoo.batch(split.tail_signature, 6).values()).shape == (6, 5)


def test_a_tail_trains_like_the_whole() -> None:
    module = zoo.warmed(zoo.Residual)
    frozen = surgery.frozen_layers(module, "blocks.0")
    split = surgery.split_frozen(module, zoo.RESIDUAL, frozen)
    assert split is not None
    whole, tail = copy.deepcopy(surgery.trace(module)), copy.deepcopy(split.tail)
    surgery.set_training(whole, frozen)
    surgery.set_training(tail, frozen)
    tail.get_submodule("dropout").p = whole.get_submodule("dropout").p = 0.0
    inputs = zoo.batch(zoo.RESIDUAL)
    with torch.no_grad():
        middle = split.prefix_signature.call(split.prefix, inputs)
    for net, its, given in ((whole, zoo.RESIDUAL, inputs), (tail, split.tail_signature, middle)):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        its.call(net, given)["scores"].square().mean().backward()
        optimizer.step()
    joined = surgery.join(split.prefix, tail, split)
    one, two = whole.state_dict(), joined.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key])
    assert not torch.equal(two["head.weight"], module.state_dict()["head.weight"])
    assert [n.name for n in joined.graph.nodes] == [n.name for n in whole.graph.nodes]


def test_unfrozen_dropout_and_statistics_stay_behind() -> None:
    layers = OrderedDict(
        fc=nn.Linear(3, 3), drop=nn.Dropout(), norm=nn.BatchNorm1d(3, affine=False), out=nn.Linear(3, 1)
    )
    module = nn.Sequential(layers)
    signature = zoo.signature({"x": zoo.spec(3)}, out=zoo.spec(1))
    check_split(module, signature, frozenset({"fc"}), ("fc",))
    check_split(module, signature, frozenset({"fc", "drop"}), ("drop",))
    check_split(module, signature, frozenset({"fc", "drop", "norm"}), ("norm",))


def test_dropout_that_is_always_on_is_never_computed_once() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5))

    module = Sampling()
    signature = zoo.signature({"x": zoo.spec(3)}, out=zoo.spec(1))
    split = surgery.split_frozen(module, signature, surgery.frozen_layers(module, "dropout"))
    assert split is not None
    assert split.boundary == ("a",)


def test_no_split_where_nothing_is_frozen_at_the_front() -> None:
    vgg = zoo.vgg16()
    assert surgery.split_frozen(vgg, zoo.VGG16, frozenset()) is None
    assert surgery.split_frozen(vgg, zoo.VGG16, frozenset({"fc1"})) is None
    assert surgery.split_frozen(vgg, zoo.VGG16, frozenset({"block1_pool"})) is None
    module = zoo.warmed(zoo.Routed)
    assert surgery.split_frozen(module, zoo.ROUTED, frozenset({"first"})) is None
    siamese = zoo.warmed(zoo.Siamese)  # frozen in one place is frozen in both
    split = check_split(siamese, zoo.SIAMESE, frozenset({"trunk.0"}))
    assert "own" not in dict(split.prefix.named_modules())


def test_everything_frozen_leaves_a_tail_that_computes_nothing() -> None:
    module = zoo.warmed(zoo.Fire)
    split = check_split(module, zoo.FIRE, surgery.frozen_layers(module), ("scores", "side"))
    assert not list(split.tail.parameters())


def test_an_untraceable_trunk_splits_before_its_head() -> None:
    trunk, signature = surgery.until(zoo.warmed(zoo.Routed), ["body"], zoo.ROUTED)
    head: Any = {"fc": nn.Linear(7, 5), "act": nn.ReLU(), "scores": nn.Linear(5, 2)}
    model, model_signature = surgery.then(trunk, signature, head)
    split = check_split(model, model_signature, surgery.frozen_layers(trunk), ("body",))
    assert list(split.tail.state_dict()) == ["fc.weight", "fc.bias", "scores.weight", "scores.bias"]
    with torch.no_grad():
        split.tail.fc.weight.mul_(2)
    joined = surgery.join(split.prefix, split.tail, split)
    frozen = surgery.frozen_layers(trunk) | {"fc"}
    again = check_split(joined, model_signature, frozen, ("fc",))
    assert [row.name for row in surgery.layers(again.tail, again.tail_signature)] == ["fc", "scores"]
    travelled = cloudpickle.loads(cloudpickle.dumps(joined))
    inputs = zoo.batch(zoo.ROUTED)
    assert torch.equal(travelled(*inputs.values()), joined(*inputs.values()))
