"""Workers of one host sum through memory they share; the process group only tells them when.

A sum over TCP copies every byte four times through the kernel; here each worker copies its numbers in, adds its share
of the columns, and copies the result out. The memory has no name (`memfd`): nothing is left behind, whoever dies.
Linux only; everywhere else, and between hosts, `GroupComms` serves.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from kindling.train.strategies.comms import GroupComms, by_dtype

_SLOT_BYTES = 8 << 20
_BOARD_BYTES = 128 << 20
"""All slots together; with many workers each gets less than `_SLOT_BYTES`, and large sums go in more pieces."""
_SMALL_BYTES = 32 << 10
"""Below this two signals cost more than the bytes."""
_LINE = 64
_TOKEN_BYTES = 16


def host_token() -> str:
    """The same text in every process that runs on this boot of this host, or "" where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class SharedMemoryComms(GroupComms):
    """The default process group, all of whose workers map one board of slots: two per worker, used in turn.

    Every worker adds in the order of the ranks, so all get the same bits, and the same as `InProcessComms` gives.
    """

    overlaps: ClassVar[bool] = False

    def __init__(self, board: mmap.mmap) -> None:
        super().__init__()
        self._board = torch.frombuffer(board, dtype=torch.uint8)
        self._slot_bytes = len(board) // (2 * self.world)
        self._turn = 0
        self._token = torch.zeros(1)

    @classmethod
    def open(cls, store: Any) -> SharedMemoryComms | None:
        """Map rank 0's memory on every worker, or nowhere: None on all of them where one does not reach it.

        Args:
            store: of the process group; the board's address goes through it.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        size = 2 * world * (min(_SLOT_BYTES, _BOARD_BYTES // (2 * world)) // _LINE * _LINE)
        board: mmap.mmap | None = None
        opened = -1
        try:
            if rank == 0:
                opened = _new_board(size, store)
            else:
                opened = _foreign_board(store)
            board = mmap.mmap(opened, size)
        except (OSError, ValueError, AttributeError):
            board = None
        everyone = torch.tensor([1.0 if board is not None else 0.0])
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN)  # also keeps rank 0's descriptor open until all have mapped it
        if opened >= 0:
            os.close(opened)
        return cls(board) if board is not None and everyone.item() else None

    def _sum_all(self, tensors: Sequence[Tensor], scale: float) -> None:
        for group in by_dtype(tensors):
            spans = [tensor.detach().reshape(-1) for tensor in group]
            for piece in self._pieces(spans):
                self._add_up(piece, scale)
            for tensor, span in zip(group, spans, strict=True):
                if span.data_ptr() != tensor.data_ptr():  # it did not lie in one piece, and was copied
                    tensor.detach().copy_(span.view_as(tensor))

    def _sum(self, tensor: Tensor) -> None:
        if tensor.numel() * tensor.element_size() < _SMALL_BYTES or not tensor.is_contiguous():
            super()._sum(tensor)
            return
        for piece in self._pieces([tensor.detach().view(-1)]):
            self._add_up(piece, 1.0)

    def _pieces(self, spans: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The spans in order, cut so that each list fits a slot."""
        room = capacity = self._slot_bytes // spans[0].element_size()
        piece: list[Tensor] = []
        for span in spans:
            start = 0
            while start < len(span):
                part = span[start : start + room]
                piece.append(part)
                start += len(part)
                room -= len(part)
                if not room:
                    yield piece
                    piece, room = [], capacity
        if piece:
            yield piece

    def _add_up(self, piece: list[Tensor], scale: float) -> None:
        dtype = piece[0].dtype
        slots = self._board.view(dtype).view(2, self.world, -1)[self._turn]
        # The other slots may still be read by a worker that is behind; these were read before the last signal.
        self._turn ^= 1
        size = 0
        for span in piece:
            place = slots[self.rank, size : size + len(span)]
            if scale == 0:
                place.zero_()  # whatever it holds, and be it no number
            elif scale == 1:
                place.copy_(span)
            else:
                torch.mul(span, scale, out=place)
            size += len(span)
        self._wait()
        line = _LINE // piece[0].element_size()
        cuts = [size * part // self.world // line * line for part in range(self.world)] + [size]
        own = slice(cuts[self.rank], cuts[self.rank + 1])
        for rank in range(1, self.world):
            slots[0, own].add_(slots[rank, own])
        self._wait()
        start = 0
        for span in piece:
            span.copy_(slots[0, start : start + len(span)])
            start += len(span)

    def _wait(self) -> None:
        """Return when every worker has come here."""
        dist.all_reduce(self._token)


def _new_board(size: int, store: Any) -> int:
    """A descriptor of new memory that begins with a secret; its address and the secret are left in the store."""
    secret = secrets.token_hex(_TOKEN_BYTES // 2).encode()
    try:
        descriptor = os.memfd_create("kindling")
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, secret, 0)
    except (OSError, AttributeError):
        store.set("board", "")
        raise
    store.set("board", f"{os.getpid()}/{descriptor}/{secret.decode()}")
    return descriptor


def _foreign_board(store: Any) -> int:
    """A descriptor of rank 0's memory.

    Raises: OSError or ValueError, where it cannot be reached, or the address leads elsewhere (another container).
    """
    pid, number, secret = store.get("board").decode().split("/")
    descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    if os.pread(descriptor, _TOKEN_BYTES, 0) != secret.encode():
        os.close(descriptor)
        raise ValueError("that is not the board")
    return descriptor
