"""Traces compute what the module computes, in both modes, under names that last."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import cloudpickle
import pytest
import surgery_zoo as zoo
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kindling import surgery
from kindling.errors import ModelError
from kindling.signature import Signature

TRACEABLE = [name for name in zoo.ALL if name != "routed"]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def traced(name: str) -> tuple[nn.Module, Signature, surgery.Net]:
    make, signature = zoo.ALL[name]
    module = zoo.warmed(make)
    net = surgery.trace(module, len(signature.inputs))
    assert isinstance(net, surgery.Net)
    return module, signature, net


@pytest.mark.parametrize("name", TRACEABLE)
def test_a_trace_computes_what_the_module_computes(name: str) -> None:
    module, signature, net = traced(name)
    for seed in range(2):
        inputs = zoo.batch(signature, seed=seed)
        expected, found = signature.call(module, inputs), signature.call(net, inputs)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", ["residual", "fire", "own"])
def test_a_trace_trains_like_the_module(name: str) -> None:
    module, signature, net = traced(name)
    net = copy.deepcopy(net)  # the trace shares batch statistics with the module
    inputs = zoo.batch(signature)
    results = []
    for one in (module.train(), net.train()):
        torch.manual_seed(5)
        out = signature.call(one, inputs)
        sum(value.sum() for value in out.values()).backward()
        results.append((out, {n: p.grad for n, p in one.named_parameters() if p.grad is not None}, state(one)))
    (out, grads, after), (out2, grads2, after2) = results
    assert grads.keys() == grads2.keys()
    for key, value in {**out, **grads}.items():
        torch.testing.assert_close({**out2, **grads2}[key], value)
    for key, value in after2.items():
        torch.testing.assert_close(value, after[key])


def test_functional_dropout_becomes_a_layer() -> None:
    _, signature, net = traced("residual")
    assert isinstance(net.get_submodule("dropout"), nn.Dropout)
    assert [row.kind for row in surgery.layers(net, signature)].count("Dropout") == 1
    assert net.train().dropout.training
    assert not net.eval().dropout.training


class Routes(nn.Module):
    """Differs between training and inference by more than dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + 1 if self.training else self.fc(x)


def test_what_differs_between_training_and_inference_is_not_traced() -> None:
    assert surgery.trace(Routes()) is None
    outer = surgery.trace(nn.Sequential(nn.Linear(2, 2), Routes()))  # but stays whole inside what can be
    assert outer is not None
    assert [str(n.target) for n in outer.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = torch.ones(1, 2)
    assert not torch.equal(outer.train()(x), outer.eval()(x))


def test_data_dependent_control_flow_is_not_traced() -> None:
    assert surgery.trace(zoo.Routed()) is None


class Sneaky(nn.Module):
    """Statements that write in place and whose results nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        before = y * 2
        F.relu_(y)
        z = self.b(y)
        self.act(z)
        z.add_(1)
        return before + y + z


class Aliased(nn.Module):
    """Writes through a view of a tensor that is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.view(-1).relu_()
        return y


@pytest.mark.parametrize("make", [Sneaky, Aliased])
def test_writing_in_place_keeps_its_effect(make: Any) -> None:
    torch.manual_seed(0)
    module = make().eval()
    x = torch.randn(5, 4)
    signature = zoo.signature({"x": zoo.spec(4)}, out=zoo.spec(4))
    net = surgery.trace(module)
    if make is Aliased:
        assert net is None  # readers that cannot be seen: rather not at all
        cut, _ = surgery.until(module, ["a"], signature)
        assert torch.equal(cut(x), module.a(x))
    else:
        assert net is not None
        assert torch.equal(net(x), module(x))
        cut, _ = surgery.until(module, ["a", "b", "mul"], signature)
        a, b, mul = cut(x)
        torch.testing.assert_close(a, module.a(x))  # read before the activation too: a layer without it
        torch.testing.assert_close(b, module.b(a.relu()).relu())
        torch.testing.assert_close(mul, module.a(x) * 2)


def test_default_arguments_keep_their_values() -> None:
    module, _, net = traced("siamese")
    assert [n.op for n in net.graph.nodes].count("placeholder") == 2
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])
    three = surgery.trace(module, 3)
    assert three is not None
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    torch.testing.assert_close(three(a, b, mask), module(a, b, mask))


