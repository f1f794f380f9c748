"""Getting weights and code to the workers, and their errors back to the driver.

A file travels once per session, under a name made of its content: `SparkContext.addFile` on Spark Classic,
`addArtifact` on Spark Connect. A module travels as its architecture (a few kilobytes, inside the task) and one
safetensors file that already holds the dtype and the memory layout that is computed with, so that the Python workers of
a host map the same pages. What the workers do with it is in `predict/batch.py` and `train/worker.py`.

Importing this module must not import torch: Spark workers open it before their thread counts are set.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kindling.errors import ConfigError, DataError, KindlingError, ModelError, SessionError, from_text, to_wire

if TYPE_CHECKING:
    import torch
    from pyspark.sql import SparkSession
    from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------- files

_one_at_a_time = threading.RLock()
"""Trainings may be started from several threads; names, files and cloudpickle's registry are the whole process's."""
_sent: dict[str, set[str]] = {}
"""Session -> names of the files it already has."""


def session_key(spark: SparkSession) -> str:
    """A text that names the session's set of shipped files: the application (Classic) or the session (Connect)."""
    if is_connect(spark):
        return f"connect:{spark.client._session_id}"
    return f"classic:{spark.sparkContext.applicationId}"


def is_connect(spark: SparkSession) -> bool:
    """Whether this session talks to a Spark Connect server."""
    return "connect" in type(spark).__module__.split(".")


