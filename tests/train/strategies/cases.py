"""Every strategy as it is tested: with its reference for one worker, its bytes, and what may be asked of it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from kindling.train.checkpoint import decode, encode
from kindling.train.strategies import (
    AllReduce,
    Comms,
    DiLoCo,
    Downpour,
    ParameterAveraging,
    Replica,
    State,
    Strategy,
    ThresholdSharing,
)

Batch = tuple[Tensor, Tensor]
Batches = list[list[Batch]]
"""By step and worker; an empty batch is a step without rows."""
LR, MOMENTUM = 0.1, 0.9


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, foreach=False)


def _template(batch_norm: bool) -> nn.Module:
    torch.manual_seed(0)  # torch's generator is shared by threads: nets are drawn here, and copied in the workers
    middle = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 5))


_TEMPLATES = {batch_norm: _template(batch_norm) for batch_norm in (False, True)}


def net(batch_norm: bool = False) -> nn.Module:
    return copy.deepcopy(_TEMPLATES[batch_norm])


def rows(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def uneven(world: int, steps: int) -> Batches:
    """Workers with different numbers of rows."""
    return [[rows(4 + rank, 10 * step + rank) for rank in range(world)] for step in range(steps)]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in module.state_dict().values()])


def backward(module: nn.Module, batch: Batch, scale: float = 1.0) -> None:
    (nn.functional.cross_entropy(module(batch[0]), batch[1]) * scale).backward()


def step_of(strategy: Strategy, replica: Replica, state: State, batches: list[Batch], comms: Comms) -> State:
    """One step, as the training loop takes it."""
    rows_W = np.array([len(x) for x, _ in batches])
    batch = batches[comms.rank]
    replica.optimizer.zero_grad()
    if len(batch[0]):
        strategy.on_backward(replica, state, rows_W, comms)
        backward(replica.module, batch, strategy.loss_scale(rows_W, comms.rank, state))
    state = strategy.on_gradients(replica, state, rows_W, comms)
    if len(batch[0]) or strategy.steps_together(state):
        replica.optimizer.step()
    return strategy.on_step(replica, state, rows_W, comms)


def train(
    strategy: Strategy, comms: Comms, epochs: Sequence[Batches], module: nn.Module, broken_after: int | None = None
) -> Replica:
    """Train through epochs of batches; `broken_after` so many steps all is saved, and a new worker goes on."""
    replica = Replica(module, sgd(module))
    state = strategy.begin(replica, strategy.init(replica), comms)
    steps = 0
    for batches in epochs:
        for step in batches:
            state = step_of(strategy, replica, state, step, comms)
            steps += 1
            if steps == broken_after:
                saved = stored(snapshot(strategy, replica, state, comms))
                strategy.close(replica)
                replica, state = restored(strategy, saved, comms)
        state = strategy.on_epoch(replica, state, comms)
    strategy.close(replica)
    return replica


def snapshot(strategy: Strategy, replica: Replica, state: State, comms: Comms) -> dict[str, Any]:
    """What the loop saves."""
    state = strategy.settle(replica, state, comms)
    optimizer = replica.optimizer.state_dict()
    return {"module": dict(replica.module.state_dict()), "optimizer": optimizer, "strategy": state}


def stored(state: dict[str, Any]) -> Any:
    """What comes back of a state that was written down: JSON and tensors, nothing else."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(state, tensors))
    return decode(json.loads(text), load(save({name: t.contiguous().clone() for name, t in tensors.items()})))


def restored(strategy: Strategy, saved: dict[str, Any], comms: Comms) -> tuple[Replica, State]:
    module = net(any("running" in name for name in saved["module"]))
    module.load_state_dict(saved["module"])
    replica = Replica(module, sgd(module))
    replica.optimizer.load_state_dict(saved["optimizer"])
    return replica, strategy.begin(replica, saved["strategy"], comms)


# One worker, in the words of the papers -------------------------------------------------------------------------------


def plain(epochs: Sequence[Batches], module: nn.Module, change: Callable[[nn.Module], None] | None = None) -> None:
    """Plain torch; `change` may do something to the gradients before each step."""
    optimizer = sgd(module)
    for batches in epochs:
        for (batch,) in batches:
            optimizer.zero_grad()
            backward(module, batch)
            if change is not None:
                change(module)
            optimizer.step()


