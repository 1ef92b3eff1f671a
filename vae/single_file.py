"""An AutoencoderKL from one safetensors file: the names and sizes of its tensors are all that it says of its shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PREFIXES = ("first_stage_model.", "vae.", "")  # of the autoencoder's tensors: in a whole checkpoint, or alone
OF_TRAINING = ("model_ema.decay", "model_ema.num_updates")  # left there, as are the networks of its loss, "loss."
USUAL_GROUPS = 32  # of every GroupNorm, in all that were published
TILE_PIXELS = 512  # of who calls enable_tiling() and says no more; no part of the network

# What Stable Diffusion's own code calls the parts, and what diffusers does.
PARTS = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",  # of diffusers itself, long ago
}
FIRST_CONVOLUTION = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")  # of each layer
ENDS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")


def is_single_file(path: str | Path) -> bool:
    """Whether a path names one safetensors file, there or not, rather than a folder or a hub id."""
    return str(path).endswith(SINGLE_FILE) and not Path(path).expanduser().is_dir()


def refuse_pickle(path: str | Path) -> None:
    """Raise ValueError where the path names a pickle."""
    place = Path(path).expanduser()
    if place.suffix in PICKLES and not place.is_dir():
        raise ValueError(
            f"{str(place)!r} is a pickle, which may run code when it is opened; a {SINGLE_FILE} file was wanted"
        )


def open_single_file(file: Path, *, norm_num_groups: int | None = None) -> AutoencoderKL:
    """The autoencoder in a file, in diffusers' format or Stable Diffusion's, alone or in a whole checkpoint.

    fp32 on the CPU.  `norm_num_groups`, which can't be seen: as given, else 32.  Nor can the `scaling_factor`, which
    belongs to these weights alone: it is None, unknown.

    FileNotFoundError: no such file.  ValueError: no whole safetensors file, no autoencoder in it, tensors missing or
    left over, or widths that those groups don't divide.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} came, and there is no such file")
    try:
        weights = _read(file)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is no whole safetensors file: {error}") from error
    arguments = _arguments(weights, file, norm_num_groups)
    with torch.device("meta"):  # draws nothing
        vae = AutoencoderKL(**arguments)
    lacks, more = sorted(vae.state_dict().keys() - weights), sorted(weights.keys() - vae.state_dict())
    if lacks or more:
        said = [f"lacks {len(lacks)} tensors, such as {lacks[0]}"] if lacks else []
        said += [f"has {len(more)} too many, such as {more[0]}"] if more else []
        raise ValueError(f"{str(file)!r} holds no AutoencoderKL of {_said(arguments)}: it {' and '.join(said)}")
    try:
        vae.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"{str(file)!r} holds no AutoencoderKL of {_said(arguments)}: {first}") from error
    return vae


def _read(file: Path) -> dict[str, Tensor]:
    """The autoencoder's tensors under diffusers' names, fp32; others are not read."""
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        found = [prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in names]
        if not found:
            raise ValueError(
                f"{str(file)!r} holds no autoencoder: encoder.conv_in.weight is not in it, alone or behind "
                f"{' or '.join(PREFIXES[:-1])}"
            )
        own = {name: name.removeprefix(found[0]) for name in names if name.startswith(found[0])}
        num_levels = len({name.split(".")[2] for name in own.values() if name.startswith("decoder.up.")})
        weights = {
            diffusers_name(name, num_levels): opened.get_tensor(named)
            for named, name in own.items()
            if not name.startswith("loss.") and name not in OF_TRAINING
        }
    for name, weight in weights.items():
        # Stable Diffusion's attention is made of 1×1 convolutions, diffusers' of linear layers.
        shaped = weight.flatten(1) if ".attentions." in name and weight.ndim > 2 else weight
        weights[name] = shaped.to(torch.float32, copy=True)  # or the file would stay mapped
    return weights


def diffusers_name(name: str, num_levels: int) -> str:
    """What diffusers calls a tensor of Stable Diffusion's own code; its own names stay."""
    for theirs, ours in PARTS:
        name = re.sub(theirs, ours, name)
    if found := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name):
        level = num_levels - 1 - int(found[1])  # theirs count from the finest level, diffusers' from the coarsest
        part = "resnets" if found[2] == "block" else "upsamplers.0"
        name = f"decoder.up_blocks.{level}.{part}.{name[found.end() :]}"
    if found := re.fullmatch(r"(.+\.attentions\.\d+\.)(\w+)(\.(?:weight|bias))", name):
        name = f"{found[1]}{ATTENTION.get(found[2], found[2])}{found[3]}"
    return name


def _arguments(weights: Mapping[str, Tensor], file: Path, norm_num_groups: int | None) -> dict[str, Any]:
    """Of AutoencoderKL, as the tensors' names and sizes tell them."""
    layers = {
        (int(place[1]), int(place[2])): len(weight)
        for name, weight in weights.items()
        if (place := FIRST_CONVOLUTION.fullmatch(name))
    }
    num_levels = 1 + max((level for level, _ in layers), default=0)
    lacks = [name for name in ENDS if name not in weights]
    lacks += [f"encoder.down_blocks.{level}" for level in range(num_levels) if (level, 0) not in layers]
    if lacks:
        raise ValueError(f"{str(file)!r} holds no whole autoencoder: it lacks {', '.join(lacks)}")
    widths = tuple(layers[level, 0] for level in range(num_levels))
    groups = USUAL_GROUPS if norm_num_groups is None else norm_num_groups
    if any(width % groups for width in widths):
        raise ValueError(
            f"{str(file)!r} has levels of {list(widths)} channels, which {groups} groups don't divide, and a file "
            "doesn't say how many groups its norms have; a diffusers folder, whose config.json does, was wanted"
        )
    return {
        "in_channels": weights[ENDS[0]].shape[1],
        "out_channels": weights[ENDS[2]].shape[0],
        "latent_channels": weights[ENDS[1]].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": widths,
        "layers_per_block": sum(level == 0 for level, _ in layers),
        "norm_num_groups": groups,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in weights),
        "sample_size": TILE_PIXELS,
        "scaling_factor": None,
    }


def _said(arguments: Mapping[str, Any]) -> str:
    """The shape, for a person."""
    return (
        f"{list(arguments['block_out_channels'])} channels, {arguments['layers_per_block']} layers a level and "
        f"{arguments['latent_channels']} latent channels"
    )
