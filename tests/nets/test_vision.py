"""The nets' arithmetic against independent definitions: torchvision's published modules, and Keras's in plain NumPy.

Each reference is written here from the published source, with the published names, and given random weights; the file
layout then has to bring them into our net so that both give the same scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError
from kindling.formats import Layout, Stored, load, recognise
from kindling.nets import NETS, alexnet, lenet, mobilenet_v2, squeezenet1_1, vgg16
from kindling.nets.vision import vgg

# torchvision's definitions


class _Classifier(nn.Module):
    def __init__(self, features: nn.Module, classifier: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier, self.between = features, classifier, between

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.between(self.features(x))), 1)


def tv_alexnet(classes: int = 1000) -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2)),
        *(nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2)),
        *(nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, kernel_size=3, padding=1)),
        *(nn.ReLU(), nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2)),
    )
    classifier = nn.Sequential(
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, classes),
    )
    return _Classifier(features, classifier, nn.Sequential(nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten()))


def tv_vgg(cfg: list[int | str], hidden: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for v in cfg:
        if isinstance(v, str):
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.ReLU()]
            channels = v
    classifier = nn.Sequential(
        *(nn.Linear(channels * 7 * 7, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(hidden, classes)),
    )
    return _Classifier(nn.Sequential(*layers), classifier, nn.Sequential(nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten()))


class _TvFire(nn.Module):
    def __init__(self, planes: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(planes, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def tv_squeezenet(classes: int = 1000) -> nn.Module:
    pool = partial(nn.MaxPool2d, kernel_size=3, stride=2, ceil_mode=True)
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, kernel_size=3, stride=2), nn.ReLU(), pool()),
        *(_TvFire(64, 16, 64), _TvFire(128, 16, 64), pool(), _TvFire(128, 32, 128), _TvFire(256, 32, 128), pool()),
        *(_TvFire(256, 48, 192), _TvFire(384, 48, 192), _TvFire(384, 64, 256), _TvFire(512, 64, 256)),
    )
    classifier = nn.Sequential(
        nn.Dropout(0.5), nn.Conv2d(512, classes, kernel_size=1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))
    )
    return _Classifier(features, classifier, nn.Identity())


def _conv_bn(inp: int, oup: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inp, oup, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(oup), nn.ReLU6())


class _TvInvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == oup
        hidden = inp * expand_ratio
        layers: list[nn.Module] = [] if expand_ratio == 1 else [_conv_bn(inp, hidden, kernel=1)]
        layers += [
            _conv_bn(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def tv_mobilenet(classes: int = 1000) -> nn.Module:
    channels, features = 32, [_conv_bn(3, 32, stride=2)]
    for t, c, n, s in [
        *[(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)],
        *[(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)],
    ]:
        for i in range(n):
            features.append(_TvInvertedResidual(channels, c, s if i == 0 else 1, t))
            channels = c
    features.append(_conv_bn(320, 1280, kernel=1))
    classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
    return _Classifier(nn.Sequential(*features), classifier, nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()))


def shuffled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and statistics that keep the signal's size, so that every layer is seen in the scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() >= 2:
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0.3 if name.endswith("weight") else 0, 0.2, generator=generator)
            if name.endswith("weight"):
                tensor.abs_().add_(0.5)
    return module.eval()


def stored(state: Mapping[str, Tensor]) -> dict[str, Stored]:
    return {
        name: Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.clone)
        for name, value in state.items()
    }


def brought(
    net: str, tensors: Mapping[str, Tensor], layouts: tuple[Layout, ...] | None = None
) -> tuple[nn.Module, Layout]:
    kept = stored(tensors)
    match = recognise("the test's weights", net, layouts or NETS[net].layouts, kept)
    return load(match, kept, "the test's weights"), match.layout


def picture(side: int, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


NARROW = ((3, 4), (5,), (6, 6), (7,), (8, 9))


def narrow_layout(name: str) -> Layout:
    """VGG16's own layout over a narrow VGG: the same code, 10,000 times smaller."""
    layout = next(known for known in NETS["vgg16"].layouts if known.name == name)
    convs = [f"block{b}_conv{n}" for b, widths in enumerate(NARROW, 1) for n in range(1, len(widths) + 1)]
    places = {"torchvision": [f"features.{p}" for p in (0, 2, 5, 8, 10, 13, 16, 18)], "keras": convs}[name]
    layers = dict(zip(convs, places, strict=True))
    layers |= {own: theirs for own, theirs in layout.layers.items() if not own.startswith("block")}
    flattened = {"fc1": "block5_conv2"} if name == "keras" else {}
    return replace(layout, build=lambda classes: vgg(NARROW, 11, classes), layers=layers, flattened=flattened)


