"""Faults, as a parameter: real processes, real signals.

After each of them the weights are those of the unbroken run, bit for bit, training has gone on from a checkpoint, and
nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import kindling as kd
from kindling.storage import open_place
from kindling.train import remote
from kindling.train.events import Event
from kindling.train.listener import Listener
from kindling.train.slots import without_barrier

from train_runs import blobs, digest, fit, frame, net  # isort: skip
from train_standalone import standalone  # isort: skip

pytestmark = pytest.mark.spark

ROOT = Path(__file__).resolve().parents[2]
ROWS, EPOCHS, BATCH = 480, 3, 16
STEPS = ROWS // (2 * BATCH)
"""Steps of an epoch with two workers."""
MID_SECOND_EPOCH = STEPS + 5

_WRITE_S = 1.5
"""The checkpoint of the epoch's end is written beside the next steps: so long before a fault it is left to that."""

_unbroken: dict[str, kd.Model] = {}


def model_for(frozen_front: bool = False) -> kd.Model:
    if not frozen_front:
        return net(dropout=0.2)
    torch.manual_seed(0)
    return kd.Model.of(nn.Linear(4, 8), shape=(4,)).freeze().then(nn.Linear(8, 3), labels=["c0", "c1", "c2"])


def unbroken(spark: Any, strategy: Any, frozen_front: bool = False, workers: int = 2) -> kd.Model:
    """The same training without a fault; once for each kind."""
    key = f"{strategy} {frozen_front} {workers}"
    if key not in _unbroken:
        model = model_for(frozen_front)
        _unbroken[key] = fit(model, frame(spark, blobs(ROWS)), strategy=strategy, epochs=EPOCHS, workers=workers)
        assert _unbroken[key].history[-1]["attempts"] == 1
    return _unbroken[key]


