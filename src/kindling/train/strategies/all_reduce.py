"""All-reduce: synchronous data parallel SGD; every step uses the mean gradient over the whole global batch.

Gradients go in buckets, each sent as soon as the backward pass has filled it and those before it, so that the network
works while the rest is computed (Li et al., 2020, arXiv:2006.15704, section 3.2). `compression.py` says what is sent of
a bucket, `comms.py` moves the bytes. Source of the method: Goyal et al., 2017, arXiv:1706.02677, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from kindling.errors import ConfigError, TrainingError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, evenly, gradient_of
from kindling.train.strategies.comms import Comms
from kindling.train.strategies.compression import COURIERS, Memory, Parcel

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AllReduce(Strategy):
    """Sum gradients over the workers in every step. Rows count equally, however unevenly they are spread.

    Buckets are filled with parameters from the last to the first, the same in every step and every continuation.
    Sends `2 (W - 1) / W` of the gradients' bytes in each step, of half of them with bf16, of both factors and of what
    is not factored with powersgd; of the batch statistics at the end of each epoch.

    >>> AllReduce().loss_scale(np.array([30, 10]), rank=0, state={})
    0.75
    """

    compression: str | None = None
    """None: gradients as they are. "bf16": half the bytes. "powersgd": factors of low rank, with error feedback."""
    bucket_mb: float = 25.0
    """Size of a bucket in MiB: small ones leave earlier, large ones cost fewer messages."""
    factor_rank: int = 2
    """Rank of the factors of powersgd."""
    whole_steps: int = 0
    """In so many steps at first nothing is compressed; gradients then change too fast for low ranks."""

    on_gpu: ClassVar[bool] = True
    replicas_agree: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.compression not in COURIERS:
            raise ConfigError("compression", self.compression, "is unknown", "Use None, 'bf16' or 'powersgd'")
        if not self.bucket_mb > 0:
            raise ConfigError("bucket_mb", self.bucket_mb, "holds no gradient", "Use a size in MiB, such as 25")
        for name, least in (("factor_rank", 1), ("whole_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(name, value, "is no such number", f"Use a whole number, {least} or more")

    @property
    def elastic(self) -> bool:
        return self.compression is None

    def init(self, replica: Replica) -> State:
        return {"steps": 0, "rows": 0, "all": 0, "memory": {}}

    def begin(self, replica: Replica, state: State, comms: Comms) -> State:
        if comms.world > 1 or self.compression is not None:
            replica.aside["buckets"] = _Buckets(replica.parameters(), int(self.bucket_mb * _MIB), early=comms.overlaps)
        return state

    def close(self, replica: Replica) -> None:
        if buckets := replica.aside.pop("buckets", None):
            buckets.close()

    def loss_scale(self, rows_W: np.ndarray, rank: int, state: State) -> float:
        return float(rows_W[rank] / rows_W.sum())

    def on_backward(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> None:
        if buckets := replica.aside.get("buckets"):
            buckets.arm(self, state, comms)

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        buckets: _Buckets | None = replica.aside.get("buckets")
        if buckets is None:
            return state
        fresh = buckets.finish(self, state, comms)
        return {
            "steps": state["steps"] + 1,
            "rows": state["rows"] + int(rows_W[comms.rank]),
            "all": state["all"] + int(rows_W.sum()),
            "memory": {**state["memory"], **fresh},
        }

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        # Gradients were shared, batch statistics were not: each worker saw its own rows.
        if state["all"]:
            average_into(replica.statistics(), state["rows"] / state["all"], comms)
        return {**state, "rows": 0, "all": 0}

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        # Sums stay what they were: an error that is yet to be added is the sum of all workers' errors.
        memory: Memory = {}
        for key, entry in states[0]["memory"].items():
            error = torch.stack([state["memory"][key]["error"] for state in states]).sum(0)
            memory[key] = {"q": entry["q"], "error": error / world}
        return {**states[0], "rows": evenly(states[0]["all"], rank, world), "memory": memory}


class _Buckets:
    """Parameters in buckets, and the parcels that are under way in this step."""

    def __init__(self, parameters: Sequence[nn.Parameter], size_bytes: int, *, early: bool) -> None:
        self._parameters = list(parameters)
        self._buckets: list[list[int]] = []
        room = 0
        for number in reversed(range(len(self._parameters))):  # the order in which a backward pass comes to them
            if room <= 0:
                self._buckets.append([])
                room = size_bytes
            self._buckets[-1].append(number)
            room -= self._parameters[number].numel() * self._parameters[number].element_size()
        self._home = {number: place for place, bucket in enumerate(self._buckets) for number in bucket}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, number=number: self._filled(number)
            )
            for number, parameter in enumerate(self._parameters)
            if early
        ]
        self._armed: tuple[AllReduce, State, Comms] | None = None
        self._missing: list[set[int]] = []
        self._couriers: list[Iterator[None]] = []
        self._fresh: Memory = {}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def arm(self, strategy: AllReduce, state: State, comms: Comms) -> None:
        """From here on buckets leave when they are full, if they may leave early."""
        self._armed = (strategy, state, comms)
        self._missing = [set(bucket) for bucket in self._buckets]

    def _filled(self, number: int) -> None:
        if self._armed is None:
            return
        place = self._home[number]
        if place < len(self._couriers):
            raise TrainingError(
                "a backward pass came twice to the same parameter after its gradient had been sent. "
                "Checkpointed activations do this; use them with use_reentrant=False."
            )
        self._missing[place].discard(number)
        # In the order of the buckets, whatever the order of the pass: the same on every worker.
        while len(self._couriers) < len(self._buckets) and not self._missing[len(self._couriers)]:
            self._send(*self._armed)

    def _send(self, strategy: AllReduce, state: State, comms: Comms) -> None:
        bucket = self._buckets[len(self._couriers)]
        kind = strategy.compression if state["steps"] >= strategy.whole_steps else None
        gradients = [gradient_of(self._parameters[number]) for number in bucket]
        parcel = Parcel(gradients, bucket, state["memory"], strategy.factor_rank)
        courier = COURIERS[kind](parcel, comms, self._fresh)
        next(courier)
        self._couriers.append(courier)

    def finish(self, strategy: AllReduce, state: State, comms: Comms) -> Memory:
        """Send what has not left, and return when all sums have landed in the gradients."""
        self._armed = None
        while len(self._couriers) < len(self._buckets):
            self._send(strategy, state, comms)
        waiting, self._couriers = self._couriers, []
        while waiting:
            waiting = [courier for courier in waiting if next(courier, self) is not self]
        fresh, self._fresh = self._fresh, {}
        return fresh
