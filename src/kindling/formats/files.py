"""Opens a weight file by what is in it, whatever it is called: safetensors, PyTorch's pickle, Keras HDF5, NumPy's npz.

The readers are in `torch.py`, `keras.py` and `npz.py`; what a file's names mean is decided in `weights.py`.
"""

from __future__ import annotations

import hashlib
import mmap
import zipfile
from os import PathLike
from pathlib import Path

from kindling.errors import FormatError
from kindling.formats.stored import Stored

_KNOWN = "Weights are read from .safetensors, .pth, .h5 (Keras) and .npz files"


def open_weights(path: str | PathLike[str]) -> dict[str, Stored]:
    """The tensors of a weight file by name, with shapes; numbers are read later.

    Raises: FormatError, when the file is missing, truncated or of no known format.

    >>> import tempfile, numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.savez(f"{folder}/weights.npz", a=numpy.zeros((2, 3)))
    ...     open_weights(f"{folder}/weights.npz")["a"].shape
    (2, 3)
    """
    file = Path(path)
    if not file.exists():
        raise FormatError(f"there is no file {file}. {_KNOWN}.")
    if not file.is_file():
        raise FormatError(f"{file} is not a file. {_KNOWN}.")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise FormatError(f"{file} cannot be opened: {error.strerror}.") from error
    size = file.stat().st_size
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        from kindling.formats.keras import read_h5

        return read_h5(file)
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise FormatError(f"{file} is a truncated or damaged archive ({size:,} bytes). Fetch it again.") from error
        if members and all(member.endswith(".npy") for member in members):
            from kindling.formats.npz import read_npz

            return read_npz(file)
        if any(member.endswith("data.pkl") for member in members):
            from kindling.formats.torch import read_pth

            return read_pth(file)
        raise FormatError(f"{file} is an archive of other things ({', '.join(members[:3])} ...). {_KNOWN}.")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < (1 << 32):
        from kindling.formats.torch import read_safetensors

        return read_safetensors(file)
    if head[:1] == b"\x80":
        from kindling.formats.torch import read_pth

        return read_pth(file)
    raise FormatError(f"{file} ({size:,} bytes) {_what_it_is(head)}. {_KNOWN}.")


def _what_it_is(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page: the download did not reach the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    return f"begins with {head[:8]!r}, which no weight file does"


def mapped(path: Path) -> memoryview:
    """A file's bytes, of which the kernel reads what is used and takes back what it needs; none of an empty file.

    What is written into them stays in this process.
    Raises: FormatError, when it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            if path.stat().st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}.") from error


def file_digest(path: str | PathLike[str], algorithm: str = "sha256") -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()
