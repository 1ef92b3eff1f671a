"""The page in a real browser: draw, watch, save, stop and make mistakes; and nobody else is called.

With SCREENSHOTS=FOLDER the last look of each tab is kept there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image
from small_pipe import small_pipe, small_text_pipe
from world import FORKSERVER, free_port, run_rank, small_config

from pipeline import sampler

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)
for wanted in ("gradio", "playwright"):
    pytest.importorskip(wanted, reason=f"{wanted} is not installed")

# Whatever is not on this machine is nowhere, and Chromium itself asks nobody for anything.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
WAIT_MS = 30_000
ITSELF = {"127.0.0.1", "localhost", "None"}


def serve_watched(config: str, port: int, log: str, watched: str) -> None:
    """Be `python -m pipeline page`, and note every address that this process connects to or looks up."""

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
            address = args[0] if event == "socket.getaddrinfo" else args[1]
            with Path(watched).open("a") as out:
                out.write(f"{address[0] if isinstance(address, tuple) else address}\n")

    sys.addaudithook(note)
    run_rank(0, "page", [config, "--port", str(port)], 1, port, log)


class Served:
    """A page that is served, by the real program in a process of its own."""

    def __init__(self, folder: Path, pipe: Any) -> None:
        self.export = folder / "run" / "export"
        pipe.save_pretrained(self.export)
        (folder / "config.yaml").write_text(yaml.safe_dump(small_config(folder)))
        self.watched, self.log = folder / "watched.txt", folder / "log.txt"
        self.watched.touch()
        self.log.touch()
        port = free_port()
        self.address = f"http://127.0.0.1:{port}/"
        args = (str(folder / "config.yaml"), port, str(self.log), str(self.watched))
        self.process = FORKSERVER.Process(target=serve_watched, args=args)
        self.process.start()

    def ready(self) -> Served:
        end = time.monotonic() + 120
        while f"the page is at {self.address} and ends with Ctrl-C" not in self.log.read_text():
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        return self

    def end(self) -> int | None:
        """SIGINT; the exit code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Served]]:
    """A page of a model that knows classes, and one of a model that knows prompts."""
    text = tmp_path_factory.mktemp("text")
    pages = {
        "classes": Served(tmp_path_factory.mktemp("classes"), small_pipe(names=["zero", "one", "two"])),
        "text": Served(text, small_text_pipe(text / "encoder")),
    }
    try:
        yield {name: page.ready() for name, page in pages.items()}
    finally:
        for page in pages.values():
            page.process.kill()
            page.process.join()


@pytest.fixture(scope="module")
def chromium() -> Generator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Generator[Any]:
    """Open a page; what it asked other hosts for, and what it complained of, fails the test."""
    complaints: list[str] = []
    open_pages: list[Any] = []

    def requested(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            complaints.append(f"asked for {request.url}")

    def go(page: Served, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab = context.new_page()
        open_pages.append(tab)
        tab.set_default_timeout(WAIT_MS)
        tab.on("request", requested)
        tab.on("websocket", requested)
        tab.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.address)
        tab.wait_for_selector("#draw")
        return tab

    yield go
    kept = os.environ.get("SCREENSHOTS")
    for i, tab in enumerate(open_pages):
        width = tab.viewport_size["width"]
        tab.screenshot(path=Path(kept or tmp_path) / f"{tmp_path.name}-{i}-{width}.png", full_page=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        tab.context.close()
    assert complaints == []


def draw(tab: Any, **fields: str) -> None:
    for name, value in fields.items():
        tab.get_by_label(name.replace("_", " "), exact=True).fill(value)
    tab.click("#draw")


def saved(tab: Any, folder: Path) -> list[Image.Image]:
    """Each image as a visitor saves it: opened in the gallery, its download button pressed."""
    images: list[Image.Image] = []
    for i in range(tab.locator("#gallery .grid-container img").count()):
        tab.locator("#gallery .grid-container img").nth(i).click()
        with tab.expect_download() as coming:
            tab.locator("#gallery").get_by_label("Download").click()
        path = folder / f"{i}-{coming.value.suggested_filename}"
        coming.value.save_as(path)
        images.append(Image.open(path))
        tab.locator("#gallery").get_by_label("Close").click()
    return images


def test_classes_are_drawn_before_ones_eyes(served: dict[str, Served], visit: Any, tmp_path: Path) -> None:
    tab = visit(served["classes"])
    tab.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const image = document.querySelector('#panel img');
                const told = document.querySelector('#bar [role=status]');
                if (image && told && image.src !== (window.seen.at(-1) ?? [])[0])
                    window.seen.push([image.src, told.innerText]);
            }).observe(document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )
    tab.get_by_label("Classes").click()
    tab.get_by_role("option", name="two", exact=True).click()
    tab.keyboard.press("Escape")
    draw(tab, Images_per_class="2", Seed="41", Steps="200", Guidance="3")
    tab.wait_for_selector("#gallery img")

    seen = tab.evaluate("window.seen")
    assert len({source for source, _ in seen}) >= 4, seen  # the pictures change
    steps = [int(found[1]) for _, said in seen if (found := re.fullmatch(r"step (\d+) of 200", said))]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 4

    images = saved(tab, tmp_path)
    pipe = sampler.open_export(served["classes"].export, "cpu")
    asked = {"class_labels": ["zero"] * 2 + ["two"] * 2, "seeds": [41, 42, 43, 44], "guidance_scale": 3.0}
    known = pipe(**asked, num_inference_steps=200).images
    assert len(images) == 4
    for image, same, label, seed in zip(images, known, asked["class_labels"], asked["seeds"], strict=True):
        assert image.format == "PNG"
        assert (np.asarray(image) == np.asarray(same)).all()
        said = json.loads(image.info["sample"])
        assert (said["seed"], said["class"]) == (seed, label)
        assert Path(str(image.filename)).name[2:] == f"{label}-seed-{seed}.png"

    code = tab.locator("#code .cm-content").inner_text()
    found: dict[str, Any] = {}
    exec(code, found)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found["images"], known, strict=True))


