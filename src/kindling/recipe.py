"""A net together with how it is to be trained: what a solver of Caffe says, as a Model and the options of its `fit`.

The solver and the net are read in `formats/caffe`; here they meet what Spark adds: workers and rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from torch import Tensor
    from torch.optim import Optimizer

    from kindling.formats.caffe.losses import Objective
    from kindling.formats.caffe.optim import CaffeOptimizer, CaffeSchedule
    from kindling.formats.caffe.solver import Solver
    from kindling.model import Model
    from kindling.prepare import Augmentation


@dataclass(frozen=True)
class SolverOptimizer:
    """Makes Caffe's optimizer of the parameters, each with its own factors on learning rate and weight decay."""

    solver: Solver
    multipliers: Mapping[str, tuple[float, float]]

    def __call__(self, named_parameters: Sequence[tuple[str, Tensor]]) -> CaffeOptimizer:
        return self.solver.optimizer(named_parameters, self.multipliers)


@dataclass(frozen=True)
class SolverSchedule:
    """Makes Caffe's schedule of an optimizer; to be stepped after every step."""

    solver: Solver

    def __call__(self, optimizer: Optimizer) -> CaffeSchedule:
        return self.solver.scheduler(optimizer)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, and how Caffe would train it.

    >>> recipe = caffe_recipe("lenet_solver.prototxt", labels=kd.labels(digits))  # doctest: +SKIP
    >>> trained = recipe.fit(digits, workers=2)  # doctest: +SKIP
    """

    model: Model
    solver: Solver
    batch_size: int
    """Rows of one forward pass of Caffe's; `solver.iter_size` of them make a step."""
    losses: Mapping[str, Any]
    """By the outputs' names."""
    loss_weights: Mapping[str, float]
    multipliers: Mapping[str, tuple[float, float]]
    """Factors on the learning rate and on the weight decay, by the parameters' names."""
    augment: Mapping[str, tuple[Augmentation, ...]]
    """By input, what is done to pictures at random in training."""
    notes: tuple[str, ...]
    """What is done in another way than Caffe does it, or what its files do not say."""

    def fit(self, df: DataFrame, *, workers: int | None = None, rows: int | None = None, **options: Any) -> Model:
        """Train the model on Spark as the solver says; returns the trained model.

        Args:
            df: the training rows, in place of the database that the net names.
            workers: as `Model.fit` takes them.
            rows: of `df`; counted if None.
            options: of `Model.fit`; they count instead of what the solver says.
        Raises: ConfigError, when the solver's batch cannot be shared by so many workers; as `Model.fit` does.
        """
        if workers is None:
            from kindling.train.slots import slots

            workers = slots(df.sparkSession) or 1
        rows = df.count() if rows is None else rows
        return self.model.fit(df, **self.options(rows, workers, **options))

    def options(self, rows: int, workers: int, **given: Any) -> dict[str, Any]:
        """The options of `Model.fit`.

        Where workers agree in every step, they share Caffe's batch, so that a step is a step of Caffe's whatever their
        number. Where each goes its own way for some steps, each takes whole batches, as in SparkNet (arXiv:1511.06051).
        """
        from kindling.train.policy import Checkpoints
        from kindling.train.strategies import AllReduce

        solver, strategy = self.solver, given.get("strategy") or AllReduce()
        share = self.batch_size
        if isinstance(strategy, AllReduce):
            if share % workers and "batch_size" not in given:
                raise ConfigError(
                    "workers",
                    workers,
                    f"cannot share the solver's batches of {share}",
                    f"Use a number that divides {share}, or give batch_size=, the rows of each worker in a step",
                )
            share //= workers
        share = given.get("batch_size", share)
        steps = math.ceil(rows / (share * workers * solver.iter_size))
        said: dict[str, Any] = {
            "workers": workers,
            "strategy": strategy,
            "batch_size": share,
            "accumulate": solver.iter_size,
            "optimizer": SolverOptimizer(self._plain_solver(), dict(self.multipliers)),
            "schedule": SolverSchedule(self._plain_solver()),
            "schedule_every": "step",
            "epochs": max(1, math.ceil(solver.max_iterations / max(1, steps))),
            "max_steps": solver.max_iterations,
            "loss": dict(self.losses),
        }
        if any(weight != 1 for weight in self.loss_weights.values()):
            said["loss_weights"] = dict(self.loss_weights)
        if len(self.losses) > 1 or next(iter(self.losses)) != next(iter(self.model.signature.outputs)):
            target = given.get("target") or "label"
            given["target"] = dict.fromkeys(self.losses, target) if isinstance(target, str) else target
        if self.augment:
            said["augment"] = dict(self.augment)
        if solver.random_seed is not None:
            said["seed"] = solver.random_seed
        if solver.snapshot:
            said["checkpoints"] = Checkpoints(steps=solver.snapshot)
        if given.get("validation") is not None:
            said["validate_every"] = said["epochs"]
            if solver.test_interval:
                said["validate_every_steps"] = solver.test_interval
        return {**said, **given}

    def _plain_solver(self) -> Solver:
        """Without the net and paths: what workers and a run's record need."""
        return dataclasses.replace(self.solver, net_param=None, path=None)


