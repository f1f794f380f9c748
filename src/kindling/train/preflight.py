"""What can be known before anything heavy starts: columns, labels, shapes, loss, optimizer, slots.

Each check raises one error that says what, the value seen, why, and the way on. `fit` calls them first.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kindling.errors import ConfigError, DataError, ModelError, TrainingError, did_you_mean
from kindling.prepare import Augmentation, ImageStep, Preparation, SequenceStep, Step
from kindling.prepare.image import WideImageStep
from kindling.randomness import borrowed
from kindling.signature import Signature

if TYPE_CHECKING:
    import numpy as np
    import torch
    from pyspark.sql import DataFrame
    from torch import Tensor, nn

    from kindling.model import Model
    from kindling.train.settings import LoopSettings, UserCode

    Augment = Mapping[str, Sequence[Augmentation]] | Sequence[Augmentation] | None
    OptimizerFactory = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

_LOG = logging.getLogger("kindling.fit")


def read_augment(model: Model, augment: Augment) -> dict[str, tuple[Augmentation, ...]]:
    """What is done to each image input in training.

    Raises: ConfigError, where that is no image, or nothing that can be done to one.
    """
    images = [step.name for step in model.preparation.inputs if isinstance(step, ImageStep)]
    if not augment:
        return {}
    if not isinstance(augment, Mapping):
        if len(images) != 1:
            raise ConfigError(
                "augment", augment, f"fits one input of images, and the model has {len(images)}", "Give it by input"
            )
        augment = {images[0]: augment}
    for name, steps in augment.items():
        if name not in images:
            raise ConfigError("augment", name, f"is no input of images.{did_you_mean(name, images)}", "Name one")
        for step in steps:
            if not isinstance(step, Augmentation):
                raise ConfigError(
                    "augment", step, "is no augmentation", "Use those of kindling.prepare: RandomFlip(), ..."
                )
    return {name: tuple(steps) for name, steps in augment.items()}


def with_room(inputs: Sequence[Step], changes: Mapping[str, Sequence[Augmentation]]) -> tuple[Step, ...]:
    """The steps that pack training rows: images as much larger as random cuts take off them.

    Raises: ConfigError, where pictures have no room for that.
    """
    wide: list[Step] = []
    for step in inputs:
        spent = sum(change.spent for change in changes.get(step.name, ()))
        wide.append(WideImageStep.of(step, spent) if spent and isinstance(step, ImageStep) else step)
    return tuple(wide)


def place_columns(df: DataFrame, needed: Sequence[str], key: str | None) -> list[str]:
    """Columns whose hash gives a row its place."""
    if key is not None:
        if key not in df.columns:
            raise ConfigError(
                "key",
                key,
                f"is no column of the training data.{did_you_mean(key, df.columns)}",
                "Name a column that tells rows apart",
            )
        return [key]
    return ["path"] if "path" in df.columns else list(needed)


def check_columns(df: DataFrame, needed: Sequence[str], name: str) -> None:
    for column in needed:
        if column not in df.columns:
            raise DataError(
                f"{name} has no column {column!r}, which the model reads.{did_you_mean(column, df.columns)}"
            )


def default_optimizer(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    import torch

    return torch.optim.Adam(parameters, lr=1e-3)


def made_up_rows(preparation: Preparation, count: int) -> dict[str, np.ndarray]:
    """Packed columns of rows as a preparation gives them: noise, the first class, sequences of full length."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in preparation.packed_spec(targets=True).items():
        noise = rng.random((count, *shape))
        arrays[name] = (noise * (255 if dtype == "uint8" else 0 if "int" in dtype else 1)).astype(dtype)
    for step in preparation.inputs:
        if isinstance(step, SequenceStep):
            arrays[step.length_column][:] = step.max_length
    return arrays


def rehearse(
    module: nn.Module,
    signature: Signature,
    preparation: Preparation,
    frozen: frozenset[str],
    code: UserCode,
    settings: LoopSettings,
    labels: tuple[str, ...] | None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """One forward and backward pass on the driver: shapes, dtypes, labels and the user's code fit.

    Args:
        arrays: packed rows; made-up ones if None.
    Raises: ModelError, ConfigError, TrainingError: what does not fit.
    """
    import torch

    from kindling import surgery
    from kindling.train.objective import Objective
    from kindling.train.rates import make_schedule
    from kindling.train.strategies.parameter_groups import wants_names

    real = arrays is not None
    arrays = arrays or made_up_rows(preparation, 4)
    copied = copy.deepcopy(module)
    surgery.set_training(copied, frozen)
    trainable = [p for p in copied.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(
            "no layer can learn: all are frozen, or have no weights. Use unfreeze(), or then() to add a layer."
        )
    with borrowed():
        batch = preparation.batch(arrays, targets=True)
        objective = Objective.of(code.loss, signature, preparation)
        value = torch.stack(objective.losses(copied, signature, batch, settings.precision)).sum()
        if real and not math.isfinite(float(value.detach())):
            raise TrainingError(
                f"the loss is {float(value.detach())} before the first step. Look for values that are no numbers, or "
                "very large ones; scaled inputs help most often."
            )
        value.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            outputs = next(iter(signature.call(copied.eval(), {n: batch[n] for n in signature.inputs}).values()))
    if labels is not None:
        width = outputs.shape[1] if outputs.dim() == 2 else 0
        binary = len(labels) == 2 and outputs.numel() == len(outputs)
        if width != len(labels) and not binary:
            raise ModelError(
                f"the net's output has shape {('N', *outputs.shape[1:])}, but there are {len(labels)} labels. "
                f"The last layer should give {len(labels)} scores."
            )
    named = [(name, p) for name, p in copied.named_parameters() if p.requires_grad]
    made = code.optimizer(named if wants_names(code.optimizer) else trainable)
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            "optimizer",
            code.optimizer,
            f"gave a {type(made).__name__}",
            "Give a function of parameters that returns a torch optimizer: partial(torch.optim.SGD, lr=0.1)",
        )
    if code.schedule is not None:
        make_schedule(code.schedule, made, settings.epochs)
