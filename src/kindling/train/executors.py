"""The executors as they are: one small Spark job asks each of them (`probe.py`), once a session where that will do."""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kindling import ship
from kindling.errors import SessionError
from kindling.train import probe
from kindling.train.line import Address
from kindling.train.probe import Question

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Answer = Mapping[str, Any]
_SAME = ("torch", "kindling")
"""Packages whose versions must be the driver's: weights, bits and bytes depend on them."""
MANY_TASKS = 64
"""So many tasks look at every host of most clusters; more would take longer than the training's own tasks."""
_LOG = logging.getLogger("kindling.fit")
_asking = threading.Lock()
_known: dict[str, list[Answer]] = {}
"""Session -> what its executors told, where nothing was wrong."""


def ask(spark: SparkSession, tasks: int, question: Question, *, afresh: bool = True) -> list[Answer]:
    """What as many tasks tell of where they run; without `afresh`, what they told before in this session.

    Raises: SessionError, where the task cannot run at all.
    """
    key = ship.session_key(spark)
    with _asking:  # several trainings may begin at once; how modules are pickled is one setting for all threads
        if not afresh and key in _known:
            return _known[key]
        import pyspark.cloudpickle

        # By value: the worker may lack kindling, and that is to be said in a sentence.
        pyspark.cloudpickle.register_pickle_by_value(probe)
        try:
            with ship.translated():
                frame = spark.range(0, tasks, 1, tasks).mapInArrow(partial(probe.probe, question), probe.SCHEMA)
                answers = [json.loads(row["answer"]) for row in frame.collect()]
        finally:
            pyspark.cloudpickle.unregister_pickle_by_value(probe)
        check_versions(answers)
        _known[key] = answers
        return answers


def reach(spark: SparkSession, tasks: int, address: Address | None) -> bool:
    """Whether all executors reach the driver's listener; they are asked once a session.

    Raises: SessionError, where they cannot train: another Python, torch or kindling than the driver's, or none.
    """
    driver = (address.host, address.port, address.secret) if address else None
    answers = ask(spark, min(tasks, MANY_TASKS), Question(driver, None, "", None), afresh=False)
    deaf = [answer for answer in answers if answer["reaches"]]
    if deaf and address:
        _LOG.warning(
            "the executor on %s cannot reach this driver at %s:%s (%s): no live events, and workers meet in Spark's "
            "barrier. Let executors connect to the driver's ports.",
            deaf[0]["host"],
            address.host,
            address.port,
            deaf[0]["reaches"],
        )
    return address is not None and not deaf


def check_versions(answers: Sequence[Answer]) -> None:
    """Python's minor version, torch and kindling are the driver's.

    Raises: SessionError, naming the host, both versions and the fix.
    """
    import torch

    import kindling

    own = {"torch": torch.__version__, "kindling": kindling.__version__}
    for answer in answers:
        where = f"the executor on {answer['host']}"
        if _minor(answer["python"]) != _minor(platform.python_version()):
            raise SessionError(
                f"{where} runs Python {answer['python']}, the driver {platform.python_version()}. "
                "Set PYSPARK_PYTHON to the same Python on all hosts before the session starts."
            )
        for name in _SAME:
            found = answer["versions"][name]
            if found is None:
                raise SessionError(
                    f"{where} has no {name}. Install {name} {own[name]} in its Python, or send a packed environment "
                    "with --archives."
                )
            if _public(found) != _public(own[name]):
                raise SessionError(
                    f"{where} has {name} {found}, the driver {own[name]}. Install the same version on both."
                )


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _public(version: str) -> str:
    """A version without its build: 2.13.0+cpu and 2.13.0+cu129 count the same."""
    return str(version).partition("+")[0]
