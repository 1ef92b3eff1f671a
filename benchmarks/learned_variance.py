"""Does a learned variance pay?  The bound of digits' latents with σ² learned, against fixed β and β̃, in pairs.

    python benchmarks/learned_variance.py [FOLDER] [--steps 1200] [--seeds 3] [--terms 200]

For each seed two models are trained for as many steps: one with a fixed variance, scored with σ² = β and with σ² = β̃,
one with a learned one.  All three are scored on the same z_0, ε and t, in chains of T and of 50 steps.  The figures are
the paired differences, averaged over the seeds and then over the images, beside the standard error of the latter mean.
FOLDER is kept, and gone on with.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from fresh_clone import figure

from pipeline import sampler
from pipeline.bounds import Costs
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.data.dataset import read_images
from pipeline.sampler import Asked

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "digits_class.yaml"


def verb(folder: Path, *words: str) -> None:
    """Run one of the program's verbs in the folder; end with its output where it fails."""
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=folder, capture_output=True, text=True)  # noqa: PLW1510
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")


def trained(folder: Path, seed: int, variance_type: str, steps: int) -> Config:
    """Train and export, where that isn't done yet; its config."""
    overrides = [
        f"run_dir=runs/{variance_type}-{seed}",
        f"seed={seed}",
        f"train.steps={steps}",
        f"diffusion.variance_type={variance_type}",
        f"evaluation.every_steps={steps}",
    ]
    verb(folder, "train", str(CONFIG), *overrides)
    verb(folder, "export", str(CONFIG), *overrides)
    return load_config(CONFIG, overrides)


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--terms", type=int, default=200, help="terms of the full chain for each image")
    args = parser.parse_args()
    folder: Path = args.folder or Path(tempfile.mkdtemp(prefix="learned-variance-"))
    folder.mkdir(parents=True, exist_ok=True)
    verb(folder, "prepare", "digits", "data/digits")
    verb(folder, "train-vae", str(CONFIG))
    verb(folder, "encode", str(CONFIG))

    differences: dict[tuple[str, int], list[np.ndarray]] = {}
    for seed in range(args.seeds):
        fixed, learned = (trained(folder, seed, kind, args.steps) for kind in ("fixed_large", "learned_range"))
        images, labels, _, _ = read_images(folder / "data/digits/validation", size=fixed.data.image_size, limit=10_000)
        asked = [Asked(label) for label in labels.tolist()]
        bits: dict[tuple[str, int], np.ndarray] = {}
        for config, kind in ((fixed, "fixed_large"), (fixed, "fixed_small"), (learned, "learned_range")):
            pipe = sampler.open_export(folder / config.run_dir / "export", "cpu")
            costs = Costs(pipe, config.diffusion.model_copy(update={"variance_type": kind}), 0, 360)
            of = costs.encode(images, range(len(images)))
            for chain in (config.diffusion.num_timesteps, 50):
                bits[kind, chain] = costs.bound(of, asked, chain, args.terms).total_bits.numpy()
        for kind in ("fixed_large", "fixed_small"):
            for chain in (fixed.diffusion.num_timesteps, 50):
                difference = bits["learned_range", chain] - bits[kind, chain]
                differences.setdefault((kind, chain), []).append(difference)
                name = f"seed {seed}, {chain} steps: learned against {kind}"
                figure(f"{name}, {bits[kind, chain].mean():.4f} bits/dim", float(difference.mean()), None, "bits/dim")
    for (kind, chain), found in differences.items():
        each = np.mean(found, axis=0)  # of an image, over the seeds: images are independent, seeds share them
        error = float(each.std(ddof=1)) / math.sqrt(len(each))
        name = f"{chain} steps: learned variance less {kind}"
        figure(name, float(each.mean()), None, "bits/dim")
        figure(f"{name}, over its standard error", float(each.mean()) / error, "<= -2", "standard errors")


if __name__ == "__main__":
    main()
