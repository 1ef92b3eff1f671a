"""Large images in tiles: the memory is that of one tile, and the result another one, for tiles know nothing of others.

A tile is normalised by statistics of its own, pads at its own border and attends within itself.  Neighbours share a
quarter of their side, in which diffusers blends them.
"""

from __future__ import annotations

from diffusers import AutoencoderKL

from vae.moments import downsampling_factor

SHARED = 4  # neighbours share one part in so many


def in_tiles(vae: AutoencoderKL, tile_pixels: int | None) -> None:
    """Let the autoencoder take images with a side above `tile_pixels` in tiles, both ways; None: all in one piece.

    ValueError, naming the nearest that fit: a tile, or the part that it shares, is no whole number of latents, and
    diffusers would set tiles down in places that don't fit: the image would get another size.
    """
    if tile_pixels is None:
        vae.disable_tiling()
        return
    factor = downsampling_factor(vae)
    unit = SHARED * factor
    if tile_pixels % unit or tile_pixels < unit:
        below = tile_pixels // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ValueError(
            f"{tile_pixels} came, a multiple of {unit} ({SHARED} times the autoencoder's factor {factor}) was wanted, "
            f"such as {nearest}"
        )
    vae.enable_tiling()
    vae.tile_sample_min_size = tile_pixels
    vae.tile_latent_min_size = tile_pixels // factor
    vae.tile_overlap_factor = 1 / SHARED


def tile_of(image_size: int, tile_pixels: int | None) -> int | None:
    """The side of the tiles that images of this side are taken in; None: they are taken whole.  All in pixels."""
    return tile_pixels if tile_pixels is not None and image_size > tile_pixels else None
