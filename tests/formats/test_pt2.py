"""PyTorch's exported programs: torch's numbers, nothing unpickled, and hostile archives."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kindling as kd
from kindling.errors import FormatError
from kindling.formats import pt2
from kindling.graph import to_json

SCALE = int(os.environ.get("KINDLING_FUZZ", "1"))
ANY = torch.export.Dim("N", min=1, max=1 << 20)


def saved(net: nn.Module, x: Tensor, file: Path, *, batch: bool = True) -> Path:
    program = torch.export.export(net.eval(), (x,), dynamic_shapes=({0: ANY},) if batch else None)
    torch.export.save(program, file)
    return file


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.encode = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(self.embed(x)).mean(1))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.full((6, 1), 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu_(self.norm(self.conv(x))) * self.scale
        a, b = y.chunk(2, 1)
        return torch.cat([a + b, a], 1).reshape(x.shape[0], -1), y.amax(-1)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "lenet": (lambda: kd.load("lenet").module, lambda n: torch.rand(n, 1, 28, 28)),
    "text": (Text, lambda n: torch.randint(0, 50, (n, 7))),
    "mixed": (Mixed, lambda n: torch.rand(n, 4, 10)),
}


@pytest.mark.parametrize("name", NETS)
def test_programs_give_torchs_numbers_and_come_back_from_bundles(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, rows = NETS[name]
    net = make()
    model = kd.load(saved(net, rows(3), tmp_path / "net.pt2"))
    x = rows(5)
    with torch.no_grad():
        wanted, got = net(x), model.module(x)
        torch.testing.assert_close(got, wanted)
        model.save(tmp_path / "bundle")
        torch.testing.assert_close(kd.load(tmp_path / "bundle").module(x), got, rtol=0, atol=0)
    shapes = [("N", *part.shape[1:]) for part in (wanted if isinstance(wanted, tuple) else (wanted,))]
    assert [spec.shape for spec in model.signature.outputs.values()] == shapes


def test_layers_have_their_names_and_are_cut_and_trained(tmp_path: Path) -> None:
    model = kd.load(saved(kd.load("lenet").module, torch.rand(3, 1, 28, 28), tmp_path / "net.pt2"))
    assert isinstance(model.module.get_submodule("conv1"), nn.Conv2d)
    assert next(iter(model.until("fc1").signature.outputs.values())).shape == ("N", 500)
    model.module.train()(torch.rand(2, 1, 28, 28)).sum().backward()
    assert model.module.get_submodule("fc1").weight.grad is not None


def test_a_batch_of_one_size_is_refused_with_the_way_on(tmp_path: Path) -> None:
    file = saved(nn.Linear(2, 1), torch.rand(3, 2), tmp_path / "net.pt2", batch=False)
    with pytest.raises(FormatError, match=r"batches of exactly 3.*dynamic_shapes"):
        kd.load(file)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 1), torch.rand(1, 2)), str(tmp_path / "net.pt"))
    with pytest.raises(FormatError, match="TorchScript archive: loading one runs code of its own"):
        kd.load(tmp_path / "net.pt")


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (self.mark, "w"))


def rewritten(file: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return target


def test_pickles_in_the_archive_are_not_opened(tmp_path: Path) -> None:
    file = saved(nn.Linear(2, 1), torch.rand(3, 2), tmp_path / "net.pt2")
    mark = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(str(mark)))
    sample = rewritten(file, tmp_path / "sample.pt2", lambda name, data: bomb if name.endswith("model.pt") else data)
    assert kd.load(sample).signature.outputs["output"].shape == ("N", 1)

    def pickled(name: str, data: bytes) -> bytes:
        if name.endswith("weight_0"):
            return bomb
        return data.replace(b'"use_pickle": false', b'"use_pickle": true') if name.endswith("config.json") else data

    with pytest.raises(FormatError, match="as a pickle, which is not opened"):
        kd.load(rewritten(file, tmp_path / "weights.pt2", pickled))
    assert not mark.exists()


@pytest.mark.parametrize("target", ["torch.ops.aten.from_file.default", "os.system", "torch.ops.aten.relu.__class__"])
def test_operators_that_are_on_no_list_are_refused(target: str, tmp_path: Path) -> None:
    file = saved(nn.Sequential(nn.Linear(2, 2), nn.Softplus()), torch.rand(3, 2), tmp_path / "net.pt2")

    def changed(name: str, data: bytes) -> bytes:
        return (
            data.replace(b"torch.ops.aten.softplus.default", target.encode()) if name.endswith("model.json") else data
        )

    with pytest.raises(FormatError, match="not on kindling's list"):
        kd.load(rewritten(file, tmp_path / "bad.pt2", changed))


def mutated(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not raw:
            break
        at, kind = rng.randrange(len(raw)), rng.randrange(5)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice(b'0123456789-{}[]",:e')
        elif kind == 2:
            del raw[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            raw[at:at] = raw[at : at + rng.randrange(1, 60)]
        elif rng.random() < 0.2:
            del raw[at:]
    return bytes(raw)


def numbers(data: bytes, rng: random.Random) -> bytes:
    """JSON with one of its numbers or words changed."""
    words = data.split(b" ")
    places = [k for k, word in enumerate(words) if word.strip(b',}]["').lstrip(b"-").isdigit()]
    if places:
        k = rng.choice(places)
        digits = words[k].strip(b',}]["')
        words[k] = words[k].replace(
            digits, rng.choice((b"0", b"-1", b"7", b"99999999999", b"1e308", b"null", b'"x"', b"[]"))
        )
    return b" ".join(words)


def fuzz(folder: Path, rounds: int, seed: int) -> int:
    torch.manual_seed(0)
    good = [
        saved(Mixed(), torch.rand(3, 4, 10), folder / "a.pt2"),
        saved(Text(), torch.randint(0, 50, (3, 7)), folder / "b.pt2"),
    ]
    rng = random.Random(seed)
    made = 0
    for _ in range(rounds):
        file = rng.choice(good)
        target = folder / "bad.pt2"
        if rng.random() < 0.3:
            target.write_bytes(mutated(file.read_bytes(), rng))
        else:
            members = zipfile.ZipFile(file).namelist()
            which = rng.choice([name for name in members if name.endswith(".json") or "weight_" in name])
            how = rng.choice((mutated, numbers))
            rewritten(file, target, lambda name, data, which=which, how=how: how(data, rng) if name == which else data)  # type: ignore[misc]
        try:
            made_now = pt2.read(target)
        except FormatError:
            continue
        to_json(made_now.module)
        made += 1
    return made


def test_mutated_archives_give_a_model_or_an_error(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 60, seed=1) > 2


@pytest.mark.slow
def test_many_mutated_archives(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 1500 * SCALE, seed=2) > 50


def test_sizes_out_of_nothing_are_refused(tmp_path: Path) -> None:
    file = saved(nn.Linear(2, 1), torch.rand(3, 2), tmp_path / "net.pt2")

    def huge(name: str, data: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return data
        config = json.loads(data)
        config["config"]["weight"]["tensor_meta"]["sizes"] = [{"as_int": 2**40}, {"as_int": 2}]
        config["config"]["weight"]["tensor_meta"]["strides"] = [{"as_int": 0}, {"as_int": 0}]
        return json.dumps(config).encode()

    with pytest.raises(FormatError, match=r"its shape .* needs more"):
        kd.load(rewritten(file, tmp_path / "bad.pt2", huge))
