"""Checkpoints come back bit for bit, hold everything once, and damaged ones are noticed and passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kindling.errors import FormatError
from kindling.storage import Place, open_place
from kindling.train import checkpoint
from kindling.train.checkpoint import Part

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


def write(place: Place, step: int, states: list[dict[str, Any]], **about: Any) -> None:
    """A whole checkpoint in which every worker stores all that it has."""
    parts = []
    for rank, state in enumerate(states):
        record, tensors = checkpoint.split_state(state)
        name = f"{rank}.safetensors"
        checkpoint.write_tensors(place, step, name, {k: t.clone() for k, t in tensors.items()})
        parts.append(Part(record, {k: checkpoint.tensor_digest(t) for k, t in tensors.items()}, name))
    checkpoint.write_manifest(place, step, parts, about)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    place = open_place(str(tmp_path))
    module, optimizer = _trained(OPTIMIZERS[name], 3)
    state = {"module": dict(module.state_dict()), "optimizer": optimizer.state_dict(), "history": [{"loss": 0.1}]}
    write(place, 3, [state], epoch=1)
    _go_on(module, optimizer, 4)
    other, other_optimizer = _trained(OPTIMIZERS[name], 0)
    found = checkpoint.read(place, 3)
    other.load_state_dict(found.states[0]["module"])
    other_optimizer.load_state_dict(found.states[0]["optimizer"])
    _go_on(other, other_optimizer, 4)
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert found.states[0]["history"] == [{"loss": 0.1}]
    assert (found.step, found.world, found.manifest["epoch"]) == (3, 1, 1)


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [torch.ones(2), torch.zeros(0, 3), torch.tensor(7), torch.tensor([True]), torch.ones(2).bfloat16()]
    ),
)
_KEYS = st.one_of(st.text(max_size=3), st.integers(0, 3))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(_KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or one != one)  # or a NaN


@pytest.mark.fuzz
@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text(max_size=3), _VALUES, max_size=4))
def test_any_state_comes_back(state: dict[str, Any]) -> None:
    record, tensors = checkpoint.split_state(state)
    back = {key: checkpoint.decode(value, tensors) for key, value in json.loads(json.dumps(record)).items()}
    assert _same(state, back)


def _three(tmp_path: Path) -> Place:
    place = open_place(str(tmp_path))
    for step in (10, 20, 30):
        write(place, step, [{"w": torch.full((3,), float(step)), "rank": rank} for rank in range(2)])
    return place


@pytest.mark.parametrize("name", ["0.safetensors", "1.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "first", "empty", "remove"])
def test_a_damaged_file_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    place = _three(tmp_path)
    path = tmp_path / "checkpoints" / f"{30:012d}" / name
    data = bytearray(path.read_bytes())
    at = len(data) - 5 if name.endswith("safetensors") else len(data) // 2
    if damage == "remove":
        path.unlink()
    else:
        data[at] ^= 0x10
        data[0] ^= damage == "first"
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(damage, bytes(data)))
    if name == "manifest.json" and damage == "remove":
        assert checkpoint.steps_on_disk(place) == [20, 10]
    with pytest.raises(FormatError, match=r"checkpoint 30 cannot be read|not the file that was written"):
        checkpoint.read(place, 30)
    assert checkpoint.read(place, 20).states[1]["w"].tolist() == [20.0] * 3


def test_every_single_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    write(place, 1, [{"w": torch.ones(2)}])
    path = tmp_path / checkpoint.folder(1) / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :])
        with pytest.raises(FormatError):
            checkpoint.read(place, 1)


def test_a_worker_that_was_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="of 2 workers"):
        checkpoint.read(_three(tmp_path), 30, [2])


def test_what_is_not_kept_is_removed_and_so_are_older_halves(tmp_path: Path) -> None:
    place = _three(tmp_path)
    for step in (15, 40):  # nobody declared them whole
        checkpoint.write_tensors(place, step, "0.safetensors", {"w": torch.ones(3)})
    checkpoint.keep_only(place, {10, 30}, newest=30)
    assert checkpoint.steps_on_disk(place) == [30, 10]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"{step:012d}" for step in (10, 30, 40)]  # another may be at work on the 40th


def test_nothing_but_data_is_stored() -> None:
    with pytest.raises(FormatError, match="cannot hold a set"):
        checkpoint.split_state({"bad": {1, 2}})
    with pytest.raises(FormatError, match="cannot hold a tensor of layout"):
        checkpoint.split_state({"bad": torch.eye(2).to_sparse()})
