"""Settings of a training, checked at birth, and the frozen spec that travels to the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError
from kindling.train.events import ListenerAddress

if TYPE_CHECKING:
    from kindling.ship import ModuleSpec

ON_ERROR = ("fail", "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the training loop needs to know; plain numbers."""

    epochs: int = 10
    """Passes over the data."""
    batch_size: int = 32
    """Rows of one step on one worker; the global batch is this times the workers."""
    seed: int = 0
    """Decides the order of rows in each epoch and every random draw of the net (dropout, say)."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints."""
    checkpoints_kept: int = 2
    """The newest so many checkpoints stay on disk."""

    def __post_init__(self) -> None:
        for field, least in (("epochs", 1), ("batch_size", 1), ("checkpoint_every", 1), ("checkpoints_kept", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(field, value, "is no count to train with", f"Use a whole number, {least} or more")
        if not isinstance(self.seed, int):
            raise ConfigError("seed", self.seed, "is not a whole number", "Use any int")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """All that one worker needs; frozen, picklable, holds no Spark object and no torch object.

    User callables travel as bytes that are opened only after the thread settings stand: unpickling an optimizer class
    imports torch.
    """

    run: str
    workers: int
    threads: int
    loop: LoopSettings
    module: ModuleSpec
    signature: Mapping[str, Any]
    preparation: Mapping[str, Any]
    """Of the part that is trained: its inputs and its targets."""
    frozen: frozenset[str]
    classes: int | None
    callables: bytes
    """cloudpickle of (optimizer factory, loss, strategy)."""
    run_directory: str | None
    """A place that workers may see; each says at the meeting whether it does."""
    directory_asked: bool
    """Whether the user named it: then a worker that cannot see it is worth a warning."""
    beacon: str
    """Content of the file `beacon` in the run directory: proof that it is the driver's."""
    listener: ListenerAddress | None
    meeting_timeout_s: float = 120.0
    collective_timeout_s: float = 600.0
