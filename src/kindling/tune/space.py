"""What a search may try: for each parameter a list of values, or a range. No torch, no Spark.

Parameters are numbers, texts and truth values, so that a trial can be written down and found again; what is neither (an
optimizer, a layer) is made of them by the function that builds a trial's model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kindling.errors import ConfigError

Value = str | int | float | bool | None
Params = dict[str, Value]


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any number from `low` to `high`, all alike.

    >>> Uniform(0.5, 0.5)
    Traceback (most recent call last):
    kindling.errors.ConfigError: Uniform=(0.5, 0.5) is no range. Give a low end and a higher one.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high)

    def draw(self, rng: np.random.Generator) -> float:
        """A number of the range."""
        return float(rng.uniform(self.low, self.high))


@dataclass(frozen=True, slots=True)
class LogUniform:
    """Any number from `low` to `high`, each order of magnitude alike: for rates and penalties."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, self.low, self.high, positive=True)

    def draw(self, rng: np.random.Generator) -> float:
        """A number of the range."""
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Integer:
    """Any whole number from `low` to `high`, both included; with `log`, each order of magnitude alike."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(end, int) for end in (self.low, self.high)):
            raise ConfigError("Integer", (self.low, self.high), "is no range of whole numbers", "Give two ints")
        _check_range(self, self.low, self.high, positive=self.log)

    def draw(self, rng: np.random.Generator) -> int:
        """A number of the range."""
        if not self.log:
            return int(rng.integers(self.low, self.high + 1))
        drawn = math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
        return min(max(round(drawn), self.low), self.high)


Range = Uniform | LogUniform | Integer
Space = Mapping[str, Range | tuple[Value, ...]]


def read_space(given: Mapping[str, Range | Sequence[Value]]) -> Space:
    """A user's space, checked: lists become tuples.

    >>> read_space({"lr": LogUniform(1e-4, 1e-1), "hidden": [64, 128]})
    {'lr': LogUniform(low=0.0001, high=0.1), 'hidden': (64, 128)}
    """
    if not given:
        raise ConfigError("space", dict(given), "leaves nothing to try", "Name parameters and their values")
    space: dict[str, Range | tuple[Value, ...]] = {}
    for name, values in given.items():
        if isinstance(values, Range):
            space[name] = values
            continue
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(
                f"space[{name!r}]", values, "is neither a list of values nor a range", "Use [1, 2] or LogUniform(1, 9)"
            )
        choices = tuple(values)
        if not choices:
            raise ConfigError(f"space[{name!r}]", values, "leaves nothing to try", "Give at least one value")
        for value in choices:
            if not isinstance(value, Value):
                raise ConfigError(
                    f"space[{name!r}]",
                    value,
                    "cannot be written down",
                    "Use numbers or texts, and let the function that builds the model make of them what it needs",
                )
        if len(set(map(repr, choices))) < len(choices):
            raise ConfigError(f"space[{name!r}]", values, "names a value twice", "Name each once")
        space[name] = choices
    return space


def to_json(space: Space) -> dict[str, Any]:
    """The space as JSON values.

    >>> to_json({"lr": Uniform(0.0, 1.0), "hidden": (64, 128)})
    {'lr': {'Uniform': [0.0, 1.0]}, 'hidden': [64, 128]}
    """
    return {
        name: list(values)
        if isinstance(values, tuple)
        else {type(values).__name__: [getattr(values, field) for field in type(values).__slots__]}
        for name, values in space.items()
    }


def size(space: Space) -> int | None:
    """How many points there are; None where a range makes them too many to count."""
    if all(isinstance(values, tuple) for values in space.values()):
        return math.prod(len(values) for values in space.values() if isinstance(values, tuple))
    return None


def grid(space: Space) -> list[Params]:
    """Every point of a space of lists; the last parameter changes first.

    >>> grid({"a": (1, 2), "b": ("x", "y")})
    [{'a': 1, 'b': 'x'}, {'a': 1, 'b': 'y'}, {'a': 2, 'b': 'x'}, {'a': 2, 'b': 'y'}]

    Raises: ConfigError, for a range.
    """
    lists = []
    for name, values in space.items():
        if not isinstance(values, tuple):
            raise ConfigError(
                f"space[{name!r}]", values, "is no list, and a grid takes every value", "List some, or draw at random"
            )
        lists.append(values)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*lists)]


def drawn(space: Space, seed: int) -> Iterator[Params]:
    """Points at random, each on its own: the n-th is the same whatever is drawn before it is used.

    Of a space of lists each point comes once.
    """
    seen: set[str] = set()
    limit = size(space)
    for number in itertools.count():
        rng = np.random.default_rng([seed % 2**63, number])
        point: Params = {}
        for name, values in space.items():
            point[name] = values[int(rng.integers(len(values)))] if isinstance(values, tuple) else values.draw(rng)
        if limit is not None:
            if repr(point) in seen:
                continue
            seen.add(repr(point))
        yield point
        if limit is not None and len(seen) == limit:
            return


def _check_range(given: Range, low: object, high: object, *, positive: bool = False) -> None:
    name = type(given).__name__
    for end in (low, high):
        if not isinstance(end, int | float) or isinstance(end, bool) or not math.isfinite(end):
            raise ConfigError(name, (low, high), "is no range", "Give two numbers")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if not low < high:
        raise ConfigError(name, (low, high), "is no range", "Give a low end and a higher one")
    if positive and low <= 0:
        raise ConfigError(name, (low, high), "has no logarithm at its low end", "Begin above 0")
