"""Augmentation: small changes to images, drawn anew for every row in every epoch, in training and nowhere else.

No preparation holds one, so none can reach prediction. What is drawn comes from the row's hash, the epoch and the seed:
the same whichever worker has the row, and whichever rows are beside it. It works on packed pixels, just before
`ImageStep.batch`. State is JSON; the registry is closed. Knows numpy and torch; no Spark.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np

from kindling.errors import ConfigError, FormatError, did_you_mean

_GREY = {"RGB": (0.299, 0.587, 0.114), "BGR": (0.114, 0.587, 0.299), "L": (1.0,)}
"""Of each channel in brightness (ITU-R BT.601), as Pillow has it."""


class RowDraws:
    """Random numbers of some rows, told apart by a name: the same for a key, whichever keys are beside it.

    >>> both = RowDraws(np.array([3, 4], np.uint64), mix=lambda keys, *salts: keys * np.uint64(2**60))
    >>> both.uniform(0).tolist()
    [0.1875, 0.25]
    """

    def __init__(self, keys: np.ndarray, mix: Callable[..., np.ndarray], place: int = 0) -> None:
        """Args: keys: uint64, shape (N,); mix: scrambles keys with whole numbers (`order.mix`)."""
        self._keys, self._mix, self._place = keys, mix, place

    def uniform(self, number: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """One number for each row in [low, high): shape (N,), float64."""
        bits = self._mix(self._keys, self._place, number) >> np.uint64(11)
        return low + (high - low) * (bits.astype(np.float64) * 2.0**-53)

    def at(self, place: int) -> RowDraws:
        """Other numbers for the same rows."""
        return RowDraws(self._keys, self._mix, place)


class Augmentation(ABC):
    """One kind of change. Subclasses are frozen dataclasses of JSON values, registered by `@augmentation_type`."""

    kind: ClassVar[str]

    @abstractmethod
    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        """Change images.

        Args:
            images: uint8, shape (N, H, W, C); not to be written to.
            channels: `"RGB"`, `"BGR"` or `"L"`.
        Returns: the same dtype; the same shape, less `spent` pixels of height and of width.
        """

    @property
    def spent(self) -> int:
        """Pixels that the images lose in height and in width: so much larger they are packed."""
        return 0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def told(self) -> dict[str, Any]:
        """JSON for a run's record."""
        return self.to_json()


_REGISTRY: dict[str, type[Augmentation]] = {}
A = TypeVar("A", bound=type[Augmentation])


def augmentation_type(kind: str) -> Callable[[A], A]:
    """Class decorator: register an augmentation under the name it has in JSON."""

    def register(cls: A) -> A:
        cls.kind = kind
        _REGISTRY[kind] = cls
        return cls

    return register


def augmentation_from_json(data: Mapping[str, Any]) -> Augmentation:
    """The inverse of `Augmentation.to_json`.

    Raises: FormatError, for a kind or a field that is unknown.
    """
    kind = str(data.get("kind"))
    cls = _REGISTRY.get(kind)
    if cls is None:
        raise FormatError(f"augmentation {kind!r} is unknown.{did_you_mean(kind, _REGISTRY)}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    try:
        return cls(**fields)
    except (TypeError, ConfigError) as error:
        raise FormatError(f"augmentation {data['kind']!r} cannot be read: {error}") from error


def augmented(steps: Sequence[Augmentation], images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
    """Images after all of them, in order."""
    for place, step in enumerate(steps):
        images = step.apply(images, draws.at(place), channels)
    return images


@augmentation_type("flip")
@dataclass(frozen=True)
class RandomFlip(Augmentation):
    """Mirror a share of the images, left to right or upside down.

    >>> RandomFlip(share=2.0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: share=2.0 is no share of the images. Use a number from 0 to 1.
    """

    share: float = 0.5
    vertical: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError("share", self.share, "is no share of the images", "Use a number from 0 to 1")

    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        chosen = draws.uniform(0) < self.share
        out = images.copy()
        out[chosen] = images[chosen, ::-1] if self.vertical else images[chosen, :, ::-1]
        return out


@augmentation_type("crop")
@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """Cut the image out at random: of itself with `padding` pixels on each side, and of `spare` more of the picture.

    With `spare`, pictures are packed so much larger than the model takes them, where its `ImageStep` scales them to
    more than it cuts out: `RandomCrop(padding=0, spare=32)` for pictures of 256 pixels and a net of 224.

    >>> RandomCrop(padding=0)
    Traceback (most recent call last):
    kindling.errors.ConfigError: padding=0 leaves one place to cut at. Use 1 or more, or spare=.
    """

    padding: int = 4
    fill: str = "edge"
    """`"edge"` repeats the border, `"reflect"` mirrors it, `"black"` is 0."""
    spare: int = 0
    """Pixels of the picture beyond the size that is cut out, in height and in width."""

    def __post_init__(self) -> None:
        for name, value in (("padding", self.padding), ("spare", self.spare)):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(name, value, "is no number of pixels to move by", "Use 0 or more")
        if not self.padding and not self.spare:
            raise ConfigError("padding", 0, "leaves one place to cut at", "Use 1 or more, or spare=")
        if self.fill not in ("edge", "reflect", "black"):
            raise ConfigError("fill", self.fill, "is unknown", "Use 'edge', 'reflect' or 'black'")

    @property
    def spent(self) -> int:
        return self.spare

    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        rows, height, width, _ = images.shape
        by = self.padding
        if by:
            mode: Any = "constant" if self.fill == "black" else self.fill
            images = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)), mode=mode)
        top, left = (draws.uniform(number, 0, 2 * by + self.spare + 1).astype(np.int64) for number in (0, 1))
        down = (top[:, None] + np.arange(height - self.spare))[:, :, None]
        across = (left[:, None] + np.arange(width - self.spare))[:, None, :]
        moved: np.ndarray = images[np.arange(rows)[:, None, None], down, across]
        return moved


