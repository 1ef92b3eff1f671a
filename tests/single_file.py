"""A U-Net written as Stable Diffusion's own code names its tensors: one safetensors file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(name: str, layers: int, attentive_ups: set[int]) -> str:
    """Where Stable Diffusion's code has a tensor of diffusers' name.  `attentive_ups`: up blocks with attention."""
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            name = theirs + name.removeprefix(ours)
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found:
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = block * (layers + 1)
        match way, kind:
            case "down", "downsamplers":
                name = f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op', 1)}"
            case "down", _:
                name = f"input_blocks.{1 + first + layer}.{int(kind == 'attentions')}.{rest}"
            case _, "upsamplers":
                name = f"output_blocks.{first + layers}.{2 if block in attentive_ups else 1}.{rest}"
            case _:
                name = f"output_blocks.{first + layer}.{int(kind == 'attentions')}.{rest}"
    if "attentions" not in name and "transformer_blocks" not in name:
        for ours, theirs in IN_RESNET.items():
            name = re.sub(rf"(_blocks?\.[\d.]+\.){ours}\.", rf"\1{theirs}.", name)
    return f"model.diffusion_model.{name}"


def save_single_file(unet: UNet2DConditionModel, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the file, with what else such files hold beside a U-Net."""
    layers = int(unet.config["layers_per_block"])
    attentive = {i for i, kind in enumerate(unet.config["up_block_types"]) if kind.startswith("CrossAttn")}
    tensors = {ldm_name(n, layers, attentive): t.to(dtype).contiguous() for n, t in unet.state_dict().items()}
    assert len(tensors) == len(unet.state_dict())
    save_file({**tensors, "first_stage_model.decoder.conv_in.bias": torch.ones(3), "betas": torch.ones(4)}, file)
