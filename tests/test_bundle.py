"""Bundles: the model that comes back is the one that went in, and nothing else ever comes in."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kindling
from kindling import bundle, storage
from kindling.errors import ConfigError, FormatError, KindlingError, ModelError, StorageError
from kindling.model import Model

FUZZ = int(os.environ.get("KINDLING_FUZZ", "1"))
"""How many times as many random inputs as usual; set by `make test-all`."""

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def small() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model = Model.of(net, column="features", shape=(4,), labels=["a", "ü b", "c"]).freeze(until="0")
    history = ({"epochs": [{"loss": 0.5, "valid": math.nan}], "strategy": "AllReduce"},)
    return replace(model, history=history, source={"file": "x.pth", "tensors": 3, "none": None})


def assert_equal(model: Model, other: Model) -> None:
    for name in ("signature", "preparation", "labels", "frozen", "name", "source"):
        assert getattr(other, name) == getattr(model, name), name
    assert repr(other.history) == repr(model.history)
    assert bundle.fingerprint(other) == bundle.fingerprint(model)
    batch = {name: X for name in model.signature.inputs}
    expected = model.signature.call(model.module.eval(), batch)
    found = other.signature.call(other.module, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the round


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "a model")
    again = kindling.load(tmp_path / "a model")
    assert_equal(model, again)
    assert str(again.summary()) == str(model.summary())
    assert not again.module.training
    assert sorted(os.listdir(tmp_path / "a model")) == ["kindling.json", "weights.safetensors"]
    assert os.listdir(tmp_path) == ["a model"]
    again.save(tmp_path / "again")
    for name in ("kindling.json", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a model" / name).read_bytes()


@pytest.mark.parametrize("name", ["lenet", "squeezenet1_1", "mobilenet_v2"])
def test_nets_come_back_with_every_layer(name: str, tmp_path: Path) -> None:
    model = kindling.load(name)
    model.save(tmp_path / "m")
    again = kindling.load(tmp_path / "m")
    assert str(again.summary()) == str(model.summary())
    assert bundle.fingerprint(again) == bundle.fingerprint(model)
    assert (again.preparation, again.labels, again.source) == (model.preparation, model.labels, model.source)


def test_cut_frozen_and_extended_models_come_back(tmp_path: Path) -> None:
    model = kindling.load("lenet")
    first = model.signature.inputs
    layers = [row.name for row in model.summary().rows]
    head = model.until(layers[-2]).freeze().then(nn.Linear(500, 5), labels=list("abcde"))
    head.save(tmp_path / "m")
    again = kindling.load(tmp_path / "m")
    assert again.frozen == head.frozen != frozenset()
    assert str(again.summary()) == str(head.summary())
    shape = [2, *[int(n) for n in next(iter(first.values())).shape[1:]]]
    x = torch.rand(shape)
    torch.testing.assert_close(again.module(x), head.module.eval()(x), rtol=0, atol=0)
    longer = again.unfreeze().then(nn.Linear(5, 2), labels=["x", "y"])
    assert longer.module(x).shape == (2, 2)


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1000, 1000))
    Model.of(net, shape=(1000,)).save(tmp_path / "m")
    module = kindling.load(tmp_path / "m").module
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "m" / "weights.safetensors") in maps.read_text()
    with torch.no_grad():  # writing goes to a copy of the page, not to the file
        next(module.parameters()).zero_()
    again = kindling.load(tmp_path / "m").module
    assert torch.equal(next(again.parameters()), net[0].weight)


def test_tied_shared_and_strided_tensors_come_back(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight
            both = torch.randn(8, 4)
            self.one, self.two = nn.Parameter(both[:4]), nn.Parameter(both[4:])
            self.turned = nn.Parameter(torch.eye(4)[[1, 0, 3, 2]].t())
            self.small = nn.Parameter(torch.randn(4).half(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x)) @ self.one @ self.two @ self.turned + self.small

    model = Model.of(Net(), shape=(4,))
    model.save(tmp_path / "m")
    again = kindling.load(tmp_path / "m")
    assert_equal(model, again)
    assert again.module.get_parameter("decode.weight") is again.module.get_parameter("encode.weight")
    assert not again.module.get_parameter("small").requires_grad
    size = (tmp_path / "m" / "weights.safetensors").stat().st_size
    assert size < 4 * (16 * 4 + 8) + 1000


def test_bfloat16_models_come_back(tmp_path: Path) -> None:
    model = small()
    model = replace(model, module=nn.Sequential(nn.Linear(4, 3)).to(torch.float64))
    model = replace(model, frozen=frozenset())
    model.save(tmp_path / "m")
    assert next(kindling.load(tmp_path / "m").module.parameters()).dtype == torch.float64


def test_the_fingerprint_changes_with_what_features_depend_on() -> None:
    model = small()
    first = bundle.fingerprint(model)
    assert first == bundle.fingerprint(small())
    assert first == bundle.fingerprint(replace(model, labels=None, history=(), frozen=frozenset(), name="other"))
    other = small()
    with torch.no_grad():
        next(other.module.parameters())[0, 0] += 1
    assert bundle.fingerprint(other) != first
    assert bundle.fingerprint(small().until("0")) != first
    step = replace(model.preparation.inputs[0], column="elsewhere")  # type: ignore[type-var]
    assert bundle.fingerprint(replace(model, preparation=replace(model.preparation, inputs=(step,)))) != first


# -------------------------------------------------------------------------------------------- replacing and places


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "m")
    before = (tmp_path / "m" / "kindling.json").read_bytes()
    with pytest.raises(ConfigError, match="overwrite=True"):
        model.save(tmp_path / "m")
    assert (tmp_path / "m" / "kindling.json").read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        with pytest.raises(ConfigError, match=r"holds other files|is a file"):
            model.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        model.save(tmp_path / "m", overwrite=True)
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert_equal(model, kindling.load(tmp_path / "empty"))


def test_a_dry_run_says_what_saving_would_and_writes_nothing(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "m", dry_run=True)
    assert os.listdir(tmp_path) == []
    model.save(tmp_path / "m")
    before = (tmp_path / "m" / "kindling.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a bundle already"):
        model.save(tmp_path / "m", dry_run=True)
    model.save(tmp_path / "m", overwrite=True, dry_run=True)
    assert (tmp_path / "m" / "kindling.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"other files than a bundle \('m/"):
        model.save(tmp_path, overwrite=True, dry_run=True)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_the_whole(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    small().save(tmp_path / "m")
    old = kindling.load(tmp_path / "m")
    before = old.module.state_dict()["0.weight"].clone()
    new = Model.of(nn.Linear(4, 2), shape=(4,))
    new.save(tmp_path / "m", overwrite=True)
    assert_equal(new, kindling.load(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]
    assert torch.equal(old.module.state_dict()["0.weight"], before)  # mapped from the file that is gone


def test_a_damaged_bundle_can_be_replaced(tmp_path: Path) -> None:
    small().save(tmp_path / "m")
    (tmp_path / "m" / "kindling.json").write_bytes(b"\xff")
    small().save(tmp_path / "m", overwrite=True)
    assert_equal(small(), kindling.load(tmp_path / "m"))


def test_a_save_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    model.save(tmp_path / "m")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bundle, "_put_in_place", fail)
    with pytest.raises(StorageError, match="disk full"):
        Model.of(nn.Linear(4, 2), shape=(4,)).save(tmp_path / "m", overwrite=True)
    assert_equal(model, kindling.load(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]


@pytest.fixture
def memory() -> Iterator[str]:
    import fsspec

    yield "memory://bundles/a model"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_other_places_hold_bundles_too(memory: str) -> None:
    model = small()
    model.save(memory)
    assert_equal(model, kindling.load(memory))
    with pytest.raises(ConfigError, match="overwrite=True"):
        model.save(memory)
    new = Model.of(nn.Linear(4, 2), shape=(4,))
    new.save(memory, overwrite=True)
    assert_equal(new, kindling.load(memory))
    assert len(storage.open_place(memory).list()) == 2


def test_elsewhere_the_old_bundle_stands_until_the_manifest_is_written(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.save(memory)

    def fail(*_: object) -> None:
        raise StorageError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(storage.FsspecPlace, "write", fail)
        with pytest.raises(StorageError, match="connection lost"):
            Model.of(nn.Linear(4, 2), shape=(4,)).save(memory, overwrite=True)
    assert_equal(model, kindling.load(memory))


@pytest.mark.spark
def test_sparks_file_systems_hold_bundles_too(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "connect" in type(spark).__module__.split("."):
        pytest.skip("writing through Spark Connect is tested with the storage")
    monkeypatch.setattr(bundle, "open_place", lambda path, spark: storage.hadoop_place(str(path), spark))
    model, path = small(), f"file:{tmp_path}/a bündle"
    bundle.save(model, path, spark=spark)
    assert_equal(model, bundle.load(path, spark=spark))
    new = Model.of(nn.Linear(4, 2), shape=(4,))
    bundle.save(new, path, overwrite=True, spark=spark)
    assert_equal(new, bundle.load(path, spark=spark))
    assert len([name for name in os.listdir(tmp_path / "a bündle") if not name.endswith(".crc")]) == 2


# --------------------------------------------------------------------------------------------- modules by class


class Gate(nn.Module):
    """Cannot be traced: its control flow depends on the data."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.kindling_args = {"width": width}
        self.before = nn.Linear(width, 6)
        self.after = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if x.sum() > 1e9:
            x = x * 2
        return self.after(x)


