"""Turn a checkpoint into a diffusers folder, RUN/export: averaged U-Net, VAE, text encoder, scheduler, model card.

Text models become stock pipelines, which need no code of ours; models of classes carry their own pipeline.py.  The
folder is loaded back in diffusers and sampled; only when its pixels are those of the trainer's own sampler does it
take its name.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from pipeline import files, program, sampler
from pipeline.average import checkpoint_pipeline, find_average, open_vae
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.errors import RunError, UsageError
from pipeline.metrics.pictures import labelled_grid
from pipeline.model_card import SAMPLES, model_card
from pipeline.run_folder import check_same
from pipeline.sampler import PASSPORT, Asked
from pipeline.text import write_tokenizer
from vae.model import weights_sha256

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARD_ROWS, CARD_COLUMNS = 5, 4  # of the card's picture: classes or captions, images of each
FEW_STEPS = 10  # of the images that are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("export", __doc__ or "")
    made.add_argument(
        "--ema",
        metavar="NAME",
        help="which average: one of the checkpoint's (decay-0.9999, power-0.05) or one that the verb ema made "
        "(power-0.13-step-000020000); default: the config's first",
    )
    made.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights written (default fp32)")
    made.add_argument("--license", default="other", metavar="ID", help="the model card's, as the hub spells it")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default RUN/export, where sample and evaluate look")
    return program.run_config(made, argv, export, None)


def export(config: Config, args: argparse.Namespace) -> None:
    """checkpoint → pipeline → folder → loaded back, sampled, compared → RUN/export."""
    run = Path(config.run_dir)
    average = find_average(config, args.ema, args.step)
    check_same(run, config, ("conditioning", "diffusion"))
    found = average.found
    vae = open_vae(config, found)
    passport = {
        "checkpoint": found.path.name,
        "manifest_sha256": files.sha256(found.path / "manifest.json"),
        "ema": average.name,
        "vae_sha256": weights_sha256(vae),  # decoder too: the same encoder's latents may get another one
        "dtype": args.dtype,
        "license": args.license,
    }
    out: Path = args.out or run / "export"
    if (out / PASSPORT).exists() and files.read_json(out / PASSPORT) == passport:
        program.say(f"{out} is {average} already")
        return
    if out.exists() and any(out.iterdir()) and not (out / PASSPORT).exists():
        raise UsageError(f"{out}: holds something else than an export; name another folder by --out")
    pipe = checkpoint_pipeline(config, average, vae)
    rows = sampler.rows_of(config, CARD_ROWS)
    whole = draw_few(pipe, rows, config)
    sampler.cast(pipe, DTYPES[args.dtype])
    with files.whole_folder(out) as aside:
        exported = published(pipe, config)
        exported.save_pretrained(aside, safe_serialization=True)  # with its code, where that is ours
        for number, words in enumerate(getattr(pipe, name) for name in ("tokenizer", "tokenizer_2")):
            if words is not None:
                write_tokenizer(words, aside / ("tokenizer_2" if number else "tokenizer"))
        sampler.cast(pipe, torch.float32)  # the weights are rounded; what is compared is computed alike
        moved = np.abs(draw_few(pipe, rows, config) - whole).max()
        compare(pipe, aside, rows, config)
        drawn = sampler.draw_rows(pipe, rows, CARD_COLUMNS, config)
        labelled_grid(drawn, scale=2 if config.data.image_size < 128 else 1).save(aside / SAMPLES, format="PNG")
        card = model_card(
            config,
            found.state,
            weights=f"average `{average.name}`, {args.dtype}",
            license_id=args.license,
            stock=exported is not pipe,
            prompt=rows[0][1].prompt,
        )
        files.write_text(aside / "README.md", card)
        files.write_json(aside / PASSPORT, passport)
    program.say(f"exported {average} to {out}; it was loaded back and draws the same pixels")
    if args.dtype != "fp32":
        program.say(f"weights in {args.dtype} move its pixels by {255 * moved:.2g} of 255 at most, of two images")


def published(pipe: ClassConditionalPipeline, config: Config) -> Any:
    """The pipeline as it is written: a stock one for text, where there is one; else ours, with its code.

    Stock pipelines know no learned variance, so that its channels are cut off; they guide away from the text encoder's
    own "", as in training.  Flow matching's schedulers don't work in them, nor do latents that are shifted.
    """
    shifted = bool(pipe.vae.config.get("shift_factor"))
    if config.conditioning.kind != "text" or config.diffusion.objective == "flow" or shifted:
        return pipe
    with sampler.quiet_imports():
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    parts: dict[str, Any] = {"vae": pipe.vae, "unet": without_variance(pipe.unet), "scheduler": pipe.scheduler}
    parts |= {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder")}
    if "steps_offset" in pipe.scheduler.config:  # or the stock pipeline sets it, with a warning; it has no part here
        pipe.scheduler.register_to_config(steps_offset=1)
    if len(pipe.text_encoders) == 2:
        parts |= {name: getattr(pipe, name) for name in ("tokenizer_2", "text_encoder_2")}
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)
    parts |= {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def without_variance(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net with the first C of its output channels: the prediction."""
    channels = int(unet.config["in_channels"])
    if unet.config["out_channels"] == channels:
        return unet
    weights = {
        name: weight[:channels] if name.startswith("conv_out.") else weight
        for name, weight in unet.state_dict().items()
    }
    cut = sampler.frozen_unet({**unet.config, "out_channels": channels}, weights, unet.device)
    torch.nn.Module.to(cut, unet.dtype)
    return cut


def draw_few(pipe: ClassConditionalPipeline, rows: Sequence[tuple[str, Asked]], config: Config) -> NDArray[np.float32]:
    """Two images [2,H,W,3] in 0..1, of the first row and the last."""
    drawn: Any = pipe(seeds=[1, 2], **few(pipe, rows, config))
    return drawn.images


def few(pipe: ClassConditionalPipeline, rows: Sequence[tuple[str, Asked]], config: Config) -> dict[str, Any]:
    """Arguments for two images, of the first row and the last, in few steps."""
    steps = min(FEW_STEPS, config.evaluation.num_inference_steps)
    asked = sampler.told_of(pipe, [rows[0][1], rows[-1][1]])
    return {**asked, "guidance_scale": 2.0, "num_inference_steps": steps, "output_type": "np"}


def compare(pipe: ClassConditionalPipeline, folder: Path, rows: Sequence[tuple[str, Asked]], config: Config) -> None:
    """Load the folder as a user does, and draw the same images with both.  Raises RunError where they differ."""
    loaded = sampler.open_folder(folder)
    sampler.cast(loaded, torch.float32)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)]
    theirs = loaded(generator=generators, **few(pipe, rows, config)).images
    difference = float(np.abs(draw_few(pipe, rows, config) - theirs).max())
    if not difference <= 1e-5:
        raise RunError(f"{folder}: loaded back, its pixels differ by {difference} from the trainer's sampler")


if __name__ == "__main__":
    program.end(main())
