"""Makes this folder's helpers importable: `train_loops` (a loop in memory), `train_runs`, `train_standalone`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

for _name in ("loops", "runs", "standalone"):
    if f"train_{_name}" not in sys.modules:
        _spec = importlib.util.spec_from_file_location(f"train_{_name}", Path(__file__).with_name(f"{_name}.py"))
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[f"train_{_name}"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[f"train_{_name}"])
