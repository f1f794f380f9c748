"""A Model on disk: no pickle, checksummed, written whole or not at all.

A bundle is a folder of two files. `kindling.json` holds the architecture (a graph over closed lists, see `graph.py`),
signature, preparation, labels, frozen layers, history, source, and size and SHA-256 of the other file, and of itself.
`weights.safetensors` holds every parameter and buffer. A module that is no such graph is stored as the name of its
class, JSON arguments and the hash of its source, and comes back only if the caller hands that class in. Where the files
are kept is the business of `storage.py`. Knows torch; no Spark.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import tempfile
import typing
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from kindling import __version__, graph
from kindling.errors import ConfigError, FormatError, KindlingError, ModelError, StorageError
from kindling.prepare import Preparation
from kindling.randomness import borrowed
from kindling.signature import Signature, TensorSpec
from kindling.storage import Place, open_place

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from kindling.model import Model

FORMAT = 1
"""Version of the bundle; a reader refuses others."""

MANIFEST = "kindling.json"
WEIGHTS = "weights.safetensors"
MANIFEST_LIMIT = 64 << 20
"""A manifest of more bytes is refused before it is read."""

_WEIGHTS_NAME = re.compile(r"weights(-[0-9a-f]{12})?\.safetensors\Z")
_SHA = re.compile(r"[0-9a-f]{64}\Z")
_KEYS = frozenset(
    {"format", "written_by", "name", "architecture", "signature", "preparation", "labels", "frozen", "history"}
    | {"source", "files", "sha256"}
)
# safetensors' own names of dtypes.
_FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_LOG = logging.getLogger("kindling")


# --------------------------------------------------------------------------------------------------------- saving


def save(
    model: Model,
    path: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    spark: SparkSession | None = None,
) -> None:
    """Write a model as a bundle.

    On this machine the folder appears whole, or takes the place of the old one, in one step. Elsewhere the manifest is
    written last: until then the old bundle is what is read.

    Args:
        path: the folder to write: a local path or a URL that `storage.open_place` takes.
        overwrite: replace a bundle that is there. Anything but a bundle is never replaced.
        dry_run: write nothing, and raise what can be told beforehand: something is there, the module cannot be stored.
        spark: the session whose file systems may be used; None takes the active one.
    Raises: ConfigError, when something is there already; ModelError, when the module can be stored neither as a graph
        nor by its class; StorageError, when the place cannot be written.
    """
    place = open_place(path, spark)
    old = _what_is_there(place, overwrite)
    architecture = _architecture(model)
    if dry_run:
        return
    body: dict[str, Any] = {
        "format": FORMAT,
        "written_by": f"kindling {__version__}, torch {torch.__version__}",
        "name": model.name,
        "architecture": architecture,
        "signature": model.signature.to_json(),
        "preparation": model.preparation.to_json(),
        "labels": None if model.labels is None else list(model.labels),
        "frozen": sorted(model.frozen),
        "history": _plain(list(model.history), "history"),
        "source": _plain(dict(model.source), "source"),
    }
    with _workshop(place) as folder:
        weights = folder / WEIGHTS
        _write_weights(_tensors(model.module, architecture), weights)
        digest = _file_digest(weights)
        entry = {"sha256": digest, "bytes": weights.stat().st_size}
        # Where files are replaced one by one, new weights stand beside the old until the manifest names them.
        same = old is None or old.get(WEIGHTS) in (None, entry)
        name = WEIGHTS if same or place.local else f"weights-{digest[:12]}.safetensors"
        body["files"] = {name: entry}
        body["sha256"] = _digest(body)
        text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        if len(text) > MANIFEST_LIMIT:
            raise ModelError(
                f"what is to be said about the model takes {len(text):,} bytes; {MANIFEST_LIMIT:,} is the limit."
            )
        if place.local:
            (folder / MANIFEST).write_bytes(text)
            _put_in_place(folder, place.local)
        else:
            place.makedirs()
            place.upload(weights, name)
            place.write(MANIFEST, text)
            for left in (old or {}).keys() - {name}:
                with contextlib.suppress(StorageError):  # not every place can delete; what is left harms nobody
                    place.delete(left)


def _what_is_there(place: Place, overwrite: bool) -> dict[str, Any] | None:
    """The files that the manifest of the bundle to be replaced names; None where nothing is."""
    if place.local is not None and place.local.exists() and not place.local.is_dir():
        raise ConfigError("path", place.path, "is a file, not a folder", "Name another")
    # Listing may be slow or impossible elsewhere, and there nothing but our own two files is ever replaced.
    names = place.list() if place.local else ([MANIFEST] if place.exists(MANIFEST) else [])
    if not names:
        return None
    foreign = [name for name in names if name != MANIFEST and not _WEIGHTS_NAME.match(name)]
    if foreign or MANIFEST not in names:
        seen = (foreign or names)[0]
        raise ConfigError("path", place.path, f"holds other files than a bundle ({seen!r})", "Name another folder")
    if not overwrite:
        raise ConfigError("path", place.path, "holds a bundle already", "Give overwrite=True, or another path")
    try:
        return dict(json.loads(place.read(MANIFEST))["files"])
    except (KindlingError, ValueError, KeyError, TypeError, RecursionError):
        return {WEIGHTS: "unreadable"}  # a damaged bundle may be replaced too


@contextlib.contextmanager
def _workshop(place: Place) -> Iterator[Path]:
    """A folder to write into: beside the target where that is local, so that a rename is enough."""
    if place.local is None:
        with tempfile.TemporaryDirectory(prefix="kindling-") as folder:
            yield Path(folder)
        return
    target = place.local
    folder_path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.kindling-part")
    try:
        folder_path.mkdir(parents=True)
        yield folder_path
    except OSError as error:
        if isinstance(error, KindlingError):
            raise
        raise StorageError(f"cannot write the bundle {target}: {error}.") from error
    finally:
        shutil.rmtree(folder_path, ignore_errors=True)


def _put_in_place(folder: Path, target: Path) -> None:
    """Let a finished folder take the place of an older one; what is then in `folder` is rubbish."""
    for name in (*os.listdir(folder), ""):
        _sync(folder / name)
    if not target.exists() or not any(target.iterdir()):
        folder.replace(target)
    elif not _exchange(folder, target):
        aside = folder.with_name(f"{folder.name}.old")
        target.rename(aside)
        try:
            folder.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def _tensors(module: nn.Module, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the weights file holds: each tensor once, under its first name."""
    if architecture["kind"] == "graph":
        whole = graph.traced(module, architecture["inputs"])
        rebuilt = graph.from_json(architecture["graph"], foreign=lambda path, _: whole.get_submodule(path))
    else:
        whole = rebuilt = module  # type: ignore[assignment]
    again = graph.tied_names(rebuilt)
    own = graph.named_tensors(whole)
    return {name: own[name] for name in graph.named_tensors(rebuilt) if name not in again}


