"""The tests of mathematics and metrics would notice: each of these slips, made in a copy, makes one fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from world import FORKSERVER

ROOT = Path(__file__).resolve().parents[2]
DIFFUSION, METRICS = "tests/diffusion", "tests/metrics"


@dataclass(frozen=True)
class Slip:
    """A wrong line in place of the right one, and the tests that should notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


SLIPS = (
    # an index off by one
    Slip(
        "ᾱ before t is ᾱ at t",
        "pipeline/diffusion/schedule.py",
        "torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])\n        object",
        "alphas_cumprod.clone()\n        object",
        f"{DIFFUSION}/test_process.py",
    ),
    Slip(
        "t counted from 1",
        "pipeline/diffusion/densities.py",
        "return torch.searchsorted(edges, u, right=True)",
        "return torch.searchsorted(edges, u, right=True).add(1).clamp(max=num_timesteps - 1)",
        f"{DIFFUSION}/test_densities.py",
    ),
    Slip(
        "the Gaussian density one step late",
        "pipeline/diffusion/likelihood.py",
        "torch.where((t == 0)",
        "torch.where((t == 1)",
        f"{DIFFUSION}/test_likelihood.py {DIFFUSION}/test_bound.py",
    ),
    Slip(
        "a step lands beside its index",
        "pipeline/diffusion/sampling.py",
        "schedule.alphas_cumprod[t_prev] if t_prev >= 0",
        "schedule.alphas_cumprod[t_prev - 1] if t_prev >= 1",
        f"{DIFFUSION}/test_sampling.py",
    ),
    # a missing ½
    Slip(
        "KL without its ½",
        "pipeline/diffusion/likelihood.py",
        "return 0.5 * (ratio.expm1()",
        "return 1.0 * (ratio.expm1()",
        f"{DIFFUSION}/test_likelihood.py {DIFFUSION}/test_bound.py",
    ),
    Slip(
        "the ODE with the SDE's whole score",
        "pipeline/diffusion/sde.py",
        "return sde.drift(z, t) - 0.5 * sde.diffusion(t) ** 2 * score(z, t)",
        "return sde.drift(z, t) - sde.diffusion(t) ** 2 * score(z, t)",
        f"{DIFFUSION}/test_sde.py",
    ),
    Slip(
        "the drift without its ½",
        "pipeline/diffusion/sde.py",
        "return -0.5 * self.beta(self.within(t)) * z",
        "return -self.beta(self.within(t)) * z",
        f"{DIFFUSION}/test_sde.py",
    ),
    Slip(
        "the autoencoder's KL without its ½",
        "vae/losses.py",
        "return 0.5 * (mean.square()",
        "return 1.0 * (mean.square()",
        "tests/vae/test_vae_losses.py",
    ),
    # β and β̃ swapped
    Slip(
        "fixed_large is β̃",
        "pipeline/diffusion/process.py",
        'case "fixed_large":\n            return schedule.betas\n        case "fixed_small":',
        'case "fixed_small":\n            return schedule.betas\n        case "fixed_large":',
        f"{DIFFUSION}/test_process.py",
    ),
    Slip(
        "the posterior's variance is β",
        "pipeline/diffusion/process.py",
        "variance = (1 - abar_prev) / (1 - abar_t) * beta_t",
        "variance = beta_t",
        f"{DIFFUSION}/test_process.py",
    ),
    Slip(
        "a learned variance upside down",
        "pipeline/diffusion/process.py",
        "share * largest + (1 - share) * smallest",
        "share * smallest + (1 - share) * largest",
        f"{DIFFUSION}/test_process.py",
    ),
    Slip(
        "an ancestral step with the other variance",
        "pipeline/diffusion/sampling.py",
        "share * beta.log() + (1 - share) * smallest.log()",
        "share * smallest.log() + (1 - share) * beta.log()",
        f"{DIFFUSION}/test_sampling.py",
    ),
    # a wrong factor
    Slip(
        "λ L_vlb in other units",
        "pipeline/diffusion/objectives.py",
        "schedule.num_timesteps / 1000 * bits",
        "schedule.num_timesteps / 1000 * bits * math.log(2)",
        f"{DIFFUSION}/test_objectives.py",
    ),
    Slip(
        "the mean learns from the bound",
        "pipeline/diffusion/objectives.py",
        "p_mean(prediction.detach(),",
        "p_mean(prediction,",
        f"{DIFFUSION}/test_objectives.py",
    ),
    Slip(
        "the bound's weight without its ½",
        "pipeline/diffusion/weightings.py",
        "return (0.5 * schedule.num_timesteps",
        "return (1.0 * schedule.num_timesteps",
        f"{DIFFUSION}/test_weightings.py",
    ),
    Slip(
        "a density that is not divided by",
        "pipeline/diffusion/objectives.py",
        'object.__setattr__(self, "importance", importance.to',
        'object.__setattr__(self, "importance", torch.ones_like(importance).to',
        f"{DIFFUSION}/test_objectives.py",
    ),
    Slip(
        "λ taken for ln σ",
        "pipeline/diffusion/edm.py",
        "sigma.log() / 4",
        "sigma.log() / 2",
        f"{DIFFUSION}/test_edm.py",
    ),
    Slip(
        "the scale's Jacobian the other way",
        "vae/likelihood.py",
        "nll.double() - math.log(latent_scale.scale)",
        "nll.double() + math.log(latent_scale.scale)",
        "tests/vae/test_vae_likelihood.py",
    ),
    Slip(
        "a divergence with the wrong sign",
        "pipeline/diffusion/ode_likelihood.py",
        "variance - math.sqrt(variance) * divergence",
        "variance + math.sqrt(variance) * divergence",
        f"{DIFFUSION}/test_ode_likelihood.py",
    ),
    # ᾱ for √ᾱ
    Slip(
        "z_t with ᾱ z_0",
        "pipeline/diffusion/process.py",
        "return abar_t.sqrt(), (1 - abar_t).sqrt()",
        "return abar_t, (1 - abar_t).sqrt()",
        f"{DIFFUSION}/test_process.py",
    ),
    Slip(
        "the SDE's α without its root",
        "pipeline/diffusion/sde.py",
        "math.exp(-self.integrated_beta(self.within(t)) / 2)",
        "math.exp(-self.integrated_beta(self.within(t)))",
        f"{DIFFUSION}/test_sde.py",
    ),
    Slip(
        "DDIM towards ᾱ z_0",
        "pipeline/diffusion/sampling.py",
        "mean = abar_prev.sqrt() * z_0 + towards_z_t * eps",
        "mean = abar_prev * z_0 + towards_z_t * eps",
        f"{DIFFUSION}/test_sampling.py",
    ),
    # one stream for two draws
    Slip(
        "ε from the posterior's stream",
        "pipeline/data/pieces.py",
        "draws.normal(self.seed, Purpose.NOISE,",
        "draws.normal(self.seed, Purpose.POSTERIOR,",
        "tests/data/test_dataset.py::test_noise_of_an_epoch_is_never_that_of_another",
    ),
    Slip(
        "two purposes with one number",
        "pipeline/data/draws.py",
        "LIKELIHOOD_NOISE = 16",
        "LIKELIHOOD_NOISE = 14",
        "tests/data/test_draws.py",
    ),
    # a measure of something else
    Slip(
        "KID's kernel without its cube",
        "pipeline/metrics/distances.py",
        "return (x @ y.T / x.shape[1] + 1) ** 3",
        "return (x @ y.T / x.shape[1] + 1) ** 2",
        f"{METRICS}/test_distances.py",
    ),
    Slip(
        "KID's pairs of all, each with itself",
        "pipeline/metrics/distances.py",
        "return real / (n * (n - 1)) + fake / (m * (m - 1))",
        "return real / (n * n) + fake / (m * m)",
        f"{METRICS}/test_distances.py",
    ),
    Slip(
        "coverage by drawn images, not by real ones",
        "pipeline/metrics/manifold.py",
        "num_covered += int(inside.any(axis=1).sum())",
        "num_covered += int(inside.any(axis=0).sum())",
        f"{METRICS}/test_manifold.py",
    ),
    Slip(
        "near copies against the median held-out image",
        "pipeline/metrics/neighbours.py",
        "threshold = validation_levels.min()",
        "threshold = np.median(validation_levels)",
        f"{METRICS}/test_neighbours.py",
    ),
    Slip(
        "two models' resamples, not of the same images",
        "pipeline/metrics/paired.py",
        "row[:] = [a[name].of(counts) - b[name].of(counts)",
        "row[:] = [a[name].of(counts) - b[name].of(generator.permutation(counts))",
        f"{METRICS}/test_paired.py",
    ),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sources and tests, to be spoilt."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pipeline", "vae", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def run_tests(folder: str, tests: list[str], log: str) -> None:
    """In a process of its own: pytest over the copy, with torch and diffusers imported already."""
    for name in list(sys.modules):
        if name.partition(".")[0] in {"pipeline", "vae", "world"}:
            del sys.modules[name]
    sys.path[:] = [folder, f"{folder}/tests", *(place for place in sys.path if place not in {"", str(ROOT)})]
    sys.dont_write_bytecode = True
    os.chdir(folder)
    with Path(log).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *tests])
    os._exit(int(code))


def outcome(folder: Path, tests: str) -> tuple[int | None, str]:
    """pytest's exit code (0: all passed, 1: one failed) and what it said."""
    log = folder / "log.txt"
    process = FORKSERVER.Process(target=run_tests, args=(str(folder), tests.split(), str(log)))
    process.start()
    process.join(300)
    return process.exitcode, log.read_text()


@pytest.mark.parametrize("tests", sorted({slip.tests for slip in SLIPS}))
def test_without_a_slip_all_pass(copy: Path, tests: str) -> None:
    code, said = outcome(copy, tests)
    assert code == 0, said


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_a_slip_is_noticed(copy: Path, slip: Slip) -> None:
    file = copy / slip.file
    text = file.read_text()
    assert text.count(slip.right) == 1, "the line to spoil is not there, or more than once"
    file.write_text(text.replace(slip.right, slip.wrong))
    try:
        code, said = outcome(copy, slip.tests)
    finally:
        file.write_text(text)
    assert code == 1, f"no test failed, or none could be run:\n{said[-3000:]}"
    assert "FAILED" in said and "ImportError" not in said and "SyntaxError" not in said, said[-3000:]
