"""PyTorch's exported programs (`.pt2`, written by `torch.export.save`) in, without torch's own loader.

That loader unpickles sample inputs, constants and weights where the archive says so. Here the graph is read from its
JSON, weights are raw bytes, nothing is unpickled and nothing is run: operators are looked up in a closed list, and what
stands in the archive as a pickle is refused, or, where it is not needed, not looked at. TorchScript archives are
refused: `torch.jit.load` runs their own `__setstate__` code while it loads, and their graphs may name any operator.
Source of the layout: `torch/export/pt2_archive` and `torch/_export/serde/schema.py`.
"""

from __future__ import annotations

import builtins
import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from kindling.formats.models import Imported, Peek
    from kindling.formats.zipped import Zipped

NAME = "PyTorch .pt2"
MAX_JSON = 256 << 20
MAX_NODES = 50_000
_DTYPES = (
    "", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "", "complex64", "complex128",
    "bool", "bfloat16",
)  # fmt: skip
"""By the number that a program uses; source: `ScalarType` in the schema."""
_MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 4: "preserve_format"}
_SYMBOLIC: dict[str, Any] = {
    "_operator.add": operator.add,
    "_operator.sub": operator.sub,
    "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv,
    "_operator.neg": operator.neg,
}
_OPERATORS = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}
"""Operators of Python by the names they have as functions."""
_FROM_NOTHING = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")
"""They make tensors where the program's input is, whatever device it was exported on."""
_CHECKS = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_tensor_metadata")


def matches(peek: Peek) -> bool:
    """Whether this looks like an archive of torch.export, or of TorchScript (which is refused by name)."""
    if peek.path.is_dir():
        return {"model.pt2", "model.json"} <= set(peek.members)  # a folder that kindling exported
    return any(name.endswith(("/models/model.json", "/archive_format", "/constants.pkl")) for name in peek.members) or (
        "serialized_exported_program.json" in peek.members
    )


def read(
    path: str | Path,
    *,
    input_shape: Sequence[int] | None = None,
    image: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Imported:
    """An exported program as a torch graph that is trained and cut.

    Args:
        input_shape: shape of one row, where the program leaves it open.
        image: fields of the `ImageStep` to prepare photos with, in place of what the file says.
        labels: names of the classes in the order of the scores.
    Raises: FormatError, for what is damaged, hostile, pickled or not for batches of any size.
    """
    from kindling import surgery
    from kindling.formats.files import file_digest
    from kindling.formats.inputs import METADATA, prepared, said, tensor_spec
    from kindling.formats.models import Imported
    from kindling.formats.zipped import open_zip
    from kindling.prepare import LabelStep, Preparation
    from kindling.signature import Signature, TensorSpec

    file = Path(path)
    file = file / "model.pt2" if file.is_dir() else file
    with open_zip(file) as archive:
        made = _open(file, archive)
        text = _extra(archive, f"{made.root}extra/{METADATA}.json")
        module = made.build()
    own = said(text, str(file))
    inputs = made.inputs(input_shape)
    module, steps = prepared(module, inputs, image, own.steps, str(file))
    outputs = own.outputs if len(own.outputs) == len(made.outputs) else tuple(made.outputs)
    signature = Signature(
        {step.name: tensor_spec(step) for step in steps}, {name: TensorSpec(("N",)) for name in outputs}
    )
    try:
        signature = surgery.infer_output_shapes(module, signature)
    except Exception as error:  # torch raises what it likes; the file is at fault
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise FormatError(f"{file} does not run on rows of {[one.row for one in inputs]}: {line}") from error
    if any(spec.shape[:1] != ("N",) for spec in signature.outputs.values()):
        raise FormatError(f"{file}: an output does not give one entry for each row.")
    known = tuple(labels) if labels is not None else own.labels
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation(tuple(steps), () if known is None else (LabelStep("target", "label", known),)),
        labels=known,
        name=file.stem,
        source={"format": "torch.export", "file": file.name, "sha256": file_digest(file)},
    )


def read_graph(path: str | Path) -> fx.GraphModule:
    """An exported program's graph alone, whatever its inputs are.

    Raises: FormatError, for what is damaged, hostile or pickled.
    """
    from kindling.formats.zipped import open_zip

    with open_zip(Path(path)) as archive:
        return _open(Path(path), archive).build()


