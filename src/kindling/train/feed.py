"""One worker's rows of a stream, handed out step by step in an order that no network decides.

Which row comes when is decided in `order.py`; where rows lie is `spool.py`'s business. No Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kindling.train.order import VIRTUAL_SHARDS as V
from kindling.train.order import OrderPlan, block_numbers, epoch_order, shard_of, static_order

if TYPE_CHECKING:
    from kindling.train.spool import Rows


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows: their packed columns, and the hashes that tell them apart wherever they are."""

    arrays: dict[str, np.ndarray]
    """Packed column name -> array of shape (n, ...)."""
    hashes: np.ndarray
    """Shape (n,), uint64."""

    def __len__(self) -> int:
        return len(self.hashes)

    def parts(self, count: int) -> list[Slice]:
        """The rows in order, in at most `count` parts whose sizes differ by one at most; none without rows."""
        count = min(count, len(self))
        if count <= 1:
            return [self] if len(self) else []
        stops = [len(self) * part // count for part in range(count + 1)]
        return [
            Slice({name: array[start:stop] for name, array in self.arrays.items()}, self.hashes[start:stop])
            for start, stop in pairwise(stops)
        ]


BLOCK_BYTES = 1 << 20
"""Of rows that are read together: as long as a disk takes to seek twice."""


class Feed:
    """One worker's rows of a stream.

    Args: blocks: rows lie in static order (`Spool.in_order`), and an epoch takes them in blocks.
    """

    def __init__(self, rows: Rows, *, blocks: bool = False) -> None:
        self._rows = rows
        self._block = max(1, BLOCK_BYTES // max(1, rows.row_bytes)) if blocks else 0
        self._static = static_order(rows.hashes, rows.content_of)
        self._hashes = rows.hashes[self._static]

    def __len__(self) -> int:
        return len(self._rows)

    def counts(self) -> np.ndarray:
        """Rows of each virtual shard here, shape (V,), int64."""
        return np.bincount(shard_of(self._hashes), minlength=V)

    def epoch(
        self, plan: OrderPlan, rank: int, epoch: int, seed: int, first: int = 0, length_column: str | None = None
    ) -> Iterator[Slice]:
        """The rows of each step of an epoch, from its step `first` on; a step without rows here gives none.

        Args: length_column: a packed column; rows of about the same number there come into the same steps.
        """
        lengths = None if length_column is None else np.asarray(self._rows.columns[length_column])[self._static]
        rows = int(plan.rows_TW.sum())
        places = epoch_order(self._hashes, plan.place_of_own, epoch, seed, lengths, rows, self._block)
        ahead = self._reader() if self._block else lambda _: None
        stops = np.cumsum(plan.rows_TW[:, rank])
        starts = stops - plan.rows_TW[:, rank]
        for start, stop in zip(starts[first:], stops[first:], strict=True):
            chosen = places[start:stop]
            ahead(chosen)
            yield Slice(self._rows.gather(self._static[chosen]), self._hashes[chosen])

    def _reader(self) -> Callable[[np.ndarray], None]:
        """Called with the rows of each step, it has blocks read when their first row comes."""
        numbers = block_numbers(shard_of(self._hashes), self._block)
        edges = np.append(np.flatnonzero(np.diff(numbers, prepend=-1)), len(numbers))
        read = np.zeros(len(edges) - 1, bool)

        def ahead(chosen: np.ndarray) -> None:
            for number in np.unique(numbers[chosen]):
                if not read[number]:
                    read[number] = True
                    self._rows.will_need(int(edges[number]), int(edges[number + 1]))

        return ahead

    def column(self, name: str) -> np.ndarray:
        """One packed column, in order of arrival."""
        return self._rows.columns[name]

    def in_order(self, batch_rows: int) -> Iterator[Slice]:
        """All rows once, in static order."""
        for start in range(0, len(self._static), batch_rows):
            stop = start + batch_rows
            yield Slice(self._rows.gather(self._static[start:stop]), self._hashes[start:stop])
