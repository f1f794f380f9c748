"""Hostile files: whatever is done to them, an error of ours or a model that runs; never anything else."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kindling.errors import FormatError
from kindling.formats.caffe import read, read_mean, read_solver
from kindling.formats.caffe.prototxt import parse
from kindling.formats.caffe.wire import decode
from kindling.formats.models import Imported

NET = """
name: "fuzz"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { mirror: true crop_size: 8 mean_value: 1 mean_value: 2 mean_value: 3 scale: 0.5 } }
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } }
  include { phase: TEST } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { name: "w" lr_mult: 2 } param { lr_mult: 1 }
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 1 group: 1 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { eps: 0.001 } }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" relu_param { negative_slope: 0.1 } }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool"
  pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 } }
layer { name: "lrn" type: "LRN" bottom: "pool" top: "lrn" lrn_param { local_size: 3 alpha: 0.1 beta: 0.75 } }
layer { name: "slice" type: "Slice" bottom: "lrn" top: "a" top: "b" slice_param { axis: 1 slice_point: 2 } }
layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "sum"
  eltwise_param { operation: SUM coeff: 1 coeff: 2 } }
layer { name: "cat" type: "Concat" bottom: "sum" bottom: "a" top: "cat" concat_param { axis: 1 } }
layer { name: "up" type: "Deconvolution" bottom: "cat" top: "up"
  convolution_param { num_output: 2 kernel_size: 2 stride: 2 bias_term: false weight_filler { type: "bilinear" } } }
layer { name: "tile" type: "Tile" bottom: "up" top: "tile" tile_param { axis: 1 tiles: 2 } }
layer { name: "shape" type: "Reshape" bottom: "tile" top: "shape" reshape_param { shape { dim: 0 dim: 4 dim: -1 } } }
layer { name: "ip" type: "InnerProduct" bottom: "shape" top: "ip"
  inner_product_param { num_output: 5 axis: 1 weight_filler { type: "gaussian" std: 0.1 } } }
