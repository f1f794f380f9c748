"""What came of a search: one record per trial, and the best trial's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kindling.model import Model

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
_MARKS = {FINISHED: "", PRUNED: "given up", FAILED: "failed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial, over."""

    number: int
    params: Mapping[str, Any]
    state: str
    """`"finished"`, `"pruned"` (ended early, others were better) or `"failed"`."""
    value: float | None
    """What is compared: of the weights that the trial gave; None if it failed."""
    values: Sequence[float]
    """After each epoch that was measured."""
    epochs: int
    """That were trained."""
    seconds: float
    """From the building of its model to the trained one."""
    error: str | None = None
    """Why it failed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**data)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SearchResult:
    """The trials by number, and the best of those that came to their end.

    `str()` gives a table, best trials first.
    """

    best_model: Model
    """Trained, and whole: it takes raw rows."""
    best: Trial
    trials: tuple[Trial, ...]
    metric: str
    smaller_is_better: bool

    @property
    def best_params(self) -> dict[str, Any]:
        return dict(self.best.params)

    @property
    def best_value(self) -> float:
        assert self.best.value is not None
        return self.best.value

    def to_json(self) -> dict[str, Any]:
        return table(self.trials, self.metric, self.smaller_is_better, self.best)

    def __repr__(self) -> str:
        return f"SearchResult of {len(self.trials)} trials: {self.metric} {self.best_value:.4g} by {self.best_params}"

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        rows = [["trial", self.metric, *names, "epochs", "seconds", ""]]
        for trial in ranked(self.trials, self.smaller_is_better):
            value = "" if trial.value is None else f"{trial.value:.4f}"
            params = [_text(trial.params.get(name)) for name in names]
            told = trial.error or _MARKS[trial.state]
            told = told if len(told) < 60 else f"{told[:57]}..."
            rows.append([str(trial.number), value, *params, str(trial.epochs), f"{trial.seconds:.1f}", told])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)) for row in rows]
        return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def ranked(trials: Sequence[Trial], smaller_is_better: bool) -> list[Trial]:
    """Finished ones first, best first; then those given up, then those that failed."""
    sign = 1 if smaller_is_better else -1
    order = (FINISHED, PRUNED, FAILED)
    return sorted(trials, key=lambda t: (order.index(t.state), sign * (t.value or 0.0), t.number))


def table(trials: Sequence[Trial], metric: str, smaller_is_better: bool, best: Trial) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "metric": metric,
        "mode": "min" if smaller_is_better else "max",
        "best": best.number,
        "trials": [trial.to_json() for trial in trials],
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
