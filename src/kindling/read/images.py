"""`read.images`: files of photos, or rows of Spark's `image` source, as path, label and content. Decodes nothing.

Spark's `binaryFile` source does the listing and the reading, on every file system Spark knows. What is added: the class
from the folder's name, files that are plainly something else left out, odd names taken literally, and partitions sized
for nets. Decoding, and what becomes of files that are no images, is `prepare/image.py`.
"""

from __future__ import annotations

import os
import re
import unicodedata
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
    path: str | PathLike[str] | Sequence[str | PathLike[str]] | DataFrame,
    *,
    spark: SparkSession | None = None,
    skip: Collection[str] = NOT_IMAGES,
    partitions: int | None = None,
) -> DataFrame:
    """The files below one or several folders (globs, single files) as rows, unread until they are used.

    Subfolders are read at any depth. Names are literal: spaces, unicode, `%`, `#`, `=` mean nothing special, and a
    local folder that is really called `a[1]` is found. As everywhere in Spark, names that begin with `.` or `_` are
    skipped. Where photos on this machine are lost by that, a warning says how many; so it does where Java cannot spell
    their names, in a Spark that was started in another locale than `kindling.spark` takes. Files whose contents are no
    image are rows too: their error shows where they are decoded (`on_error=` of the verbs). So are files of no bytes on
    this machine's disk; on other file systems Spark passes over those.

    The rows' order is Spark's (by size within a partition): classes come mixed, and training does not depend on it.
    Batches on their way to Python are bounded by bytes: by Spark's own 64 MiB from Spark 4.1 on, before that by scan
    partitions of at most `spark.sql.files.maxPartitionBytes` (128 MB).

    Args:
        path: folder, file or glob, or several of them; plain paths or URLs (`file:`, `hdfs:`, `s3a:` ...). Or a
            DataFrame of Spark's own `image` source, `spark.read.format("image").load(...)`, whose rows get the same
            columns; its pixels (BGR, BGRA or grey) stay as they are.
        spark: the session to use; None: the active one, else `kindling.spark()`.
        skip: extensions (without dot, any case) of files to leave out; `()` reads everything.
        partitions: number of partitions, at most; None: about 64 to 512 photos each, several for each slot.
    Returns: columns `path` (string, as a URL), `label` (string, name of the folder that holds the file) and
        `content` (binary; of the `image` source its structs).
    Raises: StorageError, where a path does not exist; DataError, where it holds no files to read, and for a DataFrame
        without a column of images; ConfigError.

    >>> images("photos/*/train", skip=("txt",))  # doctest: +SKIP
    DataFrame[path: string, label: string, content: binary]
    """
    if partitions is not None and partitions < 1:
        raise ConfigError("partitions", partitions, "cannot hold any rows", "Use 1 or more")
    if hasattr(path, "schema"):
        rows = _of_image_source(path)
        return rows if partitions is None else rows.coalesce(partitions)
    given = [path] if isinstance(path, str | PathLike) else list(path)
    if not given:
        raise ConfigError("path", path, "names nothing to read", "Give a folder, a glob or a list of them")
    session = spark or active_session() or start_session()
    paths = [_for_spark(one, here=_is_here(session)) for one in given]
    frame, files = _load(session, paths, given)
    for one in given:
        _warn_of_lost(one, session, files)
    if not files:
        raise DataError(f"{_shown(given)} holds no files (names that begin with '.' or '_' are skipped).")
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
    full = _decoded(url)
    if endings:
        frame = frame.where(~url.rlike(pattern))
    frame = frame.select(full.alias("path"), F.element_at(F.split(full, "/"), -2).alias("label"), "content")
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


def _load(session: SparkSession, paths: list[str], given: Sequence[str | PathLike[str]]) -> tuple[DataFrame, list[str]]:
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
            why = f" for Spark: {_LOCALE}" if any(_unspelt(one) for one in given) else ""
            raise StorageError(f"there is nothing at {missing.group(1) if missing else _shown(given)}{why}.") from None
        raise
    except Exception as error:
        raise StorageError(f"{_shown(given)} cannot be listed: {first_line(error)}.") from error
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


_LOCALE = "Java cannot spell the names in the locale that Spark was started in (LC_ALL=C.UTF-8 is one that can)"


def _unspelt(path: str | PathLike[str]) -> bool:
    """Whether a path that Spark does not find is here, under a name that not every locale can spell."""
    local = _local_path(path)
    return local is not None and not local.isascii() and os.path.exists(local)


def _warn_of_lost(path: str | PathLike[str], session: SparkSession, files: Sequence[str]) -> None:
    """Tell of photos in a folder on this machine that Spark has passed over.

    Cameras write names like _DSC0001.JPG, and Spark takes a leading underscore for a mark of its own.
    """
    local = _local_path(path)
    if local is None or not _is_here(session):
        return
    hidden = unspelt = 0
    listed = {_composed(name) for name in map(unquote, files) if not name.isascii()}
    for name, is_hidden in _photos(os.path.abspath(os.path.expanduser(local))):
        hidden += is_hidden
        unspelt += not is_hidden and not name.isascii() and _composed(name) not in listed
    for number, why in (
        (hidden, "Spark skips files and folders whose names begin with '_'. Rename them to read them"),
        (unspelt, _LOCALE),
    ):
        if number:
            warnings.warn(f"{number} photos in {path} are not read: {why}.", stacklevel=3)


def _composed(name: str) -> str:
    """A path or URL on this machine's disk as one spelling: macOS takes letters apart."""
    return unicodedata.normalize("NFC", "/" + name.removeprefix("file:").lstrip("/"))


def _photos(folder: str) -> Iterator[tuple[str, bool]]:
    """Paths of the photos below a folder by their names, and whether Spark skips them for a leading '_'."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = any(part.startswith("_") and "=" not in part for part in Path(parent).relative_to(folder).parts)
        for name in files:
            if name.lower().endswith(_IMAGES) and not name.startswith("."):
                yield os.path.join(parent, name), inside or (name.startswith("_") and "=" not in name)


# Spark's own image source


def _of_image_source(frame: DataFrame) -> DataFrame:
    """Rows of Spark's `image` source with the columns that files have."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import StructType

    fields = {"origin", "height", "width", "nChannels", "mode", "data"}
    kinds = ((field.name, field.dataType) for field in frame.schema.fields)
    found = [name for name, kind in kinds if isinstance(kind, StructType) and fields <= set(kind.names)]
    if len(found) != 1:
        raise DataError(
            f"the DataFrame has {len(found)} columns of images as spark.read.format('image') gives them, not one: "
            f"{', '.join(frame.columns)}. Columns of files are read as they are, without read.images."
        )
    image = F.col("`" + found[0].replace("`", "``") + "`")
    # As Spark names files elsewhere: one slash.
    path = F.regexp_replace(_decoded(image["origin"]), "^file:///", "file:/")
    label = F.col("label") if "label" in frame.columns else F.element_at(F.split(path, "/"), -2)
    return frame.select(path.alias("path"), label.alias("label"), image.alias("content"))


def _decoded(url: Column) -> Column:
    """A URL-encoded path as plain text."""
    from pyspark.sql import functions as F

    return F.url_decode(F.replace(url, F.lit("+"), F.lit("%2B")))


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
