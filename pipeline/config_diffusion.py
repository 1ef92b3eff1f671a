"""The `diffusion` section: the forward process, what the network says of it, and how its errors count."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vae.config import Section


class DiffusionConfig(Section):
    """The forward process, what the network predicts of it, and how its errors are weighed."""

    objective: Literal["ddpm", "edm", "flow"] = Field(
        default="ddpm",
        description="ddpm: discrete timesteps, with every key below; edm: the preconditioned denoiser of Karras et al. "
        "2022; flow: straight lines from noise to data, whose velocity the network says.",
    )
    schedule: Literal["linear", "scaled_linear", "cosine"] = Field(default="linear", description="Shape of beta_t.")
    num_timesteps: int = Field(default=1000, gt=1, description="T.")
    beta_start: float = Field(default=1e-4, gt=0, lt=1, description="First beta; unused by cosine.")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="Last beta; unused by cosine.")
    resolution_shift: float = Field(
        default=1.0,
        gt=0,
        description="Divides the SNR by its square: the side of these latents over the side that the schedule was made "
        "for, such as 2 for 64 with a schedule for 32.",
    )
    zero_terminal_snr: bool = Field(
        default=False,
        description="Rescale beta so that nothing is left of the latent at T-1; wants v_prediction or sample.",
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        default="epsilon", description="What the U-Net outputs: the noise, v, or the clean latent."
    )
    variance_type: Literal["fixed_large", "fixed_small", "learned_range"] = Field(
        default="fixed_large",
        description="Variance of a reverse step: beta_t, the posterior's, or learned between the two: the U-Net then "
        "has as many output channels again. The fixed ones change the training only with weighting: vlb.",
    )
    vlb_weight: float = Field(
        default=1.0,
        gt=0,
        description="learned_range: weight of the bound beside the weighted error, in units of T/1000 bits/dim.",
    )
    weighting: Literal[
        "unweighted", "simple", "snr_plus_one", "truncated_snr", "min_snr", "sigmoid", "edm", "elbo", "vlb"
    ] = Field(
        default="unweighted",
        description="How much the errors at each noise level count. unweighted: each the same on what is predicted, "
        "which is L_simple for epsilon.",
    )
    min_snr_gamma: float = Field(default=5.0, gt=0, description="min_snr: the SNR above which none counts more.")
    sigmoid_bias: float = Field(default=0.0, description="sigmoid: the log-SNR at which the weight is 1/2.")
    timestep_draw: Literal["stratified", "independent"] = Field(
        default="stratified",
        description="stratified: a step's times are spread evenly over the density, which lowers the loss's variance.",
    )
    timestep_density: Literal["uniform", "log_normal"] | tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default="uniform",
        description="How often each timestep is drawn; the loss is divided by it, so what is learned stays the same. "
        "log_normal: ln sigma is normal with noise_mean and noise_std; a list: the weights of equal parts of 0..T-1.",
    )
    noise_mean: float | None = Field(
        default=None,
        description="Mean of ln sigma (edm, log_normal; null: -0.51, which is the paper's -1.2, for data of deviation "
        "0.5, at latents' 1) or of logit tau (flow; null: 0).",
    )
    noise_std: float | None = Field(
        default=None, gt=0, description="The standard deviation of the same; null: 1.2, flow 1."
    )
    learned_weighting: bool = Field(
        default=False,
        description="Divide the loss at each noise level by what it is expected to be there, which a small head learns "
        "beside the U-Net (EDM2's log-variance): then every level that is drawn counts the same.",
    )

    @property
    def schedule_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `make_schedule`."""
        return {
            "name": self.schedule,
            "num_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "resolution_shift": self.resolution_shift,
            "zero_terminal_snr": self.zero_terminal_snr,
        }

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        learned, shaped = self.variance_type == "learned_range", self.timestep_density == "log_normal"
        levels = (shaped or self.objective != "ddpm", "timestep_density: log_normal, or objective: edm or flow")
        uses = {  # key: whether something reads it, and what would
            "vlb_weight": (learned, "variance_type: learned_range"),
            "min_snr_gamma": (self.weighting == "min_snr", "weighting: min_snr"),
            "sigmoid_bias": (self.weighting == "sigmoid", "weighting: sigmoid"),
            "noise_mean": levels,
            "noise_std": levels,
        }
        if self.objective != "ddpm":
            elsewhere = {"objective", "timestep_draw", "noise_mean", "noise_std", "learned_weighting"}
            uses |= {key: (False, "objective: ddpm") for key in type(self).model_fields if key not in elsewhere}
        for key, (used, wanted) in uses.items():
            if not used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} has a meaning only with {wanted}")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr wants prediction_type: v_prediction or sample; at T-1 epsilon says nothing"
            )
        if learned and self.weighting == "vlb":
            raise ValueError(
                "weighting: vlb wants a fixed variance_type; learned_range adds the bound to another weighting"
            )
        if learned and self.learned_weighting:
            raise ValueError(
                "learned_weighting wants a loss that is never negative; the bound that variance_type: learned_range "
                "adds may be: a fixed variance_type was wanted"
            )
        if isinstance(self.timestep_density, tuple) and sum(self.timestep_density) == 0:
            raise ValueError("timestep_density holds no number above 0")
        if isinstance(self.timestep_density, tuple) and len(self.timestep_density) > self.num_timesteps:
            raise ValueError(f"timestep_density has {len(self.timestep_density)} entries, T is {self.num_timesteps}")
        return self
