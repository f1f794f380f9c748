"""The run directory for workers that do not see it: a `Place` whose files the driver reads and writes for them."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

from kindling.errors import StorageError
from kindling.storage import Place
from kindling.train.line import Address, Line, connect

_PIECE_BYTES = 8 << 20


class RemotePlace(Place):
    """The driver's run directory, reached over a line of its own that is opened when it is first needed.

    Raises (all methods): StorageError, what the driver says of the file, or that it cannot be reached.
    """

    def __init__(self, path: str, address: Address) -> None:
        self.path, self._address = path, address
        self._line: Line | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._line is not None:
                self._line.close()
                self._line = None

    def exists(self, name: str = "") -> bool:
        return bool(self._ask("exists", name))

    def size(self, name: str) -> int:
        return int(self._ask("size", name))

    def list(self, prefix: str = "") -> list[str]:
        return [str(name) for name in self._ask("list", prefix)]

    def delete(self, name: str) -> None:
        self._ask("delete", name)

    def makedirs(self) -> None:
        self._ask("makedirs", "")

    def upload(self, local: str | Path, name: str) -> None:
        with open(local, "rb") as file, self._lock:
            try:
                line = self._opened()
                size = Path(local).stat().st_size
                line.send({"ask": "write", "name": name, "bytes": size})
                while piece := file.read(_PIECE_BYTES):
                    line.send({}, piece)
                self._answer(line)
            except OSError as error:
                raise self._broken(error) from error

    def download(self, name: str, local: str | Path) -> None:
        with open(local, "wb") as file, self._lock:
            try:
                line = self._opened()
                line.send({"ask": "read", "name": name})
                left = int(self._answer(line))
                while left:
                    _, piece = _frame(line)
                    file.write(piece)
                    left -= len(piece)
            except OSError as error:
                raise self._broken(error) from error

    def _ask(self, what: str, name: str) -> Any:
        with self._lock:
            try:
                line = self._opened()
                line.send({"ask": what, "name": name})
                return self._answer(line)
            except OSError as error:
                raise self._broken(error) from error

    def _opened(self) -> Line:
        if self._line is None:
            self._line = connect(self._address)
            self._line.send({"kind": "files"})
        return self._line

    def _answer(self, line: Line) -> Any:
        answer, _ = _frame(line)
        if "error" in answer:
            raise StorageError(answer["error"])
        return answer["answer"]

    def _broken(self, error: OSError) -> StorageError:
        if isinstance(error, StorageError):
            return error
        if self._line is not None:
            self._line.close()
            self._line = None
        return StorageError(f"the driver, which keeps {self.path}, cannot be reached: {error}.")


def serve_files(line: Line, place: Place) -> None:
    """The driver's side of a `RemotePlace`, until the worker hangs up."""
    while (frame := line.receive()) is not None:
        message = frame[0]
        what, name = message["ask"], str(message["name"])
        with tempfile.TemporaryDirectory(prefix="kindling-") as folder:
            copy = Path(folder) / "file"
            problem = None
            if what == "write":
                problem = _receive_file(line, copy, int(message["bytes"]))
            try:
                if problem is not None:
                    raise problem
                answer = _asked(place, what, name, copy)
            except OSError as error:
                line.send({"error": str(error)})
                continue
            line.send({"answer": answer})
            if what == "read":
                with copy.open("rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        line.send({}, piece)


def _receive_file(line: Line, copy: Path, left: int) -> OSError | None:
    """Take all the pieces, also where they cannot be kept: the line goes on. Returns what went wrong."""
    problem = None
    with copy.open("wb") as file:
        while left:
            _, piece = _frame(line)
            left -= len(piece)
            try:
                if problem is None:
                    file.write(piece)
            except OSError as error:
                problem = error
    return problem


def _asked(place: Place, what: str, name: str, copy: Path) -> Any:
    if what == "write":
        return place.upload(copy, name)
    if what == "read":
        place.download(name, copy)
        return copy.stat().st_size
    if what == "exists":
        return place.exists(name)
    if what == "size":
        return place.size(name)
    if what == "list":
        return place.list(name)
    if what == "delete":
        return place.delete(name)
    if what == "makedirs":
        return place.makedirs()
    raise StorageError(f"the driver cannot {what!r} a file.")


def _frame(line: Line) -> tuple[dict[str, Any], bytes]:
    frame = line.receive()
    if frame is None:
        raise ConnectionError("the line was closed")
    return frame
