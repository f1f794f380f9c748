"""The image step: encoded files, raw pixels or Spark `image` rows in, one uint8 array out, then a normalised tensor.

JPEGs are decoded by libjpeg-turbo, everything else by Pillow. The resize is antialiased: the numbers are those of
Pillow's full decode and resize, which is torchvision's transforms on PIL images, to within 1 of 255. Photos of more
than four times the size needed are decoded at a half or less, and then differ by at most 2 of 255 on average over
photos, 5 on a single photo; the tests hold these limits. Nothing random happens here. Knows no Spark; listing and
reading files is `read/images.py`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from kindling.errors import ConfigError, DataError
from kindling.prepare.base import Packed, Step, step_type

if TYPE_CHECKING:
    from torch import Tensor

Pixels: TypeAlias = np.ndarray
"""uint8, shape (H, W, C), contiguous."""

_CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}
_RESIZES = ("shorter", "squash", "none")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_ORIENTATION = 0x0112
"""EXIF's tag."""
_FAST = ("bilinear", "bicubic")
"""Filters that torch computes on uint8 as Pillow does, to within 1 of 255, several times faster."""
_SPARE = 2
"""A JPEG is decoded at a half, a quarter or an eighth only where that leaves so many times the pixels needed."""
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO")
"""Pillow's formats that are pictures and can be told by their first bytes; its EPS reader would start Ghostscript."""
_SEE_THROUGH = ("RGBA", "LA", "PA", "RGBa", "La")
_SPARK_MODES = {0: 1, 16: 3, 24: 4}
"""OpenCV type codes that Spark's `image` source writes -> channels."""


