"""Reader of Keras weight files in HDF5 (`save_weights` and whole models of Keras 1 and 2: `.h5`, `.hdf5`).

Old files name arrays freely (`uniform7`, `block1_conv1_W_1:0`), so an array's meaning is taken from its place among its
layer's arrays, as Keras itself does. Names returned are `layer/kernel`, `layer/bias`, and for batch normalisation
`layer/gamma`, `layer/beta`, `layer/moving_mean`, `layer/moving_variance`. Kernels are left as Keras orders them
(height, width, in, out); `weights.py` turns them. The architecture in a whole-model file is not read. Needs h5py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kindling.errors import FormatError, MissingExtraError
from kindling.formats.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

_ROLES = {1: ("kernel",), 2: ("kernel", "bias"), 4: ("gamma", "beta", "moving_mean", "moving_variance")}
_BROKEN = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, UnicodeDecodeError)


def read_h5(path: Path) -> dict[str, Stored]:
    """The weights of a Keras HDF5 file; only shapes are read here.

    Raises: FormatError, when the file is truncated, is no Keras weight file, or points to other files;
        MissingExtraError, without h5py.
    """
    weights: dict[str, Stored] = {}
    with _opened(path) as root:
        if "layer_names" not in root.attrs and "model_weights" in root:
            root = _hard(root, "model_weights", path)
        if "layer_names" not in root.attrs:
            raise FormatError(
                f"{path} is HDF5 but names no Keras layers (no `layer_names`). Keras's old format is read: "
                "`save_weights('x.h5')` of Keras 2, or a file that Keras publishes for the net."
            )
        for layer in map(_text, root.attrs["layer_names"]):
            group = _hard(root, layer, path)
            names = [_text(name) for name in group.attrs["weight_names"]]
            datasets = [_hard(group, name, path) for name in names]
            roles = _ROLES.get(len(names), tuple(f"array{place}" for place in range(len(names))))
            for role, name, dataset in zip(roles, names, datasets, strict=True):
                if dataset.external or dataset.is_virtual:
                    raise FormatError(f"{path}: {layer}/{name} keeps its numbers in another file, which is not read.")
                where = f"{root.name.rstrip('/')}/{layer}/{name}"
                dtype = dataset.dtype.newbyteorder("=").name
                weights[f"{layer}/{role}"] = Stored(tuple(dataset.shape), dtype, partial(_read_dataset, path, where))
    return weights


def _read_dataset(path: Path, where: str) -> Tensor:
    import torch

    with _opened(path) as root:
        array = root[where][()]
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError.of("Reading .h5 files", "h5py", "keras") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FormatError:
        raise
    except _BROKEN as error:
        raise FormatError(f"{path} cannot be read as a Keras HDF5 file: {error}. Is it whole?") from error


def _hard(group: Any, name: str, path: Path) -> Any:
    """The member of that name, walked part by part: a link to another file is refused, not followed."""
    import h5py

    for part in name.strip("/").split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise FormatError(f"{path}: {name!r} is missing, or a link; links are not followed.")
        group = group[part]
    return group


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
