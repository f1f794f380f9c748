"""When checkpoints are written, and which of them stay. Decisions only: `checkpoint.py` and `writer.py` do it.

All workers must come to the same decision at the same step without a message in each. Steps and epochs they count
alike; clocks they compare, and only as often as the time that is left makes sensible. Importing this loads no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kindling.errors import ConfigError

if TYPE_CHECKING:
    from kindling.train.strategies.comms import Comms

_LONGEST_LOOK_AWAY_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """How often a training can be picked up, and from how far back. A last checkpoint is always written at the end.

    >>> Checkpoints(steps=0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: steps=0 is no distance between two checkpoints. Use 1 or more, or None for never.
    """

    epochs: int | None = 1
    """A checkpoint at the end of every so many epochs; None for none."""
    steps: int | None = None
    """Another one after every so many steps, also in the middle of an epoch."""
    minutes: float | None = None
    """Another one when so much time has passed since the last."""
    keep: int = 2
    """The newest so many stay."""
    keep_best: int = 1
    """The best so many by validation stay as well."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "minutes"):
            value = getattr(self, name)
            kinds = (int, float) if name == "minutes" else (int,)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf and (name == "minutes" or value >= 1)):
                raise ConfigError(
                    name, value, "is no distance between two checkpoints", "Use 1 or more, or None for never"
                )
        for name, least in (("keep", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(name, value, "is no number of checkpoints", f"Use a whole number, {least} or more")

    def worth_keeping(self, scores: Mapping[int, float | None]) -> set[int]:
        """Which of the checkpoints to keep.

        Args:
            scores: of each step that has a checkpoint, how good its weights are: less is better, None is unknown.

        >>> sorted(Checkpoints(keep=2, keep_best=1).worth_keeping({10: 0.5, 20: 0.3, 30: 0.4, 40: None, 50: 0.6}))
        [20, 40, 50]
        """
        newest = sorted(scores, reverse=True)[: self.keep]
        known = [(score, step) for step, score in scores.items() if score is not None and not math.isnan(score)]
        return {*newest, *(step for _, step in sorted(known)[: self.keep_best])}


class Timetable:
    """Says after each step whether a checkpoint is due; the same on every worker."""

    def __init__(self, policy: Checkpoints, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._owed = False
        self._last = clock()
        self._paced: tuple[int, float] | None = None
        self._look = 0

    def due(self, step: int, comms: Comms, *, epoch_end: int | None) -> bool:
        """Whether a checkpoint is due now; it stays due until `written`. Every worker asks after every step.

        Args:
            step: steps since the beginning of the run.
            epoch_end: the epoch that ends with this step; None in the middle of one.
        """
        policy = self._policy
        by_steps = policy.steps is not None and step % policy.steps == 0
        by_epochs = policy.epochs is not None and epoch_end is not None and epoch_end % policy.epochs == 0
        by_clock = policy.minutes is not None and self._time_is_up(step, comms, 60 * policy.minutes)
        self._owed = self._owed or by_steps or by_epochs or by_clock
        return self._owed

    def written(self) -> None:
        """A checkpoint was taken."""
        self._owed, self._last = False, self._clock()

    def _time_is_up(self, step: int, comms: Comms, limit_s: float) -> bool:
        """Rank 0's clock decides. Asked at steps that all workers know: half of the time left is slept through."""
        now = self._clock()
        if self._paced is None:
            self._paced, self._look = (step, now), step + 1
            return False
        if step < self._look:
            return False
        since, then = self._paced
        mine = np.array([now - self._last, (now - then) / (step - since)])
        table = [seen.view(np.float64) for seen in comms.gather(mine.view(np.int64))]
        left = limit_s - float(table[0][0])
        pace = max(max(float(row[1]) for row in table), 1e-6)
        self._look = step + max(1, int(min(left / 2, _LONGEST_LOOK_AWAY_S) / pace))
        return left <= 0


def to_json(policy: Checkpoints) -> dict[str, Any]:
    """The policy as JSON, for `run.json`."""
    return {name: getattr(policy, name) for name in Checkpoints.__slots__}
