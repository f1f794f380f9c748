"""What may be tried, and who proposes it: grids, chance, Optuna. No Spark."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import pytest

from kindling.errors import ConfigError, MissingExtraError
from kindling.tune import sampling, space
from kindling.tune.result import FAILED, FINISHED, PRUNED, Trial
from kindling.tune.space import Integer, LogUniform, Uniform


def ended(number: int, params: space.Params, value: float | None, state: str = FINISHED) -> Trial:
    values = [] if value is None else [value]
    return Trial(number=number, params=params, state=state, value=value, values=values, epochs=1, seconds=0.0)


def chosen(name: str | None, points: Any, trials: int | None = None, seed: int = 0) -> list[space.Params]:
    sampler, count, _ = sampling.choose(name, points, trials=trials, seed=seed, smaller_is_better=True)
    return [sampler.propose(number) for number in range(count)]


def test_a_grid_has_every_point_once() -> None:
    points = chosen("grid", {"a": (1, 2, 3), "b": ("x", "y"), "c": (True,)})
    assert len(points) == 6
    assert {(p["a"], p["b"], p["c"]) for p in points} == set(itertools.product((1, 2, 3), "xy", (True,)))


@pytest.mark.parametrize(
    ("values", "least", "most", "middle"),
    [
        (Uniform(-1.0, 3.0), -1.0, 3.0, 1.0),
        (LogUniform(1e-4, 1.0), 1e-4, 1.0, 1e-2),
        (Integer(1, 5), 1, 5, 3),
        (Integer(1, 10_000, log=True), 1, 10_000, 85),  # the middle of the logarithms of 0.5 and 10,000.5 is 71
    ],
    ids=["uniform", "log", "integer", "log integer"],
)
def test_ranges_are_drawn_from_end_to_end(values: Any, least: float, most: float, middle: float) -> None:
    points = chosen("random", {"x": values}, trials=2000)
    drawn = sorted(float(point["x"]) for point in points)  # type: ignore[arg-type]
    assert least <= drawn[0] <= drawn[-1] <= most
    below = sum(x <= middle for x in drawn) / 2000
    expected = 0.6 if isinstance(values, Integer) and not values.log else 0.5
    assert below == pytest.approx(expected, abs=0.05)
    if isinstance(values, Integer):
        assert {type(point["x"]) for point in points} == {int}
        if not values.log:
            assert set(drawn) == {1, 2, 3, 4, 5}


def test_chance_is_repeatable_and_more_trials_begin_with_the_same() -> None:
    points = {"lr": LogUniform(1e-4, 1e-1), "hidden": (64, 128), "depth": Integer(1, 4)}
    twenty = chosen("random", points, trials=20, seed=7)
    assert chosen("random", points, trials=50, seed=7)[:20] == twenty
    assert chosen("random", points, trials=20, seed=8) != twenty
    assert len({point["lr"] for point in twenty}) == 20


def test_chance_takes_a_point_of_a_list_once() -> None:
    lists = {"a": (1, 2, 3), "b": ("x", "y")}
    points = chosen("random", lists, trials=50)
    assert sorted(map(repr, points)) == sorted(map(repr, space.grid(lists)))
    assert points != space.grid(lists)
    assert chosen("random", lists, trials=4) == points[:4]


def test_without_a_name_lists_are_a_grid_and_ranges_are_drawn() -> None:
    lists: Any = {"a": (1, 2)}
    assert sampling.choose(None, lists, trials=None, seed=0, smaller_is_better=True)[1:] == (2, "grid")
    assert sampling.choose(None, lists, trials=1, seed=0, smaller_is_better=True)[1:] == (1, "random")
    ranges: Any = {"a": Uniform(0, 1)}
    assert sampling.choose(None, ranges, trials=None, seed=0, smaller_is_better=True)[1:] == (20, "random")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "leaves nothing to try"),
        ({"a": []}, r"space\['a'\]=\[\] leaves nothing to try"),
        ({"a": "adam"}, "neither a list of values nor a range"),
        ({"a": 3}, "neither a list of values nor a range"),
        ({"a": [object()]}, "cannot be written down"),
        ({"a": [1, 2, 1]}, "names a value twice"),
    ],
    ids=str,
)
def test_a_space_that_cannot_be_tried_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        space.read_space(given)


@pytest.mark.parametrize("make", [lambda: LogUniform(0, 1), lambda: Uniform(1, math.inf), lambda: Integer(2, 1)])
def test_a_range_without_ends_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"Begin above 0|two numbers|a higher one"):
        make()


@pytest.mark.parametrize(
    ("name", "trials", "words"),
    [
        ("grid", None, "is no list, and a grid takes every value"),
        ("random", 0, "trials=0 is no count"),
        ("bayes", None, "sampler='bayes' is none"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused(name: str, trials: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(name, {"a": Uniform(0, 1)}, trials=trials)


def test_a_part_of_a_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="would leave points of the grid out"):
        chosen("grid", {"a": (1, 2)}, trials=1)


def test_tpe_learns_from_what_became_of_earlier_trials() -> None:
    pytest.importorskip("optuna")
    points: Any = {"x": Uniform(-10, 10), "y": LogUniform(1e-4, 1e4), "kind": ("far", "near")}

    def loss(point: space.Params) -> float:
        x, y = float(point["x"]), math.log10(float(point["y"]))  # type: ignore[arg-type]
        return (x - 3) ** 2 + (y + 1) ** 2 + (5 if point["kind"] == "far" else 0)

    sampler, count, _ = sampling.choose("tpe", points, trials=60, seed=1, smaller_is_better=True)
    seen = []
    for number in range(count):
        point = sampler.propose(number)
        seen.append((loss(point), point))
        state = (FAILED, PRUNED, FINISHED)[min(number % 7, 2)]
        sampler.tell(ended(number, point, None if state == FAILED else loss(point), state))
    late = [value for value, _ in seen[40:]]
    chance = [loss(point) for point in chosen("random", points, trials=60, seed=1)]
    assert sorted(late)[10] < sorted(chance)[30] / 2
    # A new process that is told the same proposes from there: its median is far below chance as well.
    again, _, _ = sampling.choose("tpe", points, trials=60, seed=2, smaller_is_better=True)
    for number, (value, point) in enumerate(seen):
        again.tell(ended(number, point, value))
    further = [loss(again.propose(60 + number)) for number in range(11)]
    assert sorted(further)[5] < sorted(chance)[30] / 2


def test_tpe_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"needs optuna. Run: pip install 'kindling-spark\[search\]'"):
        chosen("tpe", {"a": Uniform(0, 1)})
