"""Training on a real session: rows, faults, determinism, errors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd
from kindling.errors import ConfigError, DataError, ModelError, TrainingError
from kindling.many_labels import LabelReport
from kindling.train.fit import murmur3_of_long, route_keys

from train_runs import SGD, blobs, digest, fit, frame, net  # isort: skip

pytestmark = pytest.mark.spark


@pytest.mark.sessions
@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=5)], ids=["allreduce", "averaging"])
def test_a_net_learns_and_the_original_is_untouched(spark: Any, strategy: Any) -> None:
    df = frame(spark, blobs(600))
    model = net()
    before = digest(model)
    trained = fit(model, df, epochs=8, strategy=strategy, validation=df)
    (record,) = trained.history
    assert record["epochs"][-1]["loss"] < 0.4 * record["epochs"][0]["loss"]
    assert record["epochs"][-1]["validation"]["accuracy"] > 0.9
    assert record["rows"] == 600
    assert digest(model) == before != digest(trained)
    report = trained.evaluate(df)
    assert report.accuracy == pytest.approx(record["epochs"][-1]["validation"]["accuracy"])
    assert report.loss == pytest.approx(record["epochs"][-1]["validation"]["loss"], rel=1e-5)


def test_a_function_on_the_driver_ends_the_training(spark: Any) -> None:
    heard: list[kd.Event] = []

    def enough(event: kd.Event) -> None:
        heard.append(event)
        if event.kind == "epoch" and event.epoch == 3:
            raise kd.StopTraining

    trained = fit(net(), frame(spark, blobs(100)), epochs=100_000, callbacks=[enough])
    *_, last = trained.history[-1]["epochs"]
    assert last["stopped"] == "asked"
    assert 3 <= last["epoch"] < 100_000
    epochs = [event.epoch for event in heard if event.kind == "epoch" and event.rank == 0]
    assert epochs == list(range(1, last["epoch"] + 1))
    assert {event.rank for event in heard} == {0, 1}


@pytest.mark.parametrize("asked", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_one_worker_is_plain_torch(spark: Any, asked: dict[str, bool]) -> None:
    """The same rows in the same order through a loop written out here, with a fused step unless asked otherwise."""
    from kindling.train.order import epoch_order, plan_order, shard_of, static_order

    rows = blobs(100)
    df = frame(spark, rows)
    trained = fit(net(), df, workers=1, epochs=3, optimizer=partial(SGD, **asked))
    hashed = {r["path"]: r["h"] for r in df.selectExpr("path", "xxhash64(path) h").collect()}
    hashes = np.array([hashed[path] for path, _, _ in rows], np.int64).view(np.uint64)
    static = static_order(hashes, lambda row: b"")
    plan = plan_order(np.bincount(shard_of(hashes), minlength=240), 1, 0, 16)
    x = torch.tensor([r[2] for r in rows])
    y = torch.tensor([int(r[1][1:]) for r in rows])
    module = net().module
    optimizer = SGD(module.parameters(), **(asked or {"fused": True}))
    for epoch in (1, 2, 3):
        order = static[epoch_order(hashes[static], plan.place_of_own, epoch, 0)]
        for index in np.split(order, range(16, 100, 16)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[index]), y[index]).backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, trained.module.state_dict()[name]), name


@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=2)], ids=["allreduce", "averaging"])
def test_an_optimizer_that_looks_at_the_loss_several_times(spark: Any, strategy: Any) -> None:
    lbfgs = partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe")
    trained = fit(net(), frame(spark, blobs(200)), strategy=strategy, optimizer=lbfgs, batch_size=100, epochs=4)
    first, *_, last = (epoch["loss"] for epoch in trained.history[-1]["epochs"])
    assert last < 0.5 * first


def test_one_worker_with_lbfgs_is_plain_torch(spark: Any) -> None:
    rows = blobs(60)
    trained = fit(
        net(), frame(spark, rows), workers=1, epochs=1, batch_size=60, optimizer=partial(torch.optim.LBFGS, max_iter=4)
    )
    module = net().module
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=4)
    x, y = torch.tensor([r[2] for r in rows]), torch.tensor([int(r[1][1:]) for r in rows])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    for name, value in module.state_dict().items():  # the rows stand in another order: the last bits differ
        torch.testing.assert_close(value, trained.module.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=2)], ids=["allreduce", "averaging"])
def test_one_row_alone_does_not_stop_batch_normalisation(spark: Any, strategy: Any) -> None:
    """33 rows on two workers with batches of 8: some step leaves a worker a single row, which has no variance."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = kd.Model.of(module, shape=(4,), labels=["c0", "c1", "c2"])
    for rows in (33, 17):
        trained = fit(model, frame(spark, blobs(rows)), strategy=strategy, batch_size=8, epochs=2)
        assert trained.history[-1]["rows"] == rows
        assert np.isfinite(trained.history[-1]["epochs"][-1]["loss"])


