"""How good a model is: tallies that merge exactly, and the report made of them.

A `Tally` is what one part of the data says: counts, and sums kept without any rounding, so that the report does not
depend on how the rows were spread over partitions nor on the order in which tallies are merged. Arithmetic only: the
forward pass and Spark are in `predict/batch.py`. Knows numpy; torch and matplotlib are imported where they are used.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kindling.errors import DataError, MissingExtraError, ModelError, TrainingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

TOP = 5
"""A row counts for `Report.top5` when its class is among this many best scores."""

_UNIT = 1074  # every float64 is a whole multiple of 2 ** -1074
_LIMB = 62  # bits in one number of a sum's vector
_LIMBS = 36  # 36 * 62 = 2232 bits: the largest float64, 2 ** 63 times, in units of 2 ** -1074
_SUM_SIZE = 4 + _LIMBS
_HEAD_SIZE = 5
_DENSE_CELLS = 2**27  # a dense confusion matrix of more cells than this (1 GiB) is refused


class ExactSum:
    """A sum of floats without rounding: the same whatever the order, and mergeable.

    Values that are not finite are counted apart, so that they surface in `mean` instead of spoiling the arithmetic.
    Each float64 is mantissa * 2**exponent; mantissas are added as integers, one Python integer holds the total.

    >>> total = ExactSum()
    >>> total.add(np.array([1e300, 1.0, -1e300]))
    >>> total.count, total.mean() * 3
    (3, 1.0)
    """

    __slots__ = ("count", "nan", "negative_inf", "positive_inf", "total")

    def __init__(self) -> None:
        self.count = 0
        self.nan = 0
        self.positive_inf = 0
        self.negative_inf = 0
        self.total = 0

    def add(self, values: np.ndarray) -> None:
        """Add every number of an array of any shape and float dtype."""
        flat = np.asarray(values, np.float64).ravel()
        self.count += flat.size
        finite = np.isfinite(flat)
        if not finite.all():
            self.nan += int(np.isnan(flat).sum())
            self.positive_inf += int(np.isposinf(flat).sum())
            self.negative_inf += int(np.isneginf(flat).sum())
            flat = flat[finite]
        if not flat.size:
            return
        fraction, exponent = np.frexp(flat)
        # 53 bits in two halves, so that adding 2**36 of them stays within 63 bits.
        mantissa = np.ldexp(fraction, 53).astype(np.int64)
        high, low = mantissa >> 27, mantissa & (2**27 - 1)
        for power in np.unique(exponent):
            same = exponent == power
            whole = (int(high[same].sum()) << 27) + int(low[same].sum())
            shift = int(power) - 53 + _UNIT
            # Below 2**-1021 a mantissa has fewer than 53 bits and ends in zeros: shifting right loses nothing.
            self.total += whole << shift if shift >= 0 else whole >> -shift

    def merge(self, other: ExactSum) -> None:
        """Add what another sum holds."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def mean(self) -> float:
        """The correctly rounded mean; NaN for no values and wherever a value was NaN (or +inf met -inf)."""
        if not self.count or self.nan or (self.positive_inf and self.negative_inf):
            return math.nan
        if self.positive_inf or self.negative_inf:
            return math.inf if self.positive_inf else -math.inf
        return float(Fraction(self.total, self.count << _UNIT))

    def to_ints(self) -> list[int]:
        """The state as 40 numbers that fit int64."""
        limbs, rest = [], self.total
        for _ in range(_LIMBS - 1):
            limbs.append(rest & (2**_LIMB - 1))
            rest >>= _LIMB
        return [self.count, self.nan, self.positive_inf, self.negative_inf, *limbs, rest]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> ExactSum:
        """The inverse of `to_ints`."""
        self = cls()
        self.count, self.nan, self.positive_inf, self.negative_inf = (int(value) for value in ints[:4])
        self.total = sum(int(limb) << (_LIMB * place) for place, limb in enumerate(ints[4:]))
        return self


