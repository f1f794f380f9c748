"""Cutting, extending and replacing: every function gives a new module and its signature and leaves the old alone."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from typing import Any, cast

from torch import fx, nn

from kindling.errors import ConfigError, ModelError
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
    is_layer,
    merge_activations,
    node_kind,
    rebuild,
    sanitize,
    twin,
)
from kindling.surgery.opaque import Opaque, without_rest
from kindling.surgery.shapes import output_specs, shapes_of
from kindling.surgery.trace import trace, whole

_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def until(module: nn.Module, names: Sequence[str], signature: Signature) -> tuple[nn.Module, Signature]:
    """The part of a module that computes the named layers, and nothing else.

    Layers, parameters and inputs that the named layers do not need are gone, from `state_dict` too. A layer's name
    means its output after its activation; a container's name (`layer1.0`) its own output. Several names make several
    outputs, in that order, each under its name. A module that cannot be traced is cut at its named submodules: it runs
    as it is and stops at the last of them.

    Raises: ModelError, for a name that is no layer, or a layer that does not give a tensor.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> cut, cut_spec = until(net, ["fc1"], spec)
    >>> cut_spec.outputs, list(cut.state_dict())
    ({'fc1': TensorSpec(shape=('N', 3), dtype='float32')}, ['fc1.weight', 'fc1.bias'])
    """
    if not names:
        raise ConfigError("names", list(names), "leave nothing to compute", "Name at least one layer")
    if len(set(names)) != len(names):
        raise ConfigError("names", list(names), "name a layer twice", "Name each output once")
    net = whole(module, len(signature.inputs))
    chart = Chart(net)
    inputs = list(signature.inputs)
    for name in names:
        if name in inputs and name not in set(chart.names()):
            raise ModelError(f"{name!r} is an input of the model, not a layer: there is nothing to cut before it.")
    found = [_inside(chart, chart.find(name)) for name in names]
    ends = [vertex.end for vertex in found if not isinstance(vertex, Inner)]
    reached = ancestors(ends)
    kept = ancestors([*ends, *(vertex.part.node for vertex in found if isinstance(vertex, Inner))])
    root = twin(net)

    # Untraceable parts: which of their layers the kept nodes read, then which are asked for.
    stops: dict[fx.Node, list[str]] = {}
    for node in reached:
        source = _output_of(chart, node)
        if source is not None:
            stops.setdefault(source.part.node, []).append(source.stop)
    for node, part in chart.parts.items():
        if node in stops:
            stops[node].sort(key=part.stops.index)
        for vertex in found:
            if isinstance(vertex, Inner) and vertex.part.node is node and vertex.stop not in stops.get(node, []):
                stops.setdefault(node, []).append(vertex.stop)
        if node in kept and stops[node] != list(part.stops):
            inner = cast(nn.Module, fetch(root, part.path))
            install(root, str(node.target), Opaque(inner, part.prefix, tuple(stops[node])))

    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    values: dict[tuple[fx.Node, str], fx.Node] = {}
    takes = {node: name for node, name in zip(chart.inputs, inputs, strict=True) if node in kept}
    for node in net.graph.nodes:
        if node not in kept:
            continue
        source = _output_of(chart, node)
        if source is not None and node not in chart.parts:
            made[node] = values[source.part.node, source.stop]
            continue
        copy_nodes(graph, [node], made)
        if node in chart.parts:
            call, several = made[node], len(stops[node]) > 1
            for place, stop in enumerate(stops[node]):
                values[node, stop] = graph.call_function(operator.getitem, (call, place)) if several else call
            if source is not None and source.stop in stops[node]:
                made[node] = values[node, source.stop]
    results = [values[v.part.node, v.stop] if isinstance(v, Inner) else made[v.end] for v in found]
    spec = Signature({name: signature.inputs[name] for name in takes.values()}, {}, {})
    made_net, made_spec = _close(root, graph, results, list(names), net, spec)
    return _prune(made_net, made_spec), made_spec


def _output_of(chart: Chart, node: fx.Node) -> Inner | None:
    """The layer inside an untraceable part whose value a node is, if it is an output of such a part."""
    if node in chart.parts:
        part = chart.parts[node]
        return Inner(part.outer(part.stops[0]), part, part.stops[0]) if len(part.stops) == 1 else None
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, fx.Node) and source in chart.parts:
        part = chart.parts[source]
        if len(part.stops) > 1:
            stop = part.stops[cast(int, node.args[1])]
            return Inner(part.outer(stop), part, stop)
    return None


def _inside(chart: Chart, vertex: Vertex | Inner) -> Vertex | Inner:
    """A vertex that is nothing but an output of an untraceable part, as the layer inside."""
    if isinstance(vertex, Inner) or vertex.end is not vertex.node:
        return vertex
    return _output_of(chart, vertex.node) or vertex


def _prune(made: Net, signature: Signature) -> Net:
    """Take out of untraceable parts what comes after their last stop, where the cut net still runs without it."""
    parts = [part for part in Chart(made).parts.values() if part.stops != ("",)]
    if not parts:
        return made
    seen = shapes_of(made, signature).seen
    root = twin(made)
    for part in parts:
        inner = without_rest(part.module, part.stops, seen[part.node.name])
        install(root, str(part.node.target), Opaque(inner, part.prefix, part.stops))
    pruned = rebuild(root, made.graph, made.notes, made.training)
    try:
        shapes_of(pruned, signature)
    except (ModelError, AttributeError):
        return made  # it looks at layers that it does not run
    return pruned


def _close(
    root: nn.Module, graph: fx.Graph, results: list[fx.Node], names: list[str], net: Net, signature: Signature
) -> tuple[Net, Signature]:
    """End a graph in its results, taking the first tensor where a layer gives several."""
    output = graph.output(results[0] if len(results) == 1 else tuple(results))
    made = rebuild(root, graph, net.notes, net.training)
    shapes = shapes_of(made, signature)
    firsts = {node: _first(shapes.values[node.name], name) for node, name in zip(results, names, strict=True)}
    if any(key is not None for key in firsts.values()):
        with graph.inserting_before(output):
            taken = [
                node if firsts[node] is None else graph.call_function(operator.getitem, (node, firsts[node]))
                for node in results
            ]
        output.args = (taken[0] if len(taken) == 1 else tuple(taken),)
        notes = {**net.notes, "merged": {**net.notes["merged"]}}
        for node, result in zip(results, taken, strict=True):
            if node is not result and node.name not in notes["merged"].values():
                notes["merged"][result.name] = node.name
        made = rebuild(root, graph, notes, net.training)
        shapes = shapes_of(made, signature)
    return made, changed(signature, outputs=output_specs(made, shapes, names))


def _first(value: Any, name: str) -> int | str | None:
    """Where the first tensor is in what a layer gives; None where that is one tensor."""
    if isinstance(value, TensorSpec):
        return None
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, item in items:
        if isinstance(item, TensorSpec):
            return cast("int | str", key)
    raise ModelError(f"layer {name!r} gives {value!r}, not a tensor. Cut at another layer.")


def then(
    module: nn.Module,
    signature: Signature,
    layers: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    name: str | None = None,
) -> tuple[nn.Module, Signature]:
    """A module with layers appended to its one output.

    Args:
        layers: one module, several in order, or several by name. Without names of their own (mapping keys, the names
            inside a Sequential) they are called by type and number: `linear_1`, `relu_1`, `linear_2`.
        name: the name of the last of them, and so of the new output.
    Returns: the longer module; its one output is named like the last layer. Targets stay as they were.
    Raises: ModelError, when the module has several outputs, a name is taken, or shapes do not fit; nothing is ever
        flattened silently.

    >>> trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> spec = Signature({"image": TensorSpec(("N", 3, 6, 6))}, {"map": TensorSpec(("N", 8, 4, 4))})
    >>> then(trunk, spec, [nn.Flatten(), nn.Linear(128, 2)])[1].outputs
    {'linear_1': TensorSpec(shape=('N', 2), dtype='float32')}
    >>> then(trunk, spec, nn.Linear(128, 2))
    Traceback (most recent call last):
    kindling.errors.ModelError: layer 'linear_1' (Linear) takes 128 numbers, but '0' gives (8, 4, 4) for each row. Put
    nn.Flatten() in between (128 numbers), or nn.AdaptiveAvgPool2d(1) and nn.Flatten() (8 numbers).
    """
    net = whole(module, len(signature.inputs))
    chart = Chart(net)
    tip = chart.output.args[0]
    output = next(iter(signature.outputs), "")
    if isinstance(tip, Mapping) and output in tip:
        tip = tip[output]
    elif isinstance(tip, tuple | list) and len(tip) == 1:
        tip = tip[0]
    if not isinstance(tip, fx.Node) or len(signature.outputs) != 1:
        raise ModelError(
            f"the model has the outputs {list(signature.outputs)}; layers can follow one only. "
            "Cut at one layer with until() first."
        )
    named = _named(layers, name, net, chart)
    root = twin(net)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    needed = ancestors([tip]) | set(chart.inputs)
    copy_nodes(graph, [node for node in net.graph.nodes if node in needed], made)
    notes = {key: dict(value) for key, value in net.notes.items()}
    value = made[tip]
    if tip in chart.parts:  # an untraceable module may return its one tensor in a dict or tuple
        result = shapes_of(net, signature).values[tip.name]
        if isinstance(result, Mapping | tuple | list):
            key = output if isinstance(result, Mapping) and output in result else _first(result, output)
            value = graph.call_function(operator.getitem, (value, key))
    before = set(graph.nodes)
    for key, layer in named:
        value = _put(root, graph, key, layer, [value], notes)
    graph.output(value)
    notes["merged"].update(merge_activations(root, graph, set(graph.nodes) - before))
    longer = rebuild(root, graph, notes, net.training)
    shapes = shapes_of(longer, signature)
    return longer, changed(signature, outputs=output_specs(longer, shapes, [named[-1][0]]))


def _named(
    layers: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module], name: str | None, net: Net, chart: Chart
) -> list[tuple[str, nn.Module]]:
    """The appended layers with their names, all of them free."""
    taken = {*chart.names(), *(path for path, _ in net.named_modules()), *(path for path, _ in net.named_parameters())}
    flat: list[tuple[str | None, nn.Module]] = []

    def add(key: str | None, layer: Any) -> None:
        if not isinstance(layer, nn.Module):
            raise ConfigError(
                "layers", layer, "holds something that is no nn.Module", "Give modules such as nn.Linear(4096, 10)"
            )
        if key is None and type(layer) is nn.Sequential:
            for own, child in layer.named_children():
                add(None if own.isdigit() else own, child)
        else:
            flat.append((key, layer))

    if isinstance(layers, Mapping):
        for key, layer in layers.items():
            add(str(key), layer)
    elif isinstance(layers, nn.Module):
        add(None, layers)
    else:
        for layer in layers:
            add(None, layer)
    if not flat:
        raise ConfigError("layers", layers, "holds no layer", "Give at least one module")
    if name is not None:
        flat[-1] = (name, flat[-1][1])
    made: list[tuple[str, nn.Module]] = []
    reserved = {key for key, _ in flat if key is not None}
    for given, layer in flat:
        kind, number = type(layer).__name__.lower().lstrip("_"), 1
        while f"{kind}_{number}" in taken | reserved:
            number += 1
        key = f"{kind}_{number}" if given is None else given
        if not _NAME.fullmatch(key) or key in ("input", "output") or hasattr(fx.GraphModule, key.split(".")[0]):
            advice = "Use letters, digits and '_', and no word of torch's such as 'train'"
            raise ConfigError("name", key, "cannot name a layer", advice)
        if any(key == other or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in taken):
            raise ModelError(f"the model has a layer {key!r} already. Give the new one another name, or use replace.")
        taken.add(key)
        made.append((key, layer))
    return made


def _put(
    root: nn.Module,
    graph: fx.Graph,
    name: str,
    layer: nn.Module,
    inputs: list[fx.Node],
    notes: dict[str, dict[str, str]],
) -> fx.Node:
    """Add a layer to a graph under a name: one node for torch's own and for what cannot be traced, else its insides."""
    inner = None if is_layer(layer) else trace(layer, len(inputs))
    if inner is None:
        install(root, name, twin(layer))
        return graph.create_node("call_module", name, tuple(inputs), name=sanitize(name))
    inner = cast(Net, twin(inner))
    made: dict[fx.Node, fx.Node] = {}
    value: Any = None
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            made[node] = inputs[len(made)]
            continue
        args, kwargs = (fx.node.map_arg(part, made.__getitem__) for part in (node.args, node.kwargs))
        if node.op == "output":
            value = cast("tuple[Any, ...]", args)[0]
            continue
        target = node.target
        if node.op in ("call_module", "get_attr"):
            held = fetch(inner, str(target))
            assert held is not None
            target = f"{name}.{target}"
            install(root, target, held)
        made[node] = graph.create_node(
            node.op,
            target,
            cast("tuple[Any, ...]", args),
            cast("dict[str, Any]", kwargs),
            name=f"{sanitize(name)}_{node.name}",
        )
    if not isinstance(value, fx.Node):
        raise ModelError(
            f"layer {name!r} ({type(layer).__name__}) returns several tensors. Append layers that return one."
        )
    names = {node.name: made[node].name for node in made}
    notes["aliases"].update({f"{name}.{alias}": names[n] for alias, n in inner.notes["aliases"].items()})
    notes["merged"].update({names[a]: names[n] for a, n in inner.notes["merged"].items()})
    notes["aliases"][name] = value.name
    return value