def caffe_recipe(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    weights: str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    mean: Any = None,
    image: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Recipe:
    """What a `solver.prototxt` of Caffe trains, and how.

    Args:
        path: the solver; its net is looked for by the path it names, and beside it.
        labels: class names in the order of the scores.
        weights: a `.caffemodel` to begin with; the solver's own if None.
        input_shape: of one row, (channels, height, width): pictures in a database are as large as they are.
        mean: the mean file, or a number a channel, where the net names a mean file that is not at hand.
        image: fields of the `ImageStep`: `{"resize_to": 32}` where the net cuts pictures (`crop_size`) and no mean
            file says how large they were before.
        seed: of the weights that begin as fillers say; the solver's own if None, and 0 where it has none: the same call
            gives the same weights, so that a run that was broken off can go on.
    Raises: FormatError, ConfigError: what cannot be read, is missing or cannot be trained.
    """
    from kindling.formats.caffe.losses import Objective
    from kindling.formats.caffe.solver import read_solver
    from kindling.model import as_model
    from kindling.train.objective import OutputsLoss

    solver = read_solver(path)
    if solver.max_iterations < 1:
        raise ConfigError("path", str(path), "says nothing of max_iter", "Say there how many iterations to train for")
    chosen: dict[str, Any] = {"input_shape": input_shape, "mean": mean, "image": image, "labels": labels}
    seed = (solver.random_seed or 0) if seed is None else seed
    beginning = weights or (_beside(solver, solver.weights[0]) if solver.weights else None)
    found = solver.read_net(**chosen, weights=beginning, seed=seed)
    training = found.training
    if training is None or not isinstance(training.loss, Objective):
        raise ConfigError("path", str(path), "trains a net without a loss layer", "Add one, SoftmaxWithLoss say")
    if missing := [note for note in found.source.get("preparation", {}).values() if "is not at hand" in note]:
        raise ConfigError("mean", mean, f"is needed: {missing[0]}", "Put the file beside the net, or give mean=")
    losses, counts = _losses(training.loss, tuple(found.signature.outputs))
    if all(isinstance(loss, OutputsLoss) for loss in losses.values()):
        found = dataclasses.replace(found, labels=None)  # what a row has is not one class of several
    notes = [str(note) for note in found.source.get("preparation", {}).values()]
    if len(solver.weights) > 1:
        notes.append(f"only the first file of weights is read: {solver.weights[0]}")
    return Recipe(
        model=as_model(found),
        solver=solver,
        batch_size=training.batch_size or 1,
        losses=losses,
        loss_weights=counts,
        multipliers=training.multipliers,
        augment=training.augment,
        notes=tuple(notes),
    )


def _beside(solver: Solver, name: str) -> Path:
    folder = solver.path.parent if solver.path is not None else Path()
    for candidate in (folder / name, folder / Path(name).name):
        if candidate.is_file():
            return candidate
    raise ConfigError("weights", name, "is named by the solver and not there", "Give weights=, the .caffemodel")


def _losses(objective: Objective, outputs: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, float]]:
    """Losses and what they count, by output.

    Raises: ConfigError, for losses that are not the mean over rows of outputs, against at most one target.
    """
    from kindling.train.objective import OutputsLoss

    losses: dict[str, Any] = {}
    counts: dict[str, float] = {}
    for weight, part, blobs in zip(objective.weights, objective.parts, objective.blobs, strict=True):
        kind = type(part).__name__
        own = tuple(blob for blob in blobs if blob in outputs)
        targets = tuple(blob for blob in blobs if blob in objective.targets)
        key = next((name for name in own if name not in losses), None)
        if key is None or own + targets != tuple(blobs) or len(targets) > 1:
            raise ConfigError(
                "loss",
                f"{kind} of {', '.join(blobs)}",
                "is not of outputs against at most one target, or of one that has a loss already",
                "Train such a net with Model.fit and a loss function of your own",
            )
        mean = _mean_loss(part)
        single = len(own) == len(targets) == 1
        losses[key], counts[key] = mean if single else OutputsLoss(mean, own, bool(targets)), float(weight)
    return losses, counts


def _mean_loss(part: Any) -> Any:
    from torch import nn

    from kindling.formats.caffe.losses import SoftmaxLoss, SumLoss

    if isinstance(part, SumLoss):
        raise ConfigError("loss", "loss_weight", "adds rows up", "Use a layer of loss")
    if getattr(part, "normalization", "VALID") == "NONE":
        raise ConfigError(
            "loss", type(part).__name__, "adds rows up (normalization: NONE)", "Use VALID, and another base_lr"
        )
    if isinstance(part, SoftmaxLoss) and part.axis == 1 and part.normalization == "VALID":
        return nn.CrossEntropyLoss(ignore_index=-100 if part.ignore_label is None else part.ignore_label)
    return part
