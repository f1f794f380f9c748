"""Downpour SGD: every worker trains at its own pace and shares what it has learned through shards that all serve.

The parameters are cut into as many shards as there are workers. Every few steps a worker pushes its changes to the
shards' keepers, and fetches what the others have pushed; it waits for nobody but for an answer that is a whole period
late. `parameter_server.py` decides what happens to a shard; here are the worker's side and the thread that serves.
Source: Dean et al., 2012, "Large scale distributed deep networks", NeurIPS, section 4.1 and the appendix's algorithm.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError
from kindling.train.strategies.base import Replica, State, Strategy, average_into, evenly, gradient_of
from kindling.train.strategies.comms import Comms
from kindling.train.strategies.mail import Mail
from kindling.train.strategies.parameter_server import (
    Fetch,
    Push,
    Shard,
    Weights,
    cuts,
    on_fetch,
    on_push,
    pack,
    unpack,
)

_PATIENCE_S = 600.0
"""How long an answer may take, from a worker whose connection stands."""


@dataclass(frozen=True, kw_only=True)
class Downpour(Strategy):
    """Asynchronous SGD with a sharded parameter server. Not repeatable: the result depends on who came first.

    What is pushed is a worker's change of the parameters, made by its own optimizer, and the shard adds it; for plain
    SGD that is the paper's server with the learning rate already in it. With `adagrad` gradients are pushed, and the
    server divides the rate by the root of each parameter's summed squares, as the paper recommends. Each worker's steps
    count in full: W workers take W steps of `batch_size` rows where all-reduce takes one of `W * batch_size`.

    A slow worker slows the others in nothing until the end of an epoch, where all wait for the last one, agree on the
    weights, and average the batch statistics; its changes are then the stalest. Checkpoints and validations inside an
    epoch are such meetings too, and a limit of time has the workers compare notes about once a second.

    Sends, for each push, `(W - 1) / W` of the parameters' bytes plus 32 for each other shard; for each fetch 32 to each
    of the others, and to each of them that fetches, its shard and 32; at a meeting its shard to each of the others.
    """

    push_every: int = 1
    """Optimizer steps between two pushes."""
    fetch_every: int = 1
    """Optimizer steps between two fetches."""
    adagrad: float | None = None
    """Learning rate of an AdaGrad on the server; None: changes are added as they come."""

    deterministic: ClassVar[bool] = False
    replicas_agree: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("push_every", "fetch_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(name, value, "is no number of steps", "Use 1 or more")
        if self.adagrad is not None and not self.adagrad > 0:
            raise ConfigError("adagrad", self.adagrad, "moves nothing", "Use a learning rate above 0, or None")

    def init(self, replica: Replica) -> State:
        return {"step": 0, "rows": 0, "all": 0, "shard": None, "met": False, "figures": {}}

    def begin(self, replica: Replica, state: State, comms: Comms) -> State:
        flat = _flat(replica.parameters())
        shard = self._shard(state["shard"], flat, comms)
        replica.aside["downpour"] = _Worker(shard, flat, comms)
        return state

    def close(self, replica: Replica) -> None:
        if worker := replica.aside.pop("downpour", None):
            worker.close()

    def on_gradients(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        if self.adagrad is not None and rows_W[comms.rank]:
            worker: _Worker = replica.aside["downpour"]
            worker.accrued += torch.cat([gradient_of(p).detach().reshape(-1) for p in replica.parameters()])
        return state

    def on_step(self, replica: Replica, state: State, rows_W: np.ndarray, comms: Comms) -> State:
        worker: _Worker = replica.aside["downpour"]
        step = state["step"] + 1
        if worker.answered():
            worker.take(replica)
        if step % self.push_every == 0:
            worker.push(replica, self.adagrad is not None)
        if step % self.fetch_every == 0:
            if worker.asking:  # a whole period late: go no further from the others
                worker.wait()
                worker.take(replica)
            worker.ask(replica)
            if worker.answered():
                worker.take(replica)
        rows, all_rows = int(rows_W[comms.rank]), int(rows_W.sum())
        return {**state, "step": step, "rows": state["rows"] + rows, "all": state["all"] + all_rows, "met": False}

    def on_epoch(self, replica: Replica, state: State, comms: Comms) -> State:
        worker: _Worker = replica.aside["downpour"]
        state = self.settle(replica, state, comms)
        if state["all"]:
            average_into(replica.statistics(), state["rows"] / state["all"], comms)
        tallies = comms.gather(np.array(worker.tally(), np.int64))
        pushes = sum(int(tally[0]) for tally in tallies)
        figures = {
            "pushes": pushes / comms.world,
            "staleness_mean": sum(int(tally[1]) for tally in tallies) / max(1, pushes),
            "staleness_max": max(int(tally[2]) for tally in tallies),
        }
        return {**state, "rows": 0, "all": 0, "figures": figures}

    def figures(self, state: State) -> dict[str, float]:
        """`pushes` to a shard in the epoch; `staleness_mean`, `staleness_max`: how many pushes of others to that shard
        came between a worker's looking at it and its own push."""
        return dict(state["figures"])

    def settle(self, replica: Replica, state: State, comms: Comms) -> State:
        """Meet: every push is applied, and every worker has the shards' weights."""
        if state["met"]:
            return state
        worker: _Worker = replica.aside["downpour"]
        worker.push(replica, self.adagrad is not None)
        if worker.asking:
            worker.wait()
            worker.take(replica)
        worker.ask(replica)  # its answers come after the pushes before it were applied
        worker.wait()
        worker.take(replica)
        comms.meet()
        shard = worker.shard
        worker.set(replica, torch.cat(comms.exchange(shard.weights)), sum(shard.pushes))
        saved = {"weights": shard.weights, "squares": shard.squares}
        return {**state, "shard": saved, "met": True}

    def regroup(self, states: Sequence[State], rank: int, world: int) -> State:
        whole: dict[str, Tensor | None] = {}
        for name in ("weights", "squares"):
            parts = [state["shard"][name] for state in states]
            whole[name] = None if parts[0] is None else torch.cat(parts)
        assert whole["weights"] is not None
        starts = cuts(len(whole["weights"]), world)
        own = slice(starts[rank], starts[rank + 1])
        shard = {name: None if values is None else values[own].clone() for name, values in whole.items()}
        return {**states[0], "shard": shard, "rows": evenly(states[0]["all"], rank, world)}

    def _shard(self, saved: Any, flat: Tensor, comms: Comms) -> Shard:
        starts = cuts(len(flat), comms.world)
        weights = flat[starts[comms.rank] : starts[comms.rank + 1]].clone() if saved is None else saved["weights"]
        squares = None
        if self.adagrad is not None:
            squares = torch.zeros_like(weights) if saved is None else saved["squares"]
        return Shard(weights=weights, squares=squares, rate=self.adagrad or 0.0, pushes=(0,) * comms.world)


