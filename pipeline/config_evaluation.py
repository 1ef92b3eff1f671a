"""The `evaluation` and `tracking` sections: what is measured of a model, how often, and where it is written down."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vae.config import FREE, Section

NOT_ONE: dict[str, Any] = {"not": {"const": 1}}  # for editors


class LikelihoodConfig(Section):
    """How many bits the held-out images cost under the model, without guidance."""

    num_images: int = Field(
        default=64,
        ge=0,
        description="Held-out images whose variational bound is estimated, 2 or more; 0: none.",
        json_schema_extra=NOT_ONE,
    )
    num_timesteps: int | None = Field(
        default=50, gt=1, description="Timesteps of the chain per image, stratified; null: all, which has least error."
    )
    chain_steps: tuple[Annotated[int, Field(gt=1)], ...] = Field(
        default=(), description="Shorter chains whose bound is given too, by their number of steps."
    )
    ode_images: int = Field(
        default=16,
        ge=0,
        description="Held-out images whose log-likelihood the probability-flow ODE gives, 2 or more; 0: none.",
        json_schema_extra=NOT_ONE,
    )
    ode_probes: Annotated[int, Field(gt=0)] | None = Field(
        default=1,
        description="Random directions of Hutchinson's trace estimate; null: the exact trace, at one gradient for each "
        "element of a latent.",
    )
    ode_tolerance: float = Field(
        default=1e-3, gt=0, description="Error of a step of the solver: of z, and of the nats per element."
    )

    @field_validator("num_images", "ode_images")
    @classmethod
    def _has_an_error(cls, count: int) -> int:
        if count == 1:
            raise ValueError("1 came; 2 or more was wanted, which a mean's standard error is of, or 0 for none")
        return count


class FeaturesConfig(Section):
    """A network whose features images are compared in."""

    network: Literal["classifier", "inception", "transformers", "clip"] = Field(
        description="classifier: a small one, fitted on the labels of data.train_images, without any download; "
        "inception: FID's own Inception v3 (torch-fidelity, extra fidelity); transformers: any model of images there, "
        "such as DINOv2; clip: a CLIPModel, which scores captions too."
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="transformers, clip: folder or hub id org/name, which is downloaded; inception: file of its "
        "weights, null: torch-fidelity fetches them.",
        json_schema_extra=FREE,  # what it holds is compared
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9_.-]*$",
        description="What its scores are called, as in NAME/fid; null: as the network.",
    )
    image_size: int | None = Field(
        default=None,
        gt=0,
        description="transformers, clip: side that images are resized to, pixels, bicubic; null: as the folder's "
        "preprocessor_config.json says.",
    )
    mean: tuple[float, float, float] | None = Field(
        default=None, description="The same for the mean of each pixel channel, of values from 0 to 1."
    )
    std: tuple[float, float, float] | None = Field(
        default=None, description="The same for the standard deviation of each pixel channel."
    )

    @property
    def title(self) -> str:
        """What its scores are called."""
        return self.name or self.network

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        opened = self.network in ("transformers", "clip")
        if opened and self.path is None:
            raise ValueError(f"network: {self.network} wants a path: a folder or a hub id")
        if self.network == "classifier" and self.path is not None:
            raise ValueError("network: classifier is fitted on the training images; no path was wanted")
        if not opened and (self.image_size, self.mean, self.std) != (None, None, None):
            raise ValueError(f"image_size, mean and std are for transformers and clip, not for {self.network}")
        if (self.image_size is None, self.mean is None) != (self.mean is None, self.std is None):
            raise ValueError("image_size, mean and std are wanted together, or none of them")
        return self


def _named(value: Any) -> Any:
    """A network by its name alone, or its keys: what comes out is no JSON any more, and of a tuple no list will do."""
    if isinstance(value, dict):
        keys = cast(dict[str, Any], value)
        return {key: tuple(cast(list[Any], of)) if isinstance(of, list) else of for key, of in keys.items()}
    return {"network": value} if isinstance(value, str) else value


Features = Annotated[FeaturesConfig, BeforeValidator(_named, json_schema_input_type=str | FeaturesConfig)]


class EvaluationConfig(Section):
    """Pictures while training, and scores while training and after it."""

    every_steps: int = Field(default=1000, gt=0, description="Optimizer steps between sample pictures.")
    scores_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps between evaluations while training, and one at its end: images of the first "
        "average, drawn by all ranks and scored. null: none.",
    )
    features: tuple[Features, ...] = Field(
        default=(FeaturesConfig(network="classifier"),),
        description="Networks whose features images are compared in, by name (classifier, inception) or with their "
        "keys; each gives scores of its own.",
    )
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that keeps the real images' features, for all runs; null: latent-diffusion-pipeline in the "
        "user's cache ($XDG_CACHE_HOME, else ~/.cache).",
    )
    num_images: int = Field(default=1000, gt=1, description="Images drawn for each guidance scale.")
    guidance_scales: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(1.0, 2.0), min_length=1, description="w in u + w (c - u); pictures use the last."
    )
    num_inference_steps: int = Field(default=50, gt=0, description="DDIM steps; a divisor of diffusion.num_timesteps.")
    max_reference_images: int = Field(
        default=50_000,
        gt=1,
        description="Real images at most that samples are compared with, evenly spaced over the set; of a mix in the "
        "shares of data.weights.",
    )
    batch_images: int = Field(default=100, gt=0, description="Images per sampler call.")
    decode_slices: bool = Field(
        default=False, description="sample: decode images one by one, which takes the memory of one."
    )
    loss_images: int = Field(
        default=256, ge=0, description="Held-out images at most whose loss is taken, evenly spaced; 0: none."
    )
    loss_bands: int = Field(
        default=4,
        gt=0,
        description="Equal parts of what training draws its times by, lowest noise first; each has a loss of its own, "
        "of one time for each image.",
    )
    bits: bool = Field(
        default=False, description="Count the bits of held-out images (likelihood.num_images) while training too."
    )
    likelihood: LikelihoodConfig = LikelihoodConfig()

    @model_validator(mode="after")
    def _bits_are_of_images(self) -> Self:
        if self.bits and not self.likelihood.num_images:
            raise ValueError(
                "bits: true came with likelihood.num_images: 0, of which none are counted; 2 or more was wanted"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [each.title for each in self.features]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"features has two networks called {twice[0]}; give one of them another name")
        for network in ("classifier", "clip"):
            if [each.network for each in self.features].count(network) > 1:
                raise ValueError(f"features names {network} twice; one of them was wanted")
        return self


class TrackingConfig(Section):
    """What is written down while training."""

    every_steps: int = Field(default=10, gt=0, description="Optimizer steps between rows of metrics.jsonl.")
    tensorboard: bool = Field(default=True, description="Write RUN/tensorboard too.")
    wandb: str | None = Field(
        default=None,
        min_length=1,
        description="Project in which Weights & Biases shows the same curves (extra wandb; WANDB_MODE=offline keeps "
        "them in RUN/wandb); null: none.",
    )
