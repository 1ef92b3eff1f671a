"""The report in a real browser without a network, light and dark, on desktop and phone: nothing wrong, nothing fetched.

With SCREENSHOTS=FOLDER the last look of each page is kept there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from world import small_config

from pipeline.reporting.page import write_report

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
NUM_ROWS, SPIKE_STEP, SPIKE = 5000, 3210, 44.0
COLORS = {100: (200, 30, 30), 200: (30, 160, 30), 300: (30, 30, 200)}  # of the samples after a step
INK = """canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) seen.add(data.slice(i, i + 3).join());
    return seen.size;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that has all its parts."""
    root = tmp_path_factory.mktemp("report")
    run = root / "run"
    for folder in ("samples", "evaluation"):
        (run / folder).mkdir(parents=True)
    config = small_config(root)
    config["conditioning"]["class_names"] = ["<script>throw new Error('escaped')</script>", *"abcdefghi"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": i, "loss": 1 + 1 / i, "learning_rate": 1e-4, "grad_norm": 1.0, "images_per_s": 9 + i % 3}
        for i in range(1, NUM_ROWS + 1)
    ]
    rows[SPIKE_STEP - 1]["loss"] = SPIKE
    scores: dict[str, float] = {}
    evaluations: list[dict[str, Any]] = []
    for guidance in (1.0, 2.0, 4.0):
        scores |= {f"guidance_{guidance:g}/precision": guidance / 5, f"guidance_{guidance:g}/frechet_distance": 1.0}
        for step in (1000, 2000, 3000):
            row = {"step": step, "ema": "decay-0.9", "guidance_scale": guidance, "num_inference_steps": 5}
            row |= {"num_images": 10, "references": {"a": "f"}, "scores": {"a/fid": 1 / step, "precision": 0.0}}
            evaluations.append(row)
    t = [2.0**k for k in range(10)]
    bound = {"num_images": 8, "l_0": 1.0, "l_T": 0.1, "t": t, "bits": [1 / each for each in t]}
    bound |= {"errors": [0.1 / each for each in t], "counts": [1.0] * len(t)}
    for name, lines in (
        ("metrics.jsonl", rows),
        ("evaluations.jsonl", evaluations),
        ("spikes.jsonl", [{"step": SPIKE_STEP, "back_to_step": 3000, "why": "a spike"}]),
        ("quarantine.jsonl", [{"position": 3, "shard": "a" * 200, "key": "k", "reason": "b" * 300}]),
    ):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in (("scores.json", scores), ("status.json", {"state": "done", "step": NUM_ROWS})):
        (run / name).write_text(json.dumps(value))
    (run / "evaluation" / "bound.json").write_text(json.dumps(bound))
    for step, color in COLORS.items():
        Image.new("RGB", (300, 200), color).save(run / "samples" / f"step-{step:09d}.png")
    for path in ("samples/grid.png", "evaluation/denoising.png", "evaluation/nearest-guidance_2.png"):
        Image.effect_noise((2400, 700), 90).convert("RGB").save(run / path)
    return write_report(run)


@pytest.fixture(scope="module")
def chromium() -> Generator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, report: Path, tmp_path: Path) -> Generator[Any]:
    """Open the report; what it asks for beside itself, and what it complains of, fails the test."""
    complaints: list[str] = []
    pages: list[tuple[str, Any]] = []

    def go(width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **options
        )
        tab = context.new_page()
        pages.append((f"report-{width}-{scheme}", tab))
        address = report.as_uri()
        tab.on(
            "request",
            lambda request: None if request.url.startswith(("data:", address)) else complaints.append(request.url),
        )
        tab.on("console", lambda said: complaints.append(said.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(address)
        return tab

    yield go
    kept = os.environ.get("SCREENSHOTS")
    for name, tab in pages:
        tab.screenshot(path=Path(kept or tmp_path) / f"{name}.png", full_page=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]  # nothing sticks out
        tab.context.close()
    assert complaints == []


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, WCAG 2.2."""
    channels = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_whole(visit: Any, width: int, scheme: str) -> None:
    tab = visit(width, scheme)
    images = tab.locator("img")
    assert images.count() == 6
    assert all(images.evaluate_all("all => all.map(image => image.complete && image.naturalWidth > 0)"))
    canvases = tab.locator(".chart canvas").all()
    assert len(canvases) == tab.locator(".chart").count() == 4 + 2 + 2 + 2
    for canvas in canvases:
        assert canvas.evaluate(INK) > 5  # a line, its axis and their edges
    fits = ".chart canvas, .plate img:not([hidden])"
    for right in tab.locator(fits).evaluate_all("all => all.map(each => each.getBoundingClientRect().right)"):
        assert right <= width
    places = (("body", "backgroundColor"), ("body", "color"), ("footer", "color"))
    paper, ink, quiet = (
        tab.locator(place).evaluate(f"each => getComputedStyle(each).{name}") for place, name in places
    )
    assert (luminance(paper) > 0.5) == (scheme == "light")
    assert contrast(ink, paper) >= 7
    assert contrast(quiet, paper) >= 4.5


