"""Lines between workers and the driver: whole frames, both ways, for those who know the secret only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kindling.train.line import Address, Line, Server, connect


@contextmanager
def echo() -> Iterator[Server]:
    """A server that sends back what it gets."""

    def serve(line: Line) -> None:
        while (frame := line.receive()) is not None:
            line.send(*frame)

    server = Server(serve)
    try:
        yield server
    finally:
        server.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("kindling-")]


def test_frames_come_back_whole_from_many_lines() -> None:
    with echo() as server:
        lines = [connect(server.address) for _ in range(5)]
        sent = [({"rank": rank, "text": "ä" * rank * 1000}, bytes([rank]) * (1 << (4 * rank))) for rank in range(5)]
        for line, frame in zip(lines, sent, strict=True):
            line.send(*frame)
        for line, frame in zip(lines, sent, strict=True):
            assert line.receive() == frame
        for line in lines:
            line.close()


def test_it_listens_on_the_interface_that_was_named_and_on_no_other() -> None:
    with echo() as server:
        assert server.address.host == "127.0.0.1"
        assert "secret" not in repr(server.address)
        with pytest.raises(OSError, match=r"refused|unreachable"):
            socket.create_connection(("127.0.0.2", server.address.port), timeout=5)


def test_a_stranger_is_not_served() -> None:
    with echo() as server:
        with pytest.raises(OSError, match=r"closed|reset"):
            connect(Address("127.0.0.1", server.address.port, "0" * 64))
        with socket.create_connection(("127.0.0.1", server.address.port)) as stranger:
            stranger.recv(64)
            stranger.sendall(b"GET / HTTP/1.0\r\n".ljust(64))
            assert stranger.recv(10) == b""
        line = connect(server.address)  # the others are served all the same
        line.send({"still": "here"})
        assert line.receive() == ({"still": "here"}, b"")
        line.close()


def test_a_worker_tells_nothing_to_a_driver_that_does_not_know_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        heard: list[bytes] = []

        def pose() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b"n" * 32)
                heard.append(connection.recv(64, socket.MSG_WAITALL))
                connection.sendall(b"p" * 32)
                heard.append(connection.recv(64))

        thread = threading.Thread(target=pose)
        thread.start()
        secret = "5" * 64
        with pytest.raises(ConnectionRefusedError, match="does not know"):
            connect(Address("127.0.0.1", impostor.getsockname()[1], secret))
        thread.join()
    assert heard[1] == b""
    assert secret.encode() not in heard[0]


def test_an_answer_cannot_be_used_again() -> None:
    """What one worker said when it came opens no second line: each is asked something else."""
    with echo() as server:
        with socket.create_server(("127.0.0.1", 0)) as between:
            said: list[bytes] = []

            def eavesdrop() -> None:
                worker, _ = between.accept()
                with worker, socket.create_connection(("127.0.0.1", server.address.port)) as driver:
                    worker.sendall(driver.recv(32, socket.MSG_WAITALL))
                    said.append(worker.recv(64, socket.MSG_WAITALL))
                    driver.sendall(said[0])
                    worker.sendall(driver.recv(32, socket.MSG_WAITALL))

            thread = threading.Thread(target=eavesdrop)
            thread.start()
            connect(Address("127.0.0.1", between.getsockname()[1], server.address.secret)).close()
            thread.join()
        with socket.create_connection(("127.0.0.1", server.address.port)) as stranger:
            stranger.recv(32, socket.MSG_WAITALL)
            stranger.sendall(said[0])
            assert stranger.recv(32) == b""


@pytest.mark.parametrize("half", [b"\0", b"\0\0\0\x08" + b"\0" * 8 + b'{"a"'], ids=["head", "message"])
def test_half_a_frame_is_an_error(half: bytes) -> None:
    ours, theirs = socket.socketpair()
    line = Line(ours)
    theirs.sendall(half)
    theirs.close()
    with pytest.raises(ConnectionError, match="amid a frame"):
        line.receive()
    line.close()
