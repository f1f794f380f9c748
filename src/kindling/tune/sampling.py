"""Who proposes the next trial: a grid, chance, or Optuna's tree of Parzen estimators, which learns from earlier ones.

A sampler is asked for one trial after the other and told what became of each. Calls come one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Protocol

from kindling.errors import ConfigError, MissingExtraError
from kindling.tune import space as spaces
from kindling.tune.result import FINISHED, PRUNED, Trial
from kindling.tune.space import Integer, LogUniform, Params, Space

SAMPLERS = ("grid", "random", "tpe")
RANDOM_TRIALS = 20


class Sampler(Protocol):
    """Proposes trials."""

    def propose(self, number: int) -> Params:
        """The parameters of trial `number`."""

    def tell(self, trial: Trial) -> None:
        """What became of a trial; also of one of an earlier call, before anything is proposed."""


class Listed:
    """Trials that are known from the start: of a grid, or drawn at random. What became of others changes nothing."""

    def __init__(self, points: Iterable[Params]) -> None:
        self.points = list(points)

    def propose(self, number: int) -> Params:
        return self.points[number]

    def tell(self, trial: Trial) -> None:
        pass


class Tpe:
    """Optuna's `TPESampler`: proposes where good trials were dense. With several trials at a time, the order in which
    they end has a part in what is proposed. Source: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization.
    """

    def __init__(self, space: Space, *, seed: int, smaller_is_better: bool) -> None:
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError.of("sampler='tpe'", "optuna", "search") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True),
            direction="minimize" if smaller_is_better else "maximize",
        )
        self._distributions = {name: self._distribution(values) for name, values in space.items()}
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Params:
        self._asked[number] = self._study.ask(self._distributions)
        return {name: self._asked[number].params[name] for name in self._distributions}

    def tell(self, trial: Trial) -> None:
        states = self._optuna.trial.TrialState
        state = {FINISHED: states.COMPLETE, PRUNED: states.PRUNED}.get(trial.state, states.FAIL)
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=state,
                    value=None if state == states.FAIL else trial.value,
                    params=dict(trial.params),
                    distributions=self._distributions,
                    intermediate_values=dict(enumerate(trial.values, 1)),
                )
            )
            return
        for epoch, value in enumerate(trial.values, 1):
            asked.report(value, epoch)
        self._study.tell(asked, trial.value if state == states.COMPLETE else None, state=state)

    def _distribution(self, values: Any) -> Any:
        kinds = self._optuna.distributions
        if isinstance(values, tuple):
            return kinds.CategoricalDistribution(values)
        if isinstance(values, Integer):
            return kinds.IntDistribution(values.low, values.high, log=values.log)
        return kinds.FloatDistribution(values.low, values.high, log=isinstance(values, LogUniform))


def choose(
    name: str | None, space: Space, *, trials: int | None, seed: int, smaller_is_better: bool
) -> tuple[Sampler, int, str]:
    """The sampler of a name, how many trials there will be, and the name.

    Without a name: the grid of a space of lists, where the number of trials is left open; else chance.
    """
    if trials is not None and (not isinstance(trials, int) or isinstance(trials, bool) or trials < 1):
        raise ConfigError("trials", trials, "is no count", "Use a whole number, 1 or more")
    points = spaces.size(space)
    if name is None:
        name = "grid" if points is not None and trials is None else "random"
    if name == "grid":
        if trials is not None:
            raise ConfigError("trials", trials, "would leave points of the grid out", "Leave it out, or draw at random")
        listed = Listed(spaces.grid(space))
        return listed, len(listed.points), name
    count = trials or RANDOM_TRIALS
    if name == "random":
        listed = Listed(itertools.islice(spaces.drawn(space, seed), count))
        return listed, len(listed.points), name
    if name == "tpe":
        return Tpe(space, seed=seed, smaller_is_better=smaller_is_better), count, name
    raise ConfigError("sampler", name, "is none", f"Use one of {SAMPLERS}")
