"""If, Loop, Scan and SequenceMap: their bodies as plain numbers and names, for a layer that runs them.

A branch that is always taken is written into the graph around it. Constants of bodies become values of the graph
around, so that weights inside a loop are weights of the net.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from kindling.errors import FormatError
from kindling.formats.onnx import proto as files
from kindling.formats.onnx.convert import UNSURE, Converter, Scope, Value
from kindling.formats.onnx.emit import plain_constant
from kindling.formats.onnx.proto import Unsupported
from kindling.nets.layers_onnx import FLOWS, Body, Node, OnnxFlow
from kindling.nets.onnx_ops import find
from kindling.nets.onnx_ops.registry import takes

MAX_VALUES = 4000
"""Values of all bodies of one control flow together: more do not fit into a bundle's layer."""


@dataclass(slots=True)
class _Bodies:
    """The bodies of one control flow, while they are written."""

    bodies: list[Body] = field(default_factory=list)
    captured: dict[int, Value] = field(default_factory=dict)
    """Number -> value of the graph around."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Identity of such a value -> its number."""
    count: int = 0

    def new(self) -> int:
        self.count += 1
        if self.count > MAX_VALUES:
            raise Unsupported(f"control flow over more than {MAX_VALUES} values")
        return self.count - 1

    def of(self, value: Value) -> int:
        """The number of a value around."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = self.new()
            self.captured[self.numbers[id(value)]] = value
        return self.numbers[id(value)]


@dataclass(slots=True)
class _Inner:
    """Names inside a body -> numbers, and the scope around it."""

    numbers: dict[str, int]
    around: _Inner | None
    outside: Scope

    def get(self, name: str, bodies: _Bodies) -> int | None:
        inner: _Inner | None = self
        while inner is not None:
            if name in inner.numbers:
                return inner.numbers[name]
            last, inner = inner, inner.around
        value = last.outside.get(name)
        return None if value is None else bodies.of(value)


def flow(
    net: Converter,
    op: str,
    opset: int,
    inputs: list[Value | None],
    outputs: list[str],
    attributes: dict[str, Any],
    scope: Scope,
    opsets: Mapping[str, int],
    name: str,
    depth: int,
    where: str,
) -> None:
    """Put a control flow into the graph; its results are new names in `scope`.

    Raises: Unsupported, FormatError.
    """
    condition = inputs[0] if inputs else None
    if op == "If" and condition is not None and isinstance(condition.const, Tensor) and condition.const.numel() == 1:
        branch = attributes.get("then_branch" if bool(condition.const.reshape(-1)[0]) else "else_branch")
        if branch is None:
            raise FormatError(f"{where} lacks the branch that is always taken.")
        _straight(net, branch, outputs, scope, opsets, name, depth, where)
        return
    written = _Bodies()
    plain = _attributes(net, op, opset, attributes, written, None, scope, opsets, depth, where)
    for key in ("then_branch", "else_branch") if op == "If" else ("body",):
        if key not in plain:
            raise FormatError(f"{where} has no {key}.")
    slots: list[int] = []
    arguments: list[fx.Node] = []
    for value in inputs:
        slots.append(-1 if value is None else len(arguments))
        if value is not None:
            arguments.append(net.read(value))
    captures = tuple(written.captured)
    arguments += [net.read(value) for value in written.captured.values()]
    if not arguments:
        raise Unsupported(f"{op} without any input")
    layer = OnnxFlow(
        op, opset, tuple(written.bodies), tuple(sorted(plain.items())), tuple(slots), captures, len(outputs)
    )
    made = net.layer(name, layer, *arguments)
    unsure = (UNSURE,) * len(net.probes)
    for place, output in enumerate(outputs):
        if output:
            node = made if len(outputs) == 1 else net.call(output, operator.getitem, made, place)
            scope.values[output] = Value(output, node, probes=unsure)


def _straight(
    net: Converter,
    branch: Any,
    outputs: list[str],
    scope: Scope,
    opsets: Mapping[str, int],
    name: str,
    depth: int,
    where: str,
) -> None:
    """The branch that is always taken, without the question."""
    inner = Scope(around=scope)
    for weight in branch.initializer:
        inner.values[weight.name] = Value(weight.name, const=files.tensor(weight, net.folder, where), weight=True)
    nodes = list(branch.node)
    net.process(nodes, inner, opsets, {}, f"{name}/", depth + 1)
    for output, info in zip(outputs, branch.output, strict=False):
        value = inner.get(info.name)
        if value is None:
            raise FormatError(f"{where}: its branch gives no {info.name!r}.")
        if output:
            scope.values[output] = value


def _attributes(
    net: Converter,
    op: str,
    opset: int,
    attributes: dict[str, Any],
    written: _Bodies,
    inner: _Inner | None,
    scope: Scope,
    opsets: Mapping[str, int],
    depth: int,
    where: str,
) -> dict[str, Any]:
    """Attributes of a control flow with places of bodies in place of graphs."""
    plain: dict[str, Any] = {}
    for key, value in attributes.items():
        if hasattr(value, "node"):
            plain[key] = _body(net, value, written, inner, scope, opsets, {}, depth + 1, where)
        elif isinstance(value, int | float | str | tuple):
            plain[key] = value
    if op == "Scan" and opset < 9:
        plain["batched"] = 1
    return plain


def _body(
    net: Converter,
    graph: Any,
    written: _Bodies,
    around: _Inner | None,
    scope: Scope,
    opsets: Mapping[str, int],
    given: Mapping[str, Any],
    depth: int,
    where: str,
) -> int:
    """Write one body; returns its place."""
    if depth > files.MAX_DEPTH:
        raise FormatError(f"{net.what} nests graphs deeper than {files.MAX_DEPTH}, which is refused.")
    inner = _Inner({info.name: written.new() for info in graph.input}, around, scope)
    takes_numbers = tuple(inner.numbers.values())
    for weight in graph.initializer:
        value = Value(weight.name, const=files.tensor(weight, net.folder, where), weight=True)
        inner.numbers[weight.name] = written.of(value)
        net.held.append(value)
    nodes: list[Node] = []
    _nodes(net, graph.node, written, inner, nodes, opsets, given, depth, where)
    gives = []
    for info in graph.output:
        number = inner.get(info.name, written)
        if number is None:
            raise FormatError(f"{where}: a body gives {info.name!r}, which is computed by no operator.")
        gives.append(number)
    written.bodies.append((takes_numbers, tuple(gives), tuple(nodes)))
    return len(written.bodies) - 1


def _nodes(
    net: Converter,
    protos: Any,
    written: _Bodies,
    inner: _Inner,
    nodes: list[Node],
    opsets: Mapping[str, int],
    given: Mapping[str, Any],
    depth: int,
    where: str,
) -> None:
    if depth > files.MAX_DEPTH:
        raise FormatError(f"{net.what} nests graphs deeper than {files.MAX_DEPTH}, which is refused.")
    for proto in protos:
        home, op = files.domain(proto.domain), files.key(proto)
        taken = []
        for name in proto.input:
            number = inner.get(name, written) if name else -1
            if number is None:
                raise FormatError(f"{where}: a body reads {name!r}, which nothing before it gives.")
            taken.append(number)
        while taken and taken[-1] == -1:
            taken.pop()
        attributes = net.attributes(proto, given, where)
        function_proto = net.functions.get((home, proto.op_type))
        if function_proto is not None:
            _call(net, function_proto, taken, proto, attributes, written, inner, nodes, depth, where)
            continue
        if home not in opsets:
            raise FormatError(f"{where}: operator {op} is of a set whose version the file does not say.")
        opset = opsets[home]
        if op == "Constant":
            value = Value(proto.output[0], const=net.constant(attributes, where))
            small = plain_constant(value)
            if small is None:
                inner.numbers[proto.output[0]] = written.of(value)
                net.held.append(value)
                continue
            attributes, opset = dict(zip(("dtype", "shape", "values"), small, strict=True)), 1
        elif op == "ConstantOfShape":
            attributes = net.filled(attributes, where)
        if op in FLOWS:
            attributes = _attributes(net, op, opset, attributes, written, inner, inner.outside, opsets, depth, where)
        else:
            function = find(op, opset)
            if function is None:
                raise Unsupported(f"operator {op} of version {opset}")
            reason = takes(function, len(taken), list(attributes))
            if reason is not None:
                raise Unsupported(f"operator {op} as it is used here: {reason}")
        results = []
        for name in proto.output:
            number = written.new()
            if name:
                inner.numbers[name] = number
            results.append(number)
        nodes.append((op, opset, tuple(sorted(attributes.items())), tuple(taken), tuple(results)))


def _call(
    net: Converter,
    function: Any,
    taken: list[int],
    proto: Any,
    attributes: dict[str, Any],
    written: _Bodies,
    inner: _Inner,
    nodes: list[Node],
    depth: int,
    where: str,
) -> None:
    """A function of the file inside a body: its operators in place of the call."""
    defaults = {entry.name: files.attribute(entry, where) for entry in function.attribute_proto}
    own = _Inner(dict(zip(function.input, taken, strict=False)), None, Scope())
    opsets = files.opsets(function.opset_import)
    _nodes(net, function.node, written, own, nodes, opsets, {**defaults, **attributes}, depth + 1, where)
    for name, result in zip(proto.output, function.output, strict=False):
        number = own.get(result, written)
        if number is None:
            raise FormatError(f"{where}: a function gives no {result!r}.")
        if name:
            inner.numbers[name] = number
