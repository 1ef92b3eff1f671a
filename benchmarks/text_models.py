"""Text models from scratch, by the verbs themselves: do they draw what the captions say?

    python benchmarks/text_models.py [digits] [emoji] [--folder FOLDER] [--seed N] [--sheet FILE.png]

digits: configs/digits_text.yaml; 500 pictures for captions worded as no training caption is, named by the classifier of
    `evaluate`.
emoji: configs/emoji_text.yaml; the autoencoder learns all 1,280 training emoji, the text model (U-Net, text encoder,
    tokenizer, all from scratch) a seeded 64 of them by heart.  For each of the 64 captions one picture is drawn from
    the export, a stock StableDiffusionPipeline; of all 1,280 training images the nearest to it in pixels should be the
    one that the caption names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_clone import figure
from PIL import Image
from verbs import ROOT, run
from webdataset.writer import TarWriter

from pipeline.config_file import load_config
from pipeline.data import draws
from pipeline.data.dataset import read_images
from pipeline.data.draws import Purpose
from pipeline.data.images import to_unit
from pipeline.data.index import ShardSet, build_index
from pipeline.metrics.neighbours import nearest
from pipeline.sampler import Asked, draw, open_export
from vae.metrics import psnr, reconstruct
from vae.model import load

DIGITS, EMOJI = (ROOT / "configs" / f"{name}_text.yaml" for name in ("digits", "emoji"))
CHOSEN = 64


def choose(source: Path, out: Path, seed: int) -> list[int]:
    """Write a seeded 64 of a set's samples as a set of its own; their numbers in the whole one."""
    shards = ShardSet(source, open_shards=1)
    places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    numbers = sorted(draws.permutation(len(places), seed, Purpose.SHARD_ORDER, 0)[:CHOSEN].tolist())
    out.mkdir(parents=True, exist_ok=True)
    with (out / "000000.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for number in numbers:
            key, parts = shards.read(*places[number])
            writer.write({"__key__": key, **parts})
    build_index(out)
    return numbers


def sheet(path: Path, real: Any, drawn: Any) -> None:
    """Pairs of the real emoji and the drawn one, eight in a row."""
    pairs = np.concatenate([real, drawn], axis=2)  # [64,H,2W,3]
    padded = np.pad(pairs, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(padded[i : i + 8]), axis=1) for i in range(0, CHOSEN, 8)]
    grid = Image.fromarray(np.concatenate(rows))
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Walk the road, then count."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("what", nargs="*", default=["digits", "emoji"], help="digits, emoji (default: both)")
    made.add_argument("--folder", type=Path, help="where to work, and to go on (default: a temporary one)")
    made.add_argument("--seed", type=int, default=0, help="of the choice and of the training")
    made.add_argument("--sheet", type=Path, help="write the pictures beside the real ones there")
    args = made.parse_args()
    if unknown := set(args.what) - {"digits", "emoji"}:
        made.error(f"{', '.join(sorted(unknown))} came; digits and emoji are known")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if "digits" in args.what:
            digits(folder, args.seed)
        if "emoji" in args.what:
            emoji(folder, args.seed, args.sheet)


def digits(folder: Path, seed: int) -> None:
    """Print the figures of the digits."""
    run(folder, "prepare", "digits", "data/digits")
    minutes = [run(folder, verb, str(DIGITS), f"seed={seed}") for verb in ("train-vae", "encode", "train")]
    for verb in ("export", "evaluate"):
        run(folder, verb, str(DIGITS), f"seed={seed}")
    scores = json.loads((folder / "runs/digits_text/scores.json").read_text())
    for scale, bound in (("1", None), ("2", ">= 0.9")):
        name = f"{scores[f'guidance_{scale}/num_images']} pictures for held-out wordings at guidance {scale}"
        figure(f"digits: {name}: named right", scores[f"guidance_{scale}/class_accuracy"], bound, "share")
    for name in ("recall", "coverage"):
        value = scores[f"guidance_1/{name}_of_validation"]
        figure(f"digits: {name} at guidance 1, of the validation set's, at equal numbers", value, ">= 0.6", "ratio")
    figure("digits: training the text model", minutes[2], None, "CPU minutes")


def emoji(folder: Path, seed: int, picture: Path | None) -> None:
    """Print the figures of the emoji."""
    run(folder, "prepare", "emoji", "data/emoji", "--validation", "0.089")
    of_vae = run(folder, "train-vae", str(EMOJI), f"seed={seed}")
    numbers = choose(folder / "data/emoji/train", folder / "data/chosen", seed)
    words = [f"seed={seed}", "data.train_images=data/chosen", "data.train_latents=data/chosen_latents"]
    run(folder, "encode", str(EMOJI), *words)
    of_text = run(folder, "train", str(EMOJI), *words)
    run(folder, "export", str(EMOJI), *words)

    torch.set_num_threads(1)
    config = load_config(EMOJI)
    everything = read_images(folder / "data/emoji/train", size=config.data.image_size, limit=100_000)
    x = torch.from_numpy(to_unit(everything.pixels))
    vae = load(folder / "runs/emoji_vae/autoencoder")
    values = torch.cat([psnr(reconstruct(vae, part), part) for part in x.split(128)])
    assert everything.captions is not None
    captions = [everything.captions[number] for number in numbers]
    pipe = open_export(folder / "runs/emoji_text/export", "cpu")
    drawn = draw(
        pipe,
        [Asked(prompt=caption) for caption in captions],
        range(CHOSEN),
        seed=seed,
        guidance_scale=config.evaluation.guidance_scales[-1],
        num_inference_steps=config.evaluation.num_inference_steps,
        batch_images=CHOSEN,
    )
    found, _ = nearest(everything.pixels, drawn, 1)
    hits = found[:, 0] == np.array(numbers)
    for missed in np.flatnonzero(~hits):
        print(f"{captions[missed]}: nearest is {everything.captions[found[missed, 0]]}", file=sys.stderr)
    figure(
        "emoji: pictures whose nearest of all training images is the one that the caption names",
        float(hits.sum()),
        ">= 56",
        f"of {CHOSEN}",
    )
    figure("emoji: training images to choose from", len(everything.pixels), None, "images")
    figure("emoji: autoencoder, training images", float(values.mean()), ">= 30", "dB PSNR")
    figure("emoji: training the text model", of_text, "<= 20", "CPU minutes")
    figure("emoji: training the autoencoder", of_vae, None, "CPU minutes")
    if picture:
        sheet(picture, everything.pixels[numbers], drawn)


if __name__ == "__main__":
    main()
