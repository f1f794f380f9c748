"""Every layer type against Caffe's arithmetic, written out in numpy from the documentation of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kindling.errors import FormatError
from kindling.formats.caffe.layers import forget_layer, register_layer
from kindling.formats.models import Imported
from kindling.model import Model

RNG = np.random.default_rng(0)
Make = Callable[..., Imported]


def inputs(*shapes: tuple[int, ...]) -> str:
    lines = []
    for place, shape in enumerate(shapes):
        dims = " ".join(f"dim: {size}" for size in shape)
        lines.append(
            f'layer {{ name: "in{place}" type: "Input" top: "x{place}" input_param {{ shape {{ {dims} }} }} }}'
        )
    return "\n".join(lines)


def one(kind: str, settings: str = "", bottoms: int = 1, tops: int = 1, name: str = "it") -> str:
    above = " ".join(f'bottom: "x{k}"' for k in range(bottoms))
    below = " ".join(f'top: "y{k}"' for k in range(tops))
    return f'layer {{ name: "{name}" type: "{kind}" {above} {below} {settings} }}'


def run(made: Imported, *arrays: np.ndarray) -> Any:
    with torch.no_grad():
        out = made.module(*(torch.from_numpy(np.asarray(a, np.float32)) for a in arrays))
    return [part.numpy() for part in out] if isinstance(out, tuple) else out.numpy()


def rand(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- references


def conv_reference(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: Any, pad: Any, dilation: Any, group: int
) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    n, c, h, wide = x.shape
    out_h = (h - dilation[0] * (w.shape[2] - 1) - 1) // stride[0] + 1
    out_w = (wide - dilation[1] * (w.shape[3] - 1) - 1) // stride[1] + 1
    out = np.zeros((n, len(w), out_h, out_w))
    for o in range(len(w)):
        first = o // (len(w) // group) * (c // group)
        for i in range(out_h):
            for j in range(out_w):
                patch = x[
                    :,
                    first : first + c // group,
                    i * stride[0] : i * stride[0] + dilation[0] * (w.shape[2] - 1) + 1 : dilation[0],
                    j * stride[1] : j * stride[1] + dilation[1] * (w.shape[3] - 1) + 1 : dilation[1],
                ]
                out[:, o, i, j] = (patch * w[o]).sum((1, 2, 3)) + b[o]
    return out.astype(np.float32)


def pool_reference(x: np.ndarray, kernel: Any, stride: Any, pad: Any, method: str, ceil: bool = True) -> np.ndarray:
    """The loops of Caffe's pooling layer."""
    height, width = x.shape[2:]
    rounded = math.ceil if ceil else math.floor
    sizes = [rounded((s + 2 * p - k) / t) + 1 for s, p, k, t in zip((height, width), pad, kernel, stride, strict=True)]
    if any(pad):
        sizes = [
            n - 1 if (n - 1) * t >= s + p else n for n, t, s, p in zip(sizes, stride, (height, width), pad, strict=True)
        ]
    out = np.zeros((*x.shape[:2], *sizes), np.float32)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            top, left = i * stride[0] - pad[0], j * stride[1] - pad[1]
            area = (min(top + kernel[0], height + pad[0]) - top) * (min(left + kernel[1], width + pad[1]) - left)
            part = x[:, :, max(top, 0) : min(top + kernel[0], height), max(left, 0) : min(left + kernel[1], width)]
            if method == "MAX":
                out[:, :, i, j] = part.max((2, 3)) if part.size else -np.finfo(np.float32).max
            elif method == "AVE":
                out[:, :, i, j] = part.sum((2, 3)) / area
            else:
                total = part.sum((2, 3))
                out[:, :, i, j] = np.where(total > 0, (part * part).sum((2, 3)) / np.where(total > 0, total, 1), 0)
    return out


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("settings", "kernel", "stride", "pad", "dilation", "group"),
    [
        ("kernel_size: 3", (3, 3), (1, 1), (0, 0), (1, 1), 1),
        ("kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 1 pad_w: 2", (3, 2), (2, 1), (1, 2), (1, 1), 1),
        ("kernel_size: 3 kernel_size: 1 stride: 1 stride: 2 pad: 0 pad: 1", (3, 1), (1, 2), (0, 1), (1, 1), 1),
        ("kernel_size: 3 dilation: 2 pad: 2 group: 2", (3, 3), (1, 1), (2, 2), (2, 2), 2),
    ],
)
def test_convolution(net: Make, settings: str, kernel: Any, stride: Any, pad: Any, dilation: Any, group: int) -> None:
    x, w, b = rand(2, 4, 7, 6), rand(6, 4 // group, *kernel), rand(6)
    made = net(
        inputs((1, 4, 7, 6)) + one("Convolution", f"convolution_param {{ num_output: 6 {settings} }}"), {"it": [w, b]}
    )
    close(run(made, x), conv_reference(x, w, b, stride, pad, dilation, group))


def test_convolution_in_one_and_three_dimensions(net: Make) -> None:
    x, w = rand(1, 2, 9), rand(3, 2, 3)
    text = inputs((1, 2, 9)) + one("Convolution", "convolution_param { num_output: 3 kernel_size: 3 bias_term: false }")
    made = net(text, {"it": [w]})
    close(run(made, x), conv_reference(x[:, :, None], w[:, :, None], np.zeros(3), (1, 1), (0, 0), (1, 1), 1)[:, :, 0])
    x, w = rand(1, 2, 3, 4, 5), rand(3, 2, 3, 2, 2)
    settings = "convolution_param { num_output: 3 kernel_size: [3, 2, 2] bias_term: false }"
    made = net(inputs((1, 2, 3, 4, 5)) + one("Convolution", settings), {"it": [w]})
    flat = conv_reference(x.reshape(1, 6, 4, 5), w.reshape(3, 6, 2, 2), np.zeros(3), (1, 1), (0, 0), (1, 1), 1)
    close(run(made, x), flat[:, :, None])


def test_a_convolution_over_two_bottoms_uses_its_weights_twice(net: Make) -> None:
    x, z, w, b = rand(1, 2, 4, 4), rand(1, 2, 4, 4), rand(3, 2, 3, 3), rand(3)
    text = inputs((1, 2, 4, 4), (1, 2, 4, 4))
    text += one("Convolution", "convolution_param { num_output: 3 kernel_size: 3 }", 2, 2)
    made = net(text, {"it": [w, b]})
    for got, source in zip(run(made, x, z), (x, z), strict=True):
        close(got, conv_reference(source, w, b, (1, 1), (0, 0), (1, 1), 1))
    assert sum(p.numel() for p in made.module.parameters()) == w.size + b.size


def test_deconvolution_is_the_transpose_of_convolution(net: Make) -> None:
    x, w = rand(1, 4, 3, 3), rand(4, 1, 4, 4)
    settings = "convolution_param { num_output: 2 kernel_size: 4 stride: 2 pad: 1 group: 2 bias_term: false }"
    made = net(inputs((1, 4, 3, 3)) + one("Deconvolution", settings), {"it": [w]})
    got = run(made, x)
    assert got.shape == (1, 2, 6, 6)
    y = rand(1, 2, 6, 6)  # <deconv(x), y> == <x, conv(y)>, with the same blob
    back = conv_reference(y, w, np.zeros(4), (2, 2), (1, 1), (1, 1), 2)
    assert float((got * y).sum()) == pytest.approx(float((x * back).sum()), rel=1e-4)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("transpose", [False, True])
def test_inner_product(net: Make, axis: int, transpose: bool) -> None:
    x = rand(2, 3, 4, 5)
    inside = math.prod(x.shape[axis % 4 :])
    w, b = rand(7, inside), rand(7)
    settings = f"inner_product_param {{ num_output: 7 axis: {axis} transpose: {str(transpose).lower()} }}"
    made = net(inputs((2, 3, 4, 5)) + one("InnerProduct", settings), {"it": [w.T if transpose else w, b]})
    close(run(made, x), x.reshape(*x.shape[: axis % 4], inside) @ w.T + b)


def test_embed(net: Make) -> None:
    w, b = rand(10, 3), rand(3)
    made = net(inputs((2, 4)) + one("Embed", "embed_param { input_dim: 10 num_output: 3 }"), {"it": [w, b]})
    rows = np.array([[0, 9, 3, 3], [1, 2, 5, 7]])
    close(run(made, rows), w[rows] + b)


# ---------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("method", ["MAX", "AVE"])
@pytest.mark.parametrize("size", [(7, 8), (6, 5), (3, 3)])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [(3, 2, 0), (3, 2, 1), (2, 2, 1), (2, 1, 0), (3, 3, 2), (3, 1, 2), (2, 3, 1)]
)
@pytest.mark.parametrize("ceil", [True, False])
def test_pooling_rounds_and_counts_as_caffe_does(
    net: Make, method: str, size: tuple[int, int], kernel: int, stride: int, pad: int, ceil: bool
) -> None:
    x = rand(1, 2, *size)
    settings = (
        f"pooling_param {{ pool: {method} kernel_size: {kernel} stride: {stride} pad: {pad} "
        f"round_mode: {'CEIL' if ceil else 'FLOOR'} }}"
    )
    made = net(inputs((1, 2, *size)) + one("Pooling", settings))
    close(run(made, x), pool_reference(x, (kernel,) * 2, (stride,) * 2, (pad,) * 2, method, ceil))


