"""The rows of evaluations.jsonl → a chart for each score, a curve for each way in which it was measured.

Numbers against other references, of other averages, guidance, steps or counts never share a curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from pipeline.reporting.charts import Chart, Series, bookkeeping, is_number, significant
from pipeline.reporting.words import number, score_of

Json = dict[str, Any]
SHOWN_FIRST = ("frechet_distance", "fid", "kernel_distance", "kid", "class_accuracy", "accuracy", "precision", "recall")
OF_HELD_OUT = ("validation_loss", "bits_per_dim")  # heads of scores that no drawn image has a part in
REAL = "validation/"  # before a score's name: that of real held-out images
BAND = "/band-"  # before the number of a score's band of noise, 0 the lowest


def evaluation_charts(evaluations: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """All charts, those that most ask for first."""
    points: dict[str, dict[str, dict[float, float]]] = {}  # score → way → step → value
    ways: dict[str, Json] = {}
    real: dict[str, float] = {}
    for row in evaluations:
        step, scores = row.get("step"), row.get("scores")
        if not is_number(step) or not isinstance(scores, dict):
            continue
        for name, value in scores.items():
            if not is_number(value) or not isfinite(value) or bookkeeping(name):
                continue
            if name.startswith(REAL):
                real[name.removeprefix(REAL)] = float(value)
                continue
            chart, band, bar = name.partition(BAND)
            way = way_of(row, name) | ({"band": bar} if band else {})
            key = json.dumps(way, sort_keys=True, default=str)
            ways[key] = way
            points.setdefault(chart + band, {}).setdefault(key, {})[step] = float(value)
    order = {name: i for i, name in enumerate(SHOWN_FIRST)}
    names = sorted(points, key=lambda name: (order.get(name.rpartition("/")[2], len(order)), name))
    return [score_chart(name, points[name], ways, real.get(name)) for name in names]


def way_of(row: Mapping[str, Any], name: str) -> Json:
    """All that a score depends on beside the weights: of a network's scores that network's references alone."""
    head, references = name.partition("/")[0], row.get("references")
    if head.partition("@")[0] in OF_HELD_OUT:
        return {"ema": row.get("ema"), "references": row.get("held_out")}
    mine = references.get(head, references) if isinstance(references, dict) else references
    return {
        "ema": row.get("ema"),
        "guidance": row.get("guidance_scale"),
        "steps": row.get("num_inference_steps"),
        "images": row.get("num_images"),
        "wishes": row.get("asked"),
        "held-out set": row.get("validation_images"),
        "references": mine,
    }


def score_chart(
    name: str, by_way: Mapping[str, Mapping[float, float]], ways: Mapping[str, Json], real: float | None
) -> Chart:
    """A score over the steps; `real`: what real held-out images get."""
    score = score_of(name.removesuffix(BAND))
    title = score.title + (" by noise" if name.endswith(BAND) else "")
    labels = dict(zip(by_way, told_apart([ways[way] for way in by_way]), strict=True))
    steps = sorted({step for values in by_way.values() for step in values})
    series = [
        Series(labels[way], [significant(values[step]) if step in values else None for step in steps])
        for way, values in by_way.items()
    ]
    ends = [f"{labels[way] or title}: {score.write(values[max(values)])}" for way, values in by_way.items()]
    return Chart(
        title=title,
        x_title="step",
        x=steps,
        series=series,
        said=f"{title} at {len(steps)} steps up to {number(steps[-1])}. Last: {'; '.join(ends)}.",
        better=score.better,
        percent=score.percent,
        dots=True,
        level=None if real is None else (significant(real), "real images"),
    )


def told_apart(ways: Sequence[Json]) -> list[str]:
    """In words, what each way has that not all have; fingerprints, which are long, are numbered."""

    def canonical(way: Json, name: str) -> str:
        return json.dumps(way.get(name), sort_keys=True, default=str)

    differing = [name for name in ways[0] if len({canonical(way, name) for way in ways}) > 1]

    def numbered(way: Json, name: str) -> str:
        known = list(dict.fromkeys(canonical(each, name) for each in ways))
        return f"{name} {1 + known.index(canonical(way, name))}"

    def said(way: Json, name: str) -> str:
        value = way[name]
        match name:
            case "guidance":
                return f"guidance {value:g}" if is_number(value) else "no guidance"
            case "band":
                return f"band {value}" + (" (least noise)" if value == "0" else "")
            case "references" | "wishes" | "held-out set":
                return numbered(way, name)
            case "ema":
                return str(value)
            case _:
                return f"{number(value) if is_number(value) else value} {name}"

    return [", ".join(said(way, name) for name in differing) for way in ways]
