"""Who is given up, against Optuna's pruners and by properties. No Spark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kindling.errors import ConfigError
from kindling.tune import MedianStopping, SuccessiveHalving
from kindling.tune.pruning import better, choose

EPOCHS = 9


def ends(pruner: Any, curves: np.ndarray, smaller: bool) -> list[int]:
    """The epoch at which each trial ends, one trial after the other."""
    before: list[dict[int, float]] = []
    found = []
    for values in curves:
        mine: dict[int, float] = {}
        for epoch, value in enumerate(values, 1):
            mine[epoch] = float(value)
            if pruner.hopeless(epoch, mine, before, smaller_is_better=smaller):
                break
        before.append(mine)
        found.append(len(mine))
    return found


def optunas(pruner: Any, curves: np.ndarray, smaller: bool) -> list[int]:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(pruner=pruner, direction="minimize" if smaller else "maximize")
    found = []
    for values in curves:
        trial = study.ask()
        for epoch, value in enumerate(values, 1):
            trial.report(float(value), epoch)
            if trial.should_prune():
                break
        whole = epoch == len(values)
        states = optuna.trial.TrialState
        study.tell(trial, float(value) if whole else None, state=states.COMPLETE if whole else states.PRUNED)
        found.append(epoch)
    return found


def curves(seed: int, trials: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(trials, 1)) + rng.normal(scale=0.3, size=(trials, EPOCHS)).cumsum(axis=1)


@pytest.mark.parametrize("smaller", [True, False])
@pytest.mark.parametrize("factor", [2, 3])
def test_halving_is_optunas(factor: int, smaller: bool) -> None:
    optuna = pytest.importorskip("optuna")
    theirs = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    for seed in range(5):
        drawn = curves(seed)
        mine = ends(SuccessiveHalving(factor=factor), drawn, smaller)
        assert mine == optunas(theirs, drawn, smaller)
        assert len(set(mine)) > 2


@pytest.mark.parametrize("smaller", [True, False])
def test_the_first_trials_median_is_optunas(smaller: bool) -> None:
    """Optuna's median is of whole trials, ours of all that came as far: the same until the first is ended."""
    optuna = pytest.importorskip("optuna")
    theirs = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
    several = 0
    for seed in range(20):
        drawn = curves(seed)
        mine = ends(MedianStopping(trials=4, epochs=2), drawn, smaller)
        other = optunas(theirs, drawn, smaller)
        first = next((i for i, epoch in enumerate(mine) if epoch < EPOCHS), len(mine) - 1)
        assert mine[: first + 1] == other[: first + 1], seed
        several += first > 4
    assert several


def test_nobody_is_ended_by_the_median_before_enough_others_have_come_as_far() -> None:
    pruner = MedianStopping(trials=2, epochs=3)
    good = [{e: 0.1 for e in range(1, 6)}, {e: 0.2 for e in range(1, 4)}]
    bad = {e: 9.0 for e in range(1, 6)}
    assert [pruner.hopeless(e, bad, good, smaller_is_better=True) for e in range(1, 6)] == [
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("pruner", [MedianStopping(trials=1), SuccessiveHalving()])
def test_the_best_so_far_is_never_ended(pruner: Any) -> None:
    others = [{e: float(value) for e in range(1, 10)} for value in range(1, 30)]
    mine = {e: 0.5 for e in range(1, 10)}
    assert not any(pruner.hopeless(e, mine, others, smaller_is_better=True) for e in range(1, 10))


def test_names_and_settings() -> None:
    assert choose("median") == MedianStopping()
    assert choose("halving") == SuccessiveHalving()
    assert choose(None) is None
    with pytest.raises(ConfigError, match=r"pruner='best' is none. Use one of \('median', 'halving'\)"):
        choose("best")
    with pytest.raises(ConfigError, match="factor=1 sorts nobody out"):
        SuccessiveHalving(factor=1)
    with pytest.raises(ConfigError, match="trials=0 is no count"):
        MedianStopping(trials=0)
    assert better(0.1, float("nan"), smaller_is_better=True)
