"""The process that Spark forks Python workers from, with torch loaded before the first fork.

Spark ends a Python worker that was idle for a minute, and the next one would import torch anew: one to three seconds in
which nothing is computed. Forked from here it has torch already, and shares its pages. `kindling.spark()` names this
module to sessions whose executors run on this machine; elsewhere, set `spark.python.daemon.module=kindling.daemon`
where every executor has kindling. Run by Spark as `python -m kindling.daemon pyspark.worker`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from kindling.threads import environment

PRELOADED = ("torch", "torch._dynamo")
"""Imported before the fork. They start no threads, which a fork would lose; pyarrow does, and is left out."""


def preload() -> None:
    """Import what every worker needs; what cannot be imported is left to the task that asks for it."""
    for name, value in environment(1).items():
        os.environ.setdefault(name, value)  # OpenMP reads its environment once, when it is loaded
    for name in PRELOADED:
        # Spark reads this process's first bytes on stdout as a port number.
        with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(name)


if __name__ == "__main__":
    from pyspark.daemon import manager

    preload()
    manager()
