"""Layouts: what a file calls a net's tensors and how it orders their axes; recognising one, and loading by it.

A file is taken only if every tensor of one layout is there with its exact shape, and nothing else is. Anything else is
refused with the first layers that differ. Readers are in `files.py`; which net takes which layouts is in `nets/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kindling.errors import FormatError
from kindling.formats.stored import Stored, StoredTensors

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_KERAS_ROLES = {
    "weight": "kernel",
    "bias": "bias",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_COUNTER = "num_batches_tracked"
"""Batch normalisation's step counter: files of old versions lack it, and inference never reads it."""
_SHOWN = 3
"""Differences that an error message lists."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published way to store one net's weights, and the input preparation that those weights were trained with."""

    name: str
    """Short name, unique within its net: `"torchvision"`."""
    about: str
    """One sentence for people."""
    build: Callable[[int | None], nn.Module]
    """Makes the net for a number of classes; None: without the classifier."""
    layers: Mapping[str, str]
    """Our layer name -> the file's."""
    head: str | None
    """Our name of the layer whose outputs are the classes; None: the file has no classifier."""
    image: Mapping[str, Any]
    """Fields of the `ImageStep` that belongs to these weights."""
    keras: bool = False
    """Kernels are (height, width, in, out), dense weights (in, out); flattening runs over height, width, channels."""
    classes: int | None = None
    """The one number of classes this layout has; None: whatever the file has."""
    flattened: Mapping[str, str] = field(default_factory=dict)
    """Our dense layer after a flattening -> the convolution whose channels were flattened (Keras orders only)."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of the file's layer names -> the one in `layers`."""
    imagenet: bool = True
    """1,000 classes are ImageNet's, in its usual order; 1,001 are those behind a background class."""


class _SameNames(dict[str, str]):
    """A file that uses our own names."""

    def __missing__(self, name: str) -> str:
        return name


