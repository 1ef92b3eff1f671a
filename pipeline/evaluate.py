"""Score RUN/export against the real images: reconstruction, class accuracy, distances, coverage, near copies.

The images drawn are kept in RUN/evaluation, so an interrupted evaluation goes on where it was.  Results:
RUN/scores.json and pictures in RUN/evaluation.
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
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pipeline import files, program, sampler
from pipeline.bounds import Costs, likelihood_scores
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.data.dataset import evenly, read_told
from pipeline.data.images import to_unit
from pipeline.data.index import ShardSet
from pipeline.denoising_strip import DENOISING, ROWS, save_denoising
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.neighbours import nearest
from pipeline.metrics.pictures import neighbours_picture
from pipeline.metrics.scores import image_scores
from pipeline.model_card import note_scores
from pipeline.real_images import read_sets
from pipeline.reporting.page import keep_report
from pipeline.run_folder import check_same
from pipeline.sampler import PASSPORT, Asked
from vae.metrics import psnr, reconstruct
from vae.tiles import tile_of

Scores = dict[str, float | int | str]
NEIGHBOURS, NEIGHBOUR_SAMPLES = 4, 10  # of the picture: nearest training images, samples


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("evaluate", __doc__ or "")
    return program.run_config(made, argv, evaluate, None)


def evaluate(config: Config, args: argparse.Namespace) -> None:
    """export → images of each guidance scale → scores beside those of the real validation images."""
    del args
    engine = Engine(config.engine)
    run = Path(config.run_dir)
    if config.data.validation_images is None:
        raise UsageError("data.validation_images: evaluate compares with held-out images; name their folder")
    pipe = sampler.open_export(run / "export", engine.device, tile_pixels=config.vae.tile_pixels)
    check_same(run, config, ("conditioning", "diffusion"))
    asked = asked_of(config)
    drawn = {scale: draw_all(engine, config, pipe, asked, scale) for scale in config.evaluation.guidance_scales}
    engine.wait()

    def score() -> None:
        scores = score_all(config, pipe, asked, drawn)
        files.write_json(run / "scores.json", scores)
        note_scores(run / "export", scores)
        rows = sampler.rows_of(config, ROWS)
        save_denoising(run / "evaluation" / DENOISING, pipe, rows, config, title=f"checkpoint {scores['checkpoint']}")
        keep_report(run)
        show(scores, config, run)

    engine.main_does(score)


def asked_of(config: Config) -> list[Asked]:
    """What each image is asked to show: the classes in turn, or what held-out samples say, evenly spaced over the set.

    So every beginning of the classes is balanced.
    """
    condition, data, count = config.conditioning, config.data, config.evaluation.num_images
    if condition.text is None:
        return [Asked(i % condition.num_classes) for i in range(count)]
    with blame("data.validation_images"):
        shards = ShardSet(str(data.validation_images), open_shards=1, remote=data.remote)
        found = [Asked(*both) for both in read_told(shards, evenly(shards, count)) if both[1] is not None]
        if not found or (condition.has_class and any(asked.label is None for asked in found)):
            raise UsageError("it has no captions (.txt) or labels (.cls), which conditioning.kind wants")
    return [found[i % len(found)] for i in range(count)]


def draw_all(
    engine: Engine, config: Config, pipe: ClassConditionalPipeline, asked: Sequence[Asked], guidance_scale: float
) -> list[Path]:
    """Draw this rank's share of the images of one guidance scale; give the files of all of them, in order.

    A file's name tells all that its content depends on, so what is there is right.
    """
    settings, run = config.evaluation, Path(config.run_dir)
    passport = files.read_json(run / "export" / PASSPORT)
    key = files.fingerprint(
        {
            "export": passport,
            "seed": config.seed,
            "guidance": guidance_scale,
            "steps": settings.num_inference_steps,
            "tile_pixels": tile_of(config.data.image_size, config.vae.tile_pixels),
            "asked": asked,
        }
    )[:12]
    folder = run / "evaluation" / f"{passport['checkpoint']}-guidance-{guidance_scale:g}-{key}"
    starts = range(0, len(asked), settings.batch_images)
    paths = [folder / f"{start:07d}-{min(start + settings.batch_images, len(asked)):07d}.npy" for start in starts]
    with tqdm(
        total=len(asked),
        desc=f"sample at guidance {guidance_scale:g}",
        unit=" images",
        dynamic_ncols=True,
        disable=not engine.is_main,
    ) as bar:
        for number, (start, path) in enumerate(zip(starts, paths, strict=True)):
            indices = range(start, min(start + settings.batch_images, len(asked)))
            if number % engine.num_ranks == engine.rank and not path.exists():
                pixels = sampler.draw(
                    pipe,
                    asked[start : indices.stop],
                    indices,
                    seed=config.seed,
                    guidance_scale=guidance_scale,
                    num_inference_steps=settings.num_inference_steps,
                    batch_images=settings.batch_images,
                )
                with files.whole(path) as aside, aside.open("wb") as file:
                    np.save(file, pixels, allow_pickle=False)
            bar.update(len(indices))
    return paths


def score_all(
    config: Config, pipe: ClassConditionalPipeline, asked: Sequence[Asked], drawn: dict[float, list[Path]]
) -> Scores:
    """Metric name → value, for the reconstructions, the validation images and each guidance scale."""
    run = Path(config.run_dir)
    passport = files.read_json(run / "export" / PASSPORT)
    in_train = read_sets("data.train_images", config.data.train_images, config)
    held_out = read_sets("data.validation_images", (str(config.data.validation_images),), config)
    train, validation = in_train.pixels, held_out.pixels
    classifier = None
    if in_train.labels is None:
        program.say("the images have no labels: no classifier is fitted, and its features' scores are left out")
    else:
        program.say("fitting the classifier on the real training images")
        classifier = ImageClassifier(config.seed).fit(train, in_train.labels)
    scores: Scores = {
        "checkpoint": str(passport["checkpoint"]),
        "ema": str(passport["ema"]),
        "vae/psnr_db": mean_psnr(pipe.vae, validation, config.evaluation.batch_images),
        "vae/num_images": len(validation),
    }

    def add(prefix: str, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        found = image_scores(classifier, train, images, labels, validation_images=validation, seed=config.seed)
        scores.update({f"{prefix}/{name}": value for name, value in found.items()})

    add("validation", validation, held_out.labels)
    for guidance_scale, paths in drawn.items():
        images = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
        prefix = f"guidance_{guidance_scale:g}"
        add(prefix, images, labels_of(asked))
        for name in ("recall", "coverage"):  # at equal numbers of images: both grow with the number
            of_validation = float(scores.get(f"validation/{name}", 0))
            if f"{prefix}/{name}_equal_n" in scores and of_validation > 0:
                share = float(scores[f"{prefix}/{name}_equal_n"]) / of_validation
                scores[f"{prefix}/{name}_of_validation"] = share
        first = images[:NEIGHBOUR_SAMPLES]
        found, _ = nearest(train, first, min(NEIGHBOURS, len(train)))
        with files.whole(run / "evaluation" / f"nearest-{prefix}.png") as aside:
            neighbours_picture(first, train, found).save(aside, format="PNG")
    program.say("counting the bits of held-out images")
    costs = Costs(pipe, config.diffusion, config.seed, config.evaluation.batch_images)
    plot = run / "evaluation" / "bound.png"
    labels = [None] * len(validation) if held_out.labels is None else held_out.labels.tolist()
    own = [Asked(*both) for both in zip(labels, held_out.captions or [None] * len(labels), strict=True)]
    return scores | likelihood_scores(costs, config.evaluation.likelihood, train, validation, own, plot=plot)


def labels_of(asked: Sequence[Asked]) -> NDArray[np.int64] | None:
    """The classes asked for, int64 [N]; None where one has none."""
    labels = [one.label for one in asked]
    return None if None in labels else np.array(labels, dtype=np.int64)


def mean_psnr(vae: AutoencoderKL, images: NDArray[np.uint8], batch_images: int) -> float:
    """Mean over images of the reconstruction's PSNR in dB, from the posterior's mean."""
    values: list[torch.Tensor] = []
    for start in range(0, len(images), batch_images):
        x = torch.from_numpy(to_unit(images[start : start + batch_images])).to(vae.device)
        values.append(psnr(reconstruct(vae, x), x).cpu())
    return float(torch.cat(values).mean())


def show(scores: Scores, config: Config, run: Path) -> None:
    """The scores as a table, and where everything lies."""
    columns = ["validation", *(f"guidance_{scale:g}" for scale in config.evaluation.guidance_scales)]
    names = list(dict.fromkeys(name.split("/", 1)[1] for name in scores if name.split("/")[0] in columns))
    table = Table(title=f"{run / 'scores.json'}: against {scores['validation/num_train_images']:,} training images")
    for heading in ("", "real, held out", *columns[1:]):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in names:
        values: list[Any] = [scores.get(f"{column}/{name}") for column in columns]
        table.add_row(name, *("" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values))
    console = Console()
    console.print(table)
    console.print(f"autoencoder: {scores['vae/psnr_db']:.1f} dB PSNR on {scores['vae/num_images']:,} held-out images")
    for line in likelihood_lines(scores):
        console.print(line)
    console.print(f"nearest training images beside samples: {run / 'evaluation'}/nearest-*.png")


def likelihood_lines(scores: Scores) -> list[str]:
    """What a person wants to read of the likelihoods."""
    titles = {
        "bound": "variational bound of the latents",
        "ode": "likelihood of the latents by the ODE",
        "pixel_bound": "bound of the whole system, 8-bit pixels",
    }
    return [
        f"{title}: {scores[f'likelihood/{name}_bits_per_dim']:.3f} ± {scores[f'likelihood/{name}_standard_error']:.3f} "
        "bits/dim"
        for name, title in titles.items()
        if f"likelihood/{name}_bits_per_dim" in scores
    ]


if __name__ == "__main__":
    program.end(main())
