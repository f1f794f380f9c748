"""An ONNX graph as a torch graph: operators in order, what is constant computed once, the rest as layers.

Shapes are followed on the way with a few made-up sizes for the axes that vary (`probes`), without memory for numbers.
What comes out the same for all of them is written into the graph as plain numbers, so that the usual chains of Shape,
Gather and Concat in front of a Reshape are gone. Which operator becomes which layer is in `emit.py`, bodies of loops in
`flow.py`. An operator that torch has nothing for raises Unsupported; the caller may run the graph by onnxruntime.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import FormatError
from kindling.formats.assemble import valid_name
from kindling.formats.onnx import proto as files
from kindling.formats.onnx.proto import Unsupported
from kindling.nets.layers_onnx import FLOWS, apply_beside
from kindling.nets.onnx_ops import DTYPES, MAX_OPSET, NeedsValues, find
from kindling.nets.onnx_ops.registry import LIMIT, Function, TooLarge, takes

SMALL = 4096
"""Numbers in a value that is followed with its numbers, not only with its shape."""
FOLD = 2**22
"""Numbers in a constant that a few sizes may be blown up to."""
INLINE = 64
"""Numbers in a constant that stands in the graph instead of beside it."""
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
STORAGE = (torch.uint16, torch.uint32, torch.uint64)
"""Types that torch keeps but computes little with, and what can be done with them."""
STORAGE_OPS = frozenset(
    {"Cast", "CastLike", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Shape", "Size", "Squeeze"}
    | {"Transpose", "Unsqueeze", "Flatten", "BitCast"}
)
UNSURE = object()
"""A probe's value of which nothing is known."""


@dataclass(slots=True)
class Value:
    """One value of the graph."""

    name: str
    node: fx.Node | None = None
    """The torch node that gives it; of a constant, once it is read."""
    const: Any = UNSURE
    """The tensor itself, where it is the same in every run."""
    probes: tuple[Any, ...] = ()
    """What it is for each set of sizes: a tensor without memory, a small real one, a list, or UNSURE."""
    weight: bool = False
    """Whether the file keeps it as a weight, and does not compute it."""

    @property
    def is_const(self) -> bool:
        return self.const is not UNSURE

    @property
    def rank(self) -> int | None:
        """Number of axes, where it is known."""
        seen = self.const if self.is_const else self.probes[0] if self.probes else UNSURE
        return seen.dim() if isinstance(seen, Tensor) else None

    @property
    def dtype(self) -> torch.dtype | None:
        seen = self.const if self.is_const else self.probes[0] if self.probes else UNSURE
        return seen.dtype if isinstance(seen, Tensor) else None

    def shape(self) -> tuple[int, ...] | None:
        """Its shape, where that is the same for all sizes."""
        shapes = {tuple(seen.shape) if isinstance(seen, Tensor) else None for seen in self.probes}
        if self.is_const and isinstance(self.const, Tensor):
            return tuple(self.const.shape)
        return shapes.pop() if len(shapes) == 1 else None


@dataclass(slots=True)
class Scope:
    """Names of values, in a graph or a function, and around it."""

    values: dict[str, Value] = field(default_factory=dict)
    around: Scope | None = None

    def get(self, name: str) -> Value | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.around
        return None


@dataclass(frozen=True, slots=True)
class Step:
    """One operator with everything resolved."""

    op: str
    opset: int
    inputs: list[Value | None]
    outputs: list[str]
    """Names in the file; trailing ones that nobody asks for are gone."""
    attributes: dict[str, Any]
    name: str
    """What to call its layer."""
    function: Function


@dataclass(frozen=True, slots=True)
class Converted:
    """A graph in torch."""

    module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]
    values: list[tuple[Any, ...]]
    """For each output, what it is for each set of sizes."""
    rewritten: bool
    """Whether a batch of one size was opened up."""


