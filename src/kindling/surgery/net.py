"""Net: a traced module whose layer names last, and the chart of its vertices.

`torch.fx.GraphModule` re-traces itself whenever it is unpickled and gives new names to the functions in it; a `Net`
carries its graph as data, so that names, frozen layers and stored cuts stay true after every copy and trip. Here too:
`twin` (a copy of a module that shares its tensors) and the merging of activations into vertices. Tracing lives in
`surgery.trace`, everything that makes new nets in `surgery.cut` and `surgery.freeze`.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from kindling.errors import ModelError, did_you_mean

NOTES = "kindling"
"""Key in a GraphModule's `meta` under which a Net keeps its notes, which are plain JSON: `aliases` (further names of
nodes: containers such as `layer1.0`) and `merged` (activation node -> the node whose vertex it belongs to)."""


@dataclass(frozen=True)
class _Ref:
    """A node, in a record."""

    name: str


@dataclass(frozen=True)
class _Functional:
    """A function that pickle cannot name, such as `F.max_pool2d`, by its name in torch.nn.functional."""

    name: str


@cache
def _functional_names() -> dict[int, str]:
    names = {}
    for name, value in vars(F).items():
        if callable(value) and getattr(value, "__qualname__", "").startswith("boolean_dispatch"):
            names[id(value)] = name
    return names


class Net(fx.GraphModule):
    """A GraphModule that copies and pickles by its graph, not by tracing again."""

    def __init__(self, root: nn.Module, graph: fx.Graph, notes: Mapping[str, Any] | None = None) -> None:
        super().__init__(root, graph, "Net")
        names = {node.name for node in self.graph.nodes}
        notes = notes or {}
        self.meta[NOTES] = {
            "aliases": {a: n for a, n in dict(notes.get("aliases", {})).items() if n in names},
            "merged": {a: n for a, n in dict(notes.get("merged", {})).items() if a in names and n in names},
        }

    @property
    def notes(self) -> dict[str, dict[str, str]]:
        """Aliases and merged activations, by node name."""
        return cast("dict[str, dict[str, str]]", self.meta[NOTES])

    def _body(self) -> nn.Module:
        body = nn.Module()
        for slot in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            body.__dict__[slot] = self.__dict__[slot]
        body.training = self.training
        return body

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        made = _thaw(copy.deepcopy(self._body(), memo), _freeze(self.graph), copy.deepcopy(self.notes))
        memo[id(self)] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _thaw, (self._body(), _freeze(self.graph), self.notes)


Record = tuple[str, str, Any, Any, Any]


def _freeze(graph: fx.Graph) -> list[Record]:
    records = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), cast(Any, lambda n: _Ref(n.name)))
        target = node.target
        if node.op == "call_function" and id(target) in _functional_names():
            target = _Functional(_functional_names()[id(target)])
        records.append((node.op, node.name, target, args, kwargs))
    return records


def _thaw(body: nn.Module, records: list[Record], notes: Mapping[str, Any]) -> Net:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def back(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Ref) else value

    for op, name, target, args, kwargs in records:
        if isinstance(target, _Functional):
            target = getattr(F, target.name)
        args, kwargs = (fx.node.map_aggregate(part, back) for part in (args, kwargs))
        nodes[name] = graph.create_node(
            op, target, cast("tuple[Any, ...]", args), cast("dict[str, Any]", kwargs), name=name
        )
    net = Net(body, graph, notes)
    net.training = body.training
    return net


def twin(module: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda t: t.detach()) -> nn.Module:
    """A copy of a module: new module objects, new Parameters, the same memory under them.

    Modes, `requires_grad` and `.to(...)` of the copy do not reach the original. `tensor` may put other tensors in.
    Raises: ModelError, for lazy modules that have no shapes yet and for modules that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, held in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(held, UninitializedParameter | nn.UninitializedBuffer):
            raise ModelError(f"{name!r} has no shape yet (a lazy module). Run one batch through the module first.")
        if isinstance(held, nn.Parameter):
            memo[id(held)] = nn.Parameter(tensor(held), requires_grad=held.requires_grad)
        else:
            memo[id(held)] = tensor(held)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} cannot be copied: {error}. Keep locks, files and computed tensors "
            "out of modules: they cannot travel to workers either."
        ) from error


