"""Recurrent operators: RNN, GRU, LSTM, in every variant that ONNX has; the plain ones by torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kindling.nets.onnx_ops.indexing import turned
from kindling.nets.onnx_ops.registry import op

_Activation = Callable[[Tensor], Tensor]


def _activation(name: str, alpha: float | None, beta: float | None) -> _Activation:
    """One of ONNX's activations of a cell, by name, with its settings or their defaults."""

    def a(default: float) -> float:
        return default if alpha is None else alpha

    def b(default: float) -> float:
        return default if beta is None else beta

    table: dict[str, _Activation] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "affine": lambda x: a(1.0) * x + b(0.0),
        "leakyrelu": lambda x: F.leaky_relu(x, a(0.01)),
        "thresholdedrelu": lambda x: torch.where(x >= a(1.0), x, torch.zeros_like(x)),
        "scaledtanh": lambda x: a(1.0) * torch.tanh(b(1.0) * x),
        "hardsigmoid": lambda x: torch.clamp(a(0.2) * x + b(0.5), 0, 1),
        "elu": lambda x: F.elu(x, a(1.0)),
        "softsign": F.softsign,
        "softplus": F.softplus,
    }
    if name.lower() not in table:
        raise ValueError(f"a cell with activation {name!r}")
    return table[name.lower()]


_WITH_ALPHA = ("affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu")
_WITH_BETA = ("affine", "scaledtanh", "hardsigmoid")


def _activations(
    names: Sequence[str] | None, defaults: Sequence[str], directions: int, alpha: Any, beta: Any
) -> list[list[_Activation]]:
    """For each direction its activations. Settings stand in one list, for those that take any, in order."""
    every = list(names) if names else list(defaults) * directions
    each = len(defaults)
    if len(every) != each * directions:
        raise ValueError(f"{len(every)} activations for {directions} directions of {each}")
    alphas, betas = list(alpha or []), list(beta or [])
    made = []
    for name in every:
        one = alphas.pop(0) if alphas and name.lower() in _WITH_ALPHA else None
        two = betas.pop(0) if betas and name.lower() in _WITH_BETA else None
        made.append(_activation(name, one, two))
    return [made[k * each : (k + 1) * each] for k in range(directions)]


