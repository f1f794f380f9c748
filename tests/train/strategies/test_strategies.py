"""One contract for every strategy, and the arithmetic of each against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kindling.errors import ConfigError
from kindling.train.strategies import (
    STRATEGIES,
    AllReduce,
    Comms,
    InProcessComms,
    ParameterAveraging,
    Replica,
    SoloComms,
    Strategy,
)

EVERY: dict[str, Callable[[], Strategy]] = {
    **{name: kind for name, kind in STRATEGIES.items()},
    "averaging every step": lambda: ParameterAveraging(every=1),
    "averaging with optimizer state": lambda: ParameterAveraging(every=3, average_optimizer_state=True),
    "post-local SGD": lambda: ParameterAveraging(every=2, allreduce_steps=3),
}


def _net(batch_norm: bool = False) -> nn.Module:
    return copy.deepcopy(_TEMPLATES[batch_norm])


def _template(batch_norm: bool) -> nn.Module:
    torch.manual_seed(0)  # torch's generator is shared by threads: nets are drawn here, and copied in the workers
    middle = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


_TEMPLATES = {batch_norm: _template(batch_norm) for batch_norm in (False, True)}


def _rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def _train(
    strategy: Strategy, comms: Comms, batches: list[list[tuple[torch.Tensor, torch.Tensor]]], net: nn.Module
) -> Replica:
    """Train on `batches[step][rank]`; an empty batch is a step without rows."""
    replica = Replica(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True))
    state = strategy.begin(replica, strategy.init(replica), comms)
    for step in batches:
        rows_W = np.array([len(x) for x, _ in step])
        x, y = step[comms.rank]
        replica.optimizer.zero_grad()
        if len(x):
            (nn.functional.cross_entropy(net(x), y) * strategy.loss_scale(rows_W, comms.rank, state)).backward()
        state = strategy.on_gradients(replica, state, rows_W, comms)
        if len(x) or strategy.steps_together(state):
            replica.optimizer.step()
        state = strategy.on_step(replica, state, rows_W, comms)
    strategy.on_epoch(replica, state, comms)
    strategy.close(replica)
    return replica


def _weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in module.state_dict().values()])


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
class TestContract:
    def test_one_worker_is_plain_torch_bit_for_bit(self, make: Callable[[], Strategy]) -> None:
        batches = [[_rows(8, step)] for step in range(12)]
        plain = _net()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for ((x, y),) in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
        trained = _train(make(), SoloComms(), batches, _net())
        assert torch.equal(_weights(trained.module), _weights(plain))

    @pytest.mark.parametrize("world", [2, 3, 4])
    def test_workers_that_agree_are_left_alone(self, make: Callable[[], Strategy], world: int) -> None:
        batches = [[_rows(8, step)] * world for step in range(7)]
        alone = _train(make(), SoloComms(), [[step[0]] for step in batches], _net())
        for replica in InProcessComms.run(world, lambda comms: _train(make(), comms, batches, _net())):
            torch.testing.assert_close(_weights(replica.module), _weights(alone.module), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("world", [2, 3])
    @pytest.mark.parametrize("batch_norm", [False, True])
    def test_all_end_with_the_same_weights(self, make: Callable[[], Strategy], world: int, batch_norm: bool) -> None:
        batches = [[_rows(4 + rank, 10 * step + rank) for rank in range(world)] for step in range(7)]
        first, *others = InProcessComms.run(world, lambda comms: _train(make(), comms, batches, _net(batch_norm)))
        for other in others:
            assert torch.equal(_weights(other.module), _weights(first.module))

    def test_the_same_twice_gives_the_same_bits(self, make: Callable[[], Strategy]) -> None:
        batches = [[_rows(4 + rank, 10 * step + rank) for rank in range(3)] for step in range(7)]
        one, two = (InProcessComms.run(3, lambda comms: _train(make(), comms, batches, _net()))[0] for _ in range(2))
        assert torch.equal(_weights(one.module), _weights(two.module))

    def test_a_worker_without_rows_joins_in(self, make: Callable[[], Strategy]) -> None:
        batches = [[_rows(6, step), _rows(0)] for step in range(6)]
        alone = _train(make(), SoloComms(), [[step[0]] for step in batches], _net())
        for replica in InProcessComms.run(2, lambda comms: _train(make(), comms, batches, _net())):
            torch.testing.assert_close(_weights(replica.module), _weights(alone.module), rtol=1e-5, atol=1e-6)


def test_all_reduce_is_the_gradient_of_the_whole_batch_however_rows_are_spread() -> None:
    x, y = _rows(30)
    plain = _net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    split = [(x[:3], y[:3]), (x[3:21], y[3:21]), (x[21:], y[21:])]
    trained = InProcessComms.run(3, lambda comms: _train(AllReduce(), comms, [split] * 5, _net()))[0]
    torch.testing.assert_close(_weights(trained.module), _weights(plain), rtol=1e-5, atol=1e-6)


def test_averaging_is_a_mean_weighted_by_rows() -> None:
    batches = [[_rows(2, 1), _rows(6, 2)], [_rows(2, 3), _rows(6, 4)]]
    alone = [_train(AllReduce(), SoloComms(), [[step[rank]] for step in batches], _net()) for rank in range(2)]
    expected = 0.25 * _weights(alone[0].module) + 0.75 * _weights(alone[1].module)
    both = InProcessComms.run(2, lambda comms: _train(ParameterAveraging(every=2), comms, batches, _net()))
    torch.testing.assert_close(_weights(both[0].module), expected, rtol=1e-5, atol=1e-6)


def test_optimizer_state_is_averaged_only_when_asked() -> None:
    batches = [[_rows(4, 1), _rows(4, 2)]]

    def momenta(strategy: Strategy) -> list[torch.Tensor]:
        return [
            replica.optimizer_tensors()[0]
            for replica in InProcessComms.run(2, lambda comms: _train(strategy, comms, batches, _net()))
        ]

    own = momenta(ParameterAveraging(every=1))
    shared = momenta(ParameterAveraging(every=1, average_optimizer_state=True))
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(shared[0], (own[0] + own[1]) / 2)
    assert torch.equal(shared[0], shared[1])


@pytest.mark.parametrize(("strategy", "rounds"), [(AllReduce(), 10), (ParameterAveraging(every=5), 2)])
def test_bytes_sent_follow_the_formula(strategy: Strategy, rounds: int) -> None:
    batches = [[_rows(4, 10 * step + rank) for rank in range(4)] for step in range(10)]
    parameters = sum(p.numel() for p in _net().parameters())

    def sent(comms: Comms) -> int:
        _train(strategy, comms, batches, _net())
        return comms.bytes_sent

    assert InProcessComms.run(4, sent) == [rounds * 2 * 3 * parameters * 4 // 4] * 4


def test_unused_branches_do_not_stop_the_others() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    batches = [
        [(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)), (-torch.ones(2, 4), torch.ones(2, dtype=torch.int64))]
    ]
    net = Sometimes()
    one, two = InProcessComms.run(2, lambda comms: _train(AllReduce(), comms, batches, copy.deepcopy(net)))
    assert torch.equal(_weights(one.module), _weights(two.module))
    for branch in (net.a, net.b):
        name = "a" if branch is net.a else "b"
        assert not torch.equal(one.module.get_submodule(name).weight, branch.weight)


@pytest.mark.parametrize("every", [0, -1, 2.5])
def test_a_period_that_cannot_be_is_refused(every: object) -> None:
    with pytest.raises(ConfigError, match="leaves no step between two averagings"):
        ParameterAveraging(every=every)  # type: ignore[arg-type]


def test_a_failing_worker_does_not_leave_the_others_waiting() -> None:
    def work(comms: Comms) -> None:
        if comms.rank == 1:
            raise ValueError("gone")
        comms.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="gone"):
        InProcessComms.run(3, work)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (torch.optim.SGD, True),
        (torch.optim.Adam, True),
        (lambda p: torch.optim.SGD(p, foreach=True), None),
        (lambda p: torch.optim.SGD(p, fused=False), False),
        (lambda p: torch.optim.Adam(p, differentiable=True), None),
    ],
)
def test_a_fused_step_unless_the_optimizer_says_otherwise(make: Callable[..., Any], fused: bool | None) -> None:
    replica = Replica.of(_net(), make)
    assert [group["fused"] for group in replica.optimizer.param_groups] == [fused]


@pytest.mark.parametrize("make", [torch.optim.Adadelta, lambda p: torch.optim.LBFGS(list(p))])
def test_optimizers_without_a_fused_step(make: Callable[..., Any]) -> None:
    assert not any(group.get("fused") for group in Replica.of(_net(), make).optimizer.param_groups)


def test_sparse_gradients_take_no_fused_step() -> None:
    net = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))
    replica = Replica.of(net, partial(torch.optim.SGD, lr=0.1))
    net(torch.tensor([[1, 2]])).sum().backward()
    before = net[0].weight.detach().clone()
    replica.optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_fused_steps_agree_with_plain_ones() -> None:
    batches = [_rows(8, step) for step in range(20)]
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        trained = []
        for fused in (False, True):
            net = _net()
            optimizer = Replica.of(
                net, partial(kind, lr=0.05) if fused else partial(kind, lr=0.05, fused=False)
            ).optimizer
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            trained.append(_weights(net))
        torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)
