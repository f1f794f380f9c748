"""Caffe's fillers: how weights begin. The rules are those of BVLC Caffe's `filler.hpp`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kindling.errors import FormatError, did_you_mean
from kindling.formats.caffe.schema import Message, where

FILLERS = ("constant", "uniform", "gaussian", "positive_unitball", "xavier", "msra", "bilinear")


def fill(tensor: Tensor, filler: Message, generator: torch.Generator | None = None) -> None:
    """Put a filler's numbers into a tensor of the shape that Caffe's blob has.

    Args:
        tensor: changed in place.
        filler: a FillerParameter.
        generator: torch's global one if None.
    Raises: FormatError, for an unknown filler and for numbers that make no distribution.

    >>> from kindling.formats.caffe.prototxt import parse
    >>> weight = torch.empty(2, 2)
    >>> fill(weight, parse("value: 3", "FillerParameter"))
    >>> weight.tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    kind = filler.get("type")
    if kind not in FILLERS:
        raise FormatError(f"there is no filler {kind!r}{where(filler.line)}.{did_you_mean(kind, FILLERS)}")
    count, shape = tensor.numel(), tensor.shape
    rows = shape[0] if shape else 1
    fan_in = count // max(rows, 1)
    fan_out = count // shape[1] if len(shape) > 1 and shape[1] else count
    norm = filler.get("variance_norm")
    n = max({"FAN_OUT": fan_out, "AVERAGE": (fan_in + fan_out) / 2}.get(norm, fan_in), 1)
    with torch.no_grad():
        if kind == "constant":
            tensor.fill_(filler.get("value"))
        elif kind == "uniform":
            low, high = filler.get("min"), filler.get("max")
            _check(low <= high and math.isfinite(high - low), filler, f"min {low} and max {high}")
            tensor.uniform_(low, high, generator=generator)
        elif kind == "gaussian":
            deviation, sparse = filler.get("std"), filler.get("sparse")
            _check(0 <= deviation < math.inf and sparse >= -1, filler, f"std {deviation} and sparse {sparse}")
            tensor.normal_(filler.get("mean"), deviation, generator=generator)
            if sparse >= 0:
                kept = torch.full_like(tensor, min(sparse / max(rows, 1), 1.0))
                tensor.mul_(torch.bernoulli(kept, generator=generator))
        elif kind == "positive_unitball":
            tensor.uniform_(0, 1, generator=generator)
            flat = tensor.view(rows, -1)
            flat.div_(flat.sum(1, keepdim=True))
        elif kind == "xavier":
            tensor.uniform_(-math.sqrt(3 / n), math.sqrt(3 / n), generator=generator)
        elif kind == "msra":
            tensor.normal_(0, math.sqrt(2 / n), generator=generator)
        else:
            _check(len(shape) == 4 and shape[2] == shape[3], filler, f"a blob of shape {tuple(shape)}")
            width = shape[3]
            half = math.ceil(width / 2)
            centre = (width - 1) / (2 * half)
            line = 1 - (torch.arange(width, dtype=tensor.dtype) / half - centre).abs()
            tensor.copy_((line[:, None] * line).expand(shape))


def _check(fits: bool, filler: Message, seen: str) -> None:
    if not fits:
        raise FormatError(f"filler {filler.get('type')!r}{where(filler.line)} cannot work with {seen}.")
