"""The readers: every format by its content, damage refused, nothing in a file ever run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kindling.errors import FormatError, KindlingError, MissingExtraError
from kindling.formats import open_weights

STATE = {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.arange(4.0)}


def write_safetensors(path: Path) -> None:
    save_file(STATE, path)


def write_pth(path: Path) -> None:
    torch.save(STATE, path)


def write_old_pth(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def write_npz(path: Path) -> None:
    np.savez(path, **{name: value.numpy() for name, value in STATE.items()})


def write_h5(path: Path) -> None:
    with h5py.File(path, "w") as root:
        root.attrs["layer_names"] = [b"conv", b"relu"]
        root.create_group("conv").attrs["weight_names"] = [b"uniform1", b"conv/b:0"]
        root["conv/uniform1"] = STATE["conv.weight"].permute(2, 3, 1, 0).numpy()
        root["conv/conv/b:0"] = STATE["conv.bias"].numpy()
        root.create_group("relu").attrs["weight_names"] = []


FORMATS: dict[str, Callable[[Path], None]] = {
    "safetensors": write_safetensors,
    "pth": write_pth,
    "old pth": write_old_pth,
    "npz": write_npz,
    "h5": write_h5,
}


@pytest.fixture(params=FORMATS, ids=list(FORMATS))
def good(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / ("weights.npz" if request.param == "npz" else "weights.bin")
    FORMATS[request.param](path)
    return path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.read() for name, value in open_weights(path).items()}


def test_every_format_is_known_by_its_content(good: Path) -> None:
    renamed = good.rename(good.with_name("no_suffix"))
    stored = open_weights(renamed)
    tensors = read_all(renamed)
    for name, value in tensors.items():
        assert stored[name].shape == tuple(value.shape)
        assert stored[name].dtype == "float32"
        assert value.dtype == torch.float32
    if "conv/kernel" in tensors:
        tensors = {"conv.weight": tensors["conv/kernel"].permute(3, 2, 0, 1), "conv.bias": tensors["conv/bias"]}
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in tensors.items())


def test_a_truncated_file_is_refused_wherever_it_was_cut(good: Path) -> None:
    whole = good.read_bytes()
    for size in [0, 1, 3, 7, 8, 9, 40, *np.linspace(50, len(whole) - 1, 25).astype(int)]:
        good.write_bytes(whole[:size])
        with pytest.raises(FormatError) as caught:
            read_all(good)
        assert str(good) in str(caught.value)


def test_a_flipped_byte_is_refused_or_harmless(good: Path) -> None:
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, min(len(whole), 400), 7), *rng.integers(0, len(whole), 60)]
    for place in places:
        good.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        try:
            for tensor in read_all(good).values():
                assert isinstance(tensor, torch.Tensor)
        except KindlingError:
            pass


class _Trap:
    """Unpickled by anything but a weights-only loader, it leaves a file behind."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["whole", "beside", "inside"])
def test_nothing_in_a_pth_is_run(tmp_path: Path, old: bool, where: str) -> None:
    mark = tmp_path / "was_run"
    trap = _Trap(str(mark))
    data: Any = {"whole": trap, "beside": {**STATE, "x": trap}, "inside": {"state_dict": {**STATE, "x": [trap]}}}[where]
    path = tmp_path / "evil.pth"
    torch.save(data, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FormatError, match=r"more than tensors and names; nothing in it was run") as caught:
        open_weights(path)
    assert "weights_only=False" not in str(caught.value)
    assert not mark.exists()


def test_nothing_in_a_bare_pickle_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(_Trap(str(mark)), protocol=2))
    with pytest.raises(FormatError):
        open_weights(path)
    assert not mark.exists()


def test_nothing_in_an_npz_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    path = tmp_path / "evil.npz"
    np.savez(path, x=np.array([_Trap(str(mark))], dtype=object))
    with pytest.raises(FormatError, match=r"'x.npy' holds pickled objects"):
        open_weights(path)
    assert not mark.exists()


def test_an_array_that_lies_about_its_size_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    assert open_weights(path)["x"].shape == (1 << 40,)  # known before anything is allocated
    path = tmp_path / "huge.h5"
    with h5py.File(path, "w") as root:
        root.attrs["layer_names"] = [b"a"]
        root.create_group("a").attrs["weight_names"] = [b"k"]
        root["a"].create_dataset("k", shape=(1 << 40,), dtype="f4", chunks=(1024,))
    assert path.stat().st_size < 100_000
    assert open_weights(path)["a/kernel"].shape == (1 << 40,)