@pytest.mark.parametrize("width", WIDTHS)
def test_the_slider_goes_through_the_samples(visit: Any, width: int, tmp_path: Path) -> None:
    tab = visit(width)
    slider = tab.get_by_label("Training step of the samples")

    def shown() -> tuple[str, tuple[int, ...]]:
        """What is said, and the color in the middle of the picture as it is on the screen."""
        box = tab.locator("#frames .scroll")
        box.screenshot(path=tmp_path / "shown.png")
        with Image.open(tmp_path / "shown.png") as picture:
            middle = picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))
        return tab.locator("#at").inner_text(), middle

    assert shown() == ("step 300", COLORS[300])
    slider.focus()
    tab.keyboard.press("ArrowLeft")
    assert shown() == ("step 200", COLORS[200])
    tab.keyboard.press("Home")
    assert shown() == ("step 100", COLORS[100])
    slider.fill("2")
    assert shown() == ("step 300", COLORS[300])
    tab.get_by_label("Play").click()  # from the first to the last
    assert shown()[0] == "step 100"
    tab.get_by_label("Play").wait_for()
    assert shown() == ("step 300", COLORS[300])


def test_a_chart_tells_its_values_and_changes_its_axis(visit: Any) -> None:
    tab = visit()
    loss = tab.locator(".chart", has_text="Loss").first
    assert loss.locator(".readout").inner_text().split("\n") == ["last 1.00", "band: lowest to highest"]
    log = loss.get_by_role("button", name="log")
    assert log.get_attribute("aria-pressed") == "true"  # the spike made it so
    loss.scroll_into_view_if_needed()
    over = loss.locator(".u-over").bounding_box()
    told: list[str] = []
    for aside in range(-4, 5):  # pixels: a mean lies in the middle of what it stands for
        tab.mouse.move(over["x"] + over["width"] * SPIKE_STEP / NUM_ROWS + aside, over["y"] + over["height"] / 2)
        told.append(loss.locator(".readout").inner_text())
    assert any(f"to {SPIKE:g}" in each for each in told), told
    assert any(f"spike at {SPIKE_STEP:,}" in each for each in told), told
    before = loss.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    log.click()
    assert log.get_attribute("aria-pressed") == "false"
    assert loss.locator("canvas").evaluate("canvas => canvas.toDataURL()") != before


def test_dragging_looks_closer_at_all_curves_of_the_training_alike(visit: Any) -> None:
    tab = visit()
    chart = tab.locator(".chart").first
    chart.scroll_into_view_if_needed()
    over = chart.locator(".u-over").bounding_box()
    before = chart.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    tab.mouse.move(over["x"] + 0.2 * over["width"], over["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(over["x"] + 0.4 * over["width"], over["y"] + 20, steps=4)
    tab.mouse.up()
    tab.wait_for_timeout(100)
    closer = chart.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    assert closer != before
    tab.mouse.dblclick(over["x"] + 0.5 * over["width"], over["y"] + 20)
    tab.wait_for_timeout(100)
    assert chart.locator("canvas").evaluate("canvas => canvas.toDataURL()") == before


def test_colours_can_be_chosen(visit: Any) -> None:
    tab = visit(scheme="light")

    def paper() -> float:
        return luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    chart = tab.locator(".chart canvas").first
    light = chart.evaluate("canvas => canvas.toDataURL()")
    theme = tab.locator("#theme")
    assert paper() > 0.5
    theme.click()
    assert paper() > 0.5
    theme.click()
    assert paper() < 0.1
    assert theme.get_attribute("aria-label") == "Colours: dark"
    assert chart.evaluate("canvas => canvas.toDataURL()") != light  # its lines are on another paper
    theme.click()
    assert paper() > 0.5
    tab.emulate_media(color_scheme="dark")  # and then it follows the system
    assert paper() < 0.1


def test_numbers_and_pictures_are_there_without_a_script(visit: Any) -> None:
    tab = visit(java_script_enabled=False)
    assert tab.locator("#frames img:not([hidden])").get_attribute("data-step") == "300"
    assert "need JavaScript" in tab.inner_text("noscript")
    assert tab.locator("#scores tbody tr").count() == 2


def test_the_numbers_of_the_page_are_those_of_the_run(visit: Any) -> None:
    tab = visit()
    data = json.loads(tab.locator("#data").text_content())
    highest = max(data["training"][0]["series"][0]["high"])
    assert math.isclose(highest, SPIKE)
    assert [chart["title"] for chart in data["bound"]] == ["What the step at t costs", "All steps up to t"]
