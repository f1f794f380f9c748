"""Members of archives: in place or in memory, whole or refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from kindling.errors import FormatError
from kindling.formats.zipped import open_zip

DATA = bytes(range(256)) * 40


def archive(path: Path, packed: bool) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as out:
        out.writestr("first.txt", "something before it")
        out.writestr("weights", DATA)
        out.writestr("last.txt", "something behind it")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_member_is_a_file_to_move_about_in(tmp_path: Path, packed: bool) -> None:
    with open_zip(archive(tmp_path / "a.zip", packed)) as zipped, zipped.seekable("weights", 1 << 20) as file:
        assert file.read() == DATA
        assert file.read(1) == b""
        assert file.seek(-3, io.SEEK_END) == len(DATA) - 3
        assert file.read(10) == DATA[-3:]
        file.seek(300)
        file.seek(-44, io.SEEK_CUR)
        assert file.read(4) == DATA[256:260]
        room = bytearray(1000)
        assert file.readinto(room) == 1000  # type: ignore[attr-defined]
        assert room == DATA[260:1260]


@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_seen_before_a_member_is_used(tmp_path: Path, packed: bool) -> None:
    file = archive(tmp_path / "a.zip", packed)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as there:
        at = there.getinfo("weights").header_offset + 30 + len("weights") + 20
    data[at] ^= 255
    file.write_bytes(bytes(data))
    with (
        pytest.raises(FormatError, match="cannot be read"),
        open_zip(file) as zipped,
        zipped.seekable("weights", 1 << 20),
    ):
        pass
    with pytest.raises(FormatError, match="cannot be read"), open_zip(file) as zipped:
        zipped.fill("weights", 10)


def test_a_member_that_is_missing_or_too_large_is_refused(tmp_path: Path) -> None:
    with open_zip(archive(tmp_path / "a.zip", False)) as zipped:
        with pytest.raises(FormatError, match="no member 'other'"), zipped.seekable("other", 10):
            pass
        with pytest.raises(FormatError, match="more than the 10 that are read"), zipped.seekable("weights", 10):
            pass


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_bytes_of_a_member(tmp_path: Path, packed: bool) -> None:
    with open_zip(archive(tmp_path / "a.zip", packed)) as zipped:
        assert zipped.fill("weights", len(DATA)).numpy().tobytes() == DATA
        assert zipped.fill("weights", 100).numpy().tobytes() == DATA[:100]
        with pytest.raises(FormatError, match="holds 10,240 bytes where 10,241 are needed"):
            zipped.fill("weights", len(DATA) + 1)
