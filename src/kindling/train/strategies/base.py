"""What every strategy is: settings plus hooks over a visible state.

The training loop (`train/loop.py`) calls the hooks; `Comms` moves the tensors. A hook gets the replica it may change,
the strategy's own state (tensors and JSON values, so that it checkpoints as data) and returns the new state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kindling.train.strategies.comms import Comms
from kindling.train.strategies.parameter_groups import wants_names

State = dict[str, Any]
"""A strategy's memory between steps: tensors and JSON values."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker's copy of what is trained."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    aside: dict[str, Any] = field(default_factory=dict)
    """What a strategy at work keeps beside its state: requests in flight, threads. Never saved."""

    @classmethod
    def of(cls, module: nn.Module, make_optimizer: Callable[[list[Any]], torch.optim.Optimizer]) -> Replica:
        """A module with an optimizer of its trainable parameters, which takes its fused step where torch has one.

        A factory whose first argument is called `named_parameters` gets (name, parameter) pairs.

        A fused step reads and writes the weights once: for a large linear layer half the time of a step. Its sums
        differ from the unfused step's in the last bit; `fused=False` or `foreach=True` in the optimizer keeps those.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        optimizer = make_optimizer(named if wants_names(make_optimizer) else [p for _, p in named])
        sparse = any(getattr(layer, "sparse", False) for layer in module.modules())  # refused by fused steps
        for group in optimizer.param_groups:
            unasked = "fused" in group and group["fused"] is None and not group.get("foreach")
            whole = all(p.is_floating_point() for p in group["params"])
            if unasked and whole and not sparse and not group.get("differentiable"):
                group["fused"] = True
        return cls(module, optimizer)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the module's order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def statistics(self) -> list[Tensor]:
        """Floating-point buffers that training changes: batch statistics of layers in training mode."""
        found: list[Tensor] = []
        for module in self.module.modules():
            if module.training:
                found += [b for b in module.buffers(recurse=False) if b.is_floating_point()]
        return found

    def optimizer_tensors(self) -> list[Tensor]:
        """Floating-point tensors of the optimizer's state that have a parameter's shape, in the parameters' order."""
        return [
            value
            for parameter in self.parameters()
            for _, value in sorted(self.optimizer.state.get(parameter, {}).items())
            if _like(value, parameter)
        ]

    def optimizer_layout(self) -> list[dict[str, float | None]]:
        """For each parameter, what its optimizer state holds: None for a tensor of its shape, else a number."""
        return [
            {
                name: None if _like(value, parameter) else float(value)
                for name, value in sorted(self.optimizer.state.get(parameter, {}).items())
                if _like(value, parameter)
                or (isinstance(value, Tensor | int | float) and torch.as_tensor(value).dim() == 0)
            }
            for parameter in self.parameters()
        ]

    def fill_optimizer(self, layout: Sequence[Mapping[str, float | None]]) -> None:
        """Give parameters without optimizer state zeros (and the counts of steps) in the layout of another worker's."""
        for parameter, names in zip(self.parameters(), layout, strict=True):
            if names and not self.optimizer.state.get(parameter):
                for name, value in names.items():
                    filled = torch.zeros_like(parameter.detach()) if value is None else torch.tensor(value)
                    self.optimizer.state[parameter][name] = filled


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


class Strategy:
    """How workers agree. Subclasses are frozen dataclasses whose fields are JSON values.

    The order of calls, on every worker: `init`, or the state of a checkpoint; `begin`; for each step `loss_scale`,
    `on_backward`, `on_gradients`, the optimizer's step, `on_step`; `settle` before every checkpoint; `on_epoch`,
    `figures` at an epoch's end; `close` at last, also after an error. All workers make the same calls but one.
    """

    deterministic: ClassVar[bool] = True
    """The same data, seed and workers give the same bits."""
    on_gpu: ClassVar[bool] = False
    """What it sends may lie in a GPU's memory."""
    replicas_agree: ClassVar[bool]
    """Parameters and optimizer state are the same on every worker after every step."""

    @property
    def elastic(self) -> bool:
        """Another number of workers computes the same, to float tolerance, for a net without batch statistics."""
        return False

    def init(self, replica: Replica) -> State:
        """The state before the first step."""
        return {}

    def begin(self, replica: Replica, state: State, comms: Comms) -> State:
        """Once, before the first step of a run or of its continuation: set up what works beside the state."""
        return state

    def steps_together(self, state: State) -> bool:
        """Whether all workers take the coming step on shared gradients, those without rows too."""
        return self.replicas_agree

    def loss_scale(self, rows_W: np.ndarray, rank: int, state: State) -> float:
        """What the mean loss over this worker's rows is multiplied by before backward.

        Args:
            rows_W: rows of each worker in this step, shape (W,), int64; not all are zero.
        """
        return 1.0

    def share(self, state: State, comms: Comms) -> float:
        """This worker's weight in a mean of the workers' weights or statistics taken now; all sum to 1."""
        return state["rows"] / state["all"] if state.get("all") else 1 / comms.world

    def on_backward(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> None:
        """Just before a step's last backward pass, and only where this worker has rows: a chance to send early."""

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        """After backward, before the optimizer's step."""
        return state

    def on_step(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        """After the optimizer's step."""
        return state

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        """At an epoch's end. Afterwards all replicas have the same parameters and statistics."""
        return state

    def settle(self, replica: Replica, state: State, comms: Comms) -> State:
        """Bring what is in flight to rest, so that the state returned and the replica are all there is to save."""
        return state

    def figures(self, state: State) -> dict[str, float]:
        """The last epoch in the strategy's own terms, the same on every worker; asked after `on_epoch`."""
        return {}

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        """The state of worker `rank` of `world`, from the settled states of all workers that saved, by rank.

        The replicas then hold the mean of the weights that were saved. Nothing that was learned may be lost or doubled.
        """
        return dict(states[0])

    def close(self, replica: Replica) -> None:
        """Take down what `begin` set up; safe to call twice, and before `begin`."""


def average_into(tensors: Sequence[Tensor], share: float, comms: Comms) -> None:
    """Replace the tensors by their weighted mean over the workers; `share` is this worker's weight, all sum to 1."""
    comms.sum_all(tensors, share)


def share_gradients(replica: Replica, comms: Comms) -> None:
    """Sum the gradients over the workers."""
    if comms.world > 1:
        comms.sum_all([gradient_of(parameter) for parameter in replica.parameters()])


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; zeros where there is none, for want of rows or of a branch: the others may have it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:  # every worker has other rows of it
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def evenly(total: int, rank: int, world: int) -> int:
    """One worker's part of a number, when it is spread over all of them.

    >>> [evenly(10, rank, 3) for rank in range(3)]
    [3, 3, 4]
    """
    return total * (rank + 1) // world - total * rank // world


def average_optimizer(replica: Replica, share: float, comms: Comms) -> None:
    """Average the optimizer's tensors; a worker that has none yet, for want of rows, takes part with zeros."""
    if comms.world == 1:
        return
    text = json.dumps(replica.optimizer_layout()).encode()
    words = np.frombuffer(text + b" " * (-len(text) % 8), np.int64)
    layouts = [json.loads(part.tobytes()) for part in comms.gather(words)]
    for layout in layouts:
        replica.fill_optimizer(layout)
    average_into(replica.optimizer_tensors(), share, comms)
