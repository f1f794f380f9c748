"""What the inputs of an imported graph need: the steps that make them, and a graph that takes what steps make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from kindling.errors import ConfigError, FormatError
from kindling.nets.layers_onnx import OnnxOp
from kindling.nets.onnx_ops.registry import DTYPES
from kindling.prepare import ArrayStep, ImageStep, Step
from kindling.prepare.base import step_from_json
from kindling.signature import TensorSpec

METADATA = "kindling"
"""Key of what kindling itself puts into the files that it exports: preparation and labels, as JSON."""
MAX_SAID = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input as the file states it."""

    name: str
    row: tuple[int, ...]
    dtype: torch.dtype
    fixed: int = 0
    """The one size of a batch; 0 where any will do."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What kindling put into a file that it exported; nothing for all others."""

    steps: tuple[Step, ...] = ()
    """In the order of the inputs."""
    outputs: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None


def said(text: str | None, what: str) -> Said:
    """Read it.

    Raises: FormatError, when it is not what kindling writes.
    """
    if text is None:
        return Said()
    if len(text) > MAX_SAID:
        raise FormatError(f"{what}: what it says under {METADATA!r} takes {len(text):,} characters.")
    try:
        data = json.loads(text)
        labels = data.get("labels")
        return Said(
            steps=tuple(step_from_json(step) for step in data["inputs"]),
            outputs=tuple(map(str, data.get("outputs", ()))),
            labels=tuple(map(str, labels)) if labels is not None else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{what}: what it says under {METADATA!r} is damaged.") from error


def tensor_spec(step: Step) -> TensorSpec:
    """What a step's tensor looks like, from one row of zeros.

    Raises: FormatError, when one row is larger than any that is worth a try.
    """
    spec = step.packed_spec()
    if sum(int(np.prod(shape)) for _, shape in spec.values()) > 2**28:
        raise FormatError(f"one row of input {step.name!r} has more than {2**28:,} numbers.")
    tensor = step.batch({name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in spec.items()})
    return TensorSpec(("N", *tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))


def prepared(
    module: fx.GraphModule,
    inputs: Sequence[Input],
    image: Mapping[str, Any] | None,
    kept: Sequence[Step],
    what: str,
) -> tuple[fx.GraphModule, list[Step]]:
    """The module behind what its inputs need, and the steps that make them.

    Args:
        image: fields of the ImageStep for inputs of pictures, from the caller.
        kept: steps that the file itself names, in the order of the inputs; taken where the caller says nothing.
    Raises: ConfigError, for fields that make no step; FormatError, for kept steps that do not fit.
    """
    steps: list[Step] = []
    if kept and len(kept) != len(inputs):
        raise FormatError(f"{what} names {len(kept)} preparations for {len(inputs)} inputs.")
    for place, one in enumerate(inputs):
        if image is None and kept:
            step = kept[place]
            shape = tuple(tensor_spec(step).shape[1:])
            if isinstance(step, ImageStep) and step.shape == one.row:
                module = _behind(module, place, one)
            elif shape != one.row:
                raise FormatError(f"{what}: input {one.name!r} has rows of {one.row}, its preparation makes {shape}.")
            steps.append(step)
            continue
        layout = _layout(one.row)
        if image is None or layout is None:
            kind = "float32" if one.dtype.is_floating_point else str(one.dtype).removeprefix("torch.")
            steps.append(ArrayStep(one.name, one.name, one.row, kind))
            continue
        tall, wide, channels = layout
        own = {"channels": "RGB" if channels == 3 else "L", **image, "size": (tall, wide)}
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        try:
            steps.append(ImageStep(one.name, **own))
        except (ConfigError, TypeError) as error:
            why = f"does not make an ImageStep ({error})"
            raise ConfigError("image", dict(image), why, "See ImageStep") from error
        if one.row != (channels, tall, wide) or not one.dtype.is_floating_point:
            module = _behind(module, place, one)
    if image is not None and not any(isinstance(step, ImageStep) for step in steps):
        raise ConfigError("image", dict(image), "is given for a net without an input of pictures", "Leave it out")
    return module, steps


def _layout(row: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Height, width and channels of a picture, channels first or last; None for what is no picture."""
    if len(row) == 3 and row[0] in (1, 3):
        return row[1], row[2], row[0]
    if len(row) == 3 and row[2] in (1, 3):
        return row
    return None


def _behind(module: fx.GraphModule, place: int, one: Input) -> fx.GraphModule:
    """The same net for pictures as kindling makes them: floats, channels first."""
    node = [node for node in module.graph.nodes if node.op == "placeholder"][place]
    users = list(node.users)
    last = node
    if one.row[0] not in (1, 3) or one.row[2] in (1, 3):
        with module.graph.inserting_after(last):
            last = module.graph.call_function(torch.permute, (last, (0, 2, 3, 1)))
    if not one.dtype.is_floating_point:
        code = next(code for code, dtype in DTYPES.items() if dtype == one.dtype)
        name = "whole_pixels" if place == 0 else f"whole_pixels_{place}"
        module.add_module(name, OnnxOp("Cast", 13, (("to", code),)))
        with module.graph.inserting_after(last):
            last = module.graph.call_module(name, (last,))
    for user in users:
        user.replace_input_with(node, last)
    module.graph.lint()
    module.recompile()
    return module
