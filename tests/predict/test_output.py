"""Features kept as Parquet: whatever happened before, the folder equals one written at once, or the call is refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kindling
from kindling.errors import ConfigError, DataError, FormatError
from kindling.model import Model
from kindling.predict import output
from kindling.prepare import ArrayStep, Preparation

pytestmark = pytest.mark.spark

SCHEMA = "path string, label string, x array<float>"


def table(rows: dict[str, tuple[str, list[float]]]) -> list[tuple[str, str, list[float]]]:
    return [(path, label, x) for path, (label, x) in rows.items()]


def photos(count: int = 40, broken: tuple[int, ...] = ()) -> dict[str, tuple[str, list[float]]]:
    """Path -> label and the numbers that stand for a photo; broken ones have too few."""
    return {f"p{i:03d}": (f"c{i % 3}", [i + 0.1, i * 0.3, 1.0, -2.0][: 2 if i in broken else 4]) for i in range(count)}


def net(seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return Model.of(nn.Sequential(nn.Linear(4, 30), nn.ReLU()), column="x", shape=(4,))


class Store:
    """A folder of features and what the next run will be given."""

    def __init__(self, spark: Any, folder: Path) -> None:
        self.spark, self.folder = spark, folder

    def run(self, rows: dict[str, tuple[str, list[float]]], model: Model | None = None, **options: Any) -> Any:
        frame = self.spark.createDataFrame(table(rows), SCHEMA).repartition(options.pop("partitions", 3), "path")
        options = {"precision": "fp32", "batch_size": 8, "progress": False, **options}
        return (model or net()).featurize(frame, out=str(self.folder), **options)

    def side(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / output.SIDE_FILE).read_text()))

    def files(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.parquet")}


@pytest.fixture
def store(spark: Any, tmp_path: Path) -> Store:
    return Store(spark, tmp_path / "ä features [1]")


def contents(frame: Any) -> dict[str, tuple[Any, ...]]:
    """Path -> label, the features' bytes, error; a path that comes twice is a failure."""
    rows = frame.collect()
    found = {}
    for row in rows:
        values = None if row["features"] is None else np.float32(row["features"]).tobytes()
        found[row["path"]] = (row["label"], values, row.asDict().get("error"))
    assert len(found) == len(rows), "a path came twice"
    return found


def at_once(store: Store, rows: dict[str, tuple[str, list[float]]], **options: Any) -> dict[str, tuple[Any, ...]]:
    """What one fresh run makes of the rows."""
    fresh = Store(store.spark, store.folder.parent / f"fresh-{time.monotonic_ns()}")
    return contents(fresh.run(rows, **options))


@pytest.mark.sessions
def test_a_first_run_stores_the_features_and_what_made_them(store: Store) -> None:
    model = net()
    got = store.run(photos(), model)
    assert got.columns == ["path", "label", "features", "error"]
    rows = contents(got)
    assert len(rows) == 40
    with torch.no_grad():
        expected = model.module(torch.tensor([x for _, x in photos().values()])).numpy()
    for i, path in enumerate(photos()):
        np.testing.assert_allclose(np.frombuffer(rows[path][1], np.float32), expected[i], rtol=1e-5, atol=1e-5)
    side = store.side()
    assert (side["rows"], side["broken"], side["batch_size"]) == (40, 0, 8)
    assert side["precision"]["name"] == "fp32"
    assert side["columns"] == {next(iter(model.signature.outputs)): "features"}
    assert len(side["model"]["fingerprint"]) == 64
    assert side["versions"]["torch"] == torch.__version__


@pytest.mark.sessions(slow=True)
def test_only_what_is_new_or_changed_is_computed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kindling.predict")

    def computed() -> str:
        return caplog.records[-1].getMessage().split(" in ")[0]

    store.run(photos(30))
    assert computed() == "featurised 30 rows"
    files = store.files()
    again = contents(store.run(photos(30)))
    assert computed() == "featurised 0 rows"
    assert store.files() == files  # nothing was written, nothing was touched
    grown = contents(store.run(photos(40)))
    assert computed() == "featurised 10 rows"
    assert files < store.files()
    assert {path: grown[path] for path in again} == again
    changed = photos(40) | {"p003": ("c0", [9.0, 9.0, 9.0, 9.0]), "p005": ("another", photos()["p005"][1])}
    got = contents(store.run(changed))
    assert computed() == "featurised 2 rows"
    assert got == at_once(store, changed)
    shrunk = {path: row for path, row in changed.items() if path not in ("p003", "p010", "p039")}
    got = contents(store.run(shrunk))
    assert computed() == "featurised 0 rows"
    assert got == at_once(store, shrunk)
    back = contents(store.run(photos(40)))
    assert computed() == "featurised 4 rows"
    assert back == at_once(store, photos(40))
    assert store.side()["rows"] == 40


