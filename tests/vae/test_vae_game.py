"""The game against its theory: its optima and values, R1 in closed form, the balance, and each alarm provoked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Normal

from pipeline.metrics.manifold import density_coverage
from vae.config import DiscriminatorConfig, VaeModelConfig
from vae.discriminator import PatchDiscriminator, build_discriminator
from vae.game import (
    Game,
    adversarial_weight,
    balance,
    collapsed_coverage,
    collapsed_posterior,
    discriminator_loss,
    discriminator_losses,
    game_figures,
    generator_loss,
    judge,
    judge_both,
    last_layer_gradients,
    r1_penalty,
    saturated_discriminator,
)
from vae.losses import kl_of_elements, kl_per_channel, reconstruction_loss
from vae.model import build
from vae.steps import AutoencoderOutput, AutoencoderStep

TINY = VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4)
SMALL = DiscriminatorConfig(base_channels=8, num_downsamplings=1)


def autoencoder_loss(output: AutoencoderOutput, x: Tensor, kl_weight: float = 1e-3) -> Tensor:
    return reconstruction_loss(output.x_hat, x, "l2").mean() + kl_weight * kl_of_elements(output.moments).mean()


every_game = pytest.mark.parametrize("game", ["minimax", "hinge"])

# Two pairs of laws on a line, by their densities on a grid.
GRID = torch.linspace(-9, 9, 1801, dtype=torch.float64)
DX = float(GRID[1] - GRID[0])


def normal(mean: float, std: float) -> Tensor:
    return Normal(mean, std, validate_args=False).log_prob(GRID).exp()


LAWS = {
    "two Gaussians": (normal(-0.83, 1.0), normal(1.1, 0.7)),
    "a mixture": (0.3 * normal(-2.0, 0.5) + 0.7 * normal(1.0, 1.2), normal(0.21, 1.0)),
}


def kl(p: Tensor, q: Tensor) -> float:
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum() * DX)


def best_logits(p: Tensor, q: Tensor, game: Game) -> tuple[Tensor, float]:
    """The logits of D at every point of the grid, found by descent on the game's own losses, and V there."""
    logits = torch.zeros(len(GRID), 1, 1, 1, dtype=torch.float64, requires_grad=True)
    num_steps = 1500
    # Without memory and eps Adam goes by the gradient's sign alone, so as far in the tails as where the mass is.
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.0, 0.0), eps=1e-300)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1e-5 ** (i / num_steps))

    def loss() -> Tensor:
        of_real, of_fake = discriminator_losses(logits, logits, game)
        return ((p * of_real + q * of_fake) * DX).sum()

    for _ in range(num_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return logits.detach().flatten(), -loss().item()


@pytest.mark.parametrize("laws", LAWS)
def test_minimax_finds_the_ratio_of_the_laws_and_their_divergence(laws: str) -> None:
    """D* = p/(p + q), V = 2 JS(p, q) - log 4: Goodfellow et al. 2014, proposition 1 and theorem 1."""
    p, q = LAWS[laws]
    logits, value = best_logits(p, q, "minimax")
    there = (p + q) / 2 > 0.01
    error = (logits.sigmoid() - p / (p + q))[there].abs().max().item()
    middle = (p + q) / 2
    twice_js = kl(p, middle) + kl(q, middle)
    print(f"minimax, {laws}: sup error {error:.1e}, value {value:.6f} - {twice_js - math.log(4):.6f}")
    assert error <= 1e-4
    assert value == pytest.approx(twice_js - math.log(4), abs=1e-5)


@pytest.mark.parametrize("laws", LAWS)
def test_hinge_finds_the_sign_and_the_overlap(laws: str) -> None:
    """D* = sign(p - q), V = -2 ∫ min(p, q) = -2 (1 - TV): Lim & Ye 2017."""
    p, q = LAWS[laws]
    logits, value = best_logits(p, q, "hinge")
    there = (p + q) / 2 > 0.01
    error = (logits - (p - q).sign())[there].abs().max().item()
    overlap = float(torch.minimum(p, q).sum() * DX)
    print(f"hinge, {laws}: sup error {error:.1e}, value {value:.6f} - {-2 * overlap:.6f}")
    assert error <= 1e-4
    assert value == pytest.approx(-2 * overlap, abs=1e-5)


@pytest.mark.parametrize(("game", "value"), [("minimax", -math.log(4)), ("hinge", -2.0)])
def test_nothing_is_won_where_the_laws_are_one(game: Game, value: float) -> None:
    p = normal(0.3, 1.1)
    logits, found = best_logits(p, p, game)
    assert found == pytest.approx(value, abs=1e-6)  # the grid's ends
    if game == "minimax":
        assert (logits.sigmoid() == 0.5).all()
    else:
        assert (logits.abs() <= 1).all()  # all of which are as good


@every_game
def test_the_loss_is_the_mean_over_patches_and_images(game: Game) -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 5, 1, 3, 2, generator=generator).unbind()
    of_real, of_fake = discriminator_losses(real, fake, game)
    assert of_real.shape == of_fake.shape == (5,)
    wanted = 0.0
    for logit, sign in [(a, 1) for a in real.flatten().tolist()] + [(a, -1) for a in fake.flatten().tolist()]:
        wanted += {"minimax": -math.log(1 / (1 + math.exp(-sign * logit))), "hinge": max(0.0, 1 - sign * logit)}[game]
    assert discriminator_loss(real, fake, game).item() == pytest.approx(wanted / 30, rel=1e-6)
    assert (of_real.mean() + of_fake.mean()).item() == pytest.approx(wanted / 30, rel=1e-6)


