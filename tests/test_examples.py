"""Every example runs from a clean folder, and what it prints is looked at."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kindling as kd

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}' in text, f"no test runs {path.name}"


@pytest.mark.slow
@pytest.mark.spark
def test_digits_table(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "digits_table.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if "ccuracy" in line)
    assert float(next(word for word in line.replace("%", "").split() if word[0].isdigit()).rstrip(",")) > 0.9


@pytest.mark.spark
def test_search_digits(spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = load("search_digits").main(spark.conf.get("spark.master"), trials=3)
    shown = capsys.readouterr().out
    assert accuracy > 0.5  # chance is 0.1
    assert shown.splitlines()[0].split() == ["trial", "accuracy", "lr", "hidden", "epochs", "seconds"]


@pytest.mark.spark
def test_transfer_photos(spark: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = load("transfer_photos").main(str(photos), "lenet", "fc1", str(tmp_path / "model"))
    assert accuracy > 0.6  # a linear head on random features; chance is 0.33
    assert "ccuracy" in capsys.readouterr().out
    assert kd.load(tmp_path / "model").labels == ("0", "1", "2")
