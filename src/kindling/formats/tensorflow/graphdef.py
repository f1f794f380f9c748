"""TensorFlow's GraphDef, FunctionDef and SavedModel messages: nodes, their attributes, and tensors as numpy arrays.

Sources: graph.proto, node_def.proto, attr_value.proto, tensor.proto, function.proto, meta_graph.proto.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kindling.errors import FormatError
from kindling.formats.wire import Message

MAX_NODES = 100_000
MAX_NUMBERS = 2**31
MAX_MADE = 2**28
"""Numbers in a tensor that the file writes as one value, repeated."""

_DTYPES: Mapping[int, str] = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64", 10: "bool", 17: "uint16",
    19: "float16", 22: "uint32", 23: "uint64",
}  # fmt: skip
STRING, RESOURCE, BFLOAT16 = 7, 20, 14


def dtype_name(number: int) -> str | None:
    """numpy's name of a dtype's number, or None for one that holds no plain numbers.

    >>> dtype_name(1), dtype_name(101), dtype_name(7)
    ('float32', 'float32', None)
    """
    number = number - 100 if number > 100 else number  # of references to variables
    return "float32" if number == BFLOAT16 else _DTYPES.get(number)


@dataclass(slots=True)
class Node:
    """One operation."""

    name: str
    op: str
    inputs: list[str]
    attributes: dict[str, Message]
    what: str
    """Names the file and the node in messages."""

    def fail(self, why: str) -> FormatError:
        return FormatError(f"{self.what}: node {self.name[:120]!r} ({self.op[:60]}) {why}.")

    def text(self, key: str, default: str) -> str:
        value = self.attributes.get(key)
        return value.text(2) if value is not None and value.has(2) else default

    def whole(self, key: str, default: int = 0) -> int:
        value = self.attributes.get(key)
        return value.whole(3) if value is not None and value.has(3) else default

    def number(self, key: str, default: float = 0.0) -> float:
        value = self.attributes.get(key)
        numbers = value.floats(4, "<f4") if value is not None and value.has(4) else np.empty(0)
        found = float(numbers[-1]) if len(numbers) else default
        if not math.isfinite(found):
            raise self.fail(f"has {key}={found}")
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.attributes.get(key)
        return value.whole(5) != 0 if value is not None and value.has(5) else default

    def dtype(self, key: str) -> int:
        value = self.attributes.get(key)
        return value.whole(6) if value is not None else 0

    def wholes(self, key: str) -> list[int]:
        value = self.attributes.get(key)
        return value.message(1).wholes(3) if value is not None and value.has(1) else []

    def shape(self, key: str) -> list[int] | None:
        """Sizes, -1 where open; None where nothing is known."""
        value = self.attributes.get(key)
        return None if value is None or not value.has(7) else shape_of(value.message(7))

    def function(self, key: str) -> str:
        value = self.attributes.get(key)
        return value.message(10).text(1) if value is not None and value.has(10) else ""


@dataclass(slots=True)
class Function:
    """A graph that other nodes call."""

    name: str
    inputs: list[str]
    outputs: list[str]
    """Where each output comes from, in order."""
    nodes: dict[str, Node]


@dataclass(slots=True)
class Graph:
    """Nodes by name, functions by name."""

    nodes: dict[str, Node]
    functions: dict[str, Function] = field(default_factory=dict)


def read_graph(message: Message) -> Graph:
    """A GraphDef.

    Raises: FormatError, when it is damaged.
    """
    functions = {}
    for part in message.message(2).messages(1) if message.has(2) else ():
        function = _function(part)
        functions[function.name] = function
    return Graph(_nodes(message.messages(1), message.what), functions)


def _function(message: Message) -> Function:
    signature = message.message(1)
    returns = {entry.text(1): entry.text(2) for entry in message.messages(4)}
    outputs = [argument.text(1) for argument in signature.messages(3)]
    if any(name not in returns for name in outputs):
        raise FormatError(f"{message.what}: function {signature.text(1)[:80]!r} does not give all of its outputs.")
    return Function(
        signature.text(1),
        [argument.text(1) for argument in signature.messages(2)],
        [returns[name] for name in outputs],
        _nodes(message.messages(3), message.what),
    )


def _nodes(messages: list[Message], what: str) -> dict[str, Node]:
    if len(messages) > MAX_NODES:
        raise FormatError(f"{what} has more than {MAX_NODES:,} nodes, which are refused.")
    nodes: dict[str, Node] = {}
    for message in messages:
        name = message.text(1)
        if name in nodes:
            raise FormatError(f"{what} has two nodes called {name[:80]!r}.")
        attributes = {entry.text(1): entry.message(2) for entry in message.messages(5)}
        inputs = [name for name in message.texts(3) if not name.startswith("^")]
        nodes[name] = Node(name, message.text(2), inputs, attributes, what)
    return nodes


def shape_of(message: Message) -> list[int] | None:
    """A TensorShapeProto: sizes, -1 where open; None for an unknown rank."""
    if message.whole(3):
        return None
    sizes = [part.whole(1) for part in message.messages(2)]
    if len(sizes) > 16 or any(not -1 <= size < MAX_NUMBERS for size in sizes):
        raise FormatError(f"{message.what} is damaged: a tensor of shape {sizes[:16]} is in it.")
    return sizes


def read_tensor(node: Node, key: str = "value") -> np.ndarray:
    """The tensor of an attribute; float64 becomes float32 nowhere, halves become float32.

    Raises: FormatError, when it is damaged, or holds texts.
    """
    value = node.attributes.get(key)
    if value is None or not value.has(8):
        raise node.fail("has no value")
    message = value.message(8)
    number, shape = message.whole(1), shape_of(message.message(2)) if message.has(2) else []
    name = dtype_name(number)
    if name is None or shape is None or -1 in shape:
        raise node.fail(f"holds a tensor of dtype {number} and shape {shape}, which is not read")
    count = math.prod(shape)
    raw = np.dtype("<u2") if number == BFLOAT16 else np.dtype(name).newbyteorder("<")
    if message.has(4):
        content = message.bytes(4)
        if len(content) != count * raw.itemsize:
            raise node.fail(f"holds {len(content):,} bytes for a tensor of shape {tuple(shape)} and dtype {name}")
        flat = np.frombuffer(content, raw)
    else:
        flat = _listed(message, number, name, raw)
        if len(flat) > count or (len(flat) == 0 and count):
            if len(flat) or count > MAX_MADE:
                raise node.fail(f"holds {len(flat):,} numbers for a tensor of shape {tuple(shape)}")
            flat = np.zeros(count, raw)
        elif len(flat) < count:  # the last one counts for all that are left out
            if count > MAX_MADE:
                raise node.fail(f"repeats one number {count:,} times, which is refused")
            flat = np.concatenate([flat, np.full(count - len(flat), flat[-1])])
    if number == BFLOAT16:
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.astype(name if name != "float16" else "float32", copy=False).reshape(shape)


def _listed(message: Message, number: int, name: str, raw: np.dtype) -> np.ndarray:
    """Numbers written one by one."""
    if name == "float32" and number != BFLOAT16:
        return message.floats(5, "<f4")
    if name == "float64":
        return message.floats(6, "<f8")
    if number in (BFLOAT16, 19):
        bits = np.array(message.wholes(13), np.int64).astype("<u2")
        return bits.view(raw)
    field_number = {"int64": 10, "bool": 11, "uint32": 16, "uint64": 17}.get(name, 7)
    with np.errstate(over="ignore"):
        return np.array(message.wholes(field_number), np.int64).astype(raw)
