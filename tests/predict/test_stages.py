"""Two stages: the same numbers as in one, in less memory; and every net that must not be cut left whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kindling as kd
from kindling.predict import stages
from kindling.predict.engine import Engine, inference_copy, net_batch
from kindling.predict.stages import TwoStages, in_stages
from kindling.prepare import ImageStep, Preparation
from kindling.signature import Signature, TensorSpec

SIGNATURE = Signature({"image": TensorSpec(("N", 3, 32, 32))}, {"y": TensorSpec(("N", 5))})


class Branching(nn.Module):
    """A shortcut over the first pool, a tensor of its own that serves on both sides, and writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.MaxPool2d(4)
        self.out = nn.Linear(16 * 64, 5)
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x) + self.shift
        both = self.pool(first + torch.relu(self.conv2(first)))
        both.mul_(2.0)
        return self.out(torch.flatten(both, 1)) - self.shift


class MixesRows(nn.Module):
    """Not a net for batches: its wide layer knows how many rows there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).view(16, 16, 1024).mean(2))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "BATCH_NUMBERS", 1 << 17)
    monkeypatch.setattr(stages, "STAGE_NUMBERS", 1 << 16)


def staged(module: nn.Module, rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    traced = torch.fx.symbolic_trace(module)
    whole = inference_copy(traced, dtype)
    return whole, in_stages(whole, SIGNATURE, rows, ghost=lambda: inference_copy(traced, dtype).to("meta"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_numbers(layout: torch.memory_format) -> None:
    whole, two = staged(Branching())
    assert isinstance(two, TwoStages)
    assert two.rows == 4  # 16 channels of 32 x 32 for each row
    x = torch.randn(16, 3, 32, 32).to(memory_format=layout)
    seen: list[torch.Size] = []
    two.front.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    with torch.inference_mode():
        torch.testing.assert_close(two(x), whole(x))
    assert seen == [(4, 16, 8, 8)] * 4
    shared = {p.data_ptr() for p in whole.parameters()}
    assert {p.data_ptr() for p in two.parameters()} == shared


def test_rows_divide_the_batch() -> None:
    _, two = staged(Branching(), rows=10)
    assert isinstance(two, TwoStages)
    assert two.rows == 2


def test_what_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Branching()
    assert not isinstance(staged(net, rows=1)[1], TwoStages)
    assert not isinstance(staged(net, rows=8)[1], TwoStages)  # small enough as it is
    monkeypatch.setattr(stages, "STAGE_NUMBERS", 1 << 5)
    assert not isinstance(staged(net)[1], TwoStages)  # no place is narrow enough


def test_a_net_that_counts_its_rows_stays_whole() -> None:
    whole, two = staged(MixesRows())
    assert two is whole


def test_weights_that_came_in_bf16_run_in_stages_too() -> None:
    """As they do on workers."""
    traced = torch.fx.symbolic_trace(Branching()).to(torch.bfloat16)
    preparation = Preparation((ImageStep("image", size=(32, 32)),))
    engine = Engine(traced, SIGNATURE, preparation, precision="bf16", batch_size=16)
    assert isinstance(engine.module, TwoStages)
    assert engine.run({"image": np.zeros((3, 32, 32, 3), np.uint8)})["y"].shape == (3, 5)


def test_photos_come_in_batches_that_are_worth_reading_the_weights_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    vgg16 = kd.load("vgg16").until("fc2")
    assert net_batch(vgg16.signature, vgg16.module) == 16
    ghost = inference_copy(vgg16.module, torch.float32).to("meta")
    two = in_stages(vgg16.module, vgg16.signature, 16, ghost=lambda: ghost)
    assert isinstance(two, TwoStages)
    assert two.rows == 2
