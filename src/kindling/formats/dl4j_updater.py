"""The optimizer of a Deeplearning4j zip, with its state: `updaterState.bin` as a torch optimizer.

The state is one vector. Parameters that follow each other and have equal updaters form a block; a block holds its
updater's parts one after the other, each in the layout of the parameters. Sources: BaseMultiLayerUpdater.java,
UpdaterUtils.java, UpdaterBlock.java and the `setStateViewArray` of ND4J's updaters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import FormatError
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
from kindling.formats.nd4j import open_vector
from kindling.formats.zipped import open_zip


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


def read_optimizer(
    path: Path,
    module: nn.Module,
    *,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> torch.optim.Optimizer:
    """A torch optimizer over the parameters of an imported net, in the state that Deeplearning4j left.

    Sgd, Nesterovs, Adam, AMSGrad, AdaMax, AdaGrad, RmsProp and AdaDelta map; RmsProp adds its epsilon under the root
    in ND4J and behind it in torch. Weight decay and schedules are not set.

    Args:
        path: the zip.
        module: what `dl4j.read` made of it, or a graph traced from that.
        input_shape: as it was given to `dl4j.read`.
    Raises: FormatError, when the archive has no state, or one that has no counterpart here.
    """
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
    kind, settings = _updater(path, parameters.taken)
    parts = _parts(path, parameters, state, kind)
    known = dict(module.named_parameters())
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in known}
    for part, values in zip(kind.parts, parts, strict=True):
        # The state lies as the parameters do: building the net from it turns it as they were turned.
        twin, outputs, _ = build(path, conf, Parameters(values, str(path)), input_shape)
        made, _ = twin.net.finish({name: flow.wire for name, flow in outputs.items()})
        for name, tensor in made.named_parameters():
            if name in known:
                if tensor.shape != known[name].shape:
                    raise FormatError(f"{path}: {name!r} is {tuple(known[name].shape)} in the net that was given.")
                by_name[name][part] = tensor.detach().clone()
    return _optimizer(path, module, kind, settings, by_name, _steps(conf))


def _updater(path: Path, taken: Sequence[Taken]) -> tuple[_Kind, dict[str, Any]]:
    """The one kind of updater of all layers, and the first one's settings."""
    found = [_config(part) for part in taken if part.role != "fixed"]
    kinds = {name for name, _ in found}
    if len(kinds) != 1 or not kinds <= set(_KINDS):
        names = ", ".join(sorted(kinds)) or "none"
        raise FormatError(f"{path}: updater {names} has no counterpart here; one of {', '.join(_KINDS)} has.")
    (name,), fields = kinds, found[0][1]
    kind = _KINDS[name]
    settings: dict[str, Any] = dict(kind.fixed)
    for ours, (theirs, default) in kind.settings.items():
        value = get(fields, theirs, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{path}: {theirs} of the updater is {value!r}, not a number; schedules are not read.")
        settings[ours] = float(value)
    if "beta1" in settings:
        settings["betas"] = (settings.pop("beta1"), settings.pop("beta2"))
    return kind, settings


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


def _optimizer(
    path: Path,
    module: nn.Module,
    kind: _Kind,
    settings: Mapping[str, Any],
    state: Mapping[str, Mapping[str, Tensor]],
    steps: int,
) -> torch.optim.Optimizer:
    try:
        optimizer = kind.optimizer(list(module.parameters()), **settings)
    except ValueError as error:
        raise FormatError(f"{path}: the updater's settings cannot work in torch: {error}.") from error
    for name, parameter in module.named_parameters():
        parts = dict(state.get(name, {}))
        if not kind.parts or not parts:
            continue
        if kind.optimizer is torch.optim.SGD:
            if settings["lr"] <= 0:
                raise FormatError(f"{path}: with a learning rate of {settings['lr']} the momentum cannot be told.")
            # ND4J keeps the step itself, -rate times what torch keeps.
            parts = {part: tensor / -settings["lr"] for part, tensor in parts.items()}
        if kind.counts:
            parts["step"] = torch.tensor(float(steps))
        optimizer.state[parameter] = parts
    return optimizer
