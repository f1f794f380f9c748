"""From nodes to a torch graph: what is constant is computed, the rest becomes layers and functions.

Only what the outputs need is looked at, so a training graph gives its forward part. Calls of functions are written out
in place; a switch whose condition is constant (Keras's learning phase) is decided. The operations are in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from kindling.errors import FormatError
from kindling.formats.assemble import ROWS
from kindling.formats.channels import Flow, Mover
from kindling.formats.tensorflow.graphdef import Function, Graph, Node

MAX_DEPTH = 32
MAX_STEPS = 50_000


@dataclass(frozen=True, slots=True)
class Known:
    """Numbers that do not depend on the input. A size of the batch is `ROWS` in them, and stays open."""

    value: np.ndarray
    name: str = ""
    """Of the variable that it is."""
    trained: bool = False


class Dead:
    """What a switch did not choose."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What could not be read: an error only where the outputs turn out to need it."""

    error: FormatError


DEAD = Dead()
Value: TypeAlias = Known | Flow | Dead | Refused
Feed = Callable[[Node], Flow]


@dataclass(slots=True)
class Scope:
    """A graph, or one call of a function."""

    nodes: Mapping[str, Node]
    prefix: str = ""
    arguments: Mapping[str, Value] = field(default_factory=dict)
    values: dict[str, list[Value]] = field(default_factory=dict)
    users: dict[str, list[Node]] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    """Nodes whose values are read from outside."""


@dataclass(slots=True)
class Runner:
    """One net that is being built."""

    mover: Mover
    graph: Graph
    feed: Feed
    """Makes the input that a placeholder stands for."""
    variable: Callable[[Node], Known]
    """Gives a variable's numbers."""
    what: str
    left: int = 2**29
    """Weights that may still be drawn."""
    steps: int = 0
    depth: int = 0
    batches: set[int] = field(default_factory=lambda: {1})
    """Sizes that the graph was made for one batch of: a reshape to one of them keeps the batch open."""
    made: dict[str, Any] = field(default_factory=dict)
    """Layer -> its first wire: weights used twice are shared."""

    def fail(self, why: str) -> FormatError:
        return FormatError(f"{self.what}: {why}")

    def draw(self, node: Node, count: int) -> None:
        """Take so many weights off those that may be drawn."""
        self.left -= count
        if self.left < 0:
            raise node.fail("and others draw more weights than are made without a file; see max_parameters=")

    def outputs(self, scope: Scope, wanted: Sequence[str]) -> list[Value]:
        """The values of some tensors, `node`, `node:1` or `node:name:1`."""
        refs = [_split(name) for name in wanted]
        scope.needed |= {name for name, _ in refs}
        order = self._order(scope, [name for name, _ in refs])
        for name in order:
            for source in scope.nodes[name].inputs:
                scope.users.setdefault(_split(source)[0], []).append(scope.nodes[name])
        for name in order:
            if name not in scope.values:
                self._run(scope, scope.nodes[name])
        found = [self._pick(scope, ref) for ref in refs]
        for value in found:
            if isinstance(value, Refused):
                raise value.error
        return found

    def _order(self, scope: Scope, names: Sequence[str]) -> list[str]:
        """What these nodes need, each after what it is given."""
        order: list[str] = []
        state: dict[str, int] = {}
        for root in names:
            stack = [(root, False)]
            while stack:
                name, ready = stack.pop()
                if ready:
                    state[name] = 2
                    order.append(name)
                    continue
                if name in scope.arguments or state.get(name) == 2:
                    continue
                if state.get(name) == 1:
                    raise self.fail(f"node {name[:120]!r} waits for itself: loops are not read.")
                if name not in scope.nodes:
                    raise self.fail(f"there is no node {name[:120]!r}.")
                state[name] = 1
                stack.append((name, True))
                for source in scope.nodes[name].inputs:
                    before = _split(source)[0]
                    if state.get(before) == 1:
                        raise self.fail(f"node {before[:120]!r} waits for itself: loops are not read.")
                    if state.get(before) != 2:
                        stack.append((before, False))
        return order

    def _pick(self, scope: Scope, ref: tuple[str, int]) -> Value:
        name, place = ref
        if name in scope.arguments:
            return scope.arguments[name]
        values = scope.values[name]
        if place >= len(values):
            raise scope.nodes[name].fail(f"has no output {place}")
        return values[place]

    def _run(self, scope: Scope, node: Node) -> None:
        from kindling.formats.tensorflow.ops import OPS, Op

        self.steps += 1
        if self.steps > MAX_STEPS:
            raise self.fail(f"the outputs need more than {MAX_STEPS:,} nodes, which are refused.")
        given = [self._pick(scope, _split(source)) for source in node.inputs]
        if node.op == "Merge":
            alive = [value for value in given if not isinstance(value, Dead)]
            if len(alive) != 1:
                raise node.fail(f"joins {len(alive)} branches that are alive, where one should be")
            scope.values[node.name] = [alive[0], Known(np.array(given.index(alive[0])))]
            return
        if any(isinstance(value, Dead) for value in given):
            scope.values[node.name] = [DEAD] * 8
            return
        if node.op in ("PartitionedCall", "StatefulPartitionedCall") or node.op in self.graph.functions:
            name = node.function("f") if node.op not in self.graph.functions else node.op
            scope.values[node.name] = self.call(node, name, given, f"{scope.prefix}{node.name}/")
            return
        refused = next((value for value in given if isinstance(value, Refused)), None)
        if refused is not None and (node.op not in ("Switch", "RefSwitch") or refused is not given[0]):
            scope.values[node.name] = [refused] * 8
            return
        make = OPS.get(node.op)
        found: Value | list[Value]
        try:
            if make is None:
                raise node.fail("is an operation that is not read")
            found = make(Op(self, scope, node, given))
        except FormatError as error:
            found = [Refused(error)] * 8
        scope.values[node.name] = found if isinstance(found, list) else [found]

    def call(self, node: Node, name: str, given: Sequence[Value], prefix: str) -> list[Value]:
        """A function's nodes in place of its call."""
        function: Function | None = self.graph.functions.get(name)
        if function is None:
            raise node.fail(f"calls {name[:80]!r}, a function that is not in the file")
        if len(given) != len(function.inputs):
            raise node.fail(f"gives {len(given)} inputs to a function of {len(function.inputs)}")
        if self.depth >= MAX_DEPTH:
            raise node.fail(f"nests calls deeper than {MAX_DEPTH}, which is refused")
        self.depth += 1
        scope = Scope(function.nodes, prefix, dict(zip(function.inputs, given, strict=True)))
        found = self.outputs(scope, function.outputs)
        self.depth -= 1
        return found


def _split(name: str) -> tuple[str, int]:
    """A tensor's node and its place among the node's outputs: `node`, `node:1`, `node:output:1`.

    >>> _split("a/b"), _split("split:2"), _split("split:output:1"), _split("bn:y:0")
    (('a/b', 0), ('split', 2), ('split', 1), ('bn', 0))
    """
    node, _, rest = name.partition(":")
    place = rest.rpartition(":")[2]
    return node, int(place) if place.isdigit() and len(place) < 6 else 0


split_name = _split


def open_sizes(sizes: Sequence[int]) -> list[int]:
    """Sizes of a reshape, -1 in place of the one that grows with the batch.

    >>> open_sizes([ROWS, 8]), open_sizes([ROWS * 4, 2]), open_sizes([3, -1])
    ([-1, 8], [-1, 2], [3, -1])
    """
    return [-1 if size > 0 and size % ROWS == 0 else int(size) for size in sizes]
