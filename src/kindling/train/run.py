"""The run directory: what a run was asked for, how far it came, and whether a call asks for the same again.

`run.json` holds the first call, `calls/N.json` each later one that went on with the run, `result.json` and `model/` the
end. Comparing is a matter of two JSON values; `train/fit.py` makes them, `checkpoint.py` holds what the workers need.
Importing this loads neither torch nor Spark.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError
from kindling.storage import Place, open_place

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession

VERSION = 2
"""Of what `run.json` holds."""
RESUME = ("auto", "always", "never", "anyway")
_FREE = (
    "workers",
    "threads",
    "started_unix_s",
    "run",
    "version",
    "versions",
    "global_batch",
    "prefix_precision",
    "about",
)
"""What may differ between two calls of one run, beside its length and its checkpoints."""
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory that holds a run.

    >>> Run.open("memory://nowhere")
    Traceback (most recent call last):
    kindling.errors.ConfigError: run='memory://nowhere' holds no run. Name the directory that fit was given as run=...
    """

    place: Place
    asked: Mapping[str, Any]
    """The newest call, as JSON."""
    calls: int
    """How many there were."""
    result: Mapping[str, Any] | None
    """What the run came to, where it has come to its end."""

    @classmethod
    def open(cls, path: str | Path, *, spark: SparkSession | None = None) -> Run:
        """The run in a directory.

        Raises: ConfigError, where there is none; StorageError.
        """
        found = cls.find(open_place(path, spark))
        if found is None:
            raise ConfigError("run", str(path), "holds no run", "Name the directory that fit was given as run=...")
        return found

    @classmethod
    def find(cls, place: Place) -> Run | None:
        """The run in a place, if there is one."""
        if not place.exists("run.json"):
            return None
        later = sorted(place.list("calls"), key=lambda name: int(name.rpartition("/")[2].removesuffix(".json")))
        asked = json.loads(place.read(later[-1] if later else "run.json"))
        if asked.get("version") != VERSION:
            raise ConfigError("run", place.path, "holds a run of another version of kindling", "Name a new directory")
        result = json.loads(place.read("result.json")) if place.exists("result.json") else None
        return cls(place, asked, 1 + len(later), result)


def ended(run: Run, asked: Mapping[str, Any]) -> bool:
    """Whether a run has come to the end that a call asks for."""
    if run.result is None:
        return False
    length = ("epochs", "max_steps", "max_seconds")
    return all(run.result["settings"].get(name) == asked["settings"].get(name) for name in length)


def global_batch(own: int, asked: Mapping[str, Any], earlier: Run | None) -> int:
    """Rows of a step over all workers: of the run that is gone on with, where its batch size is asked for again.

    Args: own: what the call asks for with its own number of workers.
    """
    if earlier is None or any(
        earlier.asked["settings"][name] != asked["settings"][name] for name in ("batch_size", "accumulate")
    ):
        return own
    return int(earlier.asked["global_batch"])


def write_call(place: Place, asked: Mapping[str, Any], calls: int) -> None:
    """Keep what a call asks for, beside those of earlier calls: nothing that was written is changed."""
    name = "run.json" if calls == 0 else f"calls/{calls}.json"
    place.write(name, json.dumps(asked, indent=1).encode())


def versions() -> dict[str, str]:
    """What computes here."""
    import torch

    import kindling

    return {"kindling": kindling.__version__, "torch": torch.__version__, "python": platform.python_version()}


# ----------------------------------------------------------------------------------------------------- comparing


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a call asks for otherwise than an earlier one, one line each; what may change is left out.

    The number of workers may change, since the global batch then stays; so may versions, threads, and the length of the
    training, as long as it does not fall behind what was asked for before.

    >>> changes({"settings": {"seed": 0, "epochs": 2}, "loss": "MSELoss"}, {"settings": {"seed": 1, "epochs": 5}})
    ["loss: was 'MSELoss', is None", 'settings.seed: was 0, is 1']
    """
    found = []
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for path in sorted(old.keys() | new.keys()):
        was, is_now = old.get(path), new.get(path)
        if was == is_now or path.partition(".")[0] in _FREE or path.startswith("settings.checkpoints."):
            continue
        if _is_longer(path, was, is_now):
            continue
        if path in ("settings.batch_size", "settings.accumulate") and _global(before) == _global(now):
            continue
        if path.startswith("identity.code.") and _python(before) != _python(now):
            continue  # the bytes of a function's code belong to one version of Python
        found.append(f"{_NAMES.get(path, path)}: was {_short(was)}, is {_short(is_now)}")
    return found


_NAMES = {
    "identity.weights": "the model's weights before training",
    "identity.architecture": "the model's architecture",
    "identity.preparation": "the preparation",
    "identity.labels": "the labels",
    "identity.frozen": "the frozen layers",
    "identity.code.optimizer": "the code of the optimizer",
    "identity.code.loss": "the code of the loss",
    "identity.code.schedule": "the code of the schedule",
}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _is_longer(path: str, was: Any, now: Any) -> bool:
    """A run may be given more time, and none of the limits it had."""
    if path == "settings.epochs":
        return isinstance(was, int) and isinstance(now, int) and now >= was
    if path in ("settings.max_steps", "settings.max_seconds"):
        return now is None or (was is not None and now >= was)
    return False


def _global(asked: Mapping[str, Any]) -> Any:
    return asked.get("global_batch")


def _python(asked: Mapping[str, Any]) -> Any:
    return asked.get("versions", {}).get("python", "").rpartition(".")[0]


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) == 66 and all(c in "0123456789abcdef" for c in text[1:-1]):  # a SHA-256
        return f"{text[1:9]}..."
    return text if len(text) <= 60 else f"{text[:57]}..."


def said(found: list[str]) -> str:
    """The changes as one sentence, cut where there are very many."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def touches(found: list[str], what: str) -> bool:
    """Whether the changes are of the loss, the optimizer or the schedule, or of its code.

    >>> touches(["optimizer: was 'SGD(lr=0.1)', is 'SGD(lr=0.2)'"], "optimizer")
    True
    """
    return any(line.startswith((f"{what}:", f"the code of the {what}:")) for line in found)