def test_pooling_with_sides_of_its_own_and_over_the_whole_picture(net: Make) -> None:
    x = rand(2, 3, 7, 6)
    settings = "pooling_param { pool: AVE kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 1 pad_w: 0 }"
    close(
        run(net(inputs((1, 3, 7, 6)) + one("Pooling", settings)), x), pool_reference(x, (3, 2), (2, 1), (1, 0), "AVE")
    )
    for method, mean in (("AVE", x.mean((2, 3), keepdims=True)), ("MAX", x.max((2, 3), keepdims=True))):
        settings = f"pooling_param {{ pool: {method} global_pooling: true }}"
        close(run(net(inputs((1, 3, 7, 6)) + one("Pooling", settings)), x), mean)


def test_stochastic_pooling_draws_in_training_and_averages_at_test(net: Make) -> None:
    x = np.abs(rand(1, 2, 5, 5))
    x[0, 0, :2, :2] = 0
    made = net(inputs((1, 2, 5, 5)) + one("Pooling", "pooling_param { pool: STOCHASTIC kernel_size: 2 stride: 2 }"))
    close(run(made, x), pool_reference(x, (2, 2), (2, 2), (0, 0), "STOCHASTIC"))
    made.module.train()
    draws = np.stack([run(made, x)[0, 1, 0, 0] for _ in range(3000)])
    window = x[0, 1, :2, :2].reshape(-1)
    assert set(np.unique(draws)) <= set(window)
    assert draws.mean() == pytest.approx(float((window * window).sum() / window.sum()), rel=0.1)


