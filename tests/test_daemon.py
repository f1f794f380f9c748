"""Python workers are forked from a process that has torch already, and has started no thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_what_is_preloaded_starts_no_thread_and_prints_nothing() -> None:
    program = (
        "import os, sys, kindling.daemon\n"
        "kindling.daemon.preload()\n"
        "missing = [name for name in kindling.daemon.PRELOADED if name not in sys.modules]\n"
        "assert not missing, missing\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lose threads'\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_torch_that_cannot_be_imported_stops_no_worker(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('noise'); raise RuntimeError('broken')")
    program = "import kindling.daemon; kindling.daemon.preload(); print('on')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        check=False,
    )
    assert done.stdout == "on\n", done.stderr


@pytest.mark.spark
@pytest.mark.sessions
def test_workers_of_this_machine_have_torch_when_they_start(spark: Any) -> None:
    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            parent = Path(f"/proc/{os.getppid()}/cmdline")
            started_by = parent.read_bytes().decode() if parent.exists() else "kindling.daemon"
            rows = [("torch" in sys.modules, started_by)] * batch.num_rows
            yield pa.RecordBatch.from_pydict({"loaded": [row[0] for row in rows], "parent": [row[1] for row in rows]})

    rows = spark.range(2).mapInArrow(look, "loaded boolean, parent string").collect()
    assert all(row["loaded"] for row in rows)
    assert all("kindling.daemon" in row["parent"] for row in rows)
