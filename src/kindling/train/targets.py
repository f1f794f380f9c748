"""What is to be learned: target columns, the steps that read them, and the objective made of their losses.

What the user leaves open is told by the model's labels, the columns' types and the losses. Looks at a DataFrame's
columns, and never at its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from kindling.errors import ConfigError, DataError, ModelError, did_you_mean
from kindling.prepare import LabelStep, ManyLabelsStep, RowWeightStep, Step, ValueStep
from kindling.prepare.columns import NothingStep
from kindling.signature import TensorSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from kindling.model import Model
    from kindling.train.objective import Objective, OutputsLoss

Loss: TypeAlias = "Callable[..., Any] | OutputsLoss"
_WEIGHT = "row weight"
_WHOLE = ("tinyint", "smallint", "int", "bigint", "boolean")


@dataclass(frozen=True)
class Targets:
    """What was found."""

    read: tuple[Step, ...]
    """What each term of the objective is held against."""
    weight: Step | None
    """Of the rows' weights; only training needs it."""
    labels: tuple[str, ...] | None
    """Class names of the first output."""
    objective: Objective

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of the targets; they stay with the model."""
        return tuple(step for step in self.read if not isinstance(step, NothingStep))

    @property
    def packed(self) -> tuple[Step, ...]:
        return self.read if self.weight is None else (*self.read, self.weight)

    @property
    def classes(self) -> int | None:
        """How many classes the first output tells apart, or None."""
        first = self.read[0]
        return len(first.labels) if isinstance(first, LabelStep) else None


def read_targets(
    model: Model,
    df: DataFrame,
    target: str | Mapping[str, str] | None,
    loss: Loss | Mapping[str, Loss] | None,
    loss_weights: Mapping[str, float] | None,
    weight_column: str | None,
) -> Targets:
    """Targets, labels and objective.

    Args:
        target: a column, for the net's first output; or the columns of several outputs by the outputs' names.
        loss: one for all of them, or some by the outputs' names; others get the usual one for their target.
        loss_weights: by the outputs' names; others count 1.
    Raises: ConfigError, DataError, ModelError: what does not fit.
    """
    from kindling.train.objective import Objective, OutputsLoss, Term

    outputs = model.signature.outputs
    columns = _columns(model, target)
    for field, given in (("target", columns), ("loss", loss), ("loss_weights", loss_weights)):
        for output in given if isinstance(given, Mapping) else ():
            if output not in outputs or output not in columns:
                known = did_you_mean(output, outputs if field == "target" else columns)
                raise ConfigError(field, output, f"is no output with a target.{known}", "Name one of them")
    losses = loss if isinstance(loss, Mapping) else dict.fromkeys(columns, loss)
    weights = loss_weights or {}
    for output, value in weights.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError("loss_weights", {output: value}, "is no weight", "Use numbers above 0")
    steps: list[Step] = []
    terms: list[Term] = []
    labels = model.labels
    for output, column in columns.items():
        first = output == next(iter(outputs))
        name = "target" if first and len(columns) == 1 else f"target {output}"  # see Preparation.by_output
        own = model.labels if first else None
        given = losses.get(output)
        if isinstance(given, OutputsLoss):
            _check_outputs(given, output, outputs)
        names, step = own, cast(Step, NothingStep(name, model.preparation.inputs[0].column))
        if not isinstance(given, OutputsLoss) or given.target:
            names, step = _read(df, column, name, outputs[output], output, own, given)
        labels = names if first else labels
        steps.append(step)
        terms.append(Term(output, name, given or usual_loss(step), float(weights.get(output, 1.0))))
    weight = None if weight_column is None else RowWeightStep(_WEIGHT, weight_column)
    objective = Objective(tuple(terms), None if weight is None else weight.name)
    return Targets(tuple(steps), weight, labels, objective)


def _check_outputs(loss: OutputsLoss, output: str, outputs: Mapping[str, TensorSpec]) -> None:
    """Raises: ConfigError, for a loss of outputs that the net has not, or of none where it is given."""
    for name in loss.outputs:
        if name not in outputs:
            raise ConfigError(
                "loss", name, f"is no output of the net.{did_you_mean(name, outputs)}", "Name one of them"
            )
    if output not in loss.outputs:
        raise ConfigError("loss", output, f"is none of the outputs {loss.outputs} of its loss", "Give it under one")


def _columns(model: Model, target: str | Mapping[str, str] | None) -> dict[str, str]:
    """Target column of each output that has one."""
    first = next(iter(model.signature.outputs))
    if isinstance(target, str):
        return {first: target}
    if target is not None:
        if not target:
            raise ConfigError("target", target, "names nothing to learn", "Name a column, or one for each output")
        return dict(target)
    known = model.preparation.by_output(list(model.signature.outputs))
    return {output: step.column for output, step in known.items()} or {first: "label"}


def _read(
    df: DataFrame,
    column: str,
    name: str,
    output: TensorSpec,
    output_name: str,
    labels: tuple[str, ...] | None,
    loss: Loss | None,
) -> tuple[tuple[str, ...] | None, Step]:
    """Labels and the step of one target: what the model says, else what the column and the loss say."""
    import torch

    if column not in df.columns:
        raise DataError(
            f"the training data has no column {column!r} to learn.{did_you_mean(column, df.columns)} "
            "Name it with target=..."
        )
    kind = dict(df.dtypes)[column]
    listed, text = kind.startswith("array"), "string" in kind
    if labels is not None and not (listed and not text):
        return labels, (ManyLabelsStep if listed else LabelStep)(name, column, labels)
    if text:
        raise DataError(
            f"column {column!r} holds text, and the model has no labels. "
            "Give them: model.then(..., labels=kindling.labels(df)), or model.with_labels(...)."
        )
    whole = kind in _WHOLE
    classifies = isinstance(loss, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss) or (loss is None and whole)
    if listed or not classifies:
        return labels, ValueStep(name, column, tuple(int(n) for n in output.shape[1:]) if listed else ())
    width = output.shape[-1] if len(output.shape) == 2 else None
    if not isinstance(width, int):
        raise ModelError(
            f"output {output_name!r} has shape {output.shape}, so how many classes there are cannot be told. "
            "Give labels."
        )
    names = tuple(str(index) for index in range(width))
    return names, LabelStep(name, column, names)


def usual_loss(target: Step) -> Loss:
    """Cross entropy for classes, binary cross entropy for any number of labels, squared error for numbers."""
    import torch

    if isinstance(target, LabelStep):
        return torch.nn.CrossEntropyLoss()
    return torch.nn.BCEWithLogitsLoss() if isinstance(target, ManyLabelsStep) else torch.nn.MSELoss()
