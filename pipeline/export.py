"""Turn a run's newest checkpoint into a diffusers folder, RUN/export: averaged U-Net, VAE, scheduler, model card.

The folder is loaded back in diffusers and sampled; only when its pixels are those of the trainer's own sampler does it
take its name.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar

from pipeline import checkpoint, files, program, sampler
from pipeline.checkpoint import BrokenError, Checkpoint, weights_stem
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config, DiffusionConfig
from pipeline.config_file import to_yaml
from pipeline.ema import profiles
from pipeline.errors import RunError, UsageError, blame
from pipeline.run_folder import check_same
from vae.model import load, weights_sha256
from vae.moments import LatentScale

PASSPORT = "training.json"  # in the export: which checkpoint it is


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("export", __doc__ or "")
    made.add_argument(
        "--ema",
        metavar="NAME",
        help="which average: one of the checkpoint's (decay-0.9999, power-0.05) or one that the verb ema made "
        "(power-0.13-step-000020000); default: the config's first",
    )
    return program.run_config(made, argv, export, None)


def export(config: Config, args: argparse.Namespace) -> None:
    """checkpoint → pipeline → folder → loaded back, sampled, compared → RUN/export."""
    run = Path(config.run_dir)
    average = find_average(config, args.ema)
    check_same(run, config, ("conditioning", "diffusion"))
    found = average.found
    passport = {
        "checkpoint": found.path.name,
        "manifest_sha256": files.sha256(found.path / "manifest.json"),
        "ema": average.name,
    }
    out = run / "export"
    if (out / PASSPORT).exists() and files.read_json(out / PASSPORT) == passport:
        program.say(f"{out} is {average} already")
        return
    pipe = checkpoint_pipeline(config, average)
    with files.whole_folder(out) as aside:
        write_export(pipe, aside, config, average, passport)
        compare(pipe, aside, config)
    program.say(f"exported {average} to {out}; it was loaded back and draws the same pixels")


@dataclass(frozen=True)
class Average:
    """Averaged weights: their name, where they lie, and the state that says what they were trained on."""

    name: str
    found: Checkpoint
    folder: str  # in `found`: with the U-Net's config.json and the weights

    def __str__(self) -> str:
        """For a person."""
        return self.name if self.found.path.name == self.name else f"{self.name} of {self.found.path.name}"


def find_average(config: Config, name: str | None = None) -> Average:
    """The average of this name: one of the newest whole checkpoint, or one that was reconstructed.

    None: the config's first.  Raises UsageError, naming what there is, where there is none; RunError for a
    reconstructed one that is broken.
    """
    run = Path(config.run_dir)
    made = run / "ema" / "reconstructed"
    if name is not None and (made / name / "manifest.json").is_file():
        try:
            return Average(name, checkpoint.verify(made / name), ".")
        except BrokenError as error:
            raise RunError(f"{error}; make it again: python -m pipeline ema with this config") from None
    found = newest_checkpoint(run)
    name = profiles(config.ema)[0].name if name is None else name
    if name not in found.profiles():
        known = [*found.profiles(), *sorted(path.name for path in made.glob("power-*"))]
        raise UsageError(f"--ema: {name!r} came; known: {', '.join(known)}")
    return Average(name, found, f"ema/{name}")


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run.  Raises UsageError where there is none."""
    found, wrong = checkpoint.newest(run / "checkpoints")
    for reason in wrong:
        program.say(f"warning: passing over a broken checkpoint: {reason}")
    if found is None:
        raise UsageError(f"{run / 'checkpoints'}: no whole checkpoint; train with this config first")
    return found


def checkpoint_pipeline(config: Config, average: Average) -> ClassConditionalPipeline:
    """The trainer's own sampler with averaged weights.  Raises UsageError for another VAE's latents."""
    found = average.found
    with blame("vae.path"):
        vae = load(config.vae.path)
    said = found.state["latents"]
    digest = weights_sha256(vae)
    if said["origin"]["vae_sha256"] != digest:
        raise UsageError(
            f"vae.path: the VAE {digest[:12]} came; {found.path} was trained on latents of the VAE "
            f"{said['origin']['vae_sha256'][:12]}"
        )
    weights = found.tensors(weights_stem(average.folder))
    unet_config = UNet2DConditionModel.load_config(found.path / average.folder)
    averaged = sampler.frozen_unet(unet_config, weights, torch.device("cpu"))
    scale = LatentScale(said["scale"], said["shift"])
    return sampler.assemble(averaged, vae, scale, config.diffusion, config.conditioning.class_names)


