"""What the U-Net is told: class → arguments.  Sole owner of condition dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.class_conditional import class_arguments


def is_dropped(u: float, rate: float) -> bool:
    """Whether a sample with the draw u in [0,1) sees the null condition (Ho & Salimans 2022, algorithm 1)."""
    return u < rate


def unet_arguments(class_label: Tensor, dropped: Tensor, *, num_classes: int, width: int) -> dict[str, Tensor]:
    """Labels int64 [B] and dropped bool [B] → keyword arguments of UNet2DConditionModel.

    `num_classes` is also the id of the null class.  `width`: D of the condition tokens.
    """
    labels = torch.where(dropped, num_classes, class_label)
    return class_arguments(labels, width, torch.float32)
