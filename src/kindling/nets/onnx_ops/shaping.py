"""Operators that change shapes: reshapes, joins, slices, padding, and the numbers that shapes are computed from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import DTYPES, NeedsValues, axis_of, checked, dtype_of, ints, number, op, whole


@op("Identity")
def identity(x: Any) -> Any:
    return x


@op("Constant")
def constant(*, dtype: str, shape: tuple[int, ...], values: tuple[Any, ...]) -> Tensor:
    """A small tensor that stands in the graph itself; real on every device, so that shapes can be told from it."""
    return torch.tensor(values, dtype=getattr(torch, dtype), device="cpu").reshape(shape)


@op("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes from axis `start` to before `end`, int64, always real numbers."""
    rank = x.dim()
    first, last = (min(max(at + rank if at < 0 else at, 0), rank) for at in (start, rank if end is None else end))
    return torch.tensor(list(x.shape)[first:last], dtype=torch.int64, device="cpu")


@op("Size")
def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device="cpu")


@op("Reshape")
def reshape(x: Tensor, shape: Tensor | tuple[int, ...], *, allowzero: int = 0) -> Tensor:
    """0 keeps an axis, unless `allowzero` says that it means none; -1 takes what is left.

    >>> reshape(torch.zeros(2, 6), (0, 3, -1)).shape
    torch.Size([2, 3, 2])
    """
    sizes = ints(shape)
    assert sizes is not None
    if not allowzero:
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if not 0 <= axis <= x.dim():
        raise ValueError(f"flattened at axis {axis} of {x.dim()}")
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Squeeze")
def squeeze(x: Tensor, axes: Tensor | tuple[int, ...] | None = None) -> Tensor:
    found = ints(axes)
    if found is None:
        return x.squeeze()
    gone = {axis_of(axis, x.dim()) for axis in found}
    if any(x.shape[axis] != 1 for axis in gone):
        raise ValueError(f"axes {sorted(gone)} of shape {tuple(x.shape)} are not all of size 1")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


@op("Unsqueeze")
def unsqueeze(x: Tensor, axes: Tensor | tuple[int, ...]) -> Tensor:
    found = ints(axes) or []
    rank = x.dim() + len(found)
    new = {axis_of(axis, rank) for axis in found}
    if len(new) != len(found):
        raise ValueError(f"axes {found} are named twice")
    old = iter(x.shape)
    return x.reshape([1 if axis in new else next(old) for axis in range(rank)])


@op("Transpose")
def transpose(x: Tensor, *, perm: tuple[int, ...] | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))) if perm is None else perm)


