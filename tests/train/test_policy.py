"""When checkpoints are due and which stay: the same decision on every worker, without a message in each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kindling.errors import ConfigError
from kindling.train.policy import Checkpoints, Timetable
from kindling.train.strategies import InProcessComms, SoloComms


def _due(policy: Checkpoints, steps: int, per_epoch: int) -> list[int]:
    table, found = Timetable(policy), []
    for step in range(1, steps + 1):
        if table.due(step, SoloComms(), epoch_end=step // per_epoch if step % per_epoch == 0 else None):
            found.append(step)
            table.written()
    return found


def test_by_epochs_and_by_steps() -> None:
    assert _due(Checkpoints(), 12, 4) == [4, 8, 12]
    assert _due(Checkpoints(epochs=2), 16, 4) == [8, 16]
    assert _due(Checkpoints(epochs=None, steps=5), 16, 4) == [5, 10, 15]
    assert _due(Checkpoints(epochs=1, steps=3), 8, 4) == [3, 4, 6, 8]
    assert _due(Checkpoints(epochs=None), 8, 4) == []


def test_what_is_due_stays_due_until_it_is_written() -> None:
    table = Timetable(Checkpoints(steps=2))
    asked = [table.due(step, SoloComms(), epoch_end=None) for step in (1, 2, 3, 4)]
    assert asked == [False, True, True, True]
    table.written()
    assert not table.due(5, SoloComms(), epoch_end=None)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_by_minutes_all_workers_agree_and_seldom_ask(world: int) -> None:
    """Workers of different pace and with clocks of their own: 0.1 s and more a step, a checkpoint each minute."""

    def work(comms: Any) -> tuple[list[int], int, float]:
        now = [1000.0 * comms.rank]
        table, found, asked = Timetable(Checkpoints(epochs=None, minutes=1), lambda: now[0]), [], 0
        gather = comms.gather

        def counted(vector: np.ndarray) -> list[np.ndarray]:
            nonlocal asked
            asked += 1
            return list(gather(vector))

        comms.gather = counted
        for step in range(1, 2401):
            now[0] += 0.1
            if table.due(step, comms, epoch_end=None):
                found.append(step)
                table.written()
            now[0] += 0.02 * comms.rank
        return found, asked, now[0]

    results = InProcessComms.run(world, work)
    assert all(found == results[0][0] for found, _, _ in results)
    assert [round(step / 600) for step in results[0][0]] in ([1, 2, 3], [1, 2, 3, 4])
    assert all(600 <= gap <= 620 for gap in np.diff([0, *results[0][0]]))
    assert results[0][1] < 100


@given(
    scores=st.dictionaries(st.integers(0, 50), st.one_of(st.none(), st.floats()), min_size=1, max_size=12),
    keep=st.integers(1, 4),
    best=st.integers(0, 3),
)
def test_the_newest_and_the_best_are_kept(scores: dict[int, float | None], keep: int, best: int) -> None:
    kept = Checkpoints(keep=keep, keep_best=best).worth_keeping(scores)
    assert set(sorted(scores)[-keep:]) <= kept <= set(scores)
    assert len(kept) <= keep + best
    known = sorted(score for score in scores.values() if score is not None and score == score)
    for step in set(scores) - kept:
        score = scores[step]
        assert score is None or score != score or best == 0 or score >= known[min(best, len(known)) - 1]


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"steps": 1.5}, {"minutes": 0}, {"minutes": float("inf")}, {"keep": 0}, {"keep_best": -1}],
    ids=str,
)
def test_what_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Checkpoints(**bad)
