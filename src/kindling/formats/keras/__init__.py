"""Keras's models in: `.keras`, whole-model `.h5` and the JSON of `to_json`, of Keras 1 to 3, as ordinary torch graphs.

`read` is the door. The rooms: `config` reads the description, `h5` opens HDF5 files, `weights` finds a layer's arrays,
`layers` and `recurrent` (on `site`) make torch of each layer, `build` calls them in order. Nothing of Keras is needed,
and nothing that a file brings is run: a Lambda layer is refused by name. Weight files for nets that kindling has
itself are read by `read_h5`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, FormatError
from kindling.formats.keras.h5 import has_names, opened, read_h5, text_of
from kindling.formats.zipped import open_zip

if TYPE_CHECKING:
    from torch import nn

    from kindling.formats.channels import Flow
    from kindling.formats.keras.config import Net
    from kindling.formats.keras.site import Building, Site
    from kindling.formats.keras.weights import Store
    from kindling.formats.models import Imported, Peek
    from kindling.prepare import Step

__all__ = ["NAME", "forget_layer", "matches", "read", "read_h5", "register_layer"]

NAME = "Keras"
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_WEIGHT_BYTES = 64 << 30


def matches(peek: Peek) -> bool:
    """Whether this is a `.keras` archive, an HDF5 file, or the JSON that describes a model of Keras.

    >>> from kindling.formats.models import Peek
    >>> matches(Peek(path=Path("net.json"), head=b'{"class_name": "Sequential", "config": {}}'))
    True
    """
    if peek.head.startswith(b"PK"):
        return CONFIG in peek.members and WEIGHTS in peek.members
    if peek.head.startswith(_MAGIC):
        return True
    head = peek.head.lstrip()
    return head.startswith(b"{") and b'"class_name"' in head and b'"config"' in head


def read(
    path: Path,
    *,
    weights: str | Path | None = None,
    net: str | Path | None = None,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
    scale: float | None = None,
    image: Mapping[str, Any] | None = None,
    keep_activation: bool = False,
    layers: Mapping[str, Callable[[Site], nn.Module]] | None = None,
    seed: int | None = None,
    max_parameters: int = 2**29,
) -> Imported:
    """A Keras model as an ordinary torch graph.

    Pictures go in channels first, as in all nets here, other rows in Keras's order; outputs are in Keras's order. A
    last softmax (or the sigmoid of one unit trained by binary cross entropy) is left to prediction, as kindling's
    models give scores: the labels are then the numbers of the classes, unless `labels` names them.

    Args:
        path: a `.keras` file, a whole-model `.h5`, the JSON of `model.to_json()`, or a weight file together with `net`.
        weights: the weights of a JSON file, `.weights.h5` or `.h5`; without them, they begin as the initialisers say.
        net: the JSON, `.keras` or `.h5` that describes the model of a weight file.
        input_shape: one row's shape without the batch axis, in Keras's order, where the file leaves it open; a mapping
            by input name where there are several.
        labels: class names in the order of the outputs.
        scale: the factor on pixels 0..255 that the model was trained with: 1/255, or 1 for pixels as they are. Keras's
            files do not state it. With it, or with `image`, a model of pictures takes photos.
        image: fields of the `ImageStep` to prepare photos with, beside the size: `{"mean": (127.5,), "std": (127.5,)}`.
        keep_activation: keep the last activation in the net, which then gives what Keras gives, and no labels.
        layers: functions that make layers of one's own, by class; see `register_layer`.
        seed: for weights that are made here; torch's global generator if None.
        max_parameters: most weights that are made without a file that has them.
    Raises: FormatError, for a damaged or hostile file, a layer that is not known here (naming it and its type), and an
        input shape that is needed.
    """
    from kindling.formats.assemble import Assembly
    from kindling.formats.ends import imported
    from kindling.formats.keras.build import build
    from kindling.formats.keras.site import Building

    if net is not None:
        if weights is not None:
            raise ConfigError("net", str(net), "and weights= are given together", "Give the description as the path")
        path, weights = Path(net), path
    data, about, major = _described(path)
    described = _net(data, str(path))
    building = Building(Assembly(str(path)), major, dict(layers or {}))
    ends = [_input(building, described, ref, input_shape, scale, image) for ref in described.inputs]
    with _stored(path, weights, seed, max_parameters) as store:
        outputs = build(building, described, store, [flow for flow, _ in ends])
    if weights is not None:
        from kindling.formats.files import file_digest

        about |= {"weights_file": Path(weights).name, "weights_sha256": file_digest(weights)}
    about |= {"frozen": building.frozen, "notes": list(dict.fromkeys(building.notes))}
    loss = json.dumps(about.get("training", {}).get("loss", "")).lower().replace("_", "")
    return imported(
        path,
        building.mover,
        _named(described, outputs),
        [step for _, step in ends],
        labels=labels,
        keep_activation=keep_activation,
        binary="binarycrossentropy" in loss,
        system=NAME,
        about=about,
    )


# ------------------------------------------------------------------------------------------------- the description


def _described(path: Path) -> tuple[Mapping[str, Any], dict[str, Any], int]:
    """The model's JSON, what else the file says, and Keras's major version."""
    from kindling.formats.keras.config import MAX_JSON_BYTES, parse

    with path.open("rb") as stream:
        head = stream.read(8)
    about: dict[str, Any] = {}
    if head.startswith(b"PK"):
        with open_zip(path) as zipped:
            data = parse(zipped.read(CONFIG, MAX_JSON_BYTES), f"{path}: {CONFIG}")
            said = parse(zipped.read(METADATA, 1 << 20), f"{path}: {METADATA}") if METADATA in zipped else {}
        version, training = said.get("keras_version"), data.get("compile_config")
    elif head == _MAGIC:
        with opened(path) as root:
            if "model_config" not in root.attrs:
                raise FormatError(
                    f"{path} holds weights and no description of a model. Give net= for a .json, .keras or .h5 "
                    "that has it; weights of a net of kindling are loaded by load(NAME, weights=FILE)."
                )
            data = parse(text_of(root.attrs["model_config"]), f"{path}: model_config")
            version = text_of(root.attrs.get("keras_version", ""))
            raw = root.attrs.get("training_config")
        training = None
        if raw is not None:
            with contextlib.suppress(FormatError):
                training = parse(text_of(raw), "training_config")
    else:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path} is too large for a description of a net.")
        data = parse(path.read_bytes(), str(path))
        version, training = data.get("keras_version"), data.get("compile_config")
    about["keras_version"] = str(version or "")[:40]
    if isinstance(training, dict):
        about["training"] = _brief(training)
    digits = about["keras_version"].partition(".")[0]
    major = int(digits) if digits.isdigit() else (3 if "module" in data else 2)
    return data, about, major


def _brief(training: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and optimizer, as far as they are plain values."""
    found: dict[str, Any] = {}
    for key in ("loss", "optimizer", "optimizer_config"):
        value = training.get(key)
        if isinstance(value, dict):
            config = value.get("config")
            plain = (
                {k: v for k, v in config.items() if isinstance(v, int | float | str)}
                if isinstance(config, dict)
                else {}
            )
            value = {"class": str(value.get("class_name"))[:60], **plain}
        if isinstance(value, dict) or (isinstance(value, str) and len(value) < 100):
            found["optimizer" if key == "optimizer_config" else key] = value
    return found


