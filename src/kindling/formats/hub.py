"""Nets of other libraries by name: `torchvision:NAME`, `timm:NAME`, `hf:NAME` (transformers), `keras:NAME`, prepared.

The libraries build the nets and say how photos are prepared; weights are read by kindling's own readers, or, for
`hf:`, as safetensors alone. No code from a hub is run. The result is a graph that bundles can hold: traced, or, where a
net's code cannot be traced, by way of `torch.export` and kindling's reader of its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kindling import graph
from kindling.errors import ConfigError, FormatError, MissingExtraError, ModelError, did_you_mean
from kindling.formats.hub_text import Wrapped, open_text, reads_text
from kindling.formats.models import LIBRARIES, Imported
from kindling.prepare import ImageStep, LabelStep, Preparation
from kindling.signature import Signature, TensorSpec

Weights = str | PathLike[str] | None
PRETRAINED = "pretrained"
"""What to give as weights for those that the library publishes."""
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
"""Pillow's numbers of its filters."""
_TEXT_OPTIONS = ("column", "max_length", "pooling")
_schemas: list[Any] = []


def prefix_of(name: str) -> str | None:
    """The library that a name names, or None.

    >>> prefix_of("timm:resnet18"), prefix_of("hdfs://models/resnet18")
    ('timm', None)
    """
    prefix, separator, rest = name.partition(":")
    return prefix if separator and prefix in LIBRARIES and rest and not rest.startswith("//") else None


def open_named(
    name: str,
    weights: Weights = None,
    *,
    image: Mapping[str, Any] | None = None,
    **text: Any,
) -> Imported:
    """A net of another library.

    Args:
        name: `torchvision:resnet18`, `timm:convnext_tiny`, `hf:google/vit-base-patch16-224` (or a folder),
            `keras:MobileNetV2`.
        weights: a file of the net's own names; `"pretrained"` for those that the library publishes; None draws random
            ones (for `hf:`, None takes the repository's own).
        image: fields of the `ImageStep`, in place of what the library says.
        text: of `hub_text.open_text`, for nets of `hf:` that read text: column, max_length, pooling.
    Raises: ConfigError, for an unknown name or option; MissingExtraError; FormatError, for weights that do not fit;
        ModelError, for a net that is no net of photos or texts.
    """
    library, _, own = name.partition(":")
    if unknown := sorted(set(text) - set(_TEXT_OPTIONS)):
        raise ConfigError("options", unknown, f"mean nothing for {name!r}", f"There are image, {_TEXT_OPTIONS}")
    if library == "hf":
        found = _text_of(own, weights, image, text)
        if found is not None:
            return found
    if text:
        raise ConfigError("options", sorted(text), f"mean nothing for {name!r}, which reads no text", "Leave them out")
    if library == "keras":
        from kindling.formats.keras.applications import open_application

        return open_application(own, weights, image=image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn of their own deprecations
        module, fields, labels = _LIBRARIES[library](own, weights)
    if weights is not None and weights != PRETRAINED:
        from kindling.formats.files import open_weights
        from kindling.formats.weights import into

        if isinstance(module, Wrapped):
            module.net = into(module.net, open_weights(weights), str(weights))
        else:
            module = into(module, open_weights(weights), str(weights))
    step = ImageStep("image", **{**fields, **(image or {})})
    tall, wide, channels = step.shape
    module = _storable(module.eval(), (channels, tall, wide), name)
    from kindling import surgery

    signature = surgery.infer_output_shapes(module, Signature({"image": TensorSpec(("N", channels, tall, wide))}, {}))
    (spec,) = signature.outputs.values()
    # Names that are given twice (ImageNet's "crane") or do not fit the scores name nothing.
    fits = labels is not None and spec.shape[1:] == (len(labels),) and len(set(labels)) == len(labels)
    known = labels if fits else None
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation((step,), () if known is None else (LabelStep("target", "label", known),)),
        labels=known,
        name=own.rpartition("/")[2],
        source=_source(library, own, weights),
    )


