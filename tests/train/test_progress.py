"""The progress bar of a training: what a person sees, from the events alone."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kindling.train import progress
from kindling.train.events import Event
from kindling.train.progress import TrainingBar


def shown(monkeypatch: pytest.MonkeyPatch, events: list[Event], **options: bool) -> str:
    """Everything a terminal of 120 columns was sent, without its control codes."""
    screen = io.StringIO()
    clock = iter(range(1000))
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with TrainingBar(3, **options) as bar:
        for event in events:
            bar.on_event(event)
            bar._bar.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def event(kind: str, **fields: object) -> Event:
    data = {name: fields.pop(name) for name in list(fields) if name not in ("epoch", "step", "rank", "attempt")}
    return Event(run="r", kind=kind, data=data, **fields)  # type: ignore[arg-type]


STEPS = [
    event("spooled"),
    event("met"),
    event("step", epoch=1, step=1, loss=2.5, rows=64, of=1000),
    event("step", epoch=2, step=20, loss=0.5, rows=500, of=1000),
]


def test_epoch_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    page = shown(monkeypatch, STEPS)
    assert "meeting" in page
    assert "epoch 1/3" in page
    last = page[page.rindex("epoch 2/3") :]
    assert "loss 0.5000" in last
    assert re.search(r"[\d,]+ rows/s", last)
    assert " 50%" in last  # 1,500 of 3,000 rows
    assert re.search(r"\d:\d\d:\d\d", last)


def test_an_epoch_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = {"loss": 0.75, "accuracy": 0.875}
    page = shown(monkeypatch, [*STEPS, event("epoch", epoch=2, loss=0.625, rows_per_s=1234.0, validation=checked)])
    assert "epoch 2/3: loss 0.6250, validation loss 0.7500, accuracy 87.50%, 1,234 rows/s" in page


def test_a_lost_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    page = shown(monkeypatch, [event("met"), *STEPS, event("met", attempt=1), event("resumed", step=16)])
    assert "attempt 2: a worker was lost, the workers start again" in page
    page = shown(monkeypatch, [event("met", attempt=1), event("resumed", step=16)])
    assert "lost" not in page  # a later call goes on with the run
    assert "resumed after step 16" in page
    assert "resumed after step 16" in page


def test_progress_false_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, [*STEPS, event("warning", text="disk")], shown=False) == ""
