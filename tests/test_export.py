"""An export opens in diffusers alone and draws what the trainer's own sampler draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from world import World

from pipeline.average import checkpoint_pipeline, find_average, newest_checkpoint
from pipeline.config_file import load_config

ALONE = """
import sys
for name in ("pipeline", "vae"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported here")
import numpy as np
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = [
    pipe([0, 7, 3], seeds=[5, 6, 2**62], guidance_scale=w, num_inference_steps=4, output_type="np").images
    for w in (0.0, 1.0, 2.0)
]
np.save(out, np.stack(images))
"""


@pytest.fixture(scope="module")
def exported(made: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run of a few steps and its export."""
    here = World(tmp_path_factory.mktemp("exported"))
    here.config.write_text(made.config.read_text().replace(str(made.run_dir), str(here.run_dir)))
    assert here.do("train") == [0], here.said()
    assert here.do("export") == [0], here.said()
    return here


def test_a_process_without_this_project_draws_the_same_pixels(exported: World, tmp_path: Path) -> None:
    # -S leaves out site-packages' .pth files, and with them the checkout; the packages come by PYTHONPATH.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", ALONE, str(exported.run_dir / "export"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "images.npy")
    config = load_config(exported.config)
    pipe = checkpoint_pipeline(config, find_average(config))
    ours = [
        pipe([0, 7, 3], seeds=[5, 6, 2**62], guidance_scale=w, num_inference_steps=4, output_type="np").images
        for w in (0.0, 1.0, 2.0)
    ]
    np.testing.assert_allclose(theirs, np.stack(ours), atol=1e-5)
    assert theirs.std() > 0.01


def test_without_the_flag_diffusers_says_why(exported: World) -> None:
    with pytest.raises((ValueError, EnvironmentError), match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported.run_dir / "export")


def test_the_folder_has_what_diffusers_wants(exported: World) -> None:
    folder = exported.run_dir / "export"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ClassConditionalPipeline"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    state = json.loads((newest_checkpoint(exported.run_dir).path / "state.json").read_text())
    assert vae["scaling_factor"] == state["latents"]["scale"]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is False and scheduler["timestep_spacing"] == "trailing"
    card = (folder / "README.md").read_text()
    assert "from_pretrained" in card and "optimizer:" in card
    assert not list(folder.rglob("*.bin"))


def test_it_is_exported_once(exported: World) -> None:
    before = (exported.run_dir / "export" / "model_index.json").stat().st_mtime_ns
    assert exported.do("export") == [0]
    assert "already" in exported.said()
    assert (exported.run_dir / "export" / "model_index.json").stat().st_mtime_ns == before


def test_sample_draws_a_grid_and_names_unknown_classes(exported: World) -> None:
    assert exported.do("sample", "--classes", "3,1", "--columns", "2") == [0], exported.said()
    assert (exported.run_dir / "samples" / "grid.png").stat().st_size > 500
    assert exported.do("sample", "--classes", "eleven") == [2]
    assert "eleven" in exported.said() and "Traceback" not in exported.said()


def test_evaluate_scores_and_goes_on_from_what_it_drew(exported: World) -> None:
    assert exported.do("evaluate") == [0], exported.said()
    scores = json.loads((exported.run_dir / "scores.json").read_text())
    for name in ("vae/psnr_db", "validation/coverage", "guidance_1/class_accuracy", "guidance_2/recall"):
        assert isinstance(scores[name], float)
    drawn = sorted((exported.run_dir / "evaluation").rglob("*.npy"))
    assert len(drawn) == 6  # 20 images, 8 a file, two guidance scales
    kept = drawn[1].stat().st_mtime_ns
    drawn[0].unlink()
    assert exported.do("evaluate") == [0], exported.said()
    assert json.loads((exported.run_dir / "scores.json").read_text()) == scores
    assert drawn[0].exists() and drawn[1].stat().st_mtime_ns == kept


@pytest.fixture(scope="module")
def pipe(exported: World) -> DiffusionPipeline:
    opened = DiffusionPipeline.from_pretrained(exported.run_dir / "export", trust_remote_code=True)
    opened.set_progress_bar_config(disable=True)
    opened.register_to_config(class_names=["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"])
    return opened


def latent(pipe: DiffusionPipeline, labels: object, **words: object) -> np.ndarray:
    words = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0, **words}
    return pipe(labels, **words).images.numpy()


def test_guidance_one_and_zero_are_one_branch_bitwise(pipe: DiffusionPipeline) -> None:
    null = pipe.num_classes
    conditional = latent(pipe, [4], seeds=1)
    pipe.label_ids, usual = lambda _: [null], pipe.label_ids
    try:
        unconditional = latent(pipe, [4], seeds=1)
    finally:
        pipe.label_ids = usual
    assert np.array_equal(latent(pipe, [4], seeds=1, guidance_scale=0.0), unconditional)
    assert not np.array_equal(conditional, unconditional)
    guided = latent(pipe, [4], seeds=1, guidance_scale=2.0, num_inference_steps=1)
    u = latent(pipe, [4], seeds=1, guidance_scale=0.0, num_inference_steps=1)
    c = latent(pipe, [4], seeds=1, guidance_scale=1.0, num_inference_steps=1)
    scale = np.abs(c).max()
    np.testing.assert_allclose(guided / scale, (u + 2 * (c - u)) / scale, atol=1e-5)


def test_an_image_is_a_function_of_its_seed_and_label(pipe: DiffusionPipeline) -> None:
    together = latent(pipe, [1, 5, 2], seeds=[10, 11, 12])
    alone = latent(pipe, [5], seeds=[11])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-3, atol=1e-4)
    assert np.array_equal(latent(pipe, ["b", "f", "c"], seeds=10), together)
    assert not np.allclose(latent(pipe, [5], seeds=[12]), alone)


def test_other_schedulers_serve(pipe: DiffusionPipeline) -> None:
    usual = pipe.scheduler
    try:
        for kind in (DDPMScheduler, EulerDiscreteScheduler, DDIMScheduler):
            pipe.scheduler = kind.from_config(usual.config)
            first, again = (latent(pipe, [1, 2], seeds=3, eta=1.0) for _ in range(2))
            assert np.array_equal(first, again) and np.isfinite(first).all()
    finally:
        pipe.scheduler = usual


@pytest.mark.parametrize(
    ("labels", "words", "said"),
    [
        ([10], {}, "class id 10 came, 0 to 9 was wanted"),
        ([-1], {}, "class id -1 came"),
        (["seven"], {}, "class name 'seven' came; known: a, b"),
        ([], {}, "no class label came"),
        ([1, 2], {"seeds": [1]}, "1 seeds or generators came for 2 labels"),
    ],
)
def test_what_cannot_be_drawn_is_said(pipe: DiffusionPipeline, labels: list, words: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipe(labels, num_inference_steps=1, **words)
