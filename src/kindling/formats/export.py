"""Models out: ONNX, `.pt2`, safetensors, or a folder that runs with torch alone; checked before anything is kept.

The file's ending decides. ONNX and `.pt2` take the preparation along as far as a graph can say it: of photos the input
is uint8 pixels, height x width x channels, decoded and resized; normalising is part of the graph. What stays outside
is written beside it as JSON, and `kindling.load` finds it there again. Files are made on this machine, compared with
the model on random rows, and only then put where they belong.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from kindling.errors import ConfigError, MissingExtraError, ModelError
from kindling.formats.inputs import METADATA
from kindling.prepare import ArrayStep, ImageStep, Step
from kindling.prepare.columns import ScaledArrayStep
from kindling.storage import Place, open_place

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from kindling.model import Model

OPSET = 18
"""Version of ONNX's operators that is written: the oldest that torch's exporter writes by itself."""
TOLERANCE = 1e-4
"""Largest difference to the model, of its largest output, that a file may show."""
CHECKED_ROWS = (2, 5)
_SYMBOL_ROWS = 2


def export(
    model: Model,
    path: str | Path,
    *,
    preparation: bool = True,
    overwrite: bool = False,
    spark: SparkSession | None = None,
) -> None:
    """Write a model for others.

    Args:
        path: ends in `.onnx`, `.pt2` or `.safetensors`; anything else is a folder to make, with `model.pt2` and a short
            script that needs torch alone. On any file system that `storage.open_place` knows.
        preparation: take it into the graph, as far as it goes.
        overwrite: replace what is there.
        spark: the session whose file systems may be used; the active one if None.
    Raises: ConfigError, when something is there already; ModelError, when the model cannot be written so, or the file
        does not give the model's numbers; StorageError; MissingExtraError.
    """
    text = str(path)
    folder, _, name = text.rstrip("/").rpartition("/")
    kind = Path(name).suffix
    if kind not in _WRITERS:
        _folder(model, open_place(text, spark), preparation, overwrite)
        return
    place = open_place(folder or ("/" if text.startswith("/") else "."), spark)
    if place.exists(name) and not overwrite:
        raise ConfigError("path", text, "is there already", "Give overwrite=True, or another path")
    with tempfile.TemporaryDirectory(prefix="kindling-") as here:
        file = Path(here) / name
        _WRITERS[kind](model, file, preparation)
        place.makedirs()
        # The file itself comes last: what it names in its neighbours is there by then.
        for part in sorted(Path(here).iterdir(), key=lambda part: part == file):
            place.upload(part, part.name)


# -------------------------------------------------------------------------------------------------- preparation in


def described(model: Model, inside: bool) -> dict[str, Any]:
    """What the graph itself does not say: the steps that are left to do for each input, and the labels."""
    steps = {step.name: step for step in model.preparation.inputs}
    ordered = [steps[name] for name in model.signature.inputs]
    return {
        "format": 1,
        "inputs": [(_left(step) if inside else step).to_json() for step in ordered],
        "outputs": list(model.signature.outputs),
        "labels": None if model.labels is None else list(model.labels),
    }


def _left(step: Step) -> Step:
    """The part of a step that comes before the graph, where the graph does the rest."""
    if isinstance(step, ImageStep):
        import dataclasses

        return dataclasses.replace(step, scale=1.0, mean=(0.0,), std=(1.0,))
    if isinstance(step, ScaledArrayStep):
        return ArrayStep(step.name, step.column, step.shape, step.dtype)
    return step


class Normalise(nn.Module):
    """uint8 pixels (N, H, W, C) -> what the net takes: `(pixel * scale - mean) / std`, channels first."""

    factor: Tensor
    offset: Tensor

    def __init__(self, step: ImageStep) -> None:
        super().__init__()
        channels = step.shape[2]
        std = torch.tensor(step.std, dtype=torch.float64).expand(channels)
        mean = torch.tensor(step.mean, dtype=torch.float64).expand(channels)
        self.register_buffer("factor", (step.scale / std).float().reshape(-1, 1, 1))
        self.register_buffer("offset", (mean / std).float().reshape(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() * self.factor - self.offset


class Rescale(nn.Module):
    """Numbers as a ScaledArrayStep leaves them."""

    subtract: Tensor
    multiply: Tensor

    def __init__(self, step: ScaledArrayStep) -> None:
        super().__init__()
        for name in ("subtract", "multiply"):
            self.register_buffer(name, torch.from_numpy(step._spread(getattr(step, name))).float())
        self.add = step.add

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.subtract) * self.multiply + self.add


def whole(model: Model, inside: bool) -> tuple[fx.GraphModule, list[Callable[[int, torch.Generator], Tensor]]]:
    """The net behind the part of the preparation that a graph can hold, in inference mode, and makers of its inputs."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("net", model.module)
    steps = {step.name: step for step in model.preparation.inputs}
    makers: list[Callable[[int, torch.Generator], Tensor]] = []
    nodes = []
    for place, (name, spec) in enumerate(model.signature.inputs.items()):
        node = graph.placeholder(f"input_{place}")
        step = steps.get(name)
        row = tuple(size if isinstance(size, int) else 64 for size in spec.shape[1:])
        dtype = getattr(torch, spec.dtype)
        if inside and isinstance(step, ImageStep):
            root.add_module(f"prepare_{place}", Normalise(step))
            node, row, dtype = graph.call_module(f"prepare_{place}", (node,)), step.shape, torch.uint8
        elif inside and isinstance(step, ScaledArrayStep):
            root.add_module(f"prepare_{place}", Rescale(step))
            node = graph.call_module(f"prepare_{place}", (node,))
        nodes.append(node)
        makers.append(_maker(row, dtype))
    graph.output(graph.call_module("net", tuple(nodes)))
    return fx.GraphModule(root, graph).eval(), makers


