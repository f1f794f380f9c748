"""What a Keras layer is built with: its settings, checked; its weights; the net that it is added to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from kindling.errors import FormatError
from kindling.formats.assemble import Assembly, Wire
from kindling.formats.channels import Flow, Mover
from kindling.formats.keras.config import Layer
from kindling.formats.keras.weights import Store
from kindling.nets.layers_keras import KerasActivation, KerasReLU

MAX_SIZE = 2**31
Tensors = Callable[[], Mapping[str, Tensor]]


@dataclass(slots=True)
class Building:
    """A net that is being built, and what all of its layers share."""

    net: Assembly
    major: int
    """Version of Keras that wrote the file: a few formulas changed."""
    custom: Mapping[str, Callable[[Site], nn.Module]]
    notes: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    made: dict[tuple[int, str, str], Wire] = field(default_factory=dict)
    """Layer and part of it -> its first use: a layer that is called again shares its weights."""
    finished: set[int] = field(default_factory=set)
    """Models whose weights were all taken."""
    mover: Mover = field(init=False)

    def __post_init__(self) -> None:
        self.mover = Mover(self.net)


@dataclass(slots=True)
class Site:
    """One call of one layer.

    A function given to `register_layer` may use `name`, `kind`, `fields` (the layer's config), `rows` (shapes of one
    row of each input, in Keras's order) and `fail`.
    """

    building: Building
    layer: Layer
    store: Store
    name: str
    frozen: bool
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def kind(self) -> str:
        """The layer's class."""
        return self.layer.kind

    @property
    def fields(self) -> Mapping[str, Any]:
        """The layer's config."""
        return self.layer.fields

    @property
    def what(self) -> str:
        """Names the file and the layer in messages."""
        return f"{self.building.net.what}: layer {self.name[:80]!r} ({self.kind[:60]})"

    def fail(self, why: str) -> FormatError:
        """An error that names the layer and its type."""
        return FormatError(f"{self.what} {why}.")

    def note(self, text: str) -> None:
        """Something that the model is told with: what was left out."""
        self.building.notes.append(f"layer {self.name}: {text}")

    # ---------------------------------------------------------------------------------------------- settings

    def whole(self, key: str, low: int = 1, default: int | None = None) -> int:
        value = self.fields.get(key, default)
        return self._whole(key, default if value is None else value, low)

    def _whole(self, key: str, value: Any, low: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < MAX_SIZE:
            raise self.fail(f"has {key}={str(value)[:60]}, not a whole number of {low} or more")
        return value

    def sizes(self, key: str, count: int, default: Any = None, low: int = 1) -> tuple[int, ...]:
        """One number for each axis; a single one counts for all."""
        value = self.fields.get(key)
        value = default if value is None else value
        values = value if isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise self.fail(f"has {key}={str(value)[:60]}, not {count} numbers")
        return tuple(self._whole(key, part, low) for part in values)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.fields.get(key, default)
        if isinstance(value, dict) and isinstance(value.get("config"), dict):  # a number of numpy
            value = value["config"].get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(f"has {key}={str(value)[:60]}, not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.fields.get(key)
        return value if isinstance(value, bool) else default

    def text(self, key: str, default: str, *known: str) -> str:
        value = self.fields.get(key)
        value = default if value is None else value
        if value not in known:
            raise self.fail(f"has {key}={str(value)[:60]!r}; {', '.join(known)} are read")
        return str(value)

    def unset(self, *keys: str) -> None:
        """Raises: FormatError, where one of these settings asks for what is not read."""
        for key in keys:
            value = self.fields.get(key)
            if value is True or value not in (None, False, 0, 1, [], ""):
                raise self.fail(f"has {key}={str(self.fields[key])[:60]}, which is not read")

    @property
    def channels_last(self) -> bool:
        return self.text("data_format", "channels_last", "channels_last", "channels_first") == "channels_last"

    # --------------------------------------------------------------------------------------------- the net

    def channels(self, flow: Flow, axes: int) -> tuple[Wire, bool]:
        """The tensor with channels at axis 1, and whether they were moved there.

        Args:
            axes: of space or time that the layer works on.
        """
        if flow.rank != axes + 2:
            raise self.fail(f"works on {axes} axes and channels, and is given rows of shape {flow.row}")
        if self.channels_last:
            return self.building.mover.first(flow), True
        return self.building.mover.last(flow), False

    def last(self, flow: Flow) -> Wire:
        """The tensor in Keras's order."""
        return self.building.mover.last(flow)

    def module(
        self,
        part: str,
        build: Callable[[], nn.Module],
        *inputs: Wire,
        tensors: Tensors | None = None,
        held: Sequence[str] = (),
    ) -> Wire:
        """Add a module, or use it again where the layer was called before.

        Args:
            part: what it is called behind the layer's name; nothing for the layer's own.
            tensors: gives its parameters and buffers.
            held: parameters that torch's layer has and Keras's has not: they are not trained.
        """
        name = f"{self.name}_{part}" if part else self.name
        key = (id(self.layer), self.name, part)
        first = self.building.made.get(key)
        if first is not None:
            return self.building.net.again(name, first, *inputs)
        found = tensors() if tensors is not None else {}
        frozen = self.frozen

        def make() -> nn.Module:
            module = build()
            for name, parameter in module.named_parameters():
                if frozen or name in held:
                    parameter.requires_grad_(False)
            return module

        wire = self.building.net.layer(name, make, *inputs, tensors=found)
        self.building.made[key] = wire
        return wire

    def call(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Wire:
        """Add a function."""
        return self.building.net.call(f"{self.name}_{part}" if part else self.name, function, *args, **kwargs)

    def method(self, part: str, method: str, wire: Wire, *args: Any) -> Wire:
        """Add a method of a tensor."""
        return self.building.net.method(f"{self.name}_{part}" if part else self.name, method, wire, *args)

    def take(self, role: str, *shape: int) -> Tensor:
        """The layer's next weight."""
        return self.store.take(role, shape, self.fields)

    # ---------------------------------------------------------------------------------------- activations

    def activate(self, flow: Flow, given: Any, part: str | None = None) -> Flow:
        """An activation by Keras's name, or as a layer's description.

        Args:
            part: what it is called behind the layer's name; the activation's name if None.
        """
        name, settings = self.activation_name(given)
        if name == "linear":
            return flow if part is None else replace(flow, wire=self.module(part, nn.Identity, flow.wire), scores=None)
        label = name if part is None else part
        if name in ("softmax", "log_softmax", "glu"):
            axis = settings.get("axis", -1)
            if isinstance(axis, bool) or not isinstance(axis, int) or not -flow.rank <= axis < flow.rank:
                raise self.fail(f"has axis={str(axis)[:60]}, which rows of shape {flow.row} do not have")
            made = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax, "glu": nn.GLU}[name]
            dim = flow.axis(axis)
            wire = self.module(label, lambda: made(dim), flow.wire)
            scores = flow.wire if name == "softmax" and flow.rank == 2 else None
            return replace(flow, wire=wire, scores=scores)
        build = self._activation(name, settings)
        scores = flow.wire if name == "sigmoid" and flow.row == (1,) else None
        return replace(flow, wire=self.module(label, build, flow.wire), scores=scores)

    def activation_name(self, given: Any) -> tuple[str, Mapping[str, Any]]:
        """Name and settings of an activation."""
        settings: Mapping[str, Any] = {}
        if isinstance(given, dict):
            config = given.get("config")
            settings = config if isinstance(config, dict) else {}
            given = config if isinstance(config, str) else given.get("class_name")
        name = "linear" if given is None else given
        if not isinstance(name, str):
            raise self.fail(f"has activation {str(name)[:60]!r}, which is not known")
        aliases = {"swish": "silu", "hard_swish": "hard_silu", "Softmax": "softmax", "ReLU": "relu", "Activation": ""}
        name = aliases.get(name, name)
        if not name:
            return self.activation_name(settings.get("activation"))
        return name.removeprefix("keras>"), settings

    def _activation(self, name: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
        def setting(key: str, default: float, *others: str) -> float:
            value = next((settings[k] for k in (key, *others) if settings.get(k) is not None), default)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.fail(f"has {key}={str(value)[:60]}, not a number")
            return float(value)

        if name == "hard_sigmoid":
            kind = "hard_sigmoid" if self.building.major >= 3 else "hard_sigmoid_2"
            return nn.Hardsigmoid if kind == "hard_sigmoid" else lambda: KerasActivation(kind)
        if name in ("leaky_relu", "LeakyReLU"):
            slope = setting("negative_slope", 0.2 if name == "leaky_relu" else 0.3, "alpha")
            return lambda: nn.LeakyReLU(slope)
        if name in ("elu", "ELU", "celu"):
            alpha = setting("alpha", 1.0)
            return lambda: nn.CELU(alpha) if name == "celu" else nn.ELU(alpha)
        if name == "relu":
            most = settings.get("max_value")
            peak = None if most is None else setting("max_value", 0.0)
            slope, threshold = setting("negative_slope", 0.0, "alpha"), setting("threshold", 0.0)
            if (slope, threshold) == (0.0, 0.0) and peak in (None, 6.0):
                return nn.ReLU if peak is None else nn.ReLU6
            if peak is None and threshold == 0.0:
                return lambda: nn.LeakyReLU(slope)
            return lambda: KerasReLU(peak, slope, threshold)
        if name == "gelu":
            approximate = "tanh" if settings.get("approximate") else "none"
            return lambda: nn.GELU(approximate)
        if name in _PLAIN:
            return _PLAIN[name]
        if name in _BY_NAME:
            return lambda: KerasActivation(name)
        raise self.fail(f"has activation {name[:60]!r}, which is not known")


_PLAIN: Mapping[str, Callable[[], nn.Module]] = {
    "hard_shrink": nn.Hardshrink,
    "hard_silu": nn.Hardswish,
    "hard_tanh": nn.Hardtanh,
    "log_sigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "soft_shrink": nn.Softshrink,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanh_shrink": nn.Tanhshrink,
}
_BY_NAME = ("exponential", "sparse_plus", "sparse_sigmoid", "squareplus")


def reordered(kernel: Tensor) -> Tensor:
    """A kernel (space..., in, out) as torch has it, (out, in, space...).

    >>> import torch
    >>> reordered(torch.zeros(3, 5, 7, 8)).shape
    torch.Size([8, 7, 3, 5])
    """
    axes: Sequence[int] = range(kernel.dim() - 2)
    return kernel.permute(kernel.dim() - 1, kernel.dim() - 2, *axes)
