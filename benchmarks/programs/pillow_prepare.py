"""What a plain script does to a photo: Pillow, resize, cut out the centre, normalise. One float32 CHW array each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image


def prepare(data: bytes, step: Mapping[str, Any]) -> np.ndarray:
    """The photo as a net wants it, by an image step's settings (`size`, `resize`, `resize_to`, `channels`, ...)."""
    height, width = step["size"]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if step["resize"] == "squash":
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        # Sizes and offsets are rounded as torchvision's Resize and CenterCrop do.
        shorter, target = min(image.size), step["resize_to"] or max(height, width)
        image = image.resize(tuple(int(target * side / shorter) for side in image.size), Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32)
    if step["channels"] == "BGR":
        pixels = pixels[..., ::-1]
    pixels = (pixels * step["scale"] - np.float32(step["mean"])) / np.float32(step["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
