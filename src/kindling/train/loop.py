"""The training loop of one worker: epochs, steps, validation. No Spark, no sockets, no files.

Rows come from `Feed`, agreement between workers from a strategy through `Comms`, and what happens is told to `Hooks`.
Run with `SoloComms` it is plain torch training.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from kindling import surgery
from kindling.errors import KindlingError, TrainingError
from kindling.evaluate import Tally, aligned, loss_rows, merge_all
from kindling.prepare import Preparation
from kindling.signature import Signature
from kindling.train.order import VIRTUAL_SHARDS as V
from kindling.train.order import OrderPlan, epoch_order, mix, plan_order, shard_of, static_order
from kindling.train.settings import LoopSettings
from kindling.train.spool import Rows
from kindling.train.strategies import Comms, Replica, State, Strategy

LossFunction = Callable[[Tensor, Tensor], Tensor]
_VALIDATION_BATCH = 256
_STEP_EVENT_EVERY_S = 0.25


class Feed:
    """One worker's rows of a stream, in an order that no network decides."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._static = static_order(rows.hashes, rows.content_of)
        self._hashes = rows.hashes[self._static]

    def __len__(self) -> int:
        return len(self._rows)

    def counts(self) -> np.ndarray:
        """Rows of each virtual shard here, shape (V,), int64."""
        return np.bincount(shard_of(self._hashes), minlength=V)

    def epoch(self, plan: OrderPlan, rank: int, epoch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Packed arrays of each step of an epoch; a step without rows here gives arrays of no rows."""
        order = self._static[epoch_order(self._hashes, plan.place_of_own, epoch, seed)]
        stops = np.cumsum(plan.rows_TW[:, rank])
        for start, stop in zip(stops - plan.rows_TW[:, rank], stops, strict=True):
            yield self._rows.gather(order[start:stop])

    def column(self, name: str) -> np.ndarray:
        """One packed column, in order of arrival."""
        return self._rows.columns[name]

    def in_order(self, batch_rows: int) -> Iterator[dict[str, np.ndarray]]:
        """All rows once, in static order."""
        for start in range(0, len(self._static), batch_rows):
            yield self._rows.gather(self._static[start : start + batch_rows])


class Hooks(Protocol):
    """What the loop tells the world."""

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        """Something happened."""

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """A state from which the loop can go on, whole on this worker; every worker calls this at the same step."""


@dataclass
class Clock:
    """Seconds spent by kind of work."""

    data_s: float = 0.0
    compute_s: float = 0.0
    communicate_s: float = 0.0
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, kind: str) -> None:
        """Book the time since the last lap under `kind`."""
        now = time.perf_counter()
        setattr(self, f"{kind}_s", getattr(self, f"{kind}_s") + now - self._last)
        self._last = now


@dataclass(kw_only=True)
class Loop:
    """Everything one worker trains with. `run` starts at the beginning or goes on from a checkpoint's state."""

    settings: LoopSettings
    replica: Replica
    strategy: Strategy
    comms: Comms
    signature: Signature
    preparation: Preparation
    loss: LossFunction
    feed: Feed
    counts_V: np.ndarray
    """Rows of each virtual shard over all workers."""
    frozen: frozenset[str]
    hooks: Hooks
    validation: Feed | None = None
    """This worker's rows of the validation data; None where there is none at all, on every worker."""
    classes: int | None = None

    def run(self, restored: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Train; returns one record per epoch.

        Raises: TrainingError, when the loss is no longer a number or the loss function fails.
        """
        comms, settings = self.comms, self.settings
        plan = plan_order(self.counts_V, comms.world, comms.rank, settings.batch_size * comms.world)
        state: State = self.strategy.init(self.replica)
        history: list[dict[str, Any]] = []
        if restored is not None:
            state, history = dict(restored["strategy"]), list(restored["history"])
            self.replica.module.load_state_dict(restored["module"])
            self.replica.optimizer.load_state_dict(restored["optimizer"])
        try:
            return self._run(plan, self.strategy.begin(self.replica, state, comms), history)
        finally:
            self.strategy.close(self.replica)

    def _run(self, plan: OrderPlan, state: State, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        comms, settings = self.comms, self.settings
        self.hooks.on_event("ready", step=len(history) * plan.steps, epoch=len(history))
        for epoch in range(len(history) + 1, settings.epochs + 1):
            surgery.set_training(self.replica.module, self.frozen)
            began, sent, clock = time.perf_counter(), comms.bytes_sent, Clock()
            loss_sum, state = self._epoch(epoch, plan, state, clock)
            state = self.strategy.on_epoch(self.replica, state, comms)
            clock.lap("communicate")
            rows = int(self.counts_V.sum())
            losses = comms.gather(np.array([loss_sum]).view(np.int64))
            seconds = time.perf_counter() - began
            record: dict[str, Any] = {
                "epoch": epoch,
                "loss": math.fsum(float(part.view(np.float64)[0]) for part in losses) / rows,
                "rows": rows,
                "seconds": seconds,
                "rows_per_s": rows / seconds,
                "data_s": clock.data_s,
                "compute_s": clock.compute_s,
                "communicate_s": clock.communicate_s,
                "bytes_sent": comms.bytes_sent - sent,
            }
            if figures := self.strategy.figures(state):
                record["strategy"] = figures
            if self.validation is not None:
                record["validation"] = self._validate(self.validation)
            history.append(record)
            step = epoch * plan.steps
            self.hooks.on_event("epoch", **{**record, "step": step})
            if epoch % settings.checkpoint_every == 0 or epoch == settings.epochs:
                state = self.strategy.settle(self.replica, state, comms)
                self.hooks.on_checkpoint(
                    step,
                    {
                        "module": dict(self.replica.module.state_dict()),
                        "optimizer": self.replica.optimizer.state_dict(),
                        "strategy": state,
                        "history": history,
                    },
                )
        return history

    def _epoch(self, epoch: int, plan: OrderPlan, state: State, clock: Clock) -> tuple[float, State]:
        comms, replica, strategy = self.comms, self.replica, self.strategy
        loss_sum, rows_done, told = 0.0, 0, time.perf_counter()
        arrays_of_steps = self.feed.epoch(plan, comms.rank, epoch, self.settings.seed)
        for index, rows_W in enumerate(plan.rows_TW):
            step = (epoch - 1) * plan.steps + index + 1
            arrays = next(arrays_of_steps)
            rows = int(rows_W[comms.rank])
            # Drawn anew for every step from numbers alone: a resumed run needs no stored generator state.
            salt = mix(np.array([comms.rank], np.uint64), self.settings.seed, step)[0]
            # torch.manual_seed looks for every other device's generator as well: half a millisecond.
            torch.default_generator.manual_seed(int(salt >> np.uint64(1)))
            batch = None
            if rows:
                batch = self.preparation.batch(arrays, targets=True, rng=np.random.default_rng(int(salt)))
            clock.lap("data")
            if self._takes_closure:
                value, state = self._closed_step(batch, rows_W, state, step, epoch)
                clock.lap("compute")
            else:
                replica.optimizer.zero_grad(set_to_none=True)
                value = 0.0
                if batch:
                    strategy.on_backward(replica, state, rows_W, comms)
                    value = self._backward(batch, strategy.loss_scale(rows_W, comms.rank, state), step, epoch)
                clock.lap("compute")
                state = strategy.on_gradients(replica, state, rows_W, comms)
                clock.lap("communicate")
                if rows or strategy.steps_together(state):
                    replica.optimizer.step()
                clock.lap("compute")
            loss_sum += value * rows
            state = strategy.on_step(replica, state, rows_W, comms)
            clock.lap("communicate")
            rows_done += int(rows_W.sum())
            now = time.perf_counter()
            if comms.rank == 0 and (now - told > _STEP_EVENT_EVERY_S or index == 0 or index + 1 == plan.steps):
                told = now
                figures = {"loss": value, "rows": rows_done, "of": int(self.counts_V.sum())}
                self.hooks.on_event("step", step=step, epoch=epoch, keep=step == 1, **figures)
        return loss_sum, state

    @cached_property
    def _takes_closure(self) -> bool:
        """Whether the optimizer looks at the loss several times a step (LBFGS)."""
        closure = inspect.signature(type(self.replica.optimizer).step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    def _closed_step(
        self, batch: Mapping[str, Tensor] | None, rows_W: np.ndarray, state: State, step: int, epoch: int
    ) -> tuple[float, State]:
        """A step of an optimizer that calls for the loss itself; where replicas agree, all see one loss, as often.

        Returns: this worker's loss at the first look, and the strategy's state.
        """
        comms, replica, strategy = self.comms, self.replica, self.strategy
        values: list[float] = []
        together = strategy.steps_together(state)

        def closure() -> float:
            nonlocal state
            replica.optimizer.zero_grad(set_to_none=True)
            scale = strategy.loss_scale(rows_W, comms.rank, state)
            if batch:
                strategy.on_backward(replica, state, rows_W, comms)
            values.append(self._backward(batch, scale, step, epoch) if batch else 0.0)
            state = strategy.on_gradients(replica, state, rows_W, comms)
            loss = torch.tensor(values[-1] * (scale if batch else 0.0), dtype=torch.float64)
            return float(comms.all_reduce(loss) if together else loss)

        if batch or together:
            replica.optimizer.step(closure)
        return (values[0] if values else 0.0), state

    def _backward(self, batch: Mapping[str, Tensor], scale: float, step: int, epoch: int) -> float:
        module = self.replica.module
        try:
            loss = compute_loss(module, self.signature, batch, self.loss)
        except TrainingError as error:
            if "Expected more than 1 value per channel" not in str(error.__cause__):
                raise
            # One row has no variance. Where the order of rows leaves a worker one alone, the statistics so far serve.
            with _stored_statistics(module):
                loss = compute_loss(module, self.signature, batch, self.loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {epoch}, step {step} (worker {self.comms.rank}). "
                "What helps most often: a smaller learning rate, scaled inputs, a look for values that are no numbers."
            )
        (loss * scale if scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
        return value

    def _validate(self, feed: Feed) -> dict[str, Any]:
        self.replica.module.eval()
        tally = Tally(self.classes)
        (target_name,) = (step.name for step in self.preparation.targets)
        with torch.inference_mode():
            for arrays in feed.in_order(_VALIDATION_BATCH):
                batch = self.preparation.batch(arrays, targets=True)
                outputs = self.signature.call(self.replica.module, batch)
                scores = next(iter(outputs.values()))
                targets = batch[target_name]
                tally.update(scores, targets, loss_rows(self.loss, scores, targets))
        report = merge_all(self.classes, self.comms.gather(tally.to_vector())).report()
        figures: dict[str, Any] = {"rows": report.rows, "loss": report.loss}
        if self.classes is not None:
            figures |= {"accuracy": report.accuracy, "top5": report.top5}
        else:
            figures |= {"mean_absolute_error": report.mean_absolute_error}
        return figures


@contextlib.contextmanager
def _stored_statistics(module: torch.nn.Module) -> Iterator[None]:
    """Batch normalisation in inference mode, for layers that keep statistics."""
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def compute_loss(
    module: torch.nn.Module, signature: Signature, batch: Mapping[str, Tensor], loss: LossFunction
) -> Tensor:
    """The mean loss of a batch, as one number with a gradient.

    Raises: TrainingError, when the net or the loss function refuses the batch, or the loss is not one number.
    """
    try:
        outputs = next(iter(signature.call(module, batch).values()))
        (target_name,) = (name for name in batch if name not in signature.inputs)
        targets = batch[target_name]
        value = loss(outputs, aligned(loss, outputs, targets))
    except KindlingError:
        raise
    except Exception as error:  # whatever a user's net or loss function may raise
        shapes = {name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in batch.items()}
        raise TrainingError(
            f"the net or its loss refused a batch: {type(error).__name__}: {error}. The batch was {shapes}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TrainingError(f"the loss of a batch is {shape}, not one number. Average it in the loss function.")
    if not value.requires_grad:
        raise TrainingError(
            "the loss depends on no trainable parameter. Is every layer frozen? Use unfreeze() or then()."
        )
    return value.reshape(())
