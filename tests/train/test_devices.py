"""Which device a worker takes, decided from what Spark and torch say; and GPUs as Spark hands them out, without any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kindling.errors import SessionError
from kindling.train import devices
from kindling.train.strategies import STRATEGIES


@pytest.mark.parametrize(
    ("addresses", "visible", "count", "device"),
    [
        ([], None, 4, "cpu"),
        (["0"], None, 0, "cpu"),  # Spark gives one, this torch has no CUDA
        (["2"], None, 4, "cuda:2"),
        (["2", "3"], None, 4, "cuda:2"),  # one device per worker
        (["2"], "2", 1, "cuda:0"),  # torch counts from the first visible one
        (["5"], "4, 5", 2, "cuda:1"),
        (["GPU-ab"], "GPU-cd,GPU-ab", 2, "cuda:1"),
        (["1"], "", 4, "cuda:1"),
    ],
)
def test_the_device_of_a_task(addresses: list[str], visible: str | None, count: int, device: str) -> None:
    assert devices.choose_device(addresses, visible, count) == device


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0,1", 2), ("0,3", 1)])
def test_a_gpu_that_torch_does_not_see_is_said(visible: str | None, count: int) -> None:
    with pytest.raises(SessionError, match="Spark gave this task the GPU '3', and torch sees"):
        devices.choose_device(["3"], visible, count)


def test_gpus_are_used_by_all_or_by_none() -> None:
    assert [devices.agree(["cuda:0", "cuda:1"], own) for own in ("cuda:0", "cuda:1")] == ["cuda:0", "cuda:1"]
    assert [devices.agree(["cuda:0", "cpu"], own) for own in ("cuda:0", "cpu")] == ["cpu", "cpu"]
    assert devices.own_device() == "cpu"  # no task, no GPU


def test_what_lies_on_a_device_and_what_does_not() -> None:
    state = {"step": 3, "anchor": [torch.ones(2)], "name": "x", "memory": {"error": torch.ones(1)}, "none": None}
    there = devices.moved(state, "meta")
    assert there["anchor"][0].device.type == there["memory"]["error"].device.type == "meta"
    assert (there["step"], there["name"], there["none"]) == (3, "x", None)
    batch = {"x": torch.ones(2, 3), "target": torch.ones(2)}
    assert devices.to_device(batch, "cpu")["x"] is batch["x"]
    assert {tensor.device.type for tensor in devices.to_device(batch, "meta").values()} == {"meta"}


def test_strategies_that_send_from_the_cpu_say_so() -> None:
    assert {name for name, kind in STRATEGIES.items() if kind.on_gpu} == {"allreduce", "averaging", "diloco"}


def test_seeding_is_as_torch_does_it() -> None:
    with torch.random.fork_rng(devices=[]):
        devices.seed(7, "cpu")
        ours = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(ours, torch.rand(3))


CLUSTER = """
import functools, sys
import pyarrow as pa, torch
import kindling as kd

spark = kd.spark("local-cluster[2,1,1024]", conf={
    "spark.ui.enabled": "false",
    "spark.worker.resource.gpu.amount": "1",
    "spark.worker.resource.gpu.discoveryScript": sys.argv[1],
    "spark.executor.resource.gpu.amount": "1",
    "spark.task.resource.gpu.amount": "1",
})

def ask(batches):
    from kindling.train.devices import own_device, task_gpus
    for _ in batches:
        yield pa.RecordBatch.from_pydict({"gpus": [",".join(task_gpus())], "device": [own_device()]})

told = spark.range(0, 2, 1, 2).mapInArrow(ask, "gpus string, device string").collect()
print("told", sorted((row.gpus, row.device) for row in told))
df = spark.createDataFrame([([float(i), 1.0], "ab"[i % 2]) for i in range(40)], "features array<float>, label string")
model = kd.Model.of(torch.nn.Linear(2, 2), shape=(2,), labels=["a", "b"])
trained = model.fit(df, epochs=1, batch_size=8, workers=2, progress=False)
print("rows", trained.history[-1]["epochs"][0]["rows"])
spark.stop()
"""
STAGE = """
import sys
from pathlib import Path
import torch
from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests
import kindling as kd

spark = kd.spark("local-cluster[2,2,1024]", conf={
    "spark.ui.enabled": "false",
    "spark.worker.resource.gpu.amount": "1",
    "spark.worker.resource.gpu.discoveryScript": sys.argv[1],
    "spark.executor.resource.gpu.amount": "1",
})

seen = sys.argv[2]
class Loss(torch.nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        from pyspark import TaskContext
        from kindling.train.devices import task_gpus
        if TaskContext.get() is not None:
            Path(seen, str(TaskContext.get().partitionId())).write_text(",".join(task_gpus()))
        return super().forward(outputs, targets)

df = spark.createDataFrame([([float(i), 1.0], "ab"[i % 2]) for i in range(40)], "features array<float>, label string")
model = kd.Model.of(torch.nn.Linear(2, 2), shape=(2,), labels=["a", "b"])
each = ResourceProfileBuilder().require(TaskResourceRequests().cpus(1).resource("gpu", 1)).build
options = dict(loss=Loss(), epochs=1, batch_size=8, progress=False)
trained = model.fit(df, resources=each, **options)
print("rows", trained.history[-1]["epochs"][0]["rows"], "workers", trained.history[-1]["workers"])
print("gpus", sorted((path.name, path.read_text()) for path in Path(seen).iterdir()))
trained = model.fit(df, **options)
print("usual", trained.history[-1]["workers"], sorted((path.name, path.read_text()) for path in Path(seen).iterdir()))
whole = ResourceProfileBuilder().require(ExecutorResourceRequests().cores(1)).build
for asked in (dict(workers=3, resources=each), dict(resources=whole)):
    try:
        model.fit(df, **asked, **options)
    except kd.errors.ConfigError as error:
        print("refused", error)
spark.stop()
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pretended GPUs would be taken for real ones")
def test_gpus_handed_out_by_spark_reach_the_tasks(tmp_path: Path) -> None:
    """A discovery script pretends that each machine has one; torch has none, so training falls back on the CPU."""
    script = tmp_path / "discover.sh"
    script.write_text('#!/bin/sh\necho \'{"name": "gpu", "addresses": ["0"]}\'\n')
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "told [('0', 'cpu'), ('0', 'cpu')]" in done.stdout
    assert "rows 40" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pretended GPUs would be taken for real ones")
def test_a_profile_gives_gpus_to_the_tasks_that_train_alone(tmp_path: Path) -> None:
    """Stage-level scheduling: two machines of two cores and one pretended GPU have two slots with a GPU, and four."""
    script, seen = tmp_path / "discover.sh", tmp_path / "seen"
    seen.mkdir()
    script.write_text('#!/bin/sh\necho \'{"name": "gpu", "addresses": ["0"]}\'\n')
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", STAGE, str(script), str(seen)], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rows 40 workers 2" in done.stdout
    assert "gpus [('0', '0'), ('1', '0')]" in done.stdout
    assert "usual 4 [('0', ''), ('1', ''), ('2', ''), ('3', '')]" in done.stdout
    assert "needs 3 task slots at the same time, and the session has 2" in done.stdout
    assert "is refused by Spark" in done.stdout
