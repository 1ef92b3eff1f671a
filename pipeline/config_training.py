"""The `optimizer`, `train`, `engine`, `ema` and `checkpoint` sections: how it is trained, and what is kept of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config_evaluation import FeaturesConfig
from vae.config import FREE, Section


class OptimizerConfig(Section):
    """AdamW or Muon, and the learning rate over time."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: matrices of hidden layers are updated by Muon, which makes each update orthogonal and as "
        "long as AdamW's; all else by AdamW. With engine.strategy ddp alone.",
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="muon: decay of its momentum.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        default="constant",
        description="After the warm-up; inverse_sqrt falls as 1/sqrt(step), from decay_start_steps on.",
    )
    decay_start_steps: int = Field(
        default=10_000, gt=0, description="inverse_sqrt: steps at the peak, the warm-up among them, before it falls."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay; norms and biases are spared.")
    gradient_clip_norm: float = Field(default=1.0, gt=0, description="Largest global L2 norm of the gradient.")


class AlignmentConfig(Section):
    """U-REPA (Tian et al. 2025): a head on the U-Net's middle learns a frozen network's features of the clean image."""

    features: FeaturesConfig = Field(
        description="The frozen network (network: transformers). encode writes its features of each patch beside the "
        "latents, train reads them."
    )
    weight: float = Field(default=0.5, gt=0, description="Of the alignment beside the denoising loss.")
    manifold_weight: float = Field(
        default=3.0,
        ge=0,
        description="Within the alignment, of the similarities between an image's patches beside that of each patch "
        "with its features.",
    )
    hidden_width: int = Field(
        default=2048, gt=0, description="Width of the two hidden layers of the head; a small U-Net wants a smaller one."
    )

    @model_validator(mode="after")
    def _network_has_patches(self) -> Self:
        if self.features.network != "transformers":
            raise ValueError(
                f"features.network: {self.features.network} came; transformers was wanted, a model whose patches have "
                "features"
            )
        if self.features.name is not None:
            raise ValueError("features.name has a meaning only in evaluation.features")
        return self


class TrainConfig(Section):
    """How long, in what portions, and what else is learned."""

    steps: int = Field(
        gt=0,
        description="Optimizer steps of the whole run; a cosine follows a changed number.",
        json_schema_extra=FREE,
    )
    global_batch_images: int = Field(gt=0, description="Images per optimizer step over all ranks.")
    micro_batch_images: Annotated[int, Field(gt=0)] | Literal["auto"] | None = Field(
        default=None,
        description="Images per rank in one forward pass; smaller than the rank's share means accumulation. null: the "
        "share; auto: the largest part of it that fits the device's memory, tried when the run begins.",
        json_schema_extra=FREE,
    )
    alignment: AlignmentConfig | None = Field(
        default=None, description="Learn a frozen network's features of each image beside the denoising; null: not."
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="A loss above so many times the median of the last spike_window_steps sets the run back: weights, "
        "averages and moments are those of the newest checkpoint again, the data goes on. null: never.",
        json_schema_extra=FREE,
    )
    spike_window_steps: int = Field(
        default=100, gt=1, description="Steps whose median loss a spike is held against.", json_schema_extra=FREE
    )
    max_spikes: int = Field(
        default=3, ge=0, description="Times that a run is set back; one more spike ends it.", json_schema_extra=FREE
    )
    limit_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which the run saves and stops as preempted: a little less than the job's limit.",
        json_schema_extra=FREE,
    )
    hang_timeout_s: float | None = Field(
        default=1800.0,
        gt=0,
        description="Seconds without a step after which every rank writes down its stacks and the run ends as failed; "
        "null: never.",
        json_schema_extra=FREE,
    )


class EngineConfig(Section):
    """How the ranks compute."""

    num_processes: int | None = Field(
        default=None,
        gt=0,
        description="Ranks that must be there; another number ends the run at once.",
        json_schema_extra=FREE,
    )
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="auto: CUDA where there is one.", json_schema_extra=FREE
    )
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        default="auto",
        description="What each rank holds: ddp everything; zero1, zero2, zero3 (DeepSpeed) its part of the optimizer, "
        "of the gradients too, of the weights too; fsdp2 (torch) its part of all three. auto: what accelerate launch's "
        "config says, else ddp. Any of them goes on from any other's checkpoint.",
        json_schema_extra=FREE,
    )
    precision: Literal["fp32", "bf16", "fp16", "bf16_weights"] = Field(
        default="fp32",
        description="bf16, fp16: autocast; weights stay fp32; fp16 scales the loss. bf16_weights: the network computes "
        "in bf16 throughout; the optimizer and the averages keep fp32 weights.",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="Keep the optimizer's fp32 weights and moments in the CPU's memory, and update there (zero1, "
        "zero2, zero3).",
        json_schema_extra=FREE,
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass instead of keeping them: less memory, about a "
        "third more time.",
        json_schema_extra=FREE,
    )
    compile: bool = Field(
        default=False,
        description="Translate the networks' levels with torch.compile, which takes minutes at the start; rounds "
        "differently. Not with zero3.",
        json_schema_extra=FREE,
    )
    channels_last: bool = Field(
        default=False,
        description="Let channels lie next to each other in memory, as convolutions in bf16 and fp16 want them on "
        "GPUs; rounds differently.",
        json_schema_extra=FREE,
    )
    attention: Literal["auto", "cudnn", "flash", "flash3", "efficient", "math", "xformers"] = Field(
        default="auto",
        description="The attention kernel that is tried first; what it can't do, others do. auto: torch's choice; "
        "cudnn, flash, efficient, math: torch's own; flash3: FlashAttention-3, where it is installed; xformers "
        "likewise. On a CPU: auto, flash, math.",
        json_schema_extra=FREE,
    )

    @property
    def arithmetic(self) -> str:
        """What rounds as it does: the precision, and what else changes the order of sums."""
        return self.precision + " channels_last" * self.channels_last + " compiled" * self.compile

    @model_validator(mode="after")
    def _kernels_can_be_compiled(self) -> Self:
        if self.compile and self.attention == "xformers":
            raise ValueError("compile: true with attention: xformers came; torch's own kernels compile, such as flash")
        return self


class EmaConfig(Section):
    """Averages of the weights; the first, of decays or else of sigma_rels, is exported, sampled and evaluated."""

    decays: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.9999,), description="Decay per optimizer step of each average of a fixed length."
    )
    sigma_rels: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = Field(
        default=(),
        description="Spread of each average whose length grows with the training (EDM2's power profiles), as a share "
        "of the steps made.",
    )
    snapshot_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps between snapshots of the sigma_rels averages, of which the verb ema makes "
        "averages of other lengths; a multiple of checkpoint.every_steps. null: none.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _averages_serve(self) -> Self:
        if not self.decays and not self.sigma_rels:
            raise ValueError("decays and sigma_rels are both empty; one average at least was wanted")
        for name in ("decays", "sigma_rels"):
            given = getattr(self, name)
            if len(set(given)) != len(given):
                raise ValueError(f"{name} names an average twice")
        if self.snapshot_every_steps is not None and len(self.sigma_rels) < 2:
            raise ValueError(
                f"snapshot_every_steps={self.snapshot_every_steps} wants two sigma_rels at least, such as [0.05, 0.1]"
            )
        return self


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: int = Field(default=1000, gt=0, description="Optimizer steps between checkpoints.")
    keep_last: int = Field(default=3, gt=0, description="Newest checkpoints that stay.")
    keep_every_steps: int | None = Field(default=None, gt=0, description="Checkpoints at multiples of this stay too.")
