"""Parameter averaging (local SGD): workers train alone and average their weights every few steps.

Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Sources: Moritz et al., 2015 (SparkNet), arXiv:1511.06051, algorithm 2; Stich, 2019, arXiv:1805.09767. The means are
weighted by rows as in McMahan et al., 2017, arXiv:1602.05629, algorithm 1. Shared gradients first, averages later:
post-local SGD, Lin et al., 2018, arXiv:1808.07217, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kindling.errors import ConfigError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, average_optimizer, share_gradients
from kindling.train.strategies.comms import Comms


@dataclass(frozen=True, kw_only=True)
class ParameterAveraging(Strategy):
    """Average weights and batch statistics every `every` steps and at the end of each epoch.

    Sends `2 (W - 1) / W` of the weights and statistics (and of the optimizer's tensors, if they are averaged) at each
    averaging; in a step of the warm-up as much of the gradients.

    >>> ParameterAveraging(every=0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: every=0 leaves no step between two averagings. Use 1 or more.
    """

    every: int = 5
    """Optimizer steps between two averagings; 1 averages after every step."""
    average_optimizer_state: bool = False
    """Average the optimizer's tensors (momentum, say) with the weights; otherwise each worker keeps its own."""
    allreduce_steps: int = 0
    """In so many steps at first the workers sum their gradients, as `AllReduce` does; only then they train alone."""

    on_gpu: ClassVar[bool] = True
    replicas_agree: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ConfigError("every", self.every, "leaves no step between two averagings", "Use 1 or more")
        if not isinstance(self.allreduce_steps, int) or self.allreduce_steps < 0:
            raise ConfigError("allreduce_steps", self.allreduce_steps, "is no number of steps", "Use 0 or more")

    def init(self, replica: Replica) -> State:
        return {"together": self.allreduce_steps, "steps": 0, "rows": 0, "all": 0}

    def steps_together(self, state: State) -> bool:
        return bool(state["together"])

    def loss_scale(self, rows_W: np.ndarray, rank: int, state: State) -> float:
        return float(rows_W[rank] / rows_W.sum()) if self.steps_together(state) else 1.0

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        if self.steps_together(state):
            share_gradients(replica, comms)
        return state

    def on_step(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        together = state["together"]
        state = {
            "together": max(0, together - 1),
            "steps": state["steps"] + (not together),
            "rows": state["rows"] + int(rows_W[comms.rank]),
            "all": state["all"] + int(rows_W.sum()),
        }
        if together == 1:
            # From here on the shares of rows weigh weights; so far only the statistics have gone apart.
            return self._shared_statistics(replica, state, comms)
        return self._average(replica, state, comms) if state["steps"] == self.every else state

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        if self.steps_together(state):
            return self._shared_statistics(replica, state, comms)
        return self._average(replica, state, comms)

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        # The replicas were averaged, which ends a round.
        return {"together": states[0]["together"], "steps": 0, "rows": 0, "all": 0}

    def _shared_statistics(self, replica: Replica, state: State, comms: Comms) -> State:
        if state["all"]:
            average_into(replica.statistics(), state["rows"] / state["all"], comms)
        return {"together": state["together"], "steps": 0, "rows": 0, "all": 0}

    def _average(self, replica: Replica, state: State, comms: Comms) -> State:
        if state["all"]:
            share = state["rows"] / state["all"]
            average_into([*replica.parameters(), *replica.statistics()], share, comms)
            if self.average_optimizer_state:
                average_optimizer(replica, share, comms)
        return {"together": 0, "steps": 0, "rows": 0, "all": 0}
