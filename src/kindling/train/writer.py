"""Checkpoints in the background: a step waits for one copy in memory, a thread does the rest.

`Writer.take` copies a worker's tensors into buffers that are used again and again. Its thread then digests them, learns
on the `Board` which of them rank 0 has too, writes the others, and rank 0 declares the whole when everyone's part is on
disk. A worker that cannot write (a full disk) says so on the board: that checkpoint is given up, training goes on.
Formats and files are in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kindling.errors import KindlingError, StorageError
from kindling.storage import Place
from kindling.train import checkpoint
from kindling.train.checkpoint import Part
from kindling.train.policy import Checkpoints

_PATIENCE_S = 600.0
"""How long the threads wait for each other before a checkpoint is given up."""
_PARTING_S = 20.0
"""How long a worker that ends waits for a file that is just being written."""
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.2


class Board(Protocol):
    """Where the writing threads of all workers leave each other notes."""

    def post(self, key: str, value: bytes) -> None: ...

    def look(self, key: str) -> bytes | None: ...

    def forget(self, key: str) -> None: ...


class LocalBoard:
    """A board for the threads of one process.

    >>> board = LocalBoard()
    >>> board.post("a", b"1")
    >>> board.look("a"), board.look("b")
    (b'1', None)
    """

    def __init__(self) -> None:
        self._notes: dict[str, bytes] = {}

    def post(self, key: str, value: bytes) -> None:
        self._notes[key] = value

    def look(self, key: str) -> bytes | None:
        return self._notes.get(key)

    def forget(self, key: str) -> None:
        self._notes.pop(key, None)


class StoreBoard:
    """A board in the key-value store that a `torch.distributed` group meets through."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def post(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def look(self, key: str) -> bytes | None:
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def forget(self, key: str) -> None:
        self._store.delete_key(key)


class _GivenUpError(Exception):
    """The writer was stopped, or waited for too long."""


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]
    copy_s: float


