"""`fit` on the driver: plan, check, launch, listen, collect.

Pack -> shuffle -> barrier stage -> collect, as one Spark job (see docs/ARCHITECTURE.md). The work itself is in `spool`
(packing), `worker` and `loop` (training). Runs on Spark Classic and Spark Connect alike.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kindling import ship
from kindling.errors import ConfigError, DataError, KindlingError, ModelError, SessionError, from_text
from kindling.prepare import ArrayStep, Preparation, Step
from kindling.signature import Signature
from kindling.train import executors, packing, preflight, slots, spool
from kindling.train import run as runs
from kindling.train.callbacks import Callback, Callbacks
from kindling.train.events import Event
from kindling.train.listener import Listener
from kindling.train.progress import TrainingBar
from kindling.train.run import RESUME
from kindling.train.settings import ON_ERROR, SHORTEST_TIMEOUT_S, LoopSettings, UserCode, WorkerSpec, silence_s
from kindling.train.table import Table
from kindling.train.targets import read_targets
from kindling.train.worker import NO_ROWS, REPORT_SCHEMA, run_worker

if TYPE_CHECKING:
    import torch
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame, SparkSession
    from torch import Tensor, nn

    from kindling.model import Model
    from kindling.storage import Place
    from kindling.surgery import Split
    from kindling.train.figures import Metric
    from kindling.train.objective import Objective
    from kindling.train.preflight import Augment
    from kindling.train.strategies import Strategy
    from kindling.train.targets import Loss

    OptimizerFactory = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

_LOG = logging.getLogger("kindling.fit")


def fit(
    model: Model,
    df: DataFrame,
    *,
    settings: LoopSettings,
    optimizer: OptimizerFactory | None,
    schedule: Callable[..., Any] | None,
    loss: Loss | Mapping[str, Loss] | None,
    loss_weights: Mapping[str, float] | None,
    metrics: Mapping[str, Metric] | None,
    strategy: Strategy | None,
    validation: DataFrame | None,
    workers: int | None,
    resources: ResourceProfile | None,
    threads: int,
    run: str | Path | None,
    resume: str | bool,
    about: Mapping[str, Any] | None,
    target: str | Mapping[str, str] | None,
    weight_column: str | None,
    augment: Augment,
    frozen_precision: str,
    on_error: str,
    key: str | None,
    timeout_s: float,
    callbacks: Sequence[Callback],
    progress: bool,
) -> Model:
    """Train `model` on a DataFrame; see `Model.fit` for the arguments. Returns a new Model."""
    from kindling.train.figures import check_metrics
    from kindling.train.strategies import AllReduce

    if on_error not in ON_ERROR:
        raise ConfigError("on_error", on_error, "is not a way to treat broken rows", f"Use one of {ON_ERROR}")
    resume = {True: "always", False: "never"}.get(resume, resume) if isinstance(resume, bool) else resume
    if resume not in RESUME:
        raise ConfigError("resume", resume, "is not a way to go on", f"Use one of {RESUME}")
    if not timeout_s >= SHORTEST_TIMEOUT_S:
        raise ConfigError("timeout_s", timeout_s, "is too short to tell a slow worker from a lost one", "Use 2 or more")
    spark = df.sparkSession
    began = time.time()
    targets = read_targets(model, df, target, loss, loss_weights, weight_column)
    changes = preflight.read_augment(model, augment)
    preparation = Preparation(preflight.with_room(model.preparation.inputs, changes), targets.packed)
    rows = df, validation
    if validation is not None and weight_column is not None and weight_column not in validation.columns:
        validation = _weighted_alike(validation, weight_column)
    needed = preparation.columns(targets=True)
    key_columns = preflight.place_columns(df, needed, key)
    for frame, name in ((df, "the training data"), (validation, "the validation data")):
        if frame is not None:
            preflight.check_columns(frame, list(dict.fromkeys([*needed, *key_columns])), name)
    split, tail, tail_signature, tail_preparation = _cut(model, preparation, whole=bool(changes))
    code = UserCode(
        optimizer=optimizer or preflight.default_optimizer,
        loss=targets.objective,
        strategy=strategy or AllReduce(),
        schedule=schedule,
        metrics=check_metrics(metrics),
    )
    preflight.rehearse(tail, tail_signature, tail_preparation, model.frozen, code, settings, targets.labels)
    workers = slots.workers_for(spark, workers, resources)
    plain = slots.without_barrier(spark)

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(TrainingBar(settings.epochs, shown=progress))
        place, beacon, earlier = _run_directory(run, resume, spark, stack)
        run_name = Path(str(run)).name if run else f"run-{secrets.token_hex(4)}"
        asked = _describe(model, settings, code, workers, threads, run_name, key_columns)
        asked["augment"] = {name: [step.told() for step in steps] for name, steps in changes.items()}
        asked["about"] = dict(about or {})
        own_batch = settings.batch_size * settings.accumulate * workers
        asked["global_batch"] = global_batch = runs.global_batch(own_batch, asked, earlier)
        if run is not None:
            asked["identity"] = _identity(model, code, preparation, targets.labels, on_error, frozen_precision)
        changed: list[str] = []
        steps = Preparation(model.preparation.inputs, targets.steps)
        if earlier is not None:
            changed = _compare(earlier, asked, str(run), resume)
            done = _trained_before(model, earlier, steps, targets.labels, spark) if runs.ended(earlier, asked) else None
            if done is not None:
                return done
            if frozen_precision == "auto" and earlier.asked["prefix_precision"]:
                frozen_precision = earlier.asked["prefix_precision"]["name"]
        address = own_address(spark)
        listener: Listener | None = None
        heard = stack.enter_context(Callbacks(callbacks, lambda: listener.stop() if listener else None))
        desk = _Desk(bar, heard)
        if address:
            copies = slots.runs_copies(spark)
            table = Table(
                workers,
                silence_s=silence_s(timeout_s),
                stall_s=timeout_s,
                seats_s=timeout_s,
                copies=copies,
            )
            kill = _task_killer(spark)
            listener = stack.enter_context(Listener(desk.on_event, address, table=table, place=place, kill=kill))
        if not executors.reach(spark, workers, listener.address if listener else None):
            if plain:
                raise SessionError(
                    "the executors cannot reach this driver, and with dynamic allocation they meet nowhere else. "
                    "Let them connect to the driver's ports, or turn spark.dynamicAllocation.enabled off."
                )
            listener = None
            slots.check_patience(spark)
        prefix = None
        if split:
            front = ship.ship_module(spark, split.prefix), model.preparation.to_json(), frozen_precision
            prefix = packing.once(
                (front, key_columns, df),
                partial(_prefix, spark, model, split, df, frozen_precision, key_columns),
            )
        # The rows of a step stay when the workers change; so does what goes through a worker's net at a time.
        parts = -(-global_batch // (workers * settings.batch_size))
        spec = WorkerSpec(
            run=f"{secrets.token_hex(4)}",
            name=run_name,
            workers=workers,
            threads=threads,
            validates=validation is not None,
            loop=replace(settings, accumulate=parts),
            global_batch=global_batch,
            resume=resume,
            new_optimizer=runs.touches(changed, "optimizer"),
            module=ship.ship_module(spark, tail, channels_last=False),
            signature=tail_signature.to_json(),
            preparation=tail_preparation.to_json(),
            frozen=model.frozen,
            classes=targets.classes,
            augment={name: [step.to_json() for step in steps] for name, steps in changes.items()},
            code=ship.pickled(code, "optimizer, loss, schedule, metrics"),
            run_directory=place.path,
            directory_asked=run is not None,
            beacon=beacon,
            listener=listener.address if listener else None,
            timeout_s=timeout_s,
            may_be_stopped=bool(callbacks) and listener is not None,
        )
        asked["prefix_precision"] = prefix[1] if prefix else None
        runs.write_call(place, asked, earlier.calls if earlier else 0)
        pack = spool.PackSpec(
            preparation=preparation.to_json(),
            prefix=prefix[0] if prefix else None,
            routes=route_keys(workers),
            stream=spool.TRAIN,
            drop_broken=on_error == "drop",
            threads=threads,
        )
        packed = _packed(df, pack, needed, key_columns)
        if validation is not None:
            packed = packed.unionAll(_packed(validation, replace(pack, stream=spool.VALIDATION), needed, key_columns))
        packed = packing.kept((pack, needed, key_columns, rows), packed)
        work = ship.guard(partial(run_worker, spec))
        routed = packed.repartition(workers, "key")
        special = {} if resources is None else {"profile": resources}
        if plain:
            trained = routed.mapInArrow(work, REPORT_SCHEMA, **special)
        else:
            # Spark starts a failed barrier stage again only where it is not the last one of its job.
            trained = routed.mapInArrow(work, REPORT_SCHEMA, barrier=True, **special).repartition(1)
        launched = time.time()
        result = _collect(spark, trained, desk, listener, stack)
        if listener is None:
            for event in result.events:
                heard.on_event(event)
        module = _trained_module(tail, result.weights)
        record = {
            **{name: value for name, value in asked.items() if name != "identity"},
            "attempts": result.attempt + 1,
            "resumed": result.resumed,
            "rows": result.rows,
            "sha256": result.sha256,
            "epochs": result.history,
            "phases_s": result.phases(began, launched),
            "broken": result.broken,
        }
        if result.broken["rows"]:
            examples = "; ".join(f"{name}: {why}" for name, why in result.broken["examples"])
            _LOG.warning("%s broken rows were left out: %s", f"{result.broken['rows']:,}", examples)
        from kindling import surgery

        fitted = replace(
            model,
            module=surgery.join(split.prefix, module, split) if split else module,
            preparation=steps,
            labels=targets.labels,
            history=(*model.history, record),
        )
        if run is not None:
            _keep(fitted, place, record, spark)
    return fitted


# ------------------------------------------------------------------------------------------------------ planning


def _cut(
    model: Model, preparation: Preparation, *, whole: bool
) -> tuple[Split | None, nn.Module, Signature, Preparation]:
    """The frozen front part and the rest, with the preparation of the rest; the front stays where `whole` asks so."""
    from kindling import surgery

    split = None if whole else surgery.split_frozen(model.module, model.signature, model.frozen)
    if split is None:
        # Of a graph, every layer can be frozen alone; of a module's own code, not the dropout written out in it.
        graph = surgery.trace(model.module, len(model.signature.inputs)) if model.frozen else None
        return None, graph or model.module, model.signature, preparation
    inputs: list[Step] = []
    for name in split.boundary:
        spec = split.prefix_signature.outputs[name]
        dtype = "float32" if "float" in spec.dtype else spec.dtype  # as the engine gives them
        inputs.append(ArrayStep(name, name, tuple(int(size) for size in spec.shape[1:]), dtype))
    return split, split.tail, split.tail_signature, Preparation(tuple(inputs), preparation.targets)


def _prefix(
    spark: SparkSession, model: Model, split: Split, df: DataFrame, precision: str, key_columns: Sequence[str]
) -> tuple[spool.PrefixSpec, dict[str, Any]]:
    """The frozen part on its way to the packing tasks, with the precision it will run in."""
    from kindling.predict.batch import choose_precision
    from kindling.predict.engine import PRECISIONS, net_batch

    front = replace(model, module=split.prefix, signature=split.prefix_signature, labels=None, frozen=frozenset())
    sample = _sample(df, key_columns) if precision == "auto" else df
    chosen = choose_precision(front, sample, precision, afresh=True)
    spec = spool.PrefixSpec(
        module=ship.ship_module(spark, split.prefix, dtype=PRECISIONS[chosen.name]),
        signature=split.prefix_signature.to_json(),
        precision=chosen.name,
        batch_size=net_batch(split.prefix_signature, split.prefix),
    )
    return spec, chosen.to_json()


def _sample(df: DataFrame, key_columns: Sequence[str]) -> DataFrame:
    """The same few rows whatever the order Spark reads them in: those with the smallest hashes.

    Finding them reads the keys only; then the rest of those rows.
    """
    from pyspark.sql import functions as F

    from kindling.predict.batch import SAMPLE_ROWS

    place = F.xxhash64(*(F.col(_quoted(name)) for name in key_columns))
    with ship.translated():
        first = df.select(place.alias("place")).orderBy("place").limit(SAMPLE_ROWS).collect()
    return df.where(place.isin([row["place"] for row in first])).orderBy(place)


def _describe(
    model: Model,
    settings: LoopSettings,
    code: UserCode,
    workers: int,
    threads: int,
    name: str,
    key_columns: Sequence[str],
) -> dict[str, Any]:
    """The run as JSON: what was asked for, and with what."""
    import pyspark

    return {
        "version": runs.VERSION,
        "run": name,
        "model": model.name,
        "started_unix_s": time.time(),
        "settings": asdict(settings),
        "workers": workers,
        "threads": threads,
        "strategy": {"name": type(code.strategy).__name__, **asdict(code.strategy)},
        "optimizer": _plain(code.optimizer),
        "loss": _described(code.loss),
        "metrics": {name: _plain(metric) for name, metric in code.metrics.items()},
        "schedule": None if code.schedule is None else _plain(code.schedule),
        "key": list(key_columns),
        "prefix_precision": None,
        "versions": {**runs.versions(), "pyspark": pyspark.__version__},
    }


def _described(objective: Objective) -> Any:
    """A loss by its name, or what makes up several."""
    if len(objective.terms) == 1:
        return _plain(objective.terms[0].loss)
    return {term.output: {"loss": _plain(term.loss), "weight": term.weight} for term in objective.terms}


def _identity(
    model: Model,
    code: UserCode,
    preparation: Preparation,
    labels: Sequence[str] | None,
    on_error: str,
    frozen_precision: str,
) -> dict[str, Any]:
    """The rest of what makes a run the same run, as JSON: nothing that people would want to read."""
    return {
        **runs.model_digests(model.module, len(model.signature.inputs)),
        "frozen": sorted(model.frozen),
        "preparation": preparation.to_json(),
        "labels": None if labels is None else list(labels),
        "on_error": on_error,
        "frozen_precision": frozen_precision,
        "code": {name: runs.code_digest(getattr(code, name)) for name in ("optimizer", "loss", "schedule", "metrics")},
    }


def _compare(earlier: runs.Run, asked: Mapping[str, Any], run: str, resume: str) -> list[str]:
    """Refuse a call that asks for another run than the one it would go on with, unless told to go on anyway.

    Returns: what changed.
    """
    changed = runs.changes(earlier.asked, json.loads(json.dumps(asked)))
    if changed and resume != "anyway":
        raise runs.refuse(run, changed)
    if changed:
        _LOG.warning("the run %s goes on although it was asked for otherwise: %s", run, runs.said(changed))
    versions = {"versions": earlier.asked["versions"]}, {"versions": asked["versions"]}
    if versions[0] != versions[1]:
        _LOG.warning("the run %s was begun with other versions (%s): its last bits may differ", run, versions[0])
    return changed


def _trained_before(
    model: Model, earlier: runs.Run, preparation: Preparation, labels: tuple[str, ...] | None, spark: SparkSession
) -> Model | None:
    """The result of a run that has come to its end; None where it was not kept, or cannot be read."""
    from kindling import bundle

    own = {type(part) for part in model.module.modules()}
    classes = [kind for kind in own if not kind.__module__.startswith(("torch.", "kindling."))]
    try:
        found = bundle.load(f"{earlier.place.path.rstrip('/')}/model", classes=classes, spark=spark)
    except KindlingError as error:
        _LOG.warning("the model of the ended run cannot be read, so its last checkpoint is used: %s", error)
        return None
    history = (*model.history, dict(earlier.result or {}))
    return replace(model, module=found.module, preparation=preparation, labels=labels, history=history)


def _keep(fitted: Model, place: Place, record: Mapping[str, Any], spark: SparkSession) -> None:
    """The trained model and the record into the run directory; the record last: with it the run has ended."""
    from kindling import bundle

    try:
        bundle.save(fitted, f"{place.path.rstrip('/')}/model", overwrite=True, spark=spark)
    except ModelError as error:
        _LOG.warning("the trained model is not kept in the run directory: %s", error)
    place.write("result.json", json.dumps(record, indent=1).encode())


def _plain(thing: Any) -> str:
    """A setting that is an object, in words that are the same in every process."""
    if isinstance(thing, partial):
        inside = [*map(_plain, thing.args), *(f"{k}={_plain(v)}" for k, v in thing.keywords.items())]
        return f"{_plain(thing.func)}({', '.join(inside)})"
    return getattr(thing, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


# --------------------------------------------------------------------------------------------------------- Spark


def _packed(df: DataFrame, pack: spool.PackSpec, needed: Sequence[str], key_columns: Sequence[str]) -> DataFrame:
    from pyspark.sql import functions as F

    key = F.col(_quoted(key_columns[0])).cast("string") if len(key_columns) == 1 else F.lit("?")
    columns = [F.col(_quoted(name)) for name in needed]
    hashed = F.xxhash64(*(F.col(_quoted(name)) for name in key_columns))
    ready = df.select(*columns, hashed.alias(spool.HASH), key.alias(spool.KEY))
    return ready.mapInArrow(ship.guard(partial(spool.pack_rows, pack)), spool.BLOB_SCHEMA)


def _weighted_alike(df: DataFrame, column: str) -> DataFrame:
    """Validation rows count alike, with or without weights; the workers' columns are the same for both streams."""
    from pyspark.sql import functions as F

    return df.withColumn(column, F.lit(1.0))


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def route_keys(workers: int) -> tuple[int, ...]:
    """One shuffle key per worker, such that `repartition(workers, key)` sends each to a partition of its own.

    >>> route_keys(3)
    (3, 0, 1)
    """
    found: dict[int, int] = {}
    key = 0
    while len(found) < workers:
        found.setdefault(murmur3_of_long(key) % workers, key)
        key += 1
    return tuple(found[worker] for worker in range(workers))


