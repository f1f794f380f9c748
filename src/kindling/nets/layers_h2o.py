"""A layer of H2O's nets that torch does not have: numbers brought back to the units of the data.

The reader of its files is `kindling.formats.h2o`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kindling import graph


@graph.allow
class FixedScale(nn.Module):
    """x * scale + shift, one pair for each feature of the last axis; training leaves them alone.

    >>> layer = FixedScale(2)
    >>> layer.scale.copy_(torch.tensor([2.0, 3.0]))
    tensor([2., 3.])
    >>> layer(torch.ones(1, 2))
    tensor([[2., 3.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("shift", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def extra_repr(self) -> str:
        return str(self.features)
