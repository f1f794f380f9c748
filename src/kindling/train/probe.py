"""What an executor tells of itself: one small task, which travels whole and so runs where kindling is missing.

At the top only what every worker of Spark has is imported; all else is tried inside, and what fails is the answer.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA = "answer string"


@dataclass(frozen=True)
class Question:
    """What to look at."""

    driver: tuple[str, int, str] | None
    """Host, port and secret of the driver's listener."""
    place: str | None
    """The run directory, with a file `beacon` in it."""
    beacon: str
    code: bytes | None
    """The user's functions, pickled: can they be opened there?"""


def probe(question: Question, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Body of the task: one row of JSON."""
    for _ in batches:
        pass
    answer: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "kindling", "pyspark", "numpy", "pyarrow")},
        "memory_bytes": _memory(),
        "disk_bytes": _disk(),
        "gpus": _gpus(),
        "reaches": _tried(lambda: _reach(question.driver)) if question.driver else None,
        "sees": _tried(lambda: _see(question)) if question.place else None,
        "code": _tried(lambda: _open(question.code)) if question.code else None,
    }
    yield pa.RecordBatch.from_arrays([pa.array([json.dumps(answer)])], names=["answer"])


def _tried(act: Any) -> str:
    """ "" where it works, else what went wrong, in a line."""
    try:
        act()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _version(name: str) -> str | None:
    import importlib
    from importlib import metadata

    try:
        if name == "kindling":  # may lie on the path without being installed
            return str(importlib.import_module(name).__version__)
        return metadata.version(name)
    except Exception:
        return None


def _memory() -> int | None:
    """Bytes that processes here may still take: of the host, or of its container where that is less."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as used:
            limit = most.read().strip()
            found += [max(0, int(limit) - int(used.read()))] if limit.isdigit() else []
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def _disk() -> int:
    base = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or tempfile.gettempdir()
    while not os.path.exists(base):
        base = os.path.dirname(base)
    return shutil.disk_usage(base).free


def _gpus() -> list[str]:
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        return []
    gpus = context.resources().get("gpu")
    return list(gpus.addresses) if gpus else []


def _reach(driver: tuple[str, int, str]) -> None:
    from kindling.train.line import Address, connect

    connect(Address(*driver)).close()


def _see(question: Question) -> None:
    from kindling.storage import open_place

    place = open_place(str(question.place))
    if place.read("beacon").decode() != question.beacon:
        raise OSError("it is another folder of the same name")


def _open(code: bytes) -> None:
    import cloudpickle

    cloudpickle.loads(code)
