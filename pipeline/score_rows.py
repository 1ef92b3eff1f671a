"""Rows of scores: what each number is called in evaluations.jsonl, as a curve and in scores.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config_evaluation import EvaluationConfig
from pipeline.kept_images import forget_older
from pipeline.tracking import Row, write_evaluation

MEASURED_BY = ("asked", "validation_images", "held_out")  # fingerprints of a row beside its references
REFERENCES = "references/"  # in scores.json, before the network's name
OF_HELD_OUT = ("validation_loss", "bits_per_dim", "bits_per_dim_standard_error")  # scores that no network gives


def told_apart(rows: Sequence[Row], row: Row, settings: EvaluationConfig) -> Row:
    """The row, its scores under names of their own where the same name stands for other numbers in this run's first.

    A network's numbers are others when its reference is (data, preprocessing, weights) or the held-out set, or when
    other numbers of images or steps were drawn or other wishes asked; losses and bits when other held-out images are
    counted.  Then NAME becomes NAME@FINGERPRINT, so that what can't be compared never shares a curve.
    """
    of_network = {"classifier": "accuracy", "clip": "clip_score"}  # what a kind of network gives beside NAME/...
    renamed: dict[str, str] = {}
    for each in settings.features:
        if each.title in row["references"]:
            first = next((old for old in rows if each.title in old["references"]), row)
            alike = [files.fingerprint(_comparable(one, each.title))[:8] for one in (first, row)]
            if alike[0] != alike[1]:
                names = [each.title, of_network.get(each.network, each.title)]
                renamed |= {name: f"{name}@{alike[1]}" for name in names}
    if rows and rows[0]["held_out"] != row["held_out"]:
        renamed |= {name: f"{name}@{row['held_out'][:8]}" for name in OF_HELD_OUT}

    def called(name: str) -> str:
        return "/".join(renamed.get(word, word) for word in name.split("/"))

    return row | {part: {called(name): value for name, value in row[part].items()} for part in ("references", "scores")}


def _comparable(row: Row, title: str) -> list[Any]:
    drawn = [row["num_images"], row["num_inference_steps"], row.get("asked")]
    return [row["references"][title], row.get("validation_images"), *drawn]


def record(run: Path, rows: Sequence[Row]) -> None:
    """Rank 0: the rows of one evaluation in the training, and the newest scores by name; older images may go."""
    for row in rows:
        write_evaluation(run, row)
    files.write_json(run / "scores.json", flat_scores(rows))
    forget_older(run, rows[0]["step"])


def curves_of(row: Row) -> dict[str, float]:
    """The numbers that change while a model learns, by the name of their curve: an image score's tells the guidance."""
    prefix = f"guidance_{row['guidance_scale']:g}"
    found: dict[str, float] = {}
    for name, value in row["scores"].items():
        head = name.partition("/")[0]
        if head == "validation" or name.rpartition("/")[2].startswith("num_"):
            continue  # of real images, or a number of them: always the same
        shared = head.partition("@")[0] in OF_HELD_OUT
        found[name if shared else f"{prefix}/{name}"] = float(value)
    return found


OF_CLASSIFIER = {  # its scores go without its name in scores.json
    "accuracy": "class_accuracy",
    "classifier/fid": "frechet_distance",
    "classifier/kid": "kernel_distance",
    "classifier/kid_standard_error": "kernel_distance_standard_error",
    "classifier/precision": "precision",
    "classifier/recall": "recall",
    "classifier/density": "density",
    "classifier/coverage": "coverage",
    "classifier/fid_equal_n": "frechet_distance_equal_n",
    "classifier/recall_equal_n": "recall_equal_n",
    "classifier/coverage_equal_n": "coverage_equal_n",
    "classifier/num_images_equal_n": "num_images_equal_n",
    "classifier/num_reference_images": "num_train_images",
}


def flat_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """One model's rows by the names of scores.json: guidance_2/NAME of what was drawn, validation/NAME of real ones.

    They are the newest, so that no name needs a fingerprint; what they were measured by stands beside them.
    """
    flat: dict[str, Any] = {name: rows[0][name] for name in ("checkpoint", "ema", *MEASURED_BY)}
    flat |= {f"{REFERENCES}{plain(title)}": of for title, of in rows[0]["references"].items()}
    for row in rows:
        prefix = f"guidance_{row['guidance_scale']:g}"
        flat |= {f"{prefix}/{name}": row[name] for name in ("num_images", "num_inference_steps")}
        for name, value in row["scores"].items():
            head, _, rest = plain(name).partition("/")
            if head == "validation":
                flat[f"validation/{OF_CLASSIFIER.get(rest, rest)}"] = value
            elif head in OF_HELD_OUT:
                flat[plain(name)] = value
            else:
                flat[f"{prefix}/{OF_CLASSIFIER.get(plain(name), plain(name))}"] = value
    return flat


def plain(name: str) -> str:
    """A score's name without the fingerprints that `told_apart` gave it."""
    return "/".join(word.partition("@")[0] for word in name.split("/"))


def first_network(scores: Mapping[str, Any]) -> str:
    """The first network of evaluation.features whose scores these of scores.json are."""
    return next((name.removeprefix(REFERENCES) for name in scores if name.startswith(REFERENCES)), "classifier")


def flat_name(network: str, name: str) -> str:
    """What a network's score, such as `fid`, is called in scores.json."""
    return OF_CLASSIFIER.get(f"{network}/{name}", f"{network}/{name}")
