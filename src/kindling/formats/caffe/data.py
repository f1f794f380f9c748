"""Data layers as inputs: the shape of a row, mean files, and the preparation that `transform_param` asks for.

Caffe's own pictures are blue first, 0..255, without a resize: data layers cut a square out of what stands in their
database. A mean picture is taken off inside the net (`CaffeMeanImage`), a mean colour and a factor in the preparation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kindling.errors import ConfigError, FormatError
from kindling.formats.caffe.schema import Message, where
from kindling.formats.caffe.wire import Blob, decode, open_view
from kindling.prepare import ArrayStep, Augmentation, ImageStep, RandomCrop, RandomFlip, Step
from kindling.prepare.augment import LessPicture
from kindling.prepare.image import middle

PARAMETERS: Mapping[str, str] = {
    "Data": "data_param",
    "ImageData": "image_data_param",
    "WindowData": "window_data_param",
    "MemoryData": "memory_data_param",
    "HDF5Data": "hdf5_data_param",
    "DummyData": "dummy_data_param",
    "Input": "input_param",
}
"""Type of a data layer -> the message with its settings."""
_PICTURES = ("Data", "ImageData", "WindowData")
MAX_MEAN = 2**28
"""Numbers in a mean file: beyond it, none is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A blob that comes from outside, and what is known of it."""

    name: str
    layer: Message | None
    """The data layer; None for an `input` of the net itself."""
    shape: tuple[int, ...] | None
    """With the batch; None where the file does not say."""
    is_label: bool = False
    """Whether it is a later blob of a data layer: labels."""

    @property
    def type(self) -> str:
        """The layer's type."""
        return self.layer.get("type") if self.layer is not None else "Input"

    @property
    def is_picture(self) -> bool:
        """Whether a data layer of pictures gives it."""
        return self.type in _PICTURES and not self.is_label

    @property
    def transform(self) -> Message:
        """Its `transform_param`, empty for inputs."""
        return self.layer.get("transform_param") if self.layer is not None else Message("TransformationParameter")


def sources_of(layer: Message) -> list[Source]:
    """What a data layer gives, as far as its own message tells.

    >>> from kindling.formats.caffe.prototxt import parse
    >>> text = 'type: "MemoryData" top: "x" top: "y" memory_data_param { batch_size: 2 channels: 1 height: 4 width: 5 }'
    >>> [(source.name, source.shape) for source in sources_of(parse(text, "LayerParameter"))]
    [('x', (2, 1, 4, 5)), ('y', (2,))]
    """
    kind, tops = layer.get("type"), layer.all("top")
    parameters = layer.get(PARAMETERS[kind])
    shapes: list[tuple[int, ...] | None] = [None] * len(tops)
    if kind in ("Input", "DummyData"):
        given = [tuple(shape.all("dim")) for shape in parameters.all("shape")]
        if kind == "DummyData" and not given and parameters.has("num"):
            axes = [parameters.all(axis) for axis in ("num", "channels", "height", "width")]
            given = list(zip(*axes, strict=False))
        given = given * len(tops) if len(given) == 1 else given
        if given and len(given) != len(tops):
            raise FormatError(
                f"layer {layer.get('name')!r}{where(layer.line)} has {len(tops)} tops and {len(given)} shapes."
            )
        return [Source(name=top, layer=layer, shape=shape) for top, shape in zip(tops, given or shapes, strict=True)]
    batch = max(parameters.get("batch_size") or 1, 1)
    if kind == "MemoryData":
        shapes[:1] = [(batch, parameters.get("channels"), parameters.get("height"), parameters.get("width"))]
    if kind != "HDF5Data":
        shapes[1:] = [(batch,)] * (len(tops) - 1)
    return [
        Source(name=top, layer=layer, shape=shape, is_label=place > 0)
        for place, (top, shape) in enumerate(zip(tops, shapes, strict=True))
    ]


# Mean files


