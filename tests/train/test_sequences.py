"""Lists of any length: embedding bags against torch's own, bucketing by length, padding that changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from train_loops import SGD, batches, hashes_of, same, train

from kindling.errors import ConfigError
from kindling.prepare import LabelStep, LengthStep, Preparation, SequenceStep
from kindling.signature import Signature, TensorSpec
from kindling.train.order import epoch_order, owner_of, plan_order, shard_of

WORDS = SequenceStep("words", "words", max_length=40, size=50)
PREPARATION = Preparation((WORDS,), (LabelStep("target", "label", ("0", "1", "2")),))
SIGNATURE = Signature({"words": TensorSpec(("N", "L"), "int64")}, {"y": TensorSpec(("N", 3))})


def sentences(rows: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """Lists of 0 to 40 indices from 1 to 49, and which third of the indices is the most frequent."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(1, 50, rng.integers(0, 41)).tolist() for _ in range(rows)]
    thirds = [np.bincount(np.array(one, int) // 17, minlength=3)[:3] for one in lists]
    return lists, np.array([int(counts.argmax()) for counts in thirds])


def packed(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    lists, target = sentences(rows, seed)
    done = WORDS.pack(pa.RecordBatch.from_pydict({"words": lists}))
    assert not done.errors
    return {**done.arrays, "target": target}


def bag(sparse: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(50, 8, padding_idx=0, sparse=sparse), nn.Linear(8, 3))


LOOP: dict[str, Any] = {"preparation": PREPARATION, "signature": SIGNATURE}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_embedding_bags_learn_what_torch_learns_from_indices_and_offsets(world: int, sparse: bool) -> None:
    lists, target = sentences(70)
    module = bag(sparse)
    optimizer = SGD if not sparse else lambda p: torch.optim.SGD(p, lr=0.5)
    optim = optimizer(module.parameters())
    for epoch in batches(70, 2, 12):
        for rows in epoch:
            flat = torch.tensor([index for row in rows for index in lists[row]])
            offsets = torch.tensor(np.cumsum([0, *(len(lists[row]) for row in rows[:-1])]))
            optim.zero_grad()
            out = module[1](module[0](flat, offsets))  # type: ignore[index]
            nn.functional.cross_entropy(out, torch.from_numpy(target[rows])).backward()
            optim.step()
    runs = train(
        packed(70),
        module=bag(sparse),
        world=world,
        batch_size=12 // world,
        optimizer=optimizer,
        bucketed=False,
        loop=LOOP,
    )
    for one in runs:
        for name, value in one.state().items():
            torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bucketed_steps_hold_the_same_rows_at_any_number_of_workers(world: int) -> None:
    (alone,) = train(packed(96), module=bag(), batch_size=12, epochs=3, loop=LOOP)
    for one in train(packed(96), module=bag(), world=world, batch_size=12 // world, epochs=3, loop=LOOP):
        for name, value in one.state().items():
            torch.testing.assert_close(value, alone.state()[name], rtol=1e-4, atol=1e-5)
    (plain,) = train(packed(96), module=bag(), batch_size=12, epochs=3, bucketed=False, loop=LOOP)
    assert not same(plain.state(), alone.state())


@pytest.mark.parametrize("world", [1, 2, 5])
def test_an_epoch_by_length_has_each_row_once_and_little_padding(world: int) -> None:
    count, batch = 20_000, 64
    rng = np.random.default_rng(0)
    hashes, lengths = hashes_of(count), rng.integers(1, 101, count)
    shards = shard_of(hashes)
    counts_V = np.bincount(shards, minlength=240)
    widths: dict[int, int] = {}
    seen: list[int] = []
    steps = 0
    for rank in range(world):
        mine = np.flatnonzero(owner_of(shards, world) == rank)
        mine = mine[np.lexsort((hashes[mine], shards[mine]))]
        plan = plan_order(counts_V, world, rank, batch)
        order = epoch_order(hashes[mine], plan.place_of_own, 3, 0, lengths[mine], count)
        seen += mine[order].tolist()
        steps = plan.steps
        for step, rows in enumerate(np.split(mine[order], np.cumsum(plan.rows_TW[:, rank])[:-1])):
            widths[step] = max(widths.get(step, 0), int(lengths[rows].max(initial=0)))
    assert sorted(seen) == list(range(count))
    padded = sum(width * batch for width in widths.values())
    assert padded / lengths.sum() < 1.4  # in any order it is nearly 2
    order_of_widths = [widths[step] for step in range(steps)]
    assert np.corrcoef(order_of_widths, np.arange(steps))[0, 1] < 0.5  # not from short to long


def test_rows_do_not_know_how_far_their_batch_is_padded() -> None:
    lists, _ = sentences(20)
    module = bag().eval()
    both = WORDS.pack(pa.RecordBatch.from_pydict({"words": lists}))
    whole = module(WORDS.batch(both.arrays))
    for row in range(20):
        one = module(WORDS.batch({name: array[row : row + 1] for name, array in both.arrays.items()}))
        torch.testing.assert_close(one[0], whole[row])


def test_longer_rows_are_reported_or_cut() -> None:
    rows = pa.RecordBatch.from_pydict({"x": [[1.5, 2.5], [1.0, 2.0, 3.0], None, [None]]})
    step = SequenceStep("x", "x", max_length=2, dtype="float32", padding=-1.0)
    told = step.pack(rows)
    assert told.errors == {
        1: "column 'x' holds 3 numbers, more than 2",
        2: "column 'x' is null",
        3: "column 'x' holds a null",
    }
    cut = SequenceStep("x", "x", max_length=2, dtype="float32", padding=-1.0, cut=True).pack(rows)
    assert cut.arrays["x"].tolist() == [[1.5, 2.5], [1.0, 2.0]]
    assert LengthStep("n", "x", max_length=2).pack(rows).arrays["n"].tolist() == [2, 2, 1]


def test_what_is_no_list_of_numbers_is_reported() -> None:
    for column in ([1, 2], [["a"], ["b"]]):
        told = WORDS.pack(pa.RecordBatch.from_pydict({"words": column}))
        assert len(told.errors) == 2
        assert len(told.arrays["words"]) == len(told.arrays[WORDS.length_column]) == 0


@pytest.mark.parametrize("fields", [{"max_length": 0}, {"dtype": "text"}, {"size": 0}, {"size": 4, "dtype": "float32"}])
def test_steps_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SequenceStep(**{"name": "x", "column": "x", "max_length": 3, **fields})
