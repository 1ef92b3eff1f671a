"""The variance-preserving SDE in continuous time, its reverse and its probability-flow ODE.

Song et al. 2021b ("Score-based generative modeling through stochastic differential equations"). Time t is a float that
runs from 0, the data's side, to the SDE's end, where hardly anything but noise is left. z is floating-point of any
shape, and the result keeps its dtype: a step is taken in that dtype, so pass float64 where rounding matters. A score is
a function of (z, t) that gives ∇_z ln p_t(z) in z's shape.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from pipeline.diffusion.schedule import Schedule

Score = Callable[[Tensor, float], Tensor]

# A time that rounding moved this far over an end of the SDE is taken for the end.
TIME_SLACK = 1e-9


@dataclass(frozen=True)
class VpSde:
    """dz = -½β(t) z dt + √β(t) dw for t in [0, end]: Song et al. 2021b eq. 11.

    beta: β(t) ≥ 0.
    integrated_beta: B(t), β from the clean latent to t, summed up, so that α(t)² = exp(-B(t)). Above 0 at t = 0 where
        the SDE begins with latents that are a little noised already.
    time_of: the t at which B is that much.
    end: the last time.

    Every method raises ValueError for a t outside [0, end].
    """

    beta: Callable[[float], float]
    integrated_beta: Callable[[float], float]
    time_of: Callable[[float], float]
    end: float = 1.0

    @classmethod
    def linear(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> "VpSde":
        """β(t) = beta_min + t (beta_max - beta_min) for t in [0, 1]: Song et al. 2021b appendix C.

        Raises ValueError: not 0 < beta_min ≤ beta_max < ∞.
        """
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"want 0 < beta_min <= beta_max, both finite, got {beta_min} and {beta_max}")
        slope = beta_max - beta_min
        return cls(
            beta=lambda t: beta_min + slope * t,
            integrated_beta=lambda t: (beta_min + slope * t / 2) * t,
            # The root of ½ slope t² + beta_min t - B that keeps its digits where B is small.
            time_of=lambda total: 2 * total / (beta_min + math.sqrt(beta_min**2 + 2 * slope * total)),
        )

    @classmethod
    def of_schedule(cls, schedule: Schedule) -> "VpSde":
        """The SDE whose log-SNR is the schedule's at its indices, and linear between them (`Schedule.log_snr_at`).

        Index i is at t = (i+1)/T, so T-1 is at 1, and the network is told T·t - 1. t = 0 is index -1, where the line
        through indices 0 and 1 has come: much SNR, not infinitely much, so the SDE begins with latents a little noised.
        The end is 1, or 1 - 1/T where ᾱ ends in 0: no finite β leads there.

        β(t) = -λ'(t) σ(t)² jumps at the indices, most of all at the first ones; there it has the mean of both sides, so
        that `heun` keeps its order on times that are indices. Between them it is of order 1; `adaptive` sees no jump.

        Raises ValueError: a schedule with fewer than two finite log-SNRs.
        """
        schedule = schedule.to("cpu")
        num_timesteps = schedule.num_timesteps
        last = num_timesteps - 2 if schedule.reaches_zero_snr else num_timesteps - 1

        def log_snr(index: float) -> float:
            # What rounding lifted over the last index is the last.
            return schedule.log_snr_at(torch.tensor(min(index, last), dtype=torch.float64)).item()

        def integrated_beta(t: float) -> float:
            return float(np.logaddexp(0, -log_snr(num_timesteps * t - 1)))  # -ln α² = ln(1 + 1/SNR)

        def beta(t: float) -> float:
            index, slack = num_timesteps * t - 1, num_timesteps * TIME_SLACK
            # Between indices one line has both slopes; at one, or a rounding beside it, two lines have one each.
            sides = (math.ceil(index - slack), math.floor(index + slack) + 1)
            upper = [min(max(side, 1), last) for side in sides]
            slope = num_timesteps / 2 * sum(log_snr(i) - log_snr(i - 1) for i in upper)
            return slope * math.expm1(-integrated_beta(t))  # σ² = 1 - exp(-B)

        def time_of(total: float) -> float:
            at = max(-total - math.log(-math.expm1(-total)), log_snr(last))  # ln α² - ln σ²
            return (schedule.index_at(torch.tensor(at, dtype=torch.float64)).item() + 1) / num_timesteps

        log_snr(0)  # refuses a schedule that has nothing between its indices
        return cls(beta, integrated_beta, time_of, (last + 1) / num_timesteps)

    def alpha(self, t: float) -> float:
        """α(t) = exp(-½∫β): Song et al. 2021b eq. 29."""
        return math.exp(-self.integrated_beta(self.within(t)) / 2)

    def sigma(self, t: float) -> float:
        """σ(t) = √(1 - exp(-∫β)): Song et al. 2021b eq. 29."""
        return math.sqrt(-math.expm1(-self.integrated_beta(self.within(t))))

    def drift(self, z: Tensor, t: float) -> Tensor:
        """f(z, t) = -½β(t) z, in z's shape: Song et al. 2021b eq. 11."""
        return -0.5 * self.beta(self.within(t)) * z

    def diffusion(self, t: float) -> float:
        """g(t) = √β(t): Song et al. 2021b eq. 11."""
        return math.sqrt(self.beta(self.within(t)))

    def marginal(self, z_0: Tensor, t: float) -> tuple[Tensor, float]:
        """Mean α(t) z_0, in z_0's shape, and standard deviation σ(t) of q(z_t | z_0): Song et al. 2021b eq. 29."""
        return self.alpha(t) * z_0, self.sigma(t)

    def prior_log_density(self, z: Tensor) -> Tensor:
        """ln N(z; 0, I), what p_end is taken for, in nats.  z [B,...] → float64 [B].

        Raises ValueError: z a single number.
        """
        if z.ndim == 0:
            raise ValueError("z must be [B,...], got a single number")
        return (-0.5 * (z.double().square() + math.log(2 * math.pi))).reshape(len(z), math.prod(z.shape[1:])).sum(1)

    def within(self, t: float) -> float:
        """t, or the end that rounding moved it over.  Raises ValueError: t outside [0, end]."""
        if not -TIME_SLACK <= t <= self.end + TIME_SLACK:  # also refuses NaN
            raise ValueError(f"t must lie in [0, {self.end}], got {t}")
        return min(max(t, 0.0), self.end)