def _open(file: Path, archive: Zipped) -> _Program:
    """The program in an archive.

    Raises: FormatError, where there is none that is read.
    """
    names = archive.names()
    if any(name.endswith("/constants.pkl") for name in names):
        raise FormatError(
            f"{file} is a TorchScript archive: loading one runs code of its own, which kindling does not. Where it "
            "was made, save torch.export's program (torch.export.save) or the weights (model.state_dict())."
        )
    root = next((name.removesuffix("models/model.json") for name in names if name.endswith("/models/model.json")), None)
    if root is None:
        raise FormatError(f"{file} is of an older torch.export, which keeps weights as pickles. Save it again.")
    return _Program(file, archive, root, _json(archive, f"{root}models/model.json", MAX_JSON))


def _json(archive: Zipped, name: str, limit: int) -> Any:
    try:
        return json.loads(archive.read(name, limit))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{archive.path}: {name!r} is damaged: {str(error)[:100]}") from error


def _extra(archive: Zipped, name: str) -> str | None:
    if name not in archive:
        return None
    try:
        return archive.read(name, 16 << 20).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{archive.path}: {name!r} is no text.") from error


class _Program:
    """One program, while its graph is made."""

    def __init__(self, file: Path, archive: Zipped, root: str, program: Any) -> None:
        self.file, self.archive, self.root = file, archive, root
        try:
            self.graph = program["graph_module"]["graph"]
            self.signature = program["graph_module"]["signature"]
            self.values = dict(self.graph["tensor_values"])
            self.nodes = list(self.graph["nodes"])
        except (TypeError, KeyError, ValueError) as error:
            raise FormatError(f"{file} holds no program of torch.export ({error}).") from error
        if len(self.nodes) > MAX_NODES:
            raise FormatError(f"{file} has more than {MAX_NODES:,} operators, which are refused.")
        self.user_inputs: list[str] = []
        self.outputs: list[str] = []

    def build(self) -> fx.GraphModule:
        """The graph, with its weights.

        Raises: FormatError.
        """
        try:
            return self._build()
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise FormatError(f"{self.file} is damaged: {type(error).__name__}: {line}") from error

    def _build(self) -> fx.GraphModule:
        from torch import fx, nn

        from kindling.formats.assemble import valid_name

        weights = _json(self.archive, f"{self.root}data/weights/model_weights_config.json", MAX_JSON)["config"]
        constants = _json(self.archive, f"{self.root}data/constants/model_constants_config.json", MAX_JSON)["config"]
        module, graph = nn.Module(), fx.Graph()
        self.made: dict[str, Any] = {}
        self.tensors: dict[str, tuple[Tensor, bool]] = {}
        self.used: set[str] = set()
        self.module, self.fx, self.valid = module, graph, valid_name
        for spec in self.signature["input_specs"]:
            ((kind, body),) = spec.items()
            if kind == "user_input":
                name = body["arg"]["as_tensor"]["name"]
                self.user_inputs.append(name)
                node = graph.placeholder(self._unique(name))
                self.made[name] = node
            elif kind in ("parameter", "buffer", "tensor_constant"):
                path = body["parameter_name" if kind == "parameter" else f"{kind}_name"]
                config = weights.get(path) or constants.get(path)
                if config is None:
                    raise FormatError(f"{self.file} has no numbers for {path!r}.")
                folder = "weights" if path in weights else "constants"
                self.tensors[body["arg"]["name"]] = self._tensor(path, config, folder), kind == "parameter"
            else:
                raise FormatError(f"{self.file} takes an input of kind {kind!r}, which is not read.")
        if not self.user_inputs:
            raise FormatError(f"{self.file} has no input.")
        for node in self.nodes:
            self._node(node)
        results = []
        for spec in self.signature["output_specs"]:
            ((kind, body),) = spec.items()
            if kind == "user_output":
                results.append(self._read(body["arg"]["as_tensor"]["name"]))
                self.outputs.append(f"output_{len(self.outputs)}")
            elif kind != "buffer_mutation":  # counters of batch norm, say: inference does not need them
                raise FormatError(f"{self.file} gives an output of kind {kind!r}, which is not read.")
        if len(self.outputs) == 1:
            self.outputs = ["output"]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        made = fx.GraphModule(module, graph).eval()
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.recompile()
        return made

    # ------------------------------------------------------------------------------------------------- tensors

    def _tensor(self, path: str, config: Any, folder: str) -> Tensor:
        import torch

        meta = config["tensor_meta"]
        if config.get("use_pickle"):
            raise FormatError(f"{self.file} keeps {path!r} as a pickle, which is not opened. Save it again.")
        dtype = self._dtype(meta["dtype"])
        sizes = [int(size["as_int"]) for size in meta["sizes"]]
        strides = [int(stride["as_int"]) for stride in meta["strides"]]
        offset = int(meta["storage_offset"]["as_int"])
        if min([*sizes, *strides, offset, 0]) < 0 or len(sizes) != len(strides) or len(sizes) > 32:
            raise FormatError(f"{self.file}: {path!r} has sizes {sizes[:8]} and strides {strides[:8]}.")
        name = f"{self.root}data/{folder}/{config['path_name']}"
        have = self.archive.size(name) // dtype.itemsize
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
        if (math.prod(sizes) and last > have) or math.prod(sizes) > have:
            raise FormatError(f"{self.file}: {path!r} holds {have:,} numbers, its shape {sizes[:8]} needs more.")
        if not have:
            return torch.zeros(sizes, dtype=dtype)
        flat = self.archive.fill(name, have * dtype.itemsize).view(dtype)
        return flat.as_strided(sizes, strides, offset).contiguous()

    def _dtype(self, code: Any) -> Any:
        import torch

        if not isinstance(code, int) or not 0 < code < len(_DTYPES) or not _DTYPES[code]:
            raise FormatError(f"{self.file} has numbers of type {code!r}, which are not read.")
        return getattr(torch, _DTYPES[code])

    # --------------------------------------------------------------------------------------------------- nodes

    def _unique(self, name: str) -> str:
        plain = self.valid(name)
        plain = f"{plain}_layer" if hasattr(builtins, plain) else plain
        unique, count = plain, 1
        while unique in self.used:
            count += 1
            unique = f"{plain}_{count}"
        self.used.add(unique)
        return unique

    def _read(self, name: str) -> fx.Node:
        """The node of a value; a weight becomes one when it is first read."""
        from torch import nn

        if name in self.made:
            return self.made[name]  # type: ignore[no-any-return]
        if name not in self.tensors:
            raise FormatError(f"{self.file} reads {name!r}, which nothing before it gives.")
        tensor, trained = self.tensors[name]
        unique = self._unique(name)
        if trained and tensor.is_floating_point():
            self.module.register_parameter(unique, nn.Parameter(tensor))
        else:
            self.module.register_buffer(unique, tensor)
        node = self.fx.create_node("get_attr", unique)
        node.name = unique
        self.made[name] = node
        return node

    def _node(self, node: Mapping[str, Any]) -> None:
        from kindling.nets.layers_aten import AtenOp, allowed

        target = str(node["target"])
        outputs = node["outputs"]
        if target in _SYMBOLIC:
            args = [self._symbol(entry["arg"]) for entry in node["inputs"]]
            name = self._unique(node["outputs"][0]["as_sym_int"]["as_name"])
            made = self.fx.create_node("call_function", _SYMBOLIC[target], tuple(args), name=name)
            self.made[outputs[0]["as_sym_int"]["as_name"]] = made
            return
        if not target.startswith("torch.ops.aten."):
            raise FormatError(f"{self.file} calls {target[:80]!r}, which is not on kindling's list.")
        name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
        if name in _CHECKS:
            return
        written = None
        if name.endswith("_") and not name.startswith("_"):
            # In place: everything that reads the tensor afterwards reads the result.
            name = name[:-1]
            written = node["inputs"][0]["arg"]["as_tensor"]["name"]
            if written in self.tensors:
                return  # a counter
        name = _OPERATORS.get(name, name)
        if not allowed(name):
            raise FormatError(f"{self.file} calls operator {target[:80]!r}, which is not on kindling's list.")
        label = self._label(node, name)
        result = self._layer(name, node, label)
        if result is None:
            inputs: list[Any] = []
            positional, named = [], []
            for entry in node["inputs"]:
                argument = self._argument(entry["arg"], inputs)
                if entry.get("kind", 1) == 2:
                    if entry["name"] not in ("device", "layout", "pin_memory"):
                        named.append((str(entry["name"]), argument))
                else:
                    positional.append(argument)
            if name in _FROM_NOTHING:
                inputs.append(self.made[self.user_inputs[0]])
                named.append(("device", ("at", len(inputs) - 1)))
            if name in ("slice", "slice_scatter"):  # "to the end" is written as the largest whole number there is
                positional = [(kind, min(what, 2**53) if kind == "v" and isinstance(what, int) else what)
                              for kind, what in positional]  # fmt: skip
            layer = AtenOp(f"{name}.{overload}", tuple(positional), tuple(named))
            result = self._call(label, layer, inputs)
        self._outputs(outputs, result)
        if written is not None:
            self.made[written] = result

    def _outputs(self, outputs: Sequence[Any], result: fx.Node) -> None:
        if len(outputs) == 1 and "as_tensors" in outputs[0]:
            outputs = [{"as_tensor": part} for part in outputs[0]["as_tensors"]]
            many = True
        else:
            many = len(outputs) > 1
        for place, output in enumerate(outputs):
            ((kind, body),) = output.items()
            if kind == "as_none" or (kind == "as_optional_tensor" and "as_none" in body):
                continue
            name = body["as_name"] if kind == "as_sym_int" else body["name"]
            if not many:
                self.made[name] = result
                continue
            unique = self._unique(name)
            part = self.fx.create_node("call_function", operator.getitem, (result, place), name=unique)
            self.made[name] = part

    def _label(self, node: Mapping[str, Any], name: str) -> str:
        """The name of the module that the operator was written in, where it is the first of it; else its own."""
        stack = str(node.get("metadata", {}).get("nn_module_stack", ""))
        path = stack.rpartition(";")[2].split(",")[1] if stack.count(",") >= 2 else ""
        path = path.removeprefix("net.").removeprefix("L__self__.")
        if path and path != "net" and self.valid(path) not in self.used:
            return path
        return f"{path}_{name}" if path and path != "net" else name

    def _call(self, label: str, layer: nn.Module, inputs: Sequence[Any]) -> fx.Node:
        unique = self._unique(label)
        self.module.add_module(unique, layer)
        node = self.fx.create_node("call_module", unique, tuple(inputs))
        node.name = unique
        return node

    def _symbol(self, argument: Mapping[str, Any]) -> Any:
        ((kind, body),) = argument.items()
        if kind == "as_int":
            return int(body)
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self.made[body["as_name"]] if "as_name" in body else next(iter(body.values()))
        raise FormatError(f"{self.file} computes with {kind!r}, which is not read.")

    def _argument(self, argument: Mapping[str, Any], inputs: list[Any]) -> tuple[str, Any]:
        """An argument as AtenOp takes it; nodes are added to `inputs`."""
        ((kind, body),) = argument.items()

        def node(value: Any) -> tuple[str, int]:
            inputs.append(value)
            return "x", len(inputs) - 1

        if kind == "as_tensor":
            return node(self._read(body["name"]))
        if kind == "as_optional_tensor":
            return self._argument(body, inputs)
        if kind in ("as_tensors", "as_nested_tensors"):
            return "l", tuple(node(self._read(part["name"])) for part in body)
        if kind == "as_optional_tensors":
            return "l", tuple(self._argument(part, inputs) for part in body)
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            value = self._symbol(argument)
            return ("v", value) if isinstance(value, int | float) else node(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return "l", tuple(self._argument({kind[:-1]: part}, inputs) for part in body)
        if kind == "as_none":
            return "v", None
        if kind in ("as_int", "as_bool", "as_string"):
            if not isinstance(body, bool | int | str):
                raise FormatError(f"{self.file} has an argument {str(body)[:40]!r} where a plain value belongs.")
            return "v", body
        if kind == "as_float":
            return "v", float(body)
        if kind in ("as_ints", "as_bools", "as_strings"):
            return "l", tuple(self._argument({kind[:-1]: part}, inputs) for part in body)
        if kind == "as_floats":
            return "l", tuple(("v", float(part)) for part in body)
        if kind == "as_scalar_type":
            return "d", str(self._dtype(body)).removeprefix("torch.")
        if kind == "as_memory_format":
            return "m", _MEMORY_FORMATS.get(body, "preserve_format")
        if kind == "as_device" and inputs:
            return "at", 0
        if kind in ("as_device", "as_layout"):
            return "v", None
        raise FormatError(f"{self.file} has an argument of kind {kind!r}, which is not read.")

    def _layer(self, name: str, node: Mapping[str, Any], label: str) -> fx.Node | None:
        """torch's own layer with its weights, where the operator is one; else None."""
        from torch import nn

        given = {str(entry["name"]): entry["arg"] for entry in node["inputs"]}

        def tensor(key: str) -> Tensor | None:
            body = given.get(key, {})
            body = body.get("as_optional_tensor", body)
            found = self.tensors.get(body.get("as_tensor", {}).get("name", ""))
            return None if found is None else found[0]

        def absent(key: str) -> bool:
            body = given.get(key, {"as_none": True})
            return "as_none" in body.get("as_optional_tensor", body)

        def plain(key: str, default: Any) -> Any:
            body = given.get(key)
            return default if body is None else next(iter(body.values()))

        layer: nn.Module | None = None
        weight, bias = tensor("weight"), tensor("bias")
        operand: Any = next(iter(given.values()), None) or {}
        first = operand.get("as_tensor", {}).get("name")
        if name in ("relu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "relu6", "mish") and len(given) == 1:
            layer = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU, "relu6": nn.ReLU6,
                     "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "mish": nn.Mish}[name]()  # fmt: skip
        elif name == "dropout":
            layer = nn.Dropout(float(plain("p", 0.5)))
        elif weight is None or not (bias is not None or absent("bias")):
            return None
        elif name == "linear" and weight.dim() == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        elif name in ("conv1d", "conv2d", "conv3d") and isinstance(plain("padding", 0), int | list):
            axes = int(name[4])
            if weight.dim() != axes + 2:
                return None
            kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
            group = int(plain("groups", 1))

            def sizes(key: str, default: int) -> tuple[int, ...]:
                value = plain(key, default)
                value = value if isinstance(value, list) else [value]
                return tuple(int(part) for part in (value * axes if len(value) == 1 else value))

            layer = kind(
                weight.shape[1] * group,
                weight.shape[0],
                tuple(weight.shape[2:]),
                sizes("stride", 1),
                sizes("padding", 0),
                sizes("dilation", 1),
                group,
                bias is not None,
                device="meta",
            )
        elif name == "layer_norm":
            layer = nn.LayerNorm(tuple(weight.shape), float(plain("eps", 1e-5)), bias=bias is not None, device="meta")
        elif name == "batch_norm" and not plain("training", False):
            mean, var = tensor("running_mean"), tensor("running_var")
            rank = len(self.values.get(first, {}).get("sizes", ()))
            norms: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
            if mean is None or var is None or bias is None or rank not in norms:
                return None
            layer = norms[rank](weight.shape[0], float(plain("eps", 1e-5)), float(plain("momentum", 0.1)))
            layer._buffers.update(running_mean=mean, running_var=var)
        elif name == "embedding":
            layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta") if weight.dim() == 2 else None
            first = given["indices"]["as_tensor"]["name"]
        if layer is None or first is None:
            return None
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None and key in layer._parameters:
                if layer._parameters[key] is None or layer._parameters[key].shape != value.shape:  # type: ignore[union-attr]
                    return None
                layer._parameters[key] = nn.Parameter(value)
        return self._call(label, layer, [self._read(first)])

    # -------------------------------------------------------------------------------------------------- inputs

    def inputs(self, given: Sequence[int] | None) -> list[Any]:
        """What the program takes, as rows.

        Raises: FormatError, when its batch is of one size, or a row's shape is not known.
        """
        from kindling.formats.inputs import Input

        found = []
        for name in self.user_inputs:
            try:
                meta = self.values[name]
                sizes = [size.get("as_int") for size in meta["sizes"]]
                dtype = self._dtype(meta["dtype"])
            except (KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{self.file} does not say what input {name!r} is.") from error
            if not sizes:
                raise FormatError(f"{self.file}: input {name!r} is one number for all rows.")
            if sizes[0] is not None:
                raise FormatError(
                    f"{self.file} was exported for batches of exactly {sizes[0]}. Export it again with "
                    "dynamic_shapes=({0: torch.export.Dim('N')},)."
                )
            row = list(given) if given is not None else sizes[1:]
            if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in row):
                if given is not None:
                    raise ConfigError("input_shape", given, "is no shape of a row", "Give sizes of 1 or more")
                raise FormatError(f"{self.file} does not say what shape a row of {name!r} has. Give input_shape=.")
            found.append(Input(name=name, row=tuple(row), dtype=dtype))
        return found
