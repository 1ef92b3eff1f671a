"""What an autoencoder gives back of real images, measured image by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.data import draws
from pipeline.data.dataset import spaced
from pipeline.data.draws import Purpose
from pipeline.data.images import to_pixels, to_unit
from pipeline.errors import UsageError
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.distances import frechet_distance
from pipeline.metrics.manifold import density_coverage
from vae.evidence import Evidence, evidence, gaussian_log_likelihood
from vae.interpolation import blend, interpolate
from vae.likelihood import mean_square_log_variance
from vae.metrics import absolute_error, psnr, reconstruct, ssim
from vae.moments import encode_moments, sample_posterior

FIT_IMAGES = 256  # training images at most that the decoder's variance is fitted on
NEIGHBOURS = 5  # k of coverage

Distance = Callable[[Tensor, Tensor], Tensor]  # x_hat, x [B,3,H,W] in [-1,1] → [B]


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """The reconstructions of N images.  Float64 [N], in the images' order."""

    psnr_db: Tensor  # infinite where nothing differs
    ssim: Tensor
    absolute_error_levels: Tensor  # of 0..255
    perceptual_distance: Tensor | None  # None: none was asked for
    frechet_distance: float | None  # of their features from the originals'; None: without a classifier, or too few
    coverage: float | None  # share of originals with a reconstruction among their NEIGHBOURS nearest


