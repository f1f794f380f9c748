"""Features kept as Parquet: only new and changed rows are computed, a killed run goes on, another model is refused.

The folder holds Parquet files with one row per path (`path`, `label` where there is one, the features, `content_hash`,
`error`) and `_kindling.json`: what the features were made by, and what was found. Tasks that finish leave their files
in the folder at once (Hadoop's commit algorithm 2), so that what a killed run had finished counts; rows that are
doubled, changed or gone are taken out at the end of the next run by rewriting the files they are in. The computing
itself is `batch.forward`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from typing import TYPE_CHECKING, Any

from kindling import __version__, ship
from kindling.errors import ConfigError, DataError, FormatError, StorageError
from kindling.prepare import Preparation

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import StructType

    from kindling.model import Model
    from kindling.storage import Place

_LOG = logging.getLogger("kindling.predict")

SIDE_FILE = "_kindling.json"
HASH = "content_hash"
"""Column of the stored Parquet: Spark's xxhash64 of everything that the features were made from, and the label."""
_KEYS = f"path string, {HASH} long, error string"
_FORMAT = 1
_LISTED = 100
_LOOKED_AT = 1_000_000
"""Rows of a new folder whose paths the driver looks through by itself."""
_OPTIONS = {
    # A task's files are put in place when the task ends, not when the whole job does.
    "mapreduce.fileoutputcommitter.algorithm.version": "2",
    # Features hardly repeat: looking for a dictionary costs time and finds none.
    "parquet.enable.dictionary": "false",
}


def featurize_to(
    model: Model,
    df: DataFrame,
    out: str,
    *,
    on_error: str,
    precision: str,
    batch_size: int | None,
    columns: Mapping[str, str],
    progress: bool,
) -> DataFrame:
    """Bring the folder `out` up to date with `df`; returns what is in it. See `batch.featurize`."""
    from kindling.predict import batch
    from kindling.storage import open_place

    if on_error not in batch.ON_ERROR:
        raise ConfigError("on_error", on_error, "is unknown", "Use 'keep', 'drop' or 'fail'")
    if df.isStreaming:
        raise ConfigError("out", out, "cannot keep up with a stream", "Leave out= away and write the stream yourself")
    batch._check_columns(df, ["path", *model.preparation.columns(targets=False)])
    began = time.monotonic()
    spark = df.sparkSession
    folder = _Folder(spark, open_place(out, spark))
    made_by = _made_by(model, columns)
    before = folder.provenance()
    if before is None:
        chosen = batch.choose_precision(model, df, precision)
        from kindling.predict.engine import net_batch

        about = {
            **made_by,
            "precision": chosen.to_json(),
            "batch_size": batch_size or net_batch(model.signature, model.module),
        }
        folder.place.makedirs()
        # Before the first row, so that a killed run can be told apart from somebody else's files.
        folder.write(about)
    else:
        _check_same(out, before, made_by, precision, batch_size)
        about = {**before, "versions": made_by["versions"]}

    label = ["label"] if "label" in df.columns else []
    rows = _hashed(df, model.preparation, label)
    old_files = folder.files()
    if old_files:
        if on_error == "fail":
            _refuse_broken(folder.read(_KEYS))
        rows = _without(rows, folder.read(_KEYS).select("path", HASH))
    features = batch.forward(
        model,
        rows,
        keep=["path", *label, HASH],
        columns=columns,
        on_error=on_error,
        precision=about["precision"]["name"],
        batch_size=about["batch_size"],
    )
    if on_error != "keep":
        from pyspark.sql import functions as F

        features = features.withColumn("error", F.lit(None).cast("string"))
    with ship.translated(), ship.bounded_arrow_batches(spark), _bar(spark, shown=progress):
        features.write.mode("append").options(**_OPTIONS).parquet(folder.url)
    with ship.translated():
        counts = folder.new_counts() if not old_files and on_error != "drop" else None
        if counts is not None:
            computed = sum(rows for rows, _ in counts.values())
        else:
            before_tidying = folder.counts()
            computed = sum(rows for file, (rows, _) in before_tidying.items() if file not in old_files)
            changed = folder.tidy(
                df, model.preparation, label, features.schema, old_files, before_tidying, drop=on_error == "drop"
            )
            counts = folder.counts() if changed else before_tidying
        found = _findings(model, df, folder, about, counts, dropped=on_error == "drop")
    seconds = time.monotonic() - began
    folder.write({**about, **found, "finished": datetime.now(UTC).isoformat(timespec="seconds")})
    summary = _summary(computed, found, seconds, out, about["precision"]["name"])
    _tell(summary, broken=found["broken"], progress=progress)
    shown = ["path", *label, *columns.values(), *(["error"] if on_error == "keep" else [])]
    return folder.read(features.schema).select(*map(batch._quoted, shown))


