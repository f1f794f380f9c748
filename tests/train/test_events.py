"""Events: kept, told, taken in parts."""

from __future__ import annotations

from kindling.train.events import Event, EventLog


def test_what_is_emitted_is_told_and_kept_unless_it_is_for_live_readers() -> None:
    told: list[Event] = []
    log = EventLog("run", 3, told.append)
    log.emit("start")
    log.attempt = 1
    log.emit("step", step=7, epoch=2, keep=False, loss=0.5)
    log.emit("epoch", epoch=2)
    assert [(event.kind, event.attempt, event.rank) for event in told] == [
        ("start", 0, 3),
        ("step", 1, 3),
        ("epoch", 1, 3),
    ]
    assert [event.kind for event in log.events] == ["start", "epoch"]
    assert told[1].data["loss"] == 0.5


def test_events_are_taken_once() -> None:
    log = EventLog("run", 0)
    log.emit("start")
    part, events = log.take()
    assert (part, len(events)) == (0, 1)
    assert log.take() == (1, [])
    log.emit("met")
    assert [event.kind for event in log.take()[1]] == ["met"]
