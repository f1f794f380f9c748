"""A torch graph in the making: modules and functions under Caffe's names, shapes followed on the meta device.

Nothing here allocates: every module is made on the meta device, and every node is run there once, so that a net that
does not fit together is refused layer by layer. Numbers are put in at the end, by `weights.py`.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import FormatError
from kindling.formats.caffe.schema import Message, where

MAX_ROW = 2**31
"""Numbers in one row of a blob: beyond it, a net is refused."""
MAX_NODES = 10_000

Fit = Callable[[list[Tensor]], list[Tensor]]
"""Turns the blobs of a layer into the tensors of its slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where one of a layer's blobs goes."""

    tensor: str
    """Name of the parameter or buffer, with the path of its module."""
    filler: Message
    """How it begins without weights."""
    transpose: bool = False
    """Whether Caffe keeps the matrix the other way round."""
    kind: str = "plain"
    """`"plain"`, or `"mean"`, `"variance"`, `"factor"` for the three statistics of a BatchNorm."""


@dataclass(slots=True)
class LayerWeights:
    """The slots of one layer, in the order of its blobs."""

    layer: Message
    slots: list[Slot]


class Emitter:
    """Adds nodes to a graph; blobs are graph nodes."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        """What each node gives, on the meta device."""
        self.weights: list[LayerWeights] = []
        self.aliases: dict[str, str] = {}
        self._used: dict[str, int] = {}
        """Names taken, with the number that the last layer of that name got."""

    def error(self, layer: Message, why: str) -> FormatError:
        """An error that names the layer, its type and its line."""
        name, kind = str(layer.get("name"))[:100], str(layer.get("type"))[:60]
        return FormatError(f"{self.what}: layer {name!r} of type {kind!r}{where(layer.line)} {why}.")

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a blob, with the batch that the file declares."""
        return tuple(self.values[node].shape)

    def name(self, wanted: str) -> str:
        """A name for a layer that Python, fx and nobody else uses."""
        name = re.sub(r"\W", "_", wanted[:120], flags=re.ASCII) or "layer"
        if name[0].isdigit():
            name = f"_{name}"
        if keyword.iskeyword(name) or hasattr(builtins, name) or hasattr(fx.GraphModule, name) or name in _TAKEN:
            name = f"{name}_layer"
        free, count = name, self._used.get(name, 1)
        while free in self._used:
            count += 1
            free = f"{name}__{count}"
        self._used[name] = count
        self._used.setdefault(free, 1)
        return free

    def input(self, name: str, shape: Sequence[int]) -> fx.Node:
        """A placeholder."""
        free = self.name(name)
        node = self.graph.create_node("placeholder", free, name=free)
        with torch.device("meta"):
            self.values[node] = torch.empty(tuple(shape))
        return node

    def module(self, wanted: str, module: nn.Module, *inputs: fx.Node, alias: bool = True) -> fx.Node:
        """A node that calls a new module."""
        path = self.name(wanted)
        self.root.add_module(path, module.eval())
        node = self.graph.create_node("call_module", path, inputs, name=path)
        self._follow(node, module, inputs, {})
        if alias:
            self._alias(wanted, node)
        return node

    def again(self, path: str, *inputs: fx.Node) -> fx.Node:
        """A node that calls a module once more."""
        node = self.graph.create_node("call_module", path, inputs, name=self.name(path))
        self._follow(node, self.root.get_submodule(path), inputs, {})
        return node

    def function(self, wanted: str, function: Callable[..., Any], *args: Any, alias: bool = True) -> fx.Node:
        """A node that calls a function of nodes and plain values."""
        node = self.graph.create_node("call_function", function, args, name=self.name(wanted))
        self._follow(node, function, args, {})
        if alias:
            self._alias(wanted, node)
        return node

    def _alias(self, wanted: str, node: fx.Node) -> None:
        if wanted and wanted != node.name:
            self.aliases.setdefault(wanted, node.name)

    def _follow(self, node: fx.Node, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if len(self.values) >= MAX_NODES:
            raise FormatError(f"{self.what} has more than {MAX_NODES:,} layers.")
        args = fx.node.map_arg(args, lambda n: self.values[n])
        with torch.no_grad():
            value = call(*args, **kwargs)
        for part in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(part, Tensor):
                raise ValueError(f"it gives {type(part).__name__}, not a tensor")
            if part.numel() // max(part.shape[0] if part.ndim else 1, 1) > MAX_ROW:
                raise ValueError(f"it gives rows of shape {tuple(part.shape[1:])}: more than {MAX_ROW:,} numbers")
            if part.numel() == 0:
                raise ValueError(f"it gives nothing: a blob of shape {tuple(part.shape)}")
        self.values[node] = value

    def parameters(self, layer: Message, *slots: Slot) -> None:
        """Say where a layer's blobs go."""
        self.weights.append(LayerWeights(layer, list(slots)))


_TAKEN = frozenset({"meta", "_graph", "_codegen", "self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree"})
