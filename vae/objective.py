"""What the autoencoder minimises, what its adversary does, and what one step of the training hands to the next.

    autoencoder:   reconstruction + w_p · perceptual + w_KL(step) · KL + w_G(step) · λ · adversarial
    discriminator: -V(D, G) + R1, on the images and on what the autoencoder has just made of them

Rombach et al. 2022, eq. 25.  λ (Esser et al. 2021, eq. 7) and the variance of a gaussian decoder are those of the step
before: so they are of a whole global batch, however that is cut into micro-batches, and no second pass is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vae import game
from vae.config import VaeTrainConfig
from vae.losses import SpatialTransform, kl_of_elements, reconstruction_loss
from vae.steps import AutoencoderOutput

Batch = dict[str, Tensor]
LossAndParts = tuple[Tensor, dict[str, Tensor]]  # the mean over a batch; detached scalars for the record
LEAST_LOG_VARIANCE = -20.0  # of a decoder that gives every pixel back: the loss has no lower bound without one


class Objective:
    """Both players' losses over a training.  `settle` is to be called after each optimizer step.

    carried: fp32 scalars that one step hands to the next, which a checkpoint keeps: `adaptive_weight` λ, 0 until it has
    been measured, and `log_variance` ln s² of the decoder, in units of [-1,1] pixels.
    """

    def __init__(
        self,
        config: VaeTrainConfig,
        autoencoder: AutoencoderKL,
        *,
        discriminator: nn.Module | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda mine: mine,
        device: torch.device | str = "cpu",
    ) -> None:
        """discriminator: the bare one, without a wrapper; perceptual: (x_hat, x) → [B], see `vae.perceptual`;
        autocast: what networks compute in that don't learn from the autoencoder's loss.

        Raises ValueError: a discriminator where config has none, or the other way round; so for perceptual.
        """
        for name, came, wanted in (
            ("discriminator", discriminator, config.adversary),
            ("perceptual distance", perceptual, config.perceptual),
        ):
            if (came is None) != (wanted is None):
                raise ValueError(f"{name}: {'none' if came is None else 'one'} came, against the config")
        self.config = config
        self.last_layer = autoencoder.decoder.conv_out.weight
        self.discriminator, self.perceptual = discriminator, perceptual
        self.autocast, self.mean_over_ranks = autocast, mean_over_ranks
        self.carried: dict[str, Tensor] = {}
        if config.adversary is not None and config.adversary.adaptive:
            self.carried["adaptive_weight"] = torch.zeros((), device=device)
        if config.reconstruction == "gaussian":
            self.carried["log_variance"] = torch.zeros((), device=device)
        self._found: dict[str, Tensor] = {}  # this rank's sums over the micro-batches of a step, by name in `carried`
        self._num_found = 0

    def autoencoder_loss(self, model: nn.Module, batch: Batch, step: int) -> LossAndParts:
        """The autoencoder's loss, and its parts.

        The pixel error is a mean over pixel channels and the KL one over latent elements (in nats), so a weight means
        the same at any batch and image size.  Elsewhere the KL is summed over a latent: a weight w of diffusers (mean
        reconstruction) is kl_weight = w · Chw here, one of CompVis (summed) w · Chw / 3HW.  With a gaussian decoder the
        KL is one over pixel channels, so that the loss is -ELBO / 3HW at kl_weight 1.

        batch: `x` [B,3,H,W] in [-1,1], `posterior_noise` [B,C,h,w], and where they are there `transform` float64 [B,2]
        (scale and quarter turns, alike in all) and `class_label` [B].  The images compared, and what was made of them,
        are left in it as `x_target` and `x_hat` for the discriminator.
        """
        x, transform = batch["x"], _transform_of(batch)
        output: AutoencoderOutput = model(x, batch["posterior_noise"], transform)
        x_hat = output.x_hat
        h, w = output.moments.shape[-2:]
        target = x if transform is None else transform.of_images(x, latents=(h, w))

        parts: dict[str, Tensor] = {}
        reconstruction = self._reconstruction(x_hat, target, parts)
        if self.perceptual is not None and self.config.perceptual is not None:
            with self.autocast():
                distance = self.perceptual(x_hat, target).mean()
            parts["perceptual"] = distance
            reconstruction = reconstruction + self.config.perceptual.weight * distance

        by_channel = kl_of_elements(output.moments).mean(dim=(0, 2, 3))  # [C]
        kl = by_channel.mean()
        parts["kl_nats_per_element"] = kl
        parts |= {f"kl_channel/{channel}": by_channel[channel] for channel in range(len(by_channel))}
        warmed_up = min(1.0, (step + 1) / max(1, self.config.kl_warmup_steps))
        share = output.moments[0].numel() / (2 * x[0].numel()) if self.config.reconstruction == "gaussian" else 1.0
        loss = reconstruction + self.config.kl_weight * warmed_up * share * kl

        if self.discriminator is not None:
            loss = loss + self._adversarial(reconstruction, x_hat, batch.get("class_label"), step, parts)
            batch["x_target"], batch["x_hat"] = target, x_hat.detach()
        self._num_found += 1
        return loss, {name: part.detach() for name, part in parts.items()}

    def discriminator_loss(self, model: nn.Module, batch: Batch) -> LossAndParts:
        """The discriminator's loss, and its parts, on a batch that `autoencoder_loss` has seen."""
        rules = self.config.adversary
        assert rules is not None
        x = batch["x_target"].detach().requires_grad_(rules.r1_gamma > 0)
        real, fake = game.judge_both(model, x, batch["x_hat"], self._classes(batch.get("class_label")))
        loss = game.discriminator_loss(real, fake, rules.game)
        parts = game.game_figures(real, fake)
        if rules.r1_gamma > 0:
            penalty = game.r1_penalty(real, x, rules.r1_gamma)
            loss, parts["r1"] = loss + penalty, penalty.detach()
        return loss, parts

    def plays(self, step: int) -> bool:
        """Whether the game is on in this step, counted from 0."""
        return self.config.adversary is not None and step >= self.config.adversary.start_step

    def settle(self) -> None:
        """Hand what the ranks found in a step to the next one.  A collective, which nobody waits for."""
        for name, total in self._found.items():
            mean = self.mean_over_ranks(total / self._num_found)
            now = game.balance(mean) if name == "adaptive_weight" else mean.log().clamp(min=LEAST_LOG_VARIANCE)
            old = self.carried[name]
            old.copy_(torch.where(now.isfinite(), now, old))  # fp16 passes over a step that overflows
        self._found, self._num_found = {}, 0

    def _reconstruction(self, x_hat: Tensor, target: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The pixel error as the config has it; of a gaussian decoder, in nats per pixel channel."""
        kind = self.config.reconstruction
        error = reconstruction_loss(x_hat, target, "l1" if kind == "l1" else "l2").mean()
        parts["reconstruction"] = error
        if kind != "gaussian":
            return error
        self._find("log_variance", error.detach())
        log_variance = self.carried["log_variance"].clone()  # `settle` writes into the original
        parts["log_variance"] = log_variance
        return 0.5 * (math.log(2 * math.pi) + log_variance + error * (-log_variance).exp())

    def _adversarial(
        self, reconstruction: Tensor, x_hat: Tensor, labels: Tensor | None, step: int, parts: dict[str, Tensor]
    ) -> Tensor | float:
        """w_G(step) · λ · adversarial.  λ is measured from the step before the game on, so that there is one."""
        rules = self.config.adversary
        assert rules is not None and self.discriminator is not None
        if step + 1 < rules.start_step:
            return 0.0
        with self.autocast():
            logits = game.judge(self.discriminator, x_hat.to(_dtype_of(self.discriminator)), self._classes(labels))
        adversarial = game.generator_loss(logits, rules.game)
        weight = torch.full_like(
            adversarial, game.adversarial_weight(step, weight=rules.weight, start_step=rules.start_step)
        )
        if rules.adaptive:
            self._find("adaptive_weight", game.last_layer_gradients(reconstruction, adversarial, self.last_layer))
            weight = weight * self.carried["adaptive_weight"]
        parts |= {"adversarial": adversarial, "adversarial_weight": weight}
        return weight.detach() * adversarial

    def _find(self, name: str, value: Tensor) -> None:
        self._found[name] = self._found.get(name, torch.zeros_like(value)) + value

    def _classes(self, labels: Tensor | None) -> Tensor | None:
        rules = self.config.adversary
        return labels if rules is not None and rules.class_conditional else None


def _transform_of(batch: Batch) -> SpatialTransform | None:
    """The one transform of a batch; None for the identity."""
    if "transform" not in batch:
        return None
    scale, turns = batch["transform"][0].tolist()
    return None if (scale, turns) == (1, 0) else SpatialTransform(scale, int(turns))


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
