"""Image classifiers with named layers: LeNet, AlexNet, VGG16, SqueezeNet 1.1 and MobileNetV2.

The arithmetic and the random initialisation are those of torchvision's models of the same names, layer by layer; scores
are logits. Every net is built with a classifier for a number of classes, or without one (`classes=None`): then it ends
at its last feature layer. torchvision's `avgpool` of AlexNet and VGG16 is left out: at the input size that the nets are
made for it changes nothing. Weight files and their layouts are in `nets/__init__.py` and `formats/`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kindling.errors import ConfigError

Layers = list[tuple[str, nn.Module]]

VGG16_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the 3x3 convolutions of each block."""
SQUEEZENET_FIRES = (
    (2, 16, 64),
    (3, 16, 64),
    (4, 32, 128),
    (5, 32, 128),
    (6, 48, 192),
    (7, 48, 192),
    (8, 64, 256),
    (9, 64, 256),
)
"""Number of the fire, channels after its squeeze, channels of each of its two expansions."""
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride of the first block (Sandler et al., table 2)."""


def lenet(classes: int | None = 10, channels: int = 1) -> nn.Sequential:
    """LeNet for 28 x 28 pictures: two convolutions of 5 x 5 with 20 and 50 channels, 500 hidden units.

    Args:
        classes: width of the scores; None leaves out the flattening, `fc1` and `predictions`.
        channels: of the input; 1 is grey.
    Returns: input (N, channels, 28, 28) float32, output (N, classes) logits.
    Raises: ConfigError, for sizes below 1.
    Source: LeCun et al., 1998, in the sizes of Caffe's MNIST example, with a ReLU after each convolution.

    >>> lenet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    _check("channels", channels)
    layers: Layers = [
        ("conv1", nn.Conv2d(channels, 20, 5)),
        ("conv1_relu", nn.ReLU(inplace=True)),
        ("pool1", nn.MaxPool2d(2, 2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("conv2_relu", nn.ReLU(inplace=True)),
        ("pool2", nn.MaxPool2d(2, 2)),
    ]
    if classes is not None:
        _check("classes", classes)
        layers += [
            ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(50 * 4 * 4, 500)),
            ("fc1_relu", nn.ReLU(inplace=True)),
            ("predictions", nn.Linear(500, classes)),
        ]
    return nn.Sequential(OrderedDict(layers))


def alexnet(classes: int | None = 1000) -> nn.Sequential:
    """AlexNet with one column, for 224 x 224 pictures. Layers: conv1 ... pool5, flatten, fc6, fc7, fc8.

    Args:
        classes: width of the scores; None ends the net at `pool5`, (N, 256, 6, 6).
    Returns: input (N, 3, 224, 224) float32, output (N, classes) logits.
    Raises: ConfigError, for fewer classes than 1.
    Source: Krizhevsky, 2014, arXiv:1404.5997, as torchvision has it.

    >>> alexnet(classes=None)[-1]
    MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)
    """
    layers: Layers = []
    for number, before, after, kernel, stride, padding in (
        (1, 3, 64, 11, 4, 2),
        (2, 64, 192, 5, 1, 2),
        (3, 192, 384, 3, 1, 1),
        (4, 384, 256, 3, 1, 1),
        (5, 256, 256, 3, 1, 1),
    ):
        layers += [
            (f"conv{number}", nn.Conv2d(before, after, kernel, stride, padding)),
            (f"conv{number}_relu", nn.ReLU(inplace=True)),
        ]
        if number in (1, 2, 5):
            layers.append((f"pool{number}", nn.MaxPool2d(3, 2)))
    if classes is not None:
        _check("classes", classes)
        layers += [
            ("flatten", nn.Flatten()),
            ("dropout6", nn.Dropout()),
            ("fc6", nn.Linear(256 * 6 * 6, 4096)),
            ("fc6_relu", nn.ReLU(inplace=True)),
            ("dropout7", nn.Dropout()),
            ("fc7", nn.Linear(4096, 4096)),
            ("fc7_relu", nn.ReLU(inplace=True)),
            ("fc8", nn.Linear(4096, classes)),
        ]
    return nn.Sequential(OrderedDict(layers))


def vgg16(classes: int | None = 1000) -> nn.Sequential:
    """VGG16 for 224 x 224 pictures. Layers: block1_conv1 ... block5_pool, flatten, fc1, fc2, predictions.

    Args:
        classes: width of the scores; None ends the net at `block5_pool`, (N, 512, 7, 7).
    Returns: input (N, 3, 224, 224) float32, output (N, classes) logits.
    Raises: ConfigError, for fewer classes than 1.
    Source: Simonyan and Zisserman, 2014, arXiv:1409.1556, configuration D; layer names as in Keras and Deeplearning4j.

    >>> with torch.device("meta"):
    ...     net = vgg16()
    >>> sum(p.numel() for p in net.parameters()), net.fc1
    (138357544, Linear(in_features=25088, out_features=4096, bias=True))
    """
    return vgg(VGG16_BLOCKS, 4096, classes)


def vgg(blocks: Sequence[Sequence[int]], hidden: int, classes: int | None) -> nn.Sequential:
    """A VGG of any depth and width whose last feature map is 7 x 7: `vgg16` is one of them.

    Args:
        blocks: channels of the convolutions, block by block; each block ends in a pooling that halves the sides.
        hidden: width of `fc1` and `fc2`.
        classes: width of the scores; None ends the net at the last pooling.

    >>> [name for name, _ in vgg([(4,), (8,)], 16, None).named_children()]
    ['block1_conv1', 'block1_conv1_relu', 'block1_pool', 'block2_conv1', 'block2_conv1_relu', 'block2_pool']
    """
    layers: Layers = []
    channels = 3
    for block, widths in enumerate(blocks, start=1):
        for number, width in enumerate(widths, start=1):
            name = f"block{block}_conv{number}"
            layers += [(name, nn.Conv2d(channels, width, 3, padding=1)), (f"{name}_relu", nn.ReLU(inplace=True))]
            channels = width
        layers.append((f"block{block}_pool", nn.MaxPool2d(2, 2)))
    if classes is not None:
        _check("classes", classes)
        layers += [
            ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(channels * 7 * 7, hidden)),
            ("fc1_relu", nn.ReLU(inplace=True)),
            ("dropout1", nn.Dropout()),
            ("fc2", nn.Linear(hidden, hidden)),
            ("fc2_relu", nn.ReLU(inplace=True)),
            ("dropout2", nn.Dropout()),
            ("predictions", nn.Linear(hidden, classes)),
        ]
    net = nn.Sequential(OrderedDict(layers))
    _init_normal(net)
    return net


