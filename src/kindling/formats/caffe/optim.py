"""Caffe's update rules as one torch optimizer, in Caffe's own order of clipping, averaging, decay and momentum.

torch's optimizers of the same names differ where it shows: their momentum holds gradients, Caffe's holds updates, so
that a falling learning rate acts later; Caffe takes epsilon beside the root and before Adam's correction. The rules
are those of BVLC Caffe's `src/caffe/solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

METHODS = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")


class CaffeSchedule(LRScheduler):
    """A rate by iteration, times the factor of each group; stepped after every iteration."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate(self.last_epoch) * group.get("lr_mult", 1.0) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "rate"}


class CaffeOptimizer(torch.optim.Optimizer):
    """One of `METHODS`. Groups may have `decay_mult`, a factor on the weight decay; `lr` holds its own factor.

    Args:
        iter_size: batches that one step stands for.
        averaged: whether gradients are the mean over those batches; else they are the sum, as Caffe adds them up.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = CaffeOptimizer([weight], lr=0.1, momentum=0.9)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([1.0])
    ...     optimizer.step()
    >>> round(weight.item(), 4)
    0.71
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        method: str = "SGD",
        lr: float = 0.01,
        momentum: float = 0.0,
        momentum2: float = 0.999,
        delta: float = 1e-8,
        rms_decay: float = 0.99,
        weight_decay: float = 0.0,
        regularization: str = "L2",
        clip_gradients: float = -1.0,
        iter_size: int = 1,
        averaged: bool = True,
    ) -> None:
        defaults = dict(
            method=method,
            lr=lr,
            lr_mult=1.0,
            decay_mult=1.0,
            momentum=momentum,
            momentum2=momentum2,
            delta=delta,
            rms_decay=rms_decay,
            weight_decay=weight_decay,
            regularization=regularization,
            clip_gradients=clip_gradients,
            iter_size=iter_size,
            averaged=averaged,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = self._factor()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad * factor if factor != 1 else weight.grad
                decay = group["weight_decay"] * group["decay_mult"]
                if decay:
                    gradient = gradient.add(weight if group["regularization"] == "L2" else weight.sign(), alpha=decay)
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["history"] = torch.zeros_like(weight)
                    if group["method"] in ("AdaDelta", "Adam"):
                        state["history2"] = torch.zeros_like(weight)
                state["step"] += 1
                weight.sub_(_update(group, state, gradient))
        return loss

    def _factor(self) -> float:
        """What clipping and averaging make of every gradient."""
        group = self.param_groups[0]
        count = group["iter_size"]
        factor = 1.0 if group["averaged"] else 1.0 / count
        limit = group["clip_gradients"]
        if limit >= 0:
            gradients = [w.grad for g in self.param_groups for w in g["params"] if w.grad is not None]
            norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
            norm *= count if group["averaged"] else 1  # Caffe clips the sum
            if norm > limit:
                factor *= limit / norm
        return factor


def _update(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Tensor:
    """What is taken off the weight."""
    method: str = group["method"]
    rate, momentum, delta = float(group["lr"]), float(group["momentum"]), float(group["delta"])
    history: Tensor = state["history"]
    if method == "SGD":
        return history.mul_(momentum).add_(gradient, alpha=rate)
    if method == "Nesterov":
        before = history.clone()
        history.mul_(momentum).add_(gradient, alpha=rate)
        return history * (1 + momentum) - before * momentum
    if method == "AdaGrad":
        history.addcmul_(gradient, gradient)
        return gradient / (history.sqrt() + delta) * rate
    if method == "RMSProp":
        history.mul_(group["rms_decay"]).addcmul_(gradient, gradient, value=1 - group["rms_decay"])
        return gradient / (history.sqrt() + delta) * rate
    second: Tensor = state["history2"]
    if method == "AdaDelta":
        history.mul_(momentum).addcmul_(gradient, gradient, value=1 - momentum)
        update = gradient * ((second + delta) / (history + delta)).sqrt()
        second.mul_(momentum).addcmul_(update, update, value=1 - momentum)
        return update * rate
    beta = float(group["momentum2"])
    history.mul_(momentum).add_(gradient, alpha=1 - momentum)
    second.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    steps = int(state["step"])
    correction = math.sqrt(1 - beta**steps) / (1 - momentum**steps)
    return history / (second.sqrt() + delta) * (rate * correction)
