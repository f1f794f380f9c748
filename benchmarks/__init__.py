"""Measurements of kindling: one runner (`run.py`), one registry, one module per case. Not part of the wheel."""
