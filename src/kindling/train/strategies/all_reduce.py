"""All-reduce: synchronous data parallel SGD; every step uses the mean gradient over the whole global batch.

Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Source: Goyal et al., 2017, arXiv:1706.02677, section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kindling.train.strategies.base import Replica, State, Strategy, average_into
from kindling.train.strategies.comms import Comms


@dataclass(frozen=True, kw_only=True)
class AllReduce(Strategy):
    """Sum gradients over the workers in every step. Rows count equally, however unevenly they are spread.

    >>> AllReduce().loss_scale(np.array([30, 10]), rank=0)
    0.75
    """

    replicas_agree: ClassVar[bool] = True

    def loss_scale(self, rows_W: np.ndarray, rank: int) -> float:
        return float(rows_W[rank] / rows_W.sum())

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        if comms.world == 1:
            return state
        parameters = replica.parameters()
        for parameter in parameters:
            if parameter.grad is None:  # no rows here, or a branch not taken here: the others may have it
                parameter.grad = torch.zeros_like(parameter)
        comms.sum_all([p.grad for p in parameters if p.grad is not None])
        return {
            **state,
            "rows": state.get("rows", 0) + int(rows_W[comms.rank]),
            "all": state.get("all", 0) + int(rows_W.sum()),
        }

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        # Gradients were shared, batch statistics were not: each worker saw its own rows.
        if state.get("all"):
            average_into(replica.statistics(), state["rows"] / state["all"], comms)
        return {**state, "rows": 0, "all": 0}
