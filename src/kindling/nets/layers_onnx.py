"""Layers of ONNX's graphs: one operator, control flow with its bodies, a whole graph run by onnxruntime.

Every constructor argument is a plain value kept under its name, so that bundles can store the layer. What operators
compute is in `onnx_ops/`; the reader of files is `kindling.formats.onnx`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from kindling import graph
from kindling.errors import FormatError, MissingExtraError, ModelError
from kindling.nets.onnx_ops.registry import NeedsValues, apply, find, whole

Node = tuple[str, int, tuple[tuple[str, Any], ...], tuple[int, ...], tuple[int, ...]]
"""An operator of a body: name, version, attributes, numbers of its inputs (-1: left out) and outputs."""
Body = tuple[tuple[int, ...], tuple[int, ...], tuple[Node, ...]]
"""Numbers of a body's inputs and outputs, and its operators."""

MAX_TRIPS: ContextVar[int] = ContextVar("MAX_TRIPS", default=10_000_000)
"""Rounds of one loop; readers of strangers' files set it lower."""
FLOWS = ("If", "Loop", "Scan", "SequenceMap")


@graph.allow
class OnnxOp(nn.Module):
    """One operator of ONNX.

    Args:
        op: its name, with its domain where that is not ONNX's own.
        opset: version of the operator set.
        attributes: pairs of name and value.
        slots: for each input of the operator, which argument of `forward` it is; -1 if it is left out, -2 - k if it is
            the constant number k.
        constants: small tensors: name of a dtype, shape, numbers.
        outputs: how many results are used; one comes as it is, several as a tuple.
    Raises: FormatError, for an operator that kindling does not have.

    >>> layer = OnnxOp("Reshape", 13, slots=(0, -2), constants=(("int64", (2,), (-1, 2)),))
    >>> layer(torch.arange(4)).tolist()
    [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        op: str,
        opset: int,
        attributes: tuple[tuple[Any, ...], ...] = (),
        slots: tuple[int, ...] = (0,),
        constants: tuple[tuple[Any, ...], ...] = (),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.op, self.opset, self.attributes, self.slots = op, opset, attributes, slots
        self.constants, self.outputs = constants, outputs
        if find(op, opset) is None:
            raise FormatError(f"there is no operator {op!r} of version {opset} here.")
        self._made: list[Tensor] | None = None

    def forward(self, *inputs: Any) -> Any:
        function = find(self.op, self.opset)
        assert function is not None
        if self._made is None:
            self._made = [constant_tensor(*constant) for constant in self.constants]
        given: list[Any] = []
        for slot in self.slots:
            given.append(inputs[slot] if slot >= 0 else None if slot == -1 else self._made[-2 - slot])
        results = apply_beside(function, given, dict(self.attributes), self.outputs)
        return results[0] if self.outputs == 1 else results

    @property
    def kind(self) -> str:
        """What the layer is called in summaries."""
        return f"{self.op} (ONNX)"

    def extra_repr(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.attributes)
        return f"{self.op}-{self.opset}" + (f", {said}" if said else "")


def constant_tensor(dtype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """A small tensor from plain numbers, with memory on every default device.

    >>> constant_tensor("int64", (2,), (1, 2))
    tensor([1, 2])
    """
    kind = graph.dtype_named(dtype)
    return torch.tensor(list(values), dtype=kind, device="cpu").reshape(tuple(shape))


def apply_beside(function: Any, inputs: list[Any], attributes: dict[str, Any], outputs: int) -> tuple[Any, ...]:
    """Call an operator whose inputs may be partly without memory: small real ones join the others if they must.

    Raises: NeedsValues, when the result's shape depends on numbers that are not there.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) < 2:
        return apply(function, inputs, attributes, outputs)
    try:
        return apply(function, inputs, attributes, outputs)
    except NeedsValues:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as first:
        other = next(device for device in devices if device.type != "cpu")
        moved = [value.to(other) if isinstance(value, Tensor) else value for value in inputs]
        try:
            return apply(function, moved, attributes, outputs)
        except NeedsValues:  # that was not the trouble
            raise first from None


