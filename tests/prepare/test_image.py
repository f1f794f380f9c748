"""ImageStep against Pillow's own decoding and resizing, on files of every kind people have in their folders."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw

from kindling.errors import ConfigError, DataError, FormatError
from kindling.prepare import Preparation
from kindling.prepare.base import step_from_json
from kindling.prepare.image import ImageStep, WideImageStep

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def photo(width: int = 500, height: int = 375, seed: int = 0) -> Image.Image:
    """Something like a photo: soft gradients, shapes with edges, a little noise; no symmetry."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + width // 6, y + height // 8), fill=colour)
    noisy = np.asarray(image).astype(int) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pack(step: ImageStep, *rows: Any, kind: pa.DataType | None = None) -> Any:
    return step.pack(pa.RecordBatch.from_arrays([pa.array(rows, kind or pa.binary())], ["content"]))


def by_torchvision(image: Image.Image, resize_to: int, size: tuple[int, int]) -> np.ndarray:
    """transforms.Resize(resize_to) and CenterCrop(size) on a PIL image, written out."""
    width, height = image.size
    long = int(resize_to * max(width, height) / min(width, height))
    scaled = image.resize((resize_to, long) if width <= height else (long, resize_to), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size[1]) / 2), round((scaled.height - size[0]) / 2)
    return np.asarray(scaled.crop((left, top, left + size[1], top + size[0])))


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.fixture
def two_colours() -> Image.Image:
    """4 wide, 2 high: left half red, right half blue."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image


# The numbers: golden pixels, and Pillow as the reference


def test_golden_pixels_of_each_channel_order(two_colours: Image.Image) -> None:
    for channels, left, right in (
        ("RGB", [255, 0, 0], [0, 0, 255]),
        ("BGR", [0, 0, 255], [255, 0, 0]),
        ("L", [76], [29]),  # ITU-R 601: 0.299 red, 0.114 blue
    ):
        step = ImageStep("x", size=(2, 4), resize="none", channels=channels)
        pixels = step.decode_one(encode(two_colours))
        assert pixels[0, 0].tolist() == left
        assert pixels[1, 3].tolist() == right


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_jpeg_and_png_agree_on_which_channel_is_red(channels: str) -> None:
    image = Image.new("RGB", (64, 64), (250, 10, 30))
    step = ImageStep("x", size=(8, 8), channels=channels)
    jpeg, png = step.decode_one(encode(image, "JPEG", quality=100)), step.decode_one(encode(image))
    assert difference(jpeg, png).max() <= 2
    assert (png[0, 0] == ([250, 10, 30] if channels == "RGB" else [30, 10, 250])).all()


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_tensor_is_normalised_in_the_order_of_its_channels(channels: str) -> None:
    mean, std = (1.0, 2.0, 3.0), (0.5, 0.25, 2.0)
    step = ImageStep("x", size=(1, 1), resize="none", channels=channels, scale=0.5, mean=mean, std=std)
    tensor = step.batch(pack(step, encode(Image.new("RGB", (1, 1), (10, 20, 40)))).arrays)
    pixel = [10, 20, 40] if channels == "RGB" else [40, 20, 10]
    assert tensor[0, :, 0, 0].tolist() == [(p * 0.5 - m) / s for p, m, s in zip(pixel, mean, std, strict=True)]


def test_batch_equals_the_formula_in_plain_numpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = ImageStep("x", size=(5, 7), scale=1 / 255, mean=mean, std=std).batch({"x": pixels})
    expected = ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=1e-6)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_no_rows_has_its_shape() -> None:
    step = ImageStep("x", size=(5, 7), scale=1 / 255, mean=(0.5,))
    assert step.batch(pack(step).arrays).shape == (0, 3, 5, 7)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 301), (224, 224), (150, 90), (256, 999)])
def test_resize_and_cut_are_torchvisions_to_within_one(kind: str, width: int, height: int) -> None:
    file = encode(photo(width, height), kind, **({"quality": 90} if kind == "JPEG" else {}))
    step = ImageStep("x", size=(224, 224), resize_to=256)
    expected = by_torchvision(Image.open(io.BytesIO(file)), 256, (224, 224))
    found = difference(step.decode_one(file), expected)
    assert found.max() <= 1
    assert found.mean() <= 0.05


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "bicubic", "lanczos"])
def test_each_filter_is_pillows_to_within_one(interpolation: str, channels: str) -> None:
    image = photo(311, 200)
    step = ImageStep("x", size=(97, 120), resize="squash", interpolation=interpolation, channels=channels)
    scaled = image.convert("L" if channels == "L" else "RGB").resize((120, 97), Image.Resampling[interpolation.upper()])
    expected = np.asarray(scaled).reshape(97, 120, -1)
    expected = expected[..., ::-1] if channels == "BGR" else expected
    assert difference(step.decode_one(encode(image)), expected).max() <= 1


def test_grey_from_a_jpeg_is_grey_from_its_colours() -> None:
    file = encode(photo(), "JPEG", quality=95)
    found = ImageStep("x", size=(375, 500), resize="none", channels="L").decode_one(file)[..., 0]
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("L"))
    # The JPEG holds its grey; from decoded colours it comes rounded and clipped.
    assert difference(found, expected).mean() <= 0.5


@pytest.mark.parametrize(("width", "height"), [(2000, 1500), (1200, 1600), (4001, 3001)])
def test_a_large_jpeg_decoded_at_a_half_or_less_is_near_the_full_one(width: int, height: int) -> None:
    file = encode(photo(width, height), "JPEG", quality=90)
    step = ImageStep("x", size=(224, 224), resize_to=256)
    found = difference(step.decode_one(file), by_torchvision(Image.open(io.BytesIO(file)), 256, (224, 224)))
    assert found.mean() <= 2.0


@pytest.mark.needs_data
def test_real_photos_are_near_pillows_at_every_scale(data_dir: Path) -> None:
    files = [path.read_bytes() for path in sorted(data_dir.glob("caltech101_mini/*/*.jpg"))[::10]]
    assert len(files) == 30
    for side, mean_limit, worst_limit in ((256, 0.05, 0.1), (64, 1.0, 3.0), (24, 2.0, 5.0)):
        step = ImageStep("x", size=(side, side))
        off = []
        for file in files:
            expected = by_torchvision(Image.open(io.BytesIO(file)).convert("RGB"), side, (side, side))
            off.append(difference(step.decode_one(file), expected).mean())
        assert np.mean(off) <= mean_limit
        assert np.max(off) <= worst_limit


def test_without_resize_to_the_picture_is_scaled_until_it_just_covers() -> None:
    image = Image.new("RGB", (400, 100), BLACK)
    image.paste(WHITE, (150, 0, 250, 100))  # the middle square
    found = ImageStep("x", size=(50, 50)).decode_one(encode(image))
    assert found[:, 2:-2].min() > 250


# Every kind of file


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright_by_their_exif(orientation: int, kind: str) -> None:
    upright = photo(160, 96)
    # What a camera stores so that a viewer, applying the orientation, shows `upright`.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    file = encode(stored, kind, exif=exif, **options)
    found = ImageStep("x", size=(96, 160), resize="none").decode_one(file)
    assert difference(found, np.asarray(upright)).mean() < 6


def test_a_turned_photo_is_scaled_by_its_upright_sides() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photo(1500, 2000)
    file = encode(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    found = ImageStep("x", size=(96, 64), resize_to=100).decode_one(file)
    assert difference(found, by_torchvision(upright, 100, (96, 64))).mean() <= 2.0


@pytest.mark.parametrize("damage", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_costs_no_picture(damage: bytes) -> None:
    file = encode(photo(40, 30), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage
    assert ImageStep("x", size=(8, 8)).decode_one(file[:2] + segment + file[2:]).shape == (8, 8, 3)


def test_cmyk_jpegs_show_their_colours() -> None:
    file = encode(Image.new("RGB", (32, 32), (200, 40, 60)).convert("CMYK"), "JPEG", quality=100)
    found = ImageStep("x", size=(4, 4)).decode_one(file)
    assert difference(found[0, 0], np.array([200, 40, 60])).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_grey_pictures_fill_all_channels(kind: str) -> None:
    found = ImageStep("x", size=(4, 4)).decode_one(encode(Image.new("L", (16, 16), 100), kind))
    assert difference(found, np.full((4, 4, 3), 100)).max() <= 1


def test_black_and_white_bitmaps_are_0_and_255() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    step = ImageStep("x", size=(1, 2), resize="none")
    assert step.decode_one(encode(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_palettes_are_looked_up(two_colours: Image.Image) -> None:
    file = encode(two_colours.quantize(2))
    assert Image.open(io.BytesIO(file)).mode == "P"
    found = ImageStep("x", size=(2, 4), resize="none").decode_one(file)
    assert (found == np.asarray(two_colours)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(kind: str) -> None:
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    found = ImageStep("x", size=(1, 4), resize="none", channels="L").decode_one(encode(Image.fromarray(values), kind))
    assert found.ravel().tolist() == [0, 1, 128, 255]


def test_16_bit_colour_is_read() -> None:
    rows = b"".join(b"\0" + struct.pack(">6H", 65_535, 0, 32_896, 0, 65_535, 257) for _ in range(2))
    file = png_of(header=struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), data=zlib.compress(rows))
    found = ImageStep("x", size=(2, 2), resize="none").decode_one(file)
    assert found[0].tolist() == [[255, 0, 128], [0, 255, 1]]


def test_floating_point_and_32_bit_pixels_are_refused_by_name() -> None:
    step = ImageStep("x", size=(2, 2))
    floats = encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    deep = encode(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF")
    errors = pack(step, floats, deep).errors
    assert "floating-point" in errors[0]
    assert "70000" in errors[1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    options: dict[str, Any] = {}
    if mode == "P":
        image, options = Image.new("P", (2, 1), 0), {"transparency": 1}
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
    elif mode == "LA":
        image = image.convert("LA")
    found = ImageStep("x", size=(1, 2), resize="none").decode_one(encode(image, **options))
    assert found.tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(file)), "n_frames", 1) == 3
    assert ImageStep("x", size=(2, 2)).decode_one(file)[0, 0].tolist() == list(RED)


def test_progressive_jpegs_are_read() -> None:
    image = photo()
    file = encode(image, "JPEG", quality=95, progressive=True)
    found = ImageStep("x", size=(375, 500), resize="none").decode_one(file)
    assert difference(found, np.asarray(image)).mean() < 4


# What cannot be read is an error text of its row


def png_of(*, header: bytes, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_jpeg_size(file: bytes, width: int, height: int) -> bytes:
    """The file with another size in its frame header."""
    at = file.index(b"\xff\xc0")
    return file[: at + 5] + struct.pack(">HH", height, width) + file[at + 9 :]


BOMBS = {
    "PNG": png_of(header=struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0), data=zlib.compress(b"\0" * 1000)),
    "JPEG": with_jpeg_size(encode(Image.new("RGB", (16, 16)), "JPEG"), 60_000, 60_000),
    "huge PNG": png_of(header=struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0), data=zlib.compress(b"\0" * 1000)),
    "GIF": b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\x80\0\0" + b"\0" * 6 + b"\x2c" + b"\0" * 40,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_decompression_bombs_are_refused_before_they_are_allocated(kind: str) -> None:
    step = ImageStep("x", size=(8, 8))
    pack(step, encode(photo(40, 30)))  # everything is imported
    tracemalloc.start()
    try:
        errors = pack(step, BOMBS[kind]).errors
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "decompression bomb" in errors[0]
    assert peak_bytes < 4 * 2**20


def test_max_pixels_is_the_limit_that_counts() -> None:
    file, jpeg = encode(photo(100, 100)), encode(photo(100, 100), "JPEG")
    assert pack(ImageStep("x", size=(8, 8), max_pixels=10_000), file, jpeg).errors == {}
    errors = pack(ImageStep("x", size=(8, 8), max_pixels=9_999), file, jpeg).errors
    assert errors.keys() == {0, 1}
    assert "100 x 100 = 10,000 pixels, more than max_pixels=9,999" in errors[0]


def test_a_picture_of_one_row_and_a_million_columns_costs_no_more_than_another() -> None:
    file = encode(Image.new("RGB", (1_000_000, 1), RED))
    found = ImageStep("x", size=(224, 224), resize_to=256).decode_one(file)  # scaled whole: 256 x 256,000,000 pixels
    assert (found == RED).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True}])
def test_truncated_jpegs_are_errors_not_grey_pictures(share: float, options: dict[str, Any]) -> None:
    file = encode(photo(), "JPEG", **options)
    packed = pack(ImageStep("x", size=(8, 8)), file[: int(len(file) * share)], file)
    assert list(packed.errors) == [0]
    assert packed.arrays["x"].shape == (1, 8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_other_files_cut_short_are_errors(kind: str) -> None:
    file = encode(photo(64, 64), kind)
    assert list(pack(ImageStep("x", size=(8, 8)), file[: len(file) // 2]).errors) == [0]


def test_what_is_no_image_says_what_it_is() -> None:
    rows = [
        b"",
        b"Dear diary, today",
        b"\xff\xd8\xff",
        b"%PDF-1.7 ...",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        None,
    ]
    errors = pack(ImageStep("x", size=(8, 8)), *rows).errors
    assert errors[0] == "the file is empty"
    assert errors[1] == "not an image that can be read: 17 bytes beginning b'Dear diary, '"
    assert "not an image" in errors[2]
    assert "not an image" in errors[3]
    assert "not an image" in errors[4]  # EPS is a programme
    assert errors[5] == "column 'content' is null"


def test_good_rows_keep_their_order_among_broken_ones() -> None:
    grey = [encode(Image.new("L", (4, 4), value)) for value in (10, 20, 30)]
    packed = pack(ImageStep("x", size=(2, 2), channels="L"), b"x", grey[0], None, grey[1], b"", grey[2])
    assert packed.arrays["x"][:, 0, 0, 0].tolist() == [10, 20, 30]
    assert list(packed.errors) == [0, 2, 4]


def test_a_column_that_holds_no_images_is_an_error_of_each_row() -> None:
    packed = pack(ImageStep("x", size=(2, 2)), 1, 2, kind=pa.int64())
    assert packed.arrays["x"].shape == (0, 2, 2, 3)
    assert packed.errors[1] == "column 'content' is int64, neither image bytes nor Spark image rows"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_slices_of_arrow_batches_are_read_where_they_begin(kind: pa.DataType) -> None:
    files = [encode(Image.new("L", (4, 4), value)) for value in (10, 20, 30)]
    rows = pa.RecordBatch.from_arrays([pa.array(files, kind)], ["content"]).slice(1)
    assert ImageStep("x", size=(1, 1), channels="L").pack(rows).arrays["x"].ravel().tolist() == [20, 30]


# Raw pixels


def test_raw_pixels_are_taken_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 1), dtype=np.uint8)
    step = ImageStep("x", size=(3, 4), resize="none", channels="L", raw_shape=(3, 4))
    rows = pa.RecordBatch.from_arrays([pa.array([p.tobytes() for p in pixels], pa.binary())], ["content"])
    assert (step.pack(rows).arrays["x"] == pixels).all()
    assert (step.pack(rows.slice(2)).arrays["x"] == pixels[2:]).all()


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_raw_colours_are_rgb(channels: str) -> None:
    step = ImageStep("x", size=(1, 2), resize="none", channels=channels, raw_shape=(1, 2, 3))
    found = pack(step, bytes([1, 2, 3, 4, 5, 6])).arrays["x"][0, 0]
    assert found.tolist() == ([[1, 2, 3], [4, 5, 6]] if channels == "RGB" else [[3, 2, 1], [6, 5, 4]])


def test_raw_pixels_are_resized_like_files() -> None:
    image = photo(60, 40).convert("L")
    step = ImageStep("x", size=(16, 16), channels="L", raw_shape=(40, 60))
    raw = pack(step, np.asarray(image).tobytes()).arrays["x"][0]
    assert (raw == step.decode_one(encode(image))).all()


def test_a_raw_model_takes_files_too_even_of_the_raw_size() -> None:
    step = ImageStep("x", size=(28, 28), channels="L", raw_shape=(28, 28))
    file = encode(Image.new("L", (28, 28), 77))
    padded = file + b"\0" * (784 - len(file))
    for row in (file, padded):
        assert (pack(step, row).arrays["x"] == 77).all()
    assert pack(step, bytes(783)).errors.keys() == {0}


# Rows of Spark's `image` source

SPARK_IMAGE = pa.struct(
    [("origin", pa.string())]
    + [(name, pa.int32()) for name in ("height", "width", "nChannels", "mode")]
    + [("data", pa.binary())]
)


def spark_row(pixels_HWC: np.ndarray, mode: int, /, **changes: Any) -> dict[str, Any]:
    height, width, channels = pixels_HWC.shape
    row = {"origin": "file:/a", "height": height, "width": width, "nChannels": channels, "mode": mode}
    return {**row, "data": pixels_HWC.tobytes()} | changes


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_spark_image_rows_equal_their_files(channels: str) -> None:
    image = photo(64, 48)
    step = ImageStep("x", size=(32, 32), channels=channels)
    rgba = np.dstack([np.asarray(image), np.full((48, 64), 255, np.uint8)])
    rows = [
        spark_row(np.asarray(image)[:, :, ::-1], 16),
        spark_row(rgba[:, :, [2, 1, 0, 3]], 24),
        spark_row(np.asarray(image.convert("L"))[:, :, None], 0),
    ]
    packed = pack(step, *rows, kind=SPARK_IMAGE)
    assert packed.errors == {}
    expected = step.decode_one(encode(image))
    assert (packed.arrays["x"][0] == expected).all()
    assert (packed.arrays["x"][1] == expected).all()
    assert (packed.arrays["x"][2] == step.decode_one(encode(image.convert("L")))).all()


def test_spark_image_rows_that_are_broken_say_how() -> None:
    good = np.zeros((2, 2, 3), np.uint8)
    broken = {"height": -1, "width": -1, "nChannels": -1, "mode": -1, "data": b""}
    rows = [spark_row(good, 16, **broken), spark_row(good, 16, data=b"123"), spark_row(good, 5), None]
    errors = pack(ImageStep("x", size=(2, 2)), *rows, kind=SPARK_IMAGE).errors
    assert "could not decode" in errors[0]
    assert "holds 3 bytes, not 12" in errors[1]
    assert "mode 5" in errors[2]
    assert errors[3] == "column 'content' is null"
    other = pack(ImageStep("x", size=(2, 2)), {"a": 1}, kind=pa.struct([("a", pa.int32())])).errors
    assert "without height, width, nChannels, mode, data" in other[0]


def test_spark_image_rows_obey_the_pixel_limit() -> None:
    step = ImageStep("x", size=(2, 2), max_pixels=3)
    assert "decompression bomb" in pack(step, spark_row(np.zeros((2, 2, 3), np.uint8), 16), kind=SPARK_IMAGE).errors[0]


# One image at a time


def test_decode_one_takes_all_that_people_hold(tmp_path: Path) -> None:
    image = photo(50, 40)
    file = encode(image)
    (tmp_path / "a.png").write_bytes(file)
    step = ImageStep("x", size=(20, 20), channels="BGR")
    expected = step.decode_one(file)
    for data in (
        bytearray(file),
        memoryview(file),
        image,
        np.asarray(image),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ):
        assert (step.decode_one(data) == expected).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        ("/no/such/file.jpg", "No such file"),
        (7, "int is not an image"),
    ],
)
def test_decode_one_says_what_it_cannot_take(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageStep("x", size=(2, 2)).decode_one(data)


def test_resize_none_takes_only_its_own_size() -> None:
    packed = pack(
        ImageStep("x", size=(2, 3), resize="none"), encode(Image.new("RGB", (3, 2))), encode(Image.new("RGB", (2, 3)))
    )
    assert packed.errors == {1: "the image is 2 x 3 pixels, not 3 x 2, and resize is 'none'"}


# Settings


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"size": (0, 2)}, "size"),
        ({"size": (2,)}, "size"),
        ({"resize": "crop"}, "resize"),
        ({"resize_to": 7}, "resize_to"),
        ({"resize": "squash", "resize_to": 9}, "resize_to"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"channels": "RGBA"}, "channels"),
        ({"mean": (1.0, 2.0)}, "mean"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"std": (0.0,)}, "std"),
        ({"raw_shape": (2, 2, 2)}, "raw_shape"),
        ({"raw_shape": (2,)}, "raw_shape"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}="):
        ImageStep("x", **{"size": (8, 8), **settings})


def test_a_step_comes_back_from_json_with_the_same_pixels() -> None:
    step = ImageStep("x", size=(8, 9), resize_to=12, channels="BGR", mean=(1.0, 2.0, 3.0), raw_shape=(4, 5))
    again = step_from_json(step.to_json())
    assert again == step
    assert (again.decode_one(photo()) == step.decode_one(photo())).all()  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match="interpolation"):
        step_from_json({**step.to_json(), "interpolation": "magic"})


def test_a_preparation_reports_the_images_that_failed() -> None:
    preparation = Preparation((ImageStep("x", size=(2, 2)),))
    rows = pa.RecordBatch.from_pydict({"content": [b"junk", encode(photo(9, 9))]})
    packed = preparation.pack(rows, targets=False)
    assert packed.arrays["x"].shape == (1, 2, 2, 3)
    assert preparation.packed_spec(targets=False) == {"x": ("uint8", (2, 2, 3))}
    assert list(packed.errors) == [0]


# Room for random cuts


def test_the_middle_of_a_wider_packing_is_the_plain_step_s_picture() -> None:
    step = ImageStep("image", size=(61, 48), resize_to=80)
    wide = WideImageStep.of(step, 19)
    files = [encode(photo(width, height)) for width, height in ((80, 80), (80, 120), (131, 80))]
    plain, packed = pack(step, *files).arrays, pack(wide, *files).arrays
    assert packed["image"].shape == (3, 80, 67, 3)
    (_, shape) = wide.packed_spec()["image"]
    assert shape == packed["image"].shape[1:]
    assert step_from_json(wide.to_json()) == wide
    for mine, other in zip(wide.batch(packed), step.batch(plain), strict=True):
        near = [
            (mine[:, 1:-1, 1:-1] - other[:, 1 + y : 60 + y, 1 + x : 47 + x]).abs().max() for y in (0, 1) for x in (0, 1)
        ]
        assert min(near) == 0  # halves are rounded once more: one pixel


def test_no_room_is_said() -> None:
    with pytest.raises(ConfigError, match=r"spare=20 is more than the 19 pixels .* beyond the size \(61, 48\)"):
        WideImageStep.of(ImageStep("image", size=(61, 48), resize_to=80), 20)
    with pytest.raises(ConfigError, match="more than the 0 pixels"):
        WideImageStep.of(ImageStep("image", size=(61, 48)), 1)
