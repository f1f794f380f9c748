"""TensorFlow's graphs in: frozen `.pb` files and SavedModel folders of TensorFlow 1 and 2, as ordinary torch graphs.

`read` is the door. `graphdef` reads the messages, `variables` a SavedModel's numbers, `run` follows the nodes that the
outputs need, `ops` makes torch of each. Nothing of TensorFlow is needed, and nothing that a file brings is run: an
operation that is not known is refused by name and node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, FormatError, did_you_mean

if TYPE_CHECKING:
    from kindling.formats.models import Imported, Peek
    from kindling.formats.tensorflow.graphdef import Graph, Node
    from kindling.formats.tensorflow.run import Known, Runner
    from kindling.formats.tensorflow.variables import Variables
    from kindling.formats.wire import Message

__all__ = ["NAME", "matches", "read"]

NAME = "TensorFlow"
SAVED = "saved_model.pb"
_MAX_BYTES = 4 << 30


def matches(peek: Peek) -> bool:
    """Whether this is the folder of a SavedModel, or a GraphDef: a message whose first field is a node.

    >>> from kindling.formats.models import Peek
    >>> matches(Peek(path=Path("x.pb"), head=b"\\x0a\\x17\\x0a\\x01x\\x12\\x0bPlaceholder"))
    True
    """
    if SAVED in peek.members or peek.path.name == SAVED:
        return True
    head = peek.head
    at = 1
    if head[:1] != b"\x0a":
        return False
    while at < len(head) and head[at] & 0x80:
        at += 1
    inside = head[at + 1 :]
    if inside[:1] != b"\x0a" or len(inside) < 2:
        return False
    size = inside[1]
    rest = inside[2 + size :]
    return size < 128 and rest[:1] == b"\x12" and inside[2 : 2 + size].isascii() and rest[2:3].isalpha()


def read(
    path: Path,
    *,
    inputs: Sequence[str] | None = None,
    outputs: str | Sequence[str] | None = None,
    signature: str = "serving_default",
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, float] | None = None,
    labels: Sequence[str] | None = None,
    scale: float | None = None,
    image: Mapping[str, Any] | None = None,
    keep_activation: bool = False,
    max_parameters: int = 2**29,
) -> Imported:
    """A graph of TensorFlow as an ordinary torch graph.

    Pictures go in channels first, as in all nets here, other rows in TensorFlow's order; outputs are in its order. A
    last softmax is left to prediction, as kindling's models give scores: the labels are then the numbers of the
    classes, unless `labels` names them.

    Args:
        path: a frozen `.pb`, or the folder of a SavedModel.
        inputs: nodes that the net is given, where they are not the placeholders.
        outputs: nodes that the net gives; for a frozen graph those that nothing uses, for a SavedModel its signature's.
        signature: which signature of a SavedModel.
        input_shape: one row's shape without the batch axis, in TensorFlow's order, where the graph leaves it open; a
            mapping by node where there are several inputs.
        constants: numbers for placeholders of one number, such as `{"keep_prob": 1.0}`.
        labels, scale, image, keep_activation: as for Keras: names of the classes; the factor on pixels 0..255 and other
            fields of the `ImageStep`, with which a net of pictures takes photos; whether the last softmax stays.
        max_parameters: most weights that are drawn for variables without numbers.
    Raises: FormatError, for a damaged or hostile file, an operation that is not known (naming it and its node), and an
        input shape or outputs that are needed.
    """
    from kindling.formats.channels import Flow
    from kindling.formats.ends import imported
    from kindling.formats.tensorflow.run import Scope

    folder = path if path.is_dir() else path.parent if path.name == SAVED else None
    file = path if folder is None else folder / SAVED
    about: dict[str, Any] = {}
    wanted: dict[str, str] = {}
    names: dict[str, str] = {}
    variables = None
    if folder is None:
        graph = _graph(_message(file))
    else:
        graph, wanted, names, variables, about = _saved(_message(file), folder, signature)
    if outputs is not None:
        wanted = {name: name for name in ([outputs] if isinstance(outputs, str) else outputs)}
    if not wanted:
        wanted = {name: name for name in _ends(graph, str(path))}
    for name in (*wanted.values(), *(inputs or ())):
        if name.partition(":")[0] not in graph.nodes:
            raise FormatError(f"{path}: there is no node {name[:120]!r}.{did_you_mean(name[:120], graph.nodes)}")
    net = _Net(graph, str(path), variables, names, input_shape, dict(constants or {}), scale, image, max_parameters)
    scope = Scope(graph.nodes)
    net.scope = scope
    for name in inputs or ():
        scope.values[name] = [net.feed(graph.nodes[name])]
    values = net.runner.outputs(scope, list(wanted.values()))
    flows = {}
    for (name, node), value in zip(wanted.items(), values, strict=True):
        if not isinstance(value, Flow):
            raise FormatError(f"{path}: output {node[:120]!r} does not depend on an input.")
        flows[name] = value
    return imported(
        path,
        net.runner.mover,
        flows,
        net.steps,
        labels=labels,
        keep_activation=keep_activation,
        binary=False,
        system=NAME,
        about=about,
        digest=file,
    )


def _message(file: Path) -> Message:
    from kindling.formats.files import mapped
    from kindling.formats.wire import Budget, Message

    if not file.is_file():
        raise FormatError(f"there is no file {file}.")
    if file.stat().st_size > _MAX_BYTES:
        raise FormatError(f"{file} is too large for a graph of TensorFlow.")
    return Message(mapped(file), Budget(str(file)))


def _graph(message: Message) -> Graph:
    from kindling.formats.tensorflow.graphdef import read_graph

    graph = read_graph(message)
    if not graph.nodes:
        raise FormatError(f"{message.what} holds no graph of TensorFlow.")
    return graph


def _saved(
    message: Message, folder: Path, signature: str
) -> tuple[Graph, dict[str, str], dict[str, str], Variables, dict[str, Any]]:
    """Graph, outputs by key, inputs' keys by node, variables, and what else is said, of a SavedModel."""
    from kindling.formats.tensorflow.variables import Variables

    metas = message.messages(2)
    meta = next((one for one in metas if "serve" in one.message(1).texts(4)), metas[0] if metas else None)
    if meta is None:
        raise FormatError(f"{message.what} holds no graph of TensorFlow.")
    graph = _graph(meta.message(2))
    found = {entry.text(1): entry.message(2) for entry in meta.messages(5)}
    if signature not in found:
        raise FormatError(f"{message.what} has no signature {signature!r}.{did_you_mean(signature, found)}")
    chosen = found[signature]
    ins = {entry.message(2).text(1).partition(":")[0]: entry.text(1) for entry in chosen.messages(1)}
    outs = {entry.text(1): entry.message(2).text(1) for entry in chosen.messages(2)}
    variables = Variables(folder / "variables" / "variables")
    variables.keys = restored_from(graph, meta.message(3).text(3))
    about = {"signature": signature, "tensorflow_version": meta.message(1).text(5)[:40]}
    return graph, dict(sorted(outs.items())), ins, variables, about


