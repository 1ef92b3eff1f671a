"""The model card of an export: a README.md as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import Config
from pipeline.config_diffusion import DiffusionConfig
from pipeline.config_file import to_yaml, without_secrets
from pipeline.score_rows import first_network, flat_name

SAMPLES = "samples.png"  # beside it
SCORES = "## Scores"


def model_card(
    config: Config, state: dict[str, Any], *, weights: str, license_id: str, stock: bool, prompt: str | None
) -> str:
    """The README.md of an export: what it is, how to load it, what it was trained on and how.

    `state`: the checkpoint's; `weights`: which they are; `stock`: whether diffusers' own pipelines open it; `prompt`:
    to show how it is asked, where it reads captions.
    """
    origin = state["latents"]["origin"]
    condition, diffusion, images_seen = config.conditioning, config.diffusion, state["data"]["position"]
    names = [*(condition.class_names or map(str, range(condition.num_classes)))]
    start = state.get("started_from")
    began = f"`{start['source']}`, weights `{start['weights_sha256'][:16]}`" if start else "random weights"
    kinds = {"class": "class-conditional", "text": "text-to-image", "class_text": "class- and text-conditional"}
    said = f", {condition.num_classes} classes ({', '.join(names[:20])}{', …' if len(names) > 20 else ''})"
    guidance = f"guidance_scale={config.evaluation.guidance_scales[-1]:g}"
    call = {
        "class": f"pipe([{names[-1]!r}], seeds=0, {guidance})" if names else "",
        "text": f"pipe({prompt!r}, num_inference_steps={config.evaluation.num_inference_steps}, {guidance})",
        "class_text": f"pipe([{names[-1]!r}], {prompt!r}, seeds=0, {guidance})" if names else "",
    }[condition.kind]
    trust = "" if stock else ", trust_remote_code=True"
    code = (
        "A stock diffusers pipeline: it needs no code but diffusers' own."
        if stock
        else "`trust_remote_code=True` runs `pipeline.py` of this folder: diffusers has no pipeline of its own for it."
    )
    zero = (
        "\nIt was trained to start from pure noise (zero terminal SNR): keep the scheduler's trailing spacing, and "
        "with strong guidance try `guidance_rescale=0.7`.\n"
        if diffusion.zero_terminal_snr
        else ""
    )
    caption_row = f"| captions | {text_words(config)} |\n" if condition.text else ""
    return f"""---
library_name: diffusers
pipeline_tag: {"unconditional-image-generation" if condition.kind == "class" else "text-to-image"}
tags: [latent-diffusion, {kinds[condition.kind]}, {diffusion.objective}]
license: {license_id}
---

# {Path(config.run_dir).name}

A {kinds[condition.kind]} latent diffusion model: images of {config.data.image_size}×{config.data.image_size} pixels\
{said if names else ""}.

![samples]({SAMPLES})

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER"{trust})
{call}.images[0]
```

{code}
{zero}
## How it was trained

| | |
|---|---|
| data | image shards `{", ".join(config.data.train_images)}`, fingerprint `{origin["source_fingerprint"][:16]}` |
| autoencoder's encoder | `{origin["encoder_sha256"][:16]}`, latents scaled by {state["latents"]["scale"]:.6g} |
{caption_row}| started from | {began} |
| objective | {objective_words(diffusion)} |
| steps | {state["step"]:,} of {config.train.global_batch_images} images ({images_seen:,} images seen) |
| condition dropout | {condition.dropout:g} |
| weights | {weights} |

{SCORES}

Not evaluated yet.

## License

{license_id}: of weights and data, to be filled in by whoever publishes them.

<details><summary>The whole config</summary>

```yaml
{without_secrets(to_yaml(config))}```
</details>
"""


def note_scores(folder: Path, scores: Mapping[str, float | int | str]) -> None:
    """Write scores into the model card of an export, in the place of those that stand there."""
    if not (folder / "README.md").exists():
        return  # somebody took it away
    card = (folder / "README.md").read_text(encoding="utf-8")
    before, heading, after = card.partition(f"{SCORES}\n")
    if not heading:
        return  # somebody's own card
    drawn = sorted({name.split("/")[0] for name in scores if name.startswith("guidance_")})
    rows = [
        f"| {said} | {' | '.join(_number(scores.get(f'{where}/{name}')) for where in ('validation', *drawn))} |"
        for name, said in card_scores(first_network(scores)).items()
        if f"validation/{name}" in scores or any(f"{where}/{name}" in scores for where in drawn)
    ]
    titles = ["real, held out", *(where.replace("_", " ") for where in drawn)]
    table = "\n".join([f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|", *rows])
    vae = f"The autoencoder gives held-out images back at {_number(scores.get('vae/psnr_db'))} dB PSNR."
    rest = after.partition("\n## ")[2]
    files.write_text(folder / "README.md", f"{before}{heading}\n{table}\n\n{vae}\n\n## {rest}")


def card_scores(network: str) -> dict[str, str]:
    """Those of scores.json that a card shows, in words; `network`: whose features images are compared in."""
    drawn = {"num_images": "images", "num_inference_steps": "steps of the sampler"}
    of_network = {
        "fid": f"Fréchet distance to the training images, in features of `{network}`",
        "precision": "precision there",
        "recall_equal_n": "recall there, at as many images as are held out",
        "coverage_equal_n": "coverage there, at as many",
    }
    return {
        **drawn,
        "class_accuracy": "named right by a classifier of the training images",
        **{flat_name(network, name): said for name, said in of_network.items()},
        "clip_score": "CLIP score",
        "near_copy_share": "nearer to a training image than any held-out one is",
    }


def _number(value: float | int | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:,.4g}"


def text_words(config: Config) -> str:
    """Which text encoder read the captions, in a line of the model card."""
    text = config.conditioning.text
    assert text is not None
    learned = "which learned with the U-Net" if text.train else "frozen"
    return f"read by `{text.path}`, {learned}" if text.path else f"read by a text encoder from scratch, {learned}"


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
