"""`split`: the same rows on the same side on every run, whatever is added later; and `labels`, the classes there are.

A row's side depends on the hash of its key and the seed alone. No row is moved, cached or read by splitting: each side
is a filter. Stratified splits need two passes over keys and labels (not over photos) to find where each class is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

_BITS = 53
"""Bits of the hash that place a row on [0, 1): as many as a float holds exactly."""
_PLACE, _SIDE, _LABEL, _RANK = "_kindling_place", "_kindling_side", "_kindling_label", "_kindling_rank"


class Splits(tuple["DataFrame", ...]):
    """The sides of a split, in the order of the shares: `train, valid, test = split(...)`.

    Printing it counts the rows of each class on each side, in one pass over keys and labels.
    """

    shares: tuple[float, ...]
    """The shares asked for."""
    _sides: DataFrame
    _label: str | None

    def __new__(
        cls, sides: Sequence[DataFrame], shares: Sequence[float], tagged: DataFrame, label: str | None
    ) -> Splits:
        self = super().__new__(cls, sides)
        self.shares, self._sides, self._label = tuple(shares), tagged, label
        return self

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Rows of each class, in the order of `labels`, on each side; the key is `""` where there is no label."""
        rows = self._sides.groupBy(_LABEL, _SIDE).count().collect()
        found: dict[str, list[int]] = {}
        for row in rows:
            found.setdefault(_name(row[_LABEL]), [0] * len(self.shares))[row[_SIDE]] += row["count"]
        return {name: tuple(found[name]) for name in _in_order(found)}

    def __str__(self) -> str:
        counts = self.counts()
        total = [sum(side) for side in zip(*counts.values(), strict=True)] if counts else [0] * len(self.shares)
        asked = "  ".join(f"{share:>14.2%}" for share in self.shares)
        width = max([len(name) for name in counts] + [5])
        lines = [f"{'asked':<{width}}  {asked}"]
        named = list(counts.items()) if self._label is not None else []
        for name, sides in [("total", tuple(total)), *named]:
            rows = sum(sides)
            cells = "  ".join(f"{side:>6} {side / rows if rows else 0:>7.2%}" for side in sides)
            lines.append(f"{name:<{width}}  {cells}")
        return "\n".join(lines)


def split(
    df: DataFrame,
    *shares: float,
    by: str | Sequence[str] = "path",
    seed: int = 0,
    stratify: bool = False,
    column: str = "label",
) -> Splits:
    """Cut a DataFrame into parts by a hash of each row's key: stable, disjoint, complete.

    A row's side depends only on its key and the seed: rows that are added later move none that were there, and rows
    with the same key (several crops of one photo, say) stay together. Shares are met as chance allows; `stratify=True`
    meets them exactly in each class (largest remainder; ties go to the earlier side) and gives up that stability (and
    keeps rows of one key together only where they have one label).

    Args:
        shares: one above 0 for each side; they must sum to 1 within 1e-9.
        by: the key: one column or several. Rows without a key (null) all fall on one side.
        seed: another seed, another split.
        stratify: exact shares per value of `column`. Runs two small jobs at once. Rows without a label are a class.
        column: the label column, also for the report; without it the report has totals only.
    Returns: a tuple of DataFrames with all columns of `df`; `print(split(...))` shows the shares per class.
    Raises: ConfigError, for shares that cannot be; DataError, for a column that is missing.

    >>> train, test = split(photos, .8, .2)  # doctest: +SKIP
    """
    from pyspark.sql import functions as F

    _check_shares(shares)
    keys = [by] if isinstance(by, str) else list(by)
    if not keys:
        raise ConfigError("by", by, "is no key to split by", "Name one column or more")
    for name in keys + ([column] if stratify else []):
        if name not in df.columns:
            raise DataError(f"column {name!r}, to split by, is missing.{did_you_mean(name, df.columns)}")
    has_label = column in df.columns
    place = F.shiftrightunsigned(F.xxhash64(F.lit(seed), *(F.col(_quoted(name)) for name in keys)), 64 - _BITS)
    label = F.col(_quoted(column)) if has_label else F.lit(None).cast("string")
    if stratify:
        side_of, joined = _stratified_side(df, place, label, shares)
    else:
        side_of, joined = _side(place, [F.lit(cut) for cut in _cuts(shares)]), df
    sides = [
        joined.where(side_of == number).select(*(F.col(_quoted(name)) for name in df.columns))
        for number in range(len(shares))
    ]
    tagged = joined.select(label.alias(_LABEL), side_of.alias(_SIDE))
    return Splits(sides, shares, tagged, column if has_label else None)


