"""The benchmarks work: the registry is whole, figures combine as told, each case runs in its tiny preset."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The runner, imported as the repository's own package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.run")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def harness(run: Any) -> Any:
    return importlib.import_module("benchmarks.harness")


def bench_of(harness: Any, **settings: Any) -> Any:
    case = harness.Case(name="case", what="", run=lambda bench: None, presets={"tiny": {}, "full": {}}, **settings)
    return harness.Bench(case=case, quiet=True)


def test_every_registered_case_says_what_it_is(run: Any) -> None:
    for name in run.CASES:
        case = run.find(name)
        assert case.name == name
        assert case.what.endswith(".")
        assert set(case.presets) == {"tiny", "full"}


def test_every_case_is_registered_and_documented(run: Any) -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\nCASE = Case(" in path.read_text()}
    assert modules == set(run.CASES)
    for page in ("benchmarks/README.md", "docs/BENCHMARKS.md"):
        text = (ROOT / page).read_text()
        assert [name for name in run.CASES if f"`{name}`" not in text] == [], page


@pytest.mark.parametrize("module", ["harness", "inputs", "links", "network", "optimum", "page", "scaling"])
def test_examples_in_the_docstrings_hold(run: Any, module: str) -> None:
    pytest.importorskip("sklearn")
    found = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_a_ratio_is_taken_inside_each_round(harness: Any) -> None:
    bench = bench_of(harness)
    for number, (ours, theirs) in enumerate([(10.0, 5.0), (30.0, 10.0), (8.0, 8.0)]):
        bench.record("ours", ours, "images/s", round=number)
        bench.record("theirs", theirs, "images/s", round=number)
    bench.ratio("ours / theirs", bench.best(["ours"]), bench.best(["theirs"]))
    assert bench.summary["ours / theirs"] == 2.0  # of 2, 3 and 1; the ratio of the medians would be 1.25
    assert bench.median("ours") == 10.0


def test_a_ceiling_is_the_best_configuration_of_its_round(harness: Any) -> None:
    bench = bench_of(harness)
    for number, (one, two) in enumerate([(4.0, 6.0), (7.0, 5.0)]):
        bench.record("one", one, "images/s", round=number)
        bench.record("two", two, "images/s", round=number)
    assert bench.best(["one", "two"]) == {0: 6.0, 1: 7.0}
    assert bench.best(["one", "two"], highest=False) == {0: 4.0, 1: 5.0}


def test_targets_are_judged_in_the_full_preset_only(harness: Any) -> None:
    target = harness.Target(value="speed", at_least=2.0)
    bench = bench_of(harness, targets=(target,))
    assert bench.verdicts()[0]["met"] is None
    bench.value("speed", 1.9)
    assert bench.verdicts()[0]["met"] is False
    bench.value("speed", 2.0)
    assert bench.verdicts()[0]["met"] is True
    bench.preset = "tiny"
    assert bench.verdicts()[0]["met"] is None


def test_the_record_tells_how_to_repeat_it(harness: Any, tmp_path: Path) -> None:
    bench = bench_of(harness)
    bench.results, bench.command = tmp_path / "results", "python benchmarks/run.py case"
    bench.record("ours", 3.0, "s", round=0, detail=[1, 2])
    *figures, last = [json.loads(line) for line in bench.write().read_text().splitlines()]
    assert figures[0] | {"contestant": "ours", "figure": 3.0, "unit": "s", "detail": [1, 2]} == figures[0]
    assert last["command"] == "python benchmarks/run.py case"
    assert last["runs"] == {"ours": [3.0]}
    assert {"machine", "versions", "seed", "medians", "values"} <= set(last)
    assert last["versions"]["torch"]


def test_the_page_takes_the_newest_full_figures(run: Any, harness: Any, tmp_path: Path) -> None:
    page = importlib.import_module("benchmarks.page")
    text = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    assert [name for name in run.CASES if f"<!-- figures: {name} -->" not in text] == []
    for preset, ratio in (("full", 0.5), ("full", 0.93), ("tiny", 0.1)):
        bench = bench_of(harness, targets=(harness.Target(value="ours / theirs", at_least=0.9),))
        bench.results, bench.preset, bench.command = tmp_path, preset, "python benchmarks/run.py case"
        bench.record("ours", 3.0, "images/s")
        bench.value("ours / theirs", ratio)
        bench.write()
    filled = page.fill("before <!-- figures: case -->old<!-- end --> after", tmp_path)
    assert filled.startswith("before <!-- figures: case -->\n| value |")
    assert "| ours / theirs | 0.93 | >= 0.9: met |" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- end --> after")


def test_a_failing_child_tells_its_last_lines(harness: Any) -> None:
    with pytest.raises(harness.BenchmarkError, match="No such file"):
        harness.run_program("plain_head", {"arrays": "/nowhere.npz", "threads": 1, "seed": 0})


def test_an_unknown_case_is_a_wrong_command_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["no_such_case"])
    assert ended.value.code == 2
    assert "featurize_vgg16" in capsys.readouterr().err


def test_the_list_names_every_target(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert "kindling / bare forward >= 0.9" in told
    assert all(name in told for name in run.CASES)


@pytest.fixture
def links(run: Any) -> Any:
    module = importlib.import_module("benchmarks.links")
    if why := module.missing():
        pytest.skip(why)
    return module


@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_a_link_has_its_rate_and_delay_and_leaves_nothing_behind(links: Any, delay_s: float) -> None:
    """A megabyte over 10 Mbit/s takes 0.8 s; a word and its answer take two delays more."""
    server = (
        "import socket; s = socket.create_server(('10.77.0.1', 5000)); print('up', flush=True); c, _ = s.accept()\n"
        "c.sendall(c.recv(1)); n = 0\nwhile n < 1000000: n += len(c.recv(1 << 16))\nc.sendall(b'!')"
    )
    client = (
        "import socket, time; c = socket.create_connection(('10.77.0.1', 5000)); t = time.perf_counter()\n"
        "c.sendall(b'?'); c.recv(1); u = time.perf_counter(); c.sendall(bytes(1000000)); c.recv(1)\n"
        "print(u - t, time.perf_counter() - u)"
    )
    with links.network(2, links.Link(rate_bit_s=1e7, delay_s=delay_s)) as net:
        there = [[*prefix, sys.executable, "-c"] for prefix in net.prefixes]
        with subprocess.Popen([*there[0], server], stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "up\n"
            told = subprocess.run([*there[1], client], capture_output=True, text=True, timeout=60, check=True).stdout
    answered_s, sent_s = map(float, told.split())
    assert 2 * delay_s <= answered_s
    assert 0.7 <= sent_s
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"kindling-{os.getpid()}-" not in spaces


def test_the_model_of_scaling_is_fitted_and_its_page_written(run: Any, harness: Any, tmp_path: Path) -> None:
    """From figures made with known constants, the same constants; every table has its rows."""
    scaling = importlib.import_module("benchmarks.scaling")
    lan = {"start_s": 2e-4, "peer_s": 1e-4, "delays": 3.0, "wire": 1.1, "crowd": 0.3, "copy_s_per_byte": 4e-10}
    true = {"network": lan, "one_machine": {**dict.fromkeys(lan, 0.0), "start_s": 1e-4, "copy_s_per_byte": 1e-10}}

    def bench_for(case: str) -> Any:
        bench = harness.Bench(
            case=run.find(case), quiet=True, results=tmp_path, command=f"python benchmarks/run.py {case}"
        )
        return bench

    bench, sizes = bench_for("network"), (1 << 12, 1 << 16, 1 << 20, 1 << 24)
    for workers, rate, delay in [
        (2, 1e10, 0.0),
        (2, 1e8, 0.0),
        (2, 1e8, 0.02),
        (3, 1e9, 0.0),
        (4, 1e9, 0.0),
        (0, 1, 0),
    ]:
        count = workers or 2
        net = scaling.Network(
            rate_bit_s=rate, delay_s=delay, one_machine=not workers, workers_per_core=count / bench.cores
        )
        sums = [(size, scaling.exchange_s(size, count, net, true)) for size in sizes]
        where = {"rate_bit_s": rate, "delay_s": delay, "relay": False} if workers else {"one_machine": True}
        told = {"workers": count, "cores": bench.cores, **where}
        bench.record("sums", 1.0, "s", sums=sums, **told)
        for trial in ("allreduce", "averaging every=16") if workers else ():
            spent = {name: [0.5] * count for name in ("compute_s", "data_s", "communicate_s", "bytes_sent")}
            steps = {"step": 100, "steps_per_epoch": 50, "reached": True, "accuracy": 0.9, "curve": []}
            bench.record(f"{workers} {trial}", 2.0, "s to target", trial=trial, **spent, **steps, **told)
    bench.write()
    for case, name, details in (
        ("lenet_epoch", "kindling, all-reduce: fit to first step", {}),
        ("spool", "kindling, pack and spool", {"phases": {"pack": 2.0, "spool": 1.0}}),
    ):
        other = bench_for(case)
        other.record(name, 2.5, "s", **details)
        other.write()
    page, constants = tmp_path / "page.md", tmp_path / "constants.json"
    marks = "".join(f"<!-- scaling: {name} -->\nold\n<!-- end -->\n" for name in scaling.TABLES)
    page.write_text(f"before\n{marks}after")
    words = ["--results", str(tmp_path), "--constants", str(constants), "--page", str(page)]
    assert scaling.main(words) == 0
    known = json.loads(constants.read_text())
    assert known["network"] == pytest.approx(lan, rel=1e-2, abs=1e-12)
    assert known["one_machine"]["copy_s_per_byte"] == pytest.approx(1e-10, rel=1e-2)
    assert known["fit"]["network"]["largest_error"] < 1e-3
    assert known["start_s"] == 2.5
    assert known["pack_bytes_s_per_worker"] == pytest.approx(30607 * 4096 * 4 / 3 / 2)
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("after")
    assert text.count("\n| averaging every=16 |") == 3  # two, three and four workers
    assert "512 workers" in text
    assert scaling.main(["--results", str(tmp_path / "empty"), *words[2:]]) == 1


def test_every_strategy_is_tried_on_slow_networks(run: Any) -> None:
    from kindling.train.strategies import STRATEGIES

    tried = importlib.import_module("benchmarks.network").trials()
    assert {kind for kind, *_ in tried.values()} == set(STRATEGIES)
    for kind, settings, _ in tried.values():
        STRATEGIES[kind](**settings)  # settings that it has


CASES = [
    "featurize_vgg16",
    "featurize_squeezenet",
    "head",
    "accuracy_head",
    pytest.param("memory", marks=[pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]),
    "mnist_lenet",
    pytest.param("transfer_caltech101", marks=pytest.mark.slow),
    pytest.param("load_formats", marks=pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")),
    "lenet_epoch",
    "ddp_overhead",
    "torch_distributor",
    "spool",
    "network",
]
LEFT_OUT = ("Ray Data", "Daft", "MobileNetV2", "bf16", "100 Mbit/s")
"""Of every case's targets, those whose values the tiny presets do not have: peers, the second backbone, slow links."""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tiny_preset(run: Any, harness: Any, spark: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("sklearn")
    case = run.find(name)
    if name == "network" and (why := importlib.import_module("benchmarks.links").missing()):
        pytest.skip(why)
    bench = harness.Bench(
        case=case, preset="tiny", rounds=1, results=tmp_path, peers=False, quiet=True, spark=spark, command="test"
    )
    run.run_case(bench)
    *_, last = [json.loads(line) for line in bench.write().read_text().splitlines()]
    assert last["case"] == name
    assert all(figure >= 0 for figures in last["runs"].values() for figure in figures)
    absent = [target["value"] for target in last["targets"] if target["seen"] is None]
    assert [value for value in absent if not any(other in value for other in LEFT_OUT)] == []
    cosine = last["values"].get("mean cosine of features, kindling and plain script")
    assert cosine is None or cosine > 0.99
