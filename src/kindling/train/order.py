"""The order of rows: which worker trains on which row in which step, from hashes and counts alone.

A row's place is a hash, not an accident of files, partitions or fetches. Rows belong to V virtual shards by hash; a
worker owns a range of shards. Row i of the n_v rows of shard v stands at (i + 1/2) / n_v, ties by a fixed scattered
order of the shards (by v itself, small data would give one worker all rows of a step); that makes one global order
whose slices are the global batches, known to every worker from the shard counts alone. Which row of the shard is the
i-th changes every epoch. Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

VIRTUAL_SHARDS = 240
"""V. Many worker counts divide it (1 to 6, 8, 10, 12, 15, 16, 20, 24, 30, ...)."""

_WINDOW_ROWS = 1 << 22
"""Rows ranked at once: bounds the memory of `plan_order` to some 100 MB whatever the data's size."""


def mix(hashes: np.ndarray, *salts: int) -> np.ndarray:
    """Well-mixed 64-bit values from hashes and whole numbers; the same on every machine.

    Source: the finaliser of SplitMix64 (Steele et al., 2014, "Fast splittable pseudorandom number generators").

    >>> mix(np.array([0, 1], dtype=np.uint64), 7)
    array([ 4659817285964113758, 16920444926201547018], dtype=uint64)
    """
    z = hashes.astype(np.uint64, copy=True)
    with np.errstate(over="ignore"):
        for salt in salts:
            z += np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return z


def shard_of(hashes: np.ndarray) -> np.ndarray:
    """Virtual shard of each row, int64 in [0, V), from its 64-bit hash (signed or not)."""
    return (hashes.astype(np.uint64) % np.uint64(VIRTUAL_SHARDS)).astype(np.int64)


def owner_of(shards: np.ndarray, workers: int) -> np.ndarray:
    """Worker that owns each shard: a range of V / W shards, as even as V allows.

    >>> np.bincount(owner_of(np.arange(VIRTUAL_SHARDS), 7))
    array([35, 34, 34, 35, 34, 34, 34])
    """
    return shards * workers // VIRTUAL_SHARDS


@dataclass(frozen=True, slots=True)
class OrderPlan:
    """The steps of an epoch, the same for every epoch."""

    steps: int
    rows_TW: np.ndarray
    """Rows of each worker in each step, shape (steps, W), int64; every step has at least one row."""
    place_of_own: np.ndarray
    """Global place of the worker's own rows, sorted by shard then by i: shape (own rows,), int64."""


