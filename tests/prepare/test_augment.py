"""Augmentation: by row and epoch, whoever is beside the row; against loops over single images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from kindling.errors import ConfigError, FormatError
from kindling.prepare.augment import (
    Augmentation,
    LessPicture,
    RandomColor,
    RandomCrop,
    RandomFlip,
    RandomZoom,
    RowDraws,
    augmentation_from_json,
    augmented,
)
from kindling.train.order import mix

EVERY: list[Augmentation] = [
    RandomFlip(),
    RandomFlip(vertical=True),
    RandomCrop(3),
    RandomCrop(2, fill="reflect"),
    RandomCrop(2, fill="black"),
    RandomZoom(),
    RandomColor(0.3, 0.3, 0.3),
]


def images(count: int, channels: int = 3, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


def draws(count: int, epoch: int = 1) -> RowDraws:
    return RowDraws(mix(np.arange(count, dtype=np.uint64), 0, epoch), mix)


@pytest.mark.parametrize("step", EVERY, ids=lambda step: f"{step.kind}")
@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_a_row_s_change_depends_on_its_key_alone(step: Augmentation, channels: str) -> None:
    x = images(30, 1 if channels == "L" else 3)
    before, keys = x.copy(), mix(np.arange(30, dtype=np.uint64), 0, 1)
    whole = step.apply(x, RowDraws(keys, mix), channels)
    assert whole.dtype == np.uint8
    assert whole.shape == x.shape
    assert (x == before).all()
    assert (whole != x).any()
    for part in (slice(0, 1), slice(1, 17), slice(17, 30)):
        np.testing.assert_array_equal(step.apply(x[part], RowDraws(keys[part], mix), channels), whole[part])
    other = step.apply(x, draws(30, epoch=2), channels)
    assert (other != whole).any()


@pytest.mark.parametrize(
    "step",
    [*EVERY, RandomCrop(padding=0, spare=3), LessPicture.of(np.ones((2, 3, 1)))],
    ids=lambda step: f"{step.kind}",
)
def test_steps_survive_json(step: Augmentation) -> None:
    assert augmentation_from_json(json.loads(json.dumps(step.to_json()))) == step


def test_flips_are_mirrors_of_about_half() -> None:
    x = images(2000)
    out = RandomFlip().apply(x, draws(2000), "RGB")
    mirrored = (out == x[:, :, ::-1]).all((1, 2, 3))
    assert ((out == x).all((1, 2, 3)) | mirrored).all()
    assert 0.45 < mirrored.mean() < 0.55
    np.testing.assert_array_equal(RandomFlip(1.0, vertical=True).apply(x, draws(2000), "RGB"), x[:, ::-1])
    np.testing.assert_array_equal(RandomFlip(0.0).apply(x, draws(2000), "RGB"), x)


def test_crops_are_cut_from_the_padded_image_at_every_place_alike() -> None:
    x = images(400)
    out = RandomCrop(1, fill="black").apply(x, draws(400), "RGB")
    found = {}
    for image, moved in zip(x, out, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        places = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if (padded[top : top + 12, left : left + 10] == moved).all()
        ]
        assert len(places) == 1
        found[places[0]] = found.get(places[0], 0) + 1
    assert len(found) == 9
    assert max(found.values()) < 3 * min(found.values())


def test_a_larger_picture_is_cut_at_every_place_alike() -> None:
    x = images(400, height=12, width=10)
    step = RandomCrop(padding=0, spare=2)
    out = step.apply(x, draws(400), "RGB")
    assert (step.spent, out.shape) == (2, (400, 10, 8, 3))
    tops, lefts = (np.floor(draws(400).uniform(number, 0, 3)).astype(int) for number in (0, 1))
    for image, cut, top, left in zip(x, out, tops, lefts, strict=True):
        np.testing.assert_array_equal(cut, image[top : top + 10, left : left + 8])
    assert np.bincount(3 * tops + lefts, minlength=9).min() > 20


def test_a_mean_picture_goes_along_with_cuts_and_flips() -> None:
    x, mean = images(50), np.random.default_rng(1).normal(100, 30, (12, 10, 3)).astype(np.float32)
    steps = [RandomCrop(padding=0, spare=4), RandomFlip()]
    out = augmented([LessPicture.of(mean), *steps, LessPicture.of(np.zeros((8, 6, 3)))], x, draws(50), "RGB")
    assert out.dtype == np.float32
    means = np.broadcast_to(mean, x.shape)
    keys = draws(50)
    for place, step in enumerate(steps, 1):
        x, means = (step.apply(part, keys.at(place), "RGB") for part in (x, means))
    np.testing.assert_allclose(out, x - means, atol=1e-4)
    told = LessPicture.of(mean).told()
    assert len(json.dumps(told)) < 200


def test_a_zoom_of_the_whole_is_the_image_and_a_part_is_inside() -> None:
    x = images(20)
    whole = RandomZoom(area=(1.0, 1.0), ratio=(1.0, 1.0)).apply(x, draws(20), "RGB")
    assert np.abs(whole.astype(int) - x).max() <= 1
    ramp = np.broadcast_to(np.arange(0, 200, 10, dtype=np.uint8)[None, None, :, None], (50, 8, 20, 1)).copy()
    part = RandomZoom(area=(0.25, 0.25), ratio=(1.0, 1.0)).apply(ramp, draws(50), "L").astype(int)
    spans = part[:, 4, -1, 0] - part[:, 4, 0, 0]
    assert (np.abs(spans - 95) <= 6).all()  # half of the width
    assert len(set(part[:, 4, 0, 0].tolist())) > 10
    assert part.min() >= 0
    assert part.max() <= 190


@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation"])
def test_colours_change_as_pillow_changes_them(which: str) -> None:
    x = images(40)
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, which: 0.4}
    out = RandomColor(**strengths).apply(x, draws(40), "RGB")
    factors = draws(40).uniform(["brightness", "contrast", "saturation"].index(which), 0.6, 1.4)
    kind = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for image, changed, factor in zip(x, out, factors, strict=True):
        expected = np.asarray(kind[which](Image.fromarray(image)).enhance(factor)).astype(int)
        assert np.abs(changed.astype(int) - expected).max() <= 2  # Pillow rounds greys to whole numbers


def test_the_order_of_channels_is_known() -> None:
    x = images(10)
    step = RandomColor(0.2, 0.2, 0.2)
    rgb = step.apply(x, draws(10), "RGB")
    bgr = step.apply(np.ascontiguousarray(x[..., ::-1]), draws(10), "BGR")
    assert np.abs(rgb[..., ::-1].astype(int) - bgr).max() <= 1


def test_two_of_a_kind_draw_for_themselves() -> None:
    x = images(200)
    twice = augmented([RandomFlip(), RandomFlip()], x, draws(200), "RGB")
    assert 0.35 < (twice == x).all((1, 2, 3)).mean() < 0.65


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomFlip(-0.1), "is no share"),
        (lambda: RandomCrop(-1), "is no number of pixels"),
        (lambda: RandomCrop(0), "leaves one place"),
        (lambda: LessPicture((1, 2, 1), "AAAA"), "is not that of the numbers"),
        (lambda: LessPicture((1, 1, 1), "?"), "is not that of the numbers"),
        (lambda: RandomCrop(1, fill="grey"), "is unknown"),
        (lambda: RandomZoom(area=(0.9, 0.1)), "is no range"),
        (lambda: RandomColor(contrast=1.5), "is no strength"),
    ],
)
def test_what_cannot_be_is_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("data", [{"kind": "flop"}, {"kind": "flip", "share": 7}, {"kind": "flip", "half": 1}])
def test_foreign_json_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="augmentation"):
        augmentation_from_json(data)
