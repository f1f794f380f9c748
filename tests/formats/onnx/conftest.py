"""What the tests of ONNX share: the conformance cases, and a maker of small graphs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def conformance() -> ModuleType:
    """The script beside this file, which is also run on its own."""
    spec = importlib.util.spec_from_file_location("onnx_conformance", HERE / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_conformance"] = module
    spec.loader.exec_module(module)
    return module


def _node(node: tuple[Any, ...]) -> Any:
    from onnx import helper

    return helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {}))


def _model(
    nodes: Sequence[Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    **more: Any,
) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    kinds = {
        "float": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
        "uint8": TensorProto.UINT8,
        "bool": TensorProto.BOOL,
    }

    def info(name: str, shape: Any) -> Any:
        kind, sizes = shape if isinstance(shape, tuple) and isinstance(shape[0], str) else ("float", shape)
        return helper.make_tensor_value_info(name, kinds[kind], None if sizes is None else list(sizes))

    graph = helper.make_graph(
        [_node(node) if isinstance(node, tuple) else node for node in nodes],
        "made",
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], **more)
    made.ir_version = min(made.ir_version, 10)
    return made


@pytest.fixture
def make() -> Callable[..., Any]:
    """A ModelProto of nodes (op, inputs, outputs, attributes), shapes of inputs and outputs, weights."""
    return _model
