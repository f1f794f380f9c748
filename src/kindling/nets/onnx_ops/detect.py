"""Operators of detectors: boxes that overlap suppressed, regions cut out and resized, pictures decoded."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import NeedsValues, number, op, whole

MAX_PIXELS = 100_000_000


def _corners(boxes: Tensor, centred: int) -> Tensor:
    """Boxes as smallest and largest coordinates, shape (boxes, 4)."""
    if centred:
        x, y, wide, tall = boxes.unbind(-1)
        return torch.stack((y - tall / 2, x - wide / 2, y + tall / 2, x + wide / 2), -1)
    one, two = boxes[:, :2], boxes[:, 2:]
    return torch.cat((torch.minimum(one, two), torch.maximum(one, two)), -1)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    low = torch.maximum(box[:2], others[:, :2])
    high = torch.minimum(box[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return torch.where(area > 0, shared / area, torch.zeros_like(area))


@op("NonMaxSuppression")
def nms(
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """The best box, then the best that overlaps no chosen one by more than the threshold, and so on.

    Returns: (chosen, 3): row, class, box; int64.
    """
    if boxes.device.type == "meta":
        raise NeedsValues("boxes are chosen by numbers that are not there")
    limit = 0 if most is None else whole(most)
    overlap = 0.0 if iou_threshold is None else number(iou_threshold)
    least = None if score_threshold is None else number(score_threshold)
    chosen = []
    for row in range(scores.shape[0]):
        corners = _corners(boxes[row], center_point_box)
        for kind in range(scores.shape[1]):
            points = scores[row, kind]
            order = points.argsort(descending=True, stable=True)
            order = order if least is None else order[points[order] > least]
            taken = 0
            while order.numel() and taken < limit:
                best = int(order[0])
                chosen.append((row, kind, best))
                taken += 1
                rest = order[1:]
                order = rest[_overlaps(corners[best], corners[rest]) <= overlap]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


@op("RoiAlign", since=16)
def roi_align(
    x: Tensor,
    rois: Tensor,
    rows: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Each region as a plane of one size, every number of it from several points between the pixels.

    Returns: (regions, channels, output_height, output_width).
    """
    if rois.device.type == "meta":
        raise NeedsValues("regions are cut by numbers that are not there")
    half = coordinate_transformation_mode == "half_pixel"
    made = []
    for roi, row in zip(rois, rows.tolist(), strict=True):
        left, top, right, bottom = (float(side) * spatial_scale - (0.5 if half else 0.0) for side in roi[:4])
        wide, tall = right - left, bottom - top
        if not half:
            wide, tall = max(wide, 1.0), max(tall, 1.0)
        ys, many_y = _points(top, tall, output_height, sampling_ratio, x)
        xs, many_x = _points(left, wide, output_width, sampling_ratio, x)
        made.append(_sampled(x[row], ys, xs, many_y, many_x, mode == "max"))
    shape = (0, x.shape[1], output_height, output_width)
    return torch.stack(made) if made else x.new_zeros(shape)


def _points(start: float, length: float, bins: int, ratio: int, like: Tensor) -> tuple[Tensor, int]:
    """Where an axis is looked at, (bins x points), and how many points a bin has."""
    size = length / bins
    many = ratio if ratio > 0 else max(math.ceil(size), 0)
    inside = (torch.arange(many, dtype=torch.float64) + 0.5) * (size / max(many, 1))
    places = start + torch.arange(bins, dtype=torch.float64).unsqueeze(1) * size + inside
    return places.reshape(-1).to(like.device), many


def _sides(places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels on both sides, the share of the second, and whether the place counts at all."""
    counts = (places >= -1.0) & (places <= length)
    inside = places.clamp(min=0)
    low = inside.floor().long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    share = torch.where(low == length - 1, torch.zeros_like(inside), inside - low)
    return low, high, share, counts


def _sampled(plane: Tensor, ys: Tensor, xs: Tensor, many_y: int, many_x: int, largest: bool) -> Tensor:
    """One region: the mean of its points, or the largest share of a pixel in any of them."""
    y0, y1, fy, good_y = _sides(ys, plane.shape[1])
    x0, x1, fx, good_x = _sides(xs, plane.shape[2])
    fy, fx = fy.unsqueeze(1), fx.unsqueeze(0)
    good = (good_y.unsqueeze(1) & good_x.unsqueeze(0)).to(plane.dtype)
    corners = [
        plane[:, a][:, :, b] * (wy * wx * good).to(plane.dtype)
        for a, wy in ((y0, 1 - fy), (y1, fy))
        for b, wx in ((x0, 1 - fx), (x1, fx))
    ]
    bins = (plane.shape[0], len(ys) // max(many_y, 1), max(many_y, 1), len(xs) // max(many_x, 1), max(many_x, 1))
    if largest:
        return torch.stack(corners).amax(0).reshape(bins).amax((2, 4))
    return torch.stack(corners).sum(0).reshape(bins).mean((2, 4))


@op("ImageDecoder")
def image_decoder(encoded: Tensor, *, pixel_format: str = "RGB") -> Tensor:
    """A picture's file as pixels, uint8, shape (height, width, channels)."""
    import io

    from PIL import Image

    if encoded.device.type == "meta":
        raise NeedsValues("a picture is decoded from bytes that are not there")
    with Image.open(io.BytesIO(encoded.numpy().tobytes())) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"a picture of {picture.width} x {picture.height} pixels")
        pixels = np.asarray(picture.convert("L" if pixel_format == "Grayscale" else "RGB"))
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1] if pixel_format == "BGR" else pixels))
