"""The search itself: trials in threads of the driver, each of them a training on some of Spark's task slots.

Never more trials at a time than there are slots for their workers: Spark starts the workers of a training together or
not at all, so those of two trainings cannot hold each other up, and packing tasks, which wait for nobody, come to an
end. Rows are prepared, and run through a frozen front, once for all trials (`train/packing.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling import ship
from kindling.errors import ConfigError, TrainingError, did_you_mean
from kindling.model import Model
from kindling.randomness import borrowed
from kindling.train import slots
from kindling.train.callbacks import StopTraining
from kindling.train.events import Event
from kindling.train.fit import cancel_by_tag
from kindling.train.packing import PackedOnce
from kindling.train.settings import EarlyStopping
from kindling.train.stopping import Watch, observe
from kindling.tune import pruning, sampling
from kindling.tune import space as spaces
from kindling.tune.pruning import Pruner, better
from kindling.tune.result import FAILED, FINISHED, PRUNED, SearchResult, Trial, table

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from kindling.storage import Place
    from kindling.tune.sampling import Sampler
    from kindling.tune.space import Params, Range, Value

_LOG = logging.getLogger("kindling.search")

Build = Callable[[dict[str, Any]], "Model | Mapping[str, Any]"]

OWN = ("df", "validation", "workers", "seed", "run", "resume", "progress")
"""Arguments of `fit` that are the search's, not a trial's."""


def search(
    build: Build | Model,
    df: DataFrame,
    space: Mapping[str, Range | Sequence[Value]],
    *,
    validation: DataFrame,
    metric: str = "loss",
    mode: str | None = None,
    sampler: str | None = None,
    trials: int | None = None,
    pruner: Pruner | str | None = None,
    seed: int = 0,
    workers: int = 1,
    parallel: int | None = None,
    run: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> SearchResult:
    """Train with many settings on Spark, several at a time, and keep the best model.

    Args:
        build: makes a trial of its parameters: a Model, or a dict with `model` and any other arguments of `Model.fit`
            (`optimizer`, `epochs`, ...). A Model instead: then parameters are arguments of `fit` by name.
        df, validation: the rows to learn from, and those by which trials are compared.
        space: parameter -> a list of values, or a range: `kindling.space.LogUniform(1e-4, 1e-1)`, `Uniform`, `Integer`.
        metric: a figure of the validation: `"loss"`, `"accuracy"`, ...
        mode: `"min"` or `"max"`; None: small is good for a loss or an error, else large.
        sampler: `"grid"`, `"random"`, or `"tpe"`, Optuna's, which learns from the trials that have ended. None: the
            grid of a space of lists where `trials` is left open, else `"random"`.
        trials: how many; of a grid all.
        pruner: ends trials that fall behind: `"median"`, `"halving"`, or one with settings
            (`kindling.tune.SuccessiveHalving(factor=4)`). They see each epoch's validation.
        seed: of the proposals, and of every trial: a trial is what `torch.manual_seed(seed)`, `build(params)` and
            `fit(..., seed=seed)` give, bit for bit. Grid and random propose the same however many run at a time.
        workers: of each trial.
        parallel: trials at a time; as many as there are task slots for if None.
        run: a directory, on any file system: each trial becomes a run directory in it, and `result.json` a table of
            all. The same call again goes on: trials that have ended are not repeated, those that failed or were broken
            off are. None keeps only the best model.
        progress: print a line for each trial that ends.
        options: what all trials hand to `Model.fit`.
    Returns: the best model with its parameters, and a record of every trial; a trial that fails is a record too.
    Raises: ConfigError; TrainingError, when all trials fail.
    """
    smaller = EarlyStopping(metric=metric, mode=mode).smaller_is_better
    read = spaces.read_space(space)
    known = set(inspect.signature(Model.fit).parameters) - {"self", *OWN}
    _check_names(options, known, "options")
    if isinstance(build, Model):
        _check_names(read, known, "space")
    proposer, count, name = sampling.choose(sampler, read, trials=trials, seed=seed, smaller_is_better=smaller)
    spark = df.sparkSession
    at_a_time = _at_a_time(spark, workers, parallel)
    asked = {
        "version": 1,
        "space": spaces.to_json(read),
        "metric": metric,
        "mode": "min" if smaller else "max",
        "sampler": name,
        "seed": seed,
    }
    folder = _Folder.open(run, spark, asked) if run is not None else None
    searching = _Search(
        build=build,
        df=df,
        validation=validation,
        options=options,
        known=known,
        metric=metric,
        smaller=smaller,
        sampler=proposer,
        count=count,
        pruner=pruning.choose(pruner),
        seed=seed,
        workers=workers,
        folder=folder,
        say=_printer(progress),
    )
    return searching.run(spark, at_a_time)


@dataclass
class _Board:
    """A trial at work, as the pruner sees it: a callback of its training."""

    metric: str
    hopeless: Callable[[int, Mapping[int, float]], bool]
    over: threading.Event
    values: dict[int, float] = field(default_factory=dict)
    pruned: bool = False

    def __call__(self, event: Event) -> None:
        if self.over.is_set():
            raise StopTraining
        value = event.data.get("validation", {}).get(self.metric) if event.kind == "epoch" and not event.rank else None
        if value is not None and not self.pruned:
            self.values[event.epoch] = float(value)
            if self.hopeless(event.epoch, self.values):
                self.pruned = True
                raise StopTraining


@dataclass(kw_only=True)
class _Search:
    build: Build | Model
    df: DataFrame
    validation: DataFrame
    options: Mapping[str, Any]
    known: set[str]
    metric: str
    smaller: bool
    sampler: Sampler
    count: int
    pruner: Pruner | None
    seed: int
    workers: int
    folder: _Folder | None
    say: Callable[[str], None]

    def run(self, spark: SparkSession, at_a_time: int) -> SearchResult:
        self._lock = threading.Lock()
        self._records: dict[int, Trial] = {}
        self._boards: dict[int, _Board] = {}
        self._best: tuple[Trial, Model | None] | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._once = PackedOnce()
        for trial in self.folder.ended() if self.folder else ():
            if trial.number < self.count:
                self._note(trial, None)
        self._waiting = iter([number for number in range(self.count) if number not in self._records])
        tag = f"kindling-search-{secrets.token_hex(6)}"
        cancels: list[Callable[[], None]] = []

        def work() -> None:
            with contextlib.ExitStack() as stack:
                cancels.append(cancel_by_tag(spark, tag, stack))
                self._work()

        # A wrapper of its own for each: on Spark Classic it holds the thread's job tags.
        threads = [
            threading.Thread(target=_inheriting(spark, work), name=f"kindling-trial-{index}")
            for index in range(min(at_a_time, self.count))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # short: an interrupt of the user's comes between
        except BaseException:
            self._over.set()
            if cancels:
                cancels[0]()
            for thread in threads:
                thread.join()
            raise
        finally:
            self._once.close()
        if self._error is not None:
            raise self._error
        return self._result(spark)

    def _result(self, spark: SparkSession) -> SearchResult:
        trials = tuple(self._records[number] for number in sorted(self._records))
        if self._best is None:
            first = trials[0]
            raise TrainingError(
                f"none of the {len(trials)} trials came to its end. Trial {first.number}: {first.error}"
            )
        best, model = self._best
        if model is None:
            assert self.folder is not None
            model = self.folder.model(best, self._built(best.params)[0], spark)
        if self.folder is not None:
            self.folder.close(table(trials, self.metric, self.smaller, best))
        return SearchResult(
            best_model=model, best=best, trials=trials, metric=self.metric, smaller_is_better=self.smaller
        )

    # ------------------------------------------------------------------------------------------- in trial threads

    def _work(self) -> None:
        """Take one trial after the other until there are none."""
        while not self._over.is_set():
            with self._lock:
                number = next(self._waiting, None)
                if number is None:
                    return
                try:
                    params = self.sampler.propose(number)
                except BaseException as error:  # raised again where the search was called
                    self._error = error
                    self._over.set()
                    return
            trial, model = self._train(number, params)
            if self._over.is_set():
                return
            with self._lock:
                try:
                    self._note(trial, model)
                    if self.folder is not None:
                        self.folder.note(trial)
                except BaseException as error:
                    self._error = error
                    self._over.set()
                    return
                self.say(self._told(trial))

    def _train(self, number: int, params: Params) -> tuple[Trial, Model | None]:
        began = time.monotonic()
        board = _Board(self.metric, lambda epoch, mine: self._hopeless(number, epoch, mine), self._over)
        with self._lock:
            self._boards[number] = board
        epochs: Sequence[Mapping[str, Any]] = ()
        value: float | None = None
        state, error, model = FAILED, None, None
        try:
            untrained, options = self._built(params)
            place = self.folder.fresh(number) if self.folder is not None else None
            with self._once.shared():
                model = untrained.fit(
                    self.df,
                    validation=self.validation,
                    workers=self.workers,
                    seed=self.seed,
                    run=place,
                    progress=False,
                    **{**options, "callbacks": [board, *options.get("callbacks", ())]},
                )
            epochs = model.history[-1]["epochs"]
            value = given_value(epochs, self.metric, options.get("early_stopping"))
            pruned = board.pruned and epochs[-1].get("stopped") == "asked"
            state = PRUNED if pruned else FINISHED
            if not math.isfinite(value):
                state, error, value, model = FAILED, f"its {self.metric} is {value}", None, None
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            _LOG.info("trial %s with %s failed", number, params, exc_info=failure)
        trial = Trial(
            number=number,
            params=params,
            state=state,
            value=value,
            values=[float(e["validation"][self.metric]) for e in epochs if self.metric in e.get("validation", {})],
            epochs=len(epochs),
            seconds=time.monotonic() - began,
            error=error,
        )
        return trial, model if state == FINISHED else None

    def _built(self, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
        """The trial's untrained model and its arguments of `fit`."""
        if isinstance(self.build, Model):
            return self.build, {**self.options, **params}
        with borrowed(self.seed):
            made = self.build(dict(params))
        if isinstance(made, Model):
            return made, dict(self.options)
        if not isinstance(made, Mapping) or not isinstance(made.get("model"), Model):
            raise ConfigError(
                "build", made, "is what it gave, and no model", "Return a Model, or a dict with 'model' in it"
            )
        options = {name: value for name, value in made.items() if name != "model"}
        _check_names(options, self.known, "build")
        return made["model"], {**self.options, **options}

    def _hopeless(self, number: int, epoch: int, mine: Mapping[int, float]) -> bool:
        if self.pruner is None:
            return False
        with self._lock:
            curves = {n: dict(board.values) for n, board in self._boards.items() if n != number}
            earlier = {n: dict(enumerate(t.values, 1)) for n, t in self._records.items() if n not in self._boards}
        others = [curve for curve in {**earlier, **curves}.values() if curve]
        return self.pruner.hopeless(epoch, mine, others, smaller_is_better=self.smaller)

    def _note(self, trial: Trial, model: Model | None) -> None:
        """Take a trial that has ended into account; the best of two alike is the first by number."""
        self._records[trial.number] = trial
        self.sampler.tell(trial)
        if trial.state != FINISHED or trial.value is None:
            return
        if self._best is not None:
            best = self._best[0]
            assert best.value is not None
            alike = trial.value == best.value and trial.number < best.number
            if not alike and not better(trial.value, best.value, smaller_is_better=self.smaller):
                return
        self._best = trial, model

    def _told(self, trial: Trial) -> str:
        params = ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in trial.params.items())
        told = f"trial {trial.number} ({params}): "
        if trial.value is None:
            return f"{told}failed: {trial.error}"
        told += f"{self.metric} {trial.value:.4f} after {trial.epochs} epochs"
        if trial.state == PRUNED:
            told += ", given up"
        if self._best is not None:
            told += f"; best {self._best[0].value:.4f}"
        return told


