"""`read.images`: files of photos as a DataFrame of path, label and content. Nothing is decoded here.

Spark's `binaryFile` source does the listing and the reading, on every file system Spark knows. What is added: the class
from the folder's name, files that are plainly something else left out, odd names taken literally, and partitions sized
for nets. Decoding, and what becomes of files that are no images, is `prepare/image.py`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from kindling.errors import ConfigError, DataError, StorageError
from kindling.session import active_session, first_line
from kindling.session import spark as start_session

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

NOT_IMAGES: tuple[str, ...] = (
    *(
        "txt",
        "md",
        "rst",
        "csv",
        "tsv",
        "json",
        "jsonl",
        "xml",
        "html",
        "htm",
        "yaml",
        "yml",
        "toml",
        "ini",
        "cfg",
        "log",
    ),
    *("py", "ipynb", "sh", "js", "css", "pdf", "doc", "docx", "xls", "xlsx", "ppt", "pptx", "db", "lnk"),
    *("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "crc", "md5", "sha256"),
    *(
        "parquet",
        "orc",
        "avro",
        "h5",
        "hdf5",
        "npy",
        "npz",
        "mat",
        "pkl",
        "pt",
        "pth",
        "onnx",
        "safetensors",
        "tfrecord",
    ),
    *("mp4", "mov", "avi", "mkv", "webm", "mp3", "wav"),
)
"""Extensions of files that lie beside photos and are none. Files of any other name, or without extension, are read."""

_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_GLOB = re.compile(r"[{}\[\]*?\\]")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")
_MANY_ROWS, _FEW_ROWS = 512, 64
"""Photos in a partition: enough to fill a net's batches, few enough to spread and to redo."""
_SAFE_BATCH_BYTES = 256 * 2**20