def even_times(start: float, end: float, num_steps: int) -> list[float]:
    """num_steps + 1 times from start to end in equal steps.  Raises ValueError: num_steps below 1, start at end."""
    if num_steps < 1 or start == end:
        raise ValueError(f"want one step at least and two ends, got {num_steps} steps from {start} to {end}")
    return np.linspace(start, end, num_steps + 1).tolist()


def reverse_drift(score: Score, sde: VpSde, z: Tensor, t: float) -> Tensor:
    """f - g² ∇ ln p_t, the drift of the SDE that runs back in time: Song et al. 2021b eq. 6 (Anderson 1982)."""
    return sde.drift(z, t) - sde.diffusion(t) ** 2 * score(z, t)


def ode_drift(score: Score, sde: VpSde, z: Tensor, t: float) -> Tensor:
    """f - ½g² ∇ ln p_t, of the ODE with the SDE's marginals: Song et al. 2021b eq. 13."""
    return sde.drift(z, t) - 0.5 * sde.diffusion(t) ** 2 * score(z, t)


def euler_maruyama_step(score: Score, sde: VpSde, z: Tensor, *, start: float, end: float, noise: Tensor) -> Tensor:
    """One step of the reverse-time SDE from start down to end: z + (f - g² ∇ ln p)·(end-start) + g·√(start-end)·noise.

    noise in z's shape, standard normal.  Raises ValueError: end not below start, shapes that differ.
    """
    if not end < start:
        raise ValueError(f"the reverse-time SDE runs from a later time to an earlier one, got {start} to {end}")
    if noise.shape != z.shape:
        raise ValueError(f"noise must have z's shape {list(z.shape)}, got {list(noise.shape)}")
    return (
        z + (end - start) * reverse_drift(score, sde, z, start) + math.sqrt(start - end) * sde.diffusion(start) * noise
    )


def euler_maruyama(
    score: Score, sde: VpSde, z: Tensor, times: Sequence[float], noise: Callable[[int], Tensor]
) -> Tensor:
    """The reverse-time SDE through falling times, by Euler and Maruyama: weak order 1 in the step.

    noise(k): step k's, counted from 0, standard normal in z's shape.  Raises ValueError: as `euler_maruyama_step`, or
    fewer than two times.
    """
    for k, (start, end) in enumerate(_steps(times)):
        z = euler_maruyama_step(score, sde, z, start=start, end=end, noise=noise(k))
    return z


def euler_step(score: Score, sde: VpSde, z: Tensor, *, start: float, end: float) -> Tensor:
    """One step of the probability-flow ODE by Euler: asks the score once, at start."""
    return z + (end - start) * ode_drift(score, sde, z, start)


def heun_step(score: Score, sde: VpSde, z: Tensor, *, start: float, end: float) -> Tensor:
    """One step of the probability-flow ODE by Heun's method, as Karras et al. 2022 Algorithm 1: asks at both ends."""
    first = ode_drift(score, sde, z, start)
    second = ode_drift(score, sde, z + (end - start) * first, end)
    return z + (end - start) / 2 * (first + second)