def on_meta(module: nn.Module) -> nn.Module:
    """The same module without any memory: every tensor on the meta device."""
    return twin(module, lambda t: torch.empty_like(t, device="meta"))


def install(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Put a module, parameter or buffer under a dotted path, making plain containers on the way."""
    *above, field = path.split(".")
    for part in above:
        if not isinstance(root._modules.get(part), nn.Module):
            root._modules[part] = nn.Module()
        root = cast(nn.Module, root._modules[part])
    if isinstance(value, nn.Module):
        root._modules[field] = value
    elif isinstance(value, nn.Parameter):
        root._parameters[field] = value
    else:
        root._buffers[field] = value


def fetch(root: nn.Module, path: str) -> nn.Module | Tensor | None:
    """What stands under a dotted path, or None."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, nn.Module | Tensor) else None


# ------------------------------------------------------------------------------------------------ kinds of nodes

_ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.LogSoftmax, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Softmax2d,
    nn.Softmin, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_ACTIVATION_NAMES = frozenset({
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "log_softmax", "mish", "relu", "relu6", "rrelu", "selu", "silu", "sigmoid", "softmax", "softmin", "softplus",
    "softshrink", "softsign", "tanh", "tanhshrink", "threshold",
})  # fmt: skip
_ACTIVATION_FUNCTIONS = frozenset(
    getattr(home, name) for home in (torch, F) for name in _ACTIVATION_NAMES if callable(getattr(home, name, None))
)
_TUPLE_MODULES: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.MultiheadAttention)
_SCALAR_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride"})
_SCALAR_FUNCTIONS = frozenset(
    {getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem")}
)
_AGAIN = re.compile(r"__call(\d+)(?:_\d+)?$")


def sanitize(path: str) -> str:
    """A dotted path as fx writes it in node names."""
    name = re.sub(r"\W", "_", path)
    return f"_{name}" if name[:1].isdigit() else name


def is_layer(module: nn.Module) -> bool:
    """Whether the module is one layer: torch's own, except Sequential, and what `kindling.graph` allows besides."""
    from kindling.graph import is_own_layer

    if is_own_layer(module):
        return True
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


def is_activation(net: nn.Module, node: fx.Node) -> bool:
    """An elementwise or softmax non-linearity without weights, whatever way it is written."""
    if node.op == "call_module":
        return isinstance(fetch(net, str(node.target)), _ACTIVATION_MODULES)
    if node.op == "call_function":
        return node.target in _ACTIVATION_FUNCTIONS
    return node.op == "call_method" and node.target in _ACTIVATION_NAMES


def is_scalar(node: fx.Node) -> bool:
    """Plumbing: sizes, shapes, dtypes and arithmetic on them; no tensor comes out."""
    if node.op == "call_method":
        return node.target in _SCALAR_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return True
    inputs = node.all_input_nodes
    return node.target in _SCALAR_FUNCTIONS and bool(inputs) and all(is_scalar(n) for n in inputs)


def node_kind(net: nn.Module, node: fx.Node) -> str:
    """`"Conv2d"` for modules, `"cat"` for functions and methods."""
    if node.op == "call_module":
        layer = fetch(net, str(node.target))
        return str(getattr(layer, "kind", type(layer).__name__))
    if node.op == "call_function":
        return _functional_names().get(id(node.target), getattr(node.target, "__name__", str(node.target)))
    return str(node.target)


# ------------------------------------------------------------------------------------------------ untraceable parts


@dataclass(frozen=True)
class Part:
    """An untraceable module inside a net, at one node."""

    node: fx.Node
    prefix: str
    """What stands before the names of its layers: `""` when the whole net is untraceable, else the module's path."""
    path: str
    """Where the module is in the net."""
    module: nn.Module
    stops: tuple[str, ...]
    """Layers at which it is cut, by their names inside; `""` is its own return value."""

    def outer(self, name: str) -> str:
        """The name in the net of a layer inside."""
        return ".".join(part for part in (self.prefix, name) if part) or str(self.node.target)

    def inner_names(self) -> dict[str, nn.Module]:
        """Layers by their name in the net: leaves, and modules that hold tensors of their own."""
        from kindling.surgery.opaque import CutAway

        found = {}
        for path, module in self.module.named_modules():
            if isinstance(module, CutAway):
                continue
            holds = any(True for _ in module.parameters(recurse=False)) or any(
                True for _ in module.buffers(recurse=False)
            )
            if holds or is_layer(module) or not any(True for _ in module.children()):
                if isinstance(module, nn.ModuleList | nn.ModuleDict):
                    continue
                found[self.outer(path)] = module
        return found


def part_of(net: nn.Module, node: fx.Node) -> Part | None:
    """The untraceable module that a node calls, if it does."""
    from kindling.surgery.opaque import Opaque

    if node.op != "call_module":
        return None
    target = str(node.target)
    module = fetch(net, target)
    if isinstance(module, Opaque):
        return Part(node, module.prefix, f"{target}.inner", module.inner, module.stops)
    if isinstance(module, nn.Module) and not is_layer(module):
        return Part(node, target, target, module, ("",))
    return None


# ------------------------------------------------------------------------------------------------ vertices


@dataclass(frozen=True)
class Vertex:
    """One named layer: the node that computes, and the node whose value the name means (after the activation)."""

    name: str
    node: fx.Node
    end: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,) if self.node is self.end else (self.node, self.end)


