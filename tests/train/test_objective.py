"""Losses that add up however rows are spread: class weights, row weights, several outputs, many labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from train_loops import CLASSES, SGD, batches, clouds, net, same, train

from kindling.errors import ConfigError, TrainingError
from kindling.prepare import ArrayStep, LabelStep, ManyLabelsStep, Preparation, RowWeightStep, ValueStep
from kindling.signature import Signature, TensorSpec
from kindling.train.figures import Figures, check_metrics
from kindling.train.objective import Objective, OutputsLoss, Term
from kindling.train.strategies import Comms, InProcessComms, ParameterAveraging, SoloComms

INPUT = ArrayStep("x", "x", (4,))
LABEL = LabelStep("target", "label", tuple(str(c) for c in range(CLASSES)))
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.25])


def whole_batch(loss: Any, columns: dict[str, np.ndarray], batch: int, module: nn.Module) -> nn.Module:
    """Plain torch on whole global batches; `loss` of (module, rows)."""
    optim = SGD(module.parameters())
    for epoch in batches(len(columns["x"]), 2, batch):
        for rows in epoch:
            optim.zero_grad()
            loss(module, rows).backward()
            optim.step()
    return module


def close(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 1)])
def test_class_weights_are_those_of_the_whole_batch_however_it_is_cut(world: int, accumulate: int) -> None:
    columns = clouds(70)
    x, y = torch.from_numpy(columns["x"]), torch.from_numpy(columns["target"])
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1)
    expected = whole_batch(lambda module, rows: loss(module(x[rows]), y[rows]), columns, 24, net())
    for one in train(columns, world=world, batch_size=24 // world // accumulate, accumulate=accumulate, loss=loss):
        close(one.module, expected)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 2), (3, 1)])
def test_a_row_of_weight_two_is_as_good_as_the_row_twice(world: int, accumulate: int) -> None:
    columns = clouds(60)
    counts = np.random.default_rng(0).integers(0, 3, 60)
    columns["row weight"] = counts.astype(np.float32)
    x, y = torch.from_numpy(columns["x"]), torch.from_numpy(columns["target"])

    def repeated(module: nn.Module, rows: np.ndarray) -> torch.Tensor:
        again = np.repeat(rows, counts[rows])
        return functional.cross_entropy(module(x[again]), y[again])

    expected = whole_batch(repeated, columns, 12, net())
    objective = Objective((Term("y", "target", nn.CrossEntropyLoss()),), "row weight")
    preparation = Preparation((INPUT,), (LABEL, RowWeightStep("row weight", "w")))
    runs = train(
        columns,
        world=world,
        batch_size=12 // world // accumulate,
        accumulate=accumulate,
        loss=objective,  # type: ignore[arg-type]
        loop={"preparation": preparation},
    )
    for one in runs:
        close(one.module, expected)


def test_rows_that_all_weigh_nothing_teach_nothing() -> None:
    columns = clouds(40) | {"row weight": np.zeros(40, np.float32)}
    objective = Objective((Term("y", "target", nn.CrossEntropyLoss()),), "row weight")
    preparation = Preparation((INPUT,), (LABEL, RowWeightStep("row weight", "w")))
    for world in (1, 2):
        for one in train(columns, world=world, loss=objective, loop={"preparation": preparation}):  # type: ignore[arg-type]
            assert same(one.state(), net().state_dict())
            assert one.history[-1]["loss"] == 0.0


class Two(nn.Module):
    """Two heads over one trunk."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk, self.kind, self.price = nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.trunk(x))
        return {"kind": self.kind(x), "price": self.price(x)}


TWO = Signature({"x": TensorSpec(("N", 4))}, {"kind": TensorSpec(("N", CLASSES)), "price": TensorSpec(("N", 1))})
BOTH = Preparation((INPUT,), (LabelStep("target kind", "label", LABEL.labels), ValueStep("target price", "price", ())))


def priced(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    columns = clouds(rows, seed)
    return {
        "x": columns["x"],
        "target kind": columns["target"],
        "target price": (columns["x"] @ np.array([1.0, -1.0, 2.0, 0.5])).astype(np.float32),
    }


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_several_outputs_learn_together(world: int, accumulate: int) -> None:
    columns, held = priced(70), priced(30, 1)
    x, kind, price = (torch.from_numpy(columns[name]) for name in ("x", "target kind", "target price"))
    weights = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)

    def loss(module: nn.Module, rows: np.ndarray) -> torch.Tensor:
        out = module(x[rows])
        return weights(out["kind"], kind[rows]) + 0.1 * functional.mse_loss(out["price"][:, 0], price[rows])

    expected = whole_batch(loss, columns, 12, Two())
    objective = Objective((Term("kind", "target kind", weights), Term("price", "target price", nn.MSELoss(), 0.1)))
    runs = train(
        columns,
        module=Two(),
        world=world,
        batch_size=12 // world // accumulate,
        accumulate=accumulate,
        loss=objective,  # type: ignore[arg-type]
        validation=held,
        loop={"signature": TWO, "preparation": BOTH},
    )
    for one in runs:
        close(one.module, expected)
        assert one.history == [{**record, **_times(record)} for record in one.history]
    figures = runs[0].history[-1]["validation"]
    out = runs[0].module(torch.from_numpy(held["x"]))
    truth = torch.from_numpy(held["target kind"])
    assert figures["accuracy"] == pytest.approx((out["kind"].argmax(1) == truth).float().mean().item())
    error = (out["price"][:, 0] - torch.from_numpy(held["target price"])).abs().mean().item()
    assert figures["price.mean_absolute_error"] == pytest.approx(error, rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["kind.loss"] + 0.1 * figures["price.loss"])