def test_spatial_pyramid_pooling(net: Make) -> None:
    for method in ("MAX", "AVE"):
        x = rand(2, 3, 9, 6)
        made = net(inputs((1, 3, 9, 6)) + one("SPP", f"spp_param {{ pyramid_height: 3 pool: {method} }}"))
        parts = []
        for level in range(3):
            kernel = [math.ceil(size / 2**level) for size in (9, 6)]
            pad = [(k * 2**level - size + 1) // 2 for k, size in zip(kernel, (9, 6), strict=True)]
            parts.append(pool_reference(x, kernel, kernel, pad, method).reshape(2, -1))
        close(run(made, x), np.concatenate(parts, 1))


# ---------------------------------------------------------------------------------------------- normalisation


def test_local_response_normalisation_across_channels(net: Make) -> None:
    x = rand(2, 6, 3, 3)
    made = net(inputs((1, 6, 3, 3)) + one("LRN", "lrn_param { local_size: 5 alpha: 0.3 beta: 0.6 k: 2 }"))
    padded = np.pad(x, ((0, 0), (2, 2), (0, 0), (0, 0))) ** 2
    sums = sum(padded[:, k : k + 6] for k in range(5))
    close(run(made, x), x * (2 + 0.3 / 5 * sums) ** -0.6)


def test_a_window_wider_than_all_channels_divides_by_its_own_width(net: Make) -> None:
    x = rand(1, 2, 3, 3)
    made = net(inputs((1, 2, 3, 3)) + one("LRN", "lrn_param { local_size: 4294967295 alpha: 1e9 beta: 1 }"))
    close(run(made, x), x / (1 + 1e9 / 4294967295 * (x * x).sum(1, keepdims=True)))


def test_local_response_normalisation_within_a_channel(net: Make) -> None:
    x = rand(1, 2, 5, 4)
    settings = "lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 norm_region: WITHIN_CHANNEL }"
    made = net(inputs((1, 2, 5, 4)) + one("LRN", settings))
    mean = pool_reference(x * x, (3, 3), (1, 1), (1, 1), "AVE")
    close(run(made, x), x * (1 + 0.5 * mean) ** -0.75)


BN = "batch_norm_param { eps: 0.01 }"
SCALE = 'layer { name: "scale" type: "Scale" bottom: "y0" top: "y0" scale_param { bias_term: true } }'


def test_batch_norm_divides_its_statistics_by_their_factor(net: Make) -> None:
    x, mean, var = rand(2, 3, 4, 4), rand(3), np.abs(rand(3))
    made = net(inputs((1, 3, 4, 4)) + one("BatchNorm", BN), {"it": [mean * 4, var * 4, [4.0]]})
    close(run(made, x), (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 0.01))
    zero = net(inputs((1, 3, 4, 4)) + one("BatchNorm", BN), {"it": [mean, var, [0.0]]})
    close(run(zero, x), x / np.sqrt(np.float32(0.01)))


def test_batch_norm_and_scale_become_one_layer_and_both_names_stay(net: Make) -> None:
    x, mean, var, gamma, beta = rand(2, 3, 4, 4), rand(3), np.abs(rand(3)), rand(3), rand(3)
    blobs = {"it": [mean, var, [1.0]], "scale": [gamma, beta]}
    made = net(inputs((1, 3, 4, 4)) + one("BatchNorm", BN) + SCALE, blobs)
    g, b, m, v = (part[:, None, None] for part in (gamma, beta, mean, var))
    close(run(made, x), (x - m) / np.sqrt(v + 0.01) * g + b)
    assert isinstance(made.module.it, nn.BatchNorm2d)
    assert isinstance(made.module.scale, nn.Identity)
    assert made.training is not None
    assert set(made.training.multipliers) == {"it.weight", "it.bias"}


def test_a_batch_norm_that_others_read_too_keeps_its_own_numbers(net: Make) -> None:
    x, gamma, beta = rand(2, 3, 4, 4), rand(3), rand(3)
    text = inputs((1, 3, 4, 4)) + one("BatchNorm", BN)
    text += SCALE.replace('top: "y0"', 'top: "z"')
    text += 'layer { name: "sum" type: "Eltwise" bottom: "y0" bottom: "z" top: "s" }'
    made = net(text, {"it": [np.zeros(3), np.ones(3), [1.0]], "scale": [gamma, beta]})
    normal = x / np.sqrt(np.float32(1.01))
    close(run(made, x), normal + normal * gamma[:, None, None] + beta[:, None, None])


def test_statistics_that_are_always_used_are_not_changed_by_training(net: Make) -> None:
    settings = "batch_norm_param { use_global_stats: true }"
    made = net(inputs((4, 3, 4, 4)) + one("BatchNorm", settings) + SCALE)
    x = rand(4, 3, 4, 4) * 3 + 2
    before = run(made, x)
    made.module.train()
    close(run(made, x), before)
    learns = net(inputs((4, 3, 4, 4)) + one("BatchNorm", ""))
    learns.module.train()
    assert abs(run(learns, x).mean()) < 1e-3


def test_a_batch_norm_written_once_for_each_phase_learns_in_training(net: Make) -> None:
    both = "\n".join(
        one("BatchNorm", f"batch_norm_param {{ use_global_stats: {stats} }} include {{ phase: {phase} }}")
        for stats, phase in (("false", "TRAIN"), ("true", "TEST"))
    )
    for phase in ("TRAIN", "TEST"):
        layer = net(inputs((4, 3, 4, 4)) + both, phase=phase).module.it
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.track_running_stats


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ("axis: 1 num_axes: 1", (3,)),
        ("axis: 1 num_axes: 2", (3, 4)),
        ("axis: -2 num_axes: -1", (4, 5)),
        ("axis: 1 num_axes: 0", ()),
    ],
)
def test_scale_and_bias_lie_over_any_axes(net: Make, settings: str, shape: tuple[int, ...]) -> None:
    x, gamma, beta = rand(2, 3, 4, 5), rand(*shape), rand(*shape)
    spread = gamma.reshape(*gamma.shape, *(1,) * (4 - 1 - gamma.ndim)) if not settings.startswith("axis: -2") else gamma
    shift = beta.reshape(spread.shape)
    made = net(
        inputs((1, 3, 4, 5)) + one("Scale", f"scale_param {{ {settings} bias_term: true }}"), {"it": [gamma, beta]}
    )
    close(run(made, x), (x * spread + shift).astype(np.float32))
    made = net(inputs((1, 3, 4, 5)) + one("Bias", f"bias_param {{ {settings} }}"), {"it": [beta]})
    close(run(made, x), (x + shift).astype(np.float32))


