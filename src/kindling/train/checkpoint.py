"""Checkpoints on disk: everything a worker needs to go on bit for bit, as safetensors and JSON; never pickle.

`checkpoints/STEP/` holds, of each attempt A that came so far, `A-all.safetensors` (rank 0's tensors) and
`A-rank-RRRR.safetensors` (of other workers, only what differs from rank 0's), and, written last, `manifest.json`: every
worker's state with the SHA-256 of each tensor, and of itself. A folder without a valid manifest is no checkpoint. What
is worth keeping is decided in `policy.py`; when and by whom parts are written, in `writer.py`; how the states of W
workers become those of another number, in `elastic.py`. Knows torch and `storage`; no Spark.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from kindling.errors import FormatError, KindlingError
from kindling.storage import Place

CHECKPOINT_VERSION = 2
MANIFEST = "manifest.json"
_ODD = re.compile(r"[^\w.\-]")


def encode(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A nested state as JSON; tensors are put aside under names made of where they stand.

    >>> import torch
    >>> put_aside: dict[str, Tensor] = {}
    >>> encode({0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}}, put_aside)
    {'dict': [[0, {'dict': [['step', {'tensor': '0/step'}], ['betas', {'tuple': [0.9, 0.999]}]]}]]}
    >>> put_aside
    {'0/step': tensor(3.)}
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise FormatError(f"a checkpoint cannot hold a tensor of layout {value.layout} ({path}); dense ones only.")
        name, again = path or "tensor", 1
        while name in tensors:
            name, again = f"{path}~{again}", again + 1
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, encode(item, tensors, _below(path, key))] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, tensors, _below(path, index)) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return {"list": [encode(item, tensors, _below(path, index)) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"a checkpoint cannot hold a {type(value).__name__} ({value!r}); tensors, numbers and text only.")


def _below(path: str, key: object) -> str:
    name = _ODD.sub("_", str(key))
    return f"{path}/{name}" if path else name


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode`."""
    if not isinstance(value, dict):
        return value
    (kind, body), *_ = value.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in body}
    items = [decode(item, tensors) for item in body]
    return tuple(items) if kind == "tuple" else items


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256, as hex, of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}\n".encode())
    if plain.numel():
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256, as hex, of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """One worker's share of a checkpoint."""

    record: Mapping[str, Any]
    """Encoded values by their key in the state; of rank 0 all of them, of others those that differ from its own."""
    tensors: Mapping[str, str]
    """Name -> digest of each tensor in this worker's own file; those it does not name are rank 0's."""
    file: str | None
    """Name of that file inside the checkpoint; None where nothing differs."""

    def to_json(self) -> dict[str, Any]:
        return {"record": dict(self.record), "tensors": dict(self.tensors), "file": self.file}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Part:
        return cls(data["record"], data["tensors"], data["file"])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is read back: the manifest, and the states of the workers that were asked for, by their rank."""

    step: int
    manifest: Mapping[str, Any]
    states: Mapping[int, dict[str, Any]]

    @property
    def world(self) -> int:
        """The workers that wrote it."""
        return int(self.manifest["world"])


def folder(step: int) -> str:
    """Where the checkpoint of a step lies in the run directory."""
    return f"checkpoints/{step:012d}"


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state as encoded values by key, and its tensors by name (no copies)."""
    tensors: dict[str, Tensor] = {}
    return {key: encode(value, tensors, _below("", key)) for key, value in state.items()}, tensors


def write_tensors(place: Place, step: int, name: str, tensors: Mapping[str, Tensor]) -> None:
    """One file of tensors (contiguous, each with memory of its own) in the folder of a step.

    Raises: StorageError, when the place is full or gone.
    """
    with place.new_file(f"{folder(step)}/{name}") as path:
        save_file(dict(tensors), path)


def write_manifest(place: Place, step: int, parts: Sequence[Part], about: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole, after every worker has written its part."""
    body = {
        "version": CHECKPOINT_VERSION,
        "step": step,
        "world": len(parts),
        **about,
        "parts": [part.to_json() for part in parts],
    }
    body = json.loads(json.dumps(body))  # as it will be read, so that the digest is of the same
    place.write(f"{folder(step)}/{MANIFEST}", json.dumps({**body, "sha256": value_digest(body)}).encode())


def steps_on_disk(place: Place) -> list[int]:
    """Steps that have a manifest, newest first."""
    return sorted((step for step, whole in _folders(place).items() if whole), reverse=True)


def _folders(place: Place) -> dict[int, bool]:
    """Steps that have a folder, and whether there is a manifest in it."""
    found: dict[int, bool] = {}
    for name in place.list("checkpoints"):
        head, _, tail = name.removeprefix("checkpoints/").partition("/")
        if head.isdigit():
            found[int(head)] = found.get(int(head), False) or tail == MANIFEST
    return found


def read_manifest(place: Place, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest.

    Raises: FormatError, when it is missing, altered, or of another version.
    """
    where = f"{folder(step)}/{MANIFEST}"
    try:
        body = json.loads(place.read(where))
        digest = body.pop("sha256")
        if digest != value_digest(body):
            raise FormatError(f"{where} is not the file that was written.")
        if body["version"] != CHECKPOINT_VERSION:
            raise FormatError(f"checkpoint {step} is of version {body['version']}; this kindling reads version 2.")
        return dict(body)
    except FormatError:
        raise
    except (KindlingError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"checkpoint {step} cannot be read: {error}") from error


def read(place: Place, step: int, ranks: Sequence[int] | None = None) -> Checkpoint:
    """A checkpoint, or the states of some of its workers, checked against the manifest.

    Args:
        ranks: whose states to read; None for those of all workers that wrote it.
    Raises: FormatError, when a file is missing or altered, or a rank was not among the workers.
    """
    manifest = read_manifest(place, step)
    try:
        parts = [Part.from_json(part) for part in manifest["parts"]]
        wanted = range(len(parts)) if ranks is None else ranks
        if not all(rank < len(parts) for rank in wanted):
            raise FormatError(f"checkpoint {step} is of {len(parts)} workers.")
        common = _load(place, step, parts[0])
        states = {}
        for rank in wanted:
            own = _load(place, step, parts[rank]) if rank else {}
            record = {**parts[0].record, **parts[rank].record}
            states[rank] = {key: decode(value, {**common, **own}) for key, value in record.items()}
        return Checkpoint(step, manifest, states)
    except FormatError:
        raise
    except Exception as error:  # safetensors has an error class of its own for each kind of damage
        raise FormatError(f"checkpoint {step} cannot be read: {error}") from error


def _load(place: Place, step: int, part: Part) -> dict[str, Tensor]:
    if part.file is None:
        return {}
    tensors: dict[str, Tensor] = load_tensors(place.read(f"{folder(step)}/{part.file}"))
    for name, digest in part.tensors.items():
        if name not in tensors or tensor_digest(tensors[name]) != digest:
            raise FormatError(f"{folder(step)}/{part.file} is not the file that was written (see {name!r}).")
    return tensors


def discard(place: Place, step: int) -> None:
    """Remove a checkpoint; the manifest goes first: it never looks whole while it goes."""
    names = place.list(folder(step))
    for name in sorted(names, key=lambda n: not n.endswith(MANIFEST)):
        place.delete(name)
    place.delete(folder(step))


def keep_only(place: Place, kept: set[int], newest: int) -> None:
    """Remove all checkpoints but those of the steps in `kept`, and whatever unfinished ones are older than `newest`."""
    for step, whole in _folders(place).items():
        if step not in kept and (whole or step < newest):
            discard(place, step)
