"""Puts a net together from another system's description: named layers, functions between them, weights from the file.

Layers are made on the meta device and shapes are followed as they are added, so that a file that lies about its sizes
costs no memory and the layer at fault can be named. Readers of whole models use it; the registry is in `models.py`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import FormatError
from kindling.signature import Signature, TensorSpec

MAX_LAYERS = 10_000
MAX_ROW = 2**31
"""Numbers in one row of anything inside a net: beyond it, a file is refused."""
ROWS = 7919  # of the made-up batch whose shapes are followed: a prime, so that it is told from other sizes
_TAKEN = frozenset(dir(fx.GraphModule)) | {"meta", "self", "torch", "device", "inf", "nan", "NoneType", "operator"}


@dataclass(frozen=True, slots=True)
class Wire:
    """What one node gives: the node, and a tensor of its shape without memory."""

    node: fx.Node
    value: Any

    @property
    def row(self) -> tuple[int, ...]:
        """Shape without the batch axis."""
        return tuple(self.value.shape[1:])

    @property
    def rank(self) -> int:
        """Number of axes, the batch among them."""
        return int(self.value.dim())


class Assembly:
    """A net that is being put together.

    >>> net = Assembly("net.zip")
    >>> x = net.input("features", (3,))
    >>> y = net.layer("fc 1", lambda: nn.Linear(3, 2), x, tensors={"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    >>> module, signature = net.finish({"scores": net.call("twice", torch.add, y, y)})
    >>> module(torch.ones(1, 3)).detach(), signature.outputs
    (tensor([[6., 6.]]), {'scores': TensorSpec(shape=('N', 2), dtype='float32')})
    >>> [node.name for node in module.graph.nodes]
    ['features', 'fc_1', 'twice', 'output']
    """

    def __init__(self, what: str) -> None:
        """
        Args:
            what: names the file in messages.
        """
        self.what = what
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._names: set[str] = set()
        self._inputs: dict[str, TensorSpec] = {}
        self._twins: dict[str, nn.Module] = {}

    def input(self, name: str, row: Sequence[int], dtype: str = "float32") -> Wire:
        """A tensor that the net is given; `row` is its shape without the batch axis."""
        spec = TensorSpec(("N", *row), dtype)
        unique = self._name(name)
        node = self._graph.create_node("placeholder", unique, name=unique)
        self._inputs[name] = spec
        return Wire(node, self._meta(name, lambda: torch.empty(ROWS, *row, dtype=getattr(torch, dtype))))

    def layer(
        self,
        name: str,
        build: Callable[[], nn.Module],
        *inputs: Wire,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Wire:
        """A layer under its own name.

        Args:
            build: makes it; called on the meta device.
            tensors: its parameters and buffers by name, all of them.
        Raises: FormatError, naming the layer, when it cannot be made, does not fit the tensors or its input.
        """
        module = self._meta(name, build)
        fill(module, tensors or {}, f"{self.what}: layer {name!r}")
        twin = self._meta(name, build).eval()
        unique = self._name(name)
        node = self._graph.create_node("call_module", unique, tuple(wire.node for wire in inputs), {}, name=unique)
        node.target = node.name  # should fx have found the name unfit, both have the same one
        self._root.add_module(node.name, module)
        self._twins[node.name] = twin
        return Wire(node, self._meta(name, lambda: twin(*(wire.value for wire in inputs))))

    def again(self, name: str, first: Wire, *inputs: Wire) -> Wire:
        """A layer that is there already, given something else: the weights are shared.

        Args:
            first: what `layer` returned for it.
        """
        target = str(first.node.target)
        node = self._graph.create_node(
            "call_module", target, tuple(wire.node for wire in inputs), {}, name=self._name(name)
        )
        return Wire(node, self._meta(name, lambda: self._twins[target](*(wire.value for wire in inputs))))

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Wire:
        """A function of wires and plain values; one that graphs may hold (`kindling.graph.FUNCTIONS`)."""
        pick = _swap(lambda wire: wire.node)
        node = self._graph.create_node("call_function", function, pick(args), pick(kwargs), name=self._name(name))
        known = _swap(lambda wire: wire.value)
        return Wire(node, self._meta(name, lambda: function(*known(args), **known(kwargs))))

    def method(self, name: str, method: str, wire: Wire, *args: Any) -> Wire:
        """A tensor method that graphs may hold (`kindling.graph.METHODS`)."""
        node = self._graph.create_node("call_method", method, (wire.node, *args), {}, name=self._name(name))
        return Wire(node, self._meta(name, lambda: getattr(wire.value, method)(*args)))

    def shape_of(self, name: str, wire: Wire, sizes: Sequence[int]) -> tuple[int, ...]:
        """What a reshape of a wire to these sizes gives, the batch axis included."""
        return tuple(self._meta(name, lambda: wire.value.reshape(*sizes)).shape)

    def finish(self, outputs: Mapping[str, Wire]) -> tuple[fx.GraphModule, Signature]:
        """The net in inference mode, and its signature.

        Raises: FormatError, when an output does not have one row for each row of the input.
        """
        specs = {}
        for name, wire in outputs.items():
            if wire.rank == 0 or wire.value.shape[0] != ROWS:
                raise FormatError(f"{self.what}: output {name!r} does not give one row for each row of the input.")
            specs[name] = TensorSpec(("N", *wire.row), str(wire.value.dtype).removeprefix("torch."))
        nodes = tuple(wire.node for wire in outputs.values())
        self._graph.output(nodes[0] if len(nodes) == 1 else nodes)
        module = fx.GraphModule(self._root, self._graph)
        return module.eval(), Signature(dict(self._inputs), specs)

    def _meta(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            with torch.device("meta"), torch.no_grad():
                made = make()
        except FormatError:
            raise
        except Exception as error:  # torch raises what it likes; the file is at fault
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise FormatError(f"{self.what}: layer {name!r} cannot be made of what the file says: {line}.") from error
        if isinstance(made, Tensor) and made.dim() and made.numel() > MAX_ROW * max(1, int(made.shape[0])):
            raise FormatError(
                f"{self.what}: layer {name!r} makes rows of {tuple(made.shape[1:])}, too large to be meant."
            )
        return made

    def _name(self, name: str) -> str:
        """A name that a graph may hold, and that nothing else has."""
        if len(self._names) >= MAX_LAYERS:
            raise FormatError(f"{self.what} has more than {MAX_LAYERS:,} layers, which are refused.")
        plain = valid_name(name)
        unique, count = plain, 1
        while unique in self._names:
            count += 1
            unique = f"{plain}_{count}"
        self._names.add(unique)
        return unique


def valid_name(name: str) -> str:
    """A layer's name with everything replaced that a graph cannot hold.

    >>> valid_name("fire2/conv 1x1"), valid_name("1"), valid_name("forward"), valid_name("")
    ('fire2_conv_1x1', '_1', 'forward_layer', 'layer')
    """
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:100] or "layer"
    if plain[0].isdigit():
        plain = f"_{plain}"
    if keyword.iskeyword(plain) or plain in _TAKEN or (plain.startswith("__") and plain.endswith("__")):
        plain = f"{plain.strip('_') or 'x'}_layer"
    return plain


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors in place of a meta module's own, float32 where it has floats; none may lack or be left over.

    Raises: FormatError, saying what does not fit.
    """
    left = dict(tensors)
    slots: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for path, old in slots:
        owner, _, leaf = path.rpartition(".")
        holder = module.get_submodule(owner)
        if path not in left and leaf == "num_batches_tracked":
            holder._buffers[leaf] = torch.zeros((), dtype=torch.int64)
            continue
        new = left.pop(path, None)
        if new is None:
            raise FormatError(f"{where} has no {path!r} in the file.")
        if tuple(new.shape) != tuple(old.shape):
            raise FormatError(f"{where}: {path!r} is {_by(new.shape)} in the file, the layer needs {_by(old.shape)}.")
        new = new.detach().to(old.dtype).contiguous()
        if isinstance(old, nn.Parameter):
            holder._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            holder._buffers[leaf] = new
    if left:
        raise FormatError(f"{where} has no place for {', '.join(sorted(left))}.")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _swap(of: Callable[[Wire], Any]) -> Callable[[Any], Any]:
    def swap(value: Any) -> Any:
        if isinstance(value, Wire):
            return of(value)
        if isinstance(value, list | tuple):
            return type(value)(swap(part) for part in value)
        if isinstance(value, dict):
            return {key: swap(part) for key, part in value.items()}
        return value

    return swap