def test_no_rows_at_all(store: Store) -> None:
    assert contents(store.run({})) == {}
    assert store.side()["rows"] == 0
    assert len(contents(store.run(photos(3)))) == 3
    assert contents(store.run({})) == {}


@pytest.mark.sessions(slow=True)
def test_broken_rows_are_counted_listed_and_treated_as_asked(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    rows = photos(40, broken=(3, 30))
    kept = contents(store.run(rows))
    assert kept["p003"] == ("c0", None, "column 'x' holds 2 numbers, not 4")
    said = caplog.records[-1]
    assert said.levelno == logging.WARNING
    assert "holds 40 rows, 2 broken:\n  p003: column 'x' holds 2 numbers, not 4\n  p030: " in said.getMessage()
    assert [one["path"] for one in store.side()["examples"]] == ["p003", "p030"]

    with pytest.raises(DataError, match=r"path 'p0[03]3?0?' cannot be used: column 'x' holds 2 numbers"):
        store.run(rows, on_error="fail")
    dropped = store.run(rows, on_error="drop")
    assert dropped.columns == ["path", "label", "features"]
    assert contents(dropped).keys() == kept.keys() - {"p003", "p030"}
    assert store.side()["broken"] == 2
    assert [one["why"] for one in store.side()["examples"]] == ["column 'x' holds 2 numbers, not 4"] * 2
    assert contents(store.run(rows)) == kept
    mended = contents(store.run(photos(40)))
    assert mended == at_once(store, photos(40))
    assert store.side()["broken"] == 0


def test_a_broken_row_that_fails_leaves_what_was_done_for_the_next_run(store: Store) -> None:
    with pytest.raises(DataError, match="path 'p007' cannot be used") as caught:
        store.run(photos(40, broken=(7,)), on_error="fail", partitions=12)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(store.run(photos(40))) == at_once(store, photos(40))


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (net(2), {}, "the net's layers or weights ('Sequential' of fingerprint"),
        (net(), {"column": "other"}, "the layers or their columns"),
        (net(), {"precision": "bf16"}, "the precision ('fp32' there, 'bf16' now)"),
        (net(), {"batch_size": 16}, "the batch size (8 there, 16 now)"),
        (
            replace(net(), preparation=Preparation((ArrayStep("x", "x", (4,), dtype="float64"),))),
            {},
            "the preparation (dtype='float32' there, 'float64' now)",
        ),
    ],
    ids=["weights", "column", "precision", "batch size", "preparation"],
)
def test_features_made_otherwise_are_refused(store: Store, model: Model, options: dict[str, Any], says: str) -> None:
    store.run(photos(4))
    before = store.files()
    with pytest.raises(ConfigError) as caught:
        store.run(photos(9), model, **options)
    assert says in str(caught.value)
    assert store.files() == before


def test_what_is_stored_decides_where_nothing_is_asked_for(store: Store) -> None:
    store.run(photos(4), batch_size=2)
    assert len(contents(store.run(photos(9), precision="auto", batch_size=None))) == 9
    assert (store.side()["batch_size"], store.side()["precision"]["reason"]) == (2, "asked for")


def test_labels_and_training_do_not_matter_to_features(store: Store) -> None:
    store.run(photos(4))
    model = replace(net(), history=({"epochs": 1},), frozen=frozenset(["0"]), name="renamed")
    assert len(contents(store.run(photos(5), model))) == 5


def test_somebody_elses_folder_is_refused(store: Store) -> None:
    store.folder.mkdir()
    (store.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"such as 'thesis\.tex'"):
        store.run(photos(4))
    assert [path.name for path in store.folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"format": 1}', '{"format": 99, "model": {}}', "\x00\xff"])
def test_a_damaged_side_file_is_an_error(store: Store, damage: str) -> None:
    store.run(photos(4))
    (store.folder / output.SIDE_FILE).write_text(damage)
    with pytest.raises(FormatError, match=r"_kindling\.json"):
        store.run(photos(4))


