"""`load_net`: which file goes with which net, preparation, labels and signature; real weights on real photos."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kindling.nets as nets
from kindling.errors import ConfigError, FormatError, ModelError
from kindling.formats import CATALOG
from kindling.nets import NETS, imagenet_labels, load_net, mobilenet_v2, squeezenet1_1

SQUEEZENET = Path("squeezenet_v1.1_keras/squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5")
MOBILENET = Path("mobilenet_tflite/mobilenet_v2_1.0_224_dequantized.npz")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)


def torchvision_names(net: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights under torchvision's names."""
    layers = NETS[net].layouts[0].layers
    return {f"{layers[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": v for n, v in module.state_dict().items()}


@pytest.mark.parametrize("name", list(NETS))
def test_every_layout_is_told_from_every_other(name: str) -> None:
    """Weights made by each layout's rules are recognised as that layout and no other, but for the two named below."""
    from kindling.formats.stored import Stored
    from kindling.formats.weights import _slots, recognise

    for layout in NETS[name].layouts:
        classes = None if layout.head is None else layout.classes or 1000
        with torch.device("meta"):
            slots = _slots(layout, layout.build(classes))
        stored = {slot.theirs: Stored(slot.shape, "float32", lambda: torch.empty(0)) for slot in slots}
        if layout.name in ("tensorflow-notop", "torchvision-folded-notop"):
            with pytest.raises(
                FormatError, match=r"'tensorflow-notop' and 'torchvision-folded-notop'.*layout='tensorflow-notop'"
            ):
                recognise("file", name, NETS[name].layouts, stored)
            continue
        match = recognise("file", name, NETS[name].layouts, stored)
        assert (match.layout.name, match.classes) == (layout.name, classes)


@pytest.mark.parametrize("name", list(NETS))
def test_every_layout_carries_a_preparation_that_fits_its_net(name: str) -> None:
    from kindling.prepare.image import ImageStep

    for layout in NETS[name].layouts:
        height, width, channels = ImageStep("image", **layout.image).shape
        with torch.device("meta"):
            out = layout.build(None if layout.head is None else layout.classes or 7)(
                torch.empty(2, channels, height, width)
            )
        assert out.shape[0] == 2
        assert out.dim() == (4 if layout.head is None else 2)


def test_a_net_with_random_weights() -> None:
    parts = load_net("squeezenet1_1")
    assert parts.labels is None
    assert parts.signature.inputs["image"].shape == ("N", 3, 224, 224)
    assert parts.signature.outputs["predictions"].shape == ("N", 1000)
    assert parts.source == {"net": "squeezenet1_1"}
    assert not parts.module.training
    step = parts.preparation.inputs[0]
    assert (step.name, step.column, step.channels, step.resize_to) == ("image", "content", "RGB", 256)
    assert not any(p.is_meta for p in parts.module.parameters())


def test_an_unknown_net_is_offered_its_neighbours() -> None:
    with pytest.raises(ModelError, match=r"there is no net 'vgg61'\. Did you mean 'vgg16'"):
        load_net("vgg61")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_torchvisions_names_in_every_container(tmp_path: Path, suffix: str) -> None:
    net = mobilenet_v2()
    state = torchvision_names("mobilenet_v2", net)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    elif suffix == ".pth":
        torch.save(state, file)
    else:
        np.savez(file, **{name: value.numpy() for name, value in state.items()})
    before = torch.random.get_rng_state()
    parts = load_net("mobilenet_v2", file)
    assert torch.equal(torch.random.get_rng_state(), before)  # weights from a file draw no random numbers
    assert parts.source["layout"] == "torchvision"
    assert parts.source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert parts.labels == imagenet_labels()
    for name, value in net.state_dict().items():
        assert torch.equal(parts.module.state_dict()[name], value), name
    assert all(p.requires_grad for p in parts.module.parameters())