@every_game
def test_losses_are_float32_and_finite_where_logits_are_large(game: Game) -> None:
    logits = torch.tensor([-3e4, -100.0, 0.0, 100.0, 3e4]).view(5, 1, 1, 1)
    for given in (logits, logits.bfloat16(), logits.half()):
        losses = [*discriminator_losses(given, given, game), generator_loss(given, game)]
        assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in losses)


@every_game
def test_the_decoder_raises_what_the_discriminator_lowers(game: Game) -> None:
    fake = torch.linspace(-6, 0.9, 20).view(20, 1, 1, 1).requires_grad_()
    (of_decoder,) = torch.autograd.grad(generator_loss(fake, game), fake)
    (of_discriminator,) = torch.autograd.grad(discriminator_losses(fake, fake, game)[1].mean(), fake)
    assert (of_decoder < 0).all()
    assert (of_discriminator[fake > -1] > 0).all()

    discriminator = build_discriminator(SMALL, 3, 0)
    x_hat = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = judge(discriminator, x_hat)
    (gradient,) = torch.autograd.grad(generator_loss(logits, game), x_hat)
    assert judge(discriminator, x_hat - 0.1 * gradient).mean() > logits.mean()


def test_a_sure_discriminator_stops_the_minimax_decoder_and_not_this_one() -> None:
    """Goodfellow et al. 2014, section 3.  d/da log(1 - D) = -D → 0 where d/da (-log D) = -(1 - D) → -1."""
    fake = torch.tensor(-20.0, dtype=torch.float64).view(1, 1, 1, 1).requires_grad_()
    minimax = -discriminator_losses(fake, fake, "minimax")[1].mean()  # what D minimises, maximised
    (vanished,) = torch.autograd.grad(minimax, fake)
    (alive,) = torch.autograd.grad(generator_loss(fake, "minimax"), fake)
    assert vanished.item() == pytest.approx(-math.exp(-20), rel=1e-6)
    assert alive.item() == pytest.approx(-1, abs=1e-8)


