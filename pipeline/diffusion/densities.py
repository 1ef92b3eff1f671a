"""Which timesteps training looks at: a uniform number → t, under any fixed density over 0..T-1.

A density other than the uniform one is importance sampling: the loss is divided by T·p_t, so its mean, and with it what
is learned, stays that of the weighting; only its variance changes.
"""

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.diffusion.schedule import Schedule

# Share of a shaped density that is uniform. It bounds 1/(T p_t) by 20: Hesterberg 1995, defensive mixtures.
UNIFORM_SHARE = 0.05


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


def timesteps(u: Tensor, density: Tensor) -> Tensor:
    """The t with p_0 + … + p_{t-1} ≤ u < p_0 + … + p_t: u [B], float64 uniform in [0, 1), gives t [B], int64, ~ p.

    density: float64 [T], a row of probabilities.  u is drawn on the CPU; anywhere else the check of its range would
    make the host wait.

    Raises ValueError: u not a float64 vector or outside [0, 1), density not float64 [T].
    """
    # float32 would not do: a draw close to 1 rounds to 1, and 2^24 values fall unevenly on T bins.
    if u.dtype != torch.float64 or u.ndim != 1:
        raise ValueError(f"u must be a float64 vector [B], got {u.dtype} of shape {list(u.shape)}")
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError(f"u must lie in [0, 1), got values from {u.min().item()} to {u.max().item()}")
    if density.dtype != torch.float64 or density.ndim != 1 or density.numel() == 0:
        raise ValueError(f"density must be a float64 vector [T], got {density.dtype} of shape {list(density.shape)}")
    # Summed in units of 1/T, where a uniform density's sums are whole numbers, and exact if T · (1/T) is 1 in float64
    # (1000 is such a T, 49 is not).  What rounding leaves over at the end belongs to T-1.
    num_timesteps = len(density)
    edges = (num_timesteps * density).cumsum(0)[:-1] / num_timesteps
    return torch.searchsorted(edges, u, right=True)


def uniform(num_timesteps: int) -> Tensor:
    """p_t = 1/T.  float64 [T].  Raises ValueError: num_timesteps below 1."""
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    return torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)


def log_normal(schedule: Schedule, mean: float, std: float) -> Tensor:
    """p_t such that ln σ ~ N(mean, std²), σ² = 1/SNR the noise's variance to that of z_0: Karras et al. 2022 section 5.

    Each t stands for the ln σ nearer to its own than to its neighbours'.  95% of p is that, 5% uniform.  float64 [T].

    Raises ValueError: mean or std not finite, std not above 0.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"ln sigma wants a finite mean and a finite standard deviation above 0, got {mean} and {std}")
    log_sigma = -0.5 * schedule.log_snr  # rises; +∞ at a zero terminal SNR
    edges = (log_sigma[1:] + log_sigma[:-1]) / 2
    below = torch.special.ndtr((edges - mean) / std)
    ends = below.new_tensor([0.0]), below.new_tensor([1.0])
    return _defensive(torch.cat([ends[0], below, ends[1]]).diff())


def from_table(importance: Sequence[float], num_timesteps: int) -> Tensor:
    """p_t in proportion to the entry of the K equal parts of 0..T-1 that t lies in; 95% that, 5% uniform.  float64 [T].

    The root of the mean square of the loss over each part is the table with the least variance: Nichol & Dhariwal 2021
    section 3.3, here fixed, so that a batch stays a function of (seed, position).

    Raises ValueError: an empty table, one longer than T, entries not finite or below 0, all of them 0.
    """
    table = torch.tensor(list(importance), dtype=torch.float64)
    if not 1 <= len(table) <= num_timesteps:
        raise ValueError(f"the importance table must have 1 to {num_timesteps} entries, got {len(table)}")
    if not bool((table.isfinite() & (table >= 0)).all()) or not bool(table.any()):
        raise ValueError("the importance table must hold finite numbers, none below 0, not all 0")
    part = torch.arange(num_timesteps) * len(table) // num_timesteps
    return _defensive(table[part] / table.max())  # by the largest, or a sum of large entries could overflow


def _defensive(density: Tensor) -> Tensor:
    return (1 - UNIFORM_SHARE) * density / density.sum() + UNIFORM_SHARE / len(density)
