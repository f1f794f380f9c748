"""Reader of H2O's deep learning MOJOs, zipped (`.mojo`, `.zip`) or as a folder: `model.ini`, `domains/*.txt`.

The net's inputs are the columns, categories before numbers; one-hot encoding, standardisation and the place of missing
values become the preparation, the response's domain the labels. Sources: ModelMojoReader.java,
DeeplearningMojoReader.java, DeeplearningMojoModel.java, NeuralNetwork.java, GenModel.setInput of h2o-3.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.assemble import Assembly, Wire
from kindling.formats.files import file_digest
from kindling.formats.models import Imported, Peek
from kindling.formats.zipped import open_zip
from kindling.nets.layers_h2o import FixedScale
from kindling.prepare import CategoryStep, LabelStep, NumberStep, Preparation, Step, ValueStep

NAME = "H2O MOJO"
MODEL = "model.ini"
MAX_INI_BYTES = 1 << 30
MAX_DOMAIN_BYTES = 64 << 20
MAX_COLUMNS = 5_000
_MOST = 3e38

_ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {
    "Rectifier": nn.ReLU,
    "Tanh": nn.Tanh,
    "ExpRectifier": nn.ELU,
    "Maxout": None,
}
_IDENTITY_LINK = ("AUTO", "gaussian", "laplace", "huber", "quantile")
_LOG_LINK = ("poisson", "gamma", "tweedie")


def matches(peek: Peek) -> bool:
    """Whether this is an archive or a folder with a `model.ini`."""
    return MODEL in peek.members


def read(path: Path, *, unknown: str = "missing") -> Imported:
    """The net in a MOJO, with its columns' preparation.

    A classifier's softmax is left to prediction, as kindling's models give scores. Balanced classes are corrected in
    the last layer's bias; dropout's test-time factor goes into the weights behind it.

    Args:
        unknown: what a name that is in no domain counts as: `"missing"` (a null), as H2O does, or `"error"`.
    Raises: FormatError, for a damaged file, and for models of other kinds.
    """
    if unknown not in ("missing", "error"):
        raise ConfigError("unknown", unknown, "says nothing about unknown names", "Use 'missing' or 'error'")
    with _open(path) as files:
        info, columns, domains = _parse(files, str(path))
        mojo = _mojo(info, columns, domains, str(path))
    net = Assembly(str(path))
    wire, steps = _inputs(net, mojo, unknown)
    wire = _hidden(net, mojo, wire)
    return _imported(path, net, mojo, wire, steps)


# ------------------------------------------------------------------------------------------------------ the files


class _Files(Protocol):
    def read(self, name: str, limit_bytes: int) -> bytes: ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, limit_bytes: int) -> bytes:
        file = self.path / name
        try:
            if not file.is_file() or file.stat().st_size > limit_bytes:
                raise FormatError(f"{file} is missing, or larger than the {limit_bytes:,} bytes that are read.")
            return file.read_bytes()
        except OSError as error:
            raise FormatError(f"{file} cannot be opened: {error.strerror}.") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Files]:
    if path.is_dir():
        yield _Folder(path)
        return
    with open_zip(path) as zipped:
        yield zipped


def _text(files: _Files, name: str, limit: int, what: str) -> list[str]:
    try:
        return files.read(name, limit).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what}: {name!r} is no text.") from error


def _parse(files: _Files, what: str) -> tuple[dict[str, str], list[str], dict[int, list[str]]]:
    """Key -> value of [info], names of [columns], levels by column of [domains]."""
    info: dict[str, str] = {}
    columns: list[str] = []
    places: dict[int, tuple[int, str]] = {}
    section = ""
    for raw in _text(files, MODEL, MAX_INI_BYTES, what):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line in ("[info]", "[columns]", "[domains]"):
            section = line
        elif section == "[info]":
            key, _, value = line.partition("=")
            info[key.strip()] = value.strip()
        elif section == "[columns]":
            columns.append(line)
            if len(columns) > MAX_COLUMNS:
                raise FormatError(f"{what} has more than {MAX_COLUMNS:,} columns, which are refused.")
        elif section == "[domains]":
            found = re.fullmatch(r"(\d{1,9}):\s*(\d{1,9}) (d\d{1,9}\.txt)", line)
            if found is None:
                raise FormatError(f"{what}: {MODEL} names a domain by {line[:80]!r}.")
            places[int(found[1])] = (int(found[2]), found[3])
    domains = {}
    for column, (count, name) in places.items():
        if column >= len(columns):
            continue
        levels = _text(files, f"domains/{name}", MAX_DOMAIN_BYTES, what)
        if info.get("escape_domain_values") == "true":
            levels = [_unescaped(level) for level in levels]
        if len(levels) != count:
            raise FormatError(f"{what}: domains/{name} has {len(levels)} levels, {MODEL} says {count}.")
        domains[column] = levels
    return info, columns, domains


def _unescaped(level: str) -> str:
    r"""A level without the escapes of line ends.

    >>> _unescaped(r"two\nlines, one \\")
    'two\nlines, one \\'
    """
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "r": "\r"}.get(found[1], found[1]), level)


# ------------------------------------------------------------------------------------------------------ what they say


@dataclass(frozen=True, slots=True)
class _Mojo:
    what: str
    info: dict[str, str]
    columns: list[str]
    domains: dict[int, list[str]]
    categories: int
    offsets: list[int]
    multiply: np.ndarray
    subtract: np.ndarray
    units: list[int]
    activation: str
    drop: list[float]
    category: str
    response: str | None

    @property
    def numbers(self) -> int:
        return len(self.columns) - self.categories - (self.response is not None)


def _value(info: dict[str, str], key: str, what: str, default: str | None = None) -> str:
    value = info.get(key, default)
    if value is None:
        raise FormatError(f"{what}: {MODEL} does not say {key!r}. Is it whole?")
    return value


def _whole(info: dict[str, str], key: str, what: str) -> int:
    value = _value(info, key, what)
    if not re.fullmatch(r"\d{1,9}", value):
        raise FormatError(f"{what}: {key} is {value[:40]!r}, not a whole number.")
    return int(value)


def _numbers(info: dict[str, str], key: str, what: str, *, optional: bool = False) -> np.ndarray:
    """A list of numbers in square brackets, float64; empty where it may lack and does."""
    value = _value(info, key, what, "null" if optional else None)
    if optional and value in ("null", "[]", "[null]"):
        return np.empty(0)
    body = value[1:-1]
    if value[:1] + value[-1:] != "[]":
        raise FormatError(f"{what}: {key} is {value[:40]!r}, not a list of numbers.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            numbers = np.fromstring(body, sep=",") if body else np.empty(0)
    except (ValueError, DeprecationWarning) as error:
        raise FormatError(f"{what}: {key} holds something that is no number.") from error
    if body and len(numbers) != body.count(",") + 1:
        raise FormatError(f"{what}: {key} holds something that is no number.")
    if not (np.abs(numbers) < _MOST).all():
        raise FormatError(f"{what}: {key} holds numbers that are not finite in 32 bits.")
    return numbers


def _sizes(info: dict[str, str], key: str, what: str) -> list[int]:
    numbers = _numbers(info, key, what)
    if len(numbers) > 10_000 or (numbers != np.floor(numbers)).any() or (numbers < 0).any() or (numbers > 2**31).any():
        raise FormatError(f"{what}: {key} holds something that is no size.")
    return [int(size) for size in numbers]


def _mojo(info: dict[str, str], columns: list[str], domains: dict[int, list[str]], what: str) -> _Mojo:
    algorithm = _value(info, "algo", what)
    if algorithm != "deeplearning":
        raise FormatError(f"{what} is a MOJO of {algorithm!r}; of H2O's models, deep learning is read.")
    version = _value(info, "mojo_version", what)
    if not re.fullmatch(r"1\.\d{1,3}", version):
        raise FormatError(f"{what} has MOJO version {version[:20]!r}; deep learning of version 1 is read.")
    if len(columns) != _whole(info, "n_columns", what) or not columns:
        raise FormatError(f"{what}: {MODEL} lists {len(columns)} columns and says {info['n_columns']}.")
    if len(set(columns)) != len(columns):
        raise FormatError(f"{what}: {MODEL} lists a column twice.")
    encoding = info.get("_genmodel_encoding", "AUTO")
    if encoding not in ("AUTO", "OneHotInternal", "SortByResponse"):
        raise FormatError(
            f"{what} encodes categories by {encoding!r}; AUTO, OneHotInternal and SortByResponse are read. "
            "Train it with categorical_encoding='one_hot_internal'."
        )
    category = _value(info, "category", what)
    if category not in ("Regression", "Binomial", "Multinomial", "AutoEncoder"):
        raise FormatError(f"{what} is a model of category {category[:40]!r}, which is not read.")
    supervised = _value(info, "supervised", what) == "true"
    if supervised == (category == "AutoEncoder"):
        raise FormatError(f"{what} says supervised={supervised} of a {category}.")
    categories, numbers = _whole(info, "cats", what), _whole(info, "nums", what)
    offsets = _sizes(info, "cat_offsets", what) or [0]
    steps = np.diff(offsets)
    if categories + numbers + supervised != len(columns) or len(offsets) != categories + 1 or offsets[0] != 0:
        raise FormatError(
            f"{what} lists {len(columns)} columns, "
            f"but {categories} categories in {len(offsets) - 1} parts and {numbers} numbers."
        )
    units = _sizes(info, "neural_network_sizes", what)
    if len(units) < 2 or min(units) < 1 or (steps < 1).any() or units[0] != offsets[-1] + numbers:
        raise FormatError(f"{what}: layers of sizes {units[:8]} do not fit {offsets[-1]} + {numbers} inputs.")
    multiply, subtract = (_numbers(info, key, what, optional=True) for key in ("norm_mul", "norm_sub"))
    if not len(multiply):  # without standardisation
        multiply, subtract = np.ones(numbers), np.zeros(numbers)
    if len(multiply) != numbers or len(subtract) != numbers:
        raise FormatError(
            f"{what}: norm_mul and norm_sub hold {len(multiply)} and {len(subtract)} for {numbers} numbers."
        )
    name = _value(info, "activation", what)
    activation, _, suffix = name.partition("WithDropout")
    if activation not in _ACTIVATIONS or suffix:
        raise FormatError(f"{what}: activation {name[:40]!r} is not read; {', '.join(_ACTIVATIONS)} are.")
    drop = [0.0] * (len(units) - 1)
    if name.endswith("WithDropout"):
        drop = [float(ratio) for ratio in _numbers(info, "hidden_dropout_ratios", what)][: len(drop)]
        if len(drop) != len(units) - 1 or not all(0 <= ratio < 1 for ratio in drop):
            raise FormatError(f"{what}: hidden_dropout_ratios do not fit {len(units) - 2} hidden layers.")
    for column in range(categories):
        if column not in domains:
            raise FormatError(f"{what}: column {columns[column]!r} is a category without a domain.")
    return _Mojo(
        what, info, columns, domains, categories, offsets, multiply, subtract, units, activation, drop, category,
        columns[-1] if supervised else None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the net


def _inputs(net: Assembly, mojo: _Mojo, unknown: str) -> tuple[Wire, tuple[Step, ...]]:
    """One input per column, joined in the order of the first layer's weights."""
    wires: list[Wire] = []
    steps: list[Step] = []
    drop_first = _value(mojo.info, "use_all_factor_levels", mojo.what) != "true"
    for place, column in enumerate(mojo.columns[: mojo.categories + mojo.numbers]):
        if place < mojo.categories:
            width = mojo.offsets[place + 1] - mojo.offsets[place]
            levels = mojo.domains[place]
            if width > len(levels) + 1 or not levels or len(set(levels)) != len(levels):
                raise FormatError(f"{mojo.what}: column {column!r} has {len(levels)} levels and {width} inputs.")
            steps.append(CategoryStep(column, column, tuple(levels), width, drop_first, unknown))
        else:
            width, number = 1, place - mojo.categories
            mean, scale = float(mojo.subtract[number]), float(mojo.multiply[number])
            steps.append(NumberStep(column, column, mean, scale, missing=mean))
        wires.append(net.input(column, (width,)))
    return (net.call("row", torch.cat, wires, 1) if len(wires) > 1 else wires[0]), tuple(steps)