def _write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _FILE_DTYPES.values():
            raise ModelError(
                f"tensor {name!r} is {tensor.dtype} ({tensor.layout}) on {tensor.device}: cannot be stored."
            )
        plain = tensor.detach().cpu().contiguous()
        # Views of one memory (q, k and v of one matrix, say) are written as tensors of their own.
        if plain.untyped_storage().data_ptr() in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    save_file(ready, path, metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------- architecture


def _architecture(model: Model) -> dict[str, Any]:
    inputs = len(model.signature.inputs)
    try:
        data = graph.to_json(model.module, inputs=inputs, foreign=_foreign)
    except ModelError as why:
        if isinstance(model.module, torch.fx.GraphModule):
            raise
        try:
            record = _class_record(model.module)
        except ModelError as error:
            raise ModelError(f"the model cannot be stored: {why} Nor by its class: {error}") from why
        _LOG.warning(
            "the model is stored by the name of its class, not as a graph, since %s Load it with classes=[%s].",
            why,
            type(model.module).__qualname__,
        )
        return record
    return {"kind": "graph", "inputs": inputs, "graph": data}


def _foreign(path: str, layer: nn.Module) -> dict[str, Any]:
    """How a graph describes a layer that is on no list: by its class, or as a cut through one."""
    from kindling.surgery.opaque import CutAway, Opaque

    if not isinstance(layer, Opaque):
        return _class_record(layer)
    cut = [name for name, part in layer.inner.named_modules() if isinstance(part, CutAway)]
    return {
        "kind": "cut",
        "prefix": layer.prefix,
        "stops": list(layer.stops),
        "cut": cut,
        "inner": _class_record(layer.inner, cut),
    }


def _class_record(module: nn.Module, cut: Sequence[str] = ()) -> dict[str, Any]:
    """A module as its class's name and arguments; refused where that would not bring the same module back."""
    cls = type(module)
    args = getattr(module, "kindling_args", None)
    args = _plain({} if args is None else dict(args), f"{cls.__qualname__}.kindling_args")
    try:
        with borrowed(), torch.device("meta"):
            again = _built(cls, args, cut)
    except Exception:  # not every constructor works without memory
        again = _built(cls, args, cut)
    shapes = [{name: tuple(t.shape) for name, t in graph.named_tensors(m).items()} for m in (module, again)]
    if shapes[0] != shapes[1] or graph.tied_names(module) != graph.tied_names(again):
        differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ModelError(
            f"{cls.__qualname__}({_args_text(args)}) makes other tensors than this module has"
            + (f" (see {differ[0][0]!r})" if differ else "")
            + ". Record its arguments as JSON: self.kindling_args = {...} in the constructor."
        )
    kinds = {type(part) for part in again.modules() if not type(part).__module__.startswith(("torch.", "kindling."))}
    sources = {_class_name(kind): _source_digest(kind) for kind in kinds | {cls}}
    return {"kind": "class", "class": _class_name(cls), "args": args, "sources": dict(sorted(sources.items()))}


def _built(cls: type[nn.Module], args: Mapping[str, Any], cut: Sequence[str]) -> nn.Module:
    from kindling.surgery.opaque import CutAway

    try:
        with borrowed():
            module = cls(**args)
        for path in cut:
            above, _, leaf = path.rpartition(".")
            holder = module.get_submodule(above)
            if leaf not in holder._modules:
                raise AttributeError(f"there is no layer {path!r}")
            holder._modules[leaf] = CutAway(path)
    except Exception as error:  # the user's own constructor
        raise ModelError(
            f"{cls.__qualname__}({_args_text(args)}) failed: {type(error).__name__}: {error}. "
            "Record its arguments as JSON: self.kindling_args = {...} in the constructor."
        ) from error
    return module


def _args_text(args: Mapping[str, Any]) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in args.items())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _source_digest(cls: type) -> str | None:
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()
    except (OSError, TypeError):
        return None