def test_scale_and_bias_by_a_second_blob(net: Make) -> None:
    x, z = rand(2, 3, 4, 5), rand(2, 3)
    text = inputs((2, 3, 4, 5), (2, 3))
    close(run(net(text + one("Scale", "scale_param { axis: 0 }", 2)), x, z), x * z[:, :, None, None])
    close(run(net(text + one("Bias", "bias_param { axis: 0 }", 2)), x, z), x + z[:, :, None, None])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("variance", [False, True])
def test_mean_variance_normalisation(net: Make, across: bool, variance: bool) -> None:
    x = rand(2, 3, 4, 5)
    words = f"across_channels: {str(across).lower()} normalize_variance: {str(variance).lower()} eps: 0.001"
    axes = (1, 2, 3) if across else (2, 3)
    want = x - x.mean(axes, keepdims=True)
    if variance:
        want = want / (np.sqrt((want**2).mean(axes, keepdims=True)) + 0.001)
    close(run(net(inputs((1, 3, 4, 5)) + one("MVN", f"mvn_param {{ {words} }}")), x), want)


# ---------------------------------------------------------------------------------------------- elementwise

POSITIVE = np.abs(rand(2, 3)) + 0.5
ELEMENTWISE: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "relu": ("ReLU", "", lambda x: np.maximum(x, 0)),
    "leaky": ("ReLU", "relu_param { negative_slope: 0.2 }", lambda x: np.where(x > 0, x, 0.2 * x)),
    "elu": ("ELU", "elu_param { alpha: 2 }", lambda x: np.where(x > 0, x, 2 * (np.exp(x) - 1))),
    "sigmoid": ("Sigmoid", "", lambda x: 1 / (1 + np.exp(-x))),
    "tanh": ("TanH", "", np.tanh),
    "absval": ("AbsVal", "", np.abs),
    "power": ("Power", "power_param { power: 2 scale: 0.5 shift: 3 }", lambda x: (3 + 0.5 * x) ** 2),
    "power of nothing": ("Power", "power_param { power: 2 scale: 0 shift: 3 }", lambda x: np.full_like(x, 9)),
    "power zero": ("Power", "power_param { power: 0 }", np.ones_like),
    "exp": ("Exp", "exp_param { scale: 0.5 shift: 1 }", lambda x: np.exp(1 + 0.5 * x)),
    "exp base": ("Exp", "exp_param { base: 2 scale: 0.5 shift: 1 }", lambda x: 2 ** (1 + 0.5 * x)),
    "log": ("Log", "log_param { scale: 0.5 shift: 4 }", lambda x: np.log(4 + 0.5 * x)),
    "log base": ("Log", "log_param { base: 10 scale: 0.5 shift: 4 }", lambda x: np.log10(4 + 0.5 * x)),
    "bnll": ("BNLL", "", lambda x: np.log1p(np.exp(x))),
    "threshold": ("Threshold", "threshold_param { threshold: 0.3 }", lambda x: (x > 0.3).astype(np.float32)),
    "clip": ("Clip", "clip_param { min: -0.5 max: 0.25 }", lambda x: np.clip(x, -0.5, 0.25)),
    "swish": ("Swish", "swish_param { beta: 2 }", lambda x: x / (1 + np.exp(-2 * x))),
    "swish 1": ("Swish", "", lambda x: x / (1 + np.exp(-x))),
    "dropout at test": ("Dropout", "dropout_param { dropout_ratio: 0.9 }", lambda x: x),
    "split": ("Split", "", lambda x: x),
}


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_elementwise_layers(net: Make, case: str) -> None:
    kind, settings, want = ELEMENTWISE[case]
    x = rand(2, 3, 4, 5)
    text = inputs((1, 3, 4, 5)) + one(kind, settings) + one("ReLU", name="other").replace('"y0"', '"z"')
    made = net(text + 'layer { name: "end" type: "Power" bottom: "y0" top: "end" }')
    got = dict(zip(made.signature.outputs, run(made, x), strict=True))
    close(got["end"], want(x).astype(np.float32))


