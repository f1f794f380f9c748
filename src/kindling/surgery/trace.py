"""Tracing: any module as a Net, in one form that the rest can rely on.

The form: functional dropout that follows the training flag is a Dropout module; nothing but activation modules writes
in place; nothing is computed that no output needs; function nodes and modules never share a name. What cannot be
brought to this form is not traced: the innermost module at fault stays whole, or `trace` gives None.
"""

from __future__ import annotations

import inspect
import operator
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kindling import graph
from kindling.errors import ModelError
from kindling.surgery.net import (
    NOTES,
    Net,
    ancestors,
    fetch,
    install,
    is_layer,
    is_view,
    merge_activations,
    rebuild,
    sanitize,
    twin,
    views_back,
)
from kindling.surgery.opaque import Opaque

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}
_INPLACE_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}


class _Unfit(Exception):
    """The trace cannot be used; `path` is the module at fault, `""` the whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


_tracing = threading.RLock()
"""fx puts its own `__call__` and `__getattr__` on `nn.Module` while it traces: one trace at a time, or they stay."""


class _Tracer(fx.Tracer):
    """Records what its own thread calls; modules that others run meanwhile (trials of a search) run as ever."""

    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.leaves = leaves
        self.path: list[str] = [""]
        self.culprit: str | None = None
        self.ends: dict[str, fx.Node] = {}
        self.scopes: dict[fx.Node, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_layer(m) or isinstance(m, Opaque) or graph.is_own_layer(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.scopes[node] = self.path[-1]
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.path.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.culprit is None:
                self.culprit = path
            raise
        finally:
            self.path.pop()
        if isinstance(result, fx.Proxy) and not self.is_leaf_module(m, path):
            self.ends.setdefault(path, result.node)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(module: nn.Module, inputs: int | None = None) -> Net | None:
    """The module as a graph of named layers that copies, pickles and cuts well, or None where it cannot be traced.

    The result shares the memory of the module's tensors, but no module object and no Parameter: freezing it or
    changing its mode leaves the original alone. A submodule that cannot be traced (control flow that depends on the
    data, a graph that differs between training and inference by more than dropout) stays whole inside; when the
    outermost `forward` itself is such, the answer is None.

    Args:
        inputs: how many positional tensors `forward` is given. By default those without a default value.
    Raises: ModelError, for lazy modules without shapes and for modules that cannot be copied.

    >>> class Net(nn.Module):
    ...     def forward(self, x):
    ...         return F.dropout(x.relu(), 0.5, training=self.training) + 1
    >>> [(node.op, node.name) for node in trace(Net()).graph.nodes]  # doctest: +NORMALIZE_WHITESPACE
    [('placeholder', 'x'), ('call_method', 'relu'), ('call_module', 'dropout'), ('call_function', 'add'),
     ('output', 'output')]
    """
    if isinstance(module, Net):
        return module
    if isinstance(module, fx.GraphModule) and type(module.graph._codegen) is fx.graph.CodeGen:
        return _adopt(module)
    leaves: frozenset[str] = frozenset()
    while True:
        try:
            return _trace_with(module, leaves, inputs)
        except _Unfit as fault:
            if not fault.path or fault.path in leaves:
                return None
            leaves |= {fault.path}


def whole(module: nn.Module, inputs: int | None) -> Net:
    """The module as a Net in every case: traced, or as one node that runs it whole."""
    net = trace(module, inputs)
    if net is not None:
        return net
    root = nn.Module()
    root.add_module("trunk", Opaque(twin(module), "", ("",)))
    graph = fx.Graph()
    args = tuple(graph.placeholder(name) for name in _input_names(module, inputs))
    graph.output(graph.call_module("trunk", args))
    return rebuild(root, graph, {}, module.training)


def _adopt(module: fx.GraphModule) -> Net:
    """A GraphModule made elsewhere (a loaded bundle, torch.fx itself) under the names it has."""
    root = twin(module)
    assert isinstance(root, fx.GraphModule)
    notes = module.meta.get(NOTES)
    if not isinstance(notes, Mapping):
        notes = {"aliases": {}, "merged": merge_activations(root, root.graph)}
    return rebuild(root, root.graph, notes, module.training)


def _input_names(module: nn.Module, inputs: int | None) -> list[str]:
    """Names for the positional inputs, from `forward` where it gives names."""
    names: list[str] = []
    required = 0
    for parameter in inspect.signature(type(module).forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
            required += parameter.default is parameter.empty
    names = names[1:]  # self
    count = max(required - 1, 1) if inputs is None else inputs
    return [*names[:count], *(f"input_{k}" for k in range(len(names), count))]


def _trace_with(module: nn.Module, leaves: frozenset[str], inputs: int | None) -> Net:
    if "forward" in vars(module) or type(module).forward is nn.Module.forward:
        raise _Unfit("")
    clash = [
        name for name in module._modules if hasattr(fx.GraphModule, name) or name in ("meta", "_graph", "_codegen")
    ]
    if clash:
        raise _Unfit("")  # a GraphModule has no room for a layer called "graph" or "code"
    root = twin(module)
    names = _input_names(module, inputs)
    # Parameters with default values keep them: traced as inputs they would never look like None.
    plain = type(root)
    forward = eval(f"lambda self, {', '.join(names)}: forward(self, {', '.join(names)})", {"forward": plain.forward})
    root.__class__ = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
    traces = []
    for training in (True, False):
        root.train(training)
        tracer = _Tracer(leaves)
        try:
            with _tracing:
                traces.append((tracer, tracer.trace(root)))
        except Exception:
            raise _Unfit(tracer.culprit or "") from None
    (tracer, graph), (_, calm) = traces
    dropouts = _compare(tracer, graph, calm)
    made = _canonical(root, tracer, graph, dropouts)
    if made is None:
        raise _Unfit("")
    net_graph, aliases = made
    notes = {"aliases": aliases, "merged": merge_activations(root, net_graph)}
    return rebuild(root, net_graph, notes, module.training)


def _plain(value: Any) -> Any:
    return fx.node.map_aggregate(value, lambda a: a.name if isinstance(a, fx.Node) else a)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    try:
        return bool(a == b)
    except Exception:
        return False


def _compare(tracer: _Tracer, graph: fx.Graph, calm: fx.Graph) -> dict[fx.Node, float]:
    """Dropout nodes that follow the training flag, with their rates; any other difference is a fault."""
    dropouts: dict[fx.Node, float] = {}
    left, right = list(graph.nodes), list(calm.nodes)
    for node, other in zip(left, right, strict=False):
        same = node.op == other.op and node.target == other.target
        args, kwargs, others = list(_plain(node.args)), dict(_plain(node.kwargs)), dict(_plain(other.kwargs))
        other_args = list(_plain(other.args))
        if same and node.op == "call_function" and node.target in _DROPOUTS:
            flag = "train" if node.target is torch.dropout else "training"
            on = args.pop(2) if len(args) > 2 else kwargs.pop(flag, True)
            off = other_args.pop(2) if len(other_args) > 2 else others.pop(flag, True)
            if on is True and off is False:
                rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
                if isinstance(rate, int | float):
                    dropouts[node] = float(rate)
            elif on is not off:
                same = False
        if not (same and _same(args, other_args) and _same(kwargs, others)):
            raise _Unfit(tracer.scopes.get(node, ""))
    if len(left) != len(right):
        raise _Unfit(tracer.scopes.get((left if len(left) > len(right) else right)[min(len(left), len(right)) - 1], ""))
    return dropouts


def _written(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value this node writes into, if it does."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    writes = False
    if node.op == "call_module":
        writes = getattr(fetch(root, str(node.target)), "inplace", False) is True
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = (
            node.kwargs.get("inplace") is True
            or node.target in _INPLACE_OPERATORS
            or bool(re.fullmatch(r"[a-z]\w*[a-z0-9]_", name))
        )
    elif node.op == "call_method":
        writes = bool(re.fullmatch(r"[a-z]\w*[a-z0-9]_", str(node.target)))
    return node.args[0] if writes else None


def _out_of_place(node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """Target and keyword arguments of the same function without writing in place; None where there is none."""
    kwargs = dict(node.kwargs)
    if node.op == "call_method":
        calm = str(node.target)[:-1]
        return (calm, kwargs) if hasattr(Tensor, calm) else None
    if kwargs.get("inplace") is True:
        return node.target, {**kwargs, "inplace": False}
    if node.target in _INPLACE_OPERATORS:
        return _INPLACE_OPERATORS[node.target], kwargs
    name = getattr(node.target, "__name__", "")[:-1]
    function = getattr(torch, name, None) or getattr(F, name, None)
    return (function, kwargs) if callable(function) else None


def _rewire_inplace(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[Any, dict[str, Any]]] | None:
    """Let every reader after a write in place read the writer; None where shared memory may hide readers."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    changed = {}
    for node in list(graph.nodes):
        target = _written(root, node)
        if target is None:
            continue
        chain = views_back(root, target)
        for base in chain[1:]:
            if any(order[user] > order[node] for user in base.users):
                return None
        for user in list(target.users):
            if order[user] > order[node]:
                if is_view(root, user) and user is chain[0]:
                    return None
                user.replace_input_with(target, node)
        # A view taken before the write would show it too.
        for user in list(target.users):
            if user is not node and is_view(root, user) and any(order[late] > order[node] for late in user.users):
                return None
        if node.op != "call_module":
            calm = _out_of_place(node)
            if calm is None:
                return None
            changed[node] = calm
    return changed


