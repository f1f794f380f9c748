"""`kindling.advise`: what a training would take on one machine and on many, by measurement and by a fitted model.

Measured here: a few steps of the model on made-up rows, on the driver, with a worker's threads and with all of them;
and the number of rows. The rest is arithmetic of `train/scaling.py`, whose limits docs/SCALING.md names: it knows
nothing of slow disks, of executors slower than the driver, or of how many epochs a strategy needs.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kindling.errors import ConfigError, DataError
from kindling.train import scaling
from kindling.train.scaling import Estimate, Job, Network

if TYPE_CHECKING:
    import torch
    from pyspark.sql import DataFrame
    from torch import Tensor, nn

    from kindling.model import Model
    from kindling.prepare import Preparation
    from kindling.signature import Signature
    from kindling.train.objective import LossFunction, Objective

_ASSUMED_GBIT_S = 10.0
_MEASURED_S = 0.5
_FEWEST_STEPS = 5
_WORTH = 0.2
"""Share of the time that exchanges may take before a strategy that talks less is worth its change of the algorithm."""
_MANY_STEPS = 50
"""Steps between two exchanges beyond which DiLoCo's outer momentum is preferred to plain averaging."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run the training."""

    name: str
    workers: int
    threads: int
    epoch_s: float
    all_s: float
    """Start, packing and all epochs."""
    exchanging: float
    """Share of an epoch that goes to talking."""
    bytes_sent: int
    """By each worker in an epoch."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was measured, what follows from it, and what to do. Printed, it is a page."""

    job: Job
    """The training as one worker sees it."""
    epochs: int
    options: tuple[Option, ...]
    """The first is one machine."""
    pick: Option
    reason: str
    assumptions: tuple[str, ...]

    @property
    def one_machine(self) -> Option:
        return self.options[0]

    def __str__(self) -> str:
        lines = [
            f"{self.job.rows:,} rows, {self.job.weights:,} trainable weights, "
            f"{1000 * self.job.step_s:.3g} ms for a step of {self.job.batch_size} rows on one worker.",
            "",
            f"{'':<32}{'epoch':>10}{f'{self.epochs} epochs':>12}{'talking':>9}{'sent by each':>14}",
        ]
        for option in self.options:
            mark = "->" if option is self.pick else "  "
            sent = f"{option.bytes_sent / 1e6:,.0f} MB" if option.bytes_sent else "-"
            lines.append(
                f"{mark} {option.name:<29}{_duration(option.epoch_s):>10}{_duration(option.all_s):>12}"
                f"{100 * option.exchanging:>7.0f} %{sent:>14}"
            )
        return "\n".join([*lines, "", self.reason, *(f"- {text}" for text in self.assumptions)])