class Writer:
    """One worker's checkpoints. All workers `take` at the same steps."""

    def __init__(
        self,
        place: Place,
        board: Board,
        policy: Checkpoints,
        *,
        rank: int,
        world: int,
        attempt: int = 0,
        on_event: Callable[..., None] = lambda *_, **__: None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """
        Args:
            on_event: told `("checkpoint" or "warning", step=, **data)`, from the writing thread.
        """
        self._place, self._board, self._policy = place, board, policy
        self._rank, self._world, self._attempt = rank, world, attempt
        self._on_event, self._patience_s = on_event, patience_s
        self._buffers: dict[str, Tensor] = {}
        self._scores: dict[int, float | None] | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def take(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> float:
        """Copy a state and write it in the background; waits first where the last one is not yet on disk.

        Args:
            about: JSON values for the manifest; `score`, where there is one, is how good the weights are, less is
                better.
        Returns: seconds that the copy took.
        Raises: FormatError, when the state holds anything but tensors, numbers and text.
        """
        self.wait()
        began = time.perf_counter()
        record, live = checkpoint.split_state(state)
        tensors = {name: self._copied(name, tensor) for name, tensor in live.items()}
        copy_s = time.perf_counter() - began
        job = _Job(step, record, tensors, dict(about), copy_s)
        self._thread = threading.Thread(target=self._run, args=(job,), name="kindling-checkpoint", daemon=True)
        self._thread.start()
        return copy_s

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        """Give up what is being written: this worker or another one is about to end."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_PARTING_S)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers[name] = buffer
        return buffer.copy_(tensor)

    # ------------------------------------------------------------------------------------------------ in the thread

    def _run(self, job: _Job) -> None:
        try:
            began = time.perf_counter()
            if self._rank == 0:
                self._declare(job)
                size = sum(tensor.nbytes for tensor in job.tensors.values())
                seconds = {"copy_s": job.copy_s, "seconds": time.perf_counter() - began}
                self._on_event("checkpoint", step=job.step, bytes=size, **seconds, **_told(job.about))
            else:
                self._contribute(job)
        except _GivenUpError:
            return
        except (KindlingError, OSError, RuntimeError) as error:  # the store's connection ends with a RuntimeError
            if not self._stopped.is_set():
                self._on_event("warning", step=job.step, text=f"checkpoint {job.step} could not be written: {error}")

    def _key(self, step: int, of: object) -> str:
        return f"checkpoint-{self._attempt}-{step}-{of}"

    def _declare(self, job: _Job) -> None:
        """Rank 0: write what all have, wait for the others' parts, write the manifest, tidy up."""
        digests = {name: checkpoint.tensor_digest(tensor) for name, tensor in job.tensors.items()}
        if self._world > 1:
            record = {key: checkpoint.value_digest(value) for key, value in job.record.items()}
            self._board.post(self._key(job.step, "all"), json.dumps({"tensors": digests, "record": record}).encode())
        name = f"{self._attempt:03d}-all.safetensors"
        problems = []
        try:
            checkpoint.write_tensors(self._place, job.step, name, job.tensors)
        except (StorageError, OSError) as error:
            problems.append(f"worker 0: {error}")
        parts = [Part(job.record, digests, name)]
        keys = [self._key(job.step, rank) for rank in range(1, self._world)]
        for rank, key in enumerate(keys, start=1):
            body = json.loads(self._found(key))
            if "problem" in body:
                problems.append(f"worker {rank}: {body['problem']}")
            else:
                parts.append(Part.from_json(body))
        for key in (*keys, self._key(job.step, "all")) if keys else ():
            with contextlib.suppress(RuntimeError):  # not every kind of store can forget
                self._board.forget(key)
        if problems:
            with contextlib.suppress(KindlingError, OSError):
                checkpoint.discard(self._place, job.step)
            raise StorageError("; ".join(problems))
        checkpoint.write_manifest(self._place, job.step, parts, {"attempt": self._attempt, **job.about})
        self._tidy(job)

    def _contribute(self, job: _Job) -> None:
        """Another rank: write what rank 0 has not, and say so."""
        digests = {name: checkpoint.tensor_digest(tensor) for name, tensor in job.tensors.items()}
        common = json.loads(self._found(self._key(job.step, "all")))
        own = {name: digest for name, digest in digests.items() if common["tensors"].get(name) != digest}
        record = {k: v for k, v in job.record.items() if common["record"].get(k) != checkpoint.value_digest(v)}
        name = f"{self._attempt:03d}-rank-{self._rank:04d}.safetensors" if own else None
        try:
            if name is not None:
                checkpoint.write_tensors(self._place, job.step, name, {key: job.tensors[key] for key in own})
            body = Part(record, own, name).to_json()
        except (StorageError, OSError) as error:
            body = {"problem": str(error)}
        self._board.post(self._key(job.step, self._rank), json.dumps(body).encode())

    def _found(self, key: str) -> bytes:
        """What another worker posts; waits for it."""
        deadline, pause = time.monotonic() + self._patience_s, _FIRST_LOOK_S
        while (note := self._board.look(key)) is None:
            if self._stopped.wait(pause):
                raise _GivenUpError
            if time.monotonic() > deadline:
                raise StorageError(f"another worker has not written its part in {self._patience_s:.0f} s")
            pause = min(2 * pause, _LAST_LOOK_S)
        return note

    def _tidy(self, job: _Job) -> None:
        """Remove what is not worth keeping. That it cannot be removed is worth a warning, no more."""
        try:
            if self._scores is None:
                self._scores = {step: _score(self._place, step) for step in checkpoint.steps_on_disk(self._place)}
            self._scores[job.step] = job.about.get("score")
            kept = self._policy.worth_keeping(self._scores)
            self._scores = {step: score for step, score in self._scores.items() if step in kept}
            checkpoint.keep_only(self._place, kept, job.step)
        except (KindlingError, OSError) as error:
            self._on_event("warning", step=job.step, text=f"old checkpoints could not be removed: {error}")


def _score(place: Place, step: int) -> float | None:
    try:
        score = checkpoint.read_manifest(place, step).get("score")
    except KindlingError:
        return None  # damaged: it was passed over already
    return None if score is None else float(score)


def _told(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in ("epoch", "score") if key in about}
