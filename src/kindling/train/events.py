"""Events: one line for each thing that happened in a run.

A worker's `EventLog` never blocks a step: its meeting sends events to the driver in the background (`meeting.py`), and
it keeps them for the run directory. Progress bars and pages are readers of these lines. No torch, no Spark.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EVENT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `data` holds JSON values only.

    >>> event = Event(run="r1", kind="epoch", epoch=1, data={"loss": 0.5}, unix_s=0.0)
    >>> Event.from_line(event.to_line()) == event
    True
    """

    run: str
    kind: str
    """start, spooled, met, ready, step, validation, epoch, checkpoint, resumed, stopped, warning, error, finish."""
    attempt: int = 0
    rank: int = 0
    step: int = 0
    """Optimizer steps since the beginning of the run."""
    epoch: int = 0
    unix_s: float = field(default_factory=time.time)
    version: int = EVENT_VERSION
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> str:
        return json.dumps(asdict(self), allow_nan=True, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str | bytes) -> Event:
        return cls(**json.loads(line))


class EventLog:
    """A worker's events: kept in memory for the run directory, and told at once through `say`, which must not block."""

    def __init__(self, run: str, rank: int, say: Callable[[Event], None] | None = None) -> None:
        self.run, self.rank, self.say, self.attempt = run, rank, say, 0
        self.events: list[Event] = []
        self._taken, self._parts, self._taking = 0, 0, threading.Lock()

    def emit(self, kind: str, *, step: int = 0, epoch: int = 0, keep: bool = True, **data: Any) -> None:
        """Note an event; returns at once. `keep=False` for what only live readers want."""
        event = Event(
            run=self.run,
            kind=kind,
            attempt=self.attempt,
            rank=self.rank,
            step=step,
            epoch=epoch,
            data={"pid": os.getpid(), **data},
        )
        if keep:
            self.events.append(event)
        if self.say is not None:
            self.say(event)

    def take(self) -> tuple[int, list[Event]]:
        """Events not taken before, and how often there were some: the number of their part."""
        with self._taking:
            fresh = self.events[self._taken :]
            part = self._parts
            self._taken, self._parts = self._taken + len(fresh), part + bool(fresh)
            return part, fresh
