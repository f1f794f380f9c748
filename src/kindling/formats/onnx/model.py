"""A Model of an ONNX graph: its rows, its preparation, its labels; batches of one size opened up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.files import file_digest
from kindling.formats.inputs import METADATA, Input, Said, prepared, said, tensor_spec
from kindling.formats.models import Imported
from kindling.formats.onnx import proto as files
from kindling.formats.onnx.convert import UNSURE
from kindling.formats.onnx.open import OnnxNet, by_runtime, open_net
from kindling.nets.layers_onnx import MAX_TRIPS, OnnxOp
from kindling.nets.onnx_ops.registry import DTYPES, LIMIT
from kindling.prepare import LabelStep, Preparation
from kindling.signature import Signature, TensorSpec

ROWS = (2, 3, 7919)
"""Made-up numbers of rows."""
_TRIAL_TRIPS = 10_000
_TRIAL_NUMBERS = 2**28
_KINDS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def read_model(
    path: Path,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None,
    image: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
    engine: str,
) -> Imported:
    """See `kindling.formats.onnx.read`."""
    model = files.open_file(path)
    what = str(path)
    inputs = _inputs(model, what, input_shape)
    net, specs = _with_rows(model, path.parent, what, inputs, engine)
    own = _said(model, what)
    assert isinstance(net.module, fx.GraphModule)
    module, steps = prepared(net.module, inputs, image, own.steps, what)
    names = tuple(labels) if labels is not None else own.labels
    source = {
        "format": "ONNX",
        "file": path.name,
        "sha256": file_digest(path),
        "opset": files.opsets(model.opset_import),
        "engine": net.engine,
        **({"reason": net.reason} if net.reason else {}),
    }
    return Imported(
        module=module,
        signature=Signature({step.name: tensor_spec(step) for step in steps}, specs),
        preparation=Preparation(tuple(steps), () if names is None else (LabelStep("target", "label", names),)),
        labels=names,
        name=str(model.graph.name or path.stem)[:200],
        source=source,
    )


# --------------------------------------------------------------------------------------------------------- inputs


def _inputs(model: Any, what: str, given: Sequence[int] | Mapping[str, Sequence[int]] | None) -> list[Input]:
    weights = {weight.name for weight in model.graph.initializer}
    found = []
    infos = [info for info in model.graph.input if info.name not in weights]
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {info.name for info in infos})
        if unknown:
            raise ConfigError("input_shape", unknown, "names no input", f"There are {[info.name for info in infos]}")
    for info in infos:
        said = files.declared(info)
        if said is None or said[0] not in DTYPES or str(DTYPES[said[0]]).removeprefix("torch.") not in _KINDS:
            raise FormatError(
                f"{what}: input {info.name!r} is no tensor of numbers, and a Model's inputs are. "
                "kindling.formats.onnx.open_net runs such graphs."
            )
        kind, sizes = said
        row = given.get(info.name) if isinstance(given, Mapping) else given
        if row is None:
            row = _stated_row(info.name, sizes, what)
        elif any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in row):
            raise ConfigError("input_shape", row, "is no shape of a row", "Give sizes of 1 or more, without the batch")
        elif sizes is not None and len(sizes) != len(row) + 1:
            raise ConfigError(
                "input_shape", row, f"does not fit input {info.name!r}, whose rows have {len(sizes) - 1} axes", "See it"
            )
        first = sizes[0] if sizes else None
        fixed = first if isinstance(first, int) and first > 0 else 0
        found.append(Input(name=info.name, row=tuple(row), dtype=DTYPES[kind], fixed=fixed))
    if not found:
        raise FormatError(f"{what} has no input, and gives the same in every run.")
    if len({one.fixed for one in found}) > 1:
        raise FormatError(
            f"{what}: the first axes of its inputs are {[one.fixed or 'open' for one in found]}, not one batch. "
            "kindling.formats.onnx.open_net runs such graphs."
        )
    return found


def _stated_row(name: str, sizes: Sequence[int | str | None] | None, what: str) -> tuple[int, ...]:
    if sizes is not None and len(sizes) == 0:
        raise FormatError(
            f"{what}: input {name!r} is one number for all rows. kindling.formats.onnx.open_net runs such graphs."
        )
    row = [size for size in (sizes or ())[1:] if isinstance(size, int) and size > 0]
    if sizes is None or len(row) != len(sizes) - 1:
        shown = "nothing" if sizes is None else ", ".join(str(size or "?") for size in sizes)
        raise FormatError(
            f"{what} does not say what shape a row of input {name!r} has ({shown}). "
            f"Give input_shape=(3, 224, 224), say, or input_shape={{{name!r}: ...}}."
        )
    return tuple(row)


def _said(model: Any, what: str) -> Said:
    return said(next((entry.value for entry in model.metadata_props if entry.key == METADATA), None), what)


# ------------------------------------------------------------------------------------------------ rows in and out


def _with_rows(
    model: Any, folder: Path, what: str, inputs: Sequence[Input], engine: str
) -> tuple[OnnxNet, dict[str, TensorSpec]]:
    """The graph for any number of rows, and what it gives for each.

    Raises: FormatError, when it does not give one entry for each row.
    """
    fixed = inputs[0].fixed
    sizes = [{one.name: [rows, *one.row] for one in inputs} for rows in ROWS]
    try:
        net = open_file_net(model, folder, what, sizes, engine, fixed)
        if net.engine == "onnxruntime" and fixed:
            net = by_runtime(model, folder, what, net.reason, fixed)
        narrow = net.engine == "torch" and _widen(net.module, inputs)
        specs = _outputs(net, what, inputs, tried=bool(fixed) or narrow)
        if fixed and net.engine == "torch":
            _agrees(net, model, folder, what, inputs, fixed)
        return net, specs
    except files.Refused:
        raise
    except (FormatError, _Differs) as error:
        if engine == "torch" or (not fixed and isinstance(error, FormatError)):
            raise FormatError(str(error)) from error
        reason = str(error)
    net = by_runtime(model, folder, what, reason, fixed)
    return net, _outputs(net, what, inputs, tried=True)


def open_file_net(
    model: Any, folder: Path, what: str, sizes: Sequence[Mapping[str, Sequence[int]]], engine: str, fixed: int
) -> OnnxNet:
    """As `open_net`, for a graph whose file is open already."""
    return open_net(model, engine=engine, sizes=sizes, fixed_rows=fixed, folder=folder, what=what)


class _Differs(Exception):
    """The graph does not give for a batch what it gives row by row, or not in the precision it is run in."""


def _widen(module: nn.Module, inputs: Sequence[Input]) -> bool:
    """Whether there are floats of another width than 32 bits; they are then made so, as kindling computes in them."""
    kinds = {t.dtype for t in (*module.parameters(), *module.buffers())} | {one.dtype for one in inputs}
    kinds |= {
        DTYPES.get(value, torch.float32)
        for layer in module.modules()
        if isinstance(layer, OnnxOp)
        for name, value in layer.attributes
        if name in ("to", "dtype", "output_dtype") and isinstance(value, int)
    }
    narrow = any(kind.is_floating_point and kind != torch.float32 for kind in kinds)
    if narrow:
        module.float()
    return narrow


@contextmanager
def _trial() -> Iterator[None]:
    """A run at reading time: without gradients, and within bounds that no file can lift."""
    numbers, trips = LIMIT.set(_TRIAL_NUMBERS), MAX_TRIPS.set(_TRIAL_TRIPS)
    try:
        with torch.no_grad():
            yield
    finally:
        LIMIT.reset(numbers)
        MAX_TRIPS.reset(trips)


def _made_up(inputs: Sequence[Input], rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for one in inputs:
        shape = (rows, *one.row)
        if one.dtype.is_floating_point:
            made.append(torch.rand(shape, generator=generator))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(one.dtype))
    return made


def _outputs(net: OnnxNet, what: str, inputs: Sequence[Input], tried: bool) -> dict[str, TensorSpec]:
    """What the graph gives for each row, by name: from the shapes that were followed, else from two small runs."""
    seen: list[tuple[Any, ...]] = net.converted.values if net.converted is not None else []
    if tried or not seen or any(one is UNSURE for values in seen for one in values):
        try:
            with _trial():
                runs = [_as_list(net.module(*_made_up(inputs, rows))) for rows in ROWS[:2]]
        except Exception as error:  # torch raises what it likes; the file is at fault
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise FormatError(f"{what} does not run on rows of {[one.row for one in inputs]}: {line}.") from error
        seen = list(zip(*runs, strict=True))
    specs = {}
    for name, values in zip(net.outputs, seen, strict=True):
        tensors = [one for one in values if isinstance(one, Tensor)]
        if len(tensors) != len(values) or any(
            one.dim() == 0 or one.shape[0] != rows for one, rows in zip(tensors, ROWS, strict=False)
        ):
            shapes = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in values]
            raise FormatError(
                f"{what}: output {name!r} does not give one entry for each row: {shapes[0]} for {ROWS[0]} rows. "
                "kindling.formats.onnx.open_net runs such graphs."
            )
        axes = zip(*(tuple(one.shape[1:]) for one in tensors), strict=True)
        row = [size[0] if len(set(size)) == 1 else f"{name}_{axis}" for axis, size in enumerate(axes, 1)]
        kind = tensors[0].dtype
        kind = torch.float32 if kind.is_floating_point else kind
        specs[name] = TensorSpec(("N", *row), str(kind).removeprefix("torch."))
    return specs


def _as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _agrees(net: OnnxNet, model: Any, folder: Path, what: str, inputs: Sequence[Input], fixed: int) -> None:
    """A batch of one size was opened up: two such batches at once must give what they give one by one.

    Raises: _Differs.
    """
    sizes = [{one.name: [fixed, *one.row] for one in inputs}]
    plain = open_file_net(model, folder, what, sizes, "torch", 0)
    _widen(plain.module, inputs)
    batch = _made_up(inputs, 2 * fixed)
    with _trial():
        whole = _as_list(net.module(*batch))
        halves = [_as_list(plain.module(*(part[k * fixed : (k + 1) * fixed] for part in batch))) for k in (0, 1)]
    for name, got, pair in zip(net.outputs, whole, zip(*halves, strict=True), strict=True):
        wanted = torch.cat(list(pair))
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        if got.shape != wanted.shape or not torch.allclose(
            got.double(), wanted.double(), 1e-4, 1e-5 * max(scale, 1e-3)
        ):
            raise _Differs(f"{what} is made for batches of {fixed}: output {name!r} mixes rows")