def test_what_cannot_be_kept_is_said(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'path'"):
        net().featurize(spark.createDataFrame(table(photos(3)), SCHEMA).drop("path"), out=str(tmp_path / "a"))
    stream = spark.readStream.schema(SCHEMA).parquet(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot keep up with a stream"):
        net().featurize(stream, out=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"^on_error="):
        net().featurize(spark.createDataFrame(table(photos(3)), SCHEMA), out=str(tmp_path / "a"), on_error="what")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "when", [pytest.param("before the old files go", marks=pytest.mark.slow), "between two of them"]
)
def test_a_run_killed_while_it_tidies_leaves_nothing_doubled(
    store: Store, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {path: (label, [*x[:3], 7.0]) for path, (label, x) in photos(20).items()} | {
        path: row for path, row in photos(40).items() if path > "p022"
    }
    store.run(photos(40))
    real = output._Folder._delete

    def killed(self: Any, names: set[str]) -> None:
        if when != "before the old files go":
            real(self, set(sorted(names)[:1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(output._Folder, "_delete", killed)
    with pytest.raises(KeyboardInterrupt):
        store.run(changed)
    monkeypatch.undo()
    assert contents(store.run(changed)) == at_once(store, changed)


def test_a_task_that_wrote_twice_is_repaired(store: Store) -> None:
    """As a retried or speculative task does whose first attempt had put its file in place."""
    whole = contents(store.run(photos(40)))
    for name in store.files():
        (store.folder / f"again-{name}").write_bytes((store.folder / name).read_bytes())
    assert contents(store.run(photos(40))) == whole


def test_two_photos_under_one_path_are_both_kept(store: Store, spark: Any) -> None:
    rows = [*table(photos(5)), ("p001", "c1", [1.0, 1.0, 1.0, 1.0]), table(photos(5))[2]]
    frame = spark.createDataFrame(rows, SCHEMA)
    for _ in range(2):
        got = net().featurize(frame, out=str(store.folder), precision="fp32", progress=False)
        assert sorted(row["path"] for row in got.collect()) == ["p000", "p001", "p001", "p002", "p003", "p004"]


KILLED = """
import sys
from pathlib import Path
import kindling
from tests_output import SCHEMA, net, photos, table
remote, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = {"spark.sql.shuffle.partitions": "2", "spark.log.level": "OFF", "spark.default.parallelism": "2"}
spark = kindling.spark(None if remote else "local[2]", remote or None, conf={} if remote else settings)
frame = spark.createDataFrame(table(photos(count)), SCHEMA).repartition(60, "path")
print("ready", flush=True)
net().featurize(frame, out=folder, precision="fp32", batch_size=8, progress=False)
print("finished", flush=True)
"""


@pytest.mark.sessions(slow=True)
def test_a_run_killed_half_way_goes_on_where_it_stopped(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from kindling import ship

    caplog.set_level(logging.INFO, "kindling.predict")
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "tests_output.py").write_text(Path(__file__).read_text())
    remote = f"sc://{store.spark.client.host}" if ship.is_connect(store.spark) else ""
    log = (tmp_path / "log").open("w")
    env = {**os.environ, "PYTHONPATH": str(Path(kindling.__file__).parents[1])}
    arguments = [sys.executable, str(tmp_path / "killed.py"), remote, str(store.folder), "240"]
    driver = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, cwd=tmp_path, env=env, text=True)
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "ready\n", (tmp_path / "log").read_text()[-2000:]
        while len(store.files()) < 3:
            assert driver.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        said, _ = driver.communicate()
        log.close()
    assert said == ""
    settled = -1
    while settled != len(store.files()):  # its JVM (or the server) notices a moment later
        settled = len(store.files())
        time.sleep(1)
    got = contents(store.run(photos(240)))
    assert got == at_once(store, photos(240))
    computed = int(caplog.records[0].getMessage().split()[1])
    assert computed < 240 or ship.is_connect(store.spark), "nothing of the killed run was used"
    assert not list(store.folder.glob("_temporary*"))


@pytest.mark.sessions
def test_the_bar_of_connect_watches_and_leaves(store: Store) -> None:
    from kindling import ship

    if not ship.is_connect(store.spark):
        pytest.skip("looks into Spark Connect")
    shown: list[tuple[int, int, int]] = []
    handlers = list(store.spark.client._progress_handlers)
    with output._watch_connect(store.spark, lambda *figures: shown.append(figures)):
        store.spark.range(0, 4, 1, 4).mapInArrow(_slowly, "id long").collect()
    assert store.spark.client._progress_handlers == handlers
    assert shown
    assert all(done <= total for done, total, _ in shown)


def _slowly(batches: Any) -> Any:
    for rows in batches:
        time.sleep(2)
        yield rows


def test_the_bar_moves_and_the_session_is_left_as_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from kindling import ship

    if ship.is_connect(store.spark):
        pytest.skip("looks into Spark Classic")
    context = store.spark.sparkContext
    shown: list[tuple[int, int, int]] = []
    context.setJobGroup("mine", "my own work")
    try:
        with output._watch_classic(store.spark, lambda *figures: shown.append(figures)):
            net().featurize(store.spark.range(1).selectExpr("array(1f, 2f, 3f, 4f) as x").repartition(3)).count()
            time.sleep(1.2)
        assert context.getLocalProperty("spark.jobGroup.id") == "mine"
    finally:
        for name in ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel"):
            context.setLocalProperty(name, None)
    done, total, _ = shown[-1]
    assert 0 < done <= total


def test_a_folder_with_photos_of_two_runs_is_one_dataframe(store: Store) -> None:
    """Other readers of the folder see Parquet and nothing else."""
    store.run(photos(10))
    store.run(photos(20))
    assert store.spark.read.parquet(str(store.folder).replace("[", "\\[").replace("]", "\\]")).count() == 20
