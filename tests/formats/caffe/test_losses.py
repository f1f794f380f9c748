"""Losses and accuracy against the loops of Caffe's layers, in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kindling.formats.caffe import losses

RNG = np.random.default_rng(0)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def softmax_loss(scores: np.ndarray, labels: np.ndarray, mode: str, ignore: int | None) -> float:
    """Scores (N, C, H), labels (N, H)."""
    e = np.exp(scores)
    p = e / e.sum(1, keepdims=True)
    total, count = 0.0, 0
    for i in range(scores.shape[0]):
        for j in range(scores.shape[2]):
            if labels[i, j] == ignore:
                continue
            total -= math.log(p[i, int(labels[i, j]), j])
            count += 1
    n = {"FULL": labels.size, "VALID": count, "BATCH_SIZE": len(scores), "NONE": 1}[mode]
    return total / max(n, 1)


@pytest.mark.parametrize("mode", ["FULL", "VALID", "BATCH_SIZE", "NONE"])
@pytest.mark.parametrize("ignore", [None, 2])
def test_softmax_with_loss(mode: str, ignore: int | None) -> None:
    scores, labels = RNG.standard_normal((3, 4, 5)), RNG.integers(0, 4, (3, 5))
    got = losses.SoftmaxLoss(1, mode, ignore)(tensor(scores), tensor(labels[:, None]))
    assert got.item() == pytest.approx(softmax_loss(scores, labels, mode, ignore), rel=1e-5)
    turned = losses.SoftmaxLoss(-2, mode, ignore)(tensor(scores), tensor(labels))
    assert turned.item() == pytest.approx(got.item())


def test_rows_without_a_label_that_counts_cost_nothing() -> None:
    loss = losses.SoftmaxLoss(ignore_label=255)
    assert loss(torch.zeros(2, 3), torch.tensor([255, 255])).item() == 0


@pytest.mark.parametrize(("mode", "n"), [("FULL", 12), ("VALID", 12), ("BATCH_SIZE", 3), ("NONE", 1)])
def test_sigmoid_cross_entropy(mode: str, n: int) -> None:
    x, t = RNG.standard_normal((3, 4)) * 5, RNG.random((3, 4))
    want = -(t * np.log(1 / (1 + np.exp(-x))) + (1 - t) * np.log(1 - 1 / (1 + np.exp(-x)))).sum() / n
    assert losses.SigmoidLoss(mode)(tensor(x), tensor(t)).item() == pytest.approx(want, rel=1e-4)


def test_euclidean_loss() -> None:
    a, b = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 2, 2))
    want = ((a - b.reshape(3, 4)) ** 2).sum() / 3 / 2
    assert losses.EuclideanLoss()(tensor(a), tensor(b)).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_hinge_loss(norm: str) -> None:
    x, labels = RNG.standard_normal((3, 4)), np.array([0, 3, 1])
    total = 0.0
    for i in range(3):
        for j in range(4):
            margin = max(0.0, 1 + (-x[i, j] if j == labels[i] else x[i, j]))
            total += margin if norm == "L1" else margin**2
    assert losses.HingeLoss(norm)(tensor(x), tensor(labels)).item() == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_contrastive_loss(legacy: bool) -> None:
    a, b, alike = RNG.standard_normal((4, 3)), RNG.standard_normal((4, 3)), np.array([1, 0, 1, 0])
    b[1] = a[1] + 0.1
    total = 0.0
    for i in range(4):
        square = float(((a[i] - b[i]) ** 2).sum())
        if alike[i]:
            total += square
        else:
            total += max(2.0 - square, 0) if legacy else max(2.0 - math.sqrt(square), 0) ** 2
    loss = losses.ContrastiveLoss(2.0, legacy)
    assert loss(tensor(a), tensor(b), tensor(alike)).item() == pytest.approx(total / 4 / 2, rel=1e-5)


def test_a_pair_that_is_one_point_has_a_gradient() -> None:
    a = torch.zeros(1, 3, requires_grad=True)
    losses.ContrastiveLoss()(a, torch.zeros(1, 3), torch.tensor([0])).backward()
    assert torch.isfinite(a.grad).all() if a.grad is not None else False


def test_multinomial_logistic_and_infogain_loss() -> None:
    p, labels = np.array([[0.2, 0.8], [1.0, 0.0]]), np.array([1, 1])
    want = -(math.log(0.8) + math.log(1e-20)) / 2
    assert losses.LogisticLoss()(tensor(p), tensor(labels)).item() == pytest.approx(want, rel=1e-5)
    scores, gains = RNG.standard_normal((3, 4)), RNG.random((4, 4))
    e = np.exp(scores)
    logs = np.log(e / e.sum(1, keepdims=True))
    truth = np.array([2, 0, 3])
    want = -sum((gains[truth[i]] * logs[i]).sum() for i in range(3)) / 3
    got = losses.InfogainLoss(tensor(gains))(tensor(scores), tensor(truth))
    assert got.item() == pytest.approx(want, rel=1e-5)
    alike = losses.InfogainLoss(torch.eye(4))(tensor(scores), tensor(truth))
    assert alike.item() == pytest.approx(losses.SoftmaxLoss()(tensor(scores), tensor(truth)).item(), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("ignore", [None, 1])
def test_accuracy_counts_ties_against(top_k: int, ignore: int | None) -> None:
    scores = np.round(RNG.standard_normal((50, 4)))
    labels = RNG.integers(0, 4, 50)
    right, count = 0, 0
    for row, label in zip(scores, labels, strict=True):
        if label == ignore:
            continue
        count += 1
        right += int((row >= row[label]).sum() - 1 < top_k)
    got = losses.Accuracy(top_k, ignore_label=ignore)(tensor(scores), tensor(labels))
    assert got.item() == pytest.approx(right / count)
