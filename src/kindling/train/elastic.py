"""The states of W workers, regrouped for another number of workers. Pure functions.

Rows need nothing: the global order depends on the shard counts and the global batch alone (`order.py`), so the next
step is the next slice for any number of workers. What the workers hold does: weights that have gone apart are
averaged, each worker's counted by the rows it has seen since they were last alike; sums over rows go to the first
worker; the rest is the strategy's business (`Strategy.regroup`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kindling.train.strategies import SoloComms, Strategy


def regroup(states: Sequence[Mapping[str, Any]], strategy: Strategy, rank: int, world: int) -> dict[str, Any]:
    """The state of worker `rank` of `world`.

    Args:
        states: of all workers that wrote the checkpoint, by rank, as `Loop.state` gives them.
    """
    old = [dict(state["strategy"]) for state in states]
    shares = [strategy.share(state, _Seat(seat, len(old))) for seat, state in enumerate(old)]
    merged = {
        key: blend([state[key] for state in states], shares) for key in states[0] if key not in ("strategy", "progress")
    }
    progress = dict(states[0]["progress"])
    sums = [state["progress"]["sums"] for state in states if state["progress"]["sums"]]
    if rank == 0 and sums:
        progress["sums"] = [[math.fsum(side) for side in zip(*term, strict=True)] for term in zip(*sums, strict=True)]
    else:
        progress["sums"] = []
    return {**merged, "progress": progress, "strategy": strategy.regroup(old, rank, world)}


class _Seat(SoloComms):
    """A worker that is gone: its rank, and how many there were."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.bytes_sent = rank, world, 0


def blend(values: Sequence[Any], shares: Sequence[float]) -> Any:
    """One value for what several workers hold at the same place.

    Tensors of floats become their weighted mean, summed in float64; counts become the largest; a place that only some
    workers have filled yet counts for those; everything else is the first worker's.

    >>> blend([{"w": torch.tensor([0.0, 4.0]), "lr": 0.1}, {"w": torch.tensor([8.0, 4.0]), "lr": 0.1}], [0.75, 0.25])
    {'w': tensor([2., 4.]), 'lr': 0.1}
    """
    first = values[0]
    if isinstance(first, Tensor):
        here = [(value, share) for value, share in zip(values, shares, strict=True) if isinstance(value, Tensor)]
        return _blend_tensors([value for value, _ in here], _normalised([share for _, share in here]))
    if isinstance(first, Mapping):
        blended_of = {}
        for key in dict.fromkeys(key for value in values for key in value):
            filled = [(value[key], share) for value, share in zip(values, shares, strict=True) if key in value]
            blended_of[key] = blend([value for value, _ in filled], _normalised([share for _, share in filled]))
        return blended_of
    if isinstance(first, list | tuple) and all(len(value) == len(first) for value in values):
        blended = [blend(place, shares) for place in zip(*values, strict=True)]
        return tuple(blended) if isinstance(first, tuple) else blended
    return first


def _blend_tensors(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0]
    if all(other.shape == first.shape and torch.equal(other, first) for other in tensors[1:]):
        return first
    if any(other.shape != first.shape for other in tensors):
        return first
    if first.dim() == 0 or not first.is_floating_point():  # counts of steps and batches
        return torch.stack(list(tensors)).amax(0) if first.dtype != torch.bool else first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        if share:  # times zero would keep what is no number
            total += tensor.double() * share
    return total.to(first.dtype)


def _normalised(shares: Sequence[float]) -> list[float]:
    total = sum(shares)
    return [share / total for share in shares] if total else [1 / len(shares)] * len(shares)


def caveat(strategy: Strategy, *, statistics: bool, before: int, now: int) -> str:
    """What is not as it would have been with the old number of workers; "" where it is all the same.

    Args:
        statistics: whether the net keeps batch statistics.
    """
    if before == now:
        return ""
    if not strategy.elastic:
        return (
            f"{type(strategy).__name__} with {now} workers is another algorithm than with {before}: the rows of every "
            "step are the same, the weights will not be"
        )
    if statistics:
        return (
            f"the net's batch statistics are taken over {now} parts of a step instead of {before}: the rows of every "
            "step are the same, the weights will not be"
        )
    return ""
