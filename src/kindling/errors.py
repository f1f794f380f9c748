"""The one small family of errors.

Every error a user can cause says what, the value seen, why, and the way on. All of them rebuild from their arguments,
so that they survive pickling and the trip from an executor to the driver (`errors.to_wire` and `errors.from_text`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from difflib import get_close_matches


class KindlingError(Exception):
    """Base of everything kindling raises on purpose."""


class ConfigError(KindlingError, ValueError):
    """A setting that cannot work.

    >>> str(ConfigError("workers", 0, "leaves nobody to train", "Use 1 or more"))
    'workers=0 leaves nobody to train. Use 1 or more.'
    """

    def __init__(self, field: str, value: object, because: str, hint: str) -> None:
        super().__init__(field, value, because, hint)  # every argument, so that pickle can rebuild it

    def __str__(self) -> str:
        field, value, because, hint = self.args
        return f"{field}={value!r} {because}. {hint}."


class MessageError(KindlingError):
    """Errors whose one argument is the whole message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(MessageError, ValueError):
    """Rows or columns that cannot be used: missing columns, unknown labels, wrong shapes, broken images, no rows."""


class ModelError(MessageError, ValueError):
    """A model that cannot do what was asked: unknown layer, an empty cut, a module that cannot be stored."""


class FormatError(MessageError, ValueError):
    """A file that is not what it should be: weights of another net, a truncated, altered or hostile bundle."""


class StorageError(MessageError, OSError):
    """A place that cannot be read or written from here."""


class SessionError(MessageError, RuntimeError):
    """The Spark session or the machine lacks something: Java, slots, a matching Python, files on the workers."""


class TrainingError(MessageError, RuntimeError):
    """Training that went wrong for a reason a retry cannot cure: a loss that is no number, a failing loss."""


class MissingExtraError(MessageError, ImportError):
    """An optional package that is not installed."""

    @classmethod
    def of(cls, what: str, package: str, extra: str) -> MissingExtraError:
        """The message with its cure.

        >>> str(MissingExtraError.of("Reading .h5 files", "h5py", "keras"))
        "Reading .h5 files needs h5py. Run: pip install 'kindling-spark[keras]'."
        """
        return cls(f"{what} needs {package}. Run: pip install 'kindling-spark[{extra}]'.")


def did_you_mean(seen: str, known: Iterable[str]) -> str:
    """A closing phrase that offers near misses, or lists the first names when nothing is near.

    >>> did_you_mean("fc22", ["fc1", "fc2"])
    " Did you mean 'fc2'?"
    >>> did_you_mean("zzz", ["fc1", "fc2"])
    " There are: 'fc1', 'fc2'."
    """
    names = list(known)
    near = get_close_matches(seen, names, n=3, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
    shown = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return f" There are: {shown}." if names else ""


_WIRE = re.compile(r"<<kindling:([A-Za-z0-9_-]+=*)>>")


def to_wire(error: KindlingError) -> str:
    """The error as one token of text that survives a Java stack trace.

    A worker raises `RuntimeError(to_wire(error))`; the driver finds the token with `from_text`.
    """
    args = [arg if isinstance(arg, str | int | float | bool | type(None)) else repr(arg) for arg in error.args]
    body = json.dumps([type(error).__name__, args]).encode()
    return f"<<kindling:{base64.urlsafe_b64encode(body).decode()}>>"


def from_text(text: str) -> KindlingError | None:
    """The first kindling error found in `text` (a Java stack trace, say), or None.

    >>> from_text("at java... " + to_wire(DataError("no rows")) + " at java...")
    DataError('no rows')
    """
    for match in _WIRE.finditer(text):
        try:
            name, args = json.loads(base64.urlsafe_b64decode(match.group(1)))
        except ValueError:
            continue
        kind = _FAMILY.get(name)
        if kind is not None:
            return kind(*args)
    return None


_FAMILY: dict[str, type[KindlingError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        DataError,
        ModelError,
        FormatError,
        StorageError,
        SessionError,
        TrainingError,
        MissingExtraError,
    )
}
