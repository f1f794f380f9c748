"""Preparation: from raw columns to tensors, the same in training and in prediction."""

from kindling.prepare.base import Packed, Preparation, Step, step_type
from kindling.prepare.columns import ArrayStep, LabelStep, ValueStep
from kindling.prepare.image import ImageStep

__all__ = ["ArrayStep", "ImageStep", "LabelStep", "Packed", "Preparation", "Step", "ValueStep", "step_type"]
