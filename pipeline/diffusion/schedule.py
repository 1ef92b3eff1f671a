"""The noise schedule: β_t and everything that follows from it, in float64, and the same in diffusers' words.

Indexing, for the whole project: t counts from 0 to T-1, and t = 0 is already noised, with β_0. DDPM counts
from 1: its t is ours plus one. The clean latent sits before index 0, where ᾱ is 1.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

ScheduleName = Literal["linear", "scaled_linear", "cosine"]

# What the network is asked to say. These are diffusers' own words, so they pass unchanged into exported
# configs: epsilon is the noise, sample is z_0, v_prediction is the v of Salimans & Ho 2022.
PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, eq=False)  # no ==: comparing tensors gives tensors, not one bool
class Schedule:
    """β_t and what follows from it: DDPM (Ho et al. 2020) section 2.  Every tensor is float64 [T].

    betas: the variance added at each t, in (0, 1]. Exactly 1 means that nothing of z_0 is left from there on.
    alphas_cumprod: ᾱ_t = Π_{s≤t} (1 - β_s), the share of z_0's variance left at t.
    alphas_cumprod_prev: ᾱ_{t-1}; 1 before index 0.
    reaches_zero_snr: whether ᾱ_t is 0 for some t. A plain bool, so that asking does not wait for the GPU.

    Raises ValueError where betas is not a non-empty float64 vector in (0, 1].
    """

    betas: Tensor  # float64 [T]
    alphas_cumprod: Tensor = field(init=False)  # float64 [T]
    alphas_cumprod_prev: Tensor = field(init=False)  # float64 [T]
    reaches_zero_snr: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64 or self.betas.ndim != 1 or self.betas.numel() == 0:
            came = f"{self.betas.dtype} of shape {list(self.betas.shape)}"
            raise ValueError(f"betas must be a non-empty float64 vector, got {came}")
        # A β below 2^-54 is above 0 but leaves 1 - β at 1: with no noise at t = 0, no ε to tell.
        if not bool(((self.betas <= 1) & (1 - self.betas < 1)).all()):
            raise ValueError("betas must lie in (0, 1], and 1 - beta below 1 in float64")
        alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)  # the way to fill a frozen dataclass
        object.__setattr__(self, "alphas_cumprod_prev", alphas_cumprod_prev)
        object.__setattr__(self, "reaches_zero_snr", bool((alphas_cumprod == 0).any()))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.betas.shape[0]

    @property
    def snr(self) -> Tensor:
        """SNR(t) = ᾱ_t / (1 - ᾱ_t), float64 [T]: VDM (Kingma et al. 2021) eq. 2, variance preserving."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def log_snr(self) -> Tensor:
        """ln SNR(t), float64 [T]; -inf where ᾱ_t is 0."""
        return torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule on another device, bit for bit."""
        # Copied, not derived again there: a GPU multiplies in another order and ends in other last bits.
        moved = copy.copy(self)
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved


def make_schedule(name: ScheduleName, num_timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """The named schedule over num_timesteps steps, on the CPU, float64 throughout.

    linear: β from beta_start to beta_end in equal steps, DDPM (Ho et al. 2020) section 4.
    scaled_linear: √β in equal steps, as latent diffusion (Rombach et al. 2022) trains.
    cosine: ᾱ_t = f(t)/f(0) with f(t) = cos²((t/T + s)/(1 + s)·π/2), s = 0.008, and β_t = 1 - ᾱ_t/ᾱ_{t-1}
        capped at 0.999: Nichol & Dhariwal 2021 eq. 17, in diffusers squaredcos_cap_v2. It does not use
        beta_start and beta_end, which must be valid all the same.

    Raises ValueError: num_timesteps below 1, beta outside (0, 1), beta_start above beta_end, unknown name.
    """
    _refuse_bad_arguments(name, num_timesteps, beta_start, beta_end)
    match name:
        case "linear":
            betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        case "scaled_linear":
            first, last = math.sqrt(beta_start), math.sqrt(beta_end)
            betas = torch.linspace(first, last, num_timesteps, dtype=torch.float64).square()
        case "cosine":
            # Here t counts as in the paper, from the clean latent at 0 to T: T + 1 values for T steps.
            u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
            f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)).square()
            # Without the cap the last β is 1, and ε-prediction has nothing to divide by there.
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return Schedule(betas)


def scheduler_config(
    name: ScheduleName,
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    prediction_type: PredictionType,
) -> dict[str, Any]:
    """Keyword arguments for the diffusers `DDIMScheduler` that means the same as `make_schedule`.

    diffusers rebuilds ᾱ from the name and the range in float32, so it agrees with ours to float32 rounding.

    Raises ValueError: as `make_schedule`, and for an unknown prediction_type, which diffusers would take.
    """
    _refuse_bad_arguments(name, num_timesteps, beta_start, beta_end)
    if prediction_type not in get_args(PredictionType):
        wanted = ", ".join(get_args(PredictionType))
        raise ValueError(f"unknown prediction_type {prediction_type!r}: want one of {wanted}")
    match name:
        case "linear" | "scaled_linear":
            beta_schedule = name
        case "cosine":
            beta_schedule = "squaredcos_cap_v2"
    return {
        "num_train_timesteps": num_timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": beta_schedule,
        "prediction_type": prediction_type,
        # Latents have no bounds to clip to: diffusers' default of True would cut them at ±1.
        "clip_sample": False,
        # The last step goes from some t ≥ 0 to before index 0. Index 0 is already noised; before it ᾱ is 1,
        # and True says so: the last step lands on the clean latent. False would put ᾱ_0 there, and the
        # sample would keep the noise of t = 0.
        "set_alpha_to_one": True,
        # Starts at T-1, where the latent is nearest to the pure noise that sampling starts from; "leading"
        # stops short of it: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
        # table 2. Sample with a number of steps that divides T: diffusers counts back by T // steps, and
        # otherwise may end on ᾱ_0 (T = 1000 in 7 steps) or add a timestep -1 (in 61).
        "timestep_spacing": "trailing",
        # Has no effect with "trailing"; StableDiffusionPipeline overwrites any other value, with a warning.
        "steps_offset": 1,
    }


def _refuse_bad_arguments(name: str, num_timesteps: int, beta_start: float, beta_end: float) -> None:
    if name not in get_args(ScheduleName):
        raise ValueError(f"unknown schedule {name!r}: want one of {', '.join(get_args(ScheduleName))}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    for end, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:  # also refuses NaN
            raise ValueError(f"{end} must lie in (0, 1), got {beta}")
    if beta_start > beta_end:
        raise ValueError(f"beta_start must not exceed beta_end, got {beta_start} > {beta_end}")
