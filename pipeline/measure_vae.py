"""Measure an autoencoder on its images: latents channel by channel, reconstructions, the bound on ln p(x), pictures.

The one that vae.path names is measured, trained here or not.  Results are in vae.run_dir/measured: scores.json,
reconstructions.png and interpolations.png.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import measuring, program
from pipeline.autoencoder import open_eyes
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.measuring import measure, show
from vae.model import load


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("measure-vae", __doc__ or "")
    for option, default, told in (
        (
            "--bound-images",
            measuring.BOUND_IMAGES,
            "images that the bound is measured on, evenly spaced over the set; 0: none",
        ),
        ("--bound-draws", measuring.BOUND_DRAWS, "posterior draws of each, the K of IWAE"),
    ):
        made.add_argument(option, type=int, default=default, metavar="N", help=f"{told} (default: {default})")
    return program.run_config(made, argv, measure_vae, None)


def measure_vae(config: Config, args: argparse.Namespace) -> None:
    """config → engine → the frozen autoencoder → scores and pictures."""
    for option in ("bound_images", "bound_draws"):
        least = 0 if option == "bound_images" else 1
        if (came := getattr(args, option)) < least:
            raise UsageError(f"--{option.replace('_', '-')}: {came} came, at least {least} was wanted")
    engine = Engine(config.engine)
    with blame("vae.path"):
        vae = load(config.vae.path)
    eyes = open_eyes(config, engine)
    folder = Path(config.vae.run_dir) / "measured"
    scores = measure(
        engine,
        vae,
        config,
        folder,
        perceptual=eyes.distance if eyes else None,
        bound_images=args.bound_images,
        bound_draws=args.bound_draws,
    )
    if engine.is_main:
        show(scores, folder)


if __name__ == "__main__":
    program.end(main())
