"""Every strategy through the training loop: rows exactly once an epoch, and a continued run like an unbroken one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategy_cases import CASES, REPEATABLE, Case
from torch import nn
from train_loops import clouds, net, same, train

ROWS = 101  # a prime: no batch is full everywhere, and workers have unequal shards


class Witness(nn.Module):
    """A net that notes which rows it was trained on, by their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += x[:, 0].tolist()
        return self.body(x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_are_seen_exactly_once_an_epoch_and_all_agree_at_its_end(case: Case) -> None:
    columns = clouds(ROWS)
    columns["x"][:, 0] = np.arange(ROWS) / ROWS
    found = train(columns, world=3, module=Witness(), strategy=case.make(), epochs=2, validation=clouds(30, seed=1))
    seen = sorted(row for one in found for row in one.module.seen)
    assert seen == sorted(np.repeat(columns["x"][:, 0], 2).tolist())
    first = found[0]
    for one in found:
        assert same(one.state(), first.state())
        for mine, theirs in zip(one.history, first.history, strict=True):
            assert mine["loss"] == theirs["loss"]
            assert mine["validation"] == theirs["validation"]
            assert mine.get("strategy") == theirs.get("strategy")
            assert mine["rows"] == ROWS


@pytest.mark.parametrize("case", REPEATABLE.values(), ids=REPEATABLE.keys())
def test_continued_after_an_epoch_it_is_the_unbroken_run(case: Case) -> None:
    columns = clouds(ROWS)
    options = {"world": 2, "strategy": case.make(), "epochs": 3}
    unbroken = train(columns, **options)
    step = min(unbroken[0].notes.states)
    continued = train(columns, restored=[one.notes.states[step] for one in unbroken], **options)
    for one, other in zip(unbroken, continued, strict=True):
        assert same(one.state(), other.state())


@pytest.mark.parametrize("name", ["downpour", "threshold"])
def test_a_strategy_s_own_figures_are_in_the_history(name: str) -> None:
    for record in train(clouds(ROWS), world=2, strategy=CASES[name].make())[0].history:
        figures = record["strategy"]
        if name == "downpour":
            assert figures["pushes"] > 0
            assert 0 <= figures["staleness_mean"] <= figures["staleness_max"]
        else:
            assert 0 < figures["density"] < 1
            assert figures["threshold"] > 0
