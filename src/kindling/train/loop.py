"""The training loop of one worker: epochs, steps, validation. No Spark, no sockets, no files.

Rows come from `Feed`, agreement between workers from a strategy through `Comms`, and what happens is told to `Hooks`.
Around a step stand rooms of their own: the loss (`objective.py`), what is measured (`figures.py`), learning rates
(`rates.py`), the running average of the weights (`running_average.py`), reasons to end early (`stopping.py`). Run with
`SoloComms` it is plain torch training.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kindling import surgery
from kindling.errors import ConfigError, TrainingError, did_you_mean
from kindling.prepare import ImageStep, Preparation, SequenceStep
from kindling.prepare.augment import Augmentation, RowDraws, augmented
from kindling.signature import Signature
from kindling.train import devices
from kindling.train.feed import Feed, Slice
from kindling.train.figures import Figures, Metric
from kindling.train.objective import LossFunction, Objective
from kindling.train.order import OrderPlan, mix, plan_order
from kindling.train.policy import Timetable
from kindling.train.rates import Rates, ScheduleFactory
from kindling.train.row_dropout import seed_by_row
from kindling.train.running_average import RunningAverage
from kindling.train.settings import EarlyStopping, LoopSettings
from kindling.train.stopping import Consent, Watch, observe
from kindling.train.strategies import Comms, Replica, State, Strategy

_VALIDATION_BATCH = 256
_STEP_EVENT_EVERY_S = 0.25
_DROPOUT, _AUGMENT = 1, 2
"""Tell draws for different uses apart."""


class Hooks(Protocol):
    """What the loop tells the world, and the one thing it asks."""

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        """Something happened."""

    def busy(self) -> bool:
        """Whether this worker's last checkpoint is still on its way to the disk."""

    def on_checkpoint(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """A state from which the loop can go on, whole on this worker; every worker calls this at the same step.

        `about` are JSON values: the epoch at work, and, where these very weights were measured, `metrics` and the
        `score` by which the best are kept, less is better.
        """

    def stop_asked(self) -> bool:
        """Whether somebody wants the training to end; one worker that knows is enough."""


class Clock:
    """What an epoch has cost: seconds, in all and by kind of work, and bytes. It goes on from what was spent before."""

    def __init__(self, comms: Comms, spent: Mapping[str, Any] | None = None) -> None:
        self._spent = {"seconds": 0.0, "data_s": 0.0, "compute_s": 0.0, "communicate_s": 0.0, "bytes_sent": 0}
        self._spent.update(spent or {})
        self._comms, self._sent = comms, comms.bytes_sent
        self._last = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Book the time since the last lap under `kind`."""
        now = time.perf_counter()
        self._spent[f"{kind}_s"] += now - self._last
        self._spent["seconds"] += now - self._last
        self._last = now

    def spent(self) -> dict[str, Any]:
        """So far, up to the last lap."""
        return {**self._spent, "bytes_sent": int(self._spent["bytes_sent"]) + self._comms.bytes_sent - self._sent}


@dataclass
class Progress:
    """How far a training has come; with module, optimizer and schedule all that a checkpoint needs."""

    epoch: int = 1
    """The epoch at work, from 1; past the last one when training is over."""
    index: int = 0
    """Steps of it that are done."""
    sums: list[list[float]] = field(default_factory=list)
    """Of this worker's rows of the epoch so far, for each term of the objective: loss times mass, and mass."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """Of this epoch, each with its step."""
    spent: dict[str, Any] = field(default_factory=dict)
    """On this epoch before this attempt: see `Clock`."""
    seconds: float = 0.0
    """Trained before this attempt."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per epoch."""
    watch: Watch = field(default_factory=Watch)
    stopped: str = ""
    """One of `stopping.REASONS`."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """From a checkpoint."""
        lists = {name: list(state[name]) for name in ("history", "validations")}
        return cls(**{**state, **lists, "watch": Watch(*state["watch"])})

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {name: list(own[name]) for name in ("history", "validations")}
        return {**own, **lists, "watch": tuple(self.watch)}


@dataclass(kw_only=True)
class Loop:
    """Everything one worker trains with. `run` starts at the beginning or goes on from a checkpoint's state."""

    settings: LoopSettings
    replica: Replica
    strategy: Strategy
    comms: Comms
    signature: Signature
    preparation: Preparation
    loss: LossFunction | Objective
    feed: Feed
    counts_V: np.ndarray
    """Rows of each virtual shard over all workers."""
    frozen: frozenset[str]
    hooks: Hooks
    validation: Feed | None = None
    """This worker's rows of the validation data; None where there is none at all, on every worker."""
    classes: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    augment: Mapping[str, Sequence[Augmentation]] = field(default_factory=dict)
    """By input, what is done to its images in training."""
    schedule: ScheduleFactory | None = None
    device: str = devices.CPU
    """Where the module is and the steps are computed."""
    may_be_asked: bool = False
    """Whether `Hooks.stop_asked` is worth asking; the same on every worker."""
    new_optimizer: bool = False
    """Of a checkpoint's optimizer take what it has learnt, and not its settings (rates, decay)."""
    global_batch: int | None = None
    """Rows of one step over all workers; None: what the settings say for one worker, for each."""

    def run(self, restored: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Train; returns one record per epoch. The module then holds the weights that are the result.

        Raises: TrainingError, when the loss is no longer a number or the loss function fails; ConfigError.
        """
        settings = self.settings
        self._began = time.monotonic()
        self._state: State = self.strategy.init(self.replica)
        self._average = None if settings.ema_decay is None else RunningAverage(settings.ema_decay)
        self._best: dict[str, Tensor] | None = None
        self._progress = Progress()
        self._timetable = Timetable(settings.checkpoints)
        total = settings.epochs
        if settings.schedule_every == "step":
            total = min(total * self._plan.steps, settings.max_steps or total * self._plan.steps)
        self._rates = Rates(
            self.replica.optimizer,
            self.schedule,
            every=settings.schedule_every,
            warmup_steps=settings.warmup_steps,
            total_steps=total,
        )
        if restored is not None:
            self._restore(restored)
        self._draws = seed_by_row(self.replica.module)
        progress = self._progress
        until_s = None if settings.max_seconds is None else self._began + settings.max_seconds - progress.seconds
        asked = self.hooks.stop_asked if self.may_be_asked else None
        self._consent = Consent(self.comms, until_s=until_s, asked=asked)
        if restored is not None and progress.stopped != "early_stopping":
            # A limit may have been raised since.
            progress.stopped = self._reason_to_stop()
            if not progress.stopped and progress.history:
                progress.history[-1].pop("stopped", None)
        try:
            self._state = self.strategy.begin(self.replica, self._state, self.comms)
            self.hooks.on_event("ready", step=self._step, epoch=progress.epoch - 1)
            while progress.epoch <= settings.epochs and (progress.index or not progress.stopped):
                self._epoch()
        finally:
            self.strategy.close(self.replica)
        self._finish()
        return progress.history

    @cached_property
    def _objective(self) -> Objective:
        return Objective.of(self.loss, self.signature, self.preparation)

    @cached_property
    def _plan(self) -> OrderPlan:
        rows = self.global_batch or self.settings.batch_size * self.settings.accumulate * self.comms.world
        return plan_order(self.counts_V, self.comms.world, self.comms.rank, rows)

    @property
    def _step(self) -> int:
        """Steps done since the beginning of the run."""
        return (self._progress.epoch - 1) * self._plan.steps + self._progress.index

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All that this worker needs to go on from here, between any two steps: tensors and JSON values.

        Every worker must call this at the same step: the strategy brings to rest what is in flight.
        """
        self._state = self.strategy.settle(self.replica, self._state, self.comms)
        progress = self._progress.to_state()
        progress["seconds"] += time.monotonic() - self._began
        progress["spent"] = self._clock.spent() if self._progress.index else {}
        return {
            "module": dict(self.replica.module.state_dict()),
            "optimizer": self.replica.optimizer.state_dict(),
            "schedule": self._rates.state(),
            "strategy": self._state,
            "average": self._average.values if self._average is not None else None,
            "best": self._best,
            "progress": progress,
        }

    def _checkpoint(self, step: int, figures: Mapping[str, Any] | None = None, *, last: bool = False) -> None:
        """Hand out a state; put off, unless it is the last, while somebody's former one is still being written.

        Args: figures: what these very weights were measured to give.
        """
        if not last and any(int(seen[0]) for seen in self.comms.gather(np.array([self.hooks.busy()], np.int64))):
            return
        about: dict[str, Any] = {"epoch": self._progress.epoch}
        if figures is not None:
            about |= {"metrics": dict(figures), "score": self._score(figures)}
        self.hooks.on_checkpoint(step, self.state(), about)
        self._timetable.written()

    def _score(self, figures: Mapping[str, Any]) -> float | None:
        """How good weights are, less is better: by the figure that early stopping watches, else by their loss."""
        early = self.settings.early_stopping or EarlyStopping()
        figure = figures.get(early.metric)
        return None if figure is None else float(figure) if early.smaller_is_better else -float(figure)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.replica.module.load_state_dict(state["module"])
        optimizer = self.replica.optimizer
        own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        if self.new_optimizer:
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)
        self._rates.restore(state["schedule"])
        self._state = devices.moved(dict(state["strategy"]), self.device)
        if self._average is not None:
            self._average.values = devices.moved(list(state["average"] or []), self.device)
        self._best = dict(state["best"]) if state["best"] is not None else None
        self._progress = Progress.of(state["progress"])

    def _finish(self) -> None:
        """Leave in the module what is to be returned."""
        with torch.no_grad():
            if self._best is not None:
                self.replica.module.load_state_dict(self._best)
            elif self._average is not None and self._average.values:
                for parameter, value in zip(self.replica.parameters(), self._average.values, strict=True):
                    parameter.copy_(value)

    # --------------------------------------------------------------------------------------------------- epochs

    def _epoch(self) -> None:
        """Train to the end of the epoch at work, or until a reason to stop comes up."""
        comms, settings, progress, plan = self.comms, self.settings, self._progress, self._plan
        surgery.set_training(self.replica.module, self.frozen)
        self._clock = clock = Clock(comms, progress.spent)
        slices = self.feed.epoch(plan, comms.rank, progress.epoch, settings.seed, progress.index, self._length)
        told = -math.inf
        while progress.index < plan.steps and not progress.stopped:
            rows_W = plan.rows_TW[progress.index]
            value = self._train_step(slices, rows_W, clock)
            progress.index += 1
            last = progress.index == plan.steps
            now = time.perf_counter()
            if comms.rank == 0 and (now - told > _STEP_EVENT_EVERY_S or last):
                told = now
                figures = {"loss": value, "rows": self._rows_done(), "of": int(self.counts_V.sum())}
                self.hooks.on_event(
                    "step", step=self._step, epoch=progress.epoch, keep=self._step == 1, lr=self._rates.now(), **figures
                )
            if not last:
                self._between_steps()
            limit = self._reason_to_stop()
            if limit and not last and not progress.stopped:
                # Before the epoch is closed: should the run be given more time, the rest of it is still to come.
                self._checkpoint(self._step, last=True)
            progress.stopped = progress.stopped or limit
        self._state = self.strategy.on_epoch(self.replica, self._state, comms)
        self._average_alike()
        self._close_epoch()

    def _close_epoch(self) -> None:
        settings, progress = self.settings, self._progress
        loss = self._epoch_loss()
        self._clock.lap("communicate")
        rows, spent = self._rows_done(), self._clock.spent()
        record: dict[str, Any] = {
            "epoch": progress.epoch,
            "loss": loss,
            "rows": rows,
            "steps": progress.index,
            "lr": self._rates.now(),
            "rows_per_s": rows / spent["seconds"],
            **spent,
        }
        if figures := self.strategy.figures(self._state):
            record["strategy"] = figures
        due = (
            progress.epoch == settings.epochs or bool(progress.stopped) or not progress.epoch % settings.validate_every
        )
        *_, newest = progress.validations or [{"step": 0}]
        if self.validation is None:
            self._observe({"loss": record["loss"]}, alike=True)
        elif due and newest["step"] < self._step:
            record["validation"] = self._validate(alike=True)
        elif due:
            record["validation"] = {name: figure for name, figure in newest.items() if name != "step"}
        if settings.validate_every_steps is not None:
            record["validations"] = progress.validations
        if progress.stopped:
            record["stopped"] = progress.stopped
        self._rates.after("epoch")
        progress.history.append(record)
        step, whole = self._step, progress.index == self._plan.steps
        self.hooks.on_event("epoch", **{**record, "step": step})
        if progress.stopped:
            self.hooks.on_event("stopped", step=step, epoch=progress.epoch, reason=progress.stopped)
        progress.epoch, progress.index, progress.sums = progress.epoch + 1, 0, []
        progress.validations, progress.spent = [], {}
        over = progress.epoch > settings.epochs or bool(progress.stopped)
        due = self._timetable.due(step, self.comms, epoch_end=progress.epoch - 1)
        if (over or due) and (whole or progress.stopped == "early_stopping"):
            self._checkpoint(step, record.get("validation"), last=over)

    def _epoch_loss(self) -> float:
        """The mean loss over all workers' rows of the epoch, as the steps found it."""
        own = np.array(self._progress.sums or [[0.0, 0.0]] * len(self._objective.terms))
        parts = [part.view(np.float64).reshape(-1, 2) for part in self.comms.gather(own.reshape(-1).view(np.int64))]
        sums = [[math.fsum(part[term][side] for part in parts) for side in (0, 1)] for term in range(len(own))]
        return self._objective.total([total / mass if mass else 0.0 for total, mass in sums])

    def _between_steps(self) -> None:
        """What may be due after a step that is not the last of its epoch."""
        every = self.settings.validate_every_steps
        figures = None
        if self.validation is not None and every and self._step % every == 0:
            figures = self._validate(alike=False)
            surgery.set_training(self.replica.module, self.frozen)
        if self._timetable.due(self._step, self.comms, epoch_end=None):
            self._checkpoint(self._step, figures)

    def _reason_to_stop(self) -> str:
        limit = self.settings.max_steps
        if limit is not None and self._step >= limit:
            return "max_steps"
        return self._consent.reason(self._step, epoch_ends=self._progress.index == self._plan.steps)

    def _rows_done(self) -> int:
        """Rows of this epoch over all workers."""
        return int(self._plan.rows_TW[: self._progress.index].sum())

    # ---------------------------------------------------------------------------------------------------- steps

    def _train_step(self, slices: Iterator[Slice], rows_W: np.ndarray, clock: Clock) -> float:
        """One step of the optimizer; returns the mean loss over this worker's rows of it, 0 without rows."""
        comms, replica, strategy, settings = self.comms, self.replica, self.strategy, self.settings
        step = self._step + 1
        # Drawn anew for every step from numbers alone: a resumed run needs no stored generator state.
        salt = mix(np.array([comms.rank], np.uint64), settings.seed, step)[0]
        devices.seed(int(salt >> np.uint64(1)), self.device)
        rng = np.random.default_rng(int(salt))
        parts = next(slices).parts(settings.accumulate)
        batches = [(part, self._batch(part, rng)) for part in parts]
        clock.lap("data")
        together = strategy.steps_together(self._state)
        with self._rates.at(step):
            if self._takes_closure:
                value = self._closed_step(batches, rows_W)
            else:
                replica.optimizer.zero_grad(set_to_none=True)
                means, masses, _ = self._gradients(batches, rows_W)
                value = self._book(means, masses)
                clock.lap("compute")
                self._state = strategy.on_gradients(replica, self._state, rows_W, comms)
                clock.lap("communicate")
                if batches or together:
                    self._clip()
                    replica.optimizer.step()
        clock.lap("compute")
        self._state = strategy.on_step(replica, self._state, rows_W, comms)
        clock.lap("communicate")
        if self._average is not None:
            self._average.update(replica.parameters())
        self._rates.after("step")
        clock.lap("compute")
        return value

    def _batch(self, rows: Slice, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Tensors of some rows; with `rng` they are trained on, and their images may be changed."""
        arrays = rows.arrays if rng is None else self._augmented(rows)
        return devices.to_device(self.preparation.batch(arrays, targets=True, rng=rng), self.device)

    @cached_property
    def _length(self) -> str | None:
        """The packed column by which rows of like length come together: of the first sequence among the inputs."""
        named = [step.length_column for step in self.preparation.inputs if isinstance(step, SequenceStep)]
        return named[0] if named and self.settings.bucketed else None

    def _augmented(self, rows: Slice) -> Mapping[str, np.ndarray]:
        """The rows' packed columns, images changed by what each row draws in this epoch."""
        if not self.augment:
            return rows.arrays
        arrays = dict(rows.arrays)
        for place, (name, steps) in enumerate(self.augment.items()):
            (step,) = (step for step in self.preparation.inputs if step.name == name)
            assert isinstance(step, ImageStep)
            keys = mix(rows.hashes, self.settings.seed, self._progress.epoch, _AUGMENT, place)
            arrays[name] = augmented(steps, arrays[name], RowDraws(keys, mix), step.channels)
        return arrays

    @cached_property
    def _takes_closure(self) -> bool:
        """Whether the optimizer looks at the loss several times a step (LBFGS)."""
        closure = inspect.signature(type(self.replica.optimizer).step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def _closed_step(self, batches: Sequence[tuple[Slice, Mapping[str, Tensor]]], rows_W: np.ndarray) -> float:
        """A step of an optimizer that calls for the loss itself; where replicas agree, all see one loss, as often.

        Returns: this worker's loss at the first look.
        """
        comms, replica, strategy = self.comms, self.replica, self.strategy
        looks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        together = strategy.steps_together(self._state)

        def closure() -> float:
            replica.optimizer.zero_grad(set_to_none=True)
            means, masses, scales = self._gradients(batches, rows_W)
            looks.append((means, masses, scales))
            self._state = strategy.on_gradients(replica, self._state, rows_W, comms)
            self._clip()
            loss = torch.tensor(self._objective.total((means * scales).tolist()), dtype=torch.float64)
            return float(comms.all_reduce(loss) if together else loss)

        if batches or together:
            replica.optimizer.step(closure)
        return self._book(*looks[0][:2]) if looks else 0.0

    def _gradients(
        self, batches: Sequence[tuple[Slice, Mapping[str, Tensor]]], rows_W: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add up the gradients of a step's parts, each term's counted by its mass.

        Returns: for each term the mean loss over this worker's rows of the step, its mass, and what the mean counts
            for in the step of all workers; float64, shape (terms,).
        """
        objective, strategy = self._objective, self.strategy
        masses = [objective.masses(batch, len(part)) for part, batch in batches]
        own = np.sum(masses, axis=0) if masses else np.zeros(len(objective.terms))
        scales = self._scales(own, rows_W)
        means = np.zeros(len(own))
        for number, ((part, batch), mass) in enumerate(zip(batches, masses, strict=True), 1):
            if number == len(batches):
                strategy.on_backward(self.replica, self._state, rows_W, self.comms)
            self._draws.begin(mix(part.hashes, self.settings.seed, self._progress.epoch, _DROPOUT))
            shares = mass / np.where(own, own, 1.0)
            losses = objective.losses(self.replica.module, self.signature, batch, self.settings.precision)
            total: Tensor | None = None
            for place, (term, loss) in enumerate(zip(objective.terms, losses, strict=True)):
                if not mass[place]:  # no row of this part counts: 0 / 0
                    continue
                value = float(loss.detach())
                self._check_finite(value)
                factor = float(term.weight * scales[place] * shares[place])
                counted = loss * factor if factor != 1.0 else loss
                total = counted if total is None else total + counted
                means[place] += value * shares[place]
            if total is not None:
                total.backward()  # type: ignore[no-untyped-call]
        return means, own, scales

    def _scales(self, own: np.ndarray, rows_W: np.ndarray) -> np.ndarray:
        """What each term's mean over this worker's rows counts in the step, by its mass: shape (terms,)."""
        comms, strategy = self.comms, self.strategy
        scale = strategy.loss_scale(rows_W, comms.rank, self._state)
        if self._objective.counts_rows or comms.world == 1 or not strategy.steps_together(self._state):
            return np.full(len(own), scale)
        masses_WK = np.stack([part.view(np.float64) for part in comms.gather(own.view(np.int64))])
        scales = [
            strategy.loss_scale(of_all, comms.rank, self._state) if of_all.any() else 0.0 for of_all in masses_WK.T
        ]
        return np.array(scales)

    def _book(self, means: np.ndarray, masses: np.ndarray) -> float:
        """Count a step's losses towards the epoch's; returns them as one number."""
        sums = self._progress.sums or [[0.0, 0.0] for _ in means]
        self._progress.sums = [
            [total + float(mean * mass), counted + float(mass)]
            for (total, counted), mean, mass in zip(sums, means, masses, strict=True)
        ]
        return float(self._objective.total(means.tolist()))

    def _check_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {self._progress.epoch}, step {self._step + 1} "
                f"(worker {self.comms.rank}). What helps most often: a smaller learning rate, scaled inputs, "
                "a look for values that are no numbers."
            )

    def _clip(self) -> None:
        """Bound the gradients that the optimizer is about to use."""
        settings = self.settings
        if settings.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.replica.parameters(), settings.clip_value)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.replica.parameters(), settings.clip_norm)

    # ----------------------------------------------------------------------------------------------- validation

    def _validate(self, *, alike: bool) -> dict[str, Any]:
        """Measure on the validation rows; `alike`: whether the workers' weights and statistics are the same now."""
        assert self.validation is not None
        with self._shown_weights(alike=alike):
            self.replica.module.eval()
            measured = Figures(self._objective, self.preparation.targets, self.classes, self.metrics)
            with torch.inference_mode():
                for rows in self.validation.in_order(_VALIDATION_BATCH):
                    batch = self._batch(rows)
                    measured.update(self.signature.call(self.replica.module, batch), batch)
        figures = measured.merged(self.comms)
        self._progress.validations.append({"step": self._step, **figures})
        self.hooks.on_event("validation", step=self._step, epoch=self._progress.epoch, **figures)
        self._observe(figures, alike=alike)
        return figures

    def _observe(self, figures: Mapping[str, Any], *, alike: bool) -> None:
        """Let early stopping and the schedule see new figures, the same on every worker."""
        self._rates.measured(float(figures["loss"]))
        early, progress = self.settings.early_stopping, self._progress
        if early is None:
            return
        if early.metric not in figures:
            known = did_you_mean(early.metric, [name for name in figures if name != "rows"])
            raise ConfigError("metric", early.metric, f"is no figure of this training.{known}", "Name one of them")
        progress.watch, better = observe(early, progress.watch, float(figures[early.metric]))
        if better and early.restore_best:
            with self._shown_weights(alike=alike):
                state = self.replica.module.state_dict()
                self._best = {name: tensor.detach().clone() for name, tensor in state.items()}
        if progress.watch.waited >= early.patience:
            progress.stopped = progress.stopped or "early_stopping"

    @contextlib.contextmanager
    def _shown_weights(self, *, alike: bool) -> Iterator[None]:
        """Inside, the module holds the weights that would be the result if training ended now.

        That is their running average, where one is kept; and where the workers differ, the mean over the workers.
        """
        surgery.set_training(self.replica.module, self.frozen)
        parameters, statistics = self.replica.parameters(), self.replica.statistics()
        averaged = self._average is not None and bool(self._average.values)
        apart = [] if alike else statistics
        if not alike and not self.strategy.replicas_agree:
            apart = [*parameters, *statistics]
        kept = [(tensor, tensor.detach().clone()) for tensor in (parameters if averaged else []) + apart]
        with torch.no_grad():
            if averaged:
                assert self._average is not None
                for parameter, value in zip(parameters, self._average.values, strict=True):
                    parameter.copy_(value)
            if self.comms.world > 1 and apart:
                self.comms.sum_all(apart, self.strategy.share(self._state, self.comms))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in reversed(kept):
                    tensor.copy_(value)

    def _average_alike(self) -> None:
        """Where workers differ between averagings, so do their running averages: take the mean of them."""
        if self._average is not None and self._average.values and not self.strategy.replicas_agree:
            if self.comms.world > 1:
                self.comms.sum_all(self._average.values, 1 / self.comms.world)
