"""Solvers: learning rates and updates step by step against Caffe's formulas, written out in numpy."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kindling.errors import FormatError
from kindling.formats.caffe import Solver, read_solver
from kindling.formats.caffe.prototxt import parse
from kindling.formats.caffe.solver import solver_of

RATES: dict[str, tuple[dict[str, Any], Any]] = {
    "fixed": ({}, lambda i: 0.1),
    "step": ({"gamma": 0.5, "stepsize": 7}, lambda i: 0.1 * 0.5 ** (i // 7)),
    "exp": ({"gamma": 0.9}, lambda i: 0.1 * 0.9**i),
    "inv": ({"gamma": 0.01, "power": 0.75}, lambda i: 0.1 * (1 + 0.01 * i) ** -0.75),
    "poly": ({"power": 2.0, "max_iterations": 40}, lambda i: 0.1 * (1 - i / 40) ** 2),
    "sigmoid": ({"gamma": 0.3, "stepsize": 15}, lambda i: 0.1 / (1 + math.exp(-0.3 * (i - 15)))),
}


@pytest.mark.parametrize("policy", RATES)
def test_learning_rates_follow_the_documented_formulas(policy: str) -> None:
    settings, want = RATES[policy]
    solver = Solver(base_lr=0.1, policy=policy, **settings)
    for iteration in range(40):
        assert solver.rate(iteration) == pytest.approx(want(iteration), rel=1e-12)


@pytest.mark.parametrize("values", [(5, 9, 20), (5, 5, 20), (9, 3), (0, 0, 0)])
def test_multistep_steps_as_caffes_counter_does(values: tuple[int, ...]) -> None:
    solver = Solver(base_lr=1.0, policy="multistep", gamma=0.5, stepvalues=values)
    step = 0
    for iteration in range(30):
        if step < len(values) and iteration >= values[step]:
            step += 1
        assert solver.rate(iteration) == 0.5**step


def test_a_rate_may_warm_up() -> None:
    solver = Solver(base_lr=0.4, warmup_lr=0.1, warmup_iterations=3, policy="poly", power=2.0, max_iterations=100)
    assert [round(solver.rate(i), 6) for i in range(4)] == [0.1, 0.2, 0.3, round(0.4 * 0.97**2, 6)]


def numpy_step(
    solver: Solver, w: np.ndarray, g: np.ndarray, state: dict[str, Any], it: int, lr: float, d: float
) -> Any:
    """One update of one blob, in the order of Caffe's solvers."""
    decay = solver.weight_decay * d
    g = g + decay * (w if solver.regularization == "L2" else np.sign(w))
    rate = solver.rate(it) * lr
    h = state.setdefault("h", np.zeros_like(w))
    h2 = state.setdefault("h2", np.zeros_like(w))
    m = solver.momentum
    if solver.method == "SGD":
        h[:] = rate * g + m * h
        update = h
    elif solver.method == "Nesterov":
        old = h.copy()
        h[:] = rate * g + m * h
        update = (1 + m) * h - m * old
    elif solver.method == "AdaGrad":
        h[:] = h + g**2
        update = rate * g / (np.sqrt(h) + solver.delta)
    elif solver.method == "RMSProp":
        h[:] = (1 - solver.rms_decay) * g**2 + solver.rms_decay * h
        update = rate * g / (np.sqrt(h) + solver.delta)
    elif solver.method == "AdaDelta":
        h[:] = (1 - m) * g**2 + m * h
        change = g * np.sqrt((solver.delta + h2) / (solver.delta + h))
        h2[:] = (1 - m) * change**2 + m * h2
        update = rate * change
    else:
        h[:] = (1 - m) * g + m * h
        h2[:] = (1 - solver.momentum2) * g**2 + solver.momentum2 * h2
        correction = math.sqrt(1 - solver.momentum2 ** (it + 1)) / (1 - m ** (it + 1))
        update = rate * correction * h / (np.sqrt(h2) + solver.delta)
    return w - update