def _net(data: Mapping[str, Any], what: str) -> Net:
    from kindling.formats.keras.config import read_net

    return read_net(data, what)


@contextlib.contextmanager
def _stored(path: Path, weights: str | Path | None, seed: int | None, most: int) -> Iterator[Store]:
    """The weights, open for reading."""
    from kindling.formats.keras.weights import Fresh, Grouped, Listed

    file = path if weights is None else Path(weights)
    if not file.is_file():
        raise FormatError(f"there is no file {file}.")
    with file.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(b"PK"):
        with (
            open_zip(file) as zipped,
            zipped.seekable(WEIGHTS, _MAX_WEIGHT_BYTES) as content,
            opened(file, content) as root,
        ):
            yield Grouped(root, str(file))
    elif head == _MAGIC:
        with opened(file) as root:
            if has_names(root):
                yield Listed(root, str(file))
            elif "model_weights" in root:
                from kindling.formats.keras.h5 import hard

                yield Listed(hard(root, "model_weights", file), str(file))
            else:
                yield Grouped(root, str(file))
    elif weights is None:
        yield Fresh(str(path), seed, [most])
    else:
        raise FormatError(f"{file} is no weight file of Keras: neither HDF5 nor a .keras archive.")


# --------------------------------------------------------------------------------------------------- in and out


def _input(
    building: Building,
    net: Net,
    ref: Any,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None,
    scale: float | None,
    image: Mapping[str, Any] | None,
) -> tuple[Flow, Step]:
    """An input of the net, and the step that makes its rows."""
    from kindling.formats.ends import open_input
    from kindling.formats.keras.build import consumers, has_channels_first

    what = building.net.what
    layer = next(one for one in net.layers if one.name == ref.layer)
    row: tuple[int | None, ...] | None = layer.row
    if isinstance(input_shape, Mapping):
        asked = input_shape.get(layer.name)
    else:
        asked = input_shape
        if asked is not None and len(net.inputs) > 1:
            raise ConfigError("input_shape", list(asked), "does not say of which input", "Give a mapping by name")
    if asked is not None:
        asked = tuple(int(size) for size in asked)
        if row is not None and (
            len(row) != len(asked) or any(b is not None and a != b for a, b in zip(asked, row, strict=True))
        ):
            raise ConfigError("input_shape", asked, f"does not fit {row} of input {layer.name!r}", "See the file")
        row = asked
    if row is None or any(size is None for size in row):
        raise FormatError(
            f"{what}: input {layer.name[:80]!r} is {'not described' if row is None else f'of shape {row}'}. "
            "Give input_shape= (one row, without the batch axis, in Keras's order)."
        )
    sizes = tuple(int(size) for size in row if size is not None)
    if any(not 0 < size < 2**31 for size in sizes) or not sizes:
        raise FormatError(f"{what}: input {layer.name[:80]!r} has rows of shape {sizes}.")
    users = consumers(net, ref)
    dtype = str(layer.fields.get("dtype") or "float32")
    whole = dtype.startswith(("int", "uint")) or (bool(users) and all(user.kind == "Embedding" for user in users))
    last = not has_channels_first(net)
    return open_input(building.mover, layer.name, sizes, whole=whole, channels_last=last, scale=scale, image=image)


def _named(net: Net, outputs: list[Flow]) -> dict[str, Flow]:
    """Outputs by the layers they come from."""
    named: dict[str, Flow] = {}
    for ref, flow in zip(net.outputs, outputs, strict=True):
        base = ref.layer if ref.tensor == 0 else f"{ref.layer}_{ref.tensor}"
        name, count = base, 1
        while name in named:
            count += 1
            name = f"{base}_{count}"
        named[name] = flow
    return named


def __getattr__(name: str) -> Any:
    """Names of the rooms that need torch, opened on use: `import kindling` must stay light."""
    if name in ("forget_layer", "register_layer"):
        from kindling.formats.keras import build

        return getattr(build, name)
    raise AttributeError(name)
