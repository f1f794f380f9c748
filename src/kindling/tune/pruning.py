"""Which trials are ended before their last epoch, because others were better at the same point. Arithmetic only.

Values are of the validation after each epoch. A pruner sees those of all trials so far, finished or not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kindling.errors import ConfigError

Curve = Mapping[int, float]
"""Epoch -> value."""


class Pruner(Protocol):
    """Says when a trial is given up."""

    def hopeless(self, epoch: int, mine: Curve, others: Sequence[Curve], *, smaller_is_better: bool) -> bool:
        """Whether a trial that has just measured `mine[epoch]` should end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MedianStopping:
    """End a trial whose best value so far is worse than the median of what the others had at the same epoch.

    Source: Golovin et al. 2017, Google Vizier, section 3.2; the rule is that of Optuna's `MedianPruner`, but trials
    that were ended count as well, as far as they came.

    >>> others = [{1: 0.9, 2: 0.5}, {1: 0.8, 2: 0.4}, {1: 0.7, 2: 0.3}]
    >>> MedianStopping(trials=3).hopeless(2, {1: 0.9, 2: 0.45}, others, smaller_is_better=True)
    True
    """

    epochs: int = 1
    """No trial ends before it has done so many."""
    trials: int = 4
    """So many others must have been measured at the epoch."""

    def __post_init__(self) -> None:
        _check_counts(epochs=self.epochs, trials=self.trials)

    def hopeless(self, epoch: int, mine: Curve, others: Sequence[Curve], *, smaller_is_better: bool) -> bool:
        reached = [other[epoch] for other in others if epoch in other]
        if epoch < self.epochs or len(reached) < self.trials:
            return False
        median = statistics.median(reached)
        so_far = [value for at, value in mine.items() if at <= epoch]
        return min(so_far) > median if smaller_is_better else max(so_far) < median


@dataclass(frozen=True, kw_only=True, slots=True)
class SuccessiveHalving:
    """After `epochs`, `epochs * factor`, `epochs * factor**2`, ... epochs only the best of each `factor` trials go on.

    Asynchronous: a trial is compared with those that have come as far so far, and waits for none. Source: Li et al.
    2018, A System for Massively Parallel Hyperparameter Tuning, arXiv:1810.05934.

    >>> SuccessiveHalving(factor=3).hopeless(3, {3: 0.5}, [{3: 0.4}, {3: 0.6}], smaller_is_better=True)
    True
    """

    epochs: int = 1
    """Of the first comparison."""
    factor: int = 3
    """Of so many trials one goes on."""

    def __post_init__(self) -> None:
        _check_counts(epochs=self.epochs)
        if not isinstance(self.factor, int) or self.factor < 2:
            raise ConfigError("factor", self.factor, "sorts nobody out", "Use a whole number, 2 or more")

    def hopeless(self, epoch: int, mine: Curve, others: Sequence[Curve], *, smaller_is_better: bool) -> bool:
        rung = self.epochs
        while rung < epoch:
            rung *= self.factor
        if rung != epoch:
            return False
        values = sorted([mine[epoch], *(other[epoch] for other in others if epoch in other)])
        going_on = max(len(values) // self.factor, 1)
        if smaller_is_better:
            return mine[epoch] > values[going_on - 1]
        return mine[epoch] < values[-going_on]


PRUNERS: dict[str, Callable[[], Pruner]] = {"median": MedianStopping, "halving": SuccessiveHalving}


def choose(given: Pruner | str | None) -> Pruner | None:
    """A pruner by its name, or as it is."""
    if isinstance(given, str):
        if given not in PRUNERS:
            raise ConfigError("pruner", given, "is none", f"Use one of {tuple(PRUNERS)}")
        return PRUNERS[given]()
    return given


def better(value: float, than: float, *, smaller_is_better: bool) -> bool:
    """Whether a value is better; what is no number is worse than all.

    >>> better(float("nan"), 1.0, smaller_is_better=False)
    False
    """
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value < than if smaller_is_better else value > than


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(name, count, "is no count", "Use a whole number, 1 or more")
