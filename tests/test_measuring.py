"""An autoencoder is measured: each number against its formula, the same twice and over ranks, one line per mistake."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from image_sets import write_set
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.distributions import Normal
from world import World

from pipeline.config import Config
from pipeline.data.dataset import read_images
from pipeline.data.draws import Purpose, normal
from pipeline.data.images import to_unit
from pipeline.engine import Engine
from pipeline.errors import UsageError
from pipeline.measuring import columns_of, measure, reconstruction_scores, with_error
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.distances import frechet_distance
from pipeline.metrics.manifold import manifold
from pipeline.reconstruction import Autoencoder, Reconstructed
from vae.config import VaeModelConfig
from vae.metrics import psnr, reconstruct
from vae.model import build, load
from vae.moments import MomentStatistics, encode_moments

RESULTS = {"scores.json", "reconstructions.png", "interpolations.png"}


def small_vae(seed: int = 0, **words: Any) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = VaeModelConfig.model_validate({"block_out_channels": (4, 8), "norm_num_groups": 4, **words})
        return build(shape).requires_grad_(False).eval()


def noise_images(count: int, side: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def unit(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(to_unit(pixels))


def settings(world: World) -> dict[str, Any]:
    return yaml.safe_load(world.config.read_text())


def config_of(values: dict[str, Any]) -> Config:
    return Config.model_validate(values)


# The bound ----------------------------------------------------------------------------------------


def test_the_bounds_are_the_formulas() -> None:
    """ln w = ln p(x|z) + ln p(z) - ln q(z|x), written with torch's own normal densities."""
    vae, pixels = small_vae(), noise_images(3)
    measured = Autoencoder(vae, seed=5, batch_images=2)
    found = measured.bounds(pixels, math.log(0.3), num_images=3, num_draws=6)
    x = unit(pixels)
    with torch.no_grad():
        mean, logvar = encode_moments(vae, x).double().chunk(2, dim=1)
    posterior, prior = Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)
    ln_w: list[Tensor] = []
    likelihoods: list[Tensor] = []
    for k in range(6):
        noise = np.stack([normal(5, Purpose.EVIDENCE_POSTERIOR, i, (4, 4, 4), fine=k) for i in range(3)])
        z = mean + posterior.stddev * torch.from_numpy(noise)
        with torch.no_grad():
            x_hat = vae.decode(z.float()).sample.double()  # pyright: ignore
        likelihoods.append(Normal(x_hat, math.sqrt(0.3)).log_prob(x.double()).sum(dim=(1, 2, 3)))
        ln_w.append(likelihoods[-1] + (prior.log_prob(z) - posterior.log_prob(z)).sum(dim=(1, 2, 3)))
    kl = torch.distributions.kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(found.kl, kl.sum(dim=(1, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.elbo, torch.stack(likelihoods).mean(0) - found.kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.iwae, torch.stack(ln_w).logsumexp(0) - math.log(6), rtol=1e-5, atol=0)
    assert found.num_dims == 192


def test_many_draws_are_a_tighter_bound() -> None:
    measured = Autoencoder(small_vae(), seed=1, batch_images=8)
    found = measured.bounds(noise_images(16), 0.0, num_images=16, num_draws=32)
    assert float((found.iwae - found.elbo).mean()) > 0
    one = measured.bounds(noise_images(16), 0.0, num_images=16, num_draws=1)
    assert float(found.iwae.mean()) > float(one.iwae.mean())


def test_a_bound_is_a_function_of_seed_and_image() -> None:
    vae, pixels = small_vae(), noise_images(6)
    words = {"num_images": 6, "num_draws": 4}
    found = Autoencoder(vae, seed=5, batch_images=6).bounds(pixels, 0.0, **words)
    again = Autoencoder(vae, seed=5, batch_images=6).bounds(pixels, 0.0, **words)
    assert torch.equal(found.iwae, again.iwae) and torch.equal(found.elbo, again.elbo)
    apart = Autoencoder(vae, seed=5, batch_images=4).bounds(pixels, 0.0, **words)
    torch.testing.assert_close(apart.iwae, found.iwae, rtol=1e-6, atol=0)
    few = Autoencoder(vae, seed=5, batch_images=6).bounds(pixels, 0.0, num_images=2, num_draws=4)
    torch.testing.assert_close(few.iwae, found.iwae[[0, 3]], rtol=1e-6, atol=0)  # evenly spaced, and numbered as in all
    assert not torch.equal(Autoencoder(vae, seed=6, batch_images=6).bounds(pixels, 0.0, **words).iwae, found.iwae)


def test_bits_are_of_levels() -> None:
    """A density of ½ all over [-1,1] says nothing: of its 255 steps of 1/127.5 each costs log2 255 bits."""
    found = Autoencoder(small_vae(), seed=0, batch_images=2).bounds(noise_images(2), 0.0, num_images=2, num_draws=1)
    flat = torch.tensor([192 * math.log(0.5)], dtype=torch.float64)
    assert found.bits_per_dim(flat).item() == pytest.approx(math.log2(255))


@pytest.mark.parametrize("batch_images", [2, 5, 100])
def test_the_variance_is_the_mean_square_of_draws(batch_images: int) -> None:
    vae, pixels = small_vae(), noise_images(5)
    found = Autoencoder(vae, seed=5, batch_images=batch_images).fitted_log_variance(pixels)
    noise = np.stack([normal(5, Purpose.EVIDENCE_FIT, i, (4, 4, 4)) for i in range(5)])
    with torch.no_grad():
        mean, logvar = encode_moments(vae, unit(pixels)).chunk(2, dim=1)
        x_hat = vae.decode(mean + (0.5 * logvar).exp() * torch.from_numpy(noise)).sample  # pyright: ignore
    assert found == pytest.approx(float((x_hat - unit(pixels)).square().mean().log()), abs=1e-5)


# Reconstructions ----------------------------------------------------------------------------------


def test_reconstructions_are_measured_image_by_image() -> None:
    vae, pixels = small_vae(), noise_images(20)
    labels = np.arange(20) % 2
    classifier = ImageClassifier(0).fit(pixels, labels)

    def far(x_hat: Tensor, x: Tensor) -> Tensor:
        assert x_hat.abs().max() <= 1 and not torch.is_grad_enabled()
        return (x_hat - x).abs().amax(dim=(1, 2, 3))

    measured = Autoencoder(vae, seed=0, batch_images=7)
    found = measured.reconstruct_all(pixels, classifier, far)
    x_hat, x = reconstruct(vae, unit(pixels)), unit(pixels)
    torch.testing.assert_close(found.psnr_db, psnr(x_hat, x).double(), rtol=1e-5, atol=0)
    levels = 127.5 * (x_hat.clamp(-1, 1) - x).abs().mean(dim=(1, 2, 3)).double()
    torch.testing.assert_close(found.absolute_error_levels, levels, rtol=1e-5, atol=0)
    assert found.perceptual_distance is not None
    torch.testing.assert_close(found.perceptual_distance, far_of(x_hat, x), rtol=1e-5, atol=0)
    real, fake = classifier.features(pixels), classifier.features(measured.pixels_of(pixels))
    assert found.frechet_distance == pytest.approx(frechet_distance(real, fake), rel=1e-4)
    assert found.coverage == pytest.approx(manifold(real, fake).coverage)


def far_of(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat.clamp(-1, 1) - x).abs().amax(dim=(1, 2, 3)).double()


def test_what_was_not_asked_or_cannot_be_is_left_out() -> None:
    measured = Autoencoder(small_vae(), seed=0, batch_images=7)
    found = measured.reconstruct_all(noise_images(7), None, None)
    assert (found.perceptual_distance, found.frechet_distance, found.coverage) == (None, None, None)
    assert not {"frechet_distance", "coverage", "perceptual_distance"} & {
        name.removeprefix("reconstruction/") for name in reconstruction_scores(found, 8)
    }
    classifier = ImageClassifier(0).fit(noise_images(20), np.arange(20) % 2)
    few = measured.reconstruct_all(noise_images(5), classifier, None)
    assert (few.frechet_distance, few.coverage) == (None, None), "five have no five others"


def test_exact_images_have_no_part_in_the_mean_psnr() -> None:
    values = torch.tensor([30.0, math.inf, 32.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    scores = reconstruction_scores(Reconstructed(values, ones, ones, None, 0.5, 0.9), 32)
    assert scores["reconstruction/psnr_db"] == 31 and scores["reconstruction/psnr_db_standard_error"] == 1
    assert (scores["reconstruction/num_images"], scores["reconstruction/num_exact"]) == (3, 1)
    assert (scores["reconstruction/frechet_distance"], scores["reconstruction/coverage"]) == (0.5, 0.9)
    exact = Reconstructed(torch.full((3,), math.inf), ones, ones, None, None, None)
    assert "reconstruction/psnr_db" not in reconstruction_scores(exact, 32)


def test_a_mean_comes_with_its_error() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    scores = with_error("a", values)
    assert scores == pytest.approx({"a": 3, "a_standard_error": np.std([1, 2, 3, 6], ddof=1) / 2})
    assert with_error("a", values[:1]) == {"a": 1}
    with pytest.raises(UsageError, match=r"a is not finite for 1 of 2 images, first number 1"):
        with_error("a", torch.tensor([1.0, math.nan]))


def test_reconstructions_that_are_not_finite_are_refused() -> None:
    vae = small_vae()
    assert vae.decoder.conv_out.bias is not None
    vae.decoder.conv_out.bias[1] = math.nan
    with pytest.raises(UsageError, match=r"3 of 3 images in a batch hold a NaN or an infinity, first that of image 0"):
        Autoencoder(vae, seed=0, batch_images=3).reconstruct_all(noise_images(4), None, None)


@pytest.mark.parametrize(("side", "columns"), [(16, 12), (32, 12), (64, 9), (128, 9), (256, 4), (512, 3)])
def test_pictures_do_not_grow_too_wide(side: int, columns: int) -> None:
    assert columns_of(np.zeros((1, side, side, 3), np.uint8)) == columns


# The program --------------------------------------------------------------------------------------


def test_everything_is_measured_and_the_same_twice_and_over_ranks(world: World) -> None:
    words = (f"vae.run_dir={world.root}/vae", "--bound-images", "6", "--bound-draws", "3")
    values = settings(world)
    whole = Path(values["data"]["train_images"])
    out = world.root / "vae" / "measured"
    assert world.do("measure_vae", *words) == [0], world.said()
    said = world.said()
    assert "KL, nats" in said and "PSNR, dB" in said and "Traceback" not in said
    assert {path.name for path in out.iterdir()} == RESULTS
    first = {name: (out / name).read_bytes() for name in RESULTS}
    assert world.do("measure_vae", *words) == [0], world.said()
    assert {name: (out / name).read_bytes() for name in RESULTS} == first

    scores = json.loads(first["scores.json"])
    vae, shown = load(values["vae"]["path"]), read_images(whole, size=16, limit=1000)
    x = unit(shown.pixels)
    with torch.no_grad():
        moments = encode_moments(vae, x)
    statistics = MomentStatistics(4)
    statistics.update(moments)
    assert scores["latent/scale"] == pytest.approx(statistics.latent_scale.scale, rel=1e-5)
    assert scores["latent/std"] == pytest.approx(statistics.channel_std, rel=1e-5)
    assert scores["latent/num_elements_per_channel"] == len(x) * 64
    assert sum(scores["latent/information_share"]) == pytest.approx(1)
    assert scores["images"] == "data.validation_images"
    limit = values["evaluation"]["max_reference_images"]
    held_out = unit(read_images(Path(values["data"]["validation_images"]), size=16, limit=limit).pixels)
    of_held_out = float(psnr(reconstruct(vae, held_out), held_out).mean())
    assert scores["reconstruction/psnr_db"] == pytest.approx(of_held_out, rel=1e-5)
    assert scores["reconstruction/num_images"] == len(held_out) and scores["reconstruction/ssim_window_pixels"] == 11
    assert 0 < scores["reconstruction/ssim"] < 1 and 0 <= scores["reconstruction/coverage"] <= 1
    assert scores["bound/num_images"] == 6 and scores["bound/num_draws"] == 3
    assert scores["bound/iwae_nats_per_image"] > scores["bound/elbo_nats_per_image"]
    assert scores["bound/iwae_bits_per_dim"] < scores["bound/elbo_bits_per_dim"]
    dims = 3 * 16 * 16 * math.log(2)
    bits = math.log2(127.5) - scores["bound/elbo_nats_per_image"] / dims
    assert scores["bound/elbo_bits_per_dim"] == pytest.approx(bits)
    for name in ("reconstructions.png", "interpolations.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300 and max(picture.size) < 1600

    assert world.do("measure_vae", *words, ranks=2) == [0, 0], world.said()
    over_ranks = json.loads((out / "scores.json").read_text())
    assert over_ranks.keys() == scores.keys()
    for name, value in over_ranks.items():
        assert value == (value if isinstance(value, str) else pytest.approx(scores[name], rel=1e-6, abs=1e-9)), name


def test_sets_without_labels_or_held_out_images_and_with_bad_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_set(tmp_path / "train", [["", "garbage", "", ""], ["", "", ""]])
    values = small_settings(tmp_path, train)
    scores = measure(
        Engine(config_of(values).engine),
        small_vae(),
        config_of(values),
        tmp_path / "out",
        bound_images=2,
        bound_draws=2,
    )
    said = capsys.readouterr().err
    assert "latents of data.train_images (rank 0): 1 of 7 samples can't be read and are left out" in said
    assert "data.validation_images: null came" in said
    assert scores["images"] == "data.train_images"
    assert scores["reconstruction/num_images"] == 6 and scores["latent/num_elements_per_channel"] == 6 * 16
    assert scores == json.loads((tmp_path / "out" / "scores.json").read_text())


def small_settings(root: Path, train: Path) -> dict[str, Any]:
    return {
        "run_dir": str(root / "run"),
        "data": {"train_images": str(train), "image_size": 8, "workers": 0},
        "vae": {"run_dir": str(root / "vae")},
        "conditioning": {"num_classes": 10},
        "train": {"steps": 1, "global_batch_images": 12},
        "engine": {"device": "cpu"},
        "evaluation": {"batch_images": 4},
    }


def test_two_sets_are_mixed_by_their_weights(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / name, shards) for name, shards in (("a", [[""] * 4]), ("b", [["", ""], [""] * 6]))]
    values = small_settings(tmp_path, sets[0])
    values["data"] |= {"train_images": [str(each) for each in sets], "weights": [3, 1]}
    vae = small_vae()
    config = config_of(values)
    scores = measure(Engine(config.engine), vae, config, tmp_path / "out", bound_images=2, bound_draws=2)
    first, second = (read_images(each, size=8, limit=100).pixels for each in sets)
    with torch.no_grad():
        moments = encode_moments(vae, unit(np.concatenate([first] * 6 + [second])))  # 24 and 8 images: 3 to 1
    statistics = MomentStatistics(4)
    statistics.update(moments)
    assert scores["latent/std"] == pytest.approx(statistics.channel_std, rel=1e-5)
    assert scores["latent/scale"] == pytest.approx(statistics.latent_scale.scale, rel=1e-5)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = small_settings(tmp_path, write_set(tmp_path / "train", [["", "", ""]]))
    engine = Engine(config_of(values).engine)

    def told(vae: AutoencoderKL, *, size: int = 8, **data: Any) -> str:
        changed = values | {"data": values["data"] | {"image_size": size} | data}
        with pytest.raises(UsageError) as caught:
            measure(engine, vae, config_of(changed), tmp_path / "out", bound_images=2, bound_draws=2)
        assert not (tmp_path / "out" / "scores.json").exists()
        return str(caught.value)

    assert told(small_vae(in_channels=1)).startswith("vae.path: an autoencoder with in_channels: 1 came, 3 was wanted")
    assert told(small_vae(), size=9) == "data.image_size: 9 came, a multiple of the VAE's factor 2 was wanted"
    assert told(small_vae(), size=2) == "data.image_size: 2 came, images of at least 3 pixels a side were wanted"
    missing = told(small_vae(), validation_images=str(tmp_path / "none"))
    assert missing.startswith("data.validation_images: ") and "no such folder" in missing
    broken = small_vae()
    broken.encoder.conv_in.weight[:] = math.nan
    assert "latent moments of 3 of 3 images are not finite" in told(broken)
    broken = small_vae()
    broken.decoder.conv_in.weight[:] = math.inf
    assert told(broken).startswith("vae.path: the reconstructions of 3 of 3 images in a batch hold a NaN")
    unread = write_set(tmp_path / "unread", [["garbage", "zero bytes"]])
    assert "none of its samples can be read" in told(small_vae(), train_images=str(unread))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("vae.path=/nowhere/at/all",), "error: vae.path: '/nowhere/at/all' came, and there is no such folder"),
        (("--bound-draws", "0"), "error: --bound-draws: 0 came, at least 1 was wanted"),
        (("--bound-images", "-3"), "error: --bound-images: -3 came, at least 0 was wanted"),
    ],
)
def test_a_mistake_is_told_in_one_line(world: World, words: tuple[str, ...], told: str) -> None:
    assert world.do("measure_vae", *words) == [2]
    assert [line for line in world.said().splitlines() if line.startswith("error")] == [
        line for line in world.said().splitlines() if line.startswith(told)
    ]
    assert told in world.said() and "Traceback" not in world.said()
