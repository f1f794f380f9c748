"""Makes `zoo.py`, the modules that surgery is tried on, importable as `surgery_zoo` by the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if "surgery_zoo" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("surgery_zoo", Path(__file__).with_name("zoo.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["surgery_zoo"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["surgery_zoo"])