def _maker(row: tuple[int, ...], dtype: torch.dtype) -> Callable[[int, torch.Generator], Tensor]:
    def make(rows: int, generator: torch.Generator) -> Tensor:
        if dtype.is_floating_point:
            return torch.rand((rows, *row), generator=generator).to(dtype)
        high = 256 if dtype == torch.uint8 else 2
        return torch.randint(0, high, (rows, *row), generator=generator).to(dtype)

    return make


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters tell much that is of use to their developers only."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    training = torch.is_grad_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_grad_enabled(training)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare(
    what: str,
    model: Model,
    module: nn.Module,
    makers: Sequence[Callable[[int, torch.Generator], Tensor]],
    other: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    """Both on random rows.

    Raises: ModelError, when they differ.
    """
    generator = torch.Generator().manual_seed(0)
    for rows in CHECKED_ROWS:
        batch = [make(rows, generator) for make in makers]
        with torch.no_grad():
            named = dict(zip(model.signature.inputs, batch, strict=True))
            wanted = list(model.signature.call(module, named).values())
        try:
            got = other(batch)
        except Exception as error:  # whatever the other side raises, the file is of no use
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"the {what} that was written does not run on {rows} rows: {line}") from error
        for name, ours, theirs in zip(model.signature.outputs, wanted, got, strict=True):
            largest = float(ours.double().abs().max()) if ours.numel() else 0.0
            same = tuple(theirs.shape) == tuple(ours.shape)
            gap = float((theirs.double() - ours.double()).abs().max()) if same and ours.numel() else 0.0
            if not same or not gap <= TOLERANCE * max(largest, 1e-6):
                raise ModelError(
                    f"the {what} that was written gives other numbers than the model: output {name!r} differs by "
                    f"{gap:.3g}, its largest number is {largest:.3g}. Nothing was kept."
                )


def _program(model: Model, inside: bool) -> tuple[Any, fx.GraphModule, list[Any]]:
    """torch.export's program of the net for any number of rows."""
    module, makers = whole(model, inside)
    generator = torch.Generator().manual_seed(0)
    batch = tuple(make(_SYMBOL_ROWS + 1, generator) for make in makers)
    rows = torch.export.Dim("N", min=1, max=1 << 20)
    with _quiet():
        try:
            program = torch.export.export(module, batch, dynamic_shapes=tuple({0: rows} for _ in batch))
        except Exception as error:  # torch.export raises what it likes
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{model.name!r} cannot be written as a graph for any number of rows: {line}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    return program, module, list(makers)


# -------------------------------------------------------------------------------------------------------- writers