def test_dropout_scales_what_is_left_in_training(net: Make) -> None:
    made = net(inputs((1, 1000)) + one("Dropout", "dropout_param { dropout_ratio: 0.75 }"))
    made.module.train()
    assert set(np.unique(run(made, np.ones((1, 1000))))) == {0.0, 4.0}


@pytest.mark.parametrize("shared", [False, True])
def test_prelu(net: Make, shared: bool) -> None:
    x, slope = rand(2, 3, 4, 4), rand(1) if shared else rand(3)
    words = "prelu_param { channel_shared: true }" if shared else ""
    made = net(inputs((1, 3, 4, 4)) + one("PReLU", words), {"it": [slope.reshape(()) if shared else slope]})
    close(run(made, x), np.where(x > 0, x, x * slope.reshape(-1, 1, 1)))
    fresh = net(inputs((1, 3, 4, 4)) + one("PReLU", words))
    assert set(fresh.module.it.weight.tolist()) == {0.25}


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("", lambda a, b, c: a + b + c),
        ("operation: PROD", lambda a, b, c: a * b * c),
        ("operation: MAX", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
        ("coeff: 1 coeff: -2 coeff: 0.5", lambda a, b, c: a - 2 * b + 0.5 * c),
    ],
)
def test_eltwise(net: Make, words: str, want: Callable[..., np.ndarray]) -> None:
    a, b, c = rand(2, 3), rand(2, 3), rand(2, 3)
    made = net(inputs((1, 3), (1, 3), (1, 3)) + one("Eltwise", f"eltwise_param {{ {words} }}", 3))
    close(run(made, a, b, c), want(a, b, c))


