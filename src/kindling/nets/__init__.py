"""The nets that come with kindling, the weight files each of them takes, and the preparation that belongs to each file.

`NETS` is the registry, `load_net` makes a net with random or stored weights. The architectures are in `vision.py`, the
readers and the catalogue of published weights in `kindling.formats`.
"""

from __future__ import annotations

import contextlib
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache as cached
from functools import partial
from importlib import resources
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kindling.errors import ConfigError, FormatError, ModelError, did_you_mean
from kindling.formats import CATALOG, Layout, Published, download, open_weights, recognise
from kindling.formats import load as load_weights
from kindling.formats.catalog import find, published_as
from kindling.formats.files import file_digest
from kindling.formats.weights import SAME_NAMES
from kindling.nets import layers_aten as layers_aten  # graphs that are read again find its layers
from kindling.nets import layers_caffe as layers_caffe
from kindling.nets import layers_dl4j as layers_dl4j
from kindling.nets import layers_h2o as layers_h2o
from kindling.nets import layers_keras as layers_keras
from kindling.nets import layers_lite as layers_lite
from kindling.nets import layers_onnx as layers_onnx
from kindling.nets.vision import (
    MOBILENET_STAGES,
    SQUEEZENET_FIRES,
    VGG16_BLOCKS,
    alexnet,
    lenet,
    mobilenet_v2,
    squeezenet1_1,
    vgg16,
)
from kindling.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from kindling.prepare import Preparation

__all__ = [
    "NETS",
    "NetInfo",
    "NetParts",
    "alexnet",
    "imagenet_labels",
    "lenet",
    "load_net",
    "mobilenet_v2",
    "squeezenet1_1",
    "vgg16",
]

