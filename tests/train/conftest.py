"""Makes `loops.py`, a loop to test with rows in memory, importable as `train_loops` by the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "train_loops" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("train_loops", Path(__file__).with_name("loops.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["train_loops"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["train_loops"])