def test_eltwise_of_two(net: Make) -> None:
    a, b = rand(2, 3), rand(2, 3)
    for word, want in (("SUM", a + b), ("PROD", a * b), ("MAX", np.maximum(a, b))):
        close(
            run(net(inputs((1, 3), (1, 3)) + one("Eltwise", f"eltwise_param {{ operation: {word} }}", 2)), a, b), want
        )
    made = net(inputs((1, 3), (1, 3)) + one("Eltwise", "eltwise_param { coeff: 1 coeff: -1 }", 2))
    close(run(made, a, b), a - b)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_softmax(net: Make, axis: int) -> None:
    x = rand(2, 3, 4)
    e = np.exp(x)
    made = net(inputs((1, 3, 4)) + one("Softmax", f"softmax_param {{ axis: {axis} }}"))
    close(run(made, x), e / e.sum(axis, keepdims=True))


# ---------------------------------------------------------------------------------------------- shapes


def test_concat_and_slice_undo_each_other(net: Make) -> None:
    a, b = rand(2, 3, 4), rand(2, 5, 4)
    for words in ("axis: 1", "concat_dim: 1", "axis: -2"):
        made = net(inputs((1, 3, 4), (1, 5, 4)) + one("Concat", f"concat_param {{ {words} }}", 2))
        close(run(made, a, b), np.concatenate([a, b], 1))
    whole = np.concatenate([a, b], 1)
    for words in ("slice_dim: 1", "axis: -2"):
        made = net(inputs((1, 8, 4)) + one("Slice", f"slice_param {{ {words} slice_point: 3 }}", tops=2))
        for got, want in zip(run(made, whole), (a, b), strict=True):
            close(got, want)
    made = net(inputs((1, 8, 4)) + one("Slice", "", tops=4))
    for place, got in enumerate(run(made, whole)):
        close(got, whole[:, 2 * place : 2 * place + 2])


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ("shape { dim: 0 dim: -1 }", (2, 24)),
        ("shape { dim: 0 dim: 0 dim: 2 dim: 4 }", (2, 3, 2, 4)),
        ("shape { dim: 8 dim: 1 } axis: 2", (2, 3, 8, 1)),
        ("shape { dim: 6 } axis: 1 num_axes: 2", None),
        ("shape { dim: 12 } axis: 1 num_axes: 2", (2, 12, 2)),
        ("shape { dim: 1 } axis: 1 num_axes: 0", (2, 1, 3, 4, 2)),
        ("shape { dim: 1 } axis: -1 num_axes: 0", (2, 3, 4, 2, 1)),
        ("shape { dim: 1 dim: 24 }", (2, 24)),
    ],
)
def test_reshape(net: Make, words: str, shape: tuple[int, ...] | None) -> None:
    x = rand(2, 3, 4, 2)  # two rows, where the file declares one
    text = inputs((1, 3, 4, 2)) + one("Reshape", f"reshape_param {{ {words} }}")
    if shape is None:
        with pytest.raises(FormatError, match=r"layer 'it' of type 'Reshape' .*cannot take"):
            net(text)
    else:
        close(run(net(text), x), x.reshape(shape))


def test_flatten(net: Make) -> None:
    x = rand(2, 3, 4, 5)
    close(run(net(inputs((1, 3, 4, 5)) + one("Flatten")), x), x.reshape(2, 60))
    close(run(net(inputs((1, 3, 4, 5)) + one("Flatten", "flatten_param { axis: 2 }")), x), x.reshape(2, 3, 20))
    made = net(inputs((1, 3, 4, 5)) + one("Flatten", "flatten_param { axis: 1 end_axis: -2 }"))
    close(run(made, x), x.reshape(2, 12, 5))


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("SUM", lambda x: x.sum(-1)),
        ("ASUM", lambda x: np.abs(x).sum(-1)),
        ("SUMSQ", lambda x: (x * x).sum(-1)),
        ("MEAN", lambda x: x.mean(-1)),
    ],
)
def test_reduction(net: Make, word: str, want: Callable[[np.ndarray], np.ndarray]) -> None:
    x = rand(2, 3, 4, 5)
    made = net(inputs((1, 3, 4, 5)) + one("Reduction", f"reduction_param {{ operation: {word} axis: 2 coeff: 3 }}"))
    close(run(made, x), want(x.reshape(2, 3, 20)) * np.float32(3))


