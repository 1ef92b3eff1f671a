"""A run's files become one page: what it says, what it escapes, what it leaves out and why, and how large it gets."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from world import World, small_config

from pipeline.config_file import load_config
from pipeline.errors import UsageError
from pipeline.model_card import model_card
from pipeline.reporting import words
from pipeline.reporting.evaluations import evaluation_charts
from pipeline.reporting.images import MAX_BYTES, MAX_SIDE, embed, evenly
from pipeline.reporting.page import keep_report, write_report
from pipeline.reporting.rows import read_table
from pipeline.reporting.thin import MAX_POINTS, thin
from pipeline.run_folder import claim

EVIL = '<script>alert("1")</script>&\'"'


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.data = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(str(dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.said += f" {data}"
        elif self._inside[-1] == "data":
            self.data += data

    @property
    def words(self) -> str:
        """The text that is read, its spaces alike."""
        return " ".join(self.said.split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def charts(self, section: str) -> dict[str, dict[str, Any]]:
        return {chart["title"]: chart for chart in json.loads(self.data)[section]}


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has only just begun: a config and nothing more."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(small_config(tmp_path)))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def write_picture(path: Path, width: int = 40, height: int = 30, noise: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), 120, np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    Image.fromarray(pixels).save(path)


def rows_of(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "loss": 1 / (i + 1), "images_per_s": 24.0, **{n: c[i] for n, c in columns.items()}}
        for i in range(count)
    ]


# The whole page -----------------------------------------------------------------------------------


def test_every_picture_of_a_run_and_its_autoencoder_is_shown(run: Path) -> None:
    places = {
        "samples/step-000000008.png": "samples after 8 steps",
        "samples/grid.png": "images drawn from the export",
        "evaluation/denoising.png": "latents and predictions along one sampling",
        "evaluation/bound.png": "the bound's steps",
        "evaluation/nearest-guidance_2.png": "drawn images beside their nearest training images, guidance 2",
        "../vae/measured/reconstructions.png": "images, what the autoencoder gives back, and the difference",
        "../vae/measured/interpolations.png": "lines between pairs of images, in latents and in pixels",
    }
    for place in places:
        write_picture(run / place)
    (run.parent / "vae" / "measured" / "scores.json").write_text(json.dumps({"reconstruction/psnr_db": 30.0}))
    assert {picture["alt"] for picture in page_of(run).attributes("img")} == set(places.values())


def test_a_run_that_has_only_begun_says_what_is_missing_and_why(run: Path) -> None:
    page = page_of(run)
    for why in (
        "No pictures yet: training saves one every 1,000 steps",
        "No sampling was watched yet",
        "Nothing was logged yet",
        "No scores yet: python -m pipeline evaluate CONFIG",
        "Nothing was scored yet.",
        "No scores were measured while training",
        "Not counted yet: evaluate does",
        "Not looked for yet",
        "It was not measured: python -m pipeline measure-vae CONFIG",
        "None was set aside in training.",
        "None, and nobody looked: train.spike_factor is not set.",
        "Machine and versions are not known",
    ):
        assert why in page.words
    assert not page.attributes("img")
    assert not page.attributes("figure")


def test_a_run_is_told_in_words_and_figures(run: Path) -> None:
    write_rows(run / "metrics.jsonl", rows_of(6, data_wait_s=[0.5] * 6, grad_norm=[2.0] * 6))
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 4, "reason": "step 7: not finite"}))
    (run / "scores.json").write_text(
        json.dumps(
            {
                "checkpoint": "step-000000004",
                "ema": "decay-0.9",
                "validation/frechet_distance": 0.1053,
                "guidance_1/num_images": 1000,
                "guidance_1/frechet_distance": 0.11869,
                "guidance_1/class_accuracy": 0.963,
                "guidance_1/kernel_distance": 0.0123,
                "guidance_1/kernel_distance_standard_error": 0.004,
                "guidance_2/frechet_distance": 0.2947,
                "guidance_2/class_accuracy": 1.0,
                "likelihood/bound_bits_per_dim": 0.35665,
                "likelihood/bound_standard_error": 0.0161,
            }
        )
    )
    page = page_of(run)
    assert "It draws images of 16 × 16 pixels of 10 classes." in page.words
    assert "learns there to tell the noise ε" in page.words
    assert "failed step 7: not finite" in page.words
    assert "Steps 6 of 8" in page.words
    assert "Images seen 72" in page.words  # 6 steps of 12
    assert "Training time 3 s" in page.words  # 72 images at 24 a second
    assert "Fréchet distance 0.119 at guidance 1; real images 0.105" in page.words
    assert "Class accuracy ↑ – 96.3 % 100.0 %" in page.words
    assert "Kernel distance ↓ – 0.012 ± 0.004 –" in page.words
    assert "Variational bound of the latents 0.36 ± 0.02" in page.words
    assert list(page.charts("training")) == ["Loss", "Gradient norm", "Throughput", "Waiting for data"]
    sweep = page.charts("sweep")
    assert sweep["Fréchet distance"]["x"] == [1.0, 2.0]
    assert sweep["Fréchet distance"]["series"][0]["y"] == [0.11869, 0.2947]
    assert sweep["Fréchet distance"]["level"] == [0.1053, "real images"]


def test_numbers_of_images_and_what_few_of_them_do_stand_beside_the_scores(run: Path) -> None:
    names = ("frechet_distance", "kernel_distance", "recall", "inception_score", "class_accuracy")
    scores: dict[str, Any] = {f"{where}/{name}": 0.5 for where in ("validation", "guidance_2") for name in names}
    scores |= {"validation/num_images": 360, "guidance_2/num_images": 1000, "guidance_2/num_train_images": 1437}
    scores |= {"likelihood/num_images": 64, "likelihood/ode_num_images": 16}
    scores |= {f"likelihood/{name}_bits_per_dim": 2.5 for name in ("bound", "ode")}
    (run / "scores.json").write_text(json.dumps(scores))
    measured = {"reconstruction/psnr_db": 30.0, "reconstruction/num_images": 360, "latent/scale": 1.5}
    (run.parent / "vae" / "measured").mkdir(parents=True)
    (run.parent / "vae" / "measured" / "scores.json").write_text(json.dumps(measured))
    page = page_of(run)
    for said in (
        "M = 1,437 real training images are the reference",
        "Score real, held out, N = 360 guidance 2, N = 1,000 bias",
        "Fréchet distance ↓ 0.500 0.500 biased up, ~1/N",
        "Kernel distance ↓ 0.500 0.500 no bias, ± error",
        "Recall ↑ 0.500 0.500 grows with N",
        "Inception score ↑ 0.500 0.500 biased down, small N",
        "Fréchet distance 0.500 at guidance 2; real images 0.500; N = 1,000",
        "Variational bound of the latents 2.50 N = 64",
        "Likelihood of the latents by the ODE 2.50 N = 16",
        "PSNR 30 dB N = 360 Latents are scaled by 1.50",
    ):
        assert said in page.words, said


def test_the_first_networks_distance_is_the_first_figure(run: Path) -> None:
    scores = {"guidance_1/frechet_distance": 7.25, "guidance_1/dinov2/fid": 31.5, "validation/dinov2/fid": 12.5}
    for networks, said in (
        (("classifier", "dinov2"), "Fréchet distance 7.25 at guidance 1"),
        (("dinov2", "classifier"), "Fréchet distance (dinov2) 31.5 at guidance 1; real images 12.5"),
    ):
        references = {f"references/{name}": "f" * 16 for name in networks}
        (run / "scores.json").write_text(json.dumps(references | scores))
        first = page_of(run).words.partition("Samples")[2]
        assert said in first


def test_what_users_write_is_never_html(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["conditioning"] |= {"num_classes": 2, "class_names": [EVIL, "two"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_rows(run / "metrics.jsonl", rows_of(2, **{EVIL: [1.0, 2.0]}))
    write_rows(run / "quarantine.jsonl", [{"position": 1, "shard": EVIL, "key": EVIL, "reason": EVIL}])
    write_rows(run / "alarms.jsonl", [{"step": 1, "alarm": EVIL, "told": EVIL}])
    write_rows(run / "spikes.jsonl", [{"step": 1, "back_to_step": 0, "why": EVIL}])
    write_rows(run / "evaluations.jsonl", [evaluation(1, ema=EVIL, scores={EVIL: 1.0})])
    (run / "status.json").write_text(json.dumps({"state": EVIL, "step": 1, "reason": EVIL}))
    (run / "scores.json").write_text(
        json.dumps({"checkpoint": EVIL, f"guidance_{EVIL}/{EVIL}": 1, f"validation/{EVIL}": EVIL})
    )
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.attributes("script")) == 2  # the data, and the program
    assert "<script>alert" not in text
    assert page.words.count(EVIL) >= 8  # it is told, as it stands
    assert json.loads(page.data)["evaluation"][0]["title"].startswith("<script>")


def test_the_page_asks_nobody_for_anything(run: Path) -> None:
    write_rows(run / "metrics.jsonl", rows_of(9))
    write_picture(run / "samples" / "step-000000001.png")
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#")), attributes
    assert not page.attributes("link")
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import\(", text)
    (policy,) = [meta["content"] for meta in page.attributes("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy
    assert "Permission is hereby granted" in text  # uPlot's license goes where uPlot goes


def test_every_picture_and_chart_is_told_in_words_too(run: Path) -> None:
    write_rows(run / "metrics.jsonl", rows_of(9))
    write_rows(run / "evaluations.jsonl", [evaluation(2), evaluation(4)])
    for step in (1, 2):
        write_picture(run / "samples" / f"step-{step:09d}.png")
    write_picture(run / "samples" / "grid.png")
    write_picture(run / "evaluation" / "nearest-guidance_2.png")
    write_picture(run / "evaluation" / "denoising.png")
    page = page_of(run)
    images = page.attributes("img")
    assert len(images) == 5
    assert all(image["alt"] and image["width"] == "40" and image["height"] == "30" for image in images)
    charts = [each for each in page.attributes("div") if each.get("class") == "canvas"]
    assert len(charts) == 3
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert "Loss over 9 logged rows: 1 at step 1, 0.111 at step 9; lowest 0.111" in str(charts[0]["aria-label"])


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(world: World) -> None:
    run = world.run_dir
    run.mkdir()
    (run / "config.yaml").write_text(world.config.read_text())
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 4, "reason": None}))
    assert "not running status.json says that it runs, but no process" in page_of(run).words
    claim(run, load_config(world.config), ())  # this process has it now
    page = page_of(run)
    assert "no process" not in page.words
    assert "torch" in page.words  # what runs it is noted


def test_broken_files_are_passed_over(run: Path) -> None:
    write_rows(run / "metrics.jsonl", [*rows_of(3), {"loss": 1.0}], torn='not json\n{"step": 9, "lo')
    write_rows(run / "evaluations.jsonl", [evaluation(2), {"step": None}, {"scores": 3}], torn='{"step": 4')
    for name in ("scores.json", "status.json", "evaluation/bound.json", "environment.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"torn": ')
    (run / "evaluation" / "nearest-guidance_1.png").write_bytes(b"\x89PNG torn")
    page = page_of(run)
    assert page.charts("training")["Loss"]["x"] == [1, 2, 3]
    assert "2 lines could not be read" in page.words
    assert "Not looked for yet" in page.words
    assert page.charts("evaluation")["Fréchet distance"]["x"] == [2]


@pytest.mark.parametrize("version", ["this", "another"])
def test_keys_of_a_store_are_not_told(run: Path, version: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["remote"] = {"options": {"key": "AKIA-secret", "client_kwargs": {"token": "hidden-secret"}}}
    text = yaml.safe_dump(config | ({} if version == "this" else {"not_known": 1}))
    (run / "config.yaml").write_text(text)
    page = write_report(run).read_text(encoding="utf-8")
    assert "secret" not in page and "client_kwargs: &#39;***&#39;" in page and "image_size: 16" in page
    assert (run / "config.yaml").read_text() == text
    if version == "this":
        state = {"latents": {"origin": {"source_fingerprint": "f", "encoder_sha256": "e"}, "scale": 1.0}, "step": 8}
        said = {"weights": "decay-0.9", "license_id": "other", "stock": False, "prompt": None}
        card = model_card(load_config(run / "config.yaml"), state | {"data": {"position": 96}}, **said)
        assert "secret" not in card and "client_kwargs: '***'" in card and "image_size: 16" in card


def test_a_config_of_another_version_leaves_the_rest(run: Path) -> None:
    write_rows(run / "metrics.jsonl", rows_of(3))
    (run / "config.yaml").write_text("run_dir: x\nnot_known: 1\n")
    page = page_of(run)
    assert "What was trained can't be told: " in page.words
    assert "Loss" in page.charts("training")


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no run here \(no config.yaml\)"):
        write_report(tmp_path)
    keep_report(tmp_path)  # where a training goes on it is a warning
    assert "warning: " in capsys.readouterr().err


def test_a_report_that_fails_is_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html" / "in the way").mkdir(parents=True)
    keep_report(run)
    assert f"warning: {run}/report.html could not be made: " in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "report.html"]


def test_training_and_evaluate_leave_a_report(world: World) -> None:
    assert world.do("train", "evaluation.every_steps=4") == [0], world.said()
    first = Page((world.run_dir / "report.html").read_text(encoding="utf-8"))
    assert "run done" in first.words
    assert "No scores yet" in first.words
    assert len([image for image in first.attributes("img") if "samples after" in str(image["alt"])]) == 2
    assert any("along one sampling" in str(image["alt"]) for image in first.attributes("img"))
    (world.run_dir / "evaluation" / "denoising.png").unlink()
    assert world.do("export") == [0], world.said()
    assert world.do("evaluate") == [0], world.said()
    page = Page((world.run_dir / "report.html").read_text(encoding="utf-8"))
    assert any("along one sampling" in str(image["alt"]) for image in page.attributes("img"))
    scores = json.loads((world.run_dir / "scores.json").read_text())
    for name in ("guidance_1", "guidance_2", "validation"):
        assert words.number(scores[f"{name}/precision"]) in page.words
    bound = json.loads((world.run_dir / "evaluation" / "bound.json").read_text())
    steps = page.charts("bound")["All steps up to t"]["series"][0]["y"]
    total = bound["l_0"] + bound["l_T"] + steps[-1]  # of the normalised latents: the scale's logarithm apart
    parts = [scores[f"likelihood/{part}_bits_per_dim"] for part in ("l_T", "kl")]
    assert steps[-1] == pytest.approx(parts[1], rel=1e-4)
    assert total - bound["l_0"] == pytest.approx(sum(parts), rel=1e-4)


# Curves -------------------------------------------------------------------------------------------


@given(arrays(np.float64, st.integers(1, 9000), elements=st.floats(-1e6, 1e6)), st.integers(30, 2000))
def test_thinning_keeps_extremes_and_order(y: np.ndarray, most: int) -> None:
    x = np.arange(len(y), dtype=np.float64)
    curve = thin(x, y, most)
    assert curve.num_points <= most
    assert (np.diff(curve.x) > 0).all()
    low, high = (curve.y if edge is None else edge for edge in (curve.low, curve.high))
    assert (low.min(), high.max()) == (y.min(), y.max())
    slack = 1e-9 * (1 + np.abs(curve.y))
    assert (low <= curve.y + slack).all()
    assert (curve.y <= high + slack).all()


def test_a_spike_stays_where_it_was_and_means_are_means() -> None:
    x, y = np.arange(1_000_000, dtype=np.float64), np.ones(1_000_000)
    y[123_456] = 50.0
    curve = thin(x, y)
    assert curve.num_points <= MAX_POINTS
    assert curve.high is not None
    assert curve.high.max() == 50.0
    span = 1_000_000 / (MAX_POINTS // 3)
    assert abs(curve.x[curve.high.argmax()] - 123_456) <= span
    assert np.median(curve.y) == 1.0
    assert (curve.y * span).sum() == pytest.approx(y.sum(), rel=1e-3)


def test_a_short_curve_is_left_as_it_is_and_holes_are_left_out() -> None:
    y = np.array([3.0, np.nan, 1.0])
    curve = thin(np.array([1.0, 2.0, 3.0]), y)
    assert (curve.x.tolist(), curve.y.tolist(), curve.low) == ([1.0, 3.0], [3.0, 1.0], None)


def test_rows_of_one_step_may_come_apart_and_late(tmp_path: Path) -> None:
    """As figures noted beside a step do."""
    rows = [{"step": 1, "a": 1.0}, {"step": 3, "a": 3.0}, {"step": 2, "b": 5.0}, {"step": 3, "b": 7, "c": "word"}]
    write_rows(tmp_path / "metrics.jsonl", rows)
    table = read_table(tmp_path / "metrics.jsonl")
    assert table.step.tolist() == [1, 2, 3, 3]
    assert set(table.columns) == {"a", "b"}
    np.testing.assert_array_equal(table.columns["a"], [1, np.nan, 3, np.nan])
    np.testing.assert_array_equal(table.columns["b"], [np.nan, 5, np.nan, 7])


def evaluation(step: int, guidance: float = 1.0, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "checkpoint": None,
        "ema": "decay-0.9",
        "guidance_scale": guidance,
        "num_inference_steps": 25,
        "num_images": 100,
        "asked": "a1",
        "validation_images": "v1",
        "references": {"classifier": "f1"},
        "scores": {"frechet_distance": step / 10},
        **changed,
    }


def lines_of(rows: list[dict[str, Any]], title: str = "Fréchet distance") -> dict[str, list[float | None]]:
    (chart,) = [chart for chart in evaluation_charts(rows) if chart.title == title]
    return {series.label: series.y for series in chart.series}


def test_what_was_measured_alike_is_one_curve() -> None:
    assert lines_of([evaluation(2), evaluation(4)]) == {"": [0.2, 0.4]}
    assert lines_of([evaluation(2), evaluation(4), evaluation(4, 2.0)]) == {
        "guidance 1": [0.2, 0.4],
        "guidance 2": [None, 0.4],
    }


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"references": {"classifier": "f2"}}, "references 2"),
        ({"asked": "a2"}, "wishes 2"),
        ({"validation_images": "v2"}, "held-out set 2"),
        ({"ema": "decay-0.99"}, "decay-0.99"),
        ({"num_images": 5000}, "5,000 images"),
        ({"num_inference_steps": 50}, "50 steps"),
        ({"guidance_scale": 3.5}, "guidance 3.5"),
    ],
)
def test_what_was_measured_otherwise_is_another(changed: dict[str, Any], label: str) -> None:
    lines = lines_of([evaluation(2), evaluation(4), evaluation(6, **changed)])
    assert list(lines.values()) == [[0.2, 0.4, None], [None, None, 0.6]]
    assert list(lines)[1] == label


def test_another_networks_references_part_no_curve() -> None:
    rows = [
        evaluation(2, references={"a": "f1"}, scores={"a/fid": 1.0}),
        evaluation(4, references={"a": "f1", "b": "g"}, scores={"a/fid": 2.0, "b/fid": 3.0}),
    ]
    assert lines_of(rows, "Fréchet distance (a)") == {"": [1.0, 2.0]}


def test_losses_of_held_out_images_are_the_same_at_every_guidance() -> None:
    scores = {"validation_loss/mean": 0.5, "validation_loss/band-0": 0.75, "validation_loss/band-1": 0.25}
    rows = [evaluation(2, guidance, scores=scores, held_out="h") for guidance in (1.0, 2.0)]
    assert lines_of(rows, "Validation loss") == {"": [0.5]}
    assert lines_of(rows, "Validation loss by noise") == {"band 0 (least noise)": [0.75], "band 1": [0.25]}


def test_real_images_are_a_level_not_a_curve() -> None:
    (chart,) = evaluation_charts([evaluation(2, scores={"a/fid": 1.0, "validation/a/fid": 0.1})])
    assert chart.level == (0.1, "real images")


# Pictures and words -------------------------------------------------------------------------------


def test_pictures_are_bounded(tmp_path: Path) -> None:
    write_picture(tmp_path / "small.png")
    write_picture(tmp_path / "large.png", 3000, 2000, noise=True)
    small, large = embed(tmp_path / "small.png"), embed(tmp_path / "large.png")
    assert small is not None
    assert large is not None
    assert (small.width, small.height, small.shrunk_from) == (40, 30, None)
    assert small.uri.startswith("data:image/png;")
    assert large.shrunk_from == (3000, 2000)
    assert max(large.width, large.height) <= MAX_SIDE
    assert len(large.uri) * 3 / 4 <= MAX_BYTES + 100
    assert large.width / large.height == pytest.approx(1.5, rel=0.02)
    with Image.open(io.BytesIO(base64.b64decode(large.uri.partition(",")[2]))) as opened:
        assert opened.size == (large.width, large.height)
    assert embed(tmp_path / "missing.png") is None


def test_of_many_pictures_the_first_and_last_are_kept() -> None:
    paths = [Path(str(i)) for i in range(1000)]
    chosen = evenly(paths, 24)
    assert len(chosen) == len(set(chosen)) == 24
    assert (chosen[0], chosen[-1]) == (paths[0], paths[-1])
    assert evenly(paths[:3], 24) == paths[:3]


def test_a_report_says_how_many_pictures_it_leaves_out(run: Path) -> None:
    for step in range(1, 31):
        write_picture(run / "samples" / f"step-{step:09d}.png")
    page = page_of(run)
    assert "24 of 30 pictures are shown." in page.words
    assert len(page.attributes("img")) == 24


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (1437, "1,437"),
        (102400.0, "102,400"),
        (0.11869, "0.119"),
        (-0.00259, "−0.00259"),
        (37.70562, "37.7"),
        (391.49, "391"),
        (1234.5, "1,234"),
        (0.00001234, "1.23 × 10⁻⁵"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_as_many_digits_as_mean_something(value: float, said: str) -> None:
    assert words.number(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.25, "0.2 s"), (59, "59 s"), (312, "5 min 12 s"), (3600, "1 h"), (12_240, "3 h 24 min"), (1e6, "11 days 13 h")],
)
def test_spans_of_time_are_told_in_two_units(seconds: float, said: str) -> None:
    assert words.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == said


def test_an_error_says_how_many_digits_count() -> None:
    assert words.with_error(37.70562, 0.0612) == "37.71 ± 0.06"
    assert words.with_error(-2.9357, 0.0088) == "−2.936 ± 0.009"
    assert words.with_error(5.0, 0.0) == "5"
