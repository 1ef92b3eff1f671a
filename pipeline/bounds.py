"""What held-out images cost under the model: its loss, the variational bound, the ODE's likelihood, pixels.

Conventions, for latents z of the autoencoder as it gives them: z ~ q(z|x), one draw for each image; densities are of z,
so the log-Jacobian of the scale is in them; the condition is the image's own, without guidance.  Every draw is a
function of (seed, image, timestep), so models that are scored on the same images are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import denoiser, files
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config_diffusion import DiffusionConfig
from pipeline.config_evaluation import LikelihoodConfig
from pipeline.data import draws
from pipeline.data.draws import Purpose
from pipeline.data.images import to_unit
from pipeline.diffusion.bound import Bound, entropy_form, every_term, reverse_of, stratified_terms, variational_bound
from pipeline.diffusion.likelihood import average, discretized_gaussian_nll
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.ode_likelihood import ode_nll
from pipeline.diffusion.schedule import respaced
from pipeline.metrics.plots import bound_plot
from pipeline.sampler import Asked, told_of
from vae.likelihood import autoencoder_nll, fit_log_variance, mean_square_log_variance, pixel_bound, posterior_entropy
from vae.moments import LatentScale, encode_moments, sample_posterior

FIT_IMAGES = 256  # training images that the decoder's variance is fitted on

Images = NDArray[np.uint8]  # [N,H,W,3]


@dataclass(frozen=True)
class Encoded:
    """Images and one posterior draw of each."""

    x: Tensor  # [N,3,H,W] in [-1,1]
    moments: Tensor  # [N,2C,h,w]
    z_0: Tensor  # [N,C,h,w], scaled as the U-Net has them
    indices: list[int]  # which images of their set these are


@dataclass(frozen=True)
class Costs:
    """The model whose costs are counted, and how."""

    pipe: ClassConditionalPipeline
    diffusion: DiffusionConfig
    seed: int
    batch_images: int

    @property
    def latent_scale(self) -> LatentScale:
        """As the export's VAE has it."""
        config = self.pipe.vae.config
        return LatentScale(config["scaling_factor"], config.get("shift_factor") or 0.0)

    @property
    def says_variance(self) -> bool:
        """Whether the U-Net says a variance where the loss and the bound are of one: stock exports leave it out."""
        channels = int(self.pipe.unet.config["in_channels"])
        wanted = 2 * channels if self.diffusion.variance_type == "learned_range" else channels
        return int(self.pipe.unet.config["out_channels"]) == wanted

    @property
    def has_bound(self) -> bool:
        """Whether the model is a chain of discrete timesteps of which all is said: only such a one has the bound."""
        return self.diffusion.objective == "ddpm" and self.says_variance

    def encode(self, images: Images, indices: Sequence[int]) -> Encoded:
        """Images uint8 [N,H,W,3], numbered in their set by `indices` → z_0 ~ q(z|x)."""
        vae = self.pipe.vae
        x = torch.from_numpy(to_unit(images)).to(vae.device)
        with torch.no_grad():
            moments = torch.cat([encode_moments(vae, part) for part in x.split(self.batch_images)])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = [draws.normal(self.seed, Purpose.LIKELIHOOD_POSTERIOR, index, shape) for index in indices]
        z = sample_posterior(moments, torch.from_numpy(np.stack(noise)).to(vae.device))
        return Encoded(x, moments, self.latent_scale.normalise(z), list(indices))

    def network(self, asked: Sequence[Asked]) -> denoiser.Network:
        """The U-Net told the images' own classes and captions."""
        unet = self.pipe.unet
        condition = self.pipe.tell(**told_of(self.pipe, asked)).arguments(unet.config, torch.float32)

        def told(z: Tensor, time: Tensor) -> Tensor:
            return unet(z.float(), time, **condition).sample

        return told

    def bound(self, of: Encoded, asked: Sequence[Asked], num_steps: int | None, num_terms: int | None) -> Bound:
        """The bound of the chain of num_steps steps (None: all T), from num_terms of its terms (None: all)."""
        schedule, told = denoiser.schedule_of(self.diffusion), None
        if num_steps is not None and num_steps < schedule.num_timesteps:
            told = torch.arange(1, num_steps + 1) * schedule.num_timesteps // num_steps - 1  # ends at T-1
            schedule = respaced(schedule, told)
            told = told.to(of.z_0.device)
        chain = schedule.num_timesteps
        schedule = schedule.to(of.z_0.device)

        def one(part: slice) -> Bound:
            indices, z_0 = of.indices[part], of.z_0[part]

            def noise(t: Tensor) -> Tensor:
                eps = [
                    draws.normal(self.seed, Purpose.LIKELIHOOD_NOISE, index, tuple(z_0.shape[1:]), fine=at, finer=chain)
                    for index, at in zip(indices, t.tolist(), strict=True)
                ]
                return torch.from_numpy(np.stack(eps)).to(z_0.device)

            if num_terms is None or num_terms >= chain:
                chosen = every_term(len(z_0), schedule)
            else:
                u = [draws.uniforms(self.seed, Purpose.LIKELIHOOD_TIMESTEPS, i, num_terms - 1) for i in indices]
                chosen = stratified_terms(torch.from_numpy(np.stack(u)), schedule)
            network, settings = self.network(asked[part]), self.diffusion
            reverse = reverse_of(network, schedule, settings.prediction_type, settings.variance_type, told=told)
            return variational_bound(z_0, schedule, reverse, noise, chosen=chosen)

        with torch.no_grad():
            return Bound.joined([one(part) for part in self._parts(len(of.z_0))])

    @torch.no_grad()
    def losses(self, of: Encoded, asked: Sequence[Asked], objective: Objective, num_bands: int) -> Tensor:
        """The training's loss of each image at one time from each band, lowest noise first.  float64 [N,num_bands].

        Band b holds the u in [b, b+1) / num_bands that the objective makes its times of: with uniform timesteps, equal
        parts of 0..T-1.  The mean over the bands estimates what training minimises, of these images.
        """
        found: list[Tensor] = []
        for part in self._parts(len(of.z_0)):
            indices, z_0 = of.indices[part], of.z_0[part]
            u = [draws.uniforms(self.seed, Purpose.VALIDATION_TIMESTEP, index, num_bands) for index in indices]
            network = self.network(asked[part])
            bands: list[Tensor] = []
            for band, of_band in enumerate(torch.from_numpy(np.stack(u)).unbind(dim=1)):
                eps = [
                    draws.normal(self.seed, Purpose.VALIDATION_NOISE, index, tuple(z_0.shape[1:]), fine=band)
                    for index in indices
                ]
                noise = torch.from_numpy(np.stack(eps)).to(z_0.device)
                noised = objective.noised(z_0, (band + of_band) / num_bands, noise)
                bands.append(objective.loss(network(noised.z, noised.time), z_0, noise, noised)[0].double())
            found.append(torch.stack(bands, dim=1))
        return torch.cat(found)

    def ode(self, of: Encoded, asked: Sequence[Asked], num_probes: int | None, tolerance: float) -> tuple[Tensor, int]:
        """-ln p(z_0) of the probability-flow ODE, nats per element [N]; and the network's calls in a batch, at most.

        num_probes: random directions of the trace; None: the exact one.
        """
        found: list[Tensor] = []
        calls = 0
        for part in self._parts(len(of.z_0)):
            z_0 = of.z_0[part]
            probes = None if num_probes is None else self._probes(of.indices[part], z_0, num_probes)
            eps_of, log_snr_max, log_snr_min = denoiser.eps_at(self.diffusion, self.network(asked[part]))
            result = ode_nll(z_0, eps_of, log_snr_max, log_snr_min, probes=probes, tolerance=tolerance)
            found.append(result.nll)
            calls = max(calls, result.num_evaluations)
        return torch.cat(found), calls

    def _probes(self, indices: list[int], z_0: Tensor, count: int) -> Tensor:
        """Signs [K,B,C,h,w], each image's by its own number."""
        shape = tuple(z_0.shape[1:])
        signs = [
            [draws.signs(self.seed, Purpose.LIKELIHOOD_PROBE, index, shape, fine=k) for index in indices]
            for k in range(count)
        ]
        return torch.from_numpy(np.array(signs)).to(z_0.device)

    def decoder(self, of: Encoded, log_variance: float | None) -> tuple[Tensor, float]:
        """-ln P(x|z) of the 8-bit pixels, nats per pixel channel [N]; and ln σ² of the decoder, fitted where None."""
        z = self.latent_scale.denormalise(of.z_0)
        with torch.no_grad():
            x_hat = torch.cat([self.pipe.vae.decode(part).sample.float() for part in z.split(self.batch_images)])  # pyright: ignore[reportAttributeAccessIssue]

        def nll(log_variance: float) -> Tensor:
            wide = torch.tensor(log_variance, dtype=torch.float64, device=x_hat.device)
            return discretized_gaussian_nll(of.x.double(), x_hat, wide).mean(dim=(1, 2, 3))

        if log_variance is None:
            near = mean_square_log_variance(x_hat, of.x)
            log_variance = fit_log_variance(lambda at: float(nll(at).mean()), near)
        return nll(log_variance), log_variance

    def _parts(self, count: int) -> list[slice]:
        return [slice(i, min(i + self.batch_images, count)) for i in range(0, count, self.batch_images)]


