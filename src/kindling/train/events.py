"""Events: one line for each thing that happened in a run, and how lines get from workers to readers.

A worker's `EventLog` never blocks a step: it sends lines from a thread of its own to the driver's `Listener` and keeps
them for the run directory. Progress bars and pages are readers of these lines. No torch, no Spark.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EVENT_VERSION = 1
_CONNECT_TIMEOUT_S = 3.0
_LINE_LIMIT_BYTES = 1 << 20


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


@dataclass(frozen=True, slots=True)
class ListenerAddress:
    """Where a run's listener waits, and the secret that opens it."""

    host: str
    port: int
    token: str


class Listener:
    """The driver's ear: accepts workers that know the run's secret and hands each event to `on_event`.

    Binds one interface (`host`), an ephemeral port. Use as a context manager; leaving it stops every thread.
    """

    def __init__(self, on_event: Callable[[Event], None], host: str = "127.0.0.1") -> None:
        self._on_event = on_event
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._server = socket.create_server((host, 0), backlog=128)
        self.address = ListenerAddress(host, self._server.getsockname()[1], secrets.token_hex(16))
        self._thread = threading.Thread(target=self._accept, name="kindling-listener", daemon=True)
        self._thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        # shutdown wakes a thread that waits in accept; close alone does not.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            readers = dict(self._open)
        for connection in readers:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *readers.values()):
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            reader = threading.Thread(target=self._read, args=(connection,), name="kindling-events", daemon=True)
            with self._lock:
                self._open[connection] = reader
            reader.start()

    def _read(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                greeting = lines.readline(256).strip()
                if not hmac.compare_digest(greeting, self.address.token.encode()):
                    return
                while line := lines.readline(_LINE_LIMIT_BYTES):
                    try:
                        event = Event.from_line(line)
                    except (ValueError, TypeError):
                        return  # half a line of a killed worker, or a stranger
                    with self._lock:
                        self._on_event(event)
        except OSError:
            return
        finally:
            with self._lock:
                self._open.pop(connection, None)


class EventLog:
    """A worker's events: kept in memory for the run directory, and sent to the listener in the background."""

    def __init__(self, run: str, rank: int, address: ListenerAddress | None) -> None:
        self.run, self.rank, self.attempt = run, rank, 0
        self.events: list[Event] = []
        self._taken, self._parts, self._taking = 0, 0, threading.Lock()
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if address is not None:
            self._thread = threading.Thread(target=self._send, args=(address,), name="kindling-events", daemon=True)
            self._thread.start()

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
        if self._thread is not None:
            self._queue.put(event)

    def take(self) -> tuple[int, list[Event]]:
        """Events not taken before, and how often there were some: the number of their part."""
        with self._taking:
            fresh = self.events[self._taken :]
            part = self._parts
            self._taken, self._parts = self._taken + len(fresh), part + bool(fresh)
            return part, fresh

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is waiting, then stop."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _send(self, address: ListenerAddress) -> None:
        try:
            with socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S) as connection:
                connection.settimeout(10)
                connection.sendall(address.token.encode() + b"\n")
                while (event := self._queue.get()) is not None:
                    connection.sendall(event.to_line().encode() + b"\n")
        except OSError:
            return  # The driver cannot be reached from here: the events come back with the result.
