"""Packed rows that several trainings share: prepared, and run through the frozen front, once for all of them.

While `PackedOnce.shared` is open, `fit` in that thread asks here before it packs. What is packed already, for the same
rows, preparation, front and workers, is taken as it lies in Spark's storage on the workers' disks; lost parts are made
anew. The rows are those that the training would have packed by itself, so its result is the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_current: ContextVar[PackedOnce | None] = ContextVar("kindling-packed-once", default=None)


@dataclass
class _Entry:
    about: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: list[Any] = field(default_factory=list)


class PackedOnce:
    """What trainings have in common, each thing made once; may be asked from several threads.

    >>> once = PackedOnce()
    >>> [once.get(("a", 1), lambda: [len("made")]), once.get(("a", 1), lambda: ["made again"])]
    [[4], [4]]
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._frames: list[DataFrame] = []

    def get(self, about: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first called for something equal to `about`; others wait meanwhile."""
        with self._lock:
            entry = next((entry for entry in self._entries if entry.about == about), None)
            if entry is None:
                entry = _Entry(about)
                self._entries.append(entry)
        with entry.lock:
            if not entry.made:
                entry.made.append(make())
            return entry.made[0]

    def keep(self, about: Any, packed: DataFrame) -> DataFrame:
        """The frame, its rows computed and stored; an equal one that is stored already if there is one."""

        def store() -> DataFrame:
            from pyspark import StorageLevel

            from kindling import ship

            stored = packed.persist(StorageLevel.DISK_ONLY)
            self._frames.append(stored)
            with ship.translated(), ship.bounded_arrow_batches(packed.sparkSession):
                stored.count()  # now: trainings that begin together would each compute the rows
            return stored

        frame: DataFrame = self.get(about, store)
        return frame

    def close(self) -> None:
        """Let Spark forget the rows."""
        for frame in self._frames:
            with contextlib.suppress(Exception):  # the session may be gone
                frame.unpersist()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """While open, trainings of this thread share what they pack."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def once(about: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, which other trainings of a `PackedOnce.shared` may have called for already."""
    shared = _current.get()
    return make() if shared is None else shared.get(about, make)


def kept(about: Any, packed: DataFrame) -> DataFrame:
    """The frame, or its stored rows where trainings share them."""
    shared = _current.get()
    return packed if shared is None else shared.keep(about, packed)