def _onnx(model: Model, file: Path, inside: bool) -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("Writing ONNX", error.name or "onnx", "onnx") from None
    program, module, makers = _program(model, inside)
    names = list(model.signature.inputs)
    large = sum(tensor.nbytes for tensor in module.state_dict().values()) > 1 << 30
    outputs = [name if name not in names else f"{name}_out" for name in model.signature.outputs]
    with _quiet():
        try:
            written = torch.onnx.export(
                program,
                (),
                None,
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert written is not None
            written.save(str(file), external_data=large)
        except Exception as error:  # the exporter raises what it likes
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{model.name!r} cannot be written as ONNX: {line}") from error
    saved = onnx.load(str(file), load_external_data=False)
    entry = saved.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(described(model, inside), ensure_ascii=False)
    for node in saved.graph.node:
        del node.metadata_props[:]  # paths of this machine are nobody's business
        node.doc_string = ""
    saved.graph.name = model.name
    file.write_bytes(saved.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    takes = {argument.name for argument in session.get_inputs()}

    def run(batch: list[Tensor]) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(names, batch, strict=True) if name in takes}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    _compare("ONNX file", model, module, makers, run)


def _pt2(model: Model, file: Path, inside: bool) -> None:
    program, module, makers = _program(model, inside)
    with _quiet():
        try:
            extra = {f"{METADATA}.json": json.dumps(described(model, inside), ensure_ascii=False)}
            torch.export.save(program, file, extra_files=extra)
            loaded = torch.export.load(file).module()
        except Exception as error:  # torch.export raises what it likes
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{model.name!r} cannot be written as .pt2: {line}") from error

    def run(batch: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = loaded(*batch)
        if isinstance(found, Mapping):
            return [found[name] for name in model.signature.outputs]
        return list(found) if isinstance(found, tuple | list) else [found]

    _compare(".pt2 file", model, module, makers, run)


def _safetensors(model: Model, file: Path, _inside: bool) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.module.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()  # tied weights are written under each of their names
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    if not tensors:
        raise ModelError(f"{model.name!r} has no weights to write.")
    save_file(tensors, file, metadata={"format": "pt"})


_WRITERS: Mapping[str, Callable[[Model, Path, bool], None]] = {
    ".onnx": _onnx,
    ".pt2": _pt2,
    ".safetensors": _safetensors,
}


def endings() -> list[str]:
    """What a file to export to may end in.

    >>> endings()
    ['.onnx', '.pt2', '.safetensors']
    """
    return list(_WRITERS)


# --------------------------------------------------------------------------------------------------- stand-alone

_SCRIPT = '''"""Runs this folder's model with torch alone (and Pillow, for photos).

    python predict.py photo.jpg ...      each photo's best classes
    python predict.py rows.pt            a tensor, or a list of them, that torch.save wrote; prints the outputs
"""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "model.json").read_text(encoding="utf-8"))


def pixels(path, step):
    """A photo as the graph takes it: uint8, height x width x channels."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if step["channels"] == "L" else "RGB")
    tall, wide = step["size"]
    how = getattr(Image.Resampling, step["interpolation"].upper())
    if step["resize"] == "squash":
        image = image.resize((wide, tall), how)
    elif step["resize"] == "shorter":
        if step["resize_to"] is None:
            scale = max(tall / image.height, wide / image.width)
        else:
            scale = step["resize_to"] / min(image.height, image.width)
        size = (max(wide, round(image.width * scale)), max(tall, round(image.height * scale)))
        image = image.resize(size, how)
        left, top = (image.width - wide) // 2, (image.height - tall) // 2
        image = image.crop((left, top, left + wide, top + tall))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(tall, wide, -1)
    return data.flip(-1) if step["channels"] == "BGR" else data


def main(paths):
    net = torch.export.load(HERE / "model.pt2").module()
    step = ABOUT["inputs"][0]
    labels = ABOUT["labels"]
    for path in paths:
        if path.endswith(".pt"):
            rows = torch.load(path, weights_only=True)
            batch = list(rows) if isinstance(rows, (list, tuple)) else [rows]
        else:
            batch = [pixels(path, step).unsqueeze(0)]
        with torch.no_grad():
            out = net(*batch)
        if labels is None or path.endswith(".pt"):
            print(path, out)
            continue
        scores = (out[0] if isinstance(out, (list, tuple)) else out)[0].softmax(-1)
        best = scores.topk(min(5, len(labels)))
        print(path, ", ".join(f"{labels[int(k)]} {float(p):.3f}" for p, k in zip(best.values, best.indices)))


if __name__ == "__main__":
    main(sys.argv[1:])
'''


def _folder(model: Model, place: Place, inside: bool, overwrite: bool) -> None:
    """A folder with the graph, what is said about it, and a script."""
    if (place.exists("model.pt2") or place.exists("kindling.json")) and not overwrite:
        raise ConfigError("path", place.path, "holds a model already", "Give overwrite=True, or another path")
    if place.exists("kindling.json"):
        raise ConfigError("path", place.path, "is a bundle, not a stand-alone folder", "Name another")
    with tempfile.TemporaryDirectory(prefix="kindling-") as here:
        file = Path(here) / "model.pt2"
        _pt2(model, file, inside)
        place.makedirs()
        place.write("model.json", json.dumps(described(model, inside), indent=1, ensure_ascii=False).encode())
        place.write("predict.py", _SCRIPT.encode())
        place.upload(file, "model.pt2")


__all__ = ["described", "endings", "export", "whole"]
