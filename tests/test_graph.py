"""Graphs as JSON: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import copy
import json
import operator
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kindling import graph
from kindling.errors import FormatError, KindlingError, ModelError

FUZZ = int(os.environ.get("KINDLING_FUZZ", "1"))
"""How many times as many random inputs as usual; set by `make test-all`."""


def there_and_back(module: nn.Module) -> fx.GraphModule:
    """Through JSON text and back, with the original's tensors put in."""
    whole = module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)
    again = graph.from_json(json.loads(json.dumps(graph.to_json(whole), allow_nan=False)))
    assert all(tensor.is_meta for tensor in graph.named_tensors(again).values())
    graph.assign_tensors(again, {name: t.clone() for name, t in graph.named_tensors(whole).items()})
    return again


def assert_same(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    module.eval()
    again = there_and_back(module).eval()
    expected, found = module(*inputs), again(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return again


# --------------------------------------------------------------------------------------------------------- layers

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, groups=2, bias=False, padding_mode="reflect"),
    lambda: nn.Conv1d(4, 6, 3, padding="same"),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
    lambda: nn.Linear(4, 6, bias=False),
    lambda: nn.Bilinear(3, 4, 5, bias=False),
    lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
    lambda: nn.BatchNorm1d(4, momentum=0.3, track_running_stats=False),
    lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(2, 4, eps=1e-3),
    lambda: nn.GroupNorm(2, 4, affine=False),
    lambda: nn.LayerNorm((4, 5), eps=1e-3, bias=False),
    lambda: nn.LayerNorm(4, elementwise_affine=False),
    lambda: nn.RMSNorm(4, eps=1e-4),
    lambda: nn.LocalResponseNorm(5, alpha=1e-3, beta=0.7, k=2.0),
    lambda: nn.CrossMapLRN2d(5, alpha=1e-3, beta=0.7, k=2),
    lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True),
    lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False, divisor_override=7),
    lambda: nn.AvgPool1d(3, 2),
    lambda: nn.LPPool2d(2, (3, 2), ceil_mode=True),
    lambda: nn.AdaptiveAvgPool2d((None, 7)),
    lambda: nn.AdaptiveMaxPool1d(3, return_indices=True),
    lambda: nn.Flatten(2, -2),
    lambda: nn.Unflatten(1, (2, 2)),
    lambda: nn.Dropout(0.3, inplace=True),
    lambda: nn.Dropout2d(0.1),
    lambda: nn.AlphaDropout(0.2),
    lambda: nn.Identity(),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(),
    lambda: nn.Hardtanh(-2.0, 3.0),
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.PReLU(4),
    lambda: nn.RReLU(0.1, 0.4),
    lambda: nn.ELU(0.5),
    lambda: nn.CELU(0.5),
    lambda: nn.GELU(approximate="tanh"),
    lambda: nn.GLU(1),
    lambda: nn.Softmax(dim=None),
    lambda: nn.LogSoftmax(1),
    lambda: nn.Softplus(2, 10),
    lambda: nn.Softshrink(0.3),
    lambda: nn.Threshold(0.1, float("inf")),
    lambda: nn.SiLU(),
    lambda: nn.Embedding(10, 4, padding_idx=2, max_norm=1.0, sparse=True),
    lambda: nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True),
    lambda: nn.LSTM(4, 5, num_layers=2, bias=False, batch_first=True, bidirectional=True, proj_size=3),
    lambda: nn.GRU(4, 5, 2, dropout=0.1),
    lambda: nn.RNN(4, 5, nonlinearity="relu"),
    lambda: nn.LSTMCell(4, 5, bias=False),
    lambda: nn.GRUCell(4, 5),
    lambda: nn.RNNCell(4, 5, nonlinearity="relu"),
    lambda: nn.MultiheadAttention(8, 2, dropout=0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, vdim=5),
    lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, "gelu", 1e-4, batch_first=True, norm_first=True, bias=False),
    lambda: nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True),
    lambda: nn.Upsample((7, 9)),
    lambda: nn.UpsamplingNearest2d(scale_factor=2),
    lambda: nn.UpsamplingBilinear2d((4, 4)),
    lambda: nn.ZeroPad2d((0, 1, 0, 1)),
    lambda: nn.ConstantPad1d(2, 0.5),
    lambda: nn.ReflectionPad2d(1),
    lambda: nn.CircularPad2d((1, 2, 0, 1)),
    lambda: nn.PixelShuffle(2),
    lambda: nn.PixelUnshuffle(2),
    lambda: nn.ChannelShuffle(2),
    lambda: nn.Fold((4, 5), (2, 2), 1, 0, 1),
    lambda: nn.Unfold(3, 1, 1, 2),
    lambda: nn.MaxUnpool2d(2),
    lambda: nn.CosineSimilarity(2, 1e-4),
    lambda: nn.PairwiseDistance(1.0, 1e-3, keepdim=True),
    lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
    lambda: nn.BatchNorm1d(3, dtype=torch.float64),
]


