"""Comms: the one seam through which workers talk, with its byte count and its in-process stand-ins.

`GroupComms` is a `torch.distributed` group, with a faster way within one host in `shared_memory.py`;
`InProcessComms` are threads of one process, for tests; `SoloComms` is a worker alone. A strategy never sees which one
it has. Sums, gatherings and meetings are calls that all workers make in the same order; messages from one to another,
at any time, go through `mail.py`.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kindling.train.strategies.mail import Letter, Mail, QueueMail, TcpMail, own_address

T = TypeVar("T")


class Pending:
    """A sum under way. `wait` returns when it has landed in its tensors, or raises what went wrong."""

    def __init__(self, future: Future[Any] | None = None) -> None:
        self._future = future

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()


class Comms(ABC):
    """Collectives between `world` workers, of which this one is `rank`."""

    rank: int
    world: int
    bytes_sent: int
    """Bytes this worker has sent: `2 (W - 1) / W` of the tensor for an all-reduce, as a ring sends them."""
    overlaps: ClassVar[bool] = True
    """A sum that is started early goes on beside the computing; False where it would only compete with it."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.bytes_sent = rank, world, 0
        self._lock = threading.Lock()
        self._mails: list[Mail] = []
        self._line: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the workers, in place; returns it. Every worker gets the same bits."""
        if self.world > 1:
            self._count(_reduced(tensor.numel() * tensor.element_size(), self.world))
            self._in_turn(lambda: self._sum(tensor))
        return tensor

    def sum_all(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Replace each tensor by the sum of all workers' tensors, each times its own worker's `scale`.

        With `scale` 0 a worker adds nothing, whatever its tensors hold.
        """
        if self.world > 1:
            self._count_all(tensors)
            self._in_turn(lambda: self._sum_all(tensors, scale))

    def start_sum(self, tensors: Sequence[Tensor], scale: float = 1.0) -> Pending:
        """`sum_all` in a thread of its own: returns at once. The tensors are to be left alone until it has landed.

        Whatever is asked of these Comms afterwards is done after it, so the order of calls stays the same everywhere.
        """
        if self.world == 1:
            return Pending()
        self._count_all(tensors)
        return Pending(self._queued(lambda: self._sum_all(tensors, scale)))

    def exchange(self, vector: Tensor) -> list[Tensor]:
        """Every worker's one-dimensional tensor, by rank, of one dtype; lengths may differ.

        Sends `(W - 1)` times the vector, and `16 (W - 1)` bytes for the lengths.
        """
        if self.world == 1:
            return [vector]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(vector)
        self.all_reduce(sizes)
        self._count((self.world - 1) * vector.numel() * vector.element_size())
        found: list[Tensor] = []
        self._in_turn(lambda: found.extend(self._exchange(vector.detach().contiguous(), sizes.tolist())))
        return found

    def gather(self, vector: np.ndarray) -> list[np.ndarray]:
        """Every worker's int64 vector, by rank; lengths may differ."""
        if self.world == 1:
            return [vector]
        return [part.numpy() for part in self.exchange(torch.tensor(vector, dtype=torch.int64))]

    def meet(self) -> None:
        """Return when every worker has come here."""
        self.all_reduce(torch.zeros(1))

    def open_mail(self) -> Mail:
        """A way to send messages from worker to worker at any time. All workers open theirs together."""
        mail = self._mail(self._count)
        self._mails.append(mail)
        return mail

    def close(self) -> None:
        """Let what was started come to its end, close the mail, and stop; safe to call twice.

        A worker that gives up calls this before it leaves the group, and after it has said why: the others take part in
        all that it has started, and learn from its closed mail that it is gone.
        """
        for mail in self._mails:
            mail.close()
        if self._line is not None:
            self._line.shutdown(wait=True)
            self._line = None

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_sent += size

    def _count_all(self, tensors: Sequence[Tensor]) -> None:
        for group in by_dtype(tensors):
            self._count(_reduced(sum(tensor.numel() for tensor in group) * group[0].element_size(), self.world))

    def _in_turn(self, work: Callable[[], object]) -> None:
        """Do it now, but after everything that was started before."""
        if self._last is not None and not self._last.done():
            self._queued(work).result()
        else:
            work()

    def _queued(self, work: Callable[[], object]) -> Future[Any]:
        if self._line is None:
            self._line = ThreadPoolExecutor(1, thread_name_prefix="kindling-comms")
        self._last = self._line.submit(work)
        return self._last

    @abstractmethod
    def _sum(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _exchange(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]: ...

    @abstractmethod
    def _mail(self, count: Callable[[int], None]) -> Mail: ...

    def _sum_all(self, tensors: Sequence[Tensor], scale: float) -> None:
        for group in by_dtype(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            flat = torch.zeros_like(flat) if scale == 0 else flat if scale == 1 else flat.mul_(scale)
            self._sum(flat)
            start = 0
            for tensor in group:
                tensor.detach().copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()


def _reduced(size: int, world: int) -> int:
    """Bytes a worker sends in an all-reduce of so many."""
    return 2 * (world - 1) * size // world


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

    overlaps: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _sum(self, tensor: Tensor) -> None: ...

    def _exchange(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return [vector]

    def _mail(self, count: Callable[[int], None]) -> Mail:
        return QueueMail(0, [queue.SimpleQueue()], count)


class GroupComms(Comms):
    """The default process group of `torch.distributed`.

    Sums are taken in the order of the ranks, as everywhere here, so that the bits do not depend on which hosts the
    workers were started on. gloo's own all-reduce adds each part of a tensor in another order; this one sends as much.
    """

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())

    def _sum(self, tensor: Tensor) -> None:
        if self.world == 2:  # a + b is b + a
            dist.all_reduce(tensor)
            return
        size = tensor.numel()
        mine = torch.zeros((self.world, -(-size // self.world)), dtype=tensor.dtype, device=tensor.device)
        mine.view(-1)[:size] = tensor.reshape(-1)
        parts = torch.empty_like(mine)
        dist.all_to_all_single(parts, mine)  # part r of every worker's tensor comes to worker r
        total = parts[0]
        for part in parts[1:]:
            total += part
        dist.all_gather(list(mine.unbind()), total)
        tensor.copy_(mine.view(-1)[:size].view_as(tensor))

    def _exchange(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        parts = [vector if rank == self.rank else vector.new_empty(size) for rank, size in enumerate(sizes)]
        others = [rank for rank in range(self.world) if rank != self.rank]
        works = [dist.irecv(parts[rank], rank) for rank in others if sizes[rank]]
        if len(vector):
            works += [dist.isend(vector, rank) for rank in others]
        for work in works:
            assert work is not None
            work.wait()
        return parts

    def _mail(self, count: Callable[[int], None]) -> Mail:
        return TcpMail(self.rank, own_address(), lambda text: _texts(self.exchange(_bytes(text))), count)


class InProcessComms(Comms):
    """Workers as threads of one process; `InProcessComms.run` starts them. For tests and experiments.

    >>> InProcessComms.run(2, lambda comms: comms.all_reduce(torch.tensor([1.0 + comms.rank])))
    [tensor([3.]), tensor([3.])]
    """

    def __init__(
        self,
        rank: int,
        world: int,
        barrier: threading.Barrier,
        slots: list[Tensor | None],
        boxes: dict[int, list[queue.SimpleQueue[Letter]]],
    ) -> None:
        super().__init__(rank, world)
        self._barrier, self._slots, self._boxes = barrier, slots, boxes

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

    def _exchange(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        self._slots[self.rank] = vector.clone()
        self._barrier.wait(60)
        parts = [slot.clone() for slot in self._slots if slot is not None]
        self._barrier.wait(60)
        return parts

    def _mail(self, count: Callable[[int], None]) -> Mail:
        fresh: list[queue.SimpleQueue[Letter]] = [queue.SimpleQueue() for _ in range(self.world)]
        return QueueMail(self.rank, self._boxes.setdefault(len(self._mails), fresh), count)

    @classmethod
    def run(cls, world: int, work: Callable[[Comms], T]) -> list[T]:
        """Run `work` once per worker, each in a thread of its own; returns their results by rank.

        Raises: the first worker's error, after all have stopped.
        """
        barrier = threading.Barrier(world)
        slots: list[Tensor | None] = [None] * world
        boxes: dict[int, list[queue.SimpleQueue[Letter]]] = {}
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            comms = cls(rank, world, barrier, slots, boxes)
            try:
                results[rank] = work(comms)
            except BaseException as error:
                errors.append(error)
                barrier.abort()  # the others must not wait for a worker that is gone
            finally:
                comms.close()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [results[rank] for rank in range(world)]


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _texts(vectors: Sequence[Tensor]) -> list[str]:
    return [vector.numpy().tobytes().decode() for vector in vectors]
