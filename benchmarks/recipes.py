"""What `learning.py` compares: sets of images with the networks that all recipes share, and the recipes as overrides.

A recipe is one line.  `plain` is what diffusers' example scripts do: epsilon, uniform independent times, each counted
the same, a learning rate that stays after a short warm-up, an average of decay 0.9999 under TensorFlow's ramp.  In so
few steps the ramp, (1 + n) / (10 + n), is below any decay above 0.995: all of these are the same average.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIAL_SEED = 100  # nothing else is reported of it
PLAIN, BEST, BARE = "plain", "best", "best without U-REPA"  # what is compared in the end


@dataclass(frozen=True)
class Set:
    """Images, and overrides for the autoencoder and the U-Net."""

    config: str
    prepare: tuple[str, ...]
    words: tuple[str, ...]
    steps: int  # of plain
    batch_images: int
    learning_rate: float

    @property
    def num_images(self) -> int:
        """That plain sees, each many times."""
        return self.steps * self.batch_images


SETS = {
    "digits": Set(
        "digits_class.yaml",
        ("digits",),
        ("unet.block_out_channels=[32,64]",),
        steps=1600,
        batch_images=32,
        learning_rate=4e-3,
    ),
    "emoji": Set(
        "emoji_text.yaml",
        ("emoji", "--validation", "0.089"),
        (
            "vae.model.block_out_channels=[16,32,64]",
            "vae.train.steps=4000",
            "unet.block_out_channels=[32,64]",
            "unet.down_block_types=[DownBlock2D,CrossAttnDownBlock2D]",
            "unet.up_block_types=[CrossAttnUpBlock2D,UpBlock2D]",
        ),
        steps=1600,
        batch_images=32,
        learning_rate=4e-3,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What is different, as overrides; how many images it is given, and which lengths of its average are looked at."""

    words: tuple[str, ...]
    rate: float = 1.0  # times the set's learning rate
    shares: tuple[float, ...] = (1.0,)  # of plain's images: a run for each
    sigma_rels: tuple[float, ...] = ()
    solver: str = "DPMSolverMultistepScheduler"  # of second order: as many passes of the network, and a smaller error
    teacher: bool = False  # whether U-REPA aligns it with the teacher of `backbones.py`

    @property
    def falls(self) -> bool:
        """Whether its learning rate falls to 0 at the end of a run: halfway, such a run isn't half a run."""
        return COSINE in self.words


def ddpm(keys: str) -> str:
    """Latent diffusion's own noise schedule, and what else the section says."""
    return f"diffusion={{schedule: scaled_linear, beta_start: 0.00085, beta_end: 0.012, {keys}}}"


EXAMPLE = ddpm("prediction_type: epsilon, timestep_draw: independent")
STRATIFIED = ddpm("prediction_type: epsilon")
MIN_SNR = ddpm("prediction_type: v_prediction, weighting: min_snr")
SIGMOID = ddpm("prediction_type: v_prediction, weighting: sigmoid, sigmoid_bias: -2")
EDM = "diffusion={objective: edm}"
LEARNED = "diffusion={objective: edm, noise_mean: 0.3, noise_std: 1.0, learned_weighting: true}"  # as EDM2: -0.4 + ln 2
FLOW = "diffusion={objective: flow}"
COSINE = "optimizer.schedule=cosine"
MUON = "optimizer.kind=muon"
SHORT = "ema.decays=[0.95]"  # an average that keeps up with a network that changes quickly
EDM_SOLVER = "EDMDPMSolverMultistepScheduler"
LENGTHS = (0.03, 0.1)  # of averages that are made afterwards

RECIPES = {
    PLAIN: Recipe((EXAMPLE,)),
    "epsilon, stratified t": Recipe((STRATIFIED,)),
    "v, min-SNR-5": Recipe((MIN_SNR,)),
    "v, sigmoid": Recipe((SIGMOID,)),
    "EDM": Recipe((EDM,), solver=EDM_SOLVER),
    "EDM2's noise, learned log-variance": Recipe((LEARNED,), solver=EDM_SOLVER),
    "flow": Recipe((FLOW,), sigma_rels=LENGTHS),
    "flow, U-REPA": Recipe((FLOW,), teacher=True),
    "epsilon, Muon": Recipe((EXAMPLE, MUON), shares=(0.5,)),
    "flow, Muon": Recipe((FLOW, MUON), shares=(0.5,)),
    BARE: Recipe((FLOW, MUON, COSINE, SHORT), shares=(0.5,)),
    BEST: Recipe((FLOW, MUON, COSINE, SHORT), shares=(0.5,), teacher=True),
}
TRIALS = {
    f"{name} at {rate:g} of the rate": Recipe((words,), rate=rate)
    for name, words in ((PLAIN, EXAMPLE), ("flow", FLOW))
    for rate in (0.25, 0.5, 1, 2)
}
EVERY = {**RECIPES, **TRIALS}
