"""Workers meet at the driver's table, over real sockets; events, results and files travel on the same lines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kindling.errors import SessionError, StorageError, TrainingError, to_wire
from kindling.storage import open_place
from kindling.train import meeting as meeting_module
from kindling.train.events import Event, EventLog
from kindling.train.line import Address
from kindling.train.listener import Listener
from kindling.train.meeting import ClosedError, LostError, TableMeeting, look
from kindling.train.remote import RemotePlace
from kindling.train.table import Table


def wait(until: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def listening(workers: int = 2, **options: Any) -> Iterator[tuple[Listener, list[Event]]]:
    heard: list[Event] = []
    table = Table(workers, **options.pop("table", {}))
    with Listener(heard.append, table=table, **options) as listener:
        yield listener, heard
    ours = ("kindling-listener", "kindling-line", "kindling-clock")
    assert not [t for t in threading.enumerate() if t.name in ours]


def come(listener: Listener, rank: int, task: int = 0) -> TableMeeting:
    return TableMeeting(listener.address, rank=rank, task=task, host=None, silence_s=3600, forced=False)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each gives or raises, run at the same time."""
    results: list[Any] = [None] * len(works)

    def body(index: int) -> None:
        try:
            results[index] = works[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=body, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_workers_meet_at_once() -> None:
    with listening(3) as (listener, _):
        seats = [come(listener, rank) for rank in (2, 0, 1)]
        answers = together(*(lambda s=seat, t=str(i): s.all_gather("meet", t) for i, seat in enumerate(seats)))
        assert answers == [["1", "2", "0"]] * 3
        assert {seat.host for seat in seats} == {"127.0.0.1"}
        for seat in seats:
            seat.close()


def test_events_arrive_in_order_from_several_workers() -> None:
    with listening(3) as (listener, heard):
        seats = [come(listener, rank) for rank in range(3)]
        logs = [EventLog("run", rank, seat.say) for rank, seat in enumerate(seats)]
        for step in range(50):
            for log in logs:
                log.emit("step", step=step, loss=0.5)
        together(*(seat.close for seat in seats))
        wait(lambda: len(heard) == 150)
    for rank in range(3):
        assert [event.step for event in heard if event.rank == rank] == list(range(50))


def test_the_result_is_there_when_all_have_finished_and_of_the_last_generation_only() -> None:
    with listening(2) as (listener, _):
        first = [come(listener, rank, task=rank) for rank in range(2)]
        first[0].deliver("weights", 0, b"old")
        first[0].deliver("more", 0, b"old")
        wait(lambda: listener._results)
        first[1].close()
        with pytest.raises(LostError, match="worker 1 died"):
            first[0].all_gather("finish", "")
        first[0].close()
        assert listener.results() == []
        again = [come(listener, rank, task=2 + rank) for rank in range(2)]
        large = os.urandom(40 << 20)  # goes in pieces
        again[0].deliver("weights", 0, large)
        again[0].deliver("weights", 1, b"")
        again[1].deliver("report", 0, b"r1")
        assert listener.results() == []
        assert together(*(lambda s=seat: s.all_gather("finish", "") for seat in again)) == [["", ""]] * 2
        found = listener.results()
        assert [(rank, kind, part) for rank, kind, part, _ in found] == [
            (0, "weights", 0),
            (0, "weights", 1),
            (1, "report", 0),
        ]
        assert [data for *_, data in found] == [large, b"", b"r1"]
        with pytest.raises(ClosedError):
            come(listener, 1, task=9)
        for seat in again:
            seat.close()


def test_an_error_of_one_is_everyones() -> None:
    with listening(2) as (listener, _):
        seats = [come(listener, rank) for rank in range(2)]
        seats[1].fail("no", to_wire(TrainingError("the loss became nan")))
        with pytest.raises(TrainingError, match="the loss became nan"):
            seats[0].all_gather("meet", "")
        with pytest.raises(TrainingError, match="the loss became nan"):
            come(listener, 1, task=9)
        for seat in seats:
            seat.close()


def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_CONNECT_TRIES", 1)
    with listening() as (listener, _):
        address = listener.address
    with pytest.raises(SessionError, match=rf"cannot reach the driver at 127.0.0.1:{address.port}"):
        TableMeeting(address, rank=0, task=0, host=None, silence_s=60, forced=False)


def test_a_driver_that_goes_away_ends_the_wait() -> None:
    with listening() as (listener, _):
        seat = come(listener, 0)
    with pytest.raises(LostError, match=r"hung up|broke"):
        seat.all_gather("meet", "")
    seat.close()


CHILD = """
import sys, threading, time
from kindling.train.line import Address
from kindling.train import meeting
meeting._GRACE_S = 0.5
host, port, secret, rank, task, silence_s, how = sys.argv[1:]
seat = meeting.TableMeeting(
    Address(host, int(port), secret), rank=int(rank), task=int(task), host=None, silence_s=float(silence_s)
)
seat.enter("train")
print("ready", flush=True)
if how == "gil":
    sum(range(10**11))  # one call of C code, which holds Python's lock all the while
else:
    time.sleep(600)
"""


def child(address: Address, rank: int, silence_s: float, how: str) -> subprocess.Popen[str]:
    arguments = [address.host, str(address.port), address.secret, str(rank), "0", str(silence_s), how]
    process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_worker_is_noticed_at_once() -> None:
    with listening(2) as (listener, _):
        seat = come(listener, 0)
        with child(listener.address, 1, 60, "sleep") as process:
            process.kill()
            with pytest.raises(LostError, match="worker 1 died"):
                seat.all_gather("meet", "")
        seat.close()


def test_a_stopped_worker_is_lost_and_its_task_killed() -> None:
    killed: list[tuple[int, str]] = []
    table = {"silence_s": 2.0}
    with listening(2, table=table, kill=lambda task, reason: killed.append((task, reason))) as (listener, _):
        seat = come(listener, 0)
        with child(listener.address, 1, 60, "sleep") as process:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(LostError, match="worker 1 has not been heard of"):
                seat.all_gather("meet", "")
            process.kill()
        assert [task for task, _ in killed] == [0]
        seat.close()


def test_a_worker_that_sleeps_in_its_code_is_found_and_ends() -> None:
    with listening(1, table={"stall_s": 1.0}) as (listener, _):
        with child(listener.address, 0, 60, "sleep") as process:
            assert process.wait(30) == meeting_module._PROCESS_ENDED
        assert "no progress for 1 s: worker 0 is in <string>:" in listener.table.reasons[0]


def test_a_worker_that_holds_pythons_lock_ends_itself() -> None:
    with listening(1, table={"silence_s": 60.0}) as (listener, _):
        with child(listener.address, 0, 2.0, "gil") as process:
            assert process.wait(30) == 1
        wait(lambda: listener.table.reasons)


def test_the_code_that_a_worker_is_in_is_named() -> None:
    inside, leave = threading.Event(), threading.Event()

    def users_own_function() -> None:
        inside.set()
        leave.wait(20)

    thread = threading.Thread(target=users_own_function)
    thread.start()
    inside.wait(20)
    waits, where = look(thread.ident or 0)
    leave.set()
    thread.join()
    assert not waits
    assert where.startswith("test_meeting.py:")
    assert where.endswith("in users_own_function")


def test_one_in_a_collective_waits_for_the_others() -> None:
    from kindling.train.strategies.comms import InProcessComms

    seen: list[bool] = []

    def work(comms: InProcessComms) -> None:
        if comms.rank == 0:
            comms.meet()
            return
        others = [t for t in threading.enumerate() if t.ident != threading.get_ident() and t.ident is not None]
        wait(lambda: any(look(t.ident)[0] for t in others if t.ident is not None))
        seen.append(True)
        comms.meet()

    InProcessComms.run(2, work)
    assert seen == [True]


def test_files_of_the_run_directory_through_the_driver(tmp_path: Path) -> None:
    real = open_place(tmp_path / "run")
    with listening(place=real) as (listener, _):
        place = RemotePlace("elsewhere", listener.address)
        assert not place.exists()
        place.makedirs()
        assert place.exists()
        data = os.urandom((8 << 20) + 5)
        place.write("checkpoints/1/weights", data)
        place.write("empty", b"")
        assert real.read("checkpoints/1/weights") == data == place.read("checkpoints/1/weights")
        assert place.read("empty") == b""
        assert place.list("checkpoints") == ["checkpoints/1/weights"]
        assert place.size("checkpoints/1/weights") == len(data)
        place.delete("checkpoints")
        assert real.list() == ["empty"]
        place.close()


def test_what_the_driver_cannot_do_is_said_and_the_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with listening(place=open_place(tmp_path / "file")) as (listener, _):
        place = RemotePlace("elsewhere", listener.address)
        for act in (
            lambda: place.read("absent"),
            lambda: place.write("a/b", b"x" * (9 << 20)),
            lambda: place.read("../file"),
            lambda: place.write("/etc/kindling", b"x"),
        ):
            with pytest.raises(StorageError, match=r"cannot|no name"):
                act()
        assert place.list("absent") == []
        place.close()


def test_a_driver_that_has_gone_is_a_storage_error(tmp_path: Path) -> None:
    with listening(place=open_place(tmp_path)) as (listener, _):
        place = RemotePlace("elsewhere", listener.address)
        place.write("a", b"1")
    with pytest.raises(StorageError, match="the driver, which keeps elsewhere, cannot be reached"):
        place.read("a")


def test_a_wish_to_stop_reaches_a_worker_on_its_line() -> None:
    with listening(1) as (listener, _), contextlib.closing(come(listener, 0)) as worker:
        assert not worker.stop_asked
        listener.stop()
        wait(lambda: worker.stop_asked)
        assert worker.all_gather("meet", "here") == ["here"]  # it goes on until it has agreed with the others
