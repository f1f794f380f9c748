"""The driver's ear: takes workers' lines, keeps the table, hears events, collects results, reads and writes files.

The shell around `table.py`: sockets, threads and the clock. A line is a worker's own (`meeting.TableMeeting`), or one
for files of the run directory (`remote.RemotePlace`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kindling.train.events import Event
from kindling.train.line import Line, Server
from kindling.train.remote import serve_files
from kindling.train.table import DONE, Deed, Kill, Send, Table

if TYPE_CHECKING:
    from kindling.storage import Place

_TICK_EVERY_S = 0.5


class Listener:
    """Listens on one interface (`host`), at a free port, for workers that know the run's secret.

    Args:
        on_event: gets each event, one at a time.
        table: where the workers of the run meet; without one only events are heard.
        place: the run directory, for workers that do not see it.
        kill: has Spark kill a task, by its number and for a reason; None where that cannot be asked.

    Use as a context manager; leaving it ends every thread.
    """

    def __init__(
        self,
        on_event: Callable[[Event], None],
        host: str = "127.0.0.1",
        *,
        table: Table | None = None,
        place: Place | None = None,
        kill: Callable[[int, str], None] | None = None,
    ) -> None:
        self.table = table or Table(1)
        self._on_event, self._place, self._kill = on_event, place, kill
        self._lock = threading.RLock()
        self._names = itertools.count()
        self._lines: dict[int, Line] = {}
        self._results: dict[tuple[int, str, int], dict[int, bytes]] = {}
        self._generation = 0
        self._closed = threading.Event()
        self._server = Server(self._serve, host)
        self.address = self._server.address
        self._clock = threading.Thread(target=self._tick, name="kindling-clock", daemon=True)
        self._clock.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.close()
        self._clock.join(5)

    def results(self) -> list[tuple[int, str, int, bytes]]:
        """What the workers have handed over, as (rank, kind, part, data); nothing before all of them have finished."""
        with self._lock:
            if self.table.state != DONE:
                return []
            return [
                (rank, kind, part, b"".join(data for _, data in sorted(pieces.items())))
                for (rank, kind, part), pieces in sorted(self._results.items())
            ]

    def stop(self) -> None:
        """Ask the workers to end the training soon; they agree on the step among themselves."""
        with self._lock:
            self._do(self.table.stop())

    def _serve(self, line: Line) -> None:
        with self._lock:
            peer = next(self._names)
            self._lines[peer] = line
        rank = -1
        try:
            while (frame := line.receive()) is not None:
                message, payload = frame
                kind = message["kind"]
                if kind == "files":
                    if self._place is not None:
                        serve_files(line, self._place)
                    return
                if kind == "hello":
                    rank = int(message["rank"])
                with self._lock:
                    self._do(self._told(peer, rank, kind, message, payload))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # half a frame of a killed worker
        finally:
            with self._lock:
                self._lines.pop(peer, None)
                if not self._closed.is_set():
                    self._do(self.table.lost(peer=peer, now=time.monotonic()))

    def _told(self, peer: int, rank: int, kind: str, message: dict[str, Any], payload: bytes) -> list[Deed]:
        table, now = self.table, time.monotonic()
        if kind == "event":
            table.heard(peer=peer, now=now)
            event = Event.from_line(message["line"])
            self._on_event(event)
        elif kind == "hello":
            return table.hello(peer=peer, rank=rank, task=int(message["task"]), now=now)
        elif kind == "post":
            return table.post(peer=peer, name=message["name"], text=message["text"], now=now)
        elif kind == "beat":
            return table.beat(peer=peer, beat=message["beat"], now=now)
        elif kind == "fail":
            return table.fail(peer=peer, reason=message["reason"], final=message["final"], now=now)
        elif kind == "result" and table.heard(peer=peer, now=now):
            if self._generation != table.generation:
                self._generation, self._results = table.generation, {}
            pieces = self._results.setdefault((rank, message["what"], int(message["part"])), {})
            pieces[int(message["start"])] = payload
        return []

    def _do(self, deeds: Iterable[Deed]) -> None:
        for deed in deeds:
            if isinstance(deed, Send):
                line = self._lines.get(deed.peer)
                with contextlib.suppress(OSError):  # its own thread will find that it is gone
                    if line is not None:
                        line.send(deed.message)
            elif isinstance(deed, Kill) and self._kill is not None:
                with contextlib.suppress(Exception):  # Spark may know better: the task may be over
                    self._kill(deed.task, deed.reason)

    def _tick(self) -> None:
        while not self._closed.wait(_TICK_EVERY_S):
            with self._lock:
                self._do(self.table.tick(time.monotonic()))