SAME_NAMES: Mapping[str, str] = _SameNames()
"""`Layout.layers` of a file whose layer names are the net's own."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor of the net: our name, and what the file must hold for it."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """A file that was recognised: everything needed to load it."""

    layout: Layout
    classes: int | None
    """Width of the scores; None without a classifier."""
    module: nn.Module
    """The net on the meta device: shapes without memory."""
    slots: tuple[_Slot, ...]


def recognise(what: str, net: str, layouts: Sequence[Layout], stored: StoredTensors) -> Match:
    """The layout of `net` whose names and shapes are exactly those of the file.

    Args:
        what: the file, as an error should call it.
        layouts: those to try. Where several fit, one that fixes the number of classes wins; otherwise none does.
    Raises: FormatError, naming the first layers that differ from the nearest layout, or the layouts that fit equally.
    """
    best: tuple[float, str] | None = None
    matches: list[Match] = []
    for layout in layouts:
        tensors = _renamed(layout, stored)
        classes = _classes(layout, tensors)
        with torch.device("meta"):
            module = layout.build(classes)
        slots = tuple(_slots(layout, module))
        differences = _differences(slots, tensors)
        wanted = {slot.theirs for slot in slots}
        extra = [f"{name!r} {value.shape}" for name, value in tensors.items() if name not in wanted]
        if not differences and not extra:
            _check_dtypes(what, tensors)
            matches.append(Match(layout, classes, module, slots))
            continue
        fitting = sum(slot.theirs in tensors and tensors[slot.theirs].shape == slot.shape for slot in slots)
        shared = sum(slot.theirs in tensors for slot in slots)
        score = (fitting + shared / 2) / (len(slots) + len(tensors))
        if best is None or score > best[0]:
            text = f"{fitting} of {len(slots)} tensors fit its layout {layout.name!r}. {_first(differences, extra)}"
            best = score, text
    fixed = [match for match in matches if match.layout.classes is not None]
    matches = fixed or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        rivals = " and ".join(repr(match.layout.name) for match in matches)
        raise FormatError(
            f"{what} fits the layouts {rivals} of {net}, whose nets or input preparations differ. "
            f"Say which it is: layout={matches[0].layout.name!r}."
        )
    assert best is not None, "a net takes at least one layout"
    names = ", ".join(layout.name for layout in layouts)
    raise FormatError(f"{what} does not hold the weights of {net}: {best[1]}. {net} takes these layouts: {names}.")


def load(match: Match, stored: StoredTensors, what: str) -> nn.Module:
    """The net with the file's numbers in it, float32, in evaluation mode.

    Raises: FormatError, when a tensor cannot be read or holds numbers that are not finite.
    """
    tensors = _renamed(match.layout, stored)
    state: dict[str, Tensor] = {}
    for slot in match.slots:
        value = tensors[slot.theirs].read().to(torch.float32)
        _check_finite(value, slot.theirs, what)
        state[slot.ours] = _ours(match, slot.ours, value, state).contiguous()
    for name, buffer in match.module.named_buffers():
        if name.endswith(_COUNTER):
            state[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    match.module.load_state_dict(state, strict=True, assign=True)
    return match.module.eval()


def _check_finite(value: Tensor, name: str, what: str) -> None:
    """Raises: FormatError, for numbers that are infinite or none."""
    # One such number makes the sum so; a sum of finite ones may be infinite too, and then all are looked at.
    if value.is_floating_point() and not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        raise FormatError(f"{what}: {name!r} holds numbers that are not finite. The file is of no use.")


def into(module: nn.Module, stored: StoredTensors, what: str) -> nn.Module:
    """A copy of a module with a file's numbers, where the file has exactly its names and shapes.

    Args:
        module: left as it is; the copy shares nothing of its weights.
    Raises: FormatError, naming the first tensors that differ, or that cannot be read.

    >>> stored = {"weight": Stored((1, 2), "float32", lambda: torch.tensor([[3.0, 4.0]]))}
    >>> into(nn.Linear(2, 1, bias=False), stored, "w.pth").weight.tolist()
    [[3.0, 4.0]]
    """
    from kindling.surgery.net import twin

    own = module.state_dict()
    wanted = {name: tensor for name, tensor in own.items() if not name.endswith(_COUNTER) or name in stored}
    missing = [f"{name!r} {tuple(tensor.shape)}" for name, tensor in wanted.items() if name not in stored]
    extra = [f"{name!r} {value.shape}" for name, value in stored.items() if name not in own]
    other = [
        f"{name!r} is {stored[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    for say, names in (("lacks", missing), ("has", extra), ("differs:", other)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            hint = "" if say != "has" else ", which the model has not"
            raise FormatError(f"{what} does not fit the model: it {say} {', '.join(names[:_SHOWN])}{more}{hint}.")
    made = twin(module, lambda tensor: torch.empty_like(tensor))
    held, before = _tensors(made), _tensors(module)
    for name, tensor in wanted.items():
        value = stored[name].read()
        if value.is_floating_point() != tensor.is_floating_point():
            raise FormatError(f"{what}: {name!r} is {value.dtype}, the model's is {tensor.dtype}.")
        _check_finite(value, name, what)
        held[name].data = value.to(tensor.device, tensor.dtype)  # taken as it is: what was read is nobody else's
    for name, tensor in held.items():
        if name not in wanted:
            tensor.data = before[name].detach().clone()
    return made


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are never saved, under every name that they have."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _renamed(layout: Layout, stored: StoredTensors) -> dict[str, Stored]:
    known = set(layout.layers.values())
    tensors = {}
    for name, value in stored.items():
        layer, separator, role = name.rpartition("/" if layout.keras else ".")
        if role == _COUNTER:
            continue
        if layer not in known and layer in layout.renamed:
            name = layout.renamed[layer] + separator + role
        tensors[name] = value
    return tensors


def _classes(layout: Layout, tensors: StoredTensors) -> int | None:
    """The number of classes to build the net for, so that the rest of the file can be compared."""
    if layout.head is None:
        return None
    if layout.classes is not None:
        return layout.classes
    head = layout.layers[layout.head]
    kernel = tensors.get(f"{head}/kernel" if layout.keras else f"{head}.weight")
    if kernel is None or not kernel.shape:
        return 1000
    classes = kernel.shape[-1] if layout.keras else kernel.shape[0]
    # A file of another net can have anything here: what cannot be a classifier is left to differ.
    return classes if 1 <= classes < 1_000_000 else 1000


def _slots(layout: Layout, module: nn.Module) -> list[_Slot]:
    slots = []
    for ours, tensor in module.state_dict().items():
        layer, _, role = ours.rpartition(".")
        if role == _COUNTER:
            continue
        theirs, shape = layout.layers[layer], tuple(tensor.shape)
        if not layout.keras:
            slots.append(_Slot(ours, f"{theirs}.{role}", shape))
            continue
        part = module.get_submodule(layer)
        if isinstance(part, nn.BatchNorm2d):
            role = {"weight": "gamma", "bias": "beta"}.get(role, role)
        if role == "weight" and isinstance(part, nn.Conv2d):
            out, within, *sides = shape
            shape = (*sides, out, within) if part.groups > 1 else (*sides, within, out)
        elif role == "weight":
            shape = shape[::-1]
        slots.append(_Slot(ours, f"{theirs}/{_KERAS_ROLES.get(role, role)}", shape))
    return slots


def _differences(slots: Sequence[_Slot], tensors: StoredTensors) -> list[str]:
    """One sentence for each layer that lacks a tensor, or has one of another shape; in the net's order."""
    found: dict[str, str] = {}
    for slot in slots:
        layer = slot.ours.rpartition(".")[0]
        if slot.theirs not in tensors:
            found.setdefault(layer, f"{layer} needs {slot.theirs!r} {slot.shape}, which the file lacks")
        elif tensors[slot.theirs].shape != slot.shape:
            seen = tensors[slot.theirs].shape
            found.setdefault(layer, f"{layer} needs {slot.theirs!r} {slot.shape}, which is {seen} in the file")
    return list(found.values())


