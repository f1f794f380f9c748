"""Resize in every mode that ONNX has, one axis after the other; the common ones by torch's own kernels. GridSample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kindling.nets.onnx_ops.registry import NeedsValues, axis_of, checked, ints, op

_MAX_SIDE = 2**24


def _floats(value: Tensor | Sequence[float] | None) -> list[float]:
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise NeedsValues("a factor is computed from numbers that are not there")
        return [float(number) for number in value.reshape(-1).tolist()]
    return [float(number) for number in value or ()]


def _origin(at: Tensor, mode: str, scale: float, length: int, new: float, roi: tuple[float, float]) -> Tensor:
    """Where each new place lies in the old axis."""
    if mode == "half_pixel":
        return (at + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        adjusted = int(new) / new if new else 1.0
        centre = length / 2
        return centre * (1 - adjusted) + (at + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (at + 0.5) / scale - 0.5 if int(new) > 1 else torch.full_like(at, -0.5)
    if mode == "align_corners":
        return torch.zeros_like(at) if new == 1 else at * (length - 1) / (new - 1)
    if mode == "asymmetric":
        return at / scale
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if int(new) > 1:
            return start * (length - 1) + at * (end - start) * (length - 1) / (int(new) - 1)
        return torch.full_like(at, 0.5 * (start + end) * (length - 1))
    raise ValueError(f"a resize by coordinates {mode!r}")


def _nearest(x: Tensor, axis: int, places: Tensor, rounding: str) -> Tensor:
    if rounding == "round_prefer_floor":
        at = torch.ceil(places - 0.5)
    elif rounding == "round_prefer_ceil":
        at = torch.floor(places + 0.5)
    else:
        at = torch.floor(places) if rounding == "floor" else torch.ceil(places)
    return x.index_select(axis, at.long().clamp(0, x.shape[axis] - 1).to(x.device))


def _kernel(mode: str, distance: Tensor, coefficient: float) -> Tensor:
    d = distance.abs()
    if mode == "linear":
        return (1 - d).clamp(min=0)
    near = (coefficient + 2) * d**3 - (coefficient + 3) * d**2 + 1
    far = coefficient * d**3 - 5 * coefficient * d**2 + 8 * coefficient * d - 4 * coefficient
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _matrix(
    places: Tensor, length: int, scale: float, mode: str, coefficient: float, antialias: bool, exclude: bool
) -> Tensor:
    """Weights of the old numbers (columns) in the new ones (rows); edges count again for what lies outside."""
    squeeze = min(scale, 1.0) if antialias else 1.0
    reach = (1 if mode == "linear" else 2) / squeeze
    taps = int(2 * math.ceil(reach))
    first = torch.floor(places - reach) + 1
    at = first.unsqueeze(1) + torch.arange(taps + 1)
    weights = _kernel(mode, (at - places.unsqueeze(1)) * squeeze, coefficient)
    inside = (at >= 0) & (at < length)
    if exclude:
        weights = torch.where(inside, weights, torch.zeros_like(weights))
    if exclude or antialias:
        weights = weights / weights.sum(1, keepdim=True)
    whole = torch.zeros(len(places), length, dtype=torch.float64)
    return whole.scatter_add(1, at.long().clamp(0, length - 1), weights)


@op("Resize", since=11)
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | Sequence[float] | None = None,
    sizes: Tensor | Sequence[int] | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Nearest, linear or cubic, with or without a filter against aliasing; `tf_crop_and_resize` cuts by `roi`."""
    where = [axis_of(axis, x.dim()) for axis in (axes if axes is not None else range(x.dim()))]
    lengths = [x.shape[axis] for axis in where]
    wanted, factors = ints(sizes), _floats(scales)
    if wanted:
        if keep_aspect_ratio_policy != "stretch":
            pick = min if keep_aspect_ratio_policy == "not_larger" else max
            factor = pick(new / old for new, old in zip(wanted, lengths, strict=True))
            wanted = [math.floor(factor * old + 0.5) for old in lengths]
            factors = [factor] * len(where)
            new_lengths = [factor * old for old in lengths]
        else:
            factors = [new / old if old else 1.0 for new, old in zip(wanted, lengths, strict=True)]
            new_lengths = [float(new) for new in wanted]
    else:
        wanted = [math.floor(old * factor) for old, factor in zip(lengths, factors, strict=True)]
        new_lengths = [old * factor for old, factor in zip(lengths, factors, strict=True)]
    if any(not 0 <= size <= _MAX_SIDE for size in wanted):
        raise ValueError(f"a resize to {wanted[:8]}")
    checked([*wanted, *(x.shape[axis] for axis in range(x.dim()) if axis not in where)])
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    window = _floats(roi)
    rois = [
        (window[k], window[k + len(where)]) if len(window) == 2 * len(where) else (0.0, 1.0) for k in range(len(where))
    ]
    quick = _by_torch(x, where, wanted, lengths, factors, mode, coordinate_transformation_mode, nearest_mode, antialias)
    if quick is not None and not exclude_outside and keep_aspect_ratio_policy == "stretch":
        return quick
    kind = x.dtype
    out = x if mode == "nearest" else x.to(torch.float32 if kind != torch.float64 else kind)
    outside = []
    for k, axis in enumerate(where):
        crop = coordinate_transformation_mode == "tf_crop_and_resize"
        if wanted[k] == lengths[k] and factors[k] == 1 and not (crop and rois[k] != (0.0, 1.0)):
            continue
        places = _origin(
            torch.arange(wanted[k], dtype=torch.float64, device="cpu"),
            coordinate_transformation_mode,
            factors[k],
            lengths[k],
            new_lengths[k],
            rois[k],
        )
        if crop:
            outside.append((axis, (places < 0) | (places > lengths[k] - 1)))
        if mode == "nearest":
            out = _nearest(out, axis, places, nearest_mode)
            continue
        weights = _matrix(places, lengths[k], factors[k], mode, cubic_coeff_a, bool(antialias), bool(exclude_outside))
        out = torch.tensordot(out, weights.to(out.dtype).to(out.device), ([axis], [1])).movedim(-1, axis)
    for axis, mask in outside:
        shape = [1] * x.dim()
        shape[axis] = -1
        out = torch.where(
            mask.reshape(shape).to(out.device), torch.full_like(out[:1].flatten()[:1], extrapolation_value), out
        )
    if kind.is_floating_point:
        return out.to(kind)
    return out if mode == "nearest" else out.round().clamp(torch.iinfo(kind).min, torch.iinfo(kind).max).to(kind)


