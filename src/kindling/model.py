"""Model: the one noun. A torch module plus all it needs around it; every verb that changes it returns a new one.

The verbs are short doors to the rooms: `surgery` (until, freeze, then, replace), `predict` (featurize, predict,
evaluate), `train` (fit), `bundle` (save). Nothing here imports Spark; the rooms that need it are opened on use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kindling.prepare import Preparation
from kindling.signature import Signature

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model:
    """A torch module, its signature, its preparation and its labels. Immutable: treat the module as read-only too."""

    module: nn.Module
    signature: Signature
    preparation: Preparation
    labels: tuple[str, ...] | None = None
    """Class names in the order of the scores, where the model classifies."""
    frozen: frozenset[str] = frozenset()
    """Names of the layers that training leaves alone (no gradients, inference mode)."""
    name: str = "model"
    history: tuple[Mapping[str, Any], ...] = ()
    """One JSON object per finished training: settings, epochs, metrics."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights came from: file name, sha256, layout, licence."""


