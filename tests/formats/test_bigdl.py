"""BigDL models: the two real ones, and generated ones of every layer against torch and numpy.

The generator fills messages of bigdl.proto (the fields that are read), built here with the protobuf library, as
ModuleSerializable.scala and Graph.scala of BigDL 2 fill them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kindling import Model, graph, surgery
from kindling.errors import ConfigError, FormatError
from kindling.formats import bigdl, models
from kindling.formats.models import Imported

pb = pytest.importorskip("google.protobuf.descriptor_pb2")


def _messages() -> Any:
    """The classes of bigdl.proto by name, without the fields that nobody here needs."""
    from google.protobuf import descriptor_pool, message_factory

    kinds = {"string": 9, "int32": 5, "int64": 3, "float": 2, "double": 1, "bool": 8}
    schema = {
        "Storage": "datatype int32 1, float_data float* 2, double_data double* 3, id int32 9",
        "Tensor": "datatype int32 1, size int32* 2, stride int32* 3, offset int32 4, dimension int32 5,"
        " nElements int32 6, isScalar bool 7, storage Storage 8, id int32 9, tensorType int32 10",
        "Shape": "shapeType int32 1, ssize int32 2, shapeValue int32* 3",
        "ArrayValue": "size int32 1, datatype int32 2, i32 int32* 3, str string* 7",
        "AttrEntry": "key string 1, value Attr 2",
        "NameAttrList": "name string 1, attr AttrEntry* 2",
        "Attr": "dataType int32 1, int32Value int32 3, int64Value int64 4, floatValue float 5, doubleValue double 6,"
        " stringValue string 7, boolValue bool 8, tensorValue Tensor 10, nameAttrListValue NameAttrList 14,"
        " arrayValue ArrayValue 15, dataFormatValue int32 16, shape Shape 18",
        "Module": "name string 1, subModules Module* 2, weight Tensor 3, bias Tensor 4, preModules string* 5,"
        " nextModules string* 6, moduleType string 7, attr AttrEntry* 8, version string 9, train bool 10, id int32 12,"
        " inputShape Shape 13, hasParameters bool 15, parameters Tensor* 16",
    }
    file = pb.FileDescriptorProto(name="bigdl_test.proto", package="bigdl_test", syntax="proto2")
    for message, fields in schema.items():
        described = file.message_type.add(name=message)
        for field in fields.split(", "):
            name, kind, number = field.split()
            one = described.field.add(name=name, number=int(number), label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            one.type = kinds.get(kind, 11)
            if kind not in kinds:
                one.type_name = f".bigdl_test.{kind}"
            elif one.label == 3 and kind != "string":
                one.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"bigdl_test.{name}")) for name in schema}


M = _messages()
RNG = np.random.default_rng(0)
NN = "com.intel.analytics.bigdl.dllib.nn."


def rand(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


class Writer:
    """Modules whose tensors share one table of numbers, as a saved model has it."""

    def __init__(self) -> None:
        self.storages: list[Any] = []

    def tensor(self, values: np.ndarray) -> Any:
        """A tensor without its numbers; the whole goes into the table."""
        number = 100 + 2 * len(self.storages)
        strides = [math.prod(values.shape[k + 1 :]) for k in range(values.ndim)]
        whole = M["Tensor"](datatype=2, size=values.shape, stride=strides, offset=1, dimension=values.ndim, id=number)
        whole.nElements = values.size
        whole.storage.datatype, whole.storage.id = 2, number + 1
        bare = M["Tensor"]()
        bare.CopyFrom(whole)
        whole.storage.float_data.extend(values.ravel().tolist())
        self.storages.append(whole)
        return bare

    def module(self, kind: str, *subs: Any, name: str = "", weights: tuple[np.ndarray, ...] = (), old: bool = False,
               home: str = NN, before: tuple[str, ...] = (), **attributes: Any) -> Any:  # fmt: skip
        made = M["Module"](name=name, moduleType=home + kind, version="2.4.0", train=False)
        made.subModules.extend(subs)
        made.preModules.extend(before)
        if weights and old:  # until 0.5
            made.weight.CopyFrom(self.tensor(weights[0]))
            if len(weights) > 1:
                made.bias.CopyFrom(self.tensor(weights[1]))
        elif weights:
            made.hasParameters = True
            made.parameters.extend([self.tensor(each) for each in weights])
        for key, value in attributes.items():
            self.attribute(made, key, value)
        return made

    def attribute(self, module: Any, key: str, value: Any) -> None:
        entry = module.attr.add(key=key)
        if isinstance(value, bool):
            entry.value.dataType, entry.value.boolValue = 5, value
        elif isinstance(value, int):
            entry.value.dataType, entry.value.int32Value = 0, value
        elif isinstance(value, float):
            entry.value.dataType, entry.value.doubleValue = 3, value
        elif isinstance(value, np.ndarray):
            entry.value.dataType = 10
            entry.value.tensorValue.CopyFrom(self.tensor(value))
        elif isinstance(value, dict):
            entry.value.dataType = 14
            for name, index in value.items():
                inner = entry.value.nameAttrListValue.attr.add(key=name)
                inner.value.int32Value = index
        elif value and isinstance(value[0], str):
            entry.value.dataType = 15
            entry.value.arrayValue.str.extend(value)
        else:
            entry.value.dataType = 15
            entry.value.arrayValue.i32.extend(value)

    def graph(self, nodes: list[tuple[Any, dict[str, int]]], inputs: list[str], outputs: list[str]) -> Any:
        """Graph.doSerializeModule: modules name those before them; the edges stand in attributes of their own."""
        made = self.module("StaticGraph")
        for module, feeds in nodes:
            module.preModules.extend(feeds)
            made.subModules.append(module)
            self.attribute(made, f"{module.name}_edges", feeds)
        self.attribute(made, "inputNames", inputs)
        self.attribute(made, "outputNames", outputs)
        return made

    def save(self, root: Any, path: Path) -> Path:
        entry = root.attr.add(key="global_storage")
        entry.value.dataType = 14
        for whole in self.storages:
            one = entry.value.nameAttrListValue.attr.add(key=str(whole.id))
            one.value.dataType = 10
            one.value.tensorValue.CopyFrom(whole)
        path.write_bytes(root.SerializeToString())
        return path


def run(model: Imported, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.module(*map(torch.from_numpy, inputs)).numpy()


def check(model: Imported, expected: np.ndarray | torch.Tensor, *inputs: np.ndarray) -> None:
    """The net gives what is expected, and so does what a bundle makes of it."""
    found = run(model, *inputs)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-5, atol=2e-6)
    net = surgery.trace(model.module)
    assert net is not None
    again = graph.from_json(json.loads(json.dumps(graph.to_json(net))))
    graph.assign_tensors(again, graph.named_tensors(net))
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(*map(torch.from_numpy, inputs)).numpy(), found)


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


# ------------------------------------------------------------------------------------------------- real models


@pytest.mark.needs_data
def test_the_real_lenet_computes_what_its_weights_say(data_dir: Path) -> None:
    """Weights taken out by the protobuf library, the net written out by hand. The file holds an untrained net."""
    file = data_dir / "bigdl_models" / "bigdl_lenet.model"
    root = M["Module"].FromString(file.read_bytes())
    (table,) = [entry.value for entry in root.attr if entry.key == "global_storage"]
    numbers = {e.value.tensorValue.id: e.value.tensorValue for e in table.nameAttrListValue.attr}
    w = {
        (sub.name, which): t(np.array(numbers[one.id].storage.float_data, np.float32).reshape(list(one.size)))
        for sub in root.subModules
        for which, one in (("w", sub.weight), ("b", sub.bias))
        if sub.HasField("weight")
    }
    x = rand(4, 1, 28, 28)
    y = F.max_pool2d(torch.tanh(F.conv2d(t(x), w["conv1_5x5", "w"][0], w["conv1_5x5", "b"])), 2)
    y = F.max_pool2d(F.conv2d(torch.tanh(y), w["conv2_5x5", "w"][0], w["conv2_5x5", "b"]), 2)
    y = torch.tanh(F.linear(y.flatten(1), w["fc1", "w"], w["fc1", "b"]))
    expected = F.log_softmax(F.linear(y, w["fc2", "w"], w["fc2", "b"]), 1)
    found = bigdl.read(file)
    check(found, expected, x)
    assert found.signature.inputs["features"].shape == ("N", 1, 28, 28)
    model = Model(module=found.module, signature=found.signature, preparation=found.preparation)
    assert model.until("fc1").signature.outputs["fc1"].shape == ("N", 100)
    assert sum(p.numel() for p in found.module.parameters()) == 150 + 6 + 1800 + 12 + 19200 + 100 + 500 + 5


@pytest.mark.needs_data
def test_the_real_keras_style_model_is_a_dense_layer_over_the_last_axis(data_dir: Path) -> None:
    model = bigdl.read(data_dir / "bigdl_models" / "zoo_keras_small_seq.model")
    assert model.signature.inputs["features"].shape == ("N", 2, 3)
    assert [name for name, _ in model.module.named_children()] == ["dense1"]
    x = rand(5, 2, 3)
    dense = model.module.dense1
    check(model, x @ dense.weight.detach().numpy().T + dense.bias.detach().numpy(), x)


# ---------------------------------------------------------------------------------------------- generated models


@pytest.mark.parametrize("old", [False, True])
def test_a_convolutional_net_computes_its_formulas(tmp_path: Path, old: bool) -> None:
    w = Writer()
    k1, b1, k2 = rand(2, 3, 1, 3, 3), rand(6), rand(1, 4, 6, 3, 3)
    gamma, beta, mean, var, fc, fb = rand(4), rand(4), rand(4), rand(4) ** 2 + 0.1, rand(5, 16), rand(5)
    window = {"kernelW": 3, "kernelH": 3, "strideW": 2, "strideH": 2}
    root = w.module(
        "Sequential",
        w.module("SpatialConvolution", name="c1", weights=(k1, b1), old=old, nInputPlane=2, nOutputPlane=6, **window,
                 padW=-1, padH=-1, nGroup=2, withBias=True),
        w.module("SpatialCrossMapLRN", size=3, alpha=0.3, beta=0.75, k=1.5),
        w.module("ReLU", ip=True),
        w.module("SpatialConvolution", name="c2/x", weights=(k2,), old=old, nInputPlane=6, nOutputPlane=4,
                 kernelW=3, kernelH=3, padW=1, padH=1, withBias=False),
        w.module("SpatialBatchNormalization", weights=(gamma, beta), old=old, nOutput=4, eps=1e-3, momentum=0.1,
                 affine=True, runningMean=mean, runningVar=var),
        w.module("SpatialAveragePooling", kW=2, kH=2, dW=1, dH=1, padW=0, padH=0, ceilMode=False),
        w.module("SpatialMaxPooling", kW=2, kH=2, dW=2, dH=2, padW=0, padH=0, ceil_mode=True),
        w.module("Dropout", initP=0.4),
        w.module("Reshape", size=[16], batchMode=0),
        w.module("Linear", name="fc", weights=(fc, fb), old=old, inputSize=16, outputSize=5, withBias=True),
        w.module("LogSoftMax"),
    )  # fmt: skip
    x = rand(3, 2, 8, 8)
    y = F.conv2d(F.pad(t(x), (0, 1, 0, 1)), t(k1.reshape(6, 1, 3, 3)), t(b1), stride=2, groups=2)
    total = sum(F.pad(y**2, (0, 0, 0, 0, 1, 1))[:, k : k + 6] for k in range(3))
    y = torch.relu(y / (1.5 + 0.3 / 3 * total) ** 0.75)
    y = F.conv2d(y, t(k2[0]), padding=1)
    each = (slice(None), None, None)
    y = (y - t(mean)[each]) / torch.sqrt(t(var)[each] + 1e-3) * t(gamma)[each] + t(beta)[each]
    y = (y[:, :, :-1, :-1] + y[:, :, 1:, :-1] + y[:, :, :-1, 1:] + y[:, :, 1:, 1:]) / 4
    y = F.max_pool2d(F.pad(y, (0, 1, 0, 1), value=-math.inf), 2)
    path = w.save(root, tmp_path / "net.model")
    model = bigdl.read(path, input_shape=(2, 8, 8), labels=list("abcde"))
    check(model, F.log_softmax(y.flatten(1) @ t(fc).T + t(fb), 1), x)
    assert model.labels == tuple("abcde")
    assert "c2_x" in dict(model.module.named_modules())
    assert model.module.dropout1.p == 0.4
    with pytest.raises(FormatError, match=r"does not say what shape.*SpatialConvolution.*input_shape=\(3, 224, 224\)"):
        bigdl.read(path)
    with pytest.raises(ConfigError, match="do not fit scores"):
        bigdl.read(path, input_shape=(2, 8, 8), labels=["a"])


def test_a_graph_joins_adds_and_picks(tmp_path: Path) -> None:
    w = Writer()
    a, b = (rand(4, 3), rand(4)), (rand(4, 3), rand(4))

    def linear(name: str, weights: tuple[np.ndarray, np.ndarray]) -> Any:
        return w.module("Linear", name=name, weights=weights, inputSize=3, outputSize=4, withBias=True)

    both = w.module("ConcatTable", w.module("Tanh"), w.module("Sigmoid"), name="both")
    root = w.graph(
        [
            (linear("left", a), {}),
            (linear("right", b), {}),
            (w.module("CSubTable", name="gap"), {"left": -1, "right": -1}),
            (both, {"gap": -1}),
            (w.module("MulConstant", name="twice", constant=2.0), {"both": 2}),
            (w.module("JoinTable", name="all", dimension=2, nInputDims=2), {"left": -1, "twice": -1}),
            (w.module("JoinTable", name="end", dimension=1, nInputDims=1), {"all": -1, "right": -1}),
        ],
        ["left", "right"],
        ["end"],
    )
    model = bigdl.read(w.save(root, tmp_path / "g.model"))
    x, y = rand(5, 3), rand(5, 3)
    left, right = x @ a[0].T + a[1], y @ b[0].T + b[1]
    twice = 2 / (1 + np.exp(-(left - right)))
    check(model, np.concatenate([left, twice, right], 1), x, y)
    assert list(model.signature.inputs) == ["features_0", "features_1"]


def test_tables_and_axes(tmp_path: Path) -> None:
    x = rand(2, 3, 4)
    w = Writer()
    parts = w.module(
        "ConcatTable", w.module("Identity"), w.module("Abs"), w.module("Power", power=2.0, scale=3.0, shift=1.0)
    )
    for tail, expected in (
        ((w.module("CAddTable"),), x + abs(x) + (3 * x + 1) ** 2),
        ((w.module("CMulTable"),), x * abs(x) * (3 * x + 1) ** 2),
        ((w.module("CMaxTable"),), np.maximum(np.maximum(x, abs(x)), (3 * x + 1) ** 2)),
        ((w.module("SelectTable", index=-2), w.module("Select", dimension=2, index=-1)), abs(x)[:, -1]),
        ((w.module("SelectTable", index=1), w.module("Narrow", dimension=3, offset=2, length=2)), x[:, :, 1:3]),
        ((w.module("SelectTable", index=1), w.module("Transpose", size=1, permutation_0=[2, 3])), x.transpose(0, 2, 1)),
        ((w.module("ParallelTable", w.module("Tanh"), w.module("Exp"), w.module("ReLU")), w.module("CAddTable")),
         np.tanh(x) + np.exp(abs(x)) + (3 * x + 1) ** 2),
        ((w.module("JoinTable", dimension=-1, nInputDims=0),), np.concatenate([x, abs(x), (3 * x + 1) ** 2], 2)),
    ):  # fmt: skip
        writer = Writer()
        root = writer.module("Sequential", parts, *tail)
        check(bigdl.read(writer.save(root, tmp_path / "t.model"), input_shape=(3, 4)), expected, x)
    concat = w.module("Concat", w.module("Tanh"), w.module("Square"), dimension=2)
    check(
        bigdl.read(w.save(concat, tmp_path / "c.model"), input_shape=(3, 4)), np.concatenate([np.tanh(x), x**2], 1), x
    )


ELEMENTS: dict[str, tuple[dict[str, Any], Any]] = {
    "ReLU6": ({}, lambda x: np.clip(x, 0, 6)),
    "SoftSign": ({}, lambda x: x / (1 + abs(x))),
    "SoftPlus": ({"beta": 2.0}, lambda x: np.log1p(np.exp(2 * x)) / 2),
    "ELU": ({"alpha": 0.5}, lambda x: np.where(x > 0, x, 0.5 * (np.exp(x) - 1))),
    "LeakyReLU": ({"negval": 0.2}, lambda x: np.where(x > 0, x, 0.2 * x)),
    "Threshold": ({"th": 0.5, "v": -1.0}, lambda x: np.where(x > 0.5, x, -1)),
    "HardTanh": ({"minValue": -0.5, "maxValue": 2.0}, lambda x: np.clip(x, -0.5, 2)),
    "LogSigmoid": ({}, lambda x: -np.log1p(np.exp(-x))),
    "SoftMax": ({}, lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
    "AddConstant": ({"constant_scalar": 1.5}, lambda x: x + 1.5),
}


@pytest.mark.parametrize("kind", ELEMENTS)
def test_elementwise_layers(tmp_path: Path, kind: str) -> None:
    attributes, formula = ELEMENTS[kind]
    w = Writer()
    x = rand(6, 4) * 3
    path = w.save(w.module(kind, **attributes), tmp_path / "e.model")
    check(bigdl.read(path, input_shape=(4,)), formula(x), x)


def test_tables_of_words_count_from_one(tmp_path: Path) -> None:
    w = Writer()
    table = rand(5, 3)
    root = w.module(
        "LookupTable", weights=(table,), nIndex=5, nOutput=3, paddingValue=0.0, maxNorm=1.7976931348623157e308
    )
    model = bigdl.read(w.save(root, tmp_path / "w.model"), input_shape=(2,))
    index = np.array([[1, 5], [3, 3]])
    check(model, table[index - 1], index)
    assert model.signature.inputs["features"].dtype == "int64"


def test_other_layers(tmp_path: Path) -> None:
    x, slope, k, b = rand(2, 3, 6, 6), rand(3), rand(4, 3, 2, 2), rand(4)
    w = Writer()
    root = w.module(
        "Sequential",
        w.module("PReLU", weights=(slope,), nOutputPlane=3),
        w.module("SpatialZeroPadding", padLeft=1, padRight=0, padTop=2, padBottom=0),
        w.module("SpatialDilatedConvolution", weights=(k, b), nInputPlane=3, nOutputPlane=4, kW=2, kH=2, dilationW=2,
                 dilationH=2),
        w.module("SpatialAveragePooling", kW=1, kH=1, globalPooling=True),
        w.module("InferReshape", size=[0, -1], batchMode=False),
    )  # fmt: skip
    y = torch.where(t(x) > 0, t(x), t(x) * t(slope)[:, None, None])
    y = F.conv2d(F.pad(y, (1, 0, 2, 0)), t(k), t(b), dilation=2).mean((2, 3))
    check(bigdl.read(w.save(root, tmp_path / "o.model"), input_shape=(3, 6, 6)), y, x)


# ------------------------------------------------------------------------------------------------- what is refused


def small(path: Path) -> Path:
    w = Writer()
    root = w.graph(
        [
            (w.module("Reshape", name="rows", size=[1, 4, 4], batchMode=0), {}),
            (w.module("SpatialConvolution", name="conv", weights=(rand(1, 2, 1, 3, 3), rand(2)), nInputPlane=1,
                      nOutputPlane=2, kernelW=3, kernelH=3), {"rows": -1}),
            (w.module("View", name="flat", sizes=[8]), {"conv": -1}),
            (w.module("Linear", name="fc", weights=(rand(3, 8), rand(3)), inputSize=8, outputSize=3), {"flat": -1}),
        ],
        ["rows"],
        ["fc"],
    )  # fmt: skip
    return w.save(root, path)


def test_an_unknown_layer_is_named_with_its_type(tmp_path: Path) -> None:
    w = Writer()
    path = w.save(w.module("Sequential", w.module("Tanh"), w.module("Maxout", name="odd")), tmp_path / "m.model")
    with pytest.raises(FormatError, match=r"layer 'odd' \(com\.intel\..*nn\.Maxout\) is of a type that is not read"):
        bigdl.read(path, input_shape=(3,))
    path = w.save(w.module("Linear", home="java.lang.evil."), tmp_path / "j.model")
    with pytest.raises(FormatError, match="is no BigDL model"):
        bigdl.read(path, input_shape=(3,))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def linear(change: Any) -> Path:
        w = Writer()
        root = w.module("Linear", name="fc", weights=(rand(3, 8), rand(3)), inputSize=8, outputSize=3)
        change(w, root)
        return w.save(root, tmp_path / "w.model")

    def set_attribute(root: Any, key: str, value: int) -> None:
        next(entry for entry in root.attr if entry.key == key).value.int32Value = value

    for change, match in (
        (lambda w, r: set_attribute(r, "inputSize", 7), "'weight' is 3 x 8 in the file, the layer needs 3 x 7"),
        (lambda w, r: set_attribute(r, "inputSize", 2**31 - 1), "the layer needs 3 x 2147483647"),
        (lambda w, r: set_attribute(r, "outputSize", -3), "outputSize is -3"),
        (lambda w, r: w.storages.clear(), "its numbers are not in the file"),
        (lambda w, r: r.parameters.pop(), "has 1 tensors in the file, it needs 2"),
        (lambda w, r: w.storages[0].size.append(2**30), r"a tensor of \[3, 8, 1073741824\] does not fit its 24"),
        (lambda w, r: w.storages[0].stride.__setitem__(0, 2**30), "does not fit its 24 numbers"),
    ):
        with pytest.raises(FormatError, match=match):
            bigdl.read(linear(change))


def test_deep_nesting_and_cycles_end(tmp_path: Path) -> None:
    w = Writer()
    deep = w.module("Tanh")
    for _ in range(90):
        deep = w.module("Sequential", deep)
    with pytest.raises(FormatError, match="nests messages deeper than 64"):
        bigdl.read(w.save(deep, tmp_path / "d.model"), input_shape=(3,))
    loop = w.graph([(w.module("Tanh", name="a"), {"b": -1}), (w.module("Tanh", name="b"), {"a": -1})], ["a"], ["b"])
    with pytest.raises(FormatError, match="'a' waits for modules that are not there, or for itself"):
        bigdl.read(w.save(loop, tmp_path / "l.model"), input_shape=(3,))


def test_the_reader_is_found_by_what_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "READERS", ("dl4j", "h2o", "bigdl"))
    model = models.open_model(small(tmp_path / "no_ending"))
    assert model is not None
    assert model.source["format"] == "BigDL"
    (tmp_path / "text").write_text("\nnothing of the kind")
    assert models.open_model(tmp_path / "text") is None


def fuzz(file: Path, work: Path, rounds: int) -> None:
    rng = random.Random(0)
    whole = file.read_bytes()
    for _ in range(rounds):
        data = bytearray(whole)
        kind = rng.randrange(4)
        for _ in range(rng.choice((1, 1, 4))):
            place = rng.randrange(len(data))
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[place] = rng.choice((0, 255, 127, 128))
            elif kind == 2:
                data[place : place + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        work.write_bytes(bytes(data[: rng.randrange(len(data))] if kind == 3 else data))
        try:
            model = bigdl.read(work)
        except FormatError as error:
            told = len(str(error))
        else:
            inputs = [torch.zeros(20, *spec.shape[1:]) for spec in model.signature.inputs.values()]  # type: ignore[arg-type]
            told = len(model.module(*inputs))
        assert 10 < told < 2500


def test_mutated_models_give_an_error_or_a_net(tmp_path: Path) -> None:
    fuzz(small(tmp_path / "good.model"), tmp_path / "bad.model", 500)


@pytest.mark.slow
def test_many_mutated_models_give_an_error_or_a_net(tmp_path: Path) -> None:
    fuzz(small(tmp_path / "good.model"), tmp_path / "bad.model", 10_000)