def _hidden(net: Assembly, mojo: _Mojo, wire: Wire) -> Wire:
    """The layers; the last one's activation belongs to autoencoders only."""
    factor = 1.0
    last = len(mojo.units) - 2
    for place, (n_in, n_out) in enumerate(zip(mojo.units, mojo.units[1:], strict=False)):
        name = "output" if place == last else f"hidden{place + 1}"
        activated = place != last or mojo.category == "AutoEncoder"
        pieces = 1
        weight = _numbers(mojo.info, f"weight_layer{place}", mojo.what)
        bias = _numbers(mojo.info, f"bias_layer{place}", mojo.what)
        if mojo.activation == "Maxout" and activated:
            pieces = max(len(bias) // n_out, 1)
        if len(bias) != n_out * pieces or len(weight) != n_in * n_out * pieces or pieces > 64:
            raise FormatError(
                f"{mojo.what}: layer {name!r} from {n_in} to {n_out} has {len(weight):,} weights "
                f"and {len(bias):,} biases."
            )
        if place == last:
            bias = bias + _class_balance(mojo, n_out)
        matrix = weight.reshape(n_out, n_in, pieces).transpose(0, 2, 1).reshape(n_out * pieces, n_in) * factor
        # Dropout in H2O does not enlarge what it keeps: prediction shrinks it instead, here in the weights behind it.
        factor = 1.0 - mojo.drop[place] if activated else 1.0
        wire = _layer(net, mojo, name, wire, matrix, bias, pieces, activated)
        if activated and place != last and mojo.drop[place] > 0:
            ratio = mojo.drop[place]
            wire = net.layer(f"{name}_dropout", lambda ratio=ratio: nn.Dropout(ratio), wire)  # type: ignore[misc]
    if factor != 1.0 and mojo.category == "AutoEncoder":
        wire = _scaled(net, "output_shrunk", wire, np.full(mojo.units[-1], factor), np.zeros(mojo.units[-1]))
    return wire


def _layer(
    net: Assembly,
    mojo: _Mojo,
    name: str,
    wire: Wire,
    weight: np.ndarray,
    bias: np.ndarray,
    pieces: int,
    activated: bool,
) -> Wire:
    tensors = {"weight": _tensor(weight), "bias": _tensor(bias)}
    rows, columns = weight.shape
    if pieces > 1:
        wire = net.layer(f"{name}_pieces", lambda: nn.Linear(columns, rows), wire, tensors=tensors)
        wire = net.layer(f"{name}_groups", lambda: nn.Unflatten(1, (rows // pieces, pieces)), wire)
        return net.call(name, torch.amax, wire, 2)
    wire = net.layer(name, lambda: nn.Linear(columns, rows), wire, tensors=tensors)
    make = _ACTIVATIONS[mojo.activation]
    if not activated or make is None:
        return wire
    return net.layer(f"{name}_{make.__name__.lower()}", make, wire)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _class_balance(mojo: _Mojo, classes: int) -> np.ndarray:
    """What training on balanced classes adds to the scores: log(prior / seen), as GenModel.correctProbabilities."""
    if mojo.info.get("balance_classes") != "true" or mojo.category not in ("Binomial", "Multinomial"):
        return np.zeros(classes)
    prior, seen = (_numbers(mojo.info, key, mojo.what) for key in ("prior_class_distrib", "model_class_distrib"))
    if len(prior) != classes or len(seen) != classes or (prior < 0).any() or (seen < 0).any():
        raise FormatError(f"{mojo.what}: the classes' shares do not fit {classes} classes.")
    kept = (prior > 0) & (seen > 0)
    return np.where(kept, np.log(np.where(kept, prior, 1)) - np.log(np.where(kept, seen, 1)), 0)


def _scaled(net: Assembly, name: str, wire: Wire, scale: np.ndarray, shift: np.ndarray) -> Wire:
    size = len(scale)
    return net.layer(name, lambda: FixedScale(size), wire, tensors={"scale": _tensor(scale), "shift": _tensor(shift)})


def _imported(path: Path, net: Assembly, mojo: _Mojo, wire: Wire, steps: Sequence[Step]) -> Imported:
    labels: tuple[str, ...] | None = None
    targets: tuple[Step, ...] = ()
    family = _value(mojo.info, "distribution", mojo.what)
    name = "output"
    about: dict[str, Any] = {}
    if mojo.category == "AutoEncoder":
        name, ones = "reconstruction", np.ones(mojo.offsets[-1])
        scale = np.concatenate([ones, 1 / np.where(mojo.multiply == 0, 1, mojo.multiply)])
        wire = _scaled(net, name, wire, scale, np.concatenate([0 * ones, mojo.subtract]))
    elif mojo.category == "Regression":
        assert mojo.response is not None
        wire, name = _response(net, mojo, wire, family)
        targets = (ValueStep("target", mojo.response, (1,)),)
    else:
        assert mojo.response is not None
        domain = mojo.domains.get(len(mojo.columns) - 1)
        if domain is None or len(domain) != mojo.units[-1] or len(set(domain)) != len(domain):
            raise FormatError(f"{mojo.what}: the response's domain does not name {mojo.units[-1]} classes.")
        if family == "modified_huber":
            raise FormatError(f"{mojo.what}: 'modified_huber' does not score in H2O's own MOJO; train another.")
        labels = tuple(domain)
        targets = (LabelStep("target", mojo.response, labels),)
        about["scores"] = "before the softmax, which prediction applies"
        about["default_threshold"] = mojo.info.get("default_threshold", "0.5")[:20]
    module, signature = net.finish({name: wire})
    digest = file_digest(path / MODEL if path.is_dir() else path)
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation(tuple(steps), targets),
        labels=labels,
        name=path.stem,
        source={
            "file": path.name,
            "sha256": digest,
            "format": NAME,
            "version": mojo.info["mojo_version"],
            "h2o_version": mojo.info.get("h2o_version", "")[:40],
            "category": mojo.category,
            "distribution": family[:40],
            "preparation": "columns, domains, standardisation and missing values as the MOJO states them",
            **about,
        },
    )


def _response(net: Assembly, mojo: _Mojo, wire: Wire, family: str) -> tuple[Wire, str]:
    """From the standardised response back to its units, and through the inverse link."""
    multiply, subtract = (_numbers(mojo.info, f"norm_resp_{key}", mojo.what, optional=True) for key in ("mul", "sub"))
    name = "output"
    if len(multiply):
        if len(multiply) != mojo.units[-1] or len(subtract) != len(multiply) or (multiply == 0).any():
            raise FormatError(f"{mojo.what}: norm_resp_mul and norm_resp_sub do not fit one response.")
        name = "response"
        wire = _scaled(net, name, wire, 1 / multiply, subtract)
    if family in _LOG_LINK:
        name = "inverse_link"
        wire = net.call("inverse_link", torch.clamp, net.call("exponential", torch.exp, wire), max=1e19)
    elif family not in _IDENTITY_LINK:
        raise FormatError(
            f"{mojo.what}: distribution {family[:40]!r} is not read; {', '.join((*_IDENTITY_LINK, *_LOG_LINK))} are."
        )
    return wire, name
