"""The parameter server of one shard, as a state machine: messages in, replies out. No threads, no sockets, no clock.

Every worker keeps such a shard for all of them; `downpour.py` moves the messages.
Source: Dean et al., 2012, "Large scale distributed deep networks", NeurIPS, section 4.1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HEAD = struct.Struct("<BxxxxxxxQQ")
_PUSH, _FETCH, _WEIGHTS = 1, 2, 3
_EPSILON = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A worker's change of a shard since its last push; with AdaGrad, the sum of its gradients."""

    source: int
    number: int
    """Of this worker's pushes to this shard, from 1: one that comes twice, or too late, is known by it."""
    seen: int
    """Pushes of the others that were in the weights the change was computed with, as the last `Weights` said."""
    change: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """A worker asks for the shard."""

    source: int
    number: int
    """Comes back with the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The answer to a fetch."""

    number: int
    seen: int
    """Pushes of all but the asker that are in it."""
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a server knows."""

    weights: Tensor
    """One-dimensional; never changed in place."""
    pushes: tuple[int, ...]
    """How many of each worker's pushes are in the weights; also the number of its last one."""
    squares: Tensor | None = None
    """AdaGrad's sums of squared gradients; None where the workers' own changes are added."""
    rate: float = 0.0
    """AdaGrad's learning rate."""
    staleness_sum: int = 0
    staleness_max: int = 0
    counted: int = 0
    """Pushes since these three were reset."""


def on_push(shard: Shard, push: Push) -> tuple[Shard, list[tuple[int, Weights]]]:
    """Apply a push, once.

    >>> shard = Shard(weights=torch.zeros(2), pushes=(0, 0))
    >>> push = Push(source=1, number=1, seen=0, change=torch.ones(2))
    >>> after, _ = on_push(shard, push)
    >>> again, replies = on_push(after, push)
    >>> after.weights, again is after, replies
    (tensor([1., 1.]), True, [])
    """
    if push.number <= shard.pushes[push.source]:
        return shard, []
    staleness = _of_others(shard, push.source) - push.seen
    weights, squares = shard.weights, shard.squares
    if squares is None:
        weights = weights + push.change
    else:
        squares = squares + push.change * push.change
        weights = weights - shard.rate * push.change / (squares + _EPSILON).sqrt()
    after = replace(
        shard,
        weights=weights,
        squares=squares,
        pushes=tuple(push.number if rank == push.source else n for rank, n in enumerate(shard.pushes)),
        staleness_sum=shard.staleness_sum + staleness,
        staleness_max=max(shard.staleness_max, staleness),
        counted=shard.counted + 1,
    )
    return after, []


def on_fetch(shard: Shard, fetch: Fetch) -> tuple[Shard, list[tuple[int, Weights]]]:
    """Answer with the weights as they are."""
    answer = Weights(number=fetch.number, seen=_of_others(shard, fetch.source), values=shard.weights)
    return shard, [(fetch.source, answer)]


def _of_others(shard: Shard, rank: int) -> int:
    return sum(shard.pushes) - shard.pushes[rank]


def pack(message: Push | Fetch | Weights) -> bytes:
    """A message as bytes: 24 for its kind and numbers, then the tensor's own."""
    if isinstance(message, Fetch):
        return _HEAD.pack(_FETCH, message.number, 0)
    kind, values = (_PUSH, message.change) if isinstance(message, Push) else (_WEIGHTS, message.values)
    body = values.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return _HEAD.pack(kind, message.number, message.seen) + body


def unpack(source: int, message: bytes, dtype: torch.dtype) -> Push | Fetch | Weights:
    """The inverse of `pack`; the letter says whom it is from.

    >>> weights = Weights(number=3, seen=7, values=torch.tensor([1.5, 2.5]))
    >>> unpack(0, pack(weights), torch.float32)
    Weights(number=3, seen=7, values=tensor([1.5000, 2.5000]))
    """
    kind, number, seen = _HEAD.unpack_from(message)
    if kind == _FETCH:
        return Fetch(source=source, number=number)
    body = bytearray(message[_HEAD.size :])
    values = torch.frombuffer(body, dtype=dtype) if body else torch.empty(0, dtype=dtype)
    if kind == _PUSH:
        return Push(source=source, number=number, seen=seen, change=values)
    return Weights(number=number, seen=seen, values=values)


def cuts(size: int, world: int) -> Sequence[int]:
    """Where the shards begin, and where the last one ends.

    >>> cuts(10, 3)
    [0, 3, 6, 10]
    """
    return [size * rank // world for rank in range(world + 1)]
