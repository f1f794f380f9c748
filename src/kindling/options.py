"""Options that several commands share, and what their texts mean.

Only shapes and words: what a command does with them is in `cli.py`. Importing this imports neither torch nor Spark.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kindling as kd

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WHERE, NET, TRAINING, OUTPUT = "Where it runs", "Model", "Training", "Output"
"""Panels of the help pages."""


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """A typer option in a panel of the help page; its default is shown unless that is None."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


_DATA: Any = typer.Argument(
    metavar="DATA...",
    help="Folders or globs of photos, on any file system Spark reads; the parent folder's name is the label. "
    "A name that ends in .parquet is read as a table.",
    show_default=False,
)
Data = Annotated[list[str], _DATA]
TrainingData = Annotated[list[str] | None, _DATA]
"""Where `--resume` may say it instead."""
Master = Annotated[str | None, option(WHERE, "Spark master, such as local[4] or yarn.", metavar="URL")]
Remote = Annotated[str | None, option(WHERE, "Spark Connect server, such as sc://host:15002.", metavar="URL")]
SparkLog = Annotated[
    str, option(WHERE, "Spark's own log level: OFF, ERROR, WARN, INFO.", "--spark-log", metavar="LEVEL")
]
Json = Annotated[bool, option(OUTPUT, "Write the result as one JSON object to stdout.", "--json")]
_MODEL = option(
    NET,
    "A shipped net (lenet, alexnet, vgg16, squeezenet1_1, mobilenet_v2), the folder of a saved model, or "
    "module:function naming a Python function that returns a Model.",
    "--model",
    "--net",
    metavar="NAME",
)
ModelName = Annotated[str, _MODEL]
TrainedName = Annotated[str | None, _MODEL]
"""Where `--resume` may say it instead."""
Weights = Annotated[
    str | None, option(NET, "Published weights: a file, a URL or a catalogue name.", "--weights", metavar="FILE")
]
Classes = Annotated[
    list[str] | None,
    option(
        NET,
        "A class of yours that the saved model needs (nets that could not be traced). May be repeated.",
        "--class",
        metavar="MODULE:CLASS",
    ),
]
Until = Annotated[list[str] | None, option(NET, "Cut the net after this layer. May be repeated.", metavar="LAYER")]
Freeze = Annotated[str | None, option(NET, "Leave the net as it is up to this layer.", metavar="LAYER")]
Precision = Annotated[
    str, option(NET, "Arithmetic of the forward pass; auto tries bf16 on a sample.", metavar="auto|fp32|bf16")
]
ForwardBatch = Annotated[
    int | None, option(NET, "Rows in one forward pass; default: what suits the net.", "--batch-size", min=1)
]
OnError = Annotated[str, option(OUTPUT, "What to do with rows that cannot be read.", metavar="keep|drop|fail")]
Epochs = Annotated[int, option(TRAINING, "Times each row is seen.", min=1)]
BatchSize = Annotated[int, option(TRAINING, "Rows in one step of one worker.", min=1)]
Rate = Annotated[float, option(TRAINING, "Learning rate of SGD.", "--lr", min=0)]
Momentum = Annotated[float, option(TRAINING, "Nesterov momentum; 0 for none.", min=0, max=1)]
WeightDecay = Annotated[float, option(TRAINING, "L2 penalty.", min=0)]
StrategyName = Annotated[
    str,
    option(
        TRAINING,
        "How workers agree: averaging[:STEPS], allreduce[:bf16|powersgd], diloco[:STEPS], downpour[:STEPS], "
        "threshold[:SIZE]; further settings follow as ,NAME=VALUE.",
        "--strategy",
        metavar="NAME[:VALUE]",
    ),
]
Accumulate = Annotated[int, option(TRAINING, "Parts in which a step's rows go through the net.", min=1)]
ClipNorm = Annotated[float | None, option(TRAINING, "Bound on the norm of all gradients together.", min=0)]
TrainPrecision = Annotated[
    str, option(TRAINING, "Arithmetic of training; bf16 is torch's autocast.", metavar="fp32|bf16")
]
WarmUp = Annotated[int, option(TRAINING, "Steps over which the learning rate rises to --lr.", "--warmup-steps", min=0)]
Ema = Annotated[
    float | None, option(TRAINING, "Keep a running average of the weights: 0.999, say.", "--ema-decay", min=0, max=1)
]
Patience = Annotated[
    int | None,
    option(TRAINING, "End after so many epochs without a lower loss (of --validation, if given).", "--patience", min=1),
]
MaxSteps = Annotated[int | None, option(TRAINING, "End after so many steps.", "--max-steps", min=1)]
MaxMinutes = Annotated[float | None, option(TRAINING, "End after so many minutes of training.", "--max-minutes", min=0)]
Workers = Annotated[int | None, option(TRAINING, "Parallel workers; default: Spark's slots.", min=1)]
Seed = Annotated[int, option(TRAINING, "Seed of the split, the order of rows and new weights.")]
Shares = Annotated[
    str,
    option(TRAINING, "Shares of the rows, decided by each row's path.", "--split", metavar="TRAIN,VALID,TEST"),
]
ReportFile = Annotated[Path | None, option(OUTPUT, "Write the report as JSON.", "--report", metavar="FILE")]
PlotFile = Annotated[
    Path | None, option(OUTPUT, "Draw the confusion matrix (PNG, SVG, PDF).", "--plot", metavar="FILE")
]
Overwrite = Annotated[bool, option(OUTPUT, "Replace what is there.", "--overwrite")]