def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    write_h5(secret)
    for make in (
        lambda group: group.__setitem__("k", h5py.ExternalLink(str(secret), "/conv/uniform1")),
        lambda group: group.__setitem__("k", h5py.SoftLink("/a/other")),
        lambda group: group.create_virtual_dataset("k", virtual_layout(secret)),
        lambda group: group.create_dataset("k", (4,), "f4", external=[(str(secret), 0, 16)]),
    ):
        path = tmp_path / "links.h5"
        with h5py.File(path, "w") as root:
            root.attrs["layer_names"] = [b"a"]
            group = root.create_group("a")
            group.attrs["weight_names"] = [b"k"]
            make(group)
        with pytest.raises(FormatError, match=r"links are not followed|another file, which is not read"):
            open_weights(path)


def virtual_layout(source: Path) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(source), "conv/conv/b:0", shape=(4,))
    return layout


def test_a_whole_keras_model_gives_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as root:
        weights = root.create_group("model_weights")
        weights.attrs["layer_names"] = [b"bn"]
        names = [f"bn/{role}:0".encode() for role in ("gamma", "beta", "moving_mean", "moving_variance")]
        weights.create_group("bn").attrs["weight_names"] = names
        for number, name in enumerate(names):
            weights[f"bn/{name.decode()}"] = np.full(3, number, ">f4")  # big-endian, as some machines write
    stored = open_weights(path)
    assert list(stored) == ["bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance"]
    assert stored["bn/moving_variance"].dtype == "float32"
    assert stored["bn/moving_variance"].read().tolist() == [3, 3, 3]


@pytest.mark.needs_data
def test_a_real_keras_model(data_dir: Path) -> None:
    stored = open_weights(data_dir / "mnist_cnn_keras_tf" / "mnist_cnn.h5")
    assert {name: value.shape for name, value in stored.items()} == {
        **{"conv2d/kernel": (3, 3, 1, 32), "conv2d/bias": (32,), "conv2d_1/kernel": (3, 3, 32, 64)},
        **{"conv2d_1/bias": (64,), "conv2d_2/kernel": (3, 3, 64, 128), "conv2d_2/bias": (128,)},
        **{"conv2d_3/kernel": (3, 3, 128, 128), "conv2d_3/bias": (128,), "dense/kernel": (1152, 128)},
        **{"dense/bias": (128,), "dense_1/kernel": (128, 10), "dense_1/bias": (10,)},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer.*git lfs pull"),
        (b"hello", "begins with b'hello', which no weight file does"),
    ],
)
def test_what_is_no_weight_file_is_called_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        open_weights(path)


def test_missing_files_folders_and_other_archives(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no file .*nowhere.pth"):
        open_weights(tmp_path / "nowhere.pth")
    with pytest.raises(FormatError, match="is not a file"):
        open_weights(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match=r"archive of other things \(readme.txt"):
        open_weights(tmp_path / "x.zip")
    with h5py.File(tmp_path / "x.h5", "w") as root:
        root["data"] = [1, 2]
    with pytest.raises(FormatError, match="names no Keras layers"):
        open_weights(tmp_path / "x.h5")


def test_training_scripts_wrappings_are_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in STATE.items()}}, path)
    assert read_all(path).keys() == STATE.keys()


def test_a_pth_of_other_things_says_what_to_save(tmp_path: Path) -> None:
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(FormatError, match=r"holds a list, not names with tensors. Save `model.state_dict\(\)`"):
        open_weights(path)
    torch.save({"epoch": 3, **STATE}, path)
    with pytest.raises(FormatError, match=r"holds 'epoch': int, not a dense tensor"):
        open_weights(path)


def test_tensors_that_share_memory_are_read_apart(tmp_path: Path) -> None:
    path = tmp_path / "views.pth"
    base = torch.arange(6.0)
    torch.save({"a": base[:3], "b": base[3:], "t": base.view(2, 3).t()}, path)
    tensors = read_all(path)
    tensors["a"].fill_(9)
    assert tensors["b"].tolist() == [3, 4, 5]
    assert tensors["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_without_h5py_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.h5"
    write_h5(path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(
        MissingExtraError, match=r"Reading .h5 files needs h5py. Run: pip install 'kindling-spark\[keras\]'"
    ):
        open_weights(path)
