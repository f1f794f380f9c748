"""Torch's own random generator, which a whole process shares: borrowed by one thread at a time, and given back.

New layers draw their weights from it. Rooms that make layers or try a net out borrow it, so that they disturb neither
the user's draws nor a net that another thread is making. Draws of a training have seeds of their own (`train/loop.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_borrowed = threading.RLock()


@contextmanager
def borrowed(seed: int | None = None) -> Iterator[None]:
    """While open, torch's generator (the processor's) is this thread's; afterwards it is as it was.

    Args:
        seed: what to begin with; where the generator stands if None.

    >>> import torch
    >>> with borrowed(7):
    ...     first = torch.rand(3)
    >>> with borrowed(7):
    ...     second = torch.rand(3)
    >>> torch.equal(first, second)
    True
    """
    import torch

    with _borrowed, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield
