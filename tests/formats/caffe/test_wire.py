"""The binary format: every way to keep numbers, and nothing believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kindling.errors import FormatError
from kindling.formats.caffe.wire import decode

NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 8  # halves hold them exactly


@pytest.mark.parametrize("style", ["packed", "unpacked", "double", "half", "raw", "legacy"])
def test_a_blob_is_the_same_in_every_style(write: Any, style: str) -> None:
    net = decode(write.caffemodel({"conv": [NUMBERS]}, style=style), "NetParameter")
    (blob,) = net.all("layer")[0].all("blobs")
    assert blob.shape == NUMBERS.shape
    np.testing.assert_array_equal(blob.array(), NUMBERS)
    assert blob.array().dtype == np.float32


def test_mixed_packed_and_unpacked_numbers_keep_their_order(write: Any) -> None:
    body = write.blob(NUMBERS.reshape(-1)[:4], "unpacked")[: 4 * 5] + write.data(
        5, NUMBERS.reshape(-1)[4:].astype("<f4").tobytes()
    )
    (blob,) = decode(write.data(1, body), "BlobProtoVector").all("blobs")
    np.testing.assert_array_equal(blob.array(), NUMBERS.reshape(-1))


def test_numbers_are_copied_from_the_file(write: Any) -> None:
    data = bytearray(write.caffemodel({"conv": [NUMBERS]}))
    (blob,) = decode(data, "NetParameter").all("layer")[0].all("blobs")
    array = blob.array()
    data[-4:] = b"\xff" * 4
    np.testing.assert_array_equal(array, NUMBERS)


def test_every_kind_of_field_is_read(write: Any) -> None:
    spec = write.data(1, "w") + write.varint(3 << 3 | 5) + np.float32(2).tobytes()
    rule = write.number(1, 0) + write.number(2, -5) + write.data(4, "a") + write.data(4, "b")
    pool = write.number(1, 1) + write.number(2, 3)
    layer = write.data(1, "l") + write.data(6, spec) + write.data(8, rule) + write.data(121, pool)
    made = decode(write.data(100, layer), "NetParameter").all("layer")[0]
    assert made.all("param")[0].get("lr_mult") == 2
    assert (made.all("include")[0].get("phase"), made.all("include")[0].get("min_level")) == ("TRAIN", -5)
    assert made.all("include")[0].all("stage") == ["a", "b"]
    assert (made.get("pooling_param").get("pool"), made.get("pooling_param").get("kernel_size")) == ("AVE", 3)


def test_fields_and_enum_values_that_nobody_knows_are_passed_over(write: Any) -> None:
    layer = write.data(1, "l") + write.data(9999, b"anything") + write.number(10, 77)
    made = decode(write.data(100, layer), "NetParameter").all("layer")[0]
    assert made.get("name") == "l"
    assert not made.has("phase")


def test_relatives_of_caffe_may_use_numbers_for_things_of_their_own(write: Any) -> None:
    layer = write.data(1, "l") + write.data(7, write.blob(NUMBERS)) + write.data(121, b"\xff\xff\xff")
    data = write.data(100, layer)
    with pytest.raises(FormatError):
        decode(data, "NetParameter")
    (made,) = decode(data, "NetParameter", weights_only=True).all("layer")
    np.testing.assert_array_equal(made.all("blobs")[0].array(), NUMBERS)


def hostile(write: Any) -> dict[str, bytes]:
    blob = write.blob(NUMBERS)
    return {
        "a length beyond the file": write.varint(100 << 3 | 2) + write.varint(2**40) + b"x",
        "a number without end": b"\xff" * 20,
        "a group": write.varint(100 << 3 | 3),
        "field zero": b"\x00\x00",
        "a shape of more numbers than there are": write.data(
            100, write.data(7, write.data(7, write.data(1, write.varint(2**30))) + write.data(5, b"\0" * 8))
        ),
        "a negative shape": write.data(100, write.data(7, write.data(7, write.data(1, write.varint(-2))) + blob[:0])),
        "floats of three bytes": write.data(100, write.data(7, write.data(5, b"\0\0\0"))),
        "raw numbers of an unknown type": write.data(
            100, write.data(7, write.number(10, 4) + write.data(12, b"\0" * 8))
        ),
        "a layer that is a number": write.number(100, 3),
        "forty axes": write.data(100, write.data(7, write.data(7, write.data(1, b"\x01" * 40)) + blob[:0])),
    }


def test_hostile_bytes_are_refused(write: Any) -> None:
    for what, data in hostile(write).items():
        with pytest.raises(FormatError, match="at byte"):
            pytest.fail(f"{what} was read") if decode(data, "NetParameter") else None


def test_a_cut_file_is_refused_at_every_length_or_holds_fewer_layers(write: Any) -> None:
    data = write.caffemodel({"a": [NUMBERS], "b": [NUMBERS[0]]})
    whole = len(decode(data, "NetParameter").all("layer"))
    for length in range(len(data)):
        try:
            made = decode(data[:length], "NetParameter")
        except FormatError:
            continue
        assert len(made.all("layer")) < whole
