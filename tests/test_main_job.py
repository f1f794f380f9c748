"""The main job from end to end, as a user writes it, on every kind of session and on real data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kindling as kd

pytestmark = pytest.mark.spark

MOBILENET = "mobilenet_tflite/mobilenet_v2_1.0_224_dequantized.npz"
SQUEEZENET = "squeezenet_v1.1_keras/squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"


def _paint(folder: Path, classes: int, each: int) -> Path:
    """Photos of coloured noise, a colour for each class."""
    rng = np.random.default_rng(0)
    colours = [(220, 40, 40), (40, 200, 60), (50, 60, 220)]
    for label, colour in enumerate(colours[:classes]):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(colour + rng.normal(0, 25, (96, 128, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{number}.jpg", quality=90)
    return folder


@pytest.mark.slow
def test_the_design_runs_as_written(spark: Any, tmp_path: Path) -> None:
    """VGG16 of full size, with generated weights."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(kd.load("vgg16").module.state_dict(), tmp_path / "vgg16.safetensors")
    folder = _paint(tmp_path / "caltech256", classes=3, each=16)

    photos = kd.read.images(str(folder))
    train, valid, test = kd.split(photos, 0.7, 0.15, 0.15)

    vgg = kd.load("vgg16", weights=str(tmp_path / "vgg16.safetensors"))
    assert "138,357,544" in str(vgg.summary())
    model = vgg.until("fc2").freeze().then(nn.Linear(4096, 3), labels=kd.labels(train))
    model = model.fit(
        train,
        validation=valid,
        epochs=20,
        batch_size=32,
        strategy=kd.ParameterAveraging(every=5),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.8, nesterov=True),
        progress=False,
    )
    report = model.evaluate(test)
    assert report.rows == test.count()
    model.save(tmp_path / "models" / "caltech256")
    predicted = kd.load(tmp_path / "models" / "caltech256").predict(photos)
    rows = predicted.collect()
    assert len(rows) == 48
    assert {row["prediction"] for row in rows} <= {"class 0", "class 1", "class 2"}
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert right > 0.6 * len(rows)  # random features tell colours apart, roughly; chance is a third


