"""encode, run as users run it: every shard once, whoever does it; what can't be read is left out and told."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from captions import NUM_TOKENS, WIDTH, write_text_encoder
from image_sets import BAD, good, write_set
from PIL import Image
from safetensors.torch import load_file, save_file
from world import FORKSERVER, World, free_port, run_rank

from pipeline import files
from pipeline.data import images, latents
from pipeline.data.index import ShardSet
from pipeline.text import TextEncoders
from vae.model import load
from vae.moments import MomentStatistics, encode_moments

SHARDS = [["", "garbage", "", "a label"], [""] * 5, ["zero bytes", "no image", "a caption"], ["", "a negative label"]]
NUM_GOOD, NUM_BAD = 8, 6
WORDS = ("data.encode_batch_images=2",)


@pytest.fixture
def source(world: World) -> Path:
    return write_set(world.root / "images", SHARDS)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a set but what tells how a job ended."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.name.startswith("status")}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if path.is_file()}


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def encode(world: World, source: Path, out: Path, *words: str, ranks: int = 1, code: int = 0) -> Path:
    named = (f"data.train_images={source}", f"data.train_latents={out}")
    assert world.do("encode", *named, *WORDS, *words, ranks=ranks) == [code] * ranks, world.said()
    assert "Traceback" not in world.said()
    return out


# bad samples --------------------------------------------------------------------------------------


def test_bad_samples_are_left_out_and_written_down(world: World, source: Path) -> None:
    out = encode(world, source, world.root / "out")
    expected, position = list[tuple[int, str, str, str]](), 0
    for shard, faults in enumerate(SHARDS):
        for row, fault in enumerate(faults):
            if fault:
                reason = "no image among its parts cls, txt" if fault == "no image" else BAD[fault][1]
                expected.append((position, str(source / f"{shard:03d}.tar"), f"{shard}-{row}", reason))
            position += 1
    written = [(row["position"], row["shard"], row["key"], row["reason"]) for row in rows(out)]
    assert [row[:3] for row in written] == [row[:3] for row in expected]
    for (*_, reason), (*_, wanted) in zip(written, expected, strict=True):
        assert reason.startswith(wanted)
    said = told(out)
    assert (said["num_samples"], said["num_quarantined"], said["num_truncated_captions"]) == (NUM_GOOD, NUM_BAD, 0)
    shards = ShardSet(out, open_shards=1)
    assert shards.counts == [2, 5, 0, 1]
    assert [shards.key(0, row) for row in range(2)] == ["0-0", "0-2"]
    _, parts = shards.read(1, 3)
    assert sorted(parts) == ["cls", "moments.npy", "txt"] and parts["txt"] == b"picture 7"
    assert f"{NUM_BAD} samples could not be read" in world.said()
    assert f"encoded {NUM_GOOD} images in " in world.said() and " images/s" in world.said()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("budget", "message", "num_rows"),
    [
        ("max_total=4", "data.quarantine.max_total: 5 samples in all could not be read, up to position 11;", 5),
        ("max_consecutive=2", "data.quarantine.max_consecutive: 3 samples in a row could not be read", 5),
        ("max_total=0", "data.quarantine.max_total: 1 samples in all could not be read, up to position 1;", 1),
    ],
)
def test_a_budget_ends_the_run(
    world: World, source: Path, budget: str, message: str, num_rows: int, ranks: int
) -> None:
    out = world.root / "out"
    named = (f"data.train_images={source}", f"data.train_latents={out}", *WORDS)
    codes = world.do("encode", *named, f"data.quarantine.{budget}", "data.workers=0", ranks=ranks)
    said = world.said()
    assert 2 in codes and 0 not in codes
    if ranks == 1:
        assert message in said and f"All are in {out}/quarantine.jsonl" in said
        assert len(rows(out)) == num_rows and rows(out)[-1]["reason"] in said
        assert world.status(out)["state"] == "usage"
    assert "Traceback" not in said and not told(out)["complete"]
    encode(world, source, out)  # with the usual budget it goes on
    assert files_of(out) == files_of(encode(world, source, world.root / "straight"))


def test_a_set_of_bad_samples_is_refused(world: World) -> None:
    source = write_set(world.root / "images", [["garbage"] * 3, ["a label"]])
    encode(world, source, world.root / "out", code=2)
    assert "none of its 4 samples can be encoded; the last: " in world.said()


def test_a_network_that_overflows_is_not_a_bad_sample(world: World, made: World, source: Path) -> None:
    """Else a VAE in the wrong precision would quarantine all there is."""
    vae = world.root / "nan"
    shutil.copytree(made.root / "vae" / "autoencoder", vae)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"][0] = float("nan")
    save_file(weights, vae / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    out = encode(world, source, world.root / "out", f"vae.path={vae}", code=2)
    assert f"{source}/000.tar: sample '0-0' and 1 others of 2 in its batch: the moments are not finite" in world.said()
    assert world.status(out)["state"] == "usage" and not (out / "quarantine.jsonl").exists()


# sharing out --------------------------------------------------------------------------------------


def test_parts_in_any_order_are_one_job(world: World, source: Path) -> None:
    straight, out = encode(world, source, world.root / "straight"), world.root / "out"
    encode(world, source, out, "--part", "3/3")
    assert "part 3 of 3: its 1 shards are done; 3 of the set's 4 are missing" in world.said()
    assert json.loads((out / "status.part-3-of-3.json").read_text())["state"] == "done"
    assert world.status(out)["state"] == "running" and not told(out)["complete"]
    encode(world, source, out, "--part", "1/3", ranks=2)
    assert world.status(out)["state"] == "running" and not told(out)["complete"]
    encode(world, source, out, "--part", "2/3")
    assert world.status(out)["state"] == "done"
    assert files_of(out) == files_of(straight)
    encode(world, source, out, "--part", "2/3")
    assert world.status(out)["state"] == "done" and files_of(out) == files_of(straight)


def test_parts_at_once_are_one_job(world: World, source: Path) -> None:
    straight, out = encode(world, source, world.root / "straight"), world.root / "out"
    named = (f"data.train_images={source}", f"data.train_latents={out}", *WORDS)
    jobs = [world.start("encode", *named, "--part", f"{i}/7") for i in range(1, 8)]  # more of them than shards
    assert [end(job) for job in jobs] == [[0]] * 7, world.said()
    assert world.status(out)["state"] == "done"
    assert files_of(out) == files_of(straight)


def test_a_part_that_fails_says_so_of_itself_alone(world: World, source: Path) -> None:
    out = encode(world, source, world.root / "out", "--part", "1/2", "data.quarantine.max_total=1", code=2)
    assert json.loads((out / "status.part-1-of-2.json").read_text())["state"] == "usage"
    assert world.status(out)["state"] == "running"


def end(job: list[Any]) -> list[int | None]:
    for process in job:
        process.join(120)
    return [process.exitcode for process in job]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_job_twice_at_once(world: World, source: Path, ranks: int) -> None:
    straight, out = encode(world, source, world.root / "straight"), world.root / "out"
    named = (f"data.train_images={source}", f"data.train_latents={out}", *WORDS)
    logs = [world.root / f"log{i}.txt" for i in range(3)]
    jobs = [world.start("encode", *named, ranks=ranks, log=log) for log in logs]
    assert [end(job) for job in jobs] == [[0] * ranks] * 3, "".join(log.read_text() for log in logs)
    said = "".join(log.read_text() for log in logs)
    encoded = [int(line.split()[1]) for line in said.splitlines() if line.startswith("encoded ")]
    assert sum(encoded) == NUM_GOOD, "something was encoded twice"
    assert files_of(out) == files_of(straight) and world.status(out)["state"] == "done"


def without_locks(*rank: Any) -> None:
    """A rank on a file system that has no locks."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.lockf = refuse
    run_rank(*rank)


