"""Which strategy: what the run's config says and what `accelerate launch --config_file` says must agree."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

from pipeline.config_training import EngineConfig, OptimizerConfig
from pipeline.errors import UsageError

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STAGES: dict[str, Strategy] = {"1": "zero1", "2": "zero2", "3": "zero3"}
LAUNCHED_PRECISION = {"fp32": "no", "bf16": "bf16", "bf16_weights": "bf16", "fp16": "fp16"}
# Settings of a launcher's file that a run's config has under another name: environment variable → (their key, ours).
ELSEWHERE = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", "engine"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "train.micro_batch_images"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "optimizer.gradient_clip_norm"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "engine.strategy (zero3 splits weights)"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("zero3_init_flag", "engine.strategy"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "engine.offload_optimizer (with a ZeRO strategy)"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "engine.gradient_checkpointing"),
}
UNSET = ("", "none", "false")


def choose(engine: EngineConfig, environ: Mapping[str, str]) -> Strategy:
    """The strategy of this run.  `environ`: what the launcher handed to its ranks.  Call it before they are joined.

    engine.strategy: auto follows the launcher; any other word may be started by any launcher that asks for none.
    Raises UsageError where the two contradict one another, where a setting would be ignored, and where DeepSpeed is
    wanted but not installed.
    """
    launched = _launched(environ)
    asked = engine.strategy
    if asked != "auto" and launched not in (None, asked):
        raise UsageError(
            f"engine.strategy: {asked} in the run's config, {launched} in the config of accelerate launch; "
            "say the same in both, or engine.strategy=auto"
        )
    chosen: Strategy = (launched or "ddp") if asked == "auto" else asked
    said = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ("no", LAUNCHED_PRECISION[engine.precision]):
        raise UsageError(
            f"engine.precision: {engine.precision} in the run's config, mixed_precision {said} in that of accelerate "
            'launch; write mixed_precision: "no" there: the run\'s config decides'
        )
    on_zero = chosen in STAGES.values()
    device = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
    if device not in UNSET and (device != "cpu" or not engine.offload_optimizer):
        raise UsageError(
            f"engine.offload_optimizer: {str(engine.offload_optimizer).lower()} in the run's config, "
            f"offload_optimizer_device: {device} in that of accelerate launch; leave it out there: "
            "engine.offload_optimizer=true moves the optimizer to the CPU"
        )
    if engine.offload_optimizer and not on_zero:
        raise UsageError(f"engine.offload_optimizer: only zero1, zero2 and zero3 can do it, the strategy is {chosen}")
    if engine.compile and chosen == "zero3":
        raise UsageError(
            "engine.compile: zero3 gathers weights within the networks' levels, where nothing may interrupt what is "
            "compiled; ddp, zero1, zero2 or fsdp2 was wanted"
        )
    if on_zero and find_spec("deepspeed") is None:
        raise UsageError(f"engine.strategy: {chosen} wants DeepSpeed; pip install '.[deepspeed]'")
    return chosen


def misfit(optimizer: OptimizerConfig, strategy: Strategy) -> str | None:
    """What is wrong with an optimizer under a strategy; None: nothing."""
    if optimizer.kind != "muon" or strategy == "ddp":
        return None
    return (
        f"optimizer.kind: muon came with engine.strategy {strategy}, ddp was wanted, where each rank has whole "
        "matrices; or optimizer.kind=adamw"
    )


def _launched(environ: Mapping[str, str]) -> Strategy | None:
    """What the launcher's config asks for; None where it only starts processes.  Raises UsageError."""
    for variable, (theirs, ours) in ELSEWHERE.items():
        if (value := environ.get(variable, "")).lower() not in UNSET:
            raise UsageError(
                f"{theirs}: {value} in the config of accelerate launch would not be heard; leave it out there "
                f"and set {ours} in the run's config"
            )
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("distributed_type: MEGATRON_LM came in the config of accelerate launch; see configs/engine")
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
        if stage not in STAGES:
            raise UsageError(
                f"zero_stage: {stage} came in the config of accelerate launch, 1, 2 or 3 was wanted "
                "(without ZeRO: configs/engine/ddp.yaml)"
            )
        return STAGES[stage]
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        if (version := environ.get("FSDP_VERSION", "1")) != "2":
            raise UsageError(f"fsdp_version: {version} came in the config of accelerate launch, 2 was wanted")
        return "fsdp2"
    return None


def _is_on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("true", "1", "yes", "on")
