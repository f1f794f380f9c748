"""One worker of the network benchmark: kindling's own training loop over a process group, without Spark.

Two kinds of work, in the order they are asked for: sums of tensors of given sizes, timed, and trainings by given
strategies until the test accuracy reaches a target. A training's seconds are those of its epochs: evaluating, which
every strategy does alike, is left out.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.programs import answer, spec, wait_for_go


class _Ended(Exception):
    """A training is over: the target is reached, or its time is up."""


def main() -> None:
    """Spec: rank, world, host, port, interface, shared, threads, arrays, batch_size, target, limit_s, seed, sizes,
    repeats, trials.

    `shared`: sum through memory, as workers of one machine do. `trials` maps a name to (strategy as registered, its
    settings, the settings of SGD). Answers `sums` (bytes, seconds) and `trials`.
    """
    asked = spec()
    from kindling.threads import settle

    settle(asked["threads"])
    os.environ["GLOO_SOCKET_IFNAME"] = asked["interface"]
    from datetime import timedelta

    import torch.distributed as dist

    from kindling.train.strategies import GroupComms, SharedMemoryComms

    store = dist.TCPStore(
        asked["host"], asked["port"], asked["world"], asked["rank"] == 0, timedelta(seconds=60), wait_for_workers=False
    )
    dist.init_process_group(
        "gloo", store=store, rank=asked["rank"], world_size=asked["world"], timeout=timedelta(seconds=120)
    )
    comms = SharedMemoryComms.open(store) if asked["shared"] else GroupComms()
    assert comms is not None
    comms.meet()
    wait_for_go()
    sums = [{"bytes": size, "seconds": time_sums(comms, size, asked["repeats"])} for size in asked["sizes"]]
    trials = {name: train(asked, *how) for name, how in asked["trials"].items()}
    comms.meet()
    comms.close()
    dist.destroy_process_group()
    answer({"sums": sums, "trials": trials})


def time_sums(comms: Any, size: int, repeats: int) -> list[float]:
    """Seconds of each of several sums of `size` bytes over the workers, after one that is not counted."""
    import torch

    tensor, seconds = torch.ones(size // 4), []
    for repeat in range(repeats + 1):
        comms.meet()
        began = time.perf_counter()
        comms.all_reduce(tensor)
        if repeat:
            seconds.append(time.perf_counter() - began)
        tensor.fill_(1.0)
    return seconds


def train(asked: Mapping[str, Any], kind: str, settings: Mapping[str, Any], sgd: Mapping[str, float]) -> dict[str, Any]:
    """One training: whether and when the target was reached, with bytes, steps, where the time went, and the curve."""
    import functools

    import numpy as np
    import torch

    from kindling.train.loop import Loop
    from kindling.train.order import mix
    from kindling.train.settings import LoopSettings
    from kindling.train.strategies import STRATEGIES, GroupComms, Replica

    comms = GroupComms()
    model = build(asked["seed"])
    packed = model.preparation.packed_spec(targets=True)
    names = list(packed)  # pixels, label
    with np.load(asked["arrays"]) as arrays:
        sides = {
            side: {
                name: arrays[f"{side}_{part}"].astype(packed[name][0]) for name, part in zip(names, "xy", strict=True)
            }
            for side in ("train", "test")
        }
    feed, counts_V = feed_of(sides["train"], comms.rank, comms.world)
    validation, _ = feed_of(sides["test"], comms.rank, comms.world)
    hooks = Watch(comms, asked["target"], asked["limit_s"])
    loop = Loop(
        settings=LoopSettings(epochs=10_000, batch_size=asked["batch_size"], seed=asked["seed"]),
        replica=Replica.of(model.module, functools.partial(torch.optim.SGD, **sgd)),
        strategy=STRATEGIES[kind](**settings),
        comms=comms,
        signature=model.signature,
        preparation=model.preparation,
        loss=torch.nn.CrossEntropyLoss(),
        feed=feed,
        counts_V=counts_V,
        frozen=frozenset(),
        hooks=hooks,
        validation=validation,
        classes=10,
    )
    try:
        with contextlib.suppress(_Ended):
            loop.run()
    finally:
        comms.close()
    steps = -(-int(counts_V.sum()) // (asked["batch_size"] * comms.world))
    sha = mix(np.array([math.floor(1e6 * float(p.detach().double().sum())) for p in model.module.parameters()]), 1)
    return {**hooks.result(), "steps_per_epoch": steps, "weights": [str(number) for number in sha]}


def build(seed: int) -> Any:
    """A perceptron of 1.07 million weights over the pixels."""
    import torch
    from torch import nn

    import kindling as kd

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))
    return kd.Model.of(net, column="pixels", shape=(784,), labels=[str(digit) for digit in range(10)])


def feed_of(arrays: Mapping[str, Any], rank: int, world: int) -> tuple[Any, Any]:
    """A worker's rows, and how many each virtual shard has over all of them, as packing and shuffling would give."""
    import numpy as np

    from kindling.train.loop import Feed
    from kindling.train.order import VIRTUAL_SHARDS, mix, owner_of, shard_of
    from kindling.train.spool import Rows

    hashes = mix(np.arange(len(next(iter(arrays.values()))), dtype=np.uint64), 0)
    shards = shard_of(hashes)
    own = np.flatnonzero(owner_of(shards, world) == rank)
    rows = Rows(hashes[own], {name: array[own] for name, array in arrays.items()})
    return Feed(rows), np.bincount(shards, minlength=VIRTUAL_SHARDS)


class Watch:
    """The loop's hooks: keeps the curve and ends a training when its target is reached or its time is up."""

    def __init__(self, comms: Any, target: float, limit_s: float) -> None:
        self._comms, self._target, self._limit_s = comms, target, limit_s
        self._curve: list[dict[str, float]] = []
        self._spent = dict.fromkeys(("seconds", "bytes_sent", "data_s", "compute_s", "communicate_s"), 0.0)

    def on_event(self, kind: str, *, step: int, epoch: int, keep: bool = True, **data: Any) -> None:
        if kind != "epoch":
            return
        import numpy as np

        for name in self._spent:
            self._spent[name] += data[name]
        accuracy = data["validation"]["accuracy"]
        self._curve.append({"step": step, "accuracy": accuracy, "loss": data["loss"], **self._spent})
        # All workers must end at the same epoch: the first one's clock counts.
        sent = self._comms.bytes_sent
        up = bool(self._comms.gather(np.array([self._spent["seconds"] > self._limit_s], np.int64))[0][0])
        self._comms.bytes_sent = sent
        if accuracy >= self._target or up:
            raise _Ended

    def busy(self) -> bool:
        return False

    def on_checkpoint(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None: ...

    def result(self) -> dict[str, Any]:
        last = self._curve[-1]
        return {"reached": last["accuracy"] >= self._target, **last, "curve": self._curve}


if __name__ == "__main__":
    main()
