"""Mail: messages from one worker to another, at any time; the seam of asynchronous strategies.

`TcpMail` is between processes, `QueueMail` between threads of one. What is sent from one worker to another arrives
whole, once and in order; sending never waits for the receiver. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

FRAME_BYTES = 8
"""Sent before each message: its length."""
_PATIENCE_S = 60.0
_NONCE_BYTES = 16
_SEAL = struct.Struct("<I32s")
_SIOCGIFADDR = 0x8915  # netdevice(7)

Letter = tuple[int, bytes | None]
"""The sender's rank, and its message; None when there will be no more from it."""


def own_address() -> str:
    """The address of the interface that gloo was told to use; else of the one that leads outside, else of none.

    >>> os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    >>> own_address()
    '127.0.0.1'
    >>> del os.environ["GLOO_SOCKET_IFNAME"]
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if name:
            request = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        probe.connect(("192.0.2.1", 9))  # nobody's address (RFC 5737), and a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"


class Mail(ABC):
    """One worker's letter box."""

    @abstractmethod
    def send(self, to: int, message: bytes) -> None:
        """Hand a message over; returns at once. To others it counts `FRAME_BYTES` more than its length."""

    @abstractmethod
    def receive(self, timeout_s: float | None = None) -> Letter | None:
        """The next letter, or None when none has come in time. A letter without a message: that worker has gone."""

    @abstractmethod
    def close(self) -> None:
        """Send what is waiting, and go; safe to call twice. Whoever waits for a letter here is told so as well."""


class QueueMail(Mail):
    """Letter boxes of threads.

    >>> boxes = [queue.SimpleQueue(), queue.SimpleQueue()]
    >>> QueueMail(0, boxes, count=lambda size: None).send(1, b"well?")
    >>> QueueMail(1, boxes, count=lambda size: None).receive()
    (0, b'well?')
    """

    def __init__(self, rank: int, boxes: Sequence[queue.SimpleQueue[Letter]], count: Callable[[int], None]) -> None:
        self._rank, self._boxes, self._count, self._open = rank, boxes, count, True

    def send(self, to: int, message: bytes) -> None:
        if to != self._rank:
            self._count(FRAME_BYTES + len(message))
        self._boxes[to].put((self._rank, message))

    def receive(self, timeout_s: float | None = None) -> Letter | None:
        try:
            return self._boxes[self._rank].get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        if self._open:
            self._open = False
            for box in self._boxes:  # its own too: a thread may wait there
                box.put((self._rank, None))


