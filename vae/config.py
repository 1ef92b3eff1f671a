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


class PerceptualConfig(Section):
    """The distance of two images in the features of a frozen network (Zhang et al. 2018, LPIPS)."""

    backbone: str = Field(
        min_length=1,
        description="lpips: AlexNet with the published weights of its layers (the extra lpips; torchvision downloads "
        "AlexNet once); else a transformers model, whose layers count alike: a folder, or a hub id org/name, which is "
        "downloaded, such as microsoft/resnet-18.",
    )
    weight: float = Field(default=1.0, gt=0, description="Weight beside the pixel error per pixel channel.")


class DiscriminatorConfig(Section):
    """Architecture of the adversary (see `vae.discriminator`)."""

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

    @property
    def smallest_side(self) -> int:
        """Pixels along one side of the smallest image that it can judge."""
        return 3 * 2**self.num_downsamplings  # of it the strided convolutions leave 3, the other two 2 and 1


class AdversaryConfig(Section):
    """The discriminator that the autoencoder plays against (Esser et al. 2021, VQGAN), and the game's rules."""

    discriminator: DiscriminatorConfig = Field(default=DiscriminatorConfig(), description="Its architecture.")
    class_conditional: bool = Field(
        default=False,
        description="Let it judge images as such of their class: a projection (Miyato & Koyama 2018), over "
        "conditioning.num_classes.",
    )
    game: Literal["hinge", "minimax"] = Field(
        default="hinge", description="hinge: Lim & Ye 2017; minimax: Goodfellow et al. 2014, non-saturating."
    )
    weight: float = Field(
        default=0.5,
        gt=0,
        description="Weight of the autoencoder's adversarial loss; with adaptive, in shares of the pull that the "
        "reconstruction has at the decoder's last layer.",
    )
    adaptive: bool = Field(
        default=True,
        description="Multiply the weight by the ratio of both losses' gradient norms at the decoder's last layer, over "
        "all ranks, of the step before (Esser et al. 2021, eq. 7).",
    )
    start_step: int = Field(
        default=0, ge=0, description="Steps before the game begins; until then the discriminator stays as it was made."
    )
    r1_gamma: float = Field(
        default=1.0, ge=0, description="Weight of the penalty on its gradient at real images, R1; 0: none."
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Of the discriminator's AdamW, constant.")
    beta1: float = Field(default=0.5, ge=0, lt=1, description="Decay of the first moment of its AdamW.")
    beta2: float = Field(default=0.9, ge=0, lt=1, description="Decay of the second moment of its AdamW.")
    gradient_clip_norm: float = Field(default=10.0, gt=0, description="Largest global L2 norm of its gradient.")


class VaeTrainConfig(Section):
    """Training of the autoencoder (Rombach et al. 2022, section 3.1), from scratch or from one that is there.

    The defaults are those of the digits: with a cosine to 0 after the warm-up, 37.5 to 38.2 dB on held-out images.
    """

    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="A trained autoencoder to begin with: a diffusers folder, or one with vae/ inside, or a hub id "
        "org/name of either, which is downloaded, or a .safetensors file in diffusers' or Stable Diffusion's own "
        "format; it brings its architecture. null: random weights, by the seed.",
    )
    trained: Literal["all", "decoder"] = Field(
        default="all",
        description="decoder: the encoder stays as start_from has it to the last bit, so latents that were made with "
        "it, and U-Nets trained on them, stay right.",
    )
    steps: int = Field(
        default=400,
        ge=0,
        description="Optimizer steps of the whole run; a cosine follows a changed number. 0: start_from is only "
        "measured and, with latent_normalisation, normalised.",
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
    reconstruction: Literal["l1", "l2", "gaussian"] = Field(
        default="l2",
        description="Pixel error: mean absolute (l1) or mean square (l2) over pixel channels in [-1, 1]; gaussian: "
        "-ln N(x; x_hat, s²) in nats per pixel channel, with the variance s² fitted to the mean square error of the "
        "step before, so that with kl_weight: 1 the loss is the bound itself.",
    )
    # On digits 1e-4, 3e-4 and 1e-3 reconstruct alike (38.2 dB); the larger, the more alike the channels (standard
    # deviations 0.5 to 2.7 at 1e-4, 0.8 to 1.5 at 1e-3) and the closer to real what diffusion draws from them.
    # The price: two of the four channels carry a few nats per image beside 100 to 200 in the others.
    kl_weight: float = Field(
        default=1e-3,
        ge=0,
        description="Weight of the KL in nats per latent element, beside the pixel error per pixel channel; with "
        "reconstruction: gaussian, of the KL in nats per pixel channel.",
    )
    kl_warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the weight of the KL rises from 0 (Bowman et al. 2016)."
    )
    perceptual: PerceptualConfig | None = Field(
        default=None, description="A distance in a frozen network's features, beside the pixel error; null: none."
    )
    adversary: AdversaryConfig | None = Field(
        default=None, description="A discriminator to play against; null: none. Wants engine.strategy: ddp."
    )
    equivariance_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of steps in which latents, and the images they are to give, are scaled by 1/4 to 1 and "
        "turned by quarters (Kouzelis et al. 2025, EQ-VAE; they have 0.5).",
    )
    latent_normalisation: Literal["none", "scalar", "channel"] = Field(
        default="none",
        description="At the end, mean 0 and standard deviation 1 of the latents, of all together or of each channel, "
        "folded into the autoencoder's convolutions next to them: it gives and takes normalised latents itself.",
    )
    gradient_clip_norm: float = Field(default=1.0, gt=0, description="Largest global L2 norm of the gradient.")
    check_every_steps: int = Field(
        default=100,
        ge=1,
        description="Steps between looks at the training's health; what is wrong in three in a row raises an alarm.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch_images is not None and self.global_batch_images % self.micro_batch_images:
            raise ValueError(
                f"micro_batch_images: {self.micro_batch_images} came, a divisor of global_batch_images "
                f"({self.global_batch_images}) is wanted"
            )
        return self

    @model_validator(mode="after")
    def _what_stays_is_there(self) -> Self:
        if self.start_from is None and (self.trained == "decoder" or self.steps == 0):
            came = "trained: decoder" if self.trained == "decoder" else "steps: 0"
            raise ValueError(f"{came} wants start_from: a trained autoencoder")
        if self.trained == "decoder":
            for key in ("latent_normalisation", "equivariance_share"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}={getattr(self, key)} changes the latents; trained: all is wanted")
        return self


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
        description="The autoencoder that encodes and decodes: a diffusers folder, or one with vae/ inside, or a hub "
        "id org/name of either, which is downloaded, or a .safetensors file in diffusers' or Stable Diffusion's own "
        "format.  Left out: the one in run_dir.",
        json_schema_extra=FREE,
    )
    preview: str | None = Field(
        default=None,
        min_length=1,
        description="An AutoencoderTiny made for this autoencoder's latents at their published scale, which decodes "
        "the pictures while the U-Net trains, fast: a diffusers folder or a hub id org/name, such as "
        "madebyollin/taesd. null: path decodes. All other programs decode with path.",
        json_schema_extra=FREE,
    )
    tile_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Side of the tiles in which larger images are encoded and decoded, which bounds the memory; "
        "neighbours share a quarter, and it is a multiple of 4 times the autoencoder's factor. Latents of tiles differ "
        "from those of whole images. null: whole.",
        json_schema_extra=FREE,
    )
    latent_scale: Literal["measured", "own"] = Field(
        default="measured",
        description="What latents are multiplied by for the U-Net: 1 over the standard deviation measured on these "
        "images; own: the scaling_factor and shift_factor of the VAE's config.json, which a pretrained U-Net expects "
        "(a single file says none).",
    )
    model: VaeModelConfig = Field(
        default=VaeModelConfig(), description="Architecture, where it is trained from scratch."
    )
    train: VaeTrainConfig = Field(default=VaeTrainConfig(), description="How it is trained.")
