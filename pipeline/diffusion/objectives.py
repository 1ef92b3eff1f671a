"""The training objective along its road: a uniform number → t → what the network should say → its loss."""

from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.diffusion.process import check_shapes, result_dtype, v_from
from pipeline.diffusion.schedule import PredictionType, Schedule


@overload
def stratified(u_0: float, slot: int, num_slots: int) -> float: ...
@overload
def stratified(u_0: float, slot: NDArray[np.int64], num_slots: int) -> NDArray[np.float64]: ...
@overload
def stratified(u_0: NDArray[np.float64], slot: int | NDArray[np.int64], num_slots: int) -> NDArray[np.float64]: ...
@overload
def stratified(u_0: float, slot: Tensor, num_slots: int) -> Tensor: ...
@overload
def stratified(u_0: Tensor, slot: int | Tensor, num_slots: int) -> Tensor: ...


def stratified(
    u_0: float | NDArray[np.float64] | Tensor, slot: int | NDArray[np.int64] | Tensor, num_slots: int
) -> float | NDArray[np.float64] | Tensor:
    """(u_0 + slot/num_slots) mod 1, the low-discrepancy draw of VDM (Kingma et al. 2021) appendix I.1.

    One u_0, uniform on [0, 1), serves all num_slots slots of a global batch. Each slot's number is uniform
    again, so the loss stays unbiased; together they visit each of num_slots equal strata once, so its
    variance falls. Python numbers, numpy arrays or CPU tensors, which broadcast; u_0 and the result
    float64, slot integers. The result is always below 1.

    Raises ValueError: num_slots below 1, u_0 outside [0, 1), slot outside [0, num_slots).
    """
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    # A u_0 just below 0 would come out as exactly 1, the one value that must not come out.
    if not bool(torch.as_tensor((u_0 >= 0) & (u_0 < 1)).all()):
        raise ValueError(f"u_0 must lie in [0, 1), got {u_0}")
    if not bool(torch.as_tensor((slot >= 0) & (slot < num_slots)).all()):
        raise ValueError(f"slot must lie in [0, {num_slots}), got {slot}")
    if isinstance(slot, Tensor):
        slot = slot.double()  # torch divides integers in float32
    # For a sum in [0, 2) the remainder is exact: a sum that rounds up to 1 gives 0, and no other reaches 1.
    return (u_0 + slot / num_slots) % 1.0


def timesteps(u: Tensor, num_timesteps: int) -> Tensor:
    """t = floor(u·T), so that a uniform u [B], float64 in [0, 1), gives t [B], int64, uniform on 0..T-1.

    u is drawn on the CPU; anywhere else the check of its range would make the host wait.

    Raises ValueError: num_timesteps below 1, u not a float64 vector, u outside [0, 1).
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    # float32 would not do: a draw close to 1 rounds to 1, and 2^24 values fall unevenly on T bins.
    if u.dtype != torch.float64 or u.ndim != 1:
        raise ValueError(f"u must be a float64 vector [B], got {u.dtype} of shape {list(u.shape)}")
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError(f"u must lie in [0, 1), got values from {u.min().item()} to {u.max().item()}")
    # u < 1 alone does not keep the rounded product u·T below T. Rounding to the nearest does, even for the
    # largest u, 1 - 2^-53; the clamp keeps the index in range should a device round another way.
    return (u * num_timesteps).floor().long().clamp(max=num_timesteps - 1)


def target(prediction_type: PredictionType, z_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What the network should say about z_t = q_sample(z_0, t, eps, schedule).

    z_0, eps [B,C,h,w]; t int64 [B] → [B,C,h,w], float32, or float64 where an input is float64.

    Raises ValueError: shapes that do not fit, t not int64, an unknown prediction_type.
    """
    check_shapes(t, z_0=z_0, eps=eps)
    match prediction_type:
        case "epsilon":
            return eps.to(result_dtype(z_0, eps))
        case "v_prediction":
            return v_from(z_0, eps, t, schedule)
        case "sample":
            return z_0.to(result_dtype(z_0, eps))
    raise ValueError(f"unknown prediction_type {prediction_type!r}: want epsilon, v_prediction or sample")


def simple_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_simple = ‖target - prediction‖², DDPM (Ho et al. 2020) eq. 14 and Algorithm 1, mean over C, h and w.

    prediction, target [B,C,h,w] of any floating dtype → [B], float32, or float64 where an input is float64.
    One number per sample: weights and the mean over the global batch are the caller's.

    Raises ValueError where the shapes differ: broadcasting would make a wrong loss of them.
    """
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(
            "prediction and target must have one shape [B,C,h,w], "
            f"got {list(prediction.shape)} and {list(target.shape)}"
        )
    dtype = result_dtype(prediction, target)  # cast first: a bfloat16 difference would lose the small errors
    return (prediction.to(dtype) - target.to(dtype)).square().mean(dim=(1, 2, 3))
