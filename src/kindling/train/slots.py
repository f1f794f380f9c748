"""Task slots: how many workers can run at the same time, and in which kind of stage Spark lets them."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from typing import TYPE_CHECKING, Any

from kindling import ship
from kindling.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

_LOG = logging.getLogger("kindling.fit")

_BARRIER_TIMEOUT = "spark.barrier.sync.timeout"
_LONG_WAIT_S = 1800
_UNIT_S = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_START_S = 30.0
"""So long after an application's start its executors may still be on their way."""
_LOOK_EVERY_S = 0.25


def slots(spark: SparkSession, wanted: int = 1, resources: ResourceProfile | None = None) -> int | None:
    """Tasks that can run at the same time now, or None where the session does not tell (a remote Connect server).

    Waits for `wanted` of them only while the application has just been started.

    Args: resources: of these tasks, where they are not the session's usual ones.
    Raises: ConfigError, for resources that this session cannot give.
    """
    master = _master(spark)
    inside = master.partition("[")[2].rstrip("]").split(",")
    if master.startswith("local-cluster[") and resources is None:
        return int(inside[0]) * int(inside[1])
    if ship.is_connect(spark):
        if master.startswith("local"):
            return (os.cpu_count() or 1) if inside[0] == "*" else int(inside[0] or 1)
        return None
    scala = spark.sparkContext._jsc.sc()
    profile = _profile(scala, resources)
    # Executors of a cluster register one after the other; those of local[n] are there from the start.
    patience_s = 0.0 if master.startswith("local") else _START_S - (time.time() - int(scala.startTime()) / 1000)
    deadline = time.monotonic() + patience_s
    while True:
        there = int(scala.maxNumConcurrentTasks(profile))
        if there >= wanted or time.monotonic() > deadline:
            return there
        time.sleep(_LOOK_EVERY_S)


def _profile(scala: Any, resources: ResourceProfile | None) -> Any:
    """Spark's own object of some resources, known to its scheduler; those of the session if None."""
    from py4j.protocol import Py4JJavaError

    manager = scala.resourceProfileManager()
    if resources is None:
        return manager.defaultResourceProfile()
    profile = getattr(resources, "_java_resource_profile", None)
    if profile is None:
        raise ConfigError("resources", resources, "is no profile of this session", "Build it after the session's start")
    try:
        manager.addResourceProfile(profile)
    except Py4JJavaError as error:
        why = str(error.java_exception.getMessage()).rstrip(".")
        raise ConfigError("resources", resources, f"is refused by Spark: {why}", "Leave it out here") from None
    return profile


def most_slots(spark: SparkSession) -> int | None:
    """Tasks that could run at once on all executors that dynamic allocation may start; None: no bound known."""
    executors = _number(spark, "spark.dynamicAllocation.maxExecutors")
    cores = _number(spark, "spark.executor.cores")
    if executors is None or executors >= 2**31 - 1 or cores is None:
        return None
    return executors * (cores // (_number(spark, "spark.task.cpus") or 1))


def workers_for(spark: SparkSession, asked: int | None, resources: ResourceProfile | None = None) -> int:
    """How many workers train: as many as were asked for, else as there are slots.

    With dynamic allocation slots come when tasks wait for them: only more than can ever come is refused here.

    Args: resources: of the workers, where they are not the session's usual ones.
    Raises: ConfigError, with the two numbers, when there are too few slots, and for resources that Spark refuses.
    """
    if resources is not None and _pyspark() < (4, 0):
        raise ConfigError("resources", resources, "cannot be given to the tasks before pyspark 4", "Leave it out")
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise ConfigError("workers", asked, "leaves nobody to train", "Use 1 or more")
    if without_barrier(spark):
        if resources is not None:
            if asked is None:
                raise ConfigError(
                    "workers", asked, "is needed beside resources with dynamic allocation", "Name a number"
                )
            return asked  # Spark starts executors of their kind
        most = most_slots(spark)
        if asked is None:
            return most or slots(spark) or 2
        if most is not None and asked > most:
            raise ConfigError(
                "workers",
                asked,
                f"needs {asked} task slots at the same time, and dynamic allocation can start {most}",
                f"Use workers={most} or raise spark.dynamicAllocation.maxExecutors",
            )
        return asked
    there = slots(spark, asked or 1, resources)
    if asked is None:
        return there or 2
    if there is not None and asked > there:
        raise ConfigError(
            "workers",
            asked,
            f"needs {asked} task slots at the same time, and the session has {there}",
            f"Use workers={there} or a larger cluster" if there else "Are the cluster's executors running?",
        )
    return asked


def check_patience(spark: SparkSession) -> None:
    """Warn where Spark would let workers wait for a dead one until nobody remembers the job."""
    text = str(spark.conf.get(_BARRIER_TIMEOUT, None) or "365d")
    found = re.fullmatch(r"(\d+)\s*(ms|s|m|min|h|d)?", text.strip())
    seconds = int(found[1]) * _UNIT_S[found[2] or "s"] if found else math.inf
    if seconds > _LONG_WAIT_S:
        _LOG.warning(
            "%s is %s: a worker that dies before training begins would be waited for that long. "
            "Start the session with 300s, as kindling.spark() does.",
            _BARRIER_TIMEOUT,
            text,
        )


def without_barrier(spark: SparkSession) -> bool:
    """Whether Spark refuses barrier stages here, so that the workers must be tasks of a plain one.

    It does with dynamic allocation (SPARK-24942), which a local master does not know.
    """
    return not _master(spark).startswith("local") and _is_on(spark, "spark.dynamicAllocation.enabled")


def runs_copies(spark: SparkSession) -> bool:
    """Whether Spark starts a slow task a second time beside the first; never in a barrier stage."""
    return without_barrier(spark) and _is_on(spark, "spark.speculation")


def _pyspark() -> tuple[int, ...]:
    import pyspark

    return tuple(int(part) for part in pyspark.__version__.split(".")[:2])


def _master(spark: SparkSession) -> str:
    return str(spark.conf.get("spark.master", "") or "")


def _is_on(spark: SparkSession, setting: str) -> bool:
    return str(spark.conf.get(setting, "false")).lower() == "true"


def _number(spark: SparkSession, setting: str) -> int | None:
    value: Any = spark.conf.get(setting, None)
    return int(value) if value is not None and str(value).isdigit() else None