def _first(differences: Sequence[str], extra: Sequence[str]) -> str:
    """The first layers that differ and the first tensors nobody asked for, as the middle of an error message."""
    parts = []
    if differences:
        more = len(differences) - _SHOWN
        parts.append(
            f"Layers that differ: {'; '.join(differences[:_SHOWN])}" + (f"; and {more} more" if more > 0 else "")
        )
    if extra:
        more = len(extra) - _SHOWN
        parts.append(f"Not part of it: {', '.join(extra[:_SHOWN])}" + (f" and {more} more" if more > 0 else ""))
    return ". ".join(parts)


def _check_dtypes(what: str, tensors: StoredTensors) -> None:
    for name, value in tensors.items():
        if value.dtype not in _FLOATS:
            raise FormatError(
                f"{what}: {name!r} is {value.dtype}, not floating point. Dequantise quantised weights first."
            )


def _ours(match: Match, name: str, value: Tensor, loaded: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the file in the axis order of torch."""
    layout, (layer, _, role) = match.layout, name.rpartition(".")
    if not layout.keras or role != "weight":
        return value
    part = match.module.get_submodule(layer)
    if isinstance(part, nn.Conv2d):
        # (height, width, channels, 1) of a depthwise kernel becomes (channels, 1, height, width).
        return value.permute(2, 3, 0, 1) if part.groups > 1 else value.permute(3, 2, 0, 1)
    if isinstance(part, nn.Linear):
        if layer in layout.flattened:
            channels = loaded[f"{layout.flattened[layer]}.weight"].shape[0]
            places = math.prod(value.shape[:-1]) // channels
            # Keras flattened (place, channel), torch flattens (channel, place).
            value = value.reshape(places, channels, -1).transpose(0, 1).reshape(places * channels, -1)
        return value.t()
    return value
