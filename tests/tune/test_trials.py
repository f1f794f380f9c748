"""Searches on a real session: the best is what training it alone gives; slots, packing, faults, going on."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd
from kindling.errors import ConfigError, TrainingError
from kindling.tune import SuccessiveHalving
from kindling.tune.result import FAILED, FINISHED, PRUNED, SearchResult, Trial
from kindling.tune.trials import given_value

SEED = 3
ROWS, CHECKED = 240, 120


def digest(model: kd.Model) -> str:
    state = model.module.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def digits(spark: Any, start: int, end: int) -> Any:
    """Rows of scikit-learn's handwritten digits: path, label, features."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    rows = [(f"{i:04}", str(data.target[i]), (data.data[i] / 16).tolist()) for i in range(start, end)]
    return spark.createDataFrame(rows, "path string, label string, features array<float>").repartition(2)


class Lab:
    """Builds trials with a frozen front, and keeps what it was asked for and what they told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.events: list[tuple[tuple[Any, ...], kd.Event]] = []
        self.broken = True
        self._lock = threading.Lock()

    def build(self, params: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self.asked.append(params)
        if self.broken and params == {"lr": 1e-5, "width": 8}:
            raise ValueError("no such net")
        net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, params["width"]), nn.ReLU())
        net.append(nn.Linear(params["width"], 10))
        with torch.random.fork_rng():
            torch.manual_seed(99)  # of a frozen front that all trials have in common
            net[0] = nn.Linear(64, 24)
        model = kd.Model.of(net, shape=(64,), labels=[str(i) for i in range(10)]).freeze(until="1")

        def hear(event: kd.Event) -> None:
            self.events.append((tuple(params.values()), event))

        return {"model": model, "optimizer": partial(torch.optim.Adam, lr=params["lr"]), "callbacks": [hear]}


SPACE: Any = {"lr": [1e-5, 3e-2], "width": [8, 16]}
SETTINGS: Any = {
    "epochs": 25,
    "checkpoints": kd.Checkpoints(epochs=25),
    "batch_size": 16,
    "frozen_precision": "fp32",
    "key": "path",
}


def counted(df: Any, read: Any) -> Any:
    """The same rows; each that is read adds one."""

    def count(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            read.add(batch.num_rows)
            yield batch

    return df.mapInArrow(count, df.schema)


@pytest.mark.slow
@pytest.mark.spark
def test_a_grid_with_a_frozen_front(spark: Any, tmp_path: Path) -> None:
    train, valid = digits(spark, 0, ROWS), digits(spark, ROWS, ROWS + CHECKED)
    lab, read = Lab(), spark.sparkContext.accumulator(0)
    search = partial(
        kd.search,
        lab.build,
        counted(train, read),
        SPACE,
        validation=counted(valid, read),
        metric="accuracy",
        seed=SEED,
        run=tmp_path / "search",
        progress=False,
        **SETTINGS,
    )
    found = search()

    # A trial that fails is a record; the others go on.
    assert [trial.params for trial in found.trials] == kd.space.grid({n: tuple(v) for n, v in SPACE.items()})
    errors = [trial.error for trial in found.trials]
    assert [trial.state for trial in found.trials] == [FAILED, FINISHED, FINISHED, FINISHED], errors
    assert found.trials[0].error == "ValueError: no such net"

    # The best is known: the rate of 1e-5 cannot get anywhere in 25 epochs.
    assert found.best_params["lr"] == 3e-2
    assert found.best_value > 0.7 > 0.4 > found.trials[1].values[-1]
    assert found.best_value == max(trial.value or 0.0 for trial in found.trials)
    assert len(found.best.values) == found.best.epochs == 25

    # Rows were prepared, and run through the frozen front, once for all three.
    assert read.value == ROWS + CHECKED

    # Two trials at a time, never three, on two slots.
    spans = {}
    for key, event in lab.events:
        first, last = spans.get(key, (event.unix_s, event.unix_s))
        spans[key] = min(first, event.unix_s), max(last, event.unix_s)
    assert len(spans) == 3
    together = [sum(a <= at <= b for a, b in spans.values()) for at, _ in spans.values()]
    assert max(together) == 2

    # It is what training it alone gives, bit for bit, and takes raw rows.
    torch.manual_seed(SEED)
    made = Lab().build(found.best_params)
    alone = made["model"].fit(
        train, validation=valid, workers=1, seed=SEED, optimizer=made["optimizer"], progress=False, **SETTINGS
    )
    assert digest(alone) == digest(found.best_model)
    assert alone.history[-1]["epochs"][-1]["validation"]["accuracy"] == found.best_value
    assert found.best_model.evaluate(valid).accuracy == pytest.approx(found.best_value)

    # Every trial is a run, and there is a table of all.
    best = tmp_path / "search" / "trials" / f"{found.best.number:04}"
    assert json.loads((best / "result.json").read_text())["epochs"][-1]["validation"]["accuracy"] == found.best_value
    assert digest(kd.load(best / "model")) == digest(alone)
    assert json.loads((tmp_path / "search" / "result.json").read_text()) == json.loads(json.dumps(found.to_json()))

    # The same call goes on: only what failed is tried again.
    lab.broken, lab.asked = False, []
    again = search()
    assert lab.asked.count({"lr": 1e-5, "width": 8}) == 1
    assert {tuple(params.values()) for params in lab.asked} == {(1e-5, 8), tuple(found.best_params.values())}
    assert [trial.state for trial in again.trials] == [FINISHED] * 4
    assert again.trials[1:] == found.trials[1:]
    assert digest(again.best_model) == digest(found.best_model)

    with pytest.raises(ConfigError, match="holds another search: seed was 3 and is now 4"):
        search(seed=4)


@pytest.mark.spark
def test_trials_that_fall_behind_end_early(spark: Any) -> None:
    train = digits(spark, 0, 64)
    net = kd.Model.of(nn.Linear(64, 10), shape=(64,), labels=[str(i) for i in range(10)])

    def build(params: dict[str, Any]) -> dict[str, Any]:
        return {"model": net, "optimizer": partial(torch.optim.SGD, lr=params["lr"])}

    found = kd.search(
        build,
        train,
        {"lr": [0.5, 1e-6]},
        validation=train,
        pruner=SuccessiveHalving(epochs=2, factor=2),
        parallel=1,
        epochs=200,
        checkpoints=kd.Checkpoints(epochs=200),
        progress=False,
    )
    good, bad = found.trials
    assert (good.state, bad.state) == (FINISHED, PRUNED)
    assert good.epochs == 200
    assert 2 <= bad.epochs < 200
    assert len(bad.values) == bad.epochs
    assert found.best == good
    assert "given up" in str(found)


@pytest.mark.spark
def test_what_cannot_work_is_said(spark: Any) -> None:
    rows = digits(spark, 0, 20)
    net = kd.Model.of(nn.Linear(64, 10), shape=(64,), labels=[str(i) for i in range(10)])
    search = partial(kd.search, net, rows, {"batch_size": [4, 8]}, validation=rows, progress=False)
    for options, words in (
        ({"parallel": 99}, "parallel=99 needs 99 task slots at the same time, and the session has"),
        ({"workers": 0}, "workers=0 is no count"),
        ({"batchsize": 3}, r"batchsize' is no argument of fit. Did you mean 'batch_size'"),
        ({"resume": True}, "is an argument of the search itself"),
        ({"mode": "best"}, "mode='best' is no direction"),
    ):
        with pytest.raises(ConfigError, match=words):
            search(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is an argument of the search itself"):
        kd.search(net, rows, {"seed": [1, 2]}, validation=rows)

    def broken(params: dict[str, Any]) -> Any:
        return 3 if params["a"] else 1 / 0

    with pytest.raises(TrainingError, match=r"none of the 2 trials came to its end. Trial 0: ZeroDivisionError"):
        kd.search(broken, rows, {"a": [False, True]}, validation=rows, progress=False)


def test_the_value_is_that_of_the_weights_that_are_given_back() -> None:
    stopping = kd.EarlyStopping(patience=9, metric="accuracy")
    epochs: Any = [
        {"validation": {"loss": 0.9, "accuracy": 0.5}},
        {"validation": {"loss": 0.5, "accuracy": 0.7}},
        {"epoch": 3},
        {"validation": {"loss": 0.2, "accuracy": 0.6}},
    ]
    assert given_value(epochs, "loss", None) == 0.2
    assert given_value(epochs, "loss", stopping) == 0.5
    assert given_value(epochs, "loss", kd.EarlyStopping(metric="accuracy", restore_best=False)) == 0.2
    between: Any = [{"validations": [{"step": 3, "loss": 0.1}, {"step": 6, "loss": 0.3}], "validation": {"loss": 0.4}}]
    assert given_value(between, "loss", kd.EarlyStopping()) == 0.1
    with pytest.raises(ConfigError, match=r"metric='accuracy' is not measured"):
        given_value(between, "accuracy", None)


def test_the_table_has_the_best_first() -> None:
    def trial(number: int, state: str, value: float | None) -> Trial:
        error = "ValueError: no" if state == FAILED else None
        params = {"lr": 0.1 * number, "kind": "a"}
        return Trial(
            number=number, params=params, state=state, value=value, values=[], epochs=number, seconds=1.5, error=error
        )

    trials = (trial(0, FAILED, None), trial(1, FINISHED, 0.5), trial(2, PRUNED, 0.9), trial(3, FINISHED, 0.7))
    model = kd.Model.of(nn.Linear(2, 2), shape=(2,))
    found = SearchResult(best_model=model, best=trials[3], trials=trials, metric="accuracy", smaller_is_better=False)
    heading, *lines = str(found).splitlines()
    assert heading.split() == ["trial", "accuracy", "lr", "kind", "epochs", "seconds"]
    assert [line.split()[0] for line in lines] == ["3", "1", "2", "0"]
    assert lines[-1].endswith("ValueError: no")
    assert found.best_params == {"lr": pytest.approx(0.3), "kind": "a"}
    assert json.loads(json.dumps(found.to_json()))["best"] == 3
    assert np.isfinite(found.best_value)
