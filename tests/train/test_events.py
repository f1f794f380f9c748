"""Events reach the driver's listener in order, and only from those who know the secret."""

from __future__ import annotations

import socket
import threading
import time

from kindling.train.events import Event, EventLog, Listener, ListenerAddress


def _wait(until: object, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not until() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)


def test_events_arrive_in_order_from_several_workers() -> None:
    heard: list[Event] = []
    with Listener(heard.append) as listener:
        logs = [EventLog("run", rank, listener.address) for rank in range(3)]
        for step in range(50):
            for log in logs:
                log.emit("step", step=step, loss=0.5)
        for log in logs:
            log.close()
        _wait(lambda: len(heard) == 150)
    for rank in range(3):
        assert [event.step for event in heard if event.rank == rank] == list(range(50))
    assert not [t for t in threading.enumerate() if t.name.startswith("kindling-")]


def test_a_stranger_is_not_heard() -> None:
    heard: list[Event] = []
    with Listener(heard.append) as listener:
        wrong = ListenerAddress(listener.address.host, listener.address.port, "0" * 32)
        log = EventLog("run", 0, wrong)
        log.emit("step")
        log.close()
        with socket.create_connection((listener.address.host, listener.address.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert stranger.recv(10) == b""
    assert heard == []


def test_a_broken_line_ends_one_connection_only() -> None:
    heard: list[Event] = []
    with Listener(heard.append) as listener:
        with socket.create_connection((listener.address.host, listener.address.port)) as half:
            half.sendall(listener.address.token.encode() + b'\n{"run": "x", "ki')
        log = EventLog("run", 1, listener.address)
        log.emit("epoch", epoch=1)
        log.close()
        _wait(lambda: heard)
    assert [event.kind for event in heard] == ["epoch"]


def test_without_a_listener_nothing_waits_and_nothing_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    log = EventLog("run", 0, ListenerAddress("127.0.0.1", port, "t"))
    began = time.monotonic()
    log.emit("start")
    log.emit("step", keep=False)
    log.close()
    assert time.monotonic() - began < 5
    assert [event.kind for event in log.events] == ["start"]
    part, events = log.take()
    assert (part, len(events)) == (0, 1)
    assert log.take() == (1, [])