class Scene:
    """What happened in the runs of a test, as the driver hears it; and a hand in it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.pids: dict[int, int] = {}
        self.killed: list[int] = []
        self.strike: Callable[[int, str, dict[str, Any]], bool] = lambda rank, kind, message: False
        """Whether the worker from which a message comes is to die before the driver hears it."""

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def kill(self, pid: int) -> None:
        self.killed.append(pid)
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(name="scene")
def _scene(spark: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Listens in, and looks at the end that nothing is left: no port, no stopped process, no spool file."""
    scene, original = Scene(), Listener._told
    before = listening(os.getpid())

    def told(self: Listener, peer: int, rank: int, kind: str, message: dict[str, Any], payload: bytes) -> Any:
        if kind == "event":
            event = Event.from_line(message["line"])
            scene.events.append(event)
            scene.pids[event.rank] = event.data["pid"]
        if not scene.killed and scene.strike(rank, kind, message):
            scene.kill(scene.pids[rank])
        return original(self, peer, rank, kind, message, payload)

    monkeypatch.setattr(Listener, "_told", told)
    yield scene
    pids = {int(event.data["pid"]) for event in scene.events}
    deadline = time.monotonic() + 20
    while (left := leftovers(spark, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert listening(os.getpid()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kindling-")]


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process listens."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid).net_connections(kind="inet")
        return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}
    return set()


def leftovers(spark: Any, pids: set[int]) -> list[str]:
    """Ports and stopped processes of workers, and spool files."""
    left = [f"worker {pid} listens at {where}" for pid in pids for where in listening(pid)]
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                left.append(f"worker {pid} is stopped")
    local = spark.conf.get("spark.local.dir", None)
    if not local:
        return left
    # A spool has no name: it takes its room on the disk as long as a process holds it.
    held = [f"worker {pid} holds {line.split(maxsplit=5)[-1]}" for pid in pids for line in mapped(pid) if local in line]
    return left + held + [str(path) for path in Path(local).rglob("kindling-*-*") if path.is_dir()]


def mapped(pid: int) -> list[str]:
    """What a process has mapped of files that are gone."""
    with contextlib.suppress(OSError):
        return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("(deleted)")]
    return []


def resumed(scene: Scene) -> list[int]:
    return [event.step for event in scene.of("resumed") if event.rank == 0]


class Pause:
    """Cross entropy; in its call `at` it names its process in a file and waits to be killed, `deaths` times."""

    def __init__(self, path: str, at: int, deaths: int = 1) -> None:
        self.path, self.at, self.deaths = path, at, deaths
        self.calls = -1  # the first is the rehearsal on the driver

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            files = [f"{self.path}-{death}" for death in range(self.deaths)]
            gone = [file for file in files if os.path.exists(file)]
            # The other worker comes here at the same time: one death an attempt.
            if len(gone) < self.deaths and all(time.time() - os.path.getmtime(file) > 1.5 for file in gone):
                with contextlib.suppress(FileExistsError), open(files[len(gone)], "x") as file:
                    file.write(f"{os.getpid()}\n")
                    file.flush()
                    self.wait()
        return nn.functional.cross_entropy(outputs, targets)

    def wait(self) -> None:
        time.sleep(60)


@contextlib.contextmanager
def killer(folder: Path, kill: Callable[[int], None]) -> Iterator[None]:
    """While open: whoever has named itself in a file `pid-*` of the folder is killed."""
    over, done = threading.Event(), set()

    def watch() -> None:
        while not over.wait(0.02):
            for file in folder.glob("pid-*"):
                if (text := file.read_text()).endswith("\n") and int(text) not in done:
                    done.add(int(text))
                    time.sleep(_WRITE_S)
                    kill(int(text))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kill_executor(pid: int) -> None:
    """The JVM above a Python worker, and with it all that runs there."""
    (jvm, *_) = (process for process in psutil.Process(pid).parents() if process.name() == "java")
    jvm.kill()


# ------------------------------------------------------------------------------------------- killed while it trains


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=3)], ids=["allreduce", "averaging"])
def test_a_killed_worker_changes_nothing(spark: Any, scene: Scene, tmp_path: Path, workers: int, strategy: Any) -> None:
    """SIGKILL from outside at a seeded step of the second epoch."""
    from kindling.train.slots import slots

    if (slots(spark) or 0) < workers:
        pytest.skip(f"this session has fewer than {workers} slots")
    step = -(-ROWS // (BATCH * workers)) + random.Random(workers).randint(2, 8)
    _dies_while_training(spark, scene, tmp_path, strategy, step=step, workers=workers)


def _dies_while_training(
    spark: Any,
    scene: Scene,
    folder: Path,
    strategy: Any,
    *,
    step: int = MID_SECOND_EPOCH,
    deaths: int = 1,
    keep: bool = True,
    frozen_front: bool = False,
    workers: int = 2,
    kill: Callable[[int], None] | None = None,
) -> None:
    """Args: step: the call of the loss in which the worker dies, from 1; keep: in a run directory of the test's."""
    expected = unbroken(spark, strategy, frozen_front, workers)
    steps = -(-ROWS // (BATCH * workers))
    with killer(folder, kill or scene.kill):
        broken = fit(
            model_for(frozen_front),
            frame(spark, blobs(ROWS)),
            epochs=EPOCHS,
            workers=workers,
            strategy=strategy,
            loss=Pause(str(folder / "pid"), step, deaths),
            run=folder / "run" if keep else None,
        )
    # Tasks of a plain stage come back one by one: an attempt may begin, and end, before all are there.
    attempts = broken.history[-1]["attempts"]
    assert attempts == deaths + 1 or (attempts > deaths and without_barrier(spark))
    last = 0
    for _ in range(deaths):
        last = (last + step - 1) // steps * steps
    # The first resumed from the end of an epoch, where there was one; not from the start.
    assert resumed(scene)[-1:] == ([last] if last else [])
    if keep:
        parts = sorted((folder / "run").glob(f"events/{attempts - 1}/0/*.jsonl"))
        assert "resumed" in [Event.from_line(line).kind for part in parts for line in part.read_text().splitlines()]
    assert [epoch["rows"] for epoch in broken.history[-1]["epochs"]] == [ROWS] * EPOCHS
    if strategy.deterministic:
        assert digest(broken) == digest(expected)
        assert broken.history[-1]["epochs"][0]["loss"] == expected.history[-1]["epochs"][0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"deaths": 2},
        {"keep": False},
        {"frozen_front": True},
        {"strategy": kd.ParameterAveraging(every=3, average_optimizer_state=True)},
        {"strategy": kd.AllReduce(compression="powersgd")},
        {"strategy": kd.DiLoCo(every=4, fragments=2, delay=1)},
        {"strategy": kd.ThresholdSharing(threshold=0.01)},
        {"strategy": kd.Downpour(push_every=2, fetch_every=2)},
    ],
    ids=lambda fault: " ".join(f"{name} {value}".partition("(")[0] for name, value in fault.items()),
)
def test_killed_under_other_circumstances(spark: Any, scene: Scene, tmp_path: Path, fault: dict[str, Any]) -> None:
    _dies_while_training(spark, scene, tmp_path, **{"strategy": kd.AllReduce(), **fault})


