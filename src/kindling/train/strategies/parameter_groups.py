"""Optimizers whose settings differ by parameter: weight decay for matrices only, a smaller rate for a pretrained trunk.

An optimizer factory gets the parameters that learn. One whose first argument is called `named_parameters` gets pairs of
(name, parameter) instead; the two helpers here are such factories. Knows torch; no Spark.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

    Named = Sequence[tuple[str, nn.Parameter]]


def wants_names(factory: Callable[..., Any]) -> bool:
    """Whether an optimizer factory asks for named parameters.

    >>> wants_names(lambda named_parameters: None), wants_names(lambda parameters: None)
    (True, False)
    """
    try:
        first = next(iter(inspect.signature(factory).parameters), None)
    except (TypeError, ValueError):
        return False
    return first == "named_parameters"


@dataclass(frozen=True)
class parameter_groups:
    """An optimizer with settings of their own for parameters whose names match a pattern.

    Args:
        optimizer: makes a torch optimizer of parameter groups: `partial(torch.optim.AdamW, lr=1e-3)`.
        settings: patterns as in file names (`"fc.*"`, `"*.bias"`) with what is set for them; the first that fits
            counts, and what fits none keeps the optimizer's own.
    Raises: ConfigError, when a pattern fits no parameter.

    >>> import torch
    >>> from functools import partial
    >>> net = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    >>> made = parameter_groups(partial(torch.optim.SGD, lr=0.1), {"trunk.*": {"lr": 0.01}})
    >>> [(group["lr"], len(group["params"])) for group in made(list(net.named_parameters())).param_groups]
    [(0.01, 2), (0.1, 2)]
    """

    optimizer: Callable[..., Any]
    settings: Mapping[str, Mapping[str, Any]]

    def __call__(self, named_parameters: Named) -> torch.optim.Optimizer:
        groups: dict[str | None, list[Any]] = {}
        for name, parameter in named_parameters:
            pattern = next((p for p in self.settings if fnmatchcase(name, p)), None)
            groups.setdefault(pattern, []).append(parameter)
        for pattern in self.settings:
            if pattern not in groups:
                names = did_you_mean(pattern, [name for name, _ in named_parameters])
                raise ConfigError("settings", pattern, f"fits no parameter that learns.{names}", "Mend the pattern")
        order = [pattern for pattern in (*self.settings, None) if pattern in groups]
        made: torch.optim.Optimizer = self.optimizer(
            [
                {"params": groups[pattern], **(self.settings[pattern] if pattern is not None else {})}
                for pattern in order
            ]
        )
        return made


@dataclass(frozen=True)
class decay_groups:
    """An optimizer that decays weights of two or more axes, and leaves biases and scales of normalisation alone.

    Args:
        optimizer: makes a torch optimizer of parameter groups: `partial(torch.optim.AdamW, lr=1e-3)`.
        weight_decay: of the first group; the other's is 0.

    >>> import torch
    >>> from functools import partial
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    >>> made = decay_groups(partial(torch.optim.AdamW, lr=1e-3), 0.1)(list(net.named_parameters()))
    >>> [(group["weight_decay"], len(group["params"])) for group in made.param_groups]
    [(0.1, 1), (0.0, 3)]
    """

    optimizer: Callable[..., Any]
    weight_decay: float

    def __call__(self, named_parameters: Named) -> torch.optim.Optimizer:
        wide = [parameter for _, parameter in named_parameters if parameter.dim() >= 2]
        rest = [parameter for _, parameter in named_parameters if parameter.dim() < 2]
        groups = [(wide, self.weight_decay), (rest, 0.0)]
        made: torch.optim.Optimizer = self.optimizer(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
        )
        return made