def advise(
    model: Model,
    df: DataFrame,
    *,
    epochs: int = 10,
    batch_size: int = 32,
    workers: int | None = None,
    threads: int = 1,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
    loss: Callable[..., Tensor] | None = None,
    target: str | None = None,
    rows: int | None = None,
    bandwidth_gbit_s: float | None = None,
    delay_ms: float = 0.0,
    show: bool = True,
) -> Advice:
    """How to train this model on this data: on how many workers, with which strategy, or on one machine.

    Args:
        df: the training rows. They are counted, which reads no photos; nothing else is done with them.
        epochs, batch_size, workers, threads, optimizer, loss, target: as `Model.fit` takes them.
        rows: how many rows there are, instead of counting.
        bandwidth_gbit_s: of each worker's link; 10 where it is not given, which the advice then says. Of no meaning
            where all workers are on one machine (`local[n]`).
        delay_ms: from one worker to another, one way, beyond a switch's.
        show: print the advice as well.
    Returns: the advice; `print` shows it, `options` has the figures.
    Raises: ConfigError, DataError, ModelError: what `fit` would refuse as well.
    """
    from dataclasses import replace

    from kindling import surgery
    from kindling.prepare import ArrayStep, Preparation
    from kindling.train import preflight, slots
    from kindling.train.targets import read_targets

    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("threads", threads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(name, value, "describes no training", "Use 1 or more")
    spark = df.sparkSession
    targets = read_targets(model, df, target, loss, None, None)
    preparation = Preparation(model.preparation.inputs, targets.packed)
    preflight.check_columns(df, preparation.columns(targets=True), "the training data")
    module, signature = model.module, model.signature
    split = surgery.split_frozen(model.module, model.signature, model.frozen)
    if split is not None:  # the front is run once, while packing
        module, signature = split.tail, split.tail_signature
        steps = [
            ArrayStep(name, name, tuple(int(size) for size in split.prefix_signature.outputs[name].shape[1:]))
            for name in split.boundary
        ]
        preparation = Preparation(tuple(steps), preparation.targets)
    count = df.count() if rows is None else rows
    if count < 1:
        raise DataError("there is not one row to train on.")
    there = slots.slots(spark, wanted=workers or 1)
    workers = workers or there or 2
    local = (spark.conf.get("spark.master", "") or "").startswith("local")

    def measured(threads: int) -> tuple[float, float]:
        return measure_step(
            module,
            signature,
            preparation,
            frozen=model.frozen,
            make_optimizer=optimizer or preflight.default_optimizer,
            loss=targets.objective,
            batch_size=batch_size,
            threads=threads,
        )

    cores = _cores()
    step_s, variation = measured(threads)
    # More threads are not always faster: small nets have nothing to share out among them.
    alone_s, alone_threads = min([(step_s, threads), *([(measured(cores)[0], cores)] if cores != threads else [])])
    job = Job(
        weights=trainable(module, model.frozen), rows=count, batch_size=batch_size, step_s=step_s, variation=variation
    )
    network = Network(
        rate_bit_s=1e9 * (bandwidth_gbit_s or _ASSUMED_GBIT_S),
        delay_s=delay_ms / 1000,
        one_machine=local,
        workers_per_core=workers * threads / cores if local else 1.0,
    )
    row_bytes = sum(_row_bytes(dtype, shape) for dtype, shape in preparation.packed_spec(targets=True).values())
    known = scaling.constants()
    before_s = known["start_s"] + count * row_bytes / (known["pack_bytes_s_per_worker"] * (there or workers))

    def option(name: str, found: Estimate, threads: int) -> Option:
        return Option(
            name=name,
            workers=found.workers,
            threads=threads,
            epoch_s=found.epoch_s,
            all_s=before_s + epochs * found.epoch_s,
            exchanging=found.exchanging,
            bytes_sent=found.bytes_sent,
        )

    alone = scaling.estimate(replace(job, step_s=alone_s), 1, network)
    one = option(f"one machine, {alone_threads} threads", alone, alone_threads)
    options = [one, *(option(name, found, threads) for name, found in strategies(job, workers, network))]
    pick, reason = choose(options)
    assumptions = [
        "Steps were timed on this driver with made-up rows; executors may be faster or slower.",
        "An epoch is compared with an epoch: with more workers a step has more rows, and with less talk the weights "
        "agree less often; both may need more epochs to the same accuracy.",
    ]
    if local:
        assumptions.append("All workers are on this machine and share its cores and memory.")
    elif bandwidth_gbit_s is None:
        assumptions.append(f"The workers' links were taken for {_ASSUMED_GBIT_S:g} Gbit/s: say bandwidth_gbit_s=...")
    advice = Advice(
        job=job, epochs=epochs, options=tuple(options), pick=pick, reason=reason, assumptions=tuple(assumptions)
    )
    if show:
        print(advice)
    return advice


def strategies(job: Job, workers: int, network: Network) -> list[tuple[str, Estimate]]:
    """Ways to agree between so many workers, as they would be written, with what the model says of each.

    The period of averaging is the shortest that leaves four fifths of the time to computing, an epoch at the most.
    """
    if workers == 1:
        return []
    steps = -(-job.rows // (job.batch_size * workers))
    every = min(scaling.period(job, workers, network, spent=_WORTH), steps)
    rare = "DiLoCo" if every > _MANY_STEPS else "ParameterAveraging"
    found = [
        ("AllReduce()", scaling.estimate(job, workers, network)),
        ('AllReduce(compression="bf16")', scaling.estimate(job, workers, network, share=0.5)),
    ]
    if every > 1:
        found.append((f"{rare}(every={every})", scaling.estimate(job, workers, network, every=every)))
    return [(f"{workers} x {name}", estimate) for name, estimate in found]


def choose(options: Sequence[Option]) -> tuple[Option, str]:
    """The option to take, and why: the first is one machine, the others in the order of how little they change.

    Among workers the first that talks little enough is taken, else the fastest; one machine where that is no slower.
    """
    one, *many = options
    if not many:
        return one, "There is one worker only: nothing to agree on."
    quiet = [option for option in many if option.exchanging <= _WORTH + 0.005]  # a period is a whole number of steps
    best = quiet[0] if quiet else min(many, key=lambda option: option.epoch_s)
    if one.epoch_s <= best.epoch_s:
        return one, (
            f"One machine would be faster: an epoch in {_duration(one.epoch_s)} with {one.threads} threads, against "
            f"{_duration(best.epoch_s)} on {best.workers} workers of {best.threads} each. "
            f"Use workers=1, threads={one.threads}."
        )
    gain = one.epoch_s / best.epoch_s
    why = (
        f"{best.name} is {gain:.1f} times as fast as one machine with {one.threads} threads; "
        f"{100 * best.exchanging:.0f} % of its time goes to talking."
    )
    if best is not many[0]:
        why += f" {many[0].name} would spend {100 * many[0].exchanging:.0f} %."
    if one.all_s <= best.all_s * 1.1:
        why += " Over all epochs it makes little difference: starting and packing take as long as is saved."
    return best, why


def trainable(module: nn.Module, frozen: frozenset[str]) -> int:
    """How many numbers a training of the module changes."""
    from kindling import surgery

    copied = copy.deepcopy(module)
    surgery.set_training(copied, frozen)
    return sum(parameter.numel() for parameter in copied.parameters() if parameter.requires_grad)


def measure_step(
    module: nn.Module,
    signature: Signature,
    preparation: Preparation,
    *,
    frozen: frozenset[str],
    make_optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    loss: LossFunction | Objective,
    batch_size: int,
    threads: int,
) -> tuple[float, float]:
    """Seconds of a step on made-up rows with so many threads, the median of several, and their deviation as a share.

    The module is left as it is, torch's random state and thread count too.
    """
    import torch

    from kindling import surgery
    from kindling.train.objective import Objective
    from kindling.train.preflight import made_up_rows
    from kindling.train.strategies import Replica

    arrays = made_up_rows(preparation, batch_size)
    objective = Objective.of(loss, signature, preparation)
    copied = copy.deepcopy(module)
    surgery.set_training(copied, frozen)
    replica = Replica.of(copied, make_optimizer)
    before = torch.get_num_threads()
    seconds: list[float] = []
    try:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=[]):
            deadline = time.perf_counter() + _MEASURED_S
            while len(seconds) <= _FEWEST_STEPS or time.perf_counter() < deadline:
                began = time.perf_counter()
                batch = preparation.batch(arrays, targets=True)
                replica.optimizer.zero_grad(set_to_none=True)
                torch.stack(objective.losses(copied, signature, batch, "fp32")).sum().backward()  # type: ignore[no-untyped-call]
                replica.optimizer.step()
                seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    kept = seconds[1:]  # the first step also makes what the others find
    middle = statistics.median(kept)
    # By the middle half, so that one interruption on a busy driver does not count as a habit.
    low, _, high = statistics.quantiles(kept, n=4)
    return middle, (high - low) / 1.349 / middle


def _row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    import numpy as np

    return int(np.dtype(dtype).itemsize) * math.prod(shape)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _duration(seconds: float) -> str:
    """Seconds for people.

    >>> _duration(0.0123), _duration(75), _duration(5400), _duration(200000)
    ('12 ms', '75 s', '90 min', '55.6 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
