"""Nets over DataFrames: the same numbers as plain torch, rows in their places, broken rows named."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from kindling.errors import ConfigError, DataError, ModelError
from kindling.model import Model
from kindling.predict import batch, engine
from kindling.prepare import ArrayStep, ImageStep

pytestmark = pytest.mark.spark


def numbers(spark: Any, rows: int = 50, partitions: int = 3, broken: tuple[int, ...] = ()) -> Any:
    """path, label, x: four numbers; rows of `broken` have three."""
    data = [
        (f"p{i:03d}", "odd" if i % 2 else "even", [float(i), i * 0.5, 1.0, -float(i)][: 3 if i in broken else 4])
        for i in range(rows)
    ]
    frame = spark.createDataFrame(data, "path string, label string, x array<float>")
    return frame.repartition(partitions, "path")


def tensor(rows: int = 50) -> torch.Tensor:
    return torch.tensor([[float(i), i * 0.5, 1.0, -i] for i in range(rows)])


def linear(labels: list[str] | None = None, width: int = 3) -> Model:
    torch.manual_seed(1)
    return Model.of(nn.Linear(4, width), column="x", shape=(4,), labels=labels)


def by_path(frame: Any) -> dict[str, Any]:
    rows = frame.collect()
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows), "a row came twice"
    return found


@pytest.mark.sessions
def test_features_are_those_of_plain_torch(spark: Any) -> None:
    model = linear()
    got = model.featurize(numbers(spark), precision="fp32", batch_size=8)
    assert got.columns == ["path", "label", "features", "error"]
    assert got.schema["features"].dataType.simpleString() == "array<float>"
    rows = by_path(got)
    with torch.no_grad():
        expected = model.module(tensor()).numpy()
    assert len(rows) == 50
    for i in range(50):
        row = rows[f"p{i:03d}"]
        np.testing.assert_allclose(row["features"], expected[i], rtol=1e-5, atol=1e-5)
        assert (row["label"], row["error"]) == ("odd" if i % 2 else "even", None)


@pytest.mark.parametrize("partitions", [1, 7, 60])
def test_bits_do_not_depend_on_the_partitioning(spark: Any, partitions: int) -> None:
    model = linear(width=40)
    one = by_path(model.featurize(numbers(spark, partitions=1), precision="fp32", batch_size=16))
    many = by_path(model.featurize(numbers(spark, partitions=partitions), precision="fp32", batch_size=16))
    assert one.keys() == many.keys()
    for path, row in one.items():
        assert np.array_equal(np.float32(row["features"]), np.float32(many[path]["features"]))


def test_order_within_a_partition_is_kept_around_broken_rows(spark: Any) -> None:
    broken = (0, 1, 5, 17, 18, 19, 20, 21, 49)
    frame = numbers(spark, broken=broken).coalesce(1).sortWithinPartitions("path")
    model = Model.of(nn.Identity(), column="x", shape=(4,))
    rows = model.featurize(frame, precision="fp32", batch_size=4).collect()
    assert [row["path"] for row in rows] == [f"p{i:03d}" for i in range(50)]
    for i, row in enumerate(rows):
        if i in broken:
            assert row["features"] is None
            assert row["error"] == "column 'x' holds 3 numbers, not 4"
        else:
            assert row["features"][0] == i
            assert row["error"] is None


@pytest.mark.sessions
def test_broken_rows_are_kept_dropped_or_fail(spark: Any) -> None:
    model = linear()
    frame = numbers(spark, broken=(3, 30))
    kept = by_path(model.featurize(frame, precision="fp32"))
    assert [path for path, row in sorted(kept.items()) if row["error"]] == ["p003", "p030"]
    dropped = model.featurize(frame, on_error="drop", precision="fp32")
    assert dropped.columns == ["path", "label", "features"]
    assert sorted(set(kept) - set(by_path(dropped))) == ["p003", "p030"]
    from kindling.ship import translated

    with pytest.raises(DataError, match=r"^path 'p0[03][30]' cannot be used: column 'x' holds 3 numbers") as caught:
        with translated():
            model.featurize(frame, on_error="fail", precision="fp32").collect()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("broken", [(), tuple(range(50))])
def test_frames_without_a_single_good_row(spark: Any, broken: tuple[int, ...]) -> None:
    frame = numbers(spark, broken=broken).where("path like 'q%'") if not broken else numbers(spark, broken=broken)
    got = linear(labels=["a", "b", "c"])
    assert all(row["features"] is None for row in got.featurize(frame).collect())
    assert all(row["prediction"] is None for row in got.predict(frame).collect())
    assert got.featurize(frame, on_error="drop").count() == 0


def test_several_and_wide_outputs_have_a_column_each(spark: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.reshape(-1, 2, 2), x.sum(1)

    model = Model.of(Two(), column="x", shape=(4,))
    first, second = model.signature.outputs
    rows = by_path(model.featurize(numbers(spark, 5), precision="fp32"))
    assert rows["p002"][first] == [2.0, 1.0, 1.0, -2.0]
    assert rows["p002"][second] == [2.0]


def test_path_and_label_are_optional_and_other_columns_can_be_kept(spark: Any) -> None:
    model = Model.of(nn.Identity(), column="x", shape=(4,))
    frame = numbers(spark, 6).selectExpr("x", "named_struct('a', label, 'b', array(1L, null)) as extra")
    assert model.featurize(frame, precision="fp32").columns == ["features", "error"]
    rows = batch.forward(model, frame, keep=["extra"], on_error="drop", precision="fp32").collect()
    assert {(row["extra"]["a"], row[1][0] % 2) for row in rows} == {("even", 0.0), ("odd", 1.0)}
    assert rows[0]["extra"]["b"] == [1, None]


def test_what_cannot_work_is_said_at_once(spark: Any) -> None:
    model, frame = linear(), numbers(spark, 3)
    with pytest.raises(DataError, match="no column 'x'"):
        model.featurize(frame.drop("x"))
    for setting, value in (("on_error", "ignore"), ("precision", "fp8"), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"^{setting}="):
            model.featurize(frame, **{setting: value})
    with pytest.raises(ConfigError, match="'label', which is also a result"):
        model.featurize(frame, column="label", precision="fp32")
    with pytest.raises(ConfigError, match="top_k=0"):
        linear(labels=["a", "b", "c"]).predict(frame, top_k=0)
    with pytest.raises(ModelError, match="not one score for each of 2 labels"):
        linear(labels=["a", "b"]).predict(frame)
    with pytest.raises(ConfigError, match="has no target"):
        model.evaluate(frame)


def test_results_leave_in_batches_of_bounded_size(spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.of(nn.Identity(), column="x", shape=(4,))
    job = batch._job(model, spark, precision="fp32", finish=batch.finish_lists, batch_size=8, keep=("x",))
    monkeypatch.setattr(
        batch, "open_engine", lambda job: engine.Engine(model.module, job.signature, job.preparation, batch_size=8)
    )
    rows = pa.RecordBatch.from_pydict({"x": pa.array(tensor(1000).tolist(), pa.list_(pa.float32()))})
    monkeypatch.setattr(batch, "_OUT_BYTES", 8 * 4 * 4 * 10)
    out = list(batch.run_job(job, iter([rows, rows.slice(0, 0), rows.slice(3, 5)])))
    assert [part.num_rows for part in out] == [80] * 12 + [45]
    whole = pa.Table.from_batches(out)
    assert (
        whole.column("x").to_pylist()
        == whole.column("c0").to_pylist()
        == [*tensor(1000).tolist(), *tensor(8)[3:].tolist()]
    )


# Predict


@pytest.mark.sessions
def test_prediction_is_label_probability_and_top_k(spark: Any) -> None:
    model = linear(labels=["a", "b", "c"])
    got = model.predict(numbers(spark, broken=(7,)), top_k=2)
    assert got.columns == ["path", "label", "x", "prediction", "probability", "top_k", "error"]
    rows = by_path(got)
    with torch.no_grad():
        shares = torch.softmax(model.module(tensor()).double(), 1).numpy()
    for i in range(50):
        row = rows[f"p{i:03d}"]
        if i == 7:
            assert (row["prediction"], row["probability"], row["top_k"]) == (None, None, None)
            assert "holds 3 numbers" in row["error"]
            continue
        order = np.argsort(-shares[i])
        assert row["prediction"] == "abc"[order[0]]
        assert row["probability"] == pytest.approx(shares[i][order[0]], rel=1e-4)
        assert [pair["label"] for pair in row["top_k"]] == ["abc"[c] for c in order[:2]]


def test_a_list_and_a_dataframe_are_answered_alike(spark: Any) -> None:
    model = linear(labels=["a", "b", "c"])
    rows = by_path(model.predict(numbers(spark, 6), top_k=3))
    answers = model.predict(tensor(6).tolist(), top_k=3)
    for i, answer in enumerate(answers):
        row = rows[f"p{i:03d}"]
        assert answer["prediction"] == row["prediction"]
        assert answer["probability"] == pytest.approx(row["probability"], rel=1e-6)
        assert [pair["label"] for pair in answer["top_k"]] == [pair["label"] for pair in row["top_k"]]


@pytest.mark.sessions
def test_photos_are_read_and_left_out_of_the_answer(spark: Any) -> None:
    def png(colour: tuple[int, int, int]) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (9, 6), colour).save(file, "PNG")
        return file.getvalue()

    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Model.of(net, inputs=ImageStep("image", size=(4, 4)), labels=["red", "green", "blue"])
    data = [("r", png((200, 0, 0))), ("b", png((0, 0, 90))), ("x", b"not a photo"), ("n", None)]
    frame = spark.createDataFrame(data, "path string, content binary")
    assert batch.choose_precision(model, frame).reason  # photos reach the comparison, broken ones do not stop it
    got = model.predict(frame)
    assert got.columns == ["path", "prediction", "probability", "top_k", "error"]
    rows = by_path(got)
    assert (rows["r"]["prediction"], rows["b"]["prediction"], rows["x"]["prediction"]) == ("red", "blue", None)
    assert "not an image" in rows["x"]["error"]
    assert "null" in rows["n"]["error"]


def test_a_model_without_labels_predicts_numbers(spark: Any) -> None:
    rows = by_path(Model.of(nn.Identity(), column="x", shape=(4,)).predict(numbers(spark, 3)))
    assert rows["p002"]["prediction"] == [2.0, 1.0, 1.0, -2.0]


# Evaluate


@pytest.mark.sessions
def test_a_report_is_that_of_scikit_learn_whatever_the_partitioning(spark: Any) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

    model = linear(labels=["even", "none", "odd"])
    good = [i for i in range(50) if i not in (4, 9)]
    reports = [
        model.evaluate(numbers(spark, partitions=partitions, broken=(4, 9)), batch_size=8) for partitions in (1, 5, 60)
    ]
    assert reports[0].to_json() == reports[1].to_json() == reports[2].to_json()
    report = reports[0]
    with torch.no_grad():
        scores = model.module(tensor())[good].double()
    truth, said = [2 * (i % 2) for i in good], scores.argmax(1).tolist()
    assert report.rows == 48
    assert report.accuracy == accuracy_score(truth, said)
    assert report.f1 == pytest.approx(f1_score(truth, said, average="macro", zero_division=0))
    assert report.loss == pytest.approx(log_loss(truth, torch.softmax(scores, 1).numpy(), labels=[0, 1, 2]), rel=1e-4)
    assert report.confusion.tolist() == confusion_matrix(truth, said, labels=[0, 1, 2]).tolist()
    assert report.skipped_rows == 2
    assert [name for name, _ in report.skipped] == ["p004", "p009"]


def test_labels_the_model_does_not_know_are_skipped_and_listed(spark: Any) -> None:
    report = linear(labels=["odd", "b", "c"]).evaluate(numbers(spark, 10))
    assert report.rows == 5
    assert report.skipped[0] == ("p000", "label 'even' is none of the model's 3 labels")


def test_any_loss_measures(spark: Any) -> None:
    model = linear(labels=["even", "none", "odd"])
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    with torch.no_grad():
        expected = smooth(model.module(tensor()), torch.tensor([2 * (i % 2) for i in range(50)]))
    assert model.evaluate(numbers(spark), loss=smooth).loss == pytest.approx(float(expected), rel=1e-5)
    own = model.evaluate(numbers(spark), loss=lambda outputs, targets: outputs.sum() * 0 + targets.float().mean())
    assert own.loss == pytest.approx(1.0)


def test_numbers_are_evaluated_by_their_errors(spark: Any) -> None:
    from dataclasses import replace

    from kindling.prepare import Preparation, ValueStep

    model = Model.of(nn.Linear(4, 1), column="x", shape=(4,))
    model = replace(model, preparation=Preparation(model.preparation.inputs, (ValueStep("target", "y"),)))
    frame = numbers(spark, 20).selectExpr("path", "x", "x[0] * 2 as y")
    with torch.no_grad():
        error = model.module(tensor(20))[:, 0] - tensor(20)[:, 0] * 2
    report = model.evaluate(frame)
    assert report.mean_squared_error == pytest.approx(float((error**2).mean()), rel=1e-4)
    assert report.loss == pytest.approx(float((error**2).mean()), rel=1e-4)


def test_nothing_to_evaluate_on_is_an_error(spark: Any) -> None:
    model = linear(labels=["even", "none", "odd"])
    with pytest.raises(DataError, match="no row to evaluate on"):
        model.evaluate(numbers(spark, 3).where("path = 'q'"))
    with pytest.raises(DataError, match=r"all 2 are broken, the first: p000: column 'x' holds 3"):
        model.evaluate(numbers(spark, 2, broken=(0, 1)))
    with pytest.raises(DataError, match=r"^path 'p001' cannot be used"):
        model.evaluate(numbers(spark, 3, broken=(1,)), on_error="fail")


# Precision


@pytest.mark.sessions
def test_auto_compares_on_the_first_rows_and_says_what_it_found(spark: Any) -> None:
    model = linear(width=64)
    chosen = batch.choose_precision(model, numbers(spark))
    if engine.hardware_bf16() is None:
        assert chosen.reason == "the processor has no bfloat16 arithmetic"
        return
    assert chosen.name == ("fp32" if "strays" in chosen.reason else "bf16")
    assert "cosine mean 0.99" in chosen.reason
    assert batch.choose_precision(model, numbers(spark).where("false")) == chosen  # remembered for the session


def test_auto_without_usable_rows_is_fp32_and_not_remembered(spark: Any) -> None:
    model = linear(width=65)
    assert batch.choose_precision(model, numbers(spark).where("false")).name == "fp32"
    assert batch.choose_precision(model, numbers(spark, 3, broken=(0, 1, 2))).name == "fp32"
    assert "no " not in batch.choose_precision(model, numbers(spark)).reason or engine.hardware_bf16() is None


def test_a_stream_is_featurised_without_an_eager_job(spark: Any, tmp_path: Any) -> None:
    numbers(spark, 20).write.parquet(str(tmp_path / "in"))
    stream = spark.readStream.schema("path string, label string, x array<float>").parquet(str(tmp_path / "in"))
    query = (
        Model.of(nn.Identity(), column="x", shape=(4,))
        .featurize(stream)
        .writeStream.format("parquet")
        .option("checkpointLocation", str(tmp_path / "marks"))
        .trigger(availableNow=True)
        .start(str(tmp_path / "out"))
    )
    query.awaitTermination(120)
    assert spark.read.parquet(str(tmp_path / "out")).count() == 20


def test_a_task_opens_without_torch() -> None:
    job = batch.Job(
        module=None,  # type: ignore[arg-type]
        signature=Model.of(nn.Identity(), column="x", shape=(4,)).signature,
        preparation=Model.of(nn.Identity(), inputs=ImageStep("i", size=(4, 4)), labels=["a", "b"]).preparation,
        precision="fp32",
        batch_size=1,
        keep=(),
        named_by=None,
        on_error="keep",
        targets=True,
        finish=batch.finish_lists,
    )
    task = pickle.dumps((batch.run_job, batch.compare_sample, batch.merge_tallies, job, ArrayStep("x", "x", (1,))))
    code = f"import pickle, sys; pickle.loads({task!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
