"""Keras itself, on its torch backend, as the reference for kindling's own reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, imported without a trace in the environment and the home folder; skips where it is not installed."""
    asked = {"KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path_factory.mktemp("keras"))}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        found = pytest.importorskip("keras", reason="Keras is not installed")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if found.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend than torch")
    return found
