"""What all-reduce sends for a bucket of gradients: the gradients themselves, half of their bits, or their rank.

Each courier is a generator. Every `next` waits for the sum it started before, and starts the following one; when it
ends, each worker holds the sum over all workers in `gradients`. All of them treat tensors one by one, so the bits do
not depend on how parameters were put into buckets.
Sources: Vogels et al., 2019, arXiv:1905.13727, algorithms 1 and 2. The arithmetic is that of torch's own hooks for
DistributedDataParallel (`torch.distributed.algorithms.ddp_comm_hooks`), with sums in place of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kindling.train.strategies.comms import Comms

Memory = dict[str, dict[str, Any]]
"""What a courier keeps for each parameter between steps, by the parameter's number as text."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """The gradients of one bucket, and what is remembered of each."""

    gradients: Sequence[Tensor]
    numbers: Sequence[int]
    """The parameters' places in the replica's list."""
    memory: Mapping[str, Mapping[str, Any]]
    rank: int
    """Of PowerSGD's factors."""


Courier = Callable[[Parcel, Comms, Memory], Iterator[None]]
"""(what to send, through what, where the new memory goes)."""


def whole(parcel: Parcel, comms: Comms, fresh: Memory) -> Iterator[None]:
    """Sums of the gradients as they are."""
    pending = comms.start_sum(parcel.gradients)
    yield
    pending.wait()


def bf16(parcel: Parcel, comms: Comms, fresh: Memory) -> Iterator[None]:
    """Sums in bfloat16: 8 bits of precision, the range of float32, half the bytes."""
    halves = [gradient.bfloat16() for gradient in parcel.gradients]
    pending = comms.start_sum(halves)
    yield
    pending.wait()
    for gradient, half in zip(parcel.gradients, halves, strict=True):
        gradient.copy_(half)


def powersgd(parcel: Parcel, comms: Comms, fresh: Memory) -> Iterator[None]:
    """Matrices as the product of two thin ones, which are summed; what is lost is added to the next gradient.

    A gradient of shape (n, m, ...) is a matrix of n rows. Those for which two factors are no smaller than the matrix
    are sent whole, vectors among them.
    """
    matrices: list[tuple[str, Tensor, Tensor]] = []
    first: list[Tensor] = []
    for number, gradient in zip(parcel.numbers, parcel.gradients, strict=True):
        if not pays(gradient.shape, parcel.rank):
            first.append(gradient)
            continue
        key = str(number)
        old = parcel.memory.get(key) or {"q": start_factor(gradient, parcel.rank, number)}
        matrix = gradient.reshape(len(gradient), -1).clone()
        if "error" in old:
            matrix += old["error"]
        left = matrix @ old["q"]
        matrices.append((key, matrix, left))
        first.append(left)
    pending = comms.start_sum(first)
    yield
    pending.wait()
    rights: list[Tensor] = []
    for _, matrix, left in matrices:
        orthogonalise(left)
        rights.append(matrix.t() @ left)
    pending = comms.start_sum(rights)
    yield
    pending.wait()
    gradients = {str(number): gradient for number, gradient in zip(parcel.numbers, parcel.gradients, strict=True)}
    for (key, matrix, left), right in zip(matrices, rights, strict=True):
        total = left @ right.t()
        gradients[key].copy_(total.view_as(gradients[key]))
        fresh[key] = {"q": right, "error": matrix - total / comms.world}


def pays(shape: Sequence[int], rank: int) -> bool:
    """Whether two factors are smaller than the matrix.

    >>> pays((100, 50), 2), pays((100,), 2), pays((3, 4), 2)
    (True, False, False)
    """
    if len(shape) < 2:
        return False
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return (rows + columns) * rank < rows * columns


def start_factor(gradient: Tensor, rank: int, number: int) -> Tensor:
    """The right factor of the first step: normal numbers, the same on every worker."""
    generator = torch.Generator().manual_seed(number)
    columns = gradient[0].numel()
    return torch.randn(columns, rank, generator=generator).to(gradient)


def orthogonalise(matrix: Tensor) -> None:
    """Make the columns orthonormal, in place, from left to right; a column that depends on those before becomes zero.

    >>> matrix = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    >>> orthogonalise(matrix)
    >>> torch.allclose(matrix.t() @ matrix, torch.eye(2), atol=1e-6)
    True
    """
    for place in range(matrix.shape[1]):
        column = matrix[:, place]
        size = column.norm()
        for _ in range(2):  # once leaves rounding errors as large as what is left of a nearly dependent column
            before = matrix[:, :place]
            column -= before @ (before.t() @ column)
        length = column.norm()
        if length > 1e-6 * size:
            column /= length
        else:
            column.zero_()


COURIERS: Mapping[str | None, Courier] = {None: whole, "bf16": bf16, "powersgd": powersgd}
