"""Whole runs over latents of several views, of several sets and from afar are the runs over the same from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fault_server import serving
from world import World, losses

from pipeline.data import draws, latents
from pipeline.data.dataset import Samples
from pipeline.data.draws import Purpose
from pipeline.data.index import ShardSet
from pipeline.data.pieces import Moments

VIEWS = ("data.flip=true", "data.crop=random", "data.encode_crops=2")


def test_training_reads_the_views_that_it_drew(world: World) -> None:
    out = world.root / "views"
    words = (f"data.train_latents={out}", *VIEWS)
    assert world.do("encode", *words) == [0], world.said()
    assert world.do("train", *words, "train.steps=2") == [0], world.said()
    shards = ShardSet(out, open_shards=12)
    samples = Samples([shards], (Moments(3, (4, 8, 8), 2, True),), seed=3, lanes=12, block=1024)
    seen: set[str] = set()
    for position in range(60):
        _, parts = shards.read(*samples.place(position)[1:])
        crop, flip = (draws.uniform(3, purpose, position) for purpose in (Purpose.CROP, Purpose.FLIP))
        part = f"moments{'.crop1' if crop >= 0.5 else ''}{'.flip' if flip < 0.5 else ''}.npy"
        seen.add(part)
        sample, bad = samples[position]
        assert bad is None and np.array_equal(sample["moments"], latents.moments_from_bytes(parts[part]))
    assert len(seen) == 4
    assert world.do("train", *words[:1], f"run_dir={world.root / 'other'}") == [2]
    assert "data.crop, data.encode_crops and data.flip ask for" in world.said()


def test_a_mix_of_latents_has_one_scale(world: World, made: World) -> None:
    train, validation = (str(made.root / "digits" / name) for name in ("train", "validation"))
    a, b = str(world.root / "a"), str(world.root / "b")
    words = (f"data.train_images=[{train},{validation}]", f"data.train_latents=[{a},{b}]", "data.weights=[1,3]")
    assert world.do("encode", *words, ranks=2) == [0, 0], world.said()
    assert world.do("train", *words, "train.steps=4") == [0], world.said()
    assert world.do("train", *words, ranks=2) == [0, 0], world.said()
    one = world.root / "one"
    assert world.do("train", *words, f"run_dir={one}", "data.workers=1") == [0], world.said()
    for (step, position, loss), (step2, position2, loss2) in zip(losses(world.run_dir), losses(one), strict=True):
        assert (step, position) == (step2, position2) and abs(loss - loss2) < 1e-5
    scale = json.loads((one / "checkpoints/step-000000008/state.json").read_text())["latents"]["scale"]
    scales = [json.loads((Path(folder) / "dataset.json").read_text())["scale"] for folder in (a, b)]
    assert min(scales) < scale < max(scales)
    # Of every four samples three come from b, by their own order.
    sets = [ShardSet(folder, open_shards=12) for folder in (a, b)]
    mixed = Samples(sets, (), seed=3, lanes=12, block=1024, weights=(1.0, 3.0))
    assert [mixed.place(p)[0] for p in range(96)].count(1) == 72


@pytest.mark.parametrize("kind", ["latents", "images"])
def test_training_from_afar_is_training_from_a_folder(world: World, made: World, kind: str) -> None:
    near, far = world.root / "near", world.root / "far"
    served = made.root / ("latents" if kind == "latents" else "digits/validation")
    key = "data.train_latents" if kind == "latents" else "data.train_images"
    words = () if kind == "latents" else ("data.train_latents=null", "data.online_scale_images=24")
    assert world.do("train", *words, f"{key}={served}", f"run_dir={near}") == [0], world.said()
    with serving(served) as server:
        cache = f"data.remote.cache_dir={world.root / 'cache'}"
        assert world.do("train", *words, cache, f"{key}={server.url}", f"run_dir={far}", ranks=2) == [0, 0], (
            world.said()
        )
        shutil.rmtree(far)
        assert world.do("train", *words, cache, f"{key}={server.url}", f"run_dir={far}") == [0], world.said()
    assert losses(near) == losses(far)
    assert list((world.root / "cache").iterdir())
    settings = (cache, "data.remote.attempts=1", "data.remote.timeout_s=0.5")
    assert world.do("train", *words, *settings, f"{key}={server.url}", f"run_dir={world.root / 'no'}") == [1]
    assert server.url in world.said() and "Traceback" not in world.said()


def test_encoding_from_afar(world: World, made: World) -> None:
    served, near, far = made.root / "digits/validation", world.root / "near", world.root / "far"
    assert world.do("encode", f"data.train_latents={near}") == [0], world.said()
    with serving(served) as server:
        words = (f"data.train_images={server.url}", f"data.remote.cache_dir={world.root / 'cache'}")
        assert world.do("encode", *words, f"data.train_latents={far}") == [0], world.said()
    names = sorted(path.name for path in near.glob("*.tar"))
    assert names and names == sorted(path.name for path in far.glob("*.tar"))
    assert all((near / name).read_bytes() == (far / name).read_bytes() for name in names)
    scales = {json.loads((folder / "dataset.json").read_text())["scale"] for folder in (near, far)}
    assert len(scales) == 1