def test_the_loaded_net_does_not_lean_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(torchvision_names("squeezenet1_1", squeezenet1_1()), file)
    module = load_net("squeezenet1_1", file).module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with file.open("r+b") as stream:  # in place: a memory map would see it
        stream.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_from_a_file_system_of_fsspec() -> None:
    import fsspec
    from safetensors.torch import save

    state = torchvision_names("squeezenet1_1", squeezenet1_1(classes=4))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/nets/squeeze.safetensors", save(state))
    try:
        parts = load_net("squeezenet1_1", "memory://nets/squeeze.safetensors")
        with pytest.raises(
            FormatError, match=r"memory://nets/squeeze.safetensors does not hold the weights of alexnet"
        ):
            load_net("alexnet", "memory://nets/squeeze.safetensors")
    finally:
        memory.rm("/nets/squeeze.safetensors")
    assert parts.source["url"] == "memory://nets/squeeze.safetensors"
    assert torch.equal(parts.module.conv10.bias, state["classifier.1.bias"])


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "the weights.safetensors"
    save_file(torchvision_names("squeezenet1_1", squeezenet1_1(classes=4)), file)
    assert load_net("squeezenet1_1", file.as_uri()).source["file"] == "the weights.safetensors"


def test_a_net_with_classes_of_its_own_has_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(torchvision_names("squeezenet1_1", squeezenet1_1(classes=257)), file)
    parts = load_net("squeezenet1_1", file)
    assert parts.labels is None
    assert parts.signature.outputs["predictions"].shape == ("N", 257)


def test_our_own_names_come_back(tmp_path: Path) -> None:
    file = tmp_path / "digits.safetensors"
    net = nets.lenet(classes=5)
    save_file(net.state_dict(), file)
    parts = load_net("lenet", file)
    assert parts.source["layout"] == "kindling"
    assert parts.signature.outputs["predictions"].shape == ("N", 5)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in parts.module.state_dict().items())


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    state = torchvision_names("squeezenet1_1", squeezenet1_1())
    save_file({name: value.bfloat16() for name, value in state.items()}, file)
    parts = load_net("squeezenet1_1", file)
    assert {p.dtype for p in parts.module.parameters()} == {torch.float32}


def test_the_weights_of_another_net_are_refused_by_layer_and_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(torchvision_names("mobilenet_v2", mobilenet_v2()), file)
    with pytest.raises(FormatError) as caught:
        load_net("squeezenet1_1", file)
    message = str(caught.value)
    assert str(file) in message
    assert "conv1 needs 'features.0.weight' (64, 3, 3, 3), which the file lacks" in message
    assert "Not part of it: 'features.0.0.weight' (32, 3, 3, 3)" in message
    assert "They are the weights of mobilenet_v2." in message
    assert "torchvision, torchvision-notop, keras" in message


def test_a_layer_of_another_width_is_named(tmp_path: Path) -> None:
    state = torchvision_names("squeezenet1_1", squeezenet1_1())
    state["features.9.squeeze.weight"] = torch.zeros(40, 256, 1, 1)
    del state["features.12.expand3x3.bias"]
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    with pytest.raises(FormatError) as caught:
        load_net("squeezenet1_1", file)
    message = str(caught.value)
    assert "50 of 52 tensors fit its layout 'torchvision'" in message
    assert "fire6.squeeze1x1 needs 'features.9.squeeze.weight' (48, 256, 1, 1), which is (40, 256, 1, 1)" in message
    assert "fire9.expand3x3 needs 'features.12.expand3x3.bias' (256,), which the file lacks" in message


def test_one_tensor_too_many_is_refused(tmp_path: Path) -> None:
    state = torchvision_names("squeezenet1_1", squeezenet1_1())
    save_file({**state, "extra.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match=r"Not part of it: 'extra.weight' \(2,\)"):
        load_net("squeezenet1_1", tmp_path / "weights.safetensors")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = torchvision_names("squeezenet1_1", squeezenet1_1())
    state["classifier.1.bias"][7] = float("nan")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match=r"'classifier.1.bias' holds numbers that are not finite"):
        load_net("squeezenet1_1", tmp_path / "weights.safetensors")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = torchvision_names("squeezenet1_1", squeezenet1_1())
    save_file({name: value.to(torch.int8) for name, value in state.items()}, tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match="is int8, not floating point"):
        load_net("squeezenet1_1", tmp_path / "weights.safetensors")


def test_a_missing_file_offers_the_published_names() -> None:
    with pytest.raises(FormatError, match=r"no file 'vgg16-torchvison', .* Did you mean 'vgg16-torchvision'"):
        load_net("vgg16", "vgg16-torchvison")


def test_published_weights_of_another_net_are_refused() -> None:
    with pytest.raises(FormatError, match="are the weights of vgg16, not of alexnet"):
        load_net("alexnet", "vgg16-keras")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"layout='caffe' is none of vgg16's\. Use one of torchvision, torchvision-notop"
    ):
        load_net("vgg16", layout="caffe")


