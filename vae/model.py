"""AutoencoderKL: build one from a config, load a finished one, name its weights by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from vae.config import VaeModelConfig
from vae.pretrained import open_pretrained
from vae.single_file import is_single_file, open_single_file

ENCODER = ("encoder.", "quant_conv.")  # what the weights that make latents begin with
ADVICE = "train the autoencoder first, or name an existing diffusers folder, a hub id org/name or a .safetensors file"


def build(config: VaeModelConfig) -> AutoencoderKL:
    """A fresh fp32 autoencoder in training mode, its weights drawn from torch's global generator.

    Its `scaling_factor` is 1: the stock default 0.18215 belongs to another VAE, and ours is measured on the
    latents later (`vae.moments`).
    """
    num_levels = len(config.block_out_channels)
    shape: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
    }
    return AutoencoderKL(**shape, scaling_factor=1.0).train()


def load(path: str | Path, *, revision: str | None = None, norm_num_groups: int | None = None) -> AutoencoderKL:
    """A finished autoencoder, frozen: fp32 on the CPU, in eval mode, without gradients.

    path: a diffusers folder of the autoencoder, or one with `vae/` inside (a whole pipeline), or a hub id
    `org/name` of either kind, downloaded at `revision` (branch, tag or commit); or one .safetensors file, of the
    autoencoder or of a whole checkpoint, in diffusers' format or Stable Diffusion's.  A file doesn't say how many
    groups its norms have: `norm_num_groups`, else 32; nor at what scale its latents were used: `scaling_factor` None.

    OSError: FileNotFoundError where no autoencoder is there, others where its files are broken.
    ValueError: another kind of model, a pickle, or weights that don't fit its config.json.
    """
    return _open(path, revision, norm_num_groups).requires_grad_(False).eval()


def open_trainable(
    path: str | Path, *, revision: str | None = None, norm_num_groups: int | None = None
) -> AutoencoderKL:
    """The same, to go on training: in training mode, with gradients for all of it."""
    return _open(path, revision, norm_num_groups).requires_grad_(True).train()


def freeze_encoder(vae: AutoencoderKL) -> None:
    """Let only the decoder learn, with post_quant_conv: what makes latents stays as it is."""
    for name, weight in vae.named_parameters():
        weight.requires_grad_(not name.startswith(ENCODER))


def encoder_sha256(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights that latents depend on: those of the encoder and quant_conv.

    An autoencoder with another decoder has the same one, and serves for the same latents.
    """
    return state_sha256({name: weight for name, weight in vae.state_dict().items() if name.startswith(ENCODER)})


def weights_sha256(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights alone: config.json, and so `scaling_factor`, has no part in it.

    Weights that were rounded to half precision are other weights.
    """
    return state_sha256(vae.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of the tensors, as fp32 on the CPU.

    The same on any device and from any file format.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        array = weight.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update(f"{name}\n{array.dtype.name}\n{list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _open(path: str | Path, revision: str | None, norm_num_groups: int | None) -> AutoencoderKL:
    place = Path(path).expanduser()
    if not is_single_file(path):
        return open_pretrained(AutoencoderKL, path, what="autoencoder", advice=ADVICE, revision=revision)
    if place.name == SAFETENSORS_WEIGHTS_NAME and (place.parent / "config.json").is_file():  # it says more
        return open_pretrained(AutoencoderKL, place.parent, what="autoencoder", advice=ADVICE)
    return open_single_file(place, norm_num_groups=norm_num_groups)
