"""A running average of the weights: often better than the weights of any single step.

Source: Polyak and Juditsky, 1992, "Acceleration of stochastic approximation by averaging"; with exponential weights as
in Tarvainen and Valpola, 2017, arXiv:1703.01780. The arithmetic is that of `torch.optim.swa_utils.AveragedModel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RunningAverage:
    """Exponential average of some tensors; it begins with their values at the first update.

    >>> average = RunningAverage(0.5)
    >>> average.update([torch.tensor([1.0])])
    >>> average.update([torch.tensor([3.0])])
    >>> average.values
    [tensor([2.])]
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor]) -> None:
        """Move towards `tensors` by `1 - decay` of the way."""
        if not self.values:
            self.values = [tensor.detach().clone() for tensor in tensors]
            return
        torch._foreach_lerp_(self.values, [tensor.detach() for tensor in tensors], 1 - self.decay)
