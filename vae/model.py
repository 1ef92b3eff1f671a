"""AutoencoderKL: build one from a config, load a finished one, name its weights by their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from vae.config import VaeModelConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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


def load(path: str | Path, *, revision: str | None = None) -> AutoencoderKL:
    """A finished autoencoder, frozen: fp32 on the CPU, in eval mode, without gradients.

    path: a diffusers folder of the autoencoder, or one with `vae/` inside (a whole pipeline), or a hub id
    `org/name` of either kind, downloaded at `revision` (branch, tag or commit).  A name whose first part is a
    folder here is taken for a path, so that a typing error downloads nothing.

    OSError: FileNotFoundError where no autoencoder is there, others where its files are broken.
    ValueError: another kind of model, or weights that don't fit its config.json.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        return _freeze(_open(str(folder), _subfolder(folder), None))
    if not HUB_ID.fullmatch(str(path)) or folder.parent.exists():
        raise FileNotFoundError(
            f"{str(path)!r} came, and there is no such folder; train the autoencoder first, or name an existing "
            "diffusers folder or a hub id org/name"
        )
    try:
        return _freeze(_open_from_hub(str(path), revision))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{str(path)!r} came, which is no folder here, and the hub gave no autoencoder ({reason}); correct "
            "the name, or train or download the autoencoder first"
        ) from error


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


def _subfolder(folder: Path) -> str | None:
    """Where in a local folder the autoencoder lies: at its root (None) or in `vae`."""
    if (folder / "config.json").is_file():
        return None
    if (folder / "vae" / "config.json").is_file():
        return "vae"
    raise FileNotFoundError(
        f"{str(folder)!r} came, which holds neither config.json nor vae/config.json; a folder that diffusers' "
        "AutoencoderKL.save_pretrained wrote is wanted"
    )


def _open_from_hub(hub_id: str, revision: str | None) -> AutoencoderKL:
    try:
        return _open(hub_id, None, revision)
    except OSError:  # no config.json at the root: a whole pipeline keeps its autoencoder in vae/
        return _open(hub_id, "vae", revision)


def _open(source: str, subfolder: str | None, revision: str | None) -> AutoencoderKL:
    where = f"{source}/{subfolder}" if subfolder else source
    place: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    config = cast(dict[str, Any], AutoencoderKL.load_config(source, **place))
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{where!r} is of class {config.get('_class_name')}, AutoencoderKL is wanted")
    vae, loaded = cast(
        tuple[AutoencoderKL, dict[str, list[Any]]],
        AutoencoderKL.from_pretrained(
            source,
            **place,
            torch_dtype=torch.float32,
            use_safetensors=True,  # a pickle may run code when it is opened
            output_loading_info=True,
        ),
    )
    # diffusers only warns, and leaves weights that are missing without a value
    unfit = {kind: names[:3] for kind, names in loaded.items() if names}
    if unfit:
        raise ValueError(f"the weights in {where!r} don't fit the config.json beside them: {unfit}")
    return vae


def _freeze(vae: AutoencoderKL) -> AutoencoderKL:
    return vae.requires_grad_(False).eval()
