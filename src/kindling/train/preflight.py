"""What can be known before anything heavy starts: columns, labels, shapes, loss, optimizer, slots.

Each check raises one error that says what, the value seen, why, and the way on. `fit` calls them first.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kindling import ship
from kindling.errors import ConfigError, DataError, ModelError, did_you_mean
from kindling.prepare import Augmentation, ImageStep, Preparation, SequenceStep
from kindling.randomness import borrowed
from kindling.signature import Signature

if TYPE_CHECKING:
    import numpy as np
    import torch
    from pyspark.sql import DataFrame, SparkSession
    from torch import Tensor, nn

    from kindling.model import Model
    from kindling.train.settings import LoopSettings, UserCode

    Augment = Mapping[str, Sequence[Augmentation]] | Sequence[Augmentation] | None
    OptimizerFactory = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

_LOG = logging.getLogger("kindling.fit")

_BARRIER_TIMEOUT = "spark.barrier.sync.timeout"
_LONG_WAIT_S = 1800
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


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
    import numpy as np

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
) -> None:
    """One forward and backward pass of made-up rows on the driver: shapes, dtypes, labels and the user's code fit.

    Raises: ModelError, ConfigError, TrainingError: what does not fit.
    """
    import torch

    from kindling import surgery
    from kindling.train.objective import Objective
    from kindling.train.rates import make_schedule
    from kindling.train.strategies.parameter_groups import wants_names

    arrays = made_up_rows(preparation, 4)
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
        torch.stack(objective.losses(copied, signature, batch, settings.precision)).sum().backward()  # type: ignore[no-untyped-call]
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


def slots(spark: SparkSession, patience_s: float = 20.0, wanted: int = 1) -> int | None:
    """Tasks that can run at the same time, or None where the session does not tell (a remote Connect server)."""
    master = spark.conf.get("spark.master", "") or ""
    inside = master.partition("[")[2].rstrip("]").split(",")
    if master.startswith("local-cluster["):
        return int(inside[0]) * int(inside[1])
    if ship.is_connect(spark):
        if master.startswith("local"):
            import os

            return (os.cpu_count() or 1) if inside[0] == "*" else int(inside[0] or 1)
        return None
    context = spark.sparkContext
    scala = context._jsc.sc()
    # Executors of a cluster register one after the other; those of local[n] are there from the start.
    deadline = time.monotonic() + (0.0 if master.startswith("local") else patience_s)
    while True:
        free = int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().defaultResourceProfile()))
        if free >= wanted or time.monotonic() > deadline:
            return free
        time.sleep(0.25)


def workers_for(spark: SparkSession, asked: int | None) -> int:
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise ConfigError("workers", asked, "leaves nobody to train", "Use 1 or more")
    there = slots(spark, wanted=asked or 1)
    if asked is None:
        return there or 2
    if there is not None and asked > there:
        raise ConfigError(
            "workers",
            asked,
            f"needs {asked} task slots at the same time, and the session has {there}",
            f"Use workers={there} or a larger cluster",
        )
    return asked


def check_patience(spark: SparkSession) -> None:
    """Warn where Spark would let workers wait for a dead one until nobody remembers the job."""
    text = str(spark.conf.get(_BARRIER_TIMEOUT, None) or "365d")
    found = re.fullmatch(r"(\d+)\s*(ms|s|m|min|h|d)?", text.strip())
    seconds = int(found[1]) * _UNIT_S[found[2] or "s"] if found else math.inf
    if seconds > _LONG_WAIT_S:
        _LOG.warning(
            "%s is %s: a worker that dies before training begins would be waited for that long. "
            "Start the session with 300s, as kindling.spark() does.",
            _BARRIER_TIMEOUT,
            text,
        )


def without_barrier(spark: SparkSession) -> bool:
    """Whether Spark refuses barrier stages here, so that the workers must be tasks of a plain one.

    It does with dynamic allocation (SPARK-24942), which a local master does not know.
    """
    local = str(spark.conf.get("spark.master", "") or "").startswith("local")
    return not local and _is_on(spark, "spark.dynamicAllocation.enabled")


def runs_copies(spark: SparkSession) -> bool:
    """Whether Spark starts a slow task a second time beside the first; never in a barrier stage."""
    return without_barrier(spark) and _is_on(spark, "spark.speculation")


def _is_on(spark: SparkSession, setting: str) -> bool:
    return str(spark.conf.get(setting, "false")).lower() == "true"
