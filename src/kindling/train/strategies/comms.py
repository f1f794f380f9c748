"""Comms: the one seam through which workers talk, with its byte count and its in-process stand-ins.

`GroupComms` is a `torch.distributed` group, with a faster way within one host in `shared_memory.py`;
`InProcessComms` are threads of one process, for tests; `SoloComms` is a worker alone. A strategy never sees which one
it has.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Comms(ABC):
    """Collectives between `world` workers, of which this one is `rank`."""

    rank: int
    world: int
    bytes_sent: int
    """Bytes this worker has sent: `2 (W - 1) / W` of the tensor for an all-reduce, as a ring sends them."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the workers, in place; returns it. Every worker gets the same bits."""
        if self.world > 1:
            self._count(tensor.numel() * tensor.element_size())
            self._sum(tensor)
        return tensor

    def sum_all(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Replace each tensor by the sum of all workers' tensors, each times its own worker's `scale`.

        With `scale` 0 a worker adds nothing, whatever its tensors hold.
        """
        if self.world == 1:
            return
        for group in by_dtype(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            flat = torch.zeros_like(flat) if scale == 0 else flat if scale == 1 else flat.mul_(scale)
            self.all_reduce(flat)
            start = 0
            for tensor in group:
                tensor.detach().copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def _count(self, size: int) -> None:
        self.bytes_sent += 2 * (self.world - 1) * size // self.world

    def gather(self, vector: np.ndarray) -> list[np.ndarray]:
        """Every worker's int64 vector, by rank; lengths may differ."""
        if self.world == 1:
            return [vector]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(vector)
        self.all_reduce(sizes)
        table = torch.zeros((self.world, int(sizes.max())), dtype=torch.int64)
        table[self.rank, : len(vector)] = torch.tensor(vector)
        self.all_reduce(table)
        return [row[:size].numpy() for row, size in zip(table, sizes.tolist(), strict=True)]

    def meet(self) -> None:
        """Return when every worker has come here."""
        self.all_reduce(torch.zeros(1))

    @abstractmethod
    def _sum(self, tensor: Tensor) -> None: ...


def by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors grouped by dtype, the groups in order of first appearance."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


class SoloComms(Comms):
    """One worker: nothing to say to anybody.

    >>> SoloComms().all_reduce(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self) -> None:
        self.rank, self.world, self.bytes_sent = 0, 1, 0

    def _sum(self, tensor: Tensor) -> None: ...


class GroupComms(Comms):
    """The default process group of `torch.distributed`.

    Sums are taken in the order of the ranks, as everywhere here, so that the bits do not depend on which hosts the
    workers were started on. gloo's own all-reduce adds each part of a tensor in another order; this one sends as much.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0

    def _sum(self, tensor: Tensor) -> None:
        if self.world == 2:  # a + b is b + a
            dist.all_reduce(tensor)
            return
        size = tensor.numel()
        mine = torch.zeros((self.world, -(-size // self.world)), dtype=tensor.dtype)
        mine.view(-1)[:size] = tensor.reshape(-1)
        parts = torch.empty_like(mine)
        dist.all_to_all_single(parts, mine)  # part r of every worker's tensor comes to worker r
        total = parts[0]
        for part in parts[1:]:
            total += part
        dist.all_gather(list(mine.unbind()), total)
        tensor.copy_(mine.view(-1)[:size].view_as(tensor))


class InProcessComms(Comms):
    """Workers as threads of one process; `InProcessComms.run` starts them. For tests and experiments.

    >>> InProcessComms.run(2, lambda comms: comms.all_reduce(torch.tensor([1.0 + comms.rank])))
    [tensor([3.]), tensor([3.])]
    """

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, slots: list[Tensor | None]) -> None:
        self.rank, self.world, self.bytes_sent = rank, world, 0
        self._barrier, self._slots = barrier, slots

    def _sum(self, tensor: Tensor) -> None:
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait(60)
        total = self._slots[0]
        assert total is not None
        total = total.clone()
        for other in self._slots[1:]:
            assert other is not None
            total += other
        self._barrier.wait(60)  # nobody may refill a slot that another still reads
        tensor.copy_(total)

    @classmethod
    def run(cls, world: int, work: Callable[[Comms], T]) -> list[T]:
        """Run `work` once per worker, each in a thread of its own; returns their results by rank.

        Raises: the first worker's error, after all have stopped.
        """
        barrier = threading.Barrier(world)
        slots: list[Tensor | None] = [None] * world
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(cls(rank, world, barrier, slots))
            except BaseException as error:
                errors.append(error)
                barrier.abort()  # the others must not wait for a worker that is gone

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [results[rank] for rank in range(world)]
