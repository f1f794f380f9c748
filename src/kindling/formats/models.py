"""Whole models of other systems in: a registry of readers, and what each of them returns.

A reader is a module of this package with `matches` and `read`. `open_model` finds the one for a path by what is in
the file, whatever it is called. Weight files for nets that kindling has itself are in `files.py` and `weights.py`.
"""

from __future__ import annotations

import importlib
import inspect
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from kindling.errors import ConfigError, FormatError
from kindling.prepare import Augmentation, Preparation
from kindling.signature import Signature

if TYPE_CHECKING:
    from torch import nn

READERS: tuple[str, ...] = ("dl4j", "h2o", "pt2", "onnx", "caffe", "bigdl", "keras", "tensorflow", "tflite")
"""Modules of this package that read whole models, the pickier first."""
LIBRARIES = ("torchvision", "timm", "hf", "keras")
"""Prefixes of names that `hub.py` opens."""
HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a format says about training the model, beside its layers."""

    loss: nn.Module | None = None
    """Called with the module's outputs and the targets; gives one number. A single tensor may stand for a dict."""
    metrics: Mapping[str, nn.Module] = field(default_factory=dict)
    """By name; called like the loss."""
    multipliers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Parameter name -> factors on the learning rate and on the weight decay."""
    batch_size: int | None = None
    augment: Mapping[str, tuple[Augmentation, ...]] = field(default_factory=dict)
    """Random changes that the format asks for in training, by input, as `Model.fit` takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A model of another system as ordinary torch."""

    module: nn.Module
    """In inference mode; a graph of named layers (`surgery.trace` takes it), which bundles can hold."""
    signature: Signature
    preparation: Preparation
    labels: tuple[str, ...] | None = None
    name: str = "model"
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: file name, sha256, format and its version, as JSON values."""
    training: Training | None = None
    """None where the format says nothing about training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peek:
    """What `matches` may look at: cheap, and never trusted."""

    path: Path
    head: bytes
    """The first bytes of a file; none of a folder."""
    members: tuple[str, ...] = ()
    """Names inside, where the file is a zip archive, or of the files in the folder."""


class Reader(Protocol):
    """What a reader module has."""

    NAME: str
    """What the format is called in messages."""

    def matches(self, peek: Peek) -> bool:
        """Whether this looks like a file of the format."""

    def read(self, path: Path, **options: Any) -> Imported:
        """The model.

        Raises: FormatError, for a damaged or hostile file and for what cannot be expressed in torch.
        """


def readers() -> list[Reader]:
    """Every reader, in the order in which they are asked."""
    return [cast(Reader, importlib.import_module(f"kindling.formats.{name}")) for name in READERS]


def names() -> list[str]:
    """What the formats are called.

    >>> names()
    ['Deeplearning4j', 'H2O MOJO', 'PyTorch .pt2', 'ONNX', 'Caffe', 'BigDL', 'Keras', 'TensorFlow', 'TensorFlow Lite']
    """
    return [reader.NAME for reader in readers()]


def open_model(path: str | PathLike[str], **options: Any) -> Imported | None:
    """The model in a file or folder of another system, or None where no reader knows it.

    Args:
        options: of the format's reader.
    Raises: FormatError, when there is nothing, or a reader knows the format and cannot read the file; ConfigError, for
        options that the reader does not have.
    """
    file = Path(path)
    if not file.exists():
        raise FormatError(f"there is nothing at {file}.")
    peek = _peek(file)
    for reader in readers():
        if reader.matches(peek):
            unknown = sorted(set(options) - set(inspect.signature(reader.read).parameters))
            if unknown:
                raise ConfigError("options", unknown, f"are none of the reader's for {reader.NAME}", "Leave them out")
            return reader.read(file, **options)
    return None


def _peek(file: Path) -> Peek:
    if file.is_dir():
        return Peek(path=file, head=b"", members=tuple(sorted(part.name for part in file.iterdir())))
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    members: tuple[str, ...] = ()
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                members = tuple(archive.namelist())
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
            members = ()
    return Peek(path=file, head=head, members=members)
