"""The report against scikit-learn, and the tallies against the order in which they are merged."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from kindling.errors import DataError, ModelError, TrainingError
from kindling.evaluate import ExactSum, Report, Tally, loss_rows

FUZZ = int(os.environ.get("KINDLING_FUZZ", "1"))
"""How many times as many random inputs as usual; set by `make test-all`."""


def tally_of(scores: np.ndarray, targets: np.ndarray, losses: np.ndarray | None = None) -> Tally:
    tally = Tally(scores.shape[1])
    tally.update(scores, targets, losses)
    return tally


@pytest.mark.parametrize("classes", [2, 3, 10, 257])
@pytest.mark.parametrize("occurring", [1.0, 0.4])
def test_metrics_equal_scikit_learn(classes: int, occurring: float) -> None:
    from sklearn import metrics

    rng = np.random.default_rng(classes)
    used = max(1, int(classes * occurring))
    targets = rng.integers(0, used, 600)
    scores = rng.normal(size=(600, classes)).astype(np.float32)
    scores[:, used:] -= 3 if occurring < 1 else 0
    scores[np.arange(600), targets] += 1
    report = tally_of(scores, targets).report()
    predicted = scores.argmax(axis=1)
    expected = metrics.precision_recall_fscore_support(targets, predicted, average="macro", zero_division=0)
    np.testing.assert_allclose((report.precision, report.recall, report.f1), expected[:3], rtol=1e-12)
    assert report.accuracy == metrics.accuracy_score(targets, predicted)
    np.testing.assert_array_equal(report.confusion, metrics.confusion_matrix(targets, predicted, labels=range(classes)))
    each = metrics.precision_recall_fscore_support(targets, predicted, labels=range(classes), zero_division=0)
    np.testing.assert_allclose([[c.precision, c.recall, c.f1, c.rows] for c in report.per_class], np.transpose(each))
    if classes > 5:
        top5 = metrics.top_k_accuracy_score(targets, scores, k=5, labels=range(classes))
        assert report.top5 == pytest.approx(top5, abs=1e-12)
    assert set(report.occurring) == {str(c) for c in np.union1d(targets, predicted)}


finite_or_not = st.floats(width=64)


@pytest.mark.fuzz
@settings(max_examples=60 * FUZZ, deadline=None)
@given(data=st.data())
def test_any_partitioning_and_order_gives_the_same_state(data: st.DataObject) -> None:
    rows, classes = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 8))
    scores = data.draw(hnp.arrays(np.float32, (rows, classes), elements=st.floats(width=32)))
    targets = data.draw(hnp.arrays(np.int64, (rows,), elements=st.integers(0, classes - 1)))
    losses = data.draw(hnp.arrays(np.float64, (rows,), elements=finite_or_not))
    whole = tally_of(scores, targets, losses)
    order = np.array(data.draw(st.permutations(range(rows))), int)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    parts = [tally_of(scores[i], targets[i], losses[i]).to_vector() for i in np.split(order, cuts)]
    merged = Tally(classes)
    for part in data.draw(st.permutations(parts)):
        merged.absorb(part)
    np.testing.assert_array_equal(merged.to_vector(), whole.to_vector())
    assert json.dumps(merged.report().to_json()) == json.dumps(whole.report().to_json())


@pytest.mark.fuzz
@settings(max_examples=40 * FUZZ, deadline=None)
@given(data=st.data())
def test_regression_is_exact_under_any_partitioning(data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(np.float64, (data.draw(st.integers(1, 30)), 2), elements=finite_or_not))
    whole, merged = Tally(), Tally()
    whole.update(values[:, :1], values[:, 1])
    for row in data.draw(st.permutations(range(len(values)))):
        part = Tally()
        part.update(values[row : row + 1, 0], values[row : row + 1, 1])
        merged.absorb(part.to_vector())
    np.testing.assert_array_equal(merged.to_vector(), whole.to_vector())


@pytest.mark.fuzz
@settings(max_examples=200 * FUZZ, deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_exact_sum_equals_fractions(values: np.ndarray) -> None:
    total = ExactSum()
    total.add(values)
    again = ExactSum.from_ints(np.array(total.to_ints(), np.int64).tolist())
    assert again.mean() == float(sum(map(Fraction, values.tolist())) / len(values))


def test_exact_sum_of_the_largest_floats_fits_its_vector() -> None:
    for sign in (1, -1):
        total = ExactSum()
        total.add(np.full(4096, sign * np.finfo(np.float64).max))
        for _ in range(51):  # 2**63 of them
            total.merge(ExactSum.from_ints(np.array(total.to_ints(), np.int64).tolist()))
        assert total.count == 2**63
        assert total.mean() == sign * np.finfo(np.float64).max


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, math.nan], math.nan),
        ([1.0, math.inf], math.inf),
        ([1.0, -math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([3e38, 3e38], 3e38),
    ],
)
def test_losses_that_are_not_finite_surface(losses: list[float], expected: float) -> None:
    report = tally_of(np.eye(2), np.array([0, 1]), np.array(losses)).report()
    np.testing.assert_equal(report.loss, expected)
    text = json.dumps(report.to_json(), allow_nan=False)
    np.testing.assert_equal(float(json.loads(text)["loss"]), expected)
    assert "Loss:" in str(report)


def test_scores_that_are_nan_lose_and_are_told() -> None:
    scores = np.array([[np.nan, -1.0, -2.0], [np.nan] * 3, [0.0, 1.0, 0.0]])
    report = tally_of(scores, np.array([1, 2, 1])).report()
    assert report.nan_rows == 2
    assert report.confusion.tolist() == [[0, 0, 0], [0, 2, 0], [1, 0, 0]]
    assert "2 rows have scores that are not numbers" in str(report)


def test_equal_scores_fall_to_the_lower_class() -> None:
    targets = np.arange(8)
    report = tally_of(np.zeros((8, 8)), targets).report()
    assert report.top5 == 5 / 8
    assert report.accuracy == 1 / 8


def test_one_column_of_logits_tells_two_classes_apart() -> None:
    for shape in [(4,), (4, 1)]:
        tally = Tally(2)
        tally.update(np.array([-1.0, 2.0, 3.0, 0.0]).reshape(shape), np.array([0, 1, 0, 0]))
        assert tally.report().confusion.tolist() == [[2, 1], [0, 1]]


def test_bfloat16_tensors_are_taken() -> None:
    tally = Tally(3)
    tally.update(torch.eye(3, dtype=torch.bfloat16), torch.arange(3, dtype=torch.uint8), torch.ones(3).half())
    assert tally.report().accuracy == 1.0


@pytest.mark.parametrize(
    ("outputs", "targets", "match"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), r"target 3 is out of range: the model has 3 classes, 0 to 2"),
        (np.zeros((2, 3)), np.array([0, -1]), "target -1 is out of range"),
        (np.zeros((2, 4)), np.array([0, 1]), r"expected \(rows, 3\)"),
        (np.zeros((2, 3)), np.array([0]), "do not have the same rows"),
        (np.zeros((2, 3)), np.zeros((2, 3)), "class indices"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), "class indices"),
    ],
)
def test_what_does_not_fit_is_refused(outputs: np.ndarray, targets: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Tally(3).update(outputs, targets)


def test_regression_does_not_broadcast() -> None:
    tally = Tally()
    tally.update(np.array([[1.0], [2.0]]), np.array([0.0, 4.0]))
    report = tally.report()
    assert (report.mean_absolute_error, report.mean_squared_error) == (1.5, 2.5)
    with pytest.raises(DataError, match="unequal"):
        tally.update(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ModelError, match="regression"):
        report.plot()


def test_tallies_of_other_models_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be merged"):
        Tally(3).merge(Tally(4))
    with pytest.raises(DataError, match="cannot be read"):
        Tally.from_vector(4, Tally(3).to_vector())
    with pytest.raises(DataError, match="not the state"):
        Tally.from_vector(3, Tally(3).to_vector()[:-1])
    with pytest.raises(DataError, match="2 labels do not name 3 classes"):
        Tally(3).report(("a", "b"))


def test_many_classes_need_little_memory() -> None:
    tally, rng = Tally(100_000), np.random.default_rng(0)
    for _ in range(10):
        scores = np.zeros((8, 100_000), np.float32)
        targets = rng.integers(0, 100_000, 8)
        scores[np.arange(8), targets] = 1
        tally.update(scores, targets)
    assert tally.to_vector().nbytes < 4096
    assert tally.report().accuracy == 1.0
    with pytest.raises(ModelError, match=r"report\.pairs"):
        _ = tally.report().confusion


def test_pending_pairs_are_folded_as_they_grow() -> None:
    tally, rng = Tally(3), np.random.default_rng(0)
    targets = rng.integers(0, 3, 50_000)
    for _ in range(4):
        tally.update(np.eye(3)[targets], targets)
    assert tally._pending_rows < 100_000
    assert tally.report().confusion.sum() == 200_000


def test_the_report_reads_like_deeplearning4j() -> None:
    targets = np.array([4] * 30 + [9] * 10)
    predicted = np.array([4] * 3 + [9] * 27 + [9] * 9 + [4])
    skipped = [(f"file:/p/{i}.jpg", "truncated") for i in range(7)]
    report = tally_of(np.eye(10)[predicted], targets, np.full(40, 0.5)).report(skipped=skipped, skipped_rows=9)
    text = str(report)
    assert "Examples labeled as 4 classified by model as 9: 27 times" in text
    assert "Examples labeled as 9 classified by model as 4: 1 time" in text
    assert "classified by model as 9: 9 times" not in text
    assert "Examples labeled as 9 classified by model as 9: 9 times" in report.listing()
    assert "8 of the 10 occur neither" in text
    assert "9 rows could not be used" in text
    assert "... and 4 more" in text
    assert "Loss:       0.5" in text
    data = report.to_json()
    assert data["accuracy"] == 12 / 40
    assert data["confusion"]["pairs"] == [[4, 4, 3], [4, 9, 27], [9, 4, 1], [9, 9, 9]]
    assert len(data["skipped"]) == 7


def test_a_long_listing_is_cut_and_says_so() -> None:
    scores = np.eye(30)[np.arange(30)]
    text = str(tally_of(scores, np.roll(np.arange(30), 1)).report())
    assert text.count("Examples labeled as") == 20
    assert "... and 10 rarer kinds of mistake" in text


def test_no_rows_is_no_crash() -> None:
    report = Tally(3).report()
    assert math.isnan(report.accuracy)
    assert report.loss is None
    assert "0 rows" in str(report)
    assert json.dumps(report.to_json(), allow_nan=False)
    assert repr(report)


@pytest.mark.parametrize("classes", [1, 3, 100, 257])
def test_the_plot_is_written(classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, 10 * classes)
    report = tally_of(rng.normal(size=(len(targets), classes)), targets).report([f"class {i}" for i in range(classes)])
    report.plot(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


# --- loss_rows

OUTPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
NUMBERS = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))


def focal(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((1 - outputs.softmax(1).gather(1, targets[:, None])) ** 2).mean()


class Focal(nn.Module):
    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return focal(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(), CLASSES),
        (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
        (nn.CrossEntropyLoss(), NUMBERS.softmax(1)),
        (nn.MultiMarginLoss(), CLASSES),
        (nn.MultiLabelSoftMarginLoss(), NUMBERS.round()),
        (nn.MSELoss(), NUMBERS),
        (nn.SmoothL1Loss(), NUMBERS),
        (nn.BCEWithLogitsLoss(), NUMBERS),
        (nn.PoissonNLLLoss(), NUMBERS),
        (nn.KLDivLoss(reduction="batchmean"), NUMBERS.softmax(1)),
        (F.cross_entropy, CLASSES),
        (F.l1_loss, NUMBERS),
        (focal, CLASSES),
        (Focal(), CLASSES),
        (lambda o, t: F.mse_loss(o, t), NUMBERS),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_mean_of_the_rows_is_the_loss_of_the_batch(loss: object, targets: torch.Tensor) -> None:
    rows = loss_rows(loss, OUTPUTS, targets)  # type: ignore[arg-type]
    assert rows.shape == (6,)
    torch.testing.assert_close(rows.mean(), loss(OUTPUTS, targets))  # type: ignore[operator]


def test_a_loss_that_adds_up_adds_up_each_row() -> None:
    rows = loss_rows(nn.MSELoss(reduction="sum"), OUTPUTS, NUMBERS)
    torch.testing.assert_close(rows, ((OUTPUTS - NUMBERS) ** 2).sum(1))


def test_the_loss_given_is_left_as_it_was() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    rows = loss_rows(loss, OUTPUTS, CLASSES)
    assert loss.reduction == "mean"
    torch.testing.assert_close(rows, F.cross_entropy(OUTPUTS, CLASSES, weight=loss.weight, reduction="none"))


def test_columns_of_one_do_not_broadcast() -> None:
    outputs = torch.tensor([[1.0], [3.0]])
    assert loss_rows(nn.MSELoss(), outputs, torch.zeros(2)).tolist() == [1.0, 9.0]
    assert loss_rows(lambda o, t: (o - t).abs().mean(), outputs, torch.zeros(2)).tolist() == [1.0, 3.0]
    expected = F.binary_cross_entropy_with_logits(outputs[:, 0], torch.tensor([0.0, 1.0]), reduction="none")
    torch.testing.assert_close(loss_rows(nn.BCEWithLogitsLoss(), outputs, torch.tensor([0, 1])), expected)


def test_no_loss_given_depends_on_the_targets() -> None:
    torch.testing.assert_close(loss_rows(None, OUTPUTS, CLASSES), F.cross_entropy(OUTPUTS, CLASSES, reduction="none"))
    torch.testing.assert_close(loss_rows(None, OUTPUTS, NUMBERS), ((OUTPUTS - NUMBERS) ** 2).mean(1))
    assert loss_rows(None, OUTPUTS[:0], CLASSES[:0]).shape == (0,)


def test_a_loss_of_many_numbers_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"shape \(1, 4\), not one number"):
        loss_rows(lambda outputs, targets: outputs - targets, OUTPUTS, NUMBERS)


def test_a_pickled_report_is_the_same() -> None:
    import pickle

    report = tally_of(np.eye(3), np.array([0, 1, 1])).report(("a", "b", "c"))
    again = pickle.loads(pickle.dumps(report))
    assert isinstance(again, Report)
    assert again.to_json() == report.to_json()