def counted(total: int, count: int) -> list[int]:
    """Which of `total` held-out images are counted: `count` evenly spaced ones, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def likelihood_scores(
    costs: Costs, config: LikelihoodConfig, train: Images, images: Images, asked: Sequence[Asked], *, plot: Path
) -> dict[str, float | int]:
    """Bits of the first held-out images, evenly spaced over the set, by name; and the picture of the bound's terms.

    bits/dim of latents are of a density of z, per element of z; those of pixels are of 8-bit levels, per channel.
    Where there is no chain (Costs.has_bound) only the ODE's likelihood is given.
    """
    scores: dict[str, float | int] = {}
    scale = costs.latent_scale

    def chosen(count: int) -> tuple[Encoded, list[Asked]]:
        at = counted(len(images), count)
        return costs.encode(images[at], at), [asked[i] for i in at]

    def add(name: str, nats: Tensor) -> None:
        mean, error = average(nats / math.log(2))
        scores[f"likelihood/{name}_bits_per_dim"], scores[f"likelihood/{name}_standard_error"] = mean, error

    if config.num_images and costs.has_bound:
        of, told = chosen(config.num_images)
        schedule = denoiser.schedule_of(costs.diffusion).to(of.z_0.device)
        bound = costs.bound(of, told, None, config.num_timesteps)
        in_z = autoencoder_nll(bound.total, scale)
        scores["likelihood/num_images"] = len(of.x)
        add("bound", in_z)
        scores["likelihood/bound_nats_per_image"] = float(in_z.mean()) * of.z_0[0].numel()
        add("l_T", bound.prior)
        add("kl", bound.rate - bound.prior)
        add("l_0", autoencoder_nll(bound.distortion, scale))
        add("entropy_form", autoencoder_nll(entropy_form(bound, schedule), scale))
        for steps in config.chain_steps:
            add(
                f"bound_{steps}_steps",
                autoencoder_nll(costs.bound(of, told, steps, config.num_timesteps).total, scale),
            )
        fit = np.linspace(0, len(train) - 1, min(FIT_IMAGES, len(train))).round().astype(int)
        _, log_variance = costs.decoder(costs.encode(train[fit], fit.tolist()), None)
        pixels, _ = costs.decoder(of, log_variance)
        entropy = posterior_entropy(of.moments)
        sizes = {"pixels": of.x[0].numel(), "latents": of.z_0[0].numel()}
        whole = pixel_bound(pixels, in_z.to(pixels.device), entropy, **sizes)
        add("pixel_bound", whole.total)
        add("pixel_decoder", whole.decoder)
        scores["likelihood/decoder_std_levels"] = math.exp(log_variance / 2) * 127.5
        draw_terms(plot, bound)
    if config.ode_images:
        of, told = chosen(config.ode_images)
        nll, calls = costs.ode(of, told, config.ode_probes, config.ode_tolerance)
        add("ode", autoencoder_nll(nll, scale))
        scores |= {"likelihood/ode_num_images": len(of.x), "likelihood/ode_evaluations": calls}
    return scores


def draw_terms(path: Path, bound: Bound) -> None:
    """The bound's steps as a picture and, in JSON beside it, as numbers: means over the images, standard errors."""
    bits = bound.terms_bits[:, 1:].cpu().numpy()  # [N,K], of t ≥ 1
    errors = bits.std(axis=0, ddof=1) / math.sqrt(len(bits))
    t, counts = (each.double().mean(dim=0)[1:].cpu().numpy() for each in bound.chosen)
    l_0, l_T = (float(nats.mean()) / math.log(2) for nats in (bound.distortion, bound.prior))
    title = f"The bound's steps: {len(bits)} images; beside them L_0 = {l_0:.3f} and L_T = {l_T:.4f} bits/dim"
    columns = {"t": t, "bits": bits.mean(axis=0), "errors": errors, "counts": counts}
    with files.whole(path) as aside:
        bound_plot(aside, **columns, title=title)
    said = {"num_images": len(bits), "l_0": l_0, "l_T": l_T, **{name: row.tolist() for name, row in columns.items()}}
    files.write_json(path.with_suffix(".json"), said)
