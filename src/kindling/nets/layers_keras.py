"""Layers of Keras and TensorFlow that torch does not have, each with their own arithmetic.

`formats/keras`, `formats/tensorflow` and `formats/tflite.py` build nets from them. Channels stand at axis 1 in
pictures, at the last axis in sequences. Sources: the layers of Keras 2 and 3 (`keras/src/layers`), and TensorFlow's
page on padding (`tf.nn`, "Notes on padding").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling import graph
from kindling.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": torch.exp,
    "hard_sigmoid": lambda x: F.relu6(x + 3) / 6,
    "hard_sigmoid_2": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "linear": lambda x: x,
    "relu": torch.relu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sparse_plus": lambda x: torch.where(x <= -1, torch.zeros_like(x), torch.where(x < 1, (x + 1) ** 2 / 4, x)),
    "sparse_sigmoid": lambda x: (0.5 * (x + 1)).clamp(0, 1),
    "squareplus": lambda x: (x + torch.sqrt(x * x + 4)) / 2,
    "tanh": torch.tanh,
}
"""By name; `hard_sigmoid_2` is Keras 1's and 2's hard sigmoid, which Keras 3 changed."""


def _checked(field: str, kind: str) -> str:
    if kind not in ACTIVATIONS:
        raise ConfigError(field, kind, "is no activation known here", f"Use one of {', '.join(ACTIVATIONS)}")
    return kind


@graph.allow
class KerasActivation(nn.Module):
    """An activation of Keras by name, where torch has no layer of the same formula.

    >>> KerasActivation("hard_sigmoid_2")(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 0.7000])
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = _checked("kind", kind)

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](x)

    def extra_repr(self) -> str:
        return repr(self.kind)


@graph.allow
class KerasReLU(nn.Module):
    """ReLU with Keras's three settings: `max_value`, the slope below `threshold`, and the threshold.

    >>> KerasReLU(6.0, 0.1, 1.0)(torch.tensor([-1.0, 0.5, 2.0, 9.0]))
    tensor([-0.2000, -0.0500,  2.0000,  6.0000])
    """

    def __init__(self, max_value: float | None = None, negative_slope: float = 0.0, threshold: float = 0.0) -> None:
        super().__init__()
        self.max_value, self.negative_slope, self.threshold = max_value, negative_slope, threshold

    def forward(self, x: Tensor) -> Tensor:
        above = x if self.max_value is None else x.clamp_max(self.max_value)
        return torch.where(x >= self.threshold, above, self.negative_slope * (x - self.threshold))

    def extra_repr(self) -> str:
        return f"max_value={self.max_value}, negative_slope={self.negative_slope}, threshold={self.threshold}"


@graph.allow
class KerasPReLU(nn.Module):
    """x where it is positive, weight * x below; the weight has any shape that broadcasts over a row.

    >>> layer = KerasPReLU((2, 1))
    >>> layer.weight.shape
    torch.Size([2, 1])
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.weight = nn.Parameter(torch.zeros(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.weight * x)

    def extra_repr(self) -> str:
        return str(self.shape)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Cells that TensorFlow's SAME padding adds before and after an axis of `size` cells.

    >>> same_padding(224, 3, 2), same_padding(225, 3, 2), same_padding(5, 1, 2)
    ((0, 1), (1, 1), (0, 0))
    """
    reach = (kernel - 1) * dilation + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


@graph.allow
class SamePad(nn.Module):
    """TensorFlow's SAME padding in front of a convolution or a pooling layer: it depends on the size of its input.

    >>> SamePad((3, 3), (2, 2))(torch.zeros(1, 1, 4, 5)).shape
    torch.Size([1, 1, 5, 7])
    """

    def __init__(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...] | None = None,
        value: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = tuple(kernel), tuple(stride), value
        self.dilation = None if dilation is None else tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        frame: list[int] = []
        dilation = self.dilation or (1,) * len(self.kernel)
        for size, kernel, stride, step in zip(x.shape[2:], self.kernel, self.stride, dilation, strict=True):
            frame = [*same_padding(size, kernel, stride, step), *frame]
        return F.pad(x, frame, value=self.value) if any(frame) else x

    def extra_repr(self) -> str:
        more = "" if self.dilation is None else f", dilation={self.dilation}"
        return f"kernel={self.kernel}, stride={self.stride}{more}, value={self.value}"


_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@graph.allow
class SameAvgPool(nn.Module):
    """Average pooling with SAME padding that is not counted.

    >>> SameAvgPool((2,), (2,))(torch.tensor([[[1.0, 3.0, 5.0]]]))
    tensor([[[2., 5.]]])
    """

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(kernel), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        frame: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel, self.stride, strict=True):
            frame = [*same_padding(size, kernel, stride), *frame]
        pool = cast(Callable[..., Tensor], _AVERAGES[len(self.kernel)])
        if not any(frame):
            return pool(x, self.kernel, self.stride)
        ones = F.pad(x.new_ones(1, 1, *x.shape[2:]), frame)
        return pool(F.pad(x, frame), self.kernel, self.stride) / pool(ones, self.kernel, self.stride)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