# ---------------------------------------------------------------------------------------------------- provenance


def provenance(out: str | PathLike[str], *, spark: SparkSession | None = None) -> dict[str, Any]:
    """What is known of a folder of features that `Model.featurize` keeps.

    Returns: JSON values: `rows`; `broken`, how many of the photos could not be used, and `examples`, the first of them
        (`path`, `why`); `precision` (`name`, `reason`, `cosines`); `batch_size`, `columns`, `preparation`; the
        `model`'s name, fingerprint and source; `versions`.
    Raises: StorageError, when there is no such folder; ConfigError, when it holds something else; FormatError.

    >>> provenance("features.parquet")["precision"]["name"]  # doctest: +SKIP
    'bf16'
    """
    from kindling.session import active_session
    from kindling.storage import open_place

    place = open_place(str(out), spark or active_session())
    about = _Folder(spark, place).provenance() if place.exists() else None
    if about is None:
        raise StorageError(f"there are no features of kindling's in {out}.")
    return about


def _made_by(model: Model, columns: Mapping[str, str]) -> dict[str, Any]:
    """What decides the features' numbers, but for the precision and the batch size."""
    import torch

    from kindling import bundle

    return {
        "format": _FORMAT,
        "model": {"name": model.name, "fingerprint": bundle.fingerprint(model), "source": dict(model.source)},
        "preparation": model.preparation.to_json()["inputs"],
        "columns": dict(columns),
        "versions": {"kindling": __version__, "torch": torch.__version__},
    }


def _check_same(
    out: str, before: Mapping[str, Any], now: Mapping[str, Any], precision: str, batch_size: int | None
) -> None:
    """Raises: ConfigError, saying what differs, when the folder's features were made by something else."""
    differences = []
    if before["columns"] != now["columns"]:
        differences.append(f"the layers or their columns ({before['columns']} there, {now['columns']} now)")
    if before["preparation"] != now["preparation"]:
        differences.append(f"the preparation ({_first_difference(before['preparation'], now['preparation'])})")
    if not differences and before["model"]["fingerprint"] != now["model"]["fingerprint"]:
        old, new = before["model"]["fingerprint"][:12], now["model"]["fingerprint"][:12]
        name = before["model"]["name"]
        differences.append(f"the net's layers or weights ({name!r} of fingerprint {old} there, {new} now)")
    stored = before["precision"]["name"]
    if precision not in ("auto", stored):
        differences.append(f"the precision ({stored!r} there, {precision!r} now)")
    if batch_size not in (None, before["batch_size"]):
        differences.append(f"the batch size ({before['batch_size']} there, {batch_size} now)")
    if differences:
        raise ConfigError(
            "out",
            out,
            f"holds features made otherwise: {'; '.join(differences)}",
            "Give another folder, or remove this one",
        )
    if before["versions"]["torch"] != now["versions"]["torch"]:
        _LOG.warning(
            "the features in %s were made with torch %s, new rows are made with %s: last bits may differ",
            out,
            before["versions"]["torch"],
            now["versions"]["torch"],
        )


def _first_difference(before: Any, now: Any) -> str:
    for old, new in zip(before, now, strict=False):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"{key}={old.get(key)!r} there, {new.get(key)!r} now"
    return f"{len(before)} inputs there, {len(now)} now"


