"""Which loss reaches which network, what the sums are, and what one step of the game hands to the next."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vae.config import DiscriminatorConfig, VaeModelConfig, VaeTrainConfig
from vae.discriminator import PatchDiscriminator, build_discriminator
from vae.evidence import evidence, gaussian_log_likelihood
from vae.game import balance, generator_loss, judge, last_layer_gradients
from vae.losses import SpatialTransform, kl_divergence, kl_of_elements, reconstruction_loss
from vae.model import build
from vae.moments import sample_posterior
from vae.objective import Batch, LossAndParts, Objective
from vae.steps import AutoencoderOutput, AutoencoderStep

TINY = VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4)
SMALL = {"base_channels": 8, "num_downsamplings": 1}
GAME = {"discriminator": SMALL, "adaptive": False}


class Eyes(nn.Module):
    """A frozen network of features: two convolutions drawn by a seed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 4, 3, 2))
        self.requires_grad_(False)

    def distance(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return (self.layers(x_hat) - self.layers(x)).square().mean(dim=(1, 2, 3))


class Game:
    """An autoencoder, its adversary and their objective, small."""

    def __init__(self, num_classes: int | None = None, **settings: Any) -> None:
        self.config = VaeTrainConfig.model_validate(settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.step = AutoencoderStep(build(TINY))
        self.discriminator: PatchDiscriminator | None = None
        if self.config.adversary is not None:
            self.discriminator = build_discriminator(self.config.adversary.discriminator, 3, 1, num_classes=num_classes)
        self.eyes = Eyes() if self.config.perceptual else None
        self.objective = Objective(
            self.config,
            self.step.autoencoder,
            discriminator=self.discriminator,
            perceptual=self.eyes.distance if self.eyes else None,
        )

    def loss(self, batch: Batch, step: int = 0) -> LossAndParts:
        return self.objective.autoencoder_loss(self.step, batch, step)

    def reached(self, module: nn.Module | None) -> set[str]:
        """The weights with a gradient that is not zero."""
        assert module is not None
        # A key's bias moves all scores of a softmax row alike: its gradient is zero by theory.
        named = ((name, p.grad) for name, p in module.named_parameters() if not name.endswith("to_k.bias"))
        return {name for name, gradient in named if gradient is not None and gradient.abs().max() > 0}

    def all_of(self, module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_parameters() if not name.endswith("to_k.bias")}


def batch(num_images: int = 2, seed: int = 0, side: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_images, 3, side, side, generator=generator) * 2 - 1
    return {"x": x, "posterior_noise": torch.randn(num_images, 4, side // 2, side // 2, generator=generator)}


class Fixed(nn.Module):
    """A model that gives what it was made with."""

    def __init__(self, x_hat: Tensor, moments: Tensor) -> None:
        super().__init__()
        self.output = AutoencoderOutput(x_hat, moments)

    def forward(self, *_: Any) -> AutoencoderOutput:
        return self.output


# Who is reached ------------------------------------------------------------------------------------

ALONE: dict[str, dict[str, Any]] = {
    "l1": {"reconstruction": "l1", "kl_weight": 0.0},
    "l2": {"reconstruction": "l2", "kl_weight": 0.0},
    "gaussian": {"reconstruction": "gaussian", "kl_weight": 0.0},
    "perceptual": {"kl_weight": 0.0, "perceptual": {"backbone": "eyes"}},
    "adversarial": {"kl_weight": 0.0, "adversary": GAME},
    "kl": {"kl_weight": 1.0},
}


@pytest.mark.parametrize("kind", ALONE)
def test_each_loss_reaches_the_autoencoder_and_nothing_frozen(kind: str) -> None:
    """Each one by itself: what it is added to is taken out of the gradient."""
    game = Game(**ALONE[kind])
    given = batch()
    frozen = {name: weight.clone() for name, weight in (game.eyes or nn.Identity()).named_parameters()}
    loss = game.loss(given)[0]
    if kind in ("perceptual", "adversarial", "kl"):  # less the pixel error, whose gradient is taken out to the last bit
        loss = loss - Game(kl_weight=0.0).objective.autoencoder_loss(game.step, batch(), 0)[0]
    loss.backward()
    wanted = game.all_of(game.step)
    if kind == "kl":
        wanted = {name for name in wanted if ".encoder." in name or ".quant_conv." in name}
    assert game.reached(game.step) == wanted
    if game.eyes is not None:
        assert all(p.grad is None and torch.equal(p, frozen[name]) for name, p in game.eyes.named_parameters())
    if game.discriminator is not None:
        assert all(p.grad is None for p in game.discriminator.parameters())


@pytest.mark.parametrize("rule", ["hinge", "minimax"])
@pytest.mark.parametrize("r1_gamma", [0.0, 1.0])
def test_the_discriminators_loss_reaches_it_alone(rule: str, r1_gamma: float) -> None:
    game = Game(adversary={**GAME, "game": rule, "r1_gamma": r1_gamma})
    given = batch()
    loss, parts = game.loss(given)
    assert game.discriminator is not None
    its, figures = game.objective.discriminator_loss(game.discriminator, given)
    its.backward()
    assert game.reached(game.discriminator) == game.all_of(game.discriminator)
    assert game.reached(game.step) == set() and loss.requires_grad
    assert ("r1" in figures) == (r1_gamma > 0) and {"accuracy_real", "accuracy_fake", "saturation"} <= figures.keys()
    assert not any(part.requires_grad for part in (*parts.values(), *figures.values()))


# What the sums are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_loss_is_the_sum_its_docstring_says(kind: str) -> None:
    game = Game(reconstruction=kind, kl_weight=0.25)
    given = batch(2, side=8)
    moments = torch.full((2, 8, 4, 4), 0.3)
    loss, parts = game.objective.autoencoder_loss(Fixed(given["x"] + 0.5, moments), given, 0)
    error, kl = {"l1": 0.5, "l2": 0.25}[kind], kl_divergence(moments).mean().item() / (4 * 4 * 4)
    assert loss.item() == pytest.approx(error + 0.25 * kl, rel=1e-6)
    assert parts["reconstruction"].item() == pytest.approx(error, rel=1e-6)
    assert parts["kl_nats_per_element"].item() == pytest.approx(kl, rel=1e-6)
    channels = [parts[f"kl_channel/{channel}"].item() for channel in range(4)]
    assert sum(channels) / 4 == pytest.approx(kl, rel=1e-6)


def test_of_a_gaussian_decoder_it_is_the_bound() -> None:
    """At kl_weight 1: -ELBO per pixel channel of vae.evidence, with the variance that the step before had."""
    game = Game(reconstruction="gaussian", kl_weight=1.0)
    game.objective.carried["log_variance"].fill_(-1.3)
    given = batch(3)
    loss, parts = game.loss(given)
    moments = game.step(given["x"], given["posterior_noise"]).moments
    decoder = game.step.autoencoder
    found = evidence(
        given["x"],
        moments,
        given["posterior_noise"].unsqueeze(0),
        lambda z: decoder.decode(z).sample,  # pyright: ignore
        lambda x, x_hat: gaussian_log_likelihood(x, x_hat, torch.tensor(-1.3)),
    )
    assert loss.item() == pytest.approx(-found.elbo.mean().item() / (3 * 16 * 16), rel=1e-5)
    assert parts["log_variance"].item() == pytest.approx(-1.3)
    game.objective.settle()
    assert game.objective.carried["log_variance"].item() == pytest.approx(math.log(parts["reconstruction"].item()))


def test_the_fitted_variance_is_the_best() -> None:
    """d/d ln s² of ½ (ln s² + e / s²) is 0 at s² = e: no other variance makes the loss of this batch smaller."""
    game = Game(reconstruction="gaussian", kl_weight=0.0)
    game.loss(batch())
    game.objective.settle()
    fitted = game.objective.carried["log_variance"].clone()
    best = game.loss(batch())[0]
    for other in (-0.1, 0.1):
        game.objective.carried["log_variance"].copy_(fitted + other)
        assert game.loss(batch())[0] > best


def test_the_kl_warms_up() -> None:
    game = Game(kl_weight=2.0, kl_warmup_steps=4)
    weights: list[float] = []
    for step in range(6):
        loss, parts = game.loss(batch(), step)
        weights.append(((loss - parts["reconstruction"]) / parts["kl_nats_per_element"]).item())
    assert weights == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rel=1e-4)


def test_kl_and_reparameterised_gradients_are_the_closed_form_and_finite_differences() -> None:
    """d KL/d mean = mean, d KL/d logvar = ½ (exp(logvar) - 1); for f(z) = Σ a z² + b z the draw's own by hand."""
    generator = torch.Generator().manual_seed(3)
    moments = torch.randn(2, 6, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    noise, a, b = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mean, logvar = moments.detach().chunk(2, dim=1)

    (gradient,) = torch.autograd.grad(kl_of_elements(moments).sum(), moments)
    assert torch.allclose(gradient, torch.cat([mean, 0.5 * (logvar.exp() - 1)], dim=1), rtol=1e-12, atol=1e-14)

    def of_draw(moments: Tensor) -> Tensor:
        z = sample_posterior(moments, noise)
        return (a * z.square() + b * z).sum()

    (gradient,) = torch.autograd.grad(of_draw(moments), moments)
    std = (0.5 * logvar).exp()
    slope = 2 * a * (mean + std * noise) + b
    assert torch.allclose(gradient, torch.cat([slope, slope * 0.5 * std * noise], dim=1), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(of_draw, moments, eps=1e-6, atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda m: kl_of_elements(m).sum(), moments, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_the_gradient_of_the_whole_step_is_that_of_finite_differences() -> None:
    """Encoder, draw and decoder in float64: along a direction in all weights."""
    game = Game(kl_weight=0.1)
    game.step.double()
    given = {name: part.double() for name, part in batch().items()}
    weights = list(game.step.parameters())
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    gradients = torch.autograd.grad(game.loss(given)[0], weights)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))

    def at(distance: float) -> float:
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=distance)
            found = game.loss(given)[0].item()
            torch._foreach_add_(weights, directions, alpha=-distance)
        return found

    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


# The transform -------------------------------------------------------------------------------------


def test_a_transform_goes_through_latents_and_images() -> None:
    game = Game(kl_weight=0.0)
    given = batch() | {"transform": torch.tensor([[0.5, 1.0]] * 2, dtype=torch.float64)}
    loss, _ = game.loss(given)
    transform = SpatialTransform(0.5, 1)
    output = game.step(given["x"], given["posterior_noise"], transform)
    assert output.x_hat.shape == (2, 3, 8, 8)
    wanted = reconstruction_loss(output.x_hat, transform.of_images(given["x"], latents=(8, 8)), "l2").mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    same = batch() | {"transform": torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)}
    assert torch.equal(game.loss(same)[0], game.loss(batch())[0])


# The balance ---------------------------------------------------------------------------------------


def by_hand(game: Game, given: Batch) -> Tensor:
    """λ of a batch, from its gradients at the last layer."""
    assert game.discriminator is not None
    output = game.step(given["x"], given["posterior_noise"])
    reconstruction = reconstruction_loss(output.x_hat, given["x"], "l2").mean()
    adversarial = generator_loss(judge(game.discriminator, output.x_hat), "hinge")
    return last_layer_gradients(reconstruction, adversarial, game.step.autoencoder.decoder.conv_out.weight)


def test_lambda_is_that_of_the_step_before() -> None:
    game = Game(kl_weight=0.0, adversary={"discriminator": SMALL, "weight": 0.5})
    loss, parts = game.loss(batch())
    assert parts["adversarial_weight"] == 0 and loss == parts["reconstruction"]  # nothing was measured yet
    game.objective.settle()
    wanted = balance(by_hand(game, batch()))
    assert game.objective.carried["adaptive_weight"].item() == pytest.approx(wanted.item(), rel=1e-6)
    loss, parts = game.loss(batch(seed=1))
    assert parts["adversarial_weight"].item() == pytest.approx(0.5 * wanted.item(), rel=1e-6)
    assert loss.item() == pytest.approx(
        (parts["reconstruction"] + 0.5 * wanted * parts["adversarial"]).item(), rel=1e-5
    )


def test_lambda_is_the_same_in_micro_batches_and_over_ranks() -> None:
    whole = Game(kl_weight=0.0, adversary={"discriminator": SMALL})
    whole.loss(batch(4))
    whole.objective.settle()
    parts = Game(kl_weight=0.0, adversary={"discriminator": SMALL})
    for half in (slice(0, 2), slice(2, 4)):
        parts.loss({name: part[half] for name, part in batch(4).items()})
    parts.objective.settle()
    lambdas = [game.objective.carried["adaptive_weight"].item() for game in (whole, parts)]
    assert lambdas[1] == pytest.approx(lambdas[0], rel=1e-5)

    ranks = [Game(kl_weight=0.0, adversary={"discriminator": SMALL}) for _ in range(2)]
    gradients = [by_hand(ranks[0], {n: p[half] for n, p in batch(4).items()}) for half in (slice(0, 2), slice(2, 4))]
    ranks[0].objective.mean_over_ranks = lambda mine: (mine + gradients[1]) / 2
    ranks[0].loss({name: part[:2] for name, part in batch(4).items()})
    ranks[0].objective.settle()
    assert ranks[0].objective.carried["adaptive_weight"].item() == pytest.approx(lambdas[0], rel=1e-5)


def test_before_the_game_starts_there_is_none() -> None:
    """Measured in the step before it, so that it begins with a λ; a first step of all has none."""
    game = Game(kl_weight=0.0, adversary={"discriminator": SMALL, "start_step": 3})
    seen: list[bool] = []
    for step in range(5):
        loss, parts = game.loss(batch(seed=step), step)
        game.objective.settle()
        seen.append(game.objective.plays(step))
        assert ("adversarial" in parts) == (step >= 2)
        assert (loss.item() == parts["reconstruction"].item()) == (step < 3)
    assert seen == [False, False, False, True, True]


def test_what_is_not_finite_is_not_handed_on() -> None:
    game = Game(reconstruction="gaussian", adversary={"discriminator": SMALL})
    game.loss(batch())
    game.objective.settle()
    before = {name: value.item() for name, value in game.objective.carried.items()}
    game.objective.mean_over_ranks = lambda mine: mine * torch.nan
    game.loss(batch())
    game.objective.settle()
    assert {name: value.item() for name, value in game.objective.carried.items()} == before
    assert before["adaptive_weight"] > 0


def test_classes_are_told_to_a_discriminator_that_asks() -> None:
    game = Game(num_classes=3, adversary={**GAME, "class_conditional": True})
    labels = {"class_label": torch.tensor([0, 2])}
    given = batch() | labels
    loss, _ = game.loss(given)
    other = game.loss(batch() | {"class_label": torch.tensor([1, 2])})[0]
    assert game.discriminator is not None and loss != other
    game.objective.discriminator_loss(game.discriminator, given)[0].backward()
    embedding = game.discriminator.class_embedding
    assert embedding is not None and embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum(dim=1).gt(0).tolist() == [True, False, True]


def test_parts_that_don_t_fit_the_config_are_refused() -> None:
    vae = build(TINY)
    with pytest.raises(ValueError, match="discriminator: none came, against the config"):
        Objective(VaeTrainConfig.model_validate({"adversary": GAME}), vae)
    with pytest.raises(ValueError, match="perceptual distance: one came, against the config"):
        Objective(VaeTrainConfig(), vae, perceptual=Eyes().distance)
    with pytest.raises(ValueError, match="discriminator: one came"):
        Objective(VaeTrainConfig(), vae, discriminator=build_discriminator(DiscriminatorConfig(), 3, 0))
