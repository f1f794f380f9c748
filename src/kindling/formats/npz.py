"""Reader of NumPy's `.npz`: one array per name, no pickled objects. What the names mean is decided in `weights.py`."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kindling.errors import FormatError
from kindling.formats.stored import Stored
from kindling.formats.zipped import BROKEN

if TYPE_CHECKING:
    from torch import Tensor


def read_npz(path: Path) -> dict[str, Stored]:
    """The arrays of an `.npz` file, by the names they were saved under; only headers are read here.

    Raises: FormatError, when the file is truncated or holds pickled objects (nothing in it is run).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/w.npz", **{"fc.bias": np.ones(2, np.float32)})
    ...     stored = read_npz(Path(folder) / "w.npz")
    ...     stored["fc.bias"].shape, stored["fc.bias"].read()
    ((2,), tensor([1., 1.]))
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    old = np.lib.format.read_magic(stream) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                if dtype.hasobject:
                    raise FormatError(f"{path}: {member!r} holds pickled objects; only arrays of numbers are read.")
                name = member.removesuffix(".npy")
                arrays[name] = Stored(tuple(shape), dtype.newbyteorder("=").name, partial(_read_array, path, name))
    except BROKEN as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} cannot be read as .npz: {error}. Is it whole?") from error
    return arrays


def _read_array(path: Path, name: str) -> Tensor:
    import torch

    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
    except BROKEN as error:
        raise FormatError(f"{path}: {name!r} cannot be read: {error}. Is the file whole?") from error
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
