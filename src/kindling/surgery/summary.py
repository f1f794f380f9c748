"""The layers of a model as rows, and as the table that Deeplearning4j's users know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from kindling.signature import Signature, TensorSpec
from kindling.surgery.freeze import is_frozen
from kindling.surgery.net import Chart, Vertex, fetch, node_kind
from kindling.surgery.shapes import row_shape, shapes_of
from kindling.surgery.trace import whole


@dataclass(frozen=True)
class LayerInfo:
    """One vertex of a model."""

    name: str
    kind: str
    """`"Input"`, a module's type (`"Conv2d"`) or a function (`"cat"`)."""
    n_in: int | None
    """Channels or features a layer takes, where it has such a number."""
    n_out: int | None
    parameters: int
    """Numbers in its weights; weights that an earlier layer has already are not counted again."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each weight, by its name in the layer."""
    inputs: tuple[str, ...]
    """Names of the vertices it reads."""
    output_shape: tuple[int | str, ...] | None
    """Shape of what it gives for one row; None where that is not one tensor."""
    activation: str | None = None
    """The activation merged into it: `"ReLU"`, `"softmax"`."""
    frozen: bool = False

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        data["inputs"] = list(self.inputs)
        data["output_shape"] = None if self.output_shape is None else list(self.output_shape)
        return data


def layers(module: nn.Module, signature: Signature, frozen: frozenset[str] = frozenset()) -> tuple[LayerInfo, ...]:
    """Every vertex in the order of computation, the inputs first.

    Raises: ModelError, when the module cannot take what the signature says.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> [(row.name, row.kind, row.activation, row.parameters, row.inputs) for row in layers(net, spec)]
    [('x', 'Input', None, 0, ()), ('fc1', 'Linear', 'ReLU', 15, ('x',)), ('fc2', 'Linear', None, 8, ('fc1',))]
    """
    return table(module, signature, frozen)[0]


def table(
    module: nn.Module, signature: Signature, frozen: frozenset[str] = frozenset()
) -> tuple[tuple[LayerInfo, ...], dict[str, tuple[str, ...]]]:
    """The rows of `layers`, and for each output of the signature the vertices that give it."""
    net = whole(module, len(signature.inputs))
    shapes = shapes_of(net, signature)
    chart = Chart(net)
    counted: set[int] = set()
    rows: list[LayerInfo] = []
    title = dict(zip((node.name for node in chart.inputs), signature.inputs, strict=True))
    for name, spec in signature.inputs.items():
        rows.append(LayerInfo(name, "Input", None, None, 0, {}, (), row_shape(spec)))
    last: dict[str, tuple[str, ...]] = {}  # vertex of an untraceable part -> the layers inside that it comes from

    def sources(names: Sequence[str]) -> tuple[str, ...]:
        found = [inside for name in names for inside in last.get(name, (title.get(name, name),))]
        return tuple(dict.fromkeys(found))

    for node in net.graph.nodes:
        vertex = chart.of.get(node)
        if node in chart.parts:
            part, seen = chart.parts[node], shapes.seen[node.name]
            own = part.inner_names()
            reads = [sources(chart.sources(vertex) if vertex else _reads(chart, arg)) for arg in _inputs_of(node)]
            ran = {row.path for row in seen.layers}
            for row in seen.layers:
                inner = [reads[int(s[1:-1])] if s.startswith("<") else (s,) for s in row.sources]
                shape = row_shape(row.value) if isinstance(row.value, TensorSpec) else None
                names = tuple(dict.fromkeys(name for names in inner for name in names))
                rows.append(_inside(row.path, own[row.path], names, shape, counted, row.path in frozen))
            # Ways that the trial did not take; other batches may.
            rows += [_inside(path, own[path], (), None, counted, path in frozen) for path in own if path not in ran]
            if vertex is not None:
                last[vertex.name] = tuple(end for end in seen.ends if not end.startswith("<"))
            continue
        if vertex is None or node is not vertex.node:
            continue
        if (
            node.all_input_nodes
            and node.all_input_nodes[0] in chart.parts
            and vertex.name in {row.name for row in rows}
        ):
            continue  # an output of an untraceable part, listed above
        module_ = fetch(net, str(node.target)) if node.op == "call_module" else None
        prefix = f"{node.target}." if module_ is not None else ""
        weights = _new(
            {
                key.removeprefix(prefix) if prefix else key.rpartition(".")[2]: t
                for key, t in chart.tensors(vertex).items()
            },
            counted,
        )
        spec_ = shapes.spec(vertex.end)
        rows.append(
            LayerInfo(
                vertex.name,
                node_kind(net, node),
                *(_width(module_) if isinstance(module_, nn.Module) else (None, None)),
                sum(t.numel() for t in weights.values()),
                {name: tuple(t.shape) for name, t in weights.items()},
                sources(chart.sources(vertex)),
                None if spec_ is None else row_shape(spec_),
                _activation(chart, vertex),
                is_frozen(chart, vertex, frozen),
            )
        )
    result = chart.output.args[0]
    if isinstance(result, Mapping) and all(name in result for name in signature.outputs):
        result = [result[name] for name in signature.outputs]
    items = list(result) if isinstance(result, tuple | list) else [result]
    ends = {
        name: sources(_reads(chart, node)) if isinstance(node, fx.Node) else ()
        for name, node in zip(signature.outputs, items, strict=False)
    }
    return tuple(rows), ends


