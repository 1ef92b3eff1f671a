"""Which latents diffuse best: plain ones, normalised ones, those of a regularised autoencoder?

    python benchmarks/latents.py [--seeds 3] [--steps 800] [--folder FOLDER]

The digits demo at equal budget.  For each seed two autoencoders are trained, with and without the equivariance
regulariser (vae.train.equivariance_share 0.5); of each, latents as they are (divided by their common standard
deviation, as always), and latents whose channels are normalised one by one.  On each a U-Net of `steps` steps, and
1,000 images of it without guidance against the training images, in the features of `evaluate`.  `scalar` takes away the
mean of all channels besides.  Lower distances are better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from fresh_clone import figure
from verbs import ROOT, run

CONFIG = ROOT / "configs" / "digits_class.yaml"
KINDS = {  # name → autoencoder it comes from, normalisation
    "plain": ("plain", "none"),
    "channel": ("plain", "channel"),
    "equivariant": ("equivariant", "none"),
    "equivariant, channel": ("equivariant", "channel"),
    "scalar": ("plain", "scalar"),
}
SHARES = {"plain": 0.0, "equivariant": 0.5}
MEASURES = {  # score of evaluate → its unit
    "frechet_distance": "of 64 features",
    "kernel_distance": "of 64 features",
    "class_accuracy": "share",
    "recall": "share",
    "coverage": "share",
}


def main() -> None:
    """Train and score every kind of every seed; then print the means."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=800, help="of each U-Net")
    made.add_argument("--folder", type=Path, help="where to work, and to go on (default: a temporary one)")
    args = made.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, "prepare", "digits", "data/digits")
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for seed in range(args.seeds):
            for kind, scores in found.items():
                scores.append(score(folder, kind, seed, args.steps))
                print(f"{kind}, seed {seed}: {scores[-1]}", file=sys.stderr, flush=True)
    for kind, scores in found.items():
        for measure, unit in {"psnr_db": "dB", **MEASURES}.items():
            values = [of_seed[measure] for of_seed in scores]
            spread = f", {args.seeds} seeds: {' '.join(f'{value:.4g}' for value in values)}"
            figure(
                f"digits, {kind} latents, {args.steps} steps: {measure}{spread}", statistics.mean(values), None, unit
            )


def score(folder: Path, kind: str, seed: int, steps: int) -> dict[str, float]:
    """What a U-Net draws of latents of this kind."""
    source, normalisation = KINDS[kind]
    vae, name = f"vae-{source}-{seed}", f"{kind.replace(', ', '-')}-{seed}"
    words = [str(CONFIG), f"seed={seed}", "evaluation.likelihood.num_images=0", "evaluation.likelihood.ode_images=0"]
    train_vae(folder, vae, [*words, f"vae.train.equivariance_share={SHARES[source]}"])
    if normalisation != "none":
        start = f"vae.train.start_from={vae}/autoencoder"
        vae = f"vae-{name}"
        train_vae(folder, vae, [*words, start, "vae.train.steps=0", f"vae.train.latent_normalisation={normalisation}"])
    words += [
        f"run_dir=run-{name}",
        f"vae.path={vae}/autoencoder",
        f"data.train_latents=latents-{name}",
        "data.validation_latents=null",
        f"train.steps={steps}",
        "evaluation.guidance_scales=[1]",
        "evaluation.every_steps=100000",
    ]
    if not (folder / f"run-{name}" / "scores.json").exists():
        for verb in ("encode", "train", "export", "evaluate"):
            run(folder, verb, *words)
    scores = json.loads((folder / f"run-{name}" / "scores.json").read_text())
    measured = json.loads((folder / vae / "measured" / "scores.json").read_text())
    found = {measure: scores[f"guidance_1/{measure}"] for measure in MEASURES}
    return found | {"psnr_db": measured["reconstruction/psnr_db"]}


def train_vae(folder: Path, name: str, words: list[str]) -> None:
    """Train or normalise an autoencoder, unless it is there."""
    if not (folder / name / "autoencoder").exists():
        run(folder, "train-vae", *words, f"vae.run_dir={name}")


if __name__ == "__main__":
    main()