class _Worker:
    """One worker's side of it, and the thread in which it serves its shard."""

    def __init__(self, shard: Shard, flat: Tensor, comms: Comms) -> None:
        self._rank, self._world = comms.rank, comms.world
        self._cuts = cuts(len(flat), comms.world)
        self._dtype = flat.dtype
        self._anchor = flat.clone()
        """The parameters as they were at the last push, moved by what has been fetched since."""
        self.accrued = torch.zeros_like(flat)
        self._seen = [0] * self._world
        self._numbers = [0, 0]
        self._asked: Tensor | None = None
        self._answers: dict[int, Weights] = {}
        self._shard, self._lock = shard, threading.Lock()
        self._incoming: queue.SimpleQueue[tuple[int, Weights | BaseException]] = queue.SimpleQueue()
        self._met = False
        self._mail: Mail | None = None
        self._thread: threading.Thread | None = None
        if self._world > 1:
            self._mail = comms.open_mail()
            self._thread = threading.Thread(target=self._serve, name="kindling-downpour", daemon=True)
            self._thread.start()

    @property
    def shard(self) -> Shard:
        with self._lock:
            return self._shard

    @property
    def asking(self) -> bool:
        """Whether a fetch is under way."""
        return self._asked is not None

    def tally(self) -> tuple[int, int, int]:
        """Pushes to this shard, their summed and their greatest staleness, since the last call."""
        with self._lock:
            shard = self._shard
            self._shard = replace(shard, counted=0, staleness_sum=0, staleness_max=0)
        return shard.counted, shard.staleness_sum, shard.staleness_max

    def push(self, replica: Replica, gradients: bool) -> None:
        """Send to every shard what has been learned since the last push."""
        flat = _flat(replica.parameters())
        change = self.accrued if gradients else flat - self._anchor
        if gradients:
            self.accrued = torch.zeros_like(flat)
        self._anchor = flat
        self._numbers[0] += 1
        self._met = False
        for rank in self._ranks():
            part = change[self._cuts[rank] : self._cuts[rank + 1]]
            self._tell(rank, Push(source=self._rank, number=self._numbers[0], seen=self._seen[rank], change=part))

    def ask(self, replica: Replica) -> None:
        """Ask for every shard; the answers come when they come."""
        self._asked = _flat(replica.parameters())
        self._numbers[1] += 1
        self._answers = {}
        for rank in self._ranks():
            self._tell(rank, Fetch(source=self._rank, number=self._numbers[1]))

    def answered(self) -> bool:
        """Whether all answers are here."""
        while not self._incoming.empty():
            self._note(*self._incoming.get())
        return self.asking and len(self._answers) == self._world

    def wait(self) -> None:
        """Return when all answers are here."""
        while not self.answered():
            try:
                self._note(*self._incoming.get(timeout=_PATIENCE_S))
            except queue.Empty:
                missing = sorted(set(range(self._world)) - set(self._answers))
                raise RuntimeError(f"workers {missing} have not answered for {_PATIENCE_S:.0f} s") from None

    def take(self, replica: Replica) -> None:
        """Move the parameters by what has changed since they were asked for; what was learned meanwhile stays."""
        assert self._asked is not None
        fetched = torch.cat([self._answers[rank].values for rank in range(self._world)])
        self._seen = [self._answers[rank].seen for rank in range(self._world)]
        jump = fetched - self._asked
        self._asked = None
        self._anchor = self._anchor + jump
        _fill(replica.parameters(), _flat(replica.parameters()) + jump)

    def set(self, replica: Replica, flat: Tensor, pushes: int) -> None:
        """Begin anew from weights that all workers have."""
        _fill(replica.parameters(), flat)
        self._anchor = flat
        self._seen = [pushes - self._numbers[0]] * self._world
        self._met = True

    def close(self) -> None:
        if self._mail is not None:
            self._mail.send(self._rank, b"")  # to the thread that serves
            assert self._thread is not None
            self._thread.join(5)
            if self._met:  # else something went wrong, and whoever closes the Comms says what before the others notice
                self._mail.close()

    def _ranks(self) -> list[int]:
        """All workers, from the next one on: not everybody calls on the same one first; oneself at last."""
        return [(self._rank + distance) % self._world for distance in range(1, self._world + 1)]

    def _note(self, source: int, found: Weights | BaseException) -> None:
        if isinstance(found, BaseException):
            raise RuntimeError(f"worker {self._rank} can serve no longer: {found}") from found
        if found.number == self._numbers[1]:
            self._answers[source] = found

    def _tell(self, rank: int, message: Push | Fetch) -> None:
        if rank != self._rank:
            assert self._mail is not None
            self._mail.send(rank, pack(message))
            return
        for _, answer in self._apply(message):
            self._answers[rank] = answer

    def _apply(self, message: Push | Fetch) -> list[tuple[int, Weights]]:
        with self._lock:
            if isinstance(message, Push):
                self._shard, replies = on_push(self._shard, message)
            else:
                self._shard, replies = on_fetch(self._shard, message)
        return replies

    def _serve(self) -> None:
        """Until told to stop: the others' pushes and fetches into the shard, the answers to oneself to the trainer."""
        assert self._mail is not None
        try:
            while letter := self._mail.receive():
                source, body = letter
                if body is None:
                    raise ConnectionError(f"worker {source} has gone")
                if not body:
                    return
                message = unpack(source, body, self._dtype)
                if isinstance(message, Weights):
                    self._incoming.put((source, message))
                else:
                    for to, answer in self._apply(message):
                        self._mail.send(to, pack(answer))
        except Exception as error:
            self._incoming.put((self._rank, error))


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def _fill(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    start = 0
    for parameter in parameters:
        parameter.detach().copy_(flat[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()