def _inside(
    name: str,
    module: nn.Module,
    inputs: tuple[str, ...],
    shape: tuple[int | str, ...] | None,
    counted: set[int],
    frozen: bool,
) -> LayerInfo:
    weights = _new(dict(module.named_parameters()), counted)
    sizes = {key: tuple(t.shape) for key, t in weights.items()}
    total = sum(t.numel() for t in weights.values())
    return LayerInfo(name, type(module).__name__, *_width(module), total, sizes, inputs, shape, frozen=frozen)


def _inputs_of(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def _reads(chart: Chart, node: fx.Node) -> list[str]:
    return [chart.of[node].name if node in chart.of else node.name]


def _activation(chart: Chart, vertex: Vertex) -> str | None:
    if vertex.end is vertex.node:
        return None
    kind = node_kind(chart.net, vertex.end)
    return None if kind == "getitem" else kind


def _new(tensors: Mapping[str, Tensor], counted: set[int]) -> dict[str, Tensor]:
    fresh = {name: tensor for name, tensor in tensors.items() if id(tensor) not in counted}
    counted.update(id(tensor) for tensor in fresh.values())
    return fresh


def _width(module: nn.Module) -> tuple[int | None, int | None]:
    """Channels or features in and out."""
    for before, after in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("num_features", "num_features"),
        ("num_channels", "num_channels"),
        ("num_embeddings", "embedding_dim"),
        ("input_size", "hidden_size"),
        ("embed_dim", "embed_dim"),
    ):
        pair = getattr(module, before, None), getattr(module, after, None)
        if isinstance(pair[0], int) and isinstance(pair[1], int):
            return pair[0], pair[1]
    return None, None


@dataclass(frozen=True)
class Summary:
    """What a model is made of; `str()` gives the table."""

    rows: tuple[LayerInfo, ...]
    total: int
    """Numbers in all weights that the outputs depend on, each counted once."""
    trainable: int
    frozen: int
    unused: int = 0
    """Numbers in weights that no output depends on."""
    labels: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [row.to_json() for row in self.rows],
            "total": self.total,
            "trainable": self.trainable,
            "frozen": self.frozen,
            "unused": self.unused,
            "labels": None if self.labels is None else list(self.labels),
        }

    def __str__(self) -> str:
        heads = ("VertexName (VertexType)", "nIn,nOut", "TotalParams", "ParamsShape", "Vertex Inputs")
        table = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(cells[k]) for cells in table) for k in range(len(heads))]
        lines = [
            "   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
        ]
        rule = "=" * (sum(widths) + 3 * (len(widths) - 1))
        totals = [
            ("Total Parameters:", self.total),
            ("Trainable Parameters:", self.trainable),
            ("Frozen Parameters:", self.frozen),
        ]
        if self.unused:
            totals.append(("Unused Parameters:", self.unused))
        foot = [f"{name:>25}  {number:,}" for name, number in totals]
        if self.labels is not None:
            shown = ", ".join(self.labels[:6]) + (", ..." if len(self.labels) > 6 else "")
            foot.append(f"{'Classes:':>25}  {len(self.labels):,} ({shown})")
        return "\n".join([rule, lines[0], rule, *lines[1:], "-" * len(rule), *foot, rule])


def _cells(row: LayerInfo) -> tuple[str, str, str, str, str]:
    if row.kind == "Input":
        return f"{row.name} (Input)", "-,-", "-", "-", "-"
    width = "-,-" if row.n_in is None else f"{row.n_in},{row.n_out}"
    shapes = ", ".join(f"{name}:{{{','.join(map(str, shape))}}}" for name, shape in row.shapes.items())
    kind = f"Frozen {row.kind}" if row.frozen else row.kind
    return f"{row.name} ({kind})", width, f"{row.parameters:,}", shapes or "-", f"[{', '.join(row.inputs)}]"


def summary(
    module: nn.Module, signature: Signature, frozen: frozenset[str] = frozenset(), labels: Sequence[str] | None = None
) -> Summary:
    """The model as a table: vertices, widths, parameters, their shapes, inputs; then total, trainable and frozen.

    >>> from collections import OrderedDict
    >>> net = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), act=nn.ReLU(), fc2=nn.Linear(3, 2)))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> print(summary(net, spec, frozenset({"fc1"})))
    =========================================================================================
    VertexName (VertexType)   nIn,nOut   TotalParams   ParamsShape              Vertex Inputs
    =========================================================================================
    x (Input)                 -,-        -             -                        -
    fc1 (Frozen Linear)       4,3        15            weight:{3,4}, bias:{3}   [x]
    fc2 (Linear)              3,2        8             weight:{2,3}, bias:{2}   [fc1]
    -----------------------------------------------------------------------------------------
            Total Parameters:  23
        Trainable Parameters:  8
           Frozen Parameters:  15
    =========================================================================================
    """
    rows = layers(module, signature, frozen)
    total = sum(row.parameters for row in rows)
    still = sum(row.parameters for row in rows if row.frozen)
    held = sum(tensor.numel() for tensor in module.parameters())
    return Summary(rows, total, total - still, still, max(held - total, 0), None if labels is None else tuple(labels))
