"""Cutting, extending, replacing: against forward hooks on the untouched module."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import surgery_zoo as zoo
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling import surgery
from kindling.errors import ConfigError, ModelError
from kindling.signature import Signature


def seen(module: nn.Module, signature: Signature, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What every submodule gave, call by call, by plain torch hooks."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(_m: Any, _a: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            if isinstance(value, Tensor):
                found.setdefault(path, []).append(value.detach().clone())

        return hook

    handles = [part.register_forward_hook(keep(path)) for path, part in module.named_modules()]
    with torch.no_grad():
        signature.call(module, inputs)
    for handle in handles:
        handle.remove()
    return found


def check(module: nn.Module, signature: Signature, name: str, expected: Tensor, rows: int = 3) -> nn.Module:
    cut, cut_signature = surgery.until(module, [name], signature)
    out = cut_signature.call(cut, zoo.batch(signature, rows))
    assert list(out) == [name] == list(cut_signature.outputs)
    torch.testing.assert_close(out[name], expected, rtol=0, atol=0)
    assert cut_signature.outputs[name].shape == ("N", *expected.shape[1:])
    return cut


def test_vgg16_until_fc1_carries_nothing_else() -> None:
    module = zoo.vgg16()
    before = dict(module.state_dict())
    cut, signature = surgery.until(module, ["fc1"], zoo.VGG16)
    assert signature.outputs["fc1"].shape == ("N", 4096)
    assert not [key for key in cut.state_dict() if key.startswith(("fc2", "predictions"))]
    assert sum(p.numel() for p in cut.parameters()) == 14_714_688 + 102_764_544
    assert len(list(cut.modules())) < len(list(module.modules()))
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].shape == before[key].shape for key in before)
    assert "dropout1" not in dict(cut.named_modules())


@pytest.mark.parametrize(
    ("name", "path", "call", "then"),
    [
        ("stem", "stem", 0, F.relu),
        ("blocks.0.conv1", "blocks.0.conv1", 0, None),
        ("blocks.0.bn1", "blocks.0.bn1", 0, F.relu),
        ("blocks.0.relu", "blocks.0.relu", 0, None),  # the activation names the same point
        ("add", "blocks.0.relu", 1, None),
        ("blocks.0.relu#2", "blocks.0.relu", 1, None),
        ("blocks.0", "blocks.0", 0, None),
        ("blocks", "blocks.1", 0, None),
        ("hidden", "hidden", 0, F.relu),
        ("dropout", "hidden", 0, F.relu),
        ("head", "head", 0, None),
    ],
)
def test_a_name_means_the_output_after_the_activation(name: str, path: str, call: int, then: Any) -> None:
    module = zoo.warmed(zoo.Residual)
    expected = seen(module, zoo.RESIDUAL, zoo.batch(zoo.RESIDUAL))[path][call]
    check(module, zoo.RESIDUAL, name, then(expected) if then else expected)


def test_functions_methods_and_tuples() -> None:
    fire = zoo.warmed(zoo.Fire)
    found = seen(fire, zoo.FIRE, zoo.batch(zoo.FIRE))
    check(fire, zoo.FIRE, "left", F.relu(found["left"][0]))
    check(fire, zoo.FIRE, "right", F.gelu(found["right"][0]))
    check(fire, zoo.FIRE, "act", F.gelu(found["right"][0]))
    check(fire, zoo.FIRE, "cat", torch.cat([F.relu(found["left"][0]), F.gelu(found["right"][0])], 1))
    check(fire, zoo.FIRE, "scores", found["scores"][0].softmax(-1))
    tagger = zoo.warmed(zoo.Tagger)
    found = seen(tagger, zoo.TAGGER, zoo.batch(zoo.TAGGER))
    check(tagger, zoo.TAGGER, "lstm", found["lstm"][0])
    check(tagger, zoo.TAGGER, "down", found["down"][0].tanh())
    own = zoo.warmed(zoo.Own)
    found = seen(own, zoo.OWN, zoo.batch(zoo.OWN))
    check(own, zoo.OWN, "features.0", found["features.0"][0].relu())
    check(own, zoo.OWN, "features", found["features"][0])


def test_a_layer_that_returns_a_tuple_stands_for_its_first_tensor() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[1].squeeze(0)

    module = States().eval()
    signature = zoo.signature({"x": zoo.spec(5, 3)}, out=zoo.spec(4))
    check(module, signature, "rnn", module.rnn(zoo.batch(signature)["x"])[0].detach())
    check(module, signature, "squeeze", module(zoo.batch(signature)["x"]).detach())


def test_several_outputs_in_the_order_asked_for() -> None:
    module = zoo.warmed(zoo.Residual)
    names = ["hidden", "stem", "blocks.0.bn1", "blocks.0.bn2", "add"]
    inputs = zoo.batch(zoo.RESIDUAL)
    cut, signature = surgery.until(module, names, zoo.RESIDUAL)
    out = signature.call(cut, inputs)
    assert list(out) == names == list(signature.outputs)
    for name in names:  # later layers write in place over none of them
        one, one_signature = surgery.until(module, [name], zoo.RESIDUAL)
        assert torch.equal(out[name], one_signature.call(one, inputs)[name]), name


def test_inputs_that_nothing_needs_are_gone() -> None:
    module = zoo.warmed(zoo.Siamese)
    cut, signature = surgery.until(module, ["trunk.0#2", "own"], zoo.SIAMESE)
    assert list(signature.inputs) == ["second"]
    inputs = zoo.batch(zoo.SIAMESE)
    out = signature.call(cut, inputs)
    torch.testing.assert_close(out["trunk.0#2"], module.trunk(inputs["second"]))
    torch.testing.assert_close(out["own"], module.own(inputs["second"]))
    assert "out" not in dict(cut.named_modules())


def test_cutting_leaves_the_original_alone() -> None:
    module = zoo.warmed(zoo.Residual)
    inputs = zoo.batch(zoo.RESIDUAL)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    expected = module(*inputs.values())
    cut, signature = surgery.until(module, ["hidden"], zoo.RESIDUAL)
    longer, _ = surgery.then(cut, signature, nn.Linear(16, 2))
    surgery.set_training(longer, frozenset({"stem"}))
    surgery.replace(module, zoo.RESIDUAL, "head", nn.Linear(16, 9))
    assert torch.equal(module(*inputs.values()), expected)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in module.modules())
    assert module.blocks[0].relu.inplace
    assert cut.stem.weight.data_ptr() == module.stem.weight.data_ptr()


def test_unknown_names_offer_near_ones() -> None:
    with pytest.raises(ModelError, match=r"no layer 'fc22'\. Did you mean 'fc2'"):
        surgery.until(zoo.vgg16(), ["fc22"], zoo.VGG16)
    with pytest.raises(ModelError, match="'image' is an input"):
        surgery.until(zoo.vgg16(), ["image"], zoo.VGG16)
    with pytest.raises(ConfigError, match="Name at least one layer"):
        surgery.until(zoo.vgg16(), [], zoo.VGG16)
    with pytest.raises(ConfigError, match="twice"):
        surgery.until(zoo.vgg16(), ["fc1", "fc1"], zoo.VGG16)


# ------------------------------------------------------------------------------------------- modules that run whole


def test_untraceable_modules_are_cut_at_named_submodules() -> None:
    module = zoo.warmed(zoo.Routed)
    inputs = zoo.batch(zoo.ROUTED)
    found = seen(module, zoo.ROUTED, inputs)
    for name in ("norm", "body.fc", "body", "head"):
        cut = check(module, zoo.ROUTED, name, found[name][0])
        assert "big" not in {key.split(".")[-2] for key in cut.state_dict()}
        assert sum(p.numel() for p in cut.parameters()) < 1000, name
    cut, signature = surgery.until(module, ["body", "norm"], zoo.ROUTED)
    out = signature.call(cut, inputs)
    assert torch.equal(out["norm"], found["norm"][0])
    assert torch.equal(out["body"], found["body"][0])
    again, again_signature = surgery.until(cut, ["norm"], signature)
    assert torch.equal(again_signature.call(again, inputs)["norm"], found["norm"][0])
    assert not [key for key in again.state_dict() if "body" in key]


def test_ways_that_the_trial_did_not_take_are_kept() -> None:
    module = zoo.warmed(zoo.Routed)
    cut, signature = surgery.until(module, ["body"], zoo.ROUTED)
    ways = set()
    for seed in range(8):
        inputs = zoo.batch(zoo.ROUTED, seed=seed)
        found = seen(module, zoo.ROUTED, inputs)
        ways |= {"plus", "minus"} & found.keys()
        assert torch.equal(signature.call(cut, inputs)["body"], found["body"][0])
    assert ways == {"plus", "minus"}


def test_untraceable_parts_of_traceable_modules() -> None:
    module = zoo.warmed(zoo.Outer)
    inputs = zoo.batch(zoo.OUTER)
    found = seen(module, zoo.OUTER, inputs)
    check(module, zoo.OUTER, "before", found["before"][0].relu())
    check(module, zoo.OUTER, "trunk", found["trunk"][0])
    cut = check(module, zoo.OUTER, "trunk.body", found["trunk.body"][0])
    assert not [key for key in cut.state_dict() if "big" in key or "after" in key]
    cut, signature = surgery.until(module, ["trunk.norm", "after", "trunk.head"], zoo.OUTER)
    out = signature.call(cut, inputs)
    for name in out:
        assert torch.equal(out[name], found[name][0]), name
    longer, longer_signature = surgery.then(*surgery.until(cut, ["trunk.head"], signature), nn.Linear(3, 2))
    torch.testing.assert_close(
        longer_signature.call(longer, inputs)["linear_1"], longer.linear_1(found["trunk.head"][0])
    )


def test_layers_after_the_cut_say_so_when_a_batch_reaches_them() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.late = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 100:
                x = self.late(x)
            return self.late(self.second(self.first(x)))

    signature = zoo.signature({"x": zoo.spec(2)}, out=zoo.spec(2))
    cut, _ = surgery.until(Skips(), ["second"], signature)
    cut(torch.zeros(1, 2))
    with pytest.raises(ModelError, match=r"'late' comes after the cut .* control flow depends on the data"):
        cut(torch.full((1, 2), 100.0))


def test_batches_that_pass_a_cut_by() -> None:
    module = zoo.warmed(zoo.Routed)
    cut, _ = surgery.until(module, ["minus"], zoo.ROUTED)
    outcomes = set()
    for seed in range(8):
        inputs = zoo.batch(zoo.ROUTED, seed=seed)
        passes = "minus" in seen(module, zoo.ROUTED, inputs)
        outcomes.add(passes)
        if passes:
            assert cut(*inputs.values()).shape == (3, 8)
        else:
            with pytest.raises(ModelError, match=r"did not pass through 'minus'|'body' comes after the cut"):
                cut(*inputs.values())
    assert outcomes == {True, False}


# ---------------------------------------------------------------------------------------------------------- then


def test_then_names_layers() -> None:
    cut, signature = surgery.until(zoo.vgg16(), ["fc2"], zoo.VGG16)

    def names(layers: Any, name: str | None = None) -> tuple[list[str], list[str]]:
        longer, made = surgery.then(cut, signature, layers, name)
        rows = [row.name for row in surgery.layers(longer, made)]
        return rows[rows.index("fc2") + 1 :], list(made.outputs)

    with torch.device("meta"):
        assert names(nn.Linear(4096, 257)) == (["linear_1"], ["linear_1"])
        assert names(nn.Linear(4096, 257), "scores") == (["scores"], ["scores"])
        several = [nn.Linear(4096, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)]
        assert names(several) == (["linear_1", "dropout_1", "linear_2"], ["linear_2"])
        assert names(nn.Sequential(*several)) == (["linear_1", "dropout_1", "linear_2"], ["linear_2"])
        assert names({"a": several[0], "b": several[3]}) == (["a", "b"], ["b"])
        assert names(nn.Sequential(OrderedDict(a=several[0], b=several[3]))) == (["a", "b"], ["b"])
        assert names([nn.Linear(4096, 3), nn.Softmax(1)]) == (["linear_1"], ["softmax_1"])
        with pytest.raises(ModelError, match="has a layer 'fc1' already"):
            names(nn.Linear(4096, 2), "fc1")
        for bad in ("x y", 'a"; import os', "train", "output", ""):
            with pytest.raises(ConfigError, match="cannot name a layer"):
                names(nn.Linear(4096, 2), bad)
        with pytest.raises(ConfigError, match=r"no nn\.Module"):
            names([nn.Linear(4096, 2), torch.relu])
        with pytest.raises(ConfigError, match="at least one module"):
            names([])


def test_then_never_flattens_silently() -> None:
    cut, signature = surgery.until(zoo.vgg16(), ["block5_pool"], zoo.VGG16)
    with torch.device("meta"):
        head = nn.Linear(25088, 10)
    with pytest.raises(ModelError) as caught:
        surgery.then(cut, signature, head)
    assert str(caught.value) == (
        "layer 'linear_1' (Linear) takes 25,088 numbers, but 'block5_pool' gives (512, 7, 7) for each row. "
        "Put nn.Flatten() in between (25,088 numbers), or nn.AdaptiveAvgPool2d(1) and nn.Flatten() (512 numbers)."
    )
    assert surgery.then(cut, signature, [nn.Flatten(), head])[1].outputs["linear_1"].shape == ("N", 10)
    with pytest.raises(
        ModelError, match=r"'conv2d_1' \(Conv2d\) takes 3 channels, but 'block5_pool' gives \(512, 7, 7\)"
    ):
        surgery.then(cut, signature, nn.Conv2d(3, 4, 1, device="meta"))
    fc, fc_signature = surgery.until(zoo.vgg16(), ["fc1"], zoo.VGG16)
    with pytest.raises(ModelError, match=r"takes 100 numbers, but 'fc1' gives \(4096,\) for each row\.$"):
        surgery.then(fc, fc_signature, nn.Linear(100, 2, device="meta"))


def test_then_takes_modules_of_several_layers() -> None:
    torch.manual_seed(0)
    trunk, signature = surgery.until(zoo.warmed(zoo.Residual), ["blocks"], zoo.RESIDUAL)
    head = nn.Sequential(OrderedDict(block=zoo.Block(8), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    longer, made = surgery.then(trunk, signature, {"head": head})
    assert list(made.outputs) == ["head"]
    inputs = zoo.batch(signature)
    longer.eval()
    torch.testing.assert_close(made.call(longer, inputs)["head"], head.eval()(signature.call(trunk, inputs)["blocks"]))
    names = [row.name for row in surgery.layers(longer, made)]
    inside = ["block.conv1", "block.bn1", "block.conv2", "block.bn2"]
    assert names[-7:] == [f"head.{name}" for name in inside] + ["head_add", "head.pool", "head.flat"]
    check(longer, made, "head", made.call(longer, inputs)["head"].detach())


def test_then_wants_one_output() -> None:
    with pytest.raises(ModelError, match=r"outputs \['scores', 'side'\]; layers can follow one only"):
        surgery.then(zoo.Fire(), zoo.FIRE, nn.Linear(3, 2))


def test_then_follows_the_one_output_that_the_signature_names() -> None:
    fire = zoo.warmed(zoo.Fire)
    inputs = zoo.batch(zoo.FIRE)
    head = nn.Linear(2, 4)
    one = Signature(zoo.FIRE.inputs, {"side": zoo.FIRE.outputs["side"]})
    longer, signature = surgery.then(fire, one, head)
    torch.testing.assert_close(signature.call(longer, inputs)["linear_1"], head(fire(*inputs.values())["side"]))
    assert not [key for key in longer.state_dict() if key.startswith("scores")]

    class InDict(zoo.Routed):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"extra": x, "out": super().forward(x)}

    routed = zoo.warmed(InDict)
    head = nn.Linear(5000, 4)
    longer, signature = surgery.then(routed, zoo.ROUTED, head)
    inputs = zoo.batch(zoo.ROUTED)
    torch.testing.assert_close(signature.call(longer, inputs)["linear_1"], head(routed(*inputs.values())["out"]))
    split = surgery.split_frozen(longer, signature, surgery.frozen_layers(routed))
    assert split is not None
    assert list(split.tail.state_dict()) == ["linear_1.weight", "linear_1.bias"]


def test_what_a_name_means_does_not_change_by_what_follows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(3, 3), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y + self.act(y)

    module = Twice()
    signature = zoo.signature({"x": zoo.spec(3)}, out=zoo.spec(3))
    x = zoo.batch(signature)["x"]
    # `fc` has two readers, so `act` is a layer of its own, and stays one when a cut leaves `fc` with one reader.
    act, act_signature = surgery.until(module, ["act"], signature)
    check(act, act_signature, "fc", module.fc(x).detach())
    fc, fc_signature = surgery.until(module, ["fc"], signature)
    longer, longer_signature = surgery.then(fc, fc_signature, nn.ReLU(inplace=True))
    check(longer, longer_signature, "fc", module.fc(x).detach())
    check(longer, longer_signature, "relu_1", module.fc(x).relu().detach())


# ------------------------------------------------------------------------------------------------------- replace


def test_replace_keeps_names_and_activations() -> None:
    torch.manual_seed(1)
    module = zoo.warmed(zoo.Residual)
    inputs = zoo.batch(zoo.RESIDUAL)
    new = nn.Linear(16, 9)
    changed, signature = surgery.replace(module, zoo.RESIDUAL, "head", new)
    assert signature.outputs["scores"].shape == ("N", 9)
    hidden = F.relu(seen(module, zoo.RESIDUAL, inputs)["hidden"][0])
    torch.testing.assert_close(signature.call(changed, inputs)["scores"], new(hidden))
    stem = nn.Conv2d(3, 8, 1)
    changed, signature = surgery.replace(module, zoo.RESIDUAL, "stem", stem)
    check(changed, signature, "stem", stem(inputs["image"]).relu().detach())
    assert [r.name for r in surgery.layers(changed, signature)] == [r.name for r in surgery.layers(module, signature)]


def test_replace_an_activation_by_its_name() -> None:
    module = zoo.warmed(zoo.Fire)
    inputs = zoo.batch(zoo.FIRE)
    changed, signature = surgery.replace(module, zoo.FIRE, "act", nn.Sigmoid())
    right = seen(module, zoo.FIRE, inputs)["right"][0]
    check(changed, signature, "right", right.sigmoid())
    changed, signature = surgery.replace(module, zoo.FIRE, "act", nn.Dropout())
    check(changed, signature, "right", right)
    check(changed, signature, "act", right)


def test_replace_a_function_and_a_layer_by_several() -> None:
    module = zoo.warmed(zoo.Residual)
    inputs = zoo.batch(zoo.RESIDUAL)
    found = seen(module, zoo.RESIDUAL, inputs)
    bilinear = nn.Sequential(OrderedDict(wide=nn.Linear(16, 7), act=nn.ReLU(), last=nn.Linear(7, 4))).eval()
    changed, signature = surgery.replace(module, zoo.RESIDUAL, "head", bilinear)
    torch.testing.assert_close(signature.call(changed, inputs)["scores"], bilinear(found["hidden"][0].relu()))
    assert [row.name for row in surgery.layers(changed, signature)][-2:] == ["head.wide", "head.last"]
    check(changed, signature, "head", bilinear(found["hidden"][0].relu()).detach())
    twice = nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 16)).eval()
    changed, signature = surgery.replace(module, zoo.RESIDUAL, "hidden", twice)  # the ReLU after it stays behind it
    flat = F.max_pool2d(found["blocks"][0], 2).flatten(1)
    check(changed, signature, "hidden", twice(flat).relu().detach())
    changed, signature = surgery.replace(module, zoo.RESIDUAL, "max_pool2d", nn.AvgPool2d(2))
    check(changed, signature, "max_pool2d", F.avg_pool2d(found["blocks"][0], 2))


def test_replace_refuses_what_it_cannot_do() -> None:
    module = zoo.warmed(zoo.Residual)
    with pytest.raises(ModelError, match=r"'blocks\.0' is a container"):
        surgery.replace(module, zoo.RESIDUAL, "blocks.0", nn.Identity())
    with pytest.raises(ModelError, match=r"layer 'head' \(Linear\) takes 16 numbers, but 'dropout' gives \(3,\)"):
        surgery.replace(module, zoo.RESIDUAL, "hidden", nn.Linear(128, 3))
    with pytest.raises(ModelError, match=r"no layer 'haed'\. Did you mean 'head'"):
        surgery.replace(module, zoo.RESIDUAL, "haed", nn.Linear(1, 1))
    with pytest.raises(ModelError, match="with weights of the code around it"):
        surgery.replace(zoo.warmed(zoo.Own), zoo.OWN, "features.0", nn.Conv2d(3, 4, 1))


def test_replace_shared_and_untraceable() -> None:
    module = zoo.warmed(zoo.Siamese)
    inputs = zoo.batch(zoo.SIAMESE)
    new = nn.Linear(6, 4)
    changed, signature = surgery.replace(module, zoo.SIAMESE, "trunk.0", new)
    out, _ = surgery.until(changed, ["trunk.0", "trunk.0#2"], signature)
    for got, name in zip(out(*inputs.values()), inputs, strict=True):
        torch.testing.assert_close(got, new(inputs[name]).tanh())
    routed = zoo.warmed(zoo.Routed)
    head = nn.Linear(7, 3)
    changed, signature = surgery.replace(routed, zoo.ROUTED, "head", head)
    inputs = zoo.batch(zoo.ROUTED)
    check(changed, signature, "head", head(seen(routed, zoo.ROUTED, inputs)["body"][0]).detach())


# ------------------------------------------------------------------------------------------------ again and again


@pytest.mark.parametrize("name", list(zoo.ALL))
def test_repeated_surgery(name: str) -> None:
    make, signature = zoo.ALL[name]
    module = zoo.warmed(make)
    rows = [row for row in surgery.layers(module, signature) if row.kind != "Input" and row.output_shape]
    inputs = zoo.batch(signature)
    middle, deep = rows[len(rows) // 3], rows[-2 if name not in ("siamese", "fire") else -1]
    direct, direct_signature = surgery.until(module, [middle.name], signature)
    expected = direct_signature.call(direct, inputs)[middle.name]
    cut, cut_signature = surgery.until(module, [deep.name], signature)
    width = int(deep.output_shape[-1])
    longer, longer_signature = surgery.then(cut, cut_signature, [nn.ReLU(), nn.Linear(width, 4)], name="new")
    again, again_signature = surgery.replace(longer, longer_signature, "new", nn.Linear(width, 2))
    split = surgery.split_frozen(again, again_signature, surgery.frozen_layers(cut, None))
    if split is not None:
        again = surgery.join(split.prefix, split.tail, split)
    if middle.name in {row.name for row in surgery.layers(again, again_signature)}:
        back, back_signature = surgery.until(again, [middle.name], again_signature)
        assert torch.equal(back_signature.call(back, inputs)[middle.name], expected)
    out = again_signature.call(again, inputs)["new"]
    assert out.shape[-1] == 2
    assert again_signature.outputs["new"].shape[-1] == 2