def write_export(
    pipe: ClassConditionalPipeline, folder: Path, config: Config, average: Average, passport: dict[str, Any]
) -> None:
    """Write the diffusers folder: models in safetensors, the pipeline's code, the model card, its passport."""
    pipe.save_pretrained(folder, safe_serialization=True)  # its code too
    files.write_text(folder / "README.md", model_card(config, average))
    files.write_json(folder / PASSPORT, passport)


def compare(pipe: ClassConditionalPipeline, folder: Path, config: Config) -> None:
    """Load the folder as a user does, and draw the same images with both.  Raises RunError where they differ."""
    disable_progress_bar()  # of loading three small files
    loaded: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    num_classes = config.conditioning.num_classes
    labels = [0, num_classes - 1]
    steps = min(10, config.evaluation.num_inference_steps)
    drawn = [
        p(labels, seeds=[1, 2], guidance_scale=2.0, num_inference_steps=steps, output_type="np").images
        for p in cast(tuple[Any, Any], (pipe, loaded))
    ]
    difference = float(np.abs(drawn[0] - drawn[1]).max())
    if not difference <= 1e-5:
        raise RunError(f"{folder}: loaded back, its pixels differ by {difference} from the trainer's sampler")


def model_card(config: Config, average: Average) -> str:
    """The README.md of an export: what it is, how to load it, what it was trained on and how."""
    found = average.found
    origin = found.state["latents"]["origin"]
    names = [*(config.conditioning.class_names or map(str, range(config.conditioning.num_classes)))]
    diffusion, images_seen = config.diffusion, found.state["data"]["position"]
    start = found.state.get("started_from")
    began = f"`{start['source']}`, weights `{start['weights_sha256'][:16]}`" if start else "random weights"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [latent-diffusion, class-conditional, ddpm]
license: other
---

# {Path(config.run_dir).name}

A class-conditional latent diffusion model: images of {config.data.image_size}×{config.data.image_size} pixels,
{config.conditioning.num_classes} classes ({", ".join(names[:20])}{", …" if len(names) > 20 else ""}).

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)
pipe([{names[-1]!r}], seeds=0, guidance_scale={config.evaluation.guidance_scales[-1]:g}).images[0]
```

`trust_remote_code=True` runs `pipeline.py` of this folder: diffusers has no class-conditional latent pipeline of
its own for this U-Net.

## How it was trained

| | |
|---|---|
| data | image shards `{", ".join(config.data.train_images)}`, fingerprint `{origin["source_fingerprint"][:16]}` |
| autoencoder | `{origin["vae_sha256"][:16]}`, latents scaled by {found.state["latents"]["scale"]:.6g} |
| started from | {began} |
| objective | {objective_words(diffusion)} |
| steps | {found.step:,} of {config.train.global_batch_images} images ({images_seen:,} images seen) |
| condition dropout | {config.conditioning.dropout:g} |
| weights | average `{average.name}` |

License of weights and data: to be filled in by whoever publishes them.

<details><summary>The whole config</summary>

```yaml
{to_yaml(config)}```
</details>
"""


def objective_words(diffusion: DiffusionConfig) -> str:
    """What the network learned to say, in a line of the model card."""
    match diffusion.objective:
        case "edm":
            return "EDM: a preconditioned denoiser (Karras et al. 2022)"
        case "flow":
            return "flow matching: the velocity ε - z_0 on straight lines"
        case "ddpm":
            words = f"{diffusion.prediction_type}, {diffusion.schedule} schedule, T = {diffusion.num_timesteps}"
            if diffusion.resolution_shift != 1:
                words += f", shifted by {diffusion.resolution_shift:g}"
            if diffusion.zero_terminal_snr:
                words += ", zero terminal SNR"
            if diffusion.weighting != "unweighted":
                words += f", weighting {diffusion.weighting}"
            return words + (", learned variance" if diffusion.variance_type == "learned_range" else "")


if __name__ == "__main__":
    program.end(main())