# -------------------------------------------------------------------------------------------------------- loading


def load(path: str | Path, *, classes: Sequence[type] = (), spark: SparkSession | None = None) -> Model:
    """Read a bundle. Nothing in it is run or trusted; local weights are mapped, not copied.

    Args:
        path: the folder: a local path or a URL that `storage.open_place` takes.
        classes: the `nn.Module` classes that the bundle may be made of, where it is no graph of known layers.
        spark: the session whose file systems may be used; None takes the active one.
    Returns: the model, in inference mode.
    Raises: FormatError, for a bundle that is missing, damaged, altered, hostile or of a newer kindling, and when a
        class is needed that was not given; StorageError, when the place cannot be reached; ConfigError, for classes
        that are no `nn.Module`.
    """
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ConfigError("classes", cls, "is no nn.Module class", "Give the classes the model is made of")
    place = open_place(path, spark)
    body = _manifest(place)
    try:
        return _model(place, body, classes)
    except RecursionError as error:
        raise FormatError(f"{place.path}: {MANIFEST} is nested too deep.") from error


def _manifest(place: Place) -> dict[str, Any]:
    if not place.exists(MANIFEST):
        raise FormatError(f"there is no bundle at {place.path!r}: it has no {MANIFEST}.")
    if (size := place.size(MANIFEST)) > MANIFEST_LIMIT:
        raise FormatError(f"{place.path}: {MANIFEST} has {size:,} bytes; more than {MANIFEST_LIMIT:,} are refused.")
    data = place.read(MANIFEST)
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place.path}: {MANIFEST} is no JSON: {str(error)[:200]}.") from error
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise FormatError(f"{place.path}: {MANIFEST} is not that of a bundle.")
    if body["format"] != FORMAT:
        raise FormatError(
            f"{place.path} is a bundle of format {body['format']!r}, this version of kindling reads format {FORMAT}. "
            "Update: pip install -U kindling-spark."
        )
    if body.keys() != _KEYS:
        raise FormatError(f"{place.path}: {MANIFEST} has other keys than a bundle: {sorted(body.keys() ^ _KEYS)[:5]}.")
    try:
        whole = _digest({key: value for key, value in body.items() if key != "sha256"})
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place.path}: {MANIFEST} cannot be read: {str(error)[:200]}.") from error
    if body["sha256"] != whole:
        raise FormatError(
            f"{place.path}: {MANIFEST} was damaged or altered: its SHA-256 differs. Save the model again."
        )
    return body


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _model(place: Place, body: Mapping[str, Any], classes: Sequence[type]) -> Model:
    from kindling.model import Model

    where = f"{place.path}: {MANIFEST}"
    signature = _signature(body["signature"], where)
    preparation = _preparation(body["preparation"], where)
    labels = body["labels"]
    if labels is not None:
        labels = tuple(_texts(labels, f"{where}: labels"))
    frozen = frozenset(_texts(body["frozen"], f"{where}: frozen"))
    history, source = _unplain(body["history"]), _unplain(body["source"])
    if not isinstance(body["name"], str) or not isinstance(source, dict):
        raise FormatError(f"{where}: name or source is of another kind than in a bundle.")
    if not isinstance(history, list) or not all(isinstance(one, dict) for one in history):
        raise FormatError(f"{where}: history is no list of objects.")
    module = _module(body["architecture"], signature, classes, where)
    with _weights_file(place, body["files"], where) as file:
        _fill(module, file, strict=body["architecture"]["kind"] == "graph", where=place.path)
    module.eval()
    if isinstance(module, torch.fx.GraphModule):
        from kindling import surgery

        module = surgery.trace(module) or module
    return Model(
        module=module,
        signature=signature,
        preparation=preparation,
        labels=labels,
        frozen=frozen,
        name=body["name"],
        history=tuple(history),
        source=source,
    )


