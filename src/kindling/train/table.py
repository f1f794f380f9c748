"""The driver's table: which worker sits in which seat, and when a meeting is over. A state machine, nothing else.

Every method says what has happened and when, and returns what is to be done. Sockets, threads and clocks are in
`listener.py`. A *generation* is one try of all workers together: it ends when one of them is lost, and then all of them
end, so that Spark starts them again, and they meet in the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kindling.errors import SessionError, to_wire

OPEN, DONE, FAILED = "open", "done", "failed"
TRAINING = "train"
"""The phase in which a worker must make progress; in others it waits for Spark."""


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a worker."""

    peer: int
    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kill:
    """Have Spark kill a task whose worker does not listen."""

    task: int
    reason: str


Deed = Send | Kill


@dataclass(slots=True)
class _Seat:
    peer: int
    task: int
    heard: float
    beat: Mapping[str, Any] = field(default_factory=dict)

    def idle_s(self, now: float) -> float:
        """Seconds since the worker's last progress, so far as is known."""
        return float(self.beat.get("idle_s", 0.0)) + now - self.heard


class Table:
    """Seats for `workers` workers.

    Args:
        silence_s: a worker not heard of for so long is lost.
        stall_s: a worker that trains and makes no progress for so long, while it waits for nobody, is lost.
        seats_s: so long the first worker of a generation waits for the last one to be started.
        copies: Spark may run two copies of one worker (speculation): the second waits while the first lives.

    >>> table = Table(2)
    >>> table.hello(peer=7, rank=0, task=70, now=0.0)
    [Send(peer=7, message={'kind': 'seat', 'generation': 0})]
    >>> _ = table.hello(peer=8, rank=1, task=71, now=0.1)
    >>> table.lost(peer=8, now=0.2)
    [Send(peer=7, message={'kind': 'over', 'reason': 'worker 1 died: its connection broke.', 'final': None})]
    >>> table.generation
    1
    """

    def __init__(
        self,
        workers: int,
        *,
        silence_s: float = 60.0,
        stall_s: float = 600.0,
        seats_s: float = 600.0,
        copies: bool = False,
    ) -> None:
        self.workers, self.generation, self.state = workers, 0, OPEN
        self.reasons: list[str] = []
        """Why each generation so far came to its end."""
        self.final: str | None = None
        """The error that ended the run for good, as `errors.to_wire` writes it."""
        self._silence_s, self._stall_s, self._seats_s, self._copies = silence_s, stall_s, seats_s, copies
        self._seats: dict[int, _Seat] = {}
        self._bench: list[tuple[int, int, int]] = []
        self._posts: dict[str, dict[int, str]] = {}
        self._stopping = False
        self._since = 0.0

    def hello(self, *, peer: int, rank: int, task: int, now: float) -> list[Deed]:
        """A worker has come: it gets its seat, or waits while another copy of it lives.

        Args:
            task: Spark's number of the task, which grows with every task that it starts.
        """
        if self.state != OPEN:
            return [Send(peer, {"kind": "closed", "final": self.final})]
        deeds: list[Deed] = []
        sitting = self._seats.get(rank)
        if sitting is not None:
            if task < sitting.task:
                return [Send(peer, {"kind": "over", "reason": f"worker {rank} was started again.", "final": None})]
            if self._copies:
                self._bench.append((peer, rank, task))
                return []
            deeds += self._over(f"worker {rank} was started again.")
        if not self._seats:
            self._since = now
        self._seats[rank] = _Seat(peer, task, now)
        seated = [Send(peer, {"kind": "seat", "generation": self.generation})]
        return [*deeds, *seated, *([Send(peer, {"kind": "stop"})] if self._stopping else [])]

    def stop(self) -> list[Deed]:
        """The training is to end: those who sit are asked, and so is everyone who comes later."""
        self._stopping = True
        return [Send(seat.peer, {"kind": "stop"}) for seat in self._seats.values()]

    def post(self, *, peer: int, name: str, text: str, now: float) -> list[Deed]:
        """A worker's part of a gathering: when all parts are there, everyone gets all of them."""
        rank = self._heard(peer, now)
        if rank is None:
            return []
        parts = self._posts.setdefault(name, {})
        parts[rank] = text
        if len(parts) < self.workers:
            return []
        if name == "finish":
            self.state = DONE
        answer = {"kind": "all", "name": name, "parts": [parts[rank] for rank in range(self.workers)]}
        return [Send(seat.peer, answer) for seat in self._seats.values()]

    def beat(self, *, peer: int, beat: Mapping[str, Any], now: float) -> list[Deed]:
        """A sign of life: `phase`, `steps`, `idle_s`, `waits` (for the others), `where` (in the code)."""
        rank = self._heard(peer, now)
        if rank is not None:
            self._seats[rank].beat = beat
        return []

    def heard(self, *, peer: int, now: float) -> bool:
        """Anything else that comes from a worker; whether it belongs to this generation."""
        return self._heard(peer, now) is not None

    def fail(self, *, peer: int, reason: str, final: str | None, now: float) -> list[Deed]:
        """A worker ends: with `final`, for a reason that a further try cannot cure; without, to be started again."""
        rank = self._heard(peer, now)
        if rank is None or self.state != OPEN:
            return []
        del self._seats[rank]
        return self._over(f"worker {rank} failed: {reason}", final)

    def lost(self, *, peer: int, now: float) -> list[Deed]:
        """A worker's line has ended, and it has not said why."""
        self._bench = [waiting for waiting in self._bench if waiting[0] != peer]
        rank = self._heard(peer, now)
        if rank is None or self.state != OPEN:
            return []
        del self._seats[rank]
        return [*self._over(f"worker {rank} died: its connection broke."), *self._seat_bench(now)]

    def tick(self, now: float) -> list[Deed]:
        """Time has passed."""
        if self.state != OPEN or not self._seats:
            return []
        for rank, seat in self._seats.items():
            if now - seat.heard > self._silence_s:
                reason = f"worker {rank} has not been heard of for {now - seat.heard:.0f} s"
                reason += f" (last seen: {self._described(seat)})." if seat.beat else "."
                del self._seats[rank]
                return [Kill(seat.task, reason), *self._over(reason), *self._seat_bench(now)]
        if len(self._seats) < self.workers:
            return self._nobody_comes() if now - self._since > self._seats_s else []
        busy = [seat for seat in self._seats.values() if not seat.beat.get("waits")]
        stuck = [
            seat
            for seat in busy or self._seats.values()
            if seat.beat.get("phase") == TRAINING and seat.idle_s(now) > self._stall_s
        ]
        if stuck and (busy or len(stuck) == self.workers):
            everyone = "; ".join(f"worker {r} {self._described(s)}" for r, s in sorted(self._seats.items()))
            return [*self._over(f"no progress for {self._stall_s:.0f} s: {everyone}."), *self._seat_bench(now)]
        return []

    def _nobody_comes(self) -> list[Deed]:
        there = len(self._seats)
        error = SessionError(
            f"only {there} of {self.workers} workers had a task slot within {self._seats_s:.0f} s. "
            f"Use workers={there}, a larger cluster, or a larger timeout_s."
        )
        return self._over(str(error), to_wire(error))

    def _described(self, seat: _Seat) -> str:
        beat = seat.beat
        doing = "waits for the others" if beat.get("waits") else f"is in {beat.get('where') or 'unknown code'}"
        return f"{doing}, {beat.get('steps', 0)} batches after its start"

    def _heard(self, peer: int, now: float) -> int | None:
        """The rank of a worker of this generation, of whom there is a sign of life now; None for any other."""
        for rank, seat in self._seats.items():
            if seat.peer == peer:
                seat.heard = now
                return rank
        return None

    def _over(self, reason: str, final: str | None = None) -> list[Deed]:
        """End the generation; those who still sit are told."""
        told: Sequence[Deed] = [
            Send(seat.peer, {"kind": "over", "reason": reason, "final": final}) for seat in self._seats.values()
        ]
        self.reasons.append(reason)
        if final is not None:
            self.state, self.final = FAILED, final
            told = [*told, *(Send(peer, {"kind": "closed", "final": final}) for peer, _, _ in self._bench)]
            self._bench = []
        self.generation += 1
        self._seats, self._posts = {}, {}
        return list(told)

    def _seat_bench(self, now: float) -> list[Deed]:
        waiting, self._bench = self._bench, []
        return [deed for peer, rank, task in waiting for deed in self.hello(peer=peer, rank=rank, task=task, now=now)]