def _by_torch(
    x: Tensor,
    axes: Sequence[int],
    sizes: Sequence[int],
    lengths: Sequence[int],
    factors: Sequence[float],
    mode: str,
    coordinates: str,
    rounding: str,
    antialias: int,
) -> Tensor | None:
    """torch's kernel where it computes the very same: planes of rows and channels, factors that the sizes give."""
    changed = {axis for axis, new, old in zip(axes, sizes, lengths, strict=True) if new != old}
    if x.dim() != 4 or not x.is_floating_point() or antialias or not changed or not changed <= {2, 3} or 0 in sizes:
        return None
    if any(abs(old * factor - new) > 1e-6 for old, factor, new in zip(lengths, factors, sizes, strict=True)):
        return None
    spatial = [dict(zip(axes, sizes, strict=True)).get(axis, x.shape[axis]) for axis in (2, 3)]
    if mode == "linear" and coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners") and min(spatial) > 1:
        return F.interpolate(x, spatial, mode="bilinear", align_corners=coordinates == "align_corners")
    whole = all(new % old == 0 for new, old in zip(sizes, lengths, strict=True))
    if (
        mode == "nearest"
        and whole
        and (coordinates, rounding)
        in (
            ("asymmetric", "floor"),
            ("half_pixel", "round_prefer_floor"),
            ("half_pixel", "round_prefer_ceil"),
        )
    ):
        return F.interpolate(x, spatial, mode="nearest")
    return None


@op("Upsample")
def upsample(
    x: Tensor, scales_input: Tensor | None = None, *, scales: Sequence[float] | None = None, mode: str = "nearest"
) -> Tensor:
    """Resize as it was before version 10: asymmetric coordinates, rounded down."""
    factors = scales_input if scales_input is not None else scales
    return resize(x, None, factors, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@op("Resize")
def resize_10(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Version 10."""
    return upsample(x, scales, mode=mode)


_PADDINGS = ("zeros", "border", "reflection")


@op("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    if padding_mode not in _PADDINGS:
        raise ValueError(f"a grid sample with padding {padding_mode!r}")
    return F.grid_sample(x, grid, mode=kind, padding_mode=padding_mode, align_corners=bool(align_corners))


@op("AffineGrid")
def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    sizes = ints(size) or []
    return F.affine_grid(theta, sizes, align_corners=bool(align_corners))