def halved(epochs: Sequence[Batches], module: nn.Module) -> None:
    def halve(module: nn.Module) -> None:
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.to(torch.bfloat16).float()

    plain(epochs, module, halve)


def factored(epochs: Sequence[Batches], module: nn.Module, rank: int = 2, whole_steps: int = 0) -> None:
    """Vogels et al.: the gradient, projected on the span of M Q; the rest waits for the next step."""
    errors: dict[int, Tensor] = {}
    rights: dict[int, Tensor] = {}
    step = 0

    def factor(module: nn.Module) -> None:
        nonlocal step
        step += 1
        if step <= whole_steps:
            return
        for number, parameter in enumerate(module.parameters()):
            assert parameter.grad is not None
            if parameter.dim() < 2 or sum(parameter.shape) * rank >= parameter.numel():
                continue
            if number not in rights:
                generator = torch.Generator().manual_seed(number)
                rights[number] = torch.randn(parameter.shape[1], rank, generator=generator)
            matrix = parameter.grad + errors.get(number, 0.0)
            left, _ = torch.linalg.qr(matrix @ rights[number])
            rights[number] = matrix.T @ left
            parameter.grad = left @ rights[number].T
            errors[number] = matrix - parameter.grad

    plain(epochs, module, factor)


def lookahead(
    epochs: Sequence[Batches], module: nn.Module, every: int, fragments: int = 1, delay: int = 0, mixing: float = 0.0
) -> None:
    """Douillard et al., both papers, over one flat vector; the outer optimizer is torch's own."""
    optimizer = sgd(module)
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    cut = [len(flat) * f // fragments for f in range(fragments + 1)]
    outer = [nn.Parameter(flat[cut[f] : cut[f + 1]].clone()) for f in range(fragments)]
    outers = [torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=True, foreach=False) for p in outer]

    def here(f: int) -> Tensor:
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach()[cut[f] : cut[f + 1]]

    def put(f: int, values: Tensor) -> None:
        whole = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        whole[cut[f] : cut[f + 1]] = values
        torch.nn.utils.vector_to_parameters(whole, module.parameters())

    def land(f: int, change: Tensor, keep: float) -> None:
        outer[f].grad = change
        outers[f].step()
        put(f, torch.lerp(here(f), outer[f].detach(), 1 - keep))

    for batches in epochs:
        flying: list[tuple[int, int, Tensor]] = []
        fresh = [0] * fragments
        for step, (batch,) in enumerate(batches, 1):
            optimizer.zero_grad()
            backward(module, batch)
            optimizer.step()
            fresh = [count + 1 for count in fresh]
            for f, _, change in [flight for flight in flying if flight[1] == step]:
                land(f, change, mixing)
            flying = [flight for flight in flying if flight[1] != step]
            for f in range(fragments):
                if step % every == (f + 1) * every // fragments % every:
                    change, fresh[f] = outer[f].detach() - here(f), 0
                    if delay:
                        flying.append((f, step + delay, change))
                    else:
                        land(f, change, 0.0)
        for f, _, change in flying:
            land(f, change, mixing)
        changes = {f: outer[f].detach() - here(f) for f in range(fragments) if fresh[f]}
        for f, change in changes.items():
            land(f, change, 0.0)
        for f in range(fragments):
            put(f, outer[f].detach())


def thresholded(epochs: Sequence[Batches], module: nn.Module, threshold: float, adaptive: bool) -> None:
    """Strom's algorithm 1 element by element in numpy, with Deeplearning4j's rule for the threshold."""
    kept: dict[int, np.ndarray] = {}
    level = np.float32(threshold)

    def share(module: nn.Module) -> None:
        nonlocal level
        sent = total = 0
        for number, parameter in enumerate(module.parameters()):
            assert parameter.grad is not None
            gradient = parameter.grad.numpy()
            residual = kept.setdefault(number, np.zeros_like(gradient)) + gradient
            sign = np.where(residual >= level, 1, np.where(residual <= -level, -1, 0)).astype(np.float32)
            kept[number] = residual - level * sign
            parameter.grad = torch.from_numpy(level * sign)
            sent, total = sent + int(np.count_nonzero(sign)), total + sign.size
        if adaptive and sent / total > 0.01:
            level = np.float32(float(level) / 0.5 ** (1 / 20))
        elif adaptive and sent / total < 0.0001:
            level = np.float32(float(level) * 0.5 ** (1 / 20))

    plain(epochs, module, share)


