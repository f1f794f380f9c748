"""Dropout whose masks depend on each row, the epoch and the layer, and on nothing else.

torch draws masks from one generator in the order of a batch: another number of workers, other masks. Here a row's
mask comes from its own hash, so it is the same wherever, and beside whichever rows, it is trained. Layers of
`nn.Dropout`'s family are covered, and with them functional dropout in nets that can be traced; dropout inside
`nn.LSTM`, `nn.MultiheadAttention` and the like still draws from torch's generator.
Source of the bits: SplitMix64 (Steele et al., 2014), as in `order.mix`, counted through a row's numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kindling.train.order import mix

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_PER_WORD = 4
"""Draws of 16 bits in one word: a rate is met to within 1 / 131,072."""


class Draws:
    """What the dropout layers of one net share: the keys of the rows that are in it now."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._turns: dict[int, int] = {}

    def begin(self, keys: np.ndarray) -> None:
        """A forward pass over rows with these keys (uint64) begins."""
        self._keys = keys
        self._turns = {}

    @property
    def rows(self) -> int:
        return len(self._keys)

    def kept(self, layer: int, count: int, rate: float, device: torch.device) -> Tensor:
        """For each row `count` draws, true with probability `1 - rate`: bool, shape (rows, count).

        A layer that is called again in the same pass draws anew.
        """
        turn = self._turns.get(layer, 0)
        self._turns[layer] = turn + 1
        starts = torch.from_numpy(mix(self._keys, layer, turn).view(np.int64)).to(device)
        words = -(-count // _PER_WORD)
        z = starts[:, None] + torch.arange(1, words + 1, dtype=torch.int64, device=device) * _GOLDEN
        for shift, factor in _ROUNDS:
            z ^= (z >> shift) & ((1 << (64 - shift)) - 1)  # torch's shift keeps the sign
            z *= factor
        z ^= (z >> 31) & ((1 << 33) - 1)
        threshold = round(rate * 65536) - 32768
        if threshold > 32767:
            return torch.zeros(len(z), count, dtype=torch.bool, device=device)
        return z.view(torch.int16)[:, :count] >= threshold


class RowDropout(nn.Module):
    """In the place of a dropout layer, for as long as a net is trained.

    >>> draws = Draws()
    >>> layer = RowDropout(nn.Dropout(0.5), 0, draws)
    >>> draws.begin(np.array([7, 8], np.uint64))
    >>> both = layer(torch.ones(2, 6))
    >>> draws.begin(np.array([8], np.uint64))
    >>> torch.equal(both[1:], layer(torch.ones(1, 6)))
    True
    """

    def __init__(self, layer: nn.modules.dropout._DropoutNd, number: int, draws: Draws) -> None:
        super().__init__()
        self.layer, self._number, self._draws = layer, number, draws

    def forward(self, x: Tensor) -> Tensor:
        rate, rows = self.layer.p, self._draws.rows
        if not self.training or rate == 0 or not rows or x.dim() < 2 or len(x) % rows:
            out: Tensor = self.layer(x)
            return out
        whole = isinstance(self.layer, nn.Dropout | nn.AlphaDropout)
        places = x.shape[1:] if whole else x.shape[1:2]
        each = len(x) // rows  # a net may have folded a row's parts into the first axis
        kept = self._draws.kept(self._number, each * places.numel(), rate, x.device)
        kept = kept.reshape(len(x), *places, *[1] * (x.dim() - 1 - len(places)))
        if isinstance(self.layer, nn.AlphaDropout | nn.FeatureAlphaDropout):
            return _alpha(x, kept, rate)
        return x * (kept.to(x.dtype) * (1 / (1 - rate) if rate < 1 else 0.0))


def _alpha(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """What is dropped takes SELU's lowest value; mean and deviation stay (Klambauer et al., 2017, 1706.02515)."""
    low = -1.7580993408473766
    scale = ((1 - rate) * (1 + rate * low * low)) ** -0.5 if rate < 1 else 0.0
    return torch.where(kept, x, low) * scale - scale * rate * low


def seed_by_row(module: nn.Module) -> Draws:
    """Put `RowDropout` in the place of every dropout layer of `module`, in place; returns what they share."""
    draws = Draws()
    found = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd)
    ]
    made: dict[int, RowDropout] = {}
    for number, (_, layer) in enumerate(found):
        made[id(layer)] = RowDropout(layer, number, draws)
    for parent in list(module.modules()):
        if isinstance(parent, RowDropout):
            continue
        for name, child in list(parent.named_children()):
            if id(child) in made:
                setattr(parent, name, made[id(child)].train(child.training))
    return draws
