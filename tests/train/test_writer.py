"""Checkpoints in the background: one copy in memory, everything stored once, never a half that looks whole."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kindling.errors import FormatError, StorageError
from kindling.storage import LocalPlace, Place, open_place
from kindling.train import checkpoint
from kindling.train.policy import Checkpoints
from kindling.train.writer import LocalBoard, Writer


class SlowPlace(LocalPlace):
    """A folder whose files take their time, until the gate is opened, or cannot be written at all."""

    def __init__(self, folder: Path, refuse: Callable[[str], bool] = lambda _: False) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self._refuse = refuse

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        self.gate.wait(30)
        if self._refuse(name):
            raise StorageError(f"cannot write {name}: No space left on device")
        with super().new_file(name) as path:
            yield path


def _writers(
    place: Place, world: int, policy: Checkpoints | None = None, **more: Any
) -> tuple[list[Writer], list[Any]]:
    board, told = LocalBoard(), []  # type: ignore[var-annotated]

    def note(kind: str, **data: Any) -> None:
        told.append((kind, data))

    made = [
        Writer(place, board, policy or Checkpoints(keep=9), rank=rank, world=world, on_event=note, **more)
        for rank in range(world)
    ]
    return made, told


def _state(rank: int, step: int) -> dict[str, Any]:
    return {
        "module": {"w": torch.arange(1000.0) + step, "statistics": torch.full((3,), float(rank))},
        "optimizer": {"state": {0: {"momentum": torch.ones(1000) * step}}, "lr": 0.1},
        "rows": 10 * rank,
        "history": [{"loss": 1.0}],
    }


def _take(writers: list[Writer], step: int, **about: Any) -> None:
    for rank, writer in enumerate(writers):
        writer.take(step, _state(rank, step), about)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_all_have_is_stored_once(tmp_path: Path, world: int) -> None:
    writers, told = _writers(open_place(tmp_path), world)
    for step in (5, 6):
        _take(writers, step, epoch=2)
    for writer in writers:
        writer.wait()
    found = checkpoint.read(open_place(tmp_path), 6)
    for rank in range(world):
        state, expected = found.states[rank], _state(rank, 6)
        assert torch.equal(state["module"]["w"], expected["module"]["w"])
        assert torch.equal(state["module"]["statistics"], expected["module"]["statistics"])
        assert torch.equal(state["optimizer"]["state"][0]["momentum"], expected["optimizer"]["state"][0]["momentum"])
        assert (state["rows"], state["history"]) == (10 * rank, [{"loss": 1.0}])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / checkpoint.folder(6)).iterdir()}
    assert len(sizes) == 1 + world
    for rank in range(1, world):
        assert sizes[f"000-rank-{rank:04d}.safetensors"] < 300  # three numbers and a header
    assert [(kind, data["step"], data["epoch"]) for kind, data in told] == [("checkpoint", 5, 2), ("checkpoint", 6, 2)]


def test_a_step_waits_for_a_copy_and_for_nothing_else(tmp_path: Path) -> None:
    """While the disk is stuck, weights are changed: what is stored is what was there when it was taken."""
    place = SlowPlace(tmp_path)
    (writer,), _ = _writers(place, 1)
    live = {"w": torch.zeros(100)}
    writer.take(1, {"module": live}, {})
    live["w"] += 1
    assert writer.busy
    assert checkpoint.steps_on_disk(place) == []
    place.gate.set()
    writer.wait()
    assert not writer.busy
    assert checkpoint.read(place, 1).states[0]["module"]["w"].sum() == 0
    buffer = writer._buffers["module/w"].data_ptr()
    writer.take(2, {"module": live}, {})
    writer.wait()
    assert writer._buffers["module/w"].data_ptr() == buffer
    assert checkpoint.read(place, 2).states[0]["module"]["w"].sum() == 100


def test_without_every_part_there_is_no_checkpoint(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    writers, told = _writers(place, 3)
    _take(writers[:2], 5)
    time.sleep(0.1)
    assert checkpoint.steps_on_disk(place) == []
    with pytest.raises(FormatError):
        checkpoint.read(place, 5)
    for writer in writers:
        writer.stop()
    assert checkpoint.steps_on_disk(place) == []
    assert told == []


def test_a_worker_that_never_comes_is_not_waited_for_without_end(tmp_path: Path) -> None:
    writers, told = _writers(open_place(tmp_path), 2, patience_s=0.05)
    _take(writers[:1], 5)
    writers[0].wait()
    ((kind, data),) = told
    assert (kind, data["step"]) == ("warning", 5)
    assert "has not written its part in 0 s" in data["text"]


@pytest.mark.parametrize("full", ["all", "rank-0001"])
def test_a_full_disk_costs_that_checkpoint_and_no_more(tmp_path: Path, full: str) -> None:
    place = SlowPlace(tmp_path, lambda name: full in name and f"{6:012d}" in name)
    place.gate.set()
    writers, told = _writers(place, 2)
    for step in (5, 6, 7):
        _take(writers, step)
        for writer in writers:
            writer.wait()
    assert checkpoint.steps_on_disk(place) == [7, 5]
    assert not (tmp_path / checkpoint.folder(6)).exists()
    ((_, data),) = [(kind, data) for kind, data in told if kind == "warning"]
    assert "checkpoint 6 could not be written: worker" in data["text"]
    assert "No space left" in data["text"]


def test_the_newest_and_the_best_stay_also_those_of_an_earlier_attempt(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    policy = Checkpoints(keep=2, keep_best=1)
    scores = {1: 0.5, 2: 0.2, 3: 0.3, 4: 0.4, 5: None, 6: 0.6}
    for attempt, steps in enumerate([(1, 2, 3), (4, 5, 6)]):
        (writer,), _ = _writers(place, 1, policy, attempt=attempt)
        for step in steps:
            writer.take(step, _state(0, step), {"score": scores[step]})
        writer.wait()
    assert checkpoint.steps_on_disk(place) == [6, 5, 2]


def test_a_later_attempt_does_not_touch_files_of_an_earlier_one(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    for attempt in (0, 1):
        writers, _ = _writers(place, 2, attempt=attempt)
        _take(writers, 5)
        for writer in writers:
            writer.wait()
    names = {path.name for path in (tmp_path / checkpoint.folder(5)).iterdir()}
    assert {"000-all.safetensors", "001-all.safetensors", "001-rank-0001.safetensors"} <= names
    assert checkpoint.read(place, 5).manifest["attempt"] == 1


def test_what_cannot_be_stored_is_said_where_it_is_taken(tmp_path: Path) -> None:
    (writer,), _ = _writers(open_place(tmp_path), 1)
    with pytest.raises(FormatError, match="cannot hold a set"):
        writer.take(1, {"bad": {1}}, {})