class Fire(nn.Module):
    """SqueezeNet's block: a 1 x 1 convolution that narrows, then 1 x 1 and 3 x 3 side by side, joined by channel."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeeze, 1)
        self.squeeze1x1_relu = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_relu = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze1x1_relu(self.squeeze1x1(x))
        return torch.cat([self.expand1x1_relu(self.expand1x1(x)), self.expand3x3_relu(self.expand3x3(x))], 1)


def squeezenet1_1(classes: int | None = 1000, *, ceil_pool: bool = True) -> nn.Sequential:
    """SqueezeNet 1.1. Layers: conv1, pool1, fire2.squeeze1x1 ... fire9.expand3x3, conv10, pool10, predictions.

    Args:
        classes: width of the scores; None ends the net at `fire9`, (N, 512, 13, 13).
        ceil_pool: round the sizes of poolings up, as Caffe and torchvision do, or down, as Keras does.
    Returns: input (N, 3, 224, 224) or (N, 3, 227, 227) float32, output (N, classes) logits.
    Raises: ConfigError, for fewer classes than 1.
    Source: Iandola et al., 2016, arXiv:1602.07360, version 1.1.

    >>> squeezenet1_1(classes=7).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 7])
    """
    layers: Layers = [
        ("conv1", nn.Conv2d(3, 64, 3, stride=2)),
        ("conv1_relu", nn.ReLU(inplace=True)),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=ceil_pool)),
    ]
    channels = 64
    for number, squeeze, expand in SQUEEZENET_FIRES:
        layers.append((f"fire{number}", Fire(channels, squeeze, expand)))
        channels = 2 * expand
        if number in (3, 5):
            layers.append((f"pool{number}", nn.MaxPool2d(3, 2, ceil_mode=ceil_pool)))
    if classes is not None:
        _check("classes", classes)
        layers += [
            ("dropout", nn.Dropout()),
            ("conv10", nn.Conv2d(512, classes, 1)),
            ("conv10_relu", nn.ReLU(inplace=True)),
            ("pool10", nn.AdaptiveAvgPool2d(1)),
            ("predictions", nn.Flatten()),
        ]
    net = nn.Sequential(OrderedDict(layers))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            if name == "conv10":
                nn.init.normal_(module.weight, 0, 0.01)
            else:
                nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return net


class InvertedResidual(nn.Sequential):
    """MobileNetV2's block: widen by 1 x 1, filter each channel by 3 x 3, narrow by 1 x 1; add the input if it fits."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], shortcut: bool) -> None:
        super().__init__(OrderedDict(layers))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self:
            y = layer(y)
        return x + y if self.shortcut else y


