"""The adversarial game of the autoencoder's training: both players' losses, the balance with the rest, its health.

    D: max_D V(D, G)    on x and the detached x_hat: discriminator_loss + r1_penalty
    G: reconstruction + kl_weight · KL + w(step) · λ · generator_loss:  Esser et al. 2021 (VQGAN), eq. 6 and 7

A discriminator is passed in: any module that takes images, and classes or None, to logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Game = Literal["hinge", "minimax"]


def judge_both(
    discriminator: nn.Module, x: Tensor, x_hat: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of images and of their reconstructions, for the discriminator's step: x_hat detached, one forward pass.

    One pass, as wrappers for several ranks want it; two give the same, for an image's logits are its own.

    x, x_hat [B,3,H,W], classes int64 [B] → [B,1,h',w'] of each.  ValueError: x_hat of another shape than x.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    both = torch.cat([x, x_hat.detach().to(x.dtype)])  # [2B,3,H,W]
    real, fake = discriminator(both, None if classes is None else classes.repeat(2)).chunk(2)
    return real, fake


def judge(discriminator: nn.Module, x_hat: Tensor, classes: Tensor | None = None) -> Tensor:
    """Logits of reconstructions, for the autoencoder's step: gradients go to x_hat and none to the discriminator.

    The bare module, without a wrapper for several ranks: nothing of it is reduced here.

    x_hat [B,3,H,W], classes int64 [B] → [B,1,h',w'].
    """
    fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return functional_call(discriminator, fixed, (x_hat, classes))


def discriminator_losses(real: Tensor, fake: Tensor, game: Game) -> tuple[Tensor, Tensor]:
    """The discriminator's loss of each image, real and fake.  Their means, added, are -V(D, G).

    minimax: -log D(x) and -log(1 - D(x_hat)), D = sigmoid(logit), Goodfellow et al. 2014 eq. 1.  At its optimum
    D = p/(p + q) and V = 2 JS(p, q) - log 4 (their proposition 1 and theorem 1).
    hinge: max(0, 1 - logit) and max(0, 1 + logit), Lim & Ye 2017 (Geometric GAN).  At its optimum the logit is
    sign(p - q) and V = -2 ∫ min(p, q).

    real, fake: logits [B,1,h',w'] → [B], [B], means over the patches; at least fp32.  VQGAN's code halves the sum.
    """
    real, fake = _at_least_float32(real), _at_least_float32(fake)
    match game:
        case "minimax":
            of_real, of_fake = F.softplus(-real), F.softplus(fake)
        case "hinge":
            of_real, of_fake = F.relu(1 - real), F.relu(1 + fake)
    return _per_image(of_real), _per_image(of_fake)


def discriminator_loss(real: Tensor, fake: Tensor, game: Game) -> Tensor:
    """-V(D, G): the means over the batch of `discriminator_losses`, added.  Logits [B,1,h',w'] → scalar."""
    of_real, of_fake = discriminator_losses(real, fake, game)
    return of_real.mean() + of_fake.mean()


def generator_loss(fake: Tensor, game: Game) -> Tensor:
    """What the autoencoder minimises of the game.

    minimax: -log D(x_hat), the non-saturating form of Goodfellow et al. 2014, section 3; log(1 - D(x_hat)) has no
    gradient where D is sure.
    hinge: -logit, Lim & Ye 2017 (Geometric GAN).

    fake: logits [B,1,h',w'] → scalar, the mean over patches and batch; at least fp32.
    """
    fake = _at_least_float32(fake)
    match game:
        case "minimax":
            return F.softplus(-fake).mean()
        case "hinge":
            return -fake.mean()


def r1_penalty(logits: Tensor, x: Tensor, gamma: float) -> Tensor:
    """½ γ E‖∇_x D(x)‖² on real images: R1, Mescheder et al. 2018 eq. 9.

    For N = h'w' patches it is ½ γ E[‖∇_x Σ logit‖² / N]: with N = 1 the paper's, and with patches that share no
    pixel the mean of each patch's own, so that γ means the same at any image size.

    logits [B,1,h',w'] of x [B,3,H,W], which required gradients before they were computed → scalar, at least fp32,
    itself differentiable.  ValueError: x does not require gradients.
    """
    if not x.requires_grad:
        raise ValueError("images without gradients came; call x.requires_grad_() before the discriminator judges them")
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)  # [B,3,H,W]; an image's logits are its own
    num_patches = logits[0].numel()
    return 0.5 * gamma * _at_least_float32(gradient).square().sum(dim=(1, 2, 3)).mean() / num_patches


def adversarial_weight(step: int, *, weight: float, start_step: int) -> float:
    """w(step): 0 in the steps before `start_step`, counted from 0, and `weight` from it on.

    A decoder that does not yet know the image is no match for D: VQGAN (Esser et al. 2021) waits an epoch or longer.
    """
    return weight if step >= start_step else 0.0


def last_layer_gradients(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """∇_L of both losses, flat: scalars and the weight of the decoder's last layer → [2,N], at least fp32, detached.

    Those of micro-batches add up, and their mean over the ranks is that of the global batch.  The norms' is not: they
    are larger, by as much as the ranks disagree.  The graph is kept for the step itself, and no `.grad` is touched.
    """
    rows = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    return torch.stack([_at_least_float32(row).flatten() for row in rows])


def balance(gradients: Tensor, *, largest: float = 1e4, delta: float = 1e-6) -> Tensor:
    """λ = ‖∇_L rec‖ / (‖∇_L adv‖ + δ), VQGAN (Esser et al. 2021) eq. 7, at most `largest`: both losses then pull alike.

    gradients [2,N], of the whole global batch (`last_layer_gradients`) → scalar, detached.
    """
    of_reconstruction, of_adversarial = torch.linalg.vector_norm(gradients, dim=1)
    return (of_reconstruction / (of_adversarial + delta)).clamp(max=largest).detach()


def game_figures(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How the game stands, as shares in [0,1] of the patches; fp32 scalars, detached.

    accuracy_real, accuracy_fake: judged rightly, that is above and below 0; near ½ where D cannot tell.
    saturation: judged with the hinge's margin, real at least 1 and fake at most -1, from where the hinge gives D no
    gradient; the mean of both.

    real, fake: logits [B,1,h',w'].
    """
    real, fake = real.detach(), fake.detach()
    return {
        "accuracy_real": (real > 0).float().mean(),
        "accuracy_fake": (fake < 0).float().mean(),
        "saturation": 0.5 * ((real >= 1).float().mean() + (fake <= -1).float().mean()),
    }


