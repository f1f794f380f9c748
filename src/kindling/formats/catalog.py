"""Published weights: one table of what is known about them, and a download that is verified, cached and atomic.

Facts are the publishers' own: torchvision puts the first digits of the sha256 into its file names, Keras states an md5
in its source. Where the full sha256 of a torchvision file is widely recorded and agrees with those digits, it is given.
What a file means is decided in `weights.py`. Nothing but `fetch` uses the network.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from kindling.errors import ConfigError, FormatError, StorageError
from kindling.formats.files import file_digest

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Published:
    """One weight file that somebody published."""

    name: str
    """`"vgg16-torchvision"`; within `load("vgg16", weights=...)` the part after the net's name is enough."""
    net: str
    layout: str
    """Which of the net's layouts the file has."""
    url: str
    size_mib: float
    """Size in MiB (2**20 bytes), rounded as published."""
    digest: str
    """`"sha256:..."` or `"md5:..."`; a sha256 may be its first digits only."""
    licence: str
    about: str
    """What it was trained on, and its published accuracy."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the `ImageStep` in which these weights differ from others of their layout."""

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


_TORCHVISION = "BSD-3-Clause (torchvision); trained on ImageNet, whose own terms are for research"
_OXFORD = "CC BY 4.0 (Visual Geometry Group, University of Oxford); converted by Keras"

CATALOG: Mapping[str, Published] = {
    entry.name: entry
    for entry in (
        Published(
            name="alexnet-torchvision",
            net="alexnet",
            layout="torchvision",
            url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            size_mib=233.087,
            digest="sha256:7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            licence=_TORCHVISION,
            about="ImageNet-1k, top-1 56.522 %, top-5 79.066 %",
        ),
        Published(
            name="vgg16-torchvision",
            net="vgg16",
            layout="torchvision",
            url="https://download.pytorch.org/models/vgg16-397923af.pth",
            size_mib=527.796,
            digest="sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            licence=_TORCHVISION,
            about="ImageNet-1k, top-1 71.592 %, top-5 90.382 %",
        ),
        Published(
            name="vgg16-keras",
            net="vgg16",
            layout="keras",
            url="https://storage.googleapis.com/tensorflow/keras-applications/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels.h5",
            size_mib=527.827,
            digest="md5:64373286793e3c8b2b4e3219cbf3544b",
            licence=_OXFORD,
            about="ImageNet-1k, top-1 71.3 %, top-5 90.1 %",
        ),
        Published(
            name="vgg16-keras-notop",
            net="vgg16",
            layout="keras-notop",
            url="https://storage.googleapis.com/tensorflow/keras-applications/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            size_mib=56.161,
            digest="md5:6d6bbae143d832006294945121d1f1fc",
            licence=_OXFORD,
            about="ImageNet-1k, without the classifier",
        ),
        Published(
            name="squeezenet1_1-torchvision",
            net="squeezenet1_1",
            layout="torchvision",
            url="https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
            size_mib=4.729,
            digest="sha256:b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
            licence=_TORCHVISION,
            about="ImageNet-1k, top-1 58.178 %, top-5 80.624 %",
        ),
        Published(
            name="squeezenet1_1-keras-notop",
            net="squeezenet1_1",
            layout="keras-notop",
            url="https://raw.githubusercontent.com/DeepCognition/keras-squeezenet/"
            "a73d4339aa4d37c51a0b3ba044bed55477abec73/squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5",
            size_mib=2.863,
            digest="sha256:17154246284f555591549ac2c83e127abfbf4307dc4b0060fdaa2931d0fa38da",
            licence="MIT (keras-squeezenet)",
            about="ImageNet-1k, without the classifier",
        ),
        Published(
            name="mobilenet_v2-torchvision",
            net="mobilenet_v2",
            layout="torchvision",
            url="https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
            size_mib=13.555,
            digest="sha256:b0353104",
            licence=_TORCHVISION,
            about="ImageNet-1k, top-1 71.878 %, top-5 90.286 %",
        ),
        Published(
            name="mobilenet_v2-torchvision-v2",
            net="mobilenet_v2",
            layout="torchvision",
            url="https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth",
            size_mib=13.598,
            digest="sha256:7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f",
            licence=_TORCHVISION,
            about="ImageNet-1k, torchvision's newer recipe, top-1 72.154 %, top-5 90.822 %",
            image={"resize_to": 232},
        ),
    )
}
"""Every published weight file that kindling knows, by name."""


