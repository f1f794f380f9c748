"""One door to every place where files are kept: local folders, fsspec, and Spark's Hadoop file systems.

A `Place` is a folder somewhere; names inside it are relative paths with `/`. Local paths and `file:` are used directly.
`hdfs:`, `s3a:`, `abfss:`, `dbfs:` and the like go through the session's driver where there is one, since Python workers
have no Hadoop client; everything else, and they too without a session, through fsspec. What neither reaches is refused
when it is opened. What is kept in these places is not known here: see `bundle.py` and `train/checkpoint.py`. pyspark is
only used through the session that is given or active.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import StorageError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?=/)")
# Spark's own names for file systems: the session's configuration knows how to reach them.
_HADOOP = frozenset({"hdfs", "viewfs", "webhdfs", "swebhdfs", "s3a", "s3n", "abfs", "abfss", "wasb", "wasbs", "dbfs", "maprfs", "oss", "cosn", "ofs"})  # fmt: skip  # noqa: E501
# Stores where a file appears whole when it is closed; elsewhere a file is written beside its name and renamed.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory", "oss", "cosn", "wasb", "wasbs", "s3n"})  # fmt: skip  # noqa: E501
_PART = ".kindling-part"
_CHUNK = 4 << 20  # bytes of one row when a file is read through Spark Connect


class Place(ABC):
    """A folder that files are read from and written to. A file is written whole or not at all."""

    path: str
    """Where it is: an absolute path, or a URL, without a slash at the end."""
    local: Path | None = None
    """The folder itself, where it is on this machine."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises: StorageError, when it is not there or cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="kindling-") as folder:
            copy = Path(folder) / "file"
            self.download(name, copy)
            return copy.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in place of an older one of the name.

        Raises: StorageError, when it cannot be written.
        """
        with tempfile.TemporaryDirectory(prefix="kindling-") as folder:
            copy = Path(folder) / "file"
            copy.write_bytes(data)
            self.upload(copy, name)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path of this machine to write a large file to; where the block ends well, it stands in the place, whole.

        Raises: StorageError, when the block or the way there fails.
        """
        with tempfile.TemporaryDirectory(prefix="kindling-") as folder:
            copy = Path(folder) / "file"
            with _told(f"cannot write {self._url(name)}"):
                yield copy
            self.upload(copy, name)

    @abstractmethod
    def exists(self, name: str = "") -> bool:
        """Whether there is a file or a folder of that name; `""` asks for the place itself."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes in a file. Raises: StorageError, when it is not there."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Names of all files in a folder of the place and in the folders below, sorted; none if it is not there."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if it is not there."""

    @abstractmethod
    def upload(self, local: str | Path, name: str) -> None:
        """Copy a file of this machine into the place, whole, over an older one."""

    @abstractmethod
    def download(self, name: str, local: str | Path) -> None:
        """Copy a file of the place to this machine."""

    @abstractmethod
    def makedirs(self) -> None:
        """Make the folder, and those above it; refuses a place that cannot be written where that can be told."""

    def _url(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{_checked(name)}" if name else self.path


def open_place(path: str | Path, spark: SparkSession | None = None) -> Place:
    """The place that a path or URL names. It need not exist yet.

    Args:
        path: a path of this machine (relative ones are made absolute, `~` is expanded), a `file:` URL (percent signs
            are decoded), or any other URL.
        spark: the session whose file systems may be used; None takes the active one, if pyspark is in use.
    Raises: StorageError, when neither a session nor fsspec knows the scheme, or its package is missing.

    >>> open_place("memory://models/digits/")
    FsspecPlace('memory://models/digits')
    """
    text = os.fspath(path)
    match = _SCHEME.match(text) if isinstance(path, str) else None
    if match is None:
        return LocalPlace(Path(text).expanduser())
    scheme = match[1].lower()
    if scheme == "file":
        return LocalPlace(Path(urllib.request.url2pathname(urllib.parse.urlsplit(text, allow_fragments=False).path)))
    session = spark if spark is not None else _active_session()
    if scheme in _HADOOP and session is not None:
        return hadoop_place(text, session)
    try:
        return FsspecPlace(text)
    except StorageError as without:
        if session is None:
            raise StorageError(f"{without} Or give the Spark session whose file systems know {scheme!r}.") from without
        try:
            return hadoop_place(text, session)
        except StorageError as error:
            raise StorageError(f"{text!r} is reached neither by Spark nor by fsspec. {error} {without}") from error


def hadoop_place(path: str, spark: SparkSession) -> Place:
    """A place on one of the session's own file systems, on Spark Classic or Connect.

    Raises: StorageError, when the session knows no such file system.
    """
    if "connect" in type(spark).__module__.split("."):
        return ConnectPlace(path, spark)
    return HadoopPlace(path, spark)


def _active_session() -> Any:
    from kindling.session import active_session

    return active_session()


def _checked(name: str) -> str:
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise StorageError(f"{name!r} is no name inside a place: it must be relative and stay below it.")
    return name


def _source(local: str | Path) -> None:
    if not Path(local).is_file():
        raise StorageError(f"cannot copy {local}: there is no such file.")


def _why(error: BaseException) -> str:
    """The first line of an error's text, without a Java stack trace."""
    cause = getattr(error, "java_exception", None)
    text = str(cause.toString() if cause is not None else error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if len(first) < 300 else f"{first[:300]}..."


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into one sentence."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{what}: there is no such file.") from error
    except Exception as error:  # each backend has a family of its own
        raise StorageError(f"{what}: {_why(error)}.") from error


class LocalPlace(Place):
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.local: Path = Path(os.path.abspath(folder))
        self.path = str(self.local)

    def _at(self, name: str) -> Path:
        return self.local / _checked(name) if name else self.local

    def read(self, name: str) -> bytes:
        with _told(f"cannot read {self._at(name)}"):
            return self._at(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with _told(f"cannot write {self._at(name)}"), self._whole(name) as part:
            part.write_bytes(data)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        with _told(f"cannot write {self._at(name)}"), self._whole(name) as part:
            yield part

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """A path to write to, which takes the name when all is written and on disk."""
        target = self._at(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{uuid.uuid4().hex}{_PART}")
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def exists(self, name: str = "") -> bool:
        return self._at(name).exists()

    def size(self, name: str) -> int:
        with _told(f"cannot read {self._at(name)}"):
            return self._at(name).stat().st_size

    def list(self, prefix: str = "") -> list[str]:
        folder = self._at(prefix)
        with _told(f"cannot list {folder}"):
            found = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(_PART))
            return sorted(file.relative_to(self.local).as_posix() for file in found)

    def delete(self, name: str) -> None:
        target = self._at(name)
        with _told(f"cannot delete {target}"):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def upload(self, local: str | Path, name: str) -> None:
        with _told(f"cannot copy {local} to {self._at(name)}"), self._whole(name) as part:
            shutil.copyfile(local, part)

    def download(self, name: str, local: str | Path) -> None:
        with _told(f"cannot copy {self._at(name)} to {local}"):
            shutil.copyfile(self._at(name), local)

    def makedirs(self) -> None:
        with _told(f"cannot make the folder {self.local}"):
            self.local.mkdir(parents=True, exist_ok=True)
        if not os.access(self.local, os.W_OK | os.X_OK):
            raise StorageError(f"the folder {self.local} cannot be written to by this user.")


class FsspecPlace(Place):
    """A folder that fsspec reaches: `s3:`, `gs:`, `memory:` and many more, each with its own package."""

    def __init__(self, path: str) -> None:
        import fsspec

        self.path = path.rstrip("/")
        self._scheme = path.partition(":")[0].lower()
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        except Exception as error:  # an unknown protocol, a missing package, credentials
            raise StorageError(f"fsspec cannot open {path!r}: {_why(error)}.") from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{_checked(name)}" if name else self._root

    def read(self, name: str) -> bytes:
        with _told(f"cannot read {self._url(name)}"):
            return bytes(self._fs.cat_file(self._at(name)))

    def upload(self, local: str | Path, name: str) -> None:
        _source(local)
        target = self._at(name)
        with _told(f"cannot write {self._url(name)}"):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            if self._scheme in _OBJECT_STORES:
                self._fs.put_file(str(local), target)
                return
            part = f"{target.rpartition('/')[0]}/.{uuid.uuid4().hex}{_PART}"
            self._fs.put_file(str(local), part)
            if self._fs.exists(target):
                self._fs.rm_file(target)
            self._fs.mv(part, target)

    def download(self, name: str, local: str | Path) -> None:
        with _told(f"cannot read {self._url(name)}"):
            self._fs.get_file(self._at(name), str(local))

    def exists(self, name: str = "") -> bool:
        with _told(f"cannot look at {self._url(name)}"):
            self._fs.invalidate_cache()  # another process may have written since
            return bool(self._fs.exists(self._at(name)))

    def size(self, name: str) -> int:
        with _told(f"cannot read {self._url(name)}"):
            self._fs.invalidate_cache()
            return int(self._fs.info(self._at(name))["size"])

    def list(self, prefix: str = "") -> list[str]:
        with _told(f"cannot list {self._url(prefix)}"):
            self._fs.invalidate_cache()
            root = self._fs._strip_protocol(self._root).rstrip("/")
            found = (str(name)[len(root) + 1 :] for name in self._fs.find(self._at(prefix)))
            return sorted(name for name in found if not name.endswith(_PART))

    def delete(self, name: str) -> None:
        with _told(f"cannot delete {self._url(name)}"):
            if self._fs.exists(self._at(name)):
                self._fs.rm(self._at(name), recursive=True)

    def makedirs(self) -> None:
        with _told(f"cannot make the folder {self.path}"):
            self._fs.makedirs(self._root, exist_ok=True)


class HadoopPlace(Place):
    """A folder on a Hadoop file system, through the JVM of a Spark Classic driver, which shares this machine's disk."""

    def __init__(self, path: str, spark: SparkSession) -> None:
        self.path = path.rstrip("/")
        self._jvm: Any = spark._jvm
        self._gateway: Any = spark.sparkContext._gateway
        with _told(f"Spark cannot open {path!r}"):
            self._conf = spark._jsparkSession.sessionState().newHadoopConf()
            self._fs = self._path("").getFileSystem(self._conf)
            self._root = self._fs.makeQualified(self._path("")).toString().rstrip("/")

    def _path(self, name: str) -> Any:
        # The one-argument constructor takes the text as it is: spaces and percent signs mean themselves.
        return self._jvm.org.apache.hadoop.fs.Path(self._url(name))

    def _local(self, path: str | Path) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path("file", None, os.path.abspath(path))

    def upload(self, local: str | Path, name: str) -> None:
        _source(local)
        target = self._path(name)
        with _told(f"cannot write {self._url(name)}"):
            self._fs.mkdirs(target.getParent())
            if self._fs.getScheme() in _OBJECT_STORES:
                self._fs.copyFromLocalFile(False, True, self._local(local), target)
                return
            part = self._jvm.org.apache.hadoop.fs.Path(target.getParent(), f".{uuid.uuid4().hex}{_PART}")
            try:
                self._fs.copyFromLocalFile(False, True, self._local(local), part)
                self._rename(part, target)
            finally:
                self._fs.delete(part, False)

    def _rename(self, part: Any, target: Any) -> None:
        if not self._fs.exists(target) and self._fs.rename(part, target):
            return
        context = self._jvm.org.apache.hadoop.fs.FileContext
        options = getattr(self._jvm.org.apache.hadoop.fs, "Options$Rename")
        overwrite = self._gateway.new_array(options, 1)
        overwrite[0] = options.OVERWRITE
        context.getFileContext(self._fs.getUri(), self._conf).rename(part, target, overwrite)

    def download(self, name: str, local: str | Path) -> None:
        with _told(f"cannot read {self._url(name)}"):
            # "Raw" local: no checksum file beside the copy.
            self._fs.copyToLocalFile(False, self._path(name), self._local(local), True)

    def exists(self, name: str = "") -> bool:
        with _told(f"cannot look at {self._url(name)}"):
            return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        with _told(f"cannot read {self._url(name)}"):
            return int(self._fs.getFileStatus(self._path(name)).getLen())

    def list(self, prefix: str = "") -> list[str]:
        with _told(f"cannot list {self._url(prefix)}"):
            folder = self._path(prefix)
            if not self._fs.exists(folder):
                return []
            found, files = [], self._fs.listFiles(folder, True)
            while files.hasNext():
                found.append(files.next().getPath().toString()[len(self._root) + 1 :])
            return sorted(name for name in found if not name.endswith(_PART))

    def delete(self, name: str) -> None:
        with _told(f"cannot delete {self._url(name)}"):
            self._fs.delete(self._path(name), True)

    def makedirs(self) -> None:
        with _told(f"cannot make the folder {self.path}"):
            if not self._fs.mkdirs(self._path("")):
                raise StorageError(f"Spark cannot make the folder {self.path}.")


class ConnectPlace(Place):
    """A folder on a file system of a Spark Connect server.

    Reading goes through `binaryFile`, writing through `copyFromLocalToFs`, which knows the server's default file system
    alone. Spark Connect has no way to delete, reads files of up to 2 GiB, and does not see empty ones.
    """

    def __init__(self, path: str, spark: SparkSession) -> None:
        self.path = path.rstrip("/")
        self._spark: Any = spark

    def _files(self, name: str, *, below: bool = False) -> Any:
        reader = self._spark.read.format("binaryFile")
        if below:
            reader = reader.option("recursiveFileLookup", True)
        return reader.load(re.sub(r"([\\{}\[\]*?])", r"\\\1", self._url(name)))

    def _found(self, name: str, *, below: bool) -> list[tuple[str, int]]:
        """Path and size of each file; none where nothing is there."""
        from pyspark.errors import AnalysisException

        try:
            rows = self._files(name, below=below).select("path", "length").collect()
        except AnalysisException as error:
            if "PATH_NOT_FOUND" in str(error):
                return []
            raise
        return [(str(row[0]), int(row[1])) for row in rows]

    def upload(self, local: str | Path, name: str) -> None:
        _source(local)
        target = self.path.partition(":")[2] if _SCHEME.match(self.path) else self.path
        if target.startswith("//"):
            target = "/" + target[2:].partition("/")[2]
        with _told(f"cannot write {self._url(name)}"):
            self._spark.copyFromLocalToFs(str(local), f"{target}/{_checked(name)}")
            # The server's default file system may be another than the one that was named: look.
            size = Path(local).stat().st_size
            if size and [length for _, length in self._found(name, below=False)] != [size]:
                raise StorageError(
                    f"{self._url(name)} was not written: a Spark Connect server writes to its default file system "
                    "alone, which seems to be another. Install the fsspec package for this scheme, or use Classic."
                )

    def download(self, name: str, local: str | Path) -> None:
        from pyspark.sql import functions as F

        with _told(f"cannot read {self._url(name)}"):
            size = self.size(name)
            # In pieces, so that no message is larger than what the connection takes.
            place = F.explode(F.sequence(F.lit(0), F.lit(max(size - 1, 0) // _CHUNK)))
            pieces = self._files(name).select("content", place.alias("place"))
            pieces = pieces.select("place", F.expr(f"substring(content, cast(place * {_CHUNK} + 1 as int), {_CHUNK})"))
            done = 0
            with open(local, "wb") as file:
                for row in pieces.toLocalIterator():
                    file.seek(int(row[0]) * _CHUNK)
                    done += file.write(bytes(row[1]))
            if done != size:
                raise StorageError(f"{self._url(name)} has {size} bytes, of which {done} arrived.")

    def exists(self, name: str = "") -> bool:
        with _told(f"cannot look at {self._url(name)}"):
            return bool(self._found(name, below=True))

    def size(self, name: str) -> int:
        with _told(f"cannot read {self._url(name)}"):
            found = self._found(name, below=False)
            if len(found) != 1:
                raise FileNotFoundError(name)
            return found[0][1]

    def list(self, prefix: str = "") -> list[str]:
        with _told(f"cannot list {self._url(prefix)}"):
            inside = urllib.parse.urlsplit(self.path, allow_fragments=False).path.strip("/") + "/"
            found = (path.partition(inside)[2] for path, _ in self._found(prefix, below=True))
            return sorted(name for name in found if name)

    def delete(self, name: str) -> None:
        raise StorageError(
            f"cannot delete {self._url(name)}: Spark Connect has no way to. Delete it with your own tools, or install "
            "the fsspec package for this scheme."
        )

    def makedirs(self) -> None:
        """Folders come into being with their files."""
