"""Numbers into a net that stands on the meta device: from a caffemodel by layer names, else from fillers.

Shapes are compared before a byte is read or reserved. Each blob is copied once, from the mapped file into the tensor
that stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kindling.errors import FormatError, did_you_mean
from kindling.formats.caffe.emit import Emitter, LayerWeights, Slot
from kindling.formats.caffe.fillers import fill
from kindling.formats.caffe.schema import Message, where
from kindling.formats.caffe.wire import Blob, blob_of_text


@dataclass(frozen=True, slots=True)
class Report:
    """What was done about weights."""

    loaded: tuple[str, ...]
    """Layers whose numbers came from the file."""
    fresh: tuple[str, ...]
    """Layers with blobs that begin as their fillers say."""
    multipliers: dict[str, tuple[float, float]]
    """Parameter name -> factors on learning rate and weight decay."""


def stored_blobs(layers: list[Message], what: str) -> dict[str, list[Blob]]:
    """Layer name -> its blobs; the first layer of a name counts, as its later ones are other phases of it.

    Raises: FormatError, for blobs in text whose shape and numbers do not fit.
    """
    found: dict[str, list[Blob]] = {}
    for layer in layers:
        blobs = [blob if isinstance(blob, Blob) else blob_of_text(blob, what) for blob in layer.all("blobs")]
        if blobs:
            found.setdefault(str(layer.get("name")), blobs)
    return found


def put_weights(
    to: Emitter,
    blobs: Mapping[str, list[Blob]],
    what: str,
    *,
    partial: bool,
    limit: int,
    generator: torch.Generator | None,
) -> Report:
    """Give every parameter and buffer of `to.root` its numbers; afterwards nothing is on the meta device.

    Args:
        blobs: by layer name; none for a net that begins with its fillers.
        what: what to call the file with the blobs.
        partial: whether layers may lack in the file.
        limit: how many numbers may be made without a file that has them.
        generator: for fillers.
    Raises: FormatError.
    """
    tensors = _Tensors(to.root)
    _share(to, tensors)
    wanted = [weights for weights in to.weights if weights.slots]
    missing = [weights for weights in wanted if str(weights.layer.get("name")) not in blobs]
    if blobs and len(missing) == len(wanted) and wanted:
        seen = str(wanted[0].layer.get("name"))
        raise FormatError(f"{what} has weights for none of the net's layers.{did_you_mean(seen, blobs)}")
    if blobs and missing and not partial:
        names = ", ".join(repr(weights.layer.get("name")) for weights in missing[:6])
        raise FormatError(
            f"{what} has no weights for {len(missing)} of the net's {len(wanted)} layers with weights: {names}. "
            "Give partial=True to begin those with their fillers."
        )
    for weights in wanted:
        name = str(weights.layer.get("name"))
        if name in blobs:
            _check(to, weights, blobs[name], tensors)
    made = sum(tensors.get(slot.tensor).numel() for weights in missing for slot in weights.slots if slot.tensor)
    if made > limit:
        raise FormatError(
            f"{to.what} has {made:,} weights to begin with, more than {limit:,}. Give max_parameters={made} if meant."
        )
    filled: set[int] = set()
    for weights in wanted:
        name = str(weights.layer.get("name"))
        if name in blobs:
            _load(tensors, weights.slots, blobs[name], filled)
        else:
            _begin(tensors, weights.slots, generator, filled)
    _rest(to.root)
    lacking = {id(weights) for weights in missing}
    return Report(
        tuple(str(weights.layer.get("name")) for weights in wanted if id(weights) not in lacking),
        tuple(str(weights.layer.get("name")) for weights in missing),
        _multipliers(to, wanted, tensors),
    )


# Where numbers go


class _Tensors:
    """Parameters and buffers of a module by name, with every place that holds each of them."""

    def __init__(self, root: nn.Module) -> None:
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        self._home: dict[str, tuple[dict[str, Any], str]] = {}
        for path, module in root.named_modules():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    if tensor is not None:
                        self._home[f"{path}.{leaf}" if path else leaf] = (table, leaf)
                        self._places.setdefault(id(tensor), []).append((table, leaf))

    def get(self, name: str) -> Tensor:
        table, leaf = self._home[name]
        found = table[leaf]
        assert isinstance(found, Tensor)
        return found

    def tie(self, name: str, to: str) -> None:
        """Let a name hold the tensor of another."""
        table, leaf = self._home[name]
        first = self.get(to)
        self._places[id(table[leaf])] = [place for place in self._places[id(table[leaf])] if place[0] is not table]
        table[leaf] = first
        self._places[id(first)].append((table, leaf))

    def put(self, name: str, value: Tensor) -> None:
        """A tensor with numbers, in every place that shares the one without."""
        old = self.get(name)
        new = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
        places = self._places.pop(id(old))
        for table, leaf in places:
            table[leaf] = new
        self._places[id(new)] = places


def _share(to: Emitter, tensors: _Tensors) -> None:
    """Blobs with one name become one tensor: the first layer's."""
    owners: dict[str, tuple[str, Message]] = {}
    for weights in to.weights:
        specs = weights.layer.all("param")
        for place, slot in enumerate(weights.slots):
            name = specs[place].get("name") if place < len(specs) else ""
            if not name or not slot.tensor:
                continue
            if name not in owners:
                owners[name] = (slot.tensor, weights.layer)
                continue
            path, owner = owners[name]
            first, second = tensors.get(path), tensors.get(slot.tensor)
            if first.shape != second.shape:
                raise to.error(
                    weights.layer,
                    f"shares blob {name!r} with layer {owner.get('name')!r}{where(owner.line)}, which has the shape "
                    f"{tuple(first.shape)} and not {tuple(second.shape)}",
                )
            if path != slot.tensor:
                tensors.tie(slot.tensor, path)


