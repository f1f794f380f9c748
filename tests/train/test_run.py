"""What counts as the same run: settings, code, model and data that are told apart, and those that may change."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kindling as kd
from kindling.errors import ConfigError
from kindling.storage import open_place
from kindling.train import run
from kindling.train.run import Run, changes, code_digest, model_digests, refuse, write_call

ASKED: dict[str, Any] = {
    "settings": {"epochs": 4, "batch_size": 16, "seed": 0, "max_steps": None, "max_seconds": 60.0},
    "global_batch": 64,
    "workers": 4,
    "threads": 1,
    "strategy": {"name": "AllReduce"},
    "identity": {"architecture": "a" * 64, "weights": "b" * 64, "code": {"loss": "c" * 64}},
    "key": ["path"],
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
}


def _with(path: str, value: Any) -> dict[str, Any]:
    asked = copy.deepcopy(ASKED)
    *above, last = path.split(".")
    at = asked
    for name in above:
        at = at[name]
    at[last] = value
    return asked


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("settings.seed", 1, "settings.seed: was 0, is 1"),
        ("settings.epochs", 3, "settings.epochs: was 4, is 3"),
        ("settings.max_seconds", 30.0, "settings.max_seconds: was 60.0, is 30.0"),
        ("settings.max_steps", 10, "settings.max_steps: was None, is 10"),
        ("strategy.name", "DiLoCo", "strategy.name: was 'AllReduce', is 'DiLoCo'"),
        ("identity.weights", "d" * 64, "the model's weights before training: was bbbbbbbb..., is dddddddd..."),
        ("identity.architecture", "d" * 64, "the model's architecture: was aaaaaaaa..., is dddddddd..."),
        ("identity.code.loss", "d" * 64, "the code of the loss"),
        ("key", ["id"], r"key: was \['path'\], is \['id'\]"),
    ],
)
def test_what_changed_is_listed(path: str, value: Any, words: str) -> None:
    (found,) = changes(ASKED, _with(path, value))
    with pytest.raises(ConfigError, match=words):
        raise refuse("runs/1", [found])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings.epochs", 40),
        ("settings.max_seconds", None),
        ("settings.max_seconds", 90.0),
        ("workers", 2),
        ("threads", 2),
        ("versions.torch", "2.14.0"),
        ("settings.checkpoints", {"steps": 5}),
    ],
)
def test_what_may_change(path: str, value: Any) -> None:
    assert changes(ASKED, _with(path, value)) == []


def test_the_global_batch_is_what_counts() -> None:
    fewer = {**_with("settings.batch_size", 32), "workers": 2}
    assert changes(ASKED, fewer) == []
    assert changes(ASKED, {**fewer, "global_batch": 128}) == ["settings.batch_size: was 16, is 32"]


def test_code_is_compared_within_one_version_of_python() -> None:
    newer = {**_with("identity.code.loss", "d" * 64), "versions": {"python": "3.13.0"}}
    assert changes(ASKED, newer) == []


def test_calls_are_kept_side_by_side(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    assert Run.find(place) is None
    with pytest.raises(ConfigError, match="holds no run"):
        Run.open(tmp_path)
    for call in range(12):
        write_call(place, {"version": run.VERSION, "settings": {"epochs": call}}, call)
    found = Run.open(tmp_path)
    assert (found.calls, found.asked["settings"], found.result) == (12, {"epochs": 11}, None)
    place.write("result.json", b'{"epochs": []}')
    assert Run.open(tmp_path).result == {"epochs": []}
    write_call(place, {"version": 1}, 12)
    with pytest.raises(ConfigError, match="another version of kindling"):
        Run.open(tmp_path)


def _loss(weight: float) -> Any:
    return lambda x, y: ((x - y) * weight).square().mean()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.2)),
        (partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.1)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))),
        (_loss(1.0), _loss(2.0)),
        (lambda x: x + 1, lambda x: x - 1),
        (lambda x, a=1: x, lambda x, a=2: x),
        (nn.functional.cross_entropy, nn.functional.nll_loss),
        (kd.ParameterAveraging(every=1), kd.ParameterAveraging(every=2)),
    ],
    ids=range(9),
)
def test_code_that_differs_is_told_apart(one: Any, other: Any) -> None:
    assert code_digest(one) == code_digest(copy.deepcopy(one))
    assert code_digest(one) != code_digest(other)


def test_code_that_names_itself_comes_to_an_end() -> None:
    loop: list[Any] = []
    loop.append(loop)

    def again(x: int) -> int:
        return again(x - 1) if x else 0

    assert code_digest(loop)
    assert code_digest(again) == code_digest(again)


PROGRAM = """
from functools import partial
import torch
from torch import nn
import kindling as kd
from kindling.train.run import code_digest, model_digests
torch.manual_seed(0)
class Own(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
def loss(outputs, targets, names=frozenset("abc"), near={"a": 1}):
    return sum(nn.functional.cross_entropy(outputs, targets) for name in {"x", "y", "z"} if name in names)
for module in (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 3), Own())):
    print(model_digests(module, 1))
print(code_digest(loss), code_digest(partial(torch.optim.SGD, lr=0.1)), code_digest(nn.CrossEntropyLoss()))
"""


@pytest.mark.slow
def test_digests_are_the_same_in_every_process() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_models_are_told_apart_by_architecture_and_by_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    other = copy.deepcopy(net)
    assert model_digests(net, 1) == model_digests(other, 1)
    with torch.no_grad():
        other[0].bias[1] += 1
    assert model_digests(net, 1)["architecture"] == model_digests(other, 1)["architecture"]
    assert model_digests(net, 1)["weights"] != model_digests(other, 1)["weights"]
    tanh = nn.Sequential(net[0], nn.Tanh())
    assert model_digests(net, 1)["architecture"] != model_digests(tanh, 1)["architecture"]
    assert model_digests(net, 1)["weights"] == model_digests(tanh, 1)["weights"]


def test_very_many_changes_are_cut() -> None:
    found = changes({}, {f"a{i:02}": i for i in range(30)})
    assert run.said(found).endswith("a11: was None, is 11; and 18 more")