def test_tile_crop_and_the_choice_of_rows(net: Make) -> None:
    x = rand(2, 3, 4)
    made = net(inputs((1, 3, 4)) + one("Tile", "tile_param { axis: 1 tiles: 3 }"))
    close(run(made, x), np.concatenate([x, x, x], 1))
    big, small = rand(2, 3, 7, 8), rand(2, 3, 4, 5)
    made = net(inputs((1, 3, 7, 8), (1, 3, 4, 5)) + one("Crop", "crop_param { axis: 2 offset: 1 offset: 3 }", 2))
    close(run(made, big, small), big[:, :, 1:5, 3:8])
    made = net(inputs((1, 3, 7, 8), (1, 3, 4, 5)) + one("Crop", "crop_param { offset: 2 }", 2))
    close(run(made, big, small), big[:, :, 2:6, 2:7])
    rows = np.array([1, 0, 1], np.float32)
    made = net(inputs((2, 3, 4), (3,)) + one("BatchReindex", "", 2))
    close(run(made, x, rows), x[[1, 0, 1]])
    made = net(inputs((2, 3, 4), (2, 5), (2, 1)) + one("Filter", "", 3, 2))
    z = rand(2, 5)
    for got, source in zip(run(made, x, z, np.array([[0.0], [2.0]])), (x, z), strict=True):
        close(got, source[[1]])


def test_arg_max(net: Make) -> None:
    x = rand(2, 5, 3)
    flat = x.reshape(2, 15)
    order = np.argsort(-flat, 1)[:, :2]
    made = net(inputs((1, 5, 3)) + one("ArgMax", "argmax_param { top_k: 2 }"))
    close(run(made, x), order[:, None].astype(np.float32))
    made = net(inputs((1, 5, 3)) + one("ArgMax", "argmax_param { top_k: 2 out_max_val: true }"))
    close(run(made, x), np.stack([order.astype(np.float32), np.take_along_axis(flat, order, 1)], 1))
    made = net(inputs((1, 5, 3)) + one("ArgMax", "argmax_param { axis: 1 }"))
    close(run(made, x), x.argmax(1, keepdims=True).astype(np.float32))
    made = net(inputs((1, 5, 3, 2)) + one("ArgMax"))
    assert run(made, rand(2, 5, 3, 2)).shape == (2, 1, 1, 1)


def test_a_learned_blob_without_an_input(net: Make) -> None:
    w = rand(1, 3)
    text = inputs((1, 3)) + 'layer { name: "p" type: "Parameter" top: "p" parameter_param { shape { dim: 1 dim: 3 } } }'
    made = net(text + 'layer { name: "s" type: "Eltwise" bottom: "x0" bottom: "p" top: "s" }', {"p": [w]})
    x = rand(2, 3)
    close(run(made, x), x + w)


