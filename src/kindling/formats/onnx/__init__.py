"""ONNX's models in: as a torch graph that is trained and cut, or, where torch lacks an operator, run by onnxruntime.

`read` is the door for models with rows, `open_net` the one for any graph at all. The rooms: `proto` opens files,
`convert` follows the graph, `emit` and `flow` make layers of operators and of loops, `open` chooses the engine, `model`
makes a Model of a graph. What operators compute is in `kindling.nets.onnx_ops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kindling.formats.models import Imported, Peek
    from kindling.formats.onnx.open import OnnxNet as OnnxNet
    from kindling.formats.onnx.open import open_net as open_net

NAME = "ONNX"
_AFTER_VERSION = b"\x12\x1a\x22\x28\x32\x3a\x42\xa2"
"""Tags that may follow the version in a ModelProto."""


def matches(peek: Peek) -> bool:
    """Whether this looks like an ONNX file: a ModelProto, which begins with its version.

    >>> from kindling.formats.models import Peek
    >>> matches(Peek(path=Path("net.bin"), head=b"\\x08\\x08\\x12\\x07pytorch"))
    True
    """
    head = peek.head
    if not head or peek.members:
        return False
    if peek.path.suffix == ".onnx":
        return True
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in _AFTER_VERSION


def read(
    path: str | Path,
    *,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    image: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    engine: str = "auto",
) -> Imported:
    """A model of ONNX whose inputs and outputs have one entry for each row.

    Args:
        path: the `.onnx` file; what it keeps in other files must lie in its folder.
        input_shape: shape of one row, or of one row by input, where the file leaves it open or says otherwise.
        image: fields of the `ImageStep` to prepare photos with. ONNX states no preparation; without this, rows are
            the net's own numbers, except in files that kindling exported.
        labels: names of the classes in the order of the scores.
        engine: `"auto"` takes torch where it has every operator, else onnxruntime; or one of the two.
    Raises: FormatError, for what is damaged, hostile, or can be run by neither; MissingExtraError.
    """
    from kindling.formats.onnx.model import read_model

    return read_model(Path(path), input_shape, image, labels, engine)


def __getattr__(name: str) -> Any:
    """The public names of the rooms, opened on use."""
    if name not in ("OnnxNet", "open_net"):
        raise AttributeError(name)
    from kindling.formats.onnx import open as room

    return getattr(room, name)
