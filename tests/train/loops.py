"""A loop to test: rows in memory, a net, workers as threads; and the same training in plain torch, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kindling.prepare import ArrayStep, LabelStep, Preparation
from kindling.signature import Signature, TensorSpec
from kindling.train.feed import Feed
from kindling.train.loop import Loop
from kindling.train.order import mix, owner_of, plan_order, shard_of
from kindling.train.settings import LoopSettings
from kindling.train.spool import Rows
from kindling.train.strategies import AllReduce, Comms, InProcessComms, Replica, SoloComms, Strategy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=False)
CLASSES = 3


def clouds(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed columns `x` (rows, 4) and `target` of as many clouds of points as there are classes."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, CLASSES, rows)
    x = rng.normal(size=(CLASSES, 4))[target] * 2 + rng.normal(size=(rows, 4))
    return {"x": x.astype(np.float32), "target": target.astype(np.int64)}


def hashes_of(rows: int) -> np.ndarray:
    return mix(np.arange(rows, dtype=np.uint64), 99)


def net(*middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), *(middle or (nn.ReLU(),)), nn.Linear(8, CLASSES))


PREPARATION = Preparation(
    (ArrayStep("x", "x", (4,)),), (LabelStep("target", "label", tuple(str(c) for c in range(CLASSES))),)
)
SIGNATURE = Signature({"x": TensorSpec(("N", 4))}, {"y": TensorSpec(("N", CLASSES))})


@dataclass
class Notes:
    """Hooks that write everything down."""

    events: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)
    states: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    abouts: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    stop_at: int | None = None
    """The step after which a stop is asked for."""
    step: int = 0

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        self.step = max(self.step, step)
        self.events.append((kind, step, data))

    def busy(self) -> bool:
        return False

    def on_checkpoint(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.abouts[step] = about
        self.states[step] = copy.deepcopy(dict(state))

    def stop_asked(self) -> bool:
        return self.stop_at is not None and self.step >= self.stop_at

    def steps(self, kind: str) -> list[int]:
        return [step for name, step, _ in self.events if name == kind]


@dataclass
class Trained:
    module: nn.Module
    history: list[dict[str, Any]]
    notes: Notes

    def state(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()


def part_of(columns: Mapping[str, np.ndarray], hashes: np.ndarray, comms: Comms) -> Rows:
    mine = np.flatnonzero(owner_of(shard_of(hashes), comms.world) == comms.rank)
    return Rows(hashes[mine], {name: column[mine] for name, column in columns.items()})


def train(
    columns: Mapping[str, np.ndarray],
    *,
    module: nn.Module | None = None,
    world: int = 1,
    validation: Mapping[str, np.ndarray] | None = None,
    strategy: Strategy | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    loss: Callable[..., torch.Tensor] | None = None,
    restored: Sequence[Mapping[str, Any]] | None = None,
    stop_at: int | None = None,
    kind: type[Loop] = Loop,
    loop: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Trained]:
    """Train with the loop; returns each worker's result. `restored`: each worker's state to go on from."""
    template = module or net()
    count = len(next(iter(columns.values())))
    hashes = hashes_of(count)

    def work(comms: Comms) -> Trained:
        own = copy.deepcopy(template)
        notes = Notes(stop_at=stop_at)
        checked = None
        if validation is not None:
            rows = len(next(iter(validation.values())))
            checked = Feed(part_of(validation, mix(hashes_of(rows), 5), comms))
        this = kind(
            **{
                "settings": LoopSettings(**{"epochs": 2, "batch_size": 8, **settings}),
                "replica": Replica.of(own, optimizer),
                "strategy": strategy or AllReduce(),
                "comms": comms,
                "signature": SIGNATURE,
                "preparation": PREPARATION,
                "loss": loss or nn.CrossEntropyLoss(),
                "feed": Feed(part_of(columns, hashes, comms)),
                "counts_V": np.bincount(shard_of(hashes), minlength=240),
                "frozen": frozenset(),
                "hooks": notes,
                "validation": checked,
                "classes": CLASSES,
                "may_be_asked": stop_at is not None,
                **(loop or {}),
            }
        )
        history = this.run(restored[comms.rank] if restored is not None else None)
        return Trained(own, history, notes)

    return [work(SoloComms())] if world == 1 else InProcessComms.run(world, work)


def batches(count: int, epochs: int, global_batch: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Row numbers of each step of each epoch, from the definitions in `order.py`, one worker's view."""
    hashes = hashes_of(count)
    static = np.lexsort((hashes, shard_of(hashes)))
    plan = plan_order(np.bincount(shard_of(hashes), minlength=240), 1, 0, global_batch)
    found = []
    for epoch in range(1, epochs + 1):
        shuffled = np.lexsort((mix(hashes[static], seed, epoch), shard_of(hashes[static])))
        order = static[shuffled[np.argsort(plan.place_of_own)]]
        found.append(np.split(order, range(global_batch, count, global_batch)))
    return found


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
