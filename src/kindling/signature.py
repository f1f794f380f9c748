"""What goes into a module and what comes out: ordered, named, with dtype and symbolic shape.

A batch is always a dict from name to tensor. `Signature.call` is the one place that turns a batch into positional
arguments and a module's return value back into a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kindling.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of one tensor; the first axis is the batch, `"N"`; other axes are sizes or symbols."""

    shape: tuple[int | str, ...]
    """For example `("N", 3, 224, 224)`."""
    dtype: str = "float32"
    """A torch dtype's name: `"float32"`, `"int64"`, `"uint8"`."""

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(tuple(data["shape"]), str(data["dtype"]))


@dataclass(frozen=True, slots=True)
class Signature:
    """Ordered named inputs, outputs and targets of a module.

    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> Signature.from_json(spec.to_json()) == spec
    True
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    targets: Mapping[str, TensorSpec] = field(default_factory=dict)

    def call(self, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run `module` on a batch; returns its outputs by name, in the signature's order.

        Raises: ModelError, when the module returns another number of tensors than the signature names.
        """
        result = module(*(batch[name] for name in self.inputs))
        names = list(self.outputs)
        if isinstance(result, Mapping):
            missing = [name for name in names if name not in result]
            if missing:
                raise ModelError(f"the module returned {sorted(result)}, its signature also names {missing}.")
            return {name: result[name] for name in names}
        tensors = list(result) if isinstance(result, tuple | list) else [result]
        if len(tensors) != len(names):
            raise ModelError(f"the module returned {len(tensors)} tensors, its signature names {len(names)}: {names}.")
        return dict(zip(names, tensors, strict=True))

    def to_json(self) -> dict[str, Any]:
        # A list of pairs: the order is part of the meaning, and JSON objects promise none.
        return {
            side: [[name, spec.to_json()] for name, spec in getattr(self, side).items()]
            for side in ("inputs", "outputs", "targets")
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        return cls(
            *(
                {name: TensorSpec.from_json(spec) for name, spec in data[side]}
                for side in ("inputs", "outputs", "targets")
            )
        )