def replace(module: nn.Module, signature: Signature, name: str, layer: nn.Module) -> tuple[nn.Module, Signature]:
    """A module with another layer in the place of the one of that name; the name stays.

    The activation that belongs to the old layer follows the new one; give the activation's own name to replace that.
    A layer that is called twice is replaced in both places; a function (`add`) is replaced by a module that takes the
    same tensors. Containers are replaced layer by layer.

    Raises: ModelError, for unknown names, containers, and shapes that do not fit what comes after.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> replace(net, spec, "fc2", nn.Linear(3, 7))[1].outputs
    {'scores': TensorSpec(shape=('N', 7), dtype='float32')}
    """
    if not isinstance(layer, nn.Module):
        raise ConfigError("layer", layer, "is no nn.Module", "Give a module such as nn.Linear(4096, 10)")
    net = whole(module, len(signature.inputs))
    chart = Chart(net)
    vertex = chart.find(name)
    root = twin(net)
    if isinstance(vertex, Inner) or vertex.node in chart.parts:
        part = vertex.part if isinstance(vertex, Inner) else chart.parts[vertex.node]
        stop = vertex.stop if isinstance(vertex, Inner) else part.stops[0]
        if stop:
            install(cast(nn.Module, fetch(root, part.path)), stop, twin(layer))
            made = rebuild(root, net.graph, net.notes, net.training)
            return made, changed(
                signature, outputs=output_specs(made, shapes_of(made, signature), list(signature.outputs))
            )
    assert not isinstance(vertex, Inner)
    node = vertex.node
    if name != vertex.name:
        by_name = chart.nodes.get(net.notes["aliases"].get(name, ""), vertex.end)
        own = chart._name(by_name, None) == name
        if not own:
            raise ModelError(f"{name!r} is a container of several layers. Replace the layers in it one by one.")
        node = by_name
    same = [other for other in net.graph.nodes if other.op == "call_module" and other.target == node.target] or [node]
    if node.op != "call_module":
        same = [node]
        if any(source.op == "get_attr" for source in node.all_input_nodes):
            raise ModelError(
                f"{name!r} is the function {node_kind(net, node)} with weights of the code around it; "
                "only modules and functions without weights can be replaced."
            )
    key = str(node.target) if node.op == "call_module" else node.name
    if node.op == "call_module":
        _remove(root, key)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    notes = {kind: dict(value) for kind, value in net.notes.items()}
    simple = is_layer(layer) or trace(layer, len(node.all_input_nodes)) is None
    for other in net.graph.nodes:
        if other in same:
            tensors = [new[source] for source in other.all_input_nodes if source.op != "get_attr"]
            if simple:
                install(root, key, twin(layer)) if other is same[0] else None
                new[other] = graph.create_node("call_module", key, tuple(tensors), name=other.name)
            else:
                new[other] = _put(root, graph, key, layer, tensors, notes)
                # The activation after it, now a layer among others, ends what the name means.
                for act in [act for act, main in notes["merged"].items() if main == other.name]:
                    del notes["merged"][act]
                    notes["aliases"][name] = act
        else:
            copy_nodes(graph, [other], new)
    needed = ancestors([node for node in graph.nodes if node.op in ("output", "placeholder")])
    for other in reversed(list(graph.nodes)):
        if other not in needed:
            graph.erase_node(other)
    if node is vertex.end and node is not vertex.node:
        # What replaces an activation may be anything: it stands for itself unless it is one again.
        notes["merged"].pop(node.name, None)
        notes["merged"].update(merge_activations(root, graph, {new[vertex.node], new[node]}))
    made = rebuild(root, graph, notes, net.training)
    return made, changed(signature, outputs=output_specs(made, shapes_of(made, signature), list(signature.outputs)))


def _remove(root: nn.Module, path: str) -> None:
    above, _, field = path.rpartition(".")
    del root.get_submodule(above)._modules[field]
