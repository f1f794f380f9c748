"""Zip archives of strangers: members by name, bounded in size, never written to disk.

Nothing is unpacked, so a member's path cannot lead anywhere. A member that claims far more than its packed bytes could
be worth is refused before memory is asked for.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kindling.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

BROKEN = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError, NotImplementedError, RuntimeError)
"""What the standard library raises for archives that are damaged, encrypted or packed by unknown methods."""
SMALL_BYTES = 64 << 20
"""Members up to this size may be packed as tightly as zip allows."""
MAX_RATIO = 100
"""Larger members may hold at most this many bytes for each packed one; trained weights pack to more than half."""
MAX_MEMBERS = 10_000
CHUNK_BYTES = 256 << 10
"""Read at a time: memory of this size is used again, larger pieces are asked of the kernel each time."""
_LOCAL_SIZES = 26
"""Where a member's own header has the lengths of its name and extra field, behind which its bytes begin."""


def brief(error: BaseException) -> str:
    """The first line of what went wrong, without the bytes that some messages quote."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line[:160] or type(error).__name__


class Stream:
    """A member that is being read."""

    def __init__(self, member: IO[bytes], where: str) -> None:
        self._member, self._where = member, where

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end.

        Raises: FormatError, when the archive is damaged there.
        """
        try:
            return self._member.read(count)
        except BROKEN as error:
            raise FormatError(f"{self._where} cannot be read: {brief(error)}. Is the file whole?") from error


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file of their own."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")[: max(self._size - self._at, 0)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(room) if len(room) else 0  # type: ignore[attr-defined]
        self._at += count
        return int(count)


class Zipped:
    """An open archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._members = {info.filename: info for info in archive.infolist()}

    def names(self) -> list[str]:
        """Every member."""
        return list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Bytes that the member claims to hold.

        Raises: FormatError, when it is missing, or claims more than its packed bytes could be worth.
        """
        info = self._members.get(name)
        if info is None:
            raise FormatError(f"{self.path} has no member {name!r}. Is it whole?")
        if info.file_size > SMALL_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise FormatError(
                f"{self.path}: {name!r} claims {info.file_size:,} bytes packed into {info.compress_size:,}, "
                f"more than {MAX_RATIO} for one. That is no file of weights; it is not unpacked."
            )
        return info.file_size

    def read(self, name: str, limit_bytes: int) -> bytes:
        """The whole of a small member.

        Raises: FormatError, when it is missing, damaged, or larger than `limit_bytes`.
        """
        size = self.size(name)
        if size > limit_bytes:
            raise FormatError(
                f"{self.path}: {name!r} holds {size:,} bytes, more than the {limit_bytes:,} that are read."
            )
        with self.open(name) as stream:
            return stream.read(limit_bytes + 1)

    def fill(self, name: str, count: int) -> Tensor:
        """The first `count` bytes of a large member, which is read to its end and held once, in memory of torch's.

        torch aligns it to what processors take at a time; a net whose weights are not is slower.

        Returns: uint8, shape (count,).
        Raises: FormatError, when it is missing, damaged, or shorter.
        """
        import torch

        self.size(name)
        data, at = torch.empty(0, dtype=torch.uint8), 0
        with self.open(name) as stream:
            while part := stream.read(CHUNK_BYTES):
                if not at:  # memory is asked for when there is something to put into it
                    data = torch.empty(count, dtype=torch.uint8)
                wanted = part[: max(count - at, 0)]
                data.numpy()[at : at + len(wanted)] = np.frombuffer(wanted, np.uint8)
                at += len(part)
        if at < count:
            raise FormatError(f"{self.path}: {name!r} holds {at:,} bytes where {count:,} are needed. Is it whole?")
        return data

    @contextlib.contextmanager
    def seekable(self, name: str, limit_bytes: int) -> Iterator[IO[bytes]]:
        """The member as a file to move about in: in place where it is not packed, else in memory.

        Raises: FormatError, when it is missing, damaged (it is read once to see that), or larger than `limit_bytes`.
        """
        info = self._members.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or self.size(name) > limit_bytes:
            yield io.BytesIO(self.read(name, limit_bytes))
            return
        with self.open(name) as stream:
            while stream.read(CHUNK_BYTES):  # to its end, where the checksum is compared
                pass
        with self.path.open("rb") as file:
            file.seek(info.header_offset + _LOCAL_SIZES)
            begin = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            with io.BufferedReader(_Part(file, begin, info.file_size)) as part:
                yield part

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Stream]:
        """The member as a stream; what goes wrong while it is read becomes a FormatError."""
        self.size(name)
        where = f"{self.path}: {name!r}"
        try:
            member = self._archive.open(self._members[name])
        except BROKEN as error:
            raise FormatError(f"{where} cannot be read: {brief(error)}. Is the file whole?") from error
        with member:
            yield Stream(member, where)


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[Zipped]:
    """Open an archive for reading.

    Raises: FormatError, when it is no archive, or has more than `MAX_MEMBERS` members.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.zip"
    ...     with zipfile.ZipFile(file, "w") as archive:
    ...         archive.writestr("model.ini", "[info]")
    ...     with open_zip(file) as zipped:
    ...         "model.ini" in zipped, zipped.read("model.ini", 100)
    (True, b'[info]')
    """
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise FormatError(f"{path} is a truncated or damaged archive: {brief(error)}. Fetch it again.") from error
    with archive:
        if len(archive.infolist()) > MAX_MEMBERS:
            raise FormatError(f"{path} has {len(archive.infolist()):,} members; more than {MAX_MEMBERS:,} are refused.")
        yield Zipped(path, archive)
