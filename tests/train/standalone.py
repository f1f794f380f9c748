"""A standalone Spark cluster on loopback: a real master, real worker daemons, each a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark

from kindling.session import find_java

_START_S = 60


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    url: str
    folder: Path
    master: subprocess.Popen[bytes]
    daemons: tuple[subprocess.Popen[bytes], ...]


@contextmanager
def standalone(folder: Path, *, daemons: int = 2, cores: int = 1) -> Iterator[Cluster]:
    """Start a master and worker daemons on 127.0.0.1, at free ports; afterwards all of them are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
            log = folder / f"{name}.log"
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))}
            environment |= {
                "JAVA_HOME": str(find_java()),
                "SPARK_LOCAL_IP": "127.0.0.1",
                "SPARK_DAEMON_MEMORY": "256m",
                "SPARK_LOCAL_DIRS": str(folder / name / "local"),
            }
            command = [str(Path(pyspark.__file__).parent / "bin" / "spark-class"), *arguments]
            with log.open("wb") as out:
                process = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
            stack.callback(_stop, process)
            deadline = time.monotonic() + _START_S
            while not (found := re.search(r"at (spark://\S+)|Successfully (registered) with master", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            return process, found[1] or found[2]

        here = ("--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        master, url = start("master", "org.apache.spark.deploy.master.Master", *here)
        size = ("--cores", str(cores), "--memory", "2g")
        workers = [
            start(
                f"daemon-{number}",
                "org.apache.spark.deploy.worker.Worker",
                *here,
                *size,
                "--work-dir",
                str(folder / f"daemon-{number}"),
                url,
            )[0]
            for number in range(daemons)
        ]
        yield Cluster(url, folder, master, tuple(workers))
    shutil.rmtree(folder, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
