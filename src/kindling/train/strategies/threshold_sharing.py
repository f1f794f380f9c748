"""Threshold sharing: each worker sends only the places where its gradient has grown large, and one bit for the sign.

What is not sent is kept and added to the next gradient, so that nothing is lost, only late. The threshold can look for
itself. Arithmetic only: `train/loop.py` runs the steps, `comms.py` moves the bytes.
Sources: Strom, 2015, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech, algorithm 1;
the adaptive threshold and the two encodings follow Deeplearning4j's gradient sharing (AdaptiveThresholdAlgorithm,
threshold and bitmap encoding), which applies them to the updates after the optimizer; here, as in Strom, to gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kindling.errors import ConfigError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, evenly, gradient_of
from kindling.train.strategies.comms import Comms

_FEWEST, _MOST = 1e-4, 1e-2
"""Shares of the elements between which the adaptive threshold stays as it is."""
_STEP = 0.5 ** (1 / 20)
"""Factor by which the adaptive threshold moves: halved in twenty steps."""
_PER_WORD = 16
"""Elements in one 32-bit word of a bitmap; with more hits than one in so many, a bitmap is shorter."""
_HEADER = 2


@dataclass(frozen=True, kw_only=True)
class ThresholdSharing(Strategy):
    """Share gradients as a list of places with a sign: plus or minus the threshold.

    A message is 2 words of 4 bytes (threshold, number of places), then one word for each place, or one for every 16
    elements of the net if that is shorter. Each worker sends its own to `W - 1` others, after `16 (W - 1)` bytes for
    their lengths; `2 (W - 1) / W` of the batch statistics at the end of each epoch. The thresholds compare with the
    gradient of a worker's own mean loss, whatever the number of workers. With one worker the gradient is still put
    through the threshold.

    >>> ThresholdSharing(threshold=0.0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: threshold=0.0 sends every place and nothing. Use a positive number, such as 1e-3.
    """

    threshold: float = 1e-3
    """An element is sent when its gradient and what was kept of the earlier ones reach this; so much is sent of it."""
    adaptive: bool = True
    """Move the threshold, on each worker, until between 0.01 % and 1 % of the elements are sent in a step. For large
    nets: of a few hundred elements that is next to nothing."""

    replicas_agree: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(
                "threshold", self.threshold, "sends every place and nothing", "Use a positive number, such as 1e-3"
            )

    def init(self, replica: Replica) -> State:
        total = sum(p.numel() for p in replica.parameters())
        if total >= 1 << 31:
            raise ConfigError("strategy", self, f"numbers {total:,} parameters in 31 bits", "Use bf16 all-reduce")
        return {
            "residual": torch.zeros(total),
            "threshold": float(np.float32(self.threshold)),
            "rows": 0,
            "all": 0,
            "steps": 0,
            "sent": 0.0,
            "thresholds": 0.0,
            "figures": {},
        }

    def loss_scale(self, rows_W: np.ndarray, rank: int, state: State) -> float:
        return float(rows_W[rank] / rows_W.sum())

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        gradients = [gradient_of(parameter) for parameter in replica.parameters()]
        residual = state["residual"].clone()
        start = 0
        for gradient in gradients:
            # The loss was scaled by this worker's share; the sum of all is divided by their number below.
            residual[start : start + gradient.numel()].add_(gradient.reshape(-1), alpha=comms.world)
            start += gradient.numel()
        places, signs = beyond(residual, state["threshold"])
        residual[places] -= state["threshold"] * signs
        total = torch.zeros_like(residual)
        for message in comms.exchange(encode(places, signs, state["threshold"], len(residual))):
            add_decoded(message, total)
        total /= comms.world
        start = 0
        for gradient in gradients:
            gradient.copy_(total[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        density = len(places) / max(1, len(residual))
        return {
            **state,
            "residual": residual,
            "threshold": adapted(state["threshold"], density) if self.adaptive else state["threshold"],
            "rows": state["rows"] + int(rows_W[comms.rank]),
            "all": state["all"] + int(rows_W.sum()),
            "steps": state["steps"] + 1,
            "sent": state["sent"] + density,
            "thresholds": state["thresholds"] + state["threshold"],
        }

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        if state["all"]:
            average_into(replica.statistics(), state["rows"] / state["all"], comms)
        steps = max(1, state["steps"])
        means = torch.tensor([state["sent"] / steps, state["thresholds"] / steps], dtype=torch.float64)
        density, threshold = (comms.all_reduce(means) / comms.world).tolist()
        figures = {"density": density, "threshold": threshold}
        return {**state, "rows": 0, "all": 0, "steps": 0, "sent": 0.0, "thresholds": 0.0, "figures": figures}

    def figures(self, state: State) -> dict[str, float]:
        """`density`: share of the elements that a worker sent in a step; `threshold`: both means over the epoch."""
        return dict(state["figures"])

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        # A worker's residual counts 1 / W of a gradient: the mean of all, on every worker, keeps the sum.
        residual = torch.stack([state["residual"] for state in states]).mean(0)
        threshold = float(np.float32(np.mean([state["threshold"] for state in states])))
        return {
            **states[0],
            "residual": residual,
            "threshold": threshold,
            "rows": evenly(states[0]["all"], rank, world),
        }


def adapted(threshold: float, density: float) -> float:
    """The threshold after a step in which so large a share of the elements was sent.

    >>> adapted(1.0, 0.001), adapted(1.0, 0.5) > 1, adapted(1.0, 0.0) < 1
    (1.0, True, True)
    """
    if density > _MOST:
        return float(np.float32(threshold / _STEP))
    return float(np.float32(threshold * _STEP)) if density < _FEWEST else threshold


def beyond(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The places where `values` reach the threshold, int64 in order, and the signs there, 1.0 or -1.0.

    >>> beyond(torch.tensor([0.1, 2.0, -3.0, 1.0]), 1.0)
    (tensor([1, 2, 3]), tensor([ 1., -1.,  1.]))
    """
    places = (values.abs() >= threshold).nonzero().reshape(-1)
    return places, torch.sign(values[places])


def encode(places: Tensor, signs: Tensor, threshold: float, size: int) -> Tensor:
    """What `beyond` found as 32-bit words.

    Args:
        threshold: a float32's value.
        size: elements that there are, P, less than 2 ** 31.
    Returns: shape (2 + places,) or (2 + ceil(P / 16),), int32: the threshold's bits; the number of places, or -1 for a
        bitmap; then `place + 1`, negative for a negative sign, or one bit for each element's plus, then for its minus.

    >>> encode(torch.tensor([1, 2]), torch.tensor([1.0, -1.0]), 1.0, 48)[1:].tolist()
    [2, 2, -3]
    """
    head = torch.tensor([threshold], dtype=torch.float32).view(torch.int32)
    words = -(-size // _PER_WORD)
    if len(places) <= words:
        return torch.cat([head, torch.tensor([len(places)], dtype=torch.int32), ((places + 1) * signs.long()).int()])
    planes = np.zeros(words * 4, np.uint8)
    half = -(-size // 8)
    for number in range(2):
        marks = np.zeros(size, np.uint8)
        marks[places[signs > 0 if number == 0 else signs < 0].numpy()] = 1
        planes[number * half : (number + 1) * half] = np.packbits(marks)
    return torch.cat([head, torch.tensor([-1], dtype=torch.int32), torch.from_numpy(planes.view(np.int32))])


def add_decoded(message: Tensor, into: Tensor) -> None:
    """Add what a message says, plus or minus its threshold at each place, to a float32 vector of P elements."""
    threshold, count = message[:1].view(torch.float32), int(message[1])
    body = message[_HEADER:]
    if count >= 0:
        into[body.abs().long() - 1] += threshold * torch.sign(body)
        return
    half = -(-len(into) // 8)
    planes = body.numpy().view(np.uint8)
    plus, minus = (np.unpackbits(planes[n * half : (n + 1) * half], count=len(into)) for n in range(2))
    into += threshold * torch.from_numpy(plus.astype(np.float32) - minus.astype(np.float32))