@dataclass(frozen=True)
class Inner:
    """A layer inside an untraceable part, by its name there."""

    name: str
    part: Part
    stop: str


class Chart:
    """The vertices of a net in order, and every name they answer to."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.nodes: dict[str, fx.Node] = {node.name: node for node in net.graph.nodes}
        self.vertices: dict[str, Vertex] = {}
        self.of: dict[fx.Node, Vertex] = {}
        self.parts: dict[fx.Node, Part] = {}
        self.inputs = [node for node in net.graph.nodes if node.op == "placeholder"]
        self.output = next(node for node in net.graph.nodes if node.op == "output")
        ends = {main: act for act, main in net.notes["merged"].items()}
        # A module of one's own that computes by functions keeps its dotted name.
        self._dotted = {
            n: a for a, n in net.notes["aliases"].items() if sanitize(a) == n and self.nodes[n].op != "call_module"
        }
        for node in net.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method") or node in self.of or is_scalar(node):
                continue
            part = part_of(net, node)
            if part is not None:
                self.parts[node] = part
                if len(part.stops) > 1:
                    continue  # its outputs, taken by getitem, are the vertices
            end = self.nodes[ends[node.name]] if node.name in ends else node
            vertex = Vertex(self._name(node, part), node, end)
            self.vertices[vertex.name] = vertex
            for own in vertex.nodes:
                self.of[own] = vertex
        self.aliases: dict[str, Vertex] = {}
        for alias, name in net.notes["aliases"].items():
            if alias not in self.vertices and self.nodes[name] in self.of:
                self.aliases[alias] = self.of[self.nodes[name]]
        for vertex in self.vertices.values():
            if vertex.end is not vertex.node:
                self.aliases.setdefault(self._name(vertex.end, None), vertex)

    def _name(self, node: fx.Node, part: Part | None) -> str:
        if part is not None:
            return part.outer(part.stops[0])
        if node.op == "call_module":
            again = _AGAIN.search(node.name)
            return f"{node.target}#{again[1]}" if again else str(node.target)
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source = self.parts.get(node.args[0])
            if source is not None and len(source.stops) > 1 and isinstance(node.args[1], int):
                return source.outer(source.stops[node.args[1]])
        return self._dotted.get(node.name, node.name)

    def names(self) -> Iterator[str]:
        """Every name that `find` knows, layers first."""
        for part in self.parts.values():
            yield from part.inner_names()
        yield from self.vertices
        yield from self.aliases

    def find(self, name: str) -> Vertex | Inner:
        """The vertex of that name or alias, or the layer inside an untraceable part.

        Raises: ModelError, with near misses.
        """
        found = self.vertices.get(name) or self.aliases.get(name)
        if found is not None:
            return found
        for part in self.parts.values():
            inside = name if not part.prefix else name[len(part.prefix) + 1 :]
            if part.outer(inside) == name and inside and inside in dict(part.module.named_modules()):
                return Inner(name, part, inside)
        raise ModelError(f"the model has no layer {name!r}.{did_you_mean(name, dict.fromkeys(self.names()))}")

    def sources(self, vertex: Vertex) -> list[str]:
        """Names of the vertices and (by placeholder name) inputs that a vertex reads, through sizes and constants."""
        seen: dict[str, None] = {}

        def visit(node: fx.Node) -> None:
            for source in node.all_input_nodes:
                owner = self.of.get(source)
                if owner is vertex:
                    continue
                if owner is not None:
                    seen[owner.name] = None
                elif source.op == "placeholder":
                    seen[source.name] = None
                elif not is_scalar(source):
                    visit(source)

        for node in vertex.nodes:
            visit(node)
        return list(seen)

    def tensors(self, vertex: Vertex) -> dict[str, Tensor]:
        """The parameters a vertex uses, by their path in the net."""
        found: dict[str, Tensor] = {}
        for node in vertex.nodes:
            if node.op == "call_module":
                module = fetch(self.net, str(node.target))
                assert isinstance(module, nn.Module)
                found.update({f"{node.target}.{key}": value for key, value in module.named_parameters()})
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    value = fetch(self.net, str(source.target))
                    if isinstance(value, nn.Parameter):
                        found[str(source.target)] = value
        return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything their values need."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def merge_activations(net: nn.Module, graph: fx.Graph, among: set[fx.Node] | None = None) -> dict[str, str]:
    """Activation node name -> name of the node it belongs to: the layer whose output nobody else reads.

    Recurrent and attention layers, which return tuples, stand for their first tensor in the same way. `among` limits
    both sides to some nodes.
    """
    merged: dict[str, str] = {}
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if among is not None and node not in among:
            continue
        inputs = node.all_input_nodes
        if len(inputs) != 1 or node in taken or inputs[0] in taken or (among is not None and inputs[0] not in among):
            continue
        source = inputs[0]
        if node.target is operator.getitem and source.op == "call_module":
            module = fetch(net, str(source.target))
            fits = isinstance(module, _TUPLE_MODULES) and node.args[1] == 0 and source.name not in merged.values()
        else:
            fits = (
                is_activation(net, node)
                and source.op in ("call_module", "call_function", "call_method")
                and not is_activation(net, source)
                and not is_scalar(source)
                and list(source.users) == [node]
                and source.name not in merged
            )
        if fits:
            merged[node.name] = source.name
            taken.add(node)
    return merged


# ------------------------------------------------------------------------------------------------ writing in place

_VIEWS = frozenset({
    "chunk", "contiguous", "detach", "expand", "flatten", "getitem", "narrow", "permute", "reshape", "select", "split",
    "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
_VIEW_MODULES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def is_view(net: nn.Module, node: fx.Node) -> bool:
    """Whether the node's value may share memory with its first argument."""
    if node.op == "call_module":
        return isinstance(fetch(net, str(node.target)), _VIEW_MODULES)
    return node.op in ("call_function", "call_method") and node_kind(net, node) in _VIEWS


