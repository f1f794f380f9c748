"""How good a model is where a row has any number of labels: a tally that merges exactly, and the report made of it.

The counterpart of `evaluate.Tally` and `evaluate.Report`, with the same methods. A label is said where its logit is
above 0, its probability above one half. Knows numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kindling.errors import DataError, ModelError
from kindling.evaluate import ClassScore, ExactSum, Report, as_numpy, json_number

_SUM = len(ExactSum().to_ints())
_HEAD = 3


class LabelTally:
    """For each label how often it was rightly said, wrongly said, and missed; exact under any partitioning.

    >>> tally = LabelTally(2)
    >>> tally.update(np.array([[1.0, -1.0], [2.0, 3.0]]), np.array([[1, 0], [1, 0]]))
    >>> report = tally.report(["cat", "dog"])
    >>> report.accuracy, report.label_accuracy, round(report.micro_f1, 3)
    (0.5, 0.75, 0.8)
    """

    def __init__(self, labels: int) -> None:
        self.labels = labels
        self.rows = self.exact = self.nan_rows = 0
        self.loss = ExactSum()
        self.counts = np.zeros((3, labels), np.int64)

    def update(self, outputs: Any, targets: Any, loss_rows: Any = None) -> None:
        """Count a batch.

        Args:
            outputs: logits, shape (N, labels).
            targets: 1 where a row has a label, else 0; shape (N, labels).
            loss_rows: each row's loss, shape (N,), or None.
        Raises: DataError, for shapes that do not fit.
        """
        scores, truth = as_numpy(outputs), as_numpy(targets)
        if scores.shape != truth.shape or scores.ndim != 2 or scores.shape[1] != self.labels:
            raise DataError(
                f"scores of shape {scores.shape} and targets of shape {truth.shape} do not fit {self.labels} labels: "
                f"expected (rows, {self.labels}) of both."
            )
        said, true = scores > 0, truth > 0.5
        self.counts += np.stack([(said & true).sum(0), (said & ~true).sum(0), (~said & true).sum(0)])
        self.rows += len(said)
        self.exact += int((said == true).all(1).sum())
        self.nan_rows += int(np.isnan(scores).any(1).sum())
        if loss_rows is not None:
            self.loss.add(as_numpy(loss_rows))

    def absorb(self, vector: Any) -> None:
        """Add what the tally counted whose `to_vector` this is.

        Raises: DataError, when it is not that of a tally of so many labels.
        """
        ints = np.asarray(vector)
        if ints.dtype != np.int64 or ints.shape != (_HEAD + _SUM + 3 * self.labels,):
            raise DataError(
                f"a vector of {ints.dtype} and shape {ints.shape} is not the state of a tally of {self.labels} labels."
            )
        self.rows += int(ints[0])
        self.exact += int(ints[1])
        self.nan_rows += int(ints[2])
        self.loss.merge(ExactSum.from_ints(ints[_HEAD : _HEAD + _SUM].tolist()))
        self.counts += ints[_HEAD + _SUM :].reshape(3, -1)

    def to_vector(self) -> np.ndarray:
        """The whole state as one int64 vector."""
        head = [self.rows, self.exact, self.nan_rows, *self.loss.to_ints()]
        return np.concatenate([np.array(head, np.int64), self.counts.reshape(-1)])

    def report(
        self,
        labels: Sequence[str] | None = None,
        *,
        skipped: Sequence[tuple[str, str]] = (),
        skipped_rows: int | None = None,
    ) -> LabelReport:
        """The report of everything counted so far; arguments as those of `Tally.report`."""
        names = tuple(map(str, labels if labels is not None else range(self.labels)))
        if len(names) != self.labels:
            raise DataError(f"{len(names)} names do not name {self.labels} labels.")
        return LabelReport(
            rows=self.rows,
            loss=self.loss.mean() if self.loss.count else None,
            labels=names,
            nan_rows=self.nan_rows,
            exact=self.exact,
            counts=self.counts.copy(),
            skipped=tuple((str(key), str(why)) for key, why in skipped),
            skipped_rows=len(skipped) if skipped_rows is None else skipped_rows,
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelReport(Report):
    """What an evaluation found where a row has any number of labels.

    Macro figures are plain means over the labels that occur, in a row or as an answer; a ratio without denominator
    counts as 0. There is no confusion matrix: `pairs` is empty, and so is the listing.
    """

    exact: int = 0
    """Rows with every label right."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))
    """How often each label was rightly said, wrongly said, and missed; int64, shape (3, labels)."""

    @property
    def accuracy(self) -> float:
        """Share of the rows whose labels are all right and complete; NaN without rows."""
        return self.exact / self.rows if self.rows else math.nan

    @property
    def label_accuracy(self) -> float:
        """Share of single answers (this row has this label, or has it not) that are right."""
        answers = self.rows * len(self.labels)
        return 1 - int(self.counts[1:].sum()) / answers if answers else math.nan

    @property
    def micro_f1(self) -> float:
        """F1 over all labels' answers together."""
        hits, wrong, missed = self.counts.sum(axis=1).tolist()
        return 2 * hits / (2 * hits + wrong + missed) if hits + wrong + missed else math.nan

    @cached_property
    def per_class(self) -> tuple[ClassScore, ...]:
        """Precision, recall and F1 of each label, in their order; `rows` is how many rows have it."""
        scores = []
        for label, hits, wrong, missed in zip(self.labels, *self.counts.tolist(), strict=True):
            said, true = hits + wrong, hits + missed
            f1 = 2 * hits / (said + true) if said + true else 0.0
            scores.append(ClassScore(label, true, hits / said if said else 0.0, hits / true if true else 0.0, f1))
        return tuple(scores)

    @property
    def occurring(self) -> tuple[str, ...]:
        """Labels that occur, in a row or as an answer: those the macro figures average over."""
        return tuple(label for label, seen in zip(self.labels, self.counts.sum(axis=0) > 0, strict=True) if seen)

    def _macro(self, name: str) -> float:
        here = np.flatnonzero(self.counts.sum(axis=0))
        return math.fsum(getattr(self.per_class[int(i)], name) for i in here) / len(here) if len(here) else math.nan

    @property
    def top5(self) -> float:
        """No figure of rows with any number of labels: NaN."""
        return math.nan

    def plot(self, path: str | Path | None = None) -> Any:
        """There is no confusion matrix to draw.

        Raises: ModelError.
        """
        raise ModelError("rows with any number of labels have no confusion matrix to draw. See report.per_class.")

    def __str__(self) -> str:
        lines = [f"Evaluation of {self.rows:,} rows with any number of {len(self.labels)} labels"]
        if self.loss is not None:
            lines.append(f"  Loss:       {self.loss:.6g}")
        lines += [
            f"  Accuracy:   {self.accuracy:.4f} of the rows have every label right, "
            f"{self.label_accuracy:.4f} of the single answers are",
            f"  Precision:  {self.precision:.4f}",
            f"  Recall:     {self.recall:.4f}",
            f"  F1:         {self.f1:.4f}, over all answers together {self.micro_f1:.4f}",
            f"  Precision, recall and F1 are means over {len(self.occurring)} labels that occur",
            *self._what_is_wrong(),
        ]
        width = max((len(label) for label in self.labels), default=0)
        lines += ["", f"  {'label':{width}}  {'rows':>8}  precision  recall      F1"]
        lines += [
            f"  {score.label:{width}}  {score.rows:8,}  {score.precision:9.4f}  {score.recall:6.4f}  {score.f1:6.4f}"
            for score in self.per_class
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"LabelReport(rows={self.rows}, loss={self.loss}, accuracy={self.accuracy:.4f}, f1={self.f1:.4f})"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        data = super().to_json()
        for name in ("top5", "confusion"):
            del data[name]
        for name in ("label_accuracy", "micro_f1"):
            data[name] = json_number(getattr(self, name))
        return data
