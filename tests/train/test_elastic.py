"""The states of W workers for another number: means by rows, sums kept, nothing lost or doubled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kindling as kd
from kindling.train.elastic import blend, caveat, regroup


def _state(value: float, rows: int, loss: float) -> dict[str, Any]:
    optimizer = {"momentum": torch.tensor([value, 0.0]), "step": torch.tensor(value)}
    return {
        "module": {"w": torch.tensor([value, 1.0]), "batches": torch.tensor(int(value))},
        "optimizer": {"state": {0: optimizer} if rows else {}},
        "schedule": None,
        "average": [torch.tensor([value])],
        "best": None,
        "strategy": {"together": 0, "steps": 2, "rows": rows, "all": 8},
        "progress": {
            "epoch": 3,
            "index": 7,
            "sums": [[loss, float(rows)]] if rows else [],
            "watch": (0.5, 1),
            "history": [{"loss": 1.0}],
        },
    }


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_weights_are_averaged_by_rows_and_sums_are_kept(world: int) -> None:
    states = [_state(0.0, 2, 1.5), _state(4.0, 6, 2.5), _state(100.0, 0, 0.0)]
    before = copy.deepcopy(states)
    new = [regroup(states, kd.ParameterAveraging(), rank, world) for rank in range(world)]
    for state in new:
        assert state["module"]["w"].tolist() == [3.0, 1.0]
        assert state["module"]["batches"].item() == 100
        momentum = state["optimizer"]["state"][0]
        assert momentum["momentum"].tolist() == [3.0, 0.0]
        assert momentum["step"].item() == 4.0
        assert state["average"][0].tolist() == [3.0]
        assert (state["progress"]["epoch"], state["progress"]["index"]) == (3, 7)
        assert state["strategy"] == {"together": 0, "steps": 0, "rows": 0, "all": 0}
    booked = [state["progress"]["sums"] for state in new]
    assert booked == [[[4.0, 8.0]]] + [[]] * (world - 1)
    assert str(states) == str(before)


def test_what_is_the_same_everywhere_keeps_its_bits() -> None:
    value = torch.rand(50)
    assert blend([{"w": value}, {"w": value.clone()}], [1 / 3, 2 / 3])["w"] is value


def test_a_worker_without_rows_does_not_spoil_the_mean() -> None:
    mean = blend([torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 3.0])], [1.0, 0.0])
    assert mean.tolist() == [1.0, 2.0]


def test_it_is_said_what_will_differ() -> None:
    allreduce, averaging = kd.AllReduce(), kd.ParameterAveraging()
    assert caveat(averaging, statistics=True, before=4, now=4) == ""
    assert caveat(allreduce, statistics=False, before=4, now=2) == ""
    assert "batch statistics" in caveat(allreduce, statistics=True, before=4, now=2)
    assert "ParameterAveraging with 2 workers is another algorithm than with 4" in caveat(
        averaging, statistics=False, before=4, now=2
    )