@pytest.mark.parametrize(
    ("net", "reference", "side"),
    [("alexnet", tv_alexnet, 224), ("squeezenet1_1", tv_squeezenet, 224), ("mobilenet_v2", tv_mobilenet, 224)],
)
def test_scores_are_torchvisions(net: str, reference: Any, side: int) -> None:
    theirs = shuffled(reference())
    ours, layout = brought(net, theirs.state_dict())
    assert layout.name == "torchvision"
    with torch.inference_mode():
        want, got = theirs(picture(side)), ours(picture(side))
    assert want.std() > 1e-3  # a reference that says the same of every picture would prove nothing
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_vgg_scores_are_torchvisions() -> None:
    cfg: list[int | str] = [3, 4, "M", 5, "M", 6, 6, "M", 7, "M", 8, 9, "M"]
    theirs = shuffled(tv_vgg(cfg, 11, 13))
    ours, _ = brought("vgg16", theirs.state_dict(), (narrow_layout("torchvision"),))
    with torch.inference_mode():
        torch.testing.assert_close(ours(picture(224)), theirs(picture(224)), rtol=1e-4, atol=1e-5)


def test_torchvisions_vgg16_has_the_names_and_shapes_of_its_layout() -> None:
    cfg: list[int | str] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    with torch.device("meta"):
        state = tv_vgg(cfg, 4096, 1000).state_dict()
    match = recognise("published", "vgg16", NETS["vgg16"].layouts, stored(state))
    assert match.layout.name == "torchvision"
    assert [slot.theirs for slot in match.slots] == list(state)  # same order: no two layers of one shape are swapped


