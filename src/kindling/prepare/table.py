"""Steps that read one column of a table each: numbers that are centred and scaled, categories that become one-hot.

A net over a table takes one input per column and joins them; what is learned from data (means, levels) is given here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kindling.errors import ConfigError
from kindling.prepare.base import Packed, Step, step_type
from kindling.prepare.columns import as_text

if TYPE_CHECKING:
    from torch import Tensor


@step_type("number")
@dataclass(frozen=True)
class NumberStep(Step):
    """A number column as (value - mean) * scale, shape (N, 1).

    >>> step = NumberStep("age", "AGE", mean=66.0, scale=0.5, missing=66.0)
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"AGE": ["68", None, "old"]}))
    >>> step.batch(packed.arrays), packed.errors
    (tensor([[1.],
            [0.]]), {2: "column 'AGE' holds 'old', not a number"})
    """

    name: str
    column: str
    mean: float = 0.0
    scale: float = 1.0
    missing: float | None = None
    """Takes the place of nulls and NaN, before centring; None reports such rows."""

    def __post_init__(self) -> None:
        for field in ("mean", "scale", "missing"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise ConfigError(field, value, "is no finite number", "Give one")

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("float64", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        values = np.full(len(column), np.nan)
        errors: dict[int, str] = {}
        try:
            values[:] = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            for row, value in enumerate(column.to_pylist()):
                try:
                    values[row] = math.nan if value is None else float(value)
                except (TypeError, ValueError, OverflowError):
                    errors[row] = f"column {self.column!r} holds {value!r}, not a number"
        for row in np.flatnonzero(np.isinf(values)).tolist():
            errors[row] = f"column {self.column!r} holds {values[row]}, not a number"
        empty = np.isnan(values)
        if self.missing is not None:
            values[empty] = self.missing
        else:
            for row in np.flatnonzero(empty).tolist():
                errors.setdefault(row, f"column {self.column!r} is null")
        good = np.array([row not in errors for row in range(len(values))], bool)
        return Packed({self.name: values[good]}, dict(sorted(errors.items())))

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        scaled = (arrays[self.name] - self.mean) * self.scale
        return torch.from_numpy(scaled.astype(np.float32).reshape(-1, 1))


@step_type("category")
@dataclass(frozen=True)
class CategoryStep(Step):
    """A column of names as one-hot rows of `width` numbers, shape (N, width); nulls take the last place.

    >>> step = CategoryStep("wind", "wind", ("north", "south"), width=3)
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"wind": ["south", None, "up"]}))
    >>> step.batch(packed.arrays)
    tensor([[0., 1., 0.],
            [0., 0., 1.],
            [0., 0., 1.]])
    """

    name: str
    column: str
    levels: tuple[str, ...]
    width: int
    """Places in a row; levels that find none share the last one."""
    drop_first: bool = False
    """The first level has no place of its own: its rows are all zeros."""
    unknown: str = "missing"
    """Names that are no level: `"missing"` treats them as nulls, `"error"` reports their rows."""

    def __post_init__(self) -> None:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ConfigError("levels", f"{len(self.levels)} names", "are none, or repeated", "Give each its own name")
        if not isinstance(self.width, int) or self.width < 1:
            raise ConfigError("width", self.width, "leaves no place in a row", "Use 1 or more")
        if self.unknown not in ("missing", "error"):
            raise ConfigError("unknown", self.unknown, "says nothing about unknown names", "Use 'missing' or 'error'")

    @cached_property
    def _index(self) -> pa.Array:
        return pa.array([str(level) for level in self.levels], pa.string())

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("int32", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        names = as_text(rows.column(rows.schema.get_field_index(self.column)))
        found = pc.fill_null(pc.index_in(names, self._index, skip_nulls=True), -1).to_numpy(zero_copy_only=False)
        places = np.minimum(found.astype(np.int64) - self.drop_first, self.width - 1)
        places[found < 0] = self.width - 1
        errors: dict[int, str] = {}
        if self.unknown == "error":
            for row in np.flatnonzero((found < 0) & np.asarray(names.is_valid())):
                errors[int(row)] = (
                    f"column {self.column!r} holds {names[int(row)].as_py()!r}, none of {len(self.levels)} levels"
                )
        good = np.array([row not in errors for row in range(len(places))], bool)
        return Packed({self.name: places[good].astype(np.int32)}, errors)

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        places = arrays[self.name]
        one_hot = np.zeros((len(places), self.width), np.float32)
        kept = np.flatnonzero(places >= 0)
        one_hot[kept, places[kept]] = 1
        return torch.from_numpy(one_hot)
