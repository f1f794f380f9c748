"""H2O MOJOs: real ones against H2O's own scorer, whose answers are in `h2o/expected.json` (see the README there)."""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from kindling import Model, graph, surgery
from kindling.errors import FormatError
from kindling.formats import h2o, models
from kindling.formats.models import Imported
from kindling.prepare import CategoryStep, Preparation

HERE = Path(__file__).with_name("h2o")
EXPECTED: dict[str, list[list[float]]] = json.loads((HERE / "expected.json").read_text())
KINDS = sorted(path.stem for path in HERE.glob("*.zip"))


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if any(row.values())]


def answers(model: Imported, rows: list[dict[str, str]]) -> np.ndarray:
    """Probabilities or numbers, from raw columns of text."""
    columns = {s.column: [row[s.column] or None for row in rows] for s in model.preparation.inputs}
    packed = model.preparation.pack(pa.RecordBatch.from_pydict(columns), targets=False)
    assert not packed.errors
    batch = model.preparation.batch(packed.arrays, targets=False)
    with torch.no_grad():
        (out,) = model.signature.call(model.module, batch).values()
    return (out.softmax(1) if model.labels else out).numpy()


def check(found: np.ndarray, name: str) -> None:
    expected = np.array(EXPECTED[name])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("name", "file", "table"),
    [
        ("prostate", "deep_learning_prostate.mojo", "tables/prostate.csv"),
        ("iris", "deep_learning_airlines_categoricals.zip", "iris/iris_wheader.csv"),
    ],
)
def test_real_mojos_answer_as_h2o_does(data_dir: Path, name: str, file: str, table: str) -> None:
    check(answers(h2o.read(data_dir / "h2o_mojo" / file), rows_of(data_dir / table)), name)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_net_answers_as_h2o_does(name: str) -> None:
    """Activations, dropout, maxout, balanced classes, dropped levels, missing and unknown values, links."""
    check(answers(h2o.read(HERE / f"{name}.zip"), rows_of(HERE / "rows.csv")), name)


@pytest.mark.parametrize("name", KINDS)
def test_mojos_survive_a_bundle_s_json(name: str) -> None:
    model = h2o.read(HERE / f"{name}.zip")
    net = surgery.trace(model.module, len(model.signature.inputs))
    assert net is not None
    again = graph.from_json(json.loads(json.dumps(graph.to_json(net))))
    graph.assign_tensors(again, graph.named_tensors(net))
    inputs = [torch.randn(3, *spec.shape[1:]) for spec in model.signature.inputs.values()]  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(again.eval()(*inputs), model.module(*inputs))
    assert Preparation.from_json(json.loads(json.dumps(model.preparation.to_json()))) == model.preparation


def test_a_classifier_is_a_model_with_its_classes() -> None:
    found = h2o.read(HERE / "multinomial_dropout.zip")
    model = Model(module=found.module, signature=found.signature, preparation=found.preparation, labels=found.labels)
    assert model.labels == ("high", "low", "mid")
    assert found.preparation.targets[0].column == "three"
    row = rows_of(HERE / "rows.csv")[0]
    (answer,) = model.predict([{**row, "x": float(row["x"]), "y": float(row["y"] or "nan")}])
    assert answer["prediction"] == model.labels[int(np.argmax(EXPECTED["multinomial_dropout"][0]))]
    assert "hidden1" in str(model.summary())
    assert model.until("hidden2").signature.outputs["hidden2"].shape == ("N", 5)
    modules = dict(found.module.named_modules())
    assert (modules["hidden1_dropout"].p, modules["hidden2_dropout"].p) == (0.3, 0.2)


def test_dropout_trains_as_in_h2o(tmp_path: Path) -> None:
    """In training H2O zeroes without enlarging; ours enlarges and has the factor in the weights behind: the same."""
    model = h2o.read(HERE / "multinomial_dropout.zip")
    numbers = ini(HERE / "multinomial_dropout.zip")
    stored = np.array(json.loads(numbers["weight_layer1"])).reshape(5, 6)
    np.testing.assert_allclose(model.module.hidden2.weight.detach().numpy() / (1 - 0.3), stored, rtol=1e-6)


def test_unknown_names_can_be_reported() -> None:
    model = h2o.read(HERE / "huber.zip", unknown="error")
    rows = rows_of(HERE / "rows.csv")[:4]
    columns = {s.column: [row[s.column] or None for row in rows] for s in model.preparation.inputs}
    packed = model.preparation.pack(pa.RecordBatch.from_pydict(columns), targets=False)
    assert packed.errors == {2: "column 'wind' holds 'northwest', none of 4 levels"}


def test_folders_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(HERE / "huber.zip") as archive:
        archive.extractall(tmp_path / "model")
    monkeypatch.setattr(models, "READERS", ("dl4j", "h2o"))
    model = models.open_model(tmp_path / "model")
    assert model is not None
    check(answers(model, rows_of(HERE / "rows.csv")), "huber")


def ini(file: Path) -> dict[str, str]:
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("model.ini").decode().splitlines()
    return dict(line.split(" = ", 1) for line in lines if " = " in line)