class TcpMail(Mail):
    """Letter boxes of processes: one connection for each direction between two workers.

    Listens on one interface, at a port the system picks, until all others have come. A caller must prove that it knows
    the secret of this run, which rank 0 draws and the process group has carried; whoever cannot is turned away and
    delays nobody.

    Args:
        address: of the interface to listen on.
        tell_all: gives every worker's text, by rank; all workers call it together.
        count: told how many bytes go out.
    Raises: RuntimeError, when not all workers can be reached.
    """

    def __init__(
        self, rank: int, address: str, tell_all: Callable[[str], list[str]], count: Callable[[int], None]
    ) -> None:
        self._rank, self._count = rank, count
        self._inbox: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._outboxes: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock, self._open = threading.Lock(), True
        self._arrived: set[int] = set()
        self._all_here = threading.Condition(self._lock)
        self._server = socket.create_server((address, 0), backlog=128)
        port = self._server.getsockname()[1]
        told = [json.loads(text) for text in tell_all(json.dumps([address, port, secrets.token_hex(32)]))]
        self._world, self._secret = len(told), bytes.fromhex(told[0][2])
        try:
            self._start(self._accept)
            for other, (host, its_port, _) in enumerate(told):
                if other != rank:
                    self._connect(other, host, its_port)
            with self._all_here:
                if not self._all_here.wait_for(lambda: len(self._arrived) == self._world - 1, _PATIENCE_S):
                    missing = sorted(set(range(self._world)) - self._arrived - {rank})
                    raise RuntimeError(f"workers {missing} did not connect to worker {rank} within {_PATIENCE_S:.0f} s")
        except OSError as error:
            self.close()
            raise RuntimeError(f"worker {rank} cannot reach the others: {error}") from error
        except RuntimeError:
            self.close()
            raise
        self._shut(self._server)  # nobody else is to come

    def send(self, to: int, message: bytes) -> None:
        if to == self._rank:
            self._inbox.put((to, message))
            return
        self._count(FRAME_BYTES + len(message))
        self._outboxes[to].put(message)

    def receive(self, timeout_s: float | None = None) -> Letter | None:
        try:
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._inbox.put((self._rank, None))  # a thread may wait there
        for box in self._outboxes.values():
            box.put(None)
        for thread in self._threads:
            if thread.name.startswith("kindling-mail-to"):
                thread.join(5)
        with self._lock:
            sockets = [self._server, *self._sockets]
        for one in sockets:
            self._shut(one)
        for thread in self._threads:
            thread.join(5)

    def _start(self, body: Callable[..., None], *arguments: object, name: str = "kindling-mail") -> None:
        thread = threading.Thread(target=body, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _shut(one: socket.socket) -> None:
        # shutdown wakes a thread that waits in accept or recv; close alone does not.
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()

    def _keep(self, one: socket.socket) -> bool:
        """Note a connection, to be shut at the end; False, and it is shut now, when that has come."""
        with self._lock:
            if self._open:
                self._sockets.append(one)
                return True
        self._shut(one)
        return False

    def _connect(self, other: int, host: str, port: int) -> None:
        connection = socket.create_connection((host, port), timeout=_PATIENCE_S)
        if not self._keep(connection):
            return
        nonce = _exactly(connection, _NONCE_BYTES)
        connection.sendall(_SEAL.pack(self._rank, self._seal(nonce, self._rank)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._outboxes[other] = queue.SimpleQueue()
        self._start(self._deliver, other, connection, name=f"kindling-mail-to-{other}")

    def _seal(self, nonce: bytes | bytearray, rank: int) -> bytes:
        return hmac.new(self._secret, bytes(nonce) + struct.pack("<I", rank), hashlib.sha256).digest()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            if self._keep(connection):
                self._start(self._collect, connection)

    def _collect(self, connection: socket.socket) -> None:
        """Read one worker's messages until it goes."""
        source = -1
        try:
            nonce = os.urandom(_NONCE_BYTES)
            connection.settimeout(_PATIENCE_S)
            connection.sendall(nonce)
            claimed, seal = _SEAL.unpack(_exactly(connection, _SEAL.size))
            with self._all_here:
                known = claimed < self._world and claimed not in {self._rank, *self._arrived}
                if not known or not hmac.compare_digest(seal, self._seal(nonce, claimed)):
                    return
                source = claimed
                self._arrived.add(source)
                self._all_here.notify_all()
            connection.settimeout(None)
            while True:
                (size,) = struct.unpack("<Q", _exactly(connection, FRAME_BYTES))
                self._inbox.put((source, bytes(_exactly(connection, size))))
        except OSError:
            return
        finally:
            self._shut(connection)
            if source >= 0:
                self._inbox.put((source, None))

    def _deliver(self, to: int, connection: socket.socket) -> None:
        """Write the messages to one worker."""
        try:
            while (message := self._outboxes[to].get()) is not None:
                connection.sendall(struct.pack("<Q", len(message)) + message)
        except OSError:
            self._inbox.put((to, None))
        finally:
            self._shut(connection)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """The next `size` bytes.

    Raises: ConnectionError, when the other side has gone.
    """
    found = bytearray(size)
    view = memoryview(found)
    while len(view):
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the connection was closed")
        view = view[count:]
    return found