def mobilenet_v2(classes: int | None = 1000, *, batch_norm: bool = True, tensorflow: bool = False) -> nn.Sequential:
    """MobileNetV2 of width 1. Layers: conv1, block1.depthwise ... block17.project, conv2, pool, predictions.

    Args:
        classes: width of the scores; None ends the net at `conv2_bn`, (N, 1280, 7, 7).
        batch_norm: False leaves out the normalisations (they are folded into the convolutions, which get biases).
        tensorflow: pad as TensorFlow's SAME does (strided convolutions get one row below and one column to the right,
            which is exact for sides that are multiples of 32) and normalise with its epsilon of 0.001.
    Returns: input (N, 3, 224, 224) float32, output (N, classes) logits.
    Raises: ConfigError, for fewer classes than 1.
    Source: Sandler et al., 2018, arXiv:1801.04381.

    >>> mobilenet_v2(classes=5).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5])
    """

    def conv(
        name: str, before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> Layers:
        same = tensorflow and stride == 2
        layers: Layers = [(f"{name}_pad", nn.ZeroPad2d((0, 1, 0, 1)))] if same else []
        padding = 0 if same else kernel // 2
        layers.append((name, nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=not batch_norm)))
        if batch_norm:
            layers.append((f"{name}_bn", nn.BatchNorm2d(after, eps=1e-3 if tensorflow else 1e-5)))
        if relu:
            layers.append((f"{name}_relu", nn.ReLU6(inplace=True)))
        return layers

    layers: Layers = conv("conv1", 3, 32, 3, stride=2)
    channels, block = 32, 0
    for expansion, width, repeats, first_stride in MOBILENET_STAGES:
        for repeat in range(repeats):
            block += 1
            stride = first_stride if repeat == 0 else 1
            hidden = channels * expansion
            inside: Layers = conv("expand", channels, hidden, 1) if expansion > 1 else []
            inside += conv("depthwise", hidden, hidden, 3, stride=stride, groups=hidden)
            inside += conv("project", hidden, width, 1, relu=False)
            layers.append((f"block{block}", InvertedResidual(inside, shortcut=stride == 1 and channels == width)))
            channels = width
    layers += conv("conv2", channels, 1280, 1)
    if classes is not None:
        _check("classes", classes)
        layers += [
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("dropout", nn.Dropout(0.2)),
            ("predictions", nn.Linear(1280, classes)),
        ]
    net = nn.Sequential(OrderedDict(layers))
    _init_normal(net)
    return net


def _init_normal(net: nn.Module) -> None:
    """torchvision's start for VGG and MobileNetV2."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _check(field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(field, value, "is not a number of at least 1", "Use 1 or more")
