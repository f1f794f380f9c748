"""Files and modules reach the workers as they were; errors come back as they were raised."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyspark import SparkFiles
from torch import nn

from kindling import ship
from kindling.errors import ConfigError, DataError, KindlingError, SessionError


class Tied(nn.Module):
    """No graph (it branches on data), two names for one layer, a loose tensor and a buffer that is not saved."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.loose = torch.arange(3.0)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            x = -x
        return self.again(self.first(x)) * self.scale + self.loose


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    with torch.no_grad():
        net[1].running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
        net[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return net.eval()


def answer(spec: ship.ModuleSpec, x: list[Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    module = ship.open_module(spec).eval()
    with torch.inference_mode():
        y = module(torch.tensor(x)).flatten().tolist()
    for _ in batches:
        yield pa.RecordBatch.from_arrays([pa.array([y], pa.list_(pa.float64()))], ["y"])


def on_worker(spark: Any, spec: ship.ModuleSpec, x: torch.Tensor) -> torch.Tensor:
    frame = spark.range(0, 1, 1, 1).mapInArrow(ship.guard(partial(answer, spec, x.tolist())), "y array<double>")
    return torch.tensor(frame.collect()[0]["y"])


@pytest.mark.spark
@pytest.mark.sessions
@pytest.mark.parametrize(("module", "shape", "is_graph"), [(small_net(), (2, 3, 8, 8), True), (Tied(), (2, 3), False)])
def test_a_module_computes_the_same_on_a_worker(
    spark: Any, module: nn.Module, shape: tuple[int, ...], is_graph: bool
) -> None:
    spec = ship.ship_module(spark, module)
    assert spec.is_graph == is_graph
    x = torch.rand(shape)
    with torch.inference_mode():
        expected = module(x).flatten()
    torch.testing.assert_close(on_worker(spark, spec, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.spark
@pytest.mark.sessions
def test_a_file_is_sent_once_and_found_whole(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 99)
    name = f"kindling-test-{ship.digest(source)}"
    assert ship.ship_file(spark, source, name) == name
    source.unlink()  # a second call must not even look
    assert ship.ship_file(spark, source, name) == name

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            yield pa.RecordBatch.from_arrays([pa.array([ship.locate(name).read_bytes()])], ["data"])

    got = spark.range(0, 1, 1, 1).mapInArrow(read, "data binary").collect()
    assert bytes(got[0]["data"]) == bytes(range(256)) * 99


@pytest.mark.spark
@pytest.mark.sessions
def test_the_workers_of_a_host_open_one_file(spark: Any) -> None:
    spec = ship.ship_module(spark, nn.Linear(5, 5))

    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            time.sleep(1)  # long enough for both executors to be given a task
            found = ship.locate(spec.weights).stat()
            own = SparkFiles.get(spec.weights)
            yield pa.RecordBatch.from_pydict({"inode": [found.st_ino], "own": [own]})

    rows = spark.range(0, 4, 1, 4).mapInArrow(look, "inode long, own string").collect()
    assert len({row["inode"] for row in rows}) == 1
    if "local-cluster" in spark.conf.get("spark.master", ""):
        assert len({row["own"] for row in rows}) == 2, "one executor did all the work, nothing was tested"


@pytest.mark.spark
def test_the_same_weights_are_sent_under_the_same_name(spark: Any) -> None:
    net = nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.load_state_dict(net.state_dict())
    assert ship.ship_module(spark, net).weights == ship.ship_module(spark, twin).weights
    with torch.no_grad():
        net.weight[0, 0] += 1  # the specification is remembered, changed weights are not mistaken for the old ones
    assert ship.ship_module(spark, net).weights != ship.ship_module(spark, twin).weights


@pytest.mark.spark
def test_a_shipped_module_is_not_kept_alive(spark: Any) -> None:
    net = nn.Linear(4, 4)
    ship.ship_module(spark, net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.fixture
def here(spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped files are opened in this process, from the folder they are sent from."""
    monkeypatch.setattr(ship, "locate", lambda name: ship._outbox() / name)
    if ship.is_connect(spark):
        pytest.skip("Spark Connect's files are gone from the driver once they are sent")


@pytest.mark.spark
@pytest.mark.usefixtures("here")
def test_weights_are_mapped_in_the_layout_and_dtype_that_is_computed_with(spark: Any) -> None:
    module = ship.open_module(ship.ship_module(spark, small_net(), dtype=torch.bfloat16))
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    assert state["0.weight"].dtype is torch.bfloat16
    assert state["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert state["4.weight"].dtype is torch.bfloat16
    assert state["1.running_var"].dtype is torch.float32  # statistics keep their digits
    assert state["1.num_batches_tracked"].dtype is torch.int64
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [[int(end, 16) for end in span[0].split("-")] for span in spans]
    for name in ("0.weight", "4.weight"):
        assert any(low <= state[name].data_ptr() < high for low, high in ranges), f"{name} is not mapped from the file"


@pytest.mark.spark
@pytest.mark.usefixtures("here")
def test_tied_layers_stay_tied_and_frozen_parameters_frozen(spark: Any) -> None:
    module = Tied()
    module.first.bias.requires_grad_(False)
    opened = ship.open_module(ship.ship_module(spark, module))
    assert isinstance(opened, Tied)
    assert opened.first is opened.again
    assert not opened.first.bias.requires_grad
    assert opened.first.weight.requires_grad

    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    twice[2].weight = twice[0].weight  # type: ignore[union-attr]
    again = ship.open_module(ship.ship_module(spark, twice))
    assert again.get_parameter("2.weight") is again.get_parameter("0.weight")


@pytest.mark.spark
@pytest.mark.usefixtures("here")
def test_weights_can_be_trained_without_touching_the_shared_file(spark: Any) -> None:
    spec = ship.ship_module(spark, nn.Linear(2, 2))
    before = ship.digest(ship.locate(spec.weights))
    module = ship.open_module(spec)
    module(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert ship.digest(ship.locate(spec.weights)) == before


@pytest.mark.spark
@pytest.mark.usefixtures("here")
def test_a_file_cut_off_on_its_way_is_refused(spark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = ship.ship_module(spark, nn.Linear(2, 3))
    (tmp_path / "cut").write_bytes(ship.locate(spec.weights).read_bytes()[:-1])
    monkeypatch.setattr(ship, "locate", lambda _name: tmp_path / "cut")
    with pytest.raises(SessionError, match="bytes on this worker, not"):
        ship.open_module(spec)


@pytest.mark.spark
@pytest.mark.sessions
def test_a_class_that_workers_cannot_import_is_sent_along(spark: Any, tmp_path: Path) -> None:
    code = """
        import torch
        from torch import nn
        def twice(x):
            return 2 * x
        class Private(nn.Module):
            def forward(self, x):
                if x.sum() > 1e9:
                    return x
                return twice(x)
        """
    (tmp_path / "private_nets.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    found = importlib.util.spec_from_file_location("private_nets", tmp_path / "private_nets.py")
    assert found is not None
    assert found.loader is not None
    home = importlib.util.module_from_spec(found)
    sys.modules["private_nets"] = home
    try:
        found.loader.exec_module(home)
        spec = ship.ship_module(spark, home.Private())
        assert on_worker(spark, spec, torch.ones(2, 2)).tolist() == [2.0] * 4
    finally:
        del sys.modules["private_nets"]


def raise_data_error(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches
    raise ConfigError("size", 3, "is 'odd'", "Use 4")


def divide_by_zero(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield from batches
    yield 1 // 0


@pytest.mark.spark
@pytest.mark.sessions
def test_a_workers_error_arrives_as_it_was_raised(spark: Any) -> None:
    with pytest.raises(ConfigError, match=r"^size=3 is 'odd'\. Use 4\.$") as caught, ship.translated():
        spark.range(3).mapInArrow(ship.guard(raise_data_error), "id long").collect()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.spark
@pytest.mark.sessions
def test_a_bug_on_a_worker_shows_its_python_traceback_alone(spark: Any) -> None:
    with pytest.raises(SessionError) as caught, ship.translated():
        spark.range(3).mapInArrow(ship.guard(divide_by_zero), "id long").collect()
    text = str(caught.value)
    assert text.splitlines()[-1].startswith("ZeroDivisionError: ")
    assert "yield 1 // 0" in text
    assert "at org.apache" not in text
    assert len(text.splitlines()) <= 12


@pytest.mark.spark
@pytest.mark.sessions
def test_a_query_that_spark_refuses_is_one_sentence(spark: Any) -> None:
    with pytest.raises(DataError, match="nix") as caught, ship.translated():
        spark.range(3).select("nix").collect()
    assert len(str(caught.value).splitlines()) == 1


def test_errors_that_are_not_sparks_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), ship.translated():
        1 // 0  # noqa: B018
    with pytest.raises(KindlingError, match="mine"), ship.translated():
        raise DataError("mine")


def test_nothing_here_imports_torch() -> None:
    spec = ship.ModuleSpec(
        architecture=b"",
        is_graph=True,
        weights="",
        weights_bytes=0,
        dtype="float32",
        permuted=frozenset(),
        names=(),
    )
    task = pickle.dumps(ship.guard(partial(len, spec)))  # type: ignore[arg-type]
    code = f"import pickle, sys; pickle.loads({task!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