def _texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise FormatError(f"{what} is no list of texts.")
    return value


def _signature(data: Any, where: str) -> Signature:
    try:
        signature = Signature.from_json(data)
        sides = (signature.inputs, signature.outputs, signature.targets)
        counts = [len(data[side]) for side in ("inputs", "outputs", "targets")]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{where}: the signature cannot be read: {error}.") from error
    if counts != [len(side) for side in sides] or not signature.inputs or not signature.outputs:
        raise FormatError(f"{where}: the signature has no inputs, no outputs, or a name twice.")
    for name, spec in (pair for side in sides for pair in side.items()):
        if not isinstance(name, str) or not _is_spec(spec):
            raise FormatError(f"{where}: the signature of {str(name)[:80]!r} has no dtype and shape of a tensor.")
    return signature


def _is_spec(spec: TensorSpec) -> bool:
    sizes = all(isinstance(n, str) or (isinstance(n, int) and not isinstance(n, bool) and n >= 0) for n in spec.shape)
    return sizes and len(spec.shape) < 65 and isinstance(getattr(torch, spec.dtype, None), torch.dtype)


def _preparation(data: Any, where: str) -> Preparation:
    try:
        preparation = Preparation.from_json(data)
        for step in preparation.steps:
            hints = typing.get_type_hints(type(step))
            for name, value in vars(step).items():
                if name in hints and not graph.fits(value, hints[name]):
                    raise FormatError(f"{name}={str(value)[:80]!r} does not fit step {step.name!r}")
    except FormatError as error:
        raise FormatError(f"{where}: the preparation cannot be read: {error}") from error
    except Exception as error:  # steps check their own fields, each in its way
        raise FormatError(f"{where}: the preparation cannot be read: {type(error).__name__}: {error}.") from error
    return preparation


