"""Recognition by names and shapes: what decides, and what the refusal says. Whole nets are in tests/nets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kindling.errors import FormatError
from kindling.formats import Layout, Stored, load, recognise
from kindling.formats.weights import into


def tiny(classes: int | None, bias: bool = True) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(2, 3, 2, bias=bias))
    net.add_module("bn", nn.BatchNorm2d(3))
    net.add_module("flatten", nn.Flatten())
    if classes is not None:
        net.add_module("fc", nn.Linear(3 * 4, classes))
    return net


PLAIN = Layout(
    name="plain", about="", build=tiny, layers={"conv": "c", "bn": "n", "fc": "f"}, head="fc", image={"size": (3, 3)}
)
KERAS = replace(PLAIN, name="keras", keras=True, flattened={"fc": "conv"})


def stored(**tensors: torch.Tensor) -> dict[str, Stored]:
    return {n: Stored(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.clone) for n, t in tensors.items()}


def file(classes: int = 5) -> dict[str, torch.Tensor]:
    return {
        "c.weight": torch.randn(3, 2, 2, 2),
        "c.bias": torch.randn(3),
        "n.weight": torch.rand(3),
        "n.bias": torch.randn(3),
        "n.running_mean": torch.randn(3),
        "n.running_var": torch.rand(3) + 0.5,
        "f.weight": torch.randn(classes, 12),
        "f.bias": torch.randn(classes),
    }


def test_the_file_decides_the_number_of_classes() -> None:
    tensors = stored(**file(classes=7))
    match = recognise("w", "tiny", [PLAIN], tensors)
    assert match.classes == 7
    module = load(match, tensors, "w")
    assert module.fc.out_features == 7
    assert not any(value.is_meta for value in module.state_dict().values())
    assert not module.training


def test_batch_norms_counter_is_optional_in_a_file() -> None:
    without = file()
    counted = {**without, "n.num_batches_tracked": torch.tensor(11)}
    for tensors in (stored(**without), stored(**counted)):
        module = load(recognise("w", "tiny", [PLAIN], tensors), tensors, "w")
        assert int(module.bn.num_batches_tracked) == 0
        assert torch.equal(module.bn.running_mean, without["n.running_mean"])


def test_of_two_that_fit_the_one_with_a_fixed_number_of_classes_wins() -> None:
    fixed = replace(PLAIN, name="fixed", classes=5)
    assert recognise("w", "tiny", [PLAIN, fixed], stored(**file(5))).layout.name == "fixed"
    assert recognise("w", "tiny", [PLAIN, fixed], stored(**file(6))).layout.name == "plain"
    other = replace(PLAIN, name="other")
    with pytest.raises(FormatError, match="fits the layouts 'plain' and 'other' of tiny"):
        recognise("w", "tiny", [PLAIN, other], stored(**file()))


def test_the_refusal_shows_the_nearest_layout_and_the_first_layers_only() -> None:
    far = replace(PLAIN, name="far", layers={"conv": "x", "bn": "y", "fc": "z"})
    tensors = file()
    tensors["n.running_var"] = torch.rand(4)
    del tensors["c.bias"]
    with pytest.raises(FormatError) as caught:
        recognise("weights.pth", "tiny", [far, PLAIN], stored(**tensors))
    assert str(caught.value) == (
        "weights.pth does not hold the weights of tiny: 6 of 8 tensors fit its layout 'plain'. "
        "Layers that differ: conv needs 'c.bias' (3,), which the file lacks; "
        "bn needs 'n.running_var' (3,), which is (4,) in the file. "
        "tiny takes these layouts: far, plain."
    )


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(FormatError, match="0 of 8 tensors fit"):
        recognise("w", "tiny", [PLAIN], {})


def test_a_head_of_absurd_size_builds_nothing_absurd() -> None:
    tensors = stored(**file())
    tensors["f.weight"] = Stored((1 << 50, 12), "float32", lambda: torch.empty(0))
    with pytest.raises(FormatError, match="fc needs"):
        recognise("w", "tiny", [PLAIN], tensors)


def test_kerass_flattening_runs_over_channels_last() -> None:
    kernel = torch.randn(2, 2, 2, 3)
    dense = torch.randn(2, 2, 3, 5)  # height, width, channel, class
    tensors = stored(
        **{
            "c/kernel": kernel,
            "c/bias": torch.randn(3),
            "n/gamma": torch.ones(3),
            "n/beta": torch.zeros(3),
            "n/moving_mean": torch.zeros(3),
            "n/moving_variance": torch.ones(3),
            "f/kernel": dense.reshape(12, 5),
            "f/bias": torch.zeros(5),
        }
    )
    module = load(recognise("w", "tiny", [KERAS], tensors), tensors, "w")
    assert module.conv.weight[2, 1, 0, 1] == kernel[0, 1, 1, 2]
    assert module.fc.weight[4, 2 * 4 + 1 * 2 + 0] == dense[1, 0, 2, 4]  # torch: channel, height, width


def test_large_finite_numbers_are_taken_and_infinite_ones_refused() -> None:
    module, large = nn.Linear(4, 1, bias=False), torch.full((1, 4), 3e38)  # whose sum is infinite
    made = into(module, {"weight": Stored((1, 4), "float32", lambda: large)}, "w.pth")
    assert torch.equal(made.weight, large)  # type: ignore[arg-type]
    for bad in (float("inf"), float("nan")):
        broken = torch.tensor([[0.0, 1.0, bad, 2.0]])
        with pytest.raises(FormatError, match="not finite"):
            into(module, {"weight": Stored((1, 4), "float32", lambda broken=broken: broken)}, "w.pth")


def test_tied_weights_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    value = torch.arange(4.0).reshape(2, 2)
    made = into(module, {f"{n}.weight": Stored((2, 2), "float32", lambda: value) for n in (0, 1)}, "w.pth")
    assert made[0].weight is made[1].weight  # type: ignore[index]
    assert torch.equal(made[0].weight, value)  # type: ignore[index]


def test_what_is_never_saved_is_kept() -> None:
    module = nn.Linear(2, 1, bias=False)
    module.register_buffer("grid", torch.tensor([7.0, 8.0]), persistent=False)
    made = into(module, {"weight": Stored((1, 2), "float32", lambda: torch.ones(1, 2))}, "w.pth")
    assert torch.equal(made.grid, torch.tensor([7.0, 8.0]))  # type: ignore[arg-type]
    assert made.grid is not module.grid
    half = into(module.half(), {"weight": Stored((1, 2), "float32", lambda: torch.ones(1, 2))}, "w.pth")
    assert half.weight.dtype == torch.float16


def test_a_read_that_fails_names_the_file() -> None:
    tensors = file()
    tensors["c.bias"][1] = float("inf")
    kept = stored(**tensors)
    with pytest.raises(FormatError, match=r"weights.pth: 'c.bias' holds numbers that are not finite"):
        load(recognise("weights.pth", "tiny", [PLAIN], kept), kept, "weights.pth")