def test_a_published_file_brings_its_own_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "renamed.pth"
    torch.save(torchvision_names("mobilenet_v2", mobilenet_v2()), file)
    newer = CATALOG["mobilenet_v2-torchvision-v2"]
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    monkeypatch.setattr("kindling.formats.catalog.CATALOG", {newer.name: replace(newer, digest=digest)})
    parts = load_net("mobilenet_v2", file)
    step = parts.preparation.inputs[0]
    assert (step.resize_to, step.size) == (232, (224, 224))
    assert parts.source["published"] == newer.name
    assert parts.source["licence"].startswith("BSD-3-Clause")


def test_a_file_that_fits_two_layouts_takes_the_one_that_is_said(tmp_path: Path) -> None:
    net = mobilenet_v2(classes=None, batch_norm=False)
    file = tmp_path / "weights.safetensors"
    save_file(torchvision_names("mobilenet_v2", net), file)
    with pytest.raises(FormatError, match="fits the layouts"):
        load_net("mobilenet_v2", file)
    parts = load_net("mobilenet_v2", file, layout="tensorflow-notop")
    assert "conv1_pad" in dict(parts.module.named_children())
    assert parts.preparation.inputs[0].mean == (1.0,)
    assert parts.signature.outputs == {"conv2": replace(parts.signature.outputs["conv2"], shape=("N", 1280, 7, 7))}


def test_labels_are_imagenets() -> None:
    labels = imagenet_labels()
    assert len(labels) == len(set(labels)) == 1000
    assert [labels[n] for n in (0, 1, 404, 697, 968, 999)] == [
        "tench",
        "goldfish",
        "airliner",
        "pajama",
        "cup",
        "toilet tissue",
    ]


# Real files


@pytest.mark.needs_data
@pytest.mark.usefixtures("no_network")
def test_the_real_squeezenet_file(data_dir: Path) -> None:
    parts = load_net("squeezenet1_1", data_dir / SQUEEZENET)
    assert parts.source["layout"] == "keras-notop"
    assert parts.source["published"] == "squeezenet1_1-keras-notop"
    assert parts.labels is None
    assert parts.signature.outputs["fire9"].shape == ("N", 512, 13, 13)
    step = parts.preparation.inputs[0]
    assert (step.channels, step.size, step.mean, step.scale) == ("BGR", (227, 227), (104.0, 117.0, 123.0), 1.0)
    assert list(dict(parts.module.named_children()))[-1] == "fire9"  # no dead head


def photos(data_dir: Path, each: int) -> list[tuple[bytes, list[int]]]:
    with (data_dir / "caltech101" / "imagenet_counterparts.tsv").open(encoding="utf-8") as stream:
        right = {
            row["class"]: [int(i) for i in row["imagenet_indices_0_based"].split(",")]
            for row in csv.DictReader(stream, delimiter="\t")
        }
    found = []
    for folder in sorted((data_dir / "caltech101_mini").iterdir()):
        if folder.name in right:
            found += [(file.read_bytes(), right[folder.name]) for file in sorted(folder.glob("*.jpg"))[:each]]
    return found


def run(parts: Any, content: list[bytes]) -> torch.Tensor:
    import pyarrow as pa

    packed = parts.preparation.pack(pa.RecordBatch.from_pydict({"content": content}), targets=False)
    assert not packed.errors
    batch = parts.preparation.batch(packed.arrays, targets=False)
    with torch.inference_mode():
        return next(iter(parts.signature.call(parts.module, batch).values()))