METHODS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Nesterov": {"momentum": 0.9},
    "AdaGrad": {"delta": 1e-3},
    "RMSProp": {"rms_decay": 0.95, "delta": 1e-4},
    "AdaDelta": {"momentum": 0.95, "delta": 1e-6},
    "Adam": {"momentum": 0.9, "momentum2": 0.99, "delta": 1e-4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("regularization", ["L2", "L1"])
@pytest.mark.parametrize("clip", [-1.0, 3.0])
def test_updates_follow_the_documented_formulas(method: str, regularization: str, clip: float) -> None:
    solver = Solver(
        method=method, base_lr=0.05, policy="step", gamma=0.5, stepsize=3, weight_decay=0.01,
        regularization=regularization, clip_gradients=clip, **METHODS[method],
    )  # fmt: skip
    rng = np.random.default_rng(1)
    factors = {"w": (1.0, 1.0), "b": (2.0, 0.0), "fixed": (0.0, 1.0)}
    want = {name: rng.standard_normal(shape) for name, shape in (("w", (3, 4)), ("b", (3,)), ("fixed", (2,)))}
    weights = {name: nn.Parameter(torch.tensor(value)) for name, value in want.items()}
    optimizer = solver.optimizer(weights.items(), factors)
    scheduler = solver.scheduler(optimizer)
    states: dict[str, dict[str, Any]] = {name: {} for name in want}
    fixed = want["fixed"].copy()
    for iteration in range(10):
        gradients = {name: rng.standard_normal(value.shape) for name, value in want.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = clip / norm if 0 <= clip < norm else 1.0
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradients[name])
        optimizer.step()
        scheduler.step()
        for name, (lr, decay) in factors.items():
            want[name] = numpy_step(solver, want[name], gradients[name] * scale, states[name], iteration, lr, decay)
            np.testing.assert_allclose(weights[name].detach().numpy(), want[name], rtol=1e-10)
    np.testing.assert_array_equal(weights["fixed"].detach().numpy(), fixed)


def test_a_step_may_stand_for_several_batches() -> None:
    """Caffe adds gradients up, clips the sum and divides; a mean of them must come to the same."""
    solver = Solver(base_lr=0.1, iter_size=4, clip_gradients=2.0, momentum=0.5)
    ends = []
    for averaged in (True, False):
        weight = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
        optimizer = solver.optimizer([weight], averaged=averaged)
        for total in (torch.tensor([4.0, 8.0]), torch.tensor([0.5, 0.1])):
            weight.grad = (total / 4 if averaged else total).double()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1])
    norm = math.sqrt(80)
    first = 0.1 * np.array([4.0, 8.0]) * 2 / norm / 4
    second = 0.1 * np.array([0.5, 0.1]) / 4 + 0.5 * first
    np.testing.assert_allclose(ends[0], np.array([1.0, -1.0]) - first - second, rtol=1e-6)


def test_an_optimizer_goes_on_from_its_state() -> None:
    for method, settings in METHODS.items():
        solver = Solver(method=method, base_lr=0.1, policy="exp", gamma=0.9, **settings)
        torch.manual_seed(0)
        gradients = torch.randn(6, 3)

        def run(weight: nn.Parameter, solver: Solver, steps: range, state: Any, gradients: Any) -> Any:
            optimizer = solver.optimizer([weight])
            scheduler = solver.scheduler(optimizer)
            if state is not None:
                optimizer.load_state_dict(state[0])
                scheduler.load_state_dict(state[1])
            for step in steps:
                weight.grad = gradients[step].clone()
                optimizer.step()
                scheduler.step()
            return pickle.loads(pickle.dumps((optimizer.state_dict(), scheduler.state_dict())))

        whole, parts = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        run(whole, solver, range(6), None, gradients)
        state = run(parts, solver, range(3), None, gradients)
        run(parts, solver, range(3, 6), state, gradients)
        torch.testing.assert_close(whole, parts)


def test_modules_and_lists_are_taken_as_well() -> None:
    solver = Solver(base_lr=0.1)
    net = nn.Linear(2, 3)
    groups = solver.optimizer(net, {"weight": (1, 1), "bias": (2, 0)}).param_groups
    assert [(group["lr"], group["decay_mult"]) for group in groups] == [(0.1, 1), (0.2, 0)]
    groups = solver.optimizer(list(net.parameters()), [(1, 1), (3, 1)]).param_groups
    assert [round(group["lr"], 6) for group in groups] == [0.1, 0.3]
    with pytest.raises(FormatError, match="1 pairs of multipliers for 2 parameters"):
        solver.optimizer(list(net.parameters()), [(1, 1)])
    assert pickle.loads(pickle.dumps(solver)) == solver


