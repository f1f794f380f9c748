"""Readers of PyTorch's weight files: `.safetensors`, and `.pth` with nothing but tensors in it.

A `.pth` is a pickle. It is opened with `weights_only=True` alone: anything in it that is not a plain tensor or a
container of them is refused, and nothing from it is run. What the names mean is decided in `weights.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kindling.errors import FormatError
from kindling.formats.stored import Stored

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts commonly put the weights."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put in front of every name."""
_SAFETENSORS_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    "U8": "uint8",
    "BF16": "bfloat16",
    "BOOL": "bool",
}

V = TypeVar("V")


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a `.safetensors` file.

    Raises: FormatError, when the file is truncated, altered or not of that format.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.bias": torch.ones(2)}, f"{folder}/w.safetensors")
    ...     stored = read_safetensors(Path(folder) / "w.safetensors")
    ...     stored["fc.bias"].shape, stored["fc.bias"].read()
    ((2,), tensor([1., 1.]))
    """
    try:
        file = safe_open(str(path), framework="pt")
        tensors = {}
        for name in file.keys():  # type: ignore[no-untyped-call]
            view = file.get_slice(name)  # type: ignore[no-untyped-call]
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype().lower())
            tensors[name] = Stored(tuple(view.get_shape()), dtype, partial(_read_safetensor, path, file, name))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as safetensors: {error}. Is it whole?") from error
    return without_prefix(tensors)


def _read_safetensor(path: Path, file: safe_open, name: str) -> Tensor:
    try:
        return file.get_tensor(name).clone()  # type: ignore[no-untyped-call, no-any-return]
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: {name!r} cannot be read: {error}. Is the file whole?") from error


def read_pth(path: Path) -> dict[str, Stored]:
    """The tensors of a `.pth` or `.pt` file (old or new format) that holds a state dict, bare or under `state_dict`.

    Raises: FormatError, when it is truncated, or holds anything but tensors (nothing in it is run).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": {"module.fc.bias": torch.ones(2)}}, f"{folder}/w.pth")
    ...     {name: stored.shape for name, stored in read_pth(Path(folder) / "w.pth").items()}
    {'fc.bias': (2,)}
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the safety off: it is not repeated.
        raise FormatError(
            f"{path} is truncated, or holds more than tensors and names; nothing in it was run. "
            "Save `model.state_dict()` instead of the model, best as .safetensors."
        ) from error
    except Exception as error:  # torch's unpickler meets damage with anything: struct.error, KeyError, EOFError ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} cannot be read as a PyTorch weight file: {first}. Is it whole?") from error
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise FormatError(f"{path} holds a {type(data).__name__}, not names with tensors. Save `model.state_dict()`.")
    tensors = {}
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise FormatError(
                f"{path} holds {name!r}: {type(value).__name__}, not a dense tensor. Save `model.state_dict()` alone."
            )
        tensors[name] = Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), partial(_own, value))
    return without_prefix(tensors)


def _own(value: Tensor) -> Tensor:
    # Views into one storage (hostile or tied) get memory of their own; an ordinary tensor already has it.
    value = value.detach()
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def without_prefix(tensors: dict[str, V]) -> dict[str, V]:
    """Names without the `module.` or `_orig_mod.` that wrappers put in front of all of them.

    >>> without_prefix({"module.a": 1, "module.b": 2}), without_prefix({"module.a": 1, "b": 2})
    ({'a': 1, 'b': 2}, {'module.a': 1, 'b': 2})
    """
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
