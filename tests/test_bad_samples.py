"""Whole runs over sets with samples that can't be read: each is written down once, whatever ranks and kills come."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpus import BAD, GOOD, Touch
from webdataset.writer import TarWriter
from world import World, losses

from pipeline import checkpoint
from pipeline.data import latents
from pipeline.data.dataset import Samples
from pipeline.data.index import ShardSet, build_index

VAE = ("tracking.every_steps=1", "vae.train.steps=8", "vae.train.global_batch_images=12", "checkpoint.every_steps=2")


@pytest.fixture
def spoilt(world: World, made: World) -> Path:
    """The world's images with one more shard, in which every second sample is no image or has no number."""
    folder = world.root / "images"
    shutil.copytree(made.root / "digits" / "validation", folder)
    good = ShardSet(folder, open_shards=1).read(0, 0)[1]
    with (folder / "bad.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for i in range(360):
            spoil = {0: {"png": good["png"][:50]}, 2: {"cls": b"three"}}.get(i % 4, {})
            writer.write({"__key__": f"bad{i:03d}", **good, **spoil})
    build_index(folder)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def due(folder: Path, num_positions: int, spoilt_every: int, seed: int = 3, lanes: int = 12) -> list[tuple[int, str]]:
    """(position, key) of the bad samples among the first positions, from the order alone."""
    samples = Samples([ShardSet(folder, open_shards=lanes)], (), seed=seed, lanes=lanes, block=1024)
    found: list[tuple[int, str]] = []
    for position in range(num_positions):
        _, shard, row = samples.place(position)
        key = samples.sets[0].key(shard, row)
        if key.startswith("bad") and int(key[3:]) % spoilt_every == 0:
            found.append((position, key))
    return found


def test_training_writes_down_exactly_what_it_replaced(world: World, spoilt: Path) -> None:
    words = (*VAE, f"data.train_images={spoilt}")
    one, two, parts = (world.root / name for name in ("one", "two", "parts"))
    assert world.do("train_vae", *words, f"vae.run_dir={one}") == [0], world.said()
    wanted = due(spoilt, 96, spoilt_every=4)  # the label is not read here
    assert len(wanted) > 3
    assert [(row["position"], row["key"]) for row in rows(one)] == wanted
    assert all(row["shard"] == str(spoilt / "bad.tar") and "not a readable" in row["reason"] for row in rows(one))
    assert json.loads((one / "metrics.jsonl").read_text().splitlines()[-1])["replaced"] == len(wanted)
    assert world.said().count("it is replaced") == 1
    assert "latents of data.train_images (rank 0): " in world.said()  # nor are they measured

    assert world.do("train_vae", *words, f"vae.run_dir={two}", "data.workers=1", ranks=2) == [0, 0], world.said()
    assert (two / "quarantine.jsonl").read_bytes() == (one / "quarantine.jsonl").read_bytes()

    shutil.copytree(one, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:  # as if it had been killed after step 4
        shutil.rmtree(path)
    assert world.do("train_vae", *words, f"vae.run_dir={parts}") == [0], world.said()
    assert (parts / "quarantine.jsonl").read_bytes() == (one / "quarantine.jsonl").read_bytes()
    assert losses(parts) == losses(one)
    states = [json.loads((run / "checkpoints/step-000000008/state.json").read_text()) for run in (one, parts)]
    assert states[0]["quarantine"] == states[1]["quarantine"]
    assert states[0]["quarantine"]["total"] == len(wanted)


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_end_the_run_at_the_same_sample(world: World, spoilt: Path, ranks: int) -> None:
    run = world.root / "run"
    words = (*VAE, f"data.train_images={spoilt}", f"vae.run_dir={run}", "data.quarantine.max_total=2")
    assert world.do("train_vae", *words, ranks=ranks) == [2] * ranks
    position, key = due(spoilt, 96, spoilt_every=4)[2]
    (line,) = [line for line in world.said().splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: data.quarantine.max_total: 3 samples in all could not be read, up to position {position}; at most 2 "
        f"may. The last: {spoilt}/bad.tar: sample {key!r}: not a readable"
    )
    assert "Traceback" not in world.said() and world.status(run)["state"] == "usage"
    assert len(rows(run)) == 3
    assert world.do("train_vae", *words, ranks=ranks) == [2] * ranks  # nor does another try get further
    assert len(rows(run)) == 3
    assert world.do("train_vae", *words, "data.quarantine.max_total=100", ranks=ranks) == [0] * ranks, world.said()
    assert [(row["position"], row["key"]) for row in rows(run)] == due(spoilt, 96, spoilt_every=4)


ONLINE = ("data.train_latents=null", "data.online_scale_images=24", "data.flip=true")


def test_training_on_images_goes_on_exactly(world: World, spoilt: Path) -> None:
    words = (*ONLINE, f"data.train_images={spoilt}", "checkpoint.every_steps=2")
    straight, parts, two = (world.root / name for name in ("straight", "parts", "two"))
    assert world.do("train", *words, f"run_dir={straight}") == [0], world.said()
    wanted = due(spoilt, 96, spoilt_every=2)
    assert [(row["position"], row["key"]) for row in rows(straight)] == wanted
    reasons = {row["reason"] for row in rows(straight) if int(row["key"][3:]) % 4 == 2}
    assert reasons == {".cls holds b'three', an integer was wanted"}
    shutil.copytree(straight, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:
        shutil.rmtree(path)
    assert world.do("train", *words, f"run_dir={parts}") == [0], world.said()
    name = "checkpoints/step-000000008/unet/diffusion_pytorch_model.safetensors"
    assert (parts / name).read_bytes() == (straight / name).read_bytes()
    assert losses(parts) == losses(straight)
    assert world.do("train", *words, f"run_dir={two}", ranks=2) == [0, 0], world.said()
    assert (two / "quarantine.jsonl").read_bytes() == (straight / "quarantine.jsonl").read_bytes()
    for (step, position, loss), (step2, position2, loss2) in zip(losses(straight), losses(two), strict=True):
        assert (step, position) == (step2, position2) and abs(loss - loss2) < 1e-5


def test_training_on_images_measures_its_scale_once(world: World, made: World) -> None:
    assert world.do("train", *ONLINE, "data.flip=false", "data.online_scale_images=360") == [0], world.said()
    measured = json.loads((world.run_dir / "latents.json").read_text())
    of_set = json.loads((made.root / "latents" / "dataset.json").read_text())
    assert measured["scale"] == pytest.approx(of_set["scale"], rel=1e-3)  # of the very same images, stored in fp16
    assert measured["origin"]["encoder_sha256"] == of_set["origin"]["encoder_sha256"]
    assert world.do("train", *ONLINE, "data.flip=false", "data.online_scale_images=12") == [2]
    assert "data.online_scale_images was 360, now 12" in world.said()
    state = json.loads((world.run_dir / "checkpoints/step-000000008/state.json").read_text())
    assert state["latents"]["scale"] == measured["scale"]
    assert world.do("export") == [0], world.said()


def test_a_mix_of_sets_is_the_same_over_ranks_and_resumes(world: World, made: World, spoilt: Path) -> None:
    sets = f"[{made.root / 'digits' / 'train'},{spoilt}]"
    words = (
        *VAE,
        f"data.train_images={sets}",
        "data.train_latents=null",
        "data.weights=[3,1]",
        "vae.train.schedule=constant",
    )
    one, two = world.root / "one", world.root / "two"
    assert world.do("train_vae", *words, f"vae.run_dir={one}") == [0], world.said()
    assert world.do("train_vae", *words, "vae.train.steps=4", f"vae.run_dir={two}", ranks=2) == [0, 0], world.said()
    assert world.do("train_vae", *words, f"vae.run_dir={two}", ranks=3) == [0, 0, 0], world.said()
    assert (two / "quarantine.jsonl").read_bytes() == (one / "quarantine.jsonl").read_bytes()
    for (step, position, loss), (step2, position2, loss2) in zip(losses(one), losses(two), strict=True):
        assert (step, position) == (step2, position2) and abs(loss - loss2) < 1e-5
    assert world.do("train_vae", *words, "data.weights=[1,1]", f"vae.run_dir={two}") == [2]
    assert "data.weights was [3.0, 1.0], now [1.0, 1.0]" in world.said()
    assert world.do("train_vae", *words, "data.weights=null", f"vae.run_dir={world.root / 'no'}") == [2]
    assert "train_images has 2 entries, which want weights: one number for each" in world.said()


ROAD = {  # the corpus's images, each with a label of its own or the one here
    key: {"cls": b"1", **parts}
    for key, parts in {**GOOD, **{key: parts for key, (parts, _) in BAD.items()}}.items()
    if latents.PART not in parts
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Good and bad images in turn, each with a pickle that would make a file, in three shards and an empty one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pkl = pickle.dumps(Touch(tmp_path / "touched"))
    kinds = [kind for kind in [*ROAD, *GOOD, *GOOD, *ROAD] if kind in ROAD]
    keys = [f"{i:02d} {kind}" for i, kind in enumerate(kinds)]
    for shard, of_shard in enumerate((keys[:20], [], keys[20:21], keys[21:])):
        with (folder / f"{shard}.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for key in of_shard:
                writer.write({"__key__": key, "pkl": pkl, **ROAD[key[3:]]})
    build_index(folder)
    return folder


def test_the_whole_corpus_on_the_whole_road(world: World, corpus: Path) -> None:
    """Encoded, and trained on as images over two epochs: exactly the bad ones are set apart, each with its reason."""
    shards = ShardSet(corpus, open_shards=9)
    keys = [shards.key(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    bad = {key for key in keys if key[3:] in BAD}
    assert len(keys) > 30 and len(bad) > 10
    before = {path.name for path in world.root.iterdir()}
    out = world.root / "corpus_latents"
    words = (f"data.train_images={corpus}", "data.validation_images=null", "data.lanes=6")
    assert world.do("encode", *words, f"data.train_latents={out}", ranks=2) == [0, 0], world.said()
    assert [row["key"] for row in rows(out)] == [key for key in keys if key in bad]
    assert all(row["reason"].startswith(BAD[row["key"][3:]][1]) for row in rows(out))
    assert len(ShardSet(out, open_shards=1)) == len(keys) - len(bad)

    epoch = len(keys) // 6 * 6
    for name, ranks in (("one", 1), ("two", 2)):
        run = world.root / name
        online = (*words, "data.train_latents=null", f"run_dir={run}", "train.global_batch_images=6", "data.workers=1")
        steps = (f"train.steps={2 * epoch // 6}", "data.online_scale_images=6")
        assert world.do("train", *online, *steps, ranks=ranks) == [0] * ranks, world.said()
        samples = Samples([shards], (), seed=3, lanes=6, block=1024)
        met = [(position, shards.key(*samples.place(position)[1:])) for position in range(2 * epoch)]
        # A class model does not look at captions.
        wanted = [(position, key) for position, key in met if key in bad and key[3:] != "latin1"]
        assert [(row["position"], row["key"]) for row in rows(run)] == wanted
        assert all(row["reason"].startswith(BAD[row["key"][3:]][1]) for row in rows(run))
    assert (world.root / "one" / "quarantine.jsonl").read_bytes() == (world.root / "two/quarantine.jsonl").read_bytes()
    made = {path.name for path in world.root.iterdir()} - before
    assert made <= {"corpus_latents", "one", "two", "log.txt"}  # no pickle was opened
    assert "Traceback" not in world.said()