def saturated_discriminator(saturation: Sequence[float], *, most: float = 0.95) -> str | None:
    """An alarm where each of the last figures `saturation` is above `most`: what to do, in one line, else None.

    Raises ValueError: a figure outside [0,1].
    """
    _check_shares(saturation)
    if not saturation or min(saturation) <= most:
        return None
    return (
        f"the discriminator is saturated: in each of the last {len(saturation)} figures more than {most:.0%} of the "
        "patches are beyond its margin, and it tells the decoder nothing; raise the weight of the R1 penalty, lower "
        "the discriminator's learning rate, or start the game later"
    )


def collapsed_coverage(coverage: Sequence[float], *, least: float = 0.5) -> str | None:
    """An alarm where each of the last figures of coverage is below `least`: what to do, in one line, else None.

    coverage: the share of real images near a fake one (Naeem et al. 2020, section 3), in [0,1].  An autoencoder covers
    well before the game starts: half of that is a good `least`.

    Raises ValueError: a figure outside [0,1].
    """
    _check_shares(coverage)
    if not coverage or max(coverage) >= least:
        return None
    return (
        f"the decoder has collapsed: in each of the last {len(coverage)} figures it covers less than {least:.0%} of "
        f"the real images (now {coverage[-1]:.0%}); go back to a checkpoint from before, and lower the weight of the "
        "adversarial term or raise that of the R1 penalty"
    )


def collapsed_posterior(kl_nats: Sequence[Sequence[float]], *, least: float = 0.01) -> str | None:
    """An alarm where the KL of some channel is below `least` in all the last figures: what to do, in one line.

    kl_nats: one row for each figure, `vae.losses.kl_per_channel` in nats per latent element.  A channel without KL is
    the prior whatever the image (Bowman et al. 2016, section 3.1): the diffusion model would learn noise there.

    Raises ValueError: rows of several lengths, a KL that is not finite.
    """
    if len({len(row) for row in kl_nats}) > 1 or not all(math.isfinite(kl) for row in kl_nats for kl in row):
        raise ValueError("rows of one length with a finite KL for each channel are wanted")
    dead = [channel for channel, of_channel in enumerate(zip(*kl_nats, strict=True)) if max(of_channel) < least]
    if not dead:
        return None
    return (
        f"the posterior has collapsed to the prior in latent channels {dead} of {len(kl_nats[0])}: less than "
        f"{least:g} nats per element in each of the last {len(kl_nats)} figures; lower kl_weight, or have fewer "
        "latent_channels"
    )


def _check_shares(window: Sequence[float]) -> None:
    wrong = [figure for figure in window if not 0 <= figure <= 1]
    if wrong:
        raise ValueError(f"{wrong[:3]} came, shares in [0,1] are wanted")


def _per_image(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
