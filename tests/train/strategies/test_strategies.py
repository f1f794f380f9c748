"""One contract for every strategy, and the arithmetic of each against plain torch or its paper's algorithm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from strategy_cases import (
    CASES,
    REPEATABLE,
    Case,
    net,
    plain,
    restored,
    rows,
    sgd,
    snapshot,
    step_of,
    stored,
    train,
    uneven,
    weights,
)
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

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_repeatable = pytest.mark.parametrize("case", REPEATABLE.values(), ids=REPEATABLE.keys())


def test_every_strategy_is_under_the_contract() -> None:
    assert {type(case.make()) for case in CASES.values()} == set(STRATEGIES.values())


@every_case
def test_one_worker_is_the_reference(case: Case) -> None:
    epochs = [[[rows(8, 10 * epoch + step)] for step in range(7)] for epoch in range(2)]
    expected = net()
    case.alone(epochs, expected)
    trained = train(case.make(), SoloComms(), epochs, net())
    if case.exactly:
        assert torch.equal(weights(trained.module), weights(expected))
    else:
        torch.testing.assert_close(weights(trained.module), weights(expected), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(trained.module), weights(net()))


@pytest.mark.parametrize("world", [2, 3, 4])
@every_repeatable
def test_workers_that_agree_are_left_alone(case: Case, world: int) -> None:
    batches = [[rows(8, step)] * world for step in range(7)]
    alone = train(case.make(), SoloComms(), [[[step[0]] for step in batches]], net())
    for replica in InProcessComms.run(world, lambda comms: train(case.make(), comms, [batches], net())):
        torch.testing.assert_close(weights(replica.module), weights(alone.module), rtol=0, atol=case.rounding)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
@every_case
def test_all_end_with_the_same_weights(case: Case, world: int, batch_norm: bool) -> None:
    epochs = [uneven(world, 7), uneven(world, 5)]
    first, *others = InProcessComms.run(world, lambda comms: train(case.make(), comms, epochs, net(batch_norm)))
    assert torch.isfinite(weights(first.module)).all()
    for other in others:
        assert torch.equal(weights(other.module), weights(first.module))


@every_repeatable
def test_the_same_twice_gives_the_same_bits(case: Case) -> None:
    batches = uneven(3, 7)
    one, two = (InProcessComms.run(3, lambda comms: train(case.make(), comms, [batches], net()))[0] for _ in range(2))
    assert torch.equal(weights(one.module), weights(two.module))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@every_repeatable
def test_saved_and_restored_it_goes_on_bit_for_bit(case: Case, world: int) -> None:
    """In the middle of an epoch, between two meetings of the workers, and with sums in flight."""
    epochs = [uneven(world, 7), uneven(world, 5)]

    def work(comms: Comms) -> list[torch.Tensor]:
        return [
            weights(train(case.make(), comms, epochs, net(batch_norm=True), broken_after=steps).module)
            for steps in (None, 2, 6, 7, 9)
        ]

    for unbroken, *continued in InProcessComms.run(world, work):
        for one in continued:
            assert torch.equal(one, unbroken)


@every_case
def test_a_worker_without_rows_joins_in(case: Case) -> None:
    batches = [[rows(6, step), rows(0)] for step in range(6)]
    one, two = InProcessComms.run(2, lambda comms: train(case.make(), comms, [batches], net()))
    assert torch.equal(weights(one.module), weights(two.module))
    if case.rowless and case.make().deterministic:
        alone = train(case.make(), SoloComms(), [[[step[0]] for step in batches]], net())
        torch.testing.assert_close(weights(one.module), weights(alone.module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
@every_case
def test_bytes_sent_follow_the_formula(case: Case, world: int) -> None:
    if not (case.sends or case.send_together):
        pytest.skip("they depend on the gradients, or on the optimizer")

    def sent(comms: Comms) -> int:
        train(case.make(), comms, [uneven(world, 7)], net())
        return comms.bytes_sent

    found = InProcessComms.run(world, sent)
    if case.sends:
        assert found == [case.sends(world, 7)] * world
    else:
        assert case.send_together is not None
        assert sum(found) == case.send_together(world, 7)


@every_repeatable
def test_another_number_of_workers_goes_on_with_all_that_was_learned(case: Case) -> None:
    """Four workers save in the middle of an epoch, two go on: both agree, and what is elastic is plain training."""
    strategy = case.make()
    before, after = uneven(4, 5), [[rows(9, 70 + step), rows(13, 80 + step)] for step in range(3)]

    def first(comms: Comms) -> dict[str, Any]:
        module = net()
        replica = Replica(module, sgd(module))
        state = strategy.begin(replica, strategy.init(replica), comms)
        for step in before:
            state = step_of(strategy, replica, state, step, comms)
        saved = stored(snapshot(strategy, replica, state, comms))
        strategy.close(replica)
        return saved

    parts = InProcessComms.run(4, first)
    module = {name: torch.stack([p["module"][name] for p in parts]).mean(0) for name in parts[0]["module"]}

    def second(comms: Comms) -> torch.Tensor:
        state = strategy.regroup([part["strategy"] for part in parts], comms.rank, comms.world)
        saved = stored({"module": module, "optimizer": parts[0]["optimizer"], "strategy": state})
        replica, state = restored(strategy, saved, comms)
        for step in after:
            state = step_of(strategy, replica, state, step, comms)
        strategy.on_epoch(replica, state, comms)
        strategy.close(replica)
        return weights(replica.module)

    one, two = InProcessComms.run(2, second)
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()
    if strategy.elastic:
        expected = net()
        whole = [[(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))] for step in [*before, *after]]
        plain([whole], expected)
        torch.testing.assert_close(one, weights(expected), rtol=1e-4, atol=1e-5)


def test_all_reduce_is_the_gradient_of_the_whole_batch_however_rows_are_spread() -> None:
    x, y = rows(30)
    whole = net()
    optimizer = sgd(whole)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        optimizer.step()
    split = [(x[:3], y[:3]), (x[3:21], y[3:21]), (x[21:], y[21:])]
    trained = InProcessComms.run(3, lambda comms: train(AllReduce(), comms, [[split] * 5], net()))[0]
    torch.testing.assert_close(weights(trained.module), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if isinstance(c.make(), AllReduce)])
def test_a_batch_in_three_parts_is_the_reference_on_the_whole(name: str) -> None:
    """Compression too is linear in the sum of the gradients, with what it keeps for later."""
    case = CASES[name]
    parts = [[rows(2, 3 * step), rows(5, 3 * step + 1), rows(3, 3 * step + 2)] for step in range(8)]
    whole = [[(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))] for step in parts]
    expected = net()
    case.alone([whole], expected)
    for replica in InProcessComms.run(3, lambda comms: train(case.make(), comms, [parts], net())):
        torch.testing.assert_close(weights(replica.module), weights(expected), rtol=1e-4, atol=case.rounding)


def test_averaging_is_a_mean_weighted_by_rows() -> None:
    batches = [[rows(2, 1), rows(6, 2)], [rows(2, 3), rows(6, 4)]]
    alone = [train(AllReduce(), SoloComms(), [[[step[rank]] for step in batches]], net()) for rank in range(2)]
    expected = 0.25 * weights(alone[0].module) + 0.75 * weights(alone[1].module)
    both = InProcessComms.run(2, lambda comms: train(ParameterAveraging(every=2), comms, [batches], net()))
    torch.testing.assert_close(weights(both[0].module), expected, rtol=1e-5, atol=1e-6)


def test_optimizer_state_is_averaged_only_when_asked() -> None:
    batches = [[rows(4, 1), rows(4, 2)]]

    def momenta(strategy: Strategy) -> list[torch.Tensor]:
        return [
            replica.optimizer_tensors()[0]
            for replica in InProcessComms.run(2, lambda comms: train(strategy, comms, [batches], net()))
        ]

    own = momenta(ParameterAveraging(every=1))
    shared = momenta(ParameterAveraging(every=1, average_optimizer_state=True))
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(shared[0], (own[0] + own[1]) / 2)
    assert torch.equal(shared[0], shared[1])


def test_unused_branches_do_not_stop_the_others() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    batches = [
        [(torch.ones(2, 6), torch.zeros(2, dtype=torch.int64)), (-torch.ones(2, 6), torch.ones(2, dtype=torch.int64))]
    ]
    branches = Sometimes()
    one, two = InProcessComms.run(
        2, lambda comms: train(AllReduce(bucket_mb=1e-5), comms, [batches], copy.deepcopy(branches))
    )
    assert torch.equal(weights(one.module), weights(two.module))
    for branch in (branches.a, branches.b):
        name = "a" if branch is branches.a else "b"
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
    replica = Replica.of(net(), make)
    assert [group["fused"] for group in replica.optimizer.param_groups] == [fused]


@pytest.mark.parametrize("make", [torch.optim.Adadelta, lambda p: torch.optim.LBFGS(list(p))])
def test_optimizers_without_a_fused_step(make: Callable[..., Any]) -> None:
    assert not any(group.get("fused") for group in Replica.of(net(), make).optimizer.param_groups)


def test_sparse_gradients_take_no_fused_step() -> None:
    bags = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))
    replica = Replica.of(bags, partial(torch.optim.SGD, lr=0.1))
    bags(torch.tensor([[1, 2]])).sum().backward()
    before = bags[0].weight.detach().clone()
    replica.optimizer.step()
    assert not torch.equal(bags[0].weight, before)


def test_fused_steps_agree_with_plain_ones() -> None:
    batches = [rows(8, step) for step in range(20)]
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        trained = []
        for fused in (False, True):
            module = net()
            optimizer = Replica.of(
                module, partial(kind, lr=0.05) if fused else partial(kind, lr=0.05, fused=False)
            ).optimizer
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x), y).backward()
                optimizer.step()
            trained.append(weights(module))
        torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)