def _canonical(
    root: nn.Module, tracer: _Tracer, graph: fx.Graph, dropouts: dict[fx.Node, float]
) -> tuple[fx.Graph, dict[str, str]] | None:
    """The graph in kindling's form, and alias -> node name; None where it cannot be brought to it."""
    changed = _rewire_inplace(root, graph)
    if changed is None:
        return None
    output = next(node for node in graph.nodes if node.op == "output")
    needed = ancestors([output]) | {node for node in graph.nodes if node.op == "placeholder"}
    paths = {path for path, _ in root.named_modules(remove_duplicate=False)}
    # A module without children that computes by functions (a convolution of one's own) gives its name to its result.
    renamed = {
        node: sanitize(path)
        for path, node in tracer.ends.items()
        if node.op in ("call_function", "call_method")
        and tracer.scopes.get(node) == path
        and not any(True for _ in cast(nn.Module, fetch(root, path)).children())
    }
    made_graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    calls: dict[str, int] = {}
    used: set[str] = set()
    for node in graph.nodes:
        if node not in needed:
            continue
        op, target, args, kwargs, name = node.op, node.target, node.args, dict(node.kwargs), node.name
        if node in changed:
            target, kwargs = changed[node]
        if op == "call_module":
            calls[str(target)] = calls.get(str(target), 0) + 1
            name = sanitize(str(target))
            if calls[str(target)] > 1:
                name = f"{name}__call{calls[str(target)]}"
        elif op in ("call_function", "call_method"):
            name = renamed.get(node, name)
            if node in dropouts or (name in paths and node not in renamed):
                base, count = re.sub(r"_\d+$", "", name), 0
                while name in paths or name in used:
                    count += 1
                    name = f"{base}_{count}"
        if node in dropouts:
            install(root, name, _DROPOUTS[node.target](dropouts[node]))
            op, target, args, kwargs = "call_module", name, (node.args[0] if node.args else kwargs["input"],), {}
        used.add(name)
        args, kwargs = (fx.node.map_arg(part, made.__getitem__) for part in (args, kwargs))
        made[node] = made_graph.create_node(
            op, target, cast("tuple[Any, ...]", args), cast("dict[str, Any]", kwargs), name=name
        )
    aliases = {path: made[node].name for path, node in tracer.ends.items() if node in made}
    return made_graph, aliases


def check_inputs(net: Net, names: list[str]) -> None:
    """Raises: ModelError, when the net takes another number of inputs than the signature names."""
    takes = [node for node in net.graph.nodes if node.op == "placeholder"]
    if len(takes) != len(names):
        raise ModelError(f"the module takes {len(takes)} inputs, its signature names {len(names)}: {names}.")
