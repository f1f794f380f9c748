"""Going on from a checkpoint: which one all workers can read, whether it fits, and what it gives this worker.

The formats are in `checkpoint.py`, the regrouping for another number of workers in `elastic.py`. No Spark.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kindling.errors import FormatError
from kindling.storage import Place
from kindling.train import checkpoint, elastic, run
from kindling.train.checkpoint import Checkpoint
from kindling.train.strategies import Comms, Strategy

RNG = "rng"
"""Key of a worker's random generators in its state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What a checkpoint must fit."""

    run: str
    """The run's name, for messages."""
    strategy: Strategy
    statistics: bool
    """Whether the net keeps batch statistics."""
    global_batch: int
    data: Mapping[str, Mapping[str, Any]]
    """As `spool.data_fingerprint` gives it."""
    anyway: bool
    """Go on although the data changed."""


@dataclass(frozen=True, slots=True)
class Start:
    """From where a worker goes on."""

    state: dict[str, Any] | None
    """For `Loop.run`; None where there is no checkpoint."""
    resumed: list[dict[str, Any]]
    """Where what is now the run was picked up, this time last: step, epoch, workers before and now, what differs."""


def restore(place: Place, comms: Comms, fits: Circumstances, say: Callable[[str], None]) -> Start:
    """The newest checkpoint that every worker can read whole, as this worker's state. All workers call this.

    Args:
        say: told what was passed over or will differ, as sentences.
    Raises: ConfigError, when the data are not those that the checkpoint was trained on.
    """
    found = _agree(place, comms, say)
    if found is None:
        return Start(None, [])
    manifest = found.manifest
    changed = data_changes(manifest["data"], fits.data)
    if changed and not fits.anyway:
        raise run.refuse(fits.run, changed)
    before, now = found.world, comms.world
    if before == now:
        state = dict(found.states[comms.rank])
    else:
        states = [found.states[rank] for rank in range(before)]
        rng = states[comms.rank % before].get(RNG)
        plain = [{key: value for key, value in one.items() if key != RNG} for one in states]
        state = {**elastic.regroup(plain, fits.strategy, comms.rank, now), RNG: rng}
    differs = [elastic.caveat(fits.strategy, statistics=fits.statistics, before=before, now=now)]
    progress = dict(state["progress"])
    if progress["index"] and (changed or manifest["global_batch"] != fits.global_batch):
        progress |= {"index": 0, "sums": [], "validations": [], "spent": {}}
        differs.append(f"epoch {progress['epoch']} begins anew, since its steps are not what they were")
    if changed:
        differs.append(f"the data changed: {run.said(changed)}")
    told = "; ".join(text for text in differs if text)
    if told and comms.rank == 0:
        say(f"{told}.")
    this = {
        "step": found.step,
        "epoch": progress["epoch"],
        "index": progress["index"],
        "workers_before": before,
        "workers": now,
        "differs": told,
    }
    return Start({**state, "progress": progress}, [*manifest.get("resumed", []), this])


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was in the data of each stream, one line each.

    >>> old = {"training data": {"rows": 9, "content": "a1"}}
    >>> data_changes(old, {"training data": {"rows": 9, "content": "b2"}})
    ['the training data: 9 rows as before, with other content']
    """
    found = []
    for stream in sorted(before.keys() | now.keys()):
        was, is_now = (data.get(stream) for data in (before, now))
        if was == is_now:
            continue
        told = [f"{data['rows']:,} rows" if data else "none" for data in (was, is_now)]
        same = "{0} as before, with other content" if told[0] == told[1] else "{0} before, {1} now"
        found.append(f"the {stream}: {same.format(*told)}")
    return found


def _agree(place: Place, comms: Comms, say: Callable[[str], None]) -> Checkpoint | None:
    unread: set[int] = set()
    while True:
        steps = [step for step in checkpoint.steps_on_disk(place) if step not in unread]
        mine = None
        for step in steps:
            try:
                world = checkpoint.read_manifest(place, step)["world"]
                mine = checkpoint.read(place, step, [comms.rank] if world == comms.world else None)
                break
            except FormatError as error:
                say(f"{error} The one before it is used.")
                unread.add(step)
        newest = [int(seen[0]) for seen in comms.gather(np.array([mine.step if mine else -1], np.int64))]
        if len(set(newest)) == 1:
            return mine
        unread |= {step for step in steps if step > min(newest)}


def generators() -> dict[str, Any]:
    """The states of this process's random generators: torch's, numpy's global one, and Python's.

    The loop seeds torch's anew before every step; a user's own code may draw from any of them.
    """
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    version, words, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words, dtype=torch.int64), following],
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Bring the generators to states that `generators` gave."""
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, _numbers(keys).astype(np.uint32), position, has_gauss, gauss))
    version, words, following = states["python"]
    random.setstate((version, tuple(_numbers(words).tolist()), following))


def _numbers(tensor: Tensor) -> np.ndarray:
    numbers: np.ndarray = tensor.numpy()
    return numbers
