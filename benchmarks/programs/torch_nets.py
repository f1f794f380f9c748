"""VGG16 and SqueezeNet 1.1 in plain torch, cut where the benchmarks cut: the plain scripts and peers run these.

Written from the papers (Simonyan and Zisserman, 2014, arXiv:1409.1556; Iandola et al., 2016, arXiv:1602.07360, release
1.1) and independent of `kindling.nets`, so that equal features on both sides mean something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


def vgg16(until: str) -> nn.Sequential:
    """VGG16 up to `fc2` (4,096 features after its ReLU) or a pooling such as `block5_pool` (25,088, flattened)."""
    layers: list[nn.Module] = []
    channels = 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
        if until == f"block{block}_pool":
            return nn.Sequential(*layers, nn.Flatten())
    layers += [
        nn.Flatten(),
        nn.Linear(25088, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)


def squeezenet1_1(ceil_mode: bool) -> nn.Sequential:
    """SqueezeNet 1.1 up to its last fire module, averaged over the picture: 512 features."""

    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        pool(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        pool(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        pool(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def build(net: str, *, until: str = "fc2", ceil_mode: bool = True, weights: str | Path | None = None) -> nn.Module:
    """The net in inference mode; `weights`: a file of `torch.save` holding its tensors in order."""
    with torch.device("meta"):
        module = vgg16(until) if net == "vgg16" else squeezenet1_1(ceil_mode)
    module = module.to_empty(device="cpu")
    if weights is None:
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.normal_(std=(2 / fan_in) ** 0.5) if parameter.ndim > 1 else parameter.zero_()
    else:
        fill(module, torch.load(weights, weights_only=True))
    return module.eval()


def fill(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Copy tensors into a module's parameters, in order; every shape must agree.

    Raises: ValueError.
    """
    own = list(module.parameters())
    if [tuple(p.shape) for p in own] != [tuple(t.shape) for t in tensors]:
        raise ValueError("the tensors are those of another net")
    with torch.no_grad():
        for parameter, tensor in zip(own, tensors, strict=True):
            parameter.copy_(tensor)
