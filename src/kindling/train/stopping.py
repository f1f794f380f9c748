"""When a training ends before its last epoch: no progress any more, too many steps or seconds, or somebody asked.

Pure functions over small states; the loop asks them, and the workers agree through `Comms`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kindling.train.settings import EarlyStopping
from kindling.train.strategies import Comms

_AGREE_EVERY_S = 1.0
REASONS = ("", "asked", "max_seconds", "max_steps", "early_stopping")
"""Why a training ended, in `result.json` and in the event `stopped`; "" where it came to its end."""


class Watch(NamedTuple):
    """What early stopping remembers."""

    best: float | None = None
    """The best figure so far."""
    waited: int = 0
    """Measurements since then."""


def observe(settings: EarlyStopping, watch: Watch, figure: float) -> tuple[Watch, bool]:
    """Take a measurement into account.

    Returns: the new state, and whether this was progress; training is over when `waited` has reached the patience.

    >>> settings = EarlyStopping(patience=2, min_delta=0.1)
    >>> watch, _ = observe(settings, Watch(), 1.0)
    >>> observe(settings, watch, 0.95)
    (Watch(best=1.0, waited=1), False)
    >>> observe(settings, watch, 0.8)
    (Watch(best=0.8, waited=0), True)
    """
    if math.isnan(figure):
        return watch._replace(waited=watch.waited + 1), False
    gain = math.inf if watch.best is None else watch.best - figure
    if not settings.smaller_is_better and watch.best is not None:
        gain = -gain
    if gain > settings.min_delta:
        return Watch(figure, 0), True
    return watch._replace(waited=watch.waited + 1), False


class Consent:
    """Whether to stop for a reason that only some workers may know, asked of all of them about once a second.

    The steps at which they ask are the same everywhere: rank 0 proposes the distance to the next one from the time that
    its steps take. Every worker must call `reason` after every step.
    """

    def __init__(self, comms: Comms, *, until_s: float | None, asked: Callable[[], bool] | None) -> None:
        """Args: until_s: `time.monotonic()` at which time is over; asked: whether somebody wants an end."""
        self._comms, self._until_s, self._asked = comms, until_s, asked
        self._next, self._ahead = 0, 0
        self._last, self._last_s = 0, time.monotonic()

    def reason(self, step: int, *, epoch_ends: bool = False) -> str:
        """One of `REASONS`, the same on every worker. At the end of an epoch nobody who asked waits for his second."""
        due = step >= self._next or (epoch_ends and self._asked is not None)
        if (self._until_s is None and self._asked is None) or not due:
            return ""
        now = time.monotonic()
        mine = 0
        if self._until_s is not None and now >= self._until_s:
            mine = REASONS.index("max_seconds")
        elif self._asked is not None and self._asked():
            mine = REASONS.index("asked")
        a_step_s = (now - self._last_s) / max(step - self._last, 1)
        # The distance grows by doubling: the first steps may be quicker than those to come.
        ahead = max(min(int(_AGREE_EVERY_S / max(a_step_s, 1e-6)), 2 * self._ahead), 1)
        votes = self._comms.gather(np.array([mine, ahead], np.int64))
        self._ahead = int(votes[0][1])
        self._last, self._last_s, self._next = step, now, step + self._ahead
        return REASONS[max(int(vote[0]) for vote in votes)]
