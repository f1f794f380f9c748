"""Operators that work number by number: arithmetic, comparisons, logic, activations, casts."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kindling.nets.onnx_ops.registry import FLOAT8, NARROW, POWERS, dtype_of, number, op

for _name, _function in {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "And": torch.logical_and, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "Xor": torch.logical_xor, "Mish": F.mish,
    "HardSwish": F.hardswish, "Where": torch.where, "Det": torch.det,
}.items():  # fmt: skip

    def _plain(*inputs: Tensor, _function: Any = _function) -> Tensor:
        return _function(*inputs)  # type: ignore[no-any-return]

    op(_name)(_plain)


for _name, _function in {"Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round}.items():

    def _rounded(x: Tensor, *, _function: Any = _function) -> Tensor:
        return _function(x) if x.is_floating_point() else x

    op(_name)(_rounded)


# In old versions the second operand was laid over the axes from `axis` on.


def _old_broadcast(a: Tensor, b: Tensor, broadcast: int, axis: int | None) -> Tensor:
    if not broadcast or axis is None or b.dim() == 0:
        return b
    axis = axis + a.dim() if axis < 0 else axis
    return b.reshape(tuple(b.shape) + (1,) * (a.dim() - axis - b.dim()))


def _binary(name: str, function: Any) -> None:
    def modern(a: Tensor, b: Tensor) -> Any:
        return function(a, b)

    def old(a: Tensor, b: Tensor, broadcast: int = 0, axis: int | None = None) -> Any:
        return function(a, _old_broadcast(a, b, broadcast, axis))

    op(name)(old)
    op(name, since=7)(modern)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point() or a.is_complex():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


for _name, _function in {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "Pow": _power, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}.items():  # fmt: skip
    _binary(_name, _function)


@op("Mod")
def mod(a: Tensor, b: Tensor, fmod: int = 0) -> Tensor:
    """The remainder with the sign of the divisor, or with `fmod` of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@op("BitShift")
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    return torch.bitwise_left_shift(x, y) if direction == "LEFT" else torch.bitwise_right_shift(x, y)


for _name, _function in {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}.items():

    def _variadic(*inputs: Tensor, _function: Any = _function) -> Tensor:
        return functools.reduce(_function, inputs)

    op(_name)(_variadic)


@op("Mean")
def mean(*inputs: Tensor) -> Tensor:
    total: Tensor = functools.reduce(torch.add, inputs)
    return total / len(inputs)


@op("Clip")
def clip(
    x: Tensor, low: Tensor | None = None, high: Tensor | None = None, *, min: Any = None, max: Any = None
) -> Tensor:
    """Bounds as inputs, or as attributes in old versions."""
    low, high = (min if low is None else low), (max if high is None else high)
    for bound, function in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            bound = bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=x.dtype, device=x.device)
            x = function(x, bound.to(x.dtype).to(x.device))
    return x


