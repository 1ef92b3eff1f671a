"""The noise schedule: β_t and everything that follows from it, in float64, and the same in diffusers' words.

Indexing, for the whole project: t counts from 0 to T-1, and t = 0 is already noised, with β_0. DDPM counts
from 1: its t is ours plus one. The clean latent sits before index 0, where ᾱ is 1.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

ScheduleName = Literal["linear", "scaled_linear", "cosine"]

# What the network is asked to say. These are diffusers' own words, so they pass unchanged into exported
# configs: epsilon is the noise, sample is z_0, v_prediction is the v of Salimans & Ho 2022.
PredictionType = Literal["epsilon", "v_prediction", "sample"]

# The variance σ_t² of a reverse step, in diffusers' words too: fixed_large is β_t and fixed_small is β̃_t, DDPM
# (Ho et al. 2020) section 3.2; learned_range lies between them, Nichol & Dhariwal 2021 eq. 15.
VarianceType = Literal["fixed_large", "fixed_small", "learned_range"]


@dataclass(frozen=True, eq=False)  # no ==: comparing tensors gives tensors, not one bool
class Schedule:
    """β_t and what follows from it: DDPM (Ho et al. 2020) section 2.  Every tensor is float64 [T].

    betas: the variance added at each t, in (0, 1); the last may be 1, which leaves nothing of z_0.
    alphas_cumprod: ᾱ_t = Π_{s≤t} (1 - β_s), the share of z_0's variance left at t.
    alphas_cumprod_prev: ᾱ_{t-1}; 1 before index 0.
    reaches_zero_snr: whether the last ᾱ_t is 0. A plain bool, so that asking does not wait for the GPU.

    Raises ValueError where betas is not a non-empty float64 vector in (0, 1), its last value in (0, 1], or where ᾱ_t
    stops falling before the end (a β of 1, or underflow).
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
        wrong = ((self.betas > 1) | ~(1 - self.betas < 1)).nonzero().flatten()
        if wrong.numel() > 0:
            t = int(wrong[0])
            raise ValueError(f"betas must lie in (0, 1], and 1 - beta below 1 in float64; beta_{t} is {self.betas[t]}")
        alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # Below 1e-308 ᾱ may stall above 0 as well: the last of the numbers times 0.9 is itself.
        spent = (alphas_cumprod[1:] >= alphas_cumprod[:-1]).nonzero().flatten()
        if spent.numel() > 0:
            t = int(spent[0])
            raise ValueError(
                f"alphas_cumprod is {alphas_cumprod[t]} at t = {t} already (beta_{t} is {self.betas[t]}) and falls no "
                f"further: only at the last, t = {len(self.betas) - 1}, may nothing of z_0 be left"
            )
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)  # the way to fill a frozen dataclass
        object.__setattr__(self, "alphas_cumprod_prev", alphas_cumprod_prev)
        object.__setattr__(self, "reaches_zero_snr", bool(alphas_cumprod[-1] == 0))

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

    def log_snr_at(self, index: Tensor) -> Tensor:
        """λ at a time between the indices, linear between neighbours.  index any shape, floating → float64.

        Below index 0 the line through indices 0 and 1 goes on: a time with less noise than the table has.

        Raises ValueError: an index above the last one (above the last but one where ᾱ ends in 0), NaN, or fewer than
        two indices with a finite λ.
        """
        table = self._finite_log_snr()
        if not bool((index <= len(table) - 1).all()):
            raise ValueError(f"index must be at most {len(table) - 1}, got {index.max().item()}")
        low = index.double().floor().long().clamp(0, len(table) - 2)
        return table[low] + (index.double() - low) * (table[low + 1] - table[low])

    def index_at(self, log_snr: Tensor) -> Tensor:
        """The time at which λ is log_snr: the inverse of `log_snr_at`.  Any shape, floating → float64.

        Raises ValueError: a log_snr below the last finite one, NaN, or fewer than two indices with a finite λ.
        """
        table = self._finite_log_snr()
        if not bool((log_snr >= table[-1]).all()):
            raise ValueError(f"log_snr must be at least {table[-1].item()}, got {log_snr.min().item()}")
        above = torch.searchsorted(-table, -log_snr.double().contiguous()).clamp(1, len(table) - 1)
        low = above - 1
        return low + (log_snr.double() - table[low]) / (table[above] - table[low])

    def _finite_log_snr(self) -> Tensor:
        table = self.log_snr[:-1] if self.reaches_zero_snr else self.log_snr
        if len(table) < 2:
            raise ValueError(
                f"a time between indices wants two of them with a finite log SNR, this schedule has {len(table)}"
            )
        return table

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule on another device, bit for bit."""
        # Copied, not derived again there: a GPU multiplies in another order and ends in other last bits.
        moved = copy.copy(self)
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved


def make_schedule(
    name: ScheduleName,
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    *,
    resolution_shift: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """The named schedule over num_timesteps steps, on the CPU, float64 throughout.

    linear: β from beta_start to beta_end in equal steps, DDPM (Ho et al. 2020) section 4.
    scaled_linear: √β in equal steps, as latent diffusion (Rombach et al. 2022) trains.
    cosine: ᾱ_t = f(t)/f(0) with f(t) = cos²((t/T + s)/(1 + s)·π/2), s = 0.008, and β_t = 1 - ᾱ_t/ᾱ_{t-1}
        capped at 0.999: Nichol & Dhariwal 2021 eq. 17, in diffusers squaredcos_cap_v2. It does not use
        beta_start and beta_end, which must be valid all the same.

    Then resolution_shift (`shifted`) and zero_terminal_snr (`with_zero_terminal_snr`), in this order.

    Raises ValueError: num_timesteps below 1, beta outside (0, 1), beta_start above beta_end, unknown name,
    resolution_shift not above 0, zero_terminal_snr with one step.
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
    schedule = Schedule(betas)
    if resolution_shift != 1.0:
        schedule = shifted(schedule, resolution_shift)
    return with_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """SNR'(t) = SNR(t) / factor²: simple diffusion (Hoogeboom et al. 2023) section 3.1.

    Averaging over factor × factor pixels removes that much of the noise, so a picture of factor times the size is
    as noisy to the eye as the smaller one was under the schedule as it is.

    Raises ValueError: factor not a finite number above 0, or one that leaves ᾱ no room between 0 and 1.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"resolution_shift must be a finite number above 0, got {factor}")
    abar = schedule.alphas_cumprod
    return _from_alphas_cumprod(abar / (abar + factor * factor * (1 - abar)))  # ** would raise where * gives infinity


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """√ᾱ_t moved and stretched so that the last is 0 and the first stays: Lin et al. 2024, algorithm 1.

    Nothing of z_0 is left at T-1, so there ε says nothing about z_0: predict v or z_0.  Raises ValueError: T = 1.
    """
    if schedule.num_timesteps < 2:
        raise ValueError("zero_terminal_snr wants two timesteps at least")
    signal = schedule.alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return _from_alphas_cumprod(((signal - last) * (first / (first - last))).square())


def respaced(schedule: Schedule, kept: Tensor) -> Schedule:
    """The chain that visits only the indices `kept`, rising int64 [S]: Nichol & Dhariwal 2021 section 4, eq. 19.

    Its ᾱ are those of the indices kept, bit for bit, its β_i = 1 - ᾱ_i/ᾱ_{i-1}.  The network is told kept[i], not i.

    Raises ValueError: kept not int64 [S], not rising, or outside [0, T).
    """
    if kept.dtype != torch.int64 or kept.ndim != 1 or kept.numel() == 0:
        raise ValueError(f"kept must be a non-empty int64 vector [S], got {kept.dtype} of shape {list(kept.shape)}")
    if bool((kept.diff() <= 0).any()) or int(kept[0]) < 0 or int(kept[-1]) >= schedule.num_timesteps:
        raise ValueError(f"kept must rise within [0, {schedule.num_timesteps}), got {kept.tolist()}")
    return _from_alphas_cumprod(schedule.alphas_cumprod[kept])


def scheduler_config(
    name: ScheduleName,
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    prediction_type: PredictionType,
    *,
    resolution_shift: float = 1.0,
    zero_terminal_snr: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for the diffusers `DDIMScheduler` that means the same as `make_schedule`.

    diffusers builds ᾱ in float32, from the name and the range or from the βs of a shifted schedule, so it agrees
    with ours to float32 rounding.  `from_scheduler_config` is the way back.

    Raises ValueError: as `make_schedule`, for an unknown prediction_type, which diffusers would take, and for
    epsilon with zero_terminal_snr.
    """
    schedule = make_schedule(name, num_timesteps, beta_start, beta_end, resolution_shift=resolution_shift)
    if zero_terminal_snr:
        with_zero_terminal_snr(schedule)  # for what it refuses: diffusers rescales by itself, and one step to NaN
    if prediction_type not in get_args(PredictionType):
        wanted = ", ".join(get_args(PredictionType))
        raise ValueError(f"unknown prediction_type {prediction_type!r}: want one of {wanted}")
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ValueError("epsilon says nothing about z_0 at a zero terminal SNR: want v_prediction or sample")
    return {
        "num_train_timesteps": num_timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": "squaredcos_cap_v2" if name == "cosine" else name,
        # diffusers knows no resolution shift by name
        "trained_betas": schedule.betas.tolist() if resolution_shift != 1.0 else None,
        "rescale_betas_zero_snr": zero_terminal_snr,
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


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[Schedule, PredictionType]:
    """The schedule and prediction type that a diffusers scheduler's config means, as of DDPM and DDIM.

    The names that are missing have diffusers' defaults.  Betas in float64; `trained_betas` as they are.

    Raises ValueError: a beta_schedule that `make_schedule` doesn't know, an unknown prediction_type, bad betas.
    """
    prediction_type: PredictionType = config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        wanted = ", ".join(get_args(PredictionType))
        raise ValueError(f"unknown prediction_type {prediction_type!r}: want one of {wanted}")
    if config.get("trained_betas") is not None:
        schedule = Schedule(torch.tensor(config["trained_betas"], dtype=torch.float64))
        if config.get("rescale_betas_zero_snr", False):
            schedule = with_zero_terminal_snr(schedule)
        return schedule, prediction_type
    named = config.get("beta_schedule", "linear")
    return make_schedule(
        "cosine" if named == "squaredcos_cap_v2" else named,
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    ), prediction_type


def _from_alphas_cumprod(alphas_cumprod: Tensor) -> Schedule:
    """The schedule whose ᾱ these are, bit for bit: β_t = 1 - ᾱ_t / ᾱ_{t-1}."""
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    schedule = Schedule(1 - alphas_cumprod / before)
    # A β near 1, as a long step has, keeps few digits of 1 - β: their product would be ᾱ to 1e-8 only.
    object.__setattr__(schedule, "alphas_cumprod", alphas_cumprod)
    object.__setattr__(schedule, "alphas_cumprod_prev", before)
    object.__setattr__(schedule, "reaches_zero_snr", bool(alphas_cumprod[-1] == 0))
    return schedule


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
