"""What training makes small: losses of a net's outputs against the targets of a batch, each with its weight.

A loss is a mean, and means must add up: over the parts of a step, over workers, over an epoch. So each comes with its
*mass*, the number it was divided by: the rows, or the sum of their weights where rows or classes have some. Then the
result does not depend on how rows are spread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from kindling.errors import KindlingError, TrainingError
from kindling.evaluate import aligned, loss_rows
from kindling.prepare import Preparation
from kindling.signature import Signature

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class OutputsLoss:
    """A loss of several outputs together, with or without a target: `loss(*outputs, target)`, a mean over rows.

    Given to `Model.fit` under the name of one of the outputs, whose target it takes.

    >>> OutputsLoss(nn.TripletMarginLoss(), ("anchor", "like", "unlike"), target=False).outputs[0]
    'anchor'
    """

    loss: Callable[..., Tensor]
    outputs: tuple[str, ...]
    """In the order in which the loss takes them."""
    target: bool = True
    """Whether a target follows them; else no column is read for it."""

    def of(self, outputs: Mapping[str, Tensor], target: Tensor, rows: slice = slice(None)) -> Tensor:
        """The mean over some rows."""
        given = [outputs[name] for name in self.outputs] + ([target] if self.target else [])
        return self.loss(*(tensor[rows] for tensor in given))


@dataclass(frozen=True)
class Term:
    """One loss: which output is held against which target, and how much it counts."""

    output: str
    target: str
    """Name in the batch."""
    loss: LossFunction | OutputsLoss
    weight: float = 1.0

    @property
    def outputs(self) -> tuple[str, ...]:
        """All outputs that it reads."""
        return self.loss.outputs if isinstance(self.loss, OutputsLoss) else (self.output,)

    def rows(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Each row's loss: shape (N,)."""
        own, target = outputs[self.output], batch[self.target]
        if not isinstance(self.loss, OutputsLoss):
            return loss_rows(self.loss, own, target)
        parts = [self.loss.of(outputs, target, slice(row, row + 1)).reshape(()) for row in range(len(own))]
        return torch.stack(parts) if parts else own.new_zeros(0)

    def mean(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The mean over the batch's rows."""
        own, target = outputs[self.output], batch[self.target]
        if isinstance(self.loss, OutputsLoss):
            return self.loss.of(outputs, target)
        return self.loss(own, aligned(self.loss, own, target))


@dataclass(frozen=True)
class Objective:
    """The weighted sum of some terms.

    >>> objective = Objective((Term("y", "target", nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))),))
    >>> objective.counts_rows, objective.masses({"target": torch.tensor([0, 1, 1])}, 3)
    (False, array([7.]))
    """

    terms: tuple[Term, ...]
    row_weight: str | None = None
    """Name in the batch of the rows' weights: two for a row is as good as the row twice."""
    ragged: bool = False
    """Targets are padded: how many count is in none but their own values."""

    @classmethod
    def of(cls, loss: LossFunction | Objective, signature: Signature, preparation: Preparation) -> Objective:
        """One loss, of the first output against the first target, unless there is an objective already."""
        if isinstance(loss, Objective):
            return loss
        return cls((Term(next(iter(signature.outputs)), preparation.targets[0].name, loss),))

    @property
    def counts_rows(self) -> bool:
        """Whether every mass is the number of rows."""
        return self.row_weight is None and not any(
            weighing is not None and (self.ragged or weighing[0] is not None)
            for weighing in (_weighing(term.loss) for term in self.terms)
        )

    def masses(self, batch: Mapping[str, Tensor], rows: int) -> np.ndarray:
        """What each term's mean is divided by: shape (terms,), float64."""
        if self.counts_rows:
            return np.full(len(self.terms), float(rows))
        return np.array([self._mass(term, batch, rows) for term in self.terms])

    def _mass(self, term: Term, batch: Mapping[str, Tensor], rows: int) -> float:
        weighing, targets = _weighing(term.loss), batch[term.target]
        weights = None if self.row_weight is None else batch[self.row_weight].double()
        if weighing is None or targets.is_floating_point():
            return float(rows) if weights is None else float(weights.sum())
        by_class, ignored = weighing
        counted = targets != ignored
        shares = counted.double()
        if by_class is not None:
            shares = torch.where(counted, by_class.to(targets.device).double()[targets.clamp(min=0)], 0.0)
        if weights is not None:
            shares = shares.reshape(rows, -1).mean(1) * weights
        return float(shares.sum())

    def losses(
        self, module: nn.Module, signature: Signature, batch: Mapping[str, Tensor], precision: str = "fp32"
    ) -> list[Tensor]:
        """The mean loss of a batch by each term, numbers with a gradient.

        One row alone has no variance; where batch normalisation refuses it, the statistics so far serve.

        Args:
            precision: `"bf16"` runs the net and the losses under torch's autocast.
        Raises: TrainingError, when the net or a loss refuses the batch, or a loss is not one number.
        """
        try:
            return self._losses(module, signature, batch, precision)
        except TrainingError as error:
            if "Expected more than 1 value per channel" not in str(error.__cause__):
                raise
            with _stored_statistics(module):
                return self._losses(module, signature, batch, precision)

    def _losses(
        self, module: nn.Module, signature: Signature, batch: Mapping[str, Tensor], precision: str
    ) -> list[Tensor]:
        try:
            with _autocast(batch, precision):
                outputs = signature.call(module, batch)
                values = [self._mean(term, outputs, batch) for term in self.terms]
        except KindlingError:
            raise
        except Exception as error:  # whatever a user's net or loss function may raise
            shapes = {name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in batch.items()}
            raise TrainingError(
                f"the net or its loss refused a batch: {type(error).__name__}: {error}. The batch was {shapes}."
            ) from error
        for value in values:
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TrainingError(f"the loss of a batch is {shape}, not one number. Average it in the loss function.")
            if not value.requires_grad:
                raise TrainingError(
                    "the loss depends on no trainable parameter. Is every layer frozen? Use unfreeze() or then()."
                )
        return [value.reshape(()) for value in values]

    def _mean(self, term: Term, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        if self.row_weight is None:
            return term.mean(outputs, batch)
        weights = batch[self.row_weight]
        total = (term.rows(outputs, batch) * weights).sum()
        return total / max(self._mass(term, batch, len(weights)), torch.finfo(torch.float32).tiny)

    def rows(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Each row's loss by each term, without the rows' weights: shape (N,), float64."""
        return [term.rows(outputs, batch).double().detach().cpu() for term in self.terms]

    def total(self, means: Sequence[float]) -> float:
        """The terms' means as one number."""
        return sum(term.weight * mean for term, mean in zip(self.terms, means, strict=True))


def _weighing(loss: Any) -> tuple[Tensor | None, int] | None:
    """The class weights and the ignored class of a loss that divides by what it did not ignore; None for others."""
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return (loss.weight, loss.ignore_index) if loss.reduction == "mean" else None
    if isinstance(loss, partial) and loss.func in (functional.cross_entropy, functional.nll_loss):
        if loss.keywords.get("reduction", "mean") == "mean":
            return loss.keywords.get("weight"), loss.keywords.get("ignore_index", -100)
    return None


def _autocast(batch: Mapping[str, Tensor], precision: str) -> contextlib.AbstractContextManager[None]:
    """Where matrix products and convolutions run in bfloat16, if `precision` says so."""
    if precision == "fp32":
        return contextlib.nullcontext()
    device = next(iter(batch.values())).device.type
    return torch.autocast(device, torch.bfloat16)


@contextlib.contextmanager
def _stored_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation in inference mode, for layers that keep statistics."""
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
