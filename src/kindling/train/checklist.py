"""`Model.preflight`: everything that can be known in seconds, as a list that says what was looked at and found.

A check that fails gives one sentence with its fix, and the others go on. The checks themselves are in `preflight.py`
(model and data), `slots.py` and `executors.py`; `fit` makes those that cost next to nothing, each time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kindling import ship
from kindling.errors import ConfigError, DataError, KindlingError, ModelError, SessionError
from kindling.prepare import Preparation
from kindling.train import executors, preflight, slots
from kindling.train.executors import Answer
from kindling.train.line import Server
from kindling.train.probe import Question
from kindling.train.settings import LoopSettings, UserCode
from kindling.train.targets import Loss, read_targets

if TYPE_CHECKING:
    import torch
    from pyspark.sql import DataFrame, SparkSession
    from torch import Tensor

    from kindling.model import Model
    from kindling.storage import Place
    from kindling.train.strategies import Strategy

_SAMPLE_ROWS = 32
_WORKER_BYTES = 400 << 20
"""What a worker of Spark takes with torch imported and nothing in it (torch 2.13 for CPUs: 330 MiB)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    found: str
    """What was found; where it failed, what is wrong and the way on."""


@dataclass(frozen=True, slots=True)
class Checklist:
    """All that was looked at. True where everything has passed.

    >>> checks = Checklist((Check("columns", True, "features, label"), Check("slots", False, "2, and 4 are needed")))
    >>> bool(checks)
    False
    >>> print(checks)
    ok    columns  features, label
    FAIL  slots    2, and 4 are needed
    """

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        return "\n".join(f"{'ok  ' if c.passed else 'FAIL'}  {c.name:<{width}}  {c.found}" for c in self.checks)

    def failed(self) -> list[Check]:
        """Those that have not passed."""
        return [check for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        return {"passed": bool(self), "checks": [asdict(check) for check in self.checks]}


class _List:
    def __init__(self) -> None:
        self.checks: list[Check] = []

    def look(self, name: str, act: Callable[[], tuple[Any, str]]) -> Any:
        """Do one check; returns what it gives, or None where it fails."""
        try:
            value, found = act()
        except KindlingError as error:
            self.checks.append(Check(name, False, str(error)))
            return None
        self.checks.append(Check(name, True, found))
        return value


def check_all(
    model: Model,
    df: DataFrame,
    *,
    settings: LoopSettings,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    loss: Loss | Mapping[str, Loss] | None,
    loss_weights: Mapping[str, float] | None,
    weight_column: str | None,
    strategy: Strategy | None,
    schedule: Callable[..., Any] | None,
    validation: DataFrame | None,
    workers: int | None,
    run: str | Path | None,
    target: str | Mapping[str, str] | None,
    key: str | None,
) -> Checklist:
    """Every check there is; see `Model.preflight`."""
    from kindling.train.strategies import AllReduce

    spark, done = df.sparkSession, _List()

    def columns() -> tuple[Any, str]:
        targets = read_targets(model, df, target, loss, loss_weights, weight_column)
        preparation = Preparation(model.preparation.inputs, targets.packed)
        read = preparation.columns(targets=True)
        needed = list(dict.fromkeys([*read, *preflight.place_columns(df, read, key)]))
        for frame, name in ((df, "the training data"), (validation, "the validation data")):
            if frame is not None:
                preflight.check_columns(frame, needed, name)
        return (targets, preparation), ", ".join(needed)

    read = done.look("columns", columns)
    if read is None:
        return Checklist(tuple(done.checks))
    targets, preparation = read
    labels = targets.labels
    code = UserCode(
        optimizer=optimizer or preflight.default_optimizer,
        loss=targets.objective,
        strategy=strategy or AllReduce(),
        schedule=schedule,
        metrics={},
    )

    def rehearsed() -> tuple[Any, str]:
        preflight.rehearse(model.module, model.signature, preparation, model.frozen, code, settings, labels)
        return True, "made-up rows went forward and back"

    def shipped() -> tuple[Any, str]:
        size = ship.check_module(model.module)
        return ship.pickled(code, "optimizer, loss, schedule"), f"net ({_size(size)}), optimizer and loss can be sent"

    fits = done.look("net", rehearsed)
    pickle = done.look("sending", shipped)
    count = done.look("slots", lambda: _slots(spark, workers))
    answers = _asked(done, spark, run, pickle, count or workers or 1)
    rows = done.look("data", lambda: _real_rows(df, preparation))
    if rows is not None and fits:
        needed = done.look("a real batch", lambda: _real_batch(model, preparation, code, settings, labels, rows))
        if needed is not None and answers is not None and count is not None:
            done.look("memory", lambda: _memory(needed, answers, count))
    return Checklist(tuple(done.checks))


def _slots(spark: SparkSession, workers: int | None) -> tuple[int, str]:
    count = slots.workers_for(spark, workers)
    there = slots.slots(spark, wanted=1) if not slots.without_barrier(spark) else None
    if slots.without_barrier(spark):
        return count, f"{count} workers; slots come as they are needed (dynamic allocation)"
    return count, f"{count} workers, {'an unknown number of' if there is None else there} slots"


def _asked(
    done: _List, spark: SparkSession, run: str | Path | None, pickle: bytes | None, count: int
) -> list[Answer] | None:
    """What the executors say of themselves, of the driver, the run directory and the user's code."""
    from kindling.train.fit import own_address

    beacon = secrets.token_hex(16)
    place = done.look("run directory", lambda: _directory(spark, run, beacon)) if run is not None else None
    address = own_address(spark)
    server = Server(lambda line: None, address) if address else None
    driver = (server.address.host, server.address.port, server.address.secret) if server else None
    question = Question(driver, place.path if place else None, beacon, pickle)
    try:
        answers: list[Answer] | None = done.look("executors", lambda: _executors(spark, count, question))
    finally:
        if server is not None:
            server.close()
        if place is not None:
            place.delete("beacon")
    if answers is None:
        return None
    done.look("driver", lambda: _reached(spark, answers, address))
    if pickle is not None:
        done.look("code there", lambda: _opened(answers))
    if place is not None:
        blind = sorted({answer["host"] for answer in answers if answer["sees"]})
        found = f"not seen from {', '.join(blind)}: through the driver" if blind else "seen from all hosts"
        done.look("directory there", lambda: (True, found))
    return answers


def _directory(spark: SparkSession, run: str | Path | None, beacon: str) -> tuple[Place, str]:
    from kindling.storage import open_place

    place = open_place(str(run), spark=spark)
    if place.exists("run.json"):
        raise ConfigError("run", str(run), "already holds a run", "Name a new directory, or remove that one")
    place.makedirs()
    place.write("beacon", beacon.encode())
    return place, "the driver can write it"


def _executors(spark: SparkSession, count: int, question: Question) -> tuple[list[Answer], str]:
    tasks = min(max(count, slots.slots(spark) or 1), executors.MANY_TASKS)
    answers = executors.ask(spark, tasks, question)
    hosts = len({answer["host"] for answer in answers})
    first = answers[0]
    found = f"Python {first['python']}, torch {first['versions']['torch']}, kindling {first['versions']['kindling']}"
    gpus = len({(answer["host"], gpu) for answer in answers for gpu in answer["gpus"]})
    if str(spark.conf.get("spark.task.resource.gpu.amount", "0")) != "0" and not gpus:
        raise SessionError(
            "spark.task.resource.gpu.amount is set, and no task was given a GPU. "
            "Set spark.executor.resource.gpu.amount and its discoveryScript as well."
        )
    return answers, f"{found} on {hosts} host{'s' * (hosts > 1)}, {gpus or 'no'} GPUs"


def _reached(spark: SparkSession, answers: Sequence[Answer], address: str | None) -> tuple[bool, str]:
    deaf = [answer for answer in answers if answer["reaches"]]
    if address is None or deaf:
        why = f"{deaf[0]['host']}: {deaf[0]['reaches']}" if deaf else "its address is unknown"
        if slots.without_barrier(spark):
            raise SessionError(
                f"executors cannot reach the driver ({why}), and with dynamic allocation they meet nowhere else. "
                "Let them connect to the driver's ports, or turn spark.dynamicAllocation.enabled off."
            )
        return False, f"not reached ({why}): workers meet in Spark's barrier, without live events"
    return True, "reached by all"


def _opened(answers: Sequence[Answer]) -> tuple[bool, str]:
    for answer in answers:
        if answer["code"]:
            raise SessionError(
                f"the optimizer, loss or schedule cannot be opened on {answer['host']}: {answer['code']}. "
                "Install the missing package there, or define them in your own files."
            )
    return True, "opened on all executors"


def _real_rows(df: DataFrame, preparation: Preparation) -> tuple[Mapping[str, np.ndarray], str]:
    """A few rows, packed on the driver as the workers will pack them."""
    from kindling.predict.batch import first_rows

    table = first_rows(df, list(preparation.columns(targets=True)), _SAMPLE_ROWS)
    if not table.num_rows:
        raise DataError("the DataFrame has no rows.")
    (batch,) = table.combine_chunks().to_batches()
    packed = preparation.pack(batch, targets=True)
    if packed.errors:
        row, why = next(iter(packed.errors.items()))
        raise DataError(
            f"{len(packed.errors)} of the first {table.num_rows} rows cannot be trained on; row {row}: {why}. "
            "Mend or remove them, or leave such rows out with on_error='drop'."
        )
    rows = {name: np.array(array) for name, array in packed.arrays.items()}  # torch wants memory that it may write to
    return rows, f"the first {table.num_rows} rows can be read and packed"


def _real_batch(
    model: Model,
    preparation: Preparation,
    code: UserCode,
    settings: LoopSettings,
    labels: tuple[str, ...] | None,
    rows: Mapping[str, np.ndarray],
) -> tuple[int, str]:
    """Rows of the data go forward and back; returns the bytes that one worker will need."""
    import torch

    saved: dict[int, Any] = {}  # the storages themselves: an address that is free may be given to another tensor

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        preflight.rehearse(model.module, model.signature, preparation, model.frozen, code, settings, labels, rows)
    count = len(next(iter(rows.values())))
    weights = [*model.module.parameters(), *model.module.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    activations = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    size = sum(tensor.nbytes for tensor in weights)
    # Weights, gradients, two moments of Adam, and the copy that a checkpoint is written from.
    needed = _WORKER_BYTES + 8 * size + activations * settings.batch_size // count
    return needed, f"{count} rows went forward and back"


def _memory(needed: int, answers: Sequence[Answer], count: int) -> tuple[bool, str]:
    """As many workers as run on a host, against what is free there."""
    by_host: dict[str, list[Answer]] = {}
    for answer in answers:
        by_host.setdefault(answer["host"], []).append(answer)
    for host, there in by_host.items():
        free = min((answer["memory_bytes"] for answer in there if answer["memory_bytes"]), default=None)
        workers = -(-count * len(there) // len(answers))
        if free is not None and workers * needed > free:
            raise ModelError(
                f"{workers} workers on {host} need about {_size(workers * needed)}, and {_size(free)} are free there. "
                "Use a smaller batch_size (with accumulate=), fewer workers on a host, or freeze more layers."
            )
    return True, f"about {_size(needed)} for each worker are there"


def _size(count: float) -> str:
    """
    >>> _size(3 << 20), _size(5.5 * 2**30)
    ('3.0 MiB', '5.5 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
