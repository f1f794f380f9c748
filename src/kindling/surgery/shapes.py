"""Shapes: what every layer of a net gives for the inputs of a signature, found without computing where possible.

A run on the meta device costs no memory and almost no time. Modules whose control flow looks at the data cannot run
there; they get one real run on a batch of two rows of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import ModelError
from kindling.signature import Signature, TensorSpec
from kindling.surgery.net import Chart, Net, fetch, is_scalar, node_kind, on_meta, part_of, twin
from kindling.surgery.opaque import Observation, Opaque, observe
from kindling.surgery.trace import check_inputs, whole


@dataclass(frozen=True)
class Shapes:
    """What a run showed, by node name."""

    values: Mapping[str, Any]
    """Nested values in which tensors are `TensorSpec` and sizes that follow the batch are symbols."""
    seen: Mapping[str, Observation]
    """For untraceable parts: their layers, with values like the above."""

    def spec(self, node: fx.Node) -> TensorSpec | None:
        value = self.values.get(node.name)
        return value if isinstance(value, TensorSpec) else None


def dtype_of(spec: TensorSpec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"{spec.dtype!r} is not a torch dtype.")
    return dtype


def row_shape(spec: TensorSpec) -> tuple[int | str, ...]:
    """The shape without the batch axis."""
    return spec.shape[1:]


class _Run(fx.Interpreter):
    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.extra_traceback = False  # our own message is enough
        self.net = net
        self.chart = Chart(net)
        self.values: dict[str, Any] = {}
        self.seen: dict[str, Observation] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        part = part_of(self.net, n)
        try:
            if part is not None:
                module = fetch(self.net, str(n.target))
                assert isinstance(module, nn.Module)
                leaves = {path: leaf for path, leaf in part.inner_names().items()}
                value, self.seen[n.name] = observe(module, args, leaves)
            else:
                value = getattr(self, n.op)(n.target, args, kwargs)
        except ModelError:
            raise
        except Exception as error:
            raise _NodeError(n, _complaint(self.chart, n, args, error)) from error
        self.values[n.name] = value
        return value


class _NodeError(Exception):
    def __init__(self, node: fx.Node, message: str) -> None:
        super().__init__(message)
        self.node = node


def _complaint(chart: Chart, node: fx.Node, args: Sequence[Any], error: Exception) -> str:
    vertex = chart.of.get(node)
    name = vertex.name if vertex else node.name
    module = fetch(chart.net, str(node.target)) if node.op == "call_module" else None
    sources = [
        (a, v) for a, v in zip(node.args, args, strict=False) if isinstance(a, fx.Node) and isinstance(v, Tensor)
    ]
    given = [(chart.of[a].name if a in chart.of else a.name, tuple(v.shape[1:])) for a, v in sources]
    if isinstance(module, nn.Linear) and given and given[0][1]:
        source, shape = given[0]
        why = f"layer {name!r} (Linear) takes {module.in_features:,} numbers, but {source!r} gives {shape} for each row"
        if len(shape) > 1:
            total = 1
            for size in shape:
                total *= size
            why += f". Put nn.Flatten() in between ({total:,} numbers)"
            if len(shape) == 3:
                why += f", or nn.AdaptiveAvgPool2d(1) and nn.Flatten() ({shape[0]:,} numbers)"
        return why + "."
    if isinstance(module, nn.modules.conv._ConvNd) and given and given[0][1]:
        source, shape = given[0]
        if shape[0] != module.in_channels:
            kind = type(module).__name__
            takes = f"layer {name!r} ({kind}) takes {module.in_channels} channels"
            return f"{takes}, but {source!r} gives {shape} for each row."
    shapes = ", ".join(f"{shape} from {source!r}" for source, shape in given)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"layer {name!r} ({node_kind(chart.net, node)}) cannot take {shapes or 'its input'}: {reason}"


def _sizes(signature: Signature, step: int) -> dict[str, int]:
    sizes: dict[str, int] = {"N": 2 + step}
    for spec in signature.inputs.values():
        for size in spec.shape:
            if isinstance(size, str):
                # Large enough for nets that halve five times, odd multiples so that two symbols differ.
                sizes.setdefault(size, 64 * (2 * len(sizes) - 1) + 32 * step)
    return sizes


def _batch(signature: Signature, sizes: Mapping[str, int], device: torch.device) -> list[Tensor]:
    return [
        torch.zeros([sizes[s] if isinstance(s, str) else s for s in spec.shape], dtype=dtype_of(spec), device=device)
        for spec in signature.inputs.values()
    ]


def _devices(net: nn.Module) -> set[torch.device]:
    return {t.device for t in [*net.parameters(), *net.buffers()]}


def shapes_of(net: Net, signature: Signature) -> Shapes:
    """Run the net twice with different batch sizes and say which sizes follow which symbol.

    Raises: ModelError, naming the layer that cannot take what it is given, with both shapes.
    """
    check_inputs(net, list(signature.inputs))
    ran: list[tuple[dict[str, int], _Run]] = []
    try:
        light = on_meta(net)
        assert isinstance(light, Net)
        light.eval()
        for step in (0, 1):
            sizes = _sizes(signature, step)
            run = _Run(light)
            with torch.no_grad(), torch.device("meta"):
                run.run(*_batch(signature, sizes, torch.device("meta")))
            ran.append((sizes, run))
    except (_NodeError, ModelError) as first:
        # The meta device cannot follow control flow that looks at values: a real batch has the last word.
        devices = _devices(net)
        if torch.device("meta") in devices:
            raise ModelError(str(first)) from None
        real = twin(net)
        assert isinstance(real, Net)
        real.eval()
        run, sizes = _Run(real), _sizes(signature, 0)
        try:
            with torch.no_grad():
                run.run(*_batch(signature, sizes, devices.pop() if devices else torch.device("cpu")))
        except _NodeError as error:
            raise ModelError(str(error)) from None
        ran = [(sizes, run)]
    (sizes, run), (sizes2, run2) = ran[0], ran[-1]
    outputs = {node: name for name, node in zip(signature.outputs, _output_nodes(net), strict=False)}

    def merge(name: str, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            shape = tuple(
                _symbol(name, axis, x, y, sizes, sizes2)
                for axis, (x, y) in enumerate(zip(a.shape, b.shape, strict=True))
            )
            if sizes is sizes2 and a.dim() and a.shape[0] == sizes["N"]:
                shape = ("N", *shape[1:])
            return TensorSpec(shape, str(a.dtype).removeprefix("torch."))
        if isinstance(a, bool) or not isinstance(a, int | tuple | list | Mapping):
            return a
        if isinstance(a, int):
            return _symbol(name, 0, a, b, sizes, sizes2)
        if isinstance(a, Mapping):
            return {key: merge(name, a[key], b[key]) for key in a}
        return tuple(merge(name, x, y) for x, y in zip(a, b, strict=True))

    values = {
        node.name: merge(outputs.get(node, node.name), run.values[node.name], run2.values[node.name])
        for node in net.graph.nodes
        if node.name in run.values
    }
    seen = {name: _merged(seen, run2.seen[name], merge) for name, seen in run.seen.items()}
    return Shapes(values, seen)


def _merged(one: Observation, two: Observation, merge: Any) -> Observation:
    from dataclasses import replace

    others = {layer.path: layer.value for layer in two.layers}
    rows = tuple(replace(row, value=merge(row.path, row.value, others.get(row.path, row.value))) for row in one.layers)
    return replace(one, layers=rows)


def _output_nodes(net: Net) -> list[fx.Node]:
    output = next(node for node in net.graph.nodes if node.op == "output")
    return list(output.all_input_nodes)


def _symbol(name: str, axis: int, a: int, b: int, sizes: Mapping[str, int], sizes2: Mapping[str, int]) -> int | str:
    if a == b:
        return a
    for symbol in sizes:
        if (a, b) == (sizes[symbol], sizes2[symbol]):
            return symbol
    return f"{name}_{axis}"


def output_specs(net: Net, shapes: Shapes, names: Sequence[str]) -> dict[str, TensorSpec]:
    """The specs of what the net returns, under the given names or, where their number differs, under its own."""
    chart = Chart(net)
    result = chart.output.args[0]
    value = fx.node.map_arg(result, lambda node: shapes.values[node.name])
    if isinstance(value, Mapping):
        specs = {str(key): spec for key, spec in value.items() if isinstance(spec, TensorSpec)}
        return {name: specs[name] for name in names} if names and all(name in specs for name in names) else specs
    items = list(value) if isinstance(value, tuple | list) else [value]
    nodes = list(result) if isinstance(result, tuple | list) else [result] if len(items) == 1 else [None] * len(items)
    if any(not isinstance(item, TensorSpec) for item in items):
        raise ModelError(f"the module returns {items!r}: outputs must be tensors, or one flat tuple or dict of them.")
    if len(names) != len(items):
        names = []
        for place, node in enumerate(nodes):
            vertex = chart.of.get(node) if isinstance(node, fx.Node) else None
            name = vertex.name if vertex and not chart.parts else "output" if len(items) == 1 else f"output_{place}"
            names.append(name if name not in names else f"{name}_{place}")
    return dict(zip(names, items, strict=True))


def infer_output_shapes(module: nn.Module, signature: Signature) -> Signature:
    """The signature with outputs as the module really gives them: shapes, dtypes, number.

    Names are kept where their number fits; else tensors in a dict are named by their keys, those of a traced module
    by their layers, others `output` or `output_0`, `output_1`, ... Sizes that follow an input's symbolic axis carry
    its symbol. Runs on the meta device, or on two rows of zeros where control flow depends on the data.

    Raises: ModelError, naming the layer that cannot take its input.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    >>> spec = Signature({"image": TensorSpec(("N", 3, 2, 2))}, {})
    >>> infer_output_shapes(net, spec).outputs
    {'1': TensorSpec(shape=('N', 5), dtype='float32')}
    """
    net = whole(module, len(signature.inputs))
    specs = output_specs(net, shapes_of(net, signature), list(signature.outputs))
    return Signature(signature.inputs, specs, signature.targets)


__all__ = ["Opaque", "Shapes", "dtype_of", "infer_output_shapes", "is_scalar", "output_specs", "row_shape", "shapes_of"]
