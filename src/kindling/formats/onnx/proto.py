"""ONNX files: opened within bounds, tensors as torch has them, numbers beside the file only from beside the file.

The `onnx` package parses the bytes (protobuf's own bounds on depth and size hold); nothing in them is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kindling.errors import FormatError, MissingExtraError
from kindling.formats.files import mapped
from kindling.formats.wire import Budget, fields
from kindling.nets.onnx_ops.registry import DTYPES, FLOAT8, NARROW, POWERS


class Refused(FormatError):
    """A file that no engine shall be given: it asks for more than any net does."""


MAX_BYTES = 2**31 - 1
"""protobuf holds no more in one message; larger nets keep their numbers beside it."""
MAX_NODES = 200_000
MAX_DEPTH = 20
"""Bodies inside bodies, functions inside functions."""


class Unsupported(Exception):
    """What torch has nothing for; the reason is one short phrase."""


def onnx_package() -> Any:
    """The `onnx` package.

    Raises: MissingExtraError.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtraError.of("ONNX", "onnx", "onnx") from None
    return onnx


def open_file(path: Path) -> Any:
    """The ModelProto in a file, without what stands beside it.

    Raises: FormatError, when it is none; MissingExtraError.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(f"{path} has {size:,} bytes; an ONNX file has fewer than 2 GiB and the rest beside it.")
    data = mapped(path)
    # A tensor beside the model is looked for in its folder, where a link need not lead.
    slim = _slim(data, path.name) if path.resolve().parent == path.parent.resolve() else None
    return parse(bytes(data) if slim is None else slim, str(path))


_LARGE_BYTES = 1 << 16
"""Numbers of a tensor from here on are left where they are, until they are read into the tensor that stays."""
_GRAPH, _INITIALIZER, _DATA_TYPE, _RAW, _BESIDE, _LOCATION = 7, 5, 2, 9, 13, 14
"""Fields of ModelProto, GraphProto and TensorProto."""


def _slim(data: memoryview, name: str) -> bytes | None:
    """The model with its large weights told to be in the file itself: protobuf would hold each byte twice.

    None, where the file is not what it should be; protobuf says why then.
    """

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def held(number: int, body: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(body)) + body

    def tensor(start: int, stop: int) -> bytes | None:
        """A tensor without its numbers; None, where they are small or not plain."""
        kept, raw, kind, at = bytearray(), None, 0, start
        for number, _, value, body, end in fields(data, start, stop, budget):
            if number in (_BESIDE, _LOCATION):
                return None
            if number == _RAW:
                raw = body, end
            else:
                kept += data[at:end]
            kind = value if number == _DATA_TYPE else kind
            at = end
        if raw is None or raw[1] - raw[0] < _LARGE_BYTES or kind not in DTYPES or DTYPES[kind] in NARROW:
            return None
        for key, told in (("location", name), ("offset", str(raw[0])), ("length", str(raw[1] - raw[0]))):
            kept += held(_BESIDE, held(1, key.encode()) + held(2, told.encode()))
        return bytes(kept + varint(_LOCATION << 3) + varint(1))

    def graph(start: int, stop: int) -> bytes:
        kept, at = bytearray(), start
        for number, _, _, body, end in fields(data, start, stop, budget):
            short = tensor(body, end) if number == _INITIALIZER else None
            kept += data[at:end] if short is None else held(_INITIALIZER, short)
            at = end
        return bytes(kept)

    budget, model, at = Budget(name), bytearray(), 0
    try:
        for number, _, _, body, end in fields(data, 0, len(data), budget):
            model += held(_GRAPH, graph(body, end)) if number == _GRAPH else data[at:end]
            at = end
    except (FormatError, UnicodeError):
        return None
    return bytes(model)


def parse(data: bytes, what: str) -> Any:
    """The ModelProto in these bytes.

    Raises: FormatError, when they are none; MissingExtraError.
    """
    onnx = onnx_package()
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{what} is cut off, damaged or no ONNX file: {error}. Fetch it again.") from error
    _texts(model, what)
    if not model.HasField("graph") or not model.graph.output:
        raise FormatError(f"{what} holds no ONNX graph with an output. Is it the right file?")
    if not model.opset_import:
        raise FormatError(f"{what} does not say which operators it is written in (opset_import).")
    if sum(1 for _ in _nodes(model)) > MAX_NODES:
        raise FormatError(f"{what} has more than {MAX_NODES:,} operators, which are refused.")
    return model


def _texts(message: Any, what: str) -> None:
    """Names that are no UTF-8 come out of protobuf as bytes, which nothing after this expects.

    Raises: FormatError.
    """
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_STRING:
            if any(not isinstance(part, str) for part in ([value] if isinstance(value, str | bytes) else value)):
                raise FormatError(f"{what} is damaged: a name in it is no text.")
        elif kind.type == kind.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                _texts(part, what)


def _nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def opsets(imports: Any) -> dict[str, int]:
    """Domain -> version; ONNX's own domain is `""`."""
    return {domain(entry.domain): int(entry.version) for entry in imports}


def domain(name: str) -> str:
    """A domain's one spelling."""
    return "" if name == "ai.onnx" else name


def key(node: Any) -> str:
    """An operator's name, with its domain where that is not ONNX's own."""
    home = domain(node.domain)
    return f"{home}.{node.op_type}" if home else str(node.op_type)


# Tensors


