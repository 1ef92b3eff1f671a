"""The whole schema: every key with its unit and meaning, here and in the modules of its sections, and nowhere else.

Fields marked FREE may differ when a run is continued; all others make the run what it is.
"""

from __future__ import annotations

from typing import Any, Self, cast

from pydantic import BaseModel, Field, model_validator

from pipeline.config_data import DataConfig
from pipeline.config_diffusion import DiffusionConfig
from pipeline.config_evaluation import EvaluationConfig, TrackingConfig
from pipeline.config_network import ConditioningConfig, UnetConfig
from pipeline.config_training import CheckpointConfig, EmaConfig, EngineConfig, OptimizerConfig, TrainConfig
from vae.config import FREE, Section, VaeConfig


class Config(Section):
    """Everything a program may ask.  Functions take their section, never the whole."""

    run_dir: str = Field(min_length=1, description="Folder of the run; made when missing.", json_schema_extra=FREE)
    seed: int = Field(default=0, ge=0, lt=2**63, description="Every draw is a function of it and a position.")
    data: DataConfig
    vae: VaeConfig
    unet: UnetConfig = UnetConfig()
    conditioning: ConditioningConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(),
        json_schema_extra=FREE,
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(),
        json_schema_extra=FREE,
    )
    tracking: TrackingConfig = Field(
        default=TrackingConfig(),
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _steps_divide(self) -> Self:
        # diffusers' trailing spacing ends anywhere but at t = 0 for many other counts: noise would stay in.
        total, steps = self.diffusion.num_timesteps, self.evaluation.num_inference_steps
        if self.diffusion.objective == "ddpm" and total % steps:
            good = [n for n in range(1, total + 1) if total % n == 0]
            near = sorted(sorted(good, key=lambda n: abs(n - steps))[:2])
            raise ValueError(
                f"evaluation.num_inference_steps={steps} must divide diffusion.num_timesteps={total}; "
                f"nearest: {' and '.join(map(str, near))}"
            )
        return self

    @model_validator(mode="after")
    def _bits_are_of_a_chain(self) -> Self:
        if self.evaluation.bits and self.diffusion.objective != "ddpm":
            raise ValueError(
                f"evaluation.bits=true came with diffusion.objective={self.diffusion.objective}, which has no chain of "
                "timesteps whose bound it could count; bits: false was wanted (evaluate gives the ODE's likelihood)"
            )
        return self

    @model_validator(mode="after")
    def _condition_can_be_told(self) -> Self:
        condition, text = self.conditioning, self.conditioning.text
        if condition.kind == "class_text" and not self.unet.class_embedding:
            raise ValueError(
                "unet.class_embedding=false gives the class to the cross-attention, which with kind: class_text reads "
                "the captions; class_embedding: true was wanted"
            )
        if condition.kind == "class_text" and text is not None and len(text.models) == 2:
            raise ValueError("conditioning.text.models has two entries; with kind: class_text one was wanted")
        if text is not None and text.embeddings == "cached" and self.data.train_latents is None:
            raise ValueError("conditioning.text.embeddings: cached lie beside latents; data.train_latents was wanted")
        return self

    @model_validator(mode="after")
    def _features_lie_beside_latents(self) -> Self:
        if self.train.alignment is not None and self.data.train_latents is None:
            raise ValueError("train.alignment: the features lie beside latents; data.train_latents was wanted")
        return self

    @model_validator(mode="after")
    def _snapshots_are_of_checkpoints(self) -> Self:
        every, saved = self.ema.snapshot_every_steps, self.checkpoint.every_steps
        if every is not None and every % saved:
            raise ValueError(
                f"ema.snapshot_every_steps={every} must be a multiple of checkpoint.every_steps={saved}; "
                f"nearest: {max(1, round(every / saved)) * saved}"
            )
        return self


def identity(config: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """Dotted key → value of every field in `sections` that must stay the same when a run is continued."""
    found: dict[str, Any] = {}
    for section in sections:
        _collect(section, Config.model_fields[section].json_schema_extra, getattr(config, section), found)
    return found


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def json_schema() -> dict[str, Any]:
    """JSON Schema of the whole config, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "latent-diffusion-pipeline config"
    return schema


def _collect(key: str, extra: object, value: Any, found: dict[str, Any]) -> None:
    if isinstance(extra, dict) and cast(dict[str, Any], extra).get("may_change_on_resume"):
        return
    if not isinstance(value, BaseModel):
        found[key] = [_plain(item) for item in cast(tuple[Any, ...], value)] if isinstance(value, tuple) else value
        return
    for name, field in type(value).model_fields.items():
        _collect(f"{key}.{name}", field.json_schema_extra, getattr(value, name), found)
