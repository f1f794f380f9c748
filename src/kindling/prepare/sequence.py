"""Steps that read lists of any length: sequences of numbers or tokens, sets of indices for embedding bags.

A packed row has room for the longest list that is allowed, so that it moves through every room as other columns do; a
batch is only as wide as its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kindling.errors import ConfigError
from kindling.prepare.base import Packed, Step, step_type

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("int64", "int32", "float32")


@step_type("sequence")
@dataclass(frozen=True)
class SequenceStep(Step):
    """A list column as a tensor (N, L), L the longest row of the batch; shorter rows end in `padding`.

    For an embedding bag, `nn.EmbeddingBag(size, width, padding_idx=padding)` leaves the padding out; so does
    `nn.Embedding` for the gradient. Row lengths, where a net wants them, come from a `LengthStep` of the same column.

    >>> step = SequenceStep("words", "words", max_length=4, size=100)
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"words": [[5, 7], [], [1, 2, 3], [100], [1, 2, 3, 4, 5]]}))
    >>> step.batch(packed.arrays)
    tensor([[5, 7, 0],
            [0, 0, 0],
            [1, 2, 3]])
    >>> packed.errors[3], packed.errors[4]
    ("column 'words' holds 100, not an index below 100", "column 'words' holds 5 numbers, more than 4")
    """

    name: str
    column: str
    max_length: int
    """Numbers that a row may hold."""
    padding: float = 0
    dtype: str = "int64"
    size: int | None = None
    """For indices: how many there are; rows that hold another are reported."""
    cut: bool = False
    """Keep the first `max_length` numbers of longer rows; otherwise such rows are reported."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ConfigError("max_length", self.max_length, "leaves no room in a row", "Use 1 or more")
        if self.dtype not in _DTYPES:
            raise ConfigError("dtype", self.dtype, "is none of a sequence", f"Use one of {_DTYPES}")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1 or self.dtype == "float32"):
            raise ConfigError("size", self.size, "is no number of indices", "Use 1 or more, with a whole dtype")

    @property
    def length_column(self) -> str:
        """The packed column that holds how many numbers of a row count."""
        return f"{self.name} length"

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: (self.dtype, (self.max_length,)), self.length_column: ("int32", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            why = f"column {self.column!r} is {column.type}, not a list of numbers"
            return self._packed(np.empty((0, self.max_length)), np.empty(0), dict.fromkeys(range(len(column)), why))
        errors = {int(row): f"column {self.column!r} is null" for row in np.flatnonzero(np.asarray(column.is_null()))}
        lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
        if not self.cut:
            for row in np.flatnonzero(lengths > self.max_length).tolist():
                errors[row] = f"column {self.column!r} holds {lengths[row]} numbers, more than {self.max_length}"
        flat, owner = column.flatten(), np.repeat(np.arange(len(column)), lengths)
        for at in np.flatnonzero(np.asarray(flat.is_null())).tolist():
            errors.setdefault(int(owner[at]), f"column {self.column!r} holds a null")
        try:
            values = np.asarray(pc.fill_null(flat, 0)).astype(self.dtype)
        except (ValueError, TypeError, pa.ArrowException) as error:
            why = f"column {self.column!r} cannot be read as {self.dtype}: {error}"
            return self._packed(np.empty((0, self.max_length)), np.empty(0), dict.fromkeys(range(len(column)), why))
        if self.size is not None:
            for at in np.flatnonzero((values < 0) | (values >= self.size)).tolist():
                why = f"column {self.column!r} holds {values[at]}, not an index below {self.size}"
                errors.setdefault(int(owner[at]), why)
        place = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        table = np.full((len(column), self.max_length), self.padding, self.dtype)
        kept = place < self.max_length
        table[owner[kept], place[kept]] = values[kept]
        good = np.array([row not in errors for row in range(len(column))], bool)
        return self._packed(table[good], np.minimum(lengths, self.max_length)[good], dict(sorted(errors.items())))

    def _packed(self, table: np.ndarray, lengths: np.ndarray, errors: Mapping[int, str]) -> Packed:
        arrays = {self.name: table.astype(self.dtype, copy=False), self.length_column: lengths.astype(np.int32)}
        return Packed(arrays, errors)

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        lengths = arrays[self.length_column]
        longest = max(int(lengths.max()) if len(lengths) else 0, 1)
        return torch.from_numpy(np.ascontiguousarray(arrays[self.name][:, :longest]))


@step_type("length")
@dataclass(frozen=True)
class LengthStep(Step):
    """How many numbers a row of a list column holds, up to `max_length`: int64, shape (N,).

    >>> step = LengthStep("count", "words", max_length=4)
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"words": [[5, 7], [], [1, 2, 3, 4, 5], None]}))
    >>> step.batch(packed.arrays), packed.errors
    (tensor([2, 0, 4]), {3: "column 'words' is null"})
    """

    name: str
    column: str
    max_length: int

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("int64", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            why = f"column {self.column!r} is {column.type}, not a list"
            return Packed({self.name: np.empty(0, np.int64)}, dict.fromkeys(range(len(column)), why))
        errors = {int(row): f"column {self.column!r} is null" for row in np.flatnonzero(np.asarray(column.is_null()))}
        lengths = np.asarray(pc.list_value_length(column).drop_null()).astype(np.int64)
        return Packed({self.name: np.minimum(lengths, self.max_length)}, errors)

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(arrays[self.name]))