class Tally:
    """What some rows say about a model; exact, and the same for any partitioning and order of merging.

    Args:
        classes: how many classes the model tells apart, or None for a model that predicts numbers.

    Memory is bounded by 16 bytes for each pair (true class, predicted class) that was really seen, whatever the number
    of rows: at most 16 * classes ** 2.

    >>> left, right = Tally(3), Tally(3)
    >>> left.update(np.array([[2.0, 1.0, 0.0]]), np.array([0]), np.array([0.25]))
    >>> right.update(np.array([[0.0, 3.0, 1.0]]), np.array([2]), np.array([1.75]))
    >>> left.merge(Tally.from_vector(3, right.to_vector()))
    >>> report = left.report(labels=("cat", "cow", "dog"))
    >>> report.accuracy, report.loss
    (0.5, 1.0)
    """

    def __init__(self, classes: int | None = None) -> None:
        if classes is not None and not 1 <= classes < 2**31:
            raise DataError(f"classes={classes!r} is no number of classes. Give 1 or more, or None for regression.")
        self.classes = classes
        self.rows = 0
        self.top5_hits = 0
        self.nan_rows = 0
        """Rows with a score that is not a number; such a score loses against every number."""
        self.loss = ExactSum()
        self.absolute = ExactSum()
        self.squared = ExactSum()
        self._keys = np.empty(0, np.int64)  # true class * classes + predicted class, ascending
        self._counts = np.empty(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0

    def update(self, outputs: Any, targets: Any, loss_rows: Any = None) -> None:
        """Count a batch.

        Args:
            outputs: scores or logits, shape (N, classes); for two classes also (N,) or (N, 1), where above zero means
                the second. For regression any shape (N, ...). A tensor or an array, any float dtype.
            targets: class indices, shape (N,), any integer dtype; for regression numbers, as many as outputs.
            loss_rows: each row's loss, shape (N,), or None. See `loss_rows`.
        Raises: DataError, for shapes that do not fit and classes out of range.
        """
        scores, truth = as_numpy(outputs), as_numpy(targets)
        if truth.ndim == 0 or scores.ndim == 0 or len(truth) != len(scores):
            raise DataError(
                f"outputs of shape {scores.shape} and targets of shape {truth.shape} do not have the same rows."
            )
        losses = None if loss_rows is None else as_numpy(loss_rows)
        if losses is not None and losses.shape != (len(scores),):
            raise DataError(f"loss_rows has shape {losses.shape}, not one loss for each of {len(scores)} rows.")
        if self.classes is None:
            self._update_numbers(scores, truth)
        else:
            self._update_classes(scores, truth)
        self.rows += len(scores)
        if losses is not None:
            self.loss.add(losses)

    def _update_numbers(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        if outputs.size != targets.size:
            raise DataError(
                f"outputs of shape {outputs.shape} and targets of shape {targets.shape} hold unequal numbers of values."
            )
        # By rows: (N, 1) against (N,) must not broadcast to (N, N).
        with np.errstate(over="ignore", invalid="ignore"):
            error = outputs.astype(np.float64).reshape(-1) - targets.astype(np.float64).reshape(-1)
            self.absolute.add(np.abs(error))
            self.squared.add(error * error)

    def _update_classes(self, scores: np.ndarray, targets: np.ndarray) -> None:
        classes = self.classes
        assert classes is not None
        if classes == 2 and scores.size == len(scores):
            column = scores.reshape(-1, 1)
            scores = np.concatenate([np.zeros_like(column), column], axis=1)
        if scores.ndim != 2 or scores.shape[1] != classes:
            raise DataError(f"scores of shape {scores.shape} do not fit {classes} classes: expected (rows, {classes}).")
        if targets.shape != (len(scores),) or targets.dtype.kind not in "iub":
            raise DataError(
                f"targets are {targets.dtype} of shape {targets.shape}; "
                f"class indices of shape ({len(scores)},) are needed."
            )
        truth = targets.astype(np.int64)
        if not len(truth):
            return
        if truth.min() < 0 or truth.max() >= classes:
            wrong = truth[(truth < 0) | (truth >= classes)][0]
            raise DataError(f"target {wrong} is out of range: the model has {classes} classes, 0 to {classes - 1}.")
        unclear = np.isnan(scores)
        if unclear.any():
            self.nan_rows += int(unclear.any(axis=1).sum())
            scores = np.where(unclear, -np.inf, scores)
        predicted = scores.argmax(axis=1)  # the first of equal scores
        own = np.take_along_axis(scores, truth[:, None], axis=1)
        # Rank among equal scores by class number, so that ties fall the same way everywhere.
        earlier = np.arange(classes) < truth[:, None]
        rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
        self.top5_hits += int((rank < TOP).sum())
        self._pending.append(truth * classes + predicted)
        self._pending_rows += len(truth)
        if self._pending_rows > max(65_536, len(self._keys)):
            self._settle()

    def _settle(self) -> None:
        """Fold the pending pairs into the counts."""
        if not self._pending:
            return
        keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._pending_rows = [], 0
        self._keys, self._counts = _add_pairs(self._keys, self._counts, keys, counts.astype(np.int64))

    def merge(self, other: Tally) -> None:
        """Add what another tally of the same kind has counted; `other` is left as it is.

        Raises: DataError, for another number of classes.
        """
        if other.classes != self.classes:
            raise DataError(f"a tally of {other.classes} classes cannot be merged into one of {self.classes}.")
        self._settle()
        other._settle()
        self._keys, self._counts = _add_pairs(self._keys, self._counts, other._keys, other._counts)
        self.rows += other.rows
        self.top5_hits += other.top5_hits
        self.nan_rows += other.nan_rows
        for name in ("loss", "absolute", "squared"):
            getattr(self, name).merge(getattr(other, name))

    def absorb(self, vector: Any) -> None:
        """Add what the tally counted whose `to_vector` this is.

        Raises: DataError, when it is not that of a tally of so many classes.
        """
        self.merge(Tally.from_vector(self.classes, vector))

    def to_vector(self) -> np.ndarray:
        """The whole state as one int64 vector, equal for equal states; its length grows with the pairs seen."""
        self._settle()
        head = [-1 if self.classes is None else self.classes, self.rows, self.top5_hits, self.nan_rows, len(self._keys)]
        sums = [*self.loss.to_ints(), *self.absolute.to_ints(), *self.squared.to_ints()]
        return np.concatenate([np.array(head + sums, np.int64), self._keys, self._counts])

    @classmethod
    def from_vector(cls, classes: int | None, vector: Any) -> Tally:
        """The inverse of `to_vector`.

        Raises: DataError, when the vector is not that of a tally of so many classes.
        """
        ints = np.asarray(vector)
        fixed = _HEAD_SIZE + 3 * _SUM_SIZE
        if ints.ndim != 1 or ints.dtype != np.int64 or len(ints) < fixed or len(ints) != fixed + 2 * ints[4]:
            raise DataError(f"a vector of {ints.dtype} and shape {ints.shape} is not the state of a tally.")
        if ints[0] != (-1 if classes is None else classes):
            raise DataError(f"a tally of {ints[0]} classes cannot be read as one of {classes}.")
        self = cls(classes)
        self.rows, self.top5_hits, self.nan_rows, pairs = (int(value) for value in ints[1:_HEAD_SIZE])
        self.loss, self.absolute, self.squared = (
            ExactSum.from_ints(ints[start : start + _SUM_SIZE].tolist())
            for start in range(_HEAD_SIZE, fixed, _SUM_SIZE)
        )
        self._keys, self._counts = ints[fixed : fixed + pairs].copy(), ints[fixed + pairs :].copy()
        return self

    def report(
        self,
        labels: Sequence[str] | None = None,
        *,
        skipped: Sequence[tuple[str, str]] = (),
        skipped_rows: int | None = None,
    ) -> Report:
        """The report of everything counted so far.

        Args:
            labels: class names by index; None calls the classes "0", "1", ...
            skipped: broken rows that could not be evaluated, as (path or key, why); may be only the first of them.
            skipped_rows: how many there were in all; None means that `skipped` lists every one.
        Raises: DataError, when there are more or fewer labels than classes.
        """
        self._settle()
        names: tuple[str, ...] = ()
        if self.classes is not None:
            names = tuple(map(str, labels if labels is not None else range(self.classes)))
            if len(names) != self.classes:
                raise DataError(f"{len(names)} labels do not name {self.classes} classes.")
        width = self.classes or 1
        return Report(
            rows=self.rows,
            loss=self.loss.mean() if self.loss.count else None,
            labels=names,
            pairs=np.stack([self._keys // width, self._keys % width, self._counts], axis=1),
            top5_hits=self.top5_hits,
            nan_rows=self.nan_rows,
            mean_absolute_error=self.absolute.mean() if self.classes is None else None,
            mean_squared_error=self.squared.mean() if self.classes is None else None,
            skipped=tuple((str(key), str(why)) for key, why in skipped),
            skipped_rows=len(skipped) if skipped_rows is None else skipped_rows,
        )


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class did."""

    label: str
    rows: int
    """Rows that truly are of this class."""
    precision: float
    """Share of the rows classified so that truly are; 0 where nothing was classified so."""
    recall: float
    """Share of its rows that were classified so; 0 where it has no rows."""
    f1: float
    """Harmonic mean of the two; 0 where both are 0."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Report:
    """What an evaluation found. `print(report)` reads well; every figure is also an attribute.

    Macro figures are plain means over the classes that occur, as a true or as a predicted class; a ratio without
    denominator counts as 0 (scikit-learn's `average="macro", zero_division=0`).
    """

    rows: int
    """Rows evaluated."""
    loss: float | None = None
    """Mean loss of a row; NaN if any row's was, None where no loss was computed."""
    labels: tuple[str, ...] = ()
    """Class names by index; empty for regression."""
    pairs: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """The confusion matrix's cells that are not 0: (true class, predicted class, rows), int64, shape (cells, 3)."""
    top5_hits: int = 0
    nan_rows: int = 0
    """Rows with a score that is not a number."""
    mean_absolute_error: float | None = None
    """Regression only; over every value of every row."""
    mean_squared_error: float | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    """Broken rows that were left out, (path or key, why); possibly only the first ones."""
    skipped_rows: int = 0
    """How many rows were left out."""

    @property
    def classes(self) -> int:
        return len(self.labels)

    @cached_property
    def _marginals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of each true class, rows of each predicted class, rows where both agree; each of shape (classes,)."""
        truth, predicted, count = self.pairs.T
        size = self.classes
        same = truth == predicted
        out = []
        for index, amount in ((truth, count), (predicted, count), (truth[same], count[same])):
            total = np.zeros(size, np.int64)
            np.add.at(total, index, amount)
            out.append(total)
        return out[0], out[1], out[2]

    @property
    def accuracy(self) -> float:
        """Share of the rows whose best score is their class; NaN without rows."""
        return int(self._marginals[2].sum()) / self.rows if self.rows else math.nan

    @property
    def top5(self) -> float:
        """Share of the rows whose class is among the five best scores; NaN without rows.

        Of equal scores the lower class number comes first.
        """
        return self.top5_hits / self.rows if self.rows else math.nan

    @cached_property
    def per_class(self) -> tuple[ClassScore, ...]:
        """Precision, recall and F1 of each class, in the order of the labels."""
        scores = []
        for label, true, predicted, hits in zip(self.labels, *(part.tolist() for part in self._marginals), strict=True):
            precision = hits / predicted if predicted else 0.0
            recall = hits / true if true else 0.0
            f1 = 2 * hits / (true + predicted) if true + predicted else 0.0
            scores.append(ClassScore(label, true, precision, recall, f1))
        return tuple(scores)

    @property
    def occurring(self) -> tuple[str, ...]:
        """Labels of the classes that occur, as true or predicted class: those the macro figures average over."""
        true, predicted, _ = self._marginals
        return tuple(label for label, here in zip(self.labels, (true + predicted) > 0, strict=True) if here)

    def _macro(self, name: str) -> float:
        true, predicted, _ = self._marginals
        here = np.flatnonzero(true + predicted)
        return math.fsum(getattr(self.per_class[int(i)], name) for i in here) / len(here) if len(here) else math.nan

    @property
    def precision(self) -> float:
        """Macro precision."""
        return self._macro("precision")

    @property
    def recall(self) -> float:
        """Macro recall."""
        return self._macro("recall")

    @property
    def f1(self) -> float:
        """Macro F1: the mean of the classes' F1, as in scikit-learn (not the F1 of the means)."""
        return self._macro("f1")

    @property
    def confusion(self) -> np.ndarray:
        """The confusion matrix: rows are true classes, columns predicted ones; int64, shape (classes, classes).

        Raises: ModelError, above 1 GiB; `pairs` holds the same in little memory.
        """
        if self.classes**2 > _DENSE_CELLS:
            raise ModelError(
                f"a confusion matrix of {self.classes} classes needs {self.classes**2 * 8:,} bytes. Use report.pairs."
            )
        matrix = np.zeros((self.classes, self.classes), np.int64)
        truth, predicted, count = self.pairs.T
        matrix[truth, predicted] = count
        return matrix

    def listing(self, *, limit: int | None = None, mistakes: bool = False) -> list[str]:
        """Deeplearning4j's listing, one line for each pair of classes seen together.

        Args:
            limit: at most so many lines. With a limit the most frequent come first, else they are in class order.
            mistakes: leave out the rows that were classified rightly.

        >>> tally = Tally(10)
        >>> tally.update(np.eye(10)[[9] * 27], np.full(27, 4))
        >>> tally.report().listing()
        ['Examples labeled as 4 classified by model as 9: 27 times']
        """
        pairs = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]] if mistakes else self.pairs
        if limit is not None:
            pairs = pairs[np.argsort(-pairs[:, 2], kind="stable")[:limit]]
        return [
            f"Examples labeled as {self.labels[truth]} classified by model as {self.labels[predicted]}: "
            f"{count} time{'' if count == 1 else 's'}"
            for truth, predicted, count in pairs.tolist()
        ]

    def __str__(self) -> str:
        lines = [f"Evaluation of {self.rows:,} rows" + (f" in {self.classes} classes" if self.labels else "")]
        if self.loss is not None:
            lines.append(f"  Loss:       {self.loss:.6g}")
        if self.mean_squared_error is not None:
            lines.append(f"  MSE:        {self.mean_squared_error:.6g}")
            lines.append(f"  MAE:        {self.mean_absolute_error:.6g}")
        if self.labels and self.rows:
            lines += [f"  Accuracy:   {self.accuracy:.4f}", f"  Precision:  {self.precision:.4f}"]
            lines += [f"  Recall:     {self.recall:.4f}", f"  F1:         {self.f1:.4f}"]
            if self.classes > TOP:
                lines.append(f"  Top-{TOP}:      {self.top5:.4f}")
            absent = self.classes - len(self.occurring)
            lines.append(
                f"  Precision, recall and F1 are means over {len(self.occurring)} classes"
                + (
                    f"; {absent} of the {self.classes} occur neither as a true nor as a predicted class"
                    if absent
                    else ""
                )
            )
        lines += self._what_is_wrong()
        if self.labels and self.rows:
            wrong = self.listing(limit=20, mistakes=True)
            kinds = int((self.pairs[:, 0] != self.pairs[:, 1]).sum())
            lines.append("")
            lines += wrong or ["Every example was classified rightly"]
            if kinds > len(wrong):
                lines.append(
                    f"... and {kinds - len(wrong):,} rarer kinds of mistake: see report.listing(mistakes=True)"
                )
        return "\n".join(lines)

    def _what_is_wrong(self) -> list[str]:
        """Lines about rows that could not be used."""
        lines = []
        if self.nan_rows:
            lines.append(f"  {self.nan_rows:,} rows have scores that are not numbers")
        if self.skipped_rows:
            lines.append(f"  {self.skipped_rows:,} rows could not be used:")
            lines += [f"    {key}: {why}" for key, why in self.skipped[:TOP]]
            if self.skipped_rows > min(TOP, len(self.skipped)):
                lines.append(f"    ... and {self.skipped_rows - min(TOP, len(self.skipped)):,} more")
        return lines

    def __repr__(self) -> str:
        what = f"accuracy={self.accuracy:.4f}" if self.labels else f"mean_squared_error={self.mean_squared_error}"
        return f"Report(rows={self.rows}, loss={self.loss}, {what})"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; numbers that JSON lacks become the texts "NaN", "Infinity", "-Infinity"."""
        data: dict[str, Any] = {"rows": self.rows, "loss": json_number(self.loss)}
        if self.labels:
            for name in ("accuracy", "precision", "recall", "f1", "top5"):
                data[name] = json_number(getattr(self, name))
            data["labels"] = list(self.labels)
            data["macro_over"] = len(self.occurring)
            data["classes"] = [
                {"label": c.label, "rows": c.rows, "precision": c.precision, "recall": c.recall, "f1": c.f1}
                for c in self.per_class
            ]
            data["confusion"] = {"columns": ["true", "predicted", "rows"], "pairs": self.pairs.tolist()}
        else:
            data["mean_absolute_error"] = json_number(self.mean_absolute_error)
            data["mean_squared_error"] = json_number(self.mean_squared_error)
        data["nan_rows"] = self.nan_rows
        data["skipped_rows"] = self.skipped_rows
        data["skipped"] = [{"row": key, "why": why} for key, why in self.skipped]
        return data

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the confusion matrix; each row is shown as shares of its true class.

        Args:
            path: where to write it, as .png, .svg or .pdf; None writes nothing.
        Returns: the matplotlib figure.
        Raises: ModelError, for a regression or more than 1,000 classes; MissingExtraError, without matplotlib.
        """
        if not self.labels:
            raise ModelError("a report of a regression has no confusion matrix to draw.")
        if self.classes > 1000:
            raise ModelError(
                f"{self.classes} classes cannot be drawn readably. See report.listing(limit=50, mistakes=True)."
            )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError.of("Drawing a confusion matrix", "matplotlib", "plot") from error
        figure = _draw_confusion(self, Figure)
        if path is not None:
            figure.savefig(path, bbox_inches="tight")
        return figure


def loss_rows(loss: Callable[..., Any] | None, outputs: Tensor, targets: Tensor) -> Tensor:
    """Any torch loss as one loss for each row.

    A loss module or function with a `reduction` is asked for none, and what is left of a row is averaged (added up, if
    its own reduction is "sum" or "batchmean"); anything else is called row by row. The mean over the rows then equals
    the loss of the batch, except for class weights and ignored classes, where torch divides by the sum of the weights.

    Args:
        loss: a module such as `nn.CrossEntropyLoss()`, a function such as `F.mse_loss`, any callable of (outputs,
            targets); None means cross entropy for whole-number targets and mean squared error for others.
        outputs: shape (N, ...).
        targets: shape (N, ...). Float targets with as many values as outputs are given the outputs' shape first, so
            that (N,) against (N, 1) does not broadcast; those of binary cross entropy are turned into floats.
    Returns: shape (N,), float.
    Raises: TrainingError, when the loss of a row is not one number.

    >>> import torch
    >>> loss_rows(torch.nn.MSELoss(), torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0]))
    tensor([1., 9.])
    """
    import torch
    from torch.nn import functional

    rows = len(outputs)
    if loss is None:
        loss = functional.mse_loss if targets.is_floating_point() else functional.cross_entropy
    targets = aligned(loss, outputs, targets)
    if not rows:
        return torch.zeros(0, dtype=torch.float32)
    single, reduction = _unreduced(loss)
    if single is not None:
        values = single(outputs, targets)
        if isinstance(values, torch.Tensor) and values.dim() and len(values) == rows:
            rest = values.reshape(rows, -1)
            return rest.sum(dim=1) if reduction in ("sum", "batchmean") else rest.mean(dim=1)
    parts = []
    for row in range(rows):
        value = torch.as_tensor(loss(outputs[row : row + 1], targets[row : row + 1]))
        if value.numel() != 1:
            raise TrainingError(
                f"the loss of one row has shape {tuple(value.shape)}, not one number. "
                "Average it, or give it a `reduction`."
            )
        parts.append(value.reshape(()))
    return torch.stack(parts)


def aligned(loss: Callable[..., Any], outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets in the shape and dtype that `loss` takes beside `outputs`; training and evaluation both call this.

    Float targets with as many values as outputs get the outputs' shape, so that (N,) against (N, 1) does not broadcast;
    those of binary cross entropy are turned into floats.
    """
    import torch

    if isinstance(loss, torch.nn.BCEWithLogitsLoss | torch.nn.BCELoss) and not targets.is_floating_point():
        targets = targets.to(outputs.dtype)
    if targets.is_floating_point() and targets.shape != outputs.shape and targets.numel() == outputs.numel():
        targets = targets.reshape(outputs.shape)
    return targets


def _unreduced(loss: Callable[..., Any]) -> tuple[Callable[..., Any] | None, object]:
    """The loss without its reduction, where it can be had, and the reduction it had."""
    import torch

    if isinstance(loss, torch.nn.Module):
        if not isinstance(getattr(loss, "reduction", None), str):
            return None, None
        single = copy.copy(loss)
        setattr(single, "reduction", "none")  # noqa: B010 (a Module's attributes are declared as tensors)
        return single, loss.reduction
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):
        return None, None
    if parameter is None or parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        return None, None

    def unreduced(outputs: Any, targets: Any) -> Any:
        return loss(outputs, targets, reduction="none")

    return unreduced, parameter.default


def as_numpy(values: Any) -> np.ndarray:
    """A tensor of any dtype and device, or anything array-like, as an array."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        return np.asarray(
            (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
        )
    return np.asarray(values)


def _add_pairs(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of two sets of ascending keys, added up."""
    both, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    total = np.zeros(len(both), np.int64)
    np.add.at(total, where, np.concatenate([counts, more_counts]))
    return both, total


def json_number(value: float | None) -> float | str | None:
    """A number as JSON has it: those that it lacks as texts."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _draw_confusion(report: Report, figure_type: type[Figure]) -> Figure:
    size = report.classes
    crowded = size > 30  # no room for numbers in the cells: the most frequent mistakes are listed beside the matrix
    inches = max(5.0, 0.42 * size) if not crowded else min(12.6, 12.6 * size / 100 + 4)
    figure = figure_type(figsize=(inches + (5.5 if crowded else 1.0), inches), dpi=150, layout="constrained")
    axes, bars, *panel = figure.subplots(
        1, 3 if crowded else 2, squeeze=False, width_ratios=[inches, 0.25, 4][: 3 if crowded else 2]
    )[0]
    truth, predicted, count = report.pairs.T
    shares = count / np.maximum(report._marginals[0][truth], 1)
    right = truth == predicted
    maps = {}
    for colours, chosen in (("Blues", right), ("Reds", ~right)):
        cells = np.full((size, size), np.nan)
        # Square-root colours: a class that takes 2 % of another's rows must not look like none.
        cells[truth[chosen], predicted[chosen]] = 0.15 + 0.85 * np.sqrt(shares[chosen])
        maps[colours] = axes.imshow(cells, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    if not crowded:
        font = min(10.0, 72 * inches / size / 3)
        for row, column, rows, share in zip(truth, predicted, count, shares, strict=True):
            colour = "white" if share > 0.3 else "black"
            axes.text(column, row, f"{rows}", ha="center", va="center", fontsize=font, color=colour)
    else:
        lines = [line.removeprefix("Examples labeled as ") for line in report.listing(limit=45, mistakes=True)]
        text = [
            line.replace(" classified by model as ", " → ").removesuffix("s").removesuffix(" time") for line in lines
        ]
        text = [line if len(line) <= 60 else line[:59] + "…" for line in text]
        panel[0].text(
            0, 1, "\n".join(["Most frequent mistakes", *text]), va="top", fontsize=8, linespacing=1.5, parse_math=False
        )
        panel[0].axis("off")
    marks = np.array([0, 0.01, 0.05, 0.2, 0.5, 1])
    both = [maps[colours].get_cmap()(0.15 + 0.85 * np.linspace(0, 1, 256))[:, None] for colours in ("Blues", "Reds")]
    bars.imshow(
        np.concatenate(both, axis=1), origin="lower", aspect="auto", extent=(0, 2, 0, 1), interpolation="nearest"
    )
    bars.set_xticks([0.5, 1.5], labels=["right", "wrong"], rotation=90, fontsize=7)
    bars.yaxis.tick_right()
    bars.set_yticks(np.sqrt(marks).tolist(), labels=[f"{mark:.0%}" for mark in marks])
    bars.set_title("share of\nits class", fontsize=8)
    _name_axes(axes, report, inches)
    axes.set_title(f"{report.rows:,} rows, accuracy {report.accuracy:.2%}")
    return figure


def _name_axes(axes: Axes, report: Report, inches: float) -> None:
    size = report.classes
    points = 72 * inches * 0.8 / size  # room for one label
    font = max(5.5, min(10.0, 0.85 * points))
    every = max(1, math.ceil(font / points))
    places = list(range(0, size, every))
    names = [_short(report.labels[place]) for place in places]
    across = max(map(len, names)) * 0.6 * font < points
    axes.set_xticks(places, labels=names, fontsize=font)
    axes.set_yticks(places, labels=names, fontsize=font)
    for text in axes.get_xticklabels():
        if not across:
            text.set(rotation=90) if size > 12 else text.set(rotation=40, ha="right", rotation_mode="anchor")
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)  # a label may hold dollar signs
    axes.set_xlabel("classified by the model as" + (f" (one class in {every} is named)" if every > 1 else ""))
    axes.set_ylabel("labeled as")


def _short(label: str) -> str:
    return label if len(label) <= 24 else label[:23] + "…"
