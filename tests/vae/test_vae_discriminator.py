"""A logit is about its patch, its image's class and nothing else; the weights are a function of the seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vae.config import DiscriminatorConfig
from vae.discriminator import PatchDiscriminator, build_discriminator

SMALL = DiscriminatorConfig(base_channels=8)
CLASSES = 5


def images(num_images: int, side: int, channels: int = 3) -> Tensor:
    return torch.rand(num_images, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("side", "patches"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_logits_of_patches(side: int, patches: int) -> None:
    assert build_discriminator(SMALL, 3, 0)(images(2, side)).shape == (2, 1, patches, patches)


def test_images_need_not_be_square_nor_colour() -> None:
    found = build_discriminator(SMALL, 1, 0)(images(2, 64, channels=1)[..., :40])
    assert found.shape == (2, 1, 6, 3)


def test_the_shipped_size_is_that_of_the_paper() -> None:
    """C64-C128-C256-C512 and a logit: 4×4 convolutions, 70-pixel patches."""
    discriminator = build_discriminator(DiscriminatorConfig(), 3, 0)
    shapes = [tuple(module.weight.shape) for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    widths = [3, 64, 128, 256, 512, 1]
    assert shapes == [(after, before, 4, 4) for before, after in pairwise(widths)]
    assert discriminator.patch_size == 70


@pytest.mark.parametrize(
    ("num_downsamplings", "patch", "smallest"), [(1, 16, 6), (2, 34, 12), (3, 70, 24), (4, 142, 48)]
)
def test_a_logit_sees_its_patch_to_the_last_pixel(num_downsamplings: int, patch: int, smallest: int) -> None:
    """As the config's description says; whatever normalised over an image would reach beyond."""
    discriminator = build_discriminator(DiscriminatorConfig(base_channels=4, num_downsamplings=num_downsamplings), 3, 0)
    x = images(1, 2 * patch).requires_grad_()
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    seen = gradient.abs().sum(dim=(0, 1)) > 0
    rows, columns = (seen.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    assert len(rows) == len(columns) == patch == discriminator.patch_size
    assert rows[-1] - rows[0] == columns[-1] - columns[0] == patch - 1
    assert discriminator(images(1, smallest)).numel() == 1 and discriminator.smallest_side == smallest
    with pytest.raises(ValueError, match=f"sides of at least {smallest} are wanted"):
        discriminator(images(1, smallest - 1))


def test_nothing_normalises_and_no_image_sees_another() -> None:
    discriminator = build_discriminator(SMALL, 3, 0)
    kinds = {type(module) for module in discriminator.modules()}
    assert kinds == {PatchDiscriminator, nn.ModuleList, nn.Conv2d} and not list(discriminator.buffers())
    x = images(4, 32)
    alone = torch.cat([discriminator(one) for one in x.split(1)])
    assert torch.allclose(discriminator(x), alone, rtol=0, atol=1e-6)
    assert torch.equal(discriminator.eval()(x), discriminator.train()(x))


def test_a_function_of_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (build_discriminator(SMALL, 3, seed, num_classes=CLASSES) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    later = build_discriminator(SMALL, 3, 1, num_classes=CLASSES)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]) and torch.equal(weight, later.state_dict()[name])
        assert name.endswith("bias") or not torch.equal(weight, other.state_dict()[name])
    assert first.training and first.dtype == torch.float32


@pytest.mark.parametrize("side", [32, 256])
def test_at_first_it_knows_nothing_but_answers(side: int) -> None:
    """Logits of the size of pixels: neither so small that the decoder gets no gradient nor beyond the margin."""
    spread = [build_discriminator(DiscriminatorConfig(), 3, seed)(images(2, side)).std().item() for seed in range(3)]
    assert min(spread) > 0.1 and max(spread) < 1


def test_a_class_is_an_inner_product_and_nothing_else() -> None:
    discriminator = build_discriminator(SMALL, 3, 0, num_classes=CLASSES)
    x, first, second = images(3, 32), torch.tensor([0, 1, 2]), torch.tensor([4, 1, 3])
    features = discriminator.features(x)  # [3,D,3,3]
    assert discriminator.class_embedding is not None
    rows = discriminator.class_embedding.weight
    difference = rows[first] - rows[second]  # [3,D]
    wanted = torch.zeros(3, 2, 2)
    padded = nn.functional.pad(features, (1, 1, 1, 1))  # [3,D,5,5]
    for i in range(2):
        for j in range(2):
            window = padded[:, :, i : i + 4, j : j + 4].sum(dim=(2, 3)) / 16
            wanted[:, i, j] = (difference * window).sum(dim=1)
    found = discriminator(x, first) - discriminator(x, second)
    assert torch.allclose(found[:, 0], wanted, rtol=0, atol=1e-6)
    assert torch.equal(found[1], torch.zeros(1, 2, 2)) and found[0].abs().min() > 0

    nn.init.zeros_(rows)  # ψ alone is left, which is the network without classes
    plain = build_discriminator(SMALL, 3, 1)
    plain.load_state_dict({n: w for n, w in discriminator.state_dict().items() if not n.startswith("class")})
    assert torch.equal(discriminator(x, first), plain(x))


def test_only_the_classes_that_came_learn() -> None:
    discriminator = build_discriminator(SMALL, 3, 0, num_classes=CLASSES)
    discriminator(images(2, 32), torch.tensor([1, 3])).sum().backward()
    assert discriminator.class_embedding is not None
    gradient = discriminator.class_embedding.weight.grad
    assert gradient is not None and gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("num_classes", "x", "classes", "message"),
    [
        (None, images(2, 32), torch.tensor([0, 1]), "none are wanted"),
        (CLASSES, images(2, 32), None, "no classes came, one for each of 2"),
        (CLASSES, images(2, 32), torch.tensor([0]), r"classes \[1\] came, one for each of 2"),
        (None, images(2, 32, channels=1), None, r"\[2, 1, 32, 32\] came, \[B,3,H,W\]"),
        (None, images(2, 32)[0], None, "are wanted"),
    ],
)
def test_what_it_cannot_judge_is_refused(
    num_classes: int | None, x: Tensor, classes: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_discriminator(SMALL, 3, 0, num_classes=num_classes)(x, classes)


def test_saved_and_loaded_as_diffusers_does(tmp_path: Path) -> None:
    discriminator = build_discriminator(SMALL, 3, 0, num_classes=CLASSES)
    discriminator.save_pretrained(tmp_path)
    loaded = PatchDiscriminator.from_pretrained(tmp_path)
    x, classes = images(2, 32), torch.tensor([0, 4])
    assert isinstance(loaded, PatchDiscriminator) and torch.equal(loaded(x, classes), discriminator(x, classes))