@pytest.mark.needs_data
def test_the_real_mobilenet_file_knows_what_is_on_photos(data_dir: Path) -> None:
    parts = load_net("mobilenet_v2", data_dir / MOBILENET)
    assert parts.source["layout"] == "tensorflow"
    assert parts.labels is not None
    assert parts.labels[:2] == ("background", "tench")
    sample = photos(data_dir, 6)
    assert len(sample) >= 30
    scores = run(parts, [content for content, _ in sample])
    answers = [parts.labels[i] for i in scores.argmax(1).tolist()]
    right = [
        answer in {imagenet_labels()[i] for i in indices} for answer, (_, indices) in zip(answers, sample, strict=True)
    ]
    assert np.mean(right) > 0.6, answers


@pytest.mark.needs_data
def test_the_real_squeezenet_tells_classes_apart(data_dir: Path) -> None:
    """Nearest class mean on pooled features: a net whose kernels were turned wrongly is near chance (0.1)."""
    parts = load_net("squeezenet1_1", data_dir / SQUEEZENET)
    features, classes = [], []
    for number, folder in enumerate(sorted(f for f in (data_dir / "caltech101_mini").iterdir() if f.is_dir())):
        out = run(parts, [file.read_bytes() for file in sorted(folder.glob("*.jpg"))[:8]])
        features.append(torch.nn.functional.normalize(out.mean((2, 3)), dim=1))
        classes += [number] * 4
    means = torch.stack([rows[:4].mean(0) for rows in features])
    means = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    test = torch.cat([rows[4:] for rows in features])
    found = (test @ means.T).argmax(1)
    accuracy = float((found == torch.tensor(classes)).float().mean())
    assert accuracy > 0.75, accuracy


@pytest.mark.slow
def test_vgg16_in_full_size_from_a_keras_file(tmp_path: Path) -> None:
    """The published layout in the published size, 528 MB: Keras HDF5 in, the same numbers in torch's order out."""
    import h5py

    file = tmp_path / "vgg16.h5"
    layout = next(known for known in NETS["vgg16"].layouts if known.name == "keras")
    with torch.device("meta"):
        net = layout.build(1000)
    kernels: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    with h5py.File(file, "w") as root:
        root.attrs["layer_names"] = [name.encode() for name in ("input_1", *layout.layers, "flatten")]
        root.create_group("input_1").attrs["weight_names"] = []
        root.create_group("flatten").attrs["weight_names"] = []
        for name in layout.layers:
            shape = tuple(net.get_submodule(name).weight.shape)
            theirs = (*shape[2:], shape[1], shape[0])
            kernel = rng.standard_normal(theirs, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}_W_1:0".encode(), f"{name}_b_1:0".encode()]
            group[f"{name}_W_1:0"], group[f"{name}_b_1:0"] = kernel, np.zeros(shape[0], np.float32)
            if name in ("block1_conv2", "fc1", "fc2"):
                kernels[name] = kernel
    assert 553_000_000 < file.stat().st_size < 554_000_000
    parts = load_net("vgg16", file)
    assert parts.source["layout"] == "keras"
    assert parts.preparation.inputs[0].channels == "BGR"
    assert sum(p.numel() for p in parts.module.parameters()) == 138_357_544
    state = parts.module.state_dict()
    for out, within, row, column in ((0, 0, 0, 0), (63, 5, 2, 1)):
        assert (
            state["block1_conv2.weight"][out, within, row, column] == kernels["block1_conv2"][row, column, within, out]
        )
    for unit, channel, row, column in ((0, 0, 0, 1), (4095, 511, 6, 6), (17, 300, 2, 5)):
        place = (row * 7 + column) * 512 + channel  # Keras: height, width, channels
        assert state["fc1.weight"][unit, channel * 49 + row * 7 + column] == kernels["fc1"][place, unit]
    assert torch.equal(state["fc2.weight"], torch.from_numpy(kernels["fc2"]).T)
