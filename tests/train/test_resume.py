"""Trainings that are broken off at any step and picked up again, from real files, with as many workers or others."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_loops import clouds, net, same, train

from kindling.errors import ConfigError
from kindling.storage import open_place
from kindling.train import checkpoint
from kindling.train.feed import Slice
from kindling.train.loop import Loop
from kindling.train.policy import Checkpoints
from kindling.train.restore import RNG, Circumstances, generators, restore, set_generators
from kindling.train.settings import EarlyStopping
from kindling.train.strategies import STRATEGIES, AllReduce, ParameterAveraging
from kindling.train.writer import LocalBoard, Writer

ROWS, GLOBAL_BATCH = 100, 24  # 5 steps an epoch
STEPS = -(-ROWS // GLOBAL_BATCH)
COLUMNS = clouds(ROWS)


class Broken(Exception):
    """The end of an attempt."""


class Run:
    """Attempts at one training that leave each other checkpoints in a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.place, self.options = open_place(folder), {"checkpoints": Checkpoints(steps=2), **options}
        self.attempts = 0
        self.said: list[str] = []
        self.seen: dict[int, list[int]] = {}
        """The rows of each step, of the last time that it was taken."""
        self.resumed: list[dict[str, Any]] = []
        self.data = {"training data": {"rows": ROWS, "content": "0"}}
        self.anyway = False

    def attempt(self, world: int, *, break_at: int | None = None, **options: Any) -> Any:
        """Train with so many workers, to the end or until after a step."""
        run, board, number = self, LocalBoard(), self.attempts
        self.attempts += 1

        class Kept(Loop):
            def run(self, restored: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
                fits = Circumstances(
                    run="digits",
                    strategy=self.strategy,
                    statistics=bool(self.replica.statistics()),
                    global_batch=GLOBAL_BATCH,
                    data=run.data,
                    anyway=run.anyway,
                )
                start = restore(run.place, self.comms, fits, run.said.append)
                rank, at = self.comms.rank, self.comms.world
                policy = self.settings.checkpoints
                self.writer = Writer(run.place, board, policy, rank=rank, world=at, attempt=number)
                about = {"global_batch": GLOBAL_BATCH, "data": run.data, "resumed": start.resumed}
                self.hooks = Hooks(self.hooks, self.writer, about)
                if rank == 0:
                    run.resumed = start.resumed
                    first = start.state["progress"] if start.state else {"epoch": 1, "index": 0}
                    done = (first["epoch"] - 1) * STEPS + first["index"]
                    run.seen = {step: rows for step, rows in run.seen.items() if step <= done}
                self.comms.meet()
                try:
                    history = super().run(start.state)
                    self.writer.wait()
                    return history
                finally:
                    self.writer.stop()

            def _train_step(self, slices: Iterator[Slice], *rest: Any) -> float:
                def noted() -> Iterator[Slice]:
                    rows = next(slices)
                    run.seen.setdefault(self._step + 1, []).extend(rows.hashes.tolist())
                    yield rows

                value = super()._train_step(noted(), *rest)
                if self._step + 1 == break_at:
                    self.writer.wait()
                    self.comms.meet()
                    raise Broken
                return value

        settings = {"batch_size": GLOBAL_BATCH // world, "epochs": 3, **self.options, **options}
        more = {"global_batch": GLOBAL_BATCH, **settings.pop("loop", {})}
        return train(COLUMNS, world=world, kind=Kept, loop=more, **settings)

    def broken(self, world: int, at: int, **options: Any) -> None:
        with pytest.raises(Broken):
            self.attempt(world, break_at=at, **options)


class Hooks:
    """The notes of `train_loops`, and checkpoints on disk."""

    def __init__(self, notes: Any, writer: Writer, about: dict[str, Any]) -> None:
        self.notes, self.writer, self.about = notes, writer, about
        self.on_event, self.stop_asked = notes.on_event, notes.stop_asked

    def busy(self) -> bool:
        return False

    def on_checkpoint(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.notes.on_checkpoint(step, {}, about)
        self.writer.wait()  # so that a test knows what there is
        self.writer.take(step, {**state, RNG: generators()}, {**self.about, **about})


def _rows_of(world: int) -> dict[int, list[int]]:
    """The rows of each step, of the definition of the order alone."""
    from train_loops import batches, hashes_of

    found = [batch for epoch in batches(ROWS, 3, GLOBAL_BATCH) for batch in epoch]
    return {step: sorted(hashes_of(ROWS)[rows].tolist()) for step, rows in enumerate(found, 1)}


def _figures(history: list[dict[str, Any]]) -> list[Any]:
    return [(record["loss"], record["rows"], record["steps"], record.get("validation")) for record in history]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_broken_off_anywhere_and_picked_up_it_ends_bit_for_bit_the_same(tmp_path: Path, name: str, world: int) -> None:
    strategy = STRATEGIES[name]()
    if not strategy.deterministic and world > 1:
        pytest.skip("no two runs of it are alike")
    options: dict[str, Any] = {
        "strategy": strategy,
        "module": net(nn.BatchNorm1d(8), nn.ReLU()),
        "validation": clouds(30, 1),
        "ema_decay": 0.9,
    }
    whole = Run(tmp_path / "whole", **options).attempt(world)
    run = Run(tmp_path / "broken", **options)
    chosen = random.Random(f"{name}-{world}")
    first = chosen.randrange(3, 2 * STEPS)
    stops = [first, chosen.randrange(first + 3, 3 * STEPS)]
    for at in stops:
        run.broken(world, at)
    again = run.attempt(world)
    for one, other in zip(whole, again, strict=True):
        assert same(one.state(), other.state()), stops
        assert _figures(one.history) == _figures(other.history), stops
    assert len(run.resumed) == 2
    # Not from the beginning: from what was taken last before the end, after every second step and each epoch.
    for at, resumed in zip(stops, run.resumed, strict=True):
        assert resumed["step"] == max(step for step in range(at) if step % 2 == 0 or step % STEPS == 0)
    assert {step: sorted(rows) for step, rows in run.seen.items()} == _rows_of(world)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_loses_a_row_when_workers_go_and_come(tmp_path: Path, name: str) -> None:
    strategy = STRATEGIES[name]()
    run = Run(tmp_path, strategy=strategy)
    run.broken(4, 4)
    run.broken(2, 8)
    run.broken(1, 11)
    run.attempt(3)
    assert {step: sorted(rows) for step, rows in run.seen.items()} == _rows_of(4)
    worlds = [(resumed["workers_before"], resumed["workers"]) for resumed in run.resumed]
    assert worlds == [(4, 2), (2, 1), (1, 3)]
    said = [resumed["differs"] for resumed in run.resumed]
    assert all(("is another algorithm" in text) == (not strategy.elastic) for text in said)
    assert len(run.said) == (0 if strategy.elastic else 3)


@pytest.mark.parametrize("workers", [(4, 2, 1), (2, 3, 2), (1, 4, 2)])
def test_other_workers_compute_the_same_where_gradients_are_summed(tmp_path: Path, workers: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9, "validation": clouds(30, 1)}
    first, second, third = workers
    whole = Run(tmp_path / "whole", **options).attempt(first)
    run = Run(tmp_path / "broken", **options)
    run.broken(first, 4)
    run.broken(second, 9)
    again = run.attempt(third)
    for name, value in whole[0].state().items():
        torch.testing.assert_close(again[0].state()[name], value, rtol=1e-5, atol=1e-6)
    for before, after in zip(whole[0].history, again[0].history, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert after["validation"]["loss"] == pytest.approx(before["validation"]["loss"], rel=1e-5)
    assert run.said == []


def test_it_is_said_that_batch_statistics_will_differ(tmp_path: Path) -> None:
    run = Run(tmp_path, module=net(nn.BatchNorm1d(8), nn.ReLU()))
    run.broken(3, 4)
    run.attempt(2)
    assert len(run.said) == 1
    assert re.search("batch statistics are taken over 2 parts of a step instead of 3", run.said[0])


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_by_all_and_it_is_said(tmp_path: Path, damage: str) -> None:
    """Only one worker can see the damage in its own part: the others follow it."""
    options: dict[str, Any] = {"strategy": ParameterAveraging(every=3)}
    whole = Run(tmp_path / "whole", **options).attempt(2)
    run = Run(tmp_path / "broken", **options)
    run.broken(2, 7)
    assert checkpoint.steps_on_disk(run.place) == [6, 5]
    name = "manifest.json" if damage == "manifest" else "000-rank-0001.safetensors"
    file = tmp_path / "broken" / checkpoint.folder(6) / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[-9] ^= 4
    file.write_bytes(data)
    again = run.attempt(2)
    assert run.resumed[0]["step"] == 5
    assert any("checkpoint" in text and "The one before it is used." in text for text in run.said)
    assert same(whole[0].state(), again[0].state())


def test_changed_data_are_refused_with_a_list_or_gone_on_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.broken(2, 9)
    run.data = {"training data": {"rows": ROWS + 1, "content": "1"}, "validation data": {"rows": 4, "content": "2"}}
    with pytest.raises(ConfigError) as caught:
        run.attempt(2)
    for words in (
        "run='digits' holds a run that was asked for otherwise",
        "the training data: 100 rows before, 101 rows now",
        "the validation data: none before, 4 rows now",
        "resume='anyway'",
    ):
        assert words in str(caught.value)
    run.anyway = True
    run.attempt(2)
    assert "epoch 2 begins anew" in run.said[-1]
    assert "100 rows before, 101 rows now" in run.said[-1]
    assert run.resumed[-1]["index"] == 0


@pytest.mark.parametrize("world", [1, 2])
def test_more_epochs_and_later_limits_are_what_one_long_run_would_have_been(tmp_path: Path, world: int) -> None:
    whole = Run(tmp_path / "whole").attempt(world)
    run = Run(tmp_path / "longer")
    run.attempt(world, epochs=2)
    longer = run.attempt(world, epochs=3)
    assert same(whole[0].state(), longer[0].state())
    for strategy in (AllReduce(), ParameterAveraging(every=4)):
        kind = type(strategy).__name__
        whole = Run(tmp_path / f"whole-{kind}", strategy=strategy).attempt(world)
        run = Run(tmp_path / f"limits-{kind}", strategy=strategy)
        for limit in (STEPS, STEPS + 2, STEPS + 2, 2 * STEPS, None):  # at an epoch's end, in its middle, twice the same
            ended = run.attempt(world, max_steps=limit)
            assert ended[0].history[-1].get("stopped") == (limit and "max_steps")
        assert same(whole[0].state(), ended[0].state())
        assert _figures(whole[0].history) == _figures(ended[0].history)
        assert {step: sorted(rows) for step, rows in run.seen.items()} == _rows_of(world)


def test_another_optimizer_s_settings_count_where_they_were_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.broken(1, 9)

    def faster(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, fused=False)

    (kept,) = run.attempt(1, optimizer=faster, epochs=3)
    assert [record["lr"] for record in kept.history] == [[0.1]] * 3
    (asked,) = run.attempt(1, optimizer=faster, epochs=4, loop={"new_optimizer": True})
    assert [record["lr"] for record in asked.history] == [[0.1], [0.1], [0.1], [0.2]]


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """Steps that are far too long: the first measurement is the best, and early stopping tells the figure."""
    run = Run(
        tmp_path,
        validation=clouds(30, 1),
        optimizer=lambda p: torch.optim.SGD(p, lr=2.0),
        epochs=8,
        early_stopping=EarlyStopping(metric="accuracy", patience=50),
        checkpoints=Checkpoints(keep=1, keep_best=1),
    )
    (trained,) = run.attempt(1)
    accuracies = [record["validation"]["accuracy"] for record in trained.history]
    best = STEPS * (1 + int(np.argmax(accuracies)))
    assert checkpoint.steps_on_disk(run.place) == sorted({8 * STEPS, best}, reverse=True)
    manifest = checkpoint.read_manifest(run.place, best)
    assert manifest["score"] == -max(accuracies)
    assert manifest["metrics"]["accuracy"] == max(accuracies)


def test_a_checkpoint_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """One worker's disk is slow: what falls due meanwhile is taken when all are ready, and the end always is."""

    class Slow(Hooks):
        def busy(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            return self.writer._rank == 1 and self.asked < 8

    class Noted(Loop):
        def run(self, restored: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
            board.setdefault("board", LocalBoard())
            writer = Writer(open_place(tmp_path), board["board"], Checkpoints(keep=99), rank=self.comms.rank, world=2)
            self.hooks = Slow(self.hooks, writer, {})
            self.comms.meet()
            try:
                return super().run(restored)
            finally:
                writer.wait()

    board: dict[str, Any] = {"board": LocalBoard()}
    runs = train(COLUMNS, world=2, batch_size=12, epochs=3, kind=Noted, checkpoints=Checkpoints(steps=2))
    assert [sorted(one.notes.states) for one in runs] == [[9, 10, 12, 14, 15]] * 2
    assert checkpoint.steps_on_disk(open_place(tmp_path)) == [15, 14, 12, 10, 9]


def test_random_generators_come_back() -> None:
    before = generators()
    try:
        states = generators()
        drawn = [torch.rand(3), np.random.normal(size=3), random.random()]
        record, tensors = checkpoint.split_state(states)
        set_generators({key: checkpoint.decode(value, tensors) for key, value in record.items()})
        again = [torch.rand(3), np.random.normal(size=3), random.random()]
        assert str(drawn) == str(again)
    finally:
        set_generators(before)