@step_type("image")
@dataclass(frozen=True)
class ImageStep(Step):
    """A column of images as a float32 tensor (N, C, H, W), channels last in memory.

    The column may hold encoded files (JPEG, PNG, GIF, WebP, BMP, TIFF, ...), raw uint8 pixels (see `raw_shape`), or the
    structs of Spark's `image` data source (BGR, BGRA or grey). A picture is turned upright by its EXIF orientation;
    transparency is laid over white; of an animation the first frame counts; 16-bit grey is scaled to 8 bits. What
    cannot be read (empty, cut short, not an image, larger than `max_pixels`) is reported for its row, never raised.

    `tensor = (pixel * scale - mean) / std`, with `mean` and `std` in the order of `channels`.

    Raises: ConfigError, for settings that cannot work.

    >>> import io
    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (6, 4), (255, 0, 0)).save(file, "PNG")
    >>> step = ImageStep("image", size=(2, 2), scale=1 / 255)
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"content": [file.getvalue(), b"hello"]}))
    >>> packed.arrays["image"].shape, packed.errors
    ((1, 2, 2, 3), {1: "not an image that can be read: 5 bytes beginning b'hello'"})
    >>> step.batch(packed.arrays)[0, :, 0, 0].tolist()
    [1.0, 0.0, 0.0]
    """

    name: str
    column: str = "content"
    size: tuple[int, int] = (224, 224)
    """Height and width of the result, in pixels."""
    resize: str = "shorter"
    """`"shorter"`: scale the shorter side to `resize_to`, then cut out the centre; `"squash"`: scale both sides to
    `size`; `"none"`: take pictures of exactly `size` and refuse others."""
    resize_to: int | None = None
    """Length of the shorter side before the cut, in pixels; None: as small as still covers `size`."""
    interpolation: str = "bilinear"
    """`"nearest"`, `"box"`, `"bilinear"`, `"bicubic"` or `"lanczos"`: Pillow's filters, antialiased when shrinking."""
    channels: str = "RGB"
    """`"RGB"`, `"BGR"` or `"L"` (grey)."""
    scale: float = 1.0
    """Factor on the pixel values 0..255, before `mean` is taken off."""
    mean: tuple[float, ...] = (0.0,)
    """One number, or one for each channel."""
    std: tuple[float, ...] = (1.0,)
    """One number, or one for each channel."""
    raw_shape: tuple[int, ...] | None = None
    """(H, W) or (H, W, C) of raw uint8 pixels: rows of exactly that many bytes are taken as such. C is 1 (grey),
    3 (RGB) or 4 (RGB and alpha)."""
    max_pixels: int = 100_000_000
    """Largest width x height that is decoded; a header that announces more is refused before anything is allocated."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(not isinstance(side, int) or side < 1 for side in self.size):
            raise ConfigError("size", self.size, "is not a height and a width", "Give two positive numbers")
        if self.resize not in _RESIZES:
            raise ConfigError("resize", self.resize, "is unknown", f"Use one of {', '.join(_RESIZES)}")
        if self.interpolation not in _FILTERS:
            raise ConfigError("interpolation", self.interpolation, "is unknown", f"Use one of {', '.join(_FILTERS)}")
        if self.channels not in _CHANNELS:
            raise ConfigError("channels", self.channels, "is unknown", f"Use one of {', '.join(_CHANNELS)}")
        if self.resize_to is not None:
            if self.resize != "shorter":
                raise ConfigError(
                    "resize_to", self.resize_to, f"means nothing with resize={self.resize!r}", "Leave it out"
                )
            if self.resize_to < max(self.size):
                raise ConfigError(
                    "resize_to",
                    self.resize_to,
                    f"is too small to cut {self.size} from",
                    f"Use {max(self.size)} or more",
                )
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, _CHANNELS[self.channels]):
                raise ConfigError(
                    field, values, f"does not fit the channels {self.channels!r}", "Give one number, or one a channel"
                )
            if not all(math.isfinite(value) for value in values):
                raise ConfigError(field, values, "is not finite", "Give finite numbers")
        if 0 in self.std:
            raise ConfigError("std", self.std, "divides by zero", "Give numbers above zero")
        shape = self.raw_shape
        if shape is not None and (
            len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] not in (1, 3, 4))
        ):
            raise ConfigError(
                "raw_shape", shape, "is no shape of pixels", "Give (H, W) or (H, W, C) with C of 1, 3 or 4"
            )
        if self.max_pixels < 1:
            raise ConfigError("max_pixels", self.max_pixels, "lets no image through", "Use 1 or more")

    # Shapes

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one packed row."""
        return (*self.size, _CHANNELS[self.channels])

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("uint8", self.shape)}

    # Packing: Arrow rows -> one uint8 array

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if pa.types.is_struct(column.type):
            return self._pack_each(_SparkRows(column))
        if _is_binary(column.type):
            whole = self._pack_raw(column)
            return whole if whole is not None else self._pack_each(_FileRows(column))
        why = f"column {self.column!r} is {column.type}, neither image bytes nor Spark image rows"
        return Packed({self.name: np.empty((0, *self.shape), np.uint8)}, dict.fromkeys(range(len(column)), why))

    def _pack_each(self, rows: _FileRows | _SparkRows) -> Packed:
        out = np.empty((len(rows), *self.shape), np.uint8)
        errors: dict[int, str] = {}
        good = 0
        for row in range(len(rows)):
            try:
                rows.decode(row, self, out[good])
            except DataError as error:
                errors[row] = str(error)
            else:
                good += 1
        return Packed({self.name: out[:good]}, errors)

    def _pack_raw(self, column: pa.Array) -> Packed | None:
        """All rows at once, where all are raw pixels of the very shape that is wanted; else None."""
        if self.raw_shape is None or len(column) == 0 or column.null_count or self.raw_shape[:2] != self.size:
            return None
        channels = self.raw_shape[2] if len(self.raw_shape) == 3 else 1
        if channels != self.shape[2]:
            return None
        n_bytes = math.prod(self.raw_shape)
        lengths = np.asarray(pc.binary_length(column))
        if (lengths != n_bytes).any():
            return None
        large = column.cast(pa.large_binary())
        offset = int(np.frombuffer(large.buffers()[1], np.int64, 1, 8 * large.offset)[0])
        pixels = np.frombuffer(large.buffers()[2], np.uint8, n_bytes * len(large), offset).reshape(len(large), n_bytes)
        if any(
            _is_encoded(row)
            for row in pixels[(pixels[:, :3] == np.frombuffer(_JPEG, np.uint8)).all(1) | (pixels[:, 0] == _PNG[0])]
        ):
            return None
        images_NHWC = pixels.reshape(len(large), *self.shape)
        return Packed({self.name: images_NHWC[..., ::-1].copy() if self.channels == "BGR" else images_NHWC.copy()}, {})

    # Decoding one image

    def decode_one(self, data: bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray) -> Pixels:
        """One image, from file contents, a path, a PIL image or a uint8 array in RGB order, resized and cut.

        Returns: uint8, shape (H, W, C), in the order of `channels`.
        Raises: DataError, when it cannot be read; the message says why.

        >>> ImageStep("image", size=(1, 2), resize="none").decode_one(np.array([[7, 8]], np.uint8)).tolist()
        [[[7, 7, 7], [8, 8, 8]]]
        """
        out = np.empty(self.shape, np.uint8)
        if isinstance(data, str | Path):
            self._decode_file(_read(Path(data)), out)
        elif isinstance(data, bytes | bytearray | memoryview):
            self._decode_file(data, out)
        elif isinstance(data, Image.Image):
            self._check_pixels(data.height, data.width)
            self._fit(self._to_pixels(data), out)
        elif isinstance(data, np.ndarray):
            self._decode_array(data, out, bgr=False)
        else:
            raise DataError(f"{type(data).__name__} is not an image: give bytes, a path, a PIL image or a uint8 array")
        return out

    def _decode_file(self, data: Any, out: Pixels) -> None:
        view = memoryview(data)
        if view.nbytes == 0:
            raise DataError("the file is empty")
        if self.raw_shape is not None and view.nbytes == math.prod(self.raw_shape) and not _is_encoded(view):
            self._decode_array(np.frombuffer(view, np.uint8).reshape(self.raw_shape), out, bgr=False)
        elif not (bytes(view[:3]) == _JPEG and self._decode_jpeg(view, out)):
            self._decode_other(view, out)

    def _decode_jpeg(self, view: memoryview, out: Pixels) -> bool:
        """Decode with libjpeg-turbo; False where Pillow must look at it (CMYK, odd or damaged streams)."""
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(view)
        except ValueError:
            return False
        self._check_pixels(height, width)
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return False
        orientation = _jpeg_orientation(view)
        upright_size = (width, height) if orientation >= 5 else (height, width)
        need_h, need_w = self._scaled(*upright_size)
        if orientation >= 5:
            need_h, need_w = need_w, need_h
        # Halving is fast and other scales are not; and twice what is needed must be left, or the result strays from
        # that of a full decode.
        halvings = 0
        while (
            halvings < 3 and self.resize != "none" and min(height / need_h, width / need_w) >= 2 * _SPARE * 2**halvings
        ):
            halvings += 1
        least = {"min_height": -(-height >> halvings), "min_width": -(-width >> halvings)} if halvings else {}
        try:
            pixels = simplejpeg.decode_jpeg(view, "GRAY" if self.channels == "L" else self.channels, **least)
        except ValueError:
            return False
        self._fit(_turn(pixels, orientation), out, ours=True, true_size=upright_size)
        return True

    def _decode_other(self, view: memoryview, out: Pixels) -> None:
        try:
            with warnings.catch_warnings():
                # Pillow warns of large images by its own limit; ours is `max_pixels`. Its notes on odd metadata
                # are of no use to the owner of a million photos.
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(view), formats=_formats()) as image:
                    self._check_pixels(image.height, image.width)
                    pixels = self._to_pixels(image)
        except DataError:
            raise
        except UnidentifiedImageError:
            why = f"{view.nbytes:,} bytes beginning {bytes(view[:12])!r}"
            raise DataError(f"not an image that can be read: {why}") from None
        except Image.DecompressionBombError:
            raise DataError("the image is larger than Pillow decodes, refused as a decompression bomb") from None
        except Exception as error:  # Pillow's plug-ins raise anything: OSError, ValueError, SyntaxError, ...
            raise DataError(f"the image cannot be decoded: {error or type(error).__name__}") from error
        self._fit(pixels, out)

    def _decode_array(self, pixels: np.ndarray, out: Pixels, *, bgr: bool) -> None:
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
        if pixels.dtype != np.uint8 or not is_image or 0 in pixels.shape:
            seen = f"{pixels.dtype} {pixels.shape}"
            raise DataError(f"an array of {seen} is not an image: give uint8 (H, W) or (H, W, C) with C of 1, 3 or 4")
        self._check_pixels(*pixels.shape[:2])
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if bgr and pixels.ndim == 3:
            pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
        self._fit(self._to_pixels(Image.fromarray(np.ascontiguousarray(pixels))), out)

    def _check_pixels(self, height: int, width: int) -> None:
        if height * width > self.max_pixels:
            raise DataError(
                f"the image announces {width} x {height} = {width * height:,} pixels, "
                f"more than max_pixels={self.max_pixels:,}: refused as a decompression bomb"
            )

    def _to_pixels(self, image: Image.Image) -> Pixels:
        """Upright, 8 bits, opaque, grey or RGB: an array of our own, shape (H, W, 1 or 3)."""
        image = _eight_bits(_upright(image))
        if image.mode in _SEE_THROUGH or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        wanted = "L" if self.channels == "L" else "RGB"
        pixels = np.array(image if image.mode == wanted else image.convert(wanted))
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    # Scaling and cutting

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which the whole picture is scaled."""
        out_h, out_w = self.size
        if self.resize == "none":
            return height, width
        if self.resize == "squash":
            return out_h, out_w
        if self.resize_to is None:
            if out_h * width >= out_w * height:
                return out_h, out_h * width // height
            return out_w * height // width, out_w
        # As torchvision's Resize: the shorter side becomes `resize_to`, the longer one is rounded down.
        if height <= width:
            return self.resize_to, int(self.resize_to * width / height)
        return int(self.resize_to * height / width), self.resize_to

    def _fit(
        self, pixels: Pixels, out: Pixels, *, ours: bool = False, true_size: tuple[int, int] | None = None
    ) -> None:
        """Scale and cut into `out`.

        `ours`: the channels stand in our order already. `true_size`: the picture's height and width, where `pixels` are
        fewer.
        """
        out_h, out_w = self.size
        height, width = true_size or pixels.shape[:2]
        if self.resize == "none" and (height, width) != self.size:
            raise DataError(f"the image is {width} x {height} pixels, not {out_w} x {out_h}, and resize is 'none'")
        scaled_h, scaled_w = self._scaled(height, width)
        top, left = middle((scaled_h, scaled_w), self.size)
        if pixels.shape[:2] != (scaled_h, scaled_w):
            if self.interpolation in _FAST and scaled_h * scaled_w <= 4 * out_h * out_w:
                pixels = _resize(pixels, (scaled_h, scaled_w), self.interpolation)
            else:
                # Only the part that is kept is computed: a picture 1 pixel high and a million wide costs no more.
                pixels = _resize_box(pixels, (scaled_h, scaled_w), (top, left), self.size, self.interpolation)
                top = left = 0
        part = pixels[top : top + out_h, left : left + out_w]
        out[...] = part[:, :, ::-1] if self.channels == "BGR" and not ours else part

    # Batches: uint8 arrays -> tensors

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        images_NHWC = torch.from_numpy(np.ascontiguousarray(arrays[self.name]))
        n, height, width, channels = images_NHWC.shape
        # Whole rows of pixels against factors repeated as often: seven times faster than an axis of three channels.
        rows = images_NHWC.reshape(n * height, width * channels).to(torch.float32)
        factor, offset = (torch.from_numpy(np.resize(part, width * channels)) for part in self._affine)
        if (factor != 1).any():
            rows *= factor
        if offset.any():
            rows += offset
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2)

    @cached_property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and offset of each channel, float32: `(pixel * scale - mean) / std` in one go."""
        mean, std = (np.resize(np.array(part, np.float64), self.shape[2]) for part in (self.mean, self.std))
        return (self.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


@step_type("wide_image")
@dataclass(frozen=True)
class WideImageStep(ImageStep):
    """An image step of a training that cuts at random: rows are packed larger, and their middle is what the net takes.

    >>> step = WideImageStep("image", size=(2, 2), resize_to=4, spare=2)
    >>> step.packed_spec()
    {'image': ('uint8', (4, 4, 3))}
    >>> pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    >>> step.batch({"image": np.tile(pixels, 3)})[0, 0].tolist()
    [[5.0, 6.0], [9.0, 10.0]]
    """

    spare: int = 0
    """Pixels beyond `size` in height and in width."""

    @classmethod
    def of(cls, step: ImageStep, spare: int) -> WideImageStep:
        """The same step with room for random cuts.

        Raises: ConfigError, where the step scales pictures to no more than it cuts out of them.
        """
        return cls(**{part.name: getattr(step, part.name) for part in dataclasses.fields(step)}, spare=spare)

    def __post_init__(self) -> None:
        super().__post_init__()
        room = 0 if self.resize_to is None else self.resize_to - max(self.size)
        if not 0 <= self.spare <= room:
            raise ConfigError(
                "spare",
                self.spare,
                f"is more than the {room} pixels that pictures have beyond the size {self.size} of {self.name!r}",
                "Use no more, or an ImageStep with a larger resize_to",
            )

    @cached_property
    def _whole(self) -> ImageStep:
        fields = {part.name: getattr(self, part.name) for part in dataclasses.fields(ImageStep)}
        return ImageStep(**{**fields, "size": tuple(side + self.spare for side in self.size)})

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self._whole.packed_spec()

    def pack(self, rows: pa.RecordBatch) -> Packed:
        return self._whole.pack(rows)

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        images, (height, width) = arrays[self.name], self.size
        top, left = middle(images.shape[1:3], self.size)
        return super().batch({self.name: images[:, top : top + height, left : left + width]}, rng)


def middle(whole: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int]:
    """Top and left of what `size` (height, width) cuts from the middle of `whole`, as torchvision's CenterCrop.

    Halves are rounded to even.

    >>> middle((256, 341), (224, 224))
    (16, 58)
    """
    return round((whole[0] - size[0]) / 2), round((whole[1] - size[1]) / 2)


class _FileRows:
    """A binary column; each row is a file's contents or raw pixels."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def decode(self, row: int, step: ImageStep, out: Pixels) -> None:
        buffer = self.column[row].as_buffer()
        if buffer is None:
            raise DataError(f"column {step.column!r} is null")
        step._decode_file(buffer, out)


class _SparkRows:
    """A struct column as Spark's `image` data source makes it: BGR, BGRA or grey, row by row from the top left."""

    def __init__(self, column: pa.StructArray) -> None:
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        missing = [name for name in ("height", "width", "nChannels", "mode", "data") if name not in names]
        self.missing = missing
        self.valid = np.asarray(column.is_valid())
        if not missing:
            self.height, self.width, self.channels, self.mode = (
                np.asarray(column.field(name).fill_null(-1)) for name in ("height", "width", "nChannels", "mode")
            )
            self.data = column.field("data")

    def __len__(self) -> int:
        return len(self.valid)

    def decode(self, row: int, step: ImageStep, out: Pixels) -> None:
        if self.missing:
            raise DataError(f"column {step.column!r} is a struct without {', '.join(self.missing)}: not a Spark image")
        if not self.valid[row]:
            raise DataError(f"column {step.column!r} is null")
        height, width, channels, mode = (int(part[row]) for part in (self.height, self.width, self.channels, self.mode))
        if height <= 0 or width <= 0:
            raise DataError("Spark's image source could not decode the file (height or width is not positive)")
        if _SPARK_MODES.get(mode) != channels:
            raise DataError(
                f"Spark image of mode {mode} with {channels} channels is not one of 8-bit grey, BGR or BGRA"
            )
        buffer = self.data[row].as_buffer()
        n_bytes = 0 if buffer is None else buffer.size
        if n_bytes != height * width * channels:
            raise DataError(
                f"Spark image of {width} x {height} x {channels} holds {n_bytes:,} bytes, "
                f"not {height * width * channels:,}"
            )
        step._decode_array(np.frombuffer(buffer, np.uint8).reshape(height, width, channels), out, bgr=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_encoded(data: Any) -> bool:
    """Whether bytes of exactly the raw size are a PNG or JPEG file all the same."""
    view = memoryview(data)
    return bytes(view[:8]) == _PNG or (bytes(view[:3]) == _JPEG and bytes(view[-2:]) == _JPEG_END)


def _jpeg_orientation(view: memoryview) -> int:
    """EXIF orientation 1..8 of a JPEG; 1 where it is absent or unreadable."""
    position = 2
    # Walk the segments up to the first scan or frame; EXIF stands near the front.
    while position + 4 <= view.nbytes and view[position] == 0xFF:
        marker, length = view[position + 1], int.from_bytes(view[position + 2 : position + 4], "big")
        if marker == 0xE1 and bytes(view[position + 4 : position + 10]) == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(bytes(view[position + 4 : position + 2 + length]))
                orientation = exif.get(_ORIENTATION, 1)
            except Exception:  # damaged metadata must not cost the picture
                return 1
            return orientation if orientation in range(1, 9) else 1
        if marker in (0xDA, 0xC0, 0xC1, 0xC2) or length < 2:
            return 1
        position += 2 + length
    return 1


_TURNS = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p[::-1].transpose(1, 0, 2),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p[:, ::-1].transpose(1, 0, 2),
}
"""EXIF orientation -> what sets the picture upright."""


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    return pixels if orientation == 1 else np.ascontiguousarray(_TURNS[orientation](pixels))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata must not cost the picture
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; other modes as they are.

    Raises: DataError, for pixels that are no 8- or 16-bit numbers.
    """
    if image.mode == "F":
        raise DataError("the image holds floating-point pixels, whose range is unknown: convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise DataError(f"the image holds 32-bit pixels from {low} to {high}: convert it to 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can read, and a registered plug-in adds."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _resize(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """The whole picture, antialiased, to height and width `size`."""
    import torch
    from torch.nn.functional import interpolate

    # In this order the view counts as channels last, for which torch has its fast path.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    scaled = interpolate(planes, size=size, mode=interpolation, antialias=True, align_corners=False)
    return scaled[0].permute(1, 2, 0).numpy()


def _resize_box(
    pixels: Pixels, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, int], interpolation: str
) -> Pixels:
    """What `size` cuts at `corner` (top, left) out of the picture scaled to `scaled`, with Pillow."""
    height, width = pixels.shape[:2]
    y, x = height / scaled[0], width / scaled[1]
    (top, left), (out_h, out_w) = corner, size
    box = (left * x, top * y, min((left + out_w) * x, width), min((top + out_h) * y, height))
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((out_w, out_h), _FILTERS[interpolation], box=box)).reshape(*size, -1)