@cache
def _outbox() -> Path:
    """The driver's folder of shipped files: Spark Classic serves them from here for as long as the session lives."""
    folder = Path(tempfile.mkdtemp(prefix="kindling-ship-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def ship_file(spark: SparkSession, local_path: str | Path, name: str) -> str:
    """Send a local file to every worker of the session as `name`; a second call with the same name sends nothing.

    Names are global to the session: make them of the content (`digest`), or two versions of a file would collide.

    Returns: `name`, for `locate` on the workers.
    Raises: SessionError, when Spark refuses the file.
    """
    with _one_at_a_time:
        sent = _sent.setdefault(session_key(spark), set())
        if name in sent:
            return name
        staged = _outbox() / name
        if Path(local_path).resolve() != staged.resolve():
            staged.unlink(missing_ok=True)
            try:
                os.link(local_path, staged)
            except OSError:
                shutil.copyfile(local_path, staged)
        with translated():
            if is_connect(spark):
                spark.addArtifacts(str(staged), file=True)
                staged.unlink(missing_ok=True)  # the server has its own copy now
            else:
                spark.sparkContext.addFile(str(staged))
        sent.add(name)
        return name


def locate(name: str) -> Path:
    """On a worker: where the shipped file `name` lies.

    Raises: SessionError, when the file did not reach this worker.
    """
    from pyspark import SparkFiles

    path = Path(SparkFiles.get(name))
    if not path.exists():
        raise SessionError(
            f"file {name!r} was sent with the session but is not at {path} on this worker. "
            "Was the session that sent it stopped? Run the call again in the new session."
        )
    return _shared(path)


_APPLICATION_FOLDER = re.compile(r"app(lication_|-)\d+")
"""Names that Spark's standalone workers and YARN give to an application's folder on a host."""


def _shared(path: Path) -> Path:
    """The same file under a name that all executors of the application on this host have in common, if there is such.

    Each executor fetches a copy of its own, in a folder of its own; through a hard link in the application's folder,
    which goes when the application does, all of them map the pages of the first one's.
    """
    path = path.resolve()
    executor = (
        path.parent.parent
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", path.parent.name)
        else path.parent
    )
    if not _APPLICATION_FOLDER.match(executor.parent.name):
        return path
    common = executor.parent / path.name
    try:
        os.link(path, common)
    except FileExistsError:
        pass
    except OSError:
        return path
    return common if common.stat().st_size == path.stat().st_size else path


def digest(path: str | Path) -> str:
    """SHA-256 of a file, as hex text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------- modules


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """A module on its way to the workers: picklable, small, and opened only there, by `open_module`."""

    architecture: bytes
    """JSON of the module's graph, or a cloudpickle of the module without its tensors."""
    is_graph: bool
    """Which of the two `architecture` is."""
    weights: str
    """Name of the shipped safetensors file."""
    weights_bytes: int
    """Its size, checked on the worker."""
    dtype: str
    """Dtype of the floating-point tensors: `"float32"` or `"bfloat16"`."""
    permuted: frozenset[str]
    """Tensors stored with their channels last, to be viewed back."""
    names: tuple[tuple[str, str], ...]
    """Parameter or buffer name -> tensor in the file; two names may share one."""


_specs: weakref.WeakKeyDictionary[Any, dict[Any, ModuleSpec]] = weakref.WeakKeyDictionary()


def ship_module(
    spark: SparkSession, module: nn.Module, *, dtype: torch.dtype | str = "float32", channels_last: bool = True
) -> ModuleSpec:
    """Send a module's weights to the workers; returns what `open_module` rebuilds it from.

    Args:
        dtype: what floating-point tensors are converted to before they are sent (statistics of normalisation layers
            stay float32, which their kernels take beside bfloat16 inputs).
        channels_last: store four-dimensional weights with their channels last.

    Raises: ModelError, when the module can neither be stored as a graph nor pickled.
    """
    with _one_at_a_time:
        return _ship_module(spark, module, dtype, channels_last)


def _ship_module(spark: SparkSession, module: nn.Module, dtype: torch.dtype | str, channels_last: bool) -> ModuleSpec:
    import torch
    from safetensors.torch import save_file

    kind = str(dtype).removeprefix("torch.")
    named = dict(_named_tensors(module))
    key = (session_key(spark), kind, channels_last, tuple((n, t.data_ptr(), t._version) for n, t in named.items()))
    known = _specs.setdefault(module, {})
    if key in known:
        return known[key]
    names: list[tuple[str, str]] = []
    first: dict[int, str] = {}
    for name, tensor in named.items():
        names.append((name, first.setdefault(id(tensor), name)))
    loose: dict[str, Tensor] = {}
    architecture, is_graph = _architecture(module, {id(named[name]): name for name in first.values()}, loose)
    keep_float32 = _normalisation_tensors(module)
    permuted, stored = set(), {}
    for name, tensor in [*((name, named[name]) for name in first.values()), *loose.items()]:
        value = tensor.detach().cpu()
        if value.is_floating_point() and name not in loose:
            value = value.to(torch.float32 if name in keep_float32 else getattr(torch, kind))
        if channels_last and value.dim() == 4 and value.is_floating_point():
            value = value.permute(0, 2, 3, 1)
            permuted.add(name)
        # Tensors that share memory without being the same object (views) may not meet in one file.
        stored[name] = value.contiguous().clone() if value.data_ptr() == tensor.data_ptr() else value.contiguous()
    temporary = _outbox() / f"writing-{os.getpid()}.safetensors"
    save_file(stored, temporary)
    size, name = temporary.stat().st_size, f"kindling-{digest(temporary)[:32]}.safetensors"
    staged = _outbox() / name
    temporary.replace(staged)
    known[key] = ModuleSpec(
        architecture=architecture,
        is_graph=is_graph,
        weights=ship_file(spark, staged, name),
        weights_bytes=size,
        dtype=kind,
        permuted=frozenset(permuted),
        names=tuple(names),
    )
    return known[key]


def check_module(module: nn.Module) -> int:
    """Whether a module can be sent to the workers; returns the bytes of its tensors.

    Raises: ModelError, when it can neither be stored as a graph nor pickled.
    """
    named = {id(tensor): (name, tensor) for name, tensor in _named_tensors(module)}
    _architecture(module, {key: name for key, (name, _) in named.items()}, {})
    return sum(tensor.nbytes for _, tensor in named.values())


def open_module(spec: ModuleSpec) -> nn.Module:
    """On a worker, after `threads.settle`: the module, its weights mapped from the shipped file.

    Pages are shared between the processes of a host until one writes to them (training does, on its own copy).

    Raises: SessionError, when the file is not there or was cut off on its way.
    """
    from safetensors import safe_open
    from torch import nn

    path = locate(spec.weights)
    if path.stat().st_size != spec.weights_bytes:
        raise SessionError(
            f"file {spec.weights!r} has {path.stat().st_size} bytes on this worker, not {spec.weights_bytes}."
        )
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            value = file.get_tensor(name)
            tensors[name] = value.permute(0, 3, 1, 2) if name in spec.permuted else value
    if not spec.is_graph:
        module: nn.Module = _Unpickler(spec.architecture, tensors).load()
        return module
    from kindling import graph

    module = graph.from_json(json.loads(spec.architecture))
    made: dict[tuple[str, bool], Any] = {}
    for name, source in spec.names:
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        old = holder._parameters.get(leaf)
        slot: dict[str, Any] = holder._parameters if old is not None else holder._buffers
        if (source, old is not None) not in made:
            value = tensors[source]
            made[source, old is not None] = (
                nn.Parameter(value, requires_grad=old.requires_grad) if old is not None else value
            )
        slot[leaf] = made[source, old is not None]
    return module


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _normalisation_tensors(module: nn.Module) -> set[str]:
    from torch.nn.modules.batchnorm import _NormBase

    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, _NormBase)
        for name, _ in _named_tensors(part)
    }