def _module(data: Any, signature: Signature, classes: Sequence[type], where: str) -> nn.Module:
    if not isinstance(data, dict):
        raise FormatError(f"{where}: the architecture is no object.")
    if data.get("kind") == "class":
        return _from_class(data, classes, where)
    if data.get("kind") != "graph" or data.keys() != {"kind", "inputs", "graph"}:
        raise FormatError(f"{where}: the architecture is neither a graph nor a class.")
    module = graph.from_json(data["graph"], foreign=lambda path, record: _from_foreign(record, classes, where))
    takes = sum(node.op == "placeholder" for node in module.graph.nodes)
    if takes != len(signature.inputs):
        raise FormatError(f"{where}: the graph takes {takes} inputs, its signature names {len(signature.inputs)}.")
    return module


def _from_foreign(record: Any, classes: Sequence[type], where: str) -> nn.Module:
    from kindling.surgery.opaque import Opaque

    if not isinstance(record, dict) or record.get("kind") != "cut":
        return _from_class(record, classes, where)
    if record.keys() != {"kind", "prefix", "stops", "cut", "inner"} or not isinstance(record["prefix"], str):
        raise FormatError(f"{where}: a cut through a module cannot be read.")
    stops, cut = _texts(record["stops"], f"{where}: stops"), _texts(record["cut"], f"{where}: cut")
    inner = _from_class(record["inner"], classes, where, cut)
    layers = dict(inner.named_modules())
    if not stops or not all(stop in layers for stop in stops):
        raise FormatError(f"{where}: a module is cut at {stops[:3]}, which it does not have.")
    return Opaque(inner, record["prefix"], tuple(stops))


def _from_class(record: Any, classes: Sequence[type], where: str, cut: Sequence[str] = ()) -> nn.Module:
    keys = {"kind", "class", "args", "sources"}
    if not isinstance(record, dict) or record.keys() != keys or record["kind"] != "class":
        raise FormatError(f"{where}: a layer by its class cannot be read.")
    name, args, sources = record["class"], record["args"], record["sources"]
    if not isinstance(name, str) or not isinstance(args, dict) or not isinstance(sources, dict):
        raise FormatError(f"{where}: a layer by its class cannot be read.")
    short = name.rpartition(".")[2][:80]
    found = [cls for cls in classes if _class_name(cls) == name]
    found = found or [cls for cls in classes if name.endswith(f".{cls.__qualname__}")]
    if len(found) != 1:
        raise FormatError(
            f"{where}: the model is made of the class {name[:200]!r}, and bundles hold no code. "
            f"Hand it in: load(..., classes=[{short}])."
        )
    try:
        module = _built(found[0], args, cut)
    except ModelError as error:
        raise FormatError(f"{where}: {error}") from error
    for part in {type(part) for part in module.modules()} | {found[0]}:
        known = sources.get(_class_name(part))
        if known is not None and _source_digest(part) not in (None, known):
            _LOG.warning("the source of %s has changed since the model was saved.", _class_name(part))
    return module


# -------------------------------------------------------------------------------------------------------- weights


