"""Makes `cases.py`, every strategy as it is tested, importable as `strategy_cases` by the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "strategy_cases" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("strategy_cases", Path(__file__).with_name("cases.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["strategy_cases"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["strategy_cases"])