class Converter:
    """One conversion."""

    def __init__(
        self,
        model: Any,
        folder: Path | None,
        what: str,
        probes: Sequence[Mapping[str, Sequence[int]]],
        fixed_rows: int = 0,
    ) -> None:
        """
        Args:
            probes: sets of sizes: the shape of each input.
            fixed_rows: the file's one size of a batch, where `probes` gives others.
        """
        self.model, self.folder, self.what, self.probes = model, folder, what, probes
        self.fixed_rows = fixed_rows
        self.rewritten = False
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.names: set[str] = set()
        self.functions = {(files.domain(function.domain), function.name): function for function in model.functions}
        self.main: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = {}
        self.fused: dict[int, Value] = {}
        """Operators (by identity) that another has taken in, and what they now stand for."""
        self.results: set[str] = set()
        self.held: list[Value] = []
        """Constants of bodies: values are told apart by identity, which must not be given out twice."""

    # ------------------------------------------------------------------------------------------------- the graph

    def run(self) -> Converted:
        """Raises: Unsupported, FormatError."""
        graph = self.model.graph
        opsets = files.opsets(self.model.opset_import)
        if opsets.get("", 1) > MAX_OPSET:
            raise Unsupported(f"operator set {opsets['']}, newer than {MAX_OPSET}")
        if len(graph.sparse_initializer):
            raise Unsupported("sparse weights")
        scope = Scope()
        weights = {weight.name: weight for weight in graph.initializer}
        inputs = [info for info in graph.input if info.name not in weights]
        for info in inputs:
            scope.values[info.name] = self._input(info)
        for name, weight in weights.items():
            scope.values[name] = Value(name, const=files.tensor(weight, self.folder, self.what), weight=True)
        self.weights = weights
        self.main = list(graph.node)  # held, so that each operator stays one object
        for node in self.main:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.results = {info.name for info in graph.output}
        self.process(self.main, scope, opsets, {}, "", 0)
        outputs = []
        for info in graph.output:
            value = scope.get(info.name)
            if value is None:
                raise FormatError(f"{self.what}: output {info.name!r} is computed by no operator.")
            outputs.append(value)
        nodes = tuple(self.read(value) for value in outputs)
        self.graph.output(nodes[0] if len(nodes) == 1 else nodes)
        return Converted(
            module=self._finish(),
            inputs=[info.name for info in inputs],
            outputs=[info.name for info in graph.output],
            values=[self.seen(value) for value in outputs],
            rewritten=self.rewritten,
        )

    def _input(self, info: Any) -> Value:
        said = files.declared(info)
        if said is not None and said[0] not in DTYPES:
            raise Unsupported(f"an input of element type {said[0]}")
        node = self.graph.create_node("placeholder", self.unique(info.name))
        node.name = str(node.target)
        probes: list[Any] = []
        for sizes in self.probes:
            if said is None or info.name not in sizes:
                probes.append(UNSURE)
            else:
                probes.append(torch.empty(list(sizes[info.name]), dtype=DTYPES[said[0]], device="meta"))
        return Value(info.name, node, probes=tuple(probes))

    def _finish(self) -> fx.GraphModule:
        """The module, with nothing in it that no node needs."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        kept = nn.Module()
        for node in self.graph.nodes:
            if node.op == "call_module":
                kept.add_module(str(node.target), getattr(self.root, str(node.target)))
            elif node.op == "get_attr":
                held = getattr(self.root, str(node.target))
                if isinstance(held, nn.Parameter):
                    kept.register_parameter(str(node.target), held)
                else:
                    kept.register_buffer(str(node.target), held)
        return fx.GraphModule(kept, self.graph).eval()

    def process(
        self,
        nodes: Any,
        scope: Scope,
        opsets: Mapping[str, int],
        given: Mapping[str, Any],
        prefix: str,
        depth: int,
    ) -> None:
        """Operators in order; their results are new names in `scope`.

        Args:
            given: attributes of the function that the operators are in.
            prefix: what stands before the names of their layers.
        """
        if depth > files.MAX_DEPTH:
            raise FormatError(f"{self.what} nests graphs deeper than {files.MAX_DEPTH}, which is refused.")
        for node in nodes:
            if id(node) in self.fused:
                scope.values[node.output[0]] = self.fused[id(node)]
                continue
            self._one(node, scope, opsets, given, prefix, depth)

    def _one(
        self, node: Any, scope: Scope, opsets: Mapping[str, int], given: Mapping[str, Any], prefix: str, depth: int
    ) -> None:
        home, op = files.domain(node.domain), files.key(node)
        label = node.name.strip("/") or next((name for name in node.output if name), node.op_type).strip("/")
        where = f"{self.what}: operator {label!r} ({op})"
        inputs: list[Value | None] = []
        for name in node.input:
            value = scope.get(name) if name else None
            if name and value is None:
                raise FormatError(f"{where} reads {name!r}, which nothing before it gives.")
            inputs.append(value)
        while inputs and inputs[-1] is None:
            inputs.pop()
        outputs = list(node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        attributes = self.attributes(node, given, where)
        function_proto = self.functions.get((home, node.op_type))
        if function_proto is not None:
            self._inline(function_proto, inputs, outputs, attributes, scope, f"{prefix}{label}/", depth, where)
            return
        if home not in opsets:
            raise FormatError(f"{where} is of the set {home or 'ai.onnx'!r}, whose version the file does not say.")
        opset = opsets[home]
        if home == "" and op in FLOWS:
            from kindling.formats.onnx.flow import flow

            flow(self, op, opset, inputs, outputs, attributes, scope, opsets, f"{prefix}{label}", depth, where)
            return
        if op == "Constant":
            scope.values[outputs[0]] = Value(outputs[0], const=self.constant(attributes, where))
            return
        if op == "ConstantOfShape":
            attributes = self.filled(attributes, where)
        attributes.pop("consumed_inputs", None)
        function = find(op, opset)
        if function is None:
            raise Unsupported(f"operator {op} of version {opset}")
        reason = takes(function, len(inputs), list(attributes))
        if reason is not None:
            raise Unsupported(f"operator {op} as it is used here: {reason}")
        step = Step(op, opset, inputs, outputs, attributes, f"{prefix}{label}", function)
        self._compute(step, scope, where, node)

    def attributes(self, node: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """An operator's attributes by name; those of the function around it in place of references to them."""
        found = {}
        for entry in node.attribute:
            if entry.ref_attr_name:
                if entry.ref_attr_name in given:
                    found[entry.name] = given[entry.ref_attr_name]
                continue
            found[entry.name] = files.attribute(entry, where)
        return found

    def _inline(
        self,
        function: Any,
        inputs: list[Value | None],
        outputs: list[str],
        attributes: dict[str, Any],
        scope: Scope,
        prefix: str,
        depth: int,
        where: str,
    ) -> None:
        """A function of the file: its operators in place of the call."""
        defaults = {entry.name: files.attribute(entry, where) for entry in function.attribute_proto}
        inner = Scope({name: value for name, value in zip(function.input, inputs, strict=False) if value is not None})
        opsets = files.opsets(function.opset_import)
        self.process(function.node, inner, opsets, {**defaults, **attributes}, prefix, depth + 1)
        for outer, name in zip(outputs, function.output, strict=False):
            value = inner.get(name)
            if outer and value is None:
                raise FormatError(f"{where}: the function gives no {name!r}.")
            if outer and value is not None:
                scope.values[outer] = value

    def constant(self, attributes: dict[str, Any], where: str) -> Tensor:
        for name, value in attributes.items():
            if name == "value":
                return files.tensor(value, self.folder, where)
            if name in ("value_float", "value_floats"):
                return torch.tensor(value, dtype=torch.float32, device="cpu")
            if name in ("value_int", "value_ints"):
                return torch.tensor(value, dtype=torch.int64, device="cpu")
            if name == "sparse_value":
                return self._sparse(value, where)
        raise Unsupported("a constant of texts")

    def _sparse(self, value: Any, where: str) -> Tensor:
        sizes = [int(size) for size in value.dims]
        values, at = files.tensor(value.values, None, where), files.tensor(value.indices, None, where)
        if math.prod(sizes) > FOLD or any(size < 0 for size in sizes):
            raise FormatError(f"{where} is sparse over {sizes[:8]} numbers, which are refused.")
        flat = torch.zeros(math.prod(sizes), dtype=values.dtype)
        try:
            if at.dim() == 2:
                place = torch.zeros(at.shape[0], dtype=torch.int64)
                for axis, size in enumerate(sizes):
                    place = place * size + at[:, axis]
                at = place
            flat[at] = values
        except (IndexError, RuntimeError) as error:
            raise FormatError(f"{where} puts numbers outside its shape.") from error
        return flat.reshape(sizes)

    def filled(self, attributes: dict[str, Any], where: str) -> dict[str, Any]:
        if "value" not in attributes:
            return {"dtype": 1, "value": 0.0}
        one = files.tensor(attributes["value"], self.folder, where)
        if one.numel() != 1:
            raise FormatError(f"{where} is filled with {one.numel()} numbers.")
        code = next(code for code, dtype in DTYPES.items() if dtype == one.dtype)
        return {
            "dtype": code,
            "value": one.float().item() if one.dtype.itemsize == 1 and one.is_floating_point() else one.item(),
        }

    # --------------------------------------------------------------------------------------------------- values

    def seen(self, value: Value) -> tuple[Any, ...]:
        """What a value is for each set of sizes."""
        if value.is_const:
            return (value.const,) * len(self.probes)
        return value.probes or (UNSURE,) * len(self.probes)

    def _compute(self, step: Step, scope: Scope, where: str, node: Any) -> None:
        inputs = step.inputs
        if all(value is None or value.is_const for value in inputs) and step.op not in RANDOM:
            folded = self._fold(step, where)
            if folded is not None:
                for name, const in zip(step.outputs, folded, strict=False):
                    if name:
                        scope.values[name] = Value(name, const=const)
                return
        if step.op not in STORAGE_OPS and any(one.dtype in STORAGE for one in inputs if one is not None):
            raise Unsupported(f"operator {step.op} on unsigned numbers of 16 bits or more")
        probes = self._follow(step, where)
        results = [Value(name, probes=tuple(one[k] for one in probes)) for k, name in enumerate(step.outputs)]
        for value in results:
            self._settle(value)
        if not all(value.is_const for value in results):
            from kindling.formats.onnx.emit import emit

            nodes = emit(self, step, node, results, where)
            for value, made in zip(results, nodes, strict=True):
                if not value.is_const:
                    value.node = made
        for value in results:
            if value.name:
                scope.values[value.name] = value

    def _settle(self, value: Value) -> None:
        """A value that is small, real and the same for all sizes is a constant."""
        real = [one for one in value.probes if isinstance(one, Tensor) and one.device.type == "cpu"]
        if not real or len(real) != len(value.probes):
            return
        first = real[0]
        if all(one.shape == first.shape and one.dtype == first.dtype and _equal(one, first) for one in real):
            value.const = first

    def _fold(self, step: Step, where: str) -> list[Any] | None:
        """Results of an operator whose inputs are constants; None where they would be too large to keep."""
        given = [value.const if value is not None else None for value in step.inputs]
        have = sum(one.numel() for one in given if isinstance(one, Tensor))
        mark = LIMIT.set(max(FOLD, 4 * have))
        try:
            light = [_light(one) for one in given]
            if any(isinstance(one, Tensor) and one.device.type == "meta" for one in light):
                try:
                    sizes = apply_beside(step.function, light, step.attributes, len(step.outputs))
                    made = sum(one.numel() for one in sizes if isinstance(one, Tensor))
                    if made > max(FOLD, 4 * have):
                        return None
                except Exception:  # torch tells of missing numbers in many ways; the real run has the last word
                    pass
            return list(apply_beside(step.function, given, step.attributes, len(step.outputs)))
        except Exception as error:  # torch raises what it likes; the file is at fault
            raise _fault(where, error) from error
        finally:
            LIMIT.reset(mark)

    def _follow(self, step: Step, where: str) -> list[list[Any]]:
        """For each set of sizes, the results without their numbers."""
        found: list[list[Any]] = []
        unsure = [UNSURE] * len(step.outputs)
        for place in range(len(self.probes)):
            inputs = [None if value is None else _light(self.seen(value)[place]) for value in step.inputs]
            if any(one is UNSURE for one in inputs):
                found.append(unsure)
                continue
            have = sum(one.numel() for one in inputs if isinstance(one, Tensor) and one.device.type == "cpu")
            mark = LIMIT.set(2**62 if have == 0 else max(FOLD, 2**40))
            try:
                results = apply_beside(step.function, inputs, step.attributes, len(step.outputs))
            except NeedsValues:
                found.append(unsure)
                continue
            except Exception as error:  # torch raises what it likes; the file is at fault, or the sizes made up
                if "meta" in str(error).lower() or isinstance(error, NotImplementedError):
                    found.append(unsure)
                    continue
                repaired = self._rebatched(step, inputs)
                if repaired is None:
                    raise _fault(where, error) from error
                results = repaired
            finally:
                LIMIT.reset(mark)
            found.append([_kept(one, step.op in RANDOM) for one in results])
        return found

    def _rebatched(self, step: Step, inputs: list[Any]) -> tuple[Any, ...] | None:
        """A Reshape to a batch of the file's one size, opened up for any; None where it is something else."""
        if not self.fixed_rows or step.op != "Reshape" or len(step.inputs) < 2:
            return None
        target = step.inputs[1]
        if target is None or not isinstance(target.const, Tensor) or target.const.dim() != 1:
            return None
        sizes = [int(size) for size in target.const.tolist()]
        if not sizes or sizes[0] != self.fixed_rows:
            return None
        open_sizes = [0 if -1 in sizes else -1, *sizes[1:]]
        opened = Value(target.name, const=torch.tensor(open_sizes))
        step.inputs[1] = opened
        self.rewritten = True
        try:
            return apply_beside(step.function, [inputs[0], opened.const], step.attributes, 1)
        except Exception:  # it is not the batch after all
            return None

    # ---------------------------------------------------------------------------------------------- torch's nodes

    def unique(self, name: str) -> str:
        """A name that a graph may hold, and that nothing else has."""
        if len(self.names) >= 4 * files.MAX_NODES:
            raise FormatError(f"{self.what} has too many values, which are refused.")
        plain = valid_name(name.strip("/") or "value")
        plain = f"{plain}_layer" if hasattr(builtins, plain) else plain
        unique, count = plain, 1
        while unique in self.names:
            count += 1
            unique = f"{plain}_{count}"
        self.names.add(unique)
        return unique

    def read(self, value: Value) -> fx.Node:
        """The node of a value; a constant becomes a weight or a buffer when it is first read."""
        if value.node is None:
            if not isinstance(value.const, Tensor):
                raise Unsupported("a constant that is no tensor")
            name = self.unique(value.name or "constant")
            tensor = value.const.contiguous()
            trained = value.weight and tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() > 0
            if trained and tensor.dtype.itemsize > 1:
                self.root.register_parameter(name, nn.Parameter(tensor))
            else:
                self.root.register_buffer(name, tensor)
            node = self.graph.create_node("get_attr", name)
            node.name = name
            value.node = node
        return value.node

    def layer(self, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """A layer under its name, with its weights already in it."""
        unique = self.unique(name)
        self.root.add_module(unique, module.eval())
        return self._named(self.graph.create_node("call_module", unique, inputs), unique)

    def call(self, name: str, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function that graphs may hold."""
        unique = self.unique(name)
        return self._named(self.graph.create_node("call_function", function, args, kwargs), unique)

    def _named(self, node: fx.Node, name: str) -> fx.Node:
        node.name = name
        return node


def _light(value: Any) -> Any:
    """A value for following shapes: small whole numbers and truths stay, everything else loses its memory."""
    if isinstance(value, list):
        return [_light(part) for part in value]
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    return value if value.numel() <= SMALL else value.to("meta")


def _kept(value: Any, random: bool) -> Any:
    """A result as it is kept: real only where it is small."""
    if isinstance(value, list):
        return [_kept(part, random) for part in value]
    if isinstance(value, Tensor) and value.device.type != "meta" and (random or value.numel() > SMALL):
        return value.to("meta")
    return value


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() and a.dtype.itemsize > 1:
        return bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    if a.dtype.itemsize == 1 and a.is_floating_point():
        return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))
    return bool(torch.equal(a, b))


def _fault(where: str, error: Exception) -> FormatError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    kind = files.Refused if isinstance(error, TooLarge) else FormatError
    return kind(f"{where} cannot be made of what the file says: {line}.")
