"""Modules to operate on: each has something that surgery gets wrong easily."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling.nets import vision
from kindling.signature import Signature, TensorSpec


def spec(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(("N", *shape), dtype)


def signature(inputs: dict[str, TensorSpec], **outputs: TensorSpec) -> Signature:
    return Signature(inputs, outputs)


def vgg16() -> nn.Sequential:
    with torch.device("meta"):
        return vision.vgg16()


VGG16 = signature({"image": spec(3, 224, 224)}, scores=spec(1000))


class Block(nn.Module):
    """Residual, with one ReLU module called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """Stem, two residual blocks, a dead head, functional dropout, flattening by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.hidden = nn.Linear(8 * 4 * 4, 16)
        self.head = nn.Linear(16, 5)
        self.unused = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.size(0)
        x = F.relu_(self.stem(x))
        x = F.max_pool2d(self.blocks(x), 2)
        x = x.view(rows, -1)
        x = F.relu(self.hidden(x))
        x = F.dropout(x, 0.5, training=self.training)
        return self.head(x)


RESIDUAL = signature({"image": spec(3, 8, 8)}, scores=spec(5))


class Fire(nn.Module):
    """Branches joined by cat, several outputs as a dict, activations as functions, methods and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.left = nn.Conv2d(4, 6, 1)
        self.right = nn.Conv2d(4, 6, 3, padding=1)
        self.act = nn.GELU()
        self.scores = nn.Linear(12, 3)
        self.side = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.squeeze(x).relu_()
        x = torch.cat([F.relu(self.left(x), inplace=True), self.act(self.right(x))], 1)
        x = x.mean((2, 3))
        return {"scores": self.scores(x).softmax(-1), "side": self.side(x)}


FIRE = signature({"image": spec(3, 8, 8)}, scores=spec(3), side=spec(2))


class Siamese(nn.Module):
    """One trunk for two inputs, and a third input that only a mask uses when it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.own = nn.Linear(6, 4)
        self.out = nn.Linear(12, 2)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        left, right, own = self.trunk(a), self.trunk(b), self.own(b)
        if mask is not None:
            left = left * mask
        return self.out(torch.cat([left, right, own], 1)), left - right


SIAMESE = signature({"first": spec(6), "second": spec(6)}, scores=spec(2), difference=spec(4))


class Tagger(nn.Module):
    """Embedding, a layer that returns a tuple, a parameter of its own, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(1, 7, 6))
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.down = nn.Linear(5, 6)
        self.tags = nn.Linear(6, 11, bias=False)
        self.tags.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.position
        x, _state = self.lstm(x)
        return self.tags(torch.tanh(self.down(x)))


TAGGER = signature({"ids": spec(7, dtype="int64")}, tags=spec(7, 11))


class Scaled(nn.Conv2d):
    """A layer of one's own that fx sees through."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Scaled(3, 4, 2, stride=2), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU6())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


OWN = signature({"image": spec(3, 7, 7)}, scores=spec(2))


class Routed(nn.Module):
    """Cannot be traced: the way depends on the data. Tied functional use of a layer that comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.plus = nn.Linear(8, 8)
        self.minus = nn.Linear(8, 8)
        self.body = nn.Sequential(OrderedDict(fc=nn.Linear(8, 7), act=nn.ReLU(), drop=nn.Dropout(0.5)))
        self.head = nn.Linear(7, 3)
        self.big = nn.Linear(3, 5000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + (self.plus(x) if x[0, 0] > 0 else self.minus(x))
        x = F.dropout(x, 0.5, training=self.training)
        x = self.head(self.body(x))
        return self.big(x)


ROUTED = signature({"x": spec(6)}, out=spec(5000))


class Outer(nn.Module):
    """Traceable around something that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.trunk = Routed()
        self.after = nn.Linear(5000, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.trunk(F.relu(self.before(x))))


OUTER = signature({"x": spec(6)}, scores=spec(2))

ALL: dict[str, tuple[Any, Signature]] = {
    "residual": (Residual, RESIDUAL),
    "fire": (Fire, FIRE),
    "siamese": (Siamese, SIAMESE),
    "tagger": (Tagger, TAGGER),
    "own": (Own, OWN),
    "routed": (Routed, ROUTED),
    "outer": (Outer, OUTER),
}


def batch(sig: Signature, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, one in sig.inputs.items():
        shape = [rows, *(int(size) for size in one.shape[1:])]
        made[name] = (
            torch.randint(0, 11, shape, generator=rng) if one.dtype == "int64" else torch.randn(shape, generator=rng)
        )
    return made


def warmed(make: Any, seed: int = 0) -> nn.Module:
    """A module with random weights and batch statistics that are not the initial ones, in inference mode."""
    torch.manual_seed(seed)
    module: nn.Module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module.eval()