def one_layer(layer: nn.Module) -> fx.GraphModule:
    root, made = nn.Module(), fx.Graph()
    root.add_module("layer", layer)
    made.output(made.call_module("layer", (made.placeholder("x"),)))
    return fx.GraphModule(root, made)


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
def test_every_argument_of_a_layer_survives(make: Callable[[], nn.Module]) -> None:
    layer = make()
    again = there_and_back(one_layer(layer)).get_submodule("layer")
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    ignored = {"_parameters", "_buffers", "_modules", "training", "_flat_weights", "_flat_weight_refs"}
    for name, value in vars(layer).items():
        if name not in ignored:
            assert vars(again)[name] == value, name
    state, other = layer.state_dict(), again.state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", graph.LAYERS)
def test_every_listed_layer_is_known_by_its_arguments(name: str) -> None:
    assert graph._parameters(graph.LAYERS[name]) is not None
    assert graph._hints(graph.LAYERS[name]) is not None
    with pytest.raises(FormatError, match="has no argument 'evil'"):
        graph.build_layer(name, {"evil": 1})


# ----------------------------------------------------------------------------------------------------------- nets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x, inplace=True)


class Rich(nn.Module):
    """Functions, methods, slices, constants, parameters, buffers, shared and tied layers, nested paths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.twice = nn.Conv2d(3, 3, 1)
        self.alias = self.twice
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.fixed = nn.Parameter(torch.rand(1), requires_grad=False)
        self.register_buffer("shift", torch.rand(1, 3, 1, 1))
        self.register_buffer("passing", torch.rand(3, 1, 1), persistent=False)
        self.encode = nn.Linear(4, 6, bias=False)
        self.decode = nn.Linear(4, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.unused = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for block in self.blocks:
            x = block(x)
        y = self.alias(self.twice(x) * self.scale + self.shift - self.passing + self.fixed)
        z = torch.cat([y[:, 1:, ..., :-1], F.max_pool2d(y, 3, 1, 1)[:, :2, :, 1:]], dim=1).to(torch.float64)
        z = z.float().contiguous(memory_format=torch.channels_last)
        rows = z.mean((2, 3)).view(z.shape[0], -1).clamp(min=-1e9, max=float("inf"))
        return self.encode(rows), {"other": F.linear(self.decode(rows), self.encode.weight.t()).softmax(-1)}


def test_a_rich_net_computes_the_same() -> None:
    net = Rich()
    again = assert_same(net, torch.randn(2, 3, 5, 5))
    assert again.get_parameter("encode.weight") is again.get_parameter("decode.weight")
    assert not again.get_parameter("fixed").requires_grad
    assert again.get_parameter("scale").requires_grad
    assert not any(name.startswith("unused") for name in graph.named_tensors(again))
    whole = fx.symbolic_trace(net)
    assert [node.name for node in again.graph.nodes] == [node.name for node in whole.graph.nodes]
    assert graph.to_json(again) == graph.to_json(whole)


def test_one_layer_under_two_paths_stays_one() -> None:
    root, made = nn.Module(), fx.Graph()
    root.one = root.other = nn.Linear(2, 2)  # type: ignore[assignment]
    made.output(made.call_module("other", (made.call_module("one", (made.placeholder("x"),)),)))
    again = assert_same(fx.GraphModule(root, made), torch.randn(3, 2))
    assert again.get_submodule("one") is again.get_submodule("other")


def test_training_moves_tied_weights_together() -> None:
    again = there_and_back(Rich())
    before = again.get_parameter("decode.weight").detach().clone()
    optimizer = torch.optim.SGD(again.parameters(), lr=1.0)
    again(torch.randn(2, 3, 5, 5))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(again.get_parameter("decode.weight"), before)
    assert again.get_parameter("decode.weight") is again.get_parameter("encode.weight")


def test_notes_travel_with_the_graph() -> None:
    whole = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    whole.meta[graph.NOTES] = {"aliases": {"a.b": "_0"}, "merged": {"_1": "_0"}}
    again = graph.from_json(graph.to_json(whole))
    assert again.meta[graph.NOTES] == whole.meta[graph.NOTES]


def test_recurrent_and_attention_layers_compute_the_same() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.lstm = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)
            self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
            self.encode = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, words: Tensor) -> Tensor:
            x, _state = self.lstm(self.embed(words))
            y, _weights = self.attend(x, x, x, need_weights=False)
            return self.encode(x + y).mean(1)

    assert_same(Net(), torch.randint(0, 10, (3, 5)))


def test_what_surgery_traces_is_stored_too() -> None:
    surgery = pytest.importorskip("kindling.surgery")
    net = Rich().eval()
    data = graph.to_json(net)
    again = graph.from_json(data)
    graph.assign_tensors(again, graph.named_tensors(surgery.trace(net)))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(again.eval()(x), net(x), rtol=0, atol=0)


def test_node_names_of_many_shapes_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(2, 2)
            self.max = nn.ReLU()

        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return torch.max(self.max(self.output(input)), type) + 1 + 2

    net = fx.symbolic_trace(Net())
    again = graph.from_json(graph.to_json(net))
    assert [node.name for node in again.graph.nodes] == [node.name for node in net.graph.nodes]
    assert_same(net, torch.randn(3, 2), torch.randn(3, 2))


# ------------------------------------------------------------------------------------------- what cannot be stored


class MyReLU(nn.ReLU):
    pass


def test_a_layer_that_is_on_no_list_is_named() -> None:
    with pytest.raises(ModelError, match=r"layer 'layer' is a .*MyReLU, which a graph cannot hold.*'ReLU'"):
        graph.to_json(one_layer(MyReLU()))


def test_changed_layers_are_refused() -> None:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.rand(5, 3))
    with pytest.raises(
        ModelError, match=r"tensor 'layer.weight' is .*\(5, 3\), but its layer's arguments make it .*\(4, 3\)"
    ):
        graph.to_json(one_layer(layer))
    layer = nn.Linear(3, 4)
    layer.register_buffer("mask", torch.ones(4))
    with pytest.raises(ModelError, match="has tensors of its own"):
        graph.to_json(one_layer(layer))
    layer = nn.Linear(3, 4)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="has hooks"):
        graph.to_json(one_layer(layer))
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="forward replaced"):
        graph.to_json(one_layer(layer))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    with pytest.raises(ModelError, match="cannot hold"):
        graph.to_json(one_layer(normed))
    mixed = nn.Linear(3, 4)
    mixed.bias = nn.Parameter(mixed.bias.detach().double())
    with pytest.raises(ModelError, match="mixes"):
        graph.to_json(one_layer(mixed))


CALLS: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "calls torch.serialization.save": lambda made, x: made.call_function(torch.save, (x, "f")),
    "calls .*<lambda>": lambda made, x: made.call_function(lambda y: y, (x,)),
    "tensor method 'apply_'": lambda made, x: made.call_method("apply_", (x, "f")),
    "reads attribute .*__class__": lambda made, x: made.call_function(getattr, (x, "__class__")),
    "reads attribute .*data": lambda made, x: made.call_function(getattr, (x, "data")),
    "has argument .*set": lambda made, x: made.call_function(torch.add, (x, {1})),
    "has argument .*cuda": lambda made, x: made.call_method("to", (x, torch.device("cuda"))),
    "does not have": lambda made, x: made.get_attr("nothing"),
}


@pytest.mark.parametrize("match", CALLS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
def test_what_is_on_no_list_is_refused(match: str) -> None:
    root, made = nn.Module(), fx.Graph()
    root.nothing = torch.ones(1)
    made.output(CALLS[match](made, made.placeholder("x")))
    whole = fx.GraphModule(root, made)
    if match == "does not have":
        del whole.nothing
    with pytest.raises(ModelError, match=match):
        graph.to_json(whole)


def test_only_kindlings_own_layers_are_allowed() -> None:
    with pytest.raises(ModelError, match="not one of kindling's own layers"):
        graph.allow(MyReLU)


def test_own_layers_are_built_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Double(nn.Module):
        def __init__(self, times: int = 2) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: Tensor) -> Tensor:
            return x * self.times

    monkeypatch.setattr(graph, "_OWN", {})
    Double.__module__ = "kindling.nets.vision"
    assert graph.allow(Double) is Double
    assert graph.is_own_layer(Double())
    again = there_and_back(one_layer(Double(3)))
    assert again(torch.ones(1)).item() == 3
    with pytest.raises(FormatError, match="does not fit"):
        graph.build_layer("kindling.Double", {"times": "3"})


def test_foreign_layers_go_through_their_own_door() -> None:
    whole = one_layer(MyReLU())
    data = graph.to_json(whole, foreign=lambda path, layer: {"name": type(layer).__name__})
    assert data["layers"] == [{"path": "layer", "foreign": {"name": "MyReLU"}}]
    with pytest.raises(FormatError, match="not on kindling's list"):
        graph.from_json(data)
    again = graph.from_json(data, foreign=lambda path, body: MyReLU())
    assert again(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


# ------------------------------------------------------------------------------------------------- hostile graphs

GOOD = json.loads(json.dumps(graph.to_json(fx.symbolic_trace(Rich()))))


def altered(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    change(data)
    return data


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["op"] == op)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda d: d.update(format=2),
    "unknown key": lambda d: d.update(code="import os"),
    "missing key": lambda d: d.pop("nodes"),
    "no nodes": lambda d: d.update(nodes=[]),
    "no layers": lambda d: d.update(layers=[]),
    "layer type": lambda d: d["layers"][0].update(type="DataParallel"),
    "layer of another package": lambda d: d["layers"][0].update(type="os.system"),
    "own layer that is none": lambda d: d["layers"][0].update(type="kindling.Model"),
    "layer type is a list": lambda d: d["layers"][0].update(type=["Conv2d"]),
    "unknown argument": lambda d: d["layers"][0]["args"].update(device="cuda"),
    "text for a number": lambda d: d["layers"][0]["args"].update(in_channels="3"),
    "bool for a number": lambda d: d["layers"][0]["args"].update(in_channels=True),
    "number for a bool": lambda d: d["layers"][0]["args"].update(bias=1),
    "negative size": lambda d: d["layers"][0]["args"].update(in_channels=-3),
    "huge size": lambda d: d["layers"][0]["args"].update(in_channels=2**62, out_channels=2**62),
    "beyond int": lambda d: d["layers"][0]["args"].update(in_channels=10**400),
    "huge shape": lambda d: d["layers"][0]["args"].update(kernel_size=[3] * 100_000),
    "nested shape": lambda d: d["layers"][0]["args"].update(kernel_size=[[[[[3]]]]]),
    "layer dtype": lambda d: d["layers"][0].update(dtype="int64"),
    "path up": lambda d: d["layers"][0].update(path="../conv"),
    "path dots": lambda d: d["layers"][0].update(path="a..b"),
    "path empty": lambda d: d["layers"][0].update(path=""),
    "path of torch": lambda d: d["layers"][0].update(path="forward"),
    "path of fx": lambda d: d["layers"][0].update(path="recompile"),
    "path of a class": lambda d: d["layers"][0].update(path="__class__"),
    "path inside": lambda d: d["layers"].append({"path": "twice.inner", "type": "ReLU", "args": {}}),
    "path twice": lambda d: d["layers"].append(d["layers"][0]),
    "path deep": lambda d: d["layers"][0].update(path=".".join("a" * 100)),
    "unused layer": lambda d: d["layers"].append({"path": "more", "type": "ReLU", "args": {}}),
    "shared with nothing": lambda d: d["shared"].update(alias="nothing"),
    "shared is a list": lambda d: d.update(shared=[]),
    "tensor huge": lambda d: d["tensors"][0].update(shape=[2**53, 2**53]),
    "tensor negative": lambda d: d["tensors"][0].update(shape=[-1]),
    "tensor of text": lambda d: d["tensors"][0].update(shape=["3"]),
    "tensor dtype": lambda d: d["tensors"][0].update(dtype="object"),
    "tensor kind": lambda d: d["tensors"][0].update(kind="module"),
    "tensor in a layer": lambda d: d["tensors"][0].update(path="twice.weight"),
    "tensor of torch": lambda d: d["tensors"][0].update(path="_parameters"),
    "node name code": lambda d: d["nodes"][1].update(name="x\nimport os"),
    "node name keyword": lambda d: d["nodes"][1].update(name="class"),
    "node name self": lambda d: d["nodes"][1].update(name="self"),
    "node name torch": lambda d: d["nodes"][1].update(name="torch"),
    "node name dunder": lambda d: d["nodes"][1].update(name="__import__"),
    "node name builtin": lambda d: d["nodes"][1].update(name="print"),
    "node name twice": lambda d: d["nodes"][1].update(name="x"),
    "node op": lambda d: d["nodes"][1].update(op="call_anything"),
    "node op list": lambda d: d["nodes"][1].update(op=[]),
    "input target code": lambda d: node(d, "placeholder").update(target="x=__import__('os').system('true')"),
    "input target star": lambda d: node(d, "placeholder").update(target="*x"),
    "input default": lambda d: node(d, "placeholder").update(args=[1, 2]),
    "input builtin": lambda d: node(d, "placeholder").update(target="print"),
    "input torch": lambda d: node(d, "placeholder").update(target="torch"),
    "input hides a node": lambda d: node(d, "placeholder").update(target="cat"),
    "function os": lambda d: node(d, "call_function").update(target="os.system"),
    "function load": lambda d: node(d, "call_function").update(target="torch.load"),
    "function bare": lambda d: node(d, "call_function").update(target="eval"),
    "function attrgetter": lambda d: node(d, "call_function").update(target="operator.attrgetter"),
    "method": lambda d: node(d, "call_method").update(target="apply_"),
    "method dunder": lambda d: node(d, "call_method").update(target="__class__"),
    "module target": lambda d: node(d, "call_module").update(target="nothing"),
    "module target up": lambda d: node(d, "call_module").update(target=""),
    "attribute target": lambda d: node(d, "get_attr").update(target="__class__"),
    "attribute of a module": lambda d: node(d, "get_attr").update(target="twice"),
    "attribute inside": lambda d: node(d, "get_attr").update(target="twice.forward.__globals__"),
    "getattr": lambda d: node(d, "call_function").update(target="getattr", args=[{"node": "x"}, "__class__"]),
    "getattr of a constant": lambda d: node(d, "call_function").update(target="getattr", args=["x", "shape"]),
    "getattr default": lambda d: node(d, "call_function").update(target="getattr", args=[{"node": "x"}, "shape", 1]),
    "argument of a later node": lambda d: d["nodes"][1].update(args=[{"node": "output"}]),
    "argument kind": lambda d: d["nodes"][1].update(args=[{"module": "x"}]),
    "argument of two kinds": lambda d: d["nodes"][1].update(args=[{"node": "x", "tuple": []}]),
    "argument slice": lambda d: d["nodes"][1].update(args=[{"slice": [1, 2]}]),
    "argument dict key": lambda d: d["nodes"][1].update(args=[{"dict": [[[], 1]]}]),
    "argument device": lambda d: d["nodes"][1].update(args=[{"device": "cuda"}]),
    "argument text": lambda d: d["nodes"][1].update(args=["x" * 10_000]),
    "argument huge": lambda d: d["nodes"][1].update(args=[2**80]),
    "keyword code": lambda d: d["nodes"][1].update(kwargs={"x=1,y": 1}),
    "kwargs list": lambda d: d["nodes"][1].update(kwargs=[]),
    "output twice": lambda d: d["nodes"].append(d["nodes"][-1]),
    "no output": lambda d: d["nodes"].pop(),
    "tied to nothing": lambda d: d["tied"].update({"encode.weight": "nothing"}),
    "tied to itself": lambda d: d["tied"].update({"encode.weight": "encode.weight"}),
    "tied of other shapes": lambda d: d["tied"].update({"scale": "encode.weight"}),
    "fixed nothing": lambda d: d["fixed"].append("nothing"),
    "fixed buffer": lambda d: d["fixed"].append("shift"),
    "notes": lambda d: d["notes"].update(aliases={"a": 1}),
    "notes flat": lambda d: d["notes"].update(aliases="x"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_graphs_are_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    graph.from_json(GOOD)
    with pytest.raises(FormatError) as caught:
        graph.from_json(altered(change))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("data", [None, [], 3, "x", {}, {"format": 1}])
def test_what_is_no_graph_is_refused(data: object) -> None:
    with pytest.raises(FormatError):
        graph.from_json(data)


def test_constructors_that_loop_are_bounded() -> None:
    with pytest.raises(FormatError, match="num_layers"):
        graph.build_layer("LSTM", {"input_size": 1, "hidden_size": 1, "num_layers": 10**9})


def test_huge_layers_take_no_memory() -> None:
    layer = graph.build_layer("Linear", {"in_features": 10**9, "out_features": 10**9})
    assert layer.weight.is_meta


def test_deeply_nested_arguments_are_refused() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(FormatError, match="nested deeper"):
        graph.from_json(altered(lambda d: d["nodes"][1].update(args=[deep])))


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, part in inside for p in paths_in(part, (*path, key)))]


PATHS = paths_in(GOOD)[1:]
WORDS = ["x", "getattr", "__class__", "forward", "twice.weight", "Linear", "operator.add", "node", "float"]
KEYS = st.sampled_from(["node", "tuple", "path", "a"]) | st.text(max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WORDS)
junk = st.recursive(
    plain, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3), max_leaves=6
)


@pytest.mark.fuzz
@settings(max_examples=300 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), junk | st.just("DELETE")), min_size=1, max_size=3))
def test_any_change_gives_a_graph_or_a_format_error(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = copy.deepcopy(GOOD)
    for path, value in changes:
        try:
            *above, key = path
            holder = data
            for part in above:
                holder = holder[part]
            if value == "DELETE":
                del holder[key]  # type: ignore[arg-type]
            else:
                holder[key] = value
        except (KeyError, IndexError, TypeError):
            continue
    try:
        module = graph.from_json(data)
    except KindlingError:
        return
    assert all(tensor.is_meta for tensor in graph.named_tensors(module).values())
    allowed = {*graph.FUNCTIONS.values(), getattr}
    for made in module.graph.nodes:
        assert made.op != "call_function" or made.target in allowed
        assert made.op != "call_method" or made.target in graph.METHODS


def test_no_listed_function_is_dangerous() -> None:
    """The lists hold no name that reads or writes files, runs callables, or reaches Python's insides."""
    forbidden = (
        "load",
        "save",
        "apply",
        "map_",
        "hook",
        "file",
        "numpy",
        "data_ptr",
        "storage",
        "share",
        "compile",
        "eval",
    )
    for name in (*graph.FUNCTIONS, *graph.METHODS, *graph.ATTRIBUTES):
        bare = name.rpartition(".")[2]
        assert not bare.startswith("__"), name
        assert not any(word in bare for word in forbidden), name
    assert operator.attrgetter not in graph.FUNCTIONS.values()
    assert operator.methodcaller not in graph.FUNCTIONS.values()


def test_every_name_on_the_lists_exists_in_this_torch() -> None:
    assert {name for name in graph._LAYERS if name not in graph.LAYERS} == set()
    missing = {n for n in graph._TORCH if f"torch.{n}" not in graph.FUNCTIONS}
    missing |= {n for n in graph._FUNCTIONAL if f"functional.{n}" not in graph.FUNCTIONS}
    missing |= {n for n in graph._OPERATORS if f"operator.{n}" not in graph.FUNCTIONS}
    assert missing == set()
    assert {name for name in graph.METHODS | graph.ATTRIBUTES if not hasattr(Tensor, name)} == set()


def test_sequential_with_named_layers_keeps_its_names() -> None:
    net = nn.Sequential(OrderedDict(conv1=nn.Conv2d(1, 2, 3), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(18, 4)))
    again = assert_same(net, torch.randn(2, 1, 5, 5))
    assert list(again.state_dict()) == list(net.state_dict())
