"""Tensors of systems that keep channels last, inside nets that keep them first.

A `Flow` knows whether its channels were moved to axis 1. Convolutions and pooling take it so, everything that depends
on the order of the numbers (flattening, reshaping, a dense layer) has it moved back first. Keras's and TensorFlow's
readers use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kindling.formats.assemble import Assembly, Wire


@dataclass(frozen=True, slots=True)
class Flow:
    """What runs from layer to layer."""

    wire: Wire
    moved: bool = False
    """Whether the last axis of the other system stands at axis 1 here."""
    mask: Wire | None = None
    """Which steps of a sequence count, (N, time)."""
    scores: Wire | None = None
    """The same before a last softmax, or sigmoid of one unit."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the other system has it, the batch included."""
        shape = tuple(self.wire.value.shape)
        return (shape[0], *shape[2:], shape[1]) if self.moved else shape

    @property
    def row(self) -> tuple[int, ...]:
        """The shape without the batch axis."""
        return self.shape[1:]

    @property
    def rank(self) -> int:
        """Number of axes, the batch among them."""
        return self.wire.rank

    def axis(self, logical: int) -> int:
        """Where an axis of the other system is here."""
        logical %= self.rank
        if not self.moved or logical == 0:
            return logical
        return 1 if logical == self.rank - 1 else logical + 1


@dataclass(slots=True)
class Mover:
    """Moves channels of a net that is being put together, each tensor once."""

    net: Assembly
    _done: dict[tuple[str, bool], Wire] = field(default_factory=dict)

    def first(self, flow: Flow) -> Wire:
        """The tensor with its channels at axis 1.

        >>> net = Assembly("net")
        >>> Mover(net).first(Flow(net.input("x", (4, 5, 3)))).row
        (3, 4, 5)
        """
        if flow.moved or flow.rank < 3:
            return flow.wire
        return self._move(flow.wire, True, (0, flow.rank - 1, *range(1, flow.rank - 1)))

    def last(self, flow: Flow) -> Wire:
        """The tensor in the other system's order."""
        if not flow.moved:
            return flow.wire
        return self._move(flow.wire, False, (0, *range(2, flow.rank), 1))

    def plain(self, flow: Flow) -> Flow:
        """The same with nothing moved."""
        return replace(flow, wire=self.last(flow), moved=False)

    def _move(self, wire: Wire, first: bool, axes: tuple[int, ...]) -> Wire:
        key = (wire.node.name, first)
        if key not in self._done:
            name = f"{wire.node.name}_{'first' if first else 'last'}"
            moved = self.net.call(name, torch.permute, wire, axes)
            self._done[key] = moved
            self._done[moved.node.name, not first] = wire
        return self._done[key]
