"""Fixtures of the whole suite: the one SparkSession, the data folder, and a look at what a test left behind."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pyspark.cloudpickle
import pytest

import kindling

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `sessions(slow=True)` is slow on the sessions that are not the first one."""
    if os.environ.keys() & {"KINDLING_TEST_REMOTE", "KINDLING_TEST_MASTER"}:
        for item in items:
            mark = item.get_closest_marker("sessions")
            if mark is not None and mark.kwargs.get("slow"):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session under test: `KINDLING_TEST_REMOTE` (Spark Connect), else `KINDLING_TEST_MASTER`, else local[2].

    `KINDLING_TEST_CONF` holds further settings of Spark, as JSON.
    """
    remote = os.environ.get("KINDLING_TEST_REMOTE")
    master = None if remote else os.environ.get("KINDLING_TEST_MASTER", "local[2]")
    scratch = tmp_path_factory.mktemp("spark")
    before = Path.cwd()
    os.chdir(scratch)  # Spark leaves spark-warehouse, artifacts and metastore files in the folder where it was started
    search = os.environ.get("PYTHONPATH")
    if search is not None:  # relative to the folder that we have just left
        os.environ["PYTHONPATH"] = os.pathsep.join(str(before / part) for part in search.split(os.pathsep))
    try:
        session = kindling.spark(
            master,
            remote,
            app="kindling-tests",
            conf={
                "spark.sql.shuffle.partitions": "2",
                "spark.default.parallelism": "2",
                "spark.ui.enabled": "false",
                "spark.ui.showConsoleProgress": "false",
                "spark.sql.warehouse.dir": str(scratch / "warehouse"),
                "spark.local.dir": str(scratch / "local"),
                "spark.driver.memory": "2g",
                "spark.log.level": "ERROR",
                **json.loads(os.environ.get("KINDLING_TEST_CONF", "{}")),
            },
        )
    finally:
        os.chdir(before)
        if search is not None:
            os.environ["PYTHONPATH"] = search
    yield session
    session.stop()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: `KINDLING_DATA`, else `../shared/data` beside the repository; skips where absent."""
    folder = Path(os.environ.get("KINDLING_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set KINDLING_DATA")
    return folder


# Written by pytest itself, and by torch and Spark when they are first used.
_EXPECTED = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}


def _environment() -> dict[str, str]:
    # Starting Spark once per run leaves the gateway's and Connect's variables: they belong to the session fixture.
    return {k: v for k, v in os.environ.items() if k not in _EXPECTED and not k.startswith(("SPARK_", "PYSPARK_"))}


def _of_the_session(thread: threading.Thread) -> bool:
    """Whether the shared session's JVM has opened this thread, to call Python: it does so whenever it likes."""
    target = getattr(thread, "_target", None)
    return type(getattr(target, "__self__", None)).__module__.startswith("py4j.")


@pytest.fixture(autouse=True)
def leave_no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test leaves the world as found: environment, working directory, threads, the repository's top folder."""
    if "spark" in request.fixturenames:
        request.getfixturevalue("spark")  # its own variables and threads are there before the first look
        # Workers cannot import test modules: what a test sends them travels whole.
        pyspark.cloudpickle.register_pickle_by_value(request.module)
        cloudpickle.register_pickle_by_value(request.module)
    environment, folder, files = _environment(), Path.cwd(), set(os.listdir(ROOT))
    threads = {thread for thread in threading.enumerate() if not thread.daemon}
    yield
    left = []
    after = _environment()
    if after != environment:
        left.append(
            f"environment: {sorted(k for k in environment.keys() | after.keys() if environment.get(k) != after.get(k))}"
        )
    if Path.cwd() != folder:
        left.append(f"working directory: {Path.cwd()}")
    if new := set(os.listdir(ROOT)) - files - {".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache"}:
        left.append(f"files in the repository: {sorted(new)}")
    alive = [
        thread.name
        for thread in threading.enumerate()
        if not thread.daemon and thread not in threads and not _of_the_session(thread)
    ]
    if "spark" in request.fixturenames and "KINDLING_TEST_REMOTE" in os.environ:
        # The Connect client starts its own when it is first used, and ends them with the session.
        alive = [name for name in alive if not name.startswith("ThreadPoolExecutor")]
    if alive:
        left.append(f"threads: {alive}")
    os.environ.update(environment)
    for name in after.keys() - environment.keys():
        os.environ.pop(name, None)
    os.chdir(folder)
    assert not left, f"the test left behind {'; '.join(left)}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small real pictures: scikit-learn's handwritten digits 0, 1 and 2, twenty PNG files of each."""
    from PIL import Image

    digits = pytest.importorskip("sklearn.datasets").load_digits()
    folder = tmp_path_factory.mktemp("photos")
    for label in range(3):
        (folder / str(label)).mkdir()
        for number, row in enumerate((digits.target == label).nonzero()[0][:20]):
            pixels = (digits.images[row] * 255 / 16).round().astype("uint8")
            Image.fromarray(pixels).save(folder / str(label) / f"{number:02}.png")
    return folder
