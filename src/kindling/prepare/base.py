"""What every preparation step is, and how several make one Preparation.

Two halves. `pack` turns Arrow columns into compact arrays, deterministic, in a Spark task. `batch` turns those arrays
into tensors on the worker, just before the forward pass. The state of a step is plain JSON; the registry is closed, so
a bundle can name steps but never bring code. Knows numpy, pyarrow and torch; no Spark.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from kindling.errors import ConfigError, DataError, FormatError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """What one step made of the rows of one Arrow batch.

    `arrays` hold one entry per *good* row, in order; `errors` tells, by row number in the batch, why a row is not good.
    """

    arrays: Mapping[str, np.ndarray]
    """Packed column name -> array of shape (good rows, ...)."""
    errors: Mapping[int, str]


class Step(ABC):
    """One named input or target: the columns it reads, what it keeps of them, the tensor it makes.

    Subclasses are frozen dataclasses whose fields are JSON values; `@step_type("kind")` registers them.
    """

    kind: ClassVar[str]
    name: str
    """The input or target that this step feeds, and the prefix of its packed columns."""
    column: str
    """The DataFrame column it reads."""

    @abstractmethod
    def pack(self, rows: pa.RecordBatch) -> Packed:
        """Compact arrays of the good rows of one Arrow batch; a row that cannot be used is reported, never raised."""

    @abstractmethod
    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        """The tensor the net takes, from packed arrays of any number of rows. `rng` is None outside training."""

    @abstractmethod
    def packed_spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Packed column name -> (numpy dtype name, shape of one row)."""

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}


_REGISTRY: dict[str, type[Step]] = {}
S = TypeVar("S", bound=type[Step])


def step_type(kind: str) -> Callable[[S], S]:
    """Class decorator: register a step under the name it has in a bundle."""

    def register(cls: S) -> S:
        cls.kind = kind
        _REGISTRY[kind] = cls
        return cls

    return register


def step_from_json(data: Mapping[str, Any]) -> Step:
    """Rebuild a step from a bundle; an unknown kind or a bad field is refused.

    Raises: FormatError.
    """
    kind = data.get("kind")
    cls = _REGISTRY.get(str(kind))
    if cls is None:
        raise FormatError(
            f"preparation step {kind!r} is unknown to this version of kindling.{did_you_mean(str(kind), _REGISTRY)}"
        )
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    try:
        return cls(**fields)
    except (TypeError, ConfigError) as error:
        raise FormatError(f"preparation step {kind!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class Preparation:
    """Every step a model needs, inputs and targets, as one object that travels with it."""

    inputs: tuple[Step, ...]
    targets: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.inputs + self.targets

    def by_output(self, outputs: Sequence[str]) -> dict[str, Step]:
        """Target of each output that has one; a target named `"target OUTPUT"` is that output's, others the first's.

        >>> from kindling.prepare import LabelStep, ValueStep
        >>> size, kind = ValueStep("target size", "size"), LabelStep("target", "label", ("a", "b"))
        >>> [list(Preparation((), (step,)).by_output(["kind", "size"])) for step in (size, kind)]
        [['size'], ['kind']]
        """
        return {
            step.name.removeprefix("target ") if step.name.startswith("target ") else outputs[0]: step
            for step in self.targets
        }

    def columns(self, *, targets: bool) -> list[str]:
        """DataFrame columns read, in order, without repeats."""
        return list(dict.fromkeys(step.column for step in (self.steps if targets else self.inputs)))

    def packed_spec(self, *, targets: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Packed column name -> (numpy dtype name, shape of one row)."""
        spec: dict[str, tuple[str, tuple[int, ...]]] = {}
        for step in self.steps if targets else self.inputs:
            spec.update(step.packed_spec())
        return spec

    def pack(self, rows: pa.RecordBatch, *, targets: bool) -> Packed:
        """Pack the rows of one Arrow batch with every step; a row is good only if every step could use it.

        Raises: DataError, when a column is missing.
        """
        steps: Sequence[Step] = self.steps if targets else self.inputs
        for step in steps:
            if step.column not in rows.schema.names:
                raise DataError(
                    f"column {step.column!r}, read for {step.name!r}, is missing."
                    f"{did_you_mean(step.column, rows.schema.names)}"
                )
        parts = [step.pack(rows) for step in steps]
        errors: dict[int, str] = {}
        for part in parts:
            for row, why in part.errors.items():
                errors.setdefault(row, why)
        arrays: dict[str, np.ndarray] = {}
        for part in parts:
            if len(part.errors) == len(errors):
                arrays.update(part.arrays)
                continue
            # Another step refused rows that this one packed: keep only what all of them packed.
            own = [row for row in range(rows.num_rows) if row not in part.errors]
            keep = np.fromiter((row not in errors for row in own), dtype=bool, count=len(own))
            arrays.update({name: array[keep] for name, array in part.arrays.items()})
        return Packed(arrays, errors)

    def batch(
        self, arrays: Mapping[str, np.ndarray], *, targets: bool, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor]:
        """Tensors by input (and target) name from packed arrays."""
        return {step.name: step.batch(arrays, rng) for step in (self.steps if targets else self.inputs)}

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [s.to_json() for s in self.inputs], "targets": [s.to_json() for s in self.targets]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preparation:
        return cls(*(tuple(step_from_json(step) for step in data[side]) for side in ("inputs", "targets")))
