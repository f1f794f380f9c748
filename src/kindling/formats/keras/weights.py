"""Where a Keras layer's weights come from: a weight file of Keras 3, one of Keras 1 and 2, or its initialisers.

A layer takes its weights one by one, in Keras's order, saying the shape it needs; nothing is read that has another.
Keras 3 stores arrays by the classes of the layers (`layers/conv2d_1/vars/0`), earlier versions by their names.
Sources: `saving_lib.py` of Keras 3, `legacy_h5_format.py`, `initializers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kindling.errors import FormatError
from kindling.formats.keras.h5 import BROKEN, hard, names_of

MAX_RATIO = 1100
"""HDF5's filters make at most so many bytes of one; what announces more is refused."""

Fields = Mapping[str, Any]


class Store(Protocol):
    """The weights of one layer or model."""

    def take(self, role: str, shape: Sequence[int], fields: Fields) -> Tensor:
        """The next array: of this shape, float32.

        Args:
            role: what Keras calls it (`"kernel"`); where there is no file, the initialiser of that role makes it.
        Raises: FormatError.
        """

    def part(self, attribute: str) -> Store:
        """The weights of an object that the layer holds: `"cell"`, `"forward_layer"`."""

    def members(self, layers: Iterable[tuple[str, str]]) -> list[Store]:
        """The weights of a model's layers, given as name and class."""

    def done(self) -> None:
        """Raises: FormatError, when the layer has weights left."""


def snake_case(name: str) -> str:
    """The name that Keras 3 stores a layer of a class under.

    >>> snake_case("BatchNormalization"), snake_case("Conv2D"), snake_case("LSTM"), snake_case("MyReLU")
    ('batch_normalization', 'conv2d', 'lstm', 'my_re_lu')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def read_dataset(dataset: Any, shape: Sequence[int], where: str) -> Tensor:
    """An array of exactly this shape, float32.

    Raises: FormatError.
    """
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise FormatError(f"{where} is no array.")
    if tuple(dataset.shape or ()) != tuple(shape):
        seen, need = (" x ".join(map(str, side)) or "one number" for side in (dataset.shape or (), shape))
        raise FormatError(f"{where} is {seen} in the file, the layer needs {need}.")
    if dataset.external or dataset.is_virtual:
        raise FormatError(f"{where} keeps its numbers in another file, which is not read.")
    if dataset.nbytes > (1 << 20) and dataset.id.get_storage_size() * MAX_RATIO < dataset.nbytes:
        raise FormatError(f"{where} announces more numbers than the file holds.")
    try:
        array = dataset[()]
        if str(dataset.attrs.get("dtype", "")) == "bfloat16":
            bits = np.ascontiguousarray(array).view(np.int16)
            return torch.from_numpy(bits.reshape(shape)).view(torch.bfloat16).float()
    except BROKEN as error:
        raise FormatError(f"{where} cannot be read: {str(error)[:160]}. Is the file whole?") from error
    if array.dtype.kind not in "fiu":
        raise FormatError(f"{where} holds {array.dtype}, not numbers.")
    return torch.from_numpy(np.asarray(array, np.float32, order="C").reshape(shape))


class Grouped:
    """Keras 3's `.weights.h5`, also inside `.keras`."""

    def __init__(self, group: Any, what: str, path: str = "") -> None:
        """
        Args:
            group: of h5py; None for a layer of which the file has nothing.
        """
        self._group, self._what, self._path, self._next = group, what, path, 0

    def _child(self, name: str) -> Any:

        if self._group is None:
            return None
        kind = self._group.get(name, getlink=True, getclass=True)
        if kind is None:
            return None
        return hard(self._group, name, self._what)

    def take(self, role: str, shape: Sequence[int], fields: Fields) -> Tensor:
        variables = self._child("vars")
        where = f"{self._what}: {self._path}/vars/{self._next} ({role})"
        if variables is None or str(self._next) not in variables:
            raise FormatError(f"{where} is not in the file.")
        self._next += 1
        return read_dataset(hard(variables, str(self._next - 1), self._what), shape, where)

    def part(self, attribute: str) -> Grouped:
        return Grouped(self._child(attribute), self._what, f"{self._path}/{attribute}")

    def members(self, layers: Iterable[tuple[str, str]]) -> list[Store]:
        # tf.keras 2.12 and later wrote `.keras` too, under the layers' own names for functional models
        by_name, by_class = self._child("_layer_checkpoint_dependencies"), self._child("layers")
        found: list[Store] = []
        counts: dict[str, int] = {}
        for name, kind in layers:
            stored = snake_case(kind)
            counts[stored] = count = counts.get(stored, -1) + 1
            stored += f"_{count}" if count else ""
            if by_class is None and by_name is not None:
                holder, stored, home = by_name, name, "_layer_checkpoint_dependencies"
            else:
                holder, home = by_class, "layers"
            child = None
            if holder is not None and stored in holder:
                child = hard(holder, stored, self._what)
            found.append(Grouped(child, self._what, f"{self._path}/{home}/{stored}"))
        return found

    def done(self) -> None:
        variables = self._child("vars")
        if variables is not None and len(variables) > self._next:
            raise FormatError(
                f"{self._what}: {self._path} has {len(variables)} arrays in the file, its layer takes {self._next}."
            )


