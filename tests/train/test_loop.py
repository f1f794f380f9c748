"""The loop against plain torch written out, alone and with workers as threads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from train_loops import SGD, batches, clouds, hashes_of, net, same, train

from kindling.errors import ConfigError
from kindling.prepare import LabelStep, Preparation, RandomCrop, RandomFlip
from kindling.prepare.augment import RowDraws, augmented
from kindling.prepare.image import WideImageStep
from kindling.signature import Signature, TensorSpec
from kindling.train.loop import Loop
from kindling.train.order import mix
from kindling.train.policy import Checkpoints
from kindling.train.settings import EarlyStopping, LoopSettings
from kindling.train.strategies import AllReduce, ParameterAveraging
from kindling.train.strategies.parameter_groups import decay_groups, parameter_groups

Step = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def plain(
    columns: dict[str, np.ndarray],
    *,
    epochs: int = 2,
    batch: int = 8,
    module: nn.Module | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    schedule: Callable[..., Any] | None = None,
    every: str = "epoch",
    before_step: Step | None = None,
    after_step: Step | None = None,
    parts: int = 1,
    bf16: bool = False,
) -> nn.Module:
    """Plain torch training on the same rows in the same order."""
    module = module or net()
    optim = optimizer(module.parameters())
    scheduler = schedule(optim) if schedule else None
    x, y = torch.from_numpy(columns["x"]), torch.from_numpy(columns["target"])
    step = 0
    for epoch in batches(len(x), epochs, batch):
        for rows in epoch:
            step += 1
            optim.zero_grad()
            for part in np.array_split(rows, min(parts, len(rows))):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = nn.functional.cross_entropy(module(x[part]), y[part])
                (loss * (len(part) / len(rows))).backward()
            if before_step:
                before_step(module, optim, step)
            optim.step()
            if after_step:
                after_step(module, optim, step)
            if scheduler and every == "step":
                scheduler.step()
        if scheduler and every == "epoch":
            scheduler.step()
    return module


def test_clipping_is_torch_s() -> None:
    columns = clouds(50)

    def clip(module: nn.Module, _optim: Any, _step: int) -> None:
        nn.utils.clip_grad_value_(module.parameters(), 0.2)
        nn.utils.clip_grad_norm_(module.parameters(), 0.3)

    (trained,) = train(columns, clip_value=0.2, clip_norm=0.3)
    assert same(trained.state(), plain(columns, before_step=clip).state_dict())
    assert not same(trained.state(), plain(columns).state_dict())


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize(
    "schedule",
    [
        partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
        lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
    ],
    ids=["step", "lambda", "sequence"],
)
def test_schedules_move_as_torch_moves_them(every: str, schedule: Any) -> None:
    columns = clouds(50)
    (trained,) = train(columns, epochs=4, schedule_every=every, loop={"schedule": schedule})
    assert same(trained.state(), plain(columns, epochs=4, schedule=schedule, every=every).state_dict())


def test_a_schedule_over_the_whole_training_is_told_its_length() -> None:
    columns = clouds(50)  # 7 steps an epoch
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.5)
    (trained,) = train(columns, epochs=3, schedule_every="step", loop={"schedule": cycle})
    expected = plain(columns, epochs=3, schedule=partial(cycle, total_steps=21), every="step")
    assert same(trained.state(), expected.state_dict())


def test_a_plateau_lowers_the_rate() -> None:
    plateau = partial(lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.9)
    (trained,) = train(clouds(50), epochs=4, validation=clouds(30, 1), loop={"schedule": plateau})
    assert [record["lr"][0] for record in trained.history] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_warm_up_scales_the_rate_of_the_first_steps_and_leaves_the_schedule_alone() -> None:
    columns = clouds(50)
    schedule = partial(lr_scheduler.StepLR, step_size=3, gamma=0.5)
    full: list[float] = []

    def scale(_module: Any, optim: torch.optim.Optimizer, step: int) -> None:
        full.append(optim.param_groups[0]["lr"])
        optim.param_groups[0]["lr"] *= min(step / 5, 1)

    def back(_module: Any, optim: torch.optim.Optimizer, _step: int) -> None:
        optim.param_groups[0]["lr"] = full[-1]

    (trained,) = train(columns, warmup_steps=5, schedule_every="step", loop={"schedule": schedule})
    expected = plain(columns, schedule=schedule, every="step", before_step=scale, after_step=back)
    assert same(trained.state(), expected.state_dict())


def test_accumulation_is_the_gradient_of_the_whole_step() -> None:
    columns = clouds(50)
    (trained,) = train(columns, batch_size=4, accumulate=3)
    assert same(trained.state(), plain(columns, batch=12, parts=3).state_dict())
    for name, value in plain(columns, batch=12).state_dict().items():
        torch.testing.assert_close(trained.state()[name], value, rtol=1e-4, atol=1e-6)
    assert trained.history[0]["steps"] == math.ceil(50 / 12)


def test_bf16_is_torch_s_autocast() -> None:
    columns = clouds(50)
    (trained,) = train(columns, precision="bf16")
    assert same(trained.state(), plain(columns, bf16=True).state_dict())
    assert not same(trained.state(), plain(columns).state_dict())
    assert all(value.dtype == torch.float32 for value in trained.state().values())


def test_the_running_average_is_torch_s_and_is_what_is_validated_and_returned() -> None:
    columns, held = clouds(50), clouds(30, 1)
    averaged: list[Any] = []

    def follow(module: nn.Module, _optim: Any, _step: int) -> None:
        if not averaged:
            averaged.append(
                torch.optim.swa_utils.AveragedModel(
                    module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
                )
            )
        averaged[0].update_parameters(module)

    plain(columns, after_step=follow)
    (trained,) = train(columns, validation=held, ema_decay=0.9)
    expected = averaged[0].module
    assert same(trained.state(), expected.state_dict())
    scores = expected(torch.from_numpy(held["x"]))
    loss = nn.functional.cross_entropy(scores, torch.from_numpy(held["target"]))
    assert trained.history[-1]["validation"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("strategy", [AllReduce(), ParameterAveraging(every=3)], ids=["allreduce", "averaging"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_of_it_together_goes_on_from_any_step_bit_for_bit(strategy: Any, world: int) -> None:
    """Every state the loop can be left in leads to the same end, figures included."""
    options: dict[str, Any] = {
        "world": world,
        "strategy": strategy,
        "module": net(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)),  # threads share a generator
        "validation": clouds(40, 1),
        "epochs": 4,
        "batch_size": 6,
        "accumulate": 2,
        "clip_norm": 0.5,
        "schedule_every": "step",
        "warmup_steps": 4,
        "ema_decay": 0.8,
        "validate_every_steps": 3,
        "early_stopping": EarlyStopping(patience=50),
        "loop": {"schedule": partial(lr_scheduler.OneCycleLR, max_lr=0.3)},
    }
    columns = clouds(70)
    whole = train(columns, **options)
    assert all(same(whole[0].state(), other.state()) for other in whole)
    for at in whole[0].notes.states:
        again = train(columns, **options, restored=[one.notes.states[at] for one in whole])
        for one, other in zip(whole, again, strict=True):
            assert same(one.state(), other.state()), at
            for before, after in zip(one.history, other.history, strict=True):
                for figure in ("loss", "validation", "validations", "rows", "steps", "lr"):
                    assert before[figure] == after[figure], (at, figure)


def test_a_state_from_the_middle_of_an_epoch_leads_to_the_same_end() -> None:
    """States taken after every step, not only where checkpoints are due."""
    columns = clouds(40)
    taken: dict[int, Any] = {}

    class Watched(Loop):
        def _reason_to_stop(self) -> str:
            taken[self._step] = copy.deepcopy(self.state())
            return super()._reason_to_stop()

    options: dict[str, Any] = {"epochs": 3, "ema_decay": 0.9, "module": net(nn.Dropout(0.3))}
    (whole,) = train(columns, **options, kind=Watched)
    assert sorted(taken) == list(range(1, 16))
    for step in (1, 4, 5, 7, 13, 15):
        (again,) = train(columns, **options, restored=[taken[step]])
        assert same(whole.state(), again.state()), step
        assert [r["loss"] for r in again.history] == [r["loss"] for r in whole.history], step


@pytest.mark.parametrize("world", [1, 2, 3])
def test_early_stopping_ends_when_progress_ceases_and_gives_back_the_best(world: int) -> None:
    """The rate is absurd: the loss soon grows."""
    options: dict[str, Any] = {"world": world, "validation": clouds(40, 1), "epochs": 30, "optimizer": SGD}
    worse = partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1.0 if epoch < 3 else 60.0)
    columns = clouds(60)
    runs = train(columns, **options, early_stopping=EarlyStopping(patience=2), loop={"schedule": worse})
    losses = [record["validation"]["loss"] for record in runs[0].history]
    best = int(np.argmin(losses))
    assert len(losses) < 30
    assert runs[0].history[-1]["stopped"] == "early_stopping"
    assert len(losses) == best + 3
    until_best = train(columns, **{**options, "epochs": best + 1}, loop={"schedule": worse})
    for one, other in zip(runs, until_best, strict=True):
        assert same(one.state(), other.state())
    last = train(
        columns, **options, early_stopping=EarlyStopping(patience=2, restore_best=False), loop={"schedule": worse}
    )
    assert len(last[0].history) == len(losses)
    assert not same(last[0].state(), runs[0].state())


def test_early_stopping_without_validation_watches_the_training_loss() -> None:
    (trained,) = train(clouds(50), epochs=20, early_stopping=EarlyStopping(patience=1, min_delta=100.0))
    assert [record.get("stopped") for record in trained.history] == [None, "early_stopping"]


def test_a_figure_that_is_not_measured_cannot_be_watched() -> None:
    with pytest.raises(ConfigError, match=r"metric='acuracy' is no figure of this training. Did you mean 'accuracy'"):
        train(clouds(50), validation=clouds(20, 1), early_stopping=EarlyStopping(metric="acuracy"))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("strategy", [AllReduce(), ParameterAveraging(every=4)], ids=["allreduce", "averaging"])
def test_a_limit_of_steps_ends_in_the_middle_of_an_epoch(world: int, strategy: Any) -> None:
    columns = clouds(100)
    runs = train(columns, world=world, strategy=strategy, max_steps=6, epochs=10, batch_size=24 // world)
    assert [record["steps"] for record in runs[0].history] == [5, 1]
    assert [record["rows"] for record in runs[0].history] == [100, 24]
    assert runs[0].history[-1]["stopped"] == "max_steps"
    assert max(runs[0].notes.states) == 6
    for other in runs:
        assert same(runs[0].state(), other.state())
    again = train(
        columns,
        world=world,
        strategy=strategy,
        max_steps=6,
        epochs=10,
        batch_size=24 // world,
        restored=[one.notes.states[6] for one in runs],
    )
    assert len(again[0].history) == 2  # a training that has ended does not go on
    assert same(again[0].state(), runs[0].state())


@pytest.mark.parametrize("world", [1, 3])
def test_a_limit_of_time_ends_all_workers_at_one_step(world: int) -> None:
    runs = train(clouds(60), world=world, epochs=100_000, max_seconds=0.3, checkpoints=Checkpoints(epochs=None))
    ends = [(len(one.history), one.history[-1]["steps"], one.history[-1]["stopped"]) for one in runs]
    assert set(ends) == {ends[0]}
    assert ends[0][2] == "max_seconds"
    for other in runs:
        assert same(runs[0].state(), other.state())


@pytest.mark.parametrize("world", [1, 2])
def test_who_asks_for_an_end_gets_it(world: int) -> None:
    runs = train(clouds(64), world=world, epochs=100_000, stop_at=1, checkpoints=Checkpoints(epochs=None))
    assert {one.history[-1]["stopped"] for one in runs} == {"asked"}
    assert len({(len(one.history), one.history[-1]["steps"]) for one in runs}) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_who_asks_in_an_epoch_is_heard_at_its_end(world: int) -> None:
    """Without that, quick steps go by until the next question, a second later."""
    runs = train(
        clouds(40 * world), world=world, epochs=100_000, stop_at=69, checkpoints=Checkpoints(epochs=None)
    )  # 5 steps an epoch
    assert {one.history[-1]["stopped"] for one in runs} == {"asked"}
    assert {5 * (len(one.history) - 1) + one.history[-1]["steps"] for one in runs} <= {69, 70}


def test_validation_every_few_epochs_and_steps() -> None:
    (trained,) = train(
        clouds(40), validation=clouds(20, 1), epochs=5, validate_every=2, validate_every_steps=3
    )  # 5 steps an epoch
    assert trained.notes.steps("validation") == [3, 6, 9, 10, 12, 18, 20, 21, 24, 25]
    assert ["validation" in record for record in trained.history] == [False, True, False, True, True]
    (alone,) = train(clouds(40), epochs=5)
    assert same(alone.state(), trained.state())  # to measure changes nothing


def test_mid_epoch_validation_of_averaging_workers_is_of_their_mean() -> None:
    columns, held = clouds(48), clouds(30, 1)
    averaging = ParameterAveraging(every=100)
    runs = train(columns, world=2, strategy=averaging, validation=held, epochs=1, validate_every_steps=2)
    early = train(columns, world=2, strategy=averaging, validation=held, epochs=1, max_steps=2)  # averages there
    first = runs[0].history[0]["validations"][0]
    assert first["step"] == 2
    assert first["loss"] == pytest.approx(early[0].history[0]["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("accumulate", 0, "is no count"),
        ("clip_norm", -1.0, "leaves nothing of a gradient"),
        ("clip_value", "much", "leaves nothing of a gradient"),
        ("precision", "fp16", "is none to train in"),
        ("schedule_every", "batch", "is no time to move on"),
        ("warmup_steps", -1, "is no count"),
        ("ema_decay", 1.0, "is no share of the past"),
        ("max_steps", 0, "is no count"),
        ("max_seconds", 0, "leaves no time to train"),
        ("validate_every_steps", 1.5, "is no count"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoopSettings(**{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("patience", 0), ("min_delta", -1), ("mode", "up")])
def test_early_stopping_that_cannot_work_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        EarlyStopping(**{setting: value})


@pytest.mark.parametrize("schedule", [lambda o: o, lambda o: lr_scheduler.StepLR(o)], ids=["thing", "argument"])
def test_what_is_no_schedule_is_refused(schedule: Any) -> None:
    with pytest.raises(ConfigError, match="Give a function of the optimizer"):
        train(clouds(20), loop={"schedule": schedule})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 4])
def test_images_are_changed_by_row_and_epoch_and_only_in_training(world: int, spare: int) -> None:
    """The net writes down what it is shown: it is what `augmented` says of each row, and the plain image in between."""
    images = np.random.default_rng(0).integers(0, 256, (30, 6 + spare, 6 + spare, 1), np.uint8)
    steps = (RandomCrop(0 if spare else 1, spare=spare), RandomFlip())
    step = WideImageStep("x", size=(6, 6), channels="L", resize_to=6 + spare, spare=spare)
    seen: list[tuple[bool, bytes]] = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pixels = x.detach().permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
            seen.extend((self.training, one.tobytes()) for one in pixels)
            return x.flatten(1)

    columns = {"x": images, "target": clouds(30)["target"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(Watch(), nn.Linear(36, 3))
    options: dict[str, Any] = {
        "module": module,
        "epochs": 2,
        "seed": 5,
        "optimizer": partial(torch.optim.SGD, lr=1e-4),
        "validation": columns,
        "batch_size": 12 // world,
        "loop": {
            "signature": Signature({"x": TensorSpec(("N", 1, 6, 6))}, {"y": TensorSpec(("N", 3))}),
            "preparation": Preparation(
                (step,),
                (LabelStep("target", "label", ("0", "1", "2")),),
            ),
            "augment": {"x": steps},
        },
    }
    runs = train(columns, world=world, **options)
    keys = [mix(hashes_of(30), 5, epoch, 2, 0) for epoch in (1, 2)]
    expected = [image.tobytes() for k in keys for image in augmented(steps, images, RowDraws(k, mix), "L")]
    assert sorted(pixels for training, pixels in seen if training) == sorted(expected)
    middles = images[:, spare // 2 : spare // 2 + 6, spare // 2 : spare // 2 + 6]
    assert sorted(pixels for training, pixels in seen if not training) == sorted([i.tobytes() for i in middles] * 2)
    (alone,) = train(columns, **{**options, "batch_size": 12})
    for name, value in runs[0].state().items():
        torch.testing.assert_close(value, alone.state()[name], rtol=1e-4, atol=1e-5)


def test_settings_by_parameter_are_torch_s_groups() -> None:
    columns = clouds(50)
    adam = partial(torch.optim.AdamW, lr=0.02, fused=False)

    def groups(module_parameters: Any) -> torch.optim.Optimizer:
        first, bias, last, other = list(module_parameters)
        return adam([{"params": [first, last], "weight_decay": 0.5}, {"params": [bias, other], "weight_decay": 0.0}])

    (trained,) = train(columns, optimizer=decay_groups(adam, 0.5))
    assert same(trained.state(), plain(columns, optimizer=groups).state_dict())
    (slow,) = train(columns, optimizer=parameter_groups(adam, {"0.*": {"lr": 0.0, "weight_decay": 0.0}}))
    assert torch.equal(slow.state()["0.weight"], net().state_dict()["0.weight"])
    assert not torch.equal(slow.state()["2.weight"], net().state_dict()["2.weight"])
    with pytest.raises(ConfigError, match=r"'trunk\.\*' fits no parameter"):
        train(columns, optimizer=parameter_groups(adam, {"trunk.*": {"lr": 0.0}}))
