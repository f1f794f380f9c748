"""How a worker meets the others: at the driver's table, or in Spark's barrier where the driver cannot be reached.

Both forms are a `Meeting`. `TableMeeting` holds one line to the driver, over which go events, signs of life, gatherings
and the result; when another worker is lost, the driver says so, and this one ends. `BarrierMeeting` is Spark's
`allGather`: it looks once a second whether all have come, and a worker that waits in it for a dead one keeps its slot
until `spark.barrier.sync.timeout`. What the driver makes of it all is in `table.py`. No torch.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kindling.errors import SessionError, from_text
from kindling.train.events import Event
from kindling.train.line import Address, Line, Message, connect

_BEAT_EVERY_S = 1.0
_GRACE_S = 10.0
"""So long a worker that was told to end may take, before its process is ended."""
_PART_BYTES = 16 << 20
_CONNECT_TRIES = 3
_WORD_S = 2.0
"""The driver learns of a lost worker at the same moment as the others; so long they wait for its word."""
_PROCESS_ENDED = 70


class LostError(RuntimeError):
    """Another worker was lost: this one ends as well, and Spark starts all of them again."""


class ClosedError(Exception):
    """The run is over, and this worker was started once more for nothing."""


class Pulse:
    """What a worker has got done; the heart tells it to the driver.

    >>> pulse = Pulse()
    >>> pulse.beat()
    >>> pulse.steps
    1
    """

    def __init__(self) -> None:
        self.phase, self.steps = "spool", 0
        self._changed = time.monotonic()
        self._thread = threading.get_ident()

    def enter(self, phase: str) -> None:
        """Begin another phase of the work."""
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        """Some work is done: a batch, a checkpoint."""
        self.steps += 1
        self._changed = time.monotonic()

    def to_json(self) -> dict[str, Any]:
        """Phase, batches, seconds since the last one, and what the working thread does now."""
        waits, where = look(self._thread)
        idle = time.monotonic() - self._changed
        return {"phase": self.phase, "steps": self.steps, "idle_s": idle, "waits": waits, "where": where}


def look(thread: int) -> tuple[bool, str]:
    """Whether a thread of this process waits for other workers, and the line of code in which it is.

    The line is the innermost one outside installed packages; the Python code of a net, say.
    """
    frame = sys._current_frames().get(thread)
    waits, first, own = False, "", ""
    while frame is not None:
        path = frame.f_code.co_filename
        place = f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        first = first or place
        if not own and "site-packages" not in path and not path.startswith((sys.base_prefix, _HERE)):
            own = place
        waits = waits or path.startswith(_WAITING)
        frame = frame.f_back
    return waits, own or first


_HERE = str(Path(__file__).resolve().parents[1])
_WAITING = tuple(
    str(Path(__file__).resolve().parent / name)
    for name in ("strategies/comms.py", "strategies/shared_memory.py", "meeting.py")
)


class Meeting:
    """How a worker meets the others; what a form has no use for does nothing."""

    host: str
    """At which the others reach this worker."""
    own_host: str
    """Of this machine's own interface; `host` may be a name that others know it by."""
    on_line: bool
    """Whether it has a line to the driver."""
    stop_asked = False
    """Whether the driver wants the training to end."""

    def all_gather(self, name: str, text: str) -> list[str]:
        """Everyone's text, by rank, when all have come. Each gathering of a worker has a name of its own.

        Raises: LostError, when one of them is lost; a KindlingError, where one has given up for good.
        """
        raise NotImplementedError

    def why_lost(self) -> str | None:
        """Why the others are lost, where that is known."""
        return None

    def beat(self) -> None:
        """Some work is done: a batch, a checkpoint."""

    def enter(self, phase: str) -> None:
        """Begin another phase of the work."""

    def say(self, event: Event) -> None:
        """Tell an event; returns at once."""

    def deliver(self, kind: str, part: int, data: bytes) -> None:
        """Hand a part of the result to the driver."""
        raise NotImplementedError

    def fail(self, reason: str, final: str | None) -> None:
        """Tell why this worker ends: for good with `final`, an error as `to_wire` writes it."""

    def close(self) -> None:
        """Leave."""


class BarrierMeeting(Meeting):
    """In Spark's barrier, which knows the workers' addresses too."""

    on_line = False

    def __init__(self, host: str, all_gather: Callable[[str], Sequence[str]]) -> None:
        self.host, self.own_host, self._all_gather = host, host, all_gather

    def all_gather(self, name: str, text: str) -> list[str]:
        return list(self._all_gather(text))