def find(name: str, net: str | None = None) -> Published | None:
    """The catalogue entry of that name; with `net`, the part of the name after the net's is enough.

    >>> find("torchvision", net="vgg16").name, find("nonsense") is None
    ('vgg16-torchvision', True)
    """
    return CATALOG.get(name) or (CATALOG.get(f"{net}-{name}") if net else None)


def published_as(path: Path, net: str, sha256: str) -> Published | None:
    """The catalogue entry whose content this local file has, whatever it is called."""
    for entry in CATALOG.values():
        algorithm, _, digits = entry.digest.partition(":")
        if entry.net != net:
            continue
        if algorithm == "sha256" and sha256.startswith(digits):
            return entry
        if algorithm == "md5" and path.name == entry.file_name and file_digest(path, "md5") == digits:
            return entry
    return None


def cache_folder(cache: str | PathLike[str] | None = None) -> Path:
    """Where downloads are kept: `cache`, else the variable KINDLING_CACHE, else `~/.cache/kindling`."""
    return Path(cache or os.environ.get("KINDLING_CACHE") or Path.home() / ".cache" / "kindling")


def download(name_or_url: str, *, cache: str | PathLike[str] | None = None, progress: bool = True) -> Path:
    """A published weight file on this machine: from the cache when it is there and whole, else fetched and verified.

    Args:
        name_or_url: a name in `CATALOG`, or an http(s) URL. A URL may end in `#sha256=HEX` to be verified.
        cache: folder to keep it in; see `cache_folder`.
        progress: show a progress bar on stderr.
    Returns: path of the whole, verified file.
    Raises: ConfigError, for a name that is not in the table; StorageError, when it cannot be fetched whole;
        FormatError, when what came has another digest (nothing is kept).

    >>> download("vgg61-torchvision")
    Traceback (most recent call last):
    kindling.errors.ConfigError: name_or_url='vgg61-torchvision' is neither a known name nor an http(s) URL. Known: ...
    """
    entry = CATALOG.get(name_or_url)
    if entry is not None:
        return fetch(entry.url, cache_folder(cache) / entry.file_name, digest=entry.digest, progress=progress)
    parts = urllib.parse.urlsplit(name_or_url)
    if parts.scheme not in ("http", "https"):
        because = "is neither a known name nor an http(s) URL"
        raise ConfigError("name_or_url", name_or_url, because, f"Known: {', '.join(CATALOG)}")
    digest = None
    if parts.fragment:
        digest = parts.fragment.replace("=", ":", 1)
        if not re.fullmatch(r"sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32}", digest):
            because = "ends in something that is no digest"
            raise ConfigError("name_or_url", name_or_url, because, "End it in #sha256=HEX, or in nothing")
    url = urllib.parse.urlunsplit(parts._replace(fragment=""))
    base = re.sub(r"[^A-Za-z0-9._-]", "_", urllib.parse.unquote(parts.path.rpartition("/")[2])) or "weights"
    # Two URLs may end in the same name.
    place = cache_folder(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{base[-120:]}"
    return fetch(url, place, digest=digest, progress=progress)


def fetch(url: str, place: Path, *, digest: str | None = None, progress: bool = True) -> Path:
    """`url` as the file `place`, whole and verified or not at all; a good file that is already there is kept.

    A connection that breaks is taken up again where it stopped, a few times. Without a digest the file is checked
    against the length the server announces, and its own sha256 is remembered beside it, so that damage is noticed.

    Raises: StorageError, FormatError.
    """
    record = place.with_name(place.name + ".json")
    if place.is_file():
        expected = digest or _recorded(record, url)
        if expected is not None and _agrees(place, expected):
            return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{place.parent} cannot be made: {error.strerror}. Name another folder with KINDLING_CACHE."
        ) from error
    part = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        _receive(url, part, progress)
        if digest is not None and not _agrees(part, digest):
            algorithm, _, digits = digest.partition(":")
            raise FormatError(
                f"{url} gave a file whose {algorithm} is {file_digest(part, algorithm)}; published is {digits}. "
                "It was thrown away. Fetch it some other way and give its path, or try again later."
            )
        if digest is None:
            _write_record(record, url, "sha256:" + file_digest(part))
        os.replace(part, place)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        why = error.strerror or error
        raise StorageError(f"{url} could not be kept in {place.parent}: {why}. Is the disk full?") from error
    finally:
        part.unlink(missing_ok=True)
    return place


