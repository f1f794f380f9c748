"""Operators on sequences (Python lists of tensors) and optional values (None where there is none)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import axis_of, ints, op, whole


@op("SequenceConstruct")
def construct(*inputs: Tensor) -> list[Tensor]:
    return list(inputs)


@op("SequenceEmpty")
def empty(*, dtype: int = 1) -> list[Tensor]:
    return []


@op("SequenceAt")
def at(sequence: list[Tensor], position: Tensor) -> Tensor:
    return sequence[whole(position)]


@op("SequenceInsert")
def insert(sequence: list[Tensor], tensor: Tensor, position: Tensor | None = None) -> list[Tensor]:
    place = len(sequence) if position is None else whole(position)
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], tensor, *sequence[place:]]


@op("SequenceErase")
def erase(sequence: list[Tensor], position: Tensor | None = None) -> list[Tensor]:
    place = -1 if position is None else whole(position)
    place = place + len(sequence) if place < 0 else place
    return [*sequence[:place], *sequence[place + 1 :]]


@op("SequenceLength")
def length(sequence: list[Tensor]) -> Tensor:
    return torch.tensor(len(sequence), dtype=torch.int64, device="cpu")


@op("ConcatFromSequence")
def concat(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@op("SplitToSequence")
def split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Pieces of the sizes given, or of one size; without any, one piece for each entry of the axis."""
    along = axis_of(axis, x.dim())
    if sizes is None:
        pieces = torch.split(x, 1, along)
        return [piece if keepdims else piece.squeeze(along) for piece in pieces]
    found = ints(sizes) or []
    return list(torch.split(x, found[0] if sizes.dim() == 0 else found, along))


@op("Optional")
def optional(value: Any = None, *, type: Any = None) -> Any:
    return value


@op("OptionalGetElement")
def get_element(value: Any) -> Any:
    if value is None:
        raise ValueError("an optional value is read that is not there")
    return value


@op("OptionalHasElement")
def has_element(value: Any = None) -> Tensor:
    return torch.tensor(value is not None, device="cpu")