# ---------------------------------------------------------------------------------------------- one's own


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor([by]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def test_a_layer_of_ones_own_is_made_from_its_message_and_gets_its_blobs(net: Make) -> None:
    text = inputs((1, 3)) + one("Shift", "shift_param { by: 2.5 }")
    make = {"Shift": lambda site: Shift(site.layer.get("shift_param").get("by"))}
    x = rand(2, 3)
    close(run(net(text, {"it": [[7.0]]}, layers=make), x), x + np.float32(7))
    register_layer("Shift", make["Shift"])
    try:
        assert net(text).module.it.by.shape == (1,)
    finally:
        forget_layer("Shift")
    with pytest.raises(FormatError, match=r"layer 'it' of type 'Shift' \(line 1\) is not known.*Give layers="):
        net(text)


def test_a_layer_of_ones_own_may_have_several_tops_and_be_a_loss(net: Make) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x.square().sum()

    text = inputs((2, 3)) + one("Python", "loss_weight: 0 loss_weight: 2", tops=2)
    made = net(text, layers={"Python": lambda site: Both()})
    x = torch.ones(2, 3)
    assert made.training is not None
    assert made.training.loss is not None
    out = dict(zip(made.signature.outputs, made.module(x), strict=True))
    assert made.training.loss(out).item() == 12


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (one("Convolve"), r"type 'Convolve' \(line 1\) is not known to kindling. Did you mean 'Convolution'\?"),
        (one("Convolution", "convolution_param { num_output: 4 }"), "has no kernel_size"),
        (one("Convolution", "convolution_param { num_output: 4 kernel_size: 3 group: 2 }"), "2 groups for 3 channels"),
        (one("Convolution", "convolution_param { num_output: 4 kernel_size: 99 }"), "cannot take"),
        (one("Convolution", "convolution_param { num_output: 4 kernel_size: 0 }"), "has a size of 0"),
        (one("Pooling", "pooling_param { kernel_size: 2 kernel_h: 2 }"), "one or the other"),
        (one("Pooling", "pooling_param { kernel_size: 2 pad: 2 }"), "pads"),
        (one("Pooling", "pooling_param { kernel_size: 1 stride: 5 }"), "windows outside"),
        (one("Slice", "slice_param { slice_point: 9 }", tops=2), "slice points"),
        (one("LRN", "lrn_param { local_size: 4 }"), "even local_size 4"),
        (one("Softmax", "softmax_param { axis: 7 }"), "names axis 7"),
        (one("Dropout", "dropout_param { dropout_ratio: 1.5 }"), "drops 1.5"),
        (one("SPP", "spp_param { pyramid_height: 4000000000 }"), "pyramid of 4000000000"),
        (one("Tile", "tile_param { axis: 1 tiles: 2147483647 }"), "rows of shape"),
        (one("InnerProduct", "inner_product_param { num_output: 4 axis: 0 }"), "rows of the batch"),
        (one("ReLU", bottoms=2).replace('"x1"', '"x0"'), "has 2 bottoms"),
        (one("ReLU", tops=2), "has 2 tops where it gives 1"),
        (one("ReLU", bottoms=0), "has no bottom"),
        ('layer { name: "it" type: "ReLU" bottom: "x00" top: "y" }', "reads the blob 'x00'.* Did you mean 'x0'"),
        (one("Power", "power_param { shift: -1 power: 0.5 scale: 0 }"), "-1.0 to the power of 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_names_the_layer_its_type_and_its_line(net: Make, layer: str, why: str) -> None:
    with pytest.raises(FormatError, match=why) as caught:
        net(inputs((1, 3, 5, 5)) + "\n" + layer if "line 1" not in why else inputs((1, 3, 5, 5)) + layer)
    assert "layer 'it' of type" in str(caught.value)
    assert "(line " in str(caught.value)


def test_every_layer_can_be_summarised_stored_and_read_again(net: Make, tmp_path: Any) -> None:
    text = inputs((2, 4, 8, 8))
    chain = [
        ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 pad: 1 }"),
        ("BatchNorm", "batch_norm_param { use_global_stats: true }"), ("Scale", "scale_param { bias_term: true }"),
        ("Scale", ""), ("Bias", ""), ("PReLU", ""), ("LRN", "lrn_param { norm_region: WITHIN_CHANNEL local_size: 3 }"),
        ("LRN", "lrn_param { local_size: 3 }"), ("MVN", ""), ("Power", "power_param { scale: 2 }"),
        ("Exp", "exp_param { scale: 0.1 }"), ("Log", "log_param { shift: 1 }"), ("AbsVal", ""),
        ("Swish", "swish_param { beta: 2 }"),
        ("Pooling", "pooling_param { kernel_size: 3 stride: 1 pad: 2 }"),
        ("Pooling", "pooling_param { pool: STOCHASTIC kernel_size: 2 }"), ("Tile", "tile_param { tiles: 2 }"),
        ("Dropout", ""), ("SPP", "spp_param { pyramid_height: 2 }"), ("Threshold", ""),
        ("Reshape", "reshape_param { shape { dim: 0 dim: 2 dim: -1 } }"),
        ("Reduction", "reduction_param { axis: 2 }"), ("InnerProduct", "inner_product_param { num_output: 5 }"),
        ("ArgMax", "argmax_param { axis: 1 }"),
    ]  # fmt: skip
    for place, (kind, settings) in enumerate(chain):
        below = "x0" if place == 0 else f"t{place - 1}"
        text += f'layer {{ name: "l/{place}" type: "{kind}" bottom: "{below}" top: "t{place}" {settings} }}\n'
    made = net(text, seed=3)
    model = Model(
        module=made.module, signature=made.signature, preparation=made.preparation, name=made.name, source=made.source
    )
    assert "l_0" in str(model.summary())
    assert len(model.until("l/5").signature.outputs) == 1
    model.save(str(tmp_path / "bundle"))
    from kindling.bundle import load

    again = load(str(tmp_path / "bundle"))
    x = rand(2, 4, 8, 8)
    close(again.module(torch.from_numpy(x)).detach().numpy(), run(made, x))
