"""Serve a page that draws with RUN/export and shows the denoising as it goes."""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import image_files, painting, panel, program, sampler
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.errors import UsageError
from pipeline.painting import Frame, Painter, Wish
from pipeline.stopping import Stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve until a signal comes, give the exit code."""
    made = program.config_parser("page", __doc__ or "")
    made.add_argument("--export", type=Path, metavar="FOLDER", help="the model (default RUN/export)")
    made.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    made.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1: this machine)")
    return program.run_config(made, argv, page, None)


def page(config: Config, args: argparse.Namespace) -> None:
    """export → pipeline → page, until SIGINT or SIGTERM."""
    folder: Path = args.export or Path(config.run_dir) / "export"
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UsageError(f"--port: {args.port} came, 1 to 65535 was wanted")
    kept = Path(tempfile.mkdtemp(prefix="page-"))  # the images that the page shows
    try:
        gradio = open_gradio(kept)
        pipe = sampler.open_export(folder, Engine(config.engine).device, tile_pixels=config.vae.tile_pixels)
        blocks = layout(gradio, Painter(pipe), folder, config, kept)
        blocks.queue(default_concurrency_limit=1)
        with Stopping(None) as stopping:
            serve(gradio, blocks, args.host, args.port)
            while not stopping.code():
                time.sleep(0.1)
        blocks.close(verbose=False)
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def open_gradio(kept: Path) -> Any:
    """The gradio module, which calls nobody and keeps its files in `kept`.  Raises UsageError where there is none."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and when it starts
    os.environ["GRADIO_TEMP_DIR"] = str(kept / "served")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError("page: gradio is not installed; pip install 'latent-diffusion-pipeline[page]'") from None


def serve(gradio: Any, blocks: Any, host: str, port: int | None) -> None:
    """Start to serve, and say where.  Raises UsageError where host and port can't be had."""
    font = ("system-ui", "sans-serif")  # of the visitor's machine: none is fetched
    theme = gradio.themes.Default(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=("monospace",))
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme,
            css=panel.CSS,
        )
    except OSError as error:
        raise UsageError(f"--host {host}, --port {port or 'any from 7860 on'}: {error}") from None
    program.say(f"the page is at {address} and ends with Ctrl-C")


class Places(NamedTuple):
    """The parts of the page that change."""

    draw: Any
    stop: Any
    bar: Any
    pictures: Any
    gallery: Any
    code: Any


def layout(gradio: Any, painter: Painter, folder: Path, config: Config, kept: Path) -> Any:
    """Fields for what this model knows, places for what it draws, and what happens between them."""
    pipe = painter.pipe
    size = sampler.image_size_of(pipe)
    names: list[str] | None = pipe.config["class_names"]
    classes: list[tuple[str, Any]] = [(str(i), i) for i in range(pipe.num_classes)]
    if names:
        classes = [(name, name) for name in names]
    has_text = bool(pipe.text_encoders)
    knows = [f"{pipe.num_classes} classes"] * bool(classes) + ["prompts"] * has_text
    title = folder.resolve().parent.name if folder.name == "export" else folder.name
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.HTML(panel.PIXELATED if size < panel.PIXELATED_BELOW else "", visible="hidden")
        gradio.Markdown(f"# {title}\n{' and '.join(knows)} · {size}×{size} pixels", elem_id="about")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                first = [value for _, value in classes[:1]]
                labels = gradio.Dropdown(classes, value=first, multiselect=True, label="Classes", visible=bool(classes))
                prompt = gradio.Textbox(label="Prompt", lines=2, placeholder="What to draw", visible=has_text)
                # Plain numbers: painting.arguments checks them, so that nothing typed is cut or rounded on the way.
                with gradio.Row():
                    each = gradio.Number(4, label="Images per class" if classes else "Images", min_width=120)
                    seed = gradio.Number(config.seed, label="Seed", min_width=120)
                with gradio.Row():
                    steps = gradio.Number(config.evaluation.num_inference_steps, label="Steps", min_width=120)
                    guidance = gradio.Number(config.evaluation.guidance_scales[-1], label="Guidance", min_width=120)
                with gradio.Accordion("More", open=False):
                    rescale = gradio.Number(0, label="Guidance rescale")
                    away = gradio.Dropdown(
                        [("none", None), *classes], value=None, label="Away from class", visible=bool(classes)
                    )
                    away_text = gradio.Textbox(label="Away from", placeholder="A negative prompt", visible=has_text)
                with gradio.Row():
                    draw = gradio.Button("Draw", variant="primary", scale=2, min_width=120, elem_id="draw")
                    stop = gradio.Button("Stop", scale=1, min_width=90, interactive=False, elem_id="stop")
            with gradio.Column(scale=3, min_width=320):
                bar = gradio.HTML(visible=False, elem_id="bar")
                pictures = gradio.HTML(panel.HINT, padding=False, elem_id="panel")
                gallery = gradio.Gallery(
                    show_label=False,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    visible=False,
                    elem_id="gallery",
                )
                again = {"label": "The same images with diffusers", "language": "python", "elem_id": "code"}
                code = gradio.Code(**again, wrap_lines=True, show_line_numbers=False, interactive=False, visible=False)
        places = Places(draw, stop, bar, pictures, gallery, code)
        fields = [labels, prompt, away, away_text, each, steps, guidance, rescale, seed]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}

        def begun() -> dict[Any, Any]:
            told = gradio.update(value=panel.bar(0, 1, "waiting for its turn"), visible=True)
            return {bar: told, draw: gradio.update(interactive=False), stop: gradio.update(interactive=True)}

        def stopped() -> dict[Any, Any]:
            told = gradio.update(value=panel.bar(0, 1, "stopped"))
            return {bar: told, draw: gradio.update(interactive=True), stop: gradio.update(interactive=False)}

        asked = draw.click(begun, None, list(places), queue=False, **hidden)
        going = asked.then(answer(gradio, painter, folder, kept, places), fields, list(places), **hidden)
        stop.click(None, cancels=[going]).then(stopped, None, list(places), queue=False, **hidden)
    return blocks