class Listed:
    """Keras 1's and 2's `.h5`: one list of arrays by layer."""

    def __init__(self, root: Any, what: str, name: str = "", entries: list[str] | None = None) -> None:
        self._root, self._what, self._name, self._entries, self._next = root, what, name, entries, 0

    def take(self, role: str, shape: Sequence[int], fields: Fields) -> Tensor:
        entries = self._entries or []
        if self._next >= len(entries):
            raise FormatError(
                f"{self._what}: layer {self._name[:80]!r} has {len(entries)} arrays in the file; {role} is not there."
            )
        entry = entries[self._next]
        self._next += 1
        dataset = hard(self._root, entry, self._what)
        return read_dataset(dataset, shape, f"{self._what}: {self._name}/{entry.rpartition('/')[2]} ({role})")

    def part(self, attribute: str) -> Listed:
        return self

    def members(self, layers: Iterable[tuple[str, str]]) -> list[Store]:
        if self._entries is None:
            top = set(names_of(self._root, "layer_names"))
            found: list[Store] = []
            for name, _ in layers:
                entries: list[str] = []
                if name in top:
                    group = hard(self._root, name, self._what)
                    entries = [f"{name}/{entry}" for entry in names_of(group, "weight_names")]
                found.append(Listed(self._root, self._what, name, entries))
            return found
        # A model in the model has one list, of trained arrays and then of others: a layer's own keep their order.
        inner = [(name, [entry for entry in self._entries if name in entry.split("/")[1:-1]]) for name, _ in layers]
        self._next = len(self._entries)
        return [Listed(self._root, self._what, f"{self._name}/{name}", entries) for name, entries in inner]

    def done(self) -> None:
        if self._entries is not None and self._next < len(self._entries):
            raise FormatError(
                f"{self._what}: layer {self._name[:80]!r} has {len(self._entries)} arrays in the file, "
                f"it takes {self._next}."
            )


class Fresh:
    """No file: weights as the initialisers make them."""

    def __init__(self, what: str, seed: int | None, budget: list[int]) -> None:
        self._what, self._budget = what, budget
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def take(self, role: str, shape: Sequence[int], fields: Fields) -> Tensor:
        self._budget[0] -= math.prod(shape)
        if self._budget[0] < 0:
            raise FormatError(f"{self._what} has more weights than are made without a file; see max_parameters=.")
        default = "ones" if role in ("gamma", "moving_variance", "variance") else "zeros"
        if role.endswith(("kernel", "embeddings")):
            default = "glorot_uniform"
        return initial(fields.get(f"{role}_initializer"), shape, default, self._generator, self._what)

    def part(self, attribute: str) -> Fresh:
        return self

    def members(self, layers: Iterable[tuple[str, str]]) -> list[Store]:
        return [self for _ in layers]

    def done(self) -> None:
        return None


def initial(given: Any, shape: Sequence[int], default: str, generator: torch.Generator | None, what: str) -> Tensor:
    """Weights as one of Keras's initialisers makes them.

    Raises: FormatError, for an initialiser that is not known.

    >>> initial({"class_name": "Constant", "config": {"value": 2.0}}, (2,), "zeros", None, "x")
    tensor([2., 2.])
    """
    kind: Any = given
    config: Any = {}
    if isinstance(given, dict):
        kind, config = given.get("class_name"), given.get("config") or {}
    name = snake_case(str(kind or default)) if kind != "GlorotUniformV2" else "glorot_uniform"
    out = torch.empty(tuple(shape))

    def number(key: str, otherwise: float) -> float:
        value = config.get(key, otherwise) if isinstance(config, dict) else otherwise
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{what}: initialiser {name[:60]!r} has {key}={str(value)[:40]}.")
        return float(value)

    if name in ("zeros", "zero", "ones", "one", "constant"):
        value = {"z": 0.0, "o": 1.0}.get(name[0])
        return out.fill_(number("value", 0.0) if value is None else value)
    if name in ("random_uniform", "uniform"):
        low, high = number("minval", -0.05), number("maxval", 0.05)
        return out.uniform_(min(low, high), max(low, high), generator=generator)
    if name in ("random_normal", "normal"):
        return out.normal_(number("mean", 0.0), abs(number("stddev", 0.05)), generator=generator)
    if name == "truncated_normal":
        mean, std = number("mean", 0.0), abs(number("stddev", 0.05)) or 1e-12
        return torch.nn.init.trunc_normal_(out, mean, std, mean - 2 * std, mean + 2 * std, generator=generator)
    if name in ("orthogonal", "orthogonal_initializer") and len(shape) >= 2:
        matrix = torch.nn.init.orthogonal_(torch.empty(math.prod(shape[:-1]), shape[-1]), generator=generator)
        return matrix.reshape(tuple(shape)) * number("gain", 1.0)
    receptive = math.prod(shape[:-2])
    fan_in = shape[-2] * receptive if len(shape) > 1 else math.prod(shape)
    fan_out = shape[-1] * receptive if len(shape) > 1 else math.prod(shape)
    rules = {
        "glorot": (1.0, (fan_in + fan_out) / 2),
        "xavier": (1.0, (fan_in + fan_out) / 2),
        "he": (2.0, fan_in),
        "lecun": (1.0, fan_in),
    }
    family, _, spread = name.partition("_")
    if name == "variance_scaling":
        fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
        mode = config.get("mode", "fan_in") if isinstance(config, dict) else "fan_in"
        rules, family = {"": (number("scale", 1.0), fans.get(str(mode), fan_in))}, ""
        spread = "uniform" if isinstance(config, dict) and config.get("distribution") == "uniform" else "normal"
    if family not in rules or spread not in ("uniform", "normal"):
        raise FormatError(f"{what}: initialiser {name[:60]!r} is not known.")
    scale, fan = rules[family]
    variance = abs(scale) / max(fan, 1)
    if spread == "uniform":
        bound = math.sqrt(3 * variance)
        return out.uniform_(-bound, bound, generator=generator)
    std = math.sqrt(variance) / 0.87962566103423978 or 1e-12  # of a normal distribution cut at two deviations
    return torch.nn.init.trunc_normal_(out, 0.0, std, -2 * std, 2 * std, generator=generator)
