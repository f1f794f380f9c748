"""What a validation measures: tallies by output that merge exactly, and metrics of the user's.

Every worker counts its own rows; the counts are merged in the order of the ranks, so that all get the same figures.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kindling.errors import ConfigError, TrainingError
from kindling.evaluate import ExactSum, Tally
from kindling.many_labels import LabelReport, LabelTally
from kindling.prepare import LabelStep, Step
from kindling.prepare.columns import ManyLabelsStep
from kindling.train.objective import Objective, OutputsLoss
from kindling.train.strategies import Comms


@runtime_checkable
class MetricState(Protocol):
    """A metric as torchmetrics writes them: a state that takes batches, merges, and gives a number."""

    def update(self, outputs: Any, targets: Any) -> Any: ...

    def merge_state(self, other: Any) -> Any: ...

    def compute(self) -> Any: ...


Metric = Callable[[Any, Any], Tensor] | MetricState
"""A function that gives each row's value, shape (N,), whose mean is taken; or a `MetricState` of any kind."""


_CLASSES = ("accuracy", "top5", "precision", "recall", "f1")
_MANY_LABELS = ("accuracy", "label_accuracy", "precision", "recall", "f1", "micro_f1")
_NUMBERS = ("mean_absolute_error", "mean_squared_error")
MEASURED = frozenset({"rows", "loss", *_CLASSES, *_MANY_LABELS, *_NUMBERS})
"""Names of figures that are measured anyway, for one kind of target or another."""


def check_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """The metrics, if they can be asked.

    Raises: ConfigError.
    """
    for name, metric in (metrics or {}).items():
        if not isinstance(metric, MetricState) and not callable(metric):
            raise ConfigError(
                "metrics",
                metric,
                f"({name!r}) is neither a function nor a metric with update, merge_state and compute",
                "Give a function of (outputs, targets) that returns one number for each row",
            )
        if name in MEASURED:
            raise ConfigError("metrics", name, "is the name of a figure that is measured anyway", "Rename it")
    return dict(metrics or {})


class Figures:
    """The state of one validation on one worker.

    A figure of the first output has its plain name, one of another output is `"OUTPUT.NAME"`.
    """

    def __init__(
        self, objective: Objective, targets: Sequence[Step], classes: int | None, metrics: Mapping[str, Metric]
    ) -> None:
        self._objective = objective
        steps = {step.name: step for step in targets}
        self._tallies: list[Tally | LabelTally] = []
        for place, term in enumerate(objective.terms):
            step = steps[term.target]
            if isinstance(term.loss, OutputsLoss):
                self._tallies.append(Tally(None))
            elif isinstance(step, ManyLabelsStep):
                self._tallies.append(LabelTally(len(step.labels)))
            elif place == 0:
                self._tallies.append(Tally(classes))
            else:
                self._tallies.append(Tally(len(step.labels) if isinstance(step, LabelStep) else None))
        self._own = {
            name: copy.deepcopy(metric) if isinstance(metric, MetricState) else _RowMean(name, metric)
            for name, metric in metrics.items()
        }

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Count a batch."""
        terms = self._objective.terms
        for tally, term, losses in zip(self._tallies, terms, self._objective.rows(outputs, batch), strict=True):
            joint = isinstance(term.loss, OutputsLoss)  # there is a loss and nothing to compare
            pair = (losses, losses) if joint else (outputs[term.output], batch[term.target])
            tally.update(*pair, losses)
        seen: Any = {name: outputs[name] for term in terms for name in term.outputs}
        truth: Any = {term.output: batch[term.target] for term in terms}
        if len(seen) == 1:
            seen, truth = seen[terms[0].output], truth[terms[0].output]
        for metric in self._own.values():
            metric.update(seen, truth)

    def merged(self, comms: Comms) -> dict[str, Any]:
        """The figures over all workers, the same on every one."""
        figures: dict[str, Any] = {"rows": 0, "loss": math.nan}
        losses = []
        for place, (tally, term) in enumerate(zip(self._tallies, self._objective.terms, strict=True)):
            found = _figures_of(tally, comms.gather(tally.to_vector()))
            figures["rows"] = found.pop("rows")
            found = {"loss": found["loss"]} if isinstance(term.loss, OutputsLoss) else found
            losses.append(found["loss"])
            prefix = f"{term.output}." if place else ""
            figures |= {prefix + name: figure for name, figure in found.items() if place or name != "loss"}
        if len(losses) > 1:
            figures[f"{self._objective.terms[0].output}.loss"] = losses[0]
        figures["loss"] = self._objective.total(losses)
        for name, metric in self._own.items():
            others = [_opened(part) for part in comms.gather(_closed(metric))]
            first, *rest = others
            for other in rest:
                first.merge_state(other)
            figures[name] = float(torch.as_tensor(first.compute()))
        return figures


def _figures_of(tally: Tally | LabelTally, vectors: Sequence[np.ndarray]) -> dict[str, Any]:
    whole: Tally | LabelTally = LabelTally(tally.labels) if isinstance(tally, LabelTally) else Tally(tally.classes)
    for vector in vectors:
        whole.absorb(vector)
    report = whole.report()
    kind = _MANY_LABELS if isinstance(report, LabelReport) else _CLASSES if report.labels else _NUMBERS
    return {name: getattr(report, name) for name in ("rows", "loss", *kind)}


class _RowMean:
    """The exact mean of what a function says about each row."""

    def __init__(self, name: str, function: Callable[[Any, Any], Tensor]) -> None:
        self.name, self.function, self.sum = name, function, ExactSum()

    def update(self, outputs: Any, targets: Any) -> None:
        values = self.function(outputs, targets)
        rows = len(next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs)
        if not isinstance(values, Tensor) or values.shape != (rows,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise TrainingError(f"the metric {self.name!r} gave {shape} for {rows} rows, not one number for each row.")
        self.sum.add(values.double().cpu().numpy())

    def merge_state(self, other: _RowMean) -> None:
        self.sum.merge(other.sum)

    def compute(self) -> float:
        return self.sum.mean()


def _closed(metric: Any) -> np.ndarray:
    """A metric's state as whole numbers."""
    if isinstance(metric, _RowMean):
        return np.array(metric.sum.to_ints(), np.int64)
    import cloudpickle

    data = cloudpickle.dumps(metric)
    size = np.array([-len(data)], np.int64)  # no sum has a negative count
    return np.concatenate([size, np.frombuffer(data + b"\0" * (-len(data) % 8), np.int64)])


def _opened(vector: np.ndarray) -> Any:
    if vector[0] >= 0:
        mean = _RowMean("", lambda outputs, _: outputs)
        mean.sum = ExactSum.from_ints(vector.tolist())
        return mean
    return pickle.loads(vector[1:].tobytes()[: -int(vector[0])])  # from a worker of this very run