@op("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Another element type. Into eight-bit floats, what is too large becomes the largest, unless `saturate` is 0.

    >>> cast(torch.tensor([1.7, -2.0]), to=7).tolist()
    [1, -2]
    """
    return convert(x, dtype_of(to), bool(saturate), round_mode)


def convert(x: Tensor, dtype: torch.dtype, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """As `cast`, by torch's dtype."""
    if x.dtype in NARROW:
        x = x.view(NARROW[x.dtype][0])
    if x.dtype in FLOAT8 or (POWERS is not None and x.dtype == POWERS):
        x = x.float()
    if dtype in NARROW:
        carrier, bits = NARROW[dtype]
        wide = x.to(torch.int32)
        low = wide & (2**bits - 1)
        if carrier == torch.int8:
            low = torch.where(low >= 2 ** (bits - 1), low - 2**bits, low)
        packed: Tensor = low.to(carrier).view(dtype)
        return packed
    if POWERS is not None and dtype == POWERS:
        return _to_power_of_two(x, saturate, round_mode)
    if dtype in FLOAT8:
        return _to_float8(x, dtype, saturate)
    if dtype == torch.bool:
        return x != 0
    return x.to(dtype)


def _to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    wide = x.float()
    largest = torch.finfo(dtype).max
    infinite = dtype == torch.float8_e5m2
    over = wide.abs() > largest
    clamped = wide.clamp(-largest, largest)
    if saturate:
        return clamped.to(dtype)
    # What rounds to the largest is no overflow: torch's own rounding tells.
    fits = torch.isfinite(wide) & ~(over & (wide.abs() >= _beyond(dtype)))
    out = torch.where(fits, clamped, torch.full_like(wide, torch.nan))
    if infinite:
        out = torch.where(~fits & ~wide.isnan(), torch.copysign(torch.full_like(wide, torch.inf), wide), out)
    return out.to(dtype)


def _to_power_of_two(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """An exponent alone: the power of two above, below or nearest; signs are lost."""
    bits = x.float().view(torch.int32)
    exponent, rest = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if round_mode == "up":
        more = rest > 0
    elif round_mode == "down":
        more = torch.zeros_like(rest, dtype=torch.bool)
    else:
        more = rest >= 0x400000
    most = 254 if saturate else 255
    found = torch.where(exponent == 255, exponent, torch.clamp(exponent + more.to(torch.int32), max=most))
    assert POWERS is not None
    return found.to(torch.uint8).view(POWERS)


def _beyond(dtype: torch.dtype) -> float:
    """Half a step above the largest number of a dtype: what rounds beyond it."""
    largest = torch.tensor(torch.finfo(dtype).max).to(dtype)
    below = (largest.view(torch.uint8) - 1).view(dtype)
    return float(largest.float() + (largest.float() - below.float()) / 2)


@op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return convert(x, like.dtype, bool(saturate), round_mode)


@op("BitCast")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    return x.contiguous().view(dtype_of(to))


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    none = torch.zeros_like(x, dtype=torch.bool)
    return (torch.isposinf(x) if detect_positive else none) | (torch.isneginf(x) if detect_negative else none)


# Activations


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@op("Selu")
def selu(x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Tensor:
    return torch.where(x > 0, gamma * x, gamma * (alpha * torch.exp(torch.clamp(x, max=0)) - alpha))


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@op("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@op("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@op("Softplus")
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@op("SwiGLU")
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    return swish(a, alpha=alpha) * b


# Random numbers: from torch's generator, or from the seed that the file gives


def _generator(seed: float | None, device: torch.device) -> torch.Generator | None:
    if seed is None or device.type == "meta":
        return None
    return torch.Generator(device=device).manual_seed(int(seed) & (2**63 - 1))


@op("Bernoulli")
def bernoulli(p: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    drawn = torch.rand(p.shape, generator=_generator(seed, p.device), device=p.device) < p
    return drawn.to(p.dtype if dtype is None else dtype_of(dtype))


def _like(x: Tensor, dtype: int | None) -> torch.dtype:
    return dtype_of(dtype) if dtype is not None else x.dtype


@op("RandomUniformLike")
def random_uniform_like(
    x: Tensor, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    drawn = torch.rand(x.shape, generator=_generator(seed, x.device), device=x.device)
    return (drawn * (high - low) + low).to(_like(x, dtype))


@op("RandomNormalLike")
def random_normal_like(
    x: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    drawn = torch.randn(x.shape, generator=_generator(seed, x.device), device=x.device)
    return (drawn * scale + mean).to(_like(x, dtype))


@op("RandomUniform")
def random_uniform(
    *, shape: tuple[int, ...], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    drawn = torch.rand(shape, generator=_generator(seed, torch.device("cpu")), device="cpu")
    return (drawn * (high - low) + low).to(dtype_of(dtype))


@op("RandomNormal")
def random_normal(
    *, shape: tuple[int, ...], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    drawn = torch.randn(shape, generator=_generator(seed, torch.device("cpu")), device="cpu")
    return (drawn * scale + mean).to(dtype_of(dtype))


@op("Dropout")
def dropout(
    x: Tensor,
    ratio: Tensor | float | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
    is_test: int = 0,
    outputs: int = 1,
) -> Any:
    """Output and mask. Numbers are dropped only where the graph itself asks for training."""
    rate = 0.5 if ratio is None else number(ratio)
    if training_mode is None or not number(training_mode) or rate == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = torch.rand(x.shape, generator=_generator(seed, x.device), device=x.device) >= rate
    return torch.where(kept, x, torch.zeros_like(x)) / (1 - rate), kept