def changed(file: Path, target: Path, **values: str) -> Path:
    """A copy of a MOJO with other values in its `model.ini`; a name of `DROP` leaves the line out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "model.ini":
                lines = data.decode().splitlines()
                keys = [line.split(" = ", 1)[0] for line in lines]
                lines = [f"{k} = {values[k]}" if k in values else line for k, line in zip(keys, lines, strict=True)]
                data = "\n".join(line for line in lines if not line.endswith(" = DROP")).encode()
            new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"algo": "gbm"}, "a MOJO of 'gbm'; of H2O's models, deep learning is read"),
        ({"mojo_version": "2.00"}, "MOJO version '2.00'"),
        ({"_genmodel_encoding": "Eigen"}, "encodes categories by 'Eigen'"),
        ({"activation": "Wobble"}, "activation 'Wobble' is not read"),
        ({"distribution": "custom"}, "distribution 'custom' is not read"),
        ({"category": "Clustering"}, "category 'Clustering'"),
        ({"nums": "7"}, "7 numbers"),
        ({"neural_network_sizes": "[99999999999, 5, 1]"}, "no size"),
        ({"neural_network_sizes": "[11, 2000000000, 5, 1]"}, "from 11 to 2000000000 has 66 weights"),
        ({"weight_layer0": "[1.0, x]"}, "weight_layer0 holds something that is no number"),
        ({"weight_layer0": "[1.0, NaN]"}, "not finite"),
        ({"weight_layer0": "DROP"}, "does not say 'weight_layer0'"),
        ({"cat_offsets": "[0, 5, 3]"}, "do not fit"),
        ({"n_columns": "77"}, "lists 5 columns and says 77"),
        ({"norm_mul": "[1.0]"}, "norm_mul and norm_sub hold 1 and 2 for 2 numbers"),
        ({"norm_resp_mul": "[0.0]"}, "norm_resp_mul"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, values: dict[str, str], match: str) -> None:
    with pytest.raises(FormatError, match=match):
        h2o.read(changed(HERE / "huber.zip", tmp_path / "odd.zip", **values))


def test_a_domain_s_file_cannot_lead_elsewhere(tmp_path: Path) -> None:
    with zipfile.ZipFile(HERE / "huber.zip") as archive:
        archive.extractall(tmp_path / "model")
    text = (tmp_path / "model" / "model.ini").read_text()
    (tmp_path / "model" / "model.ini").write_text(text.replace("d000.txt", "../../secret.txt"))
    with pytest.raises(FormatError, match=r"names a domain by '0: 4 \.\./\.\./secret\.txt'"):
        h2o.read(tmp_path / "model")


def test_one_hot_rows_as_h2o_makes_them() -> None:
    """GenModel.setCats: without the first level its rows are zeros, levels beyond the width share the last place."""
    rows = pa.RecordBatch.from_pydict({"c": ["a", "b", "c", None]})
    for drop_first, width, expected in (
        (False, 4, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        (True, 3, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (False, 2, [[1, 0], [0, 1], [0, 1], [0, 1]]),
    ):
        step = CategoryStep("c", "c", ("a", "b", "c"), width, drop_first)
        assert step.batch(step.pack(rows).arrays).tolist() == expected


def fuzz(file: Path, work: Path, rounds: int) -> None:
    rng = random.Random(0)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(rounds):
        data: Any = bytearray(whole)
        if rng.random() < 0.3:
            for _ in range(rng.choice((1, 4))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data
        else:
            stream, victim = io.BytesIO(), rng.choice(list(members))
            with zipfile.ZipFile(stream, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, mutated(content, rng) if name == victim else content)
            data = stream.getvalue()
        work.write_bytes(bytes(data))
        try:
            model = h2o.read(work)
        except FormatError as error:
            told = len(str(error))
        else:
            inputs = [torch.zeros(20, *spec.shape[1:]) for spec in model.signature.inputs.values()]  # type: ignore[arg-type]
            told = len(model.module(*inputs))
        assert 10 < told < 1000


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes turned, cut, doubled, or a number of the text made another."""
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0 and changed:
        return bytes(changed[: rng.randrange(len(changed))])
    if kind == 1:
        lines = bytes(changed).split(b"\n")
        place = rng.randrange(len(lines))
        lines[place : place + 1] = rng.choice(([], [lines[place]] * 2, [lines[place].replace(b"1", b"9" * 12)]))
        return b"\n".join(lines)
    for _ in range(rng.choice((1, 3))):
        if changed:
            place = rng.randrange(min(len(changed), 1500))
            changed[place] = rng.choice(b"0918[],=-. \n\xff") if kind == 2 else rng.randrange(256)
    return bytes(changed)


def test_mutated_mojos_give_an_error_or_a_net(tmp_path: Path) -> None:
    for name in ("huber", "balanced_maxout", "autoencoder"):
        fuzz(HERE / f"{name}.zip", tmp_path / "bad.zip", 100)


@pytest.mark.slow
def test_many_mutated_mojos_give_an_error_or_a_net(tmp_path: Path) -> None:
    for name in KINDS:
        fuzz(HERE / f"{name}.zip", tmp_path / "bad.zip", 1_000)