def _outside(proto: Any, folder: Path | None, what: str) -> bytearray:
    """A tensor's bytes from the file beside that it names.

    Raises: FormatError, when that is anywhere else, or shorter than it should be.
    """
    said = {entry.key: entry.value for entry in proto.external_data}
    location = said.get("location", "")
    if folder is None:
        raise FormatError(f"{what}: tensor {proto.name!r} is kept in another file, {location!r}, which is not at hand.")
    home = folder.resolve()
    file = Path(location)
    target = (home / location).resolve()
    if not location or file.is_absolute() or ".." in file.parts or not target.is_relative_to(home):
        raise FormatError(f"{what}: tensor {proto.name!r} is said to be in {location!r}, outside the model's folder.")
    if not target.is_file():
        raise FormatError(f"{what}: tensor {proto.name!r} is kept in {location!r}, which is not beside the model.")
    try:
        offset, size = int(said.get("offset", 0)), target.stat().st_size
        length = int(said["length"]) if "length" in said else size - offset
    except ValueError:
        raise FormatError(f"{what}: tensor {proto.name!r} does not say where in {location!r} it is.") from None
    if not (0 <= offset <= size and 0 <= length <= size - offset):
        raise FormatError(f"{what}: {location!r} ends before tensor {proto.name!r} does. Is it whole?")
    with target.open("rb") as stream:
        stream.seek(offset)
        data = bytearray(length)
        if stream.readinto(data) != length:
            raise FormatError(f"{what}: {location!r} ends before tensor {proto.name!r} does. Is it whole?")
        return data


def inline(proto: Any, folder: Path | None, what: str) -> None:
    """Bring a tensor's outside bytes into the message. Changes `proto`.

    Raises: FormatError.
    """
    if proto.data_location == 1:
        proto.raw_data = bytes(_outside(proto, folder, what))
        del proto.external_data[:]
        proto.data_location = 0


def tensor(proto: Any, folder: Path | None, what: str) -> Tensor:
    """A TensorProto as torch's tensor, with memory of its own.

    Raises: FormatError, when it does not hold what it says; Unsupported, for element types that torch has not.
    """
    sizes, kind = [int(size) for size in proto.dims], int(proto.data_type)
    if any(size < 0 for size in sizes):
        raise FormatError(f"{what}: tensor {proto.name!r} has sizes {sizes[:8]}.")
    if kind not in DTYPES:
        name = onnx_package().TensorProto.DataType.Name(kind) if kind in range(1, 30) else str(kind)
        raise Unsupported(f"element type {name}")
    dtype, count = DTYPES[kind], math.prod(sizes)
    if dtype not in NARROW and (proto.data_location == 1 or proto.HasField("raw_data")):
        outside = proto.data_location == 1
        raw = _outside(proto, folder, what) if outside else proto.raw_data
        if len(raw) != count * dtype.itemsize:
            raise FormatError(
                f"{what}: tensor {proto.name!r} holds {len(raw):,} bytes; its shape {sizes[:8]} "
                f"makes {count * dtype.itemsize:,}."
            )
        if not raw:
            return torch.zeros(sizes, dtype=dtype, device="cpu")
        return torch.frombuffer(raw if outside else bytearray(raw), dtype=dtype).reshape(sizes)
    try:
        array = onnx_package().numpy_helper.to_array(proto)
    except Exception as error:  # the package raises what it likes
        raise FormatError(f"{what}: tensor {proto.name!r} cannot be read: {_line(error)}") from error
    return from_numpy(array)


def from_numpy(array: Any) -> Tensor:
    """An array, also of the small floats that numpy has not, as a tensor with memory of its own.

    Raises: Unsupported, for texts and numbers of less than a byte.
    """
    array = np.asarray(array)
    name = array.dtype.name
    if name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    for small in (*FLOAT8, *([POWERS] if POWERS is not None else [])):
        if str(small) == f"torch.{name}":
            return torch.from_numpy(array.view(np.uint8).copy()).view(small)
    for narrow, (carrier, _) in NARROW.items():
        if str(narrow) == f"torch.{name}":
            return torch.from_numpy(array.astype(str(carrier).removeprefix("torch."))).view(narrow)
    if array.dtype.kind not in "fiubc" or array.dtype.kind == "V":
        raise Unsupported(f"element type {name}")
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError:
        raise Unsupported(f"element type {name}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Attributes


def attribute(proto: Any, what: str) -> Any:
    """An attribute's value: number, text, tuple of them, or the message of a tensor, graph or type.

    Raises: FormatError, for what no operator has.
    """
    kind = int(proto.type)
    if kind == 1:
        return float(proto.f)
    if kind == 2:
        return int(proto.i)
    if kind == 3:
        return _text(proto.s, what)
    if kind in (4, 5, 13):
        return {4: proto.t, 5: proto.g, 13: proto.tp}[kind]
    if kind == 6:
        return tuple(float(value) for value in proto.floats)
    if kind == 7:
        return tuple(int(value) for value in proto.ints)
    if kind == 8:
        return tuple(_text(value, what) for value in proto.strings)
    if kind == 11:
        return proto.sparse_tensor
    raise FormatError(f"{what} has an attribute {proto.name!r} of kind {kind}, which is not read.")


def _text(value: bytes, what: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} has a text that is none.") from error


def declared(info: Any) -> tuple[int, list[int | str | None] | None] | None:
    """Element type and sizes (a number, a symbol, or None) that a ValueInfoProto states; None where it is no tensor.

    The sizes themselves are None where not even their number is said.
    """
    if not info.type.HasField("tensor_type"):
        return None
    kind = info.type.tensor_type
    if not kind.HasField("shape"):
        return int(kind.elem_type), None
    sizes: list[int | str | None] = []
    for size in kind.shape.dim:
        if size.HasField("dim_value"):
            sizes.append(int(size.dim_value))
        else:
            sizes.append(str(size.dim_param) or None)
    return int(kind.elem_type), sizes
