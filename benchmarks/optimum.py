"""The other side of the accuracy figures: scikit-learn's logistic regression, run until it converges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import BenchmarkError

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""L2 strengths, strongest first: the loss is the mean cross entropy plus strength / 2 times the squared weights."""


@dataclass(frozen=True)
class Split:
    """Features and class indices of three sides, standardised by the training side's mean and deviation."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, train: np.ndarray, valid: np.ndarray, test: np.ndarray) -> Split:
        mean, deviation = x[train].mean(0), x[train].std(0)
        # A feature that never changes in training says nothing: it is left at zero, not divided by it.
        scaled = ((x - mean) / np.where(deviation > 1e-6, deviation, 1.0)).astype(np.float32)
        return cls((scaled[train], y[train]), (scaled[valid], y[valid]), (scaled[test], y[test]))


def stratified(y: np.ndarray, seed: int, shares: Sequence[float] = (0.6, 0.2, 0.2)) -> tuple[np.ndarray, ...]:
    """Row numbers of the sides; each class is divided by the shares.

    >>> [len(side) for side in stratified(np.repeat([0, 1], 10), 0)]
    [12, 4, 4]
    """
    rng, sides = np.random.default_rng(seed), [[] for _ in shares]
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for side, part in zip(sides, np.split(rows, cuts), strict=True):
            side.append(part)
    return tuple(np.sort(np.concatenate(side)) for side in sides)


@dataclass(frozen=True)
class Optimum:
    """The strength that did best on validation, and what it gives."""

    strength: float
    train: float
    valid: float
    test: float


def optimum(split: Split, strengths: Sequence[float] = STRENGTHS) -> Optimum:
    """Fit every strength to convergence, choose on validation (the stronger of equals), report all three sides.

    Raises: BenchmarkError, when a fit does not converge.
    """
    from sklearn.linear_model import LogisticRegression

    best: Optimum | None = None
    for strength in strengths:
        # scikit-learn weighs the sum of the losses against half the squared weights: C = 1 / (strength * rows).
        model = LogisticRegression(C=1 / (strength * len(split.train[1])), max_iter=5000, tol=1e-5)
        model.fit(*split.train)
        if model.n_iter_[0] >= 5000:
            raise BenchmarkError(f"scikit-learn did not converge at L2 strength {strength}.")
        seen = Optimum(strength, *(float(model.score(*side)) for side in (split.train, split.valid, split.test)))
        if best is None or seen.valid > best.valid:
            best = seen
    assert best is not None
    return best
