"""Lines between workers and the driver: frames over TCP, opened only between two that know the run's secret.

Who may speak is settled here, what is said in `listener.py` (driver) and `meeting.py` (worker). Nothing is encrypted:
the secret itself travels with the task, inside Spark's own channel, and never over a line. No torch, no Spark.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_FRAME = struct.Struct("!IQ")
"""Bytes of the message, as JSON, and of what follows it."""
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HANDSHAKE_S = 10.0
_SEND_S = 60
"""A frame that the other side does not take for so long ends the line."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a run's driver listens, and the secret that opens it."""

    host: str
    port: int
    secret: str = field(repr=False)


class Line:
    """One open line. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()
        # Of a socket without time-out in Python; receiving waits as long as it takes.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_S, 0))
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def own_host(self) -> str:
        """This side's address: that of the interface which reaches the other side."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send one frame, whole.

        Raises: OSError, when the line is broken or the other side takes nothing.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        head = _FRAME.pack(len(body), len(payload)) + body
        with self._lock:
            self._socket.sendall(head)
            if payload:
                self._socket.sendall(payload)

    def receive(self) -> tuple[Message, bytes] | None:
        """The next frame, or None where the other side has closed the line between two frames.

        Raises: OSError, when the line breaks amid a frame; ValueError, when what comes is no frame.
        """
        head = self._file.read(_FRAME.size)
        if not head:
            return None
        if len(head) < _FRAME.size:
            raise ConnectionError("the line broke amid a frame")
        size, extra = _FRAME.unpack(head)
        body, payload = self._file.read(size), self._file.read(extra)
        if len(body) < size or len(payload) < extra:
            raise ConnectionError("the line broke amid a frame")
        message = json.loads(body)
        if not isinstance(message, dict):
            raise ValueError("a frame holds no message")
        return message, payload

    def close(self) -> None:
        """End the line; wakes a thread that receives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


def connect(address: Address, timeout_s: float = _HANDSHAKE_S) -> Line:
    """Open a line to the driver.

    Raises: OSError, when nobody is there, or one who does not know the secret, or takes us for one.
    """
    connection = socket.create_connection((address.host, address.port), timeout=timeout_s)
    try:
        nonce = _exactly(connection, _NONCE_BYTES)
        own = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(_proof(address.secret, b"worker", nonce) + own)
        answer = _exactly(connection, _PROOF_BYTES)
        if not hmac.compare_digest(answer, _proof(address.secret, b"driver", own)):
            raise ConnectionRefusedError(f"{address.host}:{address.port} does not know this run's secret")
        return Line(connection)
    except BaseException:
        connection.close()
        raise


class Server:
    """Accepts lines on one interface, at a port that is free, and gives each to `serve` in a thread of its own.

    `serve` returns when its line has ended. Use as a context manager; leaving it ends every line and thread.
    """

    def __init__(self, serve: Callable[[Line], None], host: str = "127.0.0.1") -> None:
        self._serve = serve
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._readers: list[threading.Thread] = []
        self._server = socket.create_server((host, 0), backlog=512)
        self.address = Address(host, self._server.getsockname()[1], secrets.token_hex(32))
        self._thread = threading.Thread(target=self._accept, name="kindling-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        # shutdown wakes a thread that waits in accept; close alone does not.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._readers:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            reader = threading.Thread(target=self._read, args=(connection,), name="kindling-line", daemon=True)
            with self._lock:
                self._open.add(connection)
            self._readers = [thread for thread in self._readers if thread.is_alive()]
            self._readers.append(reader)
            reader.start()

    def _read(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_HANDSHAKE_S)
            nonce = secrets.token_bytes(_NONCE_BYTES)
            connection.sendall(nonce)
            claim = _exactly(connection, _PROOF_BYTES + _NONCE_BYTES)
            if hmac.compare_digest(claim[:_PROOF_BYTES], _proof(self.address.secret, b"worker", nonce)):
                connection.sendall(_proof(self.address.secret, b"driver", claim[_PROOF_BYTES:]))
                self._serve(Line(connection))
        except (OSError, ValueError):
            return  # a stranger, or half a frame of a killed worker
        finally:
            with self._lock:
                self._open.discard(connection)
                connection.close()


def _proof(secret: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + nonce, "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the line was closed before it was open")
        data += part
    return data