def given_value(epochs: Sequence[Mapping[str, Any]], metric: str, stopping: EarlyStopping | None) -> float:
    """The figure of the weights that a training gave: of its last epoch, or of those that early stopping gave back.

    >>> epochs = [{"validation": {"loss": loss}} for loss in (0.9, 0.5, 0.7)]
    >>> given_value(epochs, "loss", None), given_value(epochs, "loss", EarlyStopping(patience=5))
    (0.7, 0.5)

    Raises: ConfigError, for a figure that was not measured.
    """
    measured: list[Mapping[str, float]] = []
    for epoch in epochs:
        between = [figures for figures in epoch.get("validations", ()) if figures != epoch.get("validation")]
        measured += [*between, *([epoch["validation"]] if "validation" in epoch else [])]
    chosen = measured[-1]
    if stopping is not None and stopping.restore_best:
        watch = Watch()
        for figures in measured:
            watch, progress = observe(stopping, watch, float(figures[stopping.metric]))
            chosen = figures if progress else chosen
    if metric not in chosen:
        raise ConfigError("metric", metric, f"is not measured.{did_you_mean(metric, chosen)}", "Name one that is")
    return float(chosen[metric])


@dataclass
class _Folder:
    """A search's directory: `search.json`, `trials/NUMBER/` with a run and `trial.json`, at the end `result.json`."""

    place: Place

    @classmethod
    def open(cls, run: str | Path, spark: SparkSession, asked: Mapping[str, Any]) -> _Folder:
        from kindling.storage import open_place

        place = open_place(str(run), spark=spark)
        if place.exists("search.json"):
            before = json.loads(place.read("search.json"))
            changed = [name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))]
            if changed:
                told = "; ".join(f"{name} was {before.get(name)!r} and is now {asked[name]!r}" for name in changed)
                raise ConfigError("run", str(run), f"holds another search: {told}", "Name a new directory")
        else:
            if place.exists("run.json"):
                raise ConfigError("run", str(run), "already holds a run", "Name a new directory")
            place.makedirs()
            place.write("search.json", json.dumps(asked, indent=1).encode())
        return cls(place)

    def ended(self) -> Iterator[Trial]:
        """Trials of earlier calls that need not be repeated."""
        for name in self.place.list("trials"):
            if name.endswith("/trial.json") and name.count("/") == 2:
                trial = Trial.from_json(json.loads(self.place.read(name)))
                if trial.state != FAILED:
                    yield trial

    def fresh(self, number: int) -> str:
        """An empty run directory for a trial."""
        name = _trial_name(number)
        self.place.delete(name)
        return f"{self.place.path}/{name}"

    def note(self, trial: Trial) -> None:
        self.place.write(f"{_trial_name(trial.number)}/trial.json", json.dumps(trial.to_json(), indent=1).encode())

    def close(self, result: Mapping[str, Any]) -> None:
        self.place.write("result.json", json.dumps(result, indent=1).encode())

    def model(self, trial: Trial, untrained: Model, spark: SparkSession) -> Model:
        """The model that a trial of an earlier call gave."""
        from kindling import bundle

        own = {type(part) for part in untrained.module.modules()}
        classes = [kind for kind in own if not kind.__module__.startswith(("torch.", "kindling."))]
        return bundle.load(f"{self.place.path}/{_trial_name(trial.number)}/model", classes=classes, spark=spark)