FULL = """
net: "nets/train_val.prototxt"
test_iter: 10 test_iter: 20 test_interval: 500
test_state: { stage: "a" } test_state: { stage: "b" level: 2 }
base_lr: 0.01 lr_policy: "multistep" gamma: 0.1 stepvalue: 100 stepvalue: 200 max_iter: 1000
momentum: 0.9 weight_decay: 0.0005 regularization_type: "L1" iter_size: 2 clip_gradients: 35
display: 20 snapshot: 5000 snapshot_prefix: "x" random_seed: 1701 solver_mode: GPU type: "Nesterov"
weights: "a.caffemodel,b.caffemodel"
"""


def test_a_solver_file_says_everything(tmp_path: Path) -> None:
    file = tmp_path / "solver.prototxt"
    file.write_text(FULL)
    solver = read_solver(file)
    assert (solver.method, solver.base_lr, solver.policy, solver.gamma) == ("Nesterov", 0.01, "multistep", 0.1)
    assert (solver.stepvalues, solver.max_iterations, solver.iter_size) == ((100, 200), 1000, 2)
    assert (solver.momentum, solver.weight_decay, solver.regularization) == (0.9, 0.0005, "L1")
    assert (solver.test_iterations, solver.test_interval, solver.clip_gradients) == ((10, 20), 500, 35)
    assert [(state.stages, state.level) for state in solver.test_states] == [(("a",), 0), (("b",), 2)]
    assert (solver.random_seed, solver.weights) == (1701, ("a.caffemodel", "b.caffemodel"))
    with pytest.raises(FormatError, match="is neither under"):
        solver.net_path()
    net = 'layer { name: "d" type: "DummyData" top: "x" dummy_data_param { shape { dim: 2 dim: 3 } } }'
    net += 'layer { name: "r" type: "ReLU" bottom: "x" top: "r" include { phase: TRAIN } }'
    (tmp_path / "train_val.prototxt").write_text(net)
    assert list(solver.read_net().signature.outputs) == ["r"]


def test_the_net_is_looked_for_only_with_the_solver(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "net.prototxt").write_text("")
    for named in (str(tmp_path / "net.prototxt"), "../net.prototxt", "..\\\\net.prototxt"):
        (inside / "solver.prototxt").write_text(f'net: "{named}"')
        with pytest.raises(FormatError, match="neither under"):
            read_solver(inside / "solver.prototxt").net_path()


def test_a_net_may_stand_in_the_solver_itself() -> None:
    text = """net_param { layers { name: "d" type: DUMMY_DATA top: "x" dummy_data_param { shape { dim: 2 dim: 3 } } }
                          layers { name: "r" type: RELU bottom: "x" top: "r" include { stage: "s" } } }
              train_state { stage: "s" }"""
    solver = solver_of(parse(text, "SolverParameter"))
    for _ in range(2):
        assert list(solver.read_net().signature.outputs) == ["r"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('type: "Adamm"', "type 'Adamm' cannot work. Did you mean 'Adam'"),
        ('lr_policy: "steps"', "lr_policy 'steps' cannot work. Did you mean 'step'"),
        ('lr_policy: "step" gamma: 0.1', "stepsize '0' cannot work. The policy 'step' needs one"),
        ('lr_policy: "poly"', "max_iter '0'"),
        ('regularization_type: "L3"', "regularization_type 'L3' cannot work. Use L1 or L2"),
        ("iter_size: 0", "iter_size '0'"),
        ("base_lr: nan", "base_lr 'nan'"),
        ('type: "AdaGrad" momentum: 0.9', "momentum '0.9' cannot work. AdaGrad takes none"),
        ('type: "Adam" momentum2: 1', "momentum2 '1.0'"),
        ('net: "a" train_net: "b"', "names its net more than once: net, train_net"),
        ('type: "SGD" solver_type: ADAM', "both type and solver_type"),
        ("base_rl: 3", "line 1: SolverParameter has no field 'base_rl'. Did you mean 'base_lr'"),
    ],
)
def test_solvers_that_cannot_work_are_refused(text: str, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        solver_of(parse(text, "SolverParameter"))


def test_a_rate_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(FormatError, match="beyond all numbers"):
        Solver(policy="exp", gamma=1e300).rate(10)