def plan_order(counts_V: np.ndarray, workers: int, rank: int, global_batch: int) -> OrderPlan:
    """Rank every row in the one global order and cut it into global batches.

    Args:
        counts_V: rows of each virtual shard, shape (V,), int64.
        workers, rank: how many workers there are, and which one's own rows to place.
        global_batch: rows of one step over all workers.
    """
    total = int(counts_V.sum())
    steps = -(-total // global_batch)
    rows_TW = np.zeros((steps, workers), np.int64)
    owners_V = owner_of(np.arange(len(counts_V)), workers)
    own = np.flatnonzero(owners_V == rank)
    starts = np.zeros(len(counts_V) + 1, np.int64)
    np.cumsum(np.where(owners_V == rank, counts_V, 0), out=starts[1:])
    places = np.empty(int(counts_V[own].sum()), np.int64)

    # Prefixes of this order are spread evenly over the shards, hence over the workers (a Bohr set of the golden ratio).
    tie_V = np.argsort(np.argsort(np.arange(len(counts_V)) * 0.6180339887498949 % 1.0))
    windows = max(1, -(-total // _WINDOW_ROWS))
    done_V = np.zeros(len(counts_V), np.int64)
    placed = 0
    for window in range(1, windows + 1):
        # Rows that stand before window / windows: i + 1/2 < n_v * window / windows.
        until_V = counts_V if window == windows else np.ceil(counts_V * (window / windows) - 0.5).astype(np.int64)
        until_V = np.maximum(until_V, done_V)
        sizes = until_V - done_V
        shards = np.repeat(np.arange(len(counts_V)), sizes)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes) + done_V[shards]
        order = np.lexsort((tie_V[shards], (within + 0.5) / counts_V[shards]))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(placed, placed + len(order))
        np.add.at(rows_TW, (place // global_batch, owners_V[shards]), 1)
        mine = owners_V[shards] == rank
        places[starts[shards[mine]] + within[mine]] = place[mine]
        placed += len(order)
        done_V = until_V
    return OrderPlan(steps, rows_TW, places)


def static_order(hashes: np.ndarray, content_of: Callable[[int], bytes]) -> np.ndarray:
    """Row numbers sorted by shard, hash and (for rows with one hash) content: independent of the order they came in.

    Args:
        hashes: of the worker's rows in order of arrival, shape (n,), uint64.
        content_of: the packed bytes of a row, by its number of arrival; asked only for rows that share a hash.
    """
    order = np.lexsort((hashes, shard_of(hashes)))
    ordered = hashes[order]
    edges = np.flatnonzero(np.diff(ordered) != 0) + 1
    bounds = np.concatenate(([0], edges, [len(order)]))
    for start, stop in pairwise(bounds.tolist()):
        if stop - start > 1:
            order[start:stop] = sorted(order[start:stop].tolist(), key=content_of)
    return order


def block_numbers(shards: np.ndarray, rows: int) -> np.ndarray:
    """Each row's block: stretches of so many rows of one shard, numbered through; the last of a shard may be shorter.

    Args:
        shards: of rows in static order, shape (n,).

    >>> block_numbers(np.array([0, 0, 0, 0, 0, 5, 5]), 2)
    array([0, 0, 1, 1, 2, 3, 3])
    """
    sizes = np.bincount(shards, minlength=VIRTUAL_SHARDS)
    within = np.arange(len(shards)) - (np.cumsum(sizes) - sizes)[shards]
    return np.cumsum(within % rows == 0) - 1


_BLOCKS = 0xB10C
"""Tells the draws of blocks from those of rows."""
_STRATA = 16
"""Classes of length in one window."""
_WINDOW_OF_SHARD = 256
"""Rows of a shard in one window: enough to tell long from short in each shard alone."""


def by_length(
    shuffled: np.ndarray, shards: np.ndarray, lengths: np.ndarray, rows: int, epoch: int, seed: int
) -> np.ndarray:
    """An order of an epoch in which rows of like length come together, hence into the same steps.

    Each shard's rows are taken in windows, in each sorted by length and cut into strata, and the strata come in an
    order drawn for the window, the same for all shards. As a step is a slice at the same relative place of every shard,
    it finds rows of about one length in all of them; which rows it finds depends on no number of workers. It takes some
    thousands of rows: with one or two in a shard there is nothing to sort.

    Args:
        shuffled: positions of the rows, sorted by shard, in the epoch's random order within each.
        shards, lengths: of the rows at these positions; shape (n,).
        rows: over all workers.
    Returns: `shuffled`, reordered within each shard.
    """
    windows = max(1, rows // (VIRTUAL_SHARDS * _WINDOW_OF_SHARD))
    sizes = np.bincount(shards[shuffled], minlength=VIRTUAL_SHARDS)
    within = np.arange(len(shuffled)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    window = within * windows // np.repeat(sizes, sizes)
    order = np.lexsort((within, lengths[shuffled], window, shards[shuffled]))
    # The place of each row in its window by length, as a share of the window, tells its stratum.
    key = shards[shuffled][order] * windows + window[order]
    _, starts, counts = np.unique(key, return_index=True, return_counts=True)
    rank = np.arange(len(key)) - np.repeat(starts, counts)
    stratum = rank * _STRATA // np.repeat(counts, counts)
    turns = mix(np.arange(windows * _STRATA, dtype=np.uint64), seed, epoch).reshape(windows, _STRATA)
    turn = np.argsort(np.argsort(turns, axis=1), axis=1)[window[order], stratum]
    again = np.lexsort((within[order], turn, key))
    result: np.ndarray = shuffled[order[again]]
    return result


def epoch_order(
    hashes: np.ndarray,
    place_of_own: np.ndarray,
    epoch: int,
    seed: int,
    lengths: np.ndarray | None = None,
    rows: int = 0,
    block: int = 0,
) -> np.ndarray:
    """This worker's rows of one epoch in global order, as positions in `static_order`.

    In blocks, a shard's rows come block after block, in an order drawn for the epoch, and in drawn order within each:
    what lies together on disk is read together (Xu et al., 2022, "CorgiPile", arXiv:2206.05830). What a block holds is
    decided by the rows' hashes, so it is a sample of the data, and the global batches depend on no number of workers.

    Args:
        hashes: in static order, shape (n,), uint64.
        place_of_own: from `OrderPlan`.
        lengths: of the rows, to bring those of like length together (`by_length`); shape (n,).
        rows: over all workers.
        block: rows of a block; 0: every row of the shard comes when it likes.
    Returns: shape (n,), int64; the first `rows_TW[0, rank]` of them are the rows of step 0, and so on.
    """
    shards = shard_of(hashes)
    draws = mix(hashes, seed, epoch)
    keys = [draws, shards]  # lexsort is stable: equal hashes keep their order
    if block:
        numbers = block_numbers(shards, block)
        first = hashes[np.searchsorted(numbers, numbers)]  # the same whichever shards this worker owns
        keys.insert(1, mix(first, seed, epoch, _BLOCKS))
    shuffled = np.lexsort(keys)
    if lengths is not None:
        shuffled = by_length(shuffled, shards, lengths, rows, epoch, seed)
    return shuffled[np.argsort(place_of_own)]
