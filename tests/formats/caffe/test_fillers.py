"""Fillers: the distributions that Caffe documents, measured on many numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kindling.errors import FormatError
from kindling.formats.caffe.fillers import fill
from kindling.formats.caffe.prototxt import parse


def filled(text: str, *shape: int, seed: int = 0) -> torch.Tensor:
    tensor = torch.full(shape, math.nan)
    fill(tensor, parse(text, "FillerParameter"), torch.Generator().manual_seed(seed))
    assert torch.isfinite(tensor).all()
    return tensor


def test_constants() -> None:
    assert filled("", 3).tolist() == [0, 0, 0]
    assert filled('type: "constant" value: -2', 2).tolist() == [-2, -2]


def test_uniform_numbers_fill_their_range() -> None:
    values = filled('type: "uniform" min: -1 max: 3', 200, 200)
    assert (values.min() >= -1, values.max() <= 3) == (True, True)
    assert values.mean().item() == pytest.approx(1, abs=0.03)
    assert values.std().item() == pytest.approx(4 / math.sqrt(12), rel=0.02)


def test_gaussian_numbers_have_mean_and_deviation() -> None:
    values = filled('type: "gaussian" mean: 2 std: 0.5', 200, 200)
    assert values.mean().item() == pytest.approx(2, abs=0.02)
    assert values.std().item() == pytest.approx(0.5, rel=0.02)


def test_sparse_gaussians_leave_so_many_outputs_for_an_input() -> None:
    values = filled('type: "gaussian" std: 1 sparse: 15', 1000, 50)
    assert (values != 0).sum(0).float().mean().item() == pytest.approx(15, rel=0.1)
    assert values[values != 0].std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("norm", "n"), [("FAN_IN", 20 * 9), ("FAN_OUT", 50 * 9), ("AVERAGE", 35 * 9)])
def test_xavier_and_msra_scale_with_the_fan(norm: str, n: int) -> None:
    xavier = filled(f'type: "xavier" variance_norm: {norm}', 50, 20, 3, 3)
    assert xavier.abs().max().item() == pytest.approx(math.sqrt(3 / n), rel=0.01)
    assert xavier.std().item() == pytest.approx(math.sqrt(1 / n), rel=0.03)
    msra = filled(f'type: "msra" variance_norm: {norm}', 50, 20, 3, 3)
    assert msra.std().item() == pytest.approx(math.sqrt(2 / n), rel=0.03)


def test_a_positive_unit_ball_adds_up_to_one_in_each_row() -> None:
    values = filled('type: "positive_unitball"', 5, 4, 3)
    assert (values >= 0).all()
    torch.testing.assert_close(values.sum((1, 2)), torch.ones(5))


@pytest.mark.parametrize("width", [3, 4, 5])
def test_bilinear_weights_are_those_of_an_interpolation(width: int) -> None:
    values = filled('type: "bilinear"', 2, 1, width, width)
    f = math.ceil(width / 2)
    c = (width - 1) / (2.0 * f)
    want = [(1 - abs(x / f - c)) * (1 - abs(y / f - c)) for y in range(width) for x in range(width)]
    np.testing.assert_allclose(values[1, 0].reshape(-1), want, rtol=1e-6)


def test_the_same_generator_gives_the_same_numbers() -> None:
    assert torch.equal(filled('type: "xavier"', 4, 4, seed=1), filled('type: "xavier"', 4, 4, seed=1))
    assert not torch.equal(filled('type: "xavier"', 4, 4, seed=1), filled('type: "xavier"', 4, 4, seed=2))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('\ntype: "xaver"', r"no filler 'xaver'.*Did you mean 'xavier'"),
        ('type: "uniform" min: 3 max: 1', "min 3.0 and max 1.0"),
        ('type: "uniform" min: nan', "cannot work with"),
        ('type: "gaussian" std: -1', "std -1.0"),
        ('type: "bilinear"', "a blob of shape"),
    ],
)
def test_what_makes_no_distribution_is_refused(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        fill(torch.empty(2, 3), parse(text, "FillerParameter"))
