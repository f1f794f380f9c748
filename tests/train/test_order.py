"""The order of rows depends on hashes and counts alone, spends every row once, and is even over the workers."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.train import order
from kindling.train.order import (
    VIRTUAL_SHARDS,
    block_numbers,
    epoch_order,
    owner_of,
    plan_order,
    shard_of,
    static_order,
)

FUZZ = int(os.environ.get("KINDLING_FUZZ", "1"))
"""How many times as many random inputs as usual; set by `make test-all`."""


def _hashes(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, rows, dtype=np.uint64)


def _owned(hashes: np.ndarray, workers: int, rank: int) -> np.ndarray:
    return hashes[owner_of(shard_of(hashes), workers) == rank]


@pytest.mark.fuzz
@settings(max_examples=60 * FUZZ, deadline=None)
@given(rows=st.integers(1, 700), workers=st.integers(1, 7), batch=st.integers(1, 64), seed=st.integers(0, 5))
def test_every_row_has_one_place_and_every_step_has_rows(rows: int, workers: int, batch: int, seed: int) -> None:
    counts = np.bincount(shard_of(_hashes(rows, seed)), minlength=VIRTUAL_SHARDS)
    plans = [plan_order(counts, workers, rank, batch) for rank in range(workers)]
    places = np.sort(np.concatenate([plan.place_of_own for plan in plans]))
    assert places.tolist() == list(range(rows))
    for plan in plans:
        assert plan.rows_TW.tolist() == plans[0].rows_TW.tolist()
        assert plan.rows_TW.sum(axis=1).tolist() == [batch] * (rows // batch) + ([rows % batch] if rows % batch else [])


def _global_batches(
    hashes: np.ndarray, workers: int, batch: int, epoch: int = 3, seed: int = 1, block: int = 0
) -> list[list[int]]:
    """The rows of every step over all workers, sorted, as each worker finds its own from the shard counts."""
    counts = np.bincount(shard_of(hashes), minlength=VIRTUAL_SHARDS)
    found: list[list[int]] = []
    for rank in range(workers):
        mine = _owned(hashes, workers, rank)
        mine = mine[static_order(mine, lambda row: b"")]
        plan = plan_order(counts, workers, rank, batch)
        ordered = mine[epoch_order(mine, plan.place_of_own, epoch, seed, block=block)]
        stops = np.cumsum(plan.rows_TW[:, rank])
        found = found or [[] for _ in stops]
        for step, part in zip(found, np.split(ordered, stops[:-1]), strict=True):
            step += part.tolist()
    return [sorted(step) for step in found]


@pytest.mark.fuzz
@settings(max_examples=40 * FUZZ, deadline=None)
@given(
    rows=st.integers(1, 900),
    workers=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 40]),
    batch=st.integers(1, 130),
    seed=st.integers(0, 5),
    block=st.sampled_from([0, 0, 1, 2, 5]),
)
def test_global_batches_are_the_same_rows_for_every_worker_count(
    rows: int, workers: int, batch: int, seed: int, block: int
) -> None:
    """Also for counts that do not divide V: a shard has one owner, whoever that is."""
    hashes = _hashes(rows, seed)
    assert _global_batches(hashes, workers, batch, block=block) == _global_batches(hashes, 1, batch, block=block)


@pytest.mark.fuzz
@settings(max_examples=30 * FUZZ, deadline=None)
@given(
    rows=st.integers(1, 500),
    stops=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    workers=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_workers_may_come_and_go_in_the_middle_of_an_epoch(rows: int, stops: list[float], workers: list[int]) -> None:
    """Not a row lost or doubled: each stretch of steps is trained by another number of workers."""
    hashes = _hashes(rows)
    steps = -(-rows // 32)
    edges = [0, *sorted(int(stop * steps) for stop in stops), steps]
    seen = [
        row
        for (first, last), count in zip(pairwise(edges), workers, strict=False)
        for step in _global_batches(hashes, count, 32)[first:last]
        for row in step
    ]
    assert sorted(seen) == sorted(hashes.tolist())


def test_order_of_arrival_changes_nothing() -> None:
    hashes = _hashes(500)
    hashes[100:110] = hashes[7]  # rows that share a key
    content = np.random.default_rng(1).bytes(500 * 8)
    rows = [content[8 * i : 8 * i + 8] for i in range(500)]
    arrival = np.random.default_rng(2).permutation(500)
    one = static_order(hashes, lambda row: rows[row])
    other = arrival[static_order(hashes[arrival], lambda row: rows[arrival[row]])]
    assert one.tolist() == other.tolist()


def test_epochs_differ_and_seeds_differ() -> None:
    hashes = _hashes(400)
    counts = np.bincount(shard_of(hashes), minlength=VIRTUAL_SHARDS)
    plan = plan_order(counts, 1, 0, 32)
    ordered = hashes[static_order(hashes, lambda row: b"")]
    first, second, reseeded = (epoch_order(ordered, plan.place_of_own, e, s) for e, s in ((1, 0), (2, 0), (1, 1)))
    assert sorted(first.tolist()) == list(range(400))
    assert first.tolist() != second.tolist()
    assert first.tolist() != reseeded.tolist()


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_blocks_come_whole_one_after_the_other_in_an_order_of_their_own(block: int) -> None:
    hashes = _hashes(6000)
    hashes = hashes[static_order(hashes, lambda row: b"")]
    shards = shard_of(hashes)
    counts = np.bincount(shards, minlength=VIRTUAL_SHARDS)
    plan = plan_order(counts, 1, 0, 64)
    numbers = block_numbers(shards, block)
    assert np.bincount(numbers).max() == min(block, counts.max())
    orders = []
    for epoch in (1, 2):
        order = epoch_order(hashes, plan.place_of_own, epoch, 0, block=block)
        assert sorted(order.tolist()) == list(range(6000))
        came: list[list[int]] = []
        for shard in range(VIRTUAL_SHARDS):
            mine = order[shards[order] == shard]
            changes = np.flatnonzero(np.diff(numbers[mine], prepend=-1))
            assert len(changes) == -(-counts[shard] // block), "a block is left only when all its rows have come"
            came.append(numbers[mine][changes].tolist())
        orders.append((order.tolist(), came))
    assert orders[0][0] != orders[1][0], "rows come in another order"
    if block == 4:
        assert orders[0][1] != orders[1][1], "and so do blocks"


def test_ranking_in_windows_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.bincount(shard_of(_hashes(5000)), minlength=VIRTUAL_SHARDS)
    whole = plan_order(counts, 3, 1, 96)
    monkeypatch.setattr(order, "_WINDOW_ROWS", 137)
    parts = plan_order(counts, 3, 1, 96)
    assert parts.place_of_own.tolist() == whole.place_of_own.tolist()
    assert parts.rows_TW.tolist() == whole.rows_TW.tolist()


def test_steps_are_nearly_even_over_the_workers() -> None:
    counts = np.bincount(shard_of(_hashes(30_607)), minlength=VIRTUAL_SHARDS)
    rows_TW = plan_order(counts, 2, 0, 64).rows_TW
    of_five_steps = rows_TW[: len(rows_TW) // 5 * 5].reshape(-1, 5, 2).sum(axis=1)
    assert (of_five_steps.max(axis=1) / of_five_steps.mean(axis=1)).mean() < 1.03
