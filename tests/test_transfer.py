"""The parts of `transfer` that no command shows: features are standardised while training, and not in the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd
from kindling.transfer import _folded, _standardising, transfer


def test_a_standardising_layer_and_a_linear_one_make_one_linear_layer() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, rng.uniform(0.1, 20.0, 12), (500, 12)).astype(np.float32)
    x[:, 3] *= 1e-4  # small numbers count as much
    x[:, 5] = 7.0  # never changes: it is moved to 0, not divided by 0
    standardise, classes = _standardising(x.mean(axis=0), x.std(axis=0)), nn.Linear(12, 4)
    with torch.no_grad():
        scaled = standardise.eval()(torch.from_numpy(x)).numpy()
        both = classes(torch.from_numpy(scaled))
        one = _folded(standardise, classes)(torch.from_numpy(x))
    expected = np.ones(12)
    expected[5] = 0
    np.testing.assert_allclose(scaled.std(axis=0), expected, atol=1e-4)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    torch.testing.assert_close(one, both, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: kd.load("lenet").until("conv1", "fc1"), "a head needs one output, the net has 2"),
        (
            lambda: kd.Model.of(nn.Unflatten(1, (2, 3)), shape=(6,)),
            r"vectors \(N, C\) or maps \(N, C, H, W\), the net gives \('N', 2, 3\)",
        ),
    ],
)
def test_nets_that_give_no_features_are_refused(net: object, said: str) -> None:
    with pytest.raises(kd.errors.ModelError, match=said):
        transfer(None, net())  # type: ignore[arg-type, operator]
