"""A sweep scores every combination once, as evaluate would, and goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from world import World

from pipeline.sweep import grid, interval_of


@pytest.fixture
def exported(world: World) -> World:
    assert world.do("train") == [0], world.said()
    assert world.do("export") == [0], world.said()
    return world


def swept(world: World) -> dict[str, Any]:
    return json.loads((world.run_dir / "evaluation" / "sweep.json").read_text())


def kept(world: World) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in world.run_dir.glob("evaluation/*/*.npy")}


def test_every_combination_is_scored_once_as_evaluate_scores_it(exported: World) -> None:
    words = ("--steps", "2", "4", "--guidance", "1", "2", "--interval", "0,1", "0,0.5")
    assert exported.do("sweep", *words) == [0], exported.said()
    found = swept(exported)
    points = [(row["steps"], row["guidance"], tuple(row["interval"])) for row in found["rows"]]
    assert points == [(n, *rest) for n in (2, 4) for rest in ((1.0, (0, 1)), (2.0, (0, 1)), (2.0, (0, 0.5)))]
    scores = [row["scores"]["classifier/fid"] for row in found["rows"]]
    assert len(set(scores)) == 6  # each setting changes the images
    said = " ".join(exported.said().split())
    assert "N = 20 images of each, M = 360 training images" in said
    assert "Fréchet distance: biased up, ~1/N; Kernel distance: no bias, ± error" in said
    with Image.open(exported.run_dir / "evaluation" / "sweep.png") as picture:
        picture.verify()

    assert exported.do("evaluate") == [0], exported.said()  # at 2 steps, guidance 1 and 2
    evaluated = [json.loads(line) for line in (exported.run_dir / "evaluations.jsonl").read_text().splitlines()]
    for row in evaluated:
        (same,) = [
            each
            for each in found["rows"]
            if (each["steps"], each["guidance"], each["interval"]) == (2, row["guidance_scale"], [0, 1])
        ]
        assert found["references"] == row["references"]
        assert same["scores"].items() <= row["scores"].items()

    before = kept(exported)
    assert exported.do("sweep", *words) == [0], exported.said()
    assert kept(exported) == before  # nothing was drawn anew
    assert swept(exported) == found


def test_two_ranks_sweep_what_one_sweeps(exported: World) -> None:
    words = ("--steps", "2", "--guidance", "1", "2")
    assert exported.do("sweep", *words) == [0], exported.said()
    alone = swept(exported)
    shutil.rmtree(exported.run_dir / "evaluation")
    assert exported.do("sweep", *words, ranks=2) == [0, 0], exported.said()
    assert swept(exported) == alone
    (exported.root / "log.txt").unlink()
    assert exported.do("sweep", "evaluation.features=[]", *words, ranks=2) == [2, 2]
    assert exported.said().count("error: evaluation.features: no network is there to score with") == 1


def test_averages_and_schedulers_are_settings_too(exported: World) -> None:
    schedulers = (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    )  # the last has infinite ends
    words = ("--ema", "decay-0.9", "decay-0.99", "--scheduler", *schedulers)
    assert exported.do("sweep", *words, "--guidance", "2", "--num-images", "12") == [0], exported.said()
    found = swept(exported)
    assert found["num_images"] == 12
    points = [(row["ema"], row["scheduler"]) for row in found["rows"]]
    assert points == [(ema, scheduler) for ema in ("decay-0.9", "decay-0.99") for scheduler in schedulers]
    fids = [row["scores"]["classifier/fid"] for row in found["rows"]]
    assert fids[0] != fids[1]  # averages over eight steps are still alike, schedulers are not
    assert fids[3] != fids[4]


def test_an_early_average_is_a_guide(exported: World) -> None:
    """Autoguidance (Karras et al. 2024): another picture than the null condition's, the same one from equal weights."""
    early, same = (str(exported.run_dir / "checkpoints" / f"step-{step:09d}" / "ema/decay-0.9") for step in (4, 8))
    words = ("--guidance", "1", "2", "--guide", "null", early, same, "--num-images", "12")
    assert exported.do("sweep", *words) == [0], exported.said()
    rows = swept(exported)["rows"]
    assert [(row["guidance"], row["guide"]) for row in rows] == [(1, "null"), (2, "null"), (2, early), (2, same)]
    fids = [row["scores"]["classifier/fid"] for row in rows]
    assert len(set(fids[:3])) == 3 and fids[3] == pytest.approx(fids[0], rel=1e-6)  # c + 2 (c - c)
    before = kept(exported)
    assert exported.do("sweep", *words) == [0], exported.said()
    assert kept(exported) == before  # nothing was drawn anew


def test_a_wrong_setting_is_one_line_before_anything_is_drawn(exported: World) -> None:
    for words, told in (
        (("--interval", "0.8,0.2"), "--interval: '0.8,0.2' came, START,END with 0 <= START <= END <= 1 was wanted"),
        (("--scheduler", "DDIMSchedulr"), "did you mean DDIMScheduler?"),
        (("--ema", "decay-0.5"), "--ema: 'decay-0.5' came; known: decay-0.9, decay-0.99"),
        (("--step", "8"), "--step: an export is of one checkpoint; give --ema too"),
        (("--steps", "0"), "--steps 0, --guidance 1, --interval 0,1"),
        (("--guide", "null", "./such"), "--guide: ./such: no U-Net lies there; the folder of one was wanted"),
    ):
        assert exported.do("sweep", *words) == [2]
        last = exported.said().strip().splitlines()[-1]
        assert told in last, last
    assert not kept(exported)


def test_without_guidance_its_interval_changes_nothing() -> None:
    halves = [interval_of("0,0.5"), interval_of("0.5,1")]
    guided = [(5, 3.0, half, guide) for half in ((0.0, 0.5), (0.5, 1.0)) for guide in ("null", "early")]
    assert list(grid([5], [1.0, 3.0], halves, ["null", "early"])) == [(5, 1.0, (0.0, 1.0), "null"), *guided]
