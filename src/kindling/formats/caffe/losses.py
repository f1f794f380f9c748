"""Caffe's loss layers and its Accuracy as modules of outputs and targets, beside the net and not within it.

Scores come as (N, C, ...) tensors, labels as (N, ...) whole numbers of any dtype, also with axes of length 1 as
Caffe's blobs have them. The rules are those of the layers' files in BVLC Caffe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1e-20
"""Below it Caffe's logistic losses take no logarithm."""


def _normalise(loss: Tensor, mode: str, batch: int, places: int, valid: Tensor) -> Tensor:
    """`loss` over what `mode` says: FULL (all places), VALID (those not ignored), BATCH_SIZE, NONE."""
    if mode == "VALID":
        return loss / valid.clamp(min=1)
    return loss / max(1, {"FULL": places, "BATCH_SIZE": batch, "NONE": 1}[mode])


def _rows(scores: Tensor, labels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Scores as (places, classes), labels as (places,)."""
    flat = scores.movedim(axis, -1)
    return flat.reshape(-1, flat.shape[-1]), labels.reshape(-1).long()


class SoftmaxLoss(nn.Module):
    """Cross entropy of the softmax of scores: SoftmaxWithLoss.

    >>> round(SoftmaxLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([1.0])).item(), 4)
    0.6931
    """

    def __init__(self, axis: int = 1, normalization: str = "VALID", ignore_label: int | None = None) -> None:
        super().__init__()
        self.axis, self.normalization, self.ignore_label = axis, normalization, ignore_label

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        rows, truth = _rows(scores, labels, self.axis)
        kept = torch.ones_like(truth, dtype=torch.bool) if self.ignore_label is None else truth != self.ignore_label
        losses = F.cross_entropy(rows, torch.where(kept, truth, torch.zeros_like(truth)), reduction="none")
        batch = math.prod(scores.shape[: self.axis])
        return _normalise((losses * kept).sum(), self.normalization, batch, truth.numel(), kept.sum())


class SigmoidLoss(nn.Module):
    """Cross entropy of the sigmoid of scores against targets in 0..1: SigmoidCrossEntropyLoss."""

    def __init__(self, normalization: str = "BATCH_SIZE", ignore_label: int | None = None) -> None:
        super().__init__()
        self.normalization, self.ignore_label = normalization, ignore_label

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        targets = targets.reshape(scores.shape).to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        kept = torch.ones_like(losses) if self.ignore_label is None else (targets.trunc() != self.ignore_label).float()
        return _normalise((losses * kept).sum(), self.normalization, len(scores), losses.numel(), kept.sum())


class EuclideanLoss(nn.Module):
    """Half the squared distance of a row, averaged over rows.

    >>> EuclideanLoss()(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])).item()
    2.0
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b.reshape(a.shape).to(a.dtype)).square().sum() / len(a) / 2


class HingeLoss(nn.Module):
    """Margins below 1 of each class against the rest, `"L1"` or `"L2"`."""

    def __init__(self, norm: str = "L1") -> None:
        super().__init__()
        self.norm = norm

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        rows = scores.flatten(1)
        truth = F.one_hot(labels.reshape(-1).long(), rows.shape[1]).to(rows.dtype)
        margins = (1 + rows * (1 - 2 * truth)).clamp(min=0)
        return (margins if self.norm == "L1" else margins.square()).sum() / len(rows)


class ContrastiveLoss(nn.Module):
    """Pairs that are alike drawn together, others pushed to a margin (Hadsell et al., 2006)."""

    def __init__(self, margin: float = 1.0, legacy: bool = False) -> None:
        super().__init__()
        self.margin, self.legacy = margin, legacy

    def forward(self, a: Tensor, b: Tensor, alike: Tensor) -> Tensor:
        squares = (a - b).flatten(1).square().sum(1)
        apart = self.margin - squares if self.legacy else self.margin - squares.clamp(min=1e-24).sqrt()
        apart = apart.clamp(min=0)
        pushed = apart if self.legacy else apart.square()
        return torch.where(alike.reshape(-1).long() != 0, squares, pushed).sum() / len(a) / 2


