"""The optimizer of a Deeplearning4j zip, with its state: `updaterState.bin` as a torch optimizer.

The state is one vector. Parameters that follow each other and have equal updaters form a block; a block holds its
updater's parts one after the other, each in the layout of the parameters. Sources: BaseMultiLayerUpdater.java,
UpdaterUtils.java, UpdaterBlock.java and the `setStateViewArray` of ND4J's updaters.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.dl4j import (
    UPDATER,
    Fields,
    Parameters,
    Taken,
    build,
    get,
    open_parameters,
    read_configuration,
    typed,
)
from kindling.formats.files import file_digest
from kindling.formats.nd4j import open_vector
from kindling.formats.zipped import open_zip

_LOG = logging.getLogger("kindling.formats")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one of ND4J's updaters is called and set in torch."""

    optimizer: Callable[..., torch.optim.Optimizer]
    parts: tuple[str, ...]
    """Torch's names for the parts of the state, in the order of the vector."""
    settings: Mapping[str, tuple[str, float]]
    """Setting -> its name in the JSON and ND4J's default; `beta1` and `beta2` are joined into `betas`."""
    fixed: Mapping[str, Any]
    counts: bool = True
    """Whether torch counts steps for it."""


_RATE = {"lr": ("learningRate", 1e-3)}
_BETAS = {"beta1": ("beta1", 0.9), "beta2": ("beta2", 0.999), "eps": ("epsilon", 1e-8)}
_KINDS = {
    "Sgd": _Kind(torch.optim.SGD, (), _RATE, {}, counts=False),
    "Nesterovs": _Kind(
        torch.optim.SGD,
        ("momentum_buffer",),
        {**_RATE, "momentum": ("momentum", 0.9)},
        {"nesterov": True},
        counts=False,
    ),
    "Adam": _Kind(torch.optim.Adam, ("exp_avg", "exp_avg_sq"), {**_RATE, **_BETAS}, {}),
    "AMSGrad": _Kind(
        torch.optim.Adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {**_RATE, **_BETAS}, {"amsgrad": True}
    ),
    "AdaMax": _Kind(torch.optim.Adamax, ("exp_avg", "exp_inf"), {**_RATE, **_BETAS}, {}),
    "AdaGrad": _Kind(torch.optim.Adagrad, ("sum",), {"lr": ("learningRate", 0.1), "eps": ("epsilon", 1e-6)}, {}),
    "RmsProp": _Kind(
        torch.optim.RMSprop, ("square_avg",), {**_RATE, "alpha": ("rmsDecay", 0.95), "eps": ("epsilon", 1e-8)}, {}
    ),
    "AdaDelta": _Kind(
        torch.optim.Adadelta, ("square_avg", "acc_delta"), {"rho": ("rho", 0.95), "eps": ("epsilon", 1e-6)}, {"lr": 1.0}
    ),
}
_OLD_NAMES = {name.upper(): name for name in _KINDS}


