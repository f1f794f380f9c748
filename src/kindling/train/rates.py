"""Learning rates over time: one of torch's schedulers, and a warm-up on top of it.

The warm-up is no scheduler of its own: it scales the rates for the length of one step and leaves nothing behind, so it
goes with every schedule and needs no state. Source of the straight line: Goyal et al., 2017, arXiv:1706.02677, 2.2.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kindling.errors import ConfigError

ScheduleFactory = Callable[..., LRScheduler]
"""Optimizer -> scheduler."""


def make_schedule(factory: ScheduleFactory, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The scheduler; a parameter `total_steps` that is left open is given the length of the whole training.

    Raises: ConfigError, where the factory fails or gives something else.

    >>> from functools import partial
    >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> make_schedule(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1), sgd, 40).total_steps
    40
    """
    parameters = inspect.signature(factory).parameters

    def is_open(name: str) -> bool:
        return name in parameters and parameters[name].default in (None, inspect.Parameter.empty)

    wants = is_open("total_steps") and ("steps_per_epoch" not in parameters or is_open("steps_per_epoch"))
    try:
        made = factory(optimizer, **({"total_steps": total_steps} if wants else {}))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError("schedule", factory, f"could not be made: {error}", _HINT) from error
    if not isinstance(made, LRScheduler):
        raise ConfigError("schedule", factory, f"gave a {type(made).__name__}", _HINT)
    return made


_HINT = (
    "Give a function of the optimizer that returns a torch scheduler: "
    "partial(torch.optim.lr_scheduler.StepLR, step_size=5)"
)


class Rates:
    """The learning rates of one training, moved on by the loop."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factory: ScheduleFactory | None,
        *,
        every: str,
        warmup_steps: int,
        total_steps: int,
    ) -> None:
        self._optimizer, self._every, self._warmup = optimizer, every, warmup_steps
        self._schedule = None if factory is None else make_schedule(factory, optimizer, total_steps)

    def now(self) -> list[float]:
        """The rate of each parameter group, without the warm-up."""
        return [float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group]

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[None]:
        """The rates of one step, counted from 1."""
        if step >= self._warmup:
            yield
            return
        groups = [group for group in self._optimizer.param_groups if "lr" in group]
        full = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * (step / self._warmup)
        try:
            yield
        finally:
            for group, rate in zip(groups, full, strict=True):
                group["lr"] = rate

    def after(self, what: str) -> None:
        """A `"step"` or an `"epoch"` is over."""
        if self._schedule is not None and what == self._every and not isinstance(self._schedule, ReduceLROnPlateau):
            with warnings.catch_warnings():
                # A worker that had no rows yet has not stepped its optimizer.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._schedule.step()

    def measured(self, figure: float) -> None:
        """A figure came in that `ReduceLROnPlateau` waits for."""
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(figure)

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return None if self._schedule is None else dict(self._schedule.state_dict())

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; the optimizer has its own state back already."""
        if self._schedule is not None and state is not None:
            self._schedule.load_state_dict(dict(state))
