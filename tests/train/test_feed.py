"""A worker's rows step by step: in blocks, each is read once, before its first row is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kindling.train import feed
from kindling.train.feed import Feed
from kindling.train.order import plan_order
from kindling.train.spool import TRAIN, Rows, Spool, to_batch, to_blob

ROWS, BATCH = 3000, 50


def spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    hashes = np.random.default_rng(0).integers(0, 2**64, ROWS, dtype=np.uint64)
    spool = Spool({"number": ("int64", ())})
    spool.add(TRAIN, to_blob([to_batch({"number": np.arange(ROWS)}, hashes)]), None)
    return spool.in_order(spool.rows(TRAIN), lambda: None)


def test_blocks_are_read_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "BLOCK_BYTES", 3 * 8)
    rows = spooled(tmp_path, monkeypatch)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(Rows, "will_need", lambda self, first, last: asked.append((first, last)))
    taken = Feed(rows, blocks=True)
    plan = plan_order(taken.counts(), 1, 0, BATCH)
    place = {number: at for at, number in enumerate(np.asarray(rows.columns["number"]).tolist())}
    for epoch in (0, 1):
        asked.clear()
        seen: list[int] = []
        for part in taken.epoch(plan, 0, epoch, seed=5):
            wanted = [place[number] for number in part.arrays["number"].tolist()]
            assert all(any(first <= at < last for first, last in asked) for at in wanted)
            np.testing.assert_array_equal(rows.hashes[wanted], part.hashes)
            seen += wanted
        assert sorted(seen) == list(range(ROWS))
        assert sorted(asked)[0][0] == 0
        assert sum(last - first for first, last in asked) == ROWS, "each row in one block, each block once"
        assert max(last - first for first, last in asked) == 3


def test_small_shards_are_one_block_each_which_is_a_full_shuffle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = spooled(tmp_path, monkeypatch)
    found = []
    for blocks in (False, True):
        taken = Feed(rows, blocks=blocks)
        plan = plan_order(taken.counts(), 1, 0, BATCH)
        found.append([part.arrays["number"].tolist() for part in taken.epoch(plan, 0, 2, seed=1, first=7)])
    assert found[0] == found[1]