def _architecture(module: nn.Module, named: dict[int, str], loose: dict[str, Tensor]) -> tuple[bytes, bool]:
    """The module without its tensors. Tensors that are neither parameters nor buffers are put into `loose`."""
    from kindling import graph

    try:
        data = graph.to_json(module)
        names = {name for name, _ in _named_tensors(module)}
        if {name for name, _ in _named_tensors(graph.from_json(data))} == names:
            return json.dumps(data, sort_keys=True).encode(), True
    except KindlingError:
        pass  # not made of the layers that a graph may hold: our own workers take a pickle
    try:
        return _pickled(module, named, loose), False
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} cannot be sent to the workers: it is no graph of known layers, and pickling it "
            f"failed ({type(error).__name__}: {error})."
        ) from error


def _pickled(module: nn.Module, named: dict[int, str], loose: dict[str, Tensor]) -> bytes:
    import cloudpickle
    import torch

    alive = []  # ids are only unique among the living

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, thing: object) -> object:
            if not isinstance(thing, torch.Tensor):
                return None
            name = named.get(id(thing))
            if name is None:
                name = named[id(thing)] = f"~{len(loose)}"
                loose[name] = thing
                alive.append(thing)
            return name, isinstance(thing, torch.nn.Parameter), thing.requires_grad

    buffer = io.BytesIO()
    with user_code_by_value():
        Pickler(buffer).dump(module)
    return buffer.getvalue()


def pickled(thing: Any, name: str) -> bytes:
    """A user's function or object as bytes that a worker can open, though it lacks the user's own files.

    Raises: ConfigError, naming the setting `name`, when it cannot be pickled.
    """
    import cloudpickle

    try:
        with user_code_by_value():
            return bytes(cloudpickle.dumps(thing))
    except Exception as error:
        raise ConfigError(
            name,
            thing,
            f"cannot be sent to the workers: {error}",
            "Use functions and classes without open files or locks",
        ) from error


@contextmanager
def user_code_by_value() -> Iterator[None]:
    """While open, cloudpickle packs classes and functions of the user's own files into the pickle.

    The user's own files are those outside the installed packages: a worker may lack them.
    """
    with _one_at_a_time, _registered():
        yield


