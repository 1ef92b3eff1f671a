"""Two models, image by image: the same wishes, the same noise, paired differences of scores with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import files, program, sampler
from pipeline.errors import UsageError, blame
from pipeline.evaluation import Evaluation, labels_of
from pipeline.kept_images import SAID, KeptImages, common_asked
from pipeline.metrics.answers import clip_scores
from pipeline.metrics.manifold import fidelity_by_image
from pipeline.metrics.neighbours import feature_copies
from pipeline.metrics.paired import LEVEL, FrechetScore, InceptionScore, KernelScore, Mean, Score, paired_differences
from pipeline.real_features import see_all
from pipeline.reporting.words import biases
from pipeline.sampler import PASSPORT, Asked
from pipeline.tracking import read_evaluations
from pipeline.yardstick import Yardstick

COMPARED = "compared"  # before the names of images in RUN/evaluation that another run's export drew
Found = list[dict[str, Any]]  # one for each pair of image sets


def compare(evaluation: Evaluation, a: Path, b: Path, *, num_resamples: int) -> Found:
    """A less B at each guidance scale.  Every rank calls it; rank 0 has the result, the others nothing.

    Raises UsageError where A and B have no images of the same wishes and noise, or no network is there.
    """
    evaluation.require_network()
    sides = [kept_of(evaluation, folder) for folder in (a, b)]

    def look() -> Found:
        pairs = pairs_of(a, b, *sides)
        return [compare_pair(evaluation, first, second, num_resamples=num_resamples) for first, second in pairs]

    return evaluation.engine.main_does(look)


def kept_of(evaluation: Evaluation, folder: Path) -> list[KeptImages]:
    """The images of an export (drawn, where they are not there yet), of a folder of them, or of a run."""
    if (folder / "model_index.json").exists():
        return drawn_by(evaluation, folder)
    if (folder / SAID).exists():
        return [KeptImages.open(folder)]
    return newest_of(evaluation, folder)


def drawn_by(evaluation: Evaluation, folder: Path) -> list[KeptImages]:
    """The images of an export: those of CONFIG's own are the run's, those of others go by a name of their own."""
    engine, config = evaluation.engine, evaluation.config
    pipe = sampler.open_export(folder, engine.device, tile_pixels=config.vae.tile_pixels)
    size, condition = sampler.image_size_of(pipe), config.conditioning
    if size != config.data.image_size:
        raise UsageError(f"{folder}: draws {size} pixels a side, data.image_size={config.data.image_size}")
    if pipe.num_classes not in (0, condition.num_classes):
        raise UsageError(
            f"{folder}: is asked for one of {pipe.num_classes} classes, conditioning.num_classes="
            f"{condition.num_classes}; compare it with a config that asks for the same"
        )
    if pipe.text_encoders and condition.text is None:
        raise UsageError(
            f"{folder}: is asked by captions, conditioning.kind={condition.kind} has none; compare it with a config "
            "of a text model"
        )
    has_passport = (folder / PASSPORT).exists()  # somebody else's pipeline has none
    checkpoint = sampler.passport_of(folder)["checkpoint"] if has_passport else folder.name
    is_own = folder.resolve() == (Path(config.run_dir) / "export").resolve()
    kept = evaluation.kept(pipe, checkpoint if is_own else f"{COMPARED}-{checkpoint}")
    for each in kept:
        each.draw(engine, pipe, lambda: True, in_training=False)
    return kept


def newest_of(evaluation: Evaluation, run: Path) -> list[KeptImages]:
    """The images of a run's newest evaluation that was drawn as CONFIG says, for each guidance scale.

    Its rows of scores name them: what a sweep or a comparison drew is none of them.
    """
    config, settings = evaluation.config, evaluation.settings
    newest: dict[float, KeptImages] = {}
    for row in read_evaluations(run):  # in order of step, and of one step the last written last
        try:
            kept = KeptImages.open(run / "evaluation" / str(row.get("kept_images")))
        except UsageError:  # removed since
            continue
        drawn = (kept.seed, kept.num_inference_steps, len(kept.asked), kept.guidance_interval, kept.guide)
        wanted = (config.seed, settings.num_inference_steps, settings.num_images, (0.0, 1.0), None)
        if drawn == wanted and kept.guidance_scale in settings.guidance_scales:
            newest[kept.guidance_scale] = kept
    if not newest:
        scales = ", ".join(f"{scale:g}" for scale in settings.guidance_scales)
        raise UsageError(
            f"{run}: no export, no kept images and no run with an evaluation of {settings.num_images} images by "
            f"{settings.num_inference_steps} steps at guidance {scales} from seed {config.seed} is there; run "
            "evaluate, or name a folder like RUN/export or RUN/evaluation/step-000001000-guidance-2-..."
        )
    return list(newest.values())


def pairs_of(
    a: Path, b: Path, first: Sequence[KeptImages], second: Sequence[KeptImages]
) -> list[tuple[KeptImages, KeptImages]]:
    """One set with the other's single one, or those of the same guidance.  Raises UsageError where none are left."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    of_second = {each.guidance_scale: each for each in second}
    found = [(each, of_second[each.guidance_scale]) for each in first if each.guidance_scale in of_second]
    if not found:
        scales = [", ".join(f"{each.guidance_scale:g}" for each in side) for side in (first, second)]
        raise UsageError(f"{a} has images of guidance {scales[0]}, {b} of {scales[1]}; evaluate both at the same one")
    return found


