"""Steps for columns of tables, and arrays that are scaled."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from kindling.errors import ConfigError
from kindling.prepare import CategoryStep, LabelStep, NumberStep, Preparation, ScaledArrayStep


def rows(**columns: object) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def test_numbers_are_centred_scaled_and_filled() -> None:
    step = NumberStep("x", "x", mean=2.0, scale=10.0, missing=3.0)
    for values in ([1, None, 4], [1.0, math.nan, 4.0], ["1", None, " 4 "], [True, None, 4.0][:1] * 3):
        packed = step.pack(rows(x=values))
        assert not packed.errors
        expected = [[-10.0]] * 3 if values[0] is True else [[-10.0], [10.0], [20.0]]
        assert step.batch(packed.arrays).tolist() == expected


def test_rows_without_a_number_are_reported() -> None:
    packed = NumberStep("x", "x").pack(rows(x=["1", None, "one", "inf"]))
    assert packed.arrays["x"].tolist() == [1.0]
    assert packed.errors == {
        1: "column 'x' is null",
        2: "column 'x' holds 'one', not a number",
        3: "column 'x' holds inf, not a number",
    }
    lists = NumberStep("x", "x", missing=0.0).pack(rows(x=[[1.0], [2.0]]))
    assert lists.errors[0] == "column 'x' holds [1.0], not a number"


def test_categories_take_text_and_whole_numbers() -> None:
    step = CategoryStep("c", "c", ("1", "2", "3"), width=4)
    for values in (["2", "3", None], [2, 3, None], [2.0, 3.0, None]):
        packed = step.pack(rows(c=values))
        assert step.batch(packed.arrays).argmax(1).tolist() == [1, 2, 3]
        assert packed.arrays["c"].dtype == step.packed_spec()["c"][0]


def test_labels_still_read_whole_numbers_kept_as_floats() -> None:
    packed = LabelStep("y", "y", ("0", "1")).pack(rows(y=[1.0, 0.5, 0.0]))
    assert packed.arrays["y"].tolist() == [1, 0]
    assert list(packed.errors) == [1]


def test_arrays_are_scaled_as_a_whole_by_channel_or_by_number() -> None:
    x = np.arange(8.0).reshape(2, 2, 2)
    table = rows(x=[x.ravel().tolist()])
    for subtract, expected in (
        ((1.0,), x - 1),
        ((1.0, 2.0), x - np.array([1.0, 2.0])[:, None, None]),
        (tuple(range(8)), np.zeros((2, 2, 2))),
    ):
        step = ScaledArrayStep("x", "x", (2, 2, 2), subtract=tuple(map(float, subtract)), add=0.5)
        assert step.batch(step.pack(table).arrays).numpy() == pytest.approx(expected[None] + 0.5)


def test_steps_travel_as_json() -> None:
    steps = Preparation(
        (
            NumberStep("x", "x", 1.0, 2.0, missing=None),
            CategoryStep("c", "c", ("a", "b"), 2, True, "error"),
            ScaledArrayStep("a", "a", (2,), subtract=(1.0, 2.0)),
        )
    )
    assert Preparation.from_json(json.loads(json.dumps(steps.to_json()))) == steps


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="mean=nan is no finite number"):
        NumberStep("x", "x", mean=math.nan)
    with pytest.raises(ConfigError, match="levels"):
        CategoryStep("c", "c", ("a", "a"), 2)
    with pytest.raises(ConfigError, match="width=0"):
        CategoryStep("c", "c", ("a",), 0)
    with pytest.raises(ConfigError, match="unknown='drop'"):
        CategoryStep("c", "c", ("a",), 1, unknown="drop")
    with pytest.raises(ConfigError, match="3 numbers"):
        ScaledArrayStep("x", "x", (2,), subtract=(1.0, 2.0, 3.0))
