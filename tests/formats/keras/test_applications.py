"""Nets of keras.applications by name, against Keras itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kindling.errors import ConfigError, ModelError
from kindling.formats.keras.applications import open_application, preparation

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_a_net_by_name_equals_keras_and_prepares_photos_as_it_says(keras: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = keras.applications.MobileNet(weights=None)
    for variable in model.weights:
        if "moving" in variable.path:
            variable.assign(np.abs(rng.normal(1, 0.1, variable.shape)))
    model.save_weights(tmp_path / "net.weights.h5")
    made = open_application("MobileNet", tmp_path / "net.weights.h5")
    pixels = rng.integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    prepared = keras.applications.mobilenet.preprocess_input(pixels.astype(np.float32))
    expected = model.predict(prepared, verbose=0)
    step = made.preparation.inputs[0]
    with torch.inference_mode():
        found = torch.softmax(made.module(step.batch({step.name: pixels})), 1).numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert made.labels is not None
    assert made.labels[0].startswith("tench")
    assert made.source["library"] == "keras"
    with pytest.raises(ConfigError, match=r"no net of keras.applications. Did you mean 'ResNet50'"):
        open_application("Resnet50")


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        (lambda x: x, ("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        (lambda x: x / 127.5 - 1, ("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))),
        (
            lambda x: x[..., ::-1] - np.array([103.939, 116.779, 123.68]),
            ("BGR", (103.939, 116.779, 123.68), (1.0,) * 3),
        ),
    ],
)
def test_a_preprocess_input_becomes_an_image_step(preprocess: Any, expected: tuple[Any, ...]) -> None:
    found = preparation(preprocess)
    assert found["channels"] == expected[0]
    np.testing.assert_allclose(found["mean"], expected[1], atol=1e-3)
    np.testing.assert_allclose(found["std"], expected[2], atol=1e-3)


def test_a_preprocess_input_that_is_no_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match="does not scale channel by channel"):
        preparation(lambda x: np.sqrt(x))
