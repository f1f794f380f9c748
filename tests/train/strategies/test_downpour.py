"""Downpour: the server alone, stragglers, staleness, and workers that end."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from strategy_cases import net, restored, rows, sgd, snapshot, step_of, stored, weights
from torch import nn

from kindling.errors import ConfigError
from kindling.train.strategies import Comms, Downpour, InProcessComms, Replica
from kindling.train.strategies.parameter_server import Fetch, Push, Shard, on_fetch, on_push, pack, unpack


def push(source: int, number: int, seen: int, *change: float) -> Push:
    return Push(source=source, number=number, seen=seen, change=torch.tensor(change))


def test_pushes_are_applied_once_in_any_order_of_workers() -> None:
    first = Shard(weights=torch.zeros(2), pushes=(0, 0, 0))
    pushes = [push(1, 1, 0, 1.0, 2.0), push(2, 1, 0, 4.0, 8.0), push(1, 2, 1, 16.0, 32.0)]
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
        shard = first
        for place in order:
            shard, replies = on_push(shard, pushes[place])
            assert replies == []
            again, _ = on_push(shard, pushes[place])  # doubled on the way
            assert again is shard
        assert shard.weights.tolist() == [21.0, 42.0]
        assert shard.pushes == (0, 2, 1)
        late, _ = on_push(shard, pushes[0])
        assert late is shard
    assert first.weights.tolist() == [0.0, 0.0]


def test_staleness_counts_the_pushes_of_others_since_the_last_look() -> None:
    shard = Shard(weights=torch.zeros(1), pushes=(0, 0))
    for number in range(1, 4):
        shard, _ = on_push(shard, push(0, number, 0, 1.0))  # nobody else has pushed: not stale
    assert (shard.staleness_sum, shard.staleness_max, shard.counted) == (0, 0, 3)
    shard, _ = on_push(shard, push(1, 1, 0, 1.0))
    assert (shard.staleness_sum, shard.staleness_max, shard.counted) == (3, 3, 4)
    shard, ((asker, answer),) = on_fetch(shard, Fetch(source=1, number=9))
    assert (asker, answer.number, answer.seen, answer.values.tolist()) == (1, 9, 3, [4.0])
    shard, _ = on_push(shard, push(1, 2, answer.seen, 1.0))
    assert (shard.staleness_sum, shard.staleness_max, shard.counted) == (3, 3, 5)


def test_adagrad_on_the_server_is_torch_s() -> None:
    weights_ = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    torch_s = torch.optim.Adagrad([weights_], lr=0.1, eps=0.0)
    shard = Shard(weights=weights_.detach().clone(), pushes=(0,), squares=torch.zeros(3), rate=0.1)
    for number in range(1, 6):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(number))
        weights_.grad = gradient.clone()
        torch_s.step()
        shard, _ = on_push(shard, Push(source=0, number=number, seen=0, change=gradient))
    torch.testing.assert_close(shard.weights, weights_.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_messages_come_back_as_they_went(dtype: torch.dtype) -> None:
    sent = Push(source=2, number=1 << 40, seen=12345678901, change=torch.randn(7).to(dtype))
    back = unpack(2, pack(sent), dtype)
    assert isinstance(back, Push)
    assert torch.equal(back.change, sent.change)
    assert replace(back, change=sent.change) == sent
    assert unpack(1, pack(Fetch(source=1, number=3)), dtype) == Fetch(source=1, number=3)
    empty = unpack(0, pack(push(0, 1, 0)), torch.float32)
    assert isinstance(empty, Push)
    assert not len(empty.change)


def work_of(steps: int, comms: Comms, strategy: Downpour, before_step: Any = None) -> dict[str, Any]:
    """An epoch of one worker; `before_step` is told the number of the step to come."""
    module = net()
    replica = Replica(module, sgd(module))
    state = strategy.begin(replica, strategy.init(replica), comms)
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        state = step_of(strategy, replica, state, [rows(4, 10 * step + rank) for rank in range(comms.world)], comms)
    state = strategy.on_epoch(replica, state, comms)
    strategy.close(replica)
    return {"figures": strategy.figures(state), "weights": weights(module), "shard": state["shard"]["weights"]}


@pytest.mark.parametrize("world", [2, 4])
def test_a_straggler_slows_only_itself(world: int) -> None:
    """The last worker stands still in its third step until all others have taken their last: they never wait for it."""
    done = threading.Semaphore(0)
    strategy, steps = Downpour(push_every=1, fetch_every=2), 12

    def work(comms: Comms) -> dict[str, Any]:
        def before_step(step: int) -> None:
            if comms.rank == world - 1 and step == 2:
                for _ in range(world - 1):
                    assert done.acquire(timeout=60)
            elif comms.rank < world - 1 and step == steps - 1:
                done.release()

        return work_of(steps, comms, strategy, before_step)

    found = InProcessComms.run(world, work)
    figures = found[0]["figures"]
    assert all(one["figures"] == figures for one in found)
    assert figures["pushes"] == world * (steps + 1)
    # Its push after standing still is behind all that the others have pushed meanwhile, at least to their own shards.
    assert steps - 4 <= figures["staleness_max"] <= (world - 1) * (steps + 1)
    assert 0 < figures["staleness_mean"] <= figures["staleness_max"]
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
    assert torch.equal(torch.cat([one["shard"] for one in found]).double(), found[0]["weights"])


def test_every_step_counts_in_full() -> None:
    """Whoever comes first: for a loss without curvature the sum of all changes is what is left in the end."""
    strategy, steps = Downpour(push_every=2, fetch_every=3), 9

    def work(comms: Comms) -> torch.Tensor:
        module = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(module.weight)
        replica = Replica(module, torch.optim.SGD(module.parameters(), lr=0.5))
        state = strategy.begin(replica, {**strategy.init(replica)}, comms)
        for _ in range(steps):
            module.weight.grad = torch.full((1, 3), float(comms.rank + 1))
            replica.optimizer.step()
            state = strategy.on_step(replica, state, np.ones(comms.world, np.int64), comms)
        strategy.on_epoch(replica, state, comms)
        strategy.close(replica)
        return module.weight.detach()

    for found in InProcessComms.run(3, work):
        assert found.tolist() == [[-0.5 * steps * (1 + 2 + 3)] * 3]


def test_a_worker_that_fails_does_not_leave_the_others_waiting() -> None:
    strategy = Downpour(push_every=1, fetch_every=1)

    def work(comms: Comms) -> None:
        def before_step(step: int) -> None:
            if comms.rank == 1 and step == 3:
                raise ValueError("gone")

        work_of(10_000, comms, strategy, before_step)

    with pytest.raises(ValueError, match="gone"):
        InProcessComms.run(3, work)


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    InProcessComms.run(2, lambda comms: work_of(3, comms, Downpour()))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_every": 0}, "push_every=0 is no number of steps"),
        ({"fetch_every": 1.5}, r"fetch_every=1\.5 is no number of steps"),
        ({"adagrad": 0.0}, r"adagrad=0\.0 moves nothing"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Downpour(**settings)


def test_saved_in_the_middle_of_an_epoch_it_goes_on() -> None:
    """A checkpoint is a meeting: what was pushed is in the shards, and nothing else is to be remembered."""
    strategy = Downpour(push_every=2, fetch_every=3)

    def work(comms: Comms) -> dict[str, Any]:
        module = net()
        replica = Replica(module, sgd(module))
        state = strategy.begin(replica, strategy.init(replica), comms)
        for step in range(4):
            state = step_of(strategy, replica, state, [rows(4, 10 * step + r) for r in range(comms.world)], comms)
        saved = stored(snapshot(strategy, replica, state, comms))
        met = weights(replica.module)
        strategy.close(replica)
        replica, state = restored(strategy, saved, comms)
        for step in range(4, 7):
            state = step_of(strategy, replica, state, [rows(4, 10 * step + r) for r in range(comms.world)], comms)
        state = strategy.on_epoch(replica, state, comms)
        strategy.close(replica)
        return {"met": met, "saved": saved["strategy"], "end": weights(replica.module)}

    found = InProcessComms.run(3, work)
    for one in found:
        assert torch.equal(one["met"], found[0]["met"])
        assert torch.equal(one["end"], found[0]["end"])
    assert not torch.equal(found[0]["met"], found[0]["end"])
    assert torch.equal(torch.cat([one["saved"]["shard"]["weights"] for one in found]).double(), found[0]["met"])


@pytest.mark.parametrize("adagrad", [None, 0.1])
def test_shards_are_cut_anew_for_another_number_of_workers(adagrad: float | None) -> None:
    strategy = Downpour(adagrad=adagrad)
    whole = torch.arange(101.0)

    def state(rank: int) -> dict[str, Any]:
        own = whole[101 * rank // 4 : 101 * (rank + 1) // 4]
        shard = {"weights": own, "squares": None if adagrad is None else own * 2}
        return {"step": 5, "rows": rank, "all": 6, "shard": shard, "met": True, "figures": {}}

    new = [strategy.regroup([state(rank) for rank in range(4)], rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([one["shard"]["weights"] for one in new]), whole)
    assert [len(one["shard"]["weights"]) for one in new] == [33, 34, 34]
    assert sum(one["rows"] for one in new) == 6
    if adagrad is not None:
        assert torch.equal(torch.cat([one["shard"]["squares"] for one in new]), whole * 2)