def murmur3_of_long(value: int, seed: int = 42) -> int:
    """Spark's hash of a long, as a signed 32-bit integer. Source: MurmurHash3_x86_32 (Appleby), as Spark SQL's `hash`.

    >>> murmur3_of_long(1)
    -1712319331
    """

    def rotate(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & 0xFFFFFFFF

    h = seed
    for half in (value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF):
        k = rotate(half * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotate(h ^ k, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= 8
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h ^= h >> 16
    return h - (1 << 32) if h >= 1 << 31 else h


def own_address(spark: SparkSession) -> str | None:
    """The address of this driver that workers can reach: loopback where they run on this machine."""
    master = spark.conf.get("spark.master", "") or ""
    if master.startswith("local"):
        return "127.0.0.1"
    return None if ship.is_connect(spark) else spark.conf.get("spark.driver.host", None)


def _run_directory(
    run: str | Path | None, resume: str, spark: SparkSession, stack: contextlib.ExitStack
) -> tuple[Place, str, runs.Run | None]:
    """The run directory with its beacon, and the run in it; a temporary one, gone afterwards, where none was named."""
    from kindling.storage import open_place

    beacon = secrets.token_hex(16)
    earlier = None
    if run is None:
        if resume == "always":
            raise ConfigError("run", run, "names no run to go on with", "Name its directory: run=...")
        folder = tempfile.mkdtemp(prefix="kindling-run-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        place = open_place(folder)
    else:
        place = open_place(str(run), spark=spark)
        earlier = runs.Run.find(place)
        if earlier is not None and resume == "never":
            raise ConfigError("run", str(run), "already holds a run", "Name a new directory, or remove that one")
        if earlier is None and resume == "always":
            raise ConfigError("run", str(run), "holds no run to go on with", "Look at the name, or leave out resume")
        place.makedirs()
    place.write("beacon", beacon.encode())
    return place, beacon, earlier


@dataclass
class _Desk:
    """The driver's reader of events: shows progress and remembers the first error."""

    bar: TrainingBar
    callbacks: Callbacks
    error: KindlingError | None = None

    def on_event(self, event: Event) -> None:
        if event.kind == "error" and self.error is None:
            self.error = from_text(str(event.data.get("wire")))
        self.bar.on_event(event)
        self.callbacks.on_event(event)


@dataclass(frozen=True)
class _Result:
    weights: bytes
    history: list[dict[str, Any]]
    events: list[Event]
    attempt: int
    rows: int
    sha256: str
    broken: dict[str, Any]
    resumed: list[dict[str, Any]]

    def phases(self, began: float, launched: float) -> dict[str, float]:
        """Seconds by phase, by rank 0's events of the last attempt; times are unix seconds.

        plan: checks and precision on the driver; pack: preparation, frozen layers and shuffle; spool; meet; build: net,
        optimizer, group; first_step; then epochs, all of them, and all, from the call to the trained model.
        """
        at = {"called": began, "launched": launched}
        for event in self.events:
            if event.rank == 0 and event.kind != "epoch":
                at.setdefault(event.kind, event.unix_s)
        marks = ("called", "launched", "start", "spooled", "met", "ready", "step")
        names = ("plan", "pack", "spool", "meet", "build", "first_step")
        spent = {
            name: at[end] - at[start] for name, (start, end) in zip(names, pairwise(marks), strict=True) if end in at
        }
        if "step" in at:
            spent["to_first_step"] = at["step"] - began
        spent["epochs"] = sum(float(record["seconds"]) for record in self.history)
        spent["all"] = time.time() - began
        return spent


def _collect(
    spark: SparkSession, trained: DataFrame, desk: _Desk, listener: Listener | None, stack: contextlib.ExitStack
) -> _Result:
    """Run the job and take its result apart: what came over the workers' lines, else its rows.

    Raises: the error that a worker has told.
    """
    tag = f"kindling-{secrets.token_hex(6)}"
    cancel = cancel_by_tag(spark, tag, stack)
    rows: list[tuple[int, str, int, bytes]] = []
    try:
        with ship.bounded_arrow_batches(spark):
            rows = [(row["rank"], row["kind"], row["part"], bytes(row["data"])) for row in trained.collect()]
    except KeyboardInterrupt:
        cancel()
        raise
    except Exception as error:
        if not (listener and listener.results()):  # else only Spark's own book-keeping has failed, after the training
            _explain(error, desk, listener)
    for _, kind, _, data in rows:
        if kind == "error":
            raise from_text(data.decode()) or SessionError("a worker failed without saying why.")
    if listener:
        rows = listener.results()
    reports = {rank: json.loads(data) for rank, kind, _, data in rows if kind == "report"}
    if not reports:
        if desk.error is not None:
            raise desk.error
        # Spark 3.5 leaves out a stage that it knows to have no input.
        raise DataError(NO_ROWS.format("train"))
    events = [
        Event.from_line(line) for _, kind, _, data in rows if kind == "events" for line in data.splitlines() if line
    ]
    digests = {rank: report["sha256"] for rank, report in reports.items()}
    if len(set(digests.values())) > 1:
        _LOG.warning("the workers ended with different weights: %s", digests)
    parts = sorted((part, data) for _, kind, part, data in rows if kind == "weights")
    first = reports[0]
    notes = [note for note in first["notes"] if note.get("broken")]
    return _Result(
        weights=b"".join(data for _, data in parts),
        history=first["history"],
        events=events,
        attempt=first["attempt"],
        rows=first["rows"],
        resumed=first["resumed"],
        sha256=first["sha256"],
        broken={
            "rows": sum(note["broken"] for note in notes),
            "examples": [example for note in notes for example in note["examples"]][:5],
        },
    )


def _explain(error: Exception, desk: _Desk, listener: Listener | None) -> NoReturn:
    """Raise what ended the job: what a worker has told, else how the workers were lost, else what Spark says."""
    if desk.error is not None:
        raise desk.error from None
    reasons = listener.table.reasons if listener else []
    if reasons and ship.is_sparks(error):
        try:
            ship.unwrap(error)
        except SessionError as told:
            raise SessionError(
                f"the workers were started {len(reasons)} times and lost each time. The last time: {reasons[-1]} {told}"
            ) from None
    ship.unwrap(error)


def _task_killer(spark: SparkSession) -> Callable[[int, str], None] | None:
    """Has Spark kill a task by its number; on Connect there is no way to ask for that."""
    if ship.is_connect(spark):
        return None
    scheduler = spark.sparkContext._jsc.sc()

    def kill(task: int, reason: str) -> None:
        scheduler.killTaskAttempt(task, True, reason)

    return kill


def cancel_by_tag(spark: SparkSession, tag: str, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Tag the jobs of this thread; returns what cancels them, from any thread."""
    if ship.is_connect(spark):
        spark.addTag(tag)
        stack.callback(spark.removeTag, tag)

        def interrupt() -> None:
            spark.interruptTag(tag)

        return interrupt
    context = spark.sparkContext
    context.addJobTag(tag)
    stack.callback(context.removeJobTag, tag)

    def cancel() -> None:
        context.cancelJobsWithTag(tag)

    return cancel


def _trained_module(tail: nn.Module, weights: bytes) -> nn.Module:
    from safetensors.torch import load

    module = copy.deepcopy(tail)
    module.load_state_dict(load(weights))
    return module.eval()
