"""What can be known before a training: every check, each failure with its sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kindling as kd
from kindling import ship
from kindling.errors import ConfigError, SessionError
from kindling.train import checklist, executors, slots
from kindling.train.executors import check_versions

ROWS = [(f"p{i}", f"c{i % 3}", [float(i % 7), 1.0, float(i % 3), 0.0]) for i in range(60)]


@pytest.fixture(name="df")
def _df(spark: Any) -> Any:
    return frame(spark, ROWS)


def frame(spark: Any, rows: list[tuple[str, str, list[float]]]) -> Any:
    return spark.createDataFrame(rows, "path string, label string, features array<float>")


def net(classes: int = 3) -> kd.Model:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))
    return kd.Model.of(layers, shape=(4,), labels=[f"c{i}" for i in range(classes)])


class Locked(nn.CrossEntropyLoss):
    """A loss that holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class OnlyHere(nn.CrossEntropyLoss):
    """A loss from a package that the executors lack."""

    def __reduce__(self) -> Any:
        return import_module, ("a_package_of_the_driver",)


@pytest.mark.spark
@pytest.mark.sessions
def test_all_that_was_looked_at_is_listed(df: Any, tmp_path: Path) -> None:
    checks = net().preflight(df, workers=2, run=tmp_path / "run", validation=df)
    assert checks, str(checks)
    names = [check.name for check in checks.checks]
    assert names == [
        "columns",
        "net",
        "sending",
        "slots",
        "run directory",
        "executors",
        "driver",
        "code there",
        "directory there",
        "data",
        "a real batch",
        "memory",
    ]
    told = {check.name: check.found for check in checks.checks}
    assert f"torch {torch.__version__}" in told["executors"]
    assert told["directory there"] == "seen from all hosts"
    assert json.loads(json.dumps(checks.to_json()))["passed"] is True
    assert list((tmp_path / "run").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kindling-")]


BAD: dict[str, tuple[Callable[[Any, Any], Any], kd.Model, dict[str, Any], str, str]] = {
    "a column": (lambda s, df: df.drop("features"), net(), {}, "columns", "has no column 'features'"),
    "a label": (lambda s, df: frame(s, [("p", "cow", [1.0] * 4)]), net(), {}, "data", "'cow' is none of"),
    "a shape": (lambda s, df: frame(s, [("p", "c0", [1.0] * 3)]), net(), {}, "data", "holds 3 numbers, not 4"),
    "no rows": (lambda s, df: df.limit(0), net(), {}, "data", "has no rows"),
    "scores": (lambda s, df: df, net().with_labels(["c0", "c1", "c2", "c3"]), {}, "net", "should give 4 scores"),
    "loss": (lambda s, df: df, net(), {"loss": nn.BCEWithLogitsLoss()}, "net", "refused a batch"),
    "not a number": (
        lambda s, df: frame(s, [("p", "c0", [float("nan")] * 4)] * 3),
        net(),
        {},
        "a real batch",
        "the loss is nan",
    ),
    "a lock": (lambda s, df: df, net(), {"loss": Locked()}, "sending", "cannot be sent to the workers"),
    "a package": (lambda s, df: df, net(), {"loss": OnlyHere()}, "code there", "No module named 'a_package_of_the"),
    "slots": (lambda s, df: df, net(), {"workers": 99}, "slots", "needs 99 task slots at the same time, and the"),
    "memory": (lambda s, df: df, net(), {"batch_size": 10**11}, "memory", "Use a smaller batch_size"),
}


@pytest.mark.spark
@pytest.mark.parametrize("case", BAD)
def test_what_fails_is_a_sentence_and_the_others_are_looked_at(spark: Any, df: Any, case: str) -> None:
    make, model, options, name, words = BAD[case]
    checks = model.preflight(make(spark, df), **{"workers": 2, **options})
    assert not checks
    failed = checks.failed()
    assert [check.name for check in failed] == [name], str(checks)
    assert words in failed[0].found
    assert "\n" not in failed[0].found.strip()
    assert f"FAIL  {name}" in str(checks)


@pytest.mark.spark
def test_a_directory_that_holds_a_run_and_one_that_only_the_driver_sees(df: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (failed,) = net().preflight(df, workers=2, run=tmp_path).failed()
    assert "already holds a run" in failed.found
    checks = net().preflight(df, workers=2, run="memory://preflight/run")
    assert checks
    (there,) = (check for check in checks.checks if check.name == "directory there")
    assert there.found.startswith("not seen from ")
    assert there.found.endswith("through the driver")


def test_memory_counts_what_the_net_keeps_for_its_way_back() -> None:
    """Activations grow with the batch, and in proportion."""
    arrays = {"features": np.ones((4, 4), np.float32), "target": np.zeros(4, np.int64)}
    needed = [_needed(net(), size, arrays) for size in (1000, 2000, 3000)]
    assert needed[1] - needed[0] == needed[2] - needed[1] > 1000 * 8 * 4


def _needed(model: kd.Model, batch_size: int, arrays: dict[str, np.ndarray]) -> int:
    from kindling.train.objective import Objective, Term
    from kindling.train.preflight import default_optimizer
    from kindling.train.settings import LoopSettings, UserCode

    objective = Objective((Term(next(iter(model.signature.outputs)), "target", nn.CrossEntropyLoss()),))
    code = UserCode(optimizer=default_optimizer, loss=objective, strategy=None, metrics={})
    settings = LoopSettings(batch_size=batch_size)
    needed, _ = checklist._real_batch(model, model.preparation, code, settings, model.labels, arrays)
    return needed


def answer(**changes: Any) -> dict[str, Any]:
    """What an executor like this driver says."""
    versions = {"torch": torch.__version__, "kindling": kd.__version__, **changes.pop("versions", {})}
    return {"host": "h7", "python": sys.version.split()[0], "versions": versions, "reaches": "", **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": "3.8.1"}, "the executor on h7 runs Python 3.8.1, the driver"),
        ({"versions": {"torch": "1.0.0"}}, "the executor on h7 has torch 1.0.0, the driver"),
        ({"versions": {"torch": None}}, "has no torch. Install torch"),
        ({"versions": {"kindling": None}}, "has no kindling. Install kindling"),
        ({"versions": {"kindling": "0.0.1"}}, "has kindling 0.0.1"),
    ],
)
def test_an_executor_that_differs_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SessionError, match=words):
        check_versions([answer(), answer(**changes)])


