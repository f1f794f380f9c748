"""The nets of keras.applications by name, `keras:NAME`: Keras builds them, kindling's reader makes torch of them.

Keras is needed for the architecture alone, on its torch backend; it is imported here and nowhere else. How photos are
prepared is asked of the net's own `preprocess_input`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kindling.errors import ConfigError, MissingExtraError, ModelError, did_you_mean
from kindling.formats.keras import read
from kindling.formats.models import Imported

PRETRAINED = "pretrained"
"""What to give as weights for those that Keras publishes."""


def keras_package() -> Any:
    """Keras, on torch unless the environment says otherwise.

    Raises: MissingExtraError.
    """
    said = os.environ.get("KERAS_BACKEND")
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras
    except ImportError:
        raise MissingExtraError.of("Loading nets of keras.applications", "keras", "keras-applications") from None
    finally:
        if said is None:
            os.environ.pop("KERAS_BACKEND", None)
    return keras


def names(package: Any) -> list[str]:
    """What keras.applications builds."""
    return sorted(name for name in vars(package.applications) if name[0].isupper())


def preparation(preprocess: Any) -> dict[str, Any]:
    """Fields of an ImageStep that does what a `preprocess_input` does to pixels 0..255.

    Raises: ModelError, where it does something else than scaling each channel.

    >>> found = preparation(lambda x: x[..., ::-1] / 2 - 1)
    >>> found["channels"], found["mean"], found["std"]
    ('BGR', (2.0, 2.0, 2.0), (2.0, 2.0, 2.0))
    """

    def shown(*pixel: float) -> np.ndarray:
        return np.asarray(preprocess(np.array(pixel, np.float32).reshape(1, 1, 1, 3)), np.float64).reshape(3)

    dark, bright, red = shown(0, 0, 0), shown(255, 255, 255), shown(255, 0, 0)
    turned = red[2] != dark[2]
    if (bright == dark).any():
        raise ModelError("preprocess_input leaves a channel without numbers.")
    std = 255 / (bright - dark)
    mean = -dark * std
    probe = np.array([17.0, 130.0, 201.0])
    ordered = probe[::-1] if turned else probe
    if np.abs((ordered - mean) / std - shown(*probe)).max() > 1e-3 * np.abs(bright).max():
        raise ModelError("preprocess_input does not scale channel by channel; give image=, fields of an ImageStep.")
    return {
        "channels": "BGR" if turned else "RGB",
        "mean": tuple(round(float(value), 5) for value in mean),
        "std": tuple(round(float(value), 5) for value in std),
    }


def open_application(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    image: Mapping[str, Any] | None = None,
    keep_activation: bool = False,
) -> Imported:
    """A net of keras.applications.

    Args:
        name: such as `MobileNetV2`, `ResNet50` or `VGG16`.
        weights: a file that Keras publishes for the net (`.h5`, `.weights.h5`); `"pretrained"` to have Keras fetch it;
            None draws random ones.
        image: fields of the `ImageStep`, in place of what `preprocess_input` does.
        keep_activation: keep the last softmax.
    Raises: ConfigError, for a name that is none; MissingExtraError; FormatError, for weights that do not fit.
    """
    package = keras_package()
    known = names(package)
    if name not in known:
        raise ConfigError("name", name, f"is no net of keras.applications.{did_you_mean(name, known)}", "Name one")
    make = getattr(package.applications, name)
    fetched = weights is not None and str(weights) == PRETRAINED
    model = make(weights="imagenet" if fetched else None)
    fields = preparation(sys.modules[make.__module__].preprocess_input)
    from kindling.nets import imagenet_labels

    labels = imagenet_labels() if weights is not None else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.keras"
        if fetched or weights is None:
            model.save(file)
            made = read(file, image={**fields, **(image or {})}, labels=labels, keep_activation=keep_activation)
        else:
            file = file.with_suffix(".json")
            file.write_text(model.to_json())
            made = read(
                file,
                weights=Path(weights),
                image={**fields, **(image or {})},
                labels=labels,
                keep_activation=keep_activation,
            )
    kept = {key: made.source[key] for key in ("weights_file", "weights_sha256") if key in made.source}
    source = {"library": "keras", "name": name, "version": str(package.__version__), **kept}
    return replace(made, name=name.lower(), source=source)