def restored_from(graph: Graph, restore: str) -> dict[str, str]:
    """Which name in the bundle each variable is restored from, by the graph's own restoring function."""
    from kindling.formats.tensorflow.run import split_name

    call = graph.nodes.get(restore)
    function = graph.functions.get(call.function("f")) if call is not None else None
    if call is None or function is None or len(function.inputs) != len(call.inputs):
        return {}
    given = dict(zip(function.inputs, call.inputs, strict=True))
    found = {}
    for node in function.nodes.values():
        if node.op != "AssignVariableOp" or len(node.inputs) != 2:
            continue
        target, (source, place) = split_name(node.inputs[0])[0], split_name(node.inputs[1])
        for _ in range(4):
            inner = function.nodes.get(source)
            if inner is None or inner.op != "Identity" or not inner.inputs:
                break
            source, place = split_name(inner.inputs[0])
        restoring = function.nodes.get(source)
        if target not in given or restoring is None or restoring.op != "RestoreV2" or len(restoring.inputs) < 2:
            continue
        names = function.nodes.get(split_name(restoring.inputs[1])[0])
        value = names.attributes.get("value") if names is not None else None
        texts = value.message(8).texts(8) if value is not None else []
        if place < len(texts):
            found[split_name(given[target])[0]] = texts[place]
    return found


def _ends(graph: Graph, what: str) -> list[str]:
    """Nodes of numbers that nothing uses and that depend on a placeholder."""
    from kindling.formats.tensorflow.run import split_name

    used = {split_name(source)[0] for node in graph.nodes.values() for source in node.inputs}
    fed = {name for name, node in graph.nodes.items() if node.op == "Placeholder"}
    users: dict[str, list[str]] = {}
    for node in graph.nodes.values():
        for source in node.inputs:
            users.setdefault(split_name(source)[0], []).append(node.name)
    waiting = list(fed)
    while waiting:
        for name in users.get(waiting.pop(), ()):
            if name not in fed:
                fed.add(name)
                waiting.append(name)
    none = ("NoOp", "Assert", "Placeholder", "Const", "SaveV2", "Assign", "ScalarSummary", "MergeSummary")
    found = [name for name in fed if name not in used and graph.nodes[name].op not in none]
    order = [name for name in graph.nodes if name in set(found)]
    if len(order) != 1:
        seen = ", ".join(repr(name[:80]) for name in order[:8]) or "none"
        raise FormatError(f"{what} has {len(order)} nodes that nothing uses ({seen}). Name the net's with outputs=.")
    return order