@dataclass(frozen=True)
class Bounds:
    """Bounds on ln p(x) of N images, p a density of pixels in [-1,1].  Float64 [N], nats per image."""

    elbo: Tensor
    iwae: Tensor  # IWAE_K of the draws
    kl: Tensor  # KL(q(z|x) ‖ N(0, I)), which is in both
    log_variance: float  # ln σ² of the decoder N(x; x_hat, σ²)
    num_dims: int  # of an image: C·H·W

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Of 8-bit pixels: -nats / (C·H·W ln 2) + log2 127.5, for a level is 1/127.5 wide in [-1,1].

        A level is counted as its width times the density at its middle.
        """
        return -nats / (self.num_dims * math.log(2)) + math.log2(127.5)


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder on its device, and what all that is measured of it depends on."""

    vae: AutoencoderKL
    seed: int
    batch_images: int  # per call

    def reconstruct_all(
        self, pixels: NDArray[np.uint8], classifier: ImageClassifier | None, perceptual: Distance | None
    ) -> Reconstructed:
        """From the posterior's mean.  pixels uint8 [N,H,W,3].  Raises UsageError where what comes back isn't finite."""
        parts: list[list[Tensor]] = []
        features: list[NDArray[np.float32]] = []
        with _bar(len(pixels), "reconstruct") as bar:
            for start, x in self._batches(pixels):
                x_hat = reconstruct(self.vae, x)
                _refuse_broken(x_hat, start)
                found = [psnr(x_hat, x), ssim(x_hat, x), absolute_error(x_hat, x)]
                if perceptual is not None:
                    with torch.no_grad():
                        found.append(perceptual(x_hat.clamp(-1, 1), x))
                parts.append([each.double().cpu() for each in found])
                if classifier is not None:
                    features.append(classifier.features(to_pixels(x_hat.cpu())))
                bar.update(len(x))
        values = [torch.cat(each) for each in zip(*parts, strict=True)]
        distance = coverage = None
        if classifier is not None and len(pixels) > NEIGHBOURS:
            real, fake = classifier.features(pixels), np.concatenate(features)
            distance = frechet_distance(real, fake)
            _, coverage = density_coverage(real, fake, NEIGHBOURS)
        return Reconstructed(
            psnr_db=values[0],
            ssim=values[1],
            absolute_error_levels=values[2],
            perceptual_distance=values[3] if perceptual is not None else None,
            frechet_distance=distance,
            coverage=coverage,
        )

    def pixels_of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images uint8 [N,H,W,3] → their reconstructions, as they are saved."""
        return np.concatenate([to_pixels(reconstruct(self.vae, x).cpu()) for _, x in self._batches(pixels)])

    def lines(
        self, first: NDArray[np.uint8], second: NDArray[np.uint8], num_steps: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Straight lines between images uint8 [P,H,W,3], in latent space and of pixels: [P,num_steps,H,W,3] of each."""
        start, end = (torch.from_numpy(to_unit(each)).to(self.vae.device) for each in (first, second))
        decoded = interpolate(self.vae, start, end, num_steps)
        return to_pixels(decoded.cpu()), to_pixels(blend(start, end, num_steps).cpu())

    def fitted_log_variance(self, pixels: NDArray[np.uint8]) -> float:
        """ln σ² of the mean square error of at most FIT_IMAGES of these images, uint8 [N,H,W,3], z ~ q(z|x).

        Raises ValueError: an error of 0, or none that is finite.
        """
        at = spaced(len(pixels), FIT_IMAGES)
        found: list[float] = []
        with torch.no_grad():
            for start, x in self._batches(pixels[at]):
                moments = encode_moments(self.vae, x)
                noise = self._noise(Purpose.EVIDENCE_FIT, at[start : start + len(x)], moments, 0)
                mean_square = mean_square_log_variance(self._decode(sample_posterior(moments, noise)), x)
                found.append(mean_square + math.log(len(x) / len(at)))
        return float(torch.tensor(found, dtype=torch.float64).logsumexp(0))

    def bounds(self, pixels: NDArray[np.uint8], log_variance: float, *, num_images: int, num_draws: int) -> Bounds:
        """ELBO and IWAE of num_images evenly spaced images at most, by num_draws posterior draws of each.

        pixels uint8 [N,H,W,3].  The draws are a function of the seed, the image's place in `pixels` and the draw.
        """
        at = spaced(len(pixels), num_images)
        wide = torch.tensor(log_variance, dtype=torch.float64, device=self.vae.device)
        found: list[Evidence] = []
        with torch.no_grad(), _bar(len(at), f"bound by {num_draws} draws each") as bar:
            for start, x in self._batches(pixels[at]):
                moments = encode_moments(self.vae, x)
                places = at[start : start + len(x)]
                noise = [self._noise(Purpose.EVIDENCE_POSTERIOR, places, moments, k) for k in range(num_draws)]
                found.append(
                    evidence(
                        x,
                        moments,
                        torch.stack(noise),
                        self._decode,
                        lambda x, x_hat: gaussian_log_likelihood(x, x_hat, wide),
                    )
                )
                bar.update(len(x))
        return Bounds(
            elbo=torch.cat([each.elbo for each in found]).cpu(),
            iwae=torch.cat([each.iwae() for each in found]).cpu(),
            kl=torch.cat([each.kl_by_channel.sum(dim=1) for each in found]).cpu(),
            log_variance=log_variance,
            num_dims=pixels[0].size,
        )

    def _batches(self, pixels: NDArray[np.uint8]) -> Iterator[tuple[int, Tensor]]:
        """The first one's place, and x [B,3,H,W] in [-1,1] on the device."""
        for start in range(0, len(pixels), self.batch_images):
            yield start, torch.from_numpy(to_unit(pixels[start : start + self.batch_images])).to(self.vae.device)

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample.float()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def _noise(self, purpose: Purpose, places: Sequence[int], moments: Tensor, draw: int) -> Tensor:
        """[B,C,h,w] of the posterior's draw by that number, each image's by its own place."""
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        drawn = [draws.normal(self.seed, purpose, place, shape, fine=draw) for place in places]
        return torch.from_numpy(np.stack(drawn)).to(moments.device)


def _refuse_broken(x_hat: Tensor, start: int) -> None:
    broken = ~x_hat.isfinite().flatten(1).all(dim=1)
    if bool(broken.any()):
        first = start + int(broken.nonzero()[0])
        raise UsageError(
            f"the reconstructions of {int(broken.sum())} of {len(x_hat)} images in a batch hold a NaN or an infinity, "
            f"first that of image {first}; name an autoencoder whose training went well"
        )


def _bar(total: int, title: str) -> tqdm[Any]:
    return tqdm(total=total, desc=title, unit=" images", dynamic_ncols=True)