@graph.allow
class OnnxFlow(nn.Module):
    """Control flow of ONNX: If, Loop, Scan, SequenceMap, with the bodies that they run.

    Args:
        op: which of them.
        opset: version of the operator set.
        bodies: of this one and of all inside; an attribute such as `then_branch` names one by its place. Numbers of
            values are the same in all bodies: an inner one sees those around it.
        attributes: pairs of name and value.
        slots: for each input, which argument of `forward` it is; -1 if it is left out.
        captures: numbers of the values around that the bodies use; the last arguments of `forward`.
        outputs: how many results are used.
    Raises: FormatError, for operators that kindling does not have.

    >>> body = ((), (1,), (("Neg", 13, (), (0,), (1,)),))
    >>> same = ((), (0,), ())
    >>> flow = OnnxFlow("If", 13, (body, same), (("then_branch", 0), ("else_branch", 1)), (0,), (0,))
    >>> flow(torch.tensor(True), torch.ones(2)).tolist(), flow(torch.tensor(False), torch.ones(2)).tolist()
    ([-1.0, -1.0], [1.0, 1.0])
    """

    def __init__(
        self,
        op: str,
        opset: int,
        bodies: tuple[Any, ...],
        attributes: tuple[tuple[Any, ...], ...] = (),
        slots: tuple[int, ...] = (),
        captures: tuple[int, ...] = (),
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.op, self.opset, self.bodies, self.attributes = op, opset, bodies, attributes
        self.slots, self.captures, self.outputs = slots, captures, outputs
        if op not in FLOWS:
            raise FormatError(f"{op!r} is no control flow.")
        try:
            for _, _, nodes in bodies:
                for name, version, _, _, _ in nodes:
                    if name not in FLOWS and find(name, version) is None:
                        raise FormatError(f"there is no operator {name!r} of version {version} here.")
        except (TypeError, ValueError) as error:
            raise FormatError(f"the bodies of {op} are not what they should be.") from error

    def forward(self, *inputs: Any) -> Any:
        count = len(inputs) - len(self.captures)
        around = dict(zip(self.captures, inputs[count:], strict=True))
        given = [inputs[slot] if slot >= 0 else None for slot in self.slots]
        results = run_flow(self.op, self.bodies, dict(self.attributes), given, around, self.outputs)
        return results[0] if self.outputs == 1 else tuple(results)

    @property
    def kind(self) -> str:
        """What the layer is called in summaries."""
        return f"{self.op} (ONNX)"

    def extra_repr(self) -> str:
        return f"{self.op}-{self.opset}, {sum(len(body[2]) for body in self.bodies)} operators inside"


def run_body(bodies: Sequence[Body], place: int, inputs: Sequence[Any], around: Mapping[int, Any]) -> list[Any]:
    """The results of one body."""
    takes, gives, nodes = bodies[place]
    values = {**around, **dict(zip(takes, inputs, strict=True))}
    for name, opset, attributes, taken, given in nodes:
        arguments = [None if number == -1 else values[number] for number in taken]
        if name in FLOWS:
            results: Sequence[Any] = run_flow(name, bodies, dict(attributes), arguments, values, len(given))
        else:
            function = find(name, opset)
            assert function is not None
            results = apply_beside(function, arguments, dict(attributes), len(given))
        values.update(zip(given, results, strict=False))
    return [values[number] for number in gives]


def run_flow(
    op: str,
    bodies: Sequence[Body],
    attributes: dict[str, Any],
    inputs: Sequence[Any],
    around: Mapping[int, Any],
    outputs: int,
) -> list[Any]:
    """The results of a control flow."""
    if op == "If":
        branch = "then_branch" if _true(inputs[0]) else "else_branch"
        return run_body(bodies, attributes[branch], (), around)
    if op == "Loop":
        return _loop(bodies, attributes["body"], inputs, around, outputs)
    if op == "Scan":
        return _scan(bodies, attributes, inputs, around, outputs)
    parts = [part if isinstance(part, list) else None for part in inputs]
    length = len(inputs[0])
    rounds = []
    for k in range(length):
        given = [value if part is None else part[k] for part, value in zip(parts, inputs, strict=True)]
        rounds.append(run_body(bodies, attributes["body"], given, around))
    return [[one[k] for one in rounds] for k in range(outputs)]


def _true(condition: Tensor) -> bool:
    if condition.device.type == "meta":
        raise NeedsValues("a condition is computed from numbers that are not there")
    return bool(condition.reshape(-1)[0])


def _loop(
    bodies: Sequence[Body], body: int, inputs: Sequence[Any], around: Mapping[int, Any], outputs: int
) -> list[Any]:
    limit = None if inputs[0] is None else whole(inputs[0])
    going = inputs[1] is None or _true(inputs[1])
    state = list(inputs[2:])
    scanned: list[list[Tensor]] = [[] for _ in range(len(bodies[body][1]) - 1 - len(state))]
    trip = 0
    while going and (limit is None or trip < limit):
        if trip >= MAX_TRIPS.get():
            raise ModelError(f"a loop of the graph has not ended after {MAX_TRIPS.get():,} rounds.")
        step = [torch.tensor(trip, device="cpu"), torch.tensor(True, device="cpu"), *state]
        results = run_body(bodies, body, step, around)
        going = _true(results[0])
        state = results[1 : 1 + len(state)]
        for seen, value in zip(scanned, results[1 + len(state) :], strict=True):
            seen.append(value)
        trip += 1
    return [*state, *(torch.stack(seen) if seen else torch.zeros(0, device="cpu") for seen in scanned)][
        : max(outputs, 1)
    ]


def _scan(
    bodies: Sequence[Body], attributes: dict[str, Any], inputs: Sequence[Any], around: Mapping[int, Any], outputs: int
) -> list[Any]:
    """Version 9 on: scans along one axis each. Version 8 has a batch axis in front and lengths as first input."""
    if attributes.pop("batched", 0):
        rows = []
        for row in range(inputs[1].shape[0]):
            length = inputs[0]
            cut = [value[row] for value in inputs[1:]]
            count = attributes["num_scan_inputs"]
            if length is not None:
                cut = [value if k < len(cut) - count else value[: whole(length[row])] for k, value in enumerate(cut)]
            rows.append(_scan(bodies, dict(attributes), cut, around, outputs))
        return [torch.stack([row[k] for row in rows]) for k in range(outputs)]
    body, count = attributes["body"], attributes["num_scan_inputs"]
    states, sequences = list(inputs[: len(inputs) - count]), list(inputs[len(inputs) - count :])
    axes = list(attributes.get("scan_input_axes") or [0] * count)
    turned = list(attributes.get("scan_input_directions") or attributes.get("directions") or [0] * count)
    steps = [
        list((value.flip(axis) if back else value).unbind(axis))
        for value, axis, back in zip(sequences, axes, turned, strict=True)
    ]
    made: list[list[Tensor]] = [[] for _ in range(len(bodies[body][1]) - len(states))]
    for now in zip(*steps, strict=True):
        results = run_body(bodies, body, [*states, *now], around)
        states = results[: len(states)]
        for seen, value in zip(made, results[len(states) :], strict=True):
            seen.append(value)
    out_axes = list(attributes.get("scan_output_axes") or [0] * len(made))
    out_turned = list(attributes.get("scan_output_directions") or [0] * len(made))
    stacked = []
    for seen, axis, back in zip(made, out_axes, out_turned, strict=True):
        seen = seen[::-1] if back else seen
        stacked.append(torch.stack(seen, axis) if seen else torch.zeros(0, device="cpu"))
    return [*states, *stacked]


@graph.allow
class OnnxRuntimeNet(nn.Module):
    """A whole ONNX graph, run by onnxruntime: for inference, on the processor, without gradients.

    Args:
        size: bytes of the graph, which is kept in the buffer `model`.
        inputs, outputs: names, in the order of `forward`'s arguments and results.
        rows: rows of one batch, where the graph takes only batches of one size; 0 where it takes any.
    """

    model: Tensor

    def __init__(self, size: int, inputs: tuple[str, ...], outputs: tuple[str, ...], rows: int = 0) -> None:
        super().__init__()
        self.size, self.inputs, self.outputs, self.rows = size, inputs, outputs, rows
        self.register_buffer("model", torch.zeros(size, dtype=torch.uint8))
        self._session: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxRuntimeNet:
        with torch.device("meta"):
            made = OnnxRuntimeNet(0, self.inputs, self.outputs, self.rows)
        made.size = self.size
        made._buffers["model"] = copy.deepcopy(self.model, memo)
        made.training = self.training
        memo[id(self)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def forward(self, *inputs: Any) -> Any:
        if any(isinstance(value, Tensor) and value.device.type == "meta" for value in (*inputs, self.model)):
            raise NeedsValues("onnxruntime follows no shapes without numbers")
        if self.rows and isinstance(inputs[0], Tensor) and inputs[0].shape[0] != self.rows:
            return self._by_parts(*inputs)
        results = run_session(self.session(), self.inputs, self.outputs, inputs)
        return results[0] if len(results) == 1 else tuple(results)

    def _by_parts(self, *inputs: Tensor) -> Any:
        """A batch of any size in parts of the one size, the last filled up."""
        rows = inputs[0].shape[0]
        parts = []
        for start in range(0, max(rows, 1), self.rows):
            cut = [value[start : start + self.rows] for value in inputs]
            missing = self.rows - cut[0].shape[0]
            if missing:
                cut = [torch.cat((value, value.new_zeros(missing, *value.shape[1:]))) for value in cut]
            parts.append(run_session(self.session(), self.inputs, self.outputs, cut))
        joined = [torch.cat(list(pieces))[:rows] for pieces in zip(*parts, strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)

    def session(self) -> Any:
        """onnxruntime's session, opened when first used.

        Raises: MissingExtraError; FormatError, when onnxruntime does not take the graph.
        """
        if self._session is None:
            self._session = open_session(self.model.numpy().tobytes())
        return self._session

    @property
    def kind(self) -> str:
        """What the layer is called in summaries."""
        return "onnxruntime"

    def extra_repr(self) -> str:
        return f"{self.size:,} bytes, run by onnxruntime"


def open_session(data: bytes) -> Any:
    """A session of onnxruntime over a graph, with one computing thread for each of torch's.

    Raises: MissingExtraError; FormatError, when it does not take the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError.of(
            "Running ONNX graphs that torch has no operators for", "onnxruntime", "onnx"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own for each kind of refusal
        raise FormatError(f"onnxruntime does not take the graph: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What went wrong, in one line of bounded length."""
    return ((str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__).rstrip(".") + "."


_NUMPY = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def run_session(session: Any, names: Sequence[str], outputs: Sequence[str], inputs: Sequence[Any]) -> list[Any]:
    """Run a session on tensors, lists of tensors or numpy arrays (texts); tensors come back where numbers do."""
    wanted = {argument.name: argument.type for argument in session.get_inputs()}
    feeds = {}
    for name, value in zip(names, inputs, strict=False):
        if name not in wanted or value is None:
            continue  # nothing reads it, or it is left out
        feeds[name] = _to_runtime(value, wanted[name])
    if any(name in wanted and name not in feeds and not wanted[name].startswith("optional(") for name in names):
        raise ModelError(f"onnxruntime is given {len(feeds)} of the graph's {len(wanted)} inputs.")
    try:
        found = session.run(list(outputs), feeds)
    except Exception as error:
        raise ModelError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
    return [_from_runtime(value) for value in found]


def _to_runtime(value: Any, kind: str) -> Any:
    if isinstance(value, list | tuple):
        return [_to_runtime(part, kind.removeprefix("seq(")) for part in value]
    if not isinstance(value, Tensor):
        import numpy as np

        if not isinstance(value, np.ndarray):  # onnxruntime would take the process down
            raise TypeError(f"onnxruntime is given a {type(value).__name__}, no tensor")
        return value
    kind = kind.removeprefix("optional(").rstrip(")") + ")" if kind.startswith("optional(") else kind
    dtype = _NUMPY.get(kind)
    value = value.detach().cpu()
    value = value.to(dtype) if dtype is not None and value.dtype != dtype else value
    if value.dtype in (torch.bfloat16, *_SMALL):
        import onnxruntime

        raw = value.contiguous().view(torch.uint8 if value.element_size() == 1 else torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _SMALL.get(value.dtype, 16))
    return value.contiguous().numpy()


_SMALL = {
    torch.float8_e4m3fn: 17,
    torch.float8_e4m3fnuz: 18,
    torch.float8_e5m2: 19,
    torch.float8_e5m2fnuz: 20,
}


def _from_runtime(value: Any) -> Any:
    import numpy as np

    if isinstance(value, list):
        return [_from_runtime(part) for part in value]
    if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiubc":
        array = np.asarray(value)
        array = array.view(np.dtype(array.dtype.str))  # numpy has two names for the longest whole numbers
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    return value