def named(reference: str) -> Any:
    """What `module:name` names. The working directory is searched too, as `python -m` does.

    Raises: ConfigError, when there is no such module or name.
    """
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise  # the module is there, and something it needs is not
        raise kd.errors.ConfigError(
            "module", module_name, "cannot be imported", "Run from its folder or install it"
        ) from None
    except AttributeError:
        raise kd.errors.ConfigError("name", name, f"is not in module {module_name!r}", "Check the spelling") from None


_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_model(
    name: str,
    weights: str | None = None,
    *,
    labels: tuple[str, ...] | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
    spark: Any = None,
    input_shape: tuple[int, ...] | None = None,
) -> kd.Model:
    """The model that `--model` names: a shipped net, a saved model, or what a function returns.

    Args:
        labels: class names of the data at hand, handed to the function if it takes an argument.
        classes: `module:class` references for saved models that need the user's code.
        seed: of the weights of a net that is given none; torch's own generator is left as it was.
        input_shape: of one row, for files of other systems that leave it open.
    Raises: ConfigError, FormatError, StorageError; TypeError passes through from the user's function.
    """
    from kindling.transfer import seeded

    if not _REFERENCE.fullmatch(name):
        known = [named(reference) for reference in classes or ()]
        with seeded(seed):
            more: dict[str, Any] = {} if input_shape is None else {"input_shape": input_shape}
            return kd.load(name, weights=weights, classes=known, spark=spark, **more)
    if weights is not None:
        raise typer.BadParameter("--weights is for shipped nets; let the function read its own")
    build: Callable[..., Any] = named(name)
    takes = inspect.signature(build).parameters
    needs = [parameter for parameter in takes.values() if parameter.default is parameter.empty]
    if needs and labels is None:
        raise kd.errors.ConfigError(
            "model", name, f"takes {needs[0].name!r}, and this command has no labels", "Give it a default"
        )
    with seeded(seed):
        model = build(labels) if takes and labels is not None else build()
    if not isinstance(model, kd.Model):
        raise kd.errors.ConfigError(
            "model", name, f"returned a {type(model).__name__}", "Return kindling.Model.of(...)"
        )
    return model


def rows_of(spark: SparkSession, data: list[str]) -> DataFrame:
    """The rows that `DATA...` names: photos, or Parquet where a name ends in .parquet."""
    tables = [name for name in data if name.rstrip("/").endswith(".parquet")]
    if not tables:
        return kd.read.images(data, spark=spark)
    if len(tables) < len(data):
        raise typer.BadParameter("photos and .parquet tables cannot be read as one")
    return spark.read.parquet(*tables)


_STRATEGIES = {
    "allreduce": ("AllReduce", ("compression",)),
    "averaging": ("ParameterAveraging", ("every",)),
    "diloco": ("DiLoCo", ("every",)),
    "downpour": ("Downpour", ("push_every", "fetch_every")),
    "threshold": ("ThresholdSharing", ("threshold",)),
}
"""Strategies by their names here, with the settings that a value right after the name stands for."""


def strategy_of(text: str) -> Any:
    """The strategy that `--strategy` names.

    >>> strategy_of("averaging:3").every
    3
    >>> strategy_of("diloco:50,fragments=4,delay=5").delay
    5
    """
    name, _, rest = text.partition(":")
    parts = [part.strip() for part in rest.split(",")] if rest else []
    if name not in _STRATEGIES or "" in parts:
        raise typer.BadParameter(
            f"{text!r} is no strategy: averaging:N, allreduce, allreduce:bf16, allreduce:powersgd, diloco:N, "
            "downpour:N or threshold:SIZE, and further settings as ,NAME=VALUE",
            param_hint="--strategy",
        )
    public, first = _STRATEGIES[name]
    kind = getattr(kd, public)
    known = {field.name for field in dataclasses.fields(kind)}
    settings: dict[str, Any] = {}
    for place, part in enumerate(parts):
        key, equals, value = part.rpartition("=")
        keys = (key,) if equals else first
        if (not equals and place) or not known.issuperset(keys):
            raise typer.BadParameter(
                f"{part!r} is no setting of {name}; those are {', '.join(sorted(known))}", param_hint="--strategy"
            )
        settings |= dict.fromkeys(keys, _plain_value(value))
    try:
        return kind(**settings)
    except TypeError:
        raise typer.BadParameter(f"{text!r} has a value of the wrong kind", param_hint="--strategy") from None


def _plain_value(text: str) -> Any:
    """A number, true, false or null as JSON has them, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def shares_of(text: str) -> tuple[float, ...]:
    """Three shares from `--split`.

    >>> shares_of(".7,.15,.15")
    (0.7, 0.15, 0.15)
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != 3 or min(shares) < 0 or abs(math.fsum(shares) - 1) > 1e-9 or not shares[0] * shares[2]:
        raise typer.BadParameter(
            f"{text!r} is not three shares that add up to 1, such as .7,.15,.15", param_hint="--split"
        )
    return shares


def sgd(lr: float, momentum: float, weight_decay: float) -> Any:
    """SGD, as a function of the parameters it will move."""
    from functools import partial

    import torch

    return partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)
