"""Hostile ONNX files: whatever is done to them, an error of ours or a graph that is stored and runs."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kindling.errors import FormatError, ModelError
from kindling.formats.onnx import open_net, read
from kindling.graph import to_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SCALE = int(os.environ.get("KINDLING_FUZZ", "1"))


def nets(make: Any) -> list[bytes]:
    """Small graphs that between them use what a reader has rooms for."""
    helper = onnx.helper
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    conv = make(
        [
            ("Conv", ["x", "w", "b"], ["c"], {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}),
            ("BatchNormalization", ["c", "s", "b", "b", "s"], ["n"]),
            ("Relu", ["n"], ["r"]),
            ("MaxPool", ["r"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Shape", ["p"], ["sh"]),
            ("Gather", ["sh", "zero"], ["rows"]),
            ("Concat", ["rows", "minus"], ["target"], {"axis": 0}),
            ("Reshape", ["p", "target"], ["f"]),
            ("Gemm", ["f", "g", "h"], ["y"], {"transB": 1}),
        ],
        {"x": ["N", 3, 8, 8]},
        {"y": ["N", 5]},
        {
            "w": numbers(4, 3, 3, 3),
            "b": numbers(4),
            "s": np.ones(4, np.float32),
            "zero": np.zeros(1, np.int64),
            "minus": np.array([-1]),
            "g": numbers(5, 64),
            "h": numbers(5),
        },
    )
    shapes = make(
        [
            ("ConstantOfShape", ["size"], ["ones"], {"value": onnx.numpy_helper.from_array(np.ones(1, np.float32))}),
            ("Tile", ["ones", "twice"], ["t"]),
            ("Pad", ["t", "pads"], ["q"]),
            ("Range", ["start", "limit", "step"], ["k"]),
            ("Add", ["q", "k"], ["a"]),
            ("Resize", ["x", "", "scales"], ["z"], {"mode": "linear"}),
            ("ReduceSum", ["z", "axes"], ["m"], {"keepdims": 0}),
            ("Slice", ["m", "from", "to", "axis"], ["v"]),
            ("Expand", ["v", "wide"], ["e"]),
            ("Sub", ["e", "a"], ["y"]),
        ],
        {"x": ["N", 1, 4, 4]},
        {"y": None},
        {
            "size": np.array([1, 4]),
            "twice": np.array([1, 2]),
            "pads": np.array([0, 1, 0, 1]),
            "start": np.float32(0).reshape(()),
            "limit": np.float32(10).reshape(()),
            "step": np.float32(1).reshape(()),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "axes": np.array([1, 2]),
            "from": np.array([0]),
            "to": np.array([1]),
            "axis": np.array([1]),
            "wide": np.array([1, 10]),
        },
    )
    inner = helper.make_graph(
        [helper.make_node("Mul", ["s", "u"], ["t"]), helper.make_node("Less", ["i", "most"], ["go"])],
        "inner",
        [
            helper.make_tensor_value_info("i", 7, []),
            helper.make_tensor_value_info("g", 9, []),
            helper.make_tensor_value_info("s", 1, ["N", 2]),
        ],
        [helper.make_tensor_value_info("go", 9, []), helper.make_tensor_value_info("t", 1, ["N", 2])],
    )
    branches = [
        helper.make_graph([helper.make_node(op, ["l"], [op])], op, [], [helper.make_tensor_value_info(op, 1, None)])
        for op in ("Neg", "Abs")
    ]
    flow = make(
        [
            helper.make_node("Loop", ["n", "yes", "x"], ["l"], body=inner),
            helper.make_node("ReduceSum", ["l"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "none"], ["large"]),
            helper.make_node("If", ["large"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        {"x": ["N", 2]},
        {"y": None},
        {
            "n": np.array(3),
            "yes": np.array(True),
            "u": numbers(2),
            "most": np.array(2),
            "none": np.float32(0).reshape(()),
        },
    )
    quantised = make(
        [
            ("DequantizeLinear", ["w", "scale", "zero"], ["d"], {"axis": 0}),
            ("QuantizeLinear", ["x", "one", "mid"], ["q"]),
            ("DequantizeLinear", ["q", "one", "mid"], ["f"]),
            ("MatMul", ["f", "d"], ["m"]),
            ("Add", ["m", "bias"], ["y"]),
        ],
        {"x": ["N", 3]},
        {"y": ["N", 4]},
        {
            "w": rng.integers(0, 255, (3, 4)).astype(np.uint8),
            "scale": np.ones(3, np.float32),
            "zero": np.full(3, 128, np.uint8),
            "one": np.float32(0.1).reshape(()),
            "mid": np.uint8(128).reshape(()),
            "bias": numbers(4),
        },
    )
    return [net.SerializeToString() for net in (conv, shapes, flow, quantised)]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes changed, pieces cut, doubled and moved."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not raw:
            break
        at, kind = rng.randrange(len(raw)), rng.randrange(7)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del raw[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            raw[at:at] = raw[at : at + rng.randrange(1, 100)]
        elif kind == 4:
            raw[at : at + 8] = b"\xff" * rng.randrange(12)
        elif kind == 5:
            raw[at : at + 8] = rng.choice((1 << 20, 1 << 31, 1 << 40, 1 << 62)).to_bytes(8, "little")
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def survive(call: Any, what: bytes) -> bool:
    """Whether the call gave something; anything but an error of ours fails the test."""
    begun = time.perf_counter()
    try:
        call()
    except (FormatError, ModelError) as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{what!r}") from error
    else:
        told = ""
    assert time.perf_counter() - begun < 20, what
    assert len(told) < 3000
    return not told


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """The peak of the process grows by less than a gigabyte and a half: a trial run may make a tensor of one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1536 * 1024