def test_prompts_are_drawn_on_a_phone_in_the_dark(served: dict[str, Served], visit: Any, tmp_path: Path) -> None:
    tab = visit(served["text"], width=390, height=844, scheme="dark")
    assert tab.evaluate("document.body.classList.contains('dark')")
    assert not tab.get_by_label("Classes").is_visible()
    draw(tab, Prompt="")
    told = tab.wait_for_selector("#panel [role=alert]")
    assert told.inner_text() == "Prompt: nothing came; write what to draw"

    tab.get_by_role("button", name="More").click()
    draw(tab, Prompt="a cat", Away_from="a dog", Images="1", Seed="5", Steps="3", Guidance_rescale="0.5")
    tab.wait_for_selector("#gallery img")
    assert tab.locator("#panel [role=alert]").count() == 0
    pipe = sampler.open_export(served["text"].export, "cpu")
    asked = {"prompt": "a cat", "negative_prompt": "a dog", "seeds": 5, "guidance_rescale": 0.5}
    known = pipe(**asked, num_inference_steps=3, guidance_scale=2.0).images[0]
    (image,) = saved(tab, tmp_path)
    assert (np.asarray(image) == np.asarray(known)).all()
    said = json.loads(image.info["sample"])
    assert (said["prompt"], said["negative_prompt"], said["seed"]) == ("a cat", "a dog", 5)


def test_each_mistake_is_told_on_the_page(served: dict[str, Served], visit: Any) -> None:
    tab = visit(served["classes"], width=390, height=844)
    for field, value, told in (
        ("Seed", "-1", "Seed: -1 came, a whole number from 0 to 4294967295 was wanted"),
        ("Seed", "", "Seed: nothing came, a whole number from 0 to 4294967295 was wanted"),
        ("Steps", "2.5", "Steps: 2.5 came, a whole number from 1 to 1000 was wanted"),
        ("Images_per_class", "65", "Images: 65 came, a whole number from 1 to 64 was wanted"),
        ("Guidance", "-2", "Guidance: -2 came, 0 or more was wanted"),
    ):
        before = tab.get_by_label(field.replace("_", " "), exact=True).input_value()
        draw(tab, **{field: value})
        tab.get_by_role("alert").get_by_text(told, exact=True).wait_for()
        tab.wait_for_selector("#draw:enabled")
        tab.get_by_label(field.replace("_", " "), exact=True).fill(before)


def test_a_drawing_stops_and_the_next_one_waits_for_its_turn(served: dict[str, Served], visit: Any) -> None:
    first, second = (visit(served["classes"], scheme=scheme) for scheme in ("light", "dark"))
    draw(first, Steps="1000", Images_per_class="40")
    first.wait_for_selector("#panel img")
    draw(second, Steps="2")
    second.wait_for_selector("#bar [role=status]")
    assert second.locator("#bar [role=status]").inner_text() == "waiting for its turn"
    first.wait_for_timeout(500)
    assert second.locator("#panel img").count() == 0
    first.click("#stop")
    second.wait_for_selector("#gallery img")
    assert first.locator("#bar [role=status]").inner_text() == "stopped"
    assert first.locator("#gallery img").count() == 0

    draw(first, Steps="2", Images_per_class="1")  # and it goes on from there
    first.wait_for_selector("#gallery img")


def test_the_server_calls_nobody_and_ends_as_it_should(served: dict[str, Served]) -> None:
    """The last test: it ends the pages."""
    for page in served.values():
        assert page.end() == 0
        said = page.log.read_text()
        assert "Traceback" not in said, said
        assert "error" not in said.lower(), said
        assert set(page.watched.read_text().split()) <= ITSELF