def refuse(run: str, found: list[str]) -> ConfigError:
    """The error for a call that does not go on with a run."""
    return ConfigError(
        "run",
        run,
        f"holds a run that was asked for otherwise: {said(found)}",
        "Ask for the same again, name a new directory, or go on regardless with resume='anyway'",
    )


# --------------------------------------------------------------------------------------------------- fingerprints


def model_digests(module: Any, inputs: int) -> dict[str, str]:
    """SHA-256 of a module's architecture and of its weights, each as hex; equal in every process."""
    import torch

    from kindling import graph

    try:
        shown: Any = graph.to_json(module, inputs=inputs)
        shown = {key: value for key, value in shown.items() if key not in ("notes", "fixed")}
    except Exception:  # a module of the user's own code, which may fail in any way: its layers and their settings
        shown = [[name, _qualified(type(part)), part.extra_repr()] for name, part in module.named_modules()]
    weights = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        weights.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        if plain.numel():
            weights.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(shown, sort_keys=True, default=repr)
    return {"architecture": hashlib.sha256(text.encode()).hexdigest(), "weights": weights.hexdigest()}


def code_digest(thing: Any) -> str:
    """SHA-256, as hex, of a function, class or settings object: what it is made of, not where it lies in memory.

    >>> code_digest(partial(sum, start=1)) == code_digest(partial(sum, start=1)) != code_digest(partial(sum, start=2))
    True
    """
    total = hashlib.sha256()
    for text in _made_of(thing, {}):
        total.update(f"{text}\n".encode())
    return total.hexdigest()


_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_LIBRARIES = ("torch", "numpy", "builtins", "kindling")
"""Their functions are what their names say; versions are kept beside."""


def _made_of(thing: Any, seen: dict[int, Any]) -> Iterator[str]:
    if isinstance(thing, _PLAIN):
        yield repr(thing)
        return
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept, so that its number is not given to another
    home = getattr(thing, "__module__", None) or ""
    if isinstance(thing, partial):
        for part in (thing.func, thing.args, thing.keywords):
            yield from _made_of(part, seen)
    elif isinstance(thing, types.BuiltinFunctionType) or (
        isinstance(thing, types.FunctionType) and home.partition(".")[0] in _LIBRARIES
    ):
        yield f"{home}.{thing.__qualname__}"
    elif isinstance(thing, types.FunctionType | types.MethodType):
        function = thing.__func__ if isinstance(thing, types.MethodType) else thing
        yield from _made_of(function.__code__, seen)
        yield from _made_of(function.__defaults__, seen)
        yield from _made_of(function.__kwdefaults__, seen)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield from _made_of(cell.cell_contents, seen)
        if isinstance(thing, types.MethodType):
            yield from _made_of(thing.__self__, seen)
    elif isinstance(thing, types.CodeType):
        yield f"code {thing.co_code.hex()} {thing.co_names} {thing.co_varnames}"
        for constant in thing.co_consts:
            yield from _made_of(constant, seen)
    elif isinstance(thing, type):
        yield _qualified(thing)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield repr(key)
            yield from _made_of(value, seen)
    elif isinstance(thing, list | tuple):
        yield f"{type(thing).__name__} {len(thing)}"
        for item in thing:
            yield from _made_of(item, seen)
    elif isinstance(thing, set | frozenset):
        yield f"set {sorted(map(repr, thing))}"
    else:
        yield _qualified(type(thing))
        if is_dataclass(thing):
            yield from _made_of({field.name: getattr(thing, field.name) for field in fields(thing)}, seen)
        elif hasattr(thing, "numpy"):  # a tensor
            yield f"{getattr(thing, 'dtype', None)} {thing.detach().cpu().tolist()}"
        elif hasattr(thing, "__dict__"):
            yield from _made_of(vars(thing), seen)


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
