"""Models out and back again: the same numbers from the file's own runtime, and from `kindling.load`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import kindling as kd
from kindling.errors import ConfigError, FormatError, MissingExtraError, ModelError
from kindling.formats import export as room
from kindling.prepare import ImageStep
from kindling.prepare.columns import ScaledArrayStep


def small(labels: bool = True) -> kd.Model:
    """A net for photos whose preparation has every setting that a graph must say."""
    torch.manual_seed(0)
    front = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    net = nn.Sequential(*front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    step = ImageStep("photo", size=(8, 6), channels="BGR", scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    return kd.Model.of(net.eval(), inputs=step, labels=["a", "b", "c"] if labels else None, name="small")


def photos(count: int = 3) -> list[np.ndarray]:
    return [np.random.default_rng(k).integers(0, 256, (20, 15, 3), dtype=np.uint8) for k in range(count)]


def scores(model: kd.Model) -> np.ndarray:
    rows = [
        {entry["label"]: entry["probability"] for entry in row["top_k"]} for row in model.predict(photos(), top_k=3)
    ]
    return np.array([[row[label] for label in sorted(row)] for row in rows])


@pytest.mark.parametrize(
    ("ending", "inside"),
    [(".onnx", True), (".pt2", True), (".pt2", False), pytest.param(".onnx", False, marks=pytest.mark.slow)],
)
def test_a_model_comes_back_with_its_preparation_and_labels(ending: str, inside: bool, tmp_path: Path) -> None:
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    model, file = small(), tmp_path / f"net{ending}"
    model.export(file, preparation=inside)
    again = kd.load(file)
    assert again.labels == model.labels
    assert isinstance(again.preparation.inputs[0], ImageStep)
    assert again.preparation.inputs[0].channels == "BGR"
    np.testing.assert_allclose(scores(again), scores(model), atol=1e-5)
    again.save(tmp_path / "bundle")
    np.testing.assert_allclose(scores(kd.load(tmp_path / "bundle")), scores(model), atol=1e-5)
    with pytest.raises(ConfigError, match="is there already"):
        model.export(file)
    model.export(file, overwrite=True)
    assert str(Path.cwd()).encode() not in file.read_bytes()  # nothing of this machine in it


def test_onnx_takes_pixels_as_they_are(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small()
    model.export(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("photo", "tensor(uint8)", [8, 6, 3])
    step = model.preparation.inputs[0]
    assert isinstance(step, ImageStep)
    pixels = np.stack([step.decode_one(photo) for photo in photos()])
    (got,) = session.run(None, {"photo": pixels})
    with torch.no_grad():
        wanted = model.module(step.batch({"photo": pixels}))
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_scaled_numbers_are_scaled_inside(tmp_path: Path) -> None:
    step = ScaledArrayStep("x", "features", (2,), subtract=(1.0, 2.0), multiply=(0.5, 10.0), add=1.0)
    model = kd.Model.of(nn.Linear(2, 1), inputs=step)
    model.export(tmp_path / "net.pt2")
    again = kd.load(tmp_path / "net.pt2")
    assert type(again.preparation.inputs[0]).__name__ == "ArrayStep"
    rows = [{"features": [3.0, 4.0]}]
    ours, theirs = model.predict(rows)[0], again.predict(rows)[0]
    assert next(iter(ours.values())) == pytest.approx(next(iter(theirs.values())), rel=1e-5)


def test_safetensors_go_into_the_same_net_again(tmp_path: Path) -> None:
    model, other = small(), small()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(1.0)
    model.export(tmp_path / "net.safetensors")
    torch.save(model.module.state_dict(), tmp_path / "net.pth")
    for name in ("net.safetensors", "net.pth"):
        again = kd.load(other, weights=tmp_path / name)
        np.testing.assert_allclose(scores(again), scores(model), atol=1e-7)
        assert again.source["weights"]["file"] == name
    assert not np.allclose(scores(other), scores(model))  # the model that was given is left alone
    wrong = kd.Model.of(nn.Linear(2, 1), shape=(2,))
    with pytest.raises(FormatError, match="does not fit the model: it lacks 'weight'"):
        kd.load(wrong, weights=tmp_path / "net.pth")
    with pytest.raises(ConfigError, match="leaves a Model as it is"):
        kd.load(model)


@pytest.mark.slow
def test_a_folder_runs_with_torch_alone(tmp_path: Path) -> None:
    model, folder = small(), tmp_path / "alone"
    model.export(folder)
    assert sorted(part.name for part in folder.iterdir()) == ["model.json", "model.pt2", "predict.py"]
    photo = tmp_path / "photo.png"
    Image.fromarray(photos(1)[0]).save(photo)
    script = str(folder / "predict.py")
    run = f"""
import runpy, sys
sys.modules['kindling'] = sys.modules['pyspark'] = sys.modules['safetensors'] = None
sys.argv = ['predict.py', {str(photo)!r}]
runpy.run_path({script!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    best = model.predict([str(photo)])[0]
    label, probability = done.stdout.split(" ", 1)[1].split(",")[0].split()
    assert label == best["prediction"]
    assert float(probability) == pytest.approx(best["probability"], abs=0.02)
    np.testing.assert_allclose(scores(kd.load(folder)), scores(model), atol=1e-5)
    with pytest.raises(ConfigError, match="holds a model already"):
        model.export(folder)
    model.save(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="bundle"):
        model.export(tmp_path / "bundle", overwrite=True)


def test_any_file_system(tmp_path: Path) -> None:
    import fsspec

    model = small()
    model.export("memory://models/net.safetensors")
    assert fsspec.filesystem("memory").size("/models/net.safetensors") > 0
    model.export("memory://models/alone")
    names = {Path(name).name for name in fsspec.filesystem("memory").ls("/models/alone", detail=False)}
    assert names == {"model.json", "model.pt2", "predict.py"}


class Fickle(nn.Module):
    """Gives other numbers each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_what_does_not_give_the_models_numbers_is_not_kept(tmp_path: Path) -> None:
    model = kd.Model.of(Fickle(), shape=(3,))
    with pytest.raises(ModelError, match=r"gives other numbers than the model.*Nothing was kept"):
        model.export(tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"kindling-spark\[onnx\]"):
        small().export(tmp_path / "net.onnx")


def test_convert_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from kindling.cli import app

    model = small()
    model.save(tmp_path / "bundle")
    steps: list[tuple[str, str, list[str]]] = [
        ("bundle", "net.pt2", []),
        ("net.pt2", "again", []),
        ("again", "net.safetensors", []),
        ("again", "alone", ["--stand-alone"]),
    ]
    for source, target, more in steps:
        words = ["convert", str(tmp_path / source), str(tmp_path / target), *more, "--json"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["out"] == str(tmp_path / target)
    np.testing.assert_allclose(scores(kd.load(tmp_path / "again")), scores(model), atol=1e-5)
    assert (tmp_path / "alone" / "predict.py").exists()


def test_endings_are_those_of_the_documents() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    assert all(f"`{ending}`" in text for ending in room.endings())