def answer(
    gradio: Any, painter: Painter, folder: Path, kept: Path, places: Places
) -> Callable[..., Generator[dict[Any, Any]]]:
    """What Draw does: the fields' values → what changes on the page, again and again until the images are there."""
    stock, tile_pixels = painting.is_stock(folder), sampler.tile_of(painter.pipe)
    hidden = gradio.update(visible=False)
    ended = {
        places.draw: gradio.update(interactive=True),
        places.stop: gradio.update(interactive=False),
        places.bar: hidden,
    }

    def shown(value: Any) -> Any:
        return gradio.update(value=value, visible=True)

    def drawn(labels: Any, prompt: Any, away: Any, away_text: Any, *numbers: float | None) -> Generator[dict[Any, Any]]:
        each, steps, guidance, rescale, seed = numbers
        wish = Wish(labels or (), prompt or "", away, away_text or "", each, steps, guidance, rescale, seed)
        try:
            asked = painting.arguments(painter.pipe, wish, stock=stock)
            captions = [panel.caption(painting.about(asked, i)) for i in range(len(asked["seeds"]))]
            for frame in painter.frames(asked):
                changed = {places.bar: shown(panel.bar(frame.step, frame.num_steps))}
                if frame.images and not frame.done:
                    changed |= {places.pictures: shown(panel.pictures(frame.images, captions))}
                    changed |= {places.gallery: hidden, places.code: hidden}
                yield changed
                if frame.done:
                    images = filed(frame, asked, captions, Path(tempfile.mkdtemp(dir=kept)), tile_pixels)
                    text = painting.python_code(
                        folder, asked, str(painter.pipe.device), stock=stock, tile_pixels=tile_pixels
                    )
                    there = {places.pictures: hidden, places.gallery: shown(images), places.code: shown(text)}
                    yield ended | there
        except (UsageError, ValueError) as error:
            yield ended | {places.pictures: shown(panel.error(str(error)))}
        except Exception as error:  # out of memory, say: one line here, one at the terminal, and the page lives on
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            program.say(f"error: {told}")
            yield ended | {places.pictures: shown(panel.error(told))}

    return drawn


def filed(
    frame: Frame, asked: dict[str, Any], captions: Sequence[str], folder: Path, tile_pixels: int | None
) -> list[tuple[str, str]]:
    """Write each image as a PNG that says what it is of; (path, caption) of each."""
    tiles = {"tile_pixels": tile_pixels} if tile_pixels is not None else {}
    written: list[tuple[str, str]] = []
    for i, image in enumerate(frame.images):
        name = re.sub(r"[^\w-]+", "-", captions[i])[:80].strip("-")
        path = folder / f"{name}.png"
        image_files.write_png(path, image, painting.about(asked, i) | tiles)
        written.append((str(path), captions[i]))
    return written


if __name__ == "__main__":
    program.end(main())