_SHORTER_256: Mapping[str, Any] = {
    "size": (224, 224),
    "resize": "shorter",
    "resize_to": 256,
    "interpolation": "bilinear",
}
_TORCHVISION: Mapping[str, Any] = {
    **_SHORTER_256,
    "channels": "RGB",
    "scale": 1 / 255,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""torchvision's `ImageClassification(crop_size=224)`."""
_CAFFE: Mapping[str, Any] = {**_SHORTER_256, "channels": "BGR", "mean": (103.939, 116.779, 123.68)}
"""Keras's `preprocess_input(mode="caffe")`: 0..255, blue first, minus ImageNet's mean colour."""
_SQUEEZENET_KERAS: Mapping[str, Any] = {**_CAFFE, "size": (227, 227), "mean": (104.0, 117.0, 123.0)}
_TENSORFLOW: Mapping[str, Any] = {**_SHORTER_256, "channels": "RGB", "scale": 1 / 127.5, "mean": (1.0,)}
"""Keras's `preprocess_input(mode="tf")`: -1..1."""
_DIGITS: Mapping[str, Any] = {
    "size": (28, 28),
    "resize": "squash",
    "channels": "L",
    "scale": 1 / 255,
    "mean": (0.1307,),
    "std": (0.3081,),
    "raw_shape": (28, 28),
}
"""MNIST's mean and deviation; takes MNIST's raw pixels as well as image files."""


@dataclass(frozen=True, kw_only=True)
class NetInfo:
    """One net of the registry."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    """With random weights, drawn from torch's global generator."""
    layouts: tuple[Layout, ...]
    """The weight files it takes."""
    image: Mapping[str, Any]
    """Fields of the `ImageStep` for random weights."""

    @property
    def published(self) -> tuple[Published, ...]:
        """Its published weights, as the catalogue lists them."""
        return tuple(entry for entry in CATALOG.values() if entry.net == self.name)


@dataclass(frozen=True, kw_only=True)
class NetParts:
    """A net and what a Model needs around it."""

    module: nn.Module
    signature: Signature
    preparation: Preparation
    labels: tuple[str, ...] | None
    """Class names in the order of the scores, where they are known."""
    name: str
    source: Mapping[str, Any]
    """JSON values: net, file, url, sha256, layout, published name and licence, as far as known."""


def load_net(
    name: str,
    weights: str | PathLike[str] | None = None,
    *,
    layout: str | None = None,
    cache: str | PathLike[str] | None = None,
    progress: bool = True,
) -> NetParts:
    """A net of `NETS` with its signature, its preparation and, where known, its labels.

    Args:
        name: a key of `NETS`.
        weights: None for random ones; a path, or a URL (http, https, or anything `storage` reads), of a
            .safetensors, .pth, .h5 or .npz file in one of the net's layouts; or the name of published weights:
            `"vgg16-torchvision"`, or `"torchvision"` for short.
        layout: name of the layout, for the few files that fit more than one.
        cache: folder for downloads; the default is the variable KINDLING_CACHE or `~/.cache/kindling`.
        progress: show a progress bar while downloading.
    Returns: the parts of a Model. The module is in evaluation mode, its scores are logits.
    Raises: ModelError, for an unknown net; ConfigError, for an unknown layout; FormatError, when the file is none of
        the net's layouts (naming the first layers that differ), truncated or altered; StorageError, when it cannot be
        fetched.

    >>> parts = load_net("lenet")
    >>> parts.signature.inputs["image"].shape, parts.signature.outputs["predictions"].shape
    (('N', 1, 28, 28), ('N', 10))
    """
    info = NETS.get(name)
    if info is None:
        raise ModelError(f"there is no net {name!r}.{did_you_mean(name, NETS)}")
    layouts = info.layouts
    if layout is not None:
        layouts = tuple(known for known in layouts if known.name == layout)
        if not layouts:
            names = ", ".join(known.name for known in info.layouts)
            raise ConfigError("layout", layout, f"is none of {name}'s", f"Use one of {names}")
    if weights is None:
        with torch.device("meta"):
            twin = info.build()
        return _parts(name, info.build().eval(), twin, info.image, None, {"net": name})
    with _local(name, weights, cache, progress) as (path, url):
        # Until this block ends, `path` is there to be read; afterwards the module has all numbers in memory of its own.
        stored = open_weights(path)
        what = url or str(path)
        try:
            match = recognise(what, name, layouts, stored)
        except FormatError as error:
            others = [other for other in NETS if other != name and _fits(other, stored)]
            if not others:
                raise
            raise FormatError(f"{error} They are the weights of {' or '.join(others)}.") from None
        sha256 = file_digest(path)
        entry = published_as(path, name, sha256)
        module = load_weights(match, stored, what)
        with torch.device("meta"):
            twin = match.layout.build(match.classes)
        source: dict[str, Any] = {"net": name, "file": path.name, "sha256": sha256, "layout": match.layout.name}
    if url is not None:
        source["url"] = url
    image = dict(match.layout.image)
    if entry is not None:
        source.update(published=entry.name, url=entry.url, licence=entry.licence)
        image.update(entry.image)
    labels = None
    if match.layout.imagenet and match.classes in (1000, 1001):
        labels = imagenet_labels() if match.classes == 1000 else ("background", *imagenet_labels())
    return _parts(name, module, twin, image, labels, source)


@cached
def imagenet_labels() -> tuple[str, ...]:
    """ImageNet's 1,000 classes in the usual order: the first name of each synset, more of it where that is not unique.

    >>> imagenet_labels()[0], imagenet_labels()[401], len(set(imagenet_labels()))
    ('tench', 'accordion', 1000)
    """
    text = resources.files("kindling.nets").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _parts(
    name: str,
    module: nn.Module,
    twin: nn.Module,
    image: Mapping[str, Any],
    labels: tuple[str, ...] | None,
    source: Mapping[str, Any],
) -> NetParts:
    """`twin` is the same net on the meta device, which gives the shape of the output without the work."""
    from kindling.prepare import Preparation
    from kindling.prepare.image import ImageStep

    step = ImageStep("image", **image)
    height, width, channels = step.shape
    # An activation belongs to the layer before it.
    output = [child for child, _ in module.named_children() if not child.endswith("_relu")][-1]
    with torch.inference_mode():
        shape = twin(torch.empty(1, channels, height, width, device="meta")).shape
    signature = Signature(
        inputs={"image": TensorSpec(("N", channels, height, width))}, outputs={output: TensorSpec(("N", *shape[1:]))}
    )
    return NetParts(
        module=module, signature=signature, preparation=Preparation((step,)), labels=labels, name=name, source=source
    )


def _fits(name: str, stored: Any) -> bool:
    try:
        recognise(name, name, NETS[name].layouts, stored)
    except FormatError:
        return False
    return True


@contextlib.contextmanager
def _local(
    net: str, weights: str | PathLike[str], cache: str | PathLike[str] | None, progress: bool
) -> Iterator[tuple[Path, str | None]]:
    """The weight file on this machine, and the URL it came from."""
    text = fspath(weights)
    entry = None if isinstance(weights, PathLike) or Path(text).exists() else find(text, net)
    scheme = text.partition("://")[0].lower() if "://" in text and not isinstance(weights, PathLike) else ""
    if entry is not None:
        if entry.net != net:
            raise FormatError(f"{entry.name!r} are the weights of {entry.net}, not of {net}.")
        yield download(entry.name, cache=cache, progress=progress), entry.url
    elif scheme in ("http", "https"):
        yield download(text, cache=cache, progress=progress), text.partition("#")[0]
    elif scheme == "file" or text.startswith("file:"):
        yield Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path)), None
    elif scheme:
        from kindling.storage import open_place

        folder, _, base = text.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="kindling-") as here:
            local = Path(here) / base
            open_place(folder).download(base, str(local))
            yield local, text
    else:
        path = Path(text).expanduser()
        if not path.exists():
            names = [known.name for known in NETS[net].published]
            raise FormatError(
                f"there is no file {text!r}, and no published weights of that name.{did_you_mean(text, names)}"
            )
        yield path, None


