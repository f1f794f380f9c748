"""kindling: deep learning where the data already is. DataFrames go in, PyTorch models come out.

Nothing heavy is imported until a name is used: a Spark worker must set its thread counts before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Advice": "kindling.advice",
    "AllReduce": "kindling.train.strategies",
    "Checkpoints": "kindling.train.policy",
    "DiLoCo": "kindling.train.strategies",
    "Downpour": "kindling.train.strategies",
    "EarlyStopping": "kindling.train.settings",
    "Event": "kindling.train.events",
    "Model": "kindling.model",
    "OutputsLoss": "kindling.train.objective",
    "ParameterAveraging": "kindling.train.strategies",
    "Preparation": "kindling.prepare",
    "Recipe": "kindling.recipe",
    "Report": "kindling.evaluate",
    "Run": "kindling.train.run",
    "SearchResult": "kindling.tune",
    "StopTraining": "kindling.train.callbacks",
    "ThresholdSharing": "kindling.train.strategies",
    "advise": "kindling.advice",
    "caffe_recipe": "kindling.recipe",
    "decay_groups": "kindling.train.strategies.parameter_groups",
    "dl4j_optimizer": "kindling.formats.dl4j_updater",
    "errors": "kindling.errors",
    "labels": "kindling.read",
    "load": "kindling.model",
    "nets": "kindling.nets",
    "parameter_groups": "kindling.train.strategies.parameter_groups",
    "prepare": "kindling.prepare",
    "provenance": "kindling.predict.output",
    "read": "kindling.read",
    "search": "kindling.tune",
    "space": "kindling.tune",
    "spark": "kindling.session",
    "split": "kindling.read",
    "tune": "kindling.tune",
}

__all__ = [
    "Advice",
    "AllReduce",
    "Checkpoints",
    "DiLoCo",
    "Downpour",
    "EarlyStopping",
    "Event",
    "Model",
    "OutputsLoss",
    "ParameterAveraging",
    "Preparation",
    "Recipe",
    "Report",
    "Run",
    "SearchResult",
    "StopTraining",
    "ThresholdSharing",
    "__version__",
    "advise",
    "caffe_recipe",
    "decay_groups",
    "dl4j_optimizer",
    "errors",
    "labels",
    "load",
    "nets",
    "parameter_groups",
    "prepare",
    "provenance",
    "read",
    "search",
    "space",
    "spark",
    "split",
    "tune",
]

if TYPE_CHECKING:
    from kindling import errors, nets, prepare, read, tune
    from kindling.advice import Advice, advise
    from kindling.evaluate import Report
    from kindling.formats.dl4j_updater import dl4j_optimizer
    from kindling.model import Model, load
    from kindling.predict.output import provenance
    from kindling.prepare import Preparation
    from kindling.read import labels, split
    from kindling.recipe import Recipe, caffe_recipe
    from kindling.session import spark
    from kindling.train.callbacks import StopTraining
    from kindling.train.events import Event
    from kindling.train.objective import OutputsLoss
    from kindling.train.policy import Checkpoints
    from kindling.train.run import Run
    from kindling.train.settings import EarlyStopping
    from kindling.train.strategies import AllReduce, DiLoCo, Downpour, ParameterAveraging, ThresholdSharing
    from kindling.train.strategies.parameter_groups import decay_groups, parameter_groups
    from kindling.tune import SearchResult, search, space


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kindling' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home == f"kindling.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