def _trial_name(number: int) -> str:
    return f"trials/{number:04}"


def _check_names(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name in OWN:
            raise ConfigError(where, name, "is an argument of the search itself", "Give it there")
        if name not in known:
            raise ConfigError(where, name, f"is no argument of fit.{did_you_mean(name, known)}", "Leave it out")


def _at_a_time(spark: SparkSession, workers: int, parallel: int | None) -> int:
    """Trials that may run together."""
    for name, count in (("workers", workers), ("parallel", 1 if parallel is None else parallel)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(name, count, "is no count", "Use a whole number, 1 or more")
    there = slots.slots(spark, wanted=workers * (parallel or 1))
    if there is None:  # a server that does not tell
        return parallel or 1
    if workers * (parallel or 1) > there:
        raise ConfigError(
            "workers" if workers > there else "parallel",
            workers if workers > there else parallel,
            f"needs {workers * (parallel or 1)} task slots at the same time, and the session has {there}",
            "Use fewer, or a larger cluster",
        )
    return parallel or there // workers


def _inheriting(spark: SparkSession, target: Callable[[], None]) -> Callable[[], None]:
    """A thread's target that has what Spark knows of this thread: its scheduler pool, job group, tags."""
    if ship.is_connect(spark):
        from pyspark import inheritable_thread_target

        wrapped: Callable[[], None] = inheritable_thread_target(spark)(target)
        return wrapped
    scala = spark.sparkContext._jsc.sc()
    properties = scala.getLocalProperties().clone()

    def run() -> None:
        scala.setLocalProperties(properties)
        target()

    return run


def _printer(shown: bool) -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, quiet=not shown)
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