# Layouts


def _both(layout: Layout, head: tuple[str, ...], about: str) -> tuple[Layout, Layout]:
    """A layout, and the same without the classifier: `head` are the layers that are then missing."""
    layers = layout.layers
    if layers is not SAME_NAMES:
        layers = {ours: theirs for ours, theirs in layers.items() if ours not in head}
    name = f"{layout.name}-notop"
    return layout, replace(layout, name=name, about=about, layers=layers, head=None, classes=None, flattened={})


def _own(build: Callable[[int | None], nn.Module], head: str, image: Mapping[str, Any]) -> tuple[Layout, Layout]:
    layout = Layout(
        name="kindling",
        about="the state dict of this net, under its own layer names",
        build=build,
        layers=SAME_NAMES,
        head=head,
        image=image,
        imagenet=False,
    )
    return _both(layout, (head,), "the same without the classifier")


_VGG_CONVS = tuple(
    f"block{block}_conv{number}" for block, widths in enumerate(VGG16_BLOCKS, 1) for number in range(1, len(widths) + 1)
)
_VGG_HEAD = ("fc1", "fc2", "predictions")
_VGG_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_FIRE_FEATURES = (3, 4, 6, 7, 9, 10, 11, 12)
_FIRE_PARTS = ("squeeze1x1", "expand1x1", "expand3x3")


def _mobilenet_layers(keras: bool, batch_norm: bool) -> dict[str, str]:
    names = {"conv1": "Conv1" if keras else "features.0.0", "conv1_bn": "bn_Conv1" if keras else "features.0.1"}
    block = 0
    for expansion, _, repeats, _ in MOBILENET_STAGES:
        for _ in range(repeats):
            block += 1
            parts = ("expand", "depthwise", "project") if expansion > 1 else ("depthwise", "project")
            for place, part in enumerate(parts):
                ours = f"block{block}.{part}"
                if keras:
                    theirs = f"expanded_conv_{part}" if block == 1 else f"block_{block - 1}_{part}"
                    names |= {ours: theirs, f"{ours}_bn": f"{theirs}_BN"}
                    continue
                theirs = f"features.{block}.conv"
                if part == "project":
                    names |= {ours: f"{theirs}.{place}", f"{ours}_bn": f"{theirs}.{place + 1}"}
                else:
                    names |= {ours: f"{theirs}.{place}.0", f"{ours}_bn": f"{theirs}.{place}.1"}
    names |= {"conv2": "Conv_1" if keras else "features.18.0", "conv2_bn": "Conv_1_bn" if keras else "features.18.1"}
    names["predictions"] = "predictions" if keras else "classifier.1"
    return names if batch_norm else {ours: theirs for ours, theirs in names.items() if not ours.endswith("_bn")}


_ALEXNET = NetInfo(
    name="alexnet",
    about="AlexNet, 61 million parameters (Krizhevsky, 2014)",
    build=alexnet,
    image=_TORCHVISION,
    layouts=(
        *_both(
            Layout(
                name="torchvision",
                about="torchvision's alexnet",
                build=alexnet,
                layers={
                    **{f"conv{n}": f"features.{place}" for n, place in enumerate((0, 3, 6, 8, 10), 1)},
                    **{f"fc{n}": f"classifier.{place}" for n, place in ((6, 1), (7, 4), (8, 6))},
                },
                head="fc8",
                image=_TORCHVISION,
            ),
            ("fc6", "fc7", "fc8"),
            "torchvision's alexnet without the classifier; the net ends at pool5",
        ),
        *_own(alexnet, "fc8", _TORCHVISION),
    ),
)

_VGG16 = NetInfo(
    name="vgg16",
    about="VGG16, 138 million parameters (Simonyan and Zisserman, 2014)",
    build=vgg16,
    image=_TORCHVISION,
    layouts=(
        *_both(
            Layout(
                name="torchvision",
                about="torchvision's vgg16",
                build=vgg16,
                layers={
                    **{name: f"features.{place}" for name, place in zip(_VGG_CONVS, _VGG_FEATURES, strict=True)},
                    **{name: f"classifier.{place}" for name, place in zip(_VGG_HEAD, (0, 3, 6), strict=True)},
                },
                head="predictions",
                image=_TORCHVISION,
            ),
            _VGG_HEAD,
            "torchvision's vgg16 without the classifier; the net ends at block5_pool",
        ),
        *_both(
            Layout(
                name="keras",
                about="Keras's VGG16; fc1 is turned from height, width, channels to channels, height, width",
                build=vgg16,
                layers={name: name for name in (*_VGG_CONVS, *_VGG_HEAD)},
                head="predictions",
                image=_CAFFE,
                keras=True,
                flattened={"fc1": "block5_conv3"},
            ),
            _VGG_HEAD,
            "Keras's VGG16 without the classifier; the net ends at block5_pool",
        ),
        *_own(vgg16, "predictions", _TORCHVISION),
    ),
)