def test_the_same_job_twice_at_once_without_locks(world: World, source: Path) -> None:
    """Work is done twice, nothing is lost."""
    straight, out = encode(world, source, world.root / "straight"), world.root / "out"
    words = [str(world.config), f"data.train_images={source}", f"data.train_latents={out}", *WORDS]
    log = str(world.root / "log.txt")
    for _ in range(3):
        jobs = [FORKSERVER.Process(target=without_locks, args=(0, "encode", words, 1, free_port(), log)) for _ in "ab"]
        for job in jobs:
            job.start()
        codes = end(jobs)
        assert 0 in codes and set(codes) <= {0, 1}
        encode(world, source, out)
        assert files_of(out) == files_of(straight)
        shutil.rmtree(out)


@pytest.mark.parametrize("damage", ["cut", "gone", "another origin", "another source", "no record"])
def test_a_shard_that_is_not_whole_or_not_ours_is_made_again(world: World, source: Path, damage: str) -> None:
    out = encode(world, source, world.root / "out")
    whole = files_of(out)
    shard, record = out / "001.tar", out / "index" / "001.encoded.json"
    noted = json.loads(record.read_text())
    match damage:
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-512])
        case "gone":
            shard.unlink()
        case "another origin":
            shard.write_bytes(bytes(noted["num_bytes"]))
            files.write_json(record, noted | {"origin": "0" * 64})
        case "another source":
            shard.write_bytes(bytes(noted["num_bytes"]))
            files.write_json(record, noted | {"source_sha256": "0" * 64})
        case _:
            record.unlink()
    encode(world, source, out)
    assert "encoded 5 images in" in world.said()
    assert files_of(out) == whole