def read_mean(path: str | Path) -> np.ndarray:
    """A mean file: `.npy`, or `.binaryproto` as Caffe's `compute_image_mean` writes it.

    Returns: float32, shape (C, H, W), or (C,) for one number a channel.
    Raises: FormatError, when it is damaged or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise FormatError(f"there is no mean file {file}.")
    with file.open("rb") as stream:
        magic = stream.read(6)
    if magic == b"\x93NUMPY":
        mean = _read_npy(file)
    else:
        blob = decode_blob(open_view(file), str(file))
        if blob.count > MAX_MEAN:
            raise FormatError(f"{file} holds {blob.count:,} numbers, too many for a mean picture.")
        mean = blob.array()
    while mean.ndim > 3 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim not in (1, 3) or not np.isfinite(mean).all() or mean.size == 0:
        raise FormatError(f"{file} holds no mean picture but numbers of shape {mean.shape}. Is it the right file?")
    return mean


def _read_npy(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.size > MAX_MEAN or array.dtype.kind not in "fiu":
            raise FormatError(f"{file} holds {array.dtype} numbers of shape {array.shape}, no mean picture.")
        return np.array(array, np.float32)
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, MemoryError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} cannot be read as .npy: {error}. Is it whole?") from error


def decode_blob(view: memoryview | bytes, what: str) -> Blob:
    """The one blob of a `.binaryproto` file.

    Raises: FormatError, when there are no numbers in it.
    """
    # A repeated field of one BlobProto has the bytes of the blob itself behind a tag and a length.
    data = memoryview(view)
    length, size = len(data), bytearray()
    while True:
        size.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            break
    found = decode(b"\x0a" + bytes(size) + bytes(data), "BlobProtoVector", what)
    blob = found.get("blobs")
    if not isinstance(blob, Blob) or not blob.count:
        raise FormatError(f"{what} holds no numbers. Is it a .binaryproto of Caffe?")
    return blob


# Preparation


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """How one input is prepared."""

    step: Step
    row: tuple[int, ...]
    mean: np.ndarray | None = None
    """A picture to take off inside the net, already cut to the row's shape."""
    scale: float = 1.0
    """The factor after that picture."""
    augment: tuple[Augmentation, ...] = ()
    """What the data layer does at random in training."""
    note: str = ""