def test_the_precision_of_a_frozen_front_depends_on_the_rows_alone(spark: Any) -> None:
    rows = blobs(300)
    torch.manual_seed(0)
    trunk = kd.Model.of(nn.Sequential(nn.Linear(4, 32), nn.Tanh()), shape=(4,))
    model = trunk.freeze().then(nn.Linear(32, 3), labels=["c0", "c1", "c2"])
    seen = set()
    for attempt, partitions in enumerate((1, 4)):
        random.Random(attempt).shuffle(rows)
        trained = fit(model, frame(spark, rows, partitions), frozen_precision="auto")
        seen.add((digest(trained), json.dumps(trained.history[-1]["prefix_precision"]["cosines"])))
    assert len(seen) == 1


@pytest.mark.sessions
def test_the_same_bits_whatever_order_the_rows_come_in(spark: Any) -> None:
    rows = blobs(400)
    model = net(dropout=0.3)
    digests = set()
    for attempt, partitions in enumerate((1, 5, 3)):
        random.Random(attempt).shuffle(rows)
        digests.add(digest(fit(model, frame(spark, rows, partitions), strategy=kd.ParameterAveraging(every=3))))
    assert len(digests) == 1
    assert digest(fit(model, frame(spark, rows), strategy=kd.ParameterAveraging(every=3), seed=1)) not in digests
    # So few rows are one block in each shard: sorted on disk, they come in the same order.
    assert digest(fit(model, frame(spark, rows), strategy=kd.ParameterAveraging(every=3), shuffle="blocks")) in digests


