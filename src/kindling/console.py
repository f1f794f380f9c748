"""What a command says and how it ends: the result on stdout, everything else on stderr, errors in one screen.

Holds the plumbing of the commands, none of their meaning: that is in `cli.py`, `transfer.py` and `demo.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from kindling.errors import KindlingError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
SCREEN = 24
"""Lines an error may take."""


class Clock:
    """Names the phases of a job, tells how long each took, and keeps the seconds.

    >>> clock = Clock(quiet=True)
    >>> with clock.phase("read"):
    ...     pass
    >>> list(clock.seconds)
    ['read']
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        """Phase name -> wall seconds; a phase entered twice adds up."""
        self._quiet = quiet

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, and say so on stderr when it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            if not self._quiet:
                say(f"{took:8.1f} s  {name}")

    def __str__(self) -> str:
        lines = [f"{seconds:8.1f} s  {name}" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"{sum(self.seconds.values()):8.1f} s  in all"])

    def to_json(self) -> dict[str, float]:
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


def say(message: str, *, style: str | None = None) -> None:
    """One line for the person who watches, on stderr; never read by a program."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style or ""))


@contextlib.contextmanager
def command(*, as_json: bool) -> Iterator[Output]:
    """What a command does happens inside: keeps stdout for its result, turns what goes wrong into an exit code.

    Raises: SystemExit, with 1 after an error that was shown, 130 after Ctrl-C. Errors nobody foresaw pass through.
    """
    output = Output(sys.stdout, as_json=as_json)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a library's stray print must not spoil the result
            yield output
    except (Exception, KeyboardInterrupt) as error:
        if interrupted(error):
            say("Interrupted.", style="yellow")
            raise SystemExit(INTERRUPTED) from None
        message = explain(error)
        if message is None:
            raise
        kind = type(error).__name__
        say(f"{kind}: {message}", style="red")
        if as_json:
            output.json({"error": {"kind": kind, "message": message}})
        raise SystemExit(FAILED) from None


class Output:
    """The one result of a command, as text for people or as one JSON object for programs."""

    def __init__(self, stream: TextIO, *, as_json: bool) -> None:
        self._stream = stream
        self.as_json = as_json

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """Write the result: `data` with --json, else `text`."""
        if self.as_json:
            self.json(data)
        else:
            self._stream.write(text.rstrip("\n") + "\n")
            self._stream.flush()

    def json(self, data: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(plain(data), ensure_ascii=False) + "\n")
        self._stream.flush()


def plain(value: Any) -> Any:
    """JSON values only: NaN and infinities become null, numpy numbers plain ones, anything else its text.

    >>> plain({"loss": float("nan"), "labels": ("a", "b")})
    {'loss': None, 'labels': ['a', 'b']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | str | type(None)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: clean-up that fails because the work was broken off raises an error of its own.

    >>> interrupted(KeyboardInterrupt()), interrupted(ValueError())
    (True, False)
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def explain(error: BaseException) -> str | None:
    """What to tell a user about `error`, at most `SCREEN` lines; None for an error that is no answer but a bug.

    >>> explain(ValueError("oops")) is None
    True
    """
    if isinstance(error, KindlingError):
        return _first_lines(str(error))
    if type(error).__module__.partition(".")[0] in ("pyspark", "py4j"):
        # Spark's text ends in a Java stack trace: what stands before it is the message.
        return _first_lines(re.split(r"\n\s*at |\nJVM stacktrace|\n\nDriver stacktrace", str(error))[0])
    if isinstance(error, OSError):
        return _first_lines(str(error))
    return None


def _first_lines(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= SCREEN else [*lines[:SCREEN], f"... ({len(lines) - SCREEN} more lines)"])
