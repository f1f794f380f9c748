"""Checkpoints come back bit for bit, and damaged ones are noticed and passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kindling.errors import FormatError
from kindling.storage import open_place
from kindling.train import checkpoint

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p),
}


def _trained(make: Any, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = make(module.parameters())
    _go_on(module, optimizer, steps)
    return module, optimizer


def _go_on(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"module": dict(module.state_dict()), "optimizer": optimizer.state_dict(), "history": [{"loss": 0.1}]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    place = open_place(str(tmp_path))
    module, optimizer = _trained(OPTIMIZERS[name], 3)
    checkpoint.write_part(place, 3, 0, _state(module, optimizer))
    checkpoint.write_manifest(place, 3, 1, {})
    _go_on(module, optimizer, 4)
    other, other_optimizer = _trained(OPTIMIZERS[name], 0)
    part = checkpoint.read_part(place, 3, 0, 1)
    other.load_state_dict(part.state["module"])
    other_optimizer.load_state_dict(part.state["optimizer"])
    _go_on(other, other_optimizer, 4)
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert part.state["history"] == [{"loss": 0.1}]


def _three(tmp_path: Path) -> Any:
    place = open_place(str(tmp_path))
    for step in (10, 20, 30):
        for rank in range(2):
            checkpoint.write_part(place, step, rank, {"w": torch.full((3,), float(step)), "rank": rank})
        checkpoint.write_manifest(place, step, 2, {})
    return place


@pytest.mark.parametrize("name", ["rank-0001.json", "rank-0001.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    place = _three(tmp_path)
    path = tmp_path / "checkpoints" / f"{30:012d}" / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.unlink()
    if name == "manifest.json" and damage == "remove":
        assert checkpoint.steps_on_disk(place) == [20, 10]
        return
    if name == "manifest.json" and damage == "flip":
        # Which byte was hit decides; whatever is read must not be taken for another checkpoint.
        try:
            part = checkpoint.read_part(place, 30, 1, 2)
        except FormatError:
            return
        assert part.state["w"].tolist() == [30.0] * 3
        return
    with pytest.raises(FormatError):
        checkpoint.read_part(place, 30, 1, 2)
    assert checkpoint.read_part(place, 20, 1, 2).state["w"].tolist() == [20.0] * 3


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="2 workers"):
        checkpoint.read_part(_three(tmp_path), 30, 0, 3)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    place = _three(tmp_path)
    checkpoint.keep_newest(place, 2)
    assert checkpoint.steps_on_disk(place) == [30, 20]
    assert not list((tmp_path / "checkpoints" / f"{10:012d}").glob("*"))


def test_nothing_but_data_is_stored(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    with pytest.raises(FormatError, match="cannot hold a set"):
        checkpoint.write_part(place, 1, 0, {"bad": {1, 2}})
    checkpoint.write_part(place, 2, 0, {"good": [1, 2.5, None, True, "x", (1, 2), {3: torch.ones(2)}]})
    checkpoint.write_manifest(place, 2, 1, {})
    back = checkpoint.read_part(place, 2, 0, 1).state["good"]
    assert back[:5] == [1, 2.5, None, True, "x"]
    assert back[5] == (1, 2)
    assert torch.equal(back[6][3], torch.ones(2))
    json.loads((tmp_path / "checkpoints" / f"{2:012d}" / "manifest.json").read_text())
