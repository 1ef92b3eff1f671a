"""All that is measured of an autoencoder on its images: latents, reconstructions, the bound on ln p(x), pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module

from pipeline import files, program
from pipeline.autoencoder import refuse_misfit, refuse_missing, stream_statistics
from pipeline.config import Config
from pipeline.data.dataset import spaced
from pipeline.diffusion.likelihood import average
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.pictures import interpolations_picture, readable_scale, reconstructions_picture
from pipeline.real_images import read_sets
from pipeline.reconstruction import Autoencoder, Bounds, Distance, Reconstructed
from vae.channels import DEAD_NATS, ChannelStatistics, mixed_channels
from vae.game import collapsed_posterior
from vae.metrics import ssim_window
from vae.model import weights_sha256
from vae.moments import mixed_scale
from vae.tiles import in_tiles

BOUND_IMAGES, BOUND_DRAWS = 64, 64
WIDE_PIXELS = 1200  # of all columns of a picture, about

Scores = dict[str, Any]  # name → number, text, or one number for each latent channel; JSON


def measure(
    engine: Engine,
    vae: AutoencoderKL,
    config: Config,
    folder: Path,
    *,
    perceptual: Distance | None = None,
    bound_images: int = BOUND_IMAGES,
    bound_draws: int = BOUND_DRAWS,
) -> Scores:
    """Write scores.json, reconstructions.png and interpolations.png into a folder; the scores.

    Every rank calls it: they share out the training images, and rank 0 does the rest.  vae: frozen, fp32; it is moved
    to the engine's device and computes in fp32.  perceptual: (x_hat, x) → [B], on that device.  bound_images: 0 leaves
    the bound out.

    Raises UsageError: a network that doesn't fit the images, images that can't be read, values that aren't finite.
    """
    refuse_misfit(vae, config.data.image_size)
    with blame("vae.tile_pixels"):
        in_tiles(vae, config.vae.tile_pixels)
    refuse_missing(config)
    held_out = config.data.validation_images
    Module.to(vae, engine.device)
    statistics = stream_statistics(engine, vae, config)

    def on_main() -> Scores:
        scores = {"vae_sha256": weights_sha256(vae), **latent_scores(statistics, config.data.weights or (1.0,))}
        train = read_sets("data.train_images", config.data.train_images, config)
        if held_out is None:
            program.say("data.validation_images: null came, so reconstructions and the bound are of training images")
            key, measured = "data.train_images", train.pixels
        else:
            key = "data.validation_images"
            measured = read_sets(key, (held_out,), config).pixels
        scores["images"] = key
        autoencoder = Autoencoder(vae, config.seed, config.evaluation.batch_images)
        classifier = fit_classifier(train.pixels, train.labels, config.seed)
        with blame("vae.path"):
            found = autoencoder.reconstruct_all(measured, classifier, perceptual)
            scores |= reconstruction_scores(found, config.data.image_size)
            if bound_images:
                log_variance = autoencoder.fitted_log_variance(train.pixels)
                bounds = autoencoder.bounds(measured, log_variance, num_images=bound_images, num_draws=bound_draws)
                scores |= bound_scores(bounds, bound_draws)
        draw_reconstructions(folder / "reconstructions.png", autoencoder, measured, found.psnr_db, key)
        draw_interpolations(folder / "interpolations.png", autoencoder, measured, key)
        files.write_json(folder / "scores.json", scores)
        return scores

    return engine.main_does(on_main)


# Latents ------------------------------------------------------------------------------------------


def latent_scores(statistics: Sequence[ChannelStatistics], weights: Sequence[float]) -> Scores:
    """Of each channel, over the sets as they are mixed."""
    with blame("vae.path"):
        channels = mixed_channels(statistics, weights)
        scale = mixed_scale([each.moments for each in statistics], weights).scale
    if told := collapsed_posterior([channels.kl_nats], least=DEAD_NATS):
        program.say(f"warning: {told}")
    return {
        "latent/num_elements_per_channel": sum(each.moments.count for each in statistics),
        "latent/scale": scale,
        "latent/mean": channels.mean,
        "latent/std": channels.std,
        "latent/skewness": channels.skewness,
        "latent/excess_kurtosis": channels.excess_kurtosis,
        "latent/kl_nats_per_element": channels.kl_nats,
        "latent/information_share": channels.information_share,
        "latent/dead_channels": channels.dead(),
    }


# Reconstructions and the bound --------------------------------------------------------------------


def fit_classifier(pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None, seed: int) -> ImageClassifier | None:
    """The network whose features distances are taken in, fitted on real training images; None where none can be."""
    if labels is None or len(np.unique(labels)) < 2:
        came = "no labels" if labels is None else "one label alone"
        program.say(f"the images have {came}: no classifier is fitted, and distances in its features are left out")
        return None
    program.say("fitting the classifier on the real training images")
    return ImageClassifier(seed).fit(pixels, labels)


def reconstruction_scores(found: Reconstructed, image_size: int) -> Scores:
    """Means over the images with their standard errors; distances of the whole set."""
    differs = found.psnr_db.isfinite()
    scores: Scores = {"reconstruction/num_images": len(differs), "reconstruction/num_exact": int((~differs).sum())}
    if differs.any():
        scores |= with_error("reconstruction/psnr_db", found.psnr_db[differs])
    scores |= with_error("reconstruction/ssim", found.ssim)
    scores["reconstruction/ssim_window_pixels"] = ssim_window(image_size)[0]
    scores |= with_error("reconstruction/absolute_error_levels", found.absolute_error_levels)
    if found.perceptual_distance is not None:
        scores |= with_error("reconstruction/perceptual_distance", found.perceptual_distance)
    if found.frechet_distance is not None:
        scores["reconstruction/frechet_distance"] = found.frechet_distance
        scores["reconstruction/coverage"] = found.coverage
    return scores


def bound_scores(bounds: Bounds, num_draws: int) -> Scores:
    """Means over the images with their standard errors; of the difference too, for both are of the same draws."""
    scores: Scores = {"bound/num_images": len(bounds.elbo), "bound/num_draws": num_draws}
    scores["bound/decoder_std_levels"] = math.exp(bounds.log_variance / 2) * 127.5
    for name, nats in (("elbo", bounds.elbo), ("iwae", bounds.iwae)):
        scores |= with_error(f"bound/{name}_nats_per_image", nats)
        scores |= with_error(f"bound/{name}_bits_per_dim", bounds.bits_per_dim(nats))
    scores |= with_error("bound/iwae_less_elbo_nats_per_image", bounds.iwae - bounds.elbo)
    return scores | with_error("bound/kl_nats_per_image", bounds.kl)


def with_error(name: str, values: Tensor) -> Scores:
    """The mean of one number for each image, and its standard error where there are two images or more.

    Raises UsageError where one isn't finite.
    """
    if not values.isfinite().all():
        broken = (~values.isfinite()).nonzero().flatten().tolist()
        raise UsageError(
            f"{name} is not finite for {len(broken)} of {len(values)} images, first number {broken[0]} from 0; name an "
            "autoencoder whose training went well"
        )
    if len(values) < 2:
        return {name: float(values.mean())}
    mean, error = average(values)
    return {name: mean, f"{name}_standard_error": error}


# Pictures -----------------------------------------------------------------------------------------


def draw_reconstructions(
    path: Path, autoencoder: Autoencoder, pixels: NDArray[np.uint8], psnr_db: Tensor, key: str
) -> None:
    """The images that came back worst, in the middle and best."""
    per_kind = max(1, min(4, len(pixels) // 3, columns_of(pixels) // 3))
    order = psnr_db.argsort(stable=True).tolist()
    middle = (len(order) - per_kind) // 2
    kinds = {"worst": order[:per_kind], "median": order[middle : middle + per_kind], "best": order[-per_kind:]}
    chosen = [index for indices in kinds.values() for index in indices]
    columns = [f"{kind}\n{float(psnr_db[index]):.1f} dB" for kind, indices in kinds.items() for index in indices]
    shown = pixels[chosen]
    title = f"Reconstructions of {len(pixels):,} images of {key}, by PSNR"
    with files.whole(path) as aside:
        reconstructions_picture(shown, autoencoder.pixels_of(shown), columns, title).save(aside, format="PNG")


def draw_interpolations(path: Path, autoencoder: Autoencoder, pixels: NDArray[np.uint8], key: str) -> None:
    """Lines between pairs of images that are evenly spaced over the set."""
    wide = columns_of(pixels)
    num_steps = 9 if wide >= 9 else 5 if wide >= 4 else 3
    num_pairs = max(1, min(4, len(pixels) // 2, wide // 2))
    at = list(spaced(len(pixels), 2 * num_pairs))
    first, second = pixels[at[0::2]], pixels[at[1::2] or at]
    title = f"From one image of {key} to another: latents, decoded, and pixels"
    with files.whole(path) as aside:
        interpolations_picture(*autoencoder.lines(first, second, num_steps), title).save(aside, format="PNG")


def columns_of(pixels: NDArray[np.uint8]) -> int:
    """How many images stand side by side: 12 of 32 pixels, 9 of 64 or 128, 4 of 256, 3 of larger ones."""
    return max(3, min(12, WIDE_PIXELS // (pixels.shape[2] * readable_scale(pixels))))


# To the terminal ----------------------------------------------------------------------------------

SHOWN = {  # score → what a person reads, digits
    "reconstruction/psnr_db": ("PSNR, dB", 2),
    "reconstruction/ssim": ("SSIM", 4),
    "reconstruction/absolute_error_levels": ("mean absolute error, levels of 255", 3),
    "reconstruction/perceptual_distance": ("perceptual distance", 4),
    "reconstruction/frechet_distance": ("Fréchet distance to the originals (rFD)", 4),
    "reconstruction/coverage": ("coverage of the originals", 4),
    "bound/elbo_nats_per_image": ("ELBO, nats per image", 1),
    "bound/iwae_nats_per_image": ("IWAE, nats per image", 1),
    "bound/iwae_less_elbo_nats_per_image": ("IWAE less ELBO, nats per image", 2),
    "bound/kl_nats_per_image": ("KL from the prior, nats per image", 1),
    "bound/elbo_bits_per_dim": ("ELBO, bits/dim of 8-bit pixels", 4),
    "bound/iwae_bits_per_dim": ("IWAE, bits/dim of 8-bit pixels", 4),
}


def show(scores: Scores, folder: Path) -> None:
    """The scores as two tables, and where everything lies."""
    console = Console()
    latents = Table(title=f"latents of data.train_images: scale {scores['latent/scale']:.4f}")
    names = ("mean", "std", "skewness", "excess_kurtosis", "kl_nats_per_element", "information_share")
    headings = ("channel", "mean", "std", "skewness", "kurtosis - 3", "KL, nats", "of all KL")
    for heading in headings:
        latents.add_column(heading, justify="right")
    for channel in range(len(scores["latent/mean"])):
        dead = " (dead)" if channel in scores["latent/dead_channels"] else ""
        values = [scores[f"latent/{name}"][channel] for name in names]
        latents.add_row(f"{channel}{dead}", *(f"{v:.4f}" for v in values[:-1]), f"{values[-1]:.1%}")
    console.print(latents)
    console.print("KL per element, from N(0, 1); skewness and kurtosis - 3 are 0 where a channel is normal")
    rest = Table(title=f"{folder / 'scores.json'}: images of {scores['images']}")
    for heading in ("", "mean", "± standard error", "images"):
        rest.add_column(heading, justify="left" if not heading else "right")
    for name, (title, digits) in SHOWN.items():
        if name in scores:
            error = scores.get(f"{name}_standard_error")
            told = "" if error is None else f"{error:.{digits}f}"
            count = scores[f"{name.split('/')[0]}/num_images"]
            rest.add_row(title, f"{scores[name]:.{digits}f}", told, f"{count:,}")
    console.print(rest)
    if "reconstruction/frechet_distance" in scores:
        console.print("rFD is biased at few images, and coverage depends on how many: compare equal numbers")
    if "bound/num_draws" in scores:
        draws, levels = scores["bound/num_draws"], scores["bound/decoder_std_levels"]
        console.print(f"bounds: of a density of pixels in [-1,1]; decoder σ {levels:.2f} levels; IWAE of {draws} draws")
    console.print(f"pictures: {folder}/reconstructions.png, interpolations.png")
