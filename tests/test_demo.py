"""The demo, whole: it is also the shortest proof that the rooms fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import kindling as kd
from kindling.demo import run, write_digits


def test_the_digits_are_scikit_learn_s(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    assert write_digits(tmp_path) == 1797
    files = sorted(tmp_path.glob("*/*.png"))
    assert len(files) == 1797
    for number in (0, 77, 1796):
        file = tmp_path / str(digits.target[number]) / f"{number:04}.png"
        levels = (
            Image.open(file).get_flattened_data()
            if hasattr(Image.Image, "get_flattened_data")
            else Image.open(file).getdata()
        )
        assert [round(level * 16 / 255) for level in levels] == digits.images[number].ravel().tolist()


@pytest.mark.spark
def test_the_demo_tells_a_true_story(spark: Any, tmp_path: Path) -> None:
    result = run(spark, tmp_path / "demo")
    assert result.first.accuracy > 0.95
    assert result.labelled < 60
    assert result.first.rows + result.head.rows + result.labelled < 1797
    assert result.head.accuracy > 0.85
    assert result.scratch.accuracy > 0.5  # a fair rival, not one that failed to learn
    assert result.weights == (800 * 5 + 5, 431_080 - 5_010 + 2_505)
    assert result.head.rows == result.scratch.rows
    assert result.answer["prediction"] == result.picture.parent.name
    model = kd.load(result.folder / "model")
    assert model.labels == ("5", "6", "7", "8", "9")
    assert spark.read.parquet(str(result.folder / "features.parquet")).count() == 896
    assert "from scratch" in str(result)
    assert result.to_json()["accuracy"]["5-9"] == result.head.accuracy


def test_it_does_not_clear_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(kd.errors.StorageError, match="holds no earlier demo"):
        run(None, tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
