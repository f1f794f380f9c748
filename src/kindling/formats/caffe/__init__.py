"""Caffe's nets in: `.prototxt` with or without `.caffemodel`, as an ordinary torch graph under Caffe's layer names.

`read` is the door for nets and `read_solver` the one for solvers. The rooms: `prototxt` and `wire` read the two
encodings of Caffe's messages, whose fields are in `schema`; `upgrade` and `select` bring old spellings and phases to
one list of layers; `layers` (on `emit`) makes the graph, `weights` puts numbers in, `data` makes inputs of data layers,
`losses` makes modules of loss layers; `net` holds it together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import FormatError, MissingExtraError

if TYPE_CHECKING:
    from torch import nn

    from kindling.formats.caffe.layers import Site
    from kindling.formats.caffe.schema import Message
    from kindling.formats.caffe.upgrade import Spec
    from kindling.formats.models import Imported, Peek

NAME = "Caffe"
_TEXT = re.compile(
    rb"(?:\A|[\s;,}])(?:layers?\s*:?\s*\{|input_dim\s*:|input_shape\s*:?\s*\{|input\s*:\s*['\"]|base_lr\s*:)"
)
_SOLVER = re.compile(rb"(?:\A|[\s;,}])(?:base_lr|lr_policy|max_iter|solver_mode)\s*:")
_NUL = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_AFTER_NAME = (b"\xa2\x06", b"\x12", b"\x1a", b"\x20", b"\x22", b"\x28", b"\x32", b"\x38", b"\x42")
"""Tags that may follow the name in a NetParameter."""


def matches(peek: Peek) -> bool:
    """Whether this looks like a net of Caffe: text with layers, or a NetParameter in binary.

    >>> from kindling.formats.models import Peek
    >>> matches(Peek(path=Path("deploy.txt"), head=b'name: "LeNet"\\nlayer {\\n  name: "data"'))
    True
    >>> matches(Peek(path=Path("graph.pbtxt"), head=b'node {\\n  name: "x"\\n  op: "Placeholder"'))
    False
    """
    head = peek.head
    if not head or peek.members:
        return False
    if not _NUL.search(head):
        return _TEXT.search(_without_comments(head)) is not None or (peek.path.suffix == ".prototxt" and b"{" in head)
    if head[:2] == b"\xa2\x06" or peek.path.suffix == ".caffemodel":
        return True
    if head[0] != 0x0A or len(head) < 4 or head[1] > 0x7F:
        return False
    name, rest = head[2 : 2 + head[1]], head[2 + head[1] :]
    return not _NUL.search(name) and b"\n" not in name and rest.startswith(_AFTER_NAME)


def _without_comments(text: bytes) -> bytes:
    return re.sub(rb"#[^\n]*", b"", text)


def read(
    path: str | Path | Message,
    *,
    weights: str | Path | None = None,
    net: str | Path | None = None,
    phase: str = "TEST",
    level: int = 0,
    stages: Sequence[str] = (),
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    mean: Any = None,
    scale: float | None = None,
    image: Mapping[str, Any] | None = None,
    layers: Mapping[str, Callable[[Site], nn.Module]] | None = None,
    labels: Sequence[str] | None = None,
    partial: bool = False,
    seed: int | None = None,
    max_parameters: int = 2**29,
) -> Imported:
    """A net of Caffe as an ordinary torch graph.

    Args:
        path: a `.prototxt` (deploy or train_val, of any version), a `.caffemodel`, or a NetParameter message.
        weights: the `.caffemodel` of a `.prototxt`; without one, weights begin as the fillers say.
        net: the `.prototxt` of a `.caffemodel`; without one, the net that Caffe kept in the file itself.
        phase, level, stages: what `include` and `exclude` rules are asked about.
        input_shape: shape of one row, or of one row by input, where the file does not say or says otherwise:
            pictures in a database are as large as they are.
        mean: what is taken off the input: a `.binaryproto` or `.npy` file, an array (C, H, W), a number a channel.
            Files that the net names are found when they lie beside it.
        scale: the factor after that; 1, or what the file says.
        image: fields of the `ImageStep` to prepare photos with; `{}` for Caffe's own way, blue first.
        layers: functions that make layers of one's own, by type; see `register_layer`.
        labels: names of the classes in the order of the scores.
        partial: let layers without weights in the file begin with their fillers.
        seed: for fillers; torch's global generator if None.
        max_parameters: most weights that are made without a file that has them.
    Raises: FormatError, for what is damaged, hostile or unknown: it names the layer, its type and its line.
    """
    from kindling.formats.caffe.net import Wishes, build
    from kindling.formats.caffe.schema import Message
    from kindling.formats.caffe.upgrade import upgrade
    from kindling.formats.files import file_digest

    wishes = Wishes(
        phase=phase,
        level=level,
        stages=tuple(stages),
        input_shape=input_shape,
        mean=mean,
        scale=scale,
        image=image,
        layers=dict(layers or {}),
        labels=labels,
        partial=partial,
        seed=seed,
        max_parameters=max_parameters,
    )
    if isinstance(path, Message):
        stored = [] if weights is None else _stored_layers(Path(weights))
        said: dict[str, Any] = {"format": "caffe"}
        if weights is not None:
            said |= {"weights_file": Path(weights).name, "weights_sha256": file_digest(weights)}
        return build(upgrade(path.copy()), stored, str(weights or "the net"), wishes, Path(), said)
    file = Path(path)
    if _is_text(file):
        if net is not None:
            raise FormatError(f"{file} is itself the net. Give weights= for the .caffemodel, not net=.")
        described, numbers = file, None if weights is None else Path(weights)
    else:
        if weights is not None:
            raise FormatError(f"{file} holds weights itself. Give net= for the .prototxt, not weights=.")
        described, numbers = (file, None) if net is None else (Path(net), file)
    spec = _spec(described)
    stored = [] if numbers is None else _stored_layers(numbers)
    source: dict[str, Any] = {"format": "caffe", "file": described.name, "sha256": file_digest(described)}
    if numbers is not None:
        source |= {"weights_file": numbers.name, "weights_sha256": file_digest(numbers)}
    return build(spec, stored, str(numbers or described), wishes, described.parent, source)


def read_message(path: str | Path, message: str = "NetParameter") -> Message:
    """A file of Caffe as it stands, text or binary, without upgrades.

    Raises: FormatError.
    """
    from kindling.formats.caffe import prototxt, wire

    file = Path(path)
    if _is_text(file):
        if file.stat().st_size > prototxt.MAX_BYTES:
            raise FormatError(f"{file} is too large for a net description: {file.stat().st_size:,} bytes.")
        return prototxt.parse(file.read_bytes(), message, str(file))
    return wire.decode(wire.open_view(file), message, str(file))


def _spec(file: Path) -> Spec:
    from kindling.formats.caffe.upgrade import upgrade

    try:
        message = read_message(file)
    except FormatError as error:
        if _is_text(file) and _SOLVER.search(_without_comments(file.read_bytes()[:65536])):
            raise FormatError(f"{file} is a solver and no net; kindling.formats.caffe.read_solver reads it.") from error
        raise
    spec = upgrade(message, str(file))
    if not spec.layers and not spec.inputs:
        raise FormatError(f"{file} holds no net: neither layers nor inputs.")
    if not _is_text(file) and not any(layer.all("bottom") for layer in spec.layers):
        raise FormatError(f"{file} holds weights but not how its layers hang together. Give net= for the .prototxt.")
    if not _is_text(file):
        for layer in spec.layers:  # Caffe wrote the layers of one phase, and their rules with them
            layer.values.pop("include", None)
            layer.values.pop("exclude", None)
    return spec


def _stored_layers(file: Path) -> list[Message]:
    from kindling.formats.caffe import wire
    from kindling.formats.caffe.upgrade import upgrade

    if _is_text(file):
        layers = _spec(file).layers
    elif _is_hdf5(file):
        layers = _hdf5_layers(file)
    else:
        message = wire.decode(wire.open_view(file), "NetParameter", str(file), weights_only=True)
        layers = upgrade(message, str(file)).layers
    if not any(layer.all("blobs") for layer in layers):
        raise FormatError(f"{file} holds no weights. Is it the .caffemodel?")
    return layers


def _is_hdf5(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(8) == b"\x89HDF\r\n\x1a\n"


def _hdf5_layers(file: Path) -> list[Message]:
    """Weights that Caffe kept as HDF5: `data/LAYER/NUMBER`."""
    import numpy as np

    from kindling.formats.caffe.schema import Message
    from kindling.formats.caffe.wire import Blob

    try:
        import h5py
    except ImportError:
        raise MissingExtraError.of("Reading weights in HDF5", "h5py", "keras") from None
    layers = []
    try:
        with h5py.File(file, "r") as root:
            for name in _leaves(root["data"]):
                group = root["data"][name]
                layer = Message("LayerParameter")
                layer.put("name", name)
                for number in range(len(group)):
                    data = group[str(number)]
                    if not isinstance(data, h5py.Dataset) or data.nbytes > 2**36 or data.dtype.kind != "f":
                        raise FormatError(f"{file}: blob {number} of {name!r} is no array of numbers.")
                    if data.id.get_storage_size() * 1100 < data.nbytes:
                        raise FormatError(f"{file}: blob {number} of {name!r} announces more than it holds.")
                    numbers = np.asarray(data, np.float32)
                    layer.add("blobs", Blob(tuple(numbers.shape), [numbers.reshape(-1)], own=True))
                layers.append(layer)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} cannot be read as Caffe's HDF5: {error}. Is it whole?") from error
    return layers


def _leaves(group: Any, prefix: str = "", depth: int = 0) -> list[str]:
    """Layers with blobs; a layer's name may hold slashes, which HDF5 takes for groups."""
    import h5py

    found: list[str] = []
    if depth > 16:
        return found
    for name in group:
        part = group.get(name, getlink=False)
        if not isinstance(part, h5py.Group):
            continue
        if "0" in part and isinstance(part["0"], h5py.Dataset):
            found.append(prefix + name)
        else:
            found += _leaves(part, f"{prefix}{name}/", depth + 1)
    return found


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error}.") from error
    if not head:
        raise FormatError(f"{file} is empty.")
    return _NUL.search(head) is None


def __getattr__(name: str) -> Any:
    """The public names of the rooms, opened on use: `import kindling` must not import torch."""
    homes = {
        "Solver": "solver",
        "read_solver": "solver",
        "forget_layer": "layers",
        "register_layer": "layers",
        "read_mean": "data",
        "replace_data_layers": "replace",
    }
    if name not in homes:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
