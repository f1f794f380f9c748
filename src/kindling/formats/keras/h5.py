"""Keras's HDF5 files: opened safely, and the weights of `save_weights` and whole models of Keras 1 and 2 by layer.

Old files name arrays freely (`uniform7`, `block1_conv1_W_1:0`), so an array's meaning is taken from its place among its
layer's arrays, as Keras itself does. Names returned are `layer/kernel`, `layer/bias`, and for batch normalisation
`layer/gamma`, `layer/beta`, `layer/moving_mean`, `layer/moving_variance`. Kernels are left as Keras orders them
(height, width, in, out); `formats/weights.py` turns them. Whole models are read by `read` of the package. Needs h5py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kindling.errors import FormatError, KindlingError, MissingExtraError
from kindling.formats.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

_ROLES = {1: ("kernel",), 2: ("kernel", "bias"), 4: ("gamma", "beta", "moving_mean", "moving_variance")}
BROKEN = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, UnicodeDecodeError)


def read_h5(path: Path) -> dict[str, Stored]:
    """The weights of a Keras HDF5 file; only shapes are read here.

    Raises: FormatError, when the file is truncated, is no Keras weight file, or points to other files;
        MissingExtraError, without h5py.
    """
    weights: dict[str, Stored] = {}
    with opened(path) as root:
        if not has_names(root) and "model_weights" in root:
            root = hard(root, "model_weights", path)
        if not has_names(root):
            raise FormatError(
                f"{path} is HDF5 but names no Keras layers (no `layer_names`). Keras's old format is read: "
                "`save_weights('x.h5')` of Keras 2, or a file that Keras publishes for the net."
            )
        for layer in names_of(root, "layer_names"):
            group = hard(root, layer, path)
            names = names_of(group, "weight_names")
            datasets = [hard(group, name, path) for name in names]
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

    with opened(path) as root:
        array = root[where][()]
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


@contextlib.contextmanager
def opened(path: Path, content: IO[bytes] | None = None) -> Iterator[Any]:
    """The root of an HDF5 file; what goes wrong while it is read becomes a FormatError.

    Args:
        content: the file itself, where it is not on disk.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError.of("Reading .h5 files", "h5py", "keras") from error
    try:
        with h5py.File(path if content is None else content, "r") as file:
            yield file
    except KindlingError:
        raise
    except BROKEN as error:
        raise FormatError(f"{path} cannot be read as a Keras HDF5 file: {error}. Is it whole?") from error


def hard(group: Any, name: str, path: Path | str) -> Any:
    """The member of that name, walked part by part: a link to another file is refused, not followed."""
    import h5py

    for part in name.strip("/").split("/"):
        if not isinstance((group.get(part, getlink=True) if isinstance(group, h5py.Group) else None), h5py.HardLink):
            raise FormatError(f"{path}: {name!r} is missing, or a link; links are not followed.")
        group = group[part]
    return group


def has_names(group: Any) -> bool:
    """Whether a group is the root of Keras's old format."""
    return "layer_names" in group.attrs or "layer_names0" in group.attrs


def names_of(group: Any, attribute: str) -> list[str]:
    """A list of names among a group's attributes; Keras cuts long lists into numbered pieces."""
    if attribute in group.attrs:
        return [text_of(name) for name in group.attrs[attribute]]
    found: list[str] = []
    place = 0
    while f"{attribute}{place}" in group.attrs:
        found += [text_of(name) for name in group.attrs[f"{attribute}{place}"]]
        place += 1
    if not place:
        raise KeyError(f"attribute {attribute!r} is missing")
    return found


def text_of(name: Any) -> str:
    """An attribute's text."""
    return name.decode() if isinstance(name, bytes) else str(name)