def points(num_points: int, width: int) -> Tensor:
    """[B,width,1,1]."""
    return torch.randn(num_points, width, 1, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_r1_of_a_line_is_its_slope() -> None:
    """D(x) = ⟨w, x⟩ + b: ½ γ ‖w‖², whose gradient is γ w."""
    x, w = points(7, 5), torch.linspace(-1, 2, 5).requires_grad_()
    penalty = r1_penalty((x * w.view(1, 5, 1, 1)).sum(1, keepdim=True) + 3, x, 10.0)
    (gradient,) = torch.autograd.grad(penalty, w)
    assert penalty.item() == pytest.approx(5 * w.square().sum().item(), rel=1e-5)
    assert torch.allclose(gradient, 10 * w, rtol=1e-5)


def test_r1_of_a_parabola() -> None:
    """D(x) = ½ xᵀAx, S = (A + Aᵀ)/2: ½ γ E‖Sx‖², whose gradient in A is the symmetric part of γ S E[xxᵀ]."""
    x = points(50, 4)
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    flat = x.flatten(1)
    penalty = r1_penalty((0.5 * (flat @ a * flat).sum(1)).view(50, 1, 1, 1), x, 0.7)
    (gradient,) = torch.autograd.grad(penalty, a)
    s, v = ((a + a.T) / 2).detach().double(), flat.detach().double()
    slope = 0.7 * s @ v.T @ v / 50
    assert penalty.item() == pytest.approx(float(0.35 * (v @ s).square().sum(1).mean()), rel=1e-5)
    assert torch.allclose(gradient.double(), (slope + slope.T) / 2, rtol=1e-5, atol=1e-5)


def test_r1_of_patches_that_share_no_pixel_is_the_mean_of_theirs() -> None:
    conv = nn.Conv2d(3, 1, 4, stride=4)
    x = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = r1_penalty(conv(x).square(), x, 2.0)
    each: list[float] = []
    for i in range(3):
        for j in range(2):
            patch = x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].detach().requires_grad_()
            each.append(r1_penalty(conv(patch).square(), patch, 2.0).item())
    assert found.item() == pytest.approx(sum(each) / 6, rel=1e-5)


def test_r1_means_the_same_at_any_size() -> None:
    discriminator = build_discriminator(SMALL, 3, 0)
    found: list[float] = []
    for side in (64, 128, 256):
        x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found.append(r1_penalty(discriminator(x), x, 1.0).item())
    print("R1 at 64, 128, 256 px:", found)
    assert found == pytest.approx([found[-1]] * 3, rel=0.1)


def test_r1_teaches_the_discriminator() -> None:
    """Its gradient in the weights is that of differences, so the network can be differentiated twice."""
    discriminator = build_discriminator(SMALL, 3, 0, num_classes=3).double()
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    weights = list(discriminator.parameters())
    directions = [torch.randn(w.shape, generator=torch.Generator().manual_seed(2)).double() for w in weights]

    def penalty(distance: float) -> Tensor:
        moved = {
            name: weight + distance * direction
            for (name, weight), direction in zip(discriminator.named_parameters(), directions, strict=True)
        }
        return r1_penalty(torch.func.functional_call(discriminator, moved, (x, torch.tensor([0, 2]))), x, 1.0)

    gradients = torch.autograd.grad(penalty(0.0), weights, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert slope == pytest.approx(float((penalty(1e-6) - penalty(-1e-6)).detach()) / 2e-6, rel=1e-6)
    classes = gradients[[name for name, _ in discriminator.named_parameters()].index("class_embedding.weight")]
    assert classes is not None and classes.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 2]


def test_r1_wants_images_with_gradients() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="requires_grad_"):
        r1_penalty(build_discriminator(SMALL, 3, 0)(x), x, 1.0)


def players() -> tuple[AutoencoderStep, PatchDiscriminator]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderStep(build(TINY)), build_discriminator(SMALL, 3, 1)


def batch(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_images, 3, 8, 8, generator=generator) * 2 - 1
    return x, torch.randn(num_images, 4, 4, 4, generator=generator)


def last_layer(step: AutoencoderStep) -> Tensor:
    return step.autoencoder.decoder.conv_out.weight


@every_game
def test_with_the_adaptive_weight_both_losses_pull_alike(game: Game) -> None:
    step, discriminator = players()
    x, noise = batch(4)
    output = step(x, noise)
    loss = autoencoder_loss(output, x)
    adversarial = generator_loss(judge(discriminator, output.x_hat), game)
    weight = balance(last_layer_gradients(loss, adversarial, last_layer(step)), delta=0.0)
    (of_loss,) = torch.autograd.grad(loss, last_layer(step), retain_graph=True)
    (of_game,) = torch.autograd.grad(weight * adversarial, last_layer(step), retain_graph=True)
    print(f"{game}: weight {weight.item():.4f}, norms {of_loss.norm().item():.7f} and {of_game.norm().item():.7f}")
    assert of_game.norm().item() == pytest.approx(of_loss.norm().item(), rel=1e-5)
    assert not weight.requires_grad and weight.dtype == torch.float32 and weight.ndim == 0
    assert all(parameter.grad is None for parameter in step.parameters())
    (loss + weight * adversarial).backward()  # the graph is still there
    assert last_layer(step).grad is not None


