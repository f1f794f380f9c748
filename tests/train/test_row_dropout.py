"""Dropout by row: the same masks at any number of workers, and torch's statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_loops import clouds, net, same, train

from kindling.train.order import mix
from kindling.train.row_dropout import Draws, RowDropout, seed_by_row

LAYERS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
SHAPES = {nn.Dropout: (6, 5), nn.Dropout1d: (6, 5), nn.Dropout2d: (6, 2, 3), nn.Dropout3d: (6, 2, 3, 2)}


def keys(count: int, salt: int = 0) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64), salt)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_s_mask_does_not_know_its_neighbours(kind: Any) -> None:
    draws = Draws()
    layer = RowDropout(kind(0.4), 3, draws)
    x = torch.randn(20, *SHAPES.get(kind, (6, 5)), generator=torch.Generator().manual_seed(0))
    draws.begin(keys(20))
    whole = layer(x)
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        draws.begin(keys(20)[part])
        assert torch.equal(layer(x[part]), whole[part])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_mean_deviation_and_pattern_are_torch_s(kind: Any, rate: float) -> None:
    """Over many rows of ones; the values that occur are the same as torch's, and occur as often."""
    draws = Draws()
    ours, theirs = RowDropout(kind(rate), 0, draws), kind(rate)
    shape = (20_000, *SHAPES.get(kind, (6, 5)))
    x = torch.ones(shape)
    draws.begin(keys(len(x)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = ours(x), theirs(x)
    torch.testing.assert_close(one.unique(), other.unique())
    for value in other.unique().tolist():
        shares = [torch.isclose(out, torch.tensor(value)).double().mean().item() for out in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)
    if kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout):  # whole channels
        flat = one.reshape(*shape[:2], -1)
        assert torch.equal(flat, flat[:, :, :1].expand_as(flat))


def test_places_rows_turns_and_layers_are_independent() -> None:
    draws = Draws()
    layers = [RowDropout(nn.Dropout(0.5), number, draws) for number in (0, 1)]
    x = torch.ones(4000, 8)
    draws.begin(keys(4000))
    masks = [(layer(x) > 0).double().reshape(-1) for layer in (*layers, layers[0])]
    draws.begin(keys(4000, salt=1))
    masks.append((layers[0](x) > 0).double().reshape(-1))
    first = masks[0].reshape(4000, 8)
    pairs = [(masks[0], other) for other in masks[1:]]
    pairs += [(first[:, 0], first[:, place]) for place in range(1, 8)]
    pairs += [(first[:-1].reshape(-1), first[1:].reshape(-1))]
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1].item()
        assert abs(correlation) < 5 / np.sqrt(len(one))


def test_in_inference_nothing_is_dropped() -> None:
    layer = RowDropout(nn.Dropout(0.5), 0, Draws()).eval()
    assert torch.equal(layer(torch.ones(3, 4)), torch.ones(3, 4))


def test_gradients_flow_where_rows_flow() -> None:
    draws = Draws()
    layer = RowDropout(nn.Dropout(0.5), 0, draws)
    x = torch.ones(5, 40, requires_grad=True)
    draws.begin(keys(5))
    out = layer(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())  # type: ignore[arg-type]


def test_shared_and_nested_layers_keep_their_names_and_weights() -> None:
    drop = nn.Dropout(0.3)
    module = nn.Sequential(nn.Linear(3, 3), drop, nn.Sequential(nn.Linear(3, 3), drop), nn.Dropout(0.1))
    before = list(module.state_dict())
    seed_by_row(module)
    assert list(module.state_dict()) == before
    assert module[1] is module[2][1]
    assert sum(isinstance(layer, RowDropout) for layer in module.modules()) == 2


@pytest.mark.parametrize("world", [2, 3, 4])
def test_another_number_of_workers_trains_the_same_net(world: int) -> None:
    """The promise that dropout by row is for: the same to float tolerance, epoch by epoch."""
    columns = clouds(96)
    module = net(nn.ReLU(), nn.Dropout(0.5))
    (alone,) = train(columns, module=module, batch_size=24, epochs=3)
    for one in train(columns, module=module, world=world, batch_size=24 // world, epochs=3):
        for name, value in one.state().items():
            torch.testing.assert_close(value, alone.state()[name], rtol=1e-4, atol=1e-5)
    (again,) = train(columns, module=module, batch_size=24, epochs=3)
    assert same(again.state(), alone.state())
    (other,) = train(columns, module=module, batch_size=24, epochs=3, seed=1)
    assert not same(other.state(), alone.state())
