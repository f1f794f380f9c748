"""Steps that read ready numbers and labels: arrays of a fixed shape, class labels, plain values.

Images are in `image.py`, columns of tables in `table.py`.
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

if TYPE_CHECKING:
    from torch import Tensor


def _bad_rows(mask: np.ndarray, why: str) -> dict[int, str]:
    return {int(row): why for row in np.flatnonzero(mask)}


@step_type("array")
@dataclass(frozen=True)
class ArrayStep(Step):
    """A list column (or a number column, for `shape=()`) as a tensor of a fixed shape.

    >>> step = ArrayStep("x", "features", (2,))
    >>> rows = pa.RecordBatch.from_pydict({"features": [[1.0, 2.0], [3.0], None]})
    >>> packed = step.pack(rows)
    >>> packed.arrays["x"]
    array([[1., 2.]], dtype=float32)
    >>> packed.errors
    {1: "column 'features' holds 1 numbers, not 2", 2: "column 'features' is null"}
    """

    name: str
    column: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise ConfigError(
                "shape", self.shape, "has an axis that is not a positive size", "Name every axis but the batch"
            )

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: (self.dtype, self.shape)}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        errors: dict[int, str] = {}
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list and not (self.shape == () or self.size == 1):
            why = f"column {self.column!r} is {kind}, not a list of {self.size} numbers"
            return Packed({self.name: np.empty((0, *self.shape), self.dtype)}, dict.fromkeys(range(len(column)), why))
        nulls = np.asarray(column.is_null())
        errors.update(_bad_rows(nulls, f"column {self.column!r} is null"))
        if is_list:
            lengths = np.asarray(pc.fill_null(pc.list_value_length(column), self.size))
            for row in np.flatnonzero((lengths != self.size) & ~nulls):
                errors[int(row)] = f"column {self.column!r} holds {lengths[row]} numbers, not {self.size}"
            good = column.filter(pa.array([row not in errors for row in range(len(column))])) if errors else column
            flat = good.flatten()
        else:
            flat = column.drop_null()
        try:
            values = flat.to_numpy(zero_copy_only=False).astype(self.dtype, copy=False)
        except (ValueError, TypeError) as error:
            why = f"column {self.column!r} cannot be read as {self.dtype}: {error}"
            return Packed({self.name: np.empty((0, *self.shape), self.dtype)}, dict.fromkeys(range(len(column)), why))
        return Packed({self.name: values.reshape(-1, *self.shape)}, dict(sorted(errors.items())))

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(arrays[self.name]))


@step_type("scaled_array")
@dataclass(frozen=True)
class ScaledArrayStep(ArrayStep):
    """An array whose numbers become (x - subtract) * multiply + add.

    `subtract` and `multiply` hold one number, one for each entry of the first axis, or one for each number of a row.

    >>> step = ScaledArrayStep("x", "features", (2,), subtract=(1.0, 2.0), multiply=(0.5, 10.0))
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"features": [[3.0, 4.0]]}))
    >>> step.batch(packed.arrays)
    tensor([[ 1., 20.]])
    """

    subtract: tuple[float, ...] = (0.0,)
    multiply: tuple[float, ...] = (1.0,)
    add: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = {1, self.size, *self.shape[:1]}
        for field in ("subtract", "multiply"):
            values = getattr(self, field)
            if len(values) not in fitting or not all(math.isfinite(value) for value in values):
                raise ConfigError(
                    field, f"{len(values)} numbers", f"does not fit rows of shape {self.shape}", "Give finite numbers"
                )

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        x = arrays[self.name].astype(np.float64)
        scaled = (x - self._spread(self.subtract)) * self._spread(self.multiply) + self.add
        return torch.from_numpy(np.ascontiguousarray(scaled, self.dtype))

    def _spread(self, values: tuple[float, ...]) -> np.ndarray:
        """In a shape that broadcasts over rows."""
        array = np.array(values)
        if len(array) == self.size:
            return array.reshape(self.shape)
        return array.reshape(-1, *[1] * (len(self.shape) - 1)) if self.shape else array.reshape(())


def as_text(column: pa.Array) -> pa.Array:
    """Names of classes or levels as text; whole numbers that are stored as floats lose their point.

    >>> as_text(pa.array([4.0, 4.5, None])).to_pylist()
    ['4', '4.5', None]
    """
    if pa.types.is_floating(column.type):
        # 4.0 means class "4"; 4.5 means no class at all, and stays text that matches none.
        as_int = pc.floor(column)
        return pc.if_else(
            pc.equal(as_int, column),
            pc.cast(as_int, pa.int64(), safe=False).cast(pa.string()),
            column.cast(pa.string()),
        )
    return column.cast(pa.string())


@step_type("label")
@dataclass(frozen=True)
class LabelStep(Step):
    """A column of class names (text or whole numbers) as class indices, int64.

    >>> step = LabelStep("label", "label", ("cat", "dog"))
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"label": ["dog", "cow", "cat"]}))
    >>> packed.arrays["label"], packed.errors
    (array([1, 0]), {1: "label 'cow' is none of the model's 2 labels"})
    """

    name: str
    column: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
            raise ConfigError("labels", repeated, "are named twice", "Give each class one name")

    @cached_property
    def _index(self) -> pa.Array:
        return pa.array([str(label) for label in self.labels], pa.string())

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("int64", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        found = pc.index_in(as_text(column), self._index)
        missing = np.asarray(found.is_null())
        errors: dict[int, str] = {}
        for row in np.flatnonzero(missing):
            value = column[int(row)].as_py()
            errors[int(row)] = (
                f"column {self.column!r} is null"
                if value is None
                else f"label {value!r} is none of the model's {len(self.labels)} labels"
            )
        return Packed({self.name: np.asarray(found.drop_null()).astype(np.int64)}, errors)

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(arrays[self.name]))


@step_type("many_labels")
@dataclass(frozen=True)
class ManyLabelsStep(Step):
    """A list column of class names, any number of them in a row, as ones and zeros: float32, shape (N, labels).

    >>> step = ManyLabelsStep("tags", "tags", ("cat", "dog", "cow"))
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"tags": [["dog", "cat"], [], ["pig"], None]}))
    >>> step.batch(packed.arrays)
    tensor([[1., 1., 0.],
            [0., 0., 0.]])
    >>> packed.errors
    {2: "label 'pig' is none of the model's 3 labels", 3: "column 'tags' is null"}
    """

    name: str
    column: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels):
            repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
            raise ConfigError("labels", repeated, "are named twice", "Give each class one name")

    @cached_property
    def _index(self) -> pa.Array:
        return pa.array([str(label) for label in self.labels], pa.string())

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("uint8", (len(self.labels),))}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        marks = np.zeros((len(column), len(self.labels)), np.uint8)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            why = f"column {self.column!r} is {column.type}, not a list of labels"
            return Packed({self.name: marks[:0]}, dict.fromkeys(range(len(column)), why))
        errors = _bad_rows(np.asarray(column.is_null()), f"column {self.column!r} is null")
        names = as_text(column.flatten())
        places = np.asarray(pc.list_parent_indices(column))
        found = pc.fill_null(pc.index_in(names, self._index), -1).to_numpy(zero_copy_only=False)
        for at in np.flatnonzero(found < 0).tolist():
            name = names[at].as_py()
            why = (
                "a label is null"
                if name is None
                else f"label {name!r} is none of the model's {len(self.labels)} labels"
            )
            errors.setdefault(int(places[at]), why)
        marks[places[found >= 0], found[found >= 0]] = 1
        good = np.array([row not in errors for row in range(len(column))], bool)
        return Packed({self.name: marks[good]}, dict(sorted(errors.items())))

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        return torch.from_numpy(arrays[self.name].astype(np.float32))


@step_type("row_weight")
@dataclass(frozen=True)
class RowWeightStep(ArrayStep):
    """How much each row counts in training: a finite number, 0 or more.

    >>> step = RowWeightStep("weight", "importance")
    >>> packed = step.pack(pa.RecordBatch.from_pydict({"importance": [0.5, -1.0, None]}))
    >>> packed.arrays["weight"], packed.errors
    (array([0.5], dtype=float32), {1: "column 'importance' holds -1.0, not a weight", 2: "column 'importance' is null"})
    """

    shape: tuple[int, ...] = ()

    def pack(self, rows: pa.RecordBatch) -> Packed:
        packed = super().pack(rows)
        values = packed.arrays[self.name]
        wrong = ~np.isfinite(values) | (values < 0)
        if not wrong.any():
            return packed
        errors = dict(packed.errors)
        own = [row for row in range(rows.num_rows) if row not in errors]
        for at in np.flatnonzero(wrong).tolist():
            errors[own[at]] = f"column {self.column!r} holds {values[at]}, not a weight"
        return Packed({self.name: values[~wrong]}, dict(sorted(errors.items())))


@step_type("value")
@dataclass(frozen=True)
class ValueStep(ArrayStep):
    """A number (or a list of numbers) to predict, for regression and losses that take the target as it is."""

    shape: tuple[int, ...] = ()


@step_type("nothing")
@dataclass(frozen=True)
class NothingStep(Step):
    """In place of a target, for a loss that has none: a zero for each row, whatever the column holds.

    >>> step = NothingStep("target", "content")
    >>> step.batch(step.pack(pa.RecordBatch.from_pydict({"content": [b"x", None]})).arrays)
    tensor([0, 0])
    """

    name: str
    column: str

    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {self.name: ("int64", ())}

    def pack(self, rows: pa.RecordBatch) -> Packed:
        return Packed({self.name: np.zeros(rows.num_rows, np.int64)}, {})

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(arrays[self.name]))