def _agrees(path: Path, digest: str) -> bool:
    algorithm, _, digits = digest.partition(":")
    return file_digest(path, algorithm).startswith(digits)


def _write_record(record: Path, url: str, digest: str) -> None:
    note = record.with_name(f".{record.name}.{secrets.token_hex(4)}.part")
    try:
        note.write_text(json.dumps({"url": url, "digest": digest}), encoding="utf-8")
        os.replace(note, record)
    finally:
        note.unlink(missing_ok=True)


def _recorded(record: Path, url: str) -> str | None:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        return str(data["digest"]) if data["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Broken(Exception):
    """The connection ended before the file did."""


def _receive(url: str, part: Path, progress: bool) -> None:
    """All bytes of `url` into `part`, taking up a broken connection where it stopped."""
    cause: Exception | None = None
    with _progress_bar(url, progress) as report, part.open("wb") as file:
        validator: str | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(0.2 * 2**attempt)
            have = file.tell()
            request = urllib.request.Request(url, headers={"User-Agent": "kindling", "Accept-Encoding": "identity"})
            if have and validator:
                request.add_header("Range", f"bytes={have}-")
                request.add_header("If-Range", validator)
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                    if answer.status != 206:
                        file.seek(0)
                        file.truncate()
                    elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                        file.seek(0)
                        file.truncate()
                        validator = None
                        raise _Broken("the server sent another part than was asked for")
                    validator = _validator(answer.headers)
                    _copy(answer, file, report)
                    return
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 416, 429):
                    raise StorageError(f"{url} answered {error.code} {error.reason}. Is the address right?") from error
                cause, validator = error, None
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, _Broken) as error:
                cause = error
    reason = getattr(cause, "reason", None) or cause
    raise StorageError(
        f"{url} could not be fetched whole in {_ATTEMPTS} attempts: {reason}. "
        "Where there is no network, fetch the file elsewhere and give its path."
    ) from cause


def _validator(headers: Any) -> str | None:
    tag: str | None = headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    modified: str | None = headers.get("Last-Modified")
    return modified


class _Report(Protocol):
    def __call__(self, done: int, total: int | None) -> None: ...


def _copy(answer: Any, file: Any, report: _Report) -> None:
    length = answer.headers.get("Content-Length")
    start = file.tell()
    total = start + int(length) if length is not None and length.isdigit() else None
    while True:
        chunk = answer.read(_CHUNK_BYTES)
        if not chunk:
            break
        file.write(chunk)
        report(file.tell(), total)
    if total is not None and file.tell() != total:
        raise _Broken(f"{file.tell():,} of {total:,} bytes came")


@contextmanager
def _progress_bar(url: str, show: bool) -> Iterator[_Report]:
    if not show:
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(urllib.parse.urlsplit(url).path.rpartition("/")[2] or url, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
