"""An ONNX graph as a torch module, by torch's own operators where they cover it, else by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from kindling.errors import ConfigError, FormatError, MissingExtraError
from kindling.formats.assemble import valid_name
from kindling.formats.onnx import proto as files
from kindling.formats.onnx.convert import Converted, Converter
from kindling.formats.onnx.proto import Unsupported

ENGINES = ("auto", "torch", "onnxruntime")
_REFUSED_OPERATORS = ("EPContext", "Custom")
_DOMAINS = ("", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft")


@dataclass(frozen=True, kw_only=True)
class OnnxNet:
    """A graph that can be run: `module(*inputs)` in the order of `inputs`."""

    module: nn.Module
    inputs: list[str]
    outputs: list[str]
    engine: str
    """`"torch"`: trainable, cuttable; `"onnxruntime"`: inference alone."""
    reason: str
    """Why it is not torch; empty where it is."""
    converted: Converted | None = None


def open_net(
    source: str | Path | bytes | Any,
    *,
    engine: str = "auto",
    sizes: Sequence[Mapping[str, Sequence[int]]] | None = None,
    fixed_rows: int = 0,
    folder: Path | None = None,
    what: str = "the graph",
) -> OnnxNet:
    """A graph with all its inputs and outputs as the file has them, whatever they are: no batch is needed.

    Args:
        source: a file, its bytes, or a ModelProto.
        engine: `"auto"` takes torch where it has every operator, else onnxruntime; or one of the two.
        sizes: made-up shapes of the inputs by which shapes inside are followed; from the file if None.
        fixed_rows: the file's one size of a batch, where `sizes` gives others.
        folder: where a ModelProto's numbers in other files are; a file's own folder if None.
        what: names the graph in messages.
    Raises: FormatError, when neither takes it; ConfigError, for an unknown engine; MissingExtraError.
    """
    if engine not in ENGINES:
        raise ConfigError("engine", engine, "is unknown", f"Use one of {', '.join(ENGINES)}")
    if isinstance(source, str | Path):
        folder, what = Path(source).parent, str(source)
        model = files.open_file(Path(source))
    elif isinstance(source, bytes):
        model = files.parse(source, what)
    else:
        model = source
    reason = ""
    if engine != "onnxruntime":
        try:
            made = Converter(model, folder, what, sizes if sizes is not None else stated_sizes(model), fixed_rows).run()
            return OnnxNet(
                module=made.module,
                inputs=made.inputs,
                outputs=made.outputs,
                engine="torch",
                reason="",
                converted=made,
            )
        except Unsupported as error:
            reason = f"torch has nothing for {error}"
        except files.Refused:
            raise
        except FormatError as error:
            if engine == "torch":
                raise
            reason = str(error)
        except Exception as error:  # an attribute of the wrong kind, say: the file is at fault
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            reason = f"it is damaged ({type(error).__name__}: {line})"
        if engine == "torch":
            raise FormatError(f"{what} cannot be a torch module: {reason}.")
    return by_runtime(model, folder, what, reason)


def stated_sizes(model: Any, rows: Sequence[int] = (2, 3, 7919)) -> list[dict[str, list[int]]]:
    """Shapes of the inputs as the file states them, with several sizes for each axis that it leaves open."""
    weights = {weight.name for weight in model.graph.initializer}
    found: list[dict[str, list[int]]] = [{} for _ in rows]
    symbols: dict[str, int] = {}
    open_axes = False
    for info in model.graph.input:
        said = files.declared(info)
        if info.name in weights or said is None or said[1] is None:
            continue
        for place in range(len(rows)):
            shape = []
            for axis, size in enumerate(said[1]):
                if isinstance(size, int):
                    shape.append(size)
                    continue
                open_axes = True
                symbol = size or f"{info.name}:{axis}"
                number = symbols.setdefault(symbol, len(symbols))
                shape.append(rows[place] + 8 * number if number else rows[place])
            found[place][info.name] = shape
    return found if open_axes else found[:1]


def by_runtime(model: Any, folder: Path | None, what: str, reason: str, rows: int = 0) -> OnnxNet:
    """The graph as onnxruntime runs it.

    Args:
        rows: of its one size of a batch; 0 where it takes any.

    Raises: FormatError, when it does not take it either.
    """
    import torch

    from kindling.nets.layers_onnx import OnnxRuntimeNet

    refuse_strangers(model, what)
    for weight in _tensors(model.graph):
        files.inline(weight, folder, what)
    try:
        data = model.SerializeToString()
    except Exception as error:  # protobuf's own refusal of more than 2 GiB
        raise FormatError(f"{what} is too large for onnxruntime to take in one piece: {error}.") from error
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [info.name for info in model.graph.input if info.name not in weights]
    outputs = [info.name for info in model.graph.output]
    with torch.device("cpu"):
        module = OnnxRuntimeNet(len(data), tuple(inputs), tuple(outputs), rows)
    module.model = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        module.session()
        # A graph of one layer: what bundles hold, and what is cut and frozen by name.
        wrapped = _wrapped(module, inputs)
    except (FormatError, MissingExtraError) as error:
        if reason and isinstance(error, FormatError):
            raise FormatError(f"{what} cannot be read: {reason.rstrip('.')}; and {error}") from error
        raise
    return OnnxNet(module=wrapped, inputs=inputs, outputs=outputs, engine="onnxruntime", reason=reason)


def _wrapped(module: nn.Module, inputs: Sequence[str]) -> fx.GraphModule:
    root, graph, names = nn.Module(), fx.Graph(), set()
    root.add_module("onnxruntime", module)
    nodes = []
    for name in inputs:
        plain = valid_name(name)
        while plain in names or plain == "onnxruntime":
            plain += "_"
        names.add(plain)
        nodes.append(graph.placeholder(plain))
    made = graph.call_module("onnxruntime", tuple(nodes))
    graph.output(made)
    return fx.GraphModule(root, graph).eval()


def refuse_strangers(model: Any, what: str) -> None:
    """Operators that would have onnxruntime open other files or load code.

    Raises: FormatError, for them, and for domains that are not ONNX's, Microsoft's or the file's own.
    """
    own = {files.domain(function.domain) for function in model.functions}

    def look(nodes: Any, depth: int = 0) -> None:
        if depth > files.MAX_DEPTH:
            raise FormatError(f"{what} nests graphs deeper than {files.MAX_DEPTH}, which is refused.")
        for node in nodes:
            home = files.domain(node.domain)
            if node.op_type in _REFUSED_OPERATORS or (home not in _DOMAINS and home not in own):
                raise FormatError(f"{what} has an operator {files.key(node)!r}, which is of nobody that is known.")
            for entry in node.attribute:
                for graph in (*([entry.g] if entry.type == 5 else []), *entry.graphs):
                    look(graph.node, depth + 1)

    look(model.graph.node)
    for function in model.functions:
        look(function.node)


def _tensors(graph: Any, depth: int = 0) -> list[Any]:
    """Every tensor that a graph keeps, those of its bodies too."""
    found = list(graph.initializer)
    for node in graph.node:
        for entry in node.attribute:
            if entry.type == 4:
                found.append(entry.t)
            elif entry.type == 5 and depth < files.MAX_DEPTH:
                found += _tensors(entry.g, depth + 1)
    return found
