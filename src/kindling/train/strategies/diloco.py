"""DiLoCo: workers train alone for many steps; the mean of their changes is a gradient for an outer optimizer.

The outer optimizer is SGD with Nesterov momentum, the inner one is the user's and stays with its worker. The parameters
can travel in fragments at staggered steps, each arriving some steps after it left, while training goes on.
Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Sources: Douillard et al., 2023, arXiv:2311.08105, algorithm 1; fragments, delay and mixing: Douillard et al., 2025,
arXiv:2501.18512, algorithm 2. The means are weighted by rows as in McMahan et al., 2017, arXiv:1602.05629, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kindling.errors import ConfigError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, evenly
from kindling.train.strategies.comms import Comms, Pending


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Strategy):
    """Every `every` steps, and at an epoch's end, an outer step on the workers' mean change.

    Sends `2 (W - 1) / W` of the parameters' bytes every `every` steps, of a fragment at a time; of the batch statistics
    at the end of each epoch. Keeps two more copies of the parameters: where the last outer step left them, and the
    outer momentum. With one worker this is still not plain training: the outer optimizer acts on its change too.

    >>> DiLoCo(every=4, delay=4)
    Traceback (most recent call last):
    kindling.errors.ConfigError: delay=4 would let a fragment leave before it has come back. Use less than every=4.
    """

    every: int = 50
    """Optimizer steps between two outer steps of a parameter."""
    outer_lr: float = 0.7
    """Learning rate of the outer SGD; 1 with no momentum is plain averaging."""
    outer_momentum: float = 0.9
    """Nesterov momentum of the outer SGD."""
    fragments: int = 1
    """Parts in which the parameters travel, at steps spread evenly over a round: so much smaller are the bursts."""
    delay: int = 0
    """Steps after which a fragment's sum is waited for; training goes on meanwhile."""
    mixing: float = 0.5
    """With a delay: how much of its own parameters a worker keeps when the fragment arrives."""

    on_gpu: ClassVar[bool] = True
    replicas_agree: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("fragments", 1), ("delay", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(name, value, "is no such number", f"Use a whole number, {least} or more")
        if self.delay >= self.every:
            raise ConfigError(
                "delay",
                self.delay,
                "would let a fragment leave before it has come back",
                f"Use less than every={self.every}",
            )
        if self.fragments > self.every:
            raise ConfigError(
                "fragments", self.fragments, "are more than there are steps in a round", f"Use {self.every} or fewer"
            )
        if not self.outer_lr > 0:
            raise ConfigError("outer_lr", self.outer_lr, "moves nothing", "Use a positive number, such as 0.7")
        if not 0 <= self.outer_momentum < 1:
            raise ConfigError("outer_momentum", self.outer_momentum, "never settles", "Use 0 or more, and less than 1")
        if not 0 <= self.mixing < 1:
            raise ConfigError("mixing", self.mixing, "keeps the workers apart", "Use 0 or more, and less than 1")

    def init(self, replica: Replica) -> State:
        parameters = replica.parameters()
        return {
            "step": 0,
            "rows": [0] * self.fragments,
            "all": [0] * self.fragments,
            "epoch_rows": 0,
            "epoch_all": 0,
            "anchor": [p.detach().clone() for p in parameters],
            "momentum": [p.detach().clone().zero_() for p in parameters],
            "flying": [],
        }

    def begin(self, replica: Replica, state: State, comms: Comms) -> State:
        replica.aside["sums"] = {}
        return state

    def close(self, replica: Replica) -> None:
        replica.aside.pop("sums", None)

    def share(self, state: State, comms: Comms) -> float:
        return state["epoch_rows"] / state["epoch_all"] if state["epoch_all"] else 1 / comms.world

    def on_step(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        rows, all_rows = int(rows_W[comms.rank]), int(rows_W.sum())
        state = {
            **state,
            "step": state["step"] + 1,
            "rows": [count + rows for count in state["rows"]],
            "all": [count + all_rows for count in state["all"]],
            "epoch_rows": state["epoch_rows"] + rows,
            "epoch_all": state["epoch_all"] + all_rows,
        }
        while state["flying"] and state["flying"][0]["due"] <= state["step"]:
            state = self._land(replica, state, self.mixing)
        for fragment in range(self.fragments):
            if (state["step"] - (fragment + 1) * self.every // self.fragments) % self.every == 0:
                state = self._leave(replica, state, fragment, comms)
                if not self.delay:
                    state = self._land(replica, state, 0.0)
        return state

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        """End the round: what is in flight lands, then what was learned since takes an outer step as well."""
        while state["flying"]:
            state = self._land(replica, state, self.mixing)
        for fragment in range(self.fragments):
            if state["all"][fragment]:
                state = self._leave(replica, state, fragment, comms)
        while state["flying"]:
            state = self._land(replica, state, 0.0)
        if self.delay:  # a fragment that landed in the last step was mixed with each worker's own
            for fragment in range(self.fragments):
                for here, anchor in zip(
                    _part(replica.parameters(), fragment, self.fragments),
                    _part(state["anchor"], fragment, self.fragments),
                    strict=True,
                ):
                    here.copy_(anchor)
        if state["epoch_all"]:
            average_into(replica.statistics(), state["epoch_rows"] / state["epoch_all"], comms)
        return {**state, "step": 0, "epoch_rows": 0, "epoch_all": 0}

    def settle(self, replica: Replica, state: State, comms: Comms) -> State:
        # The sums stay in flight for the algorithm: they are at rest in the state until their step comes.
        sums: dict[int, Pending] = replica.aside.get("sums", {})
        while sums:
            sums.popitem()[1].wait()
        return state

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        first = states[0]
        spread = [evenly(count, rank, world) for count in first["all"]]
        return {**first, "rows": spread, "epoch_rows": evenly(first["epoch_all"], rank, world)}

    def _leave(self, replica: Replica, state: State, fragment: int, comms: Comms) -> State:
        """Send one fragment's change since its last outer step."""
        change = [
            anchor - here
            for anchor, here in zip(
                _part(state["anchor"], fragment, self.fragments),
                _part(replica.parameters(), fragment, self.fragments),
                strict=True,
            )
        ]
        share = state["rows"][fragment] / state["all"][fragment]
        replica.aside["sums"][fragment] = comms.start_sum(change, share)
        flight: dict[str, Any] = {"fragment": fragment, "due": state["step"] + self.delay, "change": change}
        return {
            **state,
            "rows": [0 if f == fragment else count for f, count in enumerate(state["rows"])],
            "all": [0 if f == fragment else count for f, count in enumerate(state["all"])],
            "flying": [*state["flying"], flight],
        }

    def _land(self, replica: Replica, state: State, keep: float) -> State:
        """Take the outer step of the fragment that left first; `keep` is the share of its own that a worker keeps."""
        flight, *others = state["flying"]
        fragment = flight["fragment"]
        if pending := replica.aside["sums"].pop(fragment, None):
            pending.wait()
        parts = (
            _part(tensors, fragment, self.fragments)
            for tensors in (replica.parameters(), state["anchor"], state["momentum"])
        )
        for here, anchor, momentum, change in zip(*parts, flight["change"], strict=True):
            momentum.mul_(self.outer_momentum).add_(change)
            anchor.sub_(change.add(momentum, alpha=self.outer_momentum), alpha=self.outer_lr)
            if keep:
                here.lerp_(anchor, 1 - keep)
            else:
                here.copy_(anchor)
        return {**state, "flying": others}


def _part(tensors: Sequence[Tensor], fragment: int, fragments: int) -> list[Tensor]:
    """Views of one of `fragments` equal parts of all elements, in order: each element is in one of them.

    >>> [[part.tolist() for part in _part([Tensor([1, 2, 3]), Tensor([4, 5])], f, 2)] for f in range(2)]
    [[[1.0, 2.0]], [[3.0], [4.0, 5.0]]]
    """
    total = sum(tensor.numel() for tensor in tensors)
    start, stop = total * fragment // fragments, total * (fragment + 1) // fragments
    found: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        piece = flat[max(start, 0) : max(stop, 0)]
        if len(piece):
            found.append(piece)
        start, stop = start - len(flat), stop - len(flat)
    return found