def labels(df: DataFrame, column: str = "label") -> tuple[str, ...]:
    """The values of a label column, each once, as text: in numeric order if all are numbers, else in that of text.

    Rows without a label (null) do not count. Runs one job over that column.

    Raises: DataError, where the column is missing or holds no label.

    >>> labels(photos)  # doctest: +SKIP
    ('accordion', 'airplanes', 'anchor')
    """
    if column not in df.columns:
        raise DataError(f"column {column!r} is missing.{did_you_mean(column, df.columns)}")
    rows = df.select(_quoted(column)).distinct().collect()
    names = {_name(row[0]) for row in rows if row[0] is not None}
    if not names:
        raise DataError(f"column {column!r} holds no label: there are no rows, or all are null.")
    return tuple(_in_order(names))


def _check_shares(shares: tuple[float, ...]) -> None:
    if not shares:
        raise ConfigError(
            "shares", shares, "is no way to split", "Give one share for each side, as in split(df, .8, .2)"
        )
    if any(not isinstance(share, int | float) or not math.isfinite(share) or share <= 0 for share in shares):
        raise ConfigError("shares", shares, "has a side that can hold no rows", "Give numbers above 0")
    total = math.fsum(shares)
    if abs(total - 1) > 1e-9:
        raise ConfigError("shares", shares, f"sums to {total:.10g}, not to 1", "Give a share to every row")


def _cuts(shares: Sequence[float]) -> list[int]:
    """Where each side but the last ends on the scale of the hash."""
    return [round(math.fsum(shares[: n + 1]) * 2**_BITS) for n in range(len(shares) - 1)]


def _side(place: Column, cuts: Sequence[Column]) -> Column:
    """Number of the side that `place` falls on: the count of the cuts at or below it."""
    from pyspark.sql import functions as F

    side = F.lit(0)
    for cut in cuts:
        side = side + (place >= cut).cast("int")
    return side


def _stratified_side(df: DataFrame, place: Column, label: Column, shares: Sequence[float]) -> tuple[Column, DataFrame]:
    """The side, and the frame it is a column of: each class is cut where its rows, in hash order, reach the shares."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    slim = df.select(label.alias(_LABEL), place.alias(_PLACE))
    sizes = {row[_LABEL]: row["count"] for row in slim.groupBy(_LABEL).count().collect()}
    session = df.sparkSession
    kind = slim.schema[_LABEL].dataType.simpleString()
    firsts = {name: _first_rows(n, shares) for name, n in sizes.items()}
    table = [(name, row) for name, rows in firsts.items() for row in set(rows)]
    wanted = session.createDataFrame(table or [(None, -1)], f"{_LABEL} {kind}, {_RANK} int")
    ranked = slim.withColumn(_RANK, F.row_number().over(Window.partitionBy(_LABEL).orderBy(_PLACE)) - 1)
    same = ranked[_LABEL].eqNullSafe(wanted[_LABEL]) & (ranked[_RANK] == wanted[_RANK])
    found = ranked.join(F.broadcast(wanted), same).select(ranked[_LABEL], ranked[_RANK], _PLACE).collect()
    at = {(row[_LABEL], row[_RANK]): row[_PLACE] for row in found}
    # A side that begins after the last row begins nowhere.
    ends = [(name, *(at.get((name, row), 2**_BITS) for row in rows)) for name, rows in firsts.items()]
    columns = [f"{_PLACE}{n}" for n in range(len(shares) - 1)]
    cuts = session.createDataFrame(
        ends or [(None, *[0] * len(columns))], ", ".join([f"{_LABEL} {kind}", *(f"{c} long" for c in columns)])
    )
    joined = df.join(F.broadcast(cuts), label.eqNullSafe(cuts[_LABEL]), "left")
    return _side(place, [F.col(name) for name in columns]), joined


def _first_rows(n: int, shares: Sequence[float]) -> list[int]:
    """Number of the first row of each side but the first, for `n` rows shared by largest remainder.

    >>> _first_rows(10, (.7, .15, .15))
    [7, 9]
    """
    exact = [share * n for share in shares]
    # A quota of 2.9999999999999996 is 3.
    rows = [math.floor(quota + 1e-9) for quota in exact]
    spare = sorted(range(len(shares)), key=lambda side: (-round(exact[side] - rows[side], 9), side))
    for side in spare[: n - sum(rows)]:
        rows[side] += 1
    return [sum(rows[: side + 1]) for side in range(len(shares) - 1)]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _name(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _in_order(names: Mapping[str, Any] | set[str]) -> Iterator[str]:
    try:
        yield from sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        yield from sorted(names)
