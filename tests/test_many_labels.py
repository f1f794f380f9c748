"""Figures of rows with any number of labels are scikit-learn's, and the same however the rows are split."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from kindling.errors import DataError, ModelError
from kindling.many_labels import LabelTally

ROWS, NAMES = 300, ("red", "green", "blue", "never")


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = (rng.random((ROWS, 4)) < (0.5, 0.2, 0.05, 0)).astype(np.uint8)
    scores = rng.normal(size=(ROWS, 4)) + 2.0 * truth - 1.0
    scores[:, 3] = -1.0
    return scores, truth, rng.random(ROWS)


def test_figures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth, losses = rows()
    tally = LabelTally(4)
    tally.update(scores, truth, losses)
    report = tally.report(NAMES)
    said = scores > 0
    assert report.occurring == NAMES[:3]
    assert report.accuracy == metrics.accuracy_score(truth, said)
    assert report.label_accuracy == pytest.approx(1 - metrics.hamming_loss(truth, said))
    assert report.micro_f1 == pytest.approx(metrics.f1_score(truth, said, average="micro"))
    names = ("precision", "recall", "f1")
    for name, each in zip(
        names, metrics.precision_recall_fscore_support(truth, said, zero_division=0)[:3], strict=True
    ):
        assert [getattr(score, name) for score in report.per_class] == pytest.approx(each.tolist())
        assert getattr(report, name) == pytest.approx(each[:3].mean())  # of the labels that occur
    assert report.loss == pytest.approx(losses.mean())
    assert [score.rows for score in report.per_class] == truth.sum(0).tolist()


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_any_split_gives_the_same(parts: int) -> None:
    scores, truth, losses = rows()
    whole, merged = LabelTally(4), LabelTally(4)
    whole.update(scores, truth, losses)
    for mine in np.array_split(np.random.default_rng(parts).permutation(ROWS), parts):
        part = LabelTally(4)
        part.update(scores[mine], truth[mine], losses[mine])
        merged.absorb(part.to_vector())
    assert merged.to_vector().tolist() == whole.to_vector().tolist()


def test_a_report_reads_well_and_is_json() -> None:
    scores, truth, losses = rows()
    scores[3, 1] = math.nan
    tally = LabelTally(4)
    tally.update(scores, truth, losses)
    report = tally.report(NAMES, skipped=[("p7", "no tags")])
    text = str(report)
    assert "300 rows with any number of 4 labels" in text
    assert "1 rows have scores that are not numbers" in text
    assert "p7: no tags" in text
    assert all(any(line.split()[:1] == [name] for line in text.splitlines()) for name in NAMES)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["micro_f1"] == report.micro_f1
    assert [score["label"] for score in data["classes"]] == list(NAMES)
    assert "confusion" not in data
    with pytest.raises(ModelError, match="no confusion matrix"):
        report.plot("never.png")
    assert str(LabelTally(2).report())  # of no rows


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"scores of shape \(2, 3\) .* do not fit 4 labels"):
        LabelTally(4).update(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(DataError, match="not the state of a tally of 4 labels"):
        LabelTally(4).absorb(LabelTally(3).to_vector())
    with pytest.raises(DataError, match="1 names do not name 2 labels"):
        LabelTally(2).report(["a"])