class TableMeeting(Meeting):
    """At the driver's table.

    Args:
        task: Spark's number of this task.
        host: at which the others reach this worker; the interface that reaches the driver if None.
        silence_s: after so long without a sign of life this process ends itself, whatever holds it.
        forced: whether the process may be ended at all, should it not end by itself; not for a test's own process.
    Raises: SessionError, when the driver cannot be reached; ClosedError, when the run is over; LostError.
    """

    on_line = True

    def __init__(
        self,
        address: Address,
        *,
        rank: int,
        task: int,
        host: str | None,
        silence_s: float,
        forced: bool = True,
    ) -> None:
        self.pulse = Pulse()
        self._line = _reach(address)
        self.own_host = self._line.own_host
        self.host = host or self.own_host
        self._forced = forced
        self._silence_s = silence_s
        self._queue: queue.SimpleQueue[tuple[Message, bytes] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._answers: dict[str, list[str]] = {}
        self._over: Message | None = None
        self._closed = threading.Event()
        try:
            self._line.send({"kind": "hello", "rank": rank, "task": task})
            answer = self._line.receive()
            if answer is None:
                raise LostError("the driver has hung up.")
            if answer[0]["kind"] != "seat":
                self._end(answer[0])
            self.generation = int(answer[0]["generation"])
        except BaseException:
            self._line.close()
            raise
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._send, "kindling-heart"), (self._receive, "kindling-ear"))
        ]
        for thread in self._threads:
            thread.start()

    def all_gather(self, name: str, text: str) -> list[str]:
        self._queue.put(({"kind": "post", "name": name, "text": text}, b""))
        with self._changed:
            self._changed.wait_for(lambda: name in self._answers or self._over is not None)
            if name in self._answers:
                return self._answers.pop(name)
            over = self._over
        assert over is not None
        self._end(over)
        raise AssertionError

    def why_lost(self) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._over is not None, _WORD_S)
            return None if self._over is None else str(self._over["reason"])

    def beat(self) -> None:
        self.pulse.beat()

    def enter(self, phase: str) -> None:
        self.pulse.enter(phase)

    def say(self, event: Event) -> None:
        self.pulse.beat()
        self._queue.put(({"kind": "event", "line": event.to_line()}, b""))

    def deliver(self, kind: str, part: int, data: bytes) -> None:
        for start in range(0, max(len(data), 1), _PART_BYTES):
            piece = data[start : start + _PART_BYTES]
            self._queue.put(({"kind": "result", "what": kind, "part": part, "start": start}, piece))

    def fail(self, reason: str, final: str | None) -> None:
        self._queue.put(({"kind": "fail", "reason": reason, "final": final}, b""))

    def close(self) -> None:
        """Send what is waiting, then leave."""
        self._closed.set()
        self._queue.put(None)
        self._threads[0].join(10)
        self._line.close()
        self._threads[1].join(5)

    def _end(self, message: Message) -> None:
        if message.get("final"):
            error = from_text(message["final"])
            if error is not None:
                raise error
        if message["kind"] == "closed":
            raise ClosedError
        raise LostError(message.get("reason", "the generation is over."))

    def _send(self) -> None:
        beaten = 0.0
        try:
            while True:
                if time.monotonic() - beaten >= _BEAT_EVERY_S:
                    beaten = time.monotonic()
                    # Should something hold Python's lock for so long, not even this thread could end the process.
                    if self._forced:
                        faulthandler.dump_traceback_later(self._silence_s, exit=True)
                    self._line.send({"kind": "beat", "beat": self.pulse.to_json()})
                try:
                    item = self._queue.get(timeout=_BEAT_EVERY_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                self._line.send(*item)
        except OSError as error:
            self._ended({"kind": "over", "reason": f"the line to the driver broke: {error}.", "final": None})
        finally:
            if self._forced:
                faulthandler.cancel_dump_traceback_later()

    def _receive(self) -> None:
        message: Message = {"kind": "over", "reason": "the driver has hung up.", "final": None}
        try:
            while (frame := self._line.receive()) is not None:
                if frame[0]["kind"] == "all":
                    with self._changed:
                        self._answers[frame[0]["name"]] = frame[0]["parts"]
                        self._changed.notify_all()
                elif frame[0]["kind"] == "stop":
                    self.stop_asked = True
                else:
                    message = frame[0]
                    break
        except (OSError, ValueError) as error:
            message = {**message, "reason": f"the line to the driver broke: {error}."}
        self._ended(message)

    def _ended(self, message: Message) -> None:
        """The generation is over: whoever waits for it is told; who does not listen is ended."""
        with self._changed:
            if self._over is None:
                self._over = message
            self._changed.notify_all()
        if self._forced and not self._closed.wait(_GRACE_S):
            print(f"kindling: {message['reason']} This process is ended.", file=sys.stderr, flush=True)
            os._exit(_PROCESS_ENDED)


def _reach(address: Address) -> Line:
    for again in range(_CONNECT_TRIES):
        try:
            return connect(address)
        except OSError as error:
            if again + 1 == _CONNECT_TRIES:
                raise SessionError(
                    f"a worker cannot reach the driver at {address.host}:{address.port}: {error}. "
                    "Let executors connect to the driver's ports, or set spark.driver.host to an address they reach."
                ) from error
            time.sleep(0.5)
    raise AssertionError