def _source(library: str, own: str, weights: Weights) -> dict[str, Any]:
    return {"library": library, "name": own, "weights": None if weights is None else Path(weights).name}


def _text_of(
    own: str, weights: Weights, image: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Imported | None:
    """A net of texts of transformers, or None where it is one of photos."""
    torchvision_first()
    try:
        import transformers
    except ImportError:
        raise MissingExtraError.of("Loading nets of transformers", "transformers", "hf") from None
    with warnings.catch_warnings(), _understood(own, "a net of photos or texts"):
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(own, trust_remote_code=False)
        if not reads_text(config):
            return None
        if image is not None:
            raise ConfigError("image", dict(image), f"means nothing for {own}, which reads text", "Leave it out")
        found = open_text(own, config, weights, **options)
    return dataclasses.replace(found, source=_source("hf", own, weights))


@contextlib.contextmanager
def _understood(name: str, what: str) -> Iterator[None]:
    """What transformers raises, in one sentence of ours."""
    try:
        yield
    except (ConfigError, FormatError, ModelError):
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise FormatError(f"transformers cannot load {name!r} as {what}: {line}") from error


Found = tuple[nn.Module, dict[str, Any], tuple[str, ...] | None]


def torchvision_package() -> Any:
    """torchvision, also beside a torch that was built without what its own operators were.

    Such a pair fails to import because two operators have no schema; with one, everything in Python works.
    Raises: MissingExtraError.
    """
    try:
        import torchvision
    except ImportError:
        raise MissingExtraError.of("Loading torchvision's nets", "torchvision", "torchvision") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _schemas:
            raise
        import sys

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)  # the schemas last as long as this does
        for part in [part for part in sys.modules if part.partition(".")[0] == "torchvision"]:
            del sys.modules[part]
        import torchvision
    return torchvision


def _torchvision(name: str, weights: Weights) -> Found:
    package = torchvision_package()
    known = package.models.list_models()
    if name not in known:
        raise ConfigError("name", name, f"is no net of torchvision.{did_you_mean(name, known)}", "Name one of them")
    module = package.models.get_model(name, weights=None)
    published = package.models.get_model_weights(name).DEFAULT
    said = published.transforms()
    if not hasattr(said, "crop_size"):
        raise ModelError(f"torchvision's {name} does not take single photos and give scores.")
    if weights == PRETRAINED:
        from kindling.formats.catalog import download
        from kindling.formats.files import open_weights
        from kindling.formats.weights import into

        module = into(module, open_weights(download(published.url)), published.url)
    size = int(said.crop_size[0])
    fields = {
        "size": (size, size),
        "resize": "shorter",
        "resize_to": max(int(said.resize_size[0]), size),
        "interpolation": said.interpolation.value,
        "scale": 1 / 255,
        "mean": tuple(said.mean),
        "std": tuple(said.std),
    }
    return module, fields, tuple(published.meta["categories"]) if weights is not None else None


def _timm(name: str, weights: Weights) -> Found:
    torchvision_first()
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError:
        raise MissingExtraError.of("Loading timm's nets", "timm", "timm") from None
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ConfigError("name", name, f"is no net of timm.{near}", "Name one of them")
    module = timm.create_model(name, pretrained=weights == PRETRAINED)
    said = resolve_data_config({}, model=module)
    channels, tall, wide = said["input_size"]
    share = float(said["crop_pct"])
    fields: dict[str, Any] = {
        "size": (tall, wide),
        "channels": "RGB" if channels == 3 else "L",
        "interpolation": said["interpolation"],
        "scale": 1 / 255,
        "mean": tuple(said["mean"]),
        "std": tuple(said["std"]),
    }
    if said.get("crop_mode") == "squash":
        fields["resize"] = "squash"
    else:
        fields |= {"resize": "shorter", "resize_to": max(int(max(tall, wide) / share), tall, wide)}
    return module, fields, None


def torchvision_first() -> None:
    """Libraries that import torchvision if they can get it in a state that imports."""
    try:
        torchvision_package()
    except MissingExtraError:
        pass