class Forgetful(Gate):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        del self.kindling_args


def test_a_module_by_its_class_comes_back_only_by_that_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model.of(Gate(4), shape=(4,), labels=["a", "b", "c"])
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path / "m")
    assert "classes=[Gate]" in caplog.text
    with pytest.raises(FormatError, match=r"made of the class '.*\.Gate', and bundles hold no code.*classes=\[Gate\]"):
        kindling.load(tmp_path / "m")
    with pytest.raises(FormatError, match=r"classes=\[Gate\]"):
        kindling.load(tmp_path / "m", classes=[Forgetful])
    with pytest.raises(ConfigError, match=r"no nn\.Module"):
        kindling.load(tmp_path / "m", classes=[dict])
    state = torch.random.get_rng_state()
    again = kindling.load(tmp_path / "m", classes=[Gate])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(again.module) is Gate
    assert_equal(model, again)


def test_arguments_that_were_not_recorded_are_asked_for(tmp_path: Path) -> None:
    model = Model.of(Forgetful(5), shape=(5,))
    with pytest.raises(ModelError, match=r"Forgetful\(\) makes other tensors.*kindling_args"):
        model.save(tmp_path / "m")
    assert os.listdir(tmp_path) == []
    Model.of(Forgetful(4), shape=(4,)).save(tmp_path / "m")
    assert type(kindling.load(tmp_path / "m", classes=[Forgetful]).module) is Forgetful