@pytest.mark.slow
@pytest.mark.sessions
def test_killed_on_every_kind_of_session(spark: Any, scene: Scene, tmp_path: Path) -> None:
    _dies_while_training(spark, scene, tmp_path, kd.AllReduce())


@pytest.mark.slow
@pytest.mark.sessions
def test_a_killed_executor_changes_nothing(spark: Any, scene: Scene, tmp_path: Path) -> None:
    """The JVM itself, with its daemon, its workers and its shuffle files."""
    if not spark.conf.get("spark.master", "").startswith(("local-cluster", "spark://")):
        pytest.skip("here the executor is the driver")
    _dies_while_training(spark, scene, tmp_path, kd.AllReduce(), kill=kill_executor)


# -------------------------------------------------------------------------------------------- killed at other moments


def _is_event(kind: str, message: dict[str, Any], name: str) -> bool:
    return kind == "event" and Event.from_line(message["line"]).kind == name


MOMENTS: dict[str, tuple[Callable[[int, str, dict[str, Any]], bool], int]] = {
    "spooling": (lambda rank, kind, message: rank == 1 and _is_event(kind, message, "start"), 0),
    "rendezvous": (lambda rank, kind, message: rank == 1 and kind == "post" and message["name"] == "meet", 0),
    "first step": (lambda rank, kind, message: rank == 0 and _is_event(kind, message, "step"), 0),
    "after the last step": (
        lambda rank, kind, message: rank == 1 and kind == "result" and message["what"] == "report",
        EPOCHS * STEPS,
    ),
    "when all is handed over": (
        lambda rank, kind, message: rank == 1 and kind == "post" and message["name"] == "finish",
        EPOCHS * STEPS,
    ),
}
"""When worker `rank` dies: before the driver hears a message; and the step from which the next attempt must go on."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(spark: Any, scene: Scene, tmp_path: Path, moment: str) -> None:
    expected = unbroken(spark, kd.AllReduce())
    scene.strike, step = MOMENTS[moment]
    broken = fit(model_for(), frame(spark, blobs(ROWS)), epochs=EPOCHS, run=tmp_path / "run")
    assert len(scene.killed) == 1
    # It may have sent all that was left to say before the signal came: then nothing needs to be done again.
    assert resumed(scene) in ([], [step])
    assert digest(broken) == digest(expected)
    pid = scene.killed[0]
    assert len({event.data["pid"] for event in scene.of("start")} - {pid}) >= 1
    if moment == "rendezvous":
        assert pid not in {event.data["pid"] for event in scene.of("met")}


@pytest.mark.slow
def test_killed_during_a_checkpoint(spark: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a run directory that only the driver sees: its worker dies when half of the second checkpoint is there."""
    expected = unbroken(spark, kd.AllReduce())
    original = remote._asked

    def asked(place: Any, what: str, name: str, copy: Path) -> Any:
        if what == "write" and name.startswith(f"checkpoints/{2 * STEPS:012d}/") and not scene.killed:
            scene.kill(scene.pids[0])
        return original(place, what, name, copy)

    monkeypatch.setattr(remote, "_asked", asked)
    run = f"memory://{tmp_path.name}/run"
    broken = fit(model_for(), frame(spark, blobs(ROWS)), epochs=EPOCHS, run=run)
    assert len(scene.killed) == 1
    assert resumed(scene) == [STEPS]
    assert digest(broken) == digest(expected)
    assert digest(kd.load(f"{run}/model")) == digest(expected)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "a bit flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(
    spark: Any, scene: Scene, tmp_path: Path, damage: str
) -> None:
    expected = unbroken(spark, kd.AllReduce())
    run = tmp_path / "run"

    def spoil_and_kill(pid: int) -> None:
        newest = max((run / "checkpoints").iterdir())
        assert int(newest.name) == 2 * STEPS
        file = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        if damage == "truncated":
            del data[-1:]
        else:
            data[len(data) // 2] ^= 1
        file.write_bytes(data)
        scene.kill(pid)

    with killer(tmp_path, spoil_and_kill):
        broken = fit(
            model_for(),
            frame(spark, blobs(ROWS)),
            epochs=EPOCHS,
            loss=Pause(str(tmp_path / "pid"), 2 * STEPS + 5),
            run=run,
        )
    assert resumed(scene) == [STEPS]
    assert any("The one before it is used" in event.data["text"] for event in scene.of("warning"))
    assert digest(broken) == digest(expected)


# ------------------------------------------------------------------------------------------------- hung, slow, full


class Hang(Pause):
    """Does not die, but stays: asleep, in a call that holds Python's lock, or stopped by a signal."""

    def __init__(self, path: str, at: int, how: str) -> None:
        super().__init__(path, at)
        self.how = how

    def wait(self) -> None:
        time.sleep(_WRITE_S)
        if self.how == "asleep":
            time.sleep(600)
        elif self.how == "holding the lock":
            sum(range(10**11))
        else:
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asleep", "holding the lock", "stopped"])
def test_a_worker_that_hangs_is_given_up(spark: Any, scene: Scene, tmp_path: Path, how: str) -> None:
    expected = unbroken(spark, kd.AllReduce())
    began = time.monotonic()
    broken = fit(
        model_for(),
        frame(spark, blobs(ROWS)),
        epochs=EPOCHS,
        loss=Hang(str(tmp_path / "pid"), MID_SECOND_EPOCH, how),
        run=tmp_path / "run",
        timeout_s=8,
    )
    assert time.monotonic() - began < 120
    assert broken.history[-1]["attempts"] == 2
    assert resumed(scene) == [STEPS]
    assert digest(broken) == digest(expected)


class Slow(Pause):
    """One worker takes ten times as long for each of its steps."""

    def __init__(self, path: str) -> None:
        super().__init__(path, -1)
        self.slow: bool | None = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls and self.slow is None:
            self.slow = False
            with contextlib.suppress(FileExistsError), open(self.path, "x"):
                self.slow = True
        time.sleep(0.2 if self.slow else 0.02 if self.calls else 0)
        return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [kd.AllReduce(), kd.ParameterAveraging(every=15)], ids=["allreduce", "averaging"])
