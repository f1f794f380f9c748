"""The real ImageNet backbones of the data folder as feature extractors; random weights where it is absent.

Two are nets of kindling with other people's weights; the third is Caffe's own file, read by name and never rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import inputs


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One net, its weights in the data folder, and where it is cut."""

    net: str
    """A net of kindling, or `module:function` for one of a file; with random weights it is `NET_random` then."""
    weights: str
    cut: str | None
    """The last layer kept of the net with these weights; None: they end where they should."""
    random_cut: str
    """The same place in the net without a file of weights."""

    @property
    def key(self) -> str:
        """Its name in settings and folders."""
        return self.net.rpartition(":")[2]

    def words(self, *, trained: bool) -> list[str]:
        """What names the cut net on kindling's command line."""
        if ":" in self.net:
            return ["--model", self.net if trained else f"{self.net}_random"]
        cut = self.cut if trained else self.random_cut
        words = ["--model", self.net]
        words += ["--weights", str(inputs.need(self.weights))] if trained else []
        return words + (["--until", cut] if cut else [])

    def load(self) -> Any:
        """The cut net, averaged over the picture where it ends in maps. Nets of kindling only."""
        from torch import nn

        import kindling as kd

        path = inputs.real(self.weights)
        model = kd.load(self.net, weights=str(path)) if path else kd.load(self.net)
        cut = self.cut if path else self.random_cut
        model = model.until(cut) if cut else model
        (spec,) = model.signature.outputs.values()
        return model if len(spec.shape) == 2 else model.then({"average": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()})


def squeezenet_v1_0() -> Any:
    """SqueezeNet v1.0 from its prototxt and caffemodel, up to the last module: `kindling transfer` takes it by name."""
    return _squeezenet_v1_0(weights=str(inputs.need(inputs.SQUEEZENET_CAFFE)))


def squeezenet_v1_0_random() -> Any:
    """The same net as its fillers begin it."""
    return _squeezenet_v1_0()


def _squeezenet_v1_0(**weights: str) -> Any:
    import kindling as kd

    described = inputs.need(inputs.SQUEEZENET_PROTOTXT)
    # A deploy file states no preparation: blue first and Caffe's usual means, as the net was trained.
    net = kd.load(str(described), mean=(104, 117, 123), image={"resize_to": 256}, **weights)
    return net.until("fire9/concat")


BACKBONES = {
    "SqueezeNet 1.1": Backbone(net="squeezenet1_1", weights=inputs.SQUEEZENET, cut=None, random_cut="fire9"),
    "MobileNetV2": Backbone(net="mobilenet_v2", weights=inputs.MOBILENET, cut="conv2", random_cut="conv2"),
    "SqueezeNet v1.0, caffemodel": Backbone(
        net="benchmarks.backbones:squeezenet_v1_0",
        weights=inputs.SQUEEZENET_CAFFE,
        cut="fire9/concat",
        random_cut="fire9/concat",
    ),
}
"""SqueezeNet 1.1's file has no classifier; of the others the last map is kept."""
