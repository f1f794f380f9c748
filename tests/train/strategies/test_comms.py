"""Sums that are started and waited for, vectors of all workers, letters: in one process, and over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kindling.train.strategies import Comms, InProcessComms, Mail, SoloComms
from kindling.train.strategies import mail as mail_room
from kindling.train.strategies.mail import TcpMail


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sums_that_were_started_land_in_order_before_what_is_asked_later(world: int) -> None:
    def work(comms: Comms) -> tuple[list[torch.Tensor], torch.Tensor]:
        tensors = [torch.full((1000,), float(comms.rank + place)) for place in range(5)]
        started = [comms.start_sum([tensor], scale=0.5) for tensor in tensors]
        later = comms.all_reduce(torch.ones(1))
        for pending in started:
            pending.wait()
        return tensors, later

    for tensors, later in InProcessComms.run(world, work) if world > 1 else [work(SoloComms())]:
        assert later.item() == world
        for place, tensor in enumerate(tensors):
            expected = place if world == 1 else 0.5 * sum(rank + place for rank in range(world))
            assert torch.equal(tensor, torch.full((1000,), float(expected)))


def test_what_goes_wrong_in_a_started_sum_is_told_to_who_waits() -> None:
    def work(comms: Comms) -> None:
        if comms.rank == 1:
            raise ValueError("gone")
        comms.start_sum([torch.ones(1)]).wait()

    with pytest.raises(ValueError, match="gone"):
        InProcessComms.run(3, work)


@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.uint8])
def test_vectors_of_any_length_reach_everybody(kind: torch.dtype) -> None:
    def work(comms: Comms) -> tuple[list[list[float]], int]:
        found = comms.exchange(torch.arange(2 * comms.rank).to(kind))
        return [vector.tolist() for vector in found], comms.bytes_sent

    size = torch.empty(0, dtype=kind).element_size()
    for rank, (found, sent) in enumerate(InProcessComms.run(3, work)):
        assert found == [[], [0, 1], [0, 1, 2, 3]]
        assert sent == 2 * 16 + 2 * (2 * rank) * size


class Post:
    """As many `TcpMail` as asked for, on the loopback interface."""

    def __init__(self, world: int) -> None:
        gathered: list[str | None] = [None] * world
        barrier = threading.Barrier(world)
        self.counts = [0] * world

        def tell(rank: int) -> Callable[[str], list[str]]:
            def all_of_them(text: str) -> list[str]:
                gathered[rank] = text
                barrier.wait(30)
                return [text for text in gathered if text is not None]

            return all_of_them

        def count(rank: int) -> Callable[[int], None]:
            def add(size: int) -> None:
                self.counts[rank] += size

            return add

        with ThreadPoolExecutor(world) as pool:
            made = pool.map(lambda rank: TcpMail(rank, "127.0.0.1", tell(rank), count(rank)), range(world))
            self.mails = list(made)
        self.told = gathered

    def __enter__(self) -> list[TcpMail]:
        return self.mails

    def __exit__(self, *_: object) -> None:
        for mail in self.mails:
            mail.close()


def drained(mail: Mail, count: int) -> list[Any]:
    letters = [mail.receive(30) for _ in range(count)]
    assert None not in letters
    return letters


def test_letters_arrive_whole_once_and_in_order() -> None:
    post = Post(3)
    large = bytes(range(256)) * 40_000  # more than any socket keeps
    with post as mails:
        for number in range(20):
            mails[0].send(1, b"%d" % number)
        mails[2].send(1, large)
        mails[1].send(2, b"")
        mails[1].send(1, b"to myself")
        letters = drained(mails[1], 22)
        assert [body for source, body in letters if source == 0] == [b"%d" % number for number in range(20)]
        assert [body for source, body in letters if source == 2] == [large]
        assert [body for source, body in letters if source == 1] == [b"to myself"]
        assert mails[2].receive(30) == (1, b"")
        assert mails[2].receive(0.01) is None
    assert post.counts == [20 * 8 + 10 + 20, 8, 8 + len(large)]


def test_two_that_send_each_other_more_than_fits_do_not_wait_for_each_other() -> None:
    large = b"x" * (8 << 20)
    with Post(2) as mails:
        for mail, other in ((mails[0], 1), (mails[1], 0)):
            mail.send(other, large)
            mail.send(other, large)
        for mail in mails:
            assert all(body == large for _, body in drained(mail, 2))


def test_a_worker_that_has_gone_is_noticed() -> None:
    with Post(3) as mails:
        mails[2].send(0, b"last words")
        mails[2].close()
        assert drained(mails[0], 2) == [(2, b"last words"), (2, None)]
        assert mails[1].receive(30) == (2, None)


def test_closing_leaves_no_thread_and_no_port() -> None:
    before = set(threading.enumerate())
    post = Post(3)
    with post:
        pass
    assert set(threading.enumerate()) <= before
    for text in post.told:
        assert text is not None
        host, port, _ = json.loads(text)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port), timeout=5)


def test_strangers_are_turned_away_and_delay_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing, and one that guesses, come first to each worker."""
    silent: list[socket.socket] = []
    guessing: list[socket.socket] = []
    real = TcpMail._connect

    def late(self: TcpMail, other: int, host: str, port: int) -> None:
        silent.append(socket.create_connection((host, port), timeout=5))
        guessing.append(socket.create_connection((host, port), timeout=30))
        guessing[-1].sendall(b"\0" * 36)
        real(self, other, host, port)

    monkeypatch.setattr(TcpMail, "_connect", late)
    began = time.monotonic()
    with Post(2) as mails:
        assert time.monotonic() - began < 30  # a stranger's time is 60 s
        mails[0].send(1, b"still here")
        assert mails[1].receive(30) == (0, b"still here")
        assert mails[1].receive(0.2) is None  # nothing of the strangers'
        for guess in guessing:
            heard = b""
            while chunk := guess.recv(100):
                heard += chunk
            assert len(heard) == 16  # the challenge, and then the door
    for stranger in (*silent, *guessing):
        stranger.close()


def test_a_worker_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_room, "_PATIENCE_S", 1.0)
    connect = TcpMail._connect
    monkeypatch.setattr(TcpMail, "_connect", lambda self, *where: None if self._rank == 1 else connect(self, *where))
    with pytest.raises(RuntimeError, match=r"workers \[1\] did not connect to worker 0"):
        Post(2)


def test_letters_between_threads_end_with_their_sender() -> None:
    def work(comms: Comms) -> list[Any]:
        mail = comms.open_mail()
        if comms.rank == 0:
            mail.send(1, b"one")
            mail.send(1, b"two")
            mail.close()
            comms.meet()
            return [comms.bytes_sent]
        letters = drained(mail, 3)
        comms.meet()
        return letters

    sender, receiver = InProcessComms.run(2, work)
    assert receiver == [(0, b"one"), (0, b"two"), (0, None)]
    assert sender == [2 * (8 + 3) + 4]


def test_alone_one_can_write_to_oneself() -> None:
    comms = SoloComms()
    mail = comms.open_mail()
    mail.send(0, b"remember")
    assert mail.receive(1) == (0, b"remember")
    assert comms.bytes_sent == 0
    comms.close()