layer { name: "pow" type: "Power" bottom: "ip" top: "pow" power_param { power: 2 scale: 0.5 shift: 1 } }
layer { name: "prob" type: "Softmax" bottom: "pow" top: "prob" softmax_param { axis: 1 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" include { phase: TRAIN } }
"""
SOLVER = """
net: "net.prototxt" test_iter: 10 test_interval: 5 base_lr: 0.1 lr_policy: "step" gamma: 0.1 stepsize: 10 power: 0.5
max_iter: 100 momentum: 0.9 weight_decay: 0.001 type: "SGD" random_seed: 3 stepvalue: 3 clip_gradients: 2
"""
NUMBERS = (
    "0", "-1", "1", "7", "2147483647", "2147483648", "4294967295", "9223372036854775807", "1e38", "1e400", "nan",
    "-inf", "0.5", "65536", "1000000", "true", "MAX", '""', "{", "}", "[", "1e-320",
)  # fmt: skip


def mutated_text(text: str, rng: random.Random) -> str:
    """Numbers, words, characters and lines changed, dropped, doubled, cut."""
    words = text.replace("{", " { ").replace("}", " } ").split(" ")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(words))
        kind = rng.randrange(7)
        numbers = [k for k, word in enumerate(words) if word.strip().lstrip("-").replace(".", "").isdigit()]
        if kind < 3 and numbers:
            words[rng.choice(numbers)] = rng.choice(NUMBERS)
        elif kind == 3:
            words[at] = rng.choice(words)
        elif kind == 4:
            del words[at : at + rng.randrange(1, 6)]
        elif kind == 5:
            words[at:at] = words[at : at + rng.randrange(1, 30)] * rng.choice((1, 2, 50))
        else:
            words[at] = "".join(rng.choice((c, chr(rng.randrange(1, 300)))) for c in words[at])
        words = words or [""]
    text = " ".join(words)
    return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes changed, pieces cut, doubled and moved."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        if not raw:
            break
        at = rng.randrange(len(raw))
        kind = rng.randrange(6)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            raw[at:at] = raw[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            raw[at : at + 8] = b"\xff" * rng.randrange(12)
        else:
            del raw[at:]
    return bytes(raw)


def check_model(made: Imported) -> None:
    """A model that was made runs, where it is small enough for a test."""
    sizes = [spec.shape for spec in made.signature.inputs.values()]
    if sum(int(np.prod([int(n) for n in shape[1:]])) for shape in sizes) > 100_000:
        return
    if sum(parameter.numel() for parameter in made.module.parameters()) > 1_000_000:
        return
    shapes = [spec.shape for spec in made.signature.outputs.values()]
    if sum(int(np.prod([int(n) for n in shape[1:]])) for shape in shapes) > 1_000_000:
        return
    from kindling.graph import to_json

    to_json(made.module)
    with torch.inference_mode():
        out = made.module(*(torch.zeros(2, *(int(n) for n in shape[1:])) for shape in sizes))
    for part, shape in zip(out if isinstance(out, tuple) else (out,), shapes, strict=True):
        assert tuple(part.shape[1:]) == shape[1:]


def survive(call: Callable[[], Any], what: str) -> bool:
    """Whether the call gave something; anything but an error of ours fails the test."""
    begun = time.thread_time()  # a busy machine is not the reader's fault
    try:
        call()
    except FormatError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{what}") from error
    else:
        told = ""
    assert time.thread_time() - begun < 20, what
    assert len(told) < 2000
    return not told


@pytest.fixture
def bounded_memory() -> Any:
    """The peak of the process grows by less than half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024


def weights_of(made: Imported, write: Any) -> bytes:
    state = {name: value.numpy() for name, value in made.module.state_dict().items()}
    return bytes(write.caffemodel({
        "conv": [state["conv.weight"], state["conv.bias"]],
        "bn": [state["bn.running_mean"], state["bn.running_var"], np.ones(1)],
        "scale": [state["bn.weight"], state["bn.bias"]],
        "up": [state["up.weight"]],
        "ip": [state["ip.weight"], state["ip.bias"]],
    }))  # fmt: skip


def fuzz_nets(folder: Path, write: Any, rounds: int, seed: int) -> int:
    file, weights = folder / "net.prototxt", folder / "net.caffemodel"
    file.write_text(NET)
    good = weights_of(read(file, seed=0), write)
    rng = random.Random(seed)
    made = 0
    for _ in range(rounds):
        text, data = mutated_text(NET, rng), mutated_bytes(good, rng)
        which = rng.randrange(3)
        file.write_text(text if which != 1 else NET, encoding="utf-8")
        weights.write_bytes(data if which else good)
        options: dict[str, Any] = {"phase": rng.choice(("TEST", "TRAIN"))}
        if which:
            options["weights"] = weights
        made += survive(
            lambda options=options: check_model(read(file, max_parameters=2**20, **options)),  # type: ignore[misc]
            f"{options}\n{text if which != 1 else data!r}",
        )
    return made


def fuzz_rest(folder: Path, write: Any, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    solver, mean = folder / "solver.prototxt", folder / "mean.binaryproto"
    good = write.blob(np.ones((1, 3, 4, 4)), "legacy")
    whole = write.data(1, "n") + write.data(100, write.data(1, "a") + write.data(106, write.number(1, 3)) + good)
    for _ in range(rounds):
        text = mutated_text(SOLVER, rng)
        solver.write_text(text, encoding="utf-8")

        def rates() -> None:
            made = read_solver(solver)
            assert all(isinstance(made.rate(k), float) for k in (0, 1, 50))

        survive(rates, text)
        data = mutated_bytes(good, rng)
        mean.write_bytes(data)
        survive(lambda: read_mean(mean), repr(data))
        data = mutated_bytes(whole, rng)
        survive(lambda data=data: decode(data, rng.choice(("NetParameter", "SolverParameter"))), repr(data))  # type: ignore[misc]
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        survive(lambda noise=noise: parse(noise), repr(noise))  # type: ignore[misc]


def test_mutated_nets_and_weights_give_a_model_or_an_error(tmp_path: Path, write: Any, bounded_memory: None) -> None:
    made = fuzz_nets(tmp_path, write, 300, seed=1)
    assert made > 20  # the mutations are not all fatal, or they would test little


def test_mutated_solvers_means_and_messages_give_an_error_or_a_result(
    tmp_path: Path, write: Any, bounded_memory: None
) -> None:
    fuzz_rest(tmp_path, write, 400, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mutated_files(tmp_path: Path, write: Any, bounded_memory: None) -> None:
    assert fuzz_nets(tmp_path, write, 8000, seed=3) > 500
    fuzz_rest(tmp_path, write, 20_000, seed=4)


@pytest.mark.slow
def test_long_files_are_read_or_refused_in_time(tmp_path: Path, bounded_memory: None) -> None:
    file = tmp_path / "net.prototxt"
    head = 'input: "x" input_dim: 1 input_dim: 3 input_dim: 4 input_dim: 4\n'
    file.write_text(head + 'layer { name: "r" type: "ReLU" bottom: "x" top: "x" }\n' * 1000)
    begun = time.thread_time()
    made = read(file)
    assert len(list(made.module.children())) == 1000
    assert time.thread_time() - begun < 30
    for text in (
        head + 'layer { name: "r" type: "ReLU" bottom: "x" top: "x" }\n' * 10_001,
        head + "layer { " * 100_000,
        head + 'layer { name: "s" type: "Slice" bottom: "x" ' + 'top: "t" ' * 100_000 + "}",
        head + 'layer { name: "c" type: "Concat" top: "t" ' + 'bottom: "x" ' * 100_000 + "concat_param { axis: 0 } }",
        "input_dim: 1 " * 1_000_001 + 'input: "x"',
        head + 'layer { name: "' + "n" * 10_000_000 + '" type: "ReLU" bottom: "y" top: "x" }',
        head.replace("4", "2147483647"),
        head.replace("dim: 3", "dim: 2147483648"),
    ):
        file.write_text(text)
        survive(lambda: read(file), text[:200])