class _Net:
    """What the runner asks for: inputs, and variables' numbers."""

    def __init__(
        self,
        graph: Graph,
        what: str,
        variables: Variables | None,
        names: Mapping[str, str],
        input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None,
        constants: dict[str, float],
        scale: float | None,
        image: Mapping[str, Any] | None,
        most: int,
    ) -> None:
        from kindling.formats.assemble import Assembly
        from kindling.formats.channels import Mover
        from kindling.formats.tensorflow.run import Runner, Scope

        self.graph, self.what, self.variables, self.names = graph, what, variables, names
        self.input_shape, self.constants, self.scale, self.image = input_shape, constants, scale, image
        self.steps: list[Any] = []
        self.scope = Scope(graph.nodes)
        self.runner: Runner = Runner(Mover(Assembly(what)), graph, self.feed, self.variable, what, most)
        self._known: dict[str, Known] = {}
        self._asked: set[str] = set()

    def feed(self, node: Node) -> Any:
        import numpy as np

        from kindling.formats.ends import open_input
        from kindling.formats.tensorflow.graphdef import dtype_name
        from kindling.formats.tensorflow.run import Known

        if node.name in self.constants:
            return Known(np.array(self.constants[node.name], np.float32))
        dtype = dtype_name(node.dtype("dtype") or node.dtype("T"))
        if dtype == "bool":
            return Known(np.array(False))  # a switch between training and inference
        if dtype is None:
            raise node.fail("takes texts or records, which are not read. Name what comes behind it with inputs=")
        key = self.names.get(node.name, node.name)
        asked = self.input_shape
        if isinstance(asked, Mapping):
            asked = asked.get(key, asked.get(node.name))
        elif asked is not None and self.steps:
            raise ConfigError("input_shape", list(asked), "does not say of which input", "Give a mapping by node")
        shape = node.shape("shape")
        if shape is None and "_output_shapes" in node.attributes:
            listed = node.attributes["_output_shapes"].message(1).messages(7)
            from kindling.formats.tensorflow.graphdef import shape_of

            shape = shape_of(listed[0]) if listed else None
        row = None if not shape else list(shape[1:])
        if shape and shape[0] > 0:
            self.runner.batches.add(shape[0])
        if asked is not None:
            row = [int(size) for size in asked]
        if row is None or any(size < 1 for size in row):
            seen = "of unknown shape" if not shape else f"of shape {shape}"
            raise node.fail(
                f"is an input {seen}: give input_shape= (one row, without the batch axis), or constants= "
                "for a single number"
            )
        if len(row) > 8 or any(size >= 2**31 for size in row):
            raise node.fail(f"takes rows of shape {row[:8]}")
        flow, step = open_input(
            self.runner.mover,
            key,
            row,
            whole=dtype.startswith(("int", "uint")) and dtype != "uint8",
            channels_last=True,
            scale=self.scale,
            image=self.image,
        )
        self.steps.append(step)
        return flow

    def variable(self, node: Node) -> Known:
        from kindling.formats.tensorflow.run import Known

        name = node.name
        if name in self._known:
            return self._known[name]
        if self.variables is not None:
            shared = node.text("shared_name", "") or name
            known = (self.variables.keys.get(name, ""), shared, name)
            key = next((key for key in known if key in self.variables), None)
            if key is None:
                raise node.fail("is a variable that the bundle of variables does not have")
            self._known[name] = Known(self.variables.read(key), shared, True)
            return self._known[name]
        assigns = [
            one
            for one in self.graph.nodes.values()
            if one.op in ("Assign", "AssignVariableOp") and len(one.inputs) == 2 and one.inputs[0] == name
        ]
        if not assigns or name in self._asked:
            raise node.fail("is a variable without numbers: freeze the graph, or load the SavedModel")
        self._asked.add(name)
        value = self.runner.outputs(self.scope, [assigns[0].inputs[1]])[0]
        if not isinstance(value, Known):
            raise node.fail("begins with numbers that depend on the input")
        self._known[name] = Known(value.value, name, True)
        return self._known[name]