def served(
    epochs: Sequence[Batches], module: nn.Module, push: int = 1, fetch: int = 1, adagrad: float | None = None
) -> None:
    """Dean et al.: one client, one server, over one flat vector."""
    optimizer = sgd(module)

    def here() -> Tensor:
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach()

    def put(values: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(values.clone(), module.parameters())

    server, pushed = here().clone(), here().clone()
    accrued, squares = torch.zeros_like(server), torch.zeros_like(server)

    def exchange() -> None:
        nonlocal server, pushed, accrued, squares
        if adagrad is None:
            server = server + (here() - pushed)
        else:
            squares = squares + accrued * accrued
            server = server - adagrad * accrued / (squares + 1e-10).sqrt()
            accrued = torch.zeros_like(accrued)
        pushed = here().clone()

    step = 0
    for batches in epochs:
        for (batch,) in batches:
            optimizer.zero_grad()
            backward(module, batch)
            accrued = accrued + torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
            optimizer.step()
            step += 1
            if step % push == 0:
                exchange()
            if step % fetch == 0:
                jump = server - here()
                put(here() + jump)
                pushed = pushed + jump
        exchange()
        put(server)
        pushed = server


# What each sends ------------------------------------------------------------------------------------------------------


def ring(world: int, size: int) -> int:
    """Bytes that one worker sends to sum so many."""
    return 2 * (world - 1) * size // world


PARAMETERS = sum(p.numel() for p in net().parameters())
MATRICES = [(8, 6), (5, 8)]
VECTORS = 8 + 5


def factors(world: int, steps: int) -> int:
    lefts = sum(2 * n for n, m in MATRICES if 2 * (n + m) < n * m)
    rights = sum(2 * m for n, m in MATRICES if 2 * (n + m) < n * m)
    whole = VECTORS + sum(n * m for n, m in MATRICES if 2 * (n + m) >= n * m)
    return steps * (ring(world, 4 * (lefts + whole)) + ring(world, 4 * rights))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A strategy and what it promises."""

    make: Callable[[], Strategy]
    alone: Callable[[Sequence[Batches], nn.Module], None] = plain
    """What it does with one worker; changes the net."""
    exactly: bool = True
    """Whether to the last bit."""
    sends: Callable[[int, int], int] | None = None
    """Bytes of one worker by (workers, steps of one epoch); None where they depend on the gradients."""
    send_together: Callable[[int, int], int] | None = None
    """Bytes of all workers, where they do not send equally much."""
    rowless: bool = True
    """A worker without rows changes nothing for the others."""
    rounding: float = 1e-5
    """How far weights may go from one worker's when several do the same, for the sums' rounding."""


def bitmaps(world: int, steps: int) -> int:
    """Every worker's whole bitmap to each other, after its length; at the epoch's end the sum of two figures."""
    return steps * (world - 1) * (16 + 4 * (2 + -(-PARAMETERS // 16))) + ring(world, 16)


def letters(push: int, fetch: int) -> Callable[[int, int], int]:
    """Of all workers of Downpour together: their shards are not of one size."""

    def sends(world: int, steps: int) -> int:
        pushes, fetches = steps // push + 1, steps // fetch + 1  # once more at the meeting
        cut = [PARAMETERS * rank // world for rank in range(world + 1)]
        sizes = [4 * (stop - start) for start, stop in itertools.pairwise(cut)]
        total = 0
        for own in sizes:
            others = sum(sizes) - own
            total += pushes * (32 * (world - 1) + others)
            total += fetches * (world - 1) * (32 + 32 + own)  # questions to the others, answers to theirs
            total += ring(world, 4) + (world - 1) * (16 + own) + (world - 1) * (16 + 24)  # the meeting, and its figures
        return total

    return sends


def _averaged(every: int, states: int = 1) -> Callable[[int, int], int]:
    return lambda world, steps: -(-steps // every) * ring(world, 4 * PARAMETERS) * states


def _thin(threshold: float, adaptive: bool, sends: Callable[[int, int], int] | None = None) -> Case:
    return Case(
        make=lambda: ThresholdSharing(threshold=threshold, adaptive=adaptive),
        alone=lambda epochs, module: thresholded(epochs, module, threshold, adaptive),
        sends=sends,
        rowless=False,
    )


CASES: dict[str, Case] = {
    "allreduce": Case(make=AllReduce, sends=lambda world, steps: steps * ring(world, 4 * PARAMETERS)),
    "allreduce in small buckets": Case(
        # A bucket is closed by the tensor that fills it; 40 bytes: [2.bias, 2.weight], [0.bias, 0.weight].
        make=lambda: AllReduce(bucket_mb=40 / (1 << 20)),
        sends=lambda world, steps: steps * (ring(world, 4 * (5 + 40)) + ring(world, 4 * 8) + ring(world, 4 * 48)),
    ),
    "bf16": Case(
        make=lambda: AllReduce(compression="bf16"),
        alone=halved,
        rounding=3e-3,  # a third of a bfloat16, three times: off by its last of 8 bits
        sends=lambda world, steps: steps * ring(world, 2 * PARAMETERS),
    ),
    "powersgd": Case(make=lambda: AllReduce(compression="powersgd"), alone=factored, exactly=False, sends=factors),
    "powersgd after two steps": Case(
        make=lambda: AllReduce(compression="powersgd", factor_rank=1, whole_steps=2),
        alone=lambda epochs, module: factored(epochs, module, rank=1, whole_steps=2),
        exactly=False,
    ),
    "averaging": Case(make=ParameterAveraging, sends=_averaged(5)),
    "averaging every step": Case(make=lambda: ParameterAveraging(every=1), sends=_averaged(1)),
    "averaging with optimizer state": Case(make=lambda: ParameterAveraging(every=3, average_optimizer_state=True)),
    "post-local SGD": Case(
        make=lambda: ParameterAveraging(every=2, allreduce_steps=3),
        sends=lambda world, steps: (3 + -(-(steps - 3) // 2)) * ring(world, 4 * PARAMETERS),
    ),
    "diloco": Case(
        make=lambda: DiLoCo(every=3),
        alone=lambda epochs, module: lookahead(epochs, module, 3),
        sends=_averaged(3),
    ),
    "diloco in fragments": Case(
        make=lambda: DiLoCo(every=4, fragments=3),
        alone=lambda epochs, module: lookahead(epochs, module, 4, fragments=3),
    ),
    "diloco streaming": Case(
        make=lambda: DiLoCo(every=4, fragments=2, delay=1, mixing=0.5),
        alone=lambda epochs, module: lookahead(epochs, module, 4, fragments=2, delay=1, mixing=0.5),
        # Fragment 0 leaves at steps 2, 6, ..., fragment 1 at 4, 8, ...; both once more at the end.
        sends=lambda world, steps: (
            ((steps + 2) // 4 + 1) * ring(world, 4 * (PARAMETERS // 2))
            + (steps // 4 + 1) * ring(world, 4 * (PARAMETERS - PARAMETERS // 2))
        ),
    ),
    "threshold": _thin(0.05, adaptive=True),
    "fixed threshold": _thin(0.2, adaptive=False),
    "dense threshold": _thin(0.001, adaptive=False, sends=bitmaps),
    "downpour": Case(make=Downpour, alone=served, send_together=letters(1, 1)),
    "downpour with periods": Case(
        make=lambda: Downpour(push_every=2, fetch_every=3),
        alone=lambda epochs, module: served(epochs, module, push=2, fetch=3),
        send_together=letters(2, 3),
    ),
    "downpour with adagrad": Case(
        make=lambda: Downpour(push_every=2, fetch_every=2, adagrad=0.05),
        alone=lambda epochs, module: served(epochs, module, push=2, fetch=2, adagrad=0.05),
    ),
}
REPEATABLE = {name: case for name, case in CASES.items() if case.make().deterministic}