@augmentation_type("zoom")
@dataclass(frozen=True)
class RandomZoom(Augmentation):
    """Cut a part of the image out at random and scale it back to the full size, bilinearly.

    Source: Szegedy et al., 2014, arXiv:1409.4842, section 6; the part always fits into the image here.
    """

    area: tuple[float, float] = (0.35, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of the part's width to its height, relative to the image's own."""

    def __post_init__(self) -> None:
        for field, least, most in (("area", 0.0, 1.0), ("ratio", 0.0, float("inf"))):
            low, high = getattr(self, field)
            if not least < low <= high <= most:
                raise ConfigError(field, (low, high), "is no range to draw from", "Give the smaller number first")

    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        import torch
        from torch.nn import functional

        area = draws.uniform(0, *self.area)
        ratio = np.exp(draws.uniform(1, *np.log(self.ratio)))
        wide, high = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        across, down = draws.uniform(2, -1, 1) * (1 - wide), draws.uniform(3, -1, 1) * (1 - high)
        theta = np.zeros((len(images), 2, 3), np.float32)
        theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = wide, across, high, down
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(torch.from_numpy(theta), list(pixels.shape), align_corners=False)
        zoomed = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        return np.ascontiguousarray(zoomed.round_().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy())


@augmentation_type("color")
@dataclass(frozen=True)
class RandomColor(Augmentation):
    """Change brightness, contrast and saturation, each by a factor drawn from [1 - x, 1 + x].

    Brightness multiplies; contrast moves away from the image's mean grey, saturation from each pixel's own grey.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        for field in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(field, getattr(self, field), "is no strength", "Use a number from 0 to 1")

    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        weights = np.array(_GREY[channels], np.float32)
        out = images.astype(np.float32)
        for number, strength in enumerate((self.brightness, self.contrast, self.saturation)):
            if not strength or (number == 2 and channels == "L"):
                continue
            factor = draws.uniform(number, 1 - strength, 1 + strength).astype(np.float32)[:, None, None, None]
            if number == 0:
                out = out * factor
            else:
                grey = (out * weights).sum(axis=3, keepdims=True)
                base = grey.mean(axis=(1, 2), keepdims=True) if number == 1 else grey
                out = base + (out - base) * factor
            out = np.clip(out, 0, 255)
        return np.rint(out).astype(np.uint8)


@augmentation_type("less_picture")
@dataclass(frozen=True)
class LessPicture(Augmentation):
    """Take a picture of numbers off every image, which is float32 from then on; only cuts and flips may follow.

    A mean picture that the net takes off itself stays where it is when an image is cut or mirrored. With its whole in
    front of such steps, and what the net takes off given back behind them, it goes along.

    >>> step = LessPicture.of(np.full((1, 2, 1), 0.5))
    >>> step.apply(np.array([[[[3], [4]]]], np.uint8), RowDraws(np.zeros(1, np.uint64), lambda *_: np.zeros(1)), "L")
    array([[[[2.5],
             [3.5]]]], dtype=float32)
    """

    shape: tuple[int, int, int]
    """Height, width, channels."""
    numbers: str = dataclasses.field(repr=False)
    """Little-endian float32 in base64."""

    @classmethod
    def of(cls, picture: np.ndarray) -> LessPicture:
        """Args: picture: shape (H, W, C)."""
        height, width, channels = picture.shape
        return cls((height, width, channels), base64.b64encode(picture.astype("<f4").tobytes()).decode())

    def __post_init__(self) -> None:
        try:
            fits = self.picture.shape == tuple(self.shape)
        except (ValueError, TypeError, binascii.Error):
            fits = False
        if not fits or len(self.shape) != 3:
            raise ConfigError("shape", self.shape, "is not that of the numbers", "Use LessPicture.of")

    @cached_property
    def picture(self) -> np.ndarray:
        """float32, shape (H, W, C)."""
        return np.frombuffer(base64.b64decode(self.numbers, validate=True), "<f4").reshape(self.shape)

    def apply(self, images: np.ndarray, draws: RowDraws, channels: str) -> np.ndarray:
        less: np.ndarray = np.subtract(images, self.picture, dtype=np.float32)
        return less

    def told(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": self.shape, "sha256": hashlib.sha256(self.numbers.encode()).hexdigest()}
