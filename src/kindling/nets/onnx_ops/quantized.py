"""Operators on numbers of few bits: to them, from them, and products of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.elementwise import convert
from kindling.nets.onnx_ops.registry import DTYPES, FLOAT8, NARROW, axis_of, op
from kindling.nets.onnx_ops.windows import conv


def _spread(values: Tensor | None, x: Tensor, axis: int, block_size: int) -> Tensor | None:
    """Scales or zero points in a shape that fits `x`: one, one for each entry of an axis, or one for each block."""
    if values is None or values.dim() == 0 or (values.numel() == 1 and values.dim() == 1):
        return values if values is None else values.reshape(())
    axis = axis_of(axis, x.dim())
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if values.dim() == 1:
        return values.reshape(*[1] * axis, -1, *[1] * (x.dim() - axis - 1))
    return values


@op("QuantizeLinear")
def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """`round(x / scale) + zero`, halves to the even number, kept within the range."""
    kind = zero.dtype if zero is not None else DTYPES[output_dtype or 2]
    if zero is not None and kind in NARROW:
        zero = zero.view(NARROW[kind][0])
    wide = torch.float32 if precision in (0, 1) else DTYPES[precision]
    step = _spread(scale, x, axis, block_size)
    assert step is not None
    divided = x.to(wide) / step.to(wide)
    if kind in FLOAT8:
        return convert(divided, kind, bool(saturate))
    rounded = torch.round(divided)
    offset = _spread(zero, x, axis, block_size)
    if offset is not None:
        rounded = rounded + offset.to(wide)
    low, high = _limits(kind)
    return convert(rounded.clamp(low, high).to(torch.int32), kind)


def _limits(kind: torch.dtype) -> tuple[int, int]:
    if kind in NARROW:
        carrier, bits = NARROW[kind]
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if carrier == torch.int8 else (0, 2**bits - 1)
    limits = torch.iinfo(kind)
    return limits.min, limits.max


@op("DequantizeLinear")
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """`(x - zero) * scale`."""
    if x.dtype in NARROW:
        x = x.view(NARROW[x.dtype][0])
    if zero is not None and zero.dtype in NARROW:
        zero = zero.view(NARROW[zero.dtype][0])
    step, offset = _spread(scale, x, axis, block_size), _spread(zero, x, axis, block_size)
    assert step is not None
    wide = x.to(torch.float32)
    if offset is not None:
        wide = wide - offset.to(torch.float32)
    out = wide * step.to(torch.float32)
    return out.to(DTYPES[output_dtype] if output_dtype else scale.dtype)


@op("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To uint8, over a range that the tensor itself gives and that holds zero."""
    low, high = torch.clamp(x.min(), max=0), torch.clamp(x.max(), min=0)
    scale = (high - low) / 255
    zero = torch.round(torch.clamp(0 - low / scale, 0, 255)).to(torch.uint8)
    return quantize(x, scale, zero), scale, zero


def _minus(x: Tensor, zero: Tensor | None, rows: bool) -> Tensor:
    wide = x.double()
    if zero is None:
        return wide
    offset = zero.double()
    if offset.dim() == 1 and offset.numel() > 1:
        offset = offset.reshape(-1, 1) if rows else offset.reshape(1, -1)
    elif offset.dim() == 1:
        offset = offset.reshape(())
    return wide - offset


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return torch.matmul(_minus(a, a_zero, True), _minus(b, b_zero, False)).to(torch.int32)


def _line(value: Tensor, rows: bool) -> Tensor:
    if value.dim() == 1 and value.numel() > 1:
        return value.reshape(-1, 1) if rows else value.reshape(1, -1)
    return value.reshape(()) if value.numel() == 1 else value


@op("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    product = torch.matmul(_minus(a, a_zero, True), _minus(b, b_zero, False))
    factor = _line(a_scale.float(), True) * _line(b_scale.float(), False) / _line(y_scale.float(), True)
    limits = torch.iinfo(y_zero.dtype)
    rounded = torch.round(product * factor) + _line(y_zero, True).double()
    return rounded.clamp(limits.min, limits.max).to(y_zero.dtype)


@op("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    b: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    by_channel = (-1, *[1] * (w.dim() - 1))
    wide = x.double() - x_zero.double()
    kernel = w.double() - (w_zero.double().reshape(by_channel) if w_zero.numel() > 1 else w_zero.double().reshape(()))
    out = conv(wide, kernel, None if b is None else b.double(), **settings)
    factor = x_scale.double().reshape(()) * w_scale.double() / y_scale.double().reshape(())
    factor = factor.reshape(1, -1, *[1] * (x.dim() - 2)) if factor.numel() > 1 else factor.reshape(())
    limits = torch.iinfo(y_zero.dtype)
    rounded = torch.round(out * factor) + y_zero.double().reshape(())
    return rounded.clamp(limits.min, limits.max).to(y_zero.dtype)