def prepare(
    source: Source,
    row: tuple[int, ...],
    mean: np.ndarray | Sequence[float] | float | None,
    missing: str | None,
    image: Mapping[str, Any] | None,
    scale: float | None = None,
) -> Prepared:
    """The step that makes an input's rows.

    Args:
        source: the input.
        row: shape of one row.
        mean: what to take off: a picture, a number a channel, or one number.
        missing: the mean file that the net names and that is not at hand.
        image: fields of the ImageStep that the caller gives; asks for one where the file does not.
        scale: the factor that the caller gives.
    Raises: ConfigError, for fields that cannot work; FormatError, for a mean that does not fit.
    """
    transform = source.transform
    factor = float(transform.get("scale")) if scale is None else float(scale)
    picture = len(row) == 3 and row[0] in (1, 3)
    stated = source.is_picture or (source.type == "MemoryData" and transform.values and not source.is_label)
    crop = transform.get("crop_size")
    if not picture or missing is not None or not (stated or image is not None or mean is not None):
        note = "the file states no preparation: rows are the net's own numbers"
        if missing is not None:
            note = f"rows are the net's own numbers: the mean file {missing!r} is not at hand; give it as mean="
        elif stated and not picture:
            note = f"rows are the net's own numbers: {row[0] if row else 0} channels are no picture"
        if stated and (crop or transform.get("mirror")):
            note += "; they are neither cut nor mirrored at random"
        return Prepared(step=ArrayStep(source.name, source.name, row), row=row, note=note)
    if not (math.isfinite(factor) and factor > 0):
        raise FormatError(f"input {source.name!r} is scaled by {factor}, which leaves nothing to learn from.")
    fields: dict[str, Any] = {"size": row[1:], "channels": "BGR" if row[0] == 3 else "L"}
    numbers = None if mean is None else np.asarray(mean)
    inside = None
    notes = []
    if crop:
        said = numbers is not None and numbers.ndim == 3
        full = min(numbers.shape[1:]) if numbers is not None and said else usual_size(crop)
        if full > max(row[1:]):
            fields |= {"resize": "shorter", "resize_to": full}
        if not said and "resize_to" not in (image or {}):
            notes.append(f"the shorter side is scaled to {full} pixels, which the file does not say")
    elif source.is_picture:
        fields |= {"resize": "squash"}
    if row[0] == 1:
        side = {**fields, **(image or {})}.get("resize_to")
        fields["raw_shape"] = (side, side) if crop and side else row[1:]
    if numbers is not None and numbers.ndim == 3:
        inside = fit_mean(numbers, row)
    else:
        if numbers is not None:
            if numbers.size not in (1, row[0]):
                raise FormatError(f"{numbers.size} mean values do not fit the {row[0]} channels of {source.name!r}.")
            fields["mean"] = tuple(float(value) for value in numbers.reshape(-1))
        if factor != 1:
            fields["std"] = (1 / factor,)
    try:
        step = ImageStep(source.name, **{**fields, **(image or {})})
    except ConfigError as error:
        if image:
            raise
        raise FormatError(f"input {source.name!r} cannot be prepared as the file says: {error}") from error
    except TypeError as error:
        raise ConfigError("image", image, f"names no field of an ImageStep ({error})", "See ImageStep") from error
    return Prepared(
        step=step,
        row=row,
        mean=inside,
        scale=factor if inside is not None else 1.0,
        augment=_changes(step, crop if stated else 0, bool(transform.get("mirror")), numbers),
        note="; ".join(notes),
    )


def _changes(step: ImageStep, crop: int, mirror: bool, mean: np.ndarray | None) -> tuple[Augmentation, ...]:
    """What Caffe's data transformer does at random in training: cut a place out, mirror every second picture.

    A mean picture is taken off before: it is cut and mirrored with the pixels. The net takes off its middle, as Caffe
    does when it tests; here, that middle is added before.
    """
    spare = step.resize_to - max(step.size) if crop and step.resize_to is not None else 0
    changes: list[Augmentation] = [RandomCrop(padding=0, spare=spare)] if spare else []
    changes += [RandomFlip()] if mirror else []
    if not changes or mean is None or mean.ndim != 3:
        return tuple(changes)
    tall, wide = step.size
    whole = fit_mean(mean, (mean.shape[0], tall + spare, wide + spare)).transpose(1, 2, 0)
    inside = fit_mean(mean, (mean.shape[0], tall, wide)).transpose(1, 2, 0)
    return LessPicture.of(whole), *changes, LessPicture.of(-inside)


def usual_size(crop: int) -> int:
    """How large pictures usually are of which a square is cut: ImageNet's of 256 pixels, CIFAR's of 32.

    >>> [usual_size(crop) for crop in (224, 227, 299, 28)]
    [256, 256, 299, 32]
    """
    return max(256, crop) if crop >= 192 else round(crop * 8 / 7)


def fit_mean(mean: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """The centre of a mean picture, as large as a row.

    Raises: FormatError, when it is smaller or has other channels.

    >>> fit_mean(np.arange(9.0).reshape(1, 3, 3), (1, 1, 1)).item()
    4.0
    """
    if mean.shape[0] != row[0] or mean.shape[1] < row[1] or mean.shape[2] < row[2]:
        raise FormatError(f"a mean picture of shape {mean.shape} does not cover pictures of shape {row}.")
    top, left = middle(mean.shape[1:], row[1:])
    return np.ascontiguousarray(mean[:, top : top + row[1], left : left + row[2]])
