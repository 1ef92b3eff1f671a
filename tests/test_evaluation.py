"""Evaluations in the training and by hand: the same images, the same numbers, whatever came between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file, save_file
from test_report import Page
from world import FORKSERVER, World, free_port, losses, rows, run_rank

from pipeline.config_evaluation import EvaluationConfig
from pipeline.config_file import load_config
from pipeline.data.dataset import read_images
from pipeline.evaluate import set_beside
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.distances import frechet_distance
from pipeline.reporting import words
from pipeline.reporting.charts import bookkeeping
from pipeline.reporting.words import number
from pipeline.score_rows import curves_of, flat_scores, told_apart

IN_LOOP = ("evaluation.scores_every_steps=4", "evaluation.bits=true")
NETWORK = {
    *("fid", "kid", "kid_standard_error", "precision", "recall", "density", "coverage", "inception_score"),
    *("near_copy_share", "num_reference_images"),
}


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """Equal rows: to the last digit where images give the number, to 1e-6 where a network's float32 sums do."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert {k: v for k, v in one.items() if k != "scores"} == {k: v for k, v in other.items() if k != "scores"}
        assert one["scores"].keys() == other["scores"].keys()
        for name, value in one["scores"].items():
            is_sum = name.startswith(("validation_loss", "bits_per_dim"))
            assert other["scores"][name] == (pytest.approx(value, rel=1e-6) if is_sum else value), name