def test_the_weight_is_bounded_and_zero_gradients_are_no_division() -> None:
    gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert balance(gradients).item() == 1e4  # 5 / δ, cut
    assert balance(gradients, largest=7.0).item() == 7.0
    assert balance(gradients, largest=1e9).item() == pytest.approx(5e6)
    assert balance(gradients.flip(0)).item() == 0.0
    assert balance(gradients * torch.nan).isnan()  # a broken loss stays one


def test_ranks_that_average_gradients_find_the_weight_of_the_whole_batch() -> None:
    """And ranks that average norms, or their squares, don't: ‖mean g‖ ≤ mean ‖g‖."""
    step, discriminator = players()
    step.double(), discriminator.double()
    x, noise = (part.double() for part in batch(6))

    def losses(share: slice) -> tuple[Tensor, Tensor]:
        output = step(x[share], noise[share])
        loss = autoencoder_loss(output, x[share])
        return loss, generator_loss(judge(discriminator, output.x_hat), "hinge")

    whole = balance(last_layer_gradients(*losses(slice(0, 6)), last_layer(step))).item()
    shares = [slice(0, 3), slice(3, 6)]
    of_ranks = torch.stack([last_layer_gradients(*losses(share), last_layer(step)) for share in shares])
    assert balance(of_ranks.mean(dim=0)).item() == pytest.approx(whole, rel=1e-10)
    norms = of_ranks.norm(dim=2)  # [ranks,2]
    of_norms, of_squares = norms.mean(0), norms.square().mean(0).sqrt()
    wrong = [(of_norms[0] / of_norms[1]).item(), (of_squares[0] / of_squares[1]).item()]
    print(f"whole batch {whole:.6f}, from mean norms {wrong[0]:.6f}, from mean squares {wrong[1]:.6f}")
    assert all(abs(weight / whole - 1) > 1e-3 for weight in wrong)


def test_the_game_starts_at_its_step() -> None:
    assert [adversarial_weight(step, weight=0.8, start_step=2) for step in range(4)] == [0, 0, 0.8, 0.8]
    assert adversarial_weight(0, weight=0.8, start_step=0) == 0.8


@every_game
def test_each_player_moves_itself_alone(game: Game) -> None:
    step, discriminator = players()
    x, noise = batch(4)
    x.requires_grad_()
    x_hat = step(x.detach(), noise).x_hat

    real, fake = judge_both(discriminator, x, x_hat)
    (discriminator_loss(real, fake, game) + r1_penalty(real, x, 1.0)).backward()
    assert all(weight.grad is None for weight in step.parameters())
    for name, weight in discriminator.named_parameters():
        # The last bias moves real and fake alike, which changes no hinge inside the margins.
        if not (game == "hinge" and name == "conv_out.bias"):
            assert weight.grad is not None and weight.grad.abs().max() > 0, name

    discriminator.zero_grad(set_to_none=True)
    generator_loss(judge(discriminator, x_hat), game).backward()
    assert all(weight.grad is None and weight.requires_grad for weight in discriminator.parameters())
    for name, weight in step.named_parameters():
        # A key's bias moves all scores of a softmax row alike: its gradient is zero by theory.
        if not name.endswith("to_k.bias"):
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_both_are_judged_as_one_by_one() -> None:
    discriminator = build_discriminator(SMALL, 3, 0, num_classes=3)
    x, x_hat, classes = batch(2)[0], batch(2, seed=1)[0], torch.tensor([2, 0])
    real, fake = judge_both(discriminator, x, x_hat, classes)
    assert torch.allclose(real, discriminator(x, classes), atol=1e-6)
    assert torch.allclose(fake, discriminator(x_hat, classes), atol=1e-6)
    assert torch.equal(judge(discriminator, x_hat, classes), discriminator(x_hat, classes))
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 8\] came, \[2, 3, 8, 8\] is wanted"):
        judge_both(discriminator, x, x_hat[:1], classes)


