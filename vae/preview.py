"""A small decoder in place of the large one, for pictures on the way (Ollin Boer Bohan's TAESD).

It was distilled from one autoencoder, on latents at the scale that was published with it.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny

from vae.moments import LatentScale, downsampling_factor, published_scale
from vae.pretrained import open_pretrained


def load_preview(
    path: str | Path, vae: AutoencoderKL, latent_scale: LatentScale, *, revision: str | None = None
) -> AutoencoderTiny:
    """The small decoder for latents of `vae` that a diffusion model has at `latent_scale`; frozen, fp32 on the CPU.

    path: a diffusers folder, or a hub id `org/name`, downloaded at `revision`.  Its config's scaling_factor and
    shift_factor are made such that a pipeline whose `vae` it is decodes these latents.

    OSError, ValueError: nothing there, or broken; see `vae.pretrained.open_pretrained`.  ValueError too: another number
    of latent channels or another factor, and a `vae` that doesn't say at what scale it was published.
    """
    advice = "an existing diffusers folder of an AutoencoderTiny, or a hub id org/name, was wanted"
    tiny = open_pretrained(AutoencoderTiny, path, what="AutoencoderTiny", advice=advice, revision=revision)
    came = (
        int(tiny.config["latent_channels"]),
        int(tiny.config["upsampling_scaling_factor"]) ** (len(tiny.config["decoder_block_out_channels"]) - 1),
    )
    wanted = (int(vae.config["latent_channels"]), downsampling_factor(vae))
    if came != wanted:
        raise ValueError(
            f"{str(path)!r} decodes latents of {came[0]} channels by a factor of {came[1]}, {wanted[0]} channels and a "
            f"factor of {wanted[1]} were wanted, those of the autoencoder"
        )
    own = LatentScale(float(tiny.config["scaling_factor"]), float(tiny.config["shift_factor"] or 0))
    mapped = preview_scale(own, published_scale(vae), latent_scale)
    tiny.register_to_config(scaling_factor=mapped.scale, shift_factor=mapped.shift)
    return tiny.requires_grad_(False).eval()


def preview_scale(own: LatentScale, published: LatentScale, used: LatentScale) -> LatentScale:
    """The scale by which the small decoder takes z_0 of a diffusion model that has latents z at the scale `used`.

    It was made for z_0' = published.normalise(z) and takes own.denormalise(z_0'), where z = used.denormalise(z_0).  In
    full that is ((z_0 / s_u + b_u - b_p) s_p) / s_o + b_o, again of the form z_0 / s + b.
    """
    gain = published.scale / own.scale
    return LatentScale(used.scale / gain, own.shift + (used.shift - published.shift) * gain)
