"""All-reduce: synchronous data parallel SGD; every step uses the mean gradient over the whole global batch.

Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Source: Goyal et al., 2017, arXiv:1706.02677, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kindling.train.strategies.base import Replica, State, Strategy, average_into, share_gradients
from kindling.train.strategies.comms import Comms


@dataclass(frozen=True, kw_only=True)
class AllReduce(Strategy):
    """Sum gradients over the workers in every step. Rows count equally, however unevenly they are spread.

    >>> AllReduce().loss_scale(np.array([30, 10]), rank=0, state={})
    0.75
    """

    replicas_agree: ClassVar[bool] = True

    @property
    def elastic(self) -> bool:
        return True

    def loss_scale(self, rows_W: np.ndarray, rank: int, state: State) -> float:
        return float(rows_W[rank] / rows_W.sum())

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        if comms.world == 1:
            return state
        share_gradients(replica, comms)
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

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        # Replicas that were averaged have the same statistics: anybody's rows may stand for all of them.
        seen = sum(state.get("rows", 0) for state in states)
        return {**states[0], "rows": seen if rank == 0 else 0, "all": seen}