@op("Concat")
def concat(*inputs: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(inputs, axis)


@op("Split")
def split(
    x: Tensor,
    split: Tensor | tuple[int, ...] | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Pieces of the sizes given, or equal ones; where that does not come out even the last is smaller."""
    sizes, length = ints(split), x.shape[axis]
    if sizes is None:
        count = outputs if num_outputs is None else num_outputs
        each = -(-length // max(count, 1))
        sizes = [min(each, max(length - place * each, 0)) for place in range(count)]
    return tuple(torch.split(x, sizes, axis))


@op("Slice")
def slice_(
    x: Tensor,
    starts: Tensor | tuple[int, ...],
    ends: Tensor | tuple[int, ...],
    axes: Tensor | tuple[int, ...] | None = None,
    steps: Tensor | tuple[int, ...] | None = None,
) -> Tensor:
    """Numpy's slices, one for each axis named.

    >>> slice_(torch.arange(5), (4,), (-10,), (0,), (-2,)).tolist()
    [4, 2, 0]
    """
    first, last = ints(starts) or [], ints(ends) or []
    where = ints(axes) or list(range(len(first)))
    by = ints(steps) or [1] * len(first)
    if not len(first) == len(last) == len(where) == len(by):
        raise ValueError("a slice has as many starts as ends, axes and steps")
    index: list[slice] = [slice(None)] * x.dim()
    turned = []
    for start, end, axis, step in zip(first, last, where, by, strict=True):
        axis = axis_of(axis, x.dim())
        if step == 0:
            raise ValueError("a slice in steps of 0")
        taken = range(x.shape[axis])[_clamped(start) : _clamped(end) : _clamped(step)]
        if step > 0:
            index[axis] = slice(taken.start, max(taken.stop, taken.start), taken.step)
        elif len(taken) == 0:
            index[axis] = slice(0, 0)
        else:
            index[axis] = slice(taken[-1], taken[0] + 1, -step)
            turned.append(axis)
    out = x[tuple(index)]
    return out.flip(turned) if turned else out


def _clamped(value: int) -> int:
    return max(-(2**31), min(2**31, value))


@op("Expand")
def expand(x: Tensor, shape: Tensor | tuple[int, ...]) -> Tensor:
    sizes = ints(shape) or []
    wide = torch.broadcast_shapes(tuple(x.shape), tuple(sizes))  # type: ignore[no-untyped-call]
    return x.expand(checked(wide))


@op("Tile")
def tile(x: Tensor, repeats: Tensor | tuple[int, ...]) -> Tensor:
    times = ints(repeats) or []
    checked([a * b for a, b in zip(x.shape, times, strict=True)])
    return x.repeat(times)


def pad(
    x: Tensor,
    pads: Tensor | tuple[int, ...],
    value: Tensor | float | None = None,
    axes: Tensor | tuple[int, ...] | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Numbers in front of and behind each axis; negative amounts cut off.

    >>> pad(torch.tensor([1, 2, 3]), (2, 1), mode="reflect").tolist()
    [3, 2, 1, 2, 3, 2]
    """
    amounts = ints(pads) or []
    where = [axis_of(axis, x.dim()) for axis in (ints(axes) or range(x.dim()))]
    if len(amounts) != 2 * len(where):
        raise ValueError(f"{len(amounts)} amounts of padding for {len(where)} axes")
    if mode == "constant":
        flat = [0] * (2 * x.dim())
        for place, axis in enumerate(where):
            flat[2 * (x.dim() - 1 - axis)] = amounts[place]
            flat[2 * (x.dim() - 1 - axis) + 1] = amounts[place + len(where)]
        checked(
            [size + flat[2 * (x.dim() - 1 - k)] + flat[2 * (x.dim() - 1 - k) + 1] for k, size in enumerate(x.shape)]
        )
        fill = 0.0 if value is None else number(value)
        if x.dtype == torch.bool:
            return torch.nn.functional.pad(x.to(torch.uint8), flat, value=fill) != 0
        return torch.nn.functional.pad(x, flat, value=fill if x.is_floating_point() else int(fill))
    for place, axis in enumerate(where):
        before, after, length = amounts[place], amounts[place + len(where)], x.shape[axis]
        if before == after == 0:
            continue
        checked([length + before + after])
        at = torch.arange(-before, length + after, device=x.device)
        if mode == "edge":
            at = at.clamp(0, length - 1)
        elif mode == "wrap":
            at = at.remainder(length)
        elif mode == "reflect":
            period = max(2 * (length - 1), 1)
            at = at.remainder(period)
            at = torch.minimum(at, period - at) if length > 1 else at * 0
        else:
            raise ValueError(f"padding of mode {mode!r}")
        x = x.index_select(axis, at)
    return x


@op("Pad")
def pad_old(
    x: Tensor,
    *,
    pads: tuple[int, ...] | None = None,
    paddings: tuple[int, ...] | None = None,
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    """Amounts and value as attributes, before version 11."""
    amounts = pads if pads is not None else paddings
    if amounts is None:
        raise ValueError("no amounts of padding")
    return pad(x, amounts, value, mode=mode)


op("Pad", since=11)(pad)


@op("CenterCropPad")
def center_crop_pad(x: Tensor, shape: Tensor | tuple[int, ...], *, axes: tuple[int, ...] | None = None) -> Tensor:
    sizes = ints(shape) or []
    where = [axis_of(axis, x.dim()) for axis in (axes if axes is not None else range(x.dim()))]
    for axis, wanted in zip(where, sizes, strict=True):
        length = x.shape[axis]
        if length > wanted:
            x = x.narrow(axis, (length - wanted) // 2, wanted)
        elif length < wanted:
            before = (wanted - length) // 2
            x = pad(x, (before, wanted - length - before), axes=(axis,))
    return x


@op("ConstantOfShape")
def constant_of_shape(shape: Tensor | tuple[int, ...], *, dtype: int = 1, value: Any = 0.0) -> Tensor:
    sizes = checked(ints(shape) or [])
    where = "meta" if math.prod(sizes) > 4096 and torch.get_default_device().type == "meta" else "cpu"
    return torch.full(sizes, value, dtype=DTYPES[dtype], device=where)


@op("Range")
def range_(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    if start.device.type == "meta" or limit.device.type == "meta" or delta.device.type == "meta":
        raise NeedsValues("the length of a range is computed from numbers that are not there")
    if float(delta) == 0:
        raise ValueError("a range in steps of 0")
    low, high, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((high - low) / step), 0)
    checked([count])
    steps = torch.arange(count, device=start.device)
    if start.is_floating_point():
        wide = torch.float32 if start.dtype in (torch.float16, torch.bfloat16) else start.dtype
        return (start.to(wide) + steps.to(wide) * delta.to(wide)).to(start.dtype)
    return (start + steps * delta).to(start.dtype)


@op("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = x.shape
    kind = x.dtype if dtype is None else dtype_of(dtype)
    at = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device).unsqueeze(1)
    return (at == k).to(kind)


@op("Trilu")
def trilu(x: Tensor, k: Tensor | int | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else whole(k)
    diagonal = max(-(2**31), min(2**31, diagonal))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    rows, channels, height, width = x.shape
    b = blocksize
    if mode == "DCR":
        parts = x.reshape(rows, b, b, channels // (b * b), height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(rows, channels // (b * b), b, b, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(rows, channels // (b * b), height * b, width * b)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    rows, channels, height, width = x.shape
    b = blocksize
    parts = x.reshape(rows, channels, height // b, b, width // b, b)
    parts = parts.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else parts.permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(rows, channels * b * b, height // b, width // b)


@op("Col2Im")
def col2im(
    x: Tensor,
    image_shape: Tensor | tuple[int, ...],
    block_shape: Tensor | tuple[int, ...],
    *,
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
) -> Tensor:
    """Columns laid back where they came from and added; any number of axes."""
    image, block = ints(image_shape) or [], ints(block_shape) or []
    axes = len(image)
    strides, dilations = strides or (1,) * axes, dilations or (1,) * axes
    pads = pads or (0,) * (2 * axes)
    full = [image[k] + pads[k] + pads[k + axes] for k in range(axes)]
    checked(full)
    steps = [(full[k] - dilations[k] * (block[k] - 1) - 1) // strides[k] + 1 for k in range(axes)]
    at = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    for k in range(axes):
        taps = torch.arange(block[k], device=x.device) * dilations[k]
        starts = torch.arange(steps[k], device=x.device) * strides[k]
        here = taps.unsqueeze(1) + starts
        at = (at.unsqueeze(1).unsqueeze(3) * full[k] + here.unsqueeze(0).unsqueeze(2)).flatten(0, 1).flatten(1, 2)
    channels = x.shape[1] // math.prod(block)
    values = x.reshape(x.shape[0], channels, -1)
    out = torch.zeros(x.shape[0], channels, math.prod(full), dtype=x.dtype, device=x.device)
    out = out.index_add(2, at.reshape(-1), values).reshape(x.shape[0], channels, *full)
    for k in range(axes):
        out = out.narrow(2 + k, pads[k], image[k])
    return out