def _times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("seconds", "rows_per_s")}


def test_many_labels() -> None:
    """Three labels in any combination, by the signs of three numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    columns = {"x": x, "target": (x[:, :3] > 0).astype(np.uint8)}
    preparation = Preparation((INPUT,), (ManyLabelsStep("target", "tags", ("a", "b", "c")),))
    runs = train(
        columns,
        module=net(nn.ReLU()),
        world=2,
        epochs=15,
        loss=nn.BCEWithLogitsLoss(),
        validation={name: column[:80] for name, column in columns.items()},
        loop={"preparation": preparation, "classes": None},
    )
    figures = runs[0].history[-1]["validation"]
    said = (runs[0].module(torch.from_numpy(x[:80])) > 0).numpy()
    true = columns["target"][:80] > 0
    assert figures["accuracy"] == (said == true).all(1).mean()
    assert figures["label_accuracy"] == pytest.approx((said == true).mean())
    f1 = pytest.importorskip("sklearn.metrics").f1_score
    assert figures["f1"] == pytest.approx(f1(true, said, average="macro"))
    assert figures["micro_f1"] == pytest.approx(f1(true, said, average="micro"))
    assert figures["label_accuracy"] > 0.9


def distance(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) - targets).abs().double()


class Largest:
    """A metric with a state that is no sum, in the form that torchmetrics has."""

    def __init__(self) -> None:
        self.value = torch.tensor(-torch.inf)

    def update(self, outputs: torch.Tensor, _targets: torch.Tensor) -> None:
        self.value = torch.maximum(self.value, outputs.max())

    def merge_state(self, other: Any) -> None:
        self.value = torch.maximum(self.value, other.value)

    def compute(self) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_of_the_user_are_of_all_rows(world: int) -> None:
    held = clouds(50, 1)
    metrics = {"distance": distance, "largest": Largest()}
    runs = train(
        clouds(40), world=world, validation=held, loop={"metrics": metrics}, strategy=ParameterAveraging(every=3)
    )
    out = runs[0].module.eval()(torch.from_numpy(held["x"])).detach()
    expected = distance(out, torch.from_numpy(held["target"])).mean().item()
    for one in runs:
        figures = one.history[-1]["validation"]
        assert figures["distance"] == pytest.approx(expected)
        assert figures["largest"] == pytest.approx(out.max().item(), rel=1e-6)


def test_a_metric_that_gives_no_number_for_each_row_is_named() -> None:
    with pytest.raises(TrainingError, match=r"the metric 'mean' gave \(\) for 20 rows"):
        train(clouds(20), validation=clouds(20, 1), loop={"metrics": {"mean": lambda o, t: o.mean()}})


@pytest.mark.parametrize(("metrics", "words"), [({"a": 3}, "is neither a function"), ({"loss": distance}, "anyway")])
def test_metrics_that_cannot_be_are_refused(metrics: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_metrics(metrics)


def test_figures_do_not_depend_on_how_rows_are_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = {"y": torch.randn(60, CLASSES, generator=generator)}
    targets = torch.randint(0, CLASSES, (60,), generator=generator)
    objective = Objective((Term("y", "target", nn.CrossEntropyLoss()),))

    def measured(comms: Comms) -> dict[str, Any]:
        figures = Figures(objective, (LABEL,), CLASSES, {"distance": distance})
        for start in range(comms.rank * 7, 60, comms.world * 7):
            part = slice(start, start + 7)
            figures.update({"y": outputs["y"][part]}, {"target": targets[part]})
        return figures.merged(comms)

    alone = measured(SoloComms())
    for world in (2, 3, 4):
        for figures in InProcessComms.run(world, measured):
            assert figures == alone


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_a_loss_of_several_outputs_is_the_mean_of_its_rows(target: bool, weighed: bool) -> None:
    def gap(a: torch.Tensor, b: torch.Tensor, *truth: torch.Tensor) -> torch.Tensor:
        return ((a - b).square().sum(1) * (truth[0] if truth else 1)).mean()

    rng = torch.Generator().manual_seed(0)
    outputs = {name: torch.randn(5, 3, generator=rng, requires_grad=True) for name in ("a", "b")}
    batch = {"truth": torch.rand(5, generator=rng), "row weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])}
    term = Term("b", "truth", OutputsLoss(gap, ("a", "b"), target), 2.0)
    objective = Objective((term,), "row weight" if weighed else None)
    rows = (outputs["a"] - outputs["b"]).square().sum(1) * (batch["truth"] if target else 1)
    torch.testing.assert_close(objective.rows(outputs, batch)[0].float(), rows.detach())
    expected = (rows * batch["row weight"]).sum() / 5 if weighed else rows.mean()
    torch.testing.assert_close(objective._mean(term, outputs, batch), expected)
    assert objective.masses(batch, 5).tolist() == [5.0]
    figures = Figures(objective, (ValueStep("truth", "truth"),), None, {})
    figures.update(outputs, batch)
    found = figures.merged(SoloComms())
    assert found.keys() == {"rows", "loss"}
    assert found["loss"] == pytest.approx(2 * float(rows.detach().mean()), rel=1e-6)