def _check(to: Emitter, weights: LayerWeights, blobs: list[Blob], tensors: _Tensors) -> None:
    slots = weights.slots
    if len(blobs) != len(slots):
        raise to.error(weights.layer, f"has {len(slots)} blobs, the weights hold {len(blobs)}")
    for slot, blob in zip(slots, blobs, strict=True):
        shape: tuple[int, ...] = (1,) if not slot.tensor else tuple(tensors.get(slot.tensor).shape)
        if slot.kind == "factor" or not slot.tensor:
            shape = (1,) if slot.kind == "factor" else blob.shape
        elif slot.transpose:
            shape = shape[::-1]
        fits = [size for size in shape if size != 1] == [size for size in blob.shape if size != 1]
        if not fits or blob.count != math.prod(shape):
            raise to.error(
                weights.layer,
                f"has a blob of shape {shape}, the weights hold {blob.count:,} numbers of shape {blob.shape}",
            )


def _load(tensors: _Tensors, slots: list[Slot], blobs: list[Blob], filled: set[int]) -> None:
    factor = next((float(b.array().reshape(-1)[0]) for s, b in zip(slots, blobs, strict=True) if s.kind == "factor"), 1)
    for slot, blob in zip(slots, blobs, strict=True):
        if not slot.tensor:
            continue
        old = tensors.get(slot.tensor)
        if id(old) in filled:
            continue  # shared, and the first layer's numbers count
        value = torch.from_numpy(blob.array())
        if slot.transpose:
            value = value.reshape(old.shape[::-1]).t().contiguous()
        if slot.kind in ("mean", "variance"):
            value = value / factor if factor else torch.zeros_like(value)
        tensors.put(slot.tensor, value.reshape(old.shape))
        filled.add(id(tensors.get(slot.tensor)))


def _begin(tensors: _Tensors, slots: list[Slot], generator: torch.Generator | None, filled: set[int]) -> None:
    for slot in slots:
        if not slot.tensor or slot.kind == "own":
            continue
        old = tensors.get(slot.tensor)
        if id(old) in filled:
            continue
        value = torch.empty(old.shape[::-1] if slot.transpose else old.shape)
        if slot.kind in ("mean", "variance"):
            value.fill_(0.0 if slot.kind == "mean" else 1.0)
        else:
            fill(value, slot.filler, generator)
        tensors.put(slot.tensor, value.t().contiguous() if slot.transpose else value)
        filled.add(id(tensors.get(slot.tensor)))


def _rest(root: nn.Module) -> None:
    """What no blob stands for: counters of BatchNorm, and weights of registered layers by their own rules."""
    for module in root.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        without = [tensor for _, tensor in own if tensor.is_meta]
        if without:
            for name, tensor in own:
                if tensor.is_meta:
                    made = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        module._parameters[name] = nn.Parameter(made)
                    else:
                        module._buffers[name] = made
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and any(isinstance(tensor, nn.Parameter) for tensor in without):
                reset()


def _multipliers(to: Emitter, wanted: list[LayerWeights], tensors: _Tensors) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    names = {id(tensor): name for name, tensor in to.root.named_parameters()}
    for weights in wanted:
        specs = weights.layer.all("param")
        for place, slot in enumerate(weights.slots):
            if not slot.tensor:
                continue
            tensor = tensors.get(slot.tensor)
            name = names.get(id(tensor))
            if name is None:
                continue  # statistics, which no optimizer sees
            spec = specs[place] if place < len(specs) else Message("ParamSpec")
            if name not in found or spec.has("lr_mult") or spec.has("decay_mult"):
                old = found.get(name, (1.0, 1.0))
                found[name] = (
                    spec.get("lr_mult") if spec.has("lr_mult") or name not in found else old[0],
                    spec.get("decay_mult") if spec.has("decay_mult") or name not in found else old[1],
                )
    return found