def test_cut_and_extended_modules_by_class_come_back(tmp_path: Path) -> None:
    model = Model.of(Gate(4), shape=(4,)).until("before").freeze().then(nn.Linear(6, 2), labels=["a", "b"])
    model.save(tmp_path / "m")
    with pytest.raises(FormatError, match=r"classes=\[Gate\]"):
        kindling.load(tmp_path / "m")
    again = kindling.load(tmp_path / "m", classes=[Gate])
    assert_equal(model, again)
    assert str(again.summary()) == str(model.summary())
    assert not any("after" in name for name in again.module.state_dict())


def test_a_changed_source_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Model.of(Gate(4), shape=(4,)).save(tmp_path / "m")
    body = json.loads((tmp_path / "m" / "kindling.json").read_text())
    sources = body["architecture"]["sources"]
    assert [name.rpartition(".")[2] for name in sources] == ["Gate"]
    write_manifest(
        tmp_path / "m", {**body, "architecture": {**body["architecture"], "sources": dict.fromkeys(sources, "0" * 64)}}
    )
    with caplog.at_level(logging.WARNING):
        kindling.load(tmp_path / "m", classes=[Gate])
    assert "has changed since" in caplog.text


def test_what_cannot_be_stored_says_why(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(ModelError, match="history holds"):
        replace(model, history=({"model": object()},)).save(tmp_path / "m")
    meta = Model.of(nn.Linear(4, 2), shape=(4,))
    with pytest.raises(ModelError, match="on meta"):
        replace(meta, module=nn.Linear(4, 2, device="meta")).save(tmp_path / "m")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ hostile bundles


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "m"
    small().save(path)
    return path


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    """As an attacker would: with the right checksum."""
    body.pop("sha256", None)
    body["sha256"] = bundle._digest(body)
    (path / "kindling.json").write_text(json.dumps(body))


def weights_entry(path: Path, data: bytes) -> dict[str, Any]:
    import hashlib

    (path / "weights.safetensors").write_bytes(data)
    return {"weights.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys.kindling_bomb = True",)


BOMB = pickle.dumps(Bomb())


def header(entries: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


HOSTILE: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "newer format": lambda b, p: b.update(format=2),
    "unknown key": lambda b, p: b.update(code="import os"),
    "missing key": lambda b, p: b.pop("labels"),
    "labels of numbers": lambda b, p: b.update(labels=[1, 2]),
    "labels twice": lambda b, p: b["preparation"]["targets"][0].update(labels=["a", "a"]),
    "frozen text": lambda b, p: b.update(frozen="0"),
    "history object": lambda b, p: b.update(history={}),
    "source list": lambda b, p: b.update(source=[]),
    "name number": lambda b, p: b.update(name=3),
    "no inputs": lambda b, p: b["signature"].update(inputs=[]),
    "inputs of junk": lambda b, p: b["signature"].update(inputs=[["x", 3]]),
    "input twice": lambda b, p: b["signature"]["inputs"].append(b["signature"]["inputs"][0]),
    "two inputs": lambda b, p: b["signature"]["inputs"].append(["y", b["signature"]["inputs"][0][1]]),
    "dtype": lambda b, p: b["signature"]["inputs"][0][1].update(dtype="load"),
    "shape": lambda b, p: b["signature"]["inputs"][0][1].update(shape=["N", -4]),
    "step kind": lambda b, p: b["preparation"]["inputs"][0].update(kind="pickle"),
    "step field": lambda b, p: b["preparation"]["inputs"][0].update(evil=1),
    "step value": lambda b, p: b["preparation"]["inputs"][0].update(shape="4"),
    "step column": lambda b, p: b["preparation"]["inputs"][0].update(column=7),
    "step junk": lambda b, p: b["preparation"].update(inputs=[3]),
    "no preparation": lambda b, p: b.update(preparation=None),
    "architecture kind": lambda b, p: b["architecture"].update(kind="pickle"),
    "architecture list": lambda b, p: b.update(architecture=[]),
    "layer": lambda b, p: b["architecture"]["graph"]["layers"][0].update(type="os.system"),
    "larger layer": lambda b, p: b["architecture"]["graph"]["layers"][0]["args"].update(out_features=9),
    "huge layer": lambda b, p: b["architecture"]["graph"]["layers"][0]["args"].update(in_features=10**12),
    "a class": lambda b, p: b.update(architecture={"kind": "class", "class": "os.system", "args": {}, "sources": {}}),
    "a class junk": lambda b, p: b.update(architecture={"kind": "class", "class": 3, "args": {}, "sources": {}}),
    "a cut": lambda b, p: b["architecture"]["graph"]["layers"].append(
        {"path": "x", "foreign": {"kind": "cut", "prefix": "", "stops": [""], "cut": [], "inner": {}}}
    ),
    "no files": lambda b, p: b.update(files={}),
    "file up": lambda b, p: b.update(files={"../weights.safetensors": b["files"]["weights.safetensors"]}),
    "absolute file": lambda b, p: b.update(files={"/etc/passwd": b["files"]["weights.safetensors"]}),
    "pickle file": lambda b, p: b.update(files={"weights.pkl": b["files"]["weights.safetensors"]}),
    "two files": lambda b, p: b["files"].update({"weights-0123456789ab.safetensors": {}}),
    "file without size": lambda b, p: b["files"]["weights.safetensors"].pop("bytes"),
    "other size": lambda b, p: b["files"]["weights.safetensors"].update(bytes=3),
    "other sha": lambda b, p: b["files"]["weights.safetensors"].update(sha256="0" * 64),
    "weights missing": lambda b, p: (p / "weights.safetensors").unlink(),
    "weights are a pickle": lambda b, p: b.update(files=weights_entry(p, BOMB)),
    "weights are a torch pickle": lambda b, p: (
        torch.save({"x": Bomb()}, p / "weights.safetensors"),
        b.update(files=weights_entry(p, (p / "weights.safetensors").read_bytes())),
    ),
    "weights empty": lambda b, p: b.update(files=weights_entry(p, b"")),
    "weights of no tensors": lambda b, p: b.update(files=weights_entry(p, header({}))),
    "weights with a huge header": lambda b, p: b.update(files=weights_entry(p, b"\xff" * 64)),
    "weights beyond the file": lambda b, p: b.update(
        files=weights_entry(p, header({"0.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 2**40]}}))
    ),
    "weights of another shape": lambda b, p: b.update(files=other_weights(p, torch.zeros(4, 8))),
    "weights of another dtype": lambda b, p: b.update(files=other_weights(p, torch.zeros(8, 4).half())),
    "one tensor more": lambda b, p: b.update(files=other_weights(p, None)),
}  # fmt: skip


def other_weights(path: Path, first: Tensor | None) -> dict[str, Any]:
    from safetensors.torch import load, save

    tensors = load((path / "weights.safetensors").read_bytes())
    tensors["more" if first is None else "0.weight"] = torch.zeros(1) if first is None else first
    return weights_entry(path, save(tensors))


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bundles_are_refused(change: Callable[[dict[str, Any], Path], Any], good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(good, path)
    body = json.loads((path / "kindling.json").read_text())
    write_manifest(path, body)
    assert_equal(small(), kindling.load(path))  # the checksum of a changed manifest is right
    change(body, path)
    write_manifest(path, body)
    with pytest.raises(FormatError) as caught:
        kindling.load(path)
    assert not hasattr(sys, "kindling_bomb")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": NaN}',
        b"[" * 100_000,
        BOMB,
        b'{"a":' * 50_000,
        b"9" * 9999,
    ],
    ids=range(10),
)
def test_manifests_that_are_none_are_refused(text: bytes, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(good, path)
    (path / "kindling.json").write_bytes(text)
    with pytest.raises(FormatError):
        kindling.load(path)


def test_deep_nesting_inside_a_manifest_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(good, path)
    body = json.loads((path / "kindling.json").read_text())
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    body["history"] = [{"x": deep}]
    body["source"] = {"x": deep}
    try:
        write_manifest(path, body)
    except RecursionError:
        pytest.skip("this Python cannot write it either")
    try:
        kindling.load(path)
    except FormatError:
        pass


def test_a_huge_manifest_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with (tmp_path / "m" / "kindling.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(FormatError, match="more than"):
        kindling.load(tmp_path / "m")


def test_no_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="there is no bundle at"):
        kindling.load(tmp_path / "nothing")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.pkl").write_bytes(BOMB)
    with pytest.raises(FormatError, match=r"it has no kindling\.json"):
        kindling.load(tmp_path / "m")


def test_pickles_beside_a_bundle_are_never_opened(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(good, path)
    for name in ("module.pkl", "pytorch_model.bin", "__init__.py", "weights.pth"):
        (path / name).write_bytes(BOMB)
    assert_equal(small(), kindling.load(path))
    assert not hasattr(sys, "kindling_bomb")


def damaged(good: Path, folder: Path, name: str, data: bytes) -> None:
    path = folder / "m"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    (path / name).write_bytes(data)
    try:
        model = kindling.load(path)
    except KindlingError:
        return
    assert_equal(small(), model)


@pytest.mark.parametrize("name", ["kindling.json", "weights.safetensors"])
@pytest.mark.fuzz
@settings(max_examples=80 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_give_an_error_or_the_same_model(
    name: str, good: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((good / name).read_bytes())
    for place in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
        content[place // 8] ^= 1 << (place % 8)
    damaged(good, tmp_path, name, bytes(content))


@pytest.mark.parametrize("name", ["kindling.json", "weights.safetensors"])
@pytest.mark.fuzz
@settings(max_examples=40 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_files_give_an_error(name: str, good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = (good / name).read_bytes()
    path = tmp_path / "m"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    (path / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(FormatError):
        kindling.load(path)


@pytest.mark.fuzz
@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_weights_altered_under_a_right_checksum_give_an_error_or_weights(
    good: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """An attacker who fixes the checksums can change numbers, and nothing else."""
    path = tmp_path / "m"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    content = bytearray((good / "weights.safetensors").read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(600, len(content)) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    body = json.loads((path / "kindling.json").read_text())
    body["files"] = weights_entry(path, bytes(content))
    write_manifest(path, body)
    try:
        model = kindling.load(path)
    except KindlingError:
        return
    shapes = {name: tuple(t.shape) for name, t in small().module.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in model.module.state_dict().items()} == shapes