def fuzz(folder: Path, make: Any, rounds: int, seed: int) -> int:
    rng = random.Random(seed)
    good = nets(make)
    file = folder / "net.onnx"
    made = 0
    for _ in range(rounds):
        data = mutated(rng.choice(good), rng)
        file.write_bytes(data)

        def load() -> None:
            found = read(file, engine="torch")
            to_json(found.module)
            rows = [spec.shape[1:] for spec in found.signature.inputs.values()]
            if sum(int(np.prod(row)) for row in rows) < 100_000:
                kinds = [getattr(torch, spec.dtype) for spec in found.signature.inputs.values()]
                batch = [torch.zeros(2, *map(int, row), dtype=kind) for row, kind in zip(rows, kinds, strict=True)]
                with torch.inference_mode():
                    try:
                        found.module(*batch)
                    except (RuntimeError, ValueError, IndexError):
                        pass  # a graph that the file states wrongly, past what shapes can show: torch says so when run

        made += survive(load, data)
    return made


def test_all_four_are_good_to_begin_with(make: Any) -> None:
    for data in nets(make):
        assert open_net(data).engine == "torch"


def test_mutated_files_give_a_model_or_an_error(tmp_path: Path, make: Any, bounded_memory: None) -> None:
    assert fuzz(tmp_path, make, 150, seed=1) > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mutated_files(tmp_path: Path, make: Any, bounded_memory: None) -> None:
    assert fuzz(tmp_path, make, 5000 * SCALE, seed=2) > 300


def test_sizes_out_of_nothing_are_refused(make: Any, tmp_path: Path, bounded_memory: None) -> None:
    file = tmp_path / "net.onnx"
    huge = np.array([2**20, 2**20])
    for nodes, weights in (
        ([("ConstantOfShape", ["s"], ["c"]), ("Add", ["x", "c"], ["y"])], {"s": huge}),
        ([("Expand", ["o", "s"], ["c"]), ("MatMul", ["x", "c"], ["y"])], {"s": huge, "o": np.ones(1, np.float32)}),
        ([("Tile", ["x", "s"], ["y"])], {"s": np.array([1, 2**50])}),
        ([("Add", ["a", "b"], ["c"]), ("Add", ["x", "c"], ["y"])],
         {"a": np.ones((2**16, 1), np.float32), "b": np.ones((1, 2**16), np.float32)}),
    ):  # fmt: skip
        onnx.save(make(nodes, {"x": ["N", 2]}, {"y": None}, weights), file)
        survive(lambda: read(file), b"")


def test_graphs_inside_graphs_have_a_bound(tmp_path: Path) -> None:
    helper = onnx.helper
    info = helper.make_tensor_value_info("y", 1, None)
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "b", [], [info])
    for _ in range(30):
        node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body) if _ < 8 else None
        body = helper.make_graph([node or helper.make_node("If", ["c"], ["y"], then_branch=body)], "b", [], [info])
    graph = helper.make_graph(
        list(body.node),
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 2]), helper.make_tensor_value_info("c", 9, ["N"])],
        [info],
    )
    file = tmp_path / "net.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    with pytest.raises(FormatError):
        read(file)
    file.write_bytes(b"\x08\x08\x3a" + b"\xff" * 9 + b"\x01")
    with pytest.raises(FormatError):
        read(file)
    own, sets = helper.make_opsetid("f", 1), [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    again = helper.make_node("A", ["a"], ["b"], domain="f")
    calls = helper.make_function("f", "A", ["a"], ["b"], [again], [own])
    x = helper.make_tensor_value_info("x", 1, ["N", 2])
    graph = helper.make_graph([helper.make_node("A", ["x"], ["y"], domain="f")], "g", [x], [info])
    made = helper.make_model(graph, functions=[calls], opset_imports=sets)
    file.write_bytes(made.SerializeToString())
    with pytest.raises(FormatError, match="nests graphs deeper"):
        read(file)
