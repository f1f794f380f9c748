"""`split` and `labels`: stable, complete, disjoint; exact where stratified."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kindling import read
from kindling.errors import ConfigError, DataError
from kindling.read.splits import _first_rows

pytestmark = [pytest.mark.spark]

ROWS = [(f"file:/photos/{n % 7}/{n}.jpg", f"c{n % 7}", n) for n in range(700)]


def frame(spark: Any, rows: list[Any], schema: str = "path string, label string, n long") -> Any:
    return spark.createDataFrame(rows, schema)


def paths(side: Any) -> set[str]:
    return {row.path for row in side.select("path").collect()}


@pytest.mark.sessions
def test_each_row_falls_on_one_side(spark: Any) -> None:
    df = frame(spark, ROWS)
    train, valid, test = read.split(df, 0.7, 0.15, 0.15)
    sides = [paths(side) for side in (train, valid, test)]
    assert sum(len(side) for side in sides) == 700
    assert set.union(*sides) == {path for path, _, _ in ROWS}
    assert train.columns == df.columns
    for side, share in zip(sides, (0.7, 0.15, 0.15), strict=True):
        # Five standard deviations of a fair draw.
        assert abs(len(side) - 700 * share) < 5 * math.sqrt(700 * share * (1 - share))


def test_sides_are_those_of_every_other_run_and_version(spark: Any) -> None:
    """The side of a path is a promise: these must never change."""
    _, other = read.split(frame(spark, ROWS[:20]), 0.5, 0.5)
    assert sorted(row.n for row in other.collect()) == [3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 16, 18, 19]


def test_rows_that_are_added_move_none_that_were_there(spark: Any) -> None:
    few = [paths(side) for side in read.split(frame(spark, ROWS[:300]), 0.7, 0.2, 0.1)]
    # In another order, other partitions, with another column, among more rows.
    more = frame(spark, [(p, "x", n, 1.0) for p, _, n in reversed(ROWS)], "path string, label string, n long, w double")
    many = [paths(side) for side in read.split(more.repartition(5), 0.7, 0.2, 0.1)]
    for before, after in zip(few, many, strict=True):
        assert before < after


def test_seeds_and_keys_decide(spark: Any) -> None:
    df = frame(spark, ROWS)
    first = paths(read.split(df, 0.5, 0.5)[0])
    assert paths(read.split(df, 0.5, 0.5, seed=0)[0]) == first
    other = paths(read.split(df, 0.5, 0.5, seed=1)[0])
    assert 100 < len(first & other) < 250  # independent halves share a quarter
    by_label = read.split(df, 0.5, 0.5, by="label")
    assert not {row.label for row in by_label[0].collect()} & {row.label for row in by_label[1].collect()}
    assert paths(read.split(df, 0.5, 0.5, by=["path", "n"])[0]) != first


def test_rows_of_one_key_stay_together(spark: Any) -> None:
    df = frame(spark, [(p, label, n + copy) for p, label, n in ROWS[:50] for copy in range(3)])
    for stratify in (False, True):
        left, right = read.split(df, 0.5, 0.5, stratify=stratify)
        assert not paths(left) & paths(right)
        assert left.count() + right.count() == 150


def test_rows_without_a_key_are_not_lost(spark: Any) -> None:
    df = frame(spark, [(None, "a", n) for n in range(5)] + ROWS[:10])
    assert sorted(side.where("path is null").count() for side in read.split(df, 0.5, 0.5)) == [0, 5]


@pytest.mark.sessions(slow=True)
def test_stratified_shares_are_exact_in_each_class(spark: Any) -> None:
    sizes = {"a": 100, "b": 33, "c": 7, "d": 2, "e": 1, None: 10}
    rows = [(f"{label}{n}", label, n) for label, size in sizes.items() for n in range(size)]
    shares = (0.7, 0.15, 0.15)
    sides = read.split(frame(spark, rows), *shares, stratify=True)
    seen = [Counter(row.label for row in side.collect()) for side in sides]
    for label, size in sizes.items():
        got = [side[label] for side in seen]
        assert sum(got) == size
        assert all(abs(n - size * share) < 1 for n, share in zip(got, shares, strict=True))
    assert [side["a"] for side in seen] == [70, 15, 15]
    assert set.union(*(paths(side) for side in sides)) == {path for path, _, _ in rows}
    again = read.split(frame(spark, rows[::-1]).repartition(3), *shares, stratify=True)
    assert [paths(side) for side in again] == [paths(side) for side in sides]
    assert [paths(side) for side in read.split(frame(spark, rows), *shares, stratify=True, seed=5)] != [
        paths(side) for side in sides
    ]


def test_stratified_by_a_column_of_numbers_with_an_odd_name(spark: Any) -> None:
    df = frame(spark, [(str(n), n % 4) for n in range(80)], "path string, `the.class` int")
    left, right = read.split(df, 0.25, 0.75, stratify=True, column="the.class")
    assert Counter(row[1] for row in left.collect()) == dict.fromkeys(range(4), 5)
    assert right.count() == 60
    assert left.columns == ["path", "the.class"]


@pytest.mark.parametrize(
    ("n", "shares", "firsts"),
    [
        (100, (0.7, 0.15, 0.15), [70, 85]),
        (30, (0.7, 0.15, 0.15), [21, 26]),
        (1, (0.7, 0.15, 0.15), [1, 1]),
        (0, (0.5, 0.5), [0]),
        (3, (1 / 3, 1 / 3, 1 / 3), [1, 2]),
        (10, (0.1, 0.2, 0.7), [1, 3]),
        (2, (0.2, 0.2, 0.6), [1, 1]),
        (5, (1.0,), []),
    ],
)
def test_largest_remainder(n: int, shares: tuple[float, ...], firsts: list[int]) -> None:
    assert _first_rows(n, shares) == firsts


def test_an_empty_frame_splits_into_empty_sides(spark: Any) -> None:
    for stratify in (False, True):
        sides = read.split(frame(spark, []), 0.5, 0.5, stratify=stratify)
        assert [side.count() for side in sides] == [0, 0]
        assert sides.counts() == {}
        assert "total" in str(sides)


@pytest.mark.sessions
def test_the_report_counts_each_class(spark: Any) -> None:
    sides = read.split(frame(spark, ROWS), 0.8, 0.2, stratify=True)
    assert sides.counts() == {f"c{n}": (80, 20) for n in range(7)}
    lines = str(sides).splitlines()
    assert lines[0].split() == ["asked", "80.00%", "20.00%"]
    assert lines[1].split() == ["total", "560", "80.00%", "140", "20.00%"]
    assert lines[2].split() == ["c0", "80", "80.00%", "20", "20.00%"]
    assert sides.shares == (0.8, 0.2)
    plain = read.split(frame(spark, [(str(n),) for n in range(50)], "path string"), 0.5, 0.5)
    assert sum(plain.counts()[""]) == 50


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((), "is no way to split"),
        ((0.7, 0.2), "sums to 0.9, not to 1"),
        ((0.7, 0.4), "sums to 1.1, not to 1"),
        ((1.0, 0.0), "has a side that can hold no rows"),
        ((1.5, -0.5), "has a side that can hold no rows"),
        ((float("nan"), 1.0), "has a side that can hold no rows"),
        (("a",), "has a side that can hold no rows"),
    ],
)
def test_shares_that_cannot_be_are_refused(spark: Any, shares: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read.split(frame(spark, ROWS[:1]), *shares)


def test_shares_need_to_sum_to_1_only_nearly(spark: Any) -> None:
    thirds = read.split(frame(spark, ROWS), 1 / 3, 1 / 3, 1 / 3)
    tenths = read.split(frame(spark, ROWS), *[0.1] * 10)
    assert sum(side.count() for side in thirds) == 700
    assert len(tenths) == 10
    assert read.split(frame(spark, ROWS), 1.0)[0].count() == 700


def test_missing_columns_are_named_with_near_misses(spark: Any) -> None:
    df = frame(spark, ROWS[:1])
    with pytest.raises(DataError, match=r"column 'paht', to split by, is missing. Did you mean 'path'"):
        read.split(df, 0.5, 0.5, by="paht")
    with pytest.raises(DataError, match="column 'klass', to split by, is missing"):
        read.split(df, 0.5, 0.5, stratify=True, column="klass")
    with pytest.raises(ConfigError, match="is no key"):
        read.split(df, 1.0, by=[])
    with pytest.raises(DataError, match=r"column 'lable' is missing. Did you mean 'label'"):
        read.labels(df, "lable")


@pytest.mark.sessions
def test_labels_are_sorted_as_people_sort_them(spark: Any) -> None:
    text = frame(spark, [("10",), ("9",), ("b",), (None,), ("9",)], "label string")
    assert read.labels(text) == ("10", "9", "b")
    assert read.labels(frame(spark, [("10",), ("9",), ("-1",)], "label string")) == ("-1", "9", "10")
    assert read.labels(frame(spark, [(10,), (9,)], "label int")) == ("9", "10")
    assert read.labels(frame(spark, [(4.0,), (0.5,)], "label double")) == ("0.5", "4")
    assert read.labels(frame(spark, [(True,), (False,)], "label boolean")) == ("false", "true")
    assert read.labels(frame(spark, [("x",)], "`a.b` string"), "a.b") == ("x",)
    for rows in ([], [(None,)]):
        with pytest.raises(DataError, match="holds no label"):
            read.labels(frame(spark, rows, "label string"))


def test_sides_of_photos_open_only_their_own_files(spark: Any, tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n}.jpg").write_bytes(b"x")
    train, test = read.split(read.images(tmp_path, spark=spark), 0.5, 0.5)
    mine = paths(train)
    for path in paths(test):
        Path(path.removeprefix("file:")).unlink()  # whoever opens these now fails
    assert {row.path for row in train.collect()} == mine
