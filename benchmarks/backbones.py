"""The two real ImageNet backbones of the data folder as feature extractors; random weights where it is absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import inputs


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One net of kindling, its weights in the data folder, and where it is cut."""

    net: str
    weights: str
    cut: str | None
    """The last layer kept of the net with these weights; None: they end where they should."""
    random_cut: str
    """The same place in the net without a file of weights."""

    def load(self) -> Any:
        """The cut net, averaged over the picture where it ends in maps."""
        from torch import nn

        import kindling as kd

        path = inputs.real(self.weights)
        model = kd.load(self.net, weights=str(path)) if path else kd.load(self.net)
        cut = self.cut if path else self.random_cut
        model = model.until(cut) if cut else model
        (spec,) = model.signature.outputs.values()
        return model if len(spec.shape) == 2 else model.then({"average": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()})


BACKBONES = {
    "SqueezeNet 1.1": Backbone(net="squeezenet1_1", weights=inputs.SQUEEZENET, cut=None, random_cut="fire9"),
    "MobileNetV2": Backbone(net="mobilenet_v2", weights=inputs.MOBILENET, cut="conv2", random_cut="conv2"),
}
"""SqueezeNet's file has no classifier; of MobileNetV2 the last map is kept."""
