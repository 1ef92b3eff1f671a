"""What was gathered of a run → RUN/report.html: one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline import files, program
from pipeline.denoising_strip import DENOISING
from pipeline.reporting import words
from pipeline.reporting.charts import bound_charts, sweep_charts, training_charts
from pipeline.reporting.evaluations import evaluation_charts
from pipeline.reporting.gather import Gathered, gather
from pipeline.reporting.images import Embedded, embed, evenly
from pipeline.reporting.tables import (
    figures,
    likelihood_rows,
    num_reference_images,
    score_columns,
    score_rows,
    state_of,
    vae_rows,
)

NAME = "report.html"
VAE_FIRST, VAE_CHARTS = ("reconstruction",), ("Reconstruction", "Loss", "KL, nats per element", "Coverage")
NEIGHBOURS_SHOWN = 4  # pictures of nearest training images
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Frame:
    """A picture of the samples, and the step it was drawn after."""

    step: int
    picture: Embedded


def keep_report(run: Path) -> None:
    """Write the report where something more important goes on: what fails is a warning."""
    try:
        write_report(run)
    except Exception as error:  # a training is worth more than what is told of it
        program.say(f"\nwarning: {run / NAME} could not be made: {type(error).__name__}: {error}")


def write_report(run: Path) -> Path:
    """Make RUN/report.html of what the run's files say now.  Raises UsageError where there is no run."""
    path = run / NAME
    files.write_text(path, render(gather(run)))
    return path


def render(found: Gathered) -> str:
    """The whole page."""
    script = text_of("uplot/uPlot.iife.min.js") + text_of("templates/report.js")
    troubles = [(row["step"], "spike") for row in found.spikes.rows if isinstance(row.get("step"), int)]
    frames = [
        Frame(int(path.stem.removeprefix("step-")), picture)
        for path in evenly(sorted(found.run.glob("samples/step-*.png")))
        if (picture := embed(path)) is not None
    ]
    charts = {
        "training": training_charts(found.table, troubles),
        "evaluation": evaluation_charts(found.evaluations),
        "sweep": sweep_charts(found.scores),
        "bound": bound_charts(found.bound),
        "vae": [
            chart for chart in training_charts(found.vae_table, first=("reconstruction",)) if chart.title in VAE_CHARTS
        ],
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            found=found,
            words=words,
            name=words.name_of(found.run),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            state=state_of(found),
            figures=figures(found),
            charts=charts,
            chart_data={section: [chart.to_json() for chart in each] for section, each in charts.items()},
            frames=frames,
            num_frames=len(list(found.run.glob("samples/step-*.png"))),
            score_columns=score_columns(found.scores),
            score_rows=score_rows(found.scores),
            num_reference_images=num_reference_images(found.scores),
            likelihood_rows=likelihood_rows(found.scores),
            vae_rows=vae_rows(found),
            pictures=pictures(found),
            style=Markup(text_of("uplot/uPlot.min.css") + text_of("templates/style.css")),
            license=Markup(text_of("uplot/LICENSE")),
            script=Markup(script),
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@cache
def text_of(name: str) -> str:
    """A file of this package."""
    return (HERE / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Where the template lies; all that is put into it is escaped."""
    made = Environment(
        loader=PackageLoader("pipeline.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["number"] = words.number
    return made


def pictures(found: Gathered) -> dict[str, list[tuple[str, Embedded]]]:
    """Section → what a picture shows, and the picture."""
    run, vae = found.run, found.vae_run / "measured" if found.vae_run else None

    def those(titled: Sequence[tuple[str, Path]]) -> list[tuple[str, Embedded]]:
        return [(title, picture) for title, path in titled if (picture := embed(path)) is not None]

    near = sorted((run / "evaluation").glob("nearest-*.png"), key=lambda path: path.stat().st_mtime)[-NEIGHBOURS_SHOWN:]
    said = {path: path.stem.removeprefix("nearest-").replace("_", " ") for path in sorted(near)}
    return {
        "grid": those([("images drawn from the export", run / "samples" / "grid.png")]),
        "denoising": those([("latents and predictions along one sampling", run / "evaluation" / DENOISING)]),
        "sweep": those([("scores over settings of the sampler", run / "evaluation" / "sweep.png")]),
        "bound": those([("the bound's steps", run / "evaluation" / "bound.png")]),
        "neighbours": those([(title, path) for path, title in said.items()]),
        "vae": those(
            [
                ("images, what the autoencoder gives back, and the difference", vae / "reconstructions.png"),
                ("lines between pairs of images, in latents and in pixels", vae / "interpolations.png"),
            ]
            if vae
            else []
        ),
    }
