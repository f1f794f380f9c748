"""What every weight-file reader returns: names with shapes and dtypes now, the numbers when asked for.

Shapes are compared with the net's before anything large is read, so that a file that lies about its sizes costs
nothing. Readers are in `torch.py`, `keras.py` and `npz.py`; `files.py` picks one; `weights.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a weight file."""

    shape: tuple[int, ...]
    dtype: str
    """A dtype's name as in torch: `"float32"`."""
    read: Callable[[], Tensor]
    """The numbers, in memory of their own: the file may change or go away afterwards."""


StoredTensors: TypeAlias = Mapping[str, Stored]
