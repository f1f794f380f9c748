"""The user's own functions on the driver: what they hear, when they end a training, what becomes of their errors."""

from __future__ import annotations

import threading

import pytest

from kindling.train.callbacks import Callbacks, StopTraining
from kindling.train.events import Event


def event(epoch: int) -> Event:
    return Event(run="r", kind="epoch", epoch=epoch)


def test_every_function_hears_every_event_in_order_and_the_end_waits_for_the_last() -> None:
    heard: list[tuple[str, int]] = []
    gate = threading.Event()

    def slow(event: Event) -> None:
        gate.wait(20)
        heard.append(("slow", event.epoch))

    with Callbacks([slow, lambda event: heard.append(("quick", event.epoch))], stop=lambda: None) as callbacks:
        for epoch in range(3):
            callbacks.on_event(event(epoch))  # none of these waits
        assert heard == []
        gate.set()
    assert heard == [(name, epoch) for epoch in range(3) for name in ("slow", "quick")]


def test_a_stop_is_asked_for_once_and_the_events_go_on() -> None:
    heard, asked = [], []

    def enough(event: Event) -> None:
        heard.append(event.epoch)
        if event.epoch >= 1:
            raise StopTraining

    with Callbacks([enough], stop=lambda: asked.append(len(heard))) as callbacks:
        for epoch in range(4):
            callbacks.on_event(event(epoch))
    assert heard == [0, 1, 2, 3]
    assert asked == [2]


def test_an_error_ends_the_training_and_is_raised_at_its_end() -> None:
    heard, asked = [], []

    def broken(event: Event) -> None:
        heard.append(event.epoch)
        raise KeyError("no such figure")

    def call() -> None:
        with Callbacks([broken], stop=lambda: asked.append(True)) as callbacks:
            for epoch in range(3):
                callbacks.on_event(event(epoch))

    with pytest.raises(KeyError, match="no such figure"):
        call()
    assert heard == [0]
    assert asked == [True]


def test_the_training_s_own_error_comes_first() -> None:
    def broken(event: Event) -> None:
        raise KeyError("second")

    def call() -> None:
        with Callbacks([broken], stop=lambda: None) as callbacks:
            callbacks.on_event(event(1))
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        call()