def test_a_slow_worker_is_waited_for(spark: Any, scene: Scene, tmp_path: Path, strategy: Any) -> None:
    """Averaging, the others wait for it for three seconds: longer than a step may take, and no fault."""
    broken = fit(
        model_for(),
        frame(spark, blobs(ROWS)),
        epochs=EPOCHS,
        strategy=strategy,
        loss=Slow(str(tmp_path / "slow")),
        timeout_s=2.5,
    )
    assert broken.history[-1]["attempts"] == 1
    assert (tmp_path / "slow").exists()
    assert digest(broken) == digest(unbroken(spark, strategy))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Put a file on a disk that leaves so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * max(0, psutil.disk_usage(str(disk)).free - leave))
    return ballast


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_not_the_training(spark: Any, scene: Scene, tmp_path: Path) -> None:
    """Full from the start of the second epoch until that was said; the checkpoint after it is whole."""
    expected = unbroken(spark, kd.AllReduce())
    with small_disk(tmp_path / "disk", "4m") as disk:
        ballast: list[Path] = []

        def watch(rank: int, kind: str, message: dict[str, Any]) -> bool:
            if _is_event(kind, message, "checkpoint") and not ballast:
                ballast.append(fill(disk, 0))
            if _is_event(kind, message, "warning") and ballast:
                ballast[0].unlink(missing_ok=True)
            return False

        scene.strike = watch
        trained = fit(
            model_for(), frame(spark, blobs(ROWS)), epochs=6, run=disk / "run", loss=Slow(str(tmp_path / "slow"))
        )
        assert ballast
        warnings = [event.data["text"] for event in scene.of("warning")]
        assert any("No space left" in text for text in warnings), warnings
        assert digest(kd.load(disk / "run" / "model")) == digest(trained)
        assert open_place(disk / "run").list("checkpoints")
    again = fit(model_for(), frame(spark, blobs(ROWS)), epochs=6)
    assert digest(again) == digest(trained)
    assert digest(expected) != digest(trained)  # six epochs, not three


DISK = os.environ.get("KINDLING_TEST_DISK")


