"""Models of ONNX through `kindling.load`: the numbers of onnxruntime and of the torch nets they were made from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kindling as kd
from kindling.errors import ConfigError, FormatError, MissingExtraError, ModelError
from kindling.formats.onnx import open_net
from kindling.formats.onnx.proto import open_file
from kindling.nets.layers_onnx import OnnxOp

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def exported(net: nn.Module, x: Tensor, file: Path, *, batch: bool, opset: int = 17) -> Path:
    """torch's own exporter, for batches of any size or of one row."""
    axes = {"x": {0: "N"}, "y": {0: "N"}} if batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (x,),
            str(file),
            input_names=["x"],
            output_names=["y"],
            dynamo=False,
            opset_version=opset,
            dynamic_axes=axes,
        )
    return file


def by_runtime(file: Path, *inputs: Tensor) -> list[np.ndarray]:
    """What onnxruntime gives for the file itself."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})  # type: ignore[no-any-return]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.encode = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1, enable_nested_tensor=False
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(self.embed(x)).mean(1))  # type: ignore[no-any-return]


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(torch.relu(self.a(x)))
        low = self.down(a)
        large = nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
        return self.out(torch.cat([a, self.up(low)], 1)) + large[:, :2]  # type: ignore[no-any-return]


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows, channels, tall, wide = x.shape
        return x.view(rows, 2, channels // 2, tall, wide).transpose(1, 2).reshape(rows, channels, tall, wide).flatten(1)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "lenet": (lambda: kd.load("lenet").module, lambda n: torch.rand(n, 1, 28, 28)),
    "lstm": (Lstm, lambda n: torch.rand(n, 5, 6)),
    "text": (Text, lambda n: torch.randint(0, 50, (n, 7))),
    "unet": (Unet, lambda n: torch.rand(n, 3, 16, 16)),
    "shuffle": (Shuffle, lambda n: torch.rand(n, 4, 3, 3)),
}


@pytest.mark.parametrize("batch", [True, False], ids=["any batch", "one row"])
@pytest.mark.parametrize("name", NETS)
def test_exported_nets_give_their_own_numbers_for_any_batch_and_come_back_from_bundles(
    name: str, batch: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, rows = NETS[name]
    net, x = make(), rows(5)
    file = exported(net, rows(1), tmp_path / "net.onnx", batch=batch)
    model = kd.load(file)
    assert model.source["format"] == "ONNX"
    with torch.no_grad():
        wanted, got = net(x), model.module(x)
    gap = float((got - wanted).abs().max())
    assert gap <= 1e-4 * float(wanted.abs().max())
    one_by_one = np.concatenate([by_runtime(file, x[k : k + 1])[0] for k in range(5)])
    np.testing.assert_allclose(got.numpy(), one_by_one, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    if batch or name in ("lenet", "unet", "shuffle"):
        assert model.source["engine"] == "torch", model.source
    assert next(iter(model.signature.outputs.values())).shape == ("N", *wanted.shape[1:])
    model.save(tmp_path / "bundle")
    with torch.no_grad():
        torch.testing.assert_close(kd.load(tmp_path / "bundle").module(x), got, rtol=0, atol=0)


def test_an_imported_net_is_named_cut_frozen_and_trained(tmp_path: Path) -> None:
    file = exported(kd.load("lenet").module, torch.rand(1, 1, 28, 28), tmp_path / "net.onnx", batch=False)
    model = kd.load(file, labels=[str(k) for k in range(10)])
    assert "fc1_Gemm (Linear)" in str(model.summary())
    front = model.until("fc1_Gemm")
    assert next(iter(front.signature.outputs.values())).shape == ("N", 500)
    tuned = model.freeze("conv2_Conv").replace_layer("predictions_Gemm", nn.Linear(500, 4))
    optimizer = torch.optim.SGD(tuned.module.parameters(), 0.1)
    loss = nn.functional.cross_entropy(tuned.module.train()(torch.rand(4, 1, 28, 28)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert tuned.module.get_submodule("fc1_Gemm").weight.grad is not None


def test_pictures_are_prepared_as_the_caller_says_also_where_channels_come_last(make: Any, tmp_path: Path) -> None:
    weights = {"w": np.ones((2, 3, 1, 1), np.float32)}
    net = make(
        [
            ("Cast", ["x"], ["f"], {"to": 1}),
            ("Transpose", ["f"], ["t"], {"perm": [0, 3, 1, 2]}),
            ("Conv", ["t", "w"], ["y"]),
        ],
        {"x": ("uint8", ["N", 4, 4, 3])},
        {"y": ["N", 2, 4, 4]},
        weights,
    )
    file = tmp_path / "net.onnx"
    onnx.save(net, file)
    model = kd.load(file, image={"resize": "squash"})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    got = model.predict([pixels])[0]
    wanted = by_runtime(file, torch.from_numpy(pixels[None]))[0][0]
    np.testing.assert_allclose(np.asarray(next(iter(got.values()))).reshape(wanted.shape), wanted, rtol=1e-5)
    with pytest.raises(ConfigError, match="ImageStep"):
        kd.load(file, image={"colour": "BGR"})


def test_numbers_in_other_files_are_read_from_beside_the_model_only(make: Any, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    net = make([("Gemm", ["x", "w"], ["y"])], {"x": ["N", 64]}, {"y": ["N", 64]}, {"w": weight})
    file = tmp_path / "net.onnx"
    onnx.save(net, file, save_as_external_data=True, location="net.bin", size_threshold=0)
    assert (tmp_path / "net.bin").exists()
    model = kd.load(file)
    torch.testing.assert_close(model.module(torch.ones(1, 64))[0].detach(), torch.from_numpy(weight.sum(0)))
    (tmp_path / "outside.bin").write_bytes(weight.tobytes())
    inner = tmp_path / "inner"
    inner.mkdir()
    saved = onnx.load(file, load_external_data=False)
    for location in ("../outside.bin", str(tmp_path / "outside.bin"), "net.bin", ""):
        saved.graph.initializer[0].external_data[0].value = location
        (inner / "net.onnx").write_bytes(saved.SerializeToString())
        with pytest.raises(FormatError, match=r"outside the model's folder|not beside the model"):
            kd.load(inner / "net.onnx")
    (inner / "link.bin").symlink_to(tmp_path / "outside.bin")
    saved.graph.initializer[0].external_data[0].value = "link.bin"
    (inner / "net.onnx").write_bytes(saved.SerializeToString())
    with pytest.raises(FormatError, match="outside the model's folder"):
        kd.load(inner / "net.onnx")


def test_large_weights_are_read_from_where_they_are_in_the_file(make: Any, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(160, 160)).astype(np.float32)
    bias = np.arange(160, dtype=np.float32)
    net = make([("Gemm", ["x", "w", "b"], ["y"])], {"x": ["N", 160]}, {"y": ["N", 160]}, {"w": weight, "b": bias})
    file = tmp_path / "net.onnx"
    onnx.save(net, file)
    slim = open_file(file)
    assert len(slim.SerializeToString()) < 3000
    large, small = slim.graph.initializer
    assert (large.data_location, len(large.raw_data), len(small.raw_data)) == (1, 0, 640)
    x = torch.rand(3, 160)
    expected = x @ torch.from_numpy(weight) + torch.from_numpy(bias)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "other.onnx").symlink_to(file)  # its folder is not the file's
    for path in (file, tmp_path / "links" / "other.onnx"):
        for engine in ("torch", "onnxruntime"):
            torch.testing.assert_close(kd.load(path, engine=engine).module(x).detach(), expected, rtol=1e-5, atol=1e-5)
    model = kd.load(file)
    data = file.read_bytes()
    file.write_bytes(b"\0" * len(data))
    torch.testing.assert_close(model.module(x).detach(), expected, rtol=1e-5, atol=1e-5)
    for cut in (10, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"cut off, damaged or no|holds no ONNX graph|neither a bundle"):
            kd.load(file)


def test_what_torch_has_no_operator_for_is_run_by_onnxruntime_and_says_so(make: Any, tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("DeformConv", ["x", "w", "offset"], ["y"], kernel_shape=[2, 2], pads=[0, 0, 0, 0]),
    ]
    weights = {"w": np.ones((1, 1, 2, 2), np.float32), "offset": np.zeros((1, 8, 2, 2), np.float32)}
    net = make(nodes, {"x": [1, 1, 3, 3]}, {"y": [1, 1, 2, 2]}, weights, 19)
    file = tmp_path / "net.onnx"
    onnx.save(net, file)
    model = kd.load(file)
    assert model.source["engine"] == "onnxruntime"
    assert "DeformConv" in model.source["reason"]
    assert "(onnxruntime)" in str(model.summary())
    x = torch.rand(5, 1, 3, 3)
    wanted = nn.functional.conv2d(x, torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(model.module(x), wanted)
    model.save(tmp_path / "bundle")
    torch.testing.assert_close(kd.load(tmp_path / "bundle").module(x), wanted)
    with pytest.raises(FormatError, match="cannot be a torch module"):
        kd.load(file, engine="torch")
    with pytest.raises(ConfigError, match="engine"):
        kd.load(file, engine="tensorrt")


def test_batches_of_one_size_that_mix_rows_are_kept_as_they_are(make: Any, tmp_path: Path) -> None:
    """The mean over the batch is taken off: two rows at a time are what the file means, not five."""
    net = make(
        [("ReduceMean", ["x"], ["m"], {"axes": [0], "keepdims": 1}), ("Sub", ["x", "m"], ["y"])],
        {"x": [2, 3]},
        {"y": [2, 3]},
    )
    file = tmp_path / "net.onnx"
    onnx.save(net, file)
    model = kd.load(file)
    assert model.source["engine"] == "onnxruntime"
    assert "mixes rows" in model.source["reason"]
    x = torch.rand(4, 3)
    wanted = torch.cat([x[:2] - x[:2].mean(0), x[2:] - x[2:].mean(0)])
    torch.testing.assert_close(model.module(x), wanted)


def test_loops_and_branches_with_weights_inside_are_trained(make: Any) -> None:
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.full((2,), 2.0, np.float32), "w")
    body = helper.make_graph(
        [helper.make_node("Mul", ["state", "w"], ["next"]), helper.make_node("Identity", ["going"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("trip", 7, []),
            helper.make_tensor_value_info("going", 9, []),
            helper.make_tensor_value_info("state", 1, ["N", 2]),
        ],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("next", 1, ["N", 2])],
        [weight],
    )
    net = make(
        [helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)],
        {"x": ["N", 2], "n": ("int64", [])},
        {"y": ["N", 2]},
    )
    made = open_net(net)
    assert made.engine == "torch"
    x = torch.ones(3, 2)
    for rounds in (0, 3):
        assert made.module(x, torch.tensor(rounds)).flatten().tolist() == [2.0**rounds] * 6
    (trained,) = made.module.parameters()
    made.module(x, torch.tensor(3)).sum().backward()
    assert trained.grad is not None
    assert trained.grad.tolist() == [36.0, 36.0]  # 3 rows x d(w**3) = 3 x 3 x 4


def test_functions_of_the_file_are_written_out(make: Any) -> None:
    helper = onnx.helper
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [
            helper.make_node("Twice", ["x"], ["t"], domain="mine"),
            helper.make_node("Twice", ["t"], ["y"], domain="mine"),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 2])],
        [helper.make_tensor_value_info("y", 1, ["N", 2])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    net = helper.make_model(graph, functions=[function], opset_imports=imports)
    made = open_net(net)
    assert made.engine == "torch"
    assert made.module(torch.ones(1, 2)).tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_old_and_new_versions_of_operators(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardtanh(0, 6), nn.AvgPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(36, 3), nn.Softmax(1))
    file = exported(net, torch.rand(2, 3, 8, 8), tmp_path / "net.onnx", batch=True, opset=opset)
    model = kd.load(file)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), net(x))
    assert not [layer for layer in model.module.modules() if isinstance(layer, OnnxOp)]


def test_what_is_no_model_of_rows_is_refused_with_the_way_on(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    relu = [("Relu", ["x"], ["y"])]
    onnx.save(make(relu, {"x": ["N", 3, "H", "W"]}, {"y": None}), file)
    with pytest.raises(
        FormatError, match=r"does not say what shape a row of input 'x' has \(N, 3, H, W\).*input_shape"
    ):
        kd.load(file)
    assert kd.load(file, input_shape=(3, 8, 8)).signature.outputs["y"].shape == ("N", 3, 8, 8)
    assert kd.load(file, input_shape={"x": (3, 4, 5)}).signature.inputs["x"].shape == ("N", 3, 4, 5)
    with pytest.raises(ConfigError, match="names no input"):
        kd.load(file, input_shape={"z": (3,)})
    onnx.save(make([("ReduceSum", ["x"], ["y"], {"keepdims": 0})], {"x": ["N", 3]}, {"y": None}), file)
    with pytest.raises(FormatError, match=r"output 'y' does not give one entry for each row.*open_net"):
        kd.load(file)
    file.write_bytes(b"\x08\x08\x12\x00")
    with pytest.raises(FormatError, match="no ONNX graph"):
        kd.load(file)
    file.write_bytes(b"")
    with pytest.raises(FormatError):
        kd.load(file)


def test_operators_of_strangers_are_not_given_to_onnxruntime(make: Any) -> None:
    node = onnx.helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="/x")
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 2])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    with pytest.raises(FormatError, match=r"EPContext.*nobody that is known"):
        open_net(onnx.helper.make_model(graph, opset_imports=imports))


def test_without_the_package_the_error_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, make: Any, tmp_path: Path
) -> None:
    onnx.save(make([("Relu", ["x"], ["y"])], {"x": ["N", 3]}, {"y": ["N", 3]}), tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kindling-spark\[onnx\]'"):
        kd.load(tmp_path / "net.onnx")


def test_a_loop_that_does_not_end_is_stopped(make: Any) -> None:
    from kindling.nets.layers_onnx import MAX_TRIPS

    helper = onnx.helper
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Identity", ["state"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("trip", 7, []),
            helper.make_tensor_value_info("going", 9, []),
            helper.make_tensor_value_info("state", 1, [2]),
        ],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("next", 1, [2])],
    )
    made = open_net(make([helper.make_node("Loop", ["", "", "x"], ["y"], body=body)], {"x": [2]}, {"y": [2]}))
    mark = MAX_TRIPS.set(100)
    try:
        with pytest.raises(ModelError, match="has not ended after 100 rounds"):
            made.module(torch.ones(2))
    finally:
        MAX_TRIPS.reset(mark)
