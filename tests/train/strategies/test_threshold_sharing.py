"""Threshold sharing: the two encodings, and a threshold that looks for itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from strategy_cases import net, rows, sgd, step_of

from kindling.errors import ConfigError
from kindling.train.strategies import (
    AllReduce,
    Comms,
    InProcessComms,
    Replica,
    SoloComms,
    State,
    Strategy,
    ThresholdSharing,
)
from kindling.train.strategies.threshold_sharing import add_decoded, beyond, encode


@pytest.mark.parametrize("size", [1, 7, 16, 17, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 1.0])
def test_a_message_says_what_was_sent_in_the_fewer_words(size: int, share: float) -> None:
    rng = np.random.default_rng(size)
    chosen = rng.random(size) < share
    values = torch.from_numpy(np.where(chosen, 5.0, 0.01) * rng.choice([-1, 1], size)).float()
    places, signs = beyond(values, 0.25)
    message = encode(places, signs, 0.25, size)
    assert message.dtype == torch.int32
    assert len(message) == 2 + min(int(chosen.sum()), -(-size // 16))
    decoded = torch.full((size,), 3.0)
    add_decoded(message, decoded)
    expected = 3 + 0.25 * np.where(chosen, np.sign(values.numpy()), 0)
    assert decoded.tolist() == expected.tolist()


def test_bytes_are_those_of_the_messages_measured() -> None:
    """What was counted, against the shares of elements that the strategy reports."""
    total = sum(p.numel() for p in net().parameters())
    steps = 6
    batches = [[rows(8, 10 * step), rows(8, 10 * step + 1)] for step in range(steps)]
    strategy = ThresholdSharing(threshold=0.15, adaptive=False)

    def work(comms: Comms) -> tuple[int, float]:
        module = net()
        replica = Replica(module, sgd(module))
        state = strategy.init(replica)
        words = 0
        for step in batches:
            before = state["sent"]
            state = step_of(strategy, replica, state, step, comms)
            words += 2 + min(round((state["sent"] - before) * total), -(-total // 16))
        return comms.bytes_sent, words * 4 + steps * 16

    for counted, expected in InProcessComms.run(2, work):
        assert counted == expected


@pytest.mark.parametrize("threshold", [0.002, 1.0])
def test_the_threshold_finds_its_range_from_both_sides(threshold: float) -> None:
    """Between 1 in 10,000 and 1 in 100 elements are sent, wherever it began."""

    module = torch.nn.Linear(6, 1000)
    replica = Replica(module, sgd(module))
    strategy, comms = ThresholdSharing(threshold=threshold), SoloComms()
    state = strategy.init(replica)
    sent = []
    for step in range(250):
        x, y = rows(8, step)
        before = state["sent"]
        state = step_of(strategy, replica, state, [(x, y)], comms)
        sent.append(state["sent"] - before)
    assert 5e-5 < np.mean(sent[-50:]) < 2e-2 < max(sent[0], 1 - sent[0])


def test_nothing_is_lost_only_late() -> None:
    """With a loss that has no curvature, what was sent and what is kept add up to all-reduce's gradients."""
    batches = [[rows(8, 10 * step), rows(8, 10 * step + 1)] for step in range(5)]
    flat = torch.nn.Linear(6, 5)

    def gradients(strategy: Strategy, comms: Comms) -> tuple[torch.Tensor, State]:

        module = copy.deepcopy(flat)
        replica = Replica(module, torch.optim.SGD(module.parameters(), lr=1.0))
        state = strategy.begin(replica, strategy.init(replica), comms)
        for step in batches:
            x, _ = step[comms.rank]
            replica.optimizer.zero_grad()
            (module(x).sum() / len(x) * 0.5).backward()
            state = strategy.on_gradients(replica, state, np.array([8, 8]), comms)
            replica.optimizer.step()
        strategy.close(replica)
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), state

    whole, _ = InProcessComms.run(2, lambda comms: gradients(AllReduce(), comms))[0]
    found = InProcessComms.run(2, lambda comms: gradients(ThresholdSharing(threshold=0.3), comms))
    kept = torch.stack([state["residual"] for _, state in found]).mean(0)
    torch.testing.assert_close(found[0][0] - kept, whole, rtol=1e-5, atol=1e-5)
    assert kept.abs().max() > 0.01


def test_a_threshold_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="threshold=0 sends every place and nothing"):
        ThresholdSharing(threshold=0)