class LogisticLoss(nn.Module):
    """Negative logarithm of the true class's probability: MultinomialLogisticLoss."""

    def forward(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        rows = probabilities.flatten(1)
        picked = rows.gather(1, labels.reshape(-1, 1).long())
        return -picked.clamp(min=_LEAST).log().sum() / len(rows)


class InfogainLoss(nn.Module):
    """Cross entropy of the softmax of scores, weighed by a matrix of gains (true class, class)."""

    gains: Tensor

    def __init__(
        self, gains: Tensor, axis: int = 1, normalization: str = "VALID", ignore_label: int | None = None
    ) -> None:
        super().__init__()
        self.axis, self.normalization, self.ignore_label = axis, normalization, ignore_label
        self.register_buffer("gains", gains)

    def forward(self, scores: Tensor, labels: Tensor, gains: Tensor | None = None) -> Tensor:
        gains = self.gains if gains is None else gains
        rows, truth = _rows(scores, labels, self.axis)
        kept = torch.ones_like(truth, dtype=torch.bool) if self.ignore_label is None else truth != self.ignore_label
        logs = rows.softmax(1).clamp(min=_LEAST).log()
        weights = gains.reshape(rows.shape[1], rows.shape[1])[torch.where(kept, truth, torch.zeros_like(truth))]
        losses = -(weights * logs).sum(1)
        return _normalise((losses * kept).sum(), self.normalization, len(scores), truth.numel(), kept.sum())


class SumLoss(nn.Module):
    """The sum of a blob: what `loss_weight` makes of any layer."""

    def forward(self, blob: Tensor, *others: Tensor) -> Tensor:
        return blob.sum()


class Accuracy(nn.Module):
    """Share of the labels among the `top_k` best scores; a tie counts against, as in Caffe.

    >>> Accuracy()(torch.tensor([[0.1, 0.9], [0.7, 0.3]]), torch.tensor([1.0, 1.0])).item()
    0.5
    """

    def __init__(self, top_k: int = 1, axis: int = 1, ignore_label: int | None = None) -> None:
        super().__init__()
        self.top_k, self.axis, self.ignore_label = top_k, axis, ignore_label

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        rows, truth = _rows(scores, labels, self.axis)
        kept = torch.ones_like(truth, dtype=torch.bool) if self.ignore_label is None else truth != self.ignore_label
        own = rows.gather(1, torch.where(kept, truth, torch.zeros_like(truth))[:, None])
        right = ((rows >= own).sum(1) - 1 < self.top_k) & kept
        return right.sum().to(torch.float32) / kept.sum().clamp(min=1)


class Objective(nn.Module):
    """Losses (or one metric) of named blobs, weighed and added up.

    Args:
        terms: a weight, a module and the names of its blobs, each.
        outputs: the net's outputs in order; a single tensor stands for the first.
        targets: the targets in order, likewise.
    """

    def __init__(
        self,
        terms: list[tuple[float, nn.Module, tuple[str, ...]]],
        outputs: tuple[str, ...],
        targets: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList([module for _, module, _ in terms])
        self.weights = [weight for weight, _, _ in terms]
        self.blobs = [blobs for _, _, blobs in terms]
        self.outputs, self.targets = outputs, targets

    def forward(
        self, outputs: Tensor | Mapping[str, Tensor], targets: Tensor | Mapping[str, Tensor] | None = None
    ) -> Tensor:
        known = dict(outputs) if isinstance(outputs, Mapping) else {self.outputs[0]: outputs}
        if isinstance(targets, Mapping):
            known |= targets
        elif targets is not None and self.targets:
            known[self.targets[0]] = targets
        total: Tensor | None = None
        for weight, part, blobs in zip(self.weights, self.parts, self.blobs, strict=True):
            value = part(*(known[name] for name in blobs)) * weight
            total = value if total is None else total + value
        assert total is not None
        return total