@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=2)], ids=["allreduce", "averaging"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
def test_no_row_is_lost_or_doubled(spark: Any, tmp_path: Path, strategy: Any, rows: int) -> None:
    """Few rows, empty partitions, fewer rows than workers: the loss function writes down what it sees."""
    data = [(f"p{i}", f"c{i % 2}", [float(i), 0.0, 0.0, 0.0]) for i in range(rows)]
    if rows == 1:
        data.append(("p1", "c1", [1.0, 0.0, 0.0, 0.0]))
    df = frame(spark, data, partitions=7)
    seen = str(tmp_path / "seen")

    class Remember(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                with open(seen, "a") as file:
                    file.write("".join(f"{value:.0f}\n" for value in x[:, 0].tolist()))
            return x

    torch.manual_seed(0)
    model = kd.Model.of(nn.Sequential(Remember(), nn.Linear(4, 2)), shape=(4,), labels=["c0", "c1"])
    Path(seen).write_text("")
    trained = fit(model, df, strategy=strategy, batch_size=3, epochs=2)
    lines = [int(line) for line in Path(seen).read_text().split()]
    expected = sorted([int(row[2][0]) for row in data] * 2)
    assert sorted(lines[-len(expected) :]) == expected  # before them stands the rehearsal on the driver
    assert trained.history[-1]["rows"] == len(data)


class WaitForDeath:
    """Cross entropy; in its call `at` it names its process in a file and waits, so often as it is to die."""

    def __init__(self, path: str, at: int, deaths: int) -> None:
        self.path, self.at, self.deaths = path, at, deaths
        self.calls = -1  # the first is the rehearsal on the driver

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            files = [f"{self.path}-{death}" for death in range(self.deaths)]
            gone = [file for file in files if os.path.exists(file)]
            # The other worker comes here at the same time: one death an attempt.
            if len(gone) < self.deaths and all(time.time() - os.path.getmtime(file) > 1.5 for file in gone):
                time.sleep(1)  # let the last checkpoint, which is written in the background, reach the disk
                with contextlib.suppress(FileExistsError), open(files[len(gone)], "x") as file:
                    file.write(f"{os.getpid()}\n")
                    file.flush()
                    time.sleep(60)
        return nn.functional.cross_entropy(outputs, targets)


def test_frozen_layers_run_once_and_do_not_change(spark: Any, tmp_path: Path) -> None:
    counter = str(tmp_path / "calls")
    Path(counter).write_text("")

    class Count(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with open(counter, "a") as file:
                file.write(f"{len(x)}\n")
            return x

    torch.manual_seed(0)
    trunk = kd.Model.of(nn.Sequential(Count(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), shape=(4,))
    model = trunk.freeze().then(nn.Linear(8, 3), labels=["c0", "c1", "c2"])
    df = frame(spark, blobs(200))
    Path(counter).write_text("")
    trained = fit(model, df, epochs=6, frozen_precision="fp32")
    calls = len(Path(counter).read_text().split())
    assert 1 <= calls <= 6  # a batch or two for each of 3 partitions, where 6 epochs of 13 steps would be 78
    for name, value in trunk.module.state_dict().items():
        assert any(torch.equal(value, other) for other in trained.module.state_dict().values()), name
    assert trained.evaluate(df).accuracy > 0.8


def test_a_partly_frozen_net_equals_full_training_with_the_same_layers_fixed(spark: Any) -> None:
    """The split net's head must learn what it learns when the prefix is run in every step."""
    rows = blobs(300)
    df = frame(spark, rows)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    frozen = kd.Model.of(module, shape=(4,), labels=["c0", "c1", "c2"]).freeze("0")
    trained = fit(frozen, df, frozen_precision="fp32", workers=1)
    head = kd.Model.of(module[2], shape=(8,), labels=["c0", "c1", "c2"])
    with torch.no_grad():
        features = torch.relu(module[0](torch.tensor([row[2] for row in rows])))
    ready = [(path, label, x.tolist()) for (path, label, _), x in zip(rows, features, strict=True)]
    by_hand = fit(head, frame(spark, ready), workers=1)
    torch.testing.assert_close(trained.module.get_submodule("2").weight, by_hand.module.weight, rtol=1e-5, atol=1e-6)


def test_numbers_can_be_learnt(spark: Any) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 4))
    values = points @ np.array([1.0, -2.0, 0.5, 3.0]) + 1
    df = spark.createDataFrame(
        [(x.tolist(), float(y)) for x, y in zip(points, values, strict=True)], "features array<float>, y float"
    )
    torch.manual_seed(0)
    model = kd.Model.of(nn.Linear(4, 1), shape=(4,))
    trained = fit(model, df, target="y", epochs=20, optimizer=partial(torch.optim.SGD, lr=0.1))
    np.testing.assert_allclose(trained.module.weight.detach().numpy()[0], [1, -2, 0.5, 3], atol=0.01)


BAD: dict[str, tuple[Callable[[Any], Any], dict[str, Any], type[Exception], str]] = {
    "no rows": (
        lambda s: frame(s, [("p", "c0", [1.0] * 4)]).filter("path = 'x'"),
        {},
        DataError,
        "not one row to train on",
    ),
    "one class": (
        lambda s: frame(s, [(f"p{i}", "c1", [1.0] * 4) for i in range(9)]),
        {},
        DataError,
        r"all 9 rows are of one class \('c1'\)",
    ),
    "unknown label": (lambda s: frame(s, [*blobs(20), ("p", "cow", [1.0] * 4)]), {}, DataError, "'cow' is none of"),
    "wrong shape": (lambda s: frame(s, [*blobs(20), ("p", "c0", [1.0] * 3)]), {}, DataError, "holds 3 numbers, not 4"),
    "missing column": (lambda s: frame(s, blobs(20)).drop("features"), {}, DataError, "has no column 'features'"),
    "missing label": (lambda s: frame(s, blobs(20)).drop("label"), {}, DataError, "no column 'label' to learn"),
    "not a number": (
        lambda s: frame(s, [*blobs(20), ("p", "c0", [float("nan")] * 4)]),
        {},
        TrainingError,
        "the loss became nan",
    ),
    "diverging": (
        lambda s: frame(s, blobs(200)),
        {"optimizer": partial(torch.optim.SGD, lr=1e38), "epochs": 9},
        TrainingError,
        "the loss became",
    ),
    "wrong loss": (lambda s: frame(s, blobs(20)), {"loss": nn.BCEWithLogitsLoss()}, TrainingError, "refused a batch"),
    "loss without mean": (
        lambda s: frame(s, blobs(20)),
        {"loss": nn.CrossEntropyLoss(reduction="none")},
        TrainingError,
        "not one number",
    ),
    "too many workers": (lambda s: frame(s, blobs(20)), {"workers": 99}, ConfigError, "needs 99 task slots"),
    "a metric's name": (lambda s: frame(s, blobs(20)), {"metrics": {"loss": len}}, ConfigError, "measured anyway"),
    "empty validation": (
        lambda s: frame(s, blobs(20)),
        {"validation": lambda s: frame(s, blobs(20)).where("label = 'cow'")},  # made of the session
        DataError,
        "not one row to validate on",
    ),
    "no workers": (lambda s: frame(s, blobs(20)), {"workers": 0}, ConfigError, "leaves nobody to train"),
    "no epochs": (lambda s: frame(s, blobs(20)), {"epochs": 0}, ConfigError, "epochs=0"),
}


@pytest.mark.sessions
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_said_in_one_screen(spark: Any, case: str) -> None:
    make, options, kind, words = BAD[case]
    if "validation" in options:
        options = {**options, "validation": options["validation"](spark)}
    with pytest.raises(kind, match=words) as caught:
        fit(net(), make(spark), **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= 20
    assert "at org.apache" not in text
    assert "Py4J" not in text


def test_a_model_with_too_few_scores_is_refused(spark: Any) -> None:
    with pytest.raises(ModelError, match=r"3 scores|4 labels"):
        fit(kd.Model.of(nn.Linear(4, 3), shape=(4,)).with_labels(["a", "b", "c", "d"]), frame(spark, blobs(20)))


def test_everything_frozen_is_refused(spark: Any) -> None:
    with pytest.raises(ModelError, match="no layer can learn"):
        fit(net().freeze(), frame(spark, blobs(20)))


def test_broken_rows_can_be_left_out_and_are_counted(spark: Any) -> None:
    rows = [*blobs(50), ("bad-1", "c0", [1.0]), ("bad-2", "cow", [1.0] * 4)]
    (record,) = fit(net(), frame(spark, rows), on_error="drop").history
    assert record["rows"] == 50
    assert record["broken"]["rows"] == 2
    assert {name for name, _ in record["broken"]["examples"]} == {"bad-1", "bad-2"}


def test_a_run_directory_tells_the_whole_story(spark: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = fit(net(), frame(spark, blobs(100)), run=run)
    told = json.loads((run / "run.json").read_text())
    assert told["strategy"]["name"] == "AllReduce"
    assert told["settings"]["epochs"] == 2
    kinds = [
        json.loads(line)["kind"]
        for part in sorted(run.glob("events/0/0/*.jsonl"))
        for line in part.read_text().splitlines()
    ]
    assert kinds.count("epoch") == 2
    assert kinds[-1] == "finish"
    assert digest(kd.load(run / "model")) == digest(trained)
    with pytest.raises(ConfigError, match="already holds a run"):
        fit(net(), frame(spark, blobs(100)), run=run, resume=False)
    # It has ended: the same call gives its model, without a look at the rows.
    again = fit(net(), frame(spark, blobs(100)).where("assert_true(false) is null"), run=run)
    assert digest(again) == digest(trained)
    assert again.history[-1]["epochs"] == trained.history[-1]["epochs"]
    assert again.labels == trained.labels


class FailAt:
    """Cross entropy that fails in one call, while a file is there."""

    def __init__(self, path: str, at: int) -> None:
        self.path, self.at, self.calls = path, at, -1  # the first call is the rehearsal on the driver

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in (self.at - 3, self.at) and os.path.exists(self.path):
            time.sleep(0.7)  # what is being written reaches the disk, and the next checkpoint may be taken
            if self.calls == self.at:
                raise ValueError("no")
        return nn.functional.cross_entropy(outputs, targets)


def test_a_run_that_was_broken_off_goes_on_where_it_was(spark: Any, tmp_path: Path) -> None:
    """In a later call: in the middle of an epoch, to the same bits; with one worker less, to the same figures."""
    trap = tmp_path / "trap"
    df = frame(spark, blobs(320))  # 10 steps an epoch
    options: dict[str, Any] = {"checkpoints": kd.Checkpoints(steps=3), "epochs": 3}

    def loss() -> FailAt:
        return FailAt(str(trap), 16)

    whole = fit(net(), df, **options, loss=loss())
    trap.write_text("")
    runs = {workers: tmp_path / f"run-{workers}" for workers in (2, 1)}
    with pytest.raises(TrainingError, match="refused a batch"):
        fit(net(), df, **options, loss=loss(), run=runs[2])
    shutil.copytree(runs[2], runs[1])
    trap.unlink()
    for workers, run in runs.items():
        again = fit(net(), df, **options, loss=loss(), run=run, workers=workers)
        (resumed,) = again.history[-1]["resumed"]
        assert (resumed["workers_before"], resumed["workers"], resumed["differs"]) == (2, workers, "")
        assert resumed["epoch"] == 2
        assert 13 <= resumed["step"] == 10 + resumed["index"] <= 15
        for name, value in whole.module.state_dict().items():
            torch.testing.assert_close(again.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        for before, after in zip(whole.history[-1]["epochs"], again.history[-1]["epochs"], strict=True):
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
            assert after["rows"] == 320
        if workers == 2:
            assert digest(again) == digest(whole)
            assert again.history[-1]["epochs"][1]["loss"] == whole.history[-1]["epochs"][1]["loss"]


@pytest.mark.slow
def test_a_run_that_is_asked_for_otherwise_is_refused_with_the_list(spark: Any, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", blobs(100)
    df = frame(spark, rows)
    fit(net(), df, run=run, validation=df)
    torch.manual_seed(1)
    other = kd.Model.of(nn.Linear(4, 3), shape=(4,), labels=["c0", "c1", "c2"])
    with pytest.raises(ConfigError) as caught:
        fit(other, df, run=run, validation=df, seed=3, optimizer=partial(SGD, lr=0.2), epochs=1)
    for words in (
        "run='",
        "holds a run that was asked for otherwise",
        "the model's architecture",
        "the model's weights before training",
        "settings.seed: was 0, is 3",
        "optimizer: was 'SGD(lr=0.1",
        "settings.epochs: was 2, is 1",
        "resume='anyway'",
    ):
        assert words in str(caught.value)
    # The rows are known only when they have been read: more epochs over one row less, or over another row.
    fewer = frame(spark, rows[1:])
    with pytest.raises(ConfigError, match="the training data: 100 rows before, 99 rows now"):
        fit(net(), fewer, run=run, validation=df, epochs=3)
    swapped = [(rows[0][0], rows[0][1], rows[1][2]), *rows[1:]]
    with pytest.raises(ConfigError, match="the training data: 100 rows as before, with other content"):
        fit(net(), frame(spark, swapped), run=run, validation=df, epochs=3)
    anyway = fit(net(), fewer, run=run, validation=df, epochs=3, resume="anyway")
    assert [record["rows"] for record in anyway.history[-1]["epochs"]] == [100, 100, 99]
    assert "99 rows now" in anyway.history[-1]["resumed"][-1]["differs"]
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        fit(net(), df, run=tmp_path / "elsewhere", resume=True)
    with pytest.raises(ConfigError, match="is not a way to go on"):
        fit(net(), df, run=run, resume="perhaps")


DRIVER = """
import sys
import cloudpickle
import torch
import kindling as kd
rows, module, options = cloudpickle.loads(open(sys.argv[1], "rb").read())
spark = kd.spark("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "OFF"})
df = spark.createDataFrame(rows, "path string, label string, features array<float>").repartition(3)
model = kd.Model.of(module, shape=(4,), labels=["c0", "c1", "c2"])
trained = model.fit(df, progress=False, **options)
torch.save(trained.module.state_dict(), sys.argv[2])
spark.stop()
"""


@pytest.mark.slow
def test_the_driver_is_killed_and_a_new_one_goes_on(spark: Any, tmp_path: Path) -> None:
    """SIGKILL for the driver, its JVM and its workers in the middle of a step; another process ends the run."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run, marker = tmp_path / "run", tmp_path / "at"
    options: dict[str, Any] = {
        "workers": 2,
        "batch_size": 16,
        "epochs": 3,
        "optimizer": SGD,
        "checkpoints": kd.Checkpoints(steps=4),
        "strategy": kd.ParameterAveraging(every=3),
    }

    def drive(**more: Any) -> subprocess.Popen[bytes]:
        spec = tmp_path / "spec.pickle"
        spec.write_bytes(cloudpickle.dumps((blobs(480), net(dropout=0.2).module, {**options, **more, "run": str(run)})))
        command = [sys.executable, "-c", DRIVER, str(spec), str(tmp_path / "weights.pt")]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)

    whole = fit(net(dropout=0.2), frame(spark, blobs(480)), **options)
    driver = drive(loss=WaitForDeath(str(marker), 22, 1))
    deadline = time.time() + 120
    while not Path(f"{marker}-0").exists() and time.time() < deadline:
        assert driver.poll() is None
        time.sleep(0.1)
    for pid in _family(driver.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    driver.wait()
    # The loss that waited for its death is another one than that which ends the run.
    assert drive(loss=nn.CrossEntropyLoss(), resume="anyway").wait(120) == 0
    (resumed,) = json.loads((run / "result.json").read_text())["resumed"]
    assert 0 < resumed["step"] < 22
    again = torch.load(tmp_path / "weights.pt")
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again[name]), name


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for folder in Path(f"/proc/{pid}/task").iterdir():
        for child in (folder / "children").read_text().split():
            found += _family(int(child))
    return found


def test_nothing_is_left_behind(spark: Any) -> None:
    import tempfile

    before = {p.name for p in Path(tempfile.gettempdir()).glob("kindling-run-*")}
    fit(net(), frame(spark, blobs(50)))
    assert {p.name for p in Path(tempfile.gettempdir()).glob("kindling-run-*")} <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("kindling-")]


def test_route_keys_land_in_partitions_of_their_own(spark: Any) -> None:
    from pyspark.sql import functions as F

    df = spark.range(-50, 50).select("id", F.hash("id").alias("h"))
    for row in df.collect():
        assert murmur3_of_long(row["id"] & (2**64 - 1)) == row["h"], row["id"]
    for workers in (1, 2, 5, 16):
        keys = route_keys(workers)
        placed = spark.createDataFrame([(key,) for key in keys], "key long").repartition(workers, "key")
        found = {r["key"]: r["p"] for r in placed.select("key", F.spark_partition_id().alias("p")).collect()}
        assert [found[key] for key in keys] == list(range(workers))


def test_the_settings_of_the_loop_reach_the_workers(spark: Any, tmp_path: Path) -> None:
    """Many at once; what is validated is what comes back."""
    df = frame(spark, blobs(300))
    trained = fit(
        net(),
        df,
        epochs=30,
        validation=df,
        accumulate=2,
        clip_norm=1.0,
        warmup_steps=5,
        schedule=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2),
        schedule_every="step",
        ema_decay=0.9,
        precision="bf16",
        validate_every_steps=3,
        early_stopping=kd.EarlyStopping(patience=4, metric="accuracy"),
        max_steps=40,
        run=tmp_path / "run",
    )
    (record,) = trained.history
    *_, last = record["epochs"]
    assert last["stopped"] in ("max_steps", "early_stopping")
    assert sum(epoch["steps"] for epoch in record["epochs"]) <= 40
    assert record["settings"]["early_stopping"]["patience"] == 4
    assert record["schedule"] == "OneCycleLR(max_lr=0.2)"
    best = max(figures["accuracy"] for epoch in record["epochs"] for figures in epoch["validations"])
    assert trained.evaluate(df).accuracy == best > 0.9
    told = [json.loads(line) for part in (tmp_path / "run" / "events").rglob("*.jsonl") for line in part.open()]
    assert "stopped" in {event["kind"] for event in told}


def test_a_schedule_that_cannot_be_is_refused_before_anything_starts(spark: Any) -> None:
    with pytest.raises(ConfigError, match="gave a SGD"):
        fit(net(), frame(spark, blobs(20)), schedule=lambda optimizer: optimizer)


class TwoHeads(nn.Module):
    """Tags and a number from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.tags, self.size = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.trunk(x))
        return {"tags": self.tags(x), "size": self.size(x)}


def test_several_outputs_many_labels_and_weights_of_rows(spark: Any) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 4))
    rows = [
        (
            f"p{i:03d}",
            x.tolist(),
            [name for name, value in zip("abc", x[:3], strict=True) if value > 0],
            float(x.sum()) if i % 4 else 1000.0,
            float(bool(i % 4)),  # what would spoil the sizes weighs nothing
        )
        for i, x in enumerate(points)
    ]
    df = spark.createDataFrame(
        rows, "path string, features array<float>, tags array<string>, size float, importance float"
    ).repartition(3)
    torch.manual_seed(0)
    model = kd.Model.of(TwoHeads(), shape=(4,), labels=["a", "b", "c"])
    trained = fit(
        model,
        df,
        target={"tags": "tags", "size": "size"},
        loss_weights={"size": 0.1},
        weight_column="importance",
        validation=df.where("importance > 0").drop("importance"),
        metrics={"tags_said": lambda outputs, _: (outputs["tags"] > 0).sum(1).double()},
        epochs=20,
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )
    figures = trained.history[-1]["epochs"][-1]["validation"]
    assert figures["label_accuracy"] > 0.95
    assert figures["size.mean_absolute_error"] < 0.5
    assert 1 < figures["tags_said"] < 2
    assert [step.column for step in trained.preparation.targets] == ["tags", "size"]
    checked = df.where("importance > 0")
    report, sizes = trained.evaluate(checked), trained.evaluate(checked, output="size")
    assert isinstance(report, LabelReport)
    for name in ("rows", "accuracy", "label_accuracy", "precision", "recall", "f1", "micro_f1"):
        assert getattr(report, name) == figures[name], name
    assert report.loss == pytest.approx(figures["tags.loss"])
    assert (report.labels, len(report.per_class)) == (("a", "b", "c"), 3)
    assert sizes.loss == pytest.approx(figures["size.loss"])
    assert sizes.mean_absolute_error == pytest.approx(figures["size.mean_absolute_error"])
    with pytest.raises(ConfigError, match="'sise' is no output with a target"):
        trained.evaluate(checked, output="sise")
    only = fit(model, checked, target={"size": "size"}, epochs=1)  # the second output alone
    assert only.labels == model.labels
    assert only.evaluate(checked).mean_squared_error == pytest.approx(only.evaluate(checked, output="size").loss)
    again = fit(
        trained, df, epochs=1, weight_column="importance", optimizer=partial(torch.optim.Adam, lr=0.01)
    )  # it knows its targets
    assert again.history[-1]["epochs"][-1]["loss"] < 2 * trained.history[-1]["epochs"][-1]["loss"]
    with pytest.raises(ConfigError, match="Did you mean 'size'"):
        fit(model, df, target={"tags": "tags", "sise": "size"})


def test_photos_are_changed_in_training_alone(spark: Any, photos: Path) -> None:
    """A frozen front is then run in every step, on what each epoch draws."""
    df = kd.read.images(str(photos), spark=spark)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
    trunk = kd.Model.of(module, inputs=kd.prepare.ImageStep("photo", size=(8, 8), channels="L", scale=1 / 255))
    model = trunk.freeze().then(nn.Linear(16, 3), labels=kd.labels(df))
    options: dict[str, Any] = {"epochs": 9, "validation": df, "optimizer": partial(torch.optim.Adam, lr=0.1)}
    changes = [kd.prepare.RandomCrop(1), kd.prepare.RandomColor(0.1, 0.1)]
    trained = fit(model, df, augment=changes, **options)
    last = trained.history[-1]["epochs"][-1]
    assert last["validation"]["accuracy"] > 0.8
    assert trained.evaluate(df).loss == pytest.approx(last["validation"]["loss"], rel=1e-4)
    for name, value in trunk.module.state_dict().items():
        assert any(torch.equal(value, other) for other in trained.module.state_dict().values()), name
    assert digest(trained) == digest(fit(model, df, augment=changes, **options))
    assert digest(trained) != digest(fit(model, df, **options))
    assert trained.history[-1]["augment"]["photo"][0] == changes[0].to_json()
    with pytest.raises(ConfigError, match="fits one input of images"):
        fit(net(), frame(spark, blobs(20)), augment=changes)


def test_sequences_of_any_length_and_two_inputs(spark: Any) -> None:
    """Bags of words beside numbers; trained, measured, kept and asked again."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = int(rng.integers(0, 2))
        words = rng.integers(1 + 20 * label, 21 + 20 * label, rng.integers(1, 30)).tolist()
        rows.append((f"p{number:03d}", words, [float(rng.normal())], f"c{label}"))
    df = spark.createDataFrame(rows, "path string, words array<int>, size array<float>, label string").repartition(3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(50, 8, padding_idx=0), nn.Linear(9, 2)

        def forward(self, words: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([self.bag(words), size], 1))

    torch.manual_seed(0)
    inputs = [
        kd.prepare.SequenceStep("words", "words", max_length=30, size=50),
        kd.prepare.ArrayStep("size", "size", (1,)),
    ]
    model = kd.Model.of(Net(), inputs=inputs, labels=["c0", "c1"])
    trained = fit(model, df, epochs=6, optimizer=partial(torch.optim.Adam, lr=0.05), validation=df)
    last = trained.history[-1]["epochs"][-1]["validation"]
    assert last["accuracy"] > 0.95
    assert trained.evaluate(df).accuracy == last["accuracy"]
    (answer,) = trained.predict([{"words": [1, 2, 3], "size": [0.0]}])
    assert answer["prediction"] == "c0"
    with pytest.raises(DataError, match="more than 30"):
        fit(model, df.selectExpr("path", "concat(words, sequence(1, 30)) words", "size", "label"))
