"""Checkpoints: everything a worker needs to go on bit for bit, as safetensors and JSON; never pickle.

`checkpoints/STEP/` holds `rank-RRRR.safetensors` and `rank-RRRR.json` for every worker and, written last,
`manifest.json` with the sha256 of all of them: a directory without a valid manifest is no checkpoint. Knows torch and
`storage`; no Spark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kindling.errors import FormatError, StorageError
from kindling.storage import Place

CHECKPOINT_VERSION = 1


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON; tensors are put aside under numbered names.

    >>> import torch
    >>> put_aside: dict[str, Tensor] = {}
    >>> encode({0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}}, put_aside)
    {'dict': [[0, {'dict': [['step', {'tensor': 't0'}], ['betas', {'tuple': [0.9, 0.999]}]]}]]}
    >>> put_aside
    {'t0': tensor(3.)}
    """
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return {"list": [encode(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"a checkpoint cannot hold a {type(value).__name__} ({value!r}); tensors, numbers and text only.")


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one worker reads back."""

    step: int
    state: Mapping[str, Any]


def _folder(step: int) -> str:
    return f"checkpoints/{step:012d}"


def write_part(place: Place, step: int, rank: int, state: Mapping[str, Any]) -> None:
    """One worker's part of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    record = encode(dict(state), tensors)
    blob = save_tensors({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    place.write(f"{_folder(step)}/rank-{rank:04d}.safetensors", blob)
    body = {"state": record, "sha256": hashlib.sha256(blob).hexdigest()}
    place.write(f"{_folder(step)}/rank-{rank:04d}.json", json.dumps(body).encode())


def write_manifest(place: Place, step: int, world: int, about: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole, after every worker has written its part."""
    parts = {}
    for rank in range(world):
        name = f"rank-{rank:04d}.json"
        parts[name] = hashlib.sha256(place.read(f"{_folder(step)}/{name}")).hexdigest()
    body = {"version": CHECKPOINT_VERSION, "step": step, "world": world, "parts": parts, **about}
    place.write(f"{_folder(step)}/manifest.json", json.dumps(body).encode())


def steps_on_disk(place: Place) -> list[int]:
    """Steps that have a manifest, newest first."""
    found = set()
    for name in place.list("checkpoints"):
        head, _, tail = name.removeprefix("checkpoints/").partition("/")
        if tail == "manifest.json" and head.isdigit():
            found.add(int(head))
    return sorted(found, reverse=True)


def read_part(place: Place, step: int, rank: int, world: int) -> Checkpoint:
    """One worker's part, checked against the manifest.

    Raises: FormatError, when a file is missing, altered, or of another number of workers.
    """
    folder = _folder(step)
    try:
        manifest = json.loads(place.read(f"{folder}/manifest.json"))
        name = f"rank-{rank:04d}.json"
        raw = place.read(f"{folder}/{name}")
        blob = place.read(f"{folder}/rank-{rank:04d}.safetensors")
        if manifest["version"] != CHECKPOINT_VERSION or manifest["world"] != world:
            raise FormatError(f"checkpoint {step} is of version {manifest['version']} and {manifest['world']} workers.")
        if hashlib.sha256(raw).hexdigest() != manifest["parts"][name]:
            raise FormatError(f"{folder}/{name} is not the file that the manifest names.")
        record = json.loads(raw)
        if hashlib.sha256(blob).hexdigest() != record["sha256"]:
            raise FormatError(f"{folder}/rank-{rank:04d}.safetensors is not the file that was written.")
        return Checkpoint(step, decode(record["state"], load_tensors(blob)))
    except (StorageError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"checkpoint {step} cannot be read: {error}") from error


def keep_newest(place: Place, count: int) -> None:
    """Delete all checkpoints but the newest `count`; the manifest goes first: none looks whole while it goes."""
    for step in steps_on_disk(place)[count:]:
        names = place.list(_folder(step))
        for name in sorted(names, key=lambda n: not n.endswith("manifest.json")):
            place.delete(name)
