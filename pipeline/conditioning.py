"""What the U-Net is told: class → arguments.  Sole owner of condition dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.class_conditional import Told


def is_dropped(u: float, rate: float) -> bool:
    """Whether a sample with the draw u in [0,1) sees the null condition (Ho & Salimans 2022, algorithm 1)."""
    return u < rate


def told_class(class_label: Tensor, dropped: Tensor, *, num_classes: int) -> Told:
    """Labels int64 [B] and dropped bool [B] → what the U-Net is told.  `num_classes` is also the null class's id."""
    return Told(labels=torch.where(dropped, num_classes, class_label))