def euler(score: Score, sde: VpSde, z: Tensor, times: Sequence[float]) -> Tensor:
    """The probability-flow ODE through times that fall (sampling) or rise (encoding), by Euler: order 1.

    Raises ValueError: fewer than two times, or neither falling nor rising ones.
    """
    for start, end in _steps(times):
        z = euler_step(score, sde, z, start=start, end=end)
    return z


def heun(score: Score, sde: VpSde, z: Tensor, times: Sequence[float]) -> Tensor:
    """The same by Heun's method: order 2, and two questions to the score a step."""
    for start, end in _steps(times):
        z = heun_step(score, sde, z, start=start, end=end)
    return z


def adaptive(
    score: Score, sde: VpSde, z: Tensor, start: float, end: float, *, rtol: float = 1e-5, atol: float = 1e-5
) -> tuple[Tensor, int]:
    """The probability-flow ODE from start to end by `integrate` → z there, and how often the score was asked.

    In B = ∫β in the place of t: dz/dB = -½(z + ∇ ln p), Song et al. 2021b eq. 13 over β(t). So a β that jumps, as of
    `VpSde.of_schedule`, is no obstacle: an error estimate trusts the derivatives that a jump has not.

    Raises ValueError and RuntimeError as `integrate`, and ValueError for a start or end outside the SDE's times.
    """
    first, last = (sde.integrated_beta(sde.within(t)) for t in (start, end))

    def drift(total: float, here: Tensor) -> Tensor:
        return -0.5 * (here + score(here, min(max(sde.time_of(total), 0.0), sde.end)))

    return integrate(drift, z, first, last, rtol=rtol, atol=atol)


def integrate(
    drift: Callable[[float, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float | NDArray[np.float64] = 1e-5,
) -> tuple[Tensor, int]:
    """dy/dt = drift(t, y) from start to end (which may lie before it) → y there, and how often drift was asked.

    SciPy's solve_ivp with DOP853, an explicit Runge-Kutta method of order 8 (Hairer, Nørsett & Wanner 1993) that
    chooses its steps so that the root mean square over all elements of error / (atol + rtol·|y|) stays below 1.

    y float32 or float64 of any shape; its device and dtype are those of the result and of what drift is given, and
    drift's answer has its shape. The state is kept in float64 on the host.  atol: one number, or one for each element
    in y's order.

    Raises ValueError: y of another dtype or not finite, a time not finite, tolerances finer than y's dtype can tell (it
    would take the rounding of drift for a stiff ODE), an answer of another shape.  RuntimeError: the solver gave up, or
    drift is not finite where it begins.
    """
    _refuse_unsolvable(y, start, end, max(rtol, float(np.min(atol))))
    if start == end:
        return y.detach().clone(), 0
    num_calls = 0

    def f(t: float, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal num_calls
        num_calls += 1
        # Copies both ways: SciPy goes on using what it gives and gets, and drift may write into either.
        here = torch.tensor(flat).reshape(y.shape).to(y.device, y.dtype)
        change = drift(t, here).detach()
        if change.shape != y.shape:
            raise ValueError(f"drift must have y's shape {list(y.shape)}, got {list(change.shape)}")
        # SciPy chooses its first step by this one; of a NaN it makes a step of NaN, and never ends.
        if num_calls == 1 and not bool(change.isfinite().all()):
            raise RuntimeError(f"the ODE from {start} to {end} was not solved: drift is not finite at {t}")
        return change.double().cpu().numpy().reshape(-1).copy()

    state = y.detach().double().cpu().numpy().reshape(-1)
    found = solve_ivp(f, (start, end), state, method="DOP853", rtol=rtol, atol=atol, t_eval=[end])
    if not found.success:
        raise RuntimeError(f"the ODE from {start} to {end} was not solved: {found.message}")
    return torch.from_numpy(found.y[:, -1]).reshape(y.shape).to(y.device, y.dtype), num_calls


def _refuse_unsolvable(y: Tensor, start: float, end: float, tolerance: float) -> None:
    if y.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"y must be float32 or float64, got {y.dtype}")
    if not bool(y.isfinite().all()):
        raise ValueError("y must be finite where the ODE begins")
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError(f"start and end must be finite, got {start} and {end}")
    finest = torch.finfo(y.dtype).eps
    if not tolerance >= finest:  # also refuses NaN
        raise ValueError(f"rtol or atol must be at least {finest} for {y.dtype}, got {tolerance} at most")


def _steps(times: Sequence[float]) -> list[tuple[float, float]]:
    steps = list(pairwise(times))
    if not steps or not (all(a > b for a, b in steps) or all(a < b for a, b in steps)):
        raise ValueError(f"times must be two at least and all fall or all rise, got {list(times)}")
    return steps
