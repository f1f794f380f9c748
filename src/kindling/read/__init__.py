"""Ingest: files to DataFrames, and the splits made of them."""

from kindling.read.idx import idx
from kindling.read.images import NOT_IMAGES, images
from kindling.read.moments import moments
from kindling.read.splits import Splits, labels, split

__all__ = ["NOT_IMAGES", "Splits", "idx", "images", "labels", "moments", "split"]