def images(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    spark: SparkSession | None = None,
    skip: Collection[str] = NOT_IMAGES,
    partitions: int | None = None,
) -> DataFrame:
    """The files below one or several folders (globs, single files) as rows, unread until they are used.

    Subfolders are read at any depth. Names are literal: spaces, unicode, `%`, `#`, `=` mean nothing special, and a
    local folder that is really called `a[1]` is found. As everywhere in Spark, names that begin with `.` or `_` are
    skipped; where photos on this machine are lost by that, a warning says how many. Files whose contents are no image
    are rows too: their error shows where they are decoded (`on_error=` of the verbs). So are files of no bytes on this
    machine's disk; on other file systems Spark passes over those.

    The rows' order is Spark's (by size within a partition): classes come mixed, and training does not depend on it.
    Batches on their way to Python are bounded by bytes: by Spark's own 64 MiB from Spark 4.1 on, before that by scan
    partitions of at most `spark.sql.files.maxPartitionBytes` (128 MB).

    Args:
        path: folder, file or glob, or several of them; plain paths or URLs (`file:`, `hdfs:`, `s3a:` ...).
        spark: the session to use; None: the active one, else `kindling.spark()`.
        skip: extensions (without dot, any case) of files to leave out; `()` reads everything.
        partitions: number of partitions, at most; None: about 64 to 512 photos each, several for each slot.
    Returns: columns `path` (string, as a URL), `label` (string, name of the folder that holds the file) and
        `content` (binary).
    Raises: StorageError, where a path does not exist; DataError, where it holds no files to read; ConfigError.

    >>> images("photos/*/train", skip=("txt",))  # doctest: +SKIP
    DataFrame[path: string, label: string, content: binary]
    """
    if partitions is not None and partitions < 1:
        raise ConfigError("partitions", partitions, "cannot hold any rows", "Use 1 or more")
    given = [path] if isinstance(path, str | PathLike) else list(path)
    if not given:
        raise ConfigError("path", path, "names nothing to read", "Give a folder, a glob or a list of them")
    session = spark or active_session() or start_session()
    paths = [_for_spark(one, here=_is_here(session)) for one in given]
    frame, files = _load(session, paths, given)
    endings = sorted({ending.lower().lstrip(".") for ending in skip})
    pattern = r"(?i)\.(" + "|".join(re.escape(ending) for ending in endings) + r")$"
    n_listed = len(files)
    files = [file for file in files if not (endings and re.search(pattern, file))]
    if not files:
        raise DataError(
            f"{_shown(given)} holds {n_listed} files, none of them an image by its name; "
            "skip=() reads them all the same."
        )

    from pyspark.sql import functions as F

    # From the metadata column, not from `path`: Spark applies filters on it (this one, a split's) to the list of files,
    # before any is opened. It is URL-encoded, and a plus sign stands for itself.
    url = F.col("_metadata.file_path")
    full: Column = F.url_decode(F.replace(url, F.lit("+"), F.lit("%2B")))
    if endings:
        frame = frame.where(~url.rlike(pattern))
    frame = frame.select(full.alias("path"), F.element_at(F.split(full, "/"), -2).alias("label"), "content")
    for one in given:
        _warn_of_hidden(one, session)
    if partitions is None and _batches_are_bounded(session):
        few, many = -(-len(files) // _MANY_ROWS), -(-len(files) // _FEW_ROWS)
        partitions = max(few, min(many, 4 * _slots(session)))
    if partitions is not None:
        frame = frame.coalesce(partitions)
    empty = _empty_files(files) if _is_here(session) else []
    if empty:
        rows = [(f"file:{path}", Path(path).parent.name, b"") for path in empty]
        frame = frame.unionAll(session.createDataFrame(rows, frame.schema).coalesce(1))
    return frame


def _load(session: SparkSession, paths: list[str], given: Sequence[object]) -> tuple[DataFrame, list[str]]:
    """The binaryFile frame, and the URLs of all files that it lists."""
    from pyspark.errors import AnalysisException

    reader = session.read.format("binaryFile").option("recursiveFileLookup", True)
    # Given one path that is no folder, Spark looks for a streaming sink there and logs a stack trace that there is
    # none; given two it does not. Files found twice count once.
    alone = len(paths) == 1 and (
        _GLOB.search(paths[0]) or (_local_path(paths[0]) and not os.path.exists(str(_local_path(paths[0]))))
    )
    try:
        with _listing_in_few_tasks(session):
            frame: DataFrame = reader.load(paths * 2 if alone else paths)
            files = _listed(frame)
    except AnalysisException as error:
        if "PATH_NOT_FOUND" in str(error) or "Path does not exist" in str(error):
            missing = re.search(r"does not exist: (.*?)\.?(?: SQLSTATE|\n|;|$)", str(error))
            raise StorageError(f"there is nothing at {missing.group(1) if missing else _shown(given)}.") from None
        raise
    except Exception as error:
        raise StorageError(f"{_shown(given)} cannot be listed: {first_line(error)}.") from error
    if not files:
        raise DataError(f"{_shown(given)} holds no files (names that begin with '.' or '_' are skipped).")
    return frame, files


@contextmanager
def _listing_in_few_tasks(session: SparkSession) -> Iterator[None]:
    """Spark lists many folders by a job with a task for each: with a hundred classes a second of tasks on one host."""
    name = "spark.sql.sources.parallelPartitionDiscovery.parallelism"
    before = session.conf.get(name, None)
    if before is not None and before != _SPARKS_LISTING:
        yield  # the user's own choice
        return
    session.conf.set(name, str(4 * _slots(session)))
    try:
        yield
    finally:
        if before is None:
            session.conf.unset(name)
        else:
            session.conf.set(name, before)


_SPARKS_LISTING = "10000"
"""Spark's default for the tasks of a listing."""


def _listed(frame: DataFrame) -> list[str]:
    jframe = getattr(frame, "_jdf", None)
    if jframe is None:
        return list(frame.inputFiles())
    # On Classic the names would come over one by one; joined they are one call.
    joined = frame.sparkSession._jvm.org.apache.hadoop.util.StringUtils.join("\n", jframe.inputFiles())
    return joined.split("\n") if joined else []


def _empty_files(urls: Sequence[str]) -> list[str]:
    """Files of no bytes on this machine's disk; Spark's scans pass over them without a word."""
    paths = [unquote(url.removeprefix("file:")) for url in urls if url.startswith("file:")]
    return ["/" + path.lstrip("/") for path in paths if os.path.exists(path) and os.path.getsize(path) == 0]


def _shown(given: Sequence[object]) -> str:
    texts = [str(one) for one in given]
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


# Paths


def _is_here(session: SparkSession) -> bool:
    """Whether Spark runs on this machine, so that relative paths and local files mean the same to both."""
    return str(session.conf.get("spark.master", "")).startswith("local")


def _local_path(path: str | PathLike[str]) -> str | None:
    """The path on this machine's disk, or None for other file systems."""
    if isinstance(path, PathLike):
        return str(Path(path).absolute())
    if path.startswith("file:"):
        return "/" + path[len("file:") :].lstrip("/")
    return None if _SCHEME.match(path) else path


def _for_spark(path: str | PathLike[str], *, here: bool) -> str:
    """The path as Spark must get it: absolute, and with glob characters escaped where they are part of a name."""
    local = _local_path(path)
    if local is None:
        return str(path)
    is_url = isinstance(path, PathLike) or str(path).startswith("file:")
    if not here:
        return f"file:{local}" if is_url else local
    local = os.path.abspath(os.path.expanduser(local))
    if os.path.exists(local):
        local = _GLOB.sub(lambda match: "\\" + match.group(), local)
    elif not _GLOB.search(local) and (is_url or not str(path).startswith("/")):
        raise StorageError(f"there is nothing at {local}.")
    return f"file:{local}" if is_url else local


def _warn_of_hidden(path: str | PathLike[str], session: SparkSession) -> None:
    """Cameras write names like _DSC0001.JPG, and Spark takes a leading underscore for a mark of its own."""
    local = _local_path(path)
    if local is None or not _is_here(session):
        return
    hidden = sum(1 for _ in _hidden_photos(local))
    if hidden:
        warnings.warn(
            f"{hidden} photos in {path} are not read: Spark skips files and folders whose names begin with '_'. "
            "Rename them to read them.",
            stacklevel=3,
        )


def _hidden_photos(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = any(part.startswith("_") and "=" not in part for part in Path(parent).relative_to(folder).parts)
        for name in files:
            if name.lower().endswith(_IMAGES) and (inside or (name.startswith("_") and "=" not in name)):
                yield name


# Sizes


def _batches_are_bounded(session: SparkSession) -> bool:
    """Whether this session's Arrow batches are bounded by bytes, whatever the partition holds."""
    major, minor = (int(part) for part in re.findall(r"\d+", session.version)[:2])
    if (major, minor) < (4, 1):
        return False
    value: Any = session.conf.get("spark.sql.execution.arrow.maxBytesPerBatch")
    number = re.match(r"-?\d+", str(value))
    return number is not None and 0 < int(number.group()) <= _SAFE_BATCH_BYTES


def _slots(session: SparkSession) -> int:
    """Tasks that run at once; a guess where only the server knows."""
    master = str(session.conf.get("spark.master", ""))
    in_brackets = re.match(r"local\[(\d+)", master)
    if in_brackets:
        return int(in_brackets.group(1))
    context = getattr(session, "_sc", None)  # Connect has none, and its `sparkContext` raises
    return int(context.defaultParallelism) if context is not None else 16
