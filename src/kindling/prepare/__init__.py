"""Preparation: from raw columns to tensors, the same in training and in prediction."""

from kindling.prepare.augment import Augmentation, RandomColor, RandomCrop, RandomFlip, RandomZoom
from kindling.prepare.base import Packed, Preparation, Step, step_type
from kindling.prepare.columns import ArrayStep, LabelStep, ManyLabelsStep, RowWeightStep, ScaledArrayStep, ValueStep
from kindling.prepare.image import ImageStep
from kindling.prepare.sequence import LengthStep, SequenceStep
from kindling.prepare.table import CategoryStep, NumberStep
from kindling.prepare.text import TokenStep

__all__ = [
    "ArrayStep",
    "Augmentation",
    "CategoryStep",
    "ImageStep",
    "LabelStep",
    "LengthStep",
    "ManyLabelsStep",
    "NumberStep",
    "Packed",
    "Preparation",
    "RandomColor",
    "RandomCrop",
    "RandomFlip",
    "RandomZoom",
    "RowWeightStep",
    "ScaledArrayStep",
    "SequenceStep",
    "Step",
    "TokenStep",
    "ValueStep",
    "step_type",
]