_SQUEEZENET = NetInfo(
    name="squeezenet1_1",
    about="SqueezeNet 1.1, 1.2 million parameters (Iandola et al., 2016)",
    build=squeezenet1_1,
    image=_TORCHVISION,
    layouts=(
        *_both(
            Layout(
                name="torchvision",
                about="torchvision's squeezenet1_1",
                build=squeezenet1_1,
                layers={
                    "conv1": "features.0",
                    **{
                        f"fire{number}.{part}": f"features.{place}.{part.replace('squeeze1x1', 'squeeze')}"
                        for (number, _, _), place in zip(SQUEEZENET_FIRES, _FIRE_FEATURES, strict=True)
                        for part in _FIRE_PARTS
                    },
                    "conv10": "classifier.1",
                },
                head="conv10",
                image=_TORCHVISION,
            ),
            ("conv10",),
            "torchvision's squeezenet1_1 without the classifier; the net ends at fire9",
        ),
        *_both(
            Layout(
                name="keras",
                about="keras-squeezenet; poolings round down, the input is 227 x 227",
                build=partial(squeezenet1_1, ceil_pool=False),
                layers={
                    "conv1": "conv1",
                    **{
                        f"fire{number}.{part}": f"fire{number}/{part}"
                        for number, _, _ in SQUEEZENET_FIRES
                        for part in _FIRE_PARTS
                    },
                    "conv10": "conv10",
                },
                head="conv10",
                image=_SQUEEZENET_KERAS,
                keras=True,
            ),
            ("conv10",),
            "keras-squeezenet without the classifier; the net ends at fire9",
        ),
        *_own(squeezenet1_1, "conv10", _TORCHVISION),
    ),
)

_MOBILENET = NetInfo(
    name="mobilenet_v2",
    about="MobileNetV2 of width 1, 3.5 million parameters (Sandler et al., 2018)",
    build=mobilenet_v2,
    image=_TORCHVISION,
    layouts=(
        *_both(
            Layout(
                name="torchvision",
                about="torchvision's mobilenet_v2",
                build=mobilenet_v2,
                layers=_mobilenet_layers(keras=False, batch_norm=True),
                head="predictions",
                image=_TORCHVISION,
            ),
            ("predictions",),
            "torchvision's mobilenet_v2 without the classifier; the net ends at conv2_bn",
        ),
        *_both(
            Layout(
                name="tensorflow",
                about="TensorFlow's weights under torchvision's names: batch norm folded, 1,001 outputs, SAME padding",
                build=partial(mobilenet_v2, batch_norm=False, tensorflow=True),
                layers=_mobilenet_layers(keras=False, batch_norm=False),
                head="predictions",
                image=_TENSORFLOW,
                classes=1001,
            ),
            ("predictions",),
            "TensorFlow's weights under torchvision's names, batch norm folded, without the classifier",
        ),
        *_both(
            Layout(
                name="torchvision-folded",
                about="torchvision's mobilenet_v2 with batch norm folded into the convolutions",
                build=partial(mobilenet_v2, batch_norm=False),
                layers=_mobilenet_layers(keras=False, batch_norm=False),
                head="predictions",
                image=_TORCHVISION,
            ),
            ("predictions",),
            "torchvision's mobilenet_v2 with batch norm folded, without the classifier",
        ),
        *_both(
            Layout(
                name="keras",
                about="Keras's MobileNetV2 of width 1: SAME padding, batch norm with epsilon 0.001",
                build=partial(mobilenet_v2, tensorflow=True),
                layers=_mobilenet_layers(keras=True, batch_norm=True),
                head="predictions",
                image=_TENSORFLOW,
                keras=True,
                renamed={"Logits": "predictions"},
            ),
            ("predictions",),
            "Keras's MobileNetV2 without the classifier; the net ends at conv2_bn",
        ),
        *_own(mobilenet_v2, "predictions", _TORCHVISION),
    ),
)

_LENET = NetInfo(
    name="lenet",
    about="LeNet for 28 x 28 grey digits, 0.4 million parameters (LeCun et al., 1998)",
    build=lenet,
    image=_DIGITS,
    layouts=_own(lenet, "predictions", _DIGITS),
)

NETS: Mapping[str, NetInfo] = {info.name: info for info in (_LENET, _ALEXNET, _VGG16, _SQUEEZENET, _MOBILENET)}
"""Every net that `kindling.load` knows by name."""
