"""Parameter averaging (local SGD): workers train alone and average their weights every few steps.

Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Sources: Moritz et al., 2015 (SparkNet), arXiv:1511.06051, algorithm 2; Stich, 2019, arXiv:1805.09767. The means are
weighted by rows as in McMahan et al., 2017, arXiv:1602.05629, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kindling.errors import ConfigError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, average_optimizer
from kindling.train.strategies.comms import Comms


@dataclass(frozen=True, kw_only=True)
class ParameterAveraging(Strategy):
    """Average weights and batch statistics every `every` steps and at the end of each epoch.

    >>> ParameterAveraging(every=0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: every=0 leaves no step between two averagings. Use 1 or more.
    """

    every: int = 5
    """Optimizer steps between two averagings; 1 averages after every step."""
    average_optimizer_state: bool = False
    """Average the optimizer's tensors (momentum, say) with the weights; otherwise each worker keeps its own."""

    replicas_agree: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ConfigError("every", self.every, "leaves no step between two averagings", "Use 1 or more")

    def init(self, replica: Replica) -> State:
        return {"steps": 0, "rows": 0, "all": 0}

    def on_step(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        state = {
            "steps": state["steps"] + 1,
            "rows": state["rows"] + int(rows_W[comms.rank]),
            "all": state["all"] + int(rows_W.sum()),
        }
        return self._average(replica, state, comms) if state["steps"] == self.every else state

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        return self._average(replica, state, comms)

    def _average(self, replica: Replica, state: State, comms: Comms) -> State:
        if state["all"]:
            share = state["rows"] / state["all"]
            average_into([*replica.parameters(), *replica.statistics()], share, comms)
            if self.average_optimizer_state:
                average_optimizer(replica, share, comms)
        return {"steps": 0, "rows": 0, "all": 0}