@dataclass(frozen=True)
class StoredOptimizer:
    """Makes a torch optimizer of named parameters, in the state in which Deeplearning4j left its own.

    Picklable: it goes to the workers of a training. Parameters that the file does not know, those of a new head say,
    begin without state, with the settings of the file's last layer.
    """

    kind: str
    """ND4J's name of the updater."""
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(repr=False)
    """By parameter: torch's settings of its group."""
    state: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(repr=False)
    """By parameter: the parts of its state under torch's names."""
    steps: int
    """Iterations so far."""
    sha256: str
    """Of the file."""
    given: Mapping[str, Any]
    """Settings in place of the file's."""
    notes: tuple[str, ...]
    """What the file asks for and torch's optimizer does not do."""

    def __call__(self, named_parameters: Sequence[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        kind = _KINDS[self.kind]
        pairs = list(named_parameters)
        if not any(name in self.settings for name, _ in pairs):
            raise ConfigError(
                "optimizer",
                self,
                "knows none of the parameters that learn",
                "Give it with the model that was loaded from the same file, or one that begins with its layers",
            )
        last = list(self.settings.values())[-1]
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in pairs:
            settings = {**self.settings.get(name, last), **self.given}
            known = groups.setdefault(json.dumps(settings, sort_keys=True), {"params": [], **settings})
            known["params"].append(parameter)
        try:
            optimizer = kind.optimizer(list(groups.values()), **{**last, **self.given})
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "optimizer", self, f"has settings that torch does not take: {error}", "Mend them"
            ) from error
        for name, parameter in pairs:
            if kind.parts and name in self.state:
                optimizer.state[parameter] = self._state(kind, name, parameter)
        return optimizer

    def _state(self, kind: _Kind, name: str, parameter: Tensor) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for part, values in self.state[name].items():
            if values.shape != tuple(parameter.shape):
                raise ConfigError(
                    "optimizer",
                    self,
                    f"keeps {part} of shape {values.shape} for {name!r}, which is {tuple(parameter.shape)}",
                    "Give it with the model that was loaded from the same file",
                )
            # In the parameter's own layout in memory: fused steps ask for it.
            parts[part] = torch.empty_like(parameter, requires_grad=False).copy_(torch.from_numpy(values))
            if kind.optimizer is torch.optim.SGD:
                # ND4J keeps the step itself, -rate times what torch keeps.
                parts[part] /= -self.settings[name]["lr"]
        if kind.counts:
            parts["step"] = torch.tensor(float(self.steps))
        return parts


def dl4j_optimizer(
    path: str | Path,
    *,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    **settings: Any,
) -> StoredOptimizer:
    """The optimizer of a Deeplearning4j zip, as `Model.fit` takes it: training goes on where it stopped.

    Sgd, Nesterovs, Adam, AMSGrad, AdaMax, AdaGrad, RmsProp and AdaDelta map, each layer with its own settings; RmsProp
    adds its epsilon under the root in ND4J and behind it in torch. L2 regularisation that is added to the gradient (as
    of 1.0.0-beta4) becomes weight decay; what else the file asks for is in the result's `notes`, and logged.

    Args:
        path: the zip.
        input_shape: as it was given to `kindling.load`.
        settings: torch's, in place of the file's: `lr=1e-4`.
    Raises: FormatError, when the archive has no state, or one that has no counterpart here; ConfigError, for settings
        that the optimizer has not.

    >>> optimizer = dl4j_optimizer("model.zip", lr=1e-4)  # doctest: +SKIP
    >>> trained = kd.load("model.zip").fit(df, optimizer=optimizer, epochs=5)  # doctest: +SKIP
    """
    path = Path(path)
    with open_zip(path) as zipped:
        if UPDATER not in zipped:
            raise FormatError(
                f"{path} has no {UPDATER}: the model was saved without its updater. Start with a new one."
            )
        conf = read_configuration(zipped)
        with open_parameters(zipped) as parameters:
            builder, _, _ = build(path, conf, parameters, input_shape)
        with zipped.open(UPDATER) as stream:
            vector = open_vector(stream, f"{path}: {UPDATER}", zipped.size(UPDATER))
            state = vector.take(vector.total)
    if builder.frozen:
        raise FormatError(f"{path}: layer {builder.frozen[0]!r} is frozen, and its updater's state has no counterpart.")
    if folded := [part.layer for part in parameters.taken if part.role == "folded"]:
        raise FormatError(f"{path}: layer {folded[0]!r} has a parameter that is part of another here; so is its state.")
    moved = [part for part in parameters.taken if part.role != "fixed"]
    name = _kind_of_all(path, moved)
    kind = _KINDS[name]
    own = [_settings(path, kind, part) for part in moved]
    if unknown := sorted(set(settings) - set(inspect.signature(kind.optimizer).parameters)):
        raise ConfigError("settings", unknown, f"are none of torch's {kind.optimizer.__name__}", "Leave them out")
    # The state lies as the parameters do: building the net from it turns it as they were turned. Built from numbers
    # that stand for the parts of the vector, it tells whose each parameter is.
    whose = np.full(parameters.total, -1, np.float32)
    for place, part in enumerate(moved):
        whose[part.start : part.start + part.count] = place
    by_name: dict[str, dict[str, np.ndarray]] = {}
    by_parameter: dict[str, dict[str, Any]] = {}
    for made, values in _built(path, conf, whose, input_shape).items():
        place = int(values.reshape(-1)[0]) if values.size else -1
        if place >= 0 and (values == place).all():
            by_parameter[made], by_name[made] = own[place], {}
    for part_name, numbers in zip(kind.parts, _parts(path, parameters, state, kind), strict=True):
        for made, values in _built(path, conf, numbers, input_shape).items():
            if made in by_name:
                by_name[made][part_name] = values
    if kind.optimizer is torch.optim.SGD and kind.parts:
        if still := [made for made, values in by_parameter.items() if values["lr"] <= 0]:
            raise FormatError(f"{path}: with a learning rate of 0 the momentum of {still[0]!r} cannot be told.")
    notes = _notes(moved)
    for note in notes:
        _LOG.warning("%s: %s", path, note)
    return StoredOptimizer(name, by_parameter, by_name, _steps(conf), file_digest(path), settings, notes)


def _built(path: Path, conf: Fields, values: np.ndarray, input_shape: Any) -> dict[str, np.ndarray]:
    """The net's parameters where the vector of all holds these numbers."""
    twin, outputs, _ = build(path, conf, Parameters(values, str(path)), input_shape)
    made, _ = twin.net.finish({name: flow.wire for name, flow in outputs.items()})
    return {name: tensor.detach().numpy().copy() for name, tensor in made.named_parameters()}


def read_optimizer(
    path: Path,
    module: nn.Module,
    *,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> torch.optim.Optimizer:
    """A torch optimizer over all parameters of an imported net, in the state that Deeplearning4j left.

    Args:
        module: what `dl4j.read` made of it, or a graph traced from that.
        path, input_shape: of `dl4j_optimizer`.
    Raises: as `dl4j_optimizer`.
    """
    return dl4j_optimizer(path, input_shape=input_shape)(list(module.named_parameters()))


def _kind_of_all(path: Path, moved: Sequence[Taken]) -> str:
    """The one kind of updater of all layers."""
    kinds = {name for name, _ in map(_config, moved)}
    if len(kinds) != 1 or not kinds <= set(_KINDS):
        names = ", ".join(sorted(kinds)) or "none"
        raise FormatError(f"{path}: updater {names} has no counterpart here; one of {', '.join(_KINDS)} has.")
    (name,) = kinds
    return name


def _settings(path: Path, kind: _Kind, part: Taken) -> dict[str, Any]:
    """Torch's settings for one parameter."""
    _, fields = _config(part)
    settings: dict[str, Any] = dict(kind.fixed)
    if part.role == "bias" and isinstance(rate := part.fields.get("biasLearningRate"), int | float):
        fields = {**fields, "learningRate": rate}  # up to 0.9
    for ours, (theirs, default) in kind.settings.items():
        value = get(fields, theirs, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{path}: {theirs} of the updater is {value!r}, not a number; schedules are not read.")
        settings[ours] = float(value)
    if "beta1" in settings:
        settings["betas"] = (settings.pop("beta1"), settings.pop("beta2"))
    if decay := _regularisation(part).get("L2Regularization"):
        settings["weight_decay"] = decay
    return settings


def _regularisation(part: Taken) -> dict[str, float]:
    """What is added to a parameter's gradient or step, as of 1.0.0-beta4: coefficients by kind."""
    listed = get(part.fields, "regularizationBias" if part.role == "bias" else "regularization")
    found: dict[str, float] = {}
    for entry in listed if isinstance(listed, list) else []:
        kind, fields = typed(entry, {}, f"layer {part.layer!r}: the regularisation")
        key = {"L1Regularization": "l1", "L2Regularization": "l2", "WeightDecay": "coeff"}.get(kind, "")
        value = fields.get(key)
        if isinstance(value, dict):  # a schedule that does not move
            value = value.get("value")
        found[kind] = float(value) if isinstance(value, int | float) else math.nan
    return found


def _notes(moved: Sequence[Taken]) -> tuple[str, ...]:
    """What the layers ask for beside their updaters and is not done."""
    notes: dict[str, None] = {}
    for part in moved:
        bias = "Bias" if part.role == "bias" else ""
        for kind, value in _regularisation(part).items():
            if kind != "L2Regularization" or math.isnan(value):
                notes[f"{kind} of {value:g} is left out"] = None
        for key in (f"l1{bias}", f"l2{bias}"):
            amount = part.fields.get(key)
            if isinstance(amount, int | float) and amount > 0:
                # Added to the step behind the updater in those versions, which torch's weight decay does not do.
                notes[f"{key[:2]} of {amount:g} is left out"] = None
        clipping = part.fields.get("gradientNormalization")
        if isinstance(clipping, str) and clipping != "None":
            notes[f"gradient normalisation {clipping} is left out; see clip_norm and clip_value of fit"] = None
        policy = part.fields.get("learningRateSchedule")
        if policy:
            notes["the schedule of the learning rate is left out; see schedule of fit"] = None
    return tuple(notes)


def _config(part: Taken) -> tuple[str, Fields]:
    """Kind and settings of the updater of one parameter."""
    f = part.fields
    value = get(f, "biasUpdater") if part.role == "bias" else None
    value = value or get(f, "iupdater", "iUpdater", "updater")
    if isinstance(value, str):  # 0.8: the layer itself has the numbers
        numbers = {
            "learningRate": f.get("learningRate"),
            "momentum": f.get("momentum"),
            "epsilon": f.get("epsilon"),
            "beta1": f.get("adamMeanDecay"),
            "beta2": f.get("adamVarDecay"),
            "rmsDecay": f.get("rmsDecay"),
            "rho": f.get("rho"),
        }
        return _OLD_NAMES.get(value, value), {k: v for k, v in numbers.items() if isinstance(v, int | float)}
    name, fields = typed(value, {}, f"layer {part.layer!r}: the updater")
    return name, fields


def _parts(path: Path, parameters: Parameters, state: np.ndarray, kind: _Kind) -> list[np.ndarray]:
    """Each part of the state as a vector in the layout of the parameters, zero where nothing moves."""
    whole = [np.zeros(parameters.total, np.float32) for _ in kind.parts]
    at = 0
    for block in _blocks(parameters.taken):
        count = sum(part.count for part in block)
        for values in whole:
            if at + count > len(state):
                raise FormatError(f"{path}: {UPDATER} holds {len(state):,} numbers, fewer than its updaters keep.")
            values[block[0].start : block[0].start + count] = state[at : at + count]
            at += count
    if at != len(state):
        raise FormatError(f"{path}: {UPDATER} holds {len(state):,} numbers, its updaters keep {at:,}.")
    return whole


def _blocks(taken: Sequence[Taken]) -> list[list[Taken]]:
    """Neighbours with equal updaters together; what no updater moves stands between blocks."""
    blocks: list[list[Taken]] = []
    last = None
    for part in taken:
        if part.role == "fixed":
            last = None
            continue
        rate = part.fields.get("biasLearningRate" if part.role == "bias" else "learningRate")
        now = json.dumps([*_config(part), rate], sort_keys=True, default=str)
        if now != last:
            blocks.append([])
        blocks[-1].append(part)
        last = now
    return blocks


def _steps(conf: Fields) -> int:
    """Iterations so far."""
    counts = [conf.get("iterationCount")]
    for part in conf.get("confs") or []:
        counts += [part.get("iterationCount")] if isinstance(part, dict) else []
    return max((count for count in counts if isinstance(count, int) and count >= 0), default=0)