def test_what_a_killed_job_left_is_removed_before_its_shard_is_made(world: World, source: Path) -> None:
    """Else each kill would cost the size of a shard until the whole set is there."""
    out = encode(world, source, world.root / "out", "--part", "1/2")
    for name in (".001.tar.7.part", ".003.tar.7.part", ".001.tar.x.tar.7.part"):
        (out / name).write_bytes(b"torn")
    encode(world, source, out, "--part", "2/4")
    assert sorted(path.name for path in out.glob("*.part")) == [".001.tar.x.tar.7.part", ".003.tar.7.part"]
    encode(world, source, out)
    assert not list(out.rglob("*.part"))


def test_another_origin_is_refused(world: World, source: Path) -> None:
    out = encode(world, source, world.root / "out")
    before = files_of(out)
    encode(world, source, out, "data.flip=true", code=2)
    assert "holds something else (flip was False, now True)" in world.said()
    assert files_of(out) == before


def test_images_are_never_written_over(world: World, source: Path) -> None:
    before = files_of(source)
    encode(world, source, source, code=2)
    assert "holds the images themselves" in world.said()
    other = world.root / "other"
    shutil.copytree(source, other)
    encode(world, source, other, code=2)
    assert f"{other}: holds tars but no dataset.json to tell whose" in world.said()
    assert files_of(source) == files_of(other) == before


# views --------------------------------------------------------------------------------------------


def moments_of(vae: Any, pixels: list[Any]) -> Any:
    with torch.no_grad():
        return encode_moments(vae, torch.from_numpy(images.to_unit(np.stack(pixels)))).numpy().astype(np.float16)


def test_views_are_what_the_vae_makes_of_them(world: World, made: World) -> None:
    source = write_set(world.root / "images", [["", ""]])
    words = ("data.flip=true", "data.crop=random", "data.encode_crops=2")
    out, plain = encode(world, source, world.root / "out", *words), encode(world, source, world.root / "plain")
    read = [ShardSet(out, open_shards=1).read(0, row)[1] for row in range(2)]
    vae = load(made.root / "vae" / "autoencoder")
    total = MomentStatistics(4)
    for crop, along in enumerate((0.25, 0.75)):
        for mirrored in (False, True):
            pixels = [images.decode(good(i)["png"], 16, along=along, mirrored=mirrored) for i in range(2)]
            part = latents.view_part(crop, mirrored)
            found = np.stack([latents.moments_from_bytes(parts[part]) for parts in read])
            assert np.allclose(found, moments_of(vae, pixels), atol=2e-3)
            total.update(torch.from_numpy(found).float())
    assert [name for name in read[0] if name.startswith("moments")] == sorted(latents.view_parts(2, True))
    assert told(out)["scale"] == pytest.approx(total.latent_scale.scale, rel=1e-3)
    assert told(plain)["scale"] != told(out)["scale"]
    centre = latents.moments_from_bytes(ShardSet(plain, open_shards=1).read(0, 0)[1]["moments.npy"])
    pixels = [images.decode(good(i)["png"], 16) for i in range(2)]
    assert np.allclose(centre, moments_of(vae, pixels)[0], atol=2e-3)


def test_a_mirrored_view_changes_nothing_else(world: World, source: Path) -> None:
    plain, flipped = world.root / "plain", world.root / "flipped"
    encode(world, source, plain)
    encode(world, source, flipped, "data.flip=true")
    for shard, count in enumerate(ShardSet(plain, open_shards=1).counts):
        for row in range(count):
            _, one = ShardSet(plain, open_shards=1).read(shard, row)
            _, two = ShardSet(flipped, open_shards=1).read(shard, row)
            assert two.pop("moments.flip.npy") != one["moments.npy"]
            assert one == two