@graph.allow
class GaussianNoise(nn.Module):
    """Noise of the given standard deviation, added in training only."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        return str(self.std)


@graph.allow
class GaussianDropout(nn.Module):
    """In training a factor from a normal distribution around 1 of variance rate / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        return x * (1 + math.sqrt(self.rate / (1 - self.rate)) * torch.randn_like(x))

    def extra_repr(self) -> str:
        return str(self.rate)


@graph.allow
class MaskedMean(nn.Module):
    """Mean over time, (N, time, features) to (N, features), of the steps that a mask (N, time) keeps.

    >>> MaskedMean()(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[True, False]]))
    tensor([[1.]])
    """

    def forward(self, x_NTF: Tensor, mask_NT: Tensor) -> Tensor:
        weights = mask_NT.to(x_NTF.dtype).unsqueeze(-1)
        return (x_NTF * weights).sum(1) / weights.sum(1)


@graph.allow
class StepMask(nn.Module):
    """Which steps of a sequence (N, time, features) count: those with a feature that is not `value`.

    >>> StepMask(0.0)(torch.tensor([[[0.0, 0.0], [0.0, 2.0]]]))
    tensor([[False,  True]])
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_NTF: Tensor) -> Tensor:
        return (x_NTF != self.value).any(-1)

    def extra_repr(self) -> str:
        return str(self.value)


_GATES = {"lstm": 4, "gru": 3, "simple": 1}
_NETS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "simple": nn.RNN}


@graph.allow
class KerasRNN(nn.Module):
    """Keras's LSTM, GRU and SimpleRNN over (N, time, features), with masks and all of their settings.

    The weights are those of torch's layer of the kind, in `rnn`; where Keras computes what torch computes and nothing
    is masked, torch's layer computes. A masked step leaves state and output as they were. With `reset_after=False` a
    GRU resets the state before the recurrent product, as Keras 1 and 2 did.

    Args:
        kind: `"lstm"`, `"gru"` or `"simple"`.
        activation, gate: names of `ACTIVATIONS`; Keras's `activation` and `recurrent_activation`.
        sequences: give every step, (N, time, units), and not the last alone, (N, units).
        backwards: begin at the end of the sequence; the steps come out in the order in which they were computed.
        states: give the final states as well: output, hidden state and, for an LSTM, cell.
        zero_output: masked steps of the output are zero.
        masked: the second input is a mask (N, time); inputs after that are the states to begin with.

    >>> KerasRNN("gru", 3, 4)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        kind: str,
        features: int,
        units: int,
        activation: str = "tanh",
        gate: str = "sigmoid",
        bias: bool = True,
        reset_after: bool = True,
        sequences: bool = False,
        backwards: bool = False,
        states: bool = False,
        zero_output: bool = False,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if kind not in _NETS:
            raise ConfigError("kind", kind, "is no recurrent layer", f"Use one of {', '.join(_NETS)}")
        self.kind, self.features, self.units, self.bias = kind, features, units, bias
        self.activation, self.gate = _checked("activation", activation), _checked("gate", gate)
        self.reset_after, self.sequences, self.backwards, self.states = reset_after, sequences, backwards, states
        self.zero_output, self.masked = zero_output, masked
        self.rnn = _NETS[kind](features, units, bias=bias, batch_first=True)
        self.plain = activation == "tanh" and (kind == "simple" or gate == "sigmoid") and (kind != "gru" or reset_after)

    def forward(self, x_NTF: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        mask_NT = others[0] if self.masked else None
        initial = others[1:] if self.masked else others
        if self.backwards:
            x_NTF = x_NTF.flip(1)
            mask_NT = None if mask_NT is None else mask_NT.flip(1)
        if self.plain and mask_NT is None:
            begin = tuple(state.unsqueeze(0) for state in initial)
            steps, last = self.rnn(x_NTF, (begin if self.kind == "lstm" else begin[0]) if begin else None)
            state = tuple(part[0] for part in (last if isinstance(last, tuple) else (last,)))
            out = steps if self.sequences else state[0]
        else:
            out, state = self._steps(x_NTF, mask_NT, initial)
        return (out, *state) if self.states else out

    def _steps(
        self, x_NTF: Tensor, mask_NT: Tensor | None, initial: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight = cast(Tensor, self.rnn.weight_hh_l0)
        bias_in, bias = (self.rnn.bias_ih_l0, self.rnn.bias_hh_l0) if self.bias else (None, None)
        inputs = F.linear(x_NTF, cast(Tensor, self.rnn.weight_ih_l0), cast("Tensor | None", bias_in))
        zeros = x_NTF.new_zeros(x_NTF.shape[0], self.units)
        state = tuple(initial) or (zeros,) * (2 if self.kind == "lstm" else 1)
        out, given = zeros, []
        for step, part in enumerate(inputs.unbind(1)):
            new = self._step(part, state, weight, cast("Tensor | None", bias))
            shown = new[0]
            if mask_NT is not None:
                kept = mask_NT[:, step].unsqueeze(-1)
                new = tuple(torch.where(kept, a, b) for a, b in zip(new, state, strict=True))
                shown = torch.where(kept, shown, zeros if self.zero_output and self.sequences else out)
            state, out = new, shown
            given.append(out)
        return (torch.stack(given, 1) if self.sequences else out), state

    def _step(self, z: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        act, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.gate]
        h = state[0]
        if self.kind == "simple":
            return (act(z + F.linear(h, weight, bias)),)
        if self.kind == "lstm":
            z_in, z_forget, z_cell, z_out = (z + F.linear(h, weight, bias)).chunk(4, 1)
            cell = gate(z_forget) * state[1] + gate(z_in) * act(z_cell)
            return gate(z_out) * act(cell), cell
        z_reset, z_update, z_new = z.chunk(3, 1)
        if self.reset_after:
            r_reset, r_update, r_new = F.linear(h, weight, bias).chunk(3, 1)
            new = act(z_new + gate(z_reset + r_reset) * r_new)
        else:
            r_reset, r_update = F.linear(h, weight[: 2 * self.units]).chunk(2, 1)
            new = act(z_new + F.linear(gate(z_reset + r_reset) * h, weight[2 * self.units :]))
        update = gate(z_update + r_update)
        return (update * h + (1 - update) * new,)

    def extra_repr(self) -> str:
        more = "".join(
            f", {name}" for name in ("sequences", "backwards", "states", "zero_output", "masked") if getattr(self, name)
        )
        return f"{self.kind!r}, {self.features}, {self.units}, {self.activation!r}, {self.gate!r}{more}"


@graph.allow
class KerasAttention(nn.Module):
    """Keras's MultiHeadAttention over (N, time, features): query, value and key may have different features.

    >>> KerasAttention(2, 3, 3, 8, 8, 8, 8)(*[torch.zeros(1, 5, 8)] * 3).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        heads: int,
        key_dim: int,
        value_dim: int,
        query_features: int,
        value_features: int,
        key_features: int,
        out_features: int,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.query_features, self.value_features, self.key_features = query_features, value_features, key_features
        self.out_features, self.bias, self.dropout, self.causal = out_features, bias, dropout, causal
        self.query = nn.Linear(query_features, heads * key_dim, bias)
        self.key = nn.Linear(key_features, heads * key_dim, bias)
        self.value = nn.Linear(value_features, heads * value_dim, bias)
        self.output = nn.Linear(heads * value_dim, out_features, bias)

    def forward(self, query: Tensor, value: Tensor, key: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(query), self.key(key), self.value(value))
        )
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=self.causal)
        return cast(Tensor, self.output(mixed.transpose(1, 2).flatten(-2)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"


@graph.allow
class Quantized(nn.Module):
    """Numbers as a tensor of whole numbers would hold them: rounded to steps of `scale`, cut to the range.

    Quantised files of TensorFlow Lite keep every activation so. Gradients pass through the rounding.
    Source: Jacob et al., 2017, arXiv:1712.05877.

    >>> Quantized(0.5, 10, 0, 255)(torch.tensor([-9.0, 0.3, 500.0]))
    tensor([ -5.0000,   0.5000, 122.5000])
    """

    def __init__(self, scale: float, zero: int, low: int, high: int, away: bool = False) -> None:
        """
        Args:
            away: whether halves are rounded away from zero, the zero of the whole numbers, and not to the even one.
        """
        super().__init__()
        self.scale, self.zero, self.low, self.high, self.away = scale, zero, low, high, away

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.away:
                raw = x / self.scale + self.zero
                steps = raw.sign() * (raw.abs() + 0.5001).floor()  # a hair more: a half may come out a hair less
            else:
                steps = torch.round(x / self.scale) + self.zero
            out = (steps.clamp(self.low, self.high) - self.zero) * self.scale
        if x.requires_grad and torch.is_grad_enabled():
            out = out + (x - x.detach()) * ((steps >= self.low) & (steps <= self.high))
        return out

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, zero={self.zero}, {self.low}..{self.high}"


@graph.allow
class Numbers(nn.Module):
    """Numbers of a graph that belong to no layer: a parameter where they were trained, else fixed.

    >>> Numbers((2,), False)().tolist(), sum(1 for _ in Numbers((2,)).parameters())
    ([0.0, 0.0], 1)
    """

    value: Tensor

    def __init__(self, shape: tuple[int, ...], trained: bool = True) -> None:
        super().__init__()
        self.shape, self.trained = tuple(shape), trained
        if trained:
            self.value = nn.Parameter(torch.zeros(self.shape))
        else:
            self.register_buffer("value", torch.zeros(self.shape))

    def forward(self) -> Tensor:
        return self.value

    def extra_repr(self) -> str:
        return f"{self.shape}, trained={self.trained}"
