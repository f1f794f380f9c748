"""Freezing: which layers stay as they are, how a module trains around them, and the frozen front as a net of its own.

Frozen means no gradients and inference mode: dropout off, batch statistics fixed. Which layers are frozen is a set of
names kept beside the module; nothing here changes the module of a `Model`. The training loop lives in `train`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kindling.errors import ModelError
from kindling.signature import Signature, TensorSpec
from kindling.surgery.net import (
    Chart,
    Inner,
    Net,
    Vertex,
    ancestors,
    copy_nodes,
    fetch,
    install,
    is_scalar,
    rebuild,
    twin,
)
from kindling.surgery.opaque import CutAway
from kindling.surgery.shapes import Shapes, shapes_of
from kindling.surgery.trace import whole

_RANDOM_MODULES: tuple[type[nn.Module], ...] = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_RANDOM_NAMES = frozenset({
    "alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "gumbel_softmax", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm", "rrelu", "scaled_dot_product_attention",
})  # fmt: skip


def frozen_layers(module: nn.Module, until: str | None = None, signature: Signature | None = None) -> frozenset[str]:
    """Names of the layers that freezing up to and with `until` covers: all it is computed from. None: all layers.

    Branches beside `until` are not among them. Activations go with their layer. Inside a module that cannot be
    traced, the signature lets a trial run tell what `until` is computed from; without it, what is registered before
    `until` counts.

    Raises: ModelError, for a name that is no layer.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> sorted(frozen_layers(net)), sorted(frozen_layers(net, "act"))
    (['fc1', 'fc2'], ['fc1'])
    """
    net = whole(module, len(signature.inputs) if signature else None)
    chart = Chart(net)
    if until is None:
        return frozenset(_layer_names(chart, chart.nodes.values()))
    found = chart.find(until)
    if not isinstance(found, Inner):
        return frozenset(_layer_names(chart, ancestors([found.end])))
    part = found.part
    before = ancestors([part.node]) - {part.node}
    names = set(_layer_names(chart, before))
    leaves = part.inner_names()
    order = [part.outer(path) for path, _ in part.module.named_modules()]
    end = max(k for k, name in enumerate(order) if name == until or name.startswith(f"{until}."))
    earlier = set(order[: end + 1]) & set(leaves)
    if signature is None:
        return frozenset(names | earlier)
    rows = {row.path: row for row in shapes_of(net, signature).seen[part.node.name].layers}
    own = [name for name in rows if name == until or name.startswith(f"{until}.")]
    if not own:
        raise ModelError(f"a trial batch did not pass through {until!r}.")
    names |= earlier - set(rows)  # other batches may take the ways that the trial did not
    waiting = list(own)
    while waiting:
        name = waiting.pop()
        if name not in names and name in rows:
            names.add(name)
            waiting.extend(rows[name].sources)
    return frozenset(names)


def _layer_names(chart: Chart, nodes: Iterable[fx.Node]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if node in chart.parts:
            names |= set(chart.parts[node].inner_names())
        elif node in chart.of and not (
            chart.of[node].node.target is operator.getitem and _in_part(chart, chart.of[node])
        ):
            names.add(chart.of[node].name)
    return names


def _in_part(chart: Chart, vertex: Vertex) -> bool:
    return bool(vertex.node.args) and vertex.node.args[0] in chart.parts


def is_frozen(chart: Chart, vertex: Vertex, frozen: frozenset[str]) -> bool:
    """Whether a vertex is named as frozen, or shares its module with one that is."""
    if vertex.name in frozen:
        return True
    if vertex.node.op != "call_module":
        return False
    # A module that is called twice is frozen in both places or in none.
    return any(
        v.node.op == "call_module" and v.node.target == vertex.node.target and v.name in frozen
        for v in chart.vertices.values()
    )


def set_training(module: nn.Module, frozen: frozenset[str]) -> None:
    """Put a module into training mode, except its frozen layers: inference mode and no gradients. In place.

    Names that the module does not have (layers of a frozen front that was split off) are passed over. Parameters of
    other layers keep the `requires_grad` they have. In modules that cannot be traced, functional dropout follows the
    module whose code it is in, which is frozen when all layers in it are.

    Raises: ModelError, where a frozen layer is functional dropout in the module's own code, which cannot be switched
        alone; `trace(module)` makes it a layer that can.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(2), drop=nn.Dropout(), fc=nn.Linear(2, 2)))
    >>> set_training(net, frozenset({"norm", "drop"}))
    >>> [m.training for m in net], [p.requires_grad for p in net.parameters()]
    ([False, False, True], [False, False, True, True])
    """
    module.train()
    if not frozen:
        return
    net = whole(module, None)
    chart = Chart(net)
    same = isinstance(module, fx.GraphModule)
    for vertex in chart.vertices.values():
        if vertex.node in chart.parts or not is_frozen(chart, vertex, frozen):
            continue
        for node in vertex.nodes:
            if node.op == "call_module":
                layer = fetch(module, str(node.target))
                if not isinstance(layer, nn.Module):
                    raise ModelError(
                        f"the frozen layer {vertex.name!r} is dropout in the code of {type(module).__name__}, "
                        "which cannot be switched off alone. Train trace(module) instead, where it is a layer."
                    )
                layer.eval()
        for path in chart.tensors(vertex):
            tensor = fetch(module, path)
            if isinstance(tensor, Tensor):
                tensor.requires_grad_(False)
    for part in chart.parts.values():
        held = fetch(module, part.path) if same or part.prefix else module
        assert isinstance(held, nn.Module)
        _freeze_inside(
            held,
            {name[len(part.prefix) + 1 :] if part.prefix and name != part.prefix else name for name in frozen},
            part.outer("") in frozen,
        )


def _freeze_inside(module: nn.Module, frozen: set[str], everything: bool) -> None:
    """Freeze layers of an untraceable module; a container all of whose layers are frozen goes with them."""
    if everything:
        module.eval().requires_grad_(False)
    for path, inside in module.named_modules():
        if path in frozen:
            inside.eval().requires_grad_(False)
    for path, inside in module.named_modules():
        layers = [name for name, layer in inside.named_modules(prefix=path) if layer is not inside and _is_layer(layer)]
        if layers and all(name in frozen for name in layers):
            inside.training = False  # functional dropout in its code
            for tensor in inside.parameters(recurse=False):
                tensor.requires_grad_(False)


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, CutAway):
        return False
    return not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))


@dataclass(frozen=True)
class Split:
    """A net in two: a front that training never changes, and the rest, which reads what the front gives."""

    prefix: nn.Module
    prefix_signature: Signature
    tail: nn.Module
    tail_signature: Signature
    """Its inputs are the boundary, in order, under the layers' names; outputs and targets are the whole's."""
    boundary: tuple[str, ...]
    whole: nn.Module
    """The net before the split, for `join`."""


def split_frozen(module: nn.Module, signature: Signature, frozen: frozenset[str]) -> Split | None:
    """The maximal front whose value needs only inputs and frozen layers, apart from the rest; None if there is none.

    Layers without weights and without chance in them (pooling, flattening, adding) go with the front where all they
    read is in it; dropout only if it is frozen itself. Sizes that the rest needs of tensors in the front are constants
    or read from the boundary.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> split = split_frozen(net, spec, frozenset({"fc1"}))
    >>> split.boundary, list(split.prefix.state_dict()), list(split.tail.state_dict())
    (('fc1',), ['fc1.weight', 'fc1.bias'], ['fc2.weight', 'fc2.bias'])
    """
    net = whole(module, len(signature.inputs))
    chart = Chart(net)
    if not any(_counts(chart, v, frozen) for v in chart.vertices.values()) and not any(
        _part_frozen(chart, node, frozen) for node in chart.parts
    ):
        return None
    shapes = shapes_of(net, signature)
    front = _front(chart, shapes, frozen)
    if not any(
        (node in chart.parts or (node in chart.of and _counts(chart, chart.of[node], frozen)))
        for node in front
        if node.op != "placeholder"
    ):
        return None
    names = dict(zip((node.name for node in chart.inputs), signature.inputs, strict=True))

    # What the rest reads of the front, in graph order.
    read: dict[fx.Node, None] = {}
    rest = [node for node in net.graph.nodes if node not in front and node.op != "get_attr"]
    for node in rest:
        for source in node.all_input_nodes:
            if source in front and _constant(shapes, source) is None:
                read[source] = None
    order = {node: place for place, node in enumerate(net.graph.nodes)}
    edge = sorted(read, key=order.__getitem__)
    if not edge:
        return None
    title = {node: names[node.name] if node.op == "placeholder" else _title(chart, node) for node in edge}
    specs = {title[node]: shapes.spec(node) for node in edge}
    boundary = {name: cast(TensorSpec, spec) for name, spec in specs.items()}

    ahead = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    kept = ancestors(edge)
    copy_nodes(ahead, [node for node in net.graph.nodes if node in kept], made)
    ahead.output(made[edge[0]] if len(edge) == 1 else tuple(made[node] for node in edge))
    prefix = rebuild(twin(net), ahead, net.notes, net.training)
    inputs = {names[node.name]: signature.inputs[names[node.name]] for node in chart.inputs if node in kept}

    behind = fx.Graph()
    got: dict[fx.Node, fx.Node] = {}
    for node in edge:
        got[node] = behind.create_node("placeholder", node.name, name=node.name)
    rows = next((node for node in edge if boundary[title[node]].shape[:1] == ("N",)), None)
    counted: list[fx.Node] = []

    def lookup(node: fx.Node) -> Any:
        value = _constant(shapes, node)
        if value == "N":
            if not counted:
                counted.append(behind.call_method("size", (got[cast(fx.Node, rows)], 0)))
            return counted[0]
        assert value is not None
        return value

    for node in net.graph.nodes:
        if node.op == "get_attr" and any(user not in front for user in node.users):
            copy_nodes(behind, [node], got)
        elif node not in front:
            copy_nodes(behind, [node], got, lookup)
    tail = rebuild(twin(net), behind, net.notes, net.training)
    return Split(
        prefix,
        Signature(inputs, boundary, {}),
        tail,
        Signature(boundary, signature.outputs, signature.targets),
        tuple(boundary),
        net,
    )


def _title(chart: Chart, node: fx.Node) -> str:
    vertex = chart.of.get(node)
    return vertex.name if vertex is not None and vertex.end is node else node.name


def _counts(chart: Chart, vertex: Vertex, frozen: frozenset[str]) -> bool:
    """Frozen, and worth computing once."""
    if not is_frozen(chart, vertex, frozen):
        return False
    module = fetch(chart.net, str(vertex.node.target)) if vertex.node.op == "call_module" else None
    return bool(chart.tensors(vertex)) or (isinstance(module, nn.Module) and any(True for _ in module.buffers()))


def _part_frozen(chart: Chart, node: fx.Node, frozen: frozenset[str]) -> bool:
    part = chart.parts[node]
    layers = set(part.inner_names())
    return part.outer("") in frozen or layers <= frozen


def _constant(shapes: Shapes, node: fx.Node) -> Any:
    """A size that is the same for every batch, `"N"` for the number of rows, None for everything else."""
    if not is_scalar(node):
        return None
    value = shapes.values.get(node.name)
    if isinstance(value, bool | int) or value == "N":
        return value
    if isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return value
    return value if isinstance(value, torch.dtype) else None


def _front(chart: Chart, shapes: Shapes, frozen: frozenset[str]) -> set[fx.Node]:
    """Nodes whose value needs only inputs and frozen layers, such that what leaves them are tensors."""
    barred: set[fx.Node] = set()
    while True:
        front: set[fx.Node] = set()
        for node in chart.net.graph.nodes:
            if node.op == "placeholder":
                front.add(node)
            elif node.op not in ("output", "get_attr") and node not in barred:
                sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
                # Without sources it is a constant (a class token): part of the front only if its weights are frozen.
                if all(source in front for source in sources) and _stays(chart, node, frozen):
                    front.add(node)
        bad = set()
        batch_is_read = False
        tensors_leave = False
        for node in front:
            if all(user in front for user in node.users):
                continue
            spec = shapes.spec(node)
            if spec is not None:
                tensors_leave = tensors_leave or spec.shape[:1] == ("N",)
                continue
            value = _constant(shapes, node)
            if value is None:
                bad.add(node)
            batch_is_read = batch_is_read or value == "N"
        if batch_is_read and not tensors_leave:
            bad |= {n for n in front if n.op != "placeholder" and _constant(shapes, n) == "N"}
        bad -= {node for node in front if node.op == "placeholder"}
        if not bad:
            return front
        barred |= bad


def _stays(chart: Chart, node: fx.Node, frozen: frozenset[str]) -> bool:
    if node in chart.parts:
        return _part_frozen(chart, node, frozen)
    vertex = chart.of.get(node)
    if vertex is not None and is_frozen(chart, vertex, frozen):
        return node.op == "call_module" or not _chance(node)
    if node.op == "call_module":
        module = fetch(chart.net, str(node.target))
        assert isinstance(module, nn.Module)
        if isinstance(module, _RANDOM_MODULES):
            return False
        return not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
    if any(
        isinstance(fetch(chart.net, str(s.target)), nn.Parameter) for s in node.all_input_nodes if s.op == "get_attr"
    ):
        return False
    return not _chance(node)


def _chance(node: fx.Node) -> bool:
    """Whether a function draws random numbers in inference too."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in _RANDOM_NAMES:
        return False
    if node.target is F.scaled_dot_product_attention:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    if "dropout" in name or name == "rrelu":
        return (
            node.kwargs.get("training", node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True))
            is not False
        )
    return True


def join(prefix: nn.Module, tail: nn.Module, split: Split) -> nn.Module:
    """The whole net again, with the weights that `prefix` and, above all, the trained `tail` have now.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> split = split_frozen(net, spec, frozenset({"fc1"}))
    >>> x = torch.randn(5, 4)
    >>> torch.equal(join(split.prefix, split.tail, split)(x), net(x))
    True
    """
    net = cast(Net, split.whole)
    root = twin(net)
    prefix, tail = twin(prefix), twin(tail)
    for node in net.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            for side in (tail, prefix):
                held = fetch(side, path)
                if held is not None:
                    install(root, path, held)
                    break
    return rebuild(root, net.graph, net.notes, net.training)
