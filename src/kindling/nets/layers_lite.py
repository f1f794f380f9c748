"""TensorFlow Lite's quantised layers: real weights outside, whole numbers inside, as its runtime computes.

Inputs are real numbers that stand at whole steps of `scale_in`. Sums of products of whole numbers are exact in float32
up to 2**24, which nets stay below; one multiplication and one rounding then give the output's steps, so that a net of
such layers answers as TensorFlow Lite does, where rounded floats drift apart layer by layer. Gradients are those of
the real layer, and pass through the rounding. `formats/tflite.py` builds nets from them.
Source: Jacob et al., 2017, arXiv:1712.05877; the quantisation page of TensorFlow Lite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling import graph

Pair = tuple[int, int]


class _Whole(nn.Module):
    """What both layers share."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        scale_in: float,
        scale_out: float,
        zero_out: int,
        low: int,
        high: int,
    ) -> None:
        super().__init__()
        self.bias, self.scale_in, self.scale_out, self.zero_out = bias, scale_in, scale_out, zero_out
        self.low, self.high = low, high
        self.weight = nn.Parameter(torch.zeros(shape))
        self.offset = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("weight_scale", torch.ones(shape[0]))

    def _compute(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """The rounded result of `product(input, weight, bias)`, whose features are at axis 1."""
        spread = (-1, *(1,) * (self.weight.dim() - 1))
        with torch.no_grad():
            scale = self.weight_scale
            whole_x = torch.round(x / self.scale_in)
            whole_w = torch.round(self.weight / scale.view(spread))
            both = scale * self.scale_in
            whole_b = None if self.offset is None else torch.round(self.offset / both)
            total = product(whole_x, whole_w, whole_b)
            factor = (both / self.scale_out).view(1, -1, *(1,) * (total.dim() - 2))
            steps = torch.round(total * factor) + self.zero_out
            out = (steps.clamp(self.low, self.high) - self.zero_out) * self.scale_out
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            real = product(x, self.weight, self.offset)
            inside = (steps >= self.low) & (steps <= self.high)
            out = out + (real - real.detach()) * inside
        return out

    def extra_repr(self) -> str:
        sizes = " x ".join(map(str, self.weight.shape))
        return f"{sizes}, steps of {self.scale_in:g} in, {self.scale_out:g} out"


@graph.allow
class LiteConv2d(_Whole):
    """A convolution of whole numbers.

    >>> layer = LiteConv2d(1, 1, (1, 1), scale_in=0.5, scale_out=1.0, low=-128, high=127)
    >>> _ = nn.init.constant_(layer.weight, 3.0)
    >>> layer(torch.tensor([[[[0.5, 1.0, 60.0]]]])).flatten().tolist()
    [2.0, 3.0, 127.0]
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: Pair,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        bias: bool = True,
        scale_in: float = 1.0,
        scale_out: float = 1.0,
        zero_out: int = 0,
        low: int = 0,
        high: int = 255,
    ) -> None:
        shape = (out_channels, channels // groups, *kernel)
        super().__init__(shape, bias, scale_in, scale_out, zero_out, low, high)
        self.channels, self.out_channels, self.kernel = channels, out_channels, tuple(kernel)
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), tuple(padding), tuple(dilation), groups

    def forward(self, x: Tensor) -> Tensor:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

        return self._compute(x, product)


@graph.allow
class LiteLinear(_Whole):
    """A dense layer of whole numbers.

    >>> LiteLinear(3, 2)(torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        bias: bool = True,
        scale_in: float = 1.0,
        scale_out: float = 1.0,
        zero_out: int = 0,
        low: int = 0,
        high: int = 255,
    ) -> None:
        super().__init__((out_features, features), bias, scale_in, scale_out, zero_out, low, high)
        self.features, self.out_features = features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(x, F.linear)
