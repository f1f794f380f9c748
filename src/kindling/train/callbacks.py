"""Functions of the user's own that hear the events of a training on the driver, and may end it.

They run in a thread of their own, one event after the other: a slow one delays neither the workers nor the progress
bar. What the events are is in `events.py`; how workers agree to stop, in `stopping.py`. No torch, no Spark.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from kindling.train.events import Event

Callback = Callable[[Event], object]


class StopTraining(Exception):
    """Raised by a callback: the training ends soon, and gives the model as it is then."""


class Callbacks:
    """Calls each function with each event. Use as a context manager; its end waits until all events were heard.

    Args:
        functions: called in order, with every event, in a thread of their own.
        stop: asks the workers to end the training; called at most once, when a function raises `StopTraining` or
            fails.
    Raises: at the end, whatever else than `StopTraining` a function has raised; it is not called again after that.

    >>> heard = []
    >>> with Callbacks([lambda event: heard.append(event.kind)], stop=lambda: None) as callbacks:
    ...     callbacks.on_event(Event(run="r1", kind="epoch"))
    >>> heard
    ['epoch']
    """

    def __init__(self, functions: Sequence[Callback], stop: Callable[[], object]) -> None:
        self._functions, self._stop = tuple(functions), stop
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._call, name="kindling-callbacks", daemon=True)

    def __enter__(self) -> Callbacks:
        if self._functions:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._functions:
            self._queue.put(None)
            self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def on_event(self, event: Event) -> None:
        """Hand an event on; returns at once."""
        if self._functions:
            self._queue.put(event)

    def _call(self) -> None:
        while (event := self._queue.get()) is not None:
            if self._error is not None:
                continue
            for function in self._functions:
                try:
                    function(event)
                except StopTraining:
                    self._ask()
                except BaseException as error:  # raised again where the training was called
                    self._error = error
                    self._ask()
                    break

    def _ask(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._stop()