def test_figures_are_counts() -> None:
    real = torch.tensor([[-0.5, 0.5], [1.5, 1.0]]).view(2, 1, 1, 2).requires_grad_()
    fake = torch.tensor([[-0.5, 0.5], [-1.5, -3.0]]).view(2, 1, 1, 2)
    found = game_figures(real, fake)
    assert {name: figure.item() for name, figure in found.items()} == {
        "accuracy_real": 0.75,
        "accuracy_fake": 0.75,
        "saturation": 0.5,
    }
    assert all(figure.dtype == torch.float32 and not figure.requires_grad for figure in found.values())
    undecided = torch.zeros(1, 1, 2, 2)
    assert all(figure == 0 for figure in game_figures(undecided, undecided).values())


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """[320,3,16,16] in [-1,1]."""
    pixels = [Image.fromarray((digit.reshape(8, 8) / 16 * 255).astype(np.uint8)) for digit in load_digits().data[:320]]
    large = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in pixels])
    return (torch.from_numpy(large).float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def play(x: Tensor, *, num_steps: int, decoder_learns: bool, gamma: float) -> list[dict[str, float]]:
    """A whole game on digits, with every part of `vae.game`; the figures of each step."""
    step, discriminator = players()
    optimizers = [
        torch.optim.Adam(step.parameters(), lr=2e-3 if decoder_learns else 0.0, betas=(0.5, 0.9)),
        torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
    ]
    figures: list[dict[str, float]] = []
    for i in range(num_steps):
        part = x[(i * 16) % len(x) :][:16].clone().requires_grad_()
        noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        output = step(part.detach(), noise)
        loss = autoencoder_loss(output, part.detach())
        adversarial = generator_loss(judge(discriminator, output.x_hat), "hinge")
        weight = adversarial_weight(i, weight=0.5, start_step=10)
        weight *= balance(last_layer_gradients(loss, adversarial, last_layer(step)))
        optimizers[0].zero_grad()
        (loss + weight * adversarial).backward()
        optimizers[0].step()

        real, fake = judge_both(discriminator, part, output.x_hat)
        optimizers[1].zero_grad()
        (discriminator_loss(real, fake, "hinge") + r1_penalty(real, part, gamma)).backward()
        optimizers[1].step()
        figures.append({name: figure.item() for name, figure in game_figures(real, fake).items()})
    return figures


def test_an_alarm_where_the_discriminator_is_saturated(digits: Tensor) -> None:
    """Provoked by a decoder that stands still; gone where it learns, or where R1 holds D back, as the alarm says."""
    lost = play(digits, num_steps=50, decoder_learns=False, gamma=0.0)
    fair = play(digits, num_steps=50, decoder_learns=True, gamma=0.0)
    held = play(digits, num_steps=50, decoder_learns=False, gamma=10.0)
    print("saturated", lost[-1], "healthy", fair[-1], "with R1", held[-1])
    alarm, *none = (saturated_discriminator([row["saturation"] for row in rows[-10:]]) for rows in (lost, fair, held))
    assert alarm is not None and "\n" not in alarm and "raise the weight of the R1 penalty" in alarm
    assert none == [None, None]
    assert lost[-1]["accuracy_real"] == lost[-1]["accuracy_fake"] == 1


def ring(num_points: int, generator: torch.Generator) -> Tensor:
    """Eight narrow Gaussians on a circle, [B,2]."""
    angle = torch.randint(8, (num_points,), generator=generator) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(num_points, 2, generator=generator)


class Points(nn.Module):
    """A judge of points on a plane, with the arguments and shapes of a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(2, 1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        assert classes is None
        return self.layers(x.flatten(1)).view(-1, 1, 1, 1)


def mlp(num_in: int, num_out: int) -> nn.Sequential:
    first, second, last = nn.Linear(num_in, 64), nn.Linear(64, 64), nn.Linear(64, num_out)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)


def coverages(*, num_steps: int, discriminator_stops_at: int) -> list[float]:
    """Coverage of the ring after each tenth of a game."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        maker, discriminator = mlp(2, 2), Points()
    makes = torch.optim.Adam(maker.parameters(), lr=3e-3, betas=(0.0, 0.99))
    judges = torch.optim.Adam(discriminator.parameters(), lr=5e-3, betas=(0.0, 0.99))
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for i in range(num_steps):
        x = ring(128, generator)[..., None, None].requires_grad_()  # [B,2,1,1]
        x_hat = maker(torch.randn(128, 2, generator=generator))[..., None, None]
        if i < discriminator_stops_at:
            real, fake = judge_both(discriminator, x, x_hat)
            judges.zero_grad()
            (discriminator_loss(real, fake, "minimax") + r1_penalty(real, x, 0.01)).backward()
            judges.step()
        makes.zero_grad()
        generator_loss(judge(discriminator, x_hat), "minimax").backward()
        makes.step()
        if (i + 1) % (num_steps // 10) == 0:
            with torch.no_grad():
                made = maker(torch.randn(500, 2, generator=generator))
            _, coverage = density_coverage(ring(500, generator).numpy(), made.numpy())
            found.append(coverage)
    return found


def test_an_alarm_where_the_decoder_covers_little() -> None:
    """Provoked by a D that stops: then the best answer is the one point that it likes best (Goodfellow, section 6)."""
    healthy = coverages(num_steps=1000, discriminator_stops_at=1000)
    collapsed = coverages(num_steps=1500, discriminator_stops_at=100)
    print("coverage", healthy, collapsed)
    assert collapsed_coverage(healthy[-3:]) is None
    alarm = collapsed_coverage(collapsed[-3:])
    assert alarm is not None and "\n" not in alarm and "go back to a checkpoint" in alarm


def kl_of_training(x: Tensor, kl_weight: float) -> list[list[float]]:
    """The KL of each channel, in nats per element, after each step."""
    step, _ = players()
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    rows: list[list[float]] = []
    for i in range(30):
        part = x[(i * 16) % len(x) :][:16]
        noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        output = step(part, noise)
        optimizer.zero_grad()
        autoencoder_loss(output, part, kl_weight).backward()
        optimizer.step()
        rows.append(kl_per_channel(output.moments).tolist())
    return rows


def test_an_alarm_where_channels_are_the_prior(digits: Tensor) -> None:
    """Provoked by a KL that outweighs the pixels."""
    healthy, collapsed = kl_of_training(digits, 1e-3), kl_of_training(digits, 3.0)
    print("nats per element", healthy[-1], collapsed[-1])
    assert collapsed_posterior(healthy[-5:]) is None
    alarm = collapsed_posterior(collapsed[-5:])
    assert alarm is not None and "\n" not in alarm
    assert "channels [0, 1, 2, 3] of 4" in alarm and "lower kl_weight" in alarm


@pytest.mark.parametrize(
    ("alarm", "bad", "good"),
    [
        (saturated_discriminator, [0.97, 0.99], [0.97, 0.95]),
        (collapsed_coverage, [0.1, 0.49], [0.1, 0.5]),
        (collapsed_posterior, [[0.1, 0.001], [0.1, 0.009]], [[0.1, 0.001], [0.001, 0.1]]),
    ],
)
def test_an_alarm_wants_the_whole_window(
    alarm: Callable[[list[object]], str | None], bad: list[object], good: list[object]
) -> None:
    assert alarm(bad) is not None
    assert alarm(good) is None
    assert alarm([]) is None


def test_figures_that_are_none_are_refused() -> None:
    for alarm in (saturated_discriminator, collapsed_coverage):
        for wrong in (math.nan, -0.1, 1.1):
            with pytest.raises(ValueError, match=r"shares in \[0,1\] are wanted"):
                alarm([0.5, wrong])
    for rows in ([[0.1], [0.1, 0.2]], [[0.1, math.nan]]):
        with pytest.raises(ValueError, match="rows of one length"):
            collapsed_posterior(rows)