@pytest.fixture(scope="module")
def scored(made: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run of eight steps that was evaluated after four and eight."""
    import yaml
    from world import small_config

    here = World(tmp_path_factory.mktemp("scored"))
    here.config.write_text(yaml.safe_dump(small_config(made.root) | {"run_dir": str(here.run_dir)}))
    assert here.do("train", *IN_LOOP) == [0], here.said()
    return here


def test_a_training_writes_a_row_for_each_evaluation_and_guidance(scored: World) -> None:
    found = evaluations(scored.run_dir)
    assert [(row["step"], row["guidance_scale"]) for row in found] == [(4, 1.0), (4, 2.0), (8, 1.0), (8, 2.0)]
    last = found[-1]
    assert (last["checkpoint"], last["ema"]) == ("step-000000008", "decay-0.9")
    assert (last["num_images"], last["num_inference_steps"]) == (20, 2)
    assert {name for name in last["scores"] if name.startswith("classifier/")} == {f"classifier/{n}" for n in NETWORK}
    assert {f"validation_loss/band-{band}" for band in range(4)} <= last["scores"].keys()
    assert {"accuracy", "bits_per_dim", "validation/classifier/fid", "validation/num_images"} <= last["scores"].keys()
    assert last["scores"]["validation_loss/mean"] < found[0]["scores"]["validation_loss/mean"], "it learned nothing"
    kept = sorted(path.name.rpartition("-")[0] for path in (scored.run_dir / "evaluation").iterdir())
    assert kept == ["step-000000008-guidance-1", "step-000000008-guidance-2"], "those of older steps are not needed"


def test_its_numbers_are_curves_and_the_newest_are_in_scores_json(scored: World) -> None:
    last = evaluations(scored.run_dir)[-1]
    (of_step,) = (row for row in rows(scored.run_dir) if row["step"] == 8 and "loss" not in row)
    assert of_step["guidance_2/classifier/kid"] == last["scores"]["classifier/kid"]
    assert of_step["validation_loss/band-3"] == last["scores"]["validation_loss/band-3"]
    assert "guidance_1/classifier/kid" in of_step and "bits_per_dim" in of_step
    assert not [name for name in of_step if name.startswith("validation/") or "num_" in name]
    flat = json.loads((scored.run_dir / "scores.json").read_text())
    assert flat["checkpoint"] == "step-000000008"
    assert flat["guidance_2/frechet_distance"] == last["scores"]["classifier/fid"]
    assert flat["guidance_2/class_accuracy"] == last["scores"]["accuracy"]
    assert flat["validation/coverage"] == last["scores"]["validation/classifier/coverage"]


class Real(NamedTuple):
    """The real images, and the classifier that is fitted on the training's."""

    train: np.ndarray  # uint8 [N,H,W,3]
    held_out: np.ndarray
    classifier: ImageClassifier

    def seen(self, images: np.ndarray) -> np.ndarray:
        """Its features of images, in calls of 8, as the program makes them."""
        return np.concatenate([self.classifier.features(images[i : i + 8]) for i in range(0, len(images), 8)])


@pytest.fixture(scope="module")
def real(scored: World) -> Real:
    config = load_config(scored.config)
    folders = (config.data.train_images[0], str(config.data.validation_images))
    train, held_out = (read_images(folder, size=16, limit=360) for folder in folders)
    assert train.labels is not None
    return Real(train.pixels, held_out.pixels, ImageClassifier(3).fit(train.pixels, train.labels))


@pytest.fixture(scope="module")
def exported(scored: World) -> Path:
    """The same run without its evaluations, exported; `evaluate` drew all anew."""
    run = scored.root / "exported"
    shutil.copytree(scored.run_dir, run)
    shutil.rmtree(run / "evaluation")
    (run / "evaluations.jsonl").unlink()
    assert scored.do("export", f"run_dir={run}") == [0], scored.said()
    assert scored.do("evaluate", f"run_dir={run}", "evaluation.bits=true") == [0], scored.said()
    return run


def test_the_last_numbers_are_those_of_the_export_drawn_anew(scored: World, exported: Path) -> None:
    before = evaluations(scored.run_dir)
    close(before[2:], evaluations(exported))
    scores = json.loads((exported / "scores.json").read_text())
    assert scores["likelihood/bound_bits_per_dim"] == pytest.approx(before[-1]["scores"]["bits_per_dim"], rel=1e-6)
    assert (exported / "evaluation" / "nearest-guidance_2.png").stat().st_size > 500


def test_images_are_held_against_those_of_the_training(exported: Path, real: Real) -> None:
    """And the training's against held-out ones: the numbers, counted here from the pictures."""
    scores = json.loads((exported / "scores.json").read_text())
    (folder,) = exported.glob("evaluation/step-*-guidance-2-*")
    drawn = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
    for name, images in (("guidance_2", drawn), ("validation", real.held_out)):
        fid = frechet_distance(real.seen(real.train), real.seen(images))
        assert scores[f"{name}/frechet_distance"] == pytest.approx(fid, rel=1e-6), name
    assert scores["validation/near_copy_share"] < 0.1, "the held-out images are the training's own"


def test_the_autoencoder_s_distance_is_of_held_out_images_and_what_it_makes_of_them(exported: Path, real: Real) -> None:
    scores = json.loads((exported / "scores.json").read_text())
    vae = AutoencoderKL.from_pretrained(exported / "export" / "vae")
    found: list[np.ndarray] = []
    with torch.no_grad():
        for x in torch.from_numpy(real.held_out).permute(0, 3, 1, 2).split(8):
            z = vae.encode(x / 127.5 - 1).latent_dist.mode()
            found.append(((vae.decode(z).sample + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy())
    given_back = np.concatenate(found).astype(np.uint8)
    fid = frechet_distance(real.seen(real.held_out), real.seen(given_back))
    assert scores["vae/classifier/fid"] == pytest.approx(fid, rel=1e-4)
    assert scores["vae/num_images"] == len(given_back) == 360


def test_the_report_s_last_numbers_are_those_of_evaluate_on_the_export(exported: Path) -> None:
    page = Page((exported / "report.html").read_text(encoding="utf-8"))
    charts = page.charts("evaluation")
    compared = 0
    for row in evaluations(exported):
        for name, value in row["scores"].items():
            if name.startswith(("validation", "bits_per_dim")) or bookkeeping(name):
                continue
            chart = charts[words.score_of(name).title]
            (line,) = (each for each in chart["series"] if each["label"] == f"guidance {row['guidance_scale']:g}")
            assert chart["x"][-1] == 8 and line["y"][-1] == pytest.approx(value, rel=1e-5), name
            compared += 1
            real_ones = row["scores"].get(f"validation/{name}")
            assert real_ones is None or chart["level"][0] == pytest.approx(real_ones, rel=1e-5), name
    assert compared == 2 * 9
    scores = json.loads((exported / "scores.json").read_text())
    for name in ("frechet_distance", "class_accuracy", "coverage"):
        for column in ("guidance_1", "guidance_2", "validation"):
            written = words.score_of(name).write(scores[f"{column}/{name}"])
            assert " ".join(written.split()) in page.words, f"{column}/{name}"


def test_the_export_draws_nothing_that_the_training_drew(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    kept = {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("*.npy")}
    assert scored.do("export", f"run_dir={run}") == [0], scored.said()
    assert scored.do("evaluate", f"run_dir={run}", "evaluation.bits=true") == [0], scored.said()
    assert {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("*.npy")} == kept
    close(evaluations(scored.run_dir), evaluations(run))  # in the place of the training's own


def test_a_checkpoint_is_scored_without_an_export(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    (run / "evaluations.jsonl").unlink()
    words = (f"run_dir={run}", "evaluation.bits=true")
    assert scored.do("evaluate", *words, "--checkpoint", "newest") == [0], scored.said()
    close(evaluations(scored.run_dir)[2:], evaluations(run))
    assert scored.do("evaluate", *words, "--checkpoint", "step-000000004", "--ema", "decay-0.99") == [0], scored.said()
    first, second = evaluations(run)[:2]
    assert (first["step"], first["ema"], first["checkpoint"]) == (4, "decay-0.99", "step-000000004")
    assert first["guidance_scale"] != second["guidance_scale"]
    for wrong, told in (
        (("--checkpoint", "best"), "--checkpoint: 'best' came; step-000001000 or newest was wanted"),
        (("--checkpoint", "step-000000005"), "there are checkpoints of step 8, 4"),
        (("--checkpoint", "newest", "--ema", "decay-0.5"), "'decay-0.5' came; known: decay-0.9, decay-0.99"),
        (("--ema", "decay-0.99"), "--ema: an export has one average"),
    ):
        assert scored.do("evaluate", *words, *wrong, log=tmp_path / "wrong.txt") == [2]
        assert told in (tmp_path / "wrong.txt").read_text()
    assert "Traceback" not in (tmp_path / "wrong.txt").read_text()


# Stopped and gone on with -------------------------------------------------------------------------


def wait_for(found: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found()


LONG = (*IN_LOOP, "evaluation.num_inference_steps=20", "evaluation.num_images=64")


@pytest.fixture(scope="module")
def straight(scored: World) -> Path:
    """A run whose evaluations take a second or two."""
    run = scored.root / "straight"
    assert scored.do("train", *LONG, f"run_dir={run}") == [0], scored.said()
    return run


@pytest.mark.parametrize(("how", "step"), [("SIGUSR1", 4), ("SIGTERM", 8), ("SIGKILL", 8)])
def test_stopped_while_it_draws_it_goes_on(world: World, straight: Path, how: str, step: int) -> None:
    """In the middle of the training and at its end: what was drawn stays, the numbers are a straight run's."""
    stopped = world.root / "stopped"
    started = world.start("train", *LONG, f"run_dir={stopped}")
    drawn = f"evaluation/step-{step:09d}-guidance-1-*/*.npy"
    wait_for(lambda: len(list(stopped.glob(drawn))) >= 2)
    wait_for((stopped / "checkpoints" / f"step-{step:09d}" / "manifest.json").exists)  # a kill costs no steps
    os.kill(int(started[0].pid or 0), getattr(signal, how))
    started[0].join(60)
    portions = {path: path.stat().st_mtime_ns for path in stopped.glob(drawn)}
    assert 2 <= len(portions) < 8, "it was not stopped within a few portions"
    if how != "SIGKILL":
        assert started[0].exitcode == 1
        status = world.status(stopped)
        assert status == {"state": "preempted", "step": step, "reason": f"{how} after step {step}"}
        assert step == 4 or evaluations(stopped)[-1]["step"] == 4
    assert world.do("train", *LONG, f"run_dir={stopped}") == [0], world.said()
    assert world.status(stopped)["state"] == "done"
    if step == 8:
        assert {path: path.stat().st_mtime_ns for path in portions} == portions, "they were drawn twice"
    close(evaluations(straight), evaluations(stopped))
    assert losses(straight) == losses(stopped)
    curves = [[row for row in rows(run) if "loss" not in row] for run in (straight, stopped)]
    assert [list(row) for row in curves[0]] == [list(row) for row in curves[1]], "each curve has each point once"


def test_a_picture_that_a_kill_left_out_is_drawn_after_all(scored: World, tmp_path: Path) -> None:
    """Where a step is scored, its checkpoint comes before its picture."""
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    words = (*IN_LOOP, f"run_dir={run}", "evaluation.every_steps=4", "train.steps=12")
    assert scored.do("train", *words) == [0], scored.said()
    picture = run / "samples" / "step-000000012.png"
    drawn, made = picture.read_bytes(), picture.stat().st_mtime_ns
    assert scored.do("train", *words) == [0], scored.said()
    assert picture.stat().st_mtime_ns == made
    picture.unlink()
    assert scored.do("train", *words) == [0], scored.said()
    assert picture.read_bytes() == drawn


def test_a_step_scored_again_adds_what_is_new_to_its_curves(scored: World, tmp_path: Path) -> None:
    """For one guidance scale more; and after a kill between the curves' row and that of evaluations.jsonl."""
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    before = rows(run)
    words = (*IN_LOOP, f"run_dir={run}", "evaluation.guidance_scales=[1.0,2.0,3.0]")
    assert scored.do("train", *words) == [0], scored.said()
    assert rows(run)[:-1] == before
    assert all(name == "step" or name.startswith("guidance_3/") for name in rows(run)[-1])
    again = rows(run)
    (run / "evaluations.jsonl").unlink()
    assert scored.do("train", *words) == [0], scored.said()
    assert rows(run) == again and len(evaluations(run)) == 3


def test_a_training_does_not_take_back_what_evaluate_keeps(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    words = (*IN_LOOP, f"run_dir={run}", "evaluation.guidance_scales=[1.0,2.0]")
    assert scored.do("evaluate", *words, "--checkpoint", "newest") == [0], scored.said()
    (run / "evaluations.jsonl").unlink()  # so that the training takes the same images up again
    assert scored.do("train", *words[:-1], "evaluation.guidance_scales=[1.0,2.0,3.0]") == [0], scored.said()
    assert scored.do("train", *words, "train.steps=12") == [0], scored.said()
    left = sorted(path.name.rpartition("-")[0] for path in (run / "evaluation").glob("step-*"))
    assert left == [f"step-{step:09d}-guidance-{scale}" for step in (8, 12) for scale in (1, 2)]


HANG_S, SCORES_S = 10.0, 12.0  # seconds; ranks that start beside other tests take some


def slow_rank(rank: int, words: list[str], ranks: int, port: int, log: str) -> None:
    """A rank of a training to which a network's scores of drawn images take longer than a step may."""
    from pipeline.yardstick import Yardstick

    count = Yardstick.scores

    def slowly(self: Yardstick, features: Any, *rest: Any, **named: Any) -> Any:
        if len(features) == 64:
            time.sleep(SCORES_S)
        return count(self, features, *rest, **named)

    Yardstick.scores = slowly
    run_rank(rank, "train", words, ranks, port, log)


def test_long_scores_are_no_hang_and_a_signal_is_heeded_between_two(world: World) -> None:
    """Of two guidance scales, one after the other, each longer than the watchdog's patience, on two ranks."""
    words = (*LONG, f"run_dir={world.root / 'slow'}", "evaluation.scores_every_steps=8")
    words += ("evaluation.num_inference_steps=2", f"train.hang_timeout_s={HANG_S}")
    slow, port, log = world.root / "slow", free_port(), str(world.root / "log.txt")
    started = [
        FORKSERVER.Process(target=slow_rank, args=(rank, [str(world.config), *words], 2, port, log)) for rank in (0, 1)
    ]
    for process in started:
        process.start()
    wait_for(lambda: len(list(slow.glob("evaluation/*/*.npy"))) == 16)
    time.sleep(2)  # it counts the first one's
    os.kill(int(started[1].pid or 0), signal.SIGUSR1)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [1, 1], world.said()
    assert world.status(slow) == {"state": "preempted", "step": 8, "reason": "SIGUSR1 after step 8"}
    assert not (slow / "evaluations.jsonl").exists() and not list(slow.glob("stacks-*.txt"))
    assert world.do("train", *words) == [0], world.said()
    assert len(evaluations(slow)) == 2


def test_a_finished_run_is_evaluated_again_only_for_other_numbers(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    assert scored.do("train", *IN_LOOP, f"run_dir={run}") == [0], scored.said()
    assert evaluations(run) == evaluations(scored.run_dir)
    assert scored.do("train", *IN_LOOP, f"run_dir={run}", "evaluation.num_images=24") == [0], scored.said()
    found = evaluations(run)
    assert found[:4] == evaluations(scored.run_dir)[:4] or len(found) == 6
    other = [row for row in found if row["num_images"] == 24]
    assert len(other) == 2 and not [name for name in other[0]["scores"] if name.startswith("classifier/")]
    assert [name for name in other[0]["scores"] if name.startswith("classifier@") and name.endswith("/fid")]


def test_other_held_out_images_are_another_curve(made: World, scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    others = f"data.validation_images={made.root}/digits/validation"
    assert scored.do("train", *IN_LOOP, f"run_dir={run}", others) == [0]
    first, *_, last = evaluations(run)
    assert len(evaluations(run)) == 6 and first["asked"] == last["asked"] and first["references"] != last["references"]
    assert first["validation_images"] != last["validation_images"] and first["held_out"] != last["held_out"]
    assert {name.partition("/")[0].partition("@")[1] for name in last["scores"] if "num_" not in name} == {"", "@"}
    assert not [name for name in last["scores"] if name.startswith(("classifier/", "validation/classifier/"))]


def test_after_a_training_with_few_images_card_and_report_have_the_numbers_of_many(
    scored: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    assert scored.do("export", f"run_dir={run}") == [0], scored.said()
    words = (f"run_dir={run}", "evaluation.num_images=40", "evaluation.num_inference_steps=4")
    assert scored.do("evaluate", *words) == [0], scored.said()
    row = evaluations(run)[-1]
    mark = next(name for name in row["references"]).removeprefix("classifier")
    assert mark.startswith("@") and row["num_images"] == 40
    scores = json.loads((run / "scores.json").read_text())
    assert not [name for name in scores if "@" in name]
    assert (scores["guidance_2/num_images"], scores["guidance_2/num_inference_steps"]) == (40, 4)
    assert scores["references/classifier"] == row["references"][f"classifier{mark}"]
    assert scores["asked"] == row["asked"] and scores["held_out"] == row["held_out"]
    fid = scores["guidance_2/frechet_distance"]
    assert fid == row["scores"][f"classifier{mark}/fid"] != evaluations(run)[-2]["scores"].get("classifier/fid")
    card = (run / "export" / "README.md").read_text()
    drawn = [each for each in evaluations(run) if each["num_images"] == 40]
    of_card = [f"{each['scores'][f'classifier{mark}/fid']:,.4g}" for each in drawn]
    real = f"{scores['validation/frechet_distance']:,.4g}"
    assert f"in features of `classifier` | {real} | {' | '.join(of_card)} |" in card
    assert "| images | 360 | 40 | 40 |" in card and "| steps of the sampler |  | 4 | 4 |" in card
    best = min(each["scores"][f"classifier{mark}/fid"] for each in drawn)
    said = " ".join(scored.said().split())
    assert "N images against M = 360 training images" in said and "N = 360" in said and "N = 40" in said
    assert "Fréchet distance: biased up, ~1/N" in said and "bits/dim, N = 8 held-out images" in said
    assert f"<dd>{number(best)}</dd>" in (run / "report.html").read_text(encoding="utf-8")


# Two models ---------------------------------------------------------------------------------------


def test_two_models_are_compared_in_pairs(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    words = (f"run_dir={run}", "evaluation.guidance_scales=[2.0]", "evaluation.bits=true")
    assert scored.do("evaluate", *words, "--checkpoint", "step-000000004") == [0], scored.said()
    early, late = (next((run / "evaluation").glob(f"step-00000000{step}-guidance-2-*")) for step in (4, 8))
    log = tmp_path / "log.txt"

    def compare(*folders: Path, code: int = 0) -> str:
        named = (str(folder) for folder in folders)
        log.write_text("")
        found = scored.do("evaluate", *words, "--compare", *named, "--resamples", "50", log=log)
        assert found == [code], log.read_text()
        return log.read_text()

    compare(early, late)
    (found,) = json.loads((run / "evaluation" / "comparison.json").read_text())
    rows_of_2 = {row["step"]: row["scores"] for row in evaluations(run) if row["guidance_scale"] == 2}
    for name, each in found["differences"].items():
        assert (each["a"], each["b"]) == pytest.approx((rows_of_2[4][name], rows_of_2[8][name])), name
        assert each["difference"] == each["a"] - each["b"] and each["low"] <= each["high"]
    assert found["differences"].keys() == {
        *(f"classifier/{name}" for name in ("fid", "kid", "precision", "density", "near_copy_share")), "accuracy",
        "classifier/inception_score",
    }  # fmt: skip
    assert scored.do("export", f"run_dir={run}") == [0]
    said = " ".join(compare(run / "export", late).split())
    assert "50 resamples of 20 pairs" in said and "N = 20 pairs of images, M = 360 training images" in said
    assert "Fréchet distance: biased up, ~1/N; Kernel distance: no bias, ± error" in said
    (same,) = json.loads((run / "evaluation" / "comparison.json").read_text())
    assert {(each["low"], each["high"]) for each in same["differences"].values()} == {(0, 0)}, "one and the same model"
    compare(run, run / "export")  # a run folder: its newest kept images
    assert "no export, no kept images and no run" in compare(tmp_path, late, code=2)
    said = json.loads((early / "said.json").read_text())
    (early / "said.json").write_text(json.dumps(said | {"seed": 4}))
    assert "images of other noise came (seeds 4 and 3)" in compare(early, late, code=2)
    (early / "said.json").write_text(json.dumps(said | {"asked": said["asked"][:16]}))
    assert "(16 and 20 images)" in compare(early, late, code=2)
    (early / "said.json").write_text(json.dumps(said))
    next(early.glob("*.npy")).unlink()
    assert "1 of its portions are not drawn yet" in compare(early, late, code=2)
    assert "Traceback" not in log.read_text()


def test_a_run_is_compared_by_its_own_newest_images(scored: World, tmp_path: Path) -> None:
    """Not by those that sweeps drew, nor by those that a comparison drew for another's export."""
    run, other, log = tmp_path / "run", tmp_path / "other" / "export", tmp_path / "log.txt"
    shutil.copytree(scored.run_dir, run)
    words = (f"run_dir={run}", "evaluation.bits=true")
    at_2 = (*words, "evaluation.guidance_scales=[2.0]")
    assert scored.do("export", *words) == [0]
    assert scored.do("export", *words, "--step", "4", "--out", str(other)) == [0]
    passport = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(passport | {"checkpoint": "step-000000099"}))
    swept = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    assert scored.do("sweep", *at_2, "--steps", "2", "4", "--interval", "0,0.5", "0,1", "--scheduler", *swept) == [0]

    def compare(*folders: Path) -> dict[str, Any]:
        assert scored.do("evaluate", *at_2, "--compare", *map(str, folders), "--resamples", "20", log=log) == [0]
        (found,) = json.loads((run / "evaluation" / "comparison.json").read_text())
        return found

    apart = compare(run / "export", other)
    own = next(row["kept_images"] for row in evaluations(run) if (row["step"], row["guidance_scale"]) == (8, 2.0))
    assert apart["a"] == str(run / "evaluation" / own) and apart["models"][0] != apart["models"][1]
    assert Path(apart["b"]).name.startswith("compared-step-000000099-guidance-2-")
    assert apart["num_inference_steps"] == [2, 2] and apart["guidance_scales"] == [2, 2]
    assert any(each["difference"] for each in apart["differences"].values())
    drawn = {path: path.stat().st_mtime_ns for path in Path(apart["b"]).glob("*.npy")}
    same = compare(run, run / "export")
    assert same["a"] == same["b"] == apart["a"] and same["models"] == [apart["models"][0]] * 2
    assert not any(each["difference"] for each in same["differences"].values())
    assert compare(run, other) == apart | {"a": same["a"]}
    assert {path: path.stat().st_mtime_ns for path in Path(apart["b"]).glob("*.npy")} == drawn, "drawn twice"
    assert scored.do("evaluate", *at_2, "--checkpoint", "newest", "--ema", "decay-0.99") == [0]
    assert compare(run, run / "export")["a"] == str(run / "evaluation" / evaluations(run)[-1]["kept_images"]) != own
    assert scored.do("evaluate", *words, "evaluation.num_images=24", "--compare", str(run), str(run), log=log) == [2]
    assert f"{run}: no export, no kept images and no run with an evaluation of 24 images by 2 steps" in log.read_text()


def test_models_that_cannot_be_asked_the_same_are_not_compared(made: World, scored: World, tmp_path: Path) -> None:
    from test_conditioned_runs import KINDS, world_of

    text, run, log = world_of(made, tmp_path, KINDS["text"]), tmp_path / "classes", tmp_path / "refused.txt"
    shutil.copytree(scored.run_dir, run)
    assert scored.do("export", f"run_dir={run}") == [0]
    assert text.do("train", "train.steps=4", "checkpoint.every_steps=4") == [0], text.said()
    assert text.do("export", "train.steps=4", "checkpoint.every_steps=4") == [0], text.said()

    def refused(*words: str) -> str:
        log.write_text("")
        assert scored.do("evaluate", f"run_dir={run}", *words, log=log) == [2], log.read_text()
        assert "Traceback" not in log.read_text()
        return log.read_text()

    captioned, classes = str(text.run_dir / "export"), str(run / "export")
    told = "is asked by captions, conditioning.kind=class has none"
    assert f"{captioned}: {told}" in refused("--compare", classes, captioned)
    told = "is asked for one of 10 classes, conditioning.num_classes=12"
    assert f"{classes}: {told}" in refused("conditioning.num_classes=12", "--compare", classes, classes)
    nothing = refused("evaluation.features=[]", "--compare", classes, classes)
    assert "evaluation.features: no network is there to score with; name one" in nothing


# Rows and names -----------------------------------------------------------------------------------


def row_of(**other: Any) -> dict[str, Any]:
    scores = {"net/fid": 1.0, "accuracy": 0.5, "clip_score": 20.0, "validation/net/fid": 0.1, "bits_per_dim": 2.0}
    row = {
        "step": 1, "checkpoint": None, "ema": "a", "guidance_scale": 2.0, "num_inference_steps": 5, "num_images": 10,
        "asked": "a" * 16, "validation_images": "d" * 16, "held_out": "e" * 16, "kept_images": "step-1-guidance-2-0",
        "references": {"net": "f" * 16}, "scores": scores | {"validation_loss/band-0": 1.0},
    }  # fmt: skip
    return row | other


SETTINGS = EvaluationConfig.model_validate({"features": [{"network": "classifier", "name": "net"}]})


def test_numbers_of_another_reference_have_a_curve_of_their_own() -> None:
    first = row_of()
    assert told_apart([], first, SETTINGS) == first
    assert told_apart([first], row_of(step=2), SETTINGS)["scores"] == first["scores"]
    for other in (
        {"references": {"net": "0" * 16}},
        {"num_images": 20},
        {"num_inference_steps": 6},
        {"asked": "0" * 16},
        {"validation_images": "0" * 16},
    ):
        found = told_apart([first], row_of(step=2, **other), SETTINGS)["scores"]
        (name,) = (name for name in found if name.startswith("net@") and name.endswith("/fid"))
        mark = name.removeprefix("net@").removesuffix("/fid")
        assert found.keys() == {
            f"net@{mark}/fid", f"accuracy@{mark}", "clip_score", f"validation/net@{mark}/fid", "bits_per_dim",
            "validation_loss/band-0",
        }  # fmt: skip
        again = told_apart([first, row_of(step=2, scores=found)], row_of(step=3, **other), SETTINGS)
        assert again["scores"].keys() == found.keys(), "and it stays the same curve"
        assert flat_scores([row_of(scores=found)]) == flat_scores([first]), "the newest need no fingerprint"
    of_others = told_apart([first], row_of(held_out="1" * 16), SETTINGS)["scores"]
    assert {"validation_loss@11111111/band-0", "bits_per_dim@11111111", "net/fid"} <= of_others.keys()
    back = told_apart([first, row_of(references={"net@0": "0" * 16})], row_of(step=3), SETTINGS)
    assert back["scores"].keys() == first["scores"].keys()


def test_curves_and_flat_names() -> None:
    row = row_of()
    assert set(curves_of(row)) == {
        "guidance_2/net/fid", "guidance_2/accuracy", "guidance_2/clip_score", "bits_per_dim", "validation_loss/band-0",
    }  # fmt: skip
    assert set(flat_scores([row])) == {
        "checkpoint", "ema", "guidance_2/num_images", "guidance_2/net/fid", "guidance_2/class_accuracy",
        "guidance_2/clip_score", "validation/net/fid", "bits_per_dim", "validation_loss/band-0",
        "guidance_2/num_inference_steps", "asked", "validation_images", "held_out", "references/net",
    }  # fmt: skip


def test_shares_of_the_real_images_are_given_for_every_network() -> None:
    row = row_of(references={"classifier": "f", "net@0": "f"})
    scores = {"validation/net/recall": 0.5, "guidance_2/net/recall_equal_n": 0.25, "guidance_2/recall_equal_n": 0.25}
    scores |= {"validation/coverage": 0.8, "guidance_2/coverage_equal_n": 0.4}
    set_beside(scores, [row])
    shares = {name: value for name, value in scores.items() if name.endswith("_of_validation")}
    assert shares == {"guidance_2/net/recall_of_validation": 0.5, "guidance_2/coverage_of_validation": 0.5}


# Other networks -----------------------------------------------------------------------------------


def test_a_text_run_is_scored_by_a_backbone_and_by_clip(made: World, tmp_path: Path) -> None:
    """Both small and random: no pretrained weights can be had here."""
    from test_conditioned_runs import KINDS, world_of
    from test_features import clip, dinov2

    world = world_of(made, tmp_path, KINDS["text"])
    networks = (
        f"evaluation.features=[{{network: transformers, path: {dinov2(tmp_path / 'dinov2')}, name: dinov2}}, "
        f"{{network: clip, path: {clip(tmp_path / 'clip')}}}]"
    )
    words = ("train.steps=4", "checkpoint.every_steps=4", "evaluation.scores_every_steps=4", networks)
    words += (f"evaluation.cache_dir={tmp_path / 'cache'}", "evaluation.guidance_scales=[2.0]")
    assert world.do("train", *words) == [0], world.said()
    (row,) = evaluations(world.run_dir)
    assert row["references"].keys() == {"dinov2", "clip"} and "accuracy" not in row["scores"]
    assert {"dinov2/fid", "clip/kid", "validation/clip/fid"} <= row["scores"].keys()
    assert 0 <= row["scores"]["clip_score"] <= 100 and 0 <= row["scores"]["validation/clip_score"] <= 100
    assert len(list((tmp_path / "cache").iterdir())) == 4, "two networks; the training images and the held-out ones"
    assert world.do("export", *words) == [0], world.said()
    assert world.do("evaluate", *words) == [0], world.said()
    close([row], evaluations(world.run_dir))
    assert (world.run_dir / "evaluation" / "nearest-guidance_2.png").stat().st_size > 500
    scores = json.loads((world.run_dir / "scores.json").read_text())
    assert "validation/dinov2/fid" in scores
    shown = " | ".join(f"{scores[f'{where}/dinov2/fid']:,.4g}" for where in ("validation", "guidance_2"))
    assert f"in features of `dinov2` | {shown} |" in (world.run_dir / "export" / "README.md").read_text()
    assert "<dt>Fréchet distance (dinov2)</dt>" in (world.run_dir / "report.html").read_text(encoding="utf-8")
    assert world.do("train", *words, f"data.validation_images={made.root}/digits/validation") == [0], world.said()
    again = evaluations(world.run_dir)[-1]
    assert again["asked"] != row["asked"], "captions are those of the held-out set"
    assert not {"clip_score", "clip/fid", "dinov2/fid"} & again["scores"].keys()


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluation.num_images=5",), "evaluation.num_images: 5 came; precision, recall, density and coverage want 6"),
        (
            ("evaluation.features=[{network: transformers, path: no/such/folder}]",),
            "evaluation.features: transformers: path 'no/such/folder' came, and there is no such folder",
        ),
        (("evaluation.features=[inception]",), "inception came, and torch-fidelity can't be imported"),
        (("data.validation_images=null",), "data.validation_images: evaluations compare with held-out images"),
        (("evaluation.features=[{network: clip}]",), "network: clip wants a path: a folder or a hub id"),
        (("evaluation.features=[classifier,classifier]",), "two networks called classifier"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(world: World, words: tuple[str, ...], told: str) -> None:
    if "torch-fidelity" in told and torch_fidelity_is_there():
        pytest.skip("torch-fidelity is installed here")
    assert world.do("train", *IN_LOOP, *words) == [2]
    assert told in world.said() and "Traceback" not in world.said()
    assert (world.said().count("error:") == 1 and not (world.run_dir / "metrics.jsonl").exists()) or not losses(
        world.run_dir
    )


def torch_fidelity_is_there() -> bool:
    from importlib.util import find_spec

    return find_spec("torch_fidelity") is not None


def test_features_of_another_preprocessing_are_refused(world: World) -> None:
    cache = world.root / "cache"
    words = (*IN_LOOP, f"evaluation.cache_dir={cache}")
    assert world.do("train", *words) == [0], world.said()
    made = sorted(cache.glob("classifier-*.safetensors"))
    assert made
    path = made[0]
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as opened:
        said = json.loads((opened.metadata() or {})["description"])
    said["images"]["image_size"] = 64
    save_file(load_file(path), path, {"description": json.dumps(said)})
    assert world.do("train", *words, "train.steps=9") == [2]
    assert "another preprocessing: images.image_size was 64, wanted is 16; remove it" in world.said()
    path.write_bytes(b"torn")
    assert world.do("train", *words, "train.steps=9") == [2]
    assert "can't be read" in world.said() and "Traceback" not in world.said()
    path.unlink()
    assert world.do("train", *words, "train.steps=9") == [0], world.said()


def test_what_lies_there_broken_is_one_line_that_names_it(scored: World, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    shutil.copytree(scored.run_dir, run)
    words = (f"run_dir={run}", *IN_LOOP)

    def refused(verb: str, *more: str, ranks: int = 1, code: int = 2) -> str:
        log.unlink(missing_ok=True)
        assert scored.do(verb, *words, *more, ranks=ranks, log=log) == [code] * ranks, log.read_text()
        (line,) = (line for line in log.read_text().splitlines() if "error: " in line)  # behind a bar, it may be
        assert "Traceback" not in log.read_text()
        return line

    assert "--resamples: it is of the bootstrap of --compare" in refused("evaluate", "--resamples", "9")
    kept = next((run / "evaluation").glob("step-*/*.npy"))
    whole = kept.read_bytes()
    for torn in (b"", whole[:-1], whole[:20]):
        kept.write_bytes(torn)
        told = refused("evaluate", "--checkpoint", "newest", code=1)
        assert f"{kept}: drawn images were wanted" in told and "remove it, and they are drawn again" in told
    kept.write_bytes(whole)
    assert scored.do("export", f"run_dir={run}") == [0], scored.said()
    (run / "export" / "training.json").unlink()
    for verb in ("evaluate", "sweep"):
        assert f"{run / 'export' / 'training.json'}: the checkpoint and average of the export" in refused(verb)
    for name in ("evaluations.jsonl", "metrics.jsonl"):
        path = run / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], "{torn\n", *lines[1:]]))
        told = refused("train", "train.steps=9", ranks=2)
        assert f"{path}: line 2: a JSON object with a step was wanted; mend it, or remove it" in told
        path.write_text("".join(lines))


def test_images_that_are_not_finite_are_refused(scored: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored.run_dir, run)
    assert scored.do("export", f"run_dir={run}") == [0], scored.said()
    path = run / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = np.full_like(weights["conv_out.bias"], np.nan)
    save_file(weights, path, {"format": "pt"})
    log = tmp_path / "log.txt"
    assert scored.do("evaluate", f"run_dir={run}", log=log) == [1]
    assert "images 0 to 7: 8 of 8 drawn images hold a NaN or an infinity" in log.read_text()
    assert "Traceback" not in log.read_text()