def compare_pair(evaluation: Evaluation, a: KeptImages, b: KeptImages, *, num_resamples: int) -> dict[str, Any]:
    """What is written down of one pair."""
    asked = common_asked(a, b)
    images = [np.concatenate([*map(kept.read, kept.portions)]) for kept in (a, b)]
    for kept, each in zip((a, b), images, strict=True):
        size = evaluation.config.data.image_size
        if each.shape[1:3] != (size, size):
            raise UsageError(f"{kept.folder}: images {list(each.shape)} came, data.image_size={size} was wanted")
    program.say(f"{num_resamples} resamples of {len(asked)} pairs of images")
    scores = [scores_of(evaluation, each, asked) for each in images]
    with blame("--resamples"):
        seed = evaluation.config.seed
        found = paired_differences(scores[0], scores[1], len(asked), seed=seed, num_resamples=num_resamples)
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "models": [a.model, b.model],
        "guidance_scales": [a.guidance_scale, b.guidance_scale],
        "num_inference_steps": [a.num_inference_steps, b.num_inference_steps],
        "num_images": len(asked),
        "num_reference_images": len(next(iter(evaluation.yardsticks.values())).train.features),
        "num_resamples": num_resamples,
        "level": LEVEL,
        "references": evaluation.references(),
        "differences": {name: each._asdict() for name, each in found.items()},
    }


def scores_of(evaluation: Evaluation, images: NDArray[np.uint8], asked: Sequence[Asked]) -> Mapping[str, Score]:
    """Names as in evaluations.jsonl.

    Recall and coverage are not among them: they count neighbours within the drawn set, which a resample with its
    doubles makes sparser.
    """
    scores: dict[str, Score] = {}
    labels, prompts = labels_of(asked), [one.prompt for one in asked]
    for title, yardstick in evaluation.yardsticks.items():
        seen = see_all(yardstick.network, images, evaluation.settings.batch_images, f"{title} sees")
        with blame(f"evaluation.features: {title}"):
            scores |= {f"{title}/{name}": score for name, score in in_features(yardstick, seen["features"]).items()}
            if "probabilities" in seen:
                scores[f"{title}/inception_score"] = InceptionScore(seen["probabilities"])
        if labels is not None and (named := yardstick.classes(seen.get("probabilities"))) is not None:
            scores["accuracy"] = Mean(named == labels)
        if (captions := yardstick.read(prompts)) is not None:
            scores["clip_score"] = Mean(clip_scores(seen["features"], captions))
    return scores


def in_features(yardstick: Yardstick, features: NDArray[np.float32]) -> Mapping[str, Score]:
    """The scores of one network."""
    real = yardstick.train.features
    is_precise, density = fidelity_by_image(real, features)
    return {
        "fid": FrechetScore(real, features),
        "kid": KernelScore(real, features),
        "precision": Mean(is_precise),
        "density": Mean(density),
        "near_copy_share": Mean(feature_copies(real, features)),
    }


def show_comparison(found: Found, path: Path) -> None:
    """Write the JSON file; print a table of each pair."""
    files.write_json(path, found)
    console = Console()
    for pair in found:
        counts = f"N = {pair['num_images']:,} pairs of images, M = {pair['num_reference_images']:,} training images"
        caption = f"{counts}\n{biases(pair['differences'])}"
        table = Table(title=f"A: {pair['a']}\nB: {pair['b']}", caption=caption)
        for heading in ("", "A", "B", "A - B", f"{pair['level']:.0%} interval"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, each in pair["differences"].items():
            interval = f"{each['low']:+.4f} to {each['high']:+.4f}"
            table.add_row(name, f"{each['a']:.4f}", f"{each['b']:.4f}", f"{each['difference']:+.4f}", interval)
        console.print(table)
    console.print(f"written to {path}; an interval without 0 says that A and B differ beyond chance")
