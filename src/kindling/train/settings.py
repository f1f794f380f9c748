"""Settings of a training, checked at birth, and the frozen spec that travels to the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError
from kindling.train.line import Address
from kindling.train.policy import Checkpoints

if TYPE_CHECKING:
    from kindling.ship import ModuleSpec

ON_ERROR = ("fail", "drop")
PRECISIONS = ("fp32", "bf16")
SHUFFLES = ("rows", "blocks")
SCHEDULE_EVERY = ("epoch", "step")
SHORTEST_TIMEOUT_S = 2.0
"""Workers are heard every second."""
_SILENCE_S = 60.0
_AFTER_EACH_EPOCH = Checkpoints()


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """End the training when a figure ceases to improve, and keep the weights that were best by it.

    >>> EarlyStopping(patience=0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: patience=0 is no count. Use a whole number, 1 or more.
    >>> EarlyStopping(metric="accuracy").smaller_is_better, EarlyStopping().smaller_is_better
    (False, True)
    """

    patience: int = 3
    """Measurements in a row without progress after which training ends."""
    min_delta: float = 0.0
    """Progress is a change for the better by more than this, in the figure's own unit."""
    metric: str = "loss"
    """The figure to watch: of the validation where there is one, else of the epoch (`"loss"`)."""
    mode: str | None = None
    """`"min"` where small is good, `"max"` where large is; None: small for a loss or an error, else large."""
    restore_best: bool = True
    """Give back the weights of the best measurement; False: those of the last step."""

    def __post_init__(self) -> None:
        _count("patience", self.patience)
        if not _is_number(self.min_delta) or self.min_delta < 0:
            raise ConfigError("min_delta", self.min_delta, "is no least change", "Use 0 or more")
        if self.mode not in (None, "min", "max"):
            raise ConfigError("mode", self.mode, "is no direction", "Use 'min', 'max', or leave it out")

    @property
    def smaller_is_better(self) -> bool:
        if self.mode is not None:
            return self.mode == "min"
        return self.metric.endswith(("loss", "error"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the training loop needs to know; plain numbers.

    >>> LoopSettings(clip_norm=0.0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: clip_norm=0.0 leaves nothing of a gradient. Use a number above 0.
    """

    epochs: int = 10
    """Passes over the data."""
    batch_size: int = 32
    """Rows that go through the net at a time on one worker; a step's rows are this times `accumulate` times the
    workers."""
    seed: int = 0
    """Decides the order of rows in each epoch and every random draw of the net (dropout, say)."""
    accumulate: int = 1
    """A step's rows go through the net in so many parts, one after the other; their gradients are added."""
    clip_norm: float | None = None
    """Largest Euclidean norm of all gradients together; larger ones are scaled down to it."""
    clip_value: float | None = None
    """Largest size of each number of a gradient; larger ones are cut to it (before `clip_norm`)."""
    bucketed: bool = True
    """Where an input is a sequence, rows of like length come into the same steps, so that there is less padding."""
    shuffle: str = "rows"
    """`"blocks"`: rows are put in order on the worker's disk, and an epoch takes a megabyte of them at a time."""
    precision: str = "fp32"
    """`"bf16"`: matrix products and convolutions run in bfloat16 (torch's autocast); weights stay float32."""
    schedule_every: str = "epoch"
    """Whether the schedule moves on after each `"epoch"` or after each `"step"`."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise in a straight line to what they are set to."""
    ema_decay: float | None = None
    """Keep a running average of the weights, `average = decay * average + (1 - decay) * weights` after every step; it
    is what is validated and returned."""
    max_steps: int | None = None
    """End after so many steps, wherever in an epoch that is."""
    max_seconds: float | None = None
    """End at the first step after so many seconds of training, all attempts together; workers compare about once a
    second."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch ends with one in any case."""
    validate_every_steps: int | None = None
    """Steps between two further validations."""
    early_stopping: EarlyStopping | None = None
    checkpoints: Checkpoints = _AFTER_EACH_EPOCH
    """When checkpoints are written, and which of them stay."""

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size", "accumulate", "validate_every"):
            _count(field, getattr(self, field))
        for field in ("max_steps", "validate_every_steps"):
            if getattr(self, field) is not None:
                _count(field, getattr(self, field))
        if not isinstance(self.seed, int):
            raise ConfigError("seed", self.seed, "is not a whole number", "Use any int")
        _count("warmup_steps", self.warmup_steps, least=0)
        for field in ("clip_norm", "clip_value"):
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and value > 0):
                raise ConfigError(field, value, "leaves nothing of a gradient", "Use a number above 0")
        if self.max_seconds is not None and not (_is_number(self.max_seconds) and self.max_seconds > 0):
            raise ConfigError("max_seconds", self.max_seconds, "leaves no time to train", "Use a number above 0")
        if self.precision not in PRECISIONS:
            raise ConfigError("precision", self.precision, "is none to train in", f"Use one of {PRECISIONS}")
        if self.shuffle not in SHUFFLES:
            raise ConfigError("shuffle", self.shuffle, "is no way to shuffle", f"Use one of {SHUFFLES}")
        if self.schedule_every not in SCHEDULE_EVERY:
            raise ConfigError(
                "schedule_every", self.schedule_every, "is no time to move on", f"Use one of {SCHEDULE_EVERY}"
            )
        if self.ema_decay is not None and not (_is_number(self.ema_decay) and 0 <= self.ema_decay < 1):
            raise ConfigError("ema_decay", self.ema_decay, "is no share of the past", "Use 0.999, say: 0 up to below 1")


def _count(field: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(field, value, "is no count", f"Use a whole number, {least} or more")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """What the user gives as Python objects; travels as bytes (`WorkerSpec.code`)."""

    optimizer: Callable[..., Any]
    loss: Any
    """An `Objective`, or one loss function."""
    strategy: Any
    schedule: Callable[..., Any] | None = None
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """All that one worker needs; frozen, picklable, holds no Spark object and no torch object.

    User callables travel as bytes that are opened only after the thread settings stand: unpickling an optimizer class
    imports torch.
    """

    run: str
    """Of this call alone: events carry it."""
    name: str
    """The run's name, for people."""
    workers: int
    threads: int
    validates: bool
    """Whether there are rows to measure on."""
    loop: LoopSettings
    global_batch: int
    """Rows of one step over all workers; it stays when a run goes on with another number of them."""
    resume: str
    """`"anyway"`: checkpoints are used although the data are not what they were."""
    new_optimizer: bool
    """The optimizer's settings are not those of the checkpoints, and count instead of them."""
    module: ModuleSpec
    signature: Mapping[str, Any]
    preparation: Mapping[str, Any]
    """Of the part that is trained: its inputs and its targets."""
    frozen: frozenset[str]
    classes: int | None
    augment: Mapping[str, Any]
    """By input, the augmentations of its images as JSON."""
    code: bytes
    """cloudpickle of a `UserCode`."""
    run_directory: str | None
    """A place that workers may see; each says at the meeting whether it does."""
    directory_asked: bool
    """Whether the user named it: then a worker that cannot see it is worth a warning."""
    beacon: str
    """Content of the file `beacon` in the run directory: proof that it is the driver's."""
    listener: Address | None
    """Where the workers meet; None: in Spark's barrier."""
    timeout_s: float = 600.0
    """A worker without progress for so long is given up, and all are started again."""
    may_be_stopped: bool = False
    """Whether the driver may ask for an end (`Listener.stop`)."""


def silence_s(timeout_s: float) -> float:
    """A worker that is not heard of for so long is lost; those that are well are heard every second.

    >>> silence_s(600.0)
    60.0
    """
    return min(_SILENCE_S, timeout_s)