def _flipped(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Time (axis 0) turned round, each row up to its length."""
    if lengths is None:
        return x.flip(0)
    at = turned(lengths, x.shape[0]).t()
    return x.gather(0, at.reshape(*at.shape, *[1] * (x.dim() - 2)).expand(x.shape))


def _run(
    x: Tensor,
    directions: str,
    lengths: Tensor | None,
    states: Sequence[Tensor],
    step: Callable[[int, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> tuple[Tensor, list[Tensor]]:
    """Every direction over time.

    Args:
        x: (time, rows, features).
        states: what a cell carries, the output first; each (directions, rows, hidden).
        step: (direction, x at t, states) -> new states.
    Returns: outputs (time, directions, rows, hidden), and the last states.
    """
    count = 2 if directions == "bidirectional" else 1
    outputs, lasts = [], []
    for d in range(count):
        backward = directions == "reverse" or d == 1
        steps = _flipped(x, lengths) if backward else x
        now = tuple(state[d] for state in states)
        seen = []
        for t in range(x.shape[0]):
            new = step(d, steps[t], now)
            if lengths is not None:
                live = (t < lengths).unsqueeze(1)
                new = tuple(torch.where(live, a, b) for a, b in zip(new, now, strict=True))
                seen.append(torch.where(live, new[0], torch.zeros_like(new[0])))
            else:
                seen.append(new[0])
            now = new
        whole = torch.stack(seen) if seen else x.new_zeros(0, *states[0].shape[1:])
        outputs.append(_flipped(whole, lengths) if backward else whole)
        lasts.append(now)
    return torch.stack(outputs, 1), [torch.stack([last[k] for last in lasts]) for k in range(len(states))]


def _clipped(clip: float | None) -> _Activation:
    return (lambda x: x) if clip is None else (lambda x: x.clamp(-clip, clip))


def _state(given: Tensor | None, x: Tensor, directions: int, hidden: int, layout: int) -> Tensor:
    if given is None:
        return x.new_zeros(directions, x.shape[1], hidden)
    return given.transpose(0, 1) if layout else given


def _laid_out(outputs: Tensor, states: list[Tensor], layout: int) -> tuple[Tensor, ...]:
    """Time first and rows third, or with `layout` rows first."""
    if not layout:
        return (outputs, *states)
    return (outputs.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in states))


def _biases(b: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    """Those on the input and those on the state, (directions, gates x hidden) each."""
    if b is None:
        none = r.new_zeros(r.shape[0], r.shape[1])
        return none, none
    return b[:, : r.shape[1]], b[:, r.shape[1] :]


def _swap(x: Tensor, order: Sequence[int]) -> Tensor:
    """Gates of one direction (first axis) in another order."""
    parts = x.chunk(len(order))
    return torch.cat([parts[k] for k in order])


def _torch_weights(w: Tensor, r: Tensor, b: Tensor | None, order: Sequence[int]) -> list[Tensor]:
    flat = []
    for d in range(w.shape[0]):
        flat += [_swap(w[d], order), _swap(r[d], order)]
        if b is not None:
            wb, rb = b[d].chunk(2)
            flat += [_swap(wb, order), _swap(rb, order)]
    return flat


def _by_torch(
    kind: Any, x: Tensor, h: Any, weights: list[Tensor], biased: bool, direction: str
) -> tuple[Tensor, list[Tensor]]:
    both = direction == "bidirectional"
    x = x.flip(0) if direction == "reverse" else x
    found = kind(x, h, weights, biased, 1, 0.0, False, both, False)
    y = found[0].flip(0) if direction == "reverse" else found[0]
    time, rows, _ = x.shape
    return y.reshape(time, rows, 2 if both else 1, -1).transpose(1, 2), list(found[1:])


def _plain(direction: str, *special: Any) -> bool:
    return direction in ("forward", "reverse", "bidirectional") and all(value is None for value in special)


@op("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Any = None,
    activation_beta: Any = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """`h = f(x W' + Wb + h R' + Rb)`."""
    x = x.transpose(0, 1) if layout else x
    hidden, directions = r.shape[-1], w.shape[0]
    h0 = _state(initial_h, x, directions, hidden, layout)
    acts = _activations(activations, ["Tanh"], directions, activation_alpha, activation_beta)
    wb, rb = _biases(b, r)
    clipped = _clipped(clip)

    def step(d: int, x_t: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (acts[d][0](clipped(F.linear(x_t, w[d], wb[d]) + F.linear(now[0], r[d], rb[d]))),)

    return _laid_out(*_run(x, direction, lengths, [h0], step), layout)


@op("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Any = None,
    activation_beta: Any = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Gates in the order update, reset, hidden; torch's kernel where the reset comes after the product."""
    x = x.transpose(0, 1) if layout else x
    hidden, directions = r.shape[-1], w.shape[0]
    h0 = _state(initial_h, x, directions, hidden, layout)
    if linear_before_reset and _plain(direction, lengths, clip, activations):
        weights = _torch_weights(w, r, b, (1, 0, 2))
        y, states = _by_torch(torch.gru, x, h0.contiguous(), weights, b is not None, direction)
        return _laid_out(y, states, layout)
    acts = _activations(activations, ["Sigmoid", "Tanh"], directions, activation_alpha, activation_beta)
    wb, rb = _biases(b, r)
    clipped = _clipped(clip)

    def step(d: int, x_t: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        f, g = acts[d]
        xz, xr, xh = F.linear(x_t, w[d], wb[d]).chunk(3, -1)
        rz, rr, rh = r[d].chunk(3)
        bz, br, bh = rb[d].chunk(3)
        (h,) = now
        z = f(clipped(xz + F.linear(h, rz, bz)))
        reset = f(clipped(xr + F.linear(h, rr, br)))
        inner = reset * F.linear(h, rh, bh) if linear_before_reset else F.linear(reset * h, rh, bh)
        n = g(clipped(xh + inner))
        return ((1 - z) * n + z * h,)

    return _laid_out(*_run(x, direction, lengths, [h0], step), layout)


@op("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Any = None,
    activation_beta: Any = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 1,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Gates in the order input, output, forget, cell; `p` holds the peepholes of the first three."""
    x = x.transpose(0, 1) if layout else x
    hidden, directions = r.shape[-1], w.shape[0]
    h0 = _state(initial_h, x, directions, hidden, layout)
    c0 = _state(initial_c, x, directions, hidden, layout)
    if not input_forget and _plain(direction, lengths, clip, activations, p):
        weights = _torch_weights(w, r, b, (0, 2, 3, 1))
        y, states = _by_torch(torch.lstm, x, (h0.contiguous(), c0.contiguous()), weights, b is not None, direction)
        return _laid_out(y, states, layout)
    acts = _activations(activations, ["Sigmoid", "Tanh", "Tanh"], directions, activation_alpha, activation_beta)
    wb, rb = _biases(b, r)
    clipped = _clipped(clip)
    holes = p if p is not None else x.new_zeros(directions, 3 * hidden)

    def step(d: int, x_t: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        f, g, last = acts[d]
        h, c = now
        i, o, forget, cell = (F.linear(x_t, w[d], wb[d]) + F.linear(h, r[d], rb[d])).chunk(4, -1)
        pi, po, pf = holes[d].chunk(3)
        i = f(clipped(i + pi * c))
        forget = 1 - i if input_forget else f(clipped(forget + pf * c))
        c = forget * c + i * g(clipped(cell))
        return f(clipped(o + po * c)) * last(c), c

    return _laid_out(*_run(x, direction, lengths, [h0, c0], step), layout)