@contextlib.contextmanager
def _weights_file(place: Place, files: Any, where: str) -> Iterator[Path]:
    """The checked weights file on this machine."""
    if not isinstance(files, dict) or len(files) != 1:
        raise FormatError(f"{where}: files names other than one file.")
    ((name, entry),) = files.items()
    if not _WEIGHTS_NAME.match(name) or not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
        raise FormatError(f"{where}: {name[:80]!r} is no file of a bundle.")
    if not isinstance(entry["sha256"], str) or not _SHA.match(entry["sha256"]) or not isinstance(entry["bytes"], int):
        raise FormatError(f"{where}: {name!r} has no SHA-256 and size.")
    if not place.exists(name):
        raise FormatError(f"{place.path}: {name} is missing.")
    if (size := place.size(name)) != entry["bytes"]:
        raise FormatError(f"{place.path}: {name} has {size:,} bytes, not {entry['bytes']:,}. Was it cut off?")
    with contextlib.ExitStack() as stack:
        if place.local is not None:
            file = place.local / name
        else:
            # What is mapped stays readable after the file is gone.
            file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kindling-"))) / name
            place.download(name, file)
        if _file_digest(file) != entry["sha256"]:
            raise FormatError(f"{place.path}: {name} was damaged or altered: its SHA-256 differs.")
        yield file


def _fill(module: nn.Module, file: Path, *, strict: bool, where: str) -> None:
    """Put the tensors of a file into a module, after their names, shapes and dtypes were found right.

    Without `strict` (a module by its class) a float tensor may have another float dtype than the constructor gave it.
    """
    from safetensors import SafetensorError, safe_open

    expected = graph.named_tensors(module)
    first = graph.tied_names(module)
    try:
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            wanted = {name for name in expected if name not in first}
            if names != wanted:
                differ = sorted(names ^ wanted)
                raise FormatError(
                    f"{where}: {WEIGHTS} does not belong to this architecture: {differ[0][:200]!r} is "
                    f"{'missing' if differ[0] in wanted else 'too many'} ({len(differ)} differ)."
                )
            for name in sorted(wanted):
                part = weights.get_slice(name)
                shape, dtype = tuple(part.get_shape()), _FILE_DTYPES.get(part.get_dtype())
                own = expected[name]
                fits = dtype == own.dtype or (
                    not strict and dtype is not None and dtype.is_floating_point and own.is_floating_point()
                )
                if shape != tuple(own.shape) or not fits:
                    raise FormatError(
                        f"{where}: {WEIGHTS} holds {name!r} as {part.get_dtype()} {shape}, its layer needs {own.dtype} "
                        f"{tuple(own.shape)}."
                    )
            tensors = {name: weights.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise FormatError(f"{where}: {WEIGHTS} is no safetensors file: {error}.") from error
    graph.assign_tensors(module, tensors)


# ---------------------------------------------------------------------------------------------------- fingerprint

_fingerprints: weakref.WeakKeyDictionary[Model, str] = weakref.WeakKeyDictionary()


def fingerprint(model: Model) -> str:
    """SHA-256, as hex, of what features depend on: architecture, weights, and the preparation of the inputs.

    Equal before and after `save` and `load`; labels, history and what is frozen do not matter.
    Raises: ModelError, when the module can be stored neither as a graph nor by its class.
    """
    known = _fingerprints.get(model)
    if known is not None:
        return known
    architecture = _architecture(model)
    shown = dict(architecture)
    if shown["kind"] == "graph":
        shown["graph"] = {key: value for key, value in shown["graph"].items() if key not in ("notes", "fixed")}
    total = hashlib.sha256()
    for part in (shown, list(model.signature.outputs), model.preparation.to_json()["inputs"]):
        total.update(_canonical(part) + b"\n")
    for name, tensor in sorted(_tensors(model.module, architecture).items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(_canonical([name, str(plain.dtype), list(plain.shape)]) + b"\n")
        if plain.numel():
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    _fingerprints[model] = total.hexdigest()
    return _fingerprints[model]


# ----------------------------------------------------------------------------------------------------------- JSON


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any, what: str) -> Any:
    """Plain JSON values; floats that JSON lacks become `{"float": "nan"}`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, what) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, what) for part in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        return _plain(value.item(), what)
    raise ModelError(f"{what} holds {value!r} ({type(value).__name__}), which JSON cannot hold.")


def _unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [_unplain(part) for part in value]
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {key: _unplain(part) for key, part in value.items()}
    return value
