"""What every strategy gives: one small interface, so that averages, checkpoints and the loop are written once.

All that a checkpoint or an average holds is a list of this rank's local fp32 tensors, in the layout of the
optimizer's master weights, which is the strategy's own affair.  `full` is the way from such a list to whole tensors
under their names, `fill` the way back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from pipeline.strategies.precision import LossScale, scaled

Whole = Callable[[str], Tensor]  # a parameter's name → its whole tensor, on any device


@dataclass(frozen=True)
class StepReport:
    """What one step found; scalars on a device, so that nobody has to wait for them here.

    grad_norm: L2 norm of the mean gradient over micro-batches and ranks, before clipping; inf or nan where it was so.
    finite: False where a loss or gradient was not, and the run should end.  No weight was changed.
    skipped: True where fp16 overflowed: no weight was changed, the loss scale is halved, and the run goes on.
    """

    grad_norm: Tensor
    finite: Tensor
    skipped: Tensor


class Wrapped(ABC):
    """A module that trains on all ranks, and its AdamW."""

    model: Module  # what the loss calls; its forward runs in the precision that was asked for and gives fp32
    names: tuple[str, ...]  # of the trained parameters, as the module called them before
    loss_scale: LossScale | None  # of fp16

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Forward and backward of one micro-batch go in here; `last` of the step, or gradients are kept for later."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; `loss`: an fp32 scalar, already divided by the number of micro-batches.

        A loss that is not finite makes its gradients nan: so every rank learns of it by the gradients' reduction.
        """
        scaled(loss, self.loss_scale).backward()

    @abstractmethod
    def step(self, learning_rate: float) -> StepReport:
        """Clip and update, unless something was not finite; drop the gradients."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """This rank's fp32 master weights themselves, not copies: the list for `full`, `fill` and averages."""

    @abstractmethod
    def moments(self) -> dict[str, list[Tensor]]:
        """exp_avg and exp_avg_sq in the layout of `weights`, themselves; {} before the first step."""

    @abstractmethod
    def num_updates(self) -> int:
        """Steps that changed the weights, by which AdamW corrects its bias: those skipped don't count."""

    @abstractmethod
    def full(self, local: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every name and its whole fp32 tensor from a list like `weights`, in the order of `names`.

        All ranks iterate together to the end.  One tensor is whole at a time; it may be the weight itself, so copy
        what is kept.
        """

    @abstractmethod
    def fill(self, local: list[Tensor], whole: Whole) -> None:
        """Put this rank's part of each whole tensor into a list like `weights`."""

    @abstractmethod
    def load(self, weights: Whole, moments: Mapping[str, Whole], num_updates: int) -> None:
        """Go on from a checkpoint: master weights and what the forward pass reads, moments, their count of updates.

        `moments` are not looked at where `num_updates` is 0.
        """

    def scaler(self) -> dict[str, float]:
        """fp16: the loss scale and how many steps it has been good for; {} in other precisions."""
        return self.loss_scale.state() if self.loss_scale else {}

    def load_scaler(self, state: Mapping[str, float]) -> None:
        """Take over what `scaler` gave."""
        if self.loss_scale and state:
            self.loss_scale.load(state)
