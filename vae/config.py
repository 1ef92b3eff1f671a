"""The `vae` section of the configuration: which autoencoder, what it looks like and how it is trained."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FREE: dict[str, Any] = {"may_change_on_resume": True}  # all other fields make a training run what it is


class Section(BaseModel):
    """What every section shares, the pipeline's too: no field changes after validation and no unknown key passes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VaeModelConfig(Section):
    """Architecture of an `AutoencoderKL` built from scratch; one that is loaded brings its own."""

    in_channels: int = Field(default=3, ge=1, description="Pixel channels of the images, both in and out.")
    latent_channels: int = Field(default=4, ge=1, description="Latent channels C; the encoder gives 2C moments.")
    block_out_channels: tuple[int, ...] = Field(
        default=(16, 32, 32),
        min_length=1,
        description="Width in channels of each resolution level; n levels downsample by 2**(n - 1).",
    )
    layers_per_block: int = Field(
        default=1, ge=1, description="Residual layers per resolution level; the decoder has one more."
    )
    norm_num_groups: int = Field(default=8, ge=1, description="Groups of every GroupNorm; must divide every width.")

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> Self:
        wrong = [width for width in self.block_out_channels if width < 1 or width % self.norm_num_groups]
        if wrong:
            raise ValueError(
                f"block_out_channels: {wrong} came, positive multiples of norm_num_groups "
                f"({self.norm_num_groups}) are wanted"
            )
        return self

    @property
    def downsampling_factor(self) -> int:
        """f = H/h: image pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class VaeTrainConfig(Section):
    """Training with a pixel error and a KL (Rombach et al. 2022, section 3.1, without its adversary).

    The defaults are those of the digits: with a cosine to 0 after the warm-up, 37.5 to 38.2 dB on held-out images.
    """

    steps: int = Field(
        default=400,
        ge=1,
        description="Optimizer steps of the whole run; a cosine follows a changed number.",
        json_schema_extra=FREE,
    )
    global_batch_images: int = Field(default=16, ge=1, description="Images per optimizer step over all ranks.")
    micro_batch_images: int | None = Field(
        default=None,
        ge=1,
        description="Images per rank in one forward pass; smaller than the rank's share means accumulation, "
        "null is the whole share.",
        json_schema_extra=FREE,
    )
    learning_rate: float = Field(
        default=4e-3, gt=0, le=1, description="Largest learning rate of AdamW, at the end of the warm-up."
    )
    schedule: Literal["constant", "cosine"] = Field(default="cosine", description="Learning rate after the warm-up.")
    warmup_steps: int = Field(default=20, ge=0, description="Optimizer steps in which the learning rate rises from 0.")
    reconstruction: Literal["l1", "l2"] = Field(
        default="l2",
        description="Pixel error: mean absolute (l1) or mean square (l2) over pixel channels in [-1, 1].",
    )
    # On digits 1e-4, 3e-4 and 1e-3 reconstruct alike (38.2 dB); the larger, the more alike the channels (standard
    # deviations 0.5 to 2.7 at 1e-4, 0.8 to 1.5 at 1e-3) and the closer to real what diffusion draws from them.
    # The price: two of the four channels carry a few nats per image beside 100 to 200 in the others.
    kl_weight: float = Field(
        default=1e-3,
        ge=0,
        description="Weight of the KL in nats per latent element, beside the pixel error per pixel channel.",
    )
    gradient_clip_norm: float = Field(default=1.0, gt=0, description="Largest global L2 norm of the gradient.")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch_images is not None and self.global_batch_images % self.micro_batch_images:
            raise ValueError(
                f"micro_batch_images: {self.micro_batch_images} came, a divisor of global_batch_images "
                f"({self.global_batch_images}) is wanted"
            )
        return self


class DiscriminatorConfig(Section):
    """Architecture of the adversary that an autoencoder may be trained against (see `vae.discriminator`)."""

    base_channels: int = Field(
        default=64, ge=1, description="Width in channels after the first convolution; doubled by each later one, to 8×."
    )
    num_downsamplings: int = Field(
        default=3,
        ge=1,
        le=8,
        description="Convolutions of stride 2; 1, 2, 3 and 4 see patches of 16, 34, 70 and 142 pixels a side, in "
        "images of at least 6, 12, 24 and 48.",
    )
    num_classes: int | None = Field(
        default=None, ge=1, description="Classes of the projection, so that D judges images of a class; null is none."
    )


def _trained_autoencoder(validated: dict[str, Any]) -> str:
    return f"{validated['run_dir']}/autoencoder"


class VaeConfig(Section):
    """The whole `vae` section."""

    run_dir: str = Field(
        default="runs/vae",
        min_length=1,
        description="Folder of the run that trains the autoencoder; the result is autoencoder/ in it.",
        json_schema_extra=FREE,
    )
    path: str = Field(
        default_factory=_trained_autoencoder,
        min_length=1,
        description="The autoencoder that encodes and decodes: a diffusers folder, or a hub id org/name, which "
        "is downloaded.  Left out: the one in run_dir.",
        json_schema_extra=FREE,
    )
    latent_scale: Literal["measured", "own"] = Field(
        default="measured",
        description="What latents are multiplied by for the U-Net: 1 over the standard deviation measured on these "
        "images; own: the scaling_factor and shift_factor of the VAE's config.json, which a pretrained U-Net expects.",
    )
    model: VaeModelConfig = Field(
        default=VaeModelConfig(), description="Architecture, where it is trained from scratch."
    )
    train: VaeTrainConfig = Field(default=VaeTrainConfig(), description="How it is trained from scratch.")