# -------------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True, slots=True)
class _Folder:
    """The stored features, as Spark and the driver see them."""

    spark: SparkSession
    place: Place

    @property
    def url(self) -> str:
        """For Spark's writers. A local folder is named as such, whatever Spark's default file system is."""
        return f"file:{self.place.path}" if self.place.local is not None else self.place.path

    def files(self) -> set[str]:
        """Names of the Parquet files."""
        if not self.place.exists():
            return set()
        return {name for name in self.place.list() if name.endswith(".parquet") and not name.startswith(("_", "."))}

    def provenance(self) -> dict[str, Any] | None:
        """What the side file says; None for a folder that is new or empty.

        Raises: ConfigError, for a folder with somebody else's files; FormatError, for a side file that is damaged.
        """
        if not self.place.exists():
            return None
        if not self.place.exists(SIDE_FILE):
            others = self.place.list()
            if others:
                raise ConfigError(
                    "out",
                    self.place.path,
                    f"holds files that are no features of kindling's, such as {others[0]!r}",
                    "Give an empty or a new folder",
                )
            return None
        try:
            data = json.loads(self.place.read(SIDE_FILE))
            known = data["format"] == _FORMAT
            for key in ("fingerprint", "name"):
                known = known and isinstance(data["model"][key], str)
            (
                data["preparation"],
                data["columns"],
                data["precision"]["name"],
                data["batch_size"],
                data["versions"]["torch"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{self.place.path}/{SIDE_FILE} cannot be read: {type(error).__name__} {error}."
            ) from None
        if not known:
            raise FormatError(
                f"{self.place.path}/{SIDE_FILE} is of format {data['format']!r}; this version reads {_FORMAT}."
            )
        return dict(data)

    def write(self, about: Mapping[str, Any]) -> None:
        self.place.write(SIDE_FILE, json.dumps(about, indent=1, ensure_ascii=False).encode())

    def read(self, schema: StructType | str) -> DataFrame:
        """The stored rows; `_metadata.file_name` tells the file of each."""
        return self.spark.read.schema(schema).parquet(re.sub(r"([{}\[\]*?\\])", r"\\\1", self.url))

    def keys(self) -> DataFrame:
        """path, content_hash, error and file of each stored row."""
        from pyspark.sql import functions as F

        return self.read(_KEYS).select("path", HASH, "error", F.col("_metadata.file_name").alias("file"))

    def counts(self) -> dict[str, tuple[int, int]]:
        """File -> its rows, and the broken ones among them; files without rows are not in it."""
        from pyspark.sql import functions as F

        if not self.files():
            return {}
        counted = self.keys().groupBy("file").agg(F.count("*").alias("rows"), F.count("error").alias("broken"))
        return {row["file"]: (row["rows"], row["broken"]) for row in counted.collect()}

    def new_counts(self) -> dict[str, tuple[int, int]] | None:
        """As `counts`, for a folder on this disk that was empty before: without a Spark job.

        Returns: None where Spark has to look: on other file systems, and where there is something to tidy.
        """
        import pyarrow.parquet as pq

        if self.place.local is None:
            return None
        files = {name: pq.ParquetFile(self.place.local / name) for name in sorted(self.files())}
        rows = {name: file.metadata.num_rows for name, file in files.items()}
        if not all(rows.values()) or sum(rows.values()) > _LOOKED_AT:
            return None
        paths: set[str] = set()
        counts = {}
        for name, file in files.items():
            keys = file.read(["path", "error"])
            paths.update(keys["path"].to_pylist())
            counts[name] = rows[name], rows[name] - keys["error"].null_count
        return counts if len(paths) == sum(rows.values()) else None

    def tidy(
        self,
        df: DataFrame,
        preparation: Preparation,
        label: list[str],
        schema: StructType,
        old_files: set[str],
        counts: Mapping[str, tuple[int, int]],
        *,
        drop: bool,
    ) -> bool:
        """Take out rows that are doubled, changed, gone or (with `drop`) broken; tells whether there were any.

        What is rewritten is appended before its old files go, so that a run killed here leaves doubles for the next
        one to take out, and no gap.
        """
        from pyspark.sql import functions as F

        # A job without rows leaves a file without rows; one is kept where there is nothing else, for its schema.
        superfluous = set(sorted(self.files() - set(counts))[0 if counts else 1 :])
        keys = self.keys()
        several = (
            keys.groupBy("path")
            .agg(F.count("*").alias("n"), F.count_distinct(HASH).alias("hashes"), F.collect_set("file").alias("files"))
            .where("n > 1")
        )
        doubled = several.select(F.explode("files").alias("file"), (F.col("hashes") > 1).alias("changed"))
        affected = doubled.groupBy("file").agg(F.max("changed").alias("changed")).collect() if counts else []
        names = {row["file"] for row in affected}
        current = df.select("path").distinct()
        if old_files:
            gone = keys.join(current, "path", "left_anti").select("file").distinct()
            names |= {row["file"] for row in gone.collect()}
        if drop:
            names |= {file for file, (_, broken) in counts.items() if broken}
        if not names:
            self._delete(superfluous)
            return False
        good = self.read(schema).where(F.col("_metadata.file_name").isin(sorted(names)))
        if old_files:
            good = good.join(current, "path", "left_semi")
        if drop:
            good = good.where("error is null")
        if any(row["changed"] for row in affected):
            # Of several contents under one path, those that are there now: the photos are asked once more.
            unclear = several.where("hashes > 1").select("path")
            wanted = _hashed(df.join(unclear, "path", "left_semi"), preparation, label).select("path", HASH)
            settled = good.join(unclear, "path", "left_anti")
            good = settled.unionByName(good.join(wanted, ["path", HASH], "left_semi"))
        good.dropDuplicates(["path", HASH]).write.mode("append").options(**_OPTIONS).parquet(self.url)
        self._delete(names | superfluous)
        return True

    def _delete(self, names: set[str]) -> None:
        for name in sorted(names):
            self.place.delete(name)


def _hashed(df: DataFrame, preparation: Preparation, label: list[str]) -> DataFrame:
    """The columns that features are made from, with path, label and a hash of everything but the path."""
    from pyspark.sql import functions as F

    from kindling.predict.batch import _quoted

    read = list(dict.fromkeys([*preparation.columns(targets=False), *label]))
    # Nulls do not count in Spark's hash: without a mark, (null, "a") and ("a", null) would be one.
    marks: list[Column] = [F.col(_quoted(name)).isNull() for name in read]
    whole = F.xxhash64(*marks, *(F.col(_quoted(name)) for name in read))
    return df.select(*map(_quoted, dict.fromkeys(["path", *read])), whole.alias(HASH))


def _without(rows: DataFrame, done: DataFrame) -> DataFrame:
    """Rows whose path and hash are not among `done`."""
    from pyspark.sql import functions as F

    count: int = done.count()
    # Where it fits into memory, every task gets the whole list; else the photos would be sent across the network.
    return rows.join(F.broadcast(done) if count <= 2_000_000 else done, ["path", HASH], "left_anti")


def _refuse_broken(stored: DataFrame) -> None:
    with ship.translated():
        first = stored.where("error is not null").select("path", "error").limit(1).collect()
    if first:
        raise DataError(
            f"path {first[0]['path']!r} cannot be used: {first[0]['error']}. "
            "Mend or remove it, or pass on_error='keep' or on_error='drop'."
        )


# ------------------------------------------------------------------------------------------------------- findings


def _findings(
    model: Model,
    df: DataFrame,
    folder: _Folder,
    about: Mapping[str, Any],
    counts: Mapping[str, tuple[int, int]],
    *,
    dropped: bool,
) -> dict[str, Any]:
    """How many rows there are, how many are broken, and the first of those with their reasons."""
    from kindling.predict import batch

    rows, broken = (sum(count[i] for count in counts.values()) for i in (0, 1))
    bad = folder.read(_KEYS).where("error is not null") if broken else None
    if dropped:
        # They left no trace: those whose path is missing are looked at once more.
        missing = df.select("path").distinct()
        if rows:
            missing = missing.join(folder.read(_KEYS).select("path"), "path", "left_anti")
        broken = missing.count()
        bad = None
        if broken:
            again = df.join(missing.orderBy("path").limit(_LISTED), "path", "left_semi")
            settings = {"precision": about["precision"]["name"], "batch_size": about["batch_size"]}
            bad = batch.forward(model, again, keep=["path"], **settings).where("error is not null")
    first = bad.select("path", "error").orderBy("path").limit(_LISTED).collect() if bad is not None else []
    return {"rows": rows, "broken": broken, "examples": [{"path": r["path"], "why": r["error"]} for r in first]}


def _summary(computed: int, found: Mapping[str, Any], seconds: float, out: str, precision: str) -> str:
    """One line on what was done, and one on each of the first broken rows.

    >>> found = {"rows": 5895, "broken": 1, "examples": [{"path": "a.jpg", "why": "the file is empty"}]}
    >>> print(_summary(95, found, 9.5, "features", "bf16"))
    featurised 95 rows in 9.5 s (10.0 rows/s, bf16): features holds 5,895 rows, 1 broken:
      a.jpg: the file is empty
    """
    speed = f" ({computed / seconds:.1f} rows/s, {precision})" if computed and seconds > 0 else ""
    line = f"featurised {computed:,} rows in {seconds:.1f} s{speed}: {out} holds {found['rows']:,} rows"
    if not found["broken"]:
        return f"{line}, none broken"
    listed = "".join(f"\n  {one['path']}: {one['why']}" for one in found["examples"][:5])
    rest = found["broken"] - min(5, len(found["examples"]))
    return f"{line}, {found['broken']:,} broken:{listed}" + (f"\n  and {rest:,} more" if rest else "")


def _tell(summary: str, *, broken: int, progress: bool) -> None:
    _LOG.log(logging.WARNING if broken and not progress else logging.INFO, "%s", summary)
    if progress:
        print(summary, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- progress


@contextmanager
def _bar(spark: SparkSession, *, shown: bool) -> Iterator[None]:
    """A bar on stderr for the job run inside, where stderr is a terminal.

    It moves with the tasks that are done; on Spark Classic it also tells the rows that were written so far.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with ExitStack() as stack:
        bar = stack.enter_context(
            Progress(
                SpinnerColumn(),
                TextColumn("featurise"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        )
        task = bar.add_task("featurise", total=None, figures="")
        began = time.monotonic()

        def show(done: int, total: int, rows: int) -> None:
            figures = f"{done}/{total} tasks"
            if rows:
                figures += f"  {rows:,} rows  {rows / (time.monotonic() - began):,.1f} rows/s"
            bar.update(task, completed=done, total=total or None, figures=figures)

        stack.enter_context((_watch_connect if ship.is_connect(spark) else _watch_classic)(spark, show))
        yield


@contextmanager
def _watch_connect(spark: Any, show: Callable[[int, int, int], None]) -> Iterator[None]:
    def handler(stages: Any, inflight_tasks: int, operation_id: Any, done: bool) -> None:
        stage = max(stages or [], key=lambda one: one.num_tasks, default=None)
        if stage is not None and not done:
            show(stage.num_completed_tasks, stage.num_tasks, 0)

    spark.registerProgressHandler(handler)
    try:
        yield
    finally:
        spark.removeProgressHandler(handler)


@contextmanager
def _watch_classic(spark: Any, show: Callable[[int, int, int], None]) -> Iterator[None]:
    context, group = spark.sparkContext, f"kindling-{uuid.uuid4().hex}"
    names = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
    before = {name: context.getLocalProperty(name) for name in names}
    stopped = threading.Event()

    def poll() -> None:
        tracker = context.statusTracker()
        store = context._jsc.sc().statusStore()
        while not stopped.wait(0.5):
            try:
                done = total = rows = 0
                for job in tracker.getJobIdsForGroup(group):
                    for stage in getattr(tracker.getJobInfo(job), "stageIds", ()):
                        info = tracker.getStageInfo(stage)
                        if info is not None:
                            done, total = done + info.numCompletedTasks, total + info.numTasks
                            rows += store.lastStageAttempt(stage).outputRecords()
                show(done, total, rows)
            except Exception:  # a bar must not end the work it shows
                return

    watcher = threading.Thread(target=poll, name="kindling-progress", daemon=True)
    context.setJobGroup(group, "kindling featurize")
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join(timeout=5)
        for name, value in before.items():
            context.setLocalProperty(name, value)