@pytest.mark.slow
@pytest.mark.skipif(DISK is None, reason="needs a session whose local disk is small: see the test below")
def test_full_while_spooling(spark: Any, scene: Scene, tmp_path: Path) -> None:
    """The local disk takes the shuffle's files and not the spool as well, until the first worker has said so."""
    disk = Path(str(DISK))
    wide = [(path, label, (point * 2000)[:8000]) for path, label, point in blobs(400)]
    torch.manual_seed(0)
    model = kd.Model.of(nn.Linear(8000, 3), shape=(8000,), labels=["c0", "c1", "c2"])
    expected = fit(model, frame(spark, wide), epochs=1)
    ballast: list[Path] = []

    def watch(rank: int, kind: str, message: dict[str, Any]) -> bool:
        if _is_event(kind, message, "start") and not ballast:
            ballast.append(fill(disk, 1 << 20))
        if _is_event(kind, message, "error"):
            ballast[0].unlink(missing_ok=True)
        return False

    scene.strike = watch
    trained = fit(model, frame(spark, wide), epochs=1)
    (error, *_) = scene.of("error")
    assert ballast
    assert not ballast[0].exists()
    assert "rows could not be spooled" in str(kd.errors.from_text(error.data["wire"]))
    assert digest(trained) == digest(expected)


# --------------------------------------------------------------------------------------------------------- other places


def elsewhere(selection: str, master: str, passed: int, conf: dict[str, str] | None = None, **env: str) -> None:
    """Run some tests of this file in a session of another kind, in a process of its own."""
    if {"KINDLING_TEST_MASTER", "KINDLING_TEST_REMOTE"} & os.environ.keys():
        pytest.skip("once is enough: run on local[2]")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "spark", __file__, "-k", selection]
    environment = {
        **os.environ,
        "KINDLING_TEST_MASTER": master,
        "KINDLING_TEST_CONF": json.dumps(conf or {}),
        "PYSPARK_PYTHON": sys.executable,
        **env,
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert f"{passed} passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
    assert "failed" not in done.stdout


@pytest.mark.slow
def test_three_workers_survive_as_well() -> None:
    elsewhere("test_a_killed_worker_changes_nothing and 3", "local[3]", 2)


ON_LOOPBACK = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.executor.memory": "1g",
    "spark.executor.cores": "1",
}
DYNAMIC = {
    **ON_LOOPBACK,
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
    "spark.dynamicAllocation.maxExecutors": "2",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_cluster_of_two_machines(tmp_path: Path) -> None:
    """A standalone master and two worker daemons; the executors are killed, and the daemons start others."""
    with standalone(tmp_path / "cluster") as cluster:
        elsewhere("killed_executor or every_kind", cluster.url, 2, ON_LOOPBACK)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_dynamic_allocation(tmp_path: Path) -> None:
    """Where Spark refuses barrier stages: a killed worker and one that hangs, the same bits."""
    with standalone(tmp_path / "cluster") as cluster:
        elsewhere("every_kind or asleep", cluster.url, 2, DYNAMIC)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_local_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "120m") as disk:
        elsewhere(
            "test_full_while_spooling", "local[2]", 1, {"spark.local.dir": str(disk)}, KINDLING_TEST_DISK=str(disk)
        )


# ------------------------------------------------------------------------------------------------------------- ports


class Ports(Pause):
    """Cross entropy; in its third call it writes down where its process listens."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            found = psutil.Process().net_connections(kind="inet")
            where = [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]
            Path(f"{self.path}-{os.getpid()}").write_text(json.dumps(where))
        return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.sessions
def test_nothing_listens_on_every_interface(spark: Any, scene: Scene, tmp_path: Path) -> None:
    """Not the group, not its store, not the driver's listener."""
    before = listening(os.getpid())
    during: list[set[tuple[str, int]]] = []

    def watch(rank: int, kind: str, message: dict[str, Any]) -> bool:
        during.append(listening(os.getpid()) - before)
        return False

    scene.strike = watch
    fit(model_for(), frame(spark, blobs(ROWS)), epochs=1, loss=Ports(str(tmp_path / "ports"), -1))
    found = [json.loads(file.read_text()) for file in tmp_path.glob("ports-*")]
    assert len(found) == 2
    assert all(found)  # each has a port of the group, one of them the store's too
    assert {where for one in found for where in one} == {"127.0.0.1"}
    assert {host for seen in during for host, _ in seen} == {"127.0.0.1"}