@pytest.mark.parametrize("net", ["alexnet", "squeezenet1_1", "mobilenet_v2"])
def test_without_the_classifier_the_net_ends_at_its_last_feature_layer(net: str) -> None:
    theirs = shuffled({"alexnet": tv_alexnet, "squeezenet1_1": tv_squeezenet, "mobilenet_v2": tv_mobilenet}[net]())
    features = {name: value for name, value in theirs.state_dict().items() if name.startswith("features")}
    ours, layout = brought(net, features)
    assert layout.name == "torchvision-notop"
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.features.parameters())
    with torch.inference_mode():
        want = theirs.features(picture(224))
        torch.testing.assert_close(ours(picture(224)), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_folded_batch_norm_gives_the_scores_of_the_unfolded_net() -> None:
    theirs = shuffled(tv_mobilenet())
    state = theirs.state_dict()
    folded = {}
    for name in [name for name in state if name.endswith("running_mean")]:
        norm = name.rpartition(".")[0]
        head, _, place = norm.rpartition(".")
        conv = f"{head}.{int(place) - 1}"
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        folded[f"{conv}.weight"] = state[f"{conv}.weight"] * factor[:, None, None, None]
        folded[f"{conv}.bias"] = state[f"{norm}.bias"] - state[name] * factor
    folded |= {name: value for name, value in state.items() if name.startswith("classifier")}
    ours, layout = brought("mobilenet_v2", folded)
    assert layout.name == "torchvision-folded"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    with torch.inference_mode():
        want = theirs(picture(96))
        torch.testing.assert_close(ours(picture(96)), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


# Keras, in NumPy: pictures are (height, width, channels), kernels (height, width, in, out)


def np_conv(
    x: np.ndarray, kernel: np.ndarray, *, stride: int = 1, same: bool = False, depthwise: bool = False
) -> np.ndarray:
    height, width = kernel.shape[:2]
    if same:
        pads = []
        for side, k in ((x.shape[0], height), (x.shape[1], width)):
            total = max((-(-side // stride) - 1) * stride + k - side, 0)  # TensorFlow's SAME
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, (*pads, (0, 0)))
    rows, columns = (x.shape[0] - height) // stride + 1, (x.shape[1] - width) // stride + 1
    out = 0.0
    for i in range(height):
        for j in range(width):
            view = x[i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
            out = out + (view * kernel[i, j, :, 0] if depthwise else view @ kernel[i, j])
    return np.asarray(out)


def np_pool(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    rows, columns = (x.shape[0] - size) // stride + 1, (x.shape[1] - size) // stride + 1
    views = [
        x[i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return np.max(views, axis=0)


Weights = dict[str, np.ndarray]


def np_vgg(x: np.ndarray, w: Weights) -> np.ndarray:
    for block, widths in enumerate(NARROW, 1):
        for number in range(1, len(widths) + 1):
            name = f"block{block}_conv{number}"
            x = np.maximum(np_conv(x, w[f"{name}/kernel"], same=True) + w[f"{name}/bias"], 0)
        x = np_pool(x, 2, 2)
    x = x.reshape(-1)  # height, width, channels: Keras's order
    for name in ("fc1", "fc2"):
        x = np.maximum(x @ w[f"{name}/kernel"] + w[f"{name}/bias"], 0)
    return x @ w["predictions/kernel"] + w["predictions/bias"]


def np_squeezenet(x: np.ndarray, w: Weights) -> np.ndarray:
    def conv(x: np.ndarray, name: str, **how: Any) -> np.ndarray:
        return np.maximum(np_conv(x, w[f"{name}/kernel"], **how) + w[f"{name}/bias"], 0)

    x = np_pool(conv(x, "conv1", stride=2), 3, 2)
    for fire in range(2, 10):
        x = conv(x, f"fire{fire}/squeeze1x1")
        sides = [conv(x, f"fire{fire}/expand1x1"), conv(x, f"fire{fire}/expand3x3", same=True)]
        x = np.concatenate(sides, axis=-1)
        if fire in (3, 5):
            x = np_pool(x, 3, 2)
    return conv(x, "conv10").mean(axis=(0, 1)) if "conv10/kernel" in w else x


def np_mobilenet(x: np.ndarray, w: Weights) -> np.ndarray:
    def conv(x: np.ndarray, name: str, norm: str, relu: bool = True, **how: Any) -> np.ndarray:
        x = np_conv(x, w[f"{name}/kernel"], **how)
        x = (x - w[f"{norm}/moving_mean"]) / np.sqrt(w[f"{norm}/moving_variance"] + 1e-3)
        x = x * w[f"{norm}/gamma"] + w[f"{norm}/beta"]
        return np.clip(x, 0, 6) if relu else x

    x = conv(x, "Conv1", "bn_Conv1", stride=2, same=True)
    for block in range(17):
        name = f"block_{block}_" if block else "expanded_conv_"
        before = x
        if block:
            x = conv(x, f"{name}expand", f"{name}expand_BN")
        stride = 2 if block in (1, 3, 6, 13) else 1
        x = conv(x, f"{name}depthwise", f"{name}depthwise_BN", stride=stride, same=True, depthwise=True)
        x = conv(x, f"{name}project", f"{name}project_BN", relu=False)
        if x.shape == before.shape:
            x = x + before
    x = conv(x, "Conv_1", "Conv_1_bn").mean(axis=(0, 1))
    return x @ w["predictions/kernel"] + w["predictions/bias"]


def keras_weights(shapes: Iterator[tuple[str, tuple[int, ...]]], seed: int = 3) -> Weights:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes:
        role = name.rpartition("/")[2]
        if role == "kernel":
            depthwise = len(shape) == 4 and shape[3] == 1
            fan_in = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
            weights[name] = rng.normal(0, (2 / fan_in) ** 0.5, shape)
        else:
            weights[name] = (
                rng.uniform(0.5, 1.5, shape) if role in ("gamma", "moving_variance") else rng.normal(0, 0.2, shape)
            )
    return weights


def keras_mobilenet_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for role in ("gamma", "beta", "moving_mean", "moving_variance"):
            yield f"{name}/{role}", (width,)

    yield "Conv1/kernel", (3, 3, 3, 32)
    yield from norm("bn_Conv1", 32)
    channels = 32
    widths = [16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320]
    for block, width in enumerate(widths):
        name, hidden = (f"block_{block}_", channels * 6) if block else ("expanded_conv_", channels)
        if block:
            yield f"{name}expand/kernel", (1, 1, channels, hidden)
            yield from norm(f"{name}expand_BN", hidden)
        yield f"{name}depthwise/kernel", (3, 3, hidden, 1)
        yield from norm(f"{name}depthwise_BN", hidden)
        yield f"{name}project/kernel", (1, 1, hidden, width)
        yield from norm(f"{name}project_BN", width)
        channels = width
    yield "Conv_1/kernel", (1, 1, 320, 1280)
    yield from norm("Conv_1_bn", 1280)
    yield from (("predictions/kernel", (1280, 1000)), ("predictions/bias", (1000,)))


def keras_squeezenet_shapes(classes: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    def conv(name: str, kernel: int, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}/kernel", (kernel, kernel, before, after)), (f"{name}/bias", (after,)))

    yield from conv("conv1", 3, 3, 64)
    channels = 64
    for fire, squeeze, expand in zip(
        range(2, 10), (16, 16, 32, 32, 48, 48, 64, 64), (64, 64, 128, 128, 192, 192, 256, 256), strict=True
    ):
        yield from conv(f"fire{fire}/squeeze1x1", 1, channels, squeeze)
        yield from conv(f"fire{fire}/expand1x1", 1, squeeze, expand)
        yield from conv(f"fire{fire}/expand3x3", 3, squeeze, expand)
        channels = 2 * expand
    if classes is not None:
        yield from conv("conv10", 1, 512, classes)


def keras_vgg_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = 3
    for block, widths in enumerate(NARROW, 1):
        for number, width in enumerate(widths, 1):
            yield f"block{block}_conv{number}/kernel", (3, 3, channels, width)
            yield f"block{block}_conv{number}/bias", (width,)
            channels = width
    for name, before, after in (("fc1", 7 * 7 * channels, 11), ("fc2", 11, 11), ("predictions", 11, 13)):
        yield from ((f"{name}/kernel", (before, after)), (f"{name}/bias", (after,)))


@pytest.mark.parametrize(
    ("net", "reference", "shapes", "side", "layout"),
    [
        ("vgg16", np_vgg, keras_vgg_shapes, 224, "keras"),
        ("squeezenet1_1", np_squeezenet, partial(keras_squeezenet_shapes, 1000), 227, "keras"),
        ("squeezenet1_1", np_squeezenet, partial(keras_squeezenet_shapes, None), 227, "keras-notop"),
        ("mobilenet_v2", np_mobilenet, keras_mobilenet_shapes, 96, "keras"),
    ],
)
def test_scores_are_those_of_keras(net: str, reference: Any, shapes: Any, side: int, layout: str) -> None:
    weights = keras_weights(shapes())
    layouts = (narrow_layout("keras"),) if net == "vgg16" else None
    ours, found = brought(net, {name: torch.from_numpy(value).float() for name, value in weights.items()}, layouts)
    assert found.name == layout
    x = np.random.default_rng(5).normal(size=(side, side, 3))
    want = reference(x, weights)
    with torch.inference_mode():
        got = ours(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0]
    if want.ndim == 3:
        want = want.transpose(2, 0, 1)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_keras_mobilenet_with_its_old_name_of_the_last_layer() -> None:
    weights = {name.replace("predictions", "Logits"): shape for name, shape in keras_mobilenet_shapes()}
    match = recognise(
        "old", "mobilenet_v2", NETS["mobilenet_v2"].layouts, stored({n: torch.empty(s) for n, s in weights.items()})
    )
    assert match.layout.name == "keras"


# Shapes, names, counts


def test_vgg16_has_the_published_number_of_parameters_in_each_layer() -> None:
    with torch.device("meta"):
        net = vgg16()
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in net.named_children()}
    published = {
        "block1_conv1": 1_792,
        "block1_conv2": 36_928,
        "block2_conv1": 73_856,
        "block2_conv2": 147_584,
        "block3_conv1": 295_168,
        "block3_conv2": 590_080,
        "block3_conv3": 590_080,
        "block4_conv1": 1_180_160,
        "block4_conv2": 2_359_808,
        "block4_conv3": 2_359_808,
        "block5_conv1": 2_359_808,
        "block5_conv2": 2_359_808,
        "block5_conv3": 2_359_808,
        "fc1": 102_764_544,
        "fc2": 16_781_312,
        "predictions": 4_097_000,
    }
    assert {name: count for name, count in counts.items() if count} == published
    assert sum(counts.values()) == 138_357_544
    plain = [name for name in counts if not name.endswith("_relu") and not name.startswith("dropout")]
    assert plain == [
        *["block1_conv1", "block1_conv2", "block1_pool", "block2_conv1", "block2_conv2", "block2_pool"],
        *["block3_conv1", "block3_conv2", "block3_conv3", "block3_pool"],
        *["block4_conv1", "block4_conv2", "block4_conv3", "block4_pool"],
        *["block5_conv1", "block5_conv2", "block5_conv3", "block5_pool", "flatten", "fc1", "fc2", "predictions"],
    ]


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(alexnet, 61_100_840), (squeezenet1_1, 1_235_496), (mobilenet_v2, 3_504_872), (lenet, 431_080)],
)
def test_published_number_of_parameters(build: Any, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


@pytest.mark.parametrize("build", [lenet, alexnet, vgg16, squeezenet1_1, mobilenet_v2])
def test_classes_are_checked(build: Any) -> None:
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="classes"), torch.device("meta"):
            build(classes=wrong)


@pytest.mark.parametrize("build", [lenet, alexnet, vgg16, squeezenet1_1, mobilenet_v2])
def test_a_random_start_follows_torchs_seed_and_leaves_no_meta_tensor(build: Any) -> None:
    build = partial(build, classes=None)  # VGG16's classifier alone takes seconds
    torch.manual_seed(4)
    first = build().state_dict()
    torch.manual_seed(4)
    second = build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(5)
    third = build().state_dict()
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_tensorflow_padding_differs_from_torchvisions_by_one_pixel() -> None:
    torch.manual_seed(0)
    plain, same = (
        mobilenet_v2(classes=None, batch_norm=False),
        mobilenet_v2(classes=None, batch_norm=False, tensorflow=True),
    )
    kernel = torch.zeros(32, 3, 3, 3)
    kernel[:, 0, 0, 0] = 1  # the upper left pixel of the window
    plain.conv1.weight.data, same.conv1.weight.data = kernel.clone(), kernel.clone()
    plain.conv1.bias.data.zero_(), same.conv1.bias.data.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    with torch.inference_mode():
        assert plain.conv1(x)[0, 0].tolist() == [[0, 0], [0, 5]]  # rows and columns -1 and 1
        assert same.conv1(same.conv1_pad(x))[0, 0].tolist() == [[0, 2], [8, 10]]  # rows and columns 0 and 2
