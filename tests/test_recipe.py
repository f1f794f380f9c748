"""Solvers of Caffe on Spark: step by step what a loop in plain torch does, and the nets they were written for."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import kindling as kd
from kindling import cli
from kindling.errors import ConfigError
from kindling.prepare import RandomCrop, RandomFlip
from kindling.prepare.augment import RowDraws
from kindling.recipe import Recipe
from kindling.train.order import mix

CLASSES = tuple(f"c{number}" for number in range(10))

NET = """
name: "small"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
        transform_param { scale: 0.0078125 MIRROR } data_param { source: "db" batch_size: 20 } }
layer { name: "ip1" type: "InnerProduct" bottom: "data" top: "ip1" param { lr_mult: 1 }
        param { lr_mult: 2 decay_mult: 0 }
        inner_product_param { num_output: 8 weight_filler { type: "xavier" } } }
layer { name: "relu1" type: "ReLU" bottom: "ip1" top: "ip1" }
layer { name: "ip2" type: "InnerProduct" bottom: "ip1" top: "ip2"
        inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
LOSS
"""
LOSS = 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip2" bottom: "label" top: "loss" }'
SOLVER = """
net: "some/where/net.prototxt" base_lr: 0.05 lr_policy: "inv" gamma: 0.1 power: 0.75 momentum: 0.9 weight_decay: 0.01
max_iter: 12 random_seed: 5
"""


def written(folder: Path, loss: str = LOSS, mirror: str = "", more: str = "") -> Path:
    (folder / "net.prototxt").write_text(NET.replace("LOSS", loss).replace("MIRROR", mirror))
    (folder / "solver.prototxt").write_text(SOLVER + more)
    return folder / "solver.prototxt"


def small(folder: Path, **texts: str) -> Recipe:
    return kd.caffe_recipe(written(folder, **texts), labels=CLASSES, input_shape=(1, 6, 6))


def pictures(rows: int, height: int, channels: int, seed: int = 0) -> list[tuple[str, str, bytes]]:
    """Generated pictures as PNG, each class a little brighter than the one before."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(rows):
        label = number % 10
        pixels = np.clip(rng.normal(20 + 22 * label, 20, (height, height, channels)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, "PNG")
        made.append((f"p{number:04d}", CLASSES[label], file.getvalue()))
    return made


def frame(spark: Any, rows: list[tuple[str, str, bytes]]) -> Any:
    return spark.createDataFrame(rows, "path string, label string, content binary").repartition(3)


def plain(recipe: Recipe, x: torch.Tensor, truth: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """The same training in plain torch, every step on all rows, by Caffe's formulas (solvers/sgd_solver.cpp)."""
    solver, module = recipe.solver, copy.deepcopy(recipe.model.module).train()
    history = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for step in range(steps):
        module.zero_grad()
        nn.functional.cross_entropy(module(x), truth).backward()
        rate = solver.base_lr * ((1 + solver.gamma * step) ** -solver.power if solver.policy == "inv" else 1.0)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                lr_mult, decay_mult = recipe.multipliers.get(name, (1.0, 1.0))
                assert weight.grad is not None
                gradient = weight.grad + solver.weight_decay * decay_mult * weight
                history[name] = solver.momentum * history[name] + rate * lr_mult * gradient
                weight -= history[name]
    return module.state_dict()


def as_caffe_reads(rows: list[tuple[str, str, bytes]], mean: tuple[float, ...], scale: float) -> Any:
    """Rows as Caffe has them: planes, blue first, less the mean, scaled; and class numbers."""
    arrays = [np.asarray(Image.open(io.BytesIO(content)), np.float32) for _, _, content in rows]
    planes = np.stack([array[None] if array.ndim == 2 else array[:, :, ::-1].transpose(2, 0, 1) for array in arrays])
    x = (planes - np.asarray(mean, np.float32).reshape(-1, 1, 1)) * scale
    return torch.from_numpy(np.ascontiguousarray(x)), torch.tensor([CLASSES.index(label) for _, label, _ in rows])


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def steps_of(model: kd.Model) -> int:
    return sum(epoch["steps"] for epoch in model.history[-1]["epochs"])


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(not torch.allclose(one[name], other[name], rtol=1e-2) for name in one)


@pytest.mark.spark
@pytest.mark.parametrize("workers", [1, 2])
def test_every_step_is_that_of_a_plain_loop(spark: Any, tmp_path: Path, workers: int) -> None:
    """With a falling rate, momentum, decay, and factors on some of the weights."""
    recipe, rows = small(tmp_path), pictures(20, 6, 1)
    x, truth = as_caffe_reads(rows, (0.0,), 1 / 128)
    for steps in (1, 2, 12):
        trained = recipe.fit(frame(spark, rows), workers=workers, max_steps=steps, progress=False)
        close(trained.module.state_dict(), plain(recipe, x, truth, steps))
    assert moved(trained.module.state_dict(), recipe.model.module.state_dict())
    assert steps_of(trained) == 12


@pytest.mark.spark
def test_batches_added_up_for_one_iteration(spark: Any, tmp_path: Path) -> None:
    """iter_size: the gradients of two batches of 20."""
    recipe, rows = small(tmp_path, more="iter_size: 2 clip_gradients: 1000"), pictures(40, 6, 1)
    trained = recipe.fit(frame(spark, rows), workers=2, max_steps=3, progress=False)
    close(trained.module.state_dict(), plain(recipe, *as_caffe_reads(rows, (0.0,), 1 / 128), 3))


def transformed(pixels: np.ndarray, mean: np.ndarray, crop: int, top: int, left: int, mirror: bool) -> np.ndarray:
    """One picture by Caffe's data_transformer.cpp, with a mean file: the mean is read at the pixel's own place."""
    channels, _, _ = pixels.shape
    made = np.zeros((channels, crop, crop), np.float32)
    for c in range(channels):
        for h in range(crop):
            for w in range(crop):
                at = c, h, crop - 1 - w if mirror else w
                made[at] = (float(pixels[c, top + h, left + w]) - mean[c, top + h, left + w]) * (1 / 128)
    return made


@pytest.mark.spark
def test_crops_and_mirrors_as_caffe_draws_them(spark: Any, tmp_path: Path) -> None:
    """Of each row and epoch another place, the mean picture cut at the same; the middle in prediction."""
    from pyspark.sql import functions as F

    mean = np.random.default_rng(3).normal(120, 40, (3, 9, 9)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    transform = 'mirror: true crop_size: 6 mean_file: "db/mean.npy"'
    recipe = kd.caffe_recipe(written(tmp_path, mirror=transform), labels=CLASSES)
    assert not recipe.notes
    rows = pictures(20, 9, 3)
    df = frame(spark, rows)
    trained = recipe.fit(df, workers=2, max_steps=3, progress=False)
    places = {row[0]: row[1] for row in df.select("path", F.xxhash64("path")).collect()}
    hashes = np.array([places[path] for path, _, _ in rows], np.int64).view(np.uint64)
    whole, truth = as_caffe_reads(rows, (0.0,), 1.0)
    solver, module = recipe.solver, copy.deepcopy(recipe.model.module).train()
    module.get_submodule("data_mean").register_forward_hook(lambda _, inputs, out: inputs[0])  # is taken off below
    windows = set()
    history = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for step in range(3):
        draws = RowDraws(mix(hashes, 5, step + 1, 2, 0), mix)
        tops, lefts = (draws.at(1).uniform(number, 0, 4).astype(int).tolist() for number in (0, 1))
        mirrored = (draws.at(2).uniform(0) < 0.5).tolist()
        chosen = list(zip(tops, lefts, mirrored, strict=True))
        windows.update(chosen)
        x = np.stack([transformed(one.numpy(), mean, 6, *how) for one, how in zip(whole, chosen, strict=True)])
        module.zero_grad()
        nn.functional.cross_entropy(module(torch.from_numpy(x)), truth).backward()
        rate = solver.base_lr * (1 + solver.gamma * step) ** -solver.power
        with torch.no_grad():
            for name, weight in module.named_parameters():
                lr_mult, decay_mult = recipe.multipliers.get(name, (1.0, 1.0))
                assert weight.grad is not None
                gradient = weight.grad + solver.weight_decay * decay_mult * weight
                history[name] = solver.momentum * history[name] + rate * lr_mult * gradient
                weight -= history[name]
    assert len(windows) > 20  # of 32
    close(trained.module.state_dict(), module.state_dict())
    assert moved(*(dict(net.named_parameters()) for net in (trained.module, recipe.model.module)))
    # What was trained is tested on the middle, as Caffe's test phase cuts it: (9 - 6) / 2, rounded.
    middle = np.stack([transformed(one.numpy(), mean, 6, 2, 2, False) for one in whole])
    scores = module.eval()(torch.from_numpy(middle)).softmax(1).detach()
    found = trained.predict([content for _, _, content in rows])
    assert [one["prediction"] for one in found] == [CLASSES[place] for place in scores.argmax(1).tolist()]
    told = trained.history[-1]["augment"]["data"]
    assert [step["kind"] for step in told] == ["less_picture", "crop", "flip", "less_picture"]
    assert "numbers" not in told[0]


def test_pictures_of_a_database_whose_size_nothing_says(tmp_path: Path) -> None:
    solver = written(tmp_path, mirror="crop_size: 6 mean_value: 3")
    recipe = kd.caffe_recipe(solver, labels=CLASSES, image={"resize_to": 10})
    assert not recipe.notes
    assert recipe.augment == {"data": (RandomCrop(padding=0, spare=4),)}
    (note,) = kd.caffe_recipe(solver, labels=CLASSES).notes
    assert note == "the shorter side is scaled to 7 pixels, which the file does not say"


@pytest.mark.spark
@pytest.mark.needs_data
def test_cifar10_quick_from_its_own_solver(spark: Any, data_dir: Path) -> None:
    """Its photos are not at hand: on generated pictures, step by step."""
    solver = data_dir / "caffe_configs/bvlc_caffe/examples/cifar10/cifar10_quick_solver.prototxt"
    with pytest.raises(ConfigError, match="mean"):
        kd.caffe_recipe(solver, labels=CLASSES, input_shape=(3, 32, 32))
    mean = (110.0, 120.0, 130.0)
    recipe = kd.caffe_recipe(solver, labels=CLASSES, input_shape=(3, 32, 32), mean=mean, seed=1)
    assert (recipe.batch_size, recipe.solver.max_iterations, recipe.solver.weight_decay) == (100, 4000, 0.004)
    # Weights of that size learn nothing in so few steps: larger ones show every difference.
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in recipe.model.module.parameters():
            weight.normal_(0, 0.05)
    rows = pictures(100, 32, 3)
    x, truth = as_caffe_reads(rows, mean, 1.0)
    for steps in (1, 6):
        trained = recipe.fit(frame(spark, rows), workers=2, max_steps=steps, progress=False)
        close(trained.module.state_dict(), plain(recipe, x, truth, steps))


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.timeout(1200)
def test_lenet_from_its_own_solver(spark: Any, data_dir: Path, tmp_path: Path) -> None:
    """On the command line, on the real digits, as many iterations as the solver says."""
    folder = data_dir / "mnist"
    for name, part in (("train", "train"), ("test", "t10k")):
        digits = kd.read.idx(str(folder / f"{part}-images-idx3-ubyte.gz"), str(folder / f"{part}-labels-idx1-ubyte.gz"))
        digits.write.parquet(str(tmp_path / f"{name}.parquet"))
    solver = data_dir / "caffe_configs/bvlc_caffe/examples/mnist/lenet_solver.prototxt"
    words = ["fit", tmp_path / "train.parquet", "--solver", solver, "--input-shape", "1,28,28", "--out", tmp_path / "m"]
    result = CliRunner().invoke(cli.app, [str(word) for word in (*words, "--workers", "2")])
    assert result.exit_code == 0, result.output
    trained = kd.load(tmp_path / "m")
    assert steps_of(trained) == 10_000
    assert trained.evaluate(spark.read.parquet(str(tmp_path / "test.parquet"))).accuracy >= 0.99


def test_what_a_solver_becomes(tmp_path: Path) -> None:
    recipe = small(tmp_path, mirror="mirror: true", more="test_interval: 4 snapshot: 6")
    options = recipe.options(100, 2, validation="some rows")
    assert (options["batch_size"], options["accumulate"], options["epochs"], options["max_steps"]) == (10, 1, 3, 12)
    assert (options["seed"], options["validate_every_steps"], options["schedule_every"]) == (5, 4, "step")
    assert options["checkpoints"] == kd.Checkpoints(steps=6)
    assert options["augment"] == {"data": (kd.prepare.RandomFlip(),)}
    optimizer = options["optimizer"](list(recipe.model.module.named_parameters()))
    by_factors = {
        (g["lr_mult"], g["decay_mult"]): [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups
    }
    assert by_factors == {(1.0, 1.0): [(8, 36), (10, 8), (10,)], (2.0, 0.0): [(8,)]}
    schedule = options["schedule"](optimizer)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05 * 1.1**-0.75, 0.1 * 1.1**-0.75])
    averaging = recipe.options(100, 2, strategy=kd.ParameterAveraging(every=5))
    assert (averaging["batch_size"], averaging["epochs"]) == (20, 4)  # whole batches for each, as in SparkNet


def test_a_batch_is_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workers=3 cannot share the solver's batches of 20. Use a number that"):
        small(tmp_path).options(100, 3)
    assert small(tmp_path).options(100, 3, batch_size=7)["batch_size"] == 7


PAIRS = """
layer { name: "pair" type: "HDF5Data" top: "pair" top: "alike" hdf5_data_param { source: "list" batch_size: 20 } }
layer { name: "halves" type: "Slice" bottom: "pair" top: "one" top: "other" slice_param { axis: 1 slice_point: 3 } }
layer { name: "ip" type: "InnerProduct" bottom: "one" top: "ip" param { name: "w" } param { name: "b" }
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "ip_p" type: "InnerProduct" bottom: "other" top: "ip_p" param { name: "w" } param { name: "b" }
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "ContrastiveLoss" bottom: "ip" bottom: "ip_p" bottom: "alike" top: "loss"
        contrastive_loss_param { margin: 2 } }
"""
CODER = """
layer { name: "data" type: "HDF5Data" top: "data" hdf5_data_param { source: "list" batch_size: 20 } }
layer { name: "code" type: "InnerProduct" bottom: "data" top: "code"
        inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "same" type: "Power" bottom: "data" top: "same" }
layer { name: "back" type: "InnerProduct" bottom: "code" top: "back"
        inner_product_param { num_output: 6 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "back" bottom: "same" top: "loss" loss_weight: 3 }
"""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize("net", [PAIRS, CODER], ids=["pairs", "coder"])
def test_losses_of_several_outputs(spark: Any, tmp_path: Path, net: str) -> None:
    """Of pairs against one target, and of what is coded against what came in, without any: by Caffe's formulas."""
    solver = written(tmp_path)
    (tmp_path / "net.prototxt").write_text(net)
    recipe = kd.caffe_recipe(solver, input_shape=(6,))
    rng = np.random.default_rng(2)
    x, alike = rng.normal(size=(20, 6)).astype(np.float32), np.arange(20) % 2
    (column,) = recipe.model.preparation.columns(targets=False)
    rows = [(number, x[number].tolist(), int(alike[number])) for number in range(20)]
    df = spark.createDataFrame(rows, f"id int, {column} array<float>, label int")
    df = df if net == PAIRS else df.drop("label")
    trained = recipe.fit(df, workers=2, rows=20, max_steps=4, key="id", validation=df, progress=False)
    module, history = copy.deepcopy(recipe.model.module).train(), {}
    for step in range(4):
        module.zero_grad()
        a, b = module(torch.from_numpy(x))
        squares = (a - b).square().sum(1)
        loss = 3 * squares.sum() / 20 / 2
        if net == PAIRS:
            apart = (2 - squares.sqrt()).clamp(min=0).square()
            loss = torch.where(torch.from_numpy(alike) == 1, squares, apart).sum() / 20 / 2
        loss.backward()
        rate = 0.05 * (1 + 0.1 * step) ** -0.75
        with torch.no_grad():
            for name, weight in module.named_parameters():
                lr_mult, decay_mult = recipe.multipliers.get(name, (1.0, 1.0))
                assert weight.grad is not None
                gradient = weight.grad + 0.01 * decay_mult * weight
                history[name] = 0.9 * history.get(name, 0.0) + rate * lr_mult * gradient
                weight -= history[name]
    close(trained.module.state_dict(), module.state_dict())
    last = trained.history[-1]["epochs"][-1]
    assert last["validation"]["loss"] < trained.history[-1]["epochs"][0]["loss"]
    assert last["validation"].keys() == {"rows", "loss"}
    assert [step.kind for step in trained.preparation.targets] == (["value"] if net == PAIRS else [])


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("solver", "names", "target"),
    [
        ("siamese/mnist_siamese_solver", ("feat", "feat_p"), True),
        ("mnist/mnist_autoencoder_solver", ("decode1", "flatdata"), False),
    ],
)
def test_caffe_s_own_nets_with_losses_of_two_outputs(
    data_dir: Path, solver: str, names: tuple[str, ...], target: bool
) -> None:
    shape = (2, 28, 28) if target else (1, 28, 28)
    file = data_dir / f"caffe_configs/bvlc_caffe/examples/{solver}.prototxt"
    recipe = kd.caffe_recipe(file, input_shape=shape, labels=("0", "1") if target else None)
    (loss,) = recipe.losses.values()
    assert recipe.model.labels is None
    assert (loss.outputs, loss.target) == (names, target)


@pytest.mark.needs_data
def test_heads_beside_the_last_one(data_dir: Path) -> None:
    """GoogLeNet has two of them, which count 0.3 each."""
    folder = data_dir / "caffe_configs/bvlc_caffe/models/bvlc_googlenet"
    recipe = kd.caffe_recipe(folder / "quick_solver.prototxt")
    assert list(recipe.losses) == ["loss1_classifier", "loss2_classifier", "loss3_classifier"]
    assert sorted(recipe.loss_weights.values()) == [0.3, 0.3, 1.0]
    options = recipe.options(1000, 1, target="kind")
    assert set(options["target"].values()) == {"kind"}
    assert options["loss_weights"] == recipe.loss_weights
    assert recipe.notes == ("the shorter side is scaled to 256 pixels, which the file does not say",)
    assert recipe.augment == {"data": (RandomCrop(padding=0, spare=32), RandomFlip())}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"loss": ""}, "without a loss layer"),
        ({"loss": LOSS.replace('type: "Sof', 'loss_param { normalization: NONE } type: "Sof')}, "adds rows up"),
        ({"loss": LOSS + LOSS.replace('name: "loss"', 'name: "again"')}, "of one that has a loss already"),
        ({"loss": LOSS + 'layer { name: "s" type: "Power" bottom: "ip2" top: "s" loss_weight: 2 }'}, "adds rows up"),
        ({"more": 'weights: "gone.caffemodel"'}, "is named by the solver and not there"),
    ],
)
def test_what_cannot_be_trained_is_said(tmp_path: Path, texts: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(tmp_path, **texts)


def test_a_solver_without_an_end(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace("max_iter: 12", ""))
    with pytest.raises(ConfigError, match="max_iter"):
        kd.caffe_recipe(path, input_shape=(1, 6, 6))


@pytest.mark.spark
def test_on_the_command_line_what_is_given_counts(spark: Any, tmp_path: Path) -> None:
    frame(spark, pictures(40, 6, 1)).write.parquet(str(tmp_path / "rows.parquet"))
    solver = written(tmp_path)
    solver.write_text(solver.read_text().replace("random_seed: 5", ""))  # the run must find the same weights again
    rows = str(tmp_path / "rows.parquet")
    words = ["fit", rows, "--solver", str(solver), "--input-shape", "1,6,6", "--workers", "2"]
    run = str(tmp_path / "run")
    result = CliRunner().invoke(
        cli.app, [*words, "--out", str(tmp_path / "m"), "--max-steps", "3", "--lr", "0.5", "--run", run]
    )
    assert result.exit_code == 0, result.output
    assert steps_of(kd.load(tmp_path / "m")) == 3
    assert "base_lr=0.5" in kd.load(tmp_path / "m").history[-1]["optimizer"]
    result = CliRunner().invoke(cli.app, ["fit", "--resume", run, "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert steps_of(kd.load(tmp_path / "again")) == 3
    result = CliRunner().invoke(cli.app, [*words, "--model", "lenet", "--out", str(tmp_path / "n")])
    assert result.exit_code != 0
