"""Latent diffusion, from images to a diffusers pipeline.

    images ──prepare──▶ image shards (tar) ──encode (VAE)──▶ latent shards (tar, moments + provenance)
      ──order(seed, position)──▶ sample + noise + timestep + dropout ──q_sample──▶ z_t
      ──U-Net(z_t, t, condition)──▶ prediction ──loss──▶ optimizer ──▶ EMA
      ──▶ checkpoint (one format) ──export──▶ diffusers folder ──sample──▶ images ──▶ metrics

A batch is a pure function of (seed, position); a checkpoint is engine-free safetensors; what comes out opens in
plain diffusers.  `python -m pipeline --help` lists the verbs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.class_conditional import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]


def __getattr__(name: str) -> Any:
    """The pipeline class, imported when it is asked for: diffusers takes seconds."""
    if name == "ClassConditionalPipeline":
        from pipeline.class_conditional import ClassConditionalPipeline

        return ClassConditionalPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