def test_names_of_layers_and_functions_never_meet() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = nn.Linear(2, 2)
            self.cat_1 = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y = torch.cat([y, y], 1)
            y = torch.cat([self.cat_1(y), self.add(x)], 1)
            return y + 1

    module = Clash()
    signature = zoo.signature({"x": zoo.spec(2)}, out=zoo.spec(4))
    rows = surgery.layers(module, signature)
    assert len({row.name for row in rows}) == len(rows) == 7
    assert {row.name: row.kind for row in rows}["add"] == "Linear"
    assert {row.name: row.kind for row in rows}["cat_1"] == "Linear"


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "cloudpickle", "retrace"])
@pytest.mark.parametrize("name", TRACEABLE)
def test_names_last(name: str, trip: str) -> None:
    _, signature, net = traced(name)
    # A cut makes the first function of its kind the second in the source, so that tracing again would rename it.
    names = [row.name for row in surgery.layers(net, signature)]
    last = [row.name for row in surgery.layers(net, signature) if row.output_shape is not None][-1]
    cut, cut_signature = surgery.until(net, [last], signature)
    before = [n.name for n in cut.graph.nodes]
    again = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "cloudpickle": lambda m: cloudpickle.loads(cloudpickle.dumps(m)),
        "retrace": surgery.trace,
    }[trip](cut)
    assert [n.name for n in again.graph.nodes] == before
    assert again.notes == cut.notes
    assert set(names) >= {row.name for row in surgery.layers(again, cut_signature)}
    inputs = zoo.batch(cut_signature)
    torch.testing.assert_close(cut_signature.call(again, inputs), cut_signature.call(cut, inputs))


def test_functions_keep_names_that_tracing_again_would_change() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x + 1, x + 2, x + 3

    signature = zoo.signature({"x": zoo.spec(2)}, a=zoo.spec(2), b=zoo.spec(2), c=zoo.spec(2))
    cut, cut_signature = surgery.until(Three(), ["add_2"], signature)
    for made in (cut, copy.deepcopy(cut), cloudpickle.loads(cloudpickle.dumps(cut))):
        assert [row.name for row in surgery.layers(made, cut_signature)] == ["x", "add_2"]
        assert torch.equal(made(torch.zeros(1, 2)), torch.full((1, 2), 3.0))


def test_nets_travel_without_memory() -> None:
    cut, signature = surgery.until(zoo.vgg16(), ["fc1"], zoo.VGG16)
    data = cloudpickle.dumps(cut)
    assert len(data) < 100_000
    again = cloudpickle.loads(data)
    assert {t.device.type for t in again.state_dict().values()} == {"meta"}
    assert [row.name for row in surgery.layers(again, signature)] == [r.name for r in surgery.layers(cut, signature)]


def test_foreign_graph_modules_are_taken_as_they_are() -> None:
    module = zoo.warmed(zoo.Fire)
    plain = fx.symbolic_trace(module)
    net = surgery.trace(plain)
    assert [n.name for n in net.graph.nodes] == [n.name for n in plain.graph.nodes]
    assert surgery.until(plain, ["squeeze"], zoo.FIRE)[1].outputs["squeeze"].shape == ("N", 4, 8, 8)


def test_a_trace_shares_memory_but_nothing_else() -> None:
    module, _, net = traced("residual")
    assert net.stem.weight.data_ptr() == module.stem.weight.data_ptr()
    assert net.stem is not module.stem
    surgery.set_training(net, frozenset({"stem"}))
    net.to(torch.bfloat16)
    assert module.stem.weight.requires_grad
    assert module.stem.weight.dtype == torch.float32
    assert not module.training


def test_modules_without_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'0.weight' has no shape yet .* Run one batch"):
        surgery.trace(nn.Sequential(nn.LazyLinear(3)))


def test_threads_trace_and_run_modules_at_the_same_time() -> None:
    """fx changes what calling any module means while it traces: other threads, and later calls, do not notice."""
    call, get = nn.Module.__call__, nn.Module.__getattr__
    shared = nn.Linear(4, 4)
    runs = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 3))
    x = torch.rand(2, 4)
    expected = runs(x)
    deep = nn.Sequential(*(nn.Tanh() for _ in range(30)), shared)
    over = threading.Event()
    wrong: list[object] = []

    def run() -> None:
        while not over.is_set():
            try:
                if not torch.equal(runs(x), expected):
                    wrong.append("another result")
            except Exception as error:
                wrong.append(error)

    def follow() -> None:
        for _ in range(8):
            net = surgery.trace(deep, 1)
            if net is None or sum(node.op == "call_module" for node in net.graph.nodes) != 31:
                wrong.append(net)

    runner = threading.Thread(target=run)
    tracers = [threading.Thread(target=follow) for _ in range(2)]
    for thread in [runner, *tracers]:
        thread.start()
    for thread in tracers:
        thread.join()
    over.set()
    runner.join()
    assert not wrong
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is get
