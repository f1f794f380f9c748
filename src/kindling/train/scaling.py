"""How long an epoch takes on W workers: a model of few constants, fitted to measurements on shaped links.

Plain arithmetic: no torch, no Spark, no clock. The constants are in `scaling.json` beside this file, with where they
come from; `benchmarks/scaling.py` fits and writes them, and docs/SCALING.md says what the model leaves out.
`kindling.advise` puts a model and a DataFrame into it.

A worker's step takes `step_s`, and the slowest of W workers, whose steps vary by a share `variation`, is waited for. An
exchange of S bytes sends b = 2 (W - 1) / W x S from each worker, as a ring does, and takes

    t = start + peer (W - 1) + delays x delay + (wire + crowd (1 - 2 / W)) x 8 b / rate + copy x b

seconds; `crowd` is what it costs that more than two send to each other at once. A strategy exchanges every `every`
steps a `share` of the weights' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kindling.errors import ConfigError

_FILE = Path(__file__).with_name("scaling.json")
_FLOAT_BYTES = 4
CONSTANTS = ("start_s", "peer_s", "delays", "wire", "crowd", "copy_s_per_byte")
"""Of an exchange, in the order of `terms`; those of the network are 0 on one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What lies between the workers.

    >>> Network(rate_bit_s=-1)
    Traceback (most recent call last):
    kindling.errors.ConfigError: rate_bit_s=-1 is no rate of a network. Give bits per second, such as 1e9.
    """

    rate_bit_s: float
    """Of each worker's link, in each direction."""
    delay_s: float = 0.0
    """One way, between two workers, beyond that of one switch."""
    one_machine: bool = False
    """All workers on one host: they sum through shared memory, and rate and delay do not matter."""
    workers_per_core: float = 1.0
    """Above 1 the workers take turns at copying."""

    def __post_init__(self) -> None:
        if not self.rate_bit_s > 0:
            raise ConfigError(
                "rate_bit_s", self.rate_bit_s, "is no rate of a network", "Give bits per second, such as 1e9"
            )
        if self.delay_s < 0:
            raise ConfigError("delay_s", self.delay_s, "is no delay", "Give seconds, 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained, seen by the clock."""

    weights: int
    """Trainable numbers."""
    rows: int
    batch_size: int
    """Rows of a step on one worker."""
    step_s: float
    """Forward, backward and optimizer on one worker."""
    variation: float = 0.0
    """Standard deviation of a step's time, as a share of it."""

    def __post_init__(self) -> None:
        for field, least in (("weights", 1), ("rows", 1), ("batch_size", 1), ("step_s", 1e-9), ("variation", 0)):
            if getattr(self, field) < least:
                raise ConfigError(field, getattr(self, field), "describes no training", f"Give {least} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the model says of one job on so many workers."""

    workers: int
    every: int
    """Steps between two exchanges."""
    steps: int
    """Of an epoch."""
    compute_s: float
    """Of an epoch, the wait for the slowest worker included."""
    exchange_s: float
    """Of an epoch."""
    bytes_sent: int
    """By each worker in an epoch."""

    @property
    def epoch_s(self) -> float:
        return self.compute_s + self.exchange_s

    @property
    def exchanging(self) -> float:
        """Share of the epoch that goes to exchanges."""
        return self.exchange_s / self.epoch_s


@cache
def constants() -> Mapping[str, Any]:
    """The fitted constants: `network` and `one_machine` by name, `start_s`, `pack_bytes_s`, and their `provenance`."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def sent_bytes(size: int, workers: int) -> int:
    """Bytes that each of the workers sends to sum `size` bytes.

    >>> sent_bytes(4_000_000, 4)
    6000000
    """
    return 2 * (workers - 1) * size // workers


def terms(size: int, workers: int, network: Network) -> tuple[float, ...]:
    """What the constants of an exchange (`CONSTANTS`) are multiplied by."""
    sent = sent_bytes(size, workers)
    wire_s = 0.0 if network.one_machine else sent * 8 / network.rate_bit_s
    delay_s = 0.0 if network.one_machine else network.delay_s
    copied = sent * max(1.0, network.workers_per_core)
    return 1.0, workers - 1.0, delay_s, wire_s, wire_s * (1 - 2 / workers), copied


def exchange_s(size: int, workers: int, network: Network, fitted: Mapping[str, Any] | None = None) -> float:
    """Seconds to sum `size` bytes over the workers.

    Args:
        fitted: constants to use instead of the stored ones.

    >>> lan, phone = Network(rate_bit_s=1e10), Network(rate_bit_s=1e7)
    >>> exchange_s(4_000_000, 2, lan) < exchange_s(4_000_000, 2, phone)
    True
    >>> exchange_s(4_000_000, 1, phone)
    0.0
    """
    if workers == 1:
        return 0.0
    one = (fitted or constants())["one_machine" if network.one_machine else "network"]
    factors = (one[name] for name in CONSTANTS)
    return math.fsum(factor * term for factor, term in zip(factors, terms(size, workers, network), strict=True))


def slowest(variation: float, workers: int) -> float:
    """How much longer the slowest of the workers takes than the mean one, as a factor.

    For times that vary normally and independently; the largest of W is about sqrt(2 ln W) deviations above the mean,
    which is a little too much for few workers.

    >>> slowest(0.1, 1), round(slowest(0.1, 64), 2)
    (1.0, 1.29)
    """
    return 1.0 + variation * math.sqrt(2.0 * math.log(workers))


def estimate(
    job: Job,
    workers: int,
    network: Network,
    *,
    every: int = 1,
    share: float = 1.0,
    fitted: Mapping[str, Any] | None = None,
) -> Estimate:
    """An epoch of a job on so many workers.

    Args:
        every: steps between two exchanges: 1 for all-reduce, the period of averaging and DiLoCo. One exchange comes at
            the epoch's end in any case.
        share: of the weights' float32 bytes that an exchange sends: 0.5 for bf16 compression.

    >>> job = Job(weights=1_000_000, rows=60_000, batch_size=32, step_s=0.01)
    >>> slow = Network(rate_bit_s=1e8)
    >>> estimate(job, 2, slow).epoch_s > 5 * estimate(job, 2, slow, every=16).epoch_s
    True
    """
    if workers < 1:
        raise ConfigError("workers", workers, "leaves nobody to train", "Use 1 or more")
    steps = -(-job.rows // (job.batch_size * workers))
    size = int(_FLOAT_BYTES * job.weights * share)
    exchanges = -(-steps // every) if workers > 1 else 0
    # Where workers meet rarely, their steps' variation averages out between two meetings.
    waiting = slowest(job.variation / math.sqrt(min(every, steps)), workers)
    return Estimate(
        workers=workers,
        every=every,
        steps=steps,
        compute_s=steps * job.step_s * waiting,
        exchange_s=exchanges * exchange_s(size, workers, network, fitted),
        bytes_sent=exchanges * sent_bytes(size, workers),
    )


def period(
    job: Job, workers: int, network: Network, *, spent: float = 0.2, fitted: Mapping[str, Any] | None = None
) -> int:
    """The fewest steps between two exchanges of all weights that leave at most a share `spent` of the time to them.

    >>> job = Job(weights=1_000_000, rows=60_000, batch_size=32, step_s=0.01)
    >>> period(job, 8, Network(rate_bit_s=1e10)) <= period(job, 8, Network(rate_bit_s=1e8))
    True
    """
    exchange = exchange_s(_FLOAT_BYTES * job.weights, workers, network, fitted)
    return max(1, math.ceil(exchange * (1 - spent) / (spent * job.step_s)))
