"""Altered files of Keras, TensorFlow and TensorFlow Lite: an error of ours or a net that runs, in bounded time."""

from __future__ import annotations

import json
import random
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from kindling.errors import FormatError
from kindling.formats import keras, tensorflow, tflite
from kindling.formats.models import Imported
from kindling.graph import from_json, to_json

HERE = Path(__file__).parent / "tensorflow"
NUMBERS = ("0", "-1", "1", "2", "3", "7", "64", "2147483647", "-9223372036854775808", "1e309", "0.5", "null", "true",
           '""', "[]", "{}", '"same"', "[1, 2]")  # fmt: skip


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 768 * 1024  # KiB


def mutated(data: bytes, rng: random.Random, parts: int = 1) -> bytes:
    """Bits flipped, bytes changed, pieces cut, doubled and filled."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10)) * parts):
        if not raw:
            break
        at, kind = rng.randrange(len(raw)), rng.randrange(7)
        if kind < 2:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            raw[at:at] = raw[at : at + rng.randrange(1, 200)]
        elif kind == 5:
            raw[at : at + 8] = b"\xff" * rng.randrange(12)
        elif rng.random() < 0.2:
            del raw[at:]
    return bytes(raw)


def mutated_json(text: str, rng: random.Random) -> str:
    """Values replaced, keys lost, entries doubled, characters changed."""
    words = text.replace(", ", " , ").replace(": ", " : ").split(" ")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(words)), rng.randrange(5)
        numbers = [k for k, word in enumerate(words) if word.strip("[]{}").lstrip("-").replace(".", "").isdigit()]
        if kind < 3 and numbers:
            place = rng.choice(numbers)
            word = words[place]
            core = word.strip("[]{}")
            words[place] = word.replace(core, rng.choice(NUMBERS))
        elif kind == 3:
            words[at] = rng.choice(words)
        else:
            words[at] = "".join(rng.choice((c, chr(rng.randrange(32, 127)))) for c in words[at])
    return " ".join(words)


def check(made: Imported) -> None:
    """A net that was made runs and can be stored, where it is small enough for a test."""
    rows = [tuple(int(n) for n in spec.shape[1:]) for spec in made.signature.inputs.values()]
    outs = [tuple(int(n) for n in spec.shape[1:]) for spec in made.signature.outputs.values()]
    if sum(int(np.prod(row)) for row in (*rows, *outs)) > 1_000_000:
        return
    to_json(made.module)
    if largest(made, rows) > 10_000_000:
        return
    given = [
        torch.zeros(2, *row, dtype=getattr(torch, spec.dtype))
        for row, spec in zip(rows, made.signature.inputs.values(), strict=True)
    ]
    with torch.inference_mode():
        found = made.module(*given)
    for part, out in zip(found if isinstance(found, tuple) else (found,), outs, strict=True):
        assert tuple(part.shape[1:]) == out


def largest(made: Imported, rows: list[tuple[int, ...]]) -> int:
    """Numbers in the largest tensor inside, found without memory."""
    sizes: list[int] = [0]

    class Follow(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            found = super().run_node(n)
            sizes.append(found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    given = [
        torch.zeros(2, *row, dtype=getattr(torch, spec.dtype), device="meta")
        for row, spec in zip(rows, made.signature.inputs.values(), strict=True)
    ]
    module = from_json(to_json(made.module))
    with torch.no_grad():
        Follow(module).run(*given)
    return max(sizes)


def survive(call: Callable[[], Imported], what: Callable[[], str]) -> bool:
    """Whether a net was made; anything but an error of ours fails the test."""
    begun = time.thread_time()
    try:
        check(call())
    except FormatError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{what()[:4000]}") from error
    else:
        told = ""
    assert time.thread_time() - begun < 20, what()[:4000]
    assert len(told) < 2000
    return not told


CONFIG = {
    "class_name": "Functional",
    "config": {
        "name": "net",
        "layers": [
            {"class_name": "InputLayer", "name": "x", "config": {"name": "x", "batch_input_shape": [None, 8, 6, 3]},
             "inbound_nodes": []},
            {"class_name": "Conv2D", "name": "c", "inbound_nodes": [[["x", 0, 0, {}]]],
             "config": {"name": "c", "filters": 4, "kernel_size": [3, 3], "strides": [2, 2], "padding": "same",
                        "dilation_rate": [1, 1], "groups": 1, "activation": "relu", "use_bias": True}},
            {"class_name": "BatchNormalization", "name": "b", "inbound_nodes": [[["c", 0, 0, {}]]],
             "config": {"name": "b", "axis": [3], "momentum": 0.99, "epsilon": 0.001}},
            {"class_name": "Add", "name": "a", "config": {"name": "a"},
             "inbound_nodes": [[["c", 0, 0, {}], ["b", 0, 0, {}]]]},
            {"class_name": "MaxPooling2D", "name": "m", "inbound_nodes": [[["a", 0, 0, {}]]],
             "config": {"name": "m", "pool_size": [2, 2], "strides": [2, 2], "padding": "same"}},
            {"class_name": "Reshape", "name": "r", "config": {"name": "r", "target_shape": [4, 4]},
             "inbound_nodes": [[["m", 0, 0, {}]]]},
            {"class_name": "LSTM", "name": "l", "inbound_nodes": [[["r", 0, 0, {}]]],
             "config": {"name": "l", "units": 3, "return_sequences": True}},
            {"class_name": "Permute", "name": "p", "config": {"name": "p", "dims": [2, 1]},
             "inbound_nodes": [[["l", 0, 0, {}]]]},
            {"class_name": "Flatten", "name": "f", "config": {"name": "f"}, "inbound_nodes": [[["p", 0, 0, {}]]]},
            {"class_name": "Dense", "name": "d", "config": {"name": "d", "units": 5, "activation": "softmax"},
             "inbound_nodes": [[["f", 0, 0, {}]]]},
        ],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["d", 0, 0]],
    },
}  # fmt: skip
ARRAYS = {"c": [(3, 3, 3, 4), (4,)], "b": [(4,)] * 4, "l": [(4, 12), (3, 12), (12,)], "d": [(12, 5), (5,)]}


def whole_model(file: Path, text: str) -> Path:
    """A whole-model `.h5` around a description."""
    with h5py.File(file, "w") as root:
        root.attrs["model_config"] = text
        root.attrs["keras_version"] = "2.4.0"
        weights = root.create_group("model_weights")
        weights.attrs["layer_names"] = [name.encode() for name in ARRAYS]
        for name, shapes in ARRAYS.items():
            group = weights.create_group(name)
            group.attrs["weight_names"] = [f"w{k}".encode() for k in range(len(shapes))]
            for k, shape in enumerate(shapes):
                group[f"w{k}"] = np.ones(shape, np.float32)
    return file


def fuzz_keras(folder: Path, rounds: int, seed: int) -> int:
    rng, text = random.Random(seed), json.dumps(CONFIG)
    good = whole_model(folder / "good.h5", text).read_bytes()
    file, net = folder / "net.h5", folder / "net.json"
    made = int(survive(lambda: keras.read(folder / "good.h5"), lambda: "the model itself"))
    for _ in range(rounds):
        said = mutated_json(text, rng)
        net.write_text(said)
        made += survive(lambda: keras.read(net, max_parameters=1 << 20, seed=0), lambda said=said: said)  # type: ignore[misc]
        file.write_bytes(mutated(good, rng, 3))
        made += survive(lambda: keras.read(file), lambda: repr(file.read_bytes()))
    for _ in range(rounds // 4):
        with zipfile.ZipFile(folder / "net.keras", "w", rng.choice((0, 8))) as archive:
            archive.writestr("config.json", mutated_json(text, rng))
            archive.writestr("metadata.json", rng.choice(('{"keras_version": "3.1"}', "{", "[]")))
            archive.writestr("model.weights.h5", mutated(good, rng))
        content = mutated((folder / "net.keras").read_bytes(), rng) if rng.random() < 0.7 else None
        if content is not None:
            (folder / "net.keras").write_bytes(content)
        survive(lambda: keras.read(folder / "net.keras"), lambda: "an archive")
    return made


def fuzz_graphs(folder: Path, rounds: int, seed: int) -> int:
    rng = random.Random(seed)
    graph, saved = (HERE / "operations.pb").read_bytes(), HERE / "saved_model_2"
    names = [name for name in np.load(HERE / "operations.npz") if name != "x"]
    file, made = folder / "net.pb", 0
    for _ in range(rounds):
        data = mutated(graph, rng)
        file.write_bytes(data)
        chosen = [f"out_{name}" for name in rng.sample(names, 6)]
        made += survive(lambda chosen=chosen: tensorflow.read(file, outputs=chosen), lambda data=data: repr(data))  # type: ignore[misc]
    (folder / "variables").mkdir(exist_ok=True)
    parts = ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
    for _ in range(rounds // 4):
        which = rng.choice(parts)
        for part in parts:
            data = (saved / part).read_bytes()
            (folder / part).write_bytes(mutated(data, rng, 3) if part == which else data)
        survive(lambda: tensorflow.read(folder), lambda which=which: which)  # type: ignore[misc]
    return made


def fuzz_lite(folder: Path, rounds: int, seed: int) -> int:
    rng, file, made = random.Random(seed), folder / "net.tflite", 0
    files = [(HERE / name).read_bytes() for name in ("float.tflite", "int8.tflite", "operations.tflite")]
    for _ in range(rounds):
        data = mutated(rng.choice(files), rng)
        file.write_bytes(data)
        made += survive(lambda: tflite.read(file), lambda data=data: repr(data))  # type: ignore[misc]
    return made


def test_altered_models_of_keras(tmp_path: Path) -> None:
    assert fuzz_keras(tmp_path, 60, seed=1) > 5


def test_altered_graphs_of_tensorflow(tmp_path: Path) -> None:
    assert fuzz_graphs(tmp_path, 40, seed=2) > 5


def test_altered_models_of_tensorflow_lite(tmp_path: Path) -> None:
    assert fuzz_lite(tmp_path, 60, seed=3) > 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_altered_files(tmp_path: Path) -> None:
    assert fuzz_keras(tmp_path, 200, seed=4) > 10
    assert fuzz_graphs(tmp_path, 150, seed=5) > 10
    assert fuzz_lite(tmp_path, 200, seed=6) > 10