def test_several_sets_and_the_held_out_one(world: World) -> None:
    sources = [write_set(world.root / name, [[""] * 3, [""]]) for name in ("one", "two", "held_out")]
    outs = [world.root / f"{source.name}_latents" for source in sources]
    words = (
        f"data.train_images=[{sources[0]},{sources[1]}]",
        f"data.train_latents=[{outs[0]},{outs[1]}]",
        "data.weights=[3,1]",
        f"data.validation_images={sources[2]}",
        f"data.validation_latents={outs[2]}",
        "data.flip=true",
    )
    assert world.do("encode", *words, ranks=2) == [0, 0], world.said()
    assert [told(out)["num_samples"] for out in outs] == [4] * 3
    assert [told(out)["origin"]["flip"] for out in outs] == [True, True, False]
    assert world.status(outs[0])["state"] == "done"
    assert [(out / "status.json").exists() for out in outs] == [True, False, False]
    described = latents.merge_descriptions([told(out) for out in outs[:2]], (3, 1))
    assert f"the measured scale to train with is {described['scale']:.4f}" in world.said()


def test_the_preview_is_what_the_vae_makes_of_the_data(world: World, made: World, source: Path) -> None:
    with Image.open(encode(world, source, world.root / "out") / "preview.png") as sheet:
        pixels = np.asarray(sheet)
    vae = load(made.root / "vae" / "autoencoder")
    _, parts = ShardSet(world.root / "out", open_shards=1).read(0, 0)
    mean = latents.moments_from_bytes(parts["moments.npy"])[:4].astype(np.float32)
    with torch.no_grad():
        decoded = images.to_pixels(vae.decode(torch.from_numpy(mean[None])).sample)[0]  # pyright: ignore
    tile = pixels[24 : 24 + 144, 24 : 24 + 144][::9, ::9]
    assert np.abs(tile.astype(int) - decoded).max() <= 1


# text ---------------------------------------------------------------------------------------------


def test_captions_are_embedded(world: World) -> None:
    without = {name: part for name, part in good(7).items() if name != "txt"}
    long = good(8) | {"txt": b"one two " * 12}
    source = write_set(world.root / "images", [["", "a caption", ""], [""], [without, long]])
    clip = write_text_encoder(world.root / "clip")
    text = ("conditioning.kind=text", "conditioning.num_classes=0", "conditioning.text.embeddings=cached")
    out = encode(world, source, world.root / "out", *text, f"conditioning.text.path={clip}")
    encoder = TextEncoders.load(clip)
    shards = ShardSet(out, open_shards=1)
    for place in ((0, 0), (0, 1), (1, 0), (2, 0)):
        _, parts = shards.read(*place)
        found = latents.text_from_bytes(parts["text.npy"])
        assert found.shape == (NUM_TOKENS, WIDTH)
        assert np.allclose(found, encoder.encode([parts["txt"].decode()]).tokens[0].numpy(), atol=2e-3)
    said = told(out)
    assert said["num_truncated_captions"] == 1 and said["num_quarantined"] == 2
    assert [row["reason"].partition(":")[0] for row in rows(out)] == [
        ".txt is not UTF-8",
        "no .txt part",
    ]
    assert said["origin"]["text_encoder_sha256"] == encoder.sha256()
    encode(world, source, out, code=2)
    assert "text_encoder_sha256 was" in world.said()
    encode(world, source, world.root / "none", *text, f"conditioning.text.path={world.root / 'nothing'}", code=2)
    assert f"error: conditioning.text.path: {world.root}/nothing/tokenizer has no tokenizer_config.json" in world.said()


# wrong usage --------------------------------------------------------------------------------------


def test_a_config_that_trains_on_images_is_told(world: World) -> None:
    assert world.do("encode", "data.train_latents=null") == [2]
    assert "error: data.train_latents: null came, so this config trains on the images themselves" in world.said()


def test_latents_are_written_to_folders(world: World) -> None:
    assert world.do("encode", "data.train_latents=s3://bucket/latents") == [2]
    assert "data.train_latents: s3://bucket/latents is a URL" in world.said()
    (world.root / "file").write_text("")
    assert world.do("encode", f"data.train_latents={world.root}/file/latents") == [2]
    assert world.do("encode", f"data.train_latents={world.root}/file") == [2]
    errors = [line for line in world.said().splitlines() if line.startswith("error:")]
    assert len(errors) == 3 and "Traceback" not in world.said()


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_part_that_is_none_is_told(world: World, part: str) -> None:
    assert world.do("encode", f"--part={part}") == [2]
    assert f"{part!r} came, I/N with I from 1 to N was wanted, such as 3/16" in world.said()


def test_a_shard_that_changed_is_told(world: World, source: Path) -> None:
    shard = source / "001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"picture 6", b"picture 9"))
    encode(world, source, world.root / "out", code=2)
    assert f"error: {shard}: changed since it was indexed" in world.said()


def test_decoding_in_threads_changes_nothing(world: World, source: Path) -> None:
    one = encode(world, source, world.root / "one", "data.workers=0")
    assert files_of(one) == files_of(encode(world, source, world.root / "four", "data.workers=4"))