@pytest.mark.sessions
@pytest.mark.needs_data
def test_transfer_learning_on_real_photos(spark: Any, data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    photos = kd.read.images(str(data_dir / "caltech101_mini"))
    train, valid, test = kd.split(photos, 0.6, 0.1, 0.3)
    net = kd.load("squeezenet1_1", weights=data_dir / SQUEEZENET)
    torch.manual_seed(0)
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classes": nn.Linear(512, 10)}
    model = (
        net.freeze()
        .then(head, labels=kd.labels(train))
        .fit(
            train,
            validation=valid,
            epochs=15,
            batch_size=8,
            workers=2,
            strategy=kd.ParameterAveraging(every=5),
            optimizer=partial(torch.optim.SGD, lr=0.001, momentum=0.8, nesterov=True),
            progress=False,
        )
    )
    report = model.evaluate(test)
    assert report.accuracy > 0.85
    model.save(tmp_path / "model")
    loaded = kd.load(tmp_path / "model")
    rows = loaded.predict(test, top_k=3).collect()
    assert sum(row["prediction"] == row["label"] for row in rows) == round(report.accuracy * report.rows)
    path = rows[0]["path"].removeprefix("file:").replace("%20", " ")
    (alone,) = loaded.predict([Path(path).read_bytes()])
    assert alone["prediction"] == rows[0]["prediction"]
    assert alone["probability"] == pytest.approx(rows[0]["probability"], abs=1e-5)


@pytest.fixture
def only_sparks(spark: Any, tmp_path: Path) -> Iterator[str]:
    """A folder on a file system that Spark's Hadoop client reaches and Python does not, as a cluster's often is.

    Hadoop's own `viewfs`, over a folder of this disk.
    """
    if not hasattr(spark, "_jsc"):
        pytest.skip("Connect has no way to set up a file system")
    (tmp_path / "mounted").mkdir()
    link, target = "fs.viewfs.mounttable.kindling.link./data", f"file:{tmp_path}/mounted"
    spark._jsc.hadoopConfiguration().set(link, target)
    spark.conf.set(link, target)
    yield "viewfs://kindling/data"
    spark._jsc.hadoopConfiguration().unset(link)
    spark.conf.unset(link)


@pytest.mark.slow
def test_the_job_on_a_file_system_that_only_spark_reaches(
    spark: Any, only_sparks: str, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "mounted" / "photos")
    rows = kd.read.images(f"{only_sparks}/photos")
    assert rows.count() == 60
    torch.manual_seed(0)
    net = kd.load("lenet").until("flatten")
    again = [net.featurize(rows, out=f"{only_sparks}/features", progress=False) for _ in range(2)]
    assert [one.count() for one in again] == [60, 60]
    assert kd.provenance(f"{only_sparks}/features", spark=spark)["rows"] == 60
    model = (
        net.freeze()
        .then(nn.Linear(800, 3), labels=kd.labels(rows))
        .fit(rows, epochs=8, batch_size=8, workers=2, run=f"{only_sparks}/run", progress=False)
    )
    assert model.evaluate(rows).accuracy > 0.9
    model.save(f"{only_sparks}/model", spark=spark)
    loaded = kd.load(f"{only_sparks}/run/model", spark=spark)
    answers = kd.load(f"{only_sparks}/model", spark=spark).predict(rows).collect()
    assert {row["path"]: row["prediction"] for row in loaded.predict(rows).collect()} == {
        row["path"]: row["prediction"] for row in answers
    }
    files = {path.relative_to(tmp_path / "mounted").parts[0] for path in (tmp_path / "mounted").rglob("*")}
    assert files == {"photos", "features", "run", "model"}
    assert list((tmp_path / "mounted" / "run" / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
@pytest.mark.needs_data
def test_lenet_reads_99_of_100_digits(spark: Any, data_dir: Path) -> None:
    folder = data_dir / "mnist"
    train = kd.read.idx(str(folder / "train-images-idx3-ubyte.gz"), str(folder / "train-labels-idx1-ubyte.gz"))
    test = kd.read.idx(str(folder / "t10k-images-idx3-ubyte.gz"), str(folder / "t10k-labels-idx1-ubyte.gz"))
    torch.manual_seed(0)
    model = (
        kd.load("lenet")
        .with_labels(kd.labels(test))
        .fit(
            train,
            epochs=5,
            batch_size=32,
            workers=2,
            strategy=kd.ParameterAveraging(every=5),
            optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
            progress=False,
        )
    )
    report = model.evaluate(test)
    assert report.rows == 10_000
    assert report.accuracy >= 0.99


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("net", "weights", "cut", "floor"),
    [("squeezenet1_1", SQUEEZENET, None, 0.80), ("mobilenet_v2", MOBILENET, "conv2", 0.88)],
)
def test_the_headline_job(
    spark: Any, data_dir: Path, tmp_path: Path, net: str, weights: str, cut: str | None, floor: float
) -> None:
    """All of Caltech-101 without Faces_easy, by parameter averaging on two workers, with nets trained on ImageNet."""
    import tarfile

    from kindling.transfer import transfer

    pytest.importorskip("h5py")
    with tarfile.open(data_dir / "caltech101" / "caltech101_max80.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    photos = kd.read.images([str(path) for path in sorted(folder.iterdir()) if path.name != "Faces_easy"])
    model = kd.load(net, weights=data_dir / weights)
    done = transfer(
        photos,
        model.until(cut) if cut else model,
        epochs=20,
        optimizer=partial(torch.optim.SGD, lr=0.003, momentum=0.9, nesterov=True, weight_decay=0.01),
        strategy=kd.ParameterAveraging(every=5),
        workers=2,
    )
    assert done.train.rows + done.valid.rows + done.test.rows == 5895
    assert len(done.model.labels) == 100
    assert done.broken == 0
    assert done.test.accuracy > floor
    answers = done.model.predict([str(folder / "airplanes" / "image_0001.jpg")], top_k=1)
    assert answers[0]["prediction"] == "airplanes"