@contextmanager
def _registered() -> Iterator[None]:
    import cloudpickle

    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    installed = {str(Path(path).resolve()) for key, path in sysconfig.get_paths().items() if key in kinds}
    known = (*installed, str(Path(__file__).resolve().parent))
    already = set(cloudpickle.list_registry_pickle_by_value())
    installed_packages: dict[str, bool] = {}  # a package's modules lie together: one look for each package
    own = []
    for name, home in list(sys.modules.items()):
        file = getattr(home, "__file__", None)
        # A module under another name than its own (an alias) cannot be registered.
        if file is None or name == "__main__" or name in already or getattr(home, "__name__", None) != name:
            continue
        package = name.partition(".")[0]
        if package not in installed_packages:
            installed_packages[package] = str(Path(file).resolve()).startswith(known)
        if not installed_packages[package]:
            own.append(home)
    for home in own:
        cloudpickle.register_pickle_by_value(home)
    try:
        yield
    finally:
        for home in own:
            cloudpickle.unregister_pickle_by_value(home)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: dict[str, Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors
        self._made: dict[tuple[str, bool], Any] = {}

    def persistent_load(self, key: Any) -> Any:
        from torch import nn

        name, is_parameter, requires_grad = key
        if (name, is_parameter) not in self._made:
            value = self._tensors[name]
            self._made[name, is_parameter] = nn.Parameter(value, requires_grad=requires_grad) if is_parameter else value
        return self._made[name, is_parameter]


# --------------------------------------------------------------------------------------------------------- errors


@contextmanager
def bounded_arrow_batches(spark: SparkSession) -> Iterator[None]:
    """While a job is planned inside: small Arrow batches where Spark counts rows, not bytes (before 4.1).

    What is planned later by the caller of a lazy frame keeps the session's own setting.
    """
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    if spark.conf.get("spark.sql.execution.arrow.maxBytesPerBatch", None) is not None:
        yield
        return
    session = session_key(spark)
    with _one_at_a_time:
        inside, before = _bounded.get(session, (0, ""))
        if not inside:
            before = spark.conf.get(name, "10000") or "10000"
            spark.conf.set(name, str(min(int(before), _ROWS_PER_ARROW_BATCH)))
        _bounded[session] = inside + 1, before
    try:
        yield
    finally:
        with _one_at_a_time:
            inside, before = _bounded.pop(session)
            if inside > 1:
                _bounded[session] = inside - 1, before
            else:
                spark.conf.set(name, before)


_bounded: dict[str, tuple[int, str]] = {}
"""Session -> how many are inside, and the setting to put back when the last one leaves."""
_ROWS_PER_ARROW_BATCH = 256
"""Keeps a batch of photos small."""


class guard:
    """Wrap a function for `mapInArrow` so that its kindling errors survive the trip to the driver (see `unwrap`).

    >>> def work(batches):
    ...     yield from batches
    ...     raise DataError("row 3 has no label")
    >>> list(guard(work)([]))
    Traceback (most recent call last):
    RuntimeError: row 3 has no label <<kindling:...>>
    """

    def __init__(self, work: Callable[[Iterator[Any]], Iterable[Any]]) -> None:
        self.work = work

    def __call__(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from self.work(batches)
        except KindlingError as error:
            # Readable too, for those who run a lazy frame themselves and see what Spark makes of it.
            raise RuntimeError(f"{error} {to_wire(error)}") from None


def unwrap(error: BaseException) -> NoReturn:
    """Raise what an exception from Spark really says: the kindling error of the worker, or one short error.

    Never shows a Java stack trace. An exception that is not Spark's is raised as it is.

    Raises: KindlingError, as a worker raised it; else SessionError (DataError for a query Spark refuses) with the last
        lines of the worker's Python traceback, or the first line of Spark's own message.
    """
    if isinstance(error, KindlingError) or not is_sparks(error):
        raise error
    text = "\n".join(_texts(error))
    found = from_text(text)
    if found is not None:
        raise found from None
    name = type(error).__name__
    if name in ("AnalysisException", "ParseException"):
        raise DataError(_first_line(str(error))) from None
    _, found_trace, trace = text.rpartition("Traceback (most recent call last):\n")
    if found_trace:
        trace = re.split(r"\n\s*\n|\n\s*at |\n *SQLSTATE", trace)[0]
        raise SessionError("a task on a Spark worker failed:\n" + "\n".join(trace.splitlines()[-8:])) from None
    raise SessionError(f"Spark failed: {_first_line(_texts(error)[-1])}") from None


@contextmanager
def translated() -> Iterator[None]:
    """Run driver code whose Spark exceptions are put through `unwrap`."""
    try:
        yield
    except Exception as error:
        unwrap(error)


def is_sparks(error: BaseException) -> bool:
    """Whether an exception comes from Spark: from its Python side, from Java, or from Connect."""
    return any(kind.__module__.split(".")[0] in ("pyspark", "py4j", "grpc") for kind in type(error).__mro__)


def _texts(error: BaseException) -> list[str]:
    """Every text an exception of Spark carries, the nearest to the cause last."""
    texts = [str(error)]
    java = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    seen = 0
    while java is not None and seen < 8 and hasattr(java, "getCause"):
        message = java.getMessage()
        if message:
            texts.append(str(message))
        java, seen = java.getCause(), seen + 1
    return texts


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("at ")]
    return lines[0][:500] if lines else "no message"