class Scores(Wrapped):
    """A net of transformers that gives its scores alone."""

    def forward(self, image: Tensor) -> Tensor:
        return self.net(pixel_values=image).logits  # type: ignore[no-any-return]


def _transformers(name: str, weights: Weights) -> Found:
    torchvision_first()
    try:
        import transformers
    except ImportError:
        raise MissingExtraError.of("Loading nets of transformers", "transformers", "hf") from None
    kind = transformers.AutoModelForImageClassification
    with _understood(name, "a net of photos to classes"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if weights is None or weights == PRETRAINED:
            net = kind.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
        else:
            net = kind.from_config(config)
        mixin = transformers.image_processing_utils.BaseImageProcessor
        said, _ = mixin.get_image_processor_dict(name)
    labels = tuple(str(config.id2label[key]) for key in sorted(config.id2label))
    return Scores(net), transformers_step(said, name), labels


def transformers_step(said: Mapping[str, Any], name: str = "the model") -> dict[str, Any]:
    """Fields of an ImageStep from an image processor's settings (`preprocessor_config.json`).

    Raises: FormatError, for what no ImageStep does.

    >>> said = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224, "resample": 3}
    >>> fields = transformers_step(said)
    >>> fields["size"], fields["resize_to"], fields["interpolation"]
    ((224, 224), 256, 'bicubic')
    """
    size = said.get("size")
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size or {})
    crop = said.get("crop_size")
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop or {})
    fields: dict[str, Any] = {"interpolation": _PILLOW.get(said.get("resample", 2), "bilinear")}
    edge = size.get("shortest_edge")
    if said.get("do_center_crop") and crop:
        fields["size"] = (int(crop["height"]), int(crop["width"]))
        whole = edge or max(size.get("height", 0), size.get("width", 0)) or max(fields["size"])
        fields |= {"resize": "shorter", "resize_to": max(int(whole), *fields["size"])}
    elif edge and said.get("crop_pct"):
        fields |= {"size": (int(edge), int(edge)), "resize": "shorter"}
        fields["resize_to"] = int(edge / said["crop_pct"]) if edge < 384 else int(edge)
    elif "height" in size and "width" in size:
        fields |= {"size": (int(size["height"]), int(size["width"])), "resize": "squash"}
    else:
        raise FormatError(f"{name} prepares photos to sizes {size}, which are not those of one batch. Give image=.")
    if said.get("do_rescale", True):
        fields["scale"] = float(said.get("rescale_factor", 1 / 255))
    if said.get("do_normalize", True) and said.get("image_mean") is not None:
        fields |= {"mean": tuple(said["image_mean"]), "std": tuple(said["image_std"])}
    return fields


_LIBRARIES: Mapping[str, Callable[[str, Weights], Found]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


def _storable(module: nn.Module, row: tuple[int, ...], name: str) -> nn.Module:
    """The net as a graph that bundles can hold.

    Raises: ModelError, when there is no way to one.
    """
    from kindling import surgery

    try:
        traced = surgery.trace(module, 1)
        if traced is not None:
            graph.to_json(traced)
            return traced.eval()
    except ModelError:
        pass  # a layer that is on no list: its own operators may be
    return storable(module, torch.zeros(3, *row), {0: torch.export.Dim("N", min=1, max=1 << 20)}, name)


def storable(module: nn.Module, example: Tensor, axes: Mapping[int, Any], name: str) -> nn.Module:
    """The net as a graph that bundles can hold, by way of `torch.export`.

    Args:
        example: what it takes.
        axes: those of the example that may have any size.
    Raises: ModelError, when there is no way to one.
    """
    from kindling.formats import pt2

    with tempfile.TemporaryDirectory(prefix="kindling-") as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        file = Path(folder) / "net.pt2"
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(dict(axes),))
            torch.export.save(program, file)
        except Exception as error:  # torch.export raises what it likes
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ModelError(f"{name} becomes no graph: {line}") from error
        return pt2.read_graph(file)