def test_another_build_of_the_same_torch_is_the_same() -> None:
    check_versions([answer(versions={"torch": torch.__version__.partition("+")[0] + "+cu999"})])


def test_the_question_can_be_asked_where_kindling_is_missing() -> None:
    """It travels by value; in a Python that cannot import kindling it says so instead of failing."""
    import pyspark.cloudpickle

    from kindling.train import probe

    pyspark.cloudpickle.register_pickle_by_value(probe)
    try:
        data = pyspark.cloudpickle.dumps(partial(probe.probe, probe.Question(None, None, "", None)))
    finally:
        pyspark.cloudpickle.unregister_pickle_by_value(probe)
    code = "import sys, pickle\nsys.modules['kindling'] = None\nwork = pickle.loads(sys.stdin.buffer.read())\n"
    code += "(row,) = work(iter([]))\nprint(row.column(0)[0].as_py())"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["versions"]["kindling"] is None
    assert told["versions"]["torch"] == torch.__version__
    assert told["memory_bytes"] > 0


@pytest.fixture(name="deaf")
def _deaf(spark: Any) -> Iterator[None]:
    """A session whose executors cannot reach the driver."""
    key = ship.session_key(spark)
    before = executors._known.get(key)
    executors._known[key] = [answer(reaches="ConnectionRefusedError: no way")]
    yield
    executors._known.pop(key)
    if before is not None:
        executors._known[key] = before


@pytest.mark.spark
@pytest.mark.usefixtures("deaf")
def test_without_a_way_to_the_driver_workers_meet_in_sparks_barrier(
    df: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trained = net().fit(df, workers=2, epochs=2, run=tmp_path / "run", progress=False)
    assert "h7 cannot reach this driver" in caplog.text
    assert "no way" in caplog.text
    record = trained.history[-1]
    assert len(record["epochs"]) == 2
    assert record["rows"] == len(ROWS)
    assert list((tmp_path / "run").glob("events/0/1/*.jsonl"))


@pytest.mark.spark
@pytest.mark.usefixtures("deaf")
def test_without_a_way_to_the_driver_and_without_a_barrier_nothing_is_begun(
    df: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "without_barrier", lambda spark: True)
    with pytest.raises(SessionError, match="they meet nowhere else"):
        net().fit(df, workers=2, epochs=1, progress=False)


class Conf:
    """A session of which only settings are asked."""

    def __init__(self, **settings: str) -> None:
        self.settings = {"spark.master": "spark://h:7077", **{k.replace("_", "."): v for k, v in settings.items()}}
        self.conf = self

    def get(self, name: str, default: Any = None) -> Any:
        return self.settings.get(name, default)


def test_with_dynamic_allocation_only_what_can_never_come_is_refused() -> None:
    bounded: Any = Conf(
        spark_dynamicAllocation_enabled="true",
        spark_dynamicAllocation_maxExecutors="3",
        spark_executor_cores="4",
        spark_task_cpus="2",
    )
    assert slots.without_barrier(bounded)
    assert slots.most_slots(bounded) == 6
    assert slots.workers_for(bounded, None) == slots.workers_for(bounded, 6) == 6
    with pytest.raises(ConfigError, match="needs 7 task slots at the same time, and dynamic allocation can start 6"):
        slots.workers_for(bounded, 7)
    endless: Any = Conf(spark_dynamicAllocation_enabled="true", spark_executor_cores="4")
    assert slots.most_slots(endless) is None
    assert slots.workers_for(endless, 500) == 500
    local: Any = Conf(spark_master="local[2]", spark_dynamicAllocation_enabled="true")
    assert not slots.without_barrier(local)
    copies: Any = Conf(spark_dynamicAllocation_enabled="true", spark_speculation="true")
    assert slots.runs_copies(copies)
    assert not slots.runs_copies(Conf(spark_speculation="true"))  # type: ignore[arg-type]
