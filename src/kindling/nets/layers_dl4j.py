"""Layers of Deeplearning4j that torch does not have: its LSTM over (N, features, time), and a few activations.

The reader of its files is `kindling.formats.dl4j`. Formulas follow LSTMHelpers.java and ND4J's activation classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kindling import graph
from kindling.errors import ConfigError


def _rational_tanh(x: Tensor) -> Tensor:
    """1.7159 tanh(2 x / 3), with the rational approximation of tanh that ND4J uses."""
    y = x * (2.0 / 3.0)
    size = y.abs()
    return 1.7159 * torch.sign(y) * (1 - 1 / (1 + size + y * y + 1.41645 * y**4))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cube": lambda x: x**3,
    "gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "hardtanh": functional.hardtanh,
    "identity": lambda x: x,
    "rationaltanh": _rational_tanh,
    "rectifiedtanh": lambda x: torch.relu(torch.tanh(x)),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softsign": functional.softsign,
    "tanh": torch.tanh,
}


def _checked(field: str, kind: str) -> str:
    if kind not in _ACTIVATIONS:
        raise ConfigError(field, kind, "is no activation known here", f"Use one of {', '.join(_ACTIVATIONS)}")
    return kind


@graph.allow
class ElementActivation(nn.Module):
    """An activation of Deeplearning4j by name, where torch has none of the same formula.

    >>> ElementActivation("hardsigmoid")(torch.tensor([-3.0, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 0.7000])
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = _checked("kind", kind)

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.kind](x)

    def extra_repr(self) -> str:
        return repr(self.kind)


@graph.allow
class SequenceLSTM(nn.Module):
    """An LSTM from (N, input_size, time) to (N, hidden_size, time), starting from zeros.

    Rows of the weights are in torch's order: input gate, forget gate, candidate, output gate. With peepholes (Graves)
    the input and the forget gate also see the cell before the step, the output gate the cell after it.
    Source: LSTMHelpers.java; Graves, 2012, "Supervised Sequence Labelling with Recurrent Neural Networks".

    >>> SequenceLSTM(3, 4)(torch.zeros(2, 3, 5)).shape
    torch.Size([2, 4, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        peepholes: bool = False,
        activation: str = "tanh",
        gate: str = "sigmoid",
    ) -> None:
        """
        Args:
            activation: of the candidate and of the cell that is given out.
            gate: of the three gates.
        """
        super().__init__()
        self.input_size, self.hidden_size, self.peepholes = input_size, hidden_size, peepholes
        self.activation, self.gate = _checked("activation", activation), _checked("gate", gate)
        self.plain = not peepholes and (activation, gate) == ("tanh", "sigmoid")
        if self.plain:
            self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
            return
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.peephole = nn.Parameter(torch.zeros(3, hidden_size)) if peepholes else None
        bound = 1 / math.sqrt(hidden_size)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x_NCT: Tensor) -> Tensor:
        if self.plain:
            return self.lstm(x_NCT.transpose(1, 2))[0].transpose(1, 2)  # type: ignore[no-any-return]
        act, gate = _ACTIVATIONS[self.activation], _ACTIVATIONS[self.gate]
        hidden = x_NCT.new_zeros(x_NCT.shape[0], self.hidden_size)
        cell = hidden
        inputs_NTH = functional.linear(x_NCT.transpose(1, 2), self.weight_ih, self.bias)
        outputs = []
        for step in inputs_NTH.unbind(1):
            z_in, z_forget, z_candidate, z_out = (step + functional.linear(hidden, self.weight_hh)).chunk(4, 1)
            if self.peephole is not None:
                z_in, z_forget = z_in + cell * self.peephole[0], z_forget + cell * self.peephole[1]
            cell = gate(z_forget) * cell + gate(z_in) * act(z_candidate)
            if self.peephole is not None:
                z_out = z_out + cell * self.peephole[2]
            hidden = gate(z_out) * act(cell)
            outputs.append(hidden)
        return torch.stack(outputs, 2)

    def extra_repr(self) -> str:
        more = ", peepholes" if self.peepholes else ""
        return f"{self.input_size}, {self.hidden_size}{more}, activation={self.activation!r}, gate={self.gate!r}"


@graph.allow
class L2Normalize(nn.Module):
    """Each row divided by its length over all axes but the first, at least `eps`.

    >>> L2Normalize()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        norm = x.flatten(1).norm(dim=1).clamp_min(self.eps)
        rows: Tensor = x / norm.view(-1, *[1] * (x.dim() - 1))
        return rows
