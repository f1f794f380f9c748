"""The driver's table: what is done when workers come, stop, hang or die. No sockets, no clock."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.errors import SessionError, TrainingError, from_text, to_wire
from kindling.train.table import DONE, FAILED, OPEN, Deed, Kill, Send, Table


def seated(workers: int, **options: float) -> Table:
    """A table at which worker r sits as peer r, in task 100 + r, since second 0."""
    table = Table(workers, **options)  # type: ignore[arg-type]
    for rank in range(workers):
        assert kinds(table.hello(peer=rank, rank=rank, task=100 + rank, now=0.0)) == [(rank, "seat")]
    return table


def kinds(deeds: Iterable[Deed]) -> list[tuple[int, str]]:
    return [(deed.peer, str(deed.message["kind"])) if isinstance(deed, Send) else (deed.task, "kill") for deed in deeds]


def told(deeds: Iterable[Deed]) -> set[str]:
    return {str(deed.message["reason"]) for deed in deeds if isinstance(deed, Send) and "reason" in deed.message}


def train(table: Table, rank: int, now: float, *, idle_s: float = 0.0, waits: bool = False, where: str = "") -> None:
    beat = {"phase": "train", "steps": 12, "idle_s": idle_s, "waits": waits, "where": where}
    table.beat(peer=rank, beat=beat, now=now)


def test_everyone_gets_everything_when_the_last_has_come() -> None:
    table = seated(3)
    assert table.post(peer=2, name="meet", text="two", now=1.0) == []
    assert table.post(peer=0, name="meet", text="zero", now=1.0) == []
    deeds = table.post(peer=1, name="meet", text="one", now=1.0)
    assert {deed.peer for deed in deeds if isinstance(deed, Send)} == {0, 1, 2}
    assert all(
        deed.message == {"kind": "all", "name": "meet", "parts": ["zero", "one", "two"]}
        for deed in deeds
        if isinstance(deed, Send)
    )


def test_one_death_ends_the_generation_for_all_and_names_the_rank() -> None:
    table = seated(3)
    table.post(peer=0, name="meet", text="old", now=1.0)
    deeds = table.lost(peer=1, now=2.0)
    assert kinds(deeds) == [(0, "over"), (2, "over")]
    assert told(deeds) == {"worker 1 died: its connection broke."}
    # Those who were told end one after the other: no further generation dies of that.
    assert table.lost(peer=0, now=2.1) == table.lost(peer=2, now=2.1) == []
    assert (table.generation, table.state) == (1, OPEN)
    for rank in range(3):
        deeds = table.hello(peer=10 + rank, rank=rank, task=200 + rank, now=3.0)
        assert deeds == [Send(10 + rank, {"kind": "seat", "generation": 1})]
    assert (
        table.post(peer=11, name="meet", text="b", now=4.0) == table.post(peer=12, name="meet", text="c", now=4) == []
    )
    assert table.post(peer=0, name="meet", text="late", now=4.0) == []
    (answer, *_) = table.post(peer=10, name="meet", text="a", now=4.0)
    assert isinstance(answer, Send)
    assert answer.message["parts"] == ["a", "b", "c"]


def test_a_worker_that_comes_again_before_its_death_was_noticed() -> None:
    table = seated(2)
    deeds = table.hello(peer=9, rank=1, task=300, now=1.0)
    assert kinds(deeds) == [(0, "over"), (1, "over"), (9, "seat")]
    assert table.lost(peer=1, now=1.1) == []  # the dead one's line: nobody of this generation
    assert table.generation == 1


def test_one_that_comes_late_from_an_older_try_is_sent_away() -> None:
    table = seated(2)
    assert kinds(table.hello(peer=9, rank=1, task=5, now=1.0)) == [(9, "over")]
    assert table.generation == 0


def test_a_copy_waits_while_the_first_lives_and_takes_its_seat_when_it_dies() -> None:
    table = seated(2, copies=True)
    assert table.hello(peer=9, rank=1, task=300, now=1.0) == []
    deeds = table.lost(peer=1, now=2.0)
    assert kinds(deeds) == [(0, "over"), (9, "seat")]
    assert kinds(table.hello(peer=10, rank=0, task=301, now=3.0)) == [(10, "seat")]


def test_after_the_finish_nothing_is_a_fault_and_nobody_starts_again() -> None:
    table = seated(2)
    table.post(peer=0, name="finish", text="", now=1.0)
    table.post(peer=1, name="finish", text="", now=1.0)
    assert table.state == DONE
    assert table.lost(peer=0, now=2.0) == table.tick(1e9) == []
    assert table.hello(peer=9, rank=0, task=300, now=3.0) == [Send(9, {"kind": "closed", "final": None})]


def test_an_error_for_good_reaches_all_and_those_who_come_later() -> None:
    table = seated(3)
    wire = to_wire(TrainingError("the loss became nan"))
    deeds = table.fail(peer=2, reason="the loss became nan", final=wire, now=1.0)
    assert [deed.message["final"] for deed in deeds if isinstance(deed, Send)] == [wire, wire]
    assert table.state == FAILED
    (answer,) = table.hello(peer=9, rank=0, task=300, now=2.0)
    assert isinstance(answer, Send)
    assert isinstance(from_text(answer.message["final"]), TrainingError)


def test_a_failure_that_can_be_mended_is_the_others_reason() -> None:
    table = seated(2)
    deeds = table.fail(peer=1, reason="No space left on device", final=None, now=1.0)
    assert told(deeds) == {"worker 1 failed: No space left on device"}
    assert table.state == OPEN


def test_a_silent_worker_is_lost_and_its_task_killed() -> None:
    table = seated(2, silence_s=60)
    train(table, 1, 5.0, where="nets.py:33 in forward")
    train(table, 0, 60.0, waits=True)
    assert table.tick(64.0) == []
    deeds = table.tick(66.0)
    assert kinds(deeds) == [(101, "kill"), (0, "over")]
    (reason,) = told(deeds)
    assert reason.startswith("worker 1 has not been heard of for 61 s")
    assert "nets.py:33 in forward" in reason


def test_a_worker_that_hangs_is_found_while_those_who_wait_for_it_are_not_blamed() -> None:
    table = seated(2, stall_s=30)
    for now in range(0, 31, 10):
        train(table, 0, now, idle_s=now, waits=True)
        train(table, 1, now, idle_s=now, where="net.py:7 in forward")
    assert table.tick(30.0) == []
    train(table, 0, 31.0, idle_s=31.0, waits=True)
    train(table, 1, 31.0, idle_s=31.0, where="net.py:7 in forward")
    deeds = table.tick(31.0)
    assert kinds(deeds) == [(0, "over"), (1, "over")]
    (reason,) = told(deeds)
    assert "worker 0 waits for the others, 12 batches" in reason
    assert "worker 1 is in net.py:7 in forward" in reason


@pytest.mark.parametrize("strategy_waits", [True, False])
def test_a_slow_worker_is_no_hung_one(strategy_waits: bool) -> None:
    """It makes a step now and then; the others have waited for it for hours."""
    table = seated(2, stall_s=30)
    for now in range(0, 10_000, 25):
        train(table, 0, now, idle_s=now if strategy_waits else 1.0, waits=strategy_waits)
        train(table, 1, now, idle_s=24.0)
        assert table.tick(now + 0.5) == []


def test_workers_that_all_wait_for_each_other_are_started_again() -> None:
    table = seated(2, stall_s=30)
    for rank in (0, 1):
        train(table, rank, 31.0, idle_s=31.0, waits=True)
    assert kinds(table.tick(31.5)) == [(0, "over"), (1, "over")]


def test_while_spark_feeds_the_workers_nobody_needs_to_get_on() -> None:
    table = seated(2, stall_s=30, silence_s=1000)
    for rank in (0, 1):
        beat = {"phase": "spool", "steps": 0, "idle_s": 900.0, "waits": False, "where": "serializers.py:1 in load"}
        table.beat(peer=rank, beat=beat, now=900.0)
    assert table.tick(900.0) == []


def test_a_worker_that_has_no_slot_is_not_waited_for_forever() -> None:
    table = Table(4, seats_s=20)
    for rank in range(3):
        table.hello(peer=rank, rank=rank, task=rank, now=float(rank))
    assert table.tick(19.0) == []
    deeds = table.tick(21.0)
    assert kinds(deeds) == [(0, "over"), (1, "over"), (2, "over")]
    assert table.state == FAILED
    error = from_text(str(table.final))
    assert isinstance(error, SessionError)
    assert str(error).startswith("only 3 of 4 workers had a task slot within 20 s. Use workers=3")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_whatever_happens_there_is_one_worker_to_a_seat_and_the_last_generation_meets(
    data: st.DataObject, workers: int
) -> None:
    """Random deaths, restarts and posts; when all have come once more, all get everyone's latest word."""
    table = Table(workers)
    alive: dict[int, int] = {}  # rank -> peer
    peers = iter(range(10_000))
    over: set[int] = set()

    def note(deeds: list[Deed]) -> None:
        over.update(deed.peer for deed in deeds if isinstance(deed, Send) and deed.message["kind"] == "over")

    for _ in range(data.draw(st.integers(0, 30))):
        rank = data.draw(st.integers(0, workers - 1))
        action = data.draw(st.sampled_from(["come", "die", "post"]))
        if action == "come":
            alive[rank] = next(peers)
            note(table.hello(peer=alive[rank], rank=rank, task=alive[rank], now=0.0))
        elif rank in alive and action == "die":
            note(table.lost(peer=alive.pop(rank), now=0.0))
        elif rank in alive:
            deeds = table.post(peer=alive[rank], name="meet", text="early", now=0.0)
            assert len(deeds) in (0, workers)
    # Spark starts every worker again that was told to end, and every one that died.
    for _ in range(3):
        for rank in range(workers):
            if alive.get(rank) is None or alive[rank] in over:
                alive[rank] = next(peers)
                note(table.hello(peer=alive[rank], rank=rank, task=alive[rank], now=0.0))
    assert not over & set(alive.values())
    answers = [table.post(peer=alive[rank], name="last", text=str(rank), now=1.0) for rank in range(workers)]
    assert [len(deeds) for deeds in answers] == [0] * (workers - 1) + [workers]
    assert {deed.peer for deed in answers[-1] if isinstance(deed, Send)} == set(alive.values())
    assert not any(isinstance(deed, Kill) for deed in answers[-1])


def test_a_wish_to_stop_reaches_those_who_sit_and_those_who_come_later() -> None:
    table = Table(2)
    table.hello(peer=0, rank=0, task=100, now=0.0)
    assert kinds(table.stop()) == [(0, "stop")]
    assert kinds(table.hello(peer=1, rank=1, task=101, now=0.1)) == [(1, "seat"), (1, "stop")]
    table.lost(peer=1, now=0.2)
    assert kinds(table.hello(peer=2, rank=0, task=102, now=0.3)) == [(2, "seat"), (2, "stop")]
