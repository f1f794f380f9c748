"""Ingest: files to DataFrames, and the splits made of them."""

from kindling.read.images import images

__all__ = ["images"]