def views_back(net: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The node and those whose memory its value may share, up to the node that made it."""
    chain = [node]
    while is_view(net, chain[-1]) and chain[-1].args and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def settle_inplace(net: fx.GraphModule) -> None:
    """Let modules write in place only where nobody else can see it: never into inputs, outputs or shared values."""
    for node in net.graph.nodes:
        module = fetch(net, str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Module) and getattr(module, "inplace", False) is True:
            written = node.args[0] if node.args else None
            chain = views_back(net, written) if isinstance(written, fx.Node) else []
            alone = (
                bool(chain)
                and all(len(n.users) == 1 for n in chain)
                and chain[-1].op not in ("placeholder", "get_attr")
            )
            if not alone:
                module.inplace = False  # type: ignore[assignment]


def rebuild(root: nn.Module, graph: fx.Graph, notes: Mapping[str, Any], training: bool) -> Net:
    """A Net over `graph` with the modules of `root`, of which it keeps those that are used and nothing else."""
    net = Net(root, graph, notes)
    net.train(training)
    settle_inplace(net)
    return net


def copy_nodes(
    graph: fx.Graph,
    nodes: Iterable[fx.Node],
    made: dict[fx.Node, fx.Node],
    lookup: Callable[[fx.Node], Any] | None = None,
) -> None:
    """Copy nodes into a graph under their names; `made` maps old to new and grows."""

    def of(node: fx.Node) -> Any:
        return made[node] if lookup is None or node in made else lookup(node)

    for node in nodes:
        if node not in made:
            made[node] = graph.create_node(
                node.op,
                node.target,
                cast("tuple[Any, ...]", fx.node.map_arg(node.args, of)),
                cast("dict[str, Any]", fx.node.map_arg(node.kwargs, of)),
                name=node.name,
            )
