"""`solver.prototxt`: optimizer, learning rate, regularisation, iterations, as a plain dataclass.

The optimizer itself is in `optim.py`. What a solver says about snapshots and logs is kept for those who want it, and
nothing here acts on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kindling.errors import FormatError, did_you_mean
from kindling.formats.caffe import prototxt
from kindling.formats.caffe.schema import Message
from kindling.formats.caffe.select import State

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from kindling.formats.caffe.optim import CaffeOptimizer, CaffeSchedule
    from kindling.formats.models import Imported

POLICIES = ("fixed", "step", "exp", "inv", "multistep", "poly", "sigmoid")
_METHODS = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")
_OLD_METHODS = {
    "SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp", "ADADELTA": "AdaDelta",
    "ADAM": "Adam",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """How Caffe would train.

    >>> solver = Solver(base_lr=0.1, policy="step", gamma=0.5, stepsize=10)
    >>> [solver.rate(iteration) for iteration in (0, 9, 10, 20)]
    [0.1, 0.1, 0.05, 0.025]
    """

    method: str = "SGD"
    """`"SGD"`, `"Nesterov"`, `"AdaGrad"`, `"RMSProp"`, `"AdaDelta"` or `"Adam"`."""
    base_lr: float = 0.01
    policy: str = "fixed"
    """How the learning rate falls: `"fixed"`, `"step"`, `"exp"`, `"inv"`, `"multistep"`, `"poly"` or `"sigmoid"`."""
    gamma: float = 0.0
    power: float = 0.0
    stepsize: int = 0
    """Iterations between two steps of the policy `"step"`; the middle of `"sigmoid"`."""
    stepvalues: tuple[int, ...] = ()
    """Iterations at which the policy `"multistep"` steps."""
    warmup_iterations: int = 0
    """Iterations in which the rate rises in a line from `warmup_lr` to `base_lr` (Intel's Caffe)."""
    warmup_lr: float = 0.0
    momentum: float = 0.0
    """Also AdaDelta's decay, and Adam's first one."""
    momentum2: float = 0.999
    delta: float = 1e-8
    rms_decay: float = 0.99
    weight_decay: float = 0.0
    regularization: str = "L2"
    """`"L2"` or `"L1"`."""
    clip_gradients: float = -1.0
    """Largest norm of all gradients together; below zero, they are left alone."""
    max_iterations: int = 0
    iter_size: int = 1
    """Batches whose gradients are added up for one iteration."""
    test_interval: int = 0
    """Iterations between two tests; 0 for none."""
    test_iterations: tuple[int, ...] = ()
    """Batches of each test net."""
    test_initialization: bool = True
    display: int = 0
    average_loss: int = 1
    snapshot: int = 0
    snapshot_prefix: str = ""
    random_seed: int | None = None
    net: str | None = None
    """Path of the net, as the solver has it."""
    test_nets: tuple[str, ...] = ()
    train_state: State = field(default_factory=partial(State, phase="TRAIN"))
    test_states: tuple[State, ...] = ()
    net_param: Message | None = None
    """The net, where it stands in the solver itself."""
    weights: tuple[str, ...] = ()
    """Caffemodels to begin with, as the solver has them."""
    path: Path | None = None
    """The solver's own file."""

    def __post_init__(self) -> None:
        self._check(self.method in _METHODS, "type", self.method, did_you_mean(self.method, _METHODS))
        self._check(self.policy in POLICIES, "lr_policy", self.policy, did_you_mean(self.policy, POLICIES))
        self._check(self.regularization in ("L1", "L2"), "regularization_type", self.regularization, " Use L1 or L2.")
        numbers = {
            "base_lr": self.base_lr, "gamma": self.gamma, "power": self.power, "momentum": self.momentum,
            "momentum2": self.momentum2, "delta": self.delta, "rms_decay": self.rms_decay,
            "weight_decay": self.weight_decay, "clip_gradients": self.clip_gradients, "warmup_start_lr": self.warmup_lr,
        }  # fmt: skip
        for name, number in numbers.items():
            self._check(math.isfinite(number), name, number, "")
        counts = {
            "max_iter": self.max_iterations, "test_interval": self.test_interval, "warmup_iter": self.warmup_iterations,
            "snapshot": self.snapshot,
        }  # fmt: skip
        for name, count in counts.items():
            self._check(count >= 0, name, count, " Use 0 or more.")
        self._check(self.iter_size > 0, "iter_size", self.iter_size, " Use 1 or more.")
        if self.policy in ("step", "exp", "inv", "multistep", "sigmoid"):
            self._check(self.gamma >= 0, "gamma", self.gamma, " Use 0 or more.")
        if self.policy in ("step", "sigmoid"):
            self._check(self.stepsize > 0, "stepsize", self.stepsize, f" The policy {self.policy!r} needs one.")
        if self.policy == "poly":
            self._check(self.max_iterations > 0, "max_iter", self.max_iterations, " The policy 'poly' needs one.")
        if self.method in ("AdaGrad", "RMSProp"):
            self._check(self.momentum == 0, "momentum", self.momentum, f" {self.method} takes none.")
        if self.method == "RMSProp":
            self._check(0 <= self.rms_decay < 1, "rms_decay", self.rms_decay, " Use 0 to below 1.")
        if self.method == "Adam":
            for name, number in (("momentum", self.momentum), ("momentum2", self.momentum2)):
                self._check(0 <= number < 1, name, number, " Adam takes 0 to below 1.")

    def _check(self, fits: bool, field: str, value: object, hint: str) -> None:
        if not fits:
            where = f"{self.path}: " if self.path is not None else ""
            raise FormatError(f"{where}a solver with {field} {str(value)[:60]!r} cannot work.{hint}")

    # What it says

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0, by the formulas of Caffe's `SGDSolver`."""
        if iteration < self.warmup_iterations:
            done = iteration / self.warmup_iterations
            return self.base_lr * done + self.warmup_lr * (1 - done)
        return self.base_lr * self._share(iteration)

    def _share(self, iteration: int) -> float:
        try:
            if self.policy == "step":
                return float(self.gamma ** (iteration // self.stepsize))
            if self.policy == "exp":
                return float(self.gamma**iteration)
            if self.policy == "inv":
                return float((1 + self.gamma * iteration) ** -self.power)
            if self.policy == "multistep":
                return float(self.gamma ** self._steps(iteration))
            if self.policy == "poly":
                return float((1 - min(iteration / self.max_iterations, 1.0)) ** self.power)
            if self.policy == "sigmoid":
                return 1 / (1 + math.exp(-self.gamma * (iteration - self.stepsize)))
        except (OverflowError, ZeroDivisionError):
            raise FormatError(
                f"the learning rate of iteration {iteration} is beyond all numbers: {self.policy} with gamma "
                f"{self.gamma} and power {self.power}."
            ) from None
        return 1.0

    def _steps(self, iteration: int) -> int:
        """Steps that were taken; Caffe takes one an iteration, in the order they are listed."""
        steps, at = 0, -1
        for value in self.stepvalues:
            at = max(value, at + 1)
            if at > iteration:
                break
            steps += 1
        return steps

    # What it makes

    def optimizer(
        self,
        parameters: nn.Module | Iterable[Any],
        multipliers: Mapping[str, tuple[float, float]] | Iterable[tuple[float, float]] | None = None,
        *,
        averaged: bool = True,
    ) -> CaffeOptimizer:
        """Caffe's optimizer, with a group for every pair of factors on learning rate and weight decay.

        Args:
            parameters: a module, pairs of name and tensor, or tensors.
            multipliers: (lr_mult, decay_mult) by name, or in the order of tensors; `Imported.training.multipliers`.
            averaged: whether a step sees the mean of the gradients of `iter_size` batches, or their sum.
        """
        from torch import nn

        from kindling.formats.caffe.optim import CaffeOptimizer

        pairs: list[tuple[str, Tensor]] = []
        listed: Iterable[Any] = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
        for number, entry in enumerate(listed):
            pairs.append((str(entry[0]), entry[1]) if isinstance(entry, tuple) else (str(number), entry))
        if multipliers is None:
            factors: Mapping[str, tuple[float, float]] = {}
        elif isinstance(multipliers, Mapping):
            factors = multipliers
        else:
            given = list(multipliers)
            if len(given) != len(pairs):
                raise FormatError(f"there are {len(given)} pairs of multipliers for {len(pairs)} parameters.")
            factors = {name: pair for (name, _), pair in zip(pairs, given, strict=True)}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, tensor in pairs:
            groups.setdefault(factors.get(name, (1.0, 1.0)), []).append(tensor)
        start = self.rate(0)
        return CaffeOptimizer(
            [
                {"params": tensors, "lr": start * rate, "lr_mult": rate, "decay_mult": decay}
                for (rate, decay), tensors in groups.items()
            ],
            method=self.method,
            lr=start,
            momentum=self.momentum,
            momentum2=self.momentum2,
            delta=self.delta,
            rms_decay=self.rms_decay,
            weight_decay=self.weight_decay,
            regularization=self.regularization,
            clip_gradients=self.clip_gradients,
            iter_size=self.iter_size,
            averaged=averaged,
        )

    def scheduler(self, optimizer: Optimizer) -> CaffeSchedule:
        """A torch scheduler that is stepped after every iteration."""
        from kindling.formats.caffe.optim import CaffeSchedule

        return CaffeSchedule(optimizer, self.rate)

    def read_net(self, state: State | None = None, **options: Any) -> Imported:
        """The net that the solver trains, from the solver itself or from a file that lies beside it.

        Args:
            state: whose layers; `train_state` if None.
            options: as `kindling.formats.caffe.read` takes them.
        Raises: FormatError, when the net is not there.
        """
        from kindling.formats.caffe import read

        state = state or self.train_state
        chosen = {"phase": state.phase, "level": state.level, "stages": state.stages, **options}
        return read(self.net_path() if self.net_param is None else self.net_param, **chosen)

    def net_path(self) -> Path:
        """The file with the net: under the solver's folder by the path it gives, or beside the solver.

        Raises: FormatError, when it is in neither place.
        """
        folder = self.path.parent if self.path is not None else Path()
        named = PurePosixPath((self.net or "").replace("\\", "/"))
        inside = not named.is_absolute() and ".." not in named.parts
        for candidate in ([folder / named] if inside else []) + [folder / named.name]:
            if named.name and candidate.is_file():
                return candidate
        raise FormatError(f"the solver's net {self.net!r} is neither under {folder} nor beside the solver.")


def read_solver(path: str | Path) -> Solver:
    """A `solver.prototxt`.

    Raises: FormatError, naming the line for what is no solver, and the field for what cannot work.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > prototxt.MAX_BYTES:
            raise FormatError(f"{file} is too large for a solver: {size:,} bytes.")
        text = file.read_bytes()
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error}.") from error
    return solver_of(prototxt.parse(text, "SolverParameter", str(file)), file)


def solver_of(message: Message, path: Path | None = None) -> Solver:
    """The solver of a SolverParameter message.

    >>> solver_of(prototxt.parse('base_lr: 0.1 lr_policy: "fixed" solver_type: ADAM', "SolverParameter")).method
    'Adam'
    """
    nets = [name for name in ("net", "net_param", "train_net", "train_net_param") if message.has(name)]
    if len(nets) > 1:
        raise FormatError(f"{path or 'the solver'} names its net more than once: {', '.join(nets)}. Keep one.")
    method = message.get("type")
    if message.has("solver_type"):
        if message.has("type"):
            raise FormatError(f"{path or 'the solver'} has both type and solver_type. Keep type.")
        method = _OLD_METHODS[message.get("solver_type")]
    seed = message.get("random_seed")
    state = State.of(message.get("train_state"), "TRAIN") if message.has("train_state") else State(phase="TRAIN")
    net_param = next((message.get(name) for name in ("net_param", "train_net_param") if message.has(name)), None)
    return Solver(
        method=method,
        base_lr=message.get("base_lr"),
        policy=message.get("lr_policy") or "fixed",
        gamma=message.get("gamma"),
        power=message.get("power"),
        stepsize=message.get("stepsize"),
        stepvalues=tuple(message.all("stepvalue")),
        warmup_iterations=message.get("warmup_iter"),
        warmup_lr=message.get("warmup_start_lr"),
        momentum=message.get("momentum"),
        momentum2=message.get("momentum2"),
        delta=message.get("delta"),
        rms_decay=message.get("rms_decay"),
        weight_decay=message.get("weight_decay"),
        regularization=message.get("regularization_type"),
        clip_gradients=message.get("clip_gradients"),
        max_iterations=message.get("max_iter"),
        iter_size=message.get("iter_size"),
        test_interval=message.get("test_interval"),
        test_iterations=tuple(message.all("test_iter")),
        test_initialization=message.get("test_initialization"),
        display=message.get("display"),
        average_loss=message.get("average_loss"),
        snapshot=message.get("snapshot"),
        snapshot_prefix=message.get("snapshot_prefix"),
        random_seed=seed if seed >= 0 else None,
        net=message.get("net") or message.get("train_net") or None,
        test_nets=tuple(message.all("test_net")),
        train_state=state,
        test_states=tuple(State.of(each) for each in message.all("test_state")),
        net_param=net_param,
        weights=tuple(name for entry in message.all("weights") for name in entry.split(",") if name),
        path=path,
    )
